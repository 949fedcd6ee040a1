"""The CUDA half of the build: the nvcc it finds, the GPUs it compiles for, and what it leaves behind."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

import danet_build_cuda as build
import danet_build_env as env
import danet_build_native as native
import danet_kernels

PACKAGE = Path(danet_kernels.__file__).resolve().parent
CUDA_LIBRARY = PACKAGE / build.CUDA_LIBRARY
VARIABLES = ("DANET_BUILD", "DANET_SANITIZE", "CUDA_HOME", "CUDA_PATH", "TORCH_CUDA_ARCH_LIST", "NVCC_CCBIN")

needs_library = pytest.mark.skipif(not CUDA_LIBRARY.exists(), reason="this build has no CUDA library")

NVCC = """#!/bin/sh
case "$*" in
  *--version*) echo "Cuda compilation tools, release 12.4, V12.4.131" ;;
  *compute_100*) echo "nvcc fatal   : Unsupported gpu architecture 'compute_100'" >&2; exit 1 ;;
  *--dryrun*) echo '#$ LIBRARIES=  "-L/opt/cuda/lib/stubs" "-L/opt/cuda/lib"' >&2 ;;
  *clang-99*) echo "host_config.h:90: error: -- unsupported clang version!" >&2; exit 1 ;;
esac
"""


@pytest.fixture
def machine(tmp_path, monkeypatch):
    """One without nvcc: the directory that its PATH consists of."""
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
    directory = tmp_path / "bin"
    directory.mkdir()
    monkeypatch.setenv("PATH", str(directory))
    monkeypatch.setattr(build, "USUAL_HOME", tmp_path / "usual")
    return directory


def add_nvcc(directory: Path) -> str:
    directory.mkdir(exist_ok=True, parents=True)
    nvcc = directory / "nvcc"
    nvcc.write_text(NVCC)
    nvcc.chmod(0o755)
    return str(nvcc)


# ---- what there is to build with


def test_nvcc_is_looked_for_in_the_named_toolkits_first(machine, tmp_path, monkeypatch):
    with pytest.raises(env.Unavailable, match=r"there is no nvcc on PATH or in .*usual/bin"):
        build.find_nvcc()
    usual = add_nvcc(tmp_path / "usual" / "bin")
    assert build.find_nvcc() == usual
    on_path = add_nvcc(machine)
    assert build.find_nvcc() == on_path
    for name in ("CUDA_PATH", "CUDA_HOME"):
        monkeypatch.setenv(name, str(tmp_path / name))
        nvcc = add_nvcc(tmp_path / name / "bin")
        assert build.find_nvcc() == nvcc


def test_the_reason_names_every_place(machine, monkeypatch):
    monkeypatch.setenv("CUDA_HOME", "/opt/nothing")
    with pytest.raises(env.Unavailable, match=r"no nvcc in /opt/nothing/bin, on PATH or in"):
        build.find_cuda(["g++"])


def test_a_toolchain_is_found_whole(machine):
    nvcc = add_nvcc(machine)
    libraries = ("-L/opt/cuda/lib/stubs", "-L/opt/cuda/lib")
    assert build.find_cuda(["ccache", "g++", "-pipe"]) == build.CudaToolchain(
        nvcc, "12.4.131", ("-ccbin", "g++", "-Xcompiler", "-pipe"), libraries, ("8.0+PTX", "9.0a")
    )


def test_the_host_compiler_can_be_named_for_nvcc_alone(machine, monkeypatch):
    add_nvcc(machine)
    with pytest.raises(
        env.Unavailable, match=r"nvcc 12.4.131 does not work with the host compiler /x/clang-99: .*unsup"
    ):
        build.find_cuda(["/x/clang-99"])
    monkeypatch.setenv("NVCC_CCBIN", "/x/g++-13")
    assert build.find_cuda(["/x/clang-99"]).host == ()


@pytest.mark.parametrize(
    ("variable", "value", "reason"),
    [("DANET_BUILD", "cpu", "DANET_BUILD=cpu was set"), ("DANET_SANITIZE", "address", "DANET_SANITIZE leave")],
)
def test_some_builds_go_without(machine, monkeypatch, variable, value, reason):
    add_nvcc(machine)
    monkeypatch.setenv(variable, value)
    with pytest.raises(env.Unavailable, match=reason):
        build.find_cuda(["g++"])


# ---- architectures


@pytest.mark.parametrize(
    ("value", "wanted"),
    [
        ("", ["8.0+PTX", "9.0a"]),
        ("8.0 8.6+PTX;9.0a", ["8.0", "8.6+PTX", "9.0a"]),
        (" 12.0 ; 10.0f,8.0; 8.0 ", ["12.0", "10.0f", "8.0"]),
        ("7.5 8.9", ["8.9"]),
    ],
)
def test_architectures_are_in_torchs_syntax(machine, monkeypatch, value, wanted):
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", value)
    assert build.wanted_architectures() == wanted


@pytest.mark.parametrize("value", ["Ampere", "80", "8.0+SASS", "8.0;all"])
def test_other_words_end_the_build_with_a_sentence(machine, monkeypatch, value):
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", value)
    with pytest.raises(SystemExit, match=r"must list numbers such as 8.0\+PTX;9.0a, got"):
        build.wanted_architectures()


def test_old_architectures_alone_make_no_library(machine, monkeypatch):
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "6.1;7.5+PTX")
    with pytest.raises(env.Unavailable, match=r"from 8.0 on, only 6.1, 7.5\+PTX"):
        build.wanted_architectures()


def test_an_architecture_that_nvcc_does_not_know(machine, monkeypatch, capsys):
    """Left out with a note, unless the CUDA library was asked for or nothing would be left."""
    add_nvcc(machine)
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "8.0;10.0")
    assert build.find_cuda(["g++"]).architectures == ("8.0",)
    assert "nvcc 12.4.131 cannot compile for 10.0" in capsys.readouterr().err
    monkeypatch.setenv("DANET_BUILD", "cuda")
    with pytest.raises(env.Unavailable, match=r"cannot compile for 10.0"):
        build.find_cuda(["g++"])
    monkeypatch.setenv("DANET_BUILD", "auto")
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "10.0")
    with pytest.raises(env.Unavailable, match=r"cannot compile for 10.0"):
        build.find_cuda(["g++"])


def test_options_of_nvcc():
    assert build.gencode(["8.0+PTX", "9.0a"]) == [
        "-gencode=arch=compute_80,code=sm_80",
        "-gencode=arch=compute_80,code=compute_80",
        "-gencode=arch=compute_90a,code=sm_90a",
    ]


# ---- what is built


def toolchains(directory: Path) -> tuple[env.Toolchain, build.CudaToolchain]:
    torch = env.TorchHeaders(directory, "2.13.0")
    toolchain = env.Toolchain(("g++",), "g++ 99.9", "ninja", directory, directory, "3.0", torch)
    cuda = build.CudaToolchain(
        "/opt/my cuda/nvcc", "12.4", ("-ccbin", "g++"), ("-L/opt/cuda/lib",), ("8.0+PTX", "9.0a")
    )
    return toolchain, cuda


def test_the_ninja_file_has_the_cuda_library_only_with_nvcc(machine, tmp_path):
    toolchain, cuda = toolchains(tmp_path)
    assert "nvcc" not in native.ninja_text(toolchain, None, "build/here")
    text = native.ninja_text(toolchain, cuda, "build/here")
    assert "nvcc = '/opt/my cuda/nvcc' -ccbin g++\n" in text
    assert str(native.ROOT) not in text
    sources = ["csrc/ops_cuda.cpp", "csrc/cuda/position_attention.cu", "csrc/cuda/channel_attention.cu"]
    assert all(text.count(f"compile_cuda {source}\n") == 1 for source in sources)
    (link,) = re.findall(r"^build build/here/_danet_cuda.so: link .*\n.*\n", text, re.M)
    for source in (*sources, "csrc/cuda/plan.cpp", "csrc/cuda/channel_plan.cpp"):
        assert source in link
    for source in build.hopper_sources():
        assert f"compile_cuda {source}\n  headers = \n  architectures = {' '.join(build.gencode(['9.0a']))}\n" in text
        assert source in link
    assert "csrc/ops_hopper.cpp" in link
    assert "-ltorch_cuda" in link
    assert "--exclude-libs,libcudart_static.a" in link


def test_the_hopper_kernels_are_left_out_where_hopper_is(machine, tmp_path):
    toolchain, cuda = toolchains(tmp_path)
    text = native.ninja_text(toolchain, replace(cuda, architectures=("8.0+PTX", "8.6")), "build/here")
    assert "sm90" not in text
    assert "hopper" not in text


def test_the_build_info_records_the_cuda_library(machine, tmp_path):
    toolchain, cuda = toolchains(tmp_path)
    native.write_build_info(tmp_path, "1.2.3", toolchain, None, cuda, None)
    info = json.loads((tmp_path / native.BUILD_INFO).read_text())
    assert (info["cuda_library"], info["nvcc"], info["cuda_archs"]) == (True, "12.4", ["8.0+PTX", "9.0a"])
    assert info["cuda_source_hash"] == build.source_hash()
    assert info["reasons"] == {"native": None, "cuda": None}
    native.write_build_info(tmp_path, "1.2.3", toolchain, None, None, "there is no nvcc")
    info = json.loads((tmp_path / native.BUILD_INFO).read_text())
    assert (info["cuda_library"], info["nvcc"], info["cuda_archs"]) == (False, None, [])
    assert info["cuda_source_hash"] is None
    assert info["reasons"] == {"native": None, "cuda": "there is no nvcc"}


@pytest.mark.parametrize("mode", ["auto", "cuda"])
def test_kernels_that_do_not_compile_are_left_out_unless_asked_for(machine, tmp_path, monkeypatch, mode):
    """Ninja is a stand-in: as a whole it fails, for the other libraries it succeeds."""
    monkeypatch.setenv("DANET_BUILD", mode)
    toolchain, cuda = toolchains(tmp_path)
    monkeypatch.setattr(native, "ROOT", tmp_path)
    monkeypatch.setattr(native, "_work_directory", lambda toolchain: tmp_path / "build")
    monkeypatch.setattr(native, "ninja_text", lambda *arguments: "")
    monkeypatch.setattr(native, "_run_ninja", lambda toolchain, work, *arguments: arguments[0] != "-k")
    (tmp_path / "build" / "include").mkdir(parents=True)
    for name in native.LIBRARIES:
        (tmp_path / "build" / name).touch()
    (tmp_path / "package").mkdir()
    (tmp_path / "package" / build.CUDA_LIBRARY).touch()  # of an earlier build
    if mode == "cuda":
        with pytest.raises(SystemExit, match="the CUDA kernels do not compile"):
            native.build(toolchain, cuda, tmp_path / "package")
    else:
        assert native.build(toolchain, cuda, tmp_path / "package") is False
        assert {path.name for path in (tmp_path / "package").iterdir()} == set(native.LIBRARIES)


def test_a_cuda_build_that_cannot_be_ends_with_a_sentence(machine, tmp_path):
    """In a process of its own, as pip runs it: without nvcc, DANET_BUILD=cuda must not install anything else."""
    shutil.copy(build.ROOT / "setup.py", tmp_path)
    shutil.copy(build.ROOT / "pyproject.toml", tmp_path)
    shutil.copytree(build.ROOT / "build_backend", tmp_path / "build_backend")
    (tmp_path / "build_backend" / "danet_build_cuda.py").write_text(
        (build.ROOT / "build_backend" / "danet_build_cuda.py").read_text().replace('"/usr/local/cuda"', '"/no/toolkit"')
    )
    script = (
        "import sys; sys.path.insert(0, 'build_backend'); import danet_build_env as env\n"
        "env.find_toolchain = lambda: env.Toolchain(('g++',), 'g++', 'ninja', None, None, '3', None)\n"
        "sys.argv = ['setup.py', 'build_native']; exec(open('setup.py').read(), {'__file__': 'setup.py'})"
    )
    pytest.importorskip("setuptools")
    done = subprocess.run(
        [sys.executable, "-c", script],
        cwd=tmp_path,
        env={"PATH": str(machine), "DANET_BUILD": "cuda"},
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert done.returncode == 1
    assert "[danet-build] error: DANET_BUILD=cuda, but there is no nvcc on PATH or in /no/toolkit/bin" in done.stderr
    assert "Traceback" not in done.stderr


def output_of(*command: object) -> str:
    return subprocess.run([str(word) for word in command], capture_output=True, text=True, check=True).stdout


@needs_library
@pytest.mark.skipif(not shutil.which("nm"), reason="binutils is not installed")
def test_the_library_needs_only_torchs_stable_abi():
    """The CUDA run-time library is inside of it, unseen from outside."""
    needed = {line.split()[-1] for line in output_of("nm", "-D", "--undefined-only", CUDA_LIBRARY).splitlines()}
    allowed = re.compile(r"(aoti_)?torch_\w+|\S+@(GLIBC|GLIBCXX|CXXABI|GCC)_\S+|__gmon_start__|_ITM_\w+")
    assert {"torch_library_impl", "aoti_torch_get_current_cuda_stream"} <= needed
    assert sorted(symbol for symbol in needed if not allowed.fullmatch(symbol)) == []
    offered = output_of("nm", "-D", "--defined-only", CUDA_LIBRARY)
    assert not re.search(r"\b(__)?(cuda|cu)[A-Z]\w+", offered)


@needs_library
@pytest.mark.skipif(not shutil.which("readelf"), reason="binutils is not installed")
def test_the_library_names_torch_as_its_dependency_and_no_path():
    dynamic = output_of("readelf", "-d", CUDA_LIBRARY)
    for name in ("libtorch_cuda.so", "libtorch_cpu.so"):
        assert f"[{name}]" in dynamic
    for word in ("cudart", "RPATH", "RUNPATH"):
        assert word not in dynamic
