"""SENet-154, SE-ResNet and SE-ResNeXt (Hu et al. 2018), under the keys of timm's legacy models and Cadene's."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from .layers import Layers, SeparateTail, ShortcutConv, check_rate, initialise, kept_samples

__all__ = ["STRATEGIES", "Block", "SENet"]

# Where the SE layer of a residual block stands (Hu et al. 2018, section 6.5 and figure 5).
STRATEGIES = ("standard", "pre", "post", "identity")


def _conv(c_in: int, c_out: int, size: int, stride: int = 1, groups: int = 1) -> nn.Conv2d:
    return nn.Conv2d(c_in, c_out, size, stride=stride, padding=size // 2, groups=groups, bias=False)


# The convolutions of a block: (C in, planes, groups, stride) -> two or three, in their order. Stride and widths
# are where the original Caffe networks have them; torchvision's ResNet-50 has its stride in the 3x3.
Convolutions = Callable[[int, int, int, int], list[nn.Conv2d]]


def basic(c_in: int, planes: int, groups: int, stride: int) -> list[nn.Conv2d]:
    """Two 3x3 convolutions, expansion 1."""
    return [_conv(c_in, planes, 3, stride), _conv(planes, planes, 3, groups=groups)]


def bottleneck(c_in: int, planes: int, groups: int, stride: int) -> list[nn.Conv2d]:
    """SE-ResNet's: stride in the first 1x1."""
    return [_conv(c_in, planes, 1, stride), _conv(planes, planes, 3, groups=groups), _conv(planes, planes * 4, 1)]


def resnext(c_in: int, planes: int, groups: int, stride: int) -> list[nn.Conv2d]:
    """SE-ResNeXt's 32x4d: groups of 4 channels at 64 planes, stride in the 3x3."""
    width = planes * 4 // 64 * groups
    return [_conv(c_in, width, 1), _conv(width, width, 3, stride, groups), _conv(width, planes * 4, 1)]


def senet(c_in: int, planes: int, groups: int, stride: int) -> list[nn.Conv2d]:
    """SENet-154's (section 6.1): the first 1x1 has half the channels of ResNeXt's."""
    half, width = planes * 2, planes * 4
    return [_conv(c_in, half, 1), _conv(half, width, 3, stride, groups), _conv(width, width, 1)]


class Block(nn.Module):
    """A residual block with an SE layer at one of :data:`STRATEGIES`.

    With F the convolutions, each BatchNorm and ReLU but for the last one's ReLU::

        standard    relu(se(F(x)) + shortcut(x))
        pre         relu(F(se(x)) + shortcut(x))
        post        se(relu(F(x) + shortcut(x)))
        identity    relu(F(x) + se(shortcut(x)))

    Args:
        convs: F's convolutions, two or three.
        downsample: the shortcut's module, None for x itself.
        drop_path: the rate at which samples lose their branch in training (stochastic depth).
        act_before_se: relu(F(x)) before the standard SE layer, as timm's legacy SE-ResNet-18 and 34 have it. Nothing
            changes where there is no SE layer, or where it stands elsewhere.
    """

    def __init__(
        self,
        convs: list[nn.Conv2d],
        downsample: nn.Module | None,
        layers: Layers,
        strategy: str = "standard",
        drop_path: float = 0.0,
        act_before_se: bool = False,
    ) -> None:
        super().__init__()
        for number, conv in enumerate(convs, 1):
            self.add_module(f"conv{number}", conv)
            self.add_module(f"bn{number}", nn.BatchNorm2d(conv.out_channels))
        self.relu = nn.ReLU(inplace=True)
        standard = strategy == "standard"
        channels = convs[0].in_channels if strategy == "pre" else convs[-1].out_channels
        self.se_module = layers.se_layer(channels)
        self.downsample = downsample
        self.strategy, self.drop_path = strategy, drop_path
        last = len(convs)
        for number in range(1, last):
            self.add_module(f"tail{number}", layers.tail(self, getattr(self, f"bn{number}"), None, self.relu))
        norm, se = getattr(self, f"bn{last}"), self.se_module if standard else None
        if act_before_se and se is not None:
            tail = SeparateTail(layers.tail(self, norm, None, self.relu), se, self.relu, owner=self)
        else:
            tail = layers.tail(self, norm, se, self.relu)
        self.add_module(f"tail{last}", tail)
        self._last = last

    def forward(self, x: Tensor) -> Tensor:
        """[N, C_out, H, W] of x [N, C_in, H * stride, W * stride]."""
        se = self.se_module
        shortcut = x if self.downsample is None else self.downsample(x)
        if se is not None and self.strategy == "identity":
            shortcut = se(shortcut)
        y = se(x) if se is not None and self.strategy == "pre" else x
        for number in range(1, self._last):
            y = self._modules[f"tail{number}"](self._modules[f"conv{number}"](y))
        y = self._modules[f"conv{self._last}"](y)
        factor = kept_samples(y, self.drop_path) if self.training and self.drop_path > 0 else None
        y = self._modules[f"tail{self._last}"](y, shortcut, factor)
        return se(y) if se is not None and self.strategy == "post" else y

    def extra_repr(self) -> str:
        parts = [f"strategy={self.strategy}"] if self.strategy != "standard" else []
        return ", ".join(parts + ([f"drop_path={self.drop_path:.3g}"] if self.drop_path else []))


class Stem(nn.Module):
    """Convolutions, each with BatchNorm and ReLU, as children conv1, bn1, relu1, conv2, ...; then a pool, or none."""

    def __init__(self, convs: list[nn.Conv2d], pool: nn.Module | None, layers: Layers) -> None:
        super().__init__()
        for number, conv in enumerate(convs, 1):
            self.add_module(f"conv{number}", conv)
            self.add_module(f"bn{number}", nn.BatchNorm2d(conv.out_channels))
            self.add_module(f"relu{number}", nn.ReLU(inplace=True))
        self.pool = pool
        for number in range(1, len(convs) + 1):
            norm, act = getattr(self, f"bn{number}"), getattr(self, f"relu{number}")
            self.add_module(f"tail{number}", layers.tail(self, norm, None, act))
        self._count = len(convs)

    def forward(self, x: Tensor) -> Tensor:
        for number in range(1, self._count + 1):
            x = self._modules[f"tail{number}"](self._modules[f"conv{number}"](x))
        return x if self.pool is None else self.pool(x)


def _stem(kind: str, in_chans: int, channels: int) -> tuple[list[nn.Conv2d], nn.Module | None]:
    # Caffe rounds the output sizes of a pool up, and pads no 3x3 pool here.
    pool = nn.MaxPool2d(3, stride=2, ceil_mode=True)
    if kind == "7x7":
        return [_conv(in_chans, channels, 7, 2)], pool
    if kind == "deep":
        return [_conv(in_chans, 64, 3, 2), _conv(64, 64, 3), _conv(64, channels, 3)], pool
    return [_conv(in_chans, channels, 3)], None


class SENet(nn.Module):
    """A residual network with SE layers: SENet-154, SE-ResNet and SE-ResNeXt by their constructors in this package.

    Children and state-dict keys are those of timm's legacy models and Cadene's pretrained-models, whose checkpoints
    load strictly, and which load ours: layer0 to layer4 (``layer3.5.conv2.weight``), ``se_module.fc1`` and ``fc2`` in
    every block, ``last_linear``. Weights are random: He et al. 2015's normal distribution for convolutions, by fan-out.

    Args:
        convs: what makes a block's convolutions, from (C in, planes, groups, stride).
        depths: blocks in each of the stages, of which each but the first halves the plane.
        planes: of the first stage; each next one has twice as many.
        expansion: output channels of a block / its planes.
        groups: of the blocks' 3x3 convolutions.
        stem, stem_channels: "7x7" with a pool, "deep" (three 3x3, pool), or "small" (one 3x3, for 32 x 32 images).
        downsample_size: of the shortcut's convolution in all stages but the first.
        num_classes: of the last layer; 0 for features [N, C] instead.
        in_chans: channels of an image.
        se: "fused", FusedSE; "tails", and all BatchNorms with what follows as block tails; "reference", PyTorch's own
            operators; None, the twin without SE layers.
        reduction, squeeze, act, gate, backend: of the SE layers, as FusedSE's.
        strategy: where they stand, one of "standard", "pre", "post", "identity" (section 6.5).
        dropout: rate in front of the last layer.
        drop_path: stochastic depth's rate for the last block; it rises linearly from the first block's 1/L of it
            (Huang et al. 2016, equation 4: survival 1 - l/L * (1 - p_L)).
        act_before_se: a ReLU between the last BatchNorm and the SE layer, as in timm's legacy SE-ResNet-18 and 34. Such
            an SE layer cannot be part of a tail; it runs fused behind one. The twin and the other strategies have no
            such ReLU.

    Raises:
        ValueError: an unknown name, or a number out of range; the message says which.
    """

    def __init__(
        self,
        convs: Convolutions,
        depths: tuple[int, ...],
        *,
        planes: int = 64,
        expansion: int = 4,
        groups: int = 1,
        stem: str = "7x7",
        stem_channels: int = 64,
        downsample_size: int = 1,
        num_classes: int = 1000,
        in_chans: int = 3,
        se: str | None = "fused",
        reduction: int = 16,
        squeeze: str = "avg",
        act: str = "relu",
        gate: str = "sigmoid",
        backend: str | None = None,
        strategy: str = "standard",
        dropout: float = 0.0,
        drop_path: float = 0.0,
        act_before_se: bool = False,
    ) -> None:
        super().__init__()
        if strategy not in STRATEGIES:
            raise ValueError(f"strategy must be one of {', '.join(STRATEGIES)}, got {strategy!r}")
        check_rate("dropout", dropout)
        check_rate("drop_path", drop_path)
        layers = Layers(se, reduction, squeeze, act, gate, backend)
        self.default_cfg = {"input_size": (in_chans, *((32, 32) if stem == "small" else (224, 224)))}
        self.layer0 = Stem(*_stem(stem, in_chans, stem_channels), layers)
        channels, number, total = stem_channels, 0, sum(depths)
        for stage, depth in enumerate(depths, 1):
            width, blocks = planes * 2 ** (stage - 1), []
            for place in range(depth):
                stride = 2 if place == 0 and stage > 1 else 1
                downsample, number = None, number + 1
                if stride != 1 or channels != width * expansion:
                    size = downsample_size if stage > 1 else 1
                    downsample = ShortcutConv(_conv(channels, width * expansion, size, stride), layers)
                made = convs(channels, width, groups, stride)
                blocks.append(Block(made, downsample, layers, strategy, drop_path * number / total, act_before_se))
                channels = width * expansion
            self.add_module(f"layer{stage}", nn.Sequential(*blocks))
        self._stages = len(depths)
        self.dropout = nn.Dropout(dropout)
        self.last_linear = nn.Linear(channels, num_classes) if num_classes else nn.Identity()
        initialise(self)

    def features(self, x: Tensor) -> Tensor:
        """[N, C, h, w] in front of the global average, of images [N, in_chans, H, W]."""
        for stage in range(self._stages + 1):
            x = self._modules[f"layer{stage}"](x)
        return x

    def forward(self, x: Tensor) -> Tensor:
        """Logits [N, num_classes] of images [N, in_chans, H, W]."""
        return self.last_linear(self.dropout(torch.flatten(self.features(x).mean((2, 3)), 1)))
