"""Plans that were timed on a device, kept in a JSON file that can be read, edited and shipped (``senet-fused tune``).

The file is ``$SENET_FUSED_PLANS`` if that is set (an empty value: none), else ``senet_fused/triton_plans.json`` in
``$XDG_CACHE_HOME`` or ``~/.cache``, if it exists. It is read once, when the first plan is looked up. An entry holds for
exactly its problem on exactly its device; where there is none, ``plan.py`` decides. A plan that would not compute the
whole layer is refused when the file is read.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
from collections.abc import Iterator, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

from .plan import DeviceFacts, Plan, Problem, Tile, allows, candidates

__all__ = [
    "VARIABLE", "default_path", "lookup", "merge", "misfit", "path_in_use", "plans_in_use", "read", "using", "write",
]  # fmt: skip

VARIABLE = "SENET_FUSED_PLANS"
_FORMAT = 1
_MAX_THREADS = 1024
# More elements of a tile to a thread than its registers hold several times over.
_MAX_ELEMENTS = 128

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


def misfit(p: Problem, plan: Plan, facts: DeviceFacts) -> str | None:
    """Why a plan cannot serve a problem on a device; None if it can."""
    tile = plan.tile
    counts = dataclasses.asdict(tile) | {"stages": plan.stages}
    del counts["form"], counts["row_channels"]
    for name, count in counts.items():
        if type(count) is not int or count < 1:
            return f"{name} must be a positive integer, got {count!r}"
        if name not in ("steps", "splits", "stages") and count & (count - 1):
            return f"{name} must be a power of two, got {count}"
    if type(plan.reversed) is not bool or type(plan.streaming) is not bool:
        return f"reversed and streaming must be true or false, got {plan.reversed!r} and {plan.streaming!r}"
    threads = tile.warps * facts.warp_size
    if threads > _MAX_THREADS:
        return f"{tile.warps} warps of {facts.warp_size} are more than {_MAX_THREADS} threads"
    if p.channels_last != (tile.form == "channels_last"):
        return f"tiles of {tile.form!r} do not fit {'channels_last' if p.channels_last else 'contiguous'} tensors"
    if p.norm and tile.form == "rows":
        return "block tails have no tiles of 'rows'"
    if not allows(p, tile, plan.strategy):
        what = f"{tile.form} and squeeze {p.squeeze!r}" if p.gated else "a block tail without a gate"
        return f"the strategy must be {'launches' if p.gated else 'partials'!r} for {what}, got {plan.strategy!r}"
    if plan.strategy == "last_block" and facts.vendor == "hip":
        return "there is no 'last_block' on AMD"
    if tile.form == "rows":
        fits = any(dataclasses.replace(other.tile, warps=tile.warps) == tile for other in candidates(p, facts))
        return None if fits else "the rows are not those of plan.py"
    chunks = -(-p.positions // tile.positions)
    if tile.splits != -(-chunks // tile.steps):
        tiles = f"{tile.splits} splits of {tile.steps} steps of {tile.positions} positions"
        return f"{tiles} are not {p.positions} positions"
    if p.relu and (tile.channels if p.channels_last else tile.positions) < 8:
        return "a tile must be 8 elements wide to pack the bits of the ReLU's mask"
    if tile.samples * tile.channels * tile.positions > _MAX_ELEMENTS * threads:
        return f"a step of more than {_MAX_ELEMENTS} elements to a thread"
    return None


def _entries(path: Path) -> Iterator[tuple[Key, Plan, dict[str, Any]]]:
    """What a file holds, with the fields that are there for the reader."""
    content = json.loads(path.read_text(encoding="utf-8"))
    if content["format"] != _FORMAT:
        raise ValueError(f"format {content['format']!r}, expected {_FORMAT}")
    for entry in content["plans"]:
        fields = dict(entry["plan"])
        fields["tile"] = Tile(**fields["tile"])
        facts, problem, plan = DeviceFacts(**entry["device"]), Problem(**entry["problem"]), Plan(**fields)
        why = misfit(problem, plan, facts)
        if why is not None:
            raise ValueError(f"the plan for {problem} does not fit: {why}")
        yield (facts, problem), plan, {name: entry[name] for name in entry if name not in ("device", "problem", "plan")}


def _read(path: Path) -> list[tuple[Key, Plan, dict[str, Any]]]:
    try:
        return list(_entries(path))
    except (OSError, ValueError, KeyError, TypeError) as error:
        what = f"{error} is missing" if isinstance(error, KeyError) else error
        raise ValueError(
            f"cannot read Triton plans from {path}: {what}; make the file anew with `senet-fused tune`, remove it, or "
            f"set {VARIABLE} to another one (to nothing for none)"
        ) from error


def read(path: Path) -> dict[Key, Plan]:
    """The plans in a file.

    Raises:
        ValueError: the file cannot be read, is no file of plans, or has one that does not fit; the message says what
            to do.
    """
    return {key: plan for key, plan, _ in _read(path)}


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
    temporary = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        with temporary.open("w", encoding="utf-8") as file:
            json.dump({"format": _FORMAT, "plans": entries}, file, indent=1)
            file.write("\n")
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    _from_file.cache_clear()


def merge(path: Path, plans: Mapping[Key, Plan], remarks: Mapping[Key, Mapping[str, Any]] | None = None) -> None:
    """Writes plans into a file, beside what it holds for other problems and devices.

    Raises:
        ValueError: as :func:`read`; the file is left as it is.
    """
    before = _read(path) if path.exists() else []
    notes = {key: fields for key, _, fields in before if key not in plans}
    write(path, {key: plan for key, plan, _ in before} | dict(plans), notes | dict(remarks or {}))


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
