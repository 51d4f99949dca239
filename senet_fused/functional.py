"""squeeze_excite: check the call, choose the backend, run its operator."""

from __future__ import annotations

import warnings

import torch
from torch import Tensor, nn
from torch.overrides import handle_torch_function, has_torch_function

from . import ops, reference, select, torch_private
from .activations import ACT_NAMES, GATE_NAMES, Activation
from .flops import in_dispatch_modes

__all__ = [
    "PLAIN_TYPES", "Function", "check_input", "check_residual", "check_weights", "excitation", "explain",
    "needs_plain_operators", "route", "serve", "squeeze_excite",
]  # fmt: skip

Function = str | Activation | nn.Module | type[nn.Module]

PLAIN_TYPES = (Tensor, nn.Parameter)


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
        gate: function behind the second layer, likewise: sigmoid, hardsigmoid, tanh, relu or identity.
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
        TypeError: an argument that is no tensor, or not floating point.
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
    chosen = route(x, backend) if isinstance(x, Tensor) else "reference"
    return serve(chosen, x, w1, w2, b1, b2, act, gate, squeeze, residual, post_act, return_gate)


def route(x: Tensor, backend: str | None) -> str:
    """The backend that serves a call with x now.

    It is "reference", whatever is named, where the call is seen by something that wants PyTorch's own operators: ONNX
    export, TorchScript's tracer, torch.func's transforms and forward-mode differentiation. Raises as :func:`explain`.
    """
    compiling = torch.compiler.is_compiling()
    chosen = select.choose(backend, x.device.type, x.dtype, compiling).backend
    if needs_plain_operators() or (compiling and torch.onnx.is_in_onnx_export()):
        return "reference"
    return chosen


def serve(
    chosen: str,
    x: Tensor,
    w1: Tensor,
    w2: Tensor,
    b1: Tensor | None,
    b2: Tensor | None,
    act: Activation,
    gate: Activation,
    squeeze: str,
    residual: Tensor | None,
    post_act: str | None,
    return_gate: bool,
) -> Tensor | tuple[Tensor, Tensor]:
    """:func:`squeeze_excite` by the backend that :func:`route` has chosen."""
    if chosen == "cpu" and residual is None and post_act is None and not return_gate and not torch.is_grad_enabled():
        result = _serve_at_once(x, w1, w2, b1, b2, act, gate, squeeze, False)
        if result is not None:
            return result[0]
    compiling = torch.compiler.is_compiling()
    check = _check_while_tracing if not compiling and torch_private.is_tracing() else _check
    check(x, w1, w2, b1, b2, act, gate, squeeze, residual, post_act)
    if chosen == "reference":
        y, g = reference.squeeze_excite(
            x, w1, w2, b1, b2, act=act, gate=gate, squeeze=squeeze, residual=residual, post_act=post_act
        )
        if not compiling:
            ops.count_call("reference.forward")
        return (y, g) if return_gate else y

    gate_dtype = None
    if residual is not None and residual.dtype != x.dtype:
        # Kernels are written for one dtype; widening both is exact, and what the sum would do anyway.
        gate_dtype = reference.accumulate_dtype(x)
        wider = torch.promote_types(x.dtype, residual.dtype)
        x, residual = x.to(wider), residual.to(wider)
    operator = ops.OPERATORS[chosen]
    arguments = (x, w1, b1, w2, b2, residual, act.spec, gate.spec, squeeze, post_act or "")
    plain, save = not (compiling or in_dispatch_modes()), False
    for t in (x, w1, w2, b1, b2, residual):
        if t is not None:
            save = save or t.requires_grad
            plain = plain and type(t) in PLAIN_TYPES
    save = save and torch.is_grad_enabled()
    if not plain:
        y, g, _, _ = operator.registered(*arguments, save)
    elif save:
        y, g, _, _ = operator.eager(*arguments, True)
    else:
        y, g = operator.infer(*arguments, return_gate)
    if gate_dtype is not None and g is not None:
        g = g.to(gate_dtype)
    if not x.is_contiguous() and ops.layout_of(x) is None:
        y = torch.empty_like(x).copy_(y)  # empty_like keeps the order of x's strides, as x * gate does
    return (y, g) if return_gate else y


def _serve_at_once(
    x: Tensor,
    w1: Tensor,
    w2: Tensor,
    b1: Tensor | None,
    b2: Tensor | None,
    act: Activation,
    gate: Activation,
    squeeze: str,
    want_gate: bool,
) -> tuple[Tensor, Tensor | None] | None:
    """A float32 call on the CPU in eager mode, without gradients: y and the gate, or None if it has to go the long way.

    A small layer's time is the host's, and within a network the caches hold little of the code that runs between two
    large convolutions: this is the least code that leads to the kernels. They check sizes, dtypes and memory, and what
    they refuse goes the long way, to be converted or to get its message.
    """
    for t in (x, w1, w2, b1, b2):
        if t is not None and (type(t) not in PLAIN_TYPES or t.dtype is not torch.float32):
            return None
    if torch.compiler.is_compiling() or in_dispatch_modes() or x.layout is not torch.strided:
        return None
    known = act.name in ACT_NAMES and gate.name in GATE_NAMES and squeeze in reference.SQUEEZES
    return ops.infer_at_once(x, w1, b1, w2, b2, act.spec, gate.spec, squeeze, want_gate) if known else None


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
    chosen = route(x, backend) if isinstance(x, Tensor) else "reference"
    check = _check_while_tracing if not torch.compiler.is_compiling() and torch_private.is_tracing() else _check
    check(x, w1, w2, b1, b2, act, gate, squeeze, None, None)
    pooled = reference.pool(x, squeeze)[..., None]
    if chosen == "cpu" and not torch.is_grad_enabled():
        result = _serve_at_once(pooled, w1, w2, b1, b2, act, gate, "avg", True)
        if result is not None:
            return result[1]
    return serve(chosen, pooled, w1, w2, b1, b2, act, gate, "avg", None, None, True)[1]


# torch.compile enters transforms while it traces, so the answer is right, and guards on those that are outside.
@torch_private.constant_under_compile
def needs_plain_operators() -> bool:
    """Whether the call is seen by something that wants PyTorch's own operators, which the reference is made of.

    TorchScript's tracer, torch.func's transforms (an operator's ``register_autograd`` has no torch.func.grad) and
    forward-mode differentiation (dual tensors would lose their tangents in a kernel).
    """
    return (
        torch_private.is_tracing()
        or torch_private.func_transform() is not None
        or torch_private.in_dual_level()
    )


def explain(x: Tensor, *, backend: str | None = None) -> select.Choice:
    """Which backend would serve ``squeeze_excite(x, ..., backend=backend)``, and why (``.backend``, ``.reason``).

    Whether a layer calls the function, or its children in place of it, :func:`senet_fused.fuse_report` says.

    Raises:
        ValueError: an unknown backend name.
        BackendUnavailableError: the named backend cannot serve x.
    """
    return select.choose(backend, x.device.type, x.dtype)


def _check(
    x: Tensor,
    w1: Tensor,
    w2: Tensor,
    b1: Tensor | None,
    b2: Tensor | None,
    act: Activation,
    gate: Activation,
    squeeze: str,
    residual: Tensor | None,
    post_act: str | None,
) -> None:
    check_input(x)
    check_weights(x, w1, w2, b1, b2)
    if residual is not None:
        check_residual(x, residual)
    if act.name not in ACT_NAMES:
        raise ValueError(f"act must be one of {', '.join(ACT_NAMES)}, got {act.name}")
    if gate.name not in GATE_NAMES:
        raise ValueError(f"gate must be one of {', '.join(GATE_NAMES)}, got {gate.name}")
    if squeeze not in reference.SQUEEZES:
        raise ValueError(f"squeeze must be one of {', '.join(reference.SQUEEZES)}, got {squeeze!r}")
    if post_act is not None and post_act != "relu":
        raise ValueError(f"post_act must be 'relu' or None, got {post_act!r}")


# In eager mode these lines cost as much as a small layer's arithmetic: each attribute of a tensor is read once.


def check_input(x: Tensor) -> None:
    """Raises TypeError or ValueError unless x is a dense floating-point tensor [N, C, *spatial] with positions."""
    if not isinstance(x, Tensor):
        raise TypeError(f"x must be a tensor [N, C, *spatial], got {type(x).__name__}")
    if not x.is_floating_point():
        raise TypeError(f"x must be floating point, got {x.dtype}; convert it, e.g. x.float()")
    if x.layout is not torch.strided or x.is_nested:
        raise ValueError(_dense("x", x))
    shape = x.shape
    if not 3 <= len(shape) <= 5:
        fix = "; for pooled features use x[..., None]" if len(shape) == 2 else "; use x.flatten(2)" if shape[5:] else ""
        raise ValueError(f"x must be [N, C, *spatial] with one to three spatial dimensions, got {_sizes(x)}{fix}")
    channels = shape[1]
    if channels == 0 or 0 in shape[2:]:
        raise ValueError(
            f"x must have at least one channel and one spatial position, got {_sizes(x)}; "
            "only N may be 0: leave empty images out, or pad them"
        )


def check_weights(x: Tensor, w1: Tensor, w2: Tensor, b1: Tensor | None, b2: Tensor | None) -> None:
    """Raises TypeError or ValueError unless these are weights and biases of an SE layer for x."""
    if not isinstance(w1, Tensor) or not isinstance(w2, Tensor):
        raise TypeError(f"w1 and w2 must be tensors, got {type(w1).__name__} and {type(w2).__name__}")
    shape1, shape2 = _check_weight("w1", w1), _check_weight("w2", w2)
    channels, reduced = x.shape[1], shape1[0]
    if reduced == 0:
        raise ValueError(f"w1 must be [R, C] with R >= 1, got {_sizes(w1)}; check the reduction ratio")
    if shape1[1] != channels:
        raise ValueError(
            f"x {_sizes(x)} has {channels} channels, but w1 {_sizes(w1)} is for {shape1[1]}; "
            f"{_channel_fix(x, w1)} (w1 is [R, C], w2 is [C, R])"
        )
    if shape2[0] != channels or shape2[1] != reduced:
        raise ValueError(f"w2 must be [C, R] = [{channels}, {reduced}] to go with w1 {_sizes(w1)}, got {_sizes(w2)}")
    device = x.device
    for name, w in (("w1", w1), ("w2", w2)):
        if w.device != device:
            raise ValueError(_devices(device, name, w))
    for name, bias, size in (("b1", b1, reduced), ("b2", b2, channels)):
        if bias is None:
            continue
        if not isinstance(bias, Tensor) or not bias.is_floating_point():
            raise TypeError(f"{name} must be a floating-point tensor or None, got {_kind(bias)}")
        length = bias.shape
        if len(length) != 1 or length[0] != size:
            raise ValueError(f"{name} must be [{size}], got {_sizes(bias)}")
        if bias.device != device:
            raise ValueError(_devices(device, name, bias))


def check_residual(x: Tensor, residual: Tensor) -> None:
    """Raises TypeError or ValueError unless residual can be added to x."""
    if not isinstance(residual, Tensor) or not residual.is_floating_point():
        raise TypeError(f"residual must be a floating-point tensor or None, got {_kind(residual)}")
    if residual.layout is not torch.strided or residual.is_nested:
        raise ValueError(_dense("residual", residual))
    if residual.shape != x.shape:
        raise ValueError(
            f"residual must have x's shape {_sizes(x)}, got {_sizes(residual)}; "
            "it is not broadcast: use residual.expand_as(x), or project the shortcut"
        )
    if residual.device != x.device:
        raise ValueError(_devices(x.device, "residual", residual))


def _check_while_tracing(*arguments: object) -> None:
    """TorchScript's tracer warns of every size that Python compares; these comparisons are no part of the result."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", torch.jit.TracerWarning)
        _check(*arguments)


def _check_weight(name: str, w: Tensor) -> torch.Size:
    if not w.is_floating_point():
        raise TypeError(f"{name} must be floating point, got {w.dtype}; convert it, e.g. {name}.float()")
    if w.layout is not torch.strided or w.is_nested:
        raise ValueError(_dense(name, w))
    shape = w.shape
    if len(shape) != 2 and (len(shape) < 2 or any(size != 1 for size in shape[2:])):
        layout = "[R, C]" if name == "w1" else "[C, R]"
        raise ValueError(f"{name} must be {layout}, or a 1x1 convolution's weight, got {_sizes(w)}")
    return shape


def _dense(name: str, t: Tensor) -> str:
    kind = "nested" if t.is_nested else t.layout
    return f"{name} must be a dense tensor, got a {kind} one; convert it, e.g. {name}.to_dense()"


def _devices(device: torch.device, name: str, t: Tensor) -> str:
    return (
        f"all tensors must be on one device: x is on {device}, {name} on {t.device}; "
        f"move one, e.g. the layer with layer.to({str(device)!r})"
    )


def _channel_fix(x: Tensor, w1: Tensor) -> str:
    wanted = w1.shape[1]
    if x.shape[-1] == wanted:
        return "if x is [N, *spatial, C], use x.movedim(-1, 1)"
    if x.shape[0] == wanted:
        return "if x is one sample without a batch, use x[None]"
    return f"make the layer for {x.shape[1]} channels"


def _sizes(t: Tensor) -> str:
    return str(list(t.shape))


def _kind(value: object) -> str:
    return str(value.dtype) if isinstance(value, Tensor) else type(value).__name__
