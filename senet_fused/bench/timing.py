"""Interleaved wall-clock sampling.

All contenders of a case are sampled round by round in a shuffled order, so drift of the machine hits them
alike and none always runs behind the same neighbour. A sample is the mean of an automatically chosen number
of calls, enough to be far above the clock's resolution; the median and the interquartile range are taken over
samples.
"""

from __future__ import annotations

import dataclasses
import gc
import math
import random
import statistics
import time
from collections.abc import Callable, Mapping

__all__ = [
    "QUICK", "Outcome", "Rotation", "Settings", "Statistics", "describe", "figures", "finite", "interleave", "per_call",
    "ratio", "sample_in_turns",
]  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Settings:
    """How long to measure one case.

    budget_s: time for all samples of the case together, once everything is warm. min_rounds are taken even if
        they need longer, at most max_rounds even if time is left. sample_s: what one sample should last at
        least.
    """

    budget_s: float = 3.0
    min_rounds: int = 7
    max_rounds: int = 200
    sample_s: float = 2e-3
    max_inner: int = 2000


QUICK = Settings(budget_s=0.25, min_rounds=3, max_rounds=50, sample_s=1e-3)


@dataclasses.dataclass(frozen=True)
class Statistics:
    """Seconds per call over the samples: median, interquartile range; how many samples of how many calls."""

    median_s: float
    iqr_s: float
    samples: int
    inner: int

    @staticmethod
    def of(samples: list[float], inner: int) -> Statistics:
        if len(samples) == 1:
            return Statistics(samples[0], 0.0, 1, inner)
        low, median, high = statistics.quantiles(samples, n=4, method="inclusive")
        return Statistics(median, high - low, len(samples), inner)


def figures(statistics: Statistics | None) -> dict[str, float | int | None]:
    """The columns of a row that say how long a call took."""
    values = (None, None, 0, 0) if statistics is None else dataclasses.astuple(statistics)
    return dict(zip(("median_s", "iqr_s", "samples", "calls_per_sample"), values, strict=True))


def ratio(value: float | None, base: float | None) -> float | None:
    return value / base if value is not None and base else None


def finite(value: float | None) -> float | None:
    """None for infinities and NaN, which JSON does not have."""
    return value if value is not None and math.isfinite(value) else None


@dataclasses.dataclass(frozen=True)
class Outcome:
    """Statistics of one contender, or the error that its call raised."""

    statistics: Statistics | None
    error: str | None = None


class Rotation:
    """Hands out buffer numbers 0, 1, ..., size - 1, 0, ... across all contenders of a case.

    One cursor for all: if each had its own, a contender would find the buffers that its neighbour has just
    read.
    """

    def __init__(self, size: int) -> None:
        self._size = size
        self._next = 0

    def take(self, count: int) -> list[int]:
        numbers = [(self._next + step) % self._size for step in range(count)]
        self._next = (self._next + count) % self._size
        return numbers


def per_call(call: Callable[[int], object], numbers: list[int], synchronize: Callable[[], None] | None) -> float:
    """Seconds per call, over one call for each buffer number."""
    if synchronize is not None:
        synchronize()
    start = time.perf_counter()
    for number in numbers:
        call(number)
    if synchronize is not None:
        synchronize()
    return (time.perf_counter() - start) / len(numbers)


def describe(error: BaseException) -> str:
    """An exception as one short line."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    text = f"{type(error).__name__}: {lines[0] if lines else ''}".rstrip(": ")
    return text if len(text) <= 300 else text[:297] + "..."


def sample_in_turns(
    samples: Mapping[str, Callable[[], float]],
    calls_per_sample: Mapping[str, int],
    errors: Mapping[str, str],
    settings: Settings,
    tick: Callable[[], None],
) -> dict[str, Outcome]:
    """Rounds over all contenders, each in another order, until the budget is spent.

    Args:
        samples: take a sample, in seconds per call. A contender that raises is dropped, with its error.
        errors: of those that have failed before.
        tick: called between rounds, never within a sample, for a progress display.
    """
    taken: dict[str, list[float]] = {name: [] for name in samples}
    errors = dict(errors)
    order = random.Random(0)
    deadline = time.perf_counter() + settings.budget_s
    rounds = 0
    while taken and rounds < settings.max_rounds:
        if rounds >= settings.min_rounds and time.perf_counter() >= deadline:
            break
        for name in order.sample(sorted(taken), len(taken)):
            try:
                taken[name].append(samples[name]())
            except Exception as error:  # whatever a contender raises is the error of its own row
                errors[name] = describe(error)
                del taken[name]
        rounds += 1
        tick()
    found = {name: Outcome(Statistics.of(values, calls_per_sample[name])) for name, values in taken.items()}
    return found | {name: Outcome(None, error) for name, error in errors.items()}


def interleave(
    calls: Mapping[str, Callable[[int], object]],
    rotation: Rotation,
    settings: Settings,
    *,
    synchronize: Callable[[], None] | None = None,
    tick: Callable[[], None] = lambda: None,
) -> dict[str, Outcome]:
    """Times call(buffer number) of every contender by the wall clock; one that raises is dropped, with its error.

    synchronize waits for a device's queue, around every sample; tick is called between rounds.
    """
    inner: dict[str, int] = {}
    samples: dict[str, Callable[[], float]] = {}
    errors: dict[str, str] = {}
    for name, call in calls.items():

        def sample(name: str = name, call: Callable[[int], object] = call) -> float:
            return per_call(call, rotation.take(inner[name]), synchronize)

        try:
            per_call(call, rotation.take(2), synchronize)  # allocator, code and caches of the libraries
            once = per_call(call, rotation.take(1), synchronize)
            if once < settings.sample_s:  # a first estimate is mostly clock and cold code: take it again over more
                trial = max(1, min(settings.max_inner, int(settings.sample_s / 4 / max(once, 1e-9))))
                once = per_call(call, rotation.take(trial), synchronize)
            inner[name] = max(1, min(settings.max_inner, round(settings.sample_s / max(once, 1e-9) + 0.5)))
            samples[name] = sample
        except Exception as error:
            errors[name] = describe(error)

    collecting = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        return sample_in_turns(samples, inner, errors, settings, tick)
    finally:
        if collecting:
            gc.enable()
