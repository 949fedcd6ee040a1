"""Image files: read safely, labels as the numbers they are, written whole or not at all."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from .._files import whole

MAX_PIXELS = 64_000_000
"""Larger images are refused before they are unpacked: a file of a few hundred KiB can hold gigabytes of one colour."""

SUFFIXES = (".png", ".jpg", ".jpeg", ".tif", ".tiff", ".bmp", ".webp")
"""Of files that are taken for images."""

_FORMATS = ("PNG", "JPEG", "TIFF", "BMP", "WEBP")  # Pillow knows others too, one of which starts a program (EPS)
_HEADER = threading.Lock()  # for Pillow's own limit, of which a process has one


def read_image(path: Path | str, max_pixels: int = MAX_PIXELS) -> np.ndarray:
    """A photograph, uint8 [H, W, 3] in RGB, turned the way its camera was held.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is no image, is damaged, has 16 bits a colour, or more than `max_pixels` pixels.
    """
    return np.array(_open(Path(path), max_pixels, photograph=True))


def read_labels(path: Path | str, max_pixels: int = MAX_PIXELS) -> np.ndarray:
    """The numbers in a label image, uint8 or uint16 [H, W]: of a palette image its indices, not its colours.

    Raises:
        FileNotFoundError, ValueError: as read_image; or the image is one of colours, which are no labels.
    """
    image = _open(Path(path), max_pixels, photograph=False)
    if image.mode.startswith("I"):  # 16 bits, or 32
        numbers = np.array(image)
        if numbers.min(initial=0) < 0 or numbers.max(initial=0) > 65535:
            raise ValueError(f"{path} holds numbers from {numbers.min()} to {numbers.max()}; labels are 0 to 65535")
        return numbers.astype(np.uint16)
    if image.mode in ("L", "P"):
        return np.array(image)
    if image.mode == "1":
        return np.array(image).astype(np.uint8)
    raise ValueError(
        f"{path} is no label image: it holds colours (mode {image.mode}); expected one number per pixel (greyscale of "
        "8 or 16 bits, or a palette)"
    )


def write_image(path: Path | str, image: np.ndarray, palette: Sequence[Sequence[int]] | None = None) -> None:
    """Write uint8 [H, W, 3], or class numbers [H, W], with a palette if one is given, as PNG or by the suffix."""
    picture = Image.fromarray(np.ascontiguousarray(image, dtype=np.uint8))
    if palette is not None:
        colours = np.zeros((256, 3), np.uint8)
        colours[: len(palette)] = palette
        picture.putpalette(colours.tobytes())
    with whole(Path(path)) as partial:
        picture.save(partial)


def _open(path: Path, max_pixels: int, photograph: bool) -> Image.Image:
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {path}")
    try:
        with _header(path) as image:
            if image.width * image.height > max_pixels:
                raise ValueError(
                    f"{path} is refused: {image.width} x {image.height} pixels are more than the {max_pixels:,} that "
                    "are read at most"
                )
            if photograph and image.mode[0] in "IF":
                raise ValueError(f"{path} is no photograph of 8 bits a colour (mode {image.mode}): convert it first")
            image.load()
            return ImageOps.exif_transpose(image).convert("RGB") if photograph else image.copy()
    except UnidentifiedImageError:
        raise ValueError(f"{path} is no image, or none of a known format") from None
    except (OSError, SyntaxError) as error:  # a damaged PNG is a SyntaxError
        raise ValueError(f"{path} is damaged: {error}") from None


def _header(path: Path) -> Image.Image:
    """The image before it is unpacked, of any size: Pillow's warning would come before our error."""
    with _HEADER:
        limit, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
        try:
            return Image.open(path, formats=_FORMATS)
        finally:
            Image.MAX_IMAGE_PIXELS = limit
