"""What every test gets: poisoned memory, a seed of its own, global state put back, and a summary that hides no skip."""

from __future__ import annotations

import importlib
import importlib.util
import os
import platform
import sys
import zlib
from collections import Counter

# Read once by the C++ side: outputs and workspaces start as NaN, so an element that is never written shows.
os.environ["DANET_DEBUG_POISON"] = "1"
# Threads that wait do not spin: on a busy machine that makes small cases up to 100 times slower. Read by torch's OpenMP
# when it is loaded.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import pytest
import torch

# Where there is no GPU, the Triton kernels are interpreted. Read once, when triton is imported. (The CUDA kernels are
# compiled for the CPU then, by on_backend.py.)
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

from on_backend import GPU_BACKENDS, has_kernels

import danet_kernels
from danet_kernels import _layout, backends

HAS_TRITON = importlib.util.find_spec("triton") is not None
if HAS_TRITON and not torch.cuda.is_available():
    importlib.import_module("triton_interpreter").patch()


@pytest.fixture(scope="session", autouse=True)
def poison():
    """The same on the Python side: what the package allocates through its two helpers starts as NaN."""
    helpers = [(_layout, "empty_like_layout")]
    if HAS_TRITON:
        helpers.append((importlib.import_module("danet_kernels.backends.triton.launch"), "empty"))
    with pytest.MonkeyPatch.context() as patch:
        for home, name in helpers:
            allocate = getattr(home, name)

            def poisoned(*args, allocate=allocate, **kwargs):
                return allocate(*args, **kwargs).fill_(torch.nan)

            for module in list(sys.modules.values()):  # also those that have imported it by name
                if module.__name__.startswith("danet_kernels") and getattr(module, name, None) is allocate:
                    patch.setattr(module, name, poisoned)
        yield


@pytest.fixture
def deterministic(request):
    """For tests that compare bits: the kernels for GPUs add up one gradient in any order, if torch allows them to."""
    given = getattr(request.node, "callspec", None)
    if given is not None and any(name in given.params.values() for name in GPU_BACKENDS):
        torch.use_deterministic_algorithms(True)  # put back below


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


def pytest_collection_modifyitems(config, items):
    """Leave out the combinations of parameters for which a backend has no kernels."""
    kept, left_out = [], []
    for item in items:
        (kept if has_kernels(item.callspec.params if hasattr(item, "callspec") else {}) else left_out).append(item)
    items[:] = kept
    config.hook.pytest_deselected(items=left_out)


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
