"""The part of a build that needs nvcc: which nvcc, for which GPUs, and how `_danet_cuda.so` is made with it.

A GPU is never looked for: machines that build often have none. The headers of a torch for the CPU will do, as they
declare the functions of one for CUDA too.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from danet_build_env import Unavailable, build_mode, fail, log, sanitizers

ROOT = Path(__file__).resolve().parent.parent
CUDA_LIBRARY = "_danet_cuda.so"
DEFAULT_ARCHITECTURES = "8.0+PTX;9.0a"  # PTX of 9.0a would run on no other GPU, that of 8.0 runs on all newer ones
HOPPER = "9.0a"
OLDEST_ARCHITECTURE = 80
USUAL_HOME = Path("/usr/local/cuda")
LAUNCHERS = ("ccache", "sccache", "distcc")

FLAGS = (
    "-std=c++17 -lineinfo -Xfatbin -compress-all -Icsrc -Icsrc/cuda -Xptxas -warn-spills,-warn-lmem-usage "
    "-Xcompiler -fPIC,-fvisibility=hidden -DUSE_CUDA -DTORCH_TARGET_VERSION=0x020a000000000000"
)


@dataclass(frozen=True)
class CudaToolchain:
    """Everything needed to build the CUDA library, besides what the C++ extension needs."""

    nvcc: str
    version: str
    host: tuple[str, ...]  # options that name the host compiler
    libraries: tuple[str, ...]  # options that say where the CUDA run-time library is
    architectures: tuple[str, ...]  # as "8.0", "8.0+PTX", "9.0a"


def find_cuda(compiler: Sequence[str]) -> CudaToolchain:
    """Raises Unavailable with what is missing. `compiler`: the command of the C++ compiler."""
    if build_mode() == "cpu":
        raise Unavailable("DANET_BUILD=cpu was set")
    if sanitizers():
        raise Unavailable("builds with DANET_SANITIZE leave the CUDA kernels out")
    wanted = wanted_architectures()
    nvcc = find_nvcc()
    version = re.search(r"\bV(\d[\d.]*)", _told([nvcc, "--version"]))
    host = host_options(compiler)
    # Without architectures first: a complaint about one of them would hide the rest of what nvcc says.
    libraries = re.findall(r'-L[^"\s]+', "".join(re.findall(r"LIBRARIES=(.*)", _told(_dry_run(nvcc)))))
    found = CudaToolchain(nvcc, version[1] if version else "of unknown version", host, tuple(libraries), ())
    _check_host_compiler(found)
    return replace(found, architectures=_known(found, wanted))


def _told(command: Sequence[str]) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return done.stdout + done.stderr


def _dry_run(nvcc: str, *options: str) -> list[str]:
    return [nvcc, "--dryrun", *options, "-c", "empty.cu"]


def find_nvcc() -> str:
    homes = [os.environ[name] for name in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(name)]
    for home in homes:
        path = shutil.which("nvcc", path=str(Path(home) / "bin"))
        if path:
            return path
    path = shutil.which("nvcc") or shutil.which("nvcc", path=str(USUAL_HOME / "bin"))
    if not path:
        places = [f"in {home}/bin" for home in homes] + ["on PATH", f"in {USUAL_HOME}/bin"]
        raise Unavailable(f"there is no nvcc {', '.join(places[:-1])} or {places[-1]}")
    return path


def host_options(compiler: Sequence[str]) -> tuple[str, ...]:
    """Options of nvcc for the host compiler, a command; none where NVCC_CCBIN names one, which nvcc reads itself."""
    if os.environ.get("NVCC_CCBIN"):
        return ()
    command = compiler[1:] if Path(compiler[0]).name in LAUNCHERS and len(compiler) > 1 else compiler
    return "-ccbin", command[0], *(word for option in command[1:] for word in ("-Xcompiler", option))


def wanted_architectures() -> list[str]:
    """TORCH_CUDA_ARCH_LIST, in torch's syntax, without what is too old for the kernels."""
    names = re.split(r"[\s;,]+", (os.environ.get("TORCH_CUDA_ARCH_LIST") or DEFAULT_ARCHITECTURES).strip(" ;,"))
    for name in names:
        if not re.fullmatch(r"\d+\.\d[af]?(\+PTX)?", name):
            raise fail(f"TORCH_CUDA_ARCH_LIST must list numbers such as {DEFAULT_ARCHITECTURES}, got {name!r}")
    old = [name for name in names if int(re.sub(r"\D", "", name)) < OLDEST_ARCHITECTURE]
    if old:
        log(f"the CUDA kernels need 8.0 or newer, {', '.join(old)} of TORCH_CUDA_ARCH_LIST is left out")
    if len(old) == len(names):
        raise Unavailable(f"TORCH_CUDA_ARCH_LIST names no architecture from 8.0 on, only {', '.join(old)}")
    return [name for name in dict.fromkeys(names) if name not in old]


def _known(cuda: CudaToolchain, wanted: Iterable[str]) -> tuple[str, ...]:
    """Those of `wanted` that this nvcc can compile for."""
    known, unknown = [], []
    for name in wanted:
        answer = _told(_dry_run(cuda.nvcc, *gencode([name])))
        (unknown if "Unsupported gpu architecture" in answer else known).append(name)
    if unknown:
        text = f"nvcc {cuda.version} cannot compile for {', '.join(unknown)} (TORCH_CUDA_ARCH_LIST chooses others)"
        if build_mode() == "cuda" or not known:
            raise Unavailable(text)
        log(f"{text}: left out")
    return tuple(known)


def _check_host_compiler(cuda: CudaToolchain) -> None:
    with tempfile.TemporaryDirectory() as directory:
        source = Path(directory, "empty.cu")
        source.write_text("__global__ void empty() {}\n", encoding="utf-8")
        command = [cuda.nvcc, *cuda.host, "-std=c++17", "-c", str(source), "-o", f"{source}.o"]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        lines = (done.stderr + done.stdout).splitlines() or ["it says nothing"]
        told = next((line for line in lines if re.search(r"error|fatal|unsupported", line, re.IGNORECASE)), lines[0])
        host = os.environ.get("NVCC_CCBIN") or cuda.host[1]
        raise Unavailable(
            f"nvcc {cuda.version} does not work with the host compiler {host}: {told.strip()} "
            "(NVCC_CCBIN can name another)"
        )


def gencode(architectures: Iterable[str]) -> list[str]:
    """Options of nvcc: machine code for each architecture, and PTX where asked for."""
    options = []
    for name in architectures:
        number = name.removesuffix("+PTX").replace(".", "")
        options.append(f"-gencode=arch=compute_{number},code=sm_{number}")
        if name.endswith("+PTX"):
            options.append(f"-gencode=arch=compute_{number},code=compute_{number}")
    return options


def kernel_sources() -> list[str]:
    return sorted(path.relative_to(ROOT).as_posix() for path in (ROOT / "csrc" / "cuda").glob("*.cu"))


def hopper_sources() -> list[str]:
    """Kernels that compile for Hopper alone."""
    return sorted(path.relative_to(ROOT).as_posix() for path in (ROOT / "csrc" / "cuda" / "sm90").glob("*.cu"))


def plan_sources() -> list[str]:
    """Plain C++, which the module `_C` has too."""
    return sorted(path.relative_to(ROOT).as_posix() for path in (ROOT / "csrc" / "cuda").glob("*.cpp"))


def ninja_lines(cuda: CudaToolchain, work: str, debug: bool, quote: Callable[[str], str]) -> list[str]:
    """What the ninja file has to say about the library. `quote`: for words of a command.

    - The CUDA run-time library is linked statically and its symbols are hidden: a shared one would be that of this
      nvcc's major version, which a torch for another one does not bring; two of them in a process share the context and
      the streams of the driver. So the library loads wherever torch does.
    - That torch is named by empty libraries, as for the CPU. libtorch_cuda.so is what has the current stream.
    - The torch-facing file goes through nvcc too, which hands it to the host compiler with CUDA's headers in its path.
    - The host compiler links: nvcc would put the libraries in an order of its own.
    - Without Hopper among the architectures its kernels stay out, and so does what registers them.
    """
    hopper = [name for name in cuda.architectures if name.removesuffix("+PTX") == HOPPER]
    for_hopper = hopper_sources() if hopper else []
    ops = ["csrc/ops_cuda.cpp", *["csrc/ops_hopper.cpp", "csrc/ops_hopper_channel.cpp"] * bool(hopper)]
    sources = [*ops, *kernel_sources(), *for_hopper]
    objects = [f"{work}/{source}.cuda.o" for source in sources] + [f"{work}/{source}.o" for source in plan_sources()]
    stubs = [f"{work}/stub/libtorch_cuda.so", f"{work}/stub/libtorch_cpu.so"]
    run_time = ["-lcudart_static", "-Wl,--exclude-libs,libcudart_static.a", "-ldl", "-lrt", "-lpthread"]
    lines = [
        f"nvcc = {' '.join(quote(word) for word in (cuda.nvcc, *cuda.host))}",
        f"nvcc_flags = {'-O0 -g' if debug else '-O3'} {FLAGS}",
        f"architectures = {' '.join(gencode(cuda.architectures))}",
        "rule compile_cuda",
        "  command = $nvcc $nvcc_flags $architectures $headers -MMD -MF $out.d -c $in -o $out",
        "  depfile = $out.d",
        "  deps = gcc",
        "  description = compile $in",
        f"build {stubs[0]}: stub",
    ]
    for source in sources:
        headers = f"-Xcompiler -Wall,-Wextra -isystem {work}/include/torch" if source.endswith(".cpp") else ""
        lines += [f"build {work}/{source}.cuda.o: compile_cuda {source}", f"  headers = {headers}"]
        lines += [f"  architectures = {' '.join(gencode(hopper))}"] * (source in for_hopper)
    return [
        *lines,
        f"build {work}/{CUDA_LIBRARY}: link {' '.join(objects)} | {' '.join(stubs)}",
        f"  libraries = -L{work}/stub -Wl,--no-as-needed -ltorch_cuda -ltorch_cpu -Wl,--as-needed "
        + " ".join([*map(quote, cuda.libraries), *run_time]),
    ]


def source_hash() -> str:
    """Of all that the library is made from, wherever and with whatever compiler."""
    files = {path for path in (ROOT / "csrc" / "cuda").rglob("*") if path.is_file()}
    names = ("ops_cuda.cpp", "ops_cuda.h", "ops_channel.h", "ops_hopper.cpp", "ops_hopper_channel.cpp")
    files |= {ROOT / "csrc" / name for name in (*names, "ops.h", "checks.h", "launch.h")}
    digest = hashlib.sha256()
    for path in sorted(files):
        digest.update(path.relative_to(ROOT).as_posix().encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:16]
