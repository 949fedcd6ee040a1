"""The benchmarks measure what they say, refuse what makes no sense, and give no time to a kernel that is wrong."""

from __future__ import annotations

import importlib.util
import io
import json
import math
import os
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks import attention_memory, attention_speed, cpu_speed, goals, memory, report
from benchmarks.correctness import Error
from benchmarks.implementations import OPS, Case, attention, make_block, run_block, warm_up
from benchmarks.prediction import predict_extra_memory
from benchmarks.report import Cell
from benchmarks.shapes import CROPS, POSITION_SIZES, Crop, parse_crop
from benchmarks.timing import interleaved

ROOT = Path(__file__).resolve().parent.parent
POSITION, CHANNEL = OPS
SMALL = Crop(128, 96)  # N = 192
HAS_MATPLOTLIB = importlib.util.find_spec("matplotlib") is not None


def refuse(main, arguments, capsys) -> str:
    """The one line that `main` leaves on stderr when it refuses its arguments."""
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    captured = capsys.readouterr()
    assert stopped.value.code == 2
    assert captured.out == ""
    assert captured.err.count("\n") == 1, captured.err
    return captured.err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--crops", "512"], "a crop is HEIGHTxWIDTH"),
        (["--crops", "512x512", "768x76.8"], "got '768x76.8'"),
        (["--crops", "512x500"], "multiples of 8; got 512 x 500"),
        (["--crops", "0x512"], "positive multiples of 8"),
        (["--crops"], "expected at least one argument"),
        (["--dtype", "int8"], "unknown dtype 'int8', expected one of fp32, bf16, fp16"),
        (["--batch", "0"], "--batch must be at least 1, got 0"),
        (["--batch", "two"], "invalid int value"),
        (["--backends", "cudnn"], "unknown backend 'cudnn', expected one of"),
        (["--device", "tpu"], "unknown device 'tpu', expected cpu or cuda"),
        (["--json", "/no/such/folder/out.json"], "there is no folder /no/such/folder"),
        (["--json", "/"], "cannot write /: it is a folder"),
        (["--no-such-option"], "unrecognized arguments"),
    ],
)
def test_memory_options_that_make_no_sense(arguments, message, capsys):
    assert message in refuse(attention_memory.main, arguments, capsys)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_a_gpu_that_is_not_there(capsys):
    for main in (attention_memory.main, attention_speed.main):
        assert "torch sees no GPU" in refuse(main, ["--device", "cuda"], capsys)


def test_plot_without_matplotlib(monkeypatch, capsys):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "matplotlib" else find(name))
    assert "--plot needs matplotlib" in refuse(attention_memory.main, ["--plot", "x.png"], capsys)


@pytest.mark.skipif(not HAS_MATPLOTLIB, reason="matplotlib is not installed")
def test_plot_of_an_unknown_kind(capsys):
    assert "must end in one of" in refuse(attention_memory.main, ["--plot", "x.doc"], capsys)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--backend", "cudnn"], "unknown backend 'cudnn'"),
        (["--crop", "96x"], "a crop is HEIGHTxWIDTH"),
        (["--repeats", "0"], "--repeats must be at least 1, got 0"),
        (["--json", "/no/such/folder/out.json"], "there is no folder"),
        (["--sizes", "1x9216"], "--sizes has no meaning on device cpu"),
        (["--plot", "x.png"], "--plot has no meaning on device cpu"),
    ],
)
def test_speed_options_that_make_no_sense(arguments, message, capsys):
    assert message in refuse(attention_speed.main, ["--device", "cpu", *arguments], capsys)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--crop", "768x768"], "--crop has no meaning on device cuda"),
        (["--large"], "--large has no meaning on device cuda"),
        (["--sizes", "9216"], "a size is BATCHxPOSITIONS, such as 8x9216; got '9216'"),
        (["--sizes", "0x9216"], "got '0x9216'"),
        (["--dtypes", "bf16", "int8"], "unknown dtype 'int8', expected one of fp32, bf16, fp16"),
        (["--peers", "xformers"], "unknown peer 'xformers', expected one of eager, autocast"),
    ],
)
def test_speed_options_that_make_no_sense_on_a_gpu(arguments, message, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert message in refuse(attention_speed.main, ["--device", "cuda", "--backend", "eager", *arguments], capsys)


def test_crops():
    sizes = {str(size): size.crop.spatial for size in POSITION_SIZES}
    assert sizes["8x9216"] == (96, 96)
    assert sizes["1x9409"] == (97, 97)
    assert sizes["1x131072"] == (256, 512)
    assert parse_crop(" 1024 x 2048 ") == CROPS[-1]
    assert [crop.positions for crop in CROPS] == [4096, 9216, 16384, 32768]


@pytest.mark.parametrize("train", [False, True], ids=["forward", "train"])
def test_a_small_run(train, tmp_path):
    """The whole script, as a user starts it: table, exit status, JSON, picture; nothing on a stderr that is a pipe."""
    record, picture = tmp_path / "out.json", tmp_path / "out.png"
    command = [sys.executable, "benchmarks/attention_memory.py", "--device", "cpu", "--crops", "128x96,64x64"]
    command += ["--json", str(record)] + ["--train"] * train + (["--plot", str(picture)] if HAS_MATPLOTLIB else [])
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stdout + run.stderr
    assert run.stderr == ""
    assert "PAM" in run.stdout
    assert "CAM" in run.stdout
    if HAS_MATPLOTLIB:
        assert picture.read_bytes()[:4] == b"\x89PNG"

    content = json.loads(record.read_text())
    assert content["schema"] == 1
    assert content["benchmark"] == "attention_memory"
    assert content["options"]["crops"] == ["64 x 64", "128 x 96"]
    assert content["options"]["train"] is train
    assert {"date", "commit", "torch", "cpu", "threads", "device"} <= content["environment"].keys()
    ours = {cell["implementation"] for cell in content["cells"] if cell["implementation"].startswith("danet:")}
    assert ours
    positions = [cell for cell in content["cells"] if cell["op"] == POSITION]
    assert {cell["implementation"] for cell in positions} == {"eager", "sdpa", "sdpa-padded"} | ours
    for cell in content["cells"]:
        assert cell["status"] == "measured", cell
        assert cell["passes"] is True, cell  # fp32: every implementation is exact
        assert 0 < cell["error_of_limit"] <= 1
        assert 0 <= cell["largest_error"] < 1e-3
        assert cell["peak_extra_bytes"] >= 0
        assert len(cell["runs"]) == attention_memory.REPEATS
        assert cell["seconds"] == sorted(cell["runs"])[1]
    assert all(cell["time_to_eager"] == 1 for cell in content["cells"] if cell["implementation"] == "eager")


def outcome_of(case: Case, wrong) -> Cell:
    cell = Cell(case)
    outcomes = attention_memory.time_block([case], find=lambda op, name: wrong)
    attention_memory.record_outcome(cell, outcomes[case.name])
    return cell


def drop_last_key(query, key, value, residual, gamma):
    flat = key.flatten(2)[..., :-1], value.flatten(2)[..., :-1]
    return attention(POSITION, "eager")(query, *flat, residual, gamma)


def scaled_logits(query, key, value, residual, gamma):
    return attention(POSITION, "eager")(query / 8, key, value, residual, gamma)


def one_nan(query, key, value, residual, gamma):
    out = attention(POSITION, "eager")(query, key, value, residual, gamma)
    return out.flatten(2).index_fill(2, torch.tensor(0), torch.nan).view_as(out)


def detached(which):
    """Right forward, no gradient for one operand."""

    def function(*operands):
        operands = list(operands)
        operands[which] = operands[which].detach() + 0 * operands[which]
        return attention(POSITION, "eager")(*operands)

    return function


def paper_sign(x, gamma):
    from danet_kernels import reference

    return reference.channel_attention(x, gamma, variant="paper")


@pytest.mark.parametrize(
    ("op", "wrong", "train"),
    [
        (POSITION, drop_last_key, False),
        (POSITION, scaled_logits, False),
        (POSITION, one_nan, False),
        *((POSITION, detached(which), True) for which in range(5)),
        (CHANNEL, paper_sign, False),
        (CHANNEL, paper_sign, True),
    ],
    ids=lambda value: getattr(value, "__name__", str(value)),
)
def test_a_wrong_kernel_gets_no_time(op, wrong, train):
    cell = outcome_of(Case(op, "danet:eager", SMALL, train=train), wrong)
    assert cell.status == "wrong"
    assert cell.seconds is None
    assert cell.runs == []
    assert not cell.error.passes
    assert "WRONG" in report.block([cell])
    assert " ms" not in report.block([cell])


@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("train", [False, True], ids=["forward", "train"])
@pytest.mark.parametrize("op", OPS)
def test_a_right_kernel_gets_its_time(op, train, dtype):
    cell = outcome_of(Case(op, "danet:eager", SMALL, dtype, batch=2, train=train), attention(op, "danet:eager"))
    assert cell.status == "measured"
    assert cell.error.passes
    assert cell.seconds > 0
    assert len(cell.runs) == attention_memory.REPEATS


def test_a_kernel_that_raises_is_a_failed_cell():
    def raising(*operands):
        raise RuntimeError("no such\ninstruction")

    cell = outcome_of(Case(POSITION, "danet:eager", SMALL), raising)
    assert cell.status == "failed"
    assert "RuntimeError: no such instruction" in report.block([cell])


def test_the_speed_table_refuses_a_wrong_kernel():
    case = Case(POSITION, "danet:eager", SMALL)
    (row,) = cpu_speed.attention_rows(
        case, 1.4, 1, find=lambda op, name: drop_last_key if name == case.name else attention(op, name)
    )
    assert row.value is None
    assert row.met is None
    assert "WRONG" in goals.line(row)


def test_the_speed_table_compares_with_its_goals():
    rows = cpu_speed.attention_rows(Case(CHANNEL, "danet:eager", SMALL), 1e-6, 3)
    assert [row.met for row in rows] == [True]
    assert rows[0].value == sorted(rows[0].seconds["eager"])[1] / sorted(rows[0].seconds["ours"])[1]
    assert goals.Row("time", 2.0, " us", 1.0, at_least=False).met is False


def make_nothing():
    return None


def make_inputs(mebibytes):
    return torch.ones(mebibytes * 2**18)


def use_scratch(mebibytes, inputs):
    return float(torch.ones(mebibytes * 2**18).sum()) + float(0 if inputs is None else inputs.sum())


def return_output(mebibytes, inputs):
    return torch.ones(mebibytes * 2**18)


def fail(inputs):
    raise ValueError("two\nlines")


def die(inputs):
    os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.parametrize("call", [use_scratch, return_output])
@pytest.mark.parametrize("make", [make_nothing, partial(make_inputs, 200)], ids=["no inputs", "large inputs"])
def test_peak_extra_memory_sees_scratch_and_output_but_not_inputs(make, call):
    measured = memory.peak_extra_memory(make, partial(call, 64), partial(use_scratch, 1, None))
    assert abs(measured - 64 * memory.MIB) < 3 * memory.MIB


def hang(inputs):
    memory.report_progress("still there")
    time.sleep(60)


def test_a_process_that_hangs_is_killed():
    heard = []
    with pytest.raises(memory.CaseFailed, match=r"reported nothing for 3 s and was killed"):
        memory.run_isolated(hang, None, on_progress=heard.append, silence=3)
    assert heard == ["still there"]


def test_a_case_that_fails_or_dies():
    with pytest.raises(memory.CaseFailed, match=r"^ValueError: two lines$"):
        memory.peak_extra_memory(make_nothing, fail)
    with pytest.raises(memory.CaseFailed, match="killed by signal 9"):
        memory.peak_extra_memory(make_nothing, die)


@pytest.mark.parametrize("train", [False, True], ids=["forward", "train"])
@pytest.mark.parametrize(
    ("name", "dtype", "tolerance"),
    [
        ("eager", "fp32", 0.15),
        ("sdpa", "fp32", 0.15),
        ("sdpa-padded", "fp32", 0.3),
        ("eager", "bf16", 0.15),
        ("sdpa", "bf16", 0.15),
    ],
)
def test_predicted_memory(name, dtype, train, tolerance):
    case = Case(POSITION, name, Crop(640, 512), dtype, train=train)  # N = 5120
    measured = memory.peak_extra_memory(partial(make_block, case), partial(run_block, name), partial(warm_up, case))
    assert abs(predict_extra_memory(case) / measured - 1) < tolerance, f"{measured / memory.MIB:.0f} MiB"


def plan(*arguments):
    return attention_memory.plan(attention_memory.parse(["--device", "cpu", "--backends", "eager", *arguments]))


def test_maps_of_gigabytes_are_predicted_unless_asked_for(monkeypatch):
    monkeypatch.setattr(memory, "free_memory", lambda device: 2**50)
    (group, *_), (full, *_) = (plan("--crops", "1024x2048", *more) for more in ([], ["--full"]))
    status = {cell.case.name: cell.status for cell in group}
    assert status == {"eager": "predicted", "sdpa": "predicted", "sdpa-padded": "measured", "danet:eager": "predicted"}
    assert all(cell.status == "measured" for cell in full)
    eager = group[0].memory
    assert 8.2 * memory.GIB < eager < 9 * memory.GIB
    assert "~8," in report.block(group)


def test_a_predicted_time_grows_with_the_map():
    small, large = Crop(1024, 1024), Crop(1024, 2048)
    known = Cell(Case(POSITION, "eager", small), seconds=2.0, runs=[2.0])
    guess = Cell(Case(POSITION, "eager", large), "predicted", memory=1)
    attention_memory.predict_times([[known], [guess]])
    assert guess.seconds == 8.0
    assert "~8,000 ms" in report.block([guess])

    peer = [
        Cell(Case(POSITION, "sdpa-padded", crop), seconds=time, runs=[time])
        for crop, time in ((small, 3.0), (large, 15.0))
    ]
    attention_memory.predict_times([[known, peer[0]], [guess, peer[1]]])
    assert guess.seconds == 10.0


def test_what_does_not_fit_is_not_started(monkeypatch):
    monkeypatch.setattr(memory, "free_memory", lambda device: 64 * memory.MIB)
    groups = plan("--crops", "1024x1024")
    text = report.block(groups[0])
    assert {cell.status for cell in groups[0]} == {"too large"}
    assert "not started: needs 2.2 GiB, 0.1 GiB are free" in text
    assert attention_memory.total_work(groups[0]) == 0


def test_free_memory_is_a_part_of_the_memory():
    assert 0 < memory.free_memory() < os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def test_implementations_take_turns():
    order = []
    seconds = interleaved({name: partial(order.append, name) for name in "ab"}, 3)
    assert order == ["a", "b"] * 3
    assert [len(runs) for runs in seconds.values()] == [3, 3]


def test_words_for_ratios():
    block = [
        Cell(Case(POSITION, "eager", SMALL), memory=100 * memory.MIB, seconds=1.0),
        Cell(Case(POSITION, "danet:native", SMALL), memory=4 * memory.MIB, seconds=2.0, error=Error(1e-6, 0.5)),
    ]
    text = report.block(block)
    assert "25x less" in text
    assert "2.00x slower" in text
    assert "eager needs 25x the memory and 0.50x the time." in report.closing([block], 1.0)


def test_json_has_no_nan():
    cell = Cell(Case(POSITION, "danet:native", SMALL), "wrong", error=Error(math.nan, math.inf))
    (row,) = report.rows([[cell]])
    assert (row["largest_error"], row["error_of_limit"], row["passes"]) == ("nan", "inf", False)


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_progress_only_on_a_terminal(monkeypatch):
    for stream, shown in ((Terminal(), True), (io.StringIO(), False)):
        monkeypatch.setattr(sys, "stderr", stream)
        bar = report.Progress(4)
        bar.label = "position attention"
        bar.advance(2)
        assert ("50 %  position attention" in stream.getvalue()) is shown
