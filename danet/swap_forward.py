"""The forward of a swapped module. Nothing else of it changes: parameters, names, hooks and mode are its own."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from danet_kernels import channel_attention, position_attention

from .swap_patterns import Pattern, projections, scalar

_ALIGNMENT = 16  # elements: rows of the folded buffer begin on 16 bytes, which tensor cores and TMA want, in any dtype


@dataclass
class Swap:
    """What a swapped module computes."""

    pattern: Pattern
    backend: str
    options: dict[str, Any] = field(default_factory=dict)  # variant, or scale
    fold: bool = False
    forward: Callable[..., Any] | None = None  # that stood on the instance before; None: the class has it
    refold: RemovableHandle | None = None  # of the hook that folds again after load_state_dict


class Swapped(nn.Module):
    """Comes before the class of a swapped module, so that copies of the module, as DataParallel makes, work too."""

    danet_swap: Swap

    def forward(self, x: Tensor) -> Tensor:  # [B, C, H, W] -> [B, C, H, W]
        swap = self.danet_swap
        if swap.fold and self.training:
            raise RuntimeError("the projections were folded for inference: danet.unswap(model) before you train it")
        return attention(self, x, swap)

    def __reduce_ex__(self, protocol: Any) -> Any:  # pickle does not find the class by its name
        return _restored, (type(self).__bases__[1],), self.__dict__


def attention(module: nn.Module, x: Tensor, swap: Swap) -> Tensor:
    """The operation with the parameters of `module`, which need not be swapped."""
    gamma = scalar(module, swap.pattern).reshape(1)
    if swap.pattern.query is None:
        return channel_attention(x, gamma, backend=swap.backend, **swap.options)
    if swap.fold and not _records_gradients(module, x):
        query, key, value = (part.unflatten(2, x.shape[2:]) for part in _folded(module, x, swap.pattern))
    else:
        query, key, value = (projection(x) for projection in projections(module, swap.pattern))
    return position_attention(query, key, value, x, gamma, backend=swap.backend, **swap.options)


def put(module: nn.Module, swap: Swap) -> None:
    """Swap one module."""
    swap.forward = vars(module).pop("forward", None)
    module.__class__ = _class(type(module))  # type: ignore[arg-type]
    module.danet_swap = swap  # type: ignore[assignment]
    if swap.fold:
        fold(module, swap.pattern)
        swap.refold = module.register_load_state_dict_post_hook(_fold_again)


def take(module: Swapped) -> None:
    """Undo `put`."""
    swap = module.danet_swap
    if swap.refold is not None:
        swap.refold.remove()
        del module.danet_folded_weight, module.danet_folded_bias
    del module.danet_swap
    module.__class__ = type(module).__bases__[1]
    if swap.forward is not None:
        module.forward = swap.forward  # type: ignore[method-assign]


def fold(module: nn.Module, pattern: Pattern) -> None:
    """Put the three projections into one, in buffers that no state_dict holds: [2 D + C, C] and [2 D + C, 1]."""
    parts = projections(module, pattern)
    with torch.no_grad():
        weight = torch.cat([part.weight.flatten(1) for part in parts])
        bias = torch.cat([weight.new_zeros(len(part.weight)) if part.bias is None else part.bias for part in parts])
    module.register_buffer("danet_folded_weight", weight, persistent=False)
    module.register_buffer("danet_folded_bias", bias[:, None], persistent=False)


def _fold_again(module: nn.Module, incompatible_keys: Any) -> None:
    fold(module, module.danet_swap.pattern)  # type: ignore[union-attr, arg-type]


def _folded(module: nn.Module, x: Tensor, pattern: Pattern) -> tuple[Tensor, ...]:
    """Query and key [B, D, N], value [B, C, N]: views of one product with rows that begin aligned for any N."""
    weight: Tensor = module.danet_folded_weight  # type: ignore[assignment]
    bias: Tensor = module.danet_folded_bias  # type: ignore[assignment]
    if torch.is_autocast_enabled(x.device.type):
        x, weight, bias = (tensor.to(torch.get_autocast_dtype(x.device.type)) for tensor in (x, weight, bias))
    batch, channels, positions = x.shape[0], len(weight), x.shape[2] * x.shape[3]
    if x.stride(1) == 1 and x.shape[1] > 1:  # channels_last
        product = F.linear(x.permute(0, 2, 3, 1), weight, bias[:, 0]).flatten(1, 2).mT  # [B, 2 D + C, N]
    else:
        factors = bias, weight.expand(batch, -1, -1), x.flatten(2)
        if torch.compiler.is_compiling():
            product = torch.baddbmm(*factors)
        else:
            row = -(-positions // _ALIGNMENT) * _ALIGNMENT
            product = x.new_empty(batch, channels, row)[..., :positions]
            torch.baddbmm(*factors, out=product)
    widths = [part.out_channels for part in projections(module, pattern)]
    return product.split(widths, 1)


def _records_gradients(module: nn.Module, x: Tensor) -> bool:
    """Whether autograd wants gradients, which the folded product does not hand to the parameters."""
    return torch.is_grad_enabled() and (x.requires_grad or any(part.requires_grad for part in module.parameters()))


@cache
def _class(cls: Any) -> Any:
    return type(cls.__name__, (Swapped, cls), {"__module__": cls.__module__, "__qualname__": cls.__qualname__})


def _restored(cls: Any) -> Any:
    swapped = _class(cls)
    return swapped.__new__(swapped)
