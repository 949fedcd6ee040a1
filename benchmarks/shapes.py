"""The real sizes of DANet, in one place: features at 1/8 of the crop, 512 channels, queries and keys of 64."""

from __future__ import annotations

import re
from dataclasses import dataclass
from math import isqrt

CHANNELS = 512  # C, value channels
QUERY_CHANNELS = 64  # D = C / 8
STRIDE = 8  # crop pixels per feature position


@dataclass(frozen=True)
class Crop:
    height: int
    width: int

    @property
    def spatial(self) -> tuple[int, int]:
        return self.height // STRIDE, self.width // STRIDE

    @property
    def positions(self) -> int:
        """N, the number of feature positions: queries and keys alike."""
        return self.spatial[0] * self.spatial[1]

    def __str__(self) -> str:
        return f"{self.height} x {self.width}"


# Training and test crops of Cityscapes, the largest a whole image.
CROPS = (Crop(512, 512), Crop(768, 768), Crop(1024, 1024), Crop(1024, 2048))
SPEED_CROP = Crop(768, 768)  # N = 9216, the size that the speed goals are stated for


def parse_crop(text: str) -> Crop:
    """`768x768` (height x width, in pixels) as a `Crop`; `ValueError` in one sentence otherwise."""
    match = re.fullmatch(r"\s*(\d+)\s*x\s*(\d+)\s*", text)
    if match is None:
        raise ValueError(f"a crop is HEIGHTxWIDTH in pixels, such as 768x768; got {text!r}")
    crop = Crop(int(match[1]), int(match[2]))
    if crop.positions == 0 or crop.height % STRIDE or crop.width % STRIDE:
        raise ValueError(f"crop sides must be positive multiples of {STRIDE}; got {crop}")
    return crop


@dataclass(frozen=True, order=True)
class Size:
    """What the GPU race is run at: a batch of feature maps, named by N instead of by a crop."""

    batch: int  # B
    positions: int  # N

    @property
    def crop(self) -> Crop:
        """The most nearly square crop with N feature positions: 96 x 96, 97 x 97, 128 x 256, ... features."""
        height = max(side for side in range(1, isqrt(self.positions) + 1) if self.positions % side == 0)
        return Crop(height * STRIDE, self.positions // height * STRIDE)

    def __str__(self) -> str:
        return f"{self.batch}x{self.positions}"


# 97 x 97 is what a crop of 769 pixels gives: N is odd, so that most rows of N positions start misaligned.
POSITION_SIZES = tuple(Size(*pair) for pair in ((1, 9216), (8, 9216), (1, 9409), (1, 16384), (1, 32768), (1, 131072)))
CHANNEL_SIZES = (Size(1, 9216), Size(8, 9216))


def parse_size(text: str) -> Size:
    """`8x9216` (B x N) as a `Size`; `ValueError` in one sentence otherwise."""
    match = re.fullmatch(r"\s*(\d+)\s*x\s*(\d+)\s*", text)
    if match is None or not all(int(part) for part in match.groups()):
        raise ValueError(f"a size is BATCHxPOSITIONS, such as 8x9216; got {text!r}")
    return Size(int(match[1]), int(match[2]))
