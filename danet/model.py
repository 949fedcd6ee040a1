"""The whole network: images to logits at their size; models by name; saving and loading."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ._config import check_config
from ._files import whole
from ._weights import Weights, check, read
from .backbone import BasicBlock, Bottleneck, ResNet
from .head import VARIANTS, DANetHead, Logits

WEIGHTS_FILE, CONFIG_FILE = "model.safetensors", "config.json"


class DANet(nn.Module):
    """A backbone, a head, and bilinear upsampling to the size of the image.

    Any height and width; the feature map's are rounded up. To train on several GPUs, pass the model through
    `torch.nn.SyncBatchNorm.convert_sync_batchnorm` before DistributedDataParallel: batches of one or two images a GPU
    are too small for statistics of their own. It changes neither names nor weights.

    Args:
        backbone: a ResNet, or any module with `channels` and `output_stride`.
        head: a DANetHead for that many channels.
        align_corners: as F.interpolate; True is the authors' and what their weights were trained with.
        config: the arguments of create_model, for save_pretrained; it fills this in itself.

    Attributes:
        classes, palette: names and (r, g, b) colours of the classes, or None; saved with the model.
    """

    def __init__(
        self,
        backbone: nn.Module,
        head: DANetHead,
        *,
        align_corners: bool = True,
        config: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__()
        self.backbone = backbone
        self.head = head
        self.output_stride: int = backbone.output_stride  # type: ignore[assignment]
        self.align_corners = align_corners
        self.config = None if config is None else dict(config)
        self.classes: tuple[str, ...] | None = None
        self.palette: list[tuple[int, int, int]] | None = None

    @property
    def num_classes(self) -> int:
        return self.head.num_classes

    def forward(self, images: Tensor, all_logits: bool = False) -> Tensor | Logits:
        """Logits at the images' size.

        Args:
            images: [B, 3, H, W], normalised.
            all_logits: whether all logits are wanted in evaluation too.

        Returns:
            In training, or with all_logits, Logits of [B, classes, H, W] each; else main [B, classes, H, W] alone.

        Raises:
            TypeError, ValueError: not such images; training on a single position, for which BatchNorm has no variance.
        """
        self._check(images)
        logits = self.head(self.backbone(images))

        def upsample(part: Tensor) -> Tensor:  # [B, classes, h, w] -> [B, classes, H, W]
            return F.interpolate(part, images.shape[2:], mode="bilinear", align_corners=self.align_corners)

        if not (self.training or all_logits):
            return upsample(logits.main)
        position, channel = (None if part is None else upsample(part) for part in (logits.position, logits.channel))
        return Logits(upsample(logits.main), position, channel)

    def _check(self, images: Tensor) -> None:
        if not isinstance(images, Tensor) or not images.is_floating_point():
            kind = images.dtype if isinstance(images, Tensor) else type(images).__name__
            raise TypeError(f"DANet: images must be a tensor of floating-point numbers, normalised, got {kind}")
        if images.dim() != 4 or images.shape[1] != 3:
            raise ValueError(f"DANet: images must have shape [B, 3, H, W], got {list(images.shape)}")
        if self.training and images.shape[0] * self._positions(images) <= 1 and self._needs_variance():
            raise ValueError(
                f"DANet: cannot train on images {list(images.shape)}: with output stride {self.output_stride} "
                "the feature map has one position, and BatchNorm needs two to form a variance; use larger crops or a "
                "larger batch, or put the BatchNorm layers into evaluation mode"
            )

    def _positions(self, images: Tensor) -> int:
        """Positions of the feature map of one image."""
        return -(-images.shape[2] // self.output_stride) * -(-images.shape[3] // self.output_stride)

    def _needs_variance(self) -> bool:
        """SyncBatchNorm does not: it has the positions of other processes too."""
        return any(isinstance(module, nn.BatchNorm2d) and module.training for module in self.modules())

    def save_pretrained(self, path: str | Path) -> None:
        """Write the directory `path`: the weights (safetensors) and config.json. Each file is whole or not there.

        Raises:
            ValueError: the model was not made by create_model, so that no config could make it again.
        """
        if self.config is None:
            raise ValueError(
                "save_pretrained: only models of create_model can be made again from a config; save the state_dict() "
                "of this one"
            )
        from safetensors.torch import save_file

        config = self.config | {"classes": self.classes, "palette": self.palette}
        check_config(config, "save_pretrained")
        tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in self.state_dict().items()}
        with whole(Path(path) / WEIGHTS_FILE) as weights_file, whole(Path(path) / CONFIG_FILE) as config_file:
            save_file(tensors, weights_file)
            config_file.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")

    @staticmethod
    def from_pretrained(path: str | Path, *, attention_backend: str = "auto") -> DANet:
        """The model that save_pretrained wrote, in evaluation mode. Nothing that the files hold is run.

        Raises:
            FileNotFoundError: a file is missing.
            ValueError: a file cannot be read, config.json has unknown keys or wrong values, or the weights do not fit.
        """
        source = Path(path) / CONFIG_FILE
        if not source.is_file():
            raise FileNotFoundError(f"there is no file {source}: expected a directory that save_pretrained wrote")
        try:
            config = json.loads(source.read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(f"{source} is no JSON: {error}") from None
        check_config(config, str(source))
        classes, palette = config.pop("classes", None), config.pop("palette", None)
        weights = Path(path) / WEIGHTS_FILE
        state = read(weights)
        with torch.device("meta"):  # sizes out of a config are compared before memory is taken for them
            check(create_model(**config), state, str(weights))
        model = create_model(**config, attention_backend=attention_backend)
        model.classes = None if classes is None else tuple(classes)
        model.palette = None if palette is None else [(red, green, blue) for red, green, blue in palette]
        model.load_state_dict(state, strict=False)
        return model.eval()


@dataclass(frozen=True)
class _Net:
    """A ResNet by its sizes."""

    block: type[BasicBlock] | type[Bottleneck]
    layers: tuple[int, int, int, int]
    widths: tuple[int, int, int, int] = (64, 128, 256, 512)
    inter_channels: int | None = None  # of the head


_NETS = {
    "tiny": _Net(BasicBlock, (1, 1, 1, 1), (32, 64, 96, 128), inter_channels=64),
    "resnet18": _Net(BasicBlock, (2, 2, 2, 2)),
    "resnet50": _Net(Bottleneck, (3, 4, 6, 3)),
    "resnet101": _Net(Bottleneck, (3, 4, 23, 3)),
    "resnet152": _Net(Bottleneck, (3, 8, 36, 3)),
}


def list_models() -> list[str]:
    """The names that create_model takes: <variant>_<net>."""
    return [f"{variant}_{net}" for net in _NETS for variant in VARIANTS]


def create_model(
    name: str,
    num_classes: int,
    *,
    stem: str = "plain",
    output_stride: int = 8,
    multi_grid: Sequence[int] | None = None,
    inter_channels: int | None = None,
    dropout: float = 0.1,
    channel_variant: str = "official",
    align_corners: bool = True,
    attention_backend: str = "auto",
    gradient_checkpointing: bool = False,
    backbone_weights: Weights | None = None,
) -> DANet:
    """A model by its name, such as "danet_resnet101", or "fcn_resnet50", "pam_..." and "cam_..." of Table 1.

    "danet_tiny" and its variants are small enough to learn something on a CPU within a minute.

    Args:
        name: one of list_models().
        num_classes: classes, without the ignored label.
        stem, output_stride, multi_grid: as ResNet. The authors' released weights have the plain stem, 8 and (4, 8, 16).
        inter_channels, dropout, channel_variant, attention_backend: as DANetHead.
        align_corners: as DANet.
        gradient_checkpointing: as ResNet: less memory in training for one more forward pass of the backbone.
        backbone_weights: state dict or file of torchvision's or timm's ResNet, as ResNet.load_weights takes it.

    Raises:
        ValueError: an unknown name, an option out of range, or weights that do not fit.
        FileNotFoundError: there is no such file of weights.
    """
    if name not in list_models():
        raise ValueError(f"create_model: unknown model {name!r}, expected one of {', '.join(list_models())}")
    config = {
        "name": name,
        "num_classes": num_classes,
        "stem": stem,
        "output_stride": output_stride,
        "multi_grid": None if multi_grid is None else list(multi_grid),
        "inter_channels": inter_channels,
        "dropout": dropout,
        "channel_variant": channel_variant,
        "align_corners": align_corners,
    }
    check_config(config, "create_model")
    variant, _, net_name = name.partition("_")
    net = _NETS[net_name]
    backbone = ResNet(
        net.block,
        net.layers,
        stem=stem,
        output_stride=output_stride,
        multi_grid=multi_grid,
        widths=net.widths,
    )
    backbone.gradient_checkpointing = gradient_checkpointing
    if backbone_weights is not None:
        backbone.load_weights(backbone_weights)
    head = DANetHead(
        backbone.channels,
        num_classes,
        variant=variant,
        inter_channels=net.inter_channels if inter_channels is None else inter_channels,
        dropout=dropout,
        channel_variant=channel_variant,
        attention_backend=attention_backend,
    )
    return DANet(backbone, head, align_corners=align_corners, config=config)


def receptive_field(model: DANet) -> int:
    """Side, in pixels, of the square of the image that the logits of one pixel depend on; of an fcn with a ResNet.

    For pixels in the middle; the square's centre lies within two output strides of the pixel. The other variants see
    the whole image.
    """
    if model.head.variant != "fcn" or not isinstance(model.backbone, ResNet):
        raise ValueError(
            f"receptive_field: needs the variant 'fcn' with a ResNet, got {model.head.variant!r} with "
            f"{type(model.backbone).__name__}"
        )
    side, jump = 1, 1  # jump: pixels of the image between neighbours on the map reached so far
    for name, layer in [*model.backbone.named_modules(), *model.head.fcn_in.named_modules()]:
        # In the order of the forward pass; a shortcut's 1x1 convolution sees no more than the block it is beside.
        if isinstance(layer, (nn.Conv2d, nn.MaxPool2d)) and "downsample" not in name:
            kernel, stride, dilation = (_one(value) for value in (layer.kernel_size, layer.stride, layer.dilation))
            side += (kernel - 1) * dilation * jump
            jump *= stride
    return side + jump  # a pixel mixes two neighbours of the feature map along each axis


def _one(size: Any) -> int:
    """Pooling keeps a number where a convolution has a pair."""
    return size[0] if isinstance(size, tuple) else size
