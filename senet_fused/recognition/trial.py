"""Trying somebody's module out: never itself, always a copy, with random weights and with nothing around."""

from __future__ import annotations

import contextlib
import copy
import math
import random
import sys
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from .. import ops, torch_private
from .recipe import parts_of

__all__ = ["Unsuited", "nothing_around", "random_copy", "random_states", "structure_of", "unsuited"]


class Unsuited(ValueError):
    """A layer that squeeze_excite cannot stand in for; the message says why."""


@contextlib.contextmanager
def unsuited(what: str) -> Iterator[None]:
    """Whatever goes wrong within the block is a reason to leave the module. Raises Unsuited, and nothing else."""
    try:
        yield
    except Unsuited:
        raise
    except Exception as error:
        raise Unsuited(f"{what}: {type(error).__name__}: {error}") from error


@contextlib.contextmanager
def nothing_around() -> Iterator[None]:
    """Gradients, and none of the caller's modes; random states and the counts of calls are afterwards as before."""
    numpy = sys.modules.get("numpy")
    pythons, numpys = random.getstate(), None if numpy is None else numpy.random.get_state()
    elsewhere = torch.get_default_device().type != "cpu"
    with (
        torch.inference_mode(False),
        torch.enable_grad(),
        torch.autocast("cpu", enabled=False),
        # Detached: an operator's output that its own backward holds on to would never be freed.
        torch.autograd.graph.saved_tensors_hooks(torch.detach, lambda t: t),
        torch_private.without_modes(),
        torch.device("cpu") if elsewhere else contextlib.nullcontext(),  # it makes every call of PyTorch slower
        torch.random.fork_rng(devices=[]),
        ops.uncounted(),
    ):
        try:
            yield
        finally:
            random.setstate(pythons)
            if numpy is not None:
                numpy.random.set_state(numpys)


def random_states() -> tuple[Any, ...]:
    """Of PyTorch's and Python's generators and, where somebody has imported it, of NumPy's; to be compared."""
    numpy = sys.modules.get("numpy")
    states = () if numpy is None else numpy.random.get_state()
    numpys = tuple(part.tobytes() if isinstance(part, numpy.ndarray) else part for part in states)
    return torch.get_rng_state().tolist(), random.getstate(), numpys


def random_copy(layer: nn.Module, generator: torch.Generator) -> nn.Module:
    """A deep copy without hooks, with random weights in float64 on the CPU, whatever and wherever the layer's are.

    Buffers are positive, as a variance has to be; counters begin at zero.

    Raises:
        Unsuited: it cannot be copied, or its copy is none.
    """
    memo: dict[int, Any] = {}
    made = set()
    for module in layer.modules():
        # Hooks are not the layer's arithmetic, and may hold on to anything.
        memo.update((id(v), type(v)()) for k, v in vars(module).items() if k.endswith("_hooks"))
        for parameter in module._parameters.values():
            if parameter is not None:
                values = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
                scale = max(math.prod(parameter.shape[1:]), 1) ** -0.5
                made.add(memo.setdefault(id(parameter), nn.Parameter(values * scale)))
        if isinstance(module, nn.SyncBatchNorm) and module.process_group is not None:
            memo[id(module.process_group)] = None  # processes cannot be copied, and the proof runs in one
        for buffer in module._buffers.values():
            if buffer is None:
                continue
            if buffer.is_floating_point():
                values = 0.5 + torch.rand(buffer.shape, generator=generator, dtype=torch.float64)
            else:
                values = torch.zeros(buffer.shape, dtype=buffer.dtype)
            made.add(memo.setdefault(id(buffer), values))
    try:
        copied = copy.deepcopy(layer, memo)
    except Exception as error:
        raise Unsuited(f"it cannot be copied, and so not be tried out: {error}") from error
    if type(copied) is not type(layer) or not set(layer.modules()).isdisjoint(copied.modules()):
        raise Unsuited("it cannot be tried out: a deep copy of it is no other object of its class")
    if not made.issuperset((*copied.parameters(), *copied.buffers())):
        raise Unsuited("it cannot be tried out: a deep copy of it has weights that are no copies of its own")
    return copied


def structure_of(module: nn.Module) -> Any | None:
    """All that a module's result depends on but for its numbers; None where that cannot be compared."""
    key = (
        type(module),
        tuple((part.path, part.kind, part.settings) for part in parts_of(module)),
        tuple(vars(child).get("inplace") for child in module.modules()),
        tuple((name, t.shape, t.dtype) for name, t in (*module.named_parameters(), *module.named_buffers())),
    )
    try:
        hash(key)
    except TypeError:
        return None
    return key
