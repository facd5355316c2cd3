"""Raising layers to more bits: what parts cost, the path through them, the search, and what quantize() gives."""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

import ptq4cuda
from ptq4cuda import QuantConfig, pipeline, quantize
from ptq4cuda.artifact.record import LayerRecord, QuantRecord, record_of
from ptq4cuda.calibrate.inputs import Inputs
from ptq4cuda.calibrate.prepare import prepare
from ptq4cuda.metrics import Measure, Noise
from ptq4cuda.solve.budget import Shares
from ptq4cuda.solve.raising import Part, marks_of, measure_parts, overrides_of, path_of, search
from small_networks import Deep, Writes

PER_TENSOR = replace(QuantConfig.naive(), activation_granularity="per_tensor", execution="simulate")
FAST = QuantConfig.fast(execution="simulate")
WIDE = "layers.2"  # its input has the wide channel
UNREACHED = "ignore:ptq4cuda.*best that was found"


def bits(network: nn.Module) -> dict[str, tuple[float | None, float | None]]:
    return {r.name: (r.weight_bits, r.activation_bits) for r in record_of(network).layers}


def least(network: nn.Module) -> float:
    found = record_of(network).least_sqnr
    assert found is not None
    return found


def kept_energy(model: nn.Module, images: Tensor) -> Callable[[nn.Module], float]:
    """Return a measure: 100, less the percentage that the noise is of the energy of the float output."""
    with torch.no_grad():
        expected = model(images)

    def evaluate(network: nn.Module) -> float:
        return 100.0 - 100.0 * float((network(images) - expected).square().sum() / expected.square().sum())

    return evaluate


# --- damage -----------------------------------------------------------------------------------------------------


def parts_of(model: nn.Module, images: Tensor, config: QuantConfig, match: bool) -> tuple[list[Part], nn.Module]:
    network = quantize(model, [images], replace(config, execution="simulate"), progress=False)
    inputs = Inputs([((images,), {})])
    reference, _, _ = prepare(model, inputs, config)
    before = copy.deepcopy(reference.state_dict())
    parts = measure_parts(reference, network, inputs, match)
    assert all(torch.equal(v, before[k]) for k, v in reference.state_dict().items())  # as it was
    with torch.no_grad():
        torch.testing.assert_close(reference(images), model(images))
    return parts, network


def test_damage_finds_the_bad_layer(images: Tensor) -> None:
    bad = {"layers.3": {"weight_bits": 1}, "layers.4": {"activation_bits": 1}}
    parts, network = parts_of(Deep(bad=None).eval(), images, replace(PER_TENSOR, overrides=bad), False)
    for kind, worst in (("weight_bits", "layers.3"), ("activation_bits", "layers.4")):
        own = [part for part in parts if part.kind == kind]
        assert [part.layers for part in own] == [(name,) for name in bits(network)]
        own.sort(key=lambda part: -part.damage)
        assert own[0].layers == (worst,) and own[0].bits == 1
        assert own[0].damage > 3 * own[1].damage


def test_damage_is_the_noise_with_weights_or_input_alone_quantized(images: Tensor) -> None:
    model = Deep(bad=None).eval()
    parts, network = parts_of(model, images, QuantConfig.naive(), False)
    quantized: Any = network.get_submodule("layers.3")
    alone = {"weight_bits": copy.deepcopy(model), "activation_bits": copy.deepcopy(model)}
    alone["weight_bits"].layers[3].weight.data = quantized.dequantized_weight()
    alone["activation_bits"].layers[3].register_forward_pre_hook(
        lambda _, args: (quantized.activation.fake_quantize(args[0]),)
    )
    found = [part for part in parts if part.layers == ("layers.3",)]
    assert len(found) == 2
    for part in found:
        noise = Noise()
        with torch.no_grad():
            noise.add(model(images), alone[part.kind](images))
        assert part.damage == pytest.approx(noise.noise / noise.signal, rel=1e-3)
        assert (part.weights, part.products) == (576 if part.kind == "weight_bits" else 0, 576 * 144)


def test_what_a_bias_corrects_is_no_damage() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 4, 1), nn.Conv2d(4, 4, 1), nn.Conv2d(4, 2, 1)).eval()
    images = 100.0 + torch.randn(8, 1, 6, 6)  # nearly constant: what rounding does is a shift
    damage = []
    for match in (False, True):
        parts, _ = parts_of(model, images, QuantConfig.naive(), match)
        damage.append(sum(part.damage for part in parts if part.kind == "weight_bits"))
    assert damage[1] < 0.01 * damage[0]


class Branches(nn.Module):
    """Two layers read one tensor."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem, self.a, self.b, self.end = (nn.Conv2d(c, 8, 3, padding=1) for c in (3, 8, 8, 8))

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.stem(x))
        return self.end(F.relu(self.a(x)) + F.relu(self.b(x)))


def test_layers_that_share_a_quantizer_are_one_part(images: Tensor) -> None:
    parts, _ = parts_of(Branches().eval(), images, QuantConfig.fast(), True)
    inputs = [part for part in parts if part.kind == "activation_bits"]
    assert [set(part.layers) for part in inputs] == [{"stem"}, {"a", "b"}, {"end"}]
    assert inputs[1].products == 2 * 576 * 144
    path = path_of(parts, QuantConfig(overrides={"a": {"weight_bits": 4}}))
    assert {step.part.layers for step in path if step.part.kind == "activation_bits"} == {("b",)}
    assert overrides_of(path) == {"b": {"weight_bits": 8, "activation_bits": 8}}


# --- the path ---------------------------------------------------------------------------------------------------


def some_parts(seed: int, count: int, starts: tuple[int, ...] = (4,)) -> list[Part]:
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.rand(count, 2, 3, generator=generator, dtype=torch.float64)
    parts = []
    for i, layer in enumerate(drawn.tolist()):
        for kind, (damage, weights, products) in zip(("weight_bits", "activation_bits"), layer, strict=True):
            start = starts[i % len(starts)]
            numbers = int(1e4 * weights) if kind == "weight_bits" else 0, int(1e6 * products)
            parts.append(Part(kind, (f"layer{i}",), start, damage**6, *numbers))  # type: ignore[arg-type]
    return parts


@given(st.integers(0, 1000), st.integers(1, 40))
def test_the_path_rises_by_what_pays_most(seed: int, count: int) -> None:
    parts = some_parts(seed, count, (4, 2, 6, 8, 5))
    path = path_of(parts, QuantConfig())
    paying = [step.gain / max(step.price, 1e-12) for step in path]
    assert paying == sorted(paying, reverse=True)
    reached = {(part.kind, part.layers): part.bits for part in parts}
    for step in path:
        assert step.gain >= 0.0 and step.price > 0.0
        assert reached[step.part.kind, step.part.layers] < step.bits
        reached[step.part.kind, step.part.layers] = step.bits
    assert set(reached.values()) == {8}
    left = sum(part.damage for part in parts) - sum(step.gain for step in path)
    assert left == pytest.approx(sum(part.damage * 4.0 ** (part.bits - 8) for part in parts))


@given(st.integers(0, 1000), st.integers(1, 40), st.floats(0.0, 2.0))
def test_what_does_not_fit_is_left_out(seed: int, count: int, share: float) -> None:
    parts = some_parts(seed, count)
    whole = path_of(parts, QuantConfig())
    room = math.floor(share * sum(step.bytes for step in whole))
    path = path_of(parts, QuantConfig(), room)
    assert sum(step.bytes for step in path) <= room
    if share >= 1.0:
        assert path == whole
    reached: set[tuple[str, tuple[str, ...]]] = set()
    for step in path:  # no 8 bits for what had no room for 6
        key = step.part.kind, step.part.layers
        assert step.bits == (8 if key in reached else 6)
        reached.add(key)


@given(st.integers(0, 1000), st.integers(1, 60))
def test_marks_are_a_decibel_apart(seed: int, count: int) -> None:
    parts = some_parts(seed, count)
    path, damage = path_of(parts, QuantConfig()), sum(part.damage for part in parts)
    marks = marks_of(path, damage)
    assert marks == sorted(set(marks)) and marks[-1] == len(path)
    assert len(marks) <= 25  # whatever the number of layers: 4 more bits are 24 dB
    left = list(itertools.accumulate((step.gain for step in path), lambda a, b: a - b, initial=damage))
    fallen = [10.0 * math.log10(damage / left[length]) for length in marks]
    assert all(math.floor(b) > math.floor(a) for a, b in itertools.pairwise(fallen[:-1]))


def test_a_path_without_steps_has_no_marks() -> None:
    assert marks_of(path_of(some_parts(0, 3, (8,)), QuantConfig()), 1.0) == []
    harmless = [replace(part, damage=0.0) for part in some_parts(0, 3)]
    assert marks_of(path_of(harmless, QuantConfig()), 0.0) == [12]


# --- the search -------------------------------------------------------------------------------------------------

EXCESS = st.one_of(st.floats(-40.0, 40.0), st.sampled_from([math.inf, -math.inf]))


@given(
    st.lists(EXCESS, min_size=1, max_size=70), st.one_of(st.floats(0.0, 40.0, exclude_min=True), st.just(math.inf))
)
def test_search_ends_at_what_will_do_after_few_tries(drawn: list[float], first: float) -> None:
    for excess in (
        sorted(drawn, reverse=True),
        drawn,
    ):  # as it should be, and a measure that does not follow the noise
        tries: list[int] = []

        def ask(number: int, excess: list[float] = excess, tries: list[int] = tries) -> float:
            tries.append(number)
            return excess[number - 1]

        found = search(ask, first, len(excess))
        assert len(tries) == len(set(tries)) <= 2 * math.ceil(math.log2(len(excess))) + 2
        if found is None:
            assert len(excess) in tries
            assert excess[-1] > 0.0
        else:
            assert found in tries and excess[found - 1] <= 0.0
            # One step less would not do, or this is hardly better than it need be.
            assert excess[found - 1] > -1.0 or found == 1 or (found - 1 in tries and excess[found - 2] > 0.0)


@pytest.mark.parametrize("wanted", [1, 2, 7, 13, 24])
def test_search_goes_where_decibels_say(wanted: int) -> None:
    tries: list[int] = []

    def excess(number: int) -> float:
        tries.append(number)
        return wanted - number - 0.5

    assert search(excess, wanted - 0.5, 24) == wanted
    assert tries == [wanted]


# --- a target ---------------------------------------------------------------------------------------------------


def test_target_is_met_by_raising_the_worst_layers(images: Tensor) -> None:
    model = Deep().eval()
    plain = quantize(model, [images], PER_TENSOR, progress=False)
    start = least(plain)
    network = quantize(model, [images], replace(PER_TENSOR, target_sqnr=start + 4.0), progress=False)
    record = record_of(network)
    assert least(network) >= start + 4.0
    assert record.config.target_sqnr == start + 4.0
    assert record.config.overrides == {}
    with torch.no_grad():
        noise = Noise()
        noise.add(model(images), network(images), len(images))
    assert noise.sqnr == pytest.approx(record.sqnr, abs=0.05)
    assert noise.least_sqnr == pytest.approx(record.least_sqnr, abs=0.05)
    # The trade: from nothing raised to the end, each step more bits, no fewer bytes.
    first, last = record.trade[0], record.trade[-1]
    assert (first.raised, first.least_sqnr, first.bytes) == ((), start, record_of(plain).bytes)
    assert (last.sqnr, last.least_sqnr, last.bytes) == (record.sqnr, record.least_sqnr, record.bytes)
    assert last.raised[0] == WIDE
    for a, b in itertools.pairwise(record.trade):
        assert len(a.raised) <= len(b.raised) and a.bytes <= b.bytes and a.bit_operations < b.bit_operations
        for name, own in a.bits.items():
            assert all(b.bits[name][kind] >= number for kind, number in own.items())
    before, found = bits(plain), bits(network)
    for name in found:
        own = last.bits.get(name, {})
        assert found[name] == (own.get("weight_bits", before[name][0]), own.get("activation_bits", before[name][1]))
    assert all(layer.weight_damage is not None and layer.input_damage is not None for layer in record.layers)
    text = str(ptq4cuda.report(network))
    assert f"Raised to 6 and 8 bits, worst first ({record.tried} networks tried):" in text
    assert f"{len(last.raised)} layers raised: {record.sqnr:.1f} dB, {record.bytes:,} bytes" in text
    assert "the last step, +" in text and WIDE in text.split("Raised")[1]


def test_a_target_that_is_met_already_raises_nothing(images: Tensor) -> None:
    network = quantize(Deep(bad=None).eval(), [images], QuantConfig(target_sqnr=1.0), progress=False)
    assert [step.raised for step in record_of(network).trade] == [()]
    assert record_of(network).tried == 1


def test_a_target_out_of_reach_is_said(images: Tensor) -> None:
    with pytest.warns(UserWarning, match=r"output SQNR is .* dB, and was to be 90: this is the best that was found"):
        network = quantize(Deep(bad=None).eval(), [images], QuantConfig.naive(target_sqnr=90.0), progress=False)
    assert set(record_of(network).trade[-1].raised) == {f"layers.{i}" for i in range(1, 6)}
    assert set(bits(network).values()) == {(8.0, 8.0)}
    assert "Not reached: the output SQNR is" in str(ptq4cuda.report(network))


class Heads(nn.Module):
    """Two outputs of which one is far larger than the other."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem, self.middle = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3)
        self.boxes, self.score = nn.Conv2d(8, 4, 1), nn.Conv2d(8, 1, 1)
        with torch.no_grad():
            self.boxes.weight *= 100.0
            self.boxes.bias += 500.0

    def forward(self, x: Tensor) -> dict[str, Any]:
        x = F.relu(self.middle(F.relu(self.stem(x))))
        return {"boxes": self.boxes(x), "scores": [self.score(x)]}


def test_a_target_holds_for_every_output_and_the_median_sample(images: Tensor) -> None:
    model = Heads().eval()
    network = quantize(model, [images[:24], images[24:]], QuantConfig.naive(target_sqnr=28.0), progress=False)
    record = record_of(network)
    assert record.trade[0].sqnr is not None and record.trade[0].sqnr > 28.0  # all outputs together were as asked
    assert len(record.trade) > 1
    assert {output.name for output in record.outputs} == {"boxes", "scores.0"}
    with torch.no_grad():
        expected, found = model(images), network(images)
    for output in record.outputs:
        noise = Noise()
        values = [(x["boxes"] if output.name == "boxes" else x["scores"][0]) for x in (expected, found)]
        noise.add(*values, len(images))
        assert noise.sqnr is not None and noise.median_sqnr is not None
        assert min(noise.sqnr, noise.median_sqnr) >= 27.95
        assert output.sqnr == pytest.approx(noise.sqnr, abs=0.05)
        assert output.median_sqnr == pytest.approx(noise.median_sqnr, abs=0.05)
        assert f"{output.name} {output.sqnr:.1f} (median {output.median_sqnr:.1f})" in str(ptq4cuda.report(network))
    assert "worst output" in str(ptq4cuda.report(network))


def test_layers_are_judged_on_batches_that_they_are_not_fitted_to(images: Tensor) -> None:
    model, batches = Deep().eval(), list(images.split(15))  # the last has 3
    start = least(quantize(model, batches, QuantConfig(size_budget=0.01), progress=False))
    network = quantize(model, batches, QuantConfig(target_sqnr=start + 3.0), progress=False)
    record = record_of(network)
    assert (record.images, record.held_out) == (33, 15)
    noise = Noise()
    with torch.no_grad():
        noise.add(model(batches[2]), network(batches[2]), 15)
    assert noise.least_sqnr == pytest.approx(record.least_sqnr, abs=0.05)
    assert record.trade[0].least_sqnr == start and least(network) >= start + 3.0
    assert "on 15 samples held out, beside 33 of calibration" in str(ptq4cuda.report(network))
    fitted = quantize(
        model, batches[:2] + batches[3:], QuantConfig(overrides=record.trade[-1].bits), progress=False
    ).state_dict()
    state = network.state_dict()
    assert all(torch.equal(fitted[key], state[key]) for key in state)


# --- a size -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("share", [0.2, 0.25, 0.3])
def test_size_budget_is_kept_to(images: Tensor, share: float) -> None:
    model = Deep().eval()
    plain = record_of(quantize(model, [images], PER_TENSOR, progress=False))
    record = record_of(quantize(model, [images], replace(PER_TENSOR, size_budget=share), progress=False))
    assert record.bytes <= max(share * record.float_bytes, plain.bytes)
    wider = [name for name, own in record.trade[-1].bits.items() if "weight_bits" in own]
    if share * record.float_bytes > plain.bytes + 150:  # there is room for 2 bits of one of these layers' 576 weights
        assert record.sqnr is not None and plain.sqnr is not None
        assert record.sqnr > plain.sqnr
        if record.bytes < plain.bytes + 5 * 288:
            assert record.bytes + 150 > share * record.float_bytes  # and none for another
    assert bool(wider) == (share * record.float_bytes > plain.bytes + 150)


def test_a_budget_that_is_too_small_is_reported(images: Tensor) -> None:
    for share, too_small in ((0.01, True), (1, False)):
        network = quantize(Deep().eval(), [images], replace(PER_TENSOR, size_budget=share), progress=False)
        assert ("is too small for this configuration" in str(ptq4cuda.report(network))) == too_small
        assert bool(record_of(network).trade[-1].raised) == (not too_small)


@pytest.mark.filterwarnings(UNREACHED)
def test_budget_limits_what_a_target_asks_for(images: Tensor) -> None:
    model = Deep().eval()
    config = replace(PER_TENSOR, target_sqnr=90.0)
    unlimited = record_of(quantize(model, [images], config, progress=False))
    share = (unlimited.trade[0].bytes + unlimited.bytes) / 2 / unlimited.float_bytes
    limited = record_of(quantize(model, [images], replace(config, size_budget=share), progress=False))
    assert limited.trade[-1].raised
    assert unlimited.trade[0].bytes < limited.bytes <= share * limited.float_bytes < unlimited.bytes
    assert "within size_budget" in limited.shortfall


def test_overridden_layers_are_not_raised(images: Tensor) -> None:
    config = replace(PER_TENSOR, target_sqnr=90.0, overrides={WIDE: {"weight_bits": 4, "activation_bits": 4}})
    with pytest.warns(UserWarning, match="every layer that may be raised"):
        network = quantize(Deep().eval(), [images], config, progress=False)
    assert WIDE not in record_of(network).trade[-1].raised
    assert bits(network)[WIDE] == (4.0, 4.0)


@pytest.mark.filterwarnings(UNREACHED)
def test_raising_layers_leaves_the_batches_as_they_are() -> None:
    images = torch.rand(4, 3, 12, 12)
    batches = [images.clone(), images.clone()]
    network = quantize(Writes().eval(), batches, QuantConfig.fast(target_sqnr=60.0), progress=False)
    assert record_of(network).walked_by == "modules" and len(record_of(network).trade) > 1
    assert all(torch.equal(batch, images) for batch in batches)


# --- a user's measure -------------------------------------------------------------------------------------------


def test_a_measure_decides(images: Tensor) -> None:
    model, held_out = Deep().eval(), torch.randn(16, 3, 12, 12, generator=torch.Generator().manual_seed(2))
    evaluate = kept_energy(model, held_out)
    seen: list[float] = []

    def counted(network: nn.Module) -> float:
        assert not network.training and not torch.is_grad_enabled()
        seen.append(evaluate(network))
        return seen[-1]

    counts = []
    for max_drop in (0.1, 0.03, 0.01):
        seen.clear()
        network = quantize(model, [images], FAST, evaluate=counted, max_drop=max_drop, progress=False)
        record = record_of(network)
        counts.append(len(seen))
        assert len(seen) == 1 + record.tried <= 4 + 2 * math.ceil(math.log2(25))
        last = record.trade[-1]
        assert last.value in seen and last.value >= 100.0 - max_drop
        assert last.value == pytest.approx(evaluate(network))
        assert (record.float_value, record.max_drop) == (100.0, max_drop)
        assert record.trade[0].value is not None and record.trade[0].value < 100.0 - max_drop
        assert record.trade[0].raised == () and last.raised
        assert not record.shortfall
        assert f"the float model's measure is 100, {max_drop:g} less will do" in str(ptq4cuda.report(network))
        assert f"measure {last.value:.6g}" in str(ptq4cuda.report(network))
    assert sum(counts) <= 18  # far fewer: decibels tell


def test_a_measure_that_is_met_is_asked_twice(images: Tensor) -> None:
    model, calls = Deep(bad=None).eval(), []

    def evaluate(network: nn.Module) -> float:
        calls.append(network)
        return 1.0

    network = quantize(model, [images], QuantConfig.fast(), evaluate=evaluate, progress=False)
    assert len(calls) == 2 and calls[0] is model and calls[1] is network
    assert record_of(network).tried == 1


def test_a_measure_out_of_reach_is_said(images: Tensor) -> None:
    model = Deep().eval()
    evaluate = kept_energy(model, images)

    def demanding(network: nn.Module) -> float:
        return 101.0 if network is model else evaluate(network)

    with pytest.warns(UserWarning, match=r"below that of the float model \(101\).*best that was found") as caught:
        network = quantize(model, [images], PER_TENSOR, evaluate=demanding, max_drop=0.5, progress=False)
    assert len(caught) == 1
    record = record_of(network)
    assert record.tried <= 2 * math.ceil(math.log2(25)) + 3
    assert set(bits(network).values()) == {(8.0, 8.0)}  # the best of them
    assert "Not reached: the measure is" in str(ptq4cuda.report(network))
    with pytest.warns(UserWarning, match="the measure is .*; the output SQNR is "):
        config = replace(PER_TENSOR, target_sqnr=99.0)
        quantize(model, [images], config, evaluate=demanding, max_drop=0.5, progress=False)


def test_a_measure_and_a_target_both_hold(images: Tensor) -> None:
    model = Deep().eval()
    evaluate = kept_energy(model, images)
    work = []
    for target, max_drop in ((None, 0.2), (34.0, 50.0), (34.0, 0.01)):
        config = replace(FAST, target_sqnr=target)
        network = quantize(model, [images], config, evaluate=evaluate, max_drop=max_drop, progress=False)
        assert not record_of(network).shortfall
        assert evaluate(network) >= 100.0 - max_drop
        assert target is None or least(network) >= target
        work.append(record_of(network).trade[-1].bit_operations)
    assert work == sorted(set(work))


@pytest.mark.parametrize("config", [PER_TENSOR, QuantConfig()], ids=["naive", "default"])
def test_same_file_twice(images: Tensor, tmp_path: Path, config: QuantConfig) -> None:
    model = Deep().eval()
    start = least(quantize(model, [images], config, progress=False))
    config = replace(config, target_sqnr=start + 3.0)
    contents = []
    for name in ("a", "b"):
        evaluate = kept_energy(model, images)
        network = quantize(model, [images], config, evaluate=evaluate, max_drop=20.0, progress=False)
        assert record_of(network).trade[-1].raised
        ptq4cuda.save(network, tmp_path / name)
        contents.append((tmp_path / name).read_bytes())
        loaded = ptq4cuda.load(tmp_path / name, Deep())
        for field in ("trade", "tried", "float_value", "max_drop", "least_sqnr", "layers"):
            assert getattr(record_of(loaded), field) == getattr(record_of(network), field)
        with torch.no_grad():
            assert torch.equal(loaded(images), network(images))
    assert contents[0] == contents[1]


def test_layers_before_the_first_that_is_raised_are_solved_once(
    images: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    solved: list[str] = []
    solve_layer = pipeline.solve_layer

    def counted(call: Any, config: QuantConfig) -> Any:
        solved.append(call.name)
        return solve_layer(call, config)

    model = Deep(bad=None).eval()
    eight = {f"layers.{i}": {"weight_bits": 8, "activation_bits": 8} for i in range(4)}
    config = QuantConfig.fast(overrides=eight)
    start = least(quantize(model, [images], config, progress=False))
    monkeypatch.setattr(pipeline, "solve_layer", counted)
    shares_of = pipeline.shares_of

    def not_counted(*args: Any) -> Shares:  # the quick networks that say which steps help
        shares = shares_of(*args)
        solved.clear()
        return shares

    monkeypatch.setattr(pipeline, "shares_of", not_counted)
    network = quantize(model, [images], replace(config, target_sqnr=start + 3.0), progress=False)
    record = record_of(network)
    assert record.tried >= 2 and not record.shortfall
    for i in range(4):
        assert solved.count(f"layers.{i}") == 1
    assert solved.count("fc") == record.tried
    # What was solved once is what would be solved again.
    monkeypatch.undo()
    fixed = replace(config, overrides={**eight, **record.trade[-1].bits})
    again = quantize(model, [images], fixed, progress=False).state_dict()
    state = network.state_dict()
    assert again.keys() == state.keys()
    assert all(torch.equal(again[key], state[key]) for key in state)


@pytest.mark.parametrize(
    ("returned", "error", "sentence"),
    [
        (torch.tensor(1.0), TypeError, r"evaluate returned a tensor of shape \[\] for the float model"),
        ("good", TypeError, "evaluate returned str for the float model, not a number"),
        (None, TypeError, "evaluate returned NoneType"),
        (True, TypeError, "evaluate returned bool"),
        (math.nan, ValueError, "evaluate returned nan for the float model: where a measure is not defined"),
        (math.inf, ValueError, "evaluate returned inf"),
    ],
)
def test_measures_that_are_refused(images: Tensor, returned: Any, error: type[Exception], sentence: str) -> None:
    with pytest.raises(error, match=sentence):
        quantize(Deep().eval(), [images], evaluate=lambda _: returned, progress=False)


def test_a_measure_that_fails_is_told_apart(images: Tensor) -> None:
    model = Deep(bad=None).eval()

    def fails(network: nn.Module) -> float:
        raise KeyError("labels")

    def fails_later(network: nn.Module) -> float:
        return 1.0 if network is model else network.conv1.weight  # type: ignore[return-value]

    with pytest.raises(ValueError, match=r"evaluate fails on the float model \(KeyError: 'labels'\)"):
        quantize(model, [images], evaluate=fails, progress=False)
    with pytest.raises(ValueError, match=r"evaluate fails on a quantized network \(AttributeError: .*conv1"):
        quantize(model, [images], QuantConfig.fast(), evaluate=fails_later, progress=False)
    with pytest.raises(TypeError, match="evaluate must be a function of a network, got float"):
        quantize(model, [images], evaluate=1.0, progress=False)  # type: ignore[arg-type]
    for max_drop in (-1.0, math.nan, math.inf, True, "0.5"):
        with pytest.raises(ValueError, match="max_drop must be a number from 0"):
            quantize(model, [images], evaluate=lambda _: 1.0, max_drop=max_drop, progress=False)  # type: ignore[arg-type]


def test_the_excess_of_a_measure_is_in_decibels_of_its_drop() -> None:
    measure = Measure(lambda _: 80.0, 0.5, nn.Identity())
    assert measure.excess(79.5) == pytest.approx(0.0)
    assert measure.excess(75.0) == pytest.approx(10.0)
    assert measure.excess(79.95) == pytest.approx(-10.0)
    assert measure.excess(80.0) == measure.excess(81.0) == -math.inf
    strict = Measure(lambda _: 80.0, 0.0, nn.Identity())
    assert strict.excess(80.0) == -math.inf and strict.excess(79.9) == math.inf


def test_files_of_before_have_one_damage_for_both_parts() -> None:
    layer = {"name": "conv", "kind": "Conv2d", "damage": 0.5}
    fields = {"config": {}, "layers": [layer], "trade": [{"raised": ["conv"], "sqnr": 1.0, "bytes": 3}]}
    record = QuantRecord.from_dict(fields)
    assert record.layers == [LayerRecord("conv", "Conv2d")]
    assert record.trade[0].raised == ("conv",) and record.trade[0].bits == {}
