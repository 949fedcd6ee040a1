"""The mended Triton interpreter against torch and exact numbers, and that the interpreter needs mending.

Run as a script, the file prints which of its checks fail as the interpreter comes.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

triton = pytest.importorskip("triton")
import triton.language as tl
import triton_interpreter
from triton.runtime import interpreter
from triton.tools.tensor_descriptor import TensorDescriptor

pytestmark = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") != "1", reason="a GPU is visible, so kernels are compiled and not interpreted"
)

CHECKS: dict[str, Callable[[], None]] = {}
FAIL_AS_IT_COMES = set()


def check(as_it_comes: str) -> Callable[[Callable[[], None]], Callable[[], None]]:
    """Collect the decorated function, which asserts; `as_it_comes`: "right" or "wrong" without the patch."""

    def collect(function: Callable[[], None]) -> Callable[[], None]:
        CHECKS[function.__name__] = function
        if as_it_comes == "wrong":
            FAIL_AS_IT_COMES.add(function.__name__)
        return function

    return collect


def refused(launch: Callable[[], None], error: str) -> None:
    """The launch must raise; the interpreter hands on errors inside of a kernel by their repr."""
    with pytest.raises(interpreter.InterpreterError, match=error):
        launch()


@triton.jit
def copy_kernel(
    source,  # [rows, SIZE] pointer
    target,  # [rows, SIZE] pointer
    size,  # elements of a row to read and write
    SIZE: tl.constexpr,
    MASKED: tl.constexpr,
):
    """target = source, in target's dtype. Grid: (rows,). Each program copies one row."""
    offsets = tl.program_id(0) * SIZE + tl.arange(0, SIZE)
    mask = tl.arange(0, SIZE) < size
    if MASKED:  # what lies outside comes from a load without `other`
        tl.store(target + offsets, tl.load(source + offsets, mask=mask).to(target.dtype.element_ty))
    else:
        tl.store(target + offsets, tl.load(source + offsets, mask=mask, other=0).to(target.dtype.element_ty), mask=mask)


@triton.jit
def dot_kernel(
    a,  # [M, K] pointer
    b,  # [N, K] pointer
    out,  # [M, N] fp32 pointer, added to
    M: tl.constexpr,
    N: tl.constexpr,
    K: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """out += a @ b^T. Grid: (1,)."""
    offs_m, offs_n, offs_k = tl.arange(0, M), tl.arange(0, N), tl.arange(0, K)
    left = tl.load(a + offs_m[:, None] * K + offs_k[None, :])  # [M, K]
    right = tl.load(b + offs_n[:, None] * K + offs_k[None, :])  # [N, K]
    offs_out = offs_m[:, None] * N + offs_n[None, :]
    acc = tl.load(out + offs_out)  # [M, N]
    tl.store(out + offs_out, tl.dot(left, tl.trans(right), acc, input_precision=PRECISION))


@triton.jit
def descriptor_kernel(
    source,  # descriptor of [B, C, N]
    target,  # descriptor of [B, C, N]
    seen,  # [BLOCK_C, BLOCK_N] pointer
    batch,
    channel,
    position,
    BLOCK_C: tl.constexpr,
    BLOCK_N: tl.constexpr,
    ADD: tl.constexpr,
):
    """One tile of source, stored or added to that of target, and all of what was read to `seen`. Grid: (1,)."""
    tile = source.load([batch, channel, position]).reshape([BLOCK_C, BLOCK_N])
    offsets = tl.arange(0, BLOCK_C)[:, None] * BLOCK_N + tl.arange(0, BLOCK_N)[None, :]
    tl.store(seen + offsets, tile)
    if ADD:
        target.atomic_add([batch, channel, position], tile.reshape([1, BLOCK_C, BLOCK_N]))
    else:
        target.store([batch, channel, position], tile.reshape([1, BLOCK_C, BLOCK_N]))


@triton.jit
def add(x, y):
    return x + y


STEP = tl.constexpr(3)


@triton.jit
def constant_kernel(
    out,  # [2, 16] fp32 pointer
):
    """3 - i, and whether 3 is less than i. Grid: (1,)."""
    offsets = tl.arange(0, 16)
    tl.store(out + offsets, tl.cast(STEP - offsets, tl.float32))
    tl.store(out + 16 + offsets, tl.where(offsets > STEP, 1.0, 0.0))


@triton.jit
def loop_kernel(
    out,  # [4] int32 pointer
    first,
    last,
    step,
):
    """The sums of range(first, last, step), by each kind of loop. Grid: (1,)."""
    plain, ranged, unrolled = 0, 0, 0
    for i in range(first, last, step):
        plain = add(plain, i)
    for i in tl.range(first, last, step):
        ranged += i
    for i in tl.static_range(4):
        unrolled += i
    tl.store(out, plain)
    tl.store(out + 1, ranged)
    tl.store(out + 2, unrolled)
    tl.store(out + 3, min(first + step, last))


@triton.jit
def reduce_kernel(
    x,  # [16, 16] fp32 pointer
    sums,  # [16] fp32 pointer
    largest,  # [16] fp32 pointer
    smallest,  # [16] fp32 pointer
):
    """Of the rows. Grid: (1,)."""
    offsets = tl.arange(0, 16)
    tile = tl.load(x + offsets[:, None] * 16 + offsets[None, :])  # [16, 16]
    tl.store(sums + offsets, tl.sum(tile, 1))
    tl.store(largest + offsets, tl.max(tile, 1))
    tl.store(smallest + offsets, tl.min(tile, 1))


@triton.jit
def atomic_kernel(
    values,  # [programs, SIZE] fp32 pointer
    total,  # [SIZE] fp32 pointer
    largest,  # [SIZE] fp32 pointer
    order,  # [programs] int32 pointer
    counter,  # [1] int32 pointer
    SIZE: tl.constexpr,
):
    """Column sums and maxima of values, and in which place each program ran. Grid: (programs,)."""
    offsets = tl.arange(0, SIZE)
    row = tl.load(values + tl.program_id(0) * SIZE + offsets)
    tl.atomic_add(total + offsets, row, sem="relaxed")
    tl.atomic_max(largest + offsets, row, sem="relaxed")
    tl.store(order + tl.program_id(0), tl.atomic_add(counter, 1))


@triton.jit
def overflow_kernel(
    out,  # [1] int64 pointer
    stride,
):
    """out = 3 * stride, in 32 bits. Grid: (1,)."""
    tl.store(out, (tl.program_id(0) + 3) * stride)


@triton.jit
def bf16_kernel(
    x,  # [16] bf16 pointer
    out,  # [16] bf16 pointer
    KIND: tl.constexpr,
):
    """What is not interpreted. Grid: (1,)."""
    tile = tl.load(x + tl.arange(0, 16))
    if KIND == "sum":
        tl.store(out, tl.sum(tile, 0))
    elif KIND == "atomic":
        tl.atomic_add(out + tl.arange(0, 16), tile)
    elif KIND == "negative":
        tl.store(out + tl.arange(0, 16), -tile)
    else:
        tl.store(out + tl.arange(0, 16), tile * tile)


def copied(source: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    target = torch.zeros(source.shape, dtype=dtype)
    copy_kernel[(1,)](source, target, source.numel(), source.numel(), False)
    return target


def product(a: torch.Tensor, b: torch.Tensor, precision: str = "ieee") -> torch.Tensor:
    """ones + a @ b^T"""
    out = torch.ones(a.shape[0], b.shape[0])
    dot_kernel[(1,)](a, b, out, a.shape[0], b.shape[0], a.shape[1], precision)
    return out


def same(got: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(got, expected, rtol=0, atol=0, equal_nan=True)


# ---- numbers


@check(as_it_comes="wrong")
def fp32_is_rounded_to_bf16():
    """Every upper half of the bits with the lower halves around a tie; NaN and infinity among them."""
    upper = torch.arange(2**16, dtype=torch.int32) * 2**16
    for lower in (0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF):
        values = (upper + lower).view(torch.float32)
        same(copied(values, torch.bfloat16), values.bfloat16())


@check(as_it_comes="wrong")
def every_bf16_becomes_its_fp32():
    values = torch.arange(2**16, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)
    same(copied(values, torch.float32), values.float())


@check(as_it_comes="wrong")
def the_two_half_precisions_become_each_other():
    bits = torch.arange(2**16, dtype=torch.int32).to(torch.int16)
    same(copied(bits.view(torch.bfloat16), torch.float16), bits.view(torch.bfloat16).half())
    same(copied(bits.view(torch.float16), torch.bfloat16), bits.view(torch.float16).bfloat16())


@check(as_it_comes="wrong")
def bf16_products_are_exact():
    a, b = (torch.randint(-8, 9, (size, 64)).bfloat16() for size in (16, 32))
    same(product(a, b), 1 + a.float() @ b.float().T)


@check(as_it_comes="right")
def fp16_products_are_summed_in_fp32():
    """An fp16 sum of ones stops at 2048; each product of 300 overflows fp16."""
    ones, large = torch.ones(16, 4096).half(), torch.full((16, 64), 300.0).half()
    same(product(ones, ones), torch.full((16, 16), 4097.0))
    same(product(large, large), torch.full((16, 16), 1 + 64 * 9e4))


@check(as_it_comes="wrong")
def tf32_has_ten_bits_of_mantissa():
    kept, lost = 1 + 2**-10, 1 + 2**-10 + 2**-11
    unit = torch.eye(16)
    same(product(torch.full((16, 16), lost), unit, "tf32"), torch.full((16, 16), 1 + kept))
    same(product(unit, torch.full((16, 16), -lost), "tf32"), torch.full((16, 16), 1 - kept))
    same(product(torch.full((16, 16), torch.inf), torch.ones(16, 16), "tf32"), torch.full((16, 16), torch.inf))


@check(as_it_comes="wrong")
def tf32x3_is_three_tf32_products():
    """Better than tf32 by far, but short of fp32; and an infinite operand makes no NaN."""
    a, b = (torch.randn(32, 64, generator=torch.Generator().manual_seed(seed)) for seed in (0, 1))
    exact = 1 + a.double() @ b.double().T
    errors = [float((product(a, b, precision).double() - exact).abs().max()) for precision in ("tf32", "tf32x3")]
    assert errors[0] > 1e-3
    assert errors[1] < 2e-5
    one = torch.zeros(16, 16)
    one[:, 0] = 1 + 2**-11  # 1 + 2^-10 and -2^-11: without the product of the two small parts, 2^-22
    same(product(one, one, "tf32x3"), torch.full((16, 16), 1 + 1 + 2 * 2**-11))
    one[:, 0] = 1 + 2**-11 + 2**-23  # 1 + 2^-10 and 2^-23 - 2^-11, of which the last bit is lost
    same(product(one, torch.eye(16), "tf32x3")[:, 0], torch.full((16,), 1 + 1 + 2**-11 + 2**-22))
    one[:, 0] = torch.inf
    same(product(one, torch.eye(16), "tf32x3")[:, 0], torch.full((16,), torch.inf))


@check(as_it_comes="right")
def maxima_leave_out_nan_where_there_is_a_number():
    x = torch.arange(256, dtype=torch.float32).view(16, 16)
    x[1, 3], x[2], x[3, 0] = torch.nan, torch.nan, -torch.inf
    results = [torch.zeros(16) for _ in range(3)]
    reduce_kernel[(1,)](x, *results)
    same(results[0], x.sum(1))
    expected = [torch.where(x.isnan(), other, x) for other in (-torch.inf, torch.inf)]
    expected = [expected[0].amax(1), expected[1].amin(1)]
    expected[0][2] = expected[1][2] = torch.nan
    same(results[1], expected[0])
    same(results[2], expected[1])


@check(as_it_comes="right")
def ieee_is_fp32():
    value = 1 + 2**-10 + 2**-23
    same(product(torch.full((16, 16), value), torch.eye(16)), torch.full((16, 16), 1 + value))


@check(as_it_comes="wrong")
def other_arithmetic_on_bf16_is_refused():
    x, out = torch.ones(16).bfloat16(), torch.zeros(16).bfloat16()
    for kind in ("sum", "atomic", "negative", "product"):
        refused(lambda kind=kind: bf16_kernel[(1,)](x, out, kind), "bf16 (is|are) not interpreted")


@check(as_it_comes="wrong")
def overflows_of_32_bit_offsets_are_refused():
    out = torch.zeros(1, dtype=torch.int64)
    refused(lambda: overflow_kernel[(1,)](out, 2**30), "overflow")
    overflow_kernel[(1,)](out, 2**29)
    assert out.item() == 3 * 2**29


# ---- memory


def move_tiles(dtype: torch.dtype, add: bool) -> None:
    """A tile that fits, one that crosses N, and one that crosses C, where the next batch element must not show."""
    C, N, tile = 20, 40, 16
    x, y = torch.randn(2, C, N).to(dtype), torch.randn(2, C, N).to(dtype)
    descriptors = [TensorDescriptor(tensor, [2, C, N], [C * N, N, 1], [1, tile, tile]) for tensor in (x, y)]
    for batch, channel, position in ((0, 16, 0), (1, 0, 16), (0, 0, 32), (0, 16, 32)):
        inside = (batch, slice(channel, channel + tile), slice(position, position + tile))
        seen, expected = torch.full((tile, tile), 7.0).to(dtype), torch.zeros(tile, tile, dtype=dtype)
        part = x[inside]
        expected[: part.shape[0], : part.shape[1]] = part
        changed = y.clone()
        changed[inside] = y[inside] + part if add else part
        descriptor_kernel[(1,)](*descriptors, seen, batch, channel, position, tile, tile, add)
        same(seen, expected)
        same(y, changed)


@check(as_it_comes="right")
def descriptors_read_zero_outside_and_write_nothing_there():
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        move_tiles(dtype, add=False)


@check(as_it_comes="wrong")
def descriptors_add():
    move_tiles(torch.float32, add=True)


@check(as_it_comes="wrong")
def no_access_outside_of_the_tensors_given():
    """One element beyond a view in the middle of its storage, where reading would go unnoticed."""
    storage = torch.zeros(64)
    view, other = storage[16:48], torch.zeros(32)
    copy_kernel[(1,)](view, other, 32, 32, False)
    copy_kernel[(1,)](view, other, 31, 32, False)
    for source, target in ((view[:31], other), (other, view[:31]), (view[1:], other)):
        refused(lambda given=(source, target): copy_kernel[(1,)](*given, 32, 32, False), "not within one")
        copy_kernel[(1,)](source, target, 31, 32, False)


@check(as_it_comes="wrong")
def what_a_masked_load_leaves_open_is_nan():
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        source, target = torch.ones(16, dtype=dtype), torch.zeros(16)
        copy_kernel[(1,)](source, target, 11, 16, True)
        same(target, torch.tensor([1.0] * 11 + [torch.nan] * 5))


# ---- programs


@check(as_it_comes="right")
def loops_have_run_time_bounds():
    for bounds in ((0, 10, 3), (5, 5, 1), (-4, 9, 2)):
        out = torch.zeros(4, dtype=torch.int32)
        loop_kernel[(1,)](out, *bounds)
        first, last, step = bounds
        assert out.tolist() == [sum(range(*bounds))] * 2 + [6, min(first + step, last)]


@check(as_it_comes="wrong")
def constants_of_a_module_meet_tensors_on_either_side():
    out, numbers = torch.zeros(2, 16), torch.arange(16)
    constant_kernel[(1,)](out)
    same(out, torch.stack([3.0 - numbers, (numbers > 3).float()]))


def atomics() -> tuple[torch.Tensor, ...]:
    values = torch.arange(-40, 24, dtype=torch.float32).view(4, 16)
    total, largest = torch.zeros(16), torch.full((16,), -torch.inf)
    order, counter = torch.zeros(4, dtype=torch.int32), torch.zeros(1, dtype=torch.int32)
    atomic_kernel[(4,)](values, total, largest, order, counter, 16)
    same(total, values.sum(0))
    same(largest, values.amax(0))
    return order, counter


@check(as_it_comes="right")
def atomics_add_and_take_the_maximum():
    order, counter = atomics()
    assert order.tolist() == [0, 1, 2, 3]
    assert counter.item() == 4


@check(as_it_comes="wrong")
def programs_run_in_reverse_on_request():
    with triton_interpreter.reversed_programs():
        assert atomics()[0].tolist() == [3, 2, 1, 0]


@check(as_it_comes="wrong")
def several_threads_launch_at_once():
    rows = torch.randn(64, 16)

    def work(index: int) -> bool:
        target = torch.zeros(64, 16)
        copy_kernel[(64,)](rows, target, 16, 16, False)
        return torch.equal(target, rows)

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(work, range(16)))


@pytest.mark.parametrize("name", CHECKS)
def test_mended(name):
    CHECKS[name]()


def test_the_interpreter_needs_mending():
    """Each check that says so fails without the patch: a version of Triton that has mended itself is noticed."""
    done = subprocess.run([sys.executable, __file__], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert set(json.loads(done.stdout)) == FAIL_AS_IT_COMES


def fails(function: Callable[[], None]) -> bool:
    try:
        function()
    except BaseException:  # pytest.fail is no Exception
        return True
    return False


if __name__ == "__main__":
    print(json.dumps([name for name, function in CHECKS.items() if fails(function)]))
