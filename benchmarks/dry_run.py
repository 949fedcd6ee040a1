"""What stands in for a GPU when `gpu_record.py --dry-run` rehearses on a machine without one.

The clock is a fake, so that no figure of a dry run can be taken for a measurement. The peers are small and some of them
fail, in every way that a peer on a GPU can: each has to end as a cell with a reason.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks import peers
from benchmarks.gpu_timing import Timed
from benchmarks.implementations import eager_position
from benchmarks.peers import Peer

FACTS = {"gpu": "DRY RUN", "gpu_memory": 0, "capability": "0.0", "driver": "DRY RUN", "clocks": "DRY RUN"}
FAILING = ("raises", "out-of-memory", "wrong", "dies", "uncapturable", "missing")

_capturing = False


class FakeClock:
    """The methods of GpuClock. A first call takes 1 ms, the next 2 ms, and so on; in a second comparison twice that."""

    def __init__(self) -> None:
        self._comparisons = 0

    def check(self) -> None:
        pass

    def peak(self, call: Callable[[], Any]) -> int:
        return sum(tensor.nbytes for tensor in call())

    def prepare(self, call: Callable[[], Any], peak: int = 0) -> Timed:
        global _capturing
        _capturing = True
        try:
            result = call()
        except RuntimeError as error:
            return Timed(call, f"events: {error}")
        finally:
            _capturing = False
        return Timed(partial(_replay, result[0], call), result=result)

    def interleaved(self, calls: Mapping[Any, Timed], repeats: int) -> dict[Any, list[float]]:
        for timed in calls.values():
            timed.run()
        self._comparisons += 1
        return {name: [1e-3 * number * self._comparisons] * repeats for number, name in enumerate(calls, start=1)}

    def ceilings(self) -> dict[Any, Timed]:
        return {name: Timed(lambda: None) for name in ("gemm", "copy")}


def _replay(result: Tensor, call: Callable[[], Any]) -> None:
    """As a graph: the tensor of the capture gets its values again."""
    result.detach().copy_(call()[0].detach())


def find(op: str, name: str) -> Peer:
    """As `peers.find`, with the kernels of a GPU replaced by what runs anywhere."""
    if name in FAILING:
        return _failing(name)
    peer = peers.find(op, name if name != "danet:wrong" else "danet:eager")
    if name == "danet:wrong":
        return replace(peer, label=name, attend=_drops_a_key)
    if name.startswith("sdpa"):
        return replace(peer, attend=_sdpa_math, dtypes=("fp32", "bf16", "fp16"))
    return peer


def _failing(name: str) -> Peer:
    if name == "missing":
        return Peer(name, eager_position, needs="no_such_module")
    if name == "wrong":
        return Peer(name, _drops_a_key)
    return Peer(name, partial(_fail, name))


def _fail(how: str, *operands: Tensor) -> Tensor:
    if how == "raises":
        raise NotImplementedError("no kernel for\nthis head dimension")
    if how == "out-of-memory":
        raise torch.OutOfMemoryError("Tried to allocate 64.00 GiB")
    if how == "dies":
        os.kill(os.getpid(), signal.SIGKILL)
    if how == "uncapturable" and _capturing:
        raise RuntimeError("operation not permitted when stream is capturing")
    return eager_position(*operands)


def _drops_a_key(query: Tensor, key: Tensor, value: Tensor, residual: Tensor, gamma: Tensor) -> Tensor:
    return eager_position(query, key.flatten(2)[..., :-1], 2 * value.flatten(2)[..., :-1], residual, gamma)


def _sdpa_math(query: Tensor, key: Tensor, value: Tensor) -> Tensor:  # [B, h, N, C / h]
    with sdpa_kernel(SDPBackend.MATH):
        return torch.nn.functional.scaled_dot_product_attention(query, key, value, scale=1.0)
