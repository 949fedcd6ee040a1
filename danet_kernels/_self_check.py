"""The check of one backend, operator and dtype on the user's GPU: forward and every gradient against the reference."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import replace
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from ._cases import Case
from ._error_rule import DRAWS, MORE_DRAWS, Yardstick, judge, yardsticks

_BF16, _FP16, _FP32 = (torch.bfloat16,), (torch.float16,), (torch.float32,)


def _odd_positions(C: int, D: int, arrange: str, **more: Any) -> tuple[Case, ...]:
    """No multiples of a tile: tiles in several parts, gamma = 0, and more tiles than a GPU takes in one round."""
    return (
        Case(1, C, (135,), (259,), D, spread=3.0, arrange=arrange, **more),
        Case(2, C, (131,), (129,), D, gamma=0.0, arrange=arrange, **more),
        Case(150, C, (21,), (25,), D, gamma=-0.5, arrange=arrange, **more),
    )


def _odd_channels(C: int, arrange: str, **more: Any) -> tuple[Case, ...]:
    """Likewise, and more positions than one partial sum of the Gram matrix has."""
    return (
        Case(2, C, (137,), gamma=-0.5, spread=0.3, arrange=arrange, **more),
        Case(2, C, (135,), gamma=0.0, spread=0.3, arrange=arrange, **more),
        Case(1, C, (4129,), spread=0.15, arrange=arrange, **more),
    )


# Triton compiles a kernel anew for each dtype, layout and width of a tile, and for sizes and strides that are multiples
# of 16 or are not, which takes longer than to run it. So cases share all of this, also with real sizes: C and D are no
# whole tiles of those that 512 and 64 take. Between them the dtypes have each path through the code: 16 bits and fp32
# in either layout, gamma in fp32 and rounded, both variants. On the first case of a dtype every kernel is run.
CASES: dict[str, tuple[Case, ...]] = {
    "position_attention": (
        Case(1, 272, (144,), (256,), 48, spread=3.0, gamma_rounded=True, dtypes=_BF16 + _FP32),
        *_odd_positions(272, 48, "wider", gamma_rounded=True, dtypes=_BF16),
        *_odd_positions(264, 56, "channels_last", dtypes=_FP16 + _FP32),
    ),
    "channel_attention": (
        *_odd_channels(160, "wider", gamma_rounded=True, dtypes=_BF16),
        *_odd_channels(144, "channels_last", dtypes=_FP16),
        Case(2, 144, (144,), spread=0.3, dtypes=_FP32),
        *_odd_channels(136, "channels_last", variant="paper", dtypes=_FP32),
    ),
}


def cases_for(op: str, dtype: torch.dtype) -> list[Case]:
    return [case for case in CASES[op] if case.dtypes is None or dtype in case.dtypes]


def self_check(backend: ModuleType, op: str, dtype: torch.dtype, device: torch.device) -> tuple[str, bool]:
    """(what is wrong, or ""; whether that was measured), by `find_fault` in a thread of its own.

    Whoever calls is inside of an operator, where autograd is off, and maybe under autocast, inference mode, vmap or a
    mode of torch.compile. A new thread is under none of them.
    """
    found = "it did not finish", False

    def work() -> None:
        nonlocal found
        try:
            with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
                found = find_fault(backend, op, dtype, device), True
        except Exception as error:  # a kernel that does not compile, or a GPU without memory: "auto" has other backends
            found = f"it raised {type(error).__name__}: {error}", False

    thread = threading.Thread(target=work, name="danet_kernels self-check")
    thread.start()
    thread.join()
    return found


def find_fault(backend: ModuleType, op: str, dtype: torch.dtype, device: torch.device) -> str:
    """The first result that is wrong, with its error; "" if all are right. Raises what a kernel raises.

    The reference runs on the CPU: no setting of the GPU's libraries has a say there, and autograd needs no thread of
    the GPU, which may be the one that waits for us.
    """
    for number, case in enumerate(cases_for(op, dtype)):
        inputs, dout, options = case.make(dtype, str(device), seed=number)
        results = results_of(backend, op, inputs, dout, options, every_kernel=number == 0)
        named = [(name, result.cpu()) for name, result in results]
        on_cpu = {name: tensor.cpu() for name, tensor in inputs.items()}
        for draws in (DRAWS, MORE_DRAWS):
            allowed = yardsticks(op, on_cpu, dout.cpu(), draws=draws, **options)
            verdicts = ((name, judge(result, for_gpu(allowed[name], dtype))) for name, result in named)
            wrong = [f"{name}: {verdict}, in {case}" for name, verdict in verdicts if not verdict.ok]
            if not wrong:
                break
        if wrong:
            return wrong[0]
    return ""


def for_gpu(yardstick: Yardstick, dtype: torch.dtype) -> Yardstick:
    """The yardstick for GPU kernels on inputs of `dtype`. Where the user allows tf32, that has 11 bits less."""
    yardstick = yardstick.for_tensor_cores()
    tf32 = dtype == torch.float32 and torch.backends.cuda.matmul.fp32_precision == "tf32"
    return replace(yardstick, factor=yardstick.factor * 2**11) if tf32 else yardstick


def results_of(
    backend: ModuleType,
    op: str,
    inputs: dict[str, Tensor],
    dout: Tensor,
    options: dict[str, object],
    every_kernel: bool,
) -> Iterator[tuple[str, Tensor]]:
    """Results by name. every_kernel: also those of inference, and single gradients, which other kernels may make."""
    gamma = inputs.get("gamma")
    if op == "position_attention":
        query, key, value = inputs["query"], inputs["key"], inputs["value"]
        arguments = query, key, value, inputs.get("residual"), gamma, 1.0
        out, *saved = backend.position_attention_forward(*arguments, True)
        yield "out", out
        if every_kernel:
            yield "out", backend.position_attention_forward(*arguments, False)[0]
        names = ["dquery", "dkey", "dvalue", "dgamma"]

        def backward(*needs: bool) -> tuple[Tensor, ...]:
            return backend.position_attention_backward(dout, query, key, value, *saved, gamma, 1.0, needs)
    else:
        how = options["variant"], options["residual"]
        out, *saved = backend.channel_attention_forward(inputs["x"], gamma, *how)
        yield "out", out
        names = ["dx", "dgamma"]

        def backward(*needs: bool) -> tuple[Tensor, ...]:
            return backend.channel_attention_backward(dout, inputs["x"], gamma, *saved, *how, needs)

    available = [name for name in names if name != "dgamma" or gamma is not None]
    for wanted in [available] + [[name] for name in available] * every_kernel:
        gradients = backward(*(name in wanted for name in names))
        yield from ((name, gradient) for name, gradient in zip(names, gradients, strict=True) if name in wanted)
