"""The built libraries keep to the stable ABI, and the build decides as documented."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

import build_config
import check_symbols
import ptq4cuda
from ptq4cuda import _native as native

ROOT = Path(__file__).resolve().parent.parent


# --- the installed package ---------------------------------------------------------------------------------


def test_the_installed_package_is_tested_and_not_the_source_folder() -> None:
    assert Path(ptq4cuda.__file__).parent.parent != ROOT or native.cpu_loaded
    assert native.cpu_loaded, native.cpu_reason


def test_importing_it_imports_nothing_heavy_beside_torch(tmp_path: Path) -> None:
    code = """
import sys, torch
before = set(sys.modules)
import ptq4cuda
heavy = "sympy", "torch._dynamo", "torch._inductor", "onnx", "typer", "rich", "matplotlib", "PIL", "pandas"
print([name for name in heavy if name in set(sys.modules) - before])
"""
    found = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert found.stdout == "[]\n"


def libraries() -> list[str]:
    return [path for path in (native.cpu_path, native.cuda_path) if path]


@pytest.mark.parametrize("library", libraries())
def test_the_library_needs_only_the_stable_c_shim(library: str) -> None:
    symbols = check_symbols.undefined_symbols(library)
    assert any(symbol.startswith("aoti_torch_") for symbol in symbols)
    assert check_symbols.unstable_symbols(symbols) == []


@pytest.mark.parametrize(
    ("symbol", "stable"),
    [
        ("aoti_torch_get_sizes", True),
        ("torch_call_dispatcher", True),
        ("_ZNSt8ios_base4InitC1Ev", True),
        ("PyObject_Repr", False),
        ("_Py_Dealloc", False),
        # torch's types may be arguments: they are defined in headers.
        ("_ZN8ptq4cuda4packEN3c1010ScalarTypeE", True),
        ("_ZN2at6Tensor4sizeEl", False),
        ("_ZN3c106SymIntC1El", False),
        ("_ZTIN3c105ErrorE", False),
        ("_ZNK5torch8autograd4Node4nameEv", False),
        ("THPVariableClass", False),
    ],
)
def test_symbols_are_judged_by_the_namespace_that_owns_them(symbol: str, stable: bool) -> None:
    assert (check_symbols.unstable_symbols([symbol]) == []) == stable


def test_build_facts() -> None:
    facts = native.build_info
    assert facts["compiler"]
    assert facts["torch"]
    assert facts["simd_level"] in facts["simd_levels"]
    assert bool(facts["cuda_architectures"]) != bool(facts["cuda_missing"])


def test_info_names_every_part() -> None:
    text = subprocess.run(
        [sys.executable, "-c", "from ptq4cuda.info import info; print(info())"],
        text=True,
        capture_output=True,
        check=True,
        cwd=ROOT / "tests",
    ).stdout
    for name in ("ptq4cuda", "Python", "torch", "numpy", "CPU library", "SIMD level", "CUDA library", "GPU"):
        assert f"\n{name} " in f"\n{text}"
    assert native.cpu_path in text
    if not native.cuda_loaded:
        assert native.cuda_reason in text


def test_the_source_folder_says_that_it_holds_no_library(tmp_path: Path) -> None:
    # A copy of the Python files alone, as a fresh clone holds them.
    for source in (ROOT / "ptq4cuda").rglob("*.py"):
        copy = tmp_path / source.relative_to(ROOT)
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_bytes(source.read_bytes())
    (tmp_path / "setup.py").touch()
    (tmp_path / "csrc").mkdir()
    code = "import ptq4cuda; from ptq4cuda import _native as n; print(n.cpu_loaded, n.cpu_reason)"
    run = subprocess.run([sys.executable, "-c", code], text=True, capture_output=True, cwd=tmp_path)
    assert run.stdout.startswith(f"False ptq4cuda was imported from its source folder {tmp_path}")
    assert run.stderr.count("RuntimeWarning") == 1
    assert "pip install ." in run.stderr


def test_tests_of_a_folder_without_libraries_fail_once(tmp_path: Path) -> None:
    for name in ("benchmarks", "csrc", "ptq4cuda", "tests", "tools"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    for name in ("setup.py", "pyproject.toml"):
        shutil.copy(ROOT / name, tmp_path)
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/ops/test_nibbles.py"],
        text=True,
        capture_output=True,
        cwd=tmp_path,
        env={name: value for name, value in os.environ.items() if name != "PYTHONPATH"},
    )
    assert run.returncode == pytest.ExitCode.USAGE_ERROR
    assert run.stdout.count("holds no built library: run `pip install .`") == 1, run.stdout
    assert "Traceback" not in run.stdout + run.stderr


def test_the_source_distribution_is_complete(tmp_path: Path) -> None:
    command = [sys.executable, "setup.py", "-q", "egg_info", "-e", str(tmp_path), "sdist", "-d", str(tmp_path)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    (archive,) = tmp_path.glob("*.tar.gz")
    assert archive.name == f"ptq4cuda-{ptq4cuda.__version__}.tar.gz"
    with tarfile.open(archive) as opened:
        held = {name.partition("/")[2] for name in opened.getnames()}
    tracked = (
        "docs/*.md",
        "csrc/**/*.*",
        "tests/**/*.py",
        "benchmarks/*.py",
        "tools/*.py",
        "ptq4cuda/**/*.py",
        "*.md",
    )
    wanted = {str(path.relative_to(ROOT)) for pattern in tracked for path in ROOT.glob(pattern)}
    assert wanted - held == set()


@pytest.mark.parametrize(
    ("architectures", "capability", "covered"),
    [
        ("7.5;8.0;9.0+PTX", (9, 0), True),
        ("7.5;8.0;9.0+PTX", (8, 9), True),
        ("7.5;8.0;9.0+PTX", (12, 0), True),
        ("7.5;8.0;9.0+PTX", (7, 0), False),
        ("8.6", (8, 0), False),
        ("8.0", (9, 0), False),
        ("9.0a", (9, 0), True),
        ("9.0a+PTX", (10, 0), False),
        ("10.0f", (10, 3), True),
        ("Hopper", (9, 0), True),
        ("", (9, 0), True),
    ],
)
def test_which_devices_an_architecture_list_covers(
    architectures: str, capability: tuple[int, int], covered: bool
) -> None:
    assert native._covers(architectures, capability) == covered


# --- what a build requires ---------------------------------------------------------------------------------


def install_torch(folder: Path, version: str) -> str:
    """Leave the traces of an installed torch in a folder."""
    traces = folder / f"torch-{version}.dist-info"
    traces.mkdir(parents=True)
    (traces / "METADATA").write_text(f"Metadata-Version: 2.1\nName: torch\nVersion: {version}\n")
    return str(folder)


def test_torch_is_required_only_where_there_is_none(tmp_path: Path) -> None:
    assert build_config.torch_requirements([str(tmp_path)]) == ["torch>=2.10"]
    folder = install_torch(tmp_path / "new", "2.10.0+cu128")
    assert build_config.torch_requirements([str(tmp_path), folder]) == []


def test_an_old_torch_is_named(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match=r"torch 2\.9\.1 is installed, and torch 2\.10 or later is needed"):
        build_config.torch_requirements([install_torch(tmp_path, "2.9.1")])


def test_the_backend_finds_the_torch_that_isolation_hides() -> None:
    code = f"""
import sys, sysconfig
sys.path.insert(0, {str(ROOT / "tools")!r})
import build_backend, build_config
hidden = {{sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}}
sys.path = [path for path in sys.path if path not in hidden]
print(build_config.torch_requirements(sys.path))
print(build_backend.get_requires_for_build_wheel(), build_backend.get_requires_for_build_editable())
build_config.make_torch_importable()
import torch
"""
    run = subprocess.run([sys.executable, "-I", "-c", code], text=True, capture_output=True)
    assert run.returncode == 0, run.stderr
    assert run.stdout.splitlines() == ["['torch>=2.10']", "[] []"]


def test_metadata_and_sdist_compile_nothing() -> None:
    assert not build_config.compiles(["setup.py", "sdist", "--formats", "gztar"])
    assert not build_config.compiles(["setup.py", "dist_info"])
    assert build_config.compiles(["setup.py", "bdist_wheel"])
    assert build_config.compiles(["setup.py", "editable_wheel"])


def test_one_wheel_is_for_every_python() -> None:
    from setuptools import Distribution, Extension

    distribution = Distribution({"name": "ptq4cuda", "version": "1", "ext_modules": [Extension("ptq4cuda._C", [])]})
    command = build_config._wheel_for_any_python()(distribution)
    command.ensure_finalized()
    assert command.get_tag()[:2] == ("py3", "none")
    assert Path(native.cpu_path).name == "_C.so"


# --- compilers ---------------------------------------------------------------------------------------------


def write_script(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return path


def test_a_missing_compiler_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match=r"no C\+\+ compiler was found \('c\+\+' is not on PATH\); install"):
        build_config.check_compiler({"PATH": str(tmp_path)})
    with pytest.raises(SystemExit, match="'none++' is not on PATH".replace("+", r"\+")):
        build_config.check_compiler({"PATH": os.environ["PATH"], "CXX": "none++ -m64"})


def test_an_old_compiler_is_named(tmp_path: Path) -> None:
    write_script(tmp_path / "c++", "exit 1")
    with pytest.raises(SystemExit, match=r"compiler 'c\+\+' does not compile C\+\+20"):
        build_config.check_compiler({"PATH": f"{tmp_path}:{os.environ['PATH']}"})


def fake_toolkit(root: Path, release: str = "13.0") -> Path:
    """Write an nvcc that answers the two questions of the build, as the real one does (TOP on stderr)."""
    answers = (
        f'case "$*" in *--dryrun*) echo "#$ _SPACE_= " >&2; echo "#$ TOP={root}/bin/.." >&2; exit 1;;\n'
        f'*) echo "Cuda compilation tools, release {release}, V{release}.88";; esac'
    )
    return write_script(root / "bin" / "nvcc", answers)


def test_the_toolkit_of_a_wrapped_nvcc_is_found(tmp_path: Path) -> None:
    nvcc = fake_toolkit(tmp_path / "toolkit")
    write_script(tmp_path / "far" / "bin" / "nvcc", f'exec "{nvcc}" "$@"')
    environ = {"PATH": f"{tmp_path / 'far' / 'bin'}:{os.environ['PATH']}"}
    assert build_config.find_cuda(environ, "2.13.0+cu130", "13.0").root == tmp_path / "toolkit"


def test_cuda_home_comes_before_path(tmp_path: Path) -> None:
    fake_toolkit(tmp_path / "on_path")
    fake_toolkit(tmp_path / "home")
    environ = {"PATH": str(tmp_path / "on_path" / "bin"), "CUDA_HOME": str(tmp_path / "home")}
    assert build_config.find_cuda(environ, "2.13.0+cu130", "13.0").root == tmp_path / "home"
    environ["CUDA_HOME"] = str(tmp_path / "empty")
    missing = build_config.find_cuda(environ, "2.13.0+cu130", "13.0").missing
    assert f"nvcc was not found in {tmp_path / 'empty' / 'bin'}" in missing


@pytest.mark.parametrize(
    ("torch_cuda", "release", "reason"),
    [
        (None, "13.0", "the torch it is built against, 2.13.0, has no CUDA"),
        ("13.0", None, "nvcc was not found on PATH"),
        ("12.8", "13.0", "nvcc is of CUDA 13.0 and torch 2.13.0 of CUDA 12.8"),
    ],
)
def test_why_the_cuda_library_is_not_built(
    tmp_path: Path, torch_cuda: str | None, release: str | None, reason: str
) -> None:
    environ = {"PATH": str(tmp_path / "bin")}
    if release is not None:
        fake_toolkit(tmp_path, release)
    toolkit = build_config.find_cuda(environ, "2.13.0", torch_cuda)
    assert toolkit.root is None
    assert toolkit.missing.startswith(reason)
    with pytest.raises(SystemExit, match=f"PTQ4CUDA_CUDA=1 asks for the CUDA library, but {reason}"):
        build_config.find_cuda({**environ, "PTQ4CUDA_CUDA": "1"}, "2.13.0", torch_cuda)


def test_the_cuda_library_can_be_turned_off(tmp_path: Path) -> None:
    fake_toolkit(tmp_path)
    environ = {"PATH": str(tmp_path / "bin"), "PTQ4CUDA_CUDA": "0"}
    assert build_config.find_cuda(environ, "2.13.0", "13.0").missing.startswith("PTQ4CUDA_CUDA=0")
    with pytest.raises(SystemExit, match="PTQ4CUDA_CUDA is 'yes'; it must be 0, 1 or unset"):
        build_config.find_cuda({"PTQ4CUDA_CUDA": "yes"}, "2.13.0", "13.0")


@pytest.mark.parametrize(
    ("wanted", "visible", "chosen"),
    [
        ("8.6;9.0+PTX", [(8, 0)], "8.6;9.0+PTX"),
        ("8.0 9.0a, 10.0;", [], "8.0;9.0a;10.0"),
        (None, [(9, 0), (8, 0), (9, 0)], "8.0;9.0+PTX"),
        ("native", [(10, 0), (9, 0)], "9.0;10.0+PTX"),
        ("native", [], "7.5;8.0;9.0+PTX"),
        (None, [], "7.5;8.0;9.0+PTX"),
    ],
)
def test_architectures_asked_for_come_before_visible_ones_and_those_before_the_default(
    wanted: str | None, visible: list[tuple[int, int]], chosen: str
) -> None:
    environ = {} if wanted is None else {"TORCH_CUDA_ARCH_LIST": wanted}
    assert build_config.choose_architectures(environ, visible) == chosen
