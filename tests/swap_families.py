"""Heads of other people's DANets in small: their names, their parameters, what they return. Written from the facts."""

import torch
from torch import nn

WIDTH, KEYS = 16, 4  # channels of features, and of queries and keys


def conv_bn_relu(inputs=WIDTH, outputs=WIDTH):
    return nn.Sequential(nn.Conv2d(inputs, outputs, 3, padding=1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU())


def classifier():
    return nn.Sequential(nn.Dropout2d(0.1), nn.Conv2d(WIDTH, 3, 1))


# The authors' code, and many copies of it


class PAM_Module(nn.Module):
    def __init__(self, in_dim):
        super().__init__()
        self.chanel_in = in_dim
        self.query_conv = nn.Conv2d(in_dim, in_dim // 4, 1)
        self.key_conv = nn.Conv2d(in_dim, in_dim // 4, 1)
        self.value_conv = nn.Conv2d(in_dim, in_dim, 1)
        self.gamma = nn.Parameter(torch.zeros(1))
        self.softmax = nn.Softmax(dim=-1)

    def forward(self, x):
        batch, channels, height, width = x.shape
        query = self.query_conv(x).view(batch, -1, height * width).permute(0, 2, 1)
        key = self.key_conv(x).view(batch, -1, height * width)
        attention = self.softmax(torch.bmm(query, key))  # [B, N, N]
        value = self.value_conv(x).view(batch, -1, height * width)
        out = torch.bmm(value, attention.permute(0, 2, 1)).view(batch, channels, height, width)
        return self.gamma * out + x


class CAM_Module(nn.Module):
    def __init__(self, in_dim):
        super().__init__()
        self.chanel_in = in_dim
        self.gamma = nn.Parameter(torch.zeros(1))
        self.softmax = nn.Softmax(dim=-1)

    def forward(self, x):
        flat = x.view(len(x), self.chanel_in, -1)  # [B, C, N]
        energy = torch.bmm(flat, flat.transpose(1, 2))
        turned = energy.max(-1, keepdim=True)[0].expand_as(energy) - energy
        return self.gamma * torch.bmm(self.softmax(turned), flat).view_as(x) + x


class DANetHead(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv5a, self.conv5c = conv_bn_relu(), conv_bn_relu()
        self.sa, self.sc = PAM_Module(WIDTH), CAM_Module(WIDTH)
        self.conv51, self.conv52 = conv_bn_relu(), conv_bn_relu()
        self.conv6, self.conv7, self.conv8 = classifier(), classifier(), classifier()

    def forward(self, x):
        position, channel = self.conv51(self.sa(self.conv5a(x))), self.conv52(self.sc(self.conv5c(x)))
        return self.conv8(position + channel), self.conv6(position), self.conv7(channel)


# mmsegmentation, and with other names sssegmentation


class Scale(nn.Module):
    """As mmcv's: a scalar without dimensions."""

    def __init__(self, scale=0.0):
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(scale))

    def forward(self, x):
        return x * self.scale


class SelfAttentionBlock(nn.Module):
    def __init__(self, in_channels, channels, matmul_norm=False):
        super().__init__()
        self.query_project = nn.Conv2d(in_channels, channels, 1)
        self.key_project = nn.Conv2d(in_channels, channels, 1)
        self.value_project = nn.Conv2d(in_channels, in_channels, 1)
        self.out_project = None
        self.channels, self.matmul_norm = channels, matmul_norm

    def forward(self, query_feats, key_feats):
        query = self.query_project(query_feats).flatten(2).permute(0, 2, 1)
        key, value = self.key_project(key_feats).flatten(2), self.value_project(key_feats).flatten(2)
        logits = query @ key
        if self.matmul_norm:
            logits = self.channels**-0.5 * logits
        context = logits.softmax(-1) @ value.permute(0, 2, 1)
        return context.permute(0, 2, 1).reshape(len(query), -1, *query_feats.shape[2:])


class PAM(SelfAttentionBlock):
    def __init__(self, in_channels=WIDTH, channels=KEYS, matmul_norm=False):
        super().__init__(in_channels, channels, matmul_norm)
        self.gamma = Scale(0.0)

    def forward(self, x):
        return self.gamma(super().forward(x, x)) + x


class CAM(nn.Module):
    def __init__(self):
        super().__init__()
        self.gamma = Scale(0.0)

    def forward(self, x):
        batch, channels, height, width = x.shape
        flat = x.view(batch, channels, -1)
        energy = flat @ flat.mT
        weights = (torch.max(energy, -1, keepdim=True)[0].expand_as(energy) - energy).softmax(-1)
        return self.gamma((weights @ flat).view(batch, channels, height, width)) + x


class DAHead(nn.Module):
    def __init__(self):
        super().__init__()
        self.pam_in_conv, self.cam_in_conv = conv_bn_relu(), conv_bn_relu()
        self.pam, self.cam = PAM(), CAM()
        self.pam_out_conv, self.cam_out_conv = conv_bn_relu(), conv_bn_relu()
        self.pam_conv_seg, self.cam_conv_seg, self.conv_seg = classifier(), classifier(), classifier()

    def forward(self, x):
        position = self.pam_out_conv(self.pam(self.pam_in_conv(x)))
        channel = self.cam_out_conv(self.cam(self.cam_in_conv(x)))
        return self.conv_seg(position + channel), self.pam_conv_seg(position), self.cam_conv_seg(channel)


class PositionAttentionModule(PAM):
    """sssegmentation's, whose block is built alike."""


class ChannelAttentionModule(CAM):
    pass


class SSSegDANet(nn.Module):
    """Flat: the parts stand in the network itself."""

    def __init__(self):
        super().__init__()
        self.pam_in_conv, self.cam_in_conv = conv_bn_relu(), conv_bn_relu()
        self.pam_net, self.cam_net = PositionAttentionModule(), ChannelAttentionModule()
        self.pam_out_conv, self.cam_out_conv = conv_bn_relu(), conv_bn_relu()
        self.decoder_pam, self.decoder_cam, self.decoder_pamcam = classifier(), classifier(), classifier()

    def forward(self, x):
        position = self.pam_out_conv(self.pam_net(self.pam_in_conv(x)))
        channel = self.cam_out_conv(self.cam_net(self.cam_in_conv(x)))
        return self.decoder_pamcam(position + channel), self.decoder_pam(position), self.decoder_cam(channel)


# Tramac


class _PositionAttentionModule(nn.Module):
    def __init__(self, in_channels):
        super().__init__()
        self.conv_b = nn.Conv2d(in_channels, in_channels // 4, 1)
        self.conv_c = nn.Conv2d(in_channels, in_channels // 4, 1)
        self.conv_d = nn.Conv2d(in_channels, in_channels, 1)
        self.alpha = nn.Parameter(torch.zeros(1))
        self.softmax = nn.Softmax(dim=-1)

    def forward(self, x):
        b, c, d = self.conv_b(x).flatten(2), self.conv_c(x).flatten(2), self.conv_d(x).flatten(2)
        weights = self.softmax(b.transpose(1, 2) @ c)
        return self.alpha * (d @ weights.transpose(1, 2)).view_as(x) + x


class _ChannelAttentionModule(nn.Module):
    def __init__(self):
        super().__init__()
        self.beta = nn.Parameter(torch.zeros(1))
        self.softmax = nn.Softmax(dim=-1)

    def forward(self, x):
        a = x.flatten(2)
        energy = a @ a.transpose(1, 2)
        weights = self.softmax(energy.max(-1, keepdim=True)[0] - energy)
        return self.beta * (weights @ a).view_as(x) + x


class _DAHead(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv_p1, self.conv_c1 = conv_bn_relu(), conv_bn_relu()
        self.pam, self.cam = _PositionAttentionModule(WIDTH), _ChannelAttentionModule()
        self.conv_p2, self.conv_c2 = conv_bn_relu(), conv_bn_relu()
        self.out, self.conv_p3, self.conv_c3 = classifier(), classifier(), classifier()

    def forward(self, x):
        position, channel = self.conv_p2(self.pam(self.conv_p1(x))), self.conv_c2(self.cam(self.conv_c1(x)))
        return self.out(position + channel), self.conv_p3(position), self.conv_c3(channel)


# pytorchcv


class ScaleBlock(nn.Module):
    def __init__(self):
        super().__init__()
        self.alpha = nn.Parameter(torch.ones(1))  # theirs begins at 1

    def forward(self, x):
        return self.alpha * x


class PosAttBlock(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.query_conv = nn.Conv2d(channels, channels // 4, 1)
        self.key_conv = nn.Conv2d(channels, channels // 4, 1)
        self.value_conv = nn.Conv2d(channels, channels, 1)
        self.scale, self.softmax = ScaleBlock(), nn.Softmax(dim=-1)

    def forward(self, x):
        key, query, value = (conv(x).flatten(2) for conv in (self.key_conv, self.query_conv, self.value_conv))
        weights = self.softmax(query.mT @ key)
        return self.scale((value @ weights.mT).view_as(x)) + x


class ChaAttBlock(nn.Module):
    def __init__(self):
        super().__init__()
        self.scale, self.softmax = ScaleBlock(), nn.Softmax(dim=-1)

    def forward(self, x):
        flat = x.flatten(2)
        energy = flat @ flat.mT
        weights = self.softmax(energy.max(-1, keepdim=True)[0] - energy)
        return self.scale((weights @ flat).view_as(x)) + x


class AttBranch(nn.Module):
    def __init__(self, attention):
        super().__init__()
        self.conv1, self.att, self.conv2, self.conv3 = conv_bn_relu(), attention, conv_bn_relu(), classifier()

    def forward(self, x):
        y = self.conv2(self.att(self.conv1(x)))
        return self.conv3(y), y


class PytorchCVHead(nn.Module):
    def __init__(self):
        super().__init__()
        self.branch_pa, self.branch_ca = AttBranch(PosAttBlock(WIDTH)), AttBranch(ChaAttBlock())
        self.conv = classifier()

    def forward(self, x):
        (position, y), (channel, z) = self.branch_pa(x), self.branch_ca(x)
        return self.conv(y + z), position, channel


# Crowd counting after SCAR: names of the scalars, and the sign of channel attention, are others


class SCAR(nn.Module):
    class PAM(nn.Module):
        def __init__(self):
            super().__init__()
            self.query_conv, self.key_conv = nn.Conv2d(WIDTH, KEYS, 1), nn.Conv2d(WIDTH, KEYS, 1)
            self.value_conv = nn.Conv2d(WIDTH, WIDTH, 1)
            self.para_lambda = nn.Parameter(torch.zeros(1))

        def forward(self, x):
            query, key, value = (c(x).flatten(2) for c in (self.query_conv, self.key_conv, self.value_conv))
            return self.para_lambda * (value @ (query.mT @ key).softmax(-1).mT).view_as(x) + x

    class CAM(nn.Module):
        def __init__(self):
            super().__init__()
            self.para_mu = nn.Parameter(torch.zeros(1))

        def forward(self, x):
            flat = x.flatten(2)
            energy = flat @ flat.mT
            torch.max(energy, -1, keepdim=True)[0].expand_as(energy) - energy  # as theirs, made and not used
            return self.para_mu * (energy.softmax(-1) @ flat).view_as(x) + x

    def __init__(self):
        super().__init__()
        self.pam, self.cam, self.out = SCAR.PAM(), SCAR.CAM(), classifier()

    def forward(self, x):
        position, channel = self.pam(x), self.cam(x)
        return self.out(position + channel), self.out(position), self.out(channel)


# TwinLiteNet: the authors' classes on few channels, and one after the other


class TwinLiteNet(nn.Module):
    def __init__(self):
        super().__init__()
        self.attention = nn.Sequential(PAM_Module(WIDTH), nn.Sequential(CAM_Module(WIDTH)))
        self.up = classifier()

    def forward(self, x):
        y = self.up(self.attention(x))
        return y, y, y


class Unknown(nn.Module):
    """Nobody's: other names, the scalar and the value first, logits divided by the root of the width."""

    class Spatial(nn.Module):
        def __init__(self):
            super().__init__()
            self.strength = nn.Parameter(torch.zeros(()))
            self.g, self.theta = nn.Conv2d(WIDTH, WIDTH, 1, bias=False), nn.Conv2d(WIDTH, KEYS, 1)
            self.phi = nn.Conv2d(WIDTH, KEYS, 1, bias=False)

        def forward(self, x):
            theta, phi, g = self.theta(x).flatten(2), self.phi(x).flatten(2), self.g(x).flatten(2)
            weights = (phi.mT @ theta / KEYS**0.5).softmax(-1)
            return x + self.strength * (g @ weights.mT).view_as(x)

    class Spectral(nn.Module):
        def __init__(self):
            super().__init__()
            self.strength = nn.Parameter(torch.zeros(1, 1, 1, 1))

        def forward(self, x):
            flat = x.flatten(2)
            return x + self.strength * ((-flat @ flat.mT).softmax(-1) @ flat).view_as(x)

    def __init__(self):
        super().__init__()
        self.spatial, self.spectral, self.out = Unknown.Spatial(), Unknown.Spectral(), classifier()

    def forward(self, x):
        position, channel = self.spatial(x), self.spectral(x)
        return self.out(position + channel), self.out(position), self.out(channel)


FAMILIES = {
    "official": DANetHead,
    "mmsegmentation": DAHead,
    "sssegmentation": SSSegDANet,
    "tramac": _DAHead,
    "pytorchcv": PytorchCVHead,
    "scar": SCAR,
    "twinlitenet": TwinLiteNet,
    "unknown": Unknown,
}

PATHS = {  # of position and channel attention in the head
    "official": ["sa", "sc"],
    "mmsegmentation": ["pam", "cam"],
    "sssegmentation": ["pam_net", "cam_net"],
    "tramac": ["pam", "cam"],
    "pytorchcv": ["branch_pa.att", "branch_ca.att"],
    "scar": ["pam", "cam"],
    "twinlitenet": ["attention.0", "attention.1.0"],
    "unknown": ["spatial", "spectral"],
}


class Net(nn.Module):
    """A head on a convolution; features at an eighth of the image."""

    def __init__(self, head):
        super().__init__()
        self.backbone = nn.Sequential(nn.Conv2d(3, WIDTH, 8, stride=8), nn.BatchNorm2d(WIDTH), nn.ReLU())
        self.head = head

    def forward(self, images):  # [B, 3, H, W] -> three times [B, 3, H / 8, W / 8]
        return self.head(self.backbone(images))


def network(name):
    torch.manual_seed(0)
    return Net(FAMILIES[name]())
