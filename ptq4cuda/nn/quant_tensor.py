"""QuantTensor: a tensor between layers that travels as codes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ptq4cuda import ops
from ptq4cuda.quantizer import QuantParams

_FIELDS = ("bits", "scale", "zero_point")


def tensor_of_values(x: object) -> Tensor:
    """Return an input; raise TypeError where it is no tensor of values."""
    if not isinstance(x, Tensor):
        remedy = ": torch.from_numpy makes a tensor of it" if type(x).__module__ == "numpy" else ""
        raise TypeError(f"the input must be a tensor, got {type(x).__name__}{remedy}")
    if x.dtype not in ops.FLOATING:
        raise TypeError(f"the input must be float32, float16 or bfloat16, got {x.dtype}: convert it, as x.float()")
    return x


class QuantizerState(nn.Module):
    """What modules with quantizers do with their buffers: they keep dtypes and load other lengths."""

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> QuantizerState:
        """Follow .to(device) but keep dtypes: .half() must not round scales and biases."""

        def move(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            return moved if moved.dtype == tensor.dtype else tensor.to(moved.device)

        for child in self.children() if recurse else ():  # which may have to know what fn is
            child._apply(fn)
        super()._apply(move, recurse=False)  # type: ignore[no-untyped-call]
        return self

    def __prepare_scriptable__(self) -> None:
        """Refuse torch.jit.script, which asks for this, in one sentence."""
        raise TypeError("torch.jit.script does not take quantized layers: use torch.export.export or torch.jit.trace")

    def _make_room(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        errors: list[str],
        names: tuple[str, ...],
        fixed: tuple[str, ...] = (),
    ) -> None:
        """Accept vectors of other lengths, which depend on the bits that were allocated, but for fixed ones."""
        for name in (*names, *fixed):
            current, loaded = getattr(self, name), state_dict.get(prefix + name)
            if current is None or loaded is None:
                continue
            if loaded.dtype != current.dtype or loaded.dim() != 1:
                errors.append(f"{prefix}{name} is {loaded.dtype} {list(loaded.shape)}, expected {current.dtype} [n]")
            elif name not in fixed and loaded.shape != current.shape:
                setattr(self, name, torch.empty_like(loaded, device=current.device))


class QuantTensor(QuantizerState):
    """Quantizes what passes through it, channel by channel.

    Args:
        axis: of the channels, counted from the back.

    Buffers:
        bits, scale, zero_point: QuantParams. While they are empty, as at first, everything passes as it is.
    """

    bits: Tensor
    scale: Tensor
    zero_point: Tensor

    def __init__(self, axis: int = -3) -> None:
        super().__init__()
        self.axis = axis
        self.register_buffer("bits", torch.zeros(0, dtype=torch.uint8, device="cpu"))
        self.register_buffer("scale", torch.zeros(0, dtype=torch.float32, device="cpu"))
        self.register_buffer("zero_point", torch.zeros(0, dtype=torch.int32, device="cpu"))

    def set(self, params: QuantParams) -> None:
        """Quantize with these parameters."""
        for name in _FIELDS:
            self.register_buffer(name, getattr(params, name))

    @property
    def params(self) -> QuantParams:
        """The quantizer."""
        return QuantParams(self.bits, self.scale, self.zero_point, axis=self.axis)

    def forward(self, x: Tensor) -> Tensor:
        """Return the values of x's codes."""
        if not self.scale.numel():
            return x
        return ops.fake_quantize(x, self.scale, self.zero_point, self.bits, self.axis)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        errors: list[str] = args[-1]
        before = len(errors)
        self._make_room(state_dict, prefix, errors, _FIELDS)
        super()._load_from_state_dict(state_dict, prefix, *args)
        if len(errors) > before or not any(getattr(self, name).numel() for name in _FIELDS):
            return
        try:
            self.set(self.params)
        except (TypeError, ValueError) as error:
            errors.append(f"{prefix.rstrip('.')}: {error}")
