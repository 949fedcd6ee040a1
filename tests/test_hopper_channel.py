"""Channel attention of the Hopper backend: tile edges, splits, packing, gamma, NaN, and statistics that others can use.

Without a Hopper GPU its kernels run on the model of one in tests/cuda_host.
"""

from __future__ import annotations

import pytest
import test_nonfinite
import torch
from cases import ChannelCase, Problem
from on_backend import device_of
from test_hopper import HALVES, LAYOUTS, WAYS, follows, in_layout, runs

from danet_kernels.backends import cuda, hopper, native

OPERATORS = torch.ops.danet_kernels
VARIANTS = pytest.mark.parametrize("variant", ["official", "paper"])


def channel_problem(*shape: int, layout: str = "contiguous", **options: object) -> Problem:
    """B, C, N and options of ChannelCase; x and dout in a layout."""
    problem = in_layout(ChannelCase(*shape, **options).problem(), layout)
    return Problem(problem.op, problem.tensors, in_layout_of(problem.dout, layout), problem.options)


def in_layout_of(tensor: torch.Tensor, layout: str) -> torch.Tensor:
    return in_layout(Problem("channel_attention", {"x": tensor}, tensor), layout).tensors["x"]


# ---- tiles of 128 channels and 256 positions; steps of 64 channels or positions


SHAPES = [
    (1, 1, 1),
    (1, 2, 2),
    (2, 63, 1),
    (1, 64, 63),
    (2, 65, 64),
    (1, 127, 65),
    (2, 129, 130),
    (1, 200, 257),
    (3, 16, 320),
]


@runs
@LAYOUTS
@HALVES
@VARIANTS
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_edges_of_tiles(shape, variant, dtype, layout):
    follows(channel_problem(*shape, dtype=dtype, variant=variant, layout=layout))


@runs
@LAYOUTS
@pytest.mark.parametrize("shape", [(1, 24, 1025), (1, 140, 600), (1, 290, 66)], ids=str)
def test_splits_and_rounds_of_the_rings(shape, layout):
    """Several parts of a sum over positions; more steps over channels than slots."""
    follows(channel_problem(*shape, dtype="bf16", layout=layout))


@runs
@HALVES
@pytest.mark.parametrize(("residual", "gamma"), [(True, None), (False, None), (False, -0.5)])
def test_residual_and_gamma(residual, gamma, dtype):
    follows(channel_problem(1, 70, 90, dtype=dtype, residual=residual, gamma=gamma))


@runs
@LAYOUTS
@HALVES
def test_gamma_zero_is_exact(dtype, layout):
    problem = channel_problem(2, 70, 140, dtype=dtype, gamma=0.0, layout=layout)
    results = problem.run("hopper")
    assert torch.equal(results["out"], problem.tensors["x"])
    assert torch.equal(results["dx"], problem.dout)
    follows(problem)


@runs
@LAYOUTS
@HALVES
def test_large_logits_keep_their_digits(dtype, layout):
    """Rectified features as they are: energies in the thousands on the diagonal."""
    problem = channel_problem(1, 40, 1300, dtype=dtype, layout=layout)
    x = problem.tensors["x"]
    x.copy_(torch.randn(x.shape, generator=torch.Generator().manual_seed(1)).mul(2).relu())
    follows(problem)


# ---- operands that the TMA unit cannot address are packed


@runs
@HALVES
@pytest.mark.parametrize("N", [40, 41])
@pytest.mark.parametrize("way", WAYS)
def test_a_packed_operand_gives_the_same_bits(way, N, dtype):
    """Also one whose lines or images lie over each other: strides of 0 are none that a tensor map may have."""
    problem = channel_problem(2, 12, N, dtype=dtype)
    for name in ("x", "dout"):
        tensor = in_layout_of(problem.tensors["x"] if name == "x" else problem.dout, way)
        results, expected = (
            Problem(
                problem.op,
                problem.tensors | ({"x": changed} if name == "x" else {}),
                changed if name == "dout" else problem.dout,
                problem.options,
            ).run("hopper")
            for changed in (tensor, tensor.contiguous())
        )
        for result, value in results.items():
            if name == "x" and "last" in way:  # then sums are over lines the other way
                torch.testing.assert_close(value, expected[result], rtol=2e-2, atol=2e-2)
            else:
                assert torch.equal(value, expected[result]), (name, result)


# ---- NaN and infinity


@runs
@VARIANTS
@pytest.mark.parametrize("cell", test_nonfinite.CHANNEL_CELLS)
def test_nonfinite_cell(cell, variant):
    problem = ChannelCase(2, 140, 40, "bf16", variant, gamma=-0.5).problem()
    test_nonfinite.CHANNEL_CELLS[cell](problem)
    test_nonfinite.assert_agrees_with_reference(problem, "hopper", open_kind="inf" in cell)


@runs
@VARIANTS
def test_energy_overflows(variant):
    """x is finite, one diagonal energy is +inf."""
    problem = ChannelCase(2, 140, 40, "bf16", variant, gamma=-0.5).problem()
    problem.tensors["x"][0, :, test_nonfinite.POSITION] = 0
    problem.dout[0, :, test_nonfinite.POSITION] = 0
    test_nonfinite.put("x", (test_nonfinite.CHANNEL, test_nonfinite.POSITION), test_nonfinite.HUGE)(problem)
    test_nonfinite.assert_agrees_with_reference(problem, "hopper")


# ---- the contract: any backend runs the backward of another's forward


@runs
@LAYOUTS
@HALVES
@VARIANTS
def test_statistics_are_those_of_the_other_kernels(variant, dtype, layout):
    """Sums over positions are cut at the same places, so they differ by roundings within a sum of fp32."""
    x = channel_problem(2, 130, 200, dtype=dtype, layout=layout).tensors["x"].to(device_of("cuda"))
    ours, theirs = (module.channel_attention_forward(x, None, variant, True) for module in (hopper, cuda))
    for own, other in zip(ours[1:], theirs[1:], strict=True):
        assert own.dtype == torch.float32
        torch.testing.assert_close(own, other, rtol=1e-5, atol=1e-5)


@runs
@LAYOUTS
def test_backward_of_anothers_forward(layout):
    """The CPU kernels and these on each other's row_max and row_sum."""
    problem = channel_problem(1, 70, 90, dtype="bf16", layout=layout)
    x, gamma, dout = problem.tensors["x"], problem.tensors["gamma"], problem.dout
    device = device_of("cuda")
    ours = hopper.channel_attention_forward(x.to(device), gamma.to(device), "official", True)
    theirs = native.channel_attention_forward(x, gamma, "official", True)
    backward = native.channel_attention_backward
    expected = backward(dout, x, gamma, *theirs[1:], "official", True, (True, True))
    results = backward(dout, x, gamma, *(t.cpu() for t in ours[1:]), "official", True, (True, True))
    moved = (t.to(device) for t in (dout, x, gamma, *theirs[1:]))
    mixed = hopper.channel_attention_backward(*moved, "official", True, (True, True))
    for want, first, second in zip(expected, results, mixed, strict=True):
        torch.testing.assert_close(first, want, rtol=2e-2, atol=2e-2)
        torch.testing.assert_close(second.cpu(), want, rtol=2e-2, atol=2e-2)


# ---- the operators


@runs
@pytest.mark.parametrize("needs", [(True, True), (True, False), (False, True)])
def test_only_what_is_needed(needs):
    problem = channel_problem(1, 20, 30, dtype="fp16")
    device = device_of("cuda")
    x, gamma, dout = (t.to(device) for t in (problem.tensors["x"], problem.tensors["gamma"], problem.dout))
    _, row_max, row_sum = hopper.channel_attention_forward(x, gamma, "official", True)
    dx, dgamma = hopper.channel_attention_backward(dout, x, gamma, row_max, row_sum, "official", True, needs)
    assert (dx.numel(), dgamma.numel()) == (x.numel() * needs[0], needs[1])


@runs
def test_the_operators_guard_themselves():
    x = torch.ones(1, 4, 3, device=device_of("cuda"))
    with pytest.raises(RuntimeError, match="expected fp16 or bf16"):
        OPERATORS.channel_attention_forward_hopper(x, None, True, True)
    with pytest.raises(RuntimeError, match="expected fp16 or bf16"):
        OPERATORS.channel_attention_backward_hopper(x, x, None, x, x, True, True, True, True)


@runs
def test_the_operators_have_no_formula():
    """As those of the other backends: test_registration.py says why."""
    x = torch.ones(1, 4, 3, dtype=torch.bfloat16, device=device_of("cuda"), requires_grad=True)
    out, _, _ = OPERATORS.channel_attention_forward_hopper(x, None, True, True)
    with pytest.raises(
        NotImplementedError, match=r"not implemented for autograd: call danet_kernels\.channel_attention"
    ):
        out.sum().backward()


@runs
@LAYOUTS
@HALVES
def test_bits_do_not_vary(dtype, layout):
    problem = channel_problem(1, 140, 130, dtype=dtype, layout=layout)
    first, second = (problem.run("hopper") for _ in range(2))
    for name, result in first.items():
        assert torch.equal(result, second[name]), name
