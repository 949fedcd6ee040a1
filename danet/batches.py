"""The batches of a training run: which images, and how they are augmented, decided by the seed and the step alone.

Nothing here has a state. A run that is resumed at a step sees what it would have seen, whatever the number of workers.
"""

from __future__ import annotations

import signal
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from .data.sample import SegmentationDataset
from .data.transforms import augment, to_tensor
from .recipes import Recipe

GRACE = 20
"""Seconds that a worker goes on after SIGTERM."""


class Batch(NamedTuple):
    images: Tensor  # fp32 [b, 3, h, w], normalised
    target: Tensor  # uint8 [b, h, w]: class numbers, or IGNORE


class View(NamedTuple):
    """One look at an image: its random numbers follow from the seed, the epoch and the place in it."""

    epoch: int
    place: int
    item: int  # of the data set


class Views(Dataset[Any]):
    """Augmented samples, by View."""

    def __init__(self, dataset: SegmentationDataset, recipe: Recipe, seed: int) -> None:
        self.dataset, self.recipe, self.seed = dataset, recipe, seed

    def __getitem__(self, view: View) -> tuple[Tensor, Tensor] | Exception:
        """Image fp32 [3, h, w] and mask uint8 [h, w]; or what stopped it, so that a worker's error keeps its words."""
        try:
            sample = self.dataset[view.item]
            if sample.mask is None:
                raise ValueError(f"{sample.name} has no mask to learn from; is this a test split?")
        except (OSError, ValueError) as error:
            return error
        sample = augment(
            sample,
            np.random.default_rng((self.seed, view.epoch, view.place)),
            crop_size=self.recipe.crop_size,
            base_size=self.recipe.base_size,
            scale=self.recipe.scale,
        )
        return to_tensor(sample.image), torch.from_numpy(sample.mask)


class Order:
    """The views of each batch that one process takes, from a step on; for DataLoader's batch_sampler.

    In each epoch all images come once, in an order of the seed and the epoch; a last batch that is not full is left
    out. A step's images are dealt out to the processes in turn, `parts` times.
    """

    def __init__(
        self, images: int, recipe: Recipe, seed: int, *, first: int, steps: int, parts: int, rank: int, world: int
    ) -> None:
        self.images, self.batch, self.seed = images, recipe.batch_size, seed
        self.first, self.steps = first, steps
        self.parts, self.rank, self.world = parts, rank, world

    def __len__(self) -> int:
        return (self.steps - self.first) * self.parts

    def __iter__(self) -> Iterator[list[View]]:
        an_epoch = self.images // self.batch
        size = self.batch // (self.parts * self.world)
        order = np.empty(0, np.int64)
        for step in range(self.first, self.steps):
            epoch, within = divmod(step, an_epoch)
            if within == 0 or step == self.first:
                order = np.random.default_rng((self.seed, epoch)).permutation(self.images)
            for part in range(self.parts):
                start = within * self.batch + (part * self.world + self.rank) * size
                yield [View(epoch, place, int(order[place])) for place in range(start, start + size)]


def load(
    dataset: SegmentationDataset, recipe: Recipe, order: Order, *, seed: int, workers: int, pin_memory: bool
) -> DataLoader[Any]:
    """The batches of an order."""
    return DataLoader(
        Views(dataset, recipe, seed),
        batch_sampler=order,
        num_workers=workers,
        collate_fn=_together,
        pin_memory=pin_memory,
        worker_init_fn=_outlive_signals,
        generator=torch.Generator(),  # of seeds for workers; else it would draw from the caller's
    )


def _outlive_signals(_: int) -> None:
    """Ctrl-C, and often SIGTERM, reach all processes of a group: the step that is to end needs its images.

    SIGTERM ends a worker GRACE seconds later: it is also how Python ends workers that are left over.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: signal.alarm(GRACE))


def _together(views: list[tuple[Tensor, Tensor] | Exception]) -> Batch | Exception:
    for view in views:
        if isinstance(view, Exception):
            return view
    images, targets = zip(*views, strict=True)
    return Batch(torch.stack(images), torch.stack(targets))
