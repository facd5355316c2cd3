from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import ptq4cuda
from ptq4cuda import QuantConfig, quantize
from ptq4cuda.record import QuantRecord, record_of

from .test_quantize import Untraceable


@pytest.fixture
def network(model: nn.Module, images: Tensor) -> nn.Module:
    return quantize(model, [images], progress=False)


@pytest.fixture
def file(network: nn.Module, tmp_path: Path) -> Path:
    path = tmp_path / "net.ptq4"
    ptq4cuda.save(network, path)
    return path


@pytest.mark.parametrize("config", [QuantConfig(), QuantConfig.paper(), QuantConfig.naive()], ids=str)
def test_round_trip_is_exact(model: nn.Module, images: Tensor, tmp_path: Path, config: QuantConfig) -> None:
    network = quantize(model, [images], config, progress=False)
    ptq4cuda.save(network, tmp_path / "net.ptq4")
    other = type(model)()  # other weights, in training mode
    loaded = ptq4cuda.load(tmp_path / "net.ptq4", other)
    assert torch.equal(loaded(images), network(images))
    assert other.training
    state, other_state = loaded.state_dict(), network.state_dict()
    assert all(torch.equal(state[name], t) and state[name].dtype == t.dtype for name, t in other_state.items())
    # the report survives, but for the seconds
    report = ptq4cuda.report(network).replace(f", {record_of(network).seconds:.1f} s\n", "\n")
    assert ptq4cuda.report(loaded) == re.sub(r"\d+ samples take .*\n", "", report)


def test_round_trip_by_modules(images: Tensor, tmp_path: Path) -> None:
    torch.manual_seed(0)
    network = quantize(Untraceable().eval(), [images], progress=False)
    ptq4cuda.save(network, tmp_path / "net.ptq4")
    loaded = ptq4cuda.load(tmp_path / "net.ptq4", Untraceable())
    assert torch.equal(loaded(images), network(images))


def test_same_network_same_bytes(model: nn.Module, images: Tensor, file: Path, tmp_path: Path) -> None:
    ptq4cuda.save(quantize(model, [images], progress=False), tmp_path / "again.ptq4")
    assert (tmp_path / "again.ptq4").read_bytes() == file.read_bytes()


def test_saving_again_what_was_loaded(model: nn.Module, file: Path, tmp_path: Path) -> None:
    ptq4cuda.save(ptq4cuda.load(file, model), tmp_path / "again.ptq4")
    assert (tmp_path / "again.ptq4").read_bytes() == file.read_bytes()


def test_what_is_stored_is_small(network: nn.Module, file: Path) -> None:
    stored, state = load_file(file), network.state_dict()
    assert {t.dtype for t in stored.values()} <= {torch.uint8, torch.int8, torch.float32}
    assert stored.keys() == state.keys()
    assert stored["pointwise.weight_bits"].tolist() == [4]
    assert len(state["pointwise.weight_bits"]) == 8
    assert stored["pointwise.activation_zero_point"].dtype == torch.uint8


def test_what_does_not_fit_into_bytes_is_stored_as_it_is(model: nn.Module, images: Tensor, tmp_path: Path) -> None:
    network = quantize(model, [images], QuantConfig.paper(), progress=False)
    offset = network.get_submodule("pointwise").weight_offset
    assert bool((offset != offset.round()).any())  # the correction moves it
    ptq4cuda.save(network, tmp_path / "net.ptq4")
    assert load_file(tmp_path / "net.ptq4")["pointwise.weight_offset"].dtype == torch.float32
    assert torch.equal(ptq4cuda.load(tmp_path / "net.ptq4", model).get_submodule("pointwise").weight_offset, offset)


@pytest.mark.parametrize("keep", [0, 4, 7, 100, 2000, -1])
def test_truncated_file(model: nn.Module, file: Path, keep: int) -> None:
    file.write_bytes(file.read_bytes()[:keep])
    with pytest.raises(ValueError, match="truncated or not a safetensors file"):
        ptq4cuda.load(file, model)


def test_foreign_files(model: nn.Module, tmp_path: Path) -> None:
    foreign = tmp_path / "foreign.safetensors"
    save_file(model.state_dict(), foreign)
    with pytest.raises(ValueError, match="was not written by ptq4cuda"):
        ptq4cuda.load(foreign, model)
    foreign.write_text("not at all")
    with pytest.raises(ValueError, match="truncated or not a safetensors file"):
        ptq4cuda.load(foreign, model)
    with pytest.raises(FileNotFoundError, match="nowhere"):
        ptq4cuda.load(tmp_path / "nowhere", model)


@pytest.mark.parametrize(
    ("old", "new"),
    [("{", "["), ('"record"', '"recurd"'), ('"weight_bits"', '"weight_bats"'), ('"Conv2d"', '"Conv1d"')],
)
def test_damaged_header(model: nn.Module, file: Path, old: str, new: str) -> None:
    with safe_open(file, framework="pt") as opened:
        header = opened.metadata()["ptq4cuda"]
    save_file(load_file(file), file, metadata={"ptq4cuda": header.replace(old, new)})
    with pytest.raises(ValueError, match=r"net\.ptq4' has a damaged header"):
        ptq4cuda.load(file, model)


def rewritten(file: Path, change: Callable[[dict[str, Any], dict[str, Tensor]], object]) -> Path:
    """Write a file again, whose header or tensors were changed."""
    with safe_open(file, framework="pt") as opened:
        header = json.loads(opened.metadata()["ptq4cuda"])
        tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
    change(header, tensors)
    changed = file.with_name("changed.ptq4")
    save_file(tensors, changed, metadata={"ptq4cuda": json.dumps(header)})
    return changed


@pytest.mark.parametrize("name", ["stem.weight_packed", "fc.bias", "stem.activation_scale"])
def test_damaged_tensors(model: nn.Module, file: Path, name: str) -> None:
    content = bytearray(file.read_bytes())
    size = int.from_bytes(content[:8], "little")
    start, _ = json.loads(content[8 : 8 + size])[name]["data_offsets"]
    content[8 + size + start] ^= 1
    file.write_bytes(content)
    with pytest.raises(ValueError, match="is damaged: its tensors do not have the checksum in its header"):
        ptq4cuda.load(file, model)


def test_exchanged_tensors(model: nn.Module, file: Path) -> None:
    def exchange(header: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        a, b = "depthwise.weight_scale", "pointwise.weight_scale"
        tensors[a], tensors[b] = tensors[b], tensors[a]

    with pytest.raises(ValueError, match="do not have the checksum"):
        ptq4cuda.load(rewritten(file, exchange), model)


def test_files_without_a_checksum(model: nn.Module, network: nn.Module, file: Path, images: Tensor) -> None:
    old = rewritten(file, lambda header, tensors: header.pop("sha256"))
    assert torch.equal(ptq4cuda.load(old, model)(images), network(images))


def test_records_of_earlier_versions(network: nn.Module) -> None:
    fields = record_of(network).to_dict()
    times = {"samples": 2, "float_seconds": 0.1, "simulate_seconds": 0.3, "integer_seconds": 0.2}
    assert QuantRecord.from_dict({**fields, "trial": times}) == record_of(network)


def test_newer_format(model: nn.Module, network: nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr("ptq4cuda.serialization.FORMAT", 99)
        ptq4cuda.save(network, tmp_path / "new.ptq4")
    with pytest.raises(ValueError, match=r"format 99.*upgrade"):
        ptq4cuda.load(tmp_path / "new.ptq4", model)


def test_other_architecture(model: nn.Module, file: Path) -> None:
    with pytest.raises(ValueError, match="belongs to another model: where the file has"):
        ptq4cuda.load(file, nn.Sequential(nn.Conv2d(3, 8, 3)))
    model.relu = nn.LeakyReLU()
    with pytest.raises(ValueError, match="'relu ReLU', the model has 'relu LeakyReLU'"):
        ptq4cuda.load(file, model)


def test_models_without_weights_of_their_own(model: nn.Module, network: nn.Module, file: Path) -> None:
    with pytest.raises(ValueError, match="quantized already"):
        ptq4cuda.load(file, network)
    assert not any(module.training for module in ptq4cuda.load(file, model.train()).modules())
    with pytest.raises(ValueError, match="on the meta device"):
        ptq4cuda.load(file, model.to("meta"))


def test_other_sizes(model: nn.Module, file: Path) -> None:
    model.fc = nn.Linear(16, 7)
    with pytest.raises(ValueError, match=r"does not fit the model.*fc"):
        ptq4cuda.load(file, model)
    model.fc = nn.Linear(16, 5)
    model.pointwise = nn.Conv2d(8, 8, 3)
    with pytest.raises(ValueError, match=r"does not fit the model.*pointwise"):
        ptq4cuda.load(file, model)


def test_saving_what_is_not_quantized(model: nn.Module, tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="not made by ptq4cuda"):
        ptq4cuda.save(model, tmp_path / "net.ptq4")
    with pytest.raises(TypeError, match="not made by ptq4cuda"):
        ptq4cuda.report(model)
    assert not list(tmp_path.iterdir())


def test_places_where_nothing_can_be_saved(network: nn.Module, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no folder .*nowhere' to save 'net\.ptq4' in"):
        ptq4cuda.save(network, tmp_path / "nowhere" / "net.ptq4")
    with pytest.raises(IsADirectoryError, match="is a folder"):
        ptq4cuda.save(network, tmp_path)


def test_a_failed_save_leaves_the_old_file(network: nn.Module, file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = file.read_bytes()

    def fail(tensors: object, path: Path, metadata: object) -> None:
        path.write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr("ptq4cuda.serialization.save_file", fail)
    with pytest.raises(OSError, match="disk full"):
        ptq4cuda.save(network, file)
    assert file.read_bytes() == before
    assert list(file.parent.iterdir()) == [file]
