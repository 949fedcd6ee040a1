"""Whether a module computes what the fused operation would: outputs and gradients on a private copy, in fp64.

Neither the name nor the source of a module decides, the numbers do.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from .swap_find import Found
from .swap_forward import Swap, attention, fold
from .swap_patterns import LOOK_ALIKES, Pattern, projections, scalar

GAMMA = 0.7
"""What the learned scalar is set to for the comparison: at 0, where it begins, any replacement looks right."""

TOLERANCE = 1e-8
"""Largest difference, in fp64 and relative to the largest number, at which two results are the same."""

_SIZE = (5, 7)  # height and width for the comparison: odd and unequal, so that no transposition goes unnoticed
_CHANNELS = 12  # for a channel attention that fits any number
_NAMES_OF_CHANNELS = ("chanel_in", "channel_in", "in_channels", "in_dim", "channels")  # else its own


def verify(one: Found, *, fold_too: bool = False) -> dict[str, Any] | None:
    """Compare a module with the operation, in each variant that it may be.

    Its parameters, mode, hooks and the state of random numbers stay as they are. The best difference is left in `one`.

    Args:
        one: the module; the pattern that agrees is left in it as the only one.
        fold_too: whether the folded projections are compared as well.

    Returns:
        Options of the operation with which the two agree; None if they never do, with the reason in `one`.
    """
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        reason = "computes something else"
        for pattern in one.patterns:
            try:
                module = _private_copy(one.module, pattern)
                x = _input(module, pattern)
                expected = _results(module, module, x)
            except Exception as error:  # the module's own: whatever it raises, it cannot be compared
                reason = f"cannot be compared: {str(error).partition(chr(10))[0] or type(error).__name__}"
                break
            for options in _hypotheses(module, pattern):
                swap = Swap(pattern, "eager", options)
                results = _results(partial(attention, module, swap=swap), module, x)
                difference = _difference(results, expected)
                if fold_too and pattern.query is not None and difference <= TOLERANCE:
                    difference = _difference([_folded(module, x, swap)], expected[:1])
                one.error = difference if one.error is None else min(one.error, difference)
                if difference <= TOLERANCE:
                    one.patterns = [pattern]
                    return options
    note = LOOK_ALIKES.get(one.class_name)
    one.detail = reason + (f": {note}" if note else "")
    return None


def _private_copy(module: nn.Module, pattern: Pattern) -> nn.Module:
    """In fp64 on the CPU, without the hooks of the user, with the scalar at GAMMA."""
    module = copy.deepcopy(module).cpu().double()
    for part in module.modules():
        part._forward_hooks.clear()
        part._forward_pre_hooks.clear()
        part._backward_hooks.clear()
        part._backward_pre_hooks.clear()
    for parameter in module.parameters():
        parameter.requires_grad_(True)
    with torch.no_grad():
        scalar(module, pattern).fill_(GAMMA)
    return module


def _input(module: nn.Module, pattern: Pattern) -> Tensor:
    """Correlated positions and channels [2, C, h, w], so small that no row of either map is nearly one-hot."""
    if pattern.query is None:
        numbers = (getattr(module, name, None) for name in _NAMES_OF_CHANNELS)
        channels = next((number for number in numbers if isinstance(number, int) and number > 0), _CHANNELS)
    else:
        channels = projections(module, pattern)[0].in_channels
    x = torch.randn(2, channels, *_SIZE, dtype=torch.float64)
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


def _results(forward: Callable[[Tensor], Any], module: nn.Module, x: Tensor) -> list[Tensor]:
    """Output in evaluation and in training, and gradients of the input and of all parameters."""
    module.eval()
    with torch.no_grad():
        evaluated = forward(x)
    module.train()
    x = x.clone().requires_grad_(True)
    out = forward(x)
    if not isinstance(out, Tensor):
        raise TypeError(f"it returns {type(out).__name__}, not one tensor")
    if out.shape != x.shape:
        raise TypeError(f"it turns {list(x.shape)} into {list(out.shape)}")
    weights = torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view_as(out).cos()
    inputs = [x, *module.parameters()]
    gradients = torch.autograd.grad((out * weights).sum(), inputs, allow_unused=True)
    given = [torch.zeros_like(a) if g is None else g for a, g in zip(inputs, gradients, strict=True)]
    return [evaluated, out.detach(), *given]


def _folded(module: nn.Module, x: Tensor, swap: Swap) -> Tensor:
    module.eval()
    fold(module, swap.pattern)
    with torch.no_grad():
        return attention(module, x, Swap(swap.pattern, swap.backend, swap.options, fold=True))


def _difference(results: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    """The largest, each relative to the largest number in its tensor; the bias of keys has the gradient 0."""
    scale = max(tensor.abs().max().item() for tensor in expected)
    differences = [
        (one - other).abs().max() / max(other.abs().max().item(), 1e-6 * scale)
        for one, other in zip(results, expected, strict=True)
    ]
    return torch.stack(differences).max().item()  # NaN if one of them is
