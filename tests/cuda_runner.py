"""The CUDA kernels under test: on a GPU where there is one, else compiled for the host and run on CPU tensors.

SENET_HOST_SANITIZE=1 takes the host's library with AddressSanitizer and UndefinedBehaviorSanitizer, whose runtime has
to be loaded before Python (tests/sanitize/run.sh).
"""

from __future__ import annotations

import ctypes
import functools
import os
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import oracle
import pytest
from gpu_contract import DEVICE
from gpu_tail_contract import run_on
from oracle import Case
from tail_oracle import Tail

from senet_fused.backends import cuda

sys.path.insert(0, str(Path(__file__).resolve().parent / "cuda_host"))
import build  # noqa: E402

if DEVICE == "cuda":
    PROBLEM = cuda.problem()
else:
    PROBLEM = build.problem() if cuda._plan is not None else cuda.problem()


@functools.lru_cache(maxsize=1)
def host() -> ctypes.CDLL:
    """The library that runs the kernels on the host, built and loaded."""
    path = build.kernels_library(sanitize=os.environ.get("SENET_HOST_SANITIZE") == "1")
    cuda.load_host(path)
    library = ctypes.CDLL(str(path))
    library.senet_host_all_launches.restype = ctypes.c_char_p
    return library


@pytest.fixture(scope="session")
def cuda_kernels() -> None:
    """Makes backend="cuda" serve the tensors of this machine."""
    if PROBLEM is not None:
        pytest.skip(PROBLEM)
    if DEVICE == "cpu":
        host()


def launches() -> Counter[str]:
    """What the host has launched since the last call, by kernel. (On a GPU the profiler would have to say.)"""
    library = host()
    lines = library.senet_host_all_launches().decode().splitlines()
    library.senet_host_forget_launches()
    return Counter({name: int(count) for name, count in (line.split() for line in lines)})


def run(case: Case, inputs: oracle.Tensors) -> oracle.Tensors:
    """y, gate and every gradient by the CUDA kernels, with the proof that it was they."""
    return oracle.run_on("cuda", DEVICE, case, inputs)


def run_tail(case: Tail, inputs: oracle.Tensors) -> oracle.Tensors:
    """y, every gradient and the running statistics of a block tail by the CUDA kernels, with the proof that it was
    they."""
    return run_on("cuda", case, inputs)


def planning(strategy: str | None = None, **tile: int) -> Callable[[cuda.Problem, Any], Any]:
    """For cuda.using: the cheapest plan with this strategy, where the problem allows it, its tile changed."""

    def plan(problem: cuda.Problem, facts: Any) -> Any:
        native = problem.native()
        found = cuda._plan.cuda_candidates(native, facts)
        chosen = next((p for p in found if p.strategy == strategy), found[0])
        return chosen.replace(native, **tile) if tile else chosen

    return plan


def expected_launches(form: str, strategy: str) -> Counter[str]:
    """The kernels of one forward and one backward with every gradient."""
    sweep = "channels_last" if form == "channels_last" else "planes"
    names = [f"squeeze_{form}_kernel", f"scale_{sweep}_kernel"]
    names += [f"squeeze_backward_{form}_kernel", f"scale_backward_{sweep}_kernel"]
    if strategy == "launches":
        names += ["excite_push_kernel", "excite_gate_kernel", "excite_push_backward_kernel", "excite_backward_kernel"]
    return Counter(names)


def expected_tail_launches(form: str, strategy: str, training: bool, gated: bool) -> Counter[str]:
    """As :func:`expected_launches`, of a block tail."""
    sweep = "channels_last" if form == "channels_last" else "planes"
    forward = [f"tail_moments_{form}_kernel", "tail_excite_kernel"] if training or gated else []
    backward = [f"tail_sums_{form}_kernel", "tail_excite_backward_kernel"]
    if gated and strategy == "launches":
        forward.append("excite_gate_kernel")
        backward.append("excite_push_backward_kernel")
    return Counter([*forward, f"tail_apply_{sweep}_kernel", *backward, f"tail_apply_backward_{sweep}_kernel"])
