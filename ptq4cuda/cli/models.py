"""The networks that the command line knows: those of timm and torchvision by name, everybody's own by import."""

from __future__ import annotations

import difflib
import importlib
import os
import sys
import warnings
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from ptq4cuda.cli.images import Preprocessing
from ptq4cuda.errors import first_line, naming_failures

_WRAPPERS = ("state_dict", "model_state_dict", "model", "net")  # under which training scripts keep a state_dict


def find_model(
    name: str, weights: Path | None, pretrained: bool, classes: int | None, random: bool = False
) -> tuple[nn.Module, Preprocessing]:
    """Return a model in evaluation mode, with its weights, and how it wants images.

    Args:
        name: of a model of timm or torchvision ("resnet50", "timm/resnet50", "torchvision/resnet50"), or
            "package.module:callable" for what returns one, or is one.
        weights: a file of safetensors, or one of torch.save that holds tensors.
        pretrained: let timm or torchvision get the weights that they have.
        classes: number of classes to build the model with.
        random: random weights will do.

    Raises:
        ValueError: there is no such model, or the weights do not fit it.
    """
    given = {} if classes is None else {"num_classes": classes}
    if ":" in name:
        if pretrained:
            raise ValueError(
                "--pretrained is for models of timm and torchvision; your own callable loads its weights"
            )
        model, preprocessing = _own(name, given)
    else:
        make = _of_library(name, pretrained and weights is None, given)
        if weights is None and not pretrained and not random:
            raise ValueError(f"{name} would have random weights: give --weights FILE, or --pretrained")
        with naming_failures(f"{name} cannot be built"):
            model, preprocessing = make()
    if weights is not None:
        load_weights(model, weights)
    return model.eval(), preprocessing


# --- by name --------------------------------------------------------------------------------------------------


Make = Callable[[], tuple[nn.Module, Preprocessing]]


def _of_library(name: str, pretrained: bool, given: dict[str, Any]) -> Make:
    library, _, model_name = name.rpartition("/")
    libraries = {"timm": _of_timm, "torchvision": _of_torchvision}
    if library and library not in libraries:
        raise ValueError(f"models come from timm or torchvision, or from 'package.module:callable', got {name!r}")
    missing, known = [], []
    for one, build in libraries.items():
        if library in ("", one):
            try:
                names, make = build(model_name, pretrained, given)
            except ImportError as error:
                missing.append(f"{one} cannot be imported ({first_line(error)})")
                continue
            if model_name in names:
                return make
            known += names
    if missing and not known:
        missing.append("pip install timm, or torchvision")
    reasons = filter(None, [*missing, close_to(model_name, known)])
    raise ValueError(
        f"there is no model {name!r}" + (f": {told}" if (told := "; ".join(reasons)) else " in timm or torchvision")
    )


def close_to(name: str, known: Iterable[str]) -> str:
    """Return which of the known names somebody may have meant, or nothing."""
    close = difflib.get_close_matches(name, list(dict.fromkeys(known)), n=3)
    return f"close to it: {', '.join(close)}" if close else ""


def _of_timm(name: str, pretrained: bool, given: dict[str, Any]) -> tuple[list[str], Make]:
    import timm

    def make() -> tuple[nn.Module, Preprocessing]:
        model = timm.create_model(name, pretrained=pretrained, **given)
        return model, preprocessing_of_timm(getattr(model, "pretrained_cfg", {}))

    return [*timm.list_models(), *([name] if timm.is_model(name) else [])], make


def preprocessing_of_timm(config: dict[str, Any]) -> Preprocessing:
    """Return what timm's configuration of pretrained weights says."""
    channels, height, width = config.get("input_size", (3, 224, 224))
    mean, std = (
        tuple(config.get(name, (default,) * 3))[:channels] for name, default in (("mean", 0.5), ("std", 0.5))
    )
    squashed = config.get("crop_mode", "center") == "squash"
    resize = 0 if squashed else int(min(height, width) / config.get("crop_pct", 0.875))
    return Preprocessing((height, width), resize, mean, std, config.get("interpolation", "bicubic"), "of timm")


def _of_torchvision(name: str, pretrained: bool, given: dict[str, Any]) -> tuple[list[str], Make]:
    from torchvision import models

    def make() -> tuple[nn.Module, Preprocessing]:
        weights = models.get_model_weights(name)
        default = getattr(weights, "DEFAULT", None)
        model = models.get_model(name, weights=default if pretrained else None, **given)
        return model, preprocessing_of_torchvision(default.transforms() if default is not None else None)

    return models.list_models(module=models), make


def preprocessing_of_torchvision(transforms: Any) -> Preprocessing:
    """Return what the transforms of torchvision's weights for classification say."""
    fields = ("crop_size", "resize_size", "mean", "std", "interpolation")
    if not all(hasattr(transforms, field) for field in fields):
        return Preprocessing()
    crop, resize = transforms.crop_size, transforms.resize_size
    size = (crop[0], crop[-1])
    return Preprocessing(
        size,
        resize[0],
        tuple(transforms.mean),
        tuple(transforms.std),
        transforms.interpolation.value,
        "of torchvision",
    )


# --- by import ------------------------------------------------------------------------------------------------


def _own(name: str, given: dict[str, Any]) -> tuple[nn.Module, Preprocessing]:
    module_name, _, attribute = name.partition(":")
    if module_name.endswith(".py") or not all(
        part.isidentifier() for part in f"{module_name}.{attribute}".split(".")
    ):
        raise ValueError(
            f"a model of one's own is package.module:callable, named as in `import package.module`, got {name!r}"
        )
    if os.getcwd() not in sys.path:  # as with `python -m`
        sys.path.insert(0, os.getcwd())
    with naming_failures(f"{module_name} cannot be imported"):
        found: Any = importlib.import_module(module_name)
    for part in attribute.split("."):
        if not hasattr(found, part):
            close = close_to(part, dir(found))
            raise ValueError(f"{module_name} has no {attribute!r}" + (f"; {close}" if close else ""))
        found = getattr(found, part)
    if not isinstance(found, nn.Module):
        if not callable(found):
            raise ValueError(f"{name} is no callable that returns a model, but {type(found).__name__}")
        with naming_failures(f"{name} cannot be called"):
            found = found(**given)
        if not isinstance(found, nn.Module):
            raise ValueError(f"{name} returns no torch.nn.Module, but {type(found).__name__}")
    config = getattr(found, "pretrained_cfg", None)
    return found, preprocessing_of_timm(config) if isinstance(config, dict) else Preprocessing()


# --- weights --------------------------------------------------------------------------------------------------


def load_weights(model: nn.Module, path: Path) -> None:
    """Load a state_dict into a model, also from a checkpoint that wraps it, or of a model that was part of a wrapper.

    Raises:
        ValueError: the file cannot be read, or has other weights than the model.
    """
    state, own = _state_of(path), model.state_dict()
    # A wrapper's: "module." of DistributedDataParallel, "_orig_mod." of a compiled one.
    while state.keys().isdisjoint(own):
        prefixes = {name.partition(".")[0] for name in state}
        if len(prefixes) > 1 or not all("." in name for name in state):
            break
        state = {name.partition(".")[2]: value for name, value in state.items()}
    missing = [name for name in own if name not in state and not name.endswith("num_batches_tracked")]
    surplus = [name for name in state if name not in own]
    shapes = [
        f"{name} is {list(state[name].shape)} in the file, {list(own[name].shape)} in the model"
        for name in own
        if name in state and isinstance(own[name], Tensor) and state[name].shape != own[name].shape
    ]
    problems = [
        *shapes[:1],
        *([f"the file lacks {_some(missing)}"] if missing else []),
        *([f"the model lacks {_some(surplus)}"] if surplus else []),
    ]
    if problems:
        raise ValueError(f"{str(path)!r} does not fit {type(model).__name__}: {'; '.join(problems)}")
    model.load_state_dict(state, strict=False)


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _state_of(path: Path) -> dict[str, Tensor]:
    if not path.is_file():
        raise ValueError(f"there is no file {str(path)!r}")
    if path.suffix == ".ptq4":
        raise ValueError(f"{str(path)!r} is a quantized network: --weights takes those of the float model")
    try:
        if path.suffix == ".safetensors":
            return safetensors.torch.load_file(path)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that it is a TorchScript archive, which the error says, too
            found = torch.load(path, map_location="cpu", weights_only=True)
    except (SafetensorError, OSError, RuntimeError) as error:
        if "TorchScript" in str(error):
            raise ValueError(f"{str(path)!r} is a TorchScript archive: save model.state_dict()") from error
        raise ValueError(f"{str(path)!r} cannot be read as weights ({first_line(error)})") from error
    except Exception as error:  # pickle.UnpicklingError, and whatever else garbage leads to
        if "Unsupported global" not in str(error):
            raise ValueError(f"{str(path)!r} cannot be read as weights: it is no file of torch.save") from error
        raise ValueError(
            f"{str(path)!r} holds more than tensors, which may run code when it is read: save model.state_dict()"
        ) from error
    for name in _WRAPPERS:
        if isinstance(found, dict) and isinstance(found.get(name), dict):
            found = found[name]
    if not isinstance(found, dict) or not found or not all(isinstance(value, Tensor) for value in found.values()):
        raise ValueError(f"{str(path)!r} holds no state_dict")
    return found
