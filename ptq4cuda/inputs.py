"""What quantize() takes: a model that can be quantized, and calibration batches as arguments of its forward."""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from ptq4cuda.nn import QuantModule
from ptq4cuda.walk import Inputs, device_of


def check_model(model: nn.Module) -> None:
    """Raise unless the model can be quantized."""
    check_float_model(model)
    training = next((name for name, module in model.named_modules() if module.training), None)
    if training is not None:
        where = f"its module {training!r} is" if training else "it is"
        raise ValueError(f"the model must be in evaluation mode, but {where} in training mode: call model.eval()")
    for name, tensor in model.state_dict().items():
        if isinstance(tensor, Tensor) and tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            raise ValueError(f"the model's {name!r} contains NaN or Inf")


def check_float_model(model: nn.Module) -> None:
    """Raise unless this is a float network whose layers can be replaced."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    if isinstance(model, torch.jit.ScriptModule):
        raise TypeError("the model is a torch.jit.ScriptModule: take the torch.nn.Module that it was made from")
    if any(isinstance(module, QuantModule) for module in model.modules()):
        raise ValueError("the model is quantized already")
    for name, tensor in itertools.chain(model.named_parameters(), model.named_buffers()):
        if is_lazy(tensor):
            raise ValueError(f"the model's {name!r} has no shape yet: call the model once")
        if tensor.is_meta:
            raise ValueError(f"the model's {name!r} is on the meta device, without values")
    for name, parameter in model.named_parameters():
        if parameter.dtype in (torch.float64, torch.complex64, torch.complex128):
            raise ValueError(f"the model's {name!r} is {parameter.dtype}, not float32, float16 or bfloat16")


def collect_inputs(model: nn.Module, batches: Iterable[Any]) -> Inputs:
    """Return args and kwargs of the model for each batch, on the model's device."""
    if isinstance(batches, (Tensor, Mapping, str)) or not isinstance(batches, Iterable):
        raise TypeError(f"batches must be an iterable of batches, got one {type(batches).__name__}: put it in a list")
    device = device_of(model)
    inputs: list[tuple[tuple[Tensor, ...], dict[str, Tensor]]] = []
    for index, batch in enumerate(batches):
        args, kwargs = _as_arguments(model, batch, index)
        for tensor in (*args, *kwargs.values()):
            if tensor.is_meta:
                raise ValueError(f"calibration batch {index} is on the meta device, without values")
            if tensor.dim() == 0 or len(tensor) == 0:
                raise ValueError(f"calibration batch {index} has the shape {list(tensor.shape)}, without samples")
            if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
                raise ValueError(f"calibration batch {index} contains NaN or Inf")
        if inputs and (len(args), kwargs.keys()) != (len(inputs[0][0]), inputs[0][1].keys()):
            raise ValueError(
                f"calibration batch {index} has other arguments of the model's forward than batch 0: "
                f"{', '.join(kwargs) or 'one tensor'} instead of {', '.join(inputs[0][1]) or 'one tensor'}"
            )
        args = tuple(t.to(device) for t in args)
        inputs.append((args, {name: t.to(device) for name, t in kwargs.items()}))
    if not inputs:
        raise ValueError("batches is empty: quantization needs at least one batch of calibration data")
    return inputs


def _as_arguments(model: nn.Module, batch: Any, index: int) -> tuple[tuple[Tensor, ...], dict[str, Tensor]]:
    if isinstance(batch, (tuple, list)) and batch:
        batch = batch[0]
    if isinstance(batch, Tensor):
        return (batch,), {}
    if isinstance(batch, Mapping):
        names = inspect.signature(model.forward).parameters
        kwargs = {name: batch[name] for name in names if isinstance(batch.get(name), Tensor)}
        for name, parameter in names.items():
            value = batch.get(name)
            is_default = isinstance(value, (bool, int, float, str)) and value == parameter.default
            if value is not None and name not in kwargs and not is_default:
                raise TypeError(
                    f"calibration batch {index} has {type(value).__name__} for the model's argument {name!r}; only "
                    "tensors can be given"
                )
        if kwargs:
            return (), kwargs
        raise TypeError(
            f"calibration batch {index} is a dict with the keys {sorted(map(str, batch))}; none is a tensor for an "
            f"argument of the model's forward ({', '.join(names)})"
        )
    raise TypeError(
        f"calibration batch {index} must be a tensor, a (tensor, target) pair or a dict, got {type(batch).__name__}"
    )


def batch_size(inputs: tuple[tuple[Tensor, ...], dict[str, Tensor]]) -> int:
    """Return the number of samples of a batch."""
    args, kwargs = inputs
    return len(next(iter((*args, *kwargs.values()))))
