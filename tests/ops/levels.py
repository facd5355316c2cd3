"""Processes whose CPU kernels are those of one instruction set, for what must not depend on it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

_SERVE = """
import contextlib, io, json, sys, traceback
import ptq4cuda
for line in sys.stdin:
    code, *sys.argv[1:] = json.loads(line)
    printed, error = io.StringIO(), ""
    try:
        with contextlib.redirect_stdout(printed):
            exec(code, {"__name__": "__main__"})
    except Exception:
        error = traceback.format_exc()
    print(json.dumps([printed.getvalue(), error]), flush=True)
"""


class Level:
    """A process that runs the programs of all tests at one level; each would spend most of its time importing torch.

    Args:
        name: a value of PTQ4CUDA_SIMD.
        folder: in which it works.
    """

    def __init__(self, name: str, folder: Path) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-c", _SERVE],
            cwd=folder,
            env={**os.environ, "PTQ4CUDA_SIMD": name},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def run(self, program: str, *arguments: str) -> str:
        """Return what a program prints that finds these arguments in sys.argv."""
        assert self._process.stdin is not None and self._process.stdout is not None
        print(json.dumps([program, *arguments]), file=self._process.stdin, flush=True)
        answer = self._process.stdout.readline()
        assert answer, f"the process has ended, with {self._process.wait()}"
        printed, error = json.loads(answer)
        assert not error, error
        return str(printed)

    def end(self) -> None:
        self._process.kill()
        self._process.communicate()
