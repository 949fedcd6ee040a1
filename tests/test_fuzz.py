"""Random sizes, dtypes, options and memory layouts, inside buffers of NaN. The seed is in the test's name.

More of them: DANET_FUZZ_SEEDS=1000 python -m pytest tests/test_fuzz.py
"""

from __future__ import annotations

import os
from functools import lru_cache

import pytest
import torch
from cases import (
    DENSE_LAYOUTS,
    DTYPES,
    LAYOUTS,
    VARIANTS,
    ChannelCase,
    PositionCase,
    Problem,
    arrange,
    gamma_tensor,
    name_of,
)
from on_backend import for_each_case, is_slow, on_tensor_cores
from tolerance import HAS_LONG_DOUBLE, assert_follows_error_rule, yardsticks

from danet_kernels._error_rule import Yardstick

REPEATING = {
    "query": ("same_batch", "same_channel", "same_position"),
    "key": ("same_batch", "same_channel"),
    "value": ("same_batch", "same_channel"),
    "residual": ("same_batch", "same_channel", "same_position"),
    "x": ("same_batch", "same_position"),
}
"""Not those that make exact cancellation the whole result; test_layouts.py has them."""
SEEDS = range(int(os.environ.get("DANET_FUZZ_SEEDS", 64)))


TRITON_SEEDS = [seed for seed in SEEDS if list(DTYPES)[seed % 4] != "fp64"]


@lru_cache(maxsize=2)  # the backends take turns on one seed
def prepared(seed: int, small: bool) -> tuple[Problem, dict[str, Yardstick]]:
    problem = draw(seed, small)
    return problem, yardsticks(problem)


def draw(seed: int, small: bool = False) -> Problem:
    """`small`: a few tiles, for kernels that are interpreted."""
    generator = torch.Generator().manual_seed(seed)

    def integer(low: int, high: int) -> int:
        """low <= integer <= high, small ones more often."""
        share = float(torch.rand((), generator=generator)) ** 2
        return low + int(share * (high - low + 1))

    def choose(options):
        return options[int(torch.randint(len(options), (), generator=generator))]

    dtype = list(DTYPES)[seed % 4]
    extras = {"residual": choose([True, False]), "gamma": choose([None, 0.75, -0.5])}
    if seed % 3:
        limit = 200 if dtype == "fp64" or small else 1200  # long double is slow
        sizes = integer(1, 4), integer(1, 70), integer(1, 70), integer(1, limit), integer(1, limit)
        problem = PositionCase(*sizes, dtype, **extras, scale=choose([1.0, 0.125, -0.5])).problem()
    else:
        sizes = integer(1, 4), integer(1, 150 if small else 270), integer(1, 300)
        problem = ChannelCase(*sizes, dtype, choose(VARIANTS), **extras).problem()
    # At most one tensor repeats itself, or all rows of the map would be one row, and one draw of errors.
    repeating = choose([*REPEATING, None])
    for name, tensor in problem.tensors.items():
        if name != "gamma":
            problem.tensors[name] = arrange(tensor, choose(REPEATING[name] if name == repeating else DENSE_LAYOUTS))
        elif choose([True, False]):  # gamma in the inputs' own dtype, and in the middle of a NaN buffer
            gamma = gamma_tensor(float(tensor), tensor.dtype).to(DTYPES[dtype])
            problem.tensors[name] = torch.cat([gamma / 0 - gamma / 0, gamma, gamma / 0 - gamma / 0])[1:2]
    problem.dout = arrange(problem.dout, choose([*LAYOUTS, "one_number"]))
    return problem


@for_each_case(SEEDS, TRITON_SEEDS, "seed")
def test_fuzz(seed, backend):
    problem, allowed = prepared(seed, small=is_slow(backend))
    if not HAS_LONG_DOUBLE and any(tensor.dtype == torch.float64 for tensor in problem.tensors.values()):
        pytest.skip("fp64 needs a long double wider than double to be judged")
    assert_follows_error_rule(problem, problem.run(backend), allowed, on_tensor_cores(backend))


def test_the_seeds_cover_every_dtype_operator_and_layout():
    problems = [draw(seed) for seed in range(64)]
    seen = {(p.op, name_of(p.dout.dtype)) for p in problems}
    assert len(seen) == 2 * len(DTYPES)
    tensors = [tensor for p in problems for name, tensor in p.tensors.items() if name != "gamma"]
    assert any(tensor.dtype.itemsize == 2 and tensor.data_ptr() % 4 == 2 for tensor in tensors)  # misaligned
    assert any(0 in tensor.stride() for tensor in tensors)  # expanded
    assert any(p.dout.stride() == (0, 0, 0) for p in problems)  # backward of .sum()
    assert any(tensor.stride(1) == 1 and tensor.shape[1] > 1 for tensor in tensors)  # channels_last
    assert any(tensor.stride(0) == 1 and tensor.shape[0] > 1 for tensor in tensors)
    assert any(min(tensor.stride()[1:]) > 1 for tensor in tensors)  # no axis of a row is dense
