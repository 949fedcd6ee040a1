"""Check every backend of this installation on this machine: `python -m danet_kernels.selftest`.

Every backend that can run is compared with the fp64 reference, forward and every gradient, on odd sizes and
all kinds of strides, under the rule of _error_rule.py. Exit status 0 if all results follow the rule, else 1.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

import danet_kernels

from ._error_rule import Verdict, evaluate, judge, yardsticks
from ._layout import accumulator_dtype

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, "fp64": torch.float64}
SHOWN = 20  # wrong results that are described in full


@dataclass(frozen=True)
class Case:
    """One call of an operator; `arrange` says how its tensors lie in memory."""

    batch: int
    channels: int  # C
    positions: tuple[int, ...]  # *S
    keys: tuple[int, ...] = ()  # *T; empty for channel attention
    query_channels: int = 0  # D
    gamma: float | None = 0.75
    residual: bool = True
    arrange: str = "contiguous"
    spread: float = 1.0  # standard deviation of the logits, or of x
    variant: str = "official"

    def make(self, dtype: torch.dtype, device: str, seed: int) -> tuple[dict[str, Tensor], Tensor, dict[str, Any]]:
        """The arguments by name, dout, and the options."""
        generator = torch.Generator().manual_seed(seed)

        def normal(channels: int, positions: tuple[int, ...], deviation: float = 1.0) -> Tensor:
            values = torch.randn(self.batch, channels, *positions, generator=generator) * deviation
            return _arrange(values.to(device, dtype), self.arrange)

        inputs, options = {}, {}
        if self.keys:
            inputs["query"] = normal(self.query_channels, self.positions, self.spread / self.query_channels**0.5)
            inputs["key"] = normal(self.query_channels, self.keys)
            inputs["value"] = normal(self.channels, self.keys)
            if self.residual:
                inputs["residual"] = normal(self.channels, self.positions)
        else:
            inputs["x"] = normal(self.channels, self.positions, self.spread)
            options = {"variant": self.variant, "residual": self.residual}
        if self.gamma is not None:
            inputs["gamma"] = torch.full((1,), self.gamma, dtype=accumulator_dtype(dtype), device=device)
        dout = normal(self.channels, self.positions)
        if self.arrange == "expanded":  # as the gradient of a sum over the last dimension
            dout = dout[..., :1].expand_as(dout)
        return inputs, dout, options


# Sizes on both sides of the kernels' tiles, M != N, and maps from flat to one-hot.
CASES = {
    "position_attention": (
        Case(2, 65, (9, 15), (1, 1), 8),
        Case(5, 33, (1, 7), (1, 7), 17),
        Case(1, 64, (5, 3), (9, 11), 8, gamma=None, residual=False),
        Case(1, 512, (9, 7), (9, 7), 64, spread=3.0),
        Case(1, 31, (127,), (129,), 40, gamma=-0.5),
        Case(1, 63, (8, 16), (16, 32), 16, arrange="channels_last"),
        Case(2, 40, (13, 10), (27, 19), 7, residual=False, arrange="cropped"),
        Case(1, 65, (3, 43), (3, 171), 64, gamma=None, spread=8.0),
        Case(2, 96, (257,), (255,), 59, gamma=0.0, arrange="transposed"),
        Case(3, 16, (11, 3), (5, 5, 5), 111, spread=0.1),
        Case(1, 130, (19, 17), (33, 31), 65, arrange="expanded"),
        Case(1, 128, (17, 31), (17, 31), 32, arrange="channels_last", spread=2.0),
    ),
    "channel_attention": (
        Case(2, 33, (1, 1)),
        Case(3, 17, (9, 31), spread=0.2),
        Case(2, 31, (1, 7), variant="paper"),
        Case(1, 64, (5, 13), gamma=None, residual=False),
        Case(1, 127, (7, 9), gamma=-0.5, variant="paper", spread=0.3),
        Case(1, 129, (33, 17), arrange="channels_last", spread=0.3),
        Case(2, 65, (11, 23), residual=False, arrange="cropped", spread=0.2),
        Case(1, 257, (64,), gamma=None, spread=0.2),
        Case(3, 40, (127,), arrange="transposed", variant="paper", spread=0.2),
        Case(1, 96, (5, 5, 5), gamma=0.0, arrange="expanded"),
        Case(1, 512, (9, 7), arrange="channels_last", spread=0.5),
        Case(1, 130, (33, 31), variant="paper", spread=0.1),
    ),
}


def main(arguments: list[str] | None = None) -> int:
    """The command line; returns the exit status."""
    description = "Compare every backend with the fp64 reference on this machine; exit status 1 if one is wrong."
    argparse.ArgumentParser("python -m danet_kernels.selftest", description=description).parse_args(arguments)
    started = time.perf_counter()
    failures, count = [], 0
    print("Each cell: largest error / error allowed at that element, over all cases.")
    for device in ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",):
        for op, cases in CASES.items():
            findings = _Findings()
            for seed, case in enumerate(cases):
                for dtype in DTYPES:
                    _check(findings, op, case, dtype, device, seed)
            findings.print_tables(f"{op} on {device}")
            failures += findings.failures
            count += findings.count
    print(f"\n{count} results in {time.perf_counter() - started:.1f} s, {len(failures)} wrong")
    for failure in failures[:SHOWN]:
        print(f"wrong: {failure}")
    if len(failures) > SHOWN:
        print(f"and {len(failures) - SHOWN} more")
    return 1 if failures else 0


@dataclass
class _Findings:
    """What the cases of one operator on one device have shown."""

    worst: dict[str, dict[str, dict[str, Verdict]]] = field(default_factory=dict)  # backend, result, dtype
    reasons: dict[str, dict[str, None]] = field(default_factory=dict)  # why a backend did not run
    failures: list[str] = field(default_factory=list)
    count: int = 0

    def add(self, backend: str, result: str, dtype: str, verdict: Verdict, what: str) -> None:
        self.count += 1
        row = self.worst.setdefault(backend, {}).setdefault(result, {})
        if dtype not in row or not _share(verdict) <= _share(row[dtype]):  # NaN is worst
            row[dtype] = verdict
        if not verdict.ok:
            self.failures.append(f"{what}, {result}: {verdict}")

    def print_tables(self, title: str) -> None:
        for backend, rows in self.worst.items():
            print(f"\n{f'{title}, {backend}':40}" + "".join(f"{dtype:>18}" for dtype in DTYPES))
            for result, row in rows.items():
                cells = (_cell(row[dtype]) if dtype in row else "-" for dtype in DTYPES)
                print(f"  {result:38}" + "".join(f"{cell:>18}" for cell in cells))
        for backend, reasons in self.reasons.items():
            for reason in reasons:
                print(f"\n{title}, {backend}: does not run: {reason}")


def _check(findings: _Findings, op: str, case: Case, dtype: str, device: str, seed: int) -> None:
    """Run one case on every backend that can."""
    inputs, dout, options = case.make(DTYPES[dtype], device, seed)
    results: dict[str, dict[str, Tensor] | str] = {}
    for backend, reasons in danet_kernels.available_backends(op, *inputs.values()).items():
        if reasons:
            findings.reasons.setdefault(backend, {}).update(dict.fromkeys(reasons))
            continue
        try:
            function = partial(getattr(danet_kernels, op), backend=backend, **options)
            results[backend] = evaluate(function, inputs, dout)
        except Exception as error:  # a backend that raises is wrong; the others are still of interest
            results[backend] = f"raised {type(error).__name__}: {error}"
    with _one_thread():
        on_cpu = {name: tensor.cpu() for name, tensor in inputs.items()}
        for name, yardstick in yardsticks(op, on_cpu, dout.cpu(), **options).items():
            for backend, got in results.items():
                verdict = Verdict(complaint=got) if isinstance(got, str) else judge(got[name], yardstick)
                findings.add(backend, name, dtype, verdict, f"{op}, {backend}, {dtype}, {case}")


@contextmanager
def _one_thread() -> Iterator[None]:
    """For many small computations, in which threads spend their time waiting for one another."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _share(verdict: Verdict) -> float:
    return torch.inf if verdict.complaint is not None else verdict.error / verdict.allowed


def _cell(verdict: Verdict) -> str:
    return "wrong" if verdict.complaint is not None else f"{verdict.error:.1e} / {verdict.allowed:.1e}"


def _arrange(tensor: Tensor, how: str) -> Tensor:
    """`tensor` [B, C, *S] with other strides."""
    if how == "channels_last":
        return tensor.movedim(1, -1).contiguous().movedim(-1, 1)
    if how == "transposed":
        return tensor.transpose(0, 1).contiguous().transpose(0, 1)
    if how == "cropped":  # out of a buffer of NaN, which reading too far would bring to light
        buffer = torch.full([size + 3 for size in tensor.shape], torch.nan, dtype=tensor.dtype, device=tensor.device)
        return buffer[tuple(slice(1, size + 1) for size in tensor.shape)].copy_(tensor)
    return tensor


if __name__ == "__main__":
    sys.exit(main())
