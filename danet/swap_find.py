"""Finding position and channel attention in a network: by class, by the name of the class, by its parts.

Nothing here decides that a module computes attention; swap_verify.py does. This tells where it is worth a try, and what
modules that look like attention are instead.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import permutations
from typing import Any

from torch import nn
from torch.nn.parameter import is_lazy

from .swap_forward import Swapped
from .swap_patterns import LOOK_ALIKES, PATTERNS, Pattern, projections, scalar

_NAMES_OF_CHANNELS = ("chanel_in", "channel_in", "in_channels", "in_dim", "channels")


@dataclass
class Found:
    """One module of a network that is attention, or looks like it."""

    path: str  # in the network, "" for the network itself; of a shared module the first
    class_name: str
    patterns: list[Pattern]  # that its parts fit, to be tried in turn; none for a look-alike
    module: nn.Module = field(repr=False)
    by: str  # what it was recognised by: "class", "name", "parts"
    swapped: bool = False
    detail: str = ""  # the variant or scale that agrees, or why the module is left alone
    agrees: bool = False  # whether swap takes it to be the operation
    error: float | None = None  # smallest difference to one of the variants, relative
    shape: tuple[int, ...] | None = None  # [B, C, h, w] of its input for an image of the report's size
    saved: tuple[int, int] | None = None  # bytes for that image: forward alone, forward and backward

    @property
    def op(self) -> str:
        """The operation that it may be; "" for a look-alike."""
        return self.patterns[0].op if self.patterns else ""

    @property
    def widths(self) -> tuple[int | None, int | None]:
        """Channels C of value and D of query; None for what is not known, and D of channel attention."""
        if self.op == "position_attention":
            query, _, value = projections(self.module, self.patterns[0])
            return value.out_channels, query.out_channels
        if self.shape is not None:
            return self.shape[1], None
        numbers = (getattr(self.module, name, None) for name in _NAMES_OF_CHANNELS)
        return next((number for number in numbers if isinstance(number, int) and number > 0), None), None


def find_attention(model: nn.Module) -> list[Found]:
    """The modules of a network that swap would try, and what it would take for look-alikes; nothing is changed.

    Those already swapped, and this package's own, are left out. Modules of unknown classes that hold a scalar and no
    other parameter are among the found: few are channel attention.
    """
    found: list[Found] = []
    for path, module in model.named_modules():
        if any(isinstance(part, Swapped) or type(part).__module__ == "danet.attention" for part in module.modules()):
            continue
        one = _recognised(path, module)
        if one is None:
            continue
        if one.by == "parts" and one.op == "channel_attention" and any(_holds(other, module) for other in found):
            continue  # the scalar of one
        found.append(one)
    return found


def unused_hooks(module: nn.Module, pattern: Pattern) -> list[str]:
    """Names of the parts that have hooks and are not called any more once the module is swapped."""
    kept = [] if pattern.query is None else projections(module, pattern)
    called = {part for projection in kept for part in projection.modules()} | {module}
    return [path for path, part in module.named_modules() if part not in called and has_hooks(part)]


def has_hooks(module: nn.Module) -> bool:
    names = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return any(getattr(module, name, None) for name in names)


def copy_without_hooks(module: nn.Module, instead: Mapping[int, object] | None = None) -> Any:
    """A deep copy with the hooks that make the weights (torch.nn.utils) alone; `instead` is put for these ids."""
    memo = dict(instead or {})
    for part in module.modules():
        for name, value in vars(part).items():
            if "_hooks" in name and isinstance(value, dict):
                own = {key: hook for key, hook in value.items() if type(hook).__module__.startswith("torch.nn.utils")}
                memo[id(value)] = type(value)(own)
    return copy.deepcopy(module, memo)


def _holds(one: Found, module: nn.Module) -> bool:
    """Whether `module` is a part of attention that is known for more than one scalar."""
    certain = one.patterns and (one.by != "parts" or one.op == "position_attention")
    return bool(certain) and any(part is module for part in one.module.modules())


def _recognised(path: str, module: nn.Module) -> Found | None:
    cls = type(module)
    by_parts = _by_parts(module)
    lacks = ""
    for by, means in (("class", Pattern.has_class), ("name", Pattern.has_name)):
        meant = [pattern for pattern in PATTERNS if means(pattern, cls)]
        missing = [_lacks(module, pattern) for pattern in meant]
        fitting = [pattern for pattern, lack in zip(meant, missing, strict=True) if not lack]
        if fitting:
            return Found(
                path, cls.__name__, fitting[:1] + [one for one in by_parts if one.op == fitting[0].op], module, by
            )
        lacks = lacks or next(iter(missing), "")
    if by_parts:
        return Found(path, cls.__name__, by_parts, module, "parts")
    if cls.__name__ in LOOK_ALIKES:
        return Found(path, cls.__name__, [], module, "name", detail=LOOK_ALIKES[cls.__name__])
    if lacks:
        return Found(path, cls.__name__, [], module, "name", detail=f"called like attention of DANet, but {lacks}")
    return None


def _by_parts(module: nn.Module) -> list[Pattern]:
    """Patterns for a module of an unknown class, out of its own parameters and projections."""
    parameters = dict(module.named_parameters())
    if type(module).__module__.startswith("torch.nn.") or any(map(is_lazy, parameters.values())):
        return []
    scalars = [name for name, parameter in parameters.items() if parameter.numel() == 1]
    if len(scalars) != 1:
        return []
    others = {name.rpartition(".")[0] for name in parameters if name != scalars[0]}
    if not others:
        return [Pattern((), scalars[0])]
    if len(others) != 3 or not others <= {name for name, _ in module.named_children()}:
        return []
    in_turn = [name for name, _ in module.named_children() if name in others]  # query, key, value more often than not
    patterns = [Pattern((), scalars[0], *names) for names in permutations(in_turn)]
    return [pattern for pattern in patterns if not _lacks(module, pattern)]


def _lacks(module: nn.Module, pattern: Pattern) -> str:
    """What of the pattern the module does not have, "" if it has all."""
    try:
        gamma = scalar(module, pattern)
        parts = [] if pattern.query is None else projections(module, pattern)
    except AttributeError as error:
        return f"it has no {error.name or error}"
    if is_lazy(gamma) or gamma.numel() != 1:
        return f"its {pattern.scalar} is no scalar"
    if not parts:
        return "it has more parameters than a scalar" if sum(1 for _ in module.parameters()) > 1 else ""
    if not all(map(_is_projection, parts)):
        return f"{pattern.query}, {pattern.key} and {pattern.value} are not all 1x1 convolutions"
    query, key, value = parts
    alike = query.in_channels == key.in_channels == value.in_channels == value.out_channels
    if not alike or query.out_channels != key.out_channels:
        return "the widths of its projections do not fit"
    return ""


def _is_projection(module: nn.Module) -> bool:
    return (
        isinstance(module, nn.Conv2d)
        and module.kernel_size == (1, 1)
        and module.stride == (1, 1)
        and module.padding in ((0, 0), "same", "valid")
        and module.groups == 1
        and not any(map(is_lazy, module.parameters()))
    )
