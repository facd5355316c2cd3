"""Binds the arguments of a call to those of a traced network: the one place that knows how."""

from __future__ import annotations

import inspect
from typing import Any

from torch import fx


def bind(network: fx.GraphModule, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """Return the value of each placeholder by its target, as calling the network would bind them."""
    bound = inspect.signature(network.forward).bind(*args, **kwargs)
    bound.apply_defaults()
    targets = [str(node.target) for node in network.graph.nodes if node.op == "placeholder"]
    return {target: bound.arguments[target.lstrip("*")] for target in targets}


class Interpreter(fx.Interpreter):
    """Runs a traced network, node by node, on the arguments of a call."""

    def call(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Return what the network returns."""
        self.values = bind(self.module, args, kwargs)  # type: ignore[arg-type]
        return self.run()

    def placeholder(self, target: Any, args: Any, kwargs: Any) -> Any:
        """Return the value of an argument."""
        return self.values[target]
