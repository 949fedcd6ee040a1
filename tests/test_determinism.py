"""The same call gives the same bits: again, with more or fewer threads, and whatever ran before."""

from __future__ import annotations

import pytest
import torch
from cases import (
    DTYPES,
    ChannelCase,
    PositionCase,
    Problem,
    arrange,
)
from on_backend import backend_params, for_each_backend, is_slow

pytestmark = pytest.mark.usefixtures("deterministic")

CASES = [
    PositionCase(1, 8, 16, 20, 30, "fp32"),  # less than one tile
    PositionCase(1, 64, 96, 700, 1100, "fp32"),
    PositionCase(3, 16, 40, 130, 600, "fp32", residual=False, gamma=None),
    PositionCase(2, 16, 40, 300, 200, "fp64"),
    PositionCase(2, 59, 70, 300, 530, "bf16"),
    PositionCase(1, 8, 16, 5, 9, "bf16"),
    PositionCase(2, 59, 70, 300, 530, "fp16"),
    ChannelCase(1, 16, 20, "fp32"),  # less than one tile
    ChannelCase(1, 300, 500, "fp32"),
    ChannelCase(3, 130, 200, "fp32", "paper", residual=False, gamma=None),
    ChannelCase(2, 130, 70, "fp64", "paper"),
    ChannelCase(2, 200, 300, "bf16"),
    ChannelCase(2, 200, 300, "fp16"),
]


on_native = pytest.mark.parametrize("backend", backend_params("native"))


def differing(results: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> list[str]:
    """Names of results whose bits differ."""
    return [name for name, result in results.items() if not torch.equal(result, expected[name])]


def test_the_cases_cover_every_dtype():
    for kind in (PositionCase, ChannelCase):
        assert {case.dtype for case in CASES if isinstance(case, kind)} == set(DTYPES)


@for_each_backend
@pytest.mark.parametrize("case", CASES, ids=str)
def test_twenty_repeats(case, backend):
    """One where they are interpreted, one program after the other."""
    problem = case.problem()
    expected = problem.run(backend)
    for repeat in range(1 if is_slow(backend) else 20):
        assert not differing(problem.run(backend), expected), f"repeat {repeat}"


@on_native
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_thread_count(case, layout, backend):
    """1, 2, 4 and 3 threads; the eager backend leaves this to torch, which promises nothing, and a GPU has none."""
    problem = case.problem()
    tensors = {name: arrange(t, layout) if t.dim() == 3 else t for name, t in problem.tensors.items()}
    problem = Problem(problem.op, tensors, arrange(problem.dout, layout), problem.options)
    torch.set_num_threads(1)
    expected = problem.run(backend)
    for threads in (2, 4, 3):
        torch.set_num_threads(threads)
        assert not differing(problem.run(backend), expected), f"{threads} threads"


@on_native
@pytest.mark.parametrize("case", [case for case in CASES if case.B > 1], ids=str)
def test_batch_items_do_not_depend_on_the_batch(case, backend):
    """One batch element alone gives the bits that it gives in the batch. Not so on a GPU: there the batch decides how
    many programs share a sum."""
    problem = case.problem()
    whole = problem.run(backend)
    last = {name: tensor[-1:] if name != "gamma" else tensor for name, tensor in problem.tensors.items()}
    alone = Problem(problem.op, last, problem.dout[-1:], problem.options).run(backend)
    for name, result in alone.items():
        if name != "dgamma":
            assert torch.equal(result, whole[name][-1:]), name


@for_each_backend
def test_results_do_not_depend_on_what_ran_before(backend):
    """A larger call in between leaves other numbers in freed memory and in kept workspaces."""
    small, large = (PositionCase(1, 8, 16, N, N, "fp32").problem() for N in (50, 700))
    expected = small.run(backend)
    large.run(backend)
    assert not differing(small.run(backend), expected)
