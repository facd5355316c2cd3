"""Copies of models, with the code that models carry: hooks, and methods that were replaced on an instance."""

from __future__ import annotations

import copy
import weakref
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from types import CellType, FunctionType, MethodType, ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from ptq4cuda.compat import CALLED_HOOKS, HOOK_FLAGS, tree_leaves


def hooks_of(module: nn.Module) -> list[Any]:
    """Return what else runs when a module is called, or when gradients pass it."""
    return [hook for name in CALLED_HOOKS for hook in getattr(module, name).values()]


def held_modules(value: Any) -> set[nn.Module]:
    """Return the modules that code can reach from a module: itself, its parts, and what attributes hold."""
    found: set[nn.Module] = set()
    pending = [value]
    while pending:
        value = pending.pop()
        if isinstance(value, nn.Module):
            if value not in found:
                found.add(value)
                pending += vars(value).values()
        elif isinstance(value, dict):
            pending += value.values()
        elif isinstance(value, (list, tuple, set)):
            pending += value
        elif isinstance(value, weakref.ref):
            pending.append(value())
        elif isinstance(value, MethodType):
            pending.append(value.__self__)
    return found


@contextmanager
def buffers_kept(model: nn.Module) -> Iterator[None]:
    """Give a model's buffers back afterwards, and their values: code may count calls in them, or keep what it saw."""
    held = [(m, name, b, b.clone()) for m in model.modules() for name, b in m.named_buffers(recurse=False)]
    try:
        yield
    finally:
        for module, name, buffer, value in held:
            if getattr(module, name, None) is not buffer:
                setattr(module, name, buffer)
            if not torch.equal(buffer, value):
                with torch.inference_mode():  # in which tensors of both kinds may be written to
                    buffer.copy_(value)


def copy_sharing(network: nn.Module, memo: dict[int, Any] | None = None) -> nn.Module:
    """Copy like copy.deepcopy, and share what cannot be copied, as locks and open files.

    Args:
        network: what to copy.
        memo: of copy.deepcopy; it is filled.

    Raises:
        ValueError: a module itself refuses.
    """
    memo = {} if memo is None else memo
    given = dict(memo)
    while True:
        try:
            copied: nn.Module = copy.deepcopy(network, memo)
        except Exception as error:
            refused = _refused(error)
            if refused is None or isinstance(refused, nn.Module) or id(refused) in given:
                raise ValueError(f"the model cannot be copied ({type(error).__name__}: {error})") from error
            given[id(refused)] = refused.detach().clone() if isinstance(refused, Tensor) else refused
            memo.clear()
            memo.update(given)
        else:
            return copied


def _refused(error: BaseException) -> Any:
    """Return the object at which copy.deepcopy failed: what the innermost of its calls was to copy."""
    found, traceback = None, error.__traceback__
    while traceback is not None:
        if traceback.tb_frame.f_code is copy.deepcopy.__code__:
            found = traceback.tb_frame.f_locals["x"]
        traceback = traceback.tb_next
    return found


def copy_model(model: nn.Module) -> nn.Module:
    """Copy a model like copy.deepcopy, and let its hooks and the methods that were replaced work on the copy.

    deepcopy shares functions with what they hold of the original: a hook that stores features in its model would
    store them there, and the copy would read old ones. And it copies the owner of a method that is a hook: what
    records, and is no part of the model, would not see any more what the copy does. Tensors that were computed, as
    weights by hooks or features that were stored, become plain ones.
    """
    memo: dict[int, Any] = {}  # of copy.deepcopy: what stands for an object, by its id
    modules = list(model.modules())
    for module in modules:
        held = (t for t in tree_leaves(vars(module)) if isinstance(t, Tensor))
        memo.update({id(t): t.detach().clone() for t in held if not t.is_leaf})
        memo.update({id(hooks): OrderedDict() for name in CALLED_HOOKS if (hooks := getattr(module, name))})
    copied = copy_sharing(model, memo)
    for module in modules:
        own = vars(memo[id(module)])
        for name in CALLED_HOOKS:  # also of GraphModules, whose deepcopy leaves hooks out
            own[name].update({key: _rebound(hook, memo) for key, hook in getattr(module, name).items()})
        for name in HOOK_FLAGS:
            own[name].update(getattr(module, name))
        code = {name: value for name, value in own.items() if isinstance(value, (FunctionType, MethodType, partial))}
        own.update({name: _rebound(value, memo) for name, value in code.items()})
    return copied


def _rebound(value: Any, memo: dict[int, Any]) -> Any:
    """Return code, or what a piece of code holds, with the copy's parts in place of the model's own."""
    if id(value) in memo:
        return memo[id(value)]
    memo[id(value)] = rebound = value  # it may hold itself
    memo.setdefault(id(memo), []).append(value)  # as deepcopy does: no other object may get its id
    if isinstance(value, FunctionType):
        rebound = _rebound_function(value, memo)
    elif isinstance(value, MethodType):
        rebound = MethodType(_rebound(value.__func__, memo), _rebound(value.__self__, memo))
    elif isinstance(value, partial):
        named = {name: _rebound(given, memo) for name, given in value.keywords.items()}
        rebound = partial(_rebound(value.func, memo), *(_rebound(given, memo) for given in value.args), **named)
    elif not isinstance(value, (nn.Module, ModuleType, type)) and isinstance(getattr(value, "__dict__", None), dict):
        held = {name: new for name, old in vars(value).items() if (new := memo.get(id(old), old)) is not old}
        if held:
            rebound = copy.copy(value)
            vars(rebound).update(held)
    memo[id(value)] = rebound
    return rebound


def _rebound_function(function: FunctionType, memo: dict[int, Any]) -> FunctionType:
    cells, defaults, named = function.__closure__ or (), function.__defaults__ or (), function.__kwdefaults__ or {}
    new_cells = tuple(_rebound_cell(cell, memo) for cell in cells)
    new_defaults = tuple(_rebound(value, memo) for value in defaults)
    new_named = {name: _rebound(value, memo) for name, value in named.items()}
    new, old = (*new_cells, *new_defaults, *new_named.values()), (*cells, *defaults, *named.values())
    if all(a is b for a, b in zip(new, old, strict=True)):
        return function
    code, names = function.__code__, function.__globals__
    rebound = FunctionType(code, names, function.__name__, new_defaults or None, new_cells)
    rebound.__kwdefaults__ = new_named or None
    rebound.__dict__.update(function.__dict__)
    return rebound


def _rebound_cell(cell: CellType, memo: dict[int, Any]) -> CellType:
    """Return a cell of its own where the contents are another object; functions share cells that they assign to."""
    try:
        contents = cell.cell_contents
    except ValueError:  # it is empty as yet
        return cell
    rebound = _rebound(contents, memo)
    return cell if rebound is contents else CellType(rebound)
