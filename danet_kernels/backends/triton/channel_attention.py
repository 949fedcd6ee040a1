"""Launchers of the channel attention kernels: layouts, tiles, grids and workspaces. docs/kernels.md has the budgets."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
from torch import Tensor

from ..._layout import empty_like_layout, is_channels_last
from . import channel_attention_plan as plan
from . import configs, launch
from .channel_attention_apply import channel_attention_backward_kernel, channel_attention_forward_kernel
from .channel_attention_gram import (
    channel_attention_dgram_kernel,
    channel_attention_gram_kernel,
    channel_attention_softmax_kernel,
)
from .configs import ChannelConfig, channel_config
from .operands import Operand, near, operand


def channel_attention_forward(
    x: Tensor,  # [B, C, N]
    gamma: Tensor | None,
    variant: str,
    residual: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """out [B, C, N], row_max and row_sum [B, C] fp32."""
    B, C, N = x.shape
    out = empty_like_layout(x, C, N, x.dtype)
    row_max, row_sum = (launch.empty((B, C), torch.float32, x.device) for _ in range(2))
    with launch.on_device(x.device):
        for part in _parts(x, backward=False):
            images = _Images(x[part], gamma, variant)
            _forward(images, residual, out[part], row_max[part], row_sum[part])
    return out, row_max, row_sum


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
    """dx [B, C, N], dgamma like gamma; [0] for what is not needed.

    G has to be computed again. Its sums are shared out in another way than in the forward, so its last bits differ: by
    0.01 where logits are large. Therefore max and sum are taken again too, or rows of P would not sum to one.
    """
    needs_x, needs_gamma = needs
    B, C, N = x.shape
    dx = empty_like_layout(x, C, N, x.dtype) if needs_x else None
    delta = launch.empty((B, C), torch.float32, x.device)
    dgamma = delta.new_empty(0)
    with launch.on_device(x.device):
        for part in _parts(x, backward=True):
            images = _Images(x[part], gamma, variant)
            _backward(images, dout[part], delta[part], residual, None if dx is None else dx[part])
        if needs_gamma:
            assert gamma is not None
            dgamma = delta.sum().to(gamma.dtype).reshape(gamma.shape)
    return delta.new_empty(0) if dx is None else dx, dgamma


class _Images:
    """The images that go together, and what all launches for them have in common."""

    def __init__(self, x: Tensor, gamma: Tensor | None, variant: str) -> None:
        B, C, _ = x.shape
        self.x = x  # [B, C, N]
        self.gamma = gamma
        self.architecture = launch.architecture(x.device)
        self.slots = launch.multiprocessors(x.device)
        self.descriptors = configs.uses_descriptors(self.architecture)
        self.channels_last = is_channels_last(x)
        self.gram_precision, self.precision = launch.precisions(x.dtype)
        # The small kernels: as many rows of a matrix for each program as leave one for every multiprocessor.
        rows = next((rows for rows in configs.CHANNEL_ROWS if rows * self.slots >= B * C), configs.CHANNEL_ROWS[-1])
        self.row_programs = (triton.cdiv(C, rows) * B,)
        self.parts = configs.CHANNEL_ROWS_TIMES_PARTS // rows
        self.row_constants = {
            "OFFICIAL": variant == "official",
            "ROWS": rows,
            "num_warps": configs.CHANNEL_ROW_WARPS,
        }

    def config(self, kernel: str) -> ChannelConfig:
        return channel_config(kernel, self.architecture, self.x.element_size())

    def constants(self, config: ChannelConfig) -> dict[str, object]:
        """Those of every product."""
        return {
            "DESCRIPTOR": self.descriptors,
            "CHANNELS_LAST": self.channels_last,
            "PRECISION": self.precision,
            "num_warps": config.num_warps,
            "num_stages": config.num_stages,
        }

    def operand(self, tensor: Tensor) -> Operand:
        """`tensor` [B, C, N] for tile loads, its rows running the way those of x do."""
        return operand(tensor, channels_last=self.channels_last, descriptors=self.descriptors)

    def matrix(self, dtype: torch.dtype) -> Operand:
        """Uninitialised [B, C, C], in rows of whole blocks."""
        B, C, _ = self.x.shape
        memory = launch.empty((B, C, plan.blocks(C) * plan.BLOCK), dtype, self.x.device)
        return operand(memory, channels_last=False, descriptors=self.descriptors)


def _forward(images: _Images, residual: bool, out: Tensor, row_max: Tensor, row_sum: Tensor) -> None:
    B, C, N = images.x.shape
    config = images.config("forward")
    x = images.operand(images.x)
    partial, splits = _products(images, x, None)
    logits = images.matrix(torch.float32)
    channel_attention_softmax_kernel[images.row_programs](
        *(partial, logits.memory, row_max, row_sum, None, None, C, splits), PARTS=images.parts, **images.row_constants
    )
    added = near(images.x) if residual else None
    channel_attention_forward_kernel[(triton.cdiv(C, config.rows) * triton.cdiv(N, config.columns) * B,)](
        x.source(config.step, config.columns),
        logits.source(config.rows, config.step),
        *(row_max, row_sum, added, images.gamma, out, C, N),
        *(*x.strides, *_strides(added), *out.stride()),
        BLOCK_C=config.rows,
        BLOCK_D=config.step,
        BLOCK_N=config.columns,
        **images.constants(config),
    )


def _backward(
    images: _Images,
    dout: Tensor,  # [B, C, N]
    delta: Tensor,  # [B, C], a result: r
    residual: bool,
    dx: Tensor | None,  # [B, C, N], a result
) -> None:
    B, C, N = images.x.shape
    config = images.config("backward")
    x, g = images.operand(images.x), images.operand(dout)
    partial, splits = _products(images, x, g)
    logits, dweights = images.matrix(torch.float32), images.matrix(torch.float32)
    row_max, row_sum = (launch.empty((B, C), torch.float32, delta.device) for _ in range(2))
    channel_attention_softmax_kernel[images.row_programs](
        *(partial, logits.memory, row_max, row_sum, dweights.memory, delta, C, splits),
        PARTS=images.parts,
        **images.row_constants,
    )
    if dx is None:
        return
    dgram = images.matrix(dx.dtype)
    magnify = launch.empty((B, C), torch.float32, dx.device) if dx.dtype == torch.float16 else None
    channel_attention_dgram_kernel[images.row_programs](
        *(logits.memory, dweights.memory, row_max, row_sum, delta, images.gamma, dgram.memory, magnify, C),
        **images.row_constants,
    )
    added = near(dout) if residual else None
    channel_attention_backward_kernel[(triton.cdiv(C, config.rows) * triton.cdiv(N, config.columns) * B,)](
        x.source(config.step, config.columns),
        g.source(config.step, config.columns),
        logits.source(config.rows, config.step),
        dgram.source(config.rows, config.step),
        *(row_max, row_sum, delta, magnify, added, images.gamma, dx, C, N),
        *(*x.strides, *g.strides, *_strides(added), *dx.stride()),
        BLOCK_C=config.rows,
        BLOCK_D=config.step,
        BLOCK_N=config.columns,
        **images.constants(config),
    )


def _products(images: _Images, x: Operand, g: Operand | None) -> tuple[Tensor, int]:
    """Partial sums of G, and of H given dout, [B, tiles, splits, BLOCK, BLOCK] fp32; and how many there are of each."""
    B, C, N = images.x.shape
    config = images.config("gram")
    tiles = plan.tiles(C, backward=g is not None)
    splits, split_positions = plan.splits(B * tiles, images.slots, N, config.step)
    partial = launch.empty((B, tiles, splits, plan.BLOCK, plan.BLOCK), torch.float32, images.x.device)
    channel_attention_gram_kernel[(B * tiles * splits,)](
        x.source(plan.BLOCK, config.step),
        None if g is None else g.source(plan.BLOCK, config.step),
        *(partial, C, N, *x.strides, *((0, 0) if g is None else g.strides), splits, split_positions),
        BLOCK_N=config.step,
        GRAM_PRECISION=images.gram_precision,
        **images.constants(config),
    )
    return partial, splits


def _parts(x: Tensor, backward: bool) -> Iterator[slice]:
    """The batch in parts whose workspace is bounded."""
    B, C, _ = x.shape
    step = plan.images_at_once(C, x.element_size(), backward)
    return (slice(first, first + step) for first in range(0, B, step))


def _strides(tensor: Tensor | None) -> tuple[int, ...]:
    return (0, 0, 0) if tensor is None else tensor.stride()
