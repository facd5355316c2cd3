"""Scales of the channels of an input, once they are folded into the weights that read it.

A row of weights has one step for all its inputs. Folded weights w_c s_c of channels with small scales are small
beside the others of their row, and are rounded coarsely: by step / s_c, in units of the input. So a channel's scale
is a bargain: with a larger one the input's error grows with s_c², that of the weights falls with 1 / s_c². The
least sum has scales in proportion to the fourth root of the power of a channel's values over the energy of the
weights that read it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from ptq4cuda.calibrate.signals import Reader
from ptq4cuda.quantizer import QuantParams

_TRIED = tuple(2.0 ** (k / 2.0) for k in range(-4, 7))  # times the usual scale
_VALUES = 1 << 22  # weights that are looked at at a time


def scales_for_weights(
    quantizer: QuantParams, power: Tensor, readers: Sequence[Reader], weight_bits: int, left: float
) -> QuantParams:
    """Raise the scales of channels for as long as folded weights gain more by it than the input loses.

    The range of a channel becomes wider by that, or fewer of its codes are used.

    Args:
        quantizer: of a tensor, one for each channel.
        power: float64 [C], mean square of what rounding errors of weights are multiplied with: of the values, about
            their mean where the bias makes up for it.
        readers: the layers that read the tensor.
        weight_bits: of their rows.
        left: share of the noise of rounding to nearest that their rounding makes.
    """
    own = quantizer.scale.double()
    energy = torch.stack([reader.spec.input_cost(reader.layer) for reader in readers]).sum(0).to(own.device)
    counts = (quantizer.bits > 0) & (power > 0) & (energy > 0)
    if not bool(counts.any()):
        return quantizer
    balanced = torch.where(counts, power / energy, 0.0).pow(0.25)
    usual = (own / balanced)[counts].median()

    def noise(scale: Tensor) -> Tensor:
        of_input = energy * ((scale.square() - own.square()) / 12.0).minimum(power)
        of_weights = torch.stack([_rounding_noise(reader, scale, weight_bits) for reader in readers]).sum(0)
        return (of_input + left * of_weights * power / scale.square()).sum()

    candidates = [own, *(torch.maximum(own, balanced * usual * factor) for factor in _TRIED)]
    noises = torch.stack([noise(scale) for scale in candidates])
    scale = candidates[int(noises.nan_to_num(nan=torch.inf).argmin())]
    zero_point = (quantizer.zero_point * (own / scale)).round().int()
    return replace(quantizer, scale=scale.float(), zero_point=zero_point)


def _rounding_noise(reader: Reader, scale: Tensor, bits: int) -> Tensor:
    """Return the noise that rounding of weights times these scales makes of inputs of power 1, float64 [C]."""
    spec, layer = reader.spec, reader.layer
    groups, rows = spec.groups(layer), spec.rows(layer).to(scale.device)
    rows = rows.flatten(2) if rows.dim() > 2 else rows[..., None]
    factors = scale.float().view(groups, 1, -1, 1)
    step = max(1, _VALUES // max(1, groups * rows[0].numel()))
    per_group = rows.view(groups, -1, *rows.shape[1:]).split(step, 1)
    limits = [(part.float() * factors).flatten(2).aminmax(dim=2) for part in per_group]
    low, high = (torch.cat(parts, 1).double() for parts in zip(*limits, strict=True))  # [G, O / G]
    low, high = low.clamp_max(0.0), high.clamp_min(0.0)
    width = high - low if bits < 8 else 2.0 * torch.maximum(-low, high)
    noise = (width / (2.0**bits - 1.0)).square().sum(1) / 12.0
    positions = rows.shape[2] / spec.inputs_per_window(layer) if spec.dims else 1.0
    return (noise * positions).repeat_interleave(rows.shape[1])
