"""Freed memory is kept while a network is quantized, and given back after: counted in pages that were cleared."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from ptq4cuda.calibrate import allocator

PAGES = (64 << 20) // os.sysconf("SC_PAGE_SIZE")  # of the tensor that is made and freed below
PROGRAM = """
import resource, threading, torch
from ptq4cuda.calibrate.allocator import memory_kept

def pages():  # that are cleared for a tensor
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.zeros(64 << 20, dtype=torch.uint8).fill_(1)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

found = [pages()]
with memory_kept():
    found += [pages(), pages()]
    thread = threading.Thread(target=memory_kept()(pages))
    thread.start()
    thread.join()
    found += [pages()]
found += [pages(), pages()]
print(*found)
"""


@pytest.mark.skipif(not hasattr(allocator._LIBC, "mallopt"), reason="the C library is not glibc")
@pytest.mark.parametrize("chosen", [None, "MALLOC_TRIM_THRESHOLD_"])
def test_memory_is_kept_meanwhile(chosen: str | None) -> None:
    environment = {name: value for name, value in os.environ.items() if name not in allocator._CHOSEN}
    if chosen is not None:  # what the user has set stays so: to get memory anew
        environment |= {chosen: "1000000"}
    run = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=True, env=environment)
    before, first, again, beside, after, last = map(int, run.stdout.split())
    assert min(before, first, after, last) > 0.9 * PAGES
    kept = 0.1 * PAGES
    assert (max(again, beside) < kept) == (chosen is None)
