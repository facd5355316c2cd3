"""Several processes that work on one network together, each with samples of its own: what one finds all find.

What is measured of samples is a list of parts, one for each batch, or a sum. Lists are put together in the order of
the processes and sums are added up, so that whatever is made of them is what one process with all batches, those of
the first process first, would make of them. A process alone goes the same ways.
"""

from __future__ import annotations

import atexit
import functools
import io
import itertools
import os
import platform
import signal
import socket
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import Any, TypeVar

import torch
from torch import Tensor, distributed

from ptq4cuda.errors import first_line, kind_and_line

T = TypeVar("T")

TIMEOUT = 40.0  # seconds that processes wait for each other: with all that is around it, a hang ends within a minute
_GRACE = 5.0  # seconds for a process that torchrun tells to end
_GATHER, _TOTAL, _FROM_FIRST, _FAILED = range(4)
_PLACES = ("gather", "total", "from_first", "failed")


_joined: list[Processes] = []


class LostError(ConnectionError):
    """Another process has failed, has ended or does not come."""


class _ToldToEnd(BaseException):
    """This process gets SIGTERM; no code of a model may take it for an error of its own."""


class Processes:
    """The processes of a group, seen by one of them.

    All have to call the same methods in the same order. Where one fails, others learn of it when they call the next.

    Attributes:
        rank: this one's number.
        count: how many there are.
        group: that they are of; None for a process alone.
        failed: the number of the process that failed, where all end because of it.
    """

    def __init__(self, group: distributed.ProcessGroup | None = None) -> None:
        """Join the others; see of()."""
        self.group, self._group = group, None
        self.rank, self.count = 0, 1
        self.failed: int | None = None
        self._end_together = False
        if group is None:
            return
        if not distributed.is_available() or not isinstance(group, distributed.ProcessGroup):
            raise TypeError(
                f"process_group must be one of torch.distributed, such as torch.distributed.group.WORLD after "
                f"init_process_group, got {type(group).__name__}"
            )
        self.rank, self.count = distributed.get_rank(group), distributed.get_world_size(group)
        if self.rank < 0:
            raise ValueError("this process is not in process_group")
        if self.count > 1:
            with self._losing_nobody():
                self._group = _own_group(group)
                _joined.append(self)
                on_gpu = "nccl" in str(distributed.get_backend(self._group))
            self._device = torch.device("cuda", torch.cuda.current_device()) if on_gpu else torch.device("cpu")

    @staticmethod
    @functools.cache
    def of(group: distributed.ProcessGroup | None) -> Processes:
        """Return the processes of a group, always the same object; None stands for a process alone.

        They wait for each other no longer than TIMEOUT, and their messages do not cross others of the group.

        Raises:
            TypeError: it is no process group.
            ValueError: this process is not in it.
            LostError: another process did not come.
        """
        return Processes(group)

    def gather(self, parts: list[T]) -> list[T]:
        """Return the parts of all processes, of tensors and plain values, in the order of the processes."""
        return self.placed(parts)[0]

    def placed(self, parts: list[T]) -> tuple[list[T], int]:
        """Return the same, and how many of them come before those of this process."""
        if self._group is None:
            return parts, 0
        lists = [_unpacked(content) for content in self._exchange(_GATHER, _packed(parts))]
        return list(itertools.chain(*lists)), sum(map(len, lists[: self.rank]))

    def total(self, sums: Sequence[Tensor]) -> list[Tensor]:
        """Return the sums of what all processes have summed up, tensors of the same shapes.

        They are the same to the last bit, whatever the processes are, where all partial sums are exact.
        """
        if self._group is None:
            return list(sums)
        self._exchange(_TOTAL, b"")
        found = []
        with self._losing_nobody():
            for tensor in sums:
                added = tensor.to(self._device, copy=True).contiguous()
                distributed.all_reduce(added, group=self._group)
                found.append(added.to(tensor.device))
        return found

    def from_first(self, value: T) -> T:
        """Return what the first process has found, for what may depend on the machine and is to be the same."""
        if self._group is None:
            return value
        content = _packed(value) if self.rank == 0 else b""
        sizes = self._exchange(_FROM_FIRST, content, sizes_only=True)
        sent = _as_tensor(content) if self.rank == 0 else torch.empty(sizes[0], dtype=torch.uint8, device="cpu")
        with self._losing_nobody():
            sent = sent.to(self._device)
            distributed.broadcast(sent, group_src=0, group=self._group)
            sent = sent.cpu()
        found: T = value if self.rank == 0 else _unpacked(sent.numpy().tobytes())
        return found

    def check_same(self, **things: Any) -> None:
        """Raise ValueError, in all processes, where one has something else than the first."""
        for rank, others in enumerate(found := self.gather([things])):
            different = [name.replace("_", " ") for name, value in others.items() if value != found[0][name]]
            if different:
                what = " and ".join(different)
                raise ValueError(f"process {rank} of {self.count} has another {what} than process 0")

    @contextmanager
    def ending_together(self) -> Iterator[None]:
        """Let all processes fail with the sentence of the first that does; the outermost call does it.

        Raises:
            LostError: another one has failed, has ended or did not come for TIMEOUT seconds.
        """
        if self._group is None or self._end_together:
            yield
            return
        self._end_together, self.failed = True, None
        try:
            yield
        except (LostError, _ToldToEnd):
            raise
        except BaseException as error:
            told = isinstance(error, (ValueError, TypeError, OSError, MemoryError)) and str(error)
            with suppress(LostError):  # they know now, or are gone
                self._exchange(_FAILED, (first_line(error) if told else kind_and_line(error)).encode())
            raise
        finally:
            self._end_together = False

    def _exchange(self, kind: int, content: bytes, sizes_only: bool = False) -> Any:
        """Return the contents, or the sizes, of all processes, once they all came for the same."""
        header = torch.tensor([kind, len(content)], device=self._device)
        headers = [torch.empty_like(header) for _ in range(self.count)]
        with self._losing_nobody():
            distributed.all_gather(headers, header, group=self._group)
        kinds, sizes = ([int(h[i]) for h in headers] for i in (0, 1))
        failed = _FAILED in kinds
        if len(set(kinds)) > 1 and not failed:
            raise LostError(
                f"process {self.rank} of {self.count} is not where the others are "
                f"({', '.join(_PLACES[k] for k in kinds)}): all have to make the same calls"
            )
        if sizes_only and not failed:
            return sizes
        contents = self._all_contents(content, sizes)
        if failed:
            self.failed = kinds.index(_FAILED)
            raise LostError(f"process {self.failed} of {self.count} failed: {contents[self.failed].decode()}")
        return contents

    def _all_contents(self, content: bytes, sizes: list[int]) -> list[bytes]:
        if not max(sizes):
            return [b""] * self.count
        padded = torch.zeros(max(sizes), dtype=torch.uint8, device=self._device)
        padded[: len(content)] = _as_tensor(content).to(self._device)
        everyones = [torch.empty_like(padded) for _ in range(self.count)]
        with self._losing_nobody():
            distributed.all_gather(everyones, padded, group=self._group)
        return [t[:size].cpu().numpy().tobytes() for t, size in zip(everyones, sizes, strict=True)]

    @contextmanager
    def _losing_nobody(self) -> Iterator[None]:
        try:
            yield
        except RuntimeError as error:
            raise LostError(
                f"process {self.rank} of {self.count} lost another one, which has ended or did not come for "
                f"{TIMEOUT:g} seconds ({first_line(error)})"
            ) from error


ALONE = Processes()


@atexit.register
def _leave() -> None:
    """Let go of all groups: threads of one that lives until the interpreter is gone would abort the process."""
    for processes in _joined:
        processes._group = None
    _joined.clear()
    Processes.of.cache_clear()


@contextmanager
def launched(device: torch.device) -> Iterator[Processes]:
    """Join the processes that torchrun started, and this one alone where it did not.

    Where one of them ends, torchrun tells the others to end, which is a LostError in them. It would wait long for
    those that cannot hear: one that was stopped is continued, and one that hangs in a library killed.

    Args:
        device: of the network; each process takes a GPU of its own.
    """
    count = int(os.environ.get("WORLD_SIZE", "1"))
    if count == 1:
        yield ALONE
        return

    def told_to_end(*_: Any) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # once is enough
        raise _ToldToEnd

    before = signal.signal(signal.SIGTERM, told_to_end)
    try:
        with _heeding_signals():
            if device.type == "cuda":
                torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
            with ALONE._losing_nobody():
                backend = "nccl" if device.type == "cuda" else "gloo"
                distributed.init_process_group(backend, timeout=_patience())
            here: list[int] = []
            try:
                processes, node = Processes.of(distributed.group.WORLD), platform.node()
                here += [pid for where, pid in processes.gather([(node, os.getpid())]) if where == node]
                yield processes
            except LostError:
                for pid in here:
                    with suppress(OSError):
                        os.kill(pid, signal.SIGCONT)
                raise
            finally:
                _leave()
                distributed.destroy_process_group()
    except _ToldToEnd:
        raise LostError(
            f"process {os.environ['RANK']} of {count} was told to end, as torchrun does when one has ended"
        ) from None
    finally:
        signal.signal(signal.SIGTERM, before)


@contextmanager
def _heeding_signals() -> Iterator[None]:
    """Kill this process where it is told to end and code that does not return keeps Python from hearing of it."""
    heard, signals = socket.socketpair()
    signals.setblocking(False)

    def listen() -> None:
        while number := heard.recv(1):
            if number[0] == signal.SIGTERM and not over.wait(_GRACE):
                os.kill(os.getpid(), signal.SIGKILL)

    over = threading.Event()
    thread = threading.Thread(target=listen, daemon=True)
    thread.start()
    before = signal.set_wakeup_fd(signals.fileno())
    try:
        yield
    finally:
        signal.set_wakeup_fd(before)
        over.set()
        signals.close()
        thread.join()
        heard.close()


def _own_group(group: distributed.ProcessGroup) -> Any:
    """Return a group of the same processes with a timeout of its own."""
    ranks = distributed.get_process_group_ranks(group)
    return distributed.new_group(
        ranks,
        timeout=_patience(),
        backend=distributed.get_backend(group),
        use_local_synchronization=len(ranks) < distributed.get_world_size(),
    )


def _patience() -> timedelta:
    return timedelta(seconds=TIMEOUT)


def _packed(value: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


def _unpacked(content: bytes) -> Any:
    """Return a value that another process of the group has packed; what was on its GPU comes to this one's."""

    def here(storage: Any, where: str) -> Any:
        return storage.cuda() if where.startswith("cuda") else storage

    return torch.load(io.BytesIO(content), map_location=here, weights_only=False)


def _as_tensor(content: bytes) -> Tensor:
    if not content:
        return torch.empty(0, dtype=torch.uint8, device="cpu")
    return torch.frombuffer(bytearray(content), dtype=torch.uint8)
