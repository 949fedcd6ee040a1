"""COCO-Stuff 10k: 80 kinds of things and 91 of stuff (Caesar et al., 2018)."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np

from .files import MatMasks, check_present, mat_shapes, read_list, read_mat, read_numbered_names, write_masks
from .images import read_labels
from .palette import voc_palette
from .sample import IGNORE, Item, SegmentationDataset

UNUSED = (12, 26, 29, 30, 45, 66, 68, 69, 71, 83, 91)
"""Labels that no image has."""

LABEL_IDS = tuple(number for number in range(1, 183) if number not in UNUSED)
"""The number of each class in the annotations; 0 is unlabelled."""

_CLASSES = """
    person, bicycle, car, motorcycle, airplane, bus, train, truck, boat, traffic light, fire hydrant, stop sign,
    parking meter, bench, bird, cat, dog, horse, sheep, cow, elephant, bear, zebra, giraffe, backpack, umbrella,
    handbag, tie, suitcase, frisbee, skis, snowboard, sports ball, kite, baseball bat, baseball glove, skateboard,
    surfboard, tennis racket, bottle, wine glass, cup, fork, knife, spoon, bowl, banana, apple, sandwich, orange,
    broccoli, carrot, hot dog, pizza, donut, cake, chair, couch, potted plant, bed, dining table, toilet, tv, laptop,
    mouse, remote, keyboard, cell phone, microwave, oven, toaster, sink, refrigerator, book, clock, vase, scissors,
    teddy bear, hair drier, toothbrush,
    banner, blanket, branch, bridge, building-other, bush, cabinet, cage, cardboard, carpet, ceiling-other,
    ceiling-tile, cloth, clothes, clouds, counter, cupboard, curtain, desk-stuff, dirt, door-stuff, fence,
    floor-marble, floor-other, floor-stone, floor-tile, floor-wood, flower, fog, food-other, fruit, furniture-other,
    grass, gravel, ground-other, hill, house, leaves, light, mat, metal, mirror-stuff, moss, mountain, mud, napkin,
    net, paper, pavement, pillow, plant-other, plastic, platform, playingfield, railing, railroad, river, road, rock,
    roof, rug, salad, sand, sea, shelf, sky-other, skyscraper, snow, solid-other, stairs, stone, straw,
    structural-other, table, tent, textile-other, towel, tree, vegetable, wall-brick, wall-concrete, wall-other,
    wall-panel, wall-stone, wall-tile, wall-wood, water-other, waterdrops, window-blind, window-other, wood
    """

CLASSES = tuple(name.strip() for name in _CLASSES.split(","))

PALETTE = tuple(voc_palette(256))
"""Of the numbers in the annotations."""

_PNGS = "labels"
_NAMES = "cocostuff-labels.txt"


class CocoStuff10k(SegmentationDataset):
    """root/images/*.jpg with root/annotations/*.mat (field S) of version 1.1, by the lists in root/imageLists.

    Reading the .mat files takes scipy; where `prepare("coco-stuff", root)` has written root/labels/*.png, with the same
    numbers, those are read. The names of the classes are those in root/cocostuff-labels.txt, if that is there.

    Args:
        root: the folder with images, annotations and imageLists.
        split: "train", "test" or "all".

    Raises:
        FileNotFoundError: a folder or a list is not there, or an image has no annotation.
        ValueError: cocostuff-labels.txt lacks a label.
    """

    def __init__(self, root: Path | str, split: str = "train") -> None:
        root = Path(root)
        items = check_present([_item(root, name) for name in read_list(root / "imageLists" / f"{split}.txt")])
        table = {0: IGNORE, IGNORE: IGNORE} | {label: number for number, label in enumerate(LABEL_IDS)}
        super().__init__(items, _names(root / _NAMES), [PALETTE[label] for label in LABEL_IDS], table)

    def read_mask(self, path: Path) -> np.ndarray:
        return _read_annotation(path) if path.suffix == ".mat" else read_labels(path)


def prepare_coco_stuff(root: Path | str) -> list[str]:
    """Write root/labels/*.png from every root/annotations/*.mat: the same numbers, read without scipy and faster.

    Returns:
        Lines that say what was done.

    Raises:
        FileNotFoundError: there are no annotations.
        ValueError: one is damaged or holds a number that is no label.
    """
    folder = Path(root) / "annotations"
    items = [Item(path.stem, Path(root, "images", f"{path.stem}.jpg"), path) for path in sorted(folder.glob("*.mat"))]
    if not items:
        raise FileNotFoundError(f"there are no annotations {folder}/*.mat")
    same = {number: number for number in (0, *LABEL_IDS)}
    dataset = MatMasks(items, CLASSES, PALETTE[: len(CLASSES)], same, _read_annotation)
    written = write_masks(dataset, Path(root) / _PNGS, PALETTE)
    return [f"{folder}: {len(items)} annotations", f"{Path(root) / _PNGS}: {written} masks written"]


def _item(root: Path, name: str) -> Item:
    png = root / _PNGS / f"{name}.png"
    return Item(name, root / "images" / f"{name}.jpg", png if png.is_file() else root / "annotations" / f"{name}.mat")


def _read_annotation(path: Path) -> np.ndarray:
    """Labels [H, W]; version 1.0 of the set is refused: there 1 is unlabelled, and every label has another number."""
    if math.prod(mat_shapes(path).get("names", ())) == 172:
        raise ValueError(f"{path} is of version 1.0 (it has 172 names, numbered from 1); expected version 1.1")
    return read_mat(path, "S")


def _names(path: Path) -> tuple[str, ...]:
    if not path.is_file():
        return CLASSES
    names = read_numbered_names(path)
    missing = [label for label in LABEL_IDS if label not in names]
    if missing:
        raise ValueError(f"{path} lacks the label {missing[0]}; expected the names of 1 to 182")
    return tuple(names[label] for label in LABEL_IDS)
