"""The main job: how much memory and time both attention blocks of DANet take at real sizes, ours against plain torch.

    python benchmarks/attention_memory.py

Every figure is measured here and now, unless it is marked ~; docs/benchmarks.md says how. The result of the timed call
is compared with fp64 first: a kernel of ours that breaks the error rule gets WRONG in place of a time.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

from benchmarks import memory, record, report
from benchmarks.correctness import Error, Gate
from benchmarks.implementations import (
    DTYPES,
    OPS,
    PEERS,
    Attention,
    Case,
    attention,
    make_block,
    on_tensor_cores,
    run_block,
    warm_up,
)
from benchmarks.options import Parser
from benchmarks.prediction import LARGEST_MEASURED_MAP, holds_map, predict_extra_memory
from benchmarks.report import Cell
from benchmarks.shapes import CHANNELS, CROPS, QUERY_CHANNELS, Crop, parse_crop
from benchmarks.timing import clock, interleaved, median
from danet_kernels import available_backends
from danet_kernels.backends import BACKENDS

# What is compared unless --backends says otherwise. In Triton's interpreter there is nothing to time.
COMPILED = [name for name in BACKENDS if name != "eager" and not getattr(BACKENDS[name], "INTERPRETED", False)]
REPEATS = 3  # of each timed run; one of position attention above N = 16384


def plan(options: argparse.Namespace) -> list[list[Cell]]:
    """The cells of the table, one list per op and crop, with those that will not be run marked as such."""
    device = options.device
    free = memory.free_memory(device)
    groups = []
    for op in OPS:
        refused = _refusals(op, DTYPES[options.dtype], device)
        ours = options.backends or [name for name, why in refused.items() if not why and name in COMPILED]
        names = [*PEERS, *(f"danet:{name}" for name in ours or ["eager"])]
        for crop in options.crops:
            group = []
            for name in names:
                if attention(op, name) is None:
                    continue
                case = Case(op, name, crop, options.dtype, options.batch, options.train, device)
                group.append(_planned(case, refused, free, full=options.full))
            groups.append(group)
    return groups


def _refusals(op: str, dtype: torch.dtype, device: str) -> dict[str, list[str]]:
    """For each backend the reasons why it cannot run `op`."""
    small = torch.zeros(1, 8, 2, 2, dtype=dtype, device=device)
    return available_backends(op, *([small] * (3 if op == "position_attention" else 1)))


def _planned(case: Case, refused: dict[str, list[str]], free: int, *, full: bool) -> Cell:
    reasons = refused.get(case.name.removeprefix("danet:"), []) if case.name.startswith("danet:") else []
    if reasons:
        return Cell(case, "cannot run", "; ".join(reasons))
    needed = predict_extra_memory(case)
    if holds_map(case) and case.crop.positions > LARGEST_MEASURED_MAP and not full:
        return Cell(case, "predicted", memory=needed)
    if needed > free:
        return Cell(case, "too large", f"needs {report.gibibytes(needed)}, {report.gibibytes(free)} are free")
    return Cell(case)


def measure(group: list[Cell], on_run: Callable[[int], None]) -> None:
    """Fill in the cells of one op and crop that are to be run; on_run is told the work of each finished run."""
    for cell in group:
        if cell.status == "measured":
            case = cell.case
            try:
                cell.memory = memory.peak_extra_memory(
                    partial(make_block, case), partial(run_block, case.name), partial(warm_up, case), device=case.device
                )
            except (memory.CaseFailed, torch.OutOfMemoryError) as error:
                cell.status, cell.detail = "failed", memory.describe(error)
            on_run(work(case))
    running = {cell.case.name: cell for cell in group if cell.status == "measured"}
    if not running:
        return
    cases = [cell.case for cell in running.values()]
    try:
        if torch.device(cases[0].device).type == "cuda":
            outcomes = time_block(cases)
        else:
            outcomes = memory.run_isolated(time_block, cases, on_progress=on_run)
    except memory.CaseFailed as error:
        outcomes = dict.fromkeys(running, str(error))
    for name, outcome in outcomes.items():
        record_outcome(running[name], outcome)


def record_outcome(cell: Cell, outcome: tuple[list[float], Error] | str) -> None:
    """Put the result of `time_block` into the cell: no time for a kernel of ours that is wrong."""
    if isinstance(outcome, str):
        cell.status, cell.detail = "failed", outcome
        return
    runs, cell.error = outcome
    if cell.ours and not cell.error.passes:
        cell.status = "wrong"
        return
    cell.runs, cell.seconds = runs, median(runs)


def time_block(
    cases: list[Case], find: Callable[[str, str], Attention | None] = attention
) -> dict[str, tuple[list[float], Error] | str]:
    """By name the seconds of each run and the error of the first, or what went wrong.

    All cases share op, crop and inputs. The first run of each is checked; then the implementations take turns.
    """
    block = make_block(cases[0])
    gate = Gate(block)
    outcomes: dict[str, tuple[list[float], Error] | str] = {}
    calls: dict[str, Callable[[], object]] = {}
    for case in cases:
        function = find(case.op, case.name)
        assert function is not None  # planned cases have one
        try:
            warm_up(case)
            kept: list[torch.Tensor] = []
            seconds = clock(partial(_keep, kept, partial(block.run, function)), case.device)
            error = gate.check(kept.pop(), function, tensor_cores=on_tensor_cores(case.name))
        except (RuntimeError, NotImplementedError, ValueError, TypeError) as problem:
            outcomes[case.name] = memory.describe(problem)
            continue
        memory.report_progress(work(case))
        outcomes[case.name] = ([seconds], error)
        if error.passes or not case.name.startswith("danet:"):
            calls[case.name] = partial(block.run, function)
    later = interleaved(
        calls, repeats(cases[0]) - 1, cases[0].device, lambda name: memory.report_progress(work(cases[0]))
    )
    for name, runs in later.items():
        outcomes[name][0].extend(runs)
    return outcomes


def _keep(kept: list[torch.Tensor], call: Callable[[], tuple[torch.Tensor, ...]]) -> None:
    kept.append(call()[0])


def repeats(case: Case) -> int:
    return 1 if case.op == "position_attention" and case.crop.positions > LARGEST_MEASURED_MAP else REPEATS


def work(case: Case) -> int:
    """Multiply-adds of one forward pass, the unit of the progress bar."""
    positions = case.crop.positions
    channel = 2 * CHANNELS**2 * positions
    return case.batch * (positions**2 * (CHANNELS + QUERY_CHANNELS) if case.op == OPS[0] else channel)


def total_work(group: list[Cell]) -> int:
    runs = 1 + repeats(group[0].case)  # one for memory
    return sum(runs * work(cell.case) for cell in group if cell.status == "measured")


def predict_times(groups: list[list[Cell]]) -> None:
    """A predicted cell gets the time of its largest measured crop, times the growth from that crop to its own.

    The growth is that of the peer without a map, which ran at both crops, so that a machine that was busier at one of
    them does not bend the comparison; without that peer it is the ratio of N * N.
    """
    cells = [cell for group in groups for cell in group]
    times = {(cell.case.op, cell.case.name, cell.case.crop): cell.seconds for cell in cells if cell.runs}
    for cell in cells:
        case = cell.case
        crops = [crop for op, name, crop in times if (op, name) == (case.op, case.name)]
        if cell.status != "predicted" or not crops:
            continue
        largest = max(crops, key=lambda crop: crop.positions)
        growth = (case.crop.positions / largest.positions) ** 2
        peer = [times.get((case.op, "sdpa-padded", crop)) for crop in (largest, case.crop)]
        if peer[0] and peer[1]:
            growth = peer[1] / peer[0]
        cell.seconds = times[case.op, case.name, largest] * growth


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = Parser(prog="attention_memory.py", description=__doc__.partition("\n")[0])
    add = parser.add_argument
    add("--train", action="store_true", help="forward and backward instead of forward alone")
    add("--crops", nargs="+", metavar="HxW", help="crops in pixels, such as 512x512 (default: the four of DANet)")
    add("--dtype", default="fp32", help=f"one of {', '.join(DTYPES)} (default: fp32)")
    add("--batch", type=int, default=1, help="crops per batch (default: 1)")
    add("--backends", nargs="+", metavar="NAME", help="backends of danet_kernels (default: every fused one)")
    add("--device", help="cpu or cuda (default: cuda where there is one)")
    add("--json", metavar="FILE", help="write every figure and the environment to FILE")
    add("--plot", metavar="FILE", help="draw memory and time against crop size (needs matplotlib)")
    add("--full", action="store_true", help="measure what is otherwise predicted (up to 9 GiB, 18 GiB with --train)")
    return parser.validated(arguments, _validate)


def _validate(options: argparse.Namespace) -> None:
    if options.dtype not in DTYPES:
        raise ValueError(f"unknown dtype {options.dtype!r}, expected one of {', '.join(DTYPES)}")
    if options.batch < 1:
        raise ValueError(f"--batch must be at least 1, got {options.batch}")
    options.crops = list(CROPS) if options.crops is None else _crops(options.crops)
    known = available_backends(OPS[0])
    for name in options.backends or []:
        if name not in known:
            raise ValueError(f"unknown backend {name!r}, expected one of {', '.join(known)}")
    options.backends = list(dict.fromkeys(options.backends or []))
    if options.device not in (None, "cpu", "cuda"):
        raise ValueError(f"unknown device {options.device!r}, expected cpu or cuda")
    if options.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda: torch sees no GPU")
    options.device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    record.check_writable(options.json)
    record.check_writable(options.plot)
    if options.plot is not None:
        from benchmarks import plot

        plot.check(options.plot)


def _crops(texts: list[str]) -> list[Crop]:
    crops = {parse_crop(part) for text in texts for part in text.split(",")}
    return sorted(crops, key=lambda crop: crop.positions)


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    start = time.perf_counter()
    environment = record.environment(options.device)
    groups = plan(options)
    bar = report.Progress(sum(total_work(group) for group in groups))
    printed = None
    for index, group in enumerate(groups):
        bar.label = f"{group[0].case.op.replace('_', ' ')} {group[0].case.crop}"
        measure(group, bar.advance)
        predict_times(groups[: index + 1])
        bar.clear()
        if group[0].case.op != printed:
            print(report.heading(group[0].case, environment), flush=True)
            printed = group[0].case.op
        print(report.block(group), flush=True)
    seconds = time.perf_counter() - start
    print(report.closing(groups, seconds))
    if options.json is not None:
        record.write_json(options.json, "attention_memory", environment, options, report.rows(groups), seconds)
    if options.plot is not None:
        from benchmarks import plot

        plot.draw(options.plot, report.rows(groups), environment)
    return int(any(cell.ours and cell.status in ("wrong", "failed") for group in groups for cell in group))


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:  # the measuring process got it too
        sys.exit("\ninterrupted")
