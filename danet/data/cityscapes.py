"""Cityscapes: streets of European cities, 19 classes (Cordts et al., 2016)."""

from __future__ import annotations

from pathlib import Path

from .files import check_present
from .sample import IGNORE, Colour, Item, SegmentationDataset

CLASSES = (
    "road",
    "sidewalk",
    "building",
    "wall",
    "fence",
    "pole",
    "traffic light",
    "traffic sign",
    "vegetation",
    "terrain",
    "sky",
    "person",
    "rider",
    "car",
    "truck",
    "bus",
    "train",
    "motorcycle",
    "bicycle",
)

PALETTE: tuple[Colour, ...] = (
    (128, 64, 128),
    (244, 35, 232),
    (70, 70, 70),
    (102, 102, 156),
    (190, 153, 153),
    (153, 153, 153),
    (250, 170, 30),
    (220, 220, 0),
    (107, 142, 35),
    (152, 251, 152),
    (70, 130, 180),
    (220, 20, 60),
    (255, 0, 0),
    (0, 0, 142),
    (0, 0, 70),
    (0, 60, 100),
    (0, 80, 100),
    (0, 0, 230),
    (119, 11, 32),
)

LABEL_IDS = (7, 8, 11, 12, 13, 17, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 31, 32, 33)
"""The number of each class in *_labelIds.png, and in what the benchmark's server takes."""

SUFFIXES = {"labelIds": ("_labelIds.png",), "trainIds": ("_labelTrainIds.png", "_trainIds.png")}
"""How names of mask files end, by their kind. The authors of DANet renamed the second."""

# -1, the licence plate, is saved as 255.
_TABLE = dict.fromkeys([*range(34), IGNORE], IGNORE) | {label: number for number, label in enumerate(LABEL_IDS)}


class Cityscapes(SegmentationDataset):
    """root/leftImg8bit/SPLIT/CITY/*_leftImg8bit.png with root/gtFine/SPLIT/CITY/*_gtFine_labelIds.png.

    Args:
        root: the folder with leftImg8bit and gtFine.
        split: "train", "val" or "test". The masks of test are dummies: there mask is None.
        labels: which masks: "labelIds", as they are downloaded; "trainIds", *_labelTrainIds.png or *_trainIds.png,
            as cityscapesScripts makes them; "auto": what is there, labelIds first.

    Raises:
        FileNotFoundError: a folder is not there, or an image has no mask.
        ValueError: `labels` is unknown, or there are no images.
    """

    def __init__(self, root: Path | str, split: str = "train", labels: str = "auto") -> None:
        if labels not in ("auto", *SUFFIXES):
            raise ValueError(f'Cityscapes: labels must be "auto", "labelIds" or "trainIds", got {labels!r}')
        folder = Path(root) / "leftImg8bit" / split
        if not folder.is_dir():
            raise FileNotFoundError(f"there is no folder {folder}; expected leftImg8bit/{split}/CITY/*_leftImg8bit.png")
        images = sorted(folder.glob("*/*_leftImg8bit.png"))
        if not images:
            raise ValueError(f"{folder} holds no CITY/*_leftImg8bit.png")
        masks = Path(root) / "gtFine" / split
        kind, suffix = ("labelIds", None) if split == "test" else find_masks(masks, labels)
        items = []
        for image in images:
            name = image.name.removesuffix("_leftImg8bit.png")
            mask = None if suffix is None else masks / image.parent.name / f"{name}_gtFine{suffix}"
            items.append(Item(name, image, mask))
        super().__init__(check_present(items), CLASSES, PALETTE, _TABLE if kind == "labelIds" else None)


def find_masks(folder: Path, labels: str = "auto") -> tuple[str, str]:
    """The kind of the masks in gtFine/SPLIT, a key of SUFFIXES, and how their names end.

    Raises:
        FileNotFoundError: there are none of that kind.
    """
    kinds = tuple(SUFFIXES) if labels == "auto" else (labels,)
    for kind in kinds:
        for suffix in SUFFIXES[kind]:
            if next(folder.glob(f"*/*_gtFine{suffix}"), None) is not None:
                return kind, suffix
    expected = " or ".join(f"*_gtFine{suffix}" for kind in kinds for suffix in SUFFIXES[kind])
    raise FileNotFoundError(f"there are no masks {folder}/CITY/{expected}")
