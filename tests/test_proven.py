"""Kernels for GPUs under "auto": the table of what is proven, verdicts of the self-check in memory and on disk."""

import json
import threading
import warnings
from pathlib import Path
from types import ModuleType

import pytest
import torch
from fake_backend import fp32_products, make_backend, make_wrong_backend, scale

import danet_kernels
from danet_kernels import _self_check, backends, channel_attention, position_attention, proven
from danet_kernels._cases import Case
from danet_kernels.backends import eager, native

OPS = backends.OPS
SMALL = {
    "position_attention": (Case(2, 33, (9,), (11,), 5), Case(1, 40, (8,), (16,), 8, gamma=0.0)),
    "channel_attention": (Case(2, 9, (33,)), Case(1, 8, (32,), gamma=0.0)),
}
X = torch.ones(1, 2, 3)
FAMILY = "sm_90"


@pytest.fixture
def gpu(monkeypatch, tmp_path):
    """Tensors on the CPU count as those on a GPU that nothing is known about."""
    monkeypatch.setattr(proven, "family", lambda device: FAMILY)
    monkeypatch.setattr(proven, "_device_name", lambda device: "Some GPU")
    monkeypatch.setattr(proven, "TABLE", tmp_path / "proven.json")
    (tmp_path / "proven.json").write_text("[]")
    monkeypatch.setenv(proven.CACHE_VARIABLE, str(tmp_path / "cache"))
    monkeypatch.delenv(backends.ENVIRONMENT_VARIABLE, raising=False)
    monkeypatch.setattr(_self_check, "CASES", SMALL)
    forget(monkeypatch)
    yield tmp_path
    proven._table.cache_clear()


def forget(monkeypatch):
    """As a new process."""
    monkeypatch.setattr(proven, "_verdicts", {})
    monkeypatch.setattr(proven, "_announced", False)
    proven._table.cache_clear()


@pytest.fixture
def checks(gpu, monkeypatch):
    """(op, dtype) of every self-check that runs."""
    made = []

    def counted(backend, op, dtype, device):
        made.append((op, dtype))
        return check(backend, op, dtype, device)

    check = _self_check.self_check
    monkeypatch.setattr(_self_check, "self_check", counted)
    return made


def install(monkeypatch, backend: ModuleType) -> ModuleType:
    monkeypatch.setattr(backends, "BACKENDS", {"fake": backend, "eager": eager})
    return backend


def chosen(op: str = "channel_attention", dtype: torch.dtype = torch.float32) -> tuple[str, list[str]]:
    """The backend that "auto" takes, and what it warns of."""
    x = X.to(dtype)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        module = backends.choose("auto", op, *[x] * (3 if op == "position_attention" else 1))
    return module.__name__.rpartition(".")[2], [str(warning.message) for warning in caught]


# ---- what "auto" makes of it


def test_kernels_that_pass_are_used_and_the_user_is_told_once(checks, monkeypatch):
    install(monkeypatch, make_backend())
    name, told = chosen(dtype=torch.bfloat16)
    assert name == "fake"
    assert told == [
        "danet_kernels: \"auto\" uses backend 'fake' for channel_attention in bfloat16 on Some GPU: "
        "no run on such a GPU is on record, but a self-check has just passed"
    ]
    for op in OPS:
        for dtype in (torch.bfloat16, torch.float16, torch.bfloat16):
            assert chosen(op, dtype) == ("fake", [])
    # Each dtype that was asked for, and each once.
    assert checks == [
        ("channel_attention", torch.bfloat16),
        ("position_attention", torch.bfloat16),
        ("position_attention", torch.float16),
        ("channel_attention", torch.float16),
    ]


def test_wrong_kernels_are_refused_and_the_user_is_told_once(checks, monkeypatch):
    install(monkeypatch, make_wrong_backend("channel_attention_forward", scale(0, 1.01)))
    name, told = chosen()
    assert name == "eager"
    assert len(told) == 1
    assert "\"auto\" does not use backend 'fake' for channel_attention in float32 on Some GPU" in told[0]
    assert "its self-check failed: out: largest error" in told[0]
    assert chosen() == ("eager", [])
    assert chosen("position_attention")[0] == "fake"  # whose kernels are right
    assert len(checks) == 2


def test_kernels_that_raise_are_refused(checks, monkeypatch, gpu):
    def broken(*arguments):
        raise RuntimeError("out of luck")

    install(monkeypatch, make_backend(channel_attention_backward=broken))
    name, told = chosen()
    assert name == "eager"
    assert "its self-check failed: it raised RuntimeError: out of luck" in told[0]
    # Perhaps the GPU had no memory left, or there was no C compiler: the next process tries again.
    assert not (gpu / "cache").exists()
    forget(monkeypatch)
    assert chosen()[0] == "eager"
    assert len(checks) == 2


def test_the_error_tells_the_verdict(gpu, monkeypatch):
    backend = install(monkeypatch, make_backend(channel_attention_forward=None))
    monkeypatch.setattr(backends, "BACKENDS", {"native": refusing("not built"), "fake": backend})
    with (
        pytest.warns(UserWarning, match="does not use backend 'fake'"),
        pytest.raises(NotImplementedError, match="native: not built; fake: its self-check failed: it raised TypeError"),
    ):
        backends.choose("auto", "channel_attention", X)


def refusing(reason: str) -> ModuleType:
    backend = ModuleType("danet_kernels.backends.refusing")
    backend.why_not = lambda op, *inputs: [reason]
    return backend


def test_a_backend_asked_for_by_name_is_not_checked(checks, monkeypatch):
    backend = install(monkeypatch, make_backend())
    assert backends.choose("fake", "channel_attention", X) is backend
    with danet_kernels.use_backend("fake"):
        channel_attention(X)
    assert danet_kernels.available_backends("channel_attention", X)["fake"] == []
    assert checks == []


def test_an_empty_map_needs_no_check(checks, monkeypatch):
    install(monkeypatch, make_backend())
    assert backends.choose("auto", "channel_attention", X[:, :, :0]) is eager
    assert checks == []


def test_kernels_interpreted_on_the_cpu_are_never_chosen(checks, monkeypatch):
    monkeypatch.setattr(proven, "family", lambda device: None)
    backend = install(monkeypatch, make_backend())
    assert chosen() == ("eager", [])
    assert checks == []
    monkeypatch.setattr(backends, "BACKENDS", {"fake": backend})
    with pytest.raises(NotImplementedError, match='fake: interpreted on cpu: "auto" takes it on GPUs only'):
        backends.choose("auto", "channel_attention", X)


def test_a_warning_that_is_an_error_is_one_only_once(checks, monkeypatch):
    install(monkeypatch, make_backend())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(UserWarning, match="a self-check has just passed"):
            channel_attention(X)
        channel_attention(X)
    assert len(checks) == 1


@pytest.mark.parametrize("busy", ["capture", "tracing"])
def test_no_check_while_a_graph_is_captured_or_traced(busy, checks, monkeypatch):
    install(monkeypatch, make_backend())
    with monkeypatch.context() as patch:
        if busy == "capture":
            patch.setattr(proven, "_capturing", lambda device: True)
        else:
            patch.setattr(torch.compiler, "is_compiling", lambda: True)
        assert chosen(dtype=torch.float16) == ("eager", [])
        reasons = proven.why_not(backends.BACKENDS["fake"], "channel_attention", X.half())
        what = {"capture": "a CUDA graph is captured", "tracing": "torch.compile traces"}[busy]
        assert reasons == [
            f"unproven on sm_90, and its self-check cannot run while {what}: "
            "call channel_attention once in float16 before, or ask for the backend by name"
        ]
        assert checks == []
    assert chosen(dtype=torch.float16)[0] == "fake"  # nothing of it remains
    with monkeypatch.context() as patch:
        patch.setattr(proven, "_capturing", lambda device: True)
        assert chosen(dtype=torch.float16)[0] == "fake"  # the verdict is known
        forget(patch)
        assert chosen(dtype=torch.float16)[0] == "fake"  # from the disk
    assert len(checks) == 1


def test_capture_is_asked_of_the_stream_of_the_device(monkeypatch):
    entered = []

    class Device:
        def __init__(self, device):
            entered.append(device)

        def __enter__(self):
            return self

        def __exit__(self, *exception):
            return None

    monkeypatch.setattr(torch.cuda, "device", Device)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    second = torch.device("cuda", 1)
    assert proven._capturing(second)
    assert entered == [second]
    assert not proven._capturing(torch.device("cpu"))


def test_settings_of_the_caller_neither_reach_the_check_nor_change(checks, monkeypatch):
    """It runs inside of an operator: without autograd, under autocast, in inference mode, in a backward, in vmap."""
    install(monkeypatch, make_backend())
    state = torch.get_rng_state()
    with torch.autocast("cpu", torch.bfloat16), pytest.warns(UserWarning, match="has just passed"):
        channel_attention(X)
    with torch.inference_mode():
        channel_attention(X)
    value = X.half().requires_grad_()
    out = position_attention(value, value, value, backend="eager")
    monkeypatch.setattr(backends, "requested", lambda name: "auto")
    out.sum().backward()
    torch.func.vmap(lambda x: position_attention(x, x, x))(X[None])
    assert [dtype for _, dtype in checks] == [torch.bfloat16, torch.float32, torch.float16, torch.float32]
    assert all(reasons == [] for reasons in proven._verdicts.values())
    assert torch.equal(torch.get_rng_state(), state)


def test_two_threads_make_one_check(checks, monkeypatch, gpu):
    install(monkeypatch, make_backend())
    (gpu / "file").write_text("")
    monkeypatch.setenv(proven.CACHE_VARIABLE, str(gpu / "file"))  # which is no directory: they share nothing on disk
    names = []
    threads = [
        threading.Thread(target=lambda: names.append(backends.choose("auto", "channel_attention", X).__name__))
        for _ in range(4)
    ]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert names == ["danet_kernels.backends.fake"] * 4
    assert len(checks) == len(caught) == 1


def test_another_precision_of_products_is_another_check(checks, monkeypatch):
    install(monkeypatch, make_backend())
    chosen()
    chosen(dtype=torch.bfloat16)
    with fp32_products("tf32"):
        assert chosen()[0] == "fake"
        chosen(dtype=torch.bfloat16)  # to which it makes no difference
    assert [dtype for _, dtype in checks] == [torch.float32, torch.bfloat16, torch.float32]


# ---- verdicts on disk


def test_the_next_process_knows_that_kernels_are_right(checks, monkeypatch):
    install(monkeypatch, make_backend())
    chosen()
    forget(monkeypatch)
    assert chosen() == ("fake", [])
    assert len(checks) == 1


def test_the_next_process_knows_that_kernels_are_wrong(checks, monkeypatch):
    install(monkeypatch, make_wrong_backend("channel_attention_backward", scale(0, 1.01)))
    first = chosen()
    forget(monkeypatch)
    assert chosen() == first  # warning included: it is why calls are slow
    assert len(checks) == 1


def test_a_verdict_is_on_these_kernels_here(checks, monkeypatch):
    backend = install(monkeypatch, make_backend())
    changes = [
        (backend, "source_hash", lambda op: "other sources"),
        (backend, "__name__", "danet_kernels.backends.other"),
        (proven, "_device_name", lambda device: "Other GPU"),
        (proven, "_triton_version", lambda: "4.0"),
        (torch, "__version__", "3.0"),
        (_self_check, "CASES", {op: cases[:1] for op, cases in SMALL.items()}),
    ]
    chosen()
    for module, name, value in changes:
        forget(monkeypatch)
        monkeypatch.setattr(module, name, value)
        chosen()
    assert len(checks) == 1 + len(changes)


@pytest.mark.parametrize("content", ["", "no JSON", "[]", "{}", '{"fault": "", "conditions": {}}', "\xff"])
def test_a_file_that_is_not_ours_is_no_verdict(content, checks, monkeypatch, gpu):
    install(monkeypatch, make_backend())
    chosen()
    (file,) = (gpu / "cache").iterdir()
    file.write_text(content, encoding="latin-1")
    forget(monkeypatch)
    assert chosen()[0] == "fake"
    assert len(checks) == 2
    assert json.loads(file.read_text())["fault"] == ""  # mended


def test_a_cache_that_cannot_be_written_is_none(checks, monkeypatch, gpu):
    install(monkeypatch, make_backend())
    (gpu / "file").write_text("")
    monkeypatch.setenv(proven.CACHE_VARIABLE, str(gpu / "file"))
    name, told = chosen()
    assert (name, len(told)) == ("fake", 1)
    assert chosen() == ("fake", [])
    assert len(checks) == 1


def test_a_user_without_a_home_has_no_cache(checks, monkeypatch):
    install(monkeypatch, make_backend())
    for variable in (proven.CACHE_VARIABLE, "XDG_CACHE_HOME"):
        monkeypatch.delenv(variable, raising=False)

    def no_home():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", no_home)
    assert chosen()[0] == "fake"
    assert len(checks) == 1


def test_where_the_cache_is(monkeypatch, tmp_path):
    conditions = {"backend": "fake", "op": "op", "dtype": "float16"}
    monkeypatch.setattr(Path, "home", lambda: tmp_path)
    monkeypatch.delenv(proven.CACHE_VARIABLE, raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert proven._file(conditions).parent == tmp_path / ".cache" / "danet_kernels"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert proven._file(conditions).parent == tmp_path / "xdg" / "danet_kernels"
    monkeypatch.setenv(proven.CACHE_VARIABLE, str(tmp_path / "own"))
    assert proven._file(conditions).parent == tmp_path / "own"


def test_a_write_that_fails_leaves_nothing(monkeypatch, tmp_path):
    def full(*arguments):
        raise OSError("disk full")

    monkeypatch.setattr(proven.os, "replace", full)
    with pytest.raises(OSError, match="disk full"):
        proven._write(tmp_path / "table.json", [])
    assert list(tmp_path.iterdir()) == []


# ---- the table


def test_proven_kernels_are_used_without_a_check_or_a_word(checks, monkeypatch):
    backend = install(monkeypatch, make_backend())
    proven.record("fake", "channel_attention", FAMILY, "hash of channel_attention", "record.json")
    assert proven.is_proven(backend, "channel_attention", "cpu")
    assert not proven.is_proven(backend, "position_attention", "cpu")
    assert chosen() == ("fake", [])
    assert checks == []


@pytest.mark.parametrize("other", ["backend", "op", "family", "source_hash"])
def test_an_entry_is_on_these_kernels_on_such_a_gpu(other, gpu):
    entry = {"backend": "fake", "op": "channel_attention", "family": FAMILY, "source_hash": "hash of channel_attention"}
    proven.record(**entry | {other: "another"}, evidence="record.json")
    assert not proven.is_proven(make_backend(), "channel_attention", "cpu")
    proven.record(**entry, evidence="record.json")
    assert proven.is_proven(make_backend(), "channel_attention", "cpu")


def test_record_keeps_the_table_in_order(gpu):
    table = gpu / "table.json"
    for op, family, source_hash in (("b", "sm_90", "1"), ("a", "sm_90", "2"), ("a", "sm_80", "3"), ("a", "sm_90", "4")):
        proven.record("fake", op, family, source_hash, "record.json", table)
    entries = json.loads(table.read_text())
    # The sources "2" have been changed to "4".
    assert [(entry["op"], entry["family"], entry["source_hash"]) for entry in entries] == [
        ("a", "sm_80", "3"),
        ("a", "sm_90", "4"),
        ("b", "sm_90", "1"),
    ]
    assert all(len(entry["date"]) == len("2026-01-31") for entry in entries)
    assert json.loads(proven.TABLE.read_text()) == []


def test_what_is_recorded_already_stays_as_it_is(gpu, monkeypatch):
    arguments = ("fake", "op", FAMILY, "hash", "record.json", gpu / "table.json")
    proven.record(*arguments)
    before = (gpu / "table.json").read_text().replace("20", "19")  # a date long ago
    (gpu / "table.json").write_text(before)
    proven.record(*arguments)
    assert (gpu / "table.json").read_text() == before


def test_the_table_of_the_package_is_well_formed():
    results = Path(proven.__file__).resolve().parent.parent / "benchmarks" / "results"
    entries = json.loads(proven.TABLE.read_text(encoding="utf-8"))
    assert isinstance(entries, list)
    for entry in entries:
        assert set(entry) == {"backend", "op", "family", "source_hash", "evidence", "date"}
        assert entry["op"] in OPS
        assert proven.is_subject_to_proof(backends.BACKENDS[entry["backend"]])
        assert (results / entry["evidence"]).exists()
    kernels = [(entry["backend"], entry["op"], entry["family"]) for entry in entries]
    assert kernels == sorted(set(kernels))


def test_the_backends_for_the_cpu_are_proven_by_tests():
    for op in OPS:
        for backend in (native, eager):
            assert proven.is_proven(backend, op, "cpu")
            assert proven.status(backend, op, "cpu") == "proven by the tests of this project"
        assert proven.is_subject_to_proof(backends.BACKENDS["triton"])
        assert proven.status(backends.BACKENDS["triton"], op, "cpu") == 'for GPUs: never taken by "auto" here'


def test_the_family_of_a_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 9))
    assert proven.family("cuda") == "sm_89"
    assert proven.family("cpu") is None


# ---- what `info` says


def test_status_in_words(gpu, monkeypatch):
    def wrong_in_fp16(results, arguments):
        if results[0].dtype == torch.float16:
            results[0] = 2 * results[0]

    backend = install(monkeypatch, make_wrong_backend("channel_attention_forward", wrong_in_fp16))
    op = "channel_attention"
    assert proven.status(backend, op, "cpu") == 'unproven on sm_90: "auto" checks it at the first call'
    for dtype in proven.DTYPES:
        chosen(dtype=dtype)
    words = proven.status(backend, op, "cpu")
    assert words.startswith("self-check passed in float32, bfloat16; self-check failed in float16: out: largest error")
    proven.record("fake", op, FAMILY, "hash of channel_attention", "record.json")
    assert proven.status(backend, op, "cpu").startswith("proven on sm_90: record.json, 20")
