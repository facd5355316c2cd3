"""How close a quantized network is to its float original."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from numbers import Real
from typing import Any

import torch
from torch import Tensor, nn

from ptq4cuda.containers import contents, named_contents
from ptq4cuda.errors import is_out_of_memory, kind_and_line, naming_failures
from ptq4cuda.processes import ALONE, Processes

_PIECE = 1 << 16  # values


@dataclass(frozen=True)
class Comparison:
    """A quantized classifier beside its float original.

    Attributes:
        images: number of images.
        float_top1: percent of images that the float network classifies right.
        top1: the same of the quantized network.
        agreement: percent of images to which both give the same class.
        sqnr: signal to quantization noise ratio of the logits in dB, inf where they are equal.
    """

    images: int
    float_top1: float
    top1: float
    agreement: float
    sqnr: float


class Noise:
    """Signal and noise energy of what a network returns: of each output, summed over chunks, and of each sample."""

    def __init__(self) -> None:
        # Of each chunk, by output: signal and noise, and the same of each sample, float64 [samples, 2].
        self._chunks: list[tuple[dict[str, tuple[float, float]], dict[str, Tensor]]] = []

    def merged(self, processes: Processes) -> Noise:
        """Return that of the chunks of all processes."""
        merged = Noise()
        merged._chunks = processes.gather(self._chunks)
        return merged

    def sum_up(self) -> None:
        """Let all chunks so far be one, of which nothing is known of samples: of many small ones little is held."""
        self._chunks = [(self._totals, {})]

    def add(self, expected: Any, found: Any, samples: int = 0) -> None:
        """Add a chunk; what is not a floating tensor is passed over.

        Args:
            expected: a tensor, or several in containers of any class.
            found: the same.
            samples: of a batch, to tell them apart: those tensors count that have one item for each.
        """
        self._chunks.append(({}, {}))
        self._add("", expected, found, samples)

    def _add(self, name: str, expected: Any, found: Any, samples: int) -> None:
        if isinstance(expected, Tensor) and expected.is_floating_point():
            totals, of_samples = self._chunks[-1]
            of_each = bool(samples) and expected.dim() > 0 and len(expected) == samples
            rows = zip(expected, found, strict=True) if of_each else [(expected, found)]
            own = torch.tensor([_energies(e, f) for e, f in rows], dtype=torch.float64, device="cpu").view(-1, 2)
            signal, noise = own.sum(0).tolist()
            totals[name] = signal, noise
            if of_each:
                of_samples[name] = own
        else:
            pairs = zip(named_contents(expected) or (), contents(found) or (), strict=True)
            for (key, e), f in pairs:
                self._add(f"{name}.{key}" if name else key, e, f, samples)

    @property
    def _totals(self) -> dict[str, tuple[float, float]]:
        """Signal and noise by output."""
        found: dict[str, tuple[float, float]] = {}
        for totals, _ in self._chunks:
            for name, (signal, noise) in totals.items():
                before = found.get(name, (0.0, 0.0))
                found[name] = before[0] + signal, before[1] + noise
        return found

    @property
    def signal(self) -> float:
        """The energy of the expected outputs, all together."""
        return sum(signal for signal, _ in self._totals.values())

    @property
    def noise(self) -> float:
        """The energy of what was found minus what was expected."""
        return sum(noise for _, noise in self._totals.values())

    @property
    def sqnr(self) -> float | None:
        """Signal to quantization noise ratio in dB; None without noise or signal, -inf where NaN or Inf was found."""
        return _sqnr(self.signal, self.noise)

    @property
    def relative(self) -> float:
        """Noise over signal, summed over the outputs, which count alike."""
        return sum(noise / signal for signal, noise in self._totals.values() if signal)

    @property
    def median_sqnr(self) -> float | None:
        """The same of the median sample."""
        return self._quantile(0.5)

    @property
    def worst_sqnr(self) -> float | None:
        """The same of the worst sample."""
        return self._quantile(0.0)

    @property
    def outputs(self) -> dict[str, tuple[float | None, float | None]]:
        """The SQNR of each output, of all samples and of the median one.

        An output is called by its keys, positions and attributes in what the network returns, as "boxes" or "1.0"; a
        single tensor by "".
        """
        return {name: (_sqnr(*total), self._quantile(0.5, name)) for name, total in self._totals.items()}

    @property
    def least_sqnr(self) -> float | None:
        """The least of all outputs, each with the lower of its SQNR over all samples and that of the median one."""
        found = [sqnr for pair in self.outputs.values() for sqnr in pair if sqnr is not None]
        return min(found, default=None)

    def _quantile(self, share: float, output: str | None = None) -> float | None:
        """Return the SQNR of a sample, in one output or in all together."""
        rows = [torch.zeros(0, 2, dtype=torch.float64, device="cpu")]
        for _, chunk in self._chunks:
            own = [sums for name, sums in chunk.items() if output in (None, name)]
            if own:
                rows.append(torch.stack(own).sum(0))
        signal, noise = torch.cat(rows).unbind(1)
        ratios = (signal / noise)[signal > 0]  # inf without noise
        if not len(ratios):
            return None
        ratio = float(ratios.quantile(share, interpolation="lower"))
        return _decibels(ratio) if ratio < math.inf else None


def _energies(expected: Tensor, found: Tensor) -> tuple[float, float]:
    """Return the energy of what is expected, and of what was found minus that, a piece at a time that caches hold."""
    signal = noise = 0.0
    pieces = (t.reshape(-1).split(_PIECE) for t in (expected, found))
    for own, other in zip(*pieces, strict=True):
        e = own.double()
        difference = e - other
        energies = float(e.dot(e)), float(difference.dot(difference))
        if not all(map(math.isfinite, energies)):
            masked = ~e.isfinite()  # classes that are not there, and the like
            e, difference = e.masked_fill(masked, 0.0), difference.masked_fill(masked, 0.0)
            squares = difference.square().nan_to_num(nan=math.inf, posinf=math.inf)
            energies = float(e.square().sum()), float(squares.sum())
        signal, noise = signal + energies[0], noise + energies[1]
    return signal, noise


class Measure:
    """A user's own measure of a network, higher is better, and how far it may drop below that of the float model.

    Attributes:
        max_drop: the limit.
        reference: the measure of the float model.
        calls: how often a network was measured.
    """

    def __init__(
        self,
        evaluate: Callable[[nn.Module], float],
        max_drop: float,
        model: nn.Module,
        processes: Processes = ALONE,
    ) -> None:
        """Measure the float model.

        All processes call evaluate, and the first one's value counts.

        Raises:
            TypeError: evaluate is not a function, or does not return a number.
            ValueError: max_drop is no number from 0, or evaluate fails or returns NaN.
        """
        if not callable(evaluate):
            raise TypeError(f"evaluate must be a function of a network, got {type(evaluate).__name__}")
        if isinstance(max_drop, bool) or not isinstance(max_drop, (int, float)) or not 0.0 <= max_drop < math.inf:
            raise ValueError(f"max_drop must be a number from 0, in units of what evaluate returns, got {max_drop!r}")
        self._evaluate: Callable[[nn.Module], Any] = evaluate
        self.max_drop = float(max_drop)
        self._processes = processes
        self.calls = 0
        self.reference: float = self._measured(model, "the float model")

    def __call__(self, network: nn.Module) -> float:
        """Measure a quantized network."""
        return self._measured(network, "a quantized network")

    def excess(self, value: float) -> float:
        """Return by how many decibels a drop is above the limit, or below it where that is negative."""
        drop = self.reference - value
        if drop <= self.max_drop:
            return 10.0 * math.log10(drop / self.max_drop) if drop > 0.0 else -math.inf
        return 10.0 * math.log10(drop / self.max_drop) if self.max_drop else math.inf

    @torch.no_grad()
    def _measured(self, network: nn.Module, what: str) -> float:
        self.calls += 1
        try:
            value = self._processes.from_first(self._evaluate(network))
        except Exception as error:
            if is_out_of_memory(error):
                raise
            raise ValueError(
                f"evaluate fails on {what} ({kind_and_line(error)}): it is called with the "
                "network, in evaluation mode, and returns a number, higher for a better network"
            ) from error
        if isinstance(value, Tensor):
            raise TypeError(
                f"evaluate returned a tensor of shape {list(value.shape)} for {what}, not a number: .item()"
            )
        if isinstance(value, bool) or not isinstance(value, Real):
            raise TypeError(f"evaluate returned {type(value).__name__} for {what}, not a number")
        if not math.isfinite(value):
            raise ValueError(
                f"evaluate returned {value} for {what}: where a measure is not defined, as when nothing is found, "
                "return its worst value"
            )
        return float(value)


def _sqnr(signal: float, noise: float) -> float | None:
    return None if noise == 0.0 or signal == 0.0 else _decibels(signal / noise)


def _decibels(ratio: float) -> float:
    return 10.0 * math.log10(ratio) if ratio > 0.0 else -math.inf


def class_scores(network: nn.Module, what: str, x: Tensor, target: Tensor) -> Tensor:
    """Return the scores [N, classes] that a classifier gives images.

    Args:
        network: the classifier.
        what: it is.
        x: [N, C, H, W], left as they are.
        target: classes [N], -1 where they are not known.

    Raises:
        ValueError: it fails, it gives something else than scores, or has fewer classes.
    """
    with naming_failures(f"{what} fails on a batch {list(x.shape)}"):
        scores = network(x.clone())  # it may write into it
    if not isinstance(scores, Tensor) or scores.dim() != 2:
        found = f"a tensor {list(scores.shape)}" if isinstance(scores, Tensor) else type(scores).__name__
        raise ValueError(f"{what} is no classifier, which returns scores [N, classes]: it returns {found}")
    if scores.shape[1] <= int(target.max()):
        raise ValueError(f"the images are of {int(target.max()) + 1} classes or more, {what} has {scores.shape[1]}")
    return scores


@torch.no_grad()
def compare(
    model: nn.Module,
    quantized: nn.Module,
    batches: Iterable[tuple[Tensor, Tensor]],
    processes: Processes = ALONE,
) -> Comparison:
    """Run two classifiers on labelled images.

    Args:
        model: the float network.
        quantized: the quantized network.
        batches: pairs of images [N, ...] and labels [N].
        processes: whose images are counted together.

    Raises:
        ValueError: there are no images; see class_scores.
    """
    images = float_right = right = agree = 0
    noise = Noise()
    for x, target in batches:
        expected, found = (
            class_scores(network, what, x, target).double()
            for network, what in ((model, "the float model"), (quantized, "the quantized network"))
        )
        images += len(x)
        float_right += int((expected.argmax(1) == target).sum())
        right += int((found.argmax(1) == target).sum())
        agree += int((expected.argmax(1) == found.argmax(1)).sum())
        noise.add(expected, found)
    counts = processes.gather([(images, float_right, right, agree)])
    images, float_right, right, agree = map(sum, zip(*counts, strict=True))
    noise = noise.merged(processes)
    if images == 0:
        raise ValueError("there are no images to compare on")
    percent = 100.0 / images
    sqnr = math.inf if noise.sqnr is None else noise.sqnr
    return Comparison(images, percent * float_right, percent * right, percent * agree, sqnr)
