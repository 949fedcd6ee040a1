"""The reference behind the backend contract: fp32 inside (fp64 for fp64), every map materialised, on any device.

The maps come from reference.py; the gradients are the formulas of docs/math.md, section by section.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .. import reference
from .._layout import accumulator_dtype, to_layout


def why_not(op: str, *inputs: Tensor) -> list[str]:
    """Reasons why the eager backend cannot run: none, it runs everywhere."""
    return []


def position_attention_forward(
    query: Tensor,  # [B, D, M]
    key: Tensor,  # [B, D, N]
    value: Tensor,  # [B, C, N]
    residual: Tensor | None,  # [B, C, M]
    gamma: Tensor | None,
    scale: float,
    needs_attn: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """out [B, C, M], attn [B, C, M] or [0], lse [B, M]."""
    q, k, v = _upcast(query), _upcast(key), _upcast(value)
    logits = scale * (q.transpose(1, 2) @ k)  # [B, M, N]
    attn = v @ torch.softmax(logits, dim=-1).transpose(1, 2)  # [B, C, M]
    out = reference._blend(attn, _upcast_optional(residual), _upcast_optional(gamma))
    saved = to_layout(attn, value, attn.dtype) if needs_attn else attn.new_empty(0)
    lse = torch.logsumexp(logits, dim=-1)
    # A row with a logit of +inf is NaN throughout, as its softmax is; lse = +inf would make zeros of it.
    return to_layout(out, value, value.dtype), saved, torch.where(lse == torch.inf, torch.nan, lse)


def position_attention_backward(
    dout: Tensor,  # [B, C, M]
    query: Tensor,  # [B, D, M]
    key: Tensor,  # [B, D, N]
    value: Tensor,  # [B, C, N]
    attn: Tensor,  # [B, C, M]
    lse: Tensor,  # [B, M]
    gamma: Tensor | None,
    scale: float,
    needs: tuple[bool, bool, bool, bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """dquery [B, D, M], dkey [B, D, N], dvalue [B, C, N], dgamma like gamma; [0] for what is not needed."""
    needs_query, needs_key, needs_value, needs_gamma = needs
    g, q, k, v = _upcast(dout), _upcast(query), _upcast(key), _upcast(value)
    strength = 1.0 if gamma is None else _upcast(gamma).reshape(())
    delta = (g * attn).sum(dim=1)  # [B, M]
    dquery = dkey = dvalue = dgamma = lse.new_empty(0)
    if needs_query or needs_key or needs_value:
        probabilities = torch.exp(scale * (q.transpose(1, 2) @ k) - lse[:, :, None])  # [B, M, N]
    if needs_query or needs_key:
        dlogits = probabilities * (g.transpose(1, 2) @ v - delta[:, :, None])  # [B, M, N], without gamma and scale
    if needs_query:
        dquery = to_layout(strength * scale * (k @ dlogits.transpose(1, 2)), query, query.dtype)
    if needs_key:
        dkey = to_layout(strength * scale * (q @ dlogits), key, key.dtype)
    if needs_value:
        dvalue = to_layout(strength * (g @ probabilities), value, value.dtype)
    if needs_gamma:
        assert gamma is not None
        dgamma = delta.sum().to(gamma.dtype).reshape(gamma.shape)
    return dquery, dkey, dvalue, dgamma


def channel_attention_forward(
    x: Tensor,  # [B, C, N]
    gamma: Tensor | None,
    variant: str,
    residual: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """out [B, C, N], row_max [B, C] and row_sum [B, C] of the softmax over the signed Gram matrix."""
    wide = _upcast(x)
    logits = _channel_sign(variant) * (wide @ wide.transpose(1, 2))  # [B, C, C]
    row_max = logits.amax(dim=-1) if x.shape[1] else logits.sum(dim=-1)  # [B, C]
    unnormalised = torch.exp(logits - row_max[:, :, None])  # [B, C, C]
    row_sum = unnormalised.sum(dim=-1)  # [B, C]
    if variant == "official":
        # rowmax(G) - G has inf - inf in it where a row of G holds +inf; softmax(-G) alone would hide that.
        row_sum = torch.where((logits == -torch.inf).any(dim=-1), torch.nan, row_sum)
    attn = (unnormalised / row_sum[:, :, None]) @ wide  # [B, C, N]
    out = reference._blend(attn, wide if residual else None, _upcast_optional(gamma))
    return to_layout(out, x, x.dtype), row_max, row_sum


def channel_attention_backward(
    dout: Tensor,  # [B, C, N]
    x: Tensor,  # [B, C, N]
    gamma: Tensor | None,
    row_max: Tensor,  # [B, C]
    row_sum: Tensor,  # [B, C]
    variant: str,
    residual: bool,
    needs: tuple[bool, bool],
) -> tuple[Tensor, Tensor]:
    """dx [B, C, N], dgamma like gamma; [0] for what is not needed."""
    needs_x, needs_gamma = needs
    g, wide = _upcast(dout), _upcast(x)
    sign = _channel_sign(variant)
    strength = 1.0 if gamma is None else _upcast(gamma).reshape(())
    logits = sign * (wide @ wide.transpose(1, 2))  # [B, C, C]
    probabilities = torch.exp(logits - row_max[:, :, None]) / row_sum[:, :, None]  # [B, C, C]
    dprobabilities = g @ wide.transpose(1, 2)  # [B, C, C], without gamma
    delta = (probabilities * dprobabilities).sum(dim=-1)  # [B, C]
    dx = dgamma = row_max.new_empty(0)
    if needs_x:
        dgram = sign * probabilities * (dprobabilities - delta[:, :, None])  # [B, C, C], without gamma
        through_map = probabilities.transpose(1, 2) @ g + (dgram + dgram.transpose(1, 2)) @ wide  # [B, C, N]
        dx = to_layout(strength * through_map + g if residual else strength * through_map, x, x.dtype)
    if needs_gamma:
        assert gamma is not None
        dgamma = delta.sum().to(gamma.dtype).reshape(gamma.shape)
    return dx, dgamma


def _channel_sign(variant: str) -> float:
    """softmax(rowmax(G) - G) = softmax(-G) for "official", softmax(G) for "paper"."""
    return -1.0 if variant == "official" else 1.0


def _upcast(tensor: Tensor) -> Tensor:
    return tensor.to(accumulator_dtype(tensor.dtype))


def _upcast_optional(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else _upcast(tensor)
