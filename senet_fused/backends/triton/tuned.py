"""Plans that were timed on a device, kept in a JSON file that can be read, edited and shipped (``senet-fused tune``).

The file is ``$SENET_FUSED_PLANS`` if that is set (an empty value: none), else ``senet_fused/triton_plans.json`` in
``$XDG_CACHE_HOME`` or ``~/.cache``, if it exists. It is read once, when the first plan is looked up. An entry holds for
exactly its problem on exactly its device; where there is none, ``plan.py`` decides.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import tempfile
from collections.abc import Iterator, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

from .plan import DeviceFacts, Plan, Problem, Tile

__all__ = ["VARIABLE", "default_path", "lookup", "path_in_use", "plans_in_use", "read", "using", "write"]

VARIABLE = "SENET_FUSED_PLANS"
_FORMAT = 1

Key = tuple[DeviceFacts, Problem]


def default_path() -> Path:
    """Where plans are kept unless ``$SENET_FUSED_PLANS`` says otherwise."""
    cache = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(cache).expanduser() / "senet_fused" / "triton_plans.json"


def path_in_use() -> Path | None:
    """The file that plans are read from, or None."""
    named = os.environ.get(VARIABLE)
    if named is not None:
        return Path(named) if named else None
    path = default_path()
    return path if path.exists() else None


def read(path: Path) -> dict[Key, Plan]:
    """The plans in a file.

    Raises:
        ValueError: the file cannot be read or is no file of plans; the message says what to do.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if content["format"] != _FORMAT:
            raise ValueError(f"format {content['format']!r}, expected {_FORMAT}")
        found = {}
        for entry in content["plans"]:
            plan = dict(entry["plan"])
            plan["tile"] = Tile(**plan["tile"])
            key = DeviceFacts(**entry["device"]), Problem(**entry["problem"])
            found[key] = Plan(**plan)
        return found
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"cannot read Triton plans from {path}: {error}; make the file anew with `senet-fused tune`, remove it, or "
            f"set {VARIABLE} to another one (to nothing for none)"
        ) from error


def write(path: Path, plans: Mapping[Key, Plan], remarks: Mapping[Key, Mapping[str, Any]] | None = None) -> None:
    """Writes plans to a file, which appears whole or not at all. remarks: more fields for entries, for the reader."""
    entries = [
        {
            "device": dataclasses.asdict(facts),
            "problem": dataclasses.asdict(problem),
            "plan": dataclasses.asdict(plan),
            **(remarks or {}).get((facts, problem), {}),
        }
        for (facts, problem), plan in plans.items()
    ]
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=path.name, suffix=".part")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            json.dump({"format": _FORMAT, "plans": entries}, file, indent=1)
            file.write("\n")
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise


@lru_cache(maxsize=1)
def _from_file() -> dict[Key, Plan]:
    path = path_in_use()
    return {} if path is None else read(path)


_overridden: dict[Problem, Plan] | None = None


def plans_in_use() -> dict[Key, Plan]:
    """The plans of the file in use."""
    return _from_file()


def lookup(problem: Problem, facts: DeviceFacts) -> Plan | None:
    """The plan that is kept for a problem on a device, or None."""
    if _overridden is not None:
        return _overridden.get(problem)
    return _from_file().get((facts, problem))


@contextlib.contextmanager
def using(plans: Mapping[Problem, Plan]) -> Iterator[None]:
    """Within the block these plans are the ones that are kept, whatever the device. (launch.py keeps recipes: see
    ``launch.using``.)"""
    global _overridden
    before, _overridden = _overridden, dict(plans)
    try:
        yield
    finally:
        _overridden = before
