"""torch.compile: whole graphs forward and backward, one for all sizes, eager's strides, our kernels inside.

Most graphs are run as traced (backend "aot_eager"), which is where an operator can go wrong; two go through
the default code generator, which is slow.
"""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import nn
from torch._dynamo import compiled_autograd
from torch._dynamo.testing import CompileCounterWithBackend
from torch.autograd import forward_ad
from torch.utils.checkpoint import checkpoint

import senet_fused
from senet_fused import Activation, FusedSE, squeeze_excite

pytestmark = pytest.mark.skipif(
    senet_fused.backends.native.problem() is not None, reason="the compiled CPU library is not installed"
)


@pytest.fixture(autouse=True)
def nothing_compiled_yet():
    """And the operator in the graphs, where "auto" would leave the layer to the compiler."""
    torch._dynamo.reset()
    torch.manual_seed(0)
    with senet_fused.use_backend("cpu"):
        yield
    torch._dynamo.reset()


class Block(nn.Module):
    """An SE block with something to fuse on either side."""

    def __init__(self, **options):
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, padding=1)
        self.se = FusedSE(8, 4, bias=True, post_act="relu", **options)

    def forward(self, x):
        v = self.conv(x).tanh()
        return self.se(v, v + 1) * 2


def gradients(model, y, dy):
    return torch.autograd.grad(y, list(model.parameters()), dy)


def operators(graph_module):
    return [node.target for node in graph_module.graph.nodes if node.op == "call_function"]


OPERATOR = torch.ops.senet_fused.fused_se_cpu.default


def test_default_mode_forward_and_backward():
    """And that the kernels ran inside the compiled graphs, once each way."""
    block, x = Block(act="silu"), torch.randn(2, 3, 9, 7)
    compiled = torch.compile(block, fullgraph=True)
    dy = torch.randn(2, 8, 9, 7)
    y = compiled(x)
    got = gradients(block, y, dy)
    assert senet_fused.call_counts() == {"cpu.forward": 1, "cpu.backward": 1}
    expected = block(x)
    assert y.stride() == expected.stride()
    for a, b in zip((y, *got), (expected, *gradients(block, expected, dy)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.compiler
def test_default_mode_dynamic_shapes_and_layouts():
    """Two layouts are two graphs, whatever the sizes; strides are eager's in both directions."""
    counter = CompileCounterWithBackend("inductor")
    w1, w2 = torch.randn(3, 5, requires_grad=True), torch.randn(5, 3)

    def block(x):
        return squeeze_excite(x.tanh(), w1, w2, residual=x, post_act="relu").sin()

    compiled = torch.compile(block, fullgraph=True, dynamic=True, backend=counter)
    frames = []
    for layout in (torch.contiguous_format, torch.channels_last):
        for n, h, w in ((2, 9, 7), (3, 6, 8), (4, 10, 11)):
            x = torch.randn(n, 5, h, w).contiguous(memory_format=layout).requires_grad_()
            dy = torch.randn_like(x)
            y, expected = compiled(x), block(x)
            assert y.stride() == expected.stride()
            ours, eager = torch.autograd.grad(y, (x, w1), dy), torch.autograd.grad(expected, (x, w1), dy)
            assert ours[0].stride() == eager[0].stride()
            for a, b in zip((y, *ours), (expected, *eager), strict=True):
                torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
            frames.append(counter.frame_count)
    assert frames == [1, 1, 1, 2, 2, 2]


@pytest.mark.parametrize(
    ("shapes", "layout"),
    [
        ([(2, 6, 9, 7), (3, 6, 5, 8), (7, 6, 4, 3), (4, 6, 11, 13)], torch.contiguous_format),
        ([(2, 6, 9, 7), (3, 6, 5, 8), (7, 6, 4, 3), (4, 6, 11, 13)], torch.channels_last),
        ([(2, 6, 9), (3, 6, 15), (7, 6, 22)], torch.contiguous_format),
        ([(2, 6, 9, 7, 3), (3, 6, 5, 8, 4)], torch.channels_last_3d),
    ],
    ids=["contiguous", "channels_last", "one_dimension", "channels_last_3d"],
)
def test_one_graph_for_all_sizes(shapes, layout):
    """With N and the spatial sizes marked dynamic, which fails if anything specialises on one of them.

    More than eight positions: below, a row of the mask is one byte, and torch.compile sets sizes of 1 apart.
    """
    counter = CompileCounterWithBackend("aot_eager")
    weights = [torch.randn(2, 6, requires_grad=True), torch.randn(6, 2, requires_grad=True)]

    def layer(x):
        return squeeze_excite(x, *weights, act="gelu", squeeze="avgmax", residual=x, post_act="relu", return_gate=True)

    compiled = torch.compile(layer, fullgraph=True, backend=counter)
    for shape in shapes:
        x = torch.randn(shape).contiguous(memory_format=layout)
        for d in (0, *range(2, x.dim())):
            torch._dynamo.mark_dynamic(x, d)
        dy, dgate = torch.randn_like(x), torch.randn(shape[:2])
        senet_fused.reset_call_counts()
        outputs = compiled(x)
        ours = [*outputs, *torch.autograd.grad(outputs, weights, (dy, dgate))]
        assert senet_fused.call_counts() == {"cpu.forward": 1, "cpu.backward": 1}
        outputs = layer(x)
        eager = [*outputs, *torch.autograd.grad(outputs, weights, (dy, dgate))]
        for a, b in zip(ours, eager, strict=True):
            assert a.stride() == b.stride() and torch.equal(a, b)  # the same kernels
        assert counter.frame_count == 1


@pytest.mark.compiler
def test_strides_that_no_kernel_reads_in_place():
    counter = CompileCounterWithBackend("aot_eager")
    weights = torch.randn(2, 6), torch.randn(6, 2)
    compiled = torch.compile(lambda x: squeeze_excite(x, *weights), fullgraph=True, backend=counter)
    x = torch.randn(3, 6, 8, 5)
    for view in (
        x[:, :, ::2],
        x.transpose(2, 3),
        x[::2],
        x[:, :1].expand(3, 6, 8, 5),
        x.permute(0, 1, 3, 2)[..., 1:],
    ):
        expected = squeeze_excite(view, *weights)
        y = compiled(view)
        assert y.stride() == expected.stride() and torch.equal(y, expected)
        assert y.stride() == (view * torch.rand(3, 6, 1, 1)[: len(view)]).stride()


def test_the_backend_is_read_when_tracing():
    """Another choice compiles another graph, and a choice made inside the function holds there."""
    counter = CompileCounterWithBackend("eager")
    weights, x = (torch.randn(2, 8), torch.randn(8, 2)), torch.randn(2, 8, 3, 3)
    compiled = torch.compile(lambda x: squeeze_excite(x, *weights), fullgraph=True, backend=counter)
    with senet_fused.use_backend("reference"):
        plain = compiled(x)
    assert OPERATOR not in operators(counter.graphs[0])
    fused = compiled(x)
    assert OPERATOR in operators(counter.graphs[1])
    torch.testing.assert_close(plain, fused)
    with senet_fused.use_backend("reference"):
        compiled(x)
    assert counter.frame_count == 2

    def inside(x):
        with senet_fused.use_backend("reference"):
            y = squeeze_excite(x, *weights)
        return y, squeeze_excite(x, *weights, backend="cpu")

    torch.compile(inside, fullgraph=True, backend=counter)(x)
    assert operators(counter.graphs[2]).count(OPERATOR) == 1
    assert senet_fused.explain(x).backend == "cpu"


def test_a_backend_that_cannot_serve_says_so_in_a_compiled_graph_too():
    layer = FusedSE(8, 4, backend="cpu", device="meta")
    compiled = torch.compile(layer, backend="eager")
    with pytest.raises(Exception, match="cannot serve this call: it serves CPU tensors"):
        compiled(torch.randn(2, 8, 3, 3, device="meta"))


@pytest.mark.compiler
def test_capture_gates():
    """Recording compiles the model once more, however many calls there are; the gates are differentiable."""
    block, x = Block(), torch.randn(2, 3, 5, 6)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(block, fullgraph=True, backend=counter)
    compiled(x)
    for _ in range(2):
        with senet_fused.capture_gates(block) as gates:
            for _ in range(12):
                compiled(x)
        assert len(gates["se"]) == 12 and counter.frame_count == 2
    expected = squeeze_excite(
        block.conv(x).tanh(), block.se.fc1.weight, block.se.fc2.weight, block.se.fc1.bias, block.se.fc2.bias,
        return_gate=True,
    )[1]  # fmt: skip
    assert torch.equal(gates["se"][-1], expected)
    got = torch.autograd.grad(gates["se"][0].square().sum(), block.conv.weight)[0]
    torch.testing.assert_close(got, torch.autograd.grad(expected.square().sum(), block.conv.weight)[0])
    compiled(x)
    assert counter.frame_count == 2 and len(gates["se"]) == 12
    with senet_fused.capture_gates(compiled) as gates:
        compiled(x)
    assert list(gates) == ["_orig_mod.se"] and len(gates["_orig_mod.se"]) == 1


def test_capture_gates_within_a_compiled_step():
    block, x = Block(), torch.randn(2, 3, 5, 6)

    def step(x):
        with senet_fused.capture_gates(block) as gates:
            y = block(x)
            return y.sum() + sum(g.square().sum() for calls in gates.values() for g in calls)

    torch.testing.assert_close(torch.compile(step, fullgraph=True, backend="aot_eager")(x), step(x))
    assert block.se._senet_captured is None


@pytest.mark.parametrize(
    "act",
    [
        "gelu", "swish", "leaky_relu(0.25)", nn.SiLU, nn.LeakyReLU(0.3),
        Activation("leaky_relu", negative_slope=0.2),
    ],
    ids=str,
)  # fmt: skip
def test_every_way_to_name_an_activation(act):
    weights, x = (torch.randn(2, 8), torch.randn(8, 2)), torch.randn(2, 8, 3, 3)
    compiled = torch.compile(lambda x: squeeze_excite(x, *weights, act=act), fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x), squeeze_excite(x, *weights, act=act))


def test_compiling_warns_of_nothing():
    weights, x = (torch.randn(2, 8), torch.randn(8, 2)), torch.randn(2, 8, 3, 3)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        torch.compile(lambda x: squeeze_excite(x, *weights), fullgraph=True, backend="aot_eager")(x)
        torch.compile(FusedSE(8, 4), fullgraph=True, backend="aot_eager")(x)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_under_autocast(dtype):
    layer, x = FusedSE(8, 4), torch.randn(2, 8, 3, 3, dtype=dtype)
    with torch.autocast("cpu", torch.bfloat16):
        y = torch.compile(layer, fullgraph=True, backend="aot_eager")(x)
        assert y.dtype == dtype and torch.equal(y, layer(x))


def test_activation_checkpointing_in_a_compiled_function():
    block, x, dy = Block(), torch.randn(2, 3, 5, 6), torch.randn(2, 8, 5, 6)
    expected = gradients(block, block(x), dy)
    senet_fused.reset_call_counts()
    run = torch.compile(lambda x: checkpoint(block, x, use_reentrant=False), fullgraph=True, backend="aot_eager")
    for a, b in zip(gradients(block, run(x), dy), expected, strict=True):
        torch.testing.assert_close(a, b)
    assert senet_fused.call_counts() == {"cpu.forward": 2, "cpu.backward": 1}


def test_compiled_autograd():
    """The backward of an eager forward, traced by torch.compile."""
    block, x, dy = Block(), torch.randn(2, 3, 5, 6), torch.randn(2, 8, 5, 6)
    block(x).backward(dy)
    expected = [p.grad for p in block.parameters()]
    block.zero_grad()
    senet_fused.reset_call_counts()
    with compiled_autograd._enable(torch.compile(fullgraph=True, backend="aot_eager")):
        block(x).backward(dy)
    assert senet_fused.call_counts() == {"cpu.forward": 1, "cpu.backward": 1}
    for p, grad in zip(block.parameters(), expected, strict=True):
        torch.testing.assert_close(p.grad, grad)


def test_inference_keeps_no_mask():
    """A graph without a backward asks the operator for none."""
    counter = CompileCounterWithBackend("eager")
    block, x = Block(), torch.randn(2, 3, 5, 6)
    with torch.no_grad():
        torch.compile(block, fullgraph=True, backend=counter)(x)
    save = [node.args[-1] for node in counter.graphs[0].graph.nodes if node.target is OPERATOR]
    assert save == [False]


# ---------------------------------------------------------------------------------- transforms inside

WEIGHTS = {"w1": torch.linspace(-1, 1, 16).reshape(2, 8), "w2": torch.linspace(1, -1, 16).reshape(8, 2)}


def _loss(weights, sample):
    return squeeze_excite(sample[None], weights["w1"], weights["w2"]).square().sum()


def _forward_mode(x):
    with forward_ad.dual_level():
        y = squeeze_excite(forward_ad.make_dual(x, x.cos()), **WEIGHTS)
        return forward_ad.unpack_dual(y).tangent


TRANSFORMS = {
    "vmap": lambda x: torch.vmap(lambda sample: squeeze_excite(sample[None], **WEIGHTS))(x),
    "per_sample_gradients": lambda x: torch.vmap(torch.func.grad(_loss), in_dims=(None, 0))(WEIGHTS, x)["w1"],
    "jvp": lambda x: torch.func.jvp(lambda v: squeeze_excite(v, **WEIGHTS), (x,), (x.cos(),))[1],
    "forward_ad": _forward_mode,
}


@pytest.mark.compiler
@pytest.mark.parametrize("name", TRANSFORMS)
def test_transforms_inside_a_compiled_function(name):
    x = torch.randn(3, 8, 2, 3)
    expected = TRANSFORMS[name](x)
    assert expected.abs().max() > 0.1
    compiled = torch.compile(TRANSFORMS[name], fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), expected)
