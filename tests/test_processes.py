"""Several processes make the network that one makes, bit for bit, and end together where one of them fails.

One child imports the package and forks the processes.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import Any

import pytest

COMMON = """
import contextlib, ctypes, dataclasses, io, json, multiprocessing, os, signal, socket, sys, threading, time, traceback
import torch
from torch import distributed, nn
from torch.nn import functional as F
import ptq4cuda
from ptq4cuda import QuantConfig, quantize
from ptq4cuda import processes as processes_module
from ptq4cuda.artifact.record import record_of
from ptq4cuda.calibrate import moments
from ptq4cuda.pipeline import fingerprint

torch.set_num_threads(1)
fork = multiprocessing.get_context("fork")


class Small(nn.Module):
    def __init__(self, branches=False):
        super().__init__()
        torch.manual_seed(0)
        self.branches = branches
        self.stem, self.bn = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.depthwise, self.point = nn.Conv2d(8, 8, 3, padding=1, groups=8), nn.Conv2d(8, 8, 1)
        self.down, self.fc = nn.Conv2d(8, 16, 3, stride=2, groups=2), nn.Linear(16, 5)
        self.side = nn.Conv2d(8, 16, 3, stride=2)  # reads what another layer reads
        self.rare, self.relu = nn.Conv2d(16, 16, 1), nn.ReLU()

    def forward(self, x):
        bright = self.branches and bool(x.amax() > 5.0)
        x = self.relu(self.bn(self.stem(x)))
        x = x + self.point(F.relu6(self.depthwise(x)))
        x = self.relu(self.down(x) + self.side(x))
        if bright:
            x = self.rare(x)
        return self.fc(x.mean((2, 3)))


def batches():
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(26, 3, 9, 9, generator=generator).clamp(-4, 4)
    x[20, 0, 0, 0] = 400.0  # an outlier; and the only batch that takes the branch
    return list(x.split(3))


def share(items, rank, count):
    return items[rank * len(items) // count : (rank + 1) * len(items) // count]


def in_processes(count, work, seconds=60):
    \"\"\"Return what work(rank, group) returns in each of the processes, None of one that ended.\"\"\"
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with contextlib.ExitStack() as pipes:
        ends = [fork.Pipe(duplex=False) for _ in range(count)]

        def run(rank):
            found = None
            try:
                url = f"tcp://127.0.0.1:{port}"
                distributed.init_process_group("gloo", init_method=url, rank=rank, world_size=count)
                found = work(rank, distributed.group.WORLD)
            except Exception as error:
                found = [type(error).__name__, str(error)]
            ends[rank][1].send(found)
            os._exit(0)

        children = [fork.Process(target=run, args=(rank,)) for rank in range(count)]
        for child in children:
            child.start()
        for _, write in ends:
            write.close()
        found = []
        for read, _ in ends:
            try:
                found.append(read.recv() if read.poll(seconds) else "still there")
            except EOFError:
                found.append(None)
        for child in children:
            child.kill()
            child.join()
    return found
"""


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """What the child prints: one import of torch serves all tests."""
    code = (
        f"LITTLE = {LITTLE!r}\n{EQUAL}{COMMANDS}{FAULTS}print(json.dumps(dict(equal=equal, faults=faults, cli=cli)))"
    )
    run = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", COMMON + code],
        cwd=tmp_path_factory.mktemp("processes"),
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"},
        timeout=240,
    )
    assert run.returncode == 0, run.stderr[-3000:]
    return json.loads(run.stdout.splitlines()[-1])


EQUAL = """
moments.MAX_SAMPLES = 900  # so that positions are picked

def cases():
    w4 = dict(first_last_bits=4)
    yield "default", lambda: Small(), QuantConfig(**w4), {}
    yield "default by modules", lambda: Small(branches=True), QuantConfig(**w4), {}
    yield "fast", lambda: Small(), QuantConfig.fast(clipping="auto"), {}
    yield "paper", lambda: Small(), QuantConfig.paper(), {}
    yield "fast by modules", lambda: Small(branches=True), QuantConfig.fast(), {}
    yield "measured", lambda: Small(), QuantConfig.fast(first_last_bits=2), dict(
        evaluate=lambda net: 100.0 - float((net(batches()[0]) - Small().eval()(batches()[0])).abs().sum()),
        max_drop=0.001,
    )

def work(rank, group, count):
    found = {}
    for name, model, config, more in cases():
        if count > 2 and name not in some[count]:
            continue
        mine = share(batches(), rank, count)
        network = quantize(model().eval(), mine, config, progress=False, process_group=group, **more)
        record = {**record_of(network).to_dict(), "seconds": 0.0, "frontier_bytes": 0}
        ptq4cuda.save(network, file := f"{count}-{rank}.ptq4")
        with open(file, "rb") as written:
            found[name] = [fingerprint(network), json.dumps(record), written.read().hex()]
    return found

some = {3: ("default", "paper", "fast by modules"), 4: ("default by modules", "fast")}
alone = work(0, None, 1)
equal = [alone, *(in_processes(n, lambda rank, group: work(rank, group, n)) for n in (2, 3, 4))]
"""


def test_processes_make_the_network_that_one_makes(found: Any) -> None:
    """Both walks, fitted weights and closed forms, layers that one batch alone calls, held-out batches, a measure."""
    alone, *others = found["equal"]
    assert len(alone) == 6
    for count, made in zip((2, 3, 4), others, strict=True):
        for rank, networks in enumerate(made):
            assert isinstance(networks, dict), networks
            assert len(networks) == {2: 6, 3: 3, 4: 2}[count]
            for name, (network, record, file) in networks.items():
                assert network == alone[name][0], (name, count, rank)
                assert json.loads(record) == json.loads(alone[name][1]), (name, count, rank)
                assert file == alone[name][2], (name, count, rank)
    records = {name: json.loads(record) for name, (_, record, _) in alone.items()}
    assert records["default"]["walked_by"] == "graph" and records["default by modules"]["walked_by"] == "modules"
    assert "rare" in [layer["name"] for layer in records["fast by modules"]["layers"] if layer["weight_bits"]]
    assert any("clipped there" in layer["reason"] for layer in records["default"]["layers"])
    assert records["measured"]["tried"] > 1 and records["measured"]["held_out"] == 3


FAULTS = """
def fault(name):
    def work(rank, group):
        model, mine, config = Small().eval(), share(batches(), rank, 2), QuantConfig.fast()
        if rank == 1:
            if name == "weights":
                with torch.no_grad():
                    model.fc.weight[0, 0] += 1e-6
            if name == "config":
                config = QuantConfig.fast(clip_exponent=2.0)
            if name == "empty":
                mine = []
            if name == "nan":
                mine[1] = mine[1] / 0.0
            if name in ("dies", "hangs"):
                def end(*_):
                    os.kill(os.getpid(), signal.SIGKILL) if name == "dies" else time.sleep(4)
                forward, model.forward, calls = model.forward, None, []
                def counting(x):
                    calls.append(0)
                    return end() if len(calls) > 1 else forward(x)
                model.forward = counting
        start = time.monotonic()
        try:
            quantize(model, mine, config, progress=False, process_group=group)
        except Exception as error:
            again = name in ("empty", "nan") and quantize(
                Small().eval(), share(batches(), rank, 2), QuantConfig.fast(), progress=False, process_group=group
            )
            return [type(error).__name__, str(error), bool(again)]
    return in_processes(2, work, 30)

def deaf(rank, group):
    processes_module._GRACE = 0.2
    libc, lock = ctypes.CDLL(None), ctypes.create_string_buffer(64)  # of a library, which gets it twice and waits
    signal.signal(signal.SIGTERM, lambda *_: None)
    with processes_module._heeding_signals():
        threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGTERM)).start()
        while True:
            libc.pthread_mutex_lock(lock)

faults = {name: fault(name) for name in ("weights", "config", "empty", "nan", "dies", "hangs")}
faults["deaf"] = in_processes(1, deaf, 30)
"""


def test_where_one_fails_all_end_and_say_why(found: Any) -> None:
    found = found["faults"]
    for name, what in (("weights", "model"), ("config", "configuration")):
        assert found[name] == [["ValueError", f"process 1 of 2 has another {what} than process 0", False]] * 2
    for name, sentence in (
        ("empty", "batches is empty: quantization needs at least one batch of calibration data"),
        ("nan", "calibration batch 1 contains NaN or Inf"),
    ):
        other, one = found[name]
        assert one == ["ValueError", sentence, True]  # and the group goes on to work
        assert other == ["LostError", f"process 1 of 2 failed: {sentence}", True]
    for name in ("dies", "hangs"):
        kind, sentence, _ = found[name][0]
        assert kind == "LostError"
        assert sentence.startswith("process 0 of 2 lost another one, which has ended or did not come for 2 seconds (")
    assert found["deaf"] == [None]


LITTLE = """
import torch
from torch import nn


def net():
    torch.manual_seed(0)
    pool = nn.AdaptiveAvgPool2d(1)
    layers = nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), pool, nn.Flatten(), nn.Linear(8, 3)
    return nn.Sequential(*layers).eval()


def ending(last="SIGKILL", before="SIGTERM"):
    # The last process is killed at work, and the one before it told to end.
    import os, signal

    found, rank, calls = net(), 1 + int(os.environ["RANK"]) - int(os.environ["WORLD_SIZE"]), []

    def end(*_):
        calls.append(0)
        if rank in (0, -1) and len(calls) == 2:
            os.kill(os.getpid(), getattr(signal, last if rank == 0 else before))

    found.register_forward_pre_hook(end)
    return found


def stopped():
    return ending("SIGSTOP", "SIGCONT")
"""

COMMANDS = """
import numpy as np
from PIL import Image
from ptq4cuda.cli import main

os.makedirs("images/0"); os.makedirs("images/1")
for i in range(9):
    pixels = np.random.default_rng(i).integers(0, 256, (12, 12, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(f"images/{i % 2}/{i}.png")
with open("little.py", "w") as file:
    file.write(LITTLE)
sys.path.insert(0, "")

def command(count, *arguments, only=None):
    def work(rank, group):
        distributed.destroy_process_group()
        os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(count), MASTER_ADDR="127.0.0.1",
                          MASTER_PORT=str(ports[0]))
        out, err = io.StringIO(), io.StringIO()
        sys.argv = ["ptq4cuda", *(a.replace("RANK", str(rank)) for a in arguments)]
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            try:
                main()
                code = 0
            except SystemExit as error:
                code = error.code
        return [code, out.getvalue(), err.getvalue()]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        ports = [free.getsockname()[1]]
    return in_processes(count, work)

subject = ["little:net", "--size", "12", "--resize", "12", "--batch", "2"]
make = ["quantize", *subject, "--calibration", "images", "--preset", "fast", "--images", "9"]
one = command(1, *make, "-o", "one.ptq4")
two = command(2, *make, "-o", "two.ptq4")
many = command(2, *make[:-1], "2", "-o", "many.ptq4")
bad = command(2, *make[:-1], "9", "-o", "bad.ptq4", "--set", "weight_bits=1RANK")
lost = command(2, *make, "-o", "folder-RANK/lost.ptq4")
ended = command(3, "quantize", "little:ending", *make[2:], "-o", "ended.ptq4")
evaluate = [command(n, "evaluate", "little:net", "one.ptq4", "images", *subject[1:]) for n in (1, 2)]
processes_module.TIMEOUT = 2.0  # from here on
stopped = command(2, "quantize", "little:stopped", *make[2:], "-o", "stopped.ptq4")
from ptq4cuda.artifact.file import read_record
import little
same = [fingerprint(ptq4cuda.load(f"{n}.ptq4", little.net())) for n in ("one", "two")]
files = os.listdir()
cli = dict(two=two, many=many, bad=bad, lost=lost, ended=ended, stopped=stopped)
cli.update(evaluate=evaluate, same=same, files=files)
"""


def test_commands_share_the_images(found: Any) -> None:
    found = found["cli"]
    assert found["same"][0] == found["same"][1]
    (first, out, _), (second, nothing, _) = found["two"]
    assert (first, second, nothing) == (0, 0, "") and "Wrote two.ptq4" in out
    (_, out, _), (_, nothing, _) = found["evaluate"][1]
    assert nothing == "" and out == found["evaluate"][0][0][1] and "9 images" in out
    sentence = (
        "ptq4cuda: 2 images in batches of 2 are 1 batches, too few for 2 processes: give more images or a smaller"
    )
    assert [[code, err[: len(sentence)]] for code, _, err in found["many"]] == [[2, sentence], [2, ""]]
    assert [code for code, *_ in found["bad"]] == [code for code, *_ in found["lost"]] == [2, 2]
    assert sum(bool(err) for *_, err in found["bad"]) == 1
    assert sum(bool(err) for *_, err in found["lost"]) == 1
    (code, _, lost), (told_code, _, told), killed = found["ended"]
    assert (code, told_code, killed) == (2, 2, None)
    assert lost.startswith("ptq4cuda: process 0 of 3 lost another one, which has ended or did not come for ")
    assert told == "ptq4cuda: process 1 of 3 was told to end, as torchrun does when one has ended\n"
    assert [code for code, *_ in found["stopped"]] == [2, 2]  # it was continued
    assert all("lost another one" in err for *_, err in found["stopped"])
    assert not {"many.ptq4", "bad.ptq4", "ended.ptq4", "stopped.ptq4"} & set(found["files"])
