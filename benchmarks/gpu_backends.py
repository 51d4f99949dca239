"""The backends with GPU kernels as the programs beside this file see them: can they run, what do they plan and launch.

On a CPU both serve CPU tensors: the CUDA kernels as tests/cuda_host builds them for the host, the Triton kernels in
Triton's interpreter (TRITON_INTERPRET=1).
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import sys
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path

import torch

from senet_fused import backends
from senet_fused.backends import cuda
from senet_fused.bench.problems import GPU_BACKENDS, OPS, Case
from senet_fused.cli.tune import cuda_problem, problem_of

__all__ = ["add_arguments", "counted_launches", "forget_launches", "of_tests", "refusal", "strategy"]


@contextlib.contextmanager
def of_tests() -> Iterator[None]:
    """Within the block the folder tests/ can be imported from."""
    folder = str(Path(__file__).resolve().parent.parent / "tests")
    sys.path.insert(0, folder)
    try:
        yield
    finally:
        sys.path.remove(folder)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--backend", nargs="+", default=list(GPU_BACKENDS), choices=GPU_BACKENDS, help="default: all of them"
    )
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--op", default="se", choices=OPS, help="the SE layer (default), or the block tail around it")


def refusal(name: str, device: torch.device) -> str | None:
    """Why a backend's kernels cannot run on this device; None if they can. For a CPU the CUDA kernels are built."""
    if (name, device.type) == ("cuda", "cpu"):
        try:
            cuda.load_host(_host_library())
        except RuntimeError as error:
            return str(error)
    return backends.refusal(name, device.type, torch.float32)


@lru_cache(maxsize=1)
def _host_library() -> Path:
    """The CUDA kernels for this host. Raises RuntimeError."""
    with of_tests():
        from cuda_host import build
    reason = build.problem()
    if reason is not None:
        raise RuntimeError(reason)
    return build.kernels_library()


def strategy(name: str, case: Case, backward: bool, device: torch.device) -> str:
    """The strategy of the plan that a call of this case takes."""
    problem = problem_of(case, backward)
    device = torch.device("cuda", 0) if device.type == "cuda" else device
    if name == "cuda":
        return cuda.plan_of(cuda_problem(case.batch, problem), cuda.device_facts(device)).strategy
    from senet_fused.backends.triton import launch

    return launch.plan_of(problem, launch.device_facts(device)).strategy


def forget_launches(name: str, device: torch.device) -> None:
    """Sets the counts of :func:`counted_launches` to nothing."""
    if name == "triton":
        from senet_fused.backends.triton import launch

        launch.launches.clear()
    elif device.type == "cpu":
        ctypes.CDLL(str(_host_library())).senet_host_forget_launches()


def counted_launches(name: str, device: torch.device) -> dict[str, int]:
    """How often each kernel was launched, as far as the backend counts: the CUDA library for a GPU does not."""
    if name == "triton":
        from senet_fused.backends.triton import launch

        return dict(launch.launches)
    if device.type != "cpu":
        return {}
    library = ctypes.CDLL(str(_host_library()))
    library.senet_host_all_launches.restype = ctypes.c_char_p
    lines = library.senet_host_all_launches().decode().splitlines()
    return {kernel: int(count) for kernel, count in (line.split() for line in lines)}
