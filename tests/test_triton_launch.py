"""How the Triton backend deals out work, chooses tiles and copies operands: what its launchers decide on the host."""

from __future__ import annotations

import pytest
import torch
from cases import PositionCase, arrange
from tolerance import yardsticks

pytest.importorskip("triton", reason="triton is not installed")

from danet_kernels._error_rule import evaluate
from danet_kernels.backends.triton import configs, launch, tuning
from danet_kernels.backends.triton.configs import Config
from danet_kernels.backends.triton.operands import near, operand
from danet_kernels.backends.triton.position_attention import even_splits, share_last_round

H200 = 132  # multiprocessors


def test_the_last_round_of_the_usual_crop_is_shared_by_all():
    rounds = share_last_round(144, H200, 9216, 128)  # 72 blocks of queries, two of channels
    assert rounds.whole_tiles == H200
    assert rounds.split_tiles * rounds.splits == H200
    assert rounds.programs == 2 * H200


@pytest.mark.parametrize("length", [1, 64, 65, 300, 9409])
@pytest.mark.parametrize("tiles", [1, 5, 65, 66, 67, 131, 132, 133, 144, 264, 1152])
def test_every_tile_and_position_is_dealt_out_once(tiles, length):
    rounds = share_last_round(tiles, H200, length, 64)
    assert rounds.whole_tiles + rounds.split_tiles == tiles
    assert rounds.split_length % 64 == 0
    assert (rounds.splits - 1) * rounds.split_length < length <= rounds.splits * rounds.split_length
    assert rounds.split_tiles * rounds.splits <= H200
    splits, split_length = even_splits(tiles, H200, length, 64)
    assert split_length % 64 == 0
    assert (splits - 1) * split_length < length <= splits * split_length
    assert splits == 1 or tiles * splits <= 8 * H200


def test_even_splits_fill_the_rounds():
    splits, _ = even_splits(72, H200, 9216, 128)
    assert 72 * splits / (-(-72 * splits // H200) * H200) > 0.95


def test_families():
    known = {80: 80, 86: 86, 87: 80, 89: 86, 90: 90, 100: 100, 103: 100, 120: 120, 121: 120, 130: 120}
    assert {architecture: configs.family(architecture) for architecture in known} == known


@pytest.mark.parametrize("kernel", configs.POSITION_TABLES)
@pytest.mark.parametrize("architecture", configs.SHARED_MEMORY)
def test_every_width_of_d_has_tiles(architecture, kernel):
    for itemsize, widest in ((2, configs.LARGEST_D), (4, configs.FP32_LARGEST_D)):
        for D in range(1, widest + 1):
            for config in configs.position_configs(kernel, architecture, itemsize, D):
                sizes = (config.rows, config.columns, config.channels, config.for_channels(20).channels)
                assert all(size >= 16 and size & (size - 1) == 0 for size in sizes)
                assert config.for_channels(20).channels <= 32


# ---- tuning


@pytest.fixture
def durations(monkeypatch):
    """Seconds that each candidate seems to take; counts how often one was timed."""
    seconds = {Config(16, 16, 16, 4, 1): 2.0, Config(32, 16, 16, 4, 1): 1.0, Config(64, 16, 16, 4, 1): 3.0}
    timed = []

    def measure(call):
        config = call()
        timed.append(config)
        return seconds[config]

    monkeypatch.setattr(tuning, "_seconds", measure)
    monkeypatch.setattr(tuning, "_fastest", {})
    monkeypatch.setenv(tuning.ENVIRONMENT_VARIABLE, "1")
    return list(seconds), timed


def test_tuning_takes_the_fastest_and_times_it_once(durations):
    candidates, timed = durations
    for _ in range(3):
        assert tuning.run(candidates, "key", lambda config: config) == candidates[1]
    assert timed == candidates
    tuning.run(candidates, "another key", lambda config: config)
    assert len(timed) == 2 * len(candidates)


def test_without_being_asked_nothing_is_timed(durations, monkeypatch):
    candidates, timed = durations
    monkeypatch.delenv(tuning.ENVIRONMENT_VARIABLE)
    assert tuning.run(candidates, "key", lambda config: config) == candidates[0]
    assert not timed


def test_deterministic_mode_neither_times_nor_uses_timings(durations):
    candidates, timed = durations
    tuning.run(candidates, "key", lambda config: config)
    timed.clear()
    torch.use_deterministic_algorithms(True)
    for key in ("key", "another key"):
        assert tuning.run(candidates, key, lambda config: config) == candidates[0]
    assert not timed


def test_nothing_is_timed_while_a_graph_is_captured(durations, monkeypatch):
    candidates, timed = durations
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert tuning.run(candidates, "key", lambda config: config) == candidates[0]
    assert not timed
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    assert tuning.run(candidates, "key", lambda config: config) == candidates[1]


def test_timing_runs_the_call(monkeypatch):
    calls = []
    assert tuning._seconds(lambda: calls.append(1)) >= 0
    assert len(calls) == 1 + tuning.REPEATS


# ---- operands


def packs(tensor: torch.Tensor, channels_last: bool = False, descriptors: bool = True) -> bool:
    """Whether `tensor` is copied; what tile loads will see of it must be right in either case."""
    result = operand(tensor, channels_last=channels_last, descriptors=descriptors)
    B, C, N = tensor.shape
    rows, columns = (N, C) if channels_last else (C, N)
    strides = (*result.strides, 1)
    seen = torch.as_strided(result.memory, (B, rows, columns), strides, result.memory.storage_offset())
    assert torch.equal(seen.transpose(1, 2) if channels_last else seen, tensor)
    assert torch.equal(result.tensor, tensor)
    if result.memory is not tensor:
        assert not result.memory[:, :, columns:].any()
        assert result.memory.shape[2] % 16 == 0
    return result.memory is not tensor


def test_aligned_rows_are_read_where_they_lie():
    x = torch.randn(2, 32, 48, dtype=torch.bfloat16)
    for descriptors in (True, False):
        assert not packs(x, descriptors=descriptors)
        assert not packs(x[:, 3:19], descriptors=descriptors)
        assert not packs(x[:, :, :16], descriptors=descriptors)
        assert not packs(x.transpose(1, 2), channels_last=True, descriptors=descriptors)
        assert not packs(x[:1, :1], descriptors=descriptors)


def test_rows_of_any_length_if_they_begin_on_16_bytes():
    x = torch.randn(2, 8, 104, dtype=torch.float16)[:, :, :97]
    assert not packs(x)  # the TMA unit knows where a row ends
    assert packs(x, descriptors=False)  # a masked load does not, and would be scalar


@pytest.mark.parametrize("descriptors", [True, False])
@pytest.mark.parametrize("channels_last", [True, False])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "batch_last", "padded", "strided", "same_batch"])
@pytest.mark.parametrize("N", [1, 97])
def test_everything_else_is_packed(N, layout, channels_last, descriptors):
    x = arrange(torch.randn(3, 5, N), layout)
    assert packs(x, channels_last, descriptors)


def test_a_base_off_16_bytes_is_packed():
    x = torch.randn(2 * 16 * 32 + 1)[1:].view(2, 16, 32)
    assert packs(x)
    assert packs(x, descriptors=False)


def test_strides_too_long_for_32_bits_within_a_tile_are_copied():
    memory = torch.zeros(1 << 23, dtype=torch.float16)
    x = torch.as_strided(memory, (1, 2, 16), (1 << 23, (1 << 22) + 16, 1))
    assert near(x) is not x
    assert packs(x)
    short = torch.as_strided(memory, (1, 2, 16), (1 << 23, 1 << 22, 1))
    assert near(short) is short
    assert not packs(short)


# ---- fp32


def test_precision_of_fp32_products(monkeypatch):
    matmul = torch.backends.cuda.matmul
    before = matmul.fp32_precision
    try:
        for setting in ("none", "ieee"):
            matmul.fp32_precision = setting
            assert launch.precisions(torch.float32) == ("tf32x3", "tf32x3")
        matmul.fp32_precision = "tf32"
        assert launch.precisions(torch.float32) == ("tf32x3", "tf32")
        assert launch.precisions(torch.bfloat16) == ("ieee", "ieee")
    finally:
        matmul.fp32_precision = before


@pytest.mark.parametrize("setting", ["ieee", "tf32"])
def test_fp32_error_against_eager_under_the_same_setting(setting):
    """At most 4 times the error of eager fp32; where tf32 is allowed, twice that of eager with products in tf32."""
    problem = PositionCase(1, 64, 128, 130, 300, "fp32").problem()
    exact = {name: yardstick.exact for name, yardstick in yardsticks(problem).items()}
    matmul = torch.backends.cuda.matmul
    before = matmul.fp32_precision
    matmul.fp32_precision = setting
    try:
        fused = problem.run("triton")
    finally:
        matmul.fp32_precision = before
    if setting == "ieee":
        eager, factor = evaluate(problem.reference, problem.tensors, problem.dout), 4
    else:
        eager, factor = {"out": _eager_in_tf32(problem.tensors)}, 2
    for name, result in eager.items():
        allowed = factor * (result.double() - exact[name]).norm()
        assert (fused[name].double() - exact[name]).norm() <= allowed, name


def _eager_in_tf32(tensors: dict[str, torch.Tensor]) -> torch.Tensor:
    """The forward with both products as cuBLAS computes them in tf32: operands of 11 bits, sums in fp32."""

    logits = _eleven_bits(tensors["query"]).transpose(1, 2) @ _eleven_bits(tensors["key"])
    attn = _eleven_bits(tensors["value"]) @ _eleven_bits(torch.softmax(logits, dim=-1)).transpose(1, 2)
    return tensors["gamma"] * attn + tensors["residual"]


def _eleven_bits(tensor: torch.Tensor) -> torch.Tensor:
    """Rounded to the mantissa of tf32, to nearest."""
    return ((tensor.view(torch.int32) + 0x1000) & ~0x1FFF).view(torch.float32)
