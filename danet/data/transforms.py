"""Augmentation of the paper's recipe, in the authors' order: flip, scale, pad, crop; and images to tensors."""

from __future__ import annotations

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from .sample import IGNORE, Sample

MEAN = (0.485, 0.456, 0.406)
"""Of ImageNet's red, green and blue in [0, 1], which the weights of the backbones were trained with."""

STD = (0.229, 0.224, 0.225)


def to_tensor(image: np.ndarray) -> Tensor:
    """A picture, uint8 [H, W, 3], normalised: fp32 [3, H, W]."""
    pixels = torch.from_numpy(np.ascontiguousarray(image)).permute(2, 0, 1).float().div_(255)  # [3, H, W]
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (MEAN, STD))
    return (pixels - mean) / std


def flip(sample: Sample) -> Sample:
    """Left and right exchanged."""
    mask = None if sample.mask is None else np.ascontiguousarray(sample.mask[:, ::-1])
    return sample._replace(image=np.ascontiguousarray(sample.image[:, ::-1]), mask=mask)


def resize(sample: Sample, height: int, width: int) -> Sample:
    """To height x width: the image by bilinear interpolation, the mask by nearest neighbours."""
    if sample.image.shape[:2] == (height, width):
        return sample
    image = np.array(Image.fromarray(sample.image).resize((width, height), Image.Resampling.BILINEAR))
    if sample.mask is None:
        return sample._replace(image=image)
    mask = np.array(Image.fromarray(sample.mask).resize((width, height), Image.Resampling.NEAREST))
    return sample._replace(image=image, mask=mask)


def resize_short_side(sample: Sample, length: int) -> Sample:
    """The shorter side to `length`, the other one in proportion."""
    height, width = sample.image.shape[:2]
    scale = length / min(height, width)
    return resize(sample, max(1, round(height * scale)), max(1, round(width * scale)))


def pad(sample: Sample, height: int, width: int) -> Sample:
    """At least height x width: black to the right and below, which counts as no class."""
    below = max(0, height - sample.image.shape[0])
    right = max(0, width - sample.image.shape[1])
    if not (below or right):
        return sample
    image = np.pad(sample.image, ((0, below), (0, right), (0, 0)))
    if sample.mask is None:
        return sample._replace(image=image)
    return sample._replace(image=image, mask=np.pad(sample.mask, ((0, below), (0, right)), constant_values=IGNORE))


def crop(sample: Sample, top: int, left: int, height: int, width: int) -> Sample:
    """The part of height x width whose upper left pixel is (top, left)."""
    window = slice(top, top + height), slice(left, left + width)
    mask = None if sample.mask is None else np.ascontiguousarray(sample.mask[window])
    return sample._replace(image=np.ascontiguousarray(sample.image[window]), mask=mask)


def augment(
    sample: Sample,
    random: np.random.Generator,
    *,
    crop_size: tuple[int, int],
    base_size: int | None = None,
    scale: tuple[float, float] = (1.0, 1.0),
) -> Sample:
    """A random view of a sample for training.

    Args:
        random: where all chance comes from.
        crop_size: height and width of the result.
        base_size: length in pixels of the shorter side at scale 1; None: the image's own.
        scale: least and greatest factor on it, drawn uniformly.
    """
    if random.random() < 0.5:
        sample = flip(sample)
    base = min(sample.image.shape[:2]) if base_size is None else base_size
    sample = resize_short_side(sample, max(1, round(base * random.uniform(*scale))))
    sample = pad(sample, *crop_size)
    top, left = (
        int(random.integers(0, size - wanted + 1))
        for size, wanted in zip(sample.image.shape[:2], crop_size, strict=True)
    )
    return crop(sample, top, left, *crop_size)
