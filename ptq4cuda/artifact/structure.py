"""What a network computes, line by line: how a file and a model are told to belong together."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import fx, nn

from ptq4cuda.compat import HOOKS
from ptq4cuda.graph.layers import quantized_spec
from ptq4cuda.graph.tracer import expect
from ptq4cuda.nn import QuantModule

_GEOMETRY = ("kernel_size", "stride", "padding", "output_padding", "dilation", "padding_mode", "groups")
_OF_TRAINING = ("inplace", "momentum", "p")  # settings that change nothing of what an evaluated network computes


def structure_of(network: nn.Module) -> list[str]:
    """Describe what a network computes, a line for each step: where, what, and its settings, as stride=(2,2).

    Where and what are the same for the float and the quantized form of a network.
    """
    modules = dict(network.named_modules())
    if not isinstance(network, fx.GraphModule):
        return [
            " ".join([name, _class(m), *_settings_of(m)])
            for name, m in modules.items()
            if isinstance(m, QuantModule) or not any(m.children())
        ]
    lines = []
    for node in network.graph.nodes:
        if node.target is expect or (node.users and all(user.target is expect for user in node.users)):
            continue  # what is constant
        arguments = _settings([*enumerate(node.args), *node.kwargs.items()] if node.op.startswith("call_") else [])
        if node.op == "call_module":
            module = modules[str(node.target)]
            lines.append(" ".join([str(node.target), _class(module), *_settings_of(module), *arguments]))
        else:
            lines.append(" ".join([node.op, str(getattr(node.target, "__name__", node.target)), *arguments]))
    return lines


def difference(line: str, other: str, settings: bool) -> tuple[str, str] | None:
    """Return how two steps differ, or None; of the settings those count that both name: earlier files name none."""
    (step, own), (other_step, others) = _parsed(line), _parsed(other)
    if step != other_step:
        return step, other_step
    names = [name for name in own if settings and own[name] != others.get(name, own[name])]
    if not names:
        return None
    first, second = (" ".join([step, *(f"{name}={known[name]}" for name in names)]) for known in (own, others))
    return first, second


def _parsed(line: str) -> tuple[str, dict[str, str]]:
    words = line.split(" ")
    return " ".join(words[:2]), {name: value for name, _, value in (word.partition("=") for word in words[2:])}


def replace_module(network: nn.Module, old: nn.Module, new: nn.Module) -> None:
    """Put a module in the place of another, under every name that this one has, and with its hooks."""
    vars(new).update({name: vars(old)[name] for name in HOOKS})
    for name, module in list(network.named_modules(remove_duplicate=False)):
        if module is old:
            network.set_submodule(name, new)


def _class(module: nn.Module) -> str:
    """Return the class of a module: of a layer, quantized or not, that of torch.nn which it computes as."""
    spec = module.spec if isinstance(module, QuantModule) else quantized_spec(module)
    return type(module).__name__ if spec is None else spec.name


def _settings_of(module: nn.Module) -> list[str]:
    names = _GEOMETRY if isinstance(module, QuantModule) else getattr(type(module), "__constants__", ())
    return _settings((n, getattr(module, n)) for n in names if hasattr(module, n) and n not in _OF_TRAINING)


def _settings(named: Iterable[tuple[Any, Any]]) -> list[str]:
    return [f"{name}={value!r}".replace(" ", "") for name, value in named if _is_plain(value)]


def _is_plain(value: Any) -> bool:
    if isinstance(value, slice):
        value = (value.start, value.stop, value.step)
    if isinstance(value, (tuple, list)):
        return all(map(_is_plain, value))
    return value is None or isinstance(value, (bool, int, float, str))
