"""Other people's SE layers: how their state dicts name the two weights, and how a layer's structure is read.

Only structure is looked at, never class names or modules, so nothing is imported from the libraries themselves.
"""

from __future__ import annotations

import copy
import math
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
_COMMON_FUNCTIONS = tuple("relu silu sigmoid hardsigmoid hardswish mish relu6 tanh gelu identity".split())
_GATE_ATTRIBUTES = ("scale_activation", "gate", "sigmoid")
_SCALES = (1, 10, 100, 1000)  # of the samples tried: relu and relu6, say, differ far from zero only
_BOUND = 1e-6  # a layer may round to float32 on its way


def from_module(cls: type, layer: nn.Module) -> Any:
    """See ``FusedSE.from_module``."""
    if isinstance(layer, cls):
        return copy.deepcopy(layer)
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
        return _activation(sequence[1]), _activation(sequence[3])
    behind = [getattr(getattr(layer, name, None), "activate", None) for name in ("conv1", "conv2")]
    if all(isinstance(child, nn.Module) for child in behind):  # OpenMMLab's ConvModule
        return _activation(behind[0]), _activation(behind[1])

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
        # Libraries have classes of their own for the common functions: take the one that agrees on a grid.
        grid = torch.linspace(-8, 8, 257, dtype=torch.float64)
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            values = _bare_copy(child).double()(grid.clone())
        for name in _COMMON_FUNCTIONS:
            if torch.allclose(values, Activation(name)(grid), rtol=1e-9, atol=1e-9):
                return Activation(name)
        raise


def _prove(layer: nn.Module, fused: nn.Module, kind: str) -> None:
    """Raises ValueError unless both compute the same. Copies run, in float64: nothing of the layer changes."""
    if fused.fc1.weight.is_meta:
        raise ValueError(f"{kind} is on the meta device, so it cannot be compared; materialise it first")
    layer, fused = _bare_copy(layer).double(), copy.deepcopy(fused).double()
    generator = torch.Generator().manual_seed(0)
    known = _spatial_dimensions(layer)
    failure = None
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        for dimensions in (2, 1, 3) if known is None else (known,):
            shape = (4, fused.channels, *(5, 3, 2)[:dimensions])
            x = torch.randn(shape, generator=generator, dtype=torch.float64)
            for sample, scale in zip(x, _SCALES, strict=True):
                sample *= scale
            x = x.to(fused.fc1.weight.device)
            try:
                expected = layer(x.clone())
            except Exception as error:
                failure = failure or (f"{kind} does not run on an input {list(shape)}: {error}", error)
                continue
            break
        else:
            raise ValueError(failure[0]) from failure[1]
        got, with_input = fused(x), fused(x, x)
    if not isinstance(expected, Tensor) or expected.shape != got.shape:
        what = f"a {list(expected.shape)} tensor" if isinstance(expected, Tensor) else type(expected).__name__
        raise ValueError(f"{kind} returns {what} for an input {list(shape)}, not the scaled input")
    if (error := _distance(got, expected, x)) <= _BOUND:
        return
    if _distance(with_input, expected, x) <= _BOUND:
        raise ValueError(
            f"{kind} adds its input to the result, which is no part of FusedSE; load its weights with "
            "FusedSE.from_state_dict and call that as layer(x, residual=x)"
        )
    raise ValueError(
        f"{kind} looks like an SE layer, but differs from FusedSE by {error:.3g} times its random input "
        f"(bound {_BOUND:.0e}); it does something else as well"
    )


def _bare_copy(layer: nn.Module) -> nn.Module:
    """A deep copy without hooks: they are not the layer's arithmetic, and may hold on to anything."""
    hooks = (v for m in layer.modules() for k, v in vars(m).items() if k.endswith("_hooks"))
    return copy.deepcopy(layer, {id(registry): type(registry)() for registry in hooks})


def _distance(a: Tensor, b: Tensor, x: Tensor) -> float:
    """The largest difference in units of the sample's largest x, infinite if there is a NaN."""
    worst = ((a - b).abs().flatten(1).amax(1) / x.abs().flatten(1).amax(1)).max().item()
    return worst if worst == worst else math.inf


def _spatial_dimensions(layer: nn.Module) -> int | None:
    """As many as the layer's pooling or convolutions have, None if it has neither."""
    for module in layer.modules():
        for count, kinds in (
            (1, (nn.Conv1d, nn.AdaptiveAvgPool1d)),
            (2, (nn.Conv2d, nn.AdaptiveAvgPool2d)),
            (3, (nn.Conv3d, nn.AdaptiveAvgPool3d)),
        ):
            if isinstance(module, kinds):
                return count
    return None
