"""One provider in one case, checked and ready to be called: what the suites time."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator
from functools import lru_cache

import torch

from senet_fused import machine
from senet_fused.bench import buffers, oracle, providers, runner
from senet_fused.bench.problems import Case
from senet_fused.bench.timing import Rotation
from senet_fused.torch_private import forget_compiled, keeping_saved_tensors

__all__ = ["prepared"]

CPU = torch.device("cpu")


@lru_cache(maxsize=8)
def _judge(case: Case) -> runner.Judge:
    return runner.make_judge(case, buffers.make_weights(case, CPU), CPU)


@contextlib.contextmanager
def prepared(case: Case, name: str, cold: bool) -> Iterator[tuple[Callable[[], object], providers.Provider]]:
    """A function that computes the case once, on the next of the rotating inputs (cold) or on the same one.

    It is to be called within the block.

    Raises:
        AssertionError: the provider's output or a gradient is wrong; a wrong result is not worth timing.
    """
    weights = buffers.make_weights(case, CPU)
    exact, stock_errors, plain, _ = _judge(dataclasses.replace(case, layout="", direction="forward+backward"))
    forget_compiled()
    with keeping_saved_tensors() if case.keeps_graph else contextlib.nullcontext():
        provider = providers.BUILDERS[name](case, weights, "linear", None)
        found = providers.results(provider, case, buffers.check_inputs(case, weights, CPU))
        verdict = oracle.judge(case, found, exact, stock_errors, plain, ours=providers.is_ours(provider))
        assert verdict.wrong is None, verdict.wrong
        least_bytes, least = (2 * machine.last_level_cache_bytes(), 2) if cold else (0, 1)
        sets = buffers.BufferPool(CPU).sets(case, least_bytes, least)
        with torch.set_grad_enabled(case.backward):
            call, rotation = runner.bind(provider, sets, case), Rotation(len(sets))
            yield lambda: call(rotation.take(1)[0]), provider
