"""What every backend of GPU kernels has to hold to in block tails, whichever it is: cases, and tests that take them.

As for gpu_contract.py, a test module of a backend imports the tests and has the fixtures `backend_name`, and `run`, a
function (case, inputs) -> results that also proves that the backend's kernels ran (:func:`run_on` does both); and
`using_strategy`, a function (case, strategy) -> a context in which the case's calls, forward and backward, with a
gradient of the residual or without, take the cheapest plan with this strategy where there is one.

Fresh memory is to be NaN (the fixture `poisoned`), so that whatever a kernel fails to write shows up as wrong.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import pytest
import tail_oracle
import torch
from gpu_contract import DENSE, DEVICE, DTYPES, SENET154, SMALL, STRATEGIES, name_of, on_device
from oracle import ACTS, GATES, LAYOUTS, Tensors
from tail_oracle import (
    CHANGES,
    CONSTANT,
    EVERYTHING,
    MIXED,
    PLAIN,
    Tail,
    assert_same_bits,
    check,
    draw,
    far_first_pixels,
    far_from_zero,
    fill_outputs,
    fused,
    operator_outputs,
    operators,
    variance_error,
)

import senet_fused
from senet_fused.call import text_of

inf, nan = math.inf, math.nan
f32, bf16, f16 = DTYPES
MODES = (True, False)  # training, evaluation
VENUES = list(itertools.product(DTYPES, DENSE, MODES))
OF_SAMPLES = ("x", "residual", "dy", "factor")


def run_on(backend: str, case: Tail, inputs: Tensors) -> Tensors:
    """As :func:`tail_oracle.run_on`, on the device of all these tests."""
    return tail_oracle.run_on(backend, DEVICE, case, inputs)


def twice(run: Callable[[Tail, Tensors], Tensors]) -> Callable[[Tail, Tensors], Tensors]:
    """As run, with the proof that it gives the same bits again."""

    def run_twice(case: Tail, inputs: Tensors) -> Tensors:
        first = run(case, inputs)
        assert_same_bits(run(case, inputs), first, case)
        return first

    return run_twice


# Tiles of every kind: pixels; planes that are aligned; planes that break alignment.
KINDS = {
    "channels_last": Tail((3, 40, 6, 7), 10, bf16, "channels_last"),
    "planes": Tail((3, 40, 6, 6), 10),
    "planes of 16-bit pieces": Tail((3, 40, 5, 5), 10, f16),
    "planes of 49": Tail((3, 64, 7, 7), 8, bf16),
}

# ---------------------------------------------------------------------------------------------------- options

OPTION_SHAPES = (((3, 40, 5, 7), 20), ((2, 56, 7, 7), 21), ((4, 33, 4, 4), 19), ((3, 41, 3, 13), 0))
ENDS = list(itertools.product((None, "relu"), (False, True)))  # post_act, residual


def option_cases(dtype: torch.dtype, layout: str, training: bool) -> list[tuple[Tail, str]]:
    """Every end of a tail with a gate, two without; the other options, functions and strategies take turns."""
    v = VENUES.index((dtype, layout, training))
    cases = []
    for k, (post_act, residual) in enumerate((*ENDS, ENDS[v % 2], ENDS[3 - v % 2])):
        shape, reduced = OPTION_SHAPES[(v + k) % 3 if k < 4 else 3]
        turn = 4 * v + k
        case = Tail(shape, reduced, dtype, layout, training, ACTS[turn % len(ACTS)], GATES[(v + turn) % len(GATES)])
        case = case.replace(affine=(v // 3 + k) % 2 == 0, factor=(v + k // 2) % 2 == 0, bias=(v + k) % 3 != 0)
        case = case.replace(post_act=post_act, residual=residual, running=(v + k) % 4 != 0)
        cases.append((case, STRATEGIES[(v + k) % 3] if reduced else "partials"))
    return cases


def test_options_meet_every_venue():
    """That is every dtype, layout and mode; and every function, once at least, every strategy."""
    cases = [(venue, *pair) for venue in VENUES for pair in option_cases(*venue)]
    values = {"residual": (False, True), "factor": (False, True), "affine": (False, True), "bias": (False, True)}
    for option, found in {"post_act": (None, "relu"), **values}.items():
        met = {(venue, getattr(case, option)) for venue, case, _ in cases if case.reduced}
        assert met == set(itertools.product(VENUES, found)), option
        met = {getattr(case, option) for _, case, _ in cases if not case.reduced}
        assert met == set(found), option
    for option, found in {"act": ACTS, "gate": GATES}.items():
        assert {getattr(case, option) for _, case, _ in cases if case.reduced} == set(found), option
    assert {(venue, strategy) for venue, case, strategy in cases if case.reduced} == set(
        itertools.product(VENUES, STRATEGIES)
    )


@pytest.mark.parametrize(("dtype", "layout", "training"), VENUES, ids=name_of)
def test_options(run, using_strategy, dtype, layout, training):
    for case, strategy in option_cases(dtype, layout, training):
        with using_strategy(case, strategy):
            check(case, draws=1, ours=run)


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("kind", KINDS)
def test_every_strategy_in_training(run, using_strategy, kind, strategy):
    """And again, with the same bits."""
    odd = (list(KINDS).index(kind) + STRATEGIES.index(strategy)) % 2
    case = KINDS[kind].replace(**((PLAIN, EVERYTHING)[odd]))
    with using_strategy(case, strategy):
        check(case, draws=1, ours=twice(run))


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("kind", KINDS)
def test_with_statistics_that_are_given_a_sample_gives_the_bits_it_has_in_a_batch(run, using_strategy, kind, strategy):
    turn = list(KINDS).index(kind) + STRATEGIES.index(strategy)
    case = KINDS[kind].replace(training=False, **((EVERYTHING, PLAIN)[turn % 2]))
    chosen = ([2], [0, 2])[turn // 2 % 2]
    for some in (case, case.replace(reduced=0)) if strategy == "partials" else (case,):
        inputs = draw(some, 0)
        with using_strategy(some, strategy):
            batch = run(some, inputs)
            part = run(some, {k: t[chosen] if k in OF_SAMPLES else t for k, t in inputs.items()})
        assert_same_bits(part, {k: batch[k][chosen] for k in ("y", "dx", "dresidual") if k in batch}, (some, chosen))


@pytest.mark.parametrize("training", MODES)
def test_eps(run, training):
    for eps, layout, dtype in ((1e-3, "contiguous", bf16), (0.5, "channels_last", f32)):
        check(Tail((3, 10, 5, 7), 3, dtype, layout, training, eps=eps), draws=1, ours=run)


# ---------------------------------------------------------------------------------------------------- shapes


# Triton's interpreter takes its time, so each stage has one layout where there is no GPU.
STAGES = [(i, layout) for i in range(4) for layout in DENSE if DEVICE == "cuda" or layout == DENSE[i in (0, 3)]]


@pytest.mark.sizes
@pytest.mark.parametrize(("stage", "layout"), STAGES)
def test_senet154_shapes(run, stage, layout):
    """On a GPU at batch 64, in both modes."""
    (_, *shape), reduced = SENET154[stage]
    turn = stage // 2 + DENSE.index(layout)
    n, options = 64 if DEVICE == "cuda" else 2, (PLAIN, EVERYTHING)[turn % 2]
    case = Tail((n, *shape), reduced, (f32, bf16)[stage in (0, 3)], layout, stage != 1, **options)
    check(case, draws=1, ours=run)
    if DEVICE == "cuda":
        check(case.replace(training=not case.training, post_act="relu", dtype=f16), draws=1, ours=run)


# Planes of 1025 are shorter here: Triton's interpreter sums their pixels row by row, and gradients of BatchNorm's
# weights have lost a digit by then.
SHAPES = [((3, 16, 261), 4) if shape == (3, 16, 1025) else (shape, reduced) for shape, reduced in SMALL]


@pytest.mark.parametrize("number", range(len(SHAPES)), ids=[name_of(shape) for shape, _ in SHAPES])
def test_shapes(run, number):
    shape, reduced = SHAPES[number]
    every = (PLAIN, EVERYTHING, {"post_act": "relu", "bias": False, "residual": True})
    one_value = shape[0] * math.prod(shape[2:]) == 1
    for k in range(3):
        dtype, layout, training = VENUES[(5 * number + (4, 11, 6)[k]) % 12]
        case = Tail(shape, reduced, dtype, layout, training and not one_value, **every[(number + k) % 3])
        check(case if k < 2 else case.replace(reduced=0), draws=1, ours=run)


def test_shapes_meet_every_venue():
    met = {(k, VENUES[(5 * number + (4, 11, 6)[k]) % 12]) for k in range(3) for number in range(len(SHAPES))}
    assert len(met) == 3 * len(VENUES)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_many_samples(run, using_strategy, strategy):
    """More than an excitation's program takes at a time, and than a group of samples."""
    for k, training in enumerate(MODES):
        dtype, layout = (f16, f32)[k], DENSE[(k + STRATEGIES.index(strategy)) % 2]
        case = Tail((37, 24, 2, 3), 6, dtype, layout, training, act="silu", factor=True)
        with using_strategy(case, strategy):
            check(case, draws=1, ours=run)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_wide_bottlenecks(run, using_strategy, strategy):
    """More squeezed channels than there are, and than are worked on at a time."""
    for k, reduced in enumerate((257, 300)):
        layout = DENSE[(k + STRATEGIES.index(strategy)) % 2]
        case = Tail((5, 48, 2, 4), reduced, (bf16, f32)[k], layout, k == 0, act="gelu")
        with using_strategy(case, strategy):
            check(case, draws=1, ours=run)


@pytest.mark.parametrize("layout", sorted(set(LAYOUTS) - set(DENSE)))
def test_layouts(run, layout):
    """Slices and expansions of every kind, for x, residual and dy alike."""
    turn = sorted(LAYOUTS).index(layout)
    for k, options in enumerate((EVERYTHING, PLAIN)):
        shape = ((4, 24, 5, 6), (3, 16, 7, 7))[(turn // 2 + k) % 2]
        check(Tail(shape, 4, (f32, bf16)[(turn + k) % 2], layout, k == turn // 4 % 2, **options), draws=1, ours=run)


@pytest.mark.core
@pytest.mark.parametrize("layout", DENSE)
def test_layouts_that_differ(run, layout):
    other = DENSE[1 - DENSE.index(layout)]
    for training, post_act in zip(MODES, ("relu", None), strict=True):
        case = Tail((3, 24, 4, 6), 4, (f32, bf16)[training], layout, training, residual=True, post_act=post_act)
        check(case.replace(dy_layout=other), draws=1, ours=run)
        check(case.replace(residual_layout=other, training=not training), draws=1, ours=run)


@pytest.mark.parametrize(
    ("dtype", "others"), [(x, others) for x, others in MIXED if x in DTYPES], ids=lambda v: name_of(v) or "-".join(v)
)
def test_dtypes_that_differ(run, dtype, others):
    for layout, training, post_act in zip(DENSE, MODES, (None, "relu"), strict=True):
        case = Tail((3, 40, 5, 7), 20, dtype, layout, training, post_act=post_act, factor=True)
        check(case.replace(residual="residual" in others, others=tuple(others.items())), draws=1, ours=run)


@pytest.mark.core
@pytest.mark.parametrize("layout", DENSE)
def test_an_empty_batch(run, layout):
    """Of evaluation; training needs two values."""
    for dtype, reduced, options in ((f32, 6, EVERYTHING), (bf16, 6, PLAIN), (f16, 0, EVERYTHING)):
        case = Tail((0, 24, 7, 7), reduced, dtype, layout, False, **options)
        results = run(case, draw(case, 0))
        assert results["y"].shape == results["dx"].shape == case.shape
        for name, t in results.items():
            assert name in ("y", "dx", "dresidual") or not t.any(), name


@pytest.mark.sizes
@pytest.mark.parametrize("layout", DENSE)
@pytest.mark.parametrize(("positions", "reduced"), [(5_000, 3), (2**15 + 5, 0)])
def test_long_sums_lose_no_digits(run, positions, reduced, layout):
    """Planes of one sign: errors must not grow with their size."""

    def positive(t: Tensors) -> None:
        t["x"].abs_()

    check(Tail((2, 5, positions), reduced, layout=layout, act="silu"), draws=1, ours=run, change=positive)


# ------------------------------------------------------------------------------------------- moments that cancel

# Without a ReLU behind them: y is not exact to the rule's corner around zero where mu is rounded to float32.
MOMENTS = (
    ((4, 13, 7, 7), 4, {"act": "silu", "residual": True, "factor": True}),
    ((3, 12, 40, 40), 0, {"affine": False}),
    ((2, 100, 9, 9), 4, PLAIN),
)


@pytest.mark.parametrize("layout", DENSE)
@pytest.mark.parametrize("change", CHANGES)
def test_moments_that_cancel(run, change, layout):
    """Variances, y and gradients of channels whose mean is large beside their deviation, and of odd ones."""
    for shape, reduced, options in MOMENTS:
        check(Tail(shape, reduced, layout=layout, momentum=1.0, **options), 1, run, CHANGES[change])


@pytest.mark.parametrize("layout", DENSE)
def test_the_variance_of_each_channel_is_right(run, layout):
    """Not only of the largest, which the rule above asks for; and the naive formula would not pass."""
    changes, shapes = ((far_from_zero, 1e-6), (far_first_pixels, 1e-4)), [(4, 13, 7, 7), (3, 12, 40, 40)]
    for (change, tolerance), shape in itertools.product(changes, shapes):
        case = Tail(shape, layout=layout, affine=False, momentum=1.0)
        t = draw(case, 0, change)
        assert variance_error(t, run(case, t)["running_var"]) < tolerance, (change, shape)
        x = t["x"].transpose(0, 1).flatten(1)
        assert variance_error(t, x.square().mean(1) - x.mean(1).square()) > 1e-3


# ---------------------------------------------------------------------------------------------------- odd values


@pytest.mark.parametrize("place", ["x", "weight", "bias", "running_mean", "w1", "b1", "w2", "b2", "residual", "dy"])
def test_nan_and_inf_go_where_the_reference_has_them(run, using_strategy, place):
    """By each strategy, in the first element or the last, where a tile is not full."""
    venues = list(itertools.product((None, "relu"), DENSE, MODES))
    first = sum(map(ord, place))
    for k in range(3):
        post_act, layout, training = venues[(3 * k + first) % 8]
        training = training and place != "running_mean"
        case = Tail((3, 18, 5, 4), 5, (f32, bf16)[(k + first // 3) % 2], layout, training, residual=True)
        case = case.replace(post_act=post_act)
        inputs = draw(case, 0)
        inputs[place][(-(k % 2),) * inputs[place].dim()] = (nan, inf, -inf)[(k + first) % 3]
        expected = tail_oracle.run(tail_oracle.by_reference, case, inputs)
        with using_strategy(case, STRATEGIES[k % 3]):
            found = run(case, inputs)
        for name, t in expected.items():
            for pattern in (torch.isnan, torch.isposinf, torch.isneginf):
                assert torch.equal(pattern(found[name]), pattern(t)), f"{case}: {pattern.__name__} in {name}"


@pytest.mark.core
@pytest.mark.parametrize("layout", DENSE)
def test_the_mask_of_the_relu(backend_name, layout):
    """Zeros are stopped, NaN passes, and padding bits are zero."""
    c, m = (13, 21) if layout == "contiguous" else (21, 13)
    residual = torch.zeros(2, c, m)
    residual[0, 1, 2], residual[1, 2, 3], residual[1, 3, 4] = 1.0, nan, -1.0
    x, residual = (on_device(LAYOUTS[layout](t)) for t in (torch.zeros(2, c, m), residual))
    mean, var, w1, w2 = (torch.zeros(shape, device=DEVICE) for shape in ((c,), (c,), (2, c), (c, 2)))
    operator, _ = operators(backend_name)
    for weights, given in itertools.product(((w1, None, w2, None), (None,) * 4), ((mean, var), (None, None))):
        norm = "batch" if given[0] is None else "given"
        options = text_of((norm, "relu", "sigmoid", "avg", "relu", "", ""))
        *_, mask = operator(x, None, None, *given, *weights, residual, None, 1e-5, options, True)
        assert mask.sum() == (2**2 + 2**3 if layout == "contiguous" else 2**1 + 2**2)
        assert (mask != 0).sum() == 2


# ---------------------------------------------------------------------------------------------------- what is returned


@pytest.mark.parametrize("training", MODES)
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_inference_gives_the_bits_of_training(run, backend_name, using_strategy, strategy, training):
    """Without gradients nothing is kept for a backward, in either mode of BatchNorm."""
    turn = STRATEGIES.index(strategy) + training
    for layout, post_act in zip(("every other sample", "channels_last"), ("relu", None), strict=True):
        case = Tail((3, 20, 5, 7), 6, DTYPES[turn % 3], layout, training, residual=turn % 2 == 0, post_act=post_act)
        case = case.replace(factor=not training, running=not training)
        inputs = draw(case, 0)
        with using_strategy(case, strategy):
            trained = run(case, inputs)
            leaves = {k: on_device(t).detach().requires_grad_(k not in CONSTANT) for k, t in inputs.items()}
            senet_fused.reset_call_counts()
            with torch.no_grad():
                y = fused(case, leaves, backend_name)
        assert senet_fused.call_counts() == {f"{backend_name}.tail_forward": 1}
        assert not y.requires_grad and torch.equal(y.cpu(), trained["y"])


def gradients_of(names: str, backend: str, case: Tail, inputs: Tensors) -> Tensors:
    """Where those of the named tensors are asked for, and no other."""
    leaves = {k: on_device(t).detach().requires_grad_(k in names.split()) for k, t in inputs.items()}
    leaves.update({k: leaves[k].clone() for k in CONSTANT if k in leaves})
    fused(case, leaves, backend).backward(leaves["dy"])
    found = {f"d{k}": leaf.grad.cpu() for k, leaf in leaves.items() if leaf.grad is not None}
    assert sorted(found) == sorted(f"d{name}" for name in names.split())
    return found


@pytest.mark.parametrize("training", MODES)
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_only_wanted_gradients_are_computed_with_the_same_bits(run, backend_name, using_strategy, strategy, training):
    turn = STRATEGIES.index(strategy) + training
    case = Tail((3, 20, 5, 7), 6, layout=DENSE[turn % 2], training=training, residual=True, factor=True)
    case = case.replace(post_act="relu" if training else None)
    wanted = ("x", "residual", "w2 x", "weight b1 residual") if training else ("x", "weight", "b1 residual")
    inputs = draw(case, 0)
    with using_strategy(case, strategy):
        full = run(case, inputs)
        for names in wanted:
            found = gradients_of(names, backend_name, case, inputs)
            assert_same_bits(found, {k: full[k] for k in found}, (case, names))


@pytest.mark.parametrize("training", MODES)
@pytest.mark.parametrize("post_act", [None, "relu"])
def test_wanted_gradients_without_a_gate(run, backend_name, post_act, training):
    """As above, where there is less between the sweeps, or nothing to sweep for."""
    case = Tail((3, 20, 5, 7), 0, layout=DENSE[training], training=training, residual=True, post_act=post_act)
    inputs = draw(case, 0)
    full = run(case, inputs)
    for names in ("x", "weight bias", "residual", "x residual"):
        found = gradients_of(names, backend_name, case, inputs)
        assert_same_bits(found, {k: full[k] for k in found}, (case, names))


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("layout", DENSE)
def test_fresh_memory_has_no_say(backend_name, using_strategy, monkeypatch, layout, strategy):
    """Outputs come out the same from NaN as from zeros: those kept for the backward and the mask's last byte, too."""
    turn = DENSE.index(layout) + STRATEGIES.index(strategy)
    shape = ((3, 20, 5, 7), (3, 9, 1, 1), (2, 33, 3, 3))[turn % 3]
    case = Tail(shape, 5, DTYPES[turn % 3], layout, turn % 2 == 0, **EVERYTHING)
    t = {name: on_device(v) for name, v in draw(case, 0).items()}
    runs = []
    with using_strategy(case, strategy):
        for number, byte in ((nan, 255), (0.0, 0)):
            fill_outputs(monkeypatch, number, byte)
            runs.append(operator_outputs(backend_name, case, t))
            monkeypatch.undo()
    for poisoned, clean in zip(*runs, strict=True):
        assert torch.equal(poisoned, clean)
        assert not poisoned.is_floating_point() or poisoned.isfinite().all()


# ---------------------------------------------------------------------------------------------------- large tensors


@pytest.mark.sizes
@pytest.mark.skipif(DEVICE == "cuda", reason="it reaches through 4 GiB that only the CPU maps without using them")
@pytest.mark.parametrize("training", MODES)
@pytest.mark.parametrize("layout", DENSE)
def test_samples_that_lie_more_than_32_bits_apart(run, layout, training):
    """Two samples of a batch whose stride is 2^31 elements and more: offsets have 64 bits."""
    stride = 2**31 + 64
    inner = (6, 1) if layout == "contiguous" else (1, 16)

    def apart(values: torch.Tensor) -> torch.Tensor:
        storage = torch.empty(0, dtype=bf16).set_(torch.UntypedStorage(2 * (stride + values.numel())))
        return storage.as_strided(values.shape, (stride, *inner)).copy_(values)

    case = Tail((2, 16, 6), 4, bf16, layout, training, residual=True, post_act="relu")
    inputs = draw(case, 0)
    near = run(case, inputs)
    far = run(case, {k: apart(t) if k in ("x", "residual", "dy") else t for k, t in inputs.items()})
    assert_same_bits(far, near, case)
