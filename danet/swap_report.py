"""What swap has found and done, as a table; and the memory that it saves on an image of some size."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

from danet_kernels import memory_estimate

from .swap_find import Found, copy_without_hooks

_HEAD: tuple[str, ...] = (
    *("module", "class", "recognised as", "C / D", "action", "difference"),
    *("saves", "in training", ""),
)


@dataclass
class SwapReport:
    """What swap has found and done. Print it.

    Attributes:
        found: every module that is attention or looks like it.
        crop: height and width in pixels of the image that the savings are for; None: they were not asked for.
        unknown: why the savings are not known, "" if they are.
        already: how many modules were swapped before.
    """

    found: list[Found]
    crop: tuple[int, int] | None = None
    unknown: str = ""
    already: int = 0

    @property
    def swapped(self) -> list[Found]:
        return [one for one in self.found if one.swapped]

    def __str__(self) -> str:
        more = f"{self.already} modules were swapped before: unswap first to do it otherwise" * bool(self.already)
        if not self.found:
            return more or "no position or channel attention was found; nothing is changed"
        lines = [_HEAD, *map(_line, _grouped(self.found))]
        if self.crop is None:
            lines = [(*line[:6], *line[8:]) for line in lines]
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        table = "\n".join("  ".join(map(str.ljust, line, widths)).rstrip() for line in lines)
        table += f"\n{more}" * bool(more)
        if self.crop is None:
            return table
        what = f"peak memory of the operation for one image of {self.crop[0]} x {self.crop[1]} pixels"
        return f"{table}\nsaves: {what}, {f'unknown: {self.unknown}' if self.unknown else 'by estimate'}"


def _grouped(found: Sequence[Found]) -> list[list[Found]]:
    """Look-alikes of one class, of which a network may have dozens, together."""
    groups: dict[object, list[Found]] = {}
    for one in found:
        key = one.path if one.patterns else (one.class_name, one.detail)
        groups.setdefault(key, []).append(one)
    return list(groups.values())


def _line(group: Sequence[Found]) -> tuple[str, ...]:
    one, more = group[0], len(group) - 1
    path = one.path or "(the network)"
    widths = " / ".join(str(width) for width in one.widths if width is not None)
    recognised = f"{one.op.replace('_', ' ')} ({one.by})" if one.patterns else "look-alike"
    saved = ("-", "-") if one.saved is None else tuple(_readable(size) for size in one.saved)
    return (
        f"{path} and {more} more" if more else path,
        one.class_name,
        recognised,
        widths or "-",
        "swapped" if one.swapped else "would swap" if one.agrees else "left alone",
        "-" if one.error is None else f"{one.error:.1e}",
        *saved,
        one.detail,
    )


def _readable(size: int) -> str:
    return f"{round(size / 2**20)} MiB" if size < 2**30 else f"{size / 2**30:,.2f} GiB"


def find_shapes(model: nn.Module, found: Sequence[Found], crop: tuple[int, int]) -> str:
    """Fill in `shape` of the found, for an image of this size. Returns why they are not known, or "".

    A copy of the network without numbers (on torch's meta device) is shown an image without numbers.
    """
    if not any(one.patterns for one in found):
        return ""
    while isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
        model = model.module
    first = next((part.in_channels for part in model.modules() if isinstance(part, nn.Conv2d)), 3)
    problems = []
    for channels in dict.fromkeys((3, first)):
        dtype = next((one.dtype for one in model.parameters() if one.is_floating_point()), torch.float32)
        image = torch.empty(1, channels, *crop, device="meta", dtype=dtype)
        try:
            with torch.random.fork_rng([]), torch.no_grad():
                shapes = _input_shapes(model, [one.module for one in found if one.patterns], image)
        except Exception as error:  # the network's own: whatever it raises, it cannot be shown an image
            line = str(error).strip().partition("\n")[0]
            problems.append(f"the network cannot be run on a tensor {list(image.shape)} without numbers: {line}")
            continue
        if crop in (shape[2:] for shape in shapes.values()):
            return "attention sees the image at its full size: is this the whole network?"
        for one in found:
            one.shape = shapes.get(id(one.module))
        return ""
    return problems[-1]


def estimate_savings(found: Sequence[Found], crop: tuple[int, int], backend: str) -> None:
    """Fill in `saved` of those that agree and have a shape."""
    for one in found:
        if one.agrees and one.shape is not None:
            one.saved = (_saving(one, False, backend), _saving(one, True, backend))


def _saving(one: Found, training: bool, backend: str) -> int:
    parameter = next(one.module.parameters())
    device = parameter.device if parameter.device.type in ("cpu", "cuda") else torch.device("cpu")

    def estimate(name: str) -> int:
        return int(
            memory_estimate(
                one.op,
                one.shape or (),
                parameter.dtype,
                training=training,
                backend=name,
                query_channels=one.widths[1],
                device=device,
            )
        )

    return estimate("eager") - estimate(backend)


def _input_shapes(model: nn.Module, modules: Sequence[nn.Module], image: torch.Tensor) -> dict[int, tuple[int, ...]]:
    """Of the inputs of modules, by their ids; of one that is called more than once the largest."""
    without_numbers: dict[int, object] = {}
    for parameter in model.parameters():
        empty = torch.empty_like(parameter, device="meta")
        without_numbers[id(parameter)] = nn.Parameter(empty, requires_grad=False)
    for buffer in model.buffers():
        without_numbers[id(buffer)] = torch.empty_like(buffer, device="meta")
    shown = copy_without_hooks(model, without_numbers).eval()
    shapes: dict[int, tuple[int, ...]] = {}
    paths = {id(module): path for path, module in model.named_modules()}
    for number in map(id, modules):

        def note(module: nn.Module, inputs: tuple[torch.Tensor, ...], number: int = number) -> None:
            seen = tuple(inputs[0].shape)
            shapes[number] = max(seen, shapes.get(number, ()), key=math.prod)

        shown.get_submodule(paths[number]).register_forward_pre_hook(note)
    shown(image)
    return shapes
