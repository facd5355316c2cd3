"""Tensors in containers of any class: dicts and lists, dataclasses, what libraries and models make, and arguments."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ptq4cuda.compat import tree_map_only


def contents(value: Any) -> list[Any] | None:
    """Return what a container holds, in order; None of what is no container."""
    if isinstance(value, Mapping):
        return list(value.values())
    if isinstance(value, (tuple, list)):
        return list(value)
    if isinstance(value, (type, nn.Module, Tensor)) or callable(value):
        return None
    return list(vars(value).values()) if hasattr(value, "__dict__") else None


def tensors_of(value: Any) -> list[Tensor]:
    """Return the tensors in a value."""
    if isinstance(value, Tensor):
        return [value]
    return [tensor for item in contents(value) or () for tensor in tensors_of(item)]


def call_apart(network: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Call a network with copies of the tensors among its arguments: it may write into its input."""
    args, kwargs = tree_map_only(Tensor, torch.clone, (args, kwargs))
    return network(*args, **kwargs)
