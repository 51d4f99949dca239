"""The environment variables that steer a build.

Beside these, CXX and NVCC (or CUDA_HOME, CUDA_PATH) name the compilers, and TORCH_CUDA_ARCH_LIST the GPUs.
"""

import os
import shlex

from setuptools.errors import PlatformError


def no_extensions() -> bool:
    """SENET_FUSED_NO_EXT=1: the pure Python package, nothing compiled."""
    return os.environ.get("SENET_FUSED_NO_EXT", "0") not in ("", "0")


def cuda() -> str:
    """SENET_FUSED_CUDA=auto|gpu|0|1: the CUDA library where nvcc is found (the default), where this machine has a GPU
    as well, never, or required."""
    value = os.environ.get("SENET_FUSED_CUDA", "") or "auto"
    if value not in ("auto", "gpu", "0", "1"):
        raise PlatformError(
            f"SENET_FUSED_CUDA={value!r}: expected auto (build the CUDA library if nvcc is found), "
            "gpu (if this machine has a GPU as well), 0 (leave it out) or 1 (an error without nvcc)"
        )
    return value


def sanitizers() -> str:
    """SENET_FUSED_SANITIZE=address,undefined: instrumented libraries, from a build folder of their own."""
    return os.environ.get("SENET_FUSED_SANITIZE", "")


def extra_compile_flags() -> tuple[str, ...]:
    """SENET_FUSED_CXXFLAGS: added to every C++ compilation, last. (nvcc itself reads NVCC_APPEND_FLAGS.)"""
    return tuple(shlex.split(os.environ.get("SENET_FUSED_CXXFLAGS", "")))


def jobs() -> list[str]:
    """MAX_JOBS: how many compilers run at once, as arguments for ninja. Ninja's own choice without it."""
    count = os.environ.get("MAX_JOBS", "")
    return ["-j", count] if count else []
