"""The record of a GPU run, rehearsed without a GPU: every fate of a cell, cuts, steps, and what counts as proof."""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import danet_kernels
from benchmarks import gpu_checks, gpu_page, gpu_plan, gpu_proof, gpu_record, gpu_speed, gpu_steps, peers
from benchmarks.gpu_cells import CHANNEL, POSITION, STEP, Cell
from benchmarks.gpu_file import open_record
from benchmarks.shapes import Size

ROOT = Path(__file__).resolve().parent.parent


# ---- the dry run


def dry_run_command(output: Path, *more: str) -> list[str]:
    return [sys.executable, "benchmarks/gpu_record.py", "--dry-run", "--output", str(output), *more]


def contents(folder: Path) -> dict[Path, str]:
    files = [*(folder / "benchmarks" / "results").iterdir(), folder / "danet_kernels" / "proven.json"]
    return {file: hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


def the_record(folder: Path) -> Path | None:
    return next(folder.glob("*-gpu.json"), None)


@pytest.fixture(scope="module")
def rehearsal(tmp_path_factory):
    """A dry run that is killed in its first race, then the same command again: the record after each."""
    output = tmp_path_factory.mktemp("record")
    before = contents(ROOT)
    environment = {
        name: value for name, value in os.environ.items() if name not in ("TRITON_INTERPRET", "TRITON_CACHE_DIR")
    }
    with subprocess.Popen(dry_run_command(output), cwd=ROOT, env=environment, stdout=subprocess.DEVNULL) as process:
        deadline = time.monotonic() + 120
        while (path := the_record(output)) is None or not json.loads(path.read_text())["cells"]:
            assert process.poll() is None, "the dry run ended before its first cell"
            assert time.monotonic() < deadline
            time.sleep(0.02)
        process.send_signal(signal.SIGKILL)
    cut = json.loads(path.read_text())
    run = subprocess.run(
        dry_run_command(output), cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120, check=False
    )
    assert contents(ROOT) == before, "a dry run has written into the tree"
    return argparse.Namespace(cut=cut, run=run, path=path, record=json.loads(path.read_text()))


def test_a_cut_loses_nothing(rehearsal):
    cut, record = rehearsal.cut, rehearsal.record
    assert not cut["complete"]
    done = cut["steps"]
    assert {"compile", "self-check"} <= done.keys() < set(record["plan"])
    assert {name: record["steps"][name] for name in done} == done, "a step was run again"
    assert record["complete"]
    assert list(record["steps"]) == record["plan"]
    assert [path.name for path in rehearsal.path.parent.glob("*.json")].count(rehearsal.path.name) == 1
    assert the_record(rehearsal.path.parent) == rehearsal.path


def test_it_says_that_it_is_a_dry_run(rehearsal):
    page = rehearsal.path.with_suffix(".md").read_text()
    for text in (rehearsal.run.stdout, page):
        assert "DRY RUN, nothing here is a measurement" in text
    assert "dry-run" in rehearsal.path.name
    assert rehearsal.record["identity"]["gpu"] == "DRY RUN"
    assert all(entry["family"] == "DRY RUN" for entry in json.loads(proof_of(rehearsal).read_text()))


def proof_of(rehearsal) -> Path:
    return rehearsal.path.with_name("dry-run-proven.json")


def test_every_fate_of_a_cell(rehearsal):
    rows = [cell for cell in rehearsal.record["cells"] if (cell["op"], cell["dtype"]) == (POSITION, "fp32")]
    for mode in ("forward", "training"):
        found = {cell["implementation"]: cell for cell in rows if cell["mode"] == mode}
        fates = {name: cell["status"] for name, cell in found.items()}
        assert fates == {
            **{
                "eager": "measured",
                "sdpa-efficient": "measured",
                "uncapturable": "measured",
                "danet:eager": "measured",
            },
            **{"autocast": "cannot run", "missing": "cannot run"},
            **{"raises": "failed", "out-of-memory": "failed", "dies": "failed"},
            **{"wrong": "wrong", "danet:wrong": "wrong"},
        }
        assert found["raises"]["detail"] == "NotImplementedError: no kernel for this head dimension"
        assert found["dies"]["detail"] == "its process was killed by signal 9"
        assert found["uncapturable"]["timed_by"].startswith("events: operation not permitted")
        for cell in found.values():
            timed = cell["status"] == "measured"
            assert (cell["seconds"] is not None) is (cell["whole_seconds"] is not None) is timed
            assert (cell["peak_extra_bytes"] is not None) is timed
            assert bool(cell["detail"]) is not timed
    page = rehearsal.path.with_suffix(".md").read_text()
    assert "- danet:wrong: WRONG:" in page
    assert "uncapturable (events)" in page


def test_every_op_and_mode_has_cells(rehearsal):
    found = {(cell["op"], cell["mode"]) for cell in rehearsal.record["cells"] if cell["seconds"] is not None}
    assert found == {(op, mode) for op in (POSITION, CHANNEL) for mode in ("forward", "training")} | {
        (STEP, "training")
    }
    deterministic = [cell for cell in rehearsal.record["cells"] if cell["implementation"].endswith(":deterministic")]
    assert {cell["mode"]: cell["status"] for cell in deterministic} == {"forward": "cannot run", "training": "measured"}


def test_a_wrong_kernel_is_not_proven_and_a_right_one_is(rehearsal):
    assert rehearsal.run.returncode == 1, rehearsal.run.stdout + rehearsal.run.stderr
    assert rehearsal.record["steps"]["proof"]["status"] == "failed"
    lines = rehearsal.record["steps"]["proof"]["detail"].splitlines()
    assert lines[0].startswith(f"{POSITION}: danet:wrong, B = 2, N = 60, fp32, forward: wrong")
    assert lines[1] == f"{CHANNEL}: entered"
    entries = json.loads(proof_of(rehearsal).read_text())
    assert [(entry["op"], entry["evidence"]) for entry in entries] == [(CHANNEL, rehearsal.path.name)]


def test_a_call_without_time_says_what_is_left(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(gpu_record.memory, "run_isolated", lambda function, *arguments, **options: function(*arguments))
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    status = gpu_record.main(["--dry-run", "--output", str(tmp_path), "--budget", "0"])
    assert status == gpu_record.UNFINISHED
    out = capsys.readouterr().out
    assert "no time is left for: compile" in out
    assert "9 steps are left: run the same command again." in out
    assert "not complete" in the_record(tmp_path).with_suffix(".md").read_text()


def test_proof_waits_for_every_part(tmp_path, capsys):
    run = make_run(tmp_path, ["compile", "race", "proof"])
    taken = []

    def step(name: str, part: str) -> gpu_plan.Step:
        return gpu_plan.Step(name, part, lambda run, left: taken.append(name) or gpu_steps.outcome(True), 0)

    steps = [step("compile", "tests"), step("race", "speed"), step("proof", "")]
    gpu_record.go_on(run, [steps[0], steps[2]], 60, time.perf_counter())
    assert taken == ["compile"]
    gpu_record.go_on(run, steps, 60, time.perf_counter())
    gpu_record.go_on(run, steps, 0, time.perf_counter())
    assert taken == ["compile", "race", "proof", "proof"]


def test_a_step_that_is_cut_is_not_done(tmp_path, capsys):
    run = make_run(tmp_path)

    def cut(run, left):
        raise gpu_steps.Cut

    gpu_record.go_on(run, [gpu_plan.Step("compile", "tests", cut, 0)], 60, time.perf_counter())
    assert run.record.content["steps"] == {}
    assert "compile: cut off, to be run again" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--quick", "--full"], "--quick and --full: one of them"),
        (["--part", "tests"], "--part is for --full"),
        (["--full", "--part", "all"], "unknown part 'all', expected one of tests, sanitizers, speed"),
        (["--dry-run", "--output", str(ROOT / "benchmarks" / "results")], "leaves benchmarks/results alone"),
        pytest.param(
            ["--quick"],
            "torch sees no GPU; --dry-run rehearses without one",
            marks=pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here"),
        ),
    ],
)
def test_options_that_make_no_sense(arguments, message, capsys):
    with pytest.raises(SystemExit) as stopped:
        gpu_record.main(arguments)
    assert stopped.value.code == 2
    captured = capsys.readouterr()
    assert message in captured.err
    assert captured.err.count("\n") == 1


# ---- what it consists of


def test_the_quick_record_measures_what_matters():
    groups = gpu_plan.quick_groups("triton")
    assert (groups[0].op, groups[0].size) == (POSITION, Size(8, 9216))
    assert (groups[-1].op, groups[-1].size) == (POSITION, Size(1, 131072))
    found = {(group.op, str(group.size), group.dtype): set(group.names) for group in groups}
    assert len(found) == len(groups)
    sizes = ["1x9216", "8x9216", "1x9409", "1x16384", "1x32768", "1x131072"]
    position = {size: found[POSITION, size, "bf16"] for size in sizes}
    compiled = [size for size, names in position.items() if names & {"compile", "flex"}]
    assert compiled == ["1x9216", "8x9216", "1x32768"]
    plain = {"eager", "autocast", "sdpa-efficient", "sdpa-cudnn", "sdpa-flash", "flash3"}
    for names in position.values():
        assert plain | {"danet:triton", "danet:triton:deterministic"} <= names
    assert [key for key in found if key[2] == "fp32"] == [(POSITION, "1x9216", "fp32")]
    assert {key[:2] for key in found if key[0] == CHANNEL} == {(CHANNEL, "1x9216"), (CHANNEL, "8x9216")}
    assert (STEP, "8x9216", "bf16") in found


def test_the_full_race_has_every_size_dtype_and_peer():
    groups = gpu_speed.plan("triton")
    position = [group for group in groups if group.op == POSITION]
    assert {group.dtype for group in position} == {"bf16", "fp16", "fp32"}
    assert len(position) == 18
    assert all(peers.peers(POSITION).keys() < set(group.names) for group in position)
    chosen = gpu_speed.plan("triton", [Size(1, 100)], ["fp16"], ["eager"])
    assert [(group.op, group.names) for group in chosen] == [
        (POSITION, ("eager", "danet:triton", "danet:triton:deterministic")),
        (CHANNEL, ("eager", "danet:triton")),
    ]


def test_a_backend_is_not_asked_for_dtypes_that_it_has_no_kernels_for():
    assert gpu_plan.dtypes_of("cuda") == ["fp32", "bf16", "fp16"]
    assert gpu_plan.dtypes_of("hopper") == ["bf16", "fp16"]
    assert {group.dtype for group in gpu_plan.quick_groups("hopper")} == {"bf16"}
    assert gpu_plan.steps("hopper", full=True, dry=False)


@pytest.mark.parametrize("full", [False, True], ids=["quick", "full"])
def test_steps_have_names_of_their_own_and_the_proof_is_last(full):
    steps = gpu_plan.steps("triton", full=full, dry=False)
    names = [step.name for step in steps]
    assert len(set(names)) == len(names)
    assert names[:3] == ["compile", "compile checks", "self-check"]
    assert names[-1] == "proof"
    assert {step.part for step in steps} == ({"tests", "speed", ""} | ({"sanitizers"} if full else set()))


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
@pytest.mark.skipif(torch.cuda.is_available(), reason="Triton compiles here, which the record counts")
def test_few_kernels_are_compiled(monkeypatch):
    """The versions of the kernels that a quick record asks for on an H200: first those of the race, at small sizes with
    the real remainders, then those of the self-check. The tests on the GPU and the errors of outputs need no others."""
    import test_gpu
    from triton_versions import count_versions

    from danet_kernels.backends.triton import launch

    found = count_versions(monkeypatch)
    monkeypatch.setattr(launch, "_INTERPRETED_MULTIPROCESSORS", 132)
    for group in gpu_plan.quick_groups("triton"):
        small = Size(group.size.batch, 289 if group.size.positions % 16 else 1024)
        names = tuple(name for name in group.names if name.startswith("danet:"))
        jobs = gpu_checks.jobs([replace(group, size=small, names=names, device="cpu")], [])
        assert gpu_checks.run_jobs("triton", "cpu", jobs) == []
    kernels = {name for name, *_ in found}
    assert {"position_attention_forward_kernel", "channel_attention_gram_kernel"} <= kernels
    assert len(kernels) < len(found) <= gpu_page.MOST_KERNELS_OF_THE_RACE

    checks = gpu_checks.jobs([], list(gpu_checks.DTYPES), gpu_checks.CHECK_CASES)
    assert gpu_checks.run_jobs("triton", "cpu", checks) == []
    assert len(found) <= gpu_page.MOST_KERNELS
    compiled = set(found)
    for op in gpu_checks.OPS:
        for dtype in gpu_checks.DTYPES:
            gpu_checks.self_check("triton", op, dtype, "cpu")  # fails at its first case: no kernel runs here
        for training in (False, True):
            test_gpu.block("triton", op, 1024, training, "cpu")()
    for deterministic in (False, True):
        torch.use_deterministic_algorithms(deterministic)
        for problem in test_gpu.PROBLEMS.values():
            test_gpu.training_step(problem, "triton", *test_gpu.on_gpu(problem, "cpu"))
    danet_kernels.position_attention(*test_gpu.many_images(20, "cpu"), backend="triton")
    gpu_checks.output_errors("triton", "cpu", 256)
    assert found == compiled


def test_the_core_of_the_tests_exists():
    """Else a renamed file or mark would leave the record without proof, which only a run on a GPU would show."""
    command = [sys.executable, "-m", "pytest", "--collect-only", "-q", "-p", "no:cacheprovider"]
    arguments = gpu_plan._tests("triton", full=False, dry=False)["core"]
    run = subprocess.run([*command, *arguments], cwd=ROOT, capture_output=True, text=True, check=False)
    for word in ("test_error_rule", "test_twenty_repeats", "position_bf16", "channel_fp32", "test_a_side_stream"):
        assert word in run.stdout, f"no test is named like {word}"
    assert "tuning" not in run.stdout


# ---- the steps


def make_run(folder: Path, plan: list[str] | None = None) -> gpu_steps.Run:
    environment = {"backend": "eager", "gpu": "NVIDIA H200", "torch": "2.11", "triton": "3.6", "family": "sm_90"}
    environment |= {"source_hash": {POSITION: "p", CHANNEL: "c"}, "date": "2026-01-01"}
    return gpu_steps.Run(open_record(folder, "quick", environment, plan or ["compile", "proof"]), "eager", dry=True)


def test_programs(tmp_path):
    run = make_run(tmp_path)
    python = [sys.executable, "-c"]
    assert gpu_steps._command([*python, "print(1); print(2)"], 60) == {"status": "passed", "detail": "1\n2"}
    failed = gpu_steps._command([*python, "import sys; sys.exit('no\\nkernel')"], 60)
    assert failed == {"status": "failed", "detail": "no\nkernel"}
    assert gpu_steps._command(["no-such-program"], 60)["detail"] == "no-such-program: No such file or directory"
    assert gpu_steps.sanitize("memcheck", POSITION, "fp32", replace(run, dry=False), 60) == {
        "status": "passed",
        "detail": "not run: No such file or directory",
    }


def test_a_program_that_takes_too_long(monkeypatch):
    """Too long for what is left of this call: cut, to be run again. Too long at all: failed, for good."""
    command = ["sh", "-c", "sleep 60 & wait"]
    with pytest.raises(gpu_steps.Cut):
        gpu_steps._command(command, 0.3)
    monkeypatch.setattr(gpu_steps, "LIMIT", 0.3)
    assert gpu_steps._command(command, 60) == {"status": "failed", "detail": "took longer than 0.3 s"}


def test_outcomes_of_tests(tmp_path):
    tests = tmp_path / "test_three.py"
    tests.write_text(
        "import pytest\n"
        "def test_right(): pass\n"
        "def test_wrong(): assert False\n"
        "@pytest.mark.skip\ndef test_skipped(): pass\n"
    )
    run = make_run(tmp_path)
    alone = [str(tests), "--rootdir", str(tmp_path), "-c", os.devnull]
    found = gpu_steps.run_pytest(alone, False, run, 60)
    assert found["status"] == "failed"
    kinds = {kind: [name.partition("::")[2] for name in found[kind]] for kind in ("passed", "failures", "skipped")}
    assert kinds == {"passed": ["test_right"], "failures": ["test_wrong"], "skipped": ["test_skipped"]}
    for allow_none, status in ((True, "passed"), (False, "failed")):
        none = gpu_steps.run_pytest([*alone, "-k", "nothing"], allow_none, run, 60)
        assert none == {"status": status, "detail": "no test was selected"}


def test_kernels_are_counted_by_name(tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    for number, name in enumerate(("forward_kernel", "forward_kernel", "triton_red_fused_0")):
        (tmp_path / str(number)).mkdir()
        (tmp_path / str(number) / f"{name}.cubin").touch()
    assert gpu_steps.compiled_kernels() == {"forward_kernel": 2}


def test_a_kernel_that_raises_is_named_by_its_op():
    case = gpu_checks.CHECK_CASES[CHANNEL][0]
    (complaint,) = gpu_checks.run_jobs("no such backend", "cpu", [(CHANNEL, "fp32", case)])
    assert "KeyError" in complaint
    assert gpu_proof.ops_named(complaint) == [CHANNEL]


# ---- the file


def test_a_record_goes_on_where_it_was_and_is_never_written_over(tmp_path):
    run = make_run(tmp_path)
    assert run.record.path.name.endswith("-h200-gpu.json")
    run.record.content["steps"]["compile"] = {"status": "passed", "detail": "", "seconds": 1}
    run.record.save()
    again = make_run(tmp_path)
    assert again.record.path == run.record.path
    assert again.record.content["steps"] == run.record.content["steps"]
    other_plan = make_run(tmp_path, ["proof"])
    assert other_plan.record.path != run.record.path
    again.record.content["complete"] = True
    again.record.save()
    new = make_run(tmp_path)
    assert new.record.path.name.endswith("-h200-gpu-2.json")
    assert new.record.content["steps"] == {}
    assert [path.suffix for path in tmp_path.iterdir()] == [".json"]


def test_the_page_tells_goals_machine_and_failures(tmp_path):
    run = make_run(tmp_path, ["compile", "proof"])
    run.record.content["steps"]["compile"] = {
        "status": "failed",
        "detail": "",
        "failures": ["no kernel"],
        "kernels": {"forward_kernel": 61},
        "seconds": 3,
    }
    page = gpu_page.page(run.record)
    assert "# GPU record, NVIDIA H200" in page
    assert "quick; not complete" in page
    assert "The goals are stated for an H200." in page
    assert "DRY RUN" not in page
    assert "forward_kernel 61" in page
    assert "compile:\n\n```text\nno kernel\n```" in page
    assert "| proof   | not run" in page


# ---- what is proof


def proof_of_record(**changes) -> list[str]:
    """reasons_against position attention, of a record in which only `changes` speak against it."""
    steps = {
        "compile": {"status": "passed"},
        "self-check": {"status": "passed"},
        "tests: core": {"status": "passed", "passed": ["tests.test_position_attention::test_error_rule"]},
    }
    cell = Cell(POSITION, 8, 9216, "bf16", "danet:triton", "training", "ours", status="measured")
    steps |= changes.get("steps", {})
    content = {"plan": list(steps), "steps": {name: step for name, step in steps.items() if step is not None}}
    return gpu_proof.reasons_against(POSITION, content, [replace(cell, **changes.get("cell", {})).row()])


def test_a_record_without_a_flaw_is_proof():
    assert proof_of_record() == []


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"steps": {"compile": None}}, "compile has not run"),
        ({"steps": {"tests: gpu": None}}, "tests: gpu has not run"),
        (
            {"steps": {"self-check": {"status": "failed", "failures": [f"{POSITION}: dquery"]}}},
            "self-check: position_attention: dquery",
        ),
        (
            {"steps": {"self-check": {"status": "failed", "failures": ["its process was killed"]}}},
            "self-check: its process",
        ),
        (
            {"steps": {"tests: core": {"status": "passed", "passed": ["tests.test_channel_attention::test"]}}},
            "no test of it",
        ),
        (
            {"steps": {"tests: gpu": {"status": "failed", "failures": ["tests.test_gpu::test_a_side_stream"]}}},
            "tests: gpu: tests.test_gpu",
        ),
        ({"steps": {"tests: gpu": {"status": "failed", "detail": "no module"}}}, "tests: gpu"),
        ({"cell": {"status": "wrong"}}, "ours, B = 8, N = 9216, bf16, training: wrong"),
        ({"cell": {"op": STEP, "status": "failed"}}, "ours, B = 8, N = 9216, bf16, training: failed"),
    ],
)
def test_what_speaks_against_a_proof(changes, reason):
    (found,) = proof_of_record(**changes)
    assert found.startswith(reason)


@pytest.mark.parametrize(
    "changes",
    [
        {"steps": {"self-check": {"status": "failed", "failures": [f"{CHANNEL}: dx, in Case(positions=(1,))"]}}},
        {"steps": {"tests: gpu": {"status": "failed", "failures": ["tests.test_channel_attention::test_huge"]}}},
        {"cell": {"op": CHANNEL, "status": "wrong"}},
        {"cell": {"implementation": "flex", "status": "wrong"}},
    ],
)
def test_what_is_about_something_else(changes):
    assert proof_of_record(**changes) == []
