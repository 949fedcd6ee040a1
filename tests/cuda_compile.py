"""Compiles the CUDA kernels for their architectures, without a GPU, and examines the machine code.

    python tests/cuda_compile.py                     all of it, compared with cuda_compiled.tsv
    python tests/cuda_compile.py --architecture 8.0 --only forward
    python tests/cuda_compile.py --write             and renew the table

Needs nvcc and a cuobjdump, of the toolkit or of Triton, and no torch. For 8.0 and 9.0a, which the build makes, the
files of csrc/cuda are compiled as they are and all kernels in them examined, for 9.0a also those of csrc/cuda/sm90; for
the others one bf16 instance of each. It fails on

- a spill in an inner loop, more than a few outside, static shared memory, or more registers than the launch bounds
  leave;
- a kernel with products that has none of mma.sync, cp.async and, for 16-bit operands, ldmatrix; a Hopper kernel that
  has none of wgmma and TMA loads, multicast ones where its blocks form clusters, or whose wgmma the compiler has
  serialized, or with any spill;
- more than 40 kernels for one architecture;
- an entry of the table for this nvcc that has changed (registers by more than 8), is missing, or of no use any more.
"""

from __future__ import annotations

import argparse
import re
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import astuple, dataclass, fields
from functools import cache, partial
from importlib.util import find_spec
from pathlib import Path

from sass import Instruction, parse, spills

ROOT = Path(__file__).resolve().parent.parent
TABLE = Path(__file__).with_name("cuda_compiled.tsv")
sys.path.insert(0, str(ROOT / "build_backend"))

import danet_build_cuda as build  # noqa: E402
from danet_build_env import Unavailable  # noqa: E402

BUILT = ("8.0", "9.0a")
OTHERS = ("8.6", "8.9", "10.0", "12.0")
HOPPER = "9.0a"
MOST_KERNELS = 40
REGISTERS = 65536  # of a multiprocessor
RESERVED = 1024  # bytes of shared memory that CUDA itself takes; from 10.0 on they are counted as the kernel's
TOLERANCE = 8  # registers
MOST_SPILLS = 8  # outside of inner loops: of values that are kept while a tile is computed
WITHOUT_PRODUCTS = (
    *("position_attention_delta", "channel_attention_softmax", "channel_attention_dgram"),
    *("position_attention_hopper_merge", "position_attention_hopper_dvalue_merge"),
)
SERIALIZED = re.compile(r"wgmma\.mma_async instructions are serialized .* in the function '(\w+)'")
"""What ptxas says, at length, where it finds no other way."""
TYPES = {"f": "fp32", "13__nv_bfloat16": "bf16", "6__half": "fp16", None: "-"}

Key = tuple[str, str, str, str]
"""Release of nvcc, architecture, kernel, dtype."""


@dataclass(frozen=True)
class Row:
    """One kernel as compiled: one line of the table."""

    nvcc: str
    architecture: str
    kernel: str
    dtype: str  # "-": the same for all
    threads: int  # of a block, at most
    blocks: int  # on a multiprocessor, at least
    registers: int  # of a thread
    stack: int  # bytes
    shared: int  # bytes, without those that a launch asks for
    spills: int  # loads and stores of local memory
    inner_spills: int  # those of them inside inner loops
    mma: int  # instructions that multiply tiles
    ldmatrix: int
    cp_async: int
    wgmma: int
    multicast: int  # TMA loads that go to all blocks of a cluster
    serialized: int  # whether the compiler makes each wgmma wait for the one before
    tma: int = 0  # TMA loads of all kinds

    @property
    def key(self) -> Key:
        return self.nvcc, self.architecture, self.kernel, self.dtype

    @property
    def name(self) -> str:
        return f"{self.architecture} {self.kernel} {self.dtype}"


# ---- from sources to rows


@cache
def nvcc_release() -> str:
    printed = subprocess.run([build.find_nvcc(), "--version"], capture_output=True, text=True, check=True).stdout
    return re.search(r"release ([\d.]+)", printed)[1]


def find_cuobjdump() -> str:
    places = [str(Path(build.find_nvcc()).parent), str(build.USUAL_HOME / "bin")]
    if find_spec("triton"):
        places.append(str(Path(find_spec("triton").origin).parent / "backends/nvidia/bin"))
    found = shutil.which("cuobjdump") or shutil.which("cuobjdump", path=":".join(places))
    if not found:
        raise Unavailable(f"there is no cuobjdump on PATH or in {', '.join(places)}: install Triton, which has one")
    return found


def bf16_source(header: Path) -> str:
    """A file that has the kernels of a header, those that are templates in bf16; empty if it has no kernel."""
    found = re.findall(
        r"(template <class T>\n)?DANET_KERNEL\([^)]*\)\s+(\w+)\((\w+)", header.read_text(encoding="utf-8")
    )
    wanted = [
        f"template __global__ void danet::{kernel}(danet::{parameters}<danet::BFloat16>);"
        for template, kernel, parameters in found
        if template
    ]
    include = header.relative_to(ROOT / "csrc" / "cuda").as_posix()
    return "\n".join([f'#include "{include}"', *wanted, ""]) if found else ""


def compile_source(source: Path, architecture: str) -> list[Row]:
    """All kernels of a .cu file. Raises CalledProcessError with nvcc's message where it does not compile."""
    number = architecture.replace(".", "")
    with tempfile.TemporaryDirectory() as directory:
        cubin = Path(directory, "code.cubin")
        command = [build.find_nvcc(), "-O3", *build.FLAGS.split(), f"-gencode=arch=compute_{number},code=sm_{number}"]
        command += ["-keep", "-keep-dir", directory, "-cubin", str(source), "-o", str(cubin)]
        told = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stderr
        ptx = next(Path(directory).glob("*.ptx")).read_text(encoding="utf-8")
        command = [find_cuobjdump(), "-sass", "-res-usage", str(cubin)]
        printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return rows_of(printed, ptx, told, nvcc_release(), architecture)


def rows_of(printed: str, ptx: str, told: str, nvcc: str, architecture: str) -> list[Row]:
    """From what cuobjdump -sass -res-usage prints, the PTX, which has the launch bounds, and what nvcc told."""
    serialized = SERIALIZED.findall(told)
    usage = r"Function (\S+):\s+REG:(\d+) STACK:(\d+) SHARED:(\d+)"
    resources = {symbol: tuple(map(int, numbers)) for symbol, *numbers in re.findall(usage, printed)}
    limits = r"\.entry (\w+)\([^{]*?\.maxntid (\d+)[^{]*?\.minnctapersm (\d+)"
    bounds = {symbol: (int(threads), int(blocks)) for symbol, threads, blocks in re.findall(limits, ptx)}
    parts = re.split(r"^\s+Function : (\S+)$", printed, flags=re.MULTILINE)
    bodies = dict(zip(parts[1::2], parts[2::2], strict=True))
    assert bodies.keys() == resources.keys() == bounds.keys(), "cuobjdump and the PTX name other kernels"
    rows = []
    for symbol, body in bodies.items():
        kernel, dtype = re.match(r"_ZN5danet\d+(\w+?)_kernel(?:I(f|13__nv_bfloat16|6__half)E)?E", symbol).groups()
        code = parse(body)
        assert code, f"no machine code of {symbol}"
        rows.append(
            Row(
                nvcc,
                architecture,
                kernel,
                TYPES[dtype],
                *bounds[symbol],
                *resources[symbol],
                *spills(code),
                *counts(code),
                int(symbol in serialized),
                sum(instruction.text.startswith("UTMALDG") for instruction in code),
            )
        )
    return rows


def counts(code: Sequence[Instruction]) -> tuple[int, int, int, int, int]:
    """How many instructions there are of mma.sync, ldmatrix, cp.async, wgmma and multicast TMA loads."""
    names = Counter(re.split(r"[. ]", instruction.text)[0] for instruction in code)
    multicast = sum(bool(re.match(r"UTMALDG\S*\.MULTICAST", instruction.text)) for instruction in code)
    return names["HMMA"], names["LDSM"], names["LDGSTS"], names["HGMMA"], multicast


def complaints(row: Row) -> list[str]:
    """What must not be, whatever the table says."""
    found = []
    is_hopper = "hopper" in row.kernel
    if row.inner_spills or row.spills > (0 if is_hopper else MOST_SPILLS):
        found.append(f"{row.spills} spills, {row.inner_spills} of them in inner loops, and {row.stack} bytes of stack")
    if row.shared > RESERVED:
        found.append(f"{row.shared - RESERVED} bytes of static shared memory, all of it is to come with the launch")
    warps = row.blocks * -(-row.threads // 32)
    allocated = 256 * -(-32 * row.registers // 256)  # of a warp
    if warps * allocated > REGISTERS:
        found.append(f"{row.registers} registers, too many for {row.blocks} blocks of {row.threads} threads")
    if row.serialized:
        found.append("serialized wgmma")
    if row.kernel not in WITHOUT_PRODUCTS:
        if is_hopper:
            alone = row.kernel.startswith("channel_attention")  # its blocks form no clusters
            needed = {"wgmma": row.wgmma, **({"TMA load": row.tma} if alone else {"multicast TMA load": row.multicast})}
        else:
            needed = {"mma.sync": row.mma, "cp.async": row.cp_async}
            needed |= {} if row.dtype == "fp32" else {"ldmatrix": row.ldmatrix}
        found += [f"no {name}" for name, count in needed.items() if not count]
    return found


# ---- the table


def read(path: Path) -> dict[Key, Row]:
    if not path.exists():
        return {}
    lines = [line.split("\t") for line in path.read_text(encoding="utf-8").splitlines()[1:]]
    rows = [Row(*line[:4], *map(int, line[4:])) for line in lines]
    return {row.key: row for row in rows}


def write(path: Path, rows: Iterable[Row]) -> None:
    names = [field.name for field in fields(Row)]
    lines = [names, *(map(str, astuple(row)) for row in sorted(rows, key=_order))]
    path.write_text("".join("\t".join(line) + "\n" for line in lines), encoding="utf-8")


def _order(row: Row) -> tuple[object, ...]:
    return row.nvcc, (*BUILT, *OTHERS).index(row.architecture), row.kernel, row.dtype


def differences(known: Mapping[Key, Row], new: Iterable[Row], stale: Iterable[Key]) -> list[str]:
    """Where the table and the rows just made differ. `stale`: its keys that belong to no kernel any more."""
    found = []
    for row in new:
        old = known.get(row.key)
        if old is None:
            found.append(f"{row.name}: not in the table, --write adds it")
            continue
        changed = {
            field.name: (getattr(old, field.name), getattr(row, field.name))
            for field in fields(Row)
            if getattr(old, field.name) != getattr(row, field.name)
        }
        if abs(old.registers - row.registers) <= TOLERANCE:
            changed.pop("registers", None)
        if changed:
            told = ", ".join(f"{name} {before} -> {after}" for name, (before, after) in changed.items())
            found.append(f"{row.name}: {told}")
    return found + [f"{' '.join(key[1:])}: in the table, but no kernel any more" for key in sorted(stale)]


# ---- the command line


def tasks(architectures: Iterable[str], only: str, directory: Path) -> list[tuple[Path, str]]:
    """The files to compile, and for what; those with bf16 instances are written into `directory`."""
    listed = []
    for architecture in architectures:
        if architecture in BUILT:
            sources = build.kernel_sources() + (build.hopper_sources() if architecture == HOPPER else [])
            listed += [(ROOT / source, architecture) for source in sources]
        else:
            for header in sorted((ROOT / "csrc" / "cuda").glob("sm80/*.cuh")):
                source = directory / f"{header.stem}.cu"
                source.write_text(bf16_source(header), encoding="utf-8")
                if only in source.read_text(encoding="utf-8") and source.stat().st_size:
                    listed.append((source, architecture))
    return listed


def _compile(task: tuple[Path, str]) -> tuple[list[Row], list[str]]:
    source, architecture = task
    try:
        return compile_source(source, architecture), []
    except subprocess.CalledProcessError as error:  # one that does not compile must not hide the others
        return [], [f"{architecture} {source.name} does not compile:\n{error.stderr}"]


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--architecture", nargs="+", choices=BUILT + OTHERS, default=BUILT + OTHERS)
    parser.add_argument("--only", default="", help="kernels whose name contains this")
    parser.add_argument("--write", action="store_true", help="renew the table")
    parser.add_argument("--table", type=Path, default=TABLE)
    parser.add_argument("--processes", type=int, default=2)
    given = parser.parse_args(arguments)
    rows, failures = [], []
    names = [field.name for field in fields(Row)][4:]
    try:
        print(f"nvcc {nvcc_release()}, {find_cuobjdump()}\n")
    except Unavailable as reason:
        parser.error(str(reason))
    print("".join(f"{name:>{len(name) + 2}}" for name in names), "", "kernel", flush=True)
    with tempfile.TemporaryDirectory() as directory, ThreadPoolExecutor(given.processes) as pool:
        for new, wrong in pool.map(_compile, tasks(given.architecture, given.only, Path(directory))):
            failures += wrong
            for row in filter(partial(_wanted, given.only), new):
                rows.append(row)
                failures += [f"{row.name}: {complaint}" for complaint in complaints(row)]
                print("".join(f"{getattr(row, name):>{len(name) + 2}}" for name in names), "", row.name, flush=True)
    for architecture, count in Counter(row.architecture for row in rows).items():
        if count > MOST_KERNELS:
            failures.append(f"{count} kernels for {architecture}, at most {MOST_KERNELS} are allowed")
    table = read(given.table)
    made = {row.key for row in rows}
    stale = {
        key
        for key, row in table.items()
        if key[0] == nvcc_release() and key[1] in given.architecture and _wanted(given.only, row) and key not in made
    }
    if given.write:
        write(
            given.table,
            ({key: row for key, row in table.items() if key not in stale} | {r.key: r for r in rows}).values(),
        )
    elif any(key[0] == nvcc_release() for key in table):
        failures += differences(table, rows, stale)
    else:
        print(f"\nthe table has nothing for nvcc {nvcc_release()}, so nothing was compared with it")
    print("\n" + "\n".join(failures or [f"{len(rows)} kernels as they should be"]))
    return 1 if failures else 0


def _wanted(only: str, row: Row) -> bool:
    return only in row.kernel


if __name__ == "__main__":
    sys.exit(main())
