"""The network to train, by its name."""

from __future__ import annotations

import argparse
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

__all__ = ["check_network", "make_network"]

_SE = {"none": "reference", "se": "fused", "tails": "tails"}


def make_network(settings: argparse.Namespace, classes: int, channels: int) -> nn.Module:
    """The network, on the CPU, in training mode, with weights drawn from the seed.

    ``NAME`` is a network of ``senet_fused.models``; ``timm:NAME`` and ``torchvision:NAME`` one of these libraries,
    without pretrained weights; ``FILE.py:FACTORY`` what a function or class in a file returns for those of the
    arguments ``num_classes``, ``in_chans``, ``drop_path_rate`` and ``dropout`` that it has.

    Raises:
        RequestError: there is no such network, it cannot be built, lacks an option, or has nothing to train.
    """
    name = settings.model
    library, _, rest = name.rpartition(":")
    sizes = {"num_classes": classes, "in_chans": channels}
    torch.manual_seed(settings.seed)
    if not library:
        return _from_zoo(settings, sizes)
    for option, given in (("--no-se", settings.no_se), ("--reduction", settings.reduction is not None)):
        if given:
            raise RequestError(f"{option} is only for the networks of senet_fused.models, not for {name}")
    if library == "timm":
        network = _from_timm(rest, settings, sizes)
    elif library == "torchvision":
        network = _from_torchvision(rest, settings, classes)
    elif library.endswith(".py"):
        with factory_of_file(Path(library), rest) as factory:
            network = _from_factory(factory, settings, sizes)
    else:
        raise RequestError(f"--model must be NAME, timm:NAME, torchvision:NAME or FILE.py:FACTORY, got {name!r}")
    if not any(parameter.requires_grad for parameter in network.parameters()):
        raise RequestError(f"{name} has no parameters to train")
    if settings.fuse != "none":
        senet_fused.fuse(network, tails=settings.fuse == "tails")
    return network.train()


def _require_known(name: str, known: list[str], where: str) -> None:
    if name not in known:
        similar = difflib.get_close_matches(name, known, 3, 0.4)
        raise RequestError(
            f"{where} has no network {name!r}; "
            + (f"similar: {', '.join(similar)}" if similar else f"it has {', '.join(known[:30])}")
        )


def _from_zoo(settings: argparse.Namespace, sizes: dict[str, int]) -> nn.Module:
    _require_known(
        settings.model, list(models.model_names()), "senet_fused.models (others: timm:NAME, FILE.py:FACTORY)"
    )
    options = {"se": None if settings.no_se else _SE[settings.fuse], "reduction": settings.reduction}
    if settings.drop_path:  # not all networks have residual branches
        options["drop_path"] = settings.drop_path
    if settings.dropout is not None:  # some networks have a rate of their own
        options["dropout"] = settings.dropout
    return _built(settings.model, lambda: models.create_model(settings.model, **sizes, **options)).train()


def _from_timm(name: str, settings: argparse.Namespace, sizes: dict[str, int]) -> nn.Module:
    try:
        import timm
    except ImportError as error:
        raise RequestError(f"timm:{name} needs timm ({error}): pip install timm") from None
    if not timm.is_model(name):
        _require_known(name, timm.list_models(), f"timm {timm.__version__}")
    options = {"drop_path_rate": settings.drop_path, "drop_rate": settings.dropout}
    given = {key: value for key, value in options.items() if value}
    return _built(settings.model, lambda: timm.create_model(name, pretrained=False, **sizes, **given))


def _from_torchvision(name: str, settings: argparse.Namespace, classes: int) -> nn.Module:
    try:
        from torchvision import models as library
    except (ImportError, RuntimeError) as error:  # the latter from one that was built for another torch
        raise RequestError(
            f"torchvision:{name} needs a torchvision for this torch ({error}): pip install torchvision"
        ) from None
    _require_known(name, library.list_models(library), "torchvision.models")
    options: dict[str, Any] = {"weights": None, "num_classes": classes}
    if settings.drop_path:
        options["stochastic_depth_prob"] = settings.drop_path
    if settings.dropout is not None:
        options["dropout"] = settings.dropout
    return _built(settings.model, lambda: library.get_model(name, **options))


def _from_factory(factory: Callable[..., Any], settings: argparse.Namespace, sizes: dict[str, int]) -> nn.Module:
    name = settings.model
    try:
        parameters = inspect.signature(factory).parameters.values()
    except (TypeError, ValueError):  # of a builtin
        parameters = ()
    takes_all = any(p.kind is p.VAR_KEYWORD for p in parameters)
    names = {p.name for p in parameters}
    options = {**sizes, "drop_path_rate": settings.drop_path, "dropout": settings.dropout}
    for key, option in (("drop_path_rate", "--drop-path"), ("dropout", "--dropout")):
        if options[key] and not takes_all and key not in names:
            raise RequestError(f"{option} {options[key]:g}: {name} has no argument {key}")
    given = {k: v for k, v in options.items() if v is not None and (takes_all or k in names)}
    network = _built(name, lambda: factory(**given))
    if not isinstance(network, nn.Module):
        raise RequestError(f"{name} must return a torch.nn.Module, got {type(network).__name__}")
    return network


def _built(name: str, build: Callable[[], nn.Module]) -> nn.Module:
    try:
        return build()
    except RequestError:
        raise
    except Exception as error:
        raise RequestError(f"cannot build {name}: {type(error).__name__}: {error}") from error


@torch.no_grad()
def check_network(network: nn.Module, name: str, classes: int, shape: tuple[int, int, int]) -> None:
    """Evaluates two images, so that a network that does not fit the data is found before training.

    Raises:
        RequestError: it cannot run on images [N, *shape], or does not return [N, classes].
    """
    parameter = next(network.parameters())
    images = torch.zeros(2, *shape, device=parameter.device, dtype=parameter.dtype)
    try:
        found = network.eval()(images)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        size = " x ".join(map(str, shape))
        raise RequestError(f"{name} cannot run on images of {size}: {type(error).__name__}: {error}") from error
    finally:
        network.train()
    if not isinstance(found, torch.Tensor) or found.shape != (2, classes):
        what = f"a tensor {list(found.shape)}" if isinstance(found, torch.Tensor) else f"a {type(found).__name__}"
        raise RequestError(f"{name} must return [N, {classes}] for N images of {classes} classes, got {what}")
