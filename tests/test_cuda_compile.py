"""The tool that compiles the CUDA kernels without a GPU: it finds what it looks for, and its table is complete."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import replace

import cuda_compile
import pytest
from cuda_compile import Row

ROW = Row("13.0", "8.0", "position_attention_forward", "bf16", 128, 2, 250, 0, 0, 0, 0, 384, 112, 10, 0, 0, 0)
HOPPER = Row("13.0", "9.0a", "position_attention_hopper_forward", "bf16", 384, 1, 168, 0, 0, 0, 0, 0, 8, 0, 32, 26, 0)


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({}, None),
        ({"spills": 3, "inner_spills": 1}, "3 spills, 1 of them in inner loops"),
        ({"spills": 8, "stack": 8}, None),
        ({"spills": 9, "stack": 8}, "9 spills, 0 of them in inner loops, and 8 bytes of stack"),
        ({"shared": 1024}, None),
        ({"shared": 1040}, "16 bytes of static shared memory"),
        ({"registers": 255}, None),
        ({"registers": 250, "blocks": 3}, "250 registers, too many for 3 blocks of 128 threads"),
        ({"mma": 0}, "no mma.sync"),
        ({"cp_async": 0}, "no cp.async"),
        ({"ldmatrix": 0}, "no ldmatrix"),
        ({"ldmatrix": 0, "dtype": "fp32"}, None),
        ({"kernel": "position_attention_delta", "mma": 0, "ldmatrix": 0, "cp_async": 0}, None),
    ],
)
def test_complaints(change, complaint):
    found = cuda_compile.complaints(replace(ROW, **change))
    assert any(complaint in text for text in found) if complaint else not found


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({}, None),
        ({"spills": 1, "stack": 8}, "1 spills, 0 of them in inner loops"),
        ({"wgmma": 0}, "no wgmma"),
        ({"multicast": 0}, "no multicast TMA load"),
        ({"serialized": 1}, "serialized wgmma"),
        ({"registers": 176}, "176 registers, too many for 1 blocks of 384 threads"),
        ({"kernel": "channel_attention_hopper_gram", "multicast": 0, "tma": 8}, None),
        ({"kernel": "channel_attention_hopper_gram", "multicast": 8, "tma": 0}, "no TMA load"),
    ],
)
def test_complaints_about_hopper_kernels(change, complaint):
    found = cuda_compile.complaints(replace(HOPPER, **change))
    assert len(found) == (complaint is not None)
    assert complaint is None or complaint in found[0]


def test_the_table_comes_back_as_written(tmp_path):
    rows = [replace(ROW, architecture=name, dtype=dtype) for name in ("12.0", "8.0") for dtype in ("fp32", "bf16")]
    cuda_compile.write(tmp_path / "table.tsv", rows)
    assert cuda_compile.read(tmp_path / "table.tsv") == {row.key: row for row in rows}
    assert cuda_compile.read(tmp_path / "no.tsv") == {}


def test_what_differs_from_the_table_is_said():
    known = {ROW.key: ROW}
    name = "8.0 position_attention_forward bf16"
    assert cuda_compile.differences(known, [replace(ROW, registers=242)], []) == []
    assert cuda_compile.differences(known, [replace(ROW, registers=241, mma=1)], []) == [
        f"{name}: registers 250 -> 241, mma 384 -> 1"
    ]
    assert cuda_compile.differences({}, [ROW], []) == [f"{name}: not in the table, --write adds it"]
    assert cuda_compile.differences(known, [], [ROW.key]) == [f"{name}: in the table, but no kernel any more"]


def kernels_of(folder: str) -> set[tuple[str, bool]]:
    """Their names, and whether they are made for each dtype."""
    text = "\n".join(path.read_text() for path in sorted((cuda_compile.ROOT / "csrc" / "cuda" / folder).glob("*.cuh")))
    found = re.findall(r"(template <class T>\n)?DANET_(?:CLUSTER_)?KERNEL\([^)]*\)\s+(\w+)_kernel\(", text)
    return {(name, bool(template)) for template, name in found}


def test_the_committed_table_has_every_kernel_and_no_other():
    kernels = kernels_of("sm80")
    assert len(kernels) > 5
    hopper = {(name, dtype) for name, _ in kernels_of("sm90") for dtype in ("bf16", "fp16")}
    assert len(hopper) > 5
    all_dtypes = {(name, dtype) for name, each in kernels for dtype in (("fp32", "bf16", "fp16") if each else ("-",))}
    bf16 = {(name, dtype) for name, dtype in all_dtypes if dtype in ("bf16", "-")}
    table = cuda_compile.read(cuda_compile.TABLE)
    assert table
    for release in {key[0] for key in table}:
        for architectures, expected in ((cuda_compile.BUILT, all_dtypes), (cuda_compile.OTHERS, bf16)):
            for architecture in architectures:
                more = hopper if architecture == cuda_compile.HOPPER else set()
                assert {key[2:] for key in table if key[:2] == (release, architecture)} == expected | more
    assert max(Counter(key[:2] for key in table).values()) <= cuda_compile.MOST_KERNELS
    assert [complaint for row in table.values() for complaint in cuda_compile.complaints(row)] == []


def test_bf16_instances_are_asked_for_by_name(tmp_path):
    header = cuda_compile.ROOT / "csrc" / "cuda" / "sm80" / "position_attention_delta.cuh"
    assert cuda_compile.bf16_source(header).splitlines() == [
        '#include "sm80/position_attention_delta.cuh"',
        "template __global__ void danet::position_attention_delta_kernel("
        "danet::PositionDeltaParameters<danet::BFloat16>);",
    ]
    assert cuda_compile.bf16_source(header.with_name("tile.cuh")) == ""


def test_what_ptxas_tells_of_serialized_products_is_understood():
    """As nvcc 13.0 prints it, on one line."""
    told = (
        "ptxas info    : (C7514) Potential Performance Loss: wgmma.mma_async instructions are serialized due to non "
        "wgmma instructions reading accumulator registers of  a wgmma between start and end of the pipeline stage in "
        "the function '_ZN5danet6kernelEv'\n"
    )
    assert cuda_compile.SERIALIZED.findall(told) == ["_ZN5danet6kernelEv"]


FAULTY = """#include "sm80/tile.cuh"
namespace danet {
struct FaultyParameters { float* out; int where; };
DANET_KERNEL(128, 16) faulty_kernel(FaultyParameters p) {
  float kept[64];
  for (int i = 0; i < 64; ++i) kept[(i * p.where) % 64] = p.out[i];
  for (int i = 0; i < 64; ++i) p.out[i] = kept[p.where ^ i];
}
}
"""


def test_a_faulty_kernel_is_found_out(tmp_path):
    """With the real nvcc: an array that is indexed at run time, and no product."""
    try:
        cuda_compile.build.find_nvcc()
        cuda_compile.find_cuobjdump()
    except cuda_compile.Unavailable as reason:
        pytest.skip(str(reason))
    source = tmp_path / "faulty.cu"
    source.write_text(FAULTY)
    (row,) = cuda_compile.compile_source(source, "8.0")
    assert (row.kernel, row.dtype, row.threads, row.blocks) == ("faulty", "-", 128, 16)
    found = " ".join(cuda_compile.complaints(row))
    assert re.search(r"[1-9]\d* spills, .* and 256 bytes of stack", found)
    assert "no mma.sync" in found
