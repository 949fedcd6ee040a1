"""CUDA C++ kernels for NVIDIA GPUs from Ampere on, loaded from the library that a build with nvcc leaves.

As in native.py the schemas are Python's, and the library registers implementations alone (csrc/ops_cuda.cpp). For the
tests there is a library of the same sources compiled for the CPU, see `load_host_library`.
"""

from __future__ import annotations

import os
import re
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from . import native
from ._nvidia import capability, magnification, precisions, too_old

LARGEST_D = 256

TENSOR_CORES = True
"""Operands of matrix products are rounded for the tensor cores; _error_rule.py says what that allows."""

_LIBRARY = Path(__file__).resolve().parent.parent / "_danet_cuda.so"

_library = torch.library.Library("danet_kernels", "FRAGMENT")
_library.define(
    "position_attention_forward_cuda(Tensor query, Tensor key, Tensor value, Tensor? residual, Tensor? gamma, "
    "float scale, bool needs_attn, bool tf32) -> (Tensor out, Tensor attn, Tensor lse)"
)
_library.define(
    "position_attention_backward_cuda(Tensor dout, Tensor query, Tensor key, Tensor value, Tensor attn, Tensor lse, "
    "Tensor? gamma, float scale, bool needs_query, bool needs_key, bool needs_value, bool needs_gamma, "
    "Tensor? magnify, bool deterministic, bool tf32) -> (Tensor dquery, Tensor dkey, Tensor dvalue, Tensor dgamma)"
)
_library.define(
    "channel_attention_forward_cuda(Tensor x, Tensor? gamma, bool official, bool residual, bool tf32) "
    "-> (Tensor out, Tensor row_max, Tensor row_sum)"
)
_library.define(
    "channel_attention_backward_cuda(Tensor dout, Tensor x, Tensor? gamma, Tensor row_max, Tensor row_sum, "
    "bool official, bool residual, bool needs_x, bool needs_gamma, bool tf32) -> (Tensor dx, Tensor dgamma)"
)


def _load() -> list[str]:
    """Load the library where torch has what it needs. Returns the reasons if it cannot be used."""
    reasons = []
    if torch.version.hip is not None:
        reasons.append("this torch is built for ROCm, the CUDA kernels are for NVIDIA GPUs")
    elif torch.version.cuda is None:
        reasons.append("this torch is built without CUDA")
    if not _LIBRARY.exists():
        written = native.build_info().get("reasons")
        built = written.get("cuda") if isinstance(written, dict) else None
        reasons.append(f"the CUDA extension is not built ({built or 'run pip install -e . where there is nvcc'})")
    elif not reasons:
        try:
            torch.ops.load_library(str(_LIBRARY))
        except OSError as error:
            reasons.append(f"the CUDA extension does not load: {error}")
    return reasons


_not_loaded = _load()
_on_host = False


def load_host_library(path: str | os.PathLike[str]) -> None:
    """For tests: take the kernels from a library that runs them on CPU tensors, instead of those for GPUs.

    As with Triton's interpreter they run where they are asked for by name; "auto" takes kernels for GPUs on GPUs only.
    """
    global _not_loaded, _on_host
    torch.ops.load_library(str(path))
    _not_loaded, _on_host = [], True


def why_not(op: str, *inputs: Tensor) -> list[str]:
    """Reasons why the CUDA C++ kernels cannot run `op` on these inputs."""
    reasons = list(_not_loaded)
    if not inputs:
        if not torch.cuda.is_available() and not _on_host:
            reasons.append("there is no CUDA device")
        return reasons
    first = inputs[0]
    if first.device.type == "cuda":
        reasons += too_old(capability(first.device)) or _no_code(capability(first.device))
    elif first.device.type != "cpu" or not _on_host:
        reasons.append(f"CUDA kernels run on CUDA devices, not on {first.device.type}")
    if first.dtype == torch.float64:
        reasons.append("fp64 has no CUDA kernels")
    if op == "position_attention" and len(first.shape) > 1 and first.shape[1] > LARGEST_D:
        reasons.append(f"query and key may have at most {LARGEST_D} channels, got {first.shape[1]}")
    return reasons


def is_built() -> bool:
    """Whether the library for GPUs is there and loaded."""
    return not _not_loaded and not _on_host


@cache
def source_hash(op: str) -> str:
    """Hash of the sources that the library was built from, the same for both operators; "" where there is none.

    The build writes it down: sources that lie around may be newer than the library, and a wheel brings none.
    """
    return str(native.build_info().get("cuda_source_hash") or "")


@cache
def _no_code(capability: tuple[int, int]) -> list[str]:
    """The reason if the library was built for other GPUs than those of this compute capability.

    Code for 8.0 runs on 8.x, code for 9.0a on 9.0 alone, and the driver compiles PTX for all that is newer.
    """
    built = native.build_info().get("cuda_archs")
    if not isinstance(built, list):
        return []
    for name in built:
        major, minor = map(int, re.findall(r"\d+", name))
        if name.endswith("a"):
            runs = (major, minor) == capability
        else:
            runs = (major, minor) <= capability and (major == capability[0] or name.endswith("+PTX"))
        if runs:
            return []
    return [f"the library is built for {', '.join(built)}, this GPU has {'.'.join(map(str, capability))}"]


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
    return torch.ops.danet_kernels.position_attention_forward_cuda(
        query, key, value, residual, gamma, scale, needs_attn, _tf32(value)
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
    magnify = magnification(dout, value) if needs[0] or needs[1] else None
    deterministic = torch.are_deterministic_algorithms_enabled()
    return torch.ops.danet_kernels.position_attention_backward_cuda(
        dout, query, key, value, attn, lse, gamma, scale, *needs, magnify, deterministic, _tf32(value)
    )


def channel_attention_forward(
    x: Tensor,  # [B, C, N]
    gamma: Tensor | None,
    variant: str,
    residual: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """out [B, C, N], row_max and row_sum [B, C] fp32."""
    return torch.ops.danet_kernels.channel_attention_forward_cuda(x, gamma, variant == "official", residual, _tf32(x))


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
    return torch.ops.danet_kernels.channel_attention_backward_cuda(
        dout, x, gamma, row_max, row_sum, variant == "official", residual, *needs, _tf32(x)
    )


def _tf32(tensor: Tensor) -> bool:
    """Whether products of fp32 that make no logits may be rounded to tf32."""
    return precisions(tensor.dtype)[1] == "tf32"
