"""The demo's network: a small bottleneck SE-ResNet (Hu et al. 2018) whose SE layers the caller makes."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

__all__ = ["WIDTHS", "SEResNet", "SeparateTail", "TutorialSE", "inputs_of"]

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


class SeparateTail(nn.Module):
    """What follows a block's last BatchNorm: an SE layer, then ``+ shortcut`` and ReLU, both in place."""

    def __init__(self, se: nn.Module) -> None:
        super().__init__()
        self.se = se

    def forward(self, x: Tensor, shortcut: Tensor) -> Tensor:
        y = self.se(x)
        y += shortcut
        return y.relu_()


class Bottleneck(nn.Module):
    """relu(SE(BN(conv 1x1(relu(BN(conv 3x3(relu(BN(conv 1x1(x))))))))) + shortcut(x)), as in SE-ResNet-50."""

    def __init__(self, inputs: int, width: int, stride: int, make_tail: Callable[[int], nn.Module]) -> None:
        super().__init__()
        outputs = EXPANSION * width
        self.body = nn.Sequential(
            nn.Conv2d(inputs, width, 1, bias=False),
            nn.BatchNorm2d(width),
            nn.ReLU(inplace=True),
            nn.Conv2d(width, width, 3, stride, 1, bias=False),
            nn.BatchNorm2d(width),
            nn.ReLU(inplace=True),
            nn.Conv2d(width, outputs, 1, bias=False),
            nn.BatchNorm2d(outputs),
        )
        self.shortcut = nn.Sequential()
        if stride != 1 or inputs != outputs:
            self.shortcut = nn.Sequential(
                nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs)
            )
        self.tail = make_tail(outputs)

    def forward(self, x: Tensor) -> Tensor:
        return self.tail(self.body(x), self.shortcut(x))


class SEResNet(nn.Module):
    """A bottleneck SE-ResNet for images [N, 1, H, W]; returns logits [N, 10].

    ``make_tail(channels)`` makes the module that each block ends in; it is called as ``tail(x, shortcut)``:
    ``SeparateTail(TutorialSE(channels))``, ``SeparateTail(FusedSE(channels))``, or ``FusedSE(channels,
    post_act="relu")``, which takes the shortcut and the ReLU into its own passes.
    """

    def __init__(self, make_tail: Callable[[int], nn.Module]) -> None:
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
                layers.append(Bottleneck(channels, width, stride, make_tail))
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
        return 2 + 3 * len(self.tails())

    def tails(self) -> list[nn.Module]:
        """The module each block ends in, first block first."""
        return [block.tail for block in self.features if isinstance(block, Bottleneck)]

    def se_layers(self) -> list[nn.Module]:
        """The SE layer of each block, where it stands apart from the rest of the tail."""
        return [tail.se for tail in self.tails() if isinstance(tail, SeparateTail)]


def inputs_of(modules: list[nn.Module], network: nn.Module, x: Tensor) -> list[tuple[Tensor, ...]]:
    """What each of the modules is called with when network(x) runs: copies with the same strides."""
    seen: dict[nn.Module, tuple[Tensor, ...]] = {}

    def keep(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        seen[module] = tuple(arg.detach().clone(memory_format=torch.preserve_format) for arg in args)

    hooks = [module.register_forward_pre_hook(keep) for module in modules]
    try:
        network(x)
    finally:
        for hook in hooks:
            hook.remove()
    return [seen[module] for module in modules]
