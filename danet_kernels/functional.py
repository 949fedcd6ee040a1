"""The public functions. They flatten the positions, check the arguments and call the operators of ops.py."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor
from torch._C._functorch import is_functorch_wrapped_tensor
from torch.autograd import forward_ad

from . import backends, reference
from ._checks import check_channel_attention, check_flag, check_number, check_position_attention
from ._layout import accumulator_dtype
from .ops import OPS


def position_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    residual: Tensor | None = None,
    gamma: Tensor | float | None = None,
    *,
    scale: float = 1.0,
    backend: str = "auto",
) -> Tensor:
    """Exact position attention without the map (Fu et al., CVPR 2019, section 3.2, Eq. 1 and 2).

        out[b, c, i] = gamma * sum_j P[b, i, j] * value[b, c, j] + residual[b, c, i]
        P[b, i, :]   = softmax over keys j of scale * sum_d query[b, d, i] * key[b, d, j]

    Peak extra memory is linear in the number of positions, forward and backward; the M x N map is never written.

    Args:
        query: [B, D, *S], any number of spatial dimensions >= 1, M positions in all.
        key: [B, D, *T], N positions in all; *T may differ from *S.
        value: [B, C, *T].
        residual: [B, C, *S], added at the end; None: nothing is added.
        gamma: one-element tensor (differentiable) or a number; None: 1. Any real floating dtype.
        scale: factor on the logits. DANet has none (1.0), unlike scaled dot product attention.
        backend: "auto", or a name that `available_backends` lists.

    Returns:
        [B, C, *S] in value's dtype; channels_last if value is. fp32, fp16, bf16 or fp64; query, key, value and residual
        share one dtype, and autocast casts these four. Logits, statistics and sums are always fp32 (fp64 for fp64).
        Differentiable once, in reverse mode, in every tensor argument. With gamma = 0, out equals residual exactly.

    Raises:
        TypeError: not a tensor or number, or a dtype that is not supported or not shared.
        ValueError: rank, shapes or devices do not fit together; unknown backend.
        NotImplementedError: the backend cannot run on these inputs (the message says why); forward-mode AD.
    """
    op = "position_attention"
    check_number(op, "scale", scale)
    gamma = _gamma_tensor(op, gamma, query)
    check_position_attention(query, key, value, residual, gamma, autocast=_autocasts(query))
    tensors = (query, key, value, residual, gamma)
    _refuse_forward_mode(op, tensors)
    needs_grad = torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in tensors)
    out, _, _ = OPS.position_attention_forward(
        query.flatten(2),
        key.flatten(2),
        value.flatten(2),
        None if residual is None else residual.flatten(2),
        gamma,
        scale,
        needs_grad,
        backends.requested(backend),
    )
    return out.view(value.shape[:2] + query.shape[2:])


def channel_attention(
    x: Tensor,
    gamma: Tensor | float | None = None,
    *,
    variant: str = "official",
    residual: bool = True,
    backend: str = "auto",
) -> Tensor:
    """Exact channel attention in a workspace that does not grow with N (Fu et al., CVPR 2019, section 3.3, Eq. 3, 4).

        out[b, c, n] = gamma * sum_k P[b, c, k] * x[b, k, n] + x[b, c, n]
        G[b, c, k]   = sum_n x[b, c, n] * x[b, k, n]
        P[b, c, :]   = softmax(rowmax(G) - G) = softmax(-G)   variant "official", as the authors' code
        P[b, c, :]   = softmax(G)                             variant "paper", as Eq. 3

    Args:
        x: [B, C, *S], any number of spatial dimensions >= 1, N positions in all.
        gamma: one-element tensor (differentiable) or a number; None: 1. Any real floating dtype.
        variant: "official" or "paper".
        residual: whether x is added at the end.
        backend: "auto", or a name that `available_backends` lists.

    Returns:
        [B, C, *S] in x's dtype and layout. fp32, fp16, bf16 or fp64. The Gram matrix, its softmax and all sums are fp32
        (fp64 for fp64) in any case, so half precision neither overflows nor loses the map. Differentiable once, in
        reverse mode.

    Raises:
        TypeError: not a tensor or number, or a dtype that is not supported.
        ValueError: wrong rank or device; unknown variant or backend.
        NotImplementedError: the backend cannot run on these inputs (the message says why); forward-mode AD.
    """
    op = "channel_attention"
    gamma = _gamma_tensor(op, gamma, x)
    check_channel_attention(x, gamma, variant)
    check_flag(op, "residual", residual)
    _refuse_forward_mode(op, (x, gamma))
    out, _, _ = OPS.channel_attention_forward(x.flatten(2), gamma, variant, residual, backends.requested(backend))
    return out.view(x.shape)


def position_attention_map(query: Tensor, key: Tensor, points: Tensor, *, scale: float = 1.0) -> Tensor:
    """Exact rows of the position attention map for P chosen query positions, in O(P * N) memory.

    Fu et al., CVPR 2019, Eq. 1.

    Args:
        query: [B, D, *S], M positions in all.
        key: [B, D, *T], N positions in all.
        points: integer indices [P], or [B, P], into the M flattened query positions (row-major), 0 <= index < M.
        scale: factor on the logits.

    Returns:
        [B, P, *T] in fp32 (fp64 for fp64); every row sums to 1. Differentiable.

    Raises:
        TypeError, ValueError: as `position_attention`; points of another dtype, rank, device or range (the range is not
            checked where values are not at hand: under torch.compile, vmap and on meta tensors).
    """
    op = "position_attention_map"
    check_number(op, "scale", scale)
    check_position_attention(query, key, key, None, None)
    if not isinstance(points, Tensor) or points.dtype not in (torch.int64, torch.int32):
        kind = points.dtype if isinstance(points, Tensor) else type(points).__name__
        raise TypeError(f"{op}: points must be a tensor of int64 or int32, got {kind}")
    if points.device != query.device:
        raise ValueError(f"{op}: points must be on the device of query, {query.device}, got {points.device}")
    if points.dim() not in (1, 2) or (points.dim() == 2 and points.shape[0] != query.shape[0]):
        raise ValueError(f"{op}: points must have shape [P] or [{query.shape[0]}, P], got {list(points.shape)}")
    if not (torch.compiler.is_compiling() or points.is_meta or is_functorch_wrapped_tensor(points)):
        _check_points(op, points, query.shape[2:].numel())
    wide = accumulator_dtype(query.dtype)
    with _autocast_disabled(query):
        return reference.position_attention_map(query.to(wide), key.to(wide), points.long(), scale=scale)


def channel_attention_map(x: Tensor, *, variant: str = "official") -> Tensor:
    """The channel attention map of x [B, C, *S] (Fu et al., CVPR 2019, Eq. 3).

    Returns [B, C, C] in fp32 (fp64 for fp64); every row sums to 1.

    Raises TypeError and ValueError as `channel_attention`. Differentiable.
    """
    check_channel_attention(x, None, variant)
    with _autocast_disabled(x):
        return reference.channel_attention_map(x.to(accumulator_dtype(x.dtype)), variant=variant)


def _gamma_tensor(op: str, gamma: Tensor | float | None, model: Tensor) -> Tensor | None:
    """A number becomes a one-element tensor of the accumulator dtype on the model's device: no copy, no sync."""
    if gamma is None or isinstance(gamma, Tensor) or not isinstance(model, Tensor):
        return gamma
    check_number(op, "gamma", gamma)
    return torch.full((1,), gamma, dtype=accumulator_dtype(model.dtype), device=model.device)


def _autocasts(tensor: object) -> bool:
    """Whether autocast will cast tensors on this one's device (torch raises when asked about some devices, as meta)."""
    if not isinstance(tensor, Tensor) or tensor.device.type not in ("cpu", "cuda"):
        return False
    return torch.is_autocast_enabled(tensor.device.type)


def _autocast_disabled(tensor: Tensor) -> AbstractContextManager[object]:
    """Keeps the map's logits in the accumulator dtype."""
    return torch.autocast(tensor.device.type, enabled=False) if _autocasts(tensor) else nullcontext()


def _check_points(op: str, points: Tensor, queries: int) -> None:
    """Raise ValueError unless the values of `points`, which must be at hand, are positions of queries."""
    if points.numel() and (int(points.min()) < 0 or int(points.max()) >= queries):
        got = f"{int(points.min())} to {int(points.max())}"
        raise ValueError(f"{op}: points must lie between 0 and {queries - 1}, got {got}")


def _refuse_forward_mode(op: str, tensors: tuple[Tensor | None, ...]) -> None:
    """torch would hand back silent zeros for the tangent of an operator that has no forward-mode formula."""
    if forward_ad._current_level < 0:
        return
    if any(tensor is not None and forward_ad.unpack_dual(tensor).tangent is not None for tensor in tensors):
        raise NotImplementedError(f"{op} does not implement forward-mode differentiation (jvp); use reverse mode")
