"""DANet checkpoints of four projects: told apart by their names, converted into each other, loaded into a model.

- "danet": this package's own.
- "official": the authors', github.com/junfu1115/DANet.
- "mmsegmentation": its DAHead on a ResNetV1c.
- "tramac": github.com/Tramac/awesome-semantic-segmentation-pytorch.

Only names differ, and mmsegmentation's gammas have no dimension. The weights do not tell the rest: the authors'
released model needs multi_grid=(4, 8, 16); mmsegmentation's were trained with either value of align_corners.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from ._files import whole
from ._weights import Weights, assign, describe, listed, read
from .backbone import check_stem, stem_of
from .model import WEIGHTS_FILE, DANet

__all__ = ["FORMATS", "convert", "detect", "load", "read", "write"]

FORMATS = ("danet", "official", "mmsegmentation", "tramac")

# One row for each module with weights, or for each gamma; one column for each format.
_HEAD = (
    ("head.position_in.0", "head.conv5a.0", "decode_head.pam_in_conv.conv", "head.conv_p1.0"),
    ("head.position_in.1", "head.conv5a.1", "decode_head.pam_in_conv.bn", "head.conv_p1.1"),
    (
        "head.position_attention.query_conv",
        "head.sa.query_conv",
        "decode_head.pam.query_project",
        "head.pam.conv_b",
    ),
    ("head.position_attention.key_conv", "head.sa.key_conv", "decode_head.pam.key_project", "head.pam.conv_c"),
    (
        "head.position_attention.value_conv",
        "head.sa.value_conv",
        "decode_head.pam.value_project",
        "head.pam.conv_d",
    ),
    ("head.position_attention.gamma", "head.sa.gamma", "decode_head.pam.gamma.scale", "head.pam.alpha"),
    ("head.position_out.0", "head.conv51.0", "decode_head.pam_out_conv.conv", "head.conv_p2.0"),
    ("head.position_out.1", "head.conv51.1", "decode_head.pam_out_conv.bn", "head.conv_p2.1"),
    ("head.position_classifier.1", "head.conv6.1", "decode_head.pam_conv_seg", "head.conv_p3.1"),
    ("head.channel_in.0", "head.conv5c.0", "decode_head.cam_in_conv.conv", "head.conv_c1.0"),
    ("head.channel_in.1", "head.conv5c.1", "decode_head.cam_in_conv.bn", "head.conv_c1.1"),
    ("head.channel_attention.gamma", "head.sc.gamma", "decode_head.cam.gamma.scale", "head.cam.beta"),
    ("head.channel_out.0", "head.conv52.0", "decode_head.cam_out_conv.conv", "head.conv_c2.0"),
    ("head.channel_out.1", "head.conv52.1", "decode_head.cam_out_conv.bn", "head.conv_c2.1"),
    ("head.channel_classifier.1", "head.conv7.1", "decode_head.cam_conv_seg", "head.conv_c3.1"),
    ("head.classifier.1", "head.conv8.1", "decode_head.conv_seg", "head.out.1"),
)
_BACKBONE = {"danet": "backbone.", "official": "pretrained.", "mmsegmentation": "backbone.", "tramac": "pretrained."}
_STEM = {"stem.7": "bn1"} | {f"stem.{index}": f"conv1.{index}" for index in (0, 1, 3, 4, 6)}  # mmsegmentation: ours


def detect(state: Mapping[str, Tensor]) -> str:
    """The format, one of FORMATS, that the names of a state dict belong to.

    Raises:
        ValueError: no head of any of them is in it.
    """
    names = [_module(name) for name in _unprefixed(state)]
    for column, kind in enumerate(FORMATS):
        known = {row[column] for row in _HEAD} | ({"head.fcn_in.0"} if kind == "danet" else set())
        if any(name in known for name in names):
            return kind
    what = "a backbone alone, load it with backbone_weights of create_model" if stem_of(state) else "no DANet"
    raise ValueError(
        f"these are not the weights of a DANet in any known format ({', '.join(FORMATS)}) but of {what}; the first "
        f"names are {', '.join(list(state)[:3])}"
    )


def convert(state: Mapping[str, Tensor], to: str) -> dict[str, Tensor]:
    """The same weights under the names of the format `to`. The head always fits; a backbone only where stems agree.

    A classifier of ImageNet is left out; so is an auxiliary head on an inner layer, with a warning.

    Raises:
        ValueError: an unknown format, or weights that have no name in it, all listed.
    """
    if to not in FORMATS:
        raise ValueError(f"convert: unknown format {to!r}, expected one of {', '.join(map(repr, FORMATS))}")
    known, unknown = _to_own(state)
    names = {row[0]: row[FORMATS.index(to)] for row in _HEAD}
    converted = {}
    for name, tensor in known.items():
        if name.startswith("backbone."):
            target = _BACKBONE[to] + _backbone_name(name.removeprefix("backbone."), known, to)
        elif to == "danet":
            target = name
        elif _module(name) in names:
            target = _renamed(name, names)
        else:
            unknown[name] = tensor
            continue
        is_gamma = name.endswith("gamma")
        converted[target] = tensor.reshape(() if to == "mmsegmentation" else (1,)) if is_gamma else tensor
    if unknown:
        raise ValueError(listed(f"convert: some weights have no name in the format {to!r}:", unknown))
    return converted


def write(state: Mapping[str, Tensor], target: Path) -> None:
    """A file that is whole or not there: in safetensors' format if its name ends so, else torch.save's."""
    tensors = {name: tensor.contiguous() for name, tensor in state.items()}
    with whole(target) as partial:
        if target.suffix == ".safetensors":
            from safetensors.torch import save_file

            save_file(tensors, partial)
        else:
            torch.save({"state_dict": tensors}, partial)


def load(model: DANet, weights: Weights) -> str:
    """Load a checkpoint of any format into `model`, and return which it was.

    Args:
        weights: a state dict, the path of a file (torch.save or safetensors), or a directory of save_pretrained.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file cannot be read safely, or does not fit; the message lists every mismatch. The model is then
            as it was.
    """
    if not isinstance(weights, Mapping) and Path(weights).is_dir():
        weights = Path(weights) / WEIGHTS_FILE
    source = describe(weights)
    state = read(weights)
    kind = detect(state)
    known, unknown = _to_own(state)
    expected = getattr(model.backbone, "stem", None)
    if expected is not None:
        backbone = {name.removeprefix("backbone."): tensor for name, tensor in known.items()}
        check_stem(stem_of(backbone), expected, source)
    hint = ""
    classifier = known.get("head.classifier.1.weight")  # [classes, inter_channels, 1, 1]
    if classifier is not None and classifier.shape[0] != model.num_classes:
        hint = (
            f"It was trained for {classifier.shape[0]} classes, the model is for {model.num_classes}: create it with "
            f"num_classes={classifier.shape[0]}."
        )
    assign(model, known | unknown, f"{source} (format {kind!r})", hint)
    return kind


def _to_own(state: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The weights under our own names, and those that have none under theirs."""
    kind = detect(state)
    names = {row[FORMATS.index(kind)]: row[0] for row in _HEAD}
    prefix = _BACKBONE[kind]
    known, unknown, auxiliary = {}, {}, []
    for name, tensor in _unprefixed(state).items():
        if name.startswith(f"{prefix}fc."):
            continue
        if kind == "mmsegmentation" and name.startswith("auxiliary_head."):
            auxiliary.append(name)
        elif name.startswith(prefix):
            own = name.removeprefix(prefix)
            module = _module(own)
            if kind == "mmsegmentation" and module in _STEM:
                own = _renamed(own, _STEM)
            known[f"backbone.{own}"] = tensor
        elif _module(name) in names:
            own = _renamed(name, names)
            known[own] = tensor.reshape(1) if own.endswith("gamma") and tensor.numel() == 1 else tensor
        elif kind == "danet" and name.startswith("head.fcn_in."):
            known[name] = tensor
        else:
            unknown[name] = tensor
    if auxiliary:
        message = f"left out {len(auxiliary)} weights of auxiliary_head: only training in mmsegmentation looks at it"
        warnings.warn(message, stacklevel=3)
    return known, unknown


def _backbone_name(name: str, known: Mapping[str, Tensor], to: str) -> str:
    """mmsegmentation has names of its own for the stem of three convolutions."""
    if to != "mmsegmentation" or "backbone.conv1.weight" in known:
        return name
    names = {own: theirs for theirs, own in _STEM.items()}
    return _renamed(name, names) if _module(name) in names else name


def _unprefixed(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix("module."): tensor for name, tensor in state.items()}


def _module(name: str) -> str:
    """The module that a weight belongs to; a gamma stands for itself."""
    is_gamma = name.endswith((".gamma", ".gamma.scale", ".alpha", ".beta"))
    return name if is_gamma else name.rpartition(".")[0]


def _renamed(name: str, names: Mapping[str, str]) -> str:
    module = _module(name)
    return names[module] + name[len(module) :]
