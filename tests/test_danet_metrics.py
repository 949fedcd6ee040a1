"""Figures of merit against loops over pixels, and how they are shown."""

import math

import numpy as np
import pytest
import torch

from danet.metrics import ConfusionMatrix, confusion_picture

CLASSES = ("road", "sidewalk", "traffic light", "sky")


def masks(seed=0, shape=(3, 7, 11), classes=4, absent=()):
    """A prediction and a target, some of which is ignored."""
    random = np.random.default_rng(seed)
    present = [number for number in range(classes) if number not in absent]
    prediction, truth = (random.choice(present, shape) for _ in range(2))
    truth = np.where(random.random(shape) < 0.5, prediction, truth)
    truth[random.random(shape) < 0.2] = 255
    return prediction, truth


def matrix_of(prediction, truth, classes=4):
    matrix = ConfusionMatrix(classes)
    matrix.update(prediction, truth)
    return matrix


def loops(prediction, truth, classes=4):
    """Intersection and union of every class, right and labelled pixels."""
    both, either, right, labelled = [0] * classes, [0] * classes, 0, 0
    for p, t in zip(prediction.ravel().tolist(), truth.ravel().tolist(), strict=True):
        if t == 255:
            continue
        labelled += 1
        right += p == t
        for number in range(classes):
            both[number] += p == number and t == number
            either[number] += p == number or t == number
    return both, either, right, labelled


@pytest.mark.parametrize("absent", [(), (2,), (0, 3)], ids=str)
def test_all_figures_equal_loops_over_pixels(absent):
    prediction, truth = masks(absent=absent)
    matrix = matrix_of(prediction, truth)
    both, either, right, labelled = loops(prediction, truth)
    for number in range(4):
        expected = both[number] / either[number] if either[number] else math.nan
        assert matrix.iou()[number].item() == pytest.approx(expected, nan_ok=True)
        assert bool(either[number]) == (number not in absent)
    found = [b / e for b, e in zip(both, either, strict=True) if e]
    assert matrix.iou().dtype == torch.float64
    assert matrix.mean_iou() == matrix.mean_iou("zero") == pytest.approx(sum(found) / 4)
    assert matrix.mean_iou("skip") == pytest.approx(sum(found) / (4 - len(absent)))
    assert matrix.mean_iou_with_background_as_zero() == pytest.approx(sum(found) / 5)
    assert matrix.mean_iou_with_background_as_zero("skip") == pytest.approx(sum(found) / (5 - len(absent)))
    assert matrix.pixel_accuracy() == pytest.approx(right / labelled)
    assert matrix.counts.sum().item() == labelled < prediction.size
    assert matrix.counts.dtype == torch.int64


def test_rows_are_the_truth():
    matrix = matrix_of(np.array([[1, 1, 0]]), np.array([[0, 0, 255]]), classes=2)
    assert matrix.counts.tolist() == [[0, 2], [0, 0]]
    rows = matrix.normalised()
    assert rows[0].tolist() == [0, 1]
    assert rows[1].isnan().all()  # no ground truth
    prediction, truth = masks()
    torch.testing.assert_close(matrix_of(prediction, truth).normalised().sum(1), torch.ones(4, dtype=torch.float64))


def test_59_classes_reported_as_60():
    matrix = ConfusionMatrix(59)
    matrix.update(np.arange(59), np.arange(59))
    assert matrix.mean_iou() == 1
    assert matrix.mean_iou_with_background_as_zero() == pytest.approx(59 / 60)


def test_images_add_up_to_one_large_image():
    """The mean IoU is over the set, which is not the mean over images."""
    matrix = ConfusionMatrix(4)
    pairs = [masks(seed, shape) for seed, shape in enumerate([(5, 8), (1, 1), (0, 4), (13,)])]
    for prediction, truth in pairs:
        matrix.update(prediction, truth)
    flat = [np.concatenate([pair[side].ravel() for pair in pairs]) for side in (0, 1)]
    assert torch.equal(matrix.counts, matrix_of(*flat).counts)


@pytest.mark.parametrize("kind", ["uint8", "uint16", "int32", "int64"])
def test_arrays_and_tensors_of_all_whole_numbers(kind):
    prediction, truth = masks()
    expected = matrix_of(prediction, truth).counts
    prediction, truth = prediction.astype(kind), truth.astype(kind)
    assert torch.equal(matrix_of(prediction, truth).counts, expected)
    assert torch.equal(matrix_of(torch.from_numpy(prediction), truth).counts, expected)
    assert torch.equal(matrix_of(prediction[::-1], truth[::-1]).counts, expected)  # negative strides


def test_what_is_predicted_where_nothing_is_labelled_does_not_matter():
    truth = np.array([255, 1])
    assert matrix_of(np.array([255, 1]), truth).counts.sum() == 1
    assert matrix_of(np.array([3, 1]), truth).counts.tolist()[3] == [0] * 4


@pytest.mark.parametrize(
    ("prediction", "truth", "message"),
    [
        ([0, 4], [0, 1], "the prediction holds 4, expected 0 to 3$"),
        ([0, 255], [0, 1], "the prediction holds 255, expected 0 to 3$"),
        ([0, -1], [0, 1], "the prediction holds -1, expected 0 to 3$"),
        ([0, 1], [0, 4], "the target holds 4, expected 0 to 3 or 255$"),
        ([0, 1], [-1, 1], "the target holds -1, expected 0 to 3 or 255$"),
        ([0, 1, 2], [0, 1], r"the prediction \[3\] and the target \[2\] differ in shape"),
        ([0.0, 1.0], [0, 1], "the prediction must hold whole numbers, got float64"),
        ([0, 1], [True, False], "the target must hold whole numbers, got bool"),
    ],
)
@pytest.mark.parametrize("tensors", [False, True])
def test_wrong_values_are_named_and_not_counted(prediction, truth, message, tensors):
    matrix = ConfusionMatrix(4)
    given = [np.array(prediction), np.array(truth)]
    with pytest.raises(ValueError, match=f"ConfusionMatrix: {message.replace(' got ', ' got .*')}"):
        matrix.update(*(map(torch.from_numpy, given) if tensors else given))
    assert matrix.counts.sum() == 0


def test_other_wrong_arguments():
    for count in (0, 256):
        with pytest.raises(ValueError, match=f"num_classes must be from 1 to 255, got {count}"):
            ConfusionMatrix(count)
    matrix = ConfusionMatrix(4)
    for mean in (matrix.mean_iou, matrix.mean_iou_with_background_as_zero):
        with pytest.raises(ValueError, match='absent must be "zero" or "skip", got \'nan\''):
            mean("nan")
    for show in (matrix.table, lambda classes: confusion_picture(matrix, classes)):
        with pytest.raises(ValueError, match="expected 4 names of classes, got 3"):
            show(("a", "b", "c"))


def test_nothing_counted_is_nothing_known():
    matrix = ConfusionMatrix(2)
    assert matrix.iou().isnan().all()
    assert matrix.mean_iou("zero") == 0
    assert math.isnan(matrix.mean_iou("skip"))
    assert math.isnan(matrix.mean_iou_with_background_as_zero("skip"))
    assert math.isnan(matrix.pixel_accuracy())
    assert "absent" in matrix.table("ab")
    assert confusion_picture(matrix, "ab").dtype == np.uint8


def test_the_table_names_both_conventions():
    matrix = ConfusionMatrix(4)
    matrix.counts[0, 0], matrix.counts[0, 1], matrix.counts[1, 1], matrix.counts[3, 3] = 6, 2, 1, 1
    lines = dict(line.rsplit(maxsplit=1) for line in matrix.table(CLASSES).splitlines())
    assert {name.strip(): value for name, value in lines.items()} == {
        "road": "75.00",
        "sidewalk": "33.33",
        "traffic light": "absent",
        "sky": "100.00",
        "mIoU (absent classes count 0)": "52.08",
        "mIoU (absent classes left out)": "69.44",
        "pixel accuracy": "80.00",
    }
    assert len({len(line) for line in matrix.table(CLASSES).splitlines()}) == 1  # in columns
    more = set(matrix.table(CLASSES, background_counts_as_zero=True).splitlines())
    assert any("mIoU of 5, background 0 (absent classes count 0)" in line and "41.67" in line for line in more)
    assert any("mIoU of 5, background 0 (absent classes left out)" in line and "52.08" in line for line in more)


def test_the_picture_shows_the_matrix():
    """Rows of the same parts look the same, whatever their counts; another part, another place, another picture."""

    def picture(*rows, names=CLASSES):
        matrix = ConfusionMatrix(4)
        matrix.counts = torch.tensor(rows)
        return confusion_picture(matrix, names)

    def pixels(image, colour):
        return int((image == colour).all(2).sum())

    rows = [[6, 2, 0, 0], [0, 1, 0, 3], [0, 0, 0, 0], [0, 0, 0, 9]]
    one = picture(*rows)
    assert one.dtype == np.uint8
    assert one.ndim == 3
    assert one.shape[2] == 3
    assert np.array_equal(one, picture([60, 20, 0, 0], [0, 100, 0, 300], [0, 0, 0, 0], [0, 0, 0, 1]))
    assert not np.array_equal(one, picture([2, 6, 0, 0], *rows[1:]))
    assert not np.array_equal(one, picture(*rows, names=("road", "sidewalk", "traffic light", "sea")))
    dark, grey = (8, 48, 107), (208, 208, 208)  # 100 %, and unknown
    cell = 300  # pixels that one has at least, besides its letters
    assert cell < pixels(one, dark) < 3 * cell
    assert pixels(picture(*rows[:3], [0, 0, 4, 5]), dark) < cell
    assert 4 * cell < pixels(one, grey) < 12 * cell
    assert pixels(picture(*rows[:2], [0, 0, 1, 0], rows[3]), grey) < cell
    large = confusion_picture(ConfusionMatrix(30), [f"class {number}" for number in range(30)])
    assert large.shape[0] > one.shape[0]
