"""Autocast: what it casts, what it leaves alone, and that nothing inside an operator is cast again."""

import pytest
import torch
from on_backend import device_of, for_each_backend, for_each_cpu_backend
from small import both, inputs, randn_like

from danet_kernels import (
    channel_attention_map,
    position_attention,
    position_attention_map,
)

pytestmark = pytest.mark.usefixtures("deterministic")


@for_each_backend
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_casts_the_tensors_but_not_gamma(dtype, backend):
    given = inputs(backend, dtype=torch.float32)
    with torch.no_grad():
        given[4].fill_(1.0009765625)  # fp32 tells it from 1, bf16 does not
    cast = [tensor.detach().to(dtype).requires_grad_() for tensor in given[:4]] + [given[4].detach().requires_grad_()]
    for function, used in both(backend):
        with torch.autocast(device_of(backend), dtype):
            out = function(*given)
        expected = function(*cast)
        assert out.dtype == dtype
        assert torch.equal(out, expected)
        dout = randn_like(out, seed=15)
        got = torch.autograd.grad(out, [given[i] for i in used], dout)
        wanted = torch.autograd.grad(expected, [cast[i] for i in used], dout)
        assert all(gradient.dtype == torch.float32 for gradient in got)
        assert all(torch.equal(a, b.float()) for a, b in zip(got, wanted, strict=True))


@for_each_backend
def test_autocast_unites_mixed_dtypes(backend):
    query, key, value, residual, gamma = (tensor.detach() for tensor in inputs(backend, dtype=torch.float32))
    with torch.autocast(device_of(backend), torch.bfloat16):
        out = position_attention(query.bfloat16(), key, value.half(), residual, gamma, backend=backend)
    low = [tensor.bfloat16() for tensor in (query, key, value.half(), residual)]
    assert torch.equal(out, position_attention(*low, gamma, backend=backend))


@for_each_cpu_backend
def test_autocast_leaves_fp64_alone(backend):
    given = inputs(backend)
    for function, used in both(backend):
        leaves = [given[i] for i in used]
        expected = function(*given)
        wanted = torch.autograd.grad(expected.square().sum(), leaves)
        with torch.autocast(device_of(backend), torch.bfloat16):
            out = function(*given)
            got = torch.autograd.grad(out.square().sum(), leaves)
        assert out.dtype == torch.float64
        assert torch.equal(out, expected)
        assert all(map(torch.equal, got, wanted))


@for_each_backend
def test_a_backward_inside_autocast_is_the_backward_outside(backend):
    """It runs below autocast either way: sums stay in fp32."""
    for function, used in both(backend):
        given = inputs(backend, dtype=torch.float32, size=(6, 5))
        leaves = [given[i] for i in used]
        with torch.autocast(device_of(backend), torch.bfloat16):
            out = function(*given)
            dout = torch.ones_like(out)
            inside = torch.autograd.grad(out, leaves, dout, retain_graph=True)
        outside = torch.autograd.grad(out, leaves, dout)
        assert all(map(torch.equal, inside, outside))


@for_each_backend
def test_autocast_that_is_switched_off_casts_nothing(backend):
    given = inputs(backend, dtype=torch.float32)
    with torch.autocast(device_of(backend), torch.bfloat16), torch.autocast(device_of(backend), enabled=False):
        assert position_attention(*given, backend=backend).dtype == torch.float32


def test_the_maps_stay_in_fp32():
    """Autocast alone would round their logits to bf16 and hand back maps in bf16."""
    query, key, value, *_ = (tensor.detach() for tensor in inputs("eager", dtype=torch.float32))
    points = torch.tensor([0, 7])
    expected = position_attention_map(query, key, points), channel_attention_map(value)
    with torch.autocast("cpu", torch.bfloat16):
        got = position_attention_map(query, key, points), channel_attention_map(value)
    assert all(map(torch.equal, got, expected))
