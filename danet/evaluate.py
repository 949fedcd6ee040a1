"""Evaluation on a data set, on one process or several; masks for Cityscapes' server."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import nn

from .data.cityscapes import LABEL_IDS
from .data.sample import IGNORE, SegmentationDataset
from .data.transforms import to_tensor
from .distributed import rank_and_world
from .inference import predict_scores
from .metrics import ConfusionMatrix
from .progress import Progress


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
    rank, world = rank_and_world()
    images = len(dataset) if max_images is None else min(len(dataset), max_images)
    matrix = ConfusionMatrix(classes)
    model.to(device)
    report = Progress("evaluate", images if progress and rank == 0 else None)
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
