"""PASCAL Context: whole scenes of VOC 2010, 59 of its 459 labels (Mottaghi et al., 2014)."""

from __future__ import annotations

from functools import partial
from pathlib import Path

from .files import MatMasks, check_present, find_root, read_list, read_mat, read_numbered_names, write_list, write_masks
from .palette import voc_palette
from .sample import IGNORE, Item, SegmentationDataset

_CLASSES = """
    aeroplane bag bed bedclothes bench bicycle bird boat book bottle building bus cabinet car cat ceiling chair cloth
    computer cow cup curtain dog door fence floor flower food grass ground horse keyboard light motorbike mountain mouse
    person plate platform pottedplant road rock sheep shelves sidewalk sign sky snow sofa table track train tree truck
    tvmonitor wall water window wood
    """

CLASSES = tuple(_CLASSES.split())
"""Without the background."""

PALETTE = tuple(voc_palette(1 + len(CLASSES)))
"""Of the numbers in the mask files: the background first."""

MODES = ("59", "60", "59-reported")

_MASKS = "SegmentationClassContext"
_LISTS = Path("ImageSets", "SegmentationContext")
_BELOW = ("VOC2010", "VOCdevkit/VOC2010")


class PascalContext(SegmentationDataset):
    """VOC2010/JPEGImages/*.jpg with SegmentationClassContext/*.png, by the lists in ImageSets/SegmentationContext.

    The masks hold 0 for the background, and 1 to 59. `prepare("context", ...)` makes them.

    Args:
        root: the folder VOC2010, or one of the two above it.
        split: "train" or "val", or any list that is there.
        mode: "59": 59 classes, the background is ignored; "60": the background is class 0; "59-reported": as "59",
            but in the mean IoU the background counts as one class more, of IoU 0: mIoU59 * 59/60. The paper reports
            60 classes, and the authors' code trains 59.

    Raises:
        FileNotFoundError: a folder or a list is not there, or an image has no mask.
        ValueError: `mode` is unknown.
    """

    def __init__(self, root: Path | str, split: str = "train", mode: str = "59") -> None:
        if mode not in MODES:
            raise ValueError(f"PascalContext: mode must be one of {', '.join(MODES)}, got {mode!r}")
        self.mode = mode
        self.background_counts_as_zero = mode == "59-reported"
        home = find_root(root, _BELOW, "JPEGImages")
        names = read_list(home / _LISTS / f"{split}.txt")
        items = [Item(name, home / "JPEGImages" / f"{name}.jpg", home / _MASKS / f"{name}.png") for name in names]
        if mode == "60":
            super().__init__(check_present(items), ("background", *CLASSES), PALETTE)
        else:
            table = {0: IGNORE, IGNORE: IGNORE} | {number + 1: number for number in range(len(CLASSES))}
            super().__init__(check_present(items), CLASSES, PALETTE[1:], table)


def prepare_context(root: Path | str, annotations: Path | str) -> list[str]:
    """Write SegmentationClassContext/*.png from the 459 labels, and the lists of train and val if there are none.

    Args:
        root: the folder VOC2010, or one of the two above it.
        annotations: a folder of *.mat, each with LabelMap [H, W], and labels.txt beside them or one folder above,
            with lines such as "284: person". Labels go by their names; all but the 59 are background. Takes scipy.

    Returns:
        Lines that say what was done.

    Raises:
        FileNotFoundError: a folder or a file is not there.
        ValueError: labels.txt lacks one of the 59 classes, or a label map holds a number that it lacks.
    """
    home = find_root(root, _BELOW, "JPEGImages")
    folder = Path(annotations)
    files = sorted(folder.glob("*.mat"))
    if not files:
        raise FileNotFoundError(f"there are no annotations {folder}/*.mat")
    labels = next((path for path in (folder / "labels.txt", folder.parent / "labels.txt") if path.is_file()), None)
    if labels is None:
        raise FileNotFoundError(f"there is no labels.txt in {folder} or the folder above")
    items = [Item(path.stem, home / "JPEGImages" / f"{path.stem}.jpg", path) for path in files]
    dataset = MatMasks(items, ("background", *CLASSES), PALETTE, _table(labels), partial(read_mat, field="LabelMap"))
    written = write_masks(dataset, home / _MASKS, PALETTE)
    lines = [f"{folder}: {len(files)} annotations", f"{home / _MASKS}: {written} masks written"]
    for split in ("train", "val"):
        lines.append(_write_split(home, split, {path.stem for path in files}))
    return lines


def _table(labels: Path) -> dict[int, int]:
    """By number among the 459: the number in the mask, 0 for the background."""
    names = {number: name.replace(" ", "") for number, name in read_numbered_names(labels).items()}
    missing = [name for name in CLASSES if name not in names.values()]
    if missing:
        raise ValueError(f"{labels} has no {', '.join(missing)}; expected the list of the 459 labels")
    wanted = {name: number for number, name in enumerate(CLASSES, 1)}
    return {0: 0} | {number: wanted.get(name, 0) for number, name in names.items()}


def _write_split(home: Path, split: str, annotated: set[str]) -> str:
    """The split is that of VOC 2010."""
    target, source = home / _LISTS / f"{split}.txt", home / "ImageSets" / "Main" / f"{split}.txt"
    if target.is_file():
        return f"{target}: was there, {len(read_list(target))} names"
    if not source.is_file():
        return f"{target}: not written, there is no {source} to take the split from"
    names = [name for name in read_list(source) if name in annotated]
    write_list(target, names)
    return f"{target}: {len(names)} names written"
