"""Every data set in small, in the folder layout of its download."""

import numpy as np
import pytest

from danet.data import context, voc
from danet.data.images import write_image

CITIES = ("aachen_000000_000019", "aachen_000001_000019", "bochum_000000_000313")
LABELLED = {
    "labelIds": [[7, 8, 0], [33, 6, 255]],
    "labelTrainIds": [[0, 1, 255], [18, 255, 255]],
    "trainIds": [[0, 1, 255], [18, 255, 255]],
}
TRAIN_NUMBERS = LABELLED["trainIds"]


def picture(path, shade=0, size=(2, 3)):
    write_image(path, np.full((*size, 3), shade, np.uint8))


def mask(path, values):
    write_image(path, np.array(values, np.uint8))


def mat(path, **fields):
    path.parent.mkdir(parents=True, exist_ok=True)
    pytest.importorskip("scipy.io").savemat(path, fields, do_compression=True)


def names_file(path, names):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{name}\n" for name in names), encoding="utf-8")


def make_cityscapes(root, split="train", kinds=("labelIds",)):
    for number, name in enumerate(CITIES):
        city = name.split("_")[0]
        picture(root / "leftImg8bit" / split / city / f"{name}_leftImg8bit.png", number)
        for kind in kinds:
            mask(root / "gtFine" / split / city / f"{name}_gtFine_{kind}.png", LABELLED[kind])
    return root


# PASCAL VOC and SBD: a mask tells where it comes from, by its first value

OWN, OTHER = 1, 2
TRAIN, VAL = ["2007_000032", "2007_000039"], ["2007_000033", "2008_000123"]
# 2007_000039 is in VOC train too, 2007_000033 and 2008_000123 in VOC val: one in either list of SBD
SBD_TRAIN, SBD_VAL = ["2008_000002", "2007_000039", "2007_000033"], ["2008_000001", "2008_000123"]


def make_voc(root):
    home = root / "VOCdevkit" / "VOC2012"
    lists = home / "ImageSets" / "Segmentation"
    for split, names in (("train", TRAIN), ("val", VAL), ("trainval", TRAIN + VAL), ("test", ["2008_000006"])):
        names_file(lists / f"{split}.txt", names)
        for name in names:
            picture(home / "JPEGImages" / f"{name}.jpg")
            if split != "test":
                write_image(home / "SegmentationClass" / f"{name}.png", np.array([[OWN, 20, 255]] * 2), voc.PALETTE)
    return home


def make_sbd(root):
    for split, names in (("train", SBD_TRAIN), ("val", SBD_VAL)):
        names_file(root / f"{split}.txt", names)
        for name in names:
            picture(root / "img" / f"{name}.jpg")
            labels = np.array([[OTHER, 20, 0]] * 2, np.uint8)
            mat(root / "cls" / f"{name}.mat", GTcls={"Segmentation": labels, "CategoriesPresent": np.array([2, 20])})
    return root


def origins(dataset):
    """By name: whose mask it is."""
    return {dataset[index].name: int(dataset[index].mask[0, 0]) for index in range(len(dataset))}


def make_context(root):
    home = root / "VOCdevkit" / "VOC2010"
    for split, names in (("train", ["2008_000002"]), ("val", ["2008_000003", "2008_000007"])):
        names_file(home / "ImageSets" / "SegmentationContext" / f"{split}.txt", names)
        for name in names:
            picture(home / "JPEGImages" / f"{name}.jpg")
            mask(home / "SegmentationClassContext" / f"{name}.png", [[0, 1, 2], [37, 59, 255]])
    return home


# Where the 59 stand among the 459, as the authors of DANet pick them
CONTEXT_IDS = """
    2 9 18 19 22 23 25 31 33 34 44 45 46 59 65 68 72 80 85 98 104 105 113 115 144 158 159 162 187 189 207 220 232 258
    259 260 284 295 296 308 324 326 347 349 354 355 360 366 368 397 415 416 420 424 427 440 445 454 458
"""


def make_annotations(folder, maps):
    ids = dict(zip(map(int, CONTEXT_IDS.split()), context.CLASSES, strict=True))
    ids[308] = "potted plant"  # spaces do not count
    folder.mkdir(parents=True)
    names_file(folder.parent / "labels.txt", [f"{number}: {ids.get(number, 'other')}" for number in range(1, 460)])
    for name, labels in maps.items():
        mat(folder / f"{name}.mat", LabelMap=np.array(labels, np.uint16))
    return folder


# COCO-Stuff

STUFF = [[0, 1, 11], [13, 92, 182]]
STUFF_NUMBERS = [[255, 0, 10], [11, 80, 170]]


def make_coco_stuff(root, labels=STUFF, **fields):
    for split, names in (("train", ["COCO_train2014_000000000077"]), ("test", ["COCO_train2014_000000000149"])):
        names_file(root / "imageLists" / f"{split}.txt", names)
        for name in names:
            picture(root / "images" / f"{name}.jpg")
            mat(
                root / "annotations" / f"{name}.mat", S=np.array(labels), captions=np.array(["a cat"], object), **fields
            )
    return root


def make_folder(root, split=None):
    for name, suffix in (("a", "jpg"), ("far/b.c", "PNG")):
        below = name if split is None else f"{split}/{name}"
        picture(root / "images" / f"{below}.{suffix}")
        mask(root / "masks" / f"{below}.png", [[0, 1, 255]] * 2)
    (root / "images" / "notes.txt").write_text("no image")
    return root
