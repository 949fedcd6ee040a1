"""The backends as parameters of the tests, and the device that each of them runs on."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses import FakeTensor

import danet_kernels
from danet_kernels import backends

BACKENDS = ("eager", "native", "triton")
CPU_BACKENDS = ("eager", "native")

INTERPRETED = not torch.cuda.is_available()
"""Whether the Triton kernels are interpreted (conftest.py), some 10^4 times slower than a GPU runs them."""


def device_of(backend: str) -> str:
    """Where the tests run a backend."""
    return "cuda" if backend == "triton" and not INTERPRETED else "cpu"


def on_tensor_cores(backend: str) -> bool:
    """Whether it rounds the operands of its products; _error_rule.py says what that allows."""
    return getattr(backends.BACKENDS[backend], "TENSOR_CORES", False)


def backend_params(*names: str) -> list[Any]:
    """Parameters for pytest: the backends by name, skipped with its reasons where one cannot run."""
    params = []
    for name in names:
        reasons = danet_kernels.available_backends("position_attention")[name]
        skip = [pytest.mark.skip(reason=f"backend {name}: {'; '.join(reasons)}")] if reasons else []
        params.append(pytest.param(name, marks=skip))
    return params


for_each_backend = pytest.mark.parametrize("backend", backend_params(*BACKENDS))
for_each_cpu_backend = pytest.mark.parametrize("backend", backend_params(*CPU_BACKENDS))
for_each_quick_backend = pytest.mark.parametrize("backend", backend_params(*CPU_BACKENDS if INTERPRETED else BACKENDS))
"""For large sizes: without the Triton kernels where they would be interpreted."""


def for_each_case(cases: Sequence[Any], triton_cases: Sequence[Any], name: str = "case") -> pytest.MarkDecorator:
    """Parameters `name` and "backend": every case on the CPU backends, and those given for the Triton kernels.

    The backends take turns on a case, so that what is computed for it once can be kept.
    """
    params = []
    for case in dict.fromkeys((*cases, *triton_cases)):
        names = [*CPU_BACKENDS] * (case in cases) + ["triton"] * (case in triton_cases)
        for param in backend_params(*names):
            params.append(pytest.param(case, *param.values, marks=param.marks, id=f"{case}-{param.values[0]}"))
    return pytest.mark.parametrize((name, "backend"), params)


def has_kernels(parameters: Mapping[str, Any]) -> bool:
    """Whether there is something to test: the Triton kernels have no fp64 (test_triton.py sees that they refuse it)."""
    given = [parameters.get(name) for name in ("dtype", "case", "kind")]
    names = [str(getattr(value, "dtype", value)) for value in given]
    return parameters.get("backend") != "triton" or not any(re.match(r"fp64|torch\.float64", name) for name in names)


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
