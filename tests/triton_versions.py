"""Counts what Triton would compile, where there is no GPU: no kernel runs, and what it was asked with is kept."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch
from triton.runtime import interpreter

Version = tuple[Any, ...]


def count_versions(monkeypatch: pytest.MonkeyPatch) -> set[Version]:
    """A set that takes every version of a kernel that is launched from now on.

    A version is what Triton compiles anew: constants, dtypes, options, whether an address or an integer divides by 16,
    and whether an integer is 1, unless the kernel says not to look.
    """
    versions: set[Version] = set()

    def keep(self: Any, *arguments: Any, grid: Any, warmup: bool, **options: Any) -> None:
        given = {name: value for name, value in options.items() if name in self.arg_names}
        bound = inspect.signature(self.fn).bind(*arguments, **given).arguments
        fixed = {name for name, kind in self.fn.__annotations__.items() if "constexpr" in str(kind)}
        unseen = self.kwargs["do_not_specialize"] or ()
        traits = [
            (name, value if name in fixed else type(value) if name in unseen else _trait(value))
            for name, value in bound.items()
        ]
        versions.add((self.fn.__name__, str(traits), options.get("num_warps"), options.get("num_stages")))

    monkeypatch.setattr(interpreter.InterpretedFunction, "run", keep)
    return versions


def _trait(value: Any) -> object:
    if isinstance(value, torch.Tensor):
        return value.dtype, value.data_ptr() % 16 == 0
    if isinstance(value, int) and not isinstance(value, bool):
        return value == 1, value % 16 == 0, abs(value) >= 2**31
    if hasattr(value, "block_shape"):  # a tensor descriptor
        return value.base.dtype, tuple(value.block_shape)
    return type(value)
