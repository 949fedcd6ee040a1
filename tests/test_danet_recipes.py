"""What training runs on: the loss, the recipes, and the batches that a seed decides."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from danet import create_model
from danet.batches import Order, View, Views
from danet.data import IGNORE, open_dataset
from danet.data.street_scenes import write_street_scenes
from danet.head import Logits
from danet.loss import segmentation_loss
from danet.recipes import RECIPES, find_recipe

RECIPE = find_recipe("street-scenes", batch_size=2, crop_size=(32, 64), scale=(0.8, 1.5), epochs=2)


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    root = tmp_path_factory.mktemp("scenes")
    write_street_scenes(root, train=3, val=0, height=32, width=64)
    return open_dataset("street-scenes", root, "train")


# The loss


def test_the_loss_is_the_sum_of_three_means_over_labelled_pixels():
    torch.manual_seed(0)
    logits = Logits(*(torch.randn(2, 4, 3, 5, dtype=torch.float64) for _ in range(3)))
    target = torch.randint(0, 4, (2, 3, 5))
    target[0, 0] = IGNORE
    losses = segmentation_loss(logits, target.to(torch.uint8), weights=(1, 0.5, 2))
    labelled = target != IGNORE
    for part, loss in zip(logits, losses[1:], strict=True):
        chosen = part.log_softmax(1).permute(0, 2, 3, 1)[labelled]  # [pixels, classes]
        expected = -chosen.gather(1, target[labelled][:, None]).mean()
        torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(losses.total, losses.main + 0.5 * losses.position + 2 * losses.channel)


def test_a_batch_without_labels_counts_nothing():
    logits = torch.randn(1, 3, 2, 2, requires_grad=True)
    losses = segmentation_loss(logits, torch.full((1, 2, 2), IGNORE))
    losses.total.backward()
    assert losses.total.item() == 0
    assert (losses.position, losses.channel) == (None, None)
    assert not logits.grad.any()


def test_the_loss_refuses_other_shapes():
    with pytest.raises(ValueError, match=r"must have shape \[1, 2, 2\], got \[1, 4, 4\]"):
        segmentation_loss(torch.randn(1, 3, 2, 2), torch.zeros(1, 4, 4))


# Recipes


def test_the_recipe_of_the_paper():
    recipe = find_recipe("cityscapes")
    assert (recipe.learning_rate, recipe.batch_size, recipe.crop_size, recipe.epochs) == (0.003, 8, (768, 768), 240)
    assert (recipe.base_size, recipe.scale, recipe.momentum, recipe.weight_decay) == (1024, (0.75, 2.0), 0.9, 1e-4)
    assert recipe.ours == ()
    assert recipe.total_steps(2975) == 89040
    assert {find_recipe("cityscapes", variant).learning_rate for variant in ("pam", "cam", "fcn")} == {0.01}
    ablation = find_recipe("cityscapes-ablation")
    assert (ablation.epochs, ablation.scale, ablation.total_steps(2975)) == (180, (1.0, 1.0), 66780)
    assert find_recipe("coco-stuff").epochs == 180
    for name in ("voc", "context", "coco-stuff"):
        assert {"learning_rate", "crop_size"} <= set(find_recipe(name).ours)
        assert find_recipe(name).batch_size == 16
    assert "learning_rate   0.001 *" in str(find_recipe("voc"))


def test_the_rate_falls_as_a_polynomial_and_the_head_has_ten_times_it():
    recipe = find_recipe("cityscapes")
    assert recipe.rate(0, 100) == 0.003
    assert recipe.rate(50, 100) == pytest.approx(0.003 * 0.5**0.9)
    assert 0 < recipe.rate(99, 100) < 1e-4
    warm = replace(recipe, warmup=4)
    assert [warm.rate(step, 10**9) / 0.003 for step in range(5)] == pytest.approx([0.25, 0.5, 0.75, 1, 1])
    model = create_model("danet_tiny", 19)
    optimizer = recipe.make_optimizer(model)
    recipe.set_rate(optimizer, 50, 100)
    rates = {id(value): group["lr"] for group in optimizer.param_groups for value in group["params"]}
    assert len(rates) == len(list(model.parameters()))
    for name, parameter in model.named_parameters():
        factor = 10 if name.startswith("head.") else 1
        assert rates[id(parameter)] == pytest.approx(0.003 * 0.5**0.9 * factor), name


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("citiscapes", {}, "unknown recipe 'citiscapes', expected one of cityscapes"),
        ("voc", {"rate": 1}, "recipe voc has no 'rate'"),
        (
            "voc",
            {"batch_size": 0, "scale": (2.0, 1.0)},
            "batch_size must be at least 1, got 0; scale must be two rising",
        ),
        ("voc", {"optimizer": "lion"}, "optimizer must be"),
        ("voc", {"learning_rate": -1.0}, "learning_rate must not be negative"),
        ("voc", {"crop_size": (0, 4)}, "crop_size must be at least 1 x 1, got 0 x 4"),
    ],
)
def test_recipes_refuse(name, changes, message):
    with pytest.raises(ValueError, match=message):
        find_recipe(name, **changes)


def test_what_is_changed_counts_as_ours():
    assert find_recipe("cityscapes", epochs=3).ours == ("epochs",)
    assert all(find_recipe(name).name == name for name in RECIPES)


# Batches


def views(first=0, steps=6, parts=1, rank=0, world=1, batch=4, images=9):
    recipe = replace(RECIPE, batch_size=batch)
    return list(Order(images, recipe, 3, first=first, steps=steps, parts=parts, rank=rank, world=world))


def test_every_epoch_shows_each_image_once_in_another_order():
    epochs = [[view.item for batch in views()[start : start + 2] for view in batch] for start in (0, 2, 4)]
    assert all(len(set(epoch)) == 8 for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]
    assert [view.epoch for batch in views() for view in batch] == [0] * 8 + [1] * 8 + [2] * 8


@pytest.mark.parametrize("first", [0, 1, 2, 3, 5])
def test_batches_from_a_step_on_are_those_of_the_whole_run(first):
    assert views(first) == views()[first:]


def test_processes_and_parts_share_a_step():
    whole = views()
    dealt = [views(parts=2, rank=rank, world=2) for rank in range(2)]
    for step, batch in enumerate(whole):
        shared = [view for rank in range(2) for part in dealt[rank][2 * step : 2 * step + 2] for view in part]
        assert sorted(shared) == sorted(batch)


def test_a_view_depends_on_seed_epoch_and_place_alone(dataset):
    look = Views(dataset, RECIPE, seed=1)
    image, mask = look[View(0, 0, 2)]
    assert (image.shape, mask.shape, mask.dtype) == ((3, 32, 64), (32, 64), torch.uint8)
    assert torch.equal(image, Views(dataset, RECIPE, seed=1)[View(0, 0, 2)][0])
    others = [look[View(1, 0, 2)], look[View(0, 1, 2)], Views(dataset, RECIPE, seed=2)[View(0, 0, 2)]]
    assert not any(torch.equal(image, other) for other, _ in others)


def test_the_target_of_a_view_is_what_the_mask_holds(dataset):
    """Without scaling and cropping, a view is the sample or its mirror image."""
    recipe = replace(RECIPE, scale=(1.0, 1.0))
    sample = dataset[0]
    masks = [Views(dataset, recipe, 0)[View(0, place, 0)][1].numpy() for place in range(8)]
    found = {np.array_equal(mask, sample.mask) for mask in masks}
    assert found == {True, False}
    assert all(np.array_equal(mask, sample.mask) or np.array_equal(mask, sample.mask[:, ::-1]) for mask in masks)
