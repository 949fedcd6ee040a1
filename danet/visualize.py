"""Attention made visible: Figures 4 to 6 of the paper, and the state of a model's channel attention in numbers.

Images are uint8 [H, W, 3] in RGB and go through the model whole. No map of all positions against all is ever formed:
only the rows of the chosen points.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from danet_kernels import channel_attention_map, position_attention_map

from .data import distinct_palette
from .data.transforms import to_tensor
from .inference import evaluating
from .model import DANet
from .pictures import Cell, check_image, colourise, heat, heat_overlay, mark, panel

FP16_MAX = 65504.0
ONE_HOT = 0.9
"""A row of the channel attention map with a larger entry is as good as one-hot."""


@dataclass(frozen=True)
class AttentionInputs:
    """What the attention modules were given in one forward pass; None where the variant has no such module."""

    logits: Tensor  # [1, classes, H, W]
    query: Tensor | None  # [1, D, h, w], of position attention
    key: Tensor | None  # [1, D, h, w]
    channel_in: Tensor | None  # [1, C, h, w], of channel attention
    channel_out: Tensor | None  # [1, C, h, w]


def attention_inputs(model: DANet, image: np.ndarray) -> AttentionInputs:
    """One forward pass over an image, in evaluation mode, and what the attention modules saw of it."""
    check_image("attention_inputs", image)
    seen: dict[str, Tensor] = {}
    head = model.head
    with ExitStack() as stack:
        if hasattr(head, "position_attention"):
            for name in ("query", "key"):
                projection = getattr(head.position_attention, f"{name}_conv")
                stack.enter_context(_watched(projection, seen, f"{name}_in", name))
        if hasattr(head, "channel_attention"):
            stack.enter_context(_watched(head.channel_attention, seen, "channel_in", "channel_out"))
        logits = _logits(model, image)
    return AttentionInputs(logits, *(seen.get(name) for name in ("query", "key", "channel_in", "channel_out")))


def attention_panel(
    model: DANet,
    image: np.ndarray,
    points: Sequence[tuple[int, int]],
    *,
    channels: Sequence[int] | int | None = None,
    truth: np.ndarray | None = None,
) -> np.ndarray:
    """Figure 6 of the paper for one image: what chosen points attend to, and some channels after channel attention.

    Args:
        points: (x, y) in pixels; of the sub-attention map of the nearest position of the feature map.
        channels: numbers of channels of the output of channel attention, or how many: those with the largest variance;
            None: two, if the variant has channel attention.
        truth: class numbers, uint8 [H, W].

    Returns:
        uint8, a row each: the image with its points, the result and the truth; the sub-attention maps; the channels.

    Raises:
        ValueError: a point outside the image, a channel that there is not, or points or channels asked of a variant
            that has no such attention.
    """
    check_image("attention_panel", image)
    variant, has_channels = model.head.variant, hasattr(model.head, "channel_attention")
    if points and not hasattr(model.head, "position_attention"):
        raise ValueError(f"attention_panel: the variant {variant!r} has no position attention, so points show nothing")
    if channels is None:
        channels = 2 if has_channels else 0
    if channels and not has_channels:  # neither 0 nor an empty sequence
        raise ValueError(f"attention_panel: the variant {variant!r} has no channel attention, so no channels to show")
    marked = image
    for number, (x, y) in enumerate(points, 1):
        marked = mark(marked, x, y, str(number))
    _check_truth("attention_panel", truth, image)
    seen = attention_inputs(model, image)
    result = _classes(seen.logits)  # [H, W]
    rows: list[list[Cell]] = [[("image", marked), *_masks(model, [("result", result)], truth)]]
    if seen.query is not None and seen.key is not None and points:
        names = model.classes or [f"class {number}" for number in range(model.num_classes)]
        maps = _sub_attention(model, seen.query, seen.key, points, image.shape[:2])  # [P, H, W]
        rows.append(
            [
                (f"{number} ({x}, {y}): {names[result[y, x]]}", mark(heat_overlay(image, values), x, y))
                for number, ((x, y), values) in enumerate(zip(points, maps, strict=True), 1)
            ]
        )
    if seen.channel_out is not None and channels:
        chosen = _chosen_channels(seen.channel_out, channels)
        maps = _enlarged(model, seen.channel_out[0, chosen], image.shape[:2])
        rows.append([(f"channel {channel}", heat(values)) for channel, values in zip(chosen, maps, strict=True)])
    return panel(rows)


def compare_panel(
    models: Sequence[tuple[str, DANet]], image: np.ndarray, truth: np.ndarray | None = None
) -> np.ndarray:
    """Figures 4 and 5 of the paper for one image: the results of several models, as with and without an attention.

    Args:
        models: a caption and a model for each result; all for the same classes.
        truth: class numbers, uint8 [H, W].
    """
    check_image("compare_panel", image)
    if not models:
        raise ValueError("compare_panel: there are no models")
    (first, reference), *others = models
    for caption, model in others:
        if model.num_classes != reference.num_classes:
            raise ValueError(
                f"compare_panel: the models are for different classes: {first} for {reference.num_classes}, "
                f"{caption} for {model.num_classes}"
            )
    _check_truth("compare_panel", truth, image)
    results = [(caption, _classes(_logits(model, image))) for caption, model in models]
    return panel([[("image", image), *_masks(reference, results, truth)]])


@dataclass(frozen=True)
class ChannelReport:
    """The state of channel attention on one image. Print it."""

    variant: str
    channels: int
    positions: int
    gamma: float
    row_max_mean: float  # of the largest entry in each row of the channel attention map
    row_max_min: float
    row_max_max: float
    one_hot: float  # fraction of rows whose largest entry is above ONE_HOT
    dead: tuple[int, ...]  # channels that are 0 everywhere
    dead_weight: float  # fraction of all attention that they draw
    largest_gram: float  # entry of the Gram matrix
    headroom: float  # FP16_MAX over it

    def __str__(self) -> str:
        sign = "-" if self.variant == "official" else "+"
        which = f" ({_few(self.dead)})" if self.dead else ""
        fp16 = "would fit into fp16" if self.headroom >= 1 else "would overflow in fp16"
        return "\n".join(
            [
                f"channel attention, variant {self.variant} (softmax of {sign}G), {self.channels} channels, "
                f"{self.positions} positions",
                f"gamma               {self.gamma:.4g}",
                f"row maxima          mean {self.row_max_mean:.3f}, from {self.row_max_min:.3f} to "
                f"{self.row_max_max:.3f}; {self.one_hot:.0%} of the rows are above {ONE_HOT}, nearly one-hot",
                f"dead channels       {len(self.dead)} of {self.channels}{which}; they draw {self.dead_weight:.0%} of "
                "the attention",
                f"largest Gram entry  {self.largest_gram:.4g}; headroom {self.headroom:.3g} x: it {fp16} "
                f"({FP16_MAX:.0f}); here it is fp32 in any case",
            ]
        )


def channel_attention_report(model: DANet, image: np.ndarray) -> ChannelReport:
    """How channel attention works on an image: is it one-hot, is it drawn to dead channels, would fp16 overflow?

    Raises:
        ValueError: the model has no channel attention.
    """
    if not hasattr(model.head, "channel_attention"):
        raise ValueError(f"channel_attention_report: the variant {model.head.variant!r} has no channel attention")
    attention = model.head.channel_attention
    x = attention_inputs(model, image).channel_in
    assert x is not None
    rows = channel_attention_map(x, variant=attention.variant)[0]  # [C, C]
    maxima = rows.amax(1)  # [C]
    flat = x[0].flatten(1)  # [C, N]
    dead = (flat == 0).all(1)  # [C]
    largest = flat.double().square().sum(1).max().item()  # no entry of a Gram matrix exceeds its diagonal
    return ChannelReport(
        variant=attention.variant,
        channels=flat.shape[0],
        positions=flat.shape[1],
        gamma=attention.gamma.item(),
        row_max_mean=maxima.mean().item(),
        row_max_min=maxima.min().item(),
        row_max_max=maxima.max().item(),
        one_hot=(maxima > ONE_HOT).double().mean().item(),
        dead=tuple(dead.nonzero().flatten().tolist()),
        dead_weight=rows[:, dead].sum(1).mean().item(),
        largest_gram=largest,
        headroom=FP16_MAX / largest if largest > 0 else math.inf,
    )


@contextmanager
def _watched(module: nn.Module, seen: dict[str, Tensor], name_in: str, name_out: str) -> Iterator[None]:
    def keep(_: nn.Module, given: tuple[Tensor, ...], out: Tensor) -> None:
        seen.update({name_in: given[0], name_out: out})

    handle = module.register_forward_hook(keep)
    try:
        yield
    finally:
        handle.remove()


def _logits(model: DANet, image: np.ndarray) -> Tensor:  # uint8 [H, W, 3] -> [1, classes, H, W]
    like = next(model.parameters())
    with evaluating(model):
        return model(to_tensor(image).to(like)[None])


def _classes(logits: Tensor) -> np.ndarray:  # [1, classes, H, W] -> [H, W]
    return logits[0].argmax(0).cpu().numpy()


def _masks(model: DANet, results: Sequence[tuple[str, np.ndarray]], truth: np.ndarray | None) -> list[Cell]:
    """Class numbers [H, W], coloured, the truth last."""
    palette = model.palette or distinct_palette(model.num_classes)
    masks = [*results, *([] if truth is None else [("ground truth", truth)])]
    return [(caption, colourise(mask, palette)) for caption, mask in masks]


def _sub_attention(
    model: DANet, query: Tensor, key: Tensor, points: Sequence[tuple[int, int]], size: Sequence[int]
) -> np.ndarray:
    """Row of the position attention map of each point, fp32 [P, H, W]."""
    indices = torch.tensor([_position(model, point, query.shape[2:], size) for point in points], device=query.device)
    maps = position_attention_map(query, key, indices)[0]  # [P, h, w]
    return _enlarged(model, maps, size)


def _position(model: DANet, point: tuple[int, int], features: Sequence[int], size: Sequence[int]) -> int:
    """Index of the position [h, w] that the logits at a pixel [H, W] depend on most, by the way they are upsampled."""
    row, column = (
        round(at * (few - 1) / max(1, many - 1)) if model.align_corners else at * few // many
        for at, few, many in zip(reversed(point), features, size, strict=True)
    )
    return row * features[1] + column


def _enlarged(model: DANet, maps: Tensor, size: Sequence[int]) -> np.ndarray:
    """[P, h, w] to fp32 [P, H, W], in the way of the logits."""
    large = F.interpolate(maps[None].float(), tuple(size), mode="bilinear", align_corners=model.align_corners)
    return large[0].cpu().numpy()


def _chosen_channels(x: Tensor, channels: Sequence[int] | int) -> list[int]:
    """Of x [1, C, h, w]."""
    count = x.shape[1]
    if isinstance(channels, int):
        if not 0 <= channels <= count:
            raise ValueError(f"attention_panel: there are {count} channels, got a wish for {channels}")
        return x[0].flatten(1).float().var(1, correction=0).topk(channels).indices.tolist()
    for channel in channels:
        if not 0 <= channel < count:
            raise ValueError(f"attention_panel: there is no channel {channel}, they are numbered 0 to {count - 1}")
    return list(channels)


def _check_truth(name: str, truth: np.ndarray | None, image: np.ndarray) -> None:
    if truth is not None and truth.shape != image.shape[:2]:
        raise ValueError(
            f"{name}: the ground truth {list(truth.shape)} and the image {list(image.shape[:2])} differ in size"
        )


def _few(numbers: Sequence[int]) -> str:
    return ", ".join(map(str, numbers[:10])) + (", ..." if len(numbers) > 10 else "")
