"""Triton's block tails as operators and modules: what gpu_tail_operator_contract.py asks for."""

from __future__ import annotations

import pytest
from gpu_contract import DEVICE
from gpu_tail_operator_contract import *  # noqa: F403

from senet_fused.backends import triton as backend

if backend.problem(DEVICE) is not None:
    pytest.skip(backend.problem(DEVICE), allow_module_level=True)

from test_triton_tail_kernels import using_strategy  # noqa: F401

pytestmark = pytest.mark.interpreter


@pytest.fixture
def backend_name():
    return "triton"
