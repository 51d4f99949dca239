"""What tests of training compare: states of runs, to the bit."""

from __future__ import annotations

import torch


def difference(a, b, place=""):
    """Where two nested states differ first, in a bit, a type or an order; None if they do not."""
    if type(a) is not type(b):
        return f"{place}: {type(a)} and {type(b)}"
    if isinstance(a, torch.Tensor):
        alike = a.dtype == b.dtype and a.shape == b.shape and a.numpy().tobytes() == b.numpy().tobytes()
        return None if alike else f"{place}: tensors"
    if isinstance(a, dict):
        if list(a) != list(b):
            return f"{place}: keys {list(a)} and {list(b)}"
        found = (difference(a[key], b[key], f"{place}.{key}") for key in a)
    elif isinstance(a, (list, tuple)) and len(a) == len(b):
        found = (difference(x, y, f"{place}.{index}") for index, (x, y) in enumerate(zip(a, b, strict=True)))
    else:
        return None if repr(a) == repr(b) else f"{place}: {str(a)[:80]} and {str(b)[:80]}"
    return next(filter(None, found), None)
