"""The PEP 517 backend: setuptools, except that torch is a build requirement only where there is none.

A build in isolation that simply required torch would download gigabytes beside the torch that is installed
already, and compile against another one than the package will run with.
"""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path
from typing import Any

from setuptools import build_meta
from setuptools.build_meta import (
    build_sdist,
    get_requires_for_build_sdist,
    prepare_metadata_for_build_editable,
    prepare_metadata_for_build_wheel,
)

import build_config

__all__ = [
    "build_editable",
    "build_sdist",
    "build_wheel",
    "get_requires_for_build_editable",
    "get_requires_for_build_sdist",
    "get_requires_for_build_wheel",
    "prepare_metadata_for_build_editable",
    "prepare_metadata_for_build_wheel",
]

Settings = dict[str, Any] | None


def get_requires_for_build_wheel(config_settings: Settings = None) -> list[str]:
    """Return ["torch>=2.10"] where neither the build nor the target environment has torch, else nothing."""
    build_config.check_compiler(os.environ)  # before gigabytes are downloaded in vain
    return build_config.torch_requirements([*sys.path, *build_config.target_paths()])


get_requires_for_build_editable = get_requires_for_build_wheel


def build_wheel(wheel_directory: str, config_settings: Settings = None, metadata_directory: str | None = None) -> str:
    """Build the wheel, with ninja reusing the objects of an earlier build in the same folder."""
    # setuptools would pack modules again that an earlier build left here and that have been deleted since.
    for stale in Path("build").glob("lib*"):
        shutil.rmtree(stale)
    return build_meta.build_wheel(wheel_directory, config_settings, metadata_directory)


def build_editable(
    wheel_directory: str, config_settings: Settings = None, metadata_directory: str | None = None
) -> str:
    """Build the libraries into the source folder and a wheel that points there."""
    return build_meta.build_editable(wheel_directory, config_settings, metadata_directory)
