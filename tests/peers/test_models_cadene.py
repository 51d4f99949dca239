"""The networks of senet_fused.models beside Cadene's and timm's: state dicts that load both ways, equal outputs."""

from __future__ import annotations

import pretrainedmodels
import pytest
import timm
import torch
from torch import nn

import senet_fused
from senet_fused import models

assert senet_fused.explain(torch.empty(0)).backend != "reference", "without compiled code nothing would be tested"


def randomised(model: nn.Module) -> nn.Module:
    """In float64, with statistics and weights that no two layers share."""
    torch.manual_seed(0)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            for t in (module.weight, module.bias, module.running_mean):
                nn.init.normal_(t, 0.5)
            nn.init.uniform_(module.running_var, 0.5, 2)
        elif isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight)
    return model.double().eval()


pytestmark = pytest.mark.networks
PEERS = {
    "se_bn_inception": lambda: pretrainedmodels.bninception(pretrained=None),
    "se_mobilenet": lambda: timm.create_model("mobilenetv1_100", act_layer=nn.ReLU),
}


@pytest.mark.parametrize("name", PEERS)
def test_twin_is_the_original(name):
    theirs = randomised(PEERS[name]())
    ours = models.create_model(name, se=None).double().eval()
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(1, 3, 224, 224, dtype=torch.float64)
    with torch.no_grad():
        expected = theirs(x)
        torch.testing.assert_close(ours(x), expected, rtol=1e-10, atol=1e-10 * float(expected.abs().max()))
        other = PEERS[name]().double().eval()
        other.load_state_dict(ours.state_dict())
        torch.testing.assert_close(other(x), expected, rtol=0, atol=0)


@pytest.mark.parametrize("name", PEERS)
def test_tails_take_the_originals_weights(name):
    theirs, ours = randomised(PEERS[name]()), models.create_model(name, se="tails").double().eval()
    left = ours.load_state_dict(theirs.state_dict(), strict=False)
    assert left.unexpected_keys == [] and all(".fc" in key for key in left.missing_keys)
    with torch.no_grad():
        for key, p in ours.named_parameters():
            if ".fc2." in key:
                p.fill_(1e3 if key.endswith("bias") else 0)  # a gate of 1
        x = torch.randn(1, 3, 224, 224, dtype=torch.float64)
        expected = theirs(x)
        senet_fused.reset_call_counts()
        found = ours(x)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10 * float(expected.abs().max()))
    norms = sum(isinstance(m, nn.BatchNorm2d) for m in theirs.modules())
    assert senet_fused.call_counts() == {"cpu.tail_forward": norms, "cpu.forward": len(left.missing_keys) // 4}


@pytest.mark.parametrize(
    "ours, cadenes",
    [
        ("senet154", "senet154"),
        ("se_resnet50", "se_resnet50"),
        ("se_resnet152", "se_resnet152"),
        ("se_resnext101_32x4d", "se_resnext101_32x4d"),
    ],
)
def test_caffe_names_of_peers(ours, cadenes):
    with torch.device("meta"):
        expected = models.caffe_names(models.create_model(ours))
        theirs = pretrainedmodels.__dict__[cadenes](pretrained=None)
        assert models.caffe_names(theirs) == expected
        legacy = timm.create_model("legacy_" + ours.replace("se_res", "seres"))
        assert models.caffe_names(legacy) == expected
