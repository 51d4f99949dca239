"""The operators, written once for every backend: schema, allocation (which is also the fake), backward rule.

A dispatch key holds one kernel per operator, so each backend has operators of its own, ``squeeze_excite_<backend>``
and ``squeeze_excite_<backend>_backward``, made by one loop from the same text. A backend brings two functions that
fill tensors allocated here (``senet_fused/backends``); they may assume that x, residual, dy and every output of x's
shape share one dense layout, and that weights are contiguous and of one dtype.

Outputs of the forward besides y:

* ``gate`` [N, C] in the accumulation dtype (float32; float64 for float64 x).
* ``saved`` [N, K] in the accumulation dtype, the columns being pooled (C) | preact (R) and, where the squeeze takes a
  maximum, | peak (C) | ties (C).
* ``mask`` uint8: one bit per element where post_act let it through, least significant bit first, in x's memory order:
  [N, C, ceil(M / 8)] for contiguous x, [N, M, ceil(C / 8)] for channels_last. Empty without post_act, and where no
  backward will follow (``save=False``).

Second order comes from :mod:`senet_fused.reference`: the backward operator's own backward differentiates (B1) to (B7).
"""

from __future__ import annotations

import contextlib
import math
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import reference, torch_private
from .backends import cuda, native, triton
from .flops import in_dispatch_modes

__all__ = [
    "OPERATORS", "Operator", "call_counts", "count_call", "empty_like", "gradient_target", "in_layout", "infer_at_once",
    "is_channels_last", "kernel_vector", "kernel_weights", "layout_of", "loop_vmap", "mask_of", "reset_call_counts",
    "uncounted", "unpack_mask", "watched",
]  # fmt: skip

FORWARD_SCHEMA = (
    "(Tensor x, Tensor w1, Tensor? b1, Tensor w2, Tensor? b2, Tensor? residual, "
    "str act, str gate_fn, str squeeze, str post_act, bool save) -> (Tensor y, Tensor gate, Tensor saved, Tensor mask)"
)
BACKWARD_SCHEMA = (
    "(Tensor dy, Tensor? dgate, Tensor x, Tensor w1, Tensor? b1, Tensor w2, Tensor? b2, "
    "Tensor gate, Tensor saved, Tensor mask, str act, str gate_fn, str squeeze, str post_act, "
    "bool need_x, bool need_weights, bool need_residual) "
    "-> (Tensor dx, Tensor dw1, Tensor db1, Tensor dw2, Tensor db2, Tensor dresidual)"
)

KERNEL_WEIGHT_DTYPES = (torch.float32, torch.bfloat16, torch.float16)

_counts: Counter[str] = Counter()


def call_counts() -> dict[str, int]:
    """How often each backend has run since the last reset: {"cpu.forward": 2, "cpu.backward": 1, ...}.

    A proof of which path ran: compiled backends are counted when their kernels have returned, in eager mode and in
    compiled graphs alike; "reference" is counted in eager mode only (inside a compiled graph it is plain PyTorch).
    """
    return dict(_counts)


def reset_call_counts() -> None:
    """Sets every count of :func:`call_counts` to zero."""
    _counts.clear()


@contextlib.contextmanager
def uncounted() -> Iterator[None]:
    """What runs within the block leaves :func:`call_counts` as it was."""
    before = _counts.copy()
    try:
        yield
    finally:
        _counts.clear()
        _counts.update(before)


def count_call(name: str) -> None:
    """Adds one to a count of :func:`call_counts`."""
    _counts[name] += 1


# ---------------------------------------------------------------------------------------------------- layout


def layout_of(x: Tensor) -> str | None:
    """"contiguous" or "channels_last" if each sample of x is dense in that order, else None.

    The stride between samples is free (a slice of a batch needs no copy). Dimensions of size 1 have no say.
    """
    if x.is_contiguous():
        return "contiguous"
    if x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last):
        return "channels_last"  # the usual case, at a tenth of the host time of the rest
    shape, stride = x.shape, x.stride()
    channels, spatial = (shape[1], stride[1]), list(zip(shape[2:], stride[2:], strict=True))
    if _dense([*reversed(spatial), channels]):
        return "contiguous"
    return "channels_last" if _dense([channels, *reversed(spatial)]) else None


def _dense(dims: list[tuple[int, int]]) -> bool:
    expected = 1
    for size, stride in dims:
        if size != 1 and stride != expected:
            return False
        expected = expected * size
    return True


def is_channels_last(x: Tensor) -> bool:
    """Whether kernels see x as channels_last; tensors of any other layout are made contiguous first."""
    return not x.is_contiguous() and layout_of(x) == "channels_last"


def empty_like(x: Tensor, channels_last: bool) -> Tensor:
    """A dense tensor of x's shape, dtype and device."""
    if not channels_last:
        return torch.empty_like(x, memory_format=torch.contiguous_format)
    if x.dim() == 4:
        return torch.empty_like(x, memory_format=torch.channels_last)
    if x.dim() == 5:
        return torch.empty_like(x, memory_format=torch.channels_last_3d)
    n, c, length = x.shape
    # Not a transposed view: what an operator returns may be changed in place.
    return x.new_empty_strided((n, c, length), (length * c, 1, c))


def in_layout(t: Tensor, channels_last: bool) -> Tensor:
    """t itself if it has the layout, else a copy that has. (With C = 1 or one position a tensor has both.)"""
    if not channels_last:
        if t.is_contiguous():
            return t
    elif t.dim() == 4 and t.is_contiguous(memory_format=torch.channels_last):
        return t
    channels, *spatial = zip(t.shape[1:], t.stride()[1:], strict=True)
    spatial.reverse()
    has_it = _dense([channels, *spatial]) if channels_last else _dense([*spatial, channels])
    return t if has_it else empty_like(t, channels_last).copy_(t)


# ---------------------------------------------------------------------------------------------------- allocation


def _allocate_forward(
    x: Tensor, w1: Tensor, squeeze: str, post_act: str, save: bool, channels_last: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    n, c, r = x.shape[0], x.shape[1], w1.shape[0]
    wide = reference.accumulate_dtype(x)
    y = empty_like(x, channels_last)
    gate = x.new_empty((n, c), dtype=wide)
    saved = x.new_empty((n, c + r if squeeze == "avg" else 3 * c + r), dtype=wide)
    return y, gate, saved, mask_of(x, channels_last, post_act == "relu" and save)


def mask_of(x: Tensor, channels_last: bool, wanted: bool) -> Tensor:
    """An empty bit mask for a ReLU on a tensor of x's shape; without any element if it is not wanted."""
    if not wanted:
        return x.new_empty((0,), dtype=torch.uint8)
    m = math.prod(x.shape[2:])
    rows, columns = (m, x.shape[1]) if channels_last else (x.shape[1], m)
    return x.new_empty((x.shape[0], rows, (columns + 7) // 8), dtype=torch.uint8)


def _allocate_backward(
    x: Tensor,
    w1: Tensor,
    b1: Tensor | None,
    w2: Tensor,
    b2: Tensor | None,
    needs: tuple[bool, bool, bool],
    channels_last: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    need_x, need_weights, need_residual = needs

    def maybe(t: Tensor | None) -> Tensor:
        if t is None or not need_weights:
            return x.new_empty((0,))
        return torch.empty_like(t, memory_format=torch.contiguous_format)

    return (
        empty_like(x, channels_last) if need_x else x.new_empty((0,)),
        maybe(w1),
        maybe(b1),
        maybe(w2),
        maybe(b2),
        empty_like(x, channels_last) if need_residual else x.new_empty((0,)),
    )


def kernel_weights(x: Tensor, w1: Tensor, w2: Tensor) -> tuple[Tensor, Tensor]:
    """Weights as kernels read them: contiguous, in their own dtype where kernels have it and both agree."""
    wide = reference.accumulate_dtype(x)
    dtype = w1.dtype
    known = dtype == wide or (wide == torch.float32 and dtype in KERNEL_WEIGHT_DTYPES)
    if dtype != w2.dtype or not known:
        w1, w2 = w1.to(wide), w2.to(wide)
    return w1.contiguous(), w2.contiguous()


def kernel_vector(
    bias: Tensor | None, wide: torch.dtype, others: tuple[torch.dtype, ...] = ()
) -> Tensor | None:
    """A bias, or another small vector, as kernels read it: contiguous, in the accumulation dtype or one of the others
    that the backend reads (its VECTOR_DTYPES), because on a GPU each conversion is a launch."""
    if bias is None:
        return None
    dtype = bias.dtype
    if dtype != wide and dtype not in others:
        bias = bias.to(wide)
    return bias.contiguous()


def gradient_target(
    gradient: Tensor, dtype: torch.dtype | None, wide: torch.dtype, others: tuple[torch.dtype, ...]
) -> Tensor:
    """Where kernels write a gradient: itself, or a tensor of the dtype in which they write it (None: as vectors)."""
    if dtype is None:
        dtype = gradient.dtype if gradient.dtype in others else wide
    return gradient if gradient.dtype == dtype else torch.empty_like(gradient, dtype=dtype)


def unpack_mask(mask: Tensor, x: Tensor) -> Tensor:
    """The bit mask of the forward as a bool tensor of x's shape."""
    bits = (mask.unsqueeze(-1) >> torch.arange(8, dtype=torch.uint8, device=mask.device)) & 1
    n, c, *spatial = x.shape
    bits = bits.flatten(2)
    if is_channels_last(x):
        return bits[:, :, :c].transpose(1, 2).reshape(n, c, *spatial).bool()
    return bits[:, :, : math.prod(spatial)].reshape(n, c, *spatial).bool()


# ---------------------------------------------------------------------------------------------------- operators


class Operator(NamedTuple):
    """One backend's ways into its kernels; all take the arguments of :data:`FORWARD_SCHEMA`.

    ``registered`` is the dispatcher's operator, for torch.compile, torch.export, dispatch modes and tensor subclasses.
    The others are for plain tensors in eager mode and run the same kernels with less host time: ``eager`` has the same
    backward rule; ``infer`` has no backward, returns (y, gate), and keeps nothing else (gate is None where the last
    argument, here "is the gate wanted", is False).
    """

    registered: Callable[..., tuple[Tensor, Tensor, Tensor, Tensor]]
    eager: Callable[..., tuple[Tensor, Tensor, Tensor, Tensor]]
    infer: Callable[..., tuple[Tensor, Tensor | None]]


def watched(*gradients: Tensor | None) -> bool:
    """Whether a backward that autograd runs for plain tensors is seen by more than autograd.

    By a dispatch mode, by torch.func, or by the older vmap that is_grads_batched and jacobian(vectorize=True) use.
    """
    return (
        in_dispatch_modes()
        or torch_private.func_transform() is not None
        or any(g is not None and torch_private.is_legacy_batchedtensor(g) for g in gradients)
    )


def _define(
    backend: str,
    dispatch_keys: tuple[str, ...],
    kernels: Any,
) -> Operator:
    name = f"senet_fused::squeeze_excite_{backend}"
    counted_forward, counted_backward = f"{backend}.forward", f"{backend}.backward"
    vector_dtypes = kernels.VECTOR_DTYPES

    def fill(x, w1, b1, w2, b2, residual, act, gate_fn, squeeze, post_act, channels_last, outputs):
        if channels_last or not x.is_contiguous():
            x = in_layout(x, channels_last)
        if residual is not None:
            residual = in_layout(residual, channels_last)
        w1, w2 = kernel_weights(x, w1, w2)
        if b1 is not None or b2 is not None:
            wide = reference.accumulate_dtype(x)
            b1, b2 = kernel_vector(b1, wide, vector_dtypes), kernel_vector(b2, wide, vector_dtypes)
        kernels.forward(x, w1, b1, w2, b2, residual, act, gate_fn, squeeze, post_act, channels_last, outputs)
        _counts[counted_forward] += 1

    def forward(x, w1, b1, w2, b2, residual, act, gate_fn, squeeze, post_act, save):
        channels_last = is_channels_last(x)
        outputs = _allocate_forward(x, w1, squeeze, post_act, save, channels_last)
        fill(x, w1, b1, w2, b2, residual, act, gate_fn, squeeze, post_act, channels_last, outputs)
        return outputs

    def infer(x, w1, b1, w2, b2, residual, act, gate_fn, squeeze, post_act, want_gate):
        channels_last = is_channels_last(x)
        y = empty_like(x, channels_last)
        gate = x.new_empty(x.shape[:2], dtype=reference.accumulate_dtype(x)) if want_gate else None
        outputs = (y, gate, None, None)
        fill(x, w1, b1, w2, b2, residual, act, gate_fn, squeeze, post_act, channels_last, outputs)
        return y, gate

    def forward_fake(x, w1, b1, w2, b2, residual, act, gate_fn, squeeze, post_act, save):
        return _allocate_forward(x, w1, squeeze, post_act, save, is_channels_last(x))

    def backward(
        dy, dgate, x, w1, b1, w2, b2, gate, saved, mask, act, gate_fn, squeeze, post_act, need_x, need_weights, need_res
    ):
        channels_last = is_channels_last(x)
        outputs = _allocate_backward(x, w1, b1, w2, b2, (need_x, need_weights, need_res), channels_last)
        x, dy = in_layout(x, channels_last), in_layout(dy, channels_last)
        kw1, kw2 = kernel_weights(x, w1, w2)
        dx, *dweights, dresidual = outputs
        targets = [dx if need_x else None, None, None, None, None, dresidual if need_res else None]
        # Weights' gradients are written in the dtype in which the weights are read, biases' in that of a vector.
        if need_weights:
            for i, (d, t) in enumerate(zip(dweights, (w1, b1, w2, b2), strict=True)):
                if t is not None:
                    dtype = kw1.dtype if i % 2 == 0 else None
                    targets[1 + i] = gradient_target(d, dtype, gate.dtype, vector_dtypes)
        if dgate is not None:
            dgate = dgate.to(gate.dtype).contiguous()
        kernels.backward(
            dy, dgate, x, kw1, kw2, gate, saved, mask, act, gate_fn, squeeze, post_act, channels_last, targets
        )
        for d, target in zip(dweights, targets[1:5], strict=True):
            if target is not None and target is not d:
                d.copy_(target)
        _counts[counted_backward] += 1
        return outputs

    def backward_fake(
        dy, dgate, x, w1, b1, w2, b2, gate, saved, mask, act, gate_fn, squeeze, post_act, need_x, need_weights, need_res
    ):
        return _allocate_backward(x, w1, b1, w2, b2, (need_x, need_weights, need_res), is_channels_last(x))

    torch.library.define(name, FORWARD_SCHEMA)
    torch.library.define(f"{name}_backward", BACKWARD_SCHEMA)
    for key in dispatch_keys:
        torch.library.impl(name, key, forward)
        torch.library.impl(f"{name}_backward", key, backward)
    torch.library.register_fake(name, forward_fake)
    torch.library.register_fake(f"{name}_backward", backward_fake)
    registered = getattr(torch.ops.senet_fused, f"squeeze_excite_{backend}").default
    registered_backward = getattr(torch.ops.senet_fused, f"squeeze_excite_{backend}_backward").default

    def setup_context(ctx, inputs, output):
        x, w1, b1, w2, b2, residual, act, gate_fn, squeeze, post_act, _save = inputs
        _y, gate, saved, mask = output
        ctx.save_for_backward(x, w1, b1, w2, b2, gate, saved, mask)
        ctx.options = (act, gate_fn, squeeze, post_act)
        ctx.has_residual = residual is not None
        ctx.mark_non_differentiable(saved, mask)
        ctx.set_materialize_grads(False)

    def rule(ctx, run_backward, dy, dgate):
        """The one backward rule; run_backward is the registered operator or its kernel called directly."""
        if dy is None and dgate is None:
            return (None,) * 11  # a second derivative comes by here: gate is an input of the backward
        x, w1, b1, w2, b2, gate, saved, mask = ctx.saved_tensors
        act, gate_fn, squeeze, post_act = ctx.options
        masked = post_act == "relu"
        if masked and mask.dim() == 1 and x.shape[0] > 0:
            raise RuntimeError(f"{name}: the forward ran with save=False, so there is no mask for a backward")
        wanted = ctx.needs_input_grad
        need_x, need_residual = wanted[0], ctx.has_residual and wanted[5]
        need_weights = wanted[1] or wanted[2] or wanted[3] or wanted[4]
        if dy is None:
            dy = torch.zeros_like(x)
        dx, dw1, db1, dw2, db2, dresidual = run_backward(
            dy, dgate, x, w1, b1, w2, b2, gate, saved, mask, act, gate_fn, squeeze, post_act,
            need_x, need_weights, need_residual and masked,
        )  # fmt: skip
        return (
            dx if need_x else None,
            dw1 if wanted[1] else None,
            db1 if wanted[2] else None,
            dw2 if wanted[3] else None,
            db2 if wanted[4] else None,
            (dresidual if masked else dy) if need_residual else None,
            None, None, None, None, None,
        )  # fmt: skip

    def registered_rule(ctx, dy, dgate, _dsaved, _dmask):
        in_dispatch_modes()
        return rule(ctx, registered_backward, dy, dgate)

    torch.library.register_autograd(name, registered_rule, setup_context=setup_context)
    torch.library.register_autograd(
        f"{name}_backward", _second_order, setup_context=_second_order_setup
    )
    torch.library.register_vmap(name, loop_vmap(registered))
    torch.library.register_vmap(f"{name}_backward", loop_vmap(registered_backward))

    class SqueezeExcite(torch.autograd.Function):
        @staticmethod
        def forward(ctx, *inputs):
            outputs = forward(*inputs)
            setup_context(ctx, inputs, outputs)
            return outputs

        @staticmethod
        def backward(ctx, dy, dgate, _dsaved, _dmask):
            seen = torch.is_grad_enabled() or torch.compiler.is_compiling() or watched(dy, dgate)
            return rule(ctx, registered_backward if seen else backward, dy, dgate)

    return Operator(registered, SqueezeExcite.apply, infer)


def infer_at_once(
    x: Tensor,
    w1: Tensor,
    b1: Tensor | None,
    w2: Tensor,
    b2: Tensor | None,
    act: str,
    gate_fn: str,
    squeeze: str,
    want_gate: bool,
) -> tuple[Tensor, Tensor | None] | None:
    """``OPERATORS["cpu"].infer`` for plain float32 tensors that need no conversion; None for all others.

    That they need none is left to the kernels' own checks, which cost no Python.
    """
    if x.is_contiguous():
        channels_last = False
    elif x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last):
        channels_last = True
    else:
        return None
    if not 3 <= x.dim() <= 5 or x.numel() == 0:
        return None
    y = torch.empty_like(x)
    gate = x.new_empty(x.shape[:2]) if want_gate else None
    try:
        native.forward(x, w1, b1, w2, b2, None, act, gate_fn, squeeze, "", channels_last, (y, gate, None, None))
    except RuntimeError:
        return None
    _counts["cpu.forward"] += 1
    return y, gate


# ---------------------------------------------------------------------------------------------------- second order


def _second_order_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    dy, dgate, x, w1, b1, w2, b2, _gate, _saved, mask, *options = inputs
    ctx.save_for_backward(dy, dgate, x, w1, b1, w2, b2, mask)
    ctx.options = options


def _second_order(ctx: Any, *cotangents: Tensor) -> tuple[Tensor | None, ...]:
    """The backward of the backward operator: (B1) to (B7) differentiated in plain PyTorch."""
    dy, dgate, x, w1, b1, w2, b2, mask = ctx.saved_tensors
    act, gate_fn, squeeze, post_act, need_x, need_weights, need_residual = ctx.options
    inputs = (dy, dgate, x, w1, b1, w2, b2)
    present = [t is not None for t in inputs]
    bits = unpack_mask(mask, x) if post_act == "relu" else None

    def first_order(*tensors: Tensor) -> tuple[Tensor, ...]:
        it = iter(tensors)
        dy, dgate, x, w1, b1, w2, b2 = (next(it) if here else None for here in present)
        g = reference.squeeze_excite_backward(
            dy, x, w1, w2, b1, b2, act=act, gate=gate_fn, squeeze=squeeze, dgate=dgate,
            residual=dy, post_act=post_act or None, mask=bits,
        )  # fmt: skip
        outputs = (
            (g.dx, need_x),
            (g.dw1, need_weights),
            (g.db1, need_weights),
            (g.dw2, need_weights),
            (g.db2, need_weights),
            (g.dresidual, need_residual),
        )
        return tuple(t for t, needed in outputs if needed and t is not None)

    _, vjp = torch.func.vjp(first_order, *(t for t in inputs if t is not None))
    wanted = (need_x, need_weights, need_weights and b1 is not None, need_weights, need_weights and b2 is not None)
    grads = iter(vjp(tuple(c for c, w in zip(cotangents, (*wanted, need_residual), strict=True) if w)))
    first = [next(grads) if here else None for here in present]
    return (*first, *(None,) * 10)


# ---------------------------------------------------------------------------------------------------- vmap


def loop_vmap(op: Callable[..., tuple[Tensor, ...]]) -> Callable[..., tuple[Any, Any]]:
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
