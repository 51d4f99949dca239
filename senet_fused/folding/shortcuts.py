"""SE -> + shortcut -> ReLU in a graph, as one call of the operator."""

from __future__ import annotations

import operator
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from ..fusion import unfuse
from ..modules import FusedSE
from ..tails import has_hooks
from .batchnorm import CONVOLUTIONS, NORMS

__all__ = ["ShortcutSE", "join"]

# What shortcuts are made of.
_PURE = (
    *CONVOLUTIONS, *NORMS, nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d, nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d,
    nn.Identity,
)  # fmt: skip


class ShortcutSE(FusedSE):
    """relu(se(x) + shortcut), as :func:`fold_batchnorm` finds it in a graph; in_place: the sum has x's dtype."""

    in_place = False

    def forward(self, x: Tensor, residual: Tensor) -> Tensor:
        """x [N, C, *spatial]; residual is added as PyTorch adds, and so may be of a shape that is broadcast to x's."""
        if isinstance(x, fx.Proxy):
            return super().forward(x, residual)
        dtype = x.dtype
        if not isinstance(residual, Tensor) or not residual.is_floating_point() or residual.dim() > x.dim():
            return torch.relu(self._plus(self._run(x, None, None), residual))
        if residual.shape != x.shape:
            residual = residual.to(torch.result_type(x, residual))  # which for a single number is x's
            x, residual = torch.broadcast_tensors(x, residual)  # a gate is the same of repeated positions
        y = super().forward(x, residual)
        return y.to(dtype) if self.in_place else y

    def _plus(self, y: Tensor, residual: Any) -> Tensor:
        return y.add_(residual) if self.in_place else y + residual


def join(folded: fx.GraphModule, layers: Iterable[str], backend: str | None) -> list[str]:
    """Makes every SE layer that can be one call with the addition and ReLU behind it. Returns their names."""
    joined = []
    for name in layers:
        nodes = [node for node in folded.graph.nodes if node.op == "call_module" and node.target == name]
        pattern = _pattern(folded, nodes[0]) if len(nodes) == 1 else None
        layer = _with_shortcut(folded.get_submodule(name), backend) if pattern is not None else None
        if layer is None:
            continue
        plus, shortcut, relu = pattern
        layer.in_place = plus.target is operator.iadd
        folded.set_submodule(name, layer)
        with folded.graph.inserting_before(plus):
            call = folded.graph.call_module(name, (nodes[0].args[0], shortcut))
        relu.replace_all_uses_with(call)
        for node in (relu, plus, nodes[0]):
            folded.graph.erase_node(node)
        joined.append(name)
    return joined


def _pattern(folded: fx.GraphModule, se: fx.Node) -> tuple[fx.Node, fx.Node, fx.Node] | None:
    """The addition behind an SE layer, its other operand, and the ReLU, where nobody else sees what is between.

    The layer is called later then, so nothing in between may change its input.
    """
    plus = _only_user(se)
    relu = None if plus is None or not _is_addition(plus) else _only_user(plus)
    if relu is None or not _is_relu(folded, relu) or len(se.args) != 1 or se.kwargs or len(se.all_input_nodes) != 1:
        return None
    first, second = plus.args
    shortcut = second if first is se else first
    if shortcut is se or not isinstance(shortcut, fx.Node) or not _changes_nothing(folded, se, plus):
        return None
    if plus.target is operator.iadd and first is not se:  # which changes the shortcut
        return None
    return plus, shortcut, relu


def _changes_nothing(folded: fx.GraphModule, first: fx.Node, last: fx.Node) -> bool:
    """Whether what runs between two nodes, as a shortcut's convolution may, writes into no tensor that exists."""
    node = first.next
    while node is not last:
        module = folded.get_submodule(node.target) if node.op == "call_module" else None
        method = node.op == "call_method" and not node.target.endswith("_")  # the methods that write end so
        if not (isinstance(module, _PURE) or method or node.op in ("placeholder", "get_attr")):
            return False
        node = node.next
    return True


def _only_user(node: fx.Node) -> fx.Node | None:
    return next(iter(node.users)) if len(node.users) == 1 else None


def _is_addition(node: fx.Node) -> bool:
    function = node.op == "call_function" and node.target in (operator.add, operator.iadd, torch.add)
    method = node.op == "call_method" and node.target == "add"
    return (function or method) and len(node.args) == 2 and not node.kwargs


def _is_relu(folded: fx.GraphModule, node: fx.Node) -> bool:
    if node.op == "call_module":
        act = folded.get_submodule(node.target)
        return type(act) is nn.ReLU and not has_hooks(act)
    functions = (F.relu, F.relu_, torch.relu, torch.relu_)
    return (node.op == "call_function" and node.target in functions) or (
        node.op == "call_method" and node.target in ("relu", "relu_")
    )


def _with_shortcut(layer: nn.Module, backend: str | None) -> ShortcutSE | None:
    """A layer that also adds and rectifies; None if it cannot be made of this one."""
    if any(has_hooks(module) for module in layer.modules()):
        return None
    if isinstance(layer, FusedSE):
        if type(layer) is not FusedSE or layer.post_act is not None:
            return None
    else:
        try:
            layer = FusedSE.from_module(unfuse(layer))
        except ValueError:
            return None
        layer.backend = backend
    layer.__class__, layer.post_act = ShortcutSE, "relu"
    return layer.eval()
