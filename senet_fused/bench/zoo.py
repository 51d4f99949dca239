"""Whole networks by name: timm's, torchvision's, and whatever a function in a file returns. Nothing is downloaded.

    load        a name -> the network, with random weights that depend on the seed only
    input_size  a network -> the shape of one input, which the user may give instead
    settle      makes a network that has just been initialised behave like a trained one in evaluation mode

A name is ``NAME`` (timm is asked first, then torchvision), ``timm:NAME``, ``torchvision:NAME`` or ``FILE.py:FACTORY``.
"""

from __future__ import annotations

import difflib
import importlib
import inspect
from collections.abc import Callable, Iterable
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import nn

from ..arguments import RequestError
from ..factories import factory_of_file
from .timing import describe

__all__ = ["LIBRARIES", "input_size", "load", "settle"]

LIBRARIES = ("timm", "torchvision")  # in the order in which they are asked
_DEFAULT_SIZE = (3, 224, 224)
_SETTLING_BATCH = 4
_NORMALISATIONS = (
    nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm, nn.GroupNorm, nn.LayerNorm,
)  # fmt: skip


def load(name: str, *, num_classes: int | None = None, seed: int = 0) -> nn.Module:
    """The network of this name, on the CPU, in float32 and training mode, as its library makes it.

    Args:
        name: as the module's docstring says.
        num_classes: instead of the library's own number; a factory in a file takes no such argument.
        seed: of the weights, as far as PyTorch's generator draws them. The caller's random state is not touched.

    Raises:
        RequestError: no library knows the name (the message has similar names), the one that is asked for is not
            installed, the file or the factory is missing, or making the network fails.
    """
    prefix, _, rest = name.rpartition(":")
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        if prefix.endswith(".py"):
            if num_classes is not None:
                raise RequestError(f"{name} makes its network itself; set the number of classes ({num_classes}) there")
            return _of_file(name, Path(prefix), rest).train()
        if prefix not in ("", *LIBRARIES):
            raise RequestError(
                f"cannot read the model {name!r}; write NAME, timm:NAME, torchvision:NAME or FILE.py:FACTORY"
            )
        make = _maker(rest, (prefix,) if prefix else LIBRARIES)
        return _made(name, lambda: make(**({} if num_classes is None else {"num_classes": num_classes}))).train()


def input_size(model: nn.Module, size: str | None = None) -> tuple[int, ...]:
    """The shape of one input without the batch.

    Args:
        model: its ``default_cfg["input_size"]`` counts, which timm's networks have; others take 3x224x224.
        size: what the user gave instead: ``N`` (a square with the channels as above), or the whole shape: ``C,H,W``,
            also ``C,L`` and ``C,D,H,W``.

    Raises:
        RequestError: size cannot be read.
    """
    config = getattr(model, "default_cfg", None)
    known = config.get("input_size") if isinstance(config, dict) else None
    known = tuple(known) if known else _DEFAULT_SIZE
    if size is None:
        return known
    try:
        sizes = tuple(int(part) for part in size.split(","))
    except ValueError:
        sizes = ()
    if not 1 <= len(sizes) <= 4 or min(sizes) < 1:
        raise RequestError(
            f"cannot read the input size {size!r}; write N for a square image, or the shape of one input without the "
            "batch: C,H,W (or C,L, or C,D,H,W), for instance 192 or 1,28,28"
        )
    return (known[0], *sizes * 2) if len(sizes) == 1 else sizes


@torch.no_grad()
def settle(model: nn.Module, size: tuple[int, ...], seed: int = 0) -> None:
    """Gives new normalisations the state that training would, so that every branch of the network matters.

    Only those are touched that are as they are made. Weights that are all zero, as libraries begin the last
    normalisation of a residual branch, become ones: behind zeros nobody sees what an SE layer computes. Running
    statistics of mean 0 and variance 1 become those of one batch of random numbers: with the others activations grow
    or vanish layer by layer, up to infinities, or denormals, which take a CPU many times as long.

    Args:
        model: changed in place; its mode and the random state are afterwards as before.
        size: the shape of one input without the batch.
        seed: of the random numbers.
    """
    modes = {module: module.training for module in model.modules()}
    fresh: dict[nn.Module, Any] = {}
    for module in modes:
        if isinstance(module, _NORMALISATIONS):
            weight = module.weight
            if weight is not None and not weight.any():
                weight.fill_(1)
            mean = getattr(module, "running_mean", None)
            if mean is not None and not mean.any() and (module.running_var == 1).all():
                fresh[module] = module.momentum
    if not fresh:
        return
    parameter = next(iter(model.parameters()))
    model.eval()
    try:
        for module in fresh:
            module.train()
            module.momentum = 1.0
        generator = torch.Generator().manual_seed(seed)
        model(torch.randn(_SETTLING_BATCH, *size, generator=generator).to(parameter.device, parameter.dtype))
    finally:
        for module, momentum in fresh.items():
            module.momentum = momentum
        for module, training in modes.items():
            module.training = training


def _made(name: str, make: Callable[[], Any]) -> nn.Module:
    try:
        model = make()
    except Exception as error:
        raise RequestError(f"making {name} failed: {describe(error)}") from error
    if not isinstance(model, nn.Module):
        raise RequestError(f"{name} made a {type(model).__name__}; a torch.nn.Module is expected")
    return model


def _similar(name: str, known: Iterable[str]) -> str:
    close = difflib.get_close_matches(name, list(known), n=5)
    return f"; similar: {', '.join(close)}" if close else ""


# --------------------------------------------------------------------------------------------------- libraries


def _maker(name: str, libraries: tuple[str, ...]) -> Callable[..., Any]:
    """What makes the network of this name: the first library's that has it."""
    missing, known = [], []
    for library in libraries:
        try:
            module = importlib.import_module(library)
        except ModuleNotFoundError as error:
            if error.name != library:
                raise RequestError(f"{library} cannot be imported: {describe(error)}") from None
            missing.append(library)
            continue
        except Exception as error:  # built for another torch, say
            raise RequestError(f"{library} cannot be imported: {describe(error)}") from error
        make, names = (_timm if library == "timm" else _torchvision)(module, name)
        if make is not None:
            return make
        known += names
    if len(missing) == len(libraries):
        which = " or ".join(missing)
        raise RequestError(f"the model {name!r} needs {which}: pip install {missing[0]} (or write FILE.py:FACTORY)")
    asked = " or ".join(library for library in libraries if library not in missing)
    hint = "".join(f"; {library} is not installed (pip install {library})" for library in missing)
    raise RequestError(f"there is no model {name!r} in {asked}{_similar(name, known)}{hint}")


def _timm(timm: ModuleType, name: str) -> tuple[Callable[..., Any] | None, Iterable[str]]:
    # is_model says no to names that stand for a download, as "hf-hub:..." does.
    if not timm.is_model(name):
        return None, timm.list_models()
    return lambda **options: timm.create_model(name, pretrained=False, **options), ()


def _torchvision(torchvision: ModuleType, name: str) -> tuple[Callable[..., Any] | None, Iterable[str]]:
    models = importlib.import_module("torchvision.models")
    if name not in models.list_models():
        return None, models.list_models()
    builder = models.get_model_builder(name)
    # Detection and segmentation would download a trained backbone where only the head is to be random.
    without = [key for key in ("weights", "weights_backbone") if key in inspect.signature(builder).parameters]
    return lambda **options: builder(**dict.fromkeys(without), **options), ()


# ------------------------------------------------------------------------------------------------------- files


def _of_file(name: str, path: Path, factory: str) -> nn.Module:
    """What a function without arguments in a file returns."""
    with factory_of_file(path, factory) as make:
        return _made(name, make)
