"""Facts about the machine and the installation that reports are stamped with. Standard library only."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from importlib import metadata
from pathlib import Path

__all__ = ["cpu_features", "cpu_name", "cpus", "last_level_cache_bytes", "package_version", "revision"]

# The features that decide which compiled kernels can run, or what a reader wants to know of a timing.
_FEATURES = (
    "sse4_2 avx avx2 fma f16c avx512f avx512bw avx512dq avx512vl avx512_bf16 avx512_fp16 amx_bf16 "
    "asimd fphp asimdhp bf16 sve sve2"
).split()
_FALLBACK_CACHE_BYTES = 32 * 2**20


def _cpuinfo(*keys: str) -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return ""
    for line in lines:
        key, _, value = line.partition(":")
        if key.strip() in keys:
            return value.strip()
    return ""


def _sysctl(name: str) -> str:
    try:
        return subprocess.run(["sysctl", "-n", name], capture_output=True, text=True, timeout=5).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return ""


def cpu_name() -> str:
    """The processor's name as the system gives it, else its architecture."""
    name = _sysctl("machdep.cpu.brand_string") if sys.platform == "darwin" else _cpuinfo("model name", "Model")
    return name or platform.processor() or platform.machine()


def cpu_features() -> list[str]:
    """Those vector features of this processor that matter here; empty where the system does not say."""
    flags = set(_cpuinfo("flags", "Features").split())
    return [feature for feature in _FEATURES if feature in flags]


def cpus() -> int:
    """How many processors this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _linux_cache_bytes() -> int:
    """The last-level caches reachable from the processors this process may use, each counted once."""
    total, seen = 0, set()
    for cpu in os.sched_getaffinity(0):
        last = (0, "", 0)
        for index in Path(f"/sys/devices/system/cpu/cpu{cpu}/cache").glob("index*"):
            try:
                kind = (index / "type").read_text().strip()
                level = int((index / "level").read_text())
                size = (index / "size").read_text().strip()
                shared = (index / "shared_cpu_list").read_text().strip()
            except (OSError, ValueError):
                continue
            if kind != "Instruction" and size[:-1].isdigit():
                scale = {"K": 2**10, "M": 2**20, "G": 2**30}.get(size[-1], 1)
                last = max(last, (level, shared, int(size[:-1]) * scale))
        if last[:2] not in seen:
            seen.add(last[:2])
            total += last[2]
    return total


def last_level_cache_bytes() -> int:
    """The size of the last-level cache(s) this process can use; 32 MiB where the system does not say."""
    size = 0
    if sys.platform == "linux":
        size = _linux_cache_bytes()
    elif sys.platform == "darwin":
        texts = [_sysctl(name) for name in ("hw.l3cachesize", "hw.perflevel0.l2cachesize", "hw.l2cachesize")]
        size = next((int(text) for text in texts if text.isdigit()), 0)
    return size or _FALLBACK_CACHE_BYTES


def package_version(name: str) -> str | None:
    """The installed version of a distribution, or None."""
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def revision() -> str | None:
    """The git revision of the checkout this package runs from, with "-dirty" appended if files differ.

    None for an installed copy: git must track this very file, so a virtual environment inside a checkout does
    not borrow the checkout's revision.
    """

    def git(*arguments: str) -> str | None:
        try:
            done = subprocess.run(
                ["git", "-C", str(here.parent), *arguments], capture_output=True, text=True, timeout=20
            )
        except (OSError, subprocess.SubprocessError):
            return None
        return done.stdout.strip() if done.returncode == 0 else None

    here = Path(__file__).resolve()
    if git("ls-files", "--error-unmatch", here.name) is None:
        return None
    head = git("rev-parse", "HEAD")
    if head is None:
        return None
    return head + ("-dirty" if git("status", "--porcelain", "--untracked-files=no") else "")
