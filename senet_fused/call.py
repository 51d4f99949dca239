"""The typed calls that pass from the public functions over the operators to the backends.

One family of operators serves SE layers and block tails (numbered equations in :mod:`senet_fused.reference`)::

    y = post_act(factor * gate * pre_act(norm(x)) + residual)

norm is BatchNorm by the batch's statistics ("batch"), by given ones ("given"), or nothing (""); pre_act an activation
behind a norm, or nothing (""); gate is the SE layer's, or one where there are no weights.

The first fields of a call are the tensors that a registered operator takes, in its order; options but eps come as one
text, because each argument of a registered operator costs microseconds.

NamedTuples, because one is made at every call of a layer: 0.3 us, a frozen dataclass of this size takes six times as
long.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any, Final, NamedTuple

import torch
from torch import Tensor

__all__ = ["OPTIONS", "TENSORS", "Call", "GradientCall", "Gradients", "Outputs", "options_of", "text_of"]


class Call(NamedTuple):
    """A forward. Absent tensors are None, absent functions "".

    x, residual: [N, C, *spatial]. weight, bias: BatchNorm's [C]. mean, var: [C], the statistics with norm="given".
    w1, b1, w2, b2: [R, C], [R], [C, R], [C]. factor: [N]. eps: added to the variance. pre_act, act, gate_fn: texts of
    :attr:`senet_fused.Activation.spec`. squeeze: "avg", "max", "avgmax" (the latter two without a norm). post_act:
    "relu" or "". group: name of the process group that shares the batch's statistics. pre_act: with a norm.
    """

    x: Tensor
    weight: Tensor | None
    bias: Tensor | None
    mean: Tensor | None
    var: Tensor | None
    w1: Tensor | None
    b1: Tensor | None
    w2: Tensor | None
    b2: Tensor | None
    residual: Tensor | None
    factor: Tensor | None
    eps: float
    norm: str
    act: str
    gate_fn: str
    squeeze: str
    post_act: str
    group: str
    pre_act: str = ""

    def gradient(
        self, outputs: Outputs, dy: Tensor, dgate: Tensor | None, needs: tuple[bool, bool, bool]
    ) -> GradientCall:
        """The backward of this call. needs: gradients of x, of any weight or vector, of residual if there is a ReLU."""
        inputs = self.x, self.weight, self.bias, self.w1, self.b1, self.w2, self.b2, self.factor
        return GradientCall._make((dy, dgate, *inputs, *outputs[1:], *self[TENSORS:], *needs))


class Outputs(NamedTuple):
    """What a forward returns; what is not kept is None.

    y: as x. statistics: [3, C] in the accumulation dtype (float32; float64 for float64 x), with a norm: mean,
    (var + eps)^-1/2, and the variance as running statistics keep it. gate: [N, C] in the accumulation dtype. saved:
    [N, K] in the accumulation dtype, the columns being the squeezed x (C; with a norm alone what the backend keeps of
    it) | preact (R) and, where the squeeze takes a maximum, | peak (C) | ties (C). mask: uint8, one bit per element
    where post_act let it through, least significant bit first, in x's memory order: [N, C, ceil(M / 8)] for
    contiguous x, [N, M, ceil(C / 8)] for channels_last.
    """

    y: Tensor
    statistics: Tensor | None
    gate: Tensor | None
    saved: Tensor | None
    mask: Tensor | None


class GradientCall(NamedTuple):
    """A backward: dy and dgate (None: nothing reaches the gate), the forward's inputs and outputs, what is wanted."""

    dy: Tensor
    dgate: Tensor | None
    x: Tensor
    weight: Tensor | None
    bias: Tensor | None
    w1: Tensor | None
    b1: Tensor | None
    w2: Tensor | None
    b2: Tensor | None
    factor: Tensor | None
    statistics: Tensor | None
    gate: Tensor | None
    saved: Tensor | None
    mask: Tensor | None
    eps: float
    norm: str
    act: str
    gate_fn: str
    squeeze: str
    post_act: str
    group: str
    pre_act: str
    need_x: bool
    need_weights: bool
    need_residual: bool


class Gradients(NamedTuple):
    """Gradients of a forward's inputs, each in its input's shape and dtype; None where it has or needs none."""

    dx: Tensor | None
    dweight: Tensor | None
    dbias: Tensor | None
    dw1: Tensor | None
    db1: Tensor | None
    dw2: Tensor | None
    db2: Tensor | None
    dresidual: Tensor | None


TENSORS: Final = 11  # of a Call, which begins with them; a literal, so that types of slices are known
assert Call._fields[TENSORS] == "eps"
OPTIONS = Call._fields[TENSORS + 1 :]
_SEPARATOR = "; "


def text_of(options: tuple[Any, ...]) -> str:
    """A call's options as a registered operator takes them: "norm=batch; act=relu; ..."."""
    return _write(options) if torch.compiler.is_compiling() else _text_of(options)  # which warns of cached functions


@lru_cache(maxsize=256)
def options_of(text: str) -> tuple[Any, ...]:
    """:func:`text_of` read back. Raises ValueError for any other text."""
    pairs = [part.partition("=") for part in text.split(_SEPARATOR, len(OPTIONS) - 1)]
    if tuple(name for name, _, _ in pairs) != OPTIONS:
        raise ValueError(f"expected options {_SEPARATOR.join(f'{name}=...' for name in OPTIONS)}; got {text!r}")
    return tuple(value for _, _, value in pairs)


def _write(options: tuple[Any, ...]) -> str:
    return _SEPARATOR.join([f"{name}={value}" for name, value in zip(OPTIONS, options, strict=True)])


_text_of = lru_cache(maxsize=256)(_write)
