"""The backends and the choice among them.

A backend is a module with `why_not(op, *inputs) -> list of reasons` (empty: it can run) and four functions that share
one contract, so that autograd is written once (ops.py) and any backend can run the backward of another's forward:

    position_attention_forward(query, key, value, residual, gamma, scale, needs_attn)    -> out, attn, lse
    position_attention_backward(dout, query, key, value, attn, lse, gamma, scale, needs) -> dquery, dkey, dvalue, dgamma
    channel_attention_forward(x, gamma, variant, residual)                               -> out, row_max, row_sum
    channel_attention_backward(dout, x, gamma, row_max, row_sum, variant, residual, needs) -> dx, dgamma

`needs` is one bool per gradient; a gradient that is not needed comes back as an empty tensor, and so does attn.

A backend whose kernels are compiled for the user's GPU also has `source_hash(op)`: "auto" takes it only where these
kernels are proven (proven.py); and with ONLY_PROVEN, only where a run on hardware has proven them.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from types import ModuleType

import torch
from torch import Tensor

from .. import proven
from . import cuda, eager, hopper, native, triton

BACKENDS: dict[str, ModuleType] = {
    "native": native,
    "triton": triton,
    "cuda": cuda,
    "hopper": hopper,
    "eager": eager,
}
"""By name, in the order in which "auto" tries them. A record proves that kernels are right, not that they are fast: so
"hopper" is behind those that run wherever it does, and is taken by those who ask for it."""

OPS = ("position_attention", "channel_attention")

ENVIRONMENT_VARIABLE = "DANET_KERNELS_BACKEND"

_context: ContextVar[str | None] = ContextVar("danet_kernels_backend", default=None)


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Run every operator called inside with the backend `name`, in this thread or task.

    An explicit `backend=` argument beats this context, which beats the environment variable DANET_KERNELS_BACKEND.
    Raises ValueError for an unknown name.

        with danet_kernels.use_backend("eager"):
            out = danet_kernels.position_attention(query, key, value)
    """
    token = _context.set(check_name(name))
    try:
        yield
    finally:
        _context.reset(token)


def available_backends(op: str, *inputs: Tensor | None) -> dict[str, list[str]]:
    """Every backend by name, with the reasons why it cannot run `op` on these inputs (an empty list: it can).

    op: "position_attention" (inputs: query, key, value, residual, gamma; the last two may be left out) or
    "channel_attention" (inputs: x, gamma). Without inputs: whether the backend runs `op` at all on this machine.
    Of those that can, "auto" takes only one whose kernels are proven (`python -m danet_kernels.info` shows which).
    Raises ValueError for an unknown op.
    """
    if op not in OPS:
        raise ValueError(f"unknown op {op!r}, expected one of {', '.join(map(repr, OPS))}")
    tensors = [tensor for tensor in inputs if tensor is not None]
    return {name: backend.why_not(op, *tensors) for name, backend in BACKENDS.items()}


def check_name(name: str, origin: str = "") -> str:
    """`name` if it is "auto" or a backend; else ValueError, which also says where the name came from."""
    if not isinstance(name, str) or (name != "auto" and name not in BACKENDS):
        known = ", ".join(map(repr, ("auto", *BACKENDS)))
        raise ValueError(f"unknown backend {name!r}{origin}, expected one of {known}")
    return name


def requested(name: str) -> str:
    """The backend asked for: the argument unless it is "auto", else that of the context, of the environment, "auto".

    While torch.compile traces, which cannot read a ContextVar, the name stays as given: the operator asks when it runs.
    """
    if check_name(name) != "auto" or torch.compiler.is_compiling():
        return name
    from_context = _context.get()
    if from_context is not None:
        return from_context
    from_environment = os.environ.get(ENVIRONMENT_VARIABLE)
    return check_name(from_environment, f" in {ENVIRONMENT_VARIABLE}") if from_environment else "auto"


def choose(name: str, op: str, *inputs: Tensor) -> ModuleType:
    """The module that runs `op` on these inputs.

    Raises NotImplementedError with the reasons if the backend asked for, or for "auto" every backend, cannot run it.
    """
    name = requested(name)
    if name != "auto":
        reasons = BACKENDS[name].why_not(op, *inputs)
        if reasons:
            raise NotImplementedError(f"{op}: backend {name!r} cannot run: {'; '.join(reasons)}")
        return eager if _empty(inputs) else BACKENDS[name]
    refused = {}
    for candidate, backend in BACKENDS.items():
        reasons = backend.why_not(op, *inputs)
        if not reasons:
            if _empty(inputs):
                return eager
            if "source_hash" in vars(backend):
                reasons = proven.why_not(backend, op, inputs[0])
            if not reasons:
                return backend
        refused[candidate] = reasons
    raise NotImplementedError(
        f"{op}: no backend can run on these inputs: "
        + "; ".join(f"{candidate}: {', '.join(reasons)}" for candidate, reasons in refused.items())
    )


def _empty(inputs: tuple[Tensor, ...]) -> bool:
    """Whether the map has no entries. Then there is nothing to fuse: the definition serves, kernels need not know."""
    return 0 in [tensor.numel() for tensor in inputs]  # half the time of a generator
