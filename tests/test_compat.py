"""What the package needs of torch that is private or ageing is named in compat.py alone.

The code of the package is read, not run: no other module imports what is private to torch or ages, reads such an
attribute, names one in a string, or overrides a private method of torch that compat.py does not list.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import fx, nn

import ptq4cuda
from ptq4cuda import compat

PACKAGE = Path(ptq4cuda.__file__).parent
AGEING = (
    *("torch.jit", "torch.nn.utils.weight_norm", "torch.nn.utils.spectral_norm", "torch.nn.utils.prune"),
    *("torch.fx.experimental", "torch.utils.weak"),
)


def _private_names() -> frozenset[str]:
    """Return the private names of the objects of torch that the package handles."""
    conv = nn.Conv2d(1, 1, 1, padding=1, padding_mode="reflect")
    holders = [
        *(
            conv,
            torch.compile(conv),
            nn.BatchNorm2d(1),
            nn.Parameter(torch.zeros(1)),
            torch.zeros(1).untyped_storage(),
        ),
        *(fx.Tracer(), fx.Graph(), fx.GraphModule(nn.Module(), fx.Graph()), fx.Interpreter, fx.Node, fx.Proxy),
        *(torch.library.Library, torch.Generator, torch.overrides.TorchFunctionMode),
    ]
    names = {name for holder in holders for name in (*dir(holder), *getattr(holder, "__dict__", {}))}
    return frozenset(name for name in names if name.startswith("_") and not name.startswith("__") and name != "_")


def _is_private(path: str) -> bool:
    first, *rest = path.split(".")
    if not all(part.isidentifier() for part in rest):  # an expression, which holds calls
        return False
    ages = any(f"{path}.".startswith(f"{module}.") for module in AGEING)
    private = any(part.startswith("_") and not part.startswith("__") for part in rest)
    return first in ("torch", "nn", "F", "fx") and (ages or private)


def _uses(tree: ast.AST, private: frozenset[str], inside: str = "") -> Iterator[tuple[int, str]]:
    """Yield the lines that use what is private to torch or ages, and what they use."""
    for node in ast.iter_child_nodes(tree):
        line = getattr(node, "lineno", 0)
        if isinstance(node, ast.Import):
            yield from ((line, name.name) for name in node.names if _is_private(name.name))
        elif isinstance(node, ast.ImportFrom) and node.module:
            paths = [f"{node.module}.{name.name}" for name in node.names]
            yield from ((line, path) for path in paths if _is_private(path))
        elif isinstance(node, ast.Attribute):
            # A method that is overridden calls the one that it overrides.
            if (node.attr in private and node.attr != inside) or _is_private(ast.unparse(node)):
                yield line, node.attr
        elif isinstance(node, ast.Constant) and node.value in private:
            yield line, repr(node.value)
        elif isinstance(node, ast.ClassDef):
            methods = [item for item in node.body if isinstance(item, ast.FunctionDef) and item.name in private]
            yield from ((m.lineno, m.name) for m in methods if m.name not in compat.OVERRIDDEN)
        yield from _uses(node, private, node.name if isinstance(node, ast.FunctionDef) else inside)


@pytest.fixture(scope="module")
def private() -> frozenset[str]:
    return _private_names()


def test_nothing_else_names_what_is_private_to_torch(private: frozenset[str]) -> None:
    found = [
        f"{path.relative_to(PACKAGE)}:{line} {name}"
        for path in sorted(PACKAGE.rglob("*.py"))
        if path != PACKAGE / "compat.py"
        for line, name in _uses(ast.parse(path.read_text(encoding="utf-8")), private)
    ]
    assert not found, found


@pytest.mark.parametrize(
    ("code", "used"),
    [
        ("import torch._dynamo", "torch._dynamo"),
        ("from torch.utils._pytree import tree_map", "torch.utils._pytree.tree_map"),
        ("from torch.nn.utils.weight_norm import WeightNorm", "torch.nn.utils.weight_norm.WeightNorm"),
        ("isinstance(m, torch.jit.ScriptModule)", "ScriptModule"),
        ("torch._C._get_privateuse1_backend_name()", "_C"),
        ("x._version", "_version"),
        ("def f(m): m._buffers", "_buffers"),
        ("getattr(m, '_forward_hooks')", "'_forward_hooks'"),
        ("getattr(m, '_orig_mod')", "'_orig_mod'"),
        ("class A(nn.Module):\n def _call_impl(self): ...", "_call_impl"),
        ("nn.modules.batchnorm._BatchNorm", "_BatchNorm"),
    ],
)
def test_a_use_is_seen(code: str, used: str, private: frozenset[str]) -> None:
    assert used in [name for _, name in _uses(ast.parse(code), private)]


@pytest.mark.parametrize(
    "code",
    [
        "import ptq4cuda._native",
        "self._names[0]",
        "from torch.fx.node import map_arg",
        "class A(nn.Module):\n def _apply(self, fn): return super()._apply(fn)",
    ],
)
def test_what_is_public_or_the_packages_own_is_no_use(code: str, private: frozenset[str]) -> None:
    assert not list(_uses(ast.parse(code), private))


def test_compat_names_nothing_that_nobody_needs() -> None:
    texts = [path.read_text(encoding="utf-8") for path in PACKAGE.rglob("*.py") if path != PACKAGE / "compat.py"]
    tree = ast.parse((PACKAGE / "compat.py").read_text(encoding="utf-8"))
    functions = {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}
    names = functions | {*compat.__all__} | {name for name in vars(compat) if name.isupper()}
    own = ast.unparse(tree)
    unused = {name for name in names if not any(name in text for text in texts) and own.count(name) < 2}
    assert unused == {"OVERRIDDEN"}  # which this file reads


def test_hooks_of_modules_are_all_known() -> None:
    attributes = {name for name in vars(nn.Module()) if "hook" in name and "state_dict" not in name}
    assert attributes == {*compat.HOOKS}


@pytest.mark.skipif(not compat.multiplies_bytes(), reason="this CPU or torch does not multiply bytes exactly")
@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (1, 3), (3, 1), (5, 5)])
@pytest.mark.parametrize("inner", [1, 2, 49, 200])
def test_products_of_bytes_are_exact(rows: int, inner: int, columns: int) -> None:
    for seed in range(3):  # what memory holds by chance differs
        torch.manual_seed(seed)
        a, b = (torch.randint(-128, 128, (inner, n), dtype=torch.int8) for n in (rows, columns))
        assert torch.equal(compat.byte_products(a.mT, b).long(), a.mT.long() @ b.long())
