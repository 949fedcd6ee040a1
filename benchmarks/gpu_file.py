"""The file of a GPU record: complete JSON at any moment, so that a run that is cut off loses nothing."""

from __future__ import annotations

import json
import os
import re
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from benchmarks.gpu_report import Figures
from benchmarks.record import SCHEMA


class RecordFile:
    """`content`, the cells in `figures`, and their place on disk."""

    def __init__(self, path: Path, content: dict[str, Any]) -> None:
        self.path, self.content = path, content
        self.figures = Figures(content.pop("cells"), content.pop("ceilings"))

    def save(self) -> None:
        """Readers find the old file or the new one, never half of one."""
        content = self.content | {"ceilings": self.figures.ceilings, "cells": self.figures.cells()}
        unfinished = self.path.with_suffix(".new")
        unfinished.write_text(json.dumps(content, indent=1, allow_nan=False) + "\n")
        os.replace(unfinished, self.path)


def open_record(folder: Path, mode: str, environment: dict[str, Any], plan: list[str]) -> RecordFile:
    """The unfinished record in `folder` of this mode, on this device, of these sources; else a new one."""
    identity = {
        "mode": mode,
        **{name: environment[name] for name in ("backend", "gpu", "torch", "triton", "source_hash")},
    }
    for path in sorted(folder.glob("*-gpu*.json")):
        content = json.loads(path.read_text())
        if content.get("identity") == identity and content["plan"] == plan and not content["complete"]:
            return RecordFile(path, content)
    return RecordFile(
        _new_path(folder, mode, environment["gpu"]),
        {
            "schema": SCHEMA,
            "benchmark": "gpu_record",
            "identity": identity,
            "complete": False,
            "environment": environment,
            "plan": plan,  # names of the steps
            "steps": {},  # what each of them said
            "errors": [],
            "seconds": [],  # of each call
            "ceilings": {},
            "cells": [],
        },
    )


def _new_path(folder: Path, mode: str, gpu: str) -> Path:
    """`2026-03-01-h200-gpu.json`, with a number where that exists: a record is never written over."""
    device = re.sub(r"[^a-z0-9]+", "-", gpu.lower().removeprefix("nvidia ")).strip("-")
    stem = f"{datetime.now(timezone.utc):%Y-%m-%d}-{device}-gpu"
    number = 1
    while (path := folder / (f"{stem}.json" if number == 1 else f"{stem}-{number}.json")).exists():
        number += 1
    return path
