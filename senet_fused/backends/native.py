"""Loads the compiled CPU library and launches its kernels on tensors that the operators have allocated."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor

from ..activations import Activation
from ..reference import SQUEEZES

__all__ = ["backward", "forward", "instruction_set", "problem"]

LIBRARY = Path(__file__).resolve().parent.parent / "_cpu.so"

_problem: str | None = None


def _load() -> str | None:
    if not LIBRARY.exists():
        return "the compiled library is not installed (reinstall with a C++ compiler and without SENET_FUSED_NO_EXT)"
    try:
        torch.ops.load_library(str(LIBRARY))
    except OSError as error:
        return f"the compiled library does not load: {error}"
    try:
        torch.ops.senet_fused._cpu_instruction_set()
    except RuntimeError as error:  # SENET_FUSED_ISA asks for what this CPU or this build has not
        return str(error).splitlines()[0].rpartition("senet_fused: ")[2]
    return None


# At import: it takes under a millisecond, and torch.compile must not meet it in a traced call.
_problem = _load()


def problem() -> str | None:
    """Why the compiled library cannot be used; None if it is loaded."""
    return _problem


def instruction_set() -> str:
    """The instruction set that the kernels run with: "avx512_bf16", "avx512", "avx2" or "baseline".

    ``SENET_FUSED_ISA`` limits it (read once, when the library is first used). Raises RuntimeError without the library.
    """
    if _problem is not None:
        raise RuntimeError(_problem)
    return torch.ops.senet_fused._cpu_instruction_set()


@lru_cache(maxsize=256)
def _codes(act: str, gate: str, squeeze: str, post_act: str) -> tuple[int, float, int, float, float, int, int]:
    if squeeze not in SQUEEZES or post_act not in ("", "relu"):
        known = f"squeeze one of {', '.join(SQUEEZES)}, post_act '' or 'relu'"
        raise ValueError(f"expected {known}; got {squeeze!r} and {post_act!r}")
    a, g = Activation.parse(act), Activation.parse(gate)
    slope, offset = g.args or (0.0, 0.0)
    return a.code, (a.args or (0.0,))[0], g.code, slope, offset, SQUEEZES.index(squeeze), int(post_act == "relu")


def forward(
    x: Tensor,
    w1: Tensor,
    b1: Tensor | None,
    w2: Tensor,
    b2: Tensor | None,
    residual: Tensor | None,
    act: str,
    gate_fn: str,
    squeeze: str,
    post_act: str,
    channels_last: bool,
    outputs: Sequence[Tensor | None],
) -> None:
    """Fills y, gate, saved, mask (see ``senet_fused.ops``) by the C++ kernels; None is not kept, y must be there.

    x and residual share one dense layout.
    """
    torch.ops.senet_fused._cpu_forward.default(
        x, w1, b1, w2, b2, residual, *_codes(act, gate_fn, squeeze, post_act), channels_last, *outputs
    )


def backward(
    dy: Tensor,
    dgate: Tensor | None,
    x: Tensor,
    w1: Tensor,
    w2: Tensor,
    gate: Tensor,
    saved: Tensor,
    mask: Tensor,
    act: str,
    gate_fn: str,
    squeeze: str,
    post_act: str,
    channels_last: bool,
    outputs: Sequence[Tensor | None],
) -> None:
    """Fills dx, dw1, db1, dw2, db2, dresidual; None where a gradient is not wanted."""
    torch.ops.senet_fused._cpu_backward.default(
        dy, dgate, x, w1, w2, gate, saved, mask, *_codes(act, gate_fn, squeeze, post_act), channels_last, *outputs
    )
