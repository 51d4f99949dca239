"""Loads the compiled CPU library and launches its kernels on tensors that the operators have allocated."""

from __future__ import annotations

from pathlib import Path

import torch

from ..call import Call, GradientCall, Gradients, Outputs
from .codes import code_of, codes_of
from .synchronised import merge_statistics, share_sums, values_per_channel

__all__ = ["VECTOR_DTYPES", "backward", "forward", "instruction_set", "problem"]

# Biases and other vectors are read in the accumulation dtype alone.
VECTOR_DTYPES: tuple[torch.dtype, ...] = ()
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
    except RuntimeError as error:  # SENET_FUSED_ISA names a set that this CPU or this build does not have
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


def forward(call: Call, outputs: Outputs, channels_last: bool) -> None:
    """Fills the outputs by the C++ kernels; None is not kept, y must be there."""
    library, (y, statistics, gate, saved, mask) = torch.ops.senet_fused, outputs
    if call.norm:  # (T1)
        batch = call.norm == "batch"
        if not batch:
            statistics[0].copy_(call.mean)
            statistics[2].copy_(call.var)
            torch.add(statistics[2], call.eps, out=statistics[1]).rsqrt_()
        means = None if call.pre_act else saved  # behind an activation the squeeze does not follow from them
        if batch or means is not None:
            library._cpu_moments.default(call.x, call.eps, channels_last, means, statistics if batch else None)
        if batch and call.group:
            merge_statistics(statistics, call)
    library._cpu_forward.default(
        call.x, call.weight, call.bias, statistics, call.w1, call.b1, call.w2, call.b2, call.residual, call.factor,
        *codes_of(call.act, call.gate_fn, call.squeeze, call.post_act), *code_of(call.pre_act), channels_last,
        y, gate, saved, mask,
    )  # fmt: skip


def backward(call: GradientCall, gradients: Gradients, channels_last: bool) -> None:
    """Fills the gradients by the C++ kernels; None where one is not wanted."""
    if call.norm:
        _backward_of_norm(call, gradients, channels_last)
        return
    dx, _, _, dw1, db1, dw2, db2, dresidual = gradients
    torch.ops.senet_fused._cpu_backward.default(
        call.dy, call.dgate, call.x, call.w1, call.w2, call.gate, call.saved, call.mask,
        *codes_of(call.act, call.gate_fn, call.squeeze, call.post_act), channels_last,
        dx, dw1, db1, dw2, db2, dresidual,
    )  # fmt: skip


def _backward_of_norm(call: GradientCall, gradients: Gradients, channels_last: bool) -> None:
    """(T4) to (T7), or (P3) to (P6)."""
    library, pre_act = torch.ops.senet_fused, code_of(call.pre_act)
    dx, dweight, dbias, *dweights, dresidual = gradients
    # (T7) always needs them.
    dweight, dbias = (torch.empty_like(call.statistics[0]) if t is None else t for t in (dweight, dbias))
    dpooled = None if call.gate is None else torch.empty_like(call.gate)
    library._cpu_gradient_sums.default(
        call.dy, call.x, call.mask, call.weight, call.bias, call.statistics, call.w1, call.w2, call.factor, call.gate,
        call.saved, *codes_of(call.act, call.gate_fn, call.squeeze, call.post_act), *pre_act, channels_last, dweight,
        dbias, dpooled, *dweights,
    )  # fmt: skip
    if dx is None and dresidual is None:
        return
    batch = call.norm == "batch"
    count = float(values_per_channel(call.x)) if batch else 0.0
    if batch and call.group:  # a process without samples takes part
        count, (dweight, dbias) = 1.0, share_sums(dweight, dbias, call)
    library._cpu_gradient.default(
        call.dy, call.x, call.mask, call.weight, call.bias, call.statistics, call.factor, call.gate, dweight, dbias,
        dpooled, count, *pre_act, channels_last, torch.empty_like(call.x) if dx is None else dx, dresidual,
    )  # fmt: skip
