"""Blocks whose forward is known, and that can run their BatchNorms as block tails.

A form names a block by its structure and says how its forward goes with tails in it; what the block's own class does is
not trusted to be the same, but proven (:func:`examine_block`). Another form is another function and a row of FORMS.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .. import torch_private
from ..recognition import (
    Effect,
    Unsuited,
    Watch,
    beyond,
    is_patched,
    not_covered,
    nothing_around,
    numbers_of,
    random_copy,
    structure_of,
    unsuited,
)  # fmt: skip
from ..tails import Reading, Tail, fits, has_hooks, norm_problem
from .layer import Exchanged, detach

__all__ = ["FORMS", "BlockFusion", "FusedBlock", "block_alteration", "examine_block", "form_of", "main_se"]

_BOUND = 1e-8  # of the largest value or the norm, in float64: sums in another order through three convolutions
_DROPOUTS = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout, nn.FeatureAlphaDropout)
_NOISE = 1e-12  # a gradient that BatchNorm cancels is nothing but rounding


class BlockFusion(NamedTuple):
    """What a fused block carries: its form, how its SE layer is read, and as Fusion.

    drop_path: the class of what drops whole samples of its branch, and that class's forward; None if there is nothing.
    """

    kind: str
    reading: Reading
    drop_path: tuple[type[nn.Module], Any] | None
    backend: str | None
    verified: bool


class FusedBlock(Exchanged):
    """The part of a fused block's class that runs the known forward with tails in place of the original one."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        fusion = self._senet_fused
        original, proven = self._senet_original
        if fusion is None or len(args) != 1 or kwargs or isinstance(args[0], torch.fx.Proxy):
            return super().forward(*args, **kwargs)
        if original.forward is not proven or torch_private.has_global_hooks():
            return super().forward(*args, **kwargs)
        return FORMS[fusion.kind].forward(self, args[0], Tails(fusion.reading, fusion.drop_path, fusion.backend))


class Tails(NamedTuple):
    """Runs the tails of one block."""

    reading: Reading
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
                return act(_plus(y, shortcut, in_place))
            if drop_path.training:
                # What drops whole samples multiplies ones as it would multiply the branch, by the same random numbers.
                ones = torch.ones((x.shape[0], *(1,) * (x.dim() - 1)), dtype=x.dtype, device=x.device)
                factor = drop_path(ones).flatten()
        relu = act if type(act) is nn.ReLU else None
        y = Tail(norm, se, self.reading, relu, self.backend)(x, shortcut, factor)
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


def _plus(y: Tensor, shortcut: Tensor, in_place: bool) -> Tensor:
    return (y + shortcut).to(y.dtype) if in_place else y + shortcut


class BlockForm(NamedTuple):
    """has: the children that a block of this form has, by attribute. hasnt: those it must not have. se: where its SE
    layer is. norms: its BatchNorms, the SE layer's last. input: its first convolution."""

    forward: Callable[[Any, Tensor, Tails], Tensor]
    has: tuple[str, ...]
    se: str
    norms: tuple[str, ...]
    input: str = "conv1"
    hasnt: tuple[str, ...] = ()
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
        return block.act(_plus(block.se_layer(block.conv3(y)), shortcut, True))
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


FORMS: dict[str, BlockForm] = {
    "legacy SE bottleneck": BlockForm(  # timm's legacy SENet, Cadene
        _legacy_bottleneck,
        has=("conv1", "bn1", "conv2", "bn2", "conv3", "bn3", "relu", "se_module", "downsample"),
        se="se_module",
        norms=("bn1", "bn2", "bn3"),
    ),
    "timm bottleneck": BlockForm(
        _timm_bottleneck,
        has=("conv1", "bn1", "act1", "conv2", "bn2", "drop_block", "act2", "aa", "conv3", "bn3", "se", "act3",
             "downsample", "drop_path"),
        se="se",
        norms=("bn1", "bn2", "bn3"),
    ),
    "timm basic block": BlockForm(
        _timm_basic_block,
        has=("conv1", "bn1", "drop_block", "act1", "aa", "conv2", "bn2", "se", "act2", "downsample", "drop_path"),
        hasnt=("conv3",),
        se="se",
        norms=("bn1", "bn2"),
    ),
    "MONAI SE block": BlockForm(
        _monai_block,
        has=("conv1", "conv2", "conv3", "se_layer", "project", "act"),
        se="se_layer",
        norms=("conv1.adn.N", "conv2.adn.N", "conv3.adn.N"),
        input="conv1.conv",
    ),
    "legacy SE basic block": BlockForm(
        _legacy_bottleneck,  # never run
        has=("conv1", "bn1", "conv2", "bn2", "relu", "se_module", "downsample"),
        hasnt=("conv3",),
        se="se_module",
        norms=("bn1", "bn2"),
        refusal="BatchNorm -> ReLU -> SE: the squeeze of a rectified output does not follow from BatchNorm's sums",
    ),
}  # fmt: skip


def form_of(block: nn.Module) -> str | None:
    """The form whose structure the block has, with some attention in it; None if there is none."""
    own = {**block._modules, **vars(block)}
    for kind, form in FORMS.items():
        fits = all(name in own for name in form.has) and not any(name in own for name in form.hasnt)
        if fits and isinstance(own[form.se], nn.Module) and not isinstance(own[form.se], nn.Identity):
            return kind
    return None


def main_se(block: nn.Module, kind: str) -> nn.Module:
    """The SE layer of a block of this form."""
    return block.get_submodule(FORMS[kind].se)


def block_alteration(block: nn.Module) -> str | None:
    """Why a fused block's tail is run module by module at present; None if it is not."""
    original, proven = block._senet_original
    fusion = block._senet_fused
    if original.forward is not proven:
        return f"the forward of {original.__name__} has been replaced since"
    form = FORMS[fusion.kind]
    for path in form.norms:
        last = path == form.norms[-1]
        try:
            norm = block.get_submodule(path)
        except AttributeError:
            return f"its {path} has been removed"
        se = main_se(block, fusion.kind) if last else None
        weights = Tail(norm, se, fusion.reading if last else None).weights()
        if isinstance(weights, str):
            return f"{path}: {weights}"
    drop_path = _drop_path_of(block, form)
    if drop_path is not None:
        if fusion.drop_path != (type(drop_path), type(drop_path).forward) or has_hooks(drop_path):
            return "its drop_path is not what was proven, or has hooks"
    return None


def _drop_path_of(block: nn.Module, form: BlockForm) -> Any:
    """What a block of this form calls as its drop_path; None if it has none, or one that does nothing."""
    drop_path = getattr(block, "drop_path", None) if "drop_path" in form.has else None
    return None if isinstance(drop_path, nn.Identity) else drop_path


# ---------------------------------------------------------------------------------------------------- the proof


def examine_block(
    block: nn.Module, kind: str, *, backend: str | None = None, verify: bool = True, proven: dict[Any, Any]
) -> BlockFusion:
    """What a fused block is to carry, after a proof that the form's forward computes what the block does.

    The proof runs a copy of the block in float64 with random weights, in training and in evaluation mode, so blocks
    that differ by their weights alone need one. proven: what is known of others, by structure; it is added to.

    Raises:
        Unsuited: the block cannot run with tails, or cannot be examined; the message says why.
    """
    with unsuited("it cannot be examined"):
        return _examined(block, kind, backend, verify, proven)


def _examined(block: nn.Module, kind: str, backend: str | None, verify: bool, proven: dict[Any, Any]) -> BlockFusion:
    form = FORMS[kind]
    if form.refusal is not None:
        raise Unsuited(form.refusal)
    if isinstance(block, (torch.jit.ScriptModule, torch.fx.GraphModule)) or "forward" in vars(block):
        raise Unsuited("its forward has been compiled, traced or replaced; fuse before that")
    for path in form.norms:
        try:
            norm = block.get_submodule(path)
        except AttributeError:
            raise Unsuited(f"it has no {path}: another norm, or none") from None
        if (problem := norm_problem(norm)) is not None:
            raise Unsuited(f"its {path}: {problem}")
    se = main_se(block, kind)
    if (another := not_covered(se)) is not None:
        raise Unsuited(f"its attention is {type(se).__name__}: {another}")
    reading = Reading.of(se, verify=verify, proven=proven)
    if not fits(block.get_submodule(form.norms[-1]), reading.recipe):
        raise Unsuited("its SE layer is for another number of dimensions than its BatchNorm")
    drop_path, dropped = _drop_path_of(block, form), None
    if drop_path is not None:
        if not isinstance(drop_path, nn.Module):
            raise Unsuited(f"its drop_path is a {type(drop_path).__name__}, not a module")
        if isinstance(drop_path, _DROPOUTS) or list(drop_path.parameters()):
            raise Unsuited(f"its drop_path, a {type(drop_path).__name__}, does not drop whole samples")
        dropped = (type(drop_path), type(drop_path).forward)
    fusion = BlockFusion(kind, reading, dropped, backend, verify)
    if verify:
        key = structure_of(block)
        reason = proven.get(key, _UNKNOWN) if key is not None else _UNKNOWN
        if reason is _UNKNOWN:
            try:
                _prove(block, fusion)
                reason = None
            except Unsuited as error:
                reason = str(error)
            if key is not None:
                proven[key] = reason
        if reason is not None:
            raise Unsuited(reason)
    return fusion


_UNKNOWN = object()


_EVEN, _ODD = (6, 4, 2), (7, 5, 3)  # a shortcut that pools may only take even planes


def _prove(block: nn.Module, fusion: BlockFusion) -> None:
    form = FORMS[fusion.kind]
    with nothing_around():
        generator = torch.Generator("cpu").manual_seed(0)
        ours = random_copy(block, generator)
        theirs = copy.deepcopy(ours)
        for module in theirs.modules():
            if isinstance(module, Exchanged):
                detach(module)
        first = ours.get_submodule(form.input)
        dimensions = {nn.Conv1d: 1, nn.Conv2d: 2, nn.Conv3d: 3}.get(type(first))
        if dimensions is None:
            raise Unsuited(f"its {form.input} is a {type(first).__name__}, no plain convolution")
        plain = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)[dimensions - 1]
        for module in (*theirs.modules(), *ours.modules()):
            if type(module) is nn.SyncBatchNorm:  # whose own forward is for GPUs alone
                module.__class__ = plain
        watch = Watch(theirs, buffers=False)
        try:
            _compare_copies(theirs, ours, fusion, watch, first.in_channels, dimensions)
        except Effect as effect:
            raise Unsuited(str(effect)) from None
        finally:
            watch.restore()


def _compare_copies(
    theirs: nn.Module, ours: nn.Module, fusion: BlockFusion, watch: Watch, channels: int, dimensions: int
) -> None:
    form, tails = FORMS[fusion.kind], Tails(fusion.reading, fusion.drop_path, "auto")

    def known(x: Tensor) -> Tensor:
        return form.forward(ours, x, tails)

    def watched(x: Tensor) -> Tensor:
        with watch.running():
            return theirs(x)

    shape = (4, channels, *_EVEN[:dimensions])
    for training in (True, False):
        for module in (theirs, ours):
            module.train(training)
        for _ in range(2):
            results = []
            for module, run in ((theirs, watched), (ours, known)):
                x = torch.randn(shape, generator=torch.Generator("cpu").manual_seed(1), dtype=torch.float64)
                torch.manual_seed(2)  # dropped paths and blocks
                with unsuited(f"it does not run on an input {list(shape)}"):
                    results.append(_outcome(module, run, x.requires_grad_()))
            watch.settle()
            _compare(*results, "training" if training else "evaluation")
            if not training:
                _compare_planes(watched, known, theirs, watch, channels, dimensions)
            for module in (theirs, ours):  # a hidden unit that is dead hides what is squeezed: this makes it alive
                first = main_se(module, fusion.kind).get_submodule(".".join(fusion.reading.recipe.first))
                with torch.no_grad():
                    for parameter in first.parameters():
                        parameter.neg_()


_MOST_ELEMENTS = 300_000  # of an activation that is tried out: more takes minutes in a block's convolutions, in 3-D


def _compare_planes(
    watched: Callable[[Tensor], Tensor],
    known: Callable[[Tensor], Tensor],
    theirs: nn.Module,
    watch: Watch,
    channels: int,
    dimensions: int,
) -> None:
    """Raises Unsuited unless outputs agree for planes of other sizes, very large values and NaN, in evaluation."""
    widest = max(t.shape[0] for t in theirs.parameters())
    larger = beyond(numbers_of(theirs, watch), max(widest, channels), dimensions)
    larger = (tuple(max(n, _EVEN[0]) for n in plane) for plane in larger)
    affordable = (plane for plane in larger if max(widest, channels) * math.prod(plane) <= _MOST_ELEMENTS)
    planes = (_EVEN[:dimensions], _ODD[:dimensions], *affordable)
    for plane in planes:
        x = torch.randn((2, channels, *plane), generator=torch.Generator("cpu").manual_seed(4), dtype=torch.float64)
        x[0] *= 1e8 if plane is planes[0] else 1
        x[1, ..., 0] = torch.nan if plane is planes[0] else 1
        with torch.no_grad():
            try:
                expected = watched(x.clone())
            except Exception:  # a pooling for even planes
                continue
            got = known(x.clone())
        if not torch.equal(got.isnan(), expected.isnan()):
            raise Unsuited("it does something about NaN, which the known forward passes on")
        for a, b in zip(got, expected, strict=True):
            if not (a - b).nan_to_num().norm() <= _BOUND * b.nan_to_num().norm():
                what = " of very large values" if plane is planes[0] else ""
                raise Unsuited(f"for an input {list(x.shape)}{what} its output differs from the known forward's")


def _outcome(module: nn.Module, run: Callable[[Tensor], Tensor], x: Tensor) -> dict[str, Tensor | None]:
    y = run(x)
    if not isinstance(y, Tensor):
        raise Unsuited(f"it returns a {type(y).__name__}")
    dy = torch.randn(y.shape, generator=torch.Generator("cpu").manual_seed(3), dtype=y.dtype)
    named = dict(module.named_parameters())
    gradients = torch.autograd.grad(y, (x, *named.values()), dy, allow_unused=True)
    found = dict(zip(("input", *named), gradients, strict=True))
    return {
        "its output": y.detach(),
        **{f"the gradient of its {name}": g for name, g in found.items()},
        **{f"its {name}": t.detach().clone() for name, t in module.named_buffers()},
    }


def _compare(theirs: dict[str, Tensor | None], ours: dict[str, Tensor | None], mode: str) -> None:
    total = max(t.norm().item() for name, t in theirs.items() if t is not None and name.startswith("the gradient"))
    for name, expected in theirs.items():
        got = ours[name]
        if (expected is None) != (got is None):
            raise Unsuited(f"in {mode} mode {name} is missing in one of the two")
        if expected is None:
            continue
        if got.shape != expected.shape or got.dtype != expected.dtype:
            raise Unsuited(f"in {mode} mode {name} is {list(expected.shape)} {expected.dtype}, not as known")
        error, scale = (got.double() - expected.double()).norm().item(), expected.double().norm().item()
        if not error <= _BOUND * scale + (_NOISE * total if name.startswith("the gradient") else 0):
            share = error / max(scale, 1e-300)
            raise Unsuited(f"in {mode} mode {name} differs from the known forward's by {share:.3g} of it")
