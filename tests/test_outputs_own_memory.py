"""What an operator returns, forward and backward, is a tensor of its own, which may be changed in place."""

from __future__ import annotations

import itertools

import pytest
import torch

import senet_fused
from senet_fused import block_tail, squeeze_excite
from senet_fused.call import Call
from senet_fused.ops import OPERATORS

N, C, R = 2, 8, 2
PLANES = {1: (6,), 2: (5, 3), 3: (2, 3, 2)}
COMPILED = [status.name for status in senet_fused.backends.status() if status.available and status.name != "reference"]


def channels_last(x):
    return x.movedim(1, -1).contiguous().movedim(-1, 1)


LAYOUTS = {
    "contiguous": lambda shape: torch.randn(shape),
    "channels_last": lambda shape: channels_last(torch.randn(shape)),
    "sliced": lambda shape: torch.randn(2 * shape[0], *shape[1:])[::2],
    "sliced_channels_last": lambda shape: channels_last(torch.randn(2 * shape[0], *shape[1:]))[::2],
    "every_second_element": lambda shape: torch.randn(*shape[:-1], 2 * shape[-1])[..., ::2],
    "expanded": lambda shape: torch.randn(1, *shape[1:]).expand(shape),
    "expanded_planes": lambda shape: torch.randn(*shape[:2], *(1 for _ in shape[2:])).expand(shape),
}


def parameters():
    torch.manual_seed(0)
    shapes = {"w1": (R, C), "w2": (C, R), "b1": (R,), "b2": (C,)}
    return {name: torch.randn(shape).requires_grad_() for name, shape in shapes.items()}


def call(function, x, residual, post_act, backend, **weights):
    if function == "squeeze_excite":
        return squeeze_excite(x, residual=residual, post_act=post_act, backend=backend, **weights)
    scale, shift = torch.ones(C, requires_grad=True), torch.zeros(C, requires_grad=True)
    return block_tail(x, None, None, scale, shift, training=True, residual=residual, post_act=post_act,
                      backend=backend, **weights)  # fmt: skip


# What a backend fills is allocated in one place for all, so the interpreter, which takes seconds, has two of them.
CASES = [
    (backend, dimensions, layout)
    for backend, dimensions, layout in itertools.product(COMPILED, PLANES, LAYOUTS)
    if backend == "cpu" or (dimensions == 1 and layout in ("contiguous", "channels_last"))
]


@pytest.mark.parametrize(("backend", "dimensions", "layout"), CASES)
@pytest.mark.parametrize("function", ["squeeze_excite", "block_tail"])
def test_a_result_may_be_changed_in_place(backend, function, dimensions, layout):
    """With the gradients of the same steps out of place; the result is no view, with and without gradients."""
    x, residual = (LAYOUTS[layout]((N, C, *PLANES[dimensions])) for _ in range(2))
    weights = parameters()
    for post_act, added in ((None, None), ("relu", residual)):
        gradients = []
        for in_place in (True, False):
            leaf = x.detach().requires_grad_()
            y = call(function, leaf, added, post_act, backend, **weights)
            assert not y._is_view()
            if in_place:
                y.add_(1)
                torch.relu_(y)
            else:
                y = torch.relu(y + 1)
            gradients.append(torch.autograd.grad(y.square().sum(), (leaf, *weights.values())))
        torch.testing.assert_close(*gradients, rtol=0, atol=0)
        with torch.no_grad():
            y = call(function, x, added, post_act, backend, **weights)
            assert not y._is_view() and y.data_ptr() not in (x.data_ptr(), residual.data_ptr())
            torch.testing.assert_close(y + 1, y.add_(1), rtol=0, atol=0)


def call_of(norm, x, residual, weights):
    w1, w2, b1, b2 = weights.values()
    scale, shift = (torch.ones(C), torch.zeros(C)) if norm else (None, None)
    options = (1e-5, norm, "relu", "sigmoid", "avg", "relu", "")
    return Call(x, scale, shift, None, None, w1, b1, w2, b2, residual, None, *options)


@pytest.mark.parametrize(("backend", "dimensions", "layout"), CASES)
@pytest.mark.parametrize("norm", ["", "batch"])
def test_no_output_of_an_operator_is_a_view(backend, norm, dimensions, layout):
    """Of the registered operators, their backward, and of what eager mode calls; nor do two of them share memory."""
    operator = OPERATORS[backend]
    x, residual, dy = (LAYOUTS[layout]((N, C, *PLANES[dimensions])) for _ in range(3))
    call = call_of(norm, x, residual, {name: t.detach() for name, t in parameters().items()})
    registered = operator.registered(call, True)
    gradients = operator.registered_backward(call.gradient(registered, dy, None, (True,) * 3))
    for outputs in (registered, operator.eager(call), operator.infer(call, True), gradients):
        outputs = [t for t in outputs if t is not None]
        assert not any(t._is_view() for t in outputs)
        given = [t for t in (*call, dy) if isinstance(t, torch.Tensor)]
        storages = [t.untyped_storage().data_ptr() for t in (*outputs, *given) if t.numel()]
        assert len(set(storages)) == len(storages)
