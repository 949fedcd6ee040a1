"""Whether a module computes what the fused operation would: outputs and gradients on a private copy, in fp64.

Neither the name nor the source of a module decides, the numbers do; and not the numbers that are in its weights, which
may be all zeros, but others.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from .swap_find import Found, copy_without_hooks
from .swap_forward import Swap, attention, fold
from .swap_patterns import LOOK_ALIKES, Pattern, projections, scalar

GAMMAS = (0.7, -1.3)
"""What the learned scalar is set to for the comparison: at 0, where it begins, any replacement looks right."""

TOLERANCE = 1e-8
"""Largest difference, in fp64 and relative to the largest number, at which two results are the same."""

SINGLE_TOLERANCE = 1e-4
"""The same for a module that computes a part in fp32, whatever its input."""

_SIZE = (5, 7)  # height and width for the comparison: odd and unequal, so that no transposition goes unnoticed
_CHANNELS = 12  # for a channel attention that fits any number


def verify(one: Found, *, fold_too: bool = False) -> Swap | None:
    """Compare a module with the operation, in each variant that it may be.

    Its parameters, mode, hooks and the state of random numbers stay as they are. The least difference is left in `one`.

    Args:
        one: the module; the pattern that agrees is left in it as the only one.
        fold_too: whether the folded projections are compared as well.

    Returns:
        The swap with which the two agree; None if they never do, with the reason in `one`.
    """
    reason = "computes something else"
    try:
        with torch.random.fork_rng([]), torch.inference_mode(False), torch.enable_grad(), _no_autocast():
            for pattern in one.patterns:
                swap = _agreeing(one, pattern, fold_too)
                if swap is not None:
                    one.patterns = [pattern]
                    return swap
    except Exception as error:  # the module's own: whatever it raises, it cannot be compared
        reason = f"cannot be compared: {str(error).partition(chr(10))[0] or type(error).__name__}"
    note = LOOK_ALIKES.get(one.class_name)
    one.detail = reason + (f": {note}" if note else "")
    return None


def _agreeing(one: Found, pattern: Pattern, fold_too: bool) -> Swap | None:
    generator = torch.Generator("cpu").manual_seed(0)
    module = _private_copy(one.module, generator)
    x = _input(module, pattern, one.widths[0] or _CHANNELS, generator)
    module(x)  # whatever lasts of a first call is there from now on
    attributes = [dict(vars(part)) for part in module.modules()]
    state = {name: buffer.clone() for name, buffer in module.named_buffers()}
    run = partial(_results, module=module, pattern=pattern, x=x, state=state)
    with _Precision() as precision:
        expected = run(module)
    tolerance = SINGLE_TOLERANCE if precision.single else TOLERANCE
    for options in _hypotheses(module, pattern):
        swap = Swap(pattern, "eager", options)
        difference = _difference(run(partial(attention, module, swap=swap)), expected, tolerance)
        if fold_too and pattern.query is not None and difference <= tolerance:
            difference = max(difference, _difference([_folded(module, x, swap)], expected[-1:], tolerance))
        one.error = difference if one.error is None else min(one.error, difference)
        if difference <= tolerance:
            swap.own_precision = _keeps_autocast_out(module, pattern, x, expected[-1])
            one.detail = _stored(module, attributes)
            return swap
    return None


def _private_copy(module: nn.Module, generator: torch.Generator) -> nn.Module:
    """In fp64 on the CPU, with other weights, and of the hooks those that make the weights."""
    module = copy_without_hooks(module).cpu().double()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.requires_grad_(True)
            inputs = parameter[0].numel() if parameter.dim() > 1 else parameter.numel()
            numbers = torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype, device="cpu")
            parameter.copy_(numbers / inputs**0.5)
    return module


def _input(module: nn.Module, pattern: Pattern, channels: int, generator: torch.Generator) -> Tensor:
    """Correlated positions and channels [2, C, h, w], so small that no row of either map is nearly one-hot."""
    x = torch.randn(2, channels, *_SIZE, dtype=torch.float64, generator=generator, device="cpu")
    x = x + x.mean(1, keepdim=True) + 0.5 * x.roll(1, 1)
    for _ in range(60):
        if _largest_probability(module, pattern, x) <= 0.9:
            break
        x = x * 0.8
    return x


def _largest_probability(module: nn.Module, pattern: Pattern, x: Tensor) -> float:
    with torch.no_grad():
        if pattern.query is None:
            flat = x.flatten(2)  # [2, C, n]
            logits = flat @ flat.mT  # [2, C, C]
            return max(signed.softmax(-1).max().item() for signed in (logits, -logits))
        query, key, _ = (projection(x).flatten(2) for projection in projections(module, pattern))  # [2, D, n]
        return (query.mT @ key).softmax(-1).max().item()


def _hypotheses(module: nn.Module, pattern: Pattern) -> Iterator[dict[str, Any]]:
    if pattern.query is None:
        yield from ({"variant": variant} for variant in ("official", "paper"))
        return
    query, _, value = projections(module, pattern)
    widths = query.out_channels, value.out_channels
    yield from ({"scale": scale} for scale in dict.fromkeys((1.0, *(width**-0.5 for width in widths))))


def _results(
    forward: Callable[[Tensor], Any], *, module: nn.Module, pattern: Pattern, x: Tensor, state: dict[str, Tensor]
) -> list[Tensor]:
    """For each of GAMMAS: gradients of the input and all parameters, outputs in training and in evaluation."""
    results = []
    for gamma in GAMMAS:
        with torch.no_grad():
            scalar(module, pattern).fill_(gamma)
            for name, buffer in module.named_buffers():
                buffer.copy_(state[name])
        leaf = x.clone().requires_grad_(True)
        module.train()
        out = forward(leaf)
        if not isinstance(out, Tensor):
            raise TypeError(f"it returns {type(out).__name__}, not one tensor")
        if out.shape != x.shape:
            raise TypeError(f"it turns {list(x.shape)} into {list(out.shape)}")
        weights = torch.linspace(-1, 1, out.numel(), dtype=torch.float64, device="cpu").view_as(out).cos()
        inputs = [leaf, *module.parameters()]
        gradients = torch.autograd.grad((out * weights).sum(), inputs, allow_unused=True)
        results += [torch.zeros_like(a) if g is None else g for a, g in zip(inputs, gradients, strict=True)]
        module.eval()
        with torch.no_grad():
            for name, buffer in module.named_buffers():
                buffer.copy_(state[name])
            results += [out.detach(), forward(x)]
    return results


def _folded(module: nn.Module, x: Tensor, swap: Swap) -> Tensor:
    """The output in evaluation, as the last of _results."""
    module.eval()
    folded = Swap(swap.pattern, swap.backend, swap.options, fold=True)
    with torch.no_grad():
        fold(module, folded)
        return attention(module, x, folded)


def _difference(results: Sequence[Tensor], expected: Sequence[Tensor], tolerance: float) -> float:
    """The largest, each relative to the largest number in its tensor; the gradient of the keys' bias is 0."""
    scale = max(tensor.abs().max().item() for tensor in expected)
    floor = scale * (1e-6 if tolerance == TOLERANCE else 1e-2)
    differences = [
        (one - other).abs().max() / max(other.abs().max().item(), floor)
        for one, other in zip(results, expected, strict=True)
    ]
    return torch.stack(differences).max().item()  # NaN if one of them is


def _keeps_autocast_out(module: nn.Module, pattern: Pattern, x: Tensor, expected: Tensor) -> bool:
    """Whether the module, in evaluation and with the last of GAMMAS, computes as well under autocast as without."""
    single = module.float()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        out = single(x.float())
    module.double()
    return _difference([out.double()], [expected], SINGLE_TOLERANCE) <= SINGLE_TOLERANCE


def _stored(module: nn.Module, before: Sequence[dict[str, Any]]) -> str:
    """What else than results the forward leaves in the module, for the report."""
    names = [
        name
        for part, old in zip(module.modules(), before, strict=True)
        for name, value in vars(part).items()
        if name != "training" and not name.startswith("danet_") and old.get(name) is not value
    ]
    return f"not stored any more: {', '.join(dict.fromkeys(names))}" if names else ""


class _Precision(TorchDispatchMode):
    """Notes whether anything is computed in fp32."""

    single = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        leaves = out if isinstance(out, (tuple, list)) else (out,)
        self.single = self.single or any(isinstance(one, Tensor) and one.dtype == torch.float32 for one in leaves)
        return out


def _no_autocast() -> Any:
    return torch.autocast("cpu", enabled=False)
