"""How often each backend has run: a proof of which path a call took."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Iterator

__all__ = ["call_counts", "count_call", "reset_call_counts", "uncounted"]

_counts: Counter[str] = Counter()


def call_counts() -> dict[str, int]:
    """How often each backend has run since the last reset: {"cpu.forward": 2, "cpu.backward": 1, ...}.

    A proof of which path ran: compiled backends are counted when their kernels have returned, in eager mode and in
    compiled graphs alike; "reference" is counted in eager mode only (inside a compiled graph it is plain PyTorch).
    """
    return dict(_counts)


def reset_call_counts() -> None:
    """Sets every count of :func:`call_counts` to zero."""
    _counts.clear()


@contextlib.contextmanager
def uncounted() -> Iterator[None]:
    """What runs within the block leaves :func:`call_counts` as it was."""
    before = _counts.copy()
    try:
        yield
    finally:
        _counts.clear()
        _counts.update(before)


def count_call(name: str) -> None:
    """Adds one to a count of :func:`call_counts`."""
    _counts[name] += 1
