"""The operators as torch.library sees them: schemas, aliasing, fake kernels, autograd formulas, FLOP formulas, scalars.

A kernel of the stable ABI is boxed and not type-checked: a schema `int` that C++ reads as `double` delivers garbage. So
every scalar is passed with a value of its own, every flag both ways, and the results are compared with the reference.
"""

import itertools
from collections.abc import Callable

import pytest
import torch
from on_backend import backend_params, device_of, for_each_backend, is_slow, moved
from small import randn, randn_for, randn_like
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.library import opcheck
from torch.utils.flop_counter import FlopCounterMode

from danet_kernels import available_backends, channel_attention, position_attention, reference, use_backend

OPS = torch.ops.danet_kernels

SCHEMAS = {
    "position_attention_forward": "(Tensor query, Tensor key, Tensor value, Tensor? residual, Tensor? gamma, "
    "float scale, bool save_for_backward, str backend) -> (Tensor out, Tensor attn, Tensor lse)",
    "position_attention_backward": "(Tensor dout, Tensor query, Tensor key, Tensor value, Tensor attn, "
    "Tensor lse, Tensor? gamma, float scale, bool needs_query, bool needs_key, bool needs_value, bool needs_gamma, "
    "str backend) -> (Tensor dquery, Tensor dkey, Tensor dvalue, Tensor dgamma)",
    "channel_attention_forward": "(Tensor x, Tensor? gamma, str variant, bool residual, str backend) "
    "-> (Tensor out, Tensor row_max, Tensor row_sum)",
    "channel_attention_backward": "(Tensor dout, Tensor x, Tensor? gamma, Tensor row_max, Tensor row_sum, str variant, "
    "bool residual, bool needs_x, bool needs_gamma, str backend) -> (Tensor dx, Tensor dgamma)",
    "position_attention_forward_native": "(Tensor query, Tensor key, Tensor value, Tensor? residual, Tensor? gamma, "
    "float scale, bool needs_attn) -> (Tensor out, Tensor attn, Tensor lse)",
    "position_attention_backward_native": "(Tensor dout, Tensor query, Tensor key, Tensor value, Tensor attn, "
    "Tensor lse, Tensor? gamma, float scale, bool needs_query, bool needs_key, bool needs_value, bool needs_gamma) "
    "-> (Tensor dquery, Tensor dkey, Tensor dvalue, Tensor dgamma)",
    "channel_attention_forward_native": "(Tensor x, Tensor? gamma, bool official, bool residual) "
    "-> (Tensor out, Tensor row_max, Tensor row_sum)",
    "channel_attention_backward_native": "(Tensor dout, Tensor x, Tensor? gamma, Tensor row_max, Tensor row_sum, "
    "bool official, bool residual, bool needs_x, bool needs_gamma) -> (Tensor dx, Tensor dgamma)",
    "position_attention_forward_cuda": "(Tensor query, Tensor key, Tensor value, Tensor? residual, Tensor? gamma, "
    "float scale, bool needs_attn, bool tf32) -> (Tensor out, Tensor attn, Tensor lse)",
    "position_attention_backward_cuda": "(Tensor dout, Tensor query, Tensor key, Tensor value, Tensor attn, "
    "Tensor lse, Tensor? gamma, float scale, bool needs_query, bool needs_key, bool needs_value, bool needs_gamma, "
    "Tensor? magnify, bool deterministic, bool tf32) -> (Tensor dquery, Tensor dkey, Tensor dvalue, Tensor dgamma)",
    "channel_attention_forward_cuda": "(Tensor x, Tensor? gamma, bool official, bool residual, bool tf32) "
    "-> (Tensor out, Tensor row_max, Tensor row_sum)",
    "channel_attention_backward_cuda": "(Tensor dout, Tensor x, Tensor? gamma, Tensor row_max, Tensor row_sum, "
    "bool official, bool residual, bool needs_x, bool needs_gamma, bool tf32) -> (Tensor dx, Tensor dgamma)",
    "position_attention_forward_hopper": "(Tensor query, Tensor key, Tensor value, Tensor? residual, Tensor? gamma, "
    "float scale, bool needs_attn) -> (Tensor out, Tensor attn, Tensor lse)",
    "position_attention_dvalue_hopper": "(Tensor dout, Tensor query, Tensor key, Tensor value, Tensor lse, "
    "Tensor? gamma, float scale) -> Tensor",
    "channel_attention_forward_hopper": "(Tensor x, Tensor? gamma, bool official, bool residual) "
    "-> (Tensor out, Tensor row_max, Tensor row_sum)",
    "channel_attention_backward_hopper": "(Tensor dout, Tensor x, Tensor? gamma, Tensor row_max, Tensor row_sum, "
    "bool official, bool residual, bool needs_x, bool needs_gamma) -> (Tensor dx, Tensor dgamma)",
}


def test_the_operators_are_the_documented_ones():
    prefix = "danet_kernels::"
    registered = [name for name in torch._C._dispatch_get_all_op_names() if name.startswith(prefix)]
    listing = {
        name.removeprefix(prefix): str(getattr(OPS, name.removeprefix(prefix)).default._schema) for name in registered
    }
    assert listing == {name: f"{prefix}{name}{schema}" for name, schema in SCHEMAS.items()}


# ---- inputs


def contiguous(*shape: int, seed: int, dtype: torch.dtype) -> Tensor:
    return randn(*shape, seed=seed, dtype=dtype)


def channels_last(batch: int, rows: int, columns: int, seed: int, dtype: torch.dtype) -> Tensor:
    return randn(batch, columns, rows, seed=seed, dtype=dtype).transpose(1, 2)


def strided(batch: int, rows: int, columns: int, seed: int, dtype: torch.dtype) -> Tensor:
    """Every second row and column of a larger tensor, from an odd offset."""
    return randn(batch, 2 * rows + 1, 2 * columns + 3, seed=seed, dtype=dtype)[:, 1::2, 3::2]


def expanded(batch: int, rows: int, columns: int, seed: int, dtype: torch.dtype) -> Tensor:
    return randn(1, rows, 1, seed=seed, dtype=dtype).expand(batch, rows, columns)


# name: batch, D, C, M, N, layout, dtype, which of residual and gamma are given, which inputs require a gradient
Kind = tuple[int, int, int, int, int, Callable[..., Tensor], torch.dtype, str, str]
KINDS: dict[str, Kind] = {
    "contiguous": (2, 3, 4, 6, 6, contiguous, torch.float32, "rg", "qkvrg"),
    "channels_last": (2, 3, 4, 6, 6, channels_last, torch.float32, "rg", "qkvrg"),
    "strided": (2, 3, 4, 6, 6, strided, torch.float32, "rg", "qkvrg"),
    "fp16": (1, 3, 4, 6, 6, contiguous, torch.float16, "rg", ""),
    "bf16": (1, 3, 4, 6, 6, channels_last, torch.bfloat16, "rg", ""),
    "fp64_bare": (2, 3, 4, 6, 6, contiguous, torch.float64, "", "qkv"),
    "half_bare": (2, 3, 4, 6, 6, contiguous, torch.float16, "", ""),
    "some_gradients": (2, 3, 4, 6, 6, contiguous, torch.float32, "rg", "kg"),
    "more_keys": (2, 3, 4, 5, 7, channels_last, torch.float32, "r", "qv"),
    "one_position": (1, 1, 1, 1, 1, contiguous, torch.float32, "g", "qkvg"),
    "empty_batch": (0, 3, 4, 6, 6, contiguous, torch.float32, "rg", ""),
}


def position_inputs(kind: str) -> list[Tensor | None]:
    """query [B, D, M], key [B, D, N], value [B, C, N], residual [B, C, M] or None, gamma [1] or None."""
    batch, d, channels, queries, keys, layout, dtype, given, gradients = KINDS[kind]
    shapes = {"q": (d, queries), "k": (d, keys), "v": (channels, keys), "r": (channels, queries)}
    inputs: dict[str, Tensor | None] = {
        name: layout(batch, *shape, seed=seed, dtype=dtype) for seed, (name, shape) in enumerate(shapes.items())
    }
    inputs["g"] = torch.tensor([0.5])
    for name in "rg":
        if name not in given:
            inputs[name] = None
    for name in gradients:
        tensor = inputs[name]
        if tensor is not None:
            tensor.requires_grad_()
    return [inputs[name] for name in "qkvrg"]


def channel_inputs(kind: str) -> list[Tensor | None]:
    """x [B, C, N], gamma [1] or None."""
    _, _, value, _, gamma = position_inputs(kind)
    return [value, gamma]


def on_device_of(backend: str, tensors: list[Tensor | None]) -> list[Tensor | None]:
    device = device_of(backend)
    return [
        None if tensor is None else moved(tensor.detach(), device).requires_grad_(tensor.requires_grad)
        for tensor in tensors
    ]


def detached(tensors: list[Tensor | None]) -> list[Tensor | None]:
    return [None if tensor is None else tensor.detach() for tensor in tensors]


@for_each_backend
@pytest.mark.parametrize("kind", KINDS)
def test_opcheck_position_attention(kind, backend):
    inputs = on_device_of(backend, position_inputs(kind))
    any_gradient = any(tensor is not None and tensor.requires_grad for tensor in inputs)
    opcheck(OPS.position_attention_forward.default, (*inputs, 0.7, any_gradient, backend))
    query, key, value, residual, gamma = detached(inputs)
    out, attn, lse = OPS.position_attention_forward(query, key, value, residual, gamma, 0.7, True, backend)
    if attn.numel() == 0:  # out serves
        attn = out.to(lse.dtype)
    saved = (torch.ones_like(out), query, key, value, attn, lse, gamma)
    needs = (True, kind != "some_gradients", True, gamma is not None)
    opcheck(OPS.position_attention_backward.default, (*saved, 0.7, *needs, backend))


@for_each_backend
@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind not in ("half_bare", "more_keys")])
def test_opcheck_channel_attention(kind, backend):
    inputs = on_device_of(backend, channel_inputs(kind))
    variant, residual = ("paper", False) if kind == "strided" else ("official", True)
    opcheck(OPS.channel_attention_forward.default, (*inputs, variant, residual, backend))
    x, gamma = detached(inputs)
    out, row_max, row_sum = OPS.channel_attention_forward(x, gamma, variant, residual, backend)
    saved = (torch.ones_like(out), x, gamma, row_max, row_sum, variant, residual)
    opcheck(OPS.channel_attention_backward.default, (*saved, kind != "some_gradients", gamma is not None, backend))


LAYOUTS = (contiguous, channels_last, strided, expanded)


def described(tensors: tuple[Tensor, ...]) -> list[tuple[object, ...]]:
    return [(tuple(tensor.shape), tensor.stride(), tensor.dtype) for tensor in tensors]


@for_each_backend
@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.__name__)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_fake_kernels_return_the_real_strides(layout, dtype, backend):
    """Also where a dimension is 1, so that two layouts look alike."""
    mode = FakeTensorMode()
    sizes = list(itertools.product((1, 2), (1, 3), (1, 4), (1, 5)))
    for d, channels, queries, keys in sizes[:: 5 if is_slow(backend) else 1]:
        query, key = (layout(2, d, count, seed=0, dtype=dtype) for count in (queries, keys))
        value = layout(2, channels, keys, seed=1, dtype=dtype)
        gamma = torch.tensor(0.5, dtype=torch.float64)
        query, key, value, gamma = on_device_of(backend, [query, key, value, gamma])

        def run(query, key, value, gamma):
            out, attn, lse = OPS.position_attention_forward(query, key, value, None, gamma, 1.0, True, backend)
            saved = (query, key, value, attn, lse, gamma)
            gradients = OPS.position_attention_backward(out, *saved, 1.0, True, True, True, True, backend)
            result, row_max, row_sum = OPS.channel_attention_forward(value, gamma, "official", True, backend)
            statistics = (row_max, row_sum)
            channel = OPS.channel_attention_backward(
                result, value, gamma, *statistics, "official", True, True, True, backend
            )
            return (out, attn, lse, *gradients, result, *statistics, *channel)

        real = run(query, key, value, gamma)
        with mode:
            fake = run(*map(mode.from_tensor, (query, key, value, gamma)))
        assert described(fake) == described(real), (d, channels, queries, keys)


INTERNAL = {"native": ((), ()), "cuda": ((None, False, False), (False,))}
"""Backends with operators of their own, and what these take at their end besides: backward of position attention, all
others."""


@pytest.mark.parametrize("op", [name.removesuffix("_native") for name in SCHEMAS if name.endswith("_native")])
@pytest.mark.parametrize("backend", backend_params(*INTERNAL))
def test_internal_operators_neither_change_nor_return_their_inputs(op, backend):
    """They are called below autograd and have no fake kernels, so opcheck looks at the schema alone."""
    query, key, value, residual, gamma = on_device_of(backend, detached(position_inputs("more_keys")))
    gamma = torch.tensor([0.5], device=query.device)
    last, more = INTERNAL[backend]
    position, channel = (getattr(OPS, f"{name}_attention_forward_{backend}") for name in ("position", "channel"))
    out, attn, lse = position(query, key, value, residual, gamma, 0.7, True, *more)
    result, row_max, row_sum = channel(value, gamma, True, True, *more)
    arguments = {
        "position_attention_forward": (query, key, value, residual, gamma, 0.7, True, *more),
        "position_attention_backward": (out, query, key, value, attn, lse, gamma, 0.7, *[True] * 4, *last),
        "channel_attention_forward": (value, gamma, True, True, *more),
        "channel_attention_backward": (result, value, gamma, row_max, row_sum, *[True] * 4, *more),
    }[op]
    opcheck(getattr(OPS, f"{op}_{backend}").default, arguments, test_utils="test_schema")


# ---- scalars: fp64 where the backend has it, so that a wrong one cannot hide behind rounding


def assert_same(got: Tensor, expected: Tensor) -> None:
    rtol, atol = (1e-10, 1e-12) if got.dtype == torch.float64 else (1e-5, 1e-5)
    torch.testing.assert_close(got, expected, rtol=rtol, atol=atol)


def wide_inputs(backend: str = "eager") -> tuple[Tensor, ...]:
    """query [2, 3, 5], key [2, 3, 7], value [2, 4, 7], residual [2, 4, 5], gamma [1], dout [2, 4, 5]."""
    shapes = ((2, 3, 5), (2, 3, 7), (2, 4, 7), (2, 4, 5), (1,), (2, 4, 5))
    return tuple(randn_for(backend, *shape, seed=seed) for seed, shape in enumerate(shapes))


@for_each_backend
@pytest.mark.parametrize("scale", [0.375, -1.25])
@pytest.mark.parametrize("save", [True, False])
def test_scalars_of_position_attention_forward(scale, save, backend):
    query, key, value, residual, gamma, _ = wide_inputs(backend)
    out, attn, lse = OPS.position_attention_forward(query, key, value, residual, gamma, scale, save, backend)
    assert_same(out, reference.position_attention(query, key, value, residual, gamma, scale=scale))
    assert_same(lse, torch.logsumexp(scale * query.transpose(1, 2) @ key, dim=-1))
    if save:
        assert_same(attn, reference.position_attention(query, key, value, scale=scale))
    else:
        assert attn.shape == (0,)


@for_each_backend
@pytest.mark.parametrize("needs", list(itertools.product([True, False], repeat=4)), ids=str)
def test_scalars_of_position_attention_backward(needs, backend):
    query, key, value, _, gamma, dout = wide_inputs(backend)
    scale = 0.375
    _, attn, lse = OPS.position_attention_forward(query, key, value, None, gamma, scale, True, backend)
    got = OPS.position_attention_backward(dout, query, key, value, attn, lse, gamma, scale, *needs, backend)
    leaves = [tensor.clone().requires_grad_() for tensor in (query, key, value, gamma)]
    out = reference.position_attention(*leaves[:3], None, leaves[3], scale=scale)
    for gradient, expected, needed in zip(got, torch.autograd.grad(out, leaves, dout), needs, strict=True):
        if needed:
            assert_same(gradient, expected)
        else:
            assert gradient.shape == (0,)


@for_each_backend
@pytest.mark.parametrize("variant", ["official", "paper"])
@pytest.mark.parametrize("residual", [True, False])
def test_scalars_of_channel_attention(variant, residual, backend):
    _, _, x, _, gamma, _ = wide_inputs(backend)
    dout = randn_like(x, seed=9)
    out, row_max, row_sum = OPS.channel_attention_forward(x, gamma, variant, residual, backend)
    leaves = [tensor.clone().requires_grad_() for tensor in (x, gamma)]
    expected = reference.channel_attention(*leaves, variant=variant, residual=residual)
    assert_same(out, expected.detach())
    logits = (x @ x.transpose(1, 2)) * (1 if variant == "paper" else -1)  # [B, C, C]
    assert_same(row_max + row_sum.log(), torch.logsumexp(logits, dim=-1))
    gradients = torch.autograd.grad(expected, leaves, dout)
    for needs in itertools.product([True, False], repeat=2):
        got = OPS.channel_attention_backward(dout, x, gamma, row_max, row_sum, variant, residual, *needs, backend)
        for gradient, gradient_expected, needed in zip(got, gradients, needs, strict=True):
            if needed:
                assert_same(gradient, gradient_expected)
            else:
                assert gradient.shape == (0,)


# ---- autograd and FLOP formulas


def test_forward_operators_have_an_autograd_formula():
    query, key, value, residual, gamma, _ = (tensor.requires_grad_() for tensor in wide_inputs())
    for out in (
        OPS.position_attention_forward(query, key, value, residual, gamma, 1.0, True, "auto")[0],
        OPS.channel_attention_forward(value, gamma, "official", True, "auto")[0],
    ):
        assert out.requires_grad
    _, attn, lse = OPS.position_attention_forward(query, key, value, residual, gamma, 1.0, True, "auto")
    assert not attn.requires_grad
    assert not lse.requires_grad


@pytest.mark.parametrize("name", [name for name in SCHEMAS if not name.endswith(("forward", "hopper"))])
def test_operators_without_a_formula_raise(name):
    """Left alone, torch would run the backward pass with a warning and leave the gradients out."""
    op, _, backend = name.rpartition("_")
    if backend in INTERNAL and (reasons := available_backends("position_attention")[backend]):
        pytest.skip("; ".join(reasons))
    query, key, value, residual, gamma, dout = wide_inputs(backend if backend in INTERNAL else "eager")
    _, attn, lse = OPS.position_attention_forward(query, key, value, residual, gamma, 1.0, True, "eager")
    _, row_max, row_sum = OPS.channel_attention_forward(value, gamma, "official", True, "eager")
    position = (dout, query, key, value, attn, lse, gamma, 1.0, *(True,) * 4)
    channel = (value, value, gamma, row_max, row_sum)
    last, more = INTERNAL.get(backend, ((), ()))
    arguments = {
        "position_attention_forward": (query, key, value, residual, gamma, 1.0, True, *more),
        "position_attention_backward": (*position, *last),
        "position_attention": (*position, "auto"),
        "channel_attention_forward": (value, gamma, True, True, *more),
        "channel_attention_backward": (*channel, *(True,) * 4, *more),
        "channel_attention": (*channel, "official", True, True, True, "auto"),
    }[op]
    value.requires_grad_()
    results = getattr(OPS, name)(*arguments)
    with pytest.raises(NotImplementedError, match=r"not implemented|no second derivative"):
        sum(result.sum() for result in results).backward()


def counted_flops(function: Callable[..., Tensor], *tensors: Tensor, backward: bool) -> int:
    leaves = [tensor.clone().requires_grad_() for tensor in tensors]
    counter = FlopCounterMode(display=False)
    with counter:
        out = function(*leaves)
        if backward:
            out.sum().backward()
    return counter.get_total_flops()


def test_flop_formulas():
    """Forward: the matrix products of the reference. Backward: those of the reference plus the map once more, which the
    reference has saved; channel attention gets that back by multiplying dG + dG^T with x once instead of twice."""
    query, key, value, *_ = wide_inputs()
    batch, d, queries, keys = *query.shape, key.shape[2]
    recomputed = 2 * batch * d * queries * keys
    cases = ((position_attention, reference.position_attention, (query, key, value), recomputed),)
    cases += ((channel_attention, reference.channel_attention, (value,), 0),)
    for ours, theirs, inputs, extra in cases:
        assert counted_flops(ours, *inputs, backward=False) == counted_flops(theirs, *inputs, backward=False) > 0
        expected = counted_flops(theirs, *inputs, backward=True) + extra
        assert counted_flops(ours, *inputs, backward=True) == expected


def test_flops_are_counted_on_meta_tensors_too():
    query, value = torch.empty(2, 64, 97, 97, device="meta"), torch.empty(2, 512, 97, 97, device="meta")
    counter = FlopCounterMode(display=False)
    with counter, use_backend("eager"):
        position_attention(query, query, value)
        channel_attention(value)
    assert counter.get_total_flops() == 2 * 2 * 9409**2 * (64 + 512) + 4 * 2 * 512**2 * 9409
