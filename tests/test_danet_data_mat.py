"""The data sets whose masks come as MATLAB files, PASCAL Context and COCO-Stuff: files, classes, what may be wrong."""

import sys

import numpy as np
import pytest
from tiny_sets import (
    STUFF,
    STUFF_NUMBERS,
    make_annotations,
    make_coco_stuff,
    make_context,
    mask,
    mat,
    names_file,
    picture,
)

from danet.data import CocoStuff10k, PascalContext, coco_stuff, context, prepare
from danet.data.files import read_mat
from danet.data.images import read_labels


@pytest.mark.parametrize(
    ("mode", "classes", "numbers", "as_zero"),
    [
        ("59", 59, [[255, 0, 1], [36, 58, 255]], False),
        ("60", 60, [[0, 1, 2], [37, 59, 255]], False),
        ("59-reported", 59, [[255, 0, 1], [36, 58, 255]], True),
    ],
)
def test_context(mode, classes, numbers, as_zero, tmp_path):
    home = make_context(tmp_path)
    for root in (tmp_path, home):
        made = PascalContext(root, "val", mode)
        assert made.names == ["2008_000003", "2008_000007"]
        assert made[1].mask.tolist() == numbers
        assert len(made.classes) == classes
        assert made.classes[numbers[1][0]] == "person"
        assert made.classes[-1] == "wood"
        assert made.palette[numbers[0][1]] == (128, 0, 0)  # aeroplane
        assert made.background_counts_as_zero is as_zero
    with pytest.raises(ValueError, match="mode must be one of 59, 60, 59-reported, got '33'"):
        PascalContext(home, "val", "33")


def test_context_refuses_the_459_labels(tmp_path):
    home = make_context(tmp_path)
    mask(home / "SegmentationClassContext" / "2008_000002.png", [[60, 0, 0]] * 2)
    for mode in context.MODES:
        with pytest.raises(ValueError, match=r"2008_000002.png: the value 60 at .* expected 0 to 59, 255$"):
            PascalContext(home, "train", mode)[0]


def test_preparing_context(tmp_path):
    home = tmp_path / "VOC2010"
    names = ["2008_000002", "2008_000003", "2008_000007"]
    for name in names:
        picture(home / "JPEGImages" / f"{name}.jpg")
    names_file(home / "ImageSets" / "Main" / "train.txt", ["2008_000001", *names[:1]])  # the first is not annotated
    names_file(home / "ImageSets" / "Main" / "val.txt", names[1:])
    maps = {name: [[2, 284, 308], [458, 431, 459]] for name in names}
    lines = prepare("context", tmp_path, annotations=make_annotations(tmp_path / "context" / "trainval", maps))
    assert lines[1:] == [
        f"{home / 'SegmentationClassContext'}: 3 masks written",
        f"{home / 'ImageSets' / 'SegmentationContext' / 'train.txt'}: 1 names written",
        f"{home / 'ImageSets' / 'SegmentationContext' / 'val.txt'}: 2 names written",
    ]
    assert read_labels(home / "SegmentationClassContext" / "2008_000007.png").tolist() == [[1, 37, 40], [59, 0, 0]]
    assert PascalContext(tmp_path, "val", "60")[0].mask.tolist() == [[1, 37, 40], [59, 0, 0]]
    assert PascalContext(tmp_path, "train").names == names[:1]
    again = prepare("context", tmp_path, annotations=tmp_path / "context" / "trainval")
    assert again[1].endswith(": 0 masks written")
    assert again[2].endswith("train.txt: was there, 1 names")


def test_context_annotations_that_are_wrong(tmp_path):
    home = tmp_path / "VOC2010"
    picture(home / "JPEGImages" / "a.jpg")
    folder = make_annotations(tmp_path / "context" / "trainval", {"a": [[2, 460]]})
    with pytest.raises(ValueError, match=r"a.mat: the value 460 .* expected 0 to 459$"):
        prepare("context", home, annotations=folder)
    assert not list(home.glob("SegmentationClassContext/*"))
    with pytest.raises(ValueError, match="context needs annotations"):
        prepare("context", home)
    names_file(tmp_path / "context" / "labels.txt", ["1: aeroplane", "2: bag"])
    with pytest.raises(ValueError, match=r"labels.txt has no bed, bedclothes, .*wood; expected the list of the 459"):
        prepare("context", home, annotations=folder)
    (tmp_path / "context" / "labels.txt").write_text("aeroplane\n")
    with pytest.raises(ValueError, match=r"labels.txt, line 1: expected \"NUMBER: NAME\", got 'aeroplane'"):
        prepare("context", home, annotations=folder)
    (tmp_path / "context" / "labels.txt").unlink()
    with pytest.raises(FileNotFoundError, match=r"no labels.txt in"):
        prepare("context", home, annotations=folder)
    with pytest.raises(FileNotFoundError, match=r"no annotations .*nowhere"):
        prepare("context", home, annotations=tmp_path / "nowhere")


@pytest.mark.parametrize("kind", ["uint8", "float64"])
def test_coco_stuff(kind, tmp_path):
    made = CocoStuff10k(make_coco_stuff(tmp_path, np.array(STUFF, kind)), "train")
    assert made.names == ["COCO_train2014_000000000077"]
    assert made[0].mask.tolist() == STUFF_NUMBERS
    assert [made.classes[number] for number in (0, 10, 11, 80, 170)] == [
        "person",
        "fire hydrant",
        "stop sign",
        "banner",
        "wood",
    ]
    assert CocoStuff10k(tmp_path, "test").names == ["COCO_train2014_000000000149"]


def test_the_classes_of_coco_stuff():
    assert len(coco_stuff.CLASSES) == len(coco_stuff.LABEL_IDS) == 171
    assert len(set(coco_stuff.CLASSES)) == 171
    by_label = dict(zip(coco_stuff.LABEL_IDS, coco_stuff.CLASSES, strict=True))
    expected = {10: "traffic light", 27: "backpack", 44: "bottle", 67: "dining table", 70: "toilet", 84: "book"}
    expected |= {90: "toothbrush", 92: "banner", 124: "grass", 149: "road", 169: "tree", 182: "wood"}
    assert {label: by_label[label] for label in expected} == expected
    assert not {*coco_stuff.UNUSED} & {*coco_stuff.LABEL_IDS}


def test_the_names_of_coco_stuff_may_be_given(tmp_path):
    make_coco_stuff(tmp_path)
    names_file(tmp_path / "cocostuff-labels.txt", [f"{number}: n {number}" for number in range(183)])
    assert CocoStuff10k(tmp_path).classes == tuple(f"n {label}" for label in coco_stuff.LABEL_IDS)
    names_file(tmp_path / "cocostuff-labels.txt", [f"{number}: n {number}" for number in range(182)])
    with pytest.raises(ValueError, match=r"cocostuff-labels.txt lacks the label 182"):
        CocoStuff10k(tmp_path)


def test_preparing_coco_stuff(tmp_path):
    make_coco_stuff(tmp_path)
    lines = prepare("coco-stuff", tmp_path)
    assert lines == [f"{tmp_path}/annotations: 2 annotations", f"{tmp_path}/labels: 2 masks written"]
    for path in (tmp_path / "annotations").iterdir():
        path.unlink()
    made = CocoStuff10k(tmp_path, "train")
    assert made.items[0].mask.suffix == ".png"
    assert made[0].mask.tolist() == STUFF_NUMBERS


@pytest.mark.parametrize("label", [12, 91, 183, 300])
def test_labels_that_coco_stuff_lacks(label, tmp_path):
    make_coco_stuff(tmp_path, [[label, 0, 0]] * 2)
    for read in (lambda: CocoStuff10k(tmp_path)[0], lambda: prepare("coco-stuff", tmp_path)):
        with pytest.raises(ValueError, match=rf"COCO_train2014_\d+.mat: the value {label} at row 0, column 0"):
            read()
    assert not (tmp_path / "labels").exists()


def test_version_1_0_of_coco_stuff_is_refused(tmp_path):
    make_coco_stuff(tmp_path, names=np.array([f"n {number}" for number in range(172)], object))
    with pytest.raises(ValueError, match=r"is of version 1.0 .* expected version 1.1"):
        CocoStuff10k(tmp_path)[0]


def test_mat_files_that_are_wrong(tmp_path):
    path = tmp_path / "a.mat"
    with pytest.raises(FileNotFoundError, match=r"no file .*a.mat"):
        read_mat(path, "S")
    labels = np.random.default_rng(0).integers(0, 99, (30, 30)).astype(np.uint8)
    mat(path, S=labels, T={"U": labels}, V=labels + 0.5, W=labels.astype(float) - 50, X=labels[None], Y="text")
    assert np.array_equal(read_mat(path, "S"), labels)
    assert np.array_equal(read_mat(path, "T.U"), labels)
    for field, message in (
        ("Z", "has no Z"),
        ("T.Z", "has no T.Z"),
        ("S.Z", "has no S.Z"),
        ("V", r"V holds \d+\.5; expected whole numbers"),
        ("W", r"W holds -\d+\.0; expected whole numbers"),
        ("X", r"X is uint8 \[1, 30, 30\]; expected numbers \[H, W\]"),
        ("Y", r"Y is .*; expected numbers"),
    ):
        with pytest.raises(ValueError, match=rf"a.mat:? {message}"):
            read_mat(path, field)
    with pytest.raises(ValueError, match=r"a.mat is refused: S \[30, 30\] is more than the 899"):
        read_mat(path, "S", max_pixels=899)
    path.write_bytes(path.read_bytes()[:300])
    with pytest.raises(ValueError, match=r"a.mat is damaged"):
        read_mat(path, "S")
    path.write_text("text")
    with pytest.raises(ValueError, match=r"a.mat is damaged"):
        read_mat(path, "S")


def test_without_scipy_the_error_says_so(tmp_path, monkeypatch):
    mat(tmp_path / "a.mat", S=np.zeros((2, 2)))
    monkeypatch.setitem(sys.modules, "scipy.io", None)
    with pytest.raises(ImportError, match=r"reading .*a.mat needs scipy: pip install scipy"):
        read_mat(tmp_path / "a.mat", "S")
