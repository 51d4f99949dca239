"""What the compiled CUDA kernels use: registers, stack and local memory (both are spills), shared memory, and how wide
their accesses to global memory are. Read from the library as it is built, without a GPU.

    python tests/cuda_aot/resources.py               as JSON on standard output
    python tests/cuda_aot/resources.py --write       into resources.json, which tests/test_cuda_aot.py compares with
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

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from senet_fused import _plan  # noqa: E402
from senet_fused.backends import cuda  # noqa: E402

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
    command = [str(cuobjdump()), *arguments, str(cuda.LIBRARY)]
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


@functools.lru_cache(maxsize=1)
def _code(architecture: str) -> dict[str, str]:
    """By kernel, its machine code as text."""
    text = _output("-sass", "-arch", architecture)
    parts = re.split(r"^\s*Function : ", text, flags=re.MULTILINE)[1:]
    # A function that kernels call has a section of its own.
    return {kernel_of(part.split(None, 1)[0]): part for part in parts if "_kernel" in part.split(None, 1)[0]}


def longest_runs(architecture: str, loads: tuple[str, ...]) -> dict[str, tuple[int, ...]]:
    """By kernel, how many of each kind of load follow each other without arithmetic, a barrier or a branch between."""
    breaks = re.compile(r"\b(FFMA|FADD|FMUL|BSYNC|BAR|BRA)\b")
    found = {}
    for name, text in _code(architecture).items():
        longest = []
        for load in loads:
            most = now = 0
            for instruction in re.findall(r"/\*[0-9a-f]{4,5}\*/\s+(.*?);", text):
                now = now + 1 if load in instruction else 0 if breaks.search(instruction) else now
                most = max(most, now)
            longest.append(most)
        found[name] = tuple(longest)
    return found


def accesses(architecture: str) -> dict[str, Counter[str]]:
    """By kernel, how often which global access stands in its code: "load 128", "store 128", "copy 128", "load 16"."""
    found: dict[str, Counter[str]] = {}
    for name, part in _code(architecture).items():
        counted = found.setdefault(name, Counter())
        for kind, modifiers in re.findall(r"\b(LDG|STG|LDGSTS)((?:\.\w+)*)\s", part):
            width = next(
                (w for w in ("128", "64", "U16", "S16", "U8", "S8", "16", "8") if w in modifiers.split(".")), "32"
            )
            what = {"LDG": "load", "STG": "store", "LDGSTS": "copy"}[kind]
            counted[f"{what} {width.lstrip('US')}"] += 1
    return found


def content() -> dict[str, Any]:
    """What is recorded: the compiler, and the resources for each architecture."""
    return {"compiler": _plan.build_info()["cuda"].partition(" for ")[0], "architectures": resources()}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help=f"write {TABLE.name}")
    options = parser.parse_args()
    if not cuda.LIBRARY.exists():
        parser.error(f"{cuda.LIBRARY} is not built (SENET_FUSED_CUDA=1 says why)")
    if cuobjdump() is None:
        parser.error("there is no cuobjdump, of a CUDA toolkit or of the triton package")
    text = json.dumps(content(), indent=1)
    # One kernel a line.
    text = re.sub(r"\{\s+(\"registers\"[^}]*?)\s+\}", lambda m: "{" + re.sub(r"\s+", " ", m[1]) + "}", text)
    if options.write:
        TABLE.write_text(text + "\n", encoding="utf-8")
    else:
        print(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
