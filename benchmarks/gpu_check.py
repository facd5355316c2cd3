"""Proves the CUDA kernels on this machine's GPU, in under ten minutes: benchmarks/gpu_check.sh, from anywhere.

It builds and installs the package, runs the tests on the device, times networks, their layers and every operator, and
runs the operators under compute-sanitizer. What is found goes into $OUT, by default benchmarks/results: result.json
and a log for each stage; python benchmarks/gpu_report.py makes a page of them. nvcc must be on PATH, and the
environment's Python needs torch with CUDA, setuptools and ninja to build, and pytest and hypothesis for the tests.
Nothing is downloaded.

Every stage is a process group of its own with a time limit of its own, and gets only what is left of the whole time,
so that no stage takes the others' evidence along. It writes its log straight into the results folder. result.json is
replaced in one step before and after each stage: it is whole and says what was running whenever the run ends, by
whatever means. Only the standard library is imported: a broken environment is a result, too.

Environment variables: OUT; PYTHON, by default python3; GIT_COMMIT, what to call the sources where there is no git;
GPU_CHECK_SECONDS, the time for everything.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import importlib.util
import json
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
SECONDS = 520.0  # of everything
LEAST_TESTS = 600  # that the device must have run: where its library does not load, its tests vanish
PROCESSES = 8  # of the tests
TEST_SECONDS = 60  # of one test
GRACE = 5.0  # seconds to end in after an interrupt
PLUGINS = ("xdist", "pytest_timeout")  # of pytest, used where they are there
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)

PASSED, CLEAN, FAILED = "passed", "clean", "FAILED"
TIMED_OUT, UNAVAILABLE, SKIPPED = "timed out", "unavailable", "skipped"
RUNNING, INTERRUPTED = "running", "interrupted"

Verdict = tuple[str, str]  # a status and what there is to say about it
Judge = Callable[[int | None, str], Verdict]  # of an exit status, None where the time was over, and a log


def by_exit_status(code: int | None, text: str) -> Verdict:
    """Judge a command that fails as commands do."""
    if code is None:
        return TIMED_OUT, ""
    return (PASSED, "") if code == 0 else (FAILED, f"exit status {code}")


def by_tests(code: int | None, text: str) -> Verdict:
    """Judge pytest, or several at once, also by how many tests ran."""
    kinds = r"passed|failed|errors?|skipped|deselected|xfailed|xpassed|warnings?"
    counts: Counter[str] = Counter()
    for summary in re.findall(rf"((?:\d+ (?:{kinds}),? )+)in [\d.]+s", text):
        for number, kind in re.findall(rf"(\d+) ({kinds})", summary):
            counts[kind.rstrip("s") if kind.startswith("error") else kind] += int(number)
    said = ", ".join(f"{counts[kind]} {kind}" for kind in ("passed", "failed", "error", "skipped") if counts[kind])
    ran = counts["passed"] + counts["failed"]
    if code is None:
        return TIMED_OUT, said
    if not counts:
        return FAILED, f"pytest left no summary (exit status {code})"
    if ran < LEAST_TESTS:
        return FAILED, f"{said or 'no tests'}: fewer than {LEAST_TESTS} tests ran"
    return (PASSED, said) if code == 0 and not counts["failed"] and not counts["error"] else (FAILED, said)


def by_sanitizer(code: int | None, text: str) -> Verdict:
    """Judge compute-sanitizer. What it cannot do on a device says nothing about the kernels."""
    refused = re.search(r"device not supported|no supported devices?|unsupported device", text, re.IGNORECASE)
    if refused:
        return UNAVAILABLE, f"compute-sanitizer says: {refused[0]}"
    if code is None:
        return TIMED_OUT, ""
    summaries = re.findall(r"SUMMARY: (.+)", text)
    if not summaries:
        return FAILED, f"compute-sanitizer left no summary (exit status {code})"
    compared = re.findall(r"\d+ operator calls, all as the reference", text)
    if code != 0 or not summaries[-1].startswith("0 ") or not compared:
        return FAILED, f"{summaries[-1]} (exit status {code})"
    return CLEAN, compared[-1]


@dataclass(frozen=True)
class Stage:
    """One command.

    Attributes:
        name: of it, and of what it found.
        log: file in the results folder that its output is appended to.
        command: program and arguments.
        expected: seconds that it takes on an H100 with 16 cores, estimated.
        limit: seconds after which it is ended.
        needs: stages without which it means nothing.
        judge: tells what came of it.
        figures: it writes {name}.json into the results folder, which becomes part of result.json.
        environment: variables beside the driver's.
        optional: that it did not come to an end does not fail the run.
    """

    name: str
    log: str
    command: Sequence[str | Path]
    expected: float
    limit: float
    needs: Sequence[str] = ()
    judge: Judge = by_exit_status
    figures: bool = False
    environment: Mapping[str, str] = field(default_factory=dict)
    optional: bool = False


def stages(python: str, out: Path, plugins: Sequence[str]) -> tuple[Stage, ...]:
    """Return the stages in their order: what the most depends on first, what may take longest last.

    Args:
        python: of the environment that is installed into.
        out: the results folder.
        plugins: modules of PLUGINS that are installed.
    """
    probe = (python, ROOT / "benchmarks" / "gpu_probe.py")
    install = (python, "-m", "pip", "install", "-q", "--no-build-isolation", "--no-deps", ROOT)
    package = (python, "-m", "ptq4cuda")
    resnet = (*package, "bench-models", "--device", "cuda", "--model", "resnet50", "--batch", "64")
    networks = (*resnet, "--model", "mobilenet_v2", "--batch", "1", "--layers", "--no-compiled")
    operators = (*package, "bench", "--device", "cuda", "--quick", "--no-compiled")
    reductions = ("channel_statistics", "channel_histogram")

    def json_of(name: str, option: str = "--json") -> tuple[str | Path, ...]:
        return (option, out / f"{name}.json")

    def stage(name: str, log: str, command: Sequence[str | Path], expected: int, limit: int, **more: Any) -> Stage:
        return Stage(name, log, command, expected, limit, **{"needs": ("native",), **more})

    return (
        stage("device", "build.log", (*probe, *json_of("device", "device")), 10, 40, needs=(), figures=True),
        stage("build", "build.log", install, 80, 240, needs=("device",), environment={"PTQ4CUDA_CUDA": "1"}),
        stage("native", "build.log", (*probe, *json_of("native", "native")), 10, 40, needs=("build",), figures=True),
        stage("tests", "tests.log", tests_command(python, plugins), 90, 150, judge=by_tests),
        stage("networks", "networks.log", (*networks, *json_of("networks")), 70, 100, figures=True),
        # float16 through torch.compile, the best that PyTorch can do.
        stage("compiled", "networks.log", (*resnet, *json_of("compiled")), 60, 90, figures=True, optional=True),
        stage("operators", "operators.log", (*operators, *json_of("operators")), 60, 90, figures=True),
        sanitizer(python, "memcheck", (), 80, 100),
        sanitizer(python, "racecheck", ("conv2d_integer", *reductions), 50, 100),
    )


def tests_command(python: str, plugins: Sequence[str]) -> tuple[str | Path, ...]:
    """Return the command that runs the tests on the device in several processes, with pytest's plugins or without."""
    pytest = [python, "-m", "pytest", "-q", "-m", "gpu", "--tb=short", "--durations=15", "-p", "no:cacheprovider"]
    pytest += ["--continue-on-collection-errors", "-o", f"faulthandler_timeout={TEST_SECONDS}"]
    if "pytest_timeout" in plugins:
        # A device that hangs leaves no Python to run a signal handler in: a thread ends the process.
        pytest += [f"--timeout={TEST_SECONDS}", "--timeout-method=thread"]
    files = (ROOT / "tests" / "ops", ROOT / "tests" / "execute" / "test_cuda.py")
    if "xdist" in plugins:
        return (*pytest, "-n", str(PROCESSES), "--dist", "loadgroup", *files)
    return (python, "-c", _SHARDS, str(PROCESSES), *pytest, *files)


# Each process takes its share of the tests (tests/conftest.py). An interrupt is theirs: they say what they have seen.
_SHARDS = """
import signal, subprocess, sys
count, *pytest = sys.argv[1:]
running = [subprocess.Popen([*pytest, "--shard", f"{i + 1}/{count}"]) for i in range(int(count))]
signal.signal(signal.SIGINT, signal.SIG_IGN)
sys.exit(max(process.wait() for process in running))
"""


def sanitizer(python: str, tool: str, operators: Sequence[str], expected: float, limit: float) -> Stage:
    """Return the stage of one of compute-sanitizer's tools, on all operators or some."""
    command = ["compute-sanitizer", "--tool", tool, "--error-exitcode", "9", "--print-limit", "3"]
    environment = {"PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT / "tests"), os.environ.get("PYTHONPATH")]))}
    if tool == "memcheck":
        # What is beyond a tensor belongs to nobody only if each has an allocation of its own. And of the driver's
        # functions PyTorch asks some just to see whether they fail.
        command += ["--report-api-errors", "no"]
        environment["PYTORCH_NO_CUDA_MEMORY_CACHING"] = "1"
    command += [python, str(ROOT / "tests" / "cuda_on_cpu" / "sanitized_ops.py"), "cuda", *operators]
    return Stage(
        tool,
        "sanitizers.log",
        command,
        expected,
        limit,
        ("native",),
        by_sanitizer,
        environment=environment,
        optional=True,
    )


# --- one stage ------------------------------------------------------------------------------------------------


class Interrupted(Exception):
    """Somebody ends the run."""


def own_group() -> None:
    """Become a group, to be ended as a whole, but of this session: whoever ends that ends the group as well.

    An interrupt must reach it also where it would be ignored, as in a shell's background.
    """
    os.setpgrp()
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def run_command(
    command: Sequence[str | Path], limit: float, log: Path, folder: Path, environment: Mapping[str, str]
) -> int | None:
    """Run a command and return its exit status, or None if it had to be ended after `limit` seconds.

    Whatever it started and did not end ends with it.
    """
    with log.open("ab") as output:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            cwd=folder,
            env=dict(environment),
            preexec_fn=own_group,
        )
        try:
            return process.wait(limit)
        except subprocess.TimeoutExpired:
            with contextlib.suppress(ProcessLookupError, subprocess.TimeoutExpired):
                os.killpg(process.pid, signal.SIGINT)  # pytest says then what it has seen so far
                process.wait(GRACE)
            return None
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def run_stage(stage: Stage, limit: float, out: Path, folder: Path) -> dict[str, Any]:
    """Run a stage and return what came of it."""
    log = out / stage.log
    start = time.monotonic()
    with log.open("a") as file:
        print(f"\n== {stage.name}: {' '.join(map(str, stage.command))}", file=file)
    begin = log.stat().st_size
    missing = False
    try:
        code = run_command(stage.command, limit, log, folder, {**os.environ, **stage.environment})
    except OSError as error:
        missing, code, why = True, 127, f"{stage.command[0]} does not start: {error.strerror}"
    text = log.read_bytes()[begin:].decode(errors="replace")
    if missing:
        status, note = UNAVAILABLE, why
    else:
        status, note = stage.judge(code, text)
    found: dict[str, Any] = {"status": status, "note": note, "seconds": round(time.monotonic() - start, 1)}
    found |= {"limit": round(limit, 1), "exit_status": code}
    if stage.figures:
        figures = take_figures(out / f"{stage.name}.json")
        if figures is None and status == PASSED:
            found |= {"status": FAILED, "note": "it left no figures"}
        found["figures"] = figures
    if found["status"] not in (PASSED, CLEAN):
        found["tail"] = text.splitlines()[-20:]
    return found


def take_figures(path: Path) -> Any:
    """Return what a stage wrote, or None, and leave no file."""
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError):
        return None
    finally:
        for file in (path, path.with_name(path.name + ".part")):
            file.unlink(missing_ok=True)


# --- the run --------------------------------------------------------------------------------------------------


def run(stages: Sequence[Stage], out: Path, record: dict[str, Any], seconds: float = SECONDS) -> bool:
    """Run stages and keep result.json up to date; tell whether all is well.

    Args:
        stages: in their order.
        out: the results folder.
        record: what result.json says beside the stages.
        seconds: for all of them together.
    """
    end = time.monotonic() + seconds
    done: dict[str, dict[str, Any]] = {}
    record |= {"status": RUNNING, "stages": done}

    def write() -> None:
        record["seconds"] = round(seconds - (end - time.monotonic()), 1)
        unfinished = out / "result.json.part"
        unfinished.write_text(json.dumps(record, indent=1) + "\n")
        unfinished.replace(out / "result.json")

    gpu = record["machine"]["gpu"]
    with tempfile.TemporaryDirectory() as folder:  # not the sources' folder: the installed package is what runs
        try:
            for stage in stages:
                missing = [name for name in stage.needs if done[name]["status"] != PASSED]
                limit = min(stage.limit, end - time.monotonic() - GRACE)
                if missing or limit <= 0:
                    why = f"needs {' and '.join(missing)}" if missing else f"the {seconds:.0f} s were over"
                    entry = {"status": SKIPPED, "note": why, "seconds": 0.0}
                else:
                    done[stage.name] = {"status": RUNNING, "limit": round(limit, 1), "log": stage.log}
                    write()
                    entry = run_stage(stage, limit, out, Path(folder))
                    if "unavailable" not in gpu:  # what did not answer once is not asked again
                        gpu = nvidia_smi()
                done[stage.name] = entry | {"log": stage.log, "gpu": gpu}
                write()
                print(
                    f"{stage.name:<10} {entry['status']:<12} {entry['seconds']:6.1f} s  {entry['note']}", flush=True
                )
        except Interrupted as interruption:
            record["status"] = str(interruption)
            for name, entry in done.items():
                if entry["status"] == RUNNING:
                    entry |= {"status": INTERRUPTED, "figures": take_figures(out / f"{name}.json")}
            write()
            raise
    by_name = {stage.name: stage for stage in stages}
    unproven = [name for name, entry in done.items() if entry["status"] not in (PASSED, CLEAN)]
    bad = [name for name in unproven if done[name]["status"] == FAILED or not by_name[name].optional]
    record["status"] = FAILED if bad else PASSED
    write()
    print(f"{record['status']}: {out / 'result.json'}", flush=True)
    return not bad


def nvidia_smi() -> dict[str, str]:
    """Return what the driver says of the first GPU, or why it says nothing."""
    names = "name,driver_version,memory.total,memory.used,clocks.sm,clocks.max.sm,clocks.mem,clocks.max.mem"
    names += ",temperature.gpu,power.draw"
    command = ["nvidia-smi", f"--query-gpu={names}", "--format=csv,noheader"]
    try:
        found = subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=10)
    except FileNotFoundError:
        return {"unavailable": "nvidia-smi was not found"}
    except (OSError, subprocess.TimeoutExpired) as error:
        return {"unavailable": f"nvidia-smi: {error}"}
    values = (found.stdout.splitlines() or [""])[0].split(", ")
    if found.returncode != 0 or len(values) != len(names.split(",")):
        return {"unavailable": f"nvidia-smi: {(found.stdout + found.stderr).strip()[:200]}"}
    return dict(zip(names.split(","), values, strict=True))


def toolkits() -> list[str]:
    """Return where a CUDA toolkit may be that is not on PATH."""
    candidates = (os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda")
    return [folder for folder in candidates if folder]


def source_files() -> Iterator[Path]:
    """Yield what the kernels and their tests are made of."""
    for folder in ("benchmarks", "csrc", "ptq4cuda", "tests", "tools"):
        for path in sorted((ROOT / folder).rglob("*")):
            if path.suffix in {".py", ".sh", ".h", ".cpp", ".cu", ".cuh"}:
                yield path


def sources() -> str:
    """Return a digest of the sources: what ran, whatever anybody calls it."""
    digest = hashlib.sha256()
    for path in source_files():
        digest.update(f"{path.relative_to(ROOT)}\n".encode() + path.read_bytes())
    return digest.hexdigest()[:16]


def commit() -> str:
    """Return the commit of the sources: GIT_COMMIT, or what git says, or their digest."""
    if given := os.environ.get("GIT_COMMIT", "").strip():
        return given
    with contextlib.suppress(OSError, subprocess.SubprocessError):

        def git(*arguments: str) -> str:
            command = ["git", "-C", str(ROOT), *arguments]
            return subprocess.run(command, capture_output=True, text=True, check=True, timeout=15).stdout.strip()

        if Path(git("rev-parse", "--show-toplevel")).resolve() == ROOT:  # not of a repository around this one
            return git("rev-parse", "HEAD") + (" with changes" if git("status", "--porcelain", "-uno") else "")
    return f"sources {sources()}"


def interrupt(number: int, frame: FrameType | None) -> None:
    """End the run on a signal, with its evidence; once is enough."""
    for other in SIGNALS:
        signal.signal(other, signal.SIG_IGN)
    raise Interrupted(f"interrupted by {signal.Signals(number).name}")


def main() -> int:
    """Run all stages."""
    for number in SIGNALS:
        signal.signal(number, interrupt)
    out = Path(os.environ.get("OUT") or ROOT / "benchmarks" / "results").resolve()
    out.mkdir(parents=True, exist_ok=True)
    python = shutil.which(os.environ.get("PYTHON") or sys.executable) or sys.executable
    os.environ["PATH"] += "".join(f"{os.pathsep}{folder}/bin" for folder in toolkits())
    os.environ["PIP_DISABLE_PIP_VERSION_CHECK"] = "1"  # it would wait for a network
    chosen = stages(python, out, [name for name in PLUGINS if importlib.util.find_spec(name)])
    for old in {"result.json", *(stage.log for stage in chosen)}:
        (out / old).unlink(missing_ok=True)
    record: dict[str, Any] = {
        "commit": commit(),
        "sources": sources(),
        "started": time.strftime("%Y-%m-%d %H:%M:%S %z"),
        "machine": {
            "platform": platform.platform(),
            "python": platform.python_version(),
            "cores": len(os.sched_getaffinity(0)),
            "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
            "gpu": nvidia_smi(),
        },
    }
    try:
        return 0 if run(chosen, out, record, float(os.environ.get("GPU_CHECK_SECONDS") or SECONDS)) else 1
    except Interrupted as error:
        print(f"{error}: {out / 'result.json'}", file=sys.stderr)
        return 130


if __name__ == "__main__":
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    sys.exit(main())
