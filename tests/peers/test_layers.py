"""tests/peer_layers.py, which the tests without these libraries use, against the layers that it stands for.

NvidiaSE, TutorialSE and MaxPooled stand for code that is copied, and in no package.
"""

from __future__ import annotations

import dataclasses
import warnings

import monai.networks.blocks as monai_blocks
import peer_layers
import pretrainedmodels.models.senet as cadene
import pytest
import segmentation_models_pytorch.base.modules as smp_modules
import segmentation_models_pytorch.encoders._senet as smp_senet
import timm.layers
import timm.layers.activations as timm_activations
import timm.layers.squeeze_excite as timm_squeeze_excite
import timm.models._efficientnet_blocks as timm_efficientnet
import timm.models.senet as timm_senet
import torch
import torchvision
import transformers
import transformers.models.align.modeling_align as align
import transformers.models.efficientnet.modeling_efficientnet as efficientnet
import transformers.models.regnet.modeling_regnet as regnet
from mmpretrain.models.utils import SELayer
from torch import Tensor, nn

from senet_fused import explain, fuse, fuse_report

BACKEND = explain(torch.empty(0)).backend
C, R = 32, 4
OWN_SIGMOID, OWN_HARD_SIGMOID, OWN_SWISH = peer_layers.OwnSigmoid, peer_layers.OwnHardSigmoid, peer_layers.OwnSwish


def _timm(theirs, ours, *, shape=(2, C, 6, 5), **options):
    """A layer of timm with its own functions, and ours with those that stand for them."""
    stands_for = {
        timm_activations.Sigmoid: OWN_SIGMOID,
        timm_activations.HardSigmoid: OWN_HARD_SIGMOID,
        timm_activations.Swish: OWN_SWISH,
    }
    ours_options = {name.removesuffix("_layer"): stands_for.get(value, value) for name, value in options.items()}
    return theirs(C, rd_channels=R, **options), ours(C, R, **ours_options), shape


def _module(**options):
    sigmoid = {"gate_layer": timm_activations.Sigmoid}
    return _timm(timm.layers.SEModule, peer_layers.TimmSEModule, **{**sigmoid, **options})


def _hf(module, prefix, config):
    layer = getattr(module, f"{prefix}SqueezeExciteLayer")(config(squeeze_expansion_ratio=R / C), C, C)
    return layer, peer_layers.EfficientNetSE(C, R), (2, C, 6, 5)


def _monai(dimensions, residual):
    shape = (2, C, 6, 5, 4)[: 2 + dimensions]
    if residual:
        ours = peer_layers.MonaiSE(dimensions, C, 2, (nn.LeakyReLU, nn.ReLU), add_residual=True)
        return monai_blocks.ResidualSELayer(dimensions, C), ours, shape
    return monai_blocks.ChannelSELayer(dimensions, C), peer_layers.MonaiSE(dimensions, C), shape


def _mmpretrain(return_weight):
    theirs = SELayer(C, squeeze_channels=R, return_weight=return_weight)
    return theirs, peer_layers.MMPretrainSE(C, R, return_weight=return_weight), (2, C, 6, 5)


def _torchvision(**options):
    return torchvision.ops.SqueezeExcitation(C, R, **options), peer_layers.TorchvisionSE(C, R, **options), (2, C, 6, 5)


# name -> (their layer, ours, shape of an input)
PAIRS = {
    "torchvision": _torchvision,
    "torchvision_mobilenet": lambda: _torchvision(scale_activation=nn.Hardsigmoid),
    "torchvision_efficientnet": lambda: _torchvision(activation=nn.SiLU),
    "timm_module": _module,
    "timm_module_maximum": lambda: _module(add_maxpool=True),
    "timm_module_no_bias": lambda: _module(bias=False),
    "timm_module_norm": lambda: _module(norm_layer=nn.BatchNorm2d),
    "timm_module_functions": lambda: _module(
        act_layer=timm_activations.Swish, gate_layer=timm_activations.HardSigmoid
    ),
    "timm_squeeze_excite": lambda: _timm(
        timm_efficientnet.SqueezeExcite, peer_layers.TimmSqueezeExcite, act_layer=nn.SiLU
    ),
    "timm_squeeze_excite_hard": lambda: _timm(
        timm_efficientnet.SqueezeExcite, peer_layers.TimmSqueezeExcite, act_layer=nn.ReLU, gate_layer=nn.Hardsigmoid
    ),
    "timm_channels_last": lambda: _timm(
        timm_squeeze_excite.SqueezeExciteCl, peer_layers.TimmSqueezeExciteCl,
        gate_layer=timm_activations.Sigmoid, shape=(2, 6, 5, C),
    ),
    "timm_legacy": lambda: (timm_senet.SEModule(C, C // R), peer_layers.LegacySE(C, C // R), (2, C, 6, 5)),
    "cadene": lambda: (cadene.SEModule(C, C // R), peer_layers.LegacySE(C, C // R), (2, C, 6, 5)),
    "smp_senet": lambda: (smp_senet.SEModule(C, C // R), peer_layers.LegacySE(C, C // R), (2, C, 6, 5)),
    "smp_scse": lambda: (smp_modules.SCSEModule(C, C // R), peer_layers.SCSE(C, C // R), (2, C, 6, 5)),
    **{f"monai_{d}d": lambda d=d: _monai(d, False) for d in (1, 2, 3)},
    **{f"monai_residual_{d}d": lambda d=d: _monai(d, True) for d in (1, 2, 3)},
    "mmpretrain": lambda: _mmpretrain(False),
    "mmpretrain_gate": lambda: _mmpretrain(True),
    "transformers_regnet": lambda: (regnet.RegNetSELayer(C, R), peer_layers.RegNetSE(C, R), (2, C, 6, 5)),
    "transformers_efficientnet": lambda: _hf(efficientnet, "EfficientNet", transformers.EfficientNetConfig),
    "transformers_align": lambda: _hf(align, "AlignVision", transformers.AlignVisionConfig),
}  # fmt: skip

# Their children that ours do without: a pooling, where ours take the mean.
LACKING = {"cadene": {"avg_pool"}, "smp_senet": {"avg_pool"}}

every_pair = pytest.mark.parametrize("name", PAIRS)


@every_pair
def test_children_and_keys(name):
    theirs, ours, _ = PAIRS[name]()
    children = [
        [(path, type(child).__name__.removeprefix("Own")) for path, child in layer.named_modules() if path]
        for layer in (theirs, ours)
    ]
    assert [child for child in children[0] if child[0] not in LACKING.get(name, ())] == children[1]
    shapes = [[(key, t.shape) for key, t in layer.state_dict().items()] for layer in (theirs, ours)]
    assert shapes[0] == shapes[1]


def _run(layer: nn.Module, x: Tensor) -> list[Tensor]:
    x = x.clone().requires_grad_()
    y = layer(x)
    dy = torch.randn(y.shape, dtype=y.dtype, generator=torch.Generator().manual_seed(0))
    return [y.detach(), *torch.autograd.grad(y, (x, *layer.parameters()), dy)]


@every_pair
@pytest.mark.parametrize("training", [False, True], ids=["evaluation", "training"])
def test_outputs_and_gradients(name, training):
    torch.manual_seed(0)
    theirs, ours, shape = PAIRS[name]()
    ours.load_state_dict(theirs.state_dict(), strict=True)
    x = torch.randn(shape, dtype=torch.float64)
    for layer in (theirs, ours):
        layer.double().train(training)
    for a, b in zip(_run(ours, x), _run(theirs, x), strict=True):
        assert a.shape == b.shape and b.abs().max() > 0
        # A hard sigmoid's derivative is float32's 1/6 in PyTorch's own kernel, and exact where it is written out.
        torch.testing.assert_close(a, b, rtol=1e-7 if "hard" in type(theirs).__name__ else 1e-12, atol=1e-14)


@every_pair
def test_fuse_reads_them_alike(name):
    theirs, ours, _ = PAIRS[name]()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that nothing was fused
        rows = [list(fuse_report(fuse(layer, backend=BACKEND))) for layer in (theirs, ours)]
    kinds = [row.kind.removeprefix("Timm") for row in (rows[0][0], rows[1][0])]
    assert kinds[0] == kinds[1]
    rows[1] = [dataclasses.replace(row, kind=kinds[0]) for row in rows[1]]
    assert rows[0] == rows[1] and len(rows[0]) == 1
    assert rows[0][0].fused != (name == "timm_module_norm")
