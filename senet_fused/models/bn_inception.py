"""SE-BN-Inception (Ioffe and Szegedy 2015 with SE layers), under the keys of Cadene's BN-Inception."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn

from .layers import Layers, check_rate, initialise

__all__ = ["MODULES", "BNInception", "Inception"]


class Inception(NamedTuple):
    """Channels of an inception module's branches: a 1x1; a 1x1 and a 3x3; a 1x1 and two 3x3; a pool and a 1x1.

    Without the first 1x1 and the pool's (0) the module halves the plane, and its pool goes into the output as it is.
    """

    one: int
    three: tuple[int, int]
    double: tuple[int, int]
    pool: str
    projection: int

    @property
    def stride(self) -> int:
        return 1 if self.projection else 2

    def channels(self, c_in: int) -> int:
        """Of the output, in the order one, three, double, pool."""
        return self.one + self.three[1] + self.double[1] + (self.projection or c_in)


# Figure 5 of Ioffe and Szegedy 2015, with the numbers of the Caffe networks; 4d has 96 + 192 + 192 + 128 channels, as
# its successor 4e takes them.
MODULES = {
    "3a": Inception(64, (64, 64), (64, 96), "avg", 32),
    "3b": Inception(64, (64, 96), (64, 96), "avg", 64),
    "3c": Inception(0, (128, 160), (64, 96), "max", 0),
    "4a": Inception(224, (64, 96), (96, 128), "avg", 128),
    "4b": Inception(192, (96, 128), (96, 128), "avg", 128),
    "4c": Inception(160, (128, 160), (128, 160), "avg", 128),
    "4d": Inception(96, (128, 192), (160, 192), "avg", 128),
    "4e": Inception(0, (128, 192), (192, 256), "max", 0),
    "5a": Inception(352, (192, 320), (160, 224), "avg", 128),
    "5b": Inception(352, (192, 320), (192, 224), "max", 128),
}


def _pool(kind: str, stride: int) -> nn.Module:
    if kind == "avg":
        return nn.AvgPool2d(3, stride=1, padding=1)  # zeros count, in Caffe too
    # Caffe rounds the output sizes of a pool up.
    return nn.MaxPool2d(3, stride=stride, padding=1 if stride == 1 else 0, ceil_mode=True)


class BNInception(nn.Module):
    """BN-Inception with an SE layer after the concatenation of each inception module (Hu et al. 2018, figure 2).

    Convolutions and BatchNorms are children of the network under the names of Cadene's pretrained-models
    (``inception_3a_double_3x3_1``, ``inception_3a_double_3x3_1_bn``), ``last_linear`` is the classifier, and the SE
    layers are ``inception_3a_se`` to ``inception_5b_se`` with ``fc1`` and ``fc2``. So Cadene's checkpoint loads
    strictly into the twin (``se=None``). Where ours differs from Cadene's: the global average is over any plane, not
    over 7 x 7. Where Cadene's, and ours with ``conv_bias``, differ from the Caffe network of the SE paper: its
    convolutions have no biases. A ReLU stands between a BatchNorm and the concatenation, so no SE layer is part of a
    tail: with ``se="tails"`` it runs fused behind the tails.

    Weights are random: He et al. 2015's normal distribution for convolutions, by fan-out.

    Args:
        modules: the inception modules by their names, in their order.
        stem: channels of the 7x7, and of the 1x1 and the 3x3 after the first pool.
        num_classes: of the last layer; 0 for features [N, C] instead.
        in_chans: channels of an image.
        se: "fused", FusedSE; "tails", and every BatchNorm -> ReLU as a block tail; "reference", PyTorch's own
            operators; None, the twin without SE layers.
        reduction, squeeze, act, gate, backend: of the SE layers, as FusedSE's.
        dropout: rate in front of the last layer.
        conv_bias: whether convolutions have biases, which the BatchNorms after them cancel.

    Raises:
        ValueError: an unknown name, or a number out of range; the message says which. Of ``forward``: images whose
            plane is odd where it is to be halved; multiples of 32 pixels never are.
    """

    def __init__(
        self,
        modules: Mapping[str, Inception] = MODULES,
        *,
        stem: tuple[int, int, int] = (64, 64, 192),
        num_classes: int = 1000,
        in_chans: int = 3,
        se: str | None = "fused",
        reduction: int = 16,
        squeeze: str = "avg",
        act: str = "relu",
        gate: str = "sigmoid",
        backend: str | None = None,
        dropout: float = 0.0,
        conv_bias: bool = True,
    ) -> None:
        super().__init__()
        check_rate("dropout", dropout)
        self._layers, self._bias = Layers(se, reduction, squeeze, act, gate, backend), conv_bias
        self.default_cfg = {"input_size": (in_chans, 224, 224)}
        self.relu = nn.ReLU(inplace=True)
        self._add_conv("conv1_7x7_s2", in_chans, stem[0], 7, 2)
        self.pool1_3x3_s2 = _pool("max", 2)
        self._add_conv("conv2_3x3_reduce", stem[0], stem[1], 1)
        self._add_conv("conv2_3x3", stem[1], stem[2], 3)
        self.pool2_3x3_s2 = _pool("max", 2)
        self._inceptions, channels = dict(modules), stem[2]
        for name, inception in self._inceptions.items():
            channels = self._add_inception(f"inception_{name}", channels, inception)
        self.dropout = nn.Dropout(dropout)
        self.last_linear = nn.Linear(channels, num_classes) if num_classes else nn.Identity()
        initialise(self)

    def _add_conv(self, name: str, c_in: int, c_out: int, size: int, stride: int = 1) -> None:
        self.add_module(name, nn.Conv2d(c_in, c_out, size, stride=stride, padding=size // 2, bias=self._bias))
        self.add_module(f"{name}_bn", nn.BatchNorm2d(c_out))
        self.add_module(f"{name}_tail", self._layers.tail(self, self._modules[f"{name}_bn"], None, self.relu))

    def _add_inception(self, name: str, c_in: int, inception: Inception) -> int:
        one, three, double, pool, projection = inception
        if one:
            self._add_conv(f"{name}_1x1", c_in, one, 1)
        self._add_conv(f"{name}_3x3_reduce", c_in, three[0], 1)
        self._add_conv(f"{name}_3x3", *three, 3, inception.stride)
        self._add_conv(f"{name}_double_3x3_reduce", c_in, double[0], 1)
        self._add_conv(f"{name}_double_3x3_1", *double, 3)
        self._add_conv(f"{name}_double_3x3_2", double[1], double[1], 3, inception.stride)
        self.add_module(f"{name}_pool", _pool(pool, inception.stride))
        if projection:
            self._add_conv(f"{name}_pool_proj", c_in, projection, 1)
        channels = inception.channels(c_in)
        self.add_module(f"{name}_se", self._layers.se_layer(channels))
        return channels

    def _conv(self, name: str, x: Tensor) -> Tensor:
        return self._modules[f"{name}_tail"](self._modules[name](x))

    def _inception(self, name: str, x: Tensor, inception: Inception) -> Tensor:
        # torch.fx traces with something else than tensors, of which no size is known.
        if isinstance(x, Tensor) and inception.stride == 2 and (x.shape[-1] % 2 or x.shape[-2] % 2):
            raise ValueError(
                f"{name} halves even planes, got one of {x.shape[-2]} x {x.shape[-1]}, which its pool and its "
                "convolutions round differently; images of a multiple of 32 pixels fit"
            )
        branches = [self._conv(f"{name}_1x1", x)] if inception.one else []
        branches.append(self._conv(f"{name}_3x3", self._conv(f"{name}_3x3_reduce", x)))
        y = self._conv(f"{name}_double_3x3_1", self._conv(f"{name}_double_3x3_reduce", x))
        branches.append(self._conv(f"{name}_double_3x3_2", y))
        y = self._modules[f"{name}_pool"](x)
        branches.append(self._conv(f"{name}_pool_proj", y) if inception.projection else y)
        y, se = torch.cat(branches, 1), self._modules[f"{name}_se"]
        return y if se is None else se(y)

    def features(self, x: Tensor) -> Tensor:
        """[N, C, h, w] in front of the global average, of images [N, in_chans, H, W]."""
        x = self.pool1_3x3_s2(self._conv("conv1_7x7_s2", x))
        x = self.pool2_3x3_s2(self._conv("conv2_3x3", self._conv("conv2_3x3_reduce", x)))
        for name, inception in self._inceptions.items():
            x = self._inception(f"inception_{name}", x, inception)
        return x

    def forward(self, x: Tensor) -> Tensor:
        """Logits [N, num_classes] of images [N, in_chans, H, W]."""
        return self.last_linear(self.dropout(self.features(x).mean((2, 3))))
