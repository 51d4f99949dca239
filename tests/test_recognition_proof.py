"""The proof: layers that look like SE layers and are none are left, however narrow; those that are ones are fused.

With one hidden unit, or two, a dead unit hides what is squeezed: the wrong layers here differ from an SE layer in the
squeeze, in an activation on one side of zero or far away, in a gate's tails, or for planes of some sizes alone.
"""

from __future__ import annotations

import copy
import re

import pytest
import torch
from peer_blocks import LegacyBottleneck
from peer_layers import LegacySE, MaxPooled, TimmSEModule, TorchvisionSE, TutorialSE
from torch import nn
from torch.nn import functional as F

import senet_fused
from senet_fused import FusedSE, fuse, fuse_report

compiled_only = pytest.mark.skipif(
    senet_fused.explain(torch.empty(0)).backend == "reference", reason="without compiled code the original forward runs"
)
SIZES = [(16, 1), (32, 1), (64, 1), (64, 4), (8, 2)]
WINDOW = 40
S = (2, 3)


class Odd(LegacySE):
    """An SE layer with one of its steps replaced."""

    def __init__(self, channels, reduced):
        super().__init__(channels, channels // reduced)

    def squeeze(self, x):
        return x.mean(S, keepdim=True)

    def act(self, h):
        return self.relu(h)

    def gate(self, logit):
        return self.sigmoid(logit)

    def forward(self, x):
        return x * self.gate(self.fc2(self.act(self.fc1(self.squeeze(x)))))


def odd(name, *, attributes=(), **steps):
    """A subclass of Odd with other steps, and attributes of its own."""

    def init(self, channels, reduced):
        Odd.__init__(self, channels, reduced)
        for key, value in attributes:
            setattr(self, key, value)

    return type(f"{name}SE", (Odd,), {"__init__": init, "__module__": __name__, **steps})


def windowed(self, x, size=None):
    size = self.size if size is None else size
    local = F.avg_pool2d(x, (min(size, x.shape[2]), min(size, x.shape[3])), stride=1)
    return F.interpolate(local, x.shape[2:])


def only_in_training(other):
    return lambda self, h: other(h) if self.training else F.relu(h)


WRONG = [
    odd("Std", squeeze=lambda self, x: x.mean(S, keepdim=True) + x.std(S, correction=0, keepdim=True)),
    odd("StdAlone", squeeze=lambda self, x: x.std(S, correction=0, keepdim=True)),
    odd("Abs", squeeze=lambda self, x: x.abs().mean(S, keepdim=True)),
    odd("Lp", squeeze=lambda self, x: x.abs().pow(3).mean(S, keepdim=True).pow(1 / 3)),
    odd("Relu", squeeze=lambda self, x: x.relu().mean(S, keepdim=True)),
    odd("Median", squeeze=lambda self, x: x.flatten(2).median(2).values[:, :, None, None]),
    odd("Min", squeeze=lambda self, x: x.amin(S, keepdim=True)),
    odd("LogSumExp", squeeze=lambda self, x: x.logsumexp(S, keepdim=True)),
    odd("Clipped", squeeze=lambda self, x: x.clamp(-20, 20).mean(S, keepdim=True)),
    odd("ClippedAtHalf", squeeze=lambda self, x: x.clamp(-65504, 65504).mean(S, keepdim=True)),
    odd("Normalised", squeeze=lambda self, x: F.layer_norm(x.mean(S, keepdim=True), (x.shape[1], 1, 1))),
    odd("Strided", squeeze=lambda self, x: x[:, :, ::2, ::2].mean(S, keepdim=True)),
    odd("Cropped", squeeze=lambda self, x: x[:, :, : max(1, x.shape[2] // 2 * 2)].mean(S, keepdim=True)),
    odd("OddPlanes", squeeze=lambda self, x: x[..., : x.shape[-1] - (x.shape[-1] % 2 == 0)].mean(S, keepdim=True)),
    odd("Batch", squeeze=lambda self, x: x.mean(S, keepdim=True) - 0.1 * x.mean((0, *S), keepdim=True)),
    odd("Windowed", attributes=[("size", WINDOW)], squeeze=windowed),
    odd("WindowInATuple", attributes=[("sizes", (1, (WINDOW,)))], squeeze=lambda s, x: windowed(s, x, s.sizes[1][0])),
    odd("WindowOfTheClass", squeeze=windowed, size=WINDOW),
    odd("WindowInTheCode", squeeze=lambda self, x: windowed(self, x, 40)),
    odd("WindowOfTheModule", squeeze=lambda self, x: windowed(self, x, WINDOW)),
    odd("WindowInAClosure", squeeze=(lambda size: lambda self, x: windowed(self, x, size))(WINDOW)),
    odd("WindowTooLarge", attributes=[("size", 10**8)], squeeze=windowed),
    odd("Leaky", act=lambda self, h: F.leaky_relu(h, 1e-3)),
    odd("LeakyFarAway", act=lambda self, h: F.relu(h) + 0.1 * (h + 50).clamp(max=0)),
    odd("Relu6", act=lambda self, h: F.relu6(h)),
    odd("ClampedAt100", act=lambda self, h: h.clamp(0, 100)),
    odd("Threshold", act=lambda self, h: F.threshold(h, 0.05, 0)),
    odd("ShiftedRelu", act=lambda self, h: F.relu(h + 1e-4)),
    odd("AbsAct", act=lambda self, h: h.abs()),
    odd("Softplus", act=lambda self, h: F.softplus(h, beta=50)),
    odd("Elu", act=lambda self, h: F.elu(h, 0.01)),
    odd("TrainedDifferently", act=only_in_training(lambda h: F.leaky_relu(h, 0.01))),
    odd("Harder", gate=lambda self, logit: F.hardtanh(logit / 6 + 0.49, 0, 1)),
    odd("CutTails", gate=lambda self, logit: torch.sigmoid(logit.clamp(-8, 8))),
    odd("CutOneTail", gate=lambda self, logit: torch.sigmoid(logit).clamp_min(1e-4)),
    odd("Tempered", gate=lambda self, logit: torch.sigmoid(1.001 * logit)),
    odd("Softmax", gate=lambda self, logit: logit.softmax(1)),
    odd("Saturated", gate=lambda self, logit: torch.where(logit > 5, 1, torch.sigmoid(logit))),
    odd("StraightThrough", gate=lambda self, logit: (torch.sigmoid(logit) - logit).detach() + logit),
    odd("OneHalfIsIgnored", gate=lambda self, logit: torch.cat((logit.chunk(2, 1)[0].sigmoid(),) * 2, 1)),
    odd("LowPrecision", gate=lambda s, logit: torch.sigmoid(logit if logit.dtype == torch.float64 else 2 * logit)),
    odd("Clamped", forward=lambda self, x: Odd.forward(self, x).clamp(-1000, 1000)),
    odd("Extra", forward=lambda self, x: Odd.forward(self, x) + 1e-4 * x),
    odd("Bigger", forward=lambda s, x: Odd.forward(s, x) if x.shape[-1] < 20 else x),
]


def left(layer):
    with pytest.warns(UserWarning, match="nothing was fused.* SE layer: 1 left; the model: "):
        fused = fuse(copy.deepcopy(layer))
    assert type(fused) is type(layer)
    return fused


@pytest.mark.parametrize("sizes", SIZES, ids=str)
@pytest.mark.parametrize("kind", WRONG, ids=lambda kind: kind.__name__)
def test_what_is_no_se_layer_is_left(kind, sizes):
    layer = kind(*sizes)
    layer.fc1.weight.data.abs_()
    fused = left(layer)
    x = torch.randn(3, sizes[0], 12, 50)
    assert torch.equal(fused(x), layer(x))


def test_from_module_and_tails_share_the_proof():
    with pytest.raises(ValueError, match="StdSE is not understood as an SE layer: its output looks like"):
        FusedSE.from_module(WRONG[0](16, 1))
    block = LegacyBottleneck(planes=4, se=WRONG[0](16, 1))
    with pytest.warns(UserWarning, match="nothing was fused"):
        assert type(fuse(block, tails=True)) is LegacyBottleneck
    with pytest.raises(ValueError, match="StdSE. cannot be part of a tail"):
        senet_fused.FusedSETail(nn.BatchNorm2d(16), WRONG[0](16, 1))


class OtherExtra(Odd):
    """An SE layer where there is one hidden unit alone: what is added is nothing then."""

    def act(self, h):
        return F.relu(h) + (h - h.mean(1, keepdim=True))


RIGHT = {
    "legacy": lambda c, r: LegacySE(c, c // r),
    "tutorial": lambda c, r: TutorialSE(c, c // r),
    "torchvision": TorchvisionSE,
    "torchvision_silu": lambda c, r: TorchvisionSE(c, r, nn.SiLU, nn.Hardsigmoid),
    "torchvision_leaky": lambda c, r: TorchvisionSE(c, r, lambda: nn.LeakyReLU(0.1), nn.Tanh),
    "torchvision_relu6": lambda c, r: TorchvisionSE(c, r, nn.ReLU6),
    "identity_gate": lambda c, r: TorchvisionSE(c, r, nn.GELU, nn.Identity),
    "timm_maximum": lambda c, r: TimmSEModule(c, r, add_maxpool=True),
    "maximum_by_structure": MaxPooled,
    "in_steps": Odd,
    "another_gate": odd("Hard", gate=lambda self, logit: F.hardsigmoid(logit)),
    "with_a_number": odd("WithANumber", attributes=[("channels", 16), ("flops", 10**9)]),
    "with_a_whole_plane": odd("WholePlane", squeeze=lambda self, x: F.avg_pool2d(x, x.shape[2:])),
}


@compiled_only
@pytest.mark.parametrize("sizes", [(16, 1), (64, 1), (32, 2), (8, 2), (64, 4), (1, 1)], ids=str)
@pytest.mark.parametrize("name", RIGHT)
def test_se_layers_are_fused_however_narrow(name, sizes):
    torch.manual_seed(0)
    layer = RIGHT[name](*sizes).double()
    fused = fuse(copy.deepcopy(layer))
    assert [row.status for row in fuse_report(fused)] == ["fused"], str(fuse_report(fused))
    for scale in (1, 100):
        x = scale * torch.randn(3, sizes[0], 9, 44, dtype=torch.float64)
        torch.testing.assert_close(fused(x), layer(x), rtol=1e-6, atol=1e-6 * scale)
    assert senet_fused.call_counts() == {"cpu.forward": 2}


@compiled_only
def test_what_is_an_se_layer_with_one_hidden_unit_alone():
    assert fuse_report(fuse(OtherExtra(16, 1))).count("fused") == 1
    left(OtherExtra(16, 2))


def test_layers_of_one_structure_need_one_proof():
    """They differ by their numbers alone; another setting is another structure."""
    calls = []

    class Counted(TorchvisionSE):
        def __deepcopy__(self, memo):
            calls.append(self)
            other = TorchvisionSE.__new__(type(self))
            memo[id(self)] = other
            vars(other).update(copy.deepcopy(vars(self), memo))
            return other

    model = nn.Sequential(*(Counted(8, 2) for _ in range(5)), Counted(8, 4), Counted(8, 2, lambda: nn.ReLU(True)))
    fuse(model)
    assert fuse_report(model).count("fused") == 7
    assert calls == [model[0], model[5], model[6]]
    model[1].fc1.register_forward_hook(lambda *_: None)
    with pytest.warns(UserWarning, match="capture_gates"), senet_fused.capture_gates(model[1]):
        model[1](torch.randn(1, 8, 2, 2))


class Clamping(LegacyBottleneck):
    """As networks do that are to run in float16."""

    def forward(self, x):
        return super().forward(x).clamp(max=65504)


class NotANumber(LegacyBottleneck):
    def forward(self, x):
        return super().forward(x).nan_to_num()


class ByWindows(LegacyBottleneck):
    """Its SE layer sees windows of a size, which are whole planes where those are smaller."""

    size = 16

    def forward(self, x):
        rows = [super(ByWindows, self).forward(part) for part in x.split(self.size, 2)]
        return torch.cat(rows, 2)


class OtherSqueeze(LegacyBottleneck):
    """With the parts of its SE layer, but not as that would use them."""

    def forward(self, x):
        y = self.relu(self.bn1(self.conv1(x)))
        y = self.relu(self.bn2(self.conv2(y)))
        y, se = self.bn3(self.conv3(y)), self.se_module
        pooled = y.std(S, correction=0, keepdim=True)
        y = y * se.sigmoid(se.fc2(se.relu(se.fc1(pooled))))
        return self.relu(y + (x if self.downsample is None else self.downsample(x)))


@compiled_only
@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        (Clamping, "of very large values its output differs"),
        (NotANumber, "does something about NaN"),
        (ByWindows, r"for an input \[2, 16, 33, 6\] its output differs"),
        (OtherSqueeze, "differs from the known forward's"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_blocks_that_only_look_like_known_ones(kind, reason):
    block = kind(16, 4, se=LegacySE(16, 16)).double().eval()
    stock, x = copy.deepcopy(block), 1e5 * torch.randn(2, 16, 40, 8, dtype=torch.float64)
    with pytest.warns(UserWarning, match="no block runs with tails"):
        fuse(block, tails=True)
    (row,) = fuse_report(block, tails=True).blocks
    assert row.status == "left"
    assert re.search(reason, row.reason), row.reason
    torch.testing.assert_close(block(x), stock(x))


@compiled_only
def test_blocks_with_one_hidden_unit_run_with_tails():
    block = LegacyBottleneck(16, 4, se=LegacySE(16, 16))
    fuse(block, tails=True)
    assert fuse_report(block).blocks[0].status == "fused"
