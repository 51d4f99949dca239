"""Runs the cases: check every provider, time those that are right together with the copy, and give rows."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from ..accuracy import relative_error
from ..torch_private import forget_compiled, keeping_saved_tensors
from . import cuda_timing
from .buffers import BufferPool, check_inputs, make_weights, torch_dtype
from .oracle import InputSet, Weights, judge, oracle, yardstick
from .problems import LAYOUTS, Case
from .providers import (
    BUILDERS,
    STOCK_FORMS,
    Provider,
    backward_of,
    copy_ceiling,
    eager,
    is_ours,
    results,
    step,
)
from .timing import Rotation, Settings, Statistics, describe, interleave

__all__ = ["Judge", "Options", "Progress", "Row", "appoint", "bind", "computing", "run"]

Row = dict[str, Any]
# Up to this many elements of x the yardstick is taken from several inputs, beyond from one.
_SMALL, _SMALL_DRAWS = 2**20, 3
_WARM_GRAPH_CALLS = 20
_MIN_COLD_BUFFERS = 2
_MIN_GRAPH_BUFFERS, _MAX_GRAPH_BUFFERS = 8, 512


@dataclasses.dataclass(frozen=True)
class Options:
    """What to run and how.

    providers: names from BUILDERS. backend: what the fused layer is built with where the provider's name says nothing
        about it, None for the default.
    caches: "cold" and "warm", each gives rows of its own. cache_bytes: the size of the cache that cold inputs
        have to exceed twice. eager_form: one of STOCK_FORMS, or "faster" for whichever a short trial finds
        faster in the case. time_limit_s: after so long no case is begun.
    """

    providers: Sequence[str] = ("eager", "compile", "fused")
    backend: str | None = None
    caches: Sequence[str] = ("cold",)
    cache_bytes: int = 32 * 2**20
    device: str = "cpu"
    eager_form: str = "faster"
    settings: Settings = Settings()
    time_limit_s: float = math.inf


class Progress(Protocol):
    """What the runner tells about its progress; never called within a timed sample."""

    def case(self, case: Case) -> None: ...

    def stage(self, text: str) -> None: ...

    def tick(self) -> None: ...

    def done(self) -> None: ...


class _Timing(NamedTuple):
    """The time that counts (on a GPU the device's), and on a GPU the wall time beside it."""

    main: Statistics
    wall: Statistics | None = None


@dataclasses.dataclass
class _Contender:
    """A provider on its way through one case: built, judged, timed, asked what ran. An error ends the way."""

    name: str
    provider: Provider | None = None
    max_error: float | None = None
    path: str | None = None
    timings: dict[str, _Timing] = dataclasses.field(default_factory=dict)  # by cache mode
    error: str | None = None

    def guard(self, action: Callable[[], None]) -> None:
        """Runs the action unless an error came before; what it raises becomes the error."""
        if self.error is None:
            try:
                action()
            except Exception as error:  # one provider's failure is a row, not the end of the run
                self.error = describe(error)

    def timing(self, cache: str) -> _Timing | None:
        return self.timings.get(cache) if self.error is None else None


class Judge(NamedTuple):
    """What providers are judged by: exact tensors, stock's errors, the former anew; and the stock forms that run."""

    exact: dict[str, Tensor]
    stock_errors: dict[str, float]
    plain: Callable[[], dict[str, Tensor]]
    forms: list[str]


def _judged_as(case: Case) -> Case:
    """The case whose tensors hold this one's: with a backward, but for a tail in evaluation."""
    return dataclasses.replace(case, direction="forward+backward") if case.training else case


def appoint(case: Case, weights: Weights, device: torch.device) -> Judge:
    """The judge of all cases that differ from this one in layout and direction only."""
    case = _judged_as(case)
    layouts = LAYOUTS if len(case.shape.spatial) > 1 else ("contiguous",)
    small = torch.Size(case.size).numel() <= _SMALL
    exact: dict[str, Tensor] = {}
    first, forms, runs, failure = exact, [], [], ""
    for draw in range(_SMALL_DRAWS if small else 1):
        for layout in layouts:
            variant = dataclasses.replace(case, layout=layout)
            inputs = check_inputs(variant, weights, device, draw)
            if layout == layouts[0]:
                exact = oracle(variant, inputs, weights)
            for form in STOCK_FORMS:
                try:
                    tensors = results(eager(variant, weights, form), variant, inputs)
                except RuntimeError as error:  # a dtype that a convolution does not serve on this device, say
                    failure = describe(error)
                    continue
                forms.append(form)
                runs.append({name: relative_error(tensors[name], exact[name]) for name in tensors})
        first = first or exact
    if not runs:
        raise RuntimeError(f"stock PyTorch cannot run this case: {failure}")

    def plain() -> dict[str, Tensor]:
        variant = dataclasses.replace(case, layout=layouts[0])
        return oracle(variant, check_inputs(variant, weights, device), weights)

    return Judge(first, yardstick(case, runs), plain, list(dict.fromkeys(forms)))


def bind(provider: Provider, sets: list[InputSet], case: Case) -> Callable[[int], object]:
    """The timed call on one buffer set. Grad mode is the caller's: on where there is a backward.

    For a backward alone the forwards run here, in the current stream: autograd runs each backward in its forward's, so
    on a GPU it can be captured in that stream only.
    """
    if provider.name == "copy":
        tensors = [inputs.x.detach() for inputs in sets]
        return lambda number: tensors[number].clone()
    if case.keeps_graph:
        backwards = [backward_of(provider, inputs) for inputs in sets]
        return lambda number: backwards[number]()
    if case.backward:
        return lambda number: step(provider, sets[number])

    def forward(number: int) -> object:
        x, residual, _ = sets[number]
        return provider.forward(x, residual)

    return forward


class _Runner:
    def __init__(self, options: Options, progress: Progress) -> None:
        self.options = options
        self.progress = progress
        self.device = torch.device(options.device)
        self.cuda = self.device.type == "cuda"
        self.pool = BufferPool(self.device)
        self.appointed: tuple[Case, Judge] | None = None
        self.synchronize = torch.cuda.synchronize if self.cuda else None

    def case(self, case: Case) -> list[Row]:
        contenders = [_Contender(name) for name in self.options.providers]
        copy = _Contender("copy", copy_ceiling(), max_error=0.0)
        try:
            with keeping_saved_tensors() if case.keeps_graph else contextlib.nullcontext():
                self._measure(case, contenders, copy)
        except Exception as error:  # the case as a whole: out of memory, or no yardstick
            for contender in [*contenders, copy]:
                contender.error = contender.error or describe(error)
        return [
            self._row(case, cache, contender, contenders, copy)
            for cache in self.options.caches
            for contender in [*contenders, copy]
        ]

    def _measure(self, case: Case, contenders: list[_Contender], copy: _Contender) -> None:
        self.progress.stage("checking")
        forget_compiled()  # once a case: each for its own static shape, which is the best case for the compiler
        weights = make_weights(case, self.device)
        exact, stock_errors, plain, forms = self._judge(case, weights)
        inputs = check_inputs(case, weights, self.device)
        if self.options.eager_form in forms:
            forms = [self.options.eager_form]
        sets = self._sets(case)
        form = self._faster(forms, case, weights, sets)

        for contender in contenders:
            self.progress.stage(f"checking {contender.name}")

            def build_and_judge(contender: _Contender = contender) -> None:
                provider = BUILDERS[contender.name](case, weights, form, self.options.backend)
                tensors = results(provider, case, inputs)
                contender.provider = provider
                verdict = judge(case, tensors, exact, stock_errors, plain, ours=is_ours(provider))
                contender.max_error, contender.error = verdict
                contender.guard(lambda: self._ask_path(contender))

            contender.guard(build_and_judge)

        copy.guard(lambda: self._ask_path(copy))
        self._time(case, [contender for contender in [*contenders, copy] if contender.error is None], sets)

    def _judge(self, case: Case, weights: Weights) -> Judge:
        key = dataclasses.replace(_judged_as(case), layout="")
        if self.appointed is None or self.appointed[0] != key:
            self.appointed = None  # its tensors are freed before the next ones are taken
            self.appointed = key, appoint(case, weights, self.device)
        return self.appointed[1]

    def _faster(self, forms: list[str], case: Case, weights: Weights, sets: list[InputSet]) -> str:
        """The form of the stock layer that a short interleaved trial finds faster: the honest baseline."""
        if len(forms) == 1:
            return forms[0]
        trial = Settings(budget_s=0.0, min_rounds=5, sample_s=5e-4)
        with self._stream(), torch.set_grad_enabled(case.backward):
            calls = {form: bind(eager(case, weights, form), sets, case) for form in forms}
            if self.cuda:
                outcomes = cuda_timing.replay(calls, [0] * 5, trial, device=self.device, cold=False)
            else:
                outcomes = interleave(calls, Rotation(len(sets)), trial)
        times = {form: outcome.statistics.median_s for form, outcome in outcomes.items() if outcome.statistics}
        return min(times, key=times.__getitem__) if times else forms[0]

    def _sets(self, case: Case) -> list[InputSet]:
        least_bytes = 2 * self.options.cache_bytes
        if self.cuda:
            return self.pool.sets(case, least_bytes, _MIN_GRAPH_BUFFERS, _MAX_GRAPH_BUFFERS)
        if "cold" not in self.options.caches:
            return self.pool.sets(case, 0)
        return self.pool.sets(case, least_bytes, _MIN_COLD_BUFFERS)

    def _stream(self) -> contextlib.AbstractContextManager[None]:
        return cuda_timing.own_stream() if self.cuda else contextlib.nullcontext()

    def _time(self, case: Case, contenders: list[_Contender], sets: list[InputSet]) -> None:
        with self._stream():
            self._time_in_stream(case, contenders, sets)

    def _time_in_stream(self, case: Case, contenders: list[_Contender], sets: list[InputSet]) -> None:
        calls: dict[str, Callable[[int], object]] = {}
        for contender in contenders:

            def bind_it(contender: _Contender = contender) -> None:
                with torch.set_grad_enabled(case.backward):
                    calls[contender.name] = bind(contender.provider, sets, case)

            contender.guard(bind_it)
        contenders = [contender for contender in contenders if contender.error is None]
        settings, tick = self.options.settings, self.progress.tick
        if self.cuda:
            settings = dataclasses.replace(settings, budget_s=settings.budget_s / 2)
        for cache in self.options.caches:
            self.progress.stage(f"timing {', '.join(calls)} ({cache})")
            rotation = Rotation(len(sets) if cache == "cold" else 1)
            device = None
            with torch.set_grad_enabled(case.backward):
                if self.cuda:
                    numbers = list(range(len(sets))) if cache == "cold" else [0] * _WARM_GRAPH_CALLS
                    device = cuda_timing.replay(
                        calls, numbers, settings, device=self.device, cold=cache == "cold", tick=tick
                    )
                wall = interleave(calls, rotation, settings, synchronize=self.synchronize, tick=tick)
            for contender in contenders:
                outcomes = [run[contender.name] for run in (device, wall) if run is not None]
                contender.error = contender.error or next((o.error for o in outcomes if o.error), None)
                if contender.error is None:
                    contender.timings[cache] = _Timing(*(outcome.statistics for outcome in outcomes))

    def _ask_path(self, contender: _Contender) -> None:
        """Notes what ran, which is the backend asked for by name, if one was. Compiled, the reference is inductor's."""
        contender.path, asked = contender.provider.path(), contender.provider.backend
        if asked in (None, "auto", contender.path):
            return
        if (contender.name, asked, contender.path) != ("fused+compile", "reference", "inductor"):
            raise RuntimeError(f"backend {asked!r} was asked for, but {contender.path!r} ran")

    def _row(
        self, case: Case, cache: str, contender: _Contender, contenders: list[_Contender], copy: _Contender
    ) -> Row:
        size = (case.batch, case.shape.channels, case.shape.rd_channels, *case.shape.spatial)
        pass_bytes = torch.Size(case.size).numel() * torch_dtype(case).itemsize
        passes = 2 if contender is copy else case.passes
        timing = contender.timing(cache)
        eager_timing = next((c.timing(cache) for c in contenders if c.name == "eager"), None)
        copy_timing = copy.timing(cache)
        row: Row = {} if case.op == "se" else {"op": case.op}
        row |= {
            "problem": case.problem,
            "shape": ",".join(map(str, size)),
            "count": case.shape.count,
            "dtype": case.dtype,
            "layout": case.layout,
            "direction": case.direction,
            "cache": cache,
            "provider": contender.name,
            "backend": contender.path if timing else None,
            "form": contender.provider.form if contender.provider else None,
            "median_s": None,
            "iqr_s": None,
            "samples": 0,
            "calls_per_sample": 0,
            "speedup_vs_eager": None,
            "copies": None,
            "passes": passes,
            "gbps": None,
            "fraction_of_copy": None,
            "max_error": contender.max_error if _finite(contender.max_error) else None,
            "error": contender.error,
        }
        if timing is not None:
            median = timing.main.median_s
            row |= {
                "median_s": median,
                "iqr_s": timing.main.iqr_s,
                "samples": timing.main.samples,
                "calls_per_sample": timing.main.inner,
                "gbps": passes * pass_bytes / median * 1e-9,
            }
            if eager_timing is not None:
                row["speedup_vs_eager"] = eager_timing.main.median_s / median
            if copy_timing is not None:
                row["copies"] = median / copy_timing.main.median_s
                row["fraction_of_copy"] = passes / 2 / row["copies"]
        if self.cuda:
            wall, eager_wall = (None if t is None else t.wall for t in (timing, eager_timing))
            row["wall_median_s"] = wall and wall.median_s
            row["wall_iqr_s"] = wall and wall.iqr_s
            row["wall_speedup_vs_eager"] = wall and eager_wall and eager_wall.median_s / wall.median_s
        return row


def _finite(value: float | None) -> bool:
    return value is not None and value - value == 0


def run(cases: Sequence[Case], options: Options, progress: Progress, rows: list[Row] | None = None) -> list[Row]:
    """Measures the cases in turn.

    Args:
        rows: the list to fill; the caller who passes one has the finished cases even if it interrupts the
            run.

    Returns:
        One row per case, cache mode and provider, the copy included; a row with an ``error`` has no time.
    """
    rows = [] if rows is None else rows
    runner = _Runner(options, progress)
    start = time.monotonic()
    for case in cases:
        if time.monotonic() - start > options.time_limit_s:
            break
        progress.case(case)
        rows += runner.case(case)
        progress.done()
    return rows


@contextlib.contextmanager
def computing(threads: int | None) -> Iterator[None]:
    """Within the block PyTorch computes with this many threads (None: as it does), and float32 is float32.

    cuDNN's convolutions would otherwise round float32 to TF32, which is no yardstick.
    """
    before = torch.get_num_threads(), torch.backends.cudnn.allow_tf32
    if threads is not None:
        torch.set_num_threads(threads)
    torch.backends.cudnn.allow_tf32 = False
    try:
        yield
    finally:
        torch.set_num_threads(before[0])
        torch.backends.cudnn.allow_tf32 = before[1]
