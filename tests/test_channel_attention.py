"""Channel attention against the error rule: every dtype, both variants, sizes around every tile edge, all gradients."""

from __future__ import annotations

from functools import lru_cache

import pytest
import torch
from cases import (
    DTYPES,
    VARIANTS,
    ChannelCase,
    Problem,
    channel_cases,
    few_roundings,
    for_each_dtype,
    for_each_variant,
    name_of,
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
from danet_kernels._error_rule import Yardstick, evaluate

CASES = channel_cases()


@lru_cache(maxsize=2)  # the backends take turns on one case
def prepared(case: ChannelCase) -> tuple[Problem, dict[str, Yardstick]]:
    problem = case.problem()
    return problem, yardsticks(problem)


def test_the_grid_is_as_large_as_promised():
    for dtype in DTYPES:
        assert len({(c.B, c.C, c.N) for c in CASES if c.dtype == dtype}) >= 60
    for variant in VARIANTS:
        assert len({(c.B, c.C, c.N) for c in CASES if c.variant == variant}) >= 60


@for_each_case(CASES, channel_cases(triton=True))
def test_error_rule(case, backend):
    if case.dtype == "fp64" and not HAS_LONG_DOUBLE:
        pytest.skip("fp64 needs a long double wider than double to be judged")
    problem, allowed = prepared(case)
    assert_follows_error_rule(problem, problem.run(backend), allowed, on_tensor_cores(backend))


@for_each_quick_backend
@for_each_variant
@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16"])
def test_real_size(dtype, variant, backend):
    """97 x 97 positions of rectified features, as they are: diagonal energies of 4700."""
    case = ChannelCase(1, 96, 97 * 97, dtype, variant)
    problem = case.problem()
    x = problem.tensors["x"]
    x.copy_(torch.randn(x.shape, generator=torch.Generator().manual_seed(1)).relu())
    assert_follows_error_rule(problem, problem.run(backend), yardsticks(problem), on_tensor_cores(backend))


@for_each_backend
@for_each_variant
@for_each_dtype
def test_rows_of_the_map_sum_to_one(dtype, variant, backend):
    """Where all channels are equal at a position, so is the result there."""
    x = torch.randn(2, 130, 40).div(4).to(dtype)
    x[:, :, 7] = 0.75
    out = call(danet_kernels.channel_attention, x, variant=variant, residual=False, backend=backend)
    torch.testing.assert_close(out[:, :, 7], x[:, :, 7], rtol=few_roundings(dtype), atol=0)


@for_each_backend
@for_each_variant
@pytest.mark.parametrize("features", ["zero", "equal"])
@for_each_dtype
def test_equal_energies_give_the_mean(dtype, features, variant, backend):
    """All-zero features, or equal channels: every weight is 1 / C."""
    problem = ChannelCase(2, 65, 33, name_of(dtype), variant).problem()
    x = problem.tensors["x"]
    problem.tensors["x"] = torch.zeros_like(x) if features == "zero" else x[:, :1].expand(x.shape).contiguous()
    results = problem.run(backend)
    assert_follows_error_rule(problem, results, yardsticks(problem), on_tensor_cores(backend))
    x = problem.tensors["x"]
    plain = call(danet_kernels.channel_attention, x, variant=variant, residual=False, backend=backend)
    torch.testing.assert_close(plain, x, rtol=few_roundings(dtype), atol=0)


@for_each_backend
@for_each_variant
@pytest.mark.parametrize("dtype", ["fp32", "fp64", "bf16"])
def test_huge_energies(dtype, variant, backend):
    """Integer features, so that every energy (up to 1e6) is exact in fp32: no rounding decides who wins."""
    problem = ChannelCase(2, 40, 600, dtype, variant).problem()
    x = problem.tensors["x"]
    x.copy_(torch.randint(-40, 41, x.shape, generator=torch.Generator().manual_seed(2)))
    x[:, 3] = 40
    assert (x[0].double() @ x[0].double().T).max() == 600 * 40**2
    assert_follows_error_rule(problem, problem.run(backend), yardsticks(problem), on_tensor_cores(backend))


@for_each_backend
@for_each_variant
def test_fp16_energies_beyond_fp16(variant, backend):
    """Where eager attention in fp16 is NaN, ours is finite and right."""
    problem = ChannelCase(1, 33, 4096, "fp16", variant).problem()
    x = problem.tensors["x"]
    x.copy_(torch.randn(x.shape, generator=torch.Generator().manual_seed(3)).relu().mul(8))
    assert not evaluate(problem.reference, problem.tensors)["out"].isfinite().all()
    assert_follows_error_rule(problem, problem.run(backend), yardsticks(problem), on_tensor_cores(backend))


@for_each_backend
@for_each_variant
def test_batch_items_do_not_see_each_other(variant, backend):
    x = torch.randn(3, 130, 50) / 4
    whole = call(danet_kernels.channel_attention, x, variant=variant, backend=backend)
    alone = call(danet_kernels.channel_attention, x[1:2], variant=variant, backend=backend)
    torch.testing.assert_close(whole[1:2], alone)


@for_each_cpu_backend
def test_the_order_of_positions_does_not_matter(backend):
    x, order = torch.randn(2, 9, 300, dtype=torch.float64) / 4, torch.randperm(300)
    shuffled = danet_kernels.channel_attention(x[:, :, order], backend=backend)
    expected = danet_kernels.channel_attention(x, backend=backend)[:, :, order]
    torch.testing.assert_close(shuffled, expected, rtol=1e-11, atol=1e-12)


@for_each_backend
@for_each_variant
@pytest.mark.parametrize(("B", "C", "N"), [(0, 3, 4), (2, 0, 4), (2, 3, 0), (0, 0, 0)])
@for_each_dtype
def test_empty(dtype, B, C, N, variant, backend):
    problem = ChannelCase(B, C, max(N, 1), name_of(dtype), variant).problem()
    problem.tensors["x"], problem.dout = problem.tensors["x"][:, :, :N], problem.dout[:, :, :N]
    results = problem.run(backend)
    assert results["out"].shape == (B, C, N)
    assert results["dx"].shape == (B, C, N)
    assert not results["dgamma"].any()


@for_each_cpu_backend
@for_each_variant
@pytest.mark.parametrize("residual", [True, False], ids=["residual", "plain"])
@pytest.mark.parametrize("gamma", [-0.5, None], ids=["gamma", "no_gamma"])
@pytest.mark.parametrize("sizes", ["small", "tiles"])
def test_gradcheck(sizes, gamma, residual, variant, backend):
    case = ChannelCase(*((2, 4, 5) if sizes == "small" else (1, 130, 9)), "fp64", variant, residual, gamma)
    tensors = case.problem().tensors
    names, leaves = list(tensors), [tensor.requires_grad_() for tensor in tensors.values()]

    def function(*arguments):
        given = dict(zip(names, arguments, strict=True))
        return danet_kernels.channel_attention(**given, variant=variant, residual=residual, backend=backend)

    assert torch.autograd.gradcheck(function, leaves, fast_mode=sizes == "tiles")


@for_each_backend
def test_any_number_of_spatial_dimensions(backend):
    flat = ChannelCase(2, 17, 60, "fp32").problem()
    tensors = flat.tensors | {"x": flat.tensors["x"].unflatten(2, (3, 4, 5))}
    folded = Problem(flat.op, tensors, flat.dout.unflatten(2, (3, 4, 5)), flat.options)
    results, expected = folded.run(backend), flat.run(backend)
    assert results["out"].shape == results["dx"].shape == (2, 17, 3, 4, 5)
    for name, result in results.items():
        assert torch.equal(result.flatten(2) if result.dim() > 1 else result, expected[name])


@for_each_backend
@for_each_variant
def test_the_map_reproduces_the_output(variant, backend):
    x = torch.randn(2, 9, 20) / 2
    rows = danet_kernels.channel_attention_map(x, variant=variant)
    out = call(danet_kernels.channel_attention, x, variant=variant, residual=False, backend=backend)
    torch.testing.assert_close(rows @ x, out, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(rows.sum(-1), torch.ones(2, 9))
