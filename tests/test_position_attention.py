"""Position attention against the error rule: every dtype, sizes around every tile edge, forward and every gradient."""

from __future__ import annotations

import math
from functools import lru_cache

import pytest
import torch
from cases import (
    DTYPES,
    PositionCase,
    Problem,
    few_roundings,
    for_each_dtype,
    name_of,
    position_cases,
)
from on_backend import (
    call,
    for_each_backend,
    for_each_case,
    for_each_cpu_backend,
    for_each_quick_backend,
    on_tensor_cores,
)
from tolerance import HAS_LONG_DOUBLE, assert_follows_error_rule, yardsticks

import danet_kernels
from danet_kernels import reference
from danet_kernels._error_rule import Yardstick, evaluate

CASES = position_cases()


@lru_cache(maxsize=2)  # the backends take turns on one case
def prepared(case: PositionCase) -> tuple[Problem, dict[str, Yardstick]]:
    problem = case.problem()
    return problem, yardsticks(problem)


def test_the_grid_is_as_large_as_promised():
    for dtype in DTYPES:
        assert len({(c.B, c.D, c.C, c.M, c.N) for c in CASES if c.dtype == dtype}) >= 60


@for_each_case(CASES, position_cases(triton=True))
def test_error_rule(case, backend):
    if case.dtype == "fp64" and not HAS_LONG_DOUBLE:
        pytest.skip("fp64 needs a long double wider than double to be judged")
    problem, allowed = prepared(case)
    assert_follows_error_rule(problem, problem.run(backend), allowed, on_tensor_cores(backend))


@for_each_quick_backend
@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("channels", [64, pytest.param(512, marks=pytest.mark.slow)])
def test_real_size_by_sampled_rows(channels, dtype, backend):
    """97 x 97 positions, where an fp64 map would be 700 MB. The rows of 96 queries are exact by themselves; a dout that
    is zero at the other queries makes dkey, dvalue and dgamma exact too."""
    case = PositionCase(1, channels // 8, channels, 97 * 97, 97 * 97, dtype, scale=0.5)
    problem = case.problem()
    rows = torch.randperm(case.M, generator=torch.Generator().manual_seed(0))[:96].sort().values
    rows[0], rows[-1] = 0, case.M - 1
    others = torch.ones(case.M, dtype=torch.bool).index_fill(0, rows, False)
    problem.dout[:, :, others] = 0
    by_query = ("query", "residual")
    sampled = {name: tensor[:, :, rows] if name in by_query else tensor for name, tensor in problem.tensors.items()}
    small = Problem(problem.op, sampled, problem.dout[:, :, rows], problem.options)
    results = problem.run(backend)
    assert not results["dquery"][:, :, others].any()
    for name in ("out", "dquery", "dresidual"):
        results[name] = results[name][:, :, rows]
    assert_follows_error_rule(small, results, yardsticks(small), on_tensor_cores(backend))


@for_each_backend
@for_each_dtype
def test_rows_of_the_map_sum_to_one(dtype, backend):
    query, key = torch.randn(2, 2, 16, 600).to(dtype).unbind()
    value = torch.full((2, 5, 600), 0.75, dtype=dtype)
    out = call(danet_kernels.position_attention, query, key, value, backend=backend)
    torch.testing.assert_close(out, torch.full_like(out, 0.75), rtol=few_roundings(dtype), atol=0)


@for_each_cpu_backend
def test_shifting_the_logits_of_a_query_changes_nothing(backend):
    query, key, value = torch.randn(3, 2, 16, 300, dtype=torch.float64).unbind()
    shift = 100 * torch.randn(2, 1, 300, dtype=torch.float64)
    shifted = torch.cat([query, shift], 1), torch.cat([key, torch.ones_like(shift)], 1)
    expected = danet_kernels.position_attention(query, key, value, backend=backend)
    torch.testing.assert_close(
        danet_kernels.position_attention(*shifted, value, backend=backend), expected, rtol=1e-11, atol=1e-12
    )


@for_each_backend
def test_queries_and_batch_items_do_not_see_each_other(backend):
    problem = PositionCase(3, 8, 16, 300, 200, "fp32").problem()
    query, key, value = (problem.tensors[name] for name in ("query", "key", "value"))
    whole = call(danet_kernels.position_attention, query, key, value, backend=backend)
    alone = call(danet_kernels.position_attention, query[1:2, :, 128:], key[1:2], value[1:2], backend=backend)
    torch.testing.assert_close(whole[1:2, :, 128:], alone)


@for_each_backend
@for_each_dtype
def test_equal_keys_give_the_mean(dtype, backend):
    """All energies of a row are equal: every weight is 1 / N."""
    problem = PositionCase(1, 4, 6, 150, 260, name_of(dtype)).problem()
    problem.tensors["key"] = problem.tensors["key"][:, :, :1].expand(1, 4, 260)
    mean = problem.tensors["value"].double().mean(-1, keepdim=True)
    operands = (problem.tensors[name] for name in ("query", "key", "value"))
    out = call(danet_kernels.position_attention, *operands, backend=backend)
    torch.testing.assert_close(out.double(), mean.expand_as(out), rtol=few_roundings(dtype), atol=few_roundings(dtype))


@for_each_backend
@for_each_dtype
def test_scale_zero_gives_the_mean(dtype, backend):
    """Also with keys that do not fill their tile."""
    for keys in (41, 128):
        problem = PositionCase(2, 8, 12, 70, keys, name_of(dtype), scale=0.0).problem()
        results = problem.run(backend)
        assert_follows_error_rule(problem, results, yardsticks(problem), on_tensor_cores(backend))
        assert not results["dquery"].any()
        assert not results["dkey"].any()


@for_each_backend
@for_each_dtype
def test_all_zero_features(dtype, backend):
    problem = PositionCase(1, 8, 16, 130, 70, name_of(dtype)).problem()
    problem.tensors["query"].zero_(), problem.tensors["key"].zero_()
    results = problem.run(backend)
    assert_follows_error_rule(problem, results, yardsticks(problem), on_tensor_cores(backend))
    assert not results["dquery"].any()
    assert not results["dkey"].any()


@for_each_backend
@pytest.mark.parametrize("dtype", ["fp32", "fp64", "bf16"])
def test_huge_logits(dtype, backend):
    """Integers up to 40, so that every logit (up to 1e5) is exact in fp32: no rounding decides who wins."""
    problem = PositionCase(2, 64, 24, 140, 600, dtype).problem()
    for name in ("query", "key"):
        problem.tensors[name].copy_(torch.randint(-40, 41, problem.tensors[name].shape))
    problem.tensors["key"][:, :, 77] = 40 * problem.tensors["query"][:, :, 9].sign()
    problem.tensors["query"][:, :, 9] = problem.tensors["key"][:, :, 77]
    logits = problem.tensors["query"].double().mT @ problem.tensors["key"].double()
    assert logits.max() > 9e4
    assert_follows_error_rule(problem, problem.run(backend), yardsticks(problem), on_tensor_cores(backend))


@for_each_backend
def test_fp16_logits_beyond_fp16(backend):
    """Where eager attention in fp16 is NaN, ours is finite and right."""
    problem = PositionCase(1, 64, 32, 129, 257, "fp16", scale=1.0).problem()
    for name in ("query", "key"):
        problem.tensors[name].copy_(torch.randint(-80, 81, problem.tensors[name].shape))
    problem.tensors["key"][:, :, 5] = problem.tensors["query"][:, :, 7]  # a logit of about 64 * 46**2
    assert not evaluate(problem.reference, problem.tensors)["out"].isfinite().all()
    results = problem.run(backend)
    assert_follows_error_rule(problem, results, yardsticks(problem), on_tensor_cores(backend))


@for_each_backend
@pytest.mark.parametrize(
    ("B", "D", "C", "M", "N"),
    [(0, 8, 16, 5, 7), (2, 0, 3, 4, 5), (2, 3, 0, 4, 5), (2, 3, 4, 0, 5), (2, 3, 4, 5, 0), (0, 0, 0, 0, 0)],
)
@for_each_dtype
def test_empty(dtype, B, D, C, M, N, backend):
    problem = PositionCase(B, D, C, M, N, name_of(dtype)).problem()
    results = problem.run(backend)
    assert results["out"].shape == (B, C, M)
    for given in problem.tensors:
        assert results[f"d{given}"].shape == problem.tensors[given].shape
        assert results[f"d{given}"].dtype == problem.tensors[given].dtype
    if D == 0:  # all logits are zero: the mean of the values
        mean = problem.tensors["value"].double().mean(-1, keepdim=True)
        expected = problem.tensors["gamma"].double() * mean + problem.tensors["residual"].double()
        torch.testing.assert_close(results["out"].double(), expected, rtol=0, atol=4 * torch.finfo(dtype).eps)
    if N == 0:  # a sum over nothing
        assert torch.equal(results["out"], problem.tensors["residual"])
        assert not results["dquery"].any()
        assert not results["dgamma"].any()


@for_each_cpu_backend
@pytest.mark.parametrize("extras", ["plain", "residual", "gamma", "residual_gamma"])
@pytest.mark.parametrize("sizes", ["small", "tiles"])
def test_gradcheck(sizes, extras, backend):
    B, D, C, M, N = (2, 2, 3, 4, 5) if sizes == "small" else (1, 4, 5, 130, 66)
    case = PositionCase(B, D, C, M, N, "fp64", "residual" in extras, -0.5 if "gamma" in extras else None, scale=0.7)
    tensors = case.problem().tensors
    names, leaves = list(tensors), [tensor.requires_grad_() for tensor in tensors.values()]

    def function(*arguments):
        return danet_kernels.position_attention(**dict(zip(names, arguments, strict=True)), scale=0.7, backend=backend)

    assert torch.autograd.gradcheck(function, leaves, fast_mode=sizes == "tiles")


@for_each_backend
def test_any_number_of_spatial_dimensions(backend):
    """[B, D, *S] queries and [B, D, *T] keys; the result has the spatial shape of the queries."""
    flat = PositionCase(2, 8, 16, 60, 42, "fp32").problem()
    shaped = {name: tensor for name, tensor in flat.tensors.items() if name == "gamma"}
    for name in ("query", "residual"):
        shaped[name] = flat.tensors[name].unflatten(2, (3, 4, 5))
    for name in ("key", "value"):
        shaped[name] = flat.tensors[name].unflatten(2, (6, 7))
    folded = Problem(flat.op, shaped, flat.dout.unflatten(2, (3, 4, 5)), flat.options)
    expected = flat.run(backend)
    for name, result in folded.run(backend).items():
        assert torch.equal(result.flatten(2) if result.dim() > 1 else result, expected[name])
        if name != "out":
            assert result.shape == shaped[name[1:]].shape


@for_each_backend
@for_each_dtype
def test_map_rows_reproduce_the_output(dtype, backend):
    """`position_attention_map` and the fused result are two views of one map."""
    query, key, value = torch.randn(3, 2, 8, 70).to(dtype).unbind()
    points = torch.tensor([0, 13, 69])
    rows = danet_kernels.position_attention_map(query, key, points, scale=0.5)  # [B, P, N]
    expected = reference.position_attention(query.double(), key.double(), value.double(), scale=0.5)[:, :, points]
    torch.testing.assert_close(value.double() @ rows.double().mT, expected, rtol=1e-4, atol=1e-5)
    out = call(danet_kernels.position_attention, query, key, value, scale=0.5, backend=backend)[:, :, points]
    rounding = torch.finfo(dtype).eps
    atol = max(1e-5, rounding / 4 if on_tensor_cores(backend) else 0)  # rounded weights spoil sums that cancel
    torch.testing.assert_close(out.double(), expected, rtol=2 * rounding, atol=atol)
    assert math.isclose(float(rows[0, 1].sum()), 1.0, abs_tol=1e-5)
