"""Both operators and all their gradients, written out once for torch tensors and for numpy arrays.

Two uses. In numpy's long double they are exact enough to judge fp64. In fp32 they are a second ideal kernel: the same
result as automatic differentiation of reference.py with other roundings, those of every backward that has no map: P
from the saved lse, and delta = sum_c dout attn instead of sum_j P dP. `xp` is the arrays' module, torch or numpy;
`fused` asks for other roundings in delta and its twin of channel attention.
"""

from __future__ import annotations

from typing import Any

import numpy as np

Arrays = dict[str, Any]


def position_attention(xp: Any, given: Arrays, dout: Any, scale: float, fused: bool = False) -> Arrays:
    """out, attn and the gradients of what is given: query [B, D, M], key [B, D, N], value [B, C, N], ..."""
    q, k, v, gamma = given["query"], given["key"], given["value"], given.get("gamma")
    strength = 1 if gamma is None else gamma.reshape(())
    logits = scale * product(xp, q.swapaxes(1, 2), k.swapaxes(1, 2))  # [B, M, N]
    weights, lse = softmax(xp, logits)  # [B, M, N], [B, M]
    attn = product(xp, v, weights)  # [B, C, M]
    out = strength * attn + given.get("residual", 0)
    weights = xp.exp(logits - lse[:, :, None])  # [B, M, N], what the backward has
    delta = dot(xp, dout, attn, 1, fused)  # [B, M]
    dlogits = weights * (product(xp, dout.swapaxes(1, 2), v.swapaxes(1, 2)) - delta[:, :, None])  # [B, M, N]
    return {
        "out": out,
        "attn": attn,
        "dquery": strength * scale * product(xp, k, dlogits),
        "dkey": strength * scale * product(xp, q, dlogits.swapaxes(1, 2)),
        "dvalue": strength * product(xp, dout, weights.swapaxes(1, 2)),
        "dresidual": dout,
        "dgamma": in_sequence(xp, delta),
    }


def channel_attention(xp: Any, given: Arrays, dout: Any, variant: str, residual: bool, fused: bool = False) -> Arrays:
    """out, attn and the gradients of what is given: x [B, C, N] and perhaps gamma."""
    x, gamma = given["x"], given.get("gamma")
    strength = 1 if gamma is None else gamma.reshape(())
    sign = -1 if variant == "official" else 1
    weights, _ = softmax(xp, sign * product(xp, x, x))  # [B, C, C]
    attn = product(xp, weights, x.swapaxes(1, 2))  # [B, C, N]
    h = product(xp, dout, x)  # [B, C, C]
    r = dot(xp, weights, h, 2, fused)  # [B, C]
    dgram = sign * weights * (h - r[:, :, None])  # [B, C, C]
    through_map = product(xp, weights.swapaxes(1, 2), dout.swapaxes(1, 2))  # [B, C, N]
    through_gram = product(xp, dgram + dgram.swapaxes(1, 2), x.swapaxes(1, 2))  # [B, C, N]
    dx = strength * (through_map + through_gram)
    return {
        "out": strength * attn + (x if residual else 0),
        "attn": attn,
        "dx": dx + dout if residual else dx,
        "dgamma": in_sequence(xp, r),
    }


def softmax(xp: Any, logits: Any) -> tuple[Any, Any]:
    """Weights, and the log-sum-exp of each row."""
    row_max = xp.amax(logits, -1)
    weights = xp.exp(logits - row_max[:, :, None])
    row_sum = weights.sum(-1)
    return weights / row_sum[:, :, None], row_max + xp.log(row_sum)


def dot(xp: Any, a: Any, b: Any, axis: int, fused: bool) -> Any:
    """The sum of a * b along an axis; `fused`: rounded once, which fused multiply-adds come close to."""
    if not fused:
        return (a * b).sum(axis)
    if xp.__name__ == "torch":
        return xp.from_numpy(dot(np, a.numpy(), b.numpy(), axis, fused))
    return (a.astype(np.longdouble) * b).sum(axis).astype(a.dtype)


def in_sequence(xp: Any, rows: Any) -> Any:
    """The sum [1] of all rows, one after the other as a loop would do it."""
    if xp.__name__ == "torch":  # whose own sums go in a tree, and whose cumsum is wider inside
        return xp.from_numpy(in_sequence(np, rows.numpy()))
    return xp.cumsum(rows.reshape(-1))[-1:] if rows.size else xp.zeros(1, rows.dtype)


def product(xp: Any, a: Any, b: Any) -> Any:
    """a [B, m, k] times b [B, n, k] transposed: long double has no BLAS, and rows times rows is its fast order."""
    if xp.__name__ == "torch":
        return a @ b.swapaxes(1, 2)
    return xp.einsum("bmk,bnk->bmn", xp.ascontiguousarray(a), xp.ascontiguousarray(b))
