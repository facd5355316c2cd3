"""Tensors in containers of any class: dicts and lists, dataclasses, what libraries and models make, and arguments."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ptq4cuda.compat import tree_map_only


def named_contents(value: Any) -> list[tuple[str, Any]] | None:
    """Return what a container holds, in order, by key, position or attribute; None of what is no container."""
    if isinstance(value, Mapping):
        return [(str(key), item) for key, item in value.items()]
    if isinstance(value, (tuple, list)):
        names = getattr(value, "_fields", range(len(value)))  # of a named tuple
        return [(str(name), item) for name, item in zip(names, value, strict=True)]
    if isinstance(value, (type, nn.Module, Tensor)) or callable(value):
        return None
    return list(vars(value).items()) if hasattr(value, "__dict__") else None


def contents(value: Any) -> list[Any] | None:
    """Return what a container holds, in order; None of what is no container."""
    named = named_contents(value)
    return None if named is None else [item for _, item in named]


def tensors_of(value: Any) -> list[Tensor]:
    """Return the tensors in a value."""
    if isinstance(value, Tensor):
        return [value]
    return [tensor for item in contents(value) or () for tensor in tensors_of(item)]


def call_apart(network: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Call a network with copies of the tensors among its arguments: it may write into its input."""
    args, kwargs = tree_map_only(Tensor, torch.clone, (args, kwargs))
    return network(*args, **kwargs)
