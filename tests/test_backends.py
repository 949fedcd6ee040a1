"""Which backend runs: argument before context before environment; the reasons of those that cannot; no extension."""

import asyncio
import json
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import danet_kernels
from danet_kernels import available_backends, backends, channel_attention, position_attention, use_backend

PACKAGE = Path(danet_kernels.__file__).resolve().parent
VARIABLE = backends.ENVIRONMENT_VARIABLE
CPU_BACKENDS = ("native", "eager")
X = torch.ones(1, 2, 3)


def stand_in(name: str, reasons: list[str], calls: list[str]) -> SimpleNamespace:
    """A backend that notes its name and leaves the work to the reference."""

    def forward(*arguments):
        calls.append(name)
        return backends.eager.channel_attention_forward(*arguments)

    return SimpleNamespace(why_not=lambda op, *inputs: reasons, channel_attention_forward=forward)


@pytest.fixture
def ran(monkeypatch):
    """Two backends that can run; the names of those that did, in order."""
    monkeypatch.delenv(VARIABLE, raising=False)
    calls: list[str] = []
    monkeypatch.setattr(backends, "BACKENDS", {name: stand_in(name, [], calls) for name in CPU_BACKENDS})
    return calls


def test_auto_takes_the_first_that_can_run(ran, monkeypatch):
    channel_attention(X)
    monkeypatch.setitem(backends.BACKENDS, "native", stand_in("native", ["no such machine"], ran))
    channel_attention(X)
    assert ran == ["native", "eager"]


def test_the_order_of_the_backends():
    assert list(available_backends("position_attention")) == ["native", "triton", "cuda", "hopper", "eager"]


def test_argument_beats_context_beats_environment(ran, monkeypatch):
    monkeypatch.setenv(VARIABLE, "eager")
    channel_attention(X)
    with use_backend("native"):
        channel_attention(X)
        channel_attention(X, backend="eager")
    channel_attention(X, backend="native")
    assert ran == ["eager", "native", "eager", "native"]


def test_contexts_nest_and_end_with_an_exception(ran):
    with use_backend("eager"):
        with use_backend("native"):
            channel_attention(X)
        channel_attention(X)
        with pytest.raises(KeyError), use_backend("native"):
            raise KeyError
        channel_attention(X)
        with use_backend("auto"):
            channel_attention(X)
    channel_attention(X)
    assert ran == ["native", "eager", "eager", "native", "native"]


def test_auto_in_the_context_hides_the_environment(ran, monkeypatch):
    monkeypatch.setenv(VARIABLE, "eager")
    with use_backend("auto"):
        channel_attention(X)
    assert ran == ["native"]


def test_an_empty_variable_is_none(ran, monkeypatch):
    monkeypatch.setenv(VARIABLE, "")
    channel_attention(X)
    assert ran == ["native"]


def test_an_unknown_name_in_the_environment_names_the_variable(monkeypatch):
    monkeypatch.setenv(VARIABLE, "cudnn")
    with pytest.raises(ValueError, match=rf"unknown backend 'cudnn'.*{VARIABLE}|{VARIABLE}.*unknown backend 'cudnn'"):
        channel_attention(X)
    assert torch.equal(channel_attention(X, backend="eager"), 2 * X)  # an argument does not look at it


def test_another_thread_does_not_see_the_context(ran):
    entered, checked = threading.Event(), threading.Event()

    def other():
        entered.wait(10)
        channel_attention(X)
        checked.set()

    thread = threading.Thread(target=other)
    thread.start()
    with use_backend("eager"):
        entered.set()
        assert checked.wait(10)
        channel_attention(X)
    thread.join()
    assert ran == ["native", "eager"]


def test_tasks_do_not_see_each_others_contexts(ran):
    async def task(name: str) -> None:
        with use_backend(name):
            for _ in range(2):
                await asyncio.sleep(0)
                channel_attention(X)

    async def both() -> None:
        await asyncio.gather(task("eager"), task("native"))

    asyncio.run(both())
    assert ran == ["eager", "native"] * 2


def test_a_backend_that_cannot_run_says_why(ran, monkeypatch):
    monkeypatch.setitem(backends.BACKENDS, "native", stand_in("native", ["too old", "too small"], ran))
    for call in (lambda: channel_attention(X, backend="native"), with_context(lambda: channel_attention(X), "native")):
        with pytest.raises(
            NotImplementedError, match="channel_attention: backend 'native' cannot run: too old; too small"
        ):
            call()
    assert not ran


def with_context(call: Callable[[], object], name: str) -> Callable[[], object]:
    def inside():
        with use_backend(name):
            return call()

    return inside


def test_auto_says_why_nothing_can_run(ran, monkeypatch):
    monkeypatch.setitem(backends.BACKENDS, "native", stand_in("native", ["not built"], ran))
    monkeypatch.setitem(backends.BACKENDS, "eager", stand_in("eager", ["tired", "busy"], ran))
    sentence = "channel_attention: no backend can run on these inputs: native: not built; eager: tired, busy"
    with pytest.raises(NotImplementedError, match=sentence):
        channel_attention(X)
    assert available_backends("channel_attention", X) == {"native": ["not built"], "eager": ["tired", "busy"]}


def test_available_backends_looks_at_the_inputs():
    on_meta = torch.empty(1, 2, 3, device="meta")
    reasons = available_backends("channel_attention", on_meta, None)
    assert reasons["eager"] == []
    assert any("not for meta" in reason for reason in reasons["native"])
    assert any("not on meta" in reason or "not installed" in reason for reason in reasons["triton"])
    assert any("not on meta" in reason for reason in reasons["cuda"])
    query = torch.empty(1, 2, 3)
    with_inputs = available_backends("position_attention", query, query, query, None, None)
    assert {name: with_inputs[name] for name in CPU_BACKENDS} == {
        name: reasons for name, reasons in available_backends("position_attention").items() if name in CPU_BACKENDS
    }


def test_empty_inputs_need_no_kernel(monkeypatch):
    """A backend is still asked whether it can run, but what has no entries goes to the definition."""

    def never(*arguments):
        pytest.fail("an empty map reached a kernel")

    monkeypatch.setattr(backends.native, "why_not", lambda op, *inputs: [])
    for op in ("position_attention_forward", "channel_attention_forward"):
        monkeypatch.setattr(backends.native, op, never)
    for backend in ("auto", "native"):
        for batch, channels, queries, keys in ((0, 2, 3, 4), (1, 0, 3, 4), (1, 2, 0, 4), (1, 2, 3, 0)):
            query, key = torch.ones(batch, 5, queries), torch.ones(batch, 5, keys)
            value = torch.ones(batch, channels, keys)
            assert position_attention(query, key, value, backend=backend).shape == (batch, channels, queries)
            if queries:
                assert channel_attention(value, backend=backend).shape == value.shape


def test_no_keys_leave_the_residual():
    """A sum over no keys is zero."""
    query, residual = torch.ones(1, 2, 3), torch.randn(1, 4, 3)
    out = position_attention(query, torch.ones(1, 2, 0), torch.ones(1, 4, 0), residual, 0.5)
    assert torch.equal(out, residual)


# ---- without the extension


SCRIPT = """
import json, torch, danet_kernels as dk
query, value = torch.randn(1, 4, 3, 5, requires_grad=True), torch.randn(1, 8, 3, 5, requires_grad=True)
dk.position_attention(query, query, value, value, 0.5).sum().backward()
dk.channel_attention(value, 0.5).sum().backward()
try:
    dk.channel_attention(value, backend="native")
    error = None
except NotImplementedError as caught:
    error = str(caught)
print(json.dumps({
    "from": dk.__file__,
    "reasons": dk.available_backends("position_attention", query),
    "error": error,
    "gradients": [bool(tensor.grad.isfinite().all()) for tensor in (query, value)],
}))
"""


def run(directory: Path, *arguments: str) -> str:
    """Output of Python on a package in `directory`. -S leaves out what an editable install adds to the path."""
    environment = {name: text for name, text in os.environ.items() if not name.startswith(("DANET", "PYTHON"))}
    environment["PYTHONPATH"] = os.pathsep.join([str(directory), *(path for path in sys.path if "-packages" in path)])
    done = subprocess.run(
        [sys.executable, "-S", *arguments], env=environment, cwd=directory, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    return done.stdout


@pytest.fixture
def copy(tmp_path):
    """The package without what a build adds to it."""
    ignored = shutil.ignore_patterns("*.so", "*.pyd", "_build_info.json", "__pycache__")
    shutil.copytree(PACKAGE, tmp_path / "danet_kernels", ignore=ignored)
    return tmp_path


@pytest.mark.parametrize("state", ["never built", "Python only", "broken library"])
def test_without_the_extension_everything_runs_on_eager(copy, state):
    reason = "the C++ extension is not built"
    if state == "Python only":
        built = {"version": "0", "danet_build": "python", "cpu_library": False, "reasons": {"native": "as asked by me"}}
        (copy / "danet_kernels" / "_build_info.json").write_text(json.dumps(built))
        reason += " (as asked by me)"
    elif state == "broken library":
        (copy / "danet_kernels" / "_danet_cpu.so").write_bytes(b"no library")
        reason = "the C++ extension does not load: "
    result = json.loads(run(copy, "-c", SCRIPT))
    assert Path(result["from"]).is_relative_to(copy)
    assert result["reasons"]["eager"] == []
    assert len(result["reasons"]["native"]) == 1
    assert reason in result["reasons"]["native"][0]
    assert result["error"] == f"channel_attention: backend 'native' cannot run: {result['reasons']['native'][0]}"
    assert result["gradients"] == [True, True]


def test_info_says_why_there_is_no_extension(copy):
    assert "the C++ extension is not built" in run(copy, "-m", "danet_kernels.info")
    assert "the C++ extension is not built" in json.dumps(json.loads(run(copy, "-m", "danet_kernels.info", "--json")))
