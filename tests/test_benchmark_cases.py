"""pytest-benchmark cases: small, so that they run with the tests. Real sizes are in benchmarks/.

python -m pytest tests/test_benchmark_cases.py --benchmark-autosave --benchmark-compare
"""

from __future__ import annotations

import pytest
from cases import ChannelCase, PositionCase
from on_backend import for_each_cpu_backend
from tolerance import assert_follows_error_rule, yardsticks

CASES = [
    PositionCase(1, 16, 128, 1024, 1024, "fp32"),
    PositionCase(1, 16, 128, 1024, 1024, "bf16"),
    PositionCase(1, 1, 8, 16, 16, "fp32"),  # nothing but the cost of a call
    ChannelCase(1, 128, 2048, "fp32"),
    ChannelCase(1, 128, 2048, "bf16"),
    ChannelCase(1, 8, 16, "fp32"),
]


@for_each_cpu_backend
@pytest.mark.parametrize("training", [False, True], ids=["forward", "training"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_speed(benchmark, case, training, backend):
    """A wrong kernel gets no time: the error rule comes first."""
    problem = case.problem()
    assert_follows_error_rule(problem, problem.run(backend), yardsticks(problem))
    if not training:
        problem.dout = None
    benchmark.group = f"{case} {'training' if training else 'forward'}"
    results = benchmark.pedantic(problem.run, args=(backend,), rounds=5, iterations=2, warmup_rounds=1)
    assert results.keys() == (set(problem.results) if training else {"out"})
