"""block_tail: check the call, choose the backend, run its operator, keep the running statistics."""

from __future__ import annotations

import math
import warnings
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function

from .. import select, torch_private
from ..activations import ACT_NAMES, GATE_NAMES, Activation
from ..flops import in_dispatch_modes
from ..functional import PLAIN_TYPES, Function, check_input, check_residual, check_weights, needs_plain_operators
from ..ops import count_call, layout_of
from . import reference
from .ops import OPERATORS

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

__all__ = ["block_tail", "route"]


def block_tail(
    x: Tensor,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    w1: Tensor | None = None,
    w2: Tensor | None = None,
    b1: Tensor | None = None,
    b2: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
    act: Function = "relu",
    gate: Function = "sigmoid",
    residual: Tensor | None = None,
    post_act: str | None = None,
    factor: Tensor | None = None,
    group: ProcessGroup | None = None,
    backend: str | None = None,
) -> Tensor:
    """BatchNorm -> Squeeze-and-Excitation -> + residual -> ReLU, fused: the tail of a residual block.

    BatchNorm's output is never stored: two sweeps over x forward and two backward, 4 and 6 passes over memory where
    PyTorch's own operators make 11 and 18 (equations in ``senet_fused.tails.reference``; Ioffe & Szegedy 2015; Hu et
    al. 2018).

    Equivalent to::

        z = F.batch_norm(x, running_mean, running_var, weight, bias, training, momentum, eps)
        z = z * sigmoid(linear(relu(linear(z.mean(spatial_dims), w1, b1)), w2, b2))[:, :, None, None]  # with w1 and w2
        y = relu(z * factor[:, None, None, None] + residual)    # what there is of factor, residual and post_act="relu"

    Args:
        x: [N, C, *spatial] with one to three spatial dimensions; float64, float32, bfloat16 or float16. Contiguous and
            channels_last memory (and slices of a batch in either) is read in place; other strides are copied once.
        running_mean, running_var: [C], or None. In training they are updated in place, as F.batch_norm does.
        weight, bias: BatchNorm's [C], or None for ones and zeros.
        w1, w2, b1, b2, act, gate: the SE layer's, as in :func:`senet_fused.squeeze_excite`, which squeezes by the mean.
            Without w1 and w2 there is no gate.
        training: normalise by the statistics of x; otherwise by the running ones.
        momentum, eps: as F.batch_norm's.
        residual: a tensor of x's shape that is added, or None.
        post_act: "relu" or None, applied last.
        factor: [N], what multiplies each sample's branch before the residual is added (stochastic depth), or None. It
            gets no gradient.
        group: processes whose samples share the statistics in training (synchronised BatchNorm), None for this one
            alone. All of them have to make the same calls.
        backend: as in :func:`senet_fused.squeeze_excite`.

    Returns:
        y with x's shape and memory layout, and dtype ``torch.result_type(x, residual)``. Sums, statistics and the
        excitation are float32, float64 for float64 x.

    Raises:
        ValueError: a shape, name or memory layout that does not fit, running statistics that are missing, or a single
            value per channel in training; the message says what was expected.
        TypeError: an argument that is no tensor, or not floating point.
        BackendUnavailableError: the named backend cannot serve this call.
    """
    act, gate = Activation.of(act), Activation.of(gate)
    tensors = (x, running_mean, running_var, weight, bias, w1, w2, b1, b2, residual, factor)
    if has_torch_function(tensors):
        return handle_torch_function(
            block_tail, tensors, x, running_mean, running_var, weight, bias, w1=w1, w2=w2, b1=b1, b2=b2,
            training=training, momentum=momentum, eps=eps, act=act.spec, gate=gate.spec, residual=residual,
            post_act=post_act, factor=factor, group=group, backend=backend,
        )  # fmt: skip
    compiling = torch.compiler.is_compiling()
    check = _check_while_tracing if not compiling and torch_private.is_tracing() else _check
    check(x, running_mean, running_var, weight, bias, w1, w2, b1, b2, training, act, gate, residual, post_act, factor,
          group)  # fmt: skip
    mean, var = (None, None) if training else (running_mean, running_var)
    chosen = route(x, backend)
    if chosen == "reference":
        y, statistics = reference.block_tail(
            x, weight, bias, mean, var, w1, b1, w2, b2, eps=eps, act=act, gate=gate, residual=residual,
            post_act=post_act, factor=factor, group=group,
        )  # fmt: skip
        if not compiling:
            count_call("reference.tail_forward")
    else:
        if residual is not None and residual.dtype != x.dtype:
            wider = torch.promote_types(x.dtype, residual.dtype)
            x, residual = x.to(wider), residual.to(wider)
        tensors = (x, weight, bias, mean, var, w1, b1, w2, b2, residual, factor)
        name = "" if group is None else group.group_name
        plain, save = not (compiling or in_dispatch_modes()), False
        for t in tensors:
            if t is not None:
                save = save or t.requires_grad
                plain = plain and type(t) in PLAIN_TYPES
        save = save and torch.is_grad_enabled()
        operator = OPERATORS[chosen]
        run = operator.registered if not plain else operator.eager if save else operator.infer
        y, statistics, *_ = run(*tensors, eps, act.spec, gate.spec, post_act or "", name, save)
        if not x.is_contiguous() and layout_of(x) is None:
            y = torch.empty_like(x).copy_(y)
    if training and running_mean is not None:
        _track(running_mean, running_var, statistics, momentum, at_once=x.is_cuda and not compiling)
    return y


@torch.no_grad()
def _track(running_mean: Tensor, running_var: Tensor, statistics: Tensor, momentum: float, at_once: bool) -> None:
    """Moves the running statistics towards those of the batch, in place. at_once: in one launch, if it can be."""
    running, now = [running_mean, running_var], [statistics[0], statistics[2]]
    if at_once and running_mean.dtype == running_var.dtype == statistics.dtype:
        torch_private.lerp_all(running, now, momentum)
        return
    for r, s in zip(running, now, strict=True):
        if r.dtype == s.dtype:
            r.lerp_(s, momentum)
        else:
            r.copy_(torch.lerp(r.to(s.dtype), s, momentum))


def route(x: Tensor, backend: str | None) -> str:
    """The backend that serves a call with x now, as :func:`senet_fused.functional.route` says it of an SE layer.

    Unlike an SE layer's, a tail's operator stays in a graph that torch.compile makes: on a CPU it is the faster one,
    and on a GPU it makes 10 passes a step where the compiler's own kernels make 15.

    Raises:
        ValueError: an unknown backend name.
        BackendUnavailableError: the named backend cannot serve x.
    """
    chosen = select.choose(backend, x.device.type, x.dtype).backend
    if needs_plain_operators() or (torch.compiler.is_compiling() and torch.onnx.is_in_onnx_export()):
        return "reference"
    return chosen


def _check(
    x: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    w1: Tensor | None,
    w2: Tensor | None,
    b1: Tensor | None,
    b2: Tensor | None,
    training: bool,
    act: Activation,
    gate: Activation,
    residual: Tensor | None,
    post_act: str | None,
    factor: Tensor | None,
    group: object | None,
) -> None:
    check_input(x)
    samples, channels = x.shape[:2]
    if (w1 is None) != (w2 is None):
        raise ValueError("w1 and w2 go together: give both for a gate, neither for none")
    if w1 is not None:
        check_weights(x, w1, w2, b1, b2)
    elif b1 is not None or b2 is not None:
        raise ValueError("b1 and b2 are biases of w1 and w2, which are not there")
    if (running_mean is None) != (running_var is None):
        raise ValueError("running_mean and running_var go together")
    vectors = (("running_mean", running_mean, channels), ("running_var", running_var, channels),
               ("weight", weight, channels), ("bias", bias, channels), ("factor", factor, samples))  # fmt: skip
    for name, t, size in vectors:
        if t is None:
            continue
        if not isinstance(t, Tensor) or not t.is_floating_point():
            kind = str(t.dtype) if isinstance(t, Tensor) else type(t).__name__
            raise TypeError(f"{name} must be a floating-point tensor or None, got {kind}")
        if t.dim() != 1 or t.shape[0] != size:
            what = "[N], one for each sample," if name == "factor" else "[C]"
            raise ValueError(f"{name} must be {what} = [{size}] for x {list(x.shape)}, got {list(t.shape)}")
        if t.device != x.device:
            raise ValueError(f"all tensors must be on one device: x is on {x.device}, {name} on {t.device}")
    if factor is not None and factor.requires_grad:
        raise ValueError("factor gets no gradient: pass factor.detach()")
    if not training:
        if running_mean is None:
            raise ValueError("training=False normalises by running_mean and running_var, which are not there")
        if group is not None:
            raise ValueError("group is for training: in evaluation the running statistics are used")
    elif samples * math.prod(x.shape[2:]) <= 1 and group is None:
        values = "no value" if samples == 0 else "a single value"
        raise ValueError(
            f"Expected more than 1 value per channel when training, got input size {list(x.shape)}: {values} has no "
            "variance; use larger batches (drop_last=True drops a small last one) or module.eval()"
        )
    if residual is not None:
        check_residual(x, residual)
    if act.name not in ACT_NAMES:
        raise ValueError(f"act must be one of {', '.join(ACT_NAMES)}, got {act.name}")
    if gate.name not in GATE_NAMES:
        raise ValueError(f"gate must be one of {', '.join(GATE_NAMES)}, got {gate.name}")
    if post_act is not None and post_act != "relu":
        raise ValueError(f"post_act must be 'relu' or None, got {post_act!r}")


def _check_while_tracing(*arguments: object) -> None:
    """As functional's: the sizes that are compared here are no part of the result."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", torch.jit.TracerWarning)
        _check(*arguments)
