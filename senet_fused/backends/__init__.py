"""The backends: what each one serves, whether it can run here, and why not."""

from __future__ import annotations

from typing import NamedTuple

import torch

from . import native

__all__ = ["NAMES", "BackendStatus", "refusal", "status"]

# In the order in which "auto" prefers them.
NAMES = ("cpu", "reference")

FLOAT_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


class BackendStatus(NamedTuple):
    """Whether a backend can run on this machine at all, and why (not)."""

    name: str
    available: bool
    reason: str


def status() -> list[BackendStatus]:
    """Every backend of this package with its state on this machine."""
    problem = native.problem()
    return [
        BackendStatus("cpu", problem is None, problem or f"C++ kernels for {native.instruction_set()}"),
        BackendStatus("reference", True, "plain PyTorch, any device"),
    ]


def refusal(name: str, device_type: str, dtype: torch.dtype) -> str | None:
    """Why the backend cannot serve tensors of this device type and dtype; None if it can."""
    if name == "reference":
        return None
    if device_type != "cpu":
        return f"it serves CPU tensors, got {device_type} tensors"
    if dtype not in FLOAT_DTYPES:
        return f"it has no kernels for {dtype}"
    return native.problem()
