"""Launchers of the position attention kernels: layouts, tiles, grids and workspaces. docs/kernels.md explains."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

import torch
import triton
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from ..._layout import empty_like_layout, is_channels_last, to_layout
from .._nvidia import magnification
from . import configs, launch, tuning
from .configs import Config, position_configs, power_of_two
from .operands import Operand, near, operand
from .position_attention_bwd import (
    position_attention_delta_kernel,
    position_attention_dlogits_kernel,
    position_attention_dvalue_kernel,
    position_attention_dvalue_merge_kernel,
)
from .position_attention_fwd import position_attention_forward_kernel, position_attention_merge_kernel

_MERGED_CHANNELS = 32  # of a program of the merge kernels

Result = TypeVar("Result")
Statistics = tuple[Tensor | None, Tensor, Tensor, Tensor | None]  # gamma, lse, delta, magnification of dS


class Rounds(NamedTuple):
    """How tiles are dealt out to programs, so that the last round does not leave most multiprocessors idle."""

    whole_tiles: int  # computed by one program each
    splits: int  # programs that share each of the other tiles
    split_length: int  # positions of such a program
    split_tiles: int

    @property
    def programs(self) -> int:
        return self.whole_tiles + self.split_tiles * self.splits


def share_last_round(tiles: int, slots: int, length: int, block: int) -> Rounds:
    """Split the tiles of a last, partly filled round along the positions they run over, where two or more fit."""
    rest = tiles % slots
    blocks = triton.cdiv(length, block)
    splits = min(slots // rest, blocks) if rest else 1
    split_length = triton.cdiv(blocks, splits) * block
    splits = triton.cdiv(length, split_length)
    return Rounds(tiles - rest, splits, split_length, rest) if splits > 1 else Rounds(tiles, 1, blocks * block, 0)


def even_splits(tiles: int, slots: int, length: int, block: int) -> tuple[int, int]:
    """(splits, positions of each) that fill the rounds of `tiles * splits` programs best.

    Each split costs a 200th of a tile, for its sum is written and read again. At most 8 rounds, so that these sums take
    memory that depends on the GPU alone.
    """
    blocks = triton.cdiv(length, block)
    most = max(1, min(blocks, 8 * slots // tiles))
    splits = min(range(1, most + 1), key=lambda splits: triton.cdiv(tiles * splits, slots) / splits + 0.005 * splits)
    split_length = triton.cdiv(blocks, splits) * block
    return triton.cdiv(length, split_length), split_length


def position_attention_forward(
    query: Tensor,  # [B, D, M]
    key: Tensor,  # [B, D, N]
    value: Tensor,  # [B, C, N]
    residual: Tensor | None,  # [B, C, M]
    gamma: Tensor | None,
    scale: float,
    needs_attn: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """out [B, C, M], attn [B, C, M] fp32 or [0], lse [B, M] fp32."""
    with launch.on_device(value.device):
        q, k, v = (_operand(tensor, value, query.shape[1]) for tensor in (query, key, value))
        residual = None if residual is None else near(residual)
        return _tuned(
            "forward", value, q, lambda config: _forward(config, value, q, k, v, residual, gamma, scale, needs_attn)
        )


def _forward(
    config: Config,
    value: Tensor,
    q: Operand,
    k: Operand,
    v: Operand,
    residual: Tensor | None,
    gamma: Tensor | None,
    scale: float,
    needs_attn: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    (B, D, M), (C, N), device = q.tensor.shape, value.shape[1:], value.device
    rounds = share_last_round(
        triton.cdiv(M, config.rows) * triton.cdiv(C, config.channels) * B,
        launch.multiprocessors(device),
        N,
        config.columns,
    )
    out = empty_like_layout(value, C, M, value.dtype)
    attn = empty_like_layout(value, C, M, torch.float32) if needs_attn else None
    lse = launch.empty((B, M), torch.float32, device)
    residual_strides = (0, 0, 0) if residual is None else residual.stride()
    shared = _constants(config, value, D)
    parts = rounds.split_tiles * rounds.splits
    partial_acc = launch.empty((parts, config.channels, config.rows), torch.float32, device)
    partial_max = launch.empty((parts, config.rows), torch.float32, device)
    partial_sum = launch.empty((parts, config.rows), torch.float32, device)
    epilogue = (residual, gamma, out, attn, lse)
    position_attention_forward_kernel[(rounds.programs,)](
        q.source(shared["BLOCK_D"], config.rows),
        k.source(shared["BLOCK_D"], config.columns),
        v.source(config.channels, config.columns),
        *epilogue,
        *(partial_acc, partial_max, partial_sum, scale, C, D, M, N),
        *(*q.strides, *k.strides, *v.strides, *residual_strides, *out.stride()),
        *rounds[:3],
        MASKED=N % config.columns != 0,
        BLOCK_M=config.rows,
        BLOCK_N=config.columns,
        **shared,
    )
    if parts:
        part = min(config.channels, _MERGED_CHANNELS)
        position_attention_merge_kernel[(rounds.split_tiles, config.channels // part)](
            *(partial_acc, partial_max, partial_sum),
            *epilogue,
            *(C, M, *residual_strides, *out.stride(), rounds.whole_tiles, rounds.splits),
            BLOCK_M=config.rows,
            BLOCK_C=config.channels,
            PART_C=part,
        )
    return out, lse.new_empty(0) if attn is None else attn, lse


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
    dquery = dkey = dvalue = dgamma = lse.new_empty(0)
    lse = lse.contiguous()
    with launch.on_device(value.device):
        if needs_query or needs_key or needs_gamma:
            delta = _delta(dout, attn)
        if needs_gamma:
            assert gamma is not None
            dgamma = delta.sum().to(gamma.dtype).reshape(gamma.shape)
        if needs_query or needs_key or needs_value:
            q, k, g = (_operand(tensor, value, query.shape[1]) for tensor in (query, key, dout))
        if needs_value:
            dvalue = _tuned("dvalue", value, q, lambda config: _dvalue(config, value, q, k, g, gamma, lse, scale))
        if needs_query or needs_key:
            v = _operand(value, value, query.shape[1])
            statistics = (gamma, lse, delta, magnification(g.tensor, v.tensor))
            needed = (query if needs_query else None, key if needs_key else None)
            dquery, dkey = _tuned(
                "dlogits", value, q, lambda config: _dlogits(config, needed, value, q, k, v, g, statistics, scale)
            )
    return dquery, dkey, dvalue, dgamma


def _tuned(kernel: str, value: Tensor, q: Operand, function: Callable[[Config], Result]) -> Result:
    """function(config) with tiles from the table."""
    (B, D, M), (C, N) = q.tensor.shape, value.shape[1:]
    architecture = launch.architecture(value.device)
    candidates = [config.for_channels(C) for config in position_configs(kernel, architecture, value.element_size(), D)]
    sizes = (D, C, *map(tuning.bucket, (B, M, N)))
    return tuning.run(candidates, (kernel, value.device, value.dtype, is_channels_last(value), *sizes), function)


def _constants(config: Config, value: Tensor, D: int) -> dict[str, Any]:
    """What all kernels that load tiles take."""
    scores, values = launch.precisions(value.dtype)
    return {
        "BLOCK_C": config.channels,
        "BLOCK_D": configs.block_d(D),
        "DESCRIPTOR": configs.uses_descriptors(launch.architecture(value.device), value.element_size(), D),
        "CHANNELS_LAST": is_channels_last(value),
        "SCORE_PRECISION": scores,
        "VALUE_PRECISION": values,
        "num_warps": config.num_warps,
        "num_stages": config.num_stages,
    }


def _operand(tensor: Tensor, value: Tensor, D: int) -> Operand:
    """`tensor` for tile loads, its rows running the way those of value do."""
    descriptors = configs.uses_descriptors(launch.architecture(value.device), value.element_size(), D)
    return operand(tensor, channels_last=is_channels_last(value), descriptors=descriptors)


def _delta(dout: Tensor, attn: Tensor) -> Tensor:
    """sum_c dout attn [B, M], fp32."""
    B, C, M = dout.shape
    delta = launch.empty((B, M), torch.float32, dout.device)
    dout, attn = near(dout), near(attn)
    block_m, block_c = 64, min(64, max(16, power_of_two(C)))
    position_attention_delta_kernel[(triton.cdiv(M, block_m) * B,)](
        dout, attn, delta, C, M, *dout.stride(), *attn.stride(), BLOCK_M=block_m, BLOCK_C=block_c
    )
    return delta


def _dvalue(
    config: Config, value: Tensor, q: Operand, k: Operand, g: Operand, gamma: Tensor | None, lse: Tensor, scale: float
) -> Tensor:
    (B, C, N), (D, M), device = value.shape, q.tensor.shape[1:], value.device
    shared = _constants(config, value, D)
    rounds = share_last_round(
        triton.cdiv(N, config.rows) * triton.cdiv(C, config.channels) * B,
        launch.multiprocessors(device),
        M,
        config.columns,
    )
    dvalue = empty_like_layout(value, C, N, value.dtype)
    parts = rounds.split_tiles * rounds.splits
    partial_acc = launch.empty((parts, config.channels, config.rows), torch.float32, device)
    position_attention_dvalue_kernel[(rounds.programs,)](
        q.source(shared["BLOCK_D"], config.columns),
        k.source(shared["BLOCK_D"], config.rows),
        g.source(config.channels, config.columns),
        *(gamma, lse, dvalue, partial_acc, scale, C, D, M, N),
        *(*q.strides, *k.strides, *g.strides, *dvalue.stride()),
        *rounds[:3],
        BLOCK_M=config.columns,
        BLOCK_N=config.rows,
        **shared,
    )
    if parts:
        part = min(config.channels, _MERGED_CHANNELS)
        position_attention_dvalue_merge_kernel[(rounds.split_tiles, config.channels // part)](
            *(partial_acc, dvalue, C, N, *dvalue.stride(), rounds.whole_tiles, rounds.splits),
            BLOCK_N=config.rows,
            BLOCK_C=config.channels,
            PART_C=part,
        )
    return dvalue


def _dlogits(
    config: Config,
    needed: tuple[Tensor | None, Tensor | None],  # query, key: those whose gradients are needed
    value: Tensor,
    q: Operand,
    k: Operand,
    v: Operand,
    g: Operand,
    statistics: Statistics,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """dquery and dkey: from one product over C where both are needed and their bits may vary, else from one each."""
    query, key = needed
    shared = _constants(config, value, q.tensor.shape[1])
    dquery = dkey = statistics[1].new_empty(0)
    if (
        query is not None
        and key is not None
        and config.shares_product
        and not torch.are_deterministic_algorithms_enabled()
    ):
        sums = torch.zeros(_row_sums(1, query), dtype=torch.float32, device=query.device)
        dkey = _one_side(config, shared, k, q, v, g, statistics, scale, key, sums[0])
        return _finished(sums, query), dkey
    if key is not None:
        dkey = _one_side(config, shared, k, q, v, g, statistics, scale, key)
    if query is not None:
        dquery = _one_side(config, shared, q, k, g, v, statistics, scale, query, own_keys=False)
    return dquery, dkey


def _one_side(
    config: Config,
    shared: dict[str, Any],
    own: Operand,
    other: Operand,
    own_values: Operand,
    other_values: Operand,
    statistics: Statistics,
    scale: float,
    model: Tensor,  # key or query, whichever `own` is
    sums: Tensor | None = None,  # [B, D, row] fp32, zeros: takes dq if `own` is key
    own_keys: bool = True,
) -> Tensor:
    """The gradient of key or query: a program for each tile of its positions, in even splits over the other side."""
    (B, D, L), K, C = own.tensor.shape, other.tensor.shape[2], own_values.tensor.shape[1]
    tiles = triton.cdiv(L, config.rows) * B
    splits, split_length = even_splits(tiles, launch.multiprocessors(model.device), K, config.columns)
    down = launch.empty(_row_sums(splits, model), torch.float32, model.device)
    dother = sums
    if sums is not None and shared["DESCRIPTOR"]:
        dother = TensorDescriptor(sums, [B, D, K], list(sums.stride()), [1, shared["BLOCK_D"], config.columns])
    position_attention_dlogits_kernel[(tiles * splits,)](
        own.source(shared["BLOCK_D"], config.rows),
        other.source(shared["BLOCK_D"], config.columns),
        own_values.source(config.channels, config.rows),
        other_values.source(config.channels, config.columns),
        *statistics,
        *(down, dother, scale, B, C, D, L, K),
        *(*own.strides, *other.strides, *own_values.strides, *other_values.strides),
        *(down.stride(2), 0 if sums is None else sums.stride(1), splits, split_length),
        OWN_KEYS=own_keys,
        BLOCK_L=config.rows,
        BLOCK_K=config.columns,
        **shared,
    )
    return _finished(down, model)


def _row_sums(splits: int, model: Tensor) -> tuple[int, int, int, int]:
    """Shape of fp32 sums for a gradient like `model` [B, D, L], in rows that a tensor descriptor can address."""
    B, D, L = model.shape
    return splits, B, D, triton.cdiv(L, 16) * 16


def _finished(sums: Tensor, model: Tensor) -> Tensor:
    """The sum over the splits of [splits, B, D, row], in dtype and layout of `model`."""
    total = sums[0] if sums.shape[0] == 1 else sums.sum(dim=0)  # [B, D, row]
    return to_layout(total[:, :, : model.shape[2]], model, model.dtype)
