"""The gate in front of every speed figure: the result of the timed call itself against fp64, by the error rule.

Rows of the map are sampled: queries for position attention, which costs O(P * N) where the whole map would cost
gigabytes, and channels for channel attention, unless its gradient is wanted, which depends on every row.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from benchmarks.implementations import Attention, Block
from danet_kernels._error_rule import OUT_FACTOR, Yardstick, as_operand, judge, yardsticks

SAMPLED_ROWS = 64  # P
_NAMES = {
    "position_attention": ("query", "key", "value", "residual", "gamma"),
    "channel_attention": ("x", "gamma"),
}
_AT_QUERIES = ("query", "residual")  # operands with one column per query


@dataclass(frozen=True)
class Error:
    largest: float  # largest absolute error of the output
    share: float  # the worst error as a part of what the rule allows, gradients included
    relative: float = 0.0  # the worst Frobenius error by the norm of the exact result, gamma's gradient left out

    @property
    def passes(self) -> bool:
        return self.share <= 1.0  # false for NaN


class Gate:
    """What one block should return, and how far an ideal kernel is from it."""

    def __init__(self, block: Block, operands: Sequence[Tensor] | None = None) -> None:
        """operands: those that the attention gets, where they are not to be computed again."""
        self.block = block
        with torch.no_grad():
            operands = [operand.detach() for operand in operands or block.operands()]
        self.inputs: dict[str, Tensor] = dict(zip(_NAMES[block.op], operands, strict=True))
        channels, positions = block.features.flatten(2).shape[1:]
        rows = positions if block.op == "position_attention" else channels
        points = torch.linspace(0, rows - 1, min(SAMPLED_ROWS, rows), dtype=torch.float64)
        self.points = points.round().long().to(block.features.device)  # [P], first and last row among them
        if block.op == "channel_attention" and not block.train:
            self.yardsticks = {"out": _channel_yardstick(*map(_flat, operands), self.points)}
            return
        expected = {
            name: self._sample(tensor) if name in _AT_QUERIES else _flat(tensor) for name, tensor in self.inputs.items()
        }
        self.yardsticks = yardsticks(block.op, expected, None if block.dout is None else self._sample(block.dout))

    def _sample(self, tensor: Tensor) -> Tensor:
        """The part of [B, C, H, W] that is compared: [B, C, P], [B, P, N], or all of it."""
        if self.block.op == "position_attention":
            return _flat(tensor)[..., self.points]
        return _flat(tensor) if self.block.train else _flat(tensor)[:, self.points]

    def _yardstick(self, name: str, tensor_cores: bool) -> Yardstick:
        found = self.yardsticks[name]
        return found.for_tensor_cores() if tensor_cores else found

    def check_output(self, out: Tensor, *, tensor_cores: bool = False) -> Error:
        """The error of the block's output [B, C, H, W]; tensor_cores: of a kernel that multiplies on them."""
        got, yardstick = self._sample(out.detach()), self._yardstick("out", tensor_cores)
        largest = float((got.double() - yardstick.exact).abs().max())
        return Error(largest, _share(got, yardstick), _relative(got, yardstick))

    def check(self, out: Tensor, attention: Attention, *, tensor_cores: bool = False) -> Error:
        """The error of the block's output [B, C, H, W]; when training also that of a backward pass of `attention`.

        For position attention that pass has a dout that is zero but at the sampled queries: then the whole of dkey and
        dvalue, sums over all queries, can be compared without the N x N map, and dquery must be zero elsewhere.
        """
        error = self.check_output(out, tensor_cores=tensor_cores)
        if self.block.dout is None:
            return error
        shares, relatives = [error.share], [error.relative]
        leaves = {name: tensor.clone().requires_grad_() for name, tensor in self.inputs.items()}
        mask = torch.zeros(self.block.dout.shape[2:].numel(), device=self.points.device)
        mask[self.points if self.block.op == "position_attention" else slice(None)] = 1
        dout = self.block.dout * mask.view(self.block.dout.shape[2:]).to(self.block.dout.dtype)
        gradients = torch.autograd.grad(attention(*leaves.values()), list(leaves.values()), dout)
        for name, gradient in zip(leaves, gradients, strict=True):
            if name in _AT_QUERIES:
                shares.append(math.inf if (_flat(gradient) * (1 - mask)).any() else 0.0)
                gradient = self._sample(gradient)
            yardstick = self._yardstick(f"d{name}", tensor_cores)
            shares.append(_share(_flat(gradient), yardstick))
            if name != "gamma":  # one number, whose terms may cancel
                relatives.append(_relative(_flat(gradient), yardstick))
        return Error(error.largest, _worst(shares), _worst(relatives))


def _channel_yardstick(x: Tensor, gamma: Tensor, points: Tensor) -> Yardstick:
    """Channel attention at P of its C channels; the ideal is computed with the positions in either order."""

    def rows(flat: Tensor, operand: Callable[[Tensor], Tensor] = lambda tensor: tensor) -> Tensor:  # [B, C, N]
        chosen = flat[:, points]  # [B, P, N]
        gram = operand(chosen) @ operand(flat).transpose(1, 2)  # [B, P, C]
        probabilities = torch.softmax(gram.amax(dim=-1, keepdim=True) - gram, dim=-1)
        return gamma.to(flat.dtype) * (operand(probabilities) @ operand(flat)) + chosen

    def errors(*ideals: Tensor) -> tuple[float, float]:
        found = [ideal.to(x.dtype).double() - exact for ideal in ideals]
        return max(float(error.abs().max()) for error in found), max(float(error.norm()) for error in found)

    exact = rows(x.double())
    rounded = errors(rows(x.float(), partial(as_operand, dtype=x.dtype)))
    plain = errors(rows(x.float()), rows(x.float().flip(2)).flip(2))
    return Yardstick(exact, x.dtype, *plain, OUT_FACTOR, rounded)


def _flat(tensor: Tensor) -> Tensor:
    return tensor.flatten(2) if tensor.dim() > 2 else tensor


def _worst(values: list[float]) -> float:
    return math.nan if any(map(math.isnan, values)) else max(values)


def _relative(got: Tensor, yardstick: Yardstick) -> float:
    """Frobenius norm of the error by that of the exact result."""
    return float((got.double() - yardstick.exact).norm() / yardstick.exact.norm())


def _share(got: Tensor, yardstick: Yardstick) -> float:
    """The error as a part of what the rule allows, NaN if there is a NaN."""
    verdict = judge(got, yardstick)
    if verdict.complaint is not None:
        return math.inf
    pairs = ((verdict.error, verdict.allowed), (verdict.frobenius, verdict.frobenius_allowed))
    shares = [error / allowed if allowed else math.inf if error else 0.0 for error, allowed in pairs]
    return _worst(shares)
