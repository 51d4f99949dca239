"""The operators of block tails: schema, allocation (which is also the fake), backward rule; as :mod:`senet_fused.ops`.

A backend brings two functions, ``tail_forward`` for (T1) to (T3) and ``tail_backward`` for (T4) to (T7). Statistics of
the batch stand between the two sweeps of either direction, and where a process group is named those of all processes
are brought together there: by a function that the backend calls, `together`.

Outputs of the forward besides y:

* ``statistics`` [3, C] in the accumulation dtype: mean, (var + eps)^-1/2, the variance as running statistics keep it.
* ``gate`` [N, C] and ``saved`` [N, C + R] in the accumulation dtype, the columns being what the backend keeps of xbar
  (C) | preact (R); empty without a gate.
* ``mask``: one bit per element, as of the SE operator.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import torch
from torch import Tensor

from .. import torch_private
from ..backends import cuda, native, triton
from ..flops import in_dispatch_modes
from ..ops import (
    Operator,
    count_call,
    empty_like,
    gradient_target,
    in_layout,
    is_channels_last,
    kernel_vector,
    kernel_weights,
    loop_vmap,
    mask_of,
    unpack_mask,
    watched,
)  # fmt: skip
from ..reference import accumulate_dtype
from . import reference

__all__ = ["OPERATORS"]

FORWARD_SCHEMA = (
    "(Tensor x, Tensor? weight, Tensor? bias, Tensor? mean, Tensor? var, Tensor? w1, Tensor? b1, Tensor? w2, "
    "Tensor? b2, Tensor? residual, Tensor? factor, float eps, str act, str gate_fn, str post_act, str group, "
    "bool save) "
    "-> (Tensor y, Tensor statistics, Tensor gate, Tensor saved, Tensor mask)"
)
BACKWARD_SCHEMA = (
    "(Tensor dy, Tensor x, Tensor? weight, Tensor? bias, Tensor? w1, Tensor? b1, Tensor? w2, Tensor? b2, "
    "Tensor? factor, Tensor statistics, Tensor gate, Tensor saved, Tensor mask, float eps, str act, str gate_fn, "
    "str post_act, str group, bool batch, bool need_x, bool need_weights, bool need_residual) "
    "-> (Tensor dx, Tensor dweight, Tensor dbias, Tensor dw1, Tensor db1, Tensor dw2, Tensor db2, Tensor dresidual)"
)


def _allocate_forward(x, w1, post_act, save, channels_last):
    n, c = x.shape[:2]
    wide = accumulate_dtype(x)
    gated = w1 is not None
    return (
        empty_like(x, channels_last),
        x.new_empty((3, c), dtype=wide),
        x.new_empty((n, c) if gated else (0,), dtype=wide),
        x.new_empty((n, c + w1.shape[0]) if gated else (0,), dtype=wide),
        mask_of(x, channels_last, post_act == "relu" and save),
    )


def _allocate_backward(x, weight, bias, w1, b1, w2, b2, need_x, need_weights, need_residual, channels_last):
    def maybe(t):
        if t is None or not need_weights:
            return x.new_empty((0,))
        return torch.empty_like(t, memory_format=torch.contiguous_format)

    def large(needed):
        return empty_like(x, channels_last) if needed else x.new_empty((0,))

    return large(need_x), *map(maybe, (weight, bias, w1, b1, w2, b2)), large(need_residual)


def _bring_together(statistics: Tensor, count: int, eps: float, group: str) -> None:
    """(T1) over all processes, in place, from the statistics of each (Chan, Golub & LeVeque 1983)."""
    processes = _process_group(group)
    mean, _, var = statistics.double()
    own = torch.cat((mean, var * (count - 1), torch.full_like(mean[:1], count)))
    if count == 0:
        own.zero_()  # a process without samples has no mean
    every = [torch.empty_like(own) for _ in range(torch.distributed.get_world_size(processes))]
    torch.distributed.all_gather(every, own, group=processes)
    means, squares, counts = torch.stack(every).split((mean.numel(), mean.numel(), 1), 1)
    total = counts.sum()
    mean = (counts * means).sum(0) / total
    squares = (squares + counts * (means - mean).square()).sum(0)
    statistics.copy_(torch.stack((mean, (squares / total + eps).rsqrt(), squares / (total - 1))))


def _share(dweight: Tensor, dbias: Tensor, count: float, group: str) -> tuple[Tensor, Tensor]:
    """dweight / m and dbias / m of (T7) over all processes; nothing waits for the device."""
    every = torch.cat((dweight, dbias, torch.full_like(dweight[:1], count))).double()
    torch.distributed.all_reduce(every, group=_process_group(group))
    return (every[:-1] / every[-1]).to(dweight.dtype).split(dweight.numel())


def _process_group(name: str) -> Any:
    return torch_private.process_group(name)


def _define(backend: str, dispatch_keys: tuple[str, ...], kernels: Any) -> Operator:
    name = f"senet_fused::block_tail_{backend}"
    counted_forward, counted_backward = f"{backend}.tail_forward", f"{backend}.tail_backward"
    vector_dtypes = kernels.VECTOR_DTYPES

    def as_read(wide, *vectors):
        return (kernel_vector(t, wide, vector_dtypes) for t in vectors)

    def forward(
        x, weight, bias, mean, var, w1, b1, w2, b2, residual, factor, eps, act, gate_fn, post_act, group, save
    ):
        channels_last = is_channels_last(x)
        outputs = _allocate_forward(x, w1, post_act, save, channels_last)
        y, statistics, gate, saved, mask = outputs
        wide = statistics.dtype
        x = in_layout(x, channels_last)
        if residual is not None:
            residual = in_layout(residual, channels_last)
        weight, bias, factor, b1, b2 = as_read(wide, weight, bias, factor, b1, b2)
        if w1 is None:
            gate = saved = None
        else:
            w1, w2 = kernel_weights(x, w1, w2)
        given = together = None
        if mean is not None:
            given = tuple(as_read(wide, mean, var))
        elif group:
            count = x.shape[0] * math.prod(x.shape[2:])
            together = functools.partial(_bring_together, statistics, count, eps, group)
        kernels.tail_forward(
            x, weight, bias, statistics, given, together, w1, b1, w2, b2, residual, factor, eps, act,
            gate_fn, post_act, channels_last, (y, gate, saved, mask if mask.dim() > 1 else None),
        )  # fmt: skip
        count_call(counted_forward)
        return outputs

    def forward_fake(
        x, weight, bias, mean, var, w1, b1, w2, b2, residual, factor, eps, act, gate_fn, post_act, group, save
    ):
        return _allocate_forward(x, w1, post_act, save, is_channels_last(x))

    def backward(
        dy, x, weight, bias, w1, b1, w2, b2, factor, statistics, gate, saved, mask, eps, act, gate_fn, post_act, group,
        batch, need_x, need_weights, need_residual,
    ):  # fmt: skip
        channels_last, wide = is_channels_last(x), statistics.dtype
        given = (weight, bias, w1, b1, w2, b2)
        outputs = _allocate_backward(x, *given, need_x, need_weights, need_residual, channels_last)
        dx, *dparameters, dresidual = outputs
        x, dy = in_layout(x, channels_last), in_layout(dy, channels_last)
        weight, bias, factor = as_read(wide, weight, bias, factor)
        # Kernels write weight gradients in the dtype in which they read the weights, the others in that of a vector.
        dtypes = [None] * 6
        kw1, kw2 = w1, w2
        if w1 is not None:
            kw1, kw2 = kernel_weights(x, w1, w2)
            dtypes[2], dtypes[4] = kw1.dtype, kw2.dtype
        else:
            gate = saved = None
        targets = []
        for t, d, dtype in zip(given, dparameters, dtypes, strict=True):
            wanted = need_weights and t is not None
            targets.append(gradient_target(d, dtype, wide, vector_dtypes) if wanted else None)
        count = float(x.shape[0] * math.prod(x.shape[2:])) if batch else 0.0
        together = functools.partial(_share, count=count, group=group) if batch and group else None
        kernels.tail_backward(
            dy, x, mask if post_act == "relu" else None, weight, bias, statistics, kw1, kw2, factor, gate, saved, act,
            gate_fn, post_act, channels_last, count, together,
            (dx if need_x else None, *targets, dresidual if need_residual else None),
        )  # fmt: skip
        for d, target in zip(dparameters, targets, strict=True):
            if target is not None and target is not d:
                d.copy_(target)
        count_call(counted_backward)
        return outputs

    def backward_fake(
        dy, x, weight, bias, w1, b1, w2, b2, factor, statistics, gate, saved, mask, eps, act, gate_fn, post_act, group,
        batch, need_x, need_weights, need_residual,
    ):  # fmt: skip
        parameters = (weight, bias, w1, b1, w2, b2)
        return _allocate_backward(x, *parameters, need_x, need_weights, need_residual, is_channels_last(x))

    torch.library.define(name, FORWARD_SCHEMA)
    torch.library.define(f"{name}_backward", BACKWARD_SCHEMA)
    for key in dispatch_keys:
        torch.library.impl(name, key, forward)
        torch.library.impl(f"{name}_backward", key, backward)
    torch.library.register_fake(name, forward_fake)
    torch.library.register_fake(f"{name}_backward", backward_fake)
    registered = getattr(torch.ops.senet_fused, f"block_tail_{backend}").default
    registered_backward = getattr(torch.ops.senet_fused, f"block_tail_{backend}_backward").default

    def setup_context(ctx, inputs, output):
        x, weight, bias, mean, var, w1, b1, w2, b2, residual, factor, eps, act, gate_fn, post_act, group, _save = inputs
        _y, statistics, gate, saved, mask = output
        ctx.save_for_backward(x, weight, bias, w1, b1, w2, b2, factor, statistics, gate, saved, mask)
        ctx.options = (eps, act, gate_fn, post_act, group, mean is None)
        ctx.has_residual = residual is not None
        ctx.mark_non_differentiable(statistics, gate, saved, mask)
        ctx.set_materialize_grads(False)

    def rule(ctx, run_backward, dy):
        """The one backward rule; run_backward is the registered operator or its kernels called directly."""
        if dy is None:
            return (None,) * 17
        x, *tensors = ctx.saved_tensors
        post_act = ctx.options[3]
        masked = post_act == "relu"
        if masked and tensors[-1].dim() == 1 and x.shape[0] > 0:
            raise RuntimeError(f"{name}: the forward ran with save=False, so there is no mask for a backward")
        wanted = ctx.needs_input_grad
        parameters = (1, 2, 5, 6, 7, 8)
        need_x, need_residual = wanted[0], ctx.has_residual and wanted[9]
        dx, *dparameters, dresidual = run_backward(
            dy, x, *tensors, *ctx.options, need_x, any(wanted[i] for i in parameters), need_residual and masked
        )
        gradients = [None] * 17
        gradients[0] = dx if need_x else None
        for i, d in zip(parameters, dparameters, strict=True):
            gradients[i] = d if wanted[i] else None
        gradients[9] = (dresidual if masked else dy) if need_residual else None
        return tuple(gradients)

    def registered_rule(ctx, dy, *_others):
        in_dispatch_modes()
        return rule(ctx, registered_backward, dy)

    torch.library.register_autograd(name, registered_rule, setup_context=setup_context)
    torch.library.register_autograd(f"{name}_backward", _second_order, setup_context=_second_order_setup)
    torch.library.register_vmap(name, loop_vmap(registered))
    torch.library.register_vmap(f"{name}_backward", loop_vmap(registered_backward))

    class BlockTail(torch.autograd.Function):
        @staticmethod
        def forward(ctx, *inputs):
            outputs = forward(*inputs)
            setup_context(ctx, inputs, outputs)
            return outputs

        @staticmethod
        def backward(ctx, dy, *_others):
            seen = torch.is_grad_enabled() or torch.compiler.is_compiling() or watched(dy)
            return rule(ctx, registered_backward if seen else backward, dy)

    return Operator(registered, BlockTail.apply, forward)


# ---------------------------------------------------------------------------------------------------- second order


def _second_order_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    dy, x, weight, bias, w1, b1, w2, b2, factor, statistics, _gate, _saved, mask, *options = inputs
    ctx.save_for_backward(dy, x, weight, bias, w1, b1, w2, b2, factor, statistics, mask)
    ctx.options = options


def _second_order(ctx: Any, *cotangents: Tensor) -> tuple[Tensor | None, ...]:
    """The backward of the backward operator: (T4) to (T7) differentiated in plain PyTorch."""
    dy, x, weight, bias, w1, b1, w2, b2, factor, statistics, mask = ctx.saved_tensors
    eps, act, gate_fn, post_act, group, batch, need_x, need_weights, need_residual = ctx.options
    if group and batch:
        raise NotImplementedError("block_tail: second derivatives across processes are not implemented")
    inputs = (dy, x, weight, bias, w1, b1, w2, b2)
    present = [t is not None for t in inputs]
    bits = unpack_mask(mask, x) if post_act == "relu" else None
    mean, var = (None, None) if batch else (statistics[0], statistics[2])

    def first_order(*tensors: Tensor) -> tuple[Tensor, ...]:
        it = iter(tensors)
        dy, x, weight, bias, w1, b1, w2, b2 = (next(it) if here else None for here in present)
        g = reference.block_tail_backward(
            dy, x, weight, bias, mean, var, w1, b1, w2, b2, eps=eps, act=act, gate=gate_fn, residual=dy,
            post_act=post_act or None, factor=factor, mask=bits,
        )  # fmt: skip
        needed = (need_x, *(need_weights,) * 6, need_residual)
        return tuple(t for t, wanted in zip(g, needed, strict=True) if wanted and t is not None)

    _, vjp = torch.func.vjp(first_order, *(t for t in inputs if t is not None))
    wanted = (need_x, *(need_weights and t is not None for t in inputs[2:]), need_residual)
    grads = iter(vjp(tuple(c for c, w in zip(cotangents, wanted, strict=True) if w)))
    return (*(next(grads) if here else None for here in present), *(None,) * 14)


OPERATORS: dict[str, Operator] = {
    backend: _define(backend, keys, kernels)
    for backend, keys, kernels in (
        ("cuda", ("CUDA", "CPU"), cuda),
        ("triton", ("CUDA", "CPU"), triton),
        ("cpu", ("CPU",), native),
    )
}
