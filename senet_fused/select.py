"""Which backend serves a call, and why: a pure function of static facts.

It looks at device, dtype and what is installed, never at sizes, so torch.compile does not specialise on a shape
because of it. The chosen backend is fixed in the forward; the backward uses the same.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from typing import NamedTuple

import torch

from . import backends

__all__ = ["BACKEND_CHOICES", "BackendUnavailableError", "Choice", "choose", "requested", "use_backend"]

BACKEND_CHOICES = ("auto", *backends.NAMES)
ENVIRONMENT_VARIABLE = "SENET_FUSED_BACKEND"

_override: str | None = None


class BackendUnavailableError(RuntimeError):
    """A backend was asked for by name and cannot serve the call; the message says why."""


class Choice(NamedTuple):
    """The backend that serves a call, and the reason in words."""

    backend: str
    reason: str


_ON_A_CPU = Choice("cpu", "cpu: serves cpu tensors")


def check_name(name: str | None, where: str) -> None:
    """Raises ValueError unless name is None or one of :data:`BACKEND_CHOICES`."""
    if name is not None and name not in BACKEND_CHOICES:
        raise ValueError(f"{where}: unknown backend {name!r}; choose one of {', '.join(BACKEND_CHOICES)}")


@contextlib.contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Within the block, calls and modules that name no backend themselves use this one.

    The choice is a plain global of the process, read when a call is traced: it holds for all threads, a function
    under torch.compile is compiled once for each choice it meets, and an exported program keeps the choice made then.

    Raises:
        ValueError: an unknown name.

    >>> with senet_fused.use_backend("reference"):
    ...     y = model(x)
    """
    global _override
    check_name(name, "use_backend")
    before, _override = _override, name
    try:
        yield
    finally:
        _override = before


# Read once: os.environ is slow beside a small layer and opaque to torch.compile.
_environment = os.environ.get(ENVIRONMENT_VARIABLE) or None


def requested(backend: str | None) -> tuple[str, str]:
    """The requested backend and by what: call or module, then use_backend, then the environment, then "auto"."""
    if backend is not None:
        return backend, "the call or the module"
    if _override is not None:
        return _override, "use_backend"
    if _environment is not None:
        return _environment, f"the environment variable {ENVIRONMENT_VARIABLE}"
    return "auto", "the default"


def choose(
    backend: str | None, device_type: str, dtype: torch.dtype, compiling: bool = False, pre_act: bool = False
) -> Choice:
    """The backend for tensors of this device type ("cpu", "cuda", ...) and dtype.

    "auto" never runs GPU kernels on CPU tensors, as Triton's interpreter does. Under torch.compile and torch.export
    (``compiling``) it takes the reference, whose operators the compiler fuses with their neighbours, which an opaque
    operator would prevent: a compiled BatchNorm, activation and SE layer took up to 1.9 times as long with the operator
    in the middle (inference, 2 cores of a Zen 4).

    pre_act: there is an activation behind the norm.

    Raises:
        ValueError: an unknown backend name.
        BackendUnavailableError: a backend asked for by name cannot serve the call.
    """
    name, who = requested(backend)
    if name == "auto":
        if device_type == "cpu" and not compiling and backends.refusal("cpu", device_type, dtype) is None:
            return _ON_A_CPU  # the usual case: no time for building the reason
        reasons: list[str] = []
        for candidate in backends.NAMES:
            refusal = backends.refusal(candidate, device_type, dtype, pre_act)
            if candidate != "reference" and refusal is None:
                refusal = _why_not(candidate, device_type, compiling)
            if refusal is None:
                return Choice(candidate, "; ".join([*reasons, f"{candidate}: serves {device_type} tensors"]))
            reasons.append(f"not {candidate}: {refusal}")
        raise AssertionError("the reference backend serves every call")
    check_name(name, who)
    refusal = backends.refusal(name, device_type, dtype, pre_act)
    if refusal is not None:
        raise BackendUnavailableError(f"backend {name!r}, asked for by {who}, cannot serve this call: {refusal}")
    return Choice(name, f"asked for by {who}")


def _why_not(candidate: str, device_type: str, compiling: bool) -> str | None:
    """Why "auto" skips kernels that could run."""
    if candidate != "cpu" and device_type == "cpu":
        return "its kernels run on CPU tensors only if it is named"
    if compiling:
        return "torch.compile fuses the plain operators with their neighbours"
    return None
