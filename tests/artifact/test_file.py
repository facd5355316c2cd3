"""save() and load(): the same network and the same bytes, bit for bit; other files are refused in one sentence."""

from __future__ import annotations

import errno
import json
import os
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
from pipeline.test_quantize import Untraceable
from ptq4cuda import QuantConfig, quantize
from ptq4cuda.artifact.file import _checksum
from ptq4cuda.artifact.record import QuantRecord, record_of


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
    # the report survives, but for what it says of the run
    report = re.sub(r", [\d.]+ s(?=\n)|(?<=folded\.) Tensors between .*", "", str(ptq4cuda.report(network)))
    assert str(ptq4cuda.report(loaded)) == re.sub(r"\d+ samples take .*\n", "", report)


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
    with pytest.raises(ValueError, match=r"net\.ptq4' is damaged: "):
        ptq4cuda.load(file, model)


Change = Callable[[dict[str, Any], dict[str, Tensor]], object]


def rewritten(file: Path, change: Change, forged: bool = False) -> Path:
    """Write a file again, whose header or tensors were changed; a forged one has the checksum that fits them."""
    with safe_open(file, framework="pt") as opened:
        header = json.loads(opened.metadata()["ptq4cuda"])
        tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
    change(header, tensors)
    if forged:
        del header["sha256"]
        header["sha256"] = _checksum(header, tensors)
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
    with pytest.raises(ValueError, match="is damaged: its header and tensors do not have the checksum"):
        ptq4cuda.load(file, model)


def test_exchanged_tensors(model: nn.Module, file: Path) -> None:
    def exchange(header: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        a, b = "depthwise.weight_scale", "pointwise.weight_scale"
        tensors[a], tensors[b] = tensors[b], tensors[a]

    with pytest.raises(ValueError, match="do not have the checksum"):
        ptq4cuda.load(rewritten(file, exchange), model)


def rename(header: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    header["modules"]["other"] = header["modules"].pop("stem")


EDITS: dict[str, tuple[Change, str]] = {
    "module renamed": (rename, "in the file 'other' is a Conv2d, in the model it is not"),
    "another kind": (lambda h, t: h["modules"]["stem"].update(kind="Linear"), "in the file 'stem' is a Linear"),
    "unknown kind": (lambda h, t: h["modules"]["stem"].update(kind="Conv3d"), "is damaged: KeyError: 'Conv3d'"),
    "a flag that is none": (lambda h, t: h["modules"]["stem"].update(folded=1), "must be true or false"),
    "a layer less": (lambda h, t: h["modules"].pop("stem"), "does not fit the model.*stem"),
    "input not quantized": (lambda h, t: h["modules"]["stem"].update(quantized_input=False), "stem.activation_bits"),
    "sqnr is text": (lambda h, t: h["record"]["layers"][0].update(sqnr="x"), "is damaged: TypeError: sqnr is 'x'"),
    "bytes too many": (lambda h, t: h["record"].update(bytes=1 << 63), "bytes is"),
    "no layers": (lambda h, t: h["record"].update(layers=3), "is damaged"),
    "no such bits": (lambda h, t: h["record"]["config"].update(weight_bits=9), "weight_bits must be an int"),
    "walked otherwise": (lambda h, t: h["record"].update(walked_by="modules"), "belongs to another model"),
    "structure cut": (lambda h, t: h["structure"].pop(), "belongs to another model"),
    "format none": (lambda h, t: h.update(format=None), "its format is None"),
    "format true": (lambda h, t: h.update(format=True), "its format is True"),
    "later format": (lambda h, t: (h.update(format=9), h.pop("version")), "format 9, written by ptq4cuda of a later"),
    "bias NaN": (lambda h, t: t["fc.bias"].fill_(torch.nan), "fc: bias contains NaN or Inf"),
    "offset Inf": (lambda h, t: t.update({"stem.weight_offset": torch.full((8,), torch.inf)}), "weight_offset"),
    "scale zero": (lambda h, t: t["stem.weight_scale"][3:4].zero_(), "stem: weight_scale must be positive"),
    "scale NaN": (lambda h, t: t["stem.weight_scale"][3:4].fill_(torch.nan), "stem: weight_scale contains NaN"),
    "input scale negative": (lambda h, t: t["fc.activation_scale"].neg_(), r"fc: scale must be .*scale\[0\] is -"),
    "input bits": (lambda h, t: t["fc.activation_bits"].fill_(9), "fc: bits must be 0 to 8, got 9"),
    "zero point": (
        lambda h, t: t.update({"fc.activation_zero_point": torch.full((16,), 1 << 30, dtype=torch.int32)}),
        "fc: zero_point must be from",
    ),
    "weight bits": (lambda h, t: t["stem.weight_bits"].fill_(9), "stem: bits must be 0 to 8, got 9"),
    "fewer codes": (lambda h, t: t.update({"stem.weight_packed": t["stem.weight_packed"][1:].clone()}), "_packed"),
    "a key less": (lambda h, t: t.pop("stem.weight_scale"), "does not fit the model.*stem.weight_scale"),
    "a key more": (lambda h, t: t.update(more=torch.zeros(1)), "does not fit the model.*more"),
    "shape": (lambda h, t: t.update({"fc.bias": torch.zeros(5, 1)}), "does not fit the model.*fc.bias"),
    "dtype": (lambda h, t: t.update({"fc.bias": torch.zeros(5, dtype=torch.int32)}), "fc.bias is torch.int32"),
    "sum's scale": (lambda h, t: t["add_residual.scale"].zero_(), "add_residual: scale must be positive"),
}  # fmt: skip


@pytest.mark.parametrize(("change", "message"), EDITS.values(), ids=EDITS)
def test_edited_files(model: nn.Module, file: Path, change: Change, message: str) -> None:
    """What the checksum does not tell, since it was made anew, is told by what the file says."""
    with pytest.raises(ValueError, match=message) as forged:
        ptq4cuda.load(rewritten(file, change, forged=True), model)
    assert "changed.ptq4" in str(forged.value)
    assert "\n" not in str(forged.value)
    with pytest.raises(ValueError, match=r"changed\.ptq4' (is damaged|has format)"):
        ptq4cuda.load(rewritten(file, change), model)


def test_nested_brackets(model: nn.Module, file: Path) -> None:
    for text in ("[" * 100_000, '{"format":' + "[" * 100_000, '{"format": 3, "x": ' + "[" * 900 + "]" * 900 + "}"):
        save_file(load_file(file), file, metadata={"ptq4cuda": text})
        with pytest.raises(ValueError, match=r"net\.ptq4' is damaged: "):
            ptq4cuda.load(file, model)


class Old(nn.Module):
    """What the files in files/ were quantized from."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(8)
        self.relu = nn.ReLU()
        self.depthwise = nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.pointwise = nn.Conv2d(8, 8, 1)
        self.fc = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.bn(self.stem(x)))
        x = x + self.pointwise(self.relu(self.depthwise(x)))
        return self.fc(x.mean((2, 3)))


# What the versions that wrote these files computed from the same input.
OLD_OUTPUTS = {
    "format1": [
        [-0.778113067150116, 0.7261373996734619, -0.38743332028388977, 0.5551804304122925, 0.625375509262085],
        [-0.7800458073616028, 0.7319215536117554, -0.376010537147522, 0.5676485300064087, 0.6183245182037354],
    ],
    "format2": [
        [-0.7786756157875061, 0.7261061668395996, -0.38763320446014404, 0.5549559593200684, 0.6253495812416077],
        [-0.7808942794799805, 0.7318899631500244, -0.3762737512588501, 0.5675531029701233, 0.6182984113693237],
    ],
    "format3": [
        [-0.21191219985485077, 0.28527820110321045, -0.09741252660751343, 0.06816832721233368, 0.4583214819431305],
        [-0.2339036911725998, 0.2813079357147217, -0.10546750575304031, 0.06415051221847534, 0.44398272037506104],
    ],
}
FILES = Path(__file__).parent / "files"


@pytest.mark.parametrize("name", OLD_OUTPUTS)
def test_files_of_earlier_versions(name: str, tmp_path: Path) -> None:
    x = (torch.arange(2 * 3 * 8 * 8) % 17 - 8).view(2, 3, 8, 8) / 8
    loaded = ptq4cuda.load(FILES / f"{name}.ptq4", Old())
    torch.testing.assert_close(loaded(x), torch.tensor(OLD_OUTPUTS[name]), rtol=1e-6, atol=1e-6)
    assert {layer.execution for layer in record_of(loaded).layers} == {"integer"}
    ptq4cuda.save(loaded, tmp_path / "new.ptq4")
    assert torch.equal(ptq4cuda.load(tmp_path / "new.ptq4", Old())(x), loaded(x))


def test_the_checksum_of_format_2(tmp_path: Path) -> None:
    content = bytearray((FILES / "format2.ptq4").read_bytes())
    content[-1] ^= 1
    (tmp_path / "old.ptq4").write_bytes(content)
    with pytest.raises(ValueError, match="its tensors do not have the checksum"):
        ptq4cuda.load(tmp_path / "old.ptq4", Old())


def test_records_of_earlier_versions(network: nn.Module) -> None:
    fields = record_of(network).to_dict()
    times = {"samples": 2, "float_seconds": 0.1, "simulate_seconds": 0.3, "integer_seconds": 0.2}
    assert QuantRecord.from_dict({**fields, "trial": times}) == record_of(network)


def test_newer_format(model: nn.Module, network: nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr("ptq4cuda.artifact.file.FORMAT", 99)
        ptq4cuda.save(network, tmp_path / "new.ptq4")
    with pytest.raises(ValueError, match=r"format 99.*upgrade"):
        ptq4cuda.load(tmp_path / "new.ptq4", model)


def test_other_architecture(model: nn.Module, file: Path) -> None:
    with pytest.raises(ValueError, match="belongs to another model: where the file has"):
        ptq4cuda.load(file, nn.Sequential(nn.Conv2d(3, 8, 3)))
    model.relu = nn.LeakyReLU()
    with pytest.raises(ValueError, match="'relu ReLU', the model has 'relu LeakyReLU'"):
        ptq4cuda.load(file, model)


def test_other_settings(tmp_path: Path) -> None:
    """Strides, slopes and numbers in the code are in no tensor of a file: with others a model computes otherwise."""

    class Net(nn.Sequential):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x).sin() * self.factor

    def build(stride: int = 1, slope: float = 0.1, window: int = 2, factor: float = 2.0) -> nn.Module:
        conv = type("Own", (nn.Conv2d,), {})(3, 8, 3, stride=stride)  # a class that adds nothing
        net = Net(conv, nn.LeakyReLU(slope), nn.AvgPool2d(window, 1), nn.Conv2d(8, 4, 1))
        net.factor = factor
        return net.eval()

    x = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    for overrides in ({}, {"0": "float"}):
        quantized = ptq4cuda.quantize(build(), [x], QuantConfig.fast(overrides=overrides), progress=False)
        ptq4cuda.save(quantized, tmp_path / "net.ptq4")
        assert torch.equal(ptq4cuda.load(tmp_path / "net.ptq4", build())(x), quantized(x))
        for other, said in (
            ({"stride": 2}, r"0 Conv2d stride=\(1,1\)', the model has '0 Conv2d stride=\(2,2\)"),
            ({"slope": 0.3}, "1 LeakyReLU negative_slope=0.1', the model has '1 LeakyReLU negative_slope=0.3"),
            ({"window": 3}, "2 AvgPool2d kernel_size=2', the model has '2 AvgPool2d kernel_size=3"),
            ({"factor": 3.0}, "mul 1=2.0', the model has 'call_function mul 1=3.0"),
        ):
            with pytest.raises(ValueError, match=said):
                ptq4cuda.load(tmp_path / "net.ptq4", build(**other))


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
    with pytest.raises(OSError, match="is a folder or a device"):
        ptq4cuda.load(tmp_path, network)


def test_a_failed_save_leaves_the_old_file(network: nn.Module, file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = file.read_bytes()

    def fail(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("os.fsync", fail)
    with pytest.raises(OSError, match=r"net\.ptq4' cannot be written: No space left on device") as error:
        ptq4cuda.save(network, file)
    assert error.value.errno == errno.ENOSPC
    assert file.read_bytes() == before
    assert list(file.parent.iterdir()) == [file]
