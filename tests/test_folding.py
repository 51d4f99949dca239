"""fold_batchnorm: what is folded, what is left and why, and that the copy computes what the model does."""

from __future__ import annotations

import copy
import operator
import os
import pickle
import subprocess
import sys
import warnings

import pytest
import torch
from peer_blocks import DropPath, LegacyBasicBlock, LegacyBottleneck, MonaiBlock, TimmBasicBlock, TimmBottleneck
from peer_layers import LegacySE, MonaiSE, NvidiaSE, TimmSEModule, TutorialSE
from torch import nn
from torch.nn import functional as F

import senet_fused
from senet_fused import fold_batchnorm, modules
from senet_fused.fusion.fold import ShortcutSE

HAS_KERNELS = senet_fused.explain(torch.empty(0)).backend != "reference"
BACKEND = "cpu" if HAS_KERNELS else "reference"


def prepared(model, *, seed=0):
    """In float64 and evaluation mode, with random statistics, weights and biases of its norms."""
    generator = torch.Generator().manual_seed(seed)
    model = model.double().eval()
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                for t in (module.running_mean, module.weight, module.bias):
                    if t is not None:
                        t.copy_(torch.randn(t.shape, generator=generator))
                if module.running_var is not None:
                    module.running_var.copy_(torch.rand(module.running_var.shape, generator=generator) + 0.5)
    return model


def image(channels=12, *planes, seed=1, batch=2):
    shape = (batch, channels, *(planes or (8, 6)))
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def run(model, x):
    with torch.no_grad():
        return model(x.clone())


def assert_same(folded, model, x, bound=1e-12):
    ours, theirs = run(folded, x), run(model, x)
    assert ours.shape == theirs.shape and theirs.abs().max() > 0
    assert ((ours - theirs).abs().max() / theirs.abs().max()).item() < bound


def norms_in(model):
    return sum(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in model.modules())


def functions_in(folded):
    return [node.target for node in folded.graph.nodes if node.op in ("call_function", "call_method")]


@pytest.fixture
def asked(monkeypatch):
    """(whether there is a residual, post_act) of every call of a FusedSE."""
    calls, real = [], modules.serve

    def serve(call, *others):
        calls.append((call.residual is not None, call.post_act))
        return real(call, *others)

    monkeypatch.setattr(modules, "serve", serve)
    return calls


# ------------------------------------------------------------------------------------------------------ blocks

BLOCKS = {
    "legacy": (lambda: LegacyBottleneck(), image(), 4),
    "legacy, stride": (lambda: LegacyBottleneck(stride=2), image(), 4),
    "legacy, no downsample": (lambda: LegacyBottleneck(32), image(32), 3),
    "legacy, basic": (lambda: LegacyBasicBlock(), image(8), 2),
    "legacy, tutorial layer": (lambda: LegacyBottleneck(se=TutorialSE(32, 4)), image(), 4),
    "timm": (lambda: TimmBottleneck(), image(), 4),
    "timm, maximum": (lambda: TimmBottleneck(se=lambda c, r: TimmSEModule(c, r, add_maxpool=True)), image(), 4),
    "timm, everything": (lambda: TimmBottleneck(stride=2, aa=True, drop_path=DropPath()), image(), 4),
    "timm, basic": (lambda: TimmBasicBlock(), image(8), 2),
    "MONAI 1-D": (lambda: MonaiBlock(1), image(12, 9), 4),
    "MONAI 3-D": (lambda: MonaiBlock(3), image(12, 4, 3, 5), 4),
}


@pytest.mark.parametrize("name", BLOCKS)
def test_a_block_is_convolutions_and_one_operator(name, asked):
    make, x, norms = BLOCKS[name]
    block = prepared(make())
    folded = fold_batchnorm(block, backend=BACKEND)
    assert norms_in(block) == len(folded.folding.folded) == norms and norms_in(folded) == 0
    (se,) = folded.folding.joined
    assert folded.folding.left == () and type(folded.get_submodule(se)) is ShortcutSE
    assert not set(functions_in(folded)) & {operator.add, operator.iadd}
    senet_fused.reset_call_counts()
    assert_same(folded, block, x)
    assert senet_fused.call_counts() == {f"{BACKEND}.forward": 1} and asked == [(True, "relu")]


@pytest.mark.parametrize("name", BLOCKS)
def test_without_fuse_layers_stay_and_can_be_fused_later(name, asked):
    make, x, norms = BLOCKS[name]
    block = prepared(make())
    folded = fold_batchnorm(block, fuse=False)
    assert len(folded.folding.folded) == norms and folded.folding.joined == ()
    senet_fused.reset_call_counts()
    assert_same(folded, block, x)
    assert senet_fused.call_counts() == {}
    assert senet_fused.fuse(folded, backend=BACKEND) is folded
    assert_same(folded, block, x)
    assert senet_fused.call_counts() == {f"{BACKEND}.forward": 1} and asked == []


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_other_dtypes_and_layouts(dtype):
    block = prepared(nn.Sequential(LegacyBottleneck(), LegacyBottleneck(32)))
    x = image()
    expected = run(block, x)
    block, x = block.to(dtype, memory_format=torch.channels_last), x.to(dtype, memory_format=torch.channels_last)
    folded = fold_batchnorm(block, backend=BACKEND)
    weight = folded.get_submodule("0.conv2").weight
    assert weight.dtype == dtype and weight.is_contiguous(memory_format=torch.channels_last)
    y, theirs = run(folded, x), run(block, x)
    assert y.dtype == dtype and y.is_contiguous(memory_format=torch.channels_last)
    ours, stock = ((t.double() - expected).abs().max() / expected.abs().max() for t in (y, theirs))
    assert ours <= 2 * stock + torch.finfo(dtype).eps


def test_a_model_in_training_mode_and_the_original_untouched():
    block = prepared(nn.Sequential(LegacyBottleneck(), nn.Dropout(0.5), TimmBottleneck(32))).train()
    before, classes = copy.deepcopy(block.state_dict()), [type(m) for m in block.modules()]
    folded = fold_batchnorm(block, backend=BACKEND)
    assert [type(m) for m in block.modules()] == classes and all(module.training for module in block.modules())
    assert all(torch.equal(value, before[key]) for key, value in block.state_dict().items())
    assert not any(module.training for module in folded.modules())
    assert not {t.data_ptr() for t in folded.parameters()} & {t.data_ptr() for t in block.parameters()}
    assert_same(folded, block.eval(), image())
    assert not any(isinstance(module, nn.Dropout) for module in folded.modules())


def test_a_fused_model_and_one_with_tails(asked):
    for tails in (False, True):
        block = prepared(nn.Sequential(LegacyBottleneck(), LegacyBottleneck(32)))
        fused = senet_fused.fuse(copy.deepcopy(block), tails=tails)
        folded = fold_batchnorm(fused, backend=BACKEND)
        assert folded.folding.joined == ("0.se_module", "1.se_module") and len(folded.folding.folded) == 7
        assert_same(folded, block, image())
        assert senet_fused.fuse_report(fused).count("fused") == 2
    assert asked == [(True, "relu")] * 4


def test_our_own_layer_keeps_its_backend():
    block = LegacyBottleneck(se=senet_fused.FusedSE(32, 4, backend="reference"))
    folded = fold_batchnorm(prepared(block))
    assert folded.se_module.backend == "reference" and folded.folding.joined == ("se_module",)
    senet_fused.reset_call_counts()
    assert_same(folded, block, image())


def test_gates_are_captured():
    block = prepared(LegacyBottleneck())
    recorded = []
    for network in (senet_fused.fuse(copy.deepcopy(block), backend=BACKEND), fold_batchnorm(block, backend=BACKEND)):
        with senet_fused.capture_gates(network) as gates:
            run(network, image())
        recorded += gates["se_module"]
    assert [gate.shape for gate in recorded] == [(2, 32)] * 2
    assert (recorded[0] - recorded[1]).abs().max() < 1e-12


# ------------------------------------------------------------------------------------------------ convolutions


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize(
    "make",
    [
        lambda b: nn.Conv1d(6, 8, 3, bias=b),
        lambda b: nn.Conv2d(6, 8, 3, 2, 1, padding_mode="reflect", bias=b),
        lambda b: nn.Conv2d(6, 9, 3, dilation=2, padding=2, groups=3, bias=b),
        lambda b: nn.Conv2d(6, 6, 3, groups=6, bias=b),
        lambda b: nn.Conv3d(6, 8, (1, 2, 1), groups=2, bias=b),
        lambda b: nn.ConvTranspose1d(6, 8, 3, 2, bias=b),
        lambda b: nn.ConvTranspose2d(6, 8, 3, 2, 1, output_padding=1, bias=b),
        lambda b: nn.ConvTranspose2d(6, 9, 3, 2, groups=3, bias=b),
        lambda b: nn.ConvTranspose3d(6, 4, 2, groups=2, bias=b),
    ],
)
def test_every_kind_of_convolution(make, affine, bias):
    conv = make(bias)
    dimensions = conv.weight.dim() - 2
    norm = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)[dimensions - 1](conv.out_channels, affine=affine, eps=0.1)
    model = prepared(nn.Sequential(conv, norm))
    folded = fold_batchnorm(model)
    assert folded.folding.folded == ("0",) and type(folded.get_submodule("0")) is type(conv)
    assert list(folded.state_dict()) == ["0.weight", "0.bias"]
    assert_same(folded, model, image(6, *(7, 6, 5)[:dimensions]))


def test_half_precision_weights_are_multiplied_in_double():
    model = nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)).bfloat16().eval()
    model[1].running_var.fill_(3.0)
    folded = fold_batchnorm(model)
    exact = model[0].weight.double() / (3.0 + model[1].eps) ** 0.5
    assert torch.equal(folded.get_submodule("0").weight, exact.bfloat16())


def test_synchronised_and_subclassed_norms():
    """A subclass that calls F.batch_norm itself, as timm's with an activation behind."""

    class NormAct(nn.BatchNorm2d):
        def forward(self, x):
            torch._assert(x.ndim == 4, f"expected 4D input (got {x.ndim}D input)")
            training = self.training or self.running_mean is None
            x = F.batch_norm(
                x, self.running_mean, self.running_var, self.weight, self.bias, training, self.momentum, self.eps
            )
            return F.silu(x)

    model = prepared(nn.Sequential(nn.Conv2d(3, 4, 1), NormAct(4), nn.Conv2d(4, 5, 1), nn.SyncBatchNorm(5)))
    folded = fold_batchnorm(model)
    assert folded.folding.folded == ("0", "2") and F.batch_norm not in functions_in(folded)
    plain = nn.BatchNorm2d(5).double().eval()  # SyncBatchNorm's own forward is for GPUs
    plain.load_state_dict(model[3].state_dict())
    assert_same(folded, nn.Sequential(*model[:3], plain), image(3))


def test_requires_grad_is_the_weights():
    model = nn.Sequential(nn.Conv2d(3, 4, 1, bias=False), nn.BatchNorm2d(4))
    model[0].weight.requires_grad_(False)
    conv = fold_batchnorm(model).get_submodule("0")
    assert not conv.weight.requires_grad and conv.bias.requires_grad


# ------------------------------------------------------------------------------------------------ what is left


class Net(nn.Module):
    """Two convolutions and norms, for a forward of its own."""

    def __init__(self):
        super().__init__()
        self.conv, self.bn = nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)
        self.again, self.bn2 = nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)


def net(forward, **changes):
    model = type("Changed", (Net,), {"forward": forward})()
    for name, value in changes.items():
        setattr(model, name, value)
    return prepared(model)


class Standardised(nn.Conv2d):
    def forward(self, x):
        return self._conv_forward(x, self.weight - self.weight.mean(), self.bias)


def used_twice(self, x):
    y = self.conv(x)
    return self.bn(y) + y


LEFT = {
    "output used": (lambda: net(used_twice), "the output of conv is used elsewhere, too"),
    "two norms": (lambda: net(lambda s, x: s.bn(s.conv(x)) + s.bn2(s.conv(x))), "conv is called elsewhere, too"),
    "called alone": (lambda: net(lambda s, x: s.bn(s.conv(s.conv(x)))), "conv is called elsewhere, too"),
    "weight used": (
        lambda: net(lambda s, x: s.bn(s.conv(x)) * s.conv.weight.mean()), "the weight of conv is used elsewhere, too",
    ),
    "first": (lambda: net(lambda s, x: s.conv(s.bn(x))), "there is no convolution in front of it"),
    "subclass": (
        lambda: net(lambda s, x: s.bn(s.conv(x)), conv=Standardised(4, 4, 1)), "conv is a Standardised, or has hooks",
    ),
    "no statistics": (
        lambda: net(lambda s, x: s.bn(s.conv(x)), bn=nn.BatchNorm2d(4, track_running_stats=False)),
        "it normalises by its batch",
    ),
    "no statistics, as a function": (
        lambda: net(lambda s, x: F.batch_norm(s.conv(x), None, None, training=True)), "it normalises by its batch",
    ),
    "computed weight": (
        lambda: net(lambda s, x: F.batch_norm(s.conv(x), s.bn.running_mean, s.bn.running_var, s.bn.weight * 2)),
        "its weight or bias is computed",
    ),
    "instance norm": (
        lambda: net(lambda s, x: s.bn(s.conv(x)), bn=nn.BatchNorm2d(4), conv=nn.Sequential(nn.InstanceNorm2d(4))),
        "there is no convolution in front of it",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", LEFT)
def test_what_cannot_be_folded_stays_and_says_why(name):
    make, reason = LEFT[name]
    model = make()
    folded = fold_batchnorm(model)
    assert folded.folding.folded == () and {why for _, why in folded.folding.left} == {reason}
    assert_same(folded, model, image(4))


def test_a_pair_that_is_called_twice_is_folded_once():
    model = net(lambda s, x: s.bn(s.conv(F.relu(s.bn(s.conv(x))))))
    folded = fold_batchnorm(model)
    assert folded.folding == (("conv",), (), ()) and norms_in(folded) == 0
    assert_same(folded, model, image(4))


@pytest.mark.parametrize("which", ["conv", "bn"])
def test_what_has_hooks_is_called_as_before(which):
    model = net(lambda s, x: s.bn2(s.again(s.bn(s.conv(x)))))
    seen = []
    getattr(model, which).register_forward_hook(lambda module, inputs, y: seen.append(type(module)) or y * 2)
    folded = fold_batchnorm(model)
    assert folded.folding.folded == ("again",) and [name for name, _ in folded.folding.left] == ["bn"]
    assert "has hooks" in folded.folding.left[0][1]
    assert_same(folded, model, image(4))
    assert len(seen) == 2


def test_a_parametrised_convolution_stays():
    model = net(lambda s, x: s.bn(s.conv(x)))
    nn.utils.parametrizations.weight_norm(model.conv)
    folded = fold_batchnorm(model)
    assert folded.folding.left == (("bn", "conv is a ParametrizedConv2d, or has hooks"),)
    assert_same(folded, model, image(4))


def test_a_block_with_hooks_stays_whole_and_its_layer_is_fused():
    model = prepared(nn.Sequential(LegacyBottleneck(), LegacyBottleneck(32)))
    model[1].register_forward_hook(lambda module, inputs, y: y + 1)
    folded = fold_batchnorm(model, backend=BACKEND)
    assert folded.folding.joined == ("0.se_module",) and len(folded.folding.folded) == 4 and norms_in(folded) == 3
    assert senet_fused.fuse_report(folded).count("fused") == 2
    assert_same(folded, model, image())


def test_a_convolution_within_a_module_with_hooks_stays():
    def forward(self, x):
        return self.bn(self.inner[0](x)) + self.inner(x)

    model = net(forward, inner=nn.Sequential(nn.Conv2d(4, 4, 1), nn.ReLU()))
    model.inner.register_forward_hook(lambda module, inputs, y: y * 3)
    folded = fold_batchnorm(model)
    assert folded.folding.left == (("bn", "inner.0 is called elsewhere, too"),)
    assert_same(folded, model, image(4))


# ----------------------------------------------------------------------------------- SE -> + shortcut -> ReLU


class Tail(nn.Module):
    def __init__(self, channels=8):
        super().__init__()
        self.conv, self.se, self.relu = nn.Conv2d(channels, channels, 1), LegacySE(channels, 2), nn.ReLU(inplace=True)


def tail(forward, **changes):
    model = type("Changed", (Tail,), {"forward": forward})()
    for name, value in changes.items():
        setattr(model, name, value)
    return prepared(model)


def adds_in_place(self, x):
    y = self.se(self.conv(x))
    y += x
    return F.relu(y)


def changes_the_shortcut(self, x):
    shortcut = x * 2
    y = self.se(self.conv(x))
    shortcut += y
    return F.relu(shortcut)


def changes_the_input(self, x):
    y = self.conv(x)
    z = self.se(y)
    y.mul_(2)
    return F.relu(z + x)


def changes_the_input_through_an_alias(self, x):
    y = self.conv(x)
    z = self.relu(y)
    a = self.se(z)
    y.mul_(2)
    return torch.relu(a + x)


def changes_the_input_through_a_view(self, x):
    y = self.conv(x)
    a = self.se(y.view(y.shape))
    y += 3
    return torch.relu(a + y)


def uses_the_sum(self, x):
    y = self.se(self.conv(x)) + x
    return F.relu(y) + y


def uses_the_scaled(self, x):
    y = self.se(self.conv(x))
    return F.relu(y + x) + y


JOINED = {
    "+": lambda s, x: s.relu(s.se(s.conv(x)) + x),
    "the other way": lambda s, x: s.relu(x + s.se(s.conv(x))),
    "in place": adds_in_place,
    "functions": lambda s, x: torch.relu(torch.add(s.se(s.conv(x)), x)),
    "methods": lambda s, x: s.se(s.conv(x)).add(x).relu_(),
    "a broadcast shortcut": lambda s, x: F.relu(s.se(s.conv(x)) + x.mean((2, 3), keepdim=True)),
    "a broadcast layer": lambda s, x: F.relu(s.se(s.conv(x).mean((2, 3), keepdim=True)) + x),
}
APART = {
    "two calls": lambda s, x: s.relu(s.se(s.se(s.conv(x))) + x),
    "no ReLU": lambda s, x: s.se(s.conv(x)) + x,
    "ReLU6": lambda s, x: F.relu6(s.se(s.conv(x)) + x),
    "alpha": lambda s, x: F.relu(torch.add(s.se(s.conv(x)), x, alpha=2)),
    "a number": lambda s, x: F.relu(s.se(s.conv(x)) + 1.0),
    "itself": lambda s, x: (lambda y: F.relu(y + y))(s.se(s.conv(x))),
    "minus": lambda s, x: F.relu(s.se(s.conv(x)) - x),
    "changes the shortcut": changes_the_shortcut,
    "changes the input": changes_the_input,
    "changes the input through an alias": changes_the_input_through_an_alias,
    "changes the input through a view": changes_the_input_through_a_view,
    "uses the sum": uses_the_sum,
    "uses the scaled": uses_the_scaled,
}


@pytest.mark.parametrize("name", JOINED)
def test_what_is_one_operator(name, asked):
    model = tail(JOINED[name])
    folded = fold_batchnorm(model, backend=BACKEND)
    assert folded.folding.joined == ("se",)
    assert_same(folded, model, image(8))
    assert asked == [(True, "relu")]


def larger(self, x):
    return self.relu(self.se(self.conv(x)) + x[None])


def a_size(self, x):
    return self.relu(self.se(self.conv(x)) + x.size(0))


@pytest.mark.parametrize("forward", [larger, a_size])
def test_what_is_no_shortcut_is_added_as_pytorch_does(forward):
    model = tail(forward)
    assert_same(fold_batchnorm(model, backend=BACKEND), model, image(8))


def test_a_number_of_another_dtype_leaves_the_dtype():
    model = tail(lambda s, x: F.relu(s.se(s.conv(x)) + s.z), z=torch.tensor(0.5)).bfloat16()
    model.z = model.z.float()
    folded = fold_batchnorm(model, backend=BACKEND)
    assert folded(image(8).bfloat16()).dtype == model(image(8).bfloat16()).dtype == torch.bfloat16


def powers(self, x):
    y = self.bn(self.conv(x))
    z = y
    y **= 2
    return z


def divides(self, x):
    y = self.bn(self.conv(x))
    z = y
    y //= 0.5
    return z


@pytest.mark.parametrize("forward", [powers, divides])
def test_operators_that_write_still_do(forward):
    model = net(forward)
    assert_same(fold_batchnorm(model), model, image(4))


def test_an_input_named_like_an_argument_with_a_default_stays():
    model = net(lambda s, x_rgb, x=None: s.bn(s.conv(x_rgb)))
    assert_same(fold_batchnorm(model), model, image(4))


@pytest.mark.parametrize("name", APART)
def test_what_is_not_is_fused_by_itself(name, asked):
    model = tail(APART[name])
    folded = fold_batchnorm(model, backend=BACKEND)
    assert folded.folding.joined == ()
    senet_fused.reset_call_counts()
    assert_same(folded, model, image(8))
    assert set(senet_fused.call_counts()) == {f"{BACKEND}.forward"} and asked == []


def test_layers_that_cannot_take_a_shortcut_are_fused_by_themselves():
    adding = tail(JOINED["+"], se=MonaiSE(2, 8, add_residual=True))
    hooked = tail(JOINED["+"])
    hooked.se.register_forward_hook(lambda module, inputs, y: y * 2)
    rectified = tail(JOINED["+"], se=senet_fused.FusedSE(8, 2, post_act="relu"))
    act = tail(JOINED["+"])
    act.relu.register_forward_hook(lambda module, inputs, y: y * 2)
    for model in (adding, hooked, rectified, act):
        folded = fold_batchnorm(model, backend=BACKEND)
        assert folded.folding.joined == () and senet_fused.fuse_report(folded).count("fused") == 1
        assert_same(folded, model, image(8))


def test_a_gate_is_left_to_its_caller():
    model = tail(lambda s, x: (lambda y: F.relu(y * s.se(y) + x))(s.conv(x)), se=NvidiaSE(8, 2))
    folded = fold_batchnorm(model, backend=BACKEND)
    assert folded.folding.joined == () and senet_fused.fuse_report(folded).count("fused") == 1
    assert_same(folded, model, image(8))


def wide_in_place(self, x):
    y = self.se(self.conv(x))
    y += x.float()
    return F.relu(y)


@pytest.mark.parametrize(
    ("forward", "dtype"),
    [(lambda s, x: F.relu(s.se(s.conv(x)) + x.float()), torch.float32), (wide_in_place, torch.bfloat16)],
)
def test_the_dtype_is_the_additions(forward, dtype):
    model, x = tail(forward).bfloat16(), image(8).bfloat16()
    folded = fold_batchnorm(model, backend=BACKEND)
    assert folded.folding.joined == ("se",)
    y, expected = run(folded, x), run(model, x)
    assert y.dtype == expected.dtype == dtype
    assert (y - expected).abs().max() <= 2**-6 * expected.abs().max()


# ---------------------------------------------------------------------------- copies, processes, torch.compile


@pytest.fixture(scope="module")
def folded_pair():
    model = prepared(nn.Sequential(LegacyBottleneck(), TimmBottleneck(32), TutorialSE(32, 4)))
    return model, fold_batchnorm(model, backend=BACKEND)


def test_copies_and_pickles(folded_pair, tmp_path):
    model, folded = folded_pair
    expected = run(folded, image())
    for again in (copy.deepcopy(folded), pickle.loads(pickle.dumps(folded)), copy.deepcopy(copy.deepcopy(folded))):
        senet_fused.reset_call_counts()
        assert torch.equal(run(again, image()), expected)
        assert senet_fused.call_counts() == {f"{BACKEND}.forward": 3}
        assert again.folding == folded.folding and type(again).__name__ == "Sequential"
        assert not any(module.training for module in again.modules())
        assert list(again.state_dict()) == list(folded.state_dict())
        with pytest.raises(RuntimeError, match="for inference"):
            again.train()
    file = tmp_path / "folded.pt"
    torch.save((folded, image(), expected), file)
    code = """
import sys, torch
folded, x, expected = torch.load(sys.argv[1], weights_only=False)
with torch.no_grad():
    assert torch.equal(folded(x), expected)
import senet_fused
print(senet_fused.call_counts(), folded.folding.joined)
"""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    command = [sys.executable, "-c", code, str(file)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == str({f"{BACKEND}.forward": 3}) + " ('0.se_module', '1.se')"


def test_training_mode_is_refused_and_evaluation_mode_is_not(folded_pair):
    _, folded = folded_pair
    assert folded.eval() is folded and folded.train(False) is folded
    with pytest.raises(RuntimeError, match="train the model that it was made of"):
        folded.train()
    with pytest.raises(RuntimeError, match="train the model that it was made of"):
        nn.Sequential(folded).train()
    assert not any(module.training for module in folded.modules())


def test_one_graph_of_torch_compile(folded_pair):
    model, folded = folded_pair
    for backend, counts in ((BACKEND, {f"{BACKEND}.forward": 3} if HAS_KERNELS else {}), (None, None)):
        again = fold_batchnorm(model, backend=backend)
        torch._dynamo.reset()
        compiled = torch.compile(again, fullgraph=True, backend="aot_eager")
        senet_fused.reset_call_counts()
        assert_same(compiled, model, image())
        if counts is not None:
            assert senet_fused.call_counts() == counts
    program = torch.export.export(folded, (image(),)).module()
    assert_same(program, model, image())


def test_gradients_of_the_input(folded_pair):
    model, folded = folded_pair
    grads = []
    for network in (model, folded):
        x = image().requires_grad_()
        y = network(x * 1)
        y.backward(torch.randn(y.shape, generator=torch.Generator().manual_seed(3), dtype=y.dtype))
        grads.append(x.grad)
    assert (grads[0] - grads[1]).norm() < 1e-10 * grads[0].norm()


def test_it_moves_and_can_be_folded_again(folded_pair):
    model, folded = folded_pair
    y = run(copy.deepcopy(folded).float().to(memory_format=torch.channels_last), image().float())
    assert y.dtype == torch.float32
    again = fold_batchnorm(folded, backend=BACKEND)
    assert again.folding == ((), (), ())
    assert_same(again, model, image())


# ----------------------------------------------------------------------------------------------------- refusals


def test_arguments_with_a_default_keep_it():
    class WithOptions(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.bn = nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)

        def forward(self, x, mask=None, features=False, scale=(2.0, 3.0)):
            y = self.bn(self.conv(x)) * scale[0]
            if mask is not None:
                y = y * mask
            return (y, y) if features else y

    model = prepared(WithOptions())
    folded = fold_batchnorm(model)
    for again in (folded, copy.deepcopy(folded), pickle.loads(pickle.dumps(folded))):
        assert_same(again, model, image(4))
        with pytest.raises(TypeError, match="mask"):
            again(image(4), mask=image(4))
    fold_batchnorm(model)  # what was unpickled has left nothing behind


class Decides(nn.Module):
    def forward(self, x):
        return x if x.sum() > 0 else -x


class Stubborn(nn.Module):
    """Whose norm stays in training mode."""

    def __init__(self):
        super().__init__()
        self.conv, self.bn = nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)

    def train(self, mode=True):
        return self

    def forward(self, x):
        return self.bn(self.conv(x))


def hooked():
    model = nn.Sequential(nn.Conv2d(4, 4, 1))
    model.register_forward_hook(lambda *_: None)
    return model


@pytest.mark.parametrize(
    ("make", "options", "error", "message"),
    [
        (lambda: 3, {}, TypeError, "takes a torch.nn.Module, got int"),
        (lambda: torch.compile(nn.ReLU()), {}, TypeError, "fold it before it is compiled"),
        (lambda: torch.jit.script(nn.ReLU()), {}, TypeError, "fold it before it is compiled"),
        (lambda: nn.DataParallel(nn.ReLU()), {}, TypeError, "takes the model inside DataParallel: .*model.module"),
        (hooked, {}, ValueError, "Sequential has hooks"),
        (lambda: nn.ReLU(), {"backend": "gpu"}, ValueError, "gpu"),
        (Decides, {}, ValueError, "cannot trace the model's own forward: .*control flow.*model.part = fold"),
        (lambda: nn.Sequential(nn.ReLU(), nn.Sequential(Decides())), {}, ValueError, r"cannot trace 1\.0 \(Decides\)"),
        (Stubborn, {}, ValueError, "bn is in training mode although"),
    ],
)  # fmt: skip
def test_bad_requests(make, options, error, message):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # TorchScript's deprecation
        model = make()
    with pytest.raises(error, match=message):
        fold_batchnorm(model, **options)


def test_a_model_without_se_layers_warns_of_nothing_and_one_with_odd_ones_does(recwarn):
    folded = fold_batchnorm(prepared(nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))))
    assert folded.folding.folded == ("0",) and not recwarn.list

    class EcaModule(nn.Module):
        """Of efficient channel attention, which fuse does not cover."""

        def __init__(self):
            super().__init__()
            self.conv = nn.Conv1d(1, 1, 3, padding=1, bias=False)

        def forward(self, x):
            y = self.conv(x.mean((2, 3)).unsqueeze(1)).sigmoid()
            return x * y.view(x.shape[0], -1, 1, 1)

    model = prepared(nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), EcaModule()))
    found = len(senet_fused.fuse_report(model))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        folded = fold_batchnorm(model)
    assert [("nothing was fused" in str(one.message)) for one in caught] == [True] * found
    assert_same(folded, model, image(3))
