"""torch.vmap rules: fold the mapped dimension into the batch, so that a vmapped call is one call of the operator.

A gamma of its own for every mapped element cannot be folded (one call has one gamma): such a call becomes a loop.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .ops import LIBRARY, OPS


def _register(
    name: str, gamma_index: int, batched_results: int, *, save_index: int | None = None, gamma_gradient: bool = False
) -> None:
    """Register the rule of operator `name`: argument `gamma_index` is gamma, the first `batched_results` results carry
    the batch dimension. `save_index`: argument save_for_backward, which the caller could not know, as wrapped tensors
    do not show requires_grad. `gamma_gradient`: the last result sums over the batch, so it cannot be folded either."""
    op = getattr(OPS, name)

    def rule(info: Any, in_dims: tuple[int | None, ...], *args: Any) -> Any:
        size = info.batch_size
        moved = [
            argument.movedim(dim, 0) if dim is not None else argument
            for argument, dim in zip(args, in_dims, strict=True)
        ]
        mapped = [dim is not None for dim in in_dims]
        batch = moved[0].shape[1 if mapped[0] else 0]
        if save_index is not None:
            tensors = [argument for argument in moved if isinstance(argument, Tensor)]
            moved[save_index] = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)
        if mapped[gamma_index] or (gamma_gradient and args[-2]):  # args[-2] of the backward operators: needs_gamma
            return _loop(op, size, moved, mapped), (0,) * len(op.default._schema.returns)
        folded = [
            _fold(argument, size, is_mapped) if isinstance(argument, Tensor) and index != gamma_index else argument
            for index, (argument, is_mapped) in enumerate(zip(moved, mapped, strict=True))
        ]
        results = op(*folded)
        unfolded = tuple(
            result.unflatten(0, (size, batch)) if result.dim() > 1 else result for result in results[:batched_results]
        )
        dims = tuple(0 if result.dim() > 1 else None for result in results[:batched_results])
        rest = results[batched_results:]
        return (*unfolded, *rest), (*dims, *(None for _ in rest))

    torch.library.register_vmap(f"danet_kernels::{name}", rule, lib=LIBRARY)


def _fold(argument: Tensor, size: int, is_mapped: bool) -> Tensor:
    """[size, B, ...] or unmapped [B, ...] -> [size * B, ...]."""
    whole = argument if is_mapped else argument.expand(size, *argument.shape)
    return whole.flatten(0, 1)


def _loop(op: Callable[..., Any], size: int, moved: list[Any], mapped: list[bool]) -> tuple[Tensor, ...]:
    calls = [
        op(*(argument[i] if is_mapped else argument for argument, is_mapped in zip(moved, mapped, strict=True)))
        for i in range(size)
    ]
    return tuple(torch.stack(results) for results in zip(*calls, strict=True))


_register("position_attention_forward", gamma_index=4, batched_results=3, save_index=6)
_register("position_attention_backward", gamma_index=6, batched_results=3, gamma_gradient=True)
_register("channel_attention_forward", gamma_index=1, batched_results=3)
_register("channel_attention_backward", gamma_index=2, batched_results=1, gamma_gradient=True)
