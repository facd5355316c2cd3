"""The pages of docs/: their Python is run as it is written, their links lead somewhere."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

DOCS = Path(__file__).parents[1] / "docs"
PAGES = sorted(page.name for page in DOCS.glob("*.md"))


def code_of(page: str) -> str:
    return "\n".join(re.findall(r"^```python\n(.*?)^```", (DOCS / page).read_text(), re.MULTILINE | re.DOTALL))


# Runs the code of each page in a process and a folder of its own, all forked by one that has imported the package.
RUN_PAGES = """
import json, os, sys
import ptq4cuda
for page, code in json.load(sys.stdin).items():
    if not (child := os.fork()):
        os.mkdir(page)
        os.chdir(page)
        os.dup2(os.open("stderr", os.O_CREAT | os.O_WRONLY), 2)
        exec(code, vars(sys.modules["__main__"]))
        sys.exit()
    open(f"{page}.status", "w").write(str(os.waitpid(child, 0)[1]))
"""


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder in which the pages' code ran."""
    folder = tmp_path_factory.mktemp("pages")
    subprocess.run(
        [sys.executable, "-W", "error::DeprecationWarning:ptq4cuda", "-c", RUN_PAGES],
        input=json.dumps({page: code_of(page) for page in PAGES}),
        cwd=folder,
        stdout=subprocess.DEVNULL,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        check=True,
    )
    return folder


@pytest.mark.parametrize("page", [page for page in PAGES if code_of(page)])
def test_what_a_page_shows_runs(ran: Path, page: str) -> None:
    assert (ran / f"{page}.status").read_text() == "0", (ran / page / "stderr").read_text()[-2000:]


def test_what_the_readme_shows_runs(tmp_path: Path) -> None:
    """For a network, batches and a measure of the reader's own."""
    own = """
        import torch
        torch.manual_seed(0)
        net = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.ReLU(), torch.nn.Conv2d(4, 4, 3)).eval()
        batches = [torch.randn(16, 3, 8, 8)]
        top1 = lambda network: 90.0
    """
    code = "\n".join(re.findall(r"^```python\n(.*?)^```", (DOCS.parent / "README.md").read_text(), re.M | re.S))
    command = [sys.executable, "-c", f"{textwrap.dedent(own)}\n{code}"]
    run = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-2000:]


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page: str) -> None:
    for target in re.findall(r"\]\(([^)#]+)[^)]*\)", (DOCS / page).read_text()):
        assert target.startswith("https://") or (DOCS / target).exists(), target


def test_every_page_is_in_the_navigation() -> None:
    listed = re.findall(r"[\w-]+\.md", (DOCS.parent / "mkdocs.yml").read_text())
    assert sorted(listed) == PAGES


def test_the_site_builds_without_a_warning(tmp_path: Path) -> None:
    command = [
        sys.executable,
        "-m",
        "mkdocs",
        "build",
        "--strict",
        "-q",
        "-f",
        DOCS.parent / "mkdocs.yml",
        "-d",
        tmp_path,
    ]
    run = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "NO_MKDOCS_2_WARNING": "1"})
    assert run.returncode == 0, run.stderr
    api = (tmp_path / "api" / "index.html").read_text()
    for name in ("ptq4cuda.quantize", "ptq4cuda.QuantConfig", "ptq4cuda.ops.conv2d_integer"):
        assert f'id="{name}"' in api, name
