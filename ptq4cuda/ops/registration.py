"""The operators' fake kernels, gradients and reference, beside what the native libraries bring.

The CPU library brings the schemas, so that a program without Python has them too; without it they are defined here.
The reference is registered below the native kernels, for devices and builds that have none.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ptq4cuda import _native
from ptq4cuda.ops import checks, layers, reference
from ptq4cuda.ops.schemas import CPU_SCHEMAS, SCHEMAS

NAMESPACE = "ptq4cuda"


def define(namespace: str, schemas: Sequence[str] = SCHEMAS) -> torch.library.Library:
    """Define the operators in a namespace. The tests define them once more for the CUDA sources on the CPU."""
    library = torch.library.Library(namespace, "DEF")
    for schema in schemas:
        library.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    return library


# --- fake kernels: shapes, dtypes and strides without data; arguments have been checked ------------------------


def _fake_channel_statistics(x: Tensor, axis: int, centre: Tensor | None = None) -> Tensor:
    channels = x.shape[axis] if x.dim() else 1
    return x.new_empty((channels, len(reference.STATISTICS)), dtype=torch.float64)


def _fake_channel_histogram(x: Tensor, low: Tensor, high: Tensor, bins: int, axis: int) -> Tensor:
    channels = x.shape[axis] if x.dim() else 1
    return x.new_empty((channels, bins), dtype=torch.int64)


def _fake_fake_quantize(x: Tensor, *arguments: Any) -> Tensor:
    return torch.empty_like(x)


def _fake_quantize(x: Tensor, *arguments: Any) -> Tensor:
    return torch.empty_like(x, dtype=torch.uint8)


def _fake_quantize_pack(x: Tensor, *arguments: Any) -> Tensor:
    return x.new_empty((x.shape[0], *x.shape[2:], (x.shape[1] + 1) // 2), dtype=torch.uint8)


def _fake_unpack_dequantize(
    packed: Tensor, scale: Tensor, zero_point: Tensor, axis: int, channels: int, dtype: int
) -> Tensor:
    return packed.new_empty((*packed.shape[:-1], channels), dtype=checks.floating_dtype(dtype)).movedim(-1, 1)


def _fake_pack_codes(codes: Tensor, bits: Tensor, offsets: Tensor, packed_bytes: int) -> Tensor:
    return codes.new_empty(packed_bytes)


def _fake_unpack_codes(packed: Tensor, bits: Tensor, offsets: Tensor, length: int) -> Tensor:
    return packed.new_empty((bits.shape[0], length))


def _fake_max_pool_codes(
    x: Tensor,
    kernel_size: tuple[int, int],
    stride: tuple[int, int],
    padding: tuple[int, int],
    dilation: tuple[int, int],
    ceil_mode: bool,
) -> Tensor:
    size = checks.output_size(x.shape[2:], kernel_size, stride, padding, dilation, ceil_mode)
    return x.new_empty((x.shape[0], *size, x.shape[1])).movedim(-1, 1)


def _fake_conv2d_integer(
    x: Tensor,
    weight: Tensor,
    zero_sums: Tensor | None,
    scale: Tensor,
    bias: Tensor,
    kernel_size: tuple[int, int],
    stride: tuple[int, int],
    padding: tuple[int, int],
    dilation: tuple[int, int],
    *arguments: Any,
) -> list[Tensor]:
    starts, sizes, values = arguments[-3:]
    height, width = checks.output_size(x.shape[2:], kernel_size, stride, padding, dilation)
    channels = [scale.shape[0]] if values is not None else []
    channels += [size if s.shape[0] else scale.shape[0] for s, size in zip(starts or (), sizes or (), strict=True)]
    dtypes = [torch.uint8 if i or values is None else checks.floating_dtype(values) for i in range(len(channels))]
    return [
        x.new_empty((x.shape[0], height, width, c), dtype=dtype).movedim(-1, 1)
        for c, dtype in zip(channels, dtypes, strict=True)
    ]


def _fake_out(*args: object, out: Tensor) -> None:
    return None


# --- the straight-through gradient of fake_quantize: one inside the clip range, zero outside ------------------


def _save_for_backward(ctx: torch.autograd.function.FunctionCtx, inputs: tuple[Tensor, ...], output: Tensor) -> None:
    x, scale, zero_point, bits, axis = inputs
    ctx.save_for_backward(x, scale, zero_point, bits)
    ctx.axis = axis  # type: ignore[attr-defined]


def _straight_through(
    ctx: torch.autograd.function.FunctionCtx, grad: Tensor
) -> tuple[Tensor, None, None, None, None]:
    x, scale, zero_point, bits = ctx.saved_tensors  # type: ignore[attr-defined]
    inside = reference.inside_clip_range(x, scale, zero_point, bits, ctx.axis)  # type: ignore[attr-defined]
    return grad * inside, None, None, None, None


def _out_of(
    function: Callable[..., Tensor], told_by: Callable[[Tensor], tuple[object, ...]] = lambda out: ()
) -> Callable[..., None]:
    """Make an out= kernel of a reference function, whose last arguments are what `told_by` finds out from out."""

    def kernel(*args: object, out: Tensor) -> None:
        out.copy_(function(*args, *told_by(out)))

    return kernel


_OUT: dict[str, Callable[..., None]] = {
    "fake_quantize": _out_of(reference.fake_quantize),
    "quantize": _out_of(reference.quantize),
    "quantize_pack": _out_of(reference.quantize_pack),
    "unpack_dequantize": _out_of(
        reference.unpack_dequantize, lambda out: (out.shape[1], checks.number_of(out.dtype))
    ),
    "pack_codes": _out_of(reference.pack_codes, lambda out: (out.shape[0],)),
    "unpack_codes": _out_of(reference.unpack_codes, lambda out: (out.shape[1],)),
}
_FAKES: dict[str, Callable[..., Tensor | list[Tensor]]] = {
    "channel_statistics": _fake_channel_statistics,
    "channel_histogram": _fake_channel_histogram,
    "fake_quantize": _fake_fake_quantize,
    "quantize": _fake_quantize,
    "quantize_pack": _fake_quantize_pack,
    "unpack_dequantize": _fake_unpack_dequantize,
    "pack_codes": _fake_pack_codes,
    "unpack_codes": _fake_unpack_codes,
    "max_pool_codes": _fake_max_pool_codes,
    "conv2d_integer": _fake_conv2d_integer,
}


def _checked(check: Callable[..., None], kernel: Callable[..., Any]) -> Callable[..., Any]:
    """Let a kernel of Python check its arguments and record no gradient, as the native ones do."""

    @torch.no_grad()
    def checked(*args: Any, **named: Any) -> Any:
        check(*args, **named)
        return kernel(*args, **named)

    return checked


def implement(library: torch.library.Library, namespace: str) -> None:
    """Register the fake kernels, the gradient and the reference in a namespace."""
    for name, fake in _FAKES.items():
        check = getattr(checks, name)
        torch.library.register_fake(f"{namespace}::{name}", _checked(check, fake), lib=library)
        library.impl(name, _checked(check, getattr(reference, name)), "CompositeExplicitAutograd")
    for name, kernel in _OUT.items():
        check = getattr(checks, f"{name}_out")
        torch.library.register_fake(f"{namespace}::{name}.out", _checked(check, _fake_out), lib=library)
        library.impl(f"{name}.out", _checked(check, kernel), "CompositeExplicitAutograd")
    torch.library.register_autograd(
        f"{namespace}::fake_quantize", _straight_through, setup_context=_save_for_backward, lib=library
    )


_library = (
    torch.library.Library(NAMESPACE, "FRAGMENT")
    if _native.cpu_loaded
    else define(NAMESPACE, (*SCHEMAS, *CPU_SCHEMAS))
)
implement(_library, NAMESPACE)
torch.library.register_fake(f"{NAMESPACE}::run_layers", layers.run_layers, lib=_library)
