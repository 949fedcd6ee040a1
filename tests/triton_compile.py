"""Compiles every tile configuration of the Triton kernels for its architectures, without a GPU, and examines the code.

    python tests/triton_compile.py                  all of them, compared with triton_compiled.tsv
    python tests/triton_compile.py --sm 90 --only forward
    python tests/triton_compile.py --write          and renew the table

Needs Triton and nothing else (no torch), so that a second version of it can lie beside the first, and a process of its
own, without TRITON_INTERPRET. What danet_kernels/backends/triton/compile_cases.py lists is compiled; from the machine
code come registers, spills and where they are, shared memory and the tensor core instructions. It fails on

- a spill inside an inner loop: an innermost loop among those that hold tensor core instructions;
- more shared memory than the architecture has;
- a product without tensor cores, or one of 16-bit operands without wgmma on sm_90 or tcgen05 on sm_100;
- tensor descriptors that are not read by the TMA unit;
- an entry of the table for this version of Triton that has changed, is missing, or is of no use any more.
"""

from __future__ import annotations

import argparse
import importlib
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import astuple, dataclass, fields
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import triton
from sass import parse, spills, tensor_cores
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

ROOT = Path(__file__).resolve().parent.parent
TABLE = Path(__file__).with_name("triton_compiled.tsv")
ARCHITECTURES = (80, 86, 89, 90, 100, 120)
TOOLS = Path(triton.__file__).parent / "backends/nvidia/bin"

Key = tuple[str, int, str]
"""Version of Triton, architecture, name of a case."""


@dataclass(frozen=True)
class Row:
    """What became of one case: one line of the table."""

    triton: str
    sm: int
    kernel: str
    registers: int
    shared: int  # bytes
    spills: int  # loads and stores of local memory
    inner_spills: int  # those of them inside inner loops
    tensor_cores: str  # which instructions, or "none"

    @property
    def key(self) -> Key:
        return self.triton, self.sm, self.kernel


# ---- one case


@cache
def cases(sm: int) -> dict[str, Any]:
    """The compile cases for an architecture by name, loaded without danet_kernels/__init__.py, which imports torch."""
    if "danet_kernels" not in sys.modules:
        for package in ("danet_kernels", "danet_kernels.backends", "danet_kernels.backends.triton"):
            module = sys.modules[package] = ModuleType(package)
            module.__path__ = [str(ROOT.joinpath(*package.split(".")))]
    listed = list(importlib.import_module("danet_kernels.backends.triton.compile_cases").compile_cases(sm))
    by_name = {case.name: case for case in listed}
    assert len(by_name) == len(listed), f"two cases of sm_{sm} have one name"
    return by_name


def compile_case(case: Any, sm: int) -> tuple[Row, list[str]]:
    """Compile it, and say what is wrong with the result."""
    names = case.kernel.arg_names
    signature = {name: "constexpr" if name in case.constexprs else case.signature[name] for name in names}
    attributes = {(names.index(name),): [["tt.divisibility", 16]] for name in case.divisible_by_16}
    source = ASTSource(case.kernel, signature, case.constexprs, attributes)
    options = {"num_warps": case.num_warps, "num_stages": case.num_stages}
    compiled = triton.compile(source, target=GPUTarget("cuda", sm, 32), options=options)
    printed = _disassembled(compiled.asm["cubin"])
    code = parse(printed)
    registers = re.search(r"REG:(\d+)", printed)
    assert code, "no machine code in what cuobjdump prints"
    assert registers, "no registers in what cuobjdump prints"
    row = Row(
        triton.__version__,
        sm,
        case.name,
        int(registers[1]),
        compiled.metadata.shared,
        *spills(code),
        tensor_cores(code),
    )
    kinds = [kind for name, kind in signature.items() if kind != "constexpr"]
    reads_tma = any(instruction.text.startswith("UTMALDG") for instruction in code)
    return row, complaints(row, "tt.dot " in compiled.asm["ttir"], kinds, reads_tma)


def _disassembled(cubin: bytes) -> str:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [str(TOOLS / "cuobjdump"), "-sass", "-res-usage", file.name]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def complaints(row: Row, multiplies: bool, kinds: Sequence[str], reads_tma: bool) -> list[str]:
    """What must not be, whatever the table says. `kinds`: the types of the arguments that are no constants."""
    limits = importlib.import_module("danet_kernels.backends.triton.configs")
    limit = 1024 * limits.SHARED_MEMORY[limits.family(row.sm)]
    wanted = {90: "wgmma", 100: "tcgen05"}.get(row.sm, "mma.sync")
    found = []
    if row.inner_spills:
        found.append(f"{row.inner_spills} spills inside inner loops")
    if row.shared > limit:
        found.append(f"{row.shared} bytes of shared memory, the limit is {limit}")
    if multiplies and row.tensor_cores == "none":
        found.append("products without tensor cores")
    if multiplies and any("16" in kind for kind in kinds) and wanted not in row.tensor_cores:
        found.append(f"products of 16-bit operands by {row.tensor_cores}, not by {wanted}")
    if any(kind.startswith("tensordesc") for kind in kinds) and not reads_tma:
        found.append("tensor descriptors, but no loads by the TMA unit")
    return found


def _compile_named(task: tuple[int, str]) -> tuple[Row | None, list[str]]:
    sm, name = task
    try:
        return compile_case(cases(sm)[name], sm)
    except Exception as error:  # one that does not compile must not hide the others
        return None, [f"does not compile: {type(error).__name__}: {error}"]


# ---- the table


def read(path: Path) -> dict[Key, Row]:
    if not path.exists():
        return {}
    lines = [line.split("\t") for line in path.read_text(encoding="utf-8").splitlines()[1:]]
    rows = [Row(line[0], int(line[1]), line[2], *map(int, line[3:7]), line[7]) for line in lines]
    return {row.key: row for row in rows}


def write(path: Path, rows: Iterable[Row]) -> None:
    names = [field.name for field in fields(Row)]
    lines = [names, *(map(str, astuple(row)) for row in sorted(rows, key=lambda row: row.key))]
    path.write_text("".join("\t".join(line) + "\n" for line in lines), encoding="utf-8")


def differences(known: Mapping[Key, Row], new: Iterable[Row], stale: Iterable[Key]) -> list[str]:
    """Where the table and the rows just made differ. `stale`: its keys that belong to no case any more."""
    found = []
    if not any(version == triton.__version__ for version, _, _ in known):
        return [f"the table has nothing for Triton {triton.__version__}: --write adds it"]
    for row in new:
        old = known.get(row.key)
        if old is None:
            found.append(f"sm_{row.sm} {row.kernel}: not in the table")
        elif old != row:
            changed = [
                f"{field.name} {getattr(old, field.name)} -> {getattr(row, field.name)}"
                for field in fields(Row)
                if getattr(old, field.name) != getattr(row, field.name)
            ]
            found.append(f"sm_{row.sm} {row.kernel}: {', '.join(changed)}")
    return found + [f"sm_{sm} {kernel}: in the table, but no case any more" for _, sm, kernel in sorted(stale)]


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sm", type=int, nargs="+", choices=ARCHITECTURES, default=ARCHITECTURES, metavar="SM")
    parser.add_argument("--only", default="", help="cases whose name contains this")
    parser.add_argument("--write", action="store_true", help="renew the table")
    parser.add_argument("--table", type=Path, default=TABLE)
    parser.add_argument("--processes", type=int, default=2)
    given = parser.parse_args(arguments)
    if os.environ.get("TRITON_INTERPRET") == "1":
        parser.error("nothing can be compiled with TRITON_INTERPRET=1")
    tasks = [(sm, name) for sm in given.sm for name in cases(sm) if given.only in name]
    rows, failures = [], []
    print(f"Triton {triton.__version__}, {len(tasks)} compilations\n")
    print(f"{'sm':>3} {'regs':>4} {'shared':>7} {'spills':>6} {'inner':>5}  {'tensor cores':<14} kernel", flush=True)
    with ProcessPoolExecutor(given.processes) as pool:
        for (sm, name), (row, wrong) in zip(tasks, pool.map(_compile_named, tasks), strict=True):
            failures += [f"sm_{sm} {name}: {complaint}" for complaint in wrong]
            if row is not None:
                rows.append(row)
                print(
                    f"{sm:>3} {row.registers:>4} {row.shared:>7} {row.spills:>6} {row.inner_spills:>5}  "
                    f"{row.tensor_cores:<14} {name}",
                    flush=True,
                )
    table = read(given.table)
    ran = {(triton.__version__, sm, name) for sm, name in tasks}
    stale = {
        key
        for key in table
        if key[0] == triton.__version__ and key[1] in given.sm and given.only in key[2] and key not in ran
    }
    if given.write:
        kept = {key: row for key, row in table.items() if key not in stale}
        write(given.table, (kept | {row.key: row for row in rows}).values())
    else:
        failures += differences(table, rows, stale)
    print("\n" + "\n".join(failures or [f"{len(rows)} cases as they should be"]))
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
