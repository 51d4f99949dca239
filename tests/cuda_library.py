"""The CUDA library whose machine code tests read: the package's own, else one that is built beside the package.

`make build` leaves it out where there is no GPU. It is then compiled into build/cuda_library/, incrementally, for the
architectures of such a machine. Never into the package: other tests may be running there, and would find a backend.
"""

from __future__ import annotations

import functools
import os
import subprocess
import sys
from pathlib import Path

from senet_fused.backends import cuda

ROOT = Path(__file__).resolve().parents[1]
BUILT = ROOT / "build" / "cuda_library"


@functools.lru_cache(maxsize=1)
def _compiler() -> tuple[str | None, str | None]:
    """("nvcc 13.0.88", None), or (None, why there is none)."""
    if cuda._plan is None:
        return None, "the compiled planner is not installed"
    if cuda.LIBRARY.exists():
        return cuda._plan.build_info()["cuda"].partition(" for ")[0], None
    if not (ROOT / "setup.py").exists():
        return None, "the package was built without its CUDA library, and this is no checkout to build it from"
    sys.path.insert(0, str(ROOT / "buildtools"))
    try:
        import cuda_toolkit
        import toolchain

        return f"nvcc {cuda_toolkit.find_toolkit(toolchain.find_compiler()).version}", None
    except ImportError as missing:
        return None, f"{missing.name} is not installed"
    except (cuda_toolkit.NoCuda, toolchain.PlatformError) as problem:
        return None, str(problem)
    finally:
        sys.path.remove(str(ROOT / "buildtools"))


def compiler() -> str | None:
    """What the library is or would be compiled with: "nvcc 13.0.88"; None where it can't be."""
    return _compiler()[0]


def problem() -> str | None:
    """Why there is no library to read, or None."""
    return _compiler()[1]


@functools.lru_cache(maxsize=1)
def library() -> Path:
    """The library's path, built first if need be: some minutes the first time. Several processes may ask at once."""
    if (reason := problem()) is not None:
        raise RuntimeError(reason)
    if cuda.LIBRARY.exists():
        return cuda.LIBRARY
    environment = {k: v for k, v in os.environ.items() if k != "TORCH_CUDA_ARCH_LIST"} | {"SENET_FUSED_CUDA": "1"}
    command = [sys.executable, "setup.py", "-q", "build_ext", "--only", "senet_fused._cuda", "--build-lib", str(BUILT)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    if done.returncode != 0:
        raise RuntimeError(f"the CUDA library does not build:\n{done.stdout}{done.stderr}")
    return BUILT / "senet_fused" / "_cuda.so"
