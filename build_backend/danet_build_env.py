"""What a build has to work with: the mode asked for, the compiler, ninja, pybind11 and the torch headers.

Nothing here imports torch. The C++ sources use its stable ABI, so a build needs the headers of any torch from
2.10 on and none of its libraries; torch/version.py, read as text, tells whether a torch will do.
"""

from __future__ import annotations

import importlib.util
import os
import re
import shlex
import shutil
import site
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

MODES = ("auto", "cpu", "cuda", "python")
SANITIZERS = ("address", "undefined", "thread", "leak")
OLDEST_TORCH = (2, 10)
TORCH_REQUIREMENT = "torch>=2.10"


class Unavailable(Exception):
    """The C++ extension cannot be built here; the text says why."""


@dataclass(frozen=True)
class TorchHeaders:
    include: Path
    version: str


@dataclass(frozen=True)
class Toolchain:
    """Everything needed to build the C++ extension."""

    compiler: tuple[str, ...]
    compiler_version: str
    ninja: str
    python_include: Path
    pybind11_include: Path
    pybind11_version: str
    torch: TorchHeaders


def log(message: str) -> None:
    print(f"[danet-build] {message}", file=sys.stderr, flush=True)


def fail(message: str) -> SystemExit:
    """To be raised: ends the build with one sentence instead of a traceback."""
    return SystemExit(f"[danet-build] error: {message}")


def build_mode() -> str:
    mode = os.environ.get("DANET_BUILD", "auto").lower() or "auto"
    if mode not in MODES:
        raise fail(f"DANET_BUILD must be one of {', '.join(MODES)}, got {mode!r}")
    return mode


def sanitizers() -> tuple[str, ...]:
    names = tuple(name.strip() for name in os.environ.get("DANET_SANITIZE", "").split(",") if name.strip())
    unknown = [name for name in names if name not in SANITIZERS]
    if unknown:
        raise fail(f"DANET_SANITIZE lists some of {', '.join(SANITIZERS)}; got {', '.join(unknown)}")
    return names


def max_jobs() -> int:
    text = os.environ.get("MAX_JOBS", "")
    if not text:
        return os.cpu_count() or 1
    if not text.isdecimal() or int(text) < 1:
        raise fail(f"MAX_JOBS must be a positive whole number, got {text!r}")
    return int(text)


def find_compiler() -> tuple[str, ...]:
    """The command of the C++ compiler: $CXX, perhaps with a launcher ("ccache g++"), or one on PATH."""
    command = shlex.split(os.environ.get("CXX", ""))
    if command:
        if not shutil.which(command[0]):
            raise Unavailable(f"no C++ compiler: CXX is {os.environ['CXX']!r}, which cannot be run")
        return tuple(command)
    for name in ("c++", "g++", "clang++"):
        path = shutil.which(name)
        if path:
            return (path,)
    raise Unavailable("no C++ compiler: neither c++, g++ nor clang++ is on PATH, and CXX is not set")


def find_ninja() -> str:
    """That of the ninja package, which PATH may lack in an environment that is not activated, or PATH's."""
    path = None
    if importlib.util.find_spec("ninja"):
        import ninja

        path = shutil.which("ninja", path=ninja.BIN_DIR)
    path = path or shutil.which("ninja")
    if not path:
        raise Unavailable("ninja is missing (pip install ninja)")
    return path


def _find_pybind11() -> tuple[Path, str]:
    if not importlib.util.find_spec("pybind11"):
        raise Unavailable("pybind11 is missing (pip install pybind11)")
    import pybind11

    return Path(pybind11.get_include()), pybind11.__version__


def _find_python_include() -> Path:
    include = Path(sysconfig.get_path("include"))
    if not (include / "Python.h").is_file():
        raise Unavailable(f"there is no Python.h in {include}: install the development files of this Python")
    return include


def _check_platform() -> None:
    if not sys.platform.startswith("linux"):
        raise Unavailable(f"the C++ extension is built on Linux only, this is {sys.platform}")


def torch_sites() -> Iterator[Path]:
    """Directories that may hold the torch of the target environment, best first.

    Under pip's build isolation torch cannot be imported, but pip runs the target's own interpreter, whose
    sysconfig still names the target's site-packages. (uv and `python -m build` use an interpreter of their
    own: there torch must come as a build requirement, and is then importable.)
    """
    if os.environ.get("DANET_TORCH_SITE"):
        yield Path(os.environ["DANET_TORCH_SITE"])
    spec = importlib.util.find_spec("torch")
    if spec and spec.submodule_search_locations:
        yield Path(next(iter(spec.submodule_search_locations))).parent
    yield Path(sysconfig.get_path("platlib"))
    yield Path(sysconfig.get_path("purelib"))
    if _sees_system_packages():
        base = {"base": sys.base_prefix, "platbase": sys.base_prefix}
        yield Path(sysconfig.get_path("platlib", vars=base))
        if site.getusersitepackages():
            yield Path(site.getusersitepackages())
        yield Path("/usr/lib/python3/dist-packages")


def _sees_system_packages() -> bool:
    """False in a virtual environment that is closed to the packages of the system and the user."""
    if sys.prefix == sys.base_prefix:
        return True
    config = Path(sys.prefix) / "pyvenv.cfg"
    text = config.read_text(encoding="utf-8") if config.is_file() else ""
    return re.search(r"^include-system-site-packages\s*=\s*true", text, re.I | re.M) is not None


def find_torch() -> TorchHeaders:
    rejected = []
    for directory in dict.fromkeys(torch_sites()):
        version_file = directory / "torch" / "version.py"
        if not version_file.is_file():
            continue
        version = _read_version(version_file)
        include = directory / "torch" / "include"
        if not _is_new_enough(version):
            rejected.append(f"torch {version} in {directory} is too old, it must be 2.10 or newer")
        elif not (include / "torch" / "csrc" / "stable" / "library.h").is_file():
            rejected.append(f"torch {version} in {directory} has no stable ABI headers")
        else:
            return TorchHeaders(include, version)
    raise Unavailable("; ".join(rejected) or "torch is not installed in the target environment")


def _read_version(version_file: Path) -> str:
    text = version_file.read_text(encoding="utf-8")
    found = re.search(r"""^__version__[^=\n]*=\s*['"]([^'"]+)""", text, re.M)
    return found.group(1) if found else "of unknown version"


def _is_new_enough(version: str) -> bool:
    numbers = re.match(r"(\d+)\.(\d+)", version)
    return bool(numbers) and (int(numbers.group(1)), int(numbers.group(2))) >= OLDEST_TORCH


def find_toolchain() -> Toolchain:
    """Raises Unavailable with the first thing that is missing."""
    if build_mode() == "python":
        raise Unavailable("DANET_BUILD=python was set")
    _check_platform()
    compiler = find_compiler()
    described = subprocess.run([*compiler, "--version"], capture_output=True, text=True, check=False)
    pybind11_include, pybind11_version = _find_pybind11()
    return Toolchain(
        compiler=compiler,
        compiler_version=(described.stdout.splitlines() or ["unknown"])[0],
        ninja=find_ninja(),
        python_include=_find_python_include(),
        pybind11_include=pybind11_include,
        pybind11_version=pybind11_version,
        torch=find_torch(),
    )


def build_requirements() -> list[str]:
    """What a build needs beyond build-system.requires; a torch only for C++, and if the target has none."""
    mode = build_mode()
    if mode == "python":
        return []
    try:
        _check_platform()
        find_compiler()
    except Unavailable as reason:
        if mode != "auto":
            raise fail(f"DANET_BUILD={mode}, but {reason}") from None
        return []
    try:
        torch = find_torch()
    except Unavailable as reason:
        requirement = os.environ.get("DANET_BUILD_TORCH") or TORCH_REQUIREMENT
        log(f"{reason}: the build asks for {requirement}")
        return ["ninja", requirement]
    log(f"using the headers of torch {torch.version} in {torch.include}")
    return ["ninja"]
