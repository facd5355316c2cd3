"""Second moments of a layer: what the solvers of weights know about the data.

With u the layer's input as the quantized network delivers it (a patch of a convolution's input, in code units where
the scale is folded into the weights) and t the output to reproduce, the squared error of weights W is, once the bias
has matched the means,

    E|t - W u|² = const - 2 tr(W Bᵀ) + tr(W H Wᵀ),    H = cov(u, u),  B = cov(t, u).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from ptq4cuda.compat import byte_products, multiplies_bytes
from ptq4cuda.nn import QuantModule
from ptq4cuda.processes import ALONE, Processes
from ptq4cuda.solve.blocks import BLOCK, WIDEST

MAX_SAMPLES = 65536  # positions of output maps that are looked at; neighbours tell much the same
_CHUNK = 8192  # samples that are looked at together; float32 sums of their codes are exact
_EXACT = 1 << 24  # float32 holds all whole numbers up to it
_COLUMNS = 256  # of a symmetric product that are computed together
_KEPT = 1 << 26  # values of a wide layer's samples


@dataclass(frozen=True, eq=False)
class Moments:
    """Moments of G groups of d inputs and R outputs each, float64; sums over n samples add up.

    Attributes:
        count: n.
        uu: Σ u uᵀ [G, d, d].
        tu: Σ t uᵀ [G, R, d].
        u: Σ u [G, d].
        t: Σ t [G, R].
    """

    count: int
    uu: Tensor
    tu: Tensor
    u: Tensor
    t: Tensor

    @classmethod
    def of(cls, u: Tensor, t: Tensor) -> Moments:
        """Sum up samples u float32 [G, n, d] and t float32 [G, n, R].

        Products of float32 are summed about the mean: of values far from zero little else would be left.
        """
        n = u.shape[1]
        mean_u, mean_t = u.mean(1, keepdim=True), t.mean(1, keepdim=True)
        u, t = u - mean_u, t - mean_t
        mu, mt = mean_u.double(), mean_t.double()
        su, st = u.sum(1, keepdim=True, dtype=torch.float64), t.sum(1, keepdim=True, dtype=torch.float64)
        return cls(
            n,
            (u.mT @ u).double() + mu.mT @ su + su.mT @ mu + n * (mu.mT @ mu),
            (t.mT @ u).double() + mt.mT @ su + st.mT @ mu + n * (mt.mT @ mu),
            (su + n * mu).squeeze(1),
            (st + n * mt).squeeze(1),
        )

    def __add__(self, other: Moments) -> Moments:
        """Return the moments of both sets of samples."""
        return Moments(
            self.count + other.count, self.uu + other.uu, self.tu + other.tu, self.u + other.u, self.t + other.t
        )

    @property
    def mean_u(self) -> Tensor:
        """E u [G, d]."""
        return self.u / self.count

    @property
    def mean_t(self) -> Tensor:
        """E t [G, R]."""
        return self.t / self.count

    @cached_property
    def covariance(self) -> Tensor:
        """H = cov(u, u) [G, d, d], and what rounding may have made of the variances of inputs that hardly vary."""
        mean, squares = self.mean_u, self.uu / self.count
        rounding = 1e-12 * squares.diagonal(dim1=1, dim2=2)
        found = squares.sub_(mean[:, :, None] * mean[:, None, :])
        found.diagonal(dim1=1, dim2=2).add_(rounding)
        return found

    @cached_property
    def cross(self) -> Tensor:
        """B = cov(t, u) [G, R, d]."""
        return self.tu / self.count - self.mean_t[:, :, None] * self.mean_u[:, None, :]

    def bias(self, weight: Tensor) -> Tensor:
        """Return the bias [G, R] with which weights [G, R, d] match the mean of t."""
        return self.mean_t - (weight.double() @ self.mean_u[:, :, None]).squeeze(2)


@dataclass(frozen=True, eq=False)
class Samples:
    """Samples of a wide layer, whose moments of d x d would take too much memory and time.

    Attributes:
        u: float32 [G, n, d].
        t: float32 [G, n, R].
        odd: bool [n], the number of whose sample is odd.
    """

    u: Tensor
    t: Tensor
    odd: Tensor

    def halves(self, u: Tensor, t: Tensor) -> tuple[Moments, Moments]:
        """Return the moments of some inputs and outputs over the samples of even and of odd number."""
        a, b = (_sum(u[:, half], t[:, half]) for half in (~self.odd, self.odd))
        assert a is not None
        return a, b if b is not None else a  # a single sample cannot be halved


def _sum(u: Tensor, t: Tensor) -> Moments | None:
    total: Moments | None = None
    for some_u, some_t in zip(u.split(_CHUNK, 1), t.split(_CHUNK, 1), strict=True):
        if some_u.shape[1]:
            moments = Moments.of(some_u, some_t)
            total = moments if total is None else total + moments
    return total


def layer_moments(
    module: QuantModule,
    inputs: Iterable[Tensor],
    outputs: Sequence[Tensor],
    added: Sequence[tuple[Tensor, Tensor]] | None = None,
    processes: Processes = ALONE,
) -> tuple[Moments, Moments] | Samples:
    """Measure a layer over all chunks, once for the samples of even and once for those of odd number.

    Two halves of different samples let a solver judge on one what it fitted on the other. Of a layer of more than
    WIDEST inputs the samples are returned, as many as 256 MiB hold.

    Args:
        module: quantizes the input, and has the layer's geometry.
        inputs: the input of each chunk, on any device.
        outputs: the output to reproduce, [N, O, H, W] or [..., O] for each chunk; read twice.
        added: what is added to it next, as it should be and as it is, where the layer is to make up for the
            difference.
        processes: whose chunks follow each other, wherever they are cut.
    """
    width = module.weight_shape[1:].numel()
    sizes, before = processes.placed([_size_of(module, y) for y in outputs])
    positions = sum(size.positions for size in sizes)
    count = min(positions, MAX_SAMPLES)
    if width > WIDEST:
        count = min(count, max(BLOCK, _KEPT // (width + module.weight_shape[0])))
    pieces = _pick(sizes, count)[before : before + len(outputs)]
    codes, targets = _Codes(module), _Targets(module, outputs, added, pieces)
    if width > WIDEST:
        return _samples(codes, inputs, targets, pieces, processes)
    grid = targets.grid(count, processes)
    halves = [_Sums(codes, grid) for _ in range(2)]
    for x, own, of_chunk in zip(inputs, pieces, targets, strict=True):
        for piece, u, t in zip(own, codes.at(x, own), of_chunk, strict=True):
            halves[piece.odd].add(u, t)
    a, b = (half.moments(processes) for half in halves)
    return a, b if b.count else a  # a single sample cannot be halved


def _samples(
    codes: _Codes, inputs: Iterable[Tensor], targets: _Targets, pieces: list[list[_Piece]], processes: Processes
) -> Samples:
    groups, width = codes.shift.shape
    count = sum(len(piece.rows) for own in pieces for piece in own)
    rows, device = codes.module.weight_shape[0] // groups, codes.shift.device
    u, t = (torch.empty(groups, count, size, device=device) for size in (width, rows))
    odd = torch.empty(count, dtype=torch.bool, device=device)
    filled = 0
    for x, own, of_chunk in zip(inputs, pieces, targets, strict=True):
        for piece, some_u, some_t in zip(own, codes.at(x, own), of_chunk, strict=True):
            here = slice(filled, filled + len(piece.rows))
            u[:, here], t[:, here], odd[here] = codes.values(some_u), some_t, bool(piece.odd)
            filled = here.stop
    if processes.count == 1:
        return Samples(u, t, odd)
    us, ts, odds = zip(*processes.gather([(u, t, odd)]), strict=True)
    return Samples(torch.cat(us, 1), torch.cat(ts, 1), torch.cat(odds))


# --- which samples are looked at --------------------------------------------------------------------------------


class _Size(NamedTuple):
    """A chunk of outputs: its positions, and samples."""

    positions: int
    samples: int


class _Piece(NamedTuple):
    """Samples of a chunk that are looked at together.

    Attributes:
        odd: 1 if they belong to images of odd number, else 0.
        rows: which positions of the chunk they are, int64 [n].
    """

    odd: int
    rows: Tensor


def _size_of(module: QuantModule, output: Tensor) -> _Size:
    output = _channels_last(module, output)
    return _Size(output[..., 0].numel(), len(output))


def _channels_last(module: QuantModule, output: Tensor) -> Tensor:
    """View an output as [N, ..., O]."""
    output = output.unsqueeze(0) if module.spec.is_single(output) else output
    return output.movedim(module.spec.axis, -1)


def _pick(sizes: Sequence[_Size], count: int) -> list[list[_Piece]]:
    """Return which positions of each chunk are looked at, `count` in all: one of each of equal parts."""
    positions = sum(size.positions for size in sizes)
    picked = torch.arange(count, device="cpu")
    if count < positions:
        generator = torch.Generator().manual_seed(0)
        jitter = torch.rand(count, dtype=torch.float64, generator=generator, device="cpu")
        picked = ((picked + jitter) * (positions / count)).long()
    ends = torch.tensor([size.positions for size in sizes], dtype=torch.int64, device="cpu").cumsum(0)
    pieces: list[list[_Piece]] = []
    first_sample = 0
    for size, rows in zip(sizes, picked.tensor_split(torch.searchsorted(picked, ends)[:-1]), strict=True):
        rows = rows - (ends[len(pieces)] - size.positions)
        # By the sample, so that no image is in both halves.
        odd = (first_sample + rows // max(1, size.positions // size.samples)) % 2
        of_halves = [(half, rows[odd == half]) for half in (0, 1)]
        pieces.append([_Piece(half, some) for half, own in of_halves for some in own.split(_CHUNK) if len(some)])
        first_sample += size.samples
    return pieces


# --- what is read there -----------------------------------------------------------------------------------------


class _Codes:
    """The codes of a layer's input, as the outputs at some positions read them, less the middle of their range.

    They are whole numbers, so that sums of products are exact, in whatever order, while they are below 2²⁴.

    Attributes:
        module: quantizes the input.
        shift: what codes lack of q - z, float32 [G, d].
        unit: what q - z is worth, float32 [G, d]; None where the scale is folded into the weights.
        reach: what no code exceeds.
        in_bytes: whether products of codes are taken of bytes, which gives the same numbers sooner.
    """

    def __init__(self, module: QuantModule) -> None:
        assert module.activation is not None
        self.module, self._quantizer = module, module.activation
        channels = module.weight_shape[1] * module.groups
        last, zero = torch.exp2(self._quantizer.bits.float()) - 1.0, self._quantizer.zero_point.float()
        self._middle = ((last + 1.0) / 2.0).floor().expand(channels)
        self._outside = (zero - self._middle).expand(channels)
        self.shift = self._along_inputs(-self._outside)
        self.unit = None if module.folded else self._along_inputs(self._quantizer.scale.expand(channels))
        # A code of the range, or that of what lies outside of an image, which is none where there are no bits.
        self.reach = max(1.0, float(self._middle.max()), float(self._outside.abs().max()))
        signed = self.reach < 128 or (self.reach == 128 and bool((self._outside < 128).all()))
        self.in_bytes = signed and module.groups == 1 and self.shift.device.type == "cpu" and multiplies_bytes()

    def _along_inputs(self, values: Tensor) -> Tensor:
        """Return values of channels [C] for all inputs [G, d]."""
        kernel = self.module.weight_shape[2:].numel()
        return values.view(self.module.groups, 1, -1).expand(-1, kernel, -1).flatten(1)

    def at(self, x: Tensor, pieces: Sequence[_Piece]) -> Iterator[Tensor]:
        """Yield codes float32 [G, n, d] for pieces of a chunk, whose input is x."""
        spec, groups = self.module.spec, self.module.groups
        x = x.to(self.shift.device)
        x = x.unsqueeze(0) if spec.is_single(x) else x
        inside, width = x.shape[2:].numel() if spec.dims else 1, self.shift.shape[1]
        pixels = x.flatten(2).mT if spec.dims else x.reshape(-1, 1, x.shape[-1])  # [N, *, C]
        # Which pixel each output reads, and 0 for none, [positions of an image, *kernel].
        reads = torch.ones(1, 1, dtype=torch.int64, device=x.device)
        if spec.dims:
            numbers = torch.arange(1.0, inside + 1, dtype=torch.float64, device=x.device).view(1, 1, *x.shape[2:])
            reads = spec.windows(self.module, numbers)[0, ..., 0].flatten(0, spec.dims - 1).flatten(1).long()
        whole = sum(len(piece.rows) for piece in pieces) * reads.shape[1] > pixels.shape[:2].numel()
        quantizer = replace(self._quantizer, axis=-1)
        pixels = quantizer.quantize(pixels) if whole else pixels
        for piece in pieces:
            rows = piece.rows.to(x.device)
            at = reads[rows % len(reads)]
            found = pixels[(rows // len(reads))[:, None], (at - 1).clamp_min(0)]  # [n, kernel, C]
            found = (found if whole else quantizer.quantize(found)).float().sub_(self._middle)
            if not bool(at.all()):
                found[at == 0] = self._outside
            n = len(rows)
            found = found.view(n, at.shape[1], groups, -1).permute(2, 0, 1, 3)
            yield found.reshape(groups, n, width)

    def values(self, codes: Tensor) -> Tensor:
        """Return u float32 [G, n, d], given codes, which are overwritten."""
        u = codes.add_(self.shift[:, None])
        return u if self.unit is None else u.mul_(self.unit[:, None])


@dataclass(frozen=True, eq=False)
class _Targets:
    """Outputs to reproduce; for each chunk they are yielded for one piece after the other, float32 [G, n, R]."""

    module: QuantModule
    outputs: Sequence[Tensor]
    added: Sequence[tuple[Tensor, Tensor]] | None
    pieces: list[list[_Piece]]

    def __iter__(self) -> Iterator[Iterator[Tensor]]:
        added = itertools.repeat(None) if self.added is None else self.added
        for y, summand, own in zip(self.outputs, added, self.pieces, strict=False):
            yield (self._at(y, summand, piece.rows) for piece in own)

    def _at(self, y: Tensor, summand: tuple[Tensor, Tensor] | None, rows: Tensor) -> Tensor:
        def found(values: Tensor) -> Tensor:
            values = _channels_last(self.module, values)
            return values[torch.unravel_index(rows, values.shape[:-1])].to(self.module.weight_scale.device).float()

        t = found(y)
        if summand is not None:
            t += found(summand[0].expand_as(y)) - found(summand[1].expand_as(y))
        return t.view(len(rows), self.module.groups, -1).permute(1, 0, 2).contiguous()

    def grid(self, count: int, processes: Processes) -> _Grid:
        """Return the grid for sums of so many samples of all processes."""
        own = [torch.stack([t.amin(1), t.amax(1)]) for of_chunk in self for t in of_chunk]
        low, high = torch.stack(processes.gather(own)).unbind(1)
        return _Grid(low.amin(0), high.amax(0), count)


# --- sums -------------------------------------------------------------------------------------------------------


class _Grid:
    """Rounds sums so that sums of them are exact, and do not depend on their order, nor on who adds what.

    1.5 · 2⁵² q added to p leaves no room for less than q: p comes back as a multiple of q. Here q is such that sums
    of `count` products are below 2⁵¹ q: sums of rounded ones are whole numbers of q and fit into the 53 bits of
    float64.

    Attributes:
        middle: of the range of each output, float32 [G, R], about which sums are taken: of values far from zero
            little else would be left.
    """

    def __init__(self, low: Tensor, high: Tensor, count: int) -> None:
        """Make the grid for outputs between low and high, float32 [G, R]."""
        self.middle = (low + high) / 2
        reach = torch.maximum(high - self.middle, self.middle - low).double()
        reach = torch.exp2(reach.clamp_min(torch.finfo(torch.float32).tiny).log2().ceil())
        self._far = reach * (1.5 * 2.0 ** (math.ceil(math.log2(count)) + 2))

    def rounded(self, sums: Tensor, reach: float) -> Tensor:
        """Return sums [G, R, *] of products with what does not exceed `reach`, float64."""
        far = (self._far * 2.0 ** math.ceil(math.log2(reach)))[:, :, None]
        return sums.double().add_(far).sub_(far)


class _Sums:
    """Sums up samples of one half."""

    def __init__(self, codes: _Codes, grid: _Grid) -> None:
        groups, width = codes.shift.shape
        self._codes, self._grid, self.count = codes, grid, 0
        self._rows = max(1, int(_EXACT // codes.reach**2))  # of products whose sum is exact in float32
        self._waiting = 0  # of these are in the float32 sums
        self._exact = codes.shift.new_zeros(groups, width, width)  # on and above the diagonal
        self._uu = self._exact.double()
        self._u = codes.shift.new_zeros(groups, width, dtype=torch.float64)
        self._t = grid.middle.new_zeros(*grid.middle.shape, 1, dtype=torch.float64)
        self._tu = self._t.repeat(1, 1, width)

    def add(self, u: Tensor, t: Tensor) -> None:
        """Add samples: codes u float32 [G, n, d] and outputs t float32 [G, n, R], which is overwritten."""
        t = t.sub_(self._grid.middle[:, None])
        self._tu += self._grid.rounded(t.mT @ u, self._codes.reach)
        self._t += self._grid.rounded(t.sum(1, dtype=torch.float64)[:, :, None], 1.0)
        self._u += u.sum(1)  # exact, of so few rows
        self.count += u.shape[1]
        while u.shape[1]:
            some, u = u[:, : self._rows - self._waiting], u[:, self._rows - self._waiting :]
            some_bytes = some[0].to(torch.int8) if self._codes.in_bytes else None
            for first in range(0, some.shape[2], _COLUMNS):
                columns = slice(first, first + _COLUMNS)
                if some_bytes is None:
                    self._exact[:, columns, first:].baddbmm_(some[:, :, columns].mT, some[:, :, first:])
                else:
                    self._exact[0, columns, first:] += byte_products(some_bytes[:, columns].mT, some_bytes[:, first:])
            self._waiting += some.shape[1]
            if self._waiting == self._rows:
                self._carry()

    def _carry(self) -> None:
        self._uu += self._exact
        self._exact.zero_()
        self._waiting = 0

    def moments(self, processes: Processes) -> Moments:
        """Return the moments of the samples of all processes."""
        self._carry()
        count = sum(processes.gather([self.count]))
        uu, tu, u, t = processes.total([self._uu, self._tu, self._u, self._t.squeeze(2)])
        uu = uu.triu_()
        uu += uu.triu(1).mT
        # Codes and outputs are what they lack away from u and t.
        shift, middle = self._codes.shift.double(), self._grid.middle.double()
        tu += middle[:, :, None] * u[:, None] + (t + count * middle)[:, :, None] * shift[:, None]
        t += count * middle
        uu += u[:, :, None] * shift[:, None] + shift[:, :, None] * (u + count * shift)[:, None]
        u += count * shift
        if self._codes.unit is not None:
            unit = self._codes.unit.double()  # whose products are exact
            uu, tu, u = uu * (unit[:, :, None] * unit[:, None]), tu * unit[:, None], u * unit
        return Moments(count, uu, tu, u, t)
