"""Small inputs for the tests of modes and transforms, where the numbers are not the point."""

import torch
from on_backend import GPU_BACKENDS, device_of
from torch import Tensor

from danet_kernels import channel_attention, position_attention


def dtype_of(backend: str) -> torch.dtype:
    """The widest that the backend has: fp64, but for those for GPUs."""
    return torch.float32 if backend in GPU_BACKENDS else torch.float64


def randn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def randn_for(backend: str, *shape: int, seed: int = 0) -> Tensor:
    """Normal numbers in the dtype and on the device that the tests use for the backend."""
    return randn(*shape, seed=seed, dtype=dtype_of(backend)).to(device_of(backend))


def randn_like(model: Tensor, seed: int = 0) -> Tensor:
    return randn(*model.shape, seed=seed, dtype=model.dtype).to(model.device)


def inputs(
    backend: str, gradients: str = "qkvrg", dtype: torch.dtype | None = None, size: tuple[int, int] = (3, 4)
) -> list[Tensor]:
    """query, key [2, 3, *size], value, residual [2, 5, *size], gamma [1]; `gradients`: which of them require one."""
    shapes = [(2, channels, *size) for channels in (3, 3, 5, 5)] + [(1,)]
    tensors = [randn(*shape, seed=seed, dtype=dtype or dtype_of(backend)) for seed, shape in enumerate(shapes)]
    return [
        tensor.to(device_of(backend)).requires_grad_(name in gradients)
        for tensor, name in zip(tensors, "qkvrg", strict=True)
    ]


def both(backend: str):
    """Functions of the five inputs, one per operator, and of which inputs."""
    return (
        (lambda *given: position_attention(*given, scale=0.7, backend=backend), range(5)),
        (lambda *given: channel_attention(given[3], given[4], backend=backend), (3, 4)),
    )


def close(got: Tensor, expected: Tensor) -> None:
    rtol, atol = (1e-9, 1e-11) if got.dtype == torch.float64 else (1e-4, 1e-4)
    torch.testing.assert_close(got, expected, rtol=rtol, atol=atol)
