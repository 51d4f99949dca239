"""Whole networks: their variants checked against stock and timed in turns, one case after the other, and the rows."""

from __future__ import annotations

import argparse
import dataclasses
import gc
import math
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from ..torch_private import forget_compiled
from .largest_batch import fits_in_training, largest_batch
from .model_case import Cell, Results
from .presets import LARGEST
from .runner import Progress
from .timing import Outcome, Rotation, Settings, describe, interleave
from .variants import ModelCase, Network, NoVariant, Variant

__all__ = ["OUT_OF_TIME", "Options", "Row", "cases", "run"]

Row = dict[str, Any]
OUT_OF_TIME = "not begun: out of time"


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
    """Every combination of the options dtype, mode, batch and layout for one network."""
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
    patient = sorted(names, key=lambda name: (name == "max-autotune", Variant(name).compiled))
    return list(dict.fromkeys([*references, *patient]))


def _check(
    network: Network, cell: Cell, options: Options, progress: Progress, deadline: float = math.inf
) -> list[Variant]:
    """The variants, built and compared: those that stopped on the way have an error or a note, and no model."""
    checked: dict[str, Variant] = {}
    wanted: dict[str, Results] = {}
    stochastic = False
    for name in _in_order(options.variants):
        progress.stage(f"checking {name}")
        variant = Variant(name)
        reference = variant.reference
        if time.monotonic() > deadline and name != reference:
            variant.remark(OUT_OF_TIME)
            checked[name] = variant
            continue
        try:
            if reference in checked and checked[reference].error is not None:
                raise RuntimeError(f"nothing to compare with: {reference} failed, {checked[reference].error}")
            network.build(variant, cell.case)
            found = cell.results(variant)
            if name == reference:
                wanted[name] = found
                stochastic = stochastic or cell.is_stochastic(variant, found)
                if cell.case.dtype != "float32" and not stochastic:
                    _compare_with_float32(network, cell, variant, found)
            elif stochastic and variant.compiled:
                variant.remark("the network is random in training and torch.compile draws other numbers: not compared")
            else:
                cell.compare(variant, found, wanted[reference])
                cell.judge(variant, checked[reference], wanted[reference])
        except NoVariant as reason:
            variant.remark(str(reason))
            variant.model = None
        except Exception as error:  # one variant's failure is a row, not the end of the run
            variant.error, variant.model = describe(error), None
        checked[name] = variant
    return [checked[name] for name in options.variants]


def _compare_with_float32(network: Network, cell: Cell, variant: Variant, found: Results) -> None:
    try:
        cell.compare(variant, found, cell.in_float32(network, variant.name))
    except torch.cuda.OutOfMemoryError:  # a batch that fits in bfloat16 need not in float32
        variant.remark("not compared with float32, which does not fit in the memory")


def _measure(
    network: Network, case: ModelCase, options: Options, progress: Progress, deadline: float = math.inf
) -> list[Row]:
    forget_compiled()
    cell = Cell(case, options.device, options.seed)
    variants = _check(network, cell, options, progress, deadline)
    running: dict[str, Variant] = {}
    calls: dict[str, Callable[..., object]] = {}
    for variant in variants:
        if variant.model is not None:
            try:
                calls[variant.name] = cell.timed(variant)
                running[variant.name] = variant
            except Exception as error:  # what cannot be captured, say
                variant.error, variant.model = describe(error), None
    progress.stage(f"timing {', '.join(running)}")
    outcomes = interleave(
        calls,
        Rotation(1),
        options.settings,
        synchronize=torch.cuda.synchronize if options.device == "cuda" else None,
        tick=progress.tick,
    )
    if case.training:
        progress.stage("measuring memory")
        for name, variant in running.items():
            if outcomes[name].statistics:
                try:
                    cell.measure_memory(variant, calls[name])
                except Exception as error:  # its time stays
                    variant.remark(f"its memory could not be measured: {describe(error)}")
    return _rows(case, network, variants, outcomes)


def _rows(
    case: ModelCase, network: Network | None, variants: Sequence[Variant], outcomes: Mapping[str, Outcome]
) -> list[Row]:
    stock = next((variant for variant in variants if variant.name == "stock"), Variant("stock"))
    medians = {name: outcome.statistics.median_s for name, outcome in outcomes.items() if outcome.statistics}
    rows = []
    for variant in variants:
        outcome = outcomes.get(variant.name, Outcome(None))
        timing, error = outcome.statistics, variant.error or outcome.error
        row: Row = {
            "model": case.problem,
            "batch": case.batch,
            "largest_batch": case.largest,
            "size": ",".join(map(str, case.size)),
            "dtype": case.dtype,
            "amp": case.amp,
            "layout": case.layout,
            "mode": case.direction,
            "provider": variant.name,
            "backend": variant.backend if timing else None,
            "median_s": None,
            "iqr_s": None,
            "samples": 0,
            "calls_per_sample": 0,
            "images_per_s": None,
            "speedup_vs_stock": None,
            "price_of_se": None,
            "output_error": variant.output_error if _finite(variant.output_error) else None,
            "gradient_error": variant.gradient_error if _finite(variant.gradient_error) else None,
            "statistics_error": variant.statistics_error if _finite(variant.statistics_error) else None,
            "saved_bytes": variant.saved_bytes,
            "saved_vs_stock": _ratio(variant.saved_bytes, stock.saved_bytes),
            "peak_bytes": variant.peak_bytes,
            "peak_vs_stock": _ratio(variant.peak_bytes, stock.peak_bytes),
            "se_layers": network and network.layers,
            "se_fused": variant.fused,
            "se_blocks": variant.blocks,
            "se_tails": variant.tails,
            "se_joined": variant.joined,
            "norms_folded": variant.folded,
            "note": variant.note,
            "error": error,
        }
        if timing is not None:
            row |= {
                "median_s": timing.median_s,
                "iqr_s": timing.iqr_s,
                "samples": timing.samples,
                "calls_per_sample": timing.inner,
                "images_per_s": case.batch / timing.median_s,
                "speedup_vs_stock": _ratio(medians.get("stock"), timing.median_s),
                "price_of_se": _ratio(timing.median_s, medians.get("no-se")),
            }
        rows.append(row)
    return rows


def _ratio(value: float | None, base: float | None) -> float | None:
    return value / base if value is not None and base else None


def _finite(value: float | None) -> bool:
    return value is not None and math.isfinite(value)


def _failed(case: ModelCase, options: Options, error: str) -> list[Row]:
    return _rows(case, None, [Variant(name, error=error) for name in options.variants], {})


class _Largest:
    """The largest batches of one network, each found once; of an error, that."""

    def __init__(self, network: Network, cases: Sequence[ModelCase], options: Options) -> None:
        self._network, self._options = network, options
        self._asked = {self._key(case) for case in cases if case.batch == LARGEST}
        self._found: dict[ModelCase, int | Exception] = {}

    def _key(self, case: ModelCase) -> ModelCase:
        return dataclasses.replace(case, batch=LARGEST, direction="training")

    def sized(self, case: ModelCase) -> ModelCase:
        """The case with its batch as a number. Raises NoVariant if it is beyond the largest that was asked for."""
        key = self._key(case)
        if key not in self._asked:
            return case
        if key not in self._found:
            options = self._options
            fits = fits_in_training(self._network, case, options.variants, options.device, options.seed)
            try:
                self._found[key] = largest_batch(fits)
            except Exception as error:
                self._found[key] = error
        largest = self._found[key]
        if isinstance(largest, Exception):
            raise largest
        if case.batch == LARGEST:
            return dataclasses.replace(case, batch=largest, largest=True)
        if case.batch > largest:
            raise NoVariant(f"not measured: a batch of {largest} is the largest that fits in training")
        return case


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
        network, largest, trouble = None, None, ""
        for case in todo_cases:
            if time.monotonic() - start > options.time_limit_s:
                return rows
            progress.case(case)
            if network is None and not trouble:
                try:
                    network = Network(model, case.size, options.device, options.backend, options.seed)
                    largest = _Largest(network, todo_cases, options)
                except Exception as error:  # an input that it cannot take, most of the time
                    shape = "x".join(map(str, case.size))
                    trouble = f"{describe(error)} (on an input of {shape}; --size gives another)"
            if network is None:
                rows += _failed(case, options, trouble)
            else:
                try:
                    case = largest.sized(case)
                    rows += _measure(network, case, options, progress, start + options.time_limit_s)
                except NoVariant as reason:
                    rows += _rows(case, None, [Variant(name, note=str(reason)) for name in options.variants], {})
                except Exception as error:  # the case as a whole: out of memory, say
                    rows += _failed(case, options, describe(error))
            if options.device == "cuda":
                gc.collect()
                torch.cuda.empty_cache()
            progress.done()
    return rows
