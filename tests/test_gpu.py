"""What only a GPU can show: CUDA graphs, streams, devices, peak memory, tensors of more than 2^31 elements.

The tests of every backend run on the GPU as well where there is one (on_backend.py).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from cases import DTYPES, ChannelCase, PositionCase, Problem, channel_cases, position_cases
from on_backend import moved
from tolerance import HAS_LONG_DOUBLE, assert_follows_error_rule, yardsticks

import danet_kernels
from danet_kernels import available_backends, channel_attention, position_attention, reference
from danet_kernels._error_rule import evaluate

MIB = 2**20


HAS_GPU = torch.cuda.is_available()
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not HAS_GPU, reason="no NVIDIA GPU is visible")]


@pytest.fixture(params=["triton", "cuda", "hopper"])
def backend(request) -> str:
    """Those whose kernels are for GPUs."""
    problem = request.node.callspec.params.get("problem")
    dtype = torch.bfloat16 if problem is None else problem.dout.dtype
    reasons = available_backends("position_attention", torch.empty(1, 16, 1, dtype=dtype, device="cuda"))[request.param]
    if reasons:
        pytest.skip(f"backend {request.param}: {'; '.join(reasons)}")
    return request.param


# All but the slow tests take their kernels from the race and from the self-check: tiles as wide, gamma rounded, sizes
# that are multiples of 16 or are not. benchmarks/gpu_record.py --quick bounds how many are compiled; its test counts.
CASES = {
    "position_bf16": PositionCase(2, 48, 272, 304, 384, "bf16"),
    "position_fp32": PositionCase(1, 48, 272, 304, 384, "fp32"),
    "channel_bf16": ChannelCase(2, 144, 400, "bf16"),
    "channel_fp32": ChannelCase(2, 144, 400, "fp32"),
}
ODD_CASES = {
    "position_odd_bf16": PositionCase(2, 48, 272, 301, 397, "bf16"),
    "channel_odd_bf16": ChannelCase(2, 160, 397, "bf16"),
}


def rounded_gamma(case: PositionCase | ChannelCase) -> Problem:
    problem = case.problem()
    problem.tensors["gamma"] = problem.tensors["gamma"].to(DTYPES[case.dtype])
    return problem


PROBLEMS = {name: rounded_gamma(case) for name, case in (CASES | ODD_CASES).items()}
for_each_problem = pytest.mark.parametrize("problem", PROBLEMS.values(), ids=PROBLEMS)


def needs_memory(gib: float) -> None:
    free, _ = torch.cuda.mem_get_info()
    if free < gib * 2**30:
        pytest.skip(f"needs {gib:g} GiB of free GPU memory, there are {free / 2**30:.1f}")


def training_step(
    problem: Problem, backend: str, tensors: dict[str, torch.Tensor], dout: torch.Tensor
) -> dict[str, torch.Tensor]:
    """The result and all gradients, on the device where the tensors are."""

    def function(**given):
        return getattr(danet_kernels, problem.op)(**given, **problem.options, backend=backend)

    return evaluate(function, tensors, dout)


def on_gpu(problem: Problem, device: str = "cuda") -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    tensors = {name: tensor.to(device) for name, tensor in problem.tensors.items()}
    return tensors, problem.dout.to(device)


def assert_equal(results: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert results.keys() == expected.keys()
    for name, result in results.items():
        assert torch.equal(result.cpu(), expected[name].cpu()), name


# ---- the reference behind the contract, on the GPU once

EAGER_CASES = [*position_cases()[::23], *channel_cases()[::23]]


@pytest.mark.parametrize("case", EAGER_CASES, ids=str)
def test_eager_on_the_gpu(case):
    if case.dtype == "fp64" and not HAS_LONG_DOUBLE:
        pytest.skip("fp64 needs a long double wider than double to be judged")
    problem = case.problem()
    assert_follows_error_rule(problem, problem.run("eager", device="cuda"), yardsticks(problem))


def test_memory_moves_with_all_that_lies_around_it():
    """What tensors in the middle of NaN are on the CPU they are on the GPU: the tests of layouts rely on it."""
    whole = torch.full((4, 6, 8), torch.nan)
    part = whole[1:3, ::2, 3:6].zero_()
    there = moved(part, "cuda")
    assert (there.stride(), there.storage_offset()) == (part.stride(), part.storage_offset())
    assert torch.equal(there.cpu(), part)
    around = torch.empty(0, device="cuda").set_(there.untyped_storage())
    assert int(around.isnan().sum()) == int(whole.isnan().sum())


# ---- the core of the tests of every backend, on kernels that the quick record has


@for_each_problem
@pytest.mark.parametrize("gamma", [0.75, -0.5, 0.0])
def test_error_rule(problem, backend, gamma):
    tensors = problem.tensors | {"gamma": torch.full_like(problem.tensors["gamma"], gamma)}
    problem = Problem(problem.op, tensors, problem.dout, problem.options)
    results = problem.run(backend)
    assert_follows_error_rule(problem, results, yardsticks(problem), tensor_cores=True)
    if gamma == 0.0:
        x, dx = ("residual", "dresidual") if problem.op == "position_attention" else ("x", "dx")
        assert_equal({"out": results["out"], dx: results[dx]}, {"out": tensors[x], dx: problem.dout})


@for_each_problem
def test_twenty_repeats(problem, backend):
    torch.use_deterministic_algorithms(True)
    given = on_gpu(problem)
    expected = training_step(problem, backend, *given)
    for _ in range(20):
        assert_equal(training_step(problem, backend, *given), expected)


# ---- graphs and streams


@for_each_problem
def test_a_graph_is_replayed_three_times(problem, backend):
    """Forward and backward are captured once, and replayed on other numbers; with gamma = 0 at last, where kernels
    leave early without the host knowing."""
    torch.use_deterministic_algorithms(True)
    tensors, dout = on_gpu(problem)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        training_step(problem, backend, tensors, dout)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = training_step(problem, backend, tensors, dout)
    for replay in range(3):
        for tensor in tensors.values():
            tensor.mul_(-0.5 if replay < 2 else 1)
        if replay == 2:
            tensors["gamma"].zero_()
        graph.replay()
        torch.cuda.synchronize()
        assert_equal(captured, training_step(problem, backend, tensors, dout))


@for_each_problem
def test_a_side_stream(problem, backend):
    """The inputs are late on a stream of their own: kernels on another would read NaN."""
    torch.use_deterministic_algorithms(True)
    tensors, dout = on_gpu(problem)
    expected = training_step(problem, backend, tensors, dout)
    late = {name: torch.full_like(tensor, torch.nan) for name, tensor in tensors.items()}
    torch.cuda.synchronize()
    with torch.cuda.stream(torch.cuda.Stream()):
        torch.cuda._sleep(100_000_000)
        for name, tensor in tensors.items():
            late[name].copy_(tensor)
        results = training_step(problem, backend, late, dout)
    torch.cuda.synchronize()
    assert_equal(results, expected)


@for_each_problem
def test_a_device_that_is_not_the_current_one(problem, backend):
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs, there is one")
    torch.use_deterministic_algorithms(True)
    expected = training_step(problem, backend, *on_gpu(problem, "cuda:0"))
    with torch.cuda.device(0):
        results = training_step(problem, backend, *on_gpu(problem, "cuda:1"))
    assert {result.device.index for result in results.values()} == {1}
    assert_equal(results, expected)


@for_each_problem
def test_compiled_into_graphs(problem, backend):
    """torch.compile with mode="reduce-overhead": it captures graphs of its own."""
    torch.compiler.reset()
    tensors, dout = on_gpu(problem)

    def function(tensors):
        return getattr(danet_kernels, problem.op)(**tensors, **problem.options, backend=backend) * 2

    compiled = torch.compile(function, mode="reduce-overhead", fullgraph=True)
    for _ in range(3):
        results = []
        for call in (compiled, function):
            torch.compiler.cudagraph_mark_step_begin()
            leaves = {name: tensor.clone().requires_grad_() for name, tensor in tensors.items()}
            out = call(leaves)
            results.append([out.detach().clone(), *torch.autograd.grad(out, list(leaves.values()), dout)])
        for got, wanted in zip(*results, strict=True):
            torch.testing.assert_close(got, wanted, rtol=2e-2, atol=2e-2 * float(wanted.abs().max()))
    torch.compiler.reset()


@pytest.mark.slow  # compiles every tile on offer
def test_tuning_on_request(monkeypatch):
    """Whichever tiles are the fastest, they follow the rule."""
    monkeypatch.setenv("DANET_KERNELS_AUTOTUNE", "1")
    for case in (PositionCase(1, 64, 128, 500, 600, "bf16"), ChannelCase(1, 200, 900, "bf16")):
        problem = case.problem()
        assert_follows_error_rule(problem, problem.run("triton"), yardsticks(problem), tensor_cores=True)


# ---- memory


def block(backend: str, op: str, positions: int, training: bool, device: str) -> Callable[[], Any]:
    """A call at (1, 512, positions) in bf16: the result, and all gradients when training."""

    def normal(channels: int) -> torch.Tensor:
        values = torch.randn(1, channels, positions, device=device, dtype=torch.bfloat16)
        return values.mul_(0.1).requires_grad_(training)

    gamma = torch.tensor([0.5], device=device, dtype=torch.bfloat16, requires_grad=training)
    function = getattr(danet_kernels, op)
    channels = (64, 64, 512, 512) if op == "position_attention" else (512,)
    inputs = [*map(normal, channels), gamma]  # query, key, value, residual, or x
    dout = normal(512).detach()

    def call():
        out = function(*inputs, backend=backend)
        return out, torch.autograd.grad(out, inputs, dout) if training else None

    return call


def peak(backend: str, op: str, positions: int, training: bool) -> int:
    """Bytes that `block` takes on top of its inputs, results included."""
    torch.cuda.empty_cache()
    call = block(backend, op, positions, training, "cuda")
    call()
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    results = call()
    torch.cuda.synchronize()
    assert results[0].isfinite().all()
    return torch.cuda.max_memory_allocated() - before


@pytest.mark.parametrize("training", [False, True])
def test_position_attention_is_linear_in_the_positions(backend, training):
    """An N x N map, of any dtype, would take sixteen times as much for four times the positions."""
    few, many = (peak(backend, "position_attention", positions, training) for positions in (8192, 32768))
    assert many <= 4 * few + 2 * MIB
    assert many < 32768**2 / 4


def test_training_at_32768_positions_takes_what_was_promised(backend):
    assert peak(backend, "position_attention", 32768, training=True) < 190 * MIB


@pytest.mark.parametrize("training", [False, True])
def test_the_workspace_of_channel_attention_does_not_grow(backend, training):
    """What comes with more positions is out and, in training, dx."""
    few, many = (peak(backend, "channel_attention", positions, training) for positions in (16384, 65536))
    results = (65536 - 16384) * 512 * 2 * (2 if training else 1)
    assert many - few <= results + 8 * MIB


# ---- more than 2^31 elements

MANY = 2**22 + 8  # times 512 channels


@pytest.mark.large_memory
def test_more_than_2_to_the_31_results(backend):
    needs_memory(24)
    query = torch.randn(1, 16, MANY, device="cuda", dtype=torch.bfloat16)
    key = torch.randn(1, 16, 100, device="cuda", dtype=torch.bfloat16)
    value = torch.randn(1, 512, 100, device="cuda", dtype=torch.bfloat16)
    out = position_attention(query, key, value, backend=backend)
    for chosen in (slice(0, 300), slice(MANY - 300, None)):
        expected = reference.position_attention(query[:, :, chosen].double(), key.double(), value.double())
        torch.testing.assert_close(out[:, :, chosen].double(), expected, rtol=2e-2, atol=2e-2)


@pytest.mark.large_memory
def test_more_than_2_to_the_31_values(backend):
    """The weights are those of the last keys alone, which lie beyond the reach of 32 bits."""
    needs_memory(24)
    query = torch.ones(1, 16, 70, device="cuda", dtype=torch.bfloat16)
    key = torch.full((1, 16, MANY), -8.0, device="cuda", dtype=torch.bfloat16)
    key[:, :, -3:] = 8
    value = torch.zeros(1, 512, MANY, device="cuda", dtype=torch.bfloat16)
    value[:, :, -3:] = torch.arange(512, device="cuda", dtype=torch.bfloat16)[None, :, None]
    out = position_attention(query, key, value, backend=backend)
    torch.testing.assert_close(out, value[:, :, -1:].expand_as(out), rtol=1e-2, atol=0)


@pytest.mark.large_memory
@pytest.mark.parametrize("channels_last", [False, True])
def test_channel_attention_of_more_than_2_to_the_31_elements(backend, channels_last):
    needs_memory(40)
    shape = (1, MANY, 512) if channels_last else (1, 512, MANY)
    x = torch.randn(shape, device="cuda", dtype=torch.bfloat16).mul_((3 / MANY**0.5) ** 0.5)
    x = x.transpose(1, 2) if channels_last else x
    gram = sum(part.double() @ part.double().transpose(1, 2) for part in x.split(2**16, dim=2))
    expected = torch.softmax(-gram, dim=-1) @ x[:, :, -300:].double()
    leaf = x.detach().requires_grad_()
    out = channel_attention(leaf, residual=False, backend=backend)
    size = float(expected.abs().max())
    torch.testing.assert_close(out[:, :, -300:].double(), expected, rtol=2e-2, atol=2e-2 * size)
    (dx,) = torch.autograd.grad(out, leaf, torch.ones_like(out))
    assert dx.isfinite().all()


def many_images(batch: int, device: str) -> list[torch.Tensor]:
    """query, key, value, residual and gamma."""
    options = {"device": device, "dtype": torch.bfloat16}
    tensors = [torch.randn(batch, channels, 5, **options) for channels in (48, 48, 272, 272)]
    return [*tensors, torch.full((1,), 0.75, **options)]


def test_a_batch_of_65535(backend):
    needs_memory(4)
    inputs = many_images(65535, "cuda")
    out = position_attention(*inputs, backend=backend)
    expected = position_attention(*inputs, backend="eager")
    torch.testing.assert_close(out, expected, rtol=4e-2, atol=4e-2)
