"""From a layer to its recipe: what it may compute is read from its structure, what it does compute is proven.

The proof runs a copy of the layer, in float64 on the CPU, with random weights in place of its own and without hooks, in
evaluation and in training mode: so nothing of the layer is touched, a layer on the meta device can be proven like any
other, and a layer whose last weight is still zero, as networks often begin, does not hide its functions.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import inspect
import itertools
import math
import random
import sys
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from .. import ops, torch_private
from ..functional import route
from .families import Reading, Unsuited, elementwise, family_of, read_freely, weights_of
from .recipe import SCALARS, Recipe, parts_of, settings_of

__all__ = ["examine", "nothing_around", "random_copy"]

_SAMPLES = 4
_SPATIAL = (5, 3, 2)
_SCALES = (1, 10, 100, 1000)  # of the samples: relu and relu6, say, differ far from zero only
_BOUND = 1e-6  # a layer may round to float32 on its way


def examine(layer: nn.Module, *, verify: bool = True) -> Recipe:
    """How squeeze_excite computes what the layer computes.

    Args:
        layer: anybody's module, on any device, also meta. Nothing of it changes.
        verify: False takes the word of the layer's family for it; a layer of no known family is refused then.

    Raises:
        Unsuited: it does not; the message says why.
    """
    if isinstance(layer, (torch.jit.ScriptModule, torch.fx.GraphModule)):
        by = "compiled by TorchScript" if isinstance(layer, torch.jit.ScriptModule) else "traced by FX"
        raise Unsuited(f"it is {by}; fuse before that")
    if "forward" in vars(layer):
        raise Unsuited("its forward has been replaced, on this very object")
    weights_of(layer)
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
    try:
        return _proven(layer, readings)
    except Unsuited:
        if refusal is not None:
            raise refusal from None
        raise


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
        before = [settings_of(module) for module in copied.modules()]
        skeletons = [_recipe(layer, reading) for reading in readings]
        layouts = dict.fromkeys(last for reading in readings for last in reading.channels_last)
        trials, failure = [], None
        for last in layouts:
            for dimensions in (2, 1, 3):
                x = _input(skeletons[0].channels, dimensions, last, generator)
                try:
                    trials.append((dimensions, last, x, _run(copied, x)))
                except Exception as error:
                    failure = failure or Unsuited(f"it does not run on an input {list(x.shape)}: {error}")
        if not trials:
            raise failure
        recipe = _fitting(copied, list(zip(readings, skeletons, strict=True)), trials)
        same_layout = [(d, x, y) for d, last, x, y in trials if last == recipe.channels_last]
        alike = sorted(d for d, x, y in same_layout if _error(recipe, copied, x, y) <= _BOUND)
        recipe = dataclasses.replace(recipe, dimensions=tuple(alike))
        for dimensions in recipe.dimensions:
            _compare_sizes(recipe, copied, dimensions, generator)
            _compare_extremes(recipe, copied, dimensions, generator)
        for training in (False, True):
            copied.train(training)
            for dimensions in recipe.dimensions:
                x = _input(recipe.channels, dimensions, recipe.channels_last, generator)
                try:
                    _compare_gradients(recipe, copied, x)
                except Unsuited:
                    raise
                except Exception as error:
                    mode = "training" if training else "evaluation"
                    raise Unsuited(f"in {mode} mode it does not run on an input {list(x.shape)}: {error}") from error
        _compare_formats(recipe, copied.eval(), generator)
        if not all(map(_same_settings, before, copied.modules())):
            raise Unsuited("its forward changes attributes of it, which the operator would not")
    return recipe


def _same_settings(before: tuple[tuple[str, object], ...], module: nn.Module) -> bool:
    after = settings_of(module)
    return [name for name, _ in before] == [name for name, _ in after] and all(
        a is b or (type(a) in SCALARS and a == b) for (_, a), (_, b) in zip(before, after, strict=True)
    )


@contextlib.contextmanager
def nothing_around() -> Iterator[None]:
    """Gradients, and none of the caller's modes; random states and the counts of calls are afterwards as before."""
    states = _random_states()
    with (
        torch.inference_mode(False),
        torch.enable_grad(),
        torch.autocast("cpu", enabled=False),
        # Detached: an operator's output that its own backward holds on to would never be freed.
        torch.autograd.graph.saved_tensors_hooks(torch.detach, lambda t: t),
        torch_private.without_modes(),
        torch.device("cpu"),
        torch.random.fork_rng(devices=[]),
        ops.uncounted(),
    ):
        try:
            yield
        finally:
            random.setstate(states[0])
            if len(states) > 1:
                sys.modules["numpy"].random.set_state(states[1])


def _random_states() -> tuple[Any, ...]:
    """Of Python's generator and, where somebody has imported it, of NumPy's."""
    numpy = sys.modules.get("numpy")
    return (random.getstate(), *([] if numpy is None else [numpy.random.get_state()]))


def random_copy(layer: nn.Module, generator: torch.Generator) -> nn.Module:
    """A deep copy without hooks, with random weights in float64 on the CPU, whatever and wherever the layer's are.

    Buffers are positive, as a variance has to be; counters begin at zero.
    """
    memo: dict[int, Any] = {}
    for module in layer.modules():
        # Hooks are not the layer's arithmetic, and may hold on to anything.
        memo.update((id(v), type(v)()) for k, v in vars(module).items() if k.endswith("_hooks"))
        for parameter in module._parameters.values():
            if parameter is not None:
                values = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
                scale = math.prod(parameter.shape[1:]) ** -0.5
                memo[id(parameter)] = nn.Parameter(values * scale)
        if isinstance(module, nn.SyncBatchNorm) and module.process_group is not None:
            memo[id(module.process_group)] = None  # processes cannot be copied, and the proof runs in one
        for buffer in module._buffers.values():
            if buffer is None:
                continue
            if buffer.is_floating_point():
                memo[id(buffer)] = 0.5 + torch.rand(buffer.shape, generator=generator, dtype=torch.float64)
            else:
                memo[id(buffer)] = torch.zeros(buffer.shape, dtype=buffer.dtype)
    try:
        return copy.deepcopy(layer, memo)
    except Exception as error:
        raise Unsuited(f"it cannot be copied, and so not be tried out: {error}") from error


def _input(channels: int, dimensions: int, last: bool, generator: torch.Generator) -> Tensor:
    samples = _SAMPLES + (channels == _SAMPLES)  # a layer that takes the batch for the channels is to notice
    x = torch.randn((samples, channels, *_SPATIAL[:dimensions]), generator=generator, dtype=torch.float64)
    for sample, scale in zip(x, _SCALES, strict=False):
        sample *= scale
    return x.movedim(1, -1).contiguous() if last else x


def _run(layer: nn.Module, x: Tensor) -> Tensor:
    given = x.clone()
    with torch.no_grad():
        y = layer(given)
    if not torch.equal(given.nan_to_num(), x.nan_to_num()):
        raise Unsuited("it changes its input in place")
    return y


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
                error = _error(recipe, copied, x, y)
                if error <= _BOUND:
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


_SIZES = {1: ((1,), (317,)), 2: ((1, 1), (1, 9), (19, 31)), 3: ((1, 1, 1), (7, 9, 11))}
# Weightless modules whose sizes are known to be harmless: a global pooling's is 1, or the comparison fails.
_RESHAPES = (
    nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d, nn.AdaptiveMaxPool1d, nn.AdaptiveMaxPool2d,
    nn.AdaptiveMaxPool3d, nn.Flatten, nn.Unflatten,
)  # fmt: skip


def _compare_sizes(recipe: Recipe, copied: nn.Module, dimensions: int, generator: torch.Generator) -> None:
    """Raises Unsuited unless outputs agree for small and large planes, too: some pool over windows of a fixed size."""
    for spatial in _SIZES[dimensions]:
        # A sum of two is random enough, and drawn in no time.
        parts = (recipe.channels, *(1 for _ in spatial)), (1, *spatial)
        x = sum(torch.randn((1, *part), generator=generator, dtype=torch.float64) for part in parts)
        x = x.movedim(1, -1).contiguous() if recipe.channels_last else x
        try:
            error = _error(recipe, copied, x, _run(copied, x))
        except Exception as failure:
            raise Unsuited(f"it does not run on an input {list(x.shape)}: {failure}") from failure
        if error > _BOUND:
            raise Unsuited(_differs(f"for an input {list(x.shape)} its output", error))
    # A window that is larger than the planes tried would look global.
    for name, module in copied.named_modules():
        if name and not module._modules and not module._parameters and not isinstance(module, _RESHAPES):
            if elementwise(module) is not None:
                continue
            for setting, value in settings_of(module):
                if any(type(n) is int and n > 1 for n in (value if isinstance(value, tuple) else (value,))):
                    raise Unsuited(f"its {name} has a size, {setting} = {value}, and may be no global pooling")


def _compare_extremes(recipe: Recipe, copied: nn.Module, dimensions: int, generator: torch.Generator) -> None:
    """Raises Unsuited if a layer does something about NaN or very large values that the operator does not."""
    x = _input(recipe.channels, dimensions, recipe.channels_last, generator)
    x[0] *= 1e8
    x[1, ..., 0] = math.nan
    theirs, ours = _run(copied, x), _ours(recipe, copied, x)
    if not torch.equal(theirs.isnan(), ours.isnan()):
        raise Unsuited("it does something about NaN, which the operator passes on")
    scale = x[:1] if theirs.shape == x.shape else 1 + theirs[:1].abs()
    if not _distance(ours[:1], theirs[:1], scale) <= _BOUND:
        raise Unsuited("it does something about very large values, which the operator does not")


def _compare_formats(recipe: Recipe, copied: nn.Module, generator: torch.Generator) -> None:
    """Raises Unsuited unless memory format and dtype of the output agree. The copy is of no more use then."""
    x = _input(recipe.channels, recipe.dimensions[-1], recipe.channels_last, generator)
    if x.dim() == 4:
        given = x.contiguous(memory_format=torch.channels_last)
        theirs, ours = copied(given).stride(), _ours(recipe, copied, given).stride()
        if theirs != ours:
            raise Unsuited(f"of a channels_last input it makes an output with strides {theirs}, the operator {ours}")
    for dtype in (torch.float32, torch.bfloat16):
        try:
            y = copied.to(dtype)(x.to(dtype))
        except Exception:  # a layer for other dtypes
            continue
        if y.dtype != dtype:
            raise Unsuited(f"it returns {y.dtype} for {dtype}")


def _compare_gradients(recipe: Recipe, copied: nn.Module, x: Tensor) -> None:
    """Raises Unsuited unless outputs and all gradients agree, for a random gradient of the output."""
    x.requires_grad_()
    inputs = {"its input": x, **{f"its {name}": parameter for name, parameter in copied.named_parameters()}}
    mode = "in training mode " if copied.training else ""
    state, states = torch.get_rng_state(), repr(_random_states())
    theirs = copied(x)
    if not isinstance(theirs, Tensor) or not theirs.requires_grad:
        raise Unsuited(f"{mode}its output has no gradient")
    if not torch.equal(torch.get_rng_state(), state) or repr(_random_states()) != states:
        raise Unsuited(f"{mode}it draws random numbers")
    ours = _ours(recipe, copied, x)
    if (error := _distance(ours, theirs, x if theirs.shape == x.shape else 1 + theirs.abs())) > _BOUND:
        raise Unsuited(_differs(f"{mode}its output", error))
    dy = torch.randn(theirs.shape, generator=torch.Generator("cpu").manual_seed(1), dtype=theirs.dtype)
    gradients = (torch.autograd.grad(y, tuple(inputs.values()), dy, allow_unused=True) for y in (theirs, ours))
    for name, expected, got in zip(inputs, *gradients, strict=True):
        if expected is None:
            raise Unsuited(f"{mode}no gradient reaches {name}")
        if not (error := ((got - expected).norm() / expected.norm().clamp_min(1e-300)).item()) <= _BOUND:
            raise Unsuited(_differs(f"{mode}the gradient of {name}", error))
