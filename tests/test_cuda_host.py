"""The CUDA C++ kernels on the machine of tests/cuda_host: right, without races, and every planted bug is found.

test_cuda.py and the tests of every backend run the same kernels through torch's operators.
"""

from __future__ import annotations

import re
import subprocess
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import cuda_host_build
import pytest
from cuda_host_build import ROOT, THREAD_SANITIZER, Patch

pytestmark = pytest.mark.skipif(bool(cuda_host_build.missing()), reason=str(cuda_host_build.missing()))

KERNELS = ROOT / "csrc" / "cuda" / "sm80"
OPS = ("position", "channel")
SEEDS = (1, 2, 0, 3)  # copies land at once, at any time, as late as they may; D is 72, 40, 40, 72
ADDRESS_SANITIZER = ("-fsanitize=address,undefined", "-fno-sanitize-recover=all")


def run(program: Path, op: str, dtype: str = "bf16", layout: str = "nchw", seed: int = 0) -> tuple[int, str]:
    """Exit status and what was printed."""
    command = [str(program), op, dtype, layout, str(seed)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200, check=False)
    return done.returncode, done.stdout + done.stderr


# ---- the kernels as they are


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("layout", ["nchw", "channels_last"])
@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("op", OPS)
def test_right_in_any_order(op, dtype, layout, seed):
    status, text = run(cuda_host_build.executable(), op, dtype, layout, seed)
    assert status == 0, text


@pytest.mark.parametrize(("dtype", "layout"), [("bf16", "nchw"), ("fp32", "channels_last")])
@pytest.mark.parametrize("op", OPS)
def test_no_address_is_wrong(op, dtype, layout):
    status, text = run(cuda_host_build.executable(flags=ADDRESS_SANITIZER), op, dtype, layout, seed=1)
    assert status == 0, text[-3000:]


@pytest.mark.parametrize(("dtype", "layout"), [("bf16", "nchw"), ("fp32", "channels_last")])
@pytest.mark.parametrize("op", OPS)
def test_no_race(op, dtype, layout):
    status, text = run(cuda_host_build.executable(flags=[THREAD_SANITIZER]), op, dtype, layout, seed=1)
    assert status == 0, text[:3000]


# ---- planted bugs


def in_turn(old: str, new: str) -> list[Patch]:
    """One patch for each place in the kernels where `old` stands."""
    return [
        Patch(f"sm80/{path.name}", old, new, occurrence)
        for path in sorted(KERNELS.glob("*.cuh"))
        for occurrence in range(path.read_text(encoding="utf-8").count(old))
    ]


PLANTED = [
    *in_turn(" synchronize();", " {}"),
    *in_turn("cp_async_wait<0>();", "cp_async_wait<1>();"),
    Patch(
        "sm80/products.cuh", "{{registers[0], registers[1]}}", "{{registers[1], registers[0]}}"
    ),  # B: depth + 8 first
    Patch("sm80/products.cuh", "{{registers[2], registers[3]}}", "{{registers[0], registers[3]}}"),
    Patch("sm80/products.cuh", "row + lane % 16, depth + lane / 16 * 8", "row + lane % 16, depth + lane / 8 % 2 * 8"),
    Patch("sm80/products.cuh", "pack<T>(tiles[0][2], tiles[0][3])", "pack<T>(tiles[0][3], tiles[0][2])"),
    Patch("sm80/products.cuh", "lane_index() / 4 + e / 2 * 8", "lane_index() / 4 + e % 2 * 8"),
    Patch("sm80/tile.cuh", "next < lines &&", "next <= lines &&"),  # one row too many
    Patch("sm80/tile.cuh", "- first_element - element", "- first_element - element + 1"),  # one column too many
    Patch(
        "sm80/position_attention_fwd.cuh", "exclude_columns(s, N - first_key)", "exclude_columns(s, N - first_key + 1)"
    ),
]


def planted_id(patch: Patch) -> str:
    words = re.sub(r"[^a-z0-9]+", "_", patch.old.lower()).strip("_")
    return f"{Path(patch.file).stem}-{words[:30]}-{patch.occurrence}"


def op_of(patch: Patch) -> str:
    return "channel" if "channel" in patch.file else "position"


def found(patch: Patch, directory: Path) -> str:
    """How a planted bug shows; empty if it does not."""
    # 1. By values, or because the machine stops the kernel.
    program = cuda_host_build.executable(patch, flags=["-O0"], directory=directory / "values")
    for seed, dtype, layout in [
        (seed, *way) for way in (("bf16", "nchw"), ("fp32", "channels_last")) for seed in SEEDS
    ]:
        status, text = run(program, op_of(patch), dtype, layout, seed)
        if status:
            return text or f"exit status {status}"
    # 2. As a race, or as an address outside of everything.
    for name, flags in (("race", [THREAD_SANITIZER]), ("address", ADDRESS_SANITIZER)):
        program = cuda_host_build.executable(patch, flags=flags, directory=directory / name)
        for layout in ("nchw", "channels_last"):
            status, text = run(program, op_of(patch), layout=layout, seed=1)
            if status:
                return text
    return ""


@pytest.fixture(scope="module")
def searches(request, tmp_path_factory):
    """What `found` says of every patch that is to be tested, two at a time."""
    patches = [item.callspec.params["planted"] for item in request.session.items if "planted" in item.fixturenames]
    futures: dict[Patch, Future[str]] = {}
    with ThreadPoolExecutor(2) as pool:
        for patch in patches:
            futures[patch] = pool.submit(found, patch, tmp_path_factory.mktemp("planted"))
        yield futures
        for future in futures.values():
            future.cancel()


@pytest.mark.parametrize("planted", PLANTED, ids=planted_id)
def test_a_planted_bug_is_found(planted, searches):
    assert searches[planted].result(), f"nothing shows that {planted.old!r} became {planted.new!r}"


STOPPED = {
    "waits at shuffle_xor for 31 lanes of its warp that do not come": Patch(
        "sm80/position_attention_fwd.cuh",
        "new_m = fmaxf(new_m, shuffle_xor(new_m, 1));",
        "if (lane_index() == 0) new_m = fmaxf(new_m, shuffle_xor(new_m, 1));",
    ),
    "is at ldmatrix while other lanes of its warp are at mma_16x8x16": Patch(
        "sm80/products.cuh",
        "ldmatrix_x4(a.registers, address, !M::kDepthContiguous);",
        "if (lane != 0) ldmatrix_x4(a.registers, address, !M::kDepthContiguous);",
    ),
    "waits at a barrier that 32 threads have left without": Patch(
        "sm80/position_attention_fwd.cuh",
        "  // 2. Load the queries",
        "  if (warp_index() == 0) return;\n  // 2. Load the queries",
    ),
    "gives ldmatrix an address that is no multiple of 16": Patch(
        "sm80/products.cuh", "depth + lane / 16 * 8)", "depth + lane / 16 * 4)"
    ),
    "gives cp.async an address that is no multiple of 16": Patch(
        "sm80/tile.cuh", "kLine = kLength + kWide", "kLine = kLength + kWide / 2"
    ),
    "copies to outside of shared memory": Patch(
        "sm80/position_attention_fwd.cuh", "(D + kBlockD - 1) / kBlockD * Query::kBytes", "D / kBlockD * Query::kBytes"
    ),
    "ends with copies under way that nobody waits for": Patch(
        "sm80/position_attention_fwd.cuh",
        "  softmax.finish();",
        "  softmax.finish();\n  key.template load<kThreads>(p.key, batch, 0, 0);",
    ),
    "expected at most 101376 bytes of shared memory, got": Patch(
        "position_attention.cu",
        "ceil_div(p.M, kDeltaQueries) * p.B, kThreads,\n           kThreads",
        "p.B, kThreads, 1000 * kThreads",
    ),
}


@pytest.mark.parametrize("sentence", STOPPED)
def test_the_machine_stops_what_cuda_forbids(sentence, tmp_path):
    program = cuda_host_build.executable(STOPPED[sentence], flags=["-O0"], directory=tmp_path)
    status, text = run(program, "position", layout="channels_last")
    assert (status, sentence in text) == (2, True), text
    assert re.match(r"cuda_host: (block \d+, thread \d+ |expected)", text)


def test_a_patch_that_fits_nowhere_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"tile.cuh has 0 of 'no such text', asked for number 0"):
        cuda_host_build.executable(Patch("sm80/tile.cuh", "no such text", ""), directory=tmp_path)
