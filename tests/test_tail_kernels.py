"""Block tails: the C++ kernels against float64, over options, shapes, layouts, dtypes, odd values, threads and CPUs.

All fresh memory is NaN here, so that whatever a kernel fails to write shows up as wrong.
"""

from __future__ import annotations

import itertools
import math

import pytest
import tail_oracle
import torch
from oracle import ACTS, DTYPES, GATES, LAYOUTS, Tensors
from tail_oracle import (
    CHANGES,
    EVERYTHING,
    MIXED,
    PLAIN,
    Tail,
    assert_same_bits,
    check,
    draw,
    exact_results,
    far_first_pixels,
    far_from_zero,
    fill_outputs,
    fused,
    layer,
    operator_outputs,
    run,
    run_counted,
    variance_error,
)
from test_determinism import BUILT, missing, run_with

import senet_fused
from senet_fused import machine
from senet_fused.backends import native

pytestmark = [
    pytest.mark.skipif(native.problem() is not None, reason=str(native.problem())),
    pytest.mark.usefixtures("poisoned"),
]
inf, nan = math.inf, math.nan
f32, bf16, f16, f64 = DTYPES
DENSE = ("contiguous", "channels_last")
VENUES = list(itertools.product(DTYPES, DENSE, (True, False)))


def test_the_reference_passes_too():
    """So that a failure below is the kernels'."""
    for dtype, layout, training in VENUES:
        case = Tail((6, 40, 5, 7), 20, dtype, layout, training, **EVERYTHING)
        check(case, ours=lambda c, t: run(tail_oracle.by_reference, c, t))


# ---------------------------------------------------------------------------------------------------- options

OPTION_SHAPES = (((6, 40, 5, 7), 20), ((5, 56, 7, 7), 21), ((7, 33, 4, 4), 19), ((8, 41, 3, 13), 0))
PARTS = list(itertools.product((None, "relu"), (False, True), (False, True), (False, True)))


@pytest.mark.parametrize(("dtype", "layout", "training"), VENUES, ids=str)
def test_options(dtype, layout, training):
    """post_act, residual, factor and BatchNorm's weights in all combinations, with a gate and without."""
    for k, (post_act, residual, factor, affine) in enumerate(PARTS):
        for shape, reduced in (OPTION_SHAPES[k % 3], OPTION_SHAPES[3]):
            case = Tail(shape, reduced, dtype, layout, training, ACTS[k % len(ACTS)], GATES[k % len(GATES)], affine)
            case = case.replace(bias=k % 3 != 0, residual=residual, post_act=post_act, factor=factor)
            check(case.replace(running=k % 5 != 0), draws=3)


@pytest.mark.parametrize("act", ACTS)
def test_activations_and_gates(act):
    for k, gate in enumerate(GATES):
        dtype, layout, training = VENUES[(ACTS.index(act) + 3 * k) % len(VENUES)]
        check(Tail((7, 33, 4, 4), 19, dtype, layout, training, act, gate, residual=True, post_act="relu"), draws=2)


def test_eps_and_momentum():
    for eps, momentum, training in itertools.product((1e-5, 1e-3, 0.5), (0.0, 0.3, 1.0), (True, False)):
        check(Tail((4, 10, 5, 5), 3, eps=eps, momentum=momentum, training=training))


# ---------------------------------------------------------------------------------------------------- shapes

SHAPES = [
    ((3, 24, 7, 7), 1),
    ((5, 13, 11, 13), 1),
    ((4, 96, 1, 1), 24),
    ((6, 8, 1, 7), 3),
    ((3, 1, 5, 5), 2),
    ((1, 50, 8, 8), 12),
    ((1, 24, 33, 33), 6),
    ((17, 7, 2, 2), 2),
    ((2, 33, 8, 128), 17),
    ((2, 24, 50), 6),
    ((9, 31, 1), 8),
    ((3, 16, 1025), 4),
    ((2, 12, 3, 5, 7), 3),
    ((2, 1232, 3, 3), 308),
    ((2, 256, 20, 20), 16),
]


@pytest.mark.parametrize(("shape", "reduced"), SHAPES, ids=str)
def test_shapes(shape, reduced):
    draws = max(1, min(4, 20_000 // math.prod(shape)))
    for k, (dtype, layout, training) in enumerate(VENUES):
        options = EVERYTHING if k // 2 % 2 else PLAIN
        check(Tail(shape, reduced, dtype, layout, training, **options), draws)
        if k % 3 == 0:
            check(Tail(shape, 0, dtype, layout, training, residual=not options, post_act="relu"), draws)


@pytest.mark.parametrize("size", [2, 3, 15, 16, 17, 31, 32, 33, 47, 63, 64, 65, 1023, 1024, 1025, 1056, 2049])
def test_ends_of_vectors_and_blocks(size):
    """Rows around multiples of the vector groups and summation blocks: planes, pixels, and channels of a pixel."""
    for k, (shape, layout) in enumerate(
        [((2, 3, size), "contiguous"), ((2, 3, size), "channels_last"), ((2, size, 3), "channels_last")]
    ):
        for dtype in (DTYPES[(size + k) % 4], f32):
            check(Tail(shape, 2, dtype, layout, residual=True, post_act="relu"), draws=3)


@pytest.mark.parametrize("layout", DENSE)
@pytest.mark.parametrize("positions", [5_000, 2**16 + 5])
def test_long_sums_lose_no_digits(positions, layout):
    """Planes of one sign: errors must not grow with the number of blocks."""

    def positive(t: Tensors) -> None:
        t["x"].abs_()

    check(Tail((2, 5, positions), 3, layout=layout, act="silu"), draws=2, change=positive)


@pytest.mark.sizes
def test_outputs_beyond_the_caches():
    """Large outputs are written past the caches: the same bits. x is one sample many times: only outputs are large."""
    for layout, dtype in zip(DENSE, (f32, bf16), strict=True):
        case = Tail((2, 64, 32, 32), 16, dtype, layout, False, residual=True, post_act="relu")
        alone = {k: t[:1] if t.dim() == 4 else t for k, t in draw(case, 0).items()}
        many = 1 + machine.last_level_cache_bytes() // (4 * alone["x"].numel() * alone["x"].element_size())
        batch = {k: t.expand(many, *t.shape[1:]) if t.dim() == 4 else t for k, t in alone.items()}
        one, all_of_them = run_counted(case, alone), run_counted(case, batch)
        for name in ("y", "dx", "dresidual"):
            assert (all_of_them[name] == one[name]).all(), name


# ---------------------------------------------------------------------------------------------------- layouts

RANKS = ((4, 20, 30), (4, 20, 5, 6), (3, 20, 2, 3, 4))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(layout):
    for k, (shape, training) in enumerate(itertools.product(RANKS, (True, False))):
        for options in (PLAIN, EVERYTHING):
            check(Tail(shape, 6, (f32, bf16, f64, f16)[k % 4], layout, training, **options), draws=2)


@pytest.mark.parametrize("other", LAYOUTS)
def test_dy_and_residual_in_another_layout(other):
    for layout, (dtype, post_act) in itertools.product((*DENSE, "reversed"), ((f32, None), (bf16, "relu"))):
        case = Tail((4, 20, 5, 6), 6, dtype, layout, residual=True, post_act=post_act)
        check(case.replace(dy_layout=other), draws=2)
        check(case.replace(residual_layout=other), draws=2)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_y_is_laid_out_as_x(layout):
    for shape, grad in itertools.product(RANKS, (True, False)):
        case = Tail(shape, 6, layout=layout, residual=True, post_act="relu")
        t = {k: v.requires_grad_(grad and k == "x") for k, v in draw(case, 0).items()}
        assert fused(case, t).stride() == (t["x"] * 2).stride()


def test_weights_in_any_form():
    """Convolution weights, strided weights and vectors: the same bits, gradients in their shape."""
    case = Tail((3, 24, 5, 5), 6, **EVERYTHING)
    inputs = draw(case, 0)
    inputs["b1"] = inputs["b1"][:1].expand(6)
    plain = run_counted(case, {k: t.contiguous() for k, t in inputs.items()})
    for form in (
        lambda w: w.t().contiguous().t(),
        lambda w: torch.cat((w, w), 1)[:, : w.shape[1]],
        lambda w: w[:, :, None, None],
        lambda w: w[:, :, None, None].to(memory_format=torch.channels_last),
    ):
        names = ("weight", "bias", "running_mean", "running_var", "factor")
        changed = {**inputs, **{k: form(inputs[k]) for k in ("w1", "w2")}}
        changed.update({k: torch.stack((inputs[k], inputs[k]), 1)[:, 0] for k in names})
        results = run_counted(case, changed)
        for name, t in results.items():
            assert t.shape == changed[name.removeprefix("d")].shape if name.startswith("d") else True
            assert torch.equal(t.reshape(plain[name].shape), plain[name]), name


# ---------------------------------------------------------------------------------------------------- dtypes


@pytest.mark.parametrize(("dtype", "others"), MIXED, ids=[f"{x}-{i}" for i, (x, _) in enumerate(MIXED)])
def test_mixed_dtypes(dtype, others):
    for layout, training, post_act in itertools.product(DENSE, (True, False), (None, "relu")):
        case = Tail((6, 40, 5, 7), 20, dtype, layout, training, post_act=post_act, factor=True)
        check(case.replace(residual="residual" in others, others=tuple(others.items())), draws=2)


# ------------------------------------------------------------------------------------------- moments that cancel


@pytest.mark.parametrize("layout", DENSE)
@pytest.mark.parametrize("change", CHANGES)
def test_moments_that_cancel(change, layout):
    """Variances, y and gradients of channels whose mean is large beside their deviation, and of odd ones."""
    for shape in ((4, 13, 7, 7), (3, 12, 40, 40), (2, 200, 9, 9)):
        for reduced, options in ((4, PLAIN), (4, {**EVERYTHING, "momentum": 1.0}), (0, {"affine": False})):
            check(Tail(shape, reduced, layout=layout, **options), 2, run_counted, CHANGES[change])


@pytest.mark.parametrize("layout", DENSE)
def test_the_variance_of_each_channel_is_right(layout):
    """Not only of the largest, which the rule above asks for; and the naive formula would not pass."""
    changes, shapes = ((far_from_zero, 1e-6), (far_first_pixels, 1e-5)), [(4, 13, 7, 7), (3, 12, 40, 40)]
    for (change, tolerance), shape in itertools.product(changes, shapes):
        case = Tail(shape, layout=layout, affine=False, momentum=1.0)
        t = draw(case, 0, change)
        ours = run_counted(case, t)["running_var"]
        assert variance_error(t, ours) < tolerance
        wide = case.replace(dtype=f64)
        t64 = draw(wide, 0, change)
        assert variance_error(t64, run_counted(wide, t64)["running_var"]) < 1e-10
        x = t["x"].transpose(0, 1).flatten(1)
        naive = x.square().mean(1) - x.mean(1).square()
        assert variance_error(t, naive) > 1e-3


@pytest.mark.parametrize("layout", DENSE)
def test_the_rule_catches_the_naive_variance(layout):
    """A planted bug: statistics by E[x^2] - mean^2 in float32 fail test_moments_that_cancel, and only with its x."""

    def naive(case: Tail, t: Tensors) -> torch.Tensor:
        sums = (0, *range(2, t["x"].dim()))
        mean = t["x"].mean(sums)
        var = (t["x"].square().mean(sums) - mean.square()).clamp(min=0)
        count = t["x"].numel() / mean.numel()
        y = fused(case.replace(training=False), {**t, "running_mean": mean, "running_var": var})
        for running, now in (("running_mean", mean), ("running_var", var * count / (count - 1))):
            t[running].lerp_(now.detach(), case.momentum)
        return y

    def forward(case: Tail, t: Tensors) -> Tensors:
        return {k: v for k, v in run(naive, case, t).items() if k in ("y", "running_mean", "running_var")}

    for change in (None, far_from_zero):
        case = Tail((4, 13, 7, 7), layout=layout)
        inputs = draw(case, 0, change)
        exact = exact_results(case, inputs)
        found, stock = forward(case, inputs), run(layer, case, inputs)
        errors = [
            ((a["running_var"] - exact["running_var"]).abs().max() / exact["running_var"].abs().max()).item()
            for a in (found, stock)
        ]
        assert (errors[0] > 100 * errors[1] + 1e-4) == (change is far_from_zero), errors


# ---------------------------------------------------------------------------------------------------- what is returned


@pytest.mark.parametrize("layout", [*DENSE, "reversed", "every other sample", "misaligned channels_last"])
def test_inference_gives_the_bits_of_training(layout):
    """Without gradients nothing is kept for a backward, in either mode of BatchNorm."""
    for dtype, training, (post_act, residual, factor, affine) in itertools.product(DTYPES, (True, False), PARTS[::3]):
        case = Tail((3, 20, 5, 7), 6, dtype, layout, training, affine=affine, residual=residual, post_act=post_act)
        case = case.replace(factor=factor, running=not training)
        inputs = draw(case, 0)
        trained = run_counted(case, inputs)
        senet_fused.reset_call_counts()
        plain = fused(case, inputs)
        with torch.no_grad():
            no_grad = fused(case, {k: t.clone().requires_grad_(k != "factor") for k, t in inputs.items()})
        with torch.inference_mode():
            inference = fused(case, inputs)
        assert senet_fused.call_counts() == {"cpu.tail_forward": 3}
        for y in (plain, no_grad, inference):
            assert not y.requires_grad and y.stride() == trained["y"].stride() and torch.equal(y, trained["y"])


def test_only_wanted_gradients_are_computed_with_the_same_bits():
    parameters = ("weight", "bias", "w1", "b1", "w2", "b2")
    wanted = [("x",), ("residual",), *((name,) for name in parameters), ("x", "w2"), ("weight", "b1", "residual")]
    for post_act, layout, training in itertools.product((None, "relu"), DENSE, (True, False)):
        case = Tail((3, 20, 5, 7), 6, layout=layout, training=training, post_act=post_act, residual=True)
        inputs = draw(case, 0)
        full = run_counted(case, inputs)
        for names in wanted:
            leaves = {k: t.detach().clone().requires_grad_(k in names) for k, t in inputs.items()}
            fused(case, leaves).backward(inputs["dy"])
            for name, leaf in leaves.items():
                assert (leaf.grad is not None) == (name in names)
                assert leaf.grad is None or torch.equal(leaf.grad, full[f"d{name}"]), (case, names, name)


def test_fresh_memory_has_no_say(monkeypatch):
    """Outputs come out the same from NaN as from zeros: those kept for the backward and the mask's last byte, too."""
    shapes = [(3, 20, 5, 7), (2, 16, 16), (3, 9, 1, 1)]
    for dtype, layout, shape, training in itertools.product(DTYPES, DENSE, shapes, (True, False)):
        case = Tail(shape, 5, dtype, layout, training, **EVERYTHING)
        t = draw(case, 0)
        runs = []
        for number, byte in ((nan, 255), (0.0, 0)):
            fill_outputs(monkeypatch, number, byte)
            runs.append(operator_outputs("cpu", case, t))
            monkeypatch.undo()
        for poisoned, clean in zip(*runs, strict=True):
            assert torch.equal(poisoned, clean)
            assert not poisoned.is_floating_point() or poisoned.isfinite().all()


@pytest.mark.parametrize("layout", DENSE)
def test_empty_batch(layout):
    """Of evaluation; training needs two values."""
    for dtype, options in itertools.product(DTYPES, (PLAIN, EVERYTHING)):
        case = Tail((0, 24, 7, 7), 6, dtype, layout, False, **options)
        results = run_counted(case, draw(case, 0))
        assert results["y"].shape == results["dx"].shape == (0, 24, 7, 7)
        for name in ("weight", "bias", "w1", "b1", "w2", "b2"):
            assert not results[f"d{name}"].any(), name


@pytest.mark.parametrize("place", ["x", "weight", "bias", "running_mean", "w1", "b1", "w2", "b2", "residual", "dy"])
@pytest.mark.parametrize("odd", [nan, inf, -inf], ids=str)
def test_nan_and_inf_go_where_the_reference_has_them(odd, place):
    for k, (post_act, layout, training) in enumerate(itertools.product((None, "relu"), DENSE, (True, False))):
        case = Tail((3, 18, 5, 4), 5, (f32, bf16)[k // 2 % 2], layout, training, post_act=post_act, residual=True)
        inputs = draw(case, 0)
        inputs[place][(-1,) * inputs[place].dim() if k % 2 else (0,) * inputs[place].dim()] = odd
        found, expected = run_counted(case, inputs), run(tail_oracle.by_reference, case, inputs)
        for name, t in expected.items():
            for pattern in (torch.isnan, torch.isposinf, torch.isneginf):
                assert torch.equal(pattern(found[name]), pattern(t)), f"{case}: {pattern} in {name}"


# ---------------------------------------------------------------------------------------------------- threads

# Too small for two threads, a batch, fewer samples than threads, pixels in a row, many channels.
PROBLEMS = [
    ((2, 24, 3, 3), 6), ((8, 72, 14, 14), 18), ((1, 104, 14, 14), 26), ((2, 136, 203), 17), ((2, 1024, 4, 5), 64),
]  # fmt: skip


@pytest.mark.parametrize(("shape", "reduced"), PROBLEMS, ids=str)
def test_bits_do_not_depend_on_run_or_threads(shape, reduced):
    for k, (dtype, layout, training) in enumerate(VENUES):
        if (k + k // 2 + PROBLEMS.index((shape, reduced))) % 2:
            continue
        case = Tail(shape, reduced if k % 3 else 0, dtype, layout, training, **(EVERYTHING if k % 2 else PLAIN))
        inputs = draw(case, 0)
        torch.set_num_threads(1)
        first = run_counted(case, inputs)
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            assert_same_bits(run_counted(case, inputs), first, (case, threads))


def test_a_sample_alone_gives_the_bits_it_has_in_a_batch():
    """With statistics that are given."""
    for dtype, layout in itertools.product(DTYPES, DENSE):
        case = Tail((8, 41, 9, 7), 5, dtype, layout, False, **EVERYTHING)
        inputs = draw(case, 0)
        of_samples = ("x", "residual", "dy", "factor")
        torch.set_num_threads(2)
        batch = run_counted(case, inputs)
        for threads, chosen in ((1, slice(0, 1)), (3, slice(7, 8)), (1, slice(2, 5)), (2, slice(1, 8, 2))):
            torch.set_num_threads(threads)
            part = run_counted(case, {k: t[chosen] if k in of_samples else t for k, t in inputs.items()})
            assert_same_bits(part, {k: batch[k][chosen] for k in ("y", "dx", "dresidual")}, (case, chosen))


# ---------------------------------------------------------------------------------------------------- instruction sets


def isa_cases() -> list[Tail]:
    """What isa_run.py holds to the oracle with each instruction set."""
    shapes = [((4, 41, 5, 7), 17), ((3, 20, 67), 5), ((2, 48, 4, 8), 0), ((2, 24, 35, 31), 6)]
    return [
        Tail(*shapes[(i + i // 4) % 4], dtype, layout, training, gate=GATES[i % 5], **(PLAIN, EVERYTHING)[i // 2 % 2])
        for i, (dtype, layout, training) in enumerate(VENUES)
    ]


@pytest.mark.processes
@pytest.mark.parametrize("isa", BUILT)
def test_every_instruction_set(isa):
    """In a process of its own, held to the oracle."""
    if missing(isa):
        pytest.skip(f"this CPU lacks {missing(isa)}")
    done = run_with(isa, "tails")
    assert done.returncode == 0, done.stderr[-3000:]
    assert int(done.stdout) == len(isa_cases()) > 10
