"""fuse(model, tails=True) on networks of other libraries: which blocks run with tails, outputs, training, undoing."""

from __future__ import annotations

import collections
import copy
import functools

import pytest
import torch
from models import PEERS
from test_models import assert_close, assert_same_training, evaluate, noise_of, prepared, sgd, training_step

import senet_fused
from senet_fused import fuse_report, unfuse

pytestmark = pytest.mark.networks
BACKEND = senet_fused.explain(torch.empty(0)).backend
assert BACKEND != "reference", "without compiled code the modules run, and nothing would be tested"
fuse = functools.partial(senet_fused.fuse, tails=True)

LEGACY, TIMM, MONAI = "legacy SE bottleneck", "timm bottleneck", "MONAI SE block"
# Peer -> (blocks that run with tails, by form; those that are left; BatchNorms that run as tails).
BLOCKS = {
    "timm-seresnet50": ({TIMM: 16}, {}, 52),
    "timm-seresnext26d_32x4d": ({TIMM: 8}, {}, 28),
    "timm-seresnetaa50d": ({TIMM: 16}, {}, 52),
    "timm-legacy_senet154": ({LEGACY: 50}, {}, 154),
    "timm-legacy_seresnet18": ({}, {"legacy SE basic block": 8}, 0),
    "timm-seresnet33ts": ({}, {"BottleneckBlock": 10}, 0),
    "timm-mobilenetv3_small_050": ({}, {"DepthwiseSeparableConv": 1, "InvertedResidual": 8}, 0),
    "timm-regnety_002": ({}, {"Bottleneck": 13}, 0),
    "MONAI-SENet_3-D_small": ({MONAI: 4}, {}, 16),
    "MONAI-SENet_2-D_small": ({MONAI: 4}, {}, 16),
    "pretrainedmodels-SENet_small": ({LEGACY: 4}, {}, 16),
    "pretrainedmodels-senet154": ({LEGACY: 50}, {}, 154),
    "smp-Unet_senet154_scse": ({LEGACY: 50}, {"SCSEModule": 10}, 154),
}
_BY_NAME = {str(peer): peer for peer in PEERS}
# One of each library and form to run; timm's basic block is in tests/test_fuse_tails.py.
_RUN = ("timm-seresnext26d_32x4d", "MONAI-SENet_3-D_small", "pretrainedmodels-SENet_small")


@pytest.mark.parametrize("name", BLOCKS)
def test_what_is_found(name):
    peer, (fused, left, norms) = _BY_NAME[name], BLOCKS[name]
    with torch.device("meta" if peer.on_meta else "cpu"):
        model = peer.build()
    keys = list(model.state_dict())
    fuse(model)
    assert list(model.state_dict()) == keys
    report = fuse_report(model, tails=True)
    counts = {status: collections.Counter() for status in ("fused", "left")}
    for block in report.blocks:
        counts[block.status][block.kind] += 1
    assert counts == {"fused": fused, "left": left}, str(report)
    own = sum(type(m).__name__.startswith("BatchNorm") for b in report.blocks if b.fused for m in
              model.get_submodule(b.name).modules())  # fmt: skip
    assert own == norms


@pytest.mark.parametrize("name", _RUN)
def test_outputs_and_training(name):
    peer, (_, _, norms) = _BY_NAME[name], BLOCKS[name]
    stock, x = prepared(peer)
    model = fuse(copy.deepcopy(stock))
    expected = evaluate(stock, x)
    senet_fused.reset_call_counts()
    got = evaluate(model, x)
    assert senet_fused.call_counts() == {"cpu.tail_forward": norms}
    assert_close(got, expected, 1e-12 + 10 * noise_of(stock, x, expected))
    theirs = training_step(stock, x, sgd(stock))
    senet_fused.reset_call_counts()
    ours = training_step(model, x, sgd(model))
    assert senet_fused.call_counts() == {"cpu.tail_forward": norms, "cpu.tail_backward": norms}
    assert_same_training(model, ours, theirs)
    for (key, t), mine in zip(stock.state_dict().items(), model.state_dict().values(), strict=True):
        assert (mine.double() - t.double()).norm() <= 1e-9 * t.double().norm(), key
    kinds = [type(m) for m in stock.modules()]
    assert [type(m) for m in unfuse(model).modules()] == kinds
