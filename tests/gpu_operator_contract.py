"""What every backend of GPU kernels has to hold to as an operator: opcheck, both paths, torch.compile, second order.

As for gpu_contract.py, a test module of a backend imports the tests and has a fixture `backend_name`; and a fixture
`using_strategy`, a function (case, strategy) -> a context in which the case's calls take the cheapest plan with this
strategy, where there is one.
"""

from __future__ import annotations

import pytest
import torch
from gpu_contract import DENSE, DEVICE, STRATEGIES, on_device
from layer_operator import Backward, Forward, call_of
from oracle import Case, draw

import senet_fused
from senet_fused import ops
from senet_fused.backends import cuda, triton
from senet_fused.ops import layout

CASES = {
    "plain": Case((2, 24, 5, 4), 4),
    "tail": Case((3, 24, 4, 6), 4, torch.bfloat16, "channels_last", post_act="relu", residual=True, act="silu"),
    "maximum": Case((2, 20, 3, 5), 4, torch.float16, squeeze="avgmax", post_act="relu", gate="hardsigmoid"),
    "rows": Case((2, 16, 7, 7), 4, torch.bfloat16, bias=False),
}


def arguments(case: Case, requires_grad: bool = False) -> tuple:
    """The forward operator's arguments, and dy, dgate."""
    inputs = {name: on_device(t) for name, t in draw(case, 0).items()}
    names = ("x", "w1", "b1", "w2", "b2", "residual")
    tensors = [inputs[k].requires_grad_(requires_grad) if k in inputs else None for k in names]
    options = (case.act, case.gate, case.squeeze, case.post_act or "")
    return (*tensors, *options), inputs["dy"], inputs["dgate"].to(case.dtype_of("gate"))


@pytest.mark.interpreter
@pytest.mark.parametrize("name", CASES)
def test_opcheck(backend_name, name):
    args, dy, dgate = arguments(CASES[name], requires_grad=True)
    forward, backward = Forward(backend_name), Backward(backend_name)
    torch.library.opcheck(forward.operator, forward.arguments(*args, True))
    detached = [t.detach() if isinstance(t, torch.Tensor) else t for t in args]
    _, gate, saved, mask = forward(*detached, True)
    x, w1, b1, w2, b2, residual, *options = detached
    rest = (x, w1, b1, w2, b2, gate, saved, mask, *options, True, True, residual is not None)
    utils = ("test_schema", "test_faketensor")
    torch.library.opcheck(backward.operator, backward.arguments(dy, dgate, *rest), test_utils=utils)


@pytest.mark.parametrize("name", CASES)
def test_eager_and_registered_agree_bitwise(backend_name, name):
    results = []
    operator = ops.OPERATORS[backend_name]
    for path in (operator.eager, lambda call: operator.registered(call, True)):
        args, dy, dgate = arguments(CASES[name], requires_grad=True)
        senet_fused.reset_call_counts()
        y, _, gate, *_ = path(call_of(*args))
        leaves = [t for t in args if isinstance(t, torch.Tensor)]
        results.append([y, gate, *torch.autograd.grad([y, gate], leaves, [dy, dgate])])
        assert senet_fused.call_counts() == {f"{backend_name}.forward": 1, f"{backend_name}.backward": 1}
    for a, b in zip(*results, strict=True):
        assert a.stride() == b.stride() and torch.equal(a, b)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_vectors_are_taken_as_they_are(backend_name, dtype):
    """A bias that is converted, or a gradient that is copied, is a launch of its own."""
    read = {"cuda": cuda, "triton": triton}[backend_name].VECTOR_DTYPES
    vector = torch.ones(4, dtype=dtype)
    assert layout.as_vector(vector, torch.float32, read) is vector
    assert layout.gradient_target(vector, dtype) is vector and dtype in read


@pytest.mark.compiler
@pytest.mark.parametrize("dynamic", [False, True])
def test_torch_compile(backend_name, dynamic):
    """By name the operator stays whole in the graph, forward and backward; one graph for all sizes."""
    layer = senet_fused.FusedSE(24, 4, backend=backend_name).to(DEVICE)
    compiled = torch.compile(layer, fullgraph=True, dynamic=dynamic)
    for size in (5, 6, 7) if dynamic else (5,):
        x = torch.randn(2, 24, size, 4, device=DEVICE, requires_grad=True)
        senet_fused.reset_call_counts()
        y = compiled(x)
        dy = torch.randn_like(y)
        found = torch.autograd.grad(y, [x, *layer.parameters()], dy)
        assert senet_fused.call_counts() == {f"{backend_name}.forward": 1, f"{backend_name}.backward": 1}
        expected_y = layer(x)
        expected = torch.autograd.grad(expected_y, [x, *layer.parameters()], dy)
        for a, b in zip([y, *found], [expected_y, *expected], strict=True):
            assert torch.equal(a, b)


def test_second_order(backend_name):
    """The backward of the backward is the reference's."""
    gradients = []
    for name in (backend_name, "reference"):
        (x, w1, b1, w2, b2, *_), dy, _ = arguments(Case((2, 6, 3, 4), 3, act="silu"), requires_grad=True)
        y = senet_fused.squeeze_excite(x, w1, w2, b1, b2, act="silu", backend=name)
        first = torch.autograd.grad(y, [x, w1], dy, create_graph=True)
        gradients.append(torch.autograd.grad(sum((g**2).sum() for g in first), [x, w1, w2]))
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_autocast(backend_name):
    """No input is cast: x decides."""
    for dtype in (torch.float32, torch.bfloat16):
        layer = senet_fused.FusedSE(24, 4, backend=backend_name).to(DEVICE)
        x = torch.randn(2, 24, 4, 4, device=DEVICE, dtype=dtype)
        with torch.autocast(DEVICE, dtype=torch.bfloat16):
            y = layer(x)
        assert y.dtype == dtype and torch.equal(y, layer(x))


@pytest.mark.parametrize("layout", DENSE)
@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("wanted", ["x", "w2", "b1", "residual", "x residual", "x w1 b2"])
def test_some_gradients_only(backend_name, using_strategy, wanted, strategy, layout):
    """Each is what it is when all are asked for; nothing else is computed or returned."""
    case = Case((3, 24, 4, 6), 4, torch.float32, layout, post_act="relu", residual=True)
    run = ops.OPERATORS[backend_name].eager
    with using_strategy(case, strategy):
        args, dy, _ = arguments(case, requires_grad=True)
        names = ("x", "w1", "b1", "w2", "b2", "residual")
        expected = dict(zip(names, torch.autograd.grad(run(call_of(*args))[0], args[:6], dy), strict=True))
        leaves = {name: t.detach().requires_grad_(name in wanted.split()) for name, t in zip(names, args, strict=False)}
        run(call_of(*leaves.values(), *args[6:])).y.backward(dy)
    for name, t in leaves.items():
        assert (t.grad is not None) == (name in wanted.split()), name
        if t.grad is not None:
            assert torch.equal(t.grad, expected[name]), name


def test_inference_keeps_nothing_and_gives_the_same(backend_name, using_strategy):
    operator = ops.OPERATORS[backend_name]
    for case in CASES.values():
        for strategy in STRATEGIES:
            with using_strategy(case, strategy):
                args, _, _ = arguments(case)
                call = call_of(*args)
                kept = operator.registered(call, True)
                found = operator.infer(call, True)
                assert torch.equal(found.y, kept.y) and torch.equal(found.gate, kept.gate)
                found = operator.infer(call, False)
                assert torch.equal(found.y, kept.y) and not any(t is not None for t in found[1:])


# ---------------------------------------------------------------------------------------------------- GPUs

ON_GPU = pytest.mark.skipif(DEVICE != "cuda", reason="no GPU")


def layer_and_input(backend_name: str, strategy: str):
    """A layer for which the planners of GPU backends take this strategy, at batch 64."""
    sizes = {"partials": (256, 16, 56), "last_block": (2048, 128, 7), "launches": (960, 240, 7)}
    c, r, size = sizes[strategy]
    layer = senet_fused.FusedSE(c, rd_channels=r, backend=backend_name).to(DEVICE, torch.bfloat16)
    x = torch.randn(64, c, size, size, device=DEVICE, dtype=torch.bfloat16)
    return layer, x.contiguous(memory_format=torch.channels_last).requires_grad_()


def gradients(layer, x, dy):
    y = layer(x)
    return [y.detach(), *torch.autograd.grad(y, [x, *layer.parameters()], dy)]


@ON_GPU
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_two_streams(backend_name, strategy):
    """Calls that overlap in two streams give what they give alone."""
    layer, x = layer_and_input(backend_name, strategy)
    dy = torch.randn_like(x)
    expected = gradients(layer, x, dy)
    streams = [torch.cuda.Stream(), torch.cuda.Stream()]
    torch.cuda.synchronize()
    found = []
    for i in range(20):
        with torch.cuda.stream(streams[i % 2]):
            found.append(gradients(layer, x, dy))
    torch.cuda.synchronize()
    for results in found:
        assert all(torch.equal(a, b) for a, b in zip(results, expected, strict=True))


@ON_GPU
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_graph_replay(backend_name, strategy):
    layer, x = layer_and_input(backend_name, strategy)
    dy = torch.randn_like(x)
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        gradients(layer, x, dy)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = gradients(layer, x, dy)
    for _ in range(3):
        with torch.no_grad():
            x.normal_()
            dy.normal_()
        graph.replay()
        expected = gradients(layer, x, dy)
        assert all(torch.equal(a, b) for a, b in zip(captured, expected, strict=True))


@ON_GPU
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_reduce_overhead(backend_name, strategy):
    layer, x = layer_and_input(backend_name, strategy)
    dy = torch.randn_like(x)
    expected = gradients(layer, x, dy)
    compiled = torch.compile(layer, mode="reduce-overhead", fullgraph=True)
    for _ in range(4):
        torch.compiler.cudagraph_mark_step_begin()
        y = compiled(x)
        found = [y.detach().clone(), *(g.clone() for g in torch.autograd.grad(y, [x, *layer.parameters()], dy))]
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@ON_GPU
@pytest.mark.parametrize("layout", DENSE)
def test_more_than_2_to_the_31_elements(backend_name, layout):
    """A batch in which the last samples lie beyond 32-bit offsets: they are what they are alone."""
    memory_format = torch.channels_last if layout == "channels_last" else torch.contiguous_format
    x = torch.empty(2700, 256, 56, 56, device=DEVICE, dtype=torch.bfloat16, memory_format=memory_format).normal_()
    assert x.numel() > 2**31
    layer = senet_fused.FusedSE(256, rd_channels=16, backend=backend_name).to(DEVICE, torch.bfloat16)
    x.requires_grad_()
    y = layer(x)
    (dx,) = torch.autograd.grad(y, [x], y)
    for chosen in (slice(0, 2), slice(1350, 1352), slice(2698, 2700)):
        alone = x.detach()[chosen].requires_grad_()
        y_alone = layer(alone)
        assert torch.equal(y[chosen], y_alone)
        assert torch.equal(dx[chosen], torch.autograd.grad(y_alone, [alone], y_alone)[0])


@ON_GPU
def test_nothing_waits_for_the_device(backend_name):
    for strategy in STRATEGIES:
        layer, x = layer_and_input(backend_name, strategy)
        dy = torch.randn_like(x)
        gradients(layer, x, dy)
        torch.cuda.set_sync_debug_mode("error")
        try:
            gradients(layer, x, dy)
        finally:
            torch.cuda.set_sync_debug_mode("default")


@ON_GPU
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="one GPU")
def test_a_device_that_is_not_the_current_one(backend_name):
    layer, x = layer_and_input("partials")
    expected = layer(x)
    assert torch.equal(layer.to("cuda:1")(x.to("cuda:1")).cpu(), expected.cpu())
