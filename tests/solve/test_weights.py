"""Rounding of weights, bias correction, and the quantizer they are made with."""

from __future__ import annotations

import pytest
import torch

from ptq4cuda import QuantParams
from ptq4cuda.solve.correction import correct_bias
from ptq4cuda.solve.rounding import round_to_nearest


@pytest.fixture
def weight() -> torch.Tensor:
    return torch.randn(6, 3, 3, 5, generator=torch.Generator().manual_seed(0)) + 0.2


def bits(*values: int) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.uint8)


def test_rounding_error_is_half_a_step(weight: torch.Tensor) -> None:
    q = round_to_nearest(weight, bits(1, 2, 3, 4, 6, 8))
    error = (q.values() - weight).abs().flatten(1).amax(1)
    assert bool((error <= 0.5001 * q.scale).all())
    assert q.codes.flatten(1).amax(1).tolist()[:5] == [1, 3, 7, 15, 63]
    # Eight bits are symmetric about zero: the wider end of the range has the code 1 or 255.
    assert q.offset[5] == -128.0
    assert int(q.codes[5].max()) == 255 or int(q.codes[5].min()) == 1


def test_zero_is_exact(weight: torch.Tensor) -> None:
    weight[:, 0] = 0.0
    q = round_to_nearest(weight, bits(4, 4, 4, 4, 4, 4))
    assert bool((q.values()[:, 0] == 0).all())


def test_zero_bits_leave_the_mean(weight: torch.Tensor) -> None:
    q = round_to_nearest(torch.stack([weight[0], -weight[0], 0 * weight[0]]), bits(0, 0, 0))
    expected = torch.tensor([weight[0].mean(), -weight[0].mean(), 0.0])
    torch.testing.assert_close(q.values().flatten(1)[:, 0], expected)
    assert bool((q.codes == 0).all())


def test_mean_correction_restores_the_mean(weight: torch.Tensor) -> None:
    q = round_to_nearest(weight, bits(2, 2, 2, 3, 3, 4))
    assert (q.values() - weight).flatten(1).mean(1).abs().max() > 1e-3
    corrected = correct_bias(q, weight, "mean")
    torch.testing.assert_close(corrected.values().flatten(1).mean(1), weight.flatten(1).mean(1))


def test_variance_correction_restores_the_spread(weight: torch.Tensor) -> None:
    q = correct_bias(round_to_nearest(weight, bits(2, 2, 2, 3, 3, 4)), weight, "mean+variance")
    torch.testing.assert_close(q.values().flatten(1).std(1), weight.flatten(1).std(1))


def test_variance_correction_is_equation_13(weight: torch.Tensor) -> None:
    q = round_to_nearest(weight, bits(2, 2, 2, 3, 3, 4))
    w, wq = weight.double().flatten(1), q.values().double().flatten(1)
    mu = (w.mean(1) - wq.mean(1))[:, None]
    xi = (w - w.mean(1, keepdim=True)).norm(dim=1) / (wq - wq.mean(1, keepdim=True)).norm(dim=1)
    expected = xi[:, None] * (wq + mu)
    torch.testing.assert_close(correct_bias(q, weight, "mean+variance").values().double().flatten(1), expected)


def test_correction_of_rows_that_are_constant() -> None:
    weight = torch.stack([torch.full((2, 2), 0.7), torch.zeros(2, 2)])
    q = correct_bias(round_to_nearest(weight, bits(4, 4)), weight, "mean+variance")
    torch.testing.assert_close(q.values(), weight)


# --- QuantParams ----------------------------------------------------------------------------------------------


def test_from_range_contains_zero_and_the_range() -> None:
    low, high = torch.tensor([-1.0, 0.5, -3.0, 0.0]), torch.tensor([2.0, 4.0, -1.0, 0.0])
    q = QuantParams.from_range(low, high, bits(4, 4, 4, 4))
    assert q.zero_point.tolist() == [5, 0, 15, 0]
    x = torch.stack([low, high, torch.zeros(4)]).view(3, 4, 1, 1)
    y = q.fake_quantize(x)
    assert bool((y[2] == 0).all())
    assert bool(((y - x).abs().flatten() <= 0.5001 * q.scale.repeat(3)).all())


def test_channels_of_one_value_do_not_stand_out() -> None:
    """Their scale is folded into weights like any other: it must be like the others, whatever the value."""
    low, high = torch.tensor([0.0, 0.0, -0.1, 0.0]), torch.tensor([0.0, 5.0, 0.2, 0.25])
    constant = torch.tensor([0.0, 5.0, 0.0, 0.0])
    q = QuantParams.from_range(low, high, bits(4, 0, 4, 4), constant=constant)
    assert float(q.scale.max() / q.scale.min()) < 2
    y = q.fake_quantize(torch.full((1, 4, 1, 1), 9.0)).flatten()
    torch.testing.assert_close(y[1], torch.tensor(5.0))


def test_symmetric_int4_has_zero_point_eight() -> None:
    assert QuantParams.from_range(torch.tensor([-1.0]), torch.tensor([1.0]), bits(4)).zero_point.tolist() == [8]


@pytest.mark.parametrize("limits", [(2.0, 1.0), (float("nan"), 1.0), (0.0, float("inf"))])
def test_from_range_refuses(limits: tuple[float, float]) -> None:
    low, high = (torch.tensor([0.0, limit]) for limit in limits)
    with pytest.raises(ValueError, match=f"got low {limits[0]}, high {limits[1]}"):
        QuantParams.from_range(low, high + torch.tensor([1.0, 0.0]), bits(4))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"bits": torch.tensor([9], dtype=torch.uint8)}, ValueError, "bits must be 0 to 8, got 9"),
        ({"bits": torch.tensor([4])}, TypeError, "bits must be torch.uint8, got torch.int64"),
        ({"scale": torch.tensor([0.0, 1.0])}, ValueError, r"scale\[0\] is 0$"),
        ({"scale": torch.tensor([1.0, -2.0])}, ValueError, r"scale\[1\] is -2$"),
        ({"scale": torch.tensor([1.0, float("nan")])}, ValueError, r"scale\[1\] is nan"),
        ({"scale": torch.tensor([1.0, float("inf")])}, ValueError, r"scale\[1\] is inf"),
        ({"scale": torch.ones(3)}, ValueError, r"must have the shape \[3\] or \[1\], got \[2\]"),
        ({"scale": torch.ones(2).double()}, TypeError, "scale must be torch.float32"),
        ({"zero_point": torch.tensor([1 << 23], dtype=torch.int32)}, ValueError, "8388608"),
        ({"zero_point": [8]}, TypeError, "zero_point must be a tensor, got list"),
    ],
)
def test_quant_params_refuse(change: dict, error: type[Exception], message: str) -> None:
    fields = {"bits": bits(4), "scale": torch.ones(2), "zero_point": torch.zeros(2, dtype=torch.int32), **change}
    with pytest.raises(error, match=message):
        QuantParams(**fields)
