"""What a network computes, line by line: how a file and a model are told to belong together."""

from __future__ import annotations

from torch import fx, nn

from ptq4cuda.compat import HOOKS
from ptq4cuda.graph.tracer import expect
from ptq4cuda.nn import QuantModule


def structure_of(network: nn.Module) -> list[str]:
    """Describe what a network computes, one line for each step, the same for its float and its quantized form."""
    modules = dict(network.named_modules())
    if not isinstance(network, fx.GraphModule):
        return [
            f"{name} {_class(m)}"
            for name, m in modules.items()
            if isinstance(m, QuantModule) or not any(m.children())
        ]
    lines = []
    for node in network.graph.nodes:
        if node.target is expect or (node.users and all(user.target is expect for user in node.users)):
            continue  # what is constant
        if node.op == "call_module":
            lines.append(f"{node.target} {_class(modules[str(node.target)])}")
        else:
            lines.append(f"{node.op} {getattr(node.target, '__name__', node.target)}")
    return lines


def replace_module(network: nn.Module, old: nn.Module, new: nn.Module) -> None:
    """Put a module in the place of another, under every name that this one has, and with its hooks."""
    vars(new).update({name: vars(old)[name] for name in HOOKS})
    for name, module in list(network.named_modules(remove_duplicate=False)):
        if module is old:
            network.set_submodule(name, new)


def _class(module: nn.Module) -> str:
    return module.spec.name if isinstance(module, QuantModule) else type(module).__name__
