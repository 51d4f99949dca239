"""The layers of a network, cold: forward without grad, backward, and both."""

from __future__ import annotations

import pytest
from contender import prepared

from senet_fused.bench.problems import DIRECTIONS, LAYOUTS, Case


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_layer(benchmark, problem, batch, shape, provider_name, direction, dtype, layout):
    case = Case(problem.name, batch, shape, problem.act, problem.gate, dtype, layout, direction)
    benchmark.group = f"{case.problem} {case.label} {dtype} {layout} {direction}"
    with prepared(case, provider_name, cold=benchmark.enabled) as (call, provider):
        benchmark(call)
    benchmark.extra_info.update(provider=provider_name, backend=provider.path(), passes=case.passes)
