"""Plans that were timed on a device, kept in a file. See ``senet-fused tune``."""

from __future__ import annotations

from .plan import DeviceFacts, Plan, Problem

__all__ = ["lookup"]


def lookup(problem: Problem, facts: DeviceFacts) -> Plan | None:
    return None
