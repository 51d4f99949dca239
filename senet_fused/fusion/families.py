"""The families of SE layers: where each keeps its parts. Only structure is looked at, never a class or its module.

A family is one row of :data:`FAMILIES`: the paths of the two weights and of the two functions, and what else tells it
from the others. What a row says is proven before it is used (``proof.py``), so a row can leave a layer unfused but not
make it wrong. A layer that fits no row is read by its structure alone, and has to be proven.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import re
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from ..activations import ACT_NAMES, GATE_NAMES, Activation
from ..reference import SQUEEZES
from .effects import Effect, Watch
from .recipe import FORMS, Recipe
from .trial import CannotFuseError, isolated, random_copy

__all__ = [
    "FAMILIES", "Family", "checked_weights", "family_of", "has_se_weights", "is_named_like_se", "may_be_se",
    "not_covered", "recipes_by_structure", "weights_of",
]  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Family:
    """One family of SE layers.

    kind: its name in reports. first, second: paths of the Linear or 1x1 convolution with w1 and with w2. act, gate:
        paths of the functions behind them. with_: other attributes that a layer of the family has. form, squeeze: what
        it returns and how it pools, or a function of the layer that says so. channels_last: x is [N, *spatial, C].
    """

    kind: str
    first: str
    second: str
    act: str
    gate: str
    with_: tuple[str, ...] = ()
    form: str | Callable[[nn.Module], str] = "scale"
    squeeze: str | Callable[[nn.Module], str] = "avg"
    channels_last: bool = False

    def fits(self, layer: nn.Module) -> bool:
        """Whether the layer has all that the family has."""
        matrices = (_kernel(_find(layer, path)) for path in (self.first, self.second))
        functions = (_find(layer, path) for path in (self.act, self.gate))
        return (
            all(sizes is not None for sizes in matrices)
            and all(function is not None for function in functions)
            and all(hasattr(layer, name) for name in self.with_)
        )

    def recipe(self, layer: nn.Module) -> Recipe:
        """What the family's row says. Raises CannotFuseError if a function is not known here."""
        squeeze, form = (v if isinstance(v, str) else v(layer) for v in (self.squeeze, self.form))
        return dataclasses.replace(
            Recipe.of(layer, self.kind, self.first, self.second),
            act=function_of(_find(layer, self.act), ACT_NAMES),
            gate=function_of(_find(layer, self.gate), GATE_NAMES),
            squeeze=squeeze,
            form=form,
            channels_last=self.channels_last,
        )


def _maxpool(layer: nn.Module) -> str:
    return "avgmax" if getattr(layer, "add_maxpool", False) else "avg"


FAMILIES = (
    Family("torchvision SqueezeExcitation", "fc1", "fc2", "activation", "scale_activation"),
    Family("timm SEModule", "fc1", "fc2", "act", "gate", ("add_maxpool",), squeeze=_maxpool),
    Family("timm SqueezeExciteCl", "fc1", "fc2", "act", "gate", channels_last=True),
    Family("timm SqueezeExcite", "conv_reduce", "conv_expand", "act1", "gate"),
    Family("legacy SEModule", "fc1", "fc2", "relu", "sigmoid"),  # timm's legacy SENet, Cadene
    Family(
        "MONAI ChannelSELayer", "fc.0", "fc.2", "fc.1", "fc.3", ("add_residual",),
        form=lambda layer: "residual" if layer.add_residual else "scale",
    ),
    Family("SELayer", "fc.0", "fc.2", "fc.1", "fc.3"),  # the common tutorial layer
    Family("NVIDIA SqueezeAndExcitation", "squeeze", "expand", "activation", "sigmoid", form="flat_gate"),
    Family(
        "OpenMMLab SELayer", "conv1.conv", "conv2.conv", "conv1.activate", "conv2.activate",
        form=lambda layer: "gate" if getattr(layer, "return_weight", False) else "scale",
    ),
    Family("transformers RegNetSELayer", "attention.0", "attention.2", "attention.1", "attention.3"),
    Family("transformers EfficientNetSqueezeExciteLayer", "reduce", "expand", "act_reduce", "act_expand"),
    Family("cSE of SCSEModule", "1", "3", "2", "4", form="gate"),  # segmentation_models.pytorch
)  # fmt: skip

# Channel attention that is not the two-layer SE, by the name of the class: for the report only.
_OTHERS = {
    r"EffectiveSE|EffectiveSqueeze|^eSE|BlockESE": "one fully connected layer [C, C] instead of two; not covered",
    r"(?i:eca_?(module|layer))|^ECA(?![a-z])": "a 1-D convolution over the channels; not covered",
    r"(?i:cbam)": "CBAM: two squeezes through one pair of layers, and a spatial gate; not covered",
    r"GatherExcite": "gathers over windows, or has a norm inside; not covered",
    r"GlobalContext$": "global context pools with attention weights; not covered",
    r"SelectiveKernel|SplitAttn": "a softmax over branches, not a gate per channel; not covered",
}
# Modules with weights: more than these is a block, or a network named after its attention (CbamResNet, ECAPA).
_FEW = 4
_FEW_OF_OTHERS = 7  # global context with both of its branches, a selective kernel with two paths
_NAMED_LIKE_SE = re.compile(
    r"(?<![A-Z])SE(?=[A-Z][a-z]|[_\d]|$)|(?i:^se_?(layer|module|block)$|squeeze_?(and|n)?_?excit)"
)


def is_named_like_se(layer: nn.Module) -> bool:
    """Whether the name of its class says that it is an SE layer."""
    return _NAMED_LIKE_SE.search(_class_name(layer)) is not None


def not_covered(layer: nn.Module) -> str | None:
    """Why a channel attention of another kind stays as it is; None if the layer is none that is known by name."""
    name = _class_name(layer)
    reason = next((reason for pattern, reason in _OTHERS.items() if re.search(pattern, name)), None)
    return reason if reason and _modules_with_weights(layer) <= _FEW_OF_OTHERS else None


def has_se_weights(layer: nn.Module) -> bool:
    """Whether two fitting matrices are all the weights that the layer has."""
    try:
        weights_of(layer)
    except CannotFuseError:
        return False
    return True


def may_be_se(layer: nn.Module) -> bool:
    """Whether a layer of no known family is worth running: its name says SE, or its weights narrow and widen again.

    (The two layers of a transformer's MLP widen first.)
    """
    if has_se_weights(layer):
        (_, fc1), _ = weights_of(layer)
        out_features, in_features = _kernel(fc1)
        return out_features <= in_features or is_named_like_se(layer)
    return is_named_like_se(layer) and 0 < _modules_with_weights(layer) <= _FEW


def family_of(layer: nn.Module) -> Family | None:
    """The family that the layer fits, or None."""
    if isinstance(layer, torch.jit.ScriptModule):
        return None
    return next((family for family in FAMILIES if family.fits(layer)), None)


def recipes_by_structure(layer: nn.Module, recipe: Recipe) -> Iterator[Recipe]:
    """All that a layer with the two weights of an SE layer may compute, likeliest first."""
    leaves = (child for child in layer.modules() if not child._modules)
    functions = [f for f in map(elementwise, leaves) if f is not None and f.name != "identity"]
    linear = isinstance(layer.get_submodule(".".join(recipe.first)), nn.Linear)
    layouts = (False, True) if linear else (False,)
    for last, (act, gate), squeeze, form in itertools.product(layouts, _pairs(functions), SQUEEZES, FORMS):
        yield dataclasses.replace(recipe, act=act, gate=gate, squeeze=squeeze, form=form, channels_last=last)


def weights_of(layer: nn.Module) -> tuple[tuple[str, nn.Module], tuple[str, nn.Module]]:
    """The paths and the modules of w1 [R, C] and w2 [C, R], which have to be all the weights that a layer has.

    Raises:
        CannotFuseError: it has other parameters or buffers, or not two such matrices.
    """
    owners = [(name, child) for name, child in layer.named_modules() if child._parameters or child._buffers]
    for name, child in owners:
        if type(child) in _MATRICES and "weight" not in child._parameters:
            raise CannotFuseError(f"its {name} has no parameter 'weight': something computes it, as pruning does")
    pair = [(name, child) for name, child in owners if _kernel(child) is not None]
    if len(pair) != 2:
        kinds = ", ".join(f"{name or 'itself'}: {type(child).__name__}" for name, child in owners)
        what = kinds if 0 < len(owners) <= _FEW else f"{len(owners)} modules with weights"
        raise CannotFuseError(
            f"it has {len(pair)} plain linear layers or 1x1 convolutions, not an SE layer's two ({what})"
        )
    if len(owners) != 2:
        names = [
            f"{name}.{own}".lstrip(".")
            for name, child in owners
            if _kernel(child) is None
            for own in (*child._parameters, *child._buffers)
        ]
        raise CannotFuseError(f"it has parameters or buffers that belong to no plain SE layer: {', '.join(names)}")
    sizes = [_kernel(child) for _, child in pair]
    if sizes[0] != sizes[1][::-1]:
        raise CannotFuseError(f"its weights are {list(sizes[0])} and {list(sizes[1])}, not [R, C] and [C, R]")
    return pair[0], pair[1]


def checked_weights(layer: nn.Module) -> tuple[str, str]:
    """The paths of w1 [R, C] and w2 [C, R].

    Raises CannotFuseError unless both are there, of a floating dtype and of the sizes that their modules say.
    """
    (first, _), (second, _) = weights_of(layer)
    for name, child in weights_of(layer):
        weight, sizes = child.weight, _kernel(child)
        if not isinstance(weight, Tensor):
            raise CannotFuseError(f"its {name} has no weight: it is {weight}")
        if isinstance(weight, nn.UninitializedParameter):
            raise CannotFuseError(f"the weight of its {name} is not initialised yet; run the network once before")
        if not weight.is_floating_point():
            raise CannotFuseError(f"the weight of its {name} is {weight.dtype}, not of a floating dtype")
        if weight.shape[:2] != sizes or weight.numel() != math.prod(sizes):
            raise CannotFuseError(f"the weight of its {name} is {list(weight.shape)}, which does not fit {list(sizes)}")
        if 0 in sizes:
            raise CannotFuseError(f"the weight of its {name} is {list(sizes)}: it has no channels, or no hidden units")
    return first, second


_MATRICES = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)


def _kernel(child: nn.Module | None) -> tuple[int, int] | None:
    """[out, in] of a Linear or a 1x1 convolution, None for anything else (also for their subclasses)."""
    if type(child) not in _MATRICES or "weight" not in child._parameters:
        return None
    if isinstance(child, nn.Linear):
        return child.out_features, child.in_features
    ones = all(k == 1 for k in (*child.kernel_size, *child.stride, child.groups))
    padded = not isinstance(child.padding, str) and any(child.padding)
    return (child.out_channels, child.in_channels) if ones and not padded else None


def _pairs(functions: list[Activation]) -> Iterator[tuple[Activation, Activation]]:
    """(act, gate) to try: its own functions in the order of registration, then with a function that is no module."""
    acts = [*functions, *map(Activation, ("relu", "silu"))]
    gates = [*functions[::-1], Activation("sigmoid"), *_HARD_SIGMOIDS]
    pairs = dict.fromkeys(itertools.product(acts, gates))
    yield from ((a, g) for a, g in pairs if a.name in ACT_NAMES and g.name in GATE_NAMES)


def function_of(child: nn.Module, known: tuple[str, ...]) -> Activation:
    """The elementwise function that a child computes. Raises CannotFuseError unless it is one of the known names."""
    function = elementwise(child)
    if function is None or function.name not in known:
        raise CannotFuseError(f"{type(child).__name__} is not an activation known here (known: {', '.join(known)})")
    return function


# PyTorch's, PaddlePaddle's, and GhostNet's clamp.
_HARD_SIGMOIDS = tuple(
    Activation("hardsigmoid", slope=slope, offset=offset) for slope, offset in ((1 / 6, 0.5), (0.2, 0.5), (1.0, 0.0))
)
_COMMON = (
    *map(Activation.of, "relu silu sigmoid hardswish mish relu6 tanh gelu gelu_tanh identity".split()),
    *_HARD_SIGMOIDS,
)


def elementwise(child: nn.Module) -> Activation | None:
    """The function that a child computes of each element; None if it computes anything else, or none known here."""
    try:
        return Activation.of(child)
    except ValueError:
        pass
    if child._parameters or child._buffers or child._modules:
        return None
    # Libraries have classes of their own for the common functions: take the one that agrees on a grid.
    grid = torch.linspace(-8, 8, 257, dtype=torch.float64, device="cpu")
    try:
        with isolated(), torch.no_grad():
            copied = random_copy(child, torch.Generator("cpu"))
            with Watch(copied).running():
                values = type(copied).forward(copied, grid.clone())  # past what hooks all modules
        if not isinstance(values, Tensor) or values.shape != grid.shape:
            return None
        return next((f for f in _COMMON if torch.allclose(values, f(grid), rtol=1e-9, atol=1e-9)), None)
    except (Exception, Effect):  # a pooling or a flattening, which refuses such an input; something that records it
        return None


def _modules_with_weights(layer: nn.Module) -> int:
    return sum(bool(child._parameters) for child in layer.modules())


def _class_name(layer: nn.Module) -> str:
    return layer.original_name if isinstance(layer, torch.jit.ScriptModule) else type(layer).__name__


def _find(layer: nn.Module, path: str) -> nn.Module | None:
    for name in path.split("."):
        layer = layer._modules.get(name)
        if layer is None:
            return None
    return layer
