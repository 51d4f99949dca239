"""An activation between BatchNorm and the gate: the C++ kernels against float64, over functions, options, shapes,
layouts, dtypes and threads; the reference's equations; the routes that have no kernels for it.

All fresh memory is NaN here, so that whatever a kernel fails to write shows up as wrong.
"""

from __future__ import annotations

import itertools
import math

import pytest
import tail_oracle
import torch
from oracle import ACTS, DTYPES, GATES, LAYOUTS, Tensors
from tail_oracle import EVERYTHING, PLAIN, Tail, assert_same_bits, check, draw, fill_outputs, fused, run, run_counted
from torch import nn
from torch.nn import functional as F

import senet_fused
from senet_fused import block_tail
from senet_fused.backends import native

pytestmark = [
    pytest.mark.skipif(native.problem() is not None, reason=str(native.problem())),
    pytest.mark.usefixtures("poisoned"),
]
f32, bf16, f16, f64 = DTYPES
DENSE = ("contiguous", "channels_last")
VENUES = list(itertools.product(DTYPES, DENSE, (True, False)))
USUAL = ("silu", "hardswish", "relu", "gelu", "mish")
PARTS = list(itertools.product((None, "relu"), (False, True), (False, True), (False, True)))


@pytest.mark.parametrize(("dtype", "layout", "training"), VENUES, ids=str)
def test_options(dtype, layout, training):
    """post_act, residual, factor and BatchNorm's weights in all combinations, with a gate and without."""
    for k, (post_act, residual, factor, affine) in enumerate(PARTS):
        for shape, reduced in ((((6, 40, 5, 7), 20), ((5, 56, 7, 7), 21))[k % 2], ((8, 41, 3, 13), 0)):
            case = Tail(shape, reduced, dtype, layout, training, ACTS[k % len(ACTS)], GATES[k % len(GATES)], affine)
            case = case.replace(bias=k % 3 != 0, residual=residual, post_act=post_act, factor=factor)
            check(case.replace(running=k % 5 != 0, pre_act=USUAL[k % len(USUAL)]), draws=2)


@pytest.mark.parametrize("pre_act", ACTS)
def test_every_function(pre_act):
    for k, (dtype, layout, training) in enumerate(VENUES):
        options = (EVERYTHING, PLAIN)[k % 2]
        check(Tail((6, 33, 4, 5), 19, dtype, layout, training, pre_act=pre_act, **options), draws=2)
        if k % 3 == 0:
            check(Tail((6, 33, 4, 5), 0, dtype, layout, training, pre_act=pre_act, residual=k % 2 == 0), draws=2)


SHAPES = [
    ((3, 24, 7, 7), 1), ((5, 13, 11, 13), 4), ((4, 96, 1, 1), 24), ((3, 1, 5, 5), 2), ((1, 24, 33, 33), 6),
    ((2, 33, 8, 128), 17), ((2, 24, 50), 6), ((9, 31, 1), 8), ((3, 16, 2100), 4), ((2, 12, 3, 5, 7), 3),
    ((2, 1232, 3, 3), 308), ((2, 2080, 4), 20), ((2, 7, 4097), 3),
]  # fmt: skip


@pytest.mark.parametrize(("shape", "reduced"), SHAPES, ids=str)
def test_shapes(shape, reduced):
    """Planes and pixels shorter and longer than a tile of 2,048 elements, 32 pixels and 64 channels."""
    for k, (dtype, layout, training) in enumerate(VENUES):
        check(Tail(shape, reduced, dtype, layout, training, pre_act=USUAL[k % 5], **(EVERYTHING, PLAIN)[k // 2 % 2]), 1)
        if k % 3 == 0:
            check(Tail(shape, 0, dtype, layout, training, residual=k % 2 == 0, pre_act="silu"), 1)


@pytest.mark.parametrize("size", [2, 15, 16, 17, 31, 32, 33, 63, 64, 65, 128, 2047, 2048, 2049])
def test_ends_of_vectors_and_tiles(size):
    for k, (shape, layout) in enumerate(
        [((2, 3, size), "contiguous"), ((2, 3, size), "channels_last"), ((2, size, 3), "channels_last")]
    ):
        for dtype in (DTYPES[(size + k) % 4], f32):
            check(Tail(shape, 2, dtype, layout, residual=True, post_act="relu", pre_act="silu"), draws=2)


@pytest.mark.parametrize("layout", DENSE)
def test_long_sums_lose_no_digits(layout):
    check(Tail((2, 5, 2**16 + 5), 3, layout=layout, pre_act="sigmoid"), draws=1)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(layout):
    for k, (shape, training) in enumerate(
        itertools.product(((4, 20, 30), (4, 20, 5, 6), (3, 20, 2, 3, 4)), (True, False))
    ):
        case = Tail(shape, 6, (f32, bf16, f64, f16)[k % 4], layout, training, pre_act="silu", **EVERYTHING)
        check(case, draws=1)
        t = draw(case, 0)
        assert fused(case, t).stride() == (t["x"] * 2).stride()


def test_the_reference_and_its_backward():
    """By autograd and as (P3) to (P6) are written."""
    for pre_act, training, layout in itertools.product(USUAL, (True, False), DENSE):
        for reduced in (5, 0):
            case = Tail((3, 12, 4, 5), reduced, f64, layout, training, pre_act=pre_act, **EVERYTHING)
            check(case, 1, lambda c, t: run(tail_oracle.by_reference, c, t))
            t = draw(case, 0)
            by_autograd = run(tail_oracle.by_reference, case, t)
            for name, gradient in tail_oracle.explicit(case, t)._asdict().items():
                if name in by_autograd:
                    torch.testing.assert_close(gradient, by_autograd[name], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("layout", DENSE)
def test_inference_gives_the_bits_of_training(layout):
    for dtype, training, reduced in itertools.product(DTYPES, (True, False), (6, 0)):
        case = Tail(
            (3, 20, 5, 7), reduced, dtype, layout, training, pre_act="silu", residual=True, running=not training
        )
        inputs = draw(case, 0)
        trained = run_counted(case, inputs)
        senet_fused.reset_call_counts()
        with torch.inference_mode():
            y = fused(case, inputs)
        assert senet_fused.call_counts() == {"cpu.tail_forward": 1}
        assert torch.equal(y, trained["y"]) and y.stride() == trained["y"].stride()


def test_fresh_memory_has_no_say(monkeypatch):
    for dtype, layout, training, reduced in itertools.product((f32, bf16), DENSE, (True, False), (5, 0)):
        case = Tail((3, 20, 5, 7), reduced, dtype, layout, training, pre_act="silu", **EVERYTHING)
        t = draw(case, 0)
        runs = []
        for number, byte in ((math.nan, 255), (0.0, 0)):
            fill_outputs(monkeypatch, number, byte)
            runs.append(tail_oracle.operator_outputs("cpu", case, t))
            monkeypatch.undo()
        for poisoned, clean in zip(*runs, strict=True):
            assert torch.equal(poisoned, clean)
            assert not poisoned.is_floating_point() or poisoned.isfinite().all()


PROBLEMS = [((2, 24, 3, 3), 6), ((8, 72, 14, 14), 18), ((1, 104, 14, 14), 26), ((2, 136, 203), 17), ((5, 96, 9, 9), 0)]


@pytest.mark.parametrize(("shape", "reduced"), PROBLEMS, ids=str)
def test_bits_do_not_depend_on_run_or_threads(shape, reduced):
    for k, (dtype, layout, training) in enumerate(VENUES):
        case = Tail(shape, reduced, dtype, layout, training, pre_act="silu", **(EVERYTHING if k % 3 else PLAIN))
        inputs = draw(case, 0)
        torch.set_num_threads(1)
        first = run_counted(case, inputs)
        for threads in (2, 3):
            torch.set_num_threads(threads)
            assert_same_bits(run_counted(case, inputs), first, (case, threads))


def test_a_sample_alone_gives_the_bits_it_has_in_a_batch():
    """With statistics that are given."""
    for dtype, layout in itertools.product(DTYPES, DENSE):
        case = Tail((8, 41, 9, 7), 5, dtype, layout, False, pre_act="hardswish", **EVERYTHING)
        inputs = draw(case, 0)
        torch.set_num_threads(2)
        batch = run_counted(case, inputs)
        for threads, chosen in ((1, slice(0, 1)), (3, slice(7, 8)), (1, slice(2, 5))):
            torch.set_num_threads(threads)
            samples = ("x", "residual", "dy", "factor")
            part = run_counted(case, {k: t[chosen] if k in samples else t for k, t in inputs.items()})
            assert_same_bits(part, {k: batch[k][chosen] for k in ("y", "dx", "dresidual")}, (case, chosen))


@pytest.mark.parametrize("place", ["x", "weight", "bias", "running_mean", "w1", "residual", "dy"])
@pytest.mark.parametrize("odd", [math.nan, math.inf, -math.inf], ids=str)
def test_nan_and_inf_go_where_the_reference_has_them(odd, place):
    for layout, pre_act in itertools.product(DENSE, ("silu", "relu", "hardswish")):
        case = Tail((3, 18, 5, 4), 5, f32, layout, False, residual=True, pre_act=pre_act)
        inputs = draw(case, 0)
        inputs[place][(-1,) * inputs[place].dim()] = odd
        found, expected = run_counted(case, inputs), run(tail_oracle.by_reference, case, inputs)
        assert torch.equal(found["y"].isnan(), expected["y"].isnan()), case


# ---------------------------------------------------------------------------------------------------- the function


def good(**changes: object) -> dict[str, object]:
    torch.manual_seed(0)
    c, r = 8, 2
    given = {
        "x": torch.randn(2, c, 3, 4), "running_mean": torch.zeros(c), "running_var": torch.ones(c),
        "weight": torch.ones(c), "bias": torch.zeros(c), "w1": torch.randn(r, c), "w2": torch.randn(c, r),
        "training": True,
    }  # fmt: skip
    return {**given, **changes}


@pytest.mark.parametrize("pre_act", ["silu", nn.SiLU, nn.SiLU(), F.silu.__name__, senet_fused.Activation("silu")])
def test_an_activation_in_any_form(pre_act):
    assert torch.equal(block_tail(**good(pre_act=pre_act)), block_tail(**good(pre_act="silu")))


def test_the_identity_is_none():
    assert torch.equal(block_tail(**good(pre_act="identity")), block_tail(**good()))


def test_a_gate_function_is_no_activation():
    with pytest.raises(ValueError, match="pre_act must be one of identity, relu.*, or None, got hardsigmoid"):
        block_tail(**good(pre_act="hardsigmoid"))


@pytest.mark.parametrize("backend", ["triton", "cuda"])
def test_backends_without_kernels_for_it(backend, monkeypatch):
    """Asked for by name they refuse; "auto" passes them over, and says so."""
    from senet_fused import backends, select

    monkeypatch.setattr(backends.cuda, "problem", lambda *_: None)
    monkeypatch.setattr(backends.triton, "problem", lambda *_: None)
    assert select.choose(backend, "cuda", f32).backend == backend
    with pytest.raises(senet_fused.BackendUnavailableError, match=f"'{backend}'.*no kernels for an activation between"):
        select.choose(backend, "cuda", f32, pre_act=True)
    chosen = select.choose(None, "cuda", f32, pre_act=True)
    assert chosen.backend == "reference" and "no kernels for an activation between" in chosen.reason
    with pytest.raises(senet_fused.BackendUnavailableError):
        block_tail(**good(pre_act="silu", backend=backend))


def test_compiles_in_one_graph_with_the_operator_in_it():
    given = good(pre_act="silu", backend="cpu")
    x = given.pop("x").requires_grad_()
    compiled = torch.compile(lambda x: block_tail(x, **given), fullgraph=True, backend="aot_eager")
    senet_fused.reset_call_counts()
    y = compiled(x)
    y.sum().backward()
    assert senet_fused.call_counts() == {"cpu.tail_forward": 1, "cpu.tail_backward": 1}
    dx, x.grad = x.grad, None
    eager = block_tail(x, **given)
    eager.sum().backward()
    assert torch.equal(y, eager) and torch.equal(dx, x.grad)


def test_autocast_changes_nothing():
    given = good(pre_act="silu")
    with torch.autocast("cpu", torch.bfloat16):
        y = block_tail(**given)
    assert y.dtype == torch.float32 and torch.equal(y, block_tail(**good(pre_act="silu")))


def tail_of_vmap(x: torch.Tensor, given: Tensors) -> torch.Tensor:
    return block_tail(x, **given)


def test_functional_transforms_take_the_reference():
    given = good(pre_act="silu", training=False)
    x = given.pop("x")
    grad = torch.func.grad(lambda x: tail_of_vmap(x, given).square().sum())(x)
    leaf = x.clone().requires_grad_()
    block_tail(leaf, **given).square().sum().backward()
    torch.testing.assert_close(grad, leaf.grad)


@pytest.mark.parametrize("backend", ["triton", "cuda"])
def test_the_operators_of_backends_without_kernels_for_it_refuse(backend):
    case = Tail((2, 8, 3, 4), 2, pre_act="silu")
    forward, _ = tail_oracle.operators(backend)
    with pytest.raises(NotImplementedError, match="has no kernels for an activation behind the norm"):
        forward(*tail_oracle.forward_arguments(case, draw(case, 0)))
