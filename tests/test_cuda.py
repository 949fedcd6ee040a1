"""The CUDA C++ backend alone: when it refuses, how it packs operands, widths and tile edges of its own, sums in parts.

What every backend must do is in the other files, whose tests run on this one too.
"""

from __future__ import annotations

import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from cases import DTYPES, ChannelCase, PositionCase, Problem, arrange
from on_backend import INTERPRETED, backend_params, device_of
from tolerance import assert_follows_error_rule, yardsticks
from torch import Tensor

import danet_kernels
from danet_kernels import available_backends, backends
from danet_kernels.backends import cuda, native

(RUNS,) = backend_params("cuda")
runs = pytest.mark.parametrize("backend", [RUNS])
for_each_gpu_dtype = pytest.mark.parametrize("dtype", [name for name in DTYPES if name != "fp64"])


def follows(problem: Problem) -> None:
    assert_follows_error_rule(problem, problem.run("cuda"), yardsticks(problem), tensor_cores=True)


# ---- when it refuses


def given(dtype: torch.dtype, channels: int = 64, device: str = "cuda") -> SimpleNamespace:
    """What `why_not` looks at, on a device that need not be there."""
    return SimpleNamespace(dtype=dtype, shape=(1, channels, 9), device=torch.device(device))


@pytest.fixture
def built(monkeypatch):
    """As if the library were loaded, on a machine with a GPU."""
    monkeypatch.setattr(cuda, "_not_loaded", [])
    monkeypatch.setattr(cuda, "_on_host", False)
    monkeypatch.setattr(cuda, "capability", lambda device: (8, 0))
    monkeypatch.setattr(native, "build_info", lambda: {"cuda_archs": ["8.0+PTX", "9.0a"], "cuda_source_hash": "0123"})
    for function in (cuda._no_code, cuda.source_hash):
        function.cache_clear()
    yield monkeypatch
    for function in (cuda._no_code, cuda.source_hash):
        function.cache_clear()


@pytest.mark.parametrize(
    ("op", "dtype", "channels", "reason"),
    [
        ("position_attention", torch.float64, 64, "fp64 has no CUDA kernels"),
        ("channel_attention", torch.float64, 64, "fp64 has no CUDA kernels"),
        ("position_attention", torch.bfloat16, 257, "query and key may have at most 256 channels, got 257"),
        ("position_attention", torch.float32, 256, None),
        ("channel_attention", torch.float32, 1000, None),
    ],
)
def test_dtypes_and_widths(op, dtype, channels, reason, built):
    assert cuda.why_not(op, given(dtype, channels)) == ([reason] if reason else [])


@pytest.mark.parametrize(
    ("capability", "reason"),
    [((7, 5), "compute capability 8.0 (Ampere) or newer, this GPU has 7.5"), ((8, 0), None), ((12, 0), None)],
)
def test_compute_capability(capability, reason, built):
    built.setattr(cuda, "capability", lambda device: capability)
    reasons = cuda.why_not("channel_attention", given(torch.float16))
    assert (len(reasons) == 1 and reason in reasons[0]) if reason else not reasons


@pytest.mark.parametrize(
    ("archs", "capability", "runs"),
    [
        (["8.0"], (8, 9), True),
        (["8.6"], (8, 0), False),
        (["8.0"], (9, 0), False),
        (["8.0+PTX"], (12, 0), True),
        (["9.0a"], (9, 0), True),
        (["9.0a"], (9, 1), False),
        (["8.6", "9.0a"], (10, 0), False),
    ],
)
def test_a_library_for_other_gpus(archs, capability, runs, built):
    built.setattr(cuda, "capability", lambda device: capability)
    built.setattr(native, "build_info", lambda: {"cuda_archs": archs})
    reason = f"the library is built for {', '.join(archs)}, this GPU has {capability[0]}.{capability[1]}"
    assert cuda.why_not("channel_attention", given(torch.float16)) == ([] if runs else [reason])


def test_other_devices(built):
    for device in ("cpu", "meta"):
        reasons = cuda.why_not("channel_attention", given(torch.float16, device=device))
        assert reasons == [f"CUDA kernels run on CUDA devices, not on {device}"]


@pytest.mark.parametrize(
    ("version", "library", "reasons"),
    [
        ({"cuda": "13.0"}, False, ["the CUDA extension is not built (no nvcc here)"]),
        ({"cuda": None}, True, ["this torch is built without CUDA"]),
        ({"cuda": None}, False, ["this torch is built without CUDA", "the CUDA extension is not built (no nvcc here)"]),
        ({"cuda": None, "hip": "7.0"}, True, ["this torch is built for ROCm, the CUDA kernels are for NVIDIA GPUs"]),
    ],
)
def test_where_there_is_no_library_for_this_torch(version, library, reasons, monkeypatch, tmp_path):
    for name, value in ({"hip": None} | version).items():
        monkeypatch.setattr(torch.version, name, value)
    monkeypatch.setattr(native, "build_info", lambda: {"reasons": {"cuda": "no nvcc here"}})
    monkeypatch.setattr(cuda, "_LIBRARY", tmp_path / "_danet_cuda.so")
    if library:
        cuda._LIBRARY.touch()
    assert cuda._load() == reasons


def test_a_library_that_does_not_load(monkeypatch, tmp_path):
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(cuda, "_LIBRARY", tmp_path / "_danet_cuda.so")
    cuda._LIBRARY.write_text("not a library")
    (reason,) = cuda._load()
    assert reason.startswith("the CUDA extension does not load: ")


def test_all_reasons_come_at_once(monkeypatch):
    monkeypatch.setattr(cuda, "_not_loaded", ["not here"])
    assert len(cuda.why_not("position_attention", given(torch.float64, 300, "meta"))) == 4


SCRIPT = """
import torch, danet_kernels
x = torch.ones(1, 2, 3)
print("not on cpu" in danet_kernels.available_backends("channel_attention", x)["cuda"][-1])
print(danet_kernels.available_backends("channel_attention")["cuda"][-1])
danet_kernels.channel_attention(x)
"""


def test_cpu_tensors_are_refused():
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run([sys.executable, "-c", SCRIPT], env=environment, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == ["True", "there is no CUDA device"]


@runs
@pytest.mark.skipif(not INTERPRETED, reason="on a GPU no library for the CPU is loaded")
def test_auto_never_takes_the_library_of_the_tests(backend, monkeypatch):
    x = torch.ones(1, 2, 3)
    assert available_backends("channel_attention", x)[backend] == []
    monkeypatch.setattr(backends, "BACKENDS", {"cuda": cuda, "eager": backends.eager})
    assert backends.choose("auto", "channel_attention", x) is backends.eager


def test_the_hash_is_that_of_the_library(built):
    """Not of sources, which may be newer."""
    assert cuda.source_hash("position_attention") == cuda.source_hash("channel_attention") == "0123"


# ---- operands that do not lie in lines on 16-byte boundaries are packed


def shifted(tensor: Tensor) -> Tensor:
    """The same, one element behind a 16-byte boundary, between NaN."""
    memory = tensor.new_full((tensor.numel() + 2,), torch.nan)
    return memory[1:-1].view(tensor.shape).copy_(tensor)


WAYS = {"shifted": shifted} | {
    layout: lambda tensor, layout=layout: arrange(tensor, layout)
    for layout in ("channels_last", "padded_channels_last", "batch_last", "padded", "strided")
}


@runs
@for_each_gpu_dtype
@pytest.mark.parametrize("N", [40, 41])
@pytest.mark.parametrize("way", WAYS)
def test_a_packed_operand_gives_the_same_bits(way, N, dtype, backend):
    """Each in turn while value, which decides the layout, and all others are contiguous."""
    torch.use_deterministic_algorithms(True)
    for problem in (PositionCase(2, 9, 12, 40, N, dtype).problem(), ChannelCase(2, 12, N, dtype).problem()):
        expected = problem.run(backend)
        for name in (*(name for name in problem.tensors if name not in ("gamma", "value", "x")), "dout"):
            tensors, dout = dict(problem.tensors), problem.dout
            if name == "dout":
                dout = WAYS[way](dout)
            else:
                tensors[name] = WAYS[way](tensors[name])
            results = Problem(problem.op, tensors, dout, problem.options).run(backend)
            assert all(torch.equal(result, expected[key]) for key, result in results.items()), name


@runs
@for_each_gpu_dtype
@pytest.mark.parametrize("way", WAYS)
def test_a_packed_value(way, dtype, backend):
    """Its layout is that of the kernel and of the results."""
    problem = PositionCase(2, 9, 13, 70, 41, dtype).problem()
    problem.tensors["value"] = WAYS[way](problem.tensors["value"])
    follows(problem)
    problem = ChannelCase(2, 13, 41, dtype).problem()
    problem.tensors["x"] = WAYS[way](problem.tensors["x"])
    follows(problem)


# ---- widths and tile edges


@runs
@for_each_gpu_dtype
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("D", [1, 40, 64, 111, 200, 256])
def test_channels_of_query_and_key(D, layout, dtype, backend):
    problem = PositionCase(1, D, 24, 70, 37, dtype).problem()
    problem.tensors = {n: arrange(t, layout) if t.dim() == 3 else t for n, t in problem.tensors.items()}
    follows(problem)


@runs
@for_each_gpu_dtype
@pytest.mark.parametrize("C", [1, 31, 130, 500])
def test_channels_of_value(C, dtype, backend):
    """In channels_last, where lines of odd length are packed."""
    for problem in (PositionCase(1, 16, C, 33, 40, dtype).problem(), ChannelCase(1, C, 40, dtype).problem()):
        problem.tensors = {n: arrange(t, "channels_last") if t.dim() == 3 else t for n, t in problem.tensors.items()}
        follows(problem)


@runs
@pytest.mark.parametrize("edge", [31, 32, 33, 63, 64, 65, 127, 128, 129])
def test_positions_around_tile_edges(edge, backend):
    """M != N. Tiles have 64 and 32 positions in fp32, 128 and 64 in 16 bits."""
    for dtype in ("fp32",) if edge < 60 else ("fp32", "bf16"):
        follows(PositionCase(1, 16, 20, edge, 40, dtype).problem())
        follows(PositionCase(2, 16, 20, 23, edge, dtype, residual=False).problem())


# ---- gradients


@runs
@for_each_gpu_dtype
def test_both_ways_to_the_gradients_of_query_and_key(dtype, backend):
    """One pass over the map that adds up in any order, and, where bits must not vary, one for each."""
    problem = PositionCase(2, 40, 20, 150, 280, dtype).problem()
    shared = problem.run(backend)
    torch.use_deterministic_algorithms(True)
    separate = problem.run(backend)
    allowed = yardsticks(problem)
    assert_follows_error_rule(problem, shared, allowed, tensor_cores=True)
    assert_follows_error_rule(problem, separate, allowed, tensor_cores=True)
    assert all(torch.equal(result, separate[name]) for name, result in shared.items() if name != "dquery")


@runs
@pytest.mark.parametrize("shape", [(), (1,), (1, 1, 1)], ids=str)
@pytest.mark.parametrize("gamma_dtype", DTYPES.values(), ids=DTYPES)
def test_gamma_of_any_dtype_and_shape(gamma_dtype, shape, backend):
    for problem in (PositionCase(1, 8, 16, 20, 30, "bf16").problem(), ChannelCase(1, 20, 30, "bf16").problem()):
        problem.tensors["gamma"] = torch.full(shape, 0.75, dtype=gamma_dtype)
        expected = Problem(
            problem.op, problem.tensors | {"gamma": torch.tensor([0.75])}, problem.dout, problem.options
        ).run(backend)
        results = problem.run(backend)
        assert torch.equal(results["out"], expected["out"])
        assert (results["dgamma"].dtype, results["dgamma"].shape) == (gamma_dtype, shape)
        assert torch.equal(results["dgamma"].flatten(), expected["dgamma"].to(gamma_dtype))


@runs
@pytest.mark.skipif(INTERPRETED, reason="thousands of images take half a minute without a GPU")
def test_a_batch_in_parts(backend):
    """More images than go together: each has the result that it has alone."""
    images = 4200
    x = torch.randn(images, 1, 2, generator=torch.Generator().manual_seed(0)).to(device_of(backend))
    out = danet_kernels.channel_attention(x, backend=backend)
    for image in (0, 4000, images - 1):
        assert torch.equal(out[image], danet_kernels.channel_attention(x[image : image + 1], backend=backend)[0])
