"""How DANet is trained on each data set: the paper's recipes, and where it is silent ours, marked as such."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import nn


@dataclass(frozen=True)
class Recipe:
    """Everything that decides what a training run computes, apart from model, data and seed."""

    name: str
    learning_rate: float
    batch_size: int  # images a step, over all devices and accumulated parts
    crop_size: tuple[int, int]  # pixels
    base_size: int | None  # pixels of the shorter side at scale 1; None: the image's own
    scale: tuple[float, float]  # least and greatest factor on it
    epochs: int
    steps: int | None = None  # instead of epochs
    optimizer: str = "sgd"  # or "adamw"
    head_rate: float = 10.0  # factor on the learning rate of the head
    momentum: float = 0.9  # of sgd
    weight_decay: float = 1e-4
    power: float = 0.9  # of the poly schedule
    warmup: int = 0  # steps in which the rate rises linearly
    loss_weights: tuple[float, float, float] = (1.0, 1.0, 1.0)  # main, position, channel
    validation_crop: int | None = None  # side of the windows, in pixels; None: images are validated whole
    ours: tuple[str, ...] = ()  # fields that neither the paper nor its authors give

    def __post_init__(self) -> None:
        complaints = [
            f"{field} must be at least 1, got {getattr(self, field)}"
            for field in ("batch_size", "epochs", "steps", "base_size", "validation_crop")
            if getattr(self, field) is not None and getattr(self, field) < 1
        ]
        complaints += [
            f"{field} must not be negative, got {getattr(self, field)}"
            for field in ("learning_rate", "head_rate", "momentum", "weight_decay", "power", "warmup")
            if not getattr(self, field) >= 0
        ]
        if min(self.crop_size) < 1:
            complaints.append(f"crop_size must be at least 1 x 1, got {self.crop_size[0]} x {self.crop_size[1]}")
        if not 0 < self.scale[0] <= self.scale[1]:
            complaints.append(f"scale must be two rising positive numbers, got {self.scale[0]} and {self.scale[1]}")
        if self.optimizer not in ("sgd", "adamw"):
            complaints.append(f'optimizer must be "sgd" or "adamw", got {self.optimizer!r}')
        if complaints:
            raise ValueError(f"recipe {self.name}: {'; '.join(complaints)}")

    def total_steps(self, images: int) -> int:
        """Steps of the whole run on so many images; a last batch that is not full is left out of an epoch."""
        return self.epochs * (images // self.batch_size) if self.steps is None else self.steps

    def rate(self, step: int, total: int) -> float:
        """Learning rate of the backbone in step 0, 1, ... of `total`: poly, set anew in every step."""
        rising = min(1.0, (step + 1) / self.warmup) if self.warmup else 1.0
        return self.learning_rate * rising * (1 - step / total) ** self.power

    def make_optimizer(self, model: nn.Module) -> torch.optim.Optimizer:
        """For all parameters, gammas, biases and BatchNorm's included, as the authors; the head's with its own rate.

        Args:
            model: with a child `head`.
        """
        head = [parameter for name, parameter in model.named_parameters() if name.startswith("head.")]
        rest = [parameter for name, parameter in model.named_parameters() if not name.startswith("head.")]
        groups = [{"params": rest, "factor": 1.0}, {"params": head, "factor": self.head_rate}]
        if self.optimizer == "adamw":
            return torch.optim.AdamW(groups, self.learning_rate, weight_decay=self.weight_decay)
        return torch.optim.SGD(groups, self.learning_rate, momentum=self.momentum, weight_decay=self.weight_decay)

    def set_rate(self, optimizer: torch.optim.Optimizer, step: int, total: int) -> None:
        """Learning rates of an optimizer of make_optimizer for a step."""
        for group in optimizer.param_groups:
            group["lr"] = self.rate(step, total) * group["factor"]

    def __str__(self) -> str:
        lines = [f"recipe {self.name}" + (" (* ours, the paper gives no value)" if self.ours else "")]
        for name, value in self._shown():
            lines.append(f"  {name:<16}{value}{' *' if name in self.ours else ''}")
        return "\n".join(lines)

    def _shown(self) -> Iterator[tuple[str, str]]:
        for field in fields(self):
            value = getattr(self, field.name)
            if field.name not in ("name", "ours") and value is not None:
                yield field.name, " ".join(map(str, value)) if isinstance(value, tuple) else str(value)


# Sources: the paper, section 4.1.2, gives the optimizer, the schedule, momentum and decay, batch sizes, epochs, and the
# crop of Cityscapes; the authors' training command and their answers to questions give the rates (one loss 0.01, three
# losses 0.003), the head's factor, and the sizes that scales apply to.
_CITYSCAPES = Recipe(
    "cityscapes",
    learning_rate=0.003,
    batch_size=8,
    crop_size=(768, 768),
    base_size=1024,
    scale=(0.75, 2.0),
    epochs=240,
    validation_crop=768,
)
_OBJECTS = Recipe(
    "voc",
    learning_rate=0.001,
    batch_size=16,
    crop_size=(480, 480),
    base_size=520,
    scale=(0.75, 2.0),
    epochs=240,
    ours=("learning_rate", "crop_size", "base_size", "validation_crop"),
)
_RECIPES = {
    "cityscapes": _CITYSCAPES,
    # Table 1: no random scale
    "cityscapes-ablation": replace(_CITYSCAPES, name="cityscapes-ablation", scale=(1.0, 1.0), epochs=180),
    "voc": _OBJECTS,
    "context": replace(_OBJECTS, name="context"),
    "coco-stuff": replace(_OBJECTS, name="coco-stuff", epochs=180),
    # In so few steps SGD leaves the gamma of position attention at 0.
    "street-scenes": Recipe(
        "street-scenes",
        learning_rate=2e-3,
        batch_size=8,
        crop_size=(128, 256),
        base_size=None,
        scale=(1.0, 1.0),
        epochs=6,
        optimizer="adamw",
        warmup=20,
        ours=("learning_rate", "batch_size", "crop_size", "base_size", "scale", "epochs", "optimizer", "warmup"),
    ),
}

RECIPES = tuple(_RECIPES)
"""Names that find_recipe takes."""


def find_recipe(name: str, variant: str = "danet", **changes: Any) -> Recipe:
    """A recipe by its name.

    Args:
        name: one of RECIPES.
        variant: of the head. With one loss instead of three, "pam", "cam" and "fcn" learn Cityscapes at 0.01 instead of
            0.003, the authors' rule; the rates that are ours are for all.
        changes: other values for fields. Those that are changed count as ours.

    Raises:
        ValueError: an unknown name, field or value.
    """
    if name not in _RECIPES:
        raise ValueError(f"unknown recipe {name!r}, expected one of {', '.join(RECIPES)}")
    found = _RECIPES[name]
    if variant != "danet" and name.startswith("cityscapes"):
        found = replace(found, learning_rate=0.01)
    known = [field.name for field in fields(Recipe) if field.name not in ("name", "ours")]
    for field in changes:
        if field not in known:
            raise ValueError(f"recipe {name} has no {field!r}; it has {', '.join(known)}")
    return replace(found, **changes, ours=tuple(field for field in known if field in {*found.ours, *changes}))
