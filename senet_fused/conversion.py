"""Other people's SE layers: how their state dicts name the two weights, and how a layer's structure is read.

Only structure is looked at, never class names or modules, so nothing is imported from the libraries themselves.
"""

from __future__ import annotations

from collections.abc import Mapping, MutableMapping
from typing import Any

import torch
from torch import Tensor, nn

from .activations import Activation

__all__ = ["NAMINGS", "from_module", "from_state_dict", "rename_keys"]

# (first layer, second layer), as prefixes of ".weight" and ".bias".
NAMINGS = (
    ("fc1", "fc2"),  # torchvision, timm SEModule, legacy SENet
    ("fc.0", "fc.2"),  # the common tutorial layer, MONAI
    ("conv_reduce", "conv_expand"),  # timm SqueezeExcite
    ("squeeze", "expand"),  # NVIDIA DeepLearningExamples
    ("conv1.conv", "conv2.conv"),  # OpenMMLab
)


def rename_keys(state_dict: MutableMapping[str, Tensor], prefix: str, layer: nn.Module) -> None:
    """Rewrites one layer's entries to ``fc1``/``fc2`` and 2-D, in place; entries it does not know stay.

    Raises:
        RuntimeError: there are biases and the layer has none.
    """
    naming = _naming({k[len(prefix) :]: None for k in state_dict if k.startswith(prefix)})
    if naming is None:
        return
    for ours, theirs in zip(NAMINGS[0], naming, strict=True):
        for kind in ("weight", "bias"):
            key = f"{prefix}{theirs}.{kind}"
            if key not in state_dict:
                continue
            if kind == "bias" and getattr(layer, ours).bias is None:
                raise RuntimeError(
                    f"the state dict has {key!r}, but this FusedSE was made without biases; make it with bias=True"
                )
            value = state_dict[key]
            if theirs != ours:
                del state_dict[key]
            if kind == "weight" and value.dim() > 2 and all(size == 1 for size in value.shape[2:]):
                value = value.flatten(1)
            state_dict[f"{prefix}{ours}.{kind}"] = value


def from_state_dict(cls: type, state_dict: Mapping[str, Tensor], **options: Any) -> Any:
    """See ``FusedSE.from_state_dict``."""
    naming = _naming(state_dict)
    if naming is None:
        known = ", ".join(f"{first}/{second}" for first, second in NAMINGS)
        raise ValueError(f"no SE layer in the keys {sorted(state_dict)}; known namings: {known}")
    expected = {f"{part}.{kind}" for part in naming for kind in ("weight", "bias")}
    if extra := sorted(set(state_dict) - expected):
        raise ValueError(f"keys that belong to no plain SE layer: {', '.join(extra)}")
    w1 = state_dict[f"{naming[0]}.weight"]
    biases = [f"{part}.bias" in state_dict for part in naming]
    if biases[0] != biases[1]:
        raise ValueError("one of the two layers has a bias and the other has none; FusedSE has both or neither")
    if w1.dim() < 2 or not w1.is_floating_point():
        raise ValueError(f"{naming[0]}.weight must be [R, C], floating point; got {list(w1.shape)}, {w1.dtype}")
    fixed = {"rd_channels": w1.shape[0], "bias": biases[0], "device": w1.device, "dtype": w1.dtype}
    if clash := sorted(set(fixed) & set(options) | ({"reduction", "channels", "rd_divisor"} & set(options))):
        raise ValueError(f"{', '.join(clash)} is read from the state dict and cannot be given")
    layer = torch.nn.utils.skip_init(cls, w1.shape[1], **fixed, **options)
    try:
        layer.load_state_dict(state_dict)
    except RuntimeError as error:
        raise ValueError(f"the state dict does not fit one SE layer: {error}") from error
    return layer


def _naming(keys: Mapping[str, Any]) -> tuple[str, str] | None:
    return next((pair for pair in NAMINGS if all(f"{part}.weight" in keys for part in pair)), None)


# ---------------------------------------------------------------------------------------------------- from_module

_ACT_ATTRIBUTES = ("activation", "act", "act1", "relu")
_GATE_ATTRIBUTES = ("scale_activation", "gate", "sigmoid")


def from_module(cls: type, layer: nn.Module) -> Any:
    """See ``FusedSE.from_module``."""
    kind = type(layer).__name__
    own = layer.state_dict(keep_vars=False)
    naming = _naming(own)
    if naming is None:
        raise ValueError(f"{kind} has no two layers named like an SE layer's; its keys are {sorted(own)}")
    act, gate = _functions(layer)
    if any(m.training and isinstance(m, nn.Dropout) for m in layer.modules()):
        raise ValueError(f"{kind} has dropout inside; FusedSE has none")
    squeeze = "avgmax" if getattr(layer, "add_maxpool", False) else "avg"
    fused = from_state_dict(cls, own, act=act, gate=gate, squeeze=squeeze)
    fused.train(layer.training)
    for ours, theirs in zip(NAMINGS[0], naming, strict=True):
        for name, parameter in getattr(fused, ours).named_parameters():
            parameter.requires_grad_(layer.get_parameter(f"{theirs}.{name}").requires_grad)
    _prove(layer, fused, kind)
    return fused


def _functions(layer: nn.Module) -> tuple[Activation, Activation]:
    """The functions between and behind the two layers: children by their usual names, or in order of registration."""
    sequence = getattr(layer, "fc", None)
    if isinstance(sequence, nn.Sequential) and len(sequence) == 4:
        return Activation.of(sequence[1]), Activation.of(sequence[3])

    def find(names: tuple[str, ...], default: str) -> Activation:
        for name in names:
            child = getattr(layer, name, None)
            if isinstance(child, nn.Module):
                return _activation(child)
        return Activation(default)

    return find(_ACT_ATTRIBUTES, "relu"), find(_GATE_ATTRIBUTES, "sigmoid")


def _activation(child: nn.Module) -> Activation:
    try:
        return Activation.of(child)
    except ValueError:
        # Libraries have classes of their own for the common functions: try each on a grid and take the one that agrees.
        grid = torch.linspace(-8, 8, 257, dtype=torch.float64)
        with torch.no_grad():
            values = child(grid.clone())
        for name in ("relu", "silu", "sigmoid", "hardsigmoid", "hardswish", "mish", "relu6", "tanh", "gelu", "identity"):
            if torch.allclose(values, Activation(name)(grid), rtol=1e-9, atol=1e-9):
                return Activation(name)
        raise


def _prove(layer: nn.Module, fused: nn.Module, kind: str) -> None:
    weight = fused.fc1.weight
    if weight.is_meta:
        raise ValueError(f"{kind} is on the meta device, so it cannot be compared; materialise it first")
    generator = torch.Generator().manual_seed(0)
    shape = (2, fused.channels, *(5, 3, 2)[: _spatial_dimensions(layer)])
    x = torch.randn(shape, generator=generator).to(weight)
    with torch.no_grad():
        try:
            expected = layer(x)
        except Exception as error:
            raise ValueError(f"{kind} does not run on an input {list(shape)}: {error}") from error
        got = fused(x)
    if not isinstance(expected, Tensor) or expected.shape != got.shape:
        what = f"a {list(expected.shape)} tensor" if isinstance(expected, Tensor) else type(expected).__name__
        raise ValueError(f"{kind} returns {what} for an input {list(shape)}, not the scaled input")
    error = (got.double() - expected.double()).abs().max().item()
    bound = 64 * torch.finfo(weight.dtype).eps * expected.double().abs().max().item()
    if not error <= bound:
        raise ValueError(
            f"{kind} looks like an SE layer, but differs from FusedSE by {error:.3g} on random input (bound {bound:.3g}); "
            "it does something else as well"
        )


def _spatial_dimensions(layer: nn.Module) -> int:
    for module in layer.modules():
        for count, kinds in (
            (1, (nn.Conv1d, nn.AdaptiveAvgPool1d)),
            (2, (nn.Conv2d, nn.AdaptiveAvgPool2d)),
            (3, (nn.Conv3d, nn.AdaptiveAvgPool3d)),
        ):
            if isinstance(module, kinds):
                return count
    return 2
