"""Nothing is kept after a call: no memory that grows with the number of calls, no result that outlives its name."""

import gc
import os
import subprocess
import sys
import weakref
from pathlib import Path

import pytest
import torch
from on_backend import device_of, for_each_backend, for_each_cpu_backend

import danet_kernels
from danet_kernels import channel_attention, position_attention

SCRIPT = """
import sys
from pathlib import Path
import torch
from danet_kernels import channel_attention, position_attention

def resident():
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmRSS"))

backend = sys.argv[1]
query, value = torch.randn(1, 8, 12, 12, requires_grad=True), torch.randn(1, 32, 12, 12, requires_grad=True)
gamma = torch.tensor([0.5], requires_grad=True)

def run(calls):
    for _ in range(calls):
        out = position_attention(query, query, value, value, gamma, backend=backend)
        out = out + channel_attention(value, gamma, backend=backend)
        torch.autograd.grad(out.sum(), (query, value, gamma))

run(300)
before = resident()
run(3000)
print(resident() - before)
"""


@for_each_cpu_backend
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the resident set is read from Linux's /proc")
def test_3000_calls_forward_and_backward_leave_nothing_behind(backend):
    """One result of every call, 18 KiB, would add up to 54 MiB."""
    environment = {name: text for name, text in os.environ.items() if not name.startswith("DANET")}
    environment["PYTHONPATH"] = str(Path(danet_kernels.__file__).resolve().parent.parent)
    environment["OMP_WAIT_POLICY"] = "passive"  # else 20000 small parallel regions take minutes on a busy machine
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, backend], env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < 8 * 1024  # KiB


@for_each_backend
def test_results_die_with_their_names(backend):
    """Without the help of the cycle collector: no cycle runs through the autograd context."""
    device = device_of(backend)
    query, value = (torch.randn(1, c, 12, 12, device=device, requires_grad=True) for c in (8, 32))
    gc.collect()
    gc.disable()
    try:
        for function in (
            lambda: position_attention(query, query, value, backend=backend),
            lambda: position_attention(query, query, value, value, 0.5, backend=backend),
            lambda: channel_attention(value, 0.5, backend=backend),
        ):
            for backward in (False, True):
                out = function()
                node = out.grad_fn.next_functions[0][0]  # of the operator, behind the view; it holds what is saved
                references = [weakref.ref(out), weakref.ref(node)]
                if backward:
                    out.sum().backward()
                    query.grad = value.grad = None
                assert None not in [reference() for reference in references]
                del out, node
                assert [reference() for reference in references] == [None] * len(references)
    finally:
        gc.enable()
