"""Errors of this package, and what those of PyTorch are about and how they are told."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


class LaterVersionError(ValueError):
    """Something was written by a later version, which knows more than this one."""


def is_out_of_memory(error: BaseException) -> bool:
    """Tell whether memory of the host or of a device did not suffice."""
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    return isinstance(error, RuntimeError) and (
        "can't allocate memory" in str(error) or "out of memory" in str(error)
    )


def first_line(error: object) -> str:
    """Return the first line of what an error says, to stand in a sentence; its kind where it says nothing."""
    line = next(iter(str(error).strip().splitlines()), type(error).__name__)
    return " ".join(line.split()).rstrip(".")


def kind_and_line(error: BaseException) -> str:
    """Return an error's kind and the first line of what it says: for errors of somebody else's code."""
    return f"{type(error).__name__}: {first_line(error)}"


@contextmanager
def naming_failures(what: str) -> Iterator[None]:
    """Say what failed in somebody else's code, but for want of memory.

    Raises:
        ValueError: anything was raised.
    """
    try:
        yield
    except (Exception, SystemExit) as error:  # a script may read arguments that are not its own
        if is_out_of_memory(error):
            raise
        raise ValueError(f"{what} ({kind_and_line(error)})") from error


@contextmanager
def naming_what_needs_memory(what: str) -> Iterator[None]:
    """Say where memory did not suffice.

    Raises:
        MemoryError: it did not; with a remedy.
    """
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error) or str(error).startswith("out of memory "):
            raise
        raise MemoryError(
            f"out of memory {what} ({first_line(error)}): give smaller calibration batches, or fewer samples"
        ) from error
