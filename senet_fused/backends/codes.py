"""The options of a call as the compiled kernels know them."""

from __future__ import annotations

from functools import lru_cache

from ..activations import Activation
from ..reference import SQUEEZES

__all__ = ["code_of", "codes_of"]


Codes = tuple[int, float, int, float, float, int, int]


@lru_cache(maxsize=256)
def codes_of(act: str, gate: str, squeeze: str, post_act: str) -> Codes:
    """(act, its parameter, gate, its two parameters, squeeze, is there a ReLU), as csrc/plan/plan.h numbers them.

    Raises:
        ValueError: an unknown function, squeeze or post_act.
    """
    if squeeze not in SQUEEZES or post_act not in ("", "relu"):
        known = f"squeeze one of {', '.join(SQUEEZES)}, post_act '' or 'relu'"
        raise ValueError(f"expected {known}; got {squeeze!r} and {post_act!r}")
    a, g = Activation.parse(act), Activation.parse(gate)
    slope, offset = g.args or (0.0, 0.0)
    return a.code, (a.args or (0.0,))[0], g.code, slope, offset, SQUEEZES.index(squeeze), int(post_act == "relu")


@lru_cache(maxsize=256)
def code_of(function: str) -> tuple[int, float]:
    """(function, its parameter) as csrc/plan/plan.h numbers them; the identity's for none.

    Raises:
        ValueError: an unknown function.
    """
    if not function:
        return 0, 0.0
    f = Activation.parse(function)
    return f.code, (f.args or (0.0,))[0]
