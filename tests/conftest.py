"""Fixtures: the backends that every operator is tested on, a small network and its images, real networks."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator
from pathlib import Path

import networks
import pytest
import torch
from torch import Tensor, nn

from cuda_on_cpu import build
from ops.backends import BACKENDS, Backend
from ops.levels import Level
from ptq4cuda import _native
from ptq4cuda.calibrate import frontier
from ptq4cuda.ops import registration
from small_networks import Residual, calibrate_batch_norm


def pytest_sessionstart() -> None:
    """Fail once, not in every test, where what would be tested is a source folder without its libraries."""
    if not _native.cpu_loaded:
        pytest.exit(_native.cpu_reason, returncode=pytest.ExitCode.USAGE_ERROR)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--shard", metavar="I/N", help="run the I-th of N shares of the tests")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Skip what is marked gpu where there is none, and what belongs to other shards."""
    reason = _native.cuda_reason if torch.cuda.is_available() else "there is no GPU"
    for item in items if reason else ():
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason=reason))
    if shard := config.getoption("--shard"):
        index, count = map(int, shard.split("/"))
        # Tests that must not run side by side are in one group, as pytest-xdist calls it.
        groups = [item.get_closest_marker("xdist_group") for item in items]
        mine = [(1 if group else i % count + 1) == index for i, group in enumerate(groups)]
        config.hook.pytest_deselected(items=[item for item, is_mine in zip(items, mine, strict=True) if not is_mine])
        items[:] = [item for item, is_mine in zip(items, mine, strict=True) if is_mine]


@pytest.fixture(scope="session")
def model_cache(pytestconfig: pytest.Config, tmp_path_factory: pytest.TempPathFactory) -> Path:
    cache = getattr(pytestconfig, "cache", None)
    return cache.mkdir("cuda_on_cpu") if cache else tmp_path_factory.mktemp("cuda_on_cpu")


@pytest.fixture(scope="session")
def libraries() -> Iterator[dict[str, torch.library.Library]]:
    """Namespaces defined by the tests, alive for the session."""
    namespaces = ("ptq4cuda_reference", "ptq4cuda_on_cpu")
    yield {namespace: registration.define(namespace) for namespace in namespaces}


@pytest.fixture(scope="session")
def reference(libraries: dict[str, torch.library.Library]) -> Backend:
    registration.implement(libraries["ptq4cuda_reference"], "ptq4cuda_reference")
    return Backend("reference", "ptq4cuda_reference")


@pytest.fixture(scope="session")
def cpu() -> Backend:
    assert _native.cpu_loaded, _native.cpu_reason
    return Backend("cpu", "ptq4cuda")


@pytest.fixture(scope="session")
def cuda_on_cpu(libraries: dict[str, torch.library.Library], model_cache: Path) -> Backend:
    registration.implement(libraries["ptq4cuda_on_cpu"], "ptq4cuda_on_cpu")
    torch.ops.load_library(build.library(model_cache))
    return Backend("cuda_on_cpu", "ptq4cuda_on_cpu")


@pytest.fixture(scope="session")
def printed_at(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., list[str]]]:
    """Run a program at an instruction set, or at the best below it that there is, and return the words it prints."""
    processes: dict[str, Level] = {}
    folder = tmp_path_factory.mktemp("levels")  # not the source folder, which may hold no library

    def run(level: str, program: str, *arguments: object) -> list[str]:
        if level not in processes:
            processes[level] = Level(level, folder)
        return processes[level].run(program, *map(str, arguments)).split()

    yield run
    for process in processes.values():
        process.end()


@pytest.fixture
def execution_model(cuda_on_cpu: Backend, model_cache: Path) -> Iterator[ctypes.CDLL]:
    """The execution model under the CUDA sources; a device that a test chooses is its own."""
    library = ctypes.CDLL(str(build.library(model_cache)))
    yield library
    library.cuda_on_cpu_use_device(0)


@pytest.fixture(scope="session")
def cuda() -> Backend:
    return Backend("cuda", "ptq4cuda", "cuda")


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> Backend:
    found: Backend = request.getfixturevalue(request.param)
    return found


# --- networks ----------------------------------------------------------------------------------------------------


@pytest.fixture
def images() -> Tensor:
    return torch.randn(48, 3, 12, 12, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def model(images: Tensor) -> nn.Module:
    torch.manual_seed(0)
    return calibrate_batch_norm(Residual(), images)


@pytest.fixture(scope="session")
def real_data() -> None:
    """Fail rather than skip where the folder is there, even if it is incomplete."""
    if not networks.available():
        pytest.skip(f"no trained networks in {networks.DATA} (see benchmarks/networks.py)")


@pytest.fixture(scope="session")
def resnet20(real_data: None) -> networks.Subject:
    return networks.resnet20()


@pytest.fixture(scope="session")
def resnet20_512(real_data: None) -> networks.Subject:
    return networks.resnet20(calibration_images=512)


@pytest.fixture(scope="session")
def mobilenet_128(real_data: None) -> networks.Subject:
    return networks.mobilenet()


@pytest.fixture(scope="session")
def mobilenet(real_data: None) -> networks.Subject:
    return networks.mobilenet(calibration_images=64, test_images=100)


@pytest.fixture
def only_tensors_count(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let a memory limit be that of the tensors held, as if the process took nothing beside them."""
    monkeypatch.setattr(frontier, "_WORK", 0)
    monkeypatch.setattr(frontier.Frontier, "_beside", lambda self: 0)
