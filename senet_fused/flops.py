"""FLOP formulas of the operators for PyTorch's FLOP counter: (E2) and (E3) are two matrix products, backward four.

torch.utils.flop_counter imports triton, which takes longer than this whole package, and a counter copies the table of
formulas when it is made. So the formulas are registered when a call first meets a counter.
"""

from __future__ import annotations

import sys
from typing import Any

import torch

from . import torch_private
from .call import options_of

__all__ = ["in_dispatch_modes"]

_MODULE = "torch.utils.flop_counter"
_BACKENDS = ("cpu", "cuda", "triton")


def in_dispatch_modes() -> bool:
    """Whether dispatch modes see this call. Registers the formulas with those that count FLOPs."""
    if not torch_private.dispatch_modes():
        return False
    if _MODULE in sys.modules:
        _register(sys.modules[_MODULE])
    return True


def _register(flop_counter: Any) -> None:
    known, ours = flop_counter.flop_registry, {}
    for name, formula in _FORMULAS.items():
        for backend in _BACKENDS:
            operator = getattr(torch.ops.senet_fused, name.format(backend))
            if operator not in known:
                flop_counter.register_flop_formula(operator)(formula)
            ours[operator] = known[operator]
    for mode in torch_private.dispatch_mode_stack():
        counter = getattr(mode, "counter", None)
        if isinstance(counter, flop_counter.FlopCounterMode):
            counter.flop_registry = ours | counter.flop_registry  # the caller's custom mapping takes precedence


def _product(x: Any, w1: Any) -> int:
    """FLOPs of one of the products: [N, C] with [C, R]; shapes of x and w1."""
    return 2 * x[0] * w1[0] * w1[1]


def _forward(x: Any, _weight: Any, _bias: Any, _mean: Any, _var: Any, w1: Any, *_: Any, out_shape: Any = None) -> int:
    return 0 if w1 is None else 2 * _product(x, w1)


def _backward(
    _dy: Any, _dgate: Any, x: Any, _weight: Any, _bias: Any, w1: Any, *others: Any, out_shape: Any = None
) -> int:
    text, need_x, need_weights, _need_residual = others[-4:]
    if w1 is None or not (need_x or need_weights):
        return 0
    # A norm's gradients need dpooled, too.
    return (1 + bool(need_x or options_of(text)[0]) + 2 * bool(need_weights)) * _product(x, w1)


_FORMULAS = {"fused_se_{}": _forward, "fused_se_{}_backward": _backward}
