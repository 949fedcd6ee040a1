"""Builds the C++ extension with ninja and records what was built.

Two shared libraries come out of csrc/: `_danet_cpu.so`, a plain library against torch's stable ABI that
registers operators when torch loads it, and `_C`, a pybind11 module that knows nothing of torch.
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

from danet_build_env import Toolchain, build_mode, fail, log, max_jobs, sanitizers

ROOT = Path(__file__).resolve().parent.parent
TARGET_ABI = "2.10"  # the oldest torch the library loads into; keep equal to TORCH_TARGET_VERSION
BUILD_INFO = "_build_info.json"
CPU_LIBRARY = "_danet_cpu.so"
MODULE = "_C" + (sysconfig.get_config_var("EXT_SUFFIX") or ".so")
LIBRARIES = (CPU_LIBRARY, MODULE)

# -march is never given: code for newer CPUs is compiled per function and chosen at run time.
FLAGS = (
    "-std=c++17 -fPIC -fvisibility=hidden -fopenmp-simd -fno-math-errno -fno-trapping-math -Wall -Wextra "
    "-DTORCH_TARGET_VERSION=0x020a000000000000"
)


def variant() -> tuple[str, str]:
    """Name and compiler flags of the build that DANET_DEBUG and DANET_SANITIZE ask for."""
    debug = os.environ.get("DANET_DEBUG", "0") not in ("", "0")
    name, optimization = ("debug", "-O0 -g") if debug else ("release", "-O3")
    if sanitizers():
        name += "-" + "-".join(sanitizers())
        optimization = "-O0 -g" if debug else "-O1 -g"
        optimization += f" -fsanitize={','.join(sanitizers())} -fno-sanitize-recover=all"
        optimization += " -fno-omit-frame-pointer -DDANET_SANITIZE"  # they clash with target_clones
    return name, f"{optimization} {FLAGS}"


def build(toolchain: Toolchain, package: Path) -> None:
    """Compile what has changed and put the libraries into the directory `package`."""
    work = _work_directory(toolchain)
    for name, include in (
        ("torch", toolchain.torch.include),
        ("pybind11", toolchain.pybind11_include),
        ("python", toolchain.python_include),
    ):
        _link(work / "include" / name, include)
    ninja_file = work / "build.ninja"
    ninja_file.write_text(ninja_text(toolchain, work.relative_to(ROOT).as_posix()), encoding="utf-8")
    log(f"building with {toolchain.compiler_version}, torch {toolchain.torch.version} headers")
    command = [toolchain.ninja, "-f", str(ninja_file.relative_to(ROOT)), "-j", str(max_jobs())]
    if subprocess.run(command, cwd=ROOT, stdout=sys.stderr, check=False).returncode:
        raise fail("the C++ extension does not compile, see above; DANET_BUILD=python installs without it")
    package.mkdir(parents=True, exist_ok=True)
    for name in LIBRARIES:
        # Replaced, not overwritten: a running process may have the old library mapped.
        shutil.copy2(work / name, package / f"{name}.new")
        os.replace(package / f"{name}.new", package / name)


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


def ninja_text(toolchain: Toolchain, work: str) -> str:
    """The ninja file; its paths are relative to the project root, where ninja runs."""
    kernels = sorted(path.relative_to(ROOT).as_posix() for path in (ROOT / "csrc" / "cpu").glob("*.cpp"))
    plans = ["csrc/plan.cpp", "csrc/channel_plan.cpp"]
    cpu_sources = ["csrc/ops_cpu.cpp", *plans, *kernels]
    module_sources = ["csrc/module.cpp", *plans, "csrc/cpu/features.cpp"]
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
        "  command = $cxx -shared -nostdlib -Wl,-soname,libtorch_cpu.so -x c++ /dev/null -o $out",
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
        "",
    ]
    return "\n".join(lines)


def _objects(work: str, sources: list[str]) -> str:
    return " ".join(f"{work}/{source}.o" for source in sources)


def _quote(word: str) -> str:
    """For a command in a ninja file."""
    quoted = word if re.fullmatch(r"[\w./+=-]+", word) else "'" + word.replace("'", "'\\''") + "'"
    return quoted.replace("$", "$$")


def write_build_info(package: Path, version: str, toolchain: Toolchain | None, reason: str | None) -> None:
    """Record the build for `python -m danet_kernels.info`; `reason` says why there is no C++ extension."""
    date = time.gmtime(int(os.environ.get("SOURCE_DATE_EPOCH", time.time())))
    info = {
        "version": version,
        "commit": _commit(),
        "danet_build": build_mode(),
        "cpu_library": toolchain is not None,
        "torch_headers": toolchain and toolchain.torch.version,
        "target_abi": TARGET_ABI,
        "compiler": toolchain and toolchain.compiler_version,
        "flags": variant()[1] if toolchain else None,
        "sanitize": list(sanitizers()) if toolchain else [],
        "reasons": {"native": reason},
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
