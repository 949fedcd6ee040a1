"""The error rule of the project: what the tests allow, and why.

With e the largest error over the tensor of an ideal kernel ("fp32 inside, rounded once at the end") against the exact
result for the rounded inputs, every element must lie within 2 e plus one ULP of its dtype at that magnitude (gradients
3 e), and the Frobenius norm of the error within twice the ideal's (three times). danet_kernels._error_rule measures a
result against that; here are the exact results and the ideal's error, found with more care than a self-test on the
user's machine can afford:

- Exact is reference.py in fp64. For fp64 results that would be the thing judged, so exact is formulas.py in long double
  (64 bits of mantissa or more), rounded to fp64, and the ideal is reference.py in fp64. The rule then stays the same.
- One ideal kernel is one draw of rounding errors, and it may be right by luck where a tensor is small (dgamma: one
  number) or where everything cancels (the gradient by a single key is zero). So e is the largest error of several
  ideals: reference.py with autograd, and formulas.py on the same problem with channels, queries and keys in random
  orders, row-major and column-major by turns, which changes nothing but the roundings. There are DRAWS of them, and
  MORE_DRAWS before a result is called wrong.
- dgamma sums the errors of all rows: its e is also at least the root of the sum of squares of the rows' errors.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from cases import AXES, Problem
from torch import Tensor

from danet_kernels._error_rule import (
    GRADIENT_FACTOR,
    OUT_FACTOR,
    Verdict,
    Yardstick,
    evaluate,
    judge,
    with_rounded_operands,
)
from danet_kernels._layout import accumulator_dtype

DRAWS = 3
MORE_DRAWS = 30
HAS_LONG_DOUBLE = np.finfo(np.longdouble).eps < np.finfo(np.float64).eps


def assert_follows_error_rule(
    problem: Problem, results: dict[str, Tensor], allowed: dict[str, Yardstick], tensor_cores: bool = False
) -> None:
    """Fail unless every result (out, and each gradient by name) follows the rule; say where it is worst."""

    def verdicts(allowed: dict[str, Yardstick]) -> dict[str, Verdict]:
        if tensor_cores:
            allowed = {name: yardstick.for_tensor_cores() for name, yardstick in allowed.items()}
        return {name: judge(result, allowed[name]) for name, result in results.items()}

    if all(verdict.ok for verdict in verdicts(allowed).values()):
        return
    final = verdicts(yardsticks(problem, MORE_DRAWS))
    complaints = [f"{name}: {verdict}" for name, verdict in final.items() if not verdict.ok]
    assert not complaints, "\n".join([f"error rule broken by {problem}", *complaints])


def yardsticks(problem: Problem, draws: int = DRAWS) -> dict[str, Yardstick]:
    """The exact value and the error allowed, for out and the gradient of every tensor given, by that many draws."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # many small products: threads that wait for each other would take most of the time
    try:
        return _yardsticks(problem, draws)
    finally:
        torch.set_num_threads(threads)


def _yardsticks(problem: Problem, draws: int) -> dict[str, Yardstick]:
    dtype = next(iter(problem.tensors.values())).dtype
    wide = accumulator_dtype(dtype)
    exact = _exact(problem, wide)
    ideals = [evaluate(problem.reference, problem.tensors, problem.dout, dtype=wide)]
    generator = torch.Generator().manual_seed(0)
    rows = [0.0]
    for draw in range(draws):
        ideal = _shuffled(problem, wide, generator, turned=draw % 2 == 1)
        rows.append(_row_errors(problem, ideal["attn"], exact["attn"]))
        ideals.append(ideal)
    rounding = with_rounded_operands(problem.op, problem.tensors, problem.dout, **problem.options)
    found = {}
    for name in problem.results:
        result_dtype = problem.tensors[name[1:]].dtype if name != "out" else dtype
        errors = [ideal[name].to(result_dtype).double() - exact[name] for ideal in ideals]
        largest = max((float(error.abs().max()) for error in errors if error.numel()), default=0.0)
        frobenius = max(float(error.norm()) for error in errors)
        rounded = 0.0, 0.0
        if name in rounding:
            error = rounding[name].to(result_dtype).double() - exact[name]
            rounded = float(error.abs().max()) if error.numel() else 0.0, float(error.norm())
        if name == "dgamma":
            largest = frobenius = max(largest, *rows)
            rounded = (max(rounded[0], _row_errors(problem, exact["attn"].to(dtype), exact["attn"])),) * 2
        factor = OUT_FACTOR if name == "out" else GRADIENT_FACTOR
        assert exact[name].isfinite().all(), f"{name} of {problem} is not finite, there is no error to measure"
        found[name] = Yardstick(exact[name], result_dtype, largest, frobenius, factor, rounded)
    return found


def _exact(problem: Problem, wide: torch.dtype) -> dict[str, Tensor]:
    if wide == torch.float64:
        assert HAS_LONG_DOUBLE, "long double is no wider than double here"
        given = {name: _long(tensor) for name, tensor in problem.tensors.items()}
        results = problem.formula(np, given, _long(problem.dout), **problem.options)
        return {name: torch.from_numpy(np.array(value, dtype=np.float64)) for name, value in results.items()}
    tensors = {name: tensor.double() for name, tensor in problem.tensors.items()}
    dout = problem.dout.double()
    attn = problem.formula(torch, tensors, dout, **problem.options)["attn"]
    return {"attn": attn} | evaluate(problem.reference, tensors, dout)


def _shuffled(problem: Problem, wide: torch.dtype, generator: torch.Generator, turned: bool) -> dict[str, Tensor]:
    """formulas.py in `wide` on the problem with its axes in random orders; the results are put back in order."""
    orders = {axis: torch.randperm(size, generator=generator) for axis, size in problem.sizes.items()}

    def order(name: str, tensor: Tensor, undo: bool = False) -> Tensor:
        for dim, axis in enumerate(AXES[name], start=1):
            index = orders[axis].argsort() if undo else orders[axis]
            tensor = tensor.index_select(dim, index)
        return tensor.mT.contiguous().mT if turned and tensor.dim() == 3 else tensor

    given = {name: order(name, tensor.to(wide)) for name, tensor in problem.tensors.items()}
    dout = order("out", problem.dout.to(wide))
    results = problem.formula(torch, given, dout, **problem.options, fused=turned)
    return {name: order(name if name in AXES else name[1:], value, undo=True) for name, value in results.items()}


def _row_errors(problem: Problem, attn: Tensor, exact: Tensor) -> float:
    """Root of the sum of squares of the errors that rows, or single terms, hand on to dgamma = sum(dout attn)."""
    terms = problem.dout.double() * (attn.double() - exact)  # [B, C, M]
    over = 1 if problem.op == "position_attention" else 2  # a row of the map belongs to a query, or to a channel
    return math.sqrt(max(float(terms.square().sum()), float(terms.sum(over).square().sum())))


def _long(tensor: Tensor) -> np.ndarray:
    return tensor.double().numpy().astype(np.longdouble)
