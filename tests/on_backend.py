"""The backends as parameters of the tests, and the device that each of them runs on."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import cuda_host_build
import pytest
import torch
from torch import Tensor
from torch._subclasses import FakeTensor

import danet_kernels
from danet_kernels import backends

CPU_BACKENDS = ("eager", "native")
GPU_BACKENDS = ("triton", "cuda")
BACKENDS = (*CPU_BACKENDS, *GPU_BACKENDS)

INTERPRETED = not torch.cuda.is_available()
"""Whether the kernels for GPUs run on the CPU, some 10^4 times slower: Triton's in its interpreter (conftest.py), those
of CUDA C++ compiled by g++ (below)."""


_missing = cuda_host_build.missing() if INTERPRETED else None
_not_compiled = [f"they are not compiled for the CPU either: {_missing}"] if _missing else []
if INTERPRETED and not _missing:
    backends.cuda.load_host_library(cuda_host_build.library())  # compiled once for all sessions


def device_of(backend: str) -> str:
    """Where the tests run a backend."""
    return "cuda" if backend in (*GPU_BACKENDS, "hopper") and not INTERPRETED else "cpu"


def is_slow(backend: str) -> bool:
    """Whether its kernels are for GPUs, and here is none."""
    return backend in GPU_BACKENDS and INTERPRETED


def on_tensor_cores(backend: str) -> bool:
    """Whether it rounds the operands of its products; _error_rule.py says what that allows."""
    return getattr(backends.BACKENDS[backend], "TENSOR_CORES", False)


def backend_params(*names: str) -> list[Any]:
    """Parameters for pytest: the backends by name, skipped with its reasons where one cannot run."""
    params = []
    for name in names:
        reasons = danet_kernels.available_backends("position_attention")[name]
        reasons += _not_compiled * (name == "cuda")
        skip = [pytest.mark.skip(reason=f"backend {name}: {'; '.join(reasons)}")] if reasons else []
        params.append(pytest.param(name, marks=skip))
    return params


for_each_backend = pytest.mark.parametrize("backend", backend_params(*BACKENDS))
for_each_cpu_backend = pytest.mark.parametrize("backend", backend_params(*CPU_BACKENDS))
for_each_quick_backend = pytest.mark.parametrize("backend", backend_params(*CPU_BACKENDS if INTERPRETED else BACKENDS))
"""For large sizes: without the kernels for GPUs where there is none."""


def for_each_case(cases: Sequence[Any], gpu_cases: Sequence[Any], name: str = "case") -> pytest.MarkDecorator:
    """Parameters `name` and "backend": every case on the CPU backends, and those given for the kernels for GPUs.

    The backends take turns on a case, so that what is computed for it once can be kept.
    """
    params = []
    for case in dict.fromkeys((*cases, *gpu_cases)):
        names = [*CPU_BACKENDS] * (case in cases) + [*GPU_BACKENDS] * (case in gpu_cases)
        for param in backend_params(*names):
            params.append(pytest.param(case, *param.values, marks=param.marks, id=f"{case}-{param.values[0]}"))
    return pytest.mark.parametrize((name, "backend"), params)


def has_kernels(parameters: Mapping[str, Any]) -> bool:
    """Whether there is something to test: the kernels for GPUs have no fp64, which test_triton.py and test_cuda.py see
    them refuse."""
    given = [parameters.get(name) for name in ("dtype", "case", "kind")]
    names = [str(getattr(value, "dtype", value)) for value in given]
    return parameters.get("backend") not in GPU_BACKENDS or not any(
        re.match(r"fp64|torch\.float64", name) for name in names
    )


def moved(tensor: Tensor, device: str) -> Tensor:
    """`tensor` on a device, with the strides and the offset that it has, and all that lies around it in memory."""
    if tensor.device.type == device or isinstance(tensor, FakeTensor):
        return tensor
    whole = torch.empty(0, dtype=torch.uint8, device=tensor.device).set_(tensor.untyped_storage()).to(device)
    empty = torch.empty(0, dtype=tensor.dtype, device=device)
    return empty.set_(whole.untyped_storage(), tensor.storage_offset(), tensor.shape, tensor.stride())


def call(function: Callable[..., Tensor], *arguments: Any, backend: str, **options: Any) -> Tensor:
    """function(*arguments, backend=backend, **options) on the device of the backend; the result on the CPU."""
    device = device_of(backend)
    arguments = tuple(moved(a, device) if isinstance(a, Tensor) else a for a in arguments)
    options = {name: moved(a, device) if isinstance(a, Tensor) else a for name, a in options.items()}
    return function(*arguments, backend=backend, **options).cpu()
