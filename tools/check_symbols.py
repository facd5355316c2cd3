"""Checks that native code needs nothing of torch but the stable C shim, and nothing of Python.

One unstable header is enough to bind a library to a single torch release, silently: it shows in the undefined
symbols only.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys

# C++ symbols (functions, type infos, vtables) that live in one of torch's namespaces, and the C functions of Python
# and of torch's Python bindings. What the shim offers is plain C: aoti_torch_* and torch_*.
_UNSTABLE = re.compile(r"_Z(T[A-Z])?(N[rVKRO]*)?(2at|3c10|5torch|6caffe2)|THP|_?Py[A-Z_]")


def undefined_symbols(path: str) -> list[str]:
    """Return the undefined symbols, mangled and without versions, of a shared library or an object file."""
    options = ["-u"] if path.endswith(".o") else ["-u", "-D"]
    listing = subprocess.run(["nm", *options, path], text=True, capture_output=True, check=True).stdout
    return [line.split()[-1].split("@")[0] for line in listing.splitlines() if line.strip()]


def unstable_symbols(symbols: list[str]) -> list[str]:
    """Return those symbols that only one torch release is sure to offer."""
    return [symbol for symbol in symbols if _UNSTABLE.match(symbol)]


def main(paths: list[str]) -> int:
    """Print the unstable symbols of each file and return 1 if there are any."""
    failed = False
    for path in paths:
        for symbol in unstable_symbols(undefined_symbols(path)):
            print(f"{path}: {symbol} is not part of the LibTorch Stable ABI", file=sys.stderr)
            failed = True
    return int(failed)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="+", metavar="LIBRARY_OR_OBJECT")
    sys.exit(main(parser.parse_args().files))
