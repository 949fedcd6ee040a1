"""Compiles the CUDA C++ kernels for the CPU, against the headers of tests/cuda_host, which run them as CUDA would.

Objects are kept below build/cuda_host under a hash of all that goes into them, so only what changed is compiled.
"""

from __future__ import annotations

import functools
import hashlib
import os
import shutil
import subprocess
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import torch

ROOT = Path(__file__).resolve().parent.parent
SHIM = ROOT / "tests" / "cuda_host"
CACHE = ROOT / "build" / "cuda_host"
FLAGS = ("-std=c++20", "-g", "-fPIC", "-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas")
TORCH = Path(torch.__file__).resolve().parent
LAUNCHERS = (
    "cuda/position_attention.cu",
    "cuda/channel_attention.cu",
    "cuda/sm90/position_attention.cu",
    "cuda/sm90/channel_attention.cu",
    "cuda/plan.cpp",
    "cuda/channel_plan.cpp",
)
MACHINE = ("machine.cpp", "hopper.cpp")
THREAD_SANITIZER = "-fsanitize=thread"


class Patch(NamedTuple):
    """Another text for one place in the sources of the kernels."""

    file: str  # below csrc/cuda
    old: str
    new: str
    occurrence: int = 0  # which of those in the file


def missing() -> str | None:
    """The reason if the kernels cannot be compiled for the CPU here."""
    return None if shutil.which("g++") else "g++ is not on PATH"


def library() -> Path:
    """The library that registers the CUDA operators for CPU tensors."""
    flags = ("-O2", "-DTORCH_TARGET_VERSION=0x020a000000000000", *_sanitizer_flags())
    sources = [
        ROOT / "csrc" / name for name in ("ops_cuda.cpp", "ops_hopper.cpp", "ops_hopper_channel.cpp", *LAUNCHERS)
    ]
    sources += [SHIM / name for name in MACHINE]
    return _link(
        "_danet_cuda_host.so", _objects(sources, flags), ("-shared", f"-L{TORCH / 'lib'}", "-ltorch_cpu", *flags)
    )


PROGRAMS = {
    "main": ("main.cpp", *MACHINE),
    "hopper_main": ("hopper_main.cpp", *MACHINE),
    "schedule": ("schedule.cpp",),
    "hopper_channel_main": ("hopper_channel_main.cpp", *MACHINE),
    "channel_schedule": ("channel_schedule.cpp",),
}
"""Of tests/cuda_host; below, what they need of csrc."""
KERNELS = {
    "main": [name for name in LAUNCHERS if "sm90" not in name],
    "hopper_main": ["cuda/sm90/position_attention.cu", "cuda/plan.cpp"],
    "schedule": [],
    "hopper_channel_main": ["cuda/sm90/channel_attention.cu", "cuda/channel_attention.cu", "cuda/channel_plan.cpp"],
    "channel_schedule": [],
}


def executable(
    *patches: Patch, flags: Sequence[str] = (), directory: Path | None = None, program: str = "main"
) -> Path:
    """A program of tests/cuda_host with kernels that have been patched, in copies below `directory`."""
    csrc = _patched(patches, directory) if directory else ROOT / "csrc"
    flags = flags if "-O0" in flags else ("-O1", *flags)
    objects = _objects([csrc / name for name in KERNELS[program]], flags, csrc)
    if objects:  # then the rest has seen no patch, and is compiled once for all of them
        flags, csrc = ["-O1" if flag == "-O0" else flag for flag in flags], ROOT / "csrc"
    objects += _objects([SHIM / name for name in PROGRAMS[program]], flags, csrc)
    return _link(program, objects, tuple(flags))


def _sanitizer_flags() -> tuple[str, ...]:
    """Those of the build that DANET_SANITIZE asks for, as for the CPU kernels (build_backend)."""
    names = os.environ.get("DANET_SANITIZE", "")
    return (f"-fsanitize={names}", "-fno-sanitize-recover=all", "-fno-omit-frame-pointer") if names else ()


def _patched(patches: Sequence[Patch], directory: Path) -> Path:
    csrc = directory / "csrc"
    shutil.copytree(ROOT / "csrc", csrc)
    for patch in patches:
        path = csrc / "cuda" / patch.file
        before, *after = path.read_text(encoding="utf-8").split(patch.old)
        if len(after) <= patch.occurrence:
            raise ValueError(f"{patch.file} has {len(after)} of {patch.old!r}, asked for number {patch.occurrence}")
        for number, part in enumerate(after):
            before += (patch.new if number == patch.occurrence else patch.old) + part
        path.write_text(before, encoding="utf-8")
    return csrc


def _objects(sources: Sequence[Path], flags: Sequence[str], csrc: Path = ROOT / "csrc") -> list[Path]:
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return list(pool.map(functools.partial(_compile, flags=flags, csrc=csrc), sources))


def _compile(source: Path, flags: Sequence[str], csrc: Path) -> Path:
    if source.name in MACHINE and THREAD_SANITIZER in flags:  # sanitizers.h says why
        flags = [*(flag for flag in flags if flag != THREAD_SANITIZER), "-DDANET_THREAD_SANITIZER"]
    includes = [f"-I{path}" for path in (SHIM, csrc, csrc / "cuda")] + ["-isystem", str(TORCH / "include")]
    command = ["g++", *FLAGS, *flags, *includes, "-x", "c++"]
    rule = _run([*command, "-MM", "-MT", "it", str(source)])
    digest = hashlib.sha256(" ".join((_compiler(), *FLAGS, *flags, torch.__version__)).encode())
    for path in map(Path, rule.replace("\\\n", " ").split()[1:]):
        digest.update(path.name.encode() + path.read_bytes())
    target = CACHE / f"{source.name}-{digest.hexdigest()[:20]}.o"
    if not target.exists():
        CACHE.mkdir(parents=True, exist_ok=True)
        new = _beside(target)
        _run([*command, "-c", str(source), "-o", str(new)])
        new.replace(target)
    return target


def _link(name: str, objects: Sequence[Path], flags: Sequence[str]) -> Path:
    digest = hashlib.sha256(" ".join((*(path.name for path in objects), *flags)).encode()).hexdigest()[:20]
    target = CACHE / digest / name
    if not target.exists():
        target.parent.mkdir(parents=True, exist_ok=True)
        new = _beside(target)
        _run(["g++", *map(str, objects), *flags, "-o", str(new)])
        new.replace(target)
    return target


def _beside(target: Path) -> Path:
    """Where to write it before it gets its name: several threads and processes may be making the same."""
    return target.with_name(f"{target.name}.{os.getpid()}-{threading.get_ident()}")


@functools.cache
def _compiler() -> str:
    return _run(["g++", "--version"])


def _run(command: Sequence[str]) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}:\n{done.stderr[-4000:]}")
    return done.stdout
