"""load_caffe and caffe_names: layers of the original prototxts, their arithmetic, how blobs come, what is refused."""

from __future__ import annotations

import io
import re
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from senet_fused import models
from senet_fused.models import SENet, caffe_names, load_caffe
from senet_fused.models.bn_inception import BNInception, Inception
from senet_fused.models.senet import bottleneck, resnext, senet

Blobs = dict[str, list[np.ndarray]]

# What https://github.com/hujie-frank/SENet has in models/: blocks of the stages, and for 64 planes in the first stage
# the channels of 1x1_reduce, 3x3 and 1x1_increase, groups of the 3x3, size of the later stages' 1x1_proj.
RESIDUAL = {
    "se_resnet50": ((3, 4, 6, 3), (64, 64, 256), 1, 1),
    "se_resnet101": ((3, 4, 23, 3), (64, 64, 256), 1, 1),
    "se_resnet152": ((3, 8, 36, 3), (64, 64, 256), 1, 1),
    "se_resnext50_32x4d": ((3, 4, 6, 3), (128, 128, 256), 32, 1),
    "se_resnext101_32x4d": ((3, 4, 23, 3), (128, 128, 256), 32, 1),
    "senet154": ((3, 8, 36, 3), (128, 256, 256), 64, 3),
}
# num_output of 1x1, 3x3_reduce, 3x3, double3x3_reduce, double3x3a, double3x3b, pool_proj, and of the concatenation.
INCEPTIONS = {
    "inception_3a": (64, 64, 64, 64, 96, 96, 32, 256),
    "inception_3b": (64, 64, 96, 64, 96, 96, 64, 320),
    "inception_3c": (None, 128, 160, 64, 96, 96, None, 576),
    "inception_4a": (224, 64, 96, 96, 128, 128, 128, 576),
    "inception_4b": (192, 96, 128, 96, 128, 128, 128, 576),
    "inception_4c": (160, 128, 160, 128, 160, 160, 128, 608),
    "inception_4d": (96, 128, 192, 160, 192, 192, 128, 608),
    "inception_4e": (None, 128, 192, 192, 256, 256, None, 1056),
    "inception_5a": (352, 192, 320, 160, 224, 224, 128, 1024),
    "inception_5b": (352, 192, 320, 192, 224, 224, 128, 1024),
}


class Prototxt(dict):
    """Layers with weights -> shapes of their blobs, without BatchNorm's factor."""

    def conv(self, name: str, c_in: int, c_out: int, size: int, groups: int = 1) -> None:
        self[name] = [(c_out, c_in // groups, size, size)]
        self[f"{name}/bn"] = self[f"{name}/bn/scale"] = [(c_out,), (c_out,)]

    def se(self, name: str, channels: int) -> None:
        reduced = channels // 16
        self[f"{name}_1x1_down"] = [(reduced, channels, 1, 1), (reduced,)]
        self[f"{name}_1x1_up"] = [(channels, reduced, 1, 1), (channels,)]


def residual_prototxt(name: str) -> Prototxt:
    layers = Prototxt()
    depths, widths, groups, size = RESIDUAL[name]
    if name == "senet154":
        for layer, c_in, c_out in (("conv1_1/3x3_s2", 3, 64), ("conv1_2/3x3", 64, 64), ("conv1_3/3x3", 64, 128)):
            layers.conv(layer, c_in, c_out, 3)
    else:
        layers.conv("conv1/7x7_s2", 3, 64, 7)
    channels = 128 if name == "senet154" else 64
    for stage, depth in enumerate(depths):
        a, b, c = (width << stage for width in widths)
        for block in range(1, depth + 1):
            prefix = f"conv{stage + 2}_{block}"
            layers.conv(f"{prefix}_1x1_reduce", channels, a, 1)
            layers.conv(f"{prefix}_3x3", a, b, 3, groups)
            layers.conv(f"{prefix}_1x1_increase", b, c, 1)
            layers.se(prefix, c)
            if block == 1:
                layers.conv(f"{prefix}_1x1_proj", channels, c, size if stage else 1)
            channels = c
    layers["classifier"] = [(1000, 2048), (1000,)]
    return layers


def inception_prototxt() -> Prototxt:
    layers, channels = Prototxt(), 192
    layers.conv("conv1/7x7_s2", 3, 64, 7)
    layers.conv("conv2/3x3_reduce", 64, 64, 1)
    layers.conv("conv2/3x3", 64, 192, 3)
    for name, (one, reduce, three, double, a, b, projection, out) in INCEPTIONS.items():
        if one:
            layers.conv(f"{name}/1x1", channels, one, 1)
        layers.conv(f"{name}/3x3_reduce", channels, reduce, 1)
        layers.conv(f"{name}/3x3", reduce, three, 3)
        layers.conv(f"{name}/double3x3_reduce", channels, double, 1)
        layers.conv(f"{name}/double3x3a", double, a, 3)
        layers.conv(f"{name}/double3x3b", a, b, 3)
        if projection:
            layers.conv(f"{name}/pool_proj", channels, projection, 1)
        layers.se(name, out)
        channels = out
    layers["classifier"] = [(1000, 1024), (1000,)]
    return layers


@pytest.mark.parametrize("name", [*RESIDUAL, "se_bn_inception"])
def test_layers_are_those_of_the_prototxt(name):
    expected = residual_prototxt(name) if name in RESIDUAL else inception_prototxt()
    options = {} if name in RESIDUAL else {"conv_bias": False}
    with torch.device("meta"):
        model = models.create_model(name, **options)
    tensors, names = model.state_dict(), caffe_names(model)
    assert {layer: [tuple(tensors[key].shape) for key in keys] for layer, keys in names.items()} == expected
    every = [key for keys in names.values() for key in keys]
    assert len(every) == len(set(every))
    assert set(every) == {key for key in tensors if not key.endswith("num_batches_tracked")}
    # Caffe's default, in front of every ReLU.
    assert {m.eps for m in model.modules() if isinstance(m, nn.BatchNorm2d)} == {1e-5}


def test_names_of_all_options():
    with torch.device("meta"):
        plain = caffe_names(models.se_resnet50())
        for se in models.SE_CHOICES:
            expected = {k: v for k, v in plain.items() if se or not k.endswith(("_down", "_up"))}
            assert caffe_names(models.se_resnet50(se=se)) == expected
        assert caffe_names(models.se_resnet50(num_classes=0)) == {k: v for k, v in plain.items() if k != "classifier"}
        biased = caffe_names(models.se_bn_inception())
    assert plain["conv2_1_1x1_proj"] == ("layer1.0.downsample.0.weight",)
    assert plain["conv2_1_1x1_proj/bn"] == ("layer1.0.downsample.1.running_mean", "layer1.0.downsample.1.running_var")
    assert plain["conv4_6_1x1_up"] == ("layer3.5.se_module.fc2.weight", "layer3.5.se_module.fc2.bias")
    assert biased["inception_3a/double3x3b"] == (
        "inception_3a_double_3x3_2.weight",
        "inception_3a_double_3x3_2.bias",
    )
    assert biased["inception_4e/double3x3a/bn/scale"] == (
        "inception_4e_double_3x3_1_bn.weight",
        "inception_4e_double_3x3_1_bn.bias",
    )


# Networks with each kind of stem, block and shortcut, small.
def small_resnet(se: str | None = "reference") -> SENet:
    return SENet(bottleneck, (2, 1), planes=8, num_classes=5, reduction=8, se=se)


def small_resnext(se: str | None = "reference") -> SENet:
    return SENet(resnext, (1, 2), planes=32, groups=4, num_classes=5, se=se)


def small_senet(se: str | None = "reference") -> SENet:
    options = {"groups": 4, "stem": "deep", "stem_channels": 16, "downsample_size": 3, "num_classes": 5}
    return SENet(senet, (1, 2), planes=8, se=se, **options)


def small_inception(se: str | None = "reference", conv_bias: bool = True) -> BNInception:
    modules = {
        "3a": Inception(3, (4, 5), (4, 3), "avg", 6),
        "3c": Inception(0, (5, 4), (3, 7), "max", 0),
        "5b": Inception(8, (4, 12), (5, 8), "max", 7),
    }
    return BNInception(modules, stem=(6, 4, 8), num_classes=5, se=se, conv_bias=conv_bias)


SMALL: list[Callable[..., nn.Module]] = [small_resnet, small_resnext, small_senet, small_inception]


def random_blobs(model: nn.Module) -> Blobs:
    """Blobs of every layer as Caffe has them: no biases in front of BatchNorms, statistics times a factor."""
    rng, shapes, blobs = np.random.default_rng(7), {k: tuple(t.shape) for k, t in model.state_dict().items()}, {}
    names = caffe_names(model)
    for name, keys in names.items():
        if f"{name}/bn" in names:
            keys = keys[:1]
        of = [rng.uniform(-0.5, 0.5, shapes[key]).astype(np.float32) for key in keys]
        if name.endswith("/bn"):
            factor = np.float32(rng.uniform(1, 999))
            of = [of[0] * factor, (of[1] + 1) * factor, np.array([factor])]
        blobs[name] = of
    return blobs


class Caffe:
    """The layers of the prototxts on blobs, in float64."""

    def __init__(self, blobs: Blobs) -> None:
        self.blobs = {name: [torch.from_numpy(b).double() for b in of] for name, of in blobs.items()}

    def conv(self, name: str, x: Tensor, stride: int = 1, groups: int = 1, relu: bool = True) -> Tensor:
        (weight,) = self.blobs[name]
        x = F.conv2d(x, weight, stride=stride, padding=weight.shape[-1] // 2, groups=groups)
        mean, var, factor = self.blobs[f"{name}/bn"]
        gamma, beta = self.blobs[f"{name}/bn/scale"]
        mean, var, gamma, beta = (t[:, None, None] for t in (mean / factor, var / factor, gamma, beta))
        x = gamma * (x - mean) / (var + 1e-5).sqrt() + beta
        return x.clamp(min=0) if relu else x

    def gate(self, name: str, x: Tensor) -> Tensor:
        down, up = self.blobs[f"{name}_1x1_down"], self.blobs[f"{name}_1x1_up"]
        return F.conv2d(F.conv2d(x.mean((2, 3), keepdim=True), *down).clamp(min=0), *up).sigmoid()

    def classify(self, x: Tensor) -> Tensor:
        weight, bias = self.blobs["classifier"]
        return x.mean((2, 3)) @ weight.T + bias

    def residual(self, x: Tensor, depths: tuple[int, ...], groups: int, early_stride: bool) -> Tensor:
        if "conv1/7x7_s2" in self.blobs:
            x = self.conv("conv1/7x7_s2", x, 2)
        else:
            x = self.conv("conv1_3/3x3", self.conv("conv1_2/3x3", self.conv("conv1_1/3x3_s2", x, 2)))
        x = F.max_pool2d(x, 3, 2, ceil_mode=True)
        for stage, depth in enumerate(depths, 2):
            for block in range(1, depth + 1):
                name, stride = f"conv{stage}_{block}", 2 if block == 1 and stage > 2 else 1
                first, second = (stride, 1) if early_stride else (1, stride)
                y = self.conv(f"{name}_3x3", self.conv(f"{name}_1x1_reduce", x, first), second, groups)
                y = self.conv(f"{name}_1x1_increase", y, relu=False)
                shortcut = self.conv(f"{name}_1x1_proj", x, stride, relu=False) if block == 1 else x
                x = (y * self.gate(name, y) + shortcut).clamp(min=0)
        return self.classify(x)

    def inception(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(self.conv("conv1/7x7_s2", x, 2), 3, 2, ceil_mode=True)
        x = F.max_pool2d(self.conv("conv2/3x3", self.conv("conv2/3x3_reduce", x)), 3, 2, ceil_mode=True)
        for name in ("inception_3a", "inception_3c", "inception_5b"):
            stride = 2 if name == "inception_3c" else 1
            three = self.conv(f"{name}/3x3", self.conv(f"{name}/3x3_reduce", x), stride)
            double = self.conv(f"{name}/double3x3a", self.conv(f"{name}/double3x3_reduce", x))
            branches = [three, self.conv(f"{name}/double3x3b", double, stride)]
            if stride == 2:
                branches.append(F.max_pool2d(x, 3, 2, ceil_mode=True))
            else:
                pool = F.max_pool2d if name == "inception_5b" else F.avg_pool2d
                branches.append(self.conv(f"{name}/pool_proj", pool(x, 3, 1, 1)))
                branches.insert(0, self.conv(f"{name}/1x1", x))
            x = torch.cat(branches, 1)
            x = x * self.gate(name, x)
        return self.classify(x)


FORWARD = {
    small_resnet: lambda caffe, x: caffe.residual(x, (2, 1), 1, True),
    small_resnext: lambda caffe, x: caffe.residual(x, (1, 2), 4, False),
    small_senet: lambda caffe, x: caffe.residual(x, (1, 2), 4, False),
    small_inception: Caffe.inception,
}


@pytest.fixture
def images() -> Tensor:
    return torch.randn(2, 3, 48, 64, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("se", ["fused", "tails", "reference"])
@pytest.mark.parametrize("make", SMALL)
def test_outputs_are_caffes(make, se, images):
    model = make(se).double().eval()
    blobs = random_blobs(model)
    assert load_caffe(model, blobs) == ([], [])
    expected = FORWARD[make](Caffe(blobs), images)
    assert expected.std() > 1e-3
    torch.testing.assert_close(model(images), expected, rtol=1e-9, atol=1e-9)


def same_state(model: nn.Module, expected: dict[str, Tensor]) -> bool:
    return all(torch.equal(t, expected[key]) for key, t in model.state_dict().items())


@pytest.mark.parametrize("separator", "/_.:")
@pytest.mark.parametrize("make", [small_senet, small_inception])
def test_files(make, separator, tmp_path):
    model, other = make(), make()
    blobs = random_blobs(model)
    load_caffe(model, blobs)
    path = tmp_path / "weights.npz"
    np.savez(path, **{f"{name}{separator}{i}": b for name, of in blobs.items() for i, b in enumerate(of)})
    load_caffe(other, path)
    assert same_state(other, model.state_dict())
    load_caffe(make(), str(path))


class Blob:
    """As pycaffe has it."""

    def __init__(self, data: np.ndarray) -> None:
        self.data = data


def test_other_ways_to_hold_blobs():
    model = small_resnet()
    blobs = random_blobs(model)
    load_caffe(model, blobs)
    expected = {key: t.clone() for key, t in model.state_dict().items()}
    with_old_shapes = dict(blobs)
    weight, bias = blobs["classifier"]
    with_old_shapes["classifier"] = [weight[None, None], bias[None, None, None]]
    single = {name: of[0] if len(of) == 1 else tuple(of) for name, of in blobs.items()}
    boxed = {name: np.empty((), object) for name in blobs}
    for name, of in blobs.items():
        boxed[name][()] = of
    for held in (
        with_old_shapes,
        single,
        boxed,
        {name: [Blob(b) for b in of] for name, of in blobs.items()},
        {name: [torch.from_numpy(b).double() for b in of] for name, of in blobs.items()},
        {f"{name}/{i}": torch.from_numpy(b) for name, of in reversed(blobs.items()) for i, b in enumerate(of)},
        blobs | {"conv2_1_1x1_down/relu": [], "conv2_1": ()},
    ):
        other = small_resnet()
        assert load_caffe(other, held) == ([], [])
        assert same_state(other, expected)


def test_factors_of_batchnorms():
    model = small_resnet()
    blobs = random_blobs(model)
    mean, var, _ = blobs["conv1/7x7_s2/bn"]
    for factor, expected in ((0.0, (0 * mean, 0 * var)), (1.0, (mean, var)), (8.0, (mean / 8, var / 8))):
        load_caffe(model, blobs | {"conv1/7x7_s2/bn": [mean, var, np.array([factor])]})
        found = model.layer0.bn1.running_mean, model.layer0.bn1.running_var
        assert all(np.array_equal(a.numpy(), b) for a, b in zip(found, expected, strict=True))
    assert int(model.layer0.bn1.num_batches_tracked) == 0


def test_biases_that_caffe_lacks_are_zero():
    model, without = small_inception(), small_inception(conv_bias=False)
    blobs = random_blobs(model)
    load_caffe(model, blobs)
    load_caffe(without, blobs)
    assert not model.inception_3a_3x3.bias.any() and model.inception_3a_se.fc1.bias.any()
    bias = np.arange(5, dtype=np.float32)
    load_caffe(model, blobs | {"inception_3a/3x3": [*blobs["inception_3a/3x3"], bias]})
    assert np.array_equal(model.inception_3a_3x3.bias.detach().numpy(), bias)
    with pytest.raises(ValueError, match=re.escape("inception_3a/3x3: expected [5, 4, 3, 3], found [5, 4, 3, 3], [5]")):
        load_caffe(without, blobs | {"inception_3a/3x3": [*blobs["inception_3a/3x3"], bias]})


@pytest.mark.parametrize("make", SMALL)
def test_rgb(make, images):
    bgr, rgb = make().double().eval(), make().double().eval()
    blobs = random_blobs(bgr)
    load_caffe(bgr, blobs)
    load_caffe(rgb, blobs, rgb=True)
    torch.testing.assert_close(rgb(images.flip(1)), bgr(images), rtol=1e-12, atol=1e-12)
    assert not torch.allclose(rgb(images), bgr(images))
    changed = [key for key, t in rgb.state_dict().items() if not torch.equal(t, bgr.state_dict()[key])]
    assert len(changed) == 1


def refused(model: nn.Module, weights: object, **options: object) -> str:
    before = {key: t.clone() for key, t in model.state_dict().items()}
    with pytest.raises(ValueError) as error:
        load_caffe(model, weights, **options)
    assert same_state(model, before)
    return str(error.value)


def test_layers_that_do_not_fit():
    model = small_resnet()
    blobs = random_blobs(model)
    without = {name: of for name, of in blobs.items() if not name.startswith("conv2_2_1x1_down")}
    assert refused(model, without) == (
        "load_caffe: these weights are not those of this SENet:\n"
        "  conv2_2_1x1_down: expected [4, 32, 1, 1], [4], found nothing"
    )
    assert "conv5_1_1x1_up: expected no such layer, found 1 blobs" in refused(
        model, blobs | {"conv5_1_1x1_up": [np.ones(2)]}
    )
    for name, of, expected in (
        ("classifier", [np.ones((5, 32)), np.ones(5)], "classifier: expected [5, 64], [5], found [5, 32], [5]"),
        ("classifier", [np.ones((5, 64))], "classifier: expected [5, 64], [5], found [5, 64]"),
        ("conv1/7x7_s2/bn", [np.ones(64)] * 2, "conv1/7x7_s2/bn: expected [64], [64], [1], found [64], [64]"),
        ("conv1/7x7_s2", [np.ones((64, 7, 7, 3))], "conv1/7x7_s2: expected [64, 3, 7, 7], found [64, 7, 7, 3]"),
    ):
        for strict in (True, False):
            assert expected in refused(model, blobs | {name: of}, strict=strict)
    message = refused(model, random_blobs(small_senet()))
    assert message.count("\n") == 6 and re.search(r"and \d+ more$", message)
    assert "conv1/7x7_s2: expected [64, 3, 7, 7], found nothing" in refused(model, {})


def test_blobs_that_cannot_be_read():
    model = small_resnet()
    blobs = random_blobs(model)
    flat = {f"{name}/{i}": b for name, of in blobs.items() for i, b in enumerate(of)}
    gap = dict(flat) | {"classifier/3": np.ones(1)}
    assert "classifier has blobs [0, 1, 3]; expected 0, 1, ... without gaps" in refused(model, gap)
    assert "blob 0 of classifier is there twice, the second time as 'classifier_0'" in refused(
        model, flat | {"classifier_0": np.ones(1)}
    )
    assert "classifier has a blob of <U1; expected numbers" in refused(model, blobs | {"classifier": ["a", "b"]})
    assert "weights must be a mapping or the path of an .npz, got list" in refused(model, [blobs])


def test_files_that_are_none(tmp_path):
    model, blobs = small_resnet(), random_blobs(small_resnet())
    pickled = np.empty((), object)
    pickled[()] = blobs["classifier"]
    buffer = io.BytesIO()
    np.savez(buffer, **{"classifier": pickled})
    contents = {
        "pickled.npz": buffer.getvalue(),
        "cut.npz": buffer.getvalue()[:100],
        "empty.npz": b"",
        "SENet.caffemodel": b"\n\x05SENet",
    }
    for name, content in contents.items():
        (tmp_path / name).write_bytes(content)
        assert "is not an .npz of plain arrays" in refused(model, tmp_path / name), name
    np.save(tmp_path / "one.npy", np.ones(3))
    assert "is not an .npz of plain arrays" in refused(model, tmp_path / "one.npy")
    with pytest.raises(FileNotFoundError):
        load_caffe(model, tmp_path / "nothing.npz")


def test_not_strict():
    model = small_resnet()
    before = {key: t.clone() for key, t in model.state_dict().items()}
    blobs = random_blobs(model)
    del blobs["conv2_2_1x1_down"], blobs["classifier"]
    result = load_caffe(model, blobs | {"loss3": [np.ones(3)], "version": "1"}, strict=False)
    assert result.missing == ["conv2_2_1x1_down", "classifier"] and result.unexpected == ["loss3", "version"]
    kept = {key for key, t in model.state_dict().items() if torch.equal(t, before[key])}
    assert {k for k in kept if not k.endswith("num_batches_tracked")} == {
        "layer1.1.se_module.fc1.weight", "layer1.1.se_module.fc1.bias", "last_linear.weight", "last_linear.bias",
    }  # fmt: skip
    twin = small_resnet(se=None)
    assert len(load_caffe(twin, random_blobs(model), strict=False).unexpected) == 6


@pytest.mark.parametrize(
    "make, key",
    [
        (models.se_resnet18, "layer0.conv1.weight"),
        (models.se_resnet20, "layer0.conv1.weight"),
        (models.se_mobilenet, "conv_stem.weight"),
        (lambda: nn.DataParallel(small_resnet()), "module.layer0.conv1.weight"),
        (lambda: nn.Linear(2, 2), "weight"),
    ],
)
def test_networks_without_an_original(make, key):
    with torch.device("meta"):
        model = make()
    for call in (caffe_names, lambda m: load_caffe(m, {})):
        with pytest.raises(ValueError, match=re.escape(f"has no original in Caffe (at {key!r}); there are those of")):
            call(model)


def test_models_that_cannot_take_weights():
    with torch.device("meta"):
        model = small_resnet()
    with pytest.raises(ValueError, match="the model is on the meta device"):
        load_caffe(model, random_blobs(small_resnet()))
    gray = SENet(bottleneck, (1,), planes=8, in_chans=1, se="reference")
    assert "rgb=True: expected a first convolution of 3 channels" in refused(gray, random_blobs(gray), rgb=True)
