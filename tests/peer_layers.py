"""SE layers as other people write them, after their structure: names, kinds and order of the children, and forward."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F


class TutorialSE(nn.Module):
    def __init__(self, channel, reduction=16):
        super().__init__()
        self.avg_pool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Sequential(
            nn.Linear(channel, channel // reduction, bias=False),
            nn.ReLU(inplace=True),
            nn.Linear(channel // reduction, channel, bias=False),
            nn.Sigmoid(),
        )

    def forward(self, x):
        n, c, _, _ = x.shape
        return x * self.fc(self.avg_pool(x).view(n, c)).view(n, c, 1, 1).expand_as(x)


class TorchvisionSE(nn.Module):
    def __init__(self, channels, squeeze_channels, activation=nn.ReLU, scale_activation=nn.Sigmoid):
        super().__init__()
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc1 = nn.Conv2d(channels, squeeze_channels, 1)
        self.fc2 = nn.Conv2d(squeeze_channels, channels, 1)
        self.activation, self.scale_activation = activation(), scale_activation()

    def forward(self, x):
        return self.scale_activation(self.fc2(self.activation(self.fc1(self.avgpool(x))))) * x


class OwnSigmoid(nn.Module):
    def __init__(self, inplace=False):
        super().__init__()
        self.inplace = inplace

    def forward(self, x):
        return x.sigmoid_() if self.inplace else x.sigmoid()


class OwnHardSigmoid(nn.Module):
    def forward(self, x):
        return F.relu6(x + 3.0) / 6.0


class OwnSwish(nn.Module):
    def __init__(self, inplace=False):
        super().__init__()
        self.inplace = inplace

    def forward(self, x):
        return x.mul_(x.sigmoid()) if self.inplace else x.mul(x.sigmoid())


class TimmSEModule(nn.Module):
    def __init__(self, channels, reduced, add_maxpool=False, bias=True, act=nn.ReLU, norm=nn.Identity, gate=OwnSigmoid):
        super().__init__()
        self.add_maxpool = add_maxpool
        self.fc1 = nn.Conv2d(channels, reduced, 1, bias=bias)
        self.bn = norm(reduced)
        self.act = act(inplace=True)
        self.fc2 = nn.Conv2d(reduced, channels, 1, bias=bias)
        self.gate = gate()

    def forward(self, x):
        pooled = x.mean((2, 3), keepdim=True)
        if self.add_maxpool:
            pooled = 0.5 * pooled + 0.5 * x.amax((2, 3), keepdim=True)
        return x * self.gate(self.fc2(self.act(self.bn(self.fc1(pooled)))))


class TimmSqueezeExcite(nn.Module):
    def __init__(self, channels, reduced, act=nn.SiLU, gate=nn.Sigmoid):
        super().__init__()
        self.conv_reduce = nn.Conv2d(channels, reduced, 1)
        self.act1 = act(inplace=True)
        self.conv_expand = nn.Conv2d(reduced, channels, 1)
        self.gate = gate()

    def forward(self, x):
        return x * self.gate(self.conv_expand(self.act1(self.conv_reduce(x.mean((2, 3), keepdim=True)))))


class TimmSqueezeExciteCl(nn.Module):
    """For tensors [N, H, W, C]."""

    def __init__(self, channels, reduced, act=nn.ReLU, gate=OwnSigmoid):
        super().__init__()
        self.fc1 = nn.Linear(channels, reduced)
        self.act = act(inplace=True)
        self.fc2 = nn.Linear(reduced, channels)
        self.gate = gate()

    def forward(self, x):
        return x * self.gate(self.fc2(self.act(self.fc1(x.mean((1, 2), keepdims=True)))))


class LegacySE(nn.Module):
    def __init__(self, channels, reduction):
        super().__init__()
        self.fc1 = nn.Conv2d(channels, channels // reduction, 1)
        self.relu = nn.ReLU(inplace=True)
        self.fc2 = nn.Conv2d(channels // reduction, channels, 1)
        self.sigmoid = nn.Sigmoid()

    def forward(self, x):
        return x * self.sigmoid(self.fc2(self.relu(self.fc1(x.mean((2, 3), keepdim=True)))))


class MonaiSE(nn.Module):
    def __init__(self, spatial_dims, channels, r=2, acts=(nn.ReLU, nn.Sigmoid), add_residual=False):
        super().__init__()
        self.add_residual = add_residual
        self.avg_pool = (nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d)[spatial_dims - 1](1)
        self.fc = nn.Sequential(
            nn.Linear(channels, channels // r), acts[0](), nn.Linear(channels // r, channels), acts[1]()
        )

    def forward(self, x):
        n, c = x.shape[:2]
        y = x * self.fc(self.avg_pool(x).view(n, c)).view(n, c, *(1,) * (x.dim() - 2))
        return y + x if self.add_residual else y


class ConvModule(nn.Module):
    def __init__(self, channels_in, channels_out, activate):
        super().__init__()
        self.conv = nn.Conv2d(channels_in, channels_out, 1)
        self.activate = activate

    def forward(self, x):
        return self.activate(self.conv(x))


class MMPretrainSE(nn.Module):
    def __init__(self, channels, squeeze_channels, acts=(nn.ReLU, nn.Sigmoid), return_weight=False):
        super().__init__()
        self.global_avgpool = nn.AdaptiveAvgPool2d(1)
        self.conv1 = ConvModule(channels, squeeze_channels, acts[0]())
        self.conv2 = ConvModule(squeeze_channels, channels, acts[1]())
        self.return_weight = return_weight

    def forward(self, x):
        gate = self.conv2(self.conv1(self.global_avgpool(x)))
        return gate if self.return_weight else x * gate


class NvidiaSE(nn.Module):
    """Returns the gate only; its caller multiplies."""

    def __init__(self, channels, squeeze, activation=nn.ReLU):
        super().__init__()
        self.squeeze = nn.Linear(channels, squeeze)
        self.expand = nn.Linear(squeeze, channels)
        self.activation, self.sigmoid = activation(inplace=True), nn.Sigmoid()

    def forward(self, x):
        out = self.sigmoid(self.expand(self.activation(self.squeeze(x.mean((2, 3))))))
        return out.view(x.size(0), x.size(1), 1, 1)


class RegNetSE(nn.Module):
    """transformers'."""

    def __init__(self, channels, reduced):
        super().__init__()
        self.pooler = nn.AdaptiveAvgPool2d((1, 1))
        self.attention = nn.Sequential(
            nn.Conv2d(channels, reduced, 1), nn.ReLU(), nn.Conv2d(reduced, channels, 1), nn.Sigmoid()
        )

    def forward(self, hidden_state):
        return hidden_state * self.attention(self.pooler(hidden_state))


class EfficientNetSE(nn.Module):
    """transformers'."""

    def __init__(self, channels, reduced, act=nn.SiLU):
        super().__init__()
        self.squeeze = nn.AdaptiveAvgPool2d(1)
        self.reduce = nn.Conv2d(channels, reduced, 1, padding="same")
        self.expand = nn.Conv2d(reduced, channels, 1, padding="same")
        self.act_reduce, self.act_expand = act(), nn.Sigmoid()

    def forward(self, hidden_states):
        gate = self.act_expand(self.expand(self.act_reduce(self.reduce(self.squeeze(hidden_states)))))
        return torch.mul(hidden_states, gate)


class SCSE(nn.Module):
    """segmentation_models.pytorch's: a channel and a spatial gate."""

    def __init__(self, channels, reduction=16):
        super().__init__()
        self.cSE = nn.Sequential(
            nn.AdaptiveAvgPool2d(1),
            nn.Conv2d(channels, channels // reduction, 1),
            nn.ReLU(inplace=True),
            nn.Conv2d(channels // reduction, channels, 1),
            nn.Sigmoid(),
        )
        self.sSE = nn.Sequential(nn.Conv2d(channels, 1, 1), nn.Sigmoid())

    def forward(self, x):
        return x * self.cSE(x) + x * self.sSE(x)


class MaxPooled(nn.Module):
    """Of no family: functions and names of its own, a maximum for the squeeze."""

    def __init__(self, channels, reduced):
        super().__init__()
        self.pool = nn.AdaptiveMaxPool2d(1)
        self.down = nn.Conv2d(channels, reduced, 1, bias=False)
        self.up = nn.Conv2d(reduced, channels, 1)

    def forward(self, x):
        return x * F.hardsigmoid(self.up(F.silu(self.down(self.pool(x)))))
