"""The record of a run: the machine, the versions, the options and every figure, as JSON (results/README.md)."""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

import danet_kernels

SCHEMA = 1


def environment(device: str) -> dict[str, Any]:
    """What a reader needs to judge or repeat the figures."""
    root = Path(__file__).resolve().parent.parent
    found: dict[str, Any] = {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "commit": _git(root, "rev-parse", "HEAD"),
        "modified": bool(_git(root, "status", "--porcelain")),
        "danet_kernels": danet_kernels.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "system": platform.platform(),
        "device": device,
        "cpu": _cpu_model(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "load_average": os.getloadavg()[0],
    }
    if torch.device(device).type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        found |= {
            "gpu": properties.name,
            "gpu_memory": properties.total_memory,
            "capability": f"{properties.major}.{properties.minor}",
            "cuda": torch.version.cuda,
        }
    return found


def machine(environment: dict[str, Any]) -> str:
    """The environment in half a line."""
    device = environment.get("gpu") or f"{environment['cpu']}, {environment['threads']} threads"
    return f"{device}, torch {environment['torch']}"


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def _git(root: Path, *arguments: str) -> str | None:
    """The output of a git command, None outside a checkout or without git."""
    try:
        run = subprocess.run(["git", "-C", root, *arguments], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return run.stdout.strip()


def check_writable(path: str | None) -> None:
    """OSError in one sentence if `path` cannot be written; before the run, not after it."""
    if path is None:
        return
    folder = Path(path).resolve().parent
    if Path(path).is_dir():
        raise OSError(f"cannot write {path}: it is a folder")
    if not folder.is_dir():
        raise OSError(f"cannot write {path}: there is no folder {folder}")
    if not os.access(path if Path(path).exists() else folder, os.W_OK):
        raise OSError(f"cannot write {path}: no permission")


def write_json(
    path: str,
    benchmark: str,
    found: dict[str, Any],
    options: argparse.Namespace,
    cells: list[dict[str, Any]],
    seconds: float,
) -> None:
    content = {
        "schema": SCHEMA,
        "benchmark": benchmark,
        "environment": found,
        "options": {name: _plain(value) for name, value in vars(options).items() if name not in ("json", "plot")},
        "cells": cells,
        "total_seconds": round(seconds, 1),
    }
    Path(path).write_text(json.dumps(content, indent=1, allow_nan=False) + "\n")


def _plain(value: Any) -> Any:
    if isinstance(value, list):
        return [_plain(item) for item in value]
    return value if isinstance(value, (str, int, float, bool, type(None))) else str(value)
