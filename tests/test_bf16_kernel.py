"""The AVX512-BF16 forward for inference: taken where it is the faster one, forced here on every CPU that has it."""

from __future__ import annotations

import pytest
import torch
from cases import LAYOUTS, PositionCase, arrange, position_cases
from tolerance import assert_follows_error_rule, yardsticks

import danet_kernels
from danet_kernels.backends import native

CASES = [case for case in position_cases() if case.dtype == "bf16"]
BIG = PositionCase(2, 59, 255, 700, 1031, "bf16", scale=0.25)  # odd everywhere, several tiles of queries and keys


@pytest.fixture(autouse=True)
def bf16_kernel(monkeypatch):
    reasons = native.why_not("position_attention")
    if reasons:
        pytest.skip(f"backend native: {'; '.join(reasons)}")
    if not native.plans().cpu_features()["avx512_bf16"]:
        pytest.skip("this CPU has no AVX512-BF16")
    monkeypatch.setenv("DANET_KERNELS_BF16_KERNEL", "1")


def run(problem):
    with torch.no_grad():
        return {"out": danet_kernels.position_attention(**problem.tensors, **problem.options, backend="native")}


@pytest.mark.parametrize("case", [*CASES, BIG], ids=str)
def test_error_rule(case):
    problem = case.problem()
    assert_follows_error_rule(problem, run(problem), yardsticks(problem))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(layout):
    problem = BIG.problem()
    for name in ("query", "key", "value", "residual"):
        problem.tensors[name] = arrange(problem.tensors[name], layout)
    assert_follows_error_rule(problem, run(problem), yardsticks(problem))


def test_it_is_another_kernel_and_follows_the_variable(monkeypatch):
    query, key, value = torch.randn(3, 1, 64, 600).bfloat16().unbind()
    forced = danet_kernels.position_attention(query, key, value, backend="native")
    monkeypatch.setenv("DANET_KERNELS_BF16_KERNEL", "0")
    widened = danet_kernels.position_attention(query, key, value, backend="native")
    assert not torch.equal(forced, widened)
    torch.testing.assert_close(forced, widened, rtol=2**-7, atol=2**-9)


def test_a_backward_to_come_gets_the_widened_kernel(monkeypatch):
    problem = BIG.problem()
    forced = problem.run("native")
    assert_follows_error_rule(problem, forced, yardsticks(problem))
    monkeypatch.setenv("DANET_KERNELS_BF16_KERNEL", "0")
    widened = problem.run("native")
    assert all(torch.equal(forced[name], widened[name]) for name in widened)


def test_threads_do_not_change_the_bits():
    problem = BIG.problem()
    results = []
    for threads in (1, 2, 4):
        torch.set_num_threads(threads)
        results.append(run(problem)["out"])
    assert all(torch.equal(results[0], other) for other in results[1:])


def test_rows_without_finite_logits_and_late_ones():
    query, key = torch.ones(1, 2, 70).bfloat16(), torch.ones(1, 2, 1100).bfloat16()
    value = torch.randn(1, 16, 1100).bfloat16()
    key[:, :, :600] = -torch.inf  # more than the first tile of keys
    query[:, :, 3] = torch.nan
    out = danet_kernels.position_attention(query, key, value, backend="native")
    expected = danet_kernels.reference.position_attention(query.float(), key.float(), value.float()).bfloat16()
    torch.testing.assert_close(out, expected, rtol=2**-7, atol=2**-9, equal_nan=True)
    key[:] = -torch.inf
    assert danet_kernels.position_attention(query, key, value, backend="native").isnan().all()
