"""From a checked call to its outputs: which backend serves it, and by which entry of its operator."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .. import ops, reference, select, torch_private
from ..call import TENSORS, Call, Outputs
from ..flops import in_dispatch_modes
from .checks import check_layer, checked

__all__ = ["PLAIN_TYPES", "explain", "needs_plain_operators", "route", "serve", "tail_route"]

PLAIN_TYPES = (Tensor, nn.Parameter)


def route(x: Tensor, backend: str | None) -> str:
    """The backend that serves an SE layer's call with x now.

    It is "reference", whatever is named, where something needs PyTorch's own operators: ONNX
    export, TorchScript's tracer, torch.func's transforms and forward-mode differentiation. Raises as :func:`explain`.
    """
    compiling = torch.compiler.is_compiling()
    chosen = select.choose(backend, x.device.type, x.dtype, compiling).backend
    return "reference" if needs_plain_operators() or (compiling and torch.onnx.is_in_onnx_export()) else chosen


def tail_route(x: Tensor, backend: str | None, pre_act: str = "") -> str:
    """As :func:`route`, of a block tail, with an activation behind its norm or none.

    Unlike an SE layer's, a tail's operator stays in a graph that torch.compile makes: on a CPU it is the faster one,
    and on a GPU it makes 10 passes a step where the compiler's own kernels make 15.
    """
    chosen = select.choose(backend, x.device.type, x.dtype, pre_act=pre_act != "").backend
    compiling = torch.compiler.is_compiling()
    return "reference" if needs_plain_operators() or (compiling and torch.onnx.is_in_onnx_export()) else chosen


# torch.compile enters transforms while it traces, so the answer is right, and guards on those that are outside.
@torch_private.constant_under_compile
def needs_plain_operators() -> bool:
    """Whether something needs PyTorch's own operators, which the reference is made of.

    TorchScript's tracer, torch.func's transforms (an operator's ``register_autograd`` has no torch.func.grad) and
    forward-mode differentiation (dual tensors would lose their tangents in a kernel).
    """
    return torch_private.is_tracing() or torch_private.func_transform() is not None or torch_private.in_dual_level()


def explain(x: Tensor, *, backend: str | None = None) -> select.Choice:
    """Which backend would serve ``squeeze_excite(x, ..., backend=backend)``, and why (``.backend``, ``.reason``).

    :func:`senet_fused.fuse_report` says whether a layer calls the function or its submodules instead.

    Raises:
        ValueError: an unknown backend name.
        BackendUnavailableError: the named backend cannot serve x.
    """
    return select.choose(backend, x.device.type, x.dtype)


def serve(call: Call, chosen: str, want_gate: bool = False) -> Outputs:
    """The outputs of a call by the backend that :func:`route` has chosen; an SE layer's call is checked here.

    y has eager PyTorch's dtype and memory layout. With want_gate the gate is not None.
    """
    if not call.norm:
        if chosen == "cpu" and not torch.is_grad_enabled():
            outputs = _serve_at_once(call, want_gate)
            if outputs is not None:
                return outputs
        checked(check_layer, call)
    compiling = torch.compiler.is_compiling()
    if chosen == "reference":
        outputs = reference.forward(call)
        if not compiling:
            ops.count_call("reference.tail_forward" if call.norm else "reference.forward")
        return outputs
    x, residual, narrow = call.x, call.residual, None
    if residual is not None and residual.dtype != x.dtype:
        # Kernels are written for one dtype; widening both is exact, and what the sum would do anyway.
        narrow = reference.accumulate_dtype(x)
        wider = torch.promote_types(x.dtype, residual.dtype)
        call = call._replace(x=x.to(wider), residual=residual.to(wider))
    plain, save = not (compiling or in_dispatch_modes()), False
    tensors: tuple[Tensor | None, ...] = (x, call.w1, call.b1, call.w2, call.b2, residual)
    for t in call[:TENSORS] if call.norm else tensors:
        if t is not None:
            save = save or t.requires_grad
            plain = plain and type(t) in PLAIN_TYPES
    save = save and torch.is_grad_enabled()
    operator = ops.OPERATORS[chosen]
    if not plain:
        outputs = operator.registered(call, save)
    elif save:
        outputs = operator.eager(call)
    else:
        outputs = operator.infer(call, want_gate)
    if narrow is not None and want_gate and outputs.gate is not None:
        outputs = outputs._replace(gate=outputs.gate.to(narrow))
    if not x.is_contiguous() and ops.layout_of(x) is None:
        # empty_like keeps the order of x's strides, as x * gate does.
        outputs = outputs._replace(y=torch.empty_like(call.x).copy_(outputs.y))
    return outputs


def _serve_at_once(call: Call, want_gate: bool) -> Outputs | None:
    """A float32 call of an SE layer on the CPU in eager mode, without gradients, or None if it needs the general path.

    A small layer's time is the host's, and within a network the caches hold little of the code that runs between two
    large convolutions: this is the shortest path to the kernels. They check sizes, dtypes and memory, and what
    they refuse takes the general path, which converts it or raises the right error.
    """
    x = call.x
    for t in (x, call.w1, call.w2, call.b1, call.b2):
        if t is not None and (type(t) not in PLAIN_TYPES or t.dtype is not torch.float32):
            return None
    if call.residual is not None or call.post_act or x.layout is not torch.strided:
        return None
    if torch.compiler.is_compiling() or in_dispatch_modes():
        return None
    return ops.infer_at_once(call, want_gate)
