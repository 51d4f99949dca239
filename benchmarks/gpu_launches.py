"""The GPU kernels of one forward and one backward of the fused layer or block tail, with their device times, by
torch.profiler.

    python benchmarks/gpu_launches.py --batch 64 --dtype bfloat16 float32
    python benchmarks/gpu_launches.py --op tail
    TRITON_INTERPRET=1 python benchmarks/gpu_launches.py --device cpu --shape 2,16,4,5,7

The backends take turns on each layer. Everything that the device runs is counted, ours or not. For a layer a plan
promises two launches each way, for a tail three; for either four where it has launches of its own for the excitation.
On a CPU (see gpu_backends.py) there is no profiler to ask: the backend's own counter stands in, without times. Exit
status: 0 as promised, 1 more kernels than that, 2 a backend's kernels cannot run.
"""

from __future__ import annotations

import argparse
import dataclasses
import re
import statistics
import sys
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import gpu_backends
import torch

from senet_fused import block_tail, squeeze_excite
from senet_fused.bench import buffers
from senet_fused.bench.problems import DTYPES, LAYOUTS, Case, RequestError, cases, problems

PROMISED = {
    "se": {"partials": 2, "last_block": 2, "launches": 4},
    "tail": {"partials": 3, "last_block": 3, "launches": 4},
}


@dataclasses.dataclass(frozen=True)
class Launch:
    """A kernel (or a copy, or a fill): how often one call launches it, and the median of its times in us, if known."""

    name: str
    times: float
    us: float | None


# "void senet::cuda::scale_planes_kernel<float>(senet::cuda::ScaleArguments)"
_OURS = re.compile(r"^(?:void )?senet::cuda::(\w+)")


def short(kernel: str) -> str:
    """A kernel's name, one of the CUDA library's without types: they are those of the layer."""
    found = _OURS.match(kernel)
    return found[1] if found else kernel


def launches_of(events: Iterable[Any], calls: int) -> list[Launch]:
    """What ran on the device in so many calls, from a profiler's events, in the order of first launches."""
    found: dict[str, list[float]] = {}
    for event in sorted(events, key=lambda event: event.time_range.start):
        if event.device_type == torch.autograd.DeviceType.CUDA and not event.is_user_annotation:
            found.setdefault(short(event.name), []).append(event.time_range.elapsed_us())
    return [Launch(name, len(times) / calls, statistics.median(times)) for name, times in found.items()]


def observe(call: Callable[[], object], calls: int, device: torch.device, backend: str) -> list[Launch]:
    """What one call launches, over several calls, after one that warms up."""
    call()
    if device.type == "cpu":
        gpu_backends.forget_launches(backend, device)
        for _ in range(calls):
            call()
        counted = gpu_backends.counted_launches(backend, device)
        return [Launch(name, times / calls, None) for name, times in counted.items()]
    for count in (1, calls):  # the first profile may miss what runs while it is set up
        torch.cuda.synchronize()
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiler:
            for _ in range(count):
                call()
            torch.cuda.synchronize()
    return launches_of(profiler.events(), calls)


def directions(case: Case, device: torch.device, backend: str) -> dict[str, Callable[[], object]]:
    """One forward that keeps what a backward needs, and one backward of it.

    Biases are float32, as kernels read them, and a tail keeps no running statistics: PyTorch would convert the ones and
    update the others in launches that no plan promises.
    """
    (inputs,) = buffers.BufferPool(device).sets(case, 0)
    weights = buffers.make_weights(case, device)
    w1, b1, w2, b2, *norm = (None if t is None else t.float() if t.dim() == 1 else t for t in weights[:6])
    wanted = [t.requires_grad_() for t in (w1, b1, w2, b2, *norm, inputs.x, inputs.residual) if t is not None]
    how = {"act": case.act, "gate": case.gate, "residual": inputs.residual, "backend": backend}
    how["post_act"] = None if case.post_act == "none" else case.post_act

    def forward() -> torch.Tensor:
        if case.op == "tail":
            return block_tail(inputs.x, None, None, *norm, w1=w1, w2=w2, b1=b1, b2=b2, training=True, **how)
        return squeeze_excite(inputs.x, w1, w2, b1, b2, **how)

    y = forward()
    return {"forward": forward, "backward": lambda: torch.autograd.grad(y, wanted, inputs.dy, retain_graph=True)}


def line(backend: str, direction: str, strategy: str, launches: Sequence[Launch]) -> str:
    count = sum(launch.times for launch in launches)
    text = f"  {backend:7} {direction:9} {strategy:10} {count:g} launches"
    if any(launch.us is None for launch in launches):
        names = [f"{launch.name} x {launch.times:g}" if launch.times != 1 else launch.name for launch in launches]
        return f"{text}: {', '.join(names)}"
    total = sum(launch.times * launch.us for launch in launches)
    names = [f"{launch.name}{f' x {launch.times:g}' * (launch.times != 1)} {launch.us:.1f}" for launch in launches]
    return f"{text} {total:8.1f} us: {', '.join(names)}"


def check(found: dict[str, Sequence[Launch]], planned: dict[str, str], op: str = "se") -> str | None:
    """What breaks the promise, or None: forward and backward together may launch what their plans say, and not none."""
    counts = {direction: sum(launch.times for launch in launches) for direction, launches in found.items()}
    promised = {direction: PROMISED[op][strategy] for direction, strategy in planned.items()}
    if all(0 < counts[direction] <= promised[direction] for direction in counts):
        return None
    texts = (" + ".join(f"{value:g}" for value in each.values()) for each in (counts, promised))
    return "{} launches, promised {}".format(*texts)


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--problem", nargs="+", default=[], choices=list(problems()))
    parser.add_argument("--shape", nargs="+", default=[], metavar="N,C,R,H,W")
    parser.add_argument("--batch", nargs="+", type=int, default=[64])
    parser.add_argument("--dtype", nargs="+", default=["bfloat16"], choices=[d for d in DTYPES if d != "float64"])
    parser.add_argument("--layout", nargs="+", default=list(LAYOUTS), choices=LAYOUTS)
    gpu_backends.add_arguments(parser)
    parser.add_argument("--calls", type=int, default=10, help="over which the profiler looks (default 10)")
    return parser.parse_args(argv)


def main() -> int:
    args = parse()
    device = torch.device(args.device)
    for backend in args.backend:
        reason = gpu_backends.refusal(backend, device)
        if reason is not None:
            print(f"gpu_launches: {backend!r} cannot run with --device {device.type}: {reason}", file=sys.stderr)
            return 2
    names = args.problem or ([] if args.shape else ["senet154"])
    options = {"batches": args.batch, "dtypes": args.dtype, "layouts": args.layout, "op": args.op}
    try:
        todo = cases(names, args.shape, **options, directions=["forward+backward"])
    except RequestError as error:
        print(f"gpu_launches: {error}", file=sys.stderr)
        return 2
    broken = []
    for case in todo:
        where = f"{case.label} {case.dtype} {case.layout}"
        print(where)
        for backend in args.backend:
            calls = directions(case, device, backend)
            planned = {name: gpu_backends.strategy(backend, case, name == "backward", device) for name in calls}
            found = {name: observe(call, args.calls, device, backend) for name, call in calls.items()}
            for direction, launches in found.items():
                print(line(backend, direction, planned[direction], launches), flush=True)
            complaint = check(found, planned, args.op)
            if complaint is not None:
                broken.append(f"{where}, {backend}: {complaint}")
    what = "tails" if args.op == "tail" else "layers"
    summary = [f"{len(todo)} {what}, {' and '.join(args.backend)}: all as promised"]
    print("\n".join(["", *(broken or summary)]))
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())
