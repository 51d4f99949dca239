"""FusedSETail, and how modules that belong to somebody else's block are run as one block tail."""

from __future__ import annotations

from typing import Any, NamedTuple, NoReturn

import torch
from torch import Tensor, nn

from .. import select, torch_private
from ..functional import block_tail, tail_route
from ..modules import FusedSE, RecordsGates
from ..parts import PLAIN_TENSORS, Weights, has_hooks
from .layer import class_before
from .proof import examine
from .recipe import Recipe
from .trial import CannotFuseError

__all__ = ["NORMS", "FusedSETail", "Tail", "norm_problem", "recipe_in_tail"]

_DIMENSIONS = {nn.BatchNorm1d: 1, nn.BatchNorm2d: 2, nn.BatchNorm3d: 3}  # a synchronised one takes any
NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)


class FusedSETail(nn.Module):
    """BatchNorm -> SE -> + residual -> ReLU as one operator, from modules that exist (see :func:`block_tail`).

    Equivalent to::

        z = se(norm(x))                                  # norm(x) without se
        y = act(z * factor[:, None, None, None] + residual)    # what there is of factor, residual and act

    The modules' parameters, buffers and modes are used where they are: running statistics are updated in ``norm``, and
    its mode decides which statistics are used. Instead of the operator the modules themselves are called where they
    could tell the difference: one has hooks or another class or forward, its weights are no plain tensors, gates are
    being captured; and where "auto" finds no kernels.

    Args:
        norm: nn.BatchNorm1d, 2d, 3d, or nn.SyncBatchNorm, whose process group then shares the statistics, on CPUs too.
        se: FusedSE, or any layer that :func:`senet_fused.fuse` knows and that returns its scaled input; None for none.
        act: nn.ReLU, applied last, or None.
        owner: the module that has registered them as its children, as a block has its own. They are looked up there by
            their names at every call, and are no part of this module's state dict. None registers them here. (A copy of
            this module alone copies the owner; nn.DataParallel, whose replicas would call the original's, is refused.)
        backend: as in :func:`block_tail`.

    Raises:
        TypeError: norm or act is of another class.
        ValueError: se is not understood, or does not fit in a tail; the message says why.
    """

    def __init__(
        self,
        norm: nn.Module,
        se: nn.Module | None = None,
        act: nn.Module | None = None,
        *,
        owner: nn.Module | None = None,
        backend: str | None = None,
    ) -> None:
        super().__init__()
        if (problem := norm_problem(norm)) is not None:
            raise TypeError(f"FusedSETail: norm must be a BatchNorm, got one that cannot be fused: {problem}")
        if act is not None and type(act) is not nn.ReLU:
            raise TypeError(f"FusedSETail: act must be nn.ReLU or None, got {type(act).__name__}; call it yourself")
        select.check_name(backend, "FusedSETail")
        self.backend = backend
        self._recipe: Recipe | None = None
        if se is not None:
            try:
                self._recipe = recipe_in_tail(se, norm)
            except CannotFuseError as error:
                raise ValueError(f"FusedSETail: se ({type(se).__name__}) cannot be part of a tail: {error}") from error
        self._owner, self._names = None, ("norm", "se", "act")
        if owner is None:
            self.norm, self.se, self.act = norm, se, act
        else:
            names = {child: name for name, child in owner._modules.items()}
            if missing := [m for m in (norm, se, act) if m is not None and m not in names]:
                kind = type(missing[0]).__name__
                raise ValueError(f"FusedSETail: the {kind} is no child of the owner; assign it to the owner before")
            self._owner, self._names = (owner,), tuple(names.get(m) for m in (norm, se, act))

    def forward(self, x: Tensor, residual: Tensor | None = None, factor: Tensor | None = None) -> Tensor:
        """y; x and residual [N, C, *spatial], factor [N], dtypes and errors as in :func:`block_tail`."""
        norm, se, act = self._parts()
        return Tail(norm, se, self._recipe, act, self.backend)(x, residual, factor)

    def _parts(self) -> tuple[nn.Module | None, ...]:
        """norm, se and act, as they are now."""
        children = (self if self._owner is None else self._owner[0])._modules
        return tuple(None if name is None else children.get(name) for name in self._names)

    def _replicate_for_data_parallel(self) -> FusedSETail:
        if self._owner is not None:
            raise RuntimeError("nn.DataParallel cannot replicate a tail of its owner's; use DistributedDataParallel")
        return super()._replicate_for_data_parallel()

    def __prepare_scriptable__(self) -> NoReturn:
        raise RuntimeError(
            "torch.jit.script cannot compile FusedSETail; record it with torch.jit.trace, or with torch.export"
        )

    def __setstate__(self, state: dict[str, Any]) -> None:
        # In a pickle of 0.1.0 the recipe is called a reading.
        super().__setstate__({"_recipe" if key == "_reading" else key: value for key, value in state.items()})

    def extra_repr(self) -> str:
        parts = [f"backend={self.backend}"] if self.backend is not None else []
        names = [f"of its owner's {', '.join(n for n in self._names if n)}"] if self._owner else []
        return ", ".join(names + parts)


class Tail(NamedTuple):
    """Modules to be run as one tail; recipe: of the SE layer, as it was when it was examined."""

    norm: nn.Module
    se: nn.Module | None = None
    recipe: Recipe | None = None
    act: nn.Module | None = None
    backend: str | None = None

    def __call__(self, x: Tensor, residual: Tensor | None = None, factor: Tensor | None = None) -> Tensor:
        weights = self.weights()
        if isinstance(weights, tuple) and self._takes(x) and not self._prefers_modules(x):
            return self._fused(x, residual, factor, weights)
        return self.by_modules(x, residual, factor)

    def by_modules(self, x: Tensor, residual: Tensor | None, factor: Tensor | None) -> Tensor:
        """The same by the modules themselves."""
        y = self.norm(x)
        if self.se is not None:
            y = self.se(y)
        if factor is not None:
            y = y * factor.to(y.dtype).reshape(-1, *(1,) * (y.dim() - 1))
        if residual is not None:
            y = y + residual
        return y if self.act is None else self.act(y)

    def weights(self) -> Weights | str:
        """w1, w2, b1, b2 of the SE layer; or, as text, why the modules have to be called one by one at present."""
        if torch_private.has_global_hooks():
            return "hooks for all modules are registered, and they are to see its children"
        if (problem := norm_problem(self.norm)) is not None:
            return f"its BatchNorm: {problem}"
        if self.act is not None and (type(self.act) is not nn.ReLU or has_hooks(self.act)):
            return "its activation is no nn.ReLU any more, or has hooks or another forward"
        se = self.se
        if se is None:
            return (None, None, None, None)
        if has_hooks(se):
            return "its SE layer has hooks or another forward, which only run if it is called"
        if isinstance(se, RecordsGates) and se._senet_captured is not None:
            return "its gates are being captured"
        if self.recipe is None:
            return "its SE layer has not been there when it was read"
        kind, proven = class_before(se), self.recipe.parts[0]
        if kind is not proven.kind:
            return f"its SE layer was a {proven.kind.__name__} and is a {kind.__name__}"
        if kind.forward is not proven.forward:
            return f"the forward of {kind.__name__} has been replaced since"
        return self.recipe.weights(se)

    def _takes(self, x: Tensor) -> bool:
        """Whether x is of a kind that block_tail is for; what BatchNorm refuses, it is to refuse itself."""
        if not isinstance(x, Tensor) or (type(x) not in PLAIN_TENSORS and not torch.compiler.is_compiling()):
            return False
        if not 3 <= x.dim() <= 5 or (self.recipe is not None and x.dim() - 2 not in self.recipe.dimensions):
            return False
        if not torch.jit.is_tracing() and x.numel() == 0:  # which a tracer would warn of
            # One of several processes may have no sample.
            if 0 in x.shape[1:] or _group_of(self.norm) is None:
                return False
        return _DIMENSIONS.get(type(self.norm), x.dim() - 2) == x.dim() - 2

    def _prefers_modules(self, x: Tensor) -> bool:
        """Whether "auto" has no kernels for x, or something is to see PyTorch's own operators."""
        asked = select.requested(self.backend)[0]
        if asked == "auto" and torch_private.is_exporting():
            return True
        return asked != "reference" and tail_route(x, self.backend) == "reference"

    def _fused(
        self, x: Tensor, residual: Tensor | None, factor: Tensor | None, weights: tuple[Tensor | None, ...]
    ) -> Tensor:
        norm, recipe = self.norm, self.recipe
        # As _BatchNorm.forward of torch.nn: momentum None is the cumulative average.
        momentum = 0.0 if norm.momentum is None else norm.momentum
        counting = norm.training and norm.track_running_stats and norm.num_batches_tracked is not None
        if counting and norm.momentum is None:
            momentum = 1.0 / (float(norm.num_batches_tracked) + 1)
        training = norm.training or norm.running_mean is None
        tracked = not norm.training or norm.track_running_stats
        w1, w2, b1, b2 = weights
        y = block_tail(
            x,
            norm.running_mean if tracked else None,
            norm.running_var if tracked else None,
            norm.weight,
            norm.bias,
            w1=w1,
            w2=w2,
            b1=b1,
            b2=b2,
            training=training,
            momentum=momentum,
            eps=norm.eps,
            act="relu" if recipe is None else recipe.act,
            gate="sigmoid" if recipe is None else recipe.gate,
            residual=residual,
            post_act=None if self.act is None else "relu",
            factor=factor,
            group=_group_of(norm) if training else None,
            backend=self.backend,
        )
        if counting:
            norm.num_batches_tracked.add_(1)
        return y


def norm_problem(norm: nn.Module) -> str | None:
    """Why a module cannot be the BatchNorm of a tail at present; None if it can."""
    if type(norm) not in NORMS:
        return f"it is a {type(norm).__name__}"
    if has_hooks(norm):
        return "it has hooks or another forward, which only run if it is called"
    for t in (*norm._parameters.values(), *norm._buffers.values()):
        if t is not None and type(t) not in PLAIN_TENSORS and not torch.compiler.is_compiling():
            return f"one of its tensors is a {type(t).__name__}, not a plain tensor"
    return None


def recipe_in_tail(
    se: nn.Module, norm: nn.Module, *, verify: bool = True, proofs: dict[Any, Any] | None = None
) -> Recipe:
    """How a tail with this BatchNorm computes what the SE layer computes.

    verify, proofs: as of :func:`examine`. Raises CannotFuseError if the layer cannot be part of it; the message says
    why.
    """
    if type(se) is FusedSE:
        if se.post_act is not None:
            raise CannotFuseError(f"its post_act={se.post_act!r} belongs behind the addition: leave it out")
        recipe = Recipe.of_fused_se(se)
    else:
        fusion = getattr(se, "_senet_fused", None)
        recipe = examine(se, verify=verify, proofs=proofs) if fusion is None else fusion.recipe
    if recipe.form != "scale" or recipe.channels_last:
        raise CannotFuseError("it does not return x * gate for x [N, C, *spatial]")
    if recipe.squeeze != "avg":
        raise CannotFuseError(f"its squeeze is {recipe.squeeze!r}; a maximum does not follow from BatchNorm's sums")
    if recipe.channels != norm.num_features:
        raise CannotFuseError(f"norm is for {norm.num_features} channels, se for {recipe.channels}")
    if _DIMENSIONS.get(type(norm), recipe.dimensions[0]) not in recipe.dimensions:
        raise CannotFuseError(f"it is not for as many dimensions as a {type(norm).__name__}")
    return recipe


def _group_of(norm: nn.Module) -> object | None:
    """The processes that share a nn.SyncBatchNorm's statistics; None where there is one."""
    if not isinstance(norm, nn.SyncBatchNorm) or not norm.training:
        return None
    distributed = torch.distributed
    if not distributed.is_available() or not distributed.is_initialized():
        return None
    group = norm.process_group or distributed.group.WORLD
    return group if distributed.get_world_size(group) > 1 else None
