"""Times and peak memory on a GPU.

A call is captured as a CUDA graph and replayed, so that the launches of its kernels cost it nothing that a network
could not save as well. Before every replay a buffer larger than the L2 cache is written, untimed: the call then finds
its inputs in device memory, as a layer of a network does, and the host has the time to queue what follows.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from benchmarks.memory import GIB, describe

FLUSH_BYTES = 256 * 1024**2  # several times the L2 cache of any GPU so far
LONGEST = 2.0  # seconds for all rounds of one comparison, if three rounds fit
FEWEST = 3  # rounds
LARGEST_GRAPH = 16 * GIB  # what needs more takes so long that its launches do not count
GEMM_SIZE = 8192
COPY_BYTES = 256 * 1024**2


@dataclass
class Timed:
    """A call that is ready to be timed."""

    run: Callable[[], Any]
    how: str = "graph"  # "graph", or "events" and why it cannot be captured
    result: Any = None  # of the capture: what each replay overwrites


class GpuClock:
    """Times calls on the current CUDA device."""

    def __init__(self, device: str = "cuda") -> None:
        self._device = device
        self._stream = torch.cuda.Stream()
        self._pool = torch.cuda.graph_pool_handle()  # one for all graphs: none reads what another left there
        self._flush = torch.empty(FLUSH_BYTES, dtype=torch.uint8, device=device)

    def check(self) -> None:
        """Raises if an earlier kernel has failed: then nothing runs in this process any more."""
        gc.collect()
        torch.cuda.synchronize()
        torch.cuda.empty_cache()

    def peak(self, call: Callable[[], Any]) -> int:
        """Largest number of extra bytes in use during the call, its results included."""
        self.check()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        result = call()
        torch.cuda.synchronize()
        peak = torch.cuda.max_memory_allocated()
        del result
        return peak - before

    def prepare(self, call: Callable[[], Any], peak: int = 0) -> Timed:
        """The call, which has run before and took `peak` bytes, as a graph; as it is where it cannot be captured."""
        if peak > LARGEST_GRAPH:
            return Timed(call, f"events: a graph would keep {peak / GIB:.0f} GiB from the others")
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            call()  # what a stream allocates or a library sets up at its first use
        self.check()
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph, pool=self._pool, stream=self._stream):
                result = call()
        except RuntimeError as error:
            self.check()
            return Timed(call, f"events: {describe(error)}")
        return Timed(graph.replay, result=result)

    def interleaved(self, calls: Mapping[Any, Timed], repeats: int) -> dict[Any, list[float]]:
        """Seconds of every round by name: A B C, A B C, ...; at most `repeats`, fewer if they would take too long."""
        total = sum(runs[0] for runs in self._rounds(calls, 1).values())  # the warm-up of the replays
        return self._rounds(calls, min(repeats, max(FEWEST, int(LONGEST / total))))

    def _rounds(self, calls: Mapping[Any, Timed], count: int) -> dict[Any, list[float]]:
        events: dict[Any, list[tuple[torch.cuda.Event, torch.cuda.Event]]] = {name: [] for name in calls}
        for _ in range(count):
            for name, timed in calls.items():
                start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                self._flush.zero_()
                start.record()
                timed.run()
                stop.record()
                events[name].append((start, stop))
        torch.cuda.synchronize()
        return {name: [start.elapsed_time(stop) / 1e3 for start, stop in pairs] for name, pairs in events.items()}

    def ceilings(self) -> dict[Any, Timed]:
        """What the device can do, to be timed among the rest: a bf16 matrix product and a copy, on random data."""
        left, right = torch.randn(2, GEMM_SIZE, GEMM_SIZE, dtype=torch.bfloat16, device=self._device)
        source = torch.randint(256, (COPY_BYTES,), dtype=torch.uint8, device=self._device)
        product, copy = torch.empty_like(left), torch.empty_like(source)
        calls = {"gemm": lambda: torch.mm(left, right, out=product), "copy": lambda: copy.copy_(source)}
        for call in calls.values():
            call()
        return {name: self.prepare(call) for name, call in calls.items()}


def gemm_rate(seconds: float) -> float:
    """FLOP per second of the matrix product of `ceilings`."""
    return 2 * GEMM_SIZE**3 / seconds


def copy_rate(seconds: float) -> float:
    """Bytes per second of the copy of `ceilings`, read and written."""
    return 2 * COPY_BYTES / seconds
