"""Networks that tests of ``senet-fused train`` name as FILE.py:FACTORY."""

from __future__ import annotations

import torch
from peer_layers import TutorialSE
from torch import Tensor, nn

from senet_fused import FusedSE, FusedSETail


class Tiny(nn.Module):
    """Every BatchNorm in a block tail, so that it synchronises on CPUs, too; dropout and stochastic depth."""

    def __init__(
        self, num_classes: int = 10, in_chans: int = 3, drop_path_rate: float = 0.0, dropout: float = 0.0
    ) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_chans, 8, 3, padding=1, bias=False)
        self.tail1 = FusedSETail(nn.BatchNorm2d(8), None, nn.ReLU())
        self.conv2 = nn.Conv2d(8, 8, 3, padding=1, bias=False)
        self.tail2 = FusedSETail(nn.BatchNorm2d(8), FusedSE(8, 4), nn.ReLU())
        self.conv3 = nn.Conv2d(8, 16, 3, stride=2, padding=1, bias=False)
        self.tail3 = FusedSETail(nn.BatchNorm2d(16), FusedSE(16, 4), nn.ReLU())
        self.dropout = nn.Dropout(dropout)
        self.fc = nn.Linear(16, num_classes)
        self.kept = 1 - drop_path_rate

    def forward(self, x: Tensor) -> Tensor:
        x = self.tail1(self.conv1(x))
        factor = None
        if self.training and self.kept < 1:
            factor = torch.empty(len(x), device=x.device).bernoulli_(self.kept) / self.kept
        x = self.tail2(self.conv2(x), x, factor)
        return self.fc(self.dropout(self.tail3(self.conv3(x)).mean((2, 3))))


def tiny_double(num_classes: int, in_chans: int) -> nn.Module:
    return Tiny(num_classes, in_chans).double()


def tutorial(num_classes: int, in_chans: int) -> nn.Module:
    """With a BatchNorm of its own, outside of any tail."""
    return nn.Sequential(
        nn.Conv2d(in_chans, 8, 3), nn.BatchNorm2d(8), TutorialSE(8, 2), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
        nn.Linear(8, num_classes),
    )  # fmt: skip


def plain_double(num_classes: int, in_chans: int) -> nn.Module:
    """Without BatchNorm."""
    return nn.Sequential(
        nn.Conv2d(in_chans, 8, 3), nn.ReLU(), TutorialSE(8, 2), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
        nn.Linear(8, num_classes),
    ).double()  # fmt: skip


class _Counting(nn.Module):
    """A linear classifier that counts its training batches."""

    def __init__(self, num_classes: int, in_chans: int) -> None:
        super().__init__()
        self.fc = nn.Linear(in_chans, num_classes)
        self.batches = 0

    def forward(self, x: Tensor) -> Tensor:
        self.batches += self.training
        return self.fc(x.mean((2, 3)))


class Diverging(_Counting):
    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)
        return y * float("nan") if self.training and self.batches == 8 else y


class DivergingBackward(_Counting):
    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)
        if self.training and self.batches == 10:
            y.register_hook(lambda gradient: gradient * float("inf"))
        return y


class FailingInOneProcess(_Counting):
    def forward(self, x: Tensor) -> Tensor:
        if self.training and self.batches == 3 and torch.distributed.get_rank() == 1:
            raise RuntimeError("this process fails")
        return super().forward(x)


class OutOfMemory(_Counting):
    def forward(self, x: Tensor) -> Tensor:
        if self.training and self.batches == 2:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return super().forward(x)


class Unused(_Counting):
    def __init__(self, num_classes: int, in_chans: int) -> None:
        super().__init__(num_classes, in_chans)
        self.head = nn.Linear(in_chans, num_classes)


def without_parameters(num_classes: int) -> nn.Module:
    return nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten())


def one_pixel(num_classes: int, in_chans: int) -> nn.Module:
    """Its BatchNorm has one value per image and channel."""
    return nn.Sequential(
        nn.AdaptiveAvgPool2d(1), nn.Conv2d(in_chans, 8, 1), nn.BatchNorm2d(8), nn.Flatten(), nn.Linear(8, num_classes)
    )


def not_a_module() -> int:
    return 1


def failing() -> float:
    return 1 / 0


def ten_classes() -> nn.Module:
    return Tiny(10)


def one_channel() -> nn.Module:
    return Tiny(6, 1)
