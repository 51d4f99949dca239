"""What block tails are held against: F.batch_norm, SE, + residual, ReLU in plain PyTorch; the rules of oracle.py."""

from __future__ import annotations

import dataclasses
import functools
import math
import zlib
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from oracle import DTYPES, EXACT, FUNCTIONS, LAYOUTS, Tensors, judged, moved
from torch import Tensor
from torch.nn import functional as F

import senet_fused
from senet_fused import block_tail, reference
from senet_fused.call import Call, Gradients, text_of
from senet_fused.ops import define

if TYPE_CHECKING:
    import pytest

CONSTANT = ("running_mean", "running_var", "factor")
RAN = {"cpu.tail_forward": 1, "cpu.tail_backward": 1}


@dataclasses.dataclass(frozen=True)
class Tail:
    """One block tail: x is [N, C, *spatial] = shape in the named layout; tensors not named in `others` have `dtype`."""

    shape: tuple[int, ...]
    reduced: int = 0  # without a gate
    dtype: torch.dtype = torch.float32
    layout: str = "contiguous"
    training: bool = True
    act: str = "relu"
    gate: str = "sigmoid"
    affine: bool = True
    bias: bool = True  # of the gate
    residual: bool = False
    post_act: str | None = None
    factor: bool = False
    running: bool = True
    dy_layout: str | None = None  # x's
    residual_layout: str | None = None  # x's
    momentum: float = 0.1
    eps: float = 1e-5
    others: tuple[tuple[str, torch.dtype], ...] = ()
    pre_act: str | None = None

    def __str__(self) -> str:
        fields = (f for f in dataclasses.fields(self) if getattr(self, f.name) != f.default)
        return ", ".join(f"{f.name}={getattr(self, f.name)}" for f in fields)

    def dtype_of(self, name: str) -> torch.dtype:
        """The dtype of an input, a gradient ("dw1") or an output that the case calls for."""
        if name in ("y", "dy"):
            return torch.promote_types(self.dtype, self.dtype_of("residual")) if self.residual else self.dtype
        return dict(self.others).get(name.removeprefix("d"), self.dtype)

    def replace(self, **changes: object) -> Tail:
        """A case that differs in these fields."""
        return dataclasses.replace(self, **changes)


PLAIN: dict[str, object] = {}
EVERYTHING = {"act": "silu", "residual": True, "post_act": "relu", "factor": True}


def _wider(t: Tensor, case: Tail) -> Tensor:
    return t.reshape(*t.shape, *(1,) * (len(case.shape) - t.dim()))


def draw(case: Tail, seed: int, change: Callable[[Tensors], None] | None = None) -> Tensors:
    """Random inputs and dy. change: what to do to them before dy is made, which is zero beside the ReLU's corner."""
    generator = torch.Generator().manual_seed(zlib.crc32(f"{seed}: {case}".encode()))

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    n, c, *spatial = case.shape
    r = case.reduced
    spread, offset = 0.5 + normal(1, c).abs(), normal(1, c)
    x = _wider(spread, case) * normal(*case.shape) + _wider(offset + 0.5 * normal(n, c), case)
    t = {"x": LAYOUTS[case.layout](x.to(case.dtype))}
    if case.running or not case.training:
        t["running_mean"] = offset[0] + 0.3 * normal(c)
        t["running_var"] = spread[0] ** 2 * (0.5 + normal(c).abs())
    if case.affine:
        t["weight"], t["bias"] = 1 + 0.5 * normal(c), 0.5 * normal(c)
    if r:
        t["w1"], t["w2"] = normal(r, c) * (2 / math.sqrt(c)), normal(c, r) * (0.5 / math.sqrt(r))
        if case.bias:
            t["b1"], t["b2"] = normal(r), normal(c)
    if case.residual:
        residual = normal(*case.shape).to(case.dtype_of("residual"))
        t["residual"] = LAYOUTS[case.residual_layout or case.layout](residual)
    if case.factor:
        t["factor"] = torch.tensor([0.0, 1.25, 1.25, 0.8][:n] + [1.25] * (n - 4), dtype=torch.float64)
    t = {name: v.to(case.dtype_of(name)) for name, v in t.items()}
    if change is not None:
        change(t)
    dy = normal(*case.shape)
    if case.post_act == "relu" and dy.numel():
        before = layer(case.replace(post_act=None), {k: v.double().clone() for k, v in t.items()})
        dy = dy * (before.abs() > 4 * torch.finfo(case.dtype).eps * before.abs().max())
    t["dy"] = LAYOUTS[case.dy_layout or case.layout](dy.to(case.dtype_of("dy")))
    return t


def layer(case: Tail, t: Tensors, functions: dict[str, Callable[[Tensor], Tensor]] = FUNCTIONS) -> Tensor:
    """y as a user of stock PyTorch writes it, in the tensors' own dtype; updates t's running statistics."""
    y = F.batch_norm(
        t["x"], t.get("running_mean"), t.get("running_var"), t.get("weight"), t.get("bias"), case.training,
        case.momentum, case.eps,
    )  # fmt: skip
    if case.pre_act is not None:
        y = functions[case.pre_act](y)
    if "w1" in t:
        hidden = functions[case.act](F.linear(y.mean(tuple(range(2, y.dim()))), t["w1"], t.get("b1")))
        y = y * _wider(functions[case.gate](F.linear(hidden, t["w2"], t.get("b2"))), case)
    if "factor" in t:
        y = y * _wider(t["factor"], case)
    if "residual" in t:
        y = y + t["residual"]
    return F.relu(y) if case.post_act == "relu" else y


def fused(case: Tail, t: Tensors, backend: str = "cpu") -> Tensor:
    """y by senet_fused, which updates t's running statistics."""
    return block_tail(
        t["x"], t.get("running_mean"), t.get("running_var"), t.get("weight"), t.get("bias"), w1=t.get("w1"),
        w2=t.get("w2"), b1=t.get("b1"), b2=t.get("b2"), training=case.training, momentum=case.momentum, eps=case.eps,
        pre_act=case.pre_act, act=case.act, gate=case.gate, residual=t.get("residual"), post_act=case.post_act,
        factor=t.get("factor"), backend=backend,
    )  # fmt: skip


def by_reference(case: Tail, t: Tensors) -> Tensor:
    """As :func:`fused`, by the reference."""
    return fused(case, t, "reference")


def explicit(case: Tail, t: Tensors, **more: object) -> Gradients:
    """(T4) to (T7), or (P3) to (P6), as written."""
    mean, var = (None, None) if case.training else (t["running_mean"], t["running_var"])
    return reference.block_tail_backward(
        t["dy"], t["x"], t.get("weight"), t.get("bias"), mean, var, t.get("w1"), t.get("b1"), t.get("w2"), t.get("b2"),
        eps=case.eps, pre_act=case.pre_act, act=case.act, gate=case.gate, residual=t.get("residual"),
        post_act=case.post_act, factor=t.get("factor"), **more,
    )  # fmt: skip


def run(
    function: Callable[[Tail, Tensors], Tensor], case: Tail, inputs: Tensors, dtype: torch.dtype | None = None
) -> Tensors:
    """y, the gradient of every input as dx, dw1, ... by autograd, in training the running statistics afterwards.

    The inputs stay as they are. dtype: convert all of them first.
    """
    if dtype is not None:
        inputs = {name: t.to(dtype) for name, t in inputs.items()}
    leaves = {k: t.detach().requires_grad_() for k, t in inputs.items() if k not in ("dy", *CONSTANT)}
    constant = {k: t.clone() for k, t in inputs.items() if k in CONSTANT}
    y = function(case, {**leaves, **constant})
    gradients = torch.autograd.grad(y, list(leaves.values()), inputs["dy"])
    running = {k: t for k, t in constant.items() if case.training and k != "factor"}
    return {"y": y.detach(), **{f"d{k}": g for k, g in zip(leaves, gradients, strict=True)}, **running}


def exact_results(case: Tail, inputs: Tensors) -> Tensors:
    """The oracle: as :func:`run`, in float64 from the same values."""
    return run(functools.partial(layer, functions=EXACT), case, inputs, torch.float64)


def run_on(backend: str, device: torch.device | str, case: Tail, inputs: Tensors) -> Tensors:
    """The results of a backend's kernels on a device, brought back, with the proof that it was they."""
    inputs = {name: moved(t, device) for name, t in inputs.items()}
    senet_fused.reset_call_counts()
    results = run(functools.partial(fused, backend=backend), case, inputs)
    assert senet_fused.call_counts() == {f"{backend}.tail_forward": 1, f"{backend}.tail_backward": 1}
    return {name: t.cpu() for name, t in results.items()}


def run_counted(case: Tail, inputs: Tensors) -> Tensors:
    """As :func:`run` by the C++ kernels, with the proof that it was they."""
    senet_fused.reset_call_counts()
    results = run(fused, case, inputs)
    assert senet_fused.call_counts() == RAN
    return results


def wrong_tensors(
    case: Tail,
    draws: int = 1,
    ours: Callable[[Tail, Tensors], Tensors] = run_counted,
    change: Callable[[Tensors], None] | None = None,
) -> dict[str, str]:
    """The tensors that the rule refuses, of the first draw that has any."""
    for seed in range(draws):
        inputs = draw(case, seed, change)
        found = ours(case, inputs)
        if wrong := judged(case, found, inputs, exact_results(case, inputs), functools.partial(run, layer)):
            return wrong
    return {}


def check(
    case: Tail,
    draws: int = 4,
    ours: Callable[[Tail, Tensors], Tensors] = run_counted,
    change: Callable[[Tensors], None] | None = None,
) -> None:
    """Holds y, every gradient and the running statistics to the rule, as :func:`oracle.check` does."""
    wrong = wrong_tensors(case, draws, ours, change)
    assert not wrong, f"{case}: {wrong}"


def assert_same_bits(found: Tensors, expected: Tensors, what: object) -> None:
    for name, t in expected.items():
        assert torch.equal(found[name], t), f"{name}: {what}"


# ---------------------------------------------------------------------------------------------------- cases

f32, bf16, f16, f64 = DTYPES
VECTORS = ("weight", "bias", "running_mean", "running_var", "b1", "b2", "w1", "w2")
MIXED = [
    (bf16, dict.fromkeys(VECTORS, f32)),
    (f16, dict.fromkeys(VECTORS, f32)),
    (f32, dict.fromkeys(VECTORS, bf16)),
    (f32, dict.fromkeys(VECTORS, f64)),
    (f64, dict.fromkeys(VECTORS, f32)),
    (bf16, {"w1": f16, "w2": f32, "b1": f64, "weight": f64}),
    (bf16, {"running_mean": f32, "running_var": f64}),
    (f32, {"running_mean": bf16, "running_var": f16, "factor": bf16}),
    (bf16, {"residual": f32, "weight": f32, "bias": f32}),
    (f32, {"residual": bf16}),
    (f16, {"residual": bf16, "factor": f64}),
    (f64, {"residual": f16}),
]

MEAN = 1e4


def far_from_zero(t: Tensors) -> None:
    t["x"].add_(MEAN)


def far_first_pixels(t: Tensors) -> None:
    """What deviations are taken from at first is far from nearly all the rest."""
    t["x"][0].flatten(1)[:, :4] += 300
    t["x"][-1].flatten(1)[:, :64] -= 50
    t["x"][:, 0] += MEAN


def samples_apart(t: Tensors) -> None:
    """Each sample has a mean of its own, far from the others'."""
    t["x"] += 1e3 * torch.arange(len(t["x"])).reshape(-1, *(1,) * (t["x"].dim() - 1))


def constant_channels(t: Tensors) -> None:
    values = torch.tensor([0.0, 1.0, 0.3, -MEAN, MEAN / 3])
    t["x"][:, :5] = values.reshape(1, 5, 1, 1)


CHANGES = {f.__name__: f for f in (far_from_zero, far_first_pixels, samples_apart, constant_channels)}


def variance_error(t: Tensors, variance: torch.Tensor) -> float:
    exact = t["x"].double().transpose(0, 1).flatten(1).var(1)
    return ((variance.double() - exact) / exact).abs().max().item()


# ---------------------------------------------------------------------------------------------------- operators


INPUTS = ("x", "weight", "bias", "running_mean", "running_var", "w1", "b1", "w2", "b2", "residual", "factor")


def operators(backend: str) -> tuple[torch._ops.OpOverload, torch._ops.OpOverload]:
    """A backend's, forward and backward."""
    namespace, name = torch.ops.senet_fused, f"fused_se_{backend}"
    return getattr(namespace, name).default, getattr(namespace, f"{name}_backward").default


def forward_arguments(case: Tail, t: Tensors, save: bool = True) -> tuple[object, ...]:
    left_out = ("running_mean", "running_var") if case.training else ()
    tensors = (None if name in left_out else t.get(name) for name in INPUTS)
    return *tensors, case.eps, text_of(options_of(case)), save


def options_of(case: Tail) -> tuple[object, ...]:
    norm = "batch" if case.training else "given"
    return norm, case.act, case.gate, "avg", case.post_act or "", "", case.pre_act or ""


def call_of(case: Tail, t: Tensors) -> Call:
    return Call(*forward_arguments(case, t)[:-2], *options_of(case))


def backward_arguments(
    case: Tail, t: Tensors, outputs: tuple[Tensor, ...], needs: tuple[bool, bool, bool] | None = None
) -> tuple[object, ...]:
    """outputs: the forward's. needs: gradients of x, of parameters, of the residual; None for what there are."""
    given = (t.get(k) for k in ("x", "weight", "bias", "w1", "b1", "w2", "b2", "factor"))
    needs = needs or (True, True, case.residual and case.post_act is not None)
    return t["dy"], None, *given, *outputs[1:], case.eps, text_of(options_of(case)), *needs


def operator_outputs(backend: str, case: Tail, t: Tensors) -> tuple[Tensor, ...]:
    """All that a backend's operators return forward and backward, what is kept in between included."""
    forward, backward = operators(backend)
    outputs = forward(*forward_arguments(case, t))
    return *outputs, *backward(*backward_arguments(case, t, outputs))


def fill_outputs(monkeypatch: pytest.MonkeyPatch, number: float, byte: int) -> None:
    """Has the operators allocate tensors of this number; masks, of this byte."""

    def filled(allocate):
        def allocate_and_fill(*arguments):
            outputs = allocate(*arguments)
            for t in outputs:
                if t is not None:
                    t.fill_(number if t.is_floating_point() else byte)
            return outputs

        return allocate_and_fill

    for name in ("_allocate", "_allocate_gradients"):
        monkeypatch.setattr(define, name, filled(getattr(define, name)))
