"""Fused attention in a network that somebody else has written: its attention modules keep everything but their forward.

Position and channel attention are found by their classes, by the names of their classes and by their parts: three 1x1
convolutions and a scalar, or a scalar alone. What decides is none of these: a module is swapped only if the fused
operation gives its outputs and gradients.
"""

from __future__ import annotations

import torch
from torch import nn

from danet_kernels import use_backend

from .swap_find import Found, find_attention, has_hooks, unused_hooks
from .swap_forward import Swap, is_swapped, put, swapped_class, take
from .swap_patterns import Pattern, projections, register_pattern
from .swap_report import SwapReport, estimate_savings, find_shapes
from .swap_verify import verify as verified

__all__ = ["Found", "Pattern", "SwapReport", "find_attention", "register_pattern", "swap", "unswap"]


def swap(
    model: nn.Module,
    *,
    verify: bool = True,
    backend: str = "auto",
    dry_run: bool = False,
    fold: bool = False,
    crop: tuple[int, int] | None = (1024, 2048),
) -> SwapReport:
    """Give the attention modules of a network the fused operations, in place.

    Parameters, their names, hooks, devices, dtypes and the mode stay what they are, so that optimizers and checkpoints
    go on. The class of a swapped module becomes one derived from its own. Hooks on parts that are not called any more,
    such as a softmax, are named in the report.

    Args:
        model: any network.
        verify: compare outputs and gradients of each module, on a copy in fp64 on the CPU, and leave it alone if they
            disagree. Without it only the very classes that are known or registered are swapped, and signs of channel
            attention and scales of logits are taken to be the authors'.
        backend: as danet_kernels.position_attention.
        dry_run: whether to compare and report only.
        fold: for inference: make query, key and value by one matrix product, into rows that begin aligned whatever the
            width of the image. The weights are merged now and by load_state_dict; where autograd records, and after
            other changes of the weights, the projections run one by one as before.
        crop: height and width in pixels of the image for which the report says what is saved; None: it does not.

    Returns:
        The report: each module that looks like attention, and why it was left alone if so.

    Raises:
        TypeError, ValueError: the network is compiled or scripted, so that its modules are not what runs; a backend
            that there is not; a crop that is no size; or fold while an attention module is in training mode.
    """
    _check(model, backend, crop)
    found = find_attention(model)
    training = [one.path for one in found if one.op == "position_attention" and one.module.training]
    if fold and training:
        name = training[0] or "the network"
        raise ValueError(f"swap: fold=True is for inference, and {name} is in training mode; call eval() first")
    already = sum(map(is_swapped, model.modules()))
    unknown = "" if crop is None else find_shapes(model, found, crop)
    swaps: list[tuple[Found, Swap]] = []
    for one in reversed(found):  # parts before what they are in
        if _holds(one, swaps):
            continue
        how = _how(one, verify, fold) if one.patterns else None
        if how is not None:
            how.backend = backend
            swaps.insert(0, (one, how))
    found = [one for one in found if not _holds(one, swaps) and _worth_a_line(one)]
    if crop is not None:
        estimate_savings(found, crop, backend)
    for one, how in [] if dry_run else swaps:
        put(one.module, how)
        one.swapped = True
    return SwapReport(found, crop, unknown, already)


def unswap(model: nn.Module) -> int:
    """Restore what swap has replaced. Returns the number of modules.

    Raises RuntimeError if something else has changed the class of one of them since.
    """
    swapped = [module for module in model.modules() if is_swapped(module)]
    for module in swapped:
        take(module)
    return len(swapped)


def _how(one: Found, verify: bool, fold: bool) -> Swap | None:
    """How the module is to be swapped; None, with the reason in `one`, if not at all."""
    if "forward" in vars(one.module):
        one.detail = "its forward was put on the instance, by a wrapper perhaps: swap before that"
        return None
    if not verify and one.by != "class":
        one.detail = f"recognised by its {one.by} only, which needs verify=True"
        return None
    try:
        swapped_class(type(one.module))  # type: ignore[arg-type]
    except Exception as error:  # the class's own
        one.detail = f"its class does not let itself be derived from: {error}"
        return None
    swap = verified(one, fold_too=fold) if verify else Swap(one.patterns[0], "auto")
    if swap is None:
        return None
    one.agrees = True
    details = [f"{name}={value if isinstance(value, str) else round(value, 4)}" for name, value in swap.options.items()]
    if fold and swap.pattern.query is not None:
        parts = projections(one.module, swap.pattern)
        swap.fold = not any(has_hooks(part) or list(part.children()) for part in parts)
        details.append("folded" if swap.fold else "not folded, as projections have hooks or make their weights")
    if swap.own_precision:
        details.append("keeps autocast out")
    lost = unused_hooks(one.module, swap.pattern)
    if lost:
        details.append(f"hooks that are not called any more: {', '.join(lost)}")
    one.detail = "; ".join([*details, *filter(None, [one.detail])])
    return swap


def _holds(one: Found, swaps: list[tuple[Found, Swap]]) -> bool:
    """Whether the module has attention inside that was found by itself, and so is none."""
    inside = set(one.module.modules()) - {one.module}
    return any(other.module in inside for other, _ in swaps)


def _worth_a_line(one: Found) -> bool:
    """Not a stray scalar that turned out to be something else."""
    ran = one.error is not None or not one.detail
    return one.agrees or one.by != "parts" or one.op == "position_attention" or not ran


def _check(model: nn.Module, backend: str, crop: tuple[int, int] | None) -> None:
    with use_backend(backend):
        pass  # it raises for names that there are not
    if crop is not None and not (
        isinstance(crop, (tuple, list)) and len(crop) == 2 and all(isinstance(side, int) and side > 0 for side in crop)
    ):
        raise ValueError(f"swap: crop must be (height, width) in pixels or None, got {crop!r}")
    for path, module in model.named_modules():
        name = path or "the network"
        if "_orig_mod" in module._modules or vars(module).get("_compiled_call_impl") is not None:
            raise ValueError(f"swap: {name} is compiled; swap first, then call torch.compile")
        if isinstance(module, torch.jit.ScriptModule):
            raise ValueError(f"swap: {name} is scripted; swap the module that it was made from, and do not script it")
