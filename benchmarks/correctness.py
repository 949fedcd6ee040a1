"""The gate in front of every speed figure: the result of the timed call itself against fp64, by the error rule.

Rows of the map are sampled: queries for position attention, which costs O(P * N) where the whole map would cost
gigabytes, and channels for channel attention, unless its gradient is wanted, which depends on every row.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks.implementations import Attention, Block
from danet_kernels._error_rule import OUT_FACTOR, Yardstick, judge, yardsticks

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

    @property
    def passes(self) -> bool:
        return self.share <= 1.0  # false for NaN


class Gate:
    """What one block should return, and how far an ideal kernel is from it."""

    def __init__(self, block: Block) -> None:
        self.block = block
        with torch.no_grad():
            operands = [operand.detach() for operand in block.operands()]
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

    def check(self, out: Tensor, attention: Attention) -> Error:
        """The error of the block's output [B, C, H, W]; when training also that of a backward pass of `attention`.

        For position attention that pass has a dout that is zero but at the sampled queries: then the whole of dkey and
        dvalue, sums over all queries, can be compared without the N x N map, and dquery must be zero elsewhere.
        """
        got = self._sample(out.detach())
        largest = float((got.double() - self.yardsticks["out"].exact).abs().max())
        shares = [_share(got, self.yardsticks["out"])]
        if self.block.dout is not None:
            leaves = {name: tensor.clone().requires_grad_() for name, tensor in self.inputs.items()}
            mask = torch.zeros(self.block.dout.shape[2:].numel(), device=self.points.device)
            mask[self.points if self.block.op == "position_attention" else slice(None)] = 1
            dout = self.block.dout * mask.view(self.block.dout.shape[2:]).to(self.block.dout.dtype)
            gradients = torch.autograd.grad(attention(*leaves.values()), list(leaves.values()), dout)
            for name, gradient in zip(leaves, gradients, strict=True):
                if name in _AT_QUERIES:
                    shares.append(math.inf if (_flat(gradient) * (1 - mask)).any() else 0.0)
                    gradient = self._sample(gradient)
                shares.append(_share(_flat(gradient), self.yardsticks[f"d{name}"]))
        return Error(largest, math.nan if any(map(math.isnan, shares)) else max(shares))


def _channel_yardstick(x: Tensor, gamma: Tensor, points: Tensor) -> Yardstick:
    """Channel attention at P of its C channels; the ideal is computed with the positions in either order."""

    def rows(flat: Tensor) -> Tensor:  # [B, C, N] -> [B, P, N]
        chosen = flat[:, points]
        gram = chosen @ flat.transpose(1, 2)  # [B, P, C]
        probabilities = torch.softmax(gram.amax(dim=-1, keepdim=True) - gram, dim=-1)
        return gamma.to(flat.dtype) * (probabilities @ flat) + chosen

    exact = rows(x.double())
    ideals = (rows(x.float()), rows(x.float().flip(2)).flip(2))
    errors = [ideal.to(x.dtype).double() - exact for ideal in ideals]
    largest = max(float(error.abs().max()) for error in errors)
    return Yardstick(exact, x.dtype, largest, max(float(error.norm()) for error in errors), OUT_FACTOR)


def _flat(tensor: Tensor) -> Tensor:
    return tensor.flatten(2) if tensor.dim() > 2 else tensor


def _share(got: Tensor, yardstick: Yardstick) -> float:
    """The error as a part of what the rule allows, NaN if there is a NaN."""
    verdict = judge(got, yardstick)
    if verdict.complaint is not None:
        return math.inf
    pairs = ((verdict.error, verdict.allowed), (verdict.frobenius, verdict.frobenius_allowed))
    shares = [error / allowed if allowed else math.inf if error else 0.0 for error, allowed in pairs]
    return math.nan if any(map(math.isnan, shares)) else max(shares)
