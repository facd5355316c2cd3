"""Thousands of ways to damage a file: load() refuses it in one sentence, or gives the same network."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

import ptq4cuda
from artifact.test_file import FILES, Old
from ptq4cuda.artifact.file import _checksum

IMAGES = (torch.arange(2 * 3 * 8 * 8) % 17 - 8).view(2, 3, 8, 8) / 8
ODD: list[Any] = [
    None,
    True,
    -1,
    0,
    9,
    1 << 40,
    1 << 64,
    0.5,
    float("nan"),
    "",
    "x",
    [],
    [[]],
    {},
    {"a": 1},
    "Linear",
]
KEY = "ptq4cuda"


def split(content: bytes) -> tuple[dict[str, Any], bytes]:
    """The header of a safetensors file and what follows it."""
    size = int.from_bytes(content[:8], "little")
    return json.loads(content[8 : 8 + size]), content[8 + size :]


def join(header: dict[str, Any], data: bytes) -> bytes:
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


# --- bytes


def truncated(content: bytes, rng: random.Random) -> bytes:
    return content[: rng.randrange(len(content))]


def flipped(content: bytes, rng: random.Random) -> bytes:
    changed = bytearray(content)
    for _ in range(rng.choice((1, 1, 2, 8))):
        changed[rng.randrange(len(changed))] ^= 1 << rng.randrange(8)
    return bytes(changed)


def overwritten(content: bytes, rng: random.Random) -> bytes:
    at, count = rng.randrange(len(content)), rng.choice((1, 4, 64, 1000))
    put = rng.choice((rng.randbytes(count), bytes(count), b"\xff" * count, b"[" * count, b""))
    return content[:at] + put + content[at + rng.choice((0, count)) :]


def size_of_the_header(content: bytes, rng: random.Random) -> bytes:
    size = rng.choice((0, 1, 2, 1 << 20, 1 << 27, 1 << 40, (1 << 64) - 1, rng.randrange(len(content))))
    return size.to_bytes(8, "little") + content[8:]


# --- the header of safetensors


def tensors_entry(content: bytes, rng: random.Random) -> bytes:
    header, data = split(content)
    name = rng.choice([name for name in header if name != "__metadata__"])
    entry = header[name]
    what = rng.randrange(6)
    if what == 0:
        entry["dtype"] = rng.choice(("F16", "F32", "F64", "I8", "U8", "I64", "BOOL", "F8_E4M3", "C64", "F4", "x", 3))
    elif what == 1:
        entry["shape"] = rng.choice(
            ([], [0], [1], entry["shape"][::-1], [*entry["shape"], 1], [1 << 62, 1 << 62], "x")
        )
    elif what == 2:
        entry["data_offsets"] = [rng.choice((0, 1, len(data), 1 << 62)) for _ in range(2)]
    elif what == 3:
        header[rng.choice((f"{name}x", "fc.bias", "__metadata__"))] = header.pop(name)
    elif what == 4:
        other = rng.choice([other for other in header if other != "__metadata__"])
        header[name], header[other] = header[other], header[name]
    else:
        del header[name]
    return join(header, data)


# --- the header of ptq4cuda, as it is or with a checksum that fits


def places(value: Any) -> list[tuple[Any, Any]]:
    """Every place in nested lists and dicts: the container, and the key or index in it."""
    if not isinstance(value, (dict, list)):
        return []
    keys = list(value) if isinstance(value, dict) else range(len(value))
    return [place for key in keys for place in [(value, key), *places(value[key])]]


def edit(fields: dict[str, Any], rng: random.Random) -> None:
    container, key = rng.choice(places(fields))
    what = rng.randrange(4)
    if what == 0:
        del container[key]
    elif what == 1 and isinstance(container, dict):
        container[f"{key}x"] = container.pop(key)
    elif what == 2 and isinstance(container[key], (int, float)):
        container[key] = type(container[key])(container[key] + rng.choice((-1, 1, 7)))
    else:
        container[key] = rng.choice(ODD)


def edited(content: bytes, rng: random.Random, forged: bool = False) -> bytes:
    header, data = split(content)
    fields = json.loads(header["__metadata__"][KEY])
    edit(fields, rng)
    if forged and isinstance(fields.get("format"), int) and fields["format"] >= 3:
        fields.pop("sha256", None)
        fields["sha256"] = _checksum(fields, safetensors.torch.load(content))
    header["__metadata__"][KEY] = json.dumps(fields)
    return join(header, data)


Mutation = Callable[[bytes, random.Random], bytes]
MUTATIONS: dict[str, Mutation] = {
    "truncated": truncated,
    "flipped": flipped,
    "overwritten": overwritten,
    "size of the header": size_of_the_header,
    "tensors": tensors_entry,
    "edited": edited,
}
# Nobody can tell these from files that save() wrote, as long as they make sense.
FORGERIES: dict[str, Mutation] = {"forged": partial(edited, forged=True)}


def outcome(path: Path, expected: torch.Tensor, forged: bool) -> str:
    """Load a file: how it was refused, or "loads" where that is right."""
    try:
        network = ptq4cuda.load(path, Old())
        report = ptq4cuda.report(network)
        assert str(report) and report.to_json() and report._repr_html_()
    except ValueError as error:
        assert path.name in str(error) or (forged and "cannot be executed" in str(error)), error
        assert "\n" not in str(error)
        return "refused"
    assert forged or torch.equal(network(IMAGES), expected)
    return "loads"


def try_mutants(source: Path, name: str, count: int, folder: Path, seed: int = 0) -> dict[str, int]:
    """Damage a file in many ways of one kind, and count how they end."""
    content, expected = source.read_bytes(), ptq4cuda.load(source, Old())(IMAGES)
    before_the_header = source.stem in ("format1", "format2") and name == "edited"  # their checksums cover no header
    mutate = {**MUTATIONS, **FORGERIES}[name]
    path, counts = folder / "mutant.ptq4", dict.fromkeys(("refused", "loads"), 0)
    for i in range(count):
        path.write_bytes(mutate(content, random.Random(f"{name} {seed} {i}")))
        try:
            counts[outcome(path, expected, forged=name in FORGERIES or before_the_header)] += 1
        except BaseException as error:
            raise AssertionError(f"mutant {i} of {source.name} {name}, seed {seed}") from error
    return counts


@pytest.fixture(scope="module")
def newest(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("files") / "format3.ptq4"
    ptq4cuda.save(ptq4cuda.load(FILES / "format2.ptq4", Old()), path)
    return path


@pytest.mark.parametrize("name", [*MUTATIONS, *FORGERIES])
def test_damaged_files_are_refused(newest: Path, tmp_path: Path, name: str) -> None:
    counts = try_mutants(newest, name, 1000, tmp_path)
    assert counts["refused"] > 300
    if name in ("truncated", "size of the header", "tensors"):
        assert counts["loads"] <= 100  # the same in effect, as a swap of a tensor with itself


@pytest.mark.parametrize("name", [*MUTATIONS])
def test_damaged_files_of_format_2_are_refused(tmp_path: Path, name: str) -> None:
    assert try_mutants(FILES / "format2.ptq4", name, 500, tmp_path)["refused"] > 150
