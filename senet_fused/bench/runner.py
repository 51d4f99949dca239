"""Runs the cases: checks every provider, times those that are right together with the copy, and gives rows."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import time
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..accuracy import relative_error
from ..torch_private import forget_compiled, keeping_saved_tensors
from . import cuda_timing
from .buffers import BufferPool, check_inputs, make_weights, torch_dtype
from .oracle import InputSet, Weights, judge, oracle, stock_errors
from .problems import LAYOUTS, Case
from .progress import Progress
from .providers import BUILDERS, STOCK_FORMS, Provider, backward_of, copy_ceiling, eager, is_ours, results, step
from .saved import Row
from .timing import Outcome, Rotation, Settings, Statistics, describe, figures, finite, interleave, ratio

__all__ = ["Judge", "Options", "make_judge", "bind", "computing", "run"]

# Up to this many elements of x stock's errors are taken from several inputs, beyond from one.
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


@dataclasses.dataclass
class _Contender:
    """A provider on its way through one case: built, judged, timed, asked what ran. An error ends the way.

    times: by cache mode the time that counts (on a GPU the device's), and on a GPU the wall time.
    """

    name: str
    provider: Provider | None = None
    max_error: float | None = None
    path: str | None = None
    times: dict[str, list[Statistics | None]] = dataclasses.field(default_factory=dict)
    error: str | None = None

    def guard(self, action: Callable[[], None]) -> None:
        """Runs the action unless an error came before; what it raises becomes the error."""
        if self.error is None:
            try:
                action()
            except Exception as error:  # one provider's failure is a row, not the end of the run
                self.error = describe(error)

    def timed(self, cache: str, clock: int) -> Statistics | None:
        """The time by clock 0, that counts, or 1, the wall clock beside it."""
        times = self.times.get(cache, []) if self.error is None else []
        return times[clock] if clock < len(times) else None


class Judge(NamedTuple):
    """What providers are judged by: exact tensors, stock's errors, the former anew; and the stock forms that run."""

    exact: dict[str, Tensor]
    stock_errors: dict[str, float]
    plain: Callable[[], dict[str, Tensor]]
    forms: list[str]


def _judged_as(case: Case) -> Case:
    """The case whose tensors hold this one's: with a backward, but for a tail in evaluation."""
    return dataclasses.replace(case, direction="forward+backward") if case.training else case


def make_judge(case: Case, weights: Weights, device: torch.device) -> Judge:
    """The judge of all cases that differ from this one in layout and direction only.

    Raises:
        RuntimeError: stock PyTorch cannot run the case, or is wrong itself.
    """
    layouts = LAYOUTS if len(case.shape.spatial) > 1 else ("contiguous",)
    case = dataclasses.replace(_judged_as(case), layout=layouts[0])
    first: dict[str, Tensor] = {}
    forms, runs, failure = [], [], ""
    for draw in range(_SMALL_DRAWS if math.prod(case.size) <= _SMALL else 1):
        exact = oracle(case, check_inputs(case, weights, device, draw), weights)
        first = first or exact
        for layout in layouts:
            variant = dataclasses.replace(case, layout=layout)
            inputs = check_inputs(variant, weights, device, draw)
            for form in STOCK_FORMS:
                try:
                    tensors = results(eager(variant, weights, form), variant, inputs)
                except RuntimeError as error:  # a dtype that a convolution does not serve on this device, say
                    failure = describe(error)
                    continue
                forms.append(form)
                runs.append({name: relative_error(tensors[name], exact[name]) for name in tensors})
    if not runs:
        raise RuntimeError(f"stock PyTorch cannot run this case: {failure}")

    # Made here: within plain, which runs under a mode that perturbs operations, the inputs would be perturbed too.
    given = check_inputs(case, weights, device)

    def plain() -> dict[str, Tensor]:
        return oracle(case, given, weights)

    return Judge(first, stock_errors(case, runs), plain, list(dict.fromkeys(forms)))


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
    pairs = [(inputs.x, inputs.residual) for inputs in sets]
    return lambda number: provider.forward(*pairs[number])


class _Runner:
    def __init__(self, options: Options, progress: Progress) -> None:
        self.options = options
        self.progress = progress
        self.device = torch.device(options.device)
        self.cuda = self.device.type == "cuda"
        self.pool = BufferPool(self.device)
        self.judge_of: tuple[Case, Judge] | None = None
        self.synchronize = torch.cuda.synchronize if self.cuda else None

    def case(self, case: Case) -> list[Row]:
        contenders = [_Contender(name) for name in self.options.providers]
        contenders.append(_Contender("copy", copy_ceiling(), max_error=0.0))
        try:
            with keeping_saved_tensors() if case.keeps_graph else contextlib.nullcontext():
                self._measure(case, contenders)
        except Exception as error:  # the case as a whole: out of memory, or stock is wrong
            for contender in contenders:
                contender.error = contender.error or describe(error)
        return [self._row(case, cache, one, contenders) for cache in self.options.caches for one in contenders]

    def _measure(self, case: Case, contenders: list[_Contender]) -> None:
        self.progress.stage("checking")
        forget_compiled()  # once a case: each for its own static shape, which is the best case for the compiler
        weights = make_weights(case, self.device)
        exact, errors, plain, forms = self._judge(case, weights)
        inputs = check_inputs(case, weights, self.device)
        sets = self._sets(case)
        form = self._form(forms, case, weights, sets)

        for contender in contenders:

            def check(contender: _Contender = contender) -> None:
                if contender.provider is None:
                    self.progress.stage(f"checking {contender.name}")
                    provider = BUILDERS[contender.name](case, weights, form, self.options.backend)
                    tensors = results(provider, case, inputs)
                    contender.provider = provider
                    verdict = judge(case, tensors, exact, errors, plain, ours=is_ours(provider))
                    contender.max_error, contender.error = verdict
                contender.guard(lambda: self._ask_path(contender))

            contender.guard(check)
        with cuda_timing.own_stream() if self.cuda else contextlib.nullcontext():
            self._time(case, contenders, sets)

    def _judge(self, case: Case, weights: Weights) -> Judge:
        key = dataclasses.replace(_judged_as(case), layout="")
        if self.judge_of is None or self.judge_of[0] != key:
            self.judge_of = None  # its tensors are freed before the next ones are taken
            self.judge_of = key, make_judge(case, weights, self.device)
        return self.judge_of[1]

    def _form(self, forms: list[str], case: Case, weights: Weights, sets: list[InputSet]) -> str:
        """The stock form that is asked for, or the one that a short interleaved trial finds faster."""
        if self.options.eager_form in forms:
            return self.options.eager_form
        if len(forms) == 1:
            return forms[0]
        trial = Settings(budget_s=0.0, min_rounds=5, sample_s=5e-4)
        stream = cuda_timing.own_stream() if self.cuda else contextlib.nullcontext()
        with stream, torch.set_grad_enabled(case.backward):
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

    def _time(self, case: Case, contenders: list[_Contender], sets: list[InputSet]) -> None:
        """Times those without an error. On a GPU the current stream is the one for it."""
        calls: dict[str, Callable[[int], object]] = {}
        with torch.set_grad_enabled(case.backward):
            for contender in contenders:
                contender.guard(lambda one=contender: calls.update({one.name: bind(one.provider, sets, case)}))
            for cache in self.options.caches:
                self.progress.stage(f"timing {', '.join(calls)} ({cache})")
                runs = self._sample(calls, len(sets), cold=cache == "cold")
                for contender in contenders:
                    outcomes = [run[contender.name] for run in runs if contender.name in run]
                    contender.error = contender.error or next((o.error for o in outcomes if o.error), None)
                    contender.times[cache] = [outcome.statistics for outcome in outcomes]

    def _sample(self, calls: dict[str, Callable[[int], object]], sets: int, cold: bool) -> list[dict[str, Outcome]]:
        """By the clock that counts; on a GPU that is the device's, and then by the wall clock too."""
        settings, tick, runs = self.options.settings, self.progress.tick, []
        if self.cuda:
            settings = dataclasses.replace(settings, budget_s=settings.budget_s / 2)
            numbers = list(range(sets)) if cold else [0] * _WARM_GRAPH_CALLS
            runs.append(cuda_timing.replay(calls, numbers, settings, device=self.device, cold=cold, tick=tick))
        rotation = Rotation(sets if cold else 1)
        return [*runs, interleave(calls, rotation, settings, synchronize=self.synchronize, tick=tick)]

    def _ask_path(self, contender: _Contender) -> None:
        """Notes what ran, which is the backend asked for by name, if one was. Compiled, the reference is inductor's."""
        contender.path, asked = contender.provider.path(), contender.provider.backend
        if asked in (None, "auto", contender.path):
            return
        if (contender.name, asked, contender.path) != ("fused+compile", "reference", "inductor"):
            raise RuntimeError(f"backend {asked!r} was asked for, but {contender.path!r} ran")

    def _row(self, case: Case, cache: str, contender: _Contender, contenders: list[_Contender]) -> Row:
        by_name = {one.name: one for one in contenders}

        def seconds(name: str, clock: int = 0) -> float | None:
            timing = by_name[name].timed(cache, clock) if name in by_name else None
            return timing and timing.median_s

        name = contender.name
        median, passes = seconds(name), 2 if name == "copy" else case.passes
        copies = ratio(median, seconds("copy"))
        sizes = (case.batch, case.shape.channels, case.shape.rd_channels, *case.shape.spatial)
        row: Row = {} if case.op == "se" else {"op": case.op}
        row |= {
            "problem": case.problem,
            "shape": ",".join(map(str, sizes)),
            "count": case.shape.count,
            "dtype": case.dtype,
            "layout": case.layout,
            "direction": case.direction,
            "cache": cache,
            "provider": name,
            "backend": contender.path if median else None,
            "form": contender.provider.form if contender.provider else None,
            **figures(contender.timed(cache, 0)),
            "speedup_vs_eager": ratio(seconds("eager"), median),
            "copies": copies,
            "passes": passes,
            "gbps": passes * math.prod(case.size) * torch_dtype(case).itemsize / median * 1e-9 if median else None,
            "fraction_of_copy": ratio(passes / 2, copies),
            "max_error": finite(contender.max_error),
            "error": contender.error,
        }
        if self.cuda:
            wall = figures(contender.timed(cache, 1))
            row["wall_median_s"], row["wall_iqr_s"] = wall["median_s"], wall["iqr_s"]
            row["wall_speedup_vs_eager"] = ratio(seconds("eager", 1), seconds(name, 1))
        return row


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

    cuDNN's convolutions would otherwise round float32 to TF32, too coarse to compare others with.
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
