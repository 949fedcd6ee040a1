"""benchmarks/swap_cityscapes_crops.py: what it compares, and that it gives no ratio where something has changed."""

import importlib.util
import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks import swap_cityscapes_crops as benchmark
from benchmarks.shapes import Crop
from danet import create_model, find_attention, swap

HAS_MATPLOTLIB = importlib.util.find_spec("matplotlib") is not None


def test_a_run(tmp_path, capsys):
    record, picture = tmp_path / "record.json", tmp_path / "picture.png"
    small = ["--backbone", "tiny", "--variants", "danet", "--crops", "64x128"]
    more = ["--plot", str(picture)] if HAS_MATPLOTLIB else []
    assert benchmark.main([*small, "--json", str(record), *more]) == 0
    out = capsys.readouterr().out
    assert "x less memory" in out
    assert "WRONG" not in out
    before, after = json.loads(record.read_text())["cells"]
    assert (before["implementation"], after["implementation"]) == ("eager", "danet:swapped")
    assert 0 < after["largest_difference"] < 1e-4
    assert after["fp64_error"] < 2 * after["fp64_error_before"]
    assert after["op_extra_bytes"] > 0
    assert not after["labels_changed_where_decided"]
    if HAS_MATPLOTLIB:
        assert picture.read_bytes().startswith(b"\x89PNG")


def test_a_change_costs_the_ratio(monkeypatch, capsys):
    monkeypatch.setattr(benchmark, "_pair", lambda options, variant, crop: _cells(crop, difference=1e-3, changed=3))
    monkeypatch.setattr(benchmark, "errors_against_fp64", lambda options, variant: (1e-5, 3e-5))
    monkeypatch.setattr(benchmark, "memory_of_the_operation", lambda options, crop: (200 << 20, 150 << 20))
    assert benchmark.main(["--variants", "pam", "--crops", "64x128"]) == 1
    out = capsys.readouterr().out
    assert "less memory" not in out
    for text in (
        "WRONG: pam: an error of 3.0e-05, before the swap 1.0e-05",
        "WRONG: pam on 64 x 128: logits differ by 1.0e-03, allowed are 1.0e-04",
        "WRONG: pam on 64 x 128: 3 labels changed that were decided",
        "WRONG: position attention at 64 x 128: 200 MiB beyond its inputs, memory_estimate says 150 MiB",
    ):
        assert text in out


def test_channel_attention_is_held_to_the_error_of_the_network_as_it_was():
    changes = {"largest_difference": 1e-3, "fp64_error_before": 2e-4, "labels_changed_where_decided": 0}
    assert benchmark.check("danet", changes) == []
    assert benchmark.check("danet", changes | {"largest_difference": 3e-3}) == [
        "logits differ by 3.0e-03, allowed are 2.0e-03"
    ]
    assert benchmark.check("danet", changes | {"largest_difference": float("nan")})


def _cells(crop, difference, changed):
    cell = {"op": "pam", "crop": [crop.height, crop.width], "peak_bytes": 1, "seconds": 1.0}
    changes = {"largest_difference": difference, "labels_changed": changed, "labels_changed_where_decided": changed}
    return [dict(cell), cell | changes | {"share_undecided": 0.0}]


def test_labels_are_compared_where_the_margin_decides():
    before = np.zeros((3, 1, 4), np.float32)  # [classes, H, W]
    before[0], before[1] = 1.0, [[0.0, 0.95, 0.7, 0.9]]
    after = before.copy()
    after[1, 0, 1] += 0.1  # undecided: a margin of 0.05, and another label
    assert benchmark.compare(before, after)["labels_changed"] == 1
    assert benchmark.compare(before, after)["labels_changed_where_decided"] == 0
    assert benchmark.compare(before, after)["share_undecided"] == pytest.approx(0.5)  # 0.05 and 0.1, at most 0.2
    after[2, 0, 0] = 2.5  # beyond all margins: no difference explains it
    changes = benchmark.compare(before, after)
    assert changes["largest_difference"] == pytest.approx(2.5)
    assert changes["labels_changed"] == 2


def test_the_network_before_the_swap_is_the_authors_and_attention_matters_in_it():
    options = benchmark.parse(["--backbone", "tiny"])
    model = benchmark.network(options, "danet")
    assert [one.class_name for one in find_attention(model)] == ["PAM_Module", "CAM_Module"]
    images = benchmark.picture(options, Crop(64, 128))
    with torch.inference_mode():
        before = model(images)
        assert torch.equal(benchmark.network(options, "danet")(images), before)
        for name in ("position_attention", "channel_attention"):
            getattr(model.head, name).gamma.zero_()
            assert (model(images) - before).abs().max() > 1e-2
            getattr(model.head, name).gamma.fill_(benchmark.GAMMA)
        swap(model, crop=None)
        torch.testing.assert_close(model(images), before, rtol=1e-4, atol=1e-5)


def test_weights_and_photographs_of_ones_own(tmp_path):
    from danet.data.images import write_image

    trained = create_model("danet_tiny", benchmark.CLASSES).eval()
    torch.save(trained.state_dict(), tmp_path / "trained.pth")
    random = np.random.default_rng(0)
    write_image(tmp_path / "photo.png", random.integers(0, 255, (80, 150, 3), dtype=np.uint8))
    more = ["--weights", str(tmp_path / "trained.pth"), "--image", str(tmp_path / "photo.png")]
    options = benchmark.parse(["--backbone", "tiny", *more])
    images = benchmark.picture(options, Crop(64, 128))
    assert images.shape == (1, 3, 64, 128)
    with torch.inference_mode():
        torch.testing.assert_close(benchmark.network(options, "danet")(images), trained(images), rtol=1e-5, atol=1e-6)
    with pytest.raises(ValueError, match="80 x 150 pixels hold no crop of 128 x 128"):
        benchmark.picture(options, Crop(128, 128))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--crops", "512"], "a crop is HEIGHTxWIDTH"),
        (["--repeats", "0"], "--repeats must be at least 1"),
        (["--variants", "fcn"], "invalid choice: 'fcn'"),
        (["--json", "/"], "cannot write /: it is a folder"),
    ],
)
def test_options_that_make_no_sense(arguments, message, capsys):
    with pytest.raises(SystemExit) as stopped:
        benchmark.main(arguments)
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err
