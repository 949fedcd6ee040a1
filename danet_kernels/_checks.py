"""Argument checks: sentences with what was expected and what came.

The public functions call these on the tensors as given, the operators and their fake kernels on the flattened form
[B, *, N], so a wrong call gets the same sentence from a function, from an operator and under FakeTensor. The first
thing that is wrong is named, in the order type, rank, dtype, device, shape.
"""

from __future__ import annotations

import reprlib
from collections.abc import Sequence
from typing import NoReturn

import torch
from torch import Tensor

DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
DTYPE_NAMES = ", ".join(str(dtype).removeprefix("torch.") for dtype in DTYPES)
VARIANTS = ("official", "paper")


def check_position_attention(
    query: Tensor,  # [B, D, *S]
    key: Tensor,  # [B, D, *T]
    value: Tensor,  # [B, C, *T]
    residual: Tensor | None,  # [B, C, *S]
    gamma: Tensor | None,  # one element
    *,
    flattened: bool = False,
    autocast: bool = False,
) -> None:
    """Raise TypeError or ValueError unless the arguments fit together.

    flattened: positions must be one dimension, as the operators take them. autocast: dtypes may differ.
    """
    op = "position_attention"
    tensors = {"query": query, "key": key, "value": value}
    if residual is not None:
        tensors["residual"] = residual
    _check_tensors(op, tensors, gamma, flattened=flattened, same_dtype=not autocast)
    query_shape, key_shape, value_shape = query.shape, key.shape, value.shape
    if not (query_shape[0] == key_shape[0] == value_shape[0]):
        _mismatch(op, "the batch size B", tensors, 0)
    if query_shape[1] != key_shape[1]:
        raise ValueError(
            f"{op}: query and key must have the same number of channels D, "
            f"got query {_shape(query)} and key {_shape(key)}"
        )
    if key_shape[2:] != value_shape[2:]:
        raise ValueError(
            f"{op}: key and value must have the same positions *T, got key {_shape(key)} and value {_shape(value)}"
        )
    if residual is not None and residual.shape != value_shape[:2] + query_shape[2:]:
        expected = list(value_shape[:2] + query_shape[2:])
        raise ValueError(
            f"{op}: residual must have the shape of the result, expected {expected}, got {_shape(residual)}"
        )


def check_channel_attention(x: Tensor, gamma: Tensor | None, variant: str, *, flattened: bool = False) -> None:
    """Raise TypeError or ValueError unless x [B, C, *S], gamma (one element) and the variant's name are right."""
    op = "channel_attention"
    _check_tensors(op, {"x": x}, gamma, flattened=flattened, same_dtype=True)
    check_variant(variant)


def check_variant(variant: str) -> None:
    """Raise ValueError unless `variant` is one of VARIANTS."""
    if variant not in VARIANTS:
        raise ValueError(
            f"channel_attention: unknown variant {variant!r}, expected one of {', '.join(map(repr, VARIANTS))}"
        )


def check_saved(
    op: str, model: Tensor, tensors: dict[str, Tensor], shapes: Sequence[Sequence[int]], dtypes: Sequence[torch.dtype]
) -> None:
    """Raise unless the tensors handed to a backward operator are as its forward made them, on the device of `model`."""
    for (name, tensor), shape, dtype in zip(tensors.items(), shapes, dtypes, strict=True):
        if tensor.dtype != dtype:
            raise TypeError(f"{op}_backward: {name} must be {_name(dtype)}, got {_name(tensor.dtype)}")
        if tensor.device != model.device:
            raise ValueError(f"{op}_backward: {name} must be on {model.device}, got {tensor.device}")
        if tensor.shape != tuple(shape):
            raise ValueError(f"{op}_backward: {name} must have shape {list(shape)}, got {_shape(tensor)}")


def check_flag(op: str, name: str, value: object) -> None:
    """Raise TypeError unless `value` is a bool."""
    if not isinstance(value, bool):
        raise TypeError(f"{op}: {name} must be a bool, got {_kind(value)}")


def check_number(op: str, name: str, value: object) -> None:
    """Raise TypeError unless `value` is a real Python number (or a symbolic one while tracing)."""
    if isinstance(value, bool) or not isinstance(value, (int, float, torch.SymInt, torch.SymFloat)):
        raise TypeError(f"{op}: {name} must be a real number, got {_kind(value)}")


def _check_tensors(
    op: str, tensors: dict[str, Tensor], gamma: Tensor | None, *, flattened: bool, same_dtype: bool
) -> None:
    first = next(iter(tensors.values()))
    for name, tensor in tensors.items():
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{op}: {name} must be a torch.Tensor, got {_kind(tensor)}")
        rank = tensor.dim()
        if rank < 3:
            raise ValueError(
                f"{op}: {name} must have at least 3 dimensions [B, channels, *positions], got {_shape(tensor)}"
            )
        if flattened and rank != 3:
            raise ValueError(f"{op}: {name} must have 3 dimensions [B, channels, positions], got {_shape(tensor)}")
        if tensor.layout != torch.strided:
            raise TypeError(f"{op}: {name} must be a strided tensor, got layout {tensor.layout}")
        if tensor.dtype not in DTYPES:
            raise TypeError(f"{op}: {name} must be one of {DTYPE_NAMES}, got {_name(tensor.dtype)}")
    dtype, device = first.dtype, first.device
    for tensor in tensors.values():
        if same_dtype and tensor.dtype != dtype:
            got = ", ".join(f"{n} {_name(t.dtype)}" for n, t in tensors.items())
            raise TypeError(f"{op}: all of {', '.join(tensors)} must have one dtype, got {got}")
        if tensor.device != device:
            got = ", ".join(f"{n} on {t.device}" for n, t in tensors.items())
            raise ValueError(f"{op}: all of {', '.join(tensors)} must be on one device, got {got}")
    if gamma is not None:
        _check_gamma(op, gamma, first.device)


def _check_gamma(op: str, gamma: Tensor, device: torch.device) -> None:
    if not isinstance(gamma, Tensor):
        raise TypeError(f"{op}: gamma must be a one-element tensor, a real number or None, got {_kind(gamma)}")
    if gamma.dtype not in DTYPES:
        raise TypeError(f"{op}: gamma must be one of {DTYPE_NAMES}, got {_name(gamma.dtype)}")
    if gamma.device != device:
        raise ValueError(f"{op}: gamma must be on the device of the other tensors, {device}, got {gamma.device}")
    if gamma.numel() != 1:
        raise ValueError(f"{op}: gamma must have one element, got shape {_shape(gamma)}")


def _mismatch(op: str, what: str, tensors: dict[str, Tensor], dim: int) -> NoReturn:
    got = ", ".join(f"{name} {_shape(tensor)}" for name, tensor in tensors.items())
    raise ValueError(f"{op}: {what} (dimension {dim}) must be the same in {', '.join(tensors)}, got {got}")


def _shape(tensor: Tensor) -> list[int]:
    return list(tensor.shape)


def _kind(value: object) -> str:
    return f"{type(value).__name__} {reprlib.repr(value)}"


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
