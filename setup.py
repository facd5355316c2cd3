"""Builds the native libraries; what is built, and with what, is decided in tools/build_config.py."""

import sys
from pathlib import Path

from setuptools import setup

ROOT = Path(__file__).resolve().parent
sys.path.insert(0, str(ROOT / "tools"))

import build_config  # noqa: E402

setup(**build_config.native_libraries(ROOT) if build_config.compiles(sys.argv) else {})
