"""Keeps tensors on the host, in memory up to a limit and in files without a name beyond it."""

from __future__ import annotations

import ctypes
import mmap
import os
import tempfile
import weakref
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor

from ptq4cuda.calibrate.allocator import keep_little, resident, trim
from ptq4cuda.compat import tree_map_only

_T = TypeVar("_T")
_LIBC = ctypes.CDLL(None)
# Bytes that the heap may keep, in pieces too small for tensors to come, where there is no limit.
_LEFT = 512 << 20
# What the work on a batch takes, what it leaves in the heap before that is given back, and the room beyond these
# without which the heap keeps little, in tensors as large as the largest one.
_WORK, _KEPT, _GAPS = 8, 2, 16
FRONTIER_LIMIT = 3 << 30  # bytes of tensors between layers in host memory


@dataclass(frozen=True)
class Memory:
    """How much host memory the process may take, and where tensors between layers go for which there is no room.

    Attributes:
        limit: bytes of the process; near it tensors go to memory-mapped files. None: FRONTIER_LIMIT for the tensors
            alone.
        folder: for these files, None: that of temporary files. They have no names and are gone with the process.

    Raises:
        ValueError: the limit is not a number of bytes, or there is no such folder.
    """

    limit: int | None = None
    folder: str | os.PathLike[str] | None = None

    def __post_init__(self) -> None:
        if self.limit is not None and (isinstance(self.limit, bool) or not self.limit >= 0):
            raise ValueError(f"memory_limit must be a number of bytes, got {self.limit!r}")
        if self.folder is not None and not os.path.isdir(self.folder):
            raise ValueError(f"spill_folder: there is no folder {os.fspath(self.folder)!r}")


class Frontier:
    """Holds tensors; storages count once, however many tensors view them."""

    def __init__(self, device: torch.device, memory: Memory) -> None:
        self.device, self.memory = device, memory
        self.limit = FRONTIER_LIMIT if memory.limit is None else memory.limit
        self.folder = os.fspath(memory.folder) if memory.folder is not None else tempfile.gettempdir()
        self.bytes = self.spilled = self.peak = 0
        self._largest = 0  # bytes of a tensor
        self._others = resident()  # bytes of the process beside what is held, when memory was given back last
        self._holders: Counter[int] = Counter()  # by the address of the storage; spilled ones are there too
        self._in_files: dict[int, int] = {}  # by the same, bytes

    @property
    def room(self) -> int:
        """Bytes that may be held in memory in all."""
        beside = self._beside()
        return self.limit if self.memory.limit is None else self.limit - _WORK * self._largest - beside

    def expect(self, size: int) -> None:
        """Leave room for work on tensors of so many bytes."""
        self._largest = max(self._largest, size)

    def hold(self, value: Any, to_stay: bool = False) -> Any:
        """Return a value whose tensors live on the host.

        Args:
            value: a tensor, or anything with tensors in it.
            to_stay: it is held to the end, and leaves half of a limited room to what is made of it.

        Raises:
            OSError: there is no room in the folder for what goes beyond the limit.
        """
        return tree_map_only(Tensor, partial(self._hold, to_stay=to_stay), value)

    def fetch(self, value: Any) -> Any:
        """Return a held value on the device."""
        self._breathe()
        return tree_map_only(Tensor, lambda t: t.to(self.device), value)

    def each(self, held: Sequence[_T]) -> Sequence[_T]:
        """Return held values to be read on the host; of those in files one at a time takes memory."""
        return _OneByOne(held, self._breathe)

    def _hold(self, tensor: Tensor, to_stay: bool) -> Tensor:
        self._breathe()
        tensor = tensor.detach()
        on_host = tensor.device.type == "cpu"
        known = on_host and self._holders[tensor.untyped_storage().data_ptr()] > 0
        size = tensor.untyped_storage().nbytes() if on_host else tensor.numel() * tensor.element_size()
        self.expect(size)
        if not known and tensor.numel() > 0 and not self._has_room(size, to_stay):
            held = self._spill(tensor)
            self.spilled += held.untyped_storage().nbytes()
            self._in_files[held.untyped_storage().data_ptr()] = held.untyped_storage().nbytes()
        else:
            held = tensor.cpu()
        storage = held.untyped_storage()
        key, size = storage.data_ptr(), storage.nbytes()
        if key not in self._in_files and not self._holders[key]:
            self.bytes += size
            self.peak = max(self.peak, self.bytes)
        self._holders[key] += 1
        weakref.finalize(held, self._release, key, size)
        return held

    def _has_room(self, size: int, to_stay: bool) -> bool:
        room = self.room
        if to_stay and self.memory.limit is not None:
            room //= 2
        return self.bytes + size <= room

    def _release(self, key: int, size: int) -> None:
        self._holders[key] -= 1
        if self._holders[key]:
            return
        del self._holders[key]
        if key in self._in_files:
            del self._in_files[key]
        else:
            self.bytes -= size

    def _breathe(self) -> None:
        """Let go of the memory into which files were read, where what was written stays, and of what is free."""
        for address, size in self._in_files.items():
            _LIBC.madvise(ctypes.c_void_p(address), ctypes.c_size_t(size), mmap.MADV_DONTNEED)
        self._beside()

    def _beside(self) -> int:
        """Return the bytes of the process beside what is held, once free memory is given back where that is due."""
        others = resident() - self.bytes
        kept = others - self._others
        if self.memory.limit is None:
            due = kept > _LEFT
        else:
            left = self.limit - self.bytes - others - _WORK * self._largest
            if left < _GAPS * self._largest:
                keep_little()
            due = left < 0 and kept > _KEPT * self._largest
        if due:
            trim()
            self._others = others = resident() - self.bytes
        return others

    def _spill(self, tensor: Tensor) -> Tensor:
        size = tensor.numel() * tensor.element_size()
        try:
            # It has no name, so that nothing is left however the process ends, and all its room from the start: where
            # a disk is full, writing into a mapping would kill the process.
            with tempfile.TemporaryFile(dir=self.folder) as file:
                os.posix_fallocate(file.fileno(), 0, size)
                path = f"/proc/self/fd/{file.fileno()}"
                flat = torch.from_file(path, shared=True, size=tensor.numel(), dtype=tensor.dtype)
        except OSError as error:
            raise OSError(
                f"samples and tensors between layers reach the limit of {self.limit:,} bytes, and {size:,} more do "
                f"not fit into {self.folder!r} ({error.strerror}): give a spill_folder on a larger disk, a "
                "higher memory_limit or fewer calibration samples"
            ) from error
        held = flat.view(tensor.shape)
        if tensor.dim() == 4 and tensor.is_contiguous(memory_format=torch.channels_last):
            n, c, h, w = tensor.shape
            held = flat.view(n, h, w, c).permute(0, 3, 1, 2)
        return held.copy_(tensor)


class Usage:
    """What a frontier held and spilled from some time on."""

    def __init__(self, frontier: Frontier) -> None:
        self._frontier, self._spilled = frontier, frontier.spilled
        frontier.peak = frontier.bytes

    @property
    def found(self) -> tuple[int, int]:
        """Most bytes that were held at a time, and bytes that were spilled."""
        return self._frontier.peak, self._frontier.spilled - self._spilled


class _OneByOne(Sequence[_T]):
    """Items, before each of which a function is called."""

    def __init__(self, items: Sequence[_T], before: Callable[[], None]) -> None:
        self.items, self.before = items, before

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: Any) -> Any:
        self.before()
        return self.items[index]
