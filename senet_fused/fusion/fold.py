"""fold_batchnorm(model): a copy for inference, with every BatchNorm in the convolution in front of it."""

from __future__ import annotations

import copy
import inspect
import operator
import re
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from .. import select, torch_private
from ..modules import FusedSE
from ..parts import has_hooks
from .blocks import DROPOUTS
from .convert import fuse as fuse_layers
from .convert import fuse_report, unfuse
from .tails import NORMS

__all__ = ["Folded", "Folding", "ShortcutSE", "fold_batchnorm"]

_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
# Exactly these: what a subclass makes of its weight (standardises it, say) is not known.
_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, *_TRANSPOSED)


class Folding(NamedTuple):
    """What :func:`fold_batchnorm` has done.

    folded: the convolutions that have a BatchNorm in them, by name. left: (name, reason) of every BatchNorm that is
    still there. joined: the SE layers that run with their shortcut's addition and ReLU as one operator.
    """

    folded: tuple[str, ...]
    left: tuple[tuple[str, str], ...]
    joined: tuple[str, ...]


def fold_batchnorm(model: nn.Module, *, fuse: bool = True, backend: str | None = None) -> Folded:
    """A copy of a model for inference in which every BatchNorm behind a convolution is folded into it.

    Equivalent, of each pair in evaluation mode, to::

        scale = norm.weight / (norm.running_var + norm.eps).sqrt()              # computed in float64
        conv.weight, conv.bias = conv.weight * scale, norm.bias + (conv.bias - norm.running_mean) * scale

    The copy is a ``torch.fx.GraphModule`` in evaluation mode that computes what ``model.eval()`` does, but for
    rounding. Its parameters keep their names. It can be copied, pickled, compiled, exported and moved; what has been
    done says ``copy.folding``. Dropout and nn.Identity are gone. The model itself is untouched.

    All convolutions are folded, also grouped and transposed ones. A pair stays as it is if something else uses the
    convolution's output or weight too, if the convolution is shared by several BatchNorms, if one of the two has hooks,
    a parametrisation or is a subclass, or if the BatchNorm has no running statistics. SE layers, and modules inside the
    model that have hooks, stay modules, and are called as before. Contexts within a forward (torch.no_grad, autocast)
    are not seen by torch.fx, and are lost.

    Args:
        model: a module that torch.fx can trace, with batches as input. It may be in training mode. Arguments of its
            forward that have a default (None, a number, a bool, a string) are fixed to that: the copy takes none.
        fuse: run the SE layers fused, as :func:`senet_fused.fuse` does. Where an SE layer is followed by + shortcut and
            ReLU, and nothing else sees what is between, all three are one call of
            ``squeeze_excite(x, ..., residual=shortcut, post_act="relu")``: the layer is replaced by a FusedSE then.
            False leaves the layers as they are; ``senet_fused.fuse(copy)`` finds them later.
        backend: of the fused layers, as in :func:`senet_fused.squeeze_excite`.

    Raises:
        TypeError: model is no module, or one that has been compiled or wrapped: pass what is inside.
        ValueError: an unknown backend; the model itself has hooks; torch.fx cannot trace it (the message names the
            module and says why); there is a BatchNorm in training mode although the model is in evaluation mode.
        RuntimeError: from ``copy.train()``: the BatchNorms are gone, train the model and fold it again.

    Warns:
        UserWarning: as fuse, if there are SE layers and none can be fused.

    >>> model = senet_fused.fold_batchnorm(timm.create_model("legacy_seresnet50", pretrained=True))
    """
    select.check_name(backend, "fold_batchnorm")
    _check(model)
    layers = [layer.name for layer in fuse_report(model).layers]
    model = copy.deepcopy(model).eval()
    folded = Folded(model, _traced(model, layers), type(model).__name__)
    _drop_identities(folded)
    pairs, left = _fold(folded)
    joined = _join(folded, layers, backend) if fuse else ()
    folded.delete_all_unused_submodules()
    folded.graph.lint()
    folded.recompile()
    folded.folding = Folding(tuple(pairs), tuple(left), tuple(joined))
    if fuse and len(joined) < len(layers):
        fuse_layers(folded, backend=backend)
    return folded.eval()


class Folded(fx.GraphModule):
    """What :func:`fold_batchnorm` returns; ``folding`` says what it has done."""

    folding: Folding

    def train(self, mode: bool = True) -> Folded:
        if mode:
            raise RuntimeError(
                "this model is for inference: fold_batchnorm has folded its BatchNorms into its convolutions; train "
                "the model that it was made of, and fold that again"
            )
        return super().train(False)

    def __deepcopy__(self, memo: dict[int, Any]) -> Folded:
        return _finished(super().__deepcopy__(memo), type(self).__name__, self.folding)

    def __reduce__(self) -> tuple[Any, ...]:
        make, arguments = super().__reduce__()
        return _restore, (make, arguments, type(self).__name__, self.folding)


def _restore(make: Callable[..., fx.GraphModule], arguments: tuple[Any, ...], name: str, folding: Folding) -> Folded:
    traced = make(*arguments)
    return _finished(Folded(traced, traced.graph), name, folding)


def _finished(folded: Folded, name: str, folding: Folding) -> Folded:
    type(folded).__name__, folded.folding = name, folding  # every GraphModule has a class of its own
    return folded.eval()  # the containers of its modules are made anew


def _check(model: nn.Module) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"fold_batchnorm takes a torch.nn.Module, got {type(model).__name__}")
    kind = type(model).__name__
    if torch_private.is_compiled(model) or isinstance(model, torch.jit.ScriptModule):
        raise TypeError(f"fold_batchnorm cannot trace a compiled model ({kind}); fold it before it is compiled")
    if isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
        raise TypeError(f"fold_batchnorm takes the model inside {kind}: fold_batchnorm(model.module)")
    if has_hooks(model) or torch_private.has_global_hooks():
        raise ValueError(
            f"fold_batchnorm: {kind} has hooks, or a forward of its own in place of its class's, or hooks for all "
            "modules are registered, which a trace would lose; remove them, and register them on the result"
        )


# -------------------------------------------------------------------------------- from a model to its graph


class _Proxy(fx.Proxy):
    """With ``y += x`` as what it is: torch.fx's own reads ``y = y + x``, which is another tensor and another dtype."""


def _in_place(function: Callable[..., Any]) -> Callable[..., Any]:
    return lambda self, other: self.tracer.create_proxy("call_function", function, (self, other), {})


_IN_PLACE = (
    "iadd", "isub", "imul", "itruediv", "ifloordiv", "imod", "ipow", "iand", "ior", "ixor", "ilshift", "irshift",
)  # fmt: skip
for _name in _IN_PLACE:
    setattr(_Proxy, f"__{_name}__", _in_place(getattr(operator, _name)))


class _Tracer(fx.Tracer):
    """leaves: modules that stay modules, beside those of torch.nn. failed: the innermost whose forward has raised."""

    def __init__(self, leaves: Iterable[nn.Module] = ()) -> None:
        super().__init__()
        self.leaves = set(leaves)
        self.failed: nn.Module | None = None

    def proxy(self, node: fx.Node) -> _Proxy:
        return _Proxy(node, self)

    def is_leaf_module(self, module: nn.Module, name: str) -> bool:
        # Subclasses of convolutions pad by their input's size, which cannot be traced.
        whole = isinstance(module, (FusedSE, *_CONVOLUTIONS))
        return whole or module in self.leaves or has_hooks(module) or super().is_leaf_module(module, name)

    def call_module(self, module: nn.Module, forward: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        try:
            return super().call_module(module, forward, args, kwargs)
        except Exception:
            self.failed = self.failed or module
            raise


def _traced(model: nn.Module, layers: Iterable[str]) -> fx.Graph:
    parameters = list(inspect.signature(type(model).forward).parameters.values())[1:]
    known = (type(None), bool, int, float, str)
    fixed = {one.name: one.default for one in parameters if type(one.default) in known}
    tracer = _Tracer(model.get_submodule(name) for name in layers if name)
    try:
        graph = tracer.trace(model, concrete_args=fixed or None)
    except Exception as error:
        failed = tracer.failed
        names = {module: name for name, module in model.named_modules()}
        where = "the model's own forward" if failed is None else f"{names.get(failed)} ({type(failed).__name__})"
        first = (str(error) or type(error).__name__).splitlines()[0]
        raise ValueError(
            f"fold_batchnorm: torch.fx cannot trace {where}: {first}; the forward may not decide by the values or "
            "sizes of its tensors. Fold the parts that can be traced: model.part = fold_batchnorm(model.part)"
        ) from error
    _drop_fixed(graph, fixed)
    return graph


def _drop_fixed(graph: fx.Graph, names: Iterable[str]) -> None:
    """Takes arguments that are fixed out of the graph, and the assertions of their values.

    A graph with such an assertion that they are None breaks, once it is unpickled, every later trace in the process.
    """
    # The tracer numbers them: mask_1.
    fixed = re.compile(rf"(?:{'|'.join(map(re.escape, names))})_\d+")
    for node in [one for one in graph.nodes if one.op == "placeholder" and fixed.fullmatch(one.target)]:
        users = [node]
        for user in users:
            users += user.users
        for user in reversed(users):
            graph.erase_node(user)


def _drop_identities(folded: fx.GraphModule) -> None:
    """Takes what does nothing in evaluation mode out of the graph."""
    modules = dict(folded.named_modules())
    for node in list(folded.graph.nodes):
        if node.op == "call_module" and type(modules[node.target]) in (nn.Identity, *DROPOUTS):
            if len(node.args) == 1 and not node.kwargs and not has_hooks(modules[node.target]):
                node.replace_all_uses_with(node.args[0])
                folded.graph.erase_node(node)


# -------------------------------------------------------------------------------- BatchNorms


class _Statistics(NamedTuple):
    """What a BatchNorm in evaluation mode does; weight and bias may be None."""

    mean: Tensor
    var: Tensor
    weight: Tensor | None
    bias: Tensor | None
    eps: float


def _fold(folded: fx.GraphModule) -> tuple[list[str], list[tuple[str, str]]]:
    """Folds what can be. Returns the names of the convolutions, and (name, reason) for the BatchNorms that are left."""
    pairs: dict[str, list[tuple[str, fx.Node, _Statistics]]] = {}
    left = []
    modules = dict(folded.named_modules())
    for node in folded.graph.nodes:
        name, norm = _norm_of(folded, node, modules)
        if isinstance(norm, _Statistics):
            conv = node.args[0] if node.args else node.kwargs.get("input")
            norm = _problem(conv, modules) or pairs.setdefault(conv.target, []).append((name, node, norm))
        if norm is not None:
            left.append((name, norm))
    names = []
    for name, found in pairs.items():
        if (reason := _shared(folded, name, [norm for _, _, norm in found])) is not None:
            left += [(norm_name, reason) for norm_name, _, _ in found]
            continue
        names.append(name)
        folded.set_submodule(name, _convolution(modules[name], found[0][2]))
        for _, node, _ in found:
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
    if not isinstance(module, _CONVOLUTIONS):
        return "there is no convolution in front of it"
    if type(module) not in _CONVOLUTIONS or has_hooks(module):
        return f"{conv.target} is a {type(module).__name__}, or has hooks"
    if sum(not _tells_a_size(user) for user in conv.users) > 1:
        return f"the output of {conv.target} is used elsewhere, too"
    return None


def _tells_a_size(node: fx.Node) -> bool:
    """Whether the node reads of its tensor what a BatchNorm does not change, as assertions on an input do."""
    if node.op == "call_function" and node.target is getattr:
        return node.args[1] in ("ndim", "shape", "dtype", "device")
    return node.op == "call_method" and node.target in ("dim", "size")


def _shared(folded: fx.GraphModule, name: str, norms: list[_Statistics]) -> str | None:
    """Why the convolution of this name has to stay as it is: something else calls it, or reads its weight."""
    conv, calls = folded.get_submodule(name), 0
    for node in folded.graph.nodes:
        if node.op == "get_attr" and node.target.startswith(f"{name}."):
            return f"the weight of {name} is used elsewhere, too"
        if node.op == "call_module" and conv in folded.get_submodule(node.target).modules():
            calls += 1 if node.target == name else len(norms) + 1
    same = all(a is b for norm in norms for a, b in zip(norm[:4], norms[0], strict=False))
    return None if calls == len(norms) and same else f"{name} is called elsewhere, too"


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
    # [groups, in / groups, out / groups, ...] of a transposed convolution, with out and in exchanged of any other
    factors = scale.unflatten(0, (conv.groups, 1, -1) if type(conv) in _TRANSPOSED else (conv.groups, -1, 1))
    product = weight.detach().double().unflatten(0, (conv.groups, -1)) * factors[(..., *(None,) * (weight.dim() - 2))]
    folded = torch.empty_like(weight).copy_(product.flatten(0, 1))  # of the same memory format
    conv.weight = nn.Parameter(folded, weight.requires_grad)
    trains = weight.requires_grad if norm.bias is None else norm.bias.requires_grad
    conv.bias = nn.Parameter(shift.to(weight.dtype), trains)
    return conv


# -------------------------------------------------------------------------------- SE -> + shortcut -> ReLU


# What shortcuts are made of.
_PURE = (
    *_CONVOLUTIONS, *NORMS, nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d, nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d,
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


def _join(folded: fx.GraphModule, layers: Iterable[str], backend: str | None) -> list[str]:
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
