"""State dicts of other people's SE layers, whatever the two weights are called, for FusedSE."""

from __future__ import annotations

from collections.abc import Mapping, MutableMapping
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["NAMINGS", "from_state_dict", "rename_keys"]

# (first layer, second layer), as prefixes of ".weight" and ".bias".
NAMINGS = (
    ("fc1", "fc2"),  # torchvision, timm SEModule, legacy SENet
    ("fc.0", "fc.2"),  # the common tutorial layer, MONAI
    ("conv_reduce", "conv_expand"),  # timm SqueezeExcite
    ("squeeze", "expand"),  # NVIDIA DeepLearningExamples
    ("conv1.conv", "conv2.conv"),  # OpenMMLab
)


def rename_keys(state_dict: MutableMapping[str, Tensor], prefix: str, layer: nn.Module) -> None:
    """Rewrites one layer's entries to ``fc1``/``fc2`` and their dimensions, in place; entries it does not know stay.

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
            if kind == "weight" and value.dim() >= 2 and all(size == 1 for size in value.shape[2:]):
                value = value.reshape(*value.shape[:2], *(1,) * (getattr(layer, ours).weight.dim() - 2))
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
