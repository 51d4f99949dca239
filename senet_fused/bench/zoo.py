"""Whole networks by name, with random weights: timm's, torchvision's, and what a function in a file returns."""

from __future__ import annotations

import difflib
import importlib
import inspect
from collections.abc import Callable
from pathlib import Path
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

_NORMALISATIONS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm, nn.GroupNorm, nn.LayerNorm)


def load(name: str, *, seed: int = 0) -> nn.Module:
    """The network of this name, on the CPU, in float32 and training mode, as its library makes it. No downloads.

    Args:
        name: ``NAME`` (timm is asked first, then torchvision), ``timm:NAME``, ``torchvision:NAME`` or
            ``FILE.py:FACTORY``.
        seed: of the weights, as far as PyTorch's generator draws them. The caller's random state is not touched.

    Raises:
        RequestError: no library knows the name (the message has similar names), the one that is asked for is not
            installed, the file or the factory is missing, or making the network fails.
    """
    prefix, _, rest = name.rpartition(":")
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        if prefix.endswith(".py"):
            with factory_of_file(Path(prefix), rest) as make:
                return _made(name, make)
        if prefix not in ("", *LIBRARIES):
            raise RequestError(
                f"cannot read the model {name!r}; write NAME, timm:NAME, torchvision:NAME or FILE.py:FACTORY"
            )
        return _made(name, _maker(rest, (prefix,) if prefix else LIBRARIES))


def _made(name: str, make: Callable[[], Any]) -> nn.Module:
    try:
        model = make()
    except Exception as error:
        raise RequestError(f"making {name} failed: {describe(error)}") from error
    if not isinstance(model, nn.Module):
        raise RequestError(f"{name} made a {type(model).__name__}; a torch.nn.Module is expected")
    return model.train()


def _maker(name: str, libraries: tuple[str, ...]) -> Callable[[], Any]:
    """What makes the network of this name: the first library's that has it."""
    missing, known = [], []
    for library in libraries:
        try:
            importlib.import_module(library)
            models = importlib.import_module("torchvision.models" if library == "torchvision" else library)
        except Exception as error:
            if not isinstance(error, ModuleNotFoundError) or error.name != library:  # built for another torch, say
                raise RequestError(f"{library} cannot be imported: {describe(error)}") from error
            missing.append(library)
            continue
        if library == "timm" and models.is_model(name):  # not of names that stand for a download, as "hf-hub:..." does
            return lambda models=models: models.create_model(name, pretrained=False)
        if library == "torchvision" and name in models.list_models():
            builder = models.get_model_builder(name)
            # Detection and segmentation would download a trained backbone where only the head is to be random.
            without = {"weights", "weights_backbone"} & set(inspect.signature(builder).parameters)
            return lambda: builder(**dict.fromkeys(without))
        known += models.list_models()
    if len(missing) == len(libraries):
        which = " or ".join(missing)
        raise RequestError(f"the model {name!r} needs {which}: pip install {missing[0]} (or write FILE.py:FACTORY)")
    asked = " or ".join(library for library in libraries if library not in missing)
    close = difflib.get_close_matches(name, known, n=5)
    similar = f"; similar: {', '.join(close)}" if close else ""
    hint = "".join(f"; {library} is not installed (pip install {library})" for library in missing)
    raise RequestError(f"there is no model {name!r} in {asked}{similar}{hint}")


def input_size(model: nn.Module, size: str | None = None) -> tuple[int, ...]:
    """The shape of one input without the batch: what size says, else timm's ``default_cfg``, else 3 x 224 x 224.

    Args:
        size: ``N`` for a square of the network's own channels, or ``C,L``, ``C,H,W``, ``C,D,H,W``.

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
    """Gives normalisations the state that training would, so that every branch of the network matters.

    Weights that are all zero, as libraries begin the last normalisation of a residual branch, become ones: behind zeros
    the output does not depend on an SE layer. Running statistics become those of one batch of random numbers: with
    those of a new network activations grow or vanish layer by layer, up to infinities, or denormals, which take a CPU
    many times as long.

    Args:
        model: changed in place; its mode and the random state are afterwards as before.
        size: the shape of one input without the batch.
        seed: of the random numbers.
    """
    for module in model.modules():
        if isinstance(module, _NORMALISATIONS) and module.weight is not None and not module.weight.any():
            module.weight.fill_(1)
    parameter = next(iter(model.parameters()), None)
    if parameter is not None:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            batch = torch.randn(_SETTLING_BATCH, *size).to(parameter.device, parameter.dtype)
            torch.optim.swa_utils.update_bn([batch], model)
