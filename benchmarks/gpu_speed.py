"""The race on a GPU: attention alone at the sizes of DANet, ours against the best of its peers, right before fast.

Every group of cells (one op, size and dtype) is measured in a process of its own, so that a kernel that hangs or takes
the device down costs its own cells only. Within a group all implementations take turns.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from benchmarks import memory
from benchmarks.gpu_cells import CHANNEL, POSITION, STEP, Group
from benchmarks.gpu_measure import measure_group
from benchmarks.peers import peers
from benchmarks.shapes import CHANNEL_SIZES, POSITION_SIZES, Size

SILENCE = 240.0  # seconds without a word after which a process is taken to hang: compiling can take long
STEP_SIZE = Size(8, 9216)
REPEATS = 25  # rounds per comparison; fewer where they would take more than two seconds


def plan(
    backend: str,
    sizes: Sequence[Size] | None = None,
    dtypes: Sequence[str] = ("bf16", "fp16", "fp32"),
    names: Sequence[str] | None = None,
    repeats: int = REPEATS,
) -> list[Group]:
    """The groups of a race, each with the peers among `names` (None: all) and ours."""
    ours = f"danet:{backend}"

    def group(op: str, size: Size, dtype: str) -> Group:
        chosen = [name for name in peers(POSITION if op == STEP else op) if names is None or name in names]
        deterministic = [f"{ours}:deterministic"] if op == POSITION else []
        return Group(op, size, dtype, (*chosen, ours, *deterministic), repeats)

    groups = [group(POSITION, size, dtype) for dtype in dtypes for size in sizes or POSITION_SIZES]
    groups += [group(CHANNEL, size, dtype) for dtype in dtypes for size in sizes or CHANNEL_SIZES]
    if "bf16" in dtypes and STEP_SIZE in (sizes or [STEP_SIZE]):
        groups.append(group(STEP, STEP_SIZE, "bf16"))
    return groups


def run_group(
    group: Group, on_cell: Callable[[dict[str, Any]], None], on_ceilings: Callable[[dict[str, float]], None]
) -> None:
    """Measure a group: every cell comes to `on_cell`, whatever happens.

    An implementation that takes its process down is left out of a second try; if it was the timing of all of them that
    did, the cells without a time have failed.
    """
    while group.names:
        cells = group.cells()
        begun: int | None = None

        def on_progress(message: Any, cells: list = cells) -> None:
            nonlocal begun
            kind, *content = message
            if kind == "ceilings":
                on_ceilings(content[0])
            elif kind == "cell":
                cells[content[0]].status = content[1]["status"]
                on_cell(content[1])
            else:
                begun = content[0] if kind == "begin" else None

        try:
            memory.run_isolated(measure_group, group, on_progress=on_progress, silence=SILENCE)
            return
        except memory.CaseFailed as error:
            blamed = {cells[begun].implementation} if begun is not None else set(group.names)
            for cell in cells:
                if cell.implementation in blamed and not cell.status:
                    cell.status, cell.detail = "failed", str(error)
                    on_cell(cell.row())
            group = replace(group, names=tuple(name for name in group.names if name not in blamed))
