"""What is installed, what is loaded, and what is missing and why: the text of `ptq4cuda info`.

Written for bug reports too, so it names versions and paths, and it needs nothing but torch and numpy.
"""

from __future__ import annotations

import platform
from importlib import metadata

import torch

from ptq4cuda import _native as native
from ptq4cuda._version import __version__


def info() -> str:
    """Return versions, the libraries loaded, SIMD level, CUDA architectures and GPUs, one aligned line each.

    For whatever is missing the line says why and what to do about it.
    """
    build = native.build_info
    compiled = ", ".join(build.get("simd_levels", []))
    built_with = f" (built with {build['compiler']} against torch {build['torch']})" if build else ""
    lines = [
        ("ptq4cuda", __version__),
        ("Python", f"{platform.python_version()} on {platform.platform()}"),
        ("torch", torch.__version__),
        ("CUDA of torch", torch.version.cuda or "none: this torch runs on the CPU only"),
        ("numpy", _version("numpy")),
        ("CPU library", native.cpu_path + built_with if native.cpu_loaded else _missing(native.cpu_reason)),
        ("SIMD level", f"{build['simd_level']} (compiled in: {compiled})" if build else "none"),
        ("threads", str(torch.get_num_threads())),
        ("CUDA library", native.cuda_path if native.cuda_loaded else _missing(native.cuda_reason)),
        ("CUDA architectures", build.get("cuda_architectures", "") or "none"),
    ]
    lines += [("GPU", gpu) for gpu in _gpus()]
    width = max(len(name) for name, _ in lines)
    return "\n".join(f"{name:<{width}}  {text}" for name, text in lines)


def _missing(reason: str) -> str:
    return f"not loaded: {reason}"


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:  # for example ptq4cuda itself, imported from its source folder
        return "not installed"


def _gpus() -> list[str]:
    if not torch.cuda.is_available():
        return ["none visible"]
    gpus = []
    for index in range(torch.cuda.device_count()):
        gpu = torch.cuda.get_device_properties(index)
        text = f"{gpu.name}, sm_{gpu.major}{gpu.minor}, {gpu.total_memory / 2**30:.0f} GiB"
        if native.cuda_loaded and (reason := native.device_reason(index)):
            text += f"; {reason}"
        gpus.append(text)
    return gpus
