"""Who reads the values of a tensor, and who only its shape, dtype or device."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

# What a tensor and its codes have in common.
_SHAPE_ATTRIBUTES = {"shape", "ndim", "device", "is_cuda"}
_SHAPE_METHODS = {"size", "dim", "ndimension", "numel", "nelement", "get_device"}
_OTHER_ATTRIBUTES = {"dtype", "layout", "requires_grad", "is_leaf", "itemsize", "is_sparse", "is_quantized"}
_OTHER_METHODS = {"stride", "storage_offset", "element_size", "is_contiguous", "is_floating_point", "is_complex"}
_ATTRIBUTES = (
    _SHAPE_ATTRIBUTES | _OTHER_ATTRIBUTES | {"is_cpu", "is_mps", "is_xpu", "is_meta", "nbytes", "grad", "grad_fn"}
)
_METHODS = _SHAPE_METHODS | _OTHER_METHODS | {"is_signed", "data_ptr", "__len__", "__hash__", "__repr__"}
_NEW = {"new_zeros", "new_ones", "new_full", "new_empty", "new_tensor"}  # with the dtype and device of self
_LIKE = {torch.zeros_like, torch.ones_like, torch.full_like, torch.empty_like, torch.rand_like, torch.randn_like}
_FUNCTIONS: set[object] = {torch.numel, torch.is_floating_point, torch.is_complex, torch.is_tensor}
_AS_OTHER = {"view_as", "reshape_as", "expand_as"}  # the second argument is read for its shape
_TYPE_OF_OTHER = {"type_as", "to"}  # for its dtype and device


def readers(node: fx.Node) -> list[fx.Node]:
    """Return the nodes that read the values of a node."""
    return [user for user in node.users if not reads_shape(user, node) and not _reads_type(user, node)]


def is_number(node: fx.Node) -> bool:
    """Tell whether a node asks a tensor for numbers or for what it is, rather than for values."""
    if node.op == "call_method":
        return node.target in _METHODS
    if node.target is getattr:
        return node.args[1] in _ATTRIBUTES
    return node.op == "call_function" and node.target in _FUNCTIONS


def is_question(function: Any) -> bool:
    """The same of a function, as torch function modes see it: a method of Tensor, or what reads an attribute."""
    name = getattr(function, "__name__", "")
    if name == "__get__":
        return getattr(getattr(function, "__self__", None), "__name__", "") in _ATTRIBUTES
    return name in _METHODS or function in _FUNCTIONS


def reads_shape(user: fx.Node, node: fx.Node) -> bool:
    """Tell whether a user of a node reads only its shape or device, which its codes have too."""
    if user.op == "call_method" and user.target in _AS_OTHER:
        return _only_at(user, node, 1)
    if not _only_at(user, node, 0):
        return False
    if user.op == "call_method":
        return user.target in _SHAPE_METHODS
    return user.target is torch.numel or (user.target is getattr and user.args[1] in _SHAPE_ATTRIBUTES)


def _reads_type(user: fx.Node, node: fx.Node) -> bool:
    """Tell whether a user of a node reads its dtype or strides, maybe its shape, but no values."""
    if user.op == "call_method" and user.target in _TYPE_OF_OTHER:
        return _only_at(user, node, 1)
    if not _only_at(user, node, 0):
        return False
    return is_number(user) or (user.op == "call_method" and user.target in _NEW) or user.target in _LIKE


def _only_at(user: fx.Node, node: fx.Node, position: int) -> bool:
    """Tell whether a node is an argument of a call at one position alone."""
    if len(user.args) <= position or user.args[position] is not node:
        return False
    others = (*user.args[:position], *user.args[position + 1 :], *user.kwargs.values())
    found: list[fx.Node] = []
    fx.node.map_arg(others, lambda n: found.append(n))
    return node not in found
