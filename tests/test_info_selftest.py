"""The two commands for users: `info` tells what runs and why not, `selftest` notices a wrong kernel."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import danet_kernels
from danet_kernels import _error_rule, info, proven, selftest
from danet_kernels.backends import BACKENDS, eager

PACKAGE = Path(danet_kernels.__file__).resolve().parent
NO_COMPILER = "no C++ compiler: neither c++, g++ nor clang++ is on PATH, and CXX is not set"


def run_module(name, *arguments, root=PACKAGE.parent, **variables):
    """Standard output of `python -m danet_kernels.<name>` with the package below `root`."""
    command = [sys.executable, "-m", f"danet_kernels.{name}", *arguments]
    done = subprocess.run(
        command, cwd=root, env=os.environ | variables, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture
def pure_python(tmp_path):
    """A directory with a copy of the package as a build without a compiler leaves it."""
    copy = tmp_path / "danet_kernels"
    shutil.copytree(PACKAGE, copy, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    build = {"version": "0.1.0", "danet_build": "auto", "cpu_library": False}
    build["reasons"] = dict.fromkeys(("native", "cuda"), NO_COMPILER)
    (copy / "_build_info.json").write_text(json.dumps(build))
    # Without it, the import hook of an editable install would serve the module of the source tree.
    (copy / "_C.py").write_text("raise ImportError('there is no _C')")
    return tmp_path


def keys(facts):
    return {name: keys(value) for name, value in facts.items()} if isinstance(facts, dict) else None


# ---- info


def test_info_tells_what_runs():
    facts = json.loads(run_module("info", "--json", DANET_KERNELS_BACKEND="eager"))
    assert facts["versions"]["torch"] == torch.__version__
    assert facts["versions"]["danet_kernels"] == danet_kernels.__version__
    assert facts["backends"]["requested"] == facts["environment"]["DANET_KERNELS_BACKEND"] == "eager"
    for op in ("position_attention", "channel_attention"):
        runs = facts["backends"][op]["cpu"]
        assert list(runs) == list(danet_kernels.available_backends(op))
        assert runs["native"] == danet_kernels.available_backends(op)["native"]
        assert runs["eager"] == []
        assert facts["proven"][op]["cpu"] == {
            "native": "proven by the tests of this project",
            "triton": 'for GPUs: never taken by "auto" here',
            "cuda": 'for GPUs: never taken by "auto" here',
            "hopper": 'for GPUs: never taken by "auto" here',
            "eager": "proven by the tests of this project",
        }
    loaded = not danet_kernels.available_backends("position_attention")["native"]
    assert facts["libraries"]["cpu"]["loaded"] == loaded
    assert facts["threads"]["torch"] >= 1


def test_info_text_is_the_same_facts_aligned():
    text = run_module("info")
    lines = [line for line in text.splitlines() if line.startswith("  ")]
    assert f"  torch  {torch.__version__}".split() in [line.split() for line in lines]
    assert ["channel_attention", "cpu", "eager", "runs"] in [line.split() for line in lines]
    assert 'position_attention cpu triton for GPUs: never taken by "auto" here' in [" ".join(x.split()) for x in lines]
    values = {line.rindex("  ") + 2 for line in lines if line.split()[0] in ("torch", "order", "machine")}
    assert len(values) == 1, f"values do not start in one column:\n{text}"


def test_info_without_extension(pure_python):
    facts = json.loads(run_module("info", "--json", root=pure_python))
    reasons = facts["backends"]["position_attention"]["cpu"]
    assert reasons["eager"] == []
    assert reasons["native"] == [f"the C++ extension is not built ({NO_COMPILER})"]
    assert facts["libraries"]["package"] == str(pure_python / "danet_kernels")
    assert facts["libraries"]["cpu"] == {"path": None, "loaded": False, "reason": reasons["native"][0]}
    cuda = facts["libraries"]["cuda"]
    assert (cuda["path"], cuda["loaded"]) == (None, False)
    assert f"the CUDA extension is not built ({NO_COMPILER})" in cuda["reason"]
    assert facts["cpu"]["features"] == {"error": "ImportError: there is no _C"}
    assert facts["libraries"]["_C"] == {"path": None, "loaded": False, "reason": "ImportError: there is no _C"}
    facts["cpu"]["features"] = info.collect()["cpu"]["features"]  # the only place where the keys may differ
    assert keys(facts) == keys(info.collect())
    assert NO_COMPILER in run_module("info", root=pure_python)


def test_info_shows_the_error_of_the_loader(pure_python):
    (pure_python / "danet_kernels" / "_danet_cpu.so").write_text("not a library")
    library = json.loads(run_module("info", "--json", root=pure_python))["libraries"]["cpu"]
    assert library["path"] is not None
    assert not library["loaded"]
    assert "does not load" in library["reason"]
    assert "_danet_cpu.so" in library["reason"]


def test_info_tells_what_a_gpu_is_proven_for(monkeypatch):
    """On a stand-in for a GPU: what no test may do is to run the kernels."""
    monkeypatch.setattr(info, "_devices", lambda: ("cuda",))
    monkeypatch.setattr(proven, "family", lambda device: "sm_89")
    monkeypatch.setattr(proven, "_device_name", lambda device: "Some GPU")
    monkeypatch.setattr(proven, "_entry", lambda *kernels: {"evidence": "record.json", "date": "2026-12-01"})
    words = info.collect()["proven"]["channel_attention"]["cuda"]
    assert words["triton"] == "proven on sm_89: record.json, 2026-12-01"
    monkeypatch.setattr(proven, "_entry", lambda *kernels: None)
    faults = {"float32": "", "bfloat16": None, "float16": "too wrong"}
    monkeypatch.setattr(proven, "_recall", lambda conditions: faults[conditions["dtype"]])
    words = info.collect()["proven"]["channel_attention"]["cuda"]
    assert words["triton"] == "self-check passed in float32; self-check failed in float16: too wrong"
    faults |= {"float32": None, "float16": None}
    words = info.collect()["proven"]["channel_attention"]["cuda"]
    assert words["triton"] == 'unproven on sm_89: "auto" checks it at the first call'


def test_info_names_the_family_of_a_gpu(monkeypatch):
    properties = SimpleNamespace(name="Some GPU", major=8, minor=9, total_memory=2**34)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: properties)
    (gpu,) = info._gpus()["devices"]
    assert (gpu["name"], gpu["capability"], gpu["family"]) == ("Some GPU", "8.9", "sm_89")


def test_info_survives_a_fact_that_cannot_be_found_out(monkeypatch, capsys):
    def broken():
        raise RuntimeError("no such thing")

    monkeypatch.setattr(torch, "get_num_threads", broken)
    monkeypatch.setenv("DANET_KERNELS_BACKEND", "nonsense")
    assert info.main([]) == 0
    printed = capsys.readouterr().out
    assert "RuntimeError: no such thing" in printed
    assert "unknown backend 'nonsense'" in printed


# ---- selftest


@pytest.fixture
def few_cases(monkeypatch):
    """The self-test on three cases per operator, without the kernels for GPUs, which are slow on a CPU."""
    before = dict(BACKENDS)
    for name in ("triton", "cuda", "hopper"):
        del BACKENDS[name]
    few = {op: (cases[1], cases[3], cases[5]) for op, cases in selftest.CASES.items()}
    monkeypatch.setattr(selftest, "CASES", few)
    yield
    BACKENDS.clear()  # their order is what "auto" goes by
    BACKENDS.update(before)


def test_selftest_passes_in_time():
    """With triton at hand, without a GPU: also some of its kernels in the interpreter, in fp32."""
    printed = run_module("selftest", TRITON_INTERPRET="0" if torch.cuda.is_available() else "1")
    assert ", 0 wrong" in printed
    for op, results in {"position_attention": 6, "channel_attention": 3}.items():
        tables = [block for block in printed.split("\n\n") if block.startswith(f"{op} on cpu") and "fp32  " in block]
        reasons = danet_kernels.available_backends(op, *[torch.empty(1, 8, 1)] * 3)
        tests_alone = ("cuda", "hopper")  # load these kernels
        runs = [name for name in reasons if not reasons[name] and name not in tests_alone]
        assert [table.split()[3] for table in tables] == runs
        assert [len(table.splitlines()) for table in tables] == [1 + results] * len(runs)
        refusals = [line for line in printed.splitlines() if line.startswith(f"{op} on cpu") and "does not run" in line]
        assert {line.split()[3] for line in refusals} == {
            "triton:",
            *(f"{name}:" for name in reasons.keys() - set(runs)),
        }
        if "triton" in runs:
            assert [line.partition("does not run: ")[2] for line in refusals if line.split()[3] == "triton:"] == [
                "the 16-bit kernels need what Triton's interpreter lacks: products of bf16, descriptors that add",
                "fp64 has no Triton kernels",
                f"only the first {selftest.INTERPRETED} cases, as Triton's interpreter is slow",
            ]


def test_selftest_says_why_a_backend_does_not_run(pure_python):
    printed = run_module("selftest", root=pure_python, TRITON_INTERPRET="0")
    assert f"position_attention on cpu, native: does not run: the C++ extension is not built ({NO_COMPILER})" in printed


WRONG = {
    "position_attention_forward": ("position_attention", 0, "out"),
    "position_attention_backward": ("position_attention", 1, "dkey"),
    "channel_attention_forward": ("channel_attention", 0, "out"),
    "channel_attention_backward": ("channel_attention", 1, "dgamma"),
}


@pytest.mark.parametrize("kernel", WRONG)
def test_selftest_notices_a_slightly_wrong_kernel(kernel, few_cases, monkeypatch, capsys):
    op, index, name = WRONG[kernel]
    right = getattr(eager, kernel)

    def wrong(*arguments):
        results = list(right(*arguments))
        results[index] = results[index] * (1 + 1e-4)
        return tuple(results)

    monkeypatch.setattr(eager, kernel, wrong)
    assert selftest.main([]) == 1
    printed = capsys.readouterr().out
    assert f"wrong: {op}, eager, fp32" in printed
    assert f", {name}: largest error" in printed
    other = "channel_attention" if op == "position_attention" else "position_attention"
    assert f"wrong: {other}" not in printed


def test_selftest_notices_a_backend_that_raises(few_cases, monkeypatch, capsys):
    def broken(*arguments):
        raise RuntimeError("out of luck")

    monkeypatch.setattr(eager, "channel_attention_forward", broken)
    assert selftest.main([]) == 1
    assert "dx: raised RuntimeError: out of luck" in capsys.readouterr().out


def test_selftest_notices_nan_in_one_element(few_cases, monkeypatch, capsys):
    right = eager.position_attention_forward

    def wrong(*arguments):
        out, attn, lse = right(*arguments)
        out.view(-1)[-1] = torch.nan
        return out, attn, lse

    monkeypatch.setattr(eager, "position_attention_forward", wrong)
    assert selftest.main([]) == 1
    assert "largest error nan" in capsys.readouterr().out


# ---- the rule behind it


@pytest.mark.parametrize("dtype", selftest.DTYPES.values(), ids=selftest.DTYPES)
def test_ulp_is_the_distance_to_the_next_number(dtype):
    info = torch.finfo(dtype)
    numbers = torch.tensor([1.0, 1.5, -3.0, 0.0, info.tiny, info.tiny / 4, info.max / 2], dtype=dtype)
    if dtype in (torch.float32, torch.float64):
        above = torch.nextafter(numbers.abs(), torch.tensor(torch.inf, dtype=dtype))
    else:  # the bits of a positive number, as an integer, count through the numbers
        above = (numbers.abs().view(torch.int16) + 1).view(dtype)
    assert torch.equal(_error_rule.ulp(numbers.double(), dtype), above.double() - numbers.abs().double())


def test_a_result_of_another_shape_or_dtype_is_wrong():
    yardstick = _error_rule.Yardstick(torch.zeros(2, 3, dtype=torch.float64), torch.float32, 1.0, 1.0, 2.0)
    assert _error_rule.judge(torch.zeros(2, 3), yardstick).ok
    for got in (torch.zeros(3, 2), torch.zeros(2, 3).double()):
        verdict = _error_rule.judge(got, yardstick)
        assert not verdict.ok
        assert str(verdict).startswith("expected [2, 3] of torch.float32, got")


def test_the_reference_must_be_finite():
    x = torch.full((1, 2, 3), 300.0).half()
    with pytest.raises(ValueError, match="not finite"):  # out = 1000 x is beyond fp16
        _error_rule.yardsticks("channel_attention", {"x": x, "gamma": torch.full((1,), 1000.0)})
