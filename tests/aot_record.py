"""Which sources a record of compiled kernels was made from: a hash that is kept with the record.

Where it and the compiler are today's, compiling again would tell nothing new, and the tests check the record alone.
SENET_AOT=1 compiles all the same; `make aot` does, and writes the records.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]

# What decides the machine code, as patterns below the checkout.
CUDA_SOURCES = (
    "csrc/cuda/**/*.cu", "csrc/cuda/**/*.cuh", "csrc/cuda/**/*.h", "csrc/plan/*.h", "buildtools/cuda_toolkit.py",
    "tests/cuda_aot/resources.py",
)  # fmt: skip
# All but __init__.py, which hands arguments on. Nor ops, which allocates them: the tests of operators hold it.
TRITON_SOURCES = ("senet_fused/backends/triton/[a-z]*.py", "senet_fused/activations.py", "tests/triton_aot/*.py")


def files(patterns: Iterable[str], root: Path = ROOT) -> list[Path]:
    """Every file that a pattern matches. ValueError for a pattern that matches none."""
    found: set[Path] = set()
    for pattern in patterns:
        matched = {path for path in root.glob(pattern) if path.is_file()}
        if not matched:
            raise ValueError(f"no file matches {pattern} in {root}: the kernels' sources have moved")
        found |= matched
    return sorted(found)


def digest(patterns: Iterable[str], root: Path = ROOT) -> str:
    """A hash of the names and bytes of all these files."""
    total = hashlib.sha256()
    for path in files(patterns, root):
        content = path.read_bytes()
        total.update(f"{path.relative_to(root).as_posix()} {len(content)}\n".encode() + content)
    return total.hexdigest()


def tells_all(record: dict, patterns: Iterable[str], compiler: str, root: Path = ROOT) -> bool:
    """Whether compiling would give the record again: it was made from these sources, by this compiler."""
    if os.environ.get("SENET_AOT", "0") not in ("", "0"):
        return False
    return record["sources"] == digest(patterns, root) and record["compiler"] == compiler
