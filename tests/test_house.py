"""How the package is laid out, as docs/design.md says: its floors, names that are functions, headers of test files.

The code is read, not run; imports inside of functions and for type checkers count.
"""

from __future__ import annotations

import ast
import importlib.util
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

import ptq4cuda

ROOT = Path(__file__).parents[1]
PACKAGE = Path(ptq4cuda.__file__).parent
FLOORS = re.search(r"^```floors\n(.*?)^```", (ROOT / "docs" / "design.md").read_text("utf-8"), re.M | re.S)


TOP = "ptq4cuda"  # the package itself


def names_of_modules() -> dict[str, Path]:
    """Return the files of the package's modules, by names as "solve.layer"."""
    paths = {".".join(path.relative_to(PACKAGE).with_suffix("").parts): path for path in PACKAGE.rglob("*.py")}
    return {name.removesuffix("__init__").rstrip(".") or TOP: path for name, path in paths.items()}


MODULES = names_of_modules()


def imported(module: str, *, types: bool) -> Iterator[str]:
    """Yield what a module imports, of the package: where it says so with what is imported for type checkers alone."""
    tree = ast.parse(MODULES[module].read_text("utf-8"))
    if not types:
        tree.body = [
            node for node in tree.body if not (isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test))
        ]
    for node in ast.walk(tree):
        paths: list[str] = []
        if isinstance(node, ast.Import):
            paths = [name.name for name in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module} imports relatively"
            paths = [f"{node.module}.{name.name}" for name in node.names]
        for path in paths:
            root, _, inner = path.partition(".")
            while root == TOP and inner and inner not in MODULES:  # a name in a module
                inner = inner.rpartition(".")[0]
            if root == TOP and inner != module:
                yield inner or TOP


def floors() -> dict[str, int]:
    """Return the height of each room and of each module that docs/design.md names by itself, the lowest first."""
    assert FLOORS is not None
    heights: dict[str, int] = {}
    for height, line in enumerate(reversed(FLOORS.group(1).splitlines())):
        room, colon, modules = line.partition(":")
        names = [f"{room}.{module}" for module in modules.split()] if colon else line.split()
        assert not heights.keys() & set(names), line
        heights.update(dict.fromkeys(names, height))
    return heights


HEIGHTS = floors()


def height_of(module: str) -> int | None:
    room = module.partition(".")[0]
    if module == room and module not in HEIGHTS and any(name.startswith(f"{room}.") for name in HEIGHTS):
        return 0  # the __init__ of a room on several floors, which imports nothing
    return HEIGHTS.get(module, HEIGHTS.get(room))


def test_nothing_is_decided_by_a_clock() -> None:
    """Benchmarks read one; quantize() and the demo say how long quantization took."""
    found = {name for name, path in MODULES.items() if re.search(r"^\s*(import|from) time\b", path.read_text(), re.M)}
    assert found == {"bench.timing", "bench.kernels", "pipeline", "demo"}


def test_imports_have_no_circle() -> None:
    done: set[str] = set()

    def visit(module: str, way: tuple[str, ...]) -> None:
        assert module not in way, f"a circle: {' -> '.join([*way[way.index(module) :], module])}"
        if module not in done:
            for other in sorted(set(imported(module, types=False))):
                visit(other, (*way, module))
            done.add(module)

    for module in MODULES:
        visit(module, ())


@pytest.mark.parametrize("module", sorted(MODULES))
def test_nothing_imports_upwards(module: str) -> None:
    own = height_of(module)
    assert own is not None, f"docs/design.md has no floor for {module}"
    for other in imported(module, types=True):
        height = height_of(other)
        assert height is not None, f"docs/design.md has no floor for {other}"
        same_room = module.partition(".")[0] == other.partition(".")[0]
        assert height < own or (same_room and height == own), f"{module} imports {other}, which is not below it"


def test_the_design_names_nothing_that_is_not_there() -> None:
    rooms = {module.partition(".")[0] for module in MODULES}
    assert {name for name in HEIGHTS if name not in MODULES and name not in rooms} == set()


@pytest.mark.parametrize("name", [name for name in ptq4cuda.__all__ if name not in ("ops", "__version__")])
def test_what_the_package_offers_hides_no_module(name: str) -> None:
    assert callable(getattr(ptq4cuda, name))
    assert importlib.util.find_spec(f"ptq4cuda.{name}") is None


@pytest.mark.parametrize("path", sorted(path.relative_to(ROOT).as_posix() for path in ROOT.glob("tests/**/*.py")))
def test_files_of_tests_say_what_they_specify(path: str) -> None:
    header = ast.get_docstring(ast.parse((ROOT / path).read_text("utf-8"))) or ""
    assert re.match(r"\S.{20,}[.:]$", header.partition("\n")[0]), "a sentence that ends on the first line"


def test_folders_of_tests_mirror_the_package() -> None:
    folders = {path.name for path in (ROOT / "tests").iterdir() if any(path.glob("test_*.py"))}
    rooms = {path.name for path in PACKAGE.iterdir() if (path / "__init__.py").exists()}
    assert folders - rooms == {"pipeline", "cuda_on_cpu"}  # pipeline.py, and csrc/cuda
    assert rooms <= folders


@pytest.mark.parametrize("page", ["CONTRIBUTING.md", "docs/design.md"])
def test_what_developers_are_sent_to_is_there(page: str) -> None:
    paths = set(re.findall(r"`([\w.]*/[\w./]*)(?: \[\w+\])?`", (ROOT / page).read_text("utf-8")))
    named = {path for path in paths if "NAME" not in path}
    assert len(named) > 10
    folders = [ROOT / folder for folder in ("", "ptq4cuda", "csrc")]
    assert not {path for path in named if not any((folder / path).exists() for folder in folders)}
