"""Pictures of masks and maps: colours, overlays, heat maps, marked points, legends and panels.

Pure functions of uint8 arrays [H, W, 3] in RGB. Nothing here writes a file.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from .data.sample import IGNORE

Cell = tuple[str, np.ndarray]
"""A caption and the picture below it, uint8 [H, W, 3]."""

_HEAT = ((0, 0, 0), (70, 16, 118), (170, 35, 110), (236, 97, 48), (251, 179, 22), (252, 252, 190))
"""From nothing to the maximum; the lightness rises evenly, so that the order shows in grey too."""

_TEXT = 14  # height of the letters, in pixels
_GAP = 6  # around cells and letters
_LEGEND_ROWS = 24  # of a column
_SMALLEST, _LARGEST = 128, 512  # heights of pictures in a panel, unless one is asked for


def colourise(mask: np.ndarray, palette: Sequence[Sequence[int]]) -> np.ndarray:
    """The colours of class numbers [H, W], uint8 [H, W, 3]; IGNORE is black.

    Raises:
        ValueError: not whole numbers of that shape, or a class without a colour.
    """
    if mask.ndim != 2 or mask.dtype.kind not in "iu":
        raise ValueError(f"colourise: expected whole numbers [H, W], got {mask.dtype} {list(mask.shape)}")
    strange = mask[(mask != IGNORE) & ((mask < 0) | (mask >= len(palette)))]
    if strange.size:
        raise ValueError(f"colourise: the mask holds class {strange[0]}, the palette has {len(palette)} colours")
    colours = np.zeros((max(IGNORE + 1, len(palette)), 3), np.uint8)
    colours[: len(palette)] = palette
    colours[IGNORE] = 0
    return colours[mask]


def overlay(image: np.ndarray, mask: np.ndarray, palette: Sequence[Sequence[int]], opacity: float = 0.5) -> np.ndarray:
    """The image under the colours of its mask [H, W]; where that is IGNORE, the image alone.

    Raises:
        ValueError: sizes differ, a class without a colour, or an opacity outside 0 to 1.
    """
    check_image("overlay", image)
    if mask.shape != image.shape[:2]:
        raise ValueError(f"overlay: the mask {list(mask.shape)} and the image {list(image.shape[:2])} differ in size")
    return np.where((mask == IGNORE)[..., None], image, _blend("overlay", image, colourise(mask, palette), opacity))


def heat(values: np.ndarray, size: tuple[int, int] | None = None) -> np.ndarray:
    """A map [H, W] in colours, uint8 [H, W, 3]: 0 and less is black, the maximum pale yellow.

    A map without a positive value is black all over.

    Args:
        size: (height, width) to which it is scaled, bilinear; None: as it is.

    Raises:
        ValueError: not such a map, or one with NaN or infinity.
    """
    values = np.asarray(values, np.float32)
    if values.ndim != 2 or not values.size:
        raise ValueError(f"heat: expected a map [H, W], got the shape {list(values.shape)}")
    if not np.isfinite(values).all():
        raise ValueError("heat: the map holds NaN or infinity")
    if size is not None and size != values.shape:
        scaled = Image.fromarray(values).resize((size[1], size[0]), Image.Resampling.BILINEAR)
        values = np.asarray(scaled)
    maximum = values.max()
    level = np.clip(values / maximum, 0, 1) if maximum > 0 else np.zeros_like(values)  # [H, W]
    anchors = np.linspace(0, 1, len(_HEAT))
    colours = [np.interp(level, anchors, part) for part in np.array(_HEAT).T]  # three of [H, W]
    return np.stack(colours, axis=2).round().astype(np.uint8)


def heat_overlay(image: np.ndarray, values: np.ndarray, opacity: float = 0.65) -> np.ndarray:
    """The image in grey under the heat of a map [h, w], which is scaled to its size."""
    check_image("heat_overlay", image)
    grey = np.asarray(Image.fromarray(image).convert("L").convert("RGB"))  # [H, W, 3]
    return _blend("heat_overlay", grey, heat(values, (image.shape[0], image.shape[1])), opacity)


def mark(image: np.ndarray, x: int, y: int, label: str = "") -> np.ndarray:
    """The image with a cross at column x, row y: white with a black edge, so that it shows on any ground.

    Args:
        label: letters beside the cross.

    Raises:
        ValueError: the point lies outside the image.
    """
    check_image("mark", image)
    height, width = image.shape[:2]
    if not (0 <= x < width and 0 <= y < height):
        raise ValueError(f"the point ({x}, {y}) lies outside the image, which has {width} x {height} pixels")
    picture = Image.fromarray(image)
    draw = ImageDraw.Draw(picture)
    arm = max(3, min(height, width) // 32)
    half = max(0, arm // 8)  # of the line's width, less the middle
    for edge, colour in ((max(1, half), (0, 0, 0)), (0, (255, 255, 255))):
        for across, down in ((arm, half), (half, arm)):
            draw.rectangle((x - across - edge, y - down - edge, x + across + edge, y + down + edge), fill=colour)
    if label:
        letters = max(_TEXT, 2 * arm)
        _, top, right, bottom = _box(label, letters)
        edge = 2  # around the letters
        column = x + arm + 3 if x + arm + 3 + right + edge <= width else x - arm - 3 - right
        row = min(max(y - arm - (bottom - top), edge - top), height - edge - bottom)
        draw.text((column, row), label, (255, 255, 255), _font(letters), stroke_width=edge, stroke_fill=(0, 0, 0))
    return np.array(picture)


def legend(classes: Sequence[str], palette: Sequence[Sequence[int]]) -> np.ndarray:
    """Names of classes beside their colours, uint8 [h, w, 3]."""
    if not classes or len(classes) != len(palette):
        raise ValueError(f"legend: {len(classes)} classes need as many colours, got {len(palette)}")
    line, swatch = _TEXT + _GAP, 2 * _TEXT
    rows = min(len(classes), _LEGEND_ROWS)
    columns = -(-len(classes) // rows)
    column = swatch + 3 * _GAP + max(_box(name, _TEXT)[2] for name in classes)
    picture = Image.new("RGB", (columns * column + _GAP, rows * line + _GAP), (255, 255, 255))
    draw = ImageDraw.Draw(picture)
    for number, (name, colour) in enumerate(zip(classes, palette, strict=True)):
        x, y = number // rows * column + _GAP, number % rows * line + _GAP
        draw.rectangle((x, y, x + swatch - 1, y + _TEXT - 1), tuple(colour), (0, 0, 0))
        draw.text((x + swatch + _GAP, y + _TEXT // 2), name, (0, 0, 0), _font(_TEXT), anchor="lm")
    return np.array(picture)


def panel(rows: Sequence[Sequence[Cell]], height: int | None = None) -> np.ndarray:
    """Rows of pictures with a caption above each, on white, uint8 [H, W, 3].

    Args:
        rows: in every row, (caption, picture uint8 [h, w, 3]) from left to right; empty rows are left out.
        height: that every picture is scaled to; None: the tallest one's, within 128 and 512.
    """
    rows = [row for row in rows if row]
    if not rows:
        raise ValueError("panel: there are no pictures")
    for row in rows:
        for _, picture in row:
            check_image("panel", picture)
    if height is None:
        height = min(max(_SMALLEST, *(picture.shape[0] for row in rows for _, picture in row)), _LARGEST)
    scaled = [[(caption, _scaled(picture, height)) for caption, picture in row] for row in rows]
    widths = [0] * max(map(len, rows))  # of the columns
    for cells in scaled:
        for column, (caption, drawn) in enumerate(cells):
            widths[column] = max(widths[column], drawn.width, _box(caption, _TEXT)[2])
    line = _TEXT + 2 * _GAP
    size = sum(widths) + _GAP * (len(widths) + 1), len(scaled) * (line + height) + _GAP
    sheet = Image.new("RGB", size, (255, 255, 255))
    draw = ImageDraw.Draw(sheet)
    for number, cells in enumerate(scaled):
        x, y = _GAP, number * (line + height)
        for (caption, drawn), width in zip(cells, widths, strict=False):
            draw.text((x, y + line // 2), caption, (0, 0, 0), _font(_TEXT), anchor="lm")
            sheet.paste(drawn, (x, y + line))
            x += width + _GAP
    return np.array(sheet)


def check_image(name: str, image: np.ndarray) -> None:
    """Raise ValueError, in the name of a function, unless `image` is uint8 [H, W, 3] with at least one pixel."""
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3 or not image.size:
        raise ValueError(f"{name}: expected a picture, uint8 [H, W, 3], got {image.dtype} {list(image.shape)}")


def _blend(name: str, below: np.ndarray, above: np.ndarray, opacity: float) -> np.ndarray:
    """uint8 [H, W, 3] each."""
    if not 0 <= opacity <= 1:
        raise ValueError(f"{name}: opacity must be from 0 to 1, got {opacity}")
    mixed = below * np.float32(1 - opacity) + above * np.float32(opacity)  # fp32 [H, W, 3]
    return mixed.round().astype(np.uint8)


def _scaled(picture: np.ndarray, height: int) -> Image.Image:
    width = max(1, round(picture.shape[1] * height / picture.shape[0]))
    way = Image.Resampling.BOX if height < picture.shape[0] else Image.Resampling.NEAREST
    return Image.fromarray(picture).resize((width, height), way)


def _box(text: str, letters: int) -> tuple[int, int, int, int]:
    """(left, top, right, bottom) of what the text covers, from the point where it is drawn; whole pixels."""
    left, top, right, bottom = _font(letters).getbbox(text)
    return int(left), int(top), -int(-right // 1), -int(-bottom // 1)


@lru_cache
def _font(letters: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    """The one that comes with pillow."""
    return ImageFont.load_default(letters)
