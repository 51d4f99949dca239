"""FusedSE, the drop-in layer: parameters, the state-dict contract, and the recording of gates."""

from __future__ import annotations

import contextlib
import functools
import warnings
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, NoReturn

import torch
from torch import Tensor, nn
from torch.overrides import has_torch_function

from . import select, state_dicts
from .activations import ACT_NAMES, GATE_NAMES, Activation
from .call import Call
from .functional import Function, check_input, check_residual, route, serve, squeeze_excite
from .parts import Part, Weights, parts_of, quantising, weights_or_reason
from .reference import SQUEEZES, accumulate_dtype

__all__ = ["FusedSE", "RecordsGates", "capture_gates", "reduced_channels"]


# A mixin for modules uses their methods without being one.
if TYPE_CHECKING:
    _Mixin = nn.Module
else:
    _Mixin = object


class RecordsGates(_Mixin):
    """A layer for :func:`capture_gates`: it hands its gate to _senet_record while _senet_captured is not None."""

    _senet_captured: _Call | None = None

    def _senet_record(self, gate: Tensor | None) -> None:
        self._senet_captured = _Call(gate, self._senet_captured)

    def _replicate_for_data_parallel(self) -> Any:
        if self._senet_captured is not None:
            warnings.warn("capture_gates: the gates of nn.DataParallel's replicas are not recorded", stacklevel=2)
        return super()._replicate_for_data_parallel()


class FusedSE(RecordsGates, nn.Module):
    """A Squeeze-and-Excitation layer (Hu et al. 2018), fused, in place of the usual ``SELayer(channel, reduction)``.

    Equivalent to::

        fc1, fc2 = nn.Linear(channels, R, bias=bias), nn.Linear(R, channels, bias=bias)
        y = x * sigmoid(fc2(relu(fc1(x.mean((2, 3))))))[:, :, None, None]     # + residual, then relu with post_act

    One seed gives the weights that the usual layer gets: ``fc1`` and ``fc2`` are nn.Linear, made in this order.

    The operator reads their weights and calls neither. Both are called instead, between PyTorch's own operators and
    whatever backend is named, if bypassing them would change a result: they have hooks (also global ones), pruning,
    weight or spectral norm, an adapter or a quantised layer has replaced one, their weights are not plain tensors, or
    their forward (of the object or of its class) is another one. :func:`senet_fused.fuse_report` gives the reason.

    Args:
        channels: C of x [N, C, *spatial], one to three spatial dimensions.
        reduction: R = max(1, channels // reduction), unless one of the next two is given.
        rd_channels: R itself.
        rd_divisor: the rule of timm's SEModule: R = channels / reduction rounded to the nearest multiple of rd_divisor
            (upwards from halfway), at least rd_divisor.
        bias: whether fc1 and fc2 have one (the original Caffe networks, timm and torchvision: yes; SELayer: no).
        conv: keep the weights as 1x1 convolutions do: fc1 and fc2 are nn.Conv2d, and saved weights [R, C, 1, 1] and
            [C, R, 1, 1], which the libraries whose layers are convolutions load back.
        act, gate, squeeze, post_act, backend: as in :func:`senet_fused.squeeze_excite`.
        device, dtype: of the parameters.

    State dicts load strictly in each of these namings, 2-D or 4-D: ``fc1/fc2`` (torchvision, timm, legacy SENet, our
    own), ``fc.0/fc.2`` (SELayer, MONAI), ``conv_reduce/conv_expand`` (EfficientNet in timm), ``squeeze/expand``
    (NVIDIA), ``conv1.conv/conv2.conv`` (OpenMMLab). Saved keys are ``fc1.weight`` [R, C] and ``fc2.weight``
    [C, R] (+ biases), 4-D with ``conv``.

    Raises:
        ValueError: sizes that are not positive integers, two rules for R, or unknown names.
    """

    def __init__(
        self,
        channels: int,
        reduction: int = 16,
        *,
        rd_channels: int | None = None,
        rd_divisor: int | None = None,
        bias: bool = False,
        conv: bool = False,
        act: Function = "relu",
        gate: Function = "sigmoid",
        squeeze: str = "avg",
        post_act: str | None = None,
        backend: str | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.channels = _positive("channels", channels)
        self.rd_channels = reduced_channels(channels, reduction, rd_channels, rd_divisor)
        self.act = _known("act", Activation.of(act), ACT_NAMES)
        self.gate = _known("gate", Activation.of(gate), GATE_NAMES)
        if squeeze not in SQUEEZES:
            raise ValueError(f"squeeze must be one of {', '.join(SQUEEZES)}, got {squeeze!r}")
        if post_act not in (None, "relu"):
            raise ValueError(f"post_act must be 'relu' or None, got {post_act!r}")
        select.check_name(backend, "FusedSE")
        self.squeeze = squeeze
        self.post_act = post_act
        self.backend = backend
        kind = functools.partial(nn.Conv2d, kernel_size=1) if conv else nn.Linear
        self.fc1 = kind(self.channels, self.rd_channels, bias=bias, device=device, dtype=dtype)
        self.fc2 = kind(self.rd_channels, self.channels, bias=bias, device=device, dtype=dtype)
        self.conv = conv
        self._parts: tuple[Part, ...] = parts_of(self)[1:]
        self._senet_captured = None

    def forward(self, x: Tensor, residual: Tensor | None = None, post_act: str | None = None) -> Tensor:
        """post_act(gate(x) * x + residual); x and residual [N, C, *spatial], dtypes and errors as in squeeze_excite.

        post_act: for this call; None is the layer's own.
        """
        return self._run(x, residual, self.post_act if post_act is None else post_act)

    def _run(self, x: Tensor, residual: Tensor | None, post_act: str | None) -> Tensor:
        weights = self._weights()
        if not isinstance(weights, tuple) or (type(x) is not Tensor and quantising(x)):
            return self._by_children(x, residual, post_act)
        recording = self._senet_captured is not None
        w1, w2, b1, b2 = weights
        if not isinstance(x, Tensor) or has_torch_function((x, w1, w2, b1, b2, residual)):
            # Overrides of functions, such as FX's, intercept this call, and may return anything.
            result: Any = squeeze_excite(
                x, w1, w2, b1, b2, act=self.act, gate=self.gate, squeeze=self.squeeze, residual=residual,
                post_act=post_act, backend=self.backend, return_gate=recording,
            )  # fmt: skip
            y, gate = result if recording else (result, None)
        else:
            call = Call(
                x, None, None, None, None, w1, b1, w2, b2, residual, None, 0.0, "", self.act.spec, self.gate.spec,
                self.squeeze, post_act or "", "",
            )  # fmt: skip
            outputs = serve(call, route(x, self.backend), recording)
            y, gate = outputs.y, outputs.gate
        if recording:
            self._senet_record(gate)
        return y

    def _weights(self) -> Weights | str:
        """w1, w2, b1, b2; or, as text, why fc1 and fc2 have to be called instead."""
        return weights_or_reason(self, self._parts, ("fc1",), ("fc2",))

    def _by_children(self, x: Tensor, residual: Tensor | None, post_act: str | None) -> Tensor:
        """The same by calling fc1 and fc2. x may be an FX proxy, which has no sizes."""
        sized = isinstance(x, Tensor)
        if sized and not torch.jit.is_tracing():
            check_input(x)
            if residual is not None:
                check_residual(x, residual)
        flat = x.flatten(2)
        pooled = flat.amax(2) if self.squeeze == "max" else flat.mean(2)
        if self.squeeze == "avgmax":
            pooled = 0.5 * pooled + 0.5 * flat.amax(2)
        hidden = self.act(self._call(self.fc1, pooled))
        gate = self.gate(self._call(self.fc2, hidden))
        if self._senet_captured is not None:
            self._senet_record(gate.to(accumulate_dtype(x)))
        if sized:
            y = x * gate.to(x.dtype)[(...,) + (None,) * (x.dim() - 2)]
        else:  # [*spatial, N, C] * [N, C]
            y = (x.movedim((0, 1), (-2, -1)) * gate).movedim((-2, -1), (0, 1))
        if residual is not None:
            y = y + residual
        return torch.relu(y) if post_act == "relu" else y

    def _call(self, child: nn.Module, v: Tensor) -> Tensor:
        """child(v), [N, out] for v [N, in], in the dimensions and dtype of child's weight, if it has one."""
        weight = getattr(child, "weight", None)
        dimensions = 2 if self.conv else 0
        if isinstance(weight, Tensor):
            dimensions = weight.dim() - 2
            if weight.is_floating_point() and isinstance(v, Tensor):
                v = v.to(weight.dtype)
        return child(v[(...,) + (None,) * dimensions]).flatten(1)

    @classmethod
    def from_module(cls, layer: nn.Module) -> FusedSE:
        """A FusedSE with a copy of another SE layer's weights, which computes what that layer computes.

        Supports every layer that :func:`senet_fused.fuse` supports and that returns its scaled input. A copy of it is
        run on random input and compared before the new layer is made.

        Raises:
            ValueError: the layer is not supported, or computes something else; the message says why.
        """
        from .fusion.convert import from_module  # which is above this module: fusion converts layers to these

        return from_module(cls, layer)

    @classmethod
    def from_state_dict(cls, state_dict: Mapping[str, Tensor], **options: object) -> FusedSE:
        """A FusedSE of the sizes, bias and dtype in a state dict (namings as above), with its weights loaded.

        Functions do not follow from weights: pass ``act``, ``gate``, ``squeeze``, ``post_act`` where they are not relu,
        sigmoid, avg and none. Raises ValueError if the dict is not that of one SE layer.
        """
        return state_dicts.from_state_dict(cls, state_dict, **options)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any) -> None:
        # The dict is load_state_dict's own copy; the children read it after this.
        state_dicts.rename_keys(state_dict, prefix, self)
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    def __getstate__(self) -> dict[str, object]:
        return {**super().__getstate__(), "_senet_captured": None}

    def __prepare_scriptable__(self) -> NoReturn:
        raise RuntimeError(
            "torch.jit.script cannot compile FusedSE; record it with torch.jit.trace, or with torch.export"
        )

    def extra_repr(self) -> str:
        parts = [f"{self.channels}, rd_channels={self.rd_channels}", f"act={self.act.spec}", f"gate={self.gate.spec}"]
        parts += [f"squeeze={self.squeeze}"] if self.squeeze != "avg" else []
        parts += [f"{key}={value}" for key in ("post_act", "backend") if (value := getattr(self, key)) is not None]
        return ", ".join(parts)


class _Call:
    """One recorded call: its gate, and the call before; the first of a recording has neither.

    Not a list: torch.compile would guard on its length, and compile again for every call.
    """

    __slots__ = ("before", "gate")

    def __init__(self, gate: Tensor | None, before: _Call | None) -> None:
        self.gate, self.before = gate, before


class CapturedGates(Mapping[str, list[Tensor]]):
    """What :func:`capture_gates` has recorded so far: a read-only dict from a layer's name to the list of its gates."""

    def __init__(self, layers: dict[str, RecordsGates]) -> None:
        self._layers = layers
        self._calls: dict[str, _Call | None] = {}

    def __getitem__(self, name: str) -> list[Tensor]:
        call = self._calls[name] if name in self._calls else self._layers[name]._senet_captured
        gates = []
        while call is not None and call.gate is not None:
            gates.append(call.gate)
            call = call.before
        gates.reverse()
        return gates

    def __iter__(self) -> Iterator[str]:
        return iter(self._layers)

    def __len__(self) -> int:
        return len(self._layers)

    def __repr__(self) -> str:
        return repr(dict(self))

    def _start(self) -> None:
        for layer in self._layers.values():
            layer._senet_captured = _Call(None, None)

    def _stop(self) -> None:
        for name, layer in self._layers.items():
            self._calls[name], layer._senet_captured = layer._senet_captured, None


@contextlib.contextmanager
def capture_gates(model: nn.Module) -> Iterator[CapturedGates]:
    """Records the gates of every fused layer in a model, FusedSE or converted by fuse, by the layer's name.

    The value is a list with one [N, C] tensor a call, in the order of the calls: float32 (float64 for float64 input),
    differentiable, so that a penalty on gates can be trained. Layers that were not called have an empty list. It can be
    read within the block and after it. A compiled model is compiled once more, for recording.

    Raises:
        ValueError: the model has no fused layer.
        RuntimeError: gates of this model are being recorded already.

    >>> with senet_fused.capture_gates(model) as gates:
    ...     loss = criterion(model(x), target) + 1e-4 * sum(g.mean() for calls in gates.values() for g in calls)
    """
    layers = {name: module for name, module in model.named_modules() if isinstance(module, RecordsGates)}
    if not layers:
        raise ValueError(f"capture_gates: {type(model).__name__} has no FusedSE layer and none that fuse has converted")
    if any(layer._senet_captured is not None for layer in layers.values()):
        raise RuntimeError("capture_gates: the gates of this model are being recorded already")
    gates = CapturedGates(layers)
    gates._start()
    try:
        yield gates
    finally:
        gates._stop()


def reduced_channels(
    channels: int, reduction: int = 16, rd_channels: int | None = None, rd_divisor: int | None = None
) -> int:
    """R, the width of the bottleneck (see :class:`FusedSE`). Raises ValueError unless all are positive integers."""
    _positive("channels", channels)
    if rd_channels is not None:
        if rd_divisor is not None:
            raise ValueError("give rd_channels or rd_divisor, not both")
        return _positive("rd_channels", rd_channels)
    _positive("reduction", reduction)
    if rd_divisor is None:
        return max(1, channels // reduction)
    _positive("rd_divisor", rd_divisor)
    # timm.layers.SEModule: make_divisible(channels * rd_ratio, rd_divisor, round_limit=0.0)
    return max(rd_divisor, int(channels * (1.0 / reduction) + rd_divisor / 2) // rd_divisor * rd_divisor)


def _positive(name: str, value: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"{name} must be a positive integer, got {value!r}")
    return value


def _known(role: str, function: Activation, names: tuple[str, ...]) -> Activation:
    if function.name not in names:
        raise ValueError(f"{role} must be one of {', '.join(names)}, got {function.name}")
    return function
