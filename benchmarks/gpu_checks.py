"""What the record of a GPU run does on the device besides the race, each in a process of its own.

    python benchmarks/gpu_checks.py BACKEND OP DTYPE

runs every kernel of an op on small odd sizes and looks at no result: for compute-sanitizer.
"""

from __future__ import annotations

import math
import subprocess
import sys
from collections.abc import Mapping, Sequence
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

import danet_kernels
from benchmarks import dry_run, memory, record
from benchmarks.gpu_cells import MODES, STEP, Group
from benchmarks.gpu_measure import Problem
from benchmarks.gpu_timing import GEMM_SIZE
from benchmarks.implementations import DTYPES, OPS, eager_position
from benchmarks.shapes import CHANNELS, QUERY_CHANNELS
from danet_kernels import proven, reference
from danet_kernels._cases import Case
from danet_kernels._error_rule import evaluate
from danet_kernels._self_check import CASES as CHECK_CASES
from danet_kernels._self_check import cases_for, find_fault, results_of
from danet_kernels.backends import BACKENDS

_SMI = "name,driver_version,clocks.sm,clocks.mem,clocks.max.sm,power.limit,temperature.gpu"
Job = tuple[str, str, Case | Group]  # op, dtype, and one call or a group of the race


def facts(backend: str, device: str) -> dict[str, Any]:
    """The machine, the versions, and hashes of the kernels' sources."""
    found = record.environment(device) | {"triton": _version("triton"), "backend": backend}
    found |= dry_run.FACTS if device == "cpu" else {"nvidia_smi": _nvidia_smi(), "nvidia_smi_under_load": _under_load()}
    return found | {"source_hash": source_hashes(backend), "family": proven.family(device) or "DRY RUN"}


def source_hashes(backend: str) -> dict[str, str]:
    """By op, what the kernels of a backend are compiled from."""
    hashes = getattr(BACKENDS[backend], "source_hash", lambda op: "not for GPUs")
    return {op: hashes(op) for op in OPS}


def _version(distribution: str) -> str | None:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def _nvidia_smi() -> str:
    command = ["nvidia-smi", f"--query-gpu={_SMI}", "--format=csv,noheader", "--id=0"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=30).stdout.strip()
    except (OSError, subprocess.SubprocessError) as error:
        return memory.describe(error)


def _under_load() -> str:
    """As `_nvidia_smi`, while matrix products run."""
    left, right = torch.randn(2, GEMM_SIZE, GEMM_SIZE, dtype=torch.bfloat16, device="cuda")
    for _ in range(1000):  # about 1.5 s
        torch.mm(left, right)
    answer = _nvidia_smi()
    torch.cuda.synchronize()
    return answer


def jobs(groups: Sequence[Group], dtypes: Sequence[str], *cases: Mapping[str, Sequence[Case]]) -> list[Job]:
    """All that makes a backend compile: these cases, by op, and its own part of a race."""
    calls: list[Job] = [
        (op, dtype, case)
        for by_op in cases
        for op in OPS
        for dtype in dtypes
        for case in by_op[op]
        if case.dtypes is None or DTYPES[dtype] in case.dtypes
    ]
    return calls + [(group.op, group.dtype, group) for group in groups]


def run_jobs(backend: str, device: str, work: list[Job]) -> list[str]:
    """Run kernels forward and backward, also the deterministic ones; returns what was raised."""
    complaints = []
    for job in work:
        try:
            _run_job(backend, device, job)
            if device == "cuda":
                torch.cuda.synchronize()
        except Exception as error:  # the other kernels are of interest all the same
            complaints.append(f"{job}: {memory.describe(error)[:300]}")
        memory.report_progress(job)
    return complaints


def _run_job(backend: str, device: str, job: Job) -> None:
    op, dtype, what = job
    if isinstance(what, Case):
        inputs, dout, options = what.make(DTYPES[dtype], device, seed=0)
        if not danet_kernels.available_backends(op, *inputs.values())[backend]:
            own = cases_for(op, DTYPES[dtype])
            if what in own:  # exactly what the self-check calls
                list(results_of(BACKENDS[backend], op, inputs, dout, options, every_kernel=what == own[0]))
            else:
                function = partial(getattr(danet_kernels, op), backend=backend, **options)
                evaluate(function, inputs, dout)
                with torch.no_grad():
                    function(**inputs)
        return
    problem = Problem(what, checked=False)
    for name in what.names:
        peer = what.find(name)
        for train in [mode == "training" for mode in MODES[what.op == STEP :]]:
            if name.startswith("danet:") and peer.why_not(dtype, train) is None:
                problem.whole(peer, train)
        if what.op == STEP and name.startswith("danet:"):  # what its gate asks for
            with torch.no_grad(), peer.context(), torch.autocast(what.device, dtype=DTYPES[dtype]):
                peer.call(*problem.operands)


def self_check(backend: str, op: str, dtype: str, device: str) -> list[str]:
    """What the self-check of the package finds wrong: that which "auto" runs where nothing has proven a kernel."""
    complaint = find_fault(BACKENDS[backend], op, DTYPES[dtype], torch.device(device))
    return [f"{op}: {complaint}"] if complaint else []


def output_errors(backend: str, device: str, positions: int) -> list[dict[str, float]]:
    """By deviation of the logits: Frobenius error of bf16 outputs by the norm of the fp64 result, ours and eager's."""
    found = []
    for deviation in (1, 8, 30):
        generator = torch.Generator().manual_seed(deviation)

        def normal(channels: int, deviation: float = 1.0, generator: torch.Generator = generator) -> torch.Tensor:
            values = torch.randn(1, channels, positions, generator=generator) * deviation
            return values.to(device, torch.bfloat16)

        query, key = normal(QUERY_CHANNELS, deviation / math.sqrt(QUERY_CHANNELS)), normal(QUERY_CHANNELS)
        value = normal(CHANNELS)
        exact = reference.position_attention(query.double(), key.double(), value.double())

        def error(out: torch.Tensor, exact: torch.Tensor = exact) -> float:
            return float((out.double() - exact).norm() / exact.norm())

        none, one = torch.zeros_like(value), torch.ones(1, dtype=torch.bfloat16, device=device)
        ours = danet_kernels.position_attention(query, key, value, none, one, backend=backend)  # as in the race
        eager = eager_position(query, key, value, none, one)
        found.append({"deviation": deviation, "ours": error(ours), "eager": error(eager)})
    return found


if __name__ == "__main__":
    _backend, _op, _dtype = sys.argv[1:]
    _complaints = run_jobs(_backend, "cuda", [job for job in jobs([], [_dtype], CHECK_CASES) if job[0] == _op])
    sys.exit("\n".join(_complaints) or 0)
