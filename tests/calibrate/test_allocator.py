"""Freed memory is kept while a network is quantized or loaded, and given back after: counted in pages."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from ptq4cuda.calibrate import allocator

PAGES = (64 << 20) // os.sysconf("SC_PAGE_SIZE")  # of the tensor that is made and freed below
PROGRAM = """
import resource, threading, torch
from ptq4cuda.calibrate.allocator import keep_little, memory_kept

def pages():  # that are cleared for a tensor
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.zeros(64 << 20, dtype=torch.uint8).fill_(1)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

before = pages()
with memory_kept():
    keep_little()
    little = min(pages() for _ in range(3))
with memory_kept():
    first = sum(pages() for _ in range(10))
    thread = threading.Thread(target=memory_kept()(pages))
    thread.start()
    thread.join()
    again = sum(pages() for _ in range(10))
after = min(pages(), pages())
print(before, first, again, little, after)
"""


@pytest.mark.skipif(not hasattr(allocator._LIBC, "mallopt"), reason="the C library is not glibc")
@pytest.mark.parametrize("chosen", [None, "MALLOC_TRIM_THRESHOLD_"])
def test_memory_is_kept_meanwhile(chosen: str | None) -> None:
    environment = {name: value for name, value in os.environ.items() if name not in allocator._CHOSEN}
    if chosen is not None:  # what the user has set stays so: to get memory anew
        environment |= {chosen: "1000000"}
    run = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=True, env=environment)
    before, first, again, little, after = map(int, run.stdout.split())
    assert min(before, little, after) > 0.9 * PAGES
    if chosen is None:
        # Something small may come to lie between two places, and the next tensor then gets one of its own.
        assert first + again < 5 * PAGES
    else:
        assert min(first, again) > 9 * PAGES


LOAD = """
import re, sys, torch, ptq4cuda
from ptq4cuda.bench import architectures, models
from ptq4cuda.calibrate.allocator import trim

def held():
    trim()
    return int(re.search(r"RssAnon:\\s+(\\d+)", open("/proc/self/status").read())[1]) << 10

net = architectures.build_resnet18().eval()
images = [torch.randn(2, 3, 32, 32)]
ptq4cuda.save(ptq4cuda.quantize(net, images, ptq4cuda.QuantConfig.naive(), progress=False), sys.argv[1])
before = held()
trim = lambda: None
network = ptq4cuda.load(sys.argv[1], net)
print(held() - before, models.held_bytes(network), models.held_bytes(net))
"""


@pytest.mark.skipif(not hasattr(allocator._LIBC, "malloc_trim"), reason="the C library is not glibc")
def test_what_load_used_meanwhile_is_given_back(tmp_path: Path) -> None:
    """It copies the float network, more than once."""
    environment = {name: value for name, value in os.environ.items() if name not in allocator._CHOSEN}
    command = [sys.executable, "-c", LOAD, str(tmp_path / "net.ptq4")]
    run = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    grown, network, float_network = map(int, run.stdout.split())
    assert grown < network + float_network / 2
