"""What NaN and infinity do: the tables of docs/math.md, against its blocks, the reference and the backends.

The name of a row picks the inputs and its cells are the expectation, so neither can change without the other.
"""

from __future__ import annotations

import math
from functools import partial

import pytest
import torch
from math_doc import DOC, DOCS, VARIANTS, channel_inputs, gradients, position_inputs, run_blocks, table
from on_backend import BACKENDS, GPU_BACKENDS, backend_params, device_of

import danet_kernels
from danet_kernels import reference

# Where the bad value sits, in batch item 0.
QUERY, KEY, CHANNEL, POSITION = 1, 4, 2, 3
TILE = 2
HUGE = 1e20  # its square overflows in fp32


def poisoned_position(case):
    """q, k, v, residual, gamma, dout in fp32. The last channel of q and k is zero, or sets logits."""
    q, k, v, residual, dout = position_inputs(dtype=torch.float32)
    q[:, -1], k[:, -1] = 0, 0
    gamma = torch.tensor(0.5)

    def logits(queries, keys, value):
        q[0, -1, queries], k[0, -1, keys] = HUGE, HUGE if value > 0 else -HUGE

    every = slice(None)
    poison = {
        "NaN in `q_i`": lambda: q[0, 0, QUERY].fill_(torch.nan),
        "infinity in `q_i`": lambda: q[0, 0, QUERY].fill_(torch.inf),
        "NaN in `k_j`": lambda: k[0, 0, KEY].fill_(torch.nan),
        "NaN in `v_cj`": lambda: v[0, CHANNEL, KEY].fill_(torch.nan),
        "infinity in `v_cj`, all `P_ij > 0`": lambda: v[0, CHANNEL, KEY].fill_(torch.inf),
        "infinity in `v_cj`, all `P_ij = 0`": lambda: (
            v[0, CHANNEL, KEY].fill_(torch.inf),
            logits(every, KEY, -1),
        ),
        "`S_ij = +inf`": lambda: logits(QUERY, KEY, +1),
        "`S_ij = -inf`, not for all keys": lambda: logits(QUERY, KEY, -1),
        "`S_ij = -inf` for the first tile of keys": lambda: logits(QUERY, slice(TILE), -1),
        "`S_ij = -inf` for all keys": lambda: logits(QUERY, every, -1),
        "NaN in `residual_ci`": lambda: residual[0, CHANNEL, QUERY].fill_(torch.nan),
        "`gamma` NaN": lambda: gamma.fill_(torch.nan),
        "`gamma = 0`, `attn` finite": lambda: gamma.zero_(),
        "`gamma = 0`, infinity in `v_cj`": lambda: (gamma.zero_(), v[0, CHANNEL, KEY].fill_(torch.inf)),
    }
    poison[case]()
    return q, k, v, residual, gamma, dout


def poisoned_channel(case):
    """x, gamma, dout in fp32."""
    x, dout = channel_inputs(dtype=torch.float32)
    gamma = torch.tensor(0.5)

    def overflow():
        x[0, :, POSITION], dout[0, :, POSITION] = 0, 0
        x[0, CHANNEL, POSITION] = HUGE

    def infinite(others):
        x[0] = others(x[0].abs())
        x[0, CHANNEL, POSITION] = torch.inf

    poison = {
        "NaN in `x_cn`": lambda: x[0, CHANNEL, POSITION].fill_(torch.nan),
        "infinity in `x_cn`": lambda: x[0, CHANNEL, POSITION].fill_(torch.inf),
        "infinity in `x_cn`, the rest of its sign": lambda: infinite(torch.abs),
        "infinity in `x_cn`, the rest of the other sign": lambda: infinite(torch.neg),
        "`x` finite, `G_cc = +inf` by overflow": overflow,
        "`gamma` NaN": lambda: gamma.fill_(torch.nan),
        "`gamma = 0`, `attn` finite": lambda: gamma.zero_(),
    }
    poison[case]()
    return x, gamma, dout


@pytest.fixture(params=["docs", "reference", *backend_params(*BACKENDS)])
def by(request):
    """Who computes: the blocks of the page, the reference, or the public functions on one backend."""
    return request.param


def gradients_on(backend, op, inputs, dout, **options):
    """The result and the gradients of all inputs, computed on the device of the backend."""
    function = partial(getattr(danet_kernels, op), backend=backend, **options)
    device = device_of(backend)
    out, computed = gradients(function, [tensor.to(device) for tensor in inputs], dout.to(device))
    return out.cpu(), tuple(gradient.cpu() for gradient in computed)


def compute_position(by, q, k, v, residual, gamma, dout):
    """out, dq, dk, dv, dgamma"""
    if by == "docs":
        out, attn, lse = DOC["position_forward"](q, k, v, residual, gamma, 1.0, TILE)
        return out, *DOC["position_backward"](dout, q, k, v, attn, lse, gamma)
    if by == "reference":
        computed = gradients(reference.position_attention, (q, k, v, residual, gamma), dout)
    else:
        computed = gradients_on(by, "position_attention", (q, k, v, residual, gamma), dout)
    out, (dq, dk, dv, dresidual, dgamma) = computed
    assert torch.equal(dresidual, dout)
    return out, dq, dk, dv, dgamma


def compute_channel(by, x, gamma, dout, variant):
    """out, dx, dgamma"""
    if by == "docs":
        out, *statistics = DOC["channel_forward"](x, gamma, variant, block=3)
        return out, *DOC["channel_backward"](dout, x, *statistics, gamma, variant, block=3)
    if by == "reference":
        out, grads = gradients(partial(reference.channel_attention, variant=variant), (x, gamma), dout)
    else:
        out, grads = gradients_on(by, "channel_attention", (x, gamma), dout, variant=variant)
    return out, *grads


def check_cell(cell, tensor):
    """tensor: the gradient or output of batch item 0."""
    kind, _, place = cell.partition(": ")
    mask = torch.zeros(tensor.shape, dtype=torch.bool)
    index = {
        "": ..., "all": ..., "query i": (..., QUERY), "element (c, i)": (CHANNEL, QUERY),
        "channel c": CHANNEL, "channel c and position n": CHANNEL,
    }[place]  # fmt: skip
    mask[index] = kind != "finite"
    if place == "channel c and position n":
        mask[:, POSITION] = True
    named = tensor[mask]
    holds = {
        "finite": True,
        "NaN": named.isnan().all(),
        "inf": named.isinf().all(),
        "bad": ~named.isfinite().any(),
    }
    assert holds[kind], f"expected {cell}, got {tensor}"
    assert torch.isfinite(tensor[~mask]).all(), f"expected {cell}, got {tensor}"


def check_row(row, columns, results):
    for column, tensor in zip(columns, results, strict=True):
        if column == "dgamma":
            check_cell(row[column], tensor)
            continue
        check_cell(row[column], tensor[0])
        check_cell(row[column] if "gamma` NaN" in row["case"] else "finite", tensor[1])


POSITION_ROWS = [row | {"case": row["position attention"]} for row in table("position attention")]
CHANNEL_ROWS = [
    row | {"case": row["channel attention"], "variant": variant}
    for row in table("channel attention")
    for variant in (VARIANTS if row["variant"] == "both" else (row["variant"],))
]


@pytest.mark.parametrize("row", POSITION_ROWS, ids=lambda row: row["case"])
def test_position_nan_and_infinity(row, by):
    results = compute_position(by, *poisoned_position(row["case"]))
    if by in GPU_BACKENDS and row["case"].startswith("`gamma = 0`"):
        assert not any(gradient.any() for gradient in results[1:4])
        row = row | dict.fromkeys(("dq", "dk", "dv"), "finite")  # as the page says below the table
    check_row(row, ("out", "dq", "dk", "dv", "dgamma"), results)


@pytest.mark.parametrize("row", CHANNEL_ROWS, ids=lambda row: f"{row['case']}-{row['variant']}")
def test_channel_nan_and_infinity(row, by):
    results = compute_channel(by, *poisoned_channel(row["case"]), row["variant"])
    check_row(row, ("out", "dx", "dgamma"), results)


def test_no_row_is_missing():
    assert (len(POSITION_ROWS), len(CHANNEL_ROWS)) == (14, 11)


def test_gamma_zero_is_exact_in_position_attention(by):
    inputs = poisoned_position("`gamma = 0`, `attn` finite")
    out, dq, dk, dv, dgamma = compute_position(by, *inputs)
    assert torch.equal(out, inputs[3])
    assert not any(gradient.any() for gradient in (dq, dk, dv))
    assert dgamma != 0


@pytest.mark.parametrize("variant", VARIANTS)
def test_gamma_zero_is_exact_in_channel_attention(by, variant):
    x, gamma, dout = poisoned_channel("`gamma = 0`, `attn` finite")
    out, dx, dgamma = compute_channel(by, x, gamma, dout, variant)
    assert torch.equal(out, x)
    assert torch.equal(dx, dout)
    assert dgamma != 0


def test_no_keys():
    q, k, v, residual, _ = position_inputs(N=0)
    able = [name for name in BACKENDS if not danet_kernels.available_backends("position_attention", q)[name]]
    on_backends = [partial(danet_kernels.position_attention, backend=name) for name in able]
    for function in (reference.position_attention, *on_backends):
        assert torch.equal(function(q, k, v, residual), residual)
    _, _, lse = torch.ops.danet_kernels.position_attention_forward(q, k, v, None, None, 1.0, True, "auto")
    assert (lse == -torch.inf).all()


# ---- docs/numerics.md


def test_fp16_channel_attention_overflows_where_numerics_says():
    numerics = run_blocks("numerics.md")
    text = (DOCS / "numerics.md").read_text(encoding="utf-8")
    (figures,) = table("N", text)
    del figures["N"]
    x, _ = channel_inputs()
    assert torch.equal(numerics["eager_channel_map"](x), DOC["channel_map_of_the_authors"](x @ x.mT))
    for positions, printed in figures.items():
        limit = numerics["largest_mean_square"](int(positions))
        assert f"{limit:.1f}" == printed
        for factor, finite in ((0.9, True), (1.1, False)):
            x = torch.full((1, 2, int(positions)), math.sqrt(factor * limit), dtype=torch.float16)
            assert torch.isfinite(numerics["eager_channel_map"](x)).all().item() is finite
            assert torch.isfinite(numerics["eager_channel_map"](x.float())).all()
