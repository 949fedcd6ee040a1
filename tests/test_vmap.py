"""torch.vmap and batched gradients: one call of the operator that equals a loop over the mapped dimension."""

import itertools

import pytest
import torch
from on_backend import BACKENDS, backend_params
from small import both, close, inputs, randn_for

from danet_kernels import channel_attention, position_attention

pytestmark = pytest.mark.parametrize("backend", backend_params(*BACKENDS))
OPS = torch.ops.danet_kernels
SUBSETS = ["".join(subset) for n in range(1, 6) for subset in itertools.combinations("qkvrg", n)]


def test_batched_gradients_equal_a_loop(backend):
    for function, used in both(backend):
        given = inputs(backend)
        out = function(*given)
        leaves = [given[i] for i in used]
        douts = randn_for(backend, 3, *out.shape, seed=12)
        batched = torch.autograd.grad(out, leaves, douts, is_grads_batched=True, retain_graph=True)
        looped = [torch.autograd.grad(out, leaves, dout, retain_graph=True) for dout in douts]
        for got, wanted in zip(batched, map(torch.stack, zip(*looped, strict=True)), strict=True):
            close(got, wanted)


@pytest.mark.parametrize("mapped", SUBSETS)
def test_vmap_equals_a_loop(mapped, backend):
    """Every subset of mapped inputs, gamma among them, each along a dimension of its own, and their gradients."""
    size, dims = 3, {"q": 0, "k": 2, "v": 4, "r": 1, "g": 0}
    given = [
        randn_for(backend, size, *tensor.shape, seed=seed).movedim(0, dims[name]).requires_grad_()
        if name in mapped
        else tensor
        for seed, (name, tensor) in enumerate(zip("qkvrg", inputs(backend), strict=True))
    ]
    in_dims = tuple(dims[name] if name in mapped else None for name in "qkvrg")
    for function, used in both(backend):
        if not any(in_dims[i] is not None for i in used):
            continue
        got = torch.vmap(function, in_dims=in_dims, out_dims=1)(*given)
        expected = torch.stack(
            [
                function(*(t if dim is None else t.select(dim, i) for t, dim in zip(given, in_dims, strict=True)))
                for i in range(size)
            ],
            dim=1,
        )
        close(got, expected)
        leaves = [given[i] for i in used]
        wanted = torch.autograd.grad(expected.square().sum(), leaves)
        for gradient, gradient_expected in zip(torch.autograd.grad(got.square().sum(), leaves), wanted, strict=True):
            close(gradient, gradient_expected)


def test_vmap_of_the_backward_operators_equals_a_loop(backend):
    query, key, value, _, gamma = (t.flatten(2) if t.dim() > 1 else t for t in inputs(backend, gradients=""))
    _, attn, lse = OPS.position_attention_forward(query, key, value, value, gamma, 1.0, True, backend)
    _, row_max, row_sum = OPS.channel_attention_forward(value, gamma, "official", True, backend)
    douts = randn_for(backend, 3, *value.shape, seed=13)
    for needs_gamma in (True, False):
        calls = (
            lambda dout, needs=needs_gamma: OPS.position_attention_backward(
                dout, query, key, value, attn, lse, gamma, 1.0, True, True, True, needs, backend
            ),
            lambda dout, needs=needs_gamma: OPS.channel_attention_backward(
                dout, value, gamma, row_max, row_sum, "official", True, True, needs, backend
            ),
        )
        for call in calls:
            looped = [torch.stack(results) for results in zip(*map(call, douts), strict=True)]
            mapped = torch.vmap(call, out_dims=tuple(0 if t.numel() else None for t in looped))(douts)
            for got, wanted in zip(mapped, looped, strict=True):
                if wanted.numel():
                    close(got, wanted)


def test_nested_vmap(backend):
    x = randn_for(backend, 2, 3, 1, 4, 5)
    nested = torch.vmap(torch.vmap(lambda x: channel_attention(x, backend=backend)))(x)
    close(nested.flatten(0, 2), channel_attention(x.flatten(0, 2), backend=backend))


@pytest.mark.parametrize("shape", [(3, 0, 4, 5), (3, 2, 4, 0), (3, 2, 0, 5), (0, 2, 4, 5)], ids=str)
def test_vmap_of_an_empty_map(shape, backend):
    x = randn_for(backend, *shape)
    assert torch.vmap(lambda x: channel_attention(x, backend=backend))(x).shape == shape
    query = x[:, :, :0] if shape[2] == 0 else x[:, :, :2]
    out = torch.vmap(lambda q, v: position_attention(q, q, v, backend=backend))(query, x)
    assert out.shape == shape
