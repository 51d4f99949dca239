"""Block tails of a GPU backend where it has none: the CPU kernels under its name, and problems that know of tails.

Where the backend has kernels of its own nothing is replaced, and tests run those.
"""

from __future__ import annotations

import dataclasses
from functools import lru_cache
from typing import NamedTuple

import pytest
import torch

from senet_fused import tails, tune
from senet_fused.backends import cuda, native
from senet_fused.backends.triton import plan as planner
from senet_fused.backends.triton import tuned
from senet_fused.tails import ops

__all__ = ["OWN", "needs_tails", "stand_in"]

# The backends that have kernels for block tails, before anything stands in.
OWN = tuple(tails.OPERATORS)


def needs_tails(name: str) -> pytest.MarkDecorator:
    """Skips a test of a backend's own tail kernels while it has none."""
    return pytest.mark.skipif(name not in OWN, reason=f"the {name} backend has no kernels for block tails")


@lru_cache(maxsize=2)
def _operator(name: str):
    return ops._define(name, ("CPU",), native)  # an operator can be defined once in a process


@dataclasses.dataclass(frozen=True)
class _Problem(planner.Problem):
    norm: str = ""


_layer_problem = cuda.Problem
# A NamedTuple cannot be extended.
_CudaProblem = NamedTuple("_CudaProblem", list({**_layer_problem.__annotations__, "norm": str}.items()))
_CudaProblem.native = lambda self: _layer_problem(*self[:-1]).native()


def stand_in(monkeypatch: pytest.MonkeyPatch, *names: str) -> None:
    """Within the test these backends have block tails; their plans are those of the SE layer.

    Skips where there are no CPU kernels to stand in, or no CPU tensors to stand in for.
    """
    missing = [name for name in names if name not in tails.OPERATORS]
    if missing and (native.problem() is not None or torch.cuda.is_available()):
        pytest.skip(native.problem() or "there is a GPU, on whose tensors nothing stands in")
    for name in missing:
        monkeypatch.setitem(tails.OPERATORS, name, _operator(name))
    if "norm" not in {field.name for field in dataclasses.fields(planner.Problem)}:
        monkeypatch.setattr(tune, "Problem", _Problem)
        monkeypatch.setattr(tuned, "Problem", _Problem)
    if "norm" not in cuda.Problem._fields:
        monkeypatch.setattr(cuda, "Problem", _CudaProblem)
