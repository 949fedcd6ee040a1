"""config.json of a saved model: which options it may hold, and of what kind."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ._weights import listed


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def _is_list(value: Any) -> bool:
    return isinstance(value, (list, tuple))


def _is_colour(value: Any) -> bool:
    return _is_list(value) and len(value) == 3 and all(part == 0 or (_is_count(part) and part <= 255) for part in value)


# All that a config may hold: what each value must be, in words, and the test.
_CONFIG: dict[str, tuple[str, Callable[[Any], bool]]] = {
    "name": ("a name", lambda value: isinstance(value, str)),
    "num_classes": ("a whole number >= 1", _is_count),
    "stem": ("a name", lambda value: isinstance(value, str)),
    "output_stride": ("a whole number", _is_count),
    "multi_grid": (
        "a list of whole numbers >= 1, or null",
        lambda value: value is None or (isinstance(value, list) and all(map(_is_count, value))),
    ),
    "inter_channels": ("a whole number >= 1, or null", lambda value: value is None or _is_count(value)),
    "dropout": (
        "a number from 0 to 1",
        lambda value: isinstance(value, (int, float)) and not isinstance(value, bool) and 0 <= value <= 1,
    ),
    "channel_variant": ("a name", lambda value: isinstance(value, str)),
    "align_corners": ("true or false", lambda value: isinstance(value, bool)),
    "classes": (
        "a list of names, or null",
        lambda value: value is None or (_is_list(value) and all(isinstance(name, str) for name in value)),
    ),
    "palette": (
        "a list of [red, green, blue] from 0 to 255, or null",
        lambda value: value is None or (_is_list(value) and all(map(_is_colour, value))),
    ),
}


def check_config(config: Any, source: str) -> None:
    """Raise a ValueError that lists all that is wrong: unknown keys, missing ones, values of the wrong kind."""
    if not isinstance(config, dict):
        raise ValueError(f"{source}: expected an object of options, got {type(config).__name__}")
    complaints = [f"unknown option {key!r}" for key in config if key not in _CONFIG]
    complaints += [f"missing option {key!r}" for key in ("name", "num_classes") if key not in config]
    for key, (expected, holds) in _CONFIG.items():
        if key in config and not holds(config[key]):
            complaints.append(f"{key} must be {expected}, got {config[key]!r}")
    for key in ("classes", "palette"):
        if not complaints and config.get(key) is not None and len(config[key]) != config["num_classes"]:
            complaints.append(f"{key} must have {config['num_classes']} entries, one a class, got {len(config[key])}")
    if complaints:
        raise ValueError(listed(f"{source}: the options are not right", complaints))
