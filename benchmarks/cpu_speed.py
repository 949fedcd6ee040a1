"""The race on a CPU: the speed goals of its kernels, against eager and against a large torch.mm in the same run.

The attention runs alone, without projections, at N = 9216 (a 768 x 768 crop). Every figure is a ratio of medians
of interleaved runs; a kernel that breaks the error rule gets WRONG instead.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from benchmarks import report
from benchmarks.correctness import Gate
from benchmarks.goals import Row
from benchmarks.implementations import DTYPES, OPS, Attention, Block, Case, attention, make_block
from benchmarks.shapes import CHANNELS, QUERY_CHANNELS, Crop
from benchmarks.timing import interleaved, median

POSITION, CHANNEL = OPS
MM_SIZE = 4096  # of the square torch.mm that says what the machine can do
_IMPORT = "import torch, time; start = time.perf_counter(); import danet_kernels; print(time.perf_counter() - start)"


def attention_rows(
    case: Case, goal: float | None, repeats: int, *, mm_goal: float | None = None, find: Callable = attention
) -> list[Row]:
    """Our time against eager's, and given `mm_goal` our FLOP rate against that of torch.mm."""
    mode = "forward + backward" if case.train else "forward"
    title = f"{case.op.replace('_', ' ')}, {mode}, {case.dtype}, N = {case.crop.positions}"
    block = make_block(case)
    ours, eager = find(case.op, case.name), find(case.op, "eager")
    operands = [operand.detach().requires_grad_(case.train) for operand in block.operands()]
    run = partial(_run, block, operands)
    gate = Gate(block)
    error = gate.check(run(ours), ours)
    if not error.passes:
        return [Row(f"{title}, to eager", None, "x", goal, note=f"WRONG: {100 * error.share:.0f} % of the error limit")]
    calls: dict[str, Callable[[], object]] = {"ours": partial(run, ours), "eager": partial(run, eager)}
    if mm_goal is not None:
        left, right = torch.randn(2, MM_SIZE, MM_SIZE, dtype=DTYPES[case.dtype])
        calls["mm"] = partial(torch.mm, left, right)
    for name in calls.keys() - {"ours"}:
        calls[name]()  # ours has run
    seconds = interleaved(calls, repeats)
    took = {name: median(runs) for name, runs in seconds.items()}
    note = f"{report.milliseconds(took['ours'])}, eager {report.milliseconds(took['eager'])}"
    rows = [Row(f"{title}, to eager", took["eager"] / took["ours"], "x", goal, note=note, seconds=seconds)]
    if mm_goal is not None:
        flops = 2 * case.crop.positions**2 * (CHANNELS + QUERY_CHANNELS)
        rate, mm_rate = flops / took["ours"], 2 * MM_SIZE**3 / took["mm"]
        note = f"{rate / 1e9:.0f} GFLOP/s, torch.mm {mm_rate / 1e9:.0f} GFLOP/s"
        rows.append(Row(f"{title}, to torch.mm", rate / mm_rate, "x", mm_goal, note=note))
    return rows


def _run(block: Block, operands: list[Tensor], function: Attention) -> Tensor:
    with torch.set_grad_enabled(block.train):
        out = function(*operands)
    if block.train:
        torch.autograd.grad(out, operands, block.dout)
    return out


def overhead_rows(backend: str) -> list[Row]:
    """Microseconds of a call whose map has 4 x 4 positions: the price of a call, not of arithmetic."""
    rows = []
    for op, train, goal in (
        (POSITION, False, 60.0),
        (POSITION, True, 130.0),
        (CHANNEL, False, 60.0),
        (CHANNEL, True, 130.0),
    ):
        x = torch.randn(1, 64, 4, 4, requires_grad=train)
        narrow = torch.randn(1, 8, 4, 4, requires_grad=train)
        operands = (narrow, narrow, x) if op == POSITION else (x,)
        function = attention(op, backend)
        with torch.set_grad_enabled(train):
            best = min(_per_call(partial(function, *operands)) for _ in range(5))
        title = f"{op.replace('_', ' ')}, one call on a 4 x 4 map, {'with' if train else 'without'} grad"
        rows.append(Row(title, 1e6 * best, " us", goal, at_least=False))
    return rows


def _per_call(call: Callable[[], object], count: int = 1000) -> float:
    start = time.perf_counter()
    for _ in range(count):
        call()
    return (time.perf_counter() - start) / count


def import_row() -> Row:
    root = Path(__file__).resolve().parent.parent
    runs = [
        float(
            subprocess.run([sys.executable, "-c", _IMPORT], cwd=root, capture_output=True, check=True, text=True).stdout
        )
        for _ in range(3)
    ]
    return Row(
        "import danet_kernels, beyond import torch", min(runs), " s", 0.3, at_least=False, seconds={"ours": runs}
    )


def measure(options: argparse.Namespace, show: Callable[[Row], None]) -> list[Row]:
    rows: list[Row] = []
    name = f"danet:{options.backend}"

    def add(*found: Row) -> None:
        for row in found:
            rows.append(row)
            show(row)

    def case(op: str, dtype: str, train: bool, crop: Crop = options.crop) -> Case:
        return Case(op, name, crop, dtype, train=train)

    repeats = options.repeats
    add(*attention_rows(case(POSITION, "fp32", False), 1.4, repeats, mm_goal=0.85))
    add(*attention_rows(case(POSITION, "fp32", True), 1.4, repeats))
    if torch.cpu._is_avx512_bf16_supported():
        add(*attention_rows(case(POSITION, "bf16", False), 1.2, repeats))
        add(*attention_rows(case(POSITION, "bf16", True), 1.0, repeats))
    else:
        for train, base in ((False, rows[0]), (True, rows[2])):
            add(_against_fp32(attention_rows(case(POSITION, "bf16", train), None, repeats)[0], base))
    add(*attention_rows(case(CHANNEL, "fp32", False), 1.15, 2 * repeats))
    add(*attention_rows(case(CHANNEL, "fp32", True), 1.3, repeats))
    if options.large:
        add(*attention_rows(case(POSITION, "fp32", False, Crop(1024, 2048)), 1.0, 1))
    add(*overhead_rows(name), import_row())
    return rows


def _against_fp32(bf16: Row, fp32: Row) -> Row:
    """Where the CPU has no bf16 arithmetic, the goal is our own fp32 time."""
    title = bf16.name.replace("to eager", "to our fp32 time")
    if "ours" not in bf16.seconds or "ours" not in fp32.seconds:
        return Row(title, None, "x", 1.15, at_least=False, note=bf16.note or fp32.note)
    ratio = median(bf16.seconds["ours"]) / median(fp32.seconds["ours"])
    return Row(title, ratio, "x", 1.15, at_least=False, note=bf16.note, seconds=bf16.seconds)
