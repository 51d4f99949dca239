"""The rule of senet_fused.accuracy: what it lets pass wherever it is computed, and planted defects that it refuses."""

from __future__ import annotations

import functools
import math

import oracle
import pytest
import tail_oracle
import torch
from oracle import Case, Tensors
from tail_oracle import Tail, far_from_zero
from torch import Tensor
from torch.nn import functional as F

from senet_fused.accuracy import Rounding, refused, relative_error

inf, nan = math.inf, math.nan
f32, bf16, f16, f64 = oracle.DTYPES

# ---------------------------------------------------------------------------------------------------- planted defects


def total(v: Tensor, defect: str | None) -> Tensor:
    """v [N, C, M] added up over M, with a defect. The value alone has it: the gradient is that of a sum."""
    exact = v.sum(-1)
    if defect == "16-bit accumulator":
        found = torch.zeros_like(exact)
        for addend in v.unbind(-1):
            found = (found + addend).to(bf16).to(v.dtype)
    elif defect == "lost element":
        found = exact - v[..., -1]
    elif defect == "lost sample":
        found = torch.cat((exact[:-1], 0 * exact[-1:]))
    else:
        return exact
    return exact + (found - exact).detach()


class Times(torch.autograd.Function):
    """x [N, C, M] times one factor for each plane, whose gradient is a sum with a defect."""

    @staticmethod
    def forward(ctx, x, factor, defect):
        ctx.save_for_backward(x, factor)
        ctx.defect = defect
        return x * factor[..., None]

    @staticmethod
    def backward(ctx, g):
        x, factor = ctx.saved_tensors
        return g * factor[..., None], total(g * x, ctx.defect), None


def excited(z: Tensor, w: Tensors, direction: str, defect: str | None) -> tuple[Tensor, Tensor]:
    """(E1) to (E4) on z [N, C, M]."""
    pooled = total(z, defect if direction == "forward" else None) / z.shape[-1]
    gate = torch.sigmoid(F.linear(F.relu(F.linear(pooled, w["w1"], w["b1"])), w["w2"], w["b2"]))
    return Times.apply(z, gate, defect if direction == "backward" else None), gate


def se_layer(direction: str, defect: str | None, case: Case, t: Tensors) -> tuple[Tensor, Tensor]:
    wide = {k: v.to(torch.float32) for k, v in t.items()}
    y, gate = excited(wide["x"].flatten(2), wide, direction, defect)
    return y.reshape(case.shape).to(case.dtype), gate


def tail(direction: str, defect: str | None, case: Tail, t: Tensors) -> Tensor:
    """(T1) to (T3) in training, from one sum over each plane."""
    wide = {k: v.to(torch.float32) for k, v in t.items()}
    x = wide["x"].flatten(2)
    count = x.shape[0] * x.shape[2]
    forward, backward = (defect if direction == name else None for name in ("forward", "backward"))
    mean = total(x, forward).sum(0) / count
    if forward == "naive variance":
        var = (x.square().sum((0, 2)) / count - mean.square()).clamp(min=0)
    else:
        var = total((x - mean[:, None]).square(), forward).sum(0) / count
    xhat = (x - mean[:, None]) * (var + case.eps).rsqrt()[:, None]
    z = Times.apply(xhat, wide["weight"].expand(x.shape[:2]), backward) + wide["bias"][:, None]
    for running, now in (("running_mean", mean), ("running_var", var * count / (count - 1))):
        t[running].lerp_(now.detach(), case.momentum)
    return excited(z, wide, direction, None)[0].reshape(case.shape).to(case.dtype)


SHAPES = [((4, 13, 7, 7), 5), ((3, 12, 24, 24), 4)]  # of test_tail_kernels.py, test_cuda_tail.py
DEFECTS = ("16-bit accumulator", "lost element", "lost sample")


@pytest.mark.parametrize("dtype", [f32, bf16], ids=str)
@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_defects_of_an_se_layer_are_refused(direction, dtype):
    judged = {"forward": ("y", "gate"), "backward": ("dw1", "db1", "dw2", "db2")}[direction]
    for shape, reduced in SHAPES:
        for defect in (None, *DEFECTS):
            if defect == "16-bit accumulator" and dtype == bf16 and direction == "backward" and shape[-1] < 24:
                continue  # 49 addends lose no more than the rounding of the gradient itself
            layer = functools.partial(se_layer, direction, defect)
            wrong = oracle.wrong_tensors(Case(shape, reduced, dtype), 1, functools.partial(oracle.run, layer))
            assert bool(wrong.keys() & set(judged) if defect else wrong) == (defect is not None), (shape, defect, wrong)


@pytest.mark.parametrize("dtype", [f32, bf16], ids=str)
@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_defects_of_a_tail_are_refused(direction, dtype):
    judged = {"forward": ("y", "running_mean", "running_var"), "backward": ("dx", "dweight")}[direction]
    for shape, reduced in SHAPES:
        for defect in (None, *DEFECTS):
            if defect == "16-bit accumulator" and dtype == bf16 and direction == "backward" and shape[-1] < 24:
                continue
            case = Tail(shape, reduced, dtype, others=(("running_mean", f32), ("running_var", f32)))
            ours = functools.partial(tail_oracle.run, functools.partial(tail, direction, defect))
            wrong = tail_oracle.wrong_tensors(case, 1, ours)
            assert bool(wrong.keys() & set(judged) if defect else wrong) == (defect is not None), (shape, defect, wrong)


@pytest.mark.parametrize("dtype", [f32, bf16], ids=str)
def test_the_naive_variance_is_refused(dtype):
    """E[x^2] - E[x]^2 in float32, where the mean is large: 16-bit outputs do not show it, running statistics do."""

    def far(t: Tensors) -> None:
        far_from_zero(t) if dtype == f32 else t["x"].add_(100)

    expected = {"y", "running_var", "dx", "dweight"} if dtype == f32 else {"running_var"}
    for shape, reduced in SHAPES:
        case = Tail(shape, reduced, dtype, others=(("running_mean", f32), ("running_var", f32)))
        for defect in (None, "naive variance"):
            ours = functools.partial(tail_oracle.run, functools.partial(tail, "forward", defect))
            wrong = tail_oracle.wrong_tensors(case, 1, ours, far)
            assert expected <= wrong.keys() if defect else not wrong, (shape, defect, wrong)


# ---------------------------------------------------------------------------------------------------- what may pass


def test_luck_of_stock_decides_nothing():
    """Sums in another order, beside a stock layer that makes no error at all."""
    x = torch.randn(50, 300, generator=torch.Generator().manual_seed(0))
    exact = {"sum": x.double().sum(1)}
    running = torch.zeros(50)
    for column in x.unbind(1):
        running = running + column
    plain = lambda: {"sum": x.double().sum(1)}  # noqa: E731
    assert relative_error(running, exact["sum"]) > 2 * torch.finfo(f32).eps
    assert refused({"sum": running}, exact, {"sum": 0.0}, plain, f32) == {}
    lost = {"sum": running - 1e-4 * x[:, 0]}
    assert list(refused(lost, exact, {"sum": 0.0}, plain, f32)) == ["sum"]


@pytest.mark.parametrize("dtype", [f32, f64], ids=str)
def test_a_gradient_that_batchnorm_cancels(dtype):
    """A convolution's bias in front of a BatchNorm: its gradient is the rounding of what was added up, and no more."""
    generator = torch.Generator().manual_seed(0)
    sizes = (4, 3, 8, 8), (5, 3, 1, 1), (4, 5, 8, 8)
    x, w, dy = (torch.randn(size, generator=generator, dtype=f64) for size in sizes)
    bias = torch.randn(5, generator=generator, dtype=f64)

    def gradient(dtype: torch.dtype, order: slice | list[int], factor: float = 1.0) -> Tensors:
        b = bias.to(dtype).requires_grad_()
        y = F.batch_norm(F.conv2d(x.to(dtype)[order], w.to(dtype), b), None, None, training=True)
        (db,) = torch.autograd.grad(y, b, dy.to(dtype)[order] * factor)
        return {"db": db}

    plain = functools.partial(gradient, f64, slice(None))
    largest = plain()["db"].abs().max()
    found = gradient(dtype, [2, 0, 3, 1])
    assert found["db"].abs().max() > 0 and largest < 1e-12
    assert refused(found, plain(), {}, plain, dtype) == {}
    addend = 1e4 * torch.finfo(dtype).eps
    assert list(refused({"db": found["db"] + addend}, plain(), {}, plain, dtype)) == ["db"]


@pytest.mark.parametrize("dtype", oracle.DTYPES, ids=str)
def test_one_rounding_of_what_is_stored(dtype):
    """Also of subnormal numbers, whose last place is worth more."""
    for scale in (1.0, torch.finfo(dtype).tiny / 8):
        exact = scale * torch.linspace(0.5, 1, 77, dtype=f64)
        plain = lambda e=exact: {"y": e}  # noqa: E731
        stored = exact.to(dtype)
        assert refused({"y": stored}, {"y": exact}, {}, plain, f64) == {}
        off = stored + 2 * torch.finfo(dtype).eps * max(scale, torch.finfo(dtype).tiny)
        assert list(refused({"y": off}, {"y": exact}, {}, plain, f64)) == ["y"]


def test_nan_and_differences_from_zero_are_infinite():
    zero, one = torch.zeros(3), torch.ones(3)
    assert relative_error(torch.tensor([1.0, nan, 1.0]), one) == inf
    assert relative_error(one, zero) == inf and relative_error(zero, zero) == 0.0
    assert relative_error(zero[:0], zero[:0]) == 0.0
    for wrong in (one, nan * one):
        assert list(refused({"y": wrong}, {"y": zero.double()}, {}, lambda: {"y": zero.double()}, f32)) == ["y"]


def test_stock_allows_what_plain_is_not_asked_about():
    exact, found = {"y": torch.ones(3, dtype=f64)}, {"y": torch.full((3,), 1.25)}
    assert refused(found, exact, {"y": 0.125}, None, f32) == {}
    plain = lambda: exact  # noqa: E731
    assert refused(found, exact, {"y": 0.1}, plain, f32) == {"y": "is off by 2.5e-01, allowed 2.0e-01"}
    assert refused(found, exact, {"y": 0.1}, plain, f32, slack=8) == {}


# ---------------------------------------------------------------------------------------------------- rounding


def test_rounding_moves_every_input_by_up_to_one_unit():
    x = torch.rand(10_000, dtype=f64) + 0.5
    for dtype in (f32, f16):
        with Rounding(dtype, 1):
            doubled = x * 2.0
        with Rounding(dtype, 1):
            same = x * 2.0
        with Rounding(dtype, 2):
            other = x * 2.0
        assert torch.equal(same, doubled) and not torch.equal(other, doubled)
        moved = (doubled / (2 * x) - 1) / torch.finfo(dtype).eps
        assert 0.99 < moved.max() <= 1.001 and -1.001 <= moved.min() < -0.99 and moved.mean().abs() < 0.05


@pytest.mark.parametrize("approximate", ["none", "tanh"])
def test_steps_compute_what_the_operation_does(approximate):
    """gelu and BatchNorm, which are rounded step by step; and 1 + erf leaves less than the last place of either."""
    v = torch.linspace(-5, 5, 201, dtype=f64).reshape(1, 1, -1).repeat(2, 3, 1).requires_grad_()
    mean, var = torch.zeros(3, dtype=f64), torch.ones(3, dtype=f64)

    def results() -> Tensors:
        running = mean.clone(), var.clone()
        y = F.batch_norm(F.gelu(v, approximate=approximate), *running, var, mean, True)
        z = F.batch_norm(y, *running, var, mean, False)
        (dv,) = torch.autograd.grad(z, v, v.detach().cos())
        return {"y": y, "z": z, "dv": dv, "running_mean": running[0], "running_var": running[1]}

    still = results()
    with Rounding(f64):
        moved = results()
    assert all(0 < relative_error(moved[name], t) < 1e-13 for name, t in still.items())
    low = torch.full((100,), -5.0, dtype=f64)
    with Rounding(f32):
        assert relative_error(F.gelu(low, approximate=approximate), F.gelu(low.clone())) > 1e-3


def test_rounding_keeps_what_is_exact():
    """Inputs, views, ties of maxima, zeros; and what an operation writes is written."""
    x = torch.randn(2, 3, 4, dtype=f64).round().requires_grad_()
    mean, var = torch.zeros(3, dtype=f64), torch.ones(3, dtype=f64)
    before = x.detach().clone()
    with Rounding(f32):
        seen = x.detach().flatten(), x.detach().clone().flatten()
        (ties,) = torch.autograd.grad(x.amax(-1).sum(), x)
        zero = 0 * x
        F.batch_norm(x, mean, var, training=True, momentum=1.0)
    assert all(torch.equal(t, before.flatten()) for t in (x.detach().flatten(), *seen)) and not zero.any()
    assert torch.equal(ties != 0, before == before.amax(-1, keepdim=True))
    assert 0 < (mean - before.mean((0, 2))).abs().max() < 1e-6
    assert 0 < (var - before.transpose(0, 1).flatten(1).var(1)).abs().max() < 1e-5
