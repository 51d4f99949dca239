"""PyTorch's private interfaces: every one that this package uses, in one place.

They may change in any release. Each is looked up here by its name, with its purpose, the first release that has it,
and what happens without it: the package imports, and all else works. :func:`missing` lists those that a PyTorch does
not have; ``senet-fused doctor`` prints them.
"""

from __future__ import annotations

import contextlib
import importlib
import sys
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

__all__ = [
    "INTERFACES", "MODULE_INTERNALS", "DispatchMode", "Interface", "compiled_graphs", "constant_under_compile",
    "dispatch_mode_stack", "dispatch_modes", "forget_compiled", "func_transform", "has_global_hooks", "in_dual_level",
    "is_compiled", "is_exporting", "is_legacy_batchedtensor", "is_tracing", "keeping_saved_tensors", "lerp_all",
    "missing", "process_group", "stand_ins", "version_of", "without_modes",
]  # fmt: skip


class Interface(NamedTuple):
    """name: "torch.a.b" or "torch.nn.Module.c". since: of the releases from 2.0 on. is_there: looks for it now."""

    name: str
    since: str
    purpose: str
    without: str
    is_there: Callable[[], bool]


INTERFACES: list[Interface] = []


def missing() -> list[Interface]:
    """Those that this PyTorch does not have. Imports torch._dynamo, which takes a second or two."""
    return [interface for interface in INTERFACES if not interface.is_there()]


def _found(module: str, path: str) -> Any:
    """What is at this path in a module, which is imported; None if it is not there."""
    try:
        found = importlib.import_module(module)
        for name in path.split("."):
            found = getattr(found, name)
    except (ImportError, AttributeError):
        return None
    return found


def _add(
    where: str, *, since: str, purpose: str, without: str, is_there: Callable[[], bool] | None = None
) -> tuple[str, str]:
    """where: "module:path". Returns the two."""
    module, _, path = where.partition(":")
    check = is_there or (lambda: _found(module, path) is not None)
    INTERFACES.append(Interface(where.replace(":", "."), since, purpose, without, check))
    return module, path


def _get(where: str, instead: Any, **description: str) -> Any:
    """The interface, or its replacement if it is missing."""
    found = _found(*_add(where, **description))
    return instead if found is None else found


# ---------------------------------------------------------------------------------------------------- modes and traces

# Called in every call of a layer, and so bound to a name once: an attribute costs as much as the answer.

is_tracing: Callable[[], bool] = _get(
    "torch._C:_is_tracing",
    torch.jit.is_tracing,
    since="2.0",
    purpose="whether TorchScript's tracer runs, at a third of torch.jit.is_tracing's host time",
    without="torch.jit.is_tracing is called",
)

dispatch_modes: Callable[[], int] = _get(
    "torch._C:_len_torch_dispatch_stack",
    lambda: 1,
    since="2.0",
    purpose="how many dispatch modes (FakeTensorMode, FlopCounterMode, a profiler) see the operators that run",
    without="every call goes through the dispatcher, as if there were one: the same numbers, more host time",
)

dispatch_mode_stack: Callable[[], list[Any]] = _get(
    "torch.utils._python_dispatch:_get_current_dispatch_mode_stack",
    list,
    since="2.0",
    purpose="a FLOP counter that was made before the first call of an operator gets its formula",
    without="such a counter counts nothing for the operators; the next one counts them",
)

func_transform: Callable[[], object | None] = _get(
    "torch._C:_functorch.peek_interpreter_stack",
    lambda: None,
    since="2.0",
    purpose="whether a transform of torch.func is running (None: no), for which the reference runs",
    without="torch.func.grad, vjp, jvp and vmap of a fused layer raise PyTorch's own errors; "
    'use_backend("reference") serves them',
)

is_legacy_batchedtensor: Callable[[Tensor], bool] = _get(
    "torch._C:_functorch.is_legacy_batchedtensor",
    lambda t: True,
    since="2.4",
    purpose="whether a gradient is of the vmap that is_grads_batched and jacobian(vectorize=True) use",
    without="every backward goes through the dispatcher: the same numbers, more host time",
)

has_global_hooks: Callable[[], object] = _get(
    "torch.nn.modules.module:_has_any_global_hook",
    lambda: False,
    since="2.8",
    purpose="whether hooks for all modules are registered, for which a fused layer's submodules have to be called",
    without="hooks for all modules run for a fused layer, and not for its submodules",
)


def _flag(where: str, instead: Callable[[], Any], **description: str) -> Callable[[], Any]:
    """A function that reads a global, which changes."""
    module, path = _add(where, **description)
    if _found(module, path) is None:
        return instead
    holder = importlib.import_module(module)
    return lambda: getattr(holder, path)


def _probe_dual_level() -> int:
    """0 within forward_ad.dual_level(), else -1: outside, make_dual raises."""
    try:
        forward_ad.make_dual(torch.zeros(1), torch.zeros(1))
    except RuntimeError:
        return -1
    return 0


_dual_level = _flag(
    "torch.autograd.forward_ad:_current_level",
    _probe_dual_level,
    since="2.0",
    purpose="whether forward-mode differentiation is on (-1: no), whose tangents a kernel would lose",
    without="each call tries to make a dual tensor to find out: the same numbers, more host time",
)


def in_dual_level() -> bool:
    """Whether the call is within forward_ad.dual_level()."""
    return _dual_level() >= 0


# Not torch.compiler.is_exporting(), which torch 2.11 takes for true under torch.compile as well.
is_exporting: Callable[[], bool] = _flag(
    "torch.compiler:_is_exporting_flag",
    torch.compiler.is_exporting,
    since="2.7",
    purpose="whether torch.export traces, where block tails leave PyTorch's own operators in the program",
    without="torch.compiler.is_exporting is called",
)

stand_ins: tuple[type, ...] = tuple(
    kind
    for kind in (
        _get(
            f"torch._subclasses.{module}:{name}",
            None,
            since=since,
            purpose="the class of tensors that represent plain ones while torch.compile or torch.export traces",
            without="a fused layer's original forward is traced in its place",
        )
        for module, name, since in (
            ("fake_tensor", "FakeTensor", "2.0"), ("functional_tensor", "FunctionalTensor", "2.2"),
        )
    )
    if kind is not None
)  # fmt: skip

without_modes: Callable[[], contextlib.AbstractContextManager[object]] = _get(
    "torch.utils._python_dispatch:_disable_current_modes",
    contextlib.nullcontext,
    since="2.0",
    purpose="trials of a layer run outside the dispatch modes of the caller",
    without="fuse within a dispatch mode (FakeTensorMode, say) runs trials in it, and leaves layers whose trial fails",
)

DispatchMode: type = _get(
    "torch.utils._python_dispatch:TorchDispatchMode",
    contextlib.nullcontext,
    since="2.0",
    purpose="the error rule rounds every operation of plain PyTorch at random",
    without="the error rule has stock PyTorch's error alone, and may refuse results where that is nearly zero",
)


def constant_under_compile(function: Callable[..., Any]) -> Callable[..., Any]:
    """torch.compiler.assume_constant_result, which imports torch._dynamo: torch.compile takes what the function
    returns while it traces, and does not look into it."""
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


_add(
    "torch._dynamo.decorators:_dynamo_marked_constant",
    since="2.0",
    purpose="the mark of torch.compiler.assume_constant_result, without importing torch._dynamo with the package",
    without="torch.compile traces functions that it cannot, which breaks the graph: fullgraph=True raises",
    is_there=lambda: hasattr(torch.compiler.assume_constant_result(lambda: None), "_dynamo_marked_constant"),
)


# ---------------------------------------------------------------------------------------------------- functions


def _lerp_each(tensors: Iterable[Tensor], ends: Iterable[Tensor], weight: float) -> None:
    for tensor, end in zip(tensors, ends, strict=True):
        tensor.lerp_(end, weight)


lerp_all: Callable[[list[Tensor], list[Tensor], float], None] = _get(
    "torch:_foreach_lerp_",
    _lerp_each,
    since="2.0",
    purpose="both running statistics of a block tail move in one launch",
    without="they take two",
)


def _no_process_group(name: str) -> Any:
    raise RuntimeError(
        f"torch {torch.__version__} cannot look up the process group {name!r} by its name, which a synchronised block "
        'tail needs; use backend="reference"'
    )


process_group: Callable[[str], Any] = _get(
    "torch.distributed.distributed_c10d:_resolve_process_group",
    _no_process_group,
    since="2.2",
    purpose="a process group by its name, which is what an operator can take",
    without='a block tail with group raises, except with backend="reference"',
)


# ---------------------------------------------------------------------------------------------------- torch.compile


def is_compiled(module: nn.Module) -> bool:
    """Whether torch.compile has made the module."""
    return hasattr(module, "_orig_mod")


_add(
    "torch._dynamo:OptimizedModule._orig_mod",
    since="2.0",
    purpose="recognises a compiled model without importing torch._dynamo",
    without="fold_batchnorm of a compiled model raises PyTorch's error in place of its own",
    is_there=lambda: is_compiled(torch.compile(nn.Identity())),
)


def forget_compiled() -> None:
    """torch.compiler.reset(), where there is something to reset: it would import torch._dynamo."""
    if "torch._dynamo" in sys.modules:
        torch.compiler.reset()


_COUNTERS = _add(
    "torch._dynamo.utils:counters",
    since="2.0",
    purpose="the bench's proof that torch.compile has compiled something",
    without="senet-fused bench does not time torch.compile, and says so",
)


def compiled_graphs() -> int:
    """How many graphs torch.compile has made in this process. Raises RuntimeError if PyTorch does not count them."""
    counters = _found(*_COUNTERS)
    if counters is None:
        raise RuntimeError(
            f"torch {torch.__version__} does not count its graphs, so nothing shows that it has compiled"
        )
    return counters["stats"]["unique_graphs"]


_DONATED = _add(
    "torch._functorch.config:donated_buffer",
    since="2.5",
    purpose="the bench runs the backward of a compiled graph more than once",
    without="timing a compiled backward alone raises PyTorch's error, which names the setting",
)


def keeping_saved_tensors() -> contextlib.AbstractContextManager[object]:
    """Within the block torch.compile makes, and runs, graphs whose backward can run again: the memory of saved tensors
    is not taken for its results."""
    if _found(*_DONATED) is None:
        return contextlib.nullcontext()
    return importlib.import_module(_DONATED[0]).patch(**{_DONATED[1]: False})


_version = _get(
    "torch:Tensor._version",
    None,
    since="2.0",
    purpose="whether a layer's forward changes a tensor in place",
    without="fuse sees a change of the values alone",
)


def version_of(t: Tensor) -> int | None:
    """How often a tensor has been changed in place; None for an inference tensor, which does not count."""
    return None if _version is None or t.is_inference() else _version.__get__(t)


# ---------------------------------------------------------------------------------------------------- nn.Module

# Used where they are, under these names: they are older than PyTorch 2, and what FSDP, DeepSpeed, timm and PyTorch's
# own parametrisations are made of, so a PyTorch without one would be another nn.Module.
MODULE_INTERNALS = {
    "_modules": "children by name, without the look-up of __getattr__",
    "_parameters": "the module's own parameters, None too",
    "_buffers": "the module's own buffers, None too",
    "_forward_hooks": "whether a child's call would run more than its forward",
    "_forward_pre_hooks": "the same",
    "_backward_hooks": "the same",
    "_backward_pre_hooks": "the same",
    "_load_from_state_dict": "overridden, so that FusedSE loads the keys of other libraries",
    "_replicate_for_data_parallel": "overridden, so that nn.DataParallel raises where its replicas would be wrong",
}
for _name, _purpose in MODULE_INTERNALS.items():
    _add(
        f"torch.nn.Module:{_name}",
        since="2.0",
        purpose=_purpose,
        without="AttributeError where a layer is inspected; an overridden one is not called",
        is_there=lambda name=_name: hasattr(nn.Module(), name),
    )
