"""Tensors in containers of any class: dicts and lists, dataclasses, and what libraries and models make of them."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn


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


def map_tensors(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """Return a copy of a value with other tensors; containers keep their classes."""
    return copy.deepcopy(value, {id(tensor): change(tensor) for tensor in tensors_of(value)})
