"""Block tails by the Triton kernels: on a GPU where there is one, else in Triton's interpreter.

All fresh memory is NaN, and every case says which kernels it launched. Plans are those of an H200 unless a test brings
its own: the tiles are real ones, only the tensors are small.
"""

from __future__ import annotations

import dataclasses
import math
from collections import Counter

import oracle
import pytest
import tail_oracle
import torch
from gpu_contract import DEVICE, DTYPES, STRATEGIES, name_of, on_device
from gpu_tail_contract import *  # noqa: F403
from gpu_tail_contract import run_on
from tail_oracle import EVERYTHING, PLAIN, Tail, check, draw

from senet_fused.backends import triton as backend
from senet_fused.backends.triton import plan as planner
from senet_fused.call import text_of

pytestmark = [
    pytest.mark.interpreter,
    pytest.mark.skipif(backend.problem(DEVICE) is not None, reason=str(backend.problem(DEVICE))),
    pytest.mark.usefixtures("poisoned"),
]
if backend.problem(DEVICE) is None:
    from test_triton_operator import counted_accesses

    from senet_fused.backends.triton import launch, tail_launch

FORWARD = ("tail_moments_kernel", "tail_excite_kernel", "tail_scale_kernel")
BACKWARD = ("tail_sums_kernel", "tail_excite_backward_kernel", "tail_scale_backward_kernel")
BETWEEN = {"launches": ("excite_gate_kernel", "excite_push_backward_kernel"), "partials": (), "last_block": ()}


def run(case: Tail, inputs: oracle.Tensors) -> oracle.Tensors:
    """y, every gradient and the running statistics by the Triton kernels, with the proof that it was they."""
    launch.launches.clear()
    return run_on("triton", case, inputs)


@pytest.fixture(name="run")
def _run():
    return run


@pytest.fixture
def backend_name():
    return "triton"


@pytest.fixture
def using_strategy():
    def using(case: Tail, strategy: str):
        cases = [case, case.replace(residual=False)]  # the backward may want no gradient of a residual
        return launch.using({p: q for c in cases for p, q in plans_for(c, strategy).items()})

    return using


def problem_of(case: Tail, backward: bool) -> planner.Problem:
    dtype, relu = case.dtype_of("y"), case.post_act == "relu"
    return planner.Problem(
        case.shape[1], case.reduced, math.prod(case.shape[2:]), dtype.itemsize,
        case.dtype_of("w1").itemsize if case.reduced else dtype.itemsize, case.layout == "channels_last", "avg", relu,
        case.residual and (relu or not backward), backward, "batch" if case.training else "given",
    )  # fmt: skip


def plans_for(case: Tail, strategy: str | None = None, **tile: object) -> dict[planner.Problem, planner.Plan]:
    """The plans of a case forward and backward, the cheapest with this strategy, where there is one with it, the tile
    changed."""
    found = {}
    for backward in (False, True):
        problem = problem_of(case, backward)
        facts = launch.device_facts(torch.device(DEVICE, 0) if DEVICE == "cuda" else torch.device("cpu"))
        plans = planner.candidates(problem, facts)
        plan = next((p for p in plans if p.strategy == strategy), plans[0])
        found[problem] = dataclasses.replace(plan, tile=dataclasses.replace(plan.tile, **tile))
    return found


FORMS = {
    "channels_last": Tail((3, 40, 6, 7), 10, torch.bfloat16, "channels_last"),
    "planes": Tail((3, 40, 6, 7), 10, torch.float32),
    "planes of 16-bit pieces": Tail((3, 40, 5, 5), 10, torch.float16),
}


@pytest.mark.core
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("splits", [1, 3])
@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("form", FORMS)
def test_every_strategy_with_every_form_and_splits(form, strategy, splits, training):
    """Several channel blocks, several samples a tile where the form has them, partial tiles on every edge."""
    case = FORMS[form].replace(training=training, **(EVERYTHING if splits == 3 else PLAIN))
    positions = 16 if case.layout == "contiguous" else 4
    chunks = math.ceil(math.prod(case.shape[2:]) / positions)
    steps = math.ceil(chunks / splits)  # no split is empty: it would have no mean
    tile = {"positions": positions, "steps": steps, "splits": math.ceil(chunks / steps), "channels": 32}
    if case.layout == "channels_last":
        tile["samples"] = 2
    with launch.using(plans_for(case, strategy, **tile)):
        check(case, draws=1, ours=run)
        assert launch.launches == Counter([*FORWARD, *BACKWARD, *BETWEEN[strategy]])


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_more_samples_and_channels_than_a_program_takes(strategy, dtype):
    """Groups of samples on the launch between the sweeps, and blocks of channels of the weight gradients."""
    case = Tail((37, 72, 2, 4), 36, dtype, "channels_last", **EVERYTHING)
    with launch.using(plans_for(case, strategy, samples=4)):
        check(case, draws=1, ours=run)


@pytest.mark.parametrize("changes", [{"reversed": False}, {"streaming": False}, {"stages": 2}], ids=str)
@pytest.mark.parametrize("form", FORMS)
def test_options_of_a_plan_change_no_result(form, changes):
    case = FORMS[form].replace(**EVERYTHING)
    plans = plans_for(case)
    inputs = draw(case, 0)
    with launch.using(plans):
        expected = run(case, inputs)
    with launch.using({problem: dataclasses.replace(plan, **changes) for problem, plan in plans.items()}):
        found = run(case, inputs)
    for name in expected:
        assert torch.equal(found[name], expected[name]), name


# ---------------------------------------------------------------------------------------------------- launches, bytes


def launched(case: Tail, *wanted: str) -> Counter[str]:
    """By a forward, and a backward for what is wanted, if anything is."""
    inputs = {k: on_device(t).requires_grad_(k in wanted) for k, t in draw(case, 0).items()}
    launch.launches.clear()
    y = tail_oracle.fused(case, inputs, "triton")
    if wanted:
        y.backward(inputs["dy"])
    return Counter(launch.launches)


@pytest.mark.core
def test_nothing_is_launched_that_is_not_needed():
    gated = FORMS["channels_last"].replace(residual=True, post_act="relu")
    plain = gated.replace(reduced=0)
    for case, wanted, backward in (
        (gated, ("x",), BACKWARD),
        (gated, ("w1",), BACKWARD[:2]),
        (gated, ("residual",), BACKWARD[2:]),
        (plain, ("x",), BACKWARD),
        (plain, ("bias",), BACKWARD[:2]),
        (plain.replace(training=False), ("x",), BACKWARD[2:]),
        (plain.replace(training=False), ("weight", "x"), BACKWARD),
    ):
        forward = FORWARD if case.training or case.reduced else FORWARD[2:]
        assert launched(case) == Counter(forward)
        assert launched(case, *wanted) == Counter([*forward, *backward]), (case, wanted)


@pytest.mark.core
@pytest.mark.skipif(DEVICE == "cuda", reason="loads and stores are counted in the interpreter")
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("reduced", [16, 0])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_counted_bytes_are_those_of_the_plan(layout, reduced, training):
    """Every load and store of a call, forward and backward: the tensor's and the mask's passes exactly as planned, but
    for the first positions of a tile, which the moments look at twice."""
    case = Tail((4, 64, 8, 8), reduced, torch.bfloat16, layout, training, residual=True, post_act="relu")
    plans = plans_for(case)
    inputs = draw(case, 0)
    tensor = math.prod(case.shape) * 2
    names = ("weight", "bias", "running_mean", "running_var", "w1", "b1", "w2", "b2")
    weight, bias, mean, var, *weights = (inputs.get(name) for name in names)
    given = (None, None) if training else (mean, var)
    options = text_of(("batch" if training else "given", "relu", "sigmoid", "avg", "relu", "", ""))
    operators = torch.ops.senet_fused.fused_se_triton, torch.ops.senet_fused.fused_se_triton_backward
    with launch.using(plans):
        for problem, plan in plans.items():
            with counted_accesses() as counted:
                if problem.backward:
                    results = operators[1](
                        inputs["dy"], None, inputs["x"], weight, bias, *weights, None, *kept[1:],  # noqa: F405
                        1e-5, options, True, True, True,
                    )  # fmt: skip
                    large = [inputs["x"], inputs["dy"], results[0], results[-1]]
                else:
                    kept = operators[0](
                        inputs["x"], weight, bias, *given, *weights, inputs["residual"], None, 1e-5, options, True
                    )
                    large = [inputs["x"], inputs["residual"], kept[0]]

            def within(t, kind, counted=counted):
                start = t.untyped_storage().data_ptr()
                end = start + t.untyped_storage().nbytes()
                return sum(size for address, size in counted[kind] if start <= address < end)

            planned = planner.count_bytes(problem, plan.tile, plan.strategy, case.shape[0])
            passes = sum(within(t, kind) for t in large for kind in ("load", "store")) / tensor
            assert planned["tensor"] / tensor == problem.passes
            if training and not problem.backward:
                passes -= 1 / plan.tile.steps
            assert passes == problem.passes
            bits = within(kept[-1], "load") + within(kept[-1], "store")
            assert bits == planned["mask"] == (2 if problem.backward else 1) * tensor // 16


def test_the_passes_are_those_of_the_design():
    """Forward 4 and backward 6 with a residual and ReLU, where PyTorch's own operators make 11 and 18."""
    case = FORMS["channels_last"].replace(residual=True, post_act="relu")
    assert [p.passes for p in plans_for(case)] == [4, 6]


# ---------------------------------------------------------------------------------------------------- planted bugs

# What is passed on to the kernels, changed: the rule has to see it.
PLANTED = {
    "another eps": ("forward", {"eps": 1.02e-3}, "y"),
    "no bias": ("forward", {"bias": None}, "y"),
    "no bias, backward": ("backward", {"bias": None}, "dw1"),
    "no factor, backward": ("backward", {"factor": None}, "dweight"),
    "statistics taken as given": ("backward", {"norm": "given"}, "dx"),
}


PLANTED_IN = Tail((4, 40, 6, 7), 10, torch.float32, "channels_last", **EVERYTHING)


def test_nothing_is_wrong_where_nothing_is_planted():
    check(PLANTED_IN, draws=1, ours=run)


@pytest.mark.core
@pytest.mark.parametrize("name", PLANTED)
def test_the_rule_catches_what_is_planted(monkeypatch, name):
    function, changed, tensor = PLANTED[name]
    fill = getattr(backend, function)
    monkeypatch.setattr(backend, function, lambda call, *others: fill(call._replace(**changed), *others))
    assert tensor in tail_oracle.wrong_tensors(PLANTED_IN, 1, run)


def test_the_rule_catches_another_m(monkeypatch):
    monkeypatch.setattr(tail_launch, "values_per_channel", lambda x: 1.05 * x.numel() / x.shape[1])
    assert "dx" in tail_oracle.wrong_tensors(PLANTED_IN, 1, run)
