"""Evaluation on a data set, on one process or several; masks for Cityscapes' server."""

from __future__ import annotations

import sys
import time
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import nn

from .data.cityscapes import LABEL_IDS
from .data.sample import IGNORE, SegmentationDataset
from .data.transforms import to_tensor
from .inference import predict_scores
from .metrics import ConfusionMatrix


def evaluate(
    model: nn.Module,
    dataset: SegmentationDataset,
    *,
    device: torch.device | str = "cpu",
    progress: bool = True,
    max_images: int | None = None,
    **options: Any,
) -> ConfusionMatrix:
    """Compare predictions with the masks of a data set, at the images' own sizes.

    Where torch.distributed is initialised, all processes must call this; each takes its share of the images, and each
    gets the counts of all.

    Args:
        model: as for predict_scores; it is moved to `device`.
        dataset: with a mask for every image.
        device: where the model runs and the scores are added up.
        progress: whether the first process writes to stderr how far it is.
        max_images: only the first so many; None: all.
        options: of danet.inference.predict_scores: mode, scales, crop, stride, flip, base, batch.

    Raises:
        ValueError: the model has other classes than the data set, an image has no mask, or an option does not fit.
        OSError, ValueError: an image or a mask cannot be read.
    """
    if max_images is not None and max_images < 1:
        raise ValueError(f"evaluate: max_images must be at least 1, got {max_images}")
    classes = len(dataset.classes)
    _check_classes(getattr(model, "num_classes", classes), classes)
    rank, world = (dist.get_rank(), dist.get_world_size()) if _distributed() else (0, 1)
    images = len(dataset) if max_images is None else min(len(dataset), max_images)
    matrix = ConfusionMatrix(classes)
    model.to(device)
    report = _Progress(images if progress and rank == 0 else None)
    for index in range(rank, images, world):
        sample = dataset[index]
        if sample.mask is None:
            raise ValueError(f"evaluate: {sample.name} has no mask to compare with; is this a test split?")
        scores = predict_scores(model, to_tensor(sample.image).to(device), **options)  # [classes, H, W]
        _check_classes(scores.shape[0], classes)
        matrix.update(scores.argmax(0), torch.from_numpy(sample.mask))
        report.done(min(index + world, images))
    matrix.all_reduce()
    return matrix


def train_ids_to_label_ids(mask: np.ndarray) -> np.ndarray:
    """Cityscapes' 19 class numbers to the labelIds that its server takes; IGNORE becomes 0, "unlabeled".

    Args:
        mask: whole numbers, any shape.

    Returns:
        uint8, the same shape.

    Raises:
        ValueError: a value is neither a class nor IGNORE.
    """
    if mask.dtype.kind not in "iu":
        raise ValueError(f"train_ids_to_label_ids: expected whole numbers, got {mask.dtype}")
    strange = mask[(mask != IGNORE) & ((mask < 0) | (mask >= len(LABEL_IDS)))]
    if strange.size:
        raise ValueError(
            f"train_ids_to_label_ids: the mask holds {strange[0]}, expected 0 to {len(LABEL_IDS) - 1} or {IGNORE}"
        )
    table = np.zeros(IGNORE + 1, np.uint8)
    table[: len(LABEL_IDS)] = LABEL_IDS
    return np.asarray(table[mask])


def _check_classes(got: int, expected: int) -> None:
    if got != expected:
        raise ValueError(f"evaluate: the model has {got} classes, the data set {expected}")


def _distributed() -> bool:
    return dist.is_available() and dist.is_initialized()


class _Progress:
    """How many images are done, on stderr: one line that is overwritten, or, in a log, a line every half minute."""

    def __init__(self, images: int | None) -> None:
        self.images = images  # None: silent
        self.terminal = sys.stderr.isatty()
        self.pause = 0.2 if self.terminal else 30.0  # seconds
        self.start = self.last = time.monotonic()

    def done(self, images: int) -> None:
        now = time.monotonic()
        finished = images == self.images
        if self.images is None or not (finished or now - self.last >= self.pause):
            return
        self.last = now
        rate = images / max(now - self.start, 1e-9)
        line = f"evaluate: {images} of {self.images} images, {rate:.2g} a second"
        end = "\n" if finished or not self.terminal else ""
        print(f"\r{line}" if self.terminal else line, end=end, file=sys.stderr, flush=True)
