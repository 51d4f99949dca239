"""From a model to its graph, in which SE layers stay modules."""

from __future__ import annotations

import inspect
import operator
import re
from collections.abc import Callable, Iterable
from typing import Any

from torch import fx, nn

from ..modules import FusedSE
from ..tails import has_hooks
from .batchnorm import CONVOLUTIONS

__all__ = ["drop_identities", "traced"]

_NOTHING_IN_EVALUATION = (
    nn.Identity, nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout, nn.FeatureAlphaDropout,
)  # fmt: skip


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
        whole = isinstance(module, (FusedSE, *CONVOLUTIONS))
        return whole or module in self.leaves or has_hooks(module) or super().is_leaf_module(module, name)

    def call_module(self, module: nn.Module, forward: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        try:
            return super().call_module(module, forward, args, kwargs)
        except Exception:
            self.failed = self.failed or module
            raise


def traced(model: nn.Module, layers: Iterable[str]) -> fx.Graph:
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


def drop_identities(folded: fx.GraphModule) -> None:
    """Takes what does nothing in evaluation mode out of the graph."""
    modules = dict(folded.named_modules())
    for node in list(folded.graph.nodes):
        if node.op == "call_module" and type(modules[node.target]) in _NOTHING_IN_EVALUATION:
            if len(node.args) == 1 and not node.kwargs and not has_hooks(modules[node.target]):
                node.replace_all_uses_with(node.args[0])
                folded.graph.erase_node(node)
