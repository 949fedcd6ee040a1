"""Memory layouts: what goes in may lie anywhere, what comes out lies where the one rule says."""

from __future__ import annotations

import itertools

import pytest
import torch
from cases import (
    DENSE_LAYOUTS,
    ChannelCase,
    PositionCase,
    Problem,
    arrange,
    few_roundings,
    for_each_dtype,
    for_each_variant,
    name_of,
)
from on_backend import device_of, for_each_backend, on_tensor_cores
from tolerance import assert_follows_error_rule, yardsticks
from torch._subclasses import FakeTensorMode

import danet_kernels
from danet_kernels import _layout
from danet_kernels.backends.triton import launch as triton_launch


def expected_stride(model: torch.Tensor, shape: torch.Size) -> tuple[int, ...]:
    """Of a result: channels_last exactly when its model's channels lie side by side."""
    _, channels, positions = shape
    if model.stride(1) == 1 and model.shape[1] > 1 and model.shape[2] > 1:
        return (channels * positions, 1, channels)
    return (channels * positions, positions, 1)


def assert_strides(problem: Problem, results: dict[str, torch.Tensor]) -> None:
    model = problem.tensors["value" if "value" in problem.tensors else "x"]
    models = {"out": model} | {f"d{name}": tensor for name, tensor in problem.tensors.items()}
    for name, result in results.items():
        if name not in ("dgamma", "dresidual"):  # dresidual is dout itself
            assert result.stride() == expected_stride(models[name], result.shape), name


def assert_same_up_to_rounding(problem: Problem, results: dict, expected: dict, backend: str) -> None:
    allowed = yardsticks(problem)
    assert_follows_error_rule(problem, results, allowed, on_tensor_cores(backend))
    assert_follows_error_rule(problem, expected, allowed, on_tensor_cores(backend))


@for_each_backend
@pytest.mark.parametrize("layout", DENSE_LAYOUTS)
@for_each_dtype
def test_position_layouts(dtype, layout, backend):
    """query and value in the layout, key and dout in the next one, residual contiguous."""
    problem = PositionCase(2, 12, 20, 130, 140, name_of(dtype)).problem()
    expected = problem.run(backend)
    other = DENSE_LAYOUTS[(DENSE_LAYOUTS.index(layout) + 1) % len(DENSE_LAYOUTS)]
    for name, chosen in {"query": layout, "value": layout, "key": other}.items():
        problem.tensors[name] = arrange(problem.tensors[name], chosen)
    problem.dout = arrange(problem.dout, other)
    results = problem.run(backend)
    assert_strides(problem, results)
    assert_same_up_to_rounding(problem, results, expected, backend)


@for_each_backend
@for_each_variant
@pytest.mark.parametrize("layout", DENSE_LAYOUTS)
@for_each_dtype
def test_channel_layouts(dtype, layout, variant, backend):
    problem = ChannelCase(2, 130, 40, name_of(dtype), variant).problem()
    expected = problem.run(backend)
    problem.tensors["x"] = arrange(problem.tensors["x"], layout)
    problem.dout = arrange(problem.dout, DENSE_LAYOUTS[(DENSE_LAYOUTS.index(layout) + 1) % len(DENSE_LAYOUTS)])
    results = problem.run(backend)
    assert_strides(problem, results)
    assert_same_up_to_rounding(problem, results, expected, backend)


@for_each_backend
@pytest.mark.parametrize("layout", ["same_batch", "same_channel", "same_position"])
@for_each_dtype
def test_repeating_inputs(dtype, layout, backend):
    """Strides of zero: the same as a copy gives. Much cancels here, so errors are measured by the inputs' size."""
    problems = [PositionCase(2, 12, 20, 130, 140, name_of(dtype), scale=0.5).problem()] * 4
    problems.append(ChannelCase(2, 130, 40, name_of(dtype)).problem())
    for problem, name in zip(problems, ["query", "key", "value", "residual", "x"], strict=True):
        tensors = problem.tensors | {name: arrange(problem.tensors[name], layout)}
        repeating = Problem(problem.op, tensors, problem.dout, problem.options)
        copied = Problem(problem.op, tensors | {name: tensors[name].contiguous()}, problem.dout, problem.options)
        results, expected = repeating.run(backend), copied.run(backend)
        for result in results:
            tolerance = 20 * few_roundings(dtype) if result != "dgamma" else 1e-3
            torch.testing.assert_close(results[result], expected[result], rtol=tolerance, atol=tolerance)


@for_each_backend
@pytest.mark.parametrize(("C", "N"), [(1, 5), (5, 1), (1, 1), (2, 2)])
def test_strides_of_thin_results(C, N, backend):
    """With one channel or one position both layouts are the same memory; the strides are the contiguous ones."""
    for layout in ("contiguous", "channels_last"):
        problem = ChannelCase(2, C, N, "fp32").problem()
        problem.tensors["x"] = arrange(problem.tensors["x"], layout)
        assert_strides(problem, problem.run(backend))


@for_each_backend
@pytest.mark.parametrize("layouts", list(itertools.product(["contiguous", "channels_last"], repeat=2)), ids="-".join)
def test_fake_results_have_the_real_strides(layouts, backend):
    position = PositionCase(2, 3, 4, 5, 6, "bf16").problem()
    for name, layout in zip(("query", "value"), layouts, strict=True):
        position.tensors[name] = arrange(position.tensors[name], layout)
    channel = ChannelCase(2, 4, 5, "bf16").problem()
    channel.tensors["x"], channel.dout = arrange(channel.tensors["x"], layouts[0]), arrange(channel.dout, layouts[1])
    for problem in (position, channel):
        real = problem.run(backend)
        with FakeTensorMode() as mode:
            tensors = {name: mode.from_tensor(tensor) for name, tensor in problem.tensors.items()}
            fake = Problem(problem.op, tensors, mode.from_tensor(problem.dout), problem.options).run(backend)
        for name, result in real.items():
            assert (result.shape, result.stride(), result.dtype) == (
                fake[name].shape,
                fake[name].stride(),
                fake[name].dtype,
            ), name


def feature_maps(dtype: torch.dtype, memory_format: torch.memory_format) -> Problem:
    flat = PositionCase(2, 8, 16, 9 * 13, 9 * 13, name_of(dtype)).problem()
    shaped = {
        name: tensor.unflatten(2, (9, 13)).contiguous(memory_format=memory_format) if tensor.dim() == 3 else tensor
        for name, tensor in flat.tensors.items()
    }
    return Problem(flat.op, shaped, flat.dout.unflatten(2, (9, 13)), flat.options)


def flat(problem: Problem) -> Problem:
    tensors = {name: tensor.flatten(2) if tensor.dim() > 2 else tensor for name, tensor in problem.tensors.items()}
    return Problem(problem.op, tensors, problem.dout.flatten(2), problem.options)


def flat_results(results: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: result.flatten(2) if result.dim() > 2 else result for name, result in results.items()}


@for_each_backend
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=str)
@for_each_dtype
def test_feature_maps(dtype, memory_format, backend):
    """[B, C, H, W] in either memory format: the result and all gradients keep it."""
    problem = feature_maps(dtype, memory_format)
    results = problem.run(backend)
    for name in ("out", "dquery", "dkey", "dvalue"):
        assert results[name].is_contiguous(memory_format=memory_format), name
    assert_follows_error_rule(flat(problem), flat_results(results), yardsticks(flat(problem)), on_tensor_cores(backend))


@for_each_backend
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=str)
def test_crops_and_transposed_maps(memory_format, backend):
    """Views whose spatial dimensions do not collapse to one stride."""
    for view in (lambda t: t[:, :, 1:-2, 3:-1], lambda t: t.transpose(2, 3), lambda t: t[:, :, ::2, ::3]):
        problem = feature_maps(torch.float32, memory_format)
        problem.tensors = {name: view(t) if t.dim() == 4 else t for name, t in problem.tensors.items()}
        problem.dout = view(problem.dout)
        results = problem.run(backend)
        assert results["out"].shape == problem.dout.shape
        assert_follows_error_rule(
            flat(problem), flat_results(results), yardsticks(flat(problem)), on_tensor_cores(backend)
        )


@for_each_backend
def test_reading_changes_no_input(backend):
    for problem in (PositionCase(2, 8, 16, 70, 60, "bf16").problem(), ChannelCase(2, 30, 40, "bf16").problem()):
        problem.tensors = {n: arrange(t, "padded") if t.dim() == 3 else t for n, t in problem.tensors.items()}
        before = {name: tensor.clone() for name, tensor in problem.tensors.items()}, problem.dout.clone()
        problem.run(backend)
        assert all(torch.equal(tensor, before[0][name]) for name, tensor in problem.tensors.items())
        assert torch.equal(problem.dout, before[1])


@for_each_backend
def test_one_tensor_in_every_role(backend):
    """query, key, value and residual may be one and the same memory."""
    x = torch.randn(2, 9, 50)
    expected = danet_kernels.reference.position_attention(x.double(), x.double(), x.double(), x.double())
    leaf = x.to(device_of(backend), copy=True).requires_grad_()
    out = danet_kernels.position_attention(leaf, leaf, leaf, leaf, backend=backend)
    torch.testing.assert_close(out.double().cpu(), expected, rtol=1e-5, atol=1e-5)
    (dx,) = torch.autograd.grad(out.square().sum(), leaf)
    twin = x.double().requires_grad_()
    (expected_dx,) = torch.autograd.grad(
        danet_kernels.reference.position_attention(twin, twin, twin, twin).square().sum(), twin
    )
    torch.testing.assert_close(dx.double().cpu(), expected_dx, rtol=1e-4, atol=1e-3)


def test_memory_is_poisoned():
    """The other tests rely on it: what the package allocates and does not write is NaN."""
    assert _layout.empty_like_layout(torch.zeros(2, 3, 4), 5, 6, torch.float32).isnan().all()
    assert triton_launch.empty((2, 3), torch.bfloat16, torch.device("cpu")).isnan().all()
