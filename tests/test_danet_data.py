"""The data sets, on tiny ones in the layout of their downloads: files, classes, labels, and what may be wrong."""

import json
import os
import pickle
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from tiny_sets import (
    CITIES,
    LABELLED,
    OTHER,
    OWN,
    SBD_TRAIN,
    SBD_VAL,
    TRAIN,
    TRAIN_NUMBERS,
    VAL,
    make_cityscapes,
    make_coco_stuff,
    make_context,
    make_folder,
    make_sbd,
    make_voc,
    mask,
    names_file,
    origins,
    picture,
)

import danet.data
from danet.data import (
    IGNORE,
    VOC,
    Cityscapes,
    CocoStuff10k,
    ImageFolder,
    PascalContext,
    cityscapes,
    open_dataset,
    prepare,
    voc,
)
from danet.data.images import read_image


@pytest.mark.parametrize("kind", LABELLED)
def test_cityscapes(kind, tmp_path):
    made = Cityscapes(make_cityscapes(tmp_path, "val", [kind]), "val")
    assert made.names == list(CITIES)
    assert made.classes == cityscapes.CLASSES
    for number, sample in enumerate(made[index] for index in range(len(made))):
        assert sample.name == CITIES[number]
        assert sample.image[0, 0].tolist() == [number] * 3
        assert sample.mask.tolist() == TRAIN_NUMBERS


def test_the_labels_of_cityscapes():
    assert len(cityscapes.CLASSES) == len(set(cityscapes.PALETTE)) == len(cityscapes.LABEL_IDS) == 19
    at = {name: number for number, name in enumerate(cityscapes.CLASSES)}
    assert [cityscapes.LABEL_IDS[at[name]] for name in ("road", "pole", "sky", "car", "bicycle")] == [7, 17, 23, 26, 33]
    assert cityscapes.PALETTE[at["car"]] == (0, 0, 142)


def test_every_label_id_is_known(tmp_path):
    make_cityscapes(tmp_path)
    path = tmp_path / "gtFine" / "train" / "aachen" / f"{CITIES[0]}_gtFine_labelIds.png"
    picture(tmp_path / "leftImg8bit" / "train" / "aachen" / f"{CITIES[0]}_leftImg8bit.png", size=(1, 35))
    mask(path, [[*range(34), 255]])
    numbers = Cityscapes(tmp_path)[0].mask[0]
    expected = [cityscapes.LABEL_IDS.index(label) if label in cityscapes.LABEL_IDS else IGNORE for label in range(34)]
    assert numbers.tolist() == [*expected, IGNORE]
    assert (numbers != IGNORE).sum() == 19
    for wrong in (34, 77, 254):
        mask(path, [[wrong] * 35])
        with pytest.raises(ValueError, match=rf"{path.name}: the value {wrong} .* expected 0 to 33, 255$"):
            Cityscapes(tmp_path)[0]


def test_auto_prefers_label_ids_and_the_argument_decides(tmp_path):
    make_cityscapes(tmp_path, kinds=("labelIds", "labelTrainIds"))
    assert Cityscapes(tmp_path).items[0].mask.name.endswith("_gtFine_labelIds.png")
    chosen = Cityscapes(tmp_path, labels="trainIds")
    assert chosen.items[0].mask.name.endswith("_gtFine_labelTrainIds.png")
    assert chosen[0].mask.tolist() == TRAIN_NUMBERS
    with pytest.raises(ValueError, match=r"labels must be .* got 'ids'"):
        Cityscapes(tmp_path, labels="ids")


def test_the_dummy_masks_of_the_test_split_are_not_read(tmp_path):
    made = Cityscapes(make_cityscapes(tmp_path, "test"), "test")
    assert [made[index].mask for index in range(3)] == [None] * 3


def test_an_incomplete_cityscapes(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no folder .*leftImg8bit/train; expected"):
        Cityscapes(tmp_path)
    (tmp_path / "leftImg8bit" / "train").mkdir(parents=True)
    with pytest.raises(ValueError, match=r"leftImg8bit/train holds no CITY"):
        Cityscapes(tmp_path)
    make_cityscapes(tmp_path, kinds=())
    with pytest.raises(FileNotFoundError, match=r"no masks .*gtFine/train/CITY/\*_gtFine_labelIds.png or"):
        Cityscapes(tmp_path)
    make_cityscapes(tmp_path)
    (tmp_path / "gtFine" / "train" / "bochum" / f"{CITIES[2]}_gtFine_labelIds.png").unlink()
    with pytest.raises(FileNotFoundError, match=rf"1 of 3 masks are missing: .*{CITIES[2]}_gtFine_labelIds.png"):
        Cityscapes(tmp_path)
    assert prepare("cityscapes", tmp_path)[0] == "train: 3 images of 2 cities, 2 with labelIds"


def test_preparing_cityscapes_says_what_is_there(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"leftImg8bit; unpack leftImg8bit_trainvaltest.zip"):
        prepare("cityscapes", tmp_path)
    make_cityscapes(tmp_path, "train", ("labelIds", "labelTrainIds"))
    make_cityscapes(tmp_path, "val", ())
    mask(tmp_path / "gtFine" / "val" / "ulm" / "ulm_000000_000019_gtFine_labelIds.png", [[0]])  # of no image
    assert prepare("cityscapes", tmp_path) == [
        "train: 3 images of 2 cities, 3 with labelIds, 3 with labelTrainIds",
        f"val: 3 images of 2 cities, no masks: unpack gtFine_trainvaltest.zip in {tmp_path}",
        "test: 0 images of 0 cities",
    ]


def test_voc(tmp_path):
    home = make_voc(tmp_path)
    for root in (tmp_path, tmp_path / "VOCdevkit", home):
        made = VOC(root, "trainval")
        assert made.names == TRAIN + VAL
        assert made.classes == voc.CLASSES
        assert made[0].mask.tolist() == [[OWN, 20, 255]] * 2  # not its colours
    assert VOC(home, "train").names == TRAIN
    assert VOC(home, "val").names == VAL
    assert VOC(home, "test")[0].mask is None


def test_the_colours_of_voc():
    by_name = dict(zip(voc.CLASSES, voc.PALETTE, strict=True))
    assert len(by_name) == 21
    assert by_name["background"] == (0, 0, 0)
    assert by_name["aeroplane"] == (128, 0, 0)
    assert by_name["person"] == (192, 128, 128)
    assert by_name["tvmonitor"] == (0, 64, 128)


def test_train_aug_leaks_nothing_of_val(tmp_path):
    home, sbd = make_voc(tmp_path), make_sbd(tmp_path / "SBD")
    leaked = {*SBD_TRAIN, *SBD_VAL} & {*VAL}
    assert len(leaked) == 2  # else this would show nothing
    made = VOC(home, "train_aug", sbd=sbd)
    assert not {*made.names} & {*VOC(home, "val").names}
    assert {*made.names} == {*SBD_TRAIN, *SBD_VAL, *TRAIN} - {*VAL}
    assert len(set(made.names)) == len(made)
    # VOC's own masks where there are both
    assert origins(made) == {name: OWN if name in TRAIN else OTHER for name in made.names}
    assert {*origins(made).values()} == {OWN, OTHER}


def test_the_split_of_the_authors_leaks_and_says_so(tmp_path):
    home, sbd = make_voc(tmp_path), make_sbd(tmp_path / "SBD")
    with pytest.warns(UserWarning, match="trainval_official holds 2 images of VOC val") as caught:
        made = VOC(home, "trainval_official", sbd=sbd)
    assert caught[0].filename == __file__  # it points at who asked for it
    assert made.names == SBD_TRAIN + SBD_VAL
    assert {*origins(made).values()} == {OTHER}
    with pytest.raises(FileNotFoundError, match="trainval_official needs sbd="):
        VOC(home, "trainval_official")


def test_preparing_voc_writes_what_train_aug_needs(tmp_path):
    home, sbd = make_voc(tmp_path), make_sbd(tmp_path / "SBD")
    before = VOC(home, "train_aug", sbd=sbd)
    with pytest.raises(FileNotFoundError, match=r"train_aug.txt: give sbd="):
        VOC(home, "train_aug")
    lines = prepare("voc", tmp_path, sbd=sbd)
    aug = home / "SegmentationClassAug"
    assert lines == [
        "train: 2 images",
        "val: 2 images",
        "test: 1 images",
        f"{aug}: 2 masks written",
        f"{home / 'ImageSets' / 'Segmentation' / 'train_aug.txt'}: 4 names written",
    ]
    assert sorted(path.name for path in aug.iterdir()) == ["2008_000001.png", "2008_000002.png"]
    for name in ("2008_000001", "2008_000002"):  # that SBD's photographs are in VOC too
        picture(home / "JPEGImages" / f"{name}.jpg")
    after = VOC(home, "train_aug")
    assert origins(after) == origins(before)
    assert all(item.mask.suffix == ".png" for item in after.items)
    assert prepare("voc", tmp_path, sbd=sbd)[3].endswith(": 0 masks written")


@pytest.mark.parametrize("list_name", ["trainaug.txt", "aug.txt"])
def test_lists_of_mmsegmentation_are_taken_and_still_leak_nothing(list_name, tmp_path):
    home = make_voc(tmp_path)
    names_file(home / "ImageSets" / "Segmentation" / list_name, ["2008_000002", *VAL])
    picture(home / "JPEGImages" / "2008_000002.jpg")
    mask(home / "SegmentationClassAug" / "2008_000002.png", [[OTHER, 20, 0]] * 2)
    assert origins(VOC(home, "train_aug")) == {"2007_000032": OWN, "2007_000039": OWN, "2008_000002": OTHER}


def test_an_incomplete_voc(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"there is no .*/JPEGImages or .*/VOC2012/JPEGImages or .*VOCdevkit"):
        VOC(tmp_path, "train")
    home, sbd = make_voc(tmp_path), make_sbd(tmp_path / "SBD")
    with pytest.raises(ValueError, match=r"split must be one of train, val, .* got 'training'"):
        VOC(home, "training")
    (home / "SegmentationClass" / f"{TRAIN[1]}.png").unlink()
    with pytest.raises(FileNotFoundError, match=rf"1 of 2 masks are missing: .*{TRAIN[1]}.png"):
        VOC(home, "train")
    (home / "JPEGImages" / f"{TRAIN[0]}.jpg").unlink()
    with pytest.raises(FileNotFoundError, match=rf"1 of 2 images are missing: .*{TRAIN[0]}.jpg"):
        VOC(home, "train")
    names_file(home / "ImageSets" / "Segmentation" / "val.txt", ["", "  "])
    with pytest.raises(ValueError, match=r"val.txt lists no images"):
        VOC(home, "val")
    (home / "ImageSets" / "Segmentation" / "val.txt").unlink()
    with pytest.raises(FileNotFoundError, match=r"no list .*val.txt; there are test, train, trainval"):
        VOC(home, "val")
    with pytest.raises(FileNotFoundError, match=r"no list .*val.txt"):  # what leaks cannot be told
        VOC(home, "train_aug", sbd=sbd)
    with pytest.raises(FileNotFoundError, match=r"there is no .*nowhere/cls or"):
        VOC(home, "train_aug", sbd=tmp_path / "nowhere")


def test_a_folder(tmp_path):
    made = ImageFolder(make_folder(tmp_path))
    assert made.names == ["a", "far/b.c"]
    assert made.classes == ("class 0", "class 1")
    assert made[1].mask.tolist() == [[0, 1, 255]] * 2
    assert ImageFolder(tmp_path, classes=["x", "y", "z"]).classes == ("x", "y", "z")
    assert prepare("folder", tmp_path) == ["2 images, 2 with masks", "classes: class 0, class 1"]


def test_the_classes_of_a_folder(tmp_path):
    make_folder(tmp_path)
    (tmp_path / "classes.txt").write_text("traffic light 250 170 30\n\n sky  70 130 180 \n")
    made = ImageFolder(tmp_path)
    assert made.classes == ("traffic light", "sky")
    assert made.palette == [(250, 170, 30), (70, 130, 180)]
    assert ImageFolder(tmp_path, palette=[(0, 0, 0), (1, 1, 1)]).palette == [(0, 0, 0), (1, 1, 1)]
    (tmp_path / "classes.txt").write_text("traffic light\nzone 30\n")
    assert ImageFolder(tmp_path).classes == ("traffic light", "zone 30")
    for text, message in (
        ("a 1 2 3\nb\n", "1 of 2 classes have a colour"),
        ("a 1 2 300\n", "'a 1 2 300' has a colour beyond 255"),
        (" \n", "names no classes"),
    ):
        (tmp_path / "classes.txt").write_text(text)
        with pytest.raises(ValueError, match=rf"classes.txt:? {message}"):
            ImageFolder(tmp_path)
    (tmp_path / "classes.txt").write_text("road\n")
    with pytest.raises(ValueError, match=r"a.png: the value 1 at row 0, column 1 .* expected 0, 255$"):
        ImageFolder(tmp_path)[0]


def test_a_folder_without_masks(tmp_path):
    picture(tmp_path / "images" / "a.jpg")
    made = ImageFolder(tmp_path)
    assert made.classes == ()
    assert made[0].mask is None


@pytest.mark.parametrize("outside", [True, False])
def test_the_splits_of_a_folder_have_the_same_classes(outside, tmp_path):
    for split in ("train", "val"):
        make_folder(tmp_path / split if outside else tmp_path, None if outside else split)
    below = tmp_path / "train" / "masks" if outside else tmp_path / "masks" / "train"
    mask(below / "a.png", [[4, 1, 255]] * 2)
    for split in ("train", "val"):
        made = open_dataset("folder", tmp_path, split)
        assert made.names == ["a", "far/b.c"]
        assert len(made.classes) == 5
        assert split in made.items[0].image.parts
    with pytest.raises(FileNotFoundError, match=r"no folder .*/test/images or .*/images/test"):
        open_dataset("folder", tmp_path, "test")


def test_a_folder_whose_files_are_no_pairs(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no folder .*images$"):
        ImageFolder(tmp_path)
    (tmp_path / "images").mkdir()
    with pytest.raises(ValueError, match=r"images holds no images \(.png, .jpg"):
        ImageFolder(tmp_path)
    make_folder(tmp_path)
    for name in "uvwx":
        picture(tmp_path / "images" / f"{name}.png")
    with pytest.raises(ValueError, match=r"4 of 6 images have no mask in .*masks: .*u.png, .*v.png, .*w.png, \.\.\.$"):
        ImageFolder(tmp_path)
    for name in "uvwxz":
        mask(tmp_path / "masks" / f"{name}.png", [[0, 0, 0]] * 2)
    with pytest.raises(ValueError, match=r"1 of 7 masks have no image in .*images: .*z.png$"):
        ImageFolder(tmp_path)
    picture(tmp_path / "images" / "u.jpg")
    with pytest.raises(ValueError, match=r"u.jpg and .*u.png differ in their suffix alone"):
        ImageFolder(tmp_path)


def test_a_folder_of_too_many_classes(tmp_path):
    picture(tmp_path / "images" / "a.png", size=(1, 2))
    (tmp_path / "masks").mkdir()
    Image.fromarray(np.array([[3, 256]], np.uint16)).save(tmp_path / "masks" / "a.png")
    with pytest.raises(ValueError, match=r"a.png: the value 256 is no class number; expected 0 to 254, or 255"):
        ImageFolder(tmp_path)
    with pytest.raises(ValueError, match="ImageFolder: 300 classes are more than the 255"):
        ImageFolder(tmp_path, classes=[f"n {number}" for number in range(300)])


def test_data_sets_by_name(tmp_path):
    make_cityscapes(tmp_path / "c", "val", ["labelIds", "trainIds"])
    make_voc(tmp_path / "v")
    make_context(tmp_path / "x")
    make_coco_stuff(tmp_path / "s")
    make_folder(tmp_path / "f")
    for name, place, split, options, kind in (
        ("cityscapes", "c", "val", {"labels": "trainIds"}, Cityscapes),
        ("street-scenes", "c", "val", {}, Cityscapes),
        ("voc", "v", "val", {}, VOC),
        ("context", "x", None, {"mode": "60"}, PascalContext),
        ("coco-stuff", "s", "test", {}, CocoStuff10k),
        ("folder", "f", None, {"classes": ["a", "b"]}, ImageFolder),
    ):
        made = open_dataset(name, tmp_path / place, split, **options)
        assert type(made) is kind
        assert isinstance(made, danet.data.SegmentationDataset)
        again = pickle.loads(pickle.dumps(made))  # as workers get it
        assert np.array_equal(again[0].mask, made[0].mask)
        assert len(made.palette) == len(made.classes) > made[0].mask[made[0].mask != IGNORE].max()
    assert open_dataset("context", tmp_path / "x").names == ["2008_000002"]
    with pytest.raises(ValueError, match=r"name must be one of cityscapes, voc, .* got 'ade20k'"):
        open_dataset("ade20k", tmp_path)
    with pytest.raises(ValueError, match=r"voc has no option 'mode'; it has sbd$"):
        open_dataset("voc", tmp_path / "v", mode="59")
    with pytest.raises(ValueError, match=r"coco-stuff has no option 'mode'; it has none$"):
        open_dataset("coco-stuff", tmp_path / "s", mode="59")


def test_preparing_asks_for_what_it_needs(tmp_path):
    with pytest.raises(ValueError, match=r"expected one of cityscapes, voc, .* got 'ade20k'"):
        prepare("ade20k", tmp_path)
    with pytest.raises(ValueError, match="sbd is for voc, not for folder"):
        prepare("folder", tmp_path, sbd=tmp_path)
    with pytest.raises(ValueError, match="annotations is for context, not for voc"):
        prepare("voc", tmp_path, annotations=tmp_path)


def test_importing_the_data_sets_does_not_import_scipy():
    script = (
        "import danet.data, json, sys; print(json.dumps([name for name in sys.modules if name.startswith('scipy')]))"
    )
    root = str(Path(danet.data.__file__).parents[2])
    done = subprocess.run(
        [sys.executable, "-c", script],
        env={**os.environ, "PYTHONPATH": root},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == []


def test_the_plain_splits_of_voc_do_not_warn(tmp_path):
    home, sbd = make_voc(tmp_path), make_sbd(tmp_path / "SBD")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for split in ("train", "val", "trainval", "test", "train_aug"):
            made = VOC(home, split, sbd=sbd)
            assert read_image(made.items[0].image).shape == (2, 3, 3)
