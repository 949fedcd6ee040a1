"""Any folder of images, with or without masks."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from pathlib import Path

from .files import first_few
from .images import SUFFIXES, read_labels
from .palette import distinct_palette
from .sample import IGNORE, Colour, Item, SegmentationDataset


class ImageFolder(SegmentationDataset):
    """root/images/** with root/masks/**, paired by the path without the suffix; without the folder masks, None.

    Masks hold class numbers from 0, and 255 for no class: greyscale of 8 or 16 bits, or palette images.

    Args:
        root: the folder with images and masks.
        classes: names of the classes. None: those in root/classes.txt, one line each, "name" or "name r g b"; without
            that file, "class 0", "class 1" ... up to the largest number in the masks of all splits, which takes
            reading them.
        palette: one (r, g, b) per class; None: the colours in classes.txt, else of distinct_palette.
        split: None: all. Else root/SPLIT/images with root/SPLIT/masks, or root/images/SPLIT with root/masks/SPLIT.

    Raises:
        FileNotFoundError: there is no folder of images.
        ValueError: an image has no mask or a mask no image, two files have one name, classes.txt is of another form,
            there are no images, or more than 255 classes.
    """

    def __init__(
        self,
        root: Path | str,
        classes: Sequence[str] | None = None,
        palette: Sequence[Colour] | None = None,
        split: str | None = None,
    ) -> None:
        root = Path(root)
        images_at, masks_at = _folders(root, split)
        images = find_images(images_at)
        if not images:
            raise ValueError(f"{images_at} holds no images ({', '.join(SUFFIXES)})")
        masks: dict[str, Path] | None = find_images(masks_at) if masks_at.is_dir() else None
        if masks is not None:
            _check_pairs(images, masks, images_at, masks_at)
        items = [Item(name, path, None if masks is None else masks[name]) for name, path in images.items()]
        if classes is None and (root / "classes.txt").is_file():
            classes, colours = read_classes(root / "classes.txt")
            palette = palette or colours
        if classes is None:
            every = [] if masks is None else [root / "masks", *sorted(root.glob("*/masks"))]  # so that splits agree
            classes = [f"class {number}" for number in range(_count(every))]
        super().__init__(items, classes, palette or distinct_palette(len(classes)))


def find_images(folder: Path) -> dict[str, Path]:
    """Every image in a folder and those below it, by its path there without the suffix, in order.

    Raises:
        ValueError: two images differ in their suffix alone.
    """
    found: dict[str, Path] = {}
    for path in sorted(folder.rglob("*")):
        if path.suffix.lower() in SUFFIXES and not path.name.startswith(".") and path.is_file():
            name = path.relative_to(folder).with_suffix("").as_posix()
            if name in found:
                raise ValueError(f"{found[name]} and {path} differ in their suffix alone")
            found[name] = path
    return found


def read_classes(path: Path) -> tuple[list[str], list[Colour] | None]:
    """The names in a file with lines "name" or "name r g b", and the colours if it has them.

    Raises:
        ValueError: some lines have a colour and others not, or a colour is none.
    """
    names: list[str] = []
    colours: list[Colour] = []
    for line in filter(None, map(str.strip, path.read_text(encoding="utf-8").splitlines())):
        found = re.fullmatch(r"(.+?)\s+([0-9]+)\s+([0-9]+)\s+([0-9]+)", line)
        names.append(found[1] if found else line)
        if found:
            colours.append((int(found[2]), int(found[3]), int(found[4])))
            if max(colours[-1]) > 255:
                raise ValueError(f"{path}: {line!r} has a colour beyond 255")
    if not names:
        raise ValueError(f"{path} names no classes")
    if colours and len(colours) != len(names):
        raise ValueError(f"{path}: {len(colours)} of {len(names)} classes have a colour; expected all or none")
    return names, colours or None


def _folders(root: Path, split: str | None) -> tuple[Path, Path]:
    """Of the images and of the masks."""
    places = [(root, ".")] if split is None else [(root / split, "."), (root, split)]
    for place, below in places:
        if (place / "images" / below).is_dir():
            return place / "images" / below, place / "masks" / below
    if split is None:
        raise FileNotFoundError(f"there is no folder {root / 'images'}")
    raise FileNotFoundError(f"there is no folder {root / split / 'images'} or {root / 'images' / split}")


def _check_pairs(images: dict[str, Path], masks: dict[str, Path], images_at: Path, masks_at: Path) -> None:
    alone = [path for name, path in images.items() if name not in masks]
    if alone:
        raise ValueError(f"{len(alone)} of {len(images)} images have no mask in {masks_at}: {first_few(alone)}")
    alone = [path for name, path in masks.items() if name not in images]
    if alone:
        raise ValueError(f"{len(alone)} of {len(masks)} masks have no image in {images_at}: {first_few(alone)}")


def _count(folders: Iterable[Path]) -> int:
    """One more than the largest class number in their masks."""
    count = 0
    for path in (path for folder in folders for path in find_images(folder).values()):
        values = read_labels(path)
        largest = int(values.max(initial=0, where=values != IGNORE))
        if largest > IGNORE:
            raise ValueError(f"{path}: the value {largest} is no class number; expected 0 to 254, or {IGNORE}")
        count = max(count, largest + 1)
    return count
