"""The race of the GPU kernels without a GPU: goals, tables, peers, and what becomes of a group that dies."""

from __future__ import annotations

import argparse
import json
import sys
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from torch._subclasses import FakeTensorMode

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks import attention_speed, dry_run, goals, gpu_goals, gpu_measure, gpu_report, gpu_speed, gpu_timing, peers
from benchmarks.correctness import Gate
from benchmarks.gpu_cells import CHANNEL, MODES, POSITION, STEP, Group, flops, least_bytes
from benchmarks.implementations import Case, make_block
from benchmarks.shapes import Size
from danet_kernels import _error_rule, reference

SMALL = Size(2, 60)


# ---- goals and tables


def race(rate: float = 500e12, **rates: float) -> gpu_report.Figures:
    """A race with a cell for all; rates: useful FLOP per second by implementation, others have 100 TFLOP/s."""
    figures = gpu_report.Figures()
    for group in gpu_speed.plan("triton", dtypes=["bf16"]):
        figures.ceilings[str(group)] = {"gemm": 1.4e-3, "copy": 1.25e-4}
        for cell in group.cells():
            own = rate if cell.ours else rates.get(cell.implementation, 100e12)
            work = flops(POSITION if group.op == STEP else group.op, group.size, cell.mode)
            cell.status, cell.timed_by, cell.error_of_limit = "measured", "graph", 0.5
            cell.seconds = cell.whole_seconds = work / own
            cell.peak_extra_bytes = 180 * 2**20 if cell.ours else 2**33
            figures.add(cell.row())
    return figures


def verdicts(figures: gpu_report.Figures) -> dict[str, bool | None]:
    errors = [{"deviation": deviation, "ours": 1e-3, "eager": 1e-2} for deviation in (1, 8, 30)]
    return {row.name: row.met for row in gpu_goals.rows(figures, "triton", errors)}


def test_goals_of_a_fast_race_are_met():
    assert set(verdicts(race(700e12)).values()) == {True}


def test_goals_are_held_to_the_best_peer_and_to_the_worst_size():
    found = verdicts(race(460e12, **{"sdpa-cudnn": 450e12}))
    assert found["position forward"] is True
    assert found["position forward, to the best stock memory-linear peer"] is False
    assert found["position forward, to SDPA efficient"] is True

    figures = race(700e12)
    slow = figures.cell(POSITION, Size(1, 131072), "bf16", "danet:triton", "forward")
    figures.add(slow | {"seconds": 2 * slow["seconds"]})
    row = gpu_goals.rows(figures, "triton", [])[0]
    assert (row.name, row.met, round(row.value)) == ("position forward", False, 350)
    assert "8x9216: 700" in row.note
    assert "1x131072: 350" in row.note


def test_a_peer_that_torch_does_not_bring_counts_against_the_backward_alone():
    found = verdicts(race(700e12, flash3=690e12))
    assert found["position forward, to the best stock memory-linear peer"] is True
    assert found["position backward, to the best memory-linear peer"] is False


def test_what_holds_a_map_is_no_rival():
    found = verdicts(race(700e12, compile=690e12))
    assert found["position forward, to the best stock memory-linear peer"] is True


@pytest.mark.parametrize("backend", gpu_goals.GOALS)
def test_goals_without_figures_are_neither_met_nor_missed(backend):
    rows = gpu_goals.rows(gpu_report.Figures(), backend, [])
    assert {row.met for row in rows} == {None}
    assert goals.count(rows) == f"0 of {len(rows)} goals met"


def test_each_backend_has_goals_of_its_own():
    by_backend = {
        backend: {row.name: row.goal for row in gpu_goals.rows(gpu_report.Figures(), backend, [])}
        for backend in ("triton", "cuda")
    }
    assert [found["position forward"] for found in by_backend.values()] == [430, 250]
    assert [found["position backward, to SDPA efficient"] for found in by_backend.values()] == [6, 4]
    assert set(by_backend["cuda"]) < set(by_backend["triton"])


def test_work_and_bytes():
    size = Size(1, 9216)
    assert flops(POSITION, size, "forward") == 1152 * 9216**2
    assert flops(POSITION, size, "training") == (1152 + 2432) * 9216**2
    assert flops(CHANNEL, size, "backward") == 6 * 512**2 * 9216
    assert least_bytes(POSITION, size, "forward", "bf16") == 2 * 9216 * (2 * 64 + 3 * 512)
    assert least_bytes(CHANNEL, Size(8, 9216), "training", "fp32") == 4 * 8 * 9216 * 5 * 512


def test_tables_tell_rates_marks_and_reasons():
    figures = race(500e12)
    size = Size(8, 9216)
    for name, change in (
        ("flex", {"timed_by": "events: no capture"}),
        ("flash3", {"status": "cannot run", "seconds": None}),
    ):
        figures.add(figures.cell(POSITION, size, "bf16", name, "forward") | change)
    text = gpu_report.tables(figures, (POSITION, size, "bf16"), "danet:triton")
    assert "### position attention, B = 8, N = 9216, bf16, forward" in text
    forward = {line.split("|")[1].strip(): line.split("|")[2:] for line in text.splitlines() if line.startswith("| ")}
    assert {"eager (map)", "FlexAttention (events)", "SDPA efficient"} <= forward.keys()
    assert "- flash-attn 3, 2 heads: cannot run" in text
    assert "- FlexAttention: timed by events: no capture" in text
    share = round(100 * 500e12 / (2 * 8192**3 / 1.4e-3))
    assert f" 500.0 |    {share} % |" in text
    widths = {len(line) for line in text.split("\n\n")[1].splitlines()}
    assert len(widths) == 1


def test_a_backward_lost_in_noise_has_no_rate():
    figures = race()
    cell = figures.cell(CHANNEL, Size(1, 9216), "bf16", "danet:triton", "training")
    figures.add(cell | {"seconds": 1e-9})
    assert figures.seconds(CHANNEL, Size(1, 9216), "bf16", "danet:triton", "backward") is None
    assert figures.rate(CHANNEL, Size(1, 9216), "bf16", "danet:triton", "backward") is None


def test_the_race_as_a_script(tmp_path, monkeypatch, capsys):
    group = Group(CHANNEL, SMALL, "fp32", ("eager", "danet:eager"), 3, "cpu")
    monkeypatch.setattr(gpu_speed, "plan", lambda *arguments: [group])
    options = argparse.Namespace(device="cpu", backend="eager", sizes=[SMALL], dtypes=["fp32"], peers=None, repeats=3)
    options.json, options.plot = str(tmp_path / "race.json"), None
    assert attention_speed.race_on_gpu(options) == 0
    out = capsys.readouterr().out
    assert "forward 2 (D + C) N N B" in out
    assert "### channel attention, B = 2, N = 60, fp32, training" in out
    content = json.loads((tmp_path / "race.json").read_text())
    assert content["benchmark"] == "attention_speed_gpu"
    assert content["options"]["sizes"] == ["2x60"]
    assert {cell["status"] for cell in content["cells"]} == {"measured"}
    assert content["environment"]["ceilings"] == {str(group): {"gemm": 0.002, "copy": 0.004}}


def test_a_timing_that_dies_fails_the_cells_that_have_no_time(monkeypatch):
    """A crash while all are being timed is nobody's; what was known before stays."""
    group = Group(POSITION, SMALL, "fp32", ("eager", "missing"), device="cpu")
    rows = [replace(cell, status="cannot run" if cell.implementation == "missing" else "") for cell in group.cells()]

    def dies(function, group, on_progress, silence):
        for index, cell in enumerate(rows):
            on_progress(("begin", index))
            if cell.status:
                on_progress(("cell", index, cell.row()))
        on_progress(("timing",))
        raise gpu_speed.memory.CaseFailed("its process was killed by signal 9")

    monkeypatch.setattr(gpu_speed.memory, "run_isolated", dies)
    figures = gpu_report.Figures()
    gpu_speed.run_group(group, figures.add, lambda seconds: None)
    fates = {(cell["implementation"], cell["mode"]): cell["status"] for cell in figures.cells()}
    assert fates == {
        (name, mode): fate for name, fate in (("eager", "failed"), ("missing", "cannot run")) for mode in MODES
    }


# ---- the clock, on a CUDA that is none


class Event:
    def __init__(self, enable_timing):
        assert enable_timing

    def record(self):
        self.at = len(LOG)

    def elapsed_time(self, stop):
        """Milliseconds: as many as calls in between."""
        return stop.at - self.at


LOG: list[str] = []


class Graph:
    """Captures by running; replays by running again."""

    def replay(self):
        self.call()


@pytest.fixture
def clock(monkeypatch):
    """A GpuClock of a small GPU that is none: CUDA's objects note in LOG what is asked of them."""
    LOG.clear()

    @contextmanager
    def capture(graph, pool, stream):
        graph.call = lambda: LOG.append("replay")
        LOG.append("capture")
        yield
        if "no capture" in LOG:
            raise RuntimeError("operation not permitted when stream is capturing")

    fakes = {
        "Stream": lambda: argparse.Namespace(wait_stream=lambda other: None),
        "current_stream": lambda: None,
        "stream": lambda stream: nullcontext(),
        "graph_pool_handle": lambda: 1,
        "graph": capture,
        "CUDAGraph": Graph,
        "Event": Event,
        **{name: lambda: None for name in ("synchronize", "empty_cache", "reset_peak_memory_stats")},
        "memory_allocated": lambda: 100,
        "max_memory_allocated": lambda: 164,
    }
    for name, fake in fakes.items():
        monkeypatch.setattr(torch.cuda, name, fake)
    for name, value in (("FLUSH_BYTES", 16), ("GEMM_SIZE", 8), ("COPY_BYTES", 16)):
        monkeypatch.setattr(gpu_timing, name, value)
    return gpu_timing.GpuClock("cpu")


def test_calls_are_captured_once_and_replayed_in_turns(clock, monkeypatch):
    a = clock.prepare(lambda: LOG.append("a"))
    b = gpu_timing.Timed(lambda: LOG.extend("bb"), "events: of course")
    assert (a.how, LOG) == ("graph", ["a", "capture", "a"])
    LOG.clear()
    seconds = clock.interleaved({"a": a, "b": b}, 4)
    assert LOG == ["replay", "b", "b"] * 5  # once to warm up
    assert seconds == {"a": [1e-3] * 4, "b": [2e-3] * 4}
    for longest, rounds in ((9e-3, 3), (12e-3, 4), (1e-4, 3)):  # one round takes 3 ms
        monkeypatch.setattr(gpu_timing, "LONGEST", longest + 1e-9)
        assert len(clock.interleaved({"a": a, "b": b}, 25)["a"]) == rounds
    assert len(clock.interleaved({"a": a}, 1)["a"]) == 1


def test_what_cannot_be_captured_is_timed_as_it_is(clock):
    call = partial(LOG.append, "no capture")
    timed = clock.prepare(call)
    assert timed.how == "events: RuntimeError: operation not permitted when stream is capturing"
    assert timed.run is call
    assert timed.result is None
    assert clock.prepare(call, 64 * 2**30).how == "events: a graph would keep 64 GiB from the others"
    assert LOG == ["no capture", "capture", "no capture"]


def test_memory_and_ceilings(clock):
    assert clock.peak(lambda: LOG.append("call")) == 64
    assert {name: timed.how for name, timed in clock.ceilings().items()} == {"gemm": "graph", "copy": "graph"}
    assert gpu_timing.gemm_rate(1.4e-3) == 2 * gpu_timing.GEMM_SIZE**3 / 1.4e-3
    assert gpu_timing.copy_rate(1.0) == 2 * gpu_timing.COPY_BYTES


def test_a_graph_that_computes_something_else_is_found():
    out, replayed = torch.ones(3), torch.ones(3)
    gpu_measure._check_replay(gpu_timing.Timed(partial(replayed.fill_, 1), result=(replayed,)), out)
    for wrong in (partial(replayed.fill_, 2), lambda: None):  # the second writes nothing
        with pytest.raises(RuntimeError, match="its CUDA graph returns something else"):
            gpu_measure._check_replay(gpu_timing.Timed(wrong, result=(replayed,)), out)


# ---- peers


@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("name", ["eager", "autocast", "sdpa-efficient", "sdpa-cudnn", "sdpa-flash"])
def test_peers_compute_position_attention(name, dtype):
    """In their own layouts, with heads and zeros; the SDPA kernels of a GPU are replaced by that of the CPU."""
    block = make_block(Case(POSITION, name, Size(2, 91).crop, dtype, 2, True))
    peer = dry_run.find(POSITION, name)
    if reason := peer.why_not(dtype, True):
        assert reason == "takes bf16 and fp16, not fp32"
        return
    out = peer.call(*block.operands())
    assert out.stride() == block.features.stride()
    error = Gate(block).check(out, peer.call)
    assert error.relative < {"fp32": 1e-5, "bf16": 2e-2, "fp16": 3e-3}[dtype]


def test_layouts_of_peers():
    query, key, value = torch.randn(2, 64, 12), torch.randn(2, 64, 12), torch.randn(2, 512, 12)
    for heads, width, expected in ((1, None, 64), (4, None, 64), (4, 128, 128)):
        packed = peers.split_heads(query, key, value, heads=heads, width=width)
        assert [tuple(tensor.shape) for tensor in packed] == [(2, heads, 12, width or 64)] * 2 + [
            (2, heads, 12, 512 // heads)
        ]
        assert all(tensor.stride(-1) == 1 for tensor in packed)
        assert packed[0].shape[-1] == expected
        assert packed[0].is_contiguous(), "repeated in memory, not by a stride of zero"


def test_what_a_peer_cannot_do():
    flash3 = peers.find(POSITION, "flash3")
    assert flash3.why_not("bf16", True) == "forward only in this configuration"
    assert flash3.why_not("bf16", False) == "flash_attn_interface is not installed"
    assert peers.find(POSITION, "sdpa-cudnn").why_not("fp32", False) == "takes bf16 and fp16, not fp32"
    assert (
        peers.find(POSITION, "danet:eager:deterministic").why_not("bf16", False) == "differs in the backward pass alone"
    )
    assert peers.find(CHANNEL, "danet:eager").why_not("fp32", True) is None


def test_deterministic_mode_ends_with_its_call():
    seen = []
    peer = peers.ours(POSITION, "eager", deterministic=True)
    with peer.context():
        seen.append((torch.are_deterministic_algorithms_enabled(), torch.utils.deterministic.fill_uninitialized_memory))
    seen.append((torch.are_deterministic_algorithms_enabled(), torch.utils.deterministic.fill_uninitialized_memory))
    assert seen == [(True, False), (False, True)]


# ---- the yardsticks of the gate, where the inputs are


@pytest.mark.parametrize("op", [POSITION, CHANNEL])
def test_yardsticks_need_no_tensor_on_the_cpu(op):
    """A gate on a GPU computes there: at N = 131072 the CPU would take half a minute per group of cells."""
    with FakeTensorMode():
        query, value = torch.empty(1, 8, 5, device="cuda"), torch.empty(1, 16, 5, device="cuda")
        inputs = {"query": query, "key": query, "value": value} if op == POSITION else {"x": value}
        generator = torch.Generator().manual_seed(0)
        # Without dout: torch's autograd of imaginary GPU tensors needs a torch that is built for GPUs.
        found = _error_rule._shuffled(getattr(reference, op), inputs, None, torch.float32, generator)
        assert found["out"].device.type == "cuda"
