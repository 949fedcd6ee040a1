"""Memory: the peak of a call, as the operating system saw it, against the promise and against `memory_estimate`.

Extra memory is VmHWM during the call minus RSS with the inputs in place, in a process of its own
(benchmarks/memory.py).
"""

import os
import sys
from collections.abc import Mapping
from dataclasses import FrozenInstanceError
from functools import partial
from pathlib import Path

import pytest
import torch
from on_backend import for_each_cpu_backend
from torch import Tensor

from danet_kernels import available_backends, channel_attention, memory_estimate, position_attention
from danet_kernels.backends import cuda

sys.path.append(str(Path(__file__).resolve().parent.parent))
memory = pytest.importorskip("benchmarks.memory")

MIB = 2**20
pytestmark = pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="peaks are read from Linux's /proc")
native_only = pytest.mark.skipif(
    bool(reasons := available_backends("position_attention")["native"]), reason="; ".join(reasons)
)
CUDA = pytest.param("cuda", marks=native_only)  # whose plans are in the extension for the CPU
HOPPER = pytest.param("hopper", marks=native_only)


# ---- one measured call; these run in a process of their own


def position_inputs(
    channels: int, d: int, queries: int, keys: int, dtype: torch.dtype, full: bool, training: bool, crop: int
) -> dict[str, Tensor]:
    """`crop`: columns cut off at the right, so that the spatial dimensions do not collapse; 0: contiguous."""

    def some(rows: int, positions: int) -> Tensor:
        height = 2 if positions % 2 == 0 else 1
        whole = torch.randn(1, rows, height, positions // height + crop).mul_(0.1).to(dtype)
        return whole[..., : positions // height].requires_grad_(training)

    tensors = {"query": some(d, queries), "key": some(d, keys), "value": some(channels, keys)}
    if full:
        tensors |= {"residual": some(channels, queries), "gamma": torch.tensor([0.5], requires_grad=training)}
    if training:
        tensors["dout"] = some(channels, queries).detach()
    return tensors


def channel_inputs(channels: int, positions: int, dtype: torch.dtype, training: bool) -> dict[str, Tensor]:
    x = torch.randn(1, channels, positions).mul_(0.1).to(dtype)
    tensors = {"x": x.requires_grad_(training), "gamma": torch.tensor([0.5], requires_grad=training)}
    if training:
        tensors["dout"] = torch.randn(1, channels, positions).to(dtype)
    return tensors


def call(op: str, backend: str, tensors: Mapping[str, Tensor]) -> object:
    """Forward, and backward if there is a dout: what it returns stays in memory until the peak has been read."""
    function = {"position_attention": position_attention, "channel_attention": channel_attention}[op]
    inputs = {name: tensor for name, tensor in tensors.items() if name != "dout"}
    out = function(**inputs, backend=backend)
    if "dout" not in tensors:
        return out
    return out, torch.autograd.grad(out, list(inputs.values()), tensors["dout"])


def warm_up(op: str, backend: str, dtype: torch.dtype, training: bool) -> None:
    """The same on a small map, to start the threads. No poison: it touches memory that a call may leave alone."""
    os.environ["DANET_DEBUG_POISON"] = "0"
    small = {
        "position_attention": lambda: position_inputs(16, 8, 600, 600, dtype, True, training, 0),
        "channel_attention": lambda: channel_inputs(16, 600, dtype, training),
    }[op]
    call(op, backend, small())


def position_peak(
    backend: str,
    channels: int,
    d: int,
    queries: int,
    keys: int,
    dtype: torch.dtype = torch.float32,
    *,
    full: bool = True,
    training: bool = True,
    crop: int = 0,
) -> int:
    return memory.peak_extra_memory(
        partial(position_inputs, channels, d, queries, keys, dtype, full, training, crop),
        partial(call, "position_attention", backend),
        partial(warm_up, "position_attention", backend, dtype, training),
    )


def channel_peak(
    backend: str, channels: int, positions: int, dtype: torch.dtype = torch.float32, *, training: bool = True
) -> int:
    return memory.peak_extra_memory(
        partial(channel_inputs, channels, positions, dtype, training),
        partial(call, "channel_attention", backend),
        partial(warm_up, "channel_attention", backend, dtype, training),
    )


# ---- the promise


@native_only
@pytest.mark.large_memory
@pytest.mark.slow
@pytest.mark.parametrize(("full", "limit"), [(False, 320), (True, 480)], ids=["bare", "residual_and_gamma"])
def test_forward_and_backward_at_32768_positions(full, limit):
    """A crop of 1024 x 2048 in fp32, where the eager form needs 19 GiB."""
    assert position_peak("native", 512, 64, 32768, 32768, full=full) <= limit * MIB


@native_only
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_position_attention_is_linear_in_the_positions(dtype, training):
    """Four times the positions, at most four times the memory: an N x N map, of any dtype, would take sixteen times."""
    few, many = (position_peak("native", 64, 16, n, n, dtype, training=training) for n in (3072, 12288))
    assert many <= 4 * few + 2 * MIB
    assert many < 12288**2  # bytes


@native_only
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_workspace_of_channel_attention_does_not_grow(dtype, training):
    channels, sizes = 256, (16384, 65536)  # the tiles have their full size from 16384 positions on
    results = 1 + training  # out, dx
    few, many = (
        channel_peak("native", channels, n, dtype, training=training) - results * channels * n * dtype.itemsize
        for n in sizes
    )
    assert abs(many - few) <= 4 * MIB
    planned = {
        memory_estimate("channel_attention", (1, channels, n), dtype, training=training).items["workspace"]
        for n in (*sizes, 2**20)
    }
    assert len(planned) == 1


# ---- the estimate


POSITION_CASES = {
    "inference": {"training": False},
    "training": {},
    "bare": {"full": False},
    "bf16": {"dtype": torch.bfloat16},
    "fp64_inference": {"dtype": torch.float64, "training": False},
    "crops": {"crop": 3},
    "more_queries": {"queries": 6000},
}


@for_each_cpu_backend
@pytest.mark.parametrize("case", POSITION_CASES)
def test_estimate_of_position_attention(case, backend):
    channels, d, keys = (256, 32, 4608) if backend == "native" else (64, 16, 3072)
    options = {"dtype": torch.float32, "training": True, "full": True, "crop": 0, "queries": keys}
    options |= POSITION_CASES[case]
    queries = options.pop("queries")
    measured = position_peak(backend, channels, d, queries, keys, **options)
    estimate = memory_estimate(
        "position_attention",
        (1, channels, 2, keys // 2),
        options["dtype"],
        training=options["training"],
        backend=backend,
        query_channels=d,
        queries=queries,
        residual=options["full"],
        copies=options["crop"] > 0,
    )
    assert_close(measured, estimate)


@for_each_cpu_backend
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_estimate_of_channel_attention(dtype, training, backend):
    measured = channel_peak(backend, 512, 18432, dtype, training=training)
    shape = (1, 512, 96, 192)
    assert_close(measured, memory_estimate("channel_attention", shape, dtype, training=training, backend=backend))


def assert_close(measured: int, estimate) -> None:
    """Within 15 %, and 4 MiB that malloc and the threads' stacks may do with."""
    difference = abs(measured - estimate.total)
    assert difference <= 0.15 * measured + 4 * MIB, f"measured {measured / MIB:.1f} MiB\n{estimate}"


@pytest.mark.parametrize("backend", ["auto", "triton", CUDA, "eager"])
@pytest.mark.parametrize("op", ["position_attention", "channel_attention"])
def test_the_items_are_the_estimate(op, backend):
    estimate = memory_estimate(op, (2, 64, 33, 17), torch.float16, training=True, backend=backend)
    assert sum(estimate.items.values()) == estimate.total == int(estimate) > 0
    text = str(estimate)
    assert all(name in text for name in (op, estimate.backend, *estimate.items))
    assert backend in ("auto", estimate.backend)
    with pytest.raises(FrozenInstanceError):
        estimate.items = {}


def test_the_estimate_of_training_holds_that_of_inference():
    for op in ("position_attention", "channel_attention"):
        inference, training = (memory_estimate(op, (1, 512, 97, 97), torch.float32, training=t) for t in (False, True))
        assert inference.total < training.total
    native, eager = (
        memory_estimate("position_attention", (1, 512, 128, 256), torch.float32, backend=backend).total
        for backend in ("auto", "eager")
    )
    assert eager > 8 * 2**30  # two maps of 4 GiB
    assert native <= eager


# ---- the estimate for GPUs


def test_auto_on_a_gpu_takes_the_triton_kernels_where_there_are_some():
    """Else those of CUDA C++, if they are built."""

    def chosen(op: str, dtype: torch.dtype, d: int | None = None, device: str = "cuda", backend: str = "auto") -> str:
        shape = (1, 512, 97, 97)
        return memory_estimate(op, shape, dtype, query_channels=d, device=device, backend=backend).backend

    assert chosen("position_attention", torch.float16, 256) == chosen("channel_attention", torch.float32) == "triton"
    assert chosen("position_attention", torch.float32, 128) == "triton"
    assert chosen("position_attention", torch.float32, 129) == ("cuda" if cuda.is_built() else "eager")
    assert chosen("position_attention", torch.bfloat16, 257) == "eager"
    assert chosen("channel_attention", torch.float64) == "eager"
    assert chosen("channel_attention", torch.float32, device="cpu") in ("native", "eager")
    assert chosen("channel_attention", torch.float32, backend="eager") == "eager"


@pytest.mark.parametrize("backend", ["triton", CUDA, HOPPER])
def test_training_on_a_gpu_meets_its_budget(backend):
    """At 32768 positions in bf16, where the eager form needs 6 GiB."""
    estimate = partial(memory_estimate, "position_attention", dtype=torch.bfloat16, training=True, backend=backend)
    budget = estimate(shape=(1, 512, 128, 256))
    assert budget.total < 190 * MIB
    assert budget.items["packed copies"] == 0
    # What a copy costs: query, key, value and dout, in rows that are longer by a few elements.
    odd = estimate(shape=(1, 512, 32767))
    assert odd.items["packed copies"] == 2 * 32768 * (64 + 64 + 512 + 512)


@pytest.mark.parametrize("backend", ["triton", CUDA, HOPPER])
def test_the_workspace_on_a_gpu_is_bounded(backend):
    def workspace(op: str, batch: int, positions: int) -> int:
        results = ("out", "lse", "attn", "gradients", "row statistics", "delta", "fp32 sums of dquery")
        items = memory_estimate(op, (batch, 512, positions), torch.bfloat16, training=True, backend=backend).items
        return sum(size for name, size in items.items() if not name.startswith(results))

    for op in ("position_attention", "channel_attention"):
        constant = workspace(op, 1, 2**20)
        assert constant == workspace(op, 1, 2**14)
        assert constant or (op, backend) == ("position_attention", "cuda")  # whose sums are of the size of gradients
        assert workspace(op, 65535, 64) <= 300 * MIB
