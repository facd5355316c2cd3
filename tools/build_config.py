"""What gets built, against which torch, with which compilers: every decision of the build as a function.

setup.py and build_backend.py call these functions and hold no decisions themselves. The module imports only
the standard library until the extensions are really built, because the backend asks it for the build
requirements before torch can be imported.

Environment variables: PTQ4CUDA_CUDA (1: the CUDA library must be built, 0: it must not), CUDA_HOME or
CUDA_PATH, TORCH_CUDA_ARCH_LIST, CXX, MAX_JOBS.
"""

from __future__ import annotations

import json
import os
import re
import runpy
import shlex
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

MINIMUM_TORCH = (2, 10)
DEFAULT_ARCHITECTURES = "7.5;8.0;9.0+PTX"

# The macro hides everything from torch's headers that torch 2.10 does not have, so that one build runs on
# every later release.
STABLE_ABI = "-DTORCH_TARGET_VERSION=0x020a000000000000"
# Messages name their place in the source, whoever built it where.
OWN_PATHS = f"-ffile-prefix-map={Path(__file__).resolve().parents[1]}/="
# No fused multiply-add: reference, CPU and CUDA must round alike.
CXX_FLAGS = [
    "-std=c++20",
    "-O3",
    "-g0",  # Python's own flags may ask for debug symbols, ten times the library's size
    "-ffp-contract=off",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-fvisibility=hidden",
    "-Wall",
    "-Wno-uninitialized",  # GCC 12 finds hundreds in its own headers of AVX-512
    "-Wno-maybe-uninitialized",
    OWN_PATHS,
    STABLE_ABI,
]
NVCC_FLAGS = [
    "-std=c++20",
    "-O3",
    "-fmad=false",
    "--expt-relaxed-constexpr",
    "-lineinfo",
    f"-Xcompiler=-ffp-contract=off,-fvisibility=hidden,{OWN_PATHS}",
    STABLE_ABI,
    "-DUSE_CUDA",
]


class BuildError(SystemExit):
    """The build cannot go on. A SystemExit, so that the user reads one sentence and no stack trace."""

    def __init__(self, sentence: str) -> None:
        super().__init__(f"ptq4cuda: {sentence}")


# --- torch -------------------------------------------------------------------------------------------------


def target_paths() -> list[str]:
    """Where the environment that is installed into keeps its packages.

    A build in isolation hides these folders from sys.path, but it runs the target environment's interpreter,
    and sysconfig still knows them.
    """
    return list(dict.fromkeys(sysconfig.get_path(name) for name in ("purelib", "platlib")))


def torch_requirements(paths: Iterable[str]) -> list[str]:
    """Return what a build must install first: nothing where one of `paths` holds torch, else torch."""
    for distribution in metadata.distributions(name="torch", path=list(paths)):
        found = tuple(int(part) for part in re.findall(r"\d+", distribution.version)[:2])
        if found < MINIMUM_TORCH:
            raise BuildError(
                f"torch {distribution.version} is installed, and torch 2.10 or later is needed; "
                "run `pip install --upgrade torch` first."
            )
        return []
    return ["torch>=2.10"]


def make_torch_importable() -> None:
    """Let a build in isolation import the target environment's torch and what torch imports."""
    sys.path.extend(path for path in target_paths() if path not in sys.path)
    if torch_requirements(sys.path):
        raise BuildError("torch is not installed; run `pip install torch` first, or build in isolation.")


# --- compilers ---------------------------------------------------------------------------------------------


def check_compiler(environ: Mapping[str, str]) -> str:
    """Return the command of the C++ compiler; raise unless it knows C++20."""
    if sys.platform == "win32":
        raise BuildError("building on Windows is not supported; use Linux or WSL.")
    command = shlex.split(environ.get("CXX", "c++"))
    if shutil.which(command[0], path=environ.get("PATH", "")) is None:
        raise BuildError(
            f"no C++ compiler was found ({command[0]!r} is not on PATH); "
            "install g++ 11 or clang 14 or later, or set CXX."
        )
    check = [*command, "-std=c++20", "-fsyntax-only", "-x", "c++", "-"]
    result = subprocess.run(check, input="#include <concepts>\n", text=True, capture_output=True, env=dict(environ))
    if result.returncode != 0:
        raise BuildError(
            f"the C++ compiler {shlex.join(command)!r} does not compile C++20; "
            "set CXX to g++ 11 or clang 14 or later."
        )
    return shlex.join(command)


@dataclass(frozen=True)
class CudaToolkit:
    """nvcc's toolkit, or why the CUDA library is not built."""

    root: Path | None = None
    missing: str = ""


def toolkit_root(nvcc: str) -> Path:
    """Return the root of the toolkit that `nvcc` belongs to.

    The nvcc on PATH may be a script or a link far from its toolkit, so nvcc itself is asked: a dry run prints
    the TOP that it derives all its paths from. It prints it before it looks for a host compiler.
    """
    dry_run = [nvcc, "--dryrun", "-c", "-x", "cu", os.devnull, "-o", os.devnull]
    result = subprocess.run(dry_run, text=True, capture_output=True)
    top = re.search(r"^#\$ TOP=(.+)$", result.stdout + result.stderr, re.MULTILINE)
    root = Path(top[1].strip()) if top else Path(nvcc).resolve().parent.parent
    return root.resolve()


def nvcc_release(nvcc: str) -> str:
    """Return the CUDA release of `nvcc`, for example "13.0"; empty if it does not tell."""
    result = subprocess.run([nvcc, "--version"], text=True, capture_output=True)
    release = re.search(r"release (\d+\.\d+)", result.stdout)
    return release[1] if release else ""


def find_cuda(environ: Mapping[str, str], torch_version: str, torch_cuda: str | None) -> CudaToolkit:
    """Decide whether the CUDA library is built. Whether a GPU is visible plays no part.

    Args:
        environ: the environment variables.
        torch_version: torch.__version__.
        torch_cuda: torch.version.cuda.

    Raises:
        BuildError: PTQ4CUDA_CUDA=1 asks for the library and it cannot be built.
    """
    switch = environ.get("PTQ4CUDA_CUDA", "")
    if switch not in ("", "0", "1"):
        raise BuildError(f"PTQ4CUDA_CUDA is {switch!r}; it must be 0, 1 or unset.")
    if switch == "0":
        return CudaToolkit(missing="PTQ4CUDA_CUDA=0 was set when ptq4cuda was built")

    toolkit = _find_toolkit(environ, torch_version, torch_cuda)
    if toolkit.missing and switch == "1":
        raise BuildError(f"PTQ4CUDA_CUDA=1 asks for the CUDA library, but {toolkit.missing}.")
    return toolkit


def _find_toolkit(environ: Mapping[str, str], torch_version: str, torch_cuda: str | None) -> CudaToolkit:
    if torch_cuda is None:
        return CudaToolkit(missing=f"the torch it is built against, {torch_version}, has no CUDA")

    home = environ.get("CUDA_HOME") or environ.get("CUDA_PATH")
    path = str(Path(home, "bin")) if home else environ.get("PATH", "")
    nvcc = shutil.which("nvcc", path=path)
    if nvcc is None:
        where = f"in {path}" if home else "on PATH"
        return CudaToolkit(
            missing=f"nvcc was not found {where} when ptq4cuda was built (install the CUDA {torch_cuda} "
            "toolkit, put its nvcc on PATH or set CUDA_HOME, and reinstall)"
        )
    release = nvcc_release(nvcc)
    if release.split(".")[0] != torch_cuda.split(".")[0]:
        return CudaToolkit(
            missing=f"nvcc is of CUDA {release or 'unknown'} and torch {torch_version} of CUDA {torch_cuda}, "
            "whose major versions must agree (set CUDA_HOME to the right toolkit and reinstall)"
        )
    return CudaToolkit(root=toolkit_root(nvcc))


def choose_architectures(environ: Mapping[str, str], visible: Sequence[tuple[int, int]]) -> str:
    """Return the architectures to compile for, as "8.0;9.0+PTX".

    TORCH_CUDA_ARCH_LIST comes first, then the compute capabilities of the visible GPUs, the newest with PTX
    for GPUs to come, then a list for any GPU since Turing.
    """
    wanted = environ.get("TORCH_CUDA_ARCH_LIST", "").strip()
    if wanted and wanted != "native":
        return ";".join(re.split(r"[;,\s]+", wanted.strip(";, ")))
    if visible:
        return ";".join(f"{major}.{minor}" for major, minor in sorted(set(visible))) + "+PTX"
    return DEFAULT_ARCHITECTURES


def _visible_capabilities() -> list[tuple[int, int]]:
    """Return the compute capabilities of the visible GPUs, none newer than torch was built for."""
    import torch

    if not torch.cuda.is_available():
        return []
    # A GPU newer than torch's toolkit is newer than nvcc too; the PTX of the newest known one runs on it.
    known = [int(digits) for arch in torch.cuda.get_arch_list() for digits in re.findall(r"sm_(\d+)", arch)]
    newest = divmod(max(known, default=999), 10)
    return [min(torch.cuda.get_device_capability(i), newest) for i in range(torch.cuda.device_count())]


# --- the two libraries -------------------------------------------------------------------------------------


def compiles(arguments: Iterable[str]) -> bool:
    """Tell whether a setup.py command line compiles; metadata and sdist need neither torch nor compiler."""
    return not {"sdist", "egg_info", "dist_info", "clean"} & set(arguments)


def package_version(root: Path) -> str:
    """Return the package's version without importing the package, which would need torch."""
    version = re.search(r'^__version__ = "(.+)"$', (root / "ptq4cuda" / "_version.py").read_text(), re.MULTILINE)
    assert version is not None
    return version[1]


def operator_schemas(root: Path) -> str:
    """Return the operators' schemas, one a line, without importing the package."""
    found = runpy.run_path(str(root / "ptq4cuda" / "ops" / "schemas.py"))
    return "\n".join((*found["SCHEMAS"], *found["CPU_SCHEMAS"]))


def native_libraries(root: Path) -> dict[str, Any]:
    """Return setup()'s arguments for ptq4cuda._C and, where CUDA is at hand, ptq4cuda._C_cuda."""
    # Set for setuptools too, which would compile and link with the compiler that Python was built with.
    os.environ["CXX"] = check_compiler(os.environ)
    make_torch_importable()
    import torch

    toolkit = find_cuda(os.environ, torch.__version__, torch.version.cuda)
    architectures = ""
    if toolkit.root is not None:
        architectures = choose_architectures(os.environ, _visible_capabilities())
        # torch.utils.cpp_extension reads both, the first when it is imported.
        os.environ["CUDA_HOME"] = str(toolkit.root)
        os.environ["TORCH_CUDA_ARCH_LIST"] = architectures
    elif torch.version.cuda is not None and os.environ.get("PTQ4CUDA_CUDA") != "0":
        print(f"warning: ptq4cuda is built for the CPU only: {toolkit.missing}.", file=sys.stderr)

    from torch.utils.cpp_extension import BuildExtension, CppExtension, CUDAExtension

    facts = {
        "PTQ4CUDA_VERSION": package_version(root),
        "PTQ4CUDA_TORCH_VERSION": torch.__version__,
        "PTQ4CUDA_CUDA_ARCHITECTURES": architectures,
        "PTQ4CUDA_CUDA_MISSING": toolkit.missing,
        "PTQ4CUDA_SCHEMAS": operator_schemas(root),
    }
    cpu = CppExtension(
        "ptq4cuda._C",
        _sources(root, "csrc/module.cpp") + _sources(root, "csrc/cpu/*.cpp"),
        include_dirs=[str(root / "csrc")],
        define_macros=[(name, json.dumps(str(value))) for name, value in facts.items()],
        extra_compile_args={"cxx": CXX_FLAGS},
    )
    # Of torch's libraries only those that hold the C shim: the stable ABI needs no other.
    cpu.libraries = ["torch_cpu"]
    extensions = [cpu]
    if toolkit.root is not None:
        cuda = CUDAExtension(
            "ptq4cuda._C_cuda",
            _sources(root, "csrc/cuda/*.cu"),
            include_dirs=[str(root / "csrc")],
            extra_compile_args={"cxx": [*CXX_FLAGS, "-DUSE_CUDA"], "nvcc": NVCC_FLAGS},
            # A CUDA runtime of its own, as nvcc links by default: nvcc's minor release need not be torch's.
            extra_link_args=["-Wl,--exclude-libs,ALL"],
        )
        cuda.library_dirs += [str(folder) for folder in sorted(toolkit.root.glob("targets/*/lib"))]
        cuda.libraries = ["torch_cuda", "torch_cpu", "cudart_static", "rt", "dl", "pthread"]
        extensions.append(cuda)
    sources = sum(len(extension.sources) for extension in extensions)
    of_cuda = f", CUDA kernels for {architectures} among them" if architectures else ""
    print(f"ptq4cuda: {sources} sources to compile{of_cuda}", file=sys.stderr, flush=True)
    os.environ.setdefault("NINJA_STATUS", "[%f of %t, %e s] ")
    # The libraries are loaded by torch and not imported: one wheel is for every Python.
    commands = {
        "build_ext": BuildExtension.with_options(no_python_abi_suffix=True),
        "bdist_wheel": _wheel_for_any_python(),
    }
    return {"ext_modules": extensions, "cmdclass": commands}


def _wheel_for_any_python() -> type:
    from setuptools.command.bdist_wheel import bdist_wheel

    class WheelForAnyPython(bdist_wheel):
        def get_tag(self) -> tuple[str, str, str]:
            return "py3", "none", super().get_tag()[2]

    return WheelForAnyPython


def _sources(root: Path, pattern: str) -> list[str]:
    """Return the files that match, relative to the root as setuptools wants them, in a fixed order."""
    return sorted(path.relative_to(root).as_posix() for path in root.glob(pattern))
