"""The Hopper kernels on the machine of tests/cuda_host, and their schedule: right in any order, bugs are found."""

from __future__ import annotations

import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import cuda_host_build
import pytest
from cuda_host_build import Patch

pytestmark = pytest.mark.skipif(bool(cuda_host_build.missing()), reason=str(cuda_host_build.missing()))

FORWARD = "sm90/position_attention_fwd.cuh"
DVALUE = "sm90/position_attention_dvalue.cuh"
MERGE = "sm90/position_attention_merge.cuh"
SKELETON = "sm90/position_attention_skeleton.cuh"
TILES = "sm90/position_attention_tiles.cuh"
SCHEDULE = "sm90/position_attention_schedule.h"
ADDRESS_SANITIZER = ["-fsanitize=address"]


def run(program: Path, *words: object) -> tuple[int, str]:
    """Exit status and what was printed."""
    command = [str(program), *map(str, words)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200, check=False)
    return done.returncode, done.stdout + done.stderr


# ---- the kernels as they are


@pytest.mark.parametrize("seed", range(6))  # two of each: copies and products late, at once, at any time
@pytest.mark.parametrize("layout", ["nchw", "channels_last"])
@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_right_in_any_order(dtype, layout, seed):
    status, text = run(cuda_host_build.executable(program="hopper_main"), dtype, layout, seed)
    assert status == 0, text


@pytest.mark.parametrize("layout", ["nchw", "channels_last"])
def test_no_address_is_wrong(layout):
    program = cuda_host_build.executable(flags=ADDRESS_SANITIZER, program="hopper_main")
    status, text = run(program, "bf16", layout, 2)
    assert status == 0, text[-3000:]


def test_no_order_of_events_is_wrong():
    program = cuda_host_build.executable(program="schedule")
    for steps in (*range(1, 14), 24, 50):
        status, text = run(program, steps)
        assert status == 0, f"{steps} steps: {text}"


# ---- planted bugs


def planted(old: str, new: str, file: str = SCHEDULE, occurrence: int = 0) -> Patch:
    return Patch(file, old, new, occurrence)


SCHEDULE_BUGS = {
    "no wait for an empty slot": planted("    act.wait_empty(ring, place.slot, place.parity ^ 1);\n", ""),
    "parity of the wrong phase": planted("place.parity ^ 1", "place.parity"),
    "parity of a smaller ring": planted(
        "piece / PositionForwardSchedule::kValueSlots % 2", "piece / PositionForwardSchedule::kReaders % 2"
    ),
    "slots of a smaller ring": planted("{piece % PositionForwardSchedule::kValueSlots,", "{piece % 4,"),
    "a slot for two warpgroups": planted("kValueSlots = 6;", "kValueSlots = 1;"),
    "weights in one slot": planted("return step % PositionForwardSchedule::kWeightSlots;", "return step * 0;"),
    "waits for the readers of one block": planted(
        "kValueArrivals = kClusterBlocks * kReaderWarps;", "kValueArrivals = kReaderWarps;"
    ),
    "waits for one warpgroup": planted(
        "kKeyArrivals = kClusterBlocks * kReaders * kReaderWarps;", "kKeyArrivals = kClusterBlocks * kReaderWarps;"
    ),
    "never leaves the keys": planted("    act.leave(Ring::kKey, key.slot);\n", ""),
    "never leaves the values": planted("    act.leave(Ring::kValue, value.slot);\n", ""),
    "leaves the values too early": planted(
        "    act.template finish_products<0>();\n    act.leave(Ring::kValue, value.slot);\n",
        "    act.leave(Ring::kValue, value.slot);\n    act.template finish_products<0>();\n",
    ),
    "leaves the keys too early": planted(
        "    act.template finish_products<1>();\n    act.leave(Ring::kKey, key.slot);\n",
        "    act.leave(Ring::kKey, key.slot);\n    act.template finish_products<1>();\n",
    ),
    "no wait for keys": planted("    if (step + 2 < steps) wait_key(step + 2);\n", ""),
    "no wait for values": planted("    wait_value(value);\n", ""),
    "no wait for the last values": planted("  wait_value(value);\n  act", "  act"),
    "no wait for the queries": planted("  act.wait_full(Ring::kQuery, 0, 0);\n", ""),
    "no meeting before weights are read": planted(
        "weight_slot(step + 1));\n    act.meet();\n", "weight_slot(step + 1));\n"
    ),
    "no meeting before the first": planted("weight_slot(0));\n  act.meet();\n", "weight_slot(0));\n"),
    "no meeting before the end": planted("act.share_sums();\n  act.meet();\n", "act.share_sums();\n"),
    "queries where weights come first": planted(
        "act.take_queries(PositionForwardSchedule::kWeightSlots - 1)", "act.take_queries(0)"
    ),
    "only one warpgroup meets": planted(
        "  act.share_maximum();\n  act.meet();\n", "  act.share_maximum();\n  if (warpgroup) act.meet();\n"
    ),
    "results before the last product is over": planted(
        "value.slot);\n  act.template finish_products<0>();\n", "value.slot);\n  act.template finish_products<1>();\n"
    ),
}


KERNEL_BUGS = {
    "does not scale": planted("* p.scale", "* 1.0f", FORWARD),
    "keys past the end": planted("column(i) < left ?", "column(i) <= left ?", FORWARD),
    "the other warpgroup's maximum": planted("memory.maximum[1 - warpgroup]", "memory.maximum[warpgroup]", FORWARD),
    "forgets to rescale": planted("acc[i] *= shrink[half_of(i)];", "acc[i] *= 1.0f;", FORWARD),
    "sums of one warpgroup": planted("memory.sum[0][r] + memory.sum[1][r]", "2 * memory.sum[0][r]", FORWARD),
    "lse of the wrong maximum": planted("m[half] + logf(sum)", "m[0] + logf(sum)", FORWARD),
    "lse of the other half": planted("number * Tiles::kHalf) {}", "(1 - number) * Tiles::kHalf) {}", DVALUE),
    "lse of one step": planted("    lse += Tiles::kColumns;\n", "", DVALUE),
    "parts are not shrunk": planted(
        "attn += sums[part * kHopperPart] * shrink;", "attn += sums[part * kHopperPart];", MERGE
    ),
    "a part too few": planted("part < p.operands.splits", "part + 1 < p.operands.splits", MERGE, occurrence=1),
    "every part begins at the first step": planted("p.splits) * p.steps;", "p.splits) * 0;", TILES),
    "blocks of a cluster mix up their statistics": planted(
        "(kHopperBlocks - rank) * kHopperSums", "kHopperSums", TILES
    ),
    "no fence": planted("    fence_async_proxy();\n", "", SKELETON),
    "no swizzle": planted("((number ^ line % 8) << 4)", "(number << 4)", SKELETON),
    "positions of the wrong warp": planted("16 * warp() + lane() % 16, 2 * d", "lane() % 16, 2 * d", SKELETON),
    "next depth of the keys": planted("kChannelsLast ? 2 * kDepth : kDepth * kLineBytes", "2 * kDepth", SKELETON),
    "blocks of 64 channels": planted("Tiles::kColumns * 2 * Tiles::kLine : kDepth", "kDepth : kDepth", SKELETON),
    "groups of eight lines": planted("half, 8 * kLineBytes, kDepth", "half, 4 * kLineBytes, kDepth", SKELETON),
    "adds to old logits": planted("d * kNext), d > 0)", "d * kNext), true)", SKELETON),
    "keys for the own block alone": planted("full, kBoth);", "full);", SKELETON),
    "both blocks load the same": planted("tile.rank * kShare", "0 * kShare", SKELETON),
    "announces half of the bytes": planted(
        "arrive_and_expect(full, Tiles::kPieceBytes)", "arrive_and_expect(full, Tiles::kPieceBytes / 2)", SKELETON
    ),
    "leaves for the own block alone": planted(
        "lane() < PositionForwardSchedule::kClusterBlocks", "lane() == tile.rank", SKELETON
    ),
    "one warp leaves for all": planted("if (lane() < Position", "if (warp() == 0 && lane() < Position", SKELETON),
    "no begin of products": planted("    begin_products();\n", "", SKELETON),
    "touches sums under way": planted(
        "(step), value.slot);\n", "(step), value.slot);\n    act.logits[0] += act.acc[0];\n"
    ),
    "no barrier initialised": planted("init_barrier(&memory.other_empty[slot], Schedule::kKeyArrivals);", "", SKELETON),
}


@pytest.fixture(scope="module")
def searches(request, tmp_path_factory):
    """What shows of every bug that is to be tested, as futures: two are searched at a time."""
    items = [item for item in request.session.items if item.module is request.module]
    bugs = [item.callspec.params["bug"] for item in items if "bug" in item.fixturenames]
    with ThreadPoolExecutor(2) as pool:
        futures = {bug: pool.submit(found, bug, tmp_path_factory.mktemp("bug")) for bug in bugs}
        yield futures
        for future in futures.values():
            future.cancel()


def found(bug: str, directory: Path) -> str:
    """How a bug shows; empty if it does not."""
    if bug in SCHEDULE_BUGS:
        patch, ways = SCHEDULE_BUGS[bug], [(steps,) for steps in (1, 2, 9)]
    else:
        patch = KERNEL_BUGS[bug]
        ways = [("bf16", layout, seed) for seed in (1, 0, 2) for layout in ("nchw", "channels_last")]
    name = "schedule" if bug in SCHEDULE_BUGS else "hopper_main"
    program = cuda_host_build.executable(patch, directory=directory, program=name, flags=["-O0"])
    for words in ways:
        status, text = run(program, *words)
        if status:
            return text or f"exit status {status}"
    return ""


@pytest.mark.parametrize("bug", SCHEDULE_BUGS | KERNEL_BUGS)
def test_a_planted_bug_is_found(bug, searches):
    assert searches[bug].result(), "nothing shows of it"
