"""The error rule itself: it must let the ideal pass, and name the result that a real mistake spoils."""

from __future__ import annotations

import pytest
import torch
from cases import ChannelCase, PositionCase, Problem
from tolerance import HAS_LONG_DOUBLE, assert_follows_error_rule, yardsticks

from danet_kernels._error_rule import evaluate
from danet_kernels._layout import accumulator_dtype

PROBLEMS = [
    PositionCase(2, 16, 20, 130, 140, "fp32", scale=0.5),
    PositionCase(2, 16, 20, 130, 140, "bf16", scale=0.5),
    PositionCase(2, 16, 20, 130, 140, "fp64", scale=0.5),
    ChannelCase(2, 50, 60, "fp32"),
    ChannelCase(2, 50, 60, "fp16", "paper"),
    ChannelCase(2, 50, 60, "fp64", "paper"),
]


def ideal(problem: Problem, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    results = evaluate(problem.reference, problem.tensors, problem.dout, dtype=dtype)
    dtypes = {"out": problem.dout.dtype} | {f"d{name}": tensor.dtype for name, tensor in problem.tensors.items()}
    return {name: result.to(dtypes[name]) for name, result in results.items()}


@pytest.fixture(params=PROBLEMS, ids=str)
def problem(request):
    if request.param.dtype == "fp64" and not HAS_LONG_DOUBLE:
        pytest.skip("fp64 needs a long double wider than double to be judged")
    return request.param.problem()


def test_the_ideal_passes(problem):
    allowed = yardsticks(problem)
    assert_follows_error_rule(problem, ideal(problem, accumulator_dtype(problem.dout.dtype)), allowed)


def test_the_yardstick_is_short(problem):
    """The two definitions, autograd and formulas, agree: e is a rounding error and no more."""
    for name, yardstick in yardsticks(problem).items():
        eps = max(torch.finfo(yardstick.dtype).eps, 100 * torch.finfo(accumulator_dtype(problem.dout.dtype)).eps)
        assert yardstick.largest <= eps * yardstick.exact.abs().max(), name


def test_lower_precision_inside_fails(problem):
    """Computed in the next lower precision throughout: fp16 and bf16 maps, fp32 for fp64, bf16 operands for fp32."""
    lower = {torch.float64: torch.float32, torch.float32: torch.bfloat16}
    dtype = problem.dout.dtype
    with pytest.raises(AssertionError, match="largest error"):
        assert_follows_error_rule(problem, ideal(problem, lower.get(dtype, dtype)), yardsticks(problem))


@pytest.mark.parametrize("index", [(0, 0, 0), (1, -1, -1)], ids=["first", "last"])
@pytest.mark.parametrize("wrong", ["nan", "zero", "two_ulp_and_a_bit"])
def test_one_wrong_element_fails(problem, index, wrong):
    allowed = yardsticks(problem)
    for name in ("out", *(f"d{name}" for name in problem.tensors if name != "gamma")):
        results = ideal(problem, accumulator_dtype(problem.dout.dtype))
        results[name] = results[name].clone()  # dresidual is dout
        yardstick = allowed[name]
        bound = yardstick.allowed()[index]
        results[name][index] = {
            "nan": torch.nan,
            "zero": 0.0,
            # beyond the bound by more than a rounding of the changed element can take back
            "two_ulp_and_a_bit": float(yardstick.exact[index] + 2.5 * bound),
        }[wrong]
        if wrong == "zero" and abs(float(yardstick.exact[index])) < 2 * bound:
            results[name][index] = 10 * bound
        with pytest.raises(AssertionError, match=rf"\n{name}: largest error"):
            assert_follows_error_rule(problem, results, allowed)


def test_a_bias_below_the_elementwise_bound_fails_by_its_norm():
    """All elements off by 1.5 e, each within the bound of its own: the Frobenius norm tells."""
    problem = PositionCase(1, 8, 64, 100, 120, "fp32", residual=False, gamma=None).problem()
    allowed = yardsticks(problem)
    results = ideal(problem, torch.float32)
    results["out"] = (allowed["out"].exact + 1.5 * allowed["out"].largest).float()
    with pytest.raises(AssertionError, match="out: largest error"):
        assert_follows_error_rule(problem, results, allowed)


def test_wrong_dtype_and_shape_fail():
    problem = PositionCase(1, 2, 3, 4, 5, "bf16").problem()
    results, allowed = ideal(problem, torch.float32), yardsticks(problem)
    with pytest.raises(
        AssertionError, match=r"out: expected \[1, 3, 4\] of torch.bfloat16, got \[1, 3, 4\] of torch.float32"
    ):
        assert_follows_error_rule(problem, results | {"out": results["out"].float()}, allowed)
    with pytest.raises(AssertionError, match=r"dkey: expected \[1, 2, 5\]"):
        assert_follows_error_rule(problem, results | {"dkey": results["dkey"][:, :, :4]}, allowed)
