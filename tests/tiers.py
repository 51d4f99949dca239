"""Which of the tests a run takes: `pytest --tier core`, `ci` or `all` (the default).

core: five minutes on two cores, and yet every backend, strategy and direction, every public function, and bad input.
    A test belongs to it unless a marker says that the test needs more than moments (:data:`EXPENSIVE`); of a test with
    many combinations of parameters, as few as meet each value of each parameter. The marker `core` overrules
    the others.
ci: core, and a quarter of the rest, which the commit's hash chooses: so every test runs on one commit in four. But for
    what reads nvcc's machine code: `.ci/run` compiles the CUDA library once, for the wheel, and looks at that.
all: everything.

`make test` is core, `make test-all` is all, `.ci/run` runs ci. With explicit node ids or `-k`, the tier still applies:
leave the option out to run just what is named.
"""

from __future__ import annotations

import subprocess
import zlib
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path

import pytest

TIERS = ("core", "ci", "all")
SHARES = 4  # of which --tier ci takes one

# Markers that keep a test out of core, and what the test needs.
EXPENSIVE = {
    "processes": "starts other Python processes: torchrun, the command line, a killed run",
    "compiler": "compiles: torch.compile's C++, g++, or Triton and nvcc ahead of time",
    "nvcc": "reads machine code compiled by nvcc",
    "networks": "trains, measures or compares whole networks or many layers, for seconds",
    "interpreter": "runs kernels in Triton's interpreter, which takes a second or more for a launch",
    "sizes": "has tensors of real size: SENet-154's layers in an interpreter, planes of 2^15 pixels, gigabytes",
}
MARKERS = {
    **EXPENSIVE,
    "core": "the one of its kind that core takes all the same",
}


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("senet_fused")
    group.addoption("--tier", choices=TIERS, default="all", help="core (5 minutes), ci (core, a quarter of the rest)")
    group.addoption("--share", type=int, choices=range(SHARES), help="the quarter for --tier ci (default: by commit)")


def pytest_configure(config: pytest.Config) -> None:
    for name, meaning in MARKERS.items():
        config.addinivalue_line("markers", f"{name}: {meaning}")
    if config.getoption("--tier") == "ci" and config.getoption("--share") is None:
        config.option.share = share_of(_commit(config.rootpath))


def pytest_report_header(config: pytest.Config) -> str:
    tier, share = config.getoption("--tier"), config.getoption("--share")
    return f"tier: {tier}" + (f", with share {share} of {SHARES} of what is not core" if tier == "ci" else "")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    kept = chosen(items, config.getoption("--tier"), config.getoption("--share"))
    if len(kept) < len(items):
        config.hook.pytest_deselected(items=list(set(items).difference(kept)))
        items[:] = kept


def chosen(items: list[pytest.Item], tier: str, share: int | None = None) -> list[pytest.Item]:
    """The tests of a tier, in their order."""
    if tier == "all":
        return items
    core = core_of(items)
    if tier == "core":
        return [item for item in items if item in core]
    return [
        item for item in items
        if item in core or (share_of(item.nodeid) == share and not item.get_closest_marker("nvcc"))
    ]  # fmt: skip


def share_of(text: str) -> int:
    """Which of the shares a test's id, or a commit's hash, falls into."""
    return zlib.crc32(text.encode()) % SHARES


def core_of(items: Iterable[pytest.Item]) -> set[pytest.Item]:
    """The tests that core takes."""
    core, families = set(), defaultdict(list)
    for item in items:
        cheap = not any(item.get_closest_marker(name) for name in EXPENSIVE)
        if cheap or item.get_closest_marker("core"):
            families[item.parent, getattr(item, "originalname", item.name)].append(item)
    for family in families.values():
        core.update(_covering(family) if hasattr(family[0], "callspec") else family)
    return core


def _covering(family: list[pytest.Item]) -> list[pytest.Item]:
    """A few tests of one function that meet each value of each of its parameters; of equals, one by its id's hash, so
    that no other parameter stays at its first value."""
    values = {item: {(name, id(value)) for name, value in item.callspec.params.items()} for item in family}
    missing, taken = set().union(*values.values()), []
    while missing:
        best = max(family, key=lambda item: (len(values[item] & missing), zlib.crc32(item.nodeid.encode())))
        taken.append(best)
        missing -= values[best]
    return taken


def _commit(root: Path) -> str:
    try:
        found = subprocess.run(["git", "rev-parse", "HEAD"], cwd=root, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError) as error:
        raise pytest.UsageError(f"--tier ci asks git for the commit, which failed: {error}; give --share") from error
    return found.stdout.strip()
