"""The operators' names in 0.1.0, for programs that torch.export has saved: they call today's operators."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor

from ..call import Call
from .define import OPERATORS, Operator

__all__: list[str] = []

_LAYER = (
    "(Tensor x, Tensor w1, Tensor? b1, Tensor w2, Tensor? b2, Tensor? residual, str act, str gate_fn, str squeeze, "
    "str post_act, bool save) -> (Tensor y, Tensor gate, Tensor saved, Tensor mask)"
)
_TAIL = (
    "(Tensor x, Tensor? weight, Tensor? bias, Tensor? mean, Tensor? var, Tensor? w1, Tensor? b1, Tensor? w2, "
    "Tensor? b2, Tensor? residual, Tensor? factor, float eps, str act, str gate_fn, str post_act, str group, bool save)"
    " -> (Tensor y, Tensor statistics, Tensor gate, Tensor saved, Tensor mask)"
)


def _define(backend: str, operator: Operator) -> None:
    def registered(call: Call, save: bool) -> tuple[Tensor, ...]:
        # Of a registered operator every output is a tensor.
        return cast(tuple[Tensor, ...], operator.registered(call, save))

    def layer(*arguments: Any) -> tuple[Tensor, ...]:
        x, w1, b1, w2, b2, residual, act, gate_fn, squeeze, post_act, save = arguments
        norm = None, None, None, None
        call = Call(x, *norm, w1, b1, w2, b2, residual, None, 0.0, "", act, gate_fn, squeeze, post_act, "")
        y, _, gate, saved, mask = registered(call, save)
        return y, gate, saved, mask

    def tail(*arguments: Any) -> tuple[Tensor, ...]:
        *tensors, eps, act, gate_fn, post_act, group, save = arguments
        norm = "batch" if tensors[Call._fields.index("mean")] is None else "given"
        return registered(Call._make((*tensors, eps, norm, act, gate_fn, "avg", post_act, group, "")), save)

    for name, schema, function in (("squeeze_excite", _LAYER, layer), ("block_tail", _TAIL, tail)):
        torch.library.define(f"senet_fused::{name}_{backend}", schema)
        torch.library.impl(f"senet_fused::{name}_{backend}", "CompositeImplicitAutograd", function)


for _backend, _operator in OPERATORS.items():
    _define(_backend, _operator)
