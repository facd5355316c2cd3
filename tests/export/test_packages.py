"""Exported programs and packages of AOTInductor in processes that have the library of operators and not ptq4cuda."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils import cpp_extension

from ptq4cuda import QuantConfig, _native, quantize

ROOT = Path(__file__).resolve().parents[2]

LOADS = """
import sys, numpy, torch
library, folder = sys.argv[1:]
torch.ops.load_library(library)
x = torch.from_numpy(numpy.fromfile(f"{folder}/input.bin", "float32")).reshape(5, 3, 12, 10)
torch.export.load(f"{folder}/program.pt2").module()(x).detach().numpy().tofile(f"{folder}/program.bin")
torch._inductor.aoti_load_package(f"{folder}/package.pt2")(x).detach().numpy().tofile(f"{folder}/package.bin")
assert "ptq4cuda" not in sys.modules
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("packages")
    torch.manual_seed(0)
    net = nn.Sequential(
        *(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 4, 3), nn.Sigmoid(), nn.Conv2d(4, 2, 1)),
        nn.ConvTranspose2d(2, 2, 2, 2, output_padding=1),  # an operator of its own, whose values have no upper bound
    )
    network = quantize(net.eval(), [torch.randn(32, 3, 12, 10)], QuantConfig.fast())
    batch = torch.export.Dim("batch", min=1, max=16)
    program = torch.export.export(network, (torch.randn(4, 3, 12, 10),), dynamic_shapes=({0: batch},))
    called = {str(node.target) for node in program.graph.nodes if "ptq4cuda" in str(node.target)}
    assert called == {"ptq4cuda.run_layers.default", "ptq4cuda.conv2d_integer.default"}
    torch.export.save(program, folder / "program.pt2")
    quick = {"aot_inductor.compile_wrapper_opt_level": "O0", "aot_inductor.precompile_headers": False}
    torch._inductor.aoti_compile_and_package(
        program, package_path=str(folder / "package.pt2"), inductor_configs=quick
    )
    x = torch.randn(5, 3, 12, 10)
    x.numpy().tofile(folder / "input.bin")
    network(x).detach().numpy().tofile(folder / "expected.bin")
    return folder


def result(folder: Path, name: str) -> np.ndarray:
    return np.fromfile(folder / name, "float32")


def test_another_process_needs_the_library_alone(folder: Path) -> None:
    command = [sys.executable, "-c", LOADS, _native.cpu_path, str(folder)]
    subprocess.run(command, check=True, cwd=folder)
    np.testing.assert_array_equal(result(folder, "program.bin"), result(folder, "expected.bin"))
    np.testing.assert_array_equal(result(folder, "package.bin"), result(folder, "expected.bin"))


def test_a_program_of_c_plus_plus_needs_no_python(folder: Path) -> None:
    program = folder / "serve"
    includes = [f"-I{path}" for path in cpp_extension.include_paths()]
    libraries = [flag for path in cpp_extension.library_paths() for flag in (f"-L{path}", f"-Wl,-rpath,{path}")]
    source = ROOT / "examples" / "cpp" / "main.cpp"
    command = ["c++", "-std=c++20", *includes, str(source), "-o", str(program), *libraries]
    subprocess.run([*command, "-ltorch", "-ltorch_cpu", "-lc10", "-ldl"], check=True)

    def serve(library: str) -> subprocess.CompletedProcess[str]:
        files = (folder / "package.pt2", folder / "input.bin", "5,3,12,10", folder / "output.bin")
        return subprocess.run([program, library, *files], capture_output=True, text=True)

    run = serve(_native.cpu_path)
    assert run.returncode == 0, run.stderr
    np.testing.assert_array_equal(result(folder, "output.bin"), result(folder, "expected.bin"))
    assert "libpython" not in subprocess.run(["ldd", program], capture_output=True, text=True).stdout
    missing = serve(str(folder / "none.so"))
    assert missing.returncode == 1 and "none.so: cannot open shared object file" in missing.stderr
