"""Adds the C++ extension to the setuptools build; everything else is in pyproject.toml and build_backend/."""

from __future__ import annotations

import functools
import sys
from pathlib import Path

from setuptools import Command, Distribution, setup
from setuptools.command.build import build

ROOT = Path(__file__).resolve().parent
sys.path.insert(0, str(ROOT / "build_backend"))

import danet_build_native as native  # noqa: E402
from danet_build_env import Toolchain, Unavailable, build_mode, fail, find_toolchain, log  # noqa: E402

PACKAGE = "danet_kernels"


@functools.cache
def toolchain() -> tuple[Toolchain | None, str | None]:
    """The toolchain, or None and the reason why this build goes without the C++ extension."""
    try:
        return find_toolchain(), None
    except Unavailable as unavailable:
        return None, str(unavailable)


class NativeDistribution(Distribution):
    """Gives the wheel a platform tag exactly when it contains the C++ extension."""

    def has_ext_modules(self) -> bool:
        return toolchain()[0] is not None


class BuildNative(Command):
    """Build the C++ extension and write _build_info.json, into the source tree for an editable install."""

    description = "build the C++ extension of danet_kernels"
    user_options = [("inplace", "i", "put the libraries into the source tree")]  # noqa: RUF012
    boolean_options = ["inplace"]  # noqa: RUF012

    def initialize_options(self) -> None:
        self.build_lib: str | None = None
        self.editable_mode = False
        self.inplace = False

    def finalize_options(self) -> None:
        self.set_undefined_options("build", ("build_lib", "build_lib"))

    def run(self) -> None:
        found, reason = toolchain()
        package = ROOT / PACKAGE if self.editable_mode or self.inplace else Path(self.build_lib) / PACKAGE
        if found:
            native.build(found, package)
        elif build_mode() == "cpu":
            raise fail(f"DANET_BUILD=cpu, but {reason}")
        else:
            if build_mode() == "auto":
                log(f"WARNING: installing without the C++ extension, which is much slower: {reason}")
            native.remove_libraries(package)
        native.write_build_info(package, self.distribution.get_version(), found, reason)

    def get_source_files(self) -> list[str]:
        files = (path for path in (ROOT / "csrc").rglob("*") if path.is_file())
        return sorted(path.relative_to(ROOT).as_posix() for path in files)

    def get_outputs(self) -> list[str]:
        names = [*(native.LIBRARIES if toolchain()[0] else ()), native.BUILD_INFO]
        return [str(Path(self.build_lib) / PACKAGE / name) for name in names]

    def get_output_mapping(self) -> dict[str, str]:
        """Where an editable install has the files instead."""
        outputs = self.get_outputs() if self.editable_mode else []
        return {output: f"{PACKAGE}/{Path(output).name}" for output in outputs}


class Build(build):
    sub_commands = [*build.sub_commands, ("build_native", None)]  # noqa: RUF012


setup(
    distclass=NativeDistribution,
    cmdclass={"build": Build, "build_native": BuildNative},
    ext_modules=[],  # a list, which sdist looks through when has_ext_modules() says yes
)
