"""The environment variables that steer a build; beside these, CXX names the compiler."""

import os
import shlex


def no_extensions() -> bool:
    """SENET_FUSED_NO_EXT=1: the pure Python package, nothing compiled."""
    return os.environ.get("SENET_FUSED_NO_EXT", "0") not in ("", "0")


def sanitizers() -> str:
    """SENET_FUSED_SANITIZE=address,undefined: instrumented libraries, from a build folder of their own."""
    return os.environ.get("SENET_FUSED_SANITIZE", "")


def extra_compile_flags() -> tuple[str, ...]:
    """SENET_FUSED_CXXFLAGS: added to every compilation, last."""
    return tuple(shlex.split(os.environ.get("SENET_FUSED_CXXFLAGS", "")))


def jobs() -> list[str]:
    """MAX_JOBS: how many compilers run at once, as arguments for ninja. Ninja's own choice without it."""
    count = os.environ.get("MAX_JOBS", "")
    return ["-j", count] if count else []
