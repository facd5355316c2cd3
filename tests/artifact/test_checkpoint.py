"""Work that was cut short goes on from the layers that were done, and makes the same network."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import ptq4cuda.pipeline as pipeline
from ptq4cuda import QuantConfig, quantize
from ptq4cuda.artifact.record import record_of
from ptq4cuda.calibrate.signals import LayerCall, Solution
from small_networks import Writes


class Cut(BaseException):
    pass


@pytest.fixture
def solved(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The layers that are solved; the third one cuts the work short."""
    names: list[str] = []
    solve = pipeline.solve_layer

    def counted(call: LayerCall, config: QuantConfig) -> Solution:
        if config.rounding == "descent":  # not that of a quick trial, from few samples
            names.append(call.name)
            if len(names) == 3:
                raise Cut
        return solve(call, config)

    monkeypatch.setattr(pipeline, "solve_layer", counted)
    return names


@pytest.mark.parametrize("by_modules", [False, True])
def test_it_goes_on(
    model: nn.Module,
    images: Tensor,
    tmp_path: Path,
    by_modules: bool,
    solved: list[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    shares_of = pipeline.shares_of
    model, folder = Writes().eval() if by_modules else model, tmp_path / "layers"
    batches = list(images[:8].split(4))
    with pytest.raises(Cut):
        quantize(model, batches, progress=False, checkpoint=folder)
    assert len(list(folder.glob("*.safetensors"))) == 2
    monkeypatch.setattr(pipeline, "shares_of", lambda *_: pytest.fail("the trial is measured again"))
    found = quantize(model, batches, progress=False, checkpoint=folder)
    assert len(set(solved)) == len(solved) - 1  # the one that was cut short, twice
    count = len(solved)
    monkeypatch.setattr(pipeline, "shares_of", shares_of)
    expected = quantize(model, batches, progress=False)
    assert pipeline.fingerprint(found) == pipeline.fingerprint(expected)
    records = [{**record_of(net).to_dict(), "seconds": 0.0, "frontier_bytes": 0} for net in (found, expected)]
    assert records[0] == records[1]
    del solved[count:]
    quantize(model, batches, progress=False, checkpoint=folder)
    assert len(solved) == count  # all are there
    quantize(model, [batch * 2 for batch in batches], progress=False, checkpoint=folder)
    assert len(solved) == 2 * count - 1  # other data led to none of them


def test_a_damaged_layer_is_solved_again(model: nn.Module, images: Tensor, tmp_path: Path) -> None:
    config = QuantConfig.fast()
    expected = quantize(model, [images], config, progress=False, checkpoint=tmp_path)
    for number, file in enumerate(sorted(tmp_path.iterdir())):
        content = file.read_bytes()
        file.write_bytes((content[:100], b"", content[:-1])[number % 3])
    found = quantize(model, [images], config, progress=False, checkpoint=tmp_path)
    assert torch.equal(found(images), expected(images))


def test_a_folder_that_cannot_be_made_is_a_sentence(model: nn.Module, images: Tensor, tmp_path: Path) -> None:
    with pytest.raises(OSError, match=r"checkpoint: '.*' cannot be made: No such file or directory"):
        quantize(model, [images], progress=False, checkpoint=tmp_path / "missing" / "layers")
