"""senet_fused.reference against autograd through stock PyTorch: values, statistics, the explicit backward."""

from __future__ import annotations

import functools
import itertools

import pytest
import torch
from oracle import ACTS, DTYPES, GATES, LAYOUTS, Tensors
from tail_oracle import EVERYTHING, Tail, by_reference, check, draw, exact_results, explicit, run
from torch.nn import functional as F

import senet_fused
from senet_fused import block_tail, reference
from senet_fused.call import Gradients

SHAPES = (((3, 24, 5, 7), 6), ((2, 10, 9), 3), ((3, 7, 2, 3, 2), 1), ((5, 8, 1, 1), 0))
PARTS = list(itertools.product((True, False), (None, "relu"), (False, True), (False, True)))
GRADIENTS = Gradients._fields


def assert_close(found: Tensors, expected: Tensors, tolerance: float = 1e-11) -> None:
    for name, t in expected.items():
        torch.testing.assert_close(found[name], t, rtol=tolerance, atol=tolerance, msg=lambda m, n=name: f"{n}: {m}")


def gradients_of(results: Tensors) -> Tensors:
    return {k: t for k, t in results.items() if k in GRADIENTS}


@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("act", ACTS)
def test_forward_and_backward_formulas(act, gate):
    """(T1) to (T3) by autograd and (T4) to (T7) as written, both against stock PyTorch; the running statistics, too."""
    for k, (training, post_act, residual, factor) in enumerate(PARTS):
        shape, reduced = SHAPES[(k + k // 4) % 4]
        case = Tail(shape, reduced, torch.float64, "contiguous", training, act, gate, k % 5 != 4, k % 3 != 2)
        case = case.replace(residual=residual, post_act=post_act, factor=factor, eps=(1e-5, 0.1)[k % 2], momentum=0.3)
        t = draw(case, 0)
        expected = exact_results(case, t)
        senet_fused.reset_call_counts()
        assert_close(run(by_reference, case, t), expected)
        assert senet_fused.call_counts() == {"reference.tail_forward": 1}
        found = explicit(case, t)._asdict()
        assert {name for name, g in found.items() if g is not None} == gradients_of(expected).keys()
        assert_close(found, gradients_of(expected))


def test_the_mask_is_taken_where_given():
    case = Tail((3, 24, 5, 7), 6, torch.float64, **EVERYTHING)
    t = draw(case, 0)
    mask = torch.rand(case.shape) > 0.3
    plain = explicit(case.replace(post_act=None), {**t, "dy": t["dy"] * mask})
    assert_close(explicit(case, t, mask=mask)._asdict(), plain._asdict(), 0.0)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_dtypes_and_layouts(layout):
    """float32 sums, one rounding to the dtype of x: the accuracy that the kernels are held to."""
    for dtype, training in itertools.product(DTYPES, (True, False)):
        for options in ({}, EVERYTHING):
            case = Tail((4, 30, 5, 7), 16, dtype, layout, training, **options)
            check(case, ours=functools.partial(run, by_reference))


def test_statistics():
    """[3, C]: mean, (var + eps)^-1/2 and the unbiased variance, in the accumulation dtype and without a gradient."""
    for dtype in DTYPES:
        x = torch.randn(3, 4, 5, 6).to(dtype).requires_grad_()
        y, statistics = reference.block_tail(x, eps=0.25)
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        assert y.requires_grad and not statistics.requires_grad and statistics.dtype == wide
        values = x.detach().double().transpose(0, 1).flatten(1)
        expected = torch.stack((values.mean(1), (values.var(1, correction=0) + 0.25).rsqrt(), values.var(1)))
        torch.testing.assert_close(statistics.double(), expected, rtol=1e-5, atol=1e-5)
        given = expected[0].to(dtype), expected[2].to(dtype)
        _, statistics = reference.block_tail(x, None, None, *given, eps=0.25)
        assert torch.equal(statistics[0], given[0].to(wide)) and torch.equal(statistics[2], given[1].to(wide))


def test_result_dtypes_with_a_residual():
    for x_dtype, residual_dtype in itertools.product(DTYPES, DTYPES):
        x, residual = torch.randn(2, 8, 3, 3).to(x_dtype), torch.randn(2, 8, 3, 3).to(residual_dtype)
        y = block_tail(x, training=True, residual=residual, backend="reference")
        assert y.dtype == torch.result_type(x, residual)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_autocast_changes_nothing(dtype):
    case = Tail((3, 24, 5, 7), 6, dtype, **EVERYTHING)
    t = draw(case, 0)

    def under_autocast(case: Tail, t: Tensors) -> torch.Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return by_reference(case, t)

    expected, found, gradients = run(by_reference, case, t), run(under_autocast, case, t), explicit(case, t)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        same = explicit(case, t)
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor) and found[name].dtype == tensor.dtype
    assert all(torch.equal(a, b) for a, b in zip(gradients, same, strict=True))


def test_convolution_weights_keep_their_shape():
    case = Tail((3, 24, 5, 7), 6, torch.float64)
    t = draw(case, 0)
    four = {**t, "w1": t["w1"][:, :, None, None], "w2": t["w2"][:, :, None, None]}
    expected, found, gradients = run(by_reference, case, t), run(by_reference, case, four), explicit(case, four)
    for name in ("dw1", "dw2"):
        assert found[name].shape == four[name[1:]].shape == getattr(gradients, name).shape
        assert torch.equal(found[name].flatten(1), expected[name])


@pytest.mark.parametrize(
    ("training", "post_act", "reduced"), list(itertools.product((True, False), (None, "relu"), (0, 2)))
)
def test_second_order(training, post_act, reduced):
    """The backward's own gradients: it is what the compiled backends differentiate twice with."""
    case = Tail((2, 3, 2, 2), reduced, torch.float64, training=training, act="silu", residual=True, factor=True)
    case = case.replace(post_act=post_act, eps=0.1)
    t = draw(case, 1)
    names = [k for k in t if k not in ("dy", "running_mean", "running_var", "factor")]
    constant = {k: t[k] for k in ("running_mean", "running_var", "factor")}
    tensors = [t[name].requires_grad_() for name in names]

    def named(tensors: tuple[torch.Tensor, ...]) -> Tensors:
        return {**{k: v.clone() for k, v in constant.items()}, **dict(zip(names, tensors, strict=True))}

    def forward(*tensors: torch.Tensor) -> torch.Tensor:
        return by_reference(case, named(tensors))

    def backward(dy: torch.Tensor, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return tuple(g for g in explicit(case, {"dy": dy, **named(tensors)}) if g is not None)

    assert torch.autograd.gradcheck(forward, tensors)
    assert torch.autograd.gradgradcheck(forward, tensors)
    assert torch.autograd.gradcheck(backward, (t["dy"].requires_grad_(), *tensors))


def test_meta_tensors():
    """Shapes and dtypes alone."""
    for dtype, training in itertools.product(DTYPES, (True, False)):
        x = torch.empty(2, 8, 5, 5, dtype=dtype, device="meta")
        running = torch.empty(8, device="meta"), torch.empty(8, device="meta")
        y = block_tail(x, *running, w1=x.new_empty(4, 8), w2=x.new_empty(8, 4), training=training)
        assert y.is_meta and y.shape == x.shape and y.dtype == dtype


def test_torch_func_sees_plain_operators():
    """torch.func's transforms, whatever backend is named, against the same of stock PyTorch."""
    x, weight, bias = torch.randn(3, 4, 2, 2, dtype=torch.float64), torch.randn(4).double(), torch.randn(4).double()
    w1, w2 = torch.randn(2, 4).double(), torch.randn(4, 2).double()

    def ours(x: torch.Tensor) -> torch.Tensor:
        return block_tail(x, None, None, weight, bias, w1=w1, w2=w2, act="silu", training=True, residual=x)

    def stock(x: torch.Tensor) -> torch.Tensor:
        z = F.batch_norm(x, None, None, weight, bias, True)
        return z * torch.sigmoid(F.silu(z.mean((2, 3)) @ w1.t()) @ w2.t())[:, :, None, None] + x

    for transform in (
        lambda f: torch.func.grad(lambda v: f(v).pow(3).sum())(x),
        lambda f: torch.func.jacrev(f)(x),
        lambda f: torch.func.jvp(f, (x,), (x.cos(),))[1],
        lambda f: torch.func.hessian(lambda v: f(v).pow(3).sum())(x[:2]),
        lambda f: torch.autograd.functional.jacobian(f, x),
    ):
        torch.testing.assert_close(transform(ours), transform(stock))
    batches = torch.stack((x, x.cos(), 3 * x))
    torch.testing.assert_close(torch.vmap(ours)(batches), torch.stack([ours(b) for b in batches]))
