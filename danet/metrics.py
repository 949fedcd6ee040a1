"""How well predicted masks agree with the truth: confusion matrix, IoU, pixel accuracy; as text and picture."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from .data.sample import IGNORE
from .distributed import sum_over_processes

ABSENT = ("zero", "skip")
"""What a class in neither prediction nor truth adds to a mean IoU."""

_CELL = (38, 22)  # width and height, in pixels
_TEXT, _GAP = 13, 6  # height of the letters; around them
_FULL, _UNKNOWN = (8, 48, 107), (208, 208, 208)  # colours of 100 % and of classes without ground truth


class ConfusionMatrix:
    """Counts of pixels by true and predicted class, over any number of images.

    Args:
        num_classes: classes, without the ignored label; 1 to 255, as IGNORE is 255.

    Attributes:
        counts: int64 [classes, classes] on the CPU; row: truth, column: prediction.
    """

    def __init__(self, num_classes: int) -> None:
        if not 1 <= num_classes <= IGNORE:
            raise ValueError(f"ConfusionMatrix: num_classes must be from 1 to {IGNORE}, got {num_classes}")
        self.counts = torch.zeros(num_classes, num_classes, dtype=torch.int64)

    @property
    def num_classes(self) -> int:
        return self.counts.shape[0]

    def update(self, prediction: np.ndarray | Tensor, target: np.ndarray | Tensor) -> None:
        """Add the pixels of one mask or more.

        Args:
            prediction, target: class numbers, whole numbers of one shape. Pixels whose target is IGNORE count nowhere,
                whatever is predicted there.

        Raises:
            ValueError: the shapes differ, a value is no whole number or no class. Nothing is counted then.
        """
        if tuple(prediction.shape) != tuple(target.shape):
            raise ValueError(
                f"ConfusionMatrix: the prediction {list(prediction.shape)} and the target {list(target.shape)} differ "
                "in shape"
            )
        predicted, truth = _numbers("prediction", prediction), _numbers("target", target)
        truth = truth.to(predicted.device)
        labelled = truth != IGNORE
        predicted, truth = predicted[labelled], truth[labelled]  # [pixels]
        for name, values in (("prediction", predicted), ("target", truth)):
            strange = values[(values < 0) | (values >= self.num_classes)]
            if strange.numel():
                expected = f"0 to {self.num_classes - 1}" + (f" or {IGNORE}" if name == "target" else "")
                raise ValueError(f"ConfusionMatrix: the {name} holds {strange[0].item()}, expected {expected}")
        pairs = torch.bincount(truth * self.num_classes + predicted, minlength=self.num_classes**2)
        self.counts += pairs.view(self.num_classes, self.num_classes).cpu()

    def all_reduce(self) -> None:
        """Add up the counts of all processes of torch.distributed; without one this does nothing. Call it once."""
        self.counts = sum_over_processes(self.counts)

    def iou(self) -> Tensor:
        """Intersection over union of every class, fp64 [classes]; NaN for one in neither prediction nor truth."""
        both = self.counts.diagonal()  # [classes]
        return both.double() / (self.counts.sum(0) + self.counts.sum(1) - both)  # 0 / 0 is NaN

    def mean_iou(self, absent: str = "zero") -> float:
        """Mean of the IoU over classes.

        Args:
            absent: what becomes of a class in neither prediction nor truth: "zero": its IoU is 0, as in the authors'
                code; "skip": the mean is over the others, as in mmsegmentation, and NaN if there are none.
        """
        return self._mean(absent, more=0)

    def mean_iou_with_background_as_zero(self, absent: str = "zero") -> float:
        """The same with one class more, whose IoU is 0: of 59 classes the mean times 59/60.

        So PASCAL Context's 60 classes are reported where 59 were trained and the background is never predicted.
        """
        return self._mean(absent, more=1)

    def pixel_accuracy(self) -> float:
        """Part of the labelled pixels that are predicted right, 0 to 1; NaN without any."""
        return (self.counts.trace().double() / self.counts.sum()).item()

    def normalised(self) -> Tensor:
        """What part of a true class is predicted as which, fp64 [classes, classes]; rows sum to 1.

        Rows of classes without ground truth are NaN.
        """
        return self.counts.double() / self.counts.sum(1, keepdim=True)

    def table(self, classes: Sequence[str], background_counts_as_zero: bool = False) -> str:
        """One line per class with its IoU in percent, then the means and the pixel accuracy.

        Args:
            classes: names of the classes.
            background_counts_as_zero: whether there are lines for mean_iou_with_background_as_zero too.
        """
        self._check_names("table", classes)
        lines = [
            (name, "absent" if iou != iou else f"{100 * iou:.2f}")
            for name, iou in zip(classes, self.iou().tolist(), strict=True)
        ]
        means = [("mIoU", self.mean_iou)]
        if background_counts_as_zero:
            means.append((f"mIoU of {self.num_classes + 1}, background 0", self.mean_iou_with_background_as_zero))
        for name, mean in means:
            lines.append((f"{name} (absent classes count 0)", f"{100 * mean('zero'):.2f}"))
            lines.append((f"{name} (absent classes left out)", f"{100 * mean('skip'):.2f}"))
        lines.append(("pixel accuracy", f"{100 * self.pixel_accuracy():.2f}"))
        left, right = (max(map(len, column)) for column in zip(*lines, strict=True))
        return "\n".join(f"{name:<{left}}  {value:>{right}}" for name, value in lines)

    def _mean(self, absent: str, more: int) -> float:
        if absent not in ABSENT:
            raise ValueError(f'ConfusionMatrix: absent must be "zero" or "skip", got {absent!r}')
        iou = self.iou()
        present = ~iou.isnan()
        classes = self.num_classes if absent == "zero" else int(present.sum())
        return iou[present].sum().item() / (classes + more) if classes else float("nan")

    def _check_names(self, name: str, classes: Sequence[str]) -> None:
        if len(classes) != self.num_classes:
            raise ValueError(f"{name}: expected {self.num_classes} names of classes, got {len(classes)}")


def confusion_picture(matrix: ConfusionMatrix, classes: Sequence[str]) -> np.ndarray:
    """The normalised matrix in colours, uint8 [H, W, 3]: a row per true class, a column per predicted one, in percent.

    White is 0 %, dark blue 100 %. Rows of classes without ground truth are grey, with dashes.
    """
    matrix._check_names("confusion_picture", classes)
    font = ImageFont.load_default(_TEXT)
    boxes = [font.getbbox(text) for text in classes]
    longest = max([2 * _TEXT, *(int(box[2]) + 1 for box in boxes)])
    width, height = _CELL
    edge = longest + 2 * _GAP  # of the names, above and at the left
    title = _TEXT + 2 * _GAP
    size = (max(edge + width * len(classes), 3 * edge) + _GAP, title + edge + height * len(classes) + _GAP)
    picture = Image.new("RGB", size, (255, 255, 255))
    draw = ImageDraw.Draw(picture)
    draw.text((_GAP, title // 2), "percent of the true class (row)", (0, 0, 0), font, anchor="lm")
    top = title + edge
    for number, name in enumerate(classes):
        draw.text((edge - _GAP, top + height * number + height // 2), name, (0, 0, 0), font, anchor="rm")
        upright = Image.new("RGB", (edge, width), (255, 255, 255))
        ImageDraw.Draw(upright).text((_GAP, width // 2), name, (0, 0, 0), font, anchor="lm")
        picture.paste(upright.rotate(90, expand=True), (edge + width * number, title))
    for row, parts in enumerate(matrix.normalised().tolist()):
        for column, part in enumerate(parts):
            x, y = edge + width * column, top + height * row
            unknown = part != part
            colour = _UNKNOWN if unknown else tuple(round(255 + (full - 255) * part) for full in _FULL)
            draw.rectangle((x, y, x + width - 2, y + height - 2), colour)
            ink = (255, 255, 255) if not unknown and part > 0.5 else (0, 0, 0)
            text = "-" if unknown else f"{100 * part:.1f}" if 0 < part < 0.0995 else f"{100 * part:.0f}"
            draw.text((x + width // 2 - 1, y + height // 2 - 1), text, ink, font, anchor="mm")
    return np.array(picture)


def _numbers(name: str, values: np.ndarray | Tensor) -> Tensor:
    """As int64, on the device where they are."""
    whole = values.dtype.kind in "iu" if isinstance(values, np.ndarray) else _is_integer(values.dtype)
    if not whole:
        raise ValueError(f"ConfusionMatrix: the {name} must hold whole numbers, got {values.dtype}")
    return torch.from_numpy(values.astype(np.int64)) if isinstance(values, np.ndarray) else values.to(torch.int64)


def _is_integer(dtype: torch.dtype) -> bool:
    return not (dtype.is_floating_point or dtype.is_complex or dtype == torch.bool)
