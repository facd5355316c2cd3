"""What can be known of a model's forward without a graph: which layers it calls, and what flows where.

A walk by modules sees calls of modules only. One forward of one batch, with every torch function recorded, tells
which layers are first and last ones, which functions with weights there are, and whether other code than a layer's
own reads its parameters. Not seen are tensors that leave torch, as through numpy, and writes through views.
"""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ptq4cuda.compat import (
    FORWARD_HOOKS,
    FORWARD_PRE_HOOKS,
    WeakIdKeyDictionary,
    forward_hooks,
    tree_leaves,
    tree_map_only,
)
from ptq4cuda.graph.copying import hooks_of
from ptq4cuda.graph.ends import Step, find_ends, is_fixed, is_lookup
from ptq4cuda.graph.layers import is_concatenation, is_weighted, quantized_spec
from ptq4cuda.graph.readers import is_question
from ptq4cuda.graph.trace import same
from ptq4cuda.nn import spec_of


class Flow(TorchFunctionMode):
    """Records one forward.

    Attributes:
        order: layers in the order of their first call.
        functions: names of weighted functions that are called by other code than the layers'.
        read: layers whose parameters are read by other code than their own.
        sized: layers that are called with more than an input.
        watched: layers with hooks that do something else on a quantized layer, which takes over hooks.
        output: of the network.
    """

    def __init__(self, names: dict[nn.Module, str], others: list[nn.Module]) -> None:
        """Record calls of layers, by name, and of other modules with weights, which are known already."""
        super().__init__()
        self.names = names
        self.order: dict[nn.Module, None] = {}
        self.functions: dict[str, None] = {}
        self.read: dict[nn.Module, None] = {}
        self.sized: dict[nn.Module, None] = {}
        self.watched: dict[nn.Module, None] = {}
        self.output: Any = None
        self._steps: list[Step] = []
        self._made: WeakIdKeyDictionary = WeakIdKeyDictionary()  # by tensor, the step that made it
        self._running: list[nn.Module] = []
        self._watched = [*names, *others]
        self._owners: dict[int, list[nn.Module]] = defaultdict(list)
        for module in self._watched:
            for tensor in itertools.chain(module.parameters(), module.buffers()):
                self._owners[id(tensor)].append(module)

    @property
    def ends(self) -> set[nn.Module]:
        """The first and the last layers."""
        return find_ends(self._steps, filter(is_fixed, self.order))  # type: ignore[return-value, arg-type]

    def run(self, network: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Flow:
        """Record the forward of a network.

        Raises:
            ValueError: a convolution gets a single image without a batch dimension.
        """
        args, kwargs = tree_map_only(Tensor, torch.clone, (args, kwargs))  # the model may write into them
        self._add(Step(is_input=True), (args, kwargs))
        hooked = [module for module in self.names if hooks_of(module)]
        hooks = [m.register_forward_pre_hook(self._try_pre_hooks, with_kwargs=True, prepend=True) for m in hooked]
        hooks += [m.register_forward_hook(self._try_hooks, with_kwargs=True, prepend=True) for m in hooked]
        hooks += [module.register_forward_pre_hook(self._on_entry, with_kwargs=True) for module in self._watched]
        hooks += [module.register_forward_hook(self._on_exit, prepend=True) for module in self._watched]
        try:
            with torch.no_grad(), self:
                self.output = network(*args, **kwargs)
        finally:
            for hook in hooks:
                hook.remove()
        return self

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Record a function, and call it."""
        kwargs = kwargs or {}
        used = [value for value in tree_leaves((args, kwargs)) if isinstance(value, Tensor)]
        owned = [owners for tensor in used if (owners := self._owners.get(id(tensor)))]
        own = any(module in self._running for owners in owned for module in owners)
        if is_weighted(func) and not own:
            self.functions[getattr(func, "__name__", str(func))] = None
        if is_question(func):
            return func(*args, **kwargs)
        for owners in owned:
            if not any(module in self._running for module in owners):
                self.read.update(dict.fromkeys(module for module in owners if module in self.names))
        result = func(*args, **kwargs)
        written = args[:1] if getattr(func, "__name__", "") == "__setitem__" else result
        operands = [] if is_lookup(func) else self._made_by(used)
        self._add(Step(operands, joins=is_concatenation(func)), written)
        return result

    def _made_by(self, tensors: list[Tensor]) -> list[Step]:
        return [self._made[tensor] for tensor in tensors if tensor in self._made]

    def _add(self, step: Step, made: Any) -> None:
        tensors = [value for value in tree_leaves(made) if isinstance(value, Tensor)]
        if tensors:
            self._steps.append(step)
            for tensor in tensors:
                self._made[tensor] = step

    def _try_pre_hooks(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        for hook, with_kwargs in forward_hooks(module, FORWARD_PRE_HOOKS):
            if getattr(hook, "__self__", None) is not self:
                self._try(hook, module, (args, kwargs) if with_kwargs else (args,))

    def _try_hooks(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        for hook, with_kwargs in forward_hooks(module, FORWARD_HOOKS):
            if getattr(hook, "__self__", None) is not self:
                self._try(hook, module, (args, kwargs, output) if with_kwargs else (args, output))

    def _try(self, hook: Callable[..., Any], module: nn.Module, given: tuple[Any, ...]) -> None:
        """Call a hook with a layer and with a quantized one in its place, and note if that makes a difference."""
        spec = quantized_spec(module)
        assert spec is not None and spec.quantized is not None
        results = []
        for layer in (module, spec.quantized.like(module)):
            own = tree_map_only(Tensor, torch.clone, given)  # a hook may write into them
            try:
                results.append((hook(layer, *own), own))
            except Exception:
                if layer is module:
                    raise
        if len(results) < 2 or not same(*results):
            self.watched[module] = None

    def _on_entry(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        if module in self.names and len(args) + len(kwargs) > 1:
            self.sized[module] = None
        self._running.append(module)

    def _on_exit(self, module: nn.Module, args: Any, output: Any) -> None:
        self._running.remove(module)
        if module not in self.names:
            return
        self.order.setdefault(module)
        spec = spec_of(module)
        if spec is not None and spec.is_single(output):
            name, shape = self.names[module], list(output.shape)
            raise ValueError(f"layer {name!r} returns a single image, {shape}, and no batch")
        self._add(Step(self._made_by([output]), layer=module), output)
