"""SE-MobileNet (Howard et al. 2017, version 1, with SE layers), under the keys of timm's mobilenetv1."""

from __future__ import annotations

from torch import Tensor, nn

from .layers import Layers, check_rate, initialise

__all__ = ["MobileNet", "SeparableConv"]

# (channels, convolutions, stride of the first) of the stages behind the stem (Howard et al. 2017, table 1; the last
# convolution's stride is 1, as the sizes of its rows say).
STAGES = ((64, 1, 1), (128, 2, 2), (256, 2, 2), (512, 6, 2), (1024, 2, 2))
STEM = 32


def _scaled(channels: int, width: float) -> int:
    """channels * width as the nearest multiple of 8, at least 8, and no less than nine tenths of it."""
    exact = channels * width
    rounded = max(8, int(exact + 4) // 8 * 8)
    return rounded if rounded >= 0.9 * exact else rounded + 8


class SeparableConv(nn.Module):
    """A depthwise 3x3 and a pointwise convolution, each with BatchNorm and ReLU, and an SE layer: [N, C_out, H, W]."""

    def __init__(self, c_in: int, c_out: int, stride: int, layers: Layers) -> None:
        super().__init__()
        self.conv_dw = nn.Conv2d(c_in, c_in, 3, stride=stride, padding=1, groups=c_in, bias=False)
        self.bn1 = nn.BatchNorm2d(c_in)
        self.conv_pw = nn.Conv2d(c_in, c_out, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(c_out)
        self.relu = nn.ReLU(inplace=True)
        self.se_module = layers.se_layer(c_out)
        self.tail1 = layers.tail(self, self.bn1, None, self.relu)
        self.tail2 = layers.tail(self, self.bn2, None, self.relu)

    def forward(self, x: Tensor) -> Tensor:
        """[N, C_out, H, W] of x [N, C_in, H * stride, W * stride]."""
        y = self.tail2(self.conv_pw(self.tail1(self.conv_dw(x))))
        return y if self.se_module is None else self.se_module(y)


class MobileNet(nn.Module):
    """MobileNet with an SE layer after the last ReLU of every separable convolution (Hu et al. 2018, table 3).

    Children and keys are those of timm's ``mobilenetv1_100`` (``conv_stem``, ``bn1``, ``blocks.3.5.conv_dw``,
    ``classifier``), whose checkpoints load strictly into the twin (``se=None``); but timm's network has ReLU6, this one
    the papers' ReLU, so outputs are equal where no activation exceeds 6. The SE layers are ``se_module`` with ``fc1``
    and ``fc2`` in every block. As a ReLU is in front of them they are not part of a tail: with ``se="tails"`` they run
    fused behind one. Weights are random: He et al. 2015's normal distribution for convolutions, by fan-out.

    Args:
        width: factor of all channels but the classes' (Howard et al. 2017, section 3.3); each product is rounded to a
            multiple of 8, and to one more where that took more than a tenth away.
        num_classes: of the last layer; 0 for features [N, C] instead.
        in_chans: channels of an image.
        se: "fused", FusedSE; "tails", and every BatchNorm -> ReLU as a block tail; "reference", PyTorch's own
            operators; None, the twin without SE layers.
        reduction, squeeze, act, gate, backend: of the SE layers, as FusedSE's: R = max(1, C // reduction).
        dropout: rate in front of the last layer.

    Raises:
        ValueError: an unknown name, or a number out of range; the message says which.
    """

    def __init__(
        self,
        width: float = 1.0,
        *,
        num_classes: int = 1000,
        in_chans: int = 3,
        se: str | None = "fused",
        reduction: int = 16,
        squeeze: str = "avg",
        act: str = "relu",
        gate: str = "sigmoid",
        backend: str | None = None,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        if not width > 0:
            raise ValueError(f"width must be greater than 0, got {width!r}")
        check_rate("dropout", dropout)
        layers = Layers(se, reduction, squeeze, act, gate, backend)
        self.default_cfg = {"input_size": (in_chans, 224, 224)}
        channels = _scaled(STEM, width)
        self.conv_stem = nn.Conv2d(in_chans, channels, 3, stride=2, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.relu = nn.ReLU(inplace=True)
        self.tail1 = layers.tail(self, self.bn1, None, self.relu)
        stages = []
        for planes, depth, stride in STAGES:
            c_out, stage = _scaled(planes, width), []
            for place in range(depth):
                stage.append(SeparableConv(channels, c_out, stride if place == 0 else 1, layers))
                channels = c_out
            stages.append(nn.Sequential(*stage))
        self.blocks = nn.Sequential(*stages)
        self.dropout = nn.Dropout(dropout)
        self.classifier = nn.Linear(channels, num_classes) if num_classes else nn.Identity()
        initialise(self)

    def features(self, x: Tensor) -> Tensor:
        """[N, C, h, w] in front of the global average, of images [N, in_chans, H, W]."""
        return self.blocks(self.tail1(self.conv_stem(x)))

    def forward(self, x: Tensor) -> Tensor:
        """Logits [N, num_classes] of images [N, in_chans, H, W]."""
        return self.classifier(self.dropout(self.features(x).mean((2, 3))))
