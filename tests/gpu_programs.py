"""The programs of benchmarks/ as tests take them: imported, and their command lines read."""

from __future__ import annotations

import importlib
import shlex
import sys
from pathlib import Path

import pytest
import torch
from cuda_host import build

from senet_fused import backends, cli

ROOT = Path(__file__).resolve().parent.parent
BENCHMARKS = ROOT / "benchmarks"
NAMES = ("gpu_first", "gpu_kernels", "gpu_launches", "gpu_backends")
_no_interpreter = backends.refusal("triton", "cpu", torch.float32)
needs_interpreter = pytest.mark.skipif(_no_interpreter is not None, reason=str(_no_interpreter))
needs_cuda_host = pytest.mark.skipif(build.problem() is not None, reason=str(build.problem()))


@pytest.fixture(name="program")
def load_program(monkeypatch):
    """Imports a program of benchmarks/, until the test ends."""
    monkeypatch.syspath_prepend(BENCHMARKS)

    def load(name):
        for module in NAMES:
            monkeypatch.delitem(sys.modules, module, raising=False)
        return importlib.import_module(name)

    yield load
    for module in NAMES:
        sys.modules.pop(module, None)


def parsed(call, program):
    """The arguments of a call of Python as the program's own parser reads them; None for what is not ours."""
    words = shlex.split(call)
    if words[0].startswith("benchmarks/"):
        return program(Path(words[0]).stem).parse(words[1:])
    words = words[words.index("senet_fused") + 1 :] if "senet_fused" in words else []
    return cli.parse(words)[1] if words else None
