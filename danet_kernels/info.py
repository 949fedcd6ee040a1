"""What is installed and what it can do here: `python -m danet_kernels.info [--json]`.

For whoever wonders why a backend does not run, and for reports of errors. A fact that cannot be found out does not end
the program: what went wrong stands in its place, and the exit status is 0.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
from collections.abc import Callable, Iterator
from functools import partial
from importlib import import_module, metadata
from pathlib import Path
from typing import Any

import torch

import danet_kernels

from .backends import BACKENDS, OPS, cuda, native, requested
from .proven import status

_PACKAGE = Path(__file__).resolve().parent

ENVIRONMENT = (
    "DANET_KERNELS_BACKEND",
    "DANET_KERNELS_BF16_KERNEL",
    "DANET_KERNELS_CACHE",
    "XDG_CACHE_HOME",
    "DANET_BUILD",
    "DANET_BUILD_TORCH",
    "DANET_TORCH_SITE",
    "DANET_DEBUG",
    "DANET_DEBUG_POISON",
    "DANET_SANITIZE",
    "MAX_JOBS",
    "CXX",
    "CUDA_HOME",
    "CUDA_PATH",
    "NVCC_CCBIN",
    "CUDA_VISIBLE_DEVICES",
    "TORCH_CUDA_ARCH_LIST",
    "TRITON_INTERPRET",
    "OMP_NUM_THREADS",
    "OMP_WAIT_POLICY",
    "MKL_NUM_THREADS",
    "LD_LIBRARY_PATH",
    "LD_PRELOAD",
)
"""The variables that change how this package is built or runs."""

_BUILD_KEYS = (
    "version",
    "commit",
    "date",
    "danet_build",
    "cpu_library",
    "cuda_library",
    "torch_headers",
    "target_abi",
    "compiler",
    "flags",
    "nvcc",
    "cuda_archs",
    "cuda_source_hash",
    "sanitize",
    "reasons",
)


def collect() -> dict[str, Any]:
    """All facts, ready for JSON, under keys that are always the same. None: there is no such thing here.

    A fact that could not be found out is {"error": what went wrong}.
    """
    sections: dict[str, Callable[[], Any]] = {
        "versions": _versions,
        "backends": _backends,
        "proven": _proven,
        "libraries": _libraries,
        "build": lambda: dict.fromkeys(_BUILD_KEYS) | native.build_info(),
        "cpu": _cpu,
        "gpus": _gpus,
        "threads": lambda: {"torch": torch.get_num_threads(), "interop": torch.get_num_interop_threads()},
        "environment": lambda: {name: os.environ.get(name) for name in ENVIRONMENT},
    }
    return {name: _attempt(section) for name, section in sections.items()}


def main(arguments: list[str] | None = None) -> int:
    """The command line; returns the exit status, which is 0."""
    parser = argparse.ArgumentParser(
        "python -m danet_kernels.info", description="What is installed, what can run, why not."
    )
    parser.add_argument("--json", action="store_true", help="print JSON")
    as_json = parser.parse_args(arguments).json
    facts = collect()
    print(json.dumps(facts, indent=2) if as_json else as_text(facts))
    return 0


def as_text(facts: dict[str, Any]) -> str:
    """The facts as aligned lines. Environment variables that are not set are left out."""
    environment = {name: value for name, value in facts["environment"].items() if value is not None}
    facts = facts | {"backends": _with_verdicts(facts["backends"]), "environment": environment}
    rows = {section: list(_rows(content)) or [("none", "")] for section, content in facts.items()}
    width = max(len(name) for lines in rows.values() for name, _ in lines)
    blocks = []
    for section, lines in rows.items():
        blocks.append("\n".join([section, *(f"  {name:<{width}}  {value}".rstrip() for name, value in lines)]))
    return "\n\n".join(blocks)


def _with_verdicts(backends: dict[str, Any]) -> dict[str, Any]:
    """Lists of reasons turned into words: an empty one means that the backend runs."""
    if "error" in backends:
        return backends
    verdicts = {
        op: {
            device: {name: "; ".join(reasons) or "runs" for name, reasons in by_name.items()}
            for device, by_name in backends[op].items()
        }
        for op in OPS
    }
    return backends | verdicts


def _versions() -> dict[str, Any]:
    libc, libc_version = platform.libc_ver()
    return {
        "danet_kernels": danet_kernels.__version__,
        "torch": str(torch.__version__),
        "cuda": torch.version.cuda,
        "triton": _installed("triton"),
        "numpy": _installed("numpy"),
        "python": platform.python_version(),
        "libc": f"{libc} {libc_version}".strip() or None,
        "platform": platform.platform(),
    }


def _backends() -> dict[str, Any]:
    """What may run, on empty hands: for a call of your own ask `available_backends` with its tensors."""
    facts: dict[str, Any] = {"order": list(BACKENDS), "requested": _attempt(lambda: requested("auto"))}
    for op in OPS:
        for device in _devices():
            tensors = [torch.empty(1, 8, 1, device=device)] * 3
            reasons = danet_kernels.available_backends(op, *tensors)
            facts.setdefault(op, {})[device] = reasons
    return facts


def _proven() -> dict[str, Any]:
    """Whether "auto" may take the kernels of a backend where they can run."""
    return {
        op: {
            device: {name: _attempt(partial(status, backend, op, device)) for name, backend in BACKENDS.items()}
            for device in _devices()
        }
        for op in OPS
    }


def _devices() -> tuple[str, ...]:
    return ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",)


def _libraries() -> dict[str, Any]:
    module = _attempt(lambda: import_module("danet_kernels._C").__file__)
    failed = isinstance(module, dict)
    return {
        "package": str(_PACKAGE),
        "cpu": _library("_danet_cpu.so", native.why_not(OPS[0])),
        "cuda": _library("_danet_cuda.so", cuda.why_not(OPS[0])),
        "_C": {
            "path": None if failed else module,
            "loaded": not failed,
            "reason": module["error"] if failed else None,
        },
    }


def _library(name: str, reasons: list[str]) -> dict[str, Any]:
    """`reasons`: why the kernels in it do not run."""
    path = _PACKAGE / name
    return {
        "path": str(path) if path.exists() else None,
        "loaded": str(path) in torch.ops.loaded_libraries,
        "reason": "; ".join(reasons) or None,
    }


def _cpu() -> dict[str, Any]:
    return {
        "model": _attempt(_cpu_model),
        "machine": platform.machine(),
        "cores": os.cpu_count(),
        "usable_cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else None,
        "torch_capability": torch.backends.cpu.get_cpu_capability(),
        "features": _attempt(lambda: import_module("danet_kernels._C").cpu_features()),
    }


def _cpu_model() -> str | None:
    for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return None


def _gpus() -> dict[str, Any]:
    driver = Path("/proc/driver/nvidia/version")
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    devices = [torch.cuda.get_device_properties(index) for index in range(count)]
    return {
        "driver": driver.read_text(encoding="utf-8").splitlines()[0] if driver.exists() else None,
        "devices": [
            {
                "name": device.name,
                "capability": f"{device.major}.{device.minor}",
                "family": f"sm_{device.major}{device.minor}",
                "memory": device.total_memory,
            }
            for device in devices
        ],
    }


def _installed(distribution: str) -> str | None:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def _attempt(find_out: Callable[[], Any]) -> Any:
    try:
        return find_out()
    except Exception as error:
        return {"error": f"{type(error).__name__}: {error}"}


def _rows(content: Any, name: str = "") -> Iterator[tuple[str, str]]:
    """(name, value) of every fact inside `content`; the keys on the way to it make the name."""
    if isinstance(content, dict):
        for key, value in content.items():
            yield from _rows(value, f"{name} {key}".strip())
    elif isinstance(content, list) and content and isinstance(content[0], dict):
        for index, value in enumerate(content):
            yield from _rows(value, f"{name} {index}")
    else:
        yield name, _in_words(content)


def _in_words(value: Any) -> str:
    if isinstance(value, list):
        return ", ".join(value) or "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    return "-" if value is None else str(value)


if __name__ == "__main__":
    sys.exit(main())
