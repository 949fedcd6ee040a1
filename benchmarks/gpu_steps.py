"""What the steps of a GPU record do, each within the seconds that are left, and what of it goes into the record."""

from __future__ import annotations

import importlib.util
import os
import signal
import subprocess
import sys
import tempfile
import xml.etree.ElementTree
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks import gpu_checks, gpu_speed, memory
from benchmarks.gpu_cells import Group
from benchmarks.gpu_file import RecordFile
from benchmarks.implementations import OPS

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
LIMIT = 400.0  # seconds for one program
SILENCE = 240.0  # seconds without a word, after which a process is taken to hang
WORKERS = min(16, os.cpu_count() or 1)


class Cut(Exception):
    """The time of this call is over; the step has to be run again."""


@dataclass(frozen=True)
class Run:
    """What every step needs to know."""

    record: RecordFile
    backend: str
    dry: bool

    @property
    def device(self) -> str:
        return "cpu" if self.dry else "cuda"


def outcome(passed: bool, detail: str = "", **more: Any) -> dict[str, Any]:
    """What a step returns; among `more` "failures", what failed, and "passed", the tests that did not."""
    return {"status": "passed" if passed else "failed", "detail": detail, **more}


def compile_kernels(jobs: list[gpu_checks.Job], run: Run, left: float) -> dict[str, Any]:
    """Every kernel that the rest needs, compiled by processes that share the work."""
    shares = [jobs[index::WORKERS] for index in range(WORKERS)]
    complaints = _in_parallel(gpu_checks.run_jobs, [(run.backend, run.device, share) for share in shares if share])
    return outcome(not complaints, failures=complaints, kernels=compiled_kernels())


def self_check(dtypes: list[str], run: Run, left: float) -> dict[str, Any]:
    """That of the package, which "auto" runs on a device that nothing has proven its kernels on."""
    calls = [(run.backend, op, dtype, run.device) for op in OPS for dtype in dtypes]
    complaints = _in_parallel(gpu_checks.self_check, calls)
    return outcome(not complaints, failures=complaints)


def _in_parallel(function: Callable[..., list[str]], calls: list[tuple[Any, ...]]) -> list[str]:
    """The complaints of all calls, each in a process of its own."""

    def complaints(arguments: tuple[Any, ...]) -> list[str]:
        try:
            return memory.run_isolated(function, *arguments, silence=SILENCE)
        except memory.CaseFailed as error:
            return [str(error)]

    with ThreadPoolExecutor(WORKERS) as pool:
        return [complaint for found in pool.map(complaints, calls) for complaint in found]


def compiled_kernels() -> dict[str, int]:
    """By name how many versions of each kernel of ours Triton's cache holds; those of Inductor are left out."""
    names = Counter(path.stem for path in Path(os.environ["TRITON_CACHE_DIR"]).glob("*/*.cubin"))
    return {name: count for name, count in sorted(names.items()) if not name.startswith("triton_")}


def run_selftest(run: Run, left: float) -> dict[str, Any]:
    return _command([sys.executable, "-m", "danet_kernels.selftest", *(["--help"] * run.dry)], left)


def run_pytest(arguments: list[str], allow_none: bool, run: Run, left: float) -> dict[str, Any]:
    """allow_none: there may be no test of this kind."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        options = ["-q", "--maxfail=50", "-p", "no:cacheprovider", f"--junitxml={report}"]
        if importlib.util.find_spec("xdist") and not run.dry:
            options.append(f"--numprocesses={WORKERS}")
        command = [sys.executable, "-m", "pytest", *options, *arguments]
        found = _command(command, left, OMP_NUM_THREADS="1")
        if not report.exists():
            return found
        tests: dict[str, list[str]] = {"passed": [], "skipped": [], "failures": []}
        for test in xml.etree.ElementTree.parse(report).iter("testcase"):
            tests[_fate(test)].append(f"{test.get('classname')}::{test.get('name')}")
    if not any(tests.values()):
        return outcome(allow_none, "no test was selected")
    return found | tests


def _fate(test: xml.etree.ElementTree.Element) -> str:
    kinds = {child.tag for child in test}
    return "failures" if kinds & {"failure", "error"} else "skipped" if "skipped" in kinds else "passed"


def sanitize(tool: str, op: str, dtype: str, run: Run, left: float) -> dict[str, Any]:
    """compute-sanitizer over every kernel on small odd sizes; a pass with a remark where it does not work."""
    command = ["compute-sanitizer", "--tool", tool, "--error-exitcode", "9"]
    command += [sys.executable, "benchmarks/gpu_checks.py", run.backend, op, dtype]
    # torch's own allocator would put many tensors into one allocation, and hide overruns from memcheck.
    found = _command(["echo", *command] if run.dry else command, left, PYTORCH_NO_CUDA_MEMORY_CACHING="1")
    for reason in ("Device not supported", "No such file or directory"):
        if reason in found["detail"]:
            return outcome(True, f"not run: {reason}")
    return found


def race(group: Group, run: Run, left: float) -> dict[str, Any]:
    figures = run.record.figures

    def on_cell(row: dict[str, Any]) -> None:
        figures.add(row)
        run.record.save()

    gpu_speed.run_group(group, on_cell, lambda seconds: figures.ceilings.__setitem__(str(group), seconds))
    bad = [
        f"{cell['label']}, {cell['mode']}: {cell['status']}: {cell['detail']}"
        for cell in figures.cells()
        if (cell["op"], cell["batch"], cell["positions"], cell["dtype"])
        == (group.op, group.size.batch, group.size.positions, group.dtype)
        and cell["implementation"].startswith("danet:")
        and cell["status"] in ("wrong", "failed")
    ]
    return outcome(not bad, failures=bad)


def output_errors(run: Run, left: float) -> dict[str, Any]:
    arguments = run.backend, run.device, 60 if run.dry else 4096
    try:
        run.record.content["errors"] = memory.run_isolated(gpu_checks.output_errors, *arguments, silence=SILENCE)
    except memory.CaseFailed as error:
        return outcome(False, str(error))
    return outcome(True, kernels=compiled_kernels())  # the last step that compiles


def _command(command: list[str], left: float, **environment: str) -> dict[str, Any]:
    """Run a program with this checkout on its path; a `Cut` if the time that is left ends before its own does."""
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    try:
        process = subprocess.Popen(
            command,
            cwd=ROOT,
            env=os.environ | {"PYTHONPATH": path} | environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
    except OSError as error:
        return outcome(False, f"{command[0]}: {error.strerror}")
    try:
        output, _ = process.communicate(timeout=min(LIMIT, left))
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)  # with all that it has started
        process.communicate()
        if left < LIMIT:
            raise Cut from None
        return outcome(False, f"took longer than {LIMIT:g} s")
    return outcome(process.returncode == 0, "\n".join(output.strip().splitlines()[-25:]))
