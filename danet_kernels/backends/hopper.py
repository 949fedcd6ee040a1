"""CUDA C++ kernels for Hopper alone (H100, H200), which use its tensor memory accelerator and its warpgroup products.

The forward of position attention and the gradient of value, with up to 64 channels of query and key, and channel
attention, in fp16 and bf16. All else that the contract asks for runs on the kernels of the backend "cuda", which are in
the same library, and so do the small steps between the products of channel attention. Not one of these kernels has run
on a GPU yet: they were compiled, and run on a model of Hopper on the CPU (docs/kernels.md). So "auto" never takes this
backend before a run on hardware is on record, not even after a self-check.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import cuda, native
from ._nvidia import capability
from .cuda import source_hash

__all__ = [
    "channel_attention_backward",
    "channel_attention_forward",
    "position_attention_backward",
    "position_attention_forward",
    "source_hash",
    "why_not",
]

LARGEST_D = 64
DTYPES = (torch.float16, torch.bfloat16)

TENSOR_CORES = True
"""As in cuda.py."""

ONLY_PROVEN = True
"""A self-check does not do for "auto": proven.py says why."""

_HOPPER = (9, 0)
_ARCHITECTURE = "9.0a"

_library = torch.library.Library("danet_kernels", "FRAGMENT")
_library.define(
    "position_attention_forward_hopper(Tensor query, Tensor key, Tensor value, Tensor? residual, Tensor? gamma, "
    "float scale, bool needs_attn) -> (Tensor out, Tensor attn, Tensor lse)"
)
_library.define(
    "position_attention_dvalue_hopper(Tensor dout, Tensor query, Tensor key, Tensor value, Tensor lse, Tensor? gamma, "
    "float scale) -> Tensor"
)
_library.define(
    "channel_attention_forward_hopper(Tensor x, Tensor? gamma, bool official, bool residual) "
    "-> (Tensor out, Tensor row_max, Tensor row_sum)"
)
_library.define(
    "channel_attention_backward_hopper(Tensor dout, Tensor x, Tensor? gamma, Tensor row_max, Tensor row_sum, "
    "bool official, bool residual, bool needs_x, bool needs_gamma) -> (Tensor dx, Tensor dgamma)"
)


def why_not(op: str, *inputs: Tensor) -> list[str]:
    """Reasons why the Hopper kernels cannot run `op` on these inputs."""
    reasons = cuda.why_not(op, *inputs)
    if cuda.is_built() and _ARCHITECTURE not in _architectures():
        reasons.append(f"the CUDA extension is built without code for {_ARCHITECTURE}")
    if not inputs:
        return reasons
    first = inputs[0]
    if first.device.type == "cuda" and capability(first.device) != _HOPPER:
        major, minor = capability(first.device)
        reasons.append(f"the Hopper kernels need compute capability 9.0, this GPU has {major}.{minor}")
    if first.dtype == torch.float32:
        reasons.append("fp32 has no Hopper kernels")
    if op == "position_attention" and len(first.shape) > 1 and LARGEST_D < first.shape[1] <= cuda.LARGEST_D:
        reasons.append(
            f"query and key may have at most {LARGEST_D} channels on the Hopper kernels, got {first.shape[1]}"
        )
    return reasons


def position_attention_forward(
    query: Tensor,  # [B, D, M]
    key: Tensor,  # [B, D, N]
    value: Tensor,  # [B, C, N]
    residual: Tensor | None,  # [B, C, M]
    gamma: Tensor | None,
    scale: float,
    needs_attn: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """out [B, C, M], attn [B, C, M] fp32 or [0], lse [B, M] fp32."""
    return torch.ops.danet_kernels.position_attention_forward_hopper(
        query, key, value, residual, gamma, scale, needs_attn
    )


def position_attention_backward(
    dout: Tensor,  # [B, C, M]
    query: Tensor,  # [B, D, M]
    key: Tensor,  # [B, D, N]
    value: Tensor,  # [B, C, N]
    attn: Tensor,  # [B, C, M]
    lse: Tensor,  # [B, M]
    gamma: Tensor | None,
    scale: float,
    needs: tuple[bool, bool, bool, bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """dquery [B, D, M], dkey [B, D, N], dvalue [B, C, N], dgamma like gamma; [0] for what is not needed."""
    others = (needs[0], needs[1], False, needs[3])
    dquery, dkey, dvalue, dgamma = cuda.position_attention_backward(
        dout, query, key, value, attn, lse, gamma, scale, others
    )
    if needs[2]:
        dvalue = torch.ops.danet_kernels.position_attention_dvalue_hopper(dout, query, key, value, lse, gamma, scale)
    return dquery, dkey, dvalue, dgamma


def channel_attention_forward(
    x: Tensor,  # [B, C, N]
    gamma: Tensor | None,
    variant: str,
    residual: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """out [B, C, N], row_max and row_sum [B, C] fp32."""
    return torch.ops.danet_kernels.channel_attention_forward_hopper(x, gamma, variant == "official", residual)


def channel_attention_backward(
    dout: Tensor,  # [B, C, N]
    x: Tensor,  # [B, C, N]
    gamma: Tensor | None,
    row_max: Tensor,  # [B, C]
    row_sum: Tensor,  # [B, C]
    variant: str,
    residual: bool,
    needs: tuple[bool, bool],
) -> tuple[Tensor, Tensor]:
    """dx [B, C, N], dgamma like gamma; [0] for what is not needed."""
    return torch.ops.danet_kernels.channel_attention_backward_hopper(
        dout, x, gamma, row_max, row_sum, variant == "official", residual, *needs
    )


def _architectures() -> list[str]:
    built = native.build_info().get("cuda_archs")
    return [name.removesuffix("+PTX") for name in built] if isinstance(built, list) else []
