"""One group of the GPU race, measured in a process of its own: right first, then memory, then time, taking turns."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from functools import partial
from math import isfinite

import torch
from torch import Tensor

from benchmarks import memory
from benchmarks.correctness import Gate
from benchmarks.dry_run import FakeClock
from benchmarks.gpu_cells import MODES, POSITION, STEP, Cell, Group
from benchmarks.gpu_timing import GpuClock, Timed
from benchmarks.implementations import DTYPES, Block, Case, make_block, on_tensor_cores
from benchmarks.peers import Peer
from benchmarks.timing import median

REPLAY_LIMIT = 0.02  # relative difference of two runs of one implementation
PEER_LIMIT = 0.25  # relative error from which a peer computes something else
LARGE, LARGE_REPEATS = 65536, 3  # above this N so many rounds at most


class Problem:
    """The inputs of a group, and if it is to be checked the gate that its implementations must pass."""

    def __init__(self, group: Group, *, checked: bool = True) -> None:
        op = POSITION if group.op == STEP else group.op
        self.dtype = DTYPES[group.dtype]
        block = make_block(Case(op, "", group.size.crop, group.dtype, group.size.batch, True, group.device))
        self.block: Block | None = None
        self._autocast = nullcontext
        if group.op == STEP:  # features as a layer under autocast leaves them, parameters in fp32
            assert block.projections is not None
            block.projections.float()
            block.gamma = block.gamma.detach().float().requires_grad_()
            self.block, self._autocast = block, partial(torch.autocast, group.device, dtype=self.dtype)
        with self._autocast(), torch.no_grad():
            self.operands = [operand.detach() for operand in block.operands()]
        self.dout = block.dout
        self.gate = Gate(block, self.operands) if checked else None

    def whole(self, peer: Peer, train: bool) -> tuple[Tensor, ...]:
        """(out, gradients when training), from [B, C, H, W] to [B, C, H, W]."""
        with peer.context():
            if self.block is not None:
                with self._autocast():
                    return self.block.run(peer.call)
            return _run(peer.call, self.operands, self.dout if train else None)

    def core(self, peer: Peer, train: bool) -> Callable[[], tuple[Tensor, ...]] | None:
        """The call of a peer with a layout of its own, on inputs that have it already."""
        if peer.pack is None or self.block is not None:
            return None
        with torch.no_grad():
            packed = peer.pack(*(operand.flatten(2) for operand in self.operands[:3]))
            dout = torch.randn_like(peer.attend(*packed)) if train else None
        return partial(_run, peer.attend, packed, dout)

    def judge(self, cell: Cell, peer: Peer, out: Tensor) -> None:
        """Put the error into the cell, and "wrong" if it is too large."""
        assert self.gate is not None
        with peer.context(), self._autocast():
            if self.block is not None:  # `out` comes of roundings of its own: judge the attention on known operands
                out = _run(peer.call, self.operands, None)[0].to(self.dtype)  # that of eager is fp32, as gamma is
            check = partial(self.gate.check, attention=peer.call) if cell.mode == "training" else self.gate.check_output
            error = check(out, tensor_cores=on_tensor_cores(cell.implementation))
        cell.largest_error, cell.error_of_limit = _plain(error.largest), _plain(error.share)
        cell.relative_error = _plain(error.relative)
        if not (error.passes if cell.ours else error.relative <= PEER_LIMIT):  # NaN is wrong
            cell.status = "wrong"
            cell.detail = f"{100 * error.share:.0f} % of the error limit, relative error {error.relative:.1e}"


def _run(attention: Callable[..., Tensor], operands: Iterable[Tensor], dout: Tensor | None) -> tuple[Tensor, ...]:
    leaves = [operand.detach().requires_grad_(dout is not None) for operand in operands]
    with torch.set_grad_enabled(dout is not None):
        out = attention(*leaves)
    return (out, *torch.autograd.grad(out, leaves, dout)) if dout is not None else (out,)


def _plain(value: float) -> float | str:
    """JSON has neither NaN nor infinity."""
    return value if isfinite(value) else str(value)


def measure_group(group: Group) -> None:
    """In a process of its own. Reports ("begin", index), ("cell", index, row), ("timing",), ("ceilings", seconds)."""
    os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")  # this process is a daemon, which may have no children
    clock = group.clock()
    ceilings = clock.ceilings()
    problem = Problem(group)
    cells, timed = group.cells(), {}
    for index, cell in enumerate(cells):
        memory.report_progress(("begin", index))
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            try:
                timed[index] = _prepare(cell, group.find(cell.implementation), problem, clock)
            except Exception as error:  # whatever a peer raises is a reason, not an end
                reasons = [memory.describe(error), *(" ".join(str(warning.message).split()) for warning in said)]
                cell.status, cell.detail = "failed", "; ".join(dict.fromkeys(reasons))[:600]
        clock.check()
        if cell.status:
            memory.report_progress(("cell", index, cell.row()))
    memory.report_progress(("timing",))
    repeats = min(group.repeats, LARGE_REPEATS) if group.size.positions > LARGE else group.repeats
    for mode in MODES:
        of_mode = {index: calls for index, calls in timed.items() if calls and cells[index].mode == mode}
        calls = {(index, what): call for index, its in of_mode.items() for what, call in its.items()}
        if not calls:
            continue
        seconds = clock.interleaved(ceilings | calls, repeats)
        memory.report_progress(("ceilings", {name: median(seconds[name]) for name in ceilings}))
        for index, its in of_mode.items():
            _record(cells[index], its, {what: seconds[index, what] for what in its})
            memory.report_progress(("cell", index, cells[index].row()))


def _prepare(cell: Cell, peer: Peer, problem: Problem, clock: GpuClock | FakeClock) -> dict[str, Timed]:
    """The calls of a cell, ready to be timed: none if the cell gets no time, as its status then says."""
    train = cell.mode == "training"
    reason = peer.why_not(cell.dtype, train)
    if reason is not None:
        cell.status, cell.detail = "cannot run", reason
        return {}
    whole = partial(problem.whole, peer, train)
    out = whole()[0].detach()
    problem.judge(cell, peer, out)
    if cell.status:
        return {}
    cell.peak_extra_bytes = clock.peak(whole)
    calls = {"whole": clock.prepare(whole, cell.peak_extra_bytes)}
    _check_replay(calls["whole"], out)
    core = problem.core(peer, train)
    if core is not None:
        calls["core"] = clock.prepare(core, cell.peak_extra_bytes)
    for call in calls.values():
        call.result = None  # the memory of one graph is free for the next
    return calls


def _check_replay(timed: Timed, out: Tensor) -> None:
    """A graph computes what the call itself did: also where the first run found memory that happened to be right."""
    if timed.result is not None:
        replayed = timed.result[0].detach()
        replayed.fill_(torch.nan)
        timed.run()
        error = (replayed.double() - out.double()).norm() / out.double().norm()
        if not error <= REPLAY_LIMIT:
            raise RuntimeError(f"its CUDA graph returns something else: relative difference {float(error):.1e}")


def _record(cell: Cell, timed: dict[str, Timed], seconds: dict[str, list[float]]) -> None:
    cell.status = "measured"
    cell.whole_runs, cell.runs = seconds["whole"], seconds.get("core", seconds["whole"])
    cell.whole_seconds, cell.seconds = median(cell.whole_runs), median(cell.runs)
    cell.timed_by = max((call.how for call in timed.values()), key=len)
