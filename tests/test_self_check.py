"""The self-check of kernels on the user's GPU passes what is right and finds what is wrong."""

import pytest
import torch
from fake_backend import fp32_products, make_backend, make_wrong_backend, scale

from danet_kernels import _self_check
from danet_kernels.backends import OPS
from danet_kernels.proven import DTYPES


def find_fault(op: str, direction: str, change, dtype: torch.dtype = torch.float32) -> str:
    backend = make_wrong_backend(f"{op}_{direction}", change)
    return _self_check.find_fault(backend, op, dtype, torch.device("cpu"))


LAYOUTS = {"contiguous": torch.float32, "channels_last": torch.float32, "wider": torch.bfloat16}
"""By what the tensors of the cases are, a dtype that has it."""


def layout_of(tensor: torch.Tensor) -> str:
    return "contiguous" if tensor.is_contiguous() else "channels_last" if tensor.stride(1) == 1 else "wider"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("op", OPS)
def test_what_no_dtype_may_lack(op, dtype):
    """Sizes that are odd and sums in parts, with gamma and residual; and gamma = 0."""
    cases = [case for case in _self_check.cases_for(op, dtype) if case.residual]
    odd = [case for case in cases if all(size % 2 for size in case.positions + case.keys)]
    assert {bool(case.gamma) for case in odd} == {True, False}
    assert any(case.gamma and max(case.positions + case.keys) > 256 for case in odd)


@pytest.mark.parametrize("op", OPS)
def test_what_the_dtypes_share(op):
    """Either layout with 16 bits and with fp32, and gamma in fp32 and rounded with 16 bits."""
    found = set()
    for dtype in DTYPES:
        for number, case in enumerate(_self_check.cases_for(op, dtype)):
            inputs, dout, _ = case.make(dtype, "cpu", seed=number)
            rounded = inputs["gamma"].dtype.itemsize == 2
            found.add((dtype.itemsize, "channels_last" if layout_of(dout) == "channels_last" else "rows", rounded))
    assert {(size, layout) for size, layout, _ in found} == {
        (size, layout) for size in (2, 4) for layout in ("rows", "channels_last")
    }
    assert {rounded for size, _, rounded in found if size == 2} == {True, False}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("op", OPS)
def test_right_kernels_pass(op, dtype):
    assert _self_check.find_fault(make_backend(), op, dtype, torch.device("cpu")) == ""


RESULTS = [
    *(("position_attention", *rest) for rest in (("forward", 0, "out"), ("backward", 0, "dquery"))),
    *(("position_attention", "backward", *rest) for rest in ((1, "dkey"), (2, "dvalue"), (3, "dgamma"))),
    *(
        ("channel_attention", *rest)
        for rest in (("forward", 0, "out"), ("backward", 0, "dx"), ("backward", 1, "dgamma"))
    ),
]


@pytest.mark.parametrize(("op", "direction", "index", "name"), RESULTS, ids=lambda value: str(value))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_one_percent_is_too_much(op, direction, index, name, dtype):
    fault = find_fault(op, direction, scale(index, 1.01), dtype)
    assert fault.startswith(f"{name}: largest error ")
    assert "in Case(batch=" in fault


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("side", ["before", "after"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_reading_too_far_is_noticed(op, side, layout):
    """What lies around every tensor is NaN."""

    def change(results, arguments):
        tensor = arguments[0]
        if layout == layout_of(tensor):
            last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
            offset = tensor.storage_offset() + (-1 if side == "before" else last + 1)
            results[0] = results[0] + 0 * tensor.as_strided((1, 1, 1), (1, 1, 1), offset)

    assert "largest error nan" in find_fault(op, "forward", change, LAYOUTS[layout])


@pytest.mark.parametrize("op", OPS)
def test_dividing_by_gamma_is_noticed(op):
    def change(results, arguments):
        gamma = next(
            (tensor for tensor in arguments if isinstance(tensor, torch.Tensor) and tensor.shape == (1,)), None
        )
        if gamma is not None and results[0].numel():
            results[0] = results[0] / gamma * gamma

    assert "gamma=0.0" in find_fault(op, "backward", change)


@pytest.mark.parametrize("op", OPS)
def test_channels_last_is_checked(op):
    def change(results, arguments):
        if arguments[0].stride(1) == 1:
            results[0] = 1.01 * results[0]

    assert "channels_last" in find_fault(op, "forward", change)


def test_kernels_of_inference_and_of_single_gradients_are_checked():
    def in_inference(results, arguments):
        results[0] = results[0] if arguments[-1] else 1.01 * results[0]

    def alone(results, arguments):
        if arguments[-1] == (False, True, False, False):
            results[1] = 1.01 * results[1]

    assert find_fault("position_attention", "forward", in_inference).startswith("out")
    assert find_fault("position_attention", "backward", alone).startswith("dkey")


def test_tf32_is_allowed_to_be_tf32_where_the_user_allows_it():
    def rounded(results, arguments):
        results[0] = (results[0].view(torch.int32) + 0x1000 & ~0x1FFF).view(torch.float32)  # 10 bits of mantissa

    assert find_fault("channel_attention", "forward", rounded).startswith("out")
    with fp32_products("tf32"):
        assert find_fault("channel_attention", "forward", rounded) == ""
        assert find_fault("channel_attention", "forward", scale(0, 1.01)).startswith("out")
