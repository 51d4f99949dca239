"""The gate of stable_abi.py holds for the installed library, and closes on planted offenders."""

import shutil
import subprocess
from pathlib import Path

import cuda_library
import pytest
import stable_abi

import senet_fused

PACKAGE = Path(senet_fused.__file__).parent

pytestmark = pytest.mark.skipif(shutil.which("nm") is None, reason="binutils (nm, objdump) is not installed")


@pytest.mark.parametrize("name", ["_cpu.so", pytest.param("_cuda.so", marks=pytest.mark.nvcc)])
def test_library_keeps_to_the_stable_abi(name):
    if name == "_cuda.so" and (reason := cuda_library.problem()) is not None:
        pytest.skip(reason)
    library = cuda_library.library() if name == "_cuda.so" else PACKAGE / name
    if not library.exists():
        pytest.skip(f"this package was installed without {name}")
    symbols = stable_abi.undefined_symbols(library)
    assert any(symbol.startswith("torch_") for symbol in symbols), "no torch symbol at all: the wrong file?"
    assert stable_abi.problems_with_symbols(symbols, stable_abi.allowed_symbols()) == []
    assert stable_abi.problems_with_libraries(library) == []


@pytest.mark.parametrize(
    "symbol, complaint",
    [
        ("torch_exception_get_what_without_backtrace", "torch 2.11 does not export it"),
        ("aoti_torch_cpu_addmm_out", "torch 2.11 does not export it"),
        ("_ZN2at5emptyEN3c108ArrayRefIlEE", "a C++ symbol"),
        ("GOMP_parallel@GOMP_4.0", "unexpected runtime library"),
    ],
)
def test_symbol_outside_is_named(symbol, complaint):
    (problem,) = stable_abi.problems_with_symbols([symbol], stable_abi.allowed_symbols())
    assert symbol in problem and complaint in problem


def test_symbols_inside_pass():
    symbols = ["torch_call_dispatcher", "aoti_torch_get_sizes", "memcpy@GLIBC_2.14", "__gmon_start__"]
    assert stable_abi.problems_with_symbols(symbols, stable_abi.allowed_symbols()) == []


@pytest.mark.skipif(shutil.which("g++") is None, reason="g++ is not installed")
@pytest.mark.parametrize("source, clean", [("inline", False), ("named", True)])
def test_inline_function_of_a_wide_object_is_named(tmp_path, source, clean):
    namespace = "shared" if source == "inline" else "avx512"
    code = f"namespace {namespace} {{ inline int helper(int v) {{ return v + 1; }} }}\n"
    code += f"int (*probe)(int) = {namespace}::helper;\n"
    (tmp_path / "kernels.cpp").write_text(code)
    wide = tmp_path / "kernels.avx512.o"
    subprocess.run(["g++", "-c", tmp_path / "kernels.cpp", "-o", wide], check=True)
    assert (stable_abi.problems_with_object(wide) == []) == clean
