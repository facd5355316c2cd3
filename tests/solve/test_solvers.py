"""Moments, least squares and rounding against numpy, closed forms and exhaustive search."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ptq4cuda.calibrate import moments as moments_module
from ptq4cuda.calibrate.moments import Moments, layer_moments
from ptq4cuda.nn import QuantConv2d, QuantLinear
from ptq4cuda.quantizer import QuantizedWeight, QuantParams
from ptq4cuda.solve.least_squares import RIDGES, fit_weights
from ptq4cuda.solve.rounding import ROUNDINGS, round_for_output, round_to_nearest

# --- moments ----------------------------------------------------------------------------------------------------

GEOMETRIES = [
    {},
    {"stride": 2, "padding": 1},
    {"stride": (1, 2), "padding": (2, 0), "dilation": (2, 1)},
    {"groups": 2, "padding": 1},
    {"groups": 4, "out_channels": 8, "padding": 1},
    {"kernel_size": (1, 3)},
    {"padding": "same", "dilation": 2},
    *({"padding": 1, "padding_mode": mode} for mode in ("reflect", "replicate", "circular")),
]


def unfolded(conv: nn.Conv2d, x: Tensor) -> Tensor:
    """Return the patches float64 [G, n, R * S * C / G] that a convolution reads, by F.unfold."""
    mode = "constant" if conv.padding_mode == "zeros" else conv.padding_mode
    x = F.pad(x.double(), conv._reversed_padding_repeated_twice, mode=mode)
    columns = F.unfold(x, conv.kernel_size, conv.dilation, 0, conv.stride)  # [N, C * R * S, L]
    n, _, length = columns.shape
    columns = columns.view(n, conv.groups, conv.in_channels // conv.groups, -1, length)
    return columns.permute(1, 0, 4, 3, 2).reshape(conv.groups, n * length, -1)


def reference(u: Tensor, t: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Return numpy's covariances of u [n, d], and of t [n, R] with u."""
    both = np.cov(np.concatenate([u.numpy(), t.numpy()], 1), rowvar=False, bias=True)
    d = u.shape[1]
    return both[:d, :d], both[d:, :d]


@pytest.mark.parametrize("folded", [True, False])
@pytest.mark.parametrize("geometry", GEOMETRIES, ids=str)
def test_moments_of_a_convolution(geometry: dict, folded: bool) -> None:
    torch.manual_seed(0)
    conv = nn.Conv2d(**{"in_channels": 4, "out_channels": 6, "kernel_size": 3, **geometry})
    x = 2.0 + torch.randn(6, 4, 7, 8) * torch.tensor([1.0, 3.0, 0.3, 0.0]).view(1, 4, 1, 1)
    module = QuantConv2d.like(conv, folded=folded)
    activation = QuantParams.from_range(x.amin((0, 2, 3)), x.amax((0, 2, 3)), torch.full((4,), 4, dtype=torch.uint8))
    module.set_activation(activation)
    y = conv(x).detach()
    q = activation.fake_quantize(x)
    if folded:
        q = q / activation.scale.view(1, -1, 1, 1)
    total = sum_of(layer_moments(module, x.split((1, 3, 2)), y.split((1, 3, 2))))
    patches = unfolded(conv, q)
    targets = y.double().movedim(1, -1).reshape(-1, conv.groups, conv.out_channels // conv.groups).movedim(1, 0)
    assert total.count == patches.shape[1]
    for g in range(conv.groups):
        h, b = reference(patches[g], targets[g])
        np.testing.assert_allclose(total.covariance[g], h, rtol=1e-4, atol=1e-4 * h.max())
        np.testing.assert_allclose(total.cross[g], b, rtol=1e-4, atol=1e-4 * abs(b).max())
    weight = torch.randn(conv.groups, conv.out_channels // conv.groups, patches.shape[2], dtype=torch.float64)
    mean_output = (patches @ weight.mT).mean(1) + total.bias(weight)
    torch.testing.assert_close(mean_output, targets.mean(1), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("shape", [(12, 5), (4, 3, 5), (2, 3, 2, 5)])
def test_moments_of_a_linear_layer(shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    linear = nn.Linear(5, 3)
    x = torch.randn(shape) + 1.0
    module = QuantLinear.like(linear, folded=False)
    module.set_activation(
        QuantParams.from_range(x.min().view(1), x.max().view(1), torch.tensor([8], dtype=torch.uint8))
    )
    q = module.quantized_input(x).double().view(-1, 5)
    y = linear(x).detach()
    total = sum_of(layer_moments(module, [x], [y]))
    h, b = reference(q, y.double().view(-1, 3))
    np.testing.assert_allclose(total.covariance[0], h, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(total.cross[0], b, rtol=1e-5, atol=1e-6)


def sum_of(halves: tuple[Moments, Moments]) -> Moments:
    assert halves[0] is not halves[1]
    return halves[0] + halves[1]


def marked(images: int, side: int) -> tuple[nn.Conv2d, nn.Module, Tensor]:
    """Return a 1 x 1 convolution and images of one value each: 2 to the power of the image's number."""
    conv = nn.Conv2d(1, 1, 1)
    module = QuantConv2d.like(conv, folded=False)
    module.set_activation(
        QuantParams(torch.tensor([8], dtype=torch.uint8), torch.ones(1), torch.zeros(1, dtype=torch.int32))
    )
    return conv, module, (2.0 ** torch.arange(images).float()).view(-1, 1, 1, 1).expand(-1, 1, side, side)


@pytest.mark.parametrize("cut", [(8,), (1, 1, 1, 1, 1, 1, 1, 1), (3, 5), (1, 6, 1)])
def test_no_image_is_in_both_halves(cut: tuple[int, ...]) -> None:
    _, module, x = marked(8, 5)
    a, b = layer_moments(module, x.split(cut), x.split(cut))
    assert (a.count, b.count) == (100, 100)
    # sums of 1, 4, 16, 64 and of 2, 8, 32, 128, each 25 times
    assert (a.u.item(), b.u.item()) == (25 * 85, 25 * 170)


@pytest.mark.parametrize("cut", [(8,), (1, 1, 1, 1, 1, 1, 1, 1), (3, 5)])
def test_sampling_takes_what_is_asked_for(cut: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(moments_module, "MAX_SAMPLES", 200)
    _, module, x = marked(8, 20)
    a, b = layer_moments(module, x.split(cut), x.split(cut))
    assert a.count + b.count == 200  # of 3,200 positions
    assert a.u.item() == pytest.approx(25 * 85, rel=0.02)  # every image counts alike
    assert b.u.item() == pytest.approx(25 * 170, rel=0.02)
    assert float(a.t) == float(a.u)  # inputs and outputs of the same places


def test_one_sample_cannot_be_halved() -> None:
    _, module, x = marked(1, 5)
    a, b = layer_moments(module, [x], [x])
    assert a is b


# --- least squares ----------------------------------------------------------------------------------------------


def halves_of(u: Tensor, t: Tensor) -> tuple[Moments, Moments]:
    """Return moments of the even and the odd rows of u [n, d] and t [n, R]."""
    a, b = (Moments.of(u[None, i::2], t[None, i::2]) for i in range(2))
    return a, b


def correlated(n: int, d: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(d, d, generator=generator) + 2.0 * torch.eye(d)
    return torch.randn(n, d, generator=generator) @ mix + 1.0


def test_exact_input_gives_the_weights_back() -> None:
    weight = torch.randn(1, 3, 10, generator=torch.Generator().manual_seed(1)).double()
    u = correlated(4000, 10)
    fit = fit_weights(weight, halves_of(u, u @ weight[0].T.float() + 5.0))
    torch.testing.assert_close(fit.weight, weight, rtol=1e-3, atol=1e-3)


def test_fit_is_the_ridge_regression() -> None:
    """Gains and weights, solved as ordinary least-squares problems on stacked data, for the ridge that was chosen."""
    d, n = 6, 3000
    x = correlated(n, d)
    weight = torch.randn(1, 2, d, generator=torch.Generator().manual_seed(1)).double()
    u = (x / 6).round() * 6
    t = x @ weight[0].T.float()
    fit = fit_weights(weight, halves_of(u, t))
    uc, tc = u.double() - u.double().mean(0), t.double() - t.double().mean(0)
    variances = uc.square().mean(0) + 1e-3 * uc.square().mean()
    w = weight[0]
    rows = torch.cat([(uc[:, None, :] * w).flatten(0, 1), torch.diag((n * variances).sqrt() * w.norm(dim=0))])
    right = torch.cat([(tc - uc @ w.T).flatten(), torch.zeros(d).double()])
    near = w * (1.0 + torch.linalg.lstsq(rows, right[:, None]).solution[:, 0])
    solutions = []
    for ridge in RIDGES:
        root = (ridge * n * variances).sqrt()
        rows = torch.cat([uc, torch.diag(root)])
        right = torch.cat([tc, root[:, None] * near.T])
        solutions.append(torch.linalg.lstsq(rows, right).solution.T)
    distances = [float((s - fit.weight[0]).abs().max()) for s in solutions]
    assert min(distances) < 1e-4

    def error(w: Tensor) -> float:
        return float((tc - uc @ w.T).square().mean())

    assert error(fit.weight[0]) < 0.9 * error(weight[0])  # better than the float weights


def test_few_samples_find_the_noisy_inputs() -> None:
    """Half of the inputs are mostly noise. Samples too few for a regression tell that these deserve small weights."""
    d, n = 64, 60
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(1, 100, d, generator=generator).double()
    noise = torch.cat([torch.full((d // 2,), 3.0), torch.zeros(d // 2)])

    def data(count: int) -> tuple[Tensor, Tensor]:
        x = torch.randn(count, d, generator=generator)
        return x + noise * torch.randn(count, d, generator=generator), x @ weight[0].T.float()

    u, t = data(n)
    fit = fit_weights(weight, halves_of(u, t)).weight[0]
    test_u, test_t = (v.double() for v in data(4000))

    def error(w: Tensor) -> float:
        return float((test_t - test_u @ w.T).square().mean())

    float_error = error(weight[0])
    best = torch.linalg.lstsq(test_u, test_t).solution.T
    assert error(fit) < error(best) + 0.3 * (float_error - error(best))


def test_units_of_the_inputs_do_not_matter() -> None:
    u = correlated(500, 5)
    weight = torch.randn(1, 3, 5, generator=torch.Generator().manual_seed(1)).double()
    t = (u + torch.randn(u.shape, generator=torch.Generator().manual_seed(2))) @ weight[0].T.float()
    units = torch.tensor([1.0, 2.0, 0.5, 1.5, 1.0])
    a, b = fit_weights(weight, halves_of(u, t)), fit_weights(weight / units, halves_of(u * units, t))
    torch.testing.assert_close(a.weight, b.weight * units, rtol=1e-2, atol=2e-3)  # but for the floor of the ridge


def test_few_samples_choose_a_larger_ridge() -> None:
    """So that the result stays closer to the float weights, and on other data no worse than these."""
    d = 64
    weight = torch.randn(1, 8, d, generator=torch.Generator().manual_seed(1)).double()

    def data(n: int, seed: int) -> tuple[Tensor, Tensor]:
        x = correlated(n, d, 0) if seed == 0 else correlated(n + 8000, d, 0)[-n:]
        u = x + 2.0 * torch.randn(x.shape, generator=torch.Generator().manual_seed(seed))
        return u, x @ weight[0].T.float()

    test_u, test_t = (v.double() for v in data(4000, 9))

    def error(w: Tensor) -> float:
        missing = test_t - test_u @ w.T
        return float((missing - missing.mean(0)).square().mean())

    moved, errors = {}, {}
    for n in (24, 4000):
        fit = fit_weights(weight, halves_of(*data(n, 0)))
        moved[n], errors[n] = float((fit.weight - weight).norm()), error(fit.weight[0])
    assert moved[24] < moved[4000]
    assert errors[4000] < errors[24] < 1.02 * error(weight[0])


@pytest.mark.parametrize("kind", ["dead", "constant", "twins", "all dead", "one sample"])
def test_singular_inputs(kind: str) -> None:
    u = correlated(400, 6)
    weight = torch.randn(1, 3, 6, generator=torch.Generator().manual_seed(1)).double()
    if kind == "dead":
        u[:, 2] = 0.0
    elif kind == "constant":
        u[:, 2] = 7.0
    elif kind == "twins":
        u[:, 2] = u[:, 3]
    elif kind == "all dead":
        u[:] = 0.0
    t = u @ weight[0].T.float()
    halves = halves_of(u, t)
    if kind == "one sample":
        single = Moments.of(u[None, :1], t[None, :1])
        halves = (single, single)
    fit = fit_weights(weight, halves)
    assert bool(torch.isfinite(fit.weight).all() and torch.isfinite(fit.covariance).all())
    if kind != "twins":
        torch.testing.assert_close(fit.weight, weight, rtol=2e-2, atol=2e-2)
    u = u.double() - u.double().mean(0)
    torch.testing.assert_close(u @ fit.weight[0].T, u @ weight[0].T, rtol=1e-2, atol=2e-2)


# --- rounding ---------------------------------------------------------------------------------------------------


def problem(groups: int, rows: int, d: int, seed: int = 0, common: float = 1.5) -> tuple[Tensor, Tensor]:
    """Return weights [G, R, d] and a covariance [G, d, d] of inputs that have a part in common."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(groups, d, 2 * d, generator=generator, dtype=torch.float64)
    mix += common * torch.randn(groups, 1, 2 * d, generator=generator, dtype=torch.float64)
    weight = torch.randn(groups, rows, d, generator=generator, dtype=torch.float64)
    return weight, mix @ mix.mT / d


def errors(q: QuantizedWeight, weight: Tensor, covariance: Tensor) -> Tensor:
    """Return (w - w*) H (w - w*)ᵀ [G, R], in float64."""
    codes = q.codes.double().view(weight.shape)
    scale, offset = (p.double().view(*weight.shape[:2], 1) for p in (q.scale, q.offset))
    difference = (codes + offset) * scale - weight
    return ((difference @ covariance) * difference).sum(-1)


def bits_of(count: int, value: int) -> Tensor:
    return torch.full((count,), value, dtype=torch.uint8)


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("rounding", ROUNDINGS)
def test_codes_and_offsets_fit_an_int8(rounding: str, bits: int) -> None:
    weight, covariance = problem(2, 8, 20)
    weight[0, 0] = weight[0, 0].abs()  # one-sided rows
    weight[0, 1] = -weight[0, 1].abs()
    weight[0, 2] = 0.0
    q = round_for_output(weight, bits_of(16, bits), covariance, rounding)
    assert q.codes.dtype == torch.uint8
    assert int(q.codes.max()) < 2**bits
    assert bool((q.scale > 0).all() and torch.isfinite(q.scale).all())
    integer = (q.codes.double() + q.offset.double()[:, None]) * 2.0 ** max(7 - bits, 0)
    assert torch.equal(integer, integer.round())
    assert int(integer.min()) >= -128
    assert int(integer.max()) <= 127
    if bits == 8:
        assert q.offset.unique().tolist() == [-128.0]
    nearest = round_to_nearest(weight.flatten(0, 1).float(), bits_of(16, bits))
    assert bits < 8 or nearest.offset.unique().tolist() == [-128.0]


def test_bits_of_each_row_are_its_own() -> None:
    weight, covariance = problem(1, 8, 40)
    weight[:] = weight[:, :1]
    bits = torch.arange(1, 9, dtype=torch.uint8)
    found = errors(round_for_output(weight, bits, covariance, "descent"), weight, covariance)[0]
    relative = found / ((weight @ covariance) * weight).sum(-1)[0]
    assert bool((relative[1:] < 0.6 * relative[:-1]).all())
    for i in range(8):
        alone = round_for_output(weight[:, i : i + 1], bits[i : i + 1], covariance, "descent")
        torch.testing.assert_close(errors(alone, weight[:, i : i + 1], covariance)[0, 0], found[i], rtol=0.05, atol=0)


@pytest.mark.parametrize("bits", [2, 3, 4, 6, 8])
@pytest.mark.parametrize("d", [9, 70, 200])  # below, above and far above the width of a block
@pytest.mark.parametrize("common", [0.0, 1.5])
def test_each_rounding_improves_on_the_one_before(common: float, d: int, bits: int) -> None:
    weight, covariance = problem(1, 12, d, common=common)
    nearest, compensated, descent = (
        errors(round_for_output(weight, bits_of(12, bits), covariance, r), weight, covariance) for r in ROUNDINGS
    )
    assert float(compensated.sum()) < 0.8 * float(nearest.sum())
    assert float(descent.sum()) <= (1 + 1e-6) * float(compensated.sum())
    plain = errors(round_to_nearest(weight[0].float(), bits_of(12, bits)), weight, covariance)
    assert float(descent.sum()) < (0.6 if common else 0.75) * float(plain.sum())


def test_descent_goes_on_where_compensation_stops() -> None:
    """Where inputs have little in common: elsewhere no single code can change without the others."""
    weight, covariance = problem(1, 64, 40, common=0.0)
    compensated, descent = (
        errors(round_for_output(weight, bits_of(64, 3), covariance, r), weight, covariance) for r in ROUNDINGS[1:]
    )
    assert float(descent.sum()) < 0.97 * float(compensated.sum())


@pytest.mark.parametrize("seed", range(4))
def test_descent_is_near_the_best_codes(seed: int) -> None:
    """All codes of three inputs and two bits, each with the best scale of a fine grid and every offset."""
    weight, covariance = problem(1, 6, 3, seed)
    q = round_for_output(weight, bits_of(6, 2), covariance, "descent")
    found = errors(q, weight, covariance)[0]
    codes = torch.tensor(list(itertools.product(range(4), repeat=3)), dtype=torch.float64)
    best = torch.full((6,), torch.inf, dtype=torch.float64)
    for offset in torch.arange(-3.0, 0.01, 2.0**-5, dtype=torch.float64):
        v = codes + offset  # the best scale of each in closed form
        scale = (v @ covariance[0] @ weight[0].T) / ((v @ covariance[0]) * v).sum(-1, keepdim=True).clamp_min(1e-30)
        scale = scale.clamp_min(0.0)
        difference = scale[:, :, None] * v[:, None, :] - weight[0]
        best = torch.minimum(best, ((difference @ covariance[0]) * difference).sum(-1).amin(0))
    assert bool((found >= best - 1e-6).all())
    energy = ((weight[0] @ covariance[0]) * weight[0]).sum(-1)
    # A local search; where the best leaves next to nothing, near it is near in the energy of the row.
    assert float((found - best).sum()) < 0.03 * float(energy.sum())
    assert float(((found - best) / energy).max()) < 0.12


def test_uncorrelated_inputs_are_rounded_to_nearest() -> None:
    weight, _ = problem(1, 5, 30)
    identity = torch.eye(30, dtype=torch.float64)[None]
    q = round_for_output(weight, bits_of(5, 4), identity, "nearest")
    nearest = ((weight[0] / q.scale[:, None].double()).round() - q.offset[:, None]).round().clamp(0, 15)
    close = (weight[0] / q.scale[:, None].double() - q.offset[:, None]).clamp(0, 15)
    assert bool(((q.codes.double() - close).abs() <= 0.5 + 1e-5).all())
    assert nearest.shape == q.codes.shape
    descent = errors(round_for_output(weight, bits_of(5, 4), identity, "descent"), weight, identity)
    assert float(descent.sum()) <= float(errors(q, weight, identity).sum()) + 1e-9


@pytest.mark.parametrize("rounding", ROUNDINGS)
def test_dead_inputs_and_rows(rounding: str) -> None:
    weight, covariance = problem(1, 6, 12)
    covariance[:, 4, :] = covariance[:, :, 4] = 0.0
    covariance[:, 7, :] = covariance[:, :, 7] = 0.0
    weight[0, :, 7] *= 40.0  # large weights of an input that never varies
    weight[0, 3] = 0.0
    q = round_for_output(weight, bits_of(6, 4), covariance, rounding)
    assert bool(torch.isfinite(q.values()).all())
    assert float(errors(q, weight, covariance)[0, 3]) < 1e-9
    energy = ((weight @ covariance) * weight).sum(-1)
    live = [0, 1, 2, 4, 5]
    relative = (errors(q, weight, covariance) / energy)[0, live]
    assert bool((relative < 0.05).all()), relative
    zero = round_for_output(weight, bits_of(6, 4), torch.zeros_like(covariance), rounding)
    assert bool(torch.isfinite(zero.values()).all())


@pytest.mark.parametrize("rounding", ROUNDINGS)
def test_groups_are_problems_of_their_own(rounding: str) -> None:
    weight, covariance = problem(3, 4, 10)
    together = round_for_output(weight, bits_of(12, 3), covariance, rounding)
    for g in range(3):
        alone = round_for_output(weight[g : g + 1], bits_of(4, 3), covariance[g : g + 1], rounding)
        torch.testing.assert_close(together.values()[4 * g : 4 * g + 4], alone.values(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("rounding", ROUNDINGS)
def test_rounding_is_deterministic(rounding: str) -> None:
    weight, covariance = problem(2, 8, 80)
    a, b = (round_for_output(weight, bits_of(16, 4), covariance, rounding) for _ in range(2))
    assert torch.equal(a.codes, b.codes)
    assert torch.equal(a.scale, b.scale)
    assert torch.equal(a.offset, b.offset)
