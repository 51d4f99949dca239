"""The plans of Triton's block tails, for tests that bring their own. Imports triton."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import math

import torch
from gpu_contract import DEVICE
from oracle import LAYOUTS
from tail_oracle import Tail

from senet_fused.backends.triton import launch
from senet_fused.backends.triton import plan as planner
from senet_fused.ops import is_channels_last


def problems_of(case: Tail) -> set[planner.Problem]:
    """Of its calls, forward and backward, with a gradient of the residual and without."""
    dtype = torch.promote_types(case.dtype, case.dtype_of("residual")) if case.residual else case.dtype
    weight = case.dtype_of("w1") if case.reduced else dtype
    x = LAYOUTS[case.layout](torch.empty(min(case.shape[0], 2), *case.shape[1:], dtype=torch.bool))
    relu = case.post_act == "relu"
    return {
        planner.Problem(
            case.shape[1], case.reduced, math.prod(case.shape[2:]), dtype.itemsize, weight.itemsize,
            is_channels_last(x), "avg", relu, residual and (relu or not backward), backward,
            "batch" if case.training else "given",
        )
        for backward, residual in itertools.product((False, True), {case.residual, False})
    }  # fmt: skip


def plans_for(case: Tail, strategy: str | None = None, **tile: object) -> dict[planner.Problem, planner.Plan]:
    """For launch.using: the cheapest with this strategy where there is one, else the cheapest; the tile changed."""
    facts = launch.device_facts(torch.device(DEVICE, 0) if DEVICE == "cuda" else torch.device("cpu"))
    found = {}
    for problem in problems_of(case):
        plans = planner.candidates(problem, facts)
        plan = next((p for p in plans if p.strategy == strategy), plans[0])
        found[problem] = dataclasses.replace(plan, tile=dataclasses.replace(plan.tile, **tile))
    return found


def using_plans(case: Tail, strategy: str) -> contextlib.AbstractContextManager[None]:
    """What the fixture `using_strategy` of the contracts is for Triton."""
    return launch.using(plans_for(case, strategy))
