"""Residual blocks with SE layers as other people write them: names, kinds and order of the children, and forward."""

from __future__ import annotations

import torch
from peer_layers import LegacySE, MonaiSE, TimmSEModule
from torch import nn


class LegacyBottleneck(nn.Module):
    """timm's and Cadene's SENet."""

    def __init__(self, inplanes=12, planes=8, stride=1, norm=nn.BatchNorm2d, se=None):
        super().__init__()
        self.conv1 = nn.Conv2d(inplanes, planes, 1, bias=False)
        self.bn1 = norm(planes)
        self.conv2 = nn.Conv2d(planes, planes, 3, stride, 1, groups=2, bias=False)
        self.bn2 = norm(planes)
        self.conv3 = nn.Conv2d(planes, 4 * planes, 1, bias=False)
        self.bn3 = norm(4 * planes)
        self.relu = nn.ReLU(inplace=True)
        self.se_module = se or LegacySE(4 * planes, 4)
        self.downsample = None
        if stride != 1 or inplanes != 4 * planes:
            self.downsample = nn.Sequential(nn.Conv2d(inplanes, 4 * planes, 1, stride, bias=False), norm(4 * planes))
        self.stride = stride

    def forward(self, x):
        shortcut = x
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.relu(self.bn2(self.conv2(out)))
        out = self.bn3(self.conv3(out))
        if self.downsample is not None:
            shortcut = self.downsample(x)
        out = self.se_module(out) + shortcut
        return self.relu(out)


class LegacyBasicBlock(nn.Module):
    """timm's SEResNetBlock: BatchNorm -> ReLU -> SE."""

    def __init__(self, planes=8):
        super().__init__()
        self.conv1 = nn.Conv2d(planes, planes, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(planes)
        self.conv2 = nn.Conv2d(planes, planes, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(planes)
        self.relu = nn.ReLU(inplace=True)
        self.se_module = LegacySE(planes, 2)
        self.downsample = None

    def forward(self, x):
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.relu(self.bn2(self.conv2(out)))
        return self.relu(self.se_module(out) + x)


class DropPath(nn.Module):
    def __init__(self, drop_prob=0.3):
        super().__init__()
        self.drop_prob = drop_prob

    def forward(self, x):
        if not self.training:
            return x
        keep = 1 - self.drop_prob
        return x * x.new_empty((x.shape[0],) + (1,) * (x.dim() - 1)).bernoulli_(keep).div_(keep)


class DropBlock(nn.Module):
    def forward(self, x):
        return x * (torch.rand_like(x) > 0.2) if self.training else x


class TimmBottleneck(nn.Module):
    """timm.models.resnet."""

    def __init__(
        self, inplanes=12, planes=8, stride=1, act=nn.ReLU, norm=nn.BatchNorm2d, se=TimmSEModule, aa=False,
        drop_block=nn.Identity, drop_path=None,
    ):  # fmt: skip
        super().__init__()
        self.conv1 = nn.Conv2d(inplanes, planes, 1, bias=False)
        self.bn1 = norm(planes)
        self.act1 = act(inplace=True)
        self.conv2 = nn.Conv2d(planes, planes, 3, 1 if aa else stride, 1, bias=False)
        self.bn2 = norm(planes)
        self.drop_block = drop_block()
        self.act2 = act(inplace=True)
        self.aa = nn.AvgPool2d(2, stride, ceil_mode=True) if aa else nn.Identity()
        self.conv3 = nn.Conv2d(planes, 4 * planes, 1, bias=False)
        self.bn3 = norm(4 * planes)
        self.se = se and se(4 * planes, 8)
        self.act3 = act(inplace=True)
        self.downsample = None
        if stride != 1 or inplanes != 4 * planes:
            pool = nn.AvgPool2d(2, stride, ceil_mode=True) if stride != 1 else nn.Identity()
            self.downsample = nn.Sequential(pool, nn.Conv2d(inplanes, 4 * planes, 1, bias=False), norm(4 * planes))
        self.drop_path = drop_path

    def forward(self, x):
        shortcut = x
        x = self.act1(self.bn1(self.conv1(x)))
        x = self.aa(self.act2(self.drop_block(self.bn2(self.conv2(x)))))
        x = self.bn3(self.conv3(x))
        if self.se is not None:
            x = self.se(x)
        if self.drop_path is not None:
            x = self.drop_path(x)
        if self.downsample is not None:
            shortcut = self.downsample(shortcut)
        x += shortcut
        return self.act3(x)


class TimmBasicBlock(nn.Module):
    def __init__(self, planes=8, drop_path=None):
        super().__init__()
        self.conv1 = nn.Conv2d(planes, planes, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(planes)
        self.drop_block = nn.Identity()
        self.act1 = nn.ReLU(inplace=True)
        self.aa = nn.Identity()
        self.conv2 = nn.Conv2d(planes, planes, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(planes)
        self.se = TimmSEModule(planes, 4)
        self.act2 = nn.ReLU(inplace=True)
        self.downsample = None
        self.drop_path = drop_path

    def forward(self, x):
        shortcut = x
        x = self.aa(self.act1(self.drop_block(self.bn1(self.conv1(x)))))
        x = self.se(self.bn2(self.conv2(x)))
        if self.drop_path is not None:
            x = self.drop_path(x)
        x += shortcut
        return self.act2(x)


def _monai_convolution(conv, norm, inputs, outputs, kernel, act=True):
    adn = nn.Sequential()
    adn.add_module("N", norm(outputs))
    if act:
        adn.add_module("A", nn.ReLU(inplace=True))
    convolution = nn.Sequential()
    convolution.add_module("conv", conv(inputs, outputs, kernel, padding=kernel // 2, bias=False))
    convolution.add_module("adn", adn)
    return convolution


class MonaiBlock(nn.Module):
    """monai.networks.blocks.SEBottleneck."""

    def __init__(self, dimensions=3, inplanes=12, planes=8):
        super().__init__()
        conv = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[dimensions - 1]
        norm = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)[dimensions - 1]
        self.conv1 = _monai_convolution(conv, norm, inplanes, planes, 1)
        self.conv2 = _monai_convolution(conv, norm, planes, planes, 3)
        self.conv3 = _monai_convolution(conv, norm, planes, 4 * planes, 1, act=False)
        self.se_layer = MonaiSE(dimensions, 4 * planes, r=4)
        self.project = nn.Identity()
        if inplanes != 4 * planes:
            self.project = _monai_convolution(conv, norm, inplanes, 4 * planes, 1, act=False)
        self.act = nn.ReLU(inplace=True)

    def forward(self, x):
        residual = self.project(x)
        x = self.se_layer(self.conv3(self.conv2(self.conv1(x))))
        x += residual
        return self.act(x)
