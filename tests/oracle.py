"""What kernels are held against: SE in plain PyTorch, differentiated by autograd, in float64.

Independent of senet_fused.reference, which is under test itself. The rule is senet_fused.accuracy's, with two details:

* float16 and bfloat16 results are held to stock *float32*'s error. Sums and the excitation are float32 here, so only
  one rounding may show.
* Where the value in front of a final ReLU is within rounding of zero, dy is zero: whether the element passes is luck.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import zlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

import senet_fused
from senet_fused.accuracy import refused, relative_error

FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "identity": lambda v: v,
    "relu": F.relu,
    "relu6": F.relu6,
    "leaky_relu": F.leaky_relu,
    "leaky_relu(0.2)": lambda v: F.leaky_relu(v, 0.2),
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda v: F.gelu(v, approximate="tanh"),
    "hardswish": F.hardswish,
    "mish": F.mish,
    "tanh": torch.tanh,
    "sigmoid": torch.sigmoid,
    "hardsigmoid": F.hardsigmoid,
    "hardsigmoid(0.2, 0.5)": lambda v: F.hardtanh(0.2 * v + 0.5, 0.0, 1.0),
}


class _ExactTanh(torch.autograd.Function):
    """tanh with the derivative 4 sigmoid(2 v) sigmoid(-2 v), where 1 - tanh(v)^2 cancels."""

    @staticmethod
    def forward(ctx, v):
        ctx.save_for_backward(v)
        return torch.tanh(v)

    @staticmethod
    def backward(ctx, d):
        (v,) = ctx.saved_tensors
        return d * (4 * torch.sigmoid(2 * v) * torch.sigmoid(-2 * v))


# As FUNCTIONS, but for three whose derivative is not exact in stock PyTorch's float64: hardsigmoid's is 1/6 in float32,
# the others' lose digits for large arguments (gelu_tanh here is by 1 + tanh(u) = 2 sigmoid(2 u)).
EXACT = {
    **FUNCTIONS,
    "tanh": _ExactTanh.apply,
    "hardsigmoid": lambda v: F.hardtanh(v / 6 + 0.5, 0.0, 1.0),
    "gelu_tanh": lambda v: v * torch.exp(F.logsigmoid(2 * math.sqrt(2 / math.pi) * (v + 0.044715 * v**3))),
}
ACTS = (
    "identity", "relu", "relu6", "leaky_relu", "leaky_relu(0.2)", "silu", "gelu", "gelu_tanh", "hardswish", "mish",
    "tanh", "sigmoid",
)  # fmt: skip
GATES = ("sigmoid", "hardsigmoid", "hardsigmoid(0.2, 0.5)", "tanh", "relu", "identity")
SQUEEZES = ("avg", "max", "avgmax")
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
WEIGHTS = ("w1", "b1", "w2", "b2")

# ---------------------------------------------------------------------------------------------------- layouts


def stored(t: Tensor, order: tuple[int, ...], grow: tuple[int, ...] | None = None, offset: int = 0) -> Tensor:
    """t's values in a tensor whose dimensions lie in memory in this order, outermost first.

    grow: by how many elements the storage exceeds each of t's dimensions. offset: of the storage, in elements.
    """
    sizes = [t.shape[d] + (grow[d] if grow else 0) for d in order]
    storage = t.new_zeros(offset + math.prod(sizes))
    view = storage[offset:].reshape(sizes).permute(*(order.index(d) for d in range(t.dim())))
    for d, size in enumerate(t.shape):
        view = view.narrow(d, 0, size)
    return view.copy_(t)


def _channels_last(t: Tensor) -> tuple[int, ...]:
    return (0, *range(2, t.dim()), 1)


def _contiguous(t: Tensor) -> tuple[int, ...]:
    return tuple(range(t.dim()))


def _every_other_sample(t: Tensor, order: tuple[int, ...]) -> Tensor:
    doubled = torch.stack((t, torch.zeros_like(t)), 1).flatten(0, 1)
    return stored(doubled, order)[::2]


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda t: stored(t, _contiguous(t)),
    "channels_last": lambda t: stored(t, _channels_last(t)),
    "misaligned": lambda t: stored(t, _contiguous(t), offset=1),
    "misaligned channels_last": lambda t: stored(t, _channels_last(t), offset=1),
    "every other sample": lambda t: _every_other_sample(t, _contiguous(t)),
    "every other sample, channels_last": lambda t: _every_other_sample(t, _channels_last(t)),
    "sliced channels": lambda t: stored(t, _contiguous(t), grow=(0, 3, *(0,) * (t.dim() - 2))),
    "sliced channels, channels_last": lambda t: stored(t, _channels_last(t), grow=(0, 3, *(0,) * (t.dim() - 2))),
    "sliced rows": lambda t: stored(t, _contiguous(t), grow=(0, 0, *(0,) * (t.dim() - 3), 2)),
    "expanded samples": lambda t: t[:1].contiguous().expand_as(t),
    "expanded channels": lambda t: t[:, :1].contiguous().expand_as(t),
    "expanded positions": lambda t: t[..., :1].contiguous().expand_as(t),
    "reversed": lambda t: stored(t, tuple(range(t.dim()))[::-1]),
    "channels outermost": lambda t: stored(t, (1, 0, *range(2, t.dim()))),
    "positions transposed": lambda t: stored(t, (0, 1, *range(2, t.dim())[::-1])),
}

# ---------------------------------------------------------------------------------------------------- cases


@dataclasses.dataclass(frozen=True)
class Case:
    """One SE call: x is [N, C, *spatial] = shape in the named layout; tensors not named in `others` have `dtype`."""

    shape: tuple[int, ...]
    reduced: int
    dtype: torch.dtype = torch.float32
    layout: str = "contiguous"
    act: str = "relu"
    gate: str = "sigmoid"
    squeeze: str = "avg"
    post_act: str | None = None
    residual: bool = False
    bias: bool = True
    through: str = "y"  # where gradients enter: "y", "gate" or "both"
    dy_layout: str | None = None  # x's
    residual_layout: str | None = None  # x's
    others: tuple[tuple[str, torch.dtype], ...] = ()  # e.g. (("w1", torch.float64),)

    def __str__(self) -> str:
        fields = (f for f in dataclasses.fields(self) if getattr(self, f.name) != f.default)
        return ", ".join(f"{f.name}={getattr(self, f.name)}" for f in fields)

    def dtype_of(self, name: str) -> torch.dtype:
        """The dtype of an input, a gradient ("dw1") or an output that the case calls for."""
        if name in ("y", "dy"):
            return torch.promote_types(self.dtype, self.dtype_of("residual")) if self.residual else self.dtype
        if name == "gate":
            return torch.float64 if self.dtype == torch.float64 else torch.float32
        return dict(self.others).get(name.removeprefix("d"), self.dtype)

    def replace(self, **changes: object) -> Case:
        """A case that differs in these fields."""
        return dataclasses.replace(self, **changes)


Tensors = dict[str, Tensor]


def draw(case: Case, seed: int) -> Tensors:
    """Random x, w1, w2, dy, dgate and whichever of b1, b2, residual the case has.

    The scales put the arguments of act and gate on either side of every kink, with gradients that all matter.
    """
    generator = torch.Generator().manual_seed(zlib.crc32(f"{seed}: {case}".encode()))

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    n, c, *spatial = case.shape
    r = case.reduced
    x = normal(*case.shape) + 0.5 * normal(n, c).reshape(n, c, *(1,) * len(spatial))
    arrange = LAYOUTS[case.layout]
    inputs = {"x": arrange(x.to(case.dtype))}
    # Never less than what pooled is on average: a pooled value that cancels by chance is not to be magnified.
    pooled = _pooled(inputs["x"].double(), case.squeeze).square().mean().sqrt().item() if n else 1.0
    scale = 4.0 / (math.sqrt(c) * max(pooled, math.sqrt(0.25 + 1 / math.prod(spatial))))
    inputs["w1"] = normal(r, c) * scale
    inputs["w2"] = normal(c, r) * (0.5 / math.sqrt(r))
    if case.bias:
        inputs["b1"], inputs["b2"] = normal(r), normal(c)
    if case.residual:
        residual = normal(*case.shape).to(case.dtype_of("residual"))
        inputs["residual"] = LAYOUTS[case.residual_layout or case.layout](residual)
    inputs = {name: t.to(case.dtype_of(name)) for name, t in inputs.items()}
    dy = normal(*case.shape)
    if case.post_act == "relu" and dy.numel():
        before = layer(case.replace(post_act=None), {k: t.double() for k, t in inputs.items()})[0]
        dy = dy * (before.abs() > 4 * torch.finfo(case.dtype).eps * before.abs().max())
    inputs["dy"] = LAYOUTS[case.dy_layout or case.layout](dy.to(case.dtype_of("dy")))
    inputs["dgate"] = normal(n, c)
    return inputs


# ---------------------------------------------------------------------------------------------------- the layer


def _pooled(x: Tensor, squeeze: str) -> Tensor:
    spatial = tuple(range(2, x.dim()))
    if squeeze == "avg":
        return x.mean(spatial)
    if squeeze == "max":
        return x.amax(spatial)
    return 0.5 * x.mean(spatial) + 0.5 * x.amax(spatial)


def layer(
    case: Case, t: Tensors, functions: dict[str, Callable[[Tensor], Tensor]] = FUNCTIONS
) -> tuple[Tensor, Tensor]:
    """(y, gate) as a user of stock PyTorch writes it, in the tensors' own dtype."""
    hidden = functions[case.act](F.linear(_pooled(t["x"], case.squeeze), t["w1"], t.get("b1")))
    gate = functions[case.gate](F.linear(hidden, t["w2"], t.get("b2")))
    y = t["x"] * gate.reshape(*gate.shape, *(1,) * (t["x"].dim() - 2))
    if "residual" in t:
        y = y + t["residual"]
    return (F.relu(y) if case.post_act == "relu" else y), gate


def fused(case: Case, t: Tensors, backend: str = "cpu") -> tuple[Tensor, Tensor]:
    """(y, gate) by senet_fused."""
    return senet_fused.squeeze_excite(
        t["x"], t["w1"], t["w2"], t.get("b1"), t.get("b2"), act=case.act, gate=case.gate, squeeze=case.squeeze,
        residual=t.get("residual"), post_act=case.post_act, backend=backend, return_gate=True,
    )  # fmt: skip


Layer = Callable[[Case, Tensors], tuple[Tensor, Tensor]]


def run(function: Layer, case: Case, inputs: Tensors, dtype: torch.dtype | None = None) -> Tensors:
    """y, gate and the gradient of every input as dx, dw1, ..., by autograd; dtype: convert all inputs first."""
    if dtype is not None:
        inputs = {name: t.to(dtype) for name, t in inputs.items()}
    leaves = {k: t.detach().requires_grad_() for k, t in inputs.items() if k not in ("dy", "dgate")}
    y, gate = function(case, leaves)
    outputs = {"y": [y], "gate": [gate], "both": [y, gate]}[case.through]
    cotangents = [inputs["dy"] if t is y else inputs["dgate"].to(t.dtype) for t in outputs]
    gradients = torch.autograd.grad(outputs, list(leaves.values()), cotangents, allow_unused=True)
    zeros = (torch.zeros_like(leaf) if g is None else g for leaf, g in zip(leaves.values(), gradients, strict=True))
    return {"y": y.detach(), "gate": gate.detach(), **{f"d{k}": g for k, g in zip(leaves, zeros, strict=True)}}


def moved(t: Tensor, device: torch.device | str) -> Tensor:
    """t on the device, with its strides and its place in its storage."""
    if torch.device(device).type == "cpu":
        return t
    storage = torch.empty(0, dtype=t.dtype).set_(t.untyped_storage())
    return storage.to(device).as_strided(t.shape, t.stride(), t.storage_offset())


def run_on(backend: str, device: torch.device | str, case: Case, inputs: Tensors) -> Tensors:
    """The results of a backend's kernels on a device, brought back, with the proof that it was they."""
    inputs = {name: moved(t, device) for name, t in inputs.items()}
    senet_fused.reset_call_counts()
    results = run(functools.partial(fused, backend=backend), case, inputs)
    assert senet_fused.call_counts() == {f"{backend}.forward": 1, f"{backend}.backward": 1}
    return {name: t.cpu() for name, t in results.items()}


def exact_results(case: Case, inputs: Tensors) -> Tensors:
    """The oracle: as :func:`run`, in float64 from the same values."""
    return run(functools.partial(layer, functions=EXACT), case, inputs, torch.float64)


def run_counted(case: Case, inputs: Tensors) -> Tensors:
    """As :func:`run` by the C++ kernels, with the proof that it was they."""
    senet_fused.reset_call_counts()
    results = run(fused, case, inputs)
    assert senet_fused.call_counts() == {"cpu.forward": 1, "cpu.backward": 1}
    return results


# ---------------------------------------------------------------------------------------------------- the rule


def check(
    case: Case,
    draws: int = 4,
    ours: Callable[[Case, Tensors], Tensors] = run_counted,
    change: Callable[[Tensors], None] | None = None,
) -> None:
    """Holds y, gate and every gradient of the C++ kernels to the rule, in each of several random draws.

    ours: what computes the tensors to judge. change: what to do to the inputs of each draw first.
    """
    wrong = wrong_tensors(case, draws, ours, change)
    assert not wrong, f"{case}: {wrong}"


def wrong_tensors(
    case: Case,
    draws: int = 1,
    ours: Callable[[Case, Tensors], Tensors] = run_counted,
    change: Callable[[Tensors], None] | None = None,
) -> dict[str, str]:
    """The tensors that the rule refuses, of the first draw that has any."""
    for seed in range(draws):
        inputs = draw(case, seed)
        if change is not None:
            change(inputs)
        found = ours(case, inputs)
        if wrong := judged(case, found, inputs, exact_results(case, inputs), functools.partial(run, layer)):
            return wrong
    return {}


def judged(case: Any, found: Tensors, inputs: Tensors, exact: Tensors, plain: Callable[..., Tensors]) -> dict[str, str]:
    """The tensors that senet_fused.accuracy refuses. plain: (case, inputs, dtype) -> stock's results in that dtype."""
    exact = {name: t for name, t in exact.items() if name in found}
    for name, t in found.items():
        assert t.shape == exact[name].shape and t.dtype == case.dtype_of(name), name
    # Of 16-bit tensors, too: sums and the excitation are float32 here.
    wide = torch.float64 if case.dtype == torch.float64 else torch.float32
    stock = {} if wide == torch.float64 else plain(case, inputs, wide)
    errors = {name: relative_error(t, exact[name]) for name, t in stock.items() if name in exact}
    return refused(found, exact, errors, lambda: plain(case, inputs, torch.float64), wide)


def assert_right(found: Tensors, plain: Callable[[], Tensors]) -> None:
    """Holds float64 results of anything, a network's say, to the rule; plain: gives those of plain PyTorch, each time.

    Of tensors that plain does not have nothing is asked. Integers are equal.
    """
    expected = plain()
    whole = {name for name, t in expected.items() if not t.is_floating_point()}
    assert expected.keys() <= found.keys() and all(torch.equal(found[name], expected[name]) for name in whole)
    floating = {name: found[name] for name in expected.keys() - whole}
    assert all(t.dtype == torch.float64 and t.shape == expected[name].shape for name, t in floating.items())
    wrong = refused(floating, expected, {}, plain, torch.float64)
    assert not wrong, wrong
