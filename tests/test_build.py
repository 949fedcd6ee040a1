"""The build: which torch and compiler it finds, what it asks for, and what it leaves behind."""

import json
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

import danet_build_env as env
import danet_build_native as native
import danet_kernels

PACKAGE = Path(danet_kernels.__file__).resolve().parent
CPU_LIBRARY = PACKAGE / native.CPU_LIBRARY
VARIABLES = ["CXX", "MAX_JOBS"]
VARIABLES += [f"DANET_{name}" for name in ("BUILD", "BUILD_TORCH", "TORCH_SITE", "DEBUG", "SANITIZE")]

needs_library = pytest.mark.skipif(not CPU_LIBRARY.exists(), reason="this build has no C++ extension")


def add_torch(site: Path, version: str, headers: bool = True) -> None:
    """What the finder looks at in a site-packages directory that holds torch."""
    stable = site / "torch" / "include" / "torch" / "csrc" / "stable"
    stable.mkdir(parents=True)
    text = f"from typing import Optional\n__version__ = '{version}'\ncuda = None\n"
    (site / "torch" / "version.py").write_text(text)
    if headers:
        (stable / "library.h").touch()


@pytest.fixture
def target(tmp_path, monkeypatch):
    """An isolated build for a target environment with a compiler and, so far, no torch: its site-packages."""
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
    site = tmp_path / "site-packages"
    site.mkdir()
    bin_directory = tmp_path / "bin"
    bin_directory.mkdir()
    compiler = bin_directory / "g++"
    compiler.write_text("#!/bin/sh\necho 'g++ 99.9'\n")
    compiler.chmod(0o755)
    monkeypatch.setenv("PATH", str(bin_directory))
    monkeypatch.setattr(sys, "platform", "linux")
    util = env.importlib.util
    find_spec = util.find_spec
    monkeypatch.setattr(util, "find_spec", lambda name: None if name == "torch" else find_spec(name))
    get_path = sysconfig.get_path
    scheme = {"platlib": str(site), "purelib": str(site)}
    monkeypatch.setattr(
        env.sysconfig, "get_path", lambda name, vars=None: scheme[name] if name in scheme else get_path(name)
    )
    monkeypatch.setattr(env, "_sees_system_packages", lambda: False)
    return site


def remove_compiler(target: Path) -> None:
    (target.parent / "bin" / "g++").unlink()


def test_the_targets_torch_is_found_and_not_required(target):
    add_torch(target, "2.13.0+cpu")
    assert env.find_torch() == env.TorchHeaders(target / "torch" / "include", "2.13.0+cpu")
    assert env.build_requirements() == ["ninja"]


def test_torch_is_required_where_there_is_none(target):
    with pytest.raises(env.Unavailable, match="torch is not installed in the target environment"):
        env.find_torch()
    assert env.build_requirements() == ["ninja", "torch>=2.10"]


def test_the_required_torch_can_be_named(target, monkeypatch):
    monkeypatch.setenv("DANET_BUILD_TORCH", "torch==2.13.0")
    assert env.build_requirements() == ["ninja", "torch==2.13.0"]


@pytest.mark.parametrize("version", ["1.13.1", "2.9.1+cu128", "not-a-version"])
def test_an_old_torch_is_refused(target, version):
    add_torch(target, version)
    with pytest.raises(env.Unavailable, match=re.escape(version)):
        env.find_torch()
    assert env.build_requirements() == ["ninja", "torch>=2.10"]


@pytest.mark.parametrize("version", ["2.10.0", "2.10.0a0+git1234567", "2.15.0.dev20260101+cu132", "3.0.0"])
def test_a_new_enough_torch_is_accepted(target, version):
    add_torch(target, version)
    assert env.find_torch().version == version


def test_a_torch_without_headers_is_refused(target):
    add_torch(target, "2.13.0", headers=False)
    with pytest.raises(env.Unavailable, match="no stable ABI headers"):
        env.find_torch()


def test_an_old_torch_does_not_hide_a_good_one(target, tmp_path, monkeypatch):
    add_torch(tmp_path / "named", "2.4.0")
    monkeypatch.setenv("DANET_TORCH_SITE", str(tmp_path / "named"))
    add_torch(target, "2.12.0")
    assert env.find_torch().version == "2.12.0"


def test_a_named_site_comes_first(target, tmp_path, monkeypatch):
    add_torch(tmp_path / "named", "2.14.0")
    monkeypatch.setenv("DANET_TORCH_SITE", str(tmp_path / "named"))
    add_torch(target, "2.12.0")
    assert env.find_torch().version == "2.14.0"


def test_the_user_site_counts_only_where_the_target_sees_it(target, tmp_path, monkeypatch):
    add_torch(tmp_path / "user", "2.13.0")
    monkeypatch.setattr(env.site, "getusersitepackages", lambda: str(tmp_path / "user"))
    with pytest.raises(env.Unavailable):
        env.find_torch()
    monkeypatch.setattr(env, "_sees_system_packages", lambda: True)
    assert env.find_torch().version == "2.13.0"


@pytest.mark.parametrize(("line", "open_to_system"), [("true", True), ("false", False)])
def test_virtual_environments_say_whether_they_see_the_system(tmp_path, monkeypatch, line, open_to_system):
    (tmp_path / "pyvenv.cfg").write_text(f"home = /usr/bin\ninclude-system-site-packages = {line}\n")
    monkeypatch.setattr(sys, "prefix", str(tmp_path))
    assert env._sees_system_packages() is open_to_system


def test_a_pure_python_build_requires_nothing(target, monkeypatch):
    monkeypatch.setenv("DANET_BUILD", "python")
    assert env.build_requirements() == []
    with pytest.raises(env.Unavailable, match="DANET_BUILD=python"):
        env.find_toolchain()


def test_no_torch_is_fetched_where_nothing_can_compile(target):
    remove_compiler(target)
    assert env.build_requirements() == []
    with pytest.raises(env.Unavailable, match=r"no C\+\+ compiler"):
        env.find_toolchain()


@pytest.mark.parametrize("mode", ["cpu", "cuda"])
def test_an_extension_that_is_demanded_needs_a_compiler(target, monkeypatch, mode):
    remove_compiler(target)
    monkeypatch.setenv("DANET_BUILD", mode)
    with pytest.raises(SystemExit, match=rf"DANET_BUILD={mode}, but no C\+\+ compiler"):
        env.build_requirements()


def test_cxx_may_start_with_a_launcher(target, monkeypatch):
    monkeypatch.setenv("CXX", "g++ -pipe")
    assert env.find_compiler() == ("g++", "-pipe")


def test_a_wrong_cxx_is_not_replaced_by_another_compiler(target, monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(env.Unavailable, match="no-such-compiler"):
        env.find_compiler()


@pytest.mark.parametrize(
    ("variable", "value", "read", "message"),
    [
        ("DANET_BUILD", "rust", env.build_mode, "one of auto, cpu, cuda, python, got 'rust'"),
        ("DANET_SANITIZE", "address,memory", env.sanitizers, "got memory"),
        ("MAX_JOBS", "0", env.max_jobs, "positive whole number, got '0'"),
        ("MAX_JOBS", "two", env.max_jobs, "positive whole number, got 'two'"),
    ],
)
def test_a_wrong_variable_ends_the_build_with_a_sentence(target, monkeypatch, variable, value, read, message):
    monkeypatch.setenv(variable, value)
    with pytest.raises(SystemExit, match=message):
        read()


def test_variants_have_their_own_flags_and_directory(target, monkeypatch):
    name, flags = native.variant()
    assert name == "release"
    assert "-O3" in flags
    monkeypatch.setenv("DANET_SANITIZE", "address,undefined")
    name, flags = native.variant()
    assert name == "release-address-undefined"
    assert "-O1 -g -fsanitize=address,undefined" in flags
    monkeypatch.setenv("DANET_DEBUG", "1")
    monkeypatch.delenv("DANET_SANITIZE")
    name, flags = native.variant()
    assert name == "debug"
    assert "-O0 -g" in flags


def test_the_ninja_file_is_portable(target):
    toolchain = env.Toolchain(
        compiler=("/opt/my tools/g++",),
        compiler_version="g++ 99.9",
        ninja="ninja",
        python_include=target,
        pybind11_include=target,
        pybind11_version="3.0",
        torch=env.TorchHeaders(target, "2.13.0"),
    )
    text = native.ninja_text(toolchain, None, "build/here")
    assert "cxx = '/opt/my tools/g++'" in text
    assert "-march" not in text
    assert str(native.ROOT) not in text
    assert "-DTORCH_TARGET_VERSION=0x020a000000000000" in text
    for source in ("csrc/ops_cpu.cpp", "csrc/plan.cpp", "csrc/module.cpp", "csrc/cpu/features.cpp"):
        assert text.count(f"compile {source}\n") == 1


def test_a_build_without_cpp_records_why_and_leaves_no_library(target, tmp_path):
    package = tmp_path / "package"
    package.mkdir()
    for name in (*native.LIBRARIES, native.CUDA_LIBRARY, "functional.py"):
        (package / name).touch()
    native.remove_libraries(package)
    native.write_build_info(package, "1.2.3", None, "no C++ compiler: none", None, "no C++ compiler: none")
    assert sorted(path.name for path in package.iterdir()) == ["_build_info.json", "functional.py"]
    info = json.loads((package / "_build_info.json").read_text())
    assert info["version"] == "1.2.3"
    assert info["cpu_library"] is False
    assert info["cuda_library"] is False
    assert info["reasons"] == dict.fromkeys(("native", "cuda"), "no C++ compiler: none")
    assert info["torch_headers"] is None
    assert info["sanitize"] == []


@pytest.mark.skipif(not (PACKAGE / native.BUILD_INFO).exists(), reason="the package was never built")
def test_the_build_info_of_this_build():
    info = json.loads((PACKAGE / native.BUILD_INFO).read_text())
    assert set(info) == {
        "version", "commit", "danet_build", "cpu_library", "cuda_library", "torch_headers", "target_abi", "compiler",
        "flags", "nvcc", "cuda_archs", "cuda_source_hash", "sanitize", "reasons", "date",
    }  # fmt: skip
    assert info["cpu_library"] == CPU_LIBRARY.exists()
    assert info["cuda_library"] == (PACKAGE / native.CUDA_LIBRARY).exists()
    for name, library in (("native", "cpu_library"), ("cuda", "cuda_library")):
        assert (info["reasons"][name] is None) == info[library]
    assert info["target_abi"] == "2.10"


@needs_library
def test_cpu_features_agree_with_the_system():
    from danet_kernels import _C

    features = _C.cpu_features()
    assert features["avx512"] >= features["avx512_bf16"] >= features["runs_bf16_kernel"]
    cpuinfo = Path("/proc/cpuinfo").read_text()
    if features["arch"] == "x86_64":
        flags = set(re.search(r"^flags\s*:(.*)$", cpuinfo, re.M).group(1).split())
        assert features["avx2"] == (flags >= {"avx2", "fma"})
        assert features["avx512"] == (flags >= {"avx512f", "avx512bw", "avx512dq", "avx512vl"})
        assert features["avx512_bf16"] == ("avx512_bf16" in flags and features["avx512"])


def output_of(*command):
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


@needs_library
@pytest.mark.skipif(not shutil.which("nm"), reason="binutils is not installed")
def test_the_library_needs_only_torchs_stable_abi():
    if json.loads((PACKAGE / native.BUILD_INFO).read_text())["sanitize"]:
        pytest.skip("the sanitizers put unversioned names of their own in place of the C library's")
    listing = output_of("nm", "-D", "--undefined-only", CPU_LIBRARY)
    strong, weak = set(), set()
    for line in listing.splitlines():
        kind, name = line.split()
        (weak if kind in "wv" else strong).add(name)
    # Versioned names are of the C and C++ run-time libraries, the others of torch or the linker.
    allowed = re.compile(r"(aoti_)?torch_\w+|\S+@(GLIBC|GLIBCXX|CXXABI|GCC|GOMP|OMP)_\S+|__gmon_start__|_ITM_\w+")
    assert "torch_library_impl" in strong
    assert sorted(symbol for symbol in strong if not allowed.fullmatch(symbol)) == []
    # Looked up if it is there: not every torch brings MKL.
    assert sorted(symbol for symbol in weak if not allowed.fullmatch(symbol)) == ["MKL_Set_Num_Threads_Local"]


@needs_library
@pytest.mark.skipif(not shutil.which("readelf"), reason="binutils is not installed")
def test_the_library_names_torch_as_its_dependency_and_no_path():
    dynamic = output_of("readelf", "-d", CPU_LIBRARY)
    assert "[libtorch_cpu.so]" in dynamic
    assert "RPATH" not in dynamic
    assert "RUNPATH" not in dynamic
