"""FusedSE: sizes, initial weights, state dicts of other libraries, converting their layers, capture_gates."""

from __future__ import annotations

import copy
from collections import OrderedDict

import pytest
import torch
from peer_layers import (
    LegacySE,
    MMPretrainSE,
    MonaiSE,
    NvidiaSE,
    OwnHardSigmoid,
    OwnSwish,
    TimmSEModule,
    TimmSqueezeExcite,
    TimmSqueezeExciteCl,
    TorchvisionSE,
    TutorialSE,
)
from torch import nn
from torch.nn import functional as F

import senet_fused
from senet_fused import Activation, FusedSE, capture_gates, squeeze_excite


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


# ---------------------------------------------------------------------------------- sizes, weights, arguments


@pytest.mark.parametrize(("channels", "reduction"), [(64, 16), (256, 16), (48, 4), (16, 16)])
def test_one_seed_gives_the_tutorial_layers_weights(channels, reduction):
    torch.manual_seed(7)
    stock = TutorialSE(channels, reduction)
    after = torch.get_rng_state()
    torch.manual_seed(7)
    ours = FusedSE(channels, reduction)
    assert torch.equal(torch.get_rng_state(), after)
    assert torch.equal(ours.fc1.weight, stock.fc[0].weight) and torch.equal(ours.fc2.weight, stock.fc[2].weight)
    assert [name for name, _ in ours.named_parameters()] == ["fc1.weight", "fc2.weight"]
    x = torch.randn(2, channels, 5, 3)
    torch.testing.assert_close(ours(x), stock(x))


def test_one_seed_with_biases():
    torch.manual_seed(7)
    linears = nn.Linear(24, 6), nn.Linear(6, 24)
    torch.manual_seed(7)
    ours = FusedSE(24, 4, bias=True)
    for a, b in zip((ours.fc1, ours.fc2), linears, strict=True):
        assert torch.equal(a.weight, b.weight) and torch.equal(a.bias, b.bias)


@pytest.mark.parametrize(
    ("channels", "options", "expected"),
    [
        (64, {}, 4),
        (256, {}, 16),
        (2048, {}, 128),
        (72, {"reduction": 4}, 18),
        (120, {"reduction": 16}, 7),
        (8, {}, 1),
        (1, {}, 1),
        (3, {"reduction": 1}, 3),
        (1232, {"rd_channels": 308}, 308),
        (8, {"rd_channels": 9, "reduction": 4}, 9),
    ],
)
def test_r(channels, options, expected):
    layer = FusedSE(channels, **options)
    assert layer.rd_channels == expected
    assert layer.fc1.weight.shape == (expected, channels) and layer.fc2.weight.shape == (channels, expected)


# channels / 16 to the nearest multiple of 8, at least 8: as in timm's SEModule with its defaults.
# 72 / 16 is 4.5, 224 / 16 is 14, 320 / 16 is 20 (halfway: up), 672 / 16 is 42, 3024 / 16 is 189.
@pytest.mark.parametrize(
    ("channels", "expected"),
    [
        (64, 8),
        (72, 8),
        (128, 8),
        (192, 16),
        (224, 16),
        (256, 16),
        (320, 24),
        (512, 32),
        (672, 40),
        (2048, 128),
        (3024, 192),
    ],
)
def test_r_by_timms_rule(channels, expected):
    assert FusedSE(channels, rd_divisor=8).rd_channels == expected


def test_r_by_timms_rule_with_other_ratios():
    assert FusedSE(96, 4, rd_divisor=8).rd_channels == 24
    assert FusedSE(144, 4, rd_divisor=8).rd_channels == 40  # 36 is halfway between 32 and 40
    assert FusedSE(72, 4, rd_divisor=8).rd_channels == 16  # 18: SEModule has no lower limit of 90 %
    assert FusedSE(100, 16, rd_divisor=1).rd_channels == 6  # 6.25
    assert FusedSE(104, 16, rd_divisor=1).rd_channels == 7  # 6.5


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        (dict(channels=0), "channels must be a positive integer, got 0"),
        (dict(channels=64.0), "channels must be a positive integer, got 64.0"),
        (dict(channels=True), "channels must be a positive integer, got True"),
        (dict(channels=64, reduction=0), "reduction must be a positive integer, got 0"),
        (dict(channels=64, reduction=0.25), "reduction must be a positive integer, got 0.25"),
        (dict(channels=64, rd_channels=0), "rd_channels must be a positive integer, got 0"),
        (dict(channels=64, rd_divisor=-8), "rd_divisor must be a positive integer, got -8"),
        (dict(channels=64, rd_channels=8, rd_divisor=8), "rd_channels or rd_divisor, not both"),
        (dict(channels=64, act="reluu"), "unknown activation 'reluu'; known: .*relu.*silu"),
        (dict(channels=64, act="hardsigmoid"), "act must be one of identity, relu.*, got hardsigmoid"),
        (dict(channels=64, gate="silu"), "gate must be one of sigmoid.*, got silu"),
        (dict(channels=64, act=nn.PReLU), "PReLU is not an activation known here .*Activation"),
        (dict(channels=64, squeeze="mean"), "squeeze must be one of avg, max, avgmax, got 'mean'"),
        (dict(channels=64, post_act="silu"), "post_act must be 'relu' or None, got 'silu'"),
        (
            dict(channels=64, backend="gpu"),
            "FusedSE: unknown backend 'gpu'; choose one of auto, cpu, cuda, triton, reference",
        ),
    ],
)
def test_arguments_that_do_not_fit(arguments, match):
    with pytest.raises(ValueError, match=match):
        FusedSE(**arguments)


def test_device_dtype_and_conversion():
    layer = FusedSE(8, 4, bias=True, dtype=torch.bfloat16, device="cpu")
    assert {p.dtype for p in layer.parameters()} == {torch.bfloat16}
    assert FusedSE(8, device="meta").fc1.weight.is_meta
    x = torch.randn(2, 8, 3, 3, dtype=torch.bfloat16)
    assert layer(x).dtype == torch.bfloat16
    y = layer.double()(x.double())
    assert y.dtype == torch.float64 and layer.half().fc2.bias.dtype == torch.float16
    assert layer.float()(x).dtype == torch.bfloat16  # weights are read in their own dtype


def test_options_reach_the_function():
    layer = FusedSE(6, 2, bias=True, act=nn.LeakyReLU(0.2), gate="hardsigmoid", squeeze="avgmax", post_act="relu")
    x, residual = torch.randn(2, 2, 6, 4, 3)
    expected = squeeze_excite(
        x, layer.fc1.weight, layer.fc2.weight, layer.fc1.bias, layer.fc2.bias, act="leaky_relu(0.2)",
        gate="hardsigmoid", squeeze="avgmax", residual=residual, post_act="relu",
    )  # fmt: skip
    assert torch.equal(layer(x, residual), expected) and torch.equal(layer(x, residual=residual), expected)
    assert not torch.equal(layer(x), expected)


def test_text():
    assert FusedSE(64).extra_repr() == "64, rd_channels=4, act=relu, gate=sigmoid"
    layer = FusedSE(64, act="leaky_relu(0.1)", squeeze="max", post_act="relu", backend="reference")
    assert layer.extra_repr() == (
        "64, rd_channels=4, act=leaky_relu(0.1), gate=sigmoid, squeeze=max, post_act=relu, backend=reference"
    )
    assert "(fc1): Linear(in_features=64, out_features=4, bias=False)" in repr(layer)


def test_train_and_eval_are_the_same():
    layer, x = FusedSE(8, 2), torch.randn(2, 8, 3, 3)
    expected = layer(x)
    assert torch.equal(layer.eval()(x), expected) and not layer.fc1.training


# ---------------------------------------------------------------------------------- state dicts

NAMINGS = {
    "tutorial": ("fc.0", "fc.2"),
    "torchvision_timm_legacy": ("fc1", "fc2"),
    "timm_efficientnet": ("conv_reduce", "conv_expand"),
    "nvidia": ("squeeze", "expand"),
    "openmmlab": ("conv1.conv", "conv2.conv"),
}


def foreign_dict(naming, channels=8, reduced=2, bias=True, trailing=(), prefix=""):
    first, second = NAMINGS[naming]
    entries = {f"{prefix}{first}.weight": torch.randn(reduced, channels, *trailing)}
    if bias:
        entries[f"{prefix}{first}.bias"] = torch.randn(reduced)
    entries[f"{prefix}{second}.weight"] = torch.randn(channels, reduced, *trailing)
    if bias:
        entries[f"{prefix}{second}.bias"] = torch.randn(channels)
    return OrderedDict(entries)


def check_loaded(layer, entries, naming, prefix=""):
    for ours, theirs in zip((layer.fc1, layer.fc2), NAMINGS[naming], strict=True):
        weight = entries[f"{prefix}{theirs}.weight"]
        assert torch.equal(ours.weight, weight.flatten(1).to(ours.weight.dtype))
        if ours.bias is not None:
            assert torch.equal(ours.bias, entries[f"{prefix}{theirs}.bias"])


def test_conv_keeps_the_weights_as_convolutions_do():
    """The same layer, from the same seed, and its dict is that of a layer of 1x1 convolutions."""
    torch.manual_seed(3)
    plain = FusedSE(8, 4, bias=True)
    torch.manual_seed(3)
    layer = FusedSE(8, 4, bias=True, conv=True)
    theirs = nn.ModuleDict({"fc1": nn.Conv2d(8, 2, 1), "fc2": nn.Conv2d(2, 8, 1)})
    theirs.load_state_dict(layer.state_dict())
    assert layer.fc1.weight.shape == (2, 8, 1, 1)
    x = torch.randn(2, 8, 5, 3)
    assert torch.equal(layer(x), plain(x))
    plain.load_state_dict(layer.state_dict())
    layer.load_state_dict(plain.state_dict())
    assert torch.equal(layer(x), plain(x))
    for trailing in ((), (1, 1)):
        entries = foreign_dict("timm_efficientnet", trailing=trailing)
        layer.load_state_dict(entries)
        assert torch.equal(layer.fc1.weight.flatten(1), next(iter(entries.values())).flatten(1))
    layer(x).square().mean().backward()
    assert layer.fc1.weight.grad.shape == layer.fc1.weight.shape and layer.fc1.weight.grad.any()


@pytest.mark.parametrize("trailing", [(), (1,), (1, 1), (1, 1, 1)], ids=["2d", "3d", "4d", "5d"])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("naming", NAMINGS)
def test_state_dicts_load_strictly(naming, bias, trailing):
    entries = foreign_dict(naming, bias=bias, trailing=trailing)
    before = {k: v.clone() for k, v in entries.items()}
    layer = FusedSE(8, 4, bias=bias)
    result = layer.load_state_dict(entries, strict=True)
    assert not result.missing_keys and not result.unexpected_keys
    check_loaded(layer, entries, naming)
    assert list(entries) == list(before)  # the caller's dict is his own
    for key, value in entries.items():
        assert torch.equal(value, before[key]) and value.shape == before[key].shape


@pytest.mark.parametrize("naming", NAMINGS)
def test_state_dicts_of_models_load_strictly(naming):
    """Two SE layers at different depths beside other layers."""

    def model():
        inner = nn.Module()
        inner.conv, inner.se = nn.Conv2d(8, 8, 1), FusedSE(8, 4, bias=True)
        return nn.ModuleDict(
            {"stem": nn.Conv2d(3, 8, 3), "layer1": nn.Sequential(inner), "se": FusedSE(8, 4, bias=True)}
        )

    target = model()
    entries = OrderedDict((k, v) for k, v in model().state_dict().items() if ".fc" not in k)
    for prefix in ("layer1.0.se.", "se."):
        entries.update(foreign_dict(naming, trailing=(1, 1), prefix=prefix))
    keys = list(entries)
    target.load_state_dict(entries, strict=True)
    assert list(entries) == keys
    check_loaded(target["layer1"][0].se, entries, naming, "layer1.0.se.")
    check_loaded(target["se"], entries, naming, "se.")
    assert torch.equal(target["stem"].weight, entries["stem.weight"])


def test_what_is_saved_is_ours_and_loads_again():
    layer = FusedSE(8, 4, bias=True)
    layer.load_state_dict(foreign_dict("nvidia"))
    saved = layer.state_dict()
    assert [(k, tuple(v.shape)) for k, v in saved.items()] == [
        ("fc1.weight", (2, 8)), ("fc1.bias", (2,)), ("fc2.weight", (8, 2)), ("fc2.bias", (8,)),
    ]  # fmt: skip
    other = FusedSE(8, 4, bias=True)
    other.load_state_dict(saved)
    assert all(map(torch.equal, other.parameters(), layer.parameters()))


@pytest.mark.parametrize("prefix", ["", "se."])
@pytest.mark.parametrize("naming", NAMINGS)
def test_biases_without_a_place_name_the_option(naming, prefix):
    layer = FusedSE(8, 4)
    model = layer if not prefix else nn.ModuleDict({"se": layer})
    before = [p.clone() for p in layer.parameters()]
    for strict in (True, False):
        with pytest.raises(RuntimeError, match=r"make it with bias=True") as error:
            model.load_state_dict(foreign_dict(naming, prefix=prefix), strict=strict)
        assert f"{prefix}{NAMINGS[naming][0]}.bias" in str(error.value)
    assert all(map(torch.equal, layer.parameters(), before))


def test_missing_unexpected_and_misshapen_entries_are_reported():
    entries = foreign_dict("tutorial")
    with pytest.raises(RuntimeError, match=r"Unexpected key.*extra\.weight"):
        FusedSE(8, 4, bias=True).load_state_dict({**entries, "extra.weight": torch.zeros(1)})
    with pytest.raises(RuntimeError, match=r"Unexpected key.*fc1\.scale"):
        FusedSE(8, 4, bias=True).load_state_dict({**entries, "fc1.scale": torch.zeros(1)})
    with pytest.raises(RuntimeError, match=r"Unexpected key.*fc\.0\.weight"):  # two namings at once
        FusedSE(8, 4, bias=True).load_state_dict({**entries, **foreign_dict("torchvision_timm_legacy")})
    with pytest.raises(RuntimeError, match=r"Missing key.*fc1\.bias.*fc2\.bias"):
        FusedSE(8, 4, bias=True).load_state_dict(foreign_dict("tutorial", bias=False))
    with pytest.raises(RuntimeError, match=r"Missing key.*fc2\.weight"):
        FusedSE(8, 4).load_state_dict({"fc.0.weight": torch.randn(2, 8)})
    with pytest.raises(RuntimeError, match=r"size mismatch for fc1\.weight"):
        FusedSE(8, 2, bias=True).load_state_dict(entries)
    with pytest.raises(RuntimeError, match=r"size mismatch for se\.fc1\.weight"):  # a 3x3 convolution is no matrix
        nn.ModuleDict({"se": FusedSE(8, 4)}).load_state_dict(
            foreign_dict("nvidia", bias=False, trailing=(3, 3), prefix="se.")
        )
    result = FusedSE(8, 4, bias=True).load_state_dict({"other": torch.zeros(1)}, strict=False)
    assert len(result.missing_keys) == 4 and result.unexpected_keys == ["other"]


def test_loading_by_assignment():
    """As for a model made on the meta device."""
    entries = foreign_dict("timm_efficientnet", trailing=(1, 1))
    layer = FusedSE(8, 4, bias=True, device="meta")
    layer.load_state_dict(entries, assign=True)
    check_loaded(layer, entries, "timm_efficientnet")
    assert isinstance(layer.fc1.weight, nn.Parameter) and layer(torch.randn(1, 8, 2, 2)).shape == (1, 8, 2, 2)


@pytest.mark.parametrize("trailing", [(), (1, 1)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("naming", NAMINGS)
def test_from_state_dict(naming, bias, dtype, trailing):
    entries = {k: v.to(dtype) for k, v in foreign_dict(naming, 12, 3, bias, trailing).items()}
    rng = torch.get_rng_state()
    layer = FusedSE.from_state_dict(entries, act="silu", gate="hardsigmoid", squeeze="max", post_act="relu")
    assert torch.equal(torch.get_rng_state(), rng)
    assert (layer.channels, layer.rd_channels, layer.fc1.bias is not None) == (12, 3, bias)
    assert layer.fc1.weight.dtype == dtype and layer.act == Activation("silu") and layer.squeeze == "max"
    assert layer.post_act == "relu" and layer.training and layer.fc1.weight.requires_grad
    check_loaded(layer, entries, naming)
    layer.fc1.weight.data.zero_()
    assert entries[f"{NAMINGS[naming][0]}.weight"].any()  # a copy


@pytest.mark.parametrize(
    ("entries", "options", "match"),
    [
        (
            {"weight": torch.ones(2, 2)},
            {},
            r"no SE layer in the keys \['weight'\]; known namings: fc1/fc2, fc.0/fc.2",
        ),
        (
            {**foreign_dict("tutorial"), "bn.weight": torch.ones(2)},
            {},
            "belong to no plain SE layer: bn.weight",
        ),
        (
            {k: v for k, v in foreign_dict("nvidia").items() if k != "expand.bias"},
            {},
            "one of the two layers has a bias",
        ),
        (foreign_dict("nvidia"), {"bias": False}, "bias is read from the state dict"),
        (foreign_dict("nvidia"), {"reduction": 4}, "reduction is read from the state dict"),
        (foreign_dict("nvidia", trailing=(3, 3)), {}, "(?s)does not fit one SE layer.*size mismatch"),
        ({k: v.int() for k, v in foreign_dict("nvidia").items()}, {}, "floating point; got .*int32"),
        (foreign_dict("nvidia"), {"act": "reluu"}, "unknown activation"),
    ],
)
def test_from_state_dict_refuses(entries, options, match):
    with pytest.raises(ValueError, match=match):
        FusedSE.from_state_dict(entries, **options)


# ---------------------------------------------------------------------------------- from_module

CONVERTIBLE = {
    "tutorial": (lambda: TutorialSE(16, 4), "relu", "sigmoid", "avg", 2),
    "torchvision": (lambda: TorchvisionSE(8, 2), "relu", "sigmoid", "avg", 2),
    "torchvision_mobilenet": (
        lambda: TorchvisionSE(8, 2, scale_activation=nn.Hardsigmoid), "relu", "hardsigmoid", "avg", 2,
    ),
    "torchvision_silu": (lambda: TorchvisionSE(8, 2, activation=nn.SiLU), "silu", "sigmoid", "avg", 2),
    "timm": (lambda: TimmSEModule(8, 3), "relu", "sigmoid", "avg", 2),
    "timm_maxpool": (lambda: TimmSEModule(8, 3, add_maxpool=True), "relu", "sigmoid", "avgmax", 2),
    "timm_own_classes": (
        lambda: TimmSEModule(8, 3, bias=False, act=OwnSwish, gate=OwnHardSigmoid),
        "silu", "hardsigmoid", "avg", 2,
    ),
    "timm_efficientnet": (lambda: TimmSqueezeExcite(8, 3), "silu", "sigmoid", "avg", 2),
    "legacy": (lambda: LegacySE(8, 4), "relu", "sigmoid", "avg", 2),
    "monai_1d": (lambda: MonaiSE(1, 8), "relu", "sigmoid", "avg", 1),
    "monai_2d": (lambda: MonaiSE(2, 8, acts=(nn.Mish, nn.Tanh)), "mish", "tanh", "avg", 2),
    "monai_3d": (
        lambda: MonaiSE(3, 8, acts=(lambda: nn.LeakyReLU(0.1), nn.ReLU)), "leaky_relu(0.1)", "relu", "avg", 3,
    ),
    "openmmlab": (lambda: MMPretrainSE(8, 2), "relu", "sigmoid", "avg", 2),
    "openmmlab_mobilenet": (
        lambda: MMPretrainSE(8, 2, acts=(nn.ReLU, nn.Hardsigmoid)), "relu", "hardsigmoid", "avg", 2,
    ),
}  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("name", CONVERTIBLE)
def test_from_module(name, dtype):
    make, act, gate, squeeze, dimensions = CONVERTIBLE[name]
    layer = make().to(dtype)
    fused = FusedSE.from_module(layer)
    assert (fused.act, fused.gate, fused.squeeze) == (Activation.of(act), Activation.of(gate), squeeze)
    assert fused.fc1.weight.dtype == dtype
    x = torch.randn(3, fused.channels, *(4, 5, 2)[:dimensions], dtype=torch.float64)
    torch.testing.assert_close(copy.deepcopy(fused).double()(x), copy.deepcopy(layer).double()(x))


def test_from_module_finds_the_number_of_dimensions():
    """Where neither pooling nor convolution tells."""

    class Sequence(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc1, self.fc2 = nn.Linear(8, 2), nn.Linear(2, 8)

        def forward(self, x):
            return x * torch.sigmoid(self.fc2(torch.relu(self.fc1(x.mean(-1)))))[:, :, None]

    layer, x = Sequence(), torch.randn(2, 8, 7)
    torch.testing.assert_close(FusedSE.from_module(layer)(x), layer(x))


def test_from_module_of_our_own_layer_is_a_copy():
    layer, x = (
        FusedSE(8, 4, act="gelu", squeeze="max", post_act="relu", backend="reference"),
        torch.randn(2, 8, 3, 3),
    )
    other = FusedSE.from_module(layer)
    assert other is not layer and repr(other) == repr(layer) and torch.equal(other(x), layer(x))
    assert other.fc1.weight.data_ptr() != layer.fc1.weight.data_ptr()


class ReLUInForward(TorchvisionSE):
    """Its activation is a function in forward, and differs from ReLU for large values only."""

    def forward(self, x):
        return self.scale_activation(self.fc2(F.relu6(self.fc1(self.avgpool(x))))) * x


class WithDropout(TutorialSE):
    def forward(self, x):
        return F.dropout(super().forward(x), 0.5, self.training)


class Counting(TorchvisionSE):
    """Keeps a buffer that forward changes, which FusedSE would not."""

    def __init__(self):
        super().__init__(8, 2)
        self.register_buffer("calls", torch.zeros(()), persistent=False)

    def forward(self, x):
        self.calls += 1
        return super().forward(x)


class Drawing(TorchvisionSE):
    """Draws random numbers in evaluation, as some libraries' dropout does, to no effect."""

    def forward(self, x):
        if not self.training:
            torch.rand(1)
        return super().forward(x)


def hooked(layer):
    layer.fc1.register_forward_hook(lambda *_: None)
    return layer


class NotANumber(TutorialSE):
    def forward(self, x):
        return super().forward(x) * float("nan")


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: MonaiSE(2, 8, add_residual=True), r"adds its input.*from_state_dict.*\(x, residual=x\)"),
        (lambda: MonaiSE(3, 8, acts=(nn.LeakyReLU, nn.ReLU), add_residual=True), "adds its input"),
        (lambda: NvidiaSE(8, 2), "returns the gate, not the scaled input"),
        (lambda: MMPretrainSE(8, 2, return_weight=True), "returns the gate, not the scaled input"),
        (lambda: TimmSqueezeExciteCl(8, 2), "takes its channels last"),
        (lambda: TimmSEModule(8, 3, norm=nn.BatchNorm2d), "belong to no plain SE layer: bn.weight, bn.bias"),
        (lambda: ReLUInForward(8, 2).requires_grad_(False), "its output looks like an SE layer's, but differs by"),
        (lambda: WithDropout(8, 2), "it draws random numbers"),
        (lambda: Drawing(8, 2), "it draws random numbers"),
        (lambda: NotANumber(8, 2), "differs by inf"),
        (lambda: TorchvisionSE(8, 2, activation=nn.PReLU), "belong to no plain SE layer: activation.weight"),
        (lambda: TorchvisionSE(8, 2, activation=nn.Softplus), "Softplus is not an activation known here"),
        (lambda: nn.Linear(8, 8), "Linear is not understood as an SE layer: it has 1 plain linear layers"),
        (lambda: Counting(), "belong to no plain SE layer: calls"),
        (lambda: hooked(TorchvisionSE(8, 2)), "its fc1 has hooks"),
    ],
    ids=[
        "monai_residual", "monai_residual_3d", "gate_only", "gate_only_openmmlab", "channels_last", "norm",
        "function_in_forward", "dropout", "random", "nan", "prelu", "softplus", "linear", "buffer", "hooked",
    ],
)  # fmt: skip
def test_from_module_refuses(make, match):
    torch.manual_seed(1)
    with pytest.raises(ValueError, match=match):
        FusedSE.from_module(make())


def test_from_module_notices_a_residual_in_low_precision():
    """A bound in bfloat16's own precision would let nearly everything pass."""
    with pytest.raises(ValueError, match="adds its input"):
        FusedSE.from_module(MonaiSE(2, 8, add_residual=True).bfloat16())


@pytest.mark.parametrize("make", [TorchvisionSE, WithDropout])
def test_from_module_leaves_no_trace(make):
    layer = make(8, 2)
    called = []
    layer.register_forward_hook(lambda *_: called.append("layer"))
    layer.register_forward_pre_hook(lambda *_: called.append("before"))
    layer.requires_grad_(True)
    before = copy.deepcopy(layer.state_dict())
    rng = torch.get_rng_state()
    try:
        fused = FusedSE.from_module(layer)
    except ValueError:
        fused = None
    assert (fused is None) == isinstance(layer, WithDropout)
    assert torch.equal(torch.get_rng_state(), rng)
    assert not called and all(p.grad is None for p in layer.parameters()) and layer.training
    assert all(torch.equal(v, before[k]) for k, v in layer.state_dict().items())
    layer(torch.randn(1, 8, 2, 2))
    assert called == ["before", "layer"]  # its hooks are still there


def test_from_module_keeps_modes_and_frozen_parameters():
    layer = TorchvisionSE(8, 2).eval()
    layer.fc1.requires_grad_(False)
    layer.fc2.bias.requires_grad_(False)
    fused = FusedSE.from_module(layer)
    assert not fused.training and not fused.fc1.training
    assert {name: p.requires_grad for name, p in fused.named_parameters()} == {
        "fc1.weight": False, "fc1.bias": False, "fc2.weight": True, "fc2.bias": False,
    }  # fmt: skip
    fused(torch.randn(1, 8, 2, 2)).sum().backward()
    assert fused.fc2.weight.grad is not None and fused.fc1.weight.grad is None
    fused.fc1.weight.data.zero_()
    assert layer.fc1.weight.any()  # the weights are a copy


# ---------------------------------------------------------------------------------- capture_gates


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.unused = FusedSE(6, 2), FusedSE(6, 2)
        self.blocks = nn.Sequential(nn.Conv2d(6, 6, 1), FusedSE(6, 3, bias=True, post_act="relu"))

    def forward(self, x):
        return self.blocks(self.first(self.first(x)))


def test_capture_gates():
    model, x = Model(), torch.randn(2, 6, 3, 4)
    plain = model(x)
    with capture_gates(model) as gates:
        assert {name: len(calls) for name, calls in gates.items()} == {"first": 0, "unused": 0, "blocks.1": 0}
        y = model(x)
        assert len(gates["first"]) == 2 and len(gates["blocks.1"]) == 1 and gates["unused"] == []
        model(x[:1])
    model(x)  # not recorded
    assert torch.equal(y, plain)
    assert [tuple(g.shape) for g in gates["first"]] == [(2, 6), (2, 6), (1, 6), (1, 6)]
    assert "blocks.1" in gates and "blocks" not in gates and len(gates) == 3 and repr(gates).startswith("{'first': [")
    with pytest.raises(KeyError):
        gates["blocks"]
    weights = model.first.fc1.weight, model.first.fc2.weight
    once, gate = squeeze_excite(x, *weights, return_gate=True)
    assert torch.equal(gates["first"][0], gate)
    assert torch.equal(gates["first"][1], squeeze_excite(once, *weights, return_gate=True)[1])
    with capture_gates(model) as again:  # a new recording
        model(x)
    assert len(again["first"]) == 2 and len(gates["first"]) == 4


def test_capture_gates_of_a_layer_itself_and_their_dtype():
    for dtype, wide in ((torch.float64, torch.float64), (torch.bfloat16, torch.float32)):
        layer = FusedSE(6, 2, dtype=dtype)
        with capture_gates(layer) as gates:
            layer(torch.randn(2, 6, 3, 4, dtype=dtype))
        assert list(gates) == [""] and gates[""][0].dtype == wide


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_a_penalty_on_captured_gates_trains(backend):
    """The gradient of a penalty alone is that of the same penalty on return_gate's gate."""
    model, x = Model(), torch.randn(2, 6, 3, 4)
    w1, w2 = model.first.fc1.weight, model.first.fc2.weight
    with senet_fused.use_backend(backend), capture_gates(model) as gates:
        y = model(x)
        got = torch.autograd.grad(gates["first"][0].square().sum(), (w1, w2), retain_graph=True)
        (y.square().mean() + sum(g.mean() for calls in gates.values() for g in calls)).backward()
    expected = torch.autograd.grad(squeeze_excite(x, w1, w2, return_gate=True)[1].square().sum(), (w1, w2))
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b)
        assert b.any()
    assert w1.grad.any() and model.unused.fc2.weight.grad is None


def test_capture_gates_ends_with_its_block():
    model, x = Model(), torch.randn(2, 6, 3, 4)
    with pytest.raises(ZeroDivisionError):
        with capture_gates(model) as gates:
            model(x)
            raise ZeroDivisionError
    model(x)
    assert len(gates["first"]) == 2
    with capture_gates(model):
        with pytest.raises(RuntimeError, match="recorded already"):
            with capture_gates(model.blocks):
                pass
        copied = copy.deepcopy(model)
    with capture_gates(copied) as gates:  # a copy made in a recording does not record
        copied(x)
    assert len(gates["first"]) == 2
    with pytest.raises(ValueError, match="Sequential has no FusedSE layer"):
        with capture_gates(nn.Sequential(nn.ReLU())):
            pass
