"""The steps between a download and a data set that can be read: checks, counts, masks as PNG."""

from __future__ import annotations

from pathlib import Path

from .cityscapes import SUFFIXES
from .coco_stuff import prepare_coco_stuff
from .context import prepare_context
from .folder import ImageFolder
from .voc import VOC, prepare_voc

NAMES = ("cityscapes", "voc", "context", "coco-stuff", "folder")


def prepare(
    name: str, root: Path | str, *, sbd: Path | str | None = None, annotations: Path | str | None = None
) -> list[str]:
    """Make a data set ready.

    Args:
        name: one of NAMES.
        root: where it lies, as for the class of its name.
        sbd: for voc: the folder of SBD, whose masks are written as SegmentationClassAug/*.png with train_aug.txt.
        annotations: for context: the folder with the .mat files of the 459 labels; needed.

    Returns:
        Lines that say what was found, written, and is missing. All numbers are of what is on the disk.

    Raises:
        FileNotFoundError, ValueError, ImportError: it cannot be made ready; what was written so far is whole and stays.
    """
    if name not in NAMES:
        raise ValueError(f"prepare: expected one of {', '.join(NAMES)}, got {name!r}")
    for option, value, needs in (("sbd", sbd, "voc"), ("annotations", annotations, "context")):
        if value is not None and name != needs:
            raise ValueError(f"prepare: {option} is for {needs}, not for {name}")
    if name == "cityscapes":
        return _cityscapes(Path(root))
    if name == "voc":
        return _voc(root) if sbd is None else [*_voc(root), *prepare_voc(root, sbd)]
    if name == "context":
        if annotations is None:
            raise ValueError("prepare: context needs annotations, the folder with the .mat files of the 459 labels")
        return prepare_context(root, annotations)
    if name == "coco-stuff":
        return prepare_coco_stuff(root)
    return _folder(root)


def _cityscapes(root: Path) -> list[str]:
    """Nothing is written: labelIds are read as they are."""
    if not (root / "leftImg8bit").is_dir():
        raise FileNotFoundError(f"there is no folder {root / 'leftImg8bit'}; unpack leftImg8bit_trainvaltest.zip there")
    lines = []
    for split in ("train", "val", "test"):
        images = _names(root / "leftImg8bit" / split, "_leftImg8bit.png")
        line = f"{split}: {len(images)} images of {len({name.split('/')[0] for name in images})} cities"
        for suffix in (suffix for suffixes in SUFFIXES.values() for suffix in suffixes):
            masks = _names(root / "gtFine" / split, f"_gtFine{suffix}") & images
            if masks:
                line += f", {len(masks)} with {suffix[1:-4]}"
        if images and " with " not in line:
            line += f", no masks: unpack gtFine_trainvaltest.zip in {root}"
        lines.append(line)
    return lines


def _names(folder: Path, end: str) -> set[str]:
    """CITY/NAME of the files in the folders of the cities."""
    return {f"{path.parent.name}/{path.name.removesuffix(end)}" for path in folder.glob(f"*/*{end}")}


def _voc(root: Path | str) -> list[str]:
    lines = []
    for split in ("train", "val", "test"):
        try:
            lines.append(f"{split}: {len(VOC(root, split))} images")
        except FileNotFoundError as error:
            lines.append(f"{split}: {error}")
    return lines


def _folder(root: Path | str) -> list[str]:
    dataset = ImageFolder(root)
    masks = sum(item.mask is not None for item in dataset.items)
    return [f"{len(dataset)} images, {masks} with masks", f"classes: {', '.join(dataset.classes) or 'none'}"]
