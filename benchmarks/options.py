"""Command lines of the benchmarks: an option that makes no sense costs one line on stderr and exit status 2."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import NoReturn


class Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        """One line, without the usage that argparse would print above it."""
        self.exit(2, f"{self.prog}: {message}\n")

    def validated(
        self, arguments: list[str] | None, validate: Callable[[argparse.Namespace], None]
    ) -> argparse.Namespace:
        """The options after `validate`, which completes them or raises ValueError or OSError with one sentence."""
        options = self.parse_args(arguments)
        try:
            validate(options)
        except (ValueError, OSError) as problem:
            self.error(str(problem))
        return options
