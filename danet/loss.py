"""The loss of DANet: one cross entropy for each of the logits that a head gives in training."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .data.sample import IGNORE
from .head import Logits


class Losses(NamedTuple):
    """Scalars in fp32 or wider; None for a branch that the variant lacks."""

    total: Tensor  # what is minimised: the weighted sum of the others
    main: Tensor
    position: Tensor | None
    channel: Tensor | None


def segmentation_loss(
    logits: Logits | Tensor,
    target: Tensor,
    *,
    weights: Sequence[float] = (1.0, 1.0, 1.0),
    pixels: Tensor | float | None = None,
) -> Losses:
    """Mean cross entropy over the pixels that have a class (Fu et al., section 3.4: one for either branch as well).

    Args:
        logits: of a model in training, [B, classes, H, W] each.
        target: class numbers, or IGNORE for pixels that do not count; whole numbers [B, H, W].
        weights: of the losses of the main, the position and the channel logits.
        pixels: what sums are divided by. None: the number of pixels with a class. A batch that is one part of many, on
            several devices or with accumulated gradients, gives the number in all of them: a mean over parts would
            weigh pixels of a part with few labels more.

    Returns:
        The losses; 0 where no pixel has a class.

    Raises:
        ValueError: the shapes do not fit.
    """
    parts = logits if isinstance(logits, Logits) else Logits(logits, None, None)
    size = (parts.main.shape[0], *parts.main.shape[2:])
    if target.shape != size:
        raise ValueError(f"segmentation_loss: the target must have shape {list(size)}, got {list(target.shape)}")
    target = target.long()
    count = (target != IGNORE).sum().clamp(min=1) if pixels is None else pixels

    def mean(part: Tensor | None) -> Tensor | None:
        if part is None:
            return None
        part = part if part.dtype == torch.float64 else part.float()
        return F.cross_entropy(part, target, ignore_index=IGNORE, reduction="sum") / count

    losses = [mean(part) for part in parts]
    total = sum(weight * loss for weight, loss in zip(weights, losses, strict=True) if loss is not None)
    return Losses(total, *losses)  # type: ignore[arg-type]
