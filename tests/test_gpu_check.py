"""What becomes of the evidence when a stage of benchmarks/gpu_check.sh fails, hangs or prints garbage.

The device is a stand-in: a python, an nvidia-smi and a compute-sanitizer that answer at once.
"""

from __future__ import annotations

import itertools
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import gpu_check
import gpu_report
import pytest
from gpu_check import CLEAN, FAILED, PASSED, SKIPPED, TIMED_OUT, UNAVAILABLE, Stage

import conftest

ROOT = Path(__file__).resolve().parents[1]
ORDER = ["device", "build", "native", "tests", "networks", "compiled", "operators", "memcheck", "racecheck"]

# Answers as the programs of a stage do. $BREAK is a stage and what is wrong with it.
STAND_IN = r"""#!/bin/bash
for last; do :; done
ok="2 operator calls, all as the reference"
case "$*" in
    *gpu_check.py) exec REAL "$@";;
    *"gpu_probe.py device"*) stage=device; json='{"name": "Stand-in"}';;
    *"pip install"*) stage=build;;
    *"gpu_probe.py native"*) stage=native; json='{"operators": []}';;
    *"-m pytest"*) stage=tests; says="612 passed, 3 skipped, 1700 deselected in 81.20s (0:01:21)";;
    *bench-models*--layers*) stage=networks; json='{"models": [{"model": "resnet50", "ms": 1.5}], "layers": []}';;
    *bench-models*) stage=compiled; json='{"models": [], "layers": []}';;
    *"ptq4cuda bench "*) stage=operators; json='{"timings": [{"op": "quantize", "shape": [2, 3]}], "failures": []}';;
    *memcheck*) stage=memcheck; says="$ok"$'\n========= ERROR SUMMARY: 0 errors';;
    *racecheck*) stage=racecheck; says="$ok"$'\n========= RACECHECK SUMMARY: 0 hazards displayed (0 errors)';;
esac
echo $stage >> "$CALLS"
case "$BREAK" in
    "$stage fails") echo "it is broken"; exit 3;;
    "$stage hangs") sleep 300 & echo $! > "$CALLS.pid"; [ -z "$json" ] || echo "$json" > "$last"; sleep 300; exit 0;;
    "$stage prints garbage") printf '\377\376\000{[ \n'; exit 0;;
    "$stage leaves garbage") says="" json='{"models": [';;
    "$stage says "*) says=${BREAK#"$stage says "};;
esac
[ -z "$says" ] || echo "$says"
[ -z "$json" ] || echo "$json" > "$last"
exit ${EXIT:-0}
"""
NVIDIA_SMI = (
    "#!/bin/sh\necho 'Stand-in, 580.1, 81559 MiB, 4 MiB, 1980 MHz, 1980 MHz, 2619 MHz, 2619 MHz, 30, 70.00 W'\n"
)


class Device:
    """A machine with a stand-in for a GPU."""

    def __init__(self, folder: Path) -> None:
        self.tools, self.out, self.calls = folder / "tools", folder / "out", folder / "calls"
        self.tools.mkdir()
        stand_in = STAND_IN.replace("REAL", sys.executable)
        for name, text in (("python", stand_in), ("compute-sanitizer", stand_in), ("nvidia-smi", NVIDIA_SMI)):
            (self.tools / name).write_text(text)
            (self.tools / name).chmod(0o755)

    def start(self, broken: str = "", **environment: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            ["bash", ROOT / "benchmarks" / "gpu_check.sh"],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env={
                "PATH": f"{self.tools}:/usr/bin:/bin",
                "PYTHON": str(self.tools / "python"),
                "OUT": str(self.out),
                "CALLS": str(self.calls),
                "BREAK": broken,
                "GIT_COMMIT": "abc123",
                **environment,
            },
        )

    def run(self, broken: str = "", **environment: str) -> tuple[int, dict[str, Any]]:
        process = self.start(broken, **environment)
        self.output, _ = process.communicate(timeout=60)
        return process.returncode, self.record()

    def record(self) -> dict[str, Any]:
        found: dict[str, Any] = json.loads((self.out / "result.json").read_text())
        return found

    def called(self) -> list[str]:
        return self.calls.read_text().split()


@pytest.fixture
def device(tmp_path: Path) -> Device:
    return Device(tmp_path)


def statuses(record: Mapping[str, Any]) -> dict[str, str]:
    return {name: stage["status"] for name, stage in record["stages"].items()}


GOOD = dict.fromkeys(ORDER, PASSED) | {"memcheck": CLEAN, "racecheck": CLEAN}
WITHOUT_PACKAGE = dict.fromkeys(ORDER[3:], SKIPPED)


def is_running(pid: int) -> bool:
    """A zombie that nobody has asked for does not run."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def gone(pid: int) -> bool:
    for _ in range(1000):
        if not is_running(pid):
            return True
        time.sleep(0.02)
    return False


def test_all_stages_in_their_order(device: Device) -> None:
    code, record = device.run()
    assert code == 0, device.output
    assert device.called() == ORDER
    assert list(record["stages"]) == ORDER
    assert statuses(record) == GOOD
    assert record["status"] == PASSED
    assert record["commit"] == "abc123"
    assert record["machine"]["gpu"]["driver_version"] == "580.1"
    assert all(stage["gpu"]["clocks.sm"] == "1980 MHz" for stage in record["stages"].values())
    assert record["stages"]["tests"]["note"] == "612 passed, 3 skipped"
    assert record["stages"]["networks"]["figures"]["models"] == [{"model": "resnet50", "ms": 1.5}]
    assert record["stages"]["operators"]["figures"]["timings"][0]["op"] == "quantize"
    files = {path.name for path in device.out.iterdir()}
    assert files == {
        "result.json",
        *(f"{log}.log" for log in ("build", "tests", "networks", "operators", "sanitizers")),
    }
    assert "612 passed" in (device.out / "tests.log").read_text()
    assert [line.split()[0] for line in device.output.splitlines()[:-1]] == ORDER


@pytest.mark.parametrize("stage", ORDER)
def test_a_stage_that_fails(device: Device, stage: str) -> None:
    code, record = device.run(f"{stage} fails")
    expected = GOOD | {stage: FAILED}
    if stage in ORDER[:3]:
        expected |= dict.fromkeys(ORDER[ORDER.index(stage) + 1 :], SKIPPED)
    assert code == 1
    assert record["status"] == FAILED
    assert statuses(record) == expected
    assert record["stages"][stage]["tail"] == ["it is broken"]
    assert record["stages"][stage]["exit_status"] == 3
    assert "it is broken" in (device.out / record["stages"][stage]["log"]).read_text()


@pytest.mark.parametrize("stage", [stage for stage in ORDER if stage != "build"])
def test_a_stage_that_prints_garbage(device: Device, stage: str) -> None:
    code, record = device.run(f"{stage} prints garbage")
    assert code == 1
    assert statuses(record)[stage] == FAILED
    assert "no figures" in record["stages"][stage]["note"] or "no summary" in record["stages"][stage]["note"]
    assert [name for name, status in statuses(record).items() if status == SKIPPED] == [
        name for name in ORDER[ORDER.index(stage) + 1 :] if stage in ORDER[:3]
    ]


def test_a_stage_that_leaves_garbage(device: Device) -> None:
    code, record = device.run("networks leaves garbage")
    assert (code, statuses(record)) == (1, GOOD | {"networks": FAILED})
    assert record["stages"]["networks"]["figures"] is None
    assert not (device.out / "networks.json").exists()


@pytest.mark.parametrize("stage", ["build", "networks", "racecheck"])
def test_the_time_of_everything_ends(device: Device, stage: str) -> None:
    """A stage that hangs gets what is left; then nothing is, and what it had started has ended."""
    start = time.monotonic()
    code, record = device.run(f"{stage} hangs", GPU_CHECK_SECONDS=str(gpu_check.GRACE + 4))
    assert time.monotonic() - start < 60  # and not 300
    hangs = ORDER.index(stage)
    assert statuses(record) == {**GOOD, stage: TIMED_OUT, **dict.fromkeys(ORDER[hangs + 1 :], SKIPPED)}
    assert code == (0 if stage == "racecheck" else 1)  # a sanitizer that is slow has found nothing
    assert gone(int(Path(f"{device.calls}.pid").read_text()))
    if stage == "networks":  # as far as it came
        assert record["stages"][stage]["figures"]["models"] == [{"model": "resnet50", "ms": 1.5}]
        assert record["stages"]["compiled"]["note"] == "the 9 s were over"


def test_tools_that_are_missing(device: Device) -> None:
    (device.tools / "nvidia-smi").unlink()
    (device.tools / "compute-sanitizer").unlink()
    code, record = device.run()
    assert (code, statuses(record)) == (0, GOOD | dict.fromkeys(ORDER[-2:], UNAVAILABLE))
    assert "compute-sanitizer does not start: No such file" in record["stages"]["memcheck"]["note"]
    assert record["machine"]["gpu"] == {"unavailable": "nvidia-smi was not found"}


@pytest.mark.parametrize(
    ("says", "code", "status", "note"),
    [
        (
            "Error: Device not supported. Please refer",
            "1",
            UNAVAILABLE,
            "compute-sanitizer says: Device not supported",
        ),
        ("========= ERROR SUMMARY: 2 errors", "9", FAILED, "2 errors (exit status 9)"),
        ("========= ERROR SUMMARY: 0 errors", "0", FAILED, "0 errors (exit status 0)"),  # nothing was compared
        ("AssertionError", "1", FAILED, "compute-sanitizer left no summary (exit status 1)"),
    ],
)
def test_what_a_sanitizer_says(says: str, code: str, status: str, note: str) -> None:
    assert gpu_check.by_sanitizer(int(code), says) == (status, note)


@pytest.mark.parametrize(
    ("code", "text", "verdict"),
    [
        (0, "...\n612 passed, 3 skipped in 8.2s", (PASSED, "612 passed, 3 skipped")),
        (
            0,
            "== 300 passed in 8.00s ==..\n400 passed, 1 warning in 0:01.00s\n340 passed in 9s",
            (PASSED, "640 passed"),
        ),
        (1, "4 failed, 700 passed, 1 error in 70.11s (0:01:10)", (FAILED, "700 passed, 4 failed, 1 error")),
        (0, "12 passed in 0.1s", (FAILED, "12 passed: fewer than 600 tests ran")),
        (5, "2300 deselected in 0.1s", (FAILED, "no tests: fewer than 600 tests ran")),
        (2, "Segmentation fault", (FAILED, "pytest left no summary (exit status 2)")),
        (-9, "700 passed in 50.0s", (FAILED, "700 passed")),
        (None, "KeyboardInterrupt\n500 passed in 90s", (TIMED_OUT, "500 passed")),
        (None, "....", (TIMED_OUT, "")),
    ],
)
def test_what_pytest_says(code: int | None, text: str, verdict: tuple[str, str]) -> None:
    assert gpu_check.by_tests(code, text) == verdict


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL])
def test_a_run_that_is_ended(device: Device, number: signal.Signals) -> None:
    process = device.start("networks hangs")
    pid = Path(f"{device.calls}.pid")
    for _ in range(3000):
        if pid.exists() and pid.read_text() and (device.out / "networks.json").exists():
            break
        time.sleep(0.02)
    process.send_signal(number)
    process.communicate(timeout=20)
    record = device.record()
    assert {name: statuses(record)[name] for name in ORDER[:4]} == dict.fromkeys(ORDER[:4], PASSED)
    if number == signal.SIGKILL:
        assert (record["status"], statuses(record)["networks"]) == ("running", "running")
        assert "resnet50" in (device.out / "networks.json").read_text()
        os.killpg(os.getpgid(int(pid.read_text())), signal.SIGKILL)
        return
    assert process.returncode == 130
    assert record["status"] == f"interrupted by {number.name}"
    assert statuses(record)["networks"] == "interrupted"
    assert record["stages"]["networks"]["figures"]["models"] == [{"model": "resnet50", "ms": 1.5}]
    assert gone(int(pid.read_text()))


def test_each_stage_has_its_own_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One that hangs, deaf to interrupts, takes no more than its own time, and leaves no process behind."""
    monkeypatch.setattr(gpu_check, "GRACE", 0.3)
    deaf = f"trap '' INT; (trap '' INT; sleep 300) & echo $! > {tmp_path}/pid; echo so far; sleep 300"
    leaves = f"sleep 300 & echo $! > {tmp_path}/left"
    chosen = (
        Stage("hangs", "a.log", ("bash", "-c", deaf), 1, 2),
        Stage("leaves", "a.log", ("bash", "-c", leaves), 1, 50),
        Stage("missing", "b.log", ("no-such-program",), 1, 50),
        Stage("needs", "b.log", ("true",), 1, 50, needs=("hangs",)),
        Stage("last", "b.log", ("echo", "fine"), 1, 50),
    )
    assert not gpu_check.run(chosen, tmp_path, {"machine": {"gpu": {"unavailable": ""}}}, seconds=200)
    record = json.loads((tmp_path / "result.json").read_text())
    assert list(statuses(record).values()) == [TIMED_OUT, PASSED, UNAVAILABLE, SKIPPED, PASSED]
    assert record["stages"]["hangs"]["tail"] == ["so far"]
    assert record["stages"]["hangs"]["seconds"] < 60
    assert record["stages"]["needs"]["note"] == "needs hangs"
    assert gone(int((tmp_path / "pid").read_text()))
    assert gone(int((tmp_path / "left").read_text()))
    assert (tmp_path / "b.log").read_text().endswith("== last: echo fine\nfine\n")


def test_the_whole_run_fits_into_its_time(tmp_path: Path) -> None:
    chosen = gpu_check.stages("python", tmp_path, ())
    assert [stage.name for stage in chosen] == ORDER
    assert sum(stage.expected for stage in chosen) < gpu_check.SECONDS == 520
    assert all(stage.expected < stage.limit for stage in chosen)
    logs = {stage.log for stage in chosen}
    figures = [stage for stage in chosen if stage.figures]
    assert figures
    assert len({"result.json", "result.json.part", *logs}) + 1 <= 8  # one stage's figures at a time


def test_the_sanitizers_see_each_tensor_alone(tmp_path: Path) -> None:
    by_name = {stage.name: stage for stage in gpu_check.stages("python", tmp_path, ())}
    memcheck, racecheck = by_name["memcheck"], by_name["racecheck"]
    assert memcheck.environment["PYTORCH_NO_CUDA_MEMORY_CACHING"] == "1"
    assert " ".join(map(str, memcheck.command)).count("--report-api-errors no") == 1
    assert racecheck.command[-3:] == ["conv2d_integer", "channel_statistics", "channel_histogram"]
    assert memcheck.optional
    assert racecheck.optional


@pytest.mark.parametrize("plugins", [(), ("xdist",), ("pytest_timeout",), ("xdist", "pytest_timeout")])
def test_pytest_without_its_plugins(plugins: tuple[str, ...]) -> None:
    command = [str(word) for word in gpu_check.tests_command("python", plugins)]
    assert ("-n" in command) == ("xdist" in plugins)
    assert ("--timeout=60" in command) == ("pytest_timeout" in plugins)
    assert ("-c" in command) == ("xdist" not in plugins)


def test_shards_run_every_test_once(tmp_path: Path) -> None:
    """The processes' summaries add up; the status is the worst; an interrupt lets them say what they have seen."""
    pytest_ = tmp_path / "pytest"
    pytest_.write_text("#!/bin/sh\necho $2 $3 $4; case $4 in 2/*) exit 3;; esac\n")
    pytest_.chmod(0o755)
    run = subprocess.run(
        [sys.executable, "-c", gpu_check._SHARDS, "3", pytest_, "-m", "gpu"], text=True, capture_output=True
    )
    assert run.returncode == 3
    assert sorted(run.stdout.splitlines()) == [f"gpu --shard {i}/3" for i in (1, 2, 3)]

    test = tmp_path / "test_slow.py"
    test.write_text(
        "import os, pathlib, time\n"
        "def test_a(): pass\n"
        "def test_b():\n"
        "    pathlib.Path(__file__).with_name(f'started{os.getpid()}').touch()\n"
        "    time.sleep(100)\n"
    )
    (tmp_path / "conftest.py").write_text("def pytest_addoption(parser): parser.addoption('--shard')\n")
    command = [sys.executable, "-c", gpu_check._SHARDS, "2", sys.executable, "-m", "pytest", "-q"]
    process = subprocess.Popen(
        [*command, "-p", "no:cacheprovider", test],
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        cwd=tmp_path,
        preexec_fn=gpu_check.own_group,
    )
    for _ in range(3000):
        if len(list(tmp_path.glob("started*"))) == 2:
            break
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGINT)
    output, _ = process.communicate(timeout=60)
    assert gpu_check.by_tests(None, output) == (TIMED_OUT, "2 passed")


COLLECT = """
import sys, pytest, torch
torch.cuda.is_available = lambda: True
sys.exit(pytest.main(["-q", "--collect-only", "-p", "no:cacheprovider", "-m", "gpu", *sys.argv[1:]]))
"""


def test_a_device_has_enough_tests(tmp_path: Path) -> None:
    files = [ROOT / "tests" / "ops", ROOT / "tests" / "execute" / "test_cuda.py"]
    # In another folder: the installed package is what has the tests' backends, not the sources.
    run = subprocess.run([sys.executable, "-c", COLLECT, *files], text=True, capture_output=True, cwd=tmp_path)
    found = [line for line in run.stdout.splitlines() if "::" in line]
    assert len(found) >= gpu_check.LEAST_TESTS, run.stdout
    assert all("cuda_on_cpu" not in line for line in found)


def test_no_two_shards_have_the_same_test() -> None:
    """And what must not run side by side is in one of them."""

    def shard(number: int) -> list[int]:
        groups = [pytest.mark.xdist_group("large").mark if i % 5 == 2 else None for i in range(20)]
        items = [
            SimpleNamespace(i=i, get_closest_marker={"xdist_group": groups[i], "gpu": None}.get, add_marker=None)
            for i in range(20)
        ]
        hook = SimpleNamespace(pytest_deselected=lambda items: None)
        config = SimpleNamespace(getoption=lambda name: f"{number}/3", hook=hook)
        conftest.pytest_collection_modifyitems(config, items)  # type: ignore[arg-type]
        return [item.i for item in items]

    shards = [shard(number) for number in (1, 2, 3)]
    assert sorted(itertools.chain(*shards)) == list(range(20))
    assert {2, 7, 12, 17} <= set(shards[0])
    assert all(len(items) >= 4 for items in shards)


@pytest.mark.parametrize("given", ["", "abc"])
def test_commit(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, given: str) -> None:
    monkeypatch.setenv("GIT_COMMIT", given)
    if given:
        assert gpu_check.commit() == "abc"
        return
    (tmp_path / "csrc").mkdir()
    (tmp_path / "csrc" / "a.cu").write_text("one")
    monkeypatch.setattr(gpu_check, "ROOT", tmp_path)
    without = gpu_check.commit()
    assert without == f"sources {gpu_check.sources()}"
    (tmp_path / "csrc" / "a.cu").write_text("two")
    assert gpu_check.commit() != without
    git = ["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a@b"]
    for words in (["init", "-q"], ["add", "."], ["commit", "-q", "-m", "a"]):
        subprocess.run([*git, *words], check=True)
    head = subprocess.run([*git, "rev-parse", "HEAD"], text=True, capture_output=True, check=True).stdout.strip()
    assert gpu_check.commit() == head
    (tmp_path / "csrc" / "a.cu").write_text("three")
    assert gpu_check.commit() == f"{head} with changes"
    monkeypatch.setenv("PATH", str(tmp_path))
    assert gpu_check.commit() == f"sources {gpu_check.sources()}"


def test_an_nvidia_smi_that_answers_nothing(device: Device, monkeypatch: pytest.MonkeyPatch) -> None:
    (device.tools / "nvidia-smi").write_text("#!/bin/sh\necho 'No devices were found'\nexit 6\n")
    monkeypatch.setenv("PATH", f"{device.tools}:/usr/bin:/bin")
    assert gpu_check.nvidia_smi() == {"unavailable": "nvidia-smi: No devices were found"}


def test_without_a_gpu(tmp_path: Path) -> None:
    environment = {
        "PATH": os.environ["PATH"],
        "OUT": str(tmp_path),
        "PYTHON": sys.executable,
        "CUDA_VISIBLE_DEVICES": "",
    }
    run = subprocess.run(
        ["bash", ROOT / "benchmarks" / "gpu_check.sh"], capture_output=True, text=True, env=environment
    )
    assert run.returncode == 1
    record = json.loads((tmp_path / "result.json").read_text())
    assert statuses(record) == {"device": FAILED, **dict.fromkeys(ORDER[1:], SKIPPED)}
    assert "sees no GPU" in record["stages"]["device"]["tail"][-1]


def test_the_native_library_is_asked_for(tmp_path: Path) -> None:
    """Where it does not load, that is a sentence, and no JSON file."""
    run = subprocess.run(
        [sys.executable, ROOT / "benchmarks" / "gpu_probe.py", "native", tmp_path / "native.json"],
        capture_output=True,
        text=True,
        env={**os.environ, "CUDA_VISIBLE_DEVICES": ""},
    )
    assert run.returncode == 1
    assert run.stderr.startswith("the CUDA library is not loaded: ")
    assert "CPU library" in run.stdout
    assert not (tmp_path / "native.json").exists()


def test_the_page_of_a_broken_run(device: Device) -> None:
    _, record = device.run("tests fails")
    (device.out / "result.json").write_text(json.dumps(record))
    subprocess.run([sys.executable, ROOT / "benchmarks" / "gpu_report.py", device.out / "result.json"], check=True)
    page = (device.out / "result.md").read_text()
    assert page.startswith("# Stand-in\n")
    assert "- commit: abc123\n" in page
    assert "| tests | FAILED |" in page
    assert "| resnet50 |" in page
    assert "| quantize | – | 2x3 |" in page
    assert "## The end of tests\n\n```\nit is broken\n```" in page
    assert gpu_report.page({}).startswith("# No GPU\n")
