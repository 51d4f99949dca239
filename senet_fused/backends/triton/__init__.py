"""The Triton backend: NVIDIA and AMD GPUs, and CPU tensors in Triton's interpreter (``TRITON_INTERPRET=1``).

Nothing here imports triton or asks for a device until a kernel is launched.
"""

from __future__ import annotations

import importlib.util
import os
from functools import lru_cache
from importlib import metadata

import torch

from ...call import Call, GradientCall, Gradients, Outputs
from ...torch_private import constant_under_compile

__all__ = ["DTYPES", "VECTOR_DTYPES", "backward", "forward", "problem"]

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# Biases and other vectors are read, and their gradients written, in whatever dtype they have.
VECTOR_DTYPES = (*DTYPES, torch.float64)

_INSTALLED = importlib.util.find_spec("triton") is not None
# Triton's interpreter before 3.7 converts arrays of one element to numbers, which numpy 2.4 refuses.
_INTERPRETER_NEEDS = "Triton's interpreter needs triton 3.7 or later, or numpy before 2.4"
# As Triton reads it, which is once, when triton is imported.
_INTERPRETED = os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "on", "yes", "y")

_NO_TRITON = "triton is not installed (pip install triton)"
_OLDEST_CAPABILITY = (8, 0)


# torch.compile may meet it while it traces; what it says does not change.
@constant_under_compile
def problem(device_type: str = "cuda") -> str | None:
    """Why the kernels cannot run on tensors of this device type here; None if they can."""
    if device_type == "cpu":
        if not _INTERPRETED:
            return "it serves GPU tensors; CPU tensors only in Triton's interpreter (set TRITON_INTERPRET=1 at start)"
        if not _INSTALLED:
            return _NO_TRITON
        return None if _interpreter_works() else _INTERPRETER_NEEDS
    if device_type != "cuda":
        return f"it serves CUDA and ROCm tensors, got {device_type} tensors"
    return _gpu_problem()


def _release(package: str) -> tuple[int, ...]:
    return tuple(int(part) for part in metadata.version(package).split(".")[:2])


@lru_cache(maxsize=1)
def _interpreter_works() -> bool:
    return _release("triton") >= (3, 7) or _release("numpy") < (2, 4)


@lru_cache(maxsize=1)
def _gpu_problem() -> str | None:
    if not _INSTALLED:
        return _NO_TRITON
    if not torch.cuda.is_available():
        return "PyTorch finds no GPU"
    for number in range(torch.cuda.device_count() if torch.version.hip is None else 0):
        capability = torch.cuda.get_device_capability(number)
        if capability < _OLDEST_CAPABILITY:
            name = torch.cuda.get_device_name(number)
            text = ".".join(map(str, capability))
            return f"{name} has compute capability {text}, Triton's kernels need 8.0 (CUDA_VISIBLE_DEVICES can hide it)"
    return None


def forward(call: Call, outputs: Outputs, channels_last: bool) -> None:
    """Fills the outputs by the Triton kernels; None is not kept, y must be there."""
    from . import launch, tail_launch

    (tail_launch if call.norm else launch).forward(call, outputs, channels_last)


def backward(call: GradientCall, gradients: Gradients, channels_last: bool) -> None:
    """Fills the gradients by the Triton kernels; None where one is not wanted."""
    from . import launch, tail_launch

    (tail_launch if call.norm else launch).backward(call, gradients, channels_last)
