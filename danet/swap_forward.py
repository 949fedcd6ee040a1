"""The forward of a swapped module. Nothing else of it changes: parameters, names, hooks and mode are its own."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._C._functorch import is_functorch_wrapped_tensor
from torch.utils.hooks import RemovableHandle

from danet_kernels import channel_attention, position_attention

from .swap_patterns import Pattern, projections, scalar

_ALIGNMENT = 16  # elements: rows of the folded buffer begin on 16 bytes, which tensor cores and TMA want, in any dtype


@dataclass
class Swap:
    """What a swapped module computes.

    Attributes:
        options: variant, or scale, of the operation.
        own_precision: the module keeps autocast out, so the operation does.
        fold: query, key and value come from one product.
        cls: the class of the module before.
    """

    pattern: Pattern
    backend: str
    options: dict[str, Any] = field(default_factory=dict)
    own_precision: bool = False
    fold: bool = False
    cls: Any = None
    folded_from: tuple[tuple[int, int], ...] = ()  # the tensors that were folded, and their versions
    refold: RemovableHandle | None = None  # of the hook that folds again after load_state_dict


class Swapped(nn.Module):
    """Comes before the class of a swapped module, so that copies of the module, as DataParallel makes, work too."""

    def forward(self, *inputs: Any, **options: Any) -> Any:  # [B, C, H, W] -> [B, C, H, W]
        swap = vars(self).get("danet_swap")
        if swap is None or len(inputs) != 1 or options:  # a new module of this class; more than one tensor
            return super().forward(*inputs, **options)
        if swap.fold and self.training:
            raise RuntimeError("the projections were folded for inference: danet.unswap(model) before you train it")
        return attention(self, inputs[0], swap)

    def __reduce_ex__(self, protocol: Any) -> Any:  # pickle does not find the class by its name
        swap = vars(self).get("danet_swap")
        reduced = super().__reduce_ex__(max(2, protocol))
        return reduced if swap is None else (_restored, (swap.cls,), *reduced[2:])


def attention(module: nn.Module, x: Tensor, swap: Swap) -> Tensor:
    """The operation with the parameters of `module`, which need not be swapped. x [B, C, H, W] -> [B, C, H, W].

    Where autocast makes less of the projections than x has, x is added as it is, so that at gamma = 0 it comes back.
    """
    gamma = scalar(module, swap.pattern).reshape(1)
    casts = _autocasts(x) and x.dtype not in (torch.float64, torch.get_autocast_dtype(x.device.type))
    guard = torch.autocast(x.device.type, enabled=False) if casts and swap.own_precision else nullcontext()
    apart = casts and not swap.own_precision  # whether x is added afterwards
    with guard:
        if swap.pattern.query is None:
            out = channel_attention(x, gamma, residual=not apart, backend=swap.backend, **swap.options)
        else:
            query, key, value = _projected(module, x, swap)
            residual = None if apart else x
            out = position_attention(query, key, value, residual, gamma, backend=swap.backend, **swap.options)
    return out + x if apart else out


def is_swapped(module: nn.Module) -> bool:
    return isinstance(module, Swapped) and "danet_swap" in vars(module)


@cache
def swapped_class(cls: Any) -> Any:
    """`cls` with the fused forward before its own. Raises whatever the class raises about classes made of it."""
    return type(cls.__name__, (Swapped, cls), {"__module__": cls.__module__, "__qualname__": cls.__qualname__})


def put(module: nn.Module, swap: Swap) -> None:
    """Swap one module."""
    swap.cls = type(module)
    module.__class__ = swapped_class(swap.cls)
    module.danet_swap = swap  # type: ignore[assignment]
    if swap.fold:
        fold(module, swap)
        swap.refold = module.register_load_state_dict_post_hook(_fold_again)


def take(module: nn.Module) -> None:
    """Undo `put`. RuntimeError if something has changed the class of the module since."""
    swap: Swap = module.danet_swap  # type: ignore[assignment]
    if type(module) is not swapped_class(swap.cls):
        raise RuntimeError(f"unswap: the class of a {swap.cls.__name__} was changed after the swap: undo that first")
    if swap.refold is not None:
        swap.refold.remove()
        del module.danet_folded_weight, module.danet_folded_bias
    del module.danet_swap
    module.__class__ = swap.cls


def fold(module: nn.Module, swap: Swap) -> None:
    """Put the three projections into one, in buffers that no state_dict holds: [2 D + C, C] and [2 D + C, 1]."""
    parts = projections(module, swap.pattern)
    with torch.no_grad():
        weight = torch.cat([part.weight.flatten(1) for part in parts])
        bias = torch.cat([weight.new_zeros(len(part.weight)) if part.bias is None else part.bias for part in parts])
    module.register_buffer("danet_folded_weight", weight, persistent=False)
    module.register_buffer("danet_folded_bias", bias[:, None], persistent=False)
    swap.folded_from = _versions(parts)


def _fold_again(module: nn.Module, incompatible_keys: Any) -> None:
    fold(module, module.danet_swap)  # type: ignore[arg-type]


def _versions(parts: list[nn.Conv2d]) -> tuple[tuple[int, int], ...]:
    """What tells whether the weights are still those that were folded."""
    tensors = [tensor for part in parts for tensor in (part.weight, part.bias) if tensor is not None]
    return tuple((id(tensor), -1 if tensor.is_inference() else tensor._version) for tensor in tensors)


def _projected(module: nn.Module, x: Tensor, swap: Swap) -> tuple[Tensor, ...]:
    """Query and key [B, D, H, W], value [B, C, H, W].

    The folded product hands no gradients to the parameters, so where autograd records, and where a weight is another
    than was folded, the projections run one by one.
    """
    parts = projections(module, swap.pattern)
    records = torch.is_grad_enabled() and (x.requires_grad or any(one.requires_grad for one in module.parameters()))
    if swap.fold and not records and (torch.compiler.is_compiling() or swap.folded_from == _versions(parts)):
        return tuple(part.unflatten(2, x.shape[2:]) for part in _folded(module, x, swap.pattern))
    return tuple(part(x) for part in parts)


def _folded(module: nn.Module, x: Tensor, pattern: Pattern) -> tuple[Tensor, ...]:
    """Query and key [B, D, N], value [B, C, N]: views of one product. Contiguous rows begin aligned for any N."""
    weight: Tensor = module.danet_folded_weight  # type: ignore[assignment]
    bias: Tensor = module.danet_folded_bias  # type: ignore[assignment]
    if _autocasts(x) and x.dtype != torch.float64:
        x, weight, bias = (tensor.to(torch.get_autocast_dtype(x.device.type)) for tensor in (x, weight, bias))
    batch, channels, positions = x.shape[0], len(weight), x.shape[2] * x.shape[3]
    if x.stride(1) == 1 and x.shape[1] > 1:  # channels_last
        product = F.linear(x.permute(0, 2, 3, 1), weight, bias[:, 0]).flatten(1, 2).mT  # [B, 2 D + C, N]
    else:
        factors = bias, weight.expand(batch, -1, -1), x.flatten(2)
        if torch.compiler.is_compiling() or x.is_meta or is_functorch_wrapped_tensor(x):
            product = torch.baddbmm(*factors)
        else:
            row = -(-positions // _ALIGNMENT) * _ALIGNMENT
            product = x.new_empty(batch, channels, row)[..., :positions]
            torch.baddbmm(*factors, out=product)
    return product.split([part.out_channels for part in projections(module, pattern)], 1)


def _autocasts(x: Tensor) -> bool:
    """Whether autocast casts on this tensor's device (torch raises when asked about some devices, as meta)."""
    return x.device.type in ("cpu", "cuda") and torch.is_autocast_enabled(x.device.type)


def _restored(cls: Any) -> Any:
    swapped = swapped_class(cls)
    return swapped.__new__(swapped)
