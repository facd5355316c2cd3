"""The command line: `ptq4cuda` or `python -m ptq4cuda`."""

# No postponed annotations here: typer reads them, and is imported only inside main().

import sys
from pathlib import Path
from typing import Annotated

from ptq4cuda._version import __version__
from ptq4cuda.info import info


def main() -> None:
    """Run the command line. `info` and `--version` work without the packages of the extra "cli"."""
    version = f"ptq4cuda {__version__}"
    try:
        import typer
    except ModuleNotFoundError:
        if sys.argv[1:] in (["info"], ["--version"]):
            print(info() if sys.argv[1] == "info" else version)
            return
        raise SystemExit("the ptq4cuda command needs typer: run `pip install 'ptq4cuda[cli]'`") from None

    app = typer.Typer(
        help="Turns a trained PyTorch CNN into a 4-bit one in seconds, without training.",
        no_args_is_help=True,
        invoke_without_command=True,
        add_completion=False,
        pretty_exceptions_enable=False,
    )

    @app.callback()
    def options(
        version_asked: Annotated[bool, typer.Option("--version", is_eager=True, help="Show the version.")] = False,
    ) -> None:
        if version_asked:
            print(version)
            raise typer.Exit

    @app.command("info")
    def info_command() -> None:
        """Show versions, the native libraries in use, and why something is missing."""
        print(info())

    @app.command("demo")
    def demo_command(
        file: Annotated[Path | None, typer.Option(help="Keep the 4-bit network in this file.")] = None,
        plot: Annotated[Path | None, typer.Option(help="Draw the comparison into this image file.")] = None,
    ) -> None:
        """Train a small network on handwritten digits, quantize it, and show what 4 bits cost and bought."""
        try:
            import sklearn  # noqa: F401

            if plot is not None:
                import matplotlib  # noqa: F401
        except ModuleNotFoundError as error:
            raise SystemExit(f"the demo needs {error.name}: run `pip install 'ptq4cuda[demo]'`") from None
        from ptq4cuda import demo

        _check_folders(file, plot)
        demo.run(file, plot)

    @app.command("bench")
    def bench_command(
        device: Annotated[str, typer.Option(help="cpu or cuda; default: cuda where there is one.")] = "",
        quick: Annotated[bool, typer.Option("--quick", help="Few shapes instead of all.")] = False,
        only: Annotated[str, typer.Option(help='Only some cases, for example "fake_quantize layer1 float32".')] = "",
        compiled: Annotated[bool, typer.Option(help="Compare with torch.compile, too.")] = True,
        json: Annotated[Path | None, typer.Option(help="Write the figures into this file.")] = None,
        plot: Annotated[Path | None, typer.Option(help="Draw the figures into this image file.")] = None,
    ) -> None:
        """Time every operator beside a copy of the same memory and beside PyTorch."""
        from ptq4cuda.bench import kernels

        _check_folders(json, plot)
        try:
            kernels.run(_device(device), quick=quick, only=only, compiled=compiled, json_file=json, plot=plot)
        except (ValueError, RuntimeError) as error:
            raise SystemExit(str(error)) from None

    @app.command("bench-models")
    def bench_models_command(
        model: Annotated[list[str] | None, typer.Option(help="Architecture, as resnet50; repeatable.")] = None,
        batch: Annotated[
            list[int] | None, typer.Option(min=1, help="Images of a call; repeatable. [default: 1, 8, 64]")
        ] = None,
        size: Annotated[int, typer.Option(min=1, help="Pixels of the sides of an image.")] = 224,
        repeats: Annotated[int, typer.Option(min=1, help="Calls of which the median counts.")] = 5,
        layers: Annotated[bool, typer.Option("--layers", help="Time each layer, too, at the largest batch.")] = False,
        half: Annotated[bool, typer.Option(help="Compare with bfloat16 (on a GPU float16), too.")] = True,
        compiled: Annotated[bool, typer.Option(help="Compare with torch.compile, too.")] = True,
        device: Annotated[str, typer.Option(help="cpu or cuda; default: cuda where there is one.")] = "",
        json: Annotated[Path | None, typer.Option(help="Write the figures into this file.")] = None,
    ) -> None:
        """Time whole networks with random weights, in float and in 4 bits."""
        from ptq4cuda.bench import models

        _check_folders(json)
        try:
            models.run(
                _device(device),
                models=model or models.MODELS,
                batches=batch or models.BATCHES,
                size=size,
                repeats=repeats,
                layers=layers,
                half=half,
                compiled=compiled,
                json_file=json,
            )
        except ValueError as error:
            raise SystemExit(str(error)) from None

    app()


def _check_folders(*files: Path | None) -> None:
    """Exit before the work rather than after it where a file cannot be written."""
    for file in files:
        if file is not None and not file.parent.is_dir():
            raise SystemExit(f"there is no folder {str(file.parent)!r} to write {file.name!r} into")


def _device(asked: str) -> str:
    """Return the device that was asked for, or by default cuda where there is one."""
    import torch

    if asked not in ("", "cpu", "cuda"):
        raise SystemExit(f"--device must be cpu or cuda, got {asked!r}")
    if asked == "cuda" and not torch.cuda.is_available():
        raise SystemExit("there is no CUDA device that this PyTorch can use: `ptq4cuda info` says more")
    return asked or ("cuda" if torch.cuda.is_available() else "cpu")
