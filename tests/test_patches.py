"""What is done to classes and models behind a layer's back: other forwards of classes, replicas, FX quantisation."""

from __future__ import annotations

import copy
import pickle
import warnings
from collections import OrderedDict

import pytest
import torch
from peer_blocks import LegacyBottleneck, MonaiBlock
from peer_layers import TimmSEModule, TorchvisionSE, TutorialSE
from torch import nn

import senet_fused
from senet_fused import FusedSE, FusedSETail, capture_gates, fuse, fuse_report, unfuse
from senet_fused.models.layers import Layers

pytestmark = pytest.mark.skipif(
    senet_fused.explain(torch.empty(0)).backend == "reference", reason="without compiled code there is no fused path"
)

C = 12


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def block_tails():
    counts = senet_fused.call_counts()
    return counts.get("cpu.tail_forward", 0)


def doubling(monkeypatch, kind):
    """All modules of a class return twice what they did."""
    forward = kind.forward
    monkeypatch.setattr(kind, "forward", lambda self, x: 2 * forward(self, x))


# ---------------------------------------------------------------------------------- classes of torch.nn


@pytest.mark.parametrize("kind", [nn.Linear, nn.ReLU, nn.Sigmoid, nn.Sequential, nn.AdaptiveAvgPool2d])
def test_a_patched_class_of_a_part_is_noticed(kind, monkeypatch):
    """Patched after fuse the original runs, and the report says so; patched back the layer is fused again."""
    layer, x = fuse(nn.Sequential(TutorialSE(C, 4)))[0], torch.randn(2, C, 5, 4)
    before = layer(x)
    assert senet_fused.call_counts() == {"cpu.forward": 1}
    with monkeypatch.context() as patch:
        doubling(patch, kind)
        expected = TutorialSE.forward(layer, x)
        y = layer(x)
        (row,) = fuse_report(layer)
        other = pickle.loads(pickle.dumps(layer))
        copied = copy.deepcopy(layer)
        assert torch.equal(copied(x), expected) and torch.equal(other(x), expected)
    assert torch.equal(y, expected) and not torch.allclose(y, before)
    assert row.status == "original runs" and f"the forward of {kind.__name__}, which its" in row.reason
    assert senet_fused.call_counts() == {"cpu.forward": 1}
    for one in (layer, other, copied):
        torch.testing.assert_close(one(x), before)
    assert senet_fused.call_counts() == {"cpu.forward": 4}


def test_a_patched_class_of_somebody_elses_part_is_noticed(monkeypatch):
    class Own(nn.ReLU):
        def forward(self, x):
            return torch.relu(x)

    layer, x = fuse(TorchvisionSE(C, 4, activation=Own)), torch.randn(2, C, 5, 4)
    assert fuse_report(layer).layers[0].fused
    doubling(monkeypatch, Own)
    assert torch.equal(layer(x), TorchvisionSE.forward(layer, x))
    copied = copy.deepcopy(layer)
    assert torch.equal(copied(x), TorchvisionSE.forward(copied, x)), "a copy remembers what was proven"
    assert senet_fused.call_counts() == {}


def test_a_class_that_was_patched_before_is_left(monkeypatch):
    """Even where the patch computes the same: what else it does would not be done."""
    called = []
    forward = nn.Linear.forward
    monkeypatch.setattr(nn.Linear, "forward", lambda self, x: called.append(1) or forward(self, x))
    with pytest.warns(UserWarning, match="the forward of Linear, which its fc.0 is, has been replaced"):
        layer = fuse(TutorialSE(C, 4))
    ours = FusedSE(C, 4)
    called.clear()
    layer(torch.randn(2, C, 3, 3))
    ours(torch.randn(2, C, 3, 3))
    assert len(called) == 4 and senet_fused.call_counts() == {}


class Block(nn.Module):
    def __init__(self, make=None):
        super().__init__()
        self.norm, self.se, self.act = nn.BatchNorm2d(C), FusedSE(C, 4), nn.ReLU()
        self.tail = make(self) if make else None

    def forward(self, x):
        return self.act(self.se(self.norm(x)) + x) if self.tail is None else self.tail(x, x)


TAILS = {
    "FusedSETail": lambda b: FusedSETail(b.norm, b.se, b.act, owner=b),
    "models": lambda b: Layers("fused").tail(b, b.norm, b.se, b.act),
}


@pytest.mark.parametrize("kind", [nn.BatchNorm2d, nn.ReLU, nn.Linear])
@pytest.mark.parametrize("make", TAILS)
def test_a_patched_class_in_a_tail_is_noticed(make, kind, monkeypatch):
    ours, stock, x = Block(TAILS[make]).eval(), Block().eval(), torch.randn(2, C, 5, 4)
    stock.load_state_dict(ours.state_dict())
    before = ours(x)
    doubling(monkeypatch, kind)
    senet_fused.reset_call_counts()
    torch.testing.assert_close(ours(x), stock(x))
    assert not torch.allclose(ours(x), before) and block_tails() == 0


@pytest.mark.parametrize("kind", [nn.BatchNorm2d, nn.ReLU, nn.Conv2d, nn.Sequential, nn.Identity])
@pytest.mark.parametrize("make", [LegacyBottleneck, lambda: MonaiBlock(2)], ids=["legacy", "monai"])
def test_a_patched_class_in_a_fused_block_is_noticed(make, kind, monkeypatch):
    block, x = fuse(make(), tails=True).eval(), torch.randn(2, 12, 6, 5)
    block(x)
    assert block_tails() > 0
    doubling(monkeypatch, kind)
    torch.testing.assert_close(block(x), unfuse(copy.deepcopy(block))(x))


def test_a_patched_class_of_a_sequence_in_a_fused_block_is_noticed(monkeypatch):
    """MONAI's Convolution is one, of a class of its own."""

    class Convolution(nn.Sequential):
        pass

    block, x = MonaiBlock(2), torch.randn(2, 12, 6, 5)
    block.conv1.__class__ = Convolution
    fuse(block, tails=True).eval()(x)
    tails = block_tails()
    assert tails == 4
    doubling(monkeypatch, Convolution)
    torch.testing.assert_close(block(x), unfuse(copy.deepcopy(block))(x))
    assert block_tails() == 2 * tails - 1


# ---------------------------------------------------------------------------------- nn.DataParallel


def replicas(model, count=2):
    """What torch.nn.parallel.replicate makes, which needs GPUs for its copies: here they are the weights themselves."""
    modules = list(model.modules())
    copies = [[module._replicate_for_data_parallel() for module in modules] for _ in range(count)]
    for made in copies:
        for module, replica in zip(modules, made, strict=True):
            replica._former_parameters = OrderedDict()
            for name, child in module._modules.items():
                if child is None:
                    replica._modules[name] = None
                else:
                    setattr(replica, name, made[modules.index(child)])
            for name, p in module._parameters.items():
                if p is None:
                    replica._parameters[name] = None
                else:
                    setattr(replica, name, p.view_as(p))
                    replica._former_parameters[name] = getattr(replica, name)
    return [made[0] for made in copies]


@pytest.mark.parametrize(
    ("make", "operator"),
    [
        (lambda: FusedSE(C, 4), "cpu.forward"),
        (lambda: FusedSE(C, 4, bias=True, conv=True), "cpu.forward"),
        (lambda: fuse(TutorialSE(C, 4)), "cpu.forward"),
        (lambda: fuse(TimmSEModule(C, 3)), "cpu.forward"),
        (lambda: FusedSETail(nn.BatchNorm2d(C), FusedSE(C, 4), nn.ReLU()), "cpu.tail_forward"),
        (lambda: fuse(LegacyBottleneck(), tails=True), "cpu.tail_forward"),
    ],
    ids=["FusedSE", "conv", "fuse", "fuse_conv", "FusedSETail", "fuse_tails"],
)
def test_replicas_run_fused(make, operator):
    """And their gradients reach the original's weights."""
    model, x = make(), torch.randn(4, C, 6, 5)
    weights = list(model.parameters())
    results = []
    for one in (model, *replicas(model)):
        senet_fused.reset_call_counts()
        y = one(x)
        counts = senet_fused.call_counts()
        assert counts[operator] >= 1 and "reference" not in str(counts)
        results.append((y, *torch.autograd.grad(y.square().sum(), weights)))
        assert list(counts) == [operator]
    for result in results[1:]:
        torch.testing.assert_close(result, results[0])


def test_a_replica_says_that_it_records_no_gates():
    for model in (FusedSE(C, 4), fuse(TutorialSE(C, 4))):
        with capture_gates(model) as gates:
            with pytest.warns(UserWarning, match="the gates of nn.DataParallel's replicas are not recorded"):
                (replica,) = replicas(model, 1)
            replica(torch.randn(2, C, 3, 3))
        assert gates[""] == []
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            replicas(model)


def test_a_tail_of_an_owners_is_not_replicated():
    with pytest.raises(RuntimeError, match="cannot replicate a tail of its owner's; use DistributedDataParallel"):
        replicas(Block(TAILS["FusedSETail"]))


# ---------------------------------------------------------------------------------- FX quantisation


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore:torch.quantize_per:UserWarning")
@pytest.mark.parametrize(
    "make",
    [
        lambda: FusedSE(C, 4, bias=True),
        lambda: FusedSE(C, 4, bias=True, conv=True, squeeze="avgmax", post_act="relu"),
        lambda: fuse(TimmSEModule(C, 3)),
        lambda: FusedSETail(nn.BatchNorm2d(C), FusedSE(C, 4)),
    ],
    ids=["linear", "conv", "fuse", "tail"],
)
def test_fx_quantisation_quantises_the_children(make):
    """With one warning for the model that they do not run fused; before the conversion to 8 bits it is exact."""
    from torch.ao.quantization import get_default_qconfig_mapping
    from torch.ao.quantization.quantize_fx import convert_fx, prepare_fx

    model, x = nn.Sequential(nn.Conv2d(C, C, 1), make(), make()).eval(), torch.randn(2, C, 5, 4)
    expected = copy.deepcopy(model)(x)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        prepared = prepare_fx(copy.deepcopy(model), get_default_qconfig_mapping("x86"), (x,))
        senet_fused.reset_call_counts()
        torch.testing.assert_close(prepared(x), expected)
        network = convert_fx(prepared)
    ours = [w for w in caught if "FX quantisation" in str(w.message)]
    assert len(ours) == 1 and "the quantised model does not run fused" in str(ours[0].message)
    kinds = [type(m) for m in network.modules() if "quantized" in type(m).__module__]
    assert sum(kind.__name__.removesuffix("2d") in ("Conv", "ConvReLU", "Linear", "LinearReLU") for kind in kinds) == 5
    assert network(x).shape == x.shape
    assert senet_fused.call_counts() == {}
