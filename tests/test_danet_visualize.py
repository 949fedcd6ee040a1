"""Attention pictures: rows of chosen points and no others, channels, comparisons; the report on channel attention."""

import math

import numpy as np
import pytest
import torch
from torch import nn

import danet.visualize as visualize
from danet import create_model
from danet.data import distinct_palette
from danet.data.transforms import to_tensor
from danet.visualize import attention_inputs, attention_panel, channel_attention_report, compare_panel

HEIGHT, WIDTH, CLASSES = 48, 64, 5
IMAGE = np.random.default_rng(0).integers(0, 256, (HEIGHT, WIDTH, 3), dtype=np.uint8)
TRUTH = np.arange(HEIGHT * WIDTH).reshape(HEIGHT, WIDTH).astype(np.uint8) % CLASSES


def tiny(variant="danet", classes=CLASSES, **options):
    torch.manual_seed(0)
    model = create_model(f"{variant}_tiny", classes, **options).eval()
    for name, parameter in model.named_parameters():
        if name.endswith("gamma"):
            nn.init.constant_(parameter, 0.5)
    return model


def cells(monkeypatch):
    """The rows that are given to panel, which are filled in when it is called."""
    rows, draw = [], visualize.panel
    monkeypatch.setattr(visualize, "panel", lambda given: rows.extend(given) or draw(given))
    return rows


def captions(rows):
    return [[caption for caption, _ in row] for row in rows]


def test_the_inputs_are_those_of_the_attention_modules():
    model = tiny()
    seen = attention_inputs(model, IMAGE)
    with torch.no_grad():
        images = to_tensor(IMAGE)[None]
        features = model.backbone(images)
        x = model.head.position_in(features)
        channel_in = model.head.channel_in(features)
        expected = {
            "logits": model(images),
            "query": model.head.position_attention.query_conv(x),
            "key": model.head.position_attention.key_conv(x),
            "channel_in": channel_in,
            "channel_out": model.head.channel_attention(channel_in),
        }
    for name, tensor in expected.items():
        torch.testing.assert_close(getattr(seen, name), tensor)
    assert not seen.logits.requires_grad


@pytest.mark.parametrize(
    ("variant", "position", "channel"), [("danet", 1, 1), ("pam", 1, 0), ("cam", 0, 1), ("fcn", 0, 0)]
)
def test_a_variant_has_the_inputs_of_its_own_modules(variant, position, channel):
    seen = attention_inputs(tiny(variant), IMAGE)
    assert [part is not None for part in (seen.query, seen.key)] == [bool(position)] * 2
    assert [part is not None for part in (seen.channel_in, seen.channel_out)] == [bool(channel)] * 2


def test_the_model_stays_as_it_was():
    model = tiny().train()
    model.backbone.eval()  # as in training with frozen statistics
    before = {name: module.training for name, module in model.named_modules()}
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    seen = attention_inputs(model, IMAGE)
    assert {name: module.training for name, module in model.named_modules()} == before
    assert all(torch.equal(state[name], tensor) for name, tensor in model.state_dict().items())
    assert not any(module._forward_hooks for module in model.modules())
    torch.testing.assert_close(seen.logits, tiny()(to_tensor(IMAGE)[None]).detach())  # not of training


def test_a_failing_pass_leaves_no_hooks(monkeypatch):
    model = tiny().train()
    monkeypatch.setattr(visualize, "to_tensor", lambda image: torch.zeros(1, 8, 8))
    with pytest.raises(ValueError, match="must have shape"):
        attention_inputs(model, IMAGE)
    assert not any(module._forward_hooks for module in model.modules())
    assert all(module.training for module in model.modules())


@pytest.mark.parametrize("align_corners", [True, False])
def test_a_sub_attention_map_is_the_softmax_of_the_points_row(align_corners, monkeypatch):
    model = tiny(align_corners=align_corners)
    nn.init.normal_(model.head.position_attention.query_conv.weight, std=3)  # else the rows are nearly uniform
    shown = []
    monkeypatch.setattr(visualize, "heat_overlay", lambda image, values: shown.append(values) or image)
    points = [(0, 0), (63, 47), (20, 33)]
    positions = [(0, 0), (5, 7), (4, 2)]  # row, column of the 6 x 8 feature map
    attention_panel(model, IMAGE, points)
    seen = attention_inputs(model, IMAGE)
    query, key = (part[0].flatten(1).double() for part in (seen.query, seen.key))  # [D, N]
    attention = torch.softmax(query.mT @ key, 1)  # [N, N]
    assert len(shown) == len(points)
    for (row, column), values in zip(positions, shown, strict=True):
        expected = attention[row * 8 + column].reshape(1, 1, 6, 8).float()
        assert expected.max() > 2 / 48
        expected = nn.functional.interpolate(expected, (48, 64), mode="bilinear", align_corners=align_corners)[0, 0]
        np.testing.assert_allclose(values, expected.numpy(), rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("align_corners", [True, False])
def test_every_pixel_has_a_position(align_corners):
    """The one whose logits count most at the pixel."""
    model = tiny(align_corners=align_corners)
    one_hot = torch.eye(6).reshape(1, 6, 6, 1).expand(-1, -1, -1, 8)  # by the row of the feature map
    weights = nn.functional.interpolate(one_hot, (48, 64), mode="bilinear", align_corners=align_corners)[0, :, :, 0]
    for y in range(48):
        row = visualize._position(model, (0, y), (6, 8), (48, 64)) // 8
        assert weights[row, y] >= weights[:, y].max() - 1e-5
    assert visualize._position(model, (0, 0), (1, 1), (1, 1)) == 0


def test_only_the_rows_of_the_points_are_asked_for(monkeypatch):
    asked = []

    def rows(query, key, points):
        asked.append(points.tolist())
        return torch.zeros(1, len(points), *key.shape[2:])

    monkeypatch.setattr(visualize, "position_attention_map", rows)
    attention_panel(tiny(), IMAGE, [(0, 0), (8, 0)])
    assert asked == [[0, 1]]


def test_the_panel_has_a_row_for_each_kind(monkeypatch):
    rows, model = cells(monkeypatch), tiny()
    model.classes = ("road", "sky", "car", "pole", "tree")
    model.palette = [(9 * number + 1, 0, 0) for number in range(CLASSES)]
    out = attention_panel(model, IMAGE, [(5, 6), (60, 40)], channels=(3, 7), truth=TRUTH)
    assert out.dtype == np.uint8
    assert out.ndim == 3
    result = model(to_tensor(IMAGE)[None])[0].argmax(0).numpy()
    names = [f"1 (5, 6): {model.classes[result[6, 5]]}", f"2 (60, 40): {model.classes[result[40, 60]]}"]
    assert captions(rows) == [["image", "result", "ground truth"], names, ["channel 3", "channel 7"]]
    marked, shown, truth = (picture for _, picture in rows[0])
    assert marked[6, 5].tolist() == marked[40, 60].tolist() == [255, 255, 255]
    assert np.array_equal(shown[..., 0], 9 * result + 1)
    assert np.array_equal(truth[..., 0], 9 * TRUTH + 1)
    assert [rows[1][number][1][y, x].tolist() for number, (x, y) in enumerate([(5, 6), (60, 40)])] == [[255] * 3] * 2
    channel = attention_inputs(model, IMAGE).channel_out[:, 7:8]  # [1, 1, h, w]
    large = nn.functional.interpolate(channel, (HEIGHT, WIDTH), mode="bilinear", align_corners=True)
    assert np.array_equal(rows[2][1][1], visualize.heat(large[0, 0].numpy()))


def test_the_channels_of_the_largest_variance_are_taken(monkeypatch):
    rows, model = cells(monkeypatch), tiny("cam")
    with torch.no_grad():
        model.head.channel_in[1].weight[[4, 50]] *= torch.tensor([9.0, 30.0])
    attention_panel(model, IMAGE, [])
    assert captions(rows)[1:] == [["channel 50", "channel 4"]]
    rows.clear()
    attention_panel(model, IMAGE, [], channels=1)
    assert captions(rows)[1:] == [["channel 50"]]


@pytest.mark.parametrize("none", [0, (), []], ids=repr)
@pytest.mark.parametrize("variant", ["danet", "pam", "cam", "fcn"])
def test_nothing_asked_for_is_nothing_shown(variant, none, monkeypatch):
    rows = cells(monkeypatch)
    attention_panel(tiny(variant), IMAGE, [], channels=none)
    assert captions(rows) == [["image", "result"]]


def test_a_pam_shows_its_points(monkeypatch):
    rows = cells(monkeypatch)
    attention_panel(tiny("pam"), IMAGE, [(5, 6)])
    assert [len(row) for row in rows] == [2, 1]
    assert captions(rows)[1][0].startswith("1 (5, 6): class ")


@pytest.mark.parametrize(
    ("variant", "points", "options", "message"),
    [
        ("cam", [(1, 1)], {}, "the variant 'cam' has no position attention"),
        ("fcn", [(1, 1)], {}, "the variant 'fcn' has no position attention"),
        ("pam", [], {"channels": (1,)}, "the variant 'pam' has no channel attention"),
        ("fcn", [], {"channels": 3}, "the variant 'fcn' has no channel attention"),
        ("danet", [(1, 1), (64, 3)], {}, r"the point \(64, 3\) lies outside the image, which has 64 x 48 pixels"),
        ("danet", [(1, 1)], {"channels": (64,)}, "there is no channel 64, they are numbered 0 to 63"),
        ("danet", [(1, 1)], {"channels": 65}, "there are 64 channels, got a wish for 65"),
        ("danet", [(1, 1)], {"truth": TRUTH[1:]}, r"ground truth \[47, 64\] and the image \[48, 64\] differ in size"),
        ("danet", [(1, 1)], {"truth": TRUTH + 1}, "holds class 5, the palette has 5 colours"),
    ],
)
def test_what_cannot_be_shown_is_an_error(variant, points, options, message):
    with pytest.raises(ValueError, match=message):
        attention_panel(tiny(variant), IMAGE, points, **options)


def test_models_side_by_side(monkeypatch):
    rows, with_pam, without = cells(monkeypatch), tiny("danet"), tiny("cam")
    nn.init.constant_(without.head.classifier[1].bias, 0)
    without.head.classifier[1].bias.data[3] = 1e3  # class 3 everywhere
    compare_panel([("without PAM", without), ("with PAM", with_pam)], IMAGE, TRUTH)
    assert captions(rows) == [["image", "without PAM", "with PAM", "ground truth"]]
    palette = np.array(distinct_palette(CLASSES))
    assert (rows[0][1][1] == palette[3]).all()
    assert np.array_equal(rows[0][2][1], palette[with_pam(to_tensor(IMAGE)[None])[0].argmax(0).numpy()])
    assert np.array_equal(rows[0][3][1], palette[TRUTH])


def test_models_of_other_classes_are_not_compared():
    with pytest.raises(ValueError, match="for different classes: a for 5, b for 7"):
        compare_panel([("a", tiny()), ("b", tiny(classes=7))], IMAGE)
    with pytest.raises(ValueError, match="there are no models"):
        compare_panel([], IMAGE)


@pytest.mark.parametrize("variant", ["official", "paper"])
def test_the_report_is_that_of_the_map(variant):
    model = tiny(channel_variant=variant)
    report = channel_attention_report(model, IMAGE)
    x = attention_inputs(model, IMAGE).channel_in[0].flatten(1).double()  # [C, N]
    gram = x @ x.mT  # [C, C]
    attention = torch.softmax(-gram if variant == "official" else gram, 1)
    maxima = attention.max(1).values
    assert (report.variant, report.channels, report.positions, report.gamma) == (variant, 64, 48, 0.5)
    got = report.row_max_mean, report.row_max_min, report.row_max_max
    assert got == pytest.approx((maxima.mean().item(), maxima.min().item(), maxima.max().item()), rel=1e-3)
    assert report.one_hot == pytest.approx((maxima > 0.9).double().mean().item())
    assert report.largest_gram == pytest.approx(gram.max().item(), rel=1e-5)
    assert report.headroom == pytest.approx(65504 / gram.max().item(), rel=1e-5)


@pytest.mark.parametrize(("variant", "drawn"), [("official", True), ("paper", False)])
def test_dead_channels_are_found(variant, drawn):
    """Under the authors' sign a dead channel's logit, 0, is the largest of a row; under the paper's the smallest."""
    model = tiny("cam", channel_variant=variant)
    norm = model.head.channel_in[1]
    nn.init.ones_(norm.bias)
    assert channel_attention_report(model, IMAGE).dead == ()
    assert channel_attention_report(model, IMAGE).dead_weight == 0
    with torch.no_grad():
        norm.weight.mul_(5)
        norm.bias.mul_(5)
        for channel in (2, 9, 40):
            norm.weight[channel] = norm.bias[channel] = 0
    report = channel_attention_report(model, IMAGE)
    assert report.dead == (2, 9, 40)
    # The rows of the dead themselves are uniform: 3 of 64 of their attention goes to the dead.
    assert report.dead_weight == pytest.approx((61 * drawn + 3 * 3 / 64) / 64, abs=1e-3)
    text = str(report)
    assert "3 of 64 (2, 9, 40)" in text
    assert f"draw {report.dead_weight:.0%} of the attention" in text


def test_headroom_falls_with_the_square_of_the_scale():
    model = tiny("cam")
    before = channel_attention_report(model, IMAGE)
    factor = 2.0 ** math.ceil(math.log2(before.headroom))
    with torch.no_grad():
        model.head.channel_in[1].weight.mul_(factor)
        model.head.channel_in[1].bias.mul_(factor)
    after = channel_attention_report(model, IMAGE)
    assert before.headroom > 1 > after.headroom
    assert after.headroom == pytest.approx(before.headroom / factor**2)
    assert "would fit into fp16" in str(before)
    assert "would overflow in fp16" in str(after)


def test_headroom_without_any_activity():
    model = tiny("cam")
    nn.init.zeros_(model.head.channel_in[1].weight)
    report = channel_attention_report(model, IMAGE)
    assert report.headroom == math.inf
    assert len(report.dead) == 64
    assert report.dead_weight == pytest.approx(1)
    assert "64 of 64 (0, 1, 2, 3, 4, 5, 6, 7, 8, 9, ...)" in str(report)


@pytest.mark.parametrize("variant", ["pam", "fcn"])
def test_no_report_without_channel_attention(variant):
    with pytest.raises(ValueError, match=f"the variant '{variant}' has no channel attention"):
        channel_attention_report(tiny(variant), IMAGE)
