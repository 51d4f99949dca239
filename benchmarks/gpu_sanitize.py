"""Runs the fused layer once, forward and backward, with every strategy and form of tile that the Triton plans know.

    compute-sanitizer --tool memcheck python benchmarks/gpu_sanitize.py
    TRITON_INTERPRET=1 python benchmarks/gpu_sanitize.py --device cpu      in Triton's interpreter

The tensors are small and their sizes no multiples of anything, so that every mask has something to hide. y and all
gradients are held against float64 on the CPU. Exit status: 0 all right, 1 a result is wrong or a strategy or form was
not met, 2 the kernels cannot run here.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import sys
from collections.abc import Iterator

import torch
from torch import Tensor

from senet_fused import FusedSE
from senet_fused.backends import triton as backend
from senet_fused.backends.triton import plan as planner

# Of the largest element; rounding gives half of it at most.
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 2e-2}


@dataclasses.dataclass(frozen=True)
class Layer:
    """One layer and its input."""

    shape: tuple[int, ...]
    reduced: int
    dtype: torch.dtype
    channels_last: bool
    squeeze: str = "avg"
    tail: bool = False  # + residual, ReLU
    split: bool = False  # two programs to a plane, however small it is

    def __str__(self) -> str:
        n, c, *spatial = self.shape
        parts = [
            f"{n} x {c}/{self.reduced} @ {'x'.join(map(str, spatial))}",
            str(self.dtype).removeprefix("torch."),
            "channels_last" if self.channels_last else "contiguous",
        ]
        parts += [self.squeeze] if self.squeeze != "avg" else []
        return " ".join(parts + ["+ residual, relu"] * self.tail)

    def problem(self, backward: bool) -> planner.Problem:
        _, c, *spatial = self.shape
        size = self.dtype.itemsize
        return planner.Problem(
            c, self.reduced, math.prod(spatial), size, size, self.channels_last, self.squeeze, self.tail, self.tail,
            backward,
        )  # fmt: skip


LAYERS = (
    Layer((3, 40, 7, 7), 12, torch.bfloat16, False),  # rows
    Layer((3, 37, 5, 9), 11, torch.float32, False),
    Layer((3, 37, 5, 9), 11, torch.bfloat16, True),
    Layer((3, 44, 4, 8), 11, torch.float32, True, tail=True),
    Layer((3, 37, 5, 9), 11, torch.bfloat16, False, squeeze="max"),
    Layer((2, 64, 17, 19), 9, torch.bfloat16, True, split=True),
    Layer((2, 19, 13, 11), 5, torch.float32, False, split=True),
)


def split(plan: planner.Plan, positions: int) -> planner.Plan:
    """The plan with two splits of a plane, if that is more than one step."""
    chunks = -(-positions // plan.tile.positions)
    steps = -(-chunks // 2)
    tile = dataclasses.replace(plan.tile, steps=steps, splits=-(-chunks // steps))
    return dataclasses.replace(plan, tile=tile)


def variants(layer: Layer, facts: planner.DeviceFacts) -> Iterator[dict[planner.Problem, planner.Plan]]:
    """The cheapest plan of each strategy, forward and backward."""
    problems = [layer.problem(backward) for backward in (False, True)]
    plans = [planner.candidates(problem, facts) for problem in problems]
    for strategy in planner.STRATEGIES:
        found = [next((plan for plan in each if plan.strategy == strategy), None) for each in plans]
        if layer.split:
            found = [plan and split(plan, math.prod(layer.shape[2:])) for plan in found]
        if all(found):
            yield dict(zip(problems, found, strict=True))


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


def wrong(layer: Layer, device: torch.device) -> list[str]:
    """What is off in one run, on fresh numbers."""
    form = torch.channels_last if layer.channels_last else torch.contiguous_format

    def draw() -> Tensor:
        return torch.randn(layer.shape).to(layer.dtype).contiguous(memory_format=form)

    tensors = {"x": draw(), "residual": draw(), "dy": draw()}
    options = {"rd_channels": layer.reduced, "bias": True, "squeeze": layer.squeeze}
    options["post_act"] = "relu" if layer.tail else None
    module = FusedSE(layer.shape[1], **options, backend="triton", dtype=layer.dtype)
    double = FusedSE(layer.shape[1], **options, backend="reference", dtype=torch.float64)
    double.load_state_dict(module.state_dict())
    exact = results(layer, double, {name: t.double() for name, t in tensors.items()})
    found = results(layer, module.to(device), {name: t.to(device) for name, t in tensors.items()})
    complaints = []
    for name, value in exact.items():
        error = ((found[name] - value).abs().max() / value.abs().max()).item()
        if not error <= TOLERANCE[layer.dtype]:
            complaints.append(f"{name} is off by {error:.1e}")
    return complaints


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    device = torch.device(parser.parse_args().device)
    reason = backend.problem(device.type)
    if reason is not None:
        print(f"gpu_sanitize: {reason}", file=sys.stderr)
        return 2
    from senet_fused.backends.triton import launch

    torch.manual_seed(0)
    met, failed = set(), False
    for layer in LAYERS:
        for plans in variants(layer, launch.device_facts(device)):
            forward, backward = plans.values()
            launch.launches.clear()
            with launch.using(plans):
                complaints = wrong(layer, device)
            met |= {(plan.strategy, plan.tile.form) for plan in plans.values()}
            failed = failed or bool(complaints)
            tile = f"{forward.tile.form}, {forward.tile.splits} and {backward.tile.splits} splits"
            print(f"{layer}: {forward.strategy}, {tile}: {', '.join(complaints) or 'ok'}", flush=True)
            print(f"  {', '.join(launch.launches)}")
    missing = {*planner.STRATEGIES, *planner.FORMS} - {name for pair in met for name in pair}
    if missing:
        print(f"gpu_sanitize: not met: {', '.join(sorted(missing))}", file=sys.stderr)
    return 1 if failed or missing else 0


if __name__ == "__main__":
    sys.exit(main())
