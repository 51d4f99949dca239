"""fold_batchnorm(model): a copy for inference, with every BatchNorm in the convolution in front of it."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import fx, nn

from .. import select, torch_private
from ..fusion import fuse as fuse_layers
from ..fusion import fuse_report
from ..tails import has_hooks
from .batchnorm import fold
from .shortcuts import join
from .trace import drop_identities, traced

__all__ = ["Folded", "Folding", "fold_batchnorm"]


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
    folded = Folded(model, traced(model, layers), type(model).__name__)
    drop_identities(folded)
    pairs, left = fold(folded)
    joined = join(folded, layers, backend) if fuse else ()
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
