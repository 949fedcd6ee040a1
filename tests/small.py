"""Small fp64 inputs for the tests of modes and transforms, where the numbers are not the point."""

import pytest
import torch
from torch import Tensor

from danet_kernels import available_backends, channel_attention, position_attention

BACKENDS = [
    pytest.param(name, marks=pytest.mark.skipif(bool(reasons), reason="; ".join(reasons)))
    for name, reasons in available_backends("position_attention", torch.empty(1)).items()
]


def randn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def inputs(
    gradients: str = "qkvrg", dtype: torch.dtype = torch.float64, size: tuple[int, int] = (3, 4)
) -> list[Tensor]:
    """query, key [2, 3, *size], value, residual [2, 5, *size], gamma [1]; `gradients`: which of them require one."""
    tensors = [randn(2, channels, *size, seed=seed, dtype=dtype) for seed, channels in enumerate((3, 3, 5, 5))]
    tensors.append(randn(1, seed=4, dtype=dtype))
    return [tensor.requires_grad_(name in gradients) for tensor, name in zip(tensors, "qkvrg", strict=True)]


def both(backend: str):
    """Functions of the five inputs, one per operator, and of which inputs."""
    return (
        (lambda *given: position_attention(*given, scale=0.7, backend=backend), range(5)),
        (lambda *given: channel_attention(given[3], given[4], backend=backend), (3, 4)),
    )


def close(got: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-11)
