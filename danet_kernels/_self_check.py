"""The check of one backend, operator and dtype on the user's GPU: forward and every gradient against the reference."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import replace
from types import ModuleType

import torch
from torch import Tensor

from ._cases import Case
from ._error_rule import DRAWS, MORE_DRAWS, Yardstick, judge, yardsticks

# For each case Triton compiles its kernels anew, which takes longer than to run them: few cases, of many troubles each.
CASES: dict[str, tuple[Case, ...]] = {
    "position_attention": (
        Case(1, 257, (135,), (259,), 59, spread=3.0, arrange="cropped"),
        Case(1, 264, (135,), (272,), 64, gamma=-0.5, arrange="channels_last"),
        Case(2, 40, (131,), (129,), 59, gamma=0.0, arrange="cropped"),
        # As many tiles as keep a GPU busy for more than one round.
        Case(150, 32, (20,), (24,), 16, gamma=None, residual=False, arrange="expanded"),
    ),
    "channel_attention": (
        Case(2, 131, (137,), arrange="cropped", spread=0.5),
        Case(1, 136, (279,), gamma=-0.5, residual=False, arrange="channels_last", spread=0.12, variant="paper"),
        Case(2, 131, (135,), gamma=0.0, arrange="cropped", spread=0.5),
        # More positions than one partial sum of the Gram matrix has.
        Case(2, 40, (4128,), gamma=None, arrange="expanded", spread=0.2),
    ),
}


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
    for number, case in enumerate(CASES[op]):
        inputs, dout, options = case.make(dtype, str(device), seed=number)
        results = _results(backend, op, inputs, dout, options, every_kernel=number == 0)
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


def _results(
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
