"""What is done to the children of FusedSE: they are called then, wherever the layer stands, and the report says why."""

from __future__ import annotations

import copy
import re
import warnings

import pytest
import torch
from changes import CHANGES, lora
from torch import nn
from torch.nn.modules import module as global_hooks

import senet_fused
from senet_fused import FusedSE, FusedSETail, fuse_report
from senet_fused.models.layers import Layers

pytestmark = pytest.mark.skipif(
    senet_fused.explain(torch.empty(0)).backend == "reference", reason="without compiled code there is no fused path"
)

C, R = 8, 2


class StockSE(nn.Module):
    """The usual layer around the same two children."""

    def __init__(self, se):
        super().__init__()
        self.fc1, self.fc2, self.conv = copy.deepcopy(se.fc1), copy.deepcopy(se.fc2), se.conv

    def forward(self, x):
        gate = torch.sigmoid(self.fc2(torch.relu(self.fc1(x.mean((2, 3), keepdim=self.conv)))))
        return x * gate.reshape(*x.shape[:2], 1, 1)


class Tail(nn.Module):
    """relu(se(norm(x)) + x), by the modules or by what make puts around them."""

    def __init__(self, se, make=None):
        super().__init__()
        self.norm, self.se, self.act = nn.BatchNorm2d(C).double(), se, nn.ReLU()
        self.tail = make(self) if make else None

    def forward(self, x):
        if self.tail is not None:
            return self.tail(x, x)
        return self.act(self.se(self.norm(x)) + x)


# (ours, stock) around an FusedSE and a StockSE.
HOLDERS = {
    "FusedSE": (lambda se: nn.Sequential(se), lambda se: nn.Sequential(se)),
    "FusedSETail": (lambda se: Tail(se, lambda o: FusedSETail(o.norm, o.se, o.act, owner=o)), Tail),
    "models": (lambda se: Tail(se, lambda o: Layers("fused").tail(o, o.norm, o.se, o.act)), Tail),
}


def se_of(model):
    return next(m for m in model.modules() if isinstance(m, (FusedSE, StockSE)))


def step(model, x):
    """The output and all gradients of a training step, by names that do not depend on the holder."""
    x = x.clone().requires_grad_()
    for p in model.parameters():
        p.grad = None
    y = model(x)
    y.backward(torch.randn(y.shape, generator=torch.Generator().manual_seed(1), dtype=y.dtype))
    return {"y": y.detach(), "x": x.grad, **{name: p.grad for name, p in model.named_parameters()}}


@pytest.mark.filterwarnings("ignore:Using a non-full backward hook:FutureWarning")
@pytest.mark.parametrize("conv", [False, True], ids=["linear", "conv"])
@pytest.mark.parametrize("holder", HOLDERS)
@pytest.mark.parametrize("change", CHANGES)
def test_children_are_called(change, holder, conv, monkeypatch):
    """Two steps are as stock's, with the same done to both; no kernel ran; without it the layer is fused again."""
    monkeypatch.setattr(global_hooks, "_global_is_full_backward_hook", None)  # PyTorch keeps it without a hook
    torch.manual_seed(0)
    se = FusedSE(C, rd_channels=R, bias=True, conv=conv, dtype=torch.float64)
    ours, stock = HOLDERS[holder][0](se), HOLDERS[holder][1](StockSE(se))
    x = torch.randn(3, C, 5, 4, dtype=torch.float64)
    do, reason = CHANGES[change]
    results = {}
    for model in (stock, ours):
        undo = do(se_of(model))
        senet_fused.reset_call_counts()
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", FutureWarning)
                results[model] = [step(model, x), step(model, x)]
            counts, rows = senet_fused.call_counts(), fuse_report(model).layers
        finally:
            if undo is not None:
                undo()
    assert counts == {}
    assert rows[0].status == "original runs" and re.match(f"its children are called: {reason}", rows[0].reason)
    for expected, got in zip(results[stock], results[ours], strict=True):
        assert got.keys() == expected.keys()
        torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-12)
    if undo is not None:
        assert fuse_report(ours).layers[0].fused
        ours(x)
        assert sum(senet_fused.call_counts().values()) == 1


def test_a_backend_by_name_serves_the_operator_alone():
    """fuse's rule: where the children have to be called there is no operator, and nothing is refused or warned of."""
    x = torch.randn(2, C, 3, 3)
    layer = FusedSE(C, rd_channels=R, backend="cpu")
    layer.fc2.register_forward_hook(lambda m, args, out: torch.zeros_like(out))
    torch.testing.assert_close(layer(x), 0.5 * x)
    assert senet_fused.call_counts() == {}


@pytest.mark.parametrize("squeeze", ["avg", "max", "avgmax"])
@pytest.mark.parametrize("options", [{}, {"act": "silu", "gate": "hardsigmoid"}, {"post_act": "relu"}], ids=str)
@pytest.mark.parametrize("dimensions", [1, 2, 3])
def test_called_children_compute_the_same(dimensions, options, squeeze):
    """Outputs, gradients and captured gates, with a residual; a hook that changes nothing has the children called."""
    torch.manual_seed(0)
    layer = FusedSE(C, rd_channels=R, bias=True, conv=dimensions == 2, squeeze=squeeze, **options).double()
    called = copy.deepcopy(layer)
    called.fc1.register_forward_hook(lambda *_: None)
    shape = (3, C, 5, 4, 2)[: 2 + dimensions]
    x, residual, dy = torch.randn(3, *shape, dtype=torch.float64)
    results = []
    for module in (layer, called):
        leaves = [t.clone().requires_grad_() for t in (x, residual)]
        with senet_fused.capture_gates(module) as gates:
            y = module(*leaves)
        (gate,) = gates[""]
        assert gate.dtype == torch.float64 and gate.requires_grad
        grads = torch.autograd.grad((y, gate), (*leaves, *module.parameters()), (dy, torch.ones_like(gate)))
        results.append((y, gate, *grads))
        assert senet_fused.call_counts() == {"cpu.forward": 1, "cpu.backward": 1}
    torch.testing.assert_close(*results, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_dtypes_of_x_and_of_called_children(dtype, layout):
    """x's dtype and layout come back, whatever the weights' dtype; and under autocast."""
    torch.manual_seed(0)
    layer, x = FusedSE(C, rd_channels=R), torch.randn(2, C, 4, 3, dtype=dtype).to(memory_format=layout)
    expected = layer(x)
    layer.fc1.register_forward_hook(lambda *_: None)
    for context in (torch.no_grad(), torch.autocast("cpu", torch.bfloat16)):
        with context:
            y = layer(x)
        assert y.dtype == dtype and y.stride() == expected.stride()
        torch.testing.assert_close(y, expected, rtol=0.02, atol=0.02)


def test_called_children_refuse_what_the_operator_refuses():
    layer = FusedSE(C, rd_channels=R)
    layer.fc1.register_forward_hook(lambda *_: None)
    with pytest.raises(ValueError, match="x must be .N, C, .spatial."):
        layer(torch.randn(2, C))
    with pytest.raises(TypeError, match="floating point"):
        layer(torch.ones(2, C, 3, 3, dtype=torch.int64))
    with pytest.raises(ValueError, match="residual must have x's shape"):
        layer(torch.randn(2, C, 3, 3), torch.randn(2, C, 1, 1))


def test_dynamically_quantised_children():
    layer, x = FusedSE(C, rd_channels=R, bias=True), torch.randn(2, C, 3, 3)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PyTorch's own, of what is to become of quantisation
        quantised = torch.ao.quantization.quantize_dynamic(layer, {nn.Linear}, torch.qint8)
    expected = x * torch.sigmoid(quantised.fc2(torch.relu(quantised.fc1(x.mean((2, 3))))))[:, :, None, None]
    torch.testing.assert_close(quantised(x), expected)
    assert not torch.equal(quantised(x), layer(x))


def test_per_sample_gradients_by_hooks_equal_those_of_torch_func():
    """As Opacus collects them: inputs by forward hooks, gradients of outputs by backward hooks."""
    torch.manual_seed(0)
    layer, x = FusedSE(C, rd_channels=R, dtype=torch.float64), torch.randn(4, C, 3, 3, dtype=torch.float64)
    parameters = dict(layer.named_parameters())

    def loss(p, sample):
        return torch.func.functional_call(layer, p, (sample[None],)).square().sum()

    expected = torch.func.vmap(torch.func.grad(loss), (None, 0))(parameters, x)
    inputs, samples = {}, {}
    for name in ("fc1", "fc2"):
        child = getattr(layer, name)
        child.register_forward_hook(lambda m, args, out, name=name: inputs.update({name: args[0].detach()}))
        child.register_full_backward_hook(
            lambda m, gi, go, name=name: samples.update({name: torch.einsum("no,ni->noi", go[0], inputs[name])})
        )
    layer(x.requires_grad_()).square().sum().backward()
    for name, got in samples.items():
        torch.testing.assert_close(got, expected[f"{name}.weight"], rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("change", ["lora", "parametrised", "register_forward_hook", None])
def test_compiled_without_a_graph_break(change):
    """With dynamic shapes, and kernels asked for by name, which are in the graph only where nothing is changed."""
    torch.manual_seed(0)
    layer = FusedSE(C, rd_channels=R, backend="cpu", dtype=torch.float64)
    if change is not None:
        CHANGES[change][0](layer)
    torch._dynamo.reset()
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True, dynamic=True)
    for shape in ((2, C, 3, 3), (5, C, 4, 6)):
        x = torch.randn(shape, dtype=torch.float64)
        expected = step(layer, x)
        senet_fused.reset_call_counts()
        torch.testing.assert_close(step(compiled, x)["y"], expected["y"], rtol=1e-10, atol=1e-12)
        assert senet_fused.call_counts() == ({} if change else {"cpu.forward": 1, "cpu.backward": 1})


@pytest.fixture
def one_process(tmp_path):
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def fsdp2(model):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (1,))
    fully_shard(model[0], mesh=mesh)  # the layer itself, whose class that changes
    return fully_shard(model, mesh=mesh)


def fsdp1(model):
    from torch.distributed.fsdp import FullyShardedDataParallel, ShardingStrategy

    return FullyShardedDataParallel(
        model, device_id=torch.device("cpu"), use_orig_params=False, sharding_strategy=ShardingStrategy.NO_SHARD
    )


@pytest.mark.skipif(not torch.distributed.is_available(), reason="this torch has no torch.distributed")
@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("shard", [fsdp1, fsdp2])
def test_sharded_weights_are_whole_within_a_step(shard, one_process):
    """And so the layer runs fused: they are plain tensors in the places, or the attributes, of the parameters."""
    torch.manual_seed(0)
    model, x = nn.Sequential(FusedSE(C, rd_channels=R, bias=True)), torch.randn(2, C, 3, 3)
    expected = model(x)
    sharded = shard(model)
    senet_fused.reset_call_counts()
    y = sharded(x)
    y.sum().backward()
    torch.testing.assert_close(y, expected)
    assert senet_fused.call_counts() == {"cpu.forward": 1, "cpu.backward": 1}


def test_a_forward_that_is_replaced_on_the_layer_is_reported():
    layer = FusedSE(C, rd_channels=R)
    assert fuse_report(layer).layers[0].fused
    layer.forward = lambda x: x
    (row,) = fuse_report(layer)
    assert row.status == "original runs" and "its forward has been replaced" in row.reason


def test_exported_and_traced():
    """torch.export with dynamic shapes and FX keep an adapter's call."""
    torch.manual_seed(0)
    layer, x = FusedSE(C, rd_channels=R, conv=True).eval(), torch.randn(5, C, 4, 3)
    lora(layer)
    exported = torch.export.export(layer, (torch.randn(2, C, 4, 3),), dynamic_shapes=({0: torch.export.Dim("n")},))
    torch.testing.assert_close(exported.module()(x), layer(x))
    traced = torch.fx.symbolic_trace(nn.Sequential(layer))
    assert "fc1" in traced.code
    torch.testing.assert_close(traced(x), layer(x))
