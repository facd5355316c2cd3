"""What is known of the shapes of a graph's tensors without running it.

A dimension is a number where the layers determine it, as channels are, or a symbol: the same object wherever it is
the same size, as the batch from the first to the last layer. Batch and image sizes stay symbols, so that what is
concluded holds for all of them.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor, fx, nn

from ptq4cuda.compat import BatchNorm
from ptq4cuda.graph.functionalize import with_item
from ptq4cuda.graph.readers import is_number
from ptq4cuda.nn import spec_of


class Size:
    """A size that depends on the input."""


Dim = int | Size
Shape = tuple[Dim, ...]

_MOVES = frozenset(
    [
        *("transpose", "swapaxes", "swapdims", "permute", "unsqueeze", "flatten", "reshape", "reshape_as"),
        *("contiguous", "clone", "detach"),
    ]
)

NORMS = (BatchNorm, nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d)
DROPOUTS = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout, nn.FeatureAlphaDropout)
_UNARY_MODULES = (
    *(*NORMS, *DROPOUTS, nn.Identity, nn.GroupNorm, nn.LayerNorm),
    *(nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.PReLU, nn.ELU, nn.SELU, nn.CELU, nn.GELU, nn.SiLU, nn.Mish, nn.Sigmoid),
    *(nn.Tanh, nn.Hardtanh, nn.Hardswish, nn.Hardsigmoid, nn.Softplus, nn.Softsign, nn.LogSigmoid, nn.Softmax),
)
_UNARY_NAMES = (
    "relu relu6 leaky_relu prelu elu selu celu gelu silu mish sigmoid tanh hardtanh hardswish hardsigmoid softplus "
    "softsign logsigmoid softmax log_softmax dropout dropout1d dropout2d dropout3d alpha_dropout batch_norm "
    "layer_norm group_norm instance_norm normalize clamp clip clamp_min clamp_max abs exp log sqrt rsqrt neg square "
    "contiguous clone detach float half bfloat16 double to type type_as with_item"
)
_UNARY = frozenset(_UNARY_NAMES.split())
_BINARY = frozenset(["add", "sub", "mul", "div", "truediv", "pow", "maximum", "minimum", "where"])
_POOLS = tuple(
    (dims, tuple(getattr(nn, f"{kind}Pool{dims}d") for kind in ("Max", "Avg", "AdaptiveMax", "AdaptiveAvg")))
    for dims in (1, 2, 3)
)
_POOL_NAMES = {
    f"{kind}_pool{dims}d": dims for kind in ("max", "avg", "adaptive_max", "adaptive_avg") for dims in (1, 2, 3)
}
_REDUCTIONS = frozenset(["mean", "sum", "amax", "amin"])
_ARITHMETIC: dict[Any, Callable[..., Any]] = {
    function: function
    for function in (
        *(operator.add, operator.sub, operator.mul, operator.floordiv, operator.truediv, operator.mod, operator.neg),
        *(operator.eq, operator.ne, operator.lt, operator.le, operator.gt, operator.ge, operator.not_),
        *(operator.and_, operator.or_, operator.is_, operator.is_not, int, bool),
    )
}


def name_of(node: fx.Node, network: nn.Module) -> str:
    """Return the name of the function or method of torch that a node calls, as a module too; "" for all others."""
    if node.op == "call_module":
        return "flatten" if type(network.get_submodule(str(node.target))) is nn.Flatten else ""
    if node.op == "call_method":
        return str(node.target)
    module = getattr(node.target, "__module__", None) or "torch"  # functions of C have none
    own = module.partition(".")[0] in ("torch", "_operator", "builtins") or node.target is with_item
    return getattr(node.target, "__name__", "") if node.op == "call_function" and own else ""


def source_of(node: fx.Node) -> fx.Node:
    """Return the first argument of a call, which must be a node."""
    source = node.args[0] if node.args else node.kwargs["input"]
    assert isinstance(source, fx.Node)
    return source


def is_move(node: fx.Node, network: nn.Module) -> bool:
    """Tell whether a node only moves the values of its first argument, all of them."""
    return name_of(node, network) in _MOVES and isinstance(node.args[0] if node.args else None, fx.Node)


def infer_shapes(network: fx.GraphModule) -> Shapes:
    """Infer the shapes of a traced network's tensors and the values of what it computes from shapes."""
    shapes = Shapes(network)
    for node in network.graph.nodes:
        shapes.visit(node)
    return shapes


class Shapes:
    """Shapes of tensors and values of numbers, both by node; what is not in them is not known.

    Args:
        network: whose modules and parameters the nodes name.
    """

    def __init__(self, network: nn.Module) -> None:
        self.network = network
        self.tensors: dict[fx.Node, Shape] = {}
        self.pieces: dict[fx.Node, list[Shape]] = {}  # of what returns several tensors
        self.numbers: dict[fx.Node, Any] = {}

    def visit(self, node: fx.Node) -> None:
        """Infer what is known of a node from what is known of those before."""
        source = node.args[0] if node.args else node.kwargs.get("input")
        if node.op == "get_attr":
            value = _attribute(self.network, str(node.target))
            if isinstance(value, Tensor):
                self.tensors[node] = tuple(value.shape)
        elif isinstance(source, fx.Node) and is_number(node):
            self._number(node, source)
        elif node.op == "call_function" and self._is_computed(node):
            self._compute(node)
        elif node.op.startswith("call") and isinstance(source, (fx.Node, tuple, list)):
            try:
                shape = self._item(node, source) if node.target is operator.getitem else self._shape(node, source)
            except (IndexError, ValueError, TypeError):  # the call would fail, or is of a form that is not known
                shape = None
            if shape is not None and _returns_indices(node, self.network):
                self.pieces[node] = [shape, shape]
            elif shape is not None:
                self.tensors[node] = shape

    def rename(self, old: fx.Node, new: fx.Node) -> None:
        """Let a node have what is known of another that it takes the place of."""
        if old in self.tensors:
            self.tensors[new] = self.tensors[old]

    # --- numbers ------------------------------------------------------------------------------------------------

    def _number(self, node: fx.Node, source: fx.Node) -> None:
        shape = self.tensors.get(source)
        if shape is None:
            return
        what = node.args[1] if node.target is getattr else node.target
        if what == "shape" or (what == "size" and len(node.args) == 1 and not node.kwargs):
            self.numbers[node] = shape
        elif what == "size":
            index = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim")
            if isinstance(index, int) and -len(shape) <= index < len(shape):
                self.numbers[node] = shape[index]
        elif what in ("ndim", "dim", "ndimension"):
            self.numbers[node] = len(shape)

    def _is_computed(self, node: fx.Node) -> bool:
        inputs = node.all_input_nodes
        return bool(inputs) and all(n in self.numbers for n in inputs)

    def _compute(self, node: fx.Node) -> None:
        args: Any = fx.node.map_arg(node.args, self.numbers.__getitem__)
        sizes = args[0] if args and isinstance(args[0], tuple) else None
        if sizes is not None:
            try:
                if node.target is operator.getitem and not _symbols(args[1:]):
                    self.numbers[node] = sizes[args[1]]
                elif node.target is operator.add:
                    self.numbers[node] = sizes + tuple(args[1])
                elif node.target is len:
                    self.numbers[node] = len(sizes)
            except (IndexError, TypeError):
                return
        elif node.target in _ARITHMETIC and not node.kwargs:
            try:
                self.numbers[node] = Size() if _symbols(args) else _ARITHMETIC[node.target](*args)
            except (ArithmeticError, TypeError):  # as it will where it is computed
                return

    def known(self, node: fx.Node) -> int | bool | None:
        """Return the number that a node computes for all inputs, or None."""
        value = self.numbers.get(node)
        return value if isinstance(value, int) else None

    # --- tensors ------------------------------------------------------------------------------------------------

    def of(self, node: object) -> Shape | None:
        """Return the shape of a node, or None."""
        return self.tensors.get(node) if isinstance(node, fx.Node) else None

    def _shape(self, node: fx.Node, source: Any) -> Shape | None:
        x, name = self.of(source), name_of(node, self.network)
        if node.op == "call_module" and not name:
            return self._of_module(self.network.get_submodule(str(node.target)), x)
        args = self._arguments(node)
        if name == "conv2d":
            weight = self.of(args[0] if args else node.kwargs.get("weight"))
            batch = x[0] if x is not None and len(x) == 4 else Size()
            return None if weight is None else (batch, weight[0], Size(), Size())
        if name == "linear":
            weight = self.of(args[0] if args else node.kwargs.get("weight"))
            return None if weight is None or x is None else (*x[:-1], weight[0])
        if name in ("cat", "concat", "concatenate") and isinstance(source, (tuple, list)):
            return self._concatenated(node, source)
        if name in _BINARY and (name != "where" or len(node.args) == 3):  # a condition alone gives several tensors
            return self._broadcast([*node.args, *node.kwargs.values()])
        if name in _UNARY:
            return x
        if name == "matmul" and x is not None:
            other = self.of(args[0]) if args else None
            return (*x[:-1], other[-1]) if other is not None and len(other) == len(x) > 1 else None
        if name in ("chunk", "split") and x is not None:
            pieces = self._cut(name, x, args, node.kwargs)
            if pieces is not None:
                self.pieces[node] = pieces
            return None
        if name in ("reshape", "view", "reshape_as", "view_as", "expand_as"):
            return reshaped(name, x, args, node.kwargs, self._value)
        return None if x is None else moved(name, x, args, node.kwargs)

    def _item(self, node: fx.Node, source: Any) -> Shape | None:
        index = node.args[1]
        if source in self.pieces:
            return self.pieces[source][index] if isinstance(index, int) else None
        x, parts = self.of(source), [*index] if isinstance(index, tuple) else [index]
        if x is None:
            return None
        if ... in parts:
            at = parts.index(...)
            taken = sum(part is not None and part is not ... for part in parts)
            parts[at : at + 1] = [slice(None)] * (len(x) - taken)
        left, shape = list(x), list[Dim]()
        for part in parts:
            if part is None:
                shape.append(1)
            elif isinstance(part, slice):
                size = left.pop(0)
                shape.append(size if part == slice(None) else Size())
            elif isinstance(self._value(part), (int, Size)) and not isinstance(part, bool):
                left.pop(0)
            else:
                return None
        return (*shape, *left)

    def _cut(self, name: str, x: Shape, args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[Shape] | None:
        """Return the shapes of the pieces of a tensor, None where they are not known."""
        given = dict(zip(("by", "dim"), args, strict=False)) | dict(kwargs)
        by = given.get("by", given.get("chunks", given.get("split_size_or_sections", given.get("split_size"))))
        dim = given.get("dim", 0) % len(x)
        size = x[dim]
        if name == "chunk" and isinstance(by, int):
            even = isinstance(size, int) and size % by == 0
            sizes: list[Dim] = [size // by if even and isinstance(size, int) else Size() for _ in range(by)]
        elif name == "split" and isinstance(by, (tuple, list)):
            sizes = [s if isinstance(s, int) else Size() for s in by]
        elif name == "split" and isinstance(by, int) and isinstance(size, int):
            sizes = [min(by, size - start) for start in range(0, size, by)]
        else:
            return None
        return [(*x[:dim], s, *x[dim + 1 :]) for s in sizes]

    def _arguments(self, node: fx.Node) -> Sequence[Any]:
        """Return the arguments of a call after the first."""
        if node.op != "call_module":
            return node.args[1:]
        module = self.network.get_submodule(str(node.target))
        return (module.start_dim, module.end_dim) if isinstance(module, nn.Flatten) else ()

    def kept_axis(self, move: fx.Node, axis: int) -> int | None:
        """Return where an axis of what a node moves is in what it returns, None unless that is certain."""
        name, before, after = name_of(move, self.network), self.of(source_of(move)), self.of(move)
        if before is None or after is None:
            return None
        if name in ("transpose", "swapaxes", "swapdims", "permute", "unsqueeze", *_REDUCTIONS):
            marked = tuple(Size() for _ in before)
            out = moved(name, marked, self._arguments(move), move.kwargs)
            return None if out is None or marked[axis] not in out else out.index(marked[axis])
        for position in range(len(after)):
            front = axis == position and _all_equal(before[: axis + 1], after[: axis + 1])
            behind = len(before) - axis == len(after) - position and _all_equal(before[axis:], after[position:])
            if front or behind:
                return position
        return None

    def merges_from(self, move: fx.Node, axis: int) -> bool:
        """Tell whether a node makes one axis of an axis and all behind it."""
        before, after = self.of(source_of(move)), self.of(move)
        if before is None or after is None or len(after) != axis + 1:
            return False
        return name_of(move, self.network) in ("flatten", "reshape") and _all_equal(before[:axis], after[:axis])

    def _of_module(self, module: nn.Module, x: Shape | None) -> Shape | None:
        spec = spec_of(module)
        if spec is not None:
            outputs = spec.row_shape(_attribute(module, "weight").shape, spec.groups(module))[0]
            if not spec.dims:
                return None if x is None else (*x[:-1], outputs)
            if x is None or len(x) != spec.dims + 2:
                return (Size(), outputs, *(Size() for _ in range(spec.dims)))
            # A kernel of one pixel keeps sizes, and one image of one pixel for all inputs stays one.
            kept = spec.computes(module) and spec.keeps_size(module)
            return (x[0], outputs, *(x[2:] if kept else (Size() for _ in range(spec.dims))))
        for spatial, kinds in _POOLS:
            if isinstance(module, (nn.AdaptiveAvgPool2d, nn.AdaptiveMaxPool2d)) and module.output_size in (1, (1, 1)):
                return None if x is None or len(x) != 4 else (*x[:2], 1, 1)
            if isinstance(module, kinds):
                return self._pooled(x, spatial)
        if x is None:
            return None
        if isinstance(module, (nn.Upsample, nn.UpsamplingNearest2d, nn.UpsamplingBilinear2d)):
            return self._pooled(x, len(x) - 2)
        return x if isinstance(module, _UNARY_MODULES) else None

    @staticmethod
    def _pooled(x: Shape | None, spatial: int) -> Shape | None:
        """Return the shape of an image of another size."""
        if x is None or len(x) not in (spatial + 1, spatial + 2):
            return None
        return (*x[:-spatial], *(Size() for _ in range(spatial)))

    def _broadcast(self, operands: Sequence[Any]) -> Shape | None:
        shapes: list[Shape] = []
        for operand in operands:
            if isinstance(operand, fx.Node) and operand not in self.numbers:
                if (shape := self.of(operand)) is None:
                    return None
                shapes.append(shape)
        if not shapes:
            return None
        rank = max(map(len, shapes))
        padded = [(1,) * (rank - len(shape)) + shape for shape in shapes]
        return tuple(_broadcast_dim(dims) for dims in zip(*padded, strict=True))

    def _concatenated(self, node: fx.Node, operands: Sequence[Any]) -> Shape | None:
        dim = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim", node.kwargs.get("axis", 0))
        shapes = [self.of(operand) for operand in operands]
        if not isinstance(dim, int) or any(s is None or len(s) != len(shapes[0] or ()) for s in shapes):
            return None
        known: list[Shape] = [s for s in shapes if s is not None]
        sizes = [shape[dim] for shape in known]
        total = sum(s for s in sizes if isinstance(s, int))
        first = list(known[0])
        first[dim] = total if all(isinstance(s, int) for s in sizes) else Size()
        return tuple(first)

    def _value(self, argument: object) -> Any:
        """Return the value of an argument: a number, a size, a shape, or None where it is not known."""
        if isinstance(argument, fx.Node):
            if argument in self.numbers:
                return self.numbers[argument]
            return self.tensors.get(argument)  # whose shape is asked for
        if isinstance(argument, (tuple, list)):
            return tuple(self._value(a) for a in argument)
        return argument


def reshaped(
    name: str, x: Shape | None, args: Sequence[Any], kwargs: Mapping[str, Any], value: Callable[[object], Any]
) -> Shape | None:
    """Return the shape that a tensor is given, None where it is not known.

    Args:
        name: of the function or method.
        x: shape of the tensor, or None.
        args: of the call, without the tensor.
        kwargs: of the call.
        value: returns what is known of an argument: numbers, sizes, shapes of tensors.
    """
    if name.endswith("_as"):
        other = value(args[0] if args else kwargs.get("other"))
        return other if isinstance(other, tuple) else None
    found = value(tuple(args) if args else (kwargs.get("shape", kwargs.get("size")),))
    found = found[0] if len(found) == 1 and isinstance(found[0], tuple) else found
    if any(not isinstance(size, (int, Size)) for size in found):
        return None
    return tuple(_rest(x, found) if isinstance(size, int) and size == -1 else size for size in found)


def moved(name: str, x: Shape, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Shape | None:
    """Return the shape of what rearranges, selects or reduces a tensor, None where it is not known."""
    if name in ("flatten", "transpose", "swapaxes", "swapdims", "unsqueeze"):
        names = {"flatten": ("start_dim", "end_dim"), "unsqueeze": ("dim",)}.get(name, ("dim0", "dim1"))
        given = dict(zip(names, args, strict=False)) | dict(kwargs)
        dims = [given.get(n, default) for n, default in zip(names, (0, -1), strict=False)]
        rank = len(x) + (name == "unsqueeze")
        if not all(isinstance(d, int) and -rank <= d < rank for d in dims):
            return None
        first, last = dims[0] % rank, dims[-1] % rank
        if name == "unsqueeze":
            return (*x[:first], 1, *x[first:])
        if name == "flatten":
            return (*x[:first], _product(x[first : last + 1]), *x[last + 1 :])
        out = list(x)
        out[first], out[last] = out[last], out[first]
        return tuple(out)
    if name == "permute":
        order = args[0] if len(args) == 1 and isinstance(args[0], (tuple, list)) else args or kwargs.get("dims", ())
        return tuple(x[d] for d in order) if len(order) == len(x) and all(isinstance(d, int) for d in order) else None
    if name in _POOL_NAMES:
        return Shapes._pooled(x, _POOL_NAMES[name])
    if name == "interpolate":
        return Shapes._pooled(x, len(x) - 2)
    if name in _REDUCTIONS:
        given = dict(zip(("dim", "keepdim"), args, strict=False)) | dict(kwargs)
        over = given.get("dim", given.get("axis"))
        over = (over,) if isinstance(over, int) else over
        if not isinstance(over, (tuple, list)) or not isinstance(given.get("keepdim", False), bool):
            return None
        reduced = {d % len(x) for d in over}
        if given.get("keepdim", False):
            return tuple(1 if i in reduced else d for i, d in enumerate(x))
        return tuple(d for i, d in enumerate(x) if i not in reduced)
    return None


def _all_equal(a: Shape, b: Shape) -> bool:
    return all(x is y or (isinstance(x, int) and isinstance(y, int) and x == y) for x, y in zip(a, b, strict=True))


def _symbols(value: object) -> bool:
    """Tell whether a size that depends on the input is in a value."""
    return any(map(_symbols, value)) if isinstance(value, (tuple, list)) else isinstance(value, Size)


def _product(sizes: Shape) -> Dim:
    """Return the product of sizes; a new symbol where one of them is."""
    longer = [size for size in sizes if isinstance(size, Size) or size != 1]
    if len(longer) == 1:
        return longer[0]
    return Size() if any(isinstance(size, Size) for size in longer) else math.prod(longer)  # type: ignore[arg-type]


def _rest(x: Shape | None, sizes: Sequence[Dim]) -> Dim:
    """Return what -1 stands for in the shape to which a tensor is reshaped."""
    if x is None:
        return Size()
    left, given = list(x), [size for size in sizes if isinstance(size, Size) or size != -1]
    for size in [size for size in given if size in left]:
        left.remove(size)
        given.remove(size)
    known = math.prod(size for size in given if isinstance(size, int))
    total = _product(tuple(left))
    if any(isinstance(size, Size) for size in given) or (known != 1 and not isinstance(total, int)):
        return Size()
    return total // known if isinstance(total, int) and known else total


def _broadcast_dim(sizes: Sequence[Dim]) -> Dim:
    longer = [size for size in sizes if isinstance(size, Size) or size != 1]
    if not longer:
        return 1
    known = [size for size in longer if isinstance(size, int)]
    return known[0] if known else longer[0] if all(size is longer[0] for size in longer) else Size()


def _returns_indices(node: fx.Node, network: nn.Module) -> bool:
    """Tell whether a node, if it is a max pooling, may return where the maxima are beside them."""
    if node.op == "call_module":
        return bool(getattr(network.get_submodule(str(node.target)), "return_indices", False))
    position = {"adaptive_max_pool": 2, "max_pool": 6}.get(name_of(node, network)[:-2], len(node.args))
    return bool(node.kwargs.get("return_indices", any(node.args[position : position + 1])))


def _attribute(network: nn.Module, path: str) -> Any:
    """Return a parameter or another attribute; of a parameter, a network that is being traced would give a proxy."""
    owner, _, name = path.rpartition(".")
    module = network.get_submodule(owner)
    parameters = dict(module.named_parameters(recurse=False, remove_duplicate=False))
    return parameters[name] if name in parameters else getattr(module, name, None)
