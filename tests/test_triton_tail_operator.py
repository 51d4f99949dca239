"""Triton's block tails as operators and modules: what gpu_tail_operator_contract.py asks for."""

from __future__ import annotations

import pytest
from gpu_contract import DEVICE
from gpu_tail_operator_contract import *  # noqa: F403
from tail_oracle import Tail

from senet_fused.backends import triton as backend
from senet_fused.tails import OPERATORS

if backend.problem(DEVICE) is not None:
    pytest.skip(backend.problem(DEVICE), allow_module_level=True)
if "triton" not in OPERATORS:
    pytest.skip("the triton backend has no block tails", allow_module_level=True)

from test_triton_tail_kernels import plans_for

from senet_fused.backends.triton import launch


@pytest.fixture
def backend_name():
    return "triton"


@pytest.fixture
def using_strategy():
    def using(case: Tail, strategy: str):
        cases = [case, case.replace(residual=False)]  # the backward may want no gradient of a residual
        return launch.using({p: q for c in cases for p, q in plans_for(c, strategy).items()})

    return using
