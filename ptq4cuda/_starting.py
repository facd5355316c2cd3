"""Ctrl-C while a command starts: PyTorch takes a second or more to be imported, before a line of ours can catch it.

The package imports this module first. Where it is imported as a library it changes nothing.
"""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path
from types import FrameType


def _end(number: int, frame: FrameType | None) -> None:
    # At once: what is half imported need not be taken down, and may take an exception for a fault of its own.
    sys.stderr.write("\nptq4cuda: interrupted\n")
    sys.stderr.flush()
    os._exit(128 + number)


def _is_command() -> bool:
    if sys.argv[:1] == ["-m"]:  # Python looks for the module still
        return sys.orig_argv[sys.orig_argv.index("-m") + 1 :][:1] == ["ptq4cuda"]
    return bool(sys.argv) and Path(sys.argv[0]).name == "ptq4cuda"


def started() -> None:
    """Let Ctrl-C be KeyboardInterrupt again."""
    if signal.getsignal(signal.SIGINT) is _end:
        signal.signal(signal.SIGINT, signal.default_int_handler)


if _is_command() and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, _end)
