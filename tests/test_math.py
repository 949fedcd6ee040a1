"""docs/math.md is executed: formulas, Python blocks and cost tables are compared with other definitions."""

from __future__ import annotations

import inspect
import itertools
import re

import pytest
import torch
from math_doc import (
    DOC,
    FORMULAS,
    PROSE,
    TEXT,
    VARIANTS,
    channel_inputs,
    close,
    define_channel,
    define_position,
    evaluate,
    fenced,
    gradients,
    number,
    position_inputs,
    random,
    table,
)
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

EVERY_BLOCK_FUNCTION = {
    "flatten_map", "output_is_channels_last", "online_softmax", "position_forward", "position_backward",
    "channel_map_of_the_authors", "gram", "channel_forward", "channel_backward",
    "weights_from_lse", "weights_from_max_and_sum",
}  # fmt: skip


# ---- formulas and blocks


def test_no_block_goes_unchecked():
    functions = {name for name, value in DOC.items() if callable(value) and not name.startswith("__")}
    assert functions == EVERY_BLOCK_FUNCTION
    assert len(FORMULAS) == 4
    assert TEXT.count("```") == 2 * (len(FORMULAS) + len(fenced(TEXT, "python")))


@pytest.mark.parametrize("scale", [1.0, -0.7])
def test_position_formulas(scale):
    q, k, v, residual, dout = position_inputs(B=1)
    gamma = number(-0.5)
    out, expected = gradients(lambda *t: define_position(*t, scale), (q, k, v, residual, gamma), dout)
    sizes = {"c": v.shape[1], "d": q.shape[1], "i": q.shape[2], "j": k.shape[2]}
    inputs = {"q": q[0], "k": k[0], "v": v[0], "residual": residual[0], "dout": dout[0]}
    known = evaluate(FORMULAS[0], sizes, inputs | {"gamma": -0.5, "scale": scale})
    known = evaluate(FORMULAS[1], sizes, known)
    close(known["out"], out[0])
    for name, gradient in zip(("dq", "dk", "dv", "dresidual"), expected, strict=False):
        close(known[name], gradient[0])
    close(known["dgamma"], expected[-1])


@pytest.mark.parametrize("variant", VARIANTS)
def test_channel_formulas(variant):
    x, dout = channel_inputs(B=1)
    out, expected = gradients(lambda x, gamma: define_channel(x, gamma, variant), (x, number(-0.5)), dout)
    sizes = {"c": x.shape[1], "i": x.shape[1], "n": x.shape[2]}
    constants = {"gamma": -0.5, "sign": DOC["SIGN"][variant]}
    known = evaluate(FORMULAS[2], sizes, {"x": x[0], "dout": dout[0]} | constants)
    known = evaluate(FORMULAS[3], sizes, known)
    close(known["out"], out[0])
    close(known["dx"], expected[0][0])
    _, (dG,) = gradients(lambda G: -0.5 * torch.softmax(constants["sign"] * G, -1) @ x, (x @ x.mT,), dout)
    close(known["dG"], dG[0])
    close(known["dgamma"], expected[1])


def test_layouts():
    x = torch.empty(2, 3, 4, 5)
    crop = torch.empty(2, 3, 8, 9)[:, :, 1:5, 2:7]
    for feature_map, channels_last, shares in (
        (x, False, True),
        (x.to(memory_format=torch.channels_last), True, True),
        (crop, False, False),
    ):
        flat = DOC["flatten_map"](feature_map)
        assert flat.shape == (2, 3, 20)
        assert (flat.data_ptr() == feature_map.data_ptr()) is shares
        assert DOC["output_is_channels_last"](flat) is channels_last
    for C, N, channels_last in ((2, 2, True), (1, 2, False), (2, 1, False)):
        assert DOC["output_is_channels_last"](torch.empty(2, N, C).mT) is channels_last


@pytest.mark.parametrize("tile", [1, 2, 3, 8])
@pytest.mark.parametrize("offset", [0.0, 700.0, -1e35])
def test_online_softmax(tile, offset):
    S, v = 5 * random(2, 6, 8), random(2, 3, 8, seed=1)
    S[0, 0, :4] = -torch.inf
    S[1, 2, 3:] = -torch.inf
    S[1, 3] = S[1, 3].sort().values
    S = S + offset
    attn, lse = DOC["online_softmax"](zip(S.split(tile, -1), v.split(tile, -1), strict=True))
    close(attn, v @ torch.softmax(S, -1).mT)
    close(lse, torch.logsumexp(S, -1))


@pytest.mark.parametrize("tile", [1, 3, 64])
@pytest.mark.parametrize("gamma", [1.0, -0.5, 0.0])
@pytest.mark.parametrize("scale", [1.0, -0.7])
def test_position_blocks(tile, gamma, scale):
    q, k, v, residual, dout = position_inputs()
    inputs = q, k, v, residual, number(gamma)
    expected_out, (dq, dk, dv, _, dgamma) = gradients(lambda *t: define_position(*t, scale), inputs, dout)
    out, attn, lse = DOC["position_forward"](*inputs, scale, tile)
    close(out, expected_out)
    close(attn, define_position(q, k, v, 0.0, 1.0, scale))
    close(lse, torch.logsumexp(scale * (q.mT @ k), -1))
    got = DOC["position_backward"](dout, q, k, v, attn, lse, gamma, scale)
    for gradient, expected in zip(got, (dq, dk, dv, dgamma), strict=True):
        close(gradient, expected)


def test_position_defaults():
    q, k, v, _, dout = position_inputs()
    out, attn, lse = DOC["position_forward"](q, k, v)
    close(out, define_position(q, k, v, 0.0, 1.0))
    with_defaults = DOC["position_backward"](dout, q, k, v, attn, lse)
    spelled_out = DOC["position_backward"](dout, q, k, v, attn, lse, 1.0, 1.0)
    assert all(map(torch.equal, with_defaults, spelled_out))


@pytest.mark.parametrize("block", [1, 3, 128])
def test_gram_by_symmetry(block):
    x, _ = channel_inputs(C=7)
    close(DOC["gram"](x, block), x @ x.mT)


def test_the_sign_of_the_authors_code():
    x, _ = channel_inputs()
    G = x @ x.mT
    close(DOC["channel_map_of_the_authors"](G), torch.softmax(-G, -1))
    G[0, 1, 2] = torch.inf
    spoilt = DOC["channel_map_of_the_authors"](G).isnan()
    assert spoilt[0, 1].all()
    assert spoilt.sum() == spoilt[0, 1].numel()


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("residual", [True, False])
@pytest.mark.parametrize("gamma", [1.0, -0.5, 0.0])
def test_channel_blocks(variant, residual, gamma):
    x, dout = channel_inputs()
    inputs = x, number(gamma)
    expected_out, expected = gradients(lambda *t: define_channel(*t, variant, residual), inputs, dout)
    out, row_max, row_sum = DOC["channel_forward"](x, gamma, variant, residual, 3)
    S = (x @ x.mT) * (-1 if variant == "official" else 1)
    close(out, expected_out)
    close(row_max, S.amax(-1))
    close(row_sum, torch.exp(S - S.amax(-1, keepdim=True)).sum(-1))
    got = DOC["channel_backward"](dout, x, row_max, row_sum, gamma, variant, residual, 3)
    for gradient, wanted in zip(got, expected, strict=True):
        close(gradient, wanted)


def test_channel_defaults():
    x, dout = channel_inputs()
    out, *statistics = DOC["channel_forward"](x)
    close(out, define_channel(x, 1.0, "official"))
    with_defaults = DOC["channel_backward"](dout, x, *statistics)
    spelled_out = DOC["channel_backward"](dout, x, *statistics, 1.0, "official", True)
    assert all(map(torch.equal, with_defaults, spelled_out))


def test_why_row_max_and_row_sum_are_kept_apart():
    above = torch.tensor(65536.0)
    spacing = (torch.nextafter(above, above + 1) - above).item()
    assert f"above 65536 neighbouring fp32 numbers are 1/{round(1 / spacing)} apart" in PROSE
    assert f"up to 1/{round(2 / spacing)} " in PROSE
    assert f"up to {100 * spacing / 2:.1f} %" in PROSE
    worst = {"weights_from_lse": 0.0, "weights_from_max_and_sum": 0.0}
    for equal_channels, name in itertools.product(range(2, 65), worst):
        S = torch.full((1, 1, equal_channels), 1e5)
        P = DOC[name](S, S.amax(-1), torch.tensor([[float(equal_channels)]]))
        worst[name] = max(worst[name], (P.double() * equal_channels - 1).abs().max().item())
    assert 0.003 < worst["weights_from_lse"] <= 0.004
    assert worst["weights_from_max_and_sum"] < 1e-6


# ---- cost


SIZES = {"B": 2, "C": 8, "D": 3, "M": 5, "N": 7, "T": 4}


def counted(function):
    with FlopCounterMode(display=False) as counter:
        function()
    return counter.get_total_flops()


def in_backticks(cell):
    return re.findall(r"`([^`]*\*[^`]*)`", cell)


def measured_flops():
    q, k, v, residual, dout = position_inputs(*(SIZES[letter] for letter in "BDCMN"))
    x, dy = channel_inputs(*(SIZES[letter] for letter in "BCN"))
    _, attn, lse = DOC["position_forward"](q, k, v)
    _, *statistics = DOC["channel_forward"](x)
    eager = define_position(*(t.requires_grad_() for t in (q.clone(), k.clone(), v.clone())), residual, 1.0)
    return {
        "position forward": counted(lambda: DOC["position_forward"](q, k, v, tile=4)),
        "position backward": counted(lambda: DOC["position_backward"](dout, q, k, v, attn, lse)),
        "position backward, map saved (eager)": counted(lambda: eager.backward(dout)),
        "channel forward": counted(lambda: DOC["channel_forward"](x)),
        "channel backward": counted(lambda: DOC["channel_backward"](dy, x, *statistics)),
        "`G` by symmetry": counted(lambda: DOC["gram"](x, SIZES["C"] // SIZES["T"])),
    }


def test_flops():
    measured = measured_flops()
    rows = table("pass")
    assert [row["pass"] for row in rows] == list(measured)
    for row in rows:
        assert sum(eval(term, dict(SIZES)) for term in in_backticks(row["GEMMs"])) == measured[row["pass"]]
        assert eval(row["FLOPs"].strip("`"), dict(SIZES)) == measured[row["pass"]]
    full = 2 * SIZES["B"] * SIZES["C"] ** 2 * SIZES["N"]
    assert measured["`G` by symmetry"] / full == 5 / 8
    rows = inspect.signature(DOC["gram"]).parameters["block"].default
    assert 512 / rows == SIZES["T"]
    assert f"With four blocks of {rows} rows `G` costs 5/8 of the full product" in PROSE
    forward, backward = re.search(r"`([^`]+)` forward and `([^`]+)` backward", PROSE).groups()
    for formula, name in ((forward, "channel forward"), (backward, "channel backward")):
        assert eval(formula, dict(SIZES)) == measured[name] - full + measured["`G` by symmetry"]


def peak_bytes(function):
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        function()
    events = [event for event in recorded.profiler.kineto_results.events() if event.name() == "[memory]"]
    events.sort(key=lambda event: event.start_ns())
    return max(itertools.accumulate(event.nbytes() for event in events))


def test_memory_of_the_eager_form():
    sizes = {"B": 1, "C": 8, "D": 4, "M": 384, "N": 512}
    q, k, v, residual, dout = position_inputs(*(sizes[letter] for letter in "BDCMN"))
    narrow = {"B": 1, "C": 256, "N": 4}
    x, dy = channel_inputs(*narrow.values())
    measured = {
        "position, forward": (sizes, lambda: define_position(q, k, v, residual, 1.0)),
        "position, forward and backward": (
            sizes,
            lambda: gradients(lambda *t: define_position(*t, residual, 1.0), (q, k, v), dout),
        ),
        "channel, forward": (narrow, lambda: define_channel(x, 1.0, "official")),
        "channel, forward and backward": (
            narrow,
            lambda: gradients(lambda x: define_channel(x, 1.0, "official"), (x,), dy),
        ),
    }
    rows = {row["elements"]: row for row in table("elements")}
    assert list(rows) == list(measured)
    for name, (these, function) in measured.items():
        maps = eval(in_backticks(rows[name]["eager"])[0], dict(these))
        assert 1.0 <= peak_bytes(function) / (8 * maps) < 1.2, name


def test_memory_of_the_fused_form():
    q, k, v, _, dout = position_inputs(*(SIZES[letter] for letter in "BDCMN"))
    x, dy = channel_inputs(*(SIZES[letter] for letter in "BCN"))
    out, attn, lse = DOC["position_forward"](q, k, v)
    dq, dk, dv, _ = DOC["position_backward"](dout, q, k, v, attn, lse)
    y, row_max, row_sum = DOC["channel_forward"](x)
    dx, _ = DOC["channel_backward"](dy, x, row_max, row_sum)
    tensors = {name: tensor for name, tensor in locals().items() if isinstance(tensor, torch.Tensor)}
    for row in table("elements"):
        formula, _, names = row["fused, without tiles"].partition(":")
        tensors["out"] = out if row["elements"].startswith("position") else y
        listed = re.findall(r"`(\w+)`", names.partition(";")[0])
        assert sum(tensors[name].numel() for name in listed) == eval(formula.strip("`"), dict(SIZES))


def test_figures_at_the_usual_crops():
    flops = {row["pass"]: row["FLOPs"].strip("`") for row in table("pass")}
    memory = {row["elements"]: row for row in table("elements")}["position, forward and backward"]
    fused = memory["fused, without tiles"].partition(":")[0].strip("`")
    for row in table("crop"):
        height, width = map(int, row["crop"].split(" x "))
        assert height % 8 == width % 8 == 0
        N = height // 8 * (width // 8)
        sizes = {"B": 1, "C": 512, "D": 64, "M": N, "N": N}
        assert row["N"] == str(N)
        for column in ("position fwd", "position bwd", "channel fwd", "channel bwd"):
            name = column.replace("fwd", "forward").replace("bwd", "backward")
            assert row[column] == f"{eval(flops[name], dict(sizes)) / 1e9:.1f}", (N, column)
        mebibytes = {"position maps, eager": in_backticks(memory["eager"])[0], "position, fused": fused}
        for column, formula in mebibytes.items():
            assert row[column] == f"{eval(formula, dict(sizes)) * 4 / 2**20:.0f}", (N, column)
    forward, recomputed, saved = (
        eval(flops[name], dict(sizes))
        for name in ("position forward", "position backward", "position backward, map saved (eager)")
    )
    percent = 100 * ((forward + recomputed) / (forward + saved) - 1)
    assert f"together {percent:.1f} % dearer" in PROSE
