"""What the kernels for NVIDIA GPUs have in common, be they Triton's or CUDA C++: numbers for tensor cores, the GPUs."""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

OLDEST_ARCHITECTURE = 80


@cache
def capability(device: torch.device) -> tuple[int, int]:
    """Compute capability of a CUDA device."""
    return torch.cuda.get_device_capability(device)


def too_old(capability: tuple[int, int]) -> list[str]:
    """The reason if no kernel can run on GPUs of this compute capability."""
    major, minor = capability
    if 10 * major + minor < OLDEST_ARCHITECTURE:
        return [f"the kernels need compute capability 8.0 (Ampere) or newer, this GPU has {major}.{minor}"]
    return []


def precisions(dtype: torch.dtype) -> tuple[str, str]:
    """How products of fp32 operands are computed on tensor cores: those that make logits, and all others.

    "tf32x3" adds the two products that tf32 leaves out and is as good as fp32. Where the user allows tf32
    (torch.backends.cuda.matmul.fp32_precision = "tf32"), the logits are still computed so: the exponential would
    magnify their errors. Products of 16-bit operands are exact either way.
    """
    if dtype != torch.float32:
        return "ieee", "ieee"
    allowed = torch.backends.cuda.matmul.fp32_precision == "tf32"
    return "tf32x3", "tf32" if allowed else "tf32x3"


def magnification(dout: Tensor, value: Tensor) -> Tensor | None:
    """For fp16 a power of two [1] that makes use of its range: |dS| <= 2 C max|dout| max|value|, times this <= 32768.

    dS holds probabilities of 1 / N times gradients. Without it such numbers drown where fp16 ends, at 6e-8.
    """
    if value.dtype != torch.float16:
        return None
    largest = [torch.stack(torch.aminmax(tensor)).abs().amax().float() for tensor in (dout, value)]
    bound = 2 * value.shape[1] * largest[0] * largest[1]
    exponent = torch.floor(torch.log2(32768 / bound)).clamp(-40, 40)
    return torch.where(bound.isfinite(), exponent, 0.0).exp2().reshape(1)
