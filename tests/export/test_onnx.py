"""export_onnx(): a file computes in onnxruntime what the network does, bit for bit, and refuses what it cannot."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import networks
import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import ptq4cuda
from ptq4cuda import QuantConfig, quantize
from ptq4cuda.bench import architectures
from ptq4cuda.export.onnx_layers import Rounding, code_range
from ptq4cuda.export.summary import OnnxExport
from ptq4cuda.quantizer import QuantParams
from small_networks import Residual, Writes, calibrate_batch_norm

FAST = QuantConfig.fast(execution="simulate")


def session(file: Path, optimized: Path | None = None) -> onnxruntime.InferenceSession:
    """Open a file as it is, or optimized, with the optimized graph in a file of its own."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = 1, 4
    level = onnxruntime.GraphOptimizationLevel
    options.graph_optimization_level = level.ORT_ENABLE_ALL if optimized else level.ORT_DISABLE_ALL
    if optimized:
        options.optimized_model_filepath = str(optimized)
    return onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])


def kinds(file: Path) -> Counter[str]:
    return Counter(node.op_type for node in onnx.load(file).graph.node)


def exported(
    network: nn.Module, folder: Path, *inputs: Tensor, packed: bool = True
) -> tuple[OnnxExport, Counter[str]]:
    """Export a network for one sample, and hold what onnxruntime computes of all, as it is and optimized, to it.

    Returns:
        The summary, and how many nodes of each kind the optimized graph has.
    """
    file, optimized = folder / "net.onnx", folder / "optimized.onnx"
    summary = ptq4cuda.export_onnx(network, file, tuple(x[:1] for x in inputs), packed=packed)
    assert summary.bytes == file.stat().st_size
    with torch.no_grad():
        expected = network(*inputs)
    expected = expected if isinstance(expected, tuple) else (expected,)
    for opened in (session(file), session(file, optimized)):
        names = [value.name for value in opened.get_inputs()]
        found = opened.run(None, dict(zip(names, (x.numpy() for x in inputs), strict=True)))
        for a, b in zip(expected, found, strict=True):
            torch.testing.assert_close(torch.from_numpy(b), a, rtol=1e-5, atol=1e-5 * float(a.abs().max()))
    check_what_gets_a_zero_point(file, [x.numpy() for x in inputs])
    return summary, kinds(optimized)


def check_what_gets_a_zero_point(file: Path, inputs: list[np.ndarray]) -> None:
    """Hold it to be whole: OpenVINO adds the zero point before it rounds, which moves what is all but half a code."""
    model = onnx.load(file)
    zeros = {constant.name: onnx.numpy_helper.to_array(constant) for constant in model.graph.initializer}
    quantizing = [node for node in model.graph.node if node.op_type == "QuantizeLinear"]
    read = sorted({node.input[0] for node in quantizing if zeros[node.input[2]].any()})
    model.graph.output.extend(onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, None) for name in read)
    whole = file.with_name("whole.onnx")
    onnx.save(model, whole)
    opened = session(whole)
    names = [value.name for value in opened.get_inputs()]
    for name, found in zip(read, opened.run(read, dict(zip(names, inputs, strict=True))), strict=True):
        assert (found == np.rint(found)).all(), name


def quantized(model: nn.Module, batch: Tensor, config: QuantConfig = FAST) -> nn.Module:
    return quantize(model.eval(), [batch], config, progress=False)


@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v2", "vgg16_bn", "shufflenet", "inception", "unet", "audio"])
def test_architectures(name: str, tmp_path: Path) -> None:
    make, size = (architectures.waves, 2000) if name == "audio" else (architectures.images, 64)
    build = architectures.build_audio if name == "audio" else architectures.ARCHITECTURES[name]
    net = architectures.calibrate_batch_norm(build(num_classes=10, width=0.125), make(4, size))
    network = quantized(net, make(2, size, seed=1))
    summary, nodes = exported(network, tmp_path, make(3, size, seed=2))
    layers = [layer for layer in str(ptq4cuda.report(network)).splitlines() if " Conv" in layer or " Linear" in layer]
    assert 0 < len(summary.layers) <= len(layers)
    fused = nodes["QLinearConv"] + nodes["MatMulIntegerToFloat"] + nodes["QGemm"]
    assert fused == sum(layer.integers for layer in summary.layers)


def test_both_executions_give_one_file(model: nn.Module, images: Tensor, tmp_path: Path) -> None:
    files = []
    for execution in ("simulate", "integer"):
        network = quantized(model, images, replace(FAST, execution=execution))
        exported(network, tmp_path, images[:3])
        files.append((tmp_path / "net.onnx").read_bytes())
        before = {name: t.clone() for name, t in network.state_dict().items()}
        assert all(torch.equal(t, before[name]) for name, t in network.state_dict().items())
    assert files[0] == files[1]


def weights(file: Path) -> Counter[int]:
    """Return the bytes of constants of each type."""
    found: Counter[int] = Counter()
    for constant in onnx.load(file).graph.initializer:
        found[constant.data_type] += len(constant.raw_data)
    return found


def test_weights_of_four_bits_are_two_a_byte(images: Tensor, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3),
        nn.ReLU(),
        nn.Conv2d(8, 15, 3),
        nn.ReLU(),
        nn.Conv2d(15, 8, 1),
        nn.ReLU(),
        nn.Conv2d(8, 4, 1),
    )
    network = quantized(model, images)
    exported(network, tmp_path, images[:2])
    four = 8 * 15 * 9 // 2 + (15 * 8) // 2
    packed, uint4 = weights(tmp_path / "net.onnx"), onnx.TensorProto.UINT4
    assert packed[uint4] == four
    assert packed[onnx.TensorProto.INT8] == 3 * 8 * 9 + 8 * 4
    summary, nodes = exported(network, tmp_path, images[:2], packed=False)
    assert weights(tmp_path / "net.onnx")[onnx.TensorProto.INT8] == 2 * four + 3 * 8 * 9 + 8 * 4
    assert uint4 not in weights(tmp_path / "net.onnx")
    assert [layer.bits for layer in summary.layers] == [8, 8, 8, 8]
    assert nodes["QLinearConv"] == sum(layer.integers for layer in summary.layers) >= 1


class Decoder(nn.Module):
    """Transposed convolutions of many kinds, one behind the other."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Conv2d(3, 8, 3, padding=1)
        self.ups = nn.Sequential(
            *(nn.ConvTranspose2d(8, 8, 3, stride=2, padding=1, output_padding=1), nn.ReLU()),
            *(nn.ConvTranspose2d(8, 8, (2, 3), stride=(1, 2), groups=2), nn.ReLU()),
            *(nn.ConvTranspose2d(8, 8, 3, padding=1, dilation=2), nn.LeakyReLU(0.1)),
            nn.ConvTranspose2d(8, 2, 2, stride=2),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.ups(F.relu(self.first(x)))


class Waves(nn.Module):
    """A sequence that is made shorter and longer again, with a shortcut."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b = nn.Conv1d(3, 8, 5, padding=2), nn.Conv1d(8, 8, 3, padding=1)
        self.c, self.up = nn.Conv1d(8, 8, 4, stride=2, padding=1), nn.ConvTranspose1d(8, 8, 4, stride=2, padding=1)
        self.last = nn.Conv1d(16, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.a(x))
        x = F.relu(x + self.b(x))
        return self.last(torch.cat([F.relu(self.up(F.max_pool1d(F.relu(self.c(x)), 1))), x], 1))


class Squeeze(nn.Module):
    """Two readers whose outputs are concatenated; pooling with ceil_mode; the classifier is a convolution."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem, self.squeeze = nn.Conv2d(3, 16, 3, stride=2), nn.Conv2d(16, 4, 1)
        self.one, self.three = nn.Conv2d(4, 8, 1), nn.Conv2d(4, 8, 3, padding=1)
        self.pool, self.drop, self.head = nn.MaxPool2d(3, 2, ceil_mode=True), nn.Dropout(), nn.Conv2d(16, 10, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.squeeze(self.pool(F.relu(self.stem(x)))))
        x = self.pool(torch.cat([F.relu(self.one(x)), F.relu(self.three(x))], 1))
        return torch.flatten(F.adaptive_avg_pool2d(F.relu(self.head(self.drop(x))), 1), 1)


class Signed(nn.Module):
    """Inputs of both signs: with padding and without; pixels that are shuffled; activations with other upper ends."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b = nn.Conv2d(3, 16, 3, padding=1), nn.Conv2d(16, 16, 3, padding=1, groups=4)
        self.c, self.d = nn.Conv2d(16, 32, 1), nn.Conv2d(8, 8, 3, padding=1)
        self.e = nn.Conv2d(8, 4, 3, padding=1, padding_mode="reflect")

    def forward(self, x: Tensor) -> Tensor:
        x = self.c(self.b(self.a(x)))
        return self.e(F.relu6(self.d(F.pixel_shuffle(x, 2))))


class Linears(nn.Module):
    """Linear layers between convolutions, on three dimensions and on two."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.patches = nn.Conv2d(3, 16, 4, stride=4)
        self.mix, self.norm, self.out = nn.Linear(16, 32), nn.LayerNorm(32), nn.Linear(32, 16)
        self.head = nn.Linear(16 * 9, 5)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        tokens = self.patches(x).flatten(2).transpose(1, 2)
        tokens = tokens + self.out(F.gelu(self.norm(self.mix(tokens))))
        return self.head(tokens.reshape(tokens.size(0), -1)), tokens.mean(1)


OTHERS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "residual": (Residual, (3, 12, 12)),
    "decoder": (Decoder, (3, 7, 6)),
    "waves": (Waves, (3, 20)),
    "squeeze": (Squeeze, (3, 24, 24)),
    "signed": (Signed, (3, 10, 10)),
    "linears": (Linears, (3, 12, 12)),
}
CONFIGS = {
    "default": replace(QuantConfig(), execution="simulate"),
    "8 bits": replace(FAST, weight_bits=8, activation_bits=8),
    "per tensor": replace(FAST, activation_granularity="per_tensor"),
    "bits per channel": replace(FAST, weight_allocation="analytic", channel_bits=(0, 8)),
}


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
@pytest.mark.parametrize("name", OTHERS)
def test_networks_of_all_kinds_of_layers(name: str, config: QuantConfig, tmp_path: Path) -> None:
    make, shape = OTHERS[name]
    batch = torch.randn(24, *shape, generator=torch.Generator().manual_seed(0))
    network = quantized(calibrate_batch_norm(make(), batch), batch, config)
    summary, _ = exported(network, tmp_path, torch.randn(5, *shape))
    assert len(summary.layers) == sum(isinstance(m, ptq4cuda.nn.QuantModule) for m in network.modules())


def test_real_networks_keep_every_answer(
    resnet20: networks.Subject, mobilenet: networks.Subject, tmp_path: Path
) -> None:
    for subject in (resnet20, mobilenet):
        network = quantized(subject.model, subject.calibration[:16])
        exported(network, tmp_path, subject.test[0][0][:16])


# --- what the file is --------------------------------------------------------------------------------------------


def test_inputs_and_outputs_have_names_and_a_free_batch(images: Tensor, tmp_path: Path) -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 3)

        def forward(self, image: Tensor, scale: Tensor, times: int = 1) -> dict[str, Any]:
            y = self.conv(image)
            return {"maps": y * scale * times, "means": [y.mean((2, 3)), y.amax((2, 3))]}

    network = quantize(
        Net().eval(), [{"image": images, "scale": images[:, :1, :1, :1], "times": 3}], FAST, progress=False
    )
    ptq4cuda.export_onnx(
        network, tmp_path / "net.onnx", {"image": images[:1], "scale": images[:1, :1, :1, :1], "times": 3}
    )
    opened = session(tmp_path / "net.onnx")
    assert [(i.name, i.shape) for i in opened.get_inputs()] == [
        ("image", ["N", 3, 12, 12]),
        ("scale", ["N", 1, 1, 1]),
    ]
    assert [o.name for o in opened.get_outputs()] == ["maps", "means.0", "means.1"]
    found = opened.run(["means.1"], {"image": images.numpy(), "scale": images[:, :1, :1, :1].numpy()})[0]
    expected = network(images, images[:, :1, :1, :1], 3)["means"][1]
    np.testing.assert_allclose(found, expected.detach(), rtol=1e-5)


def test_the_summary_says_what_layers_became(model: nn.Module, images: Tensor, tmp_path: Path) -> None:
    summary, nodes = exported(quantized(model, images), tmp_path, images[:2])
    text = str(summary)
    assert all(layer.name in text and (layer.integers or layer.reason in text) for layer in summary.layers)
    by_name = {layer.name: layer for layer in summary.layers}
    assert by_name["pointwise"].reason == "a residual is added to its sums"
    assert by_name["fc"].integers and by_name["fc"].bits == 8
    assert f"{sum(layer.integers for layer in summary.layers)} of 5" in text
    assert nodes["MatMulIntegerToFloat"] == 1


def refused(network: nn.Module, example: Any, match: str, folder: Path, kind: type[Exception] = ValueError) -> None:
    with pytest.raises(kind, match=match):
        ptq4cuda.export_onnx(network, folder / "net.onnx", example)
    assert not list(folder.iterdir())


def test_what_cannot_be_exported_is_refused_in_one_sentence(model: nn.Module, images: Tensor, tmp_path: Path) -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 3)

        def forward(self, x: Tensor) -> Tensor:
            return torch.special.bessel_j0(self.conv(x))

    refused(
        quantized(Odd(), images), images, r"special_bessel_j0 \('special_bessel_j0'\) cannot be exported", tmp_path
    )
    refused(quantized(Writes(), images), images, "has no program: it was walked by its modules", tmp_path)
    refused(model, images, "Residual has no quantized layer", tmp_path, TypeError)
    network = quantized(model, images)
    refused(network, images.half(), "'x' cannot be exported: the example is of torch.float16", tmp_path)
    refused(network, (images, 1), "the example has 2 arguments, and the network takes 1", tmp_path)
    refused(network, {"y": images}, "the example has 'y', and the network takes x", tmp_path)
    refused(network.half(), images, "the network computes with torch.float16", tmp_path)
    paper = quantized(model, images, QuantConfig.paper())
    refused(paper, images, r"Conv2d \('stem'\) cannot be exported: its input has a scale per channel", tmp_path)


@pytest.mark.parametrize("more", [0, 4321])
def test_sums_get_their_codes_in_whatever_order_a_runtime_rounds(more: int) -> None:
    """Every channel that is said to be exact, for all sums: with the bias added before the scale, or after it."""
    torch.manual_seed(0)
    channels, totals = 400, torch.arange(-6000, 6001)
    scale, bias = torch.rand(channels) * 2e-3 + 1e-5, torch.randn(channels) * 0.1
    params = QuantParams.from_range(torch.tensor([0.0]), torch.tensor([6.0]), torch.tensor([4], dtype=torch.uint8))
    low, high = code_range(params)
    found = Rounding(scale, bias, params, low, high, torch.full((channels,), more))
    assert found.exact.float().mean() > 0.9
    inverse = 1.0 / params.scale
    expected = ((totals.float() * scale[:, None] + bias[:, None]) * inverse).round().clamp(0, 15)
    sums, add, by = (totals + more).double(), found.bias.double()[:, None], found.scale.double()[:, None]
    scaled_add = (add * by).float()
    ways = [
        ((sums + add).float() * by.float()),
        sums.float() * by.float() + scaled_add,
        (sums * by + scaled_add).float(),
    ]
    for way in ways:
        codes = (way.round().clamp(0, 255) - found.above[:, None]).clamp(0, 15)
        wrong = (codes != expected).any(1)
        assert not bool((wrong & found.exact).any())
