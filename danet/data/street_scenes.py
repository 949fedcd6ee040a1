"""Drawn street scenes in Cityscapes' layout: something to learn from, without a download.

Every scene has a road under a sky, a skyline, poles with signs, cars and people at many scales, in changing light and
with noise. One pair of classes needs the whole scene: the ground beside the road is sidewalk where a large building
stands on the far side of the scene, and terrain where a large tree does. Near by the two look alike, and the far side
is further away than `fcn_tiny` can see (`danet.receptive_field`) in a scene of 128 x 256; attention sees it.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from .cityscapes import CLASSES, LABEL_IDS
from .images import write_image
from .sample import Sample

FAR_PAIR = ("sidewalk", "terrain")
"""The classes that only the far side of the scene tells apart."""

FAR_SIDE = 0.22
"""Share of the width that the large building or tree covers."""

PAIR_FROM = 0.64
"""Where the ground beside the road begins, as a share of the width counted from the far side."""

_COLOURS = {
    "road": (92, 88, 94),
    "sidewalk": (132, 128, 104),
    "terrain": (132, 128, 104),
    "building": (142, 96, 76),
    "vegetation": (58, 98, 46),
    "sky": (150, 184, 220),
    "pole": (58, 58, 62),
    "traffic sign": (206, 180, 40),
    "person": (176, 56, 92),
    "car": (44, 74, 150),
}


class _Canvas:
    """Painted from back to front: pixels, and the class of what is seen in each."""

    def __init__(self, height: int, width: int, random: np.random.Generator) -> None:
        self.random = random
        self.height, self.width = height, width
        self.image = np.zeros((height, width, 3), np.float32)  # [H, W, 3] in 0 to 255
        self.mask = np.zeros((height, width), np.uint8)  # [H, W] class numbers
        # Rows and columns as shares of the height: a scene of any size looks the same.
        self.y = (np.arange(height, dtype=np.float32)[:, None] + 0.5) / height  # [H, 1]
        self.x = (np.arange(width, dtype=np.float32)[None, :] + 0.5) / height  # [1, W]
        self.right = width / height  # of the right edge

    def paint(self, region: np.ndarray, name: str, spread: float = 14) -> None:
        """Fill region [H, W] with the class, in its colour moved at random by `spread` grey levels."""
        region = np.broadcast_to(region, self.mask.shape)
        colour = np.array(_COLOURS[name], np.float32) + self.random.normal(0, spread, 3)
        self.image[region] = colour
        self.mask[region] = CLASSES.index(name)

    def box(self, name: str, left: float, top: float, right: float, bottom: float, spread: float = 14) -> None:
        inside = (self.x >= left) & (self.x < right) & (self.y >= top) & (self.y < bottom)
        self.paint(inside, name, spread)

    def ellipse(self, name: str, x: float, y: float, radius_x: float, radius_y: float, spread: float = 14) -> None:
        self.paint(((self.x - x) / radius_x) ** 2 + ((self.y - y) / radius_y) ** 2 < 1, name, spread)


def render(random: np.random.Generator, height: int = 128, width: int = 256) -> Sample:
    """One scene, as wide as twice its height or wider. The same generator state gives the same scene.

    Raises:
        ValueError: the scene is narrower, so that the two sides would not be far apart, or less than 32 pixels high.
    """
    if height < 32 or width < 2 * height:
        raise ValueError(f"a scene needs a height >= 32 and a width >= 2 * height, got {height} x {width}")
    canvas = _Canvas(height, width, random)
    horizon = random.uniform(0.36, 0.46)
    _sky_and_skyline(canvas, horizon)
    pair = FAR_PAIR[random.integers(2)]
    _ground(canvas, horizon, pair)
    _far_side(canvas, horizon, "building" if pair == "sidewalk" else "vegetation")
    _things(canvas, horizon)
    _light(canvas)
    image, mask = canvas.image.clip(0, 255).astype(np.uint8), canvas.mask
    if random.random() < 0.5:  # the far side is the left one or the right one
        image, mask = np.ascontiguousarray(image[:, ::-1]), np.ascontiguousarray(mask[:, ::-1])
    return Sample(image, mask, "")


def _sky_and_skyline(canvas: _Canvas, horizon: float) -> None:
    random = canvas.random
    canvas.paint(canvas.y < 1, "sky")
    left = canvas.right * FAR_SIDE
    while left < canvas.right:  # independent of the pair: what is near it must tell nothing
        side = left + random.uniform(0.1, 0.4)
        canvas.box("building", left, horizon - random.uniform(0.08, 0.26), side, horizon)
        left = side


def _ground(canvas: _Canvas, horizon: float, pair: str) -> None:
    below = canvas.y >= horizon
    canvas.paint(below, "road")
    # The kerb runs from the horizon down and away from the middle, and never closer to the far side than PAIR_FROM.
    kerb = canvas.right * PAIR_FROM + (canvas.y - horizon) * canvas.random.uniform(0, 0.25)  # [H, 1]
    canvas.paint(below & (canvas.x >= kerb), pair)


def _far_side(canvas: _Canvas, horizon: float, name: str) -> None:
    random = canvas.random
    side = canvas.right * FAR_SIDE * random.uniform(0.75, 1)
    top, bottom = random.uniform(0.02, 0.15), horizon + random.uniform(0.15, 0.3)
    if name == "building":
        canvas.box(name, 0, top, side, bottom)
        dark = (np.sin(canvas.x * 50) > 0.3) & (np.sin(canvas.y * 40) > 0.2)  # windows
        inside = (canvas.mask == CLASSES.index(name)) & (canvas.x < side) & (canvas.y > top)
        canvas.image[dark & inside] *= 0.6
    else:
        canvas.ellipse(name, side / 2, (top + bottom) / 2, side / 2, (bottom - top) / 2)
        canvas.ellipse(name, side / 2, bottom - 0.1, side / 3, 0.12)


def _things(canvas: _Canvas, horizon: float) -> None:
    """Cars, people and poles from far to near: the lower they stand, the larger they are."""
    random = canvas.random
    # The far side stays free of them: something hiding the cue would make the pair unanswerable.
    left = canvas.right * FAR_SIDE
    for foot in np.sort(random.uniform(horizon + 0.06, 0.98, int(random.integers(5, 10)))):
        size = 0.12 + 0.9 * (foot - horizon)  # height of a person standing there
        x = random.uniform(left + size / 2, canvas.right)
        kind = random.choice(("car", "car", "person", "pole"))
        if kind == "car":
            _car(canvas, x, foot, size)
        elif kind == "person":
            _person(canvas, x, foot, size)
        else:
            _pole(canvas, x, foot, size)


def _car(canvas: _Canvas, x: float, foot: float, size: float) -> None:
    half = size * canvas.random.uniform(0.45, 0.65)
    x = max(x, canvas.right * FAR_SIDE + half)
    canvas.box("car", x - half, foot - 0.45 * size, x + half, foot, spread=30)
    canvas.box("car", x - 0.55 * half, foot - 0.75 * size, x + 0.55 * half, foot - 0.45 * size, spread=30)


def _person(canvas: _Canvas, x: float, foot: float, size: float) -> None:
    canvas.box("person", x - 0.17 * size, foot - 0.8 * size, x + 0.17 * size, foot)
    canvas.ellipse("person", x, foot - 0.88 * size, 0.13 * size, 0.14 * size)


def _pole(canvas: _Canvas, x: float, foot: float, size: float) -> None:
    half = max(0.02, 0.05 * size)
    top = foot - size * canvas.random.uniform(1.4, 2)
    canvas.box("pole", x - half, top, x + half, foot)
    if canvas.random.random() < 0.7:
        canvas.box("traffic sign", x - 0.25 * size, top, x + 0.25 * size, top + 0.4 * size)


def _light(canvas: _Canvas) -> None:
    """A brightness and a tint for the scene, a slope across it, and noise."""
    random = canvas.random
    slope = 1 + random.uniform(-0.15, 0.15) * (canvas.x / canvas.right - 0.5) + random.uniform(-0.2, 0.2) * canvas.y
    canvas.image *= (random.uniform(0.75, 1.2) * slope)[:, :, None]
    canvas.image *= random.uniform(0.93, 1.07, 3).astype(np.float32)
    canvas.image += random.normal(0, 9, canvas.image.shape)


def write_street_scenes(
    root: Path | str, train: int = 400, val: int = 100, *, height: int = 128, width: int = 256, seed: int = 0
) -> None:
    """Write train and val scenes under `root` in Cityscapes' layout, with labelIds; `Cityscapes(root)` reads them.

    Scene i of a split depends on the seed, the split and i alone. Existing scenes of the same names are replaced.
    """
    for number, (split, count) in enumerate((("train", train), ("val", val))):
        for index in range(count):
            sample = render(np.random.default_rng((seed, number, index)), height, width)
            stem = f"drawn_{index:06d}_000019"
            ids = np.array(LABEL_IDS, np.uint8)[sample.mask]
            write_image(Path(root, "gtFine", split, "drawn", f"{stem}_gtFine_labelIds.png"), ids)
            write_image(Path(root, "leftImg8bit", split, "drawn", f"{stem}_leftImg8bit.png"), sample.image)
