"""Which GPU kernels are known to be right, and what "auto" does about those that are not.

A compiler can be right for one GPU and wrong for the next, so kernels that are compiled for the user's GPU have to be
proven on such a GPU. A backend with such kernels offers `source_hash(op)`, a hash of all that decides what is launched,
and "auto" takes it only if

- a run on a GPU of the same family has proven these very sources: an entry in proven.json; or
- a self-check on the user's GPU passes (_self_check.py). It runs at the first call in a dtype; its verdict is kept for
  the process, and on disk for the next ones. It does not do for a backend with ONLY_PROVEN: where blocks wait for each
  other and copies run beside them, a small check cannot tell how kernels fare that never ran, and one that hangs takes
  the process with it.

A backend that is asked for by name is not checked. The kernels for the CPU are proven by the tests of this project.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
import threading
import warnings
from datetime import date
from functools import lru_cache
from importlib import metadata
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

TABLE = Path(__file__).with_name("proven.json")

CACHE_VARIABLE = "DANET_KERNELS_CACHE"

DTYPES = (torch.float32, torch.bfloat16, torch.float16)

_lock = threading.Lock()
_verdicts: dict[tuple[Any, ...], list[str]] = {}  # reasons, by all that `why_not` distinguishes
_announced = False  # whether the user knows that a self-check has passed


def is_subject_to_proof(backend: ModuleType) -> bool:
    """Whether the backend has kernels that are compiled for the user's GPU."""
    return "source_hash" in vars(backend)  # hasattr takes ten times as long where there is none


def is_proven(backend: ModuleType, op: str, device: torch.device | str) -> bool:
    """Whether a recorded run has proven the kernels of `op`, as they are now, on GPUs such as `device`."""
    return not is_subject_to_proof(backend) or _entry(backend, op, torch.device(device)) is not None


def why_not(backend: ModuleType, op: str, tensor: Tensor) -> list[str]:
    """Reasons why "auto" must not run the kernels of `backend` on inputs like `tensor`. May run the self-check.

    Only for a backend that is subject to proof.
    """
    key = (backend, op, tensor.device, tensor.dtype, _precision(tensor.dtype))
    reasons = _verdicts.get(key)
    return _settle(key, backend, op, tensor.device, tensor.dtype) if reasons is None else reasons


def record(
    backend: str, op: str, family: str, source_hash: str, evidence: str, path: str | os.PathLike[str] | None = None
) -> None:
    """Enter a run that has proven the kernels of `op` on a family of GPUs into proven.json, or the table at `path`.

    evidence: name of the file in benchmarks/results/ that tells about the run. The new entry takes the place of one for
    other sources of the same kernels, which are no more.
    """
    table = TABLE if path is None else Path(path)
    entry = {"backend": backend, "op": op, "family": family, "source_hash": source_hash, "evidence": evidence}
    entries = json.loads(table.read_text(encoding="utf-8")) if table.exists() else []
    if any(entry.items() <= known.items() for known in entries):
        return
    what = ("backend", "op", "family")
    entries = [known for known in entries if any(known[key] != entry[key] for key in what)]
    entries.append(entry | {"date": date.today().isoformat()})
    entries.sort(key=lambda known: [known[key] for key in what])
    _write(table, entries)
    _table.cache_clear()


def family(device: torch.device | str) -> str | None:
    """The architecture of a GPU, as "sm_90"; None for other devices."""
    if torch.device(device).type != "cuda":
        return None
    major, minor = torch.cuda.get_device_capability(device)
    return f"sm_{major}{minor}"


def status(backend: ModuleType, op: str, device: torch.device | str) -> str:
    """In words, what is known about the kernels of `op` on this device. Checks nothing."""
    if not is_subject_to_proof(backend):
        return "proven by the tests of this project"
    device = torch.device(device)
    if family(device) is None:
        return 'for GPUs: never taken by "auto" here'
    entry = _entry(backend, op, device)
    if entry is not None:
        return f"proven on {family(device)}: {entry['evidence']}, {entry['date']}"
    if _needs_record(backend):
        return f'unproven on {family(device)}: "auto" never takes it before a run is on record'
    faults = {_name(dtype): _recall(_conditions(backend, op, device, dtype)) for dtype in DTYPES}
    passed = [name for name, fault in faults.items() if fault == ""]
    words = [f"self-check passed in {', '.join(passed)}"] if passed else []
    words += [f"self-check failed in {name}: {fault}" for name, fault in faults.items() if fault]
    return "; ".join(words) or f'unproven on {family(device)}: "auto" checks it at the first call'


# ---- finding out


def _settle(key: tuple[Any, ...], backend: ModuleType, op: str, device: torch.device, dtype: torch.dtype) -> list[str]:
    if family(device) is None:
        return [f'interpreted on {device.type}: "auto" takes it on GPUs only']
    with _lock:
        if key in _verdicts:  # another thread was first
            return _verdicts[key]
        if is_proven(backend, op, device):
            return _verdicts.setdefault(key, [])
        if _needs_record(backend):
            return _verdicts.setdefault(key, [f"unproven on {family(device)}: no run on such a GPU is on record"])
        conditions = _conditions(backend, op, device, dtype)
        fault, is_new = _recall(conditions), False
        if fault is None:
            busy = _busy(device)
            if busy is not None:
                once = f"call {op} once in {_name(dtype)} before, or ask for the backend by name"
                return [f"unproven on {family(device)}, and its self-check cannot run while {busy}: {once}"]
            (fault, measured), is_new = _checker().self_check(backend, op, dtype, device), True
            if measured:
                _remember(conditions, fault)
        reasons = _verdicts[key] = [f"its self-check failed: {fault}"] if fault else []
    _tell(f"for {op} in {_name(dtype)} on {_device_name(device)}", _short(backend), fault, is_new)
    return reasons


def _tell(where: str, backend: str, fault: str, is_new: bool) -> None:
    """Warn of every failure, and of the first success."""
    global _announced
    if fault:
        warnings.warn(
            f'danet_kernels: "auto" does not use backend {backend!r} {where}, as its self-check failed: {fault}',
            stacklevel=2,
        )
    elif is_new and not _announced:
        _announced = True
        warnings.warn(
            f'danet_kernels: "auto" uses backend {backend!r} {where}: no run on such a GPU is on record, '
            "but a self-check has just passed",
            stacklevel=2,
        )


def _busy(device: torch.device) -> str | None:
    """What is going on that launches and allocations of our own would spoil."""
    if torch.compiler.is_compiling():
        return "torch.compile traces"
    return "a CUDA graph is captured" if _capturing(device) else None


def _capturing(device: torch.device) -> bool:
    if device.type != "cuda":
        return False
    with torch.cuda.device(device):
        return torch.cuda.is_current_stream_capturing()


def _needs_record(backend: ModuleType) -> bool:
    """Whether no self-check takes the place of a run on record."""
    return bool(vars(backend).get("ONLY_PROVEN"))


def _checker() -> ModuleType:
    """Imported when it is needed, for it would take a quarter of the time to import the package."""
    from . import _self_check

    return _self_check


# ---- what is known: the table in the package, verdicts on disk


@lru_cache(maxsize=1)
def _table() -> list[dict[str, str]]:
    return json.loads(TABLE.read_text(encoding="utf-8"))


def _entry(backend: ModuleType, op: str, device: torch.device) -> dict[str, str] | None:
    kernels = {"backend": _short(backend), "op": op, "family": family(device), "source_hash": backend.source_hash(op)}
    return next((entry for entry in _table() if kernels.items() <= entry.items()), None)


def _conditions(backend: ModuleType, op: str, device: torch.device, dtype: torch.dtype) -> dict[str, str]:
    """All that a verdict depends on."""
    return {
        "backend": _short(backend),
        "op": op,
        "dtype": _name(dtype),
        "precision": _precision(dtype),
        "device": _device_name(device),
        "source_hash": backend.source_hash(op),
        "torch": str(torch.__version__),
        "triton": _triton_version(),
        "cases": repr(_checker().CASES[op]),
    }


def _recall(conditions: dict[str, str]) -> str | None:
    """The fault that an earlier self-check found, "" for none; None if there was no such check."""
    try:
        kept = json.loads(_file(conditions).read_text(encoding="utf-8"))
        return str(kept["fault"]) if kept["conditions"] == conditions else None
    except (OSError, RuntimeError, ValueError, KeyError, TypeError):  # no file, no home, or not ours
        return None


def _remember(conditions: dict[str, str], fault: str) -> None:
    try:
        _file(conditions).parent.mkdir(parents=True, exist_ok=True)
        _write(_file(conditions), {"conditions": conditions, "fault": fault})
    except (OSError, RuntimeError):
        pass  # the next process checks again


def _file(conditions: dict[str, str]) -> Path:
    """Raises RuntimeError if the user has no home."""
    digest = hashlib.sha256(json.dumps(conditions).encode()).hexdigest()[:16]
    own, everyones = os.environ.get(CACHE_VARIABLE), os.environ.get("XDG_CACHE_HOME")
    directory = Path(own) if own else (Path(everyones) if everyones else Path.home() / ".cache") / "danet_kernels"
    return directory / f"{conditions['backend']}-{conditions['op']}-{conditions['dtype']}-{digest}.json"


def _write(path: Path, content: object) -> None:
    """As JSON, so that whoever reads at the same time finds the old file or the new one, whole."""
    descriptor, temporary = tempfile.mkstemp(dir=path.parent)
    try:
        with open(descriptor, "w", encoding="utf-8") as file:
            file.write(json.dumps(content, indent=2) + "\n")
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise


def _short(backend: ModuleType) -> str:
    return backend.__name__.rpartition(".")[2]


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _precision(dtype: torch.dtype) -> str:
    """The setting that kernels on this dtype obey."""
    return torch.backends.cuda.matmul.fp32_precision if dtype == torch.float32 else ""


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device)


def _triton_version() -> str:
    try:
        return metadata.version("triton")
    except metadata.PackageNotFoundError:
        return ""
