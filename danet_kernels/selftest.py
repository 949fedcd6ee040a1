"""Check every backend of this installation on this machine: `python -m danet_kernels.selftest`.

Every backend that can run is compared with the fp64 reference, forward and every gradient, on odd sizes and
all kinds of strides, under the rule of _error_rule.py. Exit status 0 if all results follow the rule, else 1.

With TRITON_INTERPRET=1 some fp32 cases of the Triton kernels run in Triton's interpreter, without a GPU.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor

import danet_kernels

from ._cases import Case
from ._error_rule import Verdict, evaluate, judge, yardsticks
from ._self_check import for_gpu
from .backends import BACKENDS
from .proven import is_subject_to_proof

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, "fp64": torch.float64}
SHOWN = 20  # wrong results that are described in full
INTERPRETED = 4  # cases


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
                    _check(findings, op, case, dtype, device, seed, interpreted=seed < INTERPRETED)
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


def _check(findings: _Findings, op: str, case: Case, dtype: str, device: str, seed: int, interpreted: bool) -> None:
    """Run one case on every backend that can; interpreted: also on those that are interpreted here."""
    inputs, dout, options = case.make(DTYPES[dtype], device, seed)
    results: dict[str, dict[str, Tensor] | str] = {}
    for backend, reasons in danet_kernels.available_backends(op, *inputs.values()).items():
        reasons = reasons or _interpreter_reasons(backend, dtype, device, interpreted)
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
        for name, ideal in yardsticks(op, on_cpu, dout.cpu(), **options).items():
            for backend, got in results.items():
                on_gpu = is_subject_to_proof(BACKENDS[backend])
                yardstick = for_gpu(ideal, DTYPES[dtype]) if on_gpu else ideal
                verdict = Verdict(complaint=got) if isinstance(got, str) else judge(got[name], yardstick)
                findings.add(backend, name, dtype, verdict, f"{op}, {backend}, {dtype}, {case}")


def _interpreter_reasons(backend: str, dtype: str, device: str, few: bool) -> list[str]:
    """Reasons not to run a case on a backend that is interpreted on this device."""
    if device != "cpu" or not is_subject_to_proof(BACKENDS[backend]):
        return []
    if dtype != "fp32":
        return ["the 16-bit kernels need what Triton's interpreter lacks: products of bf16, descriptors that add"]
    return [] if few else [f"only the first {INTERPRETED} cases, as Triton's interpreter is slow"]


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


if __name__ == "__main__":
    sys.exit(main())
