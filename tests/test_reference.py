"""senet_fused.reference against autograd through stock PyTorch: values, the explicit backward, dtypes, second order."""

from __future__ import annotations

import itertools
import math

import oracle
import pytest
import torch
from oracle import ACTS, DTYPES, GATES, LAYOUTS, SQUEEZES, Case, check, draw, exact_results, layer, run

import senet_fused
from senet_fused import reference
from senet_fused.call import Gradients

TAILS = list(itertools.product(SQUEEZES, (None, "relu"), (False, True)))
SHAPES = (((3, 24, 5, 7), 6), ((2, 10, 9), 3), ((2, 7, 2, 3, 2), 1))


def explicit(case: Case, t: oracle.Tensors, **more: object) -> Gradients:
    return reference.squeeze_excite_backward(
        t["dy"], t["x"], t["w1"], t["w2"], t.get("b1"), t.get("b2"), act=case.act, gate=case.gate,
        squeeze=case.squeeze, residual=t.get("residual"), post_act=case.post_act, **more,
    )  # fmt: skip


def present(gradients: Gradients) -> oracle.Tensors:
    return {name: t for name, t in gradients._asdict().items() if t is not None}


def formula(case: Case, t: oracle.Tensors) -> tuple[torch.Tensor, torch.Tensor]:
    return reference.squeeze_excite(
        t["x"], t["w1"], t["w2"], t.get("b1"), t.get("b2"), act=case.act, gate=case.gate, squeeze=case.squeeze,
        residual=t.get("residual"), post_act=case.post_act,
    )  # fmt: skip


def assert_close(found: oracle.Tensors, expected: oracle.Tensors, tolerance: float = 1e-12) -> None:
    for name, t in expected.items():
        torch.testing.assert_close(found[name], t, rtol=tolerance, atol=tolerance, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("act", ACTS)
def test_forward_and_backward_formulas(act, gate):
    """(E1)-(E4) by autograd and (B1)-(B7) as written, both against autograd through stock PyTorch."""
    for k, (squeeze, post_act, residual) in enumerate(TAILS):
        shape, reduced = SHAPES[k % 3]
        case = Case(shape, reduced, torch.float64, "contiguous", act, gate, squeeze, post_act, residual)
        case = case.replace(through="both", bias=k % 4 != 3)
        t = draw(case, 0)
        expected = exact_results(case, t)
        assert_close(run(formula, case, t), expected)
        gradients = explicit(case, t, dgate=t["dgate"])
        assert (gradients.dresidual is None) != residual
        assert (gradients.db1 is None) != case.bias and (gradients.db2 is None) != case.bias
        assert_close(gradients._asdict(), {k: v for k, v in expected.items() if k not in ("y", "gate")})


def test_backward_through_y_alone():
    case = Case((3, 24, 5, 7), 6, torch.float64, residual=True, post_act="relu")
    t = draw(case, 0)
    expected = exact_results(case, t)
    assert_close(explicit(case, t)._asdict(), {k: v for k, v in expected.items() if k not in ("y", "gate")})


def test_the_mask_is_taken_where_given():
    case = Case((3, 24, 5, 7), 6, torch.float64, residual=True, post_act="relu")
    t = draw(case, 0)
    mask = torch.rand(case.shape) > 0.3
    masked = {**t, "dy": t["dy"] * mask}
    plain = explicit(case.replace(post_act=None), masked)
    assert_close(explicit(case, t, mask=mask)._asdict(), present(plain), 0.0)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_dtypes_and_layouts(layout, dtype):
    """No dtype but x's and the residual's in y; float32 sums; the accuracy that the kernels are held to."""
    for options in ({}, {"squeeze": "avgmax", "residual": True, "post_act": "relu", "through": "both"}):
        case = Case((5, 30, 5, 7), 16, dtype, layout, **options)
        check(case, draws=4, ours=lambda c, t: run(formula, c, t))
        t = draw(case, 0)
        y, gate = formula(case, t)
        assert options or y.stride() == (t["x"] * gate.reshape(*case.shape[:2], 1, 1).to(dtype)).stride()


def test_result_dtypes_with_a_residual():
    for x_dtype, residual_dtype in itertools.product(DTYPES, DTYPES):
        x, residual = torch.randn(2, 8, 3, 3).to(x_dtype), torch.randn(2, 8, 3, 3).to(residual_dtype)
        y, gate = reference.squeeze_excite(x, torch.randn(2, 8), torch.randn(8, 2), residual=residual)
        assert y.dtype == torch.result_type(x, residual)
        assert gate.dtype == reference.accumulate_dtype(x)
        assert gate.dtype == (torch.float64 if x_dtype == torch.float64 else torch.float32)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_autocast_changes_nothing(dtype):
    case = Case((3, 24, 5, 7), 6, dtype, residual=True, post_act="relu", through="both")
    t = draw(case, 0)
    expected = run(formula, case, t)

    def under_autocast(case: Case, t: oracle.Tensors) -> tuple[torch.Tensor, torch.Tensor]:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return formula(case, t)

    found = run(under_autocast, case, t)
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor) and found[name].dtype == tensor.dtype
    gradients = explicit(case, t, dgate=t["dgate"])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        same = explicit(case, t, dgate=t["dgate"])
    assert all(torch.equal(a, b) for a, b in zip(present(gradients).values(), present(same).values(), strict=True))


def test_convolution_weights_keep_their_shape():
    case = Case((3, 24, 5, 7), 6, torch.float64)
    t = draw(case, 0)
    four = {**t, "w1": t["w1"][:, :, None, None], "w2": t["w2"][:, :, None, None]}
    expected, found = run(formula, case, t), run(formula, case, four)
    gradients = explicit(case, four)
    for name in ("dw1", "dw2"):
        assert found[name].shape == four[name[1:]].shape == getattr(gradients, name).shape
        assert torch.equal(found[name].flatten(1), expected[name])


def test_ties_share_the_gradient_as_amax_does():
    x = torch.zeros(2, 3, 4, 4, dtype=torch.float64)
    x[0, 0, 1, 1] = x[0, 0, 2, 3] = 5.0
    x[1, 2] = torch.randn(4, 4, dtype=torch.float64).round()
    for squeeze in ("max", "avgmax"):
        case = Case(x.shape, 2, torch.float64, squeeze=squeeze)
        t = {**draw(case, 0), "x": x}
        expected = exact_results(case, t)
        assert_close(run(formula, case, t), expected)
        assert_close(explicit(case, t)._asdict(), {k: v for k, v in expected.items() if k not in ("y", "gate")})


@pytest.mark.parametrize("place", ["x", "w1", "w2", "b1", "residual"])
@pytest.mark.parametrize("odd", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("squeeze", SQUEEZES)
def test_nan_and_inf_as_in_stock(squeeze, odd, place):
    for post_act, gate in itertools.product((None, "relu"), ("sigmoid", "hardsigmoid", "tanh", "relu", "identity")):
        case = Case((2, 6, 3, 5), 3, gate=gate, squeeze=squeeze, post_act=post_act, residual=True)
        t = draw(case, 0)
        t[place].view(-1)[1] = odd
        found, expected = run(formula, case, t), run(layer, case, t)
        for name, tensor in expected.items():
            torch.testing.assert_close(found[name], tensor, equal_nan=True, rtol=1e-4, atol=1e-5)


def test_empty_batch():
    case = Case((0, 8, 3, 3), 2, squeeze="avgmax", residual=True, post_act="relu", through="both")
    t = draw(case, 0)
    results, gradients = run(formula, case, t), explicit(case, t, dgate=t["dgate"])
    for name in oracle.WEIGHTS:
        assert not results[f"d{name}"].any() and not getattr(gradients, f"d{name}").any()
    assert results["y"].shape == gradients.dx.shape == (0, 8, 3, 3)


@pytest.mark.parametrize("squeeze", SQUEEZES)
@pytest.mark.parametrize("post_act", [None, "relu"])
def test_second_order(squeeze, post_act):
    """The backward's own gradients: it is what the compiled backends differentiate twice with."""
    smooth = {"act": "silu", "gate": "sigmoid", "squeeze": squeeze, "post_act": post_act}
    case = Case((2, 4, 2, 3), 3, torch.float64, residual=True, **smooth)
    t = draw(case, 1)
    names = ("x", "w1", "w2", "b1", "b2", "residual")
    tensors = [t[name].requires_grad_() for name in names]

    def forward(*tensors: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return formula(case, dict(zip(names, tensors, strict=True)))

    assert torch.autograd.gradcheck(forward, tensors)
    assert torch.autograd.gradgradcheck(forward, tensors)

    def backward(dy: torch.Tensor, dgate: torch.Tensor, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        given = {"dy": dy, **dict(zip(names, tensors, strict=True))}
        return tuple(present(explicit(case, given, dgate=dgate)).values())

    cotangents = (t["dy"].requires_grad_(), t["dgate"].requires_grad_())
    assert torch.autograd.gradcheck(backward, (*cotangents, *tensors))


def test_meta_tensors():
    """Shapes and dtypes alone."""
    for dtype in DTYPES:
        x = torch.empty(2, 8, 5, 5, dtype=dtype, device="meta")
        y, gate = reference.squeeze_excite(x, x.new_empty(4, 8), x.new_empty(8, 4))
        assert y.is_meta and y.shape == x.shape and y.dtype == dtype and gate.shape == (2, 8)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_backend_reference_is_this(dtype):
    case = Case((3, 24, 5, 7), 6, dtype, residual=True, post_act="relu", through="both")
    t = draw(case, 0)
    expected = run(formula, case, t)
    found = run(lambda c, t: oracle.fused(c, t, "reference"), case, t)
    assert senet_fused.call_counts() == {"reference.forward": 1}
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name
