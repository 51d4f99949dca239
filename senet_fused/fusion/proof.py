"""From a layer to its recipe: what it may compute is read from its structure, what it does compute is proven.

The proof runs a copy of the layer, in float64 on the CPU, with random weights in place of its own and without hooks, in
evaluation and in training mode: so nothing of the layer is touched, a layer on the meta device can be proven like any
other, and a layer whose last weight is still zero, as networks often begin, does not hide its functions.

A hidden unit that is dead hides what is squeezed, and a gate that is saturated hides everything before it. So every
input is tried with weights of both signs, which makes each unit that is dead alive, and the rows of w2 have sizes that
keep some gates open whatever the size of the hidden units.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..functional import route
from ..parts import settings_of
from .effects import Watch, add_numbers, is_foreign
from .families import checked_weights, family_of, recipes_by_structure
from .recipe import Recipe
from .trial import CannotFuseError, Trial, check_forward, distance, errors_as_reasons, isolated, prove_once, random_copy

__all__ = ["examine", "integers_of", "larger_planes"]

_SPATIAL = (5, 3, 2)
_PAIRS = 8
_SCALES = tuple(10 ** (-2 + 5 * k / (_PAIRS - 1)) for k in range(_PAIRS))  # of pairs of samples: 0.01 to 1000
_LOW_PRECISION = {torch.float32: 1e-4, torch.bfloat16: 0.1}  # only what is quite another function is to be noticed


class _Signs(NamedTuple):
    """Factors of the weights: of w1, of b1, and of w2 and b2."""

    first: float
    bias: float
    second: float


# Each with its opposite, where what has been dead is alive; a small bias leaves hidden units near zero.
_SIGNS = (_Signs(1, 1, 1), _Signs(-1, -1, -1), _Signs(1, 0.01, -1), _Signs(-1, -0.01, 1))


def examine(layer: nn.Module, *, verify: bool = True, proofs: dict[Any, Any] | None = None) -> Recipe:
    """How squeeze_excite computes what the layer computes.

    Args:
        layer: anybody's module, on any device, also meta. Nothing of it changes, and only copies of it run.
        verify: False takes the word of the layer's family for it; a layer of no known family is refused then.
        proofs: what is known of others, by structure (layers that differ by their numbers alone need one proof); it is
            added to.

    Raises:
        CannotFuseError: it does not, or it cannot be examined; the message says why.
    """
    with errors_as_reasons("it cannot be examined"):
        check_forward(layer)
        first, second = checked_weights(layer)
        family = family_of(layer)
        kind = f"{type(layer).__name__}, by structure" if family is None else family.kind
        recipe = Recipe.of(layer, kind, first, second)
        if isinstance(altered := recipe.weights(layer), str):
            raise CannotFuseError(altered)
        likely, refusal = [], None
        if family is not None:
            try:
                likely.append(family.recipe(layer))
            except CannotFuseError as error:
                refusal = error
        if not verify and not likely:
            unknown = CannotFuseError("it is of no known family, and may only be taken for an SE layer if verified")
            raise refusal or unknown
        if not verify:
            return likely[0]

        def prove() -> Recipe:
            return _prove(layer, [*likely, *recipes_by_structure(layer, recipe)], refusal)

        proven = prove_once(layer, {} if proofs is None else proofs, prove)
        return dataclasses.replace(proven, parts=recipe.parts)


# ---------------------------------------------------------------------------------------------------- the proof


def _prove(layer: nn.Module, candidates: list[Recipe], refusal: CannotFuseError | None) -> Recipe:
    """refusal: why the layer's family does not know it, which says more than that no candidate fits."""
    with isolated():
        trial = _LayerTrial(layer, candidates)
        try:
            return trial.prove()
        except CannotFuseError as error:
            raise refusal or error from None
        finally:
            trial.watch.restore()


class _LayerTrial(Trial):
    """A layer beside a recipe, the operator's arguments; both use the same weights."""

    bound = 1e-6  # a layer may round to float32 on its way

    def __init__(self, layer: nn.Module, candidates: list[Recipe]) -> None:
        self.generator = torch.Generator("cpu").manual_seed(0)
        copied = random_copy(layer, self.generator).eval()
        super().__init__(copied, copied)
        self.candidates, self.recipe = candidates, candidates[0]
        first, second = (copied.get_submodule(".".join(path)) for path in (self.recipe.first, self.recipe.second))
        rows = 10.0 ** -(torch.arange(second.weight.shape[0], dtype=torch.float64) % 4)
        with torch.no_grad():
            second.weight.mul_(rows.reshape(-1, *(1,) * (second.weight.dim() - 1)))
        tensors = (first.weight, first.bias, second.weight, second.bias)
        self._weights = [(t, None if t is None else t.detach().clone()) for t in tensors]

    def replacement(self, x: Tensor) -> Tensor:
        """What the fused layer will return, by the kernels for the CPU where they are, whatever backend is in force."""
        recipe = self.recipe
        first, second = (self.theirs.get_submodule(".".join(path)) for path in (recipe.first, recipe.second))
        weights = (first.weight, second.weight, first.bias, second.bias)
        return recipe.apply(weights, x, chosen=route(x, "auto"))[0]

    def scale(self, x: Tensor, y: Tensor) -> Tensor:
        return x if y.shape == x.shape else 1 + y.abs()

    def differs(self, what: str, error: float) -> CannotFuseError:
        return CannotFuseError(
            f"{what} looks like an SE layer's, but differs by {error:.3g} of the largest value for random inputs "
            f"(bound {self.bound:.0e}); it computes something else as well"
        )

    def set_weights(self, signs: _Signs, second: float = 1) -> None:
        """Gives the copy weights of these signs, w2 and b2 of this size."""
        factors = (signs.first, signs.bias, signs.second * second, signs.second * second)
        with torch.no_grad():
            for (weight, drawn), factor in zip(self._weights, factors, strict=True):
                if weight is not None:
                    weight.copy_(factor * drawn)

    def input(self, dimensions: int, last: bool | None = None) -> Tensor:
        """Pairs of samples of many scales, whose channels lie on opposite sides of zero by their means and maxima."""
        channels, spatial = self.recipe.channels, _SPATIAL[:dimensions]
        samples = 2 * _PAIRS + (channels == 2 * _PAIRS)  # a layer that takes the batch for the channels is to notice
        x = torch.randn((samples, channels, *spatial), generator=self.generator, dtype=torch.float64)
        shifts = 2 * torch.randn((_PAIRS, channels, *(1,) * dimensions), generator=self.generator, dtype=torch.float64)
        for pair, (scale, shift) in enumerate(zip(_SCALES, shifts, strict=True)):
            x[2 * pair : 2 * pair + 2] += torch.stack((shift, -shift))
            x[2 * pair : 2 * pair + 2] *= scale
        last = self.recipe.channels_last if last is None else last
        return x.movedim(1, -1).contiguous() if last else x

    def prove(self) -> Recipe:
        """The first candidate that computes what the layer does."""
        runs, failure = [], None
        for last in dict.fromkeys(recipe.channels_last for recipe in self.candidates):
            for dimensions in (2, 1, 3):
                x = self.input(dimensions, last)
                try:
                    runs.append((dimensions, last, x, self.run(x)))
                except Exception as error:
                    failure = failure or CannotFuseError(f"it does not run on an input {list(x.shape)}: {error}")
        if not runs:
            raise failure
        self.watch.settle()
        self.recipe = self._fitting(runs)
        same_layout = [(d, x, y) for d, last, x, y in runs if last == self.recipe.channels_last]
        fitting = sorted(d for d, x, y in same_layout if self.error(x, y) <= self.bound)
        self.recipe = dataclasses.replace(self.recipe, dimensions=tuple(fitting))
        for training in (False, True):
            self.theirs.train(training)
            for dimensions in self.recipe.dimensions:
                x = self.input(dimensions)
                for signs in _SIGNS[: 2 if training else 4]:
                    self.set_weights(signs)
                    self.compare_steps(x)
                for signs in _SIGNS[:2]:
                    self.set_weights(signs, 1e-8)
                    self._compare_extremes(dimensions)
                    self.set_weights(signs)
                    self._compare_sizes(dimensions)
        self.theirs.eval()
        self._compare_formats()
        return self.recipe

    def _fitting(self, runs: list[Any]) -> Recipe:
        least = math.inf
        for _, last, x, y in runs:
            returned = _forms(x, y, last)
            for recipe in self.candidates:
                if recipe.channels_last != last or recipe.form not in returned:
                    continue
                self.recipe = recipe
                error = self.error(x[-4:], y[-4:])  # four samples tell most of what it is not
                if error <= self.bound and (error := self.error(x, y)) <= self.bound:
                    return recipe
                least = min(least, error)
        _, last, x, y = runs[0]
        if not _forms(x, y, last):
            what = f"a {list(y.shape)} tensor" if isinstance(y, Tensor) else type(y).__name__
            raise CannotFuseError(
                f"it returns {what} for an input {list(x.shape)}, neither the scaled input nor a gate"
            )
        raise self.differs("its output", least)

    def _compare_sizes(self, dimensions: int) -> None:
        """For small and large planes, too: some pool over windows of a fixed size."""
        numbers = integers_of(self.theirs, self.watch)
        for spatial in (*_SIZES[dimensions], *larger_planes(numbers, self.recipe.channels, dimensions)):
            # A sum of two is random enough, and drawn in no time.
            parts = (self.recipe.channels, *(1 for _ in spatial)), (1, *spatial)
            x = sum(torch.randn((1, *part), generator=self.generator, dtype=torch.float64) for part in parts)
            x = x.movedim(1, -1).contiguous() if self.recipe.channels_last else x
            with errors_as_reasons(f"it does not run on an input {list(x.shape)}"):
                self.compare_outputs(x, self.run(x), f"for an input {list(x.shape)} its output")

    def _compare_extremes(self, dimensions: int) -> None:
        """For NaN and very large values."""
        x = self.input(dimensions)[-4:]
        x[0] *= 1e8 / x[0].abs().max()
        x[1, ..., 0] = math.nan
        self.compare_outputs(x, self.run(x), "of very large values its output")

    def _compare_formats(self) -> None:
        """Memory format and dtype of the output. The copy is of no more use then."""
        self.set_weights(_SIGNS[0])
        x = self.input(self.recipe.dimensions[-1])[:6]
        if x.dim() == 4:
            given = x.contiguous(memory_format=torch.channels_last)
            theirs, ours = self.theirs(given).stride(), self.replacement(given).stride()
            if theirs != ours:
                raise CannotFuseError(
                    f"of a channels_last input it makes an output with strides {theirs}, the operator {ours}"
                )
        for dtype, bound in _LOW_PRECISION.items():
            try:
                y = self.theirs.to(dtype)(x.to(dtype))
            except Exception:  # a layer for other dtypes
                continue
            if y.dtype != dtype:
                raise CannotFuseError(f"it returns {y.dtype} for {dtype}")
            scale = torch.maximum(x.abs(), y.abs()) if y.shape == x.shape else 1 + y.abs()
            if not (error := distance(self.replacement(x.to(dtype)), y, scale)) <= bound:
                raise CannotFuseError(f"in {dtype} its output differs by {error:.3g} of the largest value")


def _forms(x: Tensor, y: Any, last: bool) -> tuple[str, ...]:
    """The forms whose result has y's shape."""
    samples, channels = x.shape[0], x.shape[-1 if last else 1]
    if not isinstance(y, Tensor):
        return ()
    if y.shape == x.shape:
        return ("scale", "residual")
    if y.shape == (samples, channels):
        return ("flat_gate",)
    return ("gate",) if not last and y.shape == (samples, channels, *(1,) * (x.dim() - 2)) else ()


# Odd and even, and one position alone.
_SIZES = {1: ((1,), (10,), (317,)), 2: ((1, 1), (1, 10), (8, 6), (20, 21)), 3: ((1, 1, 1), (4, 6, 2), (7, 10, 11))}
_COVERED = 9  # a window of twice this is smaller than the sides of the largest planes above
_MOST_ELEMENTS, _MOST_IN_A_SQUARE = 10_000_000, 1_000_000
# Modules that have numbers which are no sizes of planes; a global pooling's is 1, or the comparison fails.
_HARMLESS = (
    nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d,
    nn.AdaptiveMaxPool1d, nn.AdaptiveMaxPool2d, nn.AdaptiveMaxPool3d, nn.Flatten, nn.Unflatten, nn.BatchNorm1d,
    nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm,
)  # fmt: skip


def integers_of(copied: nn.Module, watch: Watch) -> dict[int, str]:
    """The whole numbers that may be sizes to the module and its children: their attributes, their classes', and those
    in the code that has run. Each with what it is called, and with "" if it is not read by that code."""
    found = dict(watch.numbers)
    for path, module in copied.named_modules():
        if type(module) in _HARMLESS:
            continue
        known = not is_foreign(type(module).__module__)
        settings = settings_of(module)
        for kind in type(module).__mro__:
            if is_foreign(kind.__module__):
                settings += tuple((name, v) for name, v in vars(kind).items() if not name.startswith("__"))
        for name, value in settings:
            numbers: dict[int, str] = {}
            add_numbers(value, f"{name} of its {path}" if path else f"its {name}", numbers)
            read = known or name in watch.names
            for number, label in numbers.items():
                found[number] = found.get(number) or (label if read else "")
    return found


def larger_planes(numbers: dict[int, str], channels: int, dimensions: int) -> Iterator[tuple[int, ...]]:
    """Planes of odd and even sizes that are larger than windows of these numbers, and of twice as much.

    Raises:
        CannotFuseError: a plane like that would be too large to be tried.
    """
    for number, label in sorted(numbers.items()):
        side = 2 * number + 1
        if number <= _COVERED:
            continue
        if channels * side > _MOST_ELEMENTS:
            if label:
                reason = "may be the size of a window, and is too large to be tried out"
                raise CannotFuseError(f"{label}, {number}, {reason}")
            continue
        for axis in range(dimensions):
            yield tuple(side + axis % 2 if i == axis else 1 for i in range(dimensions))
        if dimensions > 1 and channels * side * (side + 1) <= _MOST_IN_A_SQUARE:
            yield (side, side + 1, *(1,) * (dimensions - 2))
