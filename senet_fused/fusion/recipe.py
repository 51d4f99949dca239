"""A recipe: how the parts of somebody's SE layer become one call of squeeze_excite."""

from __future__ import annotations

import dataclasses
import inspect
from typing import Any

import torch
from torch import Tensor, nn

from ..activations import Activation
from ..call import Call
from ..functional import excitation, serve, squeeze_excite
from ..modules import FusedSE
from ..parts import PLAIN_TENSORS, Part, Weights, is_stand_in, parts_of, quantising, weights_or_reason

__all__ = ["FORMS", "GATE_FORMS", "Recipe"]

# What a layer returns: x * gate, x * gate + x, the gate [N, C, 1, ...], or the gate [N, C].
GATE_FORMS = ("gate", "flat_gate")
FORMS = ("scale", "residual", *GATE_FORMS)


@dataclasses.dataclass(frozen=True)
class Recipe:
    """What a layer computes, as arguments of squeeze_excite, with the parts that it depends on.

    kind: the family in words. first, second: paths of the two children with the weights. act, gate, squeeze: as in
        squeeze_excite. form: one of :data:`FORMS`. channels, rd_channels: C and R. channels_last: x is
        [N, *spatial, C]. dimensions: the numbers of spatial dimensions of x that it holds for. argument: the name of
        x in the layer's forward. parts: the layer and its submodules, outermost first.
    """

    kind: str
    first: tuple[str, ...]
    second: tuple[str, ...]
    act: Activation
    gate: Activation
    squeeze: str
    form: str
    channels: int
    rd_channels: int
    channels_last: bool
    dimensions: tuple[int, ...]
    argument: str
    parts: tuple[Part, ...]

    @classmethod
    def of(cls, layer: nn.Module, kind: str, first: str, second: str) -> Recipe:
        """What the usual layer with weights at these paths computes: x * sigmoid(fc2(relu(fc1(mean of x))))."""
        rd_channels, channels = layer.get_submodule(first).weight.shape[:2]
        return cls(
            kind=kind,
            first=tuple(first.split(".")),
            second=tuple(second.split(".")),
            act=Activation("relu"),
            gate=Activation("sigmoid"),
            squeeze="avg",
            form="scale",
            channels=channels,
            rd_channels=rd_channels,
            channels_last=False,
            dimensions=_dimensions(layer),
            argument=next(iter(inspect.signature(layer.forward).parameters), ""),
            parts=parts_of(layer),
        )

    @classmethod
    def of_fused_se(cls, layer: FusedSE) -> Recipe:
        """The recipe of a layer of this package, without its post_act."""
        functions = {"act": layer.act, "gate": layer.gate, "squeeze": layer.squeeze}
        return dataclasses.replace(cls.of(layer, "FusedSE", "fc1", "fc2"), dimensions=(1, 2, 3), **functions)

    def input_of(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """x, of a call with that one argument; None for any other call."""
        if len(args) == 1 and not kwargs:
            return args[0]
        if len(kwargs) == 1 and not args:
            return kwargs.get(self.argument)
        return None

    def weights(self, layer: nn.Module) -> Weights | str:
        """w1, w2, b1, b2 of the layer; or, as text, why its parts have to be called instead."""
        return weights_or_reason(layer, self.parts, self.first, self.second)

    def accepts(self, x: Any) -> bool:
        """Whether the recipe holds for this input; any other goes to the layer's own forward."""
        if type(x) not in PLAIN_TENSORS:
            if isinstance(x, torch.fx.Proxy):
                return not quantising(x) and self.form not in GATE_FORMS  # whose shape FX does not know
            if not is_stand_in(x):
                return False
        if not torch.jit.is_tracing() and x.numel() == 0 and x.shape[0] != 0:  # which a tracer would warn of
            return False
        return x.dim() - 2 in self.dimensions

    def apply(
        self, weights: Weights, x: Tensor, *, chosen: str, with_gate: bool = False, backend: str | None = None
    ) -> tuple[Tensor, Any]:
        """What the layer returns for x, and the gate [N, C] if it is wanted (None if not).

        chosen: the backend, from functional.route. backend: the one asked for, where FX is to see squeeze_excite.
        """
        if self.form in GATE_FORMS:
            gate = excitation(x, *weights, act=self.act, gate=self.gate, squeeze=self.squeeze, backend=chosen)
            y = gate.to(_gate_dtype(x))
            return (y if self.form == "flat_gate" else y[(..., *(None,) * (x.dim() - 2))]), gate
        planes = x.movedim(-1, 1) if self.channels_last else x
        residual = planes if self.form == "residual" else None
        if isinstance(x, torch.fx.Proxy):
            options: dict[str, Any] = {"act": self.act, "gate": self.gate, "squeeze": self.squeeze, "backend": backend}
            y = squeeze_excite(planes, *weights, residual=residual, **options)
            gate = None
        else:
            w1, w2, b1, b2 = weights
            call = Call(
                planes, None, None, None, None, w1, b1, w2, b2, residual, None, 0.0, "", self.act.spec, self.gate.spec,
                self.squeeze, "", "",
            )  # fmt: skip
            y, _, gate, *_ = serve(call, chosen, with_gate)
        return (y.movedim(1, -1) if self.channels_last else y), gate


def _gate_dtype(x: Tensor) -> torch.dtype:
    """The dtype that PyTorch's own operators give a gate: x's, or autocast's."""
    kind = x.device.type
    if x.dtype == torch.float64 or not torch.is_autocast_enabled(kind):
        return x.dtype
    return torch.get_autocast_dtype(kind)


_OF_DIMENSIONS = {
    1: (nn.Conv1d, nn.AdaptiveAvgPool1d),
    2: (nn.Conv2d, nn.AdaptiveAvgPool2d),
    3: (nn.Conv3d, nn.AdaptiveAvgPool3d),
}


def _dimensions(layer: nn.Module) -> tuple[int, ...]:
    """As many as the layer's pooling or convolutions have; two if it has neither."""
    found = (d for module in layer.modules() for d, kinds in _OF_DIMENSIONS.items() if isinstance(module, kinds))
    return (next(found, 2),)
