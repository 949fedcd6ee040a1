"""The drawn street scenes, and the augmentation of the recipe."""

import numpy as np
import pytest
import torch

import danet
from danet.data import Cityscapes
from danet.data.cityscapes import CLASSES
from danet.data.sample import IGNORE, Sample
from danet.data.street_scenes import FAR_PAIR, FAR_SIDE, PAIR_FROM, render, write_street_scenes
from danet.data.transforms import MEAN, STD, augment, flip, to_tensor

PAIR = [1, 9]  # class numbers of sidewalk and terrain


def scene(index, height=128, width=256):
    return render(np.random.default_rng(index), height, width)


def test_a_scene_depends_on_its_seed_alone(tmp_path):
    for root in (tmp_path / "a", tmp_path / "b"):
        write_street_scenes(root, train=2, val=1, height=32, width=64, seed=3)
    write_street_scenes(tmp_path / "c", train=3, val=0, height=32, width=64, seed=3)
    a, b, c = (Cityscapes(tmp_path / name, "train") for name in "abc")
    for other in (b, c):
        assert np.array_equal(a[1].image, other[1].image)
        assert np.array_equal(a[1].mask, other[1].mask)
    assert not np.array_equal(a[0].image, a[1].image)
    assert not np.array_equal(a[0].image, Cityscapes(tmp_path / "a", "val")[0].image)


def test_what_is_written_is_what_was_drawn(tmp_path):
    write_street_scenes(tmp_path, train=1, val=1, height=64, width=128, seed=5)
    drawn = render(np.random.default_rng((5, 1, 0)), 64, 128)
    read = Cityscapes(tmp_path, "val")[0]
    assert np.array_equal(read.image, drawn.image)
    assert np.array_equal(read.mask, drawn.mask)


def test_classes_and_the_pair():
    masks = [scene(index).mask for index in range(40)]
    assert set(np.unique(masks)) == {0, 1, 2, 5, 7, 8, 9, 10, 11, 13}
    with_pair = [[(mask == number).any() for number in PAIR] for mask in masks]
    assert not any(all(both) for both in with_pair)
    assert min(sum(column) for column in zip(*with_pair, strict=True)) >= 10
    assert tuple(CLASSES[number] for number in PAIR) == FAR_PAIR


def test_the_pair_and_its_cue_are_further_apart_than_the_fcn_sees():
    """From any pixel of the ground beside the road, the far side lies outside of the fcn's view."""
    view = danet.receptive_field(danet.create_model("fcn_tiny", 19))
    assert view // 2 + 16 < 256 * (PAIR_FROM - FAR_SIDE)  # 16: two output strides
    for index in range(10):
        mask = scene(index).mask
        columns = np.flatnonzero(np.isin(mask, PAIR).any(0))
        side = columns if columns.min() > 128 else 255 - columns
        assert side.min() >= int(256 * PAIR_FROM)


def test_the_fcn_cannot_see_the_cue():
    """Another far side changes none of its logits on the pair."""
    torch.manual_seed(0)
    model = danet.create_model("fcn_tiny", 19).eval()
    sample = scene(4)
    columns = np.flatnonzero(np.isin(sample.mask, PAIR).any(0))
    assert columns.size
    other = sample.image.copy()
    cue = slice(0, int(256 * FAR_SIDE)) if columns.min() > 128 else slice(256 - int(256 * FAR_SIDE), 256)
    other[:, cue] = 255 - other[:, cue]
    with torch.inference_mode():
        one, two = (model(to_tensor(image)[None])[0] for image in (sample.image, other))  # [19, H, W]
    assert torch.equal(one[:, :, columns], two[:, :, columns])
    assert not torch.equal(one, two)


def test_the_pair_looks_alike_near_by():
    """Mean colours of the two grounds differ by less than either's spread."""
    colours = {number: [] for number in PAIR}
    for index in range(60):
        image, mask, _ = scene(index)
        for number in PAIR:
            if (mask == number).any():
                colours[number].append(image[mask == number].mean(0))
    one, two = (np.array(colours[number]) for number in PAIR)  # [scenes, 3]
    assert (np.abs(one.mean(0) - two.mean(0)) < 0.7 * one.std(0)).all()


@pytest.mark.parametrize("size", [(31, 128), (64, 127)])
def test_sizes_that_cannot_hold_a_scene(size):
    with pytest.raises(ValueError, match="a scene needs"):
        scene(0, *size)


def picture(height, width):
    image = np.arange(height * width * 3, dtype=np.uint32).reshape(height, width, 3).astype(np.uint8)
    return Sample(image, (np.arange(height * width).reshape(height, width) % 7).astype(np.uint8), "x")


def test_to_tensor_normalises():
    image = picture(3, 5).image
    expected = (image.astype(np.float64) / 255 - MEAN) / STD  # [H, W, 3]
    np.testing.assert_allclose(to_tensor(image).permute(1, 2, 0).numpy(), expected, atol=1e-6)


def test_flipping_twice_changes_nothing():
    sample = picture(4, 6)
    assert np.array_equal(flip(flip(sample)).mask, sample.mask)
    assert np.array_equal(flip(sample).image[:, 0], sample.image[:, -1])


def test_small_images_are_padded_with_no_class():
    sample = picture(4, 6)
    padded = augment(sample, np.random.default_rng(0), crop_size=(10, 12))
    assert padded.image.shape == (10, 12, 3)
    assert (padded.mask[4:] == IGNORE).all()
    assert (padded.mask[:, 6:] == IGNORE).all()
    assert not padded.image[4:].any()
    assert sorted(padded.mask[:4, :6].ravel()) == sorted(sample.mask.ravel())


def test_a_view_is_cut_from_one_place_of_both():
    """Each value of the mask is a pixel of the image, so a crop that shifted one of them would show."""
    values = np.arange(40 * 60).reshape(40, 60) % 251
    sample = Sample(np.repeat(values[:, :, None], 3, 2).astype(np.uint8), values.astype(np.uint8), "x")
    places = set()
    for seed in range(8):
        view = augment(sample, np.random.default_rng(seed), crop_size=(16, 24))
        assert np.array_equal(view.image[:, :, 0], view.mask)
        places.add(int(view.mask[0, 0]))
    assert len(places) > 4


def test_scales_stay_within_their_range():
    found = []
    for seed in range(30):
        view = augment(
            picture(20, 40), np.random.default_rng(seed), crop_size=(120, 200), base_size=40, scale=(0.5, 2.0)
        )
        found.append((view.mask != IGNORE).any(1).sum())
    assert 20 <= min(found) < 30
    assert 60 < max(found) <= 80
