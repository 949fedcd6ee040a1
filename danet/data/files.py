"""What the data sets share: finding their folders, lists of names, .mat files, and masks written as PNG."""

from __future__ import annotations

import importlib
import math
import os
import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from .images import MAX_PIXELS, write_image
from .sample import Colour, Item, SegmentationDataset

SHOWN = 3
"""Of the files that are missing, so many are named."""


def find_root(root: Path | str, below: Sequence[str], marker: str) -> Path:
    """Of `root` and the folders `below` it, the first that has `marker`.

    Raises:
        FileNotFoundError: none has.
    """
    root = Path(root)
    for folder in (root, *(root / name for name in below)):
        if (folder / marker).exists():
            return folder
    places = " or ".join(f"{root}/{name}{marker}" for name in ("", *(f"{name}/" for name in below)))
    raise FileNotFoundError(f"there is no {places}")


def read_list(path: Path) -> list[str]:
    """The names in a text file, one per line.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it names nothing.
    """
    if not path.is_file():
        beside = sorted(other.stem for other in path.parent.glob(f"*{path.suffix}")) if path.parent.is_dir() else []
        raise FileNotFoundError(
            f"there is no list {path}" + (f"; there are {', '.join(beside[:10])}" if beside else "")
        )
    names = [line.split()[0] for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    if not names:
        raise ValueError(f"{path} lists no images")
    return names


def write_list(path: Path, names: Iterable[str]) -> None:
    """One name per line, the file whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    try:
        partial.write_text("".join(f"{name}\n" for name in names), encoding="utf-8")
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def read_numbered_names(path: Path) -> dict[int, str]:
    """The names in a text file with lines such as "12: street sign", by number.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: a line is of another form.
    """
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {path}")
    names = {}
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        if line.strip():
            found = re.fullmatch(r"\s*(\d+)\s*:\s*(.+?)\s*", line)
            if not found:
                raise ValueError(f'{path}, line {number}: expected "NUMBER: NAME", got {line!r}')
            names[int(found[1])] = found[2]
    return names


def check_present(items: Sequence[Item]) -> Sequence[Item]:
    """The items, whose files must be there.

    Raises:
        FileNotFoundError: some are not; it names the first few.
    """
    for what in ("image", "mask"):
        files: list[Path] = [path for path in (getattr(item, what) for item in items) if path is not None]
        missing = [path for path in files if not path.is_file()]
        if missing:
            raise FileNotFoundError(f"{len(missing)} of {len(files)} {what}s are missing: {first_few(missing)}")
    return items


def first_few(things: Sequence[object]) -> str:
    return ", ".join(map(str, things[:SHOWN])) + (", ..." if len(things) > SHOWN else "")


def read_mat(path: Path, field: str, max_pixels: int = MAX_PIXELS) -> np.ndarray:
    """An array of whole numbers out of a MATLAB file, uint16 [H, W].

    Args:
        field: its name; "a.b" is the field b of the structure a.
        max_pixels: larger ones are refused before they are unpacked (but not the field of a structure).

    Raises:
        ImportError: scipy is not installed.
        FileNotFoundError: there is no such file.
        ValueError: it is damaged, has no such field, or that is no such array.
    """
    name, _, member = field.partition(".")
    shape = mat_shapes(path).get(name)
    if shape is None:
        raise ValueError(f"{path} has no {name}")
    if math.prod(shape) > max_pixels:
        raise ValueError(f"{path} is refused: {name} {list(shape)} is more than the {max_pixels:,} pixels read at most")
    values = _scipy(path, lambda io: io.loadmat(path, variable_names=[name])[name])
    if member:
        if values.dtype.names is None or member not in values.dtype.names or values.size != 1:
            raise ValueError(f"{path} has no {field}")
        values = values[member].item()
    if values.ndim != 2 or values.dtype.kind not in "iuf":
        raise ValueError(f"{path}: {field} is {values.dtype} {list(values.shape)}; expected numbers [H, W]")
    with np.errstate(invalid="ignore"):  # what does not fit is found below
        numbers: np.ndarray = values.astype(np.uint16)
    if not np.array_equal(numbers, values):
        strange = values[numbers != values][0]
        raise ValueError(f"{path}: {field} holds {strange}; expected whole numbers from 0 to 65535")
    return numbers


def mat_shapes(path: Path) -> dict[str, tuple[int, ...]]:
    """The shapes of the arrays in a MATLAB file, by their names. Raises as read_mat."""
    return {name: shape for name, shape, _ in _scipy(path, lambda io: io.whosmat(path))}


class MatMasks(SegmentationDataset):
    """Masks that `read` takes out of .mat files, to be written as PNG."""

    def __init__(
        self,
        items: Sequence[Item],
        classes: Sequence[str],
        palette: Sequence[Colour],
        labels: dict[int, int],
        read: Callable[[Path], np.ndarray],
    ) -> None:
        super().__init__(items, classes, palette, labels)
        self._read = read

    def read_mask(self, path: Path) -> np.ndarray:
        return self._read(path)


def write_masks(dataset: SegmentationDataset, folder: Path, palette: Sequence[Colour]) -> int:
    """The class numbers of every mask in a .mat file as folder/NAME.png; those that are there are left.

    Returns how many it wrote.
    """
    written = 0
    for item in dataset.items:
        target = folder / f"{item.name}.png"
        if item.mask is not None and item.mask.suffix == ".mat" and not target.exists():
            write_image(target, dataset.class_numbers(dataset.read_mask(item.mask), item.mask), palette)
            written += 1
    return written


def _scipy(path: Path, read: Callable[[Any], Any]) -> Any:
    """What `read` gives for scipy.io."""
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {path}")
    try:
        scipy_io = importlib.import_module("scipy.io")
    except ImportError as error:
        raise ImportError(f"reading {path} needs scipy: pip install scipy") from error
    try:
        return read(scipy_io)
    except Exception as error:  # of many kinds, by where the damage is
        raise ValueError(f"{path} is damaged, or no MATLAB file of version 5 to 7: {error}") from None
