"""OnnxGraph: an ONNX graph while it is put together, and what flows in it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor

from ptq4cuda import ops
from ptq4cuda._version import __version__

OPSET = 21  # the first with 4-bit types in QuantizeLinear and DequantizeLinear
IR_VERSION = 10  # of the same release
_SMALL = 1024  # bytes of constants that may be sizes


class NotExportable(ValueError):
    """Something has no counterpart in ONNX; the message says what, in one sentence."""


@dataclass(frozen=True)
class Ref:
    """A tensor of the graph, by its name; also a size, which is an int64 of no dimensions."""

    name: str


class OnnxGraph:
    """Collects nodes and constants; equal constants are held once.

    Attributes:
        scope: of the step that is exported: names of nodes begin with it.
        sizes: names of tensors that are sizes.
    """

    def __init__(self) -> None:
        self.nodes: list[onnx.NodeProto] = []
        self.constants: list[TensorProto] = []
        self.inputs: list[onnx.ValueInfoProto] = []
        self.scope = ""
        self.sizes: set[str] = set()
        self._names: dict[str, int] = {}
        self._known: dict[tuple[Any, ...], str] = {}
        self._types: dict[str, onnx.TypeProto] = {}
        self._inferred = 0

    def name(self, stem: str) -> str:
        """Return a name that nothing else has."""
        count = self._names.get(stem, 0)
        self._names[stem] = count + 1
        return stem if not count else self.name(f"{stem}_{count}")

    def input(self, name: str, example: Tensor) -> str:
        """Add an input like an example, any number of which may come along the first dimension."""
        name = self.name(name)
        shape = ["N", *example.shape[1:]] if example.dim() else []
        kind = helper.np_dtype_to_tensor_dtype(example.detach().cpu().numpy().dtype)
        self.inputs.append(helper.make_tensor_value_info(name, kind, shape))
        self._types[name] = self.inputs[-1].type
        return name

    def op(self, kind: str, *inputs: str, **attributes: Any) -> str:
        """Add a node of one output, and return its name; an input "" is left out."""
        return self.ops(kind, *inputs, outputs=1, **attributes)[0]

    def ops(self, kind: str, *inputs: str, outputs: int, **attributes: Any) -> list[str]:
        """Add a node, and return the names of its outputs."""
        made = self.name(f"{self.scope}/{kind}" if self.scope else kind)
        names = [made] if outputs == 1 else [self.name(f"{made}.{i}") for i in range(outputs)]
        self.nodes.append(helper.make_node(kind, list(inputs), names, name=made, **attributes))
        return names

    def constant(self, value: Any, dtype: Any = None) -> str:
        """Return the name of a constant: a tensor, an array, numbers, or one number, in numpy's dtype."""
        array = np.asarray(value.detach().cpu().numpy() if isinstance(value, Tensor) else value, dtype=dtype)
        key = (array.dtype.str, array.shape, array.tobytes())
        if key not in self._known:
            stem = f"{self.scope}/constant" if array.size > 1 else f"{array.dtype.name}_{array.reshape(-1)[:1]}"
            self._known[key] = self.name(stem)
            self.constants.append(numpy_helper.from_array(array, self._known[key]))
        return self._known[key]

    def nibbles(self, codes: Tensor) -> str:
        """Return the name of a constant uint4 of codes below 16, uint8 of any shape."""
        flat = codes.reshape(1, -1).cpu()
        packed = ops.pack_codes(flat, torch.full((1,), 4, dtype=torch.uint8))
        name = self.name(f"{self.scope}/weight")
        size = (flat.numel() + 1) // 2
        content = packed.numpy().tobytes()[:size]
        self.constants.append(TensorProto(name=name, data_type=TensorProto.UINT4, dims=codes.shape, raw_data=content))
        return name

    # --- what is known of tensors -----------------------------------------------------------------------------

    def shape(self, name: str) -> list[int | None]:
        """Return the shape of a tensor; None for the batch and for what else is not known.

        Raises:
            NotExportable: not even the number of dimensions is known.
        """
        kind = self._type(name).tensor_type
        if not kind.HasField("shape"):
            raise NotExportable("the shape of what it reads is not known")
        return [d.dim_value if d.HasField("dim_value") else None for d in kind.shape.dim]

    def sizes_of(self, name: str) -> list[int]:
        """Return the shape of a tensor behind the batch.

        Raises:
            NotExportable: it is not known.
        """
        sizes = [size for size in self.shape(name)[1:] if size is not None]
        if len(sizes) < len(self.shape(name)) - 1:
            raise NotExportable("it reads a tensor whose size is not known")
        return sizes

    def _type(self, name: str) -> onnx.TypeProto:
        """Infer the types of all nodes that were added since this was last called, and return one."""
        new, self._inferred = self.nodes[self._inferred :], len(self.nodes)
        if new:
            made = {output for node in new for output in node.output}
            read = {name for node in new for name in node.input if name} - made
            constants = [c for c in self.constants if c.name in read]
            given = [onnx.ValueInfoProto(name=n, type=self._types[n]) for n in read if n in self._types]
            for constant in constants:
                if len(constant.raw_data) > _SMALL:
                    given.append(helper.make_tensor_value_info(constant.name, constant.data_type, constant.dims))
            small = [c for c in constants if len(c.raw_data) <= _SMALL]
            part = helper.make_graph(new, "part", given, [], small)
            model = helper.make_model(part, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=IR_VERSION)
            inferred = onnx.shape_inference.infer_shapes(model, data_prop=True)
            self._types |= {info.name: info.type for info in inferred.graph.value_info}
        if name not in self._types:
            raise NotExportable("the shape of what it reads is not known")
        return self._types[name]

    # --- as a whole -------------------------------------------------------------------------------------------

    def model(self, outputs: dict[str, str]) -> onnx.ModelProto:
        """Return the graph as a model.

        Args:
            outputs: the tensors that it returns, by the names that they get.
        """
        self.scope = ""
        for name, there in outputs.items():
            self.nodes.append(helper.make_node("Identity", [there], [name], name=self.name("Output")))
        infos = [onnx.ValueInfoProto(name=name, type=self._type(name)) for name in outputs]
        read = {name for node in self.nodes for name in node.input}
        constants = [constant for constant in self.constants if constant.name in read]
        graph = helper.make_graph(self.nodes, "ptq4cuda", self.inputs, infos, constants)
        opset = helper.make_opsetid("", OPSET)
        return helper.make_model(
            graph,
            opset_imports=[opset],
            ir_version=IR_VERSION,
            producer_name="ptq4cuda",
            producer_version=__version__,
        )
