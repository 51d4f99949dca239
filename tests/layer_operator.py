"""The registered operators called as those of an SE layer: without what only a block tail has."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from senet_fused.call import TENSORS, Call, text_of

__all__ = ["Backward", "Forward", "call_of"]


def call_of(
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
) -> Call:
    return Call(x, None, None, None, None, w1, b1, w2, b2, residual, None, 0.0, "", act, gate_fn, squeeze, post_act, "")


class Forward:
    """A backend's registered forward: (arguments of call_of, save) -> (y, gate, saved, mask)."""

    def __init__(self, backend: str) -> None:
        self.operator = getattr(torch.ops.senet_fused, f"fused_se_{backend}").default

    def arguments(self, *layer: Any) -> tuple[Any, ...]:
        """The operator's own."""
        *fields, save = layer
        call = call_of(*fields)
        return *call[: TENSORS + 1], text_of(call[TENSORS + 1 :]), save

    def __call__(self, *layer: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        y, _, gate, saved, mask = self.operator(*self.arguments(*layer))
        return y, gate, saved, mask


class Backward:
    """A backend's registered backward: (dy, dgate, x, w1, b1, w2, b2, gate, saved, mask, act, gate_fn, squeeze,
    post_act, need_x, need_weights, need_residual) -> (dx, dw1, db1, dw2, db2, dresidual)."""

    def __init__(self, backend: str) -> None:
        self.operator = getattr(torch.ops.senet_fused, f"fused_se_{backend}_backward").default

    def arguments(self, *layer: Any) -> tuple[Any, ...]:
        """The operator's own."""
        dy, dgate, x, w1, b1, w2, b2, gate, saved, mask, act, gate_fn, squeeze, post_act, *needs = layer
        tensors = (dy, dgate, x, None, None, w1, b1, w2, b2, None, None, gate, saved, mask)
        return *tensors, 0.0, text_of(("", act, gate_fn, squeeze, post_act, "", "")), *needs

    def __call__(self, *layer: Any) -> tuple[Tensor, ...]:
        dx, _, _, *gradients = self.operator(*self.arguments(*layer))
        return dx, *gradients
