"""Interleaved wall-clock sampling.

All contenders of a case are sampled round by round in a shuffled order, so drift of the machine hits them
alike and none always runs behind the same neighbour. A sample is the mean of an automatically chosen number
of calls, enough to be far above the clock's resolution; the median and the interquartile range are taken over
samples.
"""

from __future__ import annotations

import dataclasses
import gc
import random
import statistics
import time
from collections.abc import Callable, Mapping

__all__ = ["Outcome", "Rotation", "Settings", "Statistics", "interleave", "per_call"]


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


def interleave(
    calls: Mapping[str, Callable[[int], object]],
    rotation: Rotation,
    settings: Settings,
    *,
    synchronize: Callable[[], None] | None = None,
    tick: Callable[[], None] = lambda: None,
) -> dict[str, Outcome]:
    """Times call(buffer number) of every contender; one that raises is dropped, with its error.

    Args:
        calls: the contenders by name.
        rotation: where buffer numbers come from.
        synchronize: waits for a device's queue, around every sample.
        tick: called between rounds (never within a sample), for a progress display.
    """
    samples: dict[str, list[float]] = {}
    inner: dict[str, int] = {}
    errors: dict[str, str] = {}
    for name, call in calls.items():
        try:
            per_call(call, rotation.take(2), synchronize)  # allocator, code and caches of the libraries
            once = per_call(call, rotation.take(1), synchronize)
            if once < settings.sample_s:  # a first estimate is mostly clock and cold code: take it again over more
                trial = max(1, min(settings.max_inner, int(settings.sample_s / 4 / max(once, 1e-9))))
                once = per_call(call, rotation.take(trial), synchronize)
            inner[name] = max(1, min(settings.max_inner, round(settings.sample_s / max(once, 1e-9) + 0.5)))
            samples[name] = []
        except Exception as error:  # whatever a contender raises is its own row's matter
            errors[name] = describe(error)

    order = random.Random(0)
    collecting = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        deadline = time.perf_counter() + settings.budget_s
        rounds = 0
        while samples and rounds < settings.max_rounds:
            if rounds >= settings.min_rounds and time.perf_counter() >= deadline:
                break
            for name in order.sample(sorted(samples), len(samples)):
                try:
                    samples[name].append(per_call(calls[name], rotation.take(inner[name]), synchronize))
                except Exception as error:
                    errors[name] = describe(error)
                    del samples[name]
            rounds += 1
            tick()
    finally:
        if collecting:
            gc.enable()
    return {
        name: Outcome(None, errors[name]) if name in errors else Outcome(Statistics.of(samples[name], inner[name]))
        for name in calls
    }
