"""Exact, fused position and channel attention of DANet (Fu et al., CVPR 2019) that never write the N x N map."""

from . import _vmap as _vmap
from ._version import __version__
from .backends import available_backends, use_backend
from .export import decompositions
from .functional import channel_attention, channel_attention_map, position_attention, position_attention_map
from .memory import MemoryEstimate, memory_estimate

__all__ = [
    "MemoryEstimate",
    "__version__",
    "available_backends",
    "channel_attention",
    "channel_attention_map",
    "decompositions",
    "memory_estimate",
    "position_attention",
    "position_attention_map",
    "use_backend",
]
