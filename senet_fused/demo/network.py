"""The demo's network: a small bottleneck SE-ResNet (Hu et al. 2018) whose SE layers the caller makes."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

__all__ = ["WIDTHS", "Bottleneck", "SEResNet", "SeparateTail", "TutorialSE"]

# Widths of the 3x3 convolutions and blocks of each stage; the SE layers see four times as many channels.
WIDTHS = (16, 32, 64)
BLOCKS = (1, 1, 2)
EXPANSION = 4
CLASSES = 10


class TutorialSE(nn.Module):
    """The SE layer most repositories have, ``SELayer(channel, reduction=16)``, in PyTorch's own operators.

    x and the result are [N, C, H, W]; the weights are ``fc.0.weight`` [R, C] and ``fc.2.weight`` [C, R] with
    R = channel // reduction, and no biases.
    """

    def __init__(self, channel: int, reduction: int = 16) -> None:
        super().__init__()
        self.avg_pool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Sequential(
            nn.Linear(channel, channel // reduction, bias=False),
            nn.ReLU(inplace=True),
            nn.Linear(channel // reduction, channel, bias=False),
            nn.Sigmoid(),
        )

    def forward(self, x: Tensor) -> Tensor:
        n, c = x.shape[:2]
        gate = self.fc(self.avg_pool(x).view(n, c))
        return x * gate.view(n, c, 1, 1)


def run_tail(norm: nn.Module, se: nn.Module, act: nn.Module, x: Tensor, shortcut: Tensor) -> Tensor:
    """act(se(norm(x)) + shortcut), module by module; an SE layer with a post_act does what follows it, too."""
    y = norm(x)
    if getattr(se, "post_act", None) is not None:
        return se(y, shortcut)
    y = se(y)
    y += shortcut
    return act(y)


class SeparateTail(nn.Module):
    """The end of a block as a module of its own, called as FusedSETail is: ``tail(x, shortcut)``."""

    def __init__(self, norm: nn.Module, se: nn.Module, act: nn.Module) -> None:
        super().__init__()
        self.norm, self.se, self.act = norm, se, act

    def forward(self, x: Tensor, shortcut: Tensor) -> Tensor:
        return run_tail(self.norm, self.se, self.act, x, shortcut)


class Bottleneck(nn.Module):
    """relu(SE(BN(conv 1x1(relu(BN(conv 3x3(relu(BN(conv 1x1(x))))))))) + shortcut(x)), as in SE-ResNet-50.

    Its children are called what they are in the SENets that most repositories copy, a form of block that
    ``senet_fused.fuse(network, tails=True)`` knows.
    """

    def __init__(self, inputs: int, width: int, stride: int, make_se: Callable[[int], nn.Module]) -> None:
        super().__init__()
        outputs = EXPANSION * width
        self.conv1 = nn.Conv2d(inputs, width, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, stride, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv3 = nn.Conv2d(width, outputs, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(outputs)
        self.relu = nn.ReLU(inplace=True)
        self.downsample: nn.Module | None = None
        if stride != 1 or inputs != outputs:
            self.downsample = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))
        self.se_module = make_se(outputs)

    def branches(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """What the block's tail is called with: the last convolution's output, and the shortcut."""
        y = self.relu(self.bn1(self.conv1(x)))
        y = self.relu(self.bn2(self.conv2(y)))
        return self.conv3(y), x if self.downsample is None else self.downsample(x)

    def forward(self, x: Tensor) -> Tensor:
        return run_tail(self.bn3, self.se_module, self.relu, *self.branches(x))


class SEResNet(nn.Module):
    """A bottleneck SE-ResNet for images [N, 1, H, W]; returns logits [N, 10].

    ``make_se(channels)`` makes the SE layer of each block: ``TutorialSE``, ``FusedSE``, or ``FusedSE(channels,
    post_act="relu")``, which takes the shortcut and the ReLU into its own passes.
    """

    def __init__(self, make_se: Callable[[int], nn.Module]) -> None:
        super().__init__()
        channels = WIDTHS[0]
        layers: list[nn.Module] = [
            nn.Conv2d(1, channels, 3, padding=1, bias=False),
            nn.BatchNorm2d(channels),
            nn.ReLU(inplace=True),
        ]
        for stage, (width, blocks) in enumerate(zip(WIDTHS, BLOCKS, strict=True)):
            for block in range(blocks):
                stride = 2 if stage > 0 and block == 0 else 1
                layers.append(Bottleneck(channels, width, stride, make_se))
                channels = EXPANSION * width
        self.features = nn.Sequential(*layers)
        self.classifier = nn.Linear(channels, CLASSES)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.features(x).mean((2, 3)))

    def depth(self) -> int:
        """Convolutions and linear layers on the longest path, by which ResNets are named."""
        return 2 + 3 * len(self.blocks())

    def blocks(self) -> list[Bottleneck]:
        """First block first."""
        return [block for block in self.features if isinstance(block, Bottleneck)]

    def se_layers(self) -> list[nn.Module]:
        """The SE layer of each block."""
        return [block.se_module for block in self.blocks()]

    def tail_inputs(self, x: Tensor) -> list[tuple[Tensor, Tensor]]:
        """What the tail of each block is called with when the network runs on x."""
        found = []
        with torch.no_grad():
            for layer in self.features:
                if isinstance(layer, Bottleneck):
                    found.append(layer.branches(x))
                x = layer(x)
        return found
