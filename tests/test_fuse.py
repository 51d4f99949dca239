"""fuse, unfuse, fuse_report: what is found, what stays untouched, what is refused, and when the original runs."""

from __future__ import annotations

import copy
import functools
import io
import os
import pickle
import random
import re
import subprocess
import sys
import warnings
import weakref
from pathlib import Path

import pytest
import torch
from changes import CHANGES as OF_CHILDREN
from changes import Marked
from peer_layers import (
    SCSE,
    EfficientNetSE,
    LegacySE,
    MaxPooled,
    MMPretrainSE,
    MonaiSE,
    NvidiaSE,
    OwnHardSigmoid,
    OwnSwish,
    RegNetSE,
    TimmSEModule,
    TimmSqueezeExcite,
    TimmSqueezeExciteCl,
    TorchvisionSE,
    TutorialSE,
)
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations, prune

import senet_fused
from senet_fused import FusedSE, capture_gates, fuse, fuse_report, unfuse, use_backend
from senet_fused.fusion import trial

HERE = Path(__file__).resolve().parent
BACKEND = senet_fused.explain(torch.empty(0)).backend
fuse_by_name = functools.partial(fuse, backend=BACKEND)  # a gate alone is left to PyTorch on a CPU by "auto"
compiled_only = pytest.mark.skipif(BACKEND == "reference", reason="without compiled code the original forward runs")


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)
    senet_fused.reset_call_counts()


class PaddleGate(MaxPooled):
    def forward(self, x):
        return x * torch.clamp(0.2 * self.up(F.relu(self.down(x.mean((2, 3), keepdim=True)))) + 0.5, 0, 1)


class Clamp(nn.Module):
    """With a number of its own, which is no size."""

    def __init__(self):
        super().__init__()
        self.divisor = 6

    def forward(self, x):
        return torch.clamp(x, 0, 1)


# name -> (layer of 8 channels, kind in the report, form, spatial dimensions of its input)
LAYERS = {
    "tutorial": (lambda: TutorialSE(8, 2), "SELayer", "scale", 2),
    "torchvision": (lambda: TorchvisionSE(8, 2), "torchvision SqueezeExcitation", "scale", 2),
    "torchvision_mobilenet": (
        lambda: TorchvisionSE(8, 2, scale_activation=nn.Hardsigmoid), "torchvision SqueezeExcitation", "scale", 2,
    ),
    "torchvision_efficientnet": (
        lambda: TorchvisionSE(8, 2, activation=nn.SiLU), "torchvision SqueezeExcitation", "scale", 2,
    ),
    "timm": (lambda: TimmSEModule(8, 3), "timm SEModule", "scale", 2),
    "timm_maxpool": (lambda: TimmSEModule(8, 3, add_maxpool=True), "timm SEModule", "scale", 2),
    "timm_own_classes": (
        lambda: TimmSEModule(8, 3, bias=False, act=OwnSwish, gate=OwnHardSigmoid), "timm SEModule", "scale", 2,
    ),
    "timm_efficientnet": (lambda: TimmSqueezeExcite(8, 3), "timm SqueezeExcite", "scale", 2),
    "timm_channels_last": (lambda: TimmSqueezeExciteCl(8, 3), "timm SqueezeExciteCl", "scale", 2),
    "legacy": (lambda: LegacySE(8, 4), "legacy SEModule", "scale", 2),
    "monai_1d": (lambda: MonaiSE(1, 8), "MONAI ChannelSELayer", "scale", 1),
    "monai_2d": (lambda: MonaiSE(2, 8, acts=(nn.Mish, nn.Tanh)), "MONAI ChannelSELayer", "scale", 2),
    "monai_3d_residual": (
        lambda: MonaiSE(3, 8, acts=(lambda: nn.LeakyReLU(0.1), nn.ReLU), add_residual=True),
        "MONAI ChannelSELayer", "residual", 3,
    ),
    "nvidia": (lambda: NvidiaSE(8, 2), "NVIDIA SqueezeAndExcitation", "gate", 2),
    "openmmlab": (lambda: MMPretrainSE(8, 2), "OpenMMLab SELayer", "scale", 2),
    "openmmlab_gate": (lambda: MMPretrainSE(8, 2, return_weight=True), "OpenMMLab SELayer", "gate", 2),
    "transformers_regnet": (lambda: RegNetSE(8, 2), "transformers RegNetSELayer", "scale", 2),
    "transformers_efficientnet": (
        lambda: EfficientNetSE(8, 2), "transformers EfficientNetSqueezeExciteLayer", "scale", 2,
    ),
    "smp": (lambda: SCSE(8, 2).cSE, "cSE of SCSEModule", "gate", 2),
    "paddle_gate": (lambda: PaddleGate(8, 2), "PaddleGate, by structure", "scale", 2),
    "ghostnet_gate": (
        lambda: TorchvisionSE(8, 2, scale_activation=Clamp), "torchvision SqueezeExcitation", "scale", 2,
    ),
    "by_structure": (lambda: MaxPooled(8, 2), "MaxPooled, by structure", "scale", 2),
}  # fmt: skip


def draw(layer, dimensions, samples=3, dtype=torch.float64):
    shape = (samples, 8, *(5, 4, 3)[:dimensions])
    if isinstance(layer, TimmSqueezeExciteCl):
        shape = (samples, 5, 4, 8)
    return torch.randn(shape, dtype=dtype, requires_grad=True)


def gradients(layer, x):
    y = layer(x)
    dy = torch.randn(y.shape, dtype=y.dtype, generator=torch.Generator().manual_seed(3))
    return y, torch.autograd.grad(y, (x, *layer.parameters()), dy)


def ran():
    """How often a backend has run forward."""
    return sum(count for name, count in senet_fused.call_counts().items() if name.endswith("forward"))


def state(module):
    """All that a module holds, by the identity of what it holds."""
    return {
        name: (type(part), dict(vars(part)), {key: dict(v) for key, v in vars(part).items() if isinstance(v, dict)})
        for name, part in module.named_modules()
    }


# ---------------------------------------------------------------------------------- what is fused


@compiled_only
@pytest.mark.parametrize("name", LAYERS)
def test_every_family(name):
    make, kind, form, dimensions = LAYERS[name]
    layer = make().double()
    x = draw(layer, dimensions)
    before, keys, parameters = state(layer), list(layer.state_dict()), list(layer.parameters())
    expected, wanted = gradients(layer, x)

    assert fuse_by_name(layer) is layer
    (row,) = fuse_report(layer)
    assert (row.name, row.kind, row.form, row.channels, row.status) == ("", kind, form, 8, "fused")
    assert list(layer.state_dict()) == keys
    assert all(a is b for a, b in zip(layer.parameters(), parameters, strict=True))
    assert ran() == 0
    y, got = gradients(layer, x)
    assert senet_fused.call_counts() == {"cpu.forward": 1, "cpu.backward": 1}
    assert y.shape == expected.shape and y.dtype == expected.dtype
    # PyTorch's hardsigmoid has the slope 1/6 in float32.
    bound = 1e-7 if name in ("torchvision_mobilenet", "by_structure") else 1e-11
    for a, b in zip((y, *got), (expected, *wanted), strict=True):
        torch.testing.assert_close(a, b, rtol=bound, atol=bound / 10)

    assert unfuse(layer) is layer
    assert state(layer) == before
    again, _ = gradients(layer, x)
    assert torch.equal(again, expected) and ran() == 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", LAYERS)
def test_dtypes_of_results(name, dtype):
    """As the original's, also under autocast; the error is at most twice the original's and a rounding."""
    make, _, _, dimensions = LAYERS[name]
    layer, wide = make(), None
    wide = copy.deepcopy(layer).double()
    fused = fuse_by_name(copy.deepcopy(layer))
    x = draw(layer, dimensions, dtype=torch.float32).detach()
    oracle = wide(x.double())
    for weights, amp in ((dtype, None), (torch.float32, dtype)):
        if amp is not None and dtype == torch.float32:
            continue
        layer.to(weights)
        fused.to(weights)
        with torch.autocast("cpu", dtype=amp, enabled=amp is not None):
            for given in (x.to(dtype), *([x] if amp is not None else [])):
                theirs, ours = layer(given), fused(given)
                if given is not x:
                    assert ours.dtype == theirs.dtype
                scale = oracle.abs().max()
                error, allowed = ((t.double() - oracle).abs().max() / scale for t in (ours, theirs))
                assert error <= 2 * allowed + torch.finfo(dtype).eps


@compiled_only
def test_channels_last_and_empty_batches():
    layer = fuse(TorchvisionSE(8, 2))
    x = torch.randn(2, 8, 6, 6).to(memory_format=torch.channels_last)
    y = layer(x)
    assert y.is_contiguous(memory_format=torch.channels_last) and ran() == 1
    layer.to(memory_format=torch.channels_last)  # its weights too
    torch.testing.assert_close(layer(x), unfuse(copy.deepcopy(layer))(x))
    assert layer(x[:0]).shape == (0, 8, 6, 6)


class Network(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU())
        self.blocks = nn.ModuleList([TutorialSE(8, 2), TorchvisionSE(8, 2), MonaiSE(2, 8, add_residual=True)])
        self.gate = NvidiaSE(8, 4)
        self.attention = SCSE(8, 4)
        self.normed = TimmSEModule(8, 4, norm=nn.BatchNorm2d)
        self.mlp = nn.Sequential(nn.Linear(8, 4), nn.ReLU(), nn.Linear(4, 8), nn.Sigmoid())
        self.ours = FusedSE(8, 4)
        self.again = self.blocks[0]

    def forward(self, x):
        x = self.stem(x)
        for block in self.blocks:
            x = block(x)
        x = self.normed(self.attention(x * self.gate(x)))
        return self.again(self.ours(x)).mean((2, 3)) + self.mlp(x.mean((2, 3)))


class WithEffectiveSE(nn.Module):
    def __init__(self):
        super().__init__()
        self.se = EffectiveSEModule(8)

    def forward(self, x):
        return self.se(x)


class EffectiveSEModule(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.fc, self.gate = nn.Conv2d(channels, channels, 1), nn.Hardsigmoid()

    def forward(self, x):
        return x * self.gate(self.fc(x.mean((2, 3), keepdim=True)))


REPORT = """\
layer          kind                           C  R  status  why
-------------  -----------------------------  -  -  ------  ---
blocks.0       SELayer                        8  4  fused   the whole layer; backend cpu
blocks.1       torchvision SqueezeExcitation  8  2  fused   the whole layer; backend cpu
blocks.2       MONAI ChannelSELayer           8  4  fused   the whole layer, with its addition of the input; backend cpu
gate           NVIDIA SqueezeAndExcitation    8  4  fused   the gate; the multiplication is its caller's and stays there; backend cpu
attention.cSE  cSE of SCSEModule              8  2  fused   the gate; the multiplication is its caller's and stays there; backend cpu
normed         TimmSEModule                   -  -  left    it has parameters or buffers that belong to no plain SE layer: \
bn.weight, bn.bias, bn.running_mean, bn.running_var, bn.num_batches_tracked
ours           FusedSE                        8  2  fused   a layer of this package

Network: 7 SE layers: 6 fused, 1 left"""  # noqa: E501


@compiled_only
def test_a_network():
    """The MLP, which looks like the middle of an SE layer, is not one; a layer that is used twice is one layer."""
    model, x = Network().eval(), torch.randn(2, 3, 7, 7)
    keys, before = list(model.state_dict()), state(model)
    plain = model(x)
    assert [row.status for row in fuse_report(model)] == ["can be fused"] * 5 + ["left", "fused"]
    assert state(model) == before
    assert fuse_by_name(model) is model
    assert str(fuse_report(model)) == REPORT
    senet_fused.reset_call_counts()
    torch.testing.assert_close(model(x), plain)
    assert ran() == 7
    assert list(model.state_dict()) == keys
    model.load_state_dict(Network().state_dict())
    assert state(unfuse(model)) == before


def test_an_optimiser_made_before_goes_on():
    results = []
    for fused in (False, True):
        torch.manual_seed(5)
        model = nn.Sequential(nn.Conv2d(3, 8, 3), TutorialSE(8, 2)).double()
        optimiser = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        x = torch.randn(2, 3, 6, 6, dtype=torch.float64)
        model(x).square().mean().backward()
        optimiser.step()
        if fused:
            fuse(model)
        for _ in range(3):
            optimiser.zero_grad()
            model(x).square().mean().backward()
            optimiser.step()
        results.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    torch.testing.assert_close(*results, rtol=1e-10, atol=1e-12)
    assert senet_fused.call_counts().get("cpu.backward", 0) == (3 if BACKEND == "cpu" else 0)


def test_the_proof_frees_what_it_computes(monkeypatch):
    made, compare = [], trial.distance

    def watched(ours, theirs, scale):
        made.extend((weakref.ref(ours), weakref.ref(theirs)))
        return compare(ours, theirs, scale)

    monkeypatch.setattr(trial, "distance", watched)
    fuse(TorchvisionSE(8, 2))  # a sigmoid's backward keeps its output
    assert len(made) > 20 and not any(y() is not None for y in made)


def test_modes_and_hooks_of_the_layer_stay():
    layer = TorchvisionSE(8, 2).eval()
    called = []
    layer.register_forward_hook(lambda *_: called.append("forward"))
    layer.register_forward_pre_hook(lambda *_: called.append("before"))
    layer.register_full_backward_hook(lambda *_: called.append("backward"))
    layer.fc1.weight.requires_grad_(False)
    fuse(layer)
    assert not called and not layer.training and not layer.fc2.training
    layer(torch.randn(1, 8, 2, 2, requires_grad=True)).sum().backward()
    assert called == ["before", "forward", "backward"]
    assert layer.fc1.weight.grad is None and layer.fc2.weight.grad is not None
    assert isinstance(layer, TorchvisionSE) and layer.train().training
    if BACKEND == "cpu":
        assert ran() == 1
        assert repr(layer).startswith("FusedTorchvisionSE(") and "(fc1): Conv2d(8, 2" in repr(layer)


@compiled_only
def test_a_gate_alone_on_a_cpu():
    layer, x = fuse(NvidiaSE(8, 2)), torch.randn(2, 8, 3, 3)
    assert torch.equal(layer(x), NvidiaSE.forward(layer, x)) and ran() == 0
    (row,) = fuse_report(layer)
    assert row.status == "original runs" and "faster on a CPU; backend='cpu'" in row.reason
    with capture_gates(layer) as gates:
        layer(x)
    assert len(gates[""]) == 1 and ran() == 1
    fuse(layer, backend="cpu")
    torch.testing.assert_close(layer(x), NvidiaSE.forward(layer, x))
    assert ran() == 2 and fuse_report(layer).layers[0].status == "fused"
    with torch.inference_mode():
        torch.testing.assert_close(layer(x), NvidiaSE.forward(layer, x))
    assert ran() == 3


def test_meta_devices():
    with torch.device("meta"):
        model = Network()
    fuse(model)
    assert fuse_report(model).count("fused") == 6
    assert all(p.is_meta for p in model.parameters())
    model.to_empty(device="cpu")
    model.load_state_dict(Network().state_dict())
    plain, x = unfuse(copy.deepcopy(model)).eval(), torch.randn(2, 3, 5, 5)
    torch.testing.assert_close(model.eval()(x), plain(x))
    assert fuse(model.to("meta")) is model
    with torch.device("meta"):
        assert model(torch.empty(2, 3, 5, 5)).is_meta


def test_wrappers():
    for wrap in (nn.DataParallel, torch.compile, nn.Sequential):
        model = Network().eval()
        wrapped = wrap(model)
        assert fuse_by_name(wrapped) is wrapped
        assert fuse_report(model).count("fused") == fuse_report(wrapped).count("fused") == 6


def test_calling_fuse_again_changes_the_backend():
    model = fuse(Network())
    classes = [type(m) for m in model.modules()]
    assert fuse(model, backend="reference") is model
    assert [type(m) for m in model.modules()] == classes
    model.eval()(torch.randn(2, 3, 5, 5))
    assert senet_fused.call_counts()["reference.forward"] == 6
    fuse(model)
    senet_fused.reset_call_counts()
    model(torch.randn(2, 3, 5, 5))
    assert "reference.forward" not in senet_fused.call_counts()


def test_backends_by_name(monkeypatch):
    # The library that other tests run the CUDA kernels on the host with may have been loaded into this process.
    monkeypatch.setattr(senet_fused.backends.cuda, "problem", lambda *_: "no GPU")
    layer, x = fuse(TutorialSE(8, 2)), torch.randn(1, 8, 3, 3)
    with use_backend("reference"):
        layer(x)
        assert senet_fused.call_counts() == {"reference.forward": 1}
    layer = fuse(TutorialSE(8, 2), backend="cuda")
    with pytest.raises(senet_fused.BackendUnavailableError, match="'cuda'"):
        layer(x)
    assert fuse_report(layer).layers[0].status == "cannot run"
    assert "'cuda'" in fuse_report(layer).layers[0].reason
    with pytest.raises(ValueError, match="fuse: unknown backend 'gpu'"):
        fuse(TutorialSE(8, 2), backend="gpu")


def test_auto_without_kernels_runs_the_original(monkeypatch):
    """The original is what stock PyTorch has, and never slower than our reference."""
    layer, x = fuse(TutorialSE(8, 2)), torch.randn(1, 8, 3, 3)
    monkeypatch.setattr(senet_fused.backends.native, "problem", lambda: "not today")
    layer(x)
    assert senet_fused.call_counts() == {}
    (row,) = fuse_report(layer)
    assert row.status == "original runs" and "not today" in row.reason
    with use_backend("reference"):
        layer(x)
    assert senet_fused.call_counts() == {"reference.forward": 1}


def test_capture_gates():
    model, x = fuse_by_name(Network()).eval(), torch.randn(2, 3, 7, 7)
    before = state(model)
    with capture_gates(model) as gates:
        model(x)
    assert {name: [tuple(g.shape) for g in calls] for name, calls in gates.items()} == {
        "blocks.0": [(2, 8)] * 2, "blocks.1": [(2, 8)], "blocks.2": [(2, 8)], "gate": [(2, 8)],
        "attention.cSE": [(2, 8)], "ours": [(2, 8)],
    }  # fmt: skip
    y = model.stem(x)
    torch.testing.assert_close(gates["blocks.0"][0], model.blocks[0].fc(y.mean((2, 3))))
    assert state(model) == before
    with pytest.raises(ValueError, match="none that fuse has converted"), capture_gates(nn.Linear(2, 2)):
        pass
    with capture_gates(model) as gates:
        torch.compile(model, fullgraph=True, backend="eager")(x)
    assert [len(calls) for calls in gates.values()] == [2, 1, 1, 1, 1, 1]
    model.gate.squeeze.register_forward_hook(lambda *_: None)
    with capture_gates(model) as gates, pytest.warns(UserWarning, match="capture_gates: an SE layer's original"):
        model(x)
    assert len(gates["gate"]) == 0


# ---------------------------------------------------------------------------------- what is left


class Doubled(TorchvisionSE):
    def forward(self, x):
        return 2 * super().forward(x)


class NoGradientThroughTheGate(TorchvisionSE):
    """The same numbers, another backward."""

    def forward(self, x):
        return x * self.scale_activation(self.fc2(self.activation(self.fc1(self.avgpool(x.detach())))))


class FrozenHidden(TorchvisionSE):
    def forward(self, x):
        return x * self.scale_activation(self.fc2(self.activation(self.fc1(self.avgpool(x))).detach()))


class OnlyInTraining(TorchvisionSE):
    def forward(self, x):
        y = super().forward(x)
        return y + 0.01 * x if self.training else y


class Relu6(TorchvisionSE):
    def forward(self, x):
        return x * self.scale_activation(self.fc2(F.relu6(self.fc1(self.avgpool(x)))))


class InPlace(TorchvisionSE):
    def forward(self, x):
        return x.mul_(self.scale_activation(self.fc2(self.activation(self.fc1(self.avgpool(x))))))


class TwoInputs(TorchvisionSE):
    def forward(self, x, shortcut):
        return super().forward(x) + shortcut


class ReturnsBoth(TorchvisionSE):
    def forward(self, x):
        gate = self._gate(x)
        return x * gate, gate

    def _gate(self, x):
        return self.scale_activation(self.fc2(self.activation(self.fc1(self.avgpool(x)))))


class NoGradient(TorchvisionSE):
    @torch.no_grad()
    def forward(self, x):
        return super().forward(x)


class PerGroup(TorchvisionSE):
    """One gate for two channels each."""

    def forward(self, x):
        gate = self.scale_activation(self.fc2(self.activation(self.fc1(self.avgpool(x)))))
        return x * gate.view(-1, 4, 2, 1, 1).mean(2).repeat_interleave(2, 1)


class Windowed(TorchvisionSE):
    """Pools over windows of a size, which are the whole plane where that is smaller."""

    def __init__(self, channels, reduced, size):
        super().__init__(channels, reduced)
        self.size = size

    def forward(self, x):
        height, width = x.shape[2:]
        local = F.avg_pool2d(x, (min(self.size, height), min(self.size, width)), stride=1)
        gate = self.scale_activation(self.fc2(self.activation(self.fc1(local))))
        return x * F.interpolate(gate, (height, width))


class OwnPool(nn.Module):
    """Of a window that is larger than any plane that is tried."""

    def __init__(self, size):
        super().__init__()
        self.size = size

    def forward(self, x):
        return F.avg_pool2d(x, tuple(min(self.size, s) for s in x.shape[2:]))


def own_pool():
    layer = TorchvisionSE(8, 2)
    layer.avgpool = OwnPool(384)
    return layer


class PythonsRandom(TorchvisionSE):
    def forward(self, x):
        return x if self.training and random.random() < 0.01 else super().forward(x)


class Float32(TorchvisionSE):
    def forward(self, x):
        return super().forward(x).to(torch.promote_types(x.dtype, torch.float32))


class Contiguous(TorchvisionSE):
    def forward(self, x):
        return super().forward(x).contiguous()


class NoNaN(TorchvisionSE):
    def forward(self, x):
        return torch.nan_to_num(super().forward(x))


class Clamped(TorchvisionSE):
    def forward(self, x):
        return super().forward(x.clamp(-65504, 65504))


class Counting(TorchvisionSE):
    calls = 0

    def forward(self, x):
        self.calls = self.calls + 1
        return super().forward(x)


class FailsInTraining(TorchvisionSE):
    def forward(self, x):
        if self.training:
            raise RuntimeError("needs distributed")
        return super().forward(x)


class TupleInTraining(TorchvisionSE):
    def forward(self, x):
        return (super().forward(x), x) if self.training else super().forward(x)


class OwnReduce(TorchvisionSE):
    def __reduce__(self):
        return torch.nn.Module.__new__, (OwnReduce,), self.__dict__


class NoSubclasses(TorchvisionSE):
    def __init_subclass__(cls, *, tag, **kwargs):
        super().__init_subclass__(**kwargs)


class Dropped(TutorialSE):
    def __init__(self, channels, reduction):
        super().__init__(channels, reduction)
        self.drop = nn.Dropout(0.1)

    def forward(self, x):
        return self.drop(super().forward(x))


class Uncopyable(TorchvisionSE):
    def __deepcopy__(self, memo):
        raise RuntimeError("one of its kind")


def replaced_forward():
    layer = TorchvisionSE(8, 2)
    layer.forward = lambda x: x
    return layer


def pruned():
    layer = TorchvisionSE(8, 2)
    prune.l1_unstructured(layer.fc1, "weight", 0.5)
    return layer


def parametrised():
    layer = TorchvisionSE(8, 2)
    parametrizations.weight_norm(layer.fc2)
    return layer


def grouped():
    layer = TorchvisionSE(8, 2)
    layer.fc1 = nn.Conv2d(8, 2, 1, groups=2)
    return layer


def unequal():
    layer = TorchvisionSE(8, 2)
    layer.fc1 = nn.Conv2d(8, 4, 1)
    return layer


LEFT = {
    "doubled": (lambda: Doubled(8, 2), "its output looks like an SE layer's, but differs by"),
    "no_gradient_through_the_gate": (lambda: NoGradientThroughTheGate(8, 2), "the gradient of its input"),
    "frozen_hidden": (lambda: FrozenHidden(8, 2), "the gradient of its input"),
    "only_in_training": (lambda: OnlyInTraining(8, 2).eval(), "in training mode its output looks like"),
    "relu6": (lambda: Relu6(8, 2), "its output looks like an SE layer's, but differs by"),
    "in_place": (lambda: InPlace(8, 2), "it changes its input in place"),
    "two_inputs": (lambda: TwoInputs(8, 2), "missing 1 required positional argument: 'shortcut'"),
    "returns_both": (lambda: ReturnsBoth(8, 2), "it returns tuple for an input"),
    "no_gradient": (lambda: NoGradient(8, 2), "its output has no gradient"),
    "per_group": (lambda: PerGroup(8, 2), "differs by"),
    "dropped": (lambda: Dropped(8, 2), "it draws random numbers"),
    "uncopyable": (lambda: Uncopyable(8, 2), "it cannot be copied, and so not be tried out: one of its kind"),
    "replaced_forward": (replaced_forward, "its forward has been replaced"),
    "pruned": (pruned, "its fc1 has no parameter 'weight': something computes it"),
    "parametrised": (parametrised, "not an SE layer's two (fc1: Conv2d, fc2: ParametrizedConv2d, "),
    "grouped": (grouped, "1 plain linear layers or 1x1 convolutions"),
    "unequal": (unequal, "its weights are [4, 8] and [8, 2]"),
    "norm": (lambda: TimmSEModule(8, 3, norm=nn.BatchNorm2d), "belong to no plain SE layer: bn.weight"),
    "softplus": (lambda: TorchvisionSE(8, 2, activation=nn.Softplus), "Softplus is not an activation known here"),
    "effective": (lambda: EffectiveSEModule(8), "one fully connected layer"),
    "scripted": (lambda: torch.jit.script(TorchvisionSE(8, 2)), "it is compiled by TorchScript"),
    "windowed": (lambda: Windowed(8, 2, 12), "for an input [1, 8, 20, 21] its output"),
    "own_pool": (own_pool, "it does not run on an input [1, 8, 769, 1]"),
    "pythons_random": (lambda: PythonsRandom(8, 2), "in training mode it draws random numbers"),
    "float32": (lambda: Float32(8, 2), "it returns torch.float32 for torch.bfloat16"),
    "contiguous": (lambda: Contiguous(8, 2), "of a channels_last input it makes an output with strides"),
    "no_nan": (lambda: NoNaN(8, 2), "it does something about NaN"),
    "clamped": (lambda: Clamped(8, 2), "of very large values its output looks like"),
    "counting": (lambda: Counting(8, 2), "its forward changes its calls, which the operator would not"),
    "fails_in_training": (lambda: FailsInTraining(8, 2), "in training mode it does not run on an input"),
    "tuple_in_training": (lambda: TupleInTraining(8, 2), "in training mode its output is a tuple"),
    "own_reduce": (lambda: OwnReduce(8, 2), "its class has a __reduce__ of its own"),
    "no_subclasses": (lambda: NoSubclasses(8, 2), "its class cannot be subclassed"),
    "graph": (lambda: torch.fx.symbolic_trace(TorchvisionSE(8, 2)), "it is traced by FX; fuse before that"),
}


@pytest.mark.parametrize("name", LEFT)
def test_left_alone(name):
    make, reason = LEFT[name]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        model = nn.Sequential(make())
    before, modes = state(model), [m.training for m in model.modules()]
    torch.manual_seed(11)
    rng, pythons = torch.get_rng_state(), random.getstate()
    with pytest.warns(UserWarning, match="nothing was fused. Sequential: 1 SE layer: 1 left; 0: "):
        assert fuse(model) is model
    (row,) = fuse_report(model)
    assert row.status == "left" and not row.fused and reason in row.reason, row.reason
    assert state(model) == before and [m.training for m in model.modules()] == modes
    assert torch.equal(torch.get_rng_state(), rng) and random.getstate() == pythons
    assert senet_fused.call_counts() == {} and all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("make", [TorchvisionSE, OnlyInTraining])
def test_the_proof_leaves_no_trace(make):
    """Neither of a layer that it converts nor of one that it leaves, whatever is around it."""
    layer = make(8, 2).eval()
    called = []
    layer.register_forward_hook(lambda *_: called.append("layer"))
    layer.register_state_dict_pre_hook(lambda *_: called.append("state"))
    for p in layer.parameters():
        p.grad = torch.full_like(p, 7.0)
    before = state(layer)
    values = [p.detach().clone() for p in layer.parameters()]
    rng, dtype = torch.get_rng_state(), torch.get_default_dtype()
    with torch.inference_mode(), torch.autocast("cpu", dtype=torch.bfloat16), torch.device("meta"):
        fuse_report(layer)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        unfuse(fuse(layer))
    assert state(layer) == before and not called
    assert torch.equal(torch.get_rng_state(), rng) and torch.get_default_dtype() == dtype
    assert senet_fused.call_counts() == {}
    for p, value in zip(layer.parameters(), values, strict=True):
        assert torch.equal(p, value) and (p.grad == 7).all() and p._version <= 1


def test_a_gate_that_is_closed_yet_hides_nothing():
    """Networks are often begun with a last weight of zero, where every gate is one half whatever the functions."""
    layer = Relu6(8, 2)
    nn.init.zeros_(layer.fc2.weight)
    nn.init.zeros_(layer.fc2.bias)
    with pytest.warns(UserWarning, match="nothing was fused"):
        fuse(layer)


def test_unverified():
    """Trusted by structure: for Doubled that is wrong, which is what verifying is for."""
    model = nn.Sequential(Doubled(8, 2), MonaiSE(2, 8, add_residual=True), MaxPooled(8, 2))
    fuse(model, verify=False)
    rows = fuse_report(model).layers
    assert [row.status for row in rows] == ["fused", "fused", "can be fused"]
    assert all("not verified" in row.reason for row in rows[:2])
    assert type(model[2]) is MaxPooled  # of no known family
    fuse(model)
    assert isinstance(model[2], MaxPooled) and type(model[2]) is not MaxPooled


def test_what_only_sounds_like_one():
    model = nn.Sequential(nn.Linear(8, 8), nn.SELU(), nn.Linear(8, 8), nn.SELU(), nn.MSELoss())
    assert len(fuse_report(model)) == 0


def test_nothing_to_fuse():
    with pytest.warns(UserWarning, match="fuse: nothing was fused. Linear: no SE layers found$"):
        fuse(nn.Linear(2, 2))
    assert str(fuse_report(nn.Linear(2, 2))) == "Linear: no SE layers found" and len(fuse_report(nn.Linear(2, 2))) == 0
    for function in (fuse, unfuse, fuse_report):
        with pytest.raises(TypeError, match=f"{function.__name__} takes a torch.nn.Module, got dict"):
            function({})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fuse(FusedSE(8, 2))  # ours already
        model = Network()
        assert unfuse(model) is model


# ---------------------------------------------------------------------------------- when the original runs


def with_attribute(path, name, value):
    def change(layer):
        child = layer.get_submodule(path)
        before = getattr(child, name)
        setattr(child, name, value)
        return lambda: setattr(child, name, before)

    return change


def append_a_child(layer):
    layer.bn = nn.BatchNorm1d(2)
    return lambda: delattr(layer, "bn")


def replace_forward(layer):
    layer.fc1.forward = lambda x: F.conv2d(x, layer.fc1.weight * 2)
    return lambda: delattr(layer.fc1, "forward")


def own_parameter(layer):
    layer.scale = nn.Parameter(torch.ones(()))
    return lambda: delattr(layer, "scale")


def note(layer):
    TorchvisionSE.reduction = 4
    layer.reduction = 8

    def undo():
        del layer.reduction
        del TorchvisionSE.reduction

    return undo


def patch_class(layer):
    before = TorchvisionSE.forward
    TorchvisionSE.forward = lambda self, x: 2 * before(self, x)
    return lambda: setattr(TorchvisionSE, "forward", before)


CHANGES = {
    **OF_CHILDREN,
    "hook_of_fc2": (lambda layer: layer.fc2.register_forward_hook(lambda *_: None).remove, "its fc2 has hooks"),
    "forward_replaced": (replace_forward, "the forward of its fc1 has been replaced"),
    "another_activation": (
        with_attribute("", "activation", nn.SiLU()), "its activation was a LeakyReLU and is a SiLU",
    ),
    "another_slope": (with_attribute("activation", "negative_slope", 0.5), "negative_slope of its activation was 0.1"),
    "another_child": (append_a_child, "it had 5 children and has 6"),
    "another_kernel": (with_attribute("", "fc1", nn.Conv2d(8, 2, 3, padding=1)), "kernel_size of its fc1 was"),
    "a_parameter_of_its_own": (own_parameter, "it has got a parameter"),
    "a_note_that_its_class_has": (note, "reduction of it has been set"),
    "forward_of_its_class": (patch_class, "the forward of TorchvisionSE has been replaced"),
}  # fmt: skip


@compiled_only
@pytest.mark.filterwarnings("ignore:Using a non-full backward hook:FutureWarning")
@pytest.mark.parametrize("name", CHANGES)
def test_a_layer_that_is_changed_after_fuse(name, monkeypatch):
    """Its children are called then, and not once it is put back; the results are right either way."""
    monkeypatch.setattr(nn.modules.module, "_global_is_full_backward_hook", None)  # PyTorch keeps it without a hook
    change, reason = CHANGES[name]
    layer = fuse(TorchvisionSE(8, 2, activation=lambda: nn.LeakyReLU(0.1))).eval()  # spectral norm iterates in training
    x = torch.randn(2, 8, 4, 4)
    layer(x)
    assert ran() == 1
    undo = change(layer)
    y = layer(x)
    row = fuse_report(layer).layers[0]
    plain = TorchvisionSE.forward(layer, x)
    torch.testing.assert_close(y, plain)
    assert ran() == 1, "the operator ran on weights that are not what the children compute with"
    assert row.status == "original runs" and not row.fused
    assert re.search(reason, row.reason), row.reason
    undo()
    assert fuse_report(layer).layers[0].status == "fused"
    torch.testing.assert_close(layer(x), unfuse(copy.deepcopy(layer))(x))
    assert ran() == 2


@compiled_only
def test_flags_and_containers_that_are_changed_after_fuse():
    layer, x = fuse(TimmSEModule(8, 3)), torch.randn(2, 8, 4, 4)
    layer.add_maxpool = True
    torch.testing.assert_close(layer(x), TimmSEModule.forward(layer, x), rtol=0, atol=0)
    assert fuse_report(layer).layers[0].reason == "add_maxpool of it was False and has been changed"
    layer = fuse(TutorialSE(8, 2))
    layer.fc.append(nn.Identity())
    torch.testing.assert_close(layer(x), TutorialSE.forward(layer, x), rtol=0, atol=0)
    assert fuse_report(layer).layers[0].reason == "its fc had 4 children and has 5"
    del layer.fc
    assert fuse_report(layer).layers[0].reason == "it had 2 children and has 1"
    layer = fuse(MMPretrainSE(8, 2))
    layer.conv2 = nn.Identity()
    assert fuse_report(layer).layers[0].reason == "its conv2 was a ConvModule and is a Identity"
    assert ran() == 0


class WithAttributes(TorchvisionSE):
    """Of which its forward reads what it likes."""

    def __init__(self):
        super().__init__(8, 2)
        self.factor, self.name, self.scale, self.function = 1.0, "a", None, torch.sigmoid

    def forward(self, x):
        y = x * self.function(self.fc2(self.activation(self.fc1(self.avgpool(x))))) * self.factor
        return y if self.scale is None else y * self.scale


@compiled_only
@pytest.mark.parametrize(
    ("name", "value"), [("factor", 2.0), ("name", "b"), ("scale", torch.tensor(3.0)), ("function", torch.tanh)]
)
def test_attributes_that_are_changed_after_fuse(name, value):
    layer, x = fuse(WithAttributes()), torch.randn(2, 8, 4, 4)
    layer.note = "somebody's"  # which the class does not know
    for same in (layer, copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert fuse_report(same).layers[0].status == "fused"
    setattr(layer, name, value)
    torch.testing.assert_close(layer(x), WithAttributes.forward(layer, x), rtol=0, atol=0)
    assert ran() == 0 and f"{name} of it was" in fuse_report(layer).layers[0].reason


@compiled_only
def test_a_new_object_of_a_fused_class_is_an_ordinary_one():
    layer, x = fuse(TutorialSE(8, 2)), torch.randn(2, 8, 4, 4)
    other = type(layer)(8, 2)
    torch.testing.assert_close(other(x), TutorialSE.forward(other, x), rtol=0, atol=0)
    assert ran() == 0 and fuse_report(other).layers[0].status == "can be fused"


@compiled_only
def test_a_forward_that_is_replaced_on_the_object():
    layer, x = fuse(TutorialSE(8, 2)), torch.randn(2, 8, 4, 4)
    forward = layer.forward
    layer.forward = lambda x: forward(x)
    layer(x)
    (row,) = fuse_report(layer)
    assert row.status == "original runs" and "its forward has been replaced on the object" in row.reason
    with pytest.raises(RuntimeError, match="undo that first"):
        unfuse(layer)
    del layer.forward
    assert type(unfuse(layer)) is TutorialSE


@compiled_only
def test_other_inputs_go_to_the_original():
    layer, x = fuse(TorchvisionSE(8, 2)), torch.randn(2, 8, 4, 4)
    torch.testing.assert_close(layer(x[0]), layer(x)[0])  # an image without a batch, as convolutions allow
    assert ran() == 1
    layer(x=x)
    assert ran() == 2  # by the name that its forward has for it
    y = layer(x.as_subclass(Marked))
    assert ran() == 2 and torch.equal(y, TorchvisionSE.forward(layer, x))
    for wrong in ((), (x, x)):
        with pytest.raises(TypeError, match="forward"):
            layer(*wrong)
    with pytest.raises(TypeError, match="unexpected keyword argument 'input'"):
        layer(input=x)
    with pytest.raises(ValueError, match=r"x \[2, 4, 4, 4\] has 4 channels, but w1"):
        layer(x[:, :4])
    layer = fuse(MonaiSE(3, 8))
    assert layer(torch.randn(2, 8, 2, 3, 4)).shape == (2, 8, 2, 3, 4)
    assert fuse(TimmSEModule(8, 2))(torch.empty(2, 8, 0, 4)).shape == (2, 8, 0, 4)


@compiled_only
def test_what_traces_sees_pytorchs_own_operators(tmp_path):
    model = nn.Sequential(nn.Conv2d(3, 8, 1), fuse(TorchvisionSE(8, 2)), fuse_by_name(NvidiaSE(8, 2))).eval()
    plain = unfuse(copy.deepcopy(model))
    x = torch.randn(2, 3, 4, 4)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        traced = torch.jit.trace(model, x, check_trace=False)
    assert not any("senet_fused" in n.kind() for n in traced.inlined_graph.nodes())
    torch.testing.assert_close(traced(x), plain(x))
    tangent = torch.randn_like(x)
    torch.testing.assert_close(torch.func.jvp(model, (x,), (tangent,)), torch.func.jvp(plain, (x,), (tangent,)))
    torch.testing.assert_close(torch.func.vmap(model)(x[None]), plain(x)[None])
    assert senet_fused.call_counts() == {}
    graph = torch.fx.symbolic_trace(model[:2])
    assert [n.target for n in graph.graph.nodes if n.op == "call_function"] == [senet_fused.squeeze_excite]
    torch.testing.assert_close(graph(x), plain[:2](x))
    assert ran() == 1
    torch.testing.assert_close(torch.fx.symbolic_trace(model)(x), plain(x))


def test_torchscript_says_what_to_do():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        with pytest.raises(RuntimeError, match="unfuse"):
            torch.jit.script(fuse(TorchvisionSE(8, 2)))
        torch.jit.script(unfuse(fuse(TorchvisionSE(8, 2))))


# ---------------------------------------------------------------------------------- copies and files


@pytest.mark.parametrize("name", LAYERS)
def test_copies_and_pickles(name):
    make, _, _, dimensions = LAYERS[name]
    layer = fuse(make(), backend="reference")
    x = draw(layer, dimensions, dtype=torch.float32).detach()
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer)), copy.copy(layer)):
        assert type(other) is type(layer) and vars(other).keys() == vars(layer).keys()
        assert fuse_report(other).layers == fuse_report(layer).layers
        senet_fused.reset_call_counts()
        assert torch.equal(other(x), layer(x)) and ran() == 2
    other = copy.deepcopy(layer)
    other.get_parameter(next(iter(dict(layer.named_parameters())))).data.zero_()
    assert all(p.any() for p in layer.parameters())
    assert type(unfuse(other)) is type(unfuse(layer))


@pytest.mark.processes
def test_a_file_for_another_process(tmp_path):
    model, x = fuse_by_name(Network()).eval(), torch.randn(2, 3, 5, 5)
    torch.save((model, x, model(x)), tmp_path / "model.pt")
    code = f"""
import sys, torch
sys.path.insert(0, {str(HERE)!r})
model, x, y = torch.load({str(tmp_path / "model.pt")!r}, weights_only=False)
import senet_fused
assert senet_fused.fuse_report(model).count("fused") == {fuse_report(model).count("fused")}
assert torch.equal(model(x), y), (model(x) - y).abs().max()
print(sorted(senet_fused.call_counts().items()))
assert type(senet_fused.unfuse(model).gate).__name__ == "NvidiaSE"
"""
    environment = {**os.environ, "PYTHONPATH": str(Path(senet_fused.__file__).resolve().parent.parent)}
    result = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=120, cwd=tmp_path
    )
    assert result.returncode == 0, result.stderr
    if BACKEND == "cpu":
        assert result.stdout.split() == ["[('cpu.forward',", "7)]"]


def test_state_dicts_go_both_ways():
    plain, fused = Network(), fuse(Network())
    assert fused.load_state_dict(plain.state_dict()) == plain.load_state_dict(fused.state_dict())
    file = io.BytesIO()
    torch.save(fused.state_dict(), file)
    file.seek(0)
    plain.load_state_dict(torch.load(file, weights_only=True))


def test_unfuse_refuses_what_it_cannot_undo():
    model = fuse(nn.Sequential(TutorialSE(8, 2), TorchvisionSE(8, 2)))
    model[1].__class__ = type("Sharded", (type(model[1]),), {})
    before = [type(m) for m in model]
    with pytest.raises(RuntimeError, match="changed to Sharded by something else"):
        unfuse(model)
    assert [type(m) for m in model] == before


# ---------------------------------------------------------------------------------- torch.compile, torch.export


@pytest.mark.compiler
@compiled_only
@pytest.mark.parametrize(("backend", "layers"), [("cpu", 7), ("auto", 0)])
def test_compiled_without_a_break(backend, layers):
    model, x = fuse(Network()).eval(), torch.randn(2, 3, 6, 6)
    compiled = torch.compile(model, fullgraph=True)
    with use_backend(backend):
        y = compiled(x)
    assert ran() == layers
    y.sum().backward()
    assert senet_fused.call_counts().get("cpu.backward", 0) == layers
    torch.testing.assert_close(y, unfuse(model)(x))


@pytest.fixture
def named():
    with use_backend("cpu"):
        yield


@pytest.mark.compiler
@compiled_only
def test_fusing_a_compiled_model_compiles_it_again(named):
    model, x = Network().eval(), torch.randn(2, 3, 6, 6)
    compiled = torch.compile(model, fullgraph=True)
    y = compiled(x)
    assert ran() == 1
    fuse(compiled)
    torch.testing.assert_close(compiled(x), y)
    assert ran() == 1 + 7
    unfuse(compiled)
    torch.testing.assert_close(compiled(x), y)
    assert ran() == 1 + 7 + 1


def test_auto_compiles_the_graph_of_the_original():
    """An operator of ours would keep the compiler from fusing the layer with its neighbours."""
    graphs = []

    def keep(graph, _):
        graphs.append([str(node.target) for node in graph.graph.nodes if node.op.startswith("call")])
        return graph

    layer, x = TutorialSE(8, 2), torch.randn(2, 8, 3, 3)
    for model in (layer, fuse(copy.deepcopy(layer))):
        torch.compile(model, backend=keep, fullgraph=True)(x)
    assert graphs[0] == graphs[1] and len(graphs[0]) > 4


@pytest.mark.compiler
@compiled_only
@pytest.mark.parametrize("strict", [True, False])
def test_export(strict):
    model, x = fuse(Network()).eval(), torch.randn(2, 3, 6, 6)
    for backend, layers in (("auto", 0), ("cpu", 7)):
        with use_backend(backend):
            program = torch.export.export(model, (x,), strict=strict)
        assert sum("senet_fused" in str(node.target) for node in program.graph.nodes) == layers
        torch.testing.assert_close(program.module()(x), model(x))
