"""Fused attention in a network that somebody else has written: its attention modules keep everything but their forward.

Position and channel attention are found by the names of their classes, and others by their parts: three 1x1
convolutions and a scalar, or a scalar alone. What decides is neither: a module is swapped only if the fused operation
gives its outputs and gradients.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from danet_kernels import channel_attention, position_attention

GAMMA = 0.7
"""What the learned scalar is set to for the comparison: at 0, where it begins, any replacement looks right."""

TOLERANCE = 1e-8
"""Largest difference, in fp64 and relative to the largest number, at which two results are the same."""

_CHANNELS = 12  # of the comparison for channel attention, which fits any number
_SIZE = (5, 7)  # height and width for it: odd and unequal, so that no transposition goes unnoticed


@dataclass(frozen=True)
class Pattern:
    """How a project names the parts of an attention module.

    Attributes:
        classes: names of classes, without their modules.
        scalar: path of the learned scalar in the module, such as "gamma" or "gamma.scale".
        query, key, value: names of the projections; None for channel attention, which has none.
    """

    classes: tuple[str, ...]
    scalar: str
    query: str | None = None
    key: str | None = None
    value: str | None = None

    def __post_init__(self) -> None:
        if len({name is None for name in (self.query, self.key, self.value)}) != 1:
            raise ValueError("Pattern: position attention needs query, key and value, channel attention none of them")

    @property
    def op(self) -> str:
        return "channel_attention" if self.query is None else "position_attention"


_PATTERNS = [
    Pattern(("PAM_Module", "PAM"), "gamma", "query_conv", "key_conv", "value_conv"),
    Pattern(("PAM", "PositionAttentionModule"), "gamma.scale", "query_project", "key_project", "value_project"),
    Pattern(("_PositionAttentionModule",), "alpha", "conv_b", "conv_c", "conv_d"),
    Pattern(("PosAttBlock",), "scale.alpha", "query_conv", "key_conv", "value_conv"),
    Pattern(("PAM",), "para_lambda", "query_conv", "key_conv", "value_conv"),
    Pattern(("CAM_Module", "CAM"), "gamma"),
    Pattern(("CAM", "ChannelAttentionModule"), "gamma.scale"),
    Pattern(("_ChannelAttentionModule",), "beta"),
    Pattern(("ChaAttBlock",), "scale.alpha"),
    Pattern(("CAM",), "para_mu"),
]


def register_pattern(pattern: Pattern) -> None:
    """Teach swap a class of yours. It is tried before those that are known, and verified like them."""
    _PATTERNS.insert(0, pattern)


@dataclass
class Found:
    """One module of a network that is, or looks like, attention."""

    path: str  # in the network; of a shared module the first
    class_name: str
    op: str
    pattern: Pattern
    module: nn.Module = field(repr=False)
    known: bool  # by the name of its class
    swapped: bool = False
    detail: str = ""  # the variant or scale that agrees, or why the module is left alone
    error: float | None = None  # largest relative difference found by the comparison

    @property
    def agrees(self) -> bool:
        return self.error is not None and self.error <= TOLERANCE


@dataclass
class SwapReport:
    """What swap has found and done. Print it."""

    found: list[Found]

    @property
    def swapped(self) -> list[Found]:
        return [one for one in self.found if one.swapped]

    def __str__(self) -> str:
        if not self.found:
            return "no position or channel attention was found; nothing is changed"
        lines = [("module", "class", "recognised as", "swapped", "difference", "")]
        for one in self.found:
            error = "-" if one.error is None else f"{one.error:.1e}"
            lines.append((one.path, one.class_name, one.op, "yes" if one.swapped else "no", error, one.detail))
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        return "\n".join("  ".join(map(str.ljust, line, widths)).rstrip() for line in lines)


class _Fused:
    """The forward of a swapped module, kept on the instance; the module's class is as it was."""

    def __init__(self, module: nn.Module, pattern: Pattern, backend: str, options: dict[str, Any]) -> None:
        self.module, self.pattern, self.backend, self.options = module, pattern, backend, options
        self.before = vars(module).get("forward")  # None: the class has it

    def __call__(self, x: Tensor) -> Tensor:  # [B, C, H, W] -> [B, C, H, W]
        gamma = _scalar(self.module, self.pattern).reshape(1)
        if self.pattern.query is None:
            return channel_attention(x, gamma, backend=self.backend, **self.options)
        query, key, value = (projection(x) for projection in _projections(self.module, self.pattern))
        return position_attention(query, key, value, x, gamma, backend=self.backend, **self.options)


def find_attention(model: nn.Module) -> list[Found]:
    """The modules of a network that swap would try; nothing is changed. Those already swapped are left out.

    Modules of unknown classes that hold a scalar and no other parameter are among them: few are channel attention.
    """
    found: list[Found] = []
    for path, module in model.named_modules():
        if any(module in one.module.modules() for one in found):
            continue  # a part of one
        if isinstance(vars(module).get("forward"), _Fused) or type(module).__module__ == "danet.attention":
            continue
        known = _known(module)
        pattern = known or _by_parts(module)
        if pattern is not None:
            found.append(Found(path, type(module).__name__, pattern.op, pattern, module, known is not None))
    return found


def swap(model: nn.Module, *, verify: bool = True, backend: str = "auto", dry_run: bool = False) -> SwapReport:
    """Give the attention modules of a network the fused operations, in place.

    Parameters, their names, hooks, devices, dtypes and the mode stay what they are, so that optimizers and checkpoints
    go on. Hooks on a softmax inside of a module are no longer called.

    Args:
        model: any network.
        verify: compare outputs and gradients of each module, on a copy in fp64 on the CPU, and leave it alone if they
            disagree. Without it the signs of channel attention and scales of logits are taken to be the authors'.
        backend: as danet_kernels.position_attention.
        dry_run: whether to compare and report only.

    Returns:
        The report: each module that looks like attention, and why it was left alone if so.

    Raises:
        ValueError: the network is compiled or scripted, so that its modules are not what runs.
    """
    _check_alive(model)
    found = find_attention(model)
    for one in found:
        options: dict[str, Any] | None = {}
        if verify:
            options = _verified(one)
        elif not one.known:
            one.detail, options = "of an unknown class, which only verify=True can tell", None
        if options is None:
            continue
        one.detail = ", ".join(f"{name}={value}" for name, value in options.items())
        if not dry_run:
            one.module.forward = _Fused(one.module, one.pattern, backend, options)
            one.swapped = True
    alike = [one for one in found if one.known or one.op == "position_attention" or one.agrees]
    return SwapReport(alike)


def unswap(model: nn.Module) -> int:
    """Restore what swap has replaced. Returns the number of modules."""
    swapped = [module for module in model.modules() if isinstance(vars(module).get("forward"), _Fused)]
    for module in swapped:
        before = vars(module)["forward"].before
        del module.forward
        if before is not None:
            module.forward = before
    return len(swapped)


# Finding


def _known(module: nn.Module) -> Pattern | None:
    name = type(module).__name__
    return next((pattern for pattern in _PATTERNS if name in pattern.classes and _has(module, pattern)), None)


def _by_parts(module: nn.Module) -> Pattern | None:
    """A pattern for a module of an unknown class, out of its own parameters and projections."""
    scalars = [name for name, parameter in module.named_parameters() if parameter.numel() == 1]
    if len(scalars) != 1 or type(module).__module__.startswith("torch.nn."):
        return None
    others = {name.rpartition(".")[0] for name, _ in module.named_parameters() if name != scalars[0]}
    if not others:
        return Pattern((), scalars[0])
    if len(others) != 3:
        return None
    convolutions = [name for name, child in module.named_children() if name in others and _is_projection(child)]
    if len(convolutions) != 3:
        return None
    query, key, value = convolutions  # in the order in which they were made
    pattern = Pattern((), scalars[0], query, key, value)
    return pattern if _has(module, pattern) else None


def _has(module: nn.Module, pattern: Pattern) -> bool:
    try:
        if _scalar(module, pattern).numel() != 1:
            return False
        if pattern.query is None:
            return sum(1 for _ in module.parameters()) == 1
        query, key, value = _projections(module, pattern)
    except AttributeError:
        return False
    return (
        all(map(_is_projection, (query, key, value)))
        and query.in_channels == key.in_channels == value.in_channels == value.out_channels
        and query.out_channels == key.out_channels
    )


def _is_projection(module: nn.Module) -> bool:
    return (
        isinstance(module, nn.Conv2d)
        and module.kernel_size == (1, 1)
        and module.stride == (1, 1)
        and module.padding == (0, 0)
        and module.groups == 1
    )


def _scalar(module: nn.Module, pattern: Pattern) -> Tensor:
    found: Any = module
    for name in pattern.scalar.split("."):
        found = getattr(found, name)
    if not isinstance(found, Tensor):
        raise AttributeError(pattern.scalar)
    return found


def _projections(module: nn.Module, pattern: Pattern) -> list[nn.Conv2d]:
    return [getattr(module, str(name)) for name in (pattern.query, pattern.key, pattern.value)]


def _check_alive(model: nn.Module) -> None:
    for path, module in model.named_modules():
        if hasattr(module, "_orig_mod"):
            raise ValueError(f"swap: {path or 'the network'} is compiled; swap first, then call torch.compile")
        if isinstance(module, torch.jit.ScriptModule):
            raise ValueError(f"swap: {path or 'the network'} is scripted; swap the module that it was made from")


# Verification


def _verified(one: Found) -> dict[str, Any] | None:
    """Options of the operation with which it agrees with the module; None, with the reason in `one`, if none do."""
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        try:
            module = _private_copy(one)
            x = _input(module, one.pattern)
            expected = _results(module, module, x)
        except Exception as error:  # the module's own: whatever it raises, it cannot be compared
            one.detail = f"cannot be run for the comparison: {str(error).partition(chr(10))[0] or type(error).__name__}"
            return None
        for options in _hypotheses(module, one.pattern):
            difference = _difference(_results(_Fused(module, one.pattern, "eager", options), module, x), expected)
            one.error = difference if one.error is None else min(one.error, difference)
            if difference <= TOLERANCE:
                return options
    one.detail = "computes something else: left alone"
    return None


def _private_copy(one: Found) -> nn.Module:
    """In fp64 on the CPU, without the hooks of the user, with the scalar at GAMMA."""
    module = copy.deepcopy(one.module).cpu().double().train()
    for part in module.modules():
        part._forward_hooks.clear()
        part._forward_pre_hooks.clear()
        part._backward_hooks.clear()
        part._backward_pre_hooks.clear()
    for parameter in module.parameters():
        parameter.requires_grad_(True)
    with torch.no_grad():
        _scalar(module, one.pattern).fill_(GAMMA)
    return module


def _input(module: nn.Module, pattern: Pattern) -> Tensor:
    """Correlated positions and channels [2, C, h, w], so small that no row of either map is nearly one-hot."""
    channels = _CHANNELS if pattern.query is None else _projections(module, pattern)[0].in_channels
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
            return max(sign_logits.softmax(-1).max().item() for sign_logits in (logits, -logits))
        query, key, _ = (projection(x).flatten(2) for projection in _projections(module, pattern))  # [2, D, n]
        return (query.mT @ key).softmax(-1).max().item()


def _hypotheses(module: nn.Module, pattern: Pattern) -> Iterator[dict[str, Any]]:
    if pattern.query is None:
        yield from ({"variant": variant} for variant in ("official", "paper"))
        return
    width = _projections(module, pattern)[0].out_channels
    yield from ({"scale": scale} for scale in dict.fromkeys((1.0, width**-0.5)))


def _results(forward: Any, module: nn.Module, x: Tensor) -> list[Tensor]:
    """Output, and gradients of the input and of all parameters."""
    x = x.clone().requires_grad_(True)
    out = forward(x)
    if not isinstance(out, Tensor):
        raise TypeError(f"it returns {type(out).__name__}, not one tensor")
    if out.shape != x.shape:
        raise TypeError(f"it turns {list(x.shape)} into {list(out.shape)}")
    weights = torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view_as(out).cos()
    inputs = [x, *module.parameters()]
    gradients = torch.autograd.grad((out * weights).sum(), inputs, allow_unused=True)
    return [out.detach(), *(torch.zeros_like(a) if g is None else g for a, g in zip(inputs, gradients, strict=True))]


def _difference(results: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    """The largest, each relative to the largest number in its tensor; the bias of keys has the gradient 0."""
    scale = max(tensor.abs().max().item() for tensor in expected)
    return max(
        ((one - other).abs().max() / max(other.abs().max().item(), 1e-6 * scale)).item()
        for one, other in zip(results, expected, strict=True)
    )
