"""FusedSETail beside the modules it is made of: statistics, modes, hooks, copies, compile, export, what it refuses."""

from __future__ import annotations

import copy
import io
import itertools
import pickle
import warnings

import peer_layers as peers
import pytest
import torch
from oracle import DTYPES
from torch import nn

import senet_fused
from senet_fused import FusedSE, FusedSETail, block_tail, fuse

pytestmark = pytest.mark.skipif(
    senet_fused.backends.native.problem() is not None, reason="the compiled CPU library is not installed"
)

C = 8
FORWARD = torch.ops.senet_fused.fused_se_cpu.default
RAN = {"cpu.tail_forward": 1, "cpu.tail_backward": 1}


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def batch_norm(of: type[nn.Module] = nn.BatchNorm2d, **options: object) -> nn.Module:
    norm = of(C, **options)
    for t in (norm.weight, norm.bias):
        if t is not None:
            nn.init.normal_(t, 1.0)
    return norm


def se(**options: object) -> FusedSE:
    return FusedSE(C, 4, bias=True, **options)


def tail(norm: nn.Module | None = None, **options: object) -> FusedSETail:
    return FusedSETail(batch_norm() if norm is None else norm, se(), nn.ReLU(), **options)


def stock(module: FusedSETail, x, residual=None, factor=None):
    """The same by a copy of the modules, called one by one, the SE layer by the reference."""
    norm, layer, act = module._parts()
    y = norm(x)
    if layer is not None:
        with senet_fused.use_backend("reference"):
            y = layer(y)
    y = y if factor is None else y * factor.reshape(-1, *(1,) * (y.dim() - 1)).to(y.dtype)
    y = y if residual is None else y + residual
    return y if act is None else act(y)


def step(function, module, x, residual, factor=None):
    """y, dx, dresidual and the gradients of the parameters."""
    x, residual = x.detach().requires_grad_(), residual.detach().requires_grad_()
    module.zero_grad()
    y = function(x, residual, factor)
    y.backward(torch.linspace(-1, 1, y.numel()).reshape(y.shape).to(y.dtype))
    return {"y": y.detach(), "dx": x.grad, "dresidual": residual.grad} | {
        k: p.grad.clone() for k, p in module.named_parameters()
    }


def assert_close(found, expected, rtol=1e-4, atol=1e-5):
    assert found.keys() == expected.keys()
    for name, t in expected.items():
        torch.testing.assert_close(found[name], t, rtol=rtol, atol=atol, msg=lambda m, n=name: f"{n}: {m}")


# ---------------------------------------------------------------------------------- statistics

NORMS = {
    "momentum": {},
    "another momentum": {"momentum": 0.7, "eps": 0.01},
    "cumulative": {"momentum": None},
    "untracked": {"track_running_stats": False},
    "not affine": {"affine": False},
    "neither": {"affine": False, "track_running_stats": False},
}


@pytest.mark.parametrize("options", NORMS.values(), ids=NORMS)
@pytest.mark.parametrize("dimensions", [1, 2, 3])
def test_three_steps_and_an_evaluation(dimensions, options):
    """Outputs, gradients, running statistics and num_batches_tracked as of the modules themselves."""
    of = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)[dimensions - 1]
    module = tail(batch_norm(of, **options)).double()
    plain = copy.deepcopy(module)
    for i in range(3):
        x, residual = torch.randn(2, 4 - i, C, *(3, 4, 2)[:dimensions], dtype=torch.float64)
        factor = torch.rand(4 - i, dtype=torch.float64) if i else None
        senet_fused.reset_call_counts()
        found = step(module, module, x, residual, factor)
        assert senet_fused.call_counts() == RAN
        assert_close(found, step(lambda *a: stock(plain, *a), plain, x, residual, factor), 1e-9, 1e-9)
        assert_close(dict(module.named_buffers()), dict(plain.named_buffers()), 1e-12, 1e-12)
    if "track_running_stats" not in options:
        assert module.norm.num_batches_tracked == 3 and module.norm.running_mean.any()
    module.eval(), plain.eval()
    before = {k: t.clone() for k, t in module.named_buffers()}
    senet_fused.reset_call_counts()
    assert_close(step(module, module, x, residual), step(lambda *a: stock(plain, *a), plain, x, residual), 1e-9, 1e-9)
    assert senet_fused.call_counts() == {**RAN, "reference.forward": 1}
    assert_close(dict(module.named_buffers()), before, 0, 0)


def test_frozen_statistics_and_a_switch_of_tracking():
    """BatchNorm in evaluation within a module in training, and track_running_stats changed afterwards."""
    module, x = tail(), torch.randn(3, C, 4, 4)
    module(x)
    module.norm.eval()
    before = copy.deepcopy(module.norm.state_dict())
    senet_fused.reset_call_counts()
    torch.testing.assert_close(module(x), stock(copy.deepcopy(module), x))
    module.norm.train().track_running_stats = False
    torch.testing.assert_close(module(x), stock(copy.deepcopy(module), x))
    assert senet_fused.call_counts()["cpu.tail_forward"] == 2
    assert all(torch.equal(t, before[k]) for k, t in module.norm.state_dict().items())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_dtypes_of_x_and_of_the_modules(dtype):
    """bfloat16 weights and buffers, and float32 ones beside a bfloat16 x, as PyTorch takes them."""
    for own in {dtype, torch.float32 if dtype != torch.float64 else dtype}:
        module = tail().to(own)
        exact = copy.deepcopy(module).double()
        x, residual = torch.randn(2, 6, C, 5, 5).to(dtype)
        y = module(x, residual)
        assert y.dtype == dtype and senet_fused.call_counts()["cpu.tail_forward"]
        tolerance = {torch.float64: 1e-12, torch.float32: 1e-5}.get(dtype, 2e-2)
        expected = stock(exact, x.double(), residual.double())
        torch.testing.assert_close(y.double(), expected, rtol=tolerance, atol=tolerance)
        for name, t in module.norm.named_buffers():
            assert t.dtype == (torch.long if name == "num_batches_tracked" else own)
            allowed = tolerance if own == dtype else 1e-4
            torch.testing.assert_close(t.double(), exact.norm.get_buffer(name).double(), rtol=allowed, atol=allowed)


def test_one_value_per_channel_is_refused_as_by_batch_norm():
    x = torch.randn(1, C, 1, 1)
    for module in (tail(), batch_norm()):
        with pytest.raises(ValueError, match="Expected more than 1 value per channel when training"):
            module(x)
    module = tail().eval()
    torch.testing.assert_close(module(x), stock(module, x))


def test_under_autocast():
    module, x, residual = tail(), *torch.randn(2, 4, C, 5, 5)
    plain = copy.deepcopy(module)
    with torch.autocast("cpu", torch.bfloat16):
        y = module(x, residual)
        assert y.dtype == stock(copy.deepcopy(plain), x, residual).dtype == torch.float32
        assert module(x.bfloat16(), residual.bfloat16()).dtype == torch.bfloat16
    assert torch.equal(y, plain(x, residual))


# ---------------------------------------------------------------------------------- the modules


class Owner(nn.Module):
    """A block that has registered the modules, and then a tail of them."""

    def __init__(self, norm, layer, act):
        super().__init__()
        self.bn3, self.attention, self.relu = norm, layer, act
        self.tail = FusedSETail(norm, layer, act, owner=self)

    def forward(self, x, *rest):
        return self.tail(x, *rest)


@pytest.mark.parametrize("owned", [True, False])
def test_what_is_registered(owned):
    norm, layer, act = batch_norm(), se(), nn.ReLU()
    module = Owner(norm, layer, act).tail if owned else FusedSETail(norm, layer, act)
    children = {} if owned else {"norm": norm, "se": layer, "act": act}
    assert dict(module.named_children()) == children
    expected = [f"{k}.{name}" for k, child in children.items() for name in child.state_dict()]
    assert list(module.state_dict()) == expected and bool(list(module.parameters())) != owned
    assert ("of its owner's bn3, attention, relu" in repr(module)) == owned
    x = torch.randn(2, C, 3, 3)
    expected = stock(FusedSETail(*copy.deepcopy((norm, layer, act))), x)
    torch.testing.assert_close(module(x), expected)
    assert senet_fused.call_counts()["cpu.tail_forward"] == 1 and norm.num_batches_tracked == 1


def test_an_owners_new_modules_are_used():
    """Whatever replaces them: by hand, or as convert_sync_batchnorm does; an SE layer that was not read is called."""
    owner = Owner(batch_norm(), se(), nn.ReLU())
    assert list(owner.state_dict()) == [
        f"{name}.{key}" for name in ("bn3", "attention") for key in getattr(owner, name).state_dict()
    ]
    owner.bn3 = batch_norm().eval()
    x = torch.randn(2, C, 3, 3)
    torch.testing.assert_close(owner(x), owner.relu(owner.attention(owner.bn3(x))))
    converted = nn.SyncBatchNorm.convert_sync_batchnorm(copy.deepcopy(owner))
    assert type(converted.bn3) is nn.SyncBatchNorm and converted.tail._parts()[0] is converted.bn3
    torch.testing.assert_close(converted(x), owner(x))

    class Twice(FusedSE):
        def forward(self, x):
            return 2 * super().forward(x)

    owner.attention = Twice(C, 4)
    senet_fused.reset_call_counts()
    torch.testing.assert_close(owner(x), owner.relu(owner.attention(owner.bn3(x))))
    assert "cpu.tail_forward" not in senet_fused.call_counts()
    with pytest.raises(ValueError, match="cannot be part of a tail"):
        FusedSETail(batch_norm(), Twice(C, 4))
    with pytest.raises(ValueError, match="is no child of the owner"):
        FusedSETail(batch_norm(), owner=owner)
    plain = FusedSETail(batch_norm())
    plain.se = se()  # which was not there to be read
    assert torch.equal(plain(x), plain.se(copy.deepcopy(plain.norm)(x)))


def test_dimensions_have_to_agree():
    with pytest.raises(ValueError, match="not for as many dimensions as a BatchNorm3d"):
        FusedSETail(nn.BatchNorm3d(C), peers.TorchvisionSE(C, 4))


@pytest.mark.parametrize("with_se", [True, False])
@pytest.mark.parametrize("with_act", [True, False])
def test_parts_that_are_left_out(with_se, with_act):
    module = FusedSETail(batch_norm(), se() if with_se else None, nn.ReLU() if with_act else None)
    plain, (x, residual) = copy.deepcopy(module), torch.randn(2, 3, C, 4, 4)
    senet_fused.reset_call_counts()
    found = step(module, module, x, residual)
    assert senet_fused.call_counts() == RAN
    assert_close(found, step(lambda *a: stock(plain, *a), plain, x, residual))


def test_copies_and_files():
    module, (x, residual) = tail(backend="cpu"), torch.randn(2, 3, C, 4, 4)
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    copies = [copy.deepcopy(module), pickle.loads(pickle.dumps(module)), torch.load(file, weights_only=False)]
    owner = Owner(module.norm, module.se, module.act)
    copies += [copy.deepcopy(owner).tail, pickle.loads(pickle.dumps(owner)).tail]
    expected = module(x, residual)
    for other in copies:
        senet_fused.reset_call_counts()
        assert torch.equal(other(x, residual), expected)
        assert senet_fused.call_counts() == {"cpu.tail_forward": 1}
        norm = other._parts()[0]
        assert norm is not module.norm and norm.num_batches_tracked == 1
    other = tail()
    other.load_state_dict(module.state_dict())
    assert torch.equal(other(x), copy.deepcopy(module)(x))


def test_conversion_to_synchronised_batch_norm():
    """Alone, without processes, it is BatchNorm."""
    module = nn.SyncBatchNorm.convert_sync_batchnorm(tail())
    assert type(module.norm) is nn.SyncBatchNorm
    x = torch.randn(3, C, 4, 4)
    plain = FusedSETail(batch_norm(), copy.deepcopy(module.se), nn.ReLU())
    plain.load_state_dict(module.state_dict())
    assert torch.equal(module(x), plain(x)) and senet_fused.call_counts() == {"cpu.tail_forward": 2}


HOOKS = {
    "forward": lambda m, seen: m.register_forward_hook(lambda *a: seen.append("forward")),
    "forward_pre": lambda m, seen: m.register_forward_pre_hook(lambda *a: seen.append("forward_pre")),
    "backward": lambda m, seen: m.register_full_backward_hook(lambda *a: seen.append("backward")),
    "backward_pre": lambda m, seen: m.register_full_backward_pre_hook(lambda *a: seen.append("backward_pre")),
    "for all modules": lambda m, seen: nn.modules.module.register_module_forward_hook(lambda *a: seen.append(0)),
}


@pytest.mark.parametrize("kind", HOOKS)
@pytest.mark.parametrize("part", ["norm", "se", "act"])
def test_hooks_see_the_modules_called(part, kind):
    module, (x, residual) = tail(), torch.randn(2, 3, C, 4, 4)
    expected = copy.deepcopy(module)(x, residual)
    seen = []
    handle = HOOKS[kind](getattr(module, part), seen)
    senet_fused.reset_call_counts()
    try:
        y = module(x.requires_grad_(), residual)
        y.sum().backward()
    finally:
        handle.remove()
    assert seen and not any("tail" in name for name in senet_fused.call_counts())
    torch.testing.assert_close(y, expected)
    senet_fused.reset_call_counts()
    module(x)
    assert senet_fused.call_counts() == {"cpu.tail_forward": 1}


@pytest.mark.parametrize("part", ["norm", "se", "se.fc1"])
def test_another_forward_is_called(part):
    module, x = tail(), torch.randn(3, C, 4, 4)
    target = module.get_submodule(part)
    original, called = target.forward, []
    target.forward = lambda *a: called.append(1) or original(*a)
    y = module(x)
    assert not any("tail" in name for name in senet_fused.call_counts())
    assert called
    del target.forward
    torch.testing.assert_close(y, copy.deepcopy(module)(x))


def test_weights_that_are_no_plain_tensors():
    class Other(nn.Parameter):
        pass

    module, x = tail(), torch.randn(3, C, 4, 4)
    expected = module(x)
    for name in ("norm.weight", "se.fc1.weight"):
        changed = copy.deepcopy(module)
        owner, _, attribute = name.rpartition(".")
        weight = getattr(changed.get_submodule(owner), attribute)
        setattr(changed.get_submodule(owner), attribute, Other(weight.detach()))
        senet_fused.reset_call_counts()
        torch.testing.assert_close(changed(x), expected)
        assert not any("tail" in key for key in senet_fused.call_counts()), name


def test_captured_gates():
    module, x = tail(), torch.randn(3, C, 4, 4)
    with senet_fused.capture_gates(module) as gates:
        y = module(x)
    assert not any("tail" in name for name in senet_fused.call_counts())
    pooled = copy.deepcopy(module.norm)(x).mean((2, 3))
    expected = torch.sigmoid(module.se.fc2(torch.relu(module.se.fc1(pooled))))
    torch.testing.assert_close(gates["se"][0], expected)
    torch.testing.assert_close(y, copy.deepcopy(module)(x))


def test_auto_without_kernels_calls_the_modules_and_the_reference_by_name_does_not():
    module, x = tail(), torch.empty(2, C, 3, 3, device="meta")
    module.to("meta")(x)
    assert not any("tail" in name for name in senet_fused.call_counts())
    module = tail(backend="reference")
    x = torch.randn(2, C, 3, 3)
    senet_fused.reset_call_counts()
    torch.testing.assert_close(module(x), stock(copy.deepcopy(module), x))
    assert senet_fused.call_counts()["reference.tail_forward"] == 1


def test_x_that_only_batch_norm_takes():
    """[N, C] by BatchNorm1d, an empty batch, and errors in its words."""
    module = FusedSETail(batch_norm(nn.BatchNorm1d))
    x = torch.randn(5, C)
    torch.testing.assert_close(module(x), copy.deepcopy(module.norm).eval().train()(x))
    assert not senet_fused.call_counts()
    empty = tail().eval()(torch.empty(0, C, 3, 3))
    assert empty.shape == (0, C, 3, 3)
    with pytest.raises(ValueError, match="expected 4D input"):
        tail()(torch.randn(2, C, 3))
    with pytest.raises((ValueError, RuntimeError)):
        tail()(torch.randn(2, C + 1, 3, 3))


# ---------------------------------------------------------------------------------- SE layers of others

PEERS = {
    "tutorial": lambda: peers.TutorialSE(C, 2),
    "torchvision": lambda: peers.TorchvisionSE(C, 4, nn.SiLU, nn.Hardsigmoid),
    "timm": lambda: peers.TimmSEModule(C, 4),
    "timm squeeze-excite": lambda: peers.TimmSqueezeExcite(C, 4),
    "legacy": lambda: peers.LegacySE(C, 2),
    "mmpretrain": lambda: peers.MMPretrainSE(C, 4),
    "monai": lambda: peers.MonaiSE(2, C),
}


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("name", PEERS)
def test_layers_of_others(name, fused):
    layer = PEERS[name]()
    plain = nn.Sequential(batch_norm(), layer, nn.ReLU()).double()
    norm, layer, act = copy.deepcopy(plain)
    if fused:
        layer = fuse(nn.Sequential(layer))[0]
    module = FusedSETail(norm, layer, act)
    x, residual = torch.randn(2, 3, C, 4, 5, dtype=torch.float64)
    senet_fused.reset_call_counts()
    found = step(module, module, x, residual)
    assert senet_fused.call_counts() == RAN
    expected = step(lambda x, r, _: plain[2](plain[1](plain[0](x)) + r), plain, x, residual)
    # Stock's derivative of hardsigmoid is 1/6 in float32.
    assert_close(dict(zip(expected, found.values(), strict=True)), expected, 1e-6, 1e-7)


REFUSED = {
    "max": (lambda: se(squeeze="max"), "squeeze is 'max'"),
    "avgmax": (lambda: se(squeeze="avgmax"), "squeeze is 'avgmax'"),
    "maximum of another": (lambda: peers.TimmSEModule(C, 4, add_maxpool=True), "squeeze"),
    "unknown maximum": (lambda: peers.MaxPooled(C, 4), "cannot be part of a tail"),
    "post_act": (lambda: se(post_act="relu"), "post_act='relu' belongs behind the addition"),
    "gate alone": (lambda: peers.NvidiaSE(C, 4), "does not return x"),
    "with residual": (lambda: peers.MonaiSE(2, C, add_residual=True), "does not return x"),
    "channels behind": (lambda: peers.TimmSqueezeExciteCl(C, 4), "does not return x"),
    "spatial gate": (lambda: peers.SCSE(C, 2), "cannot be part of a tail"),
    "no layer": (lambda: nn.Linear(C, C), "cannot be part of a tail"),
    "other channels": (lambda: FusedSE(16, 4), "norm is for 8 channels, se for 16"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused_layers(name):
    make, message = REFUSED[name]
    with pytest.raises(ValueError, match="FusedSETail") as caught:
        FusedSETail(batch_norm(), make())
    assert message in str(caught.value), str(caught.value)


def test_refused_norms_acts_and_backends():
    class Own(nn.BatchNorm2d):
        pass

    class OwnReLU(nn.ReLU):
        pass

    hooked = batch_norm()
    hooked.register_forward_hook(lambda *a: None)
    for norm, message in (
        (nn.LayerNorm(C), "norm must be a BatchNorm, .*LayerNorm"),
        (nn.GroupNorm(2, C), "GroupNorm"),
        (nn.InstanceNorm2d(C), "InstanceNorm2d"),
        (nn.LazyBatchNorm2d(), "LazyBatchNorm2d"),
        (Own(C), "it is a Own"),
        (hooked, "has hooks"),
        (None, "NoneType"),
    ):
        with pytest.raises(TypeError, match=message):
            FusedSETail(norm)
    for act, name in ((nn.ReLU6(), "ReLU6"), (OwnReLU(), "OwnReLU"), ("relu", "str")):
        with pytest.raises(TypeError, match=f"act must be nn.ReLU or None, got {name}"):
            FusedSETail(batch_norm(), act=act)
    with pytest.raises(ValueError, match="choose one of"):
        FusedSETail(batch_norm(), backend="gpu")


# ---------------------------------------------------------------------------------- torch.compile, export, torch.func


@pytest.fixture
def nothing_compiled_yet():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.tail = nn.Conv2d(C, C, 3, padding=1), tail()

    def forward(self, x):
        return self.tail(self.conv(x), x) + 1


@pytest.mark.usefixtures("nothing_compiled_yet")
@pytest.mark.parametrize("mode", ["training", "evaluation"])
def test_compiled(mode):
    """One whole graph with the operator inside, forward and backward, and the buffers as in eager mode."""
    block = Block().train(mode == "training")
    eager = copy.deepcopy(block)
    compiled = torch.compile(block, fullgraph=True, backend="aot_eager", dynamic=True)
    for n in (2, 3, 5):
        x = torch.randn(n, C, 6, 7)
        results = []
        for model, call in ((block, compiled), (eager, eager)):
            senet_fused.reset_call_counts()
            model.zero_grad()
            y = call(x)
            y.square().sum().backward()
            assert senet_fused.call_counts() == RAN
            results.append({"y": y} | {k: p.grad for k, p in model.named_parameters()} | dict(model.named_buffers()))
        assert_close(*results, 1e-5, 1e-5)
    assert block.tail.norm.num_batches_tracked == (3 if mode == "training" else 0)


@pytest.mark.parametrize("strict", [True, False])
def test_export(strict):
    """The program holds the operator, takes other sizes, and runs after saving and loading."""
    block, x = Block(), torch.randn(2, C, 6, 7)
    block(x)
    block.eval()
    dynamic = {"x": {0: torch.export.Dim.DYNAMIC, 2: torch.export.Dim.DYNAMIC, 3: torch.export.Dim.DYNAMIC}}
    with senet_fused.use_backend("cpu"):
        program = torch.export.export(block, (x,), strict=strict, dynamic_shapes=dynamic)
    assert [n.target for n in program.graph.nodes].count(FORWARD) == 1
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    other = torch.randn(3, C, 9, 10)
    expected = block(other)
    for runnable in (program, torch.export.load(file)):
        senet_fused.reset_call_counts()
        assert torch.equal(runnable.module()(other), expected)
        assert senet_fused.call_counts() == {"cpu.tail_forward": 1}


def test_per_parameter_gradients_by_torch_func():
    """torch.func.grad of functional_call. Buffers that change it refuses to have captured, as of nn.BatchNorm2d."""
    x = torch.randn(4, C, 3, 3, dtype=torch.float64)
    for training, tracked in itertools.product((True, False), (True, False)):
        block = Block().double()
        block.tail.norm = batch_norm(track_running_stats=tracked).double()
        block.train(training)

        def loss(parameters, model):
            return torch.func.functional_call(model, parameters, (x,)).square().sum()

        parameters = {k: p.detach() for k, p in block.named_parameters()}
        if training and tracked:
            for model in (block, block.tail.norm):
                with pytest.raises(RuntimeError, match="captured Tensor"):
                    torch.func.grad(loss)(dict(model.named_parameters()), model)
            continue
        gradients = torch.func.grad(loss)(parameters, block)
        block(x).square().sum().backward()
        for name, p in block.named_parameters():
            torch.testing.assert_close(gradients[name], p.grad)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_jit_trace_gives_plain_operators():
    block, x = Block().eval(), torch.randn(2, C, 6, 7)
    with warnings.catch_warnings():
        warnings.simplefilter("error", torch.jit.TracerWarning)
        traced = torch.jit.trace(block, (x,))
    assert {node.kind().split("::")[0] for node in traced.inlined_graph.nodes()} <= {"aten", "prim"}
    other = torch.randn(3, C, 9, 10)
    torch.testing.assert_close(traced(other), block(other))


def test_the_function_does_what_the_module_does():
    module, (x, residual) = tail(), torch.randn(2, 3, C, 4, 4)
    other = copy.deepcopy(module)
    norm, layer = other.norm, other.se
    y = block_tail(
        x, norm.running_mean, norm.running_var, norm.weight, norm.bias, w1=layer.fc1.weight, w2=layer.fc2.weight,
        b1=layer.fc1.bias, b2=layer.fc2.bias, training=True, residual=residual, post_act="relu",
    )  # fmt: skip
    assert torch.equal(module(x, residual), y)
    assert torch.equal(norm.running_mean, module.norm.running_mean)
    assert torch.equal(norm.running_var, module.norm.running_var)
