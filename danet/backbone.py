"""Dilated ResNets: the last feature map at 1/8 of the image's size, with the parameter names of torchvision."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from importlib import import_module
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ._weights import Weights, assign, describe, read

STEMS = {
    "plain": "one 7x7 convolution, as torchvision's",
    "deep": "three 3x3 convolutions of 64, 64 and 128 channels, as PyTorch-Encoding's",
    "v1c": "three 3x3 convolutions of 32, 32 and 64 channels, as mmsegmentation's ResNetV1c",
}

# By output stride, for the four stages: the stride, and the dilation of all blocks but the first.
_STRIDES = {8: (1, 2, 1, 1), 16: (1, 2, 2, 1), 32: (1, 2, 2, 2)}
_DILATIONS = {8: (1, 1, 2, 4), 16: (1, 1, 1, 2), 32: (1, 1, 1, 1)}


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut."""

    expansion = 1

    def __init__(self, in_channels: int, width: int, stride: int, dilation: int) -> None:
        super().__init__()
        self.conv1 = _conv3x3(in_channels, width, stride, dilation)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = _conv3x3(width, width, 1, dilation)
        self.bn2 = nn.BatchNorm2d(width)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = _shortcut(in_channels, width, stride)

    def forward(self, x: Tensor) -> Tensor:  # [B, in_channels, H, W] -> [B, width, H / stride, W / stride]
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        out += x if self.downsample is None else self.downsample(x)
        return self.relu(out)


class Bottleneck(nn.Module):
    """1x1, 3x3 and 1x1 convolutions and a shortcut; the 3x3 has the stride and the dilation."""

    expansion = 4

    def __init__(self, in_channels: int, width: int, stride: int, dilation: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, width, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = _conv3x3(width, width, stride, dilation)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv3 = nn.Conv2d(width, 4 * width, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(4 * width)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = _shortcut(in_channels, 4 * width, stride)

    def forward(self, x: Tensor) -> Tensor:  # [B, in_channels, H, W] -> [B, 4 * width, H / stride, W / stride]
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.relu(self.bn2(self.conv2(out)))
        out = self.bn3(self.conv3(out))
        out += x if self.downsample is None else self.downsample(x)
        return self.relu(out)


class ResNet(nn.Module):
    """A ResNet without its classifier, whose last stages trade stride for dilation (Fu et al., section 3.1).

    With output stride 8, the 3x3 convolutions of layer3 have dilation 2 and those of layer4 have 4, the first block of
    each half of that.

    Args:
        block: BasicBlock or Bottleneck.
        layers: blocks of each of the four stages.
        stem: "plain", "deep" or "v1c", see STEMS.
        output_stride: 8, 16 or 32.
        multi_grid: dilations of the blocks of layer4, one each, such as (4, 8, 16); None: as above.
        widths: channels of each stage, before the block's expansion.

    Attributes:
        channels: channels of the feature map.
        gradient_checkpointing: keep only the input of each stage for backward, and compute the rest once more. The
            running statistics are updated once. Under torch.compile it does nothing: what is recomputed is the
            compiler's decision there.
    """

    def __init__(
        self,
        block: type[BasicBlock] | type[Bottleneck],
        layers: Sequence[int],
        *,
        stem: str = "plain",
        output_stride: int = 8,
        multi_grid: Sequence[int] | None = None,
        widths: Sequence[int] = (64, 128, 256, 512),
    ) -> None:
        super().__init__()
        if stem not in STEMS:
            raise ValueError(f"ResNet: stem must be one of {', '.join(map(repr, STEMS))}, got {stem!r}")
        if output_stride not in _STRIDES:
            raise ValueError(f"ResNet: output_stride must be 8, 16 or 32, got {output_stride!r}")
        if multi_grid is not None and output_stride == 32:
            raise ValueError("ResNet: multi_grid dilates layer4, which output_stride=32 does not; use 8 or 16")
        if multi_grid is not None and len(multi_grid) != layers[3]:
            raise ValueError(
                f"ResNet: multi_grid must have one dilation for each of the {layers[3]} blocks of layer4, "
                f"got {list(multi_grid)}"
            )
        self.stem = stem
        self.output_stride = output_stride
        self.channels = widths[3] * block.expansion
        self.gradient_checkpointing = False

        self.conv1, stem_channels = _stem(stem, widths[0])
        self.bn1 = nn.BatchNorm2d(stem_channels)
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool2d(3, stride=2, padding=1)
        channels = [stem_channels, *(width * block.expansion for width in widths)]
        stages = []
        for stage, stride in enumerate(_STRIDES[output_stride]):
            largest = _DILATIONS[output_stride][stage]
            dilations = [max(1, largest // 2), *[largest] * (layers[stage] - 1)]
            if stage == 3 and multi_grid is not None:
                dilations = list(multi_grid)
            stages.append(_stage(block, channels[stage], widths[stage], stride, dilations))
        self.layer1, self.layer2, self.layer3, self.layer4 = stages
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, images: Tensor) -> Tensor:  # [B, 3, H, W] -> [B, channels, H / output_stride, W / output_stride]
        x = self.maxpool(self.relu(self.bn1(self.conv1(images))))
        recompute = self.gradient_checkpointing and torch.is_grad_enabled() and not torch.compiler.is_compiling()
        for stage in (self.layer1, self.layer2, self.layer3, self.layer4):
            x = _checkpointed(stage, x) if recompute else stage(x)
        return x

    def load_weights(self, weights: Weights) -> None:
        """Load the weights of torchvision's or timm's ResNet of this depth, by name; their classifier is left out.

        Args:
            weights: a state dict, or the path of a file with one.

        Raises:
            FileNotFoundError, ValueError: no such file; unreadable; weights that do not fit, every mismatch named.
        """
        state = {name: tensor for name, tensor in read(weights).items() if not name.startswith("fc.")}
        check_stem(stem_of(state), self.stem, describe(weights))
        assign(self, state, describe(weights))


class TimmBackbone(nn.Module):
    """Any backbone of timm that can be dilated, for `DANet(backbone, DANetHead(backbone.channels, ...))`.

    Needs timm (an extra). pretrained: timm then downloads the weights.
    """

    def __init__(self, name: str, *, output_stride: int = 8, pretrained: bool = False) -> None:
        super().__init__()
        try:
            timm = import_module("timm")
        except ImportError as error:
            raise ImportError(f"TimmBackbone needs timm, which cannot be imported here: {error}") from error
        self.body = timm.create_model(
            name, pretrained=pretrained, features_only=True, output_stride=output_stride, out_indices=(-1,)
        )
        self.channels: int = self.body.feature_info.channels()[-1]
        self.output_stride: int = self.body.feature_info.reduction()[-1]

    def forward(self, images: Tensor) -> Tensor:  # [B, 3, H, W] -> [B, channels, H / output_stride, W / output_stride]
        return self.body(images)[-1]


def stem_of(state: Mapping[str, Tensor]) -> str | None:
    """The stem that a backbone's state dict belongs to; None: there is no stem in it."""
    if "conv1.weight" in state:
        return "plain"
    if "conv1.0.weight" not in state or "bn1.weight" not in state:
        return None
    first, last = state["conv1.0.weight"].shape[0], state["bn1.weight"].shape[0]
    # Narrower nets keep the ratios to the first stage, whose width is the 3x3 convolution's.
    width = next((tensor.shape[0] for name, tensor in state.items() if name == "layer1.0.conv1.weight"), last)
    return "deep" if first == width else "v1c"


def check_stem(found: str | None, expected: str, source: str) -> None:
    """Raise a ValueError that says what to do, unless the stems are the same (or none was found)."""
    if found is not None and found != expected:
        raise ValueError(
            f"{source} has the stem {found!r} ({STEMS[found]}), the model has {expected!r} ({STEMS[expected]}): "
            f"such weights cannot be converted; create the model with stem={found!r}"
        )


def _conv3x3(in_channels: int, out_channels: int, stride: int = 1, dilation: int = 1) -> nn.Conv2d:
    return nn.Conv2d(in_channels, out_channels, 3, stride, padding=dilation, dilation=dilation, bias=False)


def _shortcut(in_channels: int, out_channels: int, stride: int) -> nn.Sequential | None:
    if stride == 1 and in_channels == out_channels:
        return None
    return nn.Sequential(
        nn.Conv2d(in_channels, out_channels, 1, stride, bias=False),
        nn.BatchNorm2d(out_channels),
    )


def _stem(stem: str, width: int) -> tuple[nn.Module, int]:
    """The convolutions before bn1, and how many channels they make of an image."""
    if stem == "plain":
        return nn.Conv2d(3, width, 7, stride=2, padding=3, bias=False), width
    inner, outer = (width, 2 * width) if stem == "deep" else (width // 2, width)
    convolutions = nn.Sequential(
        _conv3x3(3, inner, stride=2),
        nn.BatchNorm2d(inner),
        nn.ReLU(inplace=True),
        _conv3x3(inner, inner),
        nn.BatchNorm2d(inner),
        nn.ReLU(inplace=True),
        _conv3x3(inner, outer),
    )
    return convolutions, outer


def _stage(
    block: type[BasicBlock] | type[Bottleneck], in_channels: int, width: int, stride: int, dilations: Sequence[int]
) -> nn.Sequential:
    """One block for each dilation; the first has the stride."""
    first = block(in_channels, width, stride, dilations[0])
    return nn.Sequential(first, *(block(width * block.expansion, width, 1, dilation) for dilation in dilations[1:]))


def _checkpointed(stage: nn.Module, x: Tensor) -> Tensor:
    def contexts() -> tuple[AbstractContextManager[Any], AbstractContextManager[Any]]:
        return nullcontext(), _statistics_kept(stage)

    # There is no dropout in a backbone, so the state of the random numbers need not be put back.
    return checkpoint(partial(stage), x, use_reentrant=False, preserve_rng_state=False, context_fn=contexts)


@contextmanager
def _statistics_kept(stage: nn.Module) -> Iterator[None]:
    """While a stage runs once more for its backward: else BatchNorm would count the batch twice."""
    norms = [module for module in stage.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    kept = [(norm.momentum, norm.num_batches_tracked) for norm in norms]
    # Not `track_running_stats = False`: the same tensors must be saved for backward as the first time.
    for norm, (_, count) in zip(norms, kept, strict=True):
        norm.momentum = 0.0
        norm.num_batches_tracked = None if count is None else count.clone()
    try:
        yield
    finally:
        for norm, (momentum, count) in zip(norms, kept, strict=True):
            norm.momentum, norm.num_batches_tracked = momentum, count
