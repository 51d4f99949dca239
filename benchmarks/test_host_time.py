"""A tensor so small that the time of a call is the host's: Python, dispatch, allocation."""

from __future__ import annotations

import pytest
import torch
from contender import prepared

from senet_fused.bench.problems import DIRECTIONS, Case, Shape


@pytest.fixture(autouse=True)
def one_thread():
    """Waking a second thread would cost more than the call."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_call(benchmark, provider_name, direction):
    case = Case("tiny", 1, Shape(8, 2, (4, 4)), direction=direction)
    benchmark.group = f"host time of a call, {direction}"
    with prepared(case, provider_name, cold=False) as (call, provider):
        benchmark(call)
    benchmark.extra_info.update(provider=provider_name, backend=provider.path())
