"""PEP 517 / PEP 660 hooks: those of setuptools, but a torch in the target environment is used, not fetched.

Were torch listed in build-system.requires, every isolated build would download a second one, of another
version and often of several gigabytes. So it becomes a requirement only where the build needs headers and the
target environment holds no torch whose headers will do (danet_build_env.py).
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from setuptools import build_meta
from setuptools.build_meta import (
    build_editable,
    build_sdist,
    prepare_metadata_for_build_editable,
    prepare_metadata_for_build_wheel,
)

from danet_build_env import build_requirements

__all__ = [
    "build_editable",
    "build_sdist",
    "build_wheel",
    "get_requires_for_build_editable",
    "get_requires_for_build_sdist",
    "get_requires_for_build_wheel",
    "prepare_metadata_for_build_editable",
    "prepare_metadata_for_build_wheel",
]


def get_requires_for_build_wheel(config_settings: Any = None) -> list[str]:
    return build_requirements()


def get_requires_for_build_editable(config_settings: Any = None) -> list[str]:
    return build_requirements()


def get_requires_for_build_sdist(config_settings: Any = None) -> list[str]:
    return []


def build_wheel(wheel_directory: str, config_settings: Any = None, metadata_directory: Any = None) -> str:
    # setuptools packs whatever lies in build/lib*, files of an earlier build included.
    for leftover in Path("build").glob("lib*"):
        shutil.rmtree(leftover)
    return build_meta.build_wheel(wheel_directory, config_settings, metadata_directory)
