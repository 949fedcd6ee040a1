"""The table of decompositions: in torch, and as ONNX in onnxruntime against fp64. No file holds an operator of ours."""

from functools import cache

import pytest
import torch
from onnx_files import Errors, exported, written
from torch import Tensor, nn

from danet_kernels import channel_attention, decompositions, position_attention, reference, use_backend
from danet_kernels.ops import OPS

B, D, C = 2, 4, 6
for_each_form = pytest.mark.parametrize("attention", [False, True])

# Arguments of position_attention after query, key and value; those of channel_attention after x.
POSITION = [
    {},
    {"residual": True, "gamma": -0.7, "scale": -0.35},
    {"gamma": 0.3, "scale": 0.0},
]
CHANNEL = [
    {"variant": "official", "gamma": 0.7},
    {"variant": "official", "residual": False},
    {"variant": "paper", "residual": False, "gamma": -0.4},
]
CASES = [*POSITION, *CHANNEL]
MAPS = 5  # of all cases, those that differ in their logits; torch merges the others
HALF = [
    {"residual": True},
    {"residual": True, "gamma": 0.0},
    {"variant": "official", "residual": False},
    {"variant": "paper", "gamma": 0.0},
]


class Every(nn.Module):
    """Several cases in one graph, since an export takes seconds."""

    def __init__(self, position, channel, cases):
        super().__init__()
        self.position, self.channel, self.cases = position, channel, cases

    def forward(self, query: Tensor, key: Tensor, value: Tensor, x: Tensor) -> list[Tensor]:
        outs = []
        for case in self.cases:
            if "variant" in case:
                outs.append(self.channel(x, **case))
            else:
                options = case | ({"residual": x} if "residual" in case else {})
                outs.append(self.position(query, key, value, **options))
        return outs


FUSED, FUSED_HALF = (Every(position_attention, channel_attention, cases) for cases in (CASES, HALF))
PLAIN, PLAIN_HALF = (Every(reference.position_attention, reference.channel_attention, cases) for cases in (CASES, HALF))


def inputs(batch, queries, keys, dtype=torch.float32, *, large=1.0, seed=0):
    """query and x at the positions `queries`, key and value at `keys`: [batch, channels, height, width]."""
    generator = torch.Generator().manual_seed(seed)

    def tensor(channels, size, factor=1.0):
        return (factor * torch.randn(batch, channels, *size, generator=generator)).to(dtype)

    return tensor(D, queries, large), tensor(D, keys, large), tensor(C, keys), tensor(C, queries, large)


DYNAMIC = torch.export.Dim.DYNAMIC
AXES = {0: DYNAMIC, 2: DYNAMIC, 3: DYNAMIC}
TRACED = (B, (5, 7), (3, 8))
SIZES = [(1, (4, 9), (7, 2)), (3, (11, 3), (5, 5)), (1, (1, 13), (2, 1)), TRACED]


@pytest.fixture(scope="module", params=[20, 23])
def opset(request):
    return request.param


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("onnx")


@cache
def program(dtype):
    return exported(FUSED, inputs(*TRACED, dtype), dynamic_shapes=(AXES,) * 4)


@pytest.fixture(scope="module")
def file(opset, folder):
    return written(program(torch.float32), opset, folder / f"fp32-{opset}.onnx")


@pytest.fixture(scope="module")
def half_file(opset, folder):
    half = exported(FUSED_HALF, inputs(*TRACED, torch.float16), dynamic_shapes=(AXES,) * 4)
    return written(half, opset, folder / f"fp16-{opset}.onnx")


# ---- ONNX


def test_the_operators_of_a_file(file, opset):
    assert file.opsets == {"": opset}
    assert file.domains == {""}
    if opset == 23:
        assert file.operators["Attention"] == MAPS
        assert not {"MatMul", "Softmax"} & set(file.operators)
    else:
        # Two products each: what no one reads of an operator, such as lse, has left nothing behind.
        assert file.operators["MatMul"] == 2 * MAPS
        assert file.operators["Softmax"] == MAPS


def test_onnxruntime_is_as_exact_as_eager(file):
    every = [Errors() for _ in CASES]
    for index, size in enumerate(SIZES):
        tensors = inputs(*size, seed=index)
        eager, exact = PLAIN(*tensors), PLAIN(*(tensor.double() for tensor in tensors))
        for errors, *outs in zip(every, file(*tensors), eager, exact, strict=True):
            errors.add(*outs)
    for errors in every:
        errors.check(torch.float32)


@pytest.mark.parametrize("large", [1.0, 200.0])
def test_fp16_rounds_once_and_does_not_overflow(half_file, large):
    """Which a graph in fp16 throughout would: its Gram matrix and its logits end at 65504."""
    every = [Errors() for _ in HALF]
    for index, size in enumerate(SIZES[:2]):
        tensors = inputs(*size, torch.float16, large=large, seed=index)
        if large > 1.0:
            assert not any(PLAIN_HALF(*tensors)[case].isfinite().all() for case in (0, 2))
        ideal, exact = (PLAIN_HALF(*(one.to(dtype) for one in tensors)) for dtype in (torch.float32, torch.float64))
        for case, errors, got, other, expected in zip(HALF, every, half_file(*tensors), ideal, exact, strict=True):
            errors.add(got, other.half(), expected)
            assert case.get("gamma") != 0.0 or torch.equal(got, tensors[3])
    for errors in every:
        errors.check(torch.float16)
    # onnxruntime's CPU multiplies fp16 numbers in fp32 anyway; others do not.
    assert half_file.operand_types("MatMul", "Softmax", "Attention") == {"FLOAT"}


# ---- in torch


def operators(program):
    return [str(node.target) for node in program.graph.nodes if node.op == "call_function"]


@pytest.mark.parametrize(
    ("dtype", "attention", "core"),
    [
        (torch.float64, False, False),
        (torch.float32, False, True),
        (torch.float32, True, True),
        (torch.bfloat16, True, False),
    ],
    ids=str,
)
def test_a_decomposed_program_gives_what_the_operators_give(dtype, attention, core):
    assert sum("danet_kernels" in name for name in operators(program(dtype))) == len(CASES)
    plain = program(dtype).run_decompositions(decompositions(attention=attention, core=core))
    names = operators(plain)
    assert not any("danet_kernels" in name for name in names)
    assert names.count("aten.scaled_dot_product_attention.default") == attention * len(CASES)
    tensors = inputs(3, (4, 9), (7, 2), dtype, seed=1)
    for got, expected in zip(plain.module()(*tensors), FUSED(*tensors), strict=True):
        assert got.dtype == dtype
        assert got.stride() == expected.stride()
        epsilon = torch.finfo(dtype).eps
        torch.testing.assert_close(got, expected, rtol=8 * epsilon, atol=8 * epsilon * expected.abs().max().item())


def test_in_channels_last():
    tensors = tuple(tensor.contiguous(memory_format=torch.channels_last) for tensor in inputs(*TRACED))
    plain = exported(FUSED, tensors).run_decompositions(decompositions(core=False))
    for got, expected in zip(plain.module()(*tensors), FUSED(*tensors), strict=True):
        assert got.stride() == expected.stride()
        torch.testing.assert_close(got, expected)


@for_each_form
@pytest.mark.parametrize("saves", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_all_outputs_of_the_operators(attention, saves, dtype):
    """Also those that only a backward reads."""
    table = decompositions(attention=attention, core=False)
    query, key, value, x = (tensor.flatten(2) for tensor in inputs(*TRACED, dtype))
    gamma = torch.tensor([0.7], dtype=torch.float64)
    calls = [
        (OPS.position_attention_forward.default, (query, key, value, x, gamma, 0.6, saves, "eager")),
        (OPS.position_attention_forward.default, (query, key, value, None, None, -1.0, saves, "eager")),
        *(
            (OPS.channel_attention_forward.default, (x, gamma, variant, residual, "eager"))
            for variant in ("official", "paper")
            for residual in (False, True)
        ),
    ]
    for operator, arguments in calls:
        for got, expected in zip(table[operator](*arguments), operator(*arguments), strict=True):
            assert got.stride() == expected.stride()
            torch.testing.assert_close(got, expected)


@for_each_form
def test_autocast_inside_of_a_network_leaves_the_logits_alone(attention):
    class Autocast(nn.Module):
        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            with torch.autocast("cpu", torch.bfloat16):
                return position_attention(x, x, x, x), channel_attention(x, 0.5)

    (*_, x) = inputs(*TRACED)
    plain = exported(Autocast(), (x,)).run_decompositions(decompositions(attention=attention))
    products = {"aten.bmm.default", "aten.scaled_dot_product_attention.default"}
    found = [node for node in plain.graph.nodes if str(node.target) in products]
    assert found
    assert {node.meta["val"].dtype for node in found} == {torch.float32}
    with use_backend("eager"):
        for got, expected in zip(plain.module()(x), Autocast()(x), strict=True):
            assert got.dtype == torch.bfloat16
            torch.testing.assert_close(got, expected)


def test_the_table_is_torchs_and_ours():
    ours = {OPS.position_attention_forward.default, OPS.channel_attention_forward.default}
    assert set(decompositions(core=False)) == set(decompositions(core=False, attention=True)) == ours
    attention = torch.ops.aten.scaled_dot_product_attention.default
    theirs = set(torch.export.default_decompositions().keys())
    assert attention in theirs
    assert set(decompositions().keys()) == theirs | ours
    assert set(decompositions(attention=True).keys()) == (theirs | ours) - {attention}
