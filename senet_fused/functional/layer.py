"""squeeze_excite and excitation: check the call, choose the backend, run its operator."""

from __future__ import annotations

from typing import Literal, overload

from torch import Tensor, nn
from torch.overrides import handle_torch_function, has_torch_function

from .. import reference
from ..activations import Activation
from ..call import Call
from .checks import check_functions, check_input, checked
from .serve import route, serve

__all__ = ["Function", "excitation", "squeeze_excite"]

Function = str | Activation | nn.Module | type[nn.Module]


@overload
def squeeze_excite(
    x: Tensor,
    w1: Tensor,
    w2: Tensor,
    b1: Tensor | None = None,
    b2: Tensor | None = None,
    *,
    act: Function = "relu",
    gate: Function = "sigmoid",
    squeeze: str = "avg",
    residual: Tensor | None = None,
    post_act: str | None = None,
    backend: str | None = None,
    return_gate: Literal[False] = False,
) -> Tensor: ...
@overload
def squeeze_excite(
    x: Tensor,
    w1: Tensor,
    w2: Tensor,
    b1: Tensor | None = None,
    b2: Tensor | None = None,
    *,
    act: Function = "relu",
    gate: Function = "sigmoid",
    squeeze: str = "avg",
    residual: Tensor | None = None,
    post_act: str | None = None,
    backend: str | None = None,
    return_gate: Literal[True],
) -> tuple[Tensor, Tensor]: ...
@overload
def squeeze_excite(
    x: Tensor,
    w1: Tensor,
    w2: Tensor,
    b1: Tensor | None = None,
    b2: Tensor | None = None,
    *,
    act: Function = "relu",
    gate: Function = "sigmoid",
    squeeze: str = "avg",
    residual: Tensor | None = None,
    post_act: str | None = None,
    backend: str | None = None,
    return_gate: bool,
) -> Tensor | tuple[Tensor, Tensor]: ...
def squeeze_excite(
    x: Tensor,
    w1: Tensor,
    w2: Tensor,
    b1: Tensor | None = None,
    b2: Tensor | None = None,
    *,
    act: Function = "relu",
    gate: Function = "sigmoid",
    squeeze: str = "avg",
    residual: Tensor | None = None,
    post_act: str | None = None,
    backend: str | None = None,
    return_gate: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Squeeze-and-Excitation, fused, with a fused backward (Hu et al. 2018; equations in senet_fused.reference).

    Equivalent to::

        pooled = x.mean(spatial_dims)                                  # squeeze="avg"
        g = sigmoid(linear(relu(linear(pooled, w1, b1)), w2, b2))      # act="relu", gate="sigmoid"
        y = x * g[:, :, None, None]                                    # + residual, then relu with post_act="relu"

    Args:
        x: [N, C, *spatial] with one to three spatial dimensions; float64, float32, bfloat16 or float16. Contiguous and
            channels_last memory (and slices of a batch in either) is read in place; other strides are copied once.
        w1, w2: [R, C] and [C, R], or 1x1 convolution weights [R, C, 1, 1] and [C, R, 1, 1]; any floating dtype.
        b1, b2: [R] and [C], or None.
        act: function between the two layers: identity, relu, relu6, leaky_relu, silu, gelu, hardswish, mish, tanh or
            sigmoid; a name, a torch.nn module (class or instance) or a :class:`senet_fused.Activation`.
        gate: function after the second layer, likewise: sigmoid, hardsigmoid, tanh, relu or identity.
        squeeze: "avg"; "max" (torch.amax: ties share the gradient evenly); "avgmax", half of each (timm's add_maxpool).
        residual: a tensor of x's shape, added to the scaled x; None adds nothing.
        post_act: "relu" or None, applied last.
        backend: "auto", "cpu", "cuda", "triton" or "reference"; None takes the innermost ``use_backend``, then the
            environment variable SENET_FUSED_BACKEND, then "auto". A backend asked for by name never falls back. Under
            torch.func's transforms, forward-mode differentiation, ONNX export and torch.jit.trace the reference runs,
            whatever is named.
        return_gate: also return the gate.

    Returns:
        y with x's shape, eager PyTorch's memory layout for ``x * gate``, and dtype ``torch.result_type(x, residual)``
        (the same under autocast); with ``return_gate=True`` the pair (y, gate), gate being [N, C] in float32 (float64
        for float64 x). Both are differentiable. Sums and the excitation are float32, float64 for float64 x.

    Raises:
        ValueError: a shape, name or memory layout that does not fit; the message says what was expected.
        TypeError: an argument that is not a tensor, or not floating point.
        BackendUnavailableError: the named backend cannot serve this call.
    """
    act, gate = Activation.of(act), Activation.of(gate)
    tensors = (x, w1, w2, b1, b2, residual)
    if has_torch_function(tensors):
        # Text for act and gate: an FX graph holds nothing else of that kind.
        return handle_torch_function(
            squeeze_excite, tensors, x, w1, w2, b1, b2, act=act.spec, gate=gate.spec, squeeze=squeeze,
            residual=residual, post_act=post_act, backend=backend, return_gate=return_gate,
        )  # fmt: skip
    check_functions(act, gate)
    call = Call(
        x, None, None, None, None, w1, b1, w2, b2, residual, None, 0.0, "", act.spec, gate.spec, squeeze,
        post_act or "", "",
    )  # fmt: skip
    outputs = serve(call, route(x, backend) if isinstance(x, Tensor) else "reference", return_gate)
    if not return_gate:
        return outputs.y
    assert outputs.gate is not None
    return outputs.y, outputs.gate


def excitation(
    x: Tensor,
    w1: Tensor,
    w2: Tensor,
    b1: Tensor | None = None,
    b2: Tensor | None = None,
    *,
    act: Function = "relu",
    gate: Function = "sigmoid",
    squeeze: str = "avg",
    backend: str | None = None,
) -> Tensor:
    """The gate of :func:`squeeze_excite` alone, for layers that leave the multiplication to their caller.

    Equivalent to ``sigmoid(linear(relu(linear(x.mean(spatial_dims), w1, b1)), w2, b2))``, (E1) to (E3). x is read once,
    by PyTorch's own mean or maximum; the rest, forward and backward, is the operator's. A caller who only multiplies x
    by the gate is better served by squeeze_excite, whose backward reads x once for both.

    Args:
        As in :func:`squeeze_excite`.

    Returns:
        [N, C] in float32 (float64 for float64 x), differentiable.

    Raises:
        As :func:`squeeze_excite`.
    """
    act, gate = Activation.of(act), Activation.of(gate)
    tensors = (x, w1, w2, b1, b2)
    if has_torch_function(tensors):
        return handle_torch_function(
            excitation, tensors, x, w1, w2, b1, b2, act=act.spec, gate=gate.spec, squeeze=squeeze, backend=backend
        )
    check_functions(act, gate)
    checked(check_input, x)
    pooled = reference.pool(x, squeeze)[..., None]
    call = Call(pooled, None, None, None, None, w1, b1, w2, b2, None, None, 0.0, "", act.spec, gate.spec, "avg", "", "")
    of_x = serve(call, route(x, backend), True).gate
    assert of_x is not None
    return of_x
