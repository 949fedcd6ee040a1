"""Prediction of photographs: what is written, where, and what a bad image or a bad wish does."""

import importlib

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from danet import create_model
from danet.data import distinct_palette
from danet.data.images import read_image, read_labels, write_image
from danet.data.transforms import to_tensor
from danet.inference import predict_scores
from danet.pictures import legend, overlay
from danet.predict import Report, predict

CLASSES = 5
MODULE = importlib.import_module("danet.predict")


def photograph(seed=0):
    return np.random.default_rng(seed).integers(0, 256, (48, 64, 3), dtype=np.uint8)


@pytest.fixture
def photographs(tmp_path):
    """Two PNG and, in a folder of a folder, one more, and what is no photograph."""
    folder = tmp_path / "photographs"
    for seed, name in enumerate(("a.png", "b.PNG", "sub/deep/c.bmp")):
        write_image(folder / name, photograph(seed))
    (folder / "notes.txt").write_text("no image")
    (folder / ".hidden").mkdir()
    (folder / ".hidden" / "d.png").write_bytes(b"")
    (folder / "._a.png").write_bytes(b"")
    return folder


def tiny(classes=CLASSES):
    torch.manual_seed(0)
    model = create_model("danet_tiny", classes, inter_channels=16).eval()
    nn.init.normal_(model.head.classifier[1].weight)  # else one class is everywhere
    return model


def files(folder):
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


def test_a_folder(photographs, tmp_path):
    model, output, lines = tiny().train(), tmp_path / "new" / "out", []
    report = predict(model, photographs, output, crop=None, progress=lines.append)
    assert files(output) == [
        "a.png",
        "a_overlay.png",
        "b.png",
        "b_overlay.png",
        "legend.png",
        "sub/deep/c.png",
        "sub/deep/c_overlay.png",
    ]
    assert report.written == [output / name for name in ("a.png", "b.png", "sub/deep/c.png")]
    assert report.failures == {}
    assert str(report) == "3 of 3 images predicted"
    assert lines[1] == f"2 of 3: {photographs / 'b.PNG'}"
    assert model.training
    palette = distinct_palette(CLASSES)
    for seed, name in enumerate(("a", "b", "sub/deep/c")):
        image = photograph(seed)
        mask = predict_scores(model, to_tensor(image), crop=None).argmax(0).numpy()
        assert len(np.unique(mask)) > 1
        assert np.array_equal(read_labels(output / f"{name}.png"), mask)
        assert np.array_equal(read_image(output / f"{name}.png"), np.array(palette, np.uint8)[mask])
        assert np.array_equal(read_image(output / f"{name}_overlay.png"), overlay(image, mask, palette))
    names = [f"class {number}" for number in range(CLASSES)]
    assert np.array_equal(read_image(output / "legend.png"), legend(names, palette))


def test_the_models_own_classes_and_colours(photographs, tmp_path):
    model = tiny()
    model.classes = ("road", "sky", "car", "pole", "tree")
    model.palette = [(9 * number + 1, 2, 3) for number in range(CLASSES)]
    predict(model, photographs / "a.png", tmp_path / "out", crop=None)
    mask = read_labels(tmp_path / "out" / "a.png")
    assert np.array_equal(read_image(tmp_path / "out" / "a.png")[..., 0], 9 * mask + 1)
    assert np.array_equal(read_image(tmp_path / "out" / "legend.png"), legend(model.classes, model.palette))


def test_options_are_those_of_predict_scores(photographs, tmp_path):
    options = {"mode": "mmseg", "scales": (0.5, 1.0), "crop": 32, "stride": 16, "flip": True, "base": 64, "batch": 2}
    predict(tiny(), [photographs / "a.png"], tmp_path / "out", **options)
    mask = read_labels(tmp_path / "out" / "a.png")
    assert np.array_equal(mask, predict_scores(tiny(), to_tensor(photograph()), **options).argmax(0).numpy())
    assert not np.array_equal(mask, predict_scores(tiny(), to_tensor(photograph()), crop=None).argmax(0).numpy())


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"mode": "best"}, ValueError, "mode must be one of official, mmseg, probability, got 'best'"),
        ({"crop": 16, "stride": 32}, ValueError, "crop of 16 is smaller than the stride of 32"),
        ({"flips": True}, TypeError, "flips"),
    ],
)
def test_a_wrong_option_is_no_fault_of_the_images(options, error, message, photographs, tmp_path):
    with pytest.raises(error, match=message):
        predict(tiny(), photographs, tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


def test_label_ids(photographs, tmp_path):
    model = tiny(19)
    predict(model, photographs / "a.png", tmp_path / "train", crop=None)
    predict(model, photographs / "a.png", tmp_path / "label", crop=None, label_ids=True)
    mask = read_labels(tmp_path / "train" / "a.png")
    ids = [7, 8, 11, 12, 13, 17, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 31, 32, 33]
    assert np.array_equal(read_labels(tmp_path / "label" / "a.png"), np.array(ids)[mask])
    with Image.open(tmp_path / "label" / "a.png") as image:
        assert image.mode == "L"
    overlays = [read_image(tmp_path / kind / "a_overlay.png") for kind in ("train", "label")]
    assert np.array_equal(*overlays)


def test_an_unreadable_image_in_the_middle(photographs, tmp_path):
    whole = (photographs / "b.PNG").read_bytes()
    (photographs / "b.PNG").write_bytes(whole[: len(whole) // 2])
    (photographs / "c.jpg").write_text("no image")
    output = tmp_path / "out"
    report = predict(tiny(), photographs, output, crop=None)
    assert report.written == [output / "a.png", output / "sub" / "deep" / "c.png"]
    assert list(report.failures) == [str(photographs / "b.PNG"), str(photographs / "c.jpg")]
    assert "is damaged" in report.failures[str(photographs / "b.PNG")]
    assert files(output) == ["a.png", "a_overlay.png", "legend.png", "sub/deep/c.png", "sub/deep/c_overlay.png"]
    first, *failed = str(report).splitlines()
    assert first == "2 of 4 images predicted"
    assert len(failed) == 2
    assert all(line.count(name) == 1 for line, name in zip(failed, report.failures, strict=True))


def test_a_report_names_the_image_of_every_reason():
    assert "failed: x.png: too large" in str(Report([], {"x.png": "too large"}))


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried"), "not enough memory for 64 x 48 pixels"),
        (torch.OutOfMemoryError("CUDA out of memory"), "not enough memory for 64 x 48 pixels"),
        (MemoryError(), "not enough memory for 64 x 48 pixels"),
        (ValueError("the model gives NaN"), "the model gives NaN"),
    ],
    ids=["cpu", "gpu", "python", "nan"],
)
def test_an_image_that_the_model_cannot_do(error, reason, photographs, tmp_path, monkeypatch):
    calls = []

    def scores(model, image, **options):
        calls.append(image)
        if len(calls) == 2:
            raise error
        return torch.zeros(CLASSES, *image.shape[1:])

    monkeypatch.setattr(MODULE, "predict_scores", scores)
    report = predict(tiny(), photographs, tmp_path / "out")
    assert [path.name for path in report.written] == ["a.png", "c.png"]
    assert reason in report.failures[str(photographs / "b.PNG")]


def test_a_mistake_in_the_model_is_not_taken_for_a_bad_image(photographs, tmp_path, monkeypatch):
    def scores(*_, **__):
        raise RuntimeError("sizes of tensors must match")

    monkeypatch.setattr(MODULE, "predict_scores", scores)
    with pytest.raises(RuntimeError, match="sizes of tensors"):
        predict(tiny(), photographs, tmp_path / "out")


def test_nothing_is_written_half(photographs, tmp_path, monkeypatch):
    """A disk that is full in the middle of a file."""
    save = Image.Image.save

    def full(image, path, *rest, **options):
        if "b.partial.png" not in path.name:
            return save(image, path, *rest, **options)
        path.write_bytes(b"the first half of a PN")
        raise OSError("No space left on device")

    monkeypatch.setattr(Image.Image, "save", full)
    with pytest.raises(OSError, match="No space left"):
        predict(tiny(), photographs, tmp_path / "out", crop=None)
    assert files(tmp_path / "out") == ["a.png", "a_overlay.png", "b_overlay.png", "legend.png"]
    for name in files(tmp_path / "out"):
        assert read_image(tmp_path / "out" / name).size


def test_a_second_run_does_not_take_results_for_photographs(photographs):
    for _ in range(2):
        report = predict(tiny(), photographs, photographs / "results", crop=None)
        assert len(report.written) == 3
        assert report.failures == {}


def test_an_image_given_twice_is_done_once(photographs, tmp_path):
    report = predict(tiny(), [photographs, photographs / "a.png"], tmp_path / "out", crop=None)
    assert len(report.written) == 3


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (("x/a.png", "y/a.jpg"), "x/a.png and .*y/a.jpg would both be written to .*out/a.png"),
        (("x/a.png", "x/a_overlay.png"), "x/a.png and .*x/a_overlay.png would both be written to .*out/a_overlay.png"),
        (("x/b.png", "x/legend.jpg"), "the legend and .*x/legend.jpg would both be written to .*out/legend.png"),
        (("out/a.jpg", "out/a.png"), r"the result .*out/a.png would replace an image; choose another output folder"),
    ],
)
def test_results_that_would_be_the_same_file(names, message, tmp_path):
    for name in names:
        write_image(tmp_path / name, photograph())
    before = files(tmp_path)
    with pytest.raises(ValueError, match=message):
        predict(tiny(), [tmp_path / name for name in names], tmp_path / "out", crop=None)
    assert files(tmp_path) == before


def test_what_cannot_be_done_is_said_before_anything_is(photographs, tmp_path):
    output = tmp_path / "out"
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("")
    wishes = [
        ([photographs, "/no/such.png"], output, {}, FileNotFoundError, "no image or folder /no/such.png"),
        (tmp_path / "empty", output, {}, ValueError, "no images in .*empty; expected files that end in .png, .jpg"),
        ([], output, {}, ValueError, "there are no images"),
        (photographs, tmp_path / "file", {}, ValueError, "the output .*file is a file; expected a folder"),
        (photographs, output, {"label_ids": True}, ValueError, "Cityscapes' 19 classes, the model has 5"),
    ]
    for paths, folder, options, error, message in wishes:
        with pytest.raises(error, match=message):
            predict(tiny(), paths, folder, **options)
    with pytest.raises(ValueError, match="at most 255 classes, the model has 256"):
        predict(tiny(256), photographs, output)
    assert not output.exists()
