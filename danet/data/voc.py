"""PASCAL VOC 2012, 21 classes, and the 9,000 more masks of the Semantic Boundaries Dataset (SBD) for its images."""

from __future__ import annotations

import warnings
from pathlib import Path

import numpy as np

from .files import check_present, find_root, read_list, read_mat, write_list, write_masks
from .images import read_labels
from .palette import voc_palette
from .sample import Item, SegmentationDataset

CLASSES = (
    "background",
    "aeroplane",
    "bicycle",
    "bird",
    "boat",
    "bottle",
    "bus",
    "car",
    "cat",
    "chair",
    "cow",
    "diningtable",
    "dog",
    "horse",
    "motorbike",
    "person",
    "pottedplant",
    "sheep",
    "sofa",
    "train",
    "tvmonitor",
)

PALETTE = tuple(voc_palette(len(CLASSES)))

SPLITS = ("train", "val", "trainval", "test", "train_aug", "trainval_official")

_LISTS = Path("ImageSets", "Segmentation")
_AUG = "SegmentationClassAug"  # SBD's masks as PNG
_AUG_LISTS = ("train_aug.txt", "trainaug.txt", "aug.txt")  # ours, and two of mmsegmentation


class VOC(SegmentationDataset):
    """VOC2012/JPEGImages/*.jpg with SegmentationClass/*.png, by the lists in ImageSets/Segmentation.

    Args:
        root: the folder VOC2012, or one of the two above it.
        split: one of SPLITS. "train", "val" and "trainval" are VOC's own; "test" has no masks.
            "train_aug": the images of SBD's two lists and of VOC train, without those of VOC val; VOC's own masks
            where there are both. Without `sbd` it takes the list and the PNGs in SegmentationClassAug, which
            `prepare("voc", ...)` or mmsegmentation wrote.
            "trainval_official": SBD's two lists one after the other with SBD's masks, as the authors of DANet train.
            It holds images of VOC val, so a score on val means nothing after it; it warns of that.
        sbd: the folder of SBD with img, cls, train.txt and val.txt, or one of the two above it. To read its .mat
            files takes scipy.

    Raises:
        FileNotFoundError: a folder or a list is not there, or an image has no mask.
        ValueError: `split` is unknown.
    """

    def __init__(self, root: Path | str, split: str = "train", sbd: Path | str | None = None) -> None:
        if split not in SPLITS:
            raise ValueError(f"VOC: split must be one of {', '.join(SPLITS)}, got {split!r}")
        self.root = find_root(root, ("VOC2012", "VOCdevkit/VOC2012"), "JPEGImages")
        self.sbd = None if sbd is None else find_root(sbd, ("dataset", "benchmark_RELEASE/dataset"), "cls")
        if split == "train_aug":
            items = [self._item(name) for name in self._train_aug()]
        elif split == "trainval_official":
            items = [self._item(name, own=False) for name in self._official()]
        else:
            names = read_list(self.root / _LISTS / f"{split}.txt")
            masks = None if split == "test" else self.root / "SegmentationClass"
            items = [Item(name, self._image(name), masks and masks / f"{name}.png") for name in names]
        super().__init__(check_present(items), CLASSES, PALETTE)

    def read_mask(self, path: Path) -> np.ndarray:
        return read_mat(path, "GTcls.Segmentation") if path.suffix == ".mat" else read_labels(path)

    def _train_aug(self) -> list[str]:
        lists = self.root / _LISTS
        if self.sbd is not None:
            names = {*read_list(self.sbd / "train.txt"), *read_list(self.sbd / "val.txt")}
        else:
            there = [lists / name for name in _AUG_LISTS if (lists / name).is_file()]
            if not there:
                raise FileNotFoundError(
                    f"there is no {lists / _AUG_LISTS[0]}: give sbd=, the folder of SBD, or call prepare('voc', ...)"
                )
            names = set(read_list(there[0]))
        return sorted((names | {*read_list(lists / "train.txt")}) - {*read_list(lists / "val.txt")})

    def _official(self) -> list[str]:
        if self.sbd is None:
            raise FileNotFoundError(
                "VOC: trainval_official needs sbd=, the folder of SBD with cls, train.txt and val.txt"
            )
        names = read_list(self.sbd / "train.txt") + read_list(self.sbd / "val.txt")
        val = self.root / _LISTS / "val.txt"
        leaked = len({*names} & {*read_list(val)}) if val.is_file() else "some"
        warnings.warn(
            f"trainval_official holds {leaked} images of VOC val: a score on val means nothing after training on it",
            stacklevel=3,
        )
        return names

    def _item(self, name: str, own: bool = True) -> Item:
        """With the mask of VOC itself, if `own`, else of SBD."""
        masks = [self.root / "SegmentationClass" / f"{name}.png"] if own else []
        masks.append(self.root / _AUG / f"{name}.png")
        if self.sbd is not None:
            masks.append(self.sbd / "cls" / f"{name}.mat")
        return Item(name, self._image(name), next((mask for mask in masks if mask.is_file()), masks[-1]))

    def _image(self, name: str) -> Path:
        image = self.root / "JPEGImages" / f"{name}.jpg"
        if self.sbd is not None and not image.is_file() and (self.sbd / "img" / image.name).is_file():
            return self.sbd / "img" / image.name
        return image


def prepare_voc(root: Path | str, sbd: Path | str) -> list[str]:
    """Write the masks of SBD that train_aug needs to SegmentationClassAug, and the list train_aug.txt.

    After it, VOC(root, "train_aug") needs neither SBD nor scipy: VOC 2012 has SBD's photographs. Returns lines that say
    what was done.
    """
    dataset = VOC(root, "train_aug", sbd=sbd)
    folder, target = dataset.root / _AUG, dataset.root / _LISTS / _AUG_LISTS[0]
    written = write_masks(dataset, folder, PALETTE)
    write_list(target, dataset.names)
    return [f"{folder}: {written} masks written", f"{target}: {len(dataset)} names written"]
