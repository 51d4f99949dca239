"""The names that the operators had in 0.1.0, in programs that torch.export has saved: they call today's."""

from __future__ import annotations

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
    def layer(x, w1, b1, w2, b2, residual, act, gate_fn, squeeze, post_act, save) -> tuple[Tensor, ...]:
        norm = None, None, None, None
        call = Call(x, *norm, w1, b1, w2, b2, residual, None, 0.0, "", act, gate_fn, squeeze, post_act, "")
        y, _, *kept = operator.registered(call, save)
        return y, *kept

    def tail(*arguments) -> tuple[Tensor, ...]:
        *tensors, eps, act, gate_fn, post_act, group, save = arguments
        norm = "batch" if tensors[Call._fields.index("mean")] is None else "given"
        return operator.registered(Call(*tensors, eps, norm, act, gate_fn, "avg", post_act, group), save)

    for name, schema, function in (("squeeze_excite", _LAYER, layer), ("block_tail", _TAIL, tail)):
        torch.library.define(f"senet_fused::{name}_{backend}", schema)
        torch.library.impl(f"senet_fused::{name}_{backend}", "CompositeImplicitAutograd", function)


for _backend, _operator in OPERATORS.items():
    _define(_backend, _operator)
