"""What every backend's block tails have to hold to as operators and modules: opcheck, both paths, torch.compile, second
order, models; on a GPU also streams, graphs, and large tensors.

As for gpu_tail_contract.py, a test module of a backend imports the tests and has the fixtures `backend_name` and
`using_strategy`.
"""

from __future__ import annotations

import copy

import pytest
import torch
from gpu_contract import DENSE, DEVICE, STRATEGIES, on_device
from oracle import Tensors
from peer_blocks import DropPath, LegacyBottleneck, MonaiBlock, TimmBottleneck
from tail_oracle import (
    CONSTANT,
    EVERYTHING,
    Tail,
    backward_arguments,
    call_of,
    draw,
    forward_arguments,
    fused,
    operators,
)
from torch import nn

import senet_fused
from senet_fused import FusedSE, FusedSETail, block_tail, fuse, fuse_report
from senet_fused.ops import OPERATORS

CASES = {
    "plain": Tail((2, 24, 5, 4), 4),
    "everything": Tail((3, 24, 4, 6), 4, torch.bfloat16, "channels_last", **EVERYTHING),
    "evaluation": Tail((3, 16, 7, 7), 4, torch.bfloat16, training=False, residual=True, post_act="relu"),
    "no gate": Tail((3, 20, 3, 5), 0, torch.float16, residual=True, post_act="relu"),
    "no gate, evaluation": Tail((3, 20, 3, 5), 0, layout="channels_last", training=False),
    "not affine": Tail((2, 24, 5, 4), 4, affine=False, bias=False, act="silu", gate="hardsigmoid(0.2, 0.5)"),
}


def tensors_of(case: Tail, requires_grad: bool = False) -> Tensors:
    """Inputs and dy on the device."""
    t = {name: on_device(v) for name, v in draw(case, 0).items()}
    return {k: v.requires_grad_(requires_grad and k not in ("dy", *CONSTANT)) for k, v in t.items()}


def counts(backend: str, forward: int = 1, backward: int = 1) -> dict[str, int]:
    return {f"{backend}.tail_forward": forward, f"{backend}.tail_backward": backward}


@pytest.mark.parametrize("name", CASES)
def test_opcheck(backend_name, name):
    case, (forward, backward) = CASES[name], operators(backend_name)
    torch.library.opcheck(forward, forward_arguments(case, tensors_of(case, requires_grad=True)))
    t, utils = tensors_of(case), ("test_schema", "test_faketensor")
    torch.library.opcheck(forward, forward_arguments(case, t, save=False), test_utils=utils)
    arguments = backward_arguments(case, t, forward(*forward_arguments(case, t)))
    torch.library.opcheck(backward, arguments, test_utils=utils)


@pytest.mark.core
@pytest.mark.parametrize("name", CASES)
def test_eager_and_registered_agree_bitwise(backend_name, name):
    results, case = [], CASES[name]
    operator = OPERATORS[backend_name]
    for path in (operator.eager, lambda call: operator.registered(call, True)):
        t = tensors_of(case, requires_grad=True)
        senet_fused.reset_call_counts()
        y, statistics, *_ = path(call_of(case, t))
        leaves = [v for v in t.values() if v.requires_grad]
        results.append([y, statistics, *torch.autograd.grad(y, leaves, t["dy"])])
        assert senet_fused.call_counts() == counts(backend_name)
    for a, b in zip(*results, strict=True):
        assert a.stride() == b.stride() and torch.equal(a, b)


@pytest.mark.parametrize("training", [True, False])
def test_second_order(backend_name, training):
    """The backward of the backward is the reference's."""
    case = Tail((3, 6, 3, 4), 3, training=training, act="silu", residual=True, post_act="relu")
    gradients = []
    for name in (backend_name, "reference"):
        t = tensors_of(case, requires_grad=True)
        leaves = [t[k] for k in ("x", "weight", "w1", "w2")]
        first = torch.autograd.grad(fused(case, t, name), leaves, t["dy"], create_graph=True)
        gradients.append(torch.autograd.grad(sum((g**2).sum() for g in first), leaves))
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4 * b.abs().max().item())


def test_vmap_of_the_operators_themselves(backend_name):
    forward, _ = operators(backend_name)
    case = CASES["plain"]
    draws = [{k: on_device(v) for k, v in draw(case, seed).items()} for seed in range(2)]
    mapped = torch.vmap(lambda x: forward(*forward_arguments(case, {**draws[0], "x": x})))(
        torch.stack([t["x"] for t in draws])
    )
    for i, t in enumerate(draws):
        for got, expected in zip(mapped, forward(*forward_arguments(case, {**draws[0], "x": t["x"]})), strict=True):
            assert torch.equal(got[i], expected)


# ---------------------------------------------------------------------------------------------------- modules


def module_of(backend: str | None, c: int = 24, r: int = 4, training: bool = True) -> FusedSETail:
    torch.manual_seed(0)
    norm = nn.BatchNorm2d(c)
    for t in (norm.weight, norm.bias):
        nn.init.normal_(t, 1.0)
    return FusedSETail(norm, FusedSE(c, rd_channels=r), nn.ReLU(), backend=backend).train(training).to(DEVICE)


def stock(module: FusedSETail, x: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
    """The same by the modules, called one by one, the SE layer by the reference."""
    with senet_fused.use_backend("reference"):
        return module.act(module.se(module.norm(x)) + residual)


def step(call, module: nn.Module, *inputs: torch.Tensor) -> Tensors:
    """y, the gradients of inputs and parameters, and the buffers as they are then."""
    leaves = [t.detach().requires_grad_() for t in inputs]
    torch.manual_seed(1)  # for what stochastic depth leaves out
    y = call(*leaves)
    named = dict(module.named_parameters())
    dy = torch.linspace(-1, 1, y.numel(), device=y.device).reshape(y.shape).to(y.dtype)
    gradients = torch.autograd.grad(y, [*leaves, *named.values()], dy)
    names = [f"dinput{i}" for i in range(len(leaves))] + list(named)
    buffers = {k: t.clone() for k, t in module.named_buffers()}
    return {"y": y.detach(), **dict(zip(names, gradients, strict=True)), **buffers}


def assert_close(found: Tensors, expected: Tensors, tolerance: float = 1e-4) -> None:
    for name, t in expected.items():
        size = t.double().abs().max().item()
        torch.testing.assert_close(
            found[name], t, rtol=tolerance, atol=tolerance * size, msg=lambda m, n=name: f"{n}: {m}"
        )


def test_three_steps_and_an_evaluation(backend_name):
    """Outputs, gradients, running statistics and num_batches_tracked as of the modules themselves."""
    module = module_of(backend_name)
    plain = copy.deepcopy(module)
    plain.se.backend = None
    for i in range(4):
        module.train(i < 3), plain.train(i < 3)
        x, residual = torch.randn(2, 4 - i % 3, 24, 5, 6, device=DEVICE)
        senet_fused.reset_call_counts()
        found = step(module, module, x, residual)
        assert senet_fused.call_counts() == counts(backend_name)
        assert_close(found, step(lambda *a: stock(plain, *a), plain, x, residual))
    assert module.norm.num_batches_tracked == 3 and module.norm.running_mean.any()


def test_autocast(backend_name):
    """No input is cast: x decides."""
    for dtype in (torch.float32, torch.bfloat16):
        module = module_of(backend_name)
        x, residual = torch.randn(2, 3, 24, 4, 4, device=DEVICE, dtype=dtype)
        with torch.autocast(DEVICE, dtype=torch.bfloat16):
            y = module(x, residual)
        assert y.dtype == dtype and torch.equal(y, module(x, residual))


BLOCKS = {
    "timm": (TimmBottleneck, 4, 2),
    "timm, stochastic depth": (lambda: TimmBottleneck(drop_path=DropPath()), 4, 2),
    "legacy, stride": (lambda: LegacyBottleneck(stride=2), 4, 2),
    "monai": (MonaiBlock, 4, 3),
}


@pytest.mark.parametrize("name", BLOCKS)
def test_fused_blocks(backend_name, name):
    """Every BatchNorm of the block runs as a tail of this backend; two steps and an evaluation."""
    make, norms, dimensions = BLOCKS[name]
    torch.manual_seed(0)
    plain = nn.Sequential(make()).to(DEVICE)
    with torch.no_grad():
        for p in plain.parameters():
            p.add_(0.1 * torch.randn_like(p))
    model = fuse(copy.deepcopy(plain), backend=backend_name, tails=True)
    assert [block.status for block in fuse_report(model).blocks] == ["fused"]
    x = torch.randn(3, 12, *(8, 7, 6)[:dimensions], device=DEVICE)
    for training in (True, True, False):
        model.train(training), plain.train(training)
        senet_fused.reset_call_counts()
        found = step(model, model, x)
        assert senet_fused.call_counts() == counts(backend_name, norms, norms)
        expected = step(plain, plain, x)
        largest = max(t.double().norm() for t in expected.values())
        for key, t in expected.items():
            scale = t.double().norm() if key in ("y", *dict(plain.named_buffers())) else largest
            assert (found[key].double() - t.double()).norm() <= 1e-3 * scale, key


# ---------------------------------------------------------------------------------------------------- torch.compile


@pytest.mark.compiler
@pytest.mark.parametrize(("dynamic", "training"), [(False, True), (True, True), (True, False)])
def test_torch_compile(backend_name, dynamic, training):
    """The operator stays whole in the graph, forward and backward; one graph for all sizes."""
    torch._dynamo.reset()
    module = module_of(backend_name, training=training)
    eager = copy.deepcopy(module)
    compiled = torch.compile(module, fullgraph=True, dynamic=dynamic)
    for n, size in ((2, 5), (3, 6), (5, 7)) if dynamic else ((2, 5),):
        x, residual = torch.randn(2, n, 24, size, 4, device=DEVICE)
        senet_fused.reset_call_counts()
        found = step(compiled, module, x, residual)
        assert senet_fused.call_counts() == counts(backend_name)
        expected = step(eager, eager, x, residual)
        for name, t in expected.items():
            same = torch.equal if "running" not in name else torch.allclose
            assert same(found[name], t), name


# ---------------------------------------------------------------------------------------------------- GPUs

ON_GPU = pytest.mark.skipif(DEVICE != "cuda", reason="no GPU")
BOTH_MODES = pytest.mark.parametrize("training", [True, False])
# Where planners take each strategy for an SE layer, at batch 64.
SIZES = {"partials": (256, 16, 56), "last_block": (2048, 128, 7), "launches": (960, 240, 7)}


def large_case(strategy: str, training: bool) -> Tail:
    c, r, size = SIZES[strategy]
    shape = (64, c, size, size)
    return Tail(shape, r, torch.bfloat16, "channels_last", training, residual=True, post_act="relu")


def large_module(backend_name: str, case: Tail) -> tuple[FusedSETail, torch.Tensor, torch.Tensor, torch.Tensor]:
    """A module with what goes into it: x, residual, dy."""
    module = module_of(backend_name, case.shape[1], case.reduced, case.training).bfloat16()
    tensors = torch.randn(3, *case.shape, device=DEVICE, dtype=torch.bfloat16)
    x, residual, dy = (t.contiguous(memory_format=torch.channels_last) for t in tensors)
    return module, x.requires_grad_(), residual.requires_grad_(), dy


def gradients(module: nn.Module, x: torch.Tensor, residual: torch.Tensor, dy: torch.Tensor) -> list[torch.Tensor]:
    y = module(x, residual)
    return [y.detach(), *torch.autograd.grad(y, [x, residual, *module.parameters()], dy)]


@ON_GPU
@BOTH_MODES
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_two_streams(backend_name, using_strategy, strategy, training):
    """Calls that overlap in two streams give what they give alone."""
    case = large_case(strategy, training)
    with using_strategy(case, strategy):
        call = large_module(backend_name, case)
        expected = gradients(*call)
        streams = [torch.cuda.Stream(), torch.cuda.Stream()]
        torch.cuda.synchronize()
        found = []
        for i in range(20):
            with torch.cuda.stream(streams[i % 2]):
                found.append(gradients(*call))
        torch.cuda.synchronize()
    for results in found:
        assert all(torch.equal(a, b) for a, b in zip(results, expected, strict=True))


@ON_GPU
@BOTH_MODES
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_graph_replay(backend_name, using_strategy, strategy, training):
    case = large_case(strategy, training)
    with using_strategy(case, strategy):
        call = large_module(backend_name, case)
        side = torch.cuda.Stream()
        with torch.cuda.stream(side):
            gradients(*call)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = gradients(*call)
        for _ in range(3):
            with torch.no_grad():
                for t in call[1:]:
                    t.normal_()
            graph.replay()
            expected = gradients(*call)
            assert all(torch.equal(a, b) for a, b in zip(captured, expected, strict=True))


@ON_GPU
@BOTH_MODES
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_reduce_overhead(backend_name, using_strategy, strategy, training):
    torch._dynamo.reset()
    case = large_case(strategy, training)
    with using_strategy(case, strategy):
        module, x, residual, dy = large_module(backend_name, case)
        expected = gradients(module, x, residual, dy)
        compiled = torch.compile(module, mode="reduce-overhead", fullgraph=True)
        for _ in range(4):
            torch.compiler.cudagraph_mark_step_begin()
            y = compiled(x, residual)
            found = [y.detach().clone()]
            found += [g.clone() for g in torch.autograd.grad(y, [x, residual, *module.parameters()], dy)]
            assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@ON_GPU
@BOTH_MODES
def test_nothing_waits_for_the_device(backend_name, using_strategy, training):
    for strategy in STRATEGIES:
        case = large_case(strategy, training)
        with using_strategy(case, strategy):
            call = large_module(backend_name, case)
            gradients(*call)
            torch.cuda.set_sync_debug_mode("error")
            try:
                gradients(*call)
            finally:
                torch.cuda.set_sync_debug_mode("default")


def large_x(layout: str) -> torch.Tensor:
    """More than 2^31 elements: the last samples lie beyond 32-bit offsets."""
    memory_format = torch.channels_last if layout == "channels_last" else torch.contiguous_format
    x = torch.empty(2700, 256, 56, 56, device=DEVICE, dtype=torch.bfloat16, memory_format=memory_format).normal_()
    assert x.numel() > 2**31
    return x.requires_grad_()


SOME = (slice(0, 2), slice(1350, 1352), slice(2698, 2700))


@ON_GPU
@pytest.mark.parametrize("layout", DENSE)
def test_more_than_2_to_the_31_elements(backend_name, layout):
    """With statistics that are given, samples are what they are alone."""
    x, module = large_x(layout), module_of(backend_name, 256, 16, training=False).bfloat16()
    y = module(x)
    (dx,) = torch.autograd.grad(y, [x], y)
    for chosen in SOME:
        alone = x.detach()[chosen].requires_grad_()
        y_alone = module(alone)
        assert torch.equal(y[chosen], y_alone)
        assert torch.equal(dx[chosen], torch.autograd.grad(y_alone, [alone], y_alone)[0])


@ON_GPU
@pytest.mark.parametrize("layout", DENSE)
def test_statistics_of_more_than_2_to_the_31_elements(backend_name, layout):
    """Against float64, a part of the channels at a time; dx by its formula, from the sums of all."""
    x, channels = large_x(layout), slice(250, 256)
    weight, bias = torch.rand(2, 256, device=DEVICE).add_(0.5).requires_grad_()
    mean, var = torch.zeros(256, device=DEVICE), torch.ones(256, device=DEVICE)
    y = block_tail(x, mean, var, weight, bias, training=True, momentum=1.0, post_act="relu", backend=backend_name)
    dx, dweight, dbias = torch.autograd.grad(y, [x, weight, bias], y)
    part = x.detach()[:, channels].double()
    exact_var, exact_mean = torch.var_mean(part, (0, 2, 3))
    torch.testing.assert_close(mean[channels].double(), exact_mean, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(var[channels].double(), exact_var, rtol=1e-5, atol=0)

    def wide(t: torch.Tensor) -> torch.Tensor:
        return t.detach()[channels].double().reshape(1, -1, 1, 1)

    count = part.numel() / part.shape[1]
    scale = (exact_var * (count - 1) / count + 1e-5).rsqrt()[:, None, None]
    xhat = (part - exact_mean[:, None, None]) * scale
    g = (xhat * wide(weight) + wide(bias)).clamp_(min=0)
    for found, exact in ((dweight, (g * xhat).sum((0, 2, 3))), (dbias, g.sum((0, 2, 3)))):
        torch.testing.assert_close(found[channels].double(), exact, rtol=1e-3, atol=0)
    for chosen in SOME:
        torch.testing.assert_close(y[chosen, channels].double(), g[chosen], rtol=0.01, atol=0.01)
        expected = wide(weight) * scale * (g - wide(dbias) / count - xhat * wide(dweight) / count)[chosen]
        torch.testing.assert_close(dx[chosen, channels].double(), expected, rtol=0.02, atol=0.02)


@ON_GPU
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="one GPU")
def test_a_device_that_is_not_the_current_one(backend_name):
    module, x, residual, dy = large_module(backend_name, large_case("partials", True))
    expected = gradients(module, x, residual, dy)
    moved = (t.detach().to("cuda:1").requires_grad_() for t in (x, residual))
    found = gradients(module.to("cuda:1"), *moved, dy.to("cuda:1"))
    assert all(torch.equal(a.cpu(), b.cpu()) for a, b in zip(found, expected, strict=True))
