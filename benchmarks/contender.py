"""One provider in one case, checked and ready to be called: what the suites time."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import lru_cache

import torch

from senet_fused import machine
from senet_fused.bench import buffers, oracle, providers, runner
from senet_fused.bench.problems import Case
from senet_fused.bench.timing import Rotation

__all__ = ["prepare"]

CPU = torch.device("cpu")


@lru_cache(maxsize=8)
def _judge(case: Case) -> runner.Judge:
    return runner.appoint(case, buffers.make_weights(case, CPU), CPU)


def prepare(case: Case, name: str, cold: bool) -> tuple[Callable[[], object], providers.Provider]:
    """A function that computes the case once, on the next of the rotating inputs (cold) or on the same one.

    Raises:
        AssertionError: the provider's output or a gradient is wrong; a wrong result is not worth timing.
    """
    weights = buffers.make_weights(case, CPU)
    judge = _judge(dataclasses.replace(case, layout="", direction=""))
    providers.forget_compiled()
    provider = providers.BUILDERS[name](case, weights, "linear", None)
    with providers.compiling_for(case):
        found = providers.results(provider, case, buffers.check_inputs(case, weights, CPU))
    standard = judge.exact, judge.stock_errors, judge.plain
    verdict = oracle.judge(case, found, *standard, ours=providers.is_ours(provider))
    assert verdict.wrong is None, verdict.wrong

    least_bytes, least = (2 * machine.last_level_cache_bytes(), 2) if cold else (0, 1)
    sets = buffers.BufferPool(CPU).sets(case, least_bytes, least)
    with providers.compiling_for(case):
        call, rotation = runner.bind(provider, sets, case), Rotation(len(sets))
    return (lambda: call(rotation.take(1)[0])), provider
