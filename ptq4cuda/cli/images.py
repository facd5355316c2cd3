"""Images in folders, as a network takes them."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from ptq4cuda.processes import Processes

_SUFFIXES = (".bmp", ".gif", ".jpeg", ".jpg", ".png", ".ppm", ".tif", ".tiff", ".webp")
INTERPOLATIONS = ("nearest", "bilinear", "bicubic", "lanczos")


@dataclass(frozen=True)
class Preprocessing:
    """From an image to a network's input.

    Attributes:
        size: pixels of the input, height and width: the centre of the resized image.
        resize: the image is first made as small as still covers a `size` whose shorter side has that many pixels; 0
            scales to `size` without regard to the image's shape.
        mean, std: of values in 0 to 1, per channel: one for grey images, three for RGB.
        interpolation: of INTERPOLATIONS.
        source: who says so.
    """

    size: tuple[int, int] = (224, 224)
    resize: int = 256
    mean: tuple[float, ...] = (0.485, 0.456, 0.406)
    std: tuple[float, ...] = (0.229, 0.224, 0.225)
    interpolation: str = "bilinear"
    source: str = "taken for granted; --size, --resize, --mean, --std and --interpolation change it"

    def __post_init__(self) -> None:
        if len(self.mean) != len(self.std) or len(self.mean) not in (1, 3):
            raise ValueError(
                f"mean and std must be one number each for grey images or three for RGB, got {list(self.mean)} and "
                f"{list(self.std)}"
            )
        if min(self.size) < 1:
            raise ValueError(f"an image has a pixel at least, got a size of {self.size[0]} x {self.size[1]}")
        if self.resize < 0 or 0 < self.resize < min(self.size):
            raise ValueError(
                f"images whose shorter side has {self.resize} pixels do not cover {self.size[0]} x {self.size[1]}"
            )
        if not all(s > 0 for s in self.std):
            raise ValueError(f"std must be positive, got {list(self.std)}")
        if self.interpolation not in INTERPOLATIONS:
            raise ValueError(f"interpolation must be one of {', '.join(INTERPOLATIONS)}, got {self.interpolation!r}")

    def __str__(self) -> str:
        numbers = (", ".join(f"{v:g}" for v in values) for values in (self.mean, self.std))
        mean, std = numbers
        height, width = self.size
        way = (
            f"shorter side {self.resize}, centre {height} x {width}"
            if self.resize
            else f"scaled to {height} x {width}"
        )
        colours = "grey" if len(self.mean) == 1 else "RGB"
        return f"{colours}, {way}, {self.interpolation}, mean [{mean}], std [{std}] ({self.source})"

    def changed(self, **fields: Any) -> Preprocessing:
        """Return it with other fields, those that are not None."""
        given = {name: value for name, value in fields.items() if value is not None}
        size = given.get("size")
        if size is not None and "resize" not in given and self.resize:  # the same share of the image is seen
            given["resize"] = round(self.resize * min(size) / min(self.size))
        return replace(self, **given, source="as given") if given else self

    def pixels(self, path: Path) -> Tensor:
        """Read an image as uint8 [C, H, W], of the input's size.

        Raises:
            ValueError: the file is no image that can be read.
        """
        from PIL import Image, UnidentifiedImageError

        how = Image.Resampling[self.interpolation.upper()]
        try:
            with Image.open(path) as file:
                if file.mode[0] in "IF":  # pillow would cut them off at 255
                    raise ValueError(f"its pixels have more than 8 bits, mode {file.mode}: convert it")
                image = file.convert("L" if len(self.mean) == 1 else "RGB")
        except (OSError, UnidentifiedImageError, SyntaxError, ValueError) as error:
            raise ValueError(f"{str(path)!r} cannot be read as an image ({error})") from error
        height, width = self.size
        if self.resize:
            zoom = self.resize / min(self.size)  # of what the image has to cover
            scale = max(zoom * width / image.width, zoom * height / image.height)
            image = image.resize((round(image.width * scale), round(image.height * scale)), how)
            left, top = round((image.width - width) / 2), round((image.height - height) / 2)
            image = image.crop((left, top, left + width, top + height))
        else:
            image = image.resize((width, height), how)
        return torch.from_numpy(np.array(image)).view(height, width, -1).permute(2, 0, 1).contiguous()

    def normalized(self, pixels: Tensor) -> Tensor:
        """Return the input, float32 [..., C, H, W], that pixels, uint8 of the same shape, are."""
        mean, std = (torch.tensor(v, device=pixels.device).view(-1, 1, 1) for v in (self.mean, self.std))
        return (pixels / 255.0 - mean) / std


@dataclass(frozen=True)
class Folder:
    """The images of a folder.

    Attributes:
        path: of the folder.
        files: its images, and those of all folders in it, sorted.
        labels: the class of each, where the images are in folders of classes: the number that the folder's name is,
            else its place among the sorted names; None where images lie in the folder itself.
    """

    path: Path
    files: Sequence[Path]
    labels: Sequence[int] | None

    @classmethod
    def read(cls, path: Path, most: int | None = None) -> Folder:
        """List the images of a folder, or as many as are asked for, evenly spread over the sorted names.

        Raises:
            ValueError: there is no such folder, or no image in it.
        """
        if not path.is_dir():
            raise ValueError(f"there is no folder {str(path)!r}")
        files = sorted(f for f in path.rglob("*") if f.suffix.lower() in _SUFFIXES and f.is_file())
        if not files:
            raise ValueError(f"there are no images in {str(path)!r} (files that end in {', '.join(_SUFFIXES)})")
        folders = [f.relative_to(path).parts[0] if f.parent != path else None for f in files]
        labels: list[int] | None = None
        if None not in folders:
            names = sorted(set(folders), key=str)
            numbers = {
                name: int(str(name)) if all(str(n).isdecimal() for n in names) else i for i, name in enumerate(names)
            }
            labels = [numbers[folder] for folder in folders]
        if most is not None and most < len(files):
            picked = [i * len(files) // most for i in range(most)]
            files = [files[i] for i in picked]
            labels = None if labels is None else [labels[i] for i in picked]
        return cls(path, files, labels)

    def share(self, batch: int, processes: Processes) -> Folder:
        """Return the part of one process: batches of this size that follow each other.

        Raises:
            ValueError: there are fewer batches than processes.
        """
        batches = -(-len(self.files) // batch)
        if batches < processes.count:
            raise ValueError(
                f"{len(self.files)} images in batches of {batch} are {batches} batches, too few for "
                f"{processes.count} processes: give more images or a smaller --batch"
            )
        first, end = ((processes.rank + i) * batches // processes.count * batch for i in (0, 1))
        labels = None if self.labels is None else self.labels[first:end]
        return replace(self, files=self.files[first:end], labels=labels)

    def pixels(self, preprocessing: Preprocessing, size: int, what: str) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield batches of pixels, uint8 [N, C, H, W], and labels [N], -1 where there are none, and show progress."""
        labels = self.labels if self.labels is not None else [-1] * len(self.files)
        with progress(len(self.files), what) as bar:
            for first in range(0, len(self.files), size):
                images = [preprocessing.pixels(path) for path in self.files[first : first + size]]
                yield torch.stack(images), torch.tensor(labels[first : first + size])
                bar.update(len(images))

    def batches(
        self, preprocessing: Preprocessing, size: int, device: torch.device, what: str
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield batches as a network takes them, float32 [N, C, H, W], and labels [N]."""
        for pixels, labels in self.pixels(preprocessing, size, what):
            yield preprocessing.normalized(pixels.to(device)), labels.to(device)


def progress(images: int, what: str) -> tqdm[Any]:
    """Return a progress bar of images; of several processes the first one shows it."""
    return tqdm(total=images, desc=what, unit="image", delay=1.0, disable=os.environ.get("RANK", "0") != "0")
