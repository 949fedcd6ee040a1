"""Colours for class numbers."""

from __future__ import annotations

import colorsys

from .sample import Colour


def voc_palette(count: int) -> list[Colour]:
    """The colours of PASCAL VOC, for up to 256 numbers, number 0 black.

    Bits 0, 3 and 6 of a number are the highest three of its red, from the top down; bits 1, 4 and 7 of its green, and
    bits 2 and 5 of its blue. So neighbours differ most.
    """
    palette = []
    for number in range(count):
        channels = [sum((number >> bit & 1) << 7 - bit // 3 for bit in range(first, 8, 3)) for first in range(3)]
        palette.append((channels[0], channels[1], channels[2]))
    return palette


def distinct_palette(count: int) -> list[Colour]:
    """Colours for classes that come without: the hue goes around by the golden ratio, light and dark take turns."""
    palette = []
    for number in range(count):
        saturation, value = ((0.85, 0.95), (0.55, 0.75), (0.95, 0.60), (0.40, 1.00))[number % 4]
        red, green, blue = colorsys.hsv_to_rgb(number * 0.618034 % 1, saturation, value)
        palette.append((round(255 * red), round(255 * green), round(255 * blue)))
    return palette
