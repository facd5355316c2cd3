"""Memory that is freed is kept for the next tensor while a network is quantized or loaded, and given back after that.

A walk makes and frees tensors of megabytes by the thousand. The C library (glibc) gets each anew from the system,
which clears every page that is touched: a quarter of the time of a walk, or more than all the rest.
"""

from __future__ import annotations

import ctypes
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager

_LIBC = ctypes.CDLL(None)
# Of malloc.h. Whoever sets them from outside has the last word.
_TRIM_THRESHOLD, _MMAP_THRESHOLD, _MMAP_MAX = -1, -3, -4
_CHOSEN = ("MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_", "MALLOC_MMAP_MAX_", "GLIBC_TUNABLES")
_LARGEST = 32 << 20  # bytes: what the thresholds grow to in a process that frees large tensors
_SMALL = 1 << 20  # bytes of a tensor that fits into gaps between others

_PAGE = os.sysconf("SC_PAGE_SIZE")

_lock = threading.Lock()
_users = 0
_keeping = False


def resident() -> int:
    """Return the bytes of this process that are in memory, its libraries and what it maps of files among them."""
    with open("/proc/self/statm", "rb") as file:
        return int(file.read().split()[1]) * _PAGE


def keep_little() -> None:
    """Let memory_kept() keep no large pieces from now on: gaps between tensors take too much where room is short."""
    global _keeping
    with _lock:
        if _keeping:
            _keeping = False
            _return_larger_than(_SMALL)
            trim()


def trim() -> None:
    """Give memory that is kept, and not used, back to the system."""
    if hasattr(_LIBC, "malloc_trim"):
        _LIBC.malloc_trim(0)


@contextmanager
def memory_kept() -> Iterator[None]:
    """Let the process keep memory until the last of those that ask for it is done."""
    global _users, _keeping
    if not hasattr(_LIBC, "mallopt") or any(name in os.environ for name in _CHOSEN):
        yield
        return
    with _lock:
        _users += 1
        if _users == 1:
            _keeping = True
            _LIBC.mallopt(_MMAP_MAX, 0)
            _LIBC.mallopt(_TRIM_THRESHOLD, 2**31 - 1)
    try:
        yield
    finally:
        with _lock:
            _users -= 1
            if _users == 0:
                _keeping = False
                _return_larger_than(_LARGEST)
                trim()


def _return_larger_than(size: int) -> None:
    _LIBC.mallopt(_MMAP_MAX, 65536)
    _LIBC.mallopt(_MMAP_THRESHOLD, size)
    _LIBC.mallopt(_TRIM_THRESHOLD, 2 * size)
