"""--batch max: the largest batch that a GPU's memory takes in training, beside all that the other variants hold."""

from __future__ import annotations

import dataclasses
import gc
from collections.abc import Callable, Sequence

import torch

from .model import LARGEST
from .model_case import Cell
from .model_memory import peak_bytes
from .variants import ModelCase, Network, NoVariant, Variant

__all__ = ["LargestBatch", "fits_in_training", "largest_batch", "needed_bytes"]

_FIRST, _LIMIT = 8, 2**16
_FINE_BELOW, _STEP = 64, 8  # large batches to the next multiple of 8
_USABLE = 0.95  # of what is free: the allocator's blocks, workspaces of libraries


def largest_batch(fits: Callable[[int], bool]) -> int:
    """The largest batch that fits, by doubling and bisection; from 64 up a multiple of 8.

    Args:
        fits: whether a batch does; if one does, so do all that are smaller.

    Raises:
        ValueError: not even one image fits.
    """
    low, high = 0, _FIRST
    while high <= _LIMIT and fits(high):
        low, high = high, 2 * high
    while high - low > (step := _STEP if low >= _FINE_BELOW else 1) and low < _LIMIT:
        middle = (low + high) // 2 // step * step
        low, high = (middle, high) if fits(middle) else (low, middle)
    if low == 0:
        raise ValueError("not even a batch of 1 fits in the GPU's memory")
    return low


def needed_bytes(peak: int, weights: int, names: Sequence[str]) -> int:
    """What a case of these variants needs beside the networks that they are copies of.

    peak: of a step of stock, beyond its weights and momentum. weights: of one network. Every variant keeps its weights
    and momentum, a CUDA graph all that its step takes as well; stock's gradients, a variant's, and those of no-se are
    there for the comparison.
    """
    graphs = sum(Variant(name).graphed or name == "max-autotune" for name in names)
    return peak * (1 + graphs) + weights * (2 * len(names) + 3)


def fits_in_training(
    network: Network, case: ModelCase, names: Sequence[str], device: str, seed: int
) -> Callable[[int], bool]:
    """Whether a batch fits: a training step of stock runs, and there is room for all variants beside it."""

    def needed(batch: int) -> int:
        sized, stock = dataclasses.replace(case, batch=batch, direction="training"), Variant("stock")
        cell = Cell(sized, device, seed)
        network.build(stock, sized)
        weights = sum(parameter.nbytes for parameter in stock.model.parameters())
        cell.results(stock)
        step = cell.timed(stock)
        step(0)  # the optimizer makes its momentum
        return needed_bytes(peak_bytes(lambda: step(0), device), weights, names)

    def fits(batch: int) -> bool:
        gc.collect()
        torch.cuda.empty_cache()
        free, _ = torch.cuda.mem_get_info()
        try:
            return needed(batch) <= _USABLE * free
        except torch.cuda.OutOfMemoryError:
            return False

    return fits


class LargestBatch:
    """The largest batches of one network by dtype and layout, each found once, where the cases have --batch max."""

    def __init__(self, cases: Sequence[ModelCase], fits: Callable[[ModelCase], Callable[[int], bool]]) -> None:
        self._fits = fits
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
            try:
                self._found[key] = largest_batch(self._fits(case))
            except Exception as error:
                self._found[key] = error
        largest = self._found[key]
        if isinstance(largest, Exception):
            raise largest
        if case.batch != LARGEST and case.batch > largest:
            raise NoVariant(f"not measured: a batch of {largest} is the largest that fits in training")
        return dataclasses.replace(case, batch=largest, largest=True) if case.batch == LARGEST else case
