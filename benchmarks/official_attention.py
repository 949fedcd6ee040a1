"""Attention as the authors' code names and computes it, written anew: what is in a network before a swap."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from danet import DANet


class PAM_Module(nn.Module):
    """Position attention, with the N x N map in memory."""

    def __init__(self, in_dim: int) -> None:
        super().__init__()
        self.chanel_in = in_dim
        self.query_conv = nn.Conv2d(in_dim, in_dim // 8, 1)
        self.key_conv = nn.Conv2d(in_dim, in_dim // 8, 1)
        self.value_conv = nn.Conv2d(in_dim, in_dim, 1)
        self.gamma = nn.Parameter(torch.zeros(1))
        self.softmax = nn.Softmax(dim=-1)

    def forward(self, x: Tensor) -> Tensor:  # [B, C, H, W] -> [B, C, H, W]
        query = self.query_conv(x).flatten(2).transpose(1, 2)  # [B, N, D]
        energy = torch.bmm(query, self.key_conv(x).flatten(2))  # [B, N, N]
        attention = self.softmax(energy)  # [B, N, N]
        out = torch.bmm(self.value_conv(x).flatten(2), attention.transpose(1, 2))  # [B, C, N]
        return self.gamma * out.view_as(x) + x


class CAM_Module(nn.Module):
    """Channel attention."""

    def __init__(self, in_dim: int) -> None:
        super().__init__()
        self.chanel_in = in_dim
        self.gamma = nn.Parameter(torch.zeros(1))
        self.softmax = nn.Softmax(dim=-1)

    def forward(self, x: Tensor) -> Tensor:  # [B, C, H, W] -> [B, C, H, W]
        flat = x.flatten(2)  # [B, C, N]
        energy = torch.bmm(flat, flat.transpose(1, 2))  # [B, C, C]
        attention = self.softmax(energy.max(-1, keepdim=True)[0].expand_as(energy) - energy)  # [B, C, C]
        return self.gamma * torch.bmm(attention, flat).view_as(x) + x


def put_in(model: DANet) -> DANet:
    """Give a network of ours these modules in place of its own, with the same parameters under the same names."""
    for name, kind in (("position_attention", PAM_Module), ("channel_attention", CAM_Module)):
        ours = getattr(model.head, name, None)
        if ours is None:
            continue
        width = ours.value_conv.out_channels if kind is PAM_Module else model.head.classifier[1].in_channels
        theirs = kind(width)
        theirs.load_state_dict(ours.state_dict())
        setattr(model.head, name, theirs)
    return model
