"""Data sets of images with masks of class numbers, each in the folder layout its users already have."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

from .cityscapes import Cityscapes
from .coco_stuff import CocoStuff10k
from .context import PascalContext
from .folder import ImageFolder
from .palette import distinct_palette
from .prepare import prepare
from .sample import IGNORE, Sample, SegmentationDataset
from .voc import VOC

__all__ = [
    "DATASETS",
    "IGNORE",
    "VOC",
    "Cityscapes",
    "CocoStuff10k",
    "ImageFolder",
    "PascalContext",
    "Sample",
    "SegmentationDataset",
    "distinct_palette",
    "open_dataset",
    "prepare",
]

DATASETS: dict[str, Callable[..., SegmentationDataset]] = {
    "cityscapes": Cityscapes,
    "voc": VOC,
    "context": PascalContext,
    "coco-stuff": CocoStuff10k,
    "folder": ImageFolder,
    "street-scenes": Cityscapes,  # whose layout it is written in
}
"""By the names of the command line."""


def open_dataset(name: str, root: Path | str, split: str | None = None, **options: Any) -> SegmentationDataset:
    """A data set by its name.

    Args:
        name: a key of DATASETS.
        root: where it lies.
        split: None: what its class takes by default.
        options: further arguments of its class.

    Raises:
        FileNotFoundError, ValueError: it is not there, is incomplete, or has no such name or option.
    """
    if name not in DATASETS:
        raise ValueError(f"open_dataset: name must be one of {', '.join(DATASETS)}, got {name!r}")
    known = [option for option in inspect.signature(DATASETS[name]).parameters if option not in ("root", "split")]
    for option in options:
        if option not in known:
            raise ValueError(f"open_dataset: {name} has no option {option!r}; it has {', '.join(known) or 'none'}")
    return DATASETS[name](root, **options, **({} if split is None else {"split": split}))
