"""Loads the compiled CPU library and launches its kernels on tensors that the operators have allocated."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from .codes import codes_of

__all__ = ["backward", "forward", "instruction_set", "problem", "tail_backward", "tail_forward"]

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
        x, w1, b1, w2, b2, residual, *codes_of(act, gate_fn, squeeze, post_act), channels_last, *outputs
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
        dy, dgate, x, w1, w2, gate, saved, mask, *codes_of(act, gate_fn, squeeze, post_act), channels_last, *outputs
    )


def tail_forward(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    statistics: Tensor,
    given: tuple[Tensor, Tensor] | None,
    together: Callable[[], None] | None,
    w1: Tensor | None,
    b1: Tensor | None,
    w2: Tensor | None,
    b2: Tensor | None,
    residual: Tensor | None,
    factor: Tensor | None,
    eps: float,
    act: str,
    gate_fn: str,
    post_act: str,
    channels_last: bool,
    outputs: Sequence[Tensor | None],
) -> None:
    """(T1) to (T3) of a block tail (``senet_fused.tails.ops``): fills statistics, y, gate, saved, mask.

    given: the mean and variance to use, or None. together: called once the statistics are there, which it changes in
    place; or None.
    """
    library, saved = torch.ops.senet_fused, outputs[2]
    if given is not None:
        statistics[0].copy_(given[0])
        statistics[2].copy_(given[1])
        torch.add(statistics[2], eps, out=statistics[1]).rsqrt_()
    if given is None or saved is not None:
        library._cpu_tail_moments.default(x, eps, channels_last, saved, statistics if given is None else None)
    if together is not None:
        together()
    library._cpu_tail_forward.default(
        x, weight, bias, statistics, w1, b1, w2, b2, residual, factor,
        *codes_of(act, gate_fn, "avg", post_act), channels_last, *outputs,
    )  # fmt: skip


def tail_backward(
    dy: Tensor,
    x: Tensor,
    mask: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    statistics: Tensor,
    w1: Tensor | None,
    w2: Tensor | None,
    factor: Tensor | None,
    gate: Tensor | None,
    saved: Tensor | None,
    act: str,
    gate_fn: str,
    post_act: str,
    channels_last: bool,
    count: float,
    together: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]] | None,
    outputs: Sequence[Tensor | None],
) -> None:
    """(T4) to (T7) of a block tail: fills dx, dweight, dbias, dw1, db1, dw2, db2, dresidual; None is not wanted.

    count: m, 0 where the statistics were given. together: called with dweight and dbias, gives what (T7) takes in place
    of dweight / m and dbias / m; or None.
    """
    library = torch.ops.senet_fused
    dx, dweight, dbias, *dweights, dresidual = outputs
    # (T7) needs them in any case.
    dweight, dbias = (torch.empty_like(statistics[0]) if t is None else t for t in (dweight, dbias))
    dpooled = None if gate is None else torch.empty_like(gate)
    library._cpu_tail_sums.default(
        dy, x, mask, weight, bias, statistics, w1, w2, factor, gate, saved,
        *codes_of(act, gate_fn, "avg", post_act), channels_last, dweight, dbias, dpooled, *dweights,
    )  # fmt: skip
    if dx is None and dresidual is None:
        return
    if together is not None:
        count, (dweight, dbias) = 1.0, together(dweight, dbias)
    library._cpu_tail_gradient.default(
        dy, x, mask, weight, statistics, factor, gate, dweight, dbias, dpooled, count, channels_last,
        torch.empty_like(x) if dx is None else dx, dresidual,
    )  # fmt: skip
