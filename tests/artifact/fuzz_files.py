"""A coverage-guided fuzzer of load(): whatever a file holds, a network comes out or one sentence that names the file.

Arguments are those of libFuzzer: -runs=1000000, -max_total_time=600, a folder that keeps what was found. It needs the
extra `fuzz`; `tools/dev fuzz files` runs it.
"""

from __future__ import annotations

import os
import random
import sys
import tempfile
from collections import Counter
from pathlib import Path

import atheris

with atheris.instrument_imports(include=["ptq4cuda.artifact", "ptq4cuda.config", "ptq4cuda.nn", "ptq4cuda.ops"]):
    import ptq4cuda

import torch

from artifact import test_damaged_files as damage
from artifact.test_file import FILES, Old
from ptq4cuda.errors import first_line

SOURCES = {path.name: path.read_bytes() for path in sorted(FILES.glob("*.ptq4"))}
EXPECTED: dict[bytes, torch.Tensor] = {}
ENDS: Counter[str] = Counter()
MUTATIONS = [*damage.MUTATIONS.values(), *3 * [*damage.FORGERIES.values()]]


def mutate(data: bytes, limit: int, seed: int) -> bytes:
    """Change a file as libFuzzer would, or by what is known of its form."""
    rng = random.Random(seed)
    if rng.random() < 0.3:
        return bytes(atheris.Mutate(data, limit))
    try:
        return rng.choice(MUTATIONS)(data, rng)[:limit]
    except Exception:  # what was changed before has no such form any more
        return rng.choice(MUTATIONS)(rng.choice([*SOURCES.values()]), rng)[:limit]


def try_file(path: Path, data: bytes) -> None:
    """Load a file, and execute the network that comes out."""
    path.write_bytes(data)
    try:
        network = ptq4cuda.load(path, Old())
        ptq4cuda.report(network)
        with torch.no_grad():
            found = network(damage.IMAGES)
    except ValueError as error:
        assert path.name in str(error) or "cannot be executed" in str(error), error
        assert "\n" not in str(error), error
        ENDS[first_line(error).partition("ptq4")[2][:24]] += 1
        return
    ENDS["loads"] += 1
    if data in EXPECTED:
        assert torch.equal(found, EXPECTED[data])


def main() -> None:
    folder = Path(tempfile.mkdtemp(dir="/dev/shm" if os.path.isdir("/dev/shm") else None))
    corpus = folder / "corpus"
    corpus.mkdir()
    for name, content in SOURCES.items():
        (corpus / name).write_bytes(content)
        EXPECTED[content] = ptq4cuda.load(FILES / name, Old())(damage.IMAGES)
    path = folder / "fuzzed.ptq4"
    arguments = [sys.argv[0], "-max_len=65536", "-timeout=20", "-rss_limit_mb=3000", *sys.argv[1:], str(corpus)]
    atheris.Setup(arguments, lambda data: try_file(path, data), custom_mutator=mutate)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
