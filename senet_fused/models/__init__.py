"""Networks of the Squeeze-and-Excitation papers with fused layers and block tails.

>>> model = senet_fused.models.senet154(se="tails")            # or create_model("senet154", se="tails")
>>> twin = senet_fused.models.senet154(se=None)                # the same code without SE layers
>>> model.load_state_dict(timm.create_model("legacy_senet154", pretrained=True).state_dict())
"""

from __future__ import annotations

import difflib
from collections.abc import Callable
from typing import Any, TypeVar

from torch import nn

from .bn_inception import BNInception
from .caffe import CaffeResult, caffe_names, load_caffe
from .layers import SE_CHOICES
from .mobilenet import MobileNet
from .senet import STRATEGIES, SENet, basic, bottleneck, resnext, senet

__all__ = [
    "SE_CHOICES", "STRATEGIES", "BNInception", "CaffeResult", "MobileNet", "SENet", "caffe_names", "create_model",
    "load_caffe", "model_names", "se_bn_inception", "se_mobilenet", "se_resnet18", "se_resnet20", "se_resnet34",
    "se_resnet50", "se_resnet56", "se_resnet101", "se_resnet110", "se_resnet152", "se_resnext50_32x4d",
    "se_resnext101_32x4d", "senet154",
]  # fmt: skip

_MODELS: dict[str, Callable[..., nn.Module]] = {}
_Make = TypeVar("_Make", bound=Callable[..., nn.Module])


def _model(make: _Make) -> _Make:
    _MODELS[make.__name__] = make
    return make


@_model
def senet154(dropout: float = 0.2, **options: Any) -> SENet:
    """SENet-154 (section 6.1 and appendix): 115.09 M parameters, 6.63 M of them the SE layers'. Options: SENet's."""
    return SENet(
        senet, (3, 8, 36, 3), groups=64, stem="deep", stem_channels=128, downsample_size=3, dropout=dropout, **options
    )


@_model
def se_resnet18(act_before_se: bool = True, **options: Any) -> SENet:
    """SE-ResNet-18, by default as timm's legacy model: ReLU in front of the SE layer. Options: SENet's."""
    return SENet(basic, (2, 2, 2, 2), expansion=1, act_before_se=act_before_se, **options)


@_model
def se_resnet34(act_before_se: bool = True, **options: Any) -> SENet:
    """SE-ResNet-34, by default as timm's legacy model: ReLU in front of the SE layer. Options: SENet's."""
    return SENet(basic, (3, 4, 6, 3), expansion=1, act_before_se=act_before_se, **options)


@_model
def se_resnet50(**options: Any) -> SENet:
    """SE-ResNet-50: 28.09 M parameters. Options: SENet's."""
    return SENet(bottleneck, (3, 4, 6, 3), **options)


@_model
def se_resnet101(**options: Any) -> SENet:
    """SE-ResNet-101: 49.33 M parameters. Options: SENet's."""
    return SENet(bottleneck, (3, 4, 23, 3), **options)


@_model
def se_resnet152(**options: Any) -> SENet:
    """SE-ResNet-152: 66.82 M parameters. Options: SENet's."""
    return SENet(bottleneck, (3, 8, 36, 3), **options)


@_model
def se_resnext50_32x4d(**options: Any) -> SENet:
    """SE-ResNeXt-50 32x4d: 27.56 M parameters. Options: SENet's."""
    return SENet(resnext, (3, 4, 6, 3), groups=32, **options)


@_model
def se_resnext101_32x4d(**options: Any) -> SENet:
    """SE-ResNeXt-101 32x4d: 48.96 M parameters. Options: SENet's."""
    return SENet(resnext, (3, 4, 23, 3), groups=32, **options)


def _for_small_images(depth: int, **options: Any) -> SENet:
    depths, options = ((depth - 2) // 6,) * 3, {"num_classes": 10, **options}
    return SENet(basic, depths, planes=16, expansion=1, stem="small", stem_channels=16, **options)


@_model
def se_resnet20(**options: Any) -> SENet:
    """SE-ResNet-20 for images of 32 x 32 (He et al. 2016, section 4.2), 10 classes. Options: SENet's."""
    return _for_small_images(20, **options)


@_model
def se_resnet56(**options: Any) -> SENet:
    """SE-ResNet-56 for images of 32 x 32 (He et al. 2016, section 4.2), 10 classes. Options: SENet's."""
    return _for_small_images(56, **options)


@_model
def se_resnet110(**options: Any) -> SENet:
    """SE-ResNet-110 for images of 32 x 32 (Hu et al. 2018, section 5.1, CIFAR), 10 classes. Options: SENet's."""
    return _for_small_images(110, **options)


@_model
def se_bn_inception(**options: Any) -> BNInception:
    """SE-BN-Inception (section 6.1): 11.94 M parameters, 0.65 M of them the SE layers'. Options: BNInception's."""
    return BNInception(**options)


@_model
def se_mobilenet(width: float = 1.0, **options: Any) -> MobileNet:
    """SE-MobileNet (section 6.1): 4.72 M parameters, 0.49 M of them the SE layers'. Options: MobileNet's."""
    return MobileNet(width, **options)


def model_names() -> tuple[str, ...]:
    """The names that :func:`create_model` knows."""
    return tuple(_MODELS)


def create_model(name: str, **options: Any) -> nn.Module:
    """The network of this name, with random weights; ``create_model("senet154", se=None)`` is ``senet154(se=None)``.

    Raises:
        ValueError: an unknown name (the message has similar ones), or an option that the network refuses.
    """
    if name not in _MODELS:
        close = difflib.get_close_matches(name, _MODELS, n=3)
        similar = f"; similar: {', '.join(close)}" if close else ""
        raise ValueError(f"there is no network {name!r} in senet_fused.models{similar}; known: {', '.join(_MODELS)}")
    try:
        return _MODELS[name](**options)
    except TypeError as error:
        _, unexpected, option = str(error).partition("got an unexpected keyword argument ")
        if not unexpected:
            raise
        raise ValueError(f"{name} has no option {option}; help(senet_fused.models.{name}) lists them") from None
