"""gamma: where training starts (0), signs, NaN, dtypes and shapes; nothing divides by it."""

from __future__ import annotations

import math

import pytest
import torch
from cases import ChannelCase, PositionCase, for_each_dtype, for_each_variant, name_of
from on_backend import call, for_each_backend, on_tensor_cores
from tolerance import assert_follows_error_rule, yardsticks

import danet_kernels

GAMMAS = pytest.mark.parametrize("gamma", [0.0, 1.0, -0.5, 1e4])
GAMMA_DTYPES = pytest.mark.parametrize(
    "gamma_dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=name_of
)


@for_each_backend
@GAMMAS
@for_each_dtype
def test_position_error_rule(dtype, gamma, backend):
    problem = PositionCase(2, 8, 20, 140, 130, name_of(dtype), gamma=gamma).problem()
    if dtype == torch.float16 and gamma == 1e4:  # the gradients would be beyond fp16
        problem.dout /= 1024
    assert_follows_error_rule(problem, problem.run(backend), yardsticks(problem), on_tensor_cores(backend))


@for_each_backend
@for_each_variant
@GAMMAS
@for_each_dtype
def test_channel_error_rule(dtype, gamma, variant, backend):
    problem = ChannelCase(2, 140, 40, name_of(dtype), variant, gamma=gamma).problem()
    if dtype == torch.float16 and gamma == 1e4:
        problem.dout /= 1024
    assert_follows_error_rule(problem, problem.run(backend), yardsticks(problem), on_tensor_cores(backend))


@for_each_backend
@for_each_dtype
def test_position_gamma_zero_is_exact(dtype, backend):
    """out is the residual, bit by bit, and no gradient reaches query, key and value; dgamma is not zero."""
    problem = PositionCase(2, 8, 20, 140, 600, name_of(dtype), gamma=0.0).problem()
    results = problem.run(backend)
    assert torch.equal(results["out"], problem.tensors["residual"])
    for name in ("dquery", "dkey", "dvalue"):
        assert torch.equal(results[name], torch.zeros_like(results[name])), name
    assert torch.equal(results["dresidual"], problem.dout)
    assert abs(float(results["dgamma"])) > 0.1


@for_each_backend
@for_each_variant
@for_each_dtype
def test_channel_gamma_zero_is_exact(dtype, variant, backend):
    problem = ChannelCase(2, 140, 40, name_of(dtype), variant, gamma=0.0).problem()
    results = problem.run(backend)
    assert torch.equal(results["out"], problem.tensors["x"])
    assert torch.equal(results["dx"], problem.dout)
    assert abs(float(results["dgamma"])) > 0.1
    problem.options["residual"] = False
    results = problem.run(backend)
    assert not results["out"].any()
    assert not results["dx"].any()


@for_each_backend
@pytest.mark.parametrize("op", ["position_attention", "channel_attention"])
@for_each_dtype
def test_gamma_nan(dtype, op, backend):
    """NaN everywhere but in dresidual and dgamma, which do not depend on gamma."""
    case = PositionCase(2, 8, 20, 70, 60, name_of(dtype), gamma=math.nan)
    problem = (case if op == "position_attention" else ChannelCase(2, 70, 40, name_of(dtype), gamma=math.nan)).problem()
    results = problem.run(backend)
    finite = problem.run(backend)["dgamma"]
    for name, result in results.items():
        if name == "dresidual":
            assert torch.equal(result, problem.dout)
        elif name == "dgamma":
            problem.tensors["gamma"] = torch.ones_like(problem.tensors["gamma"])
            assert result.isfinite().all()
            assert torch.equal(finite, problem.run(backend)["dgamma"])
        else:
            assert result.isnan().all(), name


@for_each_backend
@GAMMA_DTYPES
@for_each_dtype
def test_gamma_of_any_floating_dtype(dtype, gamma_dtype, backend):
    """dgamma comes back in gamma's dtype, out in the inputs'."""
    for problem in (
        PositionCase(2, 8, 20, 70, 60, name_of(dtype)).problem(),
        ChannelCase(2, 70, 40, name_of(dtype)).problem(),
    ):
        problem.tensors["gamma"] = problem.tensors["gamma"].to(gamma_dtype)
        results = problem.run(backend)
        assert results["dgamma"].dtype == gamma_dtype
        assert_follows_error_rule(problem, results, yardsticks(problem), on_tensor_cores(backend))


@for_each_backend
@pytest.mark.parametrize("shape", [(), (1,), (1, 1, 1, 1)], ids=str)
def test_gamma_of_any_shape(shape, backend):
    """One element in any number of dimensions; dgamma has gamma's shape."""
    for problem in (PositionCase(1, 4, 5, 6, 7, "fp32").problem(), ChannelCase(1, 6, 7, "fp32").problem()):
        expected = problem.run(backend)
        problem.tensors["gamma"] = problem.tensors["gamma"].reshape(shape)
        results = problem.run(backend)
        assert results["dgamma"].shape == shape
        assert torch.equal(results["dgamma"].reshape(1), expected["dgamma"])
        assert torch.equal(results["out"], expected["out"])


@for_each_backend
@for_each_dtype
def test_gamma_as_a_number(dtype, backend):
    """A number is the same as a tensor of it, and 1 the same as none."""
    position = PositionCase(1, 4, 5, 6, 7, name_of(dtype)).problem()
    channel = ChannelCase(1, 6, 7, name_of(dtype)).problem()
    for problem in (position, channel):
        function = getattr(danet_kernels, problem.op)
        tensors = {name: tensor for name, tensor in problem.tensors.items() if name != "gamma"}
        expected = problem.run(backend)["out"]
        assert torch.equal(call(function, **tensors, gamma=0.75, backend=backend), expected)
        without = call(function, **tensors, backend=backend)
        assert torch.equal(call(function, **tensors, gamma=1, backend=backend), without)
