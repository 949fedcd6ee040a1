"""Evaluation on small data sets on the disk, by one process and by two."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

import danet
from danet.data.images import write_image
from danet.data.sample import IGNORE, Item, SegmentationDataset
from danet.data.transforms import MEAN, STD, to_tensor
from danet.evaluate import evaluate, train_ids_to_label_ids
from danet.inference import predict_scores
from danet.metrics import ConfusionMatrix

COLOURS = [(255, 0, 0), (0, 255, 0), (0, 0, 255)]
SIZES = ((12, 20), (17, 9), (8, 8), (21, 22), (10, 13))  # height, width


class Reddest(nn.Module):
    """Logits are the colours themselves, so that the prediction of every pixel is known."""

    num_classes = 3

    def forward(self, images):
        return images * images.new_tensor(STD).view(3, 1, 1) + images.new_tensor(MEAN).view(3, 1, 1)


def write_set(folder, errors=0.3):
    """Pixels of pure red, green or blue, whose masks differ in some places and are ignored in others."""
    random = np.random.default_rng(0)
    items, counts = [], np.zeros((3, 3), np.int64)
    for number, size in enumerate(SIZES):
        seen, mask = random.integers(0, 3, size), random.integers(0, 3, size)
        mask = np.where(random.random(size) < errors, mask, seen)
        mask[random.random(size) < 0.2] = IGNORE
        image, target = folder / f"{number}.png", folder / f"{number}_mask.png"
        write_image(image, np.array(COLOURS, np.uint8)[seen])
        write_image(target, mask)
        items.append(Item(f"number {number}", image, target))
        for truth in range(3):
            for predicted in range(3):
                counts[truth, predicted] += ((mask == truth) & (seen == predicted)).sum()
    return SegmentationDataset(items, ("red", "green", "blue"), COLOURS), counts


@pytest.mark.parametrize("mode", ["official", "mmseg", "probability"])
def test_the_counts_are_those_of_the_masks(mode, tmp_path):
    dataset, counts = write_set(tmp_path)
    matrix = evaluate(Reddest(), dataset, mode=mode, crop=11, stride=8, batch=3, progress=False)
    assert matrix.counts.tolist() == counts.tolist()
    assert np.count_nonzero(counts) == 9


def test_the_first_few_images_alone(tmp_path):
    dataset, _ = write_set(tmp_path)
    some = evaluate(Reddest(), dataset, max_images=2, progress=False)
    assert some.counts.sum() == sum((dataset[number].mask != IGNORE).sum() for number in range(2))
    all_of_them = evaluate(Reddest(), dataset, max_images=99, progress=False)
    assert torch.equal(all_of_them.counts, evaluate(Reddest(), dataset, progress=False).counts)


def test_the_options_reach_the_prediction(tmp_path):
    dataset, _ = write_set(tmp_path)
    torch.manual_seed(4)
    model = nn.Sequential(nn.Conv2d(3, 8, 5, padding=2), nn.ReLU(), nn.Conv2d(8, 3, 5, padding=2)).train()
    found = set()
    for options in (
        {"crop": None},
        {"crop": 16, "stride": 5},
        {"crop": None, "scales": (0.5, 2.0)},
        {"mode": "mmseg", "crop": 16, "flip": True, "batch": 2},
        {"crop": None, "base": 40},
    ):
        expected = ConfusionMatrix(3)
        for sample in dataset:
            expected.update(predict_scores(model, to_tensor(sample.image), **options).argmax(0).numpy(), sample.mask)
        matrix = evaluate(model, dataset, progress=False, **options)
        assert torch.equal(matrix.counts, expected.counts)
        found.add(tuple(matrix.counts.flatten().tolist()))
    assert len(found) == 5  # each option made a difference
    assert model.training
    windows = []
    model.register_forward_pre_hook(lambda module, given: windows.append(given[0].shape[0]))
    evaluate(model, dataset, crop=8, stride=4, batch=3, max_images=1, progress=False)  # 2 x 4 windows, mirrored too
    assert windows == [3, 3, 3, 3, 2, 2]


TWO = """
import sys
from pathlib import Path
import torch
import torch.distributed as dist
sys.path[:0] = sys.argv[3:]
from test_danet_evaluate import Reddest, write_set
from danet.evaluate import evaluate
folder, rank = Path(sys.argv[1]), int(sys.argv[2])
dist.init_process_group("gloo", init_method=f"file://{folder / 'meet'}", rank=rank, world_size=2)
dataset, _ = write_set(folder / str(rank))
read = []
class Watched(type(dataset)):
    def __getitem__(self, index):
        read.append(index)
        return super().__getitem__(index)
dataset.__class__ = Watched
matrix = evaluate(Reddest(), dataset, crop=11, stride=8)
one = evaluate(Reddest(), dataset, crop=11, stride=8, max_images=1, progress=False)  # nothing for the second process
torch.save((matrix.counts, one.counts, read), folder / f"{rank}.pt")
dist.destroy_process_group()
"""


def test_two_processes_share_the_images_and_have_the_same_counts(tmp_path):
    roots = [str(Path(danet.__file__).parents[1]), str(Path(__file__).parent)]
    running = [
        subprocess.Popen(
            [sys.executable, "-c", TWO, str(tmp_path), str(rank), *roots],
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    said = [process.communicate(timeout=100)[1] for process in running]
    assert [process.returncode for process in running] == [0, 0], said
    (tmp_path / "alone").mkdir()
    dataset, counts = write_set(tmp_path / "alone")
    one = evaluate(Reddest(), dataset, crop=11, stride=8, max_images=1, progress=False)
    for rank, read in ((0, [0, 2, 4, 0]), (1, [1, 3])):
        got = torch.load(tmp_path / f"{rank}.pt", weights_only=True)
        assert got[0].tolist() == counts.tolist()
        assert torch.equal(got[1], one.counts)
        assert got[2] == read
    assert "evaluate: 5 of 5 images" in said[0]
    assert "evaluate:" not in said[1]


def test_progress_is_on_stderr_or_nowhere(tmp_path, capsys):
    dataset, _ = write_set(tmp_path)
    evaluate(Reddest(), dataset, progress=False)
    assert capsys.readouterr() == ("", "")
    evaluate(Reddest(), dataset)
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("evaluate: 5 of 5 images, ")


def test_what_does_not_fit_is_named(tmp_path):
    dataset, _ = write_set(tmp_path)
    with pytest.raises(ValueError, match="evaluate: the model has 4 classes, the data set 3"):
        evaluate(danet.create_model("fcn_tiny", 4), dataset)
    with pytest.raises(ValueError, match="evaluate: the model has 5 classes, the data set 3"):
        evaluate(nn.Conv2d(3, 5, 1), dataset)  # which does not say so itself
    with pytest.raises(ValueError, match="evaluate: max_images must be at least 1, got 0"):
        evaluate(Reddest(), dataset, max_images=0)
    dataset.items[1] = dataset.items[1]._replace(mask=None)
    with pytest.raises(ValueError, match="evaluate: number 1 has no mask"):
        evaluate(Reddest(), dataset)
    Image.fromarray(np.full(SIZES[0], 7, np.uint8)).save(dataset.items[0].mask)
    with pytest.raises(ValueError, match=r"0_mask.png: the value 7 at row 0, column 0 is no label"):
        evaluate(Reddest(), dataset)


def test_the_numbers_of_the_cityscapes_server():
    expected = [7, 8, 11, 12, 13, 17, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 31, 32, 33]
    for dtype in (np.uint8, np.int64):
        got = train_ids_to_label_ids(np.array([[*range(19), 255]], dtype))
        assert got.dtype == np.uint8
        assert got.tolist() == [[*expected, 0]]
    for wrong in (19, 254, -1, 300):
        with pytest.raises(
            ValueError, match=f"train_ids_to_label_ids: the mask holds {wrong}, expected 0 to 18 or 255"
        ):
            train_ids_to_label_ids(np.array([0, wrong]))
    with pytest.raises(ValueError, match="expected whole numbers, got float64"):
        train_ids_to_label_ids(np.zeros((2, 2)))
