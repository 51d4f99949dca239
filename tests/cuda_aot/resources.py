"""What the compiled CUDA kernels use: registers, stack and local memory (both are spills), shared memory, how wide
their accesses to global memory are and how many loads follow each other. Read from the library, without a GPU.

    python tests/cuda_aot/resources.py               as JSON on standard output
    python tests/cuda_aot/resources.py --write       into resources.json, which tests/test_cuda_aot.py checks
"""

from __future__ import annotations

import argparse
import functools
import importlib.util
import json
import re
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

sys.path[:0] = [str(Path(__file__).resolve().parents[depth]) for depth in (2, 1)]

import aot_record  # noqa: E402
import cuda_library  # noqa: E402

TABLE = Path(__file__).resolve().parent / "resources.json"
_TYPES = {"f": "float32", "6__half": "float16", "13__nv_bfloat16": "bfloat16"}


@functools.lru_cache(maxsize=1)
def cuobjdump() -> str | None:
    """The tool: of the CUDA toolkit, or of the triton package, which brings one along."""
    if (found := shutil.which("cuobjdump")) is not None:
        return found
    triton = importlib.util.find_spec("triton")
    places = [Path("/usr/local/cuda/bin/cuobjdump")]
    if triton is not None and triton.origin is not None:
        places.append(Path(triton.origin).parent / "backends" / "nvidia" / "bin" / "cuobjdump")
    return next((str(place) for place in places if place.is_file()), None)


def _output(*arguments: str) -> str:
    command = [str(cuobjdump()), *arguments, str(cuda_library.library())]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def kernel_of(symbol: str) -> str:
    """From a mangled name: "scale_planes_kernel bfloat16", with " peak" behind it where the kernel is for a maximum."""
    name, arguments = re.fullmatch(r"_ZN5senet4cuda\d+(\w+?_kernel)(?:I(\w+?)E)?E?v?\w*", symbol).groups()
    if arguments is None:
        return name
    kind = next(text for mangled, text in _TYPES.items() if arguments.startswith(mangled))
    return f"{name} {kind}" + (" peak" if "Lb1E" in arguments + "E" else "")


def _by_architecture(text: str) -> dict[str, str]:
    parts = re.split(r"^arch = (sm_\w+)$", text, flags=re.MULTILINE)[1:]
    joined: dict[str, str] = {}
    for name, part in zip(parts[::2], parts[1::2], strict=True):
        joined[name] = joined.get(name, "") + part
    return joined


def resources() -> dict[str, dict[str, dict[str, int]]]:
    """{architecture: {kernel: {"registers", "spills", "shared"}}}, spills and shared memory (static) in bytes."""
    table: dict[str, dict[str, dict[str, int]]] = {}
    for architecture, text in _by_architecture(_output("--dump-resource-usage")).items():
        found = re.findall(r"Function (\w+):\s+REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)", text)
        kernels = {
            kernel_of(symbol): {"registers": int(reg), "spills": int(stack) + int(local), "shared": int(shared)}
            for symbol, reg, stack, shared, local in found
        }
        table[architecture] = dict(sorted(kernels.items()))
    return dict(sorted(table.items()))


# Of shares of sums, and of 16-bit weights: as the kernels read them, and nothing else.
_SHARES, _WEIGHTS = "LDG.E.128.STRONG", "LDG.E.64.CONSTANT"
_BREAKS = re.compile(r"\b(FFMA|FADD|FMUL|BSYNC|BAR|BRA)\b")


def _longest_run(instructions: list[str], load: str) -> int:
    """How many of these loads follow each other without arithmetic, a barrier or a branch between."""
    longest = now = 0
    for instruction in instructions:
        now = now + 1 if load in instruction else 0 if _BREAKS.search(instruction) else now
        longest = max(longest, now)
    return longest


def accesses(architecture: str) -> dict[str, dict[str, Any]]:
    """{kernel: {"loads", "stores", "copies", "runs"}}: how many accesses of how many bits stand in its code, and the
    longest runs of loads of shares and of weights. A copy goes to shared memory without a register between."""
    text = _output("-sass", "-arch", architecture)
    found: dict[str, dict[str, Any]] = {}
    for part in re.split(r"^\s*Function : ", text, flags=re.MULTILINE)[1:]:
        symbol = part.split(None, 1)[0]
        if "_kernel" not in symbol:  # a function that kernels call has a section of its own
            continue
        counted: dict[str, Counter[str]] = {"LDG": Counter(), "STG": Counter(), "LDGSTS": Counter()}
        for kind, modifiers in re.findall(r"\b(LDG|STG|LDGSTS)((?:\.\w+)*)\s", part):
            widths = (w.lstrip("US") for w in modifiers.split(".") if re.fullmatch("128|64|[US]?16|[US]?8", w))
            counted[kind][next(widths, "32")] += 1
        instructions = re.findall(r"/\*[0-9a-f]{4,5}\*/\s+(.*?);", part)
        names = zip(("loads", "stores", "copies"), counted.values(), strict=True)
        found[kernel_of(symbol)] = {name: dict(sorted(widths.items())) for name, widths in names} | {
            "runs": {"shares": _longest_run(instructions, _SHARES), "weights": _longest_run(instructions, _WEIGHTS)}
        }
    return found


def content() -> dict[str, Any]:
    """What is recorded: from which sources, by which compiler, and what each kernel of each architecture uses."""
    table = resources()
    for architecture, kernels in table.items():
        for name, used in accesses(architecture).items():
            kernels[name] |= used
    return {
        "sources": aot_record.digest(aot_record.CUDA_SOURCES),
        "compiler": cuda_library.compiler(),
        "architectures": table,
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help=f"write {TABLE.name}")
    options = parser.parse_args()
    if (reason := cuda_library.problem()) is not None:
        parser.error(reason)
    if cuobjdump() is None:
        parser.error("there is no cuobjdump, of a CUDA toolkit or of the triton package")
    text = json.dumps(content(), indent=1)
    # One kernel a line.
    text = re.sub(r"^(   \S.*?\{)\n(.*?)^   (?=\})", lambda m: m[1] + " ".join(m[2].split()), text, flags=re.M | re.S)
    if options.write:
        TABLE.write_text(text + "\n", encoding="utf-8")
    else:
        print(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
