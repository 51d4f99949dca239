"""senet-fused tune and the files of plans that it writes: on a GPU where there is one, else in Triton's interpreter."""

from __future__ import annotations

import dataclasses
import itertools
import json
import re

import pytest
import torch

import senet_fused
from senet_fused import cli
from senet_fused.backends import triton as backend
from senet_fused.backends.triton import plan as planner
from senet_fused.backends.triton import tuned
from senet_fused.bench import buffers, providers
from senet_fused.bench.problems import cases, problems
from senet_fused.cli import tune

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
runs = pytest.mark.skipif(backend.problem(DEVICE) is not None, reason=str(backend.problem(DEVICE)))
if backend.problem(DEVICE) is None:
    from senet_fused.backends.triton import launch, tail_launch

H200, MI300 = planner.DeviceFacts("cuda", 90, 132), planner.DeviceFacts("hip", "gfx942", 304, 64)
DTYPES = ("float32", "bfloat16", "float16")
LAYER, DEEP = planner.Problem(256, 16, 3136), planner.Problem(2048, 128, 49, backward=True)
SHAPE, SIZES = "2,16,4,3,5", (2, 16, 3, 5)


@pytest.fixture(autouse=True)
def no_plans(monkeypatch, tmp_path):
    def forget():
        tuned._from_file.cache_clear()
        if backend.problem(DEVICE) is None:
            launch.forget_recipes()

    monkeypatch.delenv(tuned.VARIABLE, raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    forget()
    yield
    forget()


@pytest.fixture
def path(tmp_path):
    return tmp_path / "folder" / "plans.json"


def counted(problem, facts=H200, strategy=None):
    return next(plan for plan in planner.candidates(problem, facts) if strategy in (None, plan.strategy))


def every_problem():
    for network in problems():
        for relu, residual in ((False, False), (True, True)):
            options = {"residual": residual, "post_act": "relu" if relu else "none"}
            for case in cases([network], dtypes=DTYPES, layouts=("contiguous", "channels_last"), **options):
                for backward in (False, True):
                    yield tune.problem_of(case, backward)


# ---------------------------------------------------------------------------------------------------- the file


def test_a_file_gives_back_what_was_written(path):
    plans = {(facts, p): planner.plan(p, facts) for facts in (H200, MI300) for p in (LAYER, DEEP)}
    tuned.write(path, plans, {(H200, LAYER): {"timed": {"us": 1.5}}})
    assert tuned.read(path) == plans
    entries = json.loads(path.read_text())["plans"]
    assert [entry.get("timed") for entry in entries] == [{"us": 1.5}, None, None, None]


def test_merging_keeps_the_others_and_what_is_said_of_them(path):
    first, second = counted(LAYER), counted(LAYER, strategy="launches")
    tuned.merge(path, {(H200, LAYER): first, (H200, DEEP): counted(DEEP)}, {(H200, DEEP): {"timed": "of old"}})
    tuned.merge(path, {(H200, LAYER): second, (MI300, LAYER): first}, {(MI300, LAYER): {"timed": "new"}})
    assert tuned.read(path) == {(H200, LAYER): second, (H200, DEEP): counted(DEEP), (MI300, LAYER): first}
    assert [entry.get("timed") for entry in json.loads(path.read_text())["plans"]] == [None, "of old", "new"]


def test_a_file_appears_whole_or_not_at_all(path, monkeypatch):
    def interrupted(content, file, **options):
        file.write('{"format": 1')
        raise KeyboardInterrupt

    for before in ({}, {(H200, LAYER): counted(LAYER)}):
        if before:
            tuned.write(path, before)
        with monkeypatch.context() as patch:
            patch.setattr(tuned.json, "dump", interrupted)
            with pytest.raises(KeyboardInterrupt):
                tuned.merge(path, {(H200, DEEP): counted(DEEP)})
        assert list(path.parent.iterdir()) == ([path] if before else [])
    assert tuned.read(path) == before


def entry(**changes):
    fields = dataclasses.asdict(counted(LAYER))
    fields["tile"].update(changes)
    return {"device": dataclasses.asdict(H200), "problem": dataclasses.asdict(LAYER), "plan": fields}


def file_of(*entries):
    return json.dumps({"format": 1, "plans": entries})


UNREADABLE = {
    "empty": ("", "Expecting value"),
    "a list": ("[]", ""),
    "no format": ("{}", "'format' is missing"),
    "another format": ('{"format": 2, "plans": []}', "format 2, expected 1"),
    "no plans": ('{"format": 1}', "'plans' is missing"),
    "no device": (file_of({}), "is missing"),
    "an unknown field": (file_of(entry(colour=3)), "colour"),
    "an unknown form": (file_of(entry(form="circles")), "expected a strategy"),
    "a plan that leaves positions out": (file_of(entry(steps=1)), "are not 3136 positions"),
    "text for a number": (file_of(entry(warps="8")), "warps must be a positive integer, got '8'"),
}


@pytest.mark.parametrize("what", UNREADABLE)
def test_a_file_that_cannot_be_read_is_refused_and_left_alone(path, what):
    text, why = UNREADABLE[what]
    path.parent.mkdir()
    path.write_text(text)
    for attempt in (tuned.read, lambda path: tuned.merge(path, {(H200, DEEP): counted(DEEP)})):
        with pytest.raises(ValueError, match="cannot read Triton plans from .*; make the file anew") as caught:
            attempt(path)
        assert why in str(caught.value)
    assert path.read_text() == text


def test_which_file_is_in_use(path, monkeypatch):
    default = tuned.default_path()
    assert default.parts[-3:] == ("cache", "senet_fused", "triton_plans.json") and tuned.path_in_use() is None
    assert tuned.lookup(LAYER, H200) is None
    ours, theirs = counted(LAYER), counted(LAYER, strategy="launches")
    tuned.write(default, {(H200, LAYER): ours})
    assert tuned.path_in_use() == default and tuned.lookup(LAYER, H200) == ours
    assert tuned.lookup(LAYER, MI300) is None and tuned.lookup(DEEP, H200) is None
    monkeypatch.setenv(tuned.VARIABLE, str(path))
    tuned.write(path, {(H200, LAYER): theirs})
    assert tuned.path_in_use() == path and tuned.lookup(LAYER, H200) == theirs
    monkeypatch.setenv(tuned.VARIABLE, "")
    tuned._from_file.cache_clear()
    assert tuned.path_in_use() is None and tuned.lookup(LAYER, H200) is None
    monkeypatch.delenv(tuned.VARIABLE)
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(path.parent))
    assert tuned.default_path() == path.parent / ".cache" / "senet_fused" / "triton_plans.json"


# ---------------------------------------------------------------------------------------------------- contenders


@pytest.mark.interpreter
@pytest.mark.parametrize("facts", [H200, MI300], ids=["cuda", "hip"])
def test_contenders_fit_and_the_default_is_the_first(facts):
    for p in every_problem():
        plans = tune.contenders(p, facts, 24)
        assert plans[0] == planner.plan(p, facts)
        assert len({dataclasses.replace(plan, reason="") for plan in plans}) == len(plans) <= 24
        assert [tuned.misfit(p, plan, facts) for plan in plans] == [None] * len(plans)
        considered = planner.candidates(p, facts)
        assert [tuned.misfit(p, plan, facts) for plan in considered] == [None] * len(considered)
        assert tune.contenders(p, facts, 3) == plans[:3]


def test_variations_change_one_thing():
    changes = [plan.reason for plan in tune.variations(LAYER, counted(LAYER), H200)]
    assert {
        "varied: warps 8 -> 4", "varied: warps 8 -> 16", "varied: streaming off", "varied: reversed off",
        "varied: stages 1 -> 2", "varied: stages 1 -> 3",
    } <= set(changes)  # fmt: skip
    assert sum("positions" in change for change in changes) == 2
    assert sum("splits" in change and "positions" not in change for change in changes) == 2
    rows = counted(dataclasses.replace(DEEP, channels_last=False))
    assert rows.tile.form == "rows"
    changes = [plan.reason for plan in tune.variations(dataclasses.replace(DEEP, channels_last=False), rows, H200)]
    assert changes == [
        f"varied: {change}" for change in ("warps 4 -> 2", "warps 4 -> 8", "streaming off", "reversed off")
    ]


@pytest.mark.parametrize(
    ("plan", "tile", "problem", "why"),
    [
        ({}, {"samples": 3}, {}, "samples must be a power of two"),
        ({}, {"splits": 0}, {}, "splits must be a positive integer"),
        ({}, {"warps": 64}, {}, "more than 1024 threads"),
        ({}, {"samples": 4096}, {}, "a step of more than 128 elements to a thread"),
        ({}, {"splits": 6}, {}, "are not 3136 positions"),
        ({}, {"form": "planes"}, {}, "do not fit channels_last"),
        ({}, {"form": "rows"}, {"channels_last": False}, "the strategy must be 'launches'"),
        ({"strategy": "launches"}, {"form": "rows"}, {"channels_last": False}, "the rows are not those of plan.py"),
        ({}, {}, {"squeeze": "max"}, "the strategy must be 'launches'"),
        ({}, {"channels": 4}, {"relu": True}, "8 elements wide"),
        ({"reversed": 1}, {}, {}, "must be true or false"),
        ({"stages": 0}, {}, {}, "stages must be a positive integer"),
    ],
)  # fmt: skip
def test_what_does_not_fit(plan, tile, problem, why):
    good = counted(LAYER)
    assert good.strategy == "partials" and good.tile.splits != 6
    bad = dataclasses.replace(good, tile=dataclasses.replace(good.tile, **tile), **plan)
    assert why in tuned.misfit(dataclasses.replace(LAYER, **problem), bad, H200)


def test_the_last_block_is_not_for_amd():
    assert "AMD" in tuned.misfit(LAYER, counted(LAYER, strategy="last_block"), dataclasses.replace(H200, vendor="hip"))


# ---------------------------------------------------------------------------------------------------- in use


def call(sizes=SIZES, reduced=4, dtype=torch.bfloat16, layout="channels_last", post_act=None, residual=False):
    """Forward and backward of one layer."""
    torch.manual_seed(0)
    c = sizes[1]
    memory_format = torch.channels_last if layout == "channels_last" else torch.contiguous_format
    x, r, dy = (
        torch.randn(sizes, dtype=dtype, device=DEVICE).contiguous(memory_format=memory_format) for _ in range(3)
    )
    w1, w2 = (torch.randn(size, dtype=dtype, device=DEVICE) for size in ((reduced, c), (c, reduced)))
    tensors = [t.requires_grad_() for t in (x, w1, w2, *([r] if residual else []))]
    y = senet_fused.squeeze_excite(x, w1, w2, residual=r if residual else None, post_act=post_act, backend="triton")
    return torch.autograd.grad(y, tensors, dy)


@runs
def test_the_problem_is_the_one_that_a_call_looks_up(monkeypatch):
    asked = []
    monkeypatch.setattr(launch, "plan_of", lambda problem, facts: asked.append(problem) or planner.plan(problem, facts))
    shapes = ("2,8,2,3,3", "2,1,1,2,3", "1,8,2,1,1", "2,8,3,7,7")
    tails = itertools.cycle([(False, "none"), (True, "none"), (True, "relu"), (False, "relu"), (True, "none")])
    for case in cases([], shapes, dtypes=DTYPES[:2], layouts=("contiguous", "channels_last")):
        residual, post_act = next(tails)
        case = dataclasses.replace(case, residual=residual, post_act=post_act)
        asked.clear()
        launch.forget_recipes()
        dtype, relu = getattr(torch, case.dtype), "relu" if post_act == "relu" else None
        call(case.size, case.shape.rd_channels, dtype, case.layout, relu, residual)
        assert asked == [tune.problem_of(case, backward) for backward in (False, True)], case


@runs
def test_a_call_runs_the_tuned_plan(path, monkeypatch):
    facts = launch.device_facts(torch.device(DEVICE, 0) if DEVICE == "cuda" else torch.device("cpu"))
    problem = planner.Problem(16, 4, 15)
    assert planner.plan(problem, facts).strategy == "partials"
    tuned.write(path, {(facts, problem): counted(problem, facts, "launches")})
    for file, pushes in (("", 0), (str(path), 1)):
        monkeypatch.setenv(tuned.VARIABLE, file)
        tuned._from_file.cache_clear()
        launch.forget_recipes()
        launch.launches.clear()
        call()
        assert launch.launches["squeeze_kernel"] == launch.launches["squeeze_backward_kernel"] == 1
        assert launch.launches["excite_push_kernel"] == launch.launches["excite_gate_kernel"] == pushes
        assert launch.launches["excite_push_backward_kernel"] == 0


@runs
def test_a_call_says_that_the_file_cannot_be_read(path, monkeypatch):
    monkeypatch.setenv(tuned.VARIABLE, str(path))
    with pytest.raises(ValueError, match=f"cannot read Triton plans from {path}: .*No such file.*{tuned.VARIABLE}"):
        call()


# ---------------------------------------------------------------------------------------------------- the command


def tuning(path, *more, shape=SHAPE):
    return cli.main(["tune", "--shape", shape, "--device", DEVICE, "--plans", str(path), *more])


@runs
def test_the_command_end_to_end(path, capsys):
    tuned.write(path, {(MI300, LAYER): counted(LAYER)}, {(MI300, LAYER): {"timed": "elsewhere"}})
    assert tuning(path, "--candidates", "3") == 0
    output = capsys.readouterr()
    lines = output.out.splitlines()
    head = next(line for line in lines if line.startswith("problem"))
    assert head.split() == "problem direction default us best us ratio what changed".split()
    label = "2 x 16/4 @ 3x5 bfloat16 channels_last"
    rows = [line.removeprefix(label).split(maxsplit=4) for line in lines if line.startswith(label)]
    assert [row[0] for row in rows] == ["forward", "backward"]
    for _, default, best, ratio, change in rows:
        assert float(default) >= float(best) > 0 and float(ratio) >= 1.0
        assert (change == "-") == (float(default) == float(best))
    assert f"2 plan(s) written to {path}" in output.out and f"to use it: {tuned.VARIABLE}={path}" in output.out
    assert ("the times mean nothing" in output.out) == (DEVICE == "cpu")
    assert "[2/2] " + label + " backward" in output.err

    assert {problem.backward for _, problem in tuned.read(path)} == {False, True} and len(tuned.read(path)) == 3
    first, *ours = json.loads(path.read_text())["plans"]
    assert first["timed"] == "elsewhere"
    for new in ours:
        assert set(new["timed"]) == {"on", "layer", "us", "default_us", "torch", "triton", "date"}
        assert new["plan"]["reason"].startswith("timed on ") and new["timed"]["torch"] == torch.__version__


# ---------------------------------------------------------------------------------------------------- block tails


def test_the_problem_of_a_tail_says_whose_statistics_it_takes():
    for direction, norm in (("forward", "batch"), ("backward", "batch"), ("eval-forward", "given")):
        (case,) = cases([], [SHAPE], op="tail", directions=[direction])
        for backward in (False, True):
            problem = tune.problem_of(case, backward)
            assert (problem.norm, problem.relu, problem.residual, problem.backward) == (norm, True, True, backward)
            native = tune.cuda_problem(3, problem)
            assert (native.n, native.norm, native.channels, native.backward) == (3, norm, 16, backward)
    (case,) = cases([], [SHAPE])
    assert tune.problem_of(case, False).norm == ""


@runs
def test_tails_are_tuned(path, capsys):
    assert tuning(path, "--op", "tail", "--candidates", "2", "--dtype", "float32") == 0
    output = capsys.readouterr()
    assert "2 x 16/4 @ 3x5 float32 channels_last tail  backward " in output.out
    found = tuned.read(path)
    assert {(problem.norm, problem.backward) for _, problem in found} == {("batch", False), ("batch", True)}
    assert all(problem.relu and problem.residual for _, problem in found)


@runs
@pytest.mark.parametrize(
    ("direction", "number", "name"),
    [("forward", "y", "y"), ("forward", "statistics", "dx"), ("backward", "dweight", "dweight")],
)
def test_a_wrong_default_plan_of_a_tail_is_an_error(path, monkeypatch, capsys, direction, number, name):
    real = getattr(tail_launch, direction)

    def wrong(call, results, channels_last):
        real(call, results, channels_last)
        getattr(results, number).mul_(1.02)

    monkeypatch.setattr(tail_launch, direction, wrong)
    argv = ("--op", "tail", "--dtype", "float32", "--candidates", "1", "--direction", direction)
    assert tuning(path, *argv) == 1
    assert f"ERROR RuntimeError: the default plan is wrong: {name} is off by" in capsys.readouterr().out


@runs
def test_the_problem_of_a_tail_is_the_one_that_is_timed(monkeypatch):
    asked = []
    monkeypatch.setattr(launch, "plan_of", lambda problem, facts: asked.append(problem) or planner.plan(problem, facts))
    shapes = ("2,8,2,3,3", "2,8,3,7,7")
    options = {"dtypes": DTYPES[:2], "layouts": ("contiguous", "channels_last"), "directions": ["forward+backward"]}
    for case in cases([], shapes, op="tail", **options):
        asked.clear()
        weights = buffers.make_weights(case, torch.device(DEVICE))
        with launch.using({}):
            inputs = buffers.check_inputs(case, weights, torch.device(DEVICE))
            providers.results(tune._provider(case, weights), case, inputs)
        assert asked == [tune.problem_of(case, backward) for backward in (False, True)], case


@pytest.mark.interpreter
@runs
def test_what_is_tuned_is_in_use_at_once(path, monkeypatch, capsys):
    def times(self, case, problem, plans):
        return {plan: 1.0 if plan.strategy == "launches" else 2.0 for plan in plans}

    monkeypatch.setenv(tuned.VARIABLE, str(path))
    monkeypatch.setattr(tune._Tuner, "times", times)
    tuned.write(path, {})
    call()
    launch.launches.clear()
    argv = ["tune", "--shape", SHAPE, "--device", DEVICE, "--direction", "forward"]
    assert cli.main(argv + (["--plans", str(path)] if DEVICE == "cpu" else [])) == 0
    assert "partials -> launches" in capsys.readouterr().out
    launch.launches.clear()
    call()
    assert launch.launches["excite_gate_kernel"] == 1 and launch.launches["excite_backward_kernel"] == 0


@runs
@pytest.mark.parametrize(("gain", "replaced"), [(0.019, False), (0.021, True)])
def test_a_plan_has_to_be_faster_by_two_percent(path, monkeypatch, gain, replaced):
    monkeypatch.setattr(tune._Tuner, "right", lambda self, case, problem, plans: plans)
    monkeypatch.setattr(
        tune._Tuner, "times", lambda self, case, problem, plans: {p: 1 - gain * (p != plans[0]) for p in plans}
    )
    assert tuning(path, "--direction", "backward", "--candidates", "2") == 0
    (((facts, problem), plan),) = tuned.read(path).items()
    default, other = tune.contenders(problem, facts, 2)
    assert dataclasses.replace(plan, reason="") == dataclasses.replace(other if replaced else default, reason="")


@runs
@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_wrong_and_failing_plans_are_left_out(path, monkeypatch, capsys, direction):
    """A result that is a little off, one that is never written, and an exception."""
    real = getattr(launch, direction)

    def launched(*arguments):
        plan = next((p for p in tuned._overridden.values() if p.reason != "default"), None)
        backward = direction == "backward"
        strategy = plan.strategy if plan and any(p.backward == backward for p in tuned._overridden) else "partials"
        if strategy == "last_block":
            raise RuntimeError("out of resource: shared memory")
        if plan is not None and plan.tile.warps == 4:
            return
        real(*arguments)
        if strategy == "launches":
            _, results, _ = arguments
            (results.dw1 if backward else results.gate).mul_(1.01)

    monkeypatch.setattr(launch, direction, launched)
    wanted = ("partials", "last_block", "launches", "warps")

    def few(p, facts, at_most):
        default = planner.plan(p, facts)
        assert default.strategy == "partials" and default.tile.warps == 8
        fewer = dataclasses.replace(default, tile=dataclasses.replace(default.tile, warps=4))
        return [default, *(counted(p, facts, strategy) for strategy in wanted[1:3]), fewer]

    monkeypatch.setattr(tune, "contenders", few)
    seen = []

    def times(self, case, problem, plans):
        seen.extend(plans)
        return dict.fromkeys(plans, 1.0)

    monkeypatch.setattr(tune._Tuner, "times", times)
    assert tuning(path, "--direction", direction) == 0
    assert [(plan.strategy, plan.tile.warps) for plan in seen] == [("partials", 8)]
    error = capsys.readouterr().err
    assert "left out (partials -> last_block): RuntimeError: out of resource: shared memory" in error
    name = {"forward": "dx", "backward": "dw1"}[direction]  # the gate that a forward keeps is for the backward
    assert f"left out (partials -> launches): {name} is off by 1" in error
    assert "left out (warps 8 -> 4): " in error and "is off by inf" in error
    assert [plan.strategy for plan in tuned.read(path).values()] == ["partials"]


@runs
def test_a_layer_whose_default_plan_is_wrong_is_an_error_and_not_kept(path, monkeypatch, capsys):
    real = launch.backward

    def wrong(call, gradients, channels_last):
        real(call, gradients, channels_last)
        if call.x.shape[1] == 16:
            gradients.dx.mul_(1.02)

    monkeypatch.setattr(launch, "backward", wrong)
    assert tuning(path, "--candidates", "1", "--shape", "2,8,2,3,3") == 1
    output = capsys.readouterr().out
    wrong = re.findall(r"2 x 16/4 @ 3x5 .*  (\w+) +ERROR RuntimeError: the default plan is wrong: dx is off by", output)
    assert wrong == ["forward", "backward"]
    assert [(problem.channels, problem.backward) for _, problem in tuned.read(path)] == [(8, False), (8, True)]


@runs
def test_one_problem_is_tuned_once(path, monkeypatch):
    tasks = []

    def nothing(self, case, problem):
        tasks.append(case)
        return counted(problem), counted(problem), 1.0, 1.0

    monkeypatch.setattr(tune._Tuner, "tune", nothing)
    assert tuning(path, "--dtype", "bfloat16", "float16", "float32", "--residual") == 0
    assert [(case.dtype, case.direction) for case in tasks] == [
        (dtype, direction) for dtype in ("bfloat16", "float32") for direction in ("forward", "backward")
    ]
    tasks.clear()
    assert cli.main(["tune", "--device", DEVICE, "--plans", str(path), "--direction", "forward"]) == 0
    assert [case.label for case in tasks][:1] == ["64 x 256/16 @ 56x56"] and len(tasks) == 4


@pytest.mark.parametrize(
    ("argv", "why"),
    [
        (["--problem", "senet155"], "unknown problem 'senet155'"),
        (["--shape", "1,2,3"], "cannot read the shape '1,2,3'"),
        (["--shape", "8,16,2,9"], "a 1-D shape is contiguous only"),
        (["--shape", "8,16,2,9,9", "4,16,2,9,9"], "8 x 16/2 @ 9x9 and 4 x 16/2 @ 9x9 are one problem"),
        (["--plans", "/"], "cannot write /: it is a folder"),
        (["--plans", "/dev/null/plans.json"], "cannot write /dev/null/plans.json: "),
        (["--plans", __file__], f"cannot read Triton plans from {__file__}"),
    ],
)
def test_a_request_that_cannot_be_met_exits_with_2_before_timing(argv, why, capsys, monkeypatch, path):
    monkeypatch.setattr(tune._Tuner, "tune", lambda *arguments: pytest.fail("the tuning has started"))
    if "--plans" in argv and backend.problem(DEVICE) is not None:
        pytest.skip(backend.problem(DEVICE))
    assert cli.main(["tune", "--device", DEVICE, "--plans", str(path), *argv]) == 2
    output = capsys.readouterr()
    assert output.err.startswith("senet-fused tune: error: ") and why in output.err and output.out == ""


def test_a_device_that_is_not_there_is_refused(monkeypatch, capsys):
    monkeypatch.setattr(backend, "problem", lambda device_type="cuda": f"no {device_type} here")
    for device in ("cuda", "cpu"):
        assert cli.main(["tune", "--device", device]) == 2
        assert f"senet-fused tune: error: --device {device}: no {device} here" in capsys.readouterr().err


@runs
@pytest.mark.skipif(DEVICE == "cuda", reason="it is about the interpreter")
def test_the_interpreter_writes_only_where_it_is_told_to(capsys):
    assert cli.main(["tune", "--shape", SHAPE, "--device", "cpu"]) == 2
    assert "name a file that is not in use with --plans FILE" in capsys.readouterr().err
    assert not tuned.default_path().exists()
