"""The backends that every operator is tested on, as fixtures."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from cuda_on_cpu import build
from ops.backends import BACKENDS, Backend
from ptq4cuda import _native
from ptq4cuda.ops import registration


def pytest_sessionstart() -> None:
    """Fail once, not in every test, where what would be tested is a source folder without its libraries."""
    if not _native.cpu_loaded:
        pytest.exit(_native.cpu_reason, returncode=pytest.ExitCode.USAGE_ERROR)


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


@pytest.fixture
def model(cuda_on_cpu: Backend, model_cache: Path) -> Iterator[ctypes.CDLL]:
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
