"""The CUDA C++ backend: NVIDIA GPUs of compute capability 8.0 and later.

The plan comes from the compiled planner (``csrc/plan/cuda_plan.h``); what a call with these sizes takes is kept, so
that a further one only allocates its workspace and calls into the library. Nothing waits for the device, and all
memory is PyTorch's. The same kernels built for a host (:func:`load_host`) serve CPU tensors, which is how they are
tested where there is no GPU.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..call import Call, GradientCall, Gradients, Outputs
from ..reference import SQUEEZES
from ..torch_private import constant_under_compile
from .codes import codes_of
from .synchronised import merge_statistics, share_sums, values_per_channel
from .tickets import tickets_for

try:
    from .. import _plan
except ImportError:
    _plan = None

__all__ = [
    "DTYPES", "VECTOR_DTYPES", "Problem", "architectures", "backward", "device_facts", "facts_of_h200", "forward",
    "load_host", "plan_of", "problem", "using",
]  # fmt: skip

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# Those of biases and other vectors, which are read, and whose gradients are written, in their own.
VECTOR_DTYPES = DTYPES
LIBRARY = Path(__file__).resolve().parent.parent / "_cuda.so"

_REINSTALL = "reinstall where there is nvcc, with SENET_FUSED_CUDA=1"
# By device type: an SE layer's forward and backward, a block tail's.
_operators: dict[str, tuple[Callable[..., None], ...]] = {}


def _load() -> str | None:
    if _plan is None:
        return "the compiled planner is not installed (reinstall with a C++ compiler and without SENET_FUSED_NO_EXT)"
    if not LIBRARY.exists():
        return f"the package was built without CUDA: {_plan.build_info()['cuda'].removeprefix('none: ')} ({_REINSTALL})"
    try:
        torch.ops.load_library(str(LIBRARY))
    except OSError as error:
        return f"the CUDA library does not load: {error}"
    try:
        _operators["cuda"] = _operators_of("_cuda")
    except AttributeError as error:
        return f"the CUDA library is from an earlier build of this package: {error} (build it again)"
    return None


def _operators_of(prefix: str) -> tuple[Callable[..., None], ...]:
    names = ("forward", "backward", "tail_forward", "tail_backward")
    return tuple(getattr(torch.ops.senet_fused, f"{prefix}_{name}").default for name in names)


# At import: it takes under a millisecond, and torch.compile must not meet it in a traced call.
_problem = _load()


def load_host(library: Path) -> None:
    """Serves CPU tensors with the kernels that ``tests/cuda_host`` has built for the host, in this process."""
    if _plan is None:
        raise RuntimeError(_problem)
    torch.ops.load_library(str(library))
    _operators["cpu"] = _operators_of("_cuda_host")


def architectures() -> tuple[str, ...]:
    """What the library has machine code ("sm_90") and PTX ("compute_100") for; raises RuntimeError without it."""
    if _problem is not None:
        raise RuntimeError(_problem)
    return tuple(torch.ops.senet_fused._cuda_architectures().split())


def covers(architecture: str, capability: tuple[int, int]) -> bool:
    """Whether code for "sm_90", "sm_90a" or "compute_90" runs on a GPU of this compute capability.

    Machine code runs on its own generation from its own number on, PTX on everything later, and code for an "a"
    architecture on that one alone.
    """
    kind, _, number = architecture.partition("_")
    major, minor = int(number.rstrip("af")[:-1]), int(number.rstrip("af")[-1])
    if number[-1] == "a":
        return capability == (major, minor)
    if kind == "sm" or number[-1] == "f":
        return capability[0] == major and capability[1] >= minor
    return capability >= (major, minor)


# Called while torch.compile traces; the answer does not change.
@constant_under_compile
def problem(device_type: str = "cuda") -> str | None:
    """Why the kernels cannot run on tensors of this device type here; None if they can."""
    if device_type == "cpu":
        return None if "cpu" in _operators else "it serves GPU tensors, got cpu tensors"
    if device_type != "cuda":
        return f"it serves CUDA tensors, got {device_type} tensors"
    return _gpu_problem()


@lru_cache(maxsize=1)
def _gpu_problem() -> str | None:
    if torch.version.hip is not None:
        return "it serves NVIDIA GPUs, this PyTorch is built for AMD's"
    if _problem is not None:
        return _problem
    if not torch.cuda.is_available():
        return "PyTorch finds no GPU"
    problems = [_device_problem(number) for number in range(torch.cuda.device_count())]
    if all(problems):  # one GPU that can be served is enough
        return problems[0]
    return torch.ops.senet_fused._cuda_driver_problem() or None


def _device_problem(number: int) -> str | None:
    """Why the library has no code for a GPU; None if it has."""
    compiled, capability = architectures(), torch.cuda.get_device_capability(number)
    if any(covers(architecture, capability) for architecture in compiled):
        return None
    name, text = torch.cuda.get_device_name(number), ".".join(map(str, capability))
    return (
        f"{name} has compute capability {text}, the library was built for {' '.join(compiled)} "
        f"(reinstall with TORCH_CUDA_ARCH_LIST={text})"
    )


# ---------------------------------------------------------------------------------------------------- plans


NORMS = ("", "batch", "given")


class Problem(NamedTuple):
    """One direction of one SE layer or block tail: the arguments of the planner's ``CudaProblem``, squeeze and norm by
    their names.

    n: samples; they decide only whether stores are marked as not needed soon. element_size, weight_size:
    bytes of an element of x and of a weight. residual: read forward, its gradient written backward. norm: "" for an SE
    layer, for a block tail "batch" or "given", by where its statistics are from. reduced: 0 for a tail without a gate.
    """

    n: int
    channels: int
    reduced: int
    positions: int
    element_size: int = 2
    weight_size: int = 2
    channels_last: bool = True
    squeeze: str = "avg"
    relu: bool = False
    residual: bool = False
    backward: bool = False
    norm: str = ""

    def native(self) -> Any:
        """As the compiled planner takes it."""
        codes = {"squeeze": SQUEEZES.index(self.squeeze), "norm": NORMS.index(self.norm)}
        return _plan.CudaProblem(*self._replace(**codes))


def facts_of_h200() -> Any:
    """An NVIDIA H200's facts, for plans where there is no GPU."""
    return _plan.CudaFacts(capability=90, sms=132, shared_bytes=228 * 1024, l2_bytes=50 * 2**20)


@lru_cache(maxsize=64)
def device_facts(device: torch.device) -> Any:
    """The planner's facts of a device; an H200's for the CPU.

    Raises:
        RuntimeError: a GPU for which the library has no code.
    """
    if device.type == "cpu":
        return facts_of_h200()
    refusal = _device_problem(device.index)
    if refusal is not None:
        raise RuntimeError(f"the cuda backend cannot serve this call: {refusal}")
    p = torch.cuda.get_device_properties(device)
    return _plan.CudaFacts(
        10 * p.major + p.minor, p.multi_processor_count, p.shared_memory_per_multiprocessor, p.L2_cache_size
    )


Planner = Callable[[Problem, Any], Any]
_planner: Planner | None = None


def plan_of(problem: Problem, facts: Any) -> Any:
    """The plan that a call takes."""
    return _plan.plan_cuda(problem.native(), facts) if _planner is None else _planner(problem, facts)


@contextlib.contextmanager
def using(planner: Planner) -> Iterator[None]:
    """Within the block calls take the plans that this function gives for (problem, facts)."""
    global _planner
    before, _planner = _planner, planner
    _forget_recipes()
    try:
        yield
    finally:
        _planner = before
        _forget_recipes()


def _forget_recipes() -> None:
    _recipe.cache_clear()
    _tail_recipe.cache_clear()


class Recipe(NamedTuple):
    """What a call of these sizes takes: floats of workspace, counters, and the plan as the library reads it."""

    workspace: int
    counters: int
    numbers: tuple[int, ...]


@lru_cache(maxsize=4096)
def _recipe(
    device: torch.device,
    n: int,
    channels: int,
    reduced: int,
    positions: int,
    element_size: int,
    weight_size: int,
    channels_last: bool,
    squeeze: str,
    relu: bool,
    residual: bool,
    backward: bool,
    kept: bool,
    gate: bool,
) -> Recipe:
    """The recipe of a call; the arguments are flat because hashing them is most of the cost of a cached call."""
    problem = Problem(
        n, channels, reduced, positions, element_size, weight_size, channels_last, squeeze, relu, residual, backward
    )
    plan, native = plan_of(problem, device_facts(device)), problem.native()
    workspace = _plan.cuda_workspace(native, plan, kept, gate)
    return Recipe(workspace, _plan.cuda_counters(native, plan), plan.numbers())


@lru_cache(maxsize=4096)
def _tail_recipe(
    device: torch.device,
    n: int,
    channels: int,
    reduced: int,
    positions: int,
    element_size: int,
    weight_size: int,
    channels_last: bool,
    relu: bool,
    residual: bool,
    backward: bool,
    norm: str,
) -> Recipe:
    """As :func:`_recipe`, of a block tail."""
    problem = Problem(
        n, channels, reduced, positions, element_size, weight_size, channels_last, "avg", relu, residual, backward, norm
    )
    plan, native = plan_of(problem, device_facts(device)), problem.native()
    return Recipe(_plan.cuda_tail_workspace(native, plan), _plan.cuda_counters(native, plan), plan.numbers())


def _memory_of(x: Tensor, recipe: Recipe) -> tuple[Any, ...]:
    """Workspace, counters and plan, the last arguments of every operator."""
    workspace = x.new_empty((recipe.workspace,), dtype=torch.float32)
    return workspace, tickets_for(x, recipe.counters) if recipe.counters else None, *recipe.numbers


def _operator(x: Tensor, direction: int) -> Callable[..., None]:
    found = _operators.get(x.device.type)
    if found is None:
        raise RuntimeError(f"the cuda backend cannot serve this call: {problem(x.device.type)}")
    return found[direction]


# ---------------------------------------------------------------------------------------------------- calls


def forward(call: Call, outputs: Outputs, channels_last: bool) -> None:
    """Fills the outputs by the CUDA kernels; None is not kept, y must be there."""
    if call.norm:
        _tail_forward(call, outputs, channels_last)
        return
    x = call.x
    operator = _operator(x, 0)
    if x.shape[0] == 0:
        return
    codes = codes_of(call.act, call.gate_fn, call.squeeze, call.post_act)
    y, _, gate, saved, mask = outputs
    sizes, kept = _sizes(call, channels_last), (saved is not None, gate is not None)
    recipe = _recipe(*sizes, call.squeeze, call.post_act == "relu", call.residual is not None, False, *kept)
    operator(
        x, call.w1, call.b1, call.w2, call.b2, call.residual, *codes, channels_last,
        y, gate, saved, mask, *_memory_of(x, recipe),
    )  # fmt: skip


def backward(call: GradientCall, gradients: Gradients, channels_last: bool) -> None:
    """Fills the gradients by the CUDA kernels; None where one is not wanted."""
    if call.norm:
        _tail_backward(call, gradients, channels_last)
        return
    x = call.x
    operator = _operator(x, 1)
    if x.shape[0] == 0:
        _clear(gradients)
        return
    codes = codes_of(call.act, call.gate_fn, call.squeeze, call.post_act)
    dx, _, _, dw1, db1, dw2, db2, dresidual = gradients
    sizes, kept = _sizes(call, channels_last), (True, dx is not None)
    recipe = _recipe(*sizes, call.squeeze, call.post_act == "relu", dresidual is not None, True, *kept)
    operator(
        call.dy, call.dgate, x, call.w1, call.w2, call.gate, call.saved, call.mask, *codes,
        channels_last, dx, dw1, db1, dw2, db2, dresidual, *_memory_of(x, recipe),
    )  # fmt: skip


# Which launches a call of a tail's operator makes (csrc/cuda/tail.h).
_ALL, _FIRST, _REST = range(3)


def _tail_forward(call: Call, outputs: Outputs, channels_last: bool) -> None:
    """(T1) to (T3)."""
    x, (y, statistics, gate, saved, mask) = call.x, outputs
    operator = _operator(x, 2)
    shared = call.norm == "batch" and call.group
    if x.shape[0] == 0:
        statistics.zero_()
        if shared:  # the other processes have samples, and wait for this one
            merge_statistics(statistics, call)
        return
    sizes = _sizes(call, channels_last)
    recipe = _tail_recipe(*sizes, call.post_act == "relu", call.residual is not None, False, call.norm)
    codes = codes_of(call.act, call.gate_fn, call.squeeze, call.post_act)
    arguments = (
        x, call.weight, call.bias, statistics, call.mean, call.var, call.w1, call.b1, call.w2, call.b2, call.residual,
        call.factor, call.eps, *codes, channels_last, y, gate, saved, mask,
    )  # fmt: skip
    memory = _memory_of(x, recipe)
    if not shared:
        operator(*arguments, _ALL, *memory)
        return
    operator(*arguments, _FIRST, *memory)
    merge_statistics(statistics, call)
    operator(*arguments, _REST, *memory)


def _tail_backward(call: GradientCall, gradients: Gradients, channels_last: bool) -> None:
    """(T4) to (T7)."""
    x = call.x
    operator = _operator(x, 3)
    dx, dweight, dbias, *dweights, dresidual = gradients
    # Without a second sweep the parameters' gradients do not depend on the other processes.
    shared = call.norm == "batch" and call.group and not (dx is None and dresidual is None)
    if shared:
        dweight, dbias = (torch.empty_like(call.statistics[0]) if t is None else t for t in (dweight, dbias))
    gradients = Gradients(dx, dweight, dbias, *dweights, dresidual)
    if x.shape[0] == 0:
        _clear(gradients)
        if shared:
            share_sums(dweight, dbias, call)
        return
    sizes = _sizes(call, channels_last)
    recipe = _tail_recipe(*sizes, call.post_act == "relu", dresidual is not None, True, call.norm)
    codes = codes_of(call.act, call.gate_fn, call.squeeze, call.post_act)
    arguments = (
        call.dy, x, call.mask, call.weight, call.bias, call.statistics, call.w1, call.w2, call.factor, call.gate,
        call.saved, *codes, channels_last,
        float(values_per_channel(x)) if call.norm == "batch" else 0.0,
    )  # fmt: skip
    memory = _memory_of(x, recipe)
    if not shared:
        operator(*arguments, None, None, *gradients, _ALL, *memory)
        return
    operator(*arguments, None, None, *gradients, _FIRST, *memory)
    operator(*arguments, *share_sums(dweight, dbias, call), *gradients, _REST, *memory)


def _sizes(call: Call | GradientCall, channels_last: bool) -> tuple[Any, ...]:
    """The first arguments of a recipe."""
    x, w1 = call.x, call.w1
    shape, size = x.shape, x.element_size()
    reduced, weight_size = (0, size) if w1 is None else (w1.shape[0], w1.element_size())
    return x.device, shape[0], shape[1], reduced, math.prod(shape[2:]), size, weight_size, channels_last


def _clear(gradients: Gradients) -> None:
    for t in gradients:
        if t is not None:
            t.zero_()
