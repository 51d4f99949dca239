"""BatchNorms of a graph, folded into the convolutions in front of them."""

from __future__ import annotations

import copy
import inspect
from typing import NamedTuple

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from ..tails import has_hooks

__all__ = ["CONVOLUTIONS", "NORMS", "fold"]

TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
# Exactly these: what a subclass makes of its weight (standardises it, say) is not known.
CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, *TRANSPOSED)
NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)


class _Statistics(NamedTuple):
    """What a BatchNorm in evaluation mode does; weight and bias may be None."""

    mean: Tensor
    var: Tensor
    weight: Tensor | None
    bias: Tensor | None
    eps: float


def fold(folded: fx.GraphModule) -> tuple[list[str], list[tuple[str, str]]]:
    """Folds what can be. Returns the names of the convolutions, and (name, reason) for the BatchNorms that are left."""
    pairs: dict[str, list[tuple[fx.Node, _Statistics]]] = {}
    left = []
    modules = dict(folded.named_modules())
    for node in folded.graph.nodes:
        name, norm = _norm_of(folded, node, modules)
        if isinstance(norm, _Statistics):
            conv = node.args[0] if node.args else node.kwargs.get("input")
            norm = _problem(conv, modules) or pairs.setdefault(conv.target, []).append((node, norm))
        if norm is not None:
            left.append((name, norm))
    names = []
    for name, found in pairs.items():
        if (reason := _shared(folded, name, found)) is not None:
            left += [(_norm_of(folded, node, modules)[0], reason) for node, _ in found]
            continue
        names.append(name)
        folded.set_submodule(name, _convolution(modules[name], found[0][1]))
        for node, _ in found:
            node.replace_all_uses_with(node.args[0] if node.args else node.kwargs["input"])
            folded.graph.erase_node(node)
    return names, left


def _norm_of(
    folded: fx.GraphModule, node: fx.Node, modules: dict[str, nn.Module]
) -> tuple[str, _Statistics | str | None]:
    """A BatchNorm's name, and what it does, or why it has to stay; None if the node is none.

    F.batch_norm is what a trace finds in subclasses of nn.BatchNorm2d, as timm's with an activation behind.
    """
    if node.op == "call_function" and node.target is F.batch_norm:
        given = inspect.signature(F.batch_norm).bind(*node.args, **node.kwargs)
        given.apply_defaults()
        mean, var, weight, bias = (given.arguments[key] for key in ("running_mean", "running_var", "weight", "bias"))
        held = [None if one is None else _held(folded, one) for one in (mean, var, weight, bias)]
        if given.arguments["training"] or any(one is None for one in held[:2]):
            return node.name, "it normalises by its batch"
        if any(one is not None and found is None for one, found in zip((weight, bias), held[2:], strict=True)):
            return node.name, "its weight or bias is computed"
        return str(mean.target).rpartition(".")[0], _Statistics(*held, given.arguments["eps"])
    norm = modules.get(node.target) if node.op == "call_module" else None
    if not isinstance(norm, NORMS):
        return "", None
    if type(norm) not in NORMS or has_hooks(norm):
        return node.target, f"it is a {type(norm).__name__}, or has hooks"
    if norm.training:
        raise ValueError(f"fold_batchnorm: {node.target} is in training mode although the model is in evaluation mode")
    if norm.running_mean is None or norm.running_var is None:
        return node.target, "it normalises by its batch"
    return node.target, _Statistics(norm.running_mean, norm.running_var, norm.weight, norm.bias, norm.eps)


def _held(folded: fx.GraphModule, node: object) -> Tensor | None:
    """The parameter or buffer that a node reads."""
    if not isinstance(node, fx.Node) or node.op != "get_attr":
        return None
    path, _, name = node.target.rpartition(".")
    return getattr(folded.get_submodule(path), name)


def _problem(conv: object, modules: dict[str, nn.Module]) -> str | None:
    """Why nothing can be folded into what this node calls."""
    module = modules.get(conv.target) if isinstance(conv, fx.Node) and conv.op == "call_module" else None
    if not isinstance(module, CONVOLUTIONS):
        return "there is no convolution in front of it"
    if type(module) not in CONVOLUTIONS or has_hooks(module):
        return f"{conv.target} is a {type(module).__name__}, or has hooks"
    if sum(not _tells_a_size(user) for user in conv.users) > 1:
        return f"the output of {conv.target} is used elsewhere, too"
    return None


def _tells_a_size(node: fx.Node) -> bool:
    """Whether the node reads of its tensor what a BatchNorm does not change, as assertions on an input do."""
    if node.op == "call_function" and node.target is getattr:
        return node.args[1] in ("ndim", "shape", "dtype", "device")
    return node.op == "call_method" and node.target in ("dim", "size")


def _shared(folded: fx.GraphModule, name: str, found: list[tuple[fx.Node, _Statistics]]) -> str | None:
    """Why the convolution of this name has to stay as it is: something else calls it, or reads its weight."""
    conv, first = folded.get_submodule(name), found[0][1]
    for node in folded.graph.nodes:
        if node.op == "get_attr" and node.target.startswith(f"{name}."):
            return f"the weight of {name} is used elsewhere, too"
        if node.op == "call_module" and node.target != name and conv in folded.get_submodule(node.target).modules():
            return f"{name} is called elsewhere, too"
    calls = sum(node.op == "call_module" and node.target == name for node in folded.graph.nodes)
    if calls != len(found) or any(a is not b for _, norm in found for a, b in zip(norm[:4], first, strict=False)):
        return f"{name} is called elsewhere, too"
    return None


def _convolution(conv: nn.Module, norm: _Statistics) -> nn.Module:
    """A copy of the convolution with the BatchNorm in it.

    torch.nn.utils.fusion rounds the factors to the weights' dtype, and knows no grouped transposed convolutions.
    """
    conv = copy.deepcopy(conv)
    weight = conv.weight
    scale = (norm.var.double() + norm.eps).rsqrt()
    if norm.weight is not None:
        scale = norm.weight.detach().double() * scale
    shift = -norm.mean.double() if conv.bias is None else conv.bias.detach().double() - norm.mean.double()
    shift = shift * scale if norm.bias is None else norm.bias.detach().double() + shift * scale
    planes = weight.dim() - 2
    if type(conv) in TRANSPOSED:  # [in, out / groups, ...]
        factors = scale.view(conv.groups, 1, -1).expand(-1, weight.shape[0] // conv.groups, -1)
        factors = factors.reshape(*weight.shape[:2], *(1,) * planes)
    else:
        factors = scale.view(-1, *(1,) * (planes + 1))
    folded = torch.empty_like(weight).copy_(weight.detach().double() * factors)  # of the same memory format
    conv.weight = nn.Parameter(folded, weight.requires_grad)
    trains = weight.requires_grad if norm.bias is None else norm.bias.requires_grad
    conv.bias = nn.Parameter(shift.to(weight.dtype), trains)
    return conv
