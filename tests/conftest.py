"""What every test gets: poisoned memory, a seed of its own, global state put back, and a summary that hides no skip."""

from __future__ import annotations

import os
import platform
import zlib
from collections import Counter

# Read once by the C++ side: outputs and workspaces start as NaN, so an element that is never written shows.
os.environ["DANET_DEBUG_POISON"] = "1"
# Threads that wait do not spin: on a busy machine that makes small cases up to 100 times slower. Read by torch's OpenMP
# when it is loaded.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import pytest
import torch

import danet_kernels
from danet_kernels import _layout, backends, ops


@pytest.fixture(scope="session", autouse=True)
def poison():
    """The same on the Python side: what the package allocates through its one helper starts as NaN."""
    allocate = _layout.empty_like_layout

    def poisoned(*args, **kwargs):
        return allocate(*args, **kwargs).fill_(torch.nan)

    with pytest.MonkeyPatch.context() as patch:
        for module in (_layout, ops):  # ops.py has imported it by name
            patch.setattr(module, "empty_like_layout", poisoned)
        yield


@pytest.fixture(autouse=True)
def isolation(request):
    """A seed that depends on the test's name alone, and the settings that a test may change put back after it."""
    torch.manual_seed(zlib.crc32(request.node.nodeid.encode()))
    threads, dtype, deterministic = (
        torch.get_num_threads(),
        torch.get_default_dtype(),
        torch.are_deterministic_algorithms_enabled(),
    )
    yield
    torch.set_num_threads(threads)
    torch.set_default_dtype(dtype)
    if torch.are_deterministic_algorithms_enabled() != deterministic:  # the setter is slow the first time
        torch.use_deterministic_algorithms(deterministic)
    # A backend set by a test that failed inside `use_backend` would decide what the tests after it run on.
    assert backends._context.get() is None


def pytest_report_header():
    runs = {op: danet_kernels.available_backends(op) for op in backends.OPS}
    lines = [
        f"danet_kernels {danet_kernels.__version__}, torch {torch.__version__}, {platform.machine()}, "
        f"{torch.backends.cpu.get_cpu_capability()}, {torch.get_num_threads()} threads"
    ]
    for name in backends.BACKENDS:
        reasons = {reason for reasons in runs.values() for reason in reasons[name]}
        lines.append(f"backend {name}: {'; '.join(sorted(reasons)) or 'runs'}")
    return lines


def pytest_terminal_summary(terminalreporter):
    """Skips by reason: a suite that skipped half of itself must not look like one that passed."""
    skipped = terminalreporter.stats.get("skipped", [])
    counts = Counter(_reason(report) for report in skipped)
    terminalreporter.write_line(f"{len(skipped)} skipped" + (":" if skipped else ""))
    for reason, count in counts.most_common():
        terminalreporter.write_line(f"  {count} x {reason}")


def _reason(report) -> str:
    text = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
    return text.removeprefix("Skipped: ")
