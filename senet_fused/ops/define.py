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

import operator
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import reference, torch_private
from ..backends import WITH_PRE_ACT, cuda, native, triton
from ..call import TENSORS, Call, GradientCall, Gradients, Outputs, options_of, text_of
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

__all__ = ["OPERATORS", "Operator", "infer_at_once"]

# The fields of Call, and of GradientCall; options are those from norm on, as text.
FORWARD_SCHEMA = (
    "(Tensor x, Tensor? weight, Tensor? bias, Tensor? mean, Tensor? var, Tensor? w1, Tensor? b1, Tensor? w2, "
    "Tensor? b2, Tensor? residual, Tensor? factor, float eps, str options, bool save) "
    "-> (Tensor y, Tensor statistics, Tensor gate, Tensor saved, Tensor mask)"
)
BACKWARD_SCHEMA = (
    "(Tensor dy, Tensor? dgate, Tensor x, Tensor? weight, Tensor? bias, Tensor? w1, Tensor? b1, Tensor? w2, "
    "Tensor? b2, Tensor? factor, Tensor? statistics, Tensor? gate, Tensor? saved, Tensor? mask, float eps, "
    "str options, bool need_x, bool need_weights, bool need_residual) "
    "-> (Tensor dx, Tensor dweight, Tensor dbias, Tensor dw1, Tensor db1, Tensor dw2, Tensor db2, Tensor dresidual)"
)
_PARAMETERS = tuple(Call._fields.index(name) for name in ("weight", "bias", "w1", "b1", "w2", "b2"))
_RESIDUAL = Call._fields.index("residual")
# The tensors of a GradientCall, and its options.
_FIRST, _LAST = GradientCall._fields.index("eps"), GradientCall._fields.index("pre_act") + 1


# ---------------------------------------------------------------------------------------------------- allocation


def _allocate(call: Call, channels_last: bool, gate: bool, saved: bool, mask: bool) -> Outputs:
    """The outputs that are kept; with a norm the kernels always need gate and saved."""
    x, w1, statistics = call.x, call.w1, None
    shape, wide = x.shape, accumulate_dtype(x)
    n, c = shape[0], shape[1]
    columns = 0 if w1 is None else (c if call.squeeze == "avg" else 3 * c) + w1.shape[0]
    if call.norm:
        statistics = x.new_empty((3, c), dtype=wide)
        gate = saved = w1 is not None
    return Outputs(
        empty_like(x, channels_last),
        statistics,
        x.new_empty((n, c), dtype=wide) if gate else None,
        x.new_empty((n, columns), dtype=wide) if saved else None,
        empty_mask(x, channels_last) if mask and call.post_act == "relu" else None,
    )


def _allocate_gradients(call: GradientCall, channels_last: bool) -> Gradients:
    x, contiguous = call.x, torch.contiguous_format
    parameters: list[Tensor | None] = [None] * 6
    if call.need_weights:
        of = call.weight, call.bias, call.w1, call.b1, call.w2, call.b2
        parameters = [None if t is None else torch.empty_like(t, memory_format=contiguous) for t in of]
    dx = empty_like(x, channels_last) if call.need_x else None
    dresidual = empty_like(x, channels_last) if call.need_residual else None
    return Gradients._make((dx, *parameters, dresidual))


def _as_tensors(kept: Outputs | Gradients, x: Tensor) -> tuple[Tensor, ...]:
    """What a registered operator returns, which has to be tensors: empty ones where nothing is kept."""
    return tuple(x.new_empty((0,)) if t is None else t for t in kept)


def _gradient_call(arguments: tuple[Any, ...]) -> GradientCall:
    """From the arguments of a registered backward, which may contain the empty tensors of :func:`_as_tensors`."""
    *fields, text, need_x, need_weights, need_residual = arguments
    call = GradientCall._make((*fields, *options_of(text), need_x, need_weights, need_residual))
    absent = [] if call.norm else ["statistics"]
    absent += ["gate", "saved"] if call.w1 is None else []
    absent += [] if call.post_act else ["mask"]
    fields_of_none: dict[str, Any] = dict.fromkeys(absent)
    return call._replace(**fields_of_none) if absent else call


# ---------------------------------------------------------------------------------------------------- what kernels read


def _readable(call: Call, channels_last: bool, vector_dtypes: tuple[torch.dtype, ...]) -> Call:
    """The call with every tensor in a form that the backend's kernels read; the same object where all are."""
    x, w1, w2, b1, b2, residual = call.x, call.w1, call.w2, call.b1, call.b2, call.residual
    wide = accumulate_dtype(x)
    if channels_last or not x.is_contiguous():
        x = in_layout(x, channels_last)
    if residual is not None:
        residual = in_layout(residual, channels_last)
    if w1 is not None and w2 is not None:
        w1, w2 = as_weights(w1, w2, wide)
    if b1 is not None:
        b1 = as_vector(b1, wide, vector_dtypes)
    if b2 is not None:
        b2 = as_vector(b2, wide, vector_dtypes)
    given = (call.weight, call.bias, call.mean, call.var, call.factor)
    vectors: Sequence[Tensor | None] = given
    if call.norm:
        vectors = [None if t is None else as_vector(t, wide, vector_dtypes) for t in given]
    if (x is call.x and residual is call.residual and w1 is call.w1 and w2 is call.w2 and b1 is call.b1
            and b2 is call.b2 and (not call.norm or all(map(operator.is_, vectors, given)))):  # fmt: skip
        return call
    weight, bias, mean, var, factor = vectors
    return Call(x, weight, bias, mean, var, w1, b1, w2, b2, residual, factor, *call[TENSORS:])


def _readable_gradient(call: GradientCall, channels_last: bool, vector_dtypes: tuple[torch.dtype, ...]) -> GradientCall:
    """As :func:`_readable`, of a backward, whose kernels do not read b1 and b2."""
    dy, dgate, x, weight, bias, w1, _, w2, _, factor, *_ = call
    wide = accumulate_dtype(x)
    dy, x = in_layout(dy, channels_last), in_layout(x, channels_last)
    if dgate is not None:
        dgate = dgate.to(wide).contiguous()
    if w1 is not None and w2 is not None:
        w1, w2 = as_weights(w1, w2, wide)
    if call.norm:
        weight, bias, factor = (
            None if t is None else as_vector(t, wide, vector_dtypes) for t in (weight, bias, factor)
        )
    if (dy is call.dy and dgate is call.dgate and x is call.x and w1 is call.w1 and w2 is call.w2
            and weight is call.weight and bias is call.bias and factor is call.factor):  # fmt: skip
        return call
    return GradientCall(dy, dgate, x, weight, bias, w1, call.b1, w2, call.b2, factor, *call[10:])


def _targets(gradients: Gradients, call: GradientCall, vector_dtypes: tuple[torch.dtype, ...]) -> Gradients:
    """Where the kernels write: weights' gradients in the dtype in which weights are read, vectors' in that of one."""
    dx, dweight, dbias, dw1, db1, dw2, db2, dresidual = gradients
    wide = accumulate_dtype(call.x)
    dweight, dbias, db1, db2 = (
        None if d is None else gradient_target(d, d.dtype if d.dtype in vector_dtypes else wide)
        for d in (dweight, dbias, db1, db2)
    )
    if dw1 is not None and dw2 is not None and call.w1 is not None and call.w2 is not None:
        dw1, dw2 = gradient_target(dw1, call.w1.dtype), gradient_target(dw2, call.w2.dtype)
    if (dweight is gradients.dweight and dbias is gradients.dbias and dw1 is gradients.dw1 and db1 is gradients.db1
            and dw2 is gradients.dw2 and db2 is gradients.db2):  # fmt: skip
        return gradients
    return Gradients(dx, dweight, dbias, dw1, db1, dw2, db2, dresidual)


# ---------------------------------------------------------------------------------------------------- operators


class Operator(NamedTuple):
    """One backend's entries to its kernels, each from a call to its outputs, None for those not kept.

    ``registered(call, save)`` is the dispatcher's operator, for torch.compile, torch.export, dispatch modes and tensor
    subclasses; save: whether there may be a backward, ``registered_backward(call)``. What they do not keep is an
    empty tensor. The others are for plain tensors in eager mode and run the same kernels with less host time:
    ``eager(call)`` has the same backward rule and gives y, statistics and gate; ``infer(call, want_gate)`` has no
    backward.
    """

    registered: Callable[[Call, bool], Outputs]
    registered_backward: Callable[[GradientCall], Gradients]
    eager: Callable[[Call], Outputs]
    infer: Callable[[Call, bool], Outputs]


def _watched(*gradients: Tensor | None) -> bool:
    """Whether a backward that autograd runs for plain tensors is seen by more than autograd.

    By a dispatch mode, torch.func, or the older vmap that is_grads_batched and jacobian(vectorize=True) use.
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

    def compute(call: Call, gate: bool, saved: bool, mask: bool) -> Outputs:
        if call.pre_act and backend not in WITH_PRE_ACT:
            raise NotImplementedError(f"{name} has no kernels for an activation behind the norm (pre_act)")
        channels_last = is_channels_last(call.x)
        outputs = _allocate(call, channels_last, gate, saved, mask)
        kernels.forward(_readable(call, channels_last, vector_dtypes), outputs, channels_last)
        count_call(forwards[call.norm != ""])
        return outputs

    def compute_gradients(call: GradientCall) -> Gradients:
        channels_last = is_channels_last(call.x)
        gradients = _allocate_gradients(call, channels_last)
        read = _readable_gradient(call, channels_last, vector_dtypes)
        targets = _targets(gradients, read, vector_dtypes)
        kernels.backward(read, targets, channels_last)
        if targets is not gradients:
            for gradient, target in zip(gradients, targets, strict=True):
                if target is not gradient and gradient is not None and target is not None:
                    gradient.copy_(target)
        count_call(backwards[call.norm != ""])
        return gradients

    def registered_forward(*arguments: Any) -> tuple[Tensor, ...]:
        *fields, text, save = arguments
        return _as_tensors(compute(Call(*fields, *options_of(text)), True, True, save), fields[0])

    def fake_forward(*arguments: Any) -> tuple[Tensor, ...]:
        *fields, text, save = arguments
        call = Call(*fields, *options_of(text))
        return _as_tensors(_allocate(call, is_channels_last(call.x), True, True, save), call.x)

    def registered_backward(*arguments: Any) -> tuple[Tensor, ...]:
        call = _gradient_call(arguments)
        return _as_tensors(compute_gradients(call), call.x)

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
    registered_operator = getattr(torch.ops.senet_fused, f"fused_se_{backend}").default
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
            return found  # in a second derivative: gate is an input of the backward
        tensors = ctx.saved_tensors
        x, mask, masked = tensors[0], tensors[-1], ctx.options[-3] == "relu"
        if masked and mask.dim() == 1 and x.shape[0] > 0:
            raise RuntimeError(f"{name}: the forward ran with save=False, so there is no mask for a backward")
        need_x, need_residual = wanted[0], ctx.has_residual and wanted[_RESIDUAL]
        if dy is None:
            dy = torch.zeros_like(x)
        needs = need_x, any([wanted[i] for i in _PARAMETERS]), need_residual and masked
        gradients = run(GradientCall._make((dy, dgate, *tensors, *ctx.options, *needs)))
        if need_x:
            found[0] = gradients.dx
        for i, gradient in zip(_PARAMETERS, gradients[1:7], strict=True):
            if wanted[i]:
                found[i] = gradient
        if need_residual:
            found[_RESIDUAL] = gradients.dresidual if masked else dy
        return found

    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        *fields, text, _save = inputs
        call, outputs = Call(*fields, *options_of(text)), Outputs(*output)
        keep(ctx, call, outputs)
        gate = (outputs.gate,) if call.norm else ()
        ctx.mark_non_differentiable(outputs.statistics, outputs.saved, outputs.mask, *gate)

    def run_registered(call: GradientCall) -> Gradients:
        return Gradients(*operator_backward(*call[: _FIRST + 1], text_of(call[_FIRST + 1 : _LAST]), *call[_LAST:]))

    def registered_rule(
        ctx: Any, dy: Tensor | None, _dstatistics: Any, dgate: Tensor | None, *_others: Any
    ) -> tuple[Tensor | None, ...]:
        in_dispatch_modes()
        found = rule(ctx, run_registered, ctx.needs_input_grad, dy, dgate)
        return *found, None, None, None

    torch.library.register_autograd(name, registered_rule, setup_context=setup_context)
    torch.library.register_autograd(f"{name}_backward", _second_order, setup_context=_second_order_setup)
    torch.library.register_vmap(name, _loop_vmap(registered_operator))
    torch.library.register_vmap(f"{name}_backward", _loop_vmap(operator_backward))

    class FusedSE(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, call: Call, *tensors: Tensor | None) -> tuple[Tensor | None, ...]:
            outputs = compute(call, True, True, True)
            keep(ctx, call, outputs)
            y, statistics, gate, _, _ = outputs
            if not call.norm:
                return y, None, gate
            ctx.mark_non_differentiable(statistics)
            return y, statistics, None

        @staticmethod
        def backward(ctx: Any, dy: Tensor | None, _dstatistics: Any, dgate: Tensor | None) -> tuple[Tensor | None, ...]:
            seen = torch.is_grad_enabled() or torch.compiler.is_compiling() or _watched(dy, dgate)
            return None, *rule(ctx, run_registered if seen else compute_gradients, ctx.needs_input_grad[1:], dy, dgate)

    apply = FusedSE.apply

    def registered(call: Call, save: bool) -> Outputs:
        return Outputs(*registered_operator(*call[: TENSORS + 1], text_of(call[TENSORS + 1 :]), save))

    def eager(call: Call) -> Outputs:
        y, statistics, gate = apply(call, *call[:TENSORS])
        return Outputs(y, statistics, gate, None, None)

    def infer(call: Call, want_gate: bool) -> Outputs:
        if call.norm:
            return compute(call, False, False, False)
        x = call.x
        channels_last = is_channels_last(x)
        gate = x.new_empty(x.shape[:2], dtype=accumulate_dtype(x)) if want_gate else None
        outputs = Outputs(empty_like(x, channels_last), None, gate, None, None)
        kernels.forward(_readable(call, channels_last, vector_dtypes), outputs, channels_last)
        count_call(forwards[0])
        return outputs

    return Operator(registered, run_registered, eager, infer)


def infer_at_once(call: Call, want_gate: bool) -> Outputs | None:
    """``OPERATORS["cpu"].infer`` of an SE layer for plain float32 tensors that need no conversion; None for all others.

    The kernels' own checks, which cost no Python, find out whether they need any.
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
    *tensors, factor, statistics, _gate, _saved, mask, eps, text, need_x, need_weights, need_residual = inputs
    ctx.save_for_backward(*tensors, factor, statistics, mask)
    ctx.options = eps, *options_of(text), need_x, need_weights, need_residual


def _second_order(ctx: Any, *cotangents: Tensor) -> tuple[Tensor | None, ...]:
    """The backward of the backward operator: reference.backward differentiated in plain PyTorch."""
    *inputs, factor, statistics, mask = ctx.saved_tensors
    eps, norm, act, gate_fn, squeeze, post_act, group, pre_act, need_x, need_weights, need_residual = ctx.options
    if group and norm == "batch":
        raise NotImplementedError("block_tail: second derivatives across processes are not implemented")
    present = [t is not None for t in inputs]
    x = inputs[2]
    bits = unpack_mask(mask, x) if post_act == "relu" else None
    mean, var = (statistics[0], statistics[2]) if norm == "given" else (None, None)

    def first_order(*tensors: Tensor) -> tuple[Tensor, ...]:
        it = iter(tensors)
        dy, dgate, x, weight, bias, w1, b1, w2, b2 = (next(it) if here else None for here in present)
        assert dy is not None and x is not None
        call = Call(
            x, weight, bias, mean, var, w1, b1, w2, b2, dy, factor, eps, norm, act, gate_fn, squeeze, post_act, "",
            pre_act,
        )  # fmt: skip
        gradients = reference.backward(call, dy, dgate, bits)
        needed = (need_x, *(need_weights,) * 6, need_residual)
        return tuple(t for t, wanted in zip(gradients, needed, strict=True) if wanted and t is not None)

    vjp = torch.func.vjp(first_order, *(t for t in inputs if t is not None))[1]
    wanted = (need_x, *(need_weights and t is not None for t in inputs[3:]), need_residual)
    grads = iter(vjp(tuple(c for c, w in zip(cotangents, wanted, strict=True) if w)))
    first = [next(grads) if here else None for here in present]
    return (*first, *(None,) * (_FIRST + 5 - len(first)))


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
