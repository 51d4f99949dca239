"""A recipe: how the parts of somebody's SE layer become one call of squeeze_excite."""

from __future__ import annotations

import dataclasses
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

    @classmethod
    def of_fused_se(cls, layer: FusedSE) -> Recipe:
        """The recipe of a layer of this package, without its post_act."""
        return cls(
            kind="FusedSE", first=("fc1",), second=("fc2",), act=layer.act, gate=layer.gate, squeeze=layer.squeeze,
            form="scale", channels=layer.channels, rd_channels=layer.rd_channels, channels_last=False,
            dimensions=(1, 2, 3), argument="x", parts=parts_of(layer),
        )  # fmt: skip

    def mismatch(self, x: Any) -> str | None:
        """Why this input goes to the layer's own forward; None if the recipe holds for it."""
        if type(x) not in PLAIN_TENSORS:
            if isinstance(x, torch.fx.Proxy):
                if quantising(x):
                    return "FX quantisation is to see its children"
                return "a gate's shape is not known to FX" if self.form in GATE_FORMS else None
            if not is_stand_in(x):
                return f"its input is a {type(x).__name__}, not a plain tensor"
        if not torch.jit.is_tracing() and x.numel() == 0 and x.shape[0] != 0:  # which a tracer would warn of
            return "its input has no positions"
        if x.dim() - 2 not in self.dimensions:
            known = " or ".join(str(d + 2) for d in self.dimensions)
            return f"its input has {x.dim()} dimensions; the layer was read for {known}"
        return None

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
