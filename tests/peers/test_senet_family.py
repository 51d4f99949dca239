"""senet_fused.models against the networks whose names its keys have: strictly, both ways, and the same outputs."""

from __future__ import annotations

import pretrainedmodels
import pytest
import timm
import torch
from torch import nn

import senet_fused
from senet_fused.models import create_model

pytestmark = pytest.mark.networks
TIMM = {
    "legacy_seresnet18": "se_resnet18",
    "legacy_seresnet34": "se_resnet34",
    "legacy_seresnet50": "se_resnet50",
    "legacy_seresnet101": "se_resnet101",
    "legacy_seresnet152": "se_resnet152",
    "legacy_seresnext50_32x4d": "se_resnext50_32x4d",
    "legacy_seresnext101_32x4d": "se_resnext101_32x4d",
    "legacy_senet154": "senet154",
}
CADENE = (
    "senet154", "se_resnet50", "se_resnet101", "se_resnet152", "se_resnext50_32x4d", "se_resnext101_32x4d",
)  # fmt: skip


@torch.no_grad()
def unsettle(model: nn.Module) -> nn.Module:
    """Statistics and weights of normalisations as after some training, so that each of them matters."""
    generator = torch.Generator().manual_seed(0)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            for tensor, low in ((module.weight, 0.2), (module.bias, -0.2), (module.running_mean, -0.2)):
                tensor.uniform_(low, low + 0.4, generator=generator)
            module.running_var.uniform_(0.5, 1.5, generator=generator)
    return model


def compare(theirs: nn.Module, name: str, size: int) -> None:
    torch.manual_seed(0)
    unsettle(theirs)
    x = torch.randn(1, 3, size, size)
    with torch.inference_mode():
        wanted = theirs.eval()(x)
        for se in ("tails", "fused", "reference"):
            ours = create_model(name, se=se)
            assert list(ours.state_dict()) == list(theirs.state_dict())
            ours.load_state_dict(theirs.state_dict(), strict=True)
            senet_fused.reset_call_counts()
            y = ours.eval()(x)
            ran = set(senet_fused.call_counts())
            assert ran <= {"cpu.forward", "cpu.tail_forward"} and bool(ran) == (se != "reference")
            error = (y - wanted).norm() / wanted.norm()
            assert error < 1e-4, f"{se}: {error:.1e}"
        theirs.load_state_dict(ours.state_dict(), strict=True)


@pytest.mark.parametrize("name", TIMM)
def test_timm(name):
    compare(timm.create_model(name, pretrained=False), TIMM[name], 64)


@pytest.mark.parametrize("name", CADENE)
def test_cadene(name):
    compare(getattr(pretrainedmodels, name)(pretrained=None), name, 224)


def test_a_step_of_training_like_timms():
    """legacy_seresnet50's own step in float64, and that of each of ours: gradients and running statistics."""
    torch.manual_seed(0)
    theirs = unsettle(timm.create_model("legacy_seresnet50", num_classes=7, drop_rate=0.0)).double().train()
    start = {key: tensor.clone() for key, tensor in theirs.state_dict().items()}
    x, dy = torch.randn(4, 3, 64, 64, dtype=torch.float64), torch.randn(4, 7, dtype=torch.float64)
    theirs(x).backward(dy)
    for se in ("reference", "fused", "tails"):
        ours = create_model("se_resnet50", num_classes=7, se=se).double().train()
        ours.load_state_dict(start)
        ours(x).backward(dy)
        grads = dict(ours.named_parameters())
        for name, parameter in theirs.named_parameters():
            error = (grads[name].grad - parameter.grad).norm() / parameter.grad.norm()
            assert error < 1e-6, f"{se}, {name}: {error:.1e}"
        for name, buffer in theirs.named_buffers():
            torch.testing.assert_close(ours.get_buffer(name), buffer, rtol=1e-8, atol=1e-10)
