"""The networks that the presets of `senet-fused bench model` name are timm's, and take what the help says."""

from __future__ import annotations

import pytest
import timm
import torch

from senet_fused import fuse_report
from senet_fused.bench import zoo
from senet_fused.bench.model import PRESETS

_LAYERS = {"senet154": 50, "se_resnext101": 33, "se_resnet50": 16}


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_names_a_network_of_timm(name):
    network = PRESETS[name]
    assert timm.is_model(network)
    with torch.device("meta"):
        model = timm.create_model(network)
    assert zoo.input_size(model) == (3, 224, 224)
    assert len([m for m in model.modules() if type(m).__name__ == "SEModule"]) == _LAYERS[name]


def test_their_layers_are_found():
    with torch.device("meta"):
        model = timm.create_model(PRESETS["se_resnet50"])
    assert fuse_report(model).count("can be fused") == _LAYERS["se_resnet50"]
