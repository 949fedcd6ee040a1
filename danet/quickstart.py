"""A first look in minutes, on a CPU and without a download: Table 1 of the paper in miniature, on drawn scenes."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import mean
from typing import Any, NamedTuple

import numpy as np
import torch

from .data import Cityscapes, SegmentationDataset
from .data.cityscapes import CLASSES
from .data.images import write_image
from .data.street_scenes import FAR_PAIR, write_street_scenes
from .evaluate import evaluate
from .head import VARIANTS
from .metrics import ConfusionMatrix
from .model import DANet, create_model
from .recipes import find_recipe
from .train import gammas, train
from .visualize import attention_panel, compare_panel


class Score(NamedTuple):
    """Of one model on the held-out scenes."""

    mean_iou: float  # over the classes that occur
    far_pair: float  # see far_pair_accuracy
    gammas: dict[str, float]
    seconds: float  # of training


def quickstart(
    output: Path | str,
    *,
    seeds: int = 1,
    steps: int | None = None,
    amp: str = "off",
    progress: Callable[[str], None] | None = None,
) -> str:
    """Draw scenes, train "danet_tiny" and its variants on them, compare them on others.

    `output` receives, for each seed, the scenes and a training run for each variant; and of the first, results.png
    (the variants side by side) and attention.png (what points attend to).

    Args:
        output: a folder; runs that are in it are gone on with, not repeated: their seconds are those of this call.
        seeds: runs for each variant, with scenes of their own.
        steps: of each run; None: the recipe's.
        amp: as danet.train.train. Layers as small as these are slower in bf16, even where the CPU multiplies it.
        progress: called with a line for each model; None: to stderr.

    Returns:
        The recipe and a table: for each variant the mean IoU, the accuracy on the far pair and the learned gammas.

    Raises:
        ValueError, OSError: as danet.train.train.
    """
    if seeds < 1:
        raise ValueError(f"quickstart: seeds must be at least 1, got {seeds}")
    tell = (lambda line: print(line, file=sys.stderr, flush=True)) if progress is None else progress
    changes: dict[str, Any] = {} if steps is None else {"steps": steps}
    output = Path(output)
    scores: dict[str, list[Score]] = {variant: [] for variant in VARIANTS}
    for seed in range(seeds):
        folder = output / f"seed-{seed}"
        tell(f"drawing scenes into {folder / 'scenes'}")
        write_street_scenes(folder / "scenes", seed=seed)
        training, validation = (Cityscapes(folder / "scenes", split) for split in ("train", "val"))
        models = []
        for variant in VARIANTS:
            torch.manual_seed(seed)
            model = create_model(f"{variant}_tiny", len(training.classes))
            model.classes, model.palette = training.classes, training.palette
            recipe = find_recipe("street-scenes", variant, **changes)
            start = time.monotonic()
            train(model, training, recipe, folder / variant, amp=amp, seed=seed, resume=True)
            seconds = time.monotonic() - start
            matrix = evaluate(model, validation, mode="mmseg", crop=None, progress=False)
            score = Score(matrix.mean_iou("skip"), far_pair_accuracy(matrix), gammas(model), seconds)
            scores[variant].append(score)
            models.append((variant, model))
            tell(f"seed {seed}, {variant}: mean IoU {score.mean_iou:.3f}, far pair {score.far_pair:.3f}")
        if seed == 0:
            _draw(output, models, validation)
    recipe = find_recipe("street-scenes", **changes)
    return f"{recipe}\n\n{_table(scores)}\n\npictures: {output / 'results.png'}, {output / 'attention.png'}"


def far_pair_accuracy(matrix: ConfusionMatrix) -> float:
    """Of the pixels of FAR_PAIR that are predicted as one of the two, the part that is predicted as the right one."""
    numbers = [CLASSES.index(name) for name in FAR_PAIR]
    pair = matrix.counts[numbers][:, numbers].double()  # [2, 2]
    return (pair.trace() / pair.sum()).item()


def _table(scores: dict[str, list[Score]]) -> str:
    lines: list[tuple[str, ...]] = [("", "mean IoU", "far pair", "gamma position", "gamma channel", "seconds")]
    for variant, runs in scores.items():
        cells = [
            _spread([run.mean_iou for run in runs]),
            _spread([run.far_pair for run in runs]),
            *(
                _spread([run.gammas[name] for run in runs if name in run.gammas])
                for name in ("gamma_position", "gamma_channel")
            ),
            f"{mean(run.seconds for run in runs):.0f}",
        ]
        lines.append((variant, *cells))
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join("  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)) for line in lines)


def _spread(values: list[float]) -> str:
    """The mean, and of several values the least and the greatest."""
    if not values:
        return "-"
    if len(values) == 1:
        return f"{values[0]:.3f}"
    return f"{mean(values):.3f} ({min(values):.3f} to {max(values):.3f})"


def _draw(output: Path, models: list[tuple[str, DANet]], scenes: SegmentationDataset) -> None:
    image, truth, _ = scenes[0]
    assert truth is not None
    write_image(output / "results.png", compare_panel(models, image, truth))
    names = [name for name in (*FAR_PAIR, "car", "sky") if (truth == CLASSES.index(name)).any()]
    points = [_inside(truth, name) for name in names]
    write_image(output / "attention.png", attention_panel(dict(models)["danet"], image, points, truth=truth))


def _inside(mask: np.ndarray, name: str) -> tuple[int, int]:
    """(x, y) of the pixel of a class that is nearest to the middle of them all; mask [H, W]."""
    places = np.argwhere(mask == CLASSES.index(name))  # [pixels, 2]
    y, x = places[np.abs(places - np.median(places, axis=0)).sum(1).argmin()]
    return int(x), int(y)
