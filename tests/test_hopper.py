"""The Hopper backend alone: when it refuses, that "auto" leaves it alone, tile edges, packing, NaN and infinity.

Without a Hopper GPU its kernels run on the model of one in tests/cuda_host.
"""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import test_nonfinite
import torch
from cases import PositionCase, Problem, arrange
from on_backend import INTERPRETED, _not_compiled
from tolerance import assert_follows_error_rule, yardsticks

from danet_kernels import available_backends, backends, memory, proven
from danet_kernels.backends import cuda, hopper, native

_reasons = [*available_backends("position_attention")["hopper"], *_not_compiled]
if not INTERPRETED and not _reasons:
    _reasons = hopper.why_not("position_attention", torch.empty(1, 8, 1, dtype=torch.bfloat16, device="cuda"))
runs = pytest.mark.skipif(bool(_reasons), reason=f"backend hopper: {'; '.join(_reasons)}")

HALVES = pytest.mark.parametrize("dtype", ["bf16", "fp16"])
LAYOUTS = pytest.mark.parametrize("layout", ["contiguous", "channels_last"])


def in_layout(problem: Problem, layout: str, *names: str) -> Problem:
    """The tensors with these names, or all of them, in a layout."""
    chosen = names or [name for name, tensor in problem.tensors.items() if tensor.dim() == 3]
    tensors = problem.tensors | {name: arrange(problem.tensors[name], layout) for name in chosen}
    return Problem(problem.op, tensors, problem.dout, problem.options)


def follows(problem: Problem) -> None:
    assert_follows_error_rule(problem, problem.run("hopper"), yardsticks(problem), tensor_cores=True)


# ---- when it refuses


def given(dtype: torch.dtype, channels: int = 64, device: str = "cuda") -> SimpleNamespace:
    """What `why_not` looks at, on a device that need not be there."""
    return SimpleNamespace(dtype=dtype, shape=(1, channels, 9), device=torch.device(device))


@pytest.fixture
def built(monkeypatch):
    """As if the library were loaded, on a machine with an H200."""
    monkeypatch.setattr(cuda, "_not_loaded", [])
    monkeypatch.setattr(cuda, "_on_host", False)
    for module in (cuda, hopper):
        monkeypatch.setattr(module, "capability", lambda device: (9, 0))
    monkeypatch.setattr(native, "build_info", lambda: {"cuda_archs": ["8.0+PTX", "9.0a"], "cuda_source_hash": "0123"})
    for function in (cuda._no_code, cuda.source_hash):
        function.cache_clear()
    yield monkeypatch
    for function in (cuda._no_code, cuda.source_hash):
        function.cache_clear()


@pytest.mark.parametrize(
    ("op", "dtype", "channels", "reason"),
    [
        ("position_attention", torch.bfloat16, 64, None),
        ("position_attention", torch.float16, 1, None),
        ("channel_attention", torch.float16, 1000, None),
        ("channel_attention", torch.float32, 64, "fp32 has no Hopper kernels"),
        ("position_attention", torch.float64, 64, "fp64 has no CUDA kernels"),
        ("position_attention", torch.float16, 65, "at most 64 channels on the Hopper kernels, got 65"),
        ("position_attention", torch.float16, 257, "at most 256 channels, got 257"),
    ],
)
def test_dtypes_and_widths(op, dtype, channels, reason, built):
    reasons = hopper.why_not(op, given(dtype, channels))
    assert len(reasons) == (reason is not None)
    assert reason is None or reason in reasons[0]


def test_other_gpus(built):
    for module in (cuda, hopper):
        built.setattr(module, "capability", lambda device: (8, 0))
    assert hopper.why_not("channel_attention", given(torch.float16)) == [
        "the Hopper kernels need compute capability 9.0, this GPU has 8.0"
    ]


def test_a_library_without_code_for_hopper(built):
    built.setattr(native, "build_info", lambda: {"cuda_archs": ["8.0+PTX"]})
    reason = "the CUDA extension is built without code for 9.0a"
    assert hopper.why_not("position_attention", given(torch.float16)) == [reason]
    built.setattr(torch.cuda, "is_available", lambda: True)
    assert hopper.why_not("position_attention") == [reason]


def test_all_reasons_come_at_once(built):
    built.setattr(cuda, "_not_loaded", ["not here"])
    for module in (cuda, hopper):
        built.setattr(module, "capability", lambda device: (7, 5))
    reasons = hopper.why_not("position_attention", given(torch.float32, 65))
    assert len(reasons) == 5, reasons


# ---- "auto" leaves it alone


@pytest.fixture
def gpu(monkeypatch, tmp_path):
    """Tensors on the CPU count as those on an H200, where nothing but these backends can run."""
    monkeypatch.setattr(proven, "family", lambda device: "sm_90")
    monkeypatch.setattr(proven, "TABLE", tmp_path / "proven.json")
    proven.TABLE.write_text("[]")
    monkeypatch.setattr(proven, "_verdicts", {})
    monkeypatch.setattr(hopper, "why_not", lambda op, *inputs: [])
    monkeypatch.setattr(backends, "BACKENDS", {"hopper": hopper, "eager": backends.eager})
    monkeypatch.setattr(proven, "_checker", lambda: pytest.fail("no self-check may run"))
    proven._table.cache_clear()
    yield
    proven._table.cache_clear()


def test_auto_takes_it_only_with_a_record(gpu, monkeypatch):
    x = torch.ones(1, 2, 3, dtype=torch.bfloat16)
    assert backends.choose("auto", "channel_attention", x) is backends.eager
    assert backends.choose("hopper", "channel_attention", x) is hopper
    assert proven.why_not(hopper, "channel_attention", x) == ["unproven on sm_90: no run on such a GPU is on record"]
    words = 'unproven on sm_90: "auto" never takes it before a run is on record'
    assert proven.status(hopper, "channel_attention", "cpu") == words

    monkeypatch.setattr(proven, "_verdicts", {})
    proven.record("hopper", "channel_attention", "sm_90", hopper.source_hash("channel_attention"), "run.json")
    assert backends.choose("auto", "channel_attention", x) is hopper
    assert backends.choose("auto", "position_attention", x, x, x) is backends.eager


def test_it_is_behind_the_backends_that_run_wherever_it_does():
    names = list(backends.BACKENDS)
    assert names.index("hopper") > names.index("cuda") > names.index("triton")


# ---- tiles of 64 queries, 64 keys and 512 channels of value; clusters of 128 queries


@runs
@LAYOUTS
@HALVES
@pytest.mark.parametrize(
    "shape",
    [(1, 1, 1, 1, 1), (2, 64, 512, 64, 64), (1, 63, 513, 129, 65), (2, 17, 40, 65, 127), (2, 24, 20, 140, 200)],
    ids=str,
)
def test_edges_of_tiles(shape, dtype, layout):
    """B, D, C, M, N"""
    follows(in_layout(PositionCase(*shape, dtype).problem(), layout))


@runs
@LAYOUTS
@pytest.mark.parametrize("N", [63, 192, 193, 385, 900])
def test_rounds_of_the_rings(N, layout):
    """Two slots of keys, three steps of values: from one step to more than two rounds of both."""
    follows(in_layout(PositionCase(1, 40, 24, 70, N, "bf16", scale=0.5).problem(), layout))


@pytest.mark.skipif(bool(native.why_not("position_attention")), reason="the plans are in the extension for the CPU")
@pytest.mark.parametrize(
    ("B", "N", "parts"),
    [
        (1, 9216, 6 * 11),  # 72 tiles for 66 clusters: each of the last 6 goes to 11
        (1, 8448, 0),  # one full round
        (8, 9216, 0),  # the last 48 of 576 tiles are too many to be shared
        (1, 4224, 33 * 2),
        (1, 64, 0),  # one step cannot be shared
    ],
)
def test_tiles_of_the_last_round_are_shared(B, N, parts):
    assert native.plans().hopper_parts(B, 512, N, N, 132) == parts * memory._HOPPER_PART


@runs
@HALVES
@pytest.mark.parametrize(("residual", "gamma"), [(True, 0.75), (False, None), (True, None), (False, -0.5)])
def test_residual_and_gamma(residual, gamma, dtype):
    follows(PositionCase(1, 16, 20, 70, 90, dtype, residual, gamma).problem())


@runs
@LAYOUTS
@HALVES
def test_gamma_zero_is_exact(dtype, layout):
    problem = in_layout(PositionCase(2, 8, 20, 140, 200, dtype, gamma=0.0).problem(), layout)
    results = problem.run("hopper")
    assert torch.equal(results["out"], problem.tensors["residual"])
    assert not any(results[name].any() for name in ("dquery", "dkey", "dvalue"))


@runs
@LAYOUTS
def test_large_logits_keep_their_digits(layout):
    """In the hundreds, where the maximum moves from step to step and rows are nearly one-hot."""
    problem = PositionCase(1, 64, 24, 70, 300, "bf16", scale=8.0).problem()
    follows(in_layout(problem, layout))


# ---- operands that the TMA unit cannot address are packed


WAYS = ("padded", "padded_channels_last", "batch_last", "strided", "same_batch", "same_channel", "same_position")


@runs
@pytest.mark.parametrize("N", [40, 41])
@pytest.mark.parametrize("way", WAYS)
def test_a_packed_operand_gives_the_same_bits(way, N):
    """Also one whose lines or images lie over each other: strides of 0 are none that a tensor map may have."""
    problem = PositionCase(2, 9, 12, 40, N, "bf16").problem()
    for name in ("query", "key", "residual"):
        changed = in_layout(problem, way, name)
        dense = changed.tensors | {name: changed.tensors[name].contiguous()}
        expected = Problem(problem.op, dense, problem.dout, problem.options).run("hopper")["out"]
        assert torch.equal(changed.run("hopper")["out"], expected), name
    follows(in_layout(problem, way, "value"))


# ---- NaN and infinity

CELLS = test_nonfinite.POSITION_CELLS | test_nonfinite.OVERFLOW_CELLS


@runs
@pytest.mark.parametrize(
    "cell",
    [
        *("query_nan", "key_nan", "value_inf", "residual_inf", "gamma_zero_value_inf"),
        *(cell for cell in test_nonfinite.OVERFLOW_CELLS if "all_queries" not in cell),
    ],
)
def test_nonfinite_cell(cell):
    problem = test_nonfinite.position_problem("bf16")
    CELLS[cell](problem)
    zeros = ("dquery", "dkey", "dvalue") if cell == "gamma_zero_value_inf" else ()
    open_kind = cell in test_nonfinite.POSITION_CELLS and "inf" in cell
    test_nonfinite.assert_agrees_with_reference(problem, "hopper", open_kind=open_kind, zeros=zeros)


# ---- the operator


@runs
def test_the_operator_has_no_formula():
    """As those of the other backends: test_registration.py says why."""
    query, key, value = (torch.ones(1, *shape, 3, dtype=torch.bfloat16) for shape in ((2,), (2,), (4,)))
    operator = torch.ops.danet_kernels.position_attention_forward_hopper
    out, _, _ = operator(query, key, value.requires_grad_(), None, None, 1.0, True)
    with pytest.raises(NotImplementedError, match="position_attention_forward_hopper is not implemented for autograd"):
        out.sum().backward()


@runs
@pytest.mark.parametrize(("dtype", "channels"), [(torch.float32, 8), (torch.bfloat16, 65)])
def test_the_operator_guards_itself(dtype, channels):
    query, value = torch.ones(1, channels, 3, dtype=dtype), torch.ones(1, 4, 3, dtype=dtype)
    operator = torch.ops.danet_kernels.position_attention_forward_hopper
    with pytest.raises(RuntimeError, match=r"expected fp16 or bf16|channels of query"):
        operator(query, query, value, None, None, 1.0, True)


# ---- bits


@runs
@LAYOUTS
def test_bits_do_not_vary(layout):
    problem = in_layout(PositionCase(2, 40, 20, 150, 280, "bf16").problem(), layout)
    first, second = (problem.run("hopper")["out"] for _ in range(2))
    assert torch.equal(first, second)
