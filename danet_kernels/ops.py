"""The torch.library operators: schemas, fake kernels, autograd, autocast and FLOP formulas, once for all backends.

    position_attention_forward, position_attention_backward, channel_attention_forward, channel_attention_backward

They take flattened [B, *, N] tensors with any strides. functional.py is the public face; the rules for vmap are in
_vmap.py.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from . import backends
from ._checks import check_channel_attention, check_position_attention, check_saved
from ._layout import accumulator_dtype, empty_like_layout

# A Library undoes its registrations when it is collected, so it lives as long as the module.
LIBRARY = torch.library.Library("danet_kernels", "DEF")

OPS = torch.ops.danet_kernels
"""The operators, callable."""

LIBRARY.define(
    "position_attention_forward(Tensor query, Tensor key, Tensor value, Tensor? residual, Tensor? gamma, float scale, "
    "bool save_for_backward, str backend) -> (Tensor out, Tensor attn, Tensor lse)",
    tags=(torch.Tag.pt2_compliant_tag,),
)
LIBRARY.define(
    "position_attention_backward(Tensor dout, Tensor query, Tensor key, Tensor value, Tensor attn, Tensor lse, "
    "Tensor? gamma, float scale, bool needs_query, bool needs_key, bool needs_value, bool needs_gamma, str backend) "
    "-> (Tensor dquery, Tensor dkey, Tensor dvalue, Tensor dgamma)",
    tags=(torch.Tag.pt2_compliant_tag,),
)
LIBRARY.define(
    "channel_attention_forward(Tensor x, Tensor? gamma, str variant, bool residual, str backend) "
    "-> (Tensor out, Tensor row_max, Tensor row_sum)",
    tags=(torch.Tag.pt2_compliant_tag,),
)
LIBRARY.define(
    "channel_attention_backward(Tensor dout, Tensor x, Tensor? gamma, Tensor row_max, Tensor row_sum, str variant, "
    "bool residual, bool needs_x, bool needs_gamma, str backend) -> (Tensor dx, Tensor dgamma)",
    tags=(torch.Tag.pt2_compliant_tag,),
)


def _kernel(name: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Register the decorated function as the kernel of operator `name` on every device we have backends for."""

    def register(function: Callable[..., Any]) -> Callable[..., Any]:
        for key in ("CPU", "CUDA"):
            LIBRARY.impl(name, function, key)
        return function

    return register


def _fake(name: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    return torch.library.register_fake(f"danet_kernels::{name}", lib=LIBRARY)


# ---- position attention


def _needs_attn(value: Tensor, residual: Tensor | None, gamma: Tensor | None, save_for_backward: bool) -> bool:
    """Whether the backward needs attn apart from out: not where out is attn itself, unrounded."""
    out_serves = residual is None and gamma is None and value.dtype == accumulator_dtype(value.dtype)
    return save_for_backward and not out_serves


@_kernel("position_attention_forward")
def _position_attention_forward(
    query: Tensor,  # [B, D, M]
    key: Tensor,  # [B, D, N]
    value: Tensor,  # [B, C, N]
    residual: Tensor | None,  # [B, C, M]
    gamma: Tensor | None,
    scale: float,
    save_for_backward: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    check_position_attention(query, key, value, residual, gamma, flattened=True)
    chosen = backends.choose(backend, "position_attention", query, key, value)
    needs_attn = _needs_attn(value, residual, gamma, save_for_backward)
    return chosen.position_attention_forward(query, key, value, residual, gamma, scale, needs_attn)


@_fake("position_attention_forward")
def _position_attention_forward_fake(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    residual: Tensor | None,
    gamma: Tensor | None,
    scale: float,
    save_for_backward: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    check_position_attention(query, key, value, residual, gamma, flattened=True)
    backends.check_name(backend)
    channels, queries, dtype = value.shape[1], query.shape[2], accumulator_dtype(value.dtype)
    needs_attn = _needs_attn(value, residual, gamma, save_for_backward)
    return (
        empty_like_layout(value, channels, queries, value.dtype),
        empty_like_layout(value, channels, queries, dtype) if needs_attn else value.new_empty(0, dtype=dtype),
        query.new_empty((query.shape[0], queries), dtype=dtype),
    )


@_kernel("position_attention_backward")
def _position_attention_backward(
    dout: Tensor,  # [B, C, M]
    query: Tensor,  # [B, D, M]
    key: Tensor,  # [B, D, N]
    value: Tensor,  # [B, C, N]
    attn: Tensor,  # [B, C, M]
    lse: Tensor,  # [B, M]
    gamma: Tensor | None,
    scale: float,
    needs_query: bool,
    needs_key: bool,
    needs_value: bool,
    needs_gamma: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    _check_position_backward(dout, query, key, value, attn, lse, gamma)
    chosen = backends.choose(backend, "position_attention", query, key, value)
    needs = (needs_query, needs_key, needs_value, needs_gamma and gamma is not None)
    return chosen.position_attention_backward(dout, query, key, value, attn, lse, gamma, scale, needs)


@_fake("position_attention_backward")
def _position_attention_backward_fake(
    dout: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn: Tensor,
    lse: Tensor,
    gamma: Tensor | None,
    scale: float,
    needs_query: bool,
    needs_key: bool,
    needs_value: bool,
    needs_gamma: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    _check_position_backward(dout, query, key, value, attn, lse, gamma)
    backends.check_name(backend)
    empty = lse.new_empty
    return (
        _gradient(query) if needs_query else empty(0),
        _gradient(key) if needs_key else empty(0),
        _gradient(value) if needs_value else empty(0),
        gamma.new_empty(gamma.shape) if needs_gamma and gamma is not None else empty(0),
    )


def _check_position_backward(
    dout: Tensor, query: Tensor, key: Tensor, value: Tensor, attn: Tensor, lse: Tensor, gamma: Tensor | None
) -> None:
    check_position_attention(query, key, value, None, gamma, flattened=True)
    wide = accumulator_dtype(value.dtype)
    result = (query.shape[0], value.shape[1], query.shape[2])
    saved = {"dout": dout, "attn": attn, "lse": lse}
    check_saved("position_attention", value, saved, (result, result, result[::2]), (value.dtype, wide, wide))


def _position_setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    query, key, value, residual, gamma, scale, save_for_backward, backend = inputs
    out, attn, lse = output
    ctx.mark_non_differentiable(attn, lse)
    ctx.set_materialize_grads(False)
    ctx.scale, ctx.backend = scale, backend
    ctx.has_attn = save_for_backward
    attn = attn if _needs_attn(value, residual, gamma, save_for_backward) else out
    ctx.save_for_backward(query, key, value, attn, lse, gamma)


def _position_autograd(ctx: Any, dout: Tensor | None, *unused: Tensor | None) -> tuple[Any, ...]:
    if dout is None:
        return (None,) * 8
    if not ctx.has_attn:
        raise RuntimeError("position_attention_forward ran with save_for_backward=False, so it has no backward")
    query, key, value, attn, lse, gamma = ctx.saved_tensors
    needs_query, needs_key, needs_value, needs_residual, needs_gamma = ctx.needs_input_grad[:5]
    gradients: list[Tensor | None] = [None] * 4
    needs = (needs_query, needs_key, needs_value, needs_gamma)
    if any(needs):
        computed = OPS.position_attention_backward(
            dout, query, key, value, attn, lse, gamma, ctx.scale, *needs, ctx.backend
        )
        gradients = [gradient if needed else None for gradient, needed in zip(computed, needs, strict=True)]
    dquery, dkey, dvalue, dgamma = gradients
    dresidual = dout if needs_residual else None
    return dquery, dkey, dvalue, dresidual, dgamma, None, None, None


@register_flop_formula([OPS.position_attention_forward])
def _position_forward_flops(query: Any, key: Any, value: Any, *args: Any, **kwargs: Any) -> int:
    batch, d, queries = query
    channels, keys = value[1:]
    return 2 * batch * queries * keys * (d + channels)


@register_flop_formula([OPS.position_attention_backward])
def _position_backward_flops(dout: Any, query: Any, key: Any, value: Any, *args: Any, **kwargs: Any) -> int:
    batch, d, queries = query
    channels, keys = value[1:]
    return 2 * batch * queries * keys * (3 * d + 2 * channels)


# ---- channel attention


@_kernel("channel_attention_forward")
def _channel_attention_forward(
    x: Tensor,  # [B, C, N]
    gamma: Tensor | None,
    variant: str,
    residual: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    check_channel_attention(x, gamma, variant, flattened=True)
    return backends.choose(backend, "channel_attention", x).channel_attention_forward(x, gamma, variant, residual)


@_fake("channel_attention_forward")
def _channel_attention_forward_fake(
    x: Tensor, gamma: Tensor | None, variant: str, residual: bool, backend: str
) -> tuple[Tensor, Tensor, Tensor]:
    check_channel_attention(x, gamma, variant, flattened=True)
    backends.check_name(backend)
    statistics = (x.shape[0], x.shape[1])
    dtype = accumulator_dtype(x.dtype)
    return _gradient(x), x.new_empty(statistics, dtype=dtype), x.new_empty(statistics, dtype=dtype)


@_kernel("channel_attention_backward")
def _channel_attention_backward(
    dout: Tensor,  # [B, C, N]
    x: Tensor,  # [B, C, N]
    gamma: Tensor | None,
    row_max: Tensor,  # [B, C]
    row_sum: Tensor,  # [B, C]
    variant: str,
    residual: bool,
    needs_x: bool,
    needs_gamma: bool,
    backend: str,
) -> tuple[Tensor, Tensor]:
    _check_channel_backward(dout, x, gamma, row_max, row_sum, variant)
    chosen = backends.choose(backend, "channel_attention", x)
    needs = (needs_x, needs_gamma and gamma is not None)
    return chosen.channel_attention_backward(dout, x, gamma, row_max, row_sum, variant, residual, needs)


@_fake("channel_attention_backward")
def _channel_attention_backward_fake(
    dout: Tensor,
    x: Tensor,
    gamma: Tensor | None,
    row_max: Tensor,
    row_sum: Tensor,
    variant: str,
    residual: bool,
    needs_x: bool,
    needs_gamma: bool,
    backend: str,
) -> tuple[Tensor, Tensor]:
    _check_channel_backward(dout, x, gamma, row_max, row_sum, variant)
    backends.check_name(backend)
    return (
        _gradient(x) if needs_x else row_max.new_empty(0),
        gamma.new_empty(gamma.shape) if needs_gamma and gamma is not None else row_max.new_empty(0),
    )


def _check_channel_backward(
    dout: Tensor, x: Tensor, gamma: Tensor | None, row_max: Tensor, row_sum: Tensor, variant: str
) -> None:
    check_channel_attention(x, gamma, variant, flattened=True)
    wide, rows = accumulator_dtype(x.dtype), x.shape[:2]
    saved = {"dout": dout, "row_max": row_max, "row_sum": row_sum}
    check_saved("channel_attention", x, saved, (x.shape, rows, rows), (x.dtype, wide, wide))


def _channel_setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    x, gamma, variant, residual, backend = inputs
    _, row_max, row_sum = output
    ctx.mark_non_differentiable(row_max, row_sum)
    ctx.set_materialize_grads(False)
    ctx.variant, ctx.residual, ctx.backend = variant, residual, backend
    ctx.save_for_backward(x, gamma, row_max, row_sum)


def _channel_autograd(ctx: Any, dout: Tensor | None, *unused: Tensor | None) -> tuple[Any, ...]:
    if dout is None:
        return (None,) * 5
    x, gamma, row_max, row_sum = ctx.saved_tensors
    needs_x, needs_gamma = ctx.needs_input_grad[:2]
    dx, dgamma = OPS.channel_attention_backward(
        dout, x, gamma, row_max, row_sum, ctx.variant, ctx.residual, needs_x, needs_gamma, ctx.backend
    )
    return dx if needs_x else None, dgamma if needs_gamma else None, None, None, None


@register_flop_formula([OPS.channel_attention_forward])
def _channel_forward_flops(x: Any, *args: Any, **kwargs: Any) -> int:
    batch, channels, positions = x
    return 4 * batch * channels * channels * positions


@register_flop_formula([OPS.channel_attention_backward])
def _channel_backward_flops(dout: Any, x: Any, *args: Any, **kwargs: Any) -> int:
    batch, channels, positions = x
    return 8 * batch * channels * channels * positions


# ---- autograd, autocast


def _gradient(tensor: Tensor) -> Tensor:
    """Uninitialised [B, C, N] like `tensor`, in its layout."""
    return empty_like_layout(tensor, tensor.shape[1], tensor.shape[2], tensor.dtype)


def _register_autograd(name: str, backward: Callable[..., Any], setup_context: Callable[..., None] | None) -> None:
    torch.library.register_autograd(f"danet_kernels::{name}", backward, setup_context=setup_context, lib=LIBRARY)


def _not_differentiable(message: str) -> Callable[..., Any]:
    def raises(ctx: Any, *gradients: Tensor | None) -> Any:
        raise NotImplementedError(message)

    return raises


_register_autograd("position_attention_forward", _position_autograd, _position_setup_context)
_register_autograd("channel_attention_forward", _channel_autograd, _channel_setup_context)
# Without a formula torch would differentiate the rest with a mere warning and leave their gradients out.
for _op in backends.OPS:
    _message = f"{_op} has no second derivative: double backward is not implemented"
    _register_autograd(f"{_op}_backward", _not_differentiable(_message), None)
    _kernels = [f"{_op}_{way}_{backend}" for way in ("forward", "backward") for backend in ("native", "cuda")]
    hopper = ("forward", "dvalue") if _op == "position_attention" else ("forward", "backward")
    _kernels += [f"{_op}_{part}_hopper" for part in hopper]
    for _kernel in _kernels:
        _message = f"{_kernel} is not implemented for autograd: call danet_kernels.{_op}"
        _register_autograd(_kernel, _not_differentiable(_message), None)


def _register_autocast(name: str, device: str, tensors: int) -> None:
    """Under autocast cast the first `tensors` arguments, and nothing inside the operator.

    torch.library.register_autocast would cast gamma too.
    """
    op = getattr(OPS, name).default
    key = f"Autocast{device.upper()}"
    keys = torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, key))

    def cast(argument: Tensor | None) -> Tensor | None:
        if argument is None or not argument.is_floating_point() or argument.dtype == torch.float64:
            return argument
        return argument.to(torch.get_autocast_dtype(device))

    def kernel(*args: Any) -> Any:
        with torch._C._ExcludeDispatchKeyGuard(keys):
            return op(*map(cast, args[:tensors]), *args[tensors:])

    LIBRARY.impl(name, kernel, key)


for _device in ("cpu", "cuda"):
    _register_autocast("position_attention_forward", _device, tensors=4)
    _register_autocast("channel_attention_forward", _device, tensors=1)
    for _op in backends.OPS:
        _register_autocast(f"{_op}_backward", _device, tensors=0)
