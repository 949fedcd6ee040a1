"""Prediction of photographs: for every image a mask of class numbers and a coloured overlay, and one legend."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from .data import IGNORE, distinct_palette
from .data.images import SUFFIXES, read_image, write_image
from .data.transforms import to_tensor
from .evaluate import train_ids_to_label_ids
from .inference import predict_scores
from .model import DANet
from .pictures import legend, overlay

LEGEND = "legend.png"


@dataclass
class Report:
    """What predict has done. Print it."""

    written: list[Path] = field(default_factory=list)  # the masks
    failures: dict[str, str] = field(default_factory=dict)  # images without one, with the reason

    def __str__(self) -> str:
        lines = [f"{len(self.written)} of {len(self.written) + len(self.failures)} images predicted"]
        for name, reason in self.failures.items():
            lines.append("failed: " + (reason if name in reason else f"{name}: {reason}"))
        return "\n  ".join(lines)


@dataclass(frozen=True)
class _Job:
    image: Path
    mask: Path
    overlay: Path


def predict(
    model: DANet,
    paths: Sequence[Path | str] | Path | str,
    output: Path | str,
    *,
    device: torch.device | str = "cpu",
    label_ids: bool = False,
    progress: Callable[[str], None] | None = None,
    **options: Any,
) -> Report:
    """Write, for each image, <stem>.png with its class numbers and <stem>_overlay.png; and legend.png.

    Every file is whole or not there. An image that cannot be read, or is too large for the memory, does not stop the
    others.

    Args:
        paths: images, or folders that are searched for images; below `output` a folder's sub-folders stay as they are.
        output: folder for the results, made if need be.
        device: where the model is moved to and runs.
        label_ids: whether masks hold Cityscapes' labelIds, as its server takes them, instead of the 19 class numbers.
        progress: called with one line per image.
        options: of danet.inference.predict_scores: mode, scales, crop, stride, flip, base, batch.

    Raises:
        FileNotFoundError: a path is not there.
        ValueError: a folder without images; results of two images that would be the same file, or an image itself;
            label_ids of another number of classes; options that do not fit.
        OSError: a result cannot be written.
    """
    if model.num_classes > IGNORE:
        raise ValueError(f"predict: masks hold at most {IGNORE} classes, the model has {model.num_classes}")
    if label_ids and model.num_classes != 19:
        raise ValueError(f"predict: label_ids are of Cityscapes' 19 classes, the model has {model.num_classes}")
    output = Path(output)
    if output.exists() and not output.is_dir():
        raise ValueError(f"predict: the output {output} is a file; expected a folder")
    jobs = _jobs([paths] if isinstance(paths, (str, Path)) else paths, output)
    palette = model.palette or distinct_palette(model.num_classes)
    classes = model.classes or [f"class {number}" for number in range(model.num_classes)]
    model.to(device)
    report = Report()
    for number, job in enumerate(jobs, 1):
        if progress is not None:
            progress(f"{number} of {len(jobs)}: {job.image}")
        try:
            image = read_image(job.image)  # uint8 [H, W, 3]
        except (OSError, ValueError) as error:
            report.failures[str(job.image)] = str(error)
            continue
        try:
            scores = predict_scores(model, to_tensor(image).to(device), **options)  # [classes, H, W]
            mask = scores.argmax(0).to("cpu", torch.uint8).numpy()  # [H, W]
        except (RuntimeError, MemoryError) as error:
            if not _is_out_of_memory(error):
                raise
            size = f"{image.shape[1]} x {image.shape[0]} pixels"
            report.failures[str(job.image)] = f"there is not enough memory for {size}; a smaller crop takes less"
            continue
        except ValueError as error:
            if not report.written:  # until one image has gone through, options or the model may be at fault
                raise
            report.failures[str(job.image)] = str(error)
            continue
        if not report.written:
            write_image(output / LEGEND, legend(classes, palette))
        _write(job, image, mask, palette, label_ids)
        report.written.append(job.mask)
    return report


def _is_out_of_memory(error: RuntimeError | MemoryError) -> bool:
    """torch has a class for it on GPUs alone."""
    return isinstance(error, (MemoryError, torch.OutOfMemoryError)) or "allocate memory" in str(error)


def _write(job: _Job, image: np.ndarray, mask: np.ndarray, palette: Sequence[Sequence[int]], label_ids: bool) -> None:
    write_image(job.overlay, overlay(image, mask, palette))
    if label_ids:
        write_image(job.mask, train_ids_to_label_ids(mask))
    else:
        write_image(job.mask, mask, palette)


def _jobs(paths: Sequence[Path | str], output: Path) -> list[_Job]:
    """One per image, in the order of the paths; ValueError if two would write the same file."""
    found = [pair for path in paths for pair in _images(Path(path), output)]
    if not found:
        raise ValueError("predict: there are no images")
    jobs = [
        _Job(image, output / place / f"{image.stem}.png", output / place / f"{image.stem}_overlay.png")
        for image, place in dict(found).items()
    ]
    inputs = {job.image.resolve() for job in jobs}
    writers: dict[Path, str] = {(output / LEGEND).resolve(): "the legend"}
    for job in jobs:
        for target in (job.mask, job.overlay):
            if target.resolve() in inputs:
                raise ValueError(f"predict: the result {target} would replace an image; choose another output folder")
            other = writers.setdefault(target.resolve(), str(job.image))
            if other != str(job.image):
                raise ValueError(f"predict: {other} and {job.image} would both be written to {target}")
    return jobs


def _images(path: Path, output: Path) -> Iterator[tuple[Path, Path]]:
    """The image files of a path, each with the folder below the output where its results go."""
    if path.is_file():
        yield path, Path()
        return
    if not path.is_dir():
        raise FileNotFoundError(f"there is no image or folder {path}")
    images = sorted(file for file in path.rglob("*") if _is_image(file, path) and not _is_result(file, path, output))
    if not images:
        raise ValueError(f"predict: there are no images in {path}; expected files that end in {', '.join(SUFFIXES)}")
    yield from ((image, image.parent.relative_to(path)) for image in images)


def _is_image(file: Path, folder: Path) -> bool:
    """By its name; hidden files, and those in hidden folders, are no photographs."""
    hidden = any(part.startswith(".") for part in file.relative_to(folder).parts)
    return file.suffix.lower() in SUFFIXES and not hidden and file.is_file()


def _is_result(file: Path, folder: Path, output: Path) -> bool:
    """Whether it lies in an output folder inside the folder of images, out of an earlier run."""
    output = output.resolve()
    return output != folder.resolve() and output in file.resolve().parents
