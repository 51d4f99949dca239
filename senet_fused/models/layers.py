"""The parts of all networks here: their SE layers, and the modules that run BatchNorm -> SE -> + shortcut -> ReLU."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable

import torch
from torch import Tensor, nn

from senet_fused import Activation, FusedSE, FusedSETail, torch_private
from senet_fused.parts import has_hooks

__all__ = [
    "SE_CHOICES", "Layers", "ReferenceSE", "SeparateTail", "ShortcutConv", "check_rate", "initialise", "kept_samples",
]  # fmt: skip

SE_CHOICES = ("fused", "tails", "reference", None)
_SQUEEZES: dict[str, Callable[[Tensor], Tensor]] = {
    "avg": lambda x: x.mean((2, 3), keepdim=True),
    "max": lambda x: x.amax((2, 3), keepdim=True),
    "avgmax": lambda x: 0.5 * x.mean((2, 3), keepdim=True) + 0.5 * x.amax((2, 3), keepdim=True),
}


class Elementwise(nn.Module):
    """An elementwise function that torch.nn has no module for, such as a hardsigmoid with another slope."""

    def __init__(self, function: Activation) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


def _module_of(function: Activation) -> nn.Module:
    kinds = (nn.ReLU, nn.Sigmoid, nn.Identity, nn.ReLU6, nn.LeakyReLU, nn.SiLU, nn.GELU, nn.Hardswish, nn.Mish, nn.Tanh,
             nn.Hardsigmoid)  # fmt: skip
    return next((kind() for kind in kinds if Activation.of(kind()) == function), Elementwise(function))


class ReferenceSE(nn.Module):
    """A Squeeze-and-Excitation layer in PyTorch's own operators (Hu et al. 2018, section 3), to compare with.

    Equivalent to ``x * gate(fc2(act(fc1(squeeze(x)))))`` with 1x1 convolutions fc1 and fc2, as timm and Cadene have it;
    x is [N, C, H, W], and so is the result. The arguments are FusedSE's.
    """

    def __init__(self, channels: int, reduced: int, act: Activation, gate: Activation, squeeze: str) -> None:
        super().__init__()
        self.squeeze = squeeze
        self.fc1 = nn.Conv2d(channels, reduced, 1)
        self.act = _module_of(act)
        self.fc2 = nn.Conv2d(reduced, channels, 1)
        self.gate = _module_of(gate)

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gate(self.fc2(self.act(self.fc1(_SQUEEZES[self.squeeze](x)))))

    def extra_repr(self) -> str:
        return f"squeeze={self.squeeze}"


class SeparateTail(nn.Module):
    """act(se(norm(x)) * factor + residual) module by module; called like FusedSETail, with the same keys: none.

    The modules belong to ``owner`` and are looked up there by their names at every call, so that later replacements
    (SyncBatchNorm, nn.Identity) are called; a norm that is not a child of owner, such as another tail, becomes one of
    this module. A FusedSE followed by a residual and a ReLU does all three in one call, unless one of them has hooks.
    (nn.DataParallel's replicas would look at the original's modules, and are refused.)
    """

    def __init__(
        self, norm: nn.Module, se: nn.Module | None = None, act: nn.Module | None = None, *, owner: nn.Module
    ) -> None:
        super().__init__()
        names = {child: name for name, child in owner._modules.items()}
        self._owner, self._names = (owner,), tuple(names.get(module) for module in (norm, se, act))
        self.norm = None if norm in names else norm

    def forward(self, x: Tensor, residual: Tensor | None = None, factor: Tensor | None = None) -> Tensor:
        """y; x and residual [N, C, H, W], factor [N]."""
        norm, se, act = (name and self._owner[0]._modules[name] for name in self._names)
        y = (self.norm or norm)(x)
        if factor is None and residual is not None and _do_all(se, act):
            return se(y, residual, "relu")
        if se is not None:
            y = se(y)
        if factor is not None:
            y = y * factor.to(y.dtype)[:, None, None, None]
        if residual is not None:
            y = y + residual
        return y if act is None else act(y)

    def _replicate_for_data_parallel(self) -> SeparateTail:
        raise RuntimeError("nn.DataParallel cannot replicate this network's tails; use DistributedDataParallel")

    def extra_repr(self) -> str:
        return f"of its owner's {', '.join(name for name in self._names if name)}"


def _do_all(se: nn.Module | None, act: nn.Module | None) -> bool:
    """Whether + residual and act can be done by the SE layer's operator, and neither has hooks."""
    if type(se) is not FusedSE or type(act) is not nn.ReLU or se.post_act is not None:
        return False
    return not (has_hooks(se) or has_hooks(act) or torch_private.has_global_hooks())


class ShortcutConv(nn.Module):
    """BatchNorm(convolution(x)) as the shortcut of a block, under nn.Sequential's keys ``0`` and ``1``."""

    def __init__(self, conv: nn.Conv2d, layers: Layers) -> None:
        super().__init__()
        self.add_module("0", conv)
        self.add_module("1", nn.BatchNorm2d(conv.out_channels))
        self.tail = layers.tail(self, self._modules["1"])

    def forward(self, x: Tensor) -> Tensor:
        """[N, C_out, H, W] of x [N, C_in, H * stride, W * stride]."""
        return self.tail(self._modules["0"](x))


@dataclasses.dataclass(frozen=True)
class Layers:
    """How a network makes its SE layers, and what runs its BatchNorms.

    se: "fused", FusedSE; "tails", FusedSE and every BatchNorm with what follows it as one block tail; "reference",
        PyTorch's own operators; None, no SE layer at all: the twin without.
    reduction: r of R = max(1, C // r). squeeze, act, gate, backend: as in :func:`senet_fused.squeeze_excite`; backend
        is not for "reference" and None.
    """

    se: str | None = "fused"
    reduction: int = 16
    squeeze: str = "avg"
    act: str = "relu"
    gate: str = "sigmoid"
    backend: str | None = None

    def __post_init__(self) -> None:
        if self.se not in SE_CHOICES:
            raise ValueError(f"se must be 'fused', 'tails', 'reference' or None, got {self.se!r}")
        if self.backend is not None and self.se not in ("fused", "tails"):
            raise ValueError(f"backend={self.backend!r} is for se='fused' and 'tails', not for se={self.se!r}")
        with torch.device("meta"):
            self._make(1)  # for what it refuses

    @property
    def joins(self) -> bool:
        """Whether an SE layer becomes part of a tail: a maximum does not follow from BatchNorm's sums."""
        return self.se == "tails" and self.squeeze == "avg"

    def se_layer(self, channels: int) -> nn.Module | None:
        """An SE layer, or None."""
        return None if self.se is None else self._make(channels)

    def tail(
        self, owner: nn.Module, norm: nn.Module, se: nn.Module | None = None, act: nn.Module | None = None
    ) -> nn.Module:
        """What runs act(se(norm(x)) * factor + residual), of children of owner."""
        if self.se != "tails":
            return SeparateTail(norm, se, act, owner=owner)
        if se is None or self.joins:
            return FusedSETail(norm, se, act, owner=owner, backend=self.backend)
        return SeparateTail(self.tail(owner, norm), se, act, owner=owner)

    def _make(self, channels: int) -> nn.Module:
        fused = self.se != "reference"
        with contextlib.nullcontext() if fused else torch.device("meta"):
            layer = FusedSE(
                channels, self.reduction, bias=True, conv=True, act=self.act, gate=self.gate, squeeze=self.squeeze,
                backend=self.backend,
            )  # fmt: skip
        return layer if fused else ReferenceSE(channels, layer.rd_channels, layer.act, layer.gate, self.squeeze)


def check_rate(name: str, rate: float) -> None:
    """Raises ValueError unless 0 <= rate < 1."""
    if not 0 <= rate < 1:
        raise ValueError(f"{name} must be at least 0 and less than 1, got {rate!r}")


def initialise(network: nn.Module) -> None:
    """Draws the weights of all convolutions from He et al. 2015's normal distribution, by fan-out."""
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")


def kept_samples(x: Tensor, rate: float) -> Tensor:
    """[N] factors of stochastic depth for a batch x [N, ...]: 0 with probability rate, else 1 / (1 - rate), float32.

    In expectation 1, so that evaluation needs no factor (torchvision.ops.stochastic_depth with mode "row").
    """
    kept = torch.empty(x.shape[0], device=x.device, dtype=torch.float32)
    return kept.bernoulli_(1.0 - rate).div_(1.0 - rate)
