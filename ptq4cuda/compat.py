"""All that the package needs of torch and that torch does not promise to keep: why, and what could replace it.

Nothing else in the package names a private or ageing interface (tests/test_compat.py reads its code), so what a
release of torch breaks is mended here. "Replaced by" names the public form that would do, where there is one in the
oldest supported release, 2.10, or in later ones.
"""

from __future__ import annotations

import linecache
import weakref
from collections import defaultdict
from collections.abc import Callable, Iterable
from functools import cache
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx import _symbolic_trace, graph_module
from torch.nn.utils.prune import BasePruningMethod
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map, tree_map_only
from torch.utils.weak import WeakIdKeyDictionary

__all__ = [  # what torch imports itself is imported from here
    "TorchDispatchMode",  # sees every operator of a forward and what it returns. Replaced by: nothing
    "WeakIdKeyDictionary",  # by tensor, which weakref.WeakKeyDictionary would compare by value. Replaced by: nothing
    "tree_leaves",  # values in nested containers, as torch.fx sees them. Replaced by: nothing, all of torch uses them
    "tree_map",
    "tree_map_only",
]


@cache
def multiplies_bytes() -> bool:
    """Tell whether products of int8 are exact and fast on this CPU: without VNNI they are neither."""
    # By what it does: an environment variable may hold back instructions that the CPU has.
    a, b = (torch.full((64, 64), value, dtype=torch.int8, device="cpu") for value in (127, -128))
    return torch.cpu._is_vnni_supported() and bool((torch._int_mm(a, b) == 64 * 127 * -128).all())


def byte_products(a: Tensor, b: Tensor) -> Tensor:
    """Return a @ b, int32, of matrices of int8. Replaced by: nothing."""
    if len(a) == 1:  # PyTorch 2.13 may leave a result of one row as it found it in memory
        return a.int() @ b.int()
    return torch._int_mm(a, b)


def expect_true(condition: Any) -> bool:
    """Hold sizes that only the data tells to a condition. torch._check would raise torch's sentence."""
    from torch.fx.experimental import symbolic_shapes  # with sympy, a fifth of a second that only tracing takes

    return bool(symbolic_shapes.expect_true(condition))


# Methods of nn.Module that modules of the package override. Hooks could replace the last two
# (register_state_dict_post_hook, register_load_state_dict_pre_hook), but each instance would have to carry them.
OVERRIDDEN = (
    "_apply",  # dtypes of quantizers stay, whatever .half() and .to() do to the rest
    "_save_to_state_dict",  # weights in the form of a kernel are saved in that of the file
    "_load_from_state_dict",  # buffers have other lengths where other bits were allocated
)


# --- classes ----------------------------------------------------------------------------------------------------

# What every BatchNorm derives from, those of other libraries, too. Replaced by: nothing; torch.nn's own would not do.
BatchNorm = nn.modules.batchnorm._BatchNorm

# The function in which a convolution of torch.nn convolves; a class or an instance may replace it instead of forward.
CONV_FORWARD = "_conv_forward"

# What torch.fx writes for an assert in a model. Replaced by: nothing that torch.fx writes.
ASSERTION = torch._assert


def is_script(module: nn.Module) -> bool:
    """Tell whether a module was made by torch.jit, which torch is giving up."""
    return isinstance(module, torch.jit.ScriptModule)


def explicit_padding(conv: nn.Conv2d) -> list[int]:
    """Return the padding that a convolution of another mode than zeros adds, as F.pad takes it.

    Its __init__ computes it; what `padding` became since is read by no one. Replaced by: nothing.
    """
    return list(conv._reversed_padding_repeated_twice)


# --- what a module holds ----------------------------------------------------------------------------------------

# Attributes of a module. named_children() and the like leave out what is None and what they saw before.
MODULES, PARAMETERS, BUFFERS = "_modules", "_parameters", "_buffers"
NON_PERSISTENT = "_non_persistent_buffers_set"  # names; in no public form at all


def parts_of(module: nn.Module) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
    """Return the dicts of a module's own modules, parameters and buffers, to read and to change."""
    return module._modules, module._parameters, module._buffers


# --- what runs when a module is called --------------------------------------------------------------------------

# Attributes of a module: hooks by key, and facts about them by the same keys. Handles can remove hooks, but nothing
# public lists them. A hook of the first two gets keyword arguments if its key is in the flag of its kind.
FORWARD_PRE_HOOKS, FORWARD_HOOKS = "_forward_pre_hooks", "_forward_hooks"
CALLED_HOOKS = (FORWARD_PRE_HOOKS, FORWARD_HOOKS, "_backward_pre_hooks", "_backward_hooks")
HOOK_FLAGS = (f"{FORWARD_PRE_HOOKS}_with_kwargs", f"{FORWARD_HOOKS}_with_kwargs", f"{FORWARD_HOOKS}_always_called")
HOOKS = (*CALLED_HOOKS, *HOOK_FLAGS, "_is_full_backward_hook")

# An attribute of a module: what runs in place of its own __call__. Replaced by: nothing that spares other instances.
CALL = "_compiled_call_impl"

# Hooks that compute a weight from other tensors before each forward. torch.nn.utils.parametrizations replaces the
# first two, and models that were written before still have them.
COMPUTED_WEIGHTS = (WeightNorm, SpectralNorm, BasePruningMethod)


def forward_hooks(module: nn.Module, kind: str) -> list[tuple[Callable[..., Any], bool]]:
    """Return a module's hooks of a kind, FORWARD_PRE_HOOKS or FORWARD_HOOKS, and whether they get keywords."""
    flags = vars(module)[f"{kind}_with_kwargs"]
    return [(hook, key in flags) for key, hook in vars(module)[kind].items()]


def has_forward_hooks(modules: Iterable[nn.Module]) -> bool:
    """Tell whether a hook runs before or after the forward of one of these modules."""
    for module in modules:  # for every call of a network: no look-up more than there must be
        if module._forward_pre_hooks or module._forward_hooks:
            return True
    return any_global_hook()


def remove_computed_weights(module: nn.Module) -> None:
    """Give a module plain tensors for the weights that hooks compute from others."""
    for key, hook in list(module._forward_pre_hooks.items()):
        if isinstance(hook, COMPUTED_WEIGHTS):
            hook.remove(module)
            del module._forward_pre_hooks[key]


def own_call(module: nn.Module) -> Callable[..., Any]:
    """Return what calls a module with its hooks, whatever takes the place of its __call__ (CALL)."""
    return module._call_impl


def any_global_hook() -> bool:
    """Tell whether there are hooks on the modules of the whole process. Replaced by: nothing."""
    return bool(torch.nn.modules.module._has_any_global_hook())


def compiled_from(module: nn.Module) -> nn.Module | None:
    """Return the module that torch.compile(module) was given, or None.

    Its class is private, and importing it takes longer than all of this package.
    """
    original = getattr(module, "_orig_mod", None)
    return original if isinstance(original, nn.Module) else None


# --- tensors ----------------------------------------------------------------------------------------------------


def is_recorded(tensors: Iterable[Tensor]) -> bool:
    """Tell whether what is called with tensors may be recorded, by a tracer, a mode or a subclass."""
    return (
        any(type(t) is not Tensor for t in tensors)
        or torch._C._get_tracing_state() is not None
        or torch._C._len_torch_dispatch_stack() > 0
    )


def version_of(tensor: Tensor) -> int:
    """Return how often a tensor was written into. Replaced by: nothing; autograd counts so."""
    return int(tensor._version)


def storage_id(tensor: Tensor) -> int:
    """Return what identifies the memory that a tensor shares with others; data_ptr() fails for fake tensors."""
    return int(tensor.untyped_storage()._cdata)


# --- torch.fx ---------------------------------------------------------------------------------------------------


def number_names_anew(tracer: fx.Tracer) -> None:
    """Let a tracer count names from zero; torch.fx counts for all tracers of the process."""
    tracer._qualname_counter = defaultdict(int)


def is_wrapped(scope: dict[str, Any], name: str) -> bool:
    """Tell whether torch.fx.wrap registered a name of a module's globals. Replaced by: nothing."""
    return (id(scope), name) in _symbolic_trace._wrapped_fns_to_patch


def forget_source_with(forward: Callable[..., Any]) -> None:
    """Let go of the code that torch.fx wrote for a graph when what it compiled from it is gone.

    It keeps the code of every graph, for tracebacks, as long as the process lives. Replaced by: nothing.
    """
    weakref.finalize(forward, _forget_source, forward.__code__.co_filename).atexit = False


def _forget_source(name: str) -> None:
    graph_module._loader.eval_cache.pop(name, None)
    linecache.cache.pop(name, None)
