"""Blocks whose forward is known, and that can run their BatchNorms as block tails.

A known block is told by its structure, and has a forward with tails in it; what the block's own class does is not
trusted to be the same, but proven (:func:`examine_block`). Another block is another function and a row of KNOWN_BLOCKS.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .. import torch_private
from ..parts import has_hooks, is_patched
from .families import not_covered
from .layer import FusedModule, revert
from .proof import integers_of, larger_planes
from .recipe import Recipe
from .tails import Tail, norm_problem, recipe_in_tail
from .trial import CannotFuseError, Trial, check_forward, errors_as_reasons, isolated, prove_once, random_copy

__all__ = [
    "DROPOUTS", "KNOWN_BLOCKS", "BlockFusion", "FusedBlock", "block_alteration", "examine_block", "kind_of_block",
    "main_se",
]  # fmt: skip

DROPOUTS = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout, nn.FeatureAlphaDropout)


class BlockFusion(NamedTuple):
    """What a fused block carries: its kind, a key of KNOWN_BLOCKS; the recipe of its SE layer; and as Fusion.

    drop_path: the class of what drops whole samples of its branch, and that class's forward; None if there is nothing.
    """

    kind: str
    recipe: Recipe
    drop_path: tuple[type[nn.Module], Any] | None
    backend: str | None
    verified: bool


class FusedBlock(FusedModule):
    """The part of a fused block's class that runs the known forward with tails in place of the original one."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        fusion = self._senet_fused
        original, proven = self._senet_original
        if fusion is None or len(args) != 1 or kwargs or isinstance(args[0], torch.fx.Proxy):
            return super().forward(*args, **kwargs)
        if original.forward is not proven or torch_private.has_global_hooks():
            return super().forward(*args, **kwargs)
        return KNOWN_BLOCKS[fusion.kind].forward(self, args[0], Tails(fusion.recipe, fusion.drop_path, fusion.backend))


class Tails(NamedTuple):
    """Runs the tails of one block; the fields are BlockFusion's."""

    recipe: Recipe
    drop_path: tuple[type[nn.Module], Any] | None
    backend: str | None

    def __call__(self, x: Tensor, norm: nn.Module, act: nn.Module | None = None) -> Tensor:
        """act(norm(x)); act may be any module, or None."""
        relu = act if type(act) is nn.ReLU else None
        y = Tail(norm, None, None, relu, self.backend)(x)
        return y if act is None or act is relu else act(y)

    def last(
        self,
        x: Tensor,
        norm: nn.Module,
        se: nn.Module,
        shortcut: Tensor,
        act: nn.Module,
        *,
        drop_path: nn.Module | None = None,
        in_place: bool = False,
    ) -> Tensor:
        """act(drop_path(se(norm(x))) + shortcut). in_place: of the addition, which keeps the branch's dtype."""
        factor = None
        if drop_path is not None and not isinstance(drop_path, nn.Identity):
            kind = type(drop_path)
            if self.drop_path is None or self.drop_path != (kind, kind.forward) or has_hooks(drop_path):
                y = drop_path(se(self(x, norm)))
                return act(_add(y, shortcut, in_place))
            if drop_path.training:
                # What drops whole samples multiplies ones as it would multiply the branch, by the same random numbers.
                ones = torch.ones((x.shape[0], *(1,) * (x.dim() - 1)), dtype=x.dtype, device=x.device)
                factor = drop_path(ones).flatten()
        relu = act if type(act) is nn.ReLU else None
        y = Tail(norm, se, self.recipe, relu, self.backend)(x, shortcut, factor)
        if in_place and y.dtype != x.dtype:
            y = y.to(x.dtype)
        return y if act is relu else act(y)

    def shortcut(self, x: Tensor, downsample: nn.Module | None) -> Tensor:
        """downsample(x); the BatchNorm at its end is a tail."""
        if downsample is None:
            return x
        children = list(downsample._modules.values())
        last = children[-1] if children else None
        if type(downsample) is not nn.Sequential or has_hooks(downsample) or norm_problem(last) is not None:
            return downsample(x)
        for child in children[:-1]:
            x = child(x)
        return self(x, last)


def _add(y: Tensor, shortcut: Tensor, in_place: bool) -> Tensor:
    return (y + shortcut).to(y.dtype) if in_place else y + shortcut


class KnownBlock(NamedTuple):
    """A block that is told by its structure.

    forward: the block's, with tails. children: those that it has, by attribute. lacks: those that it must not have.
    se: its SE layer. norms: its BatchNorms, the SE layer's last. refusal: why a block of this kind cannot run with
    tails; it has no forward then.
    """

    forward: Callable[[Any, Tensor, Tails], Tensor] | None
    children: tuple[str, ...]
    se: str
    norms: tuple[str, ...]
    lacks: tuple[str, ...] = ()
    refusal: str | None = None


def _legacy_bottleneck(block: Any, x: Tensor, tails: Tails) -> Tensor:
    y = tails(block.conv1(x), block.bn1, block.relu)
    y = tails(block.conv2(y), block.bn2, block.relu)
    y = block.conv3(y)
    shortcut = tails.shortcut(x, block.downsample)
    return tails.last(y, block.bn3, block.se_module, shortcut, block.relu)


def _timm_bottleneck(block: Any, x: Tensor, tails: Tails) -> Tensor:
    y = tails(block.conv1(x), block.bn1, block.act1)
    y = _dropped(tails, block.conv2(y), block.bn2, block.drop_block, block.act2)
    y = block.conv3(block.aa(y))
    shortcut = tails.shortcut(x, block.downsample)
    return tails.last(y, block.bn3, block.se, shortcut, block.act3, drop_path=block.drop_path, in_place=True)


def _timm_basic_block(block: Any, x: Tensor, tails: Tails) -> Tensor:
    y = _dropped(tails, block.conv1(x), block.bn1, block.drop_block, block.act1)
    y = block.conv2(block.aa(y))
    shortcut = tails.shortcut(x, block.downsample)
    return tails.last(y, block.bn2, block.se, shortcut, block.act2, drop_path=block.drop_path, in_place=True)


def _dropped(tails: Tails, x: Tensor, norm: nn.Module, drop_block: nn.Module, act: nn.Module) -> Tensor:
    if type(drop_block) is nn.Identity and not has_hooks(drop_block):
        return tails(x, norm, act)
    return act(drop_block(tails(x, norm)))


def _monai_block(block: Any, x: Tensor, tails: Tails) -> Tensor:
    project = block.project
    shortcut = project(x) if isinstance(project, nn.Identity) else _convolution(tails, x, project)
    y = _convolution(tails, x, block.conv1)
    y = _convolution(tails, y, block.conv2)
    conv, norm, act = _conv_norm_act(block.conv3)
    if conv is None or act is not None:
        return block.act(_add(block.se_layer(block.conv3(y)), shortcut, True))
    return tails.last(conv(y), norm, block.se_layer, shortcut, block.act, in_place=True)


def _convolution(tails: Tails, x: Tensor, convolution: nn.Module) -> Tensor:
    conv, norm, act = _conv_norm_act(convolution)
    return convolution(x) if conv is None else tails(conv(x), norm, act)


def _conv_norm_act(convolution: nn.Module) -> tuple[nn.Module | None, nn.Module | None, nn.Module | None]:
    """The parts of MONAI's Convolution, which is a sequence of conv and adn; Nones if it is made of anything else."""
    nothing = (None, None, None)
    if list(convolution._modules) != ["conv", "adn"] or not _is_sequence(convolution):
        return nothing
    adn = convolution.adn
    if list(adn._modules) not in (["N"], ["N", "A"]) or not _is_sequence(adn):
        return nothing
    return convolution.conv, adn.N, adn._modules.get("A")


def _is_sequence(module: nn.Module) -> bool:
    """Whether a call of the module is its children's calls, one after the other, and nothing else."""
    own = type(module).forward is not nn.Sequential.forward
    return not (own or is_patched(nn.Sequential) or has_hooks(module))


KNOWN_BLOCKS: dict[str, KnownBlock] = {
    "legacy SE bottleneck": KnownBlock(  # timm's legacy SENet, Cadene
        _legacy_bottleneck,
        children=("conv1", "bn1", "conv2", "bn2", "conv3", "bn3", "relu", "se_module", "downsample"),
        se="se_module",
        norms=("bn1", "bn2", "bn3"),
    ),
    "timm bottleneck": KnownBlock(
        _timm_bottleneck,
        children=("conv1", "bn1", "act1", "conv2", "bn2", "drop_block", "act2", "aa", "conv3", "bn3", "se", "act3",
             "downsample", "drop_path"),
        se="se",
        norms=("bn1", "bn2", "bn3"),
    ),
    "timm basic block": KnownBlock(
        _timm_basic_block,
        children=("conv1", "bn1", "drop_block", "act1", "aa", "conv2", "bn2", "se", "act2", "downsample", "drop_path"),
        lacks=("conv3",),
        se="se",
        norms=("bn1", "bn2"),
    ),
    "MONAI SE block": KnownBlock(
        _monai_block,
        children=("conv1", "conv2", "conv3", "se_layer", "project", "act"),
        se="se_layer",
        norms=("conv1.adn.N", "conv2.adn.N", "conv3.adn.N"),
    ),
    "legacy SE basic block": KnownBlock(
        None,
        children=("conv1", "bn1", "conv2", "bn2", "relu", "se_module", "downsample"),
        lacks=("conv3",),
        se="se_module",
        norms=("bn1", "bn2"),
        refusal="BatchNorm -> ReLU -> SE: the squeeze of a rectified output does not follow from BatchNorm's sums",
    ),
}  # fmt: skip


def kind_of_block(block: nn.Module) -> str | None:
    """The known block whose structure this one has, with some attention in it; None if there is none."""
    own = {**block._modules, **vars(block)}
    for kind, known in KNOWN_BLOCKS.items():
        fits = all(name in own for name in known.children) and not any(name in own for name in known.lacks)
        if fits and isinstance(own[known.se], nn.Module) and not isinstance(own[known.se], nn.Identity):
            return kind
    return None


def main_se(block: nn.Module, kind: str) -> nn.Module:
    """The SE layer of a block of this kind."""
    return block.get_submodule(KNOWN_BLOCKS[kind].se)


def block_alteration(block: nn.Module) -> str | None:
    """Why a fused block's tail is run module by module at present; None if it is not."""
    original, proven = block._senet_original
    fusion = block._senet_fused
    if original.forward is not proven:
        return f"the forward of {original.__name__} has been replaced since"
    known = KNOWN_BLOCKS[fusion.kind]
    for path in known.norms:
        last = path == known.norms[-1]
        try:
            norm = block.get_submodule(path)
        except AttributeError:
            return f"its {path} has been removed"
        tail = Tail(norm, main_se(block, fusion.kind), fusion.recipe) if last else Tail(norm)
        if isinstance(weights := tail.weights(), str):
            return f"{path}: {weights}"
    drop_path = _drop_path_of(block, known)
    if drop_path is not None:
        if fusion.drop_path != (type(drop_path), type(drop_path).forward) or has_hooks(drop_path):
            return "its drop_path is not what was proven, or has hooks"
    return None


def _drop_path_of(block: nn.Module, known: KnownBlock) -> Any:
    """What a block of this kind calls as its drop_path; None if it has none, or one that does nothing."""
    drop_path = getattr(block, "drop_path", None) if "drop_path" in known.children else None
    return None if isinstance(drop_path, nn.Identity) else drop_path


# ---------------------------------------------------------------------------------------------------- the proof


def examine_block(block: nn.Module, kind: str, *, verify: bool = True, proofs: dict[Any, Any]) -> BlockFusion:
    """What a fused block is to carry, after a proof that the known forward computes what the block does.

    The proof runs a copy of the block in float64 with random weights, in training and in evaluation mode, so blocks
    that differ by their weights alone need one. proofs: what is known of others, by structure; it is added to.

    Raises:
        CannotFuseError: the block cannot run with tails, or cannot be examined; the message says why.
    """
    with errors_as_reasons("it cannot be examined"):
        known = KNOWN_BLOCKS[kind]
        if known.refusal is not None:
            raise CannotFuseError(known.refusal)
        check_forward(block)
        for path in known.norms:
            try:
                norm = block.get_submodule(path)
            except AttributeError:
                raise CannotFuseError(f"it has no {path}: another norm, or none") from None
            if (problem := norm_problem(norm)) is not None:
                raise CannotFuseError(f"its {path}: {problem}")
        se = main_se(block, kind)
        if (another := not_covered(se)) is not None:
            raise CannotFuseError(f"its attention is {type(se).__name__}: {another}")
        recipe = recipe_in_tail(se, norm, verify=verify, proofs=proofs)
        drop_path, dropped = _drop_path_of(block, known), None
        if drop_path is not None:
            if not isinstance(drop_path, nn.Module):
                raise CannotFuseError(f"its drop_path is a {type(drop_path).__name__}, not a module")
            if isinstance(drop_path, DROPOUTS) or list(drop_path.parameters()):
                raise CannotFuseError(f"its drop_path, a {type(drop_path).__name__}, does not drop whole samples")
            dropped = (type(drop_path), type(drop_path).forward)
        fusion = BlockFusion(kind, recipe, dropped, None, verify)
        if verify:
            prove_once(block, proofs, lambda: _prove(block, fusion))
        return fusion


def _prove(block: nn.Module, fusion: BlockFusion) -> bool:
    with isolated():
        trial = _BlockTrial(block, fusion)
        try:
            trial.prove()
        finally:
            trial.watch.restore()
    return True


_EVEN, _ODD = (6, 4, 2), (7, 5, 3)  # a shortcut that pools may only take even planes
_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_MOST_ELEMENTS = 300_000  # of an activation that is tried out: more takes minutes in a block's convolutions, in 3-D


class _BlockTrial(Trial):
    """A block beside the known forward on another copy of it."""

    bound = 1e-8  # sums in another order through three convolutions
    noise = 1e-12  # a gradient that BatchNorm cancels is nothing but rounding
    casts, draws = False, True
    replacement_name = "the known forward"

    def __init__(self, block: nn.Module, fusion: BlockFusion) -> None:
        ours = random_copy(block, torch.Generator("cpu").manual_seed(0))
        theirs = copy.deepcopy(ours)
        for module in theirs.modules():
            if isinstance(module, FusedModule):
                revert(module)
        first = next((module for module in ours.modules() if type(module) in _CONVOLUTIONS), None)
        if first is None:
            raise CannotFuseError("it has no plain convolution, which would say how many channels its input has")
        self.dimensions = first.weight.dim() - 2
        plain = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)[self.dimensions - 1]
        for module in (*theirs.modules(), *ours.modules()):
            if type(module) is nn.SyncBatchNorm:  # whose own forward is for GPUs alone
                module.__class__ = plain
        super().__init__(theirs, ours)
        self.fusion, self.channels = fusion, first.in_channels
        self._tails = Tails(fusion.recipe, fusion.drop_path, "auto")

    def replacement(self, x: Tensor) -> Tensor:
        return KNOWN_BLOCKS[self.fusion.kind].forward(self.owner, x.clone(), self._tails)

    def scale(self, x: Tensor, y: Tensor) -> Tensor:
        return y

    def differs(self, what: str, error: float) -> CannotFuseError:
        return CannotFuseError(f"{what} differs from the known forward's by {error:.3g} of it")

    def input(self, samples: int, plane: tuple[int, ...]) -> Tensor:
        generator = torch.Generator("cpu").manual_seed(samples)
        return torch.randn((samples, self.channels, *plane), generator=generator, dtype=torch.float64)

    def prove(self) -> None:
        for training in (True, False):
            for module in (self.theirs, self.owner):
                module.train(training)
            for _ in range(2):
                self.compare_steps(self.input(4, _EVEN[: self.dimensions]))
                self.watch.settle()
                if not training:
                    self._compare_planes()
                for module in (self.theirs, self.owner):  # a hidden unit that is dead hides what is squeezed
                    first = main_se(module, self.fusion.kind).get_submodule(".".join(self.fusion.recipe.first))
                    with torch.no_grad():
                        for parameter in first.parameters():
                            parameter.neg_()

    def _compare_planes(self) -> None:
        """For planes of other sizes, very large values and NaN, in evaluation."""
        even, odd = _EVEN[: self.dimensions], _ODD[: self.dimensions]
        widest = max(self.channels, *(t.shape[0] for t in self.theirs.parameters()))
        larger = larger_planes(integers_of(self.theirs, self.watch), widest, self.dimensions)
        larger = (tuple(max(n, _EVEN[0]) for n in plane) for plane in larger)
        affordable = (plane for plane in larger if widest * math.prod(plane) <= _MOST_ELEMENTS)
        for plane in (None, even, odd, *affordable):
            x = self.input(2, even if plane is None else plane)
            if plane is None:
                x[0] *= 1e8
                x[1, ..., 0] = torch.nan
            try:
                y = self.run(x)
            except CannotFuseError:
                raise
            except Exception:  # a pooling for even planes
                continue
            what = "of very large values" if plane is None else f"for an input {list(x.shape)}"
            self.compare_outputs(x, y, f"{what} its output")
