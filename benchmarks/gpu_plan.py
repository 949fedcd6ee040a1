"""What a GPU record consists of: its steps, in the order in which they matter."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from benchmarks import dry_run, gpu_checks, gpu_speed, gpu_steps
from benchmarks.gpu_cells import CHANNEL, POSITION, STEP, Group
from benchmarks.gpu_proof import enter_proof
from benchmarks.gpu_steps import ROOT, Run
from benchmarks.implementations import DTYPES, OPS
from benchmarks.peers import peers
from benchmarks.shapes import POSITION_SIZES, Size
from danet_kernels import selftest
from danet_kernels._self_check import CASES as CHECK_CASES
from danet_kernels.backends import BACKENDS

PARTS = ("tests", "sanitizers", "speed")
SANITIZERS = ("memcheck", "racecheck", "initcheck", "synccheck")
COMPILED_PEERS_AT = (Size(1, 9216), Size(8, 9216), Size(1, 32768))  # in the quick record: Inductor takes its time
QUICK_MARKS = "gpu and not slow and not large_memory"
RACE_SECONDS = 45.0  # what the slowest group of a race may take


@dataclass(frozen=True)
class Step:
    name: str
    part: str  # of a full record
    run: Callable[[Run, float], dict[str, Any]]  # the second argument: seconds that are left
    least: float = 20.0  # seconds without which it is not begun


def steps(backend: str, *, full: bool, dry: bool) -> list[Step]:
    dtypes = ["fp32"] if dry else dtypes_of(backend)
    groups = dry_groups() if dry else gpu_speed.plan(backend, dtypes=dtypes) if full else quick_groups(backend)
    checks = gpu_checks.jobs([], dtypes, *([CHECK_CASES, selftest.CASES] if full else [CHECK_CASES]))
    found = [
        Step("compile", "tests", partial(gpu_steps.compile_kernels, gpu_checks.jobs(groups, dtypes))),
        Step("compile checks", "tests", partial(gpu_steps.compile_kernels, checks[:: 4 if dry else 1])),
        Step("self-check", "tests", partial(gpu_steps.self_check, dtypes)),
    ]
    for name, arguments in _tests(backend, full, dry).items():
        found.append(Step(f"tests: {name}", "tests", partial(gpu_steps.run_pytest, arguments, name != "core")))
    if full:
        found.append(Step("selftest", "tests", gpu_steps.run_selftest))
        for tool in SANITIZERS:
            for op in OPS:
                run = partial(gpu_steps.sanitize, tool, op)
                found += [Step(f"{tool}: {op}, {dtype}", "sanitizers", partial(run, dtype)) for dtype in dtypes]
    for group in groups:
        found.append(Step(f"race: {group}", "speed", partial(gpu_steps.race, group), 0 if dry else RACE_SECONDS))
    return [*found, Step("output errors", "speed", gpu_steps.output_errors), Step("proof", "", enter_proof, 0)]


def dtypes_of(backend: str) -> list[str]:
    """Names of those that the backend has kernels for."""
    known = getattr(BACKENDS[backend], "DTYPES", tuple(DTYPES.values()))
    return [name for name, dtype in DTYPES.items() if dtype in known]


def _tests(backend: str, full: bool, dry: bool) -> dict[str, list[str]]:
    """Arguments of pytest by name."""
    if dry:
        return {"a few": ["tests/test_position_attention.py", "tests/test_channel_attention.py", "-k", "eager and map"]}
    if full:
        files = [path.relative_to(ROOT) for path in sorted((ROOT / "tests").glob("test_*.py"))]
        return {file.stem: [str(file), "-k", backend] for file in files} | {"gpu": ["-m", "gpu"]}
    # Kernels would have to be compiled for all others: test_gpu.py takes those of the race and of the self-check.
    return {"core": ["tests/test_gpu.py", "-m", QUICK_MARKS, "-k", f"{backend} or eager or memory_moves"]}


def quick_groups(backend: str) -> list[Group]:
    """bf16 at every size, fp32 at one, and compiled peers at three."""
    slow = {name for op in OPS for name, peer in peers(op).items() if peer.compiled}
    groups = []
    for group in gpu_speed.plan(backend, dtypes=["bf16"]):
        left_out = {"compile-max"} if group.size in COMPILED_PEERS_AT else slow
        groups.append(replace(group, names=tuple(name for name in group.names if name not in left_out)))
    names = [name for name in peers(POSITION) if name not in slow]
    if "fp32" in dtypes_of(backend):
        fp32 = gpu_speed.plan(backend, POSITION_SIZES[:1], ["fp32"], names)
        groups += [group for group in fp32 if group.op == POSITION]
    first = {(POSITION, Size(8, 9216)): 0, (POSITION, Size(1, 131072)): 2}  # what matters most, and what takes longest
    return sorted(groups, key=lambda group: first.get((group.op, group.size), 1))


def dry_groups() -> list[Group]:
    """Every op, mode and fate of a cell."""
    ours = "danet:eager"
    some = ("eager", "autocast", "sdpa-efficient", *dry_run.FAILING, ours, "danet:wrong")
    more = ("eager", "autocast", "sdpa-cudnn", ours, f"{ours}:deterministic")
    names = {(POSITION, "fp32"): some, (POSITION, "bf16"): more, (CHANNEL, "bf16"): (some[0], ours)}
    names[STEP, "bf16"] = (some[0], ours)
    return [Group(op, Size(2, 60), dtype, found, 3, "cpu") for (op, dtype), found in names.items()]
