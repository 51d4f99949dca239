"""What a saved run is stamped with: when, where and with what it was measured."""

from __future__ import annotations

import dataclasses
import datetime
import os
import platform
import shlex
from collections.abc import Sequence
from typing import Any

import torch

from .. import __version__, machine
from .timing import Settings

__all__ = ["stamp"]


def stamp(tool: str, command: Sequence[str], device_type: str, settings: Settings) -> dict[str, Any]:
    """The part of the header that every kind of run has.

    Args:
        tool: as typed, ``senet-fused bench``. command: the arguments behind it.
        device_type: "cpu" or "cuda".
        settings: how long one case is measured.
    """
    cpus, cpu = machine.cpus(), machine.cpu_name()
    device = {"type": "cpu", "name": cpu, "cpus": cpus, "features": " ".join(machine.cpu_features())}
    if device_type == "cuda":
        gpu = torch.cuda.get_device_properties(0)
        compute = f"{gpu.major}.{gpu.minor}"
        device = {"type": "cuda", "name": gpu.name, "sms": gpu.multi_processor_count, "compute": compute, "host": cpu}
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0
    busy = f"the load average is {load:.1f} on {cpus} processors: other work disturbs the timing"
    return {
        "tool": tool,
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "command": shlex.join([*tool.split(), *command]),
        "device": device,
        "versions": {
            "senet_fused": __version__,
            "torch": torch.__version__,
            "python": platform.python_version(),
            "triton": machine.package_version("triton"),
            "cuda": torch.version.cuda,
        },
        "threads": torch.get_num_threads(),
        "revision": machine.revision(),
        "load": load,
        "samples": dataclasses.asdict(settings),
        "warning": busy if load > 0.5 * cpus else None,
    }
