"""Files of quantized networks: safetensors, with a header that says what is inside.

A file holds every tensor of the network, so it is complete but for the architecture, which load() takes from a float
model of the same structure. Two runs that make the same network write the same bytes. Zero points and offsets are
stored as bytes where they fit; where all rows of weights have the same bits or offset, as one value. The header has a
checksum of the tensors.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from ptq4cuda import graph
from ptq4cuda.execution import lower
from ptq4cuda.inputs import check_float_model
from ptq4cuda.nn import QuantModule, quant_module_for
from ptq4cuda.record import QuantRecord, attach_record, record_of
from ptq4cuda.structure import structure_of

FORMAT = 2
_KEY = "ptq4cuda"  # one key only: safetensors writes several in no fixed order


def save(network: nn.Module, path: str | os.PathLike[str]) -> None:
    """Write a quantized network to a file, whole or not at all.

    Args:
        network: made by quantize() or load().
        path: of the file; ".ptq4" is customary.

    Raises:
        TypeError: the network was not made by quantize() or load().
        OSError: the file cannot be written.
    """
    record = record_of(network)
    modules = {
        name: {
            "kind": module.kind,
            "quantized_input": module.activation_bits is not None,
            "folded": module.folded,
        }
        for name, module in network.named_modules()
        if isinstance(module, QuantModule)
    }
    # Each tensor gets storage of its own: safetensors refuses shared storage, as of tied weights.
    tensors = {name: _narrow(name, t.detach().cpu()).contiguous().clone() for name, t in network.state_dict().items()}
    header = {
        "format": FORMAT,
        "version": version("ptq4cuda"),
        "record": {k: v for k, v in record.to_dict().items() if k not in ("seconds", "structure")},
        "modules": modules,
        "structure": record.structure,
        "sha256": _checksum(tensors),
    }
    path = Path(path)
    if not path.parent.is_dir():
        raise FileNotFoundError(f"there is no folder {str(path.parent)!r} to save {path.name!r} in")
    if path.is_dir():
        raise IsADirectoryError(f"{str(path)!r} is a folder: the network cannot be saved under its name")
    unfinished = path.with_name(f"{path.name}.{os.getpid()}.partial")  # two processes may save at a time
    try:
        save_file(tensors, unfinished, metadata={_KEY: json.dumps(header, separators=(",", ":"))})
        os.replace(unfinished, path)
    except SafetensorError as error:
        raise OSError(f"{str(path)!r} cannot be written ({error})") from error
    finally:
        unfinished.unlink(missing_ok=True)


def load(path: str | os.PathLike[str], model: nn.Module) -> nn.Module:
    """Read a quantized network.

    Args:
        path: of a file that save() wrote.
        model: a float network of the architecture that was quantized; its weights do not matter and it is not
            changed. The result is on its device.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is truncated or damaged, is not one of ptq4cuda, or belongs to another architecture; the
            model is quantized or without values.
    """
    header, tensors = _read(path)
    check_float_model(model)
    record = header["record"]
    network = graph.own_copy(model).eval()
    if record.walked_by == "graph":
        traced, reason = graph.trace(network)
        if traced is None:
            raise ValueError(f"{path} does not fit the model {type(model).__name__}: {reason}")
        graph.prepare(traced, record.config.quantizes, record.config.fold_activation_scale)
        network = traced
    _check_structure(header["structure"], structure_of(network), path)
    for name, layer_like in header["modules"].items():
        network.set_submodule(name, layer_like(network.get_submodule(name)))
    state = network.state_dict()
    tensors = {name: _widen(name, t, state[name]) if name in state else t for name, t in tensors.items()}
    try:
        network.load_state_dict(tensors, strict=True)
    except RuntimeError as error:
        detail = " ".join(str(error).split()).partition(": ")[2]
        raise ValueError(f"{path} does not fit the model {type(model).__name__}: {detail}") from error
    attach_record(network, record)
    return lower(network, model).eval()


def _layer_of(kind: str, quantized_input: bool, folded: bool) -> Callable[..., nn.Module]:
    """Return what makes the quantized layer, its weights zero, of a float one."""
    return partial(quant_module_for(kind).like, quantized_input=quantized_input, folded=folded)


def _read(path: str | os.PathLike[str]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    if not Path(path).is_file():
        raise FileNotFoundError(f"there is no file {os.fspath(path)!r}")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{os.fspath(path)!r} is truncated or not a safetensors file ({error})") from error
    if _KEY not in metadata:
        raise ValueError(f"{os.fspath(path)!r} is a safetensors file, but was not written by ptq4cuda")
    try:
        header = json.loads(metadata[_KEY])
        newer = header["format"] > FORMAT
        if not newer:
            header["record"] = QuantRecord.from_dict(header["record"])
            header["modules"] = {name: _layer_of(**entry) for name, entry in header["modules"].items()}
            header["structure"] = list(header["structure"])
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{os.fspath(path)!r} has a damaged header ({type(error).__name__}: {error})") from error
    if newer:
        raise ValueError(
            f"{os.fspath(path)!r} has format {header['format']}, written by ptq4cuda {header['version']}; this "
            f"version reads formats up to {FORMAT}: upgrade ptq4cuda"
        )
    if header.get("sha256", checksum := _checksum(tensors)) != checksum:  # the first files had none
        raise ValueError(f"{os.fspath(path)!r} is damaged: its tensors do not have the checksum in its header")
    return header, tensors


def _checksum(tensors: dict[str, Tensor]) -> str:
    """Return the SHA-256 of all tensors: names, dtypes, shapes and bytes."""
    digest = hashlib.sha256()
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


def _check_structure(expected: list[str], found: list[str], path: object) -> None:
    for index in range(max(len(expected), len(found))):
        e, f = (lines[index] if index < len(lines) else "nothing" for lines in (expected, found))
        if e != f:
            raise ValueError(f"{path} belongs to another model: where the file has {e!r}, the model has {f!r}")
