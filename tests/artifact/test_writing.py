"""Files are whole, with the right permissions, in the right place, and nothing else is left."""

from __future__ import annotations

import errno
import fcntl
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from ptq4cuda.artifact import writing
from ptq4cuda.artifact.writing import check_writable, write_whole


@pytest.fixture(params=["nameless", "named"], autouse=True)
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Both ways to write: as on most file systems, and as on those where a file must have a name."""
    if request.param == "named":
        monkeypatch.setattr(writing, "_DESCRIPTORS", Path("/nowhere"))
    return str(request.param)


def test_a_new_file_has_the_permissions_of_the_umask(tmp_path: Path) -> None:
    for umask, mode in ((0o022, 0o644), (0o077, 0o600), (0o002, 0o664)):
        before = os.umask(umask)
        try:
            write_whole(tmp_path / f"{umask}", b"content")
        finally:
            os.umask(before)
        assert (tmp_path / f"{umask}").stat().st_mode & 0o777 == mode


def test_a_file_is_replaced_and_leaves_its_permissions(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"longer content")
    path.chmod(0o640)
    other = tmp_path / "hard link"
    os.link(path, other)
    write_whole(path, b"new")
    assert path.read_bytes() == b"new"
    assert path.stat().st_mode & 0o777 == 0o640
    assert other.read_bytes() == b"longer content"  # it was not written over
    assert sorted(tmp_path.iterdir()) == [path, other]


@pytest.mark.parametrize("there", [True, False])
def test_a_link_stays_and_what_it_points_to_is_replaced(tmp_path: Path, there: bool) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    link, target = tmp_path / "link", folder / "target"
    link.symlink_to("folder/target")
    if there:
        target.write_bytes(b"old")
    write_whole(link, b"new")
    assert link.is_symlink()
    assert target.read_bytes() == b"new"
    assert list(folder.iterdir()) == [target]


@pytest.mark.parametrize(
    "write", [lambda path, content: write_whole(path, content), lambda path, _: check_writable(path)]
)
def test_what_is_no_file_is_not_replaced(tmp_path: Path, write: Callable[[Path, bytes], None]) -> None:
    """Nor is it found out after the work only."""
    pipe, loop = tmp_path / "pipe", tmp_path / "loop"
    os.mkfifo(pipe)
    loop.symlink_to(loop)
    link = tmp_path / "link"
    link.symlink_to("/dev/null")
    before = sorted(tmp_path.iterdir())
    for path in (pipe, link, Path("/dev/null"), Path("/dev/full")):
        with pytest.raises(OSError, match=f"{path}' cannot be written: it is a device, a pipe or a socket"):
            write(path, b"content")
    with pytest.raises(IsADirectoryError, match="cannot be written: it is a folder"):
        write(tmp_path, b"content")
    with pytest.raises(OSError, match="loop' cannot be written: Too many levels of symbolic links"):
        write(loop, b"content")
    with pytest.raises(FileNotFoundError, match=r"no folder '.*/nowhere' to save 'file' in"):
        write(tmp_path / "nowhere" / "file", b"content")
    assert sorted(tmp_path.iterdir()) == before
    assert link.is_symlink()


def test_asking_changes_nothing(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"old")
    check_writable(path, None, tmp_path / "other")
    assert path.read_bytes() == b"old" and list(tmp_path.iterdir()) == [path]


def test_a_file_without_permission_to_write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"old")
    monkeypatch.setattr("os.access", lambda *_: False)  # root may write to every file
    with pytest.raises(PermissionError, match="cannot be written: it is a file without permission to write"):
        write_whole(path, b"new")
    assert path.read_bytes() == b"old"


def test_long_names(tmp_path: Path) -> None:
    name = tmp_path / ("n" * 250 + ".ptq4")
    write_whole(name, b"content")
    assert list(tmp_path.iterdir()) == [name]
    with pytest.raises(OSError, match="cannot be written: File name too long") as error:
        write_whole(tmp_path / ("n" * 256), b"content")
    assert error.value.errno == errno.ENAMETOOLONG
    assert list(tmp_path.iterdir()) == [name]


def test_leftovers_are_removed_but_not_what_is_being_written(tmp_path: Path) -> None:
    left, busy, foreign = (tmp_path / f".{name}" for name in ("1.ptq4cuda-unfinished", "2.ptq4cuda-unfinished", "3"))
    for path in (left, busy, foreign):
        path.write_bytes(b"half")
    with busy.open("rb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        write_whole(tmp_path / "file", b"content")
    assert sorted(tmp_path.iterdir()) == [busy, foreign, tmp_path / "file"]
    write_whole(tmp_path / "file", b"content")
    assert sorted(tmp_path.iterdir()) == [foreign, tmp_path / "file"]


# writing.py by itself, which starts in no time.
PROGRAM = """
import resource, sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
import writing
if sys.argv[2] == "named":
    writing._DESCRIPTORS = Path("/nowhere")
"""


def program(way: str, lines: str, path: Path) -> list[str]:
    return [sys.executable, "-c", PROGRAM + lines, str(Path(writing.__file__).parent), way, str(path)]


def test_a_full_disk_leaves_the_old_file(way: str, tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"old")
    limit = "resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))\n"
    write = "try: writing.write_whole(sys.argv[3], bytes(2000))\nexcept OSError as error: print(error)"
    found = subprocess.run(program(way, limit + write, path), capture_output=True, text=True, check=True)
    assert found.stdout == f"[Errno {errno.EFBIG}] '{path}' cannot be written: File too large\n"
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_killed_process_leaves_a_whole_file(way: str, tmp_path: Path) -> None:
    path = tmp_path / "file"
    size = 4 << 20
    endless = "i = 0\nwhile True:\n    writing.write_whole(sys.argv[3], bytes([i % 256]) * (4 << 20))\n    i += 1"
    for kill in range(6):
        process = subprocess.Popen(program(way, endless, path))
        started = time.monotonic()
        while not path.exists() and time.monotonic() - started < 60:
            time.sleep(0.001)
        time.sleep(0.003 * kill)
        process.send_signal(signal.SIGKILL)
        process.wait()
        content = path.read_bytes()
        assert content == content[:1] * size
        if way == "nameless":  # but for the moment in which it takes the place of the old one
            assert all(left.stat().st_size == size for left in tmp_path.iterdir())
        path.unlink()
    write_whole(path, b"content")
    assert list(tmp_path.iterdir()) == [path]
