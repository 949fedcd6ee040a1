"""The Triton backend alone: when it refuses, other architectures than the default, order of programs, long strides.

What every backend must do is in the other files, whose tests run on this one too; what needs a GPU is in test_gpu.py.
"""

from __future__ import annotations

import os
import subprocess
import sys
from importlib import metadata
from types import SimpleNamespace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

pytest.importorskip("triton")
import triton_interpreter
from cases import ChannelCase, PositionCase, Problem
from on_backend import INTERPRETED, device_of, on_tensor_cores
from tolerance import assert_follows_error_rule, yardsticks
from triton.runtime import interpreter

import danet_kernels
from danet_kernels import available_backends
from danet_kernels.backends import triton as backend
from danet_kernels.backends.triton import launch

interpreted_only = pytest.mark.skipif(not INTERPRETED, reason="looks into the interpreter, and here is a GPU")


def follows(problem: Problem) -> None:
    assert_follows_error_rule(problem, problem.run("triton"), yardsticks(problem), on_tensor_cores("triton"))


# ---- when it refuses


def given(dtype: torch.dtype, channels: int = 64, device: str = "cpu") -> SimpleNamespace:
    """What `why_not` looks at, on a device that need not be there."""
    return SimpleNamespace(dtype=dtype, shape=(1, channels, 9), device=torch.device(device))


@pytest.fixture
def fresh(monkeypatch):
    """The installation is looked at once in a process: here for each test, and again after it."""
    backend._missing.cache_clear()
    yield monkeypatch
    backend._missing.cache_clear()


@interpreted_only
@pytest.mark.parametrize(
    ("op", "dtype", "channels", "reason"),
    [
        ("position_attention", torch.float64, 64, "fp64 has no Triton kernels"),
        ("channel_attention", torch.float64, 64, "fp64 has no Triton kernels"),
        ("position_attention", torch.bfloat16, 257, "at most 256 channels in bfloat16, got 257"),
        ("position_attention", torch.float16, 512, "at most 256 channels in float16, got 512"),
        ("position_attention", torch.float32, 129, "at most 128 channels in float32, got 129"),
        ("position_attention", torch.bfloat16, 256, None),
        ("position_attention", torch.float32, 128, None),
        ("channel_attention", torch.float32, 1000, None),
    ],
)
def test_dtypes_and_widths(op, dtype, channels, reason):
    reasons = backend.why_not(op, given(dtype, channels))
    assert (len(reasons) == 1 and reason in reasons[0]) if reason else not reasons
    if reason:
        tensor = torch.zeros(1, channels, 9, dtype=dtype)
        tensors = (tensor,) * (3 if op == "position_attention" else 1)
        with pytest.raises(NotImplementedError, match=f"{op}: backend 'triton' cannot run: .*{reason}"):
            getattr(danet_kernels, op)(*tensors, backend="triton")


@pytest.mark.parametrize(
    ("capability", "reason"),
    [((7, 5), "compute capability 8.0 (Ampere) or newer, this GPU has 7.5"), ((8, 0), None), ((12, 0), None)],
)
def test_compute_capability(capability, reason, monkeypatch):
    monkeypatch.setattr(backend, "_capability", lambda device: capability)
    reasons = backend.why_not("channel_attention", given(torch.float16, device="cuda"))
    assert (len(reasons) == 1 and reason in reasons[0]) if reason else not reasons


def test_other_devices():
    reasons = backend.why_not("channel_attention", given(torch.float16, device="meta"))
    assert reasons == ["Triton kernels run on CUDA devices, not on meta"]


def test_without_triton(fresh):
    fresh.setattr(backend, "find_spec", lambda name: None)
    assert available_backends("channel_attention")["triton"][0] == "triton is not installed"


def test_with_an_old_triton(fresh):
    fresh.setattr(metadata, "version", lambda name: "3.5.1")
    assert "triton must be 3.6 or newer, this is 3.5.1" in available_backends("channel_attention")["triton"]


def test_on_rocm(fresh):
    fresh.setattr(torch.version, "hip", "7.0")
    assert any("ROCm" in reason for reason in available_backends("channel_attention")["triton"])


def test_all_reasons_come_at_once(fresh):
    fresh.setattr(backend, "find_spec", lambda name: None)
    reasons = backend.why_not("position_attention", given(torch.float64, 300, "meta"))
    assert len(reasons) == 4


SCRIPT = """
import torch, danet_kernels
x = torch.ones(1, 2, 3)
print(danet_kernels.available_backends("channel_attention", x)["triton"])
print(danet_kernels.available_backends("channel_attention")["triton"])
danet_kernels.channel_attention(x)
"""


def test_cpu_tensors_without_the_interpreter():
    """They are refused, and "auto" takes another backend."""
    environment = {name: text for name, text in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run([sys.executable, "-c", SCRIPT], env=environment, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [
        "['Triton kernels run on CUDA devices, not on cpu']",
        "['there is no CUDA device']",
    ]


# ---- what the interpreter makes of it by default is the code for sm_90, on six multiprocessors


@interpreted_only
@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("architecture", [80, 86, 100, 120])
def test_other_architectures(architecture, dtype, monkeypatch):
    """Other tiles, and pointers instead of descriptors: tiles that fit and that do not, either layout."""
    monkeypatch.setattr(launch, "architecture", lambda device: architecture)
    follows(PositionCase(2, 48, 40, 70, 130, dtype).problem())
    follows(PositionCase(1, 100, 20, 64, 48, dtype, residual=False, gamma=None).problem())
    if dtype != "fp32":
        follows(PositionCase(1, 200, 20, 33, 40, dtype).problem())
    follows(ChannelCase(2, 130, 40, dtype).problem())
    for problem in (PositionCase(1, 8, 16, 48, 64, dtype).problem(), ChannelCase(1, 24, 72, dtype, "paper").problem()):
        turned = {n: t.mT.contiguous().mT if t.dim() == 3 else t for n, t in problem.tensors.items()}
        follows(Problem(problem.op, turned, problem.dout, problem.options))


@interpreted_only
@pytest.mark.parametrize("multiprocessors", [1, 132])
def test_other_numbers_of_multiprocessors(multiprocessors, monkeypatch):
    """They decide how many programs share the sums."""
    monkeypatch.setattr(launch, "multiprocessors", lambda device: multiprocessors)
    follows(PositionCase(1, 16, 20, 150, 400, "bf16").problem())
    follows(ChannelCase(1, 140, 600, "bf16").problem())


# ---- programs of a launch may run in any order


PROBLEMS = {
    "position": PositionCase(2, 16, 20, 150, 280, "bf16"),
    "channel": ChannelCase(2, 140, 300, "fp32"),
}


@interpreted_only
@pytest.mark.parametrize("case", PROBLEMS.values(), ids=PROBLEMS)
def test_the_order_of_programs_does_not_matter(case):
    """In deterministic mode not for a single bit; else the sums that are added up by atomics are as accurate."""
    problem = case.problem()
    with triton_interpreter.reversed_programs():
        follows(problem)
    torch.use_deterministic_algorithms(True)
    expected = problem.run("triton")
    with triton_interpreter.reversed_programs():
        results = problem.run("triton")
    assert all(torch.equal(result, expected[name]) for name, result in results.items())


@interpreted_only
@pytest.mark.parametrize("case", PROBLEMS.values(), ids=PROBLEMS)
def test_deterministic_mode_has_no_atomics(case, monkeypatch):
    """Channel attention has none at all."""
    atomics = []
    for name in ("create_atomic_rmw", "create_descriptor_reduce"):
        original = getattr(interpreter.InterpreterBuilder, name)

        def spy(*arguments, name=name, original=original):
            atomics.append(name)
            return original(*arguments)

        monkeypatch.setattr(interpreter.InterpreterBuilder, name, spy)
    problem = case.problem()
    problem.run("triton")
    assert bool(atomics) == isinstance(case, PositionCase)
    atomics.clear()
    torch.use_deterministic_algorithms(True)
    problem.run("triton")
    assert not atomics


# ---- long strides


def far_apart(tensor: torch.Tensor, far: str) -> torch.Tensor:
    """`tensor` [B, C, N] with more than 2^31 elements between its batch elements, or between its first and last row.

    Of the memory in between, nothing is touched.
    """
    _, C, N = tensor.shape
    row = (2**31 + 2**12) // (C - 1) // 16 * 16 if far == "rows" else N
    strides = (2**31 + 2**12, row, 1) if far == "batch" else (C * row, row, 1)
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, strides, strict=True))
    whole = torch.empty(last + 1, dtype=tensor.dtype, device=tensor.device)
    return torch.as_strided(whole, tensor.shape, strides).copy_(tensor)


@pytest.mark.large_memory
@pytest.mark.parametrize("far", ["batch", "rows"])
def test_offsets_beyond_32_bits(far):
    """4 GiB of address space for each tensor; the interpreter raises where 32 bits overflow (triton_interpreter.py)."""
    batch = 2 if far == "batch" else 1
    for problem in (
        PositionCase(batch, 16, 16, 48, 64, "bf16").problem(),
        ChannelCase(batch, 32, 48, "bf16").problem(),
    ):
        allowed = yardsticks(problem)
        for name in ("query", "value", "residual", "x"):
            if name in problem.tensors:
                tensors = problem.tensors | {name: far_apart(problem.tensors[name], far)}
                results = Problem(problem.op, tensors, problem.dout, problem.options).run("triton")
                assert_follows_error_rule(problem, results, allowed, tensor_cores=True)
        results = Problem(problem.op, problem.tensors, far_apart(problem.dout, far), problem.options).run("triton")
        assert_follows_error_rule(problem, results, allowed, tensor_cores=True)


# ---- torch.compile, memory


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiled(dynamic):
    """One graph, and the bits of eager mode, gradients included."""
    torch.compiler.reset()
    torch.use_deterministic_algorithms(True)
    device = device_of("triton")
    generator = torch.Generator().manual_seed(0)
    query, value = (torch.randn(1, c, 5, 7, generator=generator).to(device).requires_grad_() for c in (8, 12))
    gamma = torch.full((1,), 0.5, device=device, requires_grad=True)

    def function(query, value, gamma):
        out = danet_kernels.position_attention(query, query, value, value, gamma, backend="triton")
        return out + danet_kernels.channel_attention(value, gamma, backend="triton")

    compiled = torch.compile(function, backend="aot_eager", fullgraph=True, dynamic=dynamic)
    outs = [f(query, value, gamma) for f in (compiled, function)]
    gradients = [torch.autograd.grad(out.square().sum(), (query, value, gamma)) for out in outs]
    assert torch.equal(*outs)
    assert all(map(torch.equal, *gradients))
    torch.compiler.reset()


class Allocations(TorchDispatchMode):
    """Adds up the bytes of all memory that is allocated inside, whether or not it is freed again."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        known = {t.untyped_storage().data_ptr() for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)}
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor) and tensor.untyped_storage().data_ptr() not in known:
                self.bytes += tensor.untyped_storage().nbytes()
        return result


def allocated(op: str, positions: int, dtype: torch.dtype = torch.bfloat16, C: int = 512, D: int = 64) -> int:
    """Bytes that the launchers of forward and backward allocate in all, their results included."""
    value = torch.zeros(1, C, positions, dtype=dtype)
    query, gamma = value[:, :D], torch.ones(1)
    with Allocations() as allocations:
        if op == "position_attention":
            out, attn, lse = backend.position_attention_forward(query, query, value, value, gamma, 1.0, True)
            saved = (query, query, value, attn, lse, gamma, 1.0)
            backend.position_attention_backward(out, *saved, (True,) * 4)
        else:
            out, *statistics = backend.channel_attention_forward(value, gamma, "official", True)
            backend.channel_attention_backward(out, value, gamma, *statistics, "official", True, (True, True))
    return allocations.bytes


@interpreted_only
@pytest.mark.parametrize("deterministic", [False, True])
def test_memory_is_linear_in_the_positions(deterministic, monkeypatch):
    """On 132 multiprocessors, with kernels that do nothing. What grows with the positions is linear in them, and what
    does not is no more than eight partial sums for every multiprocessor."""
    torch.use_deterministic_algorithms(deterministic)
    monkeypatch.setattr(launch, "multiprocessors", lambda device: 132)
    monkeypatch.setattr(interpreter.InterpretedFunction, "run", lambda self, *args, **kwargs: None)
    few, many = (allocated("position_attention", positions) for positions in (8192, 32768))
    assert many < 4 * few
    assert many < 32768**2 / 4  # a map of one bit would be half of this
    few, many = (allocated("channel_attention", positions) for positions in (8192, 32768))
    assert many - few <= 24576 * 512 * 2 * 2 * 1.1  # out and dx


@interpreted_only
def test_training_at_32768_positions_takes_what_was_promised(monkeypatch):
    """190 MiB, results included, even if nothing were freed before the end."""
    monkeypatch.setattr(launch, "multiprocessors", lambda device: 132)
    monkeypatch.setattr(interpreter.InterpretedFunction, "run", lambda self, *args, **kwargs: None)
    assert allocated("position_attention", 32768) < 190 * 2**20
