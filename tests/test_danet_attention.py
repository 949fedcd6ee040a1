"""The attention modules: right by the error rule, the identity at the start, layouts, names."""

import pytest
import torch
from cases import Problem
from small import randn
from tolerance import assert_follows_error_rule, yardsticks

from danet import ChannelAttention, PositionAttention
from danet_kernels import channel_attention_map, position_attention_map

C, SIZE = 16, (5, 7)


def feature_map(dtype=torch.float32, seed=0):
    return randn(2, C, *SIZE, seed=seed, dtype=dtype)


def with_gamma(module, gamma=0.75):
    torch.nn.init.constant_(module.gamma, gamma)
    return module


@pytest.mark.parametrize("backend", ["native", "eager"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_position_attention_follows_the_error_rule(backend, dtype):
    """What the convolutions make is given; so out, and the gradients of gamma and the projections' outputs."""
    module = with_gamma(PositionAttention(C, 4, backend=backend)).to(dtype)
    x, dout = feature_map(dtype), randn(2, C, *SIZE, seed=1, dtype=dtype)
    seen = {}
    for name in ("query", "key", "value"):
        getattr(module, f"{name}_conv").register_forward_hook(
            lambda _, __, out, name=name: seen.update({name: out}) or out.retain_grad()
        )
    out = module(x)
    out.backward(dout)
    results = {"out": out.detach(), "dgamma": module.gamma.grad}
    results |= {f"d{name}": tensor.grad for name, tensor in seen.items()}
    tensors = {name: tensor.detach() for name, tensor in seen.items()} | {"residual": x}
    problem = Problem(
        "position_attention",
        {name: tensor.flatten(2) for name, tensor in tensors.items()} | {"gamma": module.gamma.detach()},
        dout.flatten(2),
        {"scale": 1.0},
    )
    results = {name: value.flatten(2) if value.dim() == 4 else value for name, value in results.items()}
    assert_follows_error_rule(problem, results, yardsticks(problem))


@pytest.mark.parametrize("backend", ["native", "eager"])
@pytest.mark.parametrize("variant", ["official", "paper"])
def test_channel_attention_follows_the_error_rule(backend, variant):
    module = with_gamma(ChannelAttention(variant=variant, backend=backend))
    x = (0.3 * feature_map()).requires_grad_()
    dout = randn(2, C, *SIZE, seed=1, dtype=torch.float32)
    out = module(x)
    out.backward(dout)
    problem = Problem(
        "channel_attention",
        {"x": x.detach().flatten(2), "gamma": module.gamma.detach()},
        dout.flatten(2),
        {"variant": variant, "residual": True},
    )
    results = {"out": out.detach().flatten(2), "dx": x.grad.flatten(2), "dgamma": module.gamma.grad}
    assert_follows_error_rule(problem, results, yardsticks(problem))


def test_they_are_the_formulas_of_the_paper():
    """With the maps written out, in fp64."""
    x = 0.3 * feature_map(torch.float64)
    flat = x.flatten(2)  # [B, C, N]
    position = with_gamma(PositionAttention(C)).double()
    points = torch.arange(flat.shape[2])
    rows = position_attention_map(position.query_conv(x), position.key_conv(x), points)  # [B, N, H, W]
    attn = position.value_conv(x).flatten(2) @ rows.flatten(2).mT  # [B, C, N]
    torch.testing.assert_close(position(x).flatten(2), 0.75 * attn + flat)
    channel = with_gamma(ChannelAttention()).double()
    torch.testing.assert_close(channel(x).flatten(2), 0.75 * channel_attention_map(x) @ flat + flat)


@pytest.mark.parametrize("module", [PositionAttention(C), ChannelAttention()], ids=lambda module: type(module).__name__)
def test_training_starts_at_the_identity(module):
    """gamma = 0: x comes back bit for bit, and of all parameters gamma alone gets a gradient."""
    x = feature_map().requires_grad_()
    dout = randn(2, C, *SIZE, seed=1, dtype=torch.float32)
    out = module(x)
    assert torch.equal(out, x)
    module.zero_grad()
    out.backward(dout)
    for name, parameter in module.named_parameters():
        assert (parameter.grad.abs().max() > 0) == (name == "gamma"), name
    assert torch.equal(x.grad, dout)


@pytest.mark.parametrize("module", [PositionAttention(C), ChannelAttention()], ids=lambda module: type(module).__name__)
def test_channels_last_comes_out_as_it_went_in(module):
    with_gamma(module, 0.5)
    x = feature_map()
    out = module(x.contiguous(memory_format=torch.channels_last))
    assert out.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(out, module(x))


def test_names_and_sizes():
    module = PositionAttention(64)
    convs = [f"{name}_conv.{part}" for name in ("query", "key", "value") for part in ("weight", "bias")]
    assert list(module.state_dict()) == ["gamma", *convs]
    assert module.query_conv.weight.shape == (8, 64, 1, 1)
    assert module.value_conv.weight.shape == (64, 64, 1, 1)
    assert PositionAttention(4).key_conv.out_channels == 1
    assert PositionAttention(4, 3).key_conv.out_channels == 3
    assert list(ChannelAttention().state_dict()) == ["gamma"]


def test_backend_and_variant_are_passed_on():
    x = feature_map()
    for module in (PositionAttention(C, backend="no such backend"), ChannelAttention(backend="no such backend")):
        with pytest.raises(ValueError, match="no such backend"):
            module(x)
    with pytest.raises(ValueError, match="variant must be 'official' or 'paper', got 'other'"):
        ChannelAttention(variant="other")
