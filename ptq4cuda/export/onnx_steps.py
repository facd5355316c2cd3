"""A LayerProgram as an ONNX model, step by step."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import onnx
import torch
from torch import Tensor, nn

from ptq4cuda.compat import tree_map
from ptq4cuda.containers import named_contents
from ptq4cuda.errors import first_line
from ptq4cuda.execute import program as steps
from ptq4cuda.execute.program import LayerProgram, NotExecutable, Value, map_values, weight_bytes
from ptq4cuda.export import onnx_floats, onnx_layers
from ptq4cuda.export.onnx_graph import NotExportable, OnnxGraph, Ref
from ptq4cuda.export.onnx_layers import Codes
from ptq4cuda.export.summary import LayerExport
from ptq4cuda.nn import QuantModule, QuantTensor

_OWN = ("torch", "_operator", "builtins", "math", "ptq4cuda")  # where functions come from whose names are known


def model_of(
    program: LayerProgram, network: nn.Module, arguments: dict[str, Any] | tuple[Any, ...], packed: bool
) -> tuple[onnx.ModelProto, list[LayerExport], list[tuple[str, str]]]:
    """Return a program as a model, what became of its layers, and what stays in float, each with its reason.

    Args:
        program: what is exported.
        network: it has the modules and tensors that the program names.
        arguments: of a call, by name or in order: tensors are inputs of the model, anything else is fixed in it.
        packed: let weights of up to 4 bits be uint4.

    Raises:
        NotExportable: something has no counterpart in ONNX.
    """
    export = _Export(network, packed)
    inputs = [step for step in program if isinstance(step, steps.Input)]
    names = [step.name for step in inputs]
    if not isinstance(arguments, dict):
        if len(arguments) > len(inputs):
            raise NotExportable(f"the example has {len(arguments)} arguments, and the network takes {len(inputs)}")
        arguments = dict(zip(names, arguments, strict=False))
    unknown = [name for name in arguments if name not in names]
    if unknown:
        raise NotExportable(f"the example has {unknown[0]!r}, and the network takes {', '.join(names)}")
    for step in program:
        export.graph.scope = getattr(step, "name", step.outputs[0].name)
        try:
            if isinstance(step, steps.Input):
                export.input(step, arguments)
            else:
                export.step(step)
        except NotExportable as reason:
            raise NotExportable(f"{_what(step)} cannot be exported: {reason}") from None
    return export.graph.model(_outputs(export, program.result)), export.layers, export.floats


def _what(step: steps.Step) -> str:
    if isinstance(step, steps.Float):
        named = step.target if step.kind == "module" else step.output.name
        return f"{step.what} ({str(named)!r})"
    return repr(getattr(step, "name", step.outputs[0].name))


def _outputs(export: _Export, result: Any) -> dict[str, str]:
    """Return the tensors that a network returns, by the names that they have in the model."""
    found: dict[str, str] = {}

    def add(name: str, item: Any) -> None:
        if isinstance(item, Value):
            item = export.found[item]
        if isinstance(item, (Ref, Codes)):
            found[name or "output"] = item.name
            return
        for key, part in named_contents(item) or ():
            add(f"{name}.{key}".lstrip("."), part)

    add("", result)
    if not found:
        raise NotExportable("the network returns no tensor")
    return {f"output.{name}" if name.isdecimal() else name: there for name, there in found.items()}


class _Export:
    """Adds steps to a graph.

    Attributes:
        graph: to which they are added.
        found: what values became: Codes, Refs, and plain values such as sizes.
        layers: what became of layers.
        floats: what stays in float, each with its reason.
    """

    def __init__(self, network: nn.Module, packed: bool) -> None:
        self.network, self.packed = network, packed
        self.graph = OnnxGraph()
        self.found: dict[Value, Any] = {}
        self.layers: list[LayerExport] = []
        self.floats: list[tuple[str, str]] = []

    def input(self, step: steps.Input, given: dict[str, Any]) -> None:
        """Add an argument."""
        if step.name in given or step.default:
            value = given.get(step.name, *step.default) if step.default else given[step.name]
        elif step.name.startswith("*"):
            value = {} if step.name.startswith("**") else ()
        else:
            raise NotExportable("the example has none")
        if isinstance(value, Tensor):
            if value.is_floating_point() and value.dtype != torch.float32:
                raise NotExportable(f"the example is of {value.dtype}, and ONNX files are of float32")
            value = Ref(self.graph.input(step.name, value))
        self.found[step.output] = value

    def step(self, step: steps.Step) -> None:
        """Add a step."""
        graph = self.graph
        output = step.outputs[0]
        sources = [self.found[source] for source in step.sources]
        if isinstance(step, steps.Layer):
            residual = None if step.residual is None else self.found[step.residual]
            outputs, row = onnx_layers.layer(graph, step, sources[0], residual, self.packed)
            self.layers.append(row)
            for value, made in zip(step.outputs, outputs, strict=True):
                self.found[value] = Ref(made) if isinstance(made, str) else made
        elif isinstance(step, steps.Quantize):
            assert output.quantizer is not None
            axis = output.quantizer.axis
            behind = -1 - axis if axis < 0 else len(graph.shape(sources[0].name)) - 1 - axis
            self.found[output] = onnx_layers.quantize_values(graph, sources[0].name, output.quantizer, behind)
        elif isinstance(step, steps.MaxPool):
            self.found[output] = onnx_layers.max_pool(graph, sources[0], step)
        elif isinstance(step, steps.Concatenate):
            self.found[output] = onnx_layers.concatenate(graph, sources)
        elif isinstance(step, steps.Reshape):
            self.found[output] = onnx_layers.reshape(graph, sources[0], step)
        elif isinstance(step, steps.PixelShuffle):
            self.found[output] = onnx_layers.pixel_shuffle(graph, sources[0], step.factor)
        else:
            assert isinstance(step, steps.Float)
            self.found[output] = self._float(step)

    def _float(self, step: steps.Float) -> Any:
        def argument(value: Value) -> Any:
            found = self.found[value]
            return Ref(found.name) if isinstance(found, Codes) else found  # of codes the shape alone is read

        args, kwargs = map_values(argument, (step.args, step.kwargs))
        name = str(step.target)
        if step.kind == "attribute":
            return _attribute(self.network, name)
        if step.reason and not (step.kind == "module" and isinstance(self.network.get_submodule(name), QuantModule)):
            self.floats.append((name if step.kind == "module" else step.output.name, step.reason))
        if step.kind == "module":
            module = self.network.get_submodule(name)
            return self._module(module, name, step.reason, *args, *kwargs.values())
        if step.kind == "function":
            target: Any = step.target
            place = getattr(target, "__module__", None) or "torch"  # functions of C have none
            name = getattr(target, "__name__", "") if place.partition(".")[0] in _OWN else ""
        if "input" in kwargs:
            args = (kwargs.pop("input"), *args)
        if not _has_ref((args, kwargs)) and step.kind == "function":
            return step.target(*args, **kwargs)  # type: ignore[operator]
        function = onnx_floats.FUNCTIONS.get(name)
        if function is None:
            raise NotExportable("it has no counterpart in ONNX that this package knows")
        try:
            return function(self.graph, *args, **kwargs)
        except (TypeError, AttributeError, IndexError) as error:
            raise NotExportable(f"its arguments are not known ({first_line(error)})") from None

    def _module(self, module: nn.Module, name: str, reason: str, x: Any, *more: Any) -> Any:
        if isinstance(module, QuantModule):
            return self._simulated(module, name, x, reason)
        if isinstance(module, QuantTensor):
            if not module.scale.numel():
                return x
            codes = onnx_layers.quantize_values(self.graph, x.name, module.params, -1 - module.axis)
            return Ref(codes.values(self.graph, module.scale.cpu()))
        kinds = [kind for kind in type(module).__mro__ if kind in onnx_floats.MODULES]
        if not kinds or more or type(module).forward is not kinds[0].forward:
            raise NotExportable("it has no counterpart in ONNX that this package knows")
        return onnx_floats.MODULES[kinds[0]](self.graph, module, x)

    def _simulated(self, module: QuantModule, name: str, x: Ref, reason: str) -> Ref:
        """Add a layer that is computed in floating point only: sums of whole numbers, as the network simulates it."""
        graph, params, spec = self.graph, module.activation, module.spec
        if params is None:
            self.layers.append(LayerExport(name, 32, False, reason))
            y = onnx_floats.layer(graph, module, x, graph.constant(module.weight.float()))
        else:
            if module.product_scale is None:
                raise NotExportable(f"{reason}, so that sums are rounded otherwise in every runtime")
            try:
                rows, scale = weight_bytes(replace(module.quantized_weight(), scale=module.product_scale))
            except NotExecutable as error:
                raise NotExportable(str(error)) from None
            self.layers.append(LayerExport(name, 8, False, reason))
            weight = graph.constant(spec.from_rows(rows.movedim(-1, 1), module.groups))
            weight = graph.op("DequantizeLinear", weight, graph.constant(1.0, "float32"))
            units = onnx_layers.quantize_values(graph, x.name, params, spec.dims).units(graph)
            y = onnx_floats.layer(graph, module, Ref(units), weight)
            y = Ref(graph.op("Mul", y.name, onnx_layers.channels(graph, scale, spec.dims)))
        if module.bias is None:
            return y
        return Ref(graph.op("Add", y.name, onnx_layers.channels(graph, module.bias, spec.dims)))


def _attribute(network: nn.Module, name: str) -> Any:
    found: Any = network
    for part in name.split("."):
        found = getattr(found, part)
    return found.detach().cpu() if isinstance(found, Tensor) else found


def _has_ref(arguments: Any) -> bool:
    found: list[Any] = []
    tree_map(lambda leaf: found.append(leaf) if isinstance(leaf, (Ref, Tensor)) else None, arguments)
    return bool(found)
