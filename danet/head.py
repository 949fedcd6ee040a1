"""The head of DANet: both attention branches and their classifiers, or one of them, or none (Table 1 of the paper)."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor, nn

from .attention import ChannelAttention, PositionAttention

VARIANTS = ("danet", "pam", "cam", "fcn")


class Logits(NamedTuple):
    """[B, classes, H, W] each: of the fused features, and of either branch alone, which only training looks at."""

    main: Tensor
    position: Tensor | None
    channel: Tensor | None


class DANetHead(nn.Module):
    """Features to logits, at the size of the feature map (Fu et al., section 3.4).

    A branch is a 3x3 convolution, the attention, and another 3x3 convolution; the outputs of the two branches are
    added. Each of the two and the sum have a classifier. With one branch there is one classifier, hence one loss; the
    fcn is a 3x3 convolution and a classifier.

    Args:
        in_channels: channels of the feature map.
        num_classes: channels of the logits.
        variant: "danet" (both branches), "pam" (position), "cam" (channel) or "fcn" (none).
        inter_channels: channels inside; None: in_channels // 4.
        dropout: probability with which a classifier's whole input channel is zeroed in training.
        channel_variant: the sign in channel attention, see ChannelAttention.
        attention_backend: backend of both attention modules.
    """

    def __init__(
        self,
        in_channels: int,
        num_classes: int,
        *,
        variant: str = "danet",
        inter_channels: int | None = None,
        dropout: float = 0.1,
        channel_variant: str = "official",
        attention_backend: str = "auto",
    ) -> None:
        super().__init__()
        if variant not in VARIANTS:
            raise ValueError(f"DANetHead: variant must be one of {', '.join(map(repr, VARIANTS))}, got {variant!r}")
        inter_channels = max(1, in_channels // 4) if inter_channels is None else inter_channels
        self.variant = variant
        self.num_classes = num_classes
        if variant == "fcn":
            self.fcn_in = _conv_bn_relu(in_channels, inter_channels)
        if variant in ("danet", "pam"):
            self.position_in = _conv_bn_relu(in_channels, inter_channels)
            self.position_attention = PositionAttention(inter_channels, backend=attention_backend)
            self.position_out = _conv_bn_relu(inter_channels, inter_channels)
        if variant in ("danet", "cam"):
            self.channel_in = _conv_bn_relu(in_channels, inter_channels)
            self.channel_attention = ChannelAttention(variant=channel_variant, backend=attention_backend)
            self.channel_out = _conv_bn_relu(inter_channels, inter_channels)
        if variant == "danet":
            self.position_classifier = _classifier(inter_channels, num_classes, dropout)
            self.channel_classifier = _classifier(inter_channels, num_classes, dropout)
        self.classifier = _classifier(inter_channels, num_classes, dropout)

    def forward(self, features: Tensor) -> Logits:  # [B, in_channels, h, w] -> [B, num_classes, h, w] each
        if self.variant == "fcn":
            return Logits(self.classifier(self.fcn_in(features)), None, None)
        if self.variant == "pam":
            return Logits(self.classifier(self._position(features)), None, None)
        if self.variant == "cam":
            return Logits(self.classifier(self._channel(features)), None, None)
        position = self._position(features)  # [B, inter_channels, h, w]
        channel = self._channel(features)  # [B, inter_channels, h, w]
        return Logits(
            self.classifier(position + channel),
            self.position_classifier(position),
            self.channel_classifier(channel),
        )

    def _position(self, features: Tensor) -> Tensor:
        return self.position_out(self.position_attention(self.position_in(features)))

    def _channel(self, features: Tensor) -> Tensor:
        return self.channel_out(self.channel_attention(self.channel_in(features)))


def _conv_bn_relu(in_channels: int, out_channels: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(in_channels, out_channels, 3, padding=1, bias=False),
        nn.BatchNorm2d(out_channels),
        nn.ReLU(inplace=True),
    )


def _classifier(in_channels: int, num_classes: int, dropout: float) -> nn.Sequential:
    return nn.Sequential(nn.Dropout2d(dropout), nn.Conv2d(in_channels, num_classes, 1))
