"""What block tails are held against: F.batch_norm, SE, + residual, ReLU in plain PyTorch; the rules of oracle.py."""

from __future__ import annotations

import dataclasses
import functools
import math
import zlib
from collections.abc import Callable

import torch
from oracle import EXACT, FUNCTIONS, LAYOUTS, Errors, Tensors, bound, flipped
from torch import Tensor
from torch.nn import functional as F

import senet_fused
from senet_fused.tails import block_tail, reference

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
        act=case.act, gate=case.gate, residual=t.get("residual"), post_act=case.post_act, factor=t.get("factor"),
        backend=backend,
    )  # fmt: skip


def by_reference(case: Tail, t: Tensors) -> Tensor:
    """As :func:`fused`, by the reference."""
    return fused(case, t, "reference")


def explicit(case: Tail, t: Tensors, **more: object) -> reference.TailGradients:
    """(T4) to (T7) as written."""
    mean, var = (None, None) if case.training else (t["running_mean"], t["running_var"])
    return reference.block_tail_backward(
        t["dy"], t["x"], t.get("weight"), t.get("bias"), mean, var, t.get("w1"), t.get("b1"), t.get("w2"), t.get("b2"),
        eps=case.eps, act=case.act, gate=case.gate, residual=t.get("residual"), post_act=case.post_act,
        factor=t.get("factor"), **more,
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


def run_counted(case: Tail, inputs: Tensors) -> Tensors:
    """As :func:`run` by the C++ kernels, with the proof that it was they."""
    senet_fused.reset_call_counts()
    results = run(fused, case, inputs)
    assert senet_fused.call_counts() == RAN
    return results


def wrong_tensors(
    case: Tail,
    draws: int,
    ours: Callable[[Tail, Tensors], Tensors] = run_counted,
    change: Callable[[Tensors], None] | None = None,
) -> dict[str, str]:
    """The tensors whose error is more than twice stock's and one unit in the last place, and both numbers."""
    mine, stock32, stock = Errors(), Errors(), Errors()
    for seed in range(draws):
        inputs = draw(case, seed, change)
        results = ours(case, inputs)
        exact = {name: t for name, t in exact_results(case, inputs).items() if name in results}
        for name, t in results.items():
            assert t.shape == exact[name].shape and t.dtype == case.dtype_of(name), name
        mine.add(results, exact)
        if case.dtype == torch.float64:
            narrow = {k: t.float() for k, t in inputs.items()}
            stock32.add(run(layer, case, narrow), exact_results(case, narrow))
            again = flipped(run(layer, case, flipped(inputs), torch.float64))
            stock.add(again, run(layer, case, inputs, torch.float64))
            continue
        stock32.add(run(layer, case, inputs, torch.float32), exact)
        if case.dtype != torch.float32 and not case.others:
            stock.add(run(layer, case, inputs), exact)
    allowed = bound(case, stock32.relative(), stock.relative())
    return {k: f"{e:.2e}, allowed {allowed[k]:.2e}" for k, e in mine.relative().items() if not e <= allowed[k]}


def check(
    case: Tail,
    draws: int = 4,
    ours: Callable[[Tail, Tensors], Tensors] = run_counted,
    change: Callable[[Tensors], None] | None = None,
) -> None:
    """Holds y, every gradient and the running statistics to the rule of oracle.py, as :func:`oracle.check` does."""
    for repeat in (1, 8, 64):
        wrong = wrong_tensors(case, repeat * draws, ours, change)
        if not wrong or repeat * draws * math.prod(case.shape) > 10**7:
            break
    assert not wrong, f"{case}: {wrong}"
