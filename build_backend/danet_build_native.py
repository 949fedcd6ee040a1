"""Builds the C++ extension with ninja and records what was built.

Three shared libraries come out of csrc/: `_danet_cpu.so` and, where there is nvcc, `_danet_cuda.so`, plain
libraries against torch's stable ABI that register operators when torch loads them; and `_C`, a pybind11 module
that knows nothing of torch.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import time
from pathlib import Path

import danet_build_cuda
from danet_build_cuda import CUDA_LIBRARY, CudaToolchain
from danet_build_env import Toolchain, build_mode, fail, log, max_jobs, sanitizers

ROOT = Path(__file__).resolve().parent.parent
TARGET_ABI = "2.10"  # the oldest torch the library loads into; keep equal to TORCH_TARGET_VERSION
BUILD_INFO = "_build_info.json"
CPU_LIBRARY = "_danet_cpu.so"
MODULE = "_C" + (sysconfig.get_config_var("EXT_SUFFIX") or ".so")
LIBRARIES = (CPU_LIBRARY, MODULE)  # of every C++ build; CUDA_LIBRARY comes on top

# -march is never given: code for newer CPUs is compiled per function and chosen at run time.
FLAGS = (
    "-std=c++17 -fPIC -fvisibility=hidden -fopenmp-simd -fno-math-errno -fno-trapping-math -Wall -Wextra "
    "-DTORCH_TARGET_VERSION=0x020a000000000000"
)


def _debug() -> bool:
    return os.environ.get("DANET_DEBUG", "0") not in ("", "0")


def variant() -> tuple[str, str]:
    """Name and compiler flags of the build that DANET_DEBUG and DANET_SANITIZE ask for."""
    name, optimization = ("debug", "-O0 -g") if _debug() else ("release", "-O3")
    if sanitizers():
        name += "-" + "-".join(sanitizers())
        optimization = "-O0 -g" if _debug() else "-O1 -g"
        optimization += f" -fsanitize={','.join(sanitizers())} -fno-sanitize-recover=all"
        optimization += " -fno-omit-frame-pointer -DDANET_SANITIZE"  # they clash with target_clones
    return name, f"{optimization} {FLAGS}"


def build(toolchain: Toolchain, cuda: CudaToolchain | None, package: Path) -> bool:
    """Compile what has changed and put the libraries into the directory `package`.

    Returns whether the CUDA library is among them. Where nobody asked for it, one that does not compile is left out.
    """
    work = _work_directory(toolchain)
    for name, include in (
        ("torch", toolchain.torch.include),
        ("pybind11", toolchain.pybind11_include),
        ("python", toolchain.python_include),
    ):
        _link(work / "include" / name, include)
    (work / "build.ninja").write_text(ninja_text(toolchain, cuda, work.relative_to(ROOT).as_posix()), encoding="utf-8")
    log(f"building with {toolchain.compiler_version}, torch {toolchain.torch.version} headers")
    if cuda:
        log(f"building the CUDA library with nvcc {cuda.version} for {' '.join(cuda.architectures)}")
    with_cuda = cuda is not None
    done = _run_ninja(toolchain, work, "-k", "0" if with_cuda else "1")
    if not done and with_cuda and _run_ninja(toolchain, work, *(f"{work.relative_to(ROOT)}/{x}" for x in LIBRARIES)):
        if build_mode() == "cuda":
            raise fail("the CUDA kernels do not compile, see above; DANET_BUILD=cpu installs without them")
        log("WARNING: installing without the CUDA kernels, which do not compile, see above")
        done, with_cuda = True, False
    if not done:
        raise fail("the C++ extension does not compile, see above; DANET_BUILD=python installs without it")
    package.mkdir(parents=True, exist_ok=True)
    for name in (*LIBRARIES, *([CUDA_LIBRARY] if with_cuda else [])):
        # Replaced, not overwritten: a running process may have the old library mapped.
        shutil.copy2(work / name, package / f"{name}.new")
        os.replace(package / f"{name}.new", package / name)
    if not with_cuda:
        (package / CUDA_LIBRARY).unlink(missing_ok=True)
    return with_cuda


def _run_ninja(toolchain: Toolchain, work: Path, *arguments: str) -> bool:
    ninja_file = (work / "build.ninja").relative_to(ROOT)
    command = [toolchain.ninja, "-f", str(ninja_file), "-j", str(max_jobs()), *arguments]
    return subprocess.run(command, cwd=ROOT, stdout=sys.stderr, check=False).returncode == 0


def remove_libraries(package: Path) -> None:
    """A build without C++ must not leave the libraries of an earlier one to be loaded."""
    for pattern in ("_danet_*.so", "_C.*"):
        for stale in package.glob(pattern):
            stale.unlink()


def _work_directory(toolchain: Toolchain) -> Path:
    """One directory per set of headers and flags, so that going back and forth between them does not rebuild.

    The versions are in the name because these headers are left out of the dependency files: under build
    isolation they are written anew for every build, and would always look changed.
    """
    versions = f"torch-{toolchain.torch.version}-pybind11-{toolchain.pybind11_version}"
    work = ROOT / "build" / f"{sys.implementation.cache_tag}-{versions}-{variant()[0]}"
    (work / "include").mkdir(parents=True, exist_ok=True)
    return work


def _link(link: Path, target: Path) -> None:
    link.unlink(missing_ok=True)
    link.symlink_to(target, target_is_directory=True)


def ninja_text(toolchain: Toolchain, cuda: CudaToolchain | None, work: str) -> str:
    """The ninja file; its paths are relative to the project root, where ninja runs."""
    kernels = sorted(path.relative_to(ROOT).as_posix() for path in (ROOT / "csrc" / "cpu").glob("*.cpp"))
    plans = ["csrc/plan.cpp", "csrc/channel_plan.cpp"]
    cpu_sources = ["csrc/ops_cpu.cpp", *plans, *kernels]
    module_sources = ["csrc/module.cpp", *plans, *danet_build_cuda.plan_sources(), "csrc/cpu/features.cpp"]
    stub = f"{work}/stub/libtorch_cpu.so"
    # gcc alone would resolve the links to the headers, and error messages would show paths of this machine.
    path_flag = "" if "clang" in toolchain.compiler_version else " -fno-canonical-system-headers"
    lines = [
        "ninja_required_version = 1.5",
        f"builddir = {work}",
        f"cxx = {' '.join(_quote(word) for word in toolchain.compiler)}",
        f"flags = {variant()[1]} -Icsrc{path_flag}",
        f"link_flags = {' '.join(f'-fsanitize={name}' for name in sanitizers())}",
        f"headers = -isystem {work}/include/torch",
        "rule compile",
        "  command = $cxx $flags $headers -MMD -MF $out.d -c $in -o $out",
        "  depfile = $out.d",
        "  deps = gcc",
        "  description = compile $in",
        "rule link",
        "  command = $cxx -shared $link_flags -o $out $in $libraries",
        "  description = link $out",
        # The library must name libtorch_cpu.so as a dependency, or the loader finds none of torch's symbols.
        # Linking to an empty library of that name is enough: at run time it is the one torch has loaded.
        "rule stub",
        "  command = $cxx -shared -nostdlib -Wl,-soname,$$(basename $out) -x c++ /dev/null -o $out",
        "  description = link $out",
        f"build {stub}: stub",
    ]
    for source in dict.fromkeys(cpu_sources + module_sources):
        lines.append(f"build {work}/{source}.o: compile {source}")
        if source == "csrc/module.cpp":
            lines.append(f"  headers = -isystem {work}/include/pybind11 -isystem {work}/include/python")
    lines += [
        f"build {work}/{CPU_LIBRARY}: link {_objects(work, cpu_sources)} | {stub}",
        f"  libraries = -L{work}/stub -Wl,--no-as-needed -ltorch_cpu -Wl,--as-needed",
        f"build {work}/{MODULE}: link {_objects(work, module_sources)}",
    ]
    if cuda:
        lines += danet_build_cuda.ninja_lines(cuda, work, _debug(), _quote)
    return "\n".join([*lines, ""])


def _objects(work: str, sources: list[str]) -> str:
    return " ".join(f"{work}/{source}.o" for source in sources)


def _quote(word: str) -> str:
    """For a command in a ninja file."""
    quoted = word if re.fullmatch(r"[\w./+=-]+", word) else "'" + word.replace("'", "'\\''") + "'"
    return quoted.replace("$", "$$")


def write_build_info(
    package: Path,
    version: str,
    toolchain: Toolchain | None,
    reason: str | None,
    cuda: CudaToolchain | None,
    cuda_reason: str | None,
) -> None:
    """Record the build for `python -m danet_kernels.info`; the reasons say why there is no such library."""
    date = time.gmtime(int(os.environ.get("SOURCE_DATE_EPOCH", time.time())))
    info = {
        "version": version,
        "commit": _commit(),
        "danet_build": build_mode(),
        "cpu_library": toolchain is not None,
        "cuda_library": cuda is not None,
        "torch_headers": toolchain and toolchain.torch.version,
        "target_abi": TARGET_ABI,
        "compiler": toolchain and toolchain.compiler_version,
        "flags": variant()[1] if toolchain else None,
        "nvcc": cuda and cuda.version,
        "cuda_archs": list(cuda.architectures) if cuda else [],
        "cuda_source_hash": danet_build_cuda.source_hash() if cuda else None,
        "sanitize": list(sanitizers()) if toolchain else [],
        "reasons": {"native": reason, "cuda": cuda_reason},
        "date": time.strftime("%Y-%m-%dT%H:%M:%SZ", date),
    }
    package.mkdir(parents=True, exist_ok=True)
    (package / BUILD_INFO).write_text(json.dumps(info, indent=2) + "\n", encoding="utf-8")


def _commit() -> str | None:
    if not (ROOT / ".git").exists() or not shutil.which("git"):
        return None
    command = ["git", "rev-parse", "HEAD"]
    found = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    return found.stdout.strip() if found.returncode == 0 else None
