"""NaN and infinity: every backend agrees with reference.py in fp32 on the inputs converted to fp32, gradients included.

docs/math.md tabulates what that means; here each cell is run at sizes of several tiles. Compared are the places that
are NaN, those that are infinite and their signs, and the numbers where all is finite. Where the table leaves open which
of NaN and infinity a value is ("bad"), so does the test.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch
from cases import (
    VARIANTS,
    ChannelCase,
    PositionCase,
    Problem,
    accumulator_dtype,
    for_each_variant,
)
from on_backend import GPU_BACKENDS, for_each_backend, on_tensor_cores

from danet_kernels._error_rule import evaluate

B, D, C, M, N = 2, 8, 20, 150, 700  # two tiles of queries, two tiles of keys
QUERY, KEY, CHANNEL, POSITION = 131, 600, 7, 33  # where the bad value sits, in batch item 0
EVERY, FIRST_TILES = slice(None), slice(520)
HUGE = 1e20  # its square overflows fp32

DTYPES = ["fp32", "bf16", "fp16", "fp64"]


def logit(problem: Problem, queries, keys, sign: float) -> None:
    """Make logits infinite by overflow, as finite inputs can; the last channel of query and key is there for that."""
    problem.tensors["query"][0, -1, queries] = HUGE
    problem.tensors["key"][0, -1, keys] = sign * HUGE


def put(name: str, index: tuple, value: float) -> Callable[[Problem], None]:
    def poison(problem: Problem) -> None:
        problem.tensors[name][(0, *index)] = value

    return poison


POSITION_CELLS: dict[str, Callable[[Problem], None]] = {
    "query_nan": put("query", (1, QUERY), torch.nan),
    "query_inf": put("query", (1, QUERY), torch.inf),
    "key_nan": put("key", (1, KEY), torch.nan),
    "key_nan_in_first_tile": put("key", (1, 3), torch.nan),
    "value_nan": put("value", (CHANNEL, KEY), torch.nan),
    "value_inf": put("value", (CHANNEL, KEY), torch.inf),
    "value_minus_inf_in_first_tile": put("value", (CHANNEL, 3), -torch.inf),
    "residual_nan": put("residual", (CHANNEL, QUERY), torch.nan),
    "residual_inf": put("residual", (CHANNEL, QUERY), torch.inf),
    "dout_nan": lambda problem: problem.dout[0, CHANNEL, QUERY].fill_(torch.nan),
    "dout_inf": lambda problem: problem.dout[0, CHANNEL, QUERY].fill_(torch.inf),
    "gamma_inf": lambda problem: problem.tensors["gamma"].fill_(torch.inf),
    "gamma_zero_value_inf": lambda problem: (
        problem.tensors["gamma"].zero_(),
        put("value", (CHANNEL, KEY), torch.inf)(problem),
    ),
}
OVERFLOW_CELLS: dict[str, Callable[[Problem], None]] = {
    "logit_plus_inf": lambda problem: logit(problem, QUERY, KEY, +1),
    "logit_plus_inf_in_first_tile": lambda problem: logit(problem, QUERY, 3, +1),
    "logit_minus_inf": lambda problem: logit(problem, QUERY, KEY, -1),
    "first_tiles_minus_inf": lambda problem: logit(problem, QUERY, FIRST_TILES, -1),
    "first_tiles_minus_inf_for_all_queries": lambda problem: logit(problem, EVERY, FIRST_TILES, -1),
    "last_tiles_minus_inf": lambda problem: logit(problem, EVERY, slice(512, None), -1),
    "all_but_one_minus_inf": lambda problem: (logit(problem, QUERY, EVERY, -1), put("key", (-1, KEY), 0.0)(problem)),
    "row_minus_inf": lambda problem: logit(problem, QUERY, EVERY, -1),
    "value_inf_without_weight": lambda problem: (
        logit(problem, EVERY, KEY, -1),
        put("value", (CHANNEL, KEY), torch.inf)(problem),
    ),
    "value_nan_without_weight_in_first_tile": lambda problem: (
        logit(problem, EVERY, 3, -1),
        put("value", (CHANNEL, 3), torch.nan)(problem),
    ),
    "value_inf_in_a_first_tile_without_weight": lambda problem: (
        logit(problem, EVERY, FIRST_TILES, -1),
        put("value", (CHANNEL, 3), torch.inf)(problem),
    ),
}
"""Only where HUGE is a number of the dtype and its square is not: fp32 and bf16."""

CHANNEL_CELLS: dict[str, Callable[[Problem], None]] = {
    "x_nan": put("x", (CHANNEL, POSITION), torch.nan),
    "x_inf": put("x", (CHANNEL, POSITION), torch.inf),
    "x_minus_inf": put("x", (CHANNEL, POSITION), -torch.inf),
    "x_inf_rest_positive": lambda problem: (
        problem.tensors["x"].abs_(),
        put("x", (CHANNEL, POSITION), torch.inf)(problem),
    ),
    "x_inf_rest_negative": lambda problem: (
        problem.tensors["x"].abs_().neg_(),
        put("x", (CHANNEL, POSITION), torch.inf)(problem),
    ),
    "dout_nan": lambda problem: problem.dout[0, CHANNEL, POSITION].fill_(torch.nan),
    "gamma_inf": lambda problem: problem.tensors["gamma"].fill_(torch.inf),
    "gamma_zero_x_inf": lambda problem: (
        problem.tensors["gamma"].zero_(),
        put("x", (CHANNEL, POSITION), torch.inf)(problem),
    ),
}


def position_problem(dtype: str) -> Problem:
    problem = PositionCase(B, D, C, M, N, dtype, gamma=-0.5).problem()
    problem.tensors["query"][:, -1] = 0
    problem.tensors["key"][:, -1] = 0
    return problem


def assert_agrees_with_reference(
    problem: Problem, backend: str, *, open_kind: bool = False, zeros: Sequence[str] = ()
) -> None:
    """`open_kind`: which of NaN, inf and -inf a value that is not finite is may differ. `zeros`: results that are zero
    whatever the reference says."""
    dtype = problem.dout.dtype
    expected = evaluate(problem.reference, problem.tensors, problem.dout, dtype=accumulator_dtype(dtype))
    for name, result in problem.run(backend).items():
        if name in zeros:
            assert not result.any(), name
            continue
        wanted, got = expected[name].to(result.dtype).double(), result.double()
        places = torch.isfinite(wanted) != torch.isfinite(got)
        if not open_kind:
            places |= wanted.isnan() != got.isnan()
            places |= wanted.isinf() & got.isinf() & (wanted != got)
        where = places.nonzero()
        assert not len(where), (
            f"{name}: {len(where)} of {got.numel()} places differ, the first at {where[0].tolist()}: "
            f"got {got[places][0]}, expected {wanted[places][0]}"
        )
        finite = wanted.isfinite()
        if name in ("dquery", "dkey"):
            finite[:, -1] = False  # rounding errors times HUGE: only whether they are finite is of interest
        # dgamma adds up terms of either sign: what it is accurate to depends on their size, not on its own.
        terms = problem.dout[problem.dout.isfinite()].double() if name == "dgamma" else wanted[finite]
        size = float(terms.norm() if name == "dgamma" else terms.abs().max()) if len(terms) else 0.0
        sums_of_rounded = name == "dgamma" and on_tensor_cores(backend)
        relative = max(torch.finfo(dtype if sums_of_rounded else result.dtype).eps, 1e-5)
        torch.testing.assert_close(
            got[finite],
            wanted[finite],
            rtol=4 * relative,
            atol=4 * relative * size,
            msg=lambda m, name=name: f"{name}: {m}",
        )


@for_each_backend
@pytest.mark.parametrize("cell", POSITION_CELLS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_position_cell(dtype, cell, backend):
    problem = position_problem(dtype)
    POSITION_CELLS[cell](problem)
    # An infinite value meets weights that underflow: 0 * inf or tiny * inf. The table says "bad".
    leaves_early = backend in GPU_BACKENDS and cell == "gamma_zero_value_inf"
    zeros = ("dquery", "dkey", "dvalue") if leaves_early else ()
    assert_agrees_with_reference(problem, backend, open_kind="inf" in cell, zeros=zeros)


@for_each_backend
@pytest.mark.parametrize("cell", OVERFLOW_CELLS)
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_position_overflow_cell(dtype, cell, backend):
    problem = position_problem(dtype)
    OVERFLOW_CELLS[cell](problem)
    assert_agrees_with_reference(problem, backend)


@for_each_backend
def test_infinity_with_weight_everywhere_is_infinity(backend):
    """Logits of moderate size, so that no weight underflows: then even the kind and the sign are fixed."""
    problem = PositionCase(B, D, C, M, N, "fp32", gamma=0.5, scale=0.125).problem()
    put("value", (CHANNEL, KEY), -torch.inf)(problem)
    out = problem.run(backend)["out"]
    assert torch.equal(out[0, CHANNEL], torch.full((M,), -torch.inf))
    out[0, CHANNEL] = 0
    assert out.isfinite().all()


@for_each_backend
@for_each_variant
@pytest.mark.parametrize("cell", CHANNEL_CELLS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_channel_cell(dtype, cell, variant, backend):
    problem = ChannelCase(B, 140, 40, dtype, variant, gamma=-0.5).problem()
    CHANNEL_CELLS[cell](problem)
    assert_agrees_with_reference(problem, backend, open_kind="inf" in cell)


@for_each_backend
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_energy_overflows(dtype, variant, backend):
    """x is finite, one diagonal energy is +inf."""
    problem = ChannelCase(B, 140, 40, dtype, variant, gamma=-0.5).problem()
    problem.tensors["x"][0, :, POSITION] = 0
    problem.dout[0, :, POSITION] = 0
    put("x", (CHANNEL, POSITION), HUGE)(problem)
    assert_agrees_with_reference(problem, backend)


@for_each_backend
@pytest.mark.parametrize("dtype", DTYPES)
def test_one_bad_query_spoils_one_column(dtype, backend):
    """The other queries and the other batch items do not see it."""
    problem = position_problem(dtype)
    clean = problem.run(backend)["out"]
    put("query", (1, QUERY), torch.nan)(problem)
    out = problem.run(backend)["out"]
    assert out[0, :, QUERY].isnan().all()
    out[0, :, QUERY] = clean[0, :, QUERY]
    assert torch.equal(out, clean)


@for_each_backend
def test_a_lone_finite_key_wins_whatever_comes_before_it(backend):
    """All of a query's logits are -inf but one, in the last tile: its output is that key's value."""
    problem = position_problem("fp32")
    OVERFLOW_CELLS["all_but_one_minus_inf"](problem)
    problem.tensors = {name: problem.tensors[name] for name in ("query", "key", "value")}
    out = problem.run(backend)["out"]
    torch.testing.assert_close(out[0, :, QUERY], problem.tensors["value"][0, :, KEY], rtol=1e-6, atol=0)
