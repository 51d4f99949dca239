"""Compiles the Triton kernels for real GPUs on a machine without one, through the launch code that a GPU would take,
and prints what they use: registers, stack (spills), shared memory, and the widths of their global accesses.

    python tests/triton_aot/compile.py               as JSON on standard output
    python tests/triton_aot/compile.py --write       into resources.json, which tests/test_triton_aot.py checks

A stand-in for Triton's driver names the target; launch.py plans, allocates and passes its arguments as ever, on CPU
tensors, and a stand-in for the launch itself compiles the kernel and stops. TRITON_INTERPRET must not be set.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import os
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import triton
from triton.backends.compiler import GPUTarget

sys.path[:0] = [str(Path(__file__).resolve().parents[depth]) for depth in (2, 1)]

import aot_record  # noqa: E402

from senet_fused import ops  # noqa: E402
from senet_fused.backends.triton import launch, plan, tail_launch  # noqa: E402
from senet_fused.call import Call  # noqa: E402

HERE = Path(__file__).resolve().parent
TABLE = HERE / "resources.json"

TARGETS = {
    "sm_80": (GPUTarget("cuda", 80, 32), plan.DeviceFacts("cuda", 80, 108)),
    "sm_90": (GPUTarget("cuda", 90, 32), plan.DeviceFacts("cuda", 90, 132)),
    "sm_100": (GPUTarget("cuda", 100, 32), plan.DeviceFacts("cuda", 100, 148)),
    "gfx942": (GPUTarget("hip", "gfx942", 64), plan.DeviceFacts("hip", "gfx942", 304, 64)),
}


@dataclasses.dataclass(frozen=True)
class Layer:
    """One SE layer, or block tail, to compile forward and backward: sizes as in the problem table, options as in the
    operator."""

    channels: int
    reduced: int
    size: int
    dtype: str = "bfloat16"
    layout: str = "channels_last"
    squeeze: str = "avg"
    tail: bool = False  # + residual, ReLU
    act: str = "relu"
    gate: str = "sigmoid"
    weights: str | None = None
    variant: str = "all"  # "infer": forward alone; "no dx", "no dw": a gradient that is not wanted; "no biases"
    norm: str = ""  # "batch", "given": a block tail in training, in evaluation; reduced is 0 without a gate

    @property
    def name(self) -> str:
        options = [f"tail, {self.norm}"] if self.norm else []
        options += [self.dtype, self.layout]
        options += [self.squeeze] if self.squeeze != "avg" else []
        options += ["residual+relu"] if self.tail else []
        options += [self.act] if self.act != "relu" else []
        options += [self.gate] if self.gate != "sigmoid" else []
        options += [f"{self.weights} weights"] if self.weights else []
        options += [self.variant] if self.variant != "all" else []
        return f"{self.channels}/{self.reduced}@{self.size}x{self.size} {' '.join(options)}"


STAGES = ((256, 16, 56), (512, 32, 28), (1024, 64, 14), (2048, 128, 7))
LAYOUTS = ("channels_last", "contiguous")
LAYERS = [
    *(Layer(*stage, layout=layout) for stage in STAGES for layout in LAYOUTS),
    *(Layer(*stage, "float32", layout) for stage in STAGES[::3] for layout in LAYOUTS),
    *(Layer(*stage, layout=layout, tail=True) for stage in STAGES[::2] for layout in LAYOUTS),
    Layer(*STAGES[3], tail=True),
    Layer(*STAGES[3], squeeze="max"),
    *(Layer(*STAGES[2], layout=layout, squeeze="avgmax", tail=True) for layout in LAYOUTS),
    *(Layer(*STAGES[2], "float16", layout, variant=variant)
      for layout, variant in zip(LAYOUTS * 2, ("infer", "no dx", "no dw", "no biases"), strict=True)),
    Layer(*STAGES[3], variant="no dw"),
    Layer(72, 24, 28, gate="hardsigmoid"),
    Layer(72, 24, 28, "float16", "contiguous", gate="hardsigmoid", weights="float32"),
    Layer(1152, 48, 7, act="silu"),
    Layer(3024, 308, 7),
    Layer(30, 7, 5, act="gelu"),
    Layer(30, 7, 5, "float32", "contiguous", act="gelu"),
    *(Layer(*stage, layout=layout, tail=True, norm="batch") for stage in STAGES for layout in LAYOUTS),
    *(Layer(*stage, "float32", layout, tail=True, norm="batch") for stage in STAGES[::3] for layout in LAYOUTS),
    Layer(*STAGES[2], "float16", norm="batch", variant="no dx"),
    Layer(*STAGES[2], norm="given", tail=True),
    Layer(*STAGES[0], "float16", "contiguous", norm="given", variant="no dw"),
    Layer(256, 0, 56, tail=True, norm="batch"),
    Layer(512, 0, 7, "float32", "contiguous", norm="given", variant="no biases"),
    Layer(3024, 308, 7, norm="batch"),
    Layer(30, 7, 5, act="gelu", norm="batch", variant="together"),
]  # fmt: skip


class Driver:
    """What triton.jit asks a driver while it compiles."""

    def __init__(self, target: GPUTarget) -> None:
        self.target = target

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")


@contextlib.contextmanager
def compiling_for(name: str) -> Iterator[dict[str, Any]]:
    """Within the block launches compile for this target instead; gives the compiled kernels by what they are for."""
    target, facts = TARGETS[name]
    found: dict[str, Any] = {}

    def compile_kernel(self: launch.Kernel, programs: int, *arguments: Any) -> None:
        assert programs > 0
        found[self.name] = self.function.warmup(*arguments, grid=(programs,), **self.constants, **self.options)

    triton.runtime.driver.set_active(Driver(target))
    with (
        mock.patch.object(launch.Kernel, "__call__", compile_kernel),
        mock.patch.object(launch, "device_facts", lambda device: facts),
        mock.patch.object(launch, "on_device", lambda x: contextlib.nullcontext()),
        mock.patch.object(launch, "tickets_for", lambda x, count: torch.zeros(count, dtype=torch.int32)),
    ):
        launch.forget_recipes()
        for module in (launch.kernels, launch.tail_kernels):
            for kernel in vars(module).values():
                if hasattr(kernel, "device_caches"):
                    kernel.device_caches.clear()
        yield found
    launch.forget_recipes()


def run_call(layer: Layer, call: Call, wanted: tuple[bool, bool, bool]) -> None:
    """Forward and backward of a call. "infer": the forward alone. "together": as with other processes."""
    operator = ops.OPERATORS["triton"]
    if layer.variant == "infer":
        operator.infer(call, False)
        return
    with (
        mock.patch.object(tail_launch, "merge_statistics", lambda statistics, _: None),
        mock.patch.object(tail_launch, "share_sums", lambda dweight, dbias, _: (dweight, dbias)),
    ):
        outputs = operator.registered(call, True)
        operator.registered_backward(call.gradient(outputs, torch.empty_like(call.x), None, wanted))


def run(layer: Layer, batch: int = 2) -> tuple[str, str]:
    """Forward and backward of a layer; returns the strategies of both."""
    dtype = getattr(torch, layer.dtype)
    c, r = layer.channels, layer.reduced
    memory_format = torch.channels_last if layer.layout == "channels_last" else torch.contiguous_format
    x = torch.empty(batch, c, layer.size, layer.size, dtype=dtype).contiguous(memory_format=memory_format)
    weight = getattr(torch, layer.weights or layer.dtype)
    w1, w2, b1, b2 = (torch.empty(size, dtype=weight) if r else None for size in ((r, c), (c, r), (r,), (c,)))
    if layer.variant == "no biases":
        b1 = b2 = None
    residual, post_act = (torch.empty_like(x), "relu") if layer.tail else (None, "")
    wanted = (layer.variant != "no dx", layer.variant != "no dw", layer.tail)
    mean = var = scale = shift = factor = None
    if layer.norm == "given":
        mean, var = torch.empty(2, c)
    if layer.norm and layer.variant != "no biases":
        (scale, shift), factor = torch.empty(2, c), torch.empty(batch)
    call = Call(
        x, scale, shift, mean, var, w1, b1, w2, b2, residual, factor, 1e-5, layer.norm, layer.act, layer.gate,
        layer.squeeze, post_act, "others" if layer.variant == "together" else "",
    )  # fmt: skip
    with torch.no_grad():
        run_call(layer, call, wanted)
    problem = plan.Problem(
        c, r, layer.size**2, dtype.itemsize, weight.itemsize, layer.layout == "channels_last", layer.squeeze,
        layer.tail, layer.tail, norm=layer.norm,
    )  # fmt: skip
    facts = launch.device_facts(x.device)
    return tuple(launch.plan_of(dataclasses.replace(problem, backward=b), facts).strategy for b in (False, True))


def resources(kernel: Any, target: str) -> dict[str, Any]:
    """Registers, spills in bytes, shared memory in bytes, and how often which width of global access stands in the
    code."""
    if target.startswith("gfx"):
        text = kernel.asm["amdgcn"]
        number = lambda key: int(re.search(rf"\.{key}:\s+(\d+)", text)[1])  # noqa: E731
        return {
            "registers": number("vgpr_count"),
            "spills": number("private_segment_fixed_size"),
            "shared": kernel.metadata.shared,
            "loads": dict(sorted(Counter(re.findall(r"\b(?:global|buffer)_load_(\w+)", text)).items())),
            "stores": dict(sorted(Counter(re.findall(r"\b(?:global|buffer)_store_(\w+)", text)).items())),
        }
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        command = [tool, "--dump-resource-usage", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    used = {key: int(value) for key, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", text)}
    ptx = kernel.asm["ptx"]
    return {
        "registers": used["REG"],
        "spills": used["STACK"] + used["LOCAL"],
        "shared": kernel.metadata.shared,
        "loads": _widths(ptx, r"ld\.global", asynchronous=True),
        "stores": _widths(ptx, r"st\.global"),
    }


def _widths(ptx: str, instruction: str, asynchronous: bool = False) -> dict[str, int]:
    """How many accesses of how many bits: {"128": 4, "32": 1}."""
    found: Counter[int] = Counter()
    if asynchronous:
        found.update(8 * int(size, 16) for size in re.findall(r"cp\.async\.c[ag]\.\S+ .*?, 0x(\w+)", ptx))
    for vector, bits in re.findall(instruction + r"[\w.:]*?(?:\.v(\d))?\.[buf](\d+)\b", ptx):
        found[int(vector or 1) * int(bits)] += 1
    return {str(bits): count for bits, count in sorted(found.items(), reverse=True)}


def compile_all(targets: list[str], layers: list[Layer], progress: bool = False) -> dict[str, Any]:
    """{layer: {target: {"strategies": [forward, backward], "kernels": {name: resources}}}}"""
    table: dict[str, Any] = {}
    for target in targets:
        for layer in layers:
            with compiling_for(target) as found:
                strategies = run(layer)
            kernels = {name: resources(kernel, target) for name, kernel in found.items()}
            table.setdefault(layer.name, {})[target] = {"strategies": list(strategies), "kernels": kernels}
            if progress:
                print(target, layer.name, *strategies, file=sys.stderr)
                for name, used in kernels.items():
                    print("   ", name, used, file=sys.stderr)
    return table


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--target", nargs="+", choices=TARGETS, default=list(TARGETS))
    parser.add_argument("--layer", default="", help="only layers whose name has this in it")
    parser.add_argument("--every", type=int, default=1, metavar="K", help="only every K-th layer, from the first on")
    parser.add_argument("--quiet", action="store_true", help="print no progress")
    parser.add_argument("--write", action="store_true", help=f"write {TABLE.name}, with what it takes to make it again")
    args = parser.parse_args()
    if launch.INTERPRETED:
        parser.error("unset TRITON_INTERPRET: the interpreter does not compile")
    layers = [layer for layer in LAYERS if args.layer in layer.name][:: args.every]
    content = {"compiler": f"triton {triton.__version__}", "layers": compile_all(args.target, layers, not args.quiet)}
    if not args.write:
        print(json.dumps(content))
        return 0
    if args.target != list(TARGETS) or layers != LAYERS:
        parser.error("--write records every layer for every target")
    command = [sys.executable, str(HERE / "launch_twice.py")]
    launched = json.loads(subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout)
    content |= {"sources": aot_record.digest(aot_record.TRITON_SOURCES), "launches": launched}
    lines = json.dumps(content, indent=1, sort_keys=True)
    # One kernel, and one launch, a line.
    lines = re.sub(r'\{\s+"loads": .*?\n {5}\}', lambda m: re.sub(r"\s+", " ", m[0]), lines, flags=re.DOTALL)
    lines = re.sub(r'\[\s+("\w+",\s+\d+,\s+\w+)\s+\]', lambda m: "[" + re.sub(r"\s+", " ", m[1]) + "]", lines)
    TABLE.write_text(lines + "\n")
    return 0


if __name__ == "__main__":
    os.environ.setdefault("TRITON_CACHE_DIR", tempfile.mkdtemp())
    sys.exit(main())
