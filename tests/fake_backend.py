"""A backend whose kernels must be proven, as those for GPUs: eager, with results changed on purpose."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import torch

from danet_kernels.backends import OPS, eager

FUNCTIONS = [f"{op}_{direction}" for op in OPS for direction in ("forward", "backward")]

Change = Callable[[list[Any], tuple[Any, ...]], None]
"""Changes the results of a function in place, given its arguments."""


def make_backend(**replaced: Any) -> ModuleType:
    """`replaced`: functions by name that take the place of eager's."""
    backend = ModuleType("danet_kernels.backends.fake")
    vars(backend).update({function: getattr(eager, function) for function in FUNCTIONS})
    vars(backend).update(why_not=lambda op, *inputs: [], source_hash=lambda op: f"hash of {op}", **replaced)
    return backend


def make_wrong_backend(function: str, change: Change) -> ModuleType:
    """As `make_backend`, with the results of one function changed."""

    def wrong(*arguments: Any) -> tuple[Any, ...]:
        results = list(getattr(eager, function)(*arguments))
        change(results, arguments)
        return tuple(results)

    return make_backend(**{function: wrong})


def scale(index: int, factor: float) -> Change:
    """The change of one result by a factor."""

    def change(results: list[Any], arguments: tuple[Any, ...]) -> None:
        results[index] = results[index] * factor

    return change


@contextmanager
def fp32_products(precision: str) -> Iterator[None]:
    """What the user allows for products of fp32 on a GPU."""
    matmul = torch.backends.cuda.matmul
    before, matmul.fp32_precision = matmul.fp32_precision, precision
    try:
        yield
    finally:
        matmul.fp32_precision = before
