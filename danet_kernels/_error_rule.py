"""How wrong a result may be: the one rule for the self-test, the tests and the benchmarks.

The yardstick is the error of an ideal kernel, which computes in fp32 (the definition in reference.py, on
upcast inputs) and rounds once at the end, against the same definition in fp64. With e the ideal's largest
error over the tensor, a result passes if every element lies within 2 e plus one ULP of its dtype at that
magnitude, and if the Frobenius norm of its error is at most twice the ideal's; three times for gradients.
An element is not held to the ideal's own error at that place, because by luck that is zero in some places.

"The ideal" is more than one computation, and the largest error among them counts, since one of them may be
exact by luck where a tensor is small:
- the definition also with channels and positions in random orders, which changes the roundings only;
- the gradients of position attention also from the saved lse and attn, as every kernel without the map must
  form them: where a row of the map is nearly one-hot, autograd through the map cancels errors that no such
  kernel can;
- for fp64, where the ideal would be the reference itself: the random orders, and fp32 scaled by the ratio of
  the two epsilons.
For the same reason the Frobenius norm may exceed its bound by one ULP of the largest element, and dgamma,
one number, has for its e at least the standard deviation that such a sum has.

Kernels on tensor cores (`Yardstick.for_tensor_cores`) round what they multiply, and the ideal for them does too:
- 16-bit inputs meet softmax weights P and gradients dS of the logits that are rounded to 16 bits. This is as good as
  one rounding at the end, but for sums that cancel, and for dgamma, which is fp32 and sums products with attn.
- fp32 operands keep 21 of 24 bits (three products of tf32), inputs included; and four times e is allowed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from . import reference
from ._layout import accumulator_dtype

OUT_FACTOR = 2.0
GRADIENT_FACTOR = 3.0
DRAWS = 3  # random orders
MORE_DRAWS = 30  # before a result is called wrong for good

# The dimensions of every tensor after the batch, *S as S and *T as T; gamma has none.
_AXES = {"query": "DS", "key": "DT", "value": "CT", "residual": "CS", "x": "CS", "out": "CS"}

Function = Callable[..., Tensor]
Inputs = Mapping[str, Tensor | None]  # by parameter name; an optional one may be None or left out


@dataclass(frozen=True)
class Yardstick:
    """What one result should be, and how far the ideal kernel is from it."""

    exact: Tensor  # fp64
    dtype: torch.dtype  # of the result to be judged
    largest: float  # e
    frobenius: float  # norm of the ideal's error
    factor: float
    rounded: tuple[float, float] = (0.0, 0.0)  # largest error and Frobenius norm of the ideal with rounded operands

    def for_tensor_cores(self) -> Yardstick:
        """The yardstick for kernels that multiply on tensor cores."""
        largest, frobenius = max(self.largest, self.rounded[0]), max(self.frobenius, self.rounded[1])
        factor = 4.0 if self.dtype == torch.float32 else self.factor
        return replace(self, largest=largest, frobenius=frobenius, factor=factor)

    def allowed(self) -> Tensor:
        """The largest error allowed, element by element."""
        return self.factor * self.largest + ulp(self.exact, self.dtype)

    def frobenius_allowed(self) -> float:
        return self.factor * self.frobenius + float(ulp(self.exact.abs().amax(), self.dtype))


@dataclass(frozen=True)
class Verdict:
    """A result measured against its yardstick; `error` to `expected` are those of the worst element."""

    error: float = 0.0
    allowed: float = 1.0
    index: tuple[int, ...] = ()
    got: float = 0.0
    expected: float = 0.0
    frobenius: float = 0.0
    frobenius_allowed: float = 1.0
    complaint: str | None = None  # a wrong shape or dtype, which leaves nothing to measure

    @property
    def ok(self) -> bool:
        within = self.error <= self.allowed and self.frobenius <= self.frobenius_allowed  # false for NaN
        return self.complaint is None and within

    def __str__(self) -> str:
        if self.complaint is not None:
            return self.complaint
        return (
            f"largest error {self.error:.3g}, allowed {self.allowed:.3g}, at {list(self.index)}: "
            f"got {self.got!r}, expected {self.expected!r}; "
            f"Frobenius error {self.frobenius:.3g}, allowed {self.frobenius_allowed:.3g}"
        )


def evaluate(
    function: Function, inputs: Inputs, dout: Tensor | None = None, *, dtype: torch.dtype | None = None
) -> dict[str, Tensor]:
    """{"out": function(**inputs)} and, given dout, the gradient of every input as "d" + its name.

    The inputs keep their strides and are left as they are. `dtype` casts them all, and dout, first.
    """
    leaves = {}
    for name, tensor in inputs.items():
        if tensor is not None:
            leaves[name] = tensor.detach().to(dtype or tensor.dtype).requires_grad_(dout is not None)
    out = function(**leaves)
    results = {"out": out.detach()}
    if dout is not None:
        gradients = torch.autograd.grad(out, list(leaves.values()), dout.to(out.dtype))
        results |= {f"d{name}": gradient for name, gradient in zip(leaves, gradients, strict=True)}
    return results


def yardsticks(
    op: str, inputs: Inputs, dout: Tensor | None = None, *, draws: int = DRAWS, **options: Any
) -> dict[str, Yardstick]:
    """A yardstick for each result of `evaluate` of the operator `op` (such as "position_attention").

    options: scale, or variant and residual. Raises ValueError if an exact result is not finite, as there
    is no error to measure then.
    """
    definition = partial(getattr(reference, op), **options)
    given = {name: tensor for name, tensor in inputs.items() if tensor is not None}
    dtypes = {f"d{name}": tensor.dtype for name, tensor in given.items()}
    dtypes["out"] = dtype = next(iter(dtypes.values()))  # an operator gives back the dtype of its first argument
    wide = accumulator_dtype(dtype)
    exact = evaluate(definition, given, dout, dtype=torch.float64)
    ideals = [(evaluate(definition, given, dout, dtype=torch.float32), _epsilon(wide) / _epsilon(torch.float32))]
    generator = torch.Generator().manual_seed(0)
    for _ in range(draws):
        ideals.append((_shuffled(definition, given, dout, wide, generator), 1.0))
        if op == "position_attention" and dout is not None:
            results = _shuffled(partial(_position_from_lse, **options), given, dout, wide, generator)
            del results["out"]
            ideals.append((results, 1.0))
    rounding = with_rounded_operands(op, given, dout, **options)
    found = {}
    for name, value in exact.items():
        if not value.to(dtypes[name]).isfinite().all():
            raise ValueError(f"{name} of the reference is not finite, so no error can be measured against it")
        errors = [
            (ideal[name].to(dtypes[name]).double().view_as(value) - value) * scale
            for ideal, scale in ideals
            if name in ideal
        ]
        largest = max(float(error.abs().max()) if error.numel() else 0.0 for error in errors)
        frobenius = max(float(error.norm()) for error in errors)
        rounded = 0.0, 0.0
        if name in rounding:
            error = rounding[name].to(dtypes[name]).double().view_as(value) - value
            rounded = float(error.abs().max()) if error.numel() else 0.0, float(error.norm())
        if name == "dgamma" and dout is not None:
            largest = frobenius = max(largest, _sum_deviation(definition, given, dout, wide))
            rounded = (max(rounded[0], _sum_deviation(definition, given, dout, wide, rounded_to=dtype)),) * 2
        factor = OUT_FACTOR if name == "out" else GRADIENT_FACTOR
        found[name] = Yardstick(value, dtypes[name], largest, frobenius, factor, rounded)
    return found


def judge(got: Tensor, yardstick: Yardstick) -> Verdict:
    """Measure one result, which may be on any device."""
    exact = yardstick.exact
    if got.shape != exact.shape or got.dtype != yardstick.dtype:
        wanted = f"{list(exact.shape)} of {yardstick.dtype}"
        return Verdict(complaint=f"expected {wanted}, got {list(got.shape)} of {got.dtype}")
    if not exact.numel():
        return Verdict()
    wide = got.detach().to(exact.device, torch.float64)
    error, allowed = (wide - exact).abs(), yardstick.allowed()
    worst = (error / allowed).argmax()  # the first NaN, if there is one
    index = tuple(int(i) for i in torch.unravel_index(worst, exact.shape))
    return Verdict(
        error=float(error[index]),
        allowed=float(allowed[index]),
        index=index,
        got=float(wide[index]),
        expected=float(exact[index]),
        frobenius=float(error.norm()),
        frobenius_allowed=yardstick.frobenius_allowed(),
    )


def ulp(value: Tensor, dtype: torch.dtype) -> Tensor:
    """The distance from each element of `value` to the next larger magnitude in `dtype`, in fp64."""
    info = torch.finfo(dtype)
    # Below the smallest normal number the spacing is constant; frexp would call zero as large as 0.5.
    magnitude = value.double().abs().clamp(min=info.smallest_normal)
    _, exponent = torch.frexp(magnitude)  # magnitude = mantissa * 2^exponent, 0.5 <= mantissa < 1
    return torch.ldexp(torch.full_like(magnitude, info.eps), exponent - 1)


def _epsilon(dtype: torch.dtype) -> float:
    return torch.finfo(dtype).eps


def _shuffled(
    function: Function,
    inputs: Mapping[str, Tensor],
    dout: Tensor | None,
    dtype: torch.dtype,
    generator: torch.Generator,
) -> dict[str, Tensor]:
    """As `evaluate`, on flattened positions, with channels and positions in random orders, put back afterwards."""
    flat = {name: tensor.flatten(2) if tensor.dim() > 1 else tensor for name, tensor in inputs.items()}
    orders = {}
    for name, tensor in flat.items():
        for axis, size in zip(_AXES.get(name, ""), tensor.shape[1:], strict=False):
            if axis not in orders:
                orders[axis] = torch.randperm(size, generator=generator)
    shuffled = {name: _reorder(name, tensor, orders) for name, tensor in flat.items()}
    back = {axis: order.argsort() for axis, order in orders.items()}
    shuffled_dout = None if dout is None else _reorder("out", dout.flatten(2), orders)
    results = evaluate(function, shuffled, shuffled_dout, dtype=dtype)
    return {name: _reorder(name if name == "out" else name[1:], result, back) for name, result in results.items()}


def _reorder(name: str, tensor: Tensor, orders: Mapping[str, Tensor]) -> Tensor:
    for dim, axis in enumerate(_AXES.get(name, ""), start=1):
        tensor = tensor.index_select(dim, orders[axis].to(tensor.device))
    return tensor


def with_rounded_operands(op: str, inputs: Inputs, dout: Tensor | None, **options: Any) -> dict[str, Tensor]:
    """As `evaluate` in fp32, by an ideal kernel on tensor cores: it rounds its operands. Empty for fp64."""
    given = {name: tensor for name, tensor in inputs.items() if tensor is not None}
    dtype = next(iter(given.values())).dtype
    if dtype == torch.float64:
        return {}
    function = partial(_position_from_lse if op == "position_attention" else _channel_rounded, **options)
    operands = {name: tensor if name == "gamma" else as_operand(tensor, dtype) for name, tensor in given.items()}
    dout = None if dout is None else as_operand(dout, dtype)
    return evaluate(partial(function, operands=dtype), operands, dout, dtype=torch.float32)


def as_operand(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """`tensor` with the values that tensor cores see in it where the inputs have this dtype."""
    if dtype != torch.float32:
        return tensor.to(dtype).to(tensor.dtype)
    bits = tensor.float().view(torch.int32) & ~0b111  # 21 bits of mantissa, as high and low part of 11 and 10
    return torch.where(tensor.isfinite(), bits.view(torch.float32), tensor)


def _position_from_lse(
    query: Tensor,  # [B, D, *S]
    key: Tensor,  # [B, D, *T]
    value: Tensor,  # [B, C, *T]
    residual: Tensor | None = None,  # [B, C, *S]
    gamma: Tensor | None = None,
    *,
    scale: float = 1.0,
    operands: torch.dtype | None = None,
) -> Tensor:  # [B, C, *S]
    """Position attention whose gradients come from lse, and from delta = dout . attn instead of sum(P dP)."""
    logits = _RoundGradient.apply(scale * (query.flatten(2).transpose(1, 2) @ key.flatten(2)), operands)  # [B, M, N]
    weights = torch.exp(logits - torch.logsumexp(logits, dim=-1, keepdim=True).detach())  # [B, M, N]
    total = weights.sum(dim=-1)  # [B, M]
    one = 1 + (total - total.detach())  # only its gradient matters
    attn = value.flatten(2) @ _rounded(weights, operands).transpose(1, 2) / one[:, None, :]  # [B, C, M]
    return reference._blend(attn.view(*attn.shape[:2], *query.shape[2:]), residual, gamma)


def _channel_rounded(
    x: Tensor,  # [B, C, *S]
    gamma: Tensor | None = None,
    *,
    variant: str = "official",
    residual: bool = True,
    operands: torch.dtype | None = None,
) -> Tensor:  # [B, C, *S]
    """Channel attention with rounded weights, and rounded gradients of the Gram matrix."""
    flat = x.flatten(2)
    gram = _RoundGradient.apply(flat @ flat.transpose(1, 2), operands)  # [B, C, C]
    weights = torch.softmax(-gram if variant == "official" else gram, dim=-1)
    attn = _rounded(weights, operands) @ flat  # [B, C, N]
    return reference._blend(attn.view_as(x), x if residual else None, gamma)


def _rounded(tensor: Tensor, dtype: torch.dtype | None) -> Tensor:
    """`tensor` as an operand, with its own gradient."""
    return tensor if dtype is None else tensor + (as_operand(tensor, dtype) - tensor).detach()


class _RoundGradient(torch.autograd.Function):
    """The identity, whose gradient becomes an operand on its way."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, dtype: torch.dtype | None) -> Tensor:
        ctx.dtype = dtype
        return tensor.view_as(tensor)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        return gradient if ctx.dtype is None else as_operand(gradient, ctx.dtype), None


def _sum_deviation(
    definition: Function,
    inputs: Mapping[str, Tensor],
    dout: Tensor,
    dtype: torch.dtype,
    rounded_to: torch.dtype | None = None,
) -> float:
    """Standard deviation of dgamma = sum(dout * attn) in `dtype`, attn rounded: errors of the terms and of their sum.

    The errors of one row of the map go together, so whole rows are looked at as well as single terms.
    """
    attention = partial(definition, residual=False if "x" in inputs else None)
    operands = {name: tensor for name, tensor in inputs.items() if name not in ("residual", "gamma")}
    exact = evaluate(attention, operands, dtype=torch.float64)["out"].flatten(2)  # [B, C, M]
    rounded = _shuffled(attention, operands, None, dtype, torch.Generator().manual_seed(0))["out"]
    rounded = rounded.to(rounded_to or dtype)
    weights = dout.flatten(2).double()
    terms = weights * (rounded - exact)
    rows = terms.sum(dim=2 if "x" in inputs else 1)
    adding = 2 * _epsilon(dtype) * float((weights * exact).norm())  # in blocks of some 16; pairwise: a quarter
    return max(float(terms.norm()), float(rows.norm())) + adding
