"""What a data set is made of: images with masks of class numbers."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from torch.utils.data import Dataset

from .images import read_image, read_labels

IGNORE = 255
"""The value in a mask that stands for no class: no loss, no part in any score."""

Colour = tuple[int, int, int]


class Sample(NamedTuple):
    image: np.ndarray  # uint8 [H, W, 3], RGB
    mask: np.ndarray | None  # uint8 [H, W]: a class number, or IGNORE; None where there is no ground truth
    name: str


class Item(NamedTuple):
    """Where a sample lies on the disk."""

    name: str
    image: Path
    mask: Path | None


class SegmentationDataset(Dataset[Sample]):
    """Pairs of image and mask files.

    Args:
        items: one per sample.
        classes: names of the classes.
        palette: one (r, g, b) from 0 to 255 per class.
        labels: class number of every value that mask files may hold; None: values are class numbers, and IGNORE.

    Raises:
        ValueError: there are no items, more than 255 classes, or not one colour per class.
    """

    def __init__(
        self,
        items: Sequence[Item],
        classes: Sequence[str],
        palette: Sequence[Colour],
        labels: dict[int, int] | None = None,
    ) -> None:
        if not items:
            raise ValueError(f"{type(self).__name__}: there are no images")
        if len(palette) != len(classes):
            raise ValueError(f"{type(self).__name__}: {len(classes)} classes need as many colours, got {len(palette)}")
        if len(classes) > IGNORE:
            raise ValueError(
                f"{type(self).__name__}: {len(classes)} classes are more than the {IGNORE} that a mask can tell apart"
            )
        self.items = list(items)
        self.classes = tuple(classes)
        self.palette = list(palette)
        self._labels = {number: number for number in [*range(len(classes)), IGNORE]} if labels is None else labels

    @property
    def names(self) -> list[str]:
        return [item.name for item in self.items]

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> Sample:
        """Read one sample.

        Raises:
            OSError, ValueError: a file is missing or unreadable, its values are outside the set, or sizes disagree.
        """
        item = self.items[index]
        image = read_image(item.image)
        if item.mask is None:
            return Sample(image, None, item.name)
        mask = self.class_numbers(self.read_mask(item.mask), item.mask)
        if mask.shape != image.shape[:2]:
            raise ValueError(
                f"{item.mask} has {mask.shape[1]} x {mask.shape[0]} pixels, its image {item.image} "
                f"{image.shape[1]} x {image.shape[0]}"
            )
        return Sample(image, mask, item.name)

    def read_mask(self, path: Path) -> np.ndarray:
        """The values in a mask file, [H, W], as they are."""
        return read_labels(path)

    def class_numbers(self, values: np.ndarray, path: Path) -> np.ndarray:
        """Values of a mask file, unsigned [H, W], to class numbers, uint8 [H, W]."""
        assert values.dtype.kind == "u", values.dtype  # a negative number would count from the table's end
        table = np.full(int(max(*self._labels, values.max(initial=0))) + 1, -1, np.int32)
        for value, number in self._labels.items():
            table[value] = number
        mask = table[values]
        if mask.min(initial=0) < 0:
            row, column = np.argwhere(mask < 0)[0]
            raise ValueError(
                f"{path}: the value {values[row, column]} at row {row}, column {column} is no label of this set; "
                f"expected {_ranges(self._labels)}"
            )
        return mask.astype(np.uint8)


def _ranges(values: Sequence[int] | dict[int, int]) -> str:
    """The numbers 0, 1, 2, 255 as "0 to 2, 255"."""
    runs: list[list[int]] = []
    for value in sorted(values):
        if runs and value == runs[-1][1] + 1:
            runs[-1][1] = value
        else:
            runs.append([value, value])
    return ", ".join(str(first) if first == last else f"{first} to {last}" for first, last in runs)
