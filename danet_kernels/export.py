"""Both operators in plain torch, for programs that are to run without this package: the one table of decompositions.

`ExportedProgram.run_decompositions` and torch.onnx take it. What comes out holds the map, which the operators never
write: M x N (C x C) numbers in fp32 for every image of the batch.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from . import reference
from ._layout import accumulator_dtype, is_channels_last
from .ops import OPS, _needs_attn

__all__ = ["decompositions"]


def decompositions(*, attention: bool = False, core: bool = True) -> dict[Any, Callable[..., Any]]:
    """The decompositions of both forward operators, for `torch.export.ExportedProgram.run_decompositions`.

    Either way the logits, their softmax and the sums are fp32 (fp64 for fp64), whatever the dtype of the inputs: these
    are cast first and the result is rounded once, so that fp16 does not overflow where the operators do not. A number
    differs from theirs in one case: where the Gram matrix of channel attention ("official") overflows to infinity the
    operator gives NaN, as the authors' code, and the decomposition what softmax(-G) gives.

    Args:
        attention: write torch's scaled_dot_product_attention, which torch.onnx turns into the operator Attention of
            opset 23; else two products with a softmax between them (MatMul and Softmax in ONNX).
        core: start from torch.export.default_decompositions(), which takes all the rest to core ATen operators. Without
            it our operators alone are replaced: for torch.onnx, which has translations of its own for what is beyond
            them, such as Resize for an upsampling.

    Returns:
        {operator: decomposition}. The backward operators are not in it: export for inference, under torch.no_grad().
    """
    table: dict[Any, Callable[..., Any]] = {}
    if core:
        table = torch.export.default_decompositions()
        if attention:  # the operator is to stay
            table.pop(torch.ops.aten.scaled_dot_product_attention.default, None)
    attend = _fused if attention else _products
    table[OPS.position_attention_forward.default] = partial(_position_attention_forward, attend)
    table[OPS.channel_attention_forward.default] = partial(_channel_attention_forward, attend)
    return table


Attend = Callable[[Tensor, Tensor, Tensor], Tensor]  # [B, M, D], [B, N, D], [B, N, C] -> [B, M, C]


def _products(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    return torch.softmax(query @ key.transpose(1, 2), dim=-1) @ value


def _fused(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    q, k, v = (tensor.unsqueeze(1) for tensor in (query, key, value))  # one head: [B, 1, positions, channels]
    return F.scaled_dot_product_attention(q, k, v, scale=1.0).squeeze(1)


def _position_attention_forward(
    attend: Attend,
    query: Tensor,  # [B, D, M]
    key: Tensor,  # [B, D, N]
    value: Tensor,  # [B, C, N]
    residual: Tensor | None,  # [B, C, M]
    gamma: Tensor | None,
    scale: float,
    save_for_backward: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """out [B, C, M], attn [B, C, M] or [0], lse [B, M], as the operator; what nobody uses does not stay in a graph."""
    wide = accumulator_dtype(value.dtype)
    q, k, v = (tensor.to(wide).transpose(1, 2) for tensor in (query, key, value))  # [B, M, D], [B, N, D], [B, N, C]
    if scale != 1.0:
        # On D x M numbers instead of M x N; and ONNX's Attention takes the root of its scale, which may be negative.
        q = scale * q
    attn = attend(q, k, v).transpose(1, 2)  # [B, C, M]
    out = reference._blend(attn, _cast(residual, wide), _cast(gamma, wide))
    needed = _needs_attn(value, residual, gamma, save_for_backward)
    saved = _to_layout(attn, value) if needed else value.new_empty(0, dtype=wide)
    return _to_layout(out.to(value.dtype), value), saved, torch.logsumexp(q @ k.transpose(1, 2), dim=-1)


def _channel_attention_forward(
    attend: Attend,
    x: Tensor,  # [B, C, N]
    gamma: Tensor | None,
    variant: str,
    residual: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """out [B, C, N], row_max [B, C] and row_sum [B, C] of the softmax, as the operator."""
    wide = x.to(accumulator_dtype(x.dtype))
    signed = -wide if variant == "official" else wide  # softmax(rowmax(G) - G) = softmax(-G)
    out = reference._blend(attend(signed, wide, wide), wide if residual else None, _cast(gamma, wide.dtype))
    logits = signed @ wide.transpose(1, 2)  # [B, C, C]
    row_max = logits.amax(dim=-1)  # [B, C]
    row_sum = torch.exp(logits - row_max[:, :, None]).sum(dim=-1)  # [B, C]
    return _to_layout(out.to(x.dtype), x), row_max, row_sum


def _cast(tensor: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    return None if tensor is None else tensor.to(dtype)


def _to_layout(tensor: Tensor, model: Tensor) -> Tensor:
    """`tensor` [B, C, N] in the layout of `model`, which the fake kernel has promised."""
    if is_channels_last(model):
        return tensor.transpose(1, 2).contiguous().transpose(1, 2)
    return tensor.contiguous()
