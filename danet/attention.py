"""The two attention modules of DANet: what is learned, around the fused operations of danet_kernels."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from danet_kernels import channel_attention, position_attention


class PositionAttention(nn.Module):
    """Every position becomes itself plus gamma times a weighted sum over all positions (Fu et al., section 3.2).

    Three 1x1 convolutions make query, key and value. gamma is learned and starts at 0, where the module is the identity
    and gamma alone gets a gradient.

    Args:
        in_channels: channels C of the feature map, and of the values.
        key_channels: channels D of queries and keys; None: C // 8, as in the authors' code (the paper's text says C).
        backend: as `danet_kernels.position_attention` takes it.
    """

    def __init__(self, in_channels: int, key_channels: int | None = None, *, backend: str = "auto") -> None:
        super().__init__()
        key_channels = max(1, in_channels // 8) if key_channels is None else key_channels
        self.query_conv = nn.Conv2d(in_channels, key_channels, 1)
        self.key_conv = nn.Conv2d(in_channels, key_channels, 1)
        self.value_conv = nn.Conv2d(in_channels, in_channels, 1)
        self.gamma = nn.Parameter(torch.zeros(1))
        self.backend = backend

    def forward(self, x: Tensor) -> Tensor:  # [B, C, H, W] -> [B, C, H, W]
        query = self.query_conv(x)  # [B, D, H, W]
        key = self.key_conv(x)  # [B, D, H, W]
        value = self.value_conv(x)  # [B, C, H, W]
        return position_attention(query, key, value, x, self.gamma, backend=self.backend)

    def extra_repr(self) -> str:
        return f"backend={self.backend!r}"


class ChannelAttention(nn.Module):
    """Every channel becomes itself plus gamma times a weighted sum of all channels (Fu et al., section 3.3).

    There are no projections; gamma is learned and starts at 0.

    Args:
        variant: "official", softmax(-G) of the Gram matrix G as in the authors' code, or "paper", softmax(+G) as Eq. 3.
        backend: as `danet_kernels.channel_attention` takes it.
    """

    def __init__(self, *, variant: str = "official", backend: str = "auto") -> None:
        super().__init__()
        if variant not in ("official", "paper"):
            raise ValueError(f"ChannelAttention: variant must be 'official' or 'paper', got {variant!r}")
        self.gamma = nn.Parameter(torch.zeros(1))
        self.variant = variant
        self.backend = backend

    def forward(self, x: Tensor) -> Tensor:  # [B, C, H, W] -> [B, C, H, W]
        return channel_attention(x, self.gamma, variant=self.variant, backend=self.backend)

    def extra_repr(self) -> str:
        return f"variant={self.variant!r}, backend={self.backend!r}"
