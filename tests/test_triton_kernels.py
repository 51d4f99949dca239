"""The Triton kernels against the float64 oracle: on a GPU where there is one, else in Triton's interpreter.

All fresh memory is NaN, and every case says which kernels it launched. Plans are those of an H200 unless a test brings
its own: the tiles are real ones, only the tensors are small.
"""

from __future__ import annotations

import dataclasses
import math
from collections import Counter

import oracle
import pytest
import torch
from gpu_contract import *  # noqa: F403
from gpu_contract import DEVICE, KINDS, STRATEGIES, name_of, option_cases
from oracle import ACTS, Case, check, draw

from senet_fused.backends import triton as backend
from senet_fused.backends.triton import plan as planner

pytestmark = [
    pytest.mark.interpreter,
    pytest.mark.skipif(backend.problem(DEVICE) is not None, reason=str(backend.problem(DEVICE))),
    pytest.mark.usefixtures("poisoned"),
]
if backend.problem(DEVICE) is None:
    from senet_fused.backends.triton import launch

BETWEEN = {"launches": ("excite_push_kernel", "excite_gate_kernel"), "partials": (), "last_block": ()}
BETWEEN_BACKWARD = {
    "launches": ("excite_push_backward_kernel", "excite_backward_kernel"),
    "partials": (),
    "last_block": (),
}


def run(case: Case, inputs: oracle.Tensors) -> oracle.Tensors:
    """y, gate and every gradient by the Triton kernels, with the proof that it was they."""
    launch.launches.clear()
    return oracle.run_on("triton", DEVICE, case, inputs)


@pytest.fixture(name="run")
def _run():
    return run


@pytest.fixture
def backend_name():
    return "triton"


def problem_of(case: Case, backward: bool) -> planner.Problem:
    dtype = torch.promote_types(case.dtype, case.dtype_of("residual")) if case.residual else case.dtype
    weight = case.dtype_of("w1")
    relu = case.post_act == "relu"
    return planner.Problem(
        case.shape[1], case.reduced, math.prod(case.shape[2:]), dtype.itemsize, weight.itemsize,
        case.layout == "channels_last", case.squeeze, relu, case.residual and (relu or not backward), backward,
    )  # fmt: skip


def plans_for(
    case: Case, strategy: str | None = None, default: str | None = None, **tile: object
) -> dict[planner.Problem, planner.Plan]:
    """The plans of a case forward and backward, the cheapest with this strategy (or else with the default one), the
    tile changed."""
    found = {}
    for backward in (False, True):
        problem = problem_of(case, backward)
        facts = launch.device_facts(torch.device(DEVICE, 0) if DEVICE == "cuda" else torch.device("cpu"))
        plans = planner.candidates(problem, facts)
        plan = next(p for wanted in (strategy, default) for p in plans if wanted in (None, p.strategy))
        found[problem] = dataclasses.replace(plan, tile=dataclasses.replace(plan.tile, **tile))
    return found


def launched(*names: str) -> Counter[str]:
    return Counter(names)


SWEEPS = ("squeeze_kernel", "scale_kernel", "squeeze_backward_kernel", "scale_backward_kernel")


def test_fresh_memory_is_poisoned():
    assert torch.empty(5, device=DEVICE).isnan().all()


# ---------------------------------------------------------------------------------------------------- options


@pytest.mark.parametrize("act", ACTS)
def test_options(act):
    for case, strategy in option_cases(act):
        plans = plans_for(case, strategy, default="launches")
        with launch.using(plans):
            check(case, draws=1, ours=run)


# ---------------------------------------------------------------------------------------------------- strategies

FORMS = {name: case for name, case in KINDS.items() if name != "planes of 49"}


@pytest.mark.core
@pytest.mark.parametrize("post_act", [None, "relu"])
@pytest.mark.parametrize("splits", [1, 3])
@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("form", FORMS)
def test_every_strategy_with_every_form_and_splits(form, strategy, splits, post_act):
    """Several channel blocks, several samples a tile where the form has them, partial tiles on every edge."""
    case = FORMS[form].replace(residual=post_act is not None)
    if post_act is not None:
        case = case.replace(post_act=post_act)
    positions = 16 if case.layout == "contiguous" else 4
    steps = math.ceil(math.prod(case.shape[2:]) / positions / splits)
    tile = {"positions": positions, "steps": steps, "splits": splits, "channels": 32}
    if case.layout == "channels_last":
        tile["samples"] = 2
    with launch.using(plans_for(case, strategy, **tile)):
        check(case, draws=1, ours=run)
        assert launch.launches == launched(*SWEEPS, *BETWEEN[strategy], *BETWEEN_BACKWARD[strategy])


@pytest.mark.parametrize("squeeze", ["max", "avgmax"])
@pytest.mark.parametrize("form", FORMS)
def test_maxima_of_several_splits(form, squeeze):
    case = FORMS[form].replace(squeeze=squeeze)
    positions = 16 if case.layout == "contiguous" else 4
    steps = math.ceil(math.prod(case.shape[2:]) / positions / 2)
    with launch.using(plans_for(case, positions=positions, steps=steps, splits=2)):
        check(case, draws=1, ours=run)


@pytest.mark.core
@pytest.mark.parametrize("changes", [{"reversed": False}, {"streaming": False}, {"stages": 2}], ids=str)
@pytest.mark.parametrize("form", FORMS)
def test_options_of_a_plan_change_no_result(form, changes):
    case = FORMS[form]
    plans = plans_for(case)
    inputs = draw(case, 0)
    with launch.using(plans):
        expected = run(case, inputs)
    with launch.using({problem: dataclasses.replace(plan, **changes) for problem, plan in plans.items()}):
        found = run(case, inputs)
    for name in expected:
        assert torch.equal(found[name], expected[name]), name


ROWS = [((3, 64, 7, 7), 8), ((2, 24, 14, 14), 5), ((2, 136, 7, 7), 20), ((2, 12, 6, 7), 3), ((1, 264, 5, 5), 9)]


@pytest.mark.core
@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=name_of)
@pytest.mark.parametrize(("shape", "reduced"), ROWS, ids=name_of)
def test_rows_of_planes(shape, reduced, dtype, residual):
    case = Case(shape, reduced, dtype, residual=residual, through="both", act="silu")
    check(case, draws=1, ours=run)
    scales = ["rows_scale_kernel"] * 2
    assert launch.launches == launched(
        "rows_squeeze_kernel", "rows_squeeze_backward_kernel", *scales, *BETWEEN["launches"],
        *BETWEEN_BACKWARD["launches"],
    )  # fmt: skip
