"""Files that are written whole or not at all, whatever ends the process meanwhile."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import io
import os
import secrets
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

_DESCRIPTORS = Path("/proc/self/fd")  # of this process: where a nameless file gets its name from
_UNFINISHED = ".ptq4cuda-unfinished"  # how names end that a file has before its own


def write_whole(path: str | os.PathLike[str], content: bytes) -> None:
    """Put a file with this content in the place of what is there, in one step, once it is on the disk.

    A symbolic link stays, and the file that it points to is replaced. A file that is replaced leaves its permissions
    to the new one. Until it is whole, the file has no name: of a process that is killed nothing is left. Where the
    file system has no nameless files (NFS), it has a name of its own in the same folder, which the next call for a
    file in this folder removes.

    Raises:
        OSError: the file cannot be written: there is no such folder, no room, no permission, or what is there is a
            folder, a device or another special file. What was there is untouched.
    """
    with _unfinished(path) as (file, name, target):
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
        if not name.exists():
            _name(file.fileno(), name)
        os.replace(name, target)
    with contextlib.suppress(OSError):  # some file systems cannot
        _sync_folder(target.parent)


def check_writable(*paths: str | os.PathLike[str] | None) -> None:
    """Raise what write_whole would raise for these files, but for want of room, before there is anything to write.

    Raises:
        OSError: see write_whole.
    """
    for path in paths:
        if path is not None:
            with _unfinished(path):
                pass


@contextlib.contextmanager
def _unfinished(path: str | os.PathLike[str]) -> Iterator[tuple[BinaryIO, Path, Path]]:
    """Open a file that is going to take the place of another; yield it, a name for it and the name it is to have."""
    target = Path(os.path.realpath(path))
    folder = target.parent
    name = folder / f".{os.getpid()}-{secrets.token_hex(4)}{_UNFINISHED}"
    if not folder.is_dir():
        raise FileNotFoundError(errno.ENOENT, f"there is no folder {str(folder)!r} to save {target.name!r} in")
    try:
        mode = _mode_to_keep(target)
        _remove_leftovers(folder)
        with open(_create(name), "wb") as file:
            if mode is not None:
                os.fchmod(file.fileno(), mode)
            yield file, name, target
    except OSError as error:
        raise OSError(error.errno, f"{os.fspath(path)!r} cannot be written: {error.strerror}") from error
    finally:
        with contextlib.suppress(OSError):
            name.unlink()


def write_figure(path: str | os.PathLike[str], figure: Any) -> None:
    """Write a matplotlib figure as an image of the kind that the name says, .png where it says none, as write_whole.

    Raises:
        ValueError: matplotlib knows no such kind.
        OSError: the file cannot be written.
    """
    content = io.BytesIO()
    figure.savefig(content, dpi=150, format=Path(path).suffix[1:] or "png")
    write_whole(path, content.getvalue())


def _mode_to_keep(target: Path) -> int | None:
    """Return the permissions of the file that is there, None if there is none; raise if it must not be replaced."""
    try:
        mode = target.stat().st_mode
    except FileNotFoundError:
        return None
    if stat.S_ISDIR(mode):
        raise IsADirectoryError(errno.EISDIR, "it is a folder")
    if not stat.S_ISREG(mode):
        raise OSError(errno.EINVAL, "it is a device, a pipe or a socket, not a file")
    if not os.access(target, os.W_OK):
        raise PermissionError(errno.EACCES, "it is a file without permission to write")
    return stat.S_IMODE(mode)


def _create(unfinished: Path) -> int:
    """Open a new file, without a name if possible, else with this one; it is locked for as long as it is open."""
    if _DESCRIPTORS.is_dir():
        with contextlib.suppress(OSError):
            return _locked(os.open(unfinished.parent, os.O_TMPFILE | os.O_WRONLY, 0o666))
    while True:
        descriptor = _locked(os.open(unfinished, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666))
        if unfinished.exists():
            return descriptor
        os.close(descriptor)  # before it was locked, another process took it for a leftover


def _locked(descriptor: int) -> int:
    with contextlib.suppress(OSError):  # where there are no locks, leftovers stay
        fcntl.flock(descriptor, fcntl.LOCK_EX)
    return descriptor


def _name(descriptor: int, name: Path) -> None:
    folder = os.open(name.parent, os.O_RDONLY | os.O_DIRECTORY)
    try:  # src_dir_fd is not used, but lets Python follow the link to the file
        os.link(_DESCRIPTORS / str(descriptor), name, src_dir_fd=folder, follow_symlinks=True)
    finally:
        os.close(folder)


def _remove_leftovers(folder: Path) -> None:
    """Remove what processes left behind that were killed: files that nobody holds a lock on."""
    for left in folder.glob(f".*{_UNFINISHED}"):
        with contextlib.suppress(OSError), left.open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            left.unlink()


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
