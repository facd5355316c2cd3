"""What quantize() takes: a model that can be quantized, and calibration batches as arguments of its forward."""

from __future__ import annotations

import inspect
import itertools
import os
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, overload

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from ptq4cuda.compat import any_global_hook, is_script, tree_leaves, tree_map_only
from ptq4cuda.containers import call_apart
from ptq4cuda.errors import first_line, is_out_of_memory
from ptq4cuda.graph.shapes import NORMS
from ptq4cuda.nn import SPECS, QuantModule

Batch = tuple[tuple[Any, ...], dict[str, Any]]  # args and kwargs of a call
Inputs = Sequence[Batch]  # of each calibration batch

_PLAIN = (bool, int, float, str, type(None))


# --- models ---------------------------------------------------------------------------------------------------


def check_model(model: nn.Module) -> None:
    """Raise unless the model can be quantized."""
    check_float_model(model)
    training = next((name for name, module in model.named_modules() if module.training), None)
    if training is not None:
        where = f"its module {training!r} is" if training else "it is"
        raise ValueError(f"the model must be in evaluation mode, but {where} in training mode: call model.eval()")
    broken = not_finite(model)
    if broken is not None:
        raise ValueError(f"the model's {broken!r} contains NaN or Inf")


def not_finite(network: nn.Module) -> str | None:
    """Return the name of a weight, bias or statistic of a layer that has NaN or Inf, or None.

    What is no layer of torch.nn may hold constants that are infinite on purpose, as masks do.
    """
    layers: tuple[type[nn.Module], ...] = (*NORMS, *(spec.float_class for spec in SPECS))
    for name, module in network.named_modules():
        if not type(module).__module__.startswith("torch.nn.") and not isinstance(module, layers):
            continue
        for key, tensor in itertools.chain(module.named_parameters("", False), module.named_buffers("", False)):
            if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
                return f"{name}.{key}".lstrip(".")
    return None


def check_float_model(model: nn.Module) -> None:
    """Raise unless this is a float network whose layers can be replaced."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    if is_script(model):
        raise TypeError("the model is a torch.jit.ScriptModule: take the torch.nn.Module that it was made from")
    scripted = next((name for name, m in model.named_modules() if is_script(m)), None)
    if scripted is not None:
        raise TypeError(
            f"the model's part {scripted!r} is a torch.jit.ScriptModule: take the module that it was made from"
        )
    if any(isinstance(module, QuantModule) for module in model.modules()):
        raise ValueError("the model is quantized already")
    if any_global_hook():
        raise ValueError(
            "torch has hooks on all modules (register_module_forward_hook and the like), which may change what any "
            "layer computes: remove them while a network is quantized or loaded"
        )
    for name, tensor in itertools.chain(model.named_parameters(), model.named_buffers()):
        if is_lazy(tensor):
            raise ValueError(f"the model's {name!r} has no shape yet: call the model once")
        if tensor.is_meta:
            raise ValueError(f"the model's {name!r} is on the meta device, without values")
    for name, parameter in model.named_parameters():
        if parameter.dtype in (torch.float64, torch.complex64, torch.complex128):
            raise ValueError(f"the model's {name!r} is {parameter.dtype}, not float32, float16 or bfloat16")


def device_of(network: nn.Module) -> torch.device:
    """Return the device of a network's parameters.

    Raises:
        ValueError: they are on several devices.
    """
    # Numbers, as torch.tensor(0.5) in a model's code, work with tensors on any device.
    devices = {t.device for t in itertools.chain(network.parameters(), network.buffers()) if t.dim()}
    if len(devices) > 1:
        raise ValueError(f"the model is on several devices: {', '.join(sorted(map(str, devices)))}")
    return next(iter(devices), torch.device("cpu"))


# --- batches --------------------------------------------------------------------------------------------------


class _OnDevice(Sequence[Batch]):
    """Batches that go to a device when they are used, and stay where they are until then."""

    def __init__(self, batches: list[Batch], device: torch.device) -> None:
        self.batches, self.device = batches, device

    def __len__(self) -> int:
        return len(self.batches)

    @overload
    def __getitem__(self, index: int) -> Batch: ...

    @overload
    def __getitem__(self, index: slice) -> Sequence[Batch]: ...

    def __getitem__(self, index: int | slice) -> Batch | Sequence[Batch]:
        if isinstance(index, slice):
            return _OnDevice(self.batches[index], self.device)
        moved: Batch = tree_map_only(Tensor, lambda t: t.to(self.device), self.batches[index])
        return moved


def collect_inputs(model: nn.Module, batches: Iterable[Any]) -> Inputs:
    """Return args and kwargs of the model for each batch; they go to the model's device when they are used."""
    if isinstance(batches, (Tensor, Mapping)):
        raise TypeError(f"batches must be an iterable of batches, got one {type(batches).__name__}: put it in a list")
    remedy = _remedy(batches)
    if remedy or not isinstance(batches, Iterable):
        raise TypeError(f"batches must be an iterable of batches, got one {type(batches).__name__}{remedy}")
    inputs: list[Batch] = []
    for index, batch in enumerate(batches):
        args, kwargs = arguments_of(model, batch, f"calibration batch {index}")
        if inputs and (len(args), kwargs.keys()) != (len(inputs[0][0]), inputs[0][1].keys()):
            raise ValueError(
                f"calibration batch {index} has other arguments of the model's forward than batch 0: "
                f"{', '.join(kwargs) or 'one tensor'} instead of {', '.join(inputs[0][1]) or 'one tensor'}"
            )
        inputs.append((args, kwargs))
    if not inputs:
        raise ValueError("batches is empty: quantization needs at least one batch of calibration data")
    return _OnDevice(inputs, device_of(model))


def arguments_of(model: nn.Module, batch: Any, what: str) -> Batch:
    """Return args and kwargs of the model for a batch, with tensors of no subclass and without history.

    Raises:
        TypeError, ValueError: it is no batch; `what` is it called.
    """
    args, kwargs = _as_arguments(model, batch, what)
    _check_batch(args, kwargs, what)
    plain: Batch = tree_map_only(Tensor, _plain, (args, kwargs))
    return plain


def apart(inputs: Inputs) -> tuple[Inputs, Inputs]:
    """Return the batches to fit to, and those to judge on: of four and more every eighth, of fewer all for both."""
    first = 3
    if len(inputs) <= first:
        return inputs, inputs
    batches = inputs.batches if isinstance(inputs, _OnDevice) else list(inputs)
    fitted = [batch for i, batch in enumerate(batches) if i % 8 != first]
    held_out = batches[first::8]
    if not isinstance(inputs, _OnDevice):
        return fitted, held_out
    return _OnDevice(fitted, inputs.device), _OnDevice(held_out, inputs.device)


def some_samples(model: nn.Module, inputs: Inputs, first: int, end: int) -> Inputs:
    """Return the samples from `first` on and before `end`: of batches that a model takes no part of, all."""
    found: list[Batch] = []
    begin = 0
    for batch in inputs:
        size = batch_size(batch)
        part = slice(max(0, first - begin), min(size, end - begin))
        begin += size
        if part.start >= part.stop:
            continue
        found.append(_part_of(model, batch, part) if part.stop - part.start < size else batch)
        if begin >= end:
            break
    return found


@torch.no_grad()
def _part_of(model: nn.Module, batch: Batch, part: slice) -> Batch:
    size = batch_size(batch)
    args, kwargs = tree_map_only(Tensor, lambda t: t[part] if t.dim() and len(t) == size else t, batch)
    try:
        call_apart(model, args, kwargs)
    except Exception as error:
        if is_out_of_memory(error):
            raise
        return batch
    return args, kwargs


def constant_arguments(model: nn.Module, inputs: Inputs) -> dict[str, Any]:
    """Return the arguments of the model that are no tensors and the same for all batches, defaults among them."""
    signature = inspect.signature(model.forward)
    variable = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    names = {name for name, parameter in signature.parameters.items() if parameter.kind not in variable}
    found: dict[str, Any] | None = None
    for args, kwargs in inputs:  # one at a time: their tensors go to the device
        bound = signature.bind_partial(*args, **kwargs)
        bound.apply_defaults()
        plain = {
            name: value
            for name, value in bound.arguments.items()
            if name in names and all(isinstance(v, _PLAIN) for v in (value if isinstance(value, tuple) else (value,)))
        }
        found = plain if found is None else {n: v for n, v in found.items() if n in plain and _equal(plain[n], v)}
    return found or {}


def _equal(a: Any, b: Any) -> bool:
    return type(a) is type(b) and bool(a == b)


def _remedy(value: Any) -> str:
    """Return what to do about something that is no tensor, after a colon; "" where there is nothing to say."""
    kind = type(value)
    if kind.__module__ == "numpy":
        return ": torch.from_numpy makes a tensor of it"
    if kind.__module__.partition(".")[0] == "PIL":
        return ": make tensors of images, as torchvision's ToTensor and Normalize do, and stack them to [N, C, H, W]"
    if isinstance(value, (str, bytes, os.PathLike)):
        return ": read its images into tensors first, as torchvision.datasets.ImageFolder and a DataLoader do"
    if isinstance(value, torch.utils.data.Dataset) and not isinstance(value, Iterable):
        return ": its items are single samples; torch.utils.data.DataLoader(dataset, batch_size=32) makes batches"
    return ""


def _as_arguments(model: nn.Module, batch: Any, what: str) -> Batch:
    if isinstance(batch, (tuple, list)) and batch:
        if isinstance(batch[0], (tuple, list)) or _are_images(batch):
            raise TypeError(
                f"{what} is a list of images, as detectors take: only tensors [N, C, H, W] can be "
                "given; stack images of one size, or quantize the part of a detector that takes one, its backbone"
            )
        batch = batch[0]
    if isinstance(batch, Tensor):
        return (batch,), {}
    if not isinstance(batch, Mapping):
        raise TypeError(
            f"{what} must be a tensor, a (tensor, target) pair or a dict, got {type(batch).__name__}{_remedy(batch)}"
        )
    parameters = inspect.signature(model.forward).parameters.values()
    rest = any(p.kind is p.VAR_KEYWORD for p in parameters)
    names = [str(name) for name in batch] if rest else [p.name for p in parameters]
    kwargs = {name: batch[name] for name in names if name in batch}
    for name, value in kwargs.items():
        strange = next((leaf for leaf in tree_leaves(value) if not isinstance(leaf, (Tensor, *_PLAIN))), None)
        if strange is not None:
            raise TypeError(
                f"{what} has {type(strange).__name__} for the model's argument {name!r}, not "
                f"tensors, numbers, strings or None{_remedy(strange)}"
            )
    if not any(isinstance(value, Tensor) for value in kwargs.values()):
        raise TypeError(
            f"{what} is a dict with the keys {sorted(map(str, batch))}; none is a tensor for an "
            f"argument of the model's forward ({', '.join(names)})"
        )
    return (), kwargs


def _are_images(items: Sequence[Any]) -> bool:
    """Tell a list of images [C, H, W] from a batch and its targets."""
    if not all(isinstance(item, Tensor) and item.dim() == 3 and item.is_floating_point() for item in items):
        return False
    return len(items) != 2 or (len(items[0]) == len(items[1]) and len(items[0]) in (1, 3, 4))


def _plain(tensor: Tensor) -> Tensor:
    """Return a tensor of no subclass and without history."""
    return tensor.detach().as_subclass(Tensor)


def _check_batch(args: tuple[Any, ...], kwargs: dict[str, Any], what: str) -> None:
    for tensor in tree_leaves((args, kwargs)):
        if not isinstance(tensor, Tensor):
            continue
        if tensor.is_meta:
            raise ValueError(f"{what} is on the meta device, without values")
        if tensor.layout != torch.strided or tensor.is_quantized:
            form = "quantized" if tensor.is_quantized else str(tensor.layout)
            raise ValueError(f"{what} has a tensor that is {form}: give dense tensors of values")
        if tensor.is_floating_point() and bool(torch.isnan(tensor).any()):
            raise ValueError(f"{what} contains NaN or Inf")
    samples = samples_of(args, kwargs)
    if samples.dim() == 0 or len(samples) == 0:
        raise ValueError(f"{what} has the shape {list(samples.shape)}, without samples")
    # Others may be infinite, as masks that are added are.
    if samples.is_floating_point() and not bool(torch.isfinite(samples).all()):
        raise ValueError(f"{what} contains NaN or Inf")


def samples_of(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """Return the argument that has the samples, along dimension 0: of tensors the first of the most dimensions."""
    tensors = [value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)]
    return max(tensors, key=Tensor.dim)


def batch_size(batch: Batch) -> int:
    """Return the number of samples of a batch."""
    return len(samples_of(*batch))


@torch.no_grad()
def check_shapes(model: nn.Module, inputs: Inputs) -> None:
    """Raise ValueError where the model fails on a batch of other shapes or dtypes than the first."""
    first = _shapes(inputs[0])
    seen = {first}
    for index, batch in enumerate(inputs):
        shapes = _shapes(batch)
        if shapes in seen:
            continue
        seen.add(shapes)
        try:
            call_apart(model, *batch)
        except Exception as error:
            if is_out_of_memory(error):
                raise
            raise ValueError(
                f"the model fails on calibration batch {index}, whose samples are {', '.join(shapes)}, those of "
                f"batch 0 {', '.join(first)} ({first_line(error)})"
            ) from error


def _shapes(batch: Batch) -> tuple[str, ...]:
    tensors = [leaf for leaf in tree_leaves(batch) if isinstance(leaf, Tensor)]
    return tuple(f"{str(t.dtype).removeprefix('torch.')} {list(t.shape[1:])}" for t in tensors)
