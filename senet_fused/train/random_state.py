"""The states of the random generators, in types that a checkpoint can hold."""

from __future__ import annotations

import random
import sys
from collections.abc import Mapping
from typing import Any

import torch

from ..arguments import RequestError

__all__ = ["rng_state", "set_rng_state"]


def rng_state() -> dict[str, Any]:
    """The states of the global random generators: Python's, NumPy's, PyTorch's on the CPU and the current CUDA device.

    NumPy's if it has been imported, CUDA's if it has been used. Of types that a checkpoint can hold.

    Raises:
        RequestError: If NumPy's global generator was exchanged for another than MT19937.
    """
    state: dict[str, Any] = {"python": random.getstate(), "torch": torch.get_rng_state()}
    numpy = sys.modules.get("numpy")
    if numpy is not None:
        inner = numpy.random.get_state(legacy=False)
        if inner["bit_generator"] != "MT19937":
            raise RequestError(f"NumPy's global generator is {inner['bit_generator']}; only MT19937 can be saved")
        state["numpy"] = {
            "key": inner["state"]["key"].tolist(),
            "pos": int(inner["state"]["pos"]),
            "has_gauss": int(inner["has_gauss"]),
            "gauss": float(inner["gauss"]),
        }
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def set_rng_state(state: Mapping[str, Any]) -> None:
    """Puts the generators in the state that ``rng_state`` returned, CUDA's on the current device, if there is one."""
    random.setstate(state["python"])
    torch.set_rng_state(state["torch"])
    if "numpy" in state:
        import numpy

        inner = state["numpy"]
        numpy.random.set_state(("MT19937", inner["key"], inner["pos"], inner["has_gauss"], inner["gauss"]))
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])
