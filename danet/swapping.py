"""Fused attention in a network that somebody else has written: its attention modules keep everything but their forward.

Position and channel attention are found by their classes, by the names of their classes and by their parts: three 1x1
convolutions and a scalar, or a scalar alone. What decides is none of these: a module is swapped only if the fused
operation gives its outputs and gradients.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from .swap_find import Found, find_attention, unused_hooks
from .swap_forward import Swap, Swapped, put, take
from .swap_patterns import Pattern, register_pattern
from .swap_report import SwapReport, estimate_savings
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
    go on. Hooks on parts that are not called any more, such as a softmax, are named in the report.

    Args:
        model: any network.
        verify: compare outputs and gradients of each module, on a copy in fp64 on the CPU, and leave it alone if they
            disagree. Without it only the very classes that are known or registered are swapped, and signs of channel
            attention and scales of logits are taken to be the authors'.
        backend: as danet_kernels.position_attention.
        dry_run: whether to compare and report only.
        fold: for inference: make query, key and value by one matrix product, into rows that begin aligned whatever the
            width of the image. The weights are merged now and by load_state_dict; where autograd records, the
            projections run one by one as before.
        crop: height and width in pixels of the image for which the report says what is saved; None: it does not.

    Returns:
        The report: each module that looks like attention, and why it was left alone if so.

    Raises:
        ValueError: the network is compiled or scripted, so that its modules are not what runs; or fold while it trains.
    """
    _check(model, fold)
    found = find_attention(model)
    swaps: list[tuple[Found, Swap]] = []
    for one in found:
        options: dict[str, Any] | None = {} if not verify and one.by == "class" else None
        if verify and one.patterns:
            options = verified(one, fold_too=fold)
        elif one.patterns and options is None:
            one.detail = f"recognised by its {one.by} only, which needs verify=True"
        if options is None:
            continue
        folds = fold and one.op == "position_attention"
        swaps.append((one, Swap(one.patterns[0], backend, options, fold=folds)))
        details = [f"{name}={value}" for name, value in options.items()] + ["folded"] * folds
        lost = unused_hooks(one.module, one.patterns[0], fold=folds)
        if lost:
            details.append(f"hooks that are not called any more: {', '.join(lost)}")
        one.detail, one.agrees = "; ".join(details), True
    found = [one for one in found if one.agrees or one.by != "parts" or one.op == "position_attention"]
    unknown = "" if crop is None else estimate_savings(model, found, crop, backend)
    for one, how in [] if dry_run else swaps:
        put(one.module, how)
        one.swapped = True
    return SwapReport(found, crop, unknown)


def unswap(model: nn.Module) -> int:
    """Restore what swap has replaced. Returns the number of modules."""
    swapped = [module for module in model.modules() if isinstance(module, Swapped)]
    for module in swapped:
        take(module)
    return len(swapped)


def _check(model: nn.Module, fold: bool) -> None:
    for path, module in model.named_modules():
        name = path or "the network"
        if hasattr(module, "_orig_mod") or getattr(module, "_compiled_call_impl", None) is not None:
            raise ValueError(f"swap: {name} is compiled; swap first, then call torch.compile")
        if isinstance(module, torch.jit.ScriptModule):
            raise ValueError(f"swap: {name} is scripted; swap the module that it was made from")
    if fold and model.training:
        raise ValueError("swap: fold=True is for inference, and the network is in training mode; call eval() first")
