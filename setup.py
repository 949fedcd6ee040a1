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
from danet_build_cuda import CUDA_LIBRARY, CudaToolchain, find_cuda  # noqa: E402
from danet_build_env import Toolchain, Unavailable, build_mode, fail, find_toolchain, log  # noqa: E402

PACKAGE = "danet_kernels"


@functools.cache
def toolchain() -> tuple[Toolchain | None, str | None]:
    """The toolchain, or None and the reason why this build goes without the C++ extension."""
    try:
        return find_toolchain(), None
    except Unavailable as unavailable:
        return None, str(unavailable)


@functools.cache
def cuda() -> tuple[CudaToolchain | None, str | None]:
    """The same for the CUDA library, which only comes together with the C++ extension."""
    found, reason = toolchain()
    try:
        return (find_cuda(found.compiler), None) if found else (None, reason)
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
        self.has_cuda: bool | None = None  # known once it has run

    def finalize_options(self) -> None:
        self.set_undefined_options("build", ("build_lib", "build_lib"))

    def run(self) -> None:
        (found, reason), (found_cuda, cuda_reason), mode = toolchain(), cuda(), build_mode()
        package = ROOT / PACKAGE if self.editable_mode or self.inplace else Path(self.build_lib) / PACKAGE
        if not found and mode in ("cpu", "cuda"):
            raise fail(f"DANET_BUILD={mode}, but {reason}")
        if not found_cuda and mode == "cuda":
            raise fail(f"DANET_BUILD=cuda, but {cuda_reason}")
        if found:
            if not found_cuda and mode == "auto":
                log(f"no CUDA kernels: {cuda_reason}")
            self.has_cuda = native.build(found, found_cuda, package)
            if found_cuda and not self.has_cuda:
                found_cuda, cuda_reason = None, f"the kernels do not compile with nvcc {found_cuda.version}"
        else:
            if mode == "auto":
                log(f"WARNING: installing without the C++ extension, which is much slower: {reason}")
            native.remove_libraries(package)
            self.has_cuda = False
        native.write_build_info(package, self.distribution.get_version(), found, reason, found_cuda, cuda_reason)

    def get_source_files(self) -> list[str]:
        files = (path for path in (ROOT / "csrc").rglob("*") if path.is_file())
        return sorted(path.relative_to(ROOT).as_posix() for path in files)

    def get_outputs(self) -> list[str]:
        has_cuda = cuda()[0] is not None if self.has_cuda is None else self.has_cuda
        libraries = [*native.LIBRARIES, CUDA_LIBRARY][: None if has_cuda else -1] if toolchain()[0] else []
        names = [*libraries, native.BUILD_INFO]
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
