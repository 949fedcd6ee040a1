"""Pictures: colours at chosen pixels, marks that show on any ground, legends and panels."""

import numpy as np
import pytest

from danet.data import IGNORE, distinct_palette
from danet.pictures import colourise, heat, heat_overlay, legend, mark, overlay, panel

PALETTE = [(10, 20, 30), (200, 100, 0), (0, 255, 0)]
MASK = np.array([[0, 1, 2], [IGNORE, 1, 0]], np.uint8)


def noise(height=48, width=64):
    return np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)


def lightness(colours):
    """CIE L* of uint8 [..., 3]."""
    linear = np.where(colours <= 0.04045 * 255, colours / 255 / 12.92, ((colours / 255 + 0.055) / 1.055) ** 2.4)
    luminance = linear @ [0.2126, 0.7152, 0.0722]
    return np.where(luminance > 0.008856, 116 * np.cbrt(luminance) - 16, 903.3 * luminance)


@pytest.mark.parametrize("dtype", [np.uint8, np.int64])
def test_colourise(dtype):
    out = colourise(MASK.astype(dtype), PALETTE)
    assert out.dtype == np.uint8
    expected = [[PALETTE[0], PALETTE[1], PALETTE[2]], [(0, 0, 0), PALETTE[1], PALETTE[0]]]
    assert out.tolist() == np.array(expected).tolist()


def test_ignored_is_black_even_with_256_colours():
    palette = [(255, 255, 255)] * 256
    assert colourise(np.array([[254, IGNORE]], np.uint8), palette).tolist() == [[[255] * 3, [0] * 3]]


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        (np.array([[0, 3]], np.uint8), "holds class 3, the palette has 3 colours"),
        (np.array([[0, -1]], np.int64), "holds class -1"),
        (np.zeros((2, 3), np.float32), r"got float32 \[2, 3\]"),
        (np.zeros((2, 3, 3), np.uint8), r"got uint8 \[2, 3, 3\]"),
    ],
    ids=["no colour", "negative", "fractions", "colours"],
)
def test_what_is_no_mask_is_refused(mask, message):
    with pytest.raises(ValueError, match=message):
        colourise(mask, PALETTE)


def test_overlay():
    image = noise(2, 3)
    before = image.copy()
    assert np.array_equal(overlay(image, MASK, PALETTE, 0), image)
    full = overlay(image, MASK, PALETTE, 1)
    assert full[0].tolist() == [list(colour) for colour in PALETTE]
    assert np.array_equal(full[1, 0], image[1, 0])  # ignored
    half = overlay(image, MASK, PALETTE)
    assert half[0, 1].tolist() == [round((int(a) + b) / 2) for a, b in zip(image[0, 1], PALETTE[1], strict=True)]
    assert np.array_equal(image, before)


def test_overlay_refuses_what_does_not_fit():
    with pytest.raises(ValueError, match=r"mask \[2, 3\] and the image \[4, 3\] differ in size"):
        overlay(noise(4, 3), MASK, PALETTE)
    with pytest.raises(ValueError, match=r"opacity must be from 0 to 1, got 1\.5"):
        overlay(noise(2, 3), MASK, PALETTE, 1.5)
    with pytest.raises(ValueError, match=r"expected a picture, uint8 \[H, W, 3\], got float64 \[2, 3, 3\]"):
        overlay(noise(2, 3) / 255, MASK, PALETTE)


def test_heat_rises_evenly():
    light = lightness(heat(np.linspace(0, 5, 101)[None])[0].astype(float))  # [101]
    assert light[0] == 0
    assert light[-1] > 95
    steps = np.diff(light[::20])  # over a fifth of the range each
    assert np.all(np.diff(light) > 0)
    assert steps.max() / steps.min() < 1.1


def test_heat_is_of_the_maximum():
    values = np.array([[-3.0, 0.0, 0.5, 1.0]], np.float32)
    assert np.array_equal(heat(values), heat(1e-12 * values))
    assert np.array_equal(heat(values)[0, 0], heat(values)[0, 1])
    assert heat(values)[0, 1].tolist() == [0, 0, 0]
    assert heat(values)[0, 3].tolist() == heat(np.ones((1, 1)))[0, 0].tolist()


@pytest.mark.parametrize(("value", "dark"), [(0.0, True), (-2.0, True), (0.25, False)])
def test_a_constant_map(value, dark):
    out = heat(np.full((2, 3), value))
    assert out.shape == (2, 3, 3)
    assert (out == out[0, 0]).all()
    assert (out.max() == 0) == dark


def test_heat_is_scaled_to_a_size():
    out = heat(np.array([[0.0, 1.0]]), (6, 10))
    assert out.shape == (6, 10, 3)
    assert np.all(np.diff(out.sum(2, dtype=int), axis=1) >= 0)
    assert out[:, 0].max() == 0
    assert out[0, -1].tolist() == heat(np.ones((1, 1)))[0, 0].tolist()
    assert out[0, 5].tolist() not in (out[0, 0].tolist(), out[0, -1].tolist())  # bilinear


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_heat_refuses_what_it_cannot_draw(bad):
    with pytest.raises(ValueError, match="NaN or infinity"):
        heat(np.array([[0.0, bad]]))
    with pytest.raises(ValueError, match=r"got the shape \[3\]"):
        heat(np.zeros(3))


def test_heat_overlay():
    image = noise()
    values = np.zeros((6, 8), np.float32)
    values[1, 2] = 1
    out = heat_overlay(image, values)
    assert out.shape == image.shape
    peak = out[8:16, 16:24].mean()
    assert peak > out[24:].mean() + 60
    shades = heat_overlay(image, values, 0)
    assert (shades == shades[..., :1]).all()  # grey
    assert np.array_equal(heat_overlay(image, values, 1), heat(values, (48, 64)))


@pytest.mark.parametrize("ground", [0, 60, 128, 200, 255])
@pytest.mark.parametrize("size", [(48, 64), (300, 500)])
@pytest.mark.parametrize("label", ["", "2"])
def test_a_mark_shows_on_any_ground(ground, size, label):
    image = np.full((*size, 3), ground, np.uint8)
    out = mark(image, 30, 20, label)
    differ = np.abs(out.astype(int) - ground).max(2) > 100
    assert differ.sum() >= 10
    rows, columns = np.nonzero(np.abs(out.astype(int) - ground).max(2))
    if not label:
        assert rows.min() + rows.max() == 40  # around the point
        assert columns.min() + columns.max() == 60
    assert np.abs(rows - 20).max() < size[0] / 2
    assert out[20, 30].tolist() == [255, 255, 255]
    assert (image == ground).all()


@pytest.mark.parametrize("point", [(0, 0), (63, 47), (0, 47), (63, 0)])
def test_marks_and_labels_in_corners_lie_inside(point):
    image = np.full((48, 64, 3), 128, np.uint8)
    plain, labelled = mark(image, *point), mark(image, *point, "1")
    assert plain[point[1], point[0]].tolist() == [255, 255, 255]
    letters = (labelled == 255).all(2) & (plain != 255).any(2)
    assert letters.sum() > 5
    assert not letters[:, [0, 1, -2, -1]].any()  # neither the label nor its edge is cut
    assert not letters[[0, 1, -2, -1]].any()


@pytest.mark.parametrize("point", [(64, 0), (0, 48), (-1, 5)])
def test_a_point_outside_is_named(point):
    with pytest.raises(ValueError, match=rf"the point \({point[0]}, {point[1]}\) lies outside .* 64 x 48 pixels"):
        mark(noise(), *point)


@pytest.mark.parametrize("count", [1, 5, 30])
def test_a_legend_has_every_colour(count):
    palette = distinct_palette(count)
    out = legend([f"class {number}" for number in range(count)], palette)
    for colour in palette:
        assert (out == colour).all(2).sum() > 100
    assert (out[:, -1] == 255).all()  # no name is cut
    assert (out[-1] == 255).all()
    wider = legend([f"class {number}" for number in range(count - 1)] + ["a much longer name"], palette)
    assert wider.shape[1] > out.shape[1]


def test_a_legend_needs_a_colour_for_each_class():
    with pytest.raises(ValueError, match="3 classes need as many colours, got 2"):
        legend(["a", "b", "c"], PALETTE[:2])


def test_a_panel_scales_pictures_to_one_height():
    red, green = np.zeros((2, 40, 60, 3), np.uint8)
    red[..., 0], green[..., 1] = 255, 255
    out = panel([[("red", red), ("green", green[:20])], [("again", red)]], height=80)
    (rows, columns), (green_rows, green_columns) = (
        np.nonzero((out == colour).all(2)) for colour in (red[0, 0], green[0, 0])
    )
    assert len(rows) == 2 * 80 * 120
    assert len(green_rows) == 80 * 240
    assert green_rows.min() == rows.min()
    assert green_columns.min() > columns.max()
    caption = out[: rows.min(), : columns.max()]
    assert caption.min() < 100  # letters
    assert (out[-1] == 255).all()


def test_columns_of_a_panel_begin_below_each_other():
    narrow, wide, red = np.zeros((8, 8, 3), np.uint8), np.zeros((8, 30, 3), np.uint8), np.zeros((8, 8, 3), np.uint8)
    red[..., 0] = 255
    out = panel([[("", wide), ("", red)], [("", narrow), ("", red)]], height=8)
    assert len(np.unique(np.nonzero((out == (255, 0, 0)).all(2))[1])) == 8


def test_the_height_of_a_panel():
    def height(*heights):
        return panel([[("", np.zeros((height, 10, 3), np.uint8)) for height in heights]]).shape[0]

    assert height(20) == height(48) < height(40, 200) < height(512) == height(3000)


def test_a_wide_caption_is_not_cut():
    out = panel([[("a caption wider than its picture, by far", noise(8, 8)), ("second", noise(8, 8))]], height=8)
    assert out.shape[1] > 250
    assert (out[:, -1] == 255).all()


def test_a_panel_needs_pictures():
    with pytest.raises(ValueError, match="there are no pictures"):
        panel([[]])
    with pytest.raises(ValueError, match=r"panel: expected a picture, .* got uint8 \[4, 4\]"):
        panel([[("mask", np.zeros((4, 4), np.uint8))]])
