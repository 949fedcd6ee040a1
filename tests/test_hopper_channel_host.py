"""Channel attention on the Hopper of tests/cuda_host, and its schedule: right in any order, planted bugs are found."""

from __future__ import annotations

import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import cuda_host_build
import pytest
from cuda_host_build import Patch

pytestmark = pytest.mark.skipif(bool(cuda_host_build.missing()), reason=str(cuda_host_build.missing()))

PROGRAM = "hopper_channel_main"
SCHEDULE = "sm90/channel_attention_schedule.h"
GRAM = "sm90/channel_attention_gram.cuh"
APPLY = "sm90/channel_attention_apply.cuh"
LAUNCHER = "sm90/channel_attention.cu"
ADDRESS_SANITIZER = ["-fsanitize=address"]


def run(program: Path, *words: object) -> tuple[int, str]:
    """Exit status and what was printed."""
    command = [str(program), *map(str, words)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200, check=False)
    return done.returncode, done.stdout + done.stderr


# ---- the kernels as they are


@pytest.mark.parametrize("layout", ["nchw", "channels_last"])
@pytest.mark.parametrize(
    ("dtype", "seed"), [*(("bf16", seed) for seed in range(6)), ("fp16", 2)]
)  # copies and products late, at once, at any time; few positions and many channels, and the reverse
def test_right_in_any_order(dtype, layout, seed):
    status, text = run(cuda_host_build.executable(program=PROGRAM), dtype, layout, seed)
    assert status == 0, text


def test_no_address_is_wrong():
    program = cuda_host_build.executable(flags=ADDRESS_SANITIZER, program=PROGRAM)
    status, text = run(program, "bf16", "nchw", 2)
    assert status == 0, text[-3000:]


SUMS = [
    *(("positions", steps) for steps in (*range(1, 20), 40)),
    *(("channels", formed, stored) for formed in range(10) for stored in (0, formed)),
]


def test_no_order_of_events_is_wrong():
    program = cuda_host_build.executable(program="channel_schedule")
    for words in SUMS:
        status, text = run(program, *words)
        assert status == 0, f"{words}: {text}"


# ---- planted bugs


def planted(old: str, new: str, file: str = SCHEDULE, occurrence: int = 0) -> Patch:
    return Patch(file, old, new, occurrence)


SCHEDULE_BUGS = {
    "no wait for an empty slot": planted("    act.wait_empty(place.slot, place.parity ^ 1);\n", ""),
    "parity of the wrong phase": planted("place.parity ^ 1", "place.parity"),
    "parity that never turns": planted("step / Schedule::kSlots % 2", "0"),
    "parity of a smaller ring": planted("step / Schedule::kSlots % 2", "step / (Schedule::kSlots - 1) % 2"),
    "slots of a smaller ring": planted("step % Schedule::kSlots", "step % (Schedule::kSlots - 1)"),
    "one slot where two are read": planted("kSlots = 6;", "kSlots = 1;"),
    "one slot where two are read, over channels": planted("kSlots = 4;", "kSlots = 1;"),
    "waits for one warpgroup": planted("kArrivals = kReaders * kReaderWarps", "kArrivals = kReaderWarps"),
    "waits for a third warpgroup": planted(
        "kArrivals = kReaders * kReaderWarps", "kArrivals = (kReaders + 1) * kReaderWarps"
    ),
    "no wait for positions": planted("    act.wait_full(place.slot, place.parity);\n", "", occurrence=0),
    "no wait for values of formed weights": planted("    act.wait_full(place.slot, place.parity);\n", "", occurrence=1),
    "no wait for stored weights": planted("      act.wait_full(place.slot, place.parity);\n", ""),
    "leaves positions too early": planted("act.leave(ring_place<Schedule>(step - 1).slot)", "act.leave(step % 2)"),
    "leaves the product under way": planted(
        "act.leave(ring_place<Schedule>(step - 1).slot)", "act.leave(ring_place<Schedule>(step).slot)", occurrence=0
    ),
    "leaves the stored product under way": planted(
        "act.leave(ring_place<Schedule>(step - 1).slot)", "act.leave(ring_place<Schedule>(step).slot)", occurrence=1
    ),
    "leaves before the end of a formed product": planted(
        "    act.template finish_products<0>();\n    act.leave(place.slot);\n",
        "    act.leave(place.slot);\n    act.template finish_products<0>();\n",
    ),
    "never leaves": planted("    act.leave(place.slot);\n", ""),
    "never leaves the end of a sum": planted("    act.leave(ring_place<Schedule>(end - 1).slot);\n", ""),
    "takes a sum under way": planted(
        "    act.template finish_products<0>();\n    act.leave(ring_place<Schedule>(end",
        "    act.template finish_products<1>();\n    act.leave(ring_place<Schedule>(end",
    ),
    "never ends a sum": planted("? steps : first + Schedule::kSumSteps", "? steps : steps"),
    "weights while they are read": planted(
        "act.fetch_logits(step + 1);\n    act.template finish_products<0>();",
        "act.fetch_logits(step + 1);\n    act.template finish_products<1>();",
    ),
    "weights of the step before": planted("act.fetch_logits(step + 1)", "act.fetch_logits(step)"),
    "weights are made once": planted("    if (step + 1 < formed_steps) act.make_weights();\n", ""),
    "results before the last product is over": planted(
        "    act.template finish_products<0>();\n  }\n\n  // 3", "  }\n\n  // 3"
    ),
    "no meeting before the results": planted("  act.meet();\n  act.collect", "  act.collect"),
}
"""Of the waits, slots and parities."""

KERNEL_BUGS = {
    "rows of the other warpgroup": planted(
        "left[slot] + warpgroup * Tiles", "left[slot] + (1 - warpgroup) * Tiles", GRAM
    ),
    "next depths of x": planted("Tiles::kDepth * 2 * Tiles::kLine : 2 * Tiles::kDepth", "32 : 32", GRAM),
    "lines of A the other way": planted("x16<T, kChannelsLast, kCh", "x16<T, !kChannelsLast, kCh", GRAM),
    "announces two tiles for one": planted("tile.one_operand() ? Tiles::kTileBytes :", "false ? 0 :", GRAM),
    "the last sum alone": planted("total[i] += acc[i];", "total[i] = acc[i];", GRAM),
    "a sum that goes on": planted("      acc[i] = 0.0f;\n", "", GRAM),
    "one warp leaves for all": planted("lane_index() == 0) arrive", "thread_index() % 128 == 0) arrive", GRAM),
    "columns of another lane": planted("from[lane_index() % 4]", "from[lane_index() / 8]", APPLY),
    "columns before they are there": planted("      meet_in_warp();\n    }\n", "    }\n", APPLY),
    "next depths of the values": planted("kNext = kChannelsLast ? 2 *", "kNext = !kChannelsLast ? 2 *", APPLY),
    "dgram of the other warpgroup": planted("weights[slot] + warpgroup", "weights[slot] + (1 - warpgroup)", APPLY),
    "never magnified": planted("{magnify(0), magnify(1)}", "{1.0f, 1.0f}", APPLY),
    "results of the wrong rows": planted("const int half = i / 2 % 2, p", "const int half = i % 2, p", APPLY),
    "dgram of the first image": planted("{w.dgram, p.C * row_length,", "{w.dgram, 8,", LAUNCHER),
}
"""Of addresses, operands and sums."""


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
        patch, ways = SCHEDULE_BUGS[bug], [("positions", 17), ("channels", 9, 0), ("channels", 6, 6)]
    else:
        patch = KERNEL_BUGS[bug]
        ways = [
            (dtype, layout, seed) for seed, dtype in ((2, "fp16"), (1, "bf16")) for layout in ("nchw", "channels_last")
        ]
    program = "channel_schedule" if bug in SCHEDULE_BUGS else PROGRAM
    built = cuda_host_build.executable(patch, directory=directory, program=program, flags=["-O0"])
    for words in ways:
        status, text = run(built, *words)
        if status:
            return text or f"exit status {status}"
    return ""


@pytest.mark.parametrize("bug", SCHEDULE_BUGS | KERNEL_BUGS)
def test_a_planted_bug_is_found(bug, searches):
    assert searches[bug].result(), "nothing shows of it"
