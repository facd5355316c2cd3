"""Layers that were solved, kept in files of a folder, so that work that was cut short goes on from them."""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import asdict
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from ptq4cuda.artifact.writing import write_whole
from ptq4cuda.calibrate.signals import LayerCall, Solution
from ptq4cuda.solve.budget import Shares
from ptq4cuda.solve.raising import Part


class Checkpoint:
    """A folder of layers. Those that other models, data or configurations led to are there beside them."""

    def __init__(self, folder: str | os.PathLike[str], *led_here: Any) -> None:
        """Make the folder, where it is not there.

        Args:
            folder: for the files.
            led_here: all that layers depend on, as text.

        Raises:
            OSError: it cannot be made.
        """
        self.folder, self._led_here = Path(folder), led_here
        try:
            self.folder.mkdir(exist_ok=True)
        except OSError as error:
            raise OSError(
                error.errno, f"checkpoint: {os.fspath(folder)!r} cannot be made: {error.strerror}"
            ) from error

    def load(self, key: Any, call: LayerCall, folded: bool) -> Solution | None:
        """Return a layer that was solved; None where it was not, or its file is damaged.

        Args:
            key: the layer and those before it, with their bits.
            call: the layer.
            folded: whether the scale of its input is folded into its weights.
        """
        assert call.spec.quantized is not None
        module = call.spec.quantized.like(call.layer, folded=folded)
        try:
            with safe_open(self._file(key), "pt") as file:
                module.load_state_dict({name: file.get_tensor(name) for name in file.keys()})  # noqa: SIM118
                return Solution(module, file.metadata()["clip"])
        except (OSError, SafetensorError, RuntimeError, KeyError):
            return None

    def save(self, key: Any, solution: Solution) -> None:
        """Keep a layer, whole or not at all.

        Raises:
            OSError: there is no room, or no permission.
        """
        tensors = {name: tensor.cpu().contiguous() for name, tensor in solution.module.state_dict().items()}
        write_whole(self._file(key), save(tensors, {"clip": solution.clip}))

    def load_shares(self) -> Shares | None:
        """Return how layers share out bits; None where it was not measured, or its file is damaged."""
        try:
            content = json.loads(self._file("shares", "json").read_bytes())
            bits = {name: {kind: int(n) for kind, n in own.items()} for name, own in content["bits"].items()}
            parts = [Part(**{**part, "layers": tuple(part["layers"])}) for part in content["parts"]]
            return Shares(bits, parts, {str(field): str(way) for field, way in content["left_out"].items()})
        except (OSError, ValueError, TypeError, KeyError, AttributeError):
            return None

    def save_shares(self, shares: Shares) -> None:
        """Keep how layers share out bits.

        Raises:
            OSError: there is no room, or no permission.
        """
        write_whole(self._file("shares", "json"), json.dumps(asdict(shares)).encode())

    def _file(self, key: Any, suffix: str = "safetensors") -> Path:
        name = hashlib.sha256(repr((self._led_here, key)).encode()).hexdigest()[:40]
        return self.folder / f"{name}.{suffix}"
