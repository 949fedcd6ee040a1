"""What the race on a GPU is made of: cells, groups of them that take turns, and the work that a cell stands for."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

from benchmarks import dry_run
from benchmarks.gpu_timing import GpuClock
from benchmarks.implementations import DTYPES, OPS
from benchmarks.peers import Peer, find
from benchmarks.shapes import CHANNELS, QUERY_CHANNELS, Size

POSITION, CHANNEL = OPS
STEP = "position_attention_step"  # position attention, projections included, trained under autocast
MODES = ("forward", "training")  # training: forward and backward

FORMULAS = {
    POSITION: "forward 2 (D + C) N N B, backward 2 (3 D + 2 C) N N B",
    CHANNEL: "forward 4 C C N B, backward 6 C C N B",
}


def flops(op: str, size: Size, part: str) -> int:
    """Floating-point operations that the definition needs; part: "forward", "backward" or "training", their sum."""
    if part == "training":
        return flops(op, size, "forward") + flops(op, size, "backward")
    if op == CHANNEL:
        return {"forward": 4, "backward": 6}[part] * CHANNELS**2 * size.positions * size.batch
    widths = {"forward": QUERY_CHANNELS + CHANNELS, "backward": 3 * QUERY_CHANNELS + 2 * CHANNELS}
    return 2 * widths[part] * size.positions**2 * size.batch


def least_bytes(op: str, size: Size, part: str, dtype: str) -> int:
    """Bytes that have to move if every input is read once and every output written once."""
    if part == "training":
        return least_bytes(op, size, "forward", dtype) + least_bytes(op, size, "backward", dtype)
    if op == CHANNEL:
        channels = {"forward": 2, "backward": 3}[part] * CHANNELS  # x, out; x, dout, dx
    else:  # query, key, value, residual, out; the same three, dout, and their gradients
        channels = {"forward": 2 * QUERY_CHANNELS + 3 * CHANNELS, "backward": 4 * QUERY_CHANNELS + 3 * CHANNELS}[part]
    return channels * size.positions * size.batch * DTYPES[dtype].itemsize


@dataclass
class Cell:
    """One implementation at one size, dtype and mode.

    status: "measured", "wrong" (no time then), "failed", "cannot run", or "" before it is known.
    """

    op: str
    batch: int
    positions: int
    dtype: str
    implementation: str
    mode: str
    label: str = ""
    holds_map: bool = False
    stock: bool = True
    status: str = ""
    detail: str = ""  # why there is no time
    seconds: float | None = None  # median; in the layout of the implementation
    runs: list[float] = field(default_factory=list)
    whole_seconds: float | None = None  # from [B, C, H, W] to [B, C, H, W], gamma and residual included
    whole_runs: list[float] = field(default_factory=list)
    timed_by: str = ""  # "graph", or "events" and why it cannot be captured
    peak_extra_bytes: int | None = None
    largest_error: float | str | None = None
    error_of_limit: float | str | None = None
    relative_error: float | str | None = None

    @property
    def ours(self) -> bool:
        return self.implementation.startswith("danet:")

    def row(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class Group:
    """Cells that share their inputs and take turns; small and picklable."""

    op: str
    size: Size
    dtype: str
    names: tuple[str, ...]
    repeats: int = 25
    device: str = "cuda"  # "cpu" for a dry run

    def __str__(self) -> str:
        return f"{self.op} {self.size} {self.dtype}"

    def cells(self) -> list[Cell]:
        found = []
        for name in self.names:
            peer = self.find(name)
            for mode in MODES[self.op == STEP :]:
                cell = Cell(self.op, self.size.batch, self.size.positions, self.dtype, name, mode)
                cell.label, cell.holds_map, cell.stock = peer.label, peer.holds_map, peer.stock
                found.append(cell)
        return found

    def find(self, name: str) -> Peer:
        op = POSITION if self.op == STEP else self.op
        return dry_run.find(op, name) if self.device == "cpu" else find(op, name)

    def clock(self) -> GpuClock | dry_run.FakeClock:
        return dry_run.FakeClock() if self.device == "cpu" else GpuClock()
