"""SE-BN-Inception and SE-MobileNet: published sizes, one network by four kinds of layers, copies, what they refuse."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable

import pytest
import torch
from oracle import assert_right
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import senet_fused
from senet_fused import FusedSE, models
from senet_fused.models.bn_inception import Inception

pytestmark = pytest.mark.skipif(
    senet_fused.backends.native.problem() is not None, reason="the compiled CPU library is not installed"
)

# Each kind of branch and of pool; R is 1 in the first two, 2 in the last.
TINY = {
    "3a": Inception(3, (4, 5), (4, 3), "avg", 2),
    "3c": Inception(0, (5, 4), (3, 2), "max", 0),
    "5b": Inception(8, (4, 12), (5, 8), "max", 7),
}
NETWORKS = {
    "se_bn_inception": {"modules": TINY, "stem": (6, 4, 8)},
    "se_mobilenet": {"width": 0.25, "reduction": 48},
}
# BatchNorms, and SE layers.
LAYERS = {"se_bn_inception": (3 + 7 + 5 + 7, 3), "se_mobilenet": (1 + 2 * 13, 13)}


def network(name: str, se: str | None = "fused", **options: object) -> nn.Module:
    torch.manual_seed(0)
    model = models.create_model(name, se=se, **({"num_classes": 5} | NETWORKS[name] | options)).double()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            for t in (module.weight, module.bias, module.running_mean):
                nn.init.normal_(t, 0.5)
    return model


@pytest.fixture
def images() -> torch.Tensor:
    return torch.randn(3, 3, 32, 64, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def step(model: nn.Module, x: torch.Tensor) -> dict[str, torch.Tensor]:
    """Outputs, gradients, and running statistics of a training step; outputs of an evaluation behind it."""
    x = x.clone().requires_grad_()
    y = model.train()(x)
    y.backward(torch.linspace(-1, 1, y.numel(), dtype=y.dtype).reshape(y.shape))
    found = {"y": y.detach(), "dx": x.grad} | {f"d{key}": p.grad for key, p in model.named_parameters()}
    found |= {key: b.clone() for key, b in model.named_buffers()}
    with torch.no_grad():
        return found | {"evaluated": model.eval()(x.detach())}


def plain_step(name: str, images: torch.Tensor, **options: object) -> Callable[[], dict[str, torch.Tensor]]:
    """Does a step of a new network of plain layers, each time."""
    return lambda: step(network(name, "reference", **options), images)


# Ioffe and Szegedy's network as in table 2 of Hu et al. 2018 (multiply-adds), and MobileNet as in their table 3. They
# count the squeeze and the scaling of the SE layers as well, 0.1 and 1 % of all.
@pytest.mark.parametrize(
    "name, parameters, se_parameters, flops, se_flops, rtol",
    [("se_bn_inception", 11.3e6, None, 2.03e9, 2.04e9, 5e-3), ("se_mobilenet", 4.2e6, 4.7e6, 569e6, 572e6, 8e-3)],
    ids=["se_bn_inception", "se_mobilenet"],
)
def test_published_sizes(name, parameters, se_parameters, flops, se_flops, rtol):
    found = {}
    for se in (None, "reference"):
        with torch.device("meta"):
            model, x = models.create_model(name, se=se).eval(), torch.empty(1, 3, 224, 224)
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            assert model(x).shape == (1, 1000)
        found[se] = sum(p.numel() for p in model.parameters()), counter.get_total_flops() / 2
    assert found[None] == (pytest.approx(parameters, rel=rtol), pytest.approx(flops, rel=2e-3))
    assert found["reference"][1] == pytest.approx(se_flops, rel=rtol) and found["reference"][1] > found[None][1]
    if se_parameters is not None:
        assert found["reference"][0] == pytest.approx(se_parameters, rel=rtol)
    with torch.device("meta"):
        fused = models.create_model(name)
    assert sum(p.numel() for p in fused.parameters()) == found["reference"][0]


def test_exact_sizes():
    with torch.device("meta"):
        counts = {
            name: sum(p.numel() for p in models.create_model(name, **options).parameters())
            for name, options in (("se_bn_inception", {"conv_bias": False}), ("se_mobilenet", {}))
        }
    # 2 C^2 / 16 + C / 16 + C for each SE layer.
    inception = sum(c * (c // 16) * 2 + c // 16 + c for c in (256, 320, 576, 576, 576, 608, 608, 1056, 1024, 1024))
    mobile = sum(c * c // 8 + c // 16 + c for c in (64, *[128] * 2, *[256] * 2, *[512] * 6, *[1024] * 2))
    assert counts == {"se_bn_inception": 11_285_224 + inception, "se_mobilenet": 4_231_976 + mobile}


def test_pools_and_planes():
    with torch.device("meta"):
        model, x = models.se_bn_inception().eval(), torch.empty(1, 3, 224, 224)
    pools = {key: type(m) for key, m in model.named_children() if key.startswith("inception") and key.endswith("pool")}
    largest = [key.split("_")[1] for key, kind in pools.items() if kind is nn.MaxPool2d]
    assert largest == ["3c", "4e", "5b"] and len(pools) == 10 and set(pools.values()) == {nn.MaxPool2d, nn.AvgPool2d}
    planes = {}
    for key, module in model.named_children():
        if key.endswith("_se"):
            module.register_forward_hook(lambda m, args, y, key=key: planes.update({key[10:12]: tuple(y.shape[1:])}))
    assert model.features(x).shape == (1, 1024, 7, 7)
    assert planes == {
        "3a": (256, 28, 28), "3b": (320, 28, 28), "3c": (576, 14, 14), "4a": (576, 14, 14), "4b": (576, 14, 14),
        "4c": (608, 14, 14), "4d": (608, 14, 14), "4e": (1056, 7, 7), "5a": (1024, 7, 7), "5b": (1024, 7, 7),
    }  # fmt: skip
    with torch.device("meta"):
        assert models.se_mobilenet().features(x).shape == (1, 1024, 7, 7)


@pytest.mark.parametrize("name", NETWORKS)
def test_layers_agree(name, images):
    norms, se_layers = LAYERS[name]
    plain_step(name, images)()
    assert senet_fused.call_counts() == {}
    for se, tails in (("fused", {}), ("tails", {"cpu.tail_forward": 2 * norms, "cpu.tail_backward": norms})):
        senet_fused.reset_call_counts()
        model = network(name, se)
        found = step(model, images)
        assert senet_fused.call_counts() == {"cpu.forward": 2 * se_layers, "cpu.backward": se_layers} | tails
        assert_right(found, plain_step(name, images))
        assert sum(isinstance(m, FusedSE) for m in model.modules()) == se_layers


@pytest.mark.parametrize("name", NETWORKS)
def test_one_seed_and_one_state_dict(name, images):
    of = {se: network(name, se) for se in models.SE_CHOICES}
    first = of["reference"].state_dict()
    for se in ("fused", "tails"):
        assert list(of[se].state_dict()) == list(first)
        for key, t in of[se].state_dict().items():
            assert torch.equal(t, first[key]), key
    twin = {key for key in first if "_se." not in key and "se_module" not in key}
    assert set(of[None].state_dict()) == twin and len(first) - len(twin) == 4 * LAYERS[name][1]
    torch.manual_seed(3)
    other = models.create_model(name, se="tails", num_classes=5, **NETWORKS[name]).double()
    other.load_state_dict(first)
    assert torch.equal(other.eval()(images), of["tails"].eval()(images))


@pytest.mark.networks
@pytest.mark.parametrize("se", models.SE_CHOICES)
@pytest.mark.parametrize("name", NETWORKS)
def test_copies_are_their_own(name, se, images):
    model = network(name, se).eval()
    copies = [copy.deepcopy(model), pickle.loads(pickle.dumps(model))]
    with torch.no_grad():
        expected = model(images)
        for other in copies:
            assert torch.equal(other(images), expected)
        for p in model.parameters():
            p.zero_()
        for other in copies:
            assert torch.equal(other(images), expected)
    buffer = io.BytesIO()
    torch.save(copies[0].state_dict(), buffer)
    buffer.seek(0)
    model.load_state_dict(torch.load(buffer, weights_only=True))
    assert torch.equal(model(images), expected)


@pytest.mark.parametrize("name", NETWORKS)
def test_twin_has_no_gates(name, images):
    twin, model = network(name, None), network(name, "fused")
    twin.load_state_dict(model.state_dict(), strict=False)
    with torch.no_grad():
        for key, p in model.named_parameters():
            if ".fc2." in key:
                p.fill_(1e3 if key.endswith("bias") else 0)  # a gate of 1
        torch.testing.assert_close(model.eval()(images), twin.eval()(images), rtol=1e-12, atol=1e-12)
    senet_fused.reset_call_counts()
    step(twin, images)
    assert senet_fused.call_counts() == {}


@pytest.mark.parametrize("name", NETWORKS)
def test_synchronised_norms_run_on_cpus(name, images):
    model = nn.SyncBatchNorm.convert_sync_batchnorm(network(name, "tails"))
    assert sum(isinstance(m, nn.SyncBatchNorm) for m in model.modules()) == LAYERS[name][0]
    assert_right(step(model, images), plain_step(name, images))


@pytest.mark.parametrize("name", NETWORKS)
def test_functions(name, images):
    # Not hardsigmoid: torch.nn's has a float32 slope in its backward pass, in float64 too.
    options = {"squeeze": "avgmax", "act": "silu", "gate": "tanh", "reduction": 2}
    assert_right(step(network(name, "tails", **options), images), plain_step(name, images, **options))


@pytest.mark.parametrize("name", NETWORKS)
def test_backend(name, images):
    network(name, "tails", backend="reference")(images)
    assert not [key for key in senet_fused.call_counts() if key.startswith("cpu.")]
    network(name, "tails", backend="cpu")(images)
    norms, se_layers = LAYERS[name]
    assert senet_fused.call_counts()["cpu.tail_forward"] == norms
    assert senet_fused.call_counts()["cpu.forward"] == se_layers


@pytest.mark.parametrize("name", NETWORKS)
def test_ends_of_the_network(name, images):
    model = network(name, num_classes=0, in_chans=4).eval()
    x = torch.cat((images, images[:, :1]), 1)
    assert torch.equal(model(x), model.features(x).mean((2, 3)))
    assert model.default_cfg["input_size"] == (4, 224, 224)
    dropped = network(name, dropout=0.9).eval()
    assert torch.equal(dropped(images), network(name).eval()(images))
    assert not torch.equal(dropped.train()(images), network(name).train()(images))


@pytest.mark.slow
@pytest.mark.parametrize("name", NETWORKS)
def test_compiles_without_breaks(name, images):
    model = network(name, "tails").eval()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(images), model(images), rtol=1e-12, atol=1e-12)


def test_convolutions_without_biases(images):
    model = network("se_bn_inception", conv_bias=False)
    assert all(m.bias is None for m in model.modules() if isinstance(m, nn.Conv2d) and m.kernel_size != (1, 1))
    other = network("se_bn_inception")
    left = other.load_state_dict(model.state_dict(), strict=False)
    assert left.unexpected_keys == [] and all(key.endswith(".bias") for key in left.missing_keys)
    assert len(left.missing_keys) == LAYERS["se_bn_inception"][0]
    # Training statistics take biases out again.
    torch.testing.assert_close(other(images), model(images))


def test_width_of_mobilenet():
    with torch.device("meta"):
        widths = {width: models.se_mobilenet(width) for width in (0.1, 0.25, 0.75, 1.4)}
    stages = {width: [int(stage[0].conv_pw.out_channels) for stage in m.blocks] for width, m in widths.items()}
    assert stages == {
        0.1: [8, 16, 24, 48, 104],
        0.25: [16, 32, 64, 128, 256],
        0.75: [48, 96, 192, 384, 768],
        1.4: [88, 176, 360, 720, 1432],
    }
    assert [m.conv_stem.out_channels for m in widths.values()] == [8, 8, 24, 48]
    assert widths[0.1].blocks[0][0].se_module.rd_channels == 1


@pytest.mark.parametrize(
    "name, options, message",
    [
        ("se_bn_inception", {"se": "tail"}, "se must be 'fused', 'tails', 'reference' or None, got 'tail'"),
        ("se_mobilenet", {"squeeze": "sum"}, "squeeze must be one of"),
        ("se_bn_inception", {"dropout": 1}, "dropout must be at least 0 and less than 1, got 1"),
        ("se_mobilenet", {"dropout": -0.1}, "dropout must be at least 0 and less than 1, got -0.1"),
        ("se_mobilenet", {"width": 0}, "width must be greater than 0, got 0"),
        ("se_mobilenet", {"se": None, "backend": "cpu"}, "backend='cpu' is for se='fused' and 'tails'"),
    ],
)
def test_bad_options(name, options, message):
    with pytest.raises(ValueError, match=message):
        models.create_model(name, **options)


@pytest.mark.parametrize("name", NETWORKS)
def test_strategies_are_for_residual_blocks(name):
    with pytest.raises(ValueError, match="has no option 'strategy'"):
        models.create_model(name, strategy="pre")


def test_planes_that_cannot_be_halved():
    model = network("se_bn_inception").eval()
    with pytest.raises(ValueError, match="inception_3c halves even planes, got one of 5 x 4"):
        model(torch.randn(1, 3, 40, 32).double())
    assert model(torch.randn(1, 3, 48, 80).double()).shape == (1, 5)  # 6 x 10
