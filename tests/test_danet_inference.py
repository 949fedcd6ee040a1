"""Scores of whole images: each way to fuse windows, scales and flips against a slow one that goes pixel by pixel."""

import math

import numpy as np
import pytest
import torch
from small import randn
from torch import nn

import danet
from danet.data.transforms import MEAN, STD, to_tensor
from danet.inference import EVALUATION_SCALES, LARGEST_EXPONENT, predict_scores

CLASSES = 5
MODES = ("official", "mmseg", "probability")


def small_net(seed=0):
    """What it says of a pixel depends on how far the edge of the window is, and on left and right."""
    torch.manual_seed(seed)
    net = nn.Sequential(nn.Conv2d(3, 8, 5, padding=2), nn.ReLU(), nn.Conv2d(8, CLASSES, 5, padding=2))
    with torch.no_grad():
        net[2].weight *= 4
    return net


def tiny_fcn():
    torch.manual_seed(3)
    model = danet.create_model("fcn_tiny", CLASSES).eval()
    with torch.no_grad():
        model.head.classifier[1].weight *= 8
    return model


class Constant(nn.Module):
    """The same logits everywhere."""

    def __init__(self, values):
        super().__init__()
        self.values = nn.Parameter(torch.tensor(values))

    def forward(self, images):
        return self.values.view(1, -1, 1, 1).expand(images.shape[0], -1, *images.shape[2:])


# The slow way, in fp64 numpy but for the model.


def logits(model, window, mirrored=False):  # [3, h, w] -> [classes, h, w]
    given = torch.from_numpy(np.ascontiguousarray(window[:, :, ::-1] if mirrored else window)).float()[None]
    with torch.no_grad():
        got = model(given)[0].double().numpy()
    return got[:, :, ::-1] if mirrored else got


def softmax(values):
    powers = np.exp(values - values.max(0))
    return powers / powers.sum(0)


def bilinear(maps, height, width):
    """Corners go to corners."""
    h, w = maps.shape[1:]
    made = np.empty((maps.shape[0], height, width))
    for row in range(height):
        for column in range(width):
            y, x = row * (h - 1) / max(1, height - 1), column * (w - 1) / max(1, width - 1)
            above, left = min(int(y), max(0, h - 2)), min(int(x), max(0, w - 2))
            below, right = min(above + 1, h - 1), min(left + 1, w - 1)
            upper = maps[:, above, left] * (left + 1 - x) + maps[:, above, right] * (x - left)
            lower = maps[:, below, left] * (left + 1 - x) + maps[:, below, right] * (x - left)
            made[:, row, column] = upper * (above + 1 - y) + lower * (y - above)
    return made


def mean_over_windows(corners, scores, height, width):
    """`scores`: of a window, by its upper left corner, which may reach beyond height and width."""
    cache = {corner: scores(*corner) for corner in corners}
    made = np.empty((CLASSES, height, width))
    for row in range(height):
        for column in range(width):
            seen = [
                part[:, row - top, column - left]
                for (top, left), part in cache.items()
                if 0 <= row - top < part.shape[1] and 0 <= column - left < part.shape[2]
            ]
            made[:, row, column] = np.mean(seen, axis=0)
    return made


def slow_official(model, image, scales, crop, stride, base=None, *, pad=None, shift=False, mirror=True, late_exp=False):
    """The keywords after the star plant errors."""
    height, width = image.shape[1:]
    black = [-mean / std for mean, std in zip(MEAN, STD, strict=True)] if pad is None else pad
    result = np.zeros((CLASSES, height, width))
    for scale in scales:
        long = math.ceil((max(height, width) if base is None else base) * scale)
        if height > width:
            h, w = long, int(width * long / height + 0.5)
        else:
            h, w = int(height * long / width + 0.5), long
        scaled = bilinear(image, h, w)

        def cut(top, left, scaled=scaled):
            window = np.empty((3, crop, crop))
            for channel in range(3):
                window[channel] = black[channel]
            part = scaled[:, top : top + crop, left : left + crop]
            window[:, : part.shape[1], : part.shape[2]] = part
            return window

        def score(top, left, cut=cut):
            both = logits(model, cut(top, left))
            if mirror:
                both = both + logits(model, cut(top, left), mirrored=True)
            return both if late_exp else np.exp(both)

        def starts(side):
            count = math.ceil((max(side, crop) - crop) / stride) + 1
            return [min(n * stride, max(side - crop, 0)) if shift else n * stride for n in range(count)]

        corners = [(0, 0)] if long <= crop else [(top, left) for top in starts(h) for left in starts(w)]
        mean = mean_over_windows(corners, score, h, w)
        result += bilinear(np.exp(mean) if late_exp else mean, height, width)
    return result


def inside(side, crop, stride):
    """Where windows begin that may not leave the image; a window as large as the image begins at 0."""
    starts, at = [], 0
    while at + crop < side:
        starts.append(at)
        at += stride
    return [*starts, max(0, side - crop)]


def scaled_by(image, scale, base=None):
    height, width = image.shape[1:]
    factor = scale if base is None else scale * base / max(height, width)
    return bilinear(image, math.floor(height * factor + 0.5), math.floor(width * factor + 0.5))


def slow_mmseg(model, image, scales, crop, stride, flip, base=None, *, early_softmax=False):
    views = []
    for scale in scales:
        for mirrored in (False, True) if flip else (False,):
            given = scaled_by(image, scale, base)
            given = given[:, :, ::-1] if mirrored else given

            def score(top, left, given=given):
                got = logits(model, given[:, top : top + crop, left : left + crop])
                return softmax(got) if early_softmax else got

            h, w = given.shape[1:]
            corners = [(top, left) for top in inside(h, crop, stride) for left in inside(w, crop, stride)]
            seen = bilinear(mean_over_windows(corners, score, h, w), *image.shape[1:])
            seen = seen if early_softmax else softmax(seen)
            views.append(seen[:, :, ::-1] if mirrored else seen)
    return np.mean(views, axis=0)


def slow_probability(model, image, scales, crop, stride, flip, base=None):
    views = []
    for scale in scales:
        given = scaled_by(image, scale, base)
        h, w = given.shape[1:]
        corners = [(top, left) for top in inside(h, crop, stride) for left in inside(w, crop, stride)]
        for mirrored in (False, True) if flip else (False,):

            def score(top, left, given=given, mirrored=mirrored):
                return softmax(logits(model, given[:, top : top + crop, left : left + crop], mirrored))

            views.append(bilinear(mean_over_windows(corners, score, h, w), *image.shape[1:]))
    return np.mean(views, axis=0)


def off(got, expected):
    """Largest difference, relative to the largest value of the pixel (official scores differ a lot in size)."""
    expected = np.asarray(expected)
    return float((np.abs(got.numpy() - expected) / np.abs(expected).max(0)).max())


CASES = [  # height, width, crop, stride, scales
    pytest.param(19, 31, 16, 9, (1.0,), id="odd"),
    pytest.param(33, 18, 16, 10, (0.7, 1.3), id="upright, two scales"),
    pytest.param(9, 13, 16, 11, (1.0, 0.8), id="smaller than the crop"),
    pytest.param(11, 29, 16, 7, (1.0, 1.1), id="lower than the crop"),
    pytest.param(16, 16, 16, 16, (1.0, 2.0), id="square, windows side by side"),
]


@pytest.mark.parametrize(("height", "width", "crop", "stride", "scales"), CASES)
@pytest.mark.parametrize("mode", ["official", "mmseg", "mmseg, flip", "probability", "probability, flip"])
def test_every_mode_equals_the_slow_way(mode, height, width, crop, stride, scales):
    mode, _, flip = mode.partition(", ")
    image, model = randn(3, height, width), small_net()
    got = predict_scores(
        model, image.float(), mode=mode, scales=scales, crop=crop, stride=stride, flip=bool(flip) or None, batch=3
    )
    assert got.dtype == torch.float32
    assert got.shape == (CLASSES, height, width)
    slow = {"official": slow_official, "mmseg": slow_mmseg, "probability": slow_probability}[mode]
    expected = slow(model, image.numpy(), scales, crop, stride, *([] if mode == "official" else [bool(flip)]))
    assert off(got, expected) < 2e-5


@pytest.mark.parametrize("mode", MODES)
def test_a_real_model_as_well(mode):
    image, model = randn(3, 40, 56), tiny_fcn()
    got = predict_scores(model, image.float(), mode=mode, scales=(0.75, 1.0), crop=32, stride=20, flip=True, batch=2)
    if mode == "official":
        expected = slow_official(model, image.numpy(), (0.75, 1.0), 32, 20)
    else:
        slow = slow_mmseg if mode == "mmseg" else slow_probability
        expected = slow(model, image.numpy(), (0.75, 1.0), 32, 20, True)
    assert off(got, expected) < 5e-5


def test_another_size_at_scale_1():
    image, model = randn(3, 12, 21), small_net()
    options = {"crop": 16, "stride": 8, "scales": (1.0, 1.5), "base": 27}
    got = predict_scores(model, image.float(), mode="official", **options)
    assert off(got, slow_official(model, image.numpy(), options["scales"], 16, 8, base=27)) < 2e-5
    for mode, slow in (("mmseg", slow_mmseg), ("probability", slow_probability)):
        got = predict_scores(model, image.float(), mode=mode, **options)
        assert off(got, slow(model, image.numpy(), options["scales"], 16, 8, False, base=27)) < 2e-5


@pytest.mark.parametrize(
    "error", [{"shift": True}, {"mirror": False}, {"late_exp": True}, {"pad": (0.0, 0.0, 0.0)}], ids=str
)
def test_errors_in_the_official_mode_would_show(error):
    image, model = randn(3, 19, 31), small_net()
    got = predict_scores(model, image.float(), mode="official", crop=16, stride=9)
    assert off(got, slow_official(model, image.numpy(), (1.0,), 16, 9, **error)) > 0.05


def test_the_modes_differ():
    """Else the tests above could pass with one for all."""
    image, model = randn(3, 19, 31), small_net()
    options = {"crop": 16, "stride": 9, "flip": True}
    made = {mode: predict_scores(model, image.float(), mode=mode, **options) for mode in MODES}
    assert off(made["mmseg"], made["probability"]) > 0.02
    assert off(made["official"] / made["official"].sum(0), made["mmseg"]) > 0.05
    assert off(made["official"] / made["official"].sum(0), made["probability"]) > 0.05
    once = predict_scores(model, image.float(), mode="mmseg", **options | {"flip": False})
    assert off(once, made["mmseg"]) > 0.05
    early = slow_mmseg(model, image.numpy(), (1.0,), 16, 9, True, early_softmax=True)
    assert off(made["mmseg"], early) > 0.02


@pytest.mark.parametrize("mode", MODES)
def test_without_a_crop_the_image_is_one_window(mode):
    image, model = randn(3, 13, 22).float(), small_net()
    scores = predict_scores(model, image, mode=mode, crop=None, flip=True, scales=(1.0,))
    one, mirrored = logits(model, image.numpy()), logits(model, image.numpy(), mirrored=True)
    expected = np.exp(one + mirrored) if mode == "official" else (softmax(one) + softmax(mirrored)) / 2
    assert off(scores, expected) < 1e-5
    sizes = []
    model.register_forward_pre_hook(lambda module, given: sizes.append(tuple(given[0].shape[2:])))
    predict_scores(model, image, mode=mode, crop=None, scales=(1.0, 1.3), flip=None)
    larger = (17, 29)  # 16.9 x 28.6
    assert sizes == [size for size in ((13, 22), larger) for _ in range(2 if mode == "official" else 1)]


@pytest.mark.parametrize("mode", MODES)
def test_windows_in_batches_give_the_same(mode):
    image, model = randn(3, 25, 38).float(), small_net()
    batches = []
    model.register_forward_pre_hook(lambda module, given: batches.append(given[0].shape[0]))
    one = predict_scores(model, image, mode=mode, crop=16, stride=8, flip=True)
    assert set(batches) == {1}
    batches.clear()
    many = predict_scores(model, image, mode=mode, crop=16, stride=8, flip=True, batch=5)  # 3 x 4 windows
    assert sorted(batches) == [2, 2, 5, 5, 5, 5]
    assert off(many, one) < 1e-5


@pytest.mark.parametrize(
    ("mode", "crop", "scales", "first", "second"),
    [
        ("official", 768, (1.0,), 512, 1024),
        ("official", 1024, (1.0, 1.01), 512, 1024),
        ("official", 100, (1.0,), 66, 132),
        ("mmseg", 769, (1.0,), 513, 1026),
        ("probability", 99, (1.0, 1.01), 66, 132),
    ],
)
def test_strides_by_default(mode, crop, scales, first, second):
    """Of an image one pixel high, whose columns hold their number."""
    width = second + crop if mode == "official" else second + crop + 5
    image = torch.arange(float(width)).expand(3, 1, width)
    starts = []
    model = Constant([0.0, 1.0])
    model.register_forward_pre_hook(lambda module, given: starts.append(given[0][0, 0, 0, 0].item()))
    predict_scores(model, image, mode=mode, crop=crop, scales=scales)
    step = 2 if mode == "official" else 1
    assert starts[0 : 3 * step : step] == [0, first, second]


def test_the_authors_count_of_windows():
    """8 windows on an image of Cityscapes with crop 768, seen twice; 95 with eight scales and crop 1024."""

    class Count(nn.Module):
        def __init__(self):
            super().__init__()
            self.windows = 0

        def forward(self, images):
            self.windows += images.shape[0]
            assert images.shape[2:] == (crop, crop)
            return images[:, :1]

    for crop, scales, windows in ((768, (1.0,), 8), (1024, EVALUATION_SCALES, 95)):
        model = Count()
        # The same proportions at 1/8 of the size: windows depend on nothing else.
        crop //= 8
        predict_scores(model, torch.zeros(3, 128, 256), scales=scales, crop=crop)
        assert model.windows == 2 * windows


def test_the_model_is_left_as_it_was():
    model = nn.Sequential(nn.BatchNorm2d(3), nn.Conv2d(3, CLASSES, 1), nn.Dropout(0.5)).train()
    model[0].eval()  # frozen
    before = {name: value.clone() for name, value in model.state_dict().items()}
    image = randn(3, 8, 8).float()
    first, second = (predict_scores(model, image, crop=None) for _ in range(2))
    assert torch.equal(first, second)  # no dropout
    assert [module.training for module in model.modules()] == [True, False, True, True]
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    with pytest.raises(ValueError, match="NaN"):
        predict_scores(model, image * torch.nan, crop=None)
    assert [module.training for module in model.modules()] == [True, False, True, True]
    assert not first.requires_grad


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_scores_of_half_precision_models_are_fp32(dtype):
    """Sums of logits of 30 are no number any more after exp in fp16."""
    scores = predict_scores(Constant([15.0, 14.0, -2.0]).to(dtype), torch.zeros(3, 20, 20), crop=16)
    assert scores.dtype == torch.float32
    torch.testing.assert_close(scores[:, 5, 5], torch.tensor([30.0, 28.0, -4.0]).exp(), rtol=1e-4, atol=0)


def test_scores_beyond_fp32_keep_their_order():
    image = torch.zeros(3, 20, 20)
    scores = predict_scores(Constant([60.0, 400.0, 399.0, -700.0]), image, crop=16, stride=4, scales=(1.0, 1.3, 2.0))
    assert scores.isfinite().all()
    assert (scores.argmax(0) == 1).all()
    assert (scores[1] > 2 * scores[2]).all()
    below = predict_scores(Constant([LARGEST_EXPONENT / 2 - 0.1, 0.0]), image, crop=None)  # and no more is done
    torch.testing.assert_close(below[0, 0, 0].item(), math.exp(LARGEST_EXPONENT - 0.2), rtol=1e-4, atol=0)


def test_infinity_is_no_score():
    with pytest.raises(ValueError, match="predict_scores: the model gives NaN or infinity"):
        predict_scores(Constant([1.0, math.inf]), torch.zeros(3, 8, 8), crop=None)


@pytest.mark.parametrize("mode", ["mmseg", "probability"])
def test_probabilities_sum_to_one(mode):
    scores = predict_scores(
        small_net(), randn(3, 21, 30).float(), mode=mode, crop=16, scales=(0.5, 1.0, 1.7), flip=True, batch=4
    )
    torch.testing.assert_close(scores.sum(0), torch.ones(21, 30), rtol=0, atol=1e-5)


def test_the_padding_is_what_a_black_pixel_becomes():
    seen = []
    model = Constant([0.0, 1.0])
    model.register_forward_pre_hook(lambda module, given: seen.append(given[0]))
    predict_scores(model, torch.ones(3, 6, 7), crop=9)
    black = to_tensor(np.zeros((9, 9, 3), np.uint8))
    black[:, :6, :7] = 1
    torch.testing.assert_close(seen[0], black[None])
    torch.testing.assert_close(seen[1], black[None].flip(3))


BAD = [
    ({"mode": "mean"}, "mode must be one of official, mmseg, probability, got 'mean'"),
    ({"scales": ()}, r"scales must be one positive number or more, got \[\]"),
    ({"scales": (1.0, 0.0)}, r"scales must be .*, got \[1.0, 0.0\]"),
    ({"scales": (math.nan,)}, r"scales must be .*, got \[nan\]"),
    ({"crop": 16, "stride": 17}, "the crop of 16 is smaller than the stride of 17"),
    ({"stride": 0}, "stride must be at least 1, got 0"),
    ({"crop": 0}, "crop must be at least 1, got 0"),
    ({"batch": 0}, "batch must be at least 1, got 0"),
    ({"base": -3}, "base must be at least 1, got -3"),
    ({"crop": None, "stride": 8}, "without a crop there are no windows for the stride of 8"),
    ({"flip": False}, "the official mode always flips"),
]


@pytest.mark.parametrize(("options", "message"), BAD, ids=str)
def test_wrong_options_are_one_clear_line(options, message):
    with pytest.raises(ValueError, match=rf"predict_scores: {message}"):
        predict_scores(small_net(), torch.zeros(3, 20, 20), **options)


def test_wrong_images_and_models_are_one_clear_line():
    for shape in ((20, 20), (1, 20, 20), (1, 3, 20, 20), (3, 0, 20)):
        with pytest.raises(ValueError, match=r"the image must have shape \[3, H, W\], got \["):
            predict_scores(small_net(), torch.zeros(shape))
    with pytest.raises(TypeError, match=r"normalised floating-point tensor, got torch.uint8"):
        predict_scores(small_net(), torch.zeros(3, 20, 20, dtype=torch.uint8))
    with pytest.raises(ValueError, match=r"logits \[1, classes, 16, 16\] for images .*, got \[1, 3, 8, 8\]"):
        predict_scores(nn.AvgPool2d(2), torch.zeros(3, 20, 20), crop=16)

    class Two(nn.Module):
        def forward(self, images):
            return images, images

    with pytest.raises(TypeError, match="the model must return one tensor of logits, got tuple"):
        predict_scores(Two(), torch.zeros(3, 20, 20), crop=16)
