"""Trying somebody's module out: never itself, always a copy with random weights, beside what is to run in its place."""

from __future__ import annotations

import abc
import contextlib
import copy
import math
import random
import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from .. import ops, torch_private
from ..parts import parts_of
from .effects import Effect, Watch

__all__ = [
    "CannotFuseError", "Trial", "check_forward", "errors_as_reasons", "isolated", "prove_once", "random_copy",
    "structure_of",
]  # fmt: skip


class CannotFuseError(ValueError):
    """A layer or block that no operator can replace; the message says why."""


@contextlib.contextmanager
def errors_as_reasons(what: str) -> Iterator[None]:
    """Whatever goes wrong within is a reason to leave the module. Raises CannotFuseError, and nothing else."""
    try:
        yield
    except CannotFuseError:
        raise
    except Effect as effect:
        raise CannotFuseError(str(effect)) from None
    except Exception as error:
        raise CannotFuseError(f"{what}: {type(error).__name__}: {error}") from error


@contextlib.contextmanager
def isolated() -> Iterator[None]:
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


def random_copy(layer: nn.Module, generator: torch.Generator) -> nn.Module:
    """A deep copy without hooks, with random weights in float64 on the CPU, whatever and wherever the layer's are.

    Buffers are positive, as a variance has to be; counters begin at zero.

    Raises:
        CannotFuseError: it cannot be copied, or its copy is none.
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
        raise CannotFuseError(f"it cannot be copied, and so not be tried out: {error}") from error
    if type(copied) is not type(layer) or not set(layer.modules()).isdisjoint(copied.modules()):
        raise CannotFuseError("it cannot be tried out: a deep copy of it is no other object of its class")
    if not made.issuperset((*copied.parameters(), *copied.buffers())):
        raise CannotFuseError("it cannot be tried out: a deep copy of it has weights that are no copies of its own")
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


def check_forward(module: nn.Module) -> None:
    """Raises CannotFuseError unless the forward of the module's class is what its call runs."""
    if isinstance(module, (torch.jit.ScriptModule, torch.fx.GraphModule)):
        by = "compiled by TorchScript" if isinstance(module, torch.jit.ScriptModule) else "traced by FX"
        raise CannotFuseError(f"it is {by}; fuse before that")
    if "forward" in vars(module):
        raise CannotFuseError("its forward has been replaced, on this very object")


def prove_once(module: nn.Module, proofs: dict[Any, Any], prove: Callable[[], Any]) -> Any:
    """What prove() returns for the module, or has returned, or raised, for one of the same structure.

    proofs: what is known, by structure; it is added to.
    """
    key = structure_of(module)
    outcome = None if key is None else proofs.get(key)
    if outcome is None:
        try:
            outcome = prove()
        except CannotFuseError as error:
            outcome = str(error)
        if key is not None:
            proofs[key] = outcome
    if isinstance(outcome, str):
        raise CannotFuseError(outcome)
    return outcome


class Trial(abc.ABC):
    """A copy of somebody's module and what is to run in its place: both compute, and the results are compared.

    theirs: the copy, which is watched. owner: the module whose parameters and buffers the replacement uses, which may
    be the copy itself. draws: whether the copy may draw random numbers, and change its buffers.
    """

    bound: float  # of a difference, in units of scale(x, y) or of a gradient's norm
    noise = 0.0  # of the norm of the largest gradient: the rounding in a gradient that is zero
    casts = True  # whether the copy may return another dtype than the replacement
    draws = False
    replacement_name = "the operator"

    def __init__(self, theirs: nn.Module, owner: nn.Module) -> None:
        self.theirs, self.owner = theirs, owner
        self.watch = Watch(theirs, buffers=not self.draws)

    @abc.abstractmethod
    def replacement(self, x: Tensor) -> Tensor:
        """What is to run in the module's place."""

    @abc.abstractmethod
    def scale(self, x: Tensor, y: Tensor) -> Tensor:
        """What the difference from an output y is compared with, sample by sample."""

    @abc.abstractmethod
    def differs(self, what: str, error: float) -> CannotFuseError:
        """The reason, where this is how much what (an output, a gradient, a buffer) differs."""

    @property
    def mode(self) -> str:
        return "in training mode " if self.theirs.training else ""

    def run(self, x: Tensor) -> Tensor:
        """What the copy returns for x, of which it must not change a thing."""
        given = x.clone()
        with torch.no_grad(), self.watch.running():
            y = self.theirs(given)
        if not torch.equal(given.nan_to_num(), x.nan_to_num()):
            raise CannotFuseError("it changes its input in place")
        return y

    def error(self, x: Tensor, y: Tensor) -> float:
        """The largest difference between y, what the copy returned for x, and the replacement's result."""
        with torch.no_grad():
            return self._distance(x, self.replacement(x), y)

    def _distance(self, x: Tensor, ours: Tensor, theirs: Tensor) -> float:
        if ours.shape != theirs.shape or not (self.casts or ours.dtype == theirs.dtype):
            return math.inf
        return distance(ours, theirs, self.scale(x, theirs))

    def compare_outputs(self, x: Tensor, y: Tensor, what: str) -> None:
        """Raises CannotFuseError unless the replacement returns y for x, too; NaN is where it was."""
        with torch.no_grad():
            ours = self.replacement(x)
        if not (error := self._distance(x.nan_to_num(), ours.nan_to_num(), y.nan_to_num())) <= self.bound:
            raise self.differs(what, error)
        if not torch.equal(ours.isnan(), y.isnan()):
            raise CannotFuseError(f"it does something about NaN, which {self.replacement_name} passes on")

    def compare_steps(self, x: Tensor) -> None:
        """Raises CannotFuseError unless output, all gradients, for a random one of the output, and buffers agree."""
        mode = self.mode
        with errors_as_reasons(f"{mode}it does not run on an input {list(x.shape)}"):
            torch.manual_seed(_SEED)
            states = _random_states()
            with self.watch.running():
                theirs, expected = self._step(x, self.theirs, self.theirs)
            if not self.draws and _random_states() != states:
                raise CannotFuseError(f"{mode}it draws random numbers")
            torch.manual_seed(_SEED)
            ours, got = self._step(x, self.owner, self.replacement)
        if not (error := self._distance(x, ours, theirs)) <= self.bound:
            raise self.differs(f"{mode}its output", error)
        noise = self.noise / self.bound * max(g.norm().item() for g in expected.values() if g is not None)
        for name, gradient in expected.items():
            if (gradient is None) != (got[name] is None):
                raise CannotFuseError(f"{mode}no gradient reaches {name}")
            if gradient is not None and not (error := _relative(got[name], gradient, noise)) <= self.bound:
                raise self.differs(f"{mode}the gradient of {name}", error)
        buffers = dict(self.owner.named_buffers())
        for name, buffer in self.theirs.named_buffers():
            if buffer.shape != buffers[name].shape or buffer.dtype != buffers[name].dtype:
                raise CannotFuseError(f"{mode}its {name} is {list(buffer.shape)} {buffer.dtype}, not as known")
            if not (error := _relative(buffers[name], buffer)) <= self.bound:
                raise self.differs(f"{mode}its {name}", error)

    def _step(
        self, x: Tensor, module: nn.Module, call: Callable[[Tensor], Tensor]
    ) -> tuple[Tensor, dict[str, Tensor | None]]:
        """The output, and the gradients of the input and of all the module's parameters."""
        x = x.clone().requires_grad_()
        y = call(x)
        if not isinstance(y, Tensor) or not y.requires_grad:
            what = "has no gradient" if isinstance(y, Tensor) else f"is a {type(y).__name__}"
            raise CannotFuseError(f"{self.mode}its output {what}")
        inputs = {"its input": x, **{f"its {name}": parameter for name, parameter in module.named_parameters()}}
        dy = torch.randn(y.shape, generator=torch.Generator("cpu").manual_seed(1), dtype=y.dtype)
        gradients = torch.autograd.grad(y, tuple(inputs.values()), dy, allow_unused=True)
        return y, dict(zip(inputs, gradients, strict=True))


_SEED = 2
_TINY = 1e-300


def distance(a: Tensor, b: Tensor, scale: Tensor) -> float:
    """The largest difference in units of the sample's largest scale, infinite if there is a NaN."""
    scales = scale.abs().flatten(1).amax(1).clamp_min(_TINY)
    worst = ((a - b).abs().flatten(1).amax(1) / scales).max().item()
    return worst if worst == worst else math.inf


def _relative(a: Tensor, b: Tensor, noise: float = 0.0) -> float:
    """The norm of the difference in units of b's."""
    a, b = a.double(), b.double()
    return (a - b).norm().item() / max(b.norm().item() + noise, _TINY)


def _random_states() -> tuple[Any, ...]:
    """Of PyTorch's and Python's generators and, where somebody has imported it, of NumPy's; to be compared."""
    numpy = sys.modules.get("numpy")
    states = () if numpy is None else numpy.random.get_state()
    numpys = tuple(part.tobytes() if isinstance(part, numpy.ndarray) else part for part in states)
    return torch.get_rng_state().tolist(), random.getstate(), numpys
