"""DANet (Fu et al., CVPR 2019): the model on fused attention, and what it takes to train, evaluate and use it.

The names below are imported when they are first used, so that `import danet` costs nothing.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .attention import ChannelAttention, PositionAttention
    from .backbone import ResNet, TimmBackbone
    from .export import OnnxReport, export_onnx, export_program
    from .head import DANetHead, Logits
    from .model import DANet, create_model, list_models, receptive_field
    from .swapping import Pattern, SwapReport, find_attention, register_pattern, swap, unswap

_HOMES = {
    "ChannelAttention": "attention",
    "DANet": "model",
    "DANetHead": "head",
    "Logits": "head",
    "OnnxReport": "export",
    "Pattern": "swapping",
    "PositionAttention": "attention",
    "ResNet": "backbone",
    "SwapReport": "swapping",
    "TimmBackbone": "backbone",
    "create_model": "model",
    "export_onnx": "export",
    "export_program": "export",
    "find_attention": "swapping",
    "list_models": "model",
    "receptive_field": "model",
    "register_pattern": "swapping",
    "swap": "swapping",
    "unswap": "swapping",
}

__all__ = [
    "ChannelAttention",
    "DANet",
    "DANetHead",
    "Logits",
    "OnnxReport",
    "Pattern",
    "PositionAttention",
    "ResNet",
    "SwapReport",
    "TimmBackbone",
    "create_model",
    "export_onnx",
    "export_program",
    "find_attention",
    "list_models",
    "receptive_field",
    "register_pattern",
    "swap",
    "unswap",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'danet' has no attribute {name!r}")
    value = getattr(import_module(f".{_HOMES[name]}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
