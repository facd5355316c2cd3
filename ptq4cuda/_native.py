"""Loads the native libraries, once, when imported, and remembers what is missing and why.

Two libraries: `_C` holds the CPU kernels and the facts about the build, `_C_cuda` the CUDA kernels. Both only
register kernels for operators that ptq4cuda.ops has defined before it imports this module. A library that
cannot be loaded is no error: the operators then run their pure-PyTorch reference, slow but right.
"""

from __future__ import annotations

import functools
import importlib
import re
import sys
import warnings
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path
from typing import Any

import torch

_FOLDER = Path(__file__).resolve().parent


def _load_cpu() -> tuple[str, str, dict[str, Any]]:
    """Return the path of the loaded library, or "" and the reason; and the facts about the build."""
    try:
        library = importlib.import_module("ptq4cuda._C")
    except ModuleNotFoundError as error:
        if error.name != "ptq4cuda._C":
            raise
        source = _FOLDER.parent
        if (source / "setup.py").is_file() and (source / "csrc").is_dir():
            reason = (
                f"ptq4cuda was imported from its source folder {source}, which holds no built library: "
                "run `pip install .` there and start Python in another folder, or run `pip install -e .`"
            )
        else:
            reason = (
                f"{_FOLDER} holds no library for Python {sys.version_info.major}.{sys.version_info.minor} "
                "on this platform: reinstall ptq4cuda with this Python"
            )
        return "", reason, {}
    except ImportError as error:
        reason = f"the library did not load ({error}): reinstall ptq4cuda beside torch {torch.__version__}"
        return "", reason, {}
    return str(library.__file__), "", library.build_info()


def _load_cuda(missing: str) -> tuple[str, str]:
    """Return the path of the loaded library, or "" and the reason. `missing` is the reason the build gave."""
    if torch.version.cuda is None:
        return "", f"torch {torch.__version__} has no CUDA"
    candidates = (_FOLDER / f"_C_cuda{suffix}" for suffix in EXTENSION_SUFFIXES)
    path = next((str(path) for path in candidates if path.is_file()), "")
    if not path:
        return "", missing or cpu_reason or f"{_FOLDER} holds no CUDA library: reinstall ptq4cuda"
    try:
        torch.ops.load_library(path)
    except OSError as error:
        return "", f"the library did not load ({error}): reinstall ptq4cuda beside torch {torch.__version__}"
    return path, ""


cpu_path, cpu_reason, build_info = _load_cpu()
cuda_path, cuda_reason = _load_cuda(build_info.get("cuda_missing", ""))
cpu_loaded = bool(cpu_path)
# Do integer convolutions on the CPU add up products in 16 bits, for as long as their span allows?
narrow_sums = build_info.get("simd_level") in ("avx2", "avx512")
cuda_loaded = bool(cuda_path)


@functools.cache
def device_reason(index: int) -> str:
    """Return why the CUDA kernels cannot run on CUDA device `index`, or "" if they can.

    Asking for a device's compute capability initialises CUDA, which an import must not do (processes forked
    later could not use CUDA), so this is a function and no constant.
    """
    if not cuda_loaded:
        return cuda_reason
    capability = torch.cuda.get_device_capability(index)
    architectures = build_info.get("cuda_architectures", "")
    if _covers(architectures, capability):
        return ""
    major, minor = capability
    return (
        f"the CUDA library has no code for sm_{major}{minor} ({torch.cuda.get_device_name(index)}), only for "
        f"{architectures}: reinstall ptq4cuda with TORCH_CUDA_ARCH_LIST='{major}.{minor}'"
    )


def _covers(architectures: str, capability: tuple[int, int]) -> bool:
    """Tell whether code built for `architectures`, as "8.0;9.0+PTX", runs on a compute capability.

    Machine code runs on its own and later minor versions, PTX on everything later. "9.0a" runs on 9.0 alone.
    """
    for entry in architectures.split(";"):
        match = re.fullmatch(r"(\d+)\.(\d)(a?)f?(\+PTX)?", entry)
        if match is None:  # a name such as "Hopper"; the CUDA runtime will tell
            return True
        built = int(match[1]), int(match[2])
        if built == capability or (not match[3] and built[0] == capability[0] and built <= capability):
            return True
        if match[4] and not match[3] and built <= capability:
            return True
    return False


def _warn() -> None:
    """Say once that the slow reference takes the place of a library that this machine could use."""
    if not cpu_loaded:
        what, reason = "ptq4cuda runs without its native libraries", cpu_reason
    # device_count asks the driver without initialising CUDA.
    elif not cuda_loaded and torch.version.cuda is not None and torch.cuda.device_count() > 0:
        what, reason = "ptq4cuda runs without its CUDA library", cuda_reason
    else:
        return
    message = f"{what}, on the pure-PyTorch reference, which is slow but right. The reason: {reason}."
    warnings.warn(message, RuntimeWarning, stacklevel=2)


_warn()
