"""The checks of the public functions' arguments, with their messages."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .. import torch_private
from ..activations import ACT_NAMES, GATE_NAMES, Activation
from ..call import Call
from ..reference import SQUEEZES

__all__ = ["check_functions", "check_input", "check_layer", "check_residual", "check_tail", "checked"]


def checked(check: Callable[..., None], *arguments: Any) -> None:
    """Runs a check, without the warnings of TorchScript's tracer about comparisons of sizes, on which the result does
    not depend."""
    if torch.compiler.is_compiling() or not torch_private.is_tracing():
        check(*arguments)
        return
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", torch.jit.TracerWarning)
        check(*arguments)


def check_layer(call: Call) -> None:
    """Raises TypeError or ValueError unless this is a call of an SE layer; the message says what was expected."""
    check_input(call.x)
    _check_weights(call)
    if call.residual is not None:
        check_residual(call.x, call.residual)
    if call.squeeze not in SQUEEZES:
        raise ValueError(f"squeeze must be one of {', '.join(SQUEEZES)}, got {call.squeeze!r}")
    _check_post_act(call.post_act)


def check_functions(act: Activation, gate: Activation, pre_act: Activation | None = None) -> None:
    """Raises ValueError unless act, gate and pre_act are supported as such."""
    if pre_act is not None and pre_act.name not in ACT_NAMES:
        raise ValueError(f"pre_act must be one of {', '.join(ACT_NAMES)}, or None, got {pre_act.name}")
    if act.name not in ACT_NAMES:
        raise ValueError(f"act must be one of {', '.join(ACT_NAMES)}, got {act.name}")
    if gate.name not in GATE_NAMES:
        raise ValueError(f"gate must be one of {', '.join(GATE_NAMES)}, got {gate.name}")


def _check_post_act(post_act: str) -> None:
    if post_act not in ("", "relu"):
        raise ValueError(f"post_act must be 'relu' or None, got {post_act!r}")


def check_tail(call: Call, running_mean: Tensor | None, running_var: Tensor | None) -> None:
    """As :func:`check_layer`, of a block tail and its running statistics, which a call has in evaluation only."""
    x, w1, w2, factor = call.x, call.w1, call.w2, call.factor
    check_input(x)
    samples, channels = x.shape[:2]
    if (w1 is None) != (w2 is None):
        raise ValueError("w1 and w2 go together: pass both for a gate, or neither")
    if w1 is not None:
        _check_weights(call)
    elif call.b1 is not None or call.b2 is not None:
        raise ValueError("b1 and b2 are biases of w1 and w2, which are missing")
    if (running_mean is None) != (running_var is None):
        raise ValueError("running_mean and running_var go together")
    vectors = {"running_mean": running_mean, "running_var": running_var, "weight": call.weight, "bias": call.bias}
    for name, t in (*vectors.items(), ("factor", factor)):
        if t is None:
            continue
        if not isinstance(t, Tensor) or not t.is_floating_point():
            kind = str(t.dtype) if isinstance(t, Tensor) else type(t).__name__
            raise TypeError(f"{name} must be a floating-point tensor or None, got {kind}")
        size = samples if name == "factor" else channels
        if t.dim() != 1 or t.shape[0] != size:
            what = "[N], one for each sample," if name == "factor" else "[C]"
            raise ValueError(f"{name} must be {what} = [{size}] for x {list(x.shape)}, got {list(t.shape)}")
        if t.device != x.device:
            raise ValueError(f"all tensors must be on one device: x is on {x.device}, {name} on {t.device}")
    if factor is not None and factor.requires_grad:
        raise ValueError("factor gets no gradient: pass factor.detach()")
    if call.norm == "given":
        if running_mean is None:
            raise ValueError("training=False normalises by running_mean and running_var, which are missing")
        if call.group:
            raise ValueError("group is for training only: evaluation uses the running statistics")
    elif samples * math.prod(x.shape[2:]) <= 1 and not call.group:
        values = "no value" if samples == 0 else "a single value"
        raise ValueError(
            f"Expected more than 1 value per channel when training, got input size {list(x.shape)}: {values} has no "
            "variance; use larger batches (drop_last=True drops a small last one) or module.eval()"
        )
    if call.residual is not None:
        check_residual(x, call.residual)
    _check_post_act(call.post_act)


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


def _check_weights(call: Call) -> None:
    x, w1, w2 = call.x, call.w1, call.w2
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
    for name, bias, size in (("b1", call.b1, reduced), ("b2", call.b2, channels)):
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
