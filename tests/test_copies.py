"""Copies, files and averages of layers after .compile() in place hold weights of their own, as torch.nn's do."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
from peer_blocks import LegacyBottleneck
from peer_layers import NvidiaSE, TutorialSE
from torch import nn
from torch.optim.swa_utils import AveragedModel

import senet_fused
from senet_fused import FusedSE, FusedSETail, capture_gates, fuse
from senet_fused.models.layers import Layers, ReferenceSE

C = 16


class Block(nn.Module):
    """BatchNorm -> SE -> + x -> ReLU by one of the tails."""

    def __init__(self, make):
        super().__init__()
        self.norm, self.se, self.act = nn.BatchNorm2d(C), FusedSE(C, 4), nn.ReLU()
        self.tail = make(self)

    def forward(self, x):
        return self.tail(x, x)


LAYERS = {
    "FusedSE": lambda: FusedSE(C, 4),
    "FusedSETail": lambda: FusedSETail(nn.BatchNorm2d(C), FusedSE(C, 4), nn.ReLU()),
    "FusedSETail_of_an_owner": lambda: Block(lambda b: FusedSETail(b.norm, b.se, b.act, owner=b)),
    "models": lambda: Block(lambda b: Layers("fused").tail(b, b.norm, b.se, b.act)),
    "ReferenceSE": lambda: ReferenceSE(C, 4, *(FusedSE(C, 4).act, FusedSE(C, 4).gate), "avg"),
    "fuse": lambda: fuse(TutorialSE(C, 4)),
    "fuse_gate": lambda: fuse(NvidiaSE(C, 4), backend="cpu"),
    "fuse_tails": lambda: fuse(LegacyBottleneck(C), tails=True),
}


def compiled(name):
    """Every module of it compiled in place, as regional compilation does, and called once."""
    torch.manual_seed(0)
    layer, x = LAYERS[name]().eval(), torch.randn(2, C, 6, 5)
    if name == "fuse_gate" and senet_fused.explain(x).backend == "reference":
        pytest.skip("without compiled code there is no backend 'cpu'")
    for module in layer.modules():
        module.compile(backend="eager")
    return layer, x


def loaded(layer):
    file = io.BytesIO()
    torch.save(layer, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


WAYS = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda layer: pickle.loads(pickle.dumps(layer)),
    "save": loaded,
    "average": lambda layer: AveragedModel(layer).module,
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", LAYERS)
def test_a_copy_of_a_compiled_layer_has_its_own_weights(name, way):
    layer, x = compiled(name)
    other = WAYS[way](layer)
    assert type(other) is type(layer)
    assert all(module._compiled_call_impl is None for module in other.modules())
    assert all(module._compiled_call_impl is not None for module in layer.modules())
    torch.testing.assert_close(other(x), layer(x))
    expected = copy.deepcopy(layer)
    for model in (other, expected):
        for i, p in enumerate(model.parameters()):
            nn.init.constant_(p, 0.01 * (i + 1))
    y = other(x)
    torch.testing.assert_close(y, expected(x))
    assert not torch.allclose(y, layer(x))


@pytest.mark.parametrize("name", LAYERS)
def test_a_shallow_copy_shares_the_weights_and_not_what_was_compiled(name):
    layer, x = compiled(name)
    other = copy.copy(layer)
    assert other._compiled_call_impl is None and layer._compiled_call_impl is not None
    assert all(a is b for a, b in zip(other.parameters(), layer.parameters(), strict=True))
    torch.testing.assert_close(other(x), layer(x))


@pytest.mark.parametrize("name", ["FusedSE", "fuse", "fuse_gate"])
def test_a_copy_of_a_layer_that_records_does_not(name):
    layer, x = compiled(name)
    with capture_gates(layer) as gates:
        others = [way(layer) for way in WAYS.values()]
        assert all(other._senet_captured is None for other in others)
        for other in others:
            other(x)
        layer(x)
    assert len(gates[""]) == 1


def test_an_average_is_one():
    """Of the weights of two steps, computed with."""
    torch.manual_seed(0)
    layer, x = FusedSE(C, 4), torch.randn(2, C, 3, 3)
    layer.compile(backend="eager")
    average = AveragedModel(layer)
    weights = []
    for _ in range(2):
        with torch.no_grad():
            for p in layer.parameters():
                p.normal_()
        average.update_parameters(layer)
        weights.append([p.clone() for p in layer.parameters()])
    w1, w2 = (sum(pair) / 2 for pair in zip(*weights, strict=True))
    torch.testing.assert_close(average(x), senet_fused.squeeze_excite(x, w1, w2))
