"""Are the compiled libraries within LibTorch's stable ABI of the oldest torch that they must load on?

    python tests/abi/stable_abi.py                         check senet_fused's _cpu.so, and _cuda.so if built (make abi)
    python tests/abi/stable_abi.py LIBRARY [OBJECT ...]    check another one, and its objects

torch_2_11_symbols.txt lists what torch 2.11 offers: the stable ABI's functions that libtorch_cpu.so exports.
To write it anew, with the oldest supported torch installed:

    python tests/abi/stable_abi.py --regenerate SITE_PACKAGES/torch/lib/libtorch_cpu.so
"""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
ALLOWED = Path(__file__).with_name("torch_2_11_symbols.txt")

# The shim's functions. Its per-backend copies of whole operators (aoti_torch_cpu_addmm, ...) are for code
# that torch itself generates and carry no promise of stability.
_SHIM = re.compile(r"(aoti_torch|torch)_(?!(cpu|cuda|mps|xpu|mkldnn)_)\w+")

# The C and C++ runtime, as its symbols' versions name it.
_RUNTIME = {"GLIBC", "GLIBCXX", "CXXABI", "GCC"}

# Those may stay without a definition: the loader and the C runtime look for them if they are there.
_OPTIONAL = {"_ITM_deregisterTMCloneTable", "_ITM_registerTMCloneTable", "__gmon_start__"}

_LIBRARIES = re.compile(
    r"(libtorch_cpu|libstdc\+\+|libm|libgcc_s|libc|ld-linux-[\w-]+|libpthread|libdl|librt)\.so(\.\d+)?"
)


def _nm(*arguments: str | Path) -> list[list[str]]:
    run = subprocess.run(["nm", *map(str, arguments)], capture_output=True, text=True, check=True)
    return [line.split() for line in run.stdout.splitlines() if line]


def allowed_symbols() -> set[str]:
    return {line for line in ALLOWED.read_text().splitlines() if line and not line.startswith("#")}


def undefined_symbols(library: Path) -> list[str]:
    """The symbols a library takes from others; the system's carry a version: `memcpy@GLIBC_2.14`."""
    return [fields[-1] for fields in _nm("-D", "--undefined-only", library)]


def problems_with_symbols(symbols: list[str], allowed: set[str]) -> list[str]:
    problems = []
    for symbol in symbols:
        name, _, version = symbol.partition("@")
        family = version.strip("@").rpartition("_")[0]
        if family:
            if family not in _RUNTIME:
                problems.append(f"{symbol}: of an unexpected runtime library")
        elif name.startswith("_Z"):
            problems.append(f"{name}: a C++ symbol, which the stable ABI has none of")
        elif name not in allowed and name not in _OPTIONAL:
            problems.append(f"{name}: torch 2.11 does not export it")
    return problems


def runtime_needed(symbols: list[str]) -> str:
    """How new a system the library needs, which the compiler decides: "CXXABI 1.3.9, GLIBC 2.32, ..."."""
    newest: dict[str, tuple[int, ...]] = {}
    for family, number in re.findall(r"@([A-Z]+)_([\d.]+)", " ".join(symbols)):
        newest[family] = max(newest.get(family, ()), tuple(int(n) for n in number.split(".")))
    return ", ".join(f"{family} {'.'.join(map(str, newest[family]))}" for family in sorted(newest))


def problems_with_libraries(library: Path) -> list[str]:
    run = subprocess.run(["objdump", "-p", str(library)], capture_output=True, text=True, check=True)
    needed = re.findall(r"^\s*NEEDED\s+(\S+)", run.stdout, re.MULTILINE)
    return [f"{name}: not a library this one may need" for name in needed if not _LIBRARIES.fullmatch(name)]


def problems_with_object(object_file: Path) -> list[str]:
    """An object of a wider instruction set must not share inline functions with the others.

    The linker keeps one copy of a weak symbol for the whole library. Kept from an AVX-512 object, it would
    stop a plain x86-64 CPU with an illegal instruction. So each has to carry the instruction set in its name.
    """
    isa = object_file.name.split(".")[-2]
    weak = [fields[-1] for fields in _nm("--defined-only", object_file) if fields[-2] in "WwVvu"]
    return [f"{object_file.name}: {name} is shared with other instruction sets" for name in weak if isa not in name]


def regenerate(libtorch_cpu: Path) -> None:
    names = sorted({fields[-1] for fields in _nm("-D", "--defined-only", libtorch_cpu)})
    names = [name for name in names if _SHIM.fullmatch(name)]
    header = [
        "# The C functions of LibTorch's stable ABI that torch 2.11 exports; written by",
        "# `python tests/abi/stable_abi.py --regenerate SITE_PACKAGES/torch/lib/libtorch_cpu.so`.",
    ]
    ALLOWED.write_text("\n".join([*header, *names]) + "\n")
    print(f"{ALLOWED.name}: {len(names)} symbols")


def main(arguments: list[str]) -> int:
    if arguments[:1] == ["--regenerate"]:
        regenerate(Path(arguments[1]))
        return 0
    libraries = [Path(a) for a in arguments[:1]]
    objects = [Path(a) for a in arguments[1:]]
    if not arguments:
        # The build leaves the CUDA library out where there is no nvcc; the CPU's has to be there.
        cuda = ROOT / "senet_fused" / "_cuda.so"
        libraries = [ROOT / "senet_fused" / "_cpu.so", *([cuda] if cuda.exists() else [])]
        objects = sorted((ROOT / "build" / "ninja").glob("*/senet_fused._cpu/csrc/cpu/kernels.avx*.o"))
        # A sanitizer's build calls what a compiler otherwise inlines, and is never shipped.
        objects = [o for o in objects if not re.search(r"-(address|undefined|thread)\b", o.parents[3].name)]

    problems = []
    for library in libraries:
        symbols = undefined_symbols(library)
        found = problems_with_symbols(symbols, allowed_symbols()) + problems_with_libraries(library)
        problems += [f"{library.name}: {problem}" for problem in found]
        torch = sum(s.startswith(("aoti_torch_", "torch_")) for s in symbols)
        print(f"{library.name}: {torch} of torch's symbols, runtime {runtime_needed(symbols)}")
    for object_file in objects:
        problems += problems_with_object(object_file)
    for problem in problems:
        print(f"error: {problem}")
    print(f"{len(objects)} objects of wider instruction sets")
    print(f"{len(problems)} problems")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
