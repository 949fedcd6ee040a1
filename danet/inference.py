"""Scores of the classes for a whole image: windows, scales and flips, and three ways to fuse what they say."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .data.transforms import MEAN, STD

MODES = ("official", "mmseg", "probability")

EVALUATION_SCALES = (0.5, 0.75, 1.0, 1.25, 1.5, 1.75, 2.0, 2.2)
"""Of the paper's multi-scale results; the authors took them with crop 1024."""

LARGEST_EXPONENT = 80.0
"""Of the official mode. exp(88.8) is more than fp32 holds; the rest is for sums over windows and scales."""

_Net = Callable[[Tensor], Tensor]  # fp32 [b, 3, h, w] -> fp32 [b, classes, h, w]


def predict_scores(
    model: nn.Module,
    image: Tensor,
    *,
    mode: str = "official",
    scales: Sequence[float] = (1.0,),
    crop: int | None = 768,
    stride: int | None = None,
    flip: bool | None = None,
    base: int | None = None,
    batch: int = 1,
) -> Tensor:
    """Scores of one image; the prediction is their argmax over the classes.

    The model runs in evaluation mode, without gradients, and is left as it was found. It gets windows in its own dtype
    and on its own device; all that follows is fp32, where the image lies. Images are resized by bilinear interpolation,
    align_corners=True, and so are the results, back to the image's size.

    Modes:
        "official": what the authors' code does. Long side ceil(base * scale). Windows begin at multiples of the stride;
            what sticks out at the right and below, or is larger than the image, is black. A window's score is
            exp(logits of it + logits of it mirrored), the mean of which over windows is resized and added up over
            scales. No probabilities: where logits are large, so is their weight. Where a pixel's largest sum of logits
            is above LARGEST_EXPONENT, its sums are lowered alike until it is that; so nothing overflows, and their
            order stays. Mirroring is no choice here.
        "mmseg": what mmsegmentation does. The last window is moved back into the image, one larger than the image is
            cut. Logits are averaged over windows, resized, and put through softmax; its mean is taken over scales and
            the image and its mirror image.
        "probability": what the paper says. Softmax of every window, mirrored or not; the mean over these, over windows
            (placed as in "mmseg"), and, resized, over scales.
        In the last two, both sides are rounded, and the scores of a pixel sum to 1.

    Args:
        model: [b, 3, h, w] to logits [b, classes, h, w].
        image: floating-point [3, H, W], normalised.
        mode: one of MODES.
        scales: sizes of the image at which it is looked at, relative to base.
        crop: side of the square windows, in pixels; None: the whole image at once, for every scale.
        stride: pixels from one window to the next. None: 2/3 of the crop, or, in "official" with several scales, 1/2.
        flip: whether mirrored views are looked at too; None: in "official", where it must be, alone.
        base: long side of the image at scale 1, in pixels; None: its own. Cityscapes' is 2048 (mmsegmentation: 2049).
        batch: windows that go through the model together.

    Returns:
        fp32 [classes, H, W], finite.

    Raises:
        TypeError: the image or what the model returns is no tensor of floating-point numbers.
        ValueError: an option or a shape that does not fit, a model that gives NaN or infinity.
    """
    _check(image, mode, scales, crop, stride, flip, base, batch)
    flip = mode == "official" if flip is None else flip
    if crop is not None and stride is None:
        stride = _default_stride(mode, crop, len(scales))
    image = image.float()
    height, width = image.shape[1:]
    total: Tensor | None = None
    with evaluating(model):
        net = _net(model)
        for scale in scales:
            size = _scaled_size(height, width, scale, base, mode)
            scaled = _resize(image, size)
            scores = _FUSE[mode](net, scaled, (height, width), crop, stride, flip, batch)
            total = scores if total is None else total.add_(scores)
        assert total is not None
        if mode != "official":
            total.div_(len(scales))
    if not total.isfinite().all():
        raise ValueError("predict_scores: the model gives NaN or infinity for this image; does its dtype overflow?")
    return total


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Every module in evaluation mode, no gradients; after that each is in its own mode again: some may be frozen."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        with torch.inference_mode():
            yield
    finally:
        for module in training:
            module.training = True


def _official(
    net: _Net, image: Tensor, size: tuple[int, int], crop: int | None, stride: int | None, flip: bool, batch: int
) -> Tensor:
    def scores(windows: Tensor) -> Tensor:
        logits = net(windows) + net(windows.flip(3)).flip(3)  # [b, classes, h, w]
        excess = (logits.amax(1, keepdim=True) - LARGEST_EXPONENT).clamp_(min=0)  # [b, 1, h, w]
        return logits.sub_(excess).exp_()

    grid = _Grid.of(image, crop, stride, inside=False)
    canvas = _black_beyond(image, grid.rows[-1] + grid.height, grid.columns[-1] + grid.width)
    return _resize(_slide(scores, canvas, grid, batch)[:, : image.shape[1], : image.shape[2]], size)


def _mmseg(
    net: _Net, image: Tensor, size: tuple[int, int], crop: int | None, stride: int | None, flip: bool, batch: int
) -> Tensor:
    grid = _Grid.of(image, crop, stride, inside=True)
    scores = _resize(_slide(net, image, grid, batch), size).softmax(0)
    if flip:
        mirrored = _resize(_slide(net, image.flip(2), grid, batch), size).softmax(0)
        scores = (scores + mirrored.flip(2)) / 2
    return scores


def _probability(
    net: _Net, image: Tensor, size: tuple[int, int], crop: int | None, stride: int | None, flip: bool, batch: int
) -> Tensor:
    def scores(windows: Tensor) -> Tensor:
        seen = net(windows).softmax(1)  # [b, classes, h, w]
        return (seen + net(windows.flip(3)).softmax(1).flip(3)) / 2 if flip else seen

    grid = _Grid.of(image, crop, stride, inside=True)
    return _resize(_slide(scores, image, grid, batch), size)


_FUSE = {"official": _official, "mmseg": _mmseg, "probability": _probability}
"""An image at one scale to scores at the size of the result."""


class _Grid(NamedTuple):
    """Windows of one size; their first rows and columns."""

    height: int
    width: int
    rows: list[int]
    columns: list[int]

    @staticmethod
    def of(image: Tensor, crop: int | None, stride: int | None, inside: bool) -> _Grid:
        """`inside`: whether all windows lie in the image, or start at multiples of the stride and may stick out."""
        height, width = image.shape[1:]
        if crop is None or stride is None:
            return _Grid(height, width, [0], [0])
        rows, columns = (
            [step * stride for step in range(-(-max(0, side - crop) // stride) + 1)] for side in (height, width)
        )
        if not inside:
            return _Grid(crop, crop, rows, columns)
        rows[-1], columns[-1] = max(0, height - crop), max(0, width - crop)
        return _Grid(min(crop, height), min(crop, width), rows, columns)


def _slide(scores: _Net, image: Tensor, grid: _Grid, batch: int) -> Tensor:
    """Mean over the windows at every pixel of the image [3, h, w]: [classes, h, w]."""
    places = [
        (slice(row, row + grid.height), slice(column, column + grid.width))
        for row in grid.rows
        for column in grid.columns
    ]
    total = image.new_zeros(0)
    count = image.new_zeros(image.shape[1:])
    for first in range(0, len(places), batch):
        some = places[first : first + batch]
        seen = scores(torch.stack([image[:, rows, columns] for rows, columns in some]))  # [b, classes, h, w]
        if first == 0:
            total = image.new_zeros(seen.shape[1], *image.shape[1:])
        for (rows, columns), part in zip(some, seen, strict=True):
            total[:, rows, columns] += part
            count[rows, columns] += 1
    return total.div_(count)


def _black_beyond(image: Tensor, height: int, width: int) -> Tensor:
    """The image [3, h, w] in the upper left corner of a black one."""
    black = torch.tensor([-mean / std for mean, std in zip(MEAN, STD, strict=True)], device=image.device)
    canvas = black.view(3, 1, 1).repeat(1, height, width)
    canvas[:, : image.shape[1], : image.shape[2]] = image
    return canvas


def _resize(maps: Tensor, size: tuple[int, int]) -> Tensor:  # [channels, h, w] -> [channels, *size]
    if maps.shape[1:] == size:
        return maps
    return F.interpolate(maps[None], size, mode="bilinear", align_corners=True)[0]


def _scaled_size(height: int, width: int, scale: float, base: int | None, mode: str) -> tuple[int, int]:
    long = max(height, width)
    if mode == "official":
        wanted = math.ceil((long if base is None else base) * scale)
        sides = [wanted if side == long else int(side * wanted / long + 0.5) for side in (height, width)]
    else:
        factor = scale if base is None else scale * base / long
        sides = [int(side * factor + 0.5) for side in (height, width)]
    return max(1, sides[0]), max(1, sides[1])


def _default_stride(mode: str, crop: int, scales: int) -> int:
    """2/3 is rounded down by the authors, and by mmsegmentation to the nearest: 513 for its crop of 769."""
    if mode == "official":
        return max(1, crop // 2 if scales > 1 else crop * 2 // 3)
    return max(1, (crop * 2 + 1) // 3)


def _net(model: nn.Module) -> _Net:
    """The model on fp32 windows, with its own dtype and device inside, and fp32 logits that were looked at."""
    own = next((parameter for parameter in model.parameters() if parameter.is_floating_point()), None)

    def net(windows: Tensor) -> Tensor:
        logits = model(windows if own is None else windows.to(own.device, own.dtype))
        if not isinstance(logits, Tensor) or not logits.is_floating_point():
            kind = logits.dtype if isinstance(logits, Tensor) else type(logits).__name__
            raise TypeError(f"predict_scores: the model must return one tensor of logits, got {kind}")
        batch, _, height, width = windows.shape
        if logits.dim() != 4 or (logits.shape[0], *logits.shape[2:]) != (batch, height, width):
            raise ValueError(
                f"predict_scores: the model must return logits [{batch}, classes, {height}, {width}] for images "
                f"{list(windows.shape)}, got {list(logits.shape)}"
            )
        return logits.to(windows.device, torch.float32)

    return net


def _check(
    image: Tensor,
    mode: str,
    scales: Sequence[float],
    crop: int | None,
    stride: int | None,
    flip: bool | None,
    base: int | None,
    batch: int,
) -> None:
    if mode not in MODES:
        raise ValueError(f"predict_scores: mode must be one of {', '.join(MODES)}, got {mode!r}")
    if not isinstance(image, Tensor) or not image.is_floating_point():
        kind = image.dtype if isinstance(image, Tensor) else type(image).__name__
        raise TypeError(f"predict_scores: the image must be a normalised floating-point tensor, got {kind}")
    if image.dim() != 3 or image.shape[0] != 3 or not image.numel():
        raise ValueError(f"predict_scores: the image must have shape [3, H, W], got {list(image.shape)}")
    if not scales or not all(0 < scale < math.inf for scale in scales):
        raise ValueError(f"predict_scores: scales must be one positive number or more, got {list(scales)}")
    for name, value in (("crop", crop), ("stride", stride), ("base", base), ("batch", batch)):
        if value is not None and value < 1:
            raise ValueError(f"predict_scores: {name} must be at least 1, got {value}")
    if stride is not None and crop is None:
        raise ValueError(f"predict_scores: without a crop there are no windows for the stride of {stride}")
    if stride is not None and crop is not None and crop < stride:
        raise ValueError(
            f"predict_scores: the crop of {crop} is smaller than the stride of {stride}, so pixels are missed"
        )
    if mode == "official" and flip is False:
        raise ValueError('predict_scores: the official mode always flips; flip=False needs "mmseg" or "probability"')
