"""The command line: `ptq4cuda` or `python -m ptq4cuda`."""

from __future__ import annotations

import sys

from ptq4cuda._version import __version__


def main() -> None:
    """Run the command line. `info` and `--version` work without the packages of the extra "cli"."""
    try:
        from ptq4cuda.cli.app import app
    except ModuleNotFoundError as error:
        if error.name not in ("typer", "rich"):
            raise
        if sys.argv[1:] == ["--version"]:
            print(f"ptq4cuda {__version__}")
            return
        if sys.argv[1:] == ["info"]:
            from ptq4cuda.info import info

            print(info())
            return
        print(f"ptq4cuda: commands need {error.name}: run `pip install 'ptq4cuda[cli]'`", file=sys.stderr)
        raise SystemExit(2) from None
    app()
