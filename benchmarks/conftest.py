"""Options and fixtures of the pytest-benchmark suites.

    pytest benchmarks                                 SENet-154 at batch 8, stock PyTorch and the fused layer
    pytest benchmarks --se-problem efficientnet_b0 --se-batch 1 --se-providers eager compile fused
    pytest benchmarks --benchmark-autosave            keep the results; --benchmark-compare against them later
    pytest benchmarks --benchmark-disable             only check the outputs

`senet-fused bench` is the measurement to publish: it interleaves the contenders. These suites are for
following one contender over time with pytest-benchmark's own tools.
"""

from __future__ import annotations

import pytest
import torch

from senet_fused import machine
from senet_fused.bench import problems, providers


def pytest_addoption(parser):
    group = parser.getgroup("senet_fused")
    group.addoption("--se-problem", default="senet154", choices=list(problems.problems()))
    group.addoption("--se-batch", type=int, default=8)
    group.addoption("--se-providers", nargs="+", default=["eager", "fused"], choices=list(providers.BUILDERS))


def pytest_benchmark_update_machine_info(config, machine_info):
    machine_info["cpu"]["brand_raw"] = machine.cpu_name()
    machine_info["torch"] = torch.__version__
    machine_info["threads"] = torch.get_num_threads()
    machine_info["revision"] = machine.revision()


def pytest_generate_tests(metafunc):
    if "provider_name" in metafunc.fixturenames:
        metafunc.parametrize("provider_name", metafunc.config.getoption("--se-providers"))
    if "shape" in metafunc.fixturenames:
        shapes = problems.problem(metafunc.config.getoption("--se-problem")).shapes
        ids = [f"{s.channels}/{s.rd_channels}@{'x'.join(map(str, s.spatial))}" for s in shapes]
        metafunc.parametrize("shape", shapes, ids=ids)


@pytest.fixture
def problem(request):
    return problems.problem(request.config.getoption("--se-problem"))


@pytest.fixture
def batch(request):
    return request.config.getoption("--se-batch")
