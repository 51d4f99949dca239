"""The network to train, by its name; how its SE layers run; and what a checkpoint says of it."""

from __future__ import annotations

import copy
import difflib
import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

import senet_fused
from senet_fused import models

from ..arguments import RequestError
from ..factories import factory_of_file
from .settings import Settings

__all__ = ["check_network", "describe", "make_network", "se_layers"]

_SE = {"none": "reference", "se": "fused", "tails": "tails"}


def make_network(settings: Settings, classes: int, shape: tuple[int, ...]) -> nn.Module:
    """The network, on the CPU, in float32 and training mode, with weights that the seed draws.

    ``NAME`` is one of ``senet_fused.models``, ``timm:NAME`` one of timm, without its pretrained weights, and
    ``FILE.py:FACTORY`` what a function or class in a file returns for those of the arguments ``num_classes``,
    ``in_chans``, ``drop_path_rate`` and ``dropout`` that it has.

    Args:
        shape: of one image, channels first.

    Raises:
        RequestError: there is no such network, it cannot be made, has no such option, or nothing to train.
    """
    name = settings.model
    sizes = {"num_classes": classes, "in_chans": shape[0]}
    prefix, _, rest = name.rpartition(":")
    torch.manual_seed(settings.seed)
    if prefix == "":
        return _own(settings, sizes)
    if settings.no_se:
        raise RequestError(f"--no-se is for the networks of this package; {name} decides itself where it has SE layers")
    if settings.reduction is not None:
        raise RequestError(f"--reduction is for the networks of this package; {name} decides itself; leave it out")
    if prefix == "timm":
        network = _of_timm(rest, settings, sizes)
    elif prefix.endswith(".py"):
        network = _of_file(Path(prefix), rest, settings, sizes)
    else:
        raise RequestError(f"cannot read --model {name}; write NAME, timm:NAME or FILE.py:FACTORY")
    if not any(parameter.requires_grad for parameter in network.parameters()):
        raise RequestError(f"{name} has no parameters to train")
    if settings.fuse != "none":
        senet_fused.fuse(network, tails=settings.fuse == "tails")
    return network.train()


def _own(settings: Settings, sizes: dict[str, int]) -> nn.Module:
    name, known = settings.model, models.model_names()
    if name not in known:
        similar = difflib.get_close_matches(name, known, 3, 0.4)
        meant = f"; similar: {', '.join(similar)}" if similar else f"; known: {', '.join(known)}"
        raise RequestError(f"there is no network {name!r}{meant} (others: timm:NAME, FILE.py:FACTORY)")
    se = None if settings.no_se else _SE[settings.fuse]
    options = {"reduction": settings.reduction}
    if settings.drop_path:  # not all networks have residual branches
        options["drop_path"] = settings.drop_path
    if settings.dropout is not None:  # some networks have a rate of their own
        options["dropout"] = settings.dropout
    return _made(name, lambda: models.create_model(name, se=se, **sizes, **options)).train()


def _of_timm(name: str, settings: Settings, sizes: dict[str, int]) -> nn.Module:
    try:
        import timm
    except ImportError as error:
        raise RequestError(f"timm:{name} needs timm ({error}): pip install timm") from None
    if not timm.is_model(name):
        similar = ", ".join(difflib.get_close_matches(name, timm.list_models(), 3, 0.4))
        raise RequestError(f"timm {timm.__version__} has no model {name!r}{f'; similar: {similar}' if similar else ''}")
    options = {"drop_path_rate": settings.drop_path, "drop_rate": settings.dropout}
    given = {key: value for key, value in options.items() if value}
    return _made(f"timm:{name}", lambda: timm.create_model(name, pretrained=False, **sizes, **given))


def _of_file(path: Path, name: str, settings: Settings, sizes: dict[str, int]) -> nn.Module:
    with factory_of_file(path, name) as factory:
        return _of_factory(factory, f"{path}:{name}", settings, sizes)


def _of_factory(factory: Callable[..., Any], what: str, settings: Settings, sizes: dict[str, int]) -> nn.Module:
    try:
        parameters = inspect.signature(factory).parameters.values()
    except (TypeError, ValueError):  # of a builtin
        parameters = ()
    takes_all = any(p.kind is p.VAR_KEYWORD for p in parameters)
    names = {p.name for p in parameters}
    options = {"drop_path_rate": settings.drop_path}
    if settings.dropout is not None:
        options["dropout"] = settings.dropout
    given = {key: value for key, value in (sizes | options).items() if takes_all or key in names}
    for key, option in (("drop_path_rate", "--drop-path"), ("dropout", "--dropout")):
        if options.get(key) and key not in given:
            raise RequestError(f"{option} {options[key]:g}: {what} takes no argument {key}")
    network = _made(what, lambda: factory(**given))
    if not isinstance(network, nn.Module):
        raise RequestError(f"{what} must return a torch.nn.Module, got {type(network).__name__}")
    return network


def _made(name: str, make: Callable[[], nn.Module]) -> nn.Module:
    try:
        return make()
    except RequestError:
        raise
    except Exception as error:
        kind = "" if isinstance(error, ValueError) else f"{type(error).__name__}: "
        raise RequestError(f"cannot make {name}: {kind}{error}") from error


def describe(settings: Settings, classes: int, shape: tuple[int, ...]) -> dict[str, Any]:
    """What makes the network what it is, for a checkpoint: a state is loaded into another one only by mistake."""
    return {
        "model": settings.model,
        "classes": classes,
        "image": list(shape),
        "se": "none" if settings.no_se else _SE[settings.fuse],
        "reduction": settings.reduction,
    }


def se_layers(network: nn.Module, settings: Settings) -> str:
    """In words: which SE layers the network has, and how many of them, and of its blocks, run fused."""
    if settings.no_se:
        return "none (the twin without SE)"
    tails = sum(isinstance(module, senet_fused.FusedSETail) for module in network.modules())
    text = senet_fused.fuse_report(network).summary
    return f"{text}; {tails} FusedSETail" if tails else text


def check_network(network: nn.Module, settings: Settings, classes: int, shape: tuple[int, ...]) -> None:
    """Runs a copy of the network on one small batch, so that what does not fit is found before the training.

    Every process calls it: a synchronised BatchNorm waits for all of them. It may draw random numbers.

    Raises:
        RequestError: it takes no such images, returns other than [N, classes], has synchronised BatchNorms that
            cannot run on this device, or others that cannot train on batches of one image.
        torch.OutOfMemoryError: of a GPU.
    """
    parameter = next(network.parameters())
    images = torch.zeros(2, *shape, device=parameter.device, dtype=parameter.dtype)
    # In training mode only where that is in question: BatchNorm then needs more than one value per channel.
    trial = copy.deepcopy(network).train(settings.sync_batchnorm)
    if settings.sync_batchnorm:
        trial = nn.SyncBatchNorm.convert_sync_batchnorm(trial)
    try:
        with torch.no_grad():
            found = trial(images)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        if settings.sync_batchnorm and "SyncBatchNorm" in str(error):
            raise RequestError(
                "--sync-batchnorm on a CPU: torch's SyncBatchNorm runs on GPUs only. Block tails synchronise on CPUs "
                "as well, if every BatchNorm of the network is in one: --fuse tails. Or leave --sync-batchnorm out"
            ) from None
        why = f"{type(error).__name__}: {error}"
        raise RequestError(f"{settings.model} cannot run on images of {' x '.join(map(str, shape))}: {why}") from error
    if not isinstance(found, torch.Tensor) or found.shape != (2, classes):
        what = f"a tensor {list(found.shape)}" if isinstance(found, torch.Tensor) else f"a {type(found).__name__}"
        raise RequestError(f"{settings.model} must return [N, {classes}] for N images of {classes} classes, got {what}")
    if settings.batch_size == 1 and not settings.sync_batchnorm:
        _check_batch_of_one(trial, images[:1], settings)


def _check_batch_of_one(trial: nn.Module, images: torch.Tensor, settings: Settings) -> None:
    try:
        with torch.no_grad():
            trial.train()(images)
    except ValueError as error:
        if "more than 1 value per channel" not in str(error):
            raise RequestError(f"{settings.model} cannot train on a batch of one image: {error}") from error
        raise RequestError(
            f"--batch-size 1: a BatchNorm of {settings.model} has one value per channel, of which there is no "
            "variance; use --batch-size 2 or more (--accumulate does not help), or larger images (--size)"
        ) from None
