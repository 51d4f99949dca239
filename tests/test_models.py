"""The SENet family: sizes as published, and one computation whatever runs it. Against timm and Cadene: tests/peers."""

from __future__ import annotations

import copy
import functools
import pickle

import pytest
import torch
from oracle import assert_right
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import senet_fused
from senet_fused import FusedSE, FusedSETail, models
from senet_fused.models import SENet, create_model, model_names
from senet_fused.models.layers import ReferenceSE, kept_samples
from senet_fused.models.senet import STRATEGIES, Block, basic, bottleneck, resnext, senet

KERNELS = senet_fused.explain(torch.empty(0)).backend == "cpu"
needs_kernels = pytest.mark.skipif(not KERNELS, reason="without compiled code there is nothing to count")

# Parameters; those of the SE layers; multiply-adds of a 224 x 224 image in units of 1e9, of the network and of its twin
# without SE, as Hu et al. 2018 have them in table 2 (SENet-154: of timm's legacy model).
SIZES = {
    "senet154": (115_088_984, 6_629_040, 20.7, None),
    "se_resnet18": (11_778_592, 89_080, None, None),
    "se_resnet34": (21_958_868, 161_196, None, None),
    "se_resnet50": (28_088_024, 2_530_992, 3.87, 3.86),
    "se_resnet101": (49_326_872, 4_777_712, 7.60, 7.58),
    "se_resnet152": (66_821_848, 6_629_040, 11.32, 11.30),
    "se_resnext50_32x4d": (27_559_896, 2_530_992, 4.25, 4.24),
    "se_resnext101_32x4d": (48_955_416, 4_777_712, 8.00, 7.99),
}
CHOICES = ("fused", "tails", "reference")


def parameters(model, of=""):
    return sum(p.numel() for name, p in model.named_parameters() if of in name)


def multiply_adds(model, size=224):
    """In units of 1e9; FlopCounterMode counts two operations for each."""
    with FlopCounterMode(display=False) as counter, torch.device("meta"):
        model.eval()(torch.empty(1, 3, size, size))
    return counter.get_total_flops() / 2e9


@pytest.mark.networks
@pytest.mark.parametrize("name", SIZES)
def test_sizes_are_the_published_ones(name):
    total, of_se, with_se, without = SIZES[name]
    with torch.device("meta"):
        model, twin = create_model(name, se="reference"), create_model(name, se=None)
    assert parameters(model) == total
    assert parameters(model, "se_module") == of_se
    assert parameters(twin) == total - of_se
    assert not any("se_module" in key for key in twin.state_dict())
    for network, published in ((model, with_se), (twin, without)):
        if published is not None:
            assert multiply_adds(network) == pytest.approx(published, rel=0.005)


def tiny(convs=bottleneck, depths=(2, 1), dtype=torch.float64, seed=0, **options):
    torch.manual_seed(seed)
    expansion = 1 if convs is basic else 4
    options = {"planes": 8, "expansion": expansion, "stem_channels": 8, "reduction": 4, "num_classes": 5, **options}
    model = SENet(convs, depths, **options).to(dtype)
    with torch.no_grad():
        for name, tensor in (*model.named_parameters(), *model.named_buffers()):
            if "bn" in name or ".downsample.1" in name or "fc" in name:
                tensor += torch.rand_like(tensor) if tensor.is_floating_point() else 0
    return model


def step(model, training=True, seed=1):
    """Output, every gradient, and the buffers behind one step."""
    torch.manual_seed(seed)
    model.train(training)
    x = torch.randn(3, 3, 33, 31, dtype=next(model.parameters()).dtype, requires_grad=True)
    y = model(x)
    y.backward(torch.randn_like(y))
    gradients = {name: p.grad for name, p in model.named_parameters()}
    return {"y": y.detach(), "dx": x.grad, **gradients, **dict(model.named_buffers())}


NETWORKS = {
    "basic": {"convs": basic},
    "basic, ReLU before SE": {"convs": basic, "act_before_se": True},
    "bottleneck": {"convs": bottleneck},
    "resnext": {"convs": resnext, "planes": 16, "groups": 4},
    "senet": {"convs": senet, "groups": 4, "stem": "deep", "downsample_size": 3},
    "small": {"convs": basic, "stem": "small", "depths": (1, 1, 1)},
    "stochastic depth": {"drop_path": 0.4},
    "dropout": {"dropout": 0.3},
    "maximum": {"squeeze": "max"},
    "average and maximum": {"squeeze": "avgmax"},
    "other functions": {"act": "silu", "gate": "hardsigmoid(0.2, 0.5)"},
    **{strategy: {"strategy": strategy} for strategy in STRATEGIES[1:]},
}


@pytest.mark.parametrize("options", NETWORKS.values(), ids=NETWORKS)
def test_one_computation_whatever_runs_it(options):
    for training in (True, False):

        def by(se, training=training):
            senet_fused.reset_call_counts()
            found, counts = step(tiny(se=se, **options), training), senet_fused.call_counts()
            assert (counts == {}) == (se == "reference"), counts
            return found

        for se in ("fused", "tails"):
            assert_right(by(se), functools.partial(by, "reference"))


@needs_kernels
@pytest.mark.parametrize(
    ("options", "layers", "tails", "apart"),
    [
        ({}, 3, 1 + 3 * 3 + 2, 0),
        ({"squeeze": "max"}, 3, 1 + 3 * 3 + 2, 3),
        ({"strategy": "pre"}, 3, 1 + 3 * 3 + 2, 3),
        ({"convs": basic, "act_before_se": True}, 3, 1 + 3 * 2 + 1, 3),
    ],
    ids=["standard", "maximum", "pre", "ReLU before SE"],
)
def test_what_runs(options, layers, tails, apart):
    """tails: the stem's BatchNorm, the blocks' and their shortcuts'. apart: SE layers that cannot be part of one."""
    for se, wanted in (
        ("fused", {"cpu.forward": layers, "cpu.backward": layers}),
        ("tails", {"cpu.tail_forward": tails, "cpu.tail_backward": tails, "cpu.forward": apart, "cpu.backward": apart}),
    ):
        model = tiny(se=se, **options)
        senet_fused.reset_call_counts()
        step(model)
        assert senet_fused.call_counts() == {name: count for name, count in wanted.items() if count}


def test_the_twin_is_the_network_without_its_gates():
    """With a weight of 0 and a large bias behind it, a sigmoid is 1."""
    model, twin = tiny(se="reference"), tiny(se=None)
    for module in model.modules():
        if isinstance(module, ReferenceSE):
            nn.init.zeros_(module.fc2.weight)
            nn.init.constant_(module.fc2.bias, 60.0)
    twin.load_state_dict({k: v for k, v in model.state_dict().items() if "se_module" not in k})
    x = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    torch.testing.assert_close(twin.eval()(x), model.eval()(x), rtol=1e-12, atol=0)
    assert not any(isinstance(module, (FusedSE, ReferenceSE)) for module in twin.modules())


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_strategies_by_hand(strategy):
    block = tiny(se="reference", strategy=strategy).eval().layer2[0]
    x = torch.randn(2, 32, 8, 6, dtype=torch.float64)
    se, relu = block.se_module, torch.relu
    y = se(x) if strategy == "pre" else x
    y = relu(block.bn1(block.conv1(y)))
    y = relu(block.bn2(block.conv2(y)))
    y = block.bn3(block.conv3(y))
    conv, norm = list(block.downsample.children())[:2]
    shortcut = norm(conv(x))
    wanted = {
        "standard": lambda: relu(se(y) + shortcut),
        "pre": lambda: relu(y + shortcut),
        "post": lambda: se(relu(y + shortcut)),
        "identity": lambda: relu(y + se(shortcut)),
    }[strategy]()
    assert torch.equal(block(x), wanted)
    assert se.fc1.in_channels == (32 if strategy == "pre" else 64)


def test_the_stride_stands_where_caffe_has_it():
    for convs, strides in ((bottleneck, [2, 1, 1]), (resnext, [1, 2, 1]), (senet, [1, 2, 1])):
        assert [conv.stride[0] for conv in convs(16, 16, 4, 2)] == strides


def test_one_seed_gives_the_same_weights_and_the_same_keys():
    states = {se: tiny(se=se).state_dict() for se in CHOICES}
    for se in CHOICES[:2]:
        assert list(states[se]) == list(states["reference"])
        for key, tensor in states["reference"].items():
            assert torch.equal(states[se][key], tensor), key
    for se in CHOICES:
        tiny(se=se, seed=5).load_state_dict(states["tails"])


@pytest.mark.parametrize("se", [*CHOICES, None])
def test_copies(se):
    model = tiny(se=se)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        with torch.no_grad():
            for p in other.parameters():
                p.add_(0.0)
        assert_right(step(other), lambda: step(copy.deepcopy(model)))
        inside = set(other.modules())
        for module in other.modules():
            owner = getattr(module, "_owner", None)
            assert owner is None or owner[0] in inside, "a copy's tails must look at the copy's modules"


def test_stochastic_depth_rises_to_the_given_rate():
    model = create_model("se_resnet20", drop_path=0.45)
    rates = [module.drop_path for module in model.modules() if isinstance(module, Block)]
    assert rates == pytest.approx([0.45 * block / 9 for block in range(1, 10)])
    torch.manual_seed(0)
    factors = kept_samples(torch.empty(4000, 1), 0.25)
    assert factors.unique().tolist() == pytest.approx([0, 4 / 3])
    assert factors.mean().item() == pytest.approx(1, abs=0.05)


def _with_other_relus(model):
    for module in model.modules():
        if isinstance(module, Block):
            module.relu = nn.SiLU()


def _with_another_drop_path(model):
    for module in model.modules():
        if isinstance(module, Block):
            module.drop_path = 0.5


def _with_hooks_on_se(model):
    for module in model.modules():
        if isinstance(module, (FusedSE, ReferenceSE)):
            module.register_forward_hook(lambda module, inputs, y: y * 0.5)


def _with_hooks_on_relu(model):
    for module in model.modules():
        if isinstance(module, Block):
            module.relu.register_forward_hook(lambda module, inputs, y: y * 0.5)


def _with_identities(model):
    for module in model.modules():
        if isinstance(module, Block):
            module.se_module = nn.Identity()


@pytest.mark.parametrize(
    "change",
    [_with_other_relus, _with_another_drop_path, _with_hooks_on_se, _with_hooks_on_relu, _with_identities],
)
def test_what_is_changed_later_counts(change):
    def changed(se):
        model = tiny(se=se)
        change(model)
        return step(model)

    for se in ("fused", "tails"):
        found = changed(se)  # without SE layers there is nothing of them
        assert_right(found, lambda f=found: {k: t for k, t in changed("reference").items() if k in f})


@pytest.mark.parametrize("se", ["fused", "tails"])
def test_data_parallel_is_refused(se):
    model = tiny(se=se).layer1[0].tail1
    with pytest.raises(RuntimeError, match="use DistributedDataParallel"):
        model._replicate_for_data_parallel()


def test_the_twin_of_a_resnet18_is_a_resnet18():
    block = tiny(basic, se=None, act_before_se=True).eval().layer1[0]
    x = torch.randn(2, 8, 6, 5, dtype=torch.float64)
    y = block.bn2(block.conv2(torch.relu(block.bn1(block.conv1(x)))))
    assert torch.equal(block(x), torch.relu(y + x))


@needs_kernels
def test_fuse_finds_the_reference_network():
    model, fused = tiny(se="reference"), tiny(se="reference")
    senet_fused.fuse(fused, tails=True)
    report = senet_fused.fuse_report(fused)
    assert all(layer.fused for layer in report.layers)
    assert len(report.layers) == len(report.blocks) == 3
    assert all(block.fused for block in report.blocks)
    assert_right(step(fused), lambda: step(copy.deepcopy(model)))


@needs_kernels
@pytest.mark.parametrize("se", ["fused", "tails"])
def test_gates_can_be_captured(se):
    model = tiny(se=se)
    with senet_fused.capture_gates(model) as gates:
        step(model)
    assert {name: [tuple(gate.shape) for gate in calls] for name, calls in gates.items()} == {
        "layer1.0.se_module": [(3, 32)], "layer1.1.se_module": [(3, 32)], "layer2.0.se_module": [(3, 64)],
    }  # fmt: skip


@needs_kernels
def test_backend_reaches_every_layer_and_tail():
    model = tiny(se="tails", backend="reference")
    step(model)
    assert set(senet_fused.call_counts()) == {"reference.tail_forward"}
    assert all(m.backend == "reference" for m in model.modules() if isinstance(m, (FusedSE, FusedSETail)))


@pytest.mark.compiler
@needs_kernels
def test_compile_in_one_graph():
    model = tiny(se="tails", depths=(1,), dtype=torch.float32).eval()
    x = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(torch.compile(model, fullgraph=True)(x), model(x), rtol=1e-4, atol=1e-5)


@needs_kernels
@pytest.mark.parametrize("se", [*CHOICES, None])
def test_batchnorms_can_be_folded(se):
    """Those in tails, too; the SE layer then adds the shortcut and acts, in one call."""
    model = tiny(se=se).eval()
    folded = senet_fused.fold_batchnorm(model)
    x = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    wanted = model(x)
    senet_fused.reset_call_counts()
    torch.testing.assert_close(folded(x), wanted, rtol=1e-10, atol=1e-12)
    assert senet_fused.call_counts() == ({} if se is None else {"cpu.forward": 3})
    norms = sum(isinstance(module, nn.BatchNorm2d) for module in model.modules())
    assert (len(folded.folding.folded), folded.folding.left) == (norms, ())
    assert len(folded.folding.joined) == (3 if se in ("tails", "reference") else 0)


def test_channels_last_and_features():
    model = tiny(num_classes=0, dtype=torch.float32).eval().to(memory_format=torch.channels_last)
    x = torch.randn(2, 3, 32, 32).to(memory_format=torch.channels_last)
    features = model.features(x)
    assert features.shape == (2, 64, 4, 4)
    assert features.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(model(x), features.mean((2, 3)))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"se": "fuse"}, "se must be 'fused', 'tails', 'reference' or None, got 'fuse'"),
        ({"strategy": "before"}, "strategy must be one of standard, pre, post, identity, got 'before'"),
        ({"drop_path": 1.0}, "drop_path must be at least 0 and less than 1, got 1.0"),
        ({"dropout": -0.1}, "dropout must be at least 0"),
        ({"reduction": 0}, "reduction must be a positive integer, got 0"),
        ({"squeeze": "sum"}, "squeeze must be one of avg, max, avgmax, got 'sum'"),
        ({"act": "rellu"}, "unknown activation 'rellu'"),
        ({"backend": "cudda"}, "cudda"),
        ({"se": "reference", "backend": "cpu"}, "backend='cpu' is for se='fused' and 'tails', not for se='reference'"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message.replace("(", r"\(")):
        create_model("se_resnet20", **options)


def test_an_unknown_network():
    with pytest.raises(ValueError, match="no network 'seresnet50' in senet_fused.models; similar: se_resnet50"):
        create_model("seresnet50")


def test_an_option_that_the_network_does_not_have():
    with pytest.raises(ValueError, match=r"se_mobilenet has no option 'drop_path'; help\(senet_fused.models"):
        create_model("se_mobilenet", drop_path=0.1)


def test_names():
    assert set(SIZES) < set(model_names())
    for name in model_names():
        assert getattr(models, name) and name in models.__all__
        assert create_model.__doc__ and getattr(models, name).__doc__
