"""The tool that compiles the Triton kernels ahead of time: it finds what it looks for, and its table is complete.

Run as a script, without TRITON_INTERPRET, the file compiles a product of its own and prints what the tool says of it.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import pytest

triton = pytest.importorskip("triton")
import sass
import triton.language as tl
import triton_compile
from triton_compile import Row

ROW = Row("1.0", 90, "kernel", 200, 1024, 0, 0, "wgmma")

# Two loops, one inside the other, and the waiting of the inner one behind the end, as the compiler lays them out.
NESTED = """
        /*0000*/                   STL [R1], R2 ;                     /* 0x0 */
        /*0010*/                   HMMA.16816.F32 R4, R8, R6, R4 ;    /* 0x0 */
        /*0020*/                   LDL R2, [R1] ;                     /* 0x0 */
        /*0030*/                   SYNCS.PHASECHK.TRYWAIT P0, [UR9] ; /* 0x0 */
        /*0040*/              @!P0 BRA 0xb0 ;                         /* 0x0 */
        /*0050*/                   HMMA.16816.F32 R4, R8, R6, R4 ;    /* 0x0 */
        /*0060*/               @P1 BRA 0x30 ;                         /* 0x0 */
        /*0070*/                   STL [R1+0x4], R2 ;                 /* 0x0 */
        /*0080*/                   BRA.U UP0, 0x10 ;                  /* 0x0 */
        /*0090*/               @P2 EXIT ;                             /* 0x0 */
        /*00a0*/                   EXIT ;                             /* 0x0 */
        /*00b0*/                   LDL.LU R3, [R1+0x8] ;              /* 0x0 */
        /*00c0*/              @!P0 BRA 0xb0 ;                         /* 0x0 */
        /*00d0*/                   BRA 0x50 ;                         /* 0x0 */
        /*00e0*/                   BRA 0xe0;                          /* 0x0 */
"""


@triton.jit
def product_kernel(
    a,  # [M, n] descriptor or pointer
    b,  # [N, n] descriptor or pointer
    out,  # [M, N] fp32 pointer
    n,
    M: tl.constexpr,
    N: tl.constexpr,
    K: tl.constexpr,
    DESCRIPTOR: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """out = a @ b^T. Grid: (1,)."""
    offs_m, offs_n, offs_k = tl.arange(0, M), tl.arange(0, N), tl.arange(0, K)
    acc = tl.zeros([M, N], tl.float32)
    for first in range(0, n, K):
        if DESCRIPTOR:
            left = a.load([0, 0, first]).reshape([M, K])
            right = b.load([0, 0, first]).reshape([N, K])
        else:
            left = tl.load(a + offs_m[:, None] * n + (first + offs_k)[None, :])  # [M, K]
            right = tl.load(b + offs_n[:, None] * n + (first + offs_k)[None, :])  # [N, K]
        acc = tl.dot(left, tl.trans(right), acc, input_precision=PRECISION)
    tl.store(out + offs_m[:, None] * N + offs_n[None, :], acc)


@dataclass(frozen=True)
class Product:
    """As a CompileCase of the package."""

    dtype: str = "bf16"
    N: int = 128
    descriptor: bool = True
    num_stages: int = 2
    num_warps: int = 8
    name: str = "product"
    kernel: Any = product_kernel

    @property
    def signature(self) -> dict[str, str]:
        kinds = {name: f"tensordesc<{self.dtype}[1, {rows}, 64]>" for name, rows in (("a", 128), ("b", self.N))}
        if not self.descriptor:
            kinds = dict.fromkeys(kinds, f"*{self.dtype}")
        return kinds | {"out": "*fp32", "n": "i32"}

    @property
    def constexprs(self) -> dict[str, Any]:
        return {"M": 128, "N": self.N, "K": 64, "DESCRIPTOR": self.descriptor, "PRECISION": "ieee"}

    @property
    def divisible_by_16(self) -> list[str]:
        return [name for name, kind in self.signature.items() if not kind.startswith("tensordesc")]


# What is compiled, and what the tool must say of it.
PRODUCTS: dict[str, tuple[int, Product, str]] = {
    "sm_80": (80, Product(descriptor=False), ""),
    "sm_90": (90, Product(), ""),
    "sm_100": (100, Product(), ""),
    "sm_120": (120, Product(), ""),
    "an accumulator larger than the registers": (80, Product(N=512, descriptor=False), "spills inside inner loops"),
    "more stages than fit": (90, Product(num_stages=8), "bytes of shared memory, the limit is"),
    "fp32 without tf32": (90, Product("fp32"), "products without tensor cores"),
    "descriptors that nothing reads": (80, Product(), "no loads by the TMA unit"),
}


def compiled() -> dict[str, tuple[dict[str, Any], list[str]]]:
    triton_compile.cases(80)  # the package, of which the tool asks the limits
    results = {name: triton_compile.compile_case(product, sm) for name, (sm, product, _) in PRODUCTS.items()}
    return {name: (asdict(row), complaints) for name, (row, complaints) in results.items()}


@pytest.fixture(scope="module")
def results(tmp_path_factory) -> dict[str, tuple[dict[str, Any], list[str]]]:
    environment = {name: text for name, text in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path_factory.mktemp("triton"))
    done = subprocess.run([sys.executable, __file__], env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize("name", PRODUCTS)
def test_a_product(name, results):
    row, complaints = results[name]
    expected = PRODUCTS[name][2]
    if expected:
        assert any(expected in complaint for complaint in complaints), (row, complaints)
    else:
        assert not complaints, row
        assert row["tensor_cores"] == {80: "mma.sync", 90: "wgmma", 100: "tcgen05", 120: "mma.sync"}[row["sm"]]
        assert 32 < row["registers"] < 255
        assert row["spills"] == row["inner_spills"] == 0


def test_spills_are_counted_where_they_are():
    """The loop around the innermost one is none of those that count; the waiting belongs to the innermost."""
    code = sass.parse(NESTED)
    assert len(code) == 15
    assert sass.spills(code) == (4, 1)
    assert sass.tensor_cores(code) == "mma.sync"
    assert sorted(map(len, sass.loops(code))) == [2, 7, 11]  # the wait, the inner loop with it, the outer one


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({}, None),
        ({"inner_spills": 2}, "2 spills inside inner loops"),
        ({"spills": 2}, None),
        ({"shared": 227 * 1024}, None),
        ({"shared": 227 * 1024 + 1}, "the limit is 232448"),
        ({"sm": 89, "tensor_cores": "mma.sync", "shared": 99 * 1024 + 1}, "the limit is 101376"),
        ({"tensor_cores": "none"}, "products without tensor cores"),
        ({"tensor_cores": "mma.sync"}, "by mma.sync, not by wgmma"),
    ],
)
def test_complaints(change, complaint):
    triton_compile.cases(80)
    found = triton_compile.complaints(replace(ROW, **change), True, ["*bf16"], False)
    assert any(complaint in text for text in found) if complaint else not found


def test_the_table_comes_back_as_written(tmp_path):
    rows = [replace(ROW, sm=sm, kernel=f"{kernel} bf16") for sm in (120, 80) for kernel in "ba"]
    triton_compile.write(tmp_path / "table.tsv", rows)
    assert triton_compile.read(tmp_path / "table.tsv") == {row.key: row for row in rows}
    assert triton_compile.read(tmp_path / "no.tsv") == {}


def test_what_differs_from_the_table_is_said(monkeypatch):
    monkeypatch.setattr(triton, "__version__", "1.0")
    known = {ROW.key: ROW}
    assert triton_compile.differences(known, [ROW], []) == []
    assert triton_compile.differences(known, [replace(ROW, registers=201, shared=1)], []) == [
        "sm_90 kernel: registers 200 -> 201, shared 1024 -> 1"
    ]
    assert triton_compile.differences(known, [replace(ROW, kernel="other")], []) == ["sm_90 other: not in the table"]
    assert triton_compile.differences(known, [], [ROW.key]) == ["sm_90 kernel: in the table, but no case any more"]
    assert "nothing for Triton 1.0" in triton_compile.differences({}, [ROW], [])[0]


def test_the_committed_table_has_every_case_and_no_other():
    """For the oldest version of Triton that is supported, and for the one that CI interprets with."""
    expected = {(sm, name) for sm in triton_compile.ARCHITECTURES for name in triton_compile.cases(sm)}
    table = triton_compile.read(triton_compile.TABLE)
    assert {version for version, _, _ in table} == {"3.6.0", "3.8.0"}
    for version in ("3.6.0", "3.8.0"):
        assert {(sm, name) for known, sm, name in table if known == version} == expected
    assert not any(row.inner_spills for row in table.values())


def test_the_kernels_are_compiled_without_torch():
    """A second version of Triton lies in a directory without one."""
    script = "import sys; sys.modules['torch'] = None; import triton_compile; print(len(triton_compile.cases(90)))"
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=Path(__file__).parent, capture_output=True, text=True, timeout=100
    )
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) > 10


def test_interpreted_kernels_are_refused():
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    done = subprocess.run(
        [sys.executable, triton_compile.__file__], env=environment, capture_output=True, text=True, timeout=100
    )
    assert done.returncode == 2
    assert "nothing can be compiled with TRITON_INTERPRET=1" in done.stderr


if __name__ == "__main__":
    print(json.dumps(compiled()))
