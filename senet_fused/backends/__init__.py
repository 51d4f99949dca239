"""The backends: what each one serves, whether it can run here, and why not."""

from __future__ import annotations

from typing import NamedTuple

import torch

from . import cuda, native, triton

__all__ = ["NAMES", "WITH_PRE_ACT", "BackendStatus", "dtypes", "refusal", "status"]

# In the order in which "auto" prefers them.
NAMES = ("cpu", "cuda", "triton", "reference")

# Those that have kernels for an activation behind the norm.
WITH_PRE_ACT = ("cpu", "reference")

_DTYPES = {
    "cpu": (torch.float32, torch.bfloat16, torch.float16, torch.float64),
    "cuda": cuda.DTYPES,
    "triton": triton.DTYPES,
    "reference": (torch.float32, torch.bfloat16, torch.float16, torch.float64),
}


class BackendStatus(NamedTuple):
    """Whether a backend can run on this machine, and why (not)."""

    name: str
    available: bool
    reason: str


def status() -> list[BackendStatus]:
    """Every backend of this package with its state on this machine."""
    interpreted = triton.problem("cpu") is None
    no_triton = None if interpreted else triton.problem()
    no_cpu, no_cuda = native.problem(), cuda.problem()
    kernels = "Triton kernels, on CPU tensors in Triton's interpreter" if interpreted else "Triton kernels for GPUs"
    return [
        BackendStatus("cpu", no_cpu is None, no_cpu or f"C++ kernels for {native.instruction_set()}"),
        BackendStatus("cuda", no_cuda is None, no_cuda or f"CUDA kernels for {' '.join(cuda.architectures())}"),
        BackendStatus("triton", no_triton is None, no_triton or kernels),
        BackendStatus("reference", True, "plain PyTorch, any device"),
    ]


def refusal(name: str, device_type: str, dtype: torch.dtype, pre_act: bool = False) -> str | None:
    """Why the backend cannot serve tensors of this device type and dtype; None if it can.

    pre_act: there is an activation behind the norm.
    """
    if name == "reference":
        return None
    if pre_act and name not in WITH_PRE_ACT:
        return "it has no kernels for an activation between BatchNorm and the gate"
    if name == "cpu" and device_type != "cpu":
        return f"it serves CPU tensors, got {device_type} tensors"
    if dtype not in _DTYPES[name]:
        return f"it has no kernels for {dtype}"
    if name == "cpu":
        return native.problem()
    return (cuda if name == "cuda" else triton).problem(device_type)


def dtypes(name: str) -> tuple[torch.dtype, ...]:
    """The floating-point dtypes that a backend is tested with (the reference serves others too)."""
    return _DTYPES[name]
