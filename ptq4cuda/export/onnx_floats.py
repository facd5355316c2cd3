"""What stays in floating point as ONNX: a table of functions of torch, by their names, and of modules.

A function here takes the graph and what the one of torch takes, with a Ref in the place of a tensor and of a size of
a batch.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ptq4cuda.compat import explicit_padding
from ptq4cuda.export.onnx_graph import NotExportable, OnnxGraph, Ref
from ptq4cuda.nn import QuantModule
from ptq4cuda.nn.spec import per_dim

FUNCTIONS: dict[str, Callable[..., Any]] = {}
MODULES: dict[type[nn.Module], Callable[[OnnxGraph, Any, Ref], Any]] = {}
_WHOLE = 2**63 - 1


def _named(*names: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    def keep(function: Callable[..., Any]) -> Callable[..., Any]:
        FUNCTIONS.update(dict.fromkeys(names, function))
        return function

    return keep


def operand(g: OnnxGraph, value: Any, like: str = "float32") -> str:
    """Return the name of a tensor, a constant one, or a number."""
    if isinstance(value, Ref):
        return value.name
    if isinstance(value, Tensor):
        return g.constant(value.float() if value.is_floating_point() else value)
    if not isinstance(value, (int, float)):
        raise NotExportable(f"an argument is {type(value).__name__}")
    return g.constant(value, like)


def _sizes(g: OnnxGraph, sizes: Sequence[Any]) -> str:
    """Return the name of an int64 vector of sizes."""
    if not any(isinstance(size, Ref) for size in sizes):
        return g.constant(list(sizes), "int64")
    one = g.constant([1], "int64")
    parts = [g.op("Reshape", operand(g, size, "int64"), one) for size in sizes]
    return g.op("Concat", *parts, axis=0)


def _flat(sizes: Sequence[Any]) -> Sequence[Any]:
    """Return sizes that were given one by one or as a sequence."""
    return sizes[0] if len(sizes) == 1 and isinstance(sizes[0], (tuple, list)) else sizes


# --- of one tensor, element by element ------------------------------------------------------------------------

_SAME = {
    "Relu": "relu relu_ ReLU",
    "Sigmoid": "sigmoid sigmoid_ Sigmoid",
    "Tanh": "tanh tanh_ Tanh",
    "HardSwish": "hardswish Hardswish",
    "Mish": "mish Mish",
    "Softsign": "softsign Softsign",
    "Exp": "exp",
    "Log": "log",
    "Sqrt": "sqrt",
    "Abs": "abs",
    "Neg": "neg",
    "Erf": "erf",
    "Floor": "floor",
    "Ceil": "ceil",
    "Round": "round",
}


def _elementwise(kind: str) -> Callable[..., Any]:
    return lambda g, x, inplace=False: Ref(g.op(kind, x.name))


def _module(kind: str) -> Callable[[OnnxGraph, Any, Ref], Ref]:
    return lambda g, module, x: Ref(g.op(kind, x.name))


for _kind, _names in _SAME.items():
    for _name in _names.split():
        if hasattr(nn, _name):
            MODULES[getattr(nn, _name)] = _module(_kind)
        else:
            FUNCTIONS[_name] = _elementwise(_kind)


@_named("contiguous", "clone", "detach")
def _same(g: OnnxGraph, x: Any, memory_format: Any = None) -> Any:
    return x


@_named("dropout", "dropout1d", "dropout2d")
def _dropout(g: OnnxGraph, x: Ref, p: float = 0.5, training: bool = True, inplace: bool = False) -> Ref:
    if training and p:
        raise NotExportable("it drops values at random")
    return x


# Networks are in evaluation mode.
MODULES |= dict.fromkeys((nn.Identity, nn.Dropout, nn.Dropout1d, nn.Dropout2d), lambda g, m, x: x)


@_named("silu", "silu_")
def _silu(g: OnnxGraph, x: Ref, inplace: bool = False) -> Ref:
    return Ref(g.op("Mul", x.name, g.op("Sigmoid", x.name)))


@_named("hardsigmoid")
def _hardsigmoid(g: OnnxGraph, x: Ref, inplace: bool = False) -> Ref:
    return Ref(g.op("HardSigmoid", x.name, alpha=1 / 6, beta=0.5))


@_named("gelu")
def _gelu(g: OnnxGraph, x: Ref, approximate: str = "none") -> Ref:
    return Ref(g.op("Gelu", x.name, approximate=approximate))


@_named("leaky_relu", "leaky_relu_")
def _leaky_relu(g: OnnxGraph, x: Ref, negative_slope: float = 0.01, inplace: bool = False) -> Ref:
    return Ref(g.op("LeakyRelu", x.name, alpha=negative_slope))


@_named("elu")
def _elu(g: OnnxGraph, x: Ref, alpha: float = 1.0, inplace: bool = False) -> Ref:
    return Ref(g.op("Elu", x.name, alpha=alpha))


@_named("prelu")
def _prelu(g: OnnxGraph, x: Ref, weight: Any) -> Ref:
    weight = weight.detach().cpu().float()
    rank = len(g.shape(x.name))
    shape = (-1, *(1,) * (rank - 2)) if weight.numel() > 1 else ()
    return Ref(g.op("PRelu", x.name, g.constant(weight.reshape(shape))))


@_named("clamp", "clip", "clamp_")
def _clamp(g: OnnxGraph, x: Ref, min: Any = None, max: Any = None) -> Ref:
    return Ref(g.op("Clip", x.name, *("" if limit is None else operand(g, limit) for limit in (min, max))))


FUNCTIONS["clamp_min"] = lambda g, x, min: _clamp(g, x, min)
FUNCTIONS["clamp_max"] = lambda g, x, max: _clamp(g, x, None, max)
FUNCTIONS["relu6"] = lambda g, x, inplace=False: _clamp(g, x, 0, 6)
FUNCTIONS["hardtanh"] = lambda g, x, min_val=-1.0, max_val=1.0, inplace=False: _clamp(g, x, min_val, max_val)


def _softmax(kind: str) -> Callable[..., Any]:
    def function(g: OnnxGraph, x: Ref, dim: int | None = None, _stacklevel: int = 3, dtype: Any = None) -> Ref:
        if dim is None or dtype is not None:
            raise NotExportable("it is called without dim" if dim is None else "dtype is given")
        return Ref(g.op(kind, x.name, axis=dim))

    return function


FUNCTIONS |= {"softmax": _softmax("Softmax"), "log_softmax": _softmax("LogSoftmax")}

MODULES |= {
    nn.SiLU: lambda g, m, x: _silu(g, x),
    nn.Hardsigmoid: lambda g, m, x: _hardsigmoid(g, x),
    nn.GELU: lambda g, m, x: _gelu(g, x, m.approximate),
    nn.LeakyReLU: lambda g, m, x: _leaky_relu(g, x, m.negative_slope),
    nn.ELU: lambda g, m, x: _elu(g, x, m.alpha),
    nn.PReLU: lambda g, m, x: _prelu(g, x, m.weight),
    nn.Hardtanh: lambda g, m, x: _clamp(g, x, m.min_val, m.max_val),
    nn.ReLU6: lambda g, m, x: _clamp(g, x, 0, 6),
    nn.Softmax: lambda g, m, x: FUNCTIONS["softmax"](g, x, m.dim),
    nn.LogSoftmax: lambda g, m, x: FUNCTIONS["log_softmax"](g, x, m.dim),
}


# --- of two tensors, or of sizes ------------------------------------------------------------------------------


def _binary(kind: str, compute: Callable[[Any, Any], Any], takes: str = "both") -> Callable[..., Any]:
    def function(g: OnnxGraph, a: Any, b: Any, *, alpha: float = 1) -> Any:
        if alpha != 1:
            raise NotExportable("alpha is not 1")
        if not isinstance(a, (Ref, Tensor)) and not isinstance(b, (Ref, Tensor)):
            return compute(a, b)
        of_sizes = any(isinstance(x, Ref) and x.name in g.sizes for x in (a, b))
        if takes != "both" and takes != ("sizes" if of_sizes else "values"):
            raise NotExportable(f"it is called with {'sizes' if of_sizes else 'values'}")
        like = "int64" if of_sizes else "float32"
        y = g.op(kind, operand(g, a, like), operand(g, b, like))
        if of_sizes:
            g.sizes.add(y)
        return Ref(y)

    return function


for _kind, _names, _compute, _takes in (
    ("Add", "add add_ iadd", operator.add, "both"),
    ("Sub", "sub sub_ isub", operator.sub, "both"),
    ("Mul", "mul mul_ imul multiply", operator.mul, "both"),
    ("Div", "div div_ truediv itruediv", operator.truediv, "values"),
    ("Div", "floordiv", operator.floordiv, "sizes"),
    ("Pow", "pow", operator.pow, "values"),
    ("Max", "maximum", max, "values"),
    ("Min", "minimum", min, "values"),
    ("MatMul", "matmul bmm mm", operator.matmul, "values"),
):
    FUNCTIONS |= dict.fromkeys(_names.split(), _binary(_kind, _compute, _takes))


# --- layers ---------------------------------------------------------------------------------------------------


def layer(g: OnnxGraph, m: Any, x: Ref, weight: str, bias: str = "") -> Ref:
    """Add a convolution, a transposed one or a fully connected layer as a module of torch, or a quantized one, is."""
    if m.weight.dim() == 2:
        y = g.op("MatMul", x.name, g.op("Transpose", weight, perm=[1, 0]))
        return Ref(g.op("Add", y, bias) if bias else y)
    dims, name, padding = m.weight.dim() - 2, x.name, m.padding
    if m.padding_mode != "zeros":
        around = m.explicit_padding if isinstance(m, QuantModule) else explicit_padding(m)
        name, padding = pad(g, x, around, m.padding_mode).name, (0,) * dims
    if padding == "same":
        total = [d * (k - 1) for k, d in zip(m.kernel_size, m.dilation, strict=True)]
        pads = [t // 2 for t in total] + [t - t // 2 for t in total]
    else:
        pads = list(per_dim(0 if padding == "valid" else padding, dims)) * 2
    kind = "ConvTranspose" if "Transpose" in type(m).__name__ else "Conv"
    more: dict[str, Any] = {"output_padding": list(m.output_padding)} if kind != "Conv" else {}
    geometry = {"strides": list(m.stride), "dilations": list(m.dilation), "group": m.groups}
    return Ref(g.op(kind, name, weight, *filter(None, [bias]), pads=pads, **geometry, **more))


def _layer(g: OnnxGraph, m: Any, x: Ref) -> Ref:
    return layer(g, m, x, g.constant(m.weight.float()), "" if m.bias is None else g.constant(m.bias.float()))


def _batch_norm(g: OnnxGraph, m: Any, x: Ref) -> Ref:
    if m.running_var is None:
        raise NotExportable("it normalizes with the statistics of each batch")
    ones = torch.ones_like(m.running_var)
    affine = (ones if m.weight is None else m.weight, 0 * ones if m.bias is None else m.bias)
    constants = [g.constant(t.float()) for t in (*affine, m.running_mean, m.running_var)]
    return Ref(g.op("BatchNormalization", x.name, *constants, epsilon=m.eps))


@_named("layer_norm")
def _layer_norm(
    g: OnnxGraph, x: Ref, normalized_shape: Sequence[int], weight: Any = None, bias: Any = None, eps: float = 1e-5
) -> Ref:
    weight = torch.ones(tuple(normalized_shape)) if weight is None else weight
    inputs = [x.name, operand(g, weight), *([] if bias is None else [operand(g, bias)])]
    return Ref(g.op("LayerNormalization", *inputs, axis=-len(normalized_shape), epsilon=eps))


def _group_norm(g: OnnxGraph, m: Any, x: Ref) -> Ref:
    ones = torch.ones(m.num_channels)
    affine = (ones if m.weight is None else m.weight, 0 * ones if m.bias is None else m.bias)
    constants = [g.constant(t.float()) for t in affine]
    return Ref(g.op("GroupNormalization", x.name, *constants, num_groups=m.num_groups, epsilon=m.eps))


MODULES |= dict.fromkeys((nn.Conv1d, nn.Conv2d, nn.Conv3d), _layer)
MODULES |= dict.fromkeys((nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d), _layer)
MODULES |= dict.fromkeys((nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d), _batch_norm)
MODULES |= {
    nn.Linear: _layer,
    nn.LayerNorm: lambda g, m, x: _layer_norm(g, x, m.normalized_shape, m.weight, m.bias, m.eps),
    nn.GroupNorm: _group_norm,
}


# --- pooling and other sizes ----------------------------------------------------------------------------------


def _window(dims: int, kernel: Any, stride: Any, padding: Any, ceil: bool) -> dict[str, Any]:
    return {
        "kernel_shape": per_dim(kernel, dims),
        "strides": per_dim(kernel if stride is None or stride == [] else stride, dims),
        "pads": per_dim(padding, dims) * 2,
        "ceil_mode": int(ceil),
    }


def _adaptive(g: OnnxGraph, x: Ref, dims: int, size: Any, kind: str) -> Ref:
    sizes = (size,) * dims if isinstance(size, int) else tuple(size)
    if all(n == 1 for n in sizes):
        return Ref(g.op(f"Global{kind}Pool", x.name))
    found = g.sizes_of(x.name)[-dims:]
    wanted = [f if n is None else n for f, n in zip(found, sizes, strict=True)]
    each = list(zip(found, wanted, strict=True))
    if not any(f % n for f, n in each):
        kernel = [f // n for f, n in each]
        return x if max(kernel) == 1 else Ref(g.op(f"{kind}Pool", x.name, kernel_shape=kernel, strides=kernel))
    if kind != "Average":
        raise NotExportable(f"it makes {wanted} of {found}, with windows of several sizes")
    means = [nn.functional.adaptive_avg_pool1d(torch.eye(f)[None], n)[0] for f, n in each]  # [f, n] each
    y = g.op("MatMul", x.name, g.constant(means[-1]))
    return Ref(y if dims == 1 else g.op("MatMul", g.constant(means[0].t()), y))


def _pooling(dims: int) -> None:
    @_named(f"avg_pool{dims}d")
    def average(
        g: OnnxGraph,
        x: Ref,
        kernel_size: Any,
        stride: Any = None,
        padding: Any = 0,
        ceil_mode: bool = False,
        count_include_pad: bool = True,
        divisor_override: int | None = None,
    ) -> Ref:
        if divisor_override is not None:
            raise NotExportable("divisor_override is given")
        window = _window(dims, kernel_size, stride, padding, ceil_mode)
        return Ref(g.op("AveragePool", x.name, count_include_pad=int(count_include_pad), **window))

    @_named(f"max_pool{dims}d")
    def maximum(
        g: OnnxGraph,
        x: Ref,
        kernel_size: Any,
        stride: Any = None,
        padding: Any = 0,
        dilation: Any = 1,
        ceil_mode: bool = False,
        return_indices: bool = False,
    ) -> Ref:
        if return_indices:
            raise NotExportable("it returns indices")
        window = _window(dims, kernel_size, stride, padding, ceil_mode)
        return Ref(g.op("MaxPool", x.name, dilations=per_dim(dilation, dims), **window))

    def of_module(function: Callable[..., Ref], names: str) -> Callable[[OnnxGraph, Any, Ref], Ref]:
        return lambda g, m, x: function(
            g, x, **{name: getattr(m, name) for name in names.split() if hasattr(m, name)}
        )

    window = "kernel_size stride padding ceil_mode"
    MODULES[getattr(nn, f"AvgPool{dims}d")] = of_module(average, f"{window} count_include_pad divisor_override")
    MODULES[getattr(nn, f"MaxPool{dims}d")] = of_module(maximum, f"{window} dilation return_indices")
    for kind, name in (("Average", "avg"), ("Max", "max")):

        def adaptive(g: OnnxGraph, x: Ref, output_size: Any, kind: str = kind) -> Ref:
            return _adaptive(g, x, dims, output_size, kind)

        FUNCTIONS[f"adaptive_{name}_pool{dims}d"] = adaptive
        MODULES[getattr(nn, f"Adaptive{name.title()}Pool{dims}d")] = of_module(adaptive, "output_size")


for _dims in (1, 2):
    _pooling(_dims)


@_named("interpolate", "upsample")
def _interpolate(
    g: OnnxGraph,
    x: Ref,
    size: Any = None,
    scale_factor: Any = None,
    mode: str = "nearest",
    align_corners: bool | None = None,
    recompute_scale_factor: bool | None = None,
    antialias: bool = False,
) -> Ref:
    kinds = {"nearest": "nearest", "bilinear": "linear", "linear": "linear", "bicubic": "cubic"}
    if mode not in kinds or antialias:
        raise NotExportable(f"its mode is {mode!r}" if mode not in kinds else "antialias is given")
    dims = len(g.shape(x.name)) - 2
    corners = "align_corners" if align_corners else "asymmetric" if mode == "nearest" else "pytorch_half_pixel"
    more: dict[str, Any] = {"nearest_mode": "floor"} if mode == "nearest" else {"cubic_coeff_a": -0.75}
    axes = list(range(2, 2 + dims))
    if size is not None:
        size = size if isinstance(size, (tuple, list)) else [size] * dims
        inputs = ["", "", _sizes(g, list(size))]
    else:
        factors = per_dim(scale_factor, dims) if isinstance(scale_factor, (tuple, list)) else (scale_factor,) * dims
        inputs = ["", g.constant([float(f) for f in factors], "float32")]
    return Ref(
        g.op("Resize", x.name, *inputs, mode=kinds[mode], coordinate_transformation_mode=corners, axes=axes, **more)
    )


MODULES |= dict.fromkeys(
    (nn.Upsample, nn.UpsamplingNearest2d, nn.UpsamplingBilinear2d),
    lambda g, m, x: _interpolate(g, x, m.size, m.scale_factor, m.mode, m.align_corners),
)


@_named("pad")
def pad(g: OnnxGraph, x: Ref, pad: Sequence[int], mode: str = "constant", value: float | None = None) -> Ref:
    """Add a padding, as torch.nn.functional.pad."""
    kinds = {"constant": "constant", "reflect": "reflect", "replicate": "edge", "circular": "wrap"}
    if mode not in kinds or any(isinstance(p, Ref) for p in pad):
        raise NotExportable(f"its mode is {mode!r}" if mode not in kinds else "padding depends on sizes")
    dims = len(pad) // 2
    before, after = list(pad[0::2])[::-1], list(pad[1::2])[::-1]
    axes = g.constant(list(range(-dims, 0)), "int64")
    constant = g.constant(0.0 if value is None else value, "float32") if kinds[mode] == "constant" else ""
    return Ref(g.op("Pad", x.name, g.constant(before + after, "int64"), constant, axes, mode=kinds[mode]))


MODULES |= {
    nn.ZeroPad2d: lambda g, m, x: pad(g, x, m.padding),
    nn.ConstantPad2d: lambda g, m, x: pad(g, x, m.padding, value=m.value),
    nn.ReflectionPad2d: lambda g, m, x: pad(g, x, m.padding, "reflect"),
    nn.ReplicationPad2d: lambda g, m, x: pad(g, x, m.padding, "replicate"),
}


def _reduction(kind: str) -> Callable[..., Any]:
    def function(g: OnnxGraph, x: Ref, dim: Any = None, keepdim: bool = False) -> Ref:
        axes = [] if dim is None else [g.constant([dim] if isinstance(dim, int) else list(dim), "int64")]
        return Ref(g.op(kind, x.name, *axes, keepdims=int(keepdim)))

    return function


FUNCTIONS |= {"mean": _reduction("ReduceMean"), "sum": _reduction("ReduceSum"), "amax": _reduction("ReduceMax")}


@_named("normalize")
def _normalize(g: OnnxGraph, x: Ref, p: float = 2.0, dim: int = 1, eps: float = 1e-12) -> Ref:
    if p != 2:
        raise NotExportable(f"p is {p}")
    length = g.op("ReduceL2", x.name, g.constant([dim], "int64"), keepdims=1)
    return Ref(g.op("Div", x.name, g.op("Max", length, g.constant(eps, "float32"))))


# --- what moves -----------------------------------------------------------------------------------------------


@_named("cat", "concat", "concatenate")
def _cat(g: OnnxGraph, tensors: Sequence[Any], dim: int = 0) -> Ref:
    return Ref(g.op("Concat", *(operand(g, t) for t in tensors), axis=dim))


@_named("stack")
def _stack(g: OnnxGraph, tensors: Sequence[Any], dim: int = 0) -> Ref:
    return Ref(g.op("Concat", *(_unsqueezed(g, operand(g, t), dim) for t in tensors), axis=dim))


def _unsqueezed(g: OnnxGraph, name: str, dim: int) -> str:
    return g.op("Unsqueeze", name, g.constant([dim], "int64"))


@_named("unsqueeze")
def _unsqueeze(g: OnnxGraph, x: Ref, dim: int) -> Ref:
    return Ref(_unsqueezed(g, x.name, dim))


@_named("squeeze")
def _squeeze(g: OnnxGraph, x: Ref, dim: Any = None) -> Ref:
    if dim is None:
        raise NotExportable("squeeze is called without dim")
    shape = g.shape(x.name)
    dims = [d for d in ([dim] if isinstance(dim, int) else dim) if shape[d] == 1]
    return Ref(g.op("Squeeze", x.name, g.constant(dims, "int64"))) if dims else x


@_named("flatten")
def _flatten(g: OnnxGraph, x: Ref, start_dim: int = 0, end_dim: int = -1) -> Ref:
    shape = g.shape(x.name)
    start, end = start_dim % len(shape), end_dim % len(shape)
    behind = g.sizes_of(x.name)[end:] if end + 1 < len(shape) else []
    return Ref(g.op("Reshape", x.name, g.constant([0] * start + [-1, *behind], "int64")))


MODULES |= {
    nn.Flatten: lambda g, m, x: _flatten(g, x, m.start_dim, m.end_dim),
    nn.PixelShuffle: lambda g, m, x: _pixel_shuffle(g, x, m.upscale_factor),
    nn.PixelUnshuffle: lambda g, m, x: _pixel_unshuffle(g, x, m.downscale_factor),
    nn.Unflatten: lambda g, m, x: _unflatten(g, x, m.dim, m.unflattened_size),
}


@_named("reshape", "view")
def _reshape(g: OnnxGraph, x: Ref, *sizes: Any, shape: Any = None) -> Ref:
    wanted = list(shape if shape is not None else _flat(sizes))
    if -1 not in wanted and sum(isinstance(size, Ref) for size in wanted) == 1:
        wanted = [-1 if isinstance(size, Ref) else size for size in wanted]
    return Ref(g.op("Reshape", x.name, _sizes(g, wanted)))


@_named("unflatten")
def _unflatten(g: OnnxGraph, x: Ref, dim: int, sizes: Sequence[Any]) -> Ref:
    rank = len(g.shape(x.name))
    dim %= rank
    behind = [_size(g, x, d) for d in range(dim + 1, rank)]
    return Ref(g.op("Reshape", x.name, _sizes(g, [*(0,) * dim, *sizes, *behind])))


@_named("permute")
def _permute(g: OnnxGraph, x: Ref, *dims: Any) -> Ref:
    order = _flat(dims)
    return Ref(g.op("Transpose", x.name, perm=[d % len(order) for d in order]))


@_named("transpose", "swapaxes")
def _transpose(g: OnnxGraph, x: Ref, dim0: int, dim1: int) -> Ref:
    order = list(range(len(g.shape(x.name))))
    order[dim0], order[dim1] = order[dim1], order[dim0]
    return Ref(g.op("Transpose", x.name, perm=order))


@_named("pixel_shuffle")
def _pixel_shuffle(g: OnnxGraph, x: Ref, upscale_factor: int) -> Ref:
    return Ref(g.op("DepthToSpace", x.name, blocksize=upscale_factor, mode="CRD"))


@_named("pixel_unshuffle")
def _pixel_unshuffle(g: OnnxGraph, x: Ref, downscale_factor: int) -> Ref:
    n, f = 0, downscale_factor
    channels, height, width = g.sizes_of(x.name)
    y = g.op("Reshape", x.name, g.constant([n, channels, height // f, f, width // f, f], "int64"))
    y = g.op("Transpose", y, perm=[0, 1, 3, 5, 2, 4])
    return Ref(g.op("Reshape", y, g.constant([n, channels * f * f, height // f, width // f], "int64")))


@_named("chunk")
def _chunk(g: OnnxGraph, x: Ref, chunks: int, dim: int = 0) -> tuple[Ref, ...]:
    size = g.shape(x.name)[dim]
    if size is None:
        raise NotExportable("it splits the dimension of the batch")
    return _sections(g, x, size, -(-size // chunks), dim)


@_named("split")
def _split(g: OnnxGraph, x: Ref, split_size_or_sections: Any, dim: int = 0) -> tuple[Ref, ...]:
    size = g.shape(x.name)[dim]
    if size is None:
        raise NotExportable("it splits the dimension of the batch")
    return _sections(g, x, size, split_size_or_sections, dim)


def _sections(g: OnnxGraph, x: Ref, size: int, sections: int | Sequence[int], dim: int) -> tuple[Ref, ...]:
    if isinstance(sections, int):
        sections = [min(sections, size - first) for first in range(0, size, sections)]
    if len(sections) == 1:
        return (x,)
    parts = g.ops("Split", x.name, g.constant(list(sections), "int64"), outputs=len(sections), axis=dim)
    return tuple(map(Ref, parts))


@_named("getitem")
def _getitem(g: OnnxGraph, x: Any, key: Any) -> Any:
    if not isinstance(x, Ref):
        return x[key]
    rank = len(g.shape(x.name))
    keys = list(key) if isinstance(key, tuple) else [key]
    if Ellipsis in keys:
        i = keys.index(Ellipsis)
        given = sum(k is not None for k in keys) - 1
        keys[i : i + 1] = [slice(None)] * (rank - given)
    y, axis = x.name, 0
    dropped: list[int] = []
    added: list[int] = []
    starts, ends, axes, strides = [], [], [], []
    for place, k in enumerate(keys):
        if k is None:
            added.append(place - len(dropped))
            continue
        if isinstance(k, slice):
            if k != slice(None):
                starts.append(0 if k.start is None else k.start)
                ends.append(_WHOLE if k.stop is None else k.stop)
                strides.append(1 if k.step is None else k.step)
                axes.append(axis)
        elif isinstance(k, int):
            starts.append(k)
            ends.append(k + 1 if k != -1 else _WHOLE)
            strides.append(1)
            axes.append(axis)
            dropped.append(axis)
        else:
            raise NotExportable(f"it is indexed by {type(k).__name__}")
        axis += 1
    if axes:
        y = g.op("Slice", y, _sizes(g, starts), _sizes(g, ends), g.constant(axes, "int64"), _sizes(g, strides))
    if dropped:
        y = g.op("Squeeze", y, g.constant(dropped, "int64"))
    if added:
        y = g.op("Unsqueeze", y, g.constant(added, "int64"))
    return Ref(y)


# --- sizes ----------------------------------------------------------------------------------------------------


def _size(g: OnnxGraph, x: Ref, dim: int) -> Any:
    """Return a size: a number, or a tensor where it is that of the batch."""
    size = g.shape(x.name)[dim]
    return _batch(g, x, dim) if size is None else size


def _batch(g: OnnxGraph, x: Ref, dim: int) -> Ref:
    y = g.op("Gather", g.op("Shape", x.name), g.constant(dim, "int64"))
    g.sizes.add(y)
    return Ref(y)


@_named("size")
def _sizes_of(g: OnnxGraph, x: Ref, dim: int | None = None) -> Any:
    if dim is not None:
        return _size(g, x, dim)
    return tuple(_batch(g, x, d) if size is None else size for d, size in enumerate(g.shape(x.name)))


@_named("getattr")
def _getattr(g: OnnxGraph, x: Ref, name: str) -> Any:
    if name == "shape":
        return _sizes_of(g, x)
    if name in ("ndim",):
        return len(g.shape(x.name))
    raise NotExportable(f"it asks a tensor for its {name}")


@_named("dim", "ndimension")
def _dim(g: OnnxGraph, x: Ref) -> int:
    return len(g.shape(x.name))


@_named("int")
def _int(g: OnnxGraph, x: Any) -> Any:
    return x if isinstance(x, Ref) else int(x)


@_named("expect")
def _expect(g: OnnxGraph, value: Any, constant: Any, name: str) -> None:
    if isinstance(value, Ref) or value != constant:
        raise NotExportable(f"the network was quantized with {name}={constant!r}, and the example has another")


@_named("expand")
def _expand(g: OnnxGraph, x: Ref, *sizes: Any) -> Ref:
    wanted = [1 if size == -1 else size for size in _flat(sizes)]  # Expand keeps the larger of both
    return Ref(g.op("Expand", x.name, _sizes(g, wanted)))
