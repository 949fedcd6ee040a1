"""The classes that are known to be attention, by the projects they come from, and what their parts are called."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn


@dataclass(frozen=True)
class Pattern:
    """How a project names the parts of an attention module.

    Attributes:
        classes: the classes themselves, or their qualified names, such as "mmseg.models.decode_heads.da_head.PAM"; a
            name without a module is that of any class called so, which is looked for after all qualified ones.
        scalar: path of the learned scalar in the module, such as "gamma" or "gamma.scale".
        query, key, value: names of the projections, 1x1 convolutions; None for channel attention, which has none.

    Raises:
        TypeError: `classes` is no tuple.
        ValueError: some of the projections are named and some are not.
    """

    classes: tuple[str | type[nn.Module], ...]
    scalar: str
    query: str | None = None
    key: str | None = None
    value: str | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.classes, tuple):
            raise TypeError(f"Pattern: classes must be a tuple of classes and names, got {self.classes!r}")
        if len({name is None for name in (self.query, self.key, self.value)}) != 1:
            raise ValueError("Pattern: position attention needs query, key and value, channel attention none of them")

    @property
    def op(self) -> str:
        return "channel_attention" if self.query is None else "position_attention"

    def has_class(self, cls: type[nn.Module]) -> bool:
        """Whether this very class is meant."""
        return cls in self.classes or f"{cls.__module__}.{cls.__qualname__}" in self.classes

    def has_name(self, cls: type[nn.Module]) -> bool:
        """Whether a class of this name is meant, whatever module it comes from."""
        names = (name if isinstance(name, str) else name.__name__ for name in self.classes)
        return cls.__name__ in (name.rpartition(".")[2] for name in names)


_CONV = ("query_conv", "key_conv", "value_conv")
_PROJECT = ("query_project", "key_project", "value_project")
PATTERNS = [
    Pattern(("encoding.nn.da_att.PAM_Module", "PositionAttentionModule"), "gamma", *_CONV),
    Pattern(("encoding.nn.da_att.CAM_Module", "ChannelAttentionModule"), "gamma"),
    Pattern(("mmseg.models.decode_heads.da_head.PAM",), "gamma.scale", *_PROJECT),
    Pattern(("mmseg.models.decode_heads.da_head.CAM",), "gamma.scale"),
    Pattern(
        ("core.models.danet._PositionAttentionModule", "PositionAttentionModule"), "alpha", "conv_b", "conv_c", "conv_d"
    ),
    Pattern(("core.models.danet._ChannelAttentionModule", "ChannelAttentionModule"), "beta"),
    Pattern(("ssseg.modules.models.segmentors.danet.pam.PositionAttentionModule",), "gamma.scale", *_PROJECT),
    Pattern(("ssseg.modules.models.segmentors.danet.cam.ChannelAttentionModule",), "gamma.scale"),
    Pattern(("pytorchcv.models.danet.PosAttBlock",), "scale.alpha", *_CONV),
    Pattern(("pytorchcv.models.danet.ChaAttBlock",), "scale.alpha"),
    Pattern(("PAM", "PAM_Module"), "gamma", *_CONV),
    Pattern(("CAM", "CAM_Module"), "gamma"),
    Pattern(("PAM",), "para_lambda", *_CONV),
    Pattern(("CAM",), "para_mu"),
]

LOOK_ALIKES = {
    "CrissCrossAttention": "criss-cross attention sees one row and one column",
    "Self_Attn": "this kind, SAGAN's, may return the map as well",
    "PABBlock": "its softmax goes over all N x N logits at once",
    "ExternalAttention": "external attention has learned keys and values",
    "External_attention": "external attention has learned keys and values",
    "CPAMDec": "it attends to a few pooled centres, not to all positions",
    "CCAMDec": "it attends to gathered channels, not to all",
    "CBAM": "a gate made of pooled features, without a map",
    "ChannelGate": "a gate made of pooled features, without a map",
    "SpatialGate": "a gate made of pooled features, without a map",
    "ChannelAttention": "by its parts a gate, without a map between channels",
    "SpatialAttention": "by its parts a gate, without a map between positions",
}
"""Classes that are taken for attention of DANet by their names, and what they are: for the report."""


def register_pattern(pattern: Pattern) -> None:
    """Teach swap a class of yours: register_pattern(Pattern((Mine,), "gamma", "to_q", "to_k", "to_v")).

    It is tried before those that are known, and verified like them.
    """
    PATTERNS.insert(0, pattern)


def scalar(module: nn.Module, pattern: Pattern) -> Tensor:
    """The learned scalar. AttributeError where there is none."""
    found: Any = module
    for name in pattern.scalar.split("."):
        found = getattr(found, name)
    if not isinstance(found, Tensor):
        raise AttributeError(pattern.scalar)
    return found


def projections(module: nn.Module, pattern: Pattern) -> list[nn.Conv2d]:
    """Those of query, key and value."""
    return [getattr(module, str(name)) for name in (pattern.query, pattern.key, pattern.value)]
