"""From float weights to integer codes: row o has the values scale_o * (code + offset_o).

Codes have b bits. Offsets lie on a grid, so that (code + offset) * 2^(7 - b) is an int8 without further rounding and
an integer convolution needs no term for the offset: multiples of 2^(b - 7) below 8 bits, -128 at 8.

Beyond rounding to nearest, codes are chosen to keep the layer's output: the error of a row is (w - w*) H (w - w*)ᵀ
with H the covariance of the layer's input. Error-compensated rounding takes the inputs one by one and lets those that
are not rounded yet make up for the error (Frantar et al. 2022, GPTQ); coordinate descent then revisits every code,
given all others, and the best scale and offset for the codes in closed form, until nothing improves.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from ptq4cuda.quantizer import QuantizedWeight, QuantParams
from ptq4cuda.solve.blocks import from_blocks, to_blocks

Rounding = Literal["nearest", "compensated", "descent"]
ROUNDINGS = get_args(Rounding)

_BLOCK = 64  # inputs that are rounded before the rest of the row is brought up to date
_SHRINKS = [i / 40 for i in range(12, 41)]  # of a row's range, tried for the scale to start from
_QUIET = 0.01  # of the mean variance: inputs of less may have weights beyond a row's range
_STARTS = (0.7, 0.8, 0.9, 1.0, 1.1, 1.25)  # times that scale
_SWEEPS = 4
_VALUES = 1 << 24  # of rows times starts that are rounded at a time, where a layer is wide
_DAMPING = 0.01  # of the mean diagonal, for the inverse in compensated rounding
_MANY_BITS = 8  # with which errors are as small as what float32 loses of them


def round_to_nearest(weight: Tensor, bits: Tensor) -> QuantizedWeight:
    """Quantize each output channel over its own range, widened to contain zero, without clipping.

    Args:
        weight: [O, ...], finite; the channels that a kernel reads together lie innermost ([O, R, S, C]).
        bits: uint8 [O]. A channel of 0 bits becomes its mean, one of 8 bits has a range symmetric about zero.
    """
    rows = weight.flatten(1)
    low, high = rows.aminmax(dim=1)
    widest = torch.maximum(-low, high)
    widest = torch.where(widest > 0, widest, 1.0)  # zeros have the code of zero like those of other rows
    full = bits == 8
    low, high = torch.where(full, -widest * (128 / 127), low), torch.where(full, widest, high)
    quantizer = QuantParams.from_range(low, high, bits, axis=0, constant=rows.double().mean(1))
    codes = quantizer.quantize(weight.float())
    return QuantizedWeight(codes, bits, quantizer.scale, -quantizer.zero_point.float())


def round_for_output(weight: Tensor, bits: Tensor, covariance: Tensor, rounding: Rounding) -> QuantizedWeight:
    """Quantize rows so that the layer's output changes least.

    Args:
        weight: float64 [G, R, d], rows of each group.
        bits: uint8 [G * R], 1 to 8.
        covariance: H of the input, float64 [G, d, d], positive semidefinite, or its diagonal blocks, as to_blocks
            parts the inputs, [G * blocks, d / blocks, d / blocks].
        rounding: "nearest" only searches the scale; "compensated" and "descent" choose codes too.

    Returns:
        Codes [G * R, d].
    """
    h = covariance.float()
    # An input that never varies costs nothing, whatever its weight: keep it near the float one.
    mean = h.diagonal(dim1=1, dim2=2).mean(1).clamp_min(torch.finfo(torch.float32).tiny)
    h = h + torch.diag_embed((1e-6 * mean)[:, None].expand(h.shape[:2]))
    groups, total, width = weight.shape
    blocks = len(h) // groups
    # Of a wide layer so many rows at a time as keep the memory within bounds.
    step = total if blocks == 1 else max(1, _VALUES // (len(_STARTS) * groups * width))
    parts = [
        _round_rows(some, some_bits, h, blocks, rounding)
        for some, some_bits in zip(weight.split(step, 1), bits.view(groups, total).split(step, 1), strict=True)
    ]
    codes, scale, offset = (torch.cat([part[i] for part in parts], 1) for i in range(3))
    return QuantizedWeight(codes.flatten(0, 1), bits, scale.flatten(), offset.flatten())


def _round_rows(
    weight: Tensor, bits: Tensor, h: Tensor, blocks: int, rounding: Rounding
) -> tuple[Tensor, Tensor, Tensor]:
    """Return codes [G, R, d], scale and offset [G, R]."""
    shared = bits.float().repeat_interleave(blocks, 0)
    rows = _Rows.start(to_blocks(weight.float(), blocks).mT.contiguous(), shared, h, blocks)
    if rounding != "nearest":
        rows = rows.repeated(_STARTS)
        rows.compensate()
        products = _Products.of(rows, len(_STARTS))
        rows.rescale(products)
        compensated = rows.best(rows.error(products), len(_STARTS))
        if rounding == "descent":
            for _ in range(_SWEEPS):
                if not rows.descend(products):
                    break
                rows.rescale(products)
            rows = rows.best(rows.error(products), len(_STARTS))
            rows.keep_better(compensated)
        else:
            rows = compensated
    codes = from_blocks(rows.codes.mT, blocks, weight.shape[-1]).to(torch.uint8)
    return codes, rows.scale[::blocks], rows.offset[::blocks]


def _snap(offset: Tensor, bits: Tensor) -> Tensor:
    """Move offsets to the grid, inside of the range in which zero is between the codes."""
    grid = torch.exp2(bits - 7.0)
    snapped = (torch.round(offset / grid) * grid).clamp_max(0.0)
    return torch.where(bits == 8, -128.0, torch.maximum(snapped, 1.0 - torch.exp2(bits)))


@dataclass(eq=False)
class _Products:
    """Codes, target and ones in the metric of H: float32 H c [G, d, R], H w* [G, d, R] and H 1 [G, d, 1].

    Those of the codes are kept up to date by what changes, which is few numbers, and small ones.
    """

    codes: Tensor
    target: Tensor
    ones: Tensor

    @classmethod
    def of(cls, rows: _Rows, starts: int) -> _Products:
        """Multiply; all starts have the same target."""
        own = rows.weight[:, :, : rows.weight.shape[2] // starts]
        return cls(rows.h @ rows.codes, (rows.h @ own).repeat(1, 1, starts), rows.h.sum(2, keepdim=True))


@dataclass(eq=False)
class _Rows:
    """Rows under way: float32 codes [G, d, R], scale, offset and bits [G, R], target weights and H.

    Inputs come first: rows are brought up to date input by input, all at a time. Where H has blocks, G counts each of
    them: their rows have scale and offset in common.
    """

    weight: Tensor
    bits: Tensor
    h: Tensor
    scale: Tensor
    offset: Tensor
    codes: Tensor
    blocks: int = 1

    def _over_blocks(self, parts: Tensor) -> Tensor:
        """Sum up what the blocks of each row [G, R] come to, and give it to all of them."""
        return _over_blocks(parts, self.blocks, torch.sum)

    @classmethod
    def start(cls, weight: Tensor, bits: Tensor, h: Tensor, blocks: int = 1) -> _Rows:
        """Round to nearest with the scale, a part of the row's range, that does least harm.

        Two ranges are tried: that of all weights, and that of inputs that vary. A folded scale makes the weights of
        an input large that has few bits because it hardly varies. The inputs count by their variances alone here:
        this runs once for each scale that is tried.
        """
        variances = h.diagonal(dim1=1, dim2=2)[:, :, None]
        loud = variances > _QUIET * _over_blocks(variances.mean(1), blocks, torch.mean)[:, None]
        best: _Rows | None = None
        least = torch.full_like(bits, torch.inf)
        for within in [weight] if bool(loud.all()) else [weight, weight * loud]:
            low = _over_blocks(within.amin(1).clamp_max(0.0), blocks, torch.amin)
            high = _over_blocks(within.amax(1).clamp_min(0.0), blocks, torch.amax)
            symmetric = torch.maximum(-low / 128.0, high / 127.0)
            step = torch.where(bits == 8, symmetric, (high - low) / (torch.exp2(bits) - 1.0))
            step = step.clamp_min(torch.finfo(torch.float32).tiny)
            for shrink in _SHRINKS:
                rows = cls(
                    weight, bits, h, step * shrink, _snap(low / step, bits), torch.empty(0, device="cpu"), blocks
                )
                rows.codes = rows.clamp(rows.in_codes(weight).round_())
                error = rows._over_blocks((rows.difference().square_() * variances).sum(1))
                if best is None:
                    best = rows
                better = error < least
                least = torch.where(better, error, least)
                best.scale = torch.where(better, rows.scale, best.scale)
                best.offset = torch.where(better, rows.offset, best.offset)
                best.codes = torch.where(better[:, None], rows.codes, best.codes)
        assert best is not None
        return best

    def in_codes(self, weight: Tensor) -> Tensor:
        """Return weights [G, d, R] on the scale of the codes."""
        return (weight / self.scale[:, None]).sub_(self.offset[:, None])

    def clamp(self, codes: Tensor) -> Tensor:
        """Limit codes [..., G, R] or [G, d, R] to those that there are, in place."""
        most = torch.exp2(self.bits) - 1.0
        return torch.minimum(codes.clamp_min_(0.0), most[:, None] if codes.dim() == 3 else most, out=codes)

    def difference(self) -> Tensor:
        """Return w - w* [G, d, R]."""
        return (self.codes + self.offset[:, None]).mul_(self.scale[:, None]).sub_(self.weight)

    def error(self, products: _Products) -> Tensor:
        """Return (w - w*) H (w - w*)ᵀ [G, R]."""
        gradient = torch.addcmul(products.codes, products.ones, self.offset[:, None])
        gradient.mul_(self.scale[:, None]).sub_(products.target)
        return self._over_blocks(gradient.mul_(self.difference()).sum(1))

    def keep_better(self, other: _Rows) -> None:
        """Take others of the same weights where they have less error.

        Where inputs have much in common and bits are many, float32 does not tell: there it is computed in float64.
        """
        close = (self.bits >= _MANY_BITS).any(0).nonzero().squeeze(1)
        if len(close) == 0:
            return
        h = self.h.double()
        own, others = (
            self._over_blocks((h @ d).mul_(d).sum(1))
            for d in (rows.difference()[:, :, close].double() for rows in (self, other))
        )
        better = others < own
        self.scale[:, close] = torch.where(better, other.scale[:, close], self.scale[:, close])
        self.offset[:, close] = torch.where(better, other.offset[:, close], self.offset[:, close])
        self.codes[:, :, close] = torch.where(better[:, None], other.codes[:, :, close], self.codes[:, :, close])

    def repeated(self, factors: tuple[float, ...]) -> _Rows:
        """Return the rows once for each factor on their scale; the offset keeps the lower end of the range."""
        n = len(factors)
        factor = torch.tensor(factors, dtype=torch.float32, device=self.scale.device).repeat_interleave(
            self.scale.shape[1]
        )
        bits = self.bits.repeat(1, n)
        return _Rows(
            self.weight.repeat(1, 1, n),
            bits,
            self.h,
            self.scale.repeat(1, n) * factor,
            _snap(self.offset.repeat(1, n) / factor, bits),
            self.codes.repeat(1, 1, n),
            self.blocks,
        )

    def best(self, error: Tensor, n: int) -> _Rows:
        """Return of n repetitions of each row the one with the least error."""
        groups, inputs, rows = self.codes.shape
        pick = error.view(groups, n, rows // n).argmin(1, keepdim=True)

        def picked(tensor: Tensor) -> Tensor:
            return tensor.view(groups, n, rows // n).gather(1, pick).squeeze(1)

        index = pick.expand(groups, inputs, -1)[:, :, None]
        codes = self.codes.view(groups, inputs, n, rows // n).gather(2, index).squeeze(2)
        bits, scale, offset = (picked(t) for t in (self.bits, self.scale, self.offset))
        return _Rows(self.weight[:, :, : rows // n], bits, self.h, scale, offset, codes, self.blocks)

    def compensate(self) -> None:
        """Choose codes input by input, each error made up for by the inputs that follow.

        The inputs go in the order of falling variance. With U upper triangular and H = U Uᵀ the error of a row is
        |Uᵀ (c - w)|², whose term i depends on inputs up to i alone: it vanishes where input i is moved by
        (w - c)_j U_ji / U_ii for each j < i that was rounded. (GPTQ says the same in terms of H⁻¹.)
        """
        diagonal = self.h.diagonal(dim1=1, dim2=2)
        order = diagonal.argsort(dim=1, descending=True, stable=True)
        h = self.h.gather(1, order[:, :, None].expand_as(self.h)).gather(2, order[:, None, :].expand_as(self.h))
        damping = _DAMPING * diagonal.double().mean(1, keepdim=True).expand_as(diagonal)
        backwards = (h.double() + torch.diag_embed(damping)).flip(1, 2)
        u = torch.linalg.cholesky(backwards).flip(1, 2)
        u = (u / u.diagonal(dim1=1, dim2=2)[:, None]).float()
        index = order[:, :, None].expand_as(self.weight)
        wanted = self.in_codes(self.weight).gather(1, index)
        left = wanted.clone()
        codes = torch.empty_like(left)
        for first, end in _blocks(left.shape[1]):
            block, inner = left[:, first:end], u[:, first:end, first:end]
            errors = torch.empty_like(block)
            for j in range(end - first):
                code = self.clamp(block[:, j].round())
                codes[:, first + j] = code
                torch.sub(wanted[:, first + j], code, out=errors[:, j])
                block[:, j + 1 :].addcmul_(inner[:, j, j + 1 :, None], errors[:, j, None])
            left[:, end:].baddbmm_(u[:, first:end, end:].mT, errors)
        self.codes = left.scatter_(1, index, codes)

    def descend(self, products: _Products) -> bool:
        """Choose each code once, given all others; tell whether any changed."""
        curvature = self.h.diagonal(dim1=1, dim2=2)[..., None]
        changed = torch.zeros((), dtype=torch.bool, device=self.h.device)
        for first, end in _blocks(self.codes.shape[1]):
            here = slice(first, end)
            inner, codes = self.h[:, here, here], self.codes[:, here]
            # On the scale of the codes.
            gradient = products.codes[:, here] + products.ones[:, here] * self.offset[:, None]
            gradient -= products.target[:, here] / self.scale[:, None]
            moves = torch.empty_like(gradient)
            for j in range(end - first):
                old = codes[:, j]
                new = self.clamp((old - gradient[:, j] / curvature[:, first + j]).round_())
                torch.sub(new, old, out=moves[:, j])
                codes[:, j] = new
                gradient[:, j + 1 :].addcmul_(inner[:, j, j + 1 :, None], moves[:, j, None])
            products.codes.baddbmm_(self.h[:, :, here], moves)
            changed |= (moves != 0).any()
        return bool(changed)

    def rescale(self, products: _Products) -> None:
        """Set scale and offset to the least squares fit of the target by codes and ones, in the metric of H."""
        sums = (
            (products.codes * self.codes).sum(1),
            products.codes.sum(1),
            products.ones.sum(1).expand_as(self.scale),
            (products.target * self.codes).sum(1),
            products.target.sum(1),
        )
        cc, c1, oo, ct, ot = (self._over_blocks(each) for each in sums)
        determinant = cc * oo - c1 * c1
        slope, shift = (ct * oo - ot * c1) / determinant, (cc * ot - c1 * ct) / determinant
        usable = (determinant > 1e-6 * cc * oo) & (slope > 0)
        offset = torch.where(usable, _snap(shift / slope, self.bits), self.offset)
        # The best scale for the offset that the grid allows.
        along = ct + offset * ot
        square = cc + 2.0 * offset * c1 + offset.square() * oo
        scale = along / square
        # Errors, but for that of weights of zero: the least for the new offset, and as they are.
        least = -scale * along
        present = self.scale * (
            self.scale * (cc + 2.0 * self.offset * c1 + self.offset.square() * oo) - 2.0 * (ct + self.offset * ot)
        )
        better = (scale > 0) & torch.isfinite(scale) & (least < present)
        self.scale = torch.where(better, scale, self.scale)
        self.offset = torch.where(better, offset, self.offset)


def _over_blocks(parts: Tensor, blocks: int, reduce: Callable[..., Tensor]) -> Tensor:
    """Reduce [G * blocks, R] over the blocks, and give the result to all of them."""
    if blocks == 1:
        return parts
    reduced: Tensor = reduce(parts.unflatten(0, (-1, blocks)), 1)
    return reduced.repeat_interleave(blocks, 0)


def _blocks(width: int) -> Iterator[tuple[int, int]]:
    for first in range(0, width, _BLOCK):
        yield first, min(first + _BLOCK, width)
