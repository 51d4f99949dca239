"""Runs the fused layer or the block tail once, forward and backward, with every strategy and form of tile that a
backend's plans know, and holds y and all gradients against float64 by the rule of tests/oracle.py.

    python benchmarks/gpu_kernels.py                                       the SE layer by cuda and triton
    compute-sanitizer --tool memcheck python benchmarks/gpu_kernels.py --backend cuda --op tail
    TRITON_INTERPRET=1 python benchmarks/gpu_kernels.py --device cpu       see gpu_backends.py

The tensors are small and their sizes no multiples of anything, so that every mask has something to hide. Exit status:
0 all right, 1 a result is wrong, a case failed, or a strategy or form was not met, 2 a backend's kernels cannot run
here.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import math
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from typing import Any, NamedTuple

import gpu_backends
import torch

from senet_fused.backends import cuda
from senet_fused.backends.triton import plan as planner
from senet_fused.cli.tune import cuda_problem

with gpu_backends.of_tests():
    import oracle
    import tail_oracle
    from oracle import ACTS, GATES, Case
    from tail_oracle import Tail

f32, bf16, f16 = DTYPES = (torch.float32, torch.bfloat16, torch.float16)
CL = "channels_last"
RELU = {"residual": True, "post_act": "relu"}
CUDA_STRATEGIES = ("partials", "last_block", "launches")
CUDA_FORMS = ("channels_last", "planes", "tile_of_planes")
# The status of a process that cannot go on: after an illegal access every further call fails.
DEAD = 3


class Layer(NamedTuple):
    """An SE layer, or a block tail, and how it is run. split: two tiles to a plane, however small it is."""

    case: Case | Tail
    split: bool = False


def _turning(layers: list[Layer]) -> tuple[Layer, ...]:
    """The layers, whose activations and gates take turns."""
    return tuple(
        layer._replace(case=layer.case.replace(act=ACTS[k % len(ACTS)], gate=GATES[k % len(GATES)]))
        for k, layer in enumerate(layers)
    )


def _tail(shape: tuple[int, ...], reduced: int, dtype: torch.dtype, layout: str = "contiguous", **options: Any) -> Tail:
    """With vectors in float32, as networks keep them."""
    vectors = ("weight", "bias", "running_mean", "running_var", "b1", "b2")
    return Tail(shape, reduced, dtype, layout, others=tuple((name, f32) for name in vectors), **options)


GIVEN = {"training": False}
LAYERS = _turning([
    Layer(Case((3, 40, 7, 7), 12, bf16)),  # planes that are no multiples of 16 bytes: rows, tile_of_planes
    Layer(Case((3, 37, 5, 9), 11, f32)),
    Layer(Case((3, 21, 3, 8), 7, f16, **RELU)),  # planes that are
    Layer(Case((3, 37, 5, 9), 11, bf16, CL)),
    Layer(Case((3, 44, 4, 8), 11, f32, CL, **RELU)),
    Layer(Case((3, 37, 5, 9), 11, bf16, squeeze="max")),
    Layer(Case((3, 37, 5, 9), 11, f16, CL, squeeze="avgmax", through="both")),
    Layer(Case((2, 64, 17, 19), 9, bf16, CL), split=True),
    Layer(Case((2, 19, 23, 23), 5, f32), split=True),
])  # fmt: skip
TAILS = _turning([
    Layer(_tail((3, 40, 7, 7), 12, bf16)),  # planes that are no multiples of 16 bytes
    Layer(_tail((3, 37, 5, 9), 11, f32, **GIVEN, **RELU)),
    Layer(_tail((3, 21, 3, 8), 7, f16, **RELU)),  # planes that are
    Layer(_tail((3, 37, 5, 9), 11, bf16, CL, **RELU)),
    Layer(_tail((3, 44, 4, 8), 11, f32, CL, **GIVEN, **RELU)),
    Layer(_tail((3, 44, 4, 8), 11, f16, CL, factor=True)),
    Layer(_tail((3, 37, 5, 9), 0, bf16, CL, **RELU)),
    Layer(_tail((3, 40, 7, 7), 0, f32, **RELU)),
    Layer(_tail((3, 21, 3, 8), 0, bf16, **GIVEN, **RELU)),
    Layer(_tail((2, 64, 17, 19), 9, bf16, CL, **RELU), split=True),
    Layer(_tail((2, 19, 23, 23), 5, f32, **RELU), split=True),
    Layer(_tail((2, 19, 23, 23), 0, f32), split=True),
])  # fmt: skip
# Several blocks of channels, of samples and of squeezed channels; for Triton's interpreter that would take long.
WIDE = (Layer(Case((2, 300, 7, 7), 36, bf16)), Layer(Case((17, 300, 3, 5), 36, f32, CL)))
WIDE_TAILS = (
    Layer(_tail((2, 300, 7, 7), 36, bf16, **RELU)),
    Layer(_tail((17, 300, 3, 5), 36, f32, CL, **RELU)),
)


def text_of(case: Case | Tail) -> str:
    """A tail's vectors are float32 in all of these."""
    return str(case.replace(others=()))


def problem_of(case: Case | Tail, backward: bool) -> planner.Problem:
    """What a call of this case looks up."""
    tail = isinstance(case, Tail)
    dtype, relu = case.dtype_of("y"), case.post_act == "relu"
    return planner.Problem(
        channels=case.shape[1],
        reduced=case.reduced,
        positions=math.prod(case.shape[2:]),
        element_size=dtype.itemsize,
        weight_size=case.dtype_of("w1").itemsize if case.reduced else dtype.itemsize,
        channels_last=case.layout == CL,
        squeeze="avg" if tail else case.squeeze,
        relu=relu,
        residual=case.residual and (relu or not backward),
        backward=backward,
        norm="" if not tail else "batch" if case.training else "given",
    )


class Variant(NamedTuple):
    """One way to run a layer. met: the strategies and forms that it makes the backend take."""

    text: str
    met: set[str]
    using: Callable[[], AbstractContextManager[None]]


def _variant(plans: list[Any], tiles: list[Any], using: Callable[[], AbstractContextManager[None]]) -> Variant:
    """From the plans forward and backward and their tiles."""
    forward, backward = tiles
    text = f"{plans[0].strategy}, {forward.form}, {forward.splits} and {backward.splits} splits"
    if forward.samples > 1 or backward.samples > 1:
        text += f", {forward.samples} and {backward.samples} samples"
    return Variant(text, {plan.strategy for plan in plans} | {tile.form for tile in tiles}, using)


def _pairs(candidates: list[list[Any]], kind: Callable[[Any], Any]) -> Iterator[list[Any]]:
    """The cheapest plans of each kind, forward and backward; where one direction has none, its cheapest."""
    found = [{kind(plan): plan for plan in reversed(plans)} for plans in candidates]
    for key in dict.fromkeys(kind(plan) for plans in candidates for plan in plans):
        yield [of_kind.get(key, plans[0]) for of_kind, plans in zip(found, candidates, strict=True)]


def triton_variants(layer: Layer, device: torch.device) -> Iterator[Variant]:
    """The cheapest plan of each strategy with each form, forward and backward."""
    from senet_fused.backends.triton import launch

    problems = [problem_of(layer.case, backward) for backward in (False, True)]

    def split(plan: planner.Plan) -> planner.Plan:
        chunks = -(-problems[0].positions // plan.tile.positions)
        steps = -(-chunks // 2)  # of one step there is nothing to split
        tile = dataclasses.replace(plan.tile, steps=steps, splits=-(-chunks // steps))
        return dataclasses.replace(plan, tile=tile)

    candidates = [planner.candidates(problem, launch.device_facts(device)) for problem in problems]
    for plans in _pairs(candidates, lambda plan: (plan.strategy, plan.tile.form)):
        if layer.split:
            plans = [split(plan) if plan.tile.form != "rows" else plan for plan in plans]
        using = dict(zip(problems, plans, strict=True))
        yield _variant(plans, [plan.tile for plan in plans], lambda using=using: launch.using(using))


def cuda_variants(layer: Layer, device: torch.device) -> Iterator[Variant]:
    """The cheapest plan of each strategy with each form, forward and backward; where samples share tiles, also with it.

    A layer that is split is planned for a GPU with little shared memory, where planes that break alignment are read as
    they come, and without an L2, where all stores are streamed.
    """
    from senet_fused import _plan

    capability = 90
    if device.type == "cuda":
        major, minor = torch.cuda.get_device_capability(device)
        capability = 10 * major + minor
    small = _plan.CudaFacts(capability=capability, sms=132, shared_bytes=48 * 1024, l2_bytes=0)
    facts = small if layer.split else cuda.device_facts(device)
    problems = [cuda_problem(layer.case.shape[0], problem_of(layer.case, backward)) for backward in (False, True)]
    natives = [problem.native() for problem in problems]

    def split(plan: Any, native: Any) -> Any:
        half = -(-problems[0].positions // 2)
        if plan.form == "channels_last":
            return plan.replace(native, positions=half)
        # Split planes come one at a time, in multiples of 8 positions.
        return plan.replace(native, channels=1, positions=-(-half // 8) * 8, lanes=256)

    candidates = [_plan.cuda_candidates(native, facts) for native in natives]
    for plans in _pairs(candidates, lambda plan: (plan.strategy, plan.form, plan.samples > 1)):
        if layer.split:
            plans = [split(*pair) for pair in zip(plans, natives, strict=True)]
        chosen = dict(zip(problems, plans, strict=True))
        yield _variant(plans, plans, lambda chosen=chosen: cuda.using(lambda asked, facts: chosen[asked]))


# By op and backend: the layers, the ways to run them, and what is to be met on them.
BACKENDS = {
    "se": {
        "cuda": ((*LAYERS, *WIDE), cuda_variants, {*CUDA_STRATEGIES, *CUDA_FORMS}),
        "triton": (LAYERS, triton_variants, {*planner.STRATEGIES, *planner.FORMS}),
    },
    "tail": {
        "cuda": ((*TAILS, *WIDE_TAILS), cuda_variants, {*CUDA_STRATEGIES, *CUDA_FORMS}),
        "triton": (TAILS, triton_variants, {*planner.STRATEGIES, "channels_last", "planes"}),
    },
}


def in_every_dtype(layers: tuple[Layer, ...]) -> Iterator[Layer]:
    """The layers, and then again in the dtypes that they do not have."""
    yield from layers
    for turn in (1, 2):
        for layer in layers:
            dtype = DTYPES[(DTYPES.index(layer.case.dtype) + turn) % len(DTYPES)]
            yield layer._replace(case=layer.case.replace(dtype=dtype))


def wrong(case: Case | Tail, backend: str, device: torch.device) -> str | None:
    """What is off in one run, or None; raises what the kernels raise."""
    rule = tail_oracle if isinstance(case, Tail) else oracle
    try:
        rule.check(case, draws=1, ours=functools.partial(rule.run_on, backend, device))
    except AssertionError as error:
        return str(error).removeprefix(f"{case}: ")
    return None


def judged(case: Case | Tail, way: Variant, backend: str, device: torch.device) -> dict[str, Any]:
    """The status of one run: ok, wrong or failed; the last two with what is wrong."""
    start = time.monotonic()
    try:
        with way.using():
            complaint = wrong(case, backend, device)
        found = {"status": "ok"} if complaint is None else {"status": "wrong", "detail": complaint}
    except Exception as error:  # one case's failure is a line, not the end of the run
        found = {"status": "failed", "detail": f"{type(error).__name__}: {error}"}
    return {**found, "seconds": round(time.monotonic() - start, 3)}


def alive(device: torch.device) -> bool:
    """Whether the device still takes work."""
    try:
        torch.zeros(1, device=device).cpu()
    except RuntimeError:
        return False
    return True


def _part(text: str) -> tuple[int, int]:
    number, _, count = text.partition("/")
    return int(number), int(count)


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    gpu_backends.add_arguments(parser)
    parser.add_argument("--every-dtype", action="store_true", help="each layer in float32, bfloat16 and float16")
    parser.add_argument("--poison", action="store_true", help="fresh memory is NaN until something writes it")
    parser.add_argument("--part", type=_part, default=(0, 1), metavar="I/N", help="every Nth case from the Ith on")
    parser.add_argument("--skip", type=int, default=0, metavar="N", help="not the first N cases of the part")
    parser.add_argument(
        "--lines", action="store_true", help="print JSON, a line when a case begins and one when it is done"
    )
    return parser.parse_args(argv)


def main() -> int:
    args = parse()
    device = torch.device(args.device)
    for backend in args.backend:
        reason = gpu_backends.refusal(backend, device)
        if reason is not None:
            print(f"gpu_kernels: {backend!r} cannot run with --device {device.type}: {reason}", file=sys.stderr)
            return 2
    if device.type == "cuda":
        device = torch.device("cuda", 0)
    if args.poison:
        torch.use_deterministic_algorithms(True, warn_only=True)

    failed, (first, step) = False, args.part
    for backend in args.backend:
        layers, variants, missing = BACKENDS[args.op][backend]
        if args.every_dtype:
            layers = tuple(in_every_dtype(layers))
        cases = [(layer.case, way) for layer in layers for way in variants(layer, device)]
        cases = cases[first::step]
        if args.lines:
            print(json.dumps({"op": args.op, "backend": backend, "status": "planned", "count": len(cases)}), flush=True)
        for case, way in cases[args.skip :]:
            name = {"op": args.op, "backend": backend, "case": text_of(case), "plan": way.text}
            if args.lines:
                print(json.dumps({**name, "status": "begun"}), flush=True)
            gpu_backends.forget_launches(backend, device)
            found = judged(case, way, backend, device)
            counted = gpu_backends.counted_launches(backend, device)
            missing = missing - way.met
            failed = failed or found["status"] != "ok"
            if args.lines:
                print(json.dumps({**name, **found, "kernels": sorted(counted)}), flush=True)
            else:
                told = found["status"] if "detail" not in found else f"{found['status']}: {found['detail']}"
                print(f"{backend}: {text_of(case)}: {way.text}: {told}", flush=True)
                print(f"  {', '.join(counted)}" if counted else "", end="\n" * bool(counted))
            if found["status"] == "failed" and not alive(device):
                return DEAD
        if missing and step == 1 and not args.skip:
            print(f"gpu_kernels: {backend}: not met: {', '.join(sorted(missing))}", file=sys.stderr)
            failed = True
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
