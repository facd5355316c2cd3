"""Files of quantized networks: safetensors, with a header that says what is inside.

A file holds every tensor of the network, so it is complete but for the architecture, which load() takes from a float
model of the same structure. Two runs that make the same network write the same bytes, on however many processes and
in whatever memory. Zero points and offsets are stored as bytes where they fit; where all rows of weights have the
same bits or offset, as one value. The header has a checksum of everything else in the file (of the tensors alone
before format 3). Before format 4 the structure has no settings, as strides and slopes.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections import Counter
from dataclasses import MISSING, Field, dataclass, fields, replace
from pathlib import Path
from typing import Any, Literal

import safetensors.torch
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from ptq4cuda import graph
from ptq4cuda._version import __version__
from ptq4cuda.artifact.record import QuantRecord, attach_record, record_of
from ptq4cuda.artifact.structure import difference, replace_module, structure_of
from ptq4cuda.artifact.writing import write_whole
from ptq4cuda.calibrate.allocator import memory_kept
from ptq4cuda.calibrate.inputs import check_float_model, not_finite
from ptq4cuda.errors import LaterVersionError, first_line, kind_and_line
from ptq4cuda.execute.choice import lower
from ptq4cuda.nn import QuantModule, quant_module_for

FORMAT = 4
_OF_THE_RUN = ("seconds", "frontier_bytes", "spilled_bytes")  # and not of the network that it made
_KEY = "ptq4cuda"  # one key only: safetensors writes several in no fixed order


def save(network: nn.Module, path: str | os.PathLike[str]) -> None:
    """Write a quantized network to a file, whole or not at all.

    Args:
        network: made by quantize() or load().
        path: of the file; ".ptq4" is customary. Where it is a symbolic link, the file that it points to is replaced.

    Raises:
        TypeError: the network was not made by quantize() or load().
        OSError: the file cannot be written; what was there is untouched.
    """
    record = record_of(network)
    modules = {
        name: {
            "kind": module.spec.name,
            "quantized_input": module.activation_bits is not None,
            "folded": module.folded,
        }
        for name, module in network.named_modules()
        if isinstance(module, QuantModule)
    }
    # Each tensor gets storage of its own: safetensors refuses shared storage, as of tied weights.
    state = {name: t.detach().cpu() for name, t in network.state_dict().items() if isinstance(t, Tensor)}
    tensors = {name: _narrow(name, t).contiguous().clone() for name, t in state.items()}
    header = {
        "format": FORMAT,
        "version": __version__,
        "record": {k: v for k, v in record.to_dict().items() if k not in _OF_THE_RUN and k != "structure"},
        "modules": modules,
        "structure": record.structure,
    }
    header["sha256"] = _checksum(header, tensors)
    metadata = {_KEY: json.dumps(header, separators=(",", ":"))}
    write_whole(path, safetensors.torch.save(tensors, metadata=metadata))


@memory_kept()
def load(path: str | os.PathLike[str], model: nn.Module, execution: Literal["simulate"] | None = None) -> nn.Module:
    """Read a quantized network.

    Args:
        path: of a file that save() wrote.
        model: a float network of the architecture that was quantized; its weights do not matter and it is not
            changed. The result is on its device.
        execution: "simulate" to compute in floating point, layer by layer, what the file's network computes in
            integers. Default: as the file says.

    Raises:
        OSError: there is no such file, or it cannot be opened.
        ValueError: the file is truncated or damaged, is not one of ptq4cuda, or belongs to another architecture; the
            model is quantized or without values.
    """
    header, tensors = _read(path)
    model = graph.unwrap(model)
    check_float_model(model)
    if execution not in (None, "simulate"):
        raise ValueError(f"execution must be 'simulate' or None, got {execution!r}")
    record = header.record
    misfit = f"{os.fspath(path)!r} does not fit the model {type(model).__name__}"
    try:
        network = float_form(model, record)
    except ValueError as error:
        raise ValueError(f"{misfit}: {error}") from error
    _check_structure(header.structure, structure_of(network), path)
    layers = dict(network.named_modules())
    for name, quantized in header.modules.items():
        if not isinstance(layers.get(name), quantized.module.spec.float_class):
            raise ValueError(f"{misfit}: in the file {name!r} is a {quantized.kind}, in the model it is not")
        replace_module(network, layers[name], quantized.like(layers[name]))
    # With the versions of its modules, or BatchNorm takes the tensors for those of an old one that it must complete.
    state = network.state_dict()
    like = {name: value for name, value in state.items() if isinstance(value, Tensor)}
    for name in like:
        del state[name]
    for name, tensor in tensors.items():
        state[name] = _widen(name, tensor, like[name]) if name in like else tensor
        if name in like and state[name].is_floating_point() != like[name].is_floating_point():
            raise ValueError(f"{misfit}: {name} is {tensor.dtype} in the file, {like[name].dtype} in the model")
    try:
        network.load_state_dict(state, strict=True)
    except RuntimeError as error:
        detail = " ".join(str(error).split()).partition(": ")[2]
        raise ValueError(f"{misfit}: {detail}") from error
    _check_structure(header.structure, structure_of(network), path, settings=True)
    broken = not_finite(network)
    if broken is not None:
        raise ValueError(f"{misfit}: {broken} contains NaN or Inf")
    if execution is not None:
        record.config = replace(record.config, execution=execution)
        for layer in record.layers:
            layer.execution = "simulate" if layer.execution == "integer" else layer.execution
    attach_record(network, record)
    return lower(network, model).eval()


def float_form(model: nn.Module, record: QuantRecord) -> nn.Module:
    """Return a copy of a float model in the form in which a network was quantized, its BatchNorms folded.

    Raises:
        ValueError: the model cannot be brought into it.
    """
    network = graph.own_copy(model).eval()
    if record.walked_by != "graph":
        return network
    traced, reason = graph.trace(network, None if record.constants is None else [record.constants])
    if traced is None:
        raise ValueError(reason)
    graph.prepare(traced, record.config.quantizes, record.config.fold_activation_scale)
    return traced


def read_record(path: str | os.PathLike[str]) -> QuantRecord:
    """Read how a file's network was quantized, and what became of each layer; no model is needed.

    Raises:
        OSError, ValueError: as of load().
    """
    return _read(path)[0].record


def describe_file(path: str | os.PathLike[str]) -> str:
    """Tell in a few lines what is in a file.

    Raises:
        OSError, ValueError: as of load().
    """
    header, tensors = _read(path)
    record, config = header.record, header.record.config
    changed = [f"{f.name}={value!r}" for f in fields(config) if (value := getattr(config, f.name)) != _default(f)]
    quantized = [layer for layer in record.layers if layer.execution != "float"]
    counts = Counter(layer.kind for layer in quantized)
    integers = sum(layer.execution == "integer" for layer in quantized)
    lines = {
        "file": f"{os.fspath(path)}, {Path(path).stat().st_size:,} bytes, format {header.format}, checksum right",
        "written by": f"ptq4cuda {header.version}",
        "configuration": ", ".join(changed) or "QuantConfig()",
        "calibrated on": f"{record.images} samples, walked by {record.walked_by}",
        "layers": f"{', '.join(f'{n} {kind}' for kind, n in counts.items())} quantized, {integers} of them in "
        f"integers; {len(record.layers) - len(quantized)} in float; {record.folded} BatchNorms folded",
        "tensors": f"{len(tensors)}, {sum(t.nbytes for t in tensors.values()):,} bytes "
        f"({record.float_bytes:,} of the float network)",
        "output": "no noise" if record.sqnr is None else f"{record.sqnr:.1f} dB SQNR on the calibration samples",
    }
    width = max(map(len, lines))
    return "\n".join(f"{name:<{width}}  {text}" for name, text in lines.items())


def _default(field: Field[Any]) -> Any:
    return field.default_factory() if field.default_factory is not MISSING else field.default


@dataclass(frozen=True)
class _QuantizedLayer:
    """How a layer was quantized: what its buffers are."""

    kind: str
    quantized_input: bool
    folded: bool

    def __post_init__(self) -> None:
        quant_module_for(self.kind)  # or KeyError
        if not (isinstance(self.quantized_input, bool) and isinstance(self.folded, bool)):
            raise TypeError("quantized_input and folded must be true or false")

    @property
    def module(self) -> type[QuantModule]:
        """Its class."""
        return quant_module_for(self.kind)

    def like(self, layer: nn.Module) -> QuantModule:
        """Return the quantized layer of a float one, its weights zero."""
        return self.module.like(layer, quantized_input=self.quantized_input, folded=self.folded)


@dataclass(frozen=True)
class _Header:
    format: int
    version: str
    record: QuantRecord
    modules: dict[str, _QuantizedLayer]
    structure: list[str]

    @classmethod
    def of(cls, fields: dict[str, Any]) -> _Header:
        return cls(
            int(fields["format"]),
            first_line(fields.get("version", "of an early version"))[:40],
            QuantRecord.from_dict(fields["record"]),
            {name: _QuantizedLayer(**entry) for name, entry in fields["modules"].items()},
            [str(line) for line in fields["structure"]],
        )


def _read(path: str | os.PathLike[str]) -> tuple[_Header, dict[str, Tensor]]:
    name = repr(os.fspath(path))
    if not Path(path).is_file():
        if Path(path).exists():
            raise OSError(f"{name} is a folder or a device, not a file")
        raise FileNotFoundError(f"there is no file {name}")
    with open(path, "rb"):  # permission, and whatever else the system says
        pass
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
    except (SafetensorError, OSError, RuntimeError, ValueError, TypeError, LookupError, AttributeError) as error:
        raise ValueError(f"{name} is truncated or not a safetensors file ({first_line(error)})") from error
    if _KEY not in metadata:
        raise ValueError(f"{name} is a safetensors file, but was not written by ptq4cuda")
    try:
        fields = json.loads(metadata[_KEY])
        format = fields["format"]
        if type(format) is not int or format < 1:
            raise ValueError(f"its format is {str(format)[:40]}")
    except (LookupError, RecursionError, TypeError, ValueError) as error:
        raise _damaged(name, error) from error
    if format > FORMAT:
        by = first_line(fields.get("version", "of a later version"))
        raise ValueError(
            f"{name} has format {format}, written by ptq4cuda {by}; this version reads formats up to {FORMAT}: "
            "upgrade ptq4cuda"
        )
    try:
        # Checksums of format 2 do not cover the header, and the first files had none.
        if format >= 3 or "sha256" in fields:
            expected = fields.pop("sha256", None)
            if expected != _checksum(fields if format >= 3 else None, tensors):
                covered = "header and tensors do" if format >= 3 else "tensors do"
                raise ValueError(f"its {covered} not have the checksum that they had when it was written")
        return _Header.of(fields), tensors
    except LaterVersionError as error:
        raise LaterVersionError(f"{name} was written by a later ptq4cuda: {error}") from error
    except (AttributeError, LookupError, RecursionError, TypeError, ValueError) as error:
        raise _damaged(name, error) from error


def _damaged(name: str, error: Exception) -> ValueError:
    what = first_line(error) if isinstance(error, ValueError) else kind_and_line(error)
    return ValueError(f"{name} is damaged: {what}")


def _checksum(header: dict[str, Any] | None, tensors: dict[str, Tensor]) -> str:
    """Return the SHA-256 of a header, if it is given, and all tensors: names, dtypes, shapes and bytes."""
    digest = hashlib.sha256()
    if header is not None:
        digest.update(json.dumps(header, sort_keys=True).encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


_INTEGERS = ("weight_offset", "activation_zero_point", "zero_point")  # of other dtypes, for the kernels' sake
_ROWS = ("weight_bits", "weight_offset")


def _field(name: str) -> str:
    return name.rpartition(".")[2]


def _narrow(name: str, tensor: Tensor) -> Tensor:
    """Return the same values in fewer bytes, where a module's field has them."""
    if _field(name) in _ROWS and tensor.dim() == 1 and bool((tensor == tensor[:1]).all()):
        tensor = tensor[:1]
    for dtype in (torch.uint8, torch.int8) if _field(name) in _INTEGERS else ():
        if torch.equal(tensor.to(dtype).to(tensor.dtype), tensor):
            return tensor.to(dtype)
    return tensor


def _widen(name: str, tensor: Tensor, like: Tensor) -> Tensor:
    """Undo _narrow for a field that is like this one."""
    if _field(name) in _INTEGERS and tensor.dtype in (torch.uint8, torch.int8):
        tensor = tensor.to(like.dtype)
    if _field(name) in _ROWS and tensor.shape == (1,):
        tensor = tensor.expand_as(like)
    return tensor


def _check_structure(expected: list[str], found: list[str], path: object, settings: bool = False) -> None:
    for index in range(max(len(expected), len(found))):
        e, f = (lines[index] if index < len(lines) else "nothing" for lines in (expected, found))
        if (different := difference(e, f, settings)) is not None:
            e, f = different
            raise ValueError(f"{path} belongs to another model: where the file has {e!r}, the model has {f!r}")
