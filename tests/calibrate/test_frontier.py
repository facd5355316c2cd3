"""Memory of a walk: tensors beyond a limit go to files without names; what does not suffice is said in a sentence."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from ptq4cuda import QuantConfig, quantize
from ptq4cuda.artifact.record import record_of
from ptq4cuda.calibrate.frontier import Frontier, Memory
from ptq4cuda.calibrate.inputs import collect_inputs
from small_networks import Residual

CPU = torch.device("cpu")


class Untraceable(Residual):
    def forward(self, x: Tensor) -> Tensor:
        return x if bool(x.isnan().any()) else super().forward(x)


@pytest.mark.usefixtures("only_tensors_count")
def test_spilling_to_disk_changes_nothing(
    model: nn.Module, images: Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = quantize(model, [images], progress=False)
    names: set[str] = set()
    hold = Frontier.hold

    def watched(self: Frontier, value: object) -> object:
        held = hold(self, value)
        names.update(os.listdir(tmp_path))
        return held

    monkeypatch.setattr(Frontier, "hold", watched)
    spilled = quantize(model, [images], progress=False, memory_limit=10_000, spill_folder=tmp_path)
    assert torch.equal(spilled(images), expected(images))
    assert record_of(spilled).spilled_bytes > 0 == record_of(expected).spilled_bytes
    assert record_of(spilled).frontier_bytes <= 10_000
    assert not names  # that an interrupted process could leave


@pytest.mark.usefixtures("only_tensors_count")
def test_only_what_is_alive_counts() -> None:
    frontier = Frontier(CPU, Memory(10_000))
    for _ in range(5):
        held = frontier.hold((torch.zeros(1000), 3))
        assert frontier.bytes == 4000
        del held
        assert frontier.bytes == 0
    assert frontier.peak == 4000 and frontier.spilled == 0


@pytest.mark.usefixtures("only_tensors_count")
def test_storages_count_and_not_views() -> None:
    frontier = Frontier(CPU, Memory(10_000))
    x = torch.arange(2000.0)
    held = [frontier.hold(view) for view in (x, x.view(40, 50), x[:10])]
    assert frontier.bytes == 8000 and frontier.spilled == 0
    held.pop(0)
    assert frontier.bytes == 8000
    spilled = frontier.hold(torch.ones(1000))
    views = [frontier.hold(spilled.view(10, 100)) for _ in range(3)]
    assert (frontier.bytes, frontier.spilled) == (8000, 4000)
    assert torch.equal(views[2], torch.ones(10, 100))
    del held, spilled, views
    assert frontier.bytes == 0


_OF_FILES = 2


def resident(which: int = 1) -> int:
    """Bytes of this process in memory, or of the files among them."""
    pages = int(Path("/proc/self/statm").read_text().split()[which])
    return pages * os.sysconf("SC_PAGE_SIZE")


def test_what_is_in_files_takes_no_memory() -> None:
    frontier = Frontier(CPU, Memory(0))
    before = resident()
    held = [frontier.hold(torch.full((1 << 20,), float(i))) for i in range(32)]  # 4 MiB each
    total = sum(float(frontier.fetch(t).sum()) for t in held)
    assert resident() - before < 32 << 20
    assert total == sum(range(32)) << 20
    assert frontier.spilled == 128 << 20


def test_the_process_stays_within_its_limit() -> None:
    """Whatever else it holds, and whatever pieces the heap keeps."""
    tensor, limit = 4 << 20, resident() + (96 << 20)
    frontier, most, held, other = Frontier(CPU, Memory(limit)), 0, [], []
    for i in range(48):
        work = [torch.full((tensor // 4 + 64 * i,), float(i)) for _ in range(4)]
        held.append(frontier.hold(work[1]))
        if i % 8 == 0:
            other.append(torch.ones(tensor // 4))
        most = max(most, resident())
        del work
    assert most <= limit
    assert frontier.bytes > 4 * tensor and frontier.spilled > 4 * tensor
    assert all(float(frontier.fetch(t)[-1]) == i for i, t in enumerate(held))


def test_room_is_left_for_what_a_model_makes_of_small_images() -> None:
    """Before the second batch is held: the first layer's output is 16 times as large as an image."""
    model, limit = nn.Sequential(nn.Conv2d(1, 16, 1), nn.ReLU()), resident() + (64 << 20)
    batches = (torch.randn(4, 1, 256, 256) for _ in range(4))  # 1 MiB
    assert collect_inputs(model, batches, Memory(limit)).frontier.spilled == 4 << 20
    assert collect_inputs(model, [torch.randn(1, 3, 8, 8)], Memory(limit)).frontier.spilled == 0  # on which it fails


@pytest.mark.parametrize("kind", [Residual, Untraceable])
def test_all_chunks_of_a_layer_are_never_in_memory_at_once(
    kind: type[nn.Module], monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    model, chunk = kind().eval(), torch.randn(4, 3, 96, 96)  # 1 MiB and more for each of the first layers
    config = QuantConfig(rounding="nearest")
    quantize(model, [chunk], config, progress=False)  # loads code, which is in files, too
    breathe, in_memory = Frontier._breathe, [resident(_OF_FILES)]

    def watched(self: Frontier) -> None:
        in_memory.append(resident(_OF_FILES))
        breathe(self)

    monkeypatch.setattr(Frontier, "_breathe", watched)
    network = quantize(model, [chunk + i for i in range(10)], config, progress=False, memory_limit=0)
    assert record_of(network).spilled_bytes > 40 << 20
    assert max(in_memory) - in_memory[0] < 6 << 20


@pytest.mark.usefixtures("only_tensors_count")
def test_batches_of_an_iterator_go_to_files(model: nn.Module, images: Tensor, tmp_path: Path) -> None:
    """They are read once, and are as good as a list."""
    batches = list(images.split(16))
    read: list[int] = []

    def reading() -> Iterator[Tensor]:
        for number, batch in enumerate(batches):
            read.append(number)
            yield batch.clone()

    expected = quantize(model, batches, progress=False)
    limit = 2 * batches[0].nbytes
    with pytest.warns(UserWarning, match=r"calibration batches reach the limit of .* wait in files in '.*'"):
        found = quantize(model, reading(), progress=False, memory_limit=limit, spill_folder=tmp_path)
    assert read == list(range(len(batches)))
    assert torch.equal(found(images), expected(images))
    assert record_of(found).frontier_bytes <= limit
    assert not list(tmp_path.iterdir())


def test_channels_last_survives() -> None:
    x = torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last)
    held = Frontier(CPU, Memory(0)).hold(x)
    assert torch.equal(held, x) and held.stride() == x.stride()


def test_a_full_disk_is_a_sentence(
    model: nn.Module, images: Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(
        OSError, match=r"do not fit into '.*' \(No space left on device\): give a spill_folder"
    ) as caught:
        quantize(model, [images], progress=False, memory_limit=10_000, spill_folder=tmp_path)
    assert str(tmp_path) in str(caught.value)
    assert not list(tmp_path.iterdir())


def test_options(model: nn.Module, images: Tensor, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="memory_limit must be a number of bytes, got -1"):
        quantize(model, [images], progress=False, memory_limit=-1)
    with pytest.raises(ValueError, match="spill_folder: there is no folder"):
        quantize(model, [images], progress=False, spill_folder=tmp_path / "missing")


@pytest.mark.parametrize("kind", [Residual, Untraceable])
@pytest.mark.parametrize(
    "error",
    [MemoryError(), RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes")],
)
def test_out_of_memory_names_the_layer(
    images: Tensor, kind: type[nn.Module], error: BaseException, monkeypatch: pytest.MonkeyPatch
) -> None:
    import ptq4cuda.calibrate.moments

    def fail(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(ptq4cuda.calibrate.moments._Sums, "add", fail)
    with pytest.raises(MemoryError, match=r"out of memory at layer 'stem' \(.*\): give smaller calibration batches"):
        quantize(kind().eval(), [images], progress=False)


def test_out_of_memory_is_no_reason_not_to_trace(images: Tensor) -> None:
    class Large(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 3)

        def forward(self, x: Tensor) -> Tensor:
            if isinstance(x, torch.fx.Proxy) or len(x) > 1:
                raise RuntimeError("[enforce fail at alloc_cpu.cpp:1] DefaultCPUAllocator: can't allocate memory")
            return self.conv(x)

    with pytest.raises(MemoryError, match="out of memory in a forward of the model"):
        quantize(Large().eval(), [images], progress=False)


def test_batches_that_the_model_cannot_take_after_the_first(images: Tensor) -> None:
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(400, 2)).eval()
    with pytest.raises(
        ValueError, match=r"fails on calibration batch 1, whose samples are float32 \[3, 10, 12\], those"
    ):
        quantize(net, [images, images[:, :, :10]], progress=False)
    with pytest.raises(
        ValueError, match=r"batch 2, whose samples are float64 \[3, 12, 12\], those of batch 0 float32"
    ):
        quantize(net, [images, images, images.double()], progress=False)
