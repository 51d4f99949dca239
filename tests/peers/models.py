"""Networks of other libraries, and what fuse is to make of each. Their weights are random: nothing is downloaded."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import mmpretrain.models.backbones as openmmlab
import monai.networks.blocks as monai_blocks
import monai.networks.nets as monai_nets
import monai.networks.nets.senet as monai_senet
import pretrainedmodels
import pretrainedmodels.models.senet as cadene_senet
import segmentation_models_pytorch as smp
import timm
import timm.models.resnet as timm_resnet
import torchvision
import transformers
from pytorchcv.model_provider import get_model as pytorchcv_model
from timm.layers import SEModule
from torch import nn
from transformers.models.qwen2_5_omni.modeling_qwen2_5_omni import ECAPA_TimeDelayNet, Qwen2_5OmniDiTConfig

__all__ = ["PEERS", "REPRESENTATIVES", "Peer"]

IMAGE = (2, 3, 64, 64)


@dataclasses.dataclass(frozen=True)
class Peer:
    """A network and what fuse finds in it.

    library, name: who has it. build: makes it. fused: kind -> how many are fused. left: class -> how many are left.
    why: a part of the reason to leave them. shape: of an input to run it on, None if it is too large for that, and only
    counted. on_meta: whether its library can make it on the meta device. pickles: whether it can itself be pickled
    after a call.
    """

    library: str
    name: str
    build: Callable[[], nn.Module]
    fused: Mapping[str, int] = dataclasses.field(default_factory=dict)
    left: Mapping[str, int] = dataclasses.field(default_factory=dict)
    why: str = ""
    shape: tuple[int, ...] | None = IMAGE
    on_meta: bool = True
    pickles: bool = True

    def __str__(self) -> str:
        return f"{self.library}-{self.name}".replace(",", "").replace(" ", "_")


def _timm(name: str, *, kind: str = "timm SEModule", count: int = 0, options: Any = None, **rest: Any) -> Peer:
    build = functools.partial(timm.create_model, name, **(options or {"num_classes": 10}))
    return Peer("timm", name, build, fused={kind: count} if count else {}, **rest)


def _timm_resnet(name: str, attention: Any, **rest: Any) -> Peer:
    build = functools.partial(
        timm_resnet.ResNet, timm_resnet.Bottleneck, [1, 1, 1, 1], block_args={"attn_layer": attention}
    )
    return Peer("timm", f"ResNet, {name}", build, **rest)


SQUEEZE_EXCITE = "timm SqueezeExcite"
LEGACY = "legacy SEModule"
WITH_NORM = "parameters or buffers that belong to no plain SE layer: bn"

TIMM = (
    _timm("seresnet50", count=16),
    _timm("seresnext50_32x4d", count=16),
    _timm("seresnext26d_32x4d", count=8),
    _timm("seresnetaa50d", count=16),
    _timm("seresnextaa101d_32x8d", count=33, shape=None),
    _timm("seresnet33ts", count=10),
    _timm("legacy_seresnet18", kind=LEGACY, count=8),
    _timm("legacy_senet154", kind=LEGACY, count=50, shape=None),
    _timm("mobilenetv3_small_050", kind=SQUEEZE_EXCITE, count=9),
    _timm("mobilenetv3_large_100", kind=SQUEEZE_EXCITE, count=8),
    _timm("efficientnet_b0", kind=SQUEEZE_EXCITE, count=16),
    _timm("tf_efficientnet_b0", kind=SQUEEZE_EXCITE, count=16),
    _timm("efficientnet_cc_b0_4e", kind=SQUEEZE_EXCITE, count=16),
    _timm("efficientnetv2_rw_t", kind=SQUEEZE_EXCITE, count=29),
    _timm("regnety_002", count=13),
    _timm("regnety_016", count=27),
    _timm("regnetz_005", count=21),
    _timm("ghostnet_100", kind=SQUEEZE_EXCITE, count=7),
    _timm("hardcorenas_a", kind=SQUEEZE_EXCITE, count=8),
    _timm("mixnet_s", kind=SQUEEZE_EXCITE, count=13),
    _timm("fbnetv3_b", kind=SQUEEZE_EXCITE, count=18),
    _timm("lcnet_050", kind=SQUEEZE_EXCITE, count=2),
    _timm("tinynet_e", kind=SQUEEZE_EXCITE, count=10),
    _timm("semnasnet_050", kind=SQUEEZE_EXCITE, count=8),
    _timm("repghostnet_050", kind=SQUEEZE_EXCITE, count=7),
    _timm("dm_nfnet_f0", count=12, shape=None),
    _timm("nf_seresnet26", count=8),
    _timm("tresnet_m", count=18),
    _timm("cs3sedarknet_l", count=21),
    _timm("sedarknet21", count=7),
    _timm("mobileone_s4", count=12),
    _timm("repvit_m0_9", count=10),
    _timm("fastvit_t8", count=1),
    _timm("shvit_s1", count=2, shape=(2, 3, 128, 128)),
    _timm("efficientvit_m0", count=2, shape=(2, 3, 224, 224)),
    _timm("gcvit_xxtiny", count=11, shape=(2, 3, 224, 224)),
    _timm("coatnet_0_rw_224", count=5, options={"img_size": 64}),
    _timm("maxvit_nano_rw_256", count=7, shape=None),
    _timm("test_byobnet", count=4),
    _timm("test_efficientnet", kind=SQUEEZE_EXCITE, count=2),
    _timm("rexnet_100", left={"SEModule": 13}, why=WITH_NORM),
    _timm("ecaresnet26t", left={"EcaModule": 8}, why="a 1-D convolution over the channels"),
    _timm("skresnet18", left={"SelectiveKernel": 8}, why="a softmax over branches"),
    _timm("gcresnet33ts", left={"GlobalContext": 10}, why="pools with attention weights"),
    _timm("resnest14d", left={"SplitAttn": 4}, why="a softmax over branches"),
    _timm(
        "ese_vovnet19b_slim_dw", left={"EffectiveSEModule": 4}, why="one fully connected layer [C, C] instead of two"
    ),
    _timm_resnet(
        "cbam", "cbam", left={"CbamModule": 4}, why="two squeezes through one pair of layers, and a spatial gate"
    ),
    _timm_resnet("se with a maximum", functools.partial(SEModule, add_maxpool=True), fused={"timm SEModule": 4}),
    _timm("resnet18"),
    _timm("davit_tiny"),
)


def _torchvision(name: str, count: int, *, make: Any = torchvision.models, **rest: Any) -> Peer:
    weights = {"weights": None, **({} if make is torchvision.models else {"weights_backbone": None})}
    fused = {"torchvision SqueezeExcitation": count}
    return Peer("torchvision", name, functools.partial(getattr(make, name), **weights), fused=fused, **rest)


TORCHVISION = (
    _torchvision("mobilenet_v3_small", 9),
    _torchvision("mobilenet_v3_large", 8),
    _torchvision("efficientnet_b0", 16),
    _torchvision("efficientnet_v2_s", 30),
    _torchvision("regnet_y_400mf", 16, on_meta=False),
    _torchvision("maxvit_t", 11, shape=None),
    _torchvision("lraspp_mobilenet_v3_large", 8, make=torchvision.models.segmentation),
    _torchvision("ssdlite320_mobilenet_v3_large", 8, make=torchvision.models.detection, shape=None),
)


def _monai(name: str, count: int, build: Callable[..., nn.Module], *arguments: Any, shape: Any, **rest: Any) -> Peer:
    fused = {"MONAI ChannelSELayer": count}
    return Peer("MONAI", name, functools.partial(build, *arguments, **rest), fused=fused, shape=shape)


def _small(dimensions: int, bottleneck: type[nn.Module], groups: int) -> dict[str, Any]:
    return dict(
        _NET, spatial_dims=dimensions, block=bottleneck, layers=[1, 1, 1, 1], groups=groups, reduction=16, inplanes=16,
        dropout_prob=0.2, input_3x3=False, downsample_kernel_size=1,
    )  # fmt: skip


_PLANES = {1: (2, 24, 9), 2: (2, 24, 9, 7), 3: (2, 24, 9, 7, 5)}
_NET = {"in_channels": 1, "num_classes": 4}

MONAI = (
    _monai("SEResNet50 2-D", 16, monai_nets.SEResNet50, spatial_dims=2, **_NET, shape=(2, 1, 64, 64)),
    _monai("SEResNet50 3-D", 16, monai_nets.SEResNet50, spatial_dims=3, **_NET, shape=None),
    _monai("SEResNext50 2-D", 16, monai_nets.SEResNext50, spatial_dims=2, **_NET, shape=(2, 1, 64, 64)),
    _monai("SEResNext50 3-D", 16, monai_nets.SEResNext50, spatial_dims=3, **_NET, shape=None),
    _monai("SENet154 2-D", 50, monai_nets.SENet154, spatial_dims=2, **_NET, shape=None),
    _monai("SENet154 3-D", 50, monai_nets.SENet154, spatial_dims=3, **_NET, shape=None),
    _monai(
        "SENet 3-D, small", 4, monai_nets.SENet, **_small(3, monai_senet.SEResNetBottleneck, 1),
        shape=(2, 1, 40, 48, 40),
    ),
    _monai(
        "SENet 2-D, small", 4, monai_nets.SENet, **_small(2, monai_senet.SEResNeXtBottleneck, 8), shape=(2, 1, 64, 64)
    ),
    *(
        _monai(f"{name} {d}-D", 1, getattr(monai_blocks, name), d, *sizes, shape=shape)
        for name, sizes in {"ChannelSELayer": (24,), "ResidualSELayer": (24,), "SEBlock": (24, 8, 8, 24)}.items()
        for d, shape in _PLANES.items()
    ),
)  # fmt: skip


def _transformers(name: str, fused: dict[str, int], *, options: Any = None, config: str = "", **rest: Any) -> Peer:
    config_class = getattr(transformers, f"{config or name.partition('For')[0].removesuffix('Model')}Config")

    def build() -> nn.Module:
        return getattr(transformers, name)(config_class(**(options or {})))

    size = rest.pop("size", "")
    return Peer("transformers", f"{name}{size}", build, fused=fused, **rest)


def _ecapa() -> nn.Module:
    """Qwen2.5-Omni's speaker encoder: 1-D."""
    widths = {"enc_channels": [32, 32, 32, 32, 96], "enc_attention_channels": 8, "enc_se_channels": 8}
    return ECAPA_TimeDelayNet(Qwen2_5OmniDiTConfig(enc_dim=16, enc_res2net_scale=2, mel_dim=20, **widths))


REGNET = "transformers RegNetSELayer"
EFFICIENTNET = "transformers EfficientNetSqueezeExciteLayer"
B0 = {"width_coefficient": 1.0, "depth_coefficient": 1.0, "hidden_dim": 1280}

TRANSFORMERS = (
    _transformers("RegNetForImageClassification", {REGNET: 22}),
    _transformers(
        "RegNetForImageClassification", {REGNET: 6}, size=", small",
        options={"embedding_size": 8, "hidden_sizes": [16, 24, 32, 48], "depths": [1, 2, 2, 1], "groups_width": 8},
    ),
    _transformers("EfficientNetForImageClassification", {EFFICIENTNET: 55}, shape=None),
    _transformers("EfficientNetForImageClassification", {EFFICIENTNET: 16}, size=" B0", options=B0),
    _transformers("AlignVisionModel", {EFFICIENTNET: 55}, config="AlignVision", shape=None),
    _transformers("AlignVisionModel", {EFFICIENTNET: 16}, config="AlignVision", size=" B0", options=B0),
    _transformers("PPLCNetForImageClassification", {"PPLCNetSqueezeExcitationModule, by structure": 2}),
    _transformers(
        "PPLCNetV3Backbone", {"PPLCNetV3SqueezeExcitationModule, by structure": 2}, config="PPLCNetV3", pickles=False,
    ),
    _transformers(
        "PPLCNetV4Backbone", {"PPLCNetV4SqueezeExcitationModule, by structure": 5}, config="PPLCNetV4", pickles=False,
    ),
    _transformers(
        "PPOCRV5MobileDetForObjectDetection",
        {
            "PPLCNetV3SqueezeExcitationModule, by structure": 2,
            "PPOCRV5MobileDetSqueezeExcitationModule, by structure": 8,
        },
        pickles=False,
    ),
    _transformers("SLANetForTableRecognition", {"PPLCNetSqueezeExcitationModule, by structure": 2}, shape=None),
    Peer(
        "transformers", "ECAPA_TimeDelayNet", _ecapa, {"SqueezeExcitationBlock, by structure": 3}, shape=(2, 30, 20),
    ),
)  # fmt: skip


def _smp(encoder: str, fused: dict[str, int], *, architecture: str = "Unet", **rest: Any) -> Peer:
    scse = {"decoder_attention_type": "scse"} if architecture == "Unet" else {}
    build = functools.partial(getattr(smp, architecture), encoder, encoder_weights=None, **scse)
    return Peer("smp", f"{architecture} {encoder}{', scse' * bool(scse)}", build, fused=fused, **rest)


CSE = "cSE of SCSEModule"

SMP = (
    _smp("resnet18", {CSE: 10}),
    _smp("se_resnet50", {LEGACY: 16, CSE: 10}),
    _smp("senet154", {LEGACY: 50, CSE: 10}, shape=None),
    _smp("timm-mobilenetv3_small_075", {SQUEEZE_EXCITE: 9, CSE: 10}),
    _smp("timm-regnety_002", {"timm SEModule": 13, CSE: 10}),
    _smp("tu-seresnet50", {"timm SEModule": 16, CSE: 10}, shape=None),
    _smp("mobileone_s4", {"SEBlock, by structure": 12, CSE: 10}),
    _smp("timm-resnest14d", {CSE: 10}, left={"SplitAttn": 4}, why="a softmax over branches"),
    _smp("resnet18", {CSE: 8}, architecture="MAnet"),
    Peer(
        "smp", "Unet, small",
        functools.partial(
            smp.Unet, "resnet18", encoder_weights=None, encoder_depth=3, decoder_channels=(64, 32, 32),
            decoder_attention_type="scse",
        ),
        fused={CSE: 6},
    ),
)  # fmt: skip


# Their last pooling has a window of 7, and so takes an image of 224.
LARGE_IMAGE = (2, 3, 224, 224)


def _cadene(name: str, count: int, **rest: Any) -> Peer:
    build = functools.partial(getattr(pretrainedmodels, name), num_classes=5, pretrained=None)
    return Peer("pretrainedmodels", name, build, fused={LEGACY: count}, **rest)


CADENE = (
    _cadene("se_resnet50", 16, shape=LARGE_IMAGE),
    _cadene("se_resnext50_32x4d", 16, shape=None),
    _cadene("senet154", 50, shape=None),
    Peer(
        "pretrainedmodels", "SENet, small",
        functools.partial(
            cadene_senet.SENet, cadene_senet.SEResNetBottleneck, [1, 1, 1, 1], groups=1, reduction=16, inplanes=64,
            input_3x3=False, downsample_kernel_size=1, downsample_padding=0, num_classes=5,
        ),
        fused={LEGACY: 4}, shape=LARGE_IMAGE,
    ),
)  # fmt: skip


def _pytorchcv(name: str, count: int, shape: Any = LARGE_IMAGE, **rest: Any) -> Peer:
    fused = {"SEBlock, by structure": count} if count else {}
    build = functools.partial(pytorchcv_model, name, pretrained=False)
    return Peer("pytorchcv", name, build, fused=fused, shape=shape, **rest)


PYTORCHCV = (
    _pytorchcv("seresnet10", 4),
    _pytorchcv("seresnet50", 16, shape=None),
    _pytorchcv("senet154", 50, shape=None),
    _pytorchcv("mobilenetv3_small_w7d20", 9),
    _pytorchcv("regnety002", 13),
    _pytorchcv("efficientnet_b0", 16, shape=None),
    _pytorchcv("ghostnet", 7),
    _pytorchcv("fishnet99", 0, left={"PreSEAttBlock": 1}, why=WITH_NORM),
    _pytorchcv("cbam_resnet18", 0, left={"CbamBlock": 8}, why="two squeezes"),
)


def _openmmlab(name: str, variant: Any, count: int, **rest: Any) -> Peer:
    build = functools.partial(getattr(openmmlab, name), variant)
    return Peer("mmpretrain", f"{name} {variant}", build, fused={"OpenMMLab SELayer": count}, **rest)


OPENMMLAB = (
    _openmmlab("SEResNet", 50, 16, on_meta=False),
    _openmmlab("SEResNeXt", 101, 33, shape=None, on_meta=False),
    _openmmlab("MobileNetV3", "small", 9),
    _openmmlab("EfficientNet", "b0", 16, on_meta=False),
    _openmmlab("EfficientNetV2", "s", 30, shape=None, on_meta=False),
)

PEERS = (*TIMM, *TORCHVISION, *MONAI, *TRANSFORMERS, *SMP, *CADENE, *PYTORCHCV, *OPENMMLAB)

# One small network of each library, for what need not be tried with all of them.
_SMALL = {
    "timm-test_byobnet", "torchvision-mobilenet_v3_small", "MONAI-SENet_3-D_small",
    "transformers-RegNetForImageClassification_small", "smp-Unet_small",
    "pretrainedmodels-SENet_small", "pytorchcv-seresnet10", "mmpretrain-MobileNetV3_small",
}  # fmt: skip
REPRESENTATIVES = tuple(peer for peer in PEERS if str(peer) in _SMALL)
assert {peer.library for peer in REPRESENTATIVES} == {peer.library for peer in PEERS}
