"""What quantize() takes: a model that can be quantized, and calibration batches as arguments of its forward."""

from __future__ import annotations

import contextlib
import functools
import inspect
import itertools
import os
import warnings
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, overload

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.overrides import TorchFunctionMode

from ptq4cuda.calibrate.frontier import Frontier, Memory
from ptq4cuda.compat import any_global_hook, is_script, tree_leaves, tree_map_only
from ptq4cuda.containers import call_apart
from ptq4cuda.errors import first_line, is_out_of_memory
from ptq4cuda.graph.shapes import NORMS
from ptq4cuda.nn import SPECS, QuantModule
from ptq4cuda.processes import ALONE, Processes

CPU, MEMORY = torch.device("cpu"), Memory()
Batch = tuple[tuple[Any, ...], dict[str, Any]]  # args and kwargs of a call

_PLAIN = (bool, int, float, str, type(None))
_ORDINARY = 8.0  # largest values of a sample beside those of others; see outliers.py


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


@torch.no_grad()  # parameters that were made in inference mode ask for gradients even of this
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
            raise ValueError(
                f"the model's {name!r} is {parameter.dtype}, not float32, float16 or bfloat16: model.float()"
            )


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


class Inputs(Sequence[Batch]):
    """Batches of this process, which go to a device when they are used and stay where they are until then.

    Attributes:
        frontier: holds them, and all that is made of them.
        sizes: samples of each batch of all processes.
        first: how many batches the processes before this one have.
    """

    def __init__(
        self,
        batches: list[Batch],
        frontier: Frontier | None = None,
        processes: Processes = ALONE,
        example: Batch | None = None,
    ) -> None:
        self.batches, self.processes = batches, processes
        self.frontier = Frontier(CPU, Memory()) if frontier is None else frontier
        self.sizes, self.first = processes.placed([batch_size(batch) for batch in batches])
        self._example = processes.from_first(batches[0] if batches else None) if example is None else example

    def __len__(self) -> int:
        return len(self.batches)

    @property
    def example(self) -> Batch:
        """The first batch of all processes, on the device."""
        assert self._example is not None
        return self._fetch(self._example)

    @property
    def samples(self) -> int:
        """The number of samples of all processes."""
        return sum(self.sizes)

    @overload
    def __getitem__(self, index: int) -> Batch: ...

    @overload
    def __getitem__(self, index: slice) -> Sequence[Batch]: ...

    def __getitem__(self, index: int | slice) -> Batch | Sequence[Batch]:
        if isinstance(index, slice):
            return [self._fetch(batch) for batch in self.batches[index]]
        return self._fetch(self.batches[index])

    def _fetch(self, batch: Batch) -> Batch:
        fetched: Batch = self.frontier.fetch(batch)
        return fetched

    def head(self, samples: int) -> Inputs:
        """Return the first batches with so many samples, those of all processes in each of them."""
        before = itertools.accumulate(self.sizes, initial=0)
        count = sum(size < samples for size in itertools.islice(before, len(self.sizes)))
        own = self[: max(0, count - self.first)]
        return Inputs(self.processes.gather(list(own)), self.frontier)

    def apart(self) -> tuple[Inputs, Inputs]:
        """Return the batches to fit to, and those to judge on: of four and more every eighth, of fewer all for both.

        Raises:
            ValueError: a process has none left to fit to.
        """
        if len(self.sizes) < 4:
            return self, self
        fitted: list[Batch] = []
        held_out: list[Batch] = []
        for number, batch in enumerate(self.batches, self.first):
            # The third of eight: the last one of all may have few samples.
            (held_out if number % 8 == 2 else fitted).append(batch)
        if not fitted:
            raise ValueError("its only calibration batch is held out to judge on, as every eighth is: give it two")
        return tuple(  # type: ignore[return-value]
            Inputs(some, self.frontier, self.processes, self._example) for some in (fitted, held_out)
        )


def collect_inputs(
    model: nn.Module, batches: Iterable[Any], memory: Memory = MEMORY, processes: Processes = ALONE
) -> Inputs:
    """Return args and kwargs of the model for each batch; they go to the model's device when they are used.

    Batches are read once, for a loader that shuffles or changes images would give others the next time. Those of a
    list are the caller's and stay where they are; of any other iterable as many are kept as the limit of memory
    allows, and the rest goes to files.

    Raises:
        TypeError, ValueError: batches are no batches; the message says which.
        OSError: the folder of these files has no room left.
    """
    if isinstance(batches, (Tensor, Mapping)):
        raise TypeError(f"batches must be an iterable of batches, got one {type(batches).__name__}: put it in a list")
    remedy = _remedy(batches)
    if remedy or not isinstance(batches, Iterable):
        raise TypeError(f"batches must be an iterable of batches, got one {type(batches).__name__}{remedy}")
    inputs: list[Batch] = []
    frontier = Frontier(device_of(model), memory)
    for index, batch in enumerate(batches):
        arguments = arguments_of(model, batch, f"calibration batch {index}")
        if inputs:
            _check_arguments(arguments, index, inputs[0])
        elif memory.limit is not None:
            frontier.expect(_largest_tensor(model, frontier.fetch(arguments)))
        inputs.append(arguments if isinstance(batches, (list, tuple)) else frontier.hold(arguments, to_stay=True))
    if not inputs:
        raise ValueError("batches is empty: quantization needs at least one batch of calibration data")
    if frontier.spilled:
        warnings.warn(
            f"ptq4cuda: calibration batches reach the limit of {frontier.limit:,} bytes of memory; "
            f"{frontier.spilled:,} bytes of them wait in files in {frontier.folder!r}",
            stacklevel=4,
        )
    collected = Inputs(inputs, frontier, processes)
    _check_arguments(inputs[0], collected.first, collected.example)
    return collected


class _Largest(TorchFunctionMode):
    """Notes the bytes of the largest tensor that a function returns."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        tensors = [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
        self.bytes = max([self.bytes, *(t.numel() * t.element_size() for t in tensors)])
        return result


def _largest_tensor(model: nn.Module, arguments: Batch) -> int:
    """Return the bytes of the largest tensor in a forward; of a model that fails those up to there."""
    with torch.no_grad(), _Largest() as largest, contextlib.suppress(Exception):  # who needs the result tells of it
        call_apart(model, *arguments)
    found: int = largest.bytes
    return found


def _check_arguments(batch: Batch, index: int, first: Batch) -> None:
    """Raise ValueError where a batch has other arguments than the first one."""
    if (len(batch[0]), batch[1].keys()) != (len(first[0]), first[1].keys()):
        raise ValueError(
            f"calibration batch {index} has other arguments of the model's forward than batch 0: "
            f"{', '.join(batch[1]) or 'one tensor'} instead of {', '.join(first[1]) or 'one tensor'}"
        )


def arguments_of(model: nn.Module, batch: Any, what: str) -> Batch:
    """Return args and kwargs of the model for a batch, with tensors of no subclass and without history.

    Raises:
        TypeError, ValueError: it is no batch; `what` is it called.
    """
    args, kwargs = _as_arguments(model, batch, what)
    _check_batch(args, kwargs, what)
    plain: Batch = tree_map_only(Tensor, _plain, (args, kwargs))
    return plain


def some_samples(model: nn.Module, inputs: Inputs, first: int, end: int) -> Inputs:
    """Return the samples from `first` on and before `end`: of batches that a model takes no part of, all.

    All processes get those of all.
    """
    found: list[Batch] = []
    begin = sum(inputs.sizes[: inputs.first])
    for batch in inputs:
        size = batch_size(batch)
        part = slice(max(0, first - begin), min(size, end - begin))
        begin += size
        if part.start >= part.stop:
            continue
        found.append(_part_of(model, batch, part) if part.stop - part.start < size else batch)
        if begin >= end:
            break
    return Inputs(inputs.processes.gather(found), inputs.frontier)


def ordinary(model: nn.Module, inputs: Inputs) -> Inputs:
    """Return the samples but for those with values so large, as of a broken pixel, that they would rule a few."""
    found: list[Batch] = []
    largest = [samples_of(*batch).unsqueeze(-1).flatten(1).double().abs().amax(1).cpu() for batch in inputs]
    limit = _ORDINARY * torch.cat(largest).median()
    for batch, sizes in zip(inputs, largest, strict=True):
        kept = (sizes <= limit).nonzero().squeeze(1)
        if len(kept):
            found.append(batch if len(kept) == len(sizes) else _part_of(model, batch, kept))
    return Inputs(found, inputs.frontier)


@torch.no_grad()
def _part_of(model: nn.Module, batch: Batch, part: slice | Tensor) -> Batch:
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

    def plain_of(batch: Batch) -> dict[str, Any]:
        bound = signature.bind_partial(*batch[0], **batch[1])
        bound.apply_defaults()
        return {
            name: value
            for name, value in bound.arguments.items()
            if name in names and all(isinstance(v, _PLAIN) for v in (value if isinstance(value, tuple) else (value,)))
        }

    def in_both(found: dict[str, Any], plain: dict[str, Any]) -> dict[str, Any]:
        return {n: v for n, v in found.items() if n in plain and _equal(plain[n], v)}

    # One at a time: their tensors go to the device.
    own = [functools.reduce(in_both, map(plain_of, inputs))] if len(inputs) else []
    return functools.reduce(in_both, inputs.processes.gather(own))


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
    first = _shapes(inputs.example)
    seen = {first}
    for index, batch in enumerate(inputs, inputs.first):
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
