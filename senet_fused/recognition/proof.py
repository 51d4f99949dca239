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
import inspect
import itertools
import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..functional import route
from .effects import Effect, Watch, add_numbers, is_foreign
from .families import Reading, check_weights, family_of, read_freely
from .recipe import Recipe, parts_of, settings_of
from .trial import Unsuited, nothing_around, random_copy, random_states, structure_of, unsuited

__all__ = ["beyond", "examine", "numbers_of"]

_SPATIAL = (5, 3, 2)
_PAIRS = 8
_SCALES = tuple(10 ** (-2 + 5 * k / (_PAIRS - 1)) for k in range(_PAIRS))  # of pairs of samples: 0.01 to 1000
_BOUND = 1e-6  # a layer may round to float32 on its way
_LOW_PRECISION = {torch.float32: 1e-4, torch.bfloat16: 0.1}  # only what is quite another function is to be noticed


class _Signs(NamedTuple):
    """Factors of the weights: of w1, of b1, and of w2 and b2."""

    first: float
    bias: float
    second: float


# Each with its opposite, where what has been dead is alive; a small bias leaves hidden units near zero.
_SIGNS = (_Signs(1, 1, 1), _Signs(-1, -1, -1), _Signs(1, 0.01, -1), _Signs(-1, -0.01, 1))


def examine(layer: nn.Module, *, verify: bool = True, proven: dict[Any, Recipe | str] | None = None) -> Recipe:
    """How squeeze_excite computes what the layer computes.

    Args:
        layer: anybody's module, on any device, also meta. Nothing of it changes, and only copies of it run.
        verify: False takes the word of the layer's family for it; a layer of no known family is refused then.
        proven: what is known of others, by structure (layers that differ by their numbers alone need one proof); it is
            added to.

    Raises:
        Unsuited: it does not, or it cannot be examined; the message says why.
    """
    with unsuited("it cannot be examined"):
        return _examined(layer, verify, {} if proven is None else proven)


def _examined(layer: nn.Module, verify: bool, proven: dict[Any, Recipe | str]) -> Recipe:
    if isinstance(layer, (torch.jit.ScriptModule, torch.fx.GraphModule)):
        by = "compiled by TorchScript" if isinstance(layer, torch.jit.ScriptModule) else "traced by FX"
        raise Unsuited(f"it is {by}; fuse before that")
    if "forward" in vars(layer):
        raise Unsuited("its forward has been replaced, on this very object")
    check_weights(layer)
    family = family_of(layer)
    kind = f"{type(layer).__name__}, by structure"
    readings, refusal = [], None
    if family is not None:
        try:
            readings.append(family.read(layer))
        except Unsuited as error:
            refusal = error
    if not verify:
        if family is None:
            raise Unsuited("it is of no known family, and may only be taken for an SE layer if verified")
        if refusal is not None:
            raise refusal
        return _intact(layer, _recipe(layer, readings[0]))
    readings.append(read_freely(layer, kind if family is None else family.kind))
    _intact(layer, _recipe(layer, readings[0]))
    key = structure_of(layer)
    verdict = None if key is None else proven.get(key)
    if verdict is None:
        try:
            verdict = _proven(layer, readings)
        except Unsuited as error:
            verdict = str(error if refusal is None else refusal)
        if key is not None:
            proven[key] = verdict
    if isinstance(verdict, str):
        raise Unsuited(verdict)
    return dataclasses.replace(verdict, parts=parts_of(layer))


def _recipe(layer: nn.Module, reading: Reading) -> Recipe:
    """The likeliest of a reading's possibilities."""
    act, gate = reading.functions[0]
    rd_channels, channels = layer.get_submodule(reading.first).weight.shape[:2]
    return Recipe(
        kind=reading.kind,
        first=tuple(reading.first.split(".")),
        second=tuple(reading.second.split(".")),
        act=act,
        gate=gate,
        squeeze=reading.squeezes[0],
        form=reading.forms[0],
        channels=channels,
        rd_channels=rd_channels,
        channels_last=reading.channels_last[0],
        dimensions=_dimensions(layer),
        argument=next(iter(inspect.signature(layer.forward).parameters), ""),
        parts=parts_of(layer),
    )


def _intact(layer: nn.Module, recipe: Recipe) -> Recipe:
    if (altered := recipe.alteration(layer)) is not None:
        raise Unsuited(altered)
    return recipe


def _dimensions(layer: nn.Module) -> tuple[int, ...]:
    """As many as the layer's pooling or convolutions have; two if it has neither."""
    for module in layer.modules():
        for count, kinds in (
            (1, (nn.Conv1d, nn.AdaptiveAvgPool1d)),
            (2, (nn.Conv2d, nn.AdaptiveAvgPool2d)),
            (3, (nn.Conv3d, nn.AdaptiveAvgPool3d)),
        ):
            if isinstance(module, kinds):
                return (count,)
    return (2,)


# ---------------------------------------------------------------------------------------------------- the proof


def _proven(layer: nn.Module, readings: list[Reading]) -> Recipe:
    with nothing_around():
        generator = torch.Generator("cpu").manual_seed(0)
        copied = random_copy(layer, generator).eval()
        trial = _Trial(copied, readings[0], generator)
        try:
            return _tried(trial, [(reading, _recipe(layer, reading)) for reading in readings])
        except Effect as effect:
            raise Unsuited(str(effect)) from None
        finally:
            trial.watch.restore()


def _tried(trial: _Trial, skeletons: list[tuple[Reading, Recipe]]) -> Recipe:
    layouts = dict.fromkeys(last for reading, _ in skeletons for last in reading.channels_last)
    runs, failure = [], None
    for last in layouts:
        for dimensions in (2, 1, 3):
            x = _input(trial.channels, dimensions, last, trial.generator)
            try:
                runs.append((dimensions, last, x, trial.run(x)))
            except Exception as error:
                failure = failure or Unsuited(f"it does not run on an input {list(x.shape)}: {error}")
    if not runs:
        raise failure
    trial.watch.settle()
    recipe = _fitting(trial.copied, skeletons, runs)
    same_layout = [(d, x, y) for d, last, x, y in runs if last == recipe.channels_last]
    alike = sorted(d for d, x, y in same_layout if _error(recipe, trial.copied, x, y) <= _BOUND)
    recipe = dataclasses.replace(recipe, dimensions=tuple(alike))
    for training in (False, True):
        trial.copied.train(training)
        for dimensions in recipe.dimensions:
            x = _input(recipe.channels, dimensions, recipe.channels_last, trial.generator)
            mode = "training" if training else "evaluation"
            for signs in _SIGNS[: 2 if training else 4]:
                trial.weigh(signs)
                with unsuited(f"in {mode} mode it does not run on an input {list(x.shape)}"):
                    _compare_gradients(recipe, trial, x)
            for signs in _SIGNS[:2]:
                trial.weigh(signs, 1e-8)
                _compare_extremes(recipe, trial, dimensions)
                trial.weigh(signs)
                _compare_sizes(recipe, trial, dimensions)
    trial.copied.eval()
    _compare_formats(recipe, trial)
    return recipe


class _Trial:
    """A copy to be tried out, and its weights."""

    def __init__(self, copied: nn.Module, reading: Reading, generator: torch.Generator) -> None:
        self.copied, self.generator = copied, generator
        self.watch = Watch(copied)
        first, second = (copied.get_submodule(path) for path in (reading.first, reading.second))
        self.channels = first.weight.shape[1]
        rows = 10.0 ** -(torch.arange(second.weight.shape[0], dtype=torch.float64) % 4)
        with torch.no_grad():
            second.weight.mul_(rows.reshape(-1, *(1,) * (second.weight.dim() - 1)))
        tensors = (first.weight, first.bias, second.weight, second.bias)
        self._weights = [(t, None if t is None else t.detach().clone()) for t in tensors]

    def weigh(self, signs: _Signs, second: float = 1) -> None:
        """Gives the copy weights of these signs, w2 and b2 of this size."""
        factors = (signs.first, signs.bias, signs.second * second, signs.second * second)
        with torch.no_grad():
            for (weight, drawn), factor in zip(self._weights, factors, strict=True):
                if weight is not None:
                    weight.copy_(factor * drawn)

    def run(self, x: Tensor) -> Tensor:
        """What the copy returns for x, of which it must not change a thing."""
        given = x.clone()
        with torch.no_grad(), self.watch.running():
            y = self.copied(given)
        if not torch.equal(given.nan_to_num(), x.nan_to_num()):
            raise Unsuited("it changes its input in place")
        return y


def _input(channels: int, dimensions: int, last: bool, generator: torch.Generator) -> Tensor:
    """Pairs of samples of many scales, whose channels lie on opposite sides of zero by their means and maxima."""
    spatial = _SPATIAL[:dimensions]
    samples = 2 * _PAIRS + (channels == 2 * _PAIRS)  # a layer that takes the batch for the channels is to notice
    x = torch.randn((samples, channels, *spatial), generator=generator, dtype=torch.float64)
    shifts = 2 * torch.randn((_PAIRS, channels, *(1 for _ in spatial)), generator=generator, dtype=torch.float64)
    for pair, (scale, shift) in enumerate(zip(_SCALES, shifts, strict=True)):
        x[2 * pair : 2 * pair + 2] += torch.stack((shift, -shift))
        x[2 * pair : 2 * pair + 2] *= scale
    return x.movedim(1, -1).contiguous() if last else x


def _fitting(copied: nn.Module, readings: list[tuple[Reading, Recipe]], trials: list[Any]) -> Recipe:
    """The first possibility that computes what the layer does."""
    least = math.inf
    for _, last, x, y in trials:
        returned = _forms(x, y, last)
        for reading, skeleton in readings:
            if last not in reading.channels_last:
                continue
            forms = [form for form in reading.forms if form in returned]
            for (act, gate), squeeze, form in itertools.product(reading.functions, reading.squeezes, forms):
                recipe = dataclasses.replace(
                    skeleton, act=act, gate=gate, squeeze=squeeze, form=form, channels_last=last
                )
                # Four samples tell most of what it is not.
                error = _error(recipe, copied, x[-4:], y[-4:])
                if error <= _BOUND and (error := _error(recipe, copied, x, y)) <= _BOUND:
                    return recipe
                least = min(least, error)
    _, last, x, y = trials[0]
    if not _forms(x, y, last):
        what = f"a {list(y.shape)} tensor" if isinstance(y, Tensor) else type(y).__name__
        raise Unsuited(f"it returns {what} for an input {list(x.shape)}, neither the scaled input nor a gate")
    raise Unsuited(_differs("its output", least))


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


def _differs(what: str, error: float) -> str:
    return (
        f"{what} looks like an SE layer's, but differs by {error:.3g} of the largest value for random inputs "
        f"(bound {_BOUND:.0e}); it computes something else as well"
    )


def _error(recipe: Recipe, copied: nn.Module, x: Tensor, y: Tensor) -> float:
    """The largest difference between y, what the layer returned, and what the recipe does."""
    with torch.no_grad():
        ours = _ours(recipe, copied, x)
    return _distance(ours, y, x if y.shape == x.shape else 1 + y.abs()) if ours.shape == y.shape else math.inf


def _ours(recipe: Recipe, copied: nn.Module, x: Tensor) -> Tensor:
    """What the fused layer will return, by the kernels for the CPU where they are, whatever backend is in force."""
    first, second = (copied.get_submodule(".".join(path)) for path in (recipe.first, recipe.second))
    weights = (first.weight, second.weight, first.bias, second.bias)
    return recipe.apply(weights, x, chosen=route(x, "auto"))[0]


def _distance(a: Tensor, b: Tensor, scale: Tensor) -> float:
    """The largest difference in units of the sample's largest scale, infinite if there is a NaN."""
    worst = ((a - b).abs().flatten(1).amax(1) / scale.abs().flatten(1).amax(1)).max().item()
    return worst if worst == worst else math.inf


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


def numbers_of(copied: nn.Module, watch: Watch) -> dict[int, str]:
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


def beyond(numbers: dict[int, str], channels: int, dimensions: int) -> Iterator[tuple[int, ...]]:
    """Planes of odd and even sizes that are larger than windows of these numbers, and of twice as much.

    Raises:
        Unsuited: a plane like that would be too large to be tried.
    """
    for number, label in sorted(numbers.items()):
        side = 2 * number + 1
        if number <= _COVERED:
            continue
        if channels * side > _MOST_ELEMENTS:
            if label:
                raise Unsuited(f"{label}, {number}, may be the size of a window, and is too large to be tried out")
            continue
        for axis in range(dimensions):
            yield tuple(side + axis % 2 if i == axis else 1 for i in range(dimensions))
        if dimensions > 1 and channels * side * (side + 1) <= _MOST_IN_A_SQUARE:
            yield (side, side + 1, *(1,) * (dimensions - 2))


def _compare_sizes(recipe: Recipe, trial: _Trial, dimensions: int) -> None:
    """Raises Unsuited unless outputs agree for small and large planes, too: some pool over windows of a fixed size."""
    numbers = numbers_of(trial.copied, trial.watch)
    for spatial in (*_SIZES[dimensions], *beyond(numbers, recipe.channels, dimensions)):
        # A sum of two is random enough, and drawn in no time.
        parts = (recipe.channels, *(1 for _ in spatial)), (1, *spatial)
        x = sum(torch.randn((1, *part), generator=trial.generator, dtype=torch.float64) for part in parts)
        x = x.movedim(1, -1).contiguous() if recipe.channels_last else x
        with unsuited(f"it does not run on an input {list(x.shape)}"):
            error = _error(recipe, trial.copied, x, trial.run(x))
        if error > _BOUND:
            raise Unsuited(_differs(f"for an input {list(x.shape)} its output", error))


def _compare_extremes(recipe: Recipe, trial: _Trial, dimensions: int) -> None:
    """Raises Unsuited if a layer does something about NaN or very large values that the operator does not."""
    x = _input(recipe.channels, dimensions, recipe.channels_last, trial.generator)[-4:]
    x[0] *= 1e8 / x[0].abs().max()
    x[1, ..., 0] = math.nan
    theirs, ours = trial.run(x), _ours(recipe, trial.copied, x)
    if not torch.equal(theirs.isnan(), ours.isnan()):
        raise Unsuited("it does something about NaN, which the operator passes on")
    scale = x[:1] if theirs.shape == x.shape else 1 + theirs[:1].abs()
    if not _distance(ours[:1], theirs[:1], scale) <= _BOUND:
        raise Unsuited("it does something about very large values, which the operator does not")


def _compare_formats(recipe: Recipe, trial: _Trial) -> None:
    """Raises Unsuited unless memory format and dtype of the output agree. The copy is of no more use then."""
    trial.weigh(_SIGNS[0])
    copied = trial.copied
    x = _input(recipe.channels, recipe.dimensions[-1], recipe.channels_last, trial.generator)[:6]
    if x.dim() == 4:
        given = x.contiguous(memory_format=torch.channels_last)
        theirs, ours = copied(given).stride(), _ours(recipe, copied, given).stride()
        if theirs != ours:
            raise Unsuited(f"of a channels_last input it makes an output with strides {theirs}, the operator {ours}")
    for dtype, bound in _LOW_PRECISION.items():
        try:
            y = copied.to(dtype)(x.to(dtype))
        except Exception:  # a layer for other dtypes
            continue
        if y.dtype != dtype:
            raise Unsuited(f"it returns {y.dtype} for {dtype}")
        scale = torch.maximum(x.abs(), y.abs()) if y.shape == x.shape else 1 + y.abs()
        if not (error := _distance(_ours(recipe, copied, x.to(dtype)), y, scale)) <= bound:
            raise Unsuited(f"in {dtype} its output differs by {error:.3g} of the largest value")


def _compare_gradients(recipe: Recipe, trial: _Trial, x: Tensor) -> None:
    """Raises Unsuited unless outputs and all gradients agree, for a random gradient of the output."""
    x, copied = x.clone().requires_grad_(), trial.copied
    inputs = {"its input": x, **{f"its {name}": parameter for name, parameter in copied.named_parameters()}}
    mode = "in training mode " if copied.training else ""
    states = random_states()
    with trial.watch.running():
        theirs = copied(x)
        if not isinstance(theirs, Tensor) or not theirs.requires_grad:
            raise Unsuited(f"{mode}its output has no gradient")
        generator = torch.Generator("cpu").manual_seed(1)
        dy = torch.randn(theirs.shape, generator=generator, dtype=theirs.dtype)
        expected = torch.autograd.grad(theirs, tuple(inputs.values()), dy, allow_unused=True)
    if random_states() != states:
        raise Unsuited(f"{mode}it draws random numbers")
    ours = _ours(recipe, copied, x)
    if (error := _distance(ours, theirs, x if theirs.shape == x.shape else 1 + theirs.abs())) > _BOUND:
        raise Unsuited(_differs(f"{mode}its output", error))
    got = torch.autograd.grad(ours, tuple(inputs.values()), dy, allow_unused=True)
    for name, wanted, gradient in zip(inputs, expected, got, strict=True):
        if wanted is None:
            raise Unsuited(f"{mode}no gradient reaches {name}")
        if not (error := ((gradient - wanted).norm() / wanted.norm().clamp_min(1e-300)).item()) <= _BOUND:
            raise Unsuited(_differs(f"{mode}the gradient of {name}", error))
