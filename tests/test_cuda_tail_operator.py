"""The CUDA backend's block tails as operators and modules: what gpu_tail_operator_contract.py asks for."""

from __future__ import annotations

import pytest
from cuda_runner import PROBLEM, cuda_kernels, planning  # noqa: F401
from gpu_tail_operator_contract import *  # noqa: F403

from senet_fused.backends import cuda

pytestmark = [
    pytest.mark.skipif(PROBLEM is not None, reason=str(PROBLEM)),
    pytest.mark.usefixtures("cuda_kernels"),
]


@pytest.fixture
def backend_name():
    return "cuda"


@pytest.fixture
def using_strategy():
    return lambda case, strategy: cuda.using(planning(strategy))
