"""Images in folders: what a network is given, and which labels a folder tells."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from ptq4cuda.cli.images import Folder, Preprocessing


def write(path: Path, pixels: np.ndarray) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)
    return path


def read(how: Preprocessing, path: Path) -> Tensor:
    return how.normalized(how.pixels(path))


def test_the_centre_is_normalized(tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (8, 12, 3), dtype=np.uint8)
    path = write(tmp_path / "a.png", pixels)
    found = read(Preprocessing((6, 6), resize=8, mean=(0.5, 0.25, 0.0), std=(0.5, 1.0, 2.0)), path)
    centre = torch.tensor(pixels[1:7, 3:9].astype(np.float32) / 255).permute(2, 0, 1)
    expected = (centre - torch.tensor([0.5, 0.25, 0.0]).view(3, 1, 1)) / torch.tensor([0.5, 1.0, 2.0]).view(3, 1, 1)
    torch.testing.assert_close(found, expected)
    assert found.is_contiguous()


def test_the_shorter_side_is_resized(tmp_path: Path) -> None:
    path = write(tmp_path / "a.png", np.full((40, 20, 3), 51, dtype=np.uint8))
    found = read(Preprocessing((8, 8), resize=10, mean=(0.0,), std=(1.0,), interpolation="bicubic"), path)
    torch.testing.assert_close(found, torch.full((1, 8, 8), 0.2))
    ramp = np.repeat(np.arange(40, dtype=np.uint8)[:, None], 20, 1)
    path = write(tmp_path / "ramp.png", ramp)
    found = Preprocessing((10, 10), resize=10, mean=(0.0,), std=(1.0,)).pixels(path)
    assert found[0, :, 5].tolist() == pytest.approx([10.5 + 2 * i for i in range(10)], abs=0.6)  # the middle half


def test_an_image_covers_what_is_not_square(tmp_path: Path) -> None:
    ramp = np.repeat(np.arange(40, dtype=np.uint8)[:, None], 40, 1)
    how = Preprocessing((20, 10), resize=10, mean=(0.0,), std=(1.0,))
    found = how.pixels(write(tmp_path / "ramp.png", ramp))
    assert found.shape == (1, 20, 10)
    assert found[0, :, 5].tolist() == pytest.approx([0.5 + 2 * i for i in range(20)], abs=0.6)  # all of its height


def test_scaled_without_regard_to_the_shape(tmp_path: Path) -> None:
    path = write(tmp_path / "a.png", np.zeros((30, 10, 3), dtype=np.uint8))
    assert Preprocessing((6, 7), resize=0).pixels(path).shape == (3, 6, 7)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"size": (64, 48), "resize": 32}, "whose shorter side has 32 pixels do not cover 64 x 48"),
        ({"size": (0, 8)}, "an image has a pixel at least, got a size of 0 x 8"),
        ({"mean": (0.5, 0.5), "std": (0.5, 0.5)}, "one number each for grey images or three for RGB"),
        ({"std": (1.0, 0.0, 1.0)}, "std must be positive"),
        ({"interpolation": "cubic"}, "must be one of nearest, bilinear"),
    ],
)
def test_preprocessing_that_cannot_be(fields: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Preprocessing(**fields)  # type: ignore[arg-type]


def test_changed() -> None:
    plain = Preprocessing(source="of timm")
    assert plain.changed(size=None, resize=None) is plain
    smaller = plain.changed(size=(112, 112))
    assert (smaller.size, smaller.resize, smaller.source) == ((112, 112), 128, "as given")
    assert plain.changed(size=(112, 112), resize=120).resize == 120


def test_no_image(tmp_path: Path) -> None:
    (tmp_path / "broken.png").write_bytes(b"nothing")
    with pytest.raises(ValueError, match=r"broken\.png' cannot be read as an image"):
        Preprocessing().pixels(tmp_path / "broken.png")
    for kind in (np.uint16, np.float32):
        Image.fromarray(np.zeros((4, 4), dtype=kind)).save(tmp_path / "deep.tif")
        with pytest.raises(
            ValueError, match=r"deep\.tif' cannot be read as an image \(its pixels have more than 8 bits"
        ):
            Preprocessing().pixels(tmp_path / "deep.tif")


@pytest.mark.parametrize(("names", "labels"), [(("cat", "dog", "eel"), [0, 1, 2]), (("10", "2", "7"), [10, 2, 7])])
def test_labels_are_folders(tmp_path: Path, names: tuple[str, ...], labels: list[int]) -> None:
    pixel = np.zeros((1, 1, 3), dtype=np.uint8)
    for name in names:
        write(tmp_path / name / "deep" / "a.png", pixel)
    (tmp_path / names[0] / "notes.txt").touch()
    folder = Folder.read(tmp_path)
    assert [f.parts[-3] for f in folder.files] == list(names)
    assert folder.labels == labels


def test_images_in_the_folder_itself_have_no_labels(tmp_path: Path) -> None:
    pixel = np.zeros((2, 2, 3), dtype=np.uint8)
    write(tmp_path / "a.png", pixel)
    write(tmp_path / "cat" / "b.png", pixel)
    folder = Folder.read(tmp_path)
    assert folder.labels is None
    batches = list(folder.batches(Preprocessing((2, 2), 2), 8, torch.device("cpu"), "read"))
    assert [(x.shape, y.tolist()) for x, y in batches] == [((2, 3, 2, 2), [-1, -1])]


def test_some_images_are_spread_over_all(tmp_path: Path) -> None:
    pixel = np.zeros((1, 1, 3), dtype=np.uint8)
    for i in range(10):
        write(tmp_path / str(i // 5) / f"{i}.png", pixel)
    folder = Folder.read(tmp_path, 4)
    assert [f.stem for f in folder.files] == ["0", "2", "5", "7"]
    assert folder.labels == [0, 0, 1, 1]


def test_no_folder(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="there is no folder"):
        Folder.read(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="there are no images in"):
        Folder.read(tmp_path)
