"""fold_batchnorm with networks of timm and torchvision: what is folded and joined, and the same numbers."""

from __future__ import annotations

import copy
import pickle

import pytest
import timm
import torch
import torchvision
from timm.models import senet

import senet_fused
from senet_fused.bench.zoo import settle

BACKEND = senet_fused.explain(torch.empty(0)).backend


def _senet154_like():
    """One block a stage of SENet-154's form: grouped, three convolutions in the stem, 3x3 shortcuts."""
    return senet.SENet(
        senet.SEBottleneck, (1, 1, 1, 1), groups=64, reduction=16, drop_rate=0.2, input_3x3=True, inplanes=128,
        downsample_kernel_size=3, downsample_padding=1, num_classes=10,
    )  # fmt: skip


# BatchNorms folded and left, layers joined, layers.
NETWORKS = {
    "legacy_seresnet50": (53, 0, 16, 16),
    "legacy_seresnext50_32x4d": (53, 0, 16, 16),
    "like legacy_senet154": (19, 0, 4, 4),
    "seresnet50": (53, 0, 16, 16),
    "legacy_seresnet18": (20, 0, 8, 8),
    "seresnet33ts": (38, 0, 0, 10),  # its BatchNorms have an activation in them
    "efficientnet_b0": (49, 0, 0, 16),
    "tf_efficientnet_b0": (44, 5, 0, 16),  # convolutions that pad by their input's size
    "regnety_002": (44, 0, 0, 13),
    "torchvision mobilenet_v3_small": (34, 0, 0, 9),
    "torchvision resnet18": (20, 0, 0, 0),
}


def _made(name):
    torch.manual_seed(0)
    if name == "like legacy_senet154":
        return _senet154_like()
    library, _, rest = name.rpartition(" ")
    return getattr(torchvision.models, rest)() if library else timm.create_model(rest, num_classes=10)


_FAST = ("legacy_seresnet50", "like legacy_senet154", "seresnet50", "efficientnet_b0")


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name in _FAST else pytest.mark.slow) for name in NETWORKS]
)
def test_the_same_numbers(name):
    model = _made(name).double()
    settle(model, (3, 32, 32))
    folded = senet_fused.fold_batchnorm(model, backend=BACKEND)
    done, layers = folded.folding, senet_fused.fuse_report(folded)
    assert (len(done.folded), len(done.left), len(done.joined), len(layers)) == NETWORKS[name], done.left
    assert layers.count("fused") == len(layers) and model.training
    x = torch.randn(2, 3, 32, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    senet_fused.reset_call_counts()
    with torch.no_grad():
        expected, y = model.eval()(x), folded(x)
        assert senet_fused.call_counts() == ({f"{BACKEND}.forward": len(layers)} if len(layers) else {})
        assert (y - expected).abs().max() <= 1e-11 * expected.abs().max()
        for again in (copy.deepcopy(folded), pickle.loads(pickle.dumps(folded))):
            assert torch.equal(again(x), y)
