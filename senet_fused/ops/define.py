"""The operators, written once for every backend and for the whole family: schema, allocation (which is also the fake),
backward rule, second order, vmap.

A dispatch key holds one kernel per operator, so each backend has operators of its own, ``fused_se_<backend>`` and
``fused_se_<backend>_backward``, made by one loop from the same text. A backend brings two functions that fill tensors
allocated here, ``forward(call, outputs, channels_last)`` and ``backward(call, gradients, channels_last)`` (types in
:mod:`senet_fused.call`). They may assume that x, residual, dy and every output of x's shape have that one dense layout,
and that weights and vectors are contiguous and of dtypes that it reads.

Second order comes from :mod:`senet_fused.reference`: the backward operator's own backward differentiates the equations
of the backward.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import reference, torch_private
from ..backends import cuda, native, triton
from ..call import Call, GradientCall, Gradients, Outputs
from ..flops import in_dispatch_modes
from ..reference import accumulate_dtype
from .counts import count_call
from .layout import (
    as_vector,
    as_weights,
    empty_like,
    empty_mask,
    gradient_target,
    in_layout,
    is_channels_last,
    unpack_mask,
)

__all__ = ["OPERATORS", "TENSORS", "Operator", "infer_at_once"]

# The fields of Call, and of GradientCall.
FORWARD_SCHEMA = (
    "(Tensor x, Tensor? weight, Tensor? bias, Tensor? mean, Tensor? var, Tensor? w1, Tensor? b1, Tensor? w2, "
    "Tensor? b2, Tensor? residual, Tensor? factor, str norm, float eps, str act, str gate_fn, str squeeze, "
    "str post_act, str group, bool save) "
    "-> (Tensor y, Tensor statistics, Tensor gate, Tensor saved, Tensor mask)"
)
BACKWARD_SCHEMA = (
    "(Tensor dy, Tensor? dgate, Tensor x, Tensor? weight, Tensor? bias, Tensor? w1, Tensor? b1, Tensor? w2, "
    "Tensor? b2, Tensor? factor, Tensor? statistics, Tensor? gate, Tensor? saved, Tensor? mask, str norm, float eps, "
    "str act, str gate_fn, str squeeze, str post_act, str group, bool need_x, bool need_weights, bool need_residual) "
    "-> (Tensor dx, Tensor dweight, Tensor dbias, Tensor dw1, Tensor db1, Tensor dw2, Tensor db2, Tensor dresidual)"
)
TENSORS = Call._fields.index("norm")  # of a Call, which begins with them
_PARAMETERS = tuple(Call._fields.index(name) for name in ("weight", "bias", "w1", "b1", "w2", "b2"))
_RESIDUAL = Call._fields.index("residual")


# ---------------------------------------------------------------------------------------------------- allocation


def _allocate(call: Call, channels_last: bool, gate: bool, saved: bool, mask: bool) -> Outputs:
    """The outputs that are to be kept; with a norm the kernels need gate and saved in any case."""
    x, w1 = call.x, call.w1
    n, c = x.shape[:2]
    wide = accumulate_dtype(x)
    statistics = None
    if call.norm:
        statistics = x.new_empty((3, c), dtype=wide)
        gate = saved = True
    if w1 is None:
        gate = saved = False
    return Outputs(
        empty_like(x, channels_last),
        statistics,
        x.new_empty((n, c), dtype=wide) if gate else None,
        x.new_empty((n, (c if call.squeeze == "avg" else 3 * c) + w1.shape[0]), dtype=wide) if saved else None,
        empty_mask(x, channels_last) if mask and call.post_act == "relu" else None,
    )


def _allocate_gradients(call: GradientCall, channels_last: bool) -> Gradients:
    x, wanted = call.x, call.need_weights

    def like(t: Tensor | None) -> Tensor | None:
        return None if t is None or not wanted else torch.empty_like(t, memory_format=torch.contiguous_format)

    return Gradients(
        empty_like(x, channels_last) if call.need_x else None,
        like(call.weight),
        like(call.bias),
        like(call.w1),
        like(call.b1),
        like(call.w2),
        like(call.b2),
        empty_like(x, channels_last) if call.need_residual else None,
    )


def _as_tensors(kept: Outputs | Gradients, x: Tensor) -> tuple[Tensor, ...]:
    """What a registered operator returns, which has to be tensors: without any element where nothing is kept."""
    return tuple(x.new_empty((0,)) if t is None else t for t in kept)


def _gradient_call(arguments: tuple[Any, ...]) -> GradientCall:
    """From the arguments of a registered backward, among which may be what :func:`_as_tensors` has put in."""
    call = GradientCall(*arguments)
    absent = [] if call.norm else ["statistics"]
    absent += ["gate", "saved"] if call.w1 is None else []
    absent += [] if call.post_act else ["mask"]
    return call._replace(**dict.fromkeys(absent)) if absent else call


# ---------------------------------------------------------------------------------------------------- what kernels read


def _readable(call: Call, channels_last: bool, vector_dtypes: tuple[torch.dtype, ...]) -> Call:
    """The call with every tensor in a form that the backend's kernels read; the same object where all are."""
    changed: dict[str, Tensor] = {}

    def read(name: str, before: Tensor, after: Tensor) -> None:
        if after is not before:
            changed[name] = after

    x, w1, w2, residual = call.x, call.w1, call.w2, call.residual
    if channels_last or not x.is_contiguous():
        read("x", x, in_layout(x, channels_last))
    if residual is not None:
        read("residual", residual, in_layout(residual, channels_last))
    if w1 is not None:
        read1, read2 = as_weights(x, w1, w2)
        read("w1", w1, read1)
        read("w2", w2, read2)
    wide = accumulate_dtype(x)
    for name, t in (("b1", call.b1), ("b2", call.b2)):
        if t is not None:
            read(name, t, as_vector(t, wide, vector_dtypes))
    if call.norm:
        for name in ("weight", "bias", "mean", "var", "factor"):
            if (t := getattr(call, name)) is not None:
                read(name, t, as_vector(t, wide, vector_dtypes))
    return call._replace(**changed) if changed else call


# ---------------------------------------------------------------------------------------------------- operators


class Operator(NamedTuple):
    """One backend's ways into its kernels, each from a call to its outputs, None for those not kept.

    ``registered(call, save)`` is the dispatcher's operator, for torch.compile, torch.export, dispatch modes and tensor
    subclasses; save: whether there may be a backward, ``registered_backward(call)``. What they do not keep is a tensor
    without any element. The others are for plain tensors in eager mode and run the same
    kernels with less host time: ``eager(call)`` has the same backward rule and gives y, statistics and gate;
    ``infer(call, want_gate)`` has no backward.
    """

    registered: Callable[[Call, bool], Outputs]
    registered_backward: Callable[[GradientCall], Gradients]
    eager: Callable[[Call], Outputs]
    infer: Callable[[Call, bool], Outputs]


def _watched(*gradients: Tensor | None) -> bool:
    """Whether a backward that autograd runs for plain tensors is seen by more than autograd.

    By a dispatch mode, by torch.func, or by the older vmap that is_grads_batched and jacobian(vectorize=True) use.
    """
    return (
        in_dispatch_modes()
        or torch_private.func_transform() is not None
        or any(g is not None and torch_private.is_legacy_batchedtensor(g) for g in gradients)
    )


def _define(backend: str, dispatch_keys: tuple[str, ...], kernels: Any) -> Operator:
    name = f"senet_fused::fused_se_{backend}"
    vector_dtypes = kernels.VECTOR_DTYPES
    # By whether there is a norm.
    forwards, backwards = (
        (f"{backend}.{direction}", f"{backend}.tail_{direction}") for direction in ("forward", "backward")
    )

    def forward(call: Call, gate: bool, saved: bool, mask: bool) -> Outputs:
        channels_last = is_channels_last(call.x)
        outputs = _allocate(call, channels_last, gate, saved, mask)
        kernels.forward(_readable(call, channels_last, vector_dtypes), outputs, channels_last)
        count_call(forwards[call.norm != ""])
        return outputs

    def backward(call: GradientCall) -> Gradients:
        x, w1, w2 = call.x, call.w1, call.w2
        channels_last = is_channels_last(x)
        gradients = _allocate_gradients(call, channels_last)
        wide = accumulate_dtype(x)
        if w1 is not None:
            w1, w2 = as_weights(x, w1, w2)
        dgate = call.dgate
        vectors = [None if t is None else as_vector(t, wide, vector_dtypes) for t in (call.weight, call.bias)]
        # Weights' gradients are written in the dtype in which the weights are read, vectors' in that of a vector.
        targets = list(gradients)
        for i in range(1, 7):
            if targets[i] is not None:
                targets[i] = gradient_target(targets[i], w1.dtype if i in (3, 5) else None, wide, vector_dtypes)
        kernels.backward(
            GradientCall(
                in_layout(call.dy, channels_last), None if dgate is None else dgate.to(wide).contiguous(),
                in_layout(x, channels_last), *vectors, w1, call.b1, w2, call.b2,
                None if call.factor is None else as_vector(call.factor, wide, vector_dtypes), *call[10:],
            ),
            Gradients(*targets),
            channels_last,
        )  # fmt: skip
        for gradient, target in zip(gradients, targets, strict=True):
            if target is not gradient:
                gradient.copy_(target)
        count_call(backwards[call.norm != ""])
        return gradients

    def registered_forward(*arguments: Any) -> tuple[Tensor, ...]:
        *fields, save = arguments
        return _as_tensors(forward(Call(*fields), True, True, save), arguments[0])

    def fake_forward(*arguments: Any) -> tuple[Tensor, ...]:
        *fields, save = arguments
        return _as_tensors(_allocate(Call(*fields), is_channels_last(fields[0]), True, True, save), fields[0])

    def registered_backward(*arguments: Any) -> tuple[Tensor, ...]:
        call = _gradient_call(arguments)
        return _as_tensors(backward(call), call.x)

    def fake_backward(*arguments: Any) -> tuple[Tensor, ...]:
        call = _gradient_call(arguments)
        return _as_tensors(_allocate_gradients(call, is_channels_last(call.x)), call.x)

    torch.library.define(name, FORWARD_SCHEMA)
    torch.library.define(f"{name}_backward", BACKWARD_SCHEMA)
    for key in dispatch_keys:
        torch.library.impl(name, key, registered_forward)
        torch.library.impl(f"{name}_backward", key, registered_backward)
    torch.library.register_fake(name, fake_forward)
    torch.library.register_fake(f"{name}_backward", fake_backward)
    operator = getattr(torch.ops.senet_fused, f"fused_se_{backend}").default
    operator_backward = getattr(torch.ops.senet_fused, f"fused_se_{backend}_backward").default

    def keep(ctx: Any, call: Call, outputs: Outputs) -> None:
        """For the backward: its tensors in GradientCall's order, and the options."""
        ctx.save_for_backward(
            call.x, call.weight, call.bias, call.w1, call.b1, call.w2, call.b2, call.factor, *outputs[1:]
        )
        ctx.options = call[TENSORS:]
        ctx.has_residual = call.residual is not None
        ctx.set_materialize_grads(False)

    def rule(
        ctx: Any,
        run: Callable[[GradientCall], Gradients],
        wanted: tuple[bool, ...],
        dy: Tensor | None,
        dgate: Tensor | None,
    ) -> list[Tensor | None]:
        """The one backward rule: a gradient for each tensor of the call. run: the registered operator or its kernel."""
        found: list[Tensor | None] = [None] * TENSORS
        if dy is None and dgate is None:
            return found  # a second derivative comes by here: gate is an input of the backward
        tensors = ctx.saved_tensors
        x, mask, masked = tensors[0], tensors[-1], ctx.options[-2] == "relu"
        if masked and mask.dim() == 1 and x.shape[0] > 0:
            raise RuntimeError(f"{name}: the forward ran with save=False, so there is no mask for a backward")
        need_x, need_residual = wanted[0], ctx.has_residual and wanted[_RESIDUAL]
        if dy is None:
            dy = torch.zeros_like(x)
        gradients = run(
            GradientCall(
                dy, dgate, *tensors, *ctx.options, need_x, any([wanted[i] for i in _PARAMETERS]),
                need_residual and masked,
            )
        )  # fmt: skip
        if need_x:
            found[0] = gradients.dx
        for i, gradient in zip(_PARAMETERS, gradients[1:7], strict=True):
            if wanted[i]:
                found[i] = gradient
        if need_residual:
            found[_RESIDUAL] = gradients.dresidual if masked else dy
        return found

    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        call, (_, statistics, gate, saved, mask) = Call(*inputs[:-1]), output
        keep(ctx, call, Outputs(*output))
        ctx.mark_non_differentiable(statistics, saved, mask, *((gate,) if call.norm else ()))

    def run_registered(call: GradientCall) -> Gradients:
        return Gradients(*operator_backward(*call))

    def registered_rule(
        ctx: Any, dy: Tensor | None, _dstatistics: Any, dgate: Tensor | None, *_others: Any
    ) -> tuple[Tensor | None, ...]:
        in_dispatch_modes()
        found = rule(ctx, run_registered, ctx.needs_input_grad, dy, dgate)
        return (*found, *(None,) * (len(ctx.options) + 1))

    torch.library.register_autograd(name, registered_rule, setup_context=setup_context)
    torch.library.register_autograd(f"{name}_backward", _second_order, setup_context=_second_order_setup)
    torch.library.register_vmap(name, _loop_vmap(operator))
    torch.library.register_vmap(f"{name}_backward", _loop_vmap(operator_backward))

    class FusedSE(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, call: Call, *tensors: Tensor | None) -> tuple[Tensor | None, ...]:
            outputs = forward(call, True, True, True)
            keep(ctx, call, outputs)
            y, statistics, gate, _, _ = outputs
            if not call.norm:
                return y, None, gate
            ctx.mark_non_differentiable(statistics)
            return y, statistics, None

        @staticmethod
        def backward(
            ctx: Any, dy: Tensor | None, _dstatistics: Any, dgate: Tensor | None
        ) -> tuple[Tensor | None, ...]:
            seen = torch.is_grad_enabled() or torch.compiler.is_compiling() or _watched(dy, dgate)
            return None, *rule(ctx, run_registered if seen else backward, ctx.needs_input_grad[1:], dy, dgate)

    apply = FusedSE.apply

    def registered(call: Call, save: bool) -> Outputs:
        return Outputs(*operator(*call, save))

    def eager(call: Call) -> Outputs:
        return Outputs(*apply(call, *call[:TENSORS]), None, None)

    def infer(call: Call, want_gate: bool) -> Outputs:
        return forward(call, want_gate, False, False)

    return Operator(registered, run_registered, eager, infer)


def infer_at_once(call: Call, want_gate: bool) -> Outputs | None:
    """``OPERATORS["cpu"].infer`` of an SE layer for plain float32 tensors that need no conversion; None for all others.

    That they need none is left to the kernels' own checks, which cost no Python.
    """
    x = call.x
    channels_last = not x.is_contiguous()
    if channels_last and not (x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last)):
        return None
    if not 3 <= x.dim() <= 5 or x.numel() == 0:
        return None
    y = torch.empty_like(x)
    outputs = Outputs(y, None, x.new_empty(x.shape[:2]) if want_gate else None, None, None)
    try:
        native.forward(call, outputs, channels_last)
    except RuntimeError:
        return None
    count_call("cpu.forward")
    return outputs


# ---------------------------------------------------------------------------------------------------- second order


def _second_order_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    dy, dgate, x, weight, bias, w1, b1, w2, b2, factor, statistics, _gate, _saved, mask, *options = inputs
    ctx.save_for_backward(dy, dgate, x, weight, bias, w1, b1, w2, b2, factor, statistics, mask)
    ctx.options = options


def _second_order(ctx: Any, *cotangents: Tensor) -> tuple[Tensor | None, ...]:
    """The backward of the backward operator: reference.backward differentiated in plain PyTorch."""
    *inputs, factor, statistics, mask = ctx.saved_tensors
    norm, eps, act, gate_fn, squeeze, post_act, group, need_x, need_weights, need_residual = ctx.options
    if group and norm == "batch":
        raise NotImplementedError("block_tail: second derivatives across processes are not implemented")
    present = [t is not None for t in inputs]
    x = inputs[2]
    bits = unpack_mask(mask, x) if post_act == "relu" else None
    mean, var = (statistics[0], statistics[2]) if norm == "given" else (None, None)

    def first_order(*tensors: Tensor) -> tuple[Tensor, ...]:
        it = iter(tensors)
        dy, dgate, x, weight, bias, w1, b1, w2, b2 = (next(it) if here else None for here in present)
        call = Call(
            x, weight, bias, mean, var, w1, b1, w2, b2, dy, factor, norm, eps, act, gate_fn, squeeze, post_act, "",
        )  # fmt: skip
        gradients = reference.backward(call, dy, dgate, bits)
        needed = (need_x, *(need_weights,) * 6, need_residual)
        return tuple(t for t, wanted in zip(gradients, needed, strict=True) if wanted and t is not None)

    _, vjp = torch.func.vjp(first_order, *(t for t in inputs if t is not None))
    wanted = (need_x, *(need_weights and t is not None for t in inputs[3:]), need_residual)
    grads = iter(vjp(tuple(c for c, w in zip(cotangents, wanted, strict=True) if w)))
    first = [next(grads) if here else None for here in present]
    return (*first, *(None,) * (len(GradientCall._fields) - len(first)))


# ---------------------------------------------------------------------------------------------------- vmap


def _loop_vmap(op: Callable[..., tuple[Tensor, ...]]) -> Callable[..., tuple[Any, Any]]:
    """One call per element of the mapped dimension, stacked."""

    def rule(info: Any, in_dims: tuple[Any, ...], *args: Any) -> tuple[tuple[Tensor, ...], tuple[int, ...]]:
        calls = [
            op(*(a if d is None else a.select(d, i) for a, d in zip(args, in_dims, strict=True)))
            for i in range(info.batch_size)
        ]
        outputs = tuple(torch.stack(column) for column in zip(*calls, strict=True))
        return outputs, (0,) * len(outputs)

    return rule


OPERATORS: dict[str, Operator] = {
    backend: _define(backend, keys, kernels)
    for backend, keys, kernels in (
        ("cuda", ("CUDA", "CPU"), cuda),
        ("triton", ("CUDA", "CPU"), triton),
        ("cpu", ("CPU",), native),
    )
}
