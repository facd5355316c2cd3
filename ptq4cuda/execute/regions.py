"""The graph of torch.fx by which a network executes its program, and its regions, which are executed at a stretch.

Steps in integers that follow each other are a region, which is called once. On the CPU it is one operator,
ops.layers.run_layers: no Python between its layers, their codes in one block of memory, threads entered once. On
other devices, and where somebody watches a layer with a hook, its steps are called one by one; bits are the same.
"""

from __future__ import annotations

import operator
import weakref
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx, nn

from ptq4cuda import _native, ops
from ptq4cuda.compat import HOOKS, has_forward_hooks, is_recorded
from ptq4cuda.execute import program as steps
from ptq4cuda.execute.engines import (
    IntegerConv2d,
    IntegerLayer,
    Packing,
    Quantize,
    engine_of,
    laid_out_as,
    packed_values,
)
from ptq4cuda.execute.program import LayerProgram, Step, Value, map_values
from ptq4cuda.ops.checks import number_of
from ptq4cuda.ops.layers import Code


@dataclass(frozen=True)
class Call:
    """A step of a region; its values have numbers, in the order in which they come to be, the inputs first.

    Attributes:
        step: of the program.
        function: what computes it by itself: an engine, or a function.
        sources, outputs: numbers of what it reads and gives.
        done: numbers of what nobody reads after it.
    """

    step: Step
    function: Callable[..., Any]
    sources: tuple[int, ...]
    outputs: tuple[int, ...]
    done: tuple[int, ...]


_not_dropped: list[Tensor] = []


def _drop(number: Tensor) -> None:
    """Let go of layers, later if that may not be now: memory is collected within torch.export, too."""
    try:
        torch.ops.ptq4cuda.drop_layers(number)
    except Exception:  # of a mode that takes no tensors but its own
        _not_dropped.append(number)


class _Kept:
    """The number by which the operator keeps a region's layers for as long as this lives. A copy gets its own."""

    def __init__(self) -> None:
        self.number: int | None = None

    def number_for(self, region: Region) -> int:
        if self.number is None:
            number = torch.ops.ptq4cuda.keep_layers(region.constants, region._numbers, region._dtype)
            weakref.finalize(self, _drop, torch.tensor(number)).atexit = False
            for _ in range(len(_not_dropped)):
                _drop(_not_dropped.pop(0))
            self.number = number
        return self.number

    def __reduce__(self) -> tuple[type[_Kept], tuple[()]]:
        return _Kept, ()


class Region(nn.Module):
    """Steps in integers that are executed at a stretch.

    Args:
        features: of each input, whether it holds features [*, C] rather than images or sequences.
        calls: the steps.
        results: numbers of the values that are returned.

    Attributes:
        constants: the tensors that the operator reads, weights as kernels want them among them.
    """

    def __init__(self, features: Sequence[bool], calls: Sequence[Call], results: Sequence[int]) -> None:
        super().__init__()
        self.features, self.calls, self.results = tuple(features), tuple(calls), tuple(results)
        self.engines = nn.ModuleList([c.function for c in calls if isinstance(c.function, nn.Module)])
        self._watched = tuple(self.engines)  # a ModuleList takes its time to be looked through
        self._prepare()

    def _prepare(self) -> None:
        """Write the code of the operator, for layers as they are."""
        self._numbers: list[int] | None = None
        self._kept = _Kept()
        self.constants: list[Tensor] = []
        self._build = _build()
        layers = [e.convolution if isinstance(e, IntegerLayer) else e for e in self.engines]
        convolutions = [layer for layer in layers if isinstance(layer, IntegerConv2d)]
        self._dtype = number_of(next((layer.dtype for layer in convolutions), torch.float32))
        on_cpu = all(b.device.type == "cpu" for layer in layers for b in layer.buffers())
        if not (_native.cpu_loaded and on_cpu) or any(c.low_bytes or any(c.packed_bytes) for c in convolutions):
            return
        code = Code(self.features)
        for call in self.calls:
            assert _write(call, code) == list(call.outputs)
        if not code.constants:  # codes are but moved, and an empty list is not handed on (ops.schemas)
            return
        self._numbers, self.constants = code.returning(self.results), code.constants

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Region:
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self._prepare()
        return self

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        if self._build != _build():  # pickled on another machine
            self._prepare()

    def forward(self, *inputs: Tensor) -> list[Tensor]:
        """Return the results for inputs."""
        on_cpu = isinstance(inputs[0], Tensor) and inputs[0].device.type == "cpu"
        if on_cpu and self._numbers and not has_forward_hooks(self._watched):
            if torch.compiler.is_compiling():
                return self._at_a_stretch(inputs)
            try:
                return self._at_a_stretch(inputs)
            except (RuntimeError, TypeError, AttributeError):
                pass  # one of the steps will say what is wrong, by name
        return self._one_by_one(inputs)

    def _at_a_stretch(self, inputs: Sequence[Tensor]) -> list[Tensor]:
        run = torch.ops.ptq4cuda.run_layers
        if torch.compiler.is_compiling() or is_recorded(inputs):
            return run.default(inputs, self.constants, self._numbers, self._dtype)  # type: ignore[no-any-return]
        return run.kept(inputs, self._kept.number_for(self))  # type: ignore[no-any-return]

    def _one_by_one(self, inputs: Sequence[Tensor]) -> list[Tensor]:
        values: dict[int, Tensor] = dict(enumerate(inputs))
        for call in self.calls:
            made = call.function(*[values[n] for n in call.sources])
            values.update(zip(call.outputs, made if len(call.outputs) > 1 else (made,), strict=True))
            for number in call.done:
                del values[number]
        return [values[number] for number in self.results]

    def extra_repr(self) -> str:
        """Say how many steps there are."""
        return f"{len(self.calls)} steps"


def _build() -> tuple[Any, ...]:
    """Return what layers are prepared for."""
    return tuple(_native.build_info.get(fact) for fact in ("version", "simd_level"))


def _write(call: Call, code: Code) -> list[int]:
    """Add a step to the code of the operator, and return the numbers of its outputs."""
    step, function, sources = call.step, call.function, call.sources
    if isinstance(function, Quantize):
        return [function.add_to(code, sources[0])]
    if isinstance(function, (IntegerConv2d, IntegerLayer)):
        return function.add_to(code, sources[0], sources[1] if len(sources) > 1 else None)
    if isinstance(step, steps.MaxPool):
        return [code.max_pool(sources[0], *step.window)]
    if isinstance(step, steps.Concatenate):
        return [code.concatenate(sources)]
    return [code.flatten(sources[0])]


# --- which steps make a region ----------------------------------------------------------------------------------


def _forms(program: LayerProgram) -> dict[Value, bool | None]:
    """Tell of each value whether it holds features [*, C] or images and sequences; None where nobody knows."""
    forms: dict[Value, bool | None] = {}
    for step in program:
        form: bool | None = None
        if isinstance(step, steps.Quantize):
            assert step.output.quantizer is not None
            form = {-1: True, -2: False, -3: False}.get(step.output.quantizer.axis)
        elif isinstance(step, steps.Layer):
            form = not step.module.spec.dims
        elif isinstance(step, (steps.MaxPool, steps.PixelShuffle)):
            form = False
        elif isinstance(step, steps.Concatenate):
            found = {forms[source] for source in step.sources}
            form = found.pop() if len(found) == 1 else None
        elif isinstance(step, steps.Reshape) and step.kind == "flatten":
            form = True
        forms.update(dict.fromkeys(step.outputs, form))
    return forms


def _joins(step: Step, forms: dict[Value, bool | None]) -> bool:
    """Tell whether a step can be part of a region."""
    if isinstance(step, steps.Quantize):
        return forms[step.output] is not None and forms[step.source] in (None, forms[step.output])
    if isinstance(step, steps.Layer):
        features = not step.module.spec.dims
        plain = step.geometry is None or step.geometry.extra is None
        return plain and all(forms[source] is features for source in step.sources)
    if isinstance(step, (steps.MaxPool, steps.Concatenate)):
        return all(forms[source] is False for source in step.sources)
    return isinstance(step, steps.Reshape) and step.kind == "flatten" and forms[step.source] is False


def _stages(program: LayerProgram, forms: dict[Value, bool | None]) -> list[tuple[list[Step], list[Step]]]:
    """Return the steps in another order in which they can be executed: by turns a region's, and others."""
    stage: dict[Value, int] = {}
    joined: set[Value] = set()
    found: dict[int, tuple[list[Step], list[Step]]] = defaultdict(lambda: ([], []))
    for step in program:
        joins = _joins(step, forms)
        number = max((stage[v] + (joins and v not in joined) for v in step.sources), default=0)
        found[number][0 if joins else 1].append(step)
        stage.update(dict.fromkeys(step.outputs, number))
        joined.update(step.outputs if joins else ())
    return [found[number] for number in sorted(found)]


# --- the graph --------------------------------------------------------------------------------------------------


def install(program: LayerProgram, network: fx.GraphModule, dtype: torch.dtype, pack: bool | None = None) -> None:
    """Let a network execute its program: its graph calls regions from now on, whose engines hold the weights.

    Args:
        program: of the network.
        network: as simulated; it keeps its modules. An engine is the module `engine` of its layer, and has its hooks.
        dtype: of the values that it computes with.
        pack: let codes travel packed. Default: for each device to say.
    """
    _Installation(program, network, dtype, pack).run()


class _Installation:
    def __init__(self, program: LayerProgram, network: fx.GraphModule, dtype: torch.dtype, pack: bool | None) -> None:
        self.program, self.network, self.dtype, self.pack = program, network, dtype, pack
        self.packed = packed_values(program)
        self.forms = _forms(program)
        self.before = {node.name: node for node in network.graph.nodes}
        self.graph = fx.Graph()
        self.made: dict[Value, fx.Node] = {}
        self.makers = {value: step for step in program for value in step.outputs}
        self.readers = program.readers()
        self.returned: set[Value] = set()
        map_values(self.returned.add, program.result)

    def run(self) -> None:
        for joined, others in _stages(self.program, self.forms):
            if joined:
                self._region(joined)
            for step in others:
                self._alone(step)
        self.graph.output(self._argument(self.program.result))
        self.graph.lint()
        self.network.graph = self.graph
        self.network.recompile()

    def _argument(self, arguments: Any) -> Any:
        return map_values(self.made.__getitem__, arguments)

    # --- regions

    def _region(self, joined: list[Step]) -> None:
        within = {value for step in joined for value in step.outputs}
        inputs: dict[tuple[Value, bool], int] = {}
        for step in joined:
            for source in step.sources:
                if source not in within:
                    inputs.setdefault(self._input(step, source), len(inputs))
        numbers: dict[Value, int] = {}
        for step in joined:
            for value in step.outputs:
                numbers[value] = len(inputs) + len(numbers)
        members = set(joined)
        results = [v for v in numbers if v in self.returned or not members.issuperset(self.readers[v])]
        kept = {numbers[v] for v in results}
        calls: list[Call] = []
        read: set[int] = set()
        for step in reversed(joined):
            sources = tuple(numbers[s] if s in within else inputs[self._input(step, s)] for s in step.sources)
            outputs = tuple(numbers[value] for value in step.outputs)
            done = tuple(dict.fromkeys(n for n in (*sources, *outputs) if n not in kept and n not in read))
            read.update(sources)
            calls.append(Call(step, self._function(step), sources, outputs, done))
        region = Region([features for _, features in inputs], calls[::-1], [numbers[v] for v in results])
        node = self.graph.call_module(self._add("region", region), tuple(self.made[value] for value, _ in inputs))
        for i, value in enumerate(results):
            self.made[value] = self.graph.call_function(operator.getitem, (node, i))
        for value in results:
            self._lay_out(value)

    def _input(self, step: Step, source: Value) -> tuple[Value, bool]:
        """Return a value that a region reads, and whether as features."""
        return source, bool(self.forms[step.output] if isinstance(step, steps.Quantize) else self.forms[source])

    def _function(self, step: Step) -> Callable[..., Any]:
        """Return what computes a step by itself."""
        if isinstance(step, steps.Layer):
            return self._engine(step)
        if isinstance(step, steps.Quantize):
            assert step.output.quantizer is not None
            return Quantize(step.output.quantizer)
        function, args = _moves(step)
        return partial(function, *args)

    def _engine(self, step: steps.Layer) -> IntegerConv2d | IntegerLayer:
        packing = Packing(
            step.source in self.packed,
            frozenset(i for i, value in enumerate(step.outputs) if value in self.packed),
            self.pack,
        )
        engine = engine_of(step, self.dtype, packing)
        vars(engine).update({name: vars(step.module)[name] for name in HOOKS})
        step.module.execute_in_integers(engine)
        return engine

    # --- other steps

    def _alone(self, step: Step) -> None:
        value = step.outputs[0]
        if isinstance(step, steps.Layer):
            self._engine(step)
            y = self.graph.call_module(f"{step.name}.engine", self._argument(step.sources))
            for i, value in enumerate(step.outputs):
                self.made[value] = y if len(step.outputs) == 1 else self.graph.call_function(operator.getitem, (y, i))
                self._lay_out(value)
        elif isinstance(step, steps.Input):
            self.made[value] = self._named(
                value, self.graph.create_node("placeholder", step.name, step.default, name=value.name)
            )
        elif isinstance(step, steps.Float):
            op = "get_attr" if step.kind == "attribute" else f"call_{step.kind}"
            args, kwargs = self._argument(step.args), self._argument(step.kwargs)
            node = self.graph.create_node(op, step.target, args, kwargs, name=value.name)
            self.made[value] = self._named(value, node)
        elif isinstance(step, steps.Quantize):
            name = self._add(f"{step.source.name}_codes", self._function(step))
            self.made[value] = self.graph.call_module(name, self._argument(step.sources))
        else:
            function, args = _moves(step)
            self.made[value] = self.graph.call_function(function, (*args, *self._argument(step.sources)))

    def _named(self, value: Value, node: fx.Node) -> fx.Node:
        """Let a node that computes what it did before be known as it was."""
        if value.name in self.before:
            node.meta.update(self.before[value.name].meta)
            node.type = self.before[value.name].type
        return node

    def _lay_out(self, value: Value) -> None:
        """Let values that a convolution made lie in memory as they do in PyTorch."""
        maker = self.makers[value]
        if value.quantizer is None and isinstance(maker, steps.Layer) and maker.geometry is not None:
            like = self.made[self._origin(maker.source)]
            self.made[value] = self.graph.call_function(laid_out_as, (self.made[value], like))

    def _origin(self, value: Value) -> Value:
        """Return the values that codes were once made of."""
        while value.quantizer is not None or value not in self.made:
            maker = self.makers[value]
            value = next((v for v in maker.outputs if v.quantizer is None and v is not value), maker.sources[0])
        return value

    def _add(self, name: str, module: Any) -> str:
        while hasattr(self.network, name):
            name += "_"
        self.network.add_submodule(name, module)
        return name


def _moves(step: Step) -> tuple[Callable[..., Tensor], tuple[Any, ...]]:
    """Return the function that computes a step which works on codes as on values, and its arguments before these."""
    if isinstance(step, steps.MaxPool):
        return _pooled, (step.window, step.output.quantizer is not None and step.output.quantizer.axis == -2)
    if isinstance(step, steps.Concatenate):
        return _side_by_side, ()
    if isinstance(step, steps.PixelShuffle):
        return _shuffled, (step.factor,)
    assert isinstance(step, steps.Reshape)
    return _reshaped, (step.kind, step.dim)


def _pooled(window: tuple[Any, ...], of_sequences: bool, codes: Tensor) -> Tensor:
    images = codes.unsqueeze(-2) if of_sequences else codes  # sequences are images of height one
    pooled = ops.max_pool_codes(images, *window)
    return pooled.squeeze(-2) if of_sequences else pooled


def _side_by_side(*codes: Tensor) -> Tensor:
    return torch.cat(codes, 1)


def _shuffled(factor: int, codes: Tensor) -> Tensor:
    return nn.functional.pixel_shuffle(codes, factor)


def _reshaped(kind: str, dim: int, codes: Tensor) -> Tensor:
    return getattr(codes, kind)(dim)  # type: ignore[no-any-return]
