"""What quantized networks and layers say to inputs that the float network refuses, and to single images."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ptq4cuda import QuantConfig, QuantConv2d, QuantLinear, QuantParams, lower_layers, quantize


class Net(nn.Module):
    """A residual sum, whose convolution writes two outputs; `branches` keeps torch.fx from tracing it."""

    def __init__(self, branches: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b = nn.Conv2d(3, 8, 5), nn.Conv2d(8, 8, 3, padding=1)
        self.c, self.fc = nn.Conv2d(8, 8, 3), nn.Linear(8, 4)
        self.branches = branches
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        if self.branches and x.sum() < -1e9:
            x = -x
        x = F.relu(self.a(x))
        x = F.max_pool2d(F.relu(x + self.b(x)), 2)
        return self.fc(F.relu(self.c(x)).mean((-2, -1)))


def quantizer(channels: int) -> QuantParams:
    low, high = -torch.ones(channels), torch.full((channels,), 2.0)
    return QuantParams.from_range(low, high, torch.full((channels,), 8, dtype=torch.uint8))


def subjects() -> dict[str, nn.Module]:
    x = torch.randn(8, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    found: dict[str, nn.Module] = {}
    for branches in (False, True):
        for execution in ("integer", "simulate"):
            for granularity in ("per_channel", "per_tensor"):
                config = QuantConfig.fast(execution=execution, activation_granularity=granularity)
                name = f"{'modules' if branches else 'graph'} {execution} {granularity}"
                found[name] = quantize(Net(branches), [x], config, progress=False)
    found["layer"] = QuantConv2d.from_float(Net(False).a, quantizer(3), bias_correction="none")
    found["weights only"] = QuantConv2d.from_float(Net(False).a)
    found["layer in integers"] = QuantConv2d.from_float(Net(False).a, quantizer(3), bias_correction="none")
    assert lower_layers(found["layer in integers"]) == {}
    return found


SUBJECTS = subjects()
IMAGES = torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(2))
WRONG: dict[str, tuple[Any, type[Exception], str]] = {
    "channels": (IMAGES[:, :2], RuntimeError, r"\[4, 2, 16, 16\], and the (network|convolution) takes 3 channels"),
    "more channels": (IMAGES.repeat(1, 2, 1, 1), RuntimeError, r"\[4, 6, 16, 16\], and .* takes 3 channels"),
    "too small": (IMAGES[..., :4, :4], RuntimeError, "and the convolution's kernel is 5 x 5"),
    "no image": (IMAGES[0, 0], RuntimeError, r"\[16, 16\], and the .* takes .*\[N, C, H, W\]"),
    "a batch too many": (IMAGES[None], RuntimeError, r"\[1, 4, 3, 16, 16\], and the .* takes .*\[N, C, H, W\]"),
    "uint8": (
        IMAGES.to(torch.uint8),
        TypeError,
        r"float32, float16 or bfloat16, got torch\.uint8: convert it",
    ),
    "float64": (IMAGES.double(), TypeError, r"float32, float16 or bfloat16, got torch\.float64: convert it"),
    "int64": (IMAGES.long(), TypeError, r"float32, float16 or bfloat16, got torch\.int64: convert it"),
}


@pytest.mark.parametrize("subject", SUBJECTS)
@pytest.mark.parametrize(("x", "error", "message"), WRONG.values(), ids=WRONG)
def test_wrong_inputs_get_one_sentence(subject: str, x: Any, error: type[Exception], message: str) -> None:
    with torch.no_grad(), pytest.raises(error, match=message) as caught:
        SUBJECTS[subject](x)
    assert "\n" not in str(caught.value)
    assert ".h:" not in str(caught.value)


@pytest.mark.parametrize("subject", [name for name in SUBJECTS if not name.startswith("modules")])
def test_what_is_no_tensor(subject: str) -> None:
    for x in ([IMAGES], None, IMAGES.numpy()):
        remedy = r": torch\.from_numpy" if isinstance(x, np.ndarray) else "$"
        with pytest.raises(TypeError, match=f"the input must be a tensor, got {type(x).__name__}{remedy}"):
            SUBJECTS[subject](x)


@pytest.mark.parametrize("subject", SUBJECTS)
def test_single_images(subject: str) -> None:
    """As the float layers take them, but for a lowered graph, which refuses them."""
    network = SUBJECTS[subject]
    with torch.no_grad():
        if subject.startswith("graph integer"):
            with pytest.raises(RuntimeError, match=r"the network in integers takes batches \[N, C, H, W\]"):
                network(IMAGES[0])
        else:
            torch.testing.assert_close(network(IMAGES[0]), network(IMAGES[:1])[0], rtol=1e-5, atol=1e-5)


def test_square_images_of_as_many_channels() -> None:
    """Quantizers of channels must not be taken along the rows of a single image."""

    class Sums(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.a, self.b = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 3, padding=1)

        def forward(self, x: Tensor) -> Tensor:
            x = self.a(x)
            return x + self.b(x)

    x = torch.randn(8, 3, 8, 8)
    network = quantize(Sums().eval(), [x], QuantConfig.fast(execution="simulate"), progress=False)
    torch.testing.assert_close(network(x[0]), network(x[:1])[0])


@pytest.mark.parametrize("integer", [False, True])
def test_linear_layers(integer: bool) -> None:
    layer = QuantLinear.from_float(nn.Linear(6, 3), quantizer(6), bias_correction="none")
    if integer:
        assert lower_layers(layer) == {}
    for shape in ((4, 5), (5,), ()):
        with pytest.raises(RuntimeError, match="and the layer takes 6 features along the last dimension"):
            layer(torch.zeros(shape))
    with pytest.raises(TypeError, match=r"got torch\.int64: convert it"):
        layer(torch.zeros(4, 6, dtype=torch.int64))
