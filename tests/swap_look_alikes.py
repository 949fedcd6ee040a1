"""Modules that are taken for attention of DANet and compute something else. Written from the facts, in small."""

import torch
from swap_families import KEYS, WIDTH, CAM_Module, PAM_Module
from torch import nn


class CrissCrossAttention(nn.Module):
    """The names of PAM, on one row and one column."""

    def __init__(self):
        super().__init__()
        self.query_conv, self.key_conv = nn.Conv2d(WIDTH, KEYS, 1), nn.Conv2d(WIDTH, KEYS, 1)
        self.value_conv = nn.Conv2d(WIDTH, WIDTH, 1)
        self.gamma = nn.Parameter(torch.zeros(1))

    def forward(self, x):
        query, key, value = self.query_conv(x), self.key_conv(x), self.value_conv(x)
        in_column = torch.einsum("bchw,bcgw->bhwg", query, key)
        own = torch.eye(x.shape[2], dtype=torch.bool)[:, None, :]
        in_column = in_column.masked_fill(own, -torch.inf)  # a position is in its row already
        in_row = torch.einsum("bchw,bchv->bhwv", query, key)
        weights = torch.cat([in_column, in_row], -1).softmax(-1)
        columns, rows = weights.split([x.shape[2], x.shape[3]], -1)
        out = torch.einsum("bhwg,bcgw->bchw", columns, value) + torch.einsum("bhwv,bchv->bchw", rows, value)
        return self.gamma * out + x


class Self_Attn(PAM_Module):
    """SAGAN's: the same as PAM, and the map beside it."""

    def forward(self, x):
        query, key = self.query_conv(x).flatten(2), self.key_conv(x).flatten(2)
        return super().forward(x), (query.mT @ key).softmax(-1)


class PABBlock(nn.Module):
    """segmentation_models.pytorch's MAnet: one softmax over all pairs, and a result that is not turned back."""

    def __init__(self):
        super().__init__()
        self.top_conv, self.center_conv = nn.Conv2d(WIDTH, KEYS, 1), nn.Conv2d(WIDTH, KEYS, 1)
        self.bottom_conv = nn.Conv2d(WIDTH, WIDTH, 3, padding=1)
        self.out_conv = nn.Conv2d(WIDTH, WIDTH, 3, padding=1)

    def forward(self, x):
        batch, channels, height, width = x.shape
        top, center = self.top_conv(x).flatten(2), self.center_conv(x).flatten(2)
        bottom = self.bottom_conv(x).flatten(2)
        logits = center.mT @ top
        weights = logits.flatten(1).softmax(1).view_as(logits)
        return self.out_conv(x + (weights @ bottom.mT).reshape(batch, channels, height, width))


class TokenAttention(nn.Module):
    def __init__(self, width, size):
        super().__init__()
        self.fc_q, self.fc_k, self.fc_v = nn.Linear(width, size), nn.Linear(width, size), nn.Linear(width, size)
        self.fc_o = nn.Linear(size, width)
        self.size = size

    def forward(self, tokens):
        weights = (self.fc_q(tokens) @ self.fc_k(tokens).mT / self.size**0.5).softmax(-1)
        return self.fc_o(weights @ self.fc_v(tokens))


class PositionAttentionModule(nn.Module):
    """Of the collection External-Attention-pytorch: a 3x3 convolution, then layers on tokens."""

    def __init__(self):
        super().__init__()
        self.cnn, self.pa = nn.Conv2d(WIDTH, WIDTH, 3, padding=1), TokenAttention(WIDTH, WIDTH)

    def forward(self, x):
        return self.pa(self.cnn(x).flatten(2).mT).mT.view_as(x)


class ChannelAttentionModule(nn.Module):
    """Of the same: its layers are as wide as the feature map has positions."""

    def __init__(self):
        super().__init__()
        self.cnn, self.pa = nn.Conv2d(WIDTH, WIDTH, 3, padding=1), TokenAttention(5 * 7, 5 * 7)

    def forward(self, x):
        return self.pa(self.cnn(x).flatten(2)).view_as(x)


class ExternalAttention(nn.Module):
    """Keys and values are learned, the same for every image."""

    def __init__(self):
        super().__init__()
        self.mk, self.mv = nn.Linear(WIDTH, 8, bias=False), nn.Linear(8, WIDTH, bias=False)

    def forward(self, x):
        weights = self.mk(x.flatten(2).mT).softmax(1)
        return self.mv(weights / weights.sum(2, keepdim=True)).mT.view_as(x)


class ChannelAttention(nn.Module):
    """CBAM's gate over channels."""

    def __init__(self):
        super().__init__()
        self.fc1, self.fc2 = nn.Conv2d(WIDTH, 4, 1, bias=False), nn.Conv2d(4, WIDTH, 1, bias=False)

    def forward(self, x):
        pooled = x.mean((2, 3), keepdim=True), x.amax((2, 3), keepdim=True)
        return x * sum(self.fc2(self.fc1(part).relu()) for part in pooled).sigmoid()


class SpatialAttention(nn.Module):
    """CBAM's gate over positions."""

    def __init__(self):
        super().__init__()
        self.conv1 = nn.Conv2d(2, 1, 3, padding=1, bias=False)

    def forward(self, x):
        return x * self.conv1(torch.cat([x.mean(1, keepdim=True), x.amax(1, keepdim=True)], 1)).sigmoid()


class CPAMDec(nn.Module):
    """DRANet's: positions attend to a few pooled centres."""

    def __init__(self):
        super().__init__()
        self.conv_query, self.conv_key = nn.Conv2d(WIDTH, KEYS, 1), nn.Linear(WIDTH, KEYS)
        self.conv_value, self.scale = nn.Linear(WIDTH, WIDTH), nn.Parameter(torch.zeros(1))

    def forward(self, x):
        centres = nn.functional.adaptive_avg_pool2d(x, 2).flatten(2).mT  # [B, 4, C]
        weights = (self.conv_query(x).flatten(2).mT @ self.conv_key(centres).mT).softmax(-1)
        return self.scale * (weights @ self.conv_value(centres)).mT.view_as(x) + x


class Transposed(PAM_Module):
    """Keys gather from queries."""

    def forward(self, x):
        query, key, value = self.query_conv(x).flatten(2), self.key_conv(x).flatten(2), self.value_conv(x).flatten(2)
        return self.gamma * (value @ self.softmax(query.mT @ key)).view_as(x) + x


class Clamped(PAM_Module):
    """As PAM while gamma is between 0 and 1."""

    def forward(self, x):
        return self.gamma.clamp(0, 1) * (super().forward(x) - x) / self.gamma + x


class Detached(PAM_Module):
    """The outputs of PAM, without the gradients of the map."""

    def forward(self, x):
        query, key, value = self.query_conv(x).flatten(2), self.key_conv(x).flatten(2), self.value_conv(x).flatten(2)
        return self.gamma * (value @ self.softmax(query.mT @ key).detach().mT).view_as(x) + x


class Turned(PAM_Module):
    """PAM on square images; on others positions are put where they do not belong."""

    def forward(self, x):
        turned = super().forward(x.mT.contiguous()).mT  # the same for PAM, whose order of positions is free
        wrong = turned.reshape(x.shape[0], x.shape[1], x.shape[3], x.shape[2]).mT
        return turned if x.shape[2] == x.shape[3] else wrong


class Warm(PAM_Module):
    """A temperature close to 1."""

    def forward(self, x):
        query, key, value = self.query_conv(x).flatten(2), self.key_conv(x).flatten(2), self.value_conv(x).flatten(2)
        return self.gamma * (value @ self.softmax(query.mT @ key / 1.00001).mT).view_as(x) + x


class ScaledCAM(CAM_Module):
    """Logits a quarter of CAM's."""

    def forward(self, x):
        flat = x.flatten(2)
        return self.gamma * ((-flat @ flat.mT / 4).softmax(-1) @ flat).view_as(x) + x


class Switched(PAM_Module):
    """Trains as PAM does, and evaluates otherwise."""

    def forward(self, x):
        out = super().forward(x)
        return out if self.training else 0.5 * (out + x)


def with_softmax(module, softmax):
    module.softmax = softmax
    return module


LOOK_ALIKES = {  # how it is made, and what the report says
    "criss-cross": (CrissCrossAttention, "criss-cross attention sees one row and one column"),
    "sagan": (lambda: Self_Attn(WIDTH), "returns tuple, not one tensor"),
    "pab": (PABBlock, "softmax goes over all N x N logits at once"),
    "position attention on tokens": (PositionAttentionModule, "called like attention of DANet"),
    "channel attention on tokens": (ChannelAttentionModule, "called like attention of DANet"),
    "external attention": (ExternalAttention, "learned keys and values"),
    "cbam channels": (ChannelAttention, "a gate"),
    "cbam positions": (SpatialAttention, "a gate"),
    "dranet": (CPAMDec, "pooled centres"),
    "softmax over queries": (lambda: with_softmax(PAM_Module(WIDTH), nn.Softmax(dim=1)), "computes something else"),
    "sigmoid": (lambda: with_softmax(CAM_Module(WIDTH), nn.Sigmoid()), "computes something else"),
    "transposed": (lambda: Transposed(WIDTH), "computes something else"),
    "dropout": (
        lambda: with_softmax(PAM_Module(WIDTH), nn.Sequential(nn.Softmax(dim=-1), nn.Dropout(0.5))),
        "computes something else",
    ),
    "clamped scalar": (lambda: Clamped(WIDTH), "computes something else"),
    "map without gradients": (lambda: Detached(WIDTH), "computes something else"),
    "turned": (lambda: Turned(WIDTH), "computes something else"),
    "temperature": (lambda: Warm(WIDTH), "computes something else"),
    "other in evaluation": (lambda: Switched(WIDTH), "computes something else"),
}
