"""What wrong calls get: a sentence with expected and got, nothing computed, the same sentence on fake tensors."""

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from danet_kernels import (
    available_backends,
    backends,
    channel_attention,
    channel_attention_map,
    memory_estimate,
    position_attention,
    position_attention_map,
    reference,
    use_backend,
)

OPS = torch.ops.danet_kernels


def t(*shape: int, **options: Any) -> Tensor:
    return torch.ones(*shape, **options)


def q(*shape: int, **options: Any) -> Tensor:
    """Also a key: [B, D, H, W] = [2, 3, 4, 5] unless told otherwise."""
    return t(*(shape or (2, 3, 4, 5)), **options)


def v(*shape: int, **options: Any) -> Tensor:
    """Also a residual and an x: [B, C, H, W] = [2, 6, 4, 5] unless told otherwise."""
    return t(*(shape or (2, 6, 4, 5)), **options)


# Each of these makes a good call but for what is `changed`.


def pam(**changed: Any) -> Any:
    return position_attention(**({"query": q(), "key": q(), "value": v()} | changed))


def cam(**changed: Any) -> Any:
    return channel_attention(**({"x": v()} | changed))


def rows(**changed: Any) -> Any:
    points = torch.tensor([0, 19])
    return position_attention_map(**({"query": q(), "key": q(), "points": points} | changed))


def pam_operator(**changed: Any) -> Any:
    given = {"query": q(2, 3, 20), "key": q(2, 3, 20), "value": v(2, 6, 20), "residual": None, "gamma": None}
    given |= {"scale": 1.0, "save_for_backward": False, "backend": "auto"}
    return OPS.position_attention_forward(**(given | changed))


def cam_operator(**changed: Any) -> Any:
    given = {"x": v(2, 6, 20), "gamma": None, "variant": "official", "residual": True, "backend": "auto"}
    return OPS.channel_attention_forward(**(given | changed))


def pam_backward(**changed: Any) -> Any:
    given = {"dout": v(2, 6, 20), "query": q(2, 3, 20), "key": q(2, 3, 20), "value": v(2, 6, 20)}
    given |= {"attn": v(2, 6, 20), "lse": t(2, 20), "gamma": None, "scale": 1.0, "needs_gamma": False}
    given |= {"needs_query": True, "needs_key": True, "needs_value": True, "backend": "auto"}
    return OPS.position_attention_backward(**(given | changed))


def cam_backward(**changed: Any) -> Any:
    given = {"dout": v(2, 6, 20), "x": v(2, 6, 20), "gamma": None, "row_max": t(2, 6), "row_sum": t(2, 6)}
    given |= {
        "variant": "official",
        "residual": True,
        "needs_x": True,
        "needs_gamma": False,
        "backend": "auto",
    }
    return OPS.channel_attention_backward(**(given | changed))


FLOATS = "float32, float16, bfloat16, float64"
RANK = r"must have at least 3 dimensions \[B, channels, \*positions\]"
BOTH = "expected one of 'official', 'paper'"
INTEGERS = "position_attention_map: points must be a tensor of int64 or int32"

# what is wrong: the call, and its sentence as a regular expression
Cases = dict[str, tuple[Callable[[], Any], str]]

TYPE_ERRORS: Cases = {
    "query is a list": (
        lambda: pam(query=[1.0]),
        r"position_attention: query must be a torch\.Tensor, got list \[1",
    ),
    "key is None": (
        lambda: pam(key=None),
        r"position_attention: key must be a torch\.Tensor, got NoneType None",
    ),
    "value is a number": (
        lambda: pam(value=3),
        r"position_attention: value must be a torch\.Tensor, got int 3",
    ),
    "residual is a flag": (lambda: pam(residual=True), r"residual must be a torch\.Tensor, got bool True"),
    "x is None": (lambda: cam(x=None), r"channel_attention: x must be a torch\.Tensor, got NoneType None"),
    "x of the map is text": (lambda: channel_attention_map("x"), r"x must be a torch\.Tensor, got str 'x'"),
    "key of the map is None": (lambda: rows(key=None), r"key must be a torch\.Tensor, got NoneType None"),
    "x is sparse": (
        lambda: cam(x=v().to_sparse()),
        r"x must be a strided tensor, got layout torch\.sparse_coo",
    ),
    "query is int64": (lambda: pam(query=q(dtype=torch.int64)), f"query must be one of {FLOATS}, got int64"),
    "key is bool": (lambda: pam(key=q(dtype=torch.bool)), f"key must be one of {FLOATS}, got bool"),
    "value is complex": (
        lambda: pam(value=v(dtype=torch.complex64)),
        f"value must be one of {FLOATS}, got complex64",
    ),
    "x is uint8": (lambda: cam(x=v(dtype=torch.uint8)), f"x must be one of {FLOATS}, got uint8"),
    "x is float8": (
        lambda: cam(x=v().to(torch.float8_e4m3fn)),
        f"x must be one of {FLOATS}, got float8_e4m3fn",
    ),
    "x of the map is int32": (
        lambda: channel_attention_map(v(dtype=torch.int32)),
        f"x must be one of {FLOATS}, got int32",
    ),
    "key has another dtype": (
        lambda: pam(key=q(dtype=torch.float16)),
        "all of query, key, value must have one dtype, got query float32, key float16, value float32",
    ),
    "residual has another dtype": (
        lambda: pam(residual=v(dtype=torch.float64)),
        "all of query, key, value, residual must have one dtype, got .*, residual float64",
    ),
    "gamma is an integer tensor": (
        lambda: cam(gamma=t(1, dtype=torch.int64)),
        f"channel_attention: gamma must be one of {FLOATS}, got int64",
    ),
    "gamma is a complex tensor": (
        lambda: pam(gamma=t(1, dtype=torch.complex128)),
        f"position_attention: gamma must be one of {FLOATS}, got complex128",
    ),
    "gamma is text": (
        lambda: cam(gamma="0.5"),
        "channel_attention: gamma must be a real number, got str '0.5'",
    ),
    "gamma is a flag": (
        lambda: pam(gamma=True),
        "position_attention: gamma must be a real number, got bool True",
    ),
    "gamma is complex": (
        lambda: cam(gamma=1j),
        "channel_attention: gamma must be a real number, got complex 1j",
    ),
    "scale is text": (lambda: pam(scale="8"), "position_attention: scale must be a real number, got str '8'"),
    "scale is None": (
        lambda: pam(scale=None),
        "position_attention: scale must be a real number, got NoneType None",
    ),
    "scale is a tensor": (
        lambda: pam(scale=t(1)),
        "position_attention: scale must be a real number, got .*Tensor",
    ),
    "scale of the map": (
        lambda: rows(scale=True),
        "position_attention_map: scale must be a real number, got bool",
    ),
    "residual of channel attention is a tensor": (
        lambda: cam(residual=v()),
        "channel_attention: residual must be a bool, got .*Tensor",
    ),
    "residual of channel attention is None": (
        lambda: cam(residual=None),
        "channel_attention: residual must be a bool, got NoneType None",
    ),
    "points are a list": (lambda: rows(points=[0]), f"{INTEGERS}, got list"),
    "points are floats": (lambda: rows(points=t(2)), rf"{INTEGERS}, got (torch\.)?float32"),
    "points are a mask": (lambda: rows(points=t(20, dtype=torch.bool)), rf"{INTEGERS}, got (torch\.)?bool"),
    "operator: dtypes differ": (
        lambda: pam_operator(key=q(2, 3, 20, dtype=torch.bfloat16)),
        "must have one dtype, got query float32, key bfloat16, value float32",
    ),
    "backward: dtype of dout": (
        lambda: pam_backward(dout=v(2, 6, 20, dtype=torch.float64)),
        "position_attention_backward: dout must be float32, got float64",
    ),
    "backward: dtype of attn": (
        lambda: pam_backward(attn=v(2, 6, 20, dtype=torch.bfloat16)),
        "position_attention_backward: attn must be float32, got bfloat16",
    ),
    "backward: dtype of lse": (
        lambda: pam_backward(lse=t(2, 20, dtype=torch.float64)),
        "position_attention_backward: lse must be float32, got float64",
    ),
    "channel backward: dtype of row_max": (
        lambda: cam_backward(row_max=t(2, 6, dtype=torch.float64)),
        "channel_attention_backward: row_max must be float32, got float64",
    ),
}

VALUE_ERRORS: Cases = {
    "query has no positions": (
        lambda: pam(query=q(2, 3)),
        rf"position_attention: query {RANK}, got \[2, 3\]",
    ),
    "key is a vector": (lambda: pam(key=q(3)), rf"key {RANK}, got \[3\]"),
    "value is a matrix": (lambda: pam(value=v(6, 20)), rf"value {RANK}, got \[6, 20\]"),
    "residual is a matrix": (lambda: pam(residual=v(6, 20)), rf"residual {RANK}, got \[6, 20\]"),
    "x is a scalar": (lambda: cam(x=torch.ones(())), rf"channel_attention: x {RANK}, got \[\]"),
    "key is elsewhere": (
        lambda: pam(key=q(device="meta")),
        "all of query, key, value must be on one device, got query on cpu, key on meta, value on cpu",
    ),
    "residual is elsewhere": (
        lambda: pam(residual=v(device="meta")),
        "must be on one device, got .*residual on meta",
    ),
    "gamma is elsewhere": (
        lambda: cam(gamma=t(1, device="meta")),
        "gamma must be on the device of the other tensors, cpu, got meta",
    ),
    "batches differ": (
        lambda: pam(key=q(3, 3, 4, 5)),
        r"the batch size B .*must be the same in query, key, value, "
        r"got query \[2, 3, 4, 5\], key \[3, 3, 4, 5\], value \[2, 6, 4, 5\]",
    ),
    "batch of the value differs": (
        lambda: pam(value=v(1, 6, 4, 5)),
        r"the batch size B .*got .*value \[1, 6, 4, 5\]",
    ),
    "D differs": (
        lambda: pam(key=q(2, 4, 4, 5)),
        r"same number of channels D, got query \[2, 3, 4, 5\] and key \[2, 4, 4, 5\]",
    ),
    "positions of key and value differ": (
        lambda: pam(value=v(2, 6, 4, 6)),
        r"same positions \*T, got key \[2, 3, 4, 5\] and value \[2, 6, 4, 6\]",
    ),
    "positions of the value are transposed": (
        lambda: pam(value=v(2, 6, 5, 4)),
        r"same positions \*T, got key \[2, 3, 4, 5\] and value \[2, 6, 5, 4\]",
    ),
    "residual has the channels of the query": (
        lambda: pam(residual=q()),
        r"residual must have the shape of the result, expected \[2, 6, 4, 5\], got \[2, 3, 4, 5\]",
    ),
    "residual has the positions of the key": (
        lambda: pam(query=q(2, 3, 7), residual=v()),
        r"residual must have the shape of the result, expected \[2, 6, 7\], got \[2, 6, 4, 5\]",
    ),
    "residual is flattened": (
        lambda: pam(residual=v(2, 6, 20)),
        r"residual must have the shape of the result, expected \[2, 6, 4, 5\], got \[2, 6, 20\]",
    ),
    "residual would broadcast": (
        lambda: pam(residual=v(1, 6, 4, 5)),
        r"residual must have the shape of the result, expected \[2, 6, 4, 5\], got \[1, 6, 4, 5\]",
    ),
    "gamma per channel": (
        lambda: cam(gamma=t(6)),
        r"channel_attention: gamma must have one element, got shape \[6\]",
    ),
    "gamma is empty": (
        lambda: pam(gamma=t(0)),
        r"position_attention: gamma must have one element, got shape \[0\]",
    ),
    "gamma is the residual": (
        lambda: cam(gamma=v()),
        r"gamma must have one element, got shape \[2, 6, 4, 5\]",
    ),
    "variant in capitals": (
        lambda: cam(variant="Official"),
        f"channel_attention: unknown variant 'Official', {BOTH}",
    ),
    "variant of the map": (lambda: channel_attention_map(v(), variant=None), f"unknown variant None, {BOTH}"),
    "unknown backend": (
        lambda: cam(backend="cudnn"),
        "unknown backend 'cudnn', expected one of 'auto', .*'eager'",
    ),
    "backend is None": (lambda: pam(backend=None), "unknown backend None, expected one of 'auto'"),
    "backend is a list": (
        lambda: pam(backend=["eager"]),
        r"unknown backend \['eager'\], expected one of 'auto'",
    ),
    "unknown backend in the context": (
        lambda: use_backend("sdpa").__enter__(),
        "unknown backend 'sdpa', expected one of 'auto'",
    ),
    "points are elsewhere": (
        lambda: rows(points=torch.zeros(2, dtype=torch.int64, device="meta")),
        "position_attention_map: points must be on the device of query, cpu, got meta",
    ),
    "points of three batches": (
        lambda: rows(points=torch.zeros(3, 2, dtype=torch.int64)),
        r"position_attention_map: points must have shape \[P\] or \[2, P\], got \[3, 2\]",
    ),
    "points are a scalar": (
        lambda: rows(points=torch.zeros((), dtype=torch.int64)),
        r"position_attention_map: points must have shape \[P\] or \[2, P\], got \[\]",
    ),
    "D differs in the map": (
        lambda: rows(key=q(2, 4, 4, 5)),
        r"same number of channels D, got query \[2, 3, 4, 5\] and key \[2, 4, 4, 5\]",
    ),
    "operator: four dimensions": (
        lambda: pam_operator(query=q(), key=q(), value=v()),
        r"query must have (exactly )?3 dimensions \[B, .*\], got \[2, 3, 4, 5\]",
    ),
    "operator: x of four dimensions": (
        lambda: cam_operator(x=v()),
        r"x must have (exactly )?3 dimensions \[B, .*\], got \[2, 6, 4, 5\]",
    ),
    "operator: D differs": (
        lambda: pam_operator(key=q(2, 4, 20)),
        r"same number of channels D, got query \[2, 3, 20\] and key \[2, 4, 20\]",
    ),
    "operator: unknown variant": (lambda: cam_operator(variant="sum"), f"unknown variant 'sum', {BOTH}"),
    "operator: unknown backend": (
        lambda: pam_operator(backend="cudnn"),
        "unknown backend 'cudnn', expected one of",
    ),
    "backward: shape of dout": (
        lambda: pam_backward(dout=v(2, 6, 19)),
        r"position_attention_backward: dout must have shape \[2, 6, 20\], got \[2, 6, 19\]",
    ),
    "backward: attn is missing": (
        lambda: pam_backward(attn=t(0)),
        r"position_attention_backward: attn must have shape \[2, 6, 20\], got \[0\]",
    ),
    "backward: shape of lse": (
        lambda: pam_backward(lse=t(2, 6)),
        r"position_attention_backward: lse must have shape \[2, 20\], got \[2, 6\]",
    ),
    "backward: device of lse": (
        lambda: pam_backward(lse=t(2, 20, device="meta")),
        "position_attention_backward: lse must be on cpu, got meta",
    ),
    "channel backward: shape of dout": (
        lambda: cam_backward(dout=v(2, 5, 20)),
        r"channel_attention_backward: dout must have shape \[2, 6, 20\], got \[2, 5, 20\]",
    ),
    "channel backward: shape of row_sum": (
        lambda: cam_backward(row_sum=t(2, 1)),
        r"channel_attention_backward: row_sum must have shape \[2, 6\], got \[2, 1\]",
    ),
    "channel backward: variant": (
        lambda: cam_backward(variant="softmin"),
        f"unknown variant 'softmin', {BOTH}",
    ),
}

CASES = {name: (TypeError, *case) for name, case in TYPE_ERRORS.items()}
CASES |= {name: (ValueError, *case) for name, case in VALUE_ERRORS.items()}


@pytest.fixture
def nothing_is_computed(monkeypatch):
    """Every function that does the work fails the test."""

    def computed(*arguments, **options):
        pytest.fail("a wrong call was computed")

    for module in backends.BACKENDS.values():
        for op in backends.OPS:
            for direction in ("forward", "backward"):
                monkeypatch.setattr(module, f"{op}_{direction}", computed)
    for name in reference.__all__:
        monkeypatch.setattr(reference, name, computed)


@pytest.mark.usefixtures("nothing_is_computed")
@pytest.mark.parametrize("case", CASES)
def test_a_wrong_call_gets_a_sentence(case):
    error, call, sentence = CASES[case]
    with pytest.raises(error, match=sentence):
        call()


@pytest.mark.usefixtures("nothing_is_computed")
@pytest.mark.parametrize("case", [case for case in CASES if case != "x is sparse"])  # no such fake tensor
def test_the_sentence_is_the_same_on_fake_tensors(case):
    error, call, _ = CASES[case]
    with pytest.raises(error) as real:
        call()
    with FakeTensorMode(), pytest.raises(error) as fake:
        call()

    def without_values(caught: pytest.ExceptionInfo[Exception]) -> str:
        return re.sub(r"got (Fake)?Tensor.*", "got a tensor", str(caught.value), flags=re.DOTALL)

    assert without_values(fake) == without_values(real)


@pytest.mark.parametrize("values", [(20,), (-1, 3), (0, 10**12)], ids=str)
def test_points_out_of_range(values):
    """Only where the values are there to look at: not on fake tensors."""
    got = f"{min(values)} to {max(values)}"
    with pytest.raises(ValueError, match=f"points must lie between 0 and 19, got {got}"):
        rows(points=torch.tensor(values))


def test_unknown_op():
    with pytest.raises(ValueError, match=r"unknown op 'attention', expected one of 'position_attention', 'channel_att"):
        available_backends("attention")


@pytest.mark.parametrize(
    ("arguments", "options", "error", "sentence"),
    [
        (
            ("attention", (1, 8, 4, 4), torch.float32),
            {},
            ValueError,
            "unknown op 'attention', expected one of",
        ),
        (
            ("position_attention", (1, 8), torch.float32),
            {},
            ValueError,
            r"shape .*got \[1, 8\]|shape .*got \(1, 8\)",
        ),
        (("position_attention", (1, -8, 4), torch.float32), {}, ValueError, "-8"),
        (("channel_attention", (1, 8, 4), torch.int32), {}, TypeError, f"one of {FLOATS}, got int32"),
        (
            ("channel_attention", (1, 8, 4), torch.float32),
            {"backend": "cudnn"},
            ValueError,
            "unknown backend 'cudnn'",
        ),
    ],
)
def test_memory_estimate(arguments, options, error, sentence):
    with pytest.raises(error, match=sentence):
        memory_estimate(*arguments, **options)


def test_a_long_argument_does_not_fill_the_screen():
    with pytest.raises(TypeError) as caught:
        cam(x=v().numpy())
    assert len(str(caught.value)) < 300


def test_enough_cases():
    assert len(CASES) >= 40
