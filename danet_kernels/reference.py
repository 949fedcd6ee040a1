"""The definition of both operators, with every map materialised. Everything else in this package is tested against it.

It computes in the dtype of its inputs and is differentiable by plain autograd. Pass fp64 to get a yardstick; pass the
dtype of a model to see what the usual eager formulation costs in memory and in accuracy.

Symbols (docs/math.md): B batch, C value channels, D query and key channels, *S query positions (M in all),
*T key positions (N in all). Imports nothing of this package.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = [
    "channel_attention",
    "channel_attention_map",
    "position_attention",
    "position_attention_map",
]


def position_attention(
    query: Tensor,  # [B, D, *S]
    key: Tensor,  # [B, D, *T]
    value: Tensor,  # [B, C, *T]
    residual: Tensor | None = None,  # [B, C, *S]
    gamma: Tensor | float | None = None,  # one element
    *,
    scale: float = 1.0,
) -> Tensor:  # [B, C, *S]
    """Position attention of Fu et al., CVPR 2019, section 3.2, Eq. 1 and 2, with the M x N map in memory."""
    logits = scale * (query.flatten(2).transpose(1, 2) @ key.flatten(2))  # [B, M, N]
    probabilities = torch.softmax(logits, dim=-1)  # [B, M, N]
    attn = value.flatten(2) @ probabilities.transpose(1, 2)  # [B, C, M]
    return _blend(attn.unflatten(2, query.shape[2:]), residual, gamma)


def channel_attention(
    x: Tensor,  # [B, C, *S]
    gamma: Tensor | float | None = None,  # one element
    *,
    variant: str = "official",
    residual: bool = True,
) -> Tensor:  # [B, C, *S]
    """Channel attention of Fu et al., CVPR 2019, section 3.3, Eq. 3 and 4, with the C x C map in memory."""
    attn = channel_attention_map(x, variant=variant) @ x.flatten(2)  # [B, C, N]
    return _blend(attn.unflatten(2, x.shape[2:]), x if residual else None, gamma)


def position_attention_map(
    query: Tensor,  # [B, D, *S]
    key: Tensor,  # [B, D, *T]
    points: Tensor,  # [P] or [B, P], indices into the flattened query positions
    *,
    scale: float = 1.0,
) -> Tensor:  # [B, P, *T]
    """Rows of the position attention map for chosen query positions."""
    flat = query.flatten(2)  # [B, D, M]
    index = points.expand(flat.shape[0], points.shape[-1])  # [B, P]
    chosen = flat.gather(2, index[:, None, :].expand(-1, flat.shape[1], -1))  # [B, D, P]
    logits = scale * (chosen.transpose(1, 2) @ key.flatten(2))  # [B, P, N]
    return torch.softmax(logits, dim=-1).unflatten(2, key.shape[2:])


def channel_attention_map(x: Tensor, *, variant: str = "official") -> Tensor:
    """Map [B, C, C] of x [B, C, *S]. "official" follows the authors' code, "paper" the published Eq. 3."""
    flat = x.flatten(2)  # [B, C, N]
    gram = flat @ flat.transpose(1, 2)  # [B, C, C]
    if variant == "official":
        gram = gram.amax(dim=-1, keepdim=True) - gram
    return torch.softmax(gram, dim=-1)


def _blend(attn: Tensor, residual: Tensor | None, gamma: Tensor | float | None) -> Tensor:
    """gamma * attn + residual, either of which may be left out."""
    if isinstance(gamma, Tensor):
        attn = gamma.reshape(()) * attn
    elif gamma is not None:
        attn = gamma * attn
    return attn if residual is None else attn + residual
