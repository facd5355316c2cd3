"""Takes off what only runs a model in another way: torch.compile, DataParallel, DistributedDataParallel."""

from __future__ import annotations

from torch import nn

from ptq4cuda.compat import CALL, compiled_from


def unwrap(model: nn.Module) -> nn.Module:
    """Return the model that a wrapper was put around."""
    while isinstance(model, nn.Module) and (inner := _inner(model)) is not None:
        model = inner
    return model


def unwrap_parts(model: nn.Module) -> None:
    """Take the wrappers off a model's parts, in place."""
    for module in model.modules():
        for name, child in list(module.named_children()):
            if _inner(child) is not None:
                setattr(module, name, unwrap(child))


def is_compiled(model: nn.Module) -> bool:
    """Tell whether torch.compile runs a model or a part of it."""
    return any(compiled_from(m) is not None or getattr(m, CALL, None) for m in model.modules())


def _inner(module: nn.Module) -> nn.Module | None:
    if isinstance(module, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
        module = module.module
        assert isinstance(module, nn.Module)
        return module
    return compiled_from(module)
