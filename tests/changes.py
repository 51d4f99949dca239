"""What is done behind an SE layer's back to its children fc1 and fc2, so that they have to be called, by name."""

from __future__ import annotations

import functools
import warnings

import torch
from torch import nn
from torch.nn.modules import module as global_hooks
from torch.nn.utils import parametrizations, parametrize, prune


def doubled(value):
    if isinstance(value, tuple):
        return tuple(None if v is None else 2 * v for v in value)
    return 2 * value


def given(register, values):
    """Of a hook's arguments the one in whose place it may return another."""
    return values[0] if "backward" in register else values[-1]


def hook(register):
    """A hook of fc1 that doubles what it is given, so that it is seen in the result."""

    def change(se):
        return getattr(se.fc1, register)(lambda m, *values: doubled(given(register, values))).remove

    return change


def global_hook(register):
    def change(se):
        def run(m, *values):
            return doubled(given(register, values)) if isinstance(m, (nn.Linear, nn.Conv2d)) else None

        return getattr(global_hooks, register)(run).remove

    return change


def pruned(se):
    prune.l1_unstructured(se.fc1, "weight", 0.5)
    with torch.no_grad():
        se.fc1.weight_orig.mul_(5)  # as a checkpoint that is loaded
    return lambda: prune.remove(se.fc1, "weight")


def spectral_norm(se):
    torch.manual_seed(2)
    nn.utils.spectral_norm(se.fc2)
    return lambda: nn.utils.remove_spectral_norm(se.fc2)


def weight_norm(se):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        nn.utils.weight_norm(se.fc1)
    return lambda: nn.utils.remove_weight_norm(se.fc1)


def parametrised(se):
    parametrizations.weight_norm(se.fc1)
    return lambda: parametrize.remove_parametrizations(se.fc1, "weight")


class Lora(nn.Module):
    """As adapter libraries have it: weight and bias are the base layer's."""

    def __init__(self, base):
        super().__init__()
        generator = torch.Generator().manual_seed(3)
        self.base = base.requires_grad_(False)
        self.low = nn.Parameter(torch.randn(base.weight.shape, generator=generator, dtype=base.weight.dtype))
        self.function = nn.functional.conv2d if isinstance(base, nn.Conv2d) else nn.functional.linear

    weight = property(lambda self: self.base.weight)
    bias = property(lambda self: self.base.bias)

    def forward(self, x):
        return self.base(x) + self.function(x, self.low)


def lora(se):
    base = se.fc1
    se.fc1 = Lora(base)
    return lambda: setattr(se, "fc1", base)


def offloaded(se):
    """The weight is on the meta device, and there for the call alone, by a forward that has been put on the object."""
    fc1, weight, forward = se.fc1, se.fc1.weight, se.fc1.forward
    fc1.weight = nn.Parameter(weight.to("meta"))

    def run(x):
        missing, fc1.weight = fc1.weight, weight
        try:
            return forward(x)
        finally:
            fc1.weight = missing

    fc1.forward = functools.update_wrapper(run, forward)

    def undo():
        del fc1.forward
        fc1.weight = weight

    return undo


class Marked(torch.Tensor):
    """A subclass as quantised and distributed tensors are."""


def subclass(se):
    weight = se.fc1.weight
    se.fc1.weight = nn.Parameter(weight.detach().as_subclass(Marked))
    return lambda: setattr(se.fc1, "weight", weight)


def patched(se):
    """Another forward for all modules of the class, as kernel libraries put it there."""
    kind, forward = type(se.fc1), type(se.fc1).forward
    kind.forward = lambda self, x: 2 * forward(self, x)
    return lambda: setattr(kind, "forward", forward)


# What is done, which returns what undoes it, and what the report says. Hooks of one module stay with it, those for
# all modules do not.
LOCAL_HOOKS = (
    "register_forward_hook", "register_forward_pre_hook", "register_full_backward_hook",
    "register_full_backward_pre_hook", "register_backward_hook",
)  # fmt: skip
GLOBAL_HOOKS = (
    "register_module_forward_hook", "register_module_forward_pre_hook", "register_module_full_backward_hook",
    "register_module_full_backward_pre_hook", "register_module_backward_hook",
)  # fmt: skip
CHANGES = {
    **{name: (hook(name), "its fc1 has hooks") for name in LOCAL_HOOKS},
    **{name: (global_hook(name), "hooks for all modules are registered") for name in GLOBAL_HOOKS},
    "pruned": (pruned, "its fc1 has hooks"),
    "spectral_norm": (spectral_norm, "its fc2 has hooks"),
    "weight_norm": (weight_norm, "its fc1 has hooks"),
    "parametrised": (parametrised, r"its fc1 was a \w+ and is a Parametrized\w+"),
    "lora": (lora, r"its fc1 was a \w+ and is a Lora"),
    "offloaded": (offloaded, "the forward of its fc1 has been replaced"),
    "subclass": (subclass, "one of its weights is a Marked"),
    "patched": (patched, r"the forward of \w+, which its fc1 is, has been replaced"),
}
