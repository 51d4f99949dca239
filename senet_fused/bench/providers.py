"""What is compared, behind one interface: stock eager, torch.compile, this package, and a copy as ceiling."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import senet_fused
from senet_fused import torch_private
from senet_fused.modules import FusedSE

from .buffers import torch_dtype
from .oracle import FUNCTIONS, PARAMETERS, InputSet, Weights
from .problems import GPU_BACKENDS, Case

__all__ = [
    "BUILDERS", "STOCK_FORMS", "FusedTail", "Provider", "StockSE", "StockTail", "backward_of", "copy_ceiling", "eager",
    "is_ours", "results", "step", "under_compile",
]  # fmt: skip

STOCK_FORMS = ("linear", "conv")


def _function(name: str) -> nn.Module:
    """As networks have it: ReLU in place."""
    return FUNCTIONS[name](inplace=True) if name in ("relu", "relu6") else FUNCTIONS[name]()


class StockSE(nn.Module):
    """The SE layer as people write it, in one of two forms: with nn.Linear, or timm's 1x1 convolutions.

    The shortcut is added and the outer ReLU taken in place, as networks do.
    """

    def __init__(self, case: Case, weights: Weights, form: str) -> None:
        super().__init__()
        c, r = case.shape.channels, case.shape.rd_channels
        options = {"bias": case.bias, "device": weights.w1.device, "dtype": torch_dtype(case)}
        if form == "linear":
            self.fc1, self.fc2 = nn.Linear(c, r, **options), nn.Linear(r, c, **options)
        else:
            conv = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[len(case.shape.spatial) - 1]
            self.fc1, self.fc2 = conv(c, r, 1, **options), conv(r, c, 1, **options)
        self.act, self.gate = _function(case.act), _function(case.gate)
        self.plane_dims = tuple(range(2, len(case.size)))
        self.keepdim = form == "conv"
        self.ones = [1] * len(self.plane_dims)
        self.post_relu = case.post_act == "relu"

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        gate = self.gate(self.fc2(self.act(self.fc1(x.mean(self.plane_dims, keepdim=self.keepdim)))))
        y = x * (gate if self.keepdim else gate.view(*gate.shape, *self.ones))
        if residual is not None:
            y += residual
        return y.relu_() if self.post_relu else y


class StockTail(nn.Module):
    """BatchNorm, and behind it an SE layer with its shortcut and ReLU."""

    def __init__(self, case: Case, weights: Weights, se: nn.Module) -> None:
        super().__init__()
        self.se = se
        self.weight, self.bias = nn.Parameter(weights.weight.clone()), nn.Parameter(weights.bias.clone())
        self.register_buffer("mean", weights.mean.clone())
        self.register_buffer("var", weights.var.clone())
        self.train(case.training)

    def forward(self, x: Tensor, residual: Tensor) -> Tensor:
        z = F.batch_norm(x, self.mean, self.var, self.weight, self.bias, self.training)
        return self.se(z, residual)


class FusedTail(StockTail):
    """The same by block_tail."""

    def forward(self, x: Tensor, residual: Tensor) -> Tensor:
        se = self.se
        return senet_fused.block_tail(
            x, self.mean, self.var, self.weight, self.bias, w1=se.fc1.weight, b1=se.fc1.bias, w2=se.fc2.weight,
            b2=se.fc2.bias, training=self.training, act=se.act, gate=se.gate, residual=residual, post_act=se.post_act,
            backend=se.backend,
        )  # fmt: skip


@dataclasses.dataclass
class Provider:
    """One contender in one case.

    forward: (x, residual) -> y. parameters: in the order of oracle.PARAMETERS without the missing ones. path: says what
    ran since the provider was built; asked before another provider runs, as the counters it reads are the process's.
    form: the stock layer's form. backend: the one that the fused layer was built with, None for the default.
    statistics: a tail's running mean and variance.
    """

    name: str
    forward: Callable[[Tensor, Tensor | None], Tensor]
    parameters: list[Tensor]
    path: Callable[[], str]
    form: str | None = None
    backend: str | None = None
    statistics: Sequence[Tensor] = ()


# From case, weights, the stock layer's form and the fused layer's backend.
Builder = Callable[[Case, Weights, str, "str | None"], Provider]


def _with_weights(case: Case, weights: Weights, se: nn.Module, tail: type[StockTail]) -> nn.Module:
    """The layer with these weights, or the tail around it."""
    pairs = zip((se.fc1.weight, se.fc1.bias, se.fc2.weight, se.fc2.bias), weights[:4], strict=True)
    with torch.no_grad():
        for parameter, weight in pairs:
            if weight is not None:
                parameter.copy_(weight.view_as(parameter))
    return tail(case, weights, se) if case.op == "tail" else se


def _stock_module(case: Case, weights: Weights, form: str) -> nn.Module:
    return _with_weights(case, weights, StockSE(case, weights, form), StockTail)


def _fused_module(case: Case, weights: Weights, backend: str | None) -> nn.Module:
    module = FusedSE(
        case.shape.channels,
        rd_channels=case.shape.rd_channels,
        bias=case.bias,
        act=case.act,
        gate=case.gate,
        post_act=None if case.post_act == "none" else case.post_act,
        backend=backend,
        device=weights.w1.device,
        dtype=torch_dtype(case),
    )
    return _with_weights(case, weights, module, FusedTail)


def under_compile(
    module: nn.Module, mode: str | None = None, fullgraph: bool = True
) -> tuple[nn.Module, Callable[[], None]]:
    """The module under torch.compile, and a check that raises unless something has been compiled since."""
    before = torch_private.compiled_graphs()
    options = {} if mode is None else {"mode": mode}

    def require_a_graph() -> None:
        if torch_private.compiled_graphs() == before:
            raise RuntimeError("torch.compile compiled nothing; is it disabled by the environment?")

    return torch.compile(module, fullgraph=fullgraph, dynamic=False, **options), require_a_graph


def _counted(before: Counter[str], case: Case) -> str:
    """The backends that the operator's own counters have seen since, each in every direction of the case.

    The reference counts no backward: PyTorch's autograd differentiates it.
    """
    ran = {key for key, calls in (Counter(senet_fused.call_counts()) - before).items() if calls}
    names = sorted({key.rpartition(".")[0] for key in ran})
    prefix = "tail_" if case.op == "tail" else ""
    for name in names:
        for direction in ("forward", "backward") if case.backward and name != "reference" else ("forward",):
            if f"{name}.{prefix}{direction}" not in ran:
                raise RuntimeError(f"the backend {name!r} counted no {direction} call")
    return "+".join(names)


def _builder(
    name: str, fused: bool = False, compiled: bool = False, mode: str | None = None, always: str | None = None
) -> Builder:
    """What builds a provider: the stock layer or the fused one, as it is or under torch.compile in this mode.

    always: the fused layer's backend, whichever is asked for.
    """

    def build(case: Case, weights: Weights, form: str, backend: str | None = None) -> Provider:
        how = {"backend": always or backend} if fused else {"form": form}
        module = _fused_module(case, weights, always or backend) if fused else _stock_module(case, weights, form)
        runs, require_a_graph = under_compile(module, mode) if compiled else (module, lambda: None)
        before = Counter(senet_fused.call_counts() if fused else ())

        def path() -> str:
            require_a_graph()
            counted = _counted(before, case) if fused else ""
            if fused and not compiled and not counted:
                raise RuntimeError("no backend counted a call")
            # A compiled graph in which nothing counts is the layer as plain PyTorch: inductor's code.
            return counted or ("inductor" if compiled else "aten")

        tail = isinstance(module, StockTail)
        se = module.se if tail else module
        found = [se.fc1.weight, se.fc1.bias, se.fc2.weight, se.fc2.bias]
        found += [module.weight, module.bias] if tail else []
        parameters = [parameter for parameter in found if parameter is not None]
        statistics = (module.mean, module.var) if tail else ()
        return Provider(name, runs, parameters, path, statistics=statistics, **how)

    return build


def is_ours(provider: Provider) -> bool:
    """Whether a provider that has run is held to this package's own rule: its code was ours, not torch.compile's."""
    if provider.name == "fused+compile":
        return provider.path() != "inductor"
    return provider.name in ("fused", *GPU_BACKENDS)


eager = _builder("eager")
# In the order of tables and pictures.
BUILDERS: dict[str, Builder] = {
    "eager": eager,
    "compile": _builder("compile", compiled=True),
    # Its own CUDA graphs would be graphs within the graph that is timed.
    "max-autotune": _builder("max-autotune", compiled=True, mode="max-autotune-no-cudagraphs"),
    "fused": _builder("fused", fused=True),
    **{name: _builder(name, fused=True, always=name) for name in GPU_BACKENDS},
    "fused+compile": _builder("fused+compile", fused=True, compiled=True),
}


def copy_ceiling() -> Provider:
    """``x.clone()``: one read and one write of the tensor, allocating its result as every layer does."""
    return Provider("copy", lambda x, residual: x.clone(), [], lambda: "aten")


def step(provider: Provider, inputs: InputSet) -> tuple[Tensor, Sequence[Tensor]]:
    """Forward and backward with a given dy. Nothing accumulates: autograd.grad returns fresh gradients."""
    y = provider.forward(inputs.x, inputs.residual)
    return y, torch.autograd.grad(y, _differentiated(provider, inputs), inputs.dy)


def _differentiated(provider: Provider, inputs: InputSet) -> list[Tensor]:
    return [inputs.x, *([] if inputs.residual is None else [inputs.residual]), *provider.parameters]


def backward_of(provider: Provider, inputs: InputSet) -> Callable[[], Sequence[Tensor]]:
    """The backward alone, as often as it is called: the graph of one forward, which runs now, is kept."""
    y, wanted, dy = provider.forward(inputs.x, inputs.residual), _differentiated(provider, inputs), inputs.dy
    return lambda: torch.autograd.grad(y, wanted, dy, retain_graph=True)


def results(provider: Provider, case: Case, inputs: InputSet) -> dict[str, Tensor]:
    """One call of the provider, its tensors named and shaped as the oracle's: y, with a backward every gradient, and a
    tail's running statistics after it."""
    found = {}
    if case.backward:
        y, gradients = step(provider, inputs)
        names = ["x", *([] if inputs.residual is None else ["residual"])]
        names += [name for name in PARAMETERS[: 6 if case.op == "tail" else 4] if case.bias or name not in ("b1", "b2")]
        for name, gradient in zip(names, gradients, strict=True):
            found[f"d{name}"] = gradient.reshape(gradient.shape[:2]) if name in ("w1", "w2") else gradient
    else:
        with torch.no_grad():
            # Detached as the timed inputs are: torch.compile would compile once more for those.
            y = provider.forward(*(None if t is None else t.detach() for t in (inputs.x, inputs.residual)))
    statistics = (tensor.clone() for tensor in provider.statistics)
    return {"y": y.detach(), **found, **dict(zip(("running_mean", "running_var"), statistics, strict=False))}
