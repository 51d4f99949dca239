"""What is handed to the driver: the first call of a layer goes through triton.jit, which compiles; the second finds its
compiled kernels by itself. Both have to launch the same, with the same arguments, on a machine without a GPU.

    python tests/triton_aot/launch_twice.py [--time]

Stand-ins for Triton's driver and launcher record instead of launching. Prints one JSON line: per layer what was
launched, and which kernels may begin early and load before they wait (none may). --time adds as "host_us" the host's
time for a small layer, forward and forward + backward, and for a small tail, in microseconds (no kernel runs, and the
driver's own time for a launch is not in it).
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import sys
import tempfile
import timeit
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

os.environ.setdefault("TRITON_CACHE_DIR", tempfile.mkdtemp())
sys.path.insert(0, str(Path(__file__).resolve().parent))

import compile as aot  # noqa: E402
import torch  # noqa: E402
import triton  # noqa: E402

from senet_fused.backends.triton import launch  # noqa: E402

LAYERS = {
    "partials": aot.Layer(512, 32, 28),
    "last_block": aot.Layer(2048, 128, 7, tail=True),
    "launches": aot.Layer(960, 240, 7, variant="no biases"),
    "rows": aot.Layer(2048, 128, 7, layout="contiguous"),
    "tail, partials": aot.Layer(512, 32, 28, tail=True, norm="batch"),
    "tail, last_block": aot.Layer(2048, 128, 7, tail=True, norm="batch"),
    "tail, given": aot.Layer(512, 32, 28, norm="given", variant="no biases"),
}
recorded: list[tuple[Any, ...]] = []
made: list[launch.Kernel] = []


class Launcher:
    """In place of the compiled one that calls the driver."""

    def __init__(self, source: Any, metadata: Any) -> None:
        self.name, self.metadata = metadata.name, metadata

    def __call__(self, x: int, y: int, z: int, stream: int, function: Any, packed: Any, metadata: Any,
                 enter: Any, leave: Any, *arguments: Any) -> None:  # fmt: skip
        values = tuple((str(a.dtype), tuple(a.shape)) if isinstance(a, torch.Tensor) else a for a in arguments)
        pdl = bool(getattr(self.metadata, "launch_pdl", False))
        recorded.append((self.name, (x, y, z), pdl, self.metadata.num_warps, values))


class RecordingDriver(aot.Driver):
    launcher_cls = Launcher
    utils = SimpleNamespace(
        load_binary=lambda name, kernel, shared, device: (1, 1, 32, 0, 1024),
        get_device_properties=lambda device: {"max_shared_mem": 2**20},
        unload_module=lambda module: None,
    )


def host_times(tail: bool) -> list[float]:
    """The thin path of a small float32 layer or tail in training: [forward without grad, forward + backward]."""
    x = torch.randn(8, 64, 4, 4).contiguous(memory_format=torch.channels_last).requires_grad_()
    weights = [torch.randn(size).requires_grad_() for size in ((4, 64), (4,), (64, 4), (64,))]
    dy = torch.randn_like(x)
    if tail:
        norm = [torch.randn(64).requires_grad_() for _ in range(2)]
        leaves = [x, *norm, *weights]
    else:
        leaves, norm = [x, *weights], (None, None)
    operator = aot.ops.OPERATORS["triton"]
    options = (1e-5, "batch" if tail else "", "relu", "sigmoid", "avg", "", "")
    call = aot.Call(x, *norm, None, None, *weights, None, None, *options)

    def forward() -> None:
        with torch.no_grad():
            operator.infer(call, False)
        recorded.clear()

    def step() -> None:
        torch.autograd.grad(operator.eager(call)[0], leaves, dy)
        recorded.clear()

    for call in (forward, step):
        call()
    with mock.patch.object(Launcher, "__call__", lambda *arguments: None):
        return [min(timeit.repeat(call, number=200, repeat=7)) / 200 * 1e6 for call in (forward, step)]


def loads_before_waiting() -> list[str]:
    """Kernels that may begin early and in whose code a load from global memory comes before the wait, if one does."""
    wrong = []
    for kernel in made:
        for compiled in kernel.compiled.values():
            ptx = compiled.asm["ptx"]
            wait, load = ptx.find("griddepcontrol.wait"), re.search(r"ld\.global|cp\.async\.c", ptx).start()
            early = ptx.find("griddepcontrol.launch_dependents")
            # A kernel with one before and one behind it lets the one behind begin only when the one before has ended:
            # so whoever waits for the launch in front of him has waited for all.
            in_order = early < 0 or wait < early
            if compiled.metadata.launch_pdl and not (0 <= wait < load and in_order):
                wrong.append(kernel.name)
    return wrong


def main() -> int:
    target, facts = aot.TARGETS["sm_90"]
    triton.runtime.driver.set_active(RecordingDriver(target))
    results: dict[str, Any] = {}
    original = launch.Kernel.__init__

    def noted(self: launch.Kernel, *arguments: Any, **constants: Any) -> None:
        original(self, *arguments, **constants)
        made.append(self)

    with (
        mock.patch.object(launch.Kernel, "__init__", noted),
        mock.patch.object(launch, "device_facts", lambda device: facts),
        mock.patch.object(launch, "on_device", lambda x: contextlib.nullcontext()),
    ):
        for name, layer in LAYERS.items():
            runs = []
            for _ in range(3):
                recorded.clear()
                aot.run(layer)
                runs.append(list(recorded))
            assert runs[0], name
            for again in runs[1:]:
                assert again == runs[0], f"{name}: {runs[0]}\n{again}"
            results[name] = [(kernel, grid[0], pdl) for kernel, grid, pdl, _, _ in runs[0]]
        assert made
        results["loads_before_waiting"] = loads_before_waiting()
        if "--time" in sys.argv[1:]:
            results["host_us"] = [*host_times(tail=False), *host_times(tail=True)]
    print(json.dumps(results))
    return 0


if __name__ == "__main__":
    sys.exit(main())
