"""Whole networks: their variants checked against stock and timed in turns, one case after the other, and the rows."""

from __future__ import annotations

import argparse
import dataclasses
import gc
import math
import time
from collections.abc import Mapping, Sequence
from functools import partial

import torch
from torch import nn

from ..arguments import RequestError
from ..torch_private import forget_compiled
from .largest_batch import LargestBatch, fits_in_training
from .model_case import Cell, Results
from .progress import Progress
from .saved import Row
from .session import OUT_OF_TIME
from .timing import Outcome, Rotation, Settings, describe, figures, finite, interleave, ratio
from .variants import ModelCase, Network, NoVariant, Variant

__all__ = ["Options", "cases", "run"]


@dataclasses.dataclass(frozen=True)
class Options:
    """Which variants, in this order, and how; backend is what fuse is given.

    After time_limit_s no case is begun, and in the case at hand no further variant: those that are built are timed.
    """

    variants: Sequence[str]
    backend: str | None = None
    device: str = "cpu"
    seed: int = 0
    settings: Settings = Settings()
    time_limit_s: float = math.inf


def cases(name: str, size: tuple[int, ...], args: argparse.Namespace) -> list[ModelCase]:
    """Every combination of the options mode, dtype, batch and layout for one network.

    Raises:
        RequestError: channels_last for an input without a plane.
    """
    if "channels_last" in args.layout and len(size) == 2:
        raise RequestError(f"channels_last needs two or three spatial dimensions; {name} gets {args.size}")
    return [
        ModelCase(name, size, batch, dtype, args.amp, layout, mode)
        for mode in dict.fromkeys(args.mode)
        for dtype in dict.fromkeys(args.dtype)
        for batch in dict.fromkeys(args.batch)
        for layout in dict.fromkeys(args.layout)
    ]


def _in_order(names: Sequence[str]) -> list[str]:
    """Those that the others are compared with first, and last those that take long to compile."""
    references = [Variant(name).reference for name in names]
    slowest_last = sorted(names, key=lambda name: (name == "max-autotune", Variant(name).compiled))
    return list(dict.fromkeys([*references, *slowest_last]))


class _Checks:
    """Builds the variants of one case and compares them with their references."""

    def __init__(self, network: Network, cell: Cell) -> None:
        self._network, self._cell = network, cell
        self._variants: dict[str, Variant] = {}
        self._results: dict[str, Results] = {}  # of the references
        self._stochastic = False

    def variant(self, name: str, out_of_time: bool) -> Variant:
        """The variant, with a model unless it has stopped on the way: then with an error, or a note."""
        variant = self._variants[name] = Variant(name)
        if out_of_time and name != variant.reference:
            variant.remark(OUT_OF_TIME)
            return variant
        try:
            self._check(variant)
        except NoVariant as reason:
            variant.remark(str(reason))
            variant.model = None
        except Exception as error:  # one variant's failure is a row, not the end of the run
            variant.error, variant.model = describe(error), None
        return variant

    def _check(self, variant: Variant) -> None:
        name, cell = variant.name, self._cell
        reference = self._variants[variant.reference]
        if reference.error is not None:
            raise RuntimeError(f"nothing to compare with: {reference.name} failed, {reference.error}")
        self._network.build(variant, cell.case)
        found = cell.results(variant)
        if variant is reference:
            self._results[name] = found
            self._stochastic = self._stochastic or cell.is_stochastic(variant, found)
            if cell.case.dtype != "float32" and not self._stochastic:
                try:
                    cell.compare(variant, found, cell.in_float32(self._network, name))
                except torch.cuda.OutOfMemoryError:  # a batch that fits in bfloat16 need not in float32
                    variant.remark("not compared with float32, which does not fit in the memory")
        elif self._stochastic and variant.compiled:
            variant.remark("the network is random in training and torch.compile draws other numbers: not compared")
        else:
            cell.compare(variant, found, self._results[reference.name])
            cell.judge(variant, reference, self._results[reference.name])


def _measure(network: Network, case: ModelCase, options: Options, progress: Progress, deadline: float) -> list[Row]:
    forget_compiled()
    cell = Cell(case, options.device, options.seed)
    checks, variants, calls = _Checks(network, cell), {}, {}
    for name in _in_order(options.variants):
        progress.stage(f"checking {name}")
        variants[name] = checks.variant(name, time.monotonic() > deadline)
    variants = {name: variants[name] for name in options.variants}
    for name, variant in variants.items():
        if variant.model is not None:
            try:
                calls[name] = cell.timed(variant)
            except Exception as error:  # what cannot be captured, say
                variant.error, variant.model = describe(error), None
    progress.stage(f"timing {', '.join(calls)}")
    synchronize = torch.cuda.synchronize if options.device == "cuda" else None
    outcomes = interleave(calls, Rotation(1), options.settings, synchronize=synchronize, tick=progress.tick)
    if case.training:
        progress.stage("measuring memory")
        for name, outcome in outcomes.items():
            if outcome.statistics:
                try:
                    cell.measure_memory(variants[name], calls[name])
                except Exception as error:  # its time stays
                    variants[name].remark(f"its memory could not be measured: {describe(error)}")
    return _rows(case, network.layers, list(variants.values()), outcomes)


def _rows(
    case: ModelCase, layers: int | None, variants: Sequence[Variant], outcomes: Mapping[str, Outcome]
) -> list[Row]:
    by_name = {variant.name: variant for variant in variants}
    stock = by_name.get("stock", Variant("stock"))
    medians = {name: outcome.statistics.median_s for name, outcome in outcomes.items() if outcome.statistics}
    rows = []
    for name, variant in by_name.items():
        outcome, median = outcomes.get(name, Outcome(None)), medians.get(name)
        row = {
            "model": case.problem,
            "batch": case.batch,
            "largest_batch": case.largest,
            "size": ",".join(map(str, case.size)),
            "dtype": case.dtype,
            "amp": case.amp,
            "layout": case.layout,
            "mode": case.direction,
            "provider": name,
            "backend": variant.backend if median else None,
            **figures(outcome.statistics),
            "images_per_s": case.batch / median if median else None,
            "speedup_vs_stock": ratio(medians.get("stock"), median),
            "price_of_se": ratio(median, medians.get("no-se")),
            "se_layers": layers,
            "error": variant.error or outcome.error,
        }
        row |= {key: finite(getattr(variant, key)) for key in ("output_error", "gradient_error", "statistics_error")}
        for key in ("saved", "peak"):
            row[f"{key}_bytes"] = getattr(variant, f"{key}_bytes")
            row[f"{key}_vs_stock"] = ratio(row[f"{key}_bytes"], getattr(stock, f"{key}_bytes"))
        for key in ("se_fused", "se_blocks", "se_tails", "se_joined", "norms_folded", "note"):
            row[key] = getattr(variant, key)
        rows.append(row)
    return rows


def _without_times(case: ModelCase, options: Options, **why: str) -> list[Row]:
    return _rows(case, None, [Variant(name, **why) for name in options.variants], {})


def run(
    todo: Sequence[tuple[nn.Module, Sequence[ModelCase]]],
    options: Options,
    progress: Progress,
    rows: list[Row] | None = None,
) -> list[Row]:
    """Measures networks in turn, each in all its cases.

    Args:
        todo: networks as :func:`~senet_fused.bench.zoo.load` gives them, with their cases. They are changed.
        rows: the list to fill; the caller who passes one has the finished cases even if it interrupts the run.

    Returns:
        One row per case and variant; one without a time has an ``error``, or a ``note`` that there is no such variant.
    """
    rows = [] if rows is None else rows
    start = time.monotonic()
    for model, todo_cases in todo:
        network, largest, broken = None, None, ""
        for case in todo_cases:
            if time.monotonic() - start > options.time_limit_s:
                return rows
            progress.case(case)
            if network is None and not broken:
                try:
                    network = Network(model, case.size, options.device, options.backend, options.seed)
                    how = {"names": options.variants, "device": options.device, "seed": options.seed}
                    largest = LargestBatch(todo_cases, partial(fits_in_training, network, **how))
                except Exception as error:  # an input that it cannot take, most of the time
                    shape = "x".join(map(str, case.size))
                    broken = f"{describe(error)} (on an input of {shape}; --size gives another)"
            try:
                if network is None:
                    rows += _without_times(case, options, error=broken)
                else:
                    case = largest.sized(case)
                    rows += _measure(network, case, options, progress, start + options.time_limit_s)
            except NoVariant as reason:
                rows += _without_times(case, options, note=str(reason))
            except Exception as error:  # the case as a whole: out of memory, say
                rows += _without_times(case, options, error=describe(error))
            if options.device == "cuda":
                gc.collect()
                torch.cuda.empty_cache()
            progress.done()
    return rows
