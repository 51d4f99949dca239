"""Runs the fused layer once, forward and backward, with every strategy and form of tile that a backend's plans know;
with --op tail block tails, by the batch's and by given statistics, with a gate and without.

    compute-sanitizer --tool memcheck python benchmarks/gpu_sanitize.py --backend cuda
    compute-sanitizer --tool memcheck python benchmarks/gpu_sanitize.py --backend triton --op tail
    TRITON_INTERPRET=1 python benchmarks/gpu_sanitize.py --device cpu      see gpu_backends.py

The tensors are small and their sizes no multiples of anything, so that every mask has something to hide. y and all
gradients are held against float64 on the CPU. Exit status: 0 all right, 1 a result is wrong, or a strategy or form was
not met, 2 a backend's kernels cannot run here.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any, NamedTuple

import gpu_backends
import torch
from torch import Tensor

from senet_fused import FusedSE, block_tail
from senet_fused.backends import cuda
from senet_fused.backends.triton import plan as planner
from senet_fused.tune import cuda_problem

# Of the largest element; rounding gives half of it at most.
TOLERANCE = {torch.float32: 1e-4, torch.float16: 4e-3, torch.bfloat16: 2e-2}


@dataclasses.dataclass(frozen=True)
class Layer:
    """One layer, or block tail, and its input. reduced: 0 for a tail without a gate."""

    shape: tuple[int, ...]
    reduced: int
    dtype: torch.dtype
    channels_last: bool
    squeeze: str = "avg"
    tail: bool = False  # + residual, ReLU
    split: bool = False  # two tiles to a plane, however small it is
    norm: str = ""  # of a block tail: "batch" (in training) or "given" statistics

    def __str__(self) -> str:
        n, c, *spatial = self.shape
        parts = [
            f"{n} x {c}/{self.reduced} @ {'x'.join(map(str, spatial))}",
            str(self.dtype).removeprefix("torch."),
            "channels_last" if self.channels_last else "contiguous",
        ]
        parts += [self.squeeze] if self.squeeze != "avg" else []
        parts += [f"{self.norm} statistics"] if self.norm else []
        return " ".join(parts + ["+ residual, relu"] * self.tail)

    @property
    def memory_format(self) -> torch.memory_format:
        return torch.channels_last if self.channels_last else torch.contiguous_format

    def problems(self) -> list[planner.Problem]:
        """Forward and backward."""
        return [self.problem(backward) for backward in (False, True)]

    def problem(self, backward: bool) -> planner.Problem:
        _, c, *spatial = self.shape
        size = self.dtype.itemsize
        return planner.Problem(
            c, self.reduced, math.prod(spatial), size, size, self.channels_last, self.squeeze, self.tail, self.tail,
            backward, self.norm,
        )  # fmt: skip


def alike(problem: Any) -> list[Any]:
    """The problems that are this one: without a gate there are no weights, whatever their size is said to be."""
    if problem.reduced:
        return [problem]
    replace = problem._replace if isinstance(problem, tuple) else lambda **size: dataclasses.replace(problem, **size)
    return [replace(weight_size=size) for size in (0, 2, 4)]


LAYERS = (
    Layer((3, 40, 7, 7), 12, torch.bfloat16, False),  # planes that are no multiples of 16 bytes: rows, tile_of_planes
    Layer((3, 37, 5, 9), 11, torch.float32, False),
    Layer((3, 21, 3, 8), 7, torch.float16, False, tail=True),  # planes that are
    Layer((3, 37, 5, 9), 11, torch.bfloat16, True),
    Layer((3, 44, 4, 8), 11, torch.float32, True, tail=True),
    Layer((3, 37, 5, 9), 11, torch.bfloat16, False, squeeze="max"),
    Layer((3, 37, 5, 9), 11, torch.float16, True, squeeze="avgmax"),
    Layer((2, 64, 17, 19), 9, torch.bfloat16, True, split=True),
    Layer((2, 19, 23, 23), 5, torch.float32, False, split=True),
)
# Several blocks of channels, of samples and of squeezed channels; for Triton's interpreter that would take long.
WIDE = (
    Layer((2, 300, 7, 7), 36, torch.bfloat16, False),
    Layer((17, 300, 3, 5), 36, torch.float32, True),
)


TAILS = (
    Layer((3, 40, 7, 7), 12, torch.bfloat16, False, norm="batch"),  # planes that are no multiples of 16 bytes
    Layer((3, 37, 5, 9), 11, torch.float32, False, tail=True, norm="given"),
    Layer((3, 21, 3, 8), 7, torch.float16, False, tail=True, norm="batch"),  # planes that are
    Layer((3, 37, 5, 9), 11, torch.bfloat16, True, tail=True, norm="batch"),
    Layer((3, 44, 4, 8), 11, torch.float32, True, tail=True, norm="given"),
    Layer((3, 44, 4, 8), 11, torch.float16, True, norm="batch"),
    Layer((3, 37, 5, 9), 0, torch.bfloat16, True, tail=True, norm="batch"),
    Layer((3, 40, 7, 7), 0, torch.float32, False, tail=True, norm="batch"),
    Layer((3, 21, 3, 8), 0, torch.bfloat16, False, tail=True, norm="given"),
    Layer((2, 64, 17, 19), 9, torch.bfloat16, True, tail=True, split=True, norm="batch"),
    Layer((2, 19, 23, 23), 5, torch.float32, False, tail=True, split=True, norm="batch"),
    Layer((2, 19, 23, 23), 0, torch.float32, False, split=True, norm="batch"),
)
WIDE_TAILS = (
    Layer((2, 300, 7, 7), 36, torch.bfloat16, False, tail=True, norm="batch"),
    Layer((17, 300, 3, 5), 36, torch.float32, True, tail=True, norm="batch"),
)


class Variant(NamedTuple):
    """One way to run a layer. met: the strategies and forms that it makes the backend take."""

    text: str
    met: set[str]
    using: Callable[[], AbstractContextManager[None]]


def variant(plans: list[Any], tiles: list[Any], using: Callable[[], AbstractContextManager[None]]) -> Variant:
    """From the plans forward and backward and their tiles."""
    forward, backward = tiles
    text = f"{plans[0].strategy}, {forward.form}, {forward.splits} and {backward.splits} splits"
    if forward.samples > 1 or backward.samples > 1:
        text += f", {forward.samples} and {backward.samples} samples"
    met = {plan.strategy for plan in plans} | {tile.form for tile in tiles}
    return Variant(text, met, using)


def triton_variants(layer: Layer, device: torch.device) -> Iterator[Variant]:
    """The cheapest plan of each strategy, forward and backward."""
    from senet_fused.backends.triton import launch

    def split(plan: planner.Plan, positions: int) -> planner.Plan:
        chunks = -(-positions // plan.tile.positions)
        steps = -(-chunks // 2)  # of one step there is nothing to split
        tile = dataclasses.replace(plan.tile, steps=steps, splits=-(-chunks // steps))
        return dataclasses.replace(plan, tile=tile)

    problems, facts = layer.problems(), launch.device_facts(device)
    candidates = [planner.candidates(problem, facts) for problem in problems]
    for strategy in planner.STRATEGIES:
        plans = [next((plan for plan in each if plan.strategy == strategy), None) for each in candidates]
        if layer.split:
            plans = [plan and split(plan, problems[0].positions) for plan in plans]
        if all(plans):
            using = {same: plan for problem, plan in zip(problems, plans, strict=True) for same in alike(problem)}
            yield variant(plans, [plan.tile for plan in plans], lambda using=using: launch.using(using))


def cuda_variants(layer: Layer, device: torch.device) -> Iterator[Variant]:
    """The cheapest plan of each strategy, forward and backward; where samples share tiles, of each strategy with it.

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
    problems = [cuda_problem(layer.shape[0], problem) for problem in layer.problems()]
    natives = [problem.native() for problem in problems]

    def split(plan: Any, native: Any, positions: int) -> Any:
        half = -(-positions // 2)
        if plan.form == "channels_last":
            return plan.replace(native, positions=half)
        # Split planes come one at a time, in multiples of 8 positions.
        return plan.replace(native, channels=1, positions=-(-half // 8) * 8, lanes=256)

    candidates = [_plan.cuda_candidates(native, facts) for native in natives]
    for strategy in CUDA_STRATEGIES:
        for several in (False, True):
            plans = [
                next((plan for plan in each if plan.strategy == strategy and (plan.samples > 1) == several), None)
                for each in candidates
            ]
            if not all(plans):
                continue
            if layer.split:
                plans = [split(*pair, problems[0].positions) for pair in zip(plans, natives, strict=True)]
            chosen = {same: plan for problem, plan in zip(problems, plans, strict=True) for same in alike(problem)}
            yield variant(plans, plans, lambda chosen=chosen: cuda.using(lambda asked, facts: chosen[asked]))


CUDA_STRATEGIES = ("partials", "last_block", "launches")
# The layers, the ways to run them, and what is to be met on them.
BACKENDS = {
    "cuda": ((*LAYERS, *WIDE), cuda_variants, {*CUDA_STRATEGIES, "channels_last", "planes", "tile_of_planes"}),
    "triton": (LAYERS, triton_variants, {*planner.STRATEGIES, *planner.FORMS}),
}
TAIL_BACKENDS = {
    "cuda": ((*TAILS, *WIDE_TAILS), *BACKENDS["cuda"][1:]),
    "triton": (TAILS, triton_variants, {*planner.STRATEGIES, "channels_last", "planes"}),
}


def results(layer: Layer, module: FusedSE, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """y and every gradient, on the CPU in float64."""
    x = tensors["x"].detach().requires_grad_()
    residual = tensors["residual"].detach().requires_grad_() if layer.tail else None
    y = module(x, residual)
    wanted = {"dx": x, **{f"d {name}": parameter for name, parameter in module.named_parameters()}}
    if residual is not None:
        wanted["dresidual"] = residual
    gradients = torch.autograd.grad(y, list(wanted.values()), tensors["dy"])
    found = {"y": y, **dict(zip(wanted, gradients, strict=True))}
    return {name: tensor.detach().cpu().double() for name, tensor in found.items()}


def tail_results(layer: Layer, backend: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """y, every gradient and the running statistics, on the CPU in float64."""
    t = {name: tensor.detach().clone() for name, tensor in tensors.items()}
    wanted = [name for name in t if name not in ("dy", "mean", "var") and (name != "residual" or layer.tail)]
    for name in wanted:
        t[name].requires_grad_()
    y = block_tail(
        t["x"], t["mean"], t["var"], t["weight"], t["bias"], w1=t.get("w1"), w2=t.get("w2"), b1=t.get("b1"),
        b2=t.get("b2"), training=layer.norm == "batch", residual=t["residual"] if layer.tail else None,
        post_act="relu" if layer.tail else None, backend=backend,
    )  # fmt: skip
    gradients = torch.autograd.grad(y, [t[name] for name in wanted], t["dy"])
    found = {"y": y, **{f"d {name}": gradient for name, gradient in zip(wanted, gradients, strict=True)}}
    found |= {"running mean": t["mean"], "running var": t["var"]}
    return {name: tensor.detach().cpu().double() for name, tensor in found.items()}


def tail_pair(layer: Layer, backend: str, device: torch.device, tensors: dict[str, Tensor]) -> list[dict[str, Tensor]]:
    """A tail's results, exact and found. Its vectors are float32, as networks keep them."""
    c, r = layer.shape[1], layer.reduced
    scale, shift = torch.rand(c) + 0.5, 4 * torch.randn(c)  # as far from zero as an activation's mean may be
    ones = [1] * (len(layer.shape) - 2)
    x = tensors["x"] * scale.view(c, *ones) + shift.view(c, *ones)
    tensors["x"] = x.to(tensors["x"].dtype).contiguous(memory_format=layer.memory_format)
    tensors |= {"mean": shift, "var": scale.square(), "weight": torch.randn(c), "bias": torch.randn(c)}
    if r:
        tensors |= {"w1": torch.randn(r, c) / c**0.5, "w2": torch.randn(c, r) / r**0.5}
        tensors |= {name: tensors[name].to(layer.dtype) for name in ("w1", "w2")}
        tensors |= {"b1": torch.rand(r) + 1, "b2": torch.randn(c)}  # not every hidden unit off
    return [
        tail_results(layer, "reference", {name: t.double() for name, t in tensors.items()}),
        tail_results(layer, backend, {name: t.to(device) for name, t in tensors.items()}),
    ]


def pair(layer: Layer, backend: str, device: torch.device, tensors: dict[str, Tensor]) -> list[dict[str, Tensor]]:
    """A layer's results, exact and found."""
    options = {"rd_channels": layer.reduced, "bias": True, "squeeze": layer.squeeze}
    options["post_act"] = "relu" if layer.tail else None
    module = FusedSE(layer.shape[1], **options, backend=backend, dtype=layer.dtype)
    double = FusedSE(layer.shape[1], **options, backend="reference", dtype=torch.float64)
    double.load_state_dict(module.state_dict())
    return [
        results(layer, double, {name: t.double() for name, t in tensors.items()}),
        results(layer, module.to(device), {name: t.to(device) for name, t in tensors.items()}),
    ]


def wrong(layer: Layer, backend: str, device: torch.device) -> list[str]:
    """What is off in one run, on fresh numbers."""

    def draw() -> Tensor:
        return torch.randn(layer.shape).to(layer.dtype).contiguous(memory_format=layer.memory_format)

    tensors = {"x": draw(), "residual": draw(), "dy": draw()}
    exact, found = (tail_pair if layer.norm else pair)(layer, backend, device, tensors)
    complaints = []
    for name, value in exact.items():
        error = ((found[name] - value).abs().max() / value.abs().max()).item()
        if not error <= TOLERANCE[layer.dtype]:
            complaints.append(f"{name} is off by {error:.1e}")
    return complaints


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    gpu_backends.add_arguments(parser)
    args = parser.parse_args()
    device = torch.device(args.device)
    for backend in args.backend:
        reason = gpu_backends.refusal(backend, device)
        if reason is not None:
            print(f"gpu_sanitize: {backend!r} cannot run with --device {device.type}: {reason}", file=sys.stderr)
            return 2
    if device.type == "cuda":
        device = torch.device("cuda", 0)

    torch.manual_seed(0)
    failed = False
    for backend in args.backend:
        layers, variants, missing = (TAIL_BACKENDS if args.op == "tail" else BACKENDS)[backend]
        for layer in layers:
            for way in variants(layer, device):
                gpu_backends.forget_launches(backend, device)
                with way.using():
                    complaints = wrong(layer, backend, device)
                missing = missing - way.met
                failed = failed or bool(complaints)
                print(f"{backend}: {layer}: {way.text}: {', '.join(complaints) or 'ok'}", flush=True)
                counted = gpu_backends.counted_launches(backend, device)
                if counted:
                    print(f"  {', '.join(counted)}")
        if missing:
            print(f"gpu_sanitize: {backend}: not met: {', '.join(sorted(missing))}", file=sys.stderr)
            failed = True
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
