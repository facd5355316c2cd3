"""Loads the native libraries, once, when imported, and remembers what is missing and why.

Two libraries, neither of which knows Python: `_C` brings the operators, their CPU kernels and the facts about the
build, `_C_cuda` the CUDA kernels. A library that cannot be loaded is no error: the operators then run their
pure-PyTorch reference, slow but right.
"""

from __future__ import annotations

import ctypes
import functools
import re
import warnings
from pathlib import Path
from typing import Any

import torch

_FOLDER = Path(__file__).resolve().parent


def _load(path: Path) -> tuple[ctypes.CDLL | None, str]:
    """Return a library, or None and the reason."""
    try:
        return ctypes.CDLL(str(path)), ""
    except OSError as error:
        return None, f"the library did not load ({error}): reinstall ptq4cuda beside torch {torch.__version__}"


def _load_cpu() -> tuple[ctypes.CDLL | None, str]:
    """Return the library, or None and the reason."""
    path = _FOLDER / "_C.so"
    if path.is_file():
        return _load(path)
    source = _FOLDER.parent
    if (source / "setup.py").is_file() and (source / "csrc").is_dir():
        return None, (
            f"ptq4cuda was imported from its source folder {source}, which holds no built library: "
            "run `pip install .` there and start Python in another folder, or run `pip install -e .`"
        )
    return None, f"{_FOLDER} holds no library for this platform: reinstall ptq4cuda"


def _facts(library: ctypes.CDLL) -> dict[str, Any]:
    """Return the facts about the build."""
    library.ptq4cuda_build_info.restype = ctypes.c_char_p
    lines = library.ptq4cuda_build_info().decode().splitlines()
    facts: dict[str, Any] = dict(line.split("=", 1) for line in lines)
    return {**facts, "simd_levels": facts["simd_levels"].split()}


def _load_cuda(missing: str) -> tuple[str, str]:
    """Return the path of the loaded library, or "" and the reason. `missing` is the reason the build gave."""
    if torch.version.cuda is None:
        return "", f"torch {torch.__version__} has no CUDA"
    path = _FOLDER / "_C_cuda.so"
    if not path.is_file():
        return "", missing or cpu_reason or f"{_FOLDER} holds no CUDA library: reinstall ptq4cuda"
    loaded, reason = _load(path)
    return str(path) if loaded else "", reason


library, cpu_reason = _load_cpu()
cpu_loaded = library is not None
cpu_path = str(_FOLDER / "_C.so") if cpu_loaded else ""
build_info = _facts(library) if library is not None else {}
cuda_path, cuda_reason = _load_cuda(build_info.get("cuda_missing", ""))
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
