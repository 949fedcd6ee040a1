"""Finding position and channel attention in a network: by class, by the name of the class, by its parts.

Nothing here decides that a module computes attention; swap_verify.py does. This tells where it is worth a try, and what
modules that look like attention are instead.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import permutations

from torch import nn

from .swap_forward import Swapped
from .swap_patterns import LOOK_ALIKES, PATTERNS, Pattern, projections, scalar


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
    error: float | None = None  # largest relative difference found by the comparison
    shape: tuple[int, ...] | None = None  # [B, C, h, w] of its input for an image of the report's size
    saved: tuple[int, int] | None = None  # bytes for that image: forward alone, forward and backward

    @property
    def op(self) -> str:
        """The operation that it may be; "" for a look-alike."""
        return self.patterns[0].op if self.patterns else ""

    @property
    def widths(self) -> tuple[int | None, int | None]:
        """Channels C of value and D of query; of channel attention C alone, where `shape` is known."""
        if self.op == "position_attention":
            query, _, value = projections(self.module, self.patterns[0])
            return value.out_channels, query.out_channels
        return None if self.shape is None else self.shape[1], None


def find_attention(model: nn.Module) -> list[Found]:
    """The modules of a network that swap would try, and what it would take for look-alikes; nothing is changed.

    Those already swapped, and this package's own, are left out. Modules of unknown classes that hold a scalar and no
    other parameter are among the found: few are channel attention.
    """
    found: list[Found] = []
    for path, module in model.named_modules():
        if isinstance(module, Swapped) or type(module).__module__ == "danet.attention":
            continue
        if any(module in one.module.modules() for one in found):
            continue  # a part of one
        one = _recognised(path, module)
        if one is not None:
            found.append(one)
    return found


def unused_hooks(module: nn.Module, pattern: Pattern, *, fold: bool) -> list[str]:
    """Names of the parts that have hooks and are not called any more once the module is swapped."""
    kept = [] if pattern.query is None or fold else projections(module, pattern)
    called = {part for projection in kept for part in projection.modules()} | {module}
    names = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return [
        path
        for path, part in module.named_modules()
        if part not in called and any(getattr(part, name, None) for name in names)
    ]


def _recognised(path: str, module: nn.Module) -> Found | None:
    cls = type(module)
    for by, means in (("class", Pattern.has_class), ("name", Pattern.has_name)):
        fitting = [pattern for pattern in PATTERNS if means(pattern, cls) and _has(module, pattern)]
        if fitting:
            return Found(path, cls.__name__, fitting[:1], module, by)
    fitting = _by_parts(module)
    if fitting:
        return Found(path, cls.__name__, fitting, module, "parts")
    if cls.__name__ in LOOK_ALIKES:
        return Found(path, cls.__name__, [], module, "name", detail=LOOK_ALIKES[cls.__name__])
    if any(pattern.has_name(cls) for pattern in PATTERNS):
        detail = "called like attention of DANet, but its parts are not one scalar and three 1x1 convolutions or none"
        return Found(path, cls.__name__, [], module, "name", detail=detail)
    return None


def _by_parts(module: nn.Module) -> list[Pattern]:
    """Patterns for a module of an unknown class, out of its own parameters and projections."""
    scalars = [name for name, parameter in module.named_parameters() if parameter.numel() == 1]
    if len(scalars) != 1 or type(module).__module__.startswith("torch.nn."):
        return []
    others = {name.rpartition(".")[0] for name, _ in module.named_parameters() if name != scalars[0]}
    if not others:
        return [Pattern((), scalars[0])]
    if len(others) != 3 or not others <= {name for name, _ in module.named_children()}:
        return []
    in_turn = [name for name, _ in module.named_children() if name in others]  # query, key, value more often than not
    return [pattern for names in permutations(in_turn) if _has(module, pattern := Pattern((), scalars[0], *names))]


def _has(module: nn.Module, pattern: Pattern) -> bool:
    try:
        if scalar(module, pattern).numel() != 1:
            return False
        if pattern.query is None:
            return sum(1 for _ in module.parameters()) == 1
        query, key, value = projections(module, pattern)
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
