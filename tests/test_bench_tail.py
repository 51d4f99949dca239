"""senet-fused bench --op tail: block tails in the microbenchmark. No test asserts on a measured time."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch
from bench_rows import by_provider, failed_row, layer_row, save
from test_bench import CPU, measure
from torch.nn import functional as F

import senet_fused
from senet_fused import backends, cli, reference
from senet_fused.accuracy import relative_error
from senet_fused.arguments import RequestError
from senet_fused.bench import buffers, compare, oracle, plot, problems, providers, report, runner, saved
from senet_fused.bench.problems import TAIL_DIRECTIONS, Case, Shape

NO_KERNELS = pytest.mark.skipif(
    senet_fused.explain(torch.empty(1, 1, 1, 1), backend="auto").backend == "reference", reason="no CPU kernels"
)


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)


def tail_case(**changes) -> Case:
    case = Case("shape", 3, Shape(24, 5, (7, 9)), direction="forward+backward", residual=True, post_act="relu",
                op="tail")  # fmt: skip
    return dataclasses.replace(case, **changes)


def inputs_of(case, draw=0):
    weights = buffers.make_weights(case, CPU)
    return weights, buffers.check_inputs(case, weights, CPU, draw)


# ------------------------------------------------------------------------------------------- cases and inputs


def test_a_tail_always_has_its_residual_and_its_relu():
    found = problems.cases(["senet154"], op="tail", directions=TAIL_DIRECTIONS)
    assert {(case.op, case.residual, case.post_act) for case in found} == {("tail", True, "relu")}
    assert [case.training for case in found[:4]] == [True, True, True, False]
    assert [case.keeps_graph for case in found[:4]] == [False, True, False, False]
    assert {case.op for case in problems.cases(["senet154"])} == {"se"}


@pytest.mark.parametrize(("direction", "passes"), list(zip(TAIL_DIRECTIONS, (4, 6, 10, 3), strict=True)))
def test_the_byte_model_counts_two_sweeps_each_way(direction, passes):
    assert tail_case(direction=direction).passes == passes


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        ({"op": "head"}, "unknown op 'head'; known: se, tail"),
        ({"directions": ["eval-forward"]}, "unknown direction 'eval-forward'"),
        ({"op": "tail", "shapes": ["1,8,2,1,1"]}, "more than one value per channel"),
    ],
)
def test_a_request_that_cannot_be_met_says_why(request_, message):
    with pytest.raises(RequestError, match=message):
        problems.cases(**request_)
    assert problems.cases(shapes=["1,8,2,1,1"], op="tail", directions=["eval-forward"])


@pytest.mark.parametrize("direction", TAIL_DIRECTIONS)
@pytest.mark.parametrize(("dtype", "batch", "draw"), [("float32", 3, 0), ("bfloat16", 3, 2), ("float32", 1, 1)])
def test_judged_inputs_stay_clear_of_every_kink_behind_the_batchnorm(direction, dtype, batch, draw):
    case = tail_case(direction=direction, dtype=dtype, batch=batch)
    weights, inputs = inputs_of(case, draw)
    double, x = oracle.in_double(weights), inputs.x.detach().double()
    z = F.batch_norm(x, double.mean.clone(), double.var.clone(), double.weight, double.bias, case.training)
    preact = z.mean((2, 3)) @ double.w1.T + double.b1
    assert 0.4 < preact.abs().min() and preact.abs().max() < 1.6
    assert (oracle.oracle_branch(case, x, double) + inputs.residual.detach()).abs().min() > 0.2
    assert weights.weight.dtype == weights.var.dtype == torch.float32 and weights.w1.dtype == inputs.x.dtype
    moved = (double.mean - weights.mean).abs().min() > 0, (double.var - weights.var).abs().min() > 0
    assert moved == (case.training, case.training)
    assert weights.weight.min() < 0 < weights.weight.max()


@pytest.mark.parametrize("direction", TAIL_DIRECTIONS)
@pytest.mark.parametrize("spatial", [(9,), (7, 9), (3, 5, 7)])
def test_the_oracle_and_both_stock_forms_are_the_reference(direction, spatial):
    case = tail_case(dtype="float64", shape=Shape(24, 5, spatial), direction=direction, act="silu", gate="tanh")
    weights, inputs = inputs_of(case)
    exact = oracle.oracle(case, inputs, weights)
    x, residual = inputs.x.detach(), inputs.residual.detach()
    mean, var = (None, None) if case.training else (weights.mean, weights.var)
    rest = (x, weights.weight, weights.bias, mean, var, weights.w1, weights.b1, weights.w2, weights.b2)
    how = dict(act="silu", gate="tanh", residual=residual, post_act="relu")
    y, statistics = reference.block_tail(*rest, **how)
    wanted = reference.block_tail_backward(inputs.dy, *rest, **how)._asdict() | {"y": y}
    for name, before, now in (("mean", weights.mean, statistics[0]), ("var", weights.var, statistics[2])):
        wanted[f"running_{name}"] = 0.9 * before + 0.1 * now if case.training else before
    assert set(exact) == set(wanted)
    assert all(relative_error(wanted[name], exact[name]) < 1e-12 for name in exact)
    for form in providers.STOCK_FORMS:
        results = providers.results(providers.eager(case, weights, form), case, inputs)
        names = set(exact) if case.backward else {"y", "running_mean", "running_var"}
        assert set(results) == names
        assert all(relative_error(results[name], exact[name]) < 1e-13 for name in names)


# ------------------------------------------------------------------------------------------- judgement, the runner


@pytest.mark.parametrize("name", ["y", "dx", "dresidual", "dw1", "dweight", "dbias", "running_mean", "running_var"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_one_wrong_element_of_any_tensor_is_found(name, dtype):
    case = tail_case(dtype=dtype)
    weights, inputs = inputs_of(case)
    exact = oracle.oracle(case, inputs, weights)
    results = providers.results(providers.eager(case, weights, "linear"), case, inputs)
    errors = {key: relative_error(tensor, exact[key]) for key, tensor in results.items()}

    def plain():
        return oracle.oracle(case, inputs, weights)

    assert oracle.judge(case, results, exact, errors, plain, True).wrong is None
    share = 1e-4 if results[name].dtype == torch.float32 and "d" not in name[:1] else 0.1
    results[name] = results[name].clone()
    results[name].view(-1)[-1] += share * results[name].abs().max()
    wrong = oracle.judge(case, results, exact, errors, plain, True).wrong
    assert wrong.startswith(f"wrong output: {name} is off by") and ";" not in wrong
    results[name] = results[name].double()
    assert "float64, expected" in oracle.judge(case, results, exact, errors, plain, True).wrong


@pytest.mark.networks
@pytest.mark.parametrize("direction", TAIL_DIRECTIONS)
@pytest.mark.parametrize("layout", problems.LAYOUTS)
def test_rows_hold_what_was_measured(direction, layout):
    case = tail_case(direction=direction, layout=layout)
    eager, fused, copy = rows = measure([case], backend="reference")
    for row in rows:
        assert (row["op"], row["error"], row["direction"], row["layout"]) == ("tail", None, direction, layout)
        assert row["passes"] == (2 if row is copy else case.passes) and row["median_s"] > 0
        assert row["gbps"] == pytest.approx(row["passes"] * 3 * 24 * 63 * 4 / row["median_s"] / 1e9)
        assert row["speedup_vs_eager"] == pytest.approx(eager["median_s"] / row["median_s"])
    assert (eager["backend"], fused["backend"], copy["backend"]) == ("aten", "reference", "aten")
    assert eager["form"] in providers.STOCK_FORMS and 0 < fused["max_error"] < 1e-5


@pytest.mark.networks
@NO_KERNELS
def test_every_dtype_and_direction_is_measured_on_the_kernels():
    cases = [
        tail_case(dtype=dtype, direction=direction, bias=dtype != "float32")
        for dtype in problems.DTYPES
        for direction in TAIL_DIRECTIONS
    ]
    rows = measure(cases, backend="cpu")
    assert [row["error"] for row in rows] == [None] * len(cases) * 3
    assert {row["backend"] for row in rows if row["provider"] == "fused"} == {"cpu"}


@pytest.mark.networks
def test_the_oracle_is_shared_by_what_is_trained():
    made = []
    with pytest.MonkeyPatch.context() as patch:
        real = runner.make_judge
        patch.setattr(runner, "make_judge", lambda case, *rest: made.append(case.direction) or real(case, *rest))
        rows = measure(problems.cases(shapes=["3,8,2,5,5"], op="tail", directions=TAIL_DIRECTIONS), backend="reference")
    assert len(made) == 2 and not any(row["error"] for row in rows)


def wrong_tail(what):
    """block_tail with one of its results a little off."""
    real = senet_fused.block_tail

    def block_tail(x, mean, var, weight, bias, **options):
        if what == "no update":
            mean, var = mean.clone(), var.clone()
        if what == "dweight":
            weight = weight + 0.001 * (weight - weight.detach())
        y = real(x, mean, var, weight, bias, **options)
        if what == "var":
            var.mul_(1.0001)
        if what == "y":
            return y * 1.001
        return y + 0.001 * (y - y.detach()) if what == "dy" else y

    return block_tail


@pytest.mark.networks
@pytest.mark.parametrize(
    ("what", "direction", "found"),
    [
        ("y", "forward", "y is off"),
        ("y", "eval-forward", "y is off"),
        ("dy", "forward+backward", "dx is off"),
        ("dweight", "forward+backward", "dweight is off"),
        ("no update", "forward", "running_mean is off"),
        ("var", "forward+backward", "running_var is off"),
        ("var", "eval-forward", "running_var is off"),
        ("dy", "forward", None),
    ],
)
def test_a_wrong_tail_gets_an_error_and_no_time(monkeypatch, what, direction, found):
    monkeypatch.setattr(senet_fused, "block_tail", wrong_tail(what))
    rows = by_provider(measure([tail_case(direction=direction)], backend="reference"))
    assert rows["eager"]["error"] is rows["copy"]["error"] is None
    fused = rows["fused"]
    if found is None:
        assert fused["error"] is None and fused["median_s"] > 0
        return
    assert fused["error"].startswith("wrong output: ") and found in fused["error"]
    for key in ("median_s", "iqr_s", "speedup_vs_eager", "copies", "gbps", "fraction_of_copy", "backend"):
        assert fused[key] is None


def test_another_operator_than_the_tails_is_no_proof(monkeypatch):
    snapshots = iter([{}, {"cpu.forward": 1, "cpu.backward": 1}])
    monkeypatch.setattr(senet_fused, "call_counts", lambda: next(snapshots))
    row = by_provider(measure([tail_case()]))["fused"]
    assert row["error"] == "RuntimeError: the backend 'cpu' counted no forward call"


@pytest.mark.networks
@NO_KERNELS
@pytest.mark.parametrize("direction", TAIL_DIRECTIONS)
def test_what_is_compiled_and_by_which_rule_it_is_judged(monkeypatch, direction):
    asked, ours, real, real_judge = [], [], torch.compile, runner.judge

    def compile_(module, **options):
        asked.append(type(module).__name__)
        return real(module, backend=lambda graph, inputs: graph.forward, fullgraph=True, dynamic=False)

    monkeypatch.setattr(torch, "compile", compile_)
    monkeypatch.setattr(runner, "judge", lambda *a, **kw: ours.append(kw["ours"]) or real_judge(*a, **kw))
    names = ("compile", "fused", "fused+compile")
    rows = by_provider(measure([tail_case(direction=direction)], providers=names, backend="cpu"))
    assert [(rows[name]["backend"], rows[name]["error"]) for name in names] == [
        ("inductor", None), ("cpu", None), ("cpu", None),
    ]  # fmt: skip
    assert asked == ["StockTail", "FusedTail"] and ours == [False, True, True]


# ------------------------------------------------------------------------------------------- command and report


@pytest.mark.networks
@pytest.mark.parametrize("direction", TAIL_DIRECTIONS)
def test_a_backend_as_a_provider_of_tails_runs_on_that_backend_under_our_rule(monkeypatch, direction):
    refusal = backends.refusal("triton", "cpu", torch.float32)
    if refusal is not None:
        pytest.skip(refusal)
    seen, real = [], runner.judge
    monkeypatch.setattr(runner, "judge", lambda *a, ours: seen.append(ours) or real(*a, ours=ours))
    case = tail_case(shape=Shape(24, 5, (3, 5)), direction=direction)
    rows = measure([case], providers=("eager", "fused", "triton"), backend="reference", cache_bytes=1)
    assert [(row["provider"], row["backend"], row["error"]) for row in rows[1:]] == [
        ("fused", "reference", None), ("triton", "triton", None), ("copy", "aten", None),
    ]  # fmt: skip
    assert seen == [False, True, True]


def test_the_command_measures_reports_and_saves_tails(tmp_path, capsys):
    path = tmp_path / "out.json"
    argv = ["bench", "--op", "tail", "--shape", "2,8,2,5,5", "--direction", *TAIL_DIRECTIONS, "--quick", "--plain"]
    argv += ["--budget", "0.01", "--cache-size", "0.001", "--providers", "eager", "fused", "--json", str(path)]
    assert cli.main(argv) == 0
    text = capsys.readouterr().out
    for direction in TAIL_DIRECTIONS:
        assert f"\nshape: tail {direction}, float32\n" in text
    data = json.loads(path.read_text())
    assert {row["op"] for row in (*data["rows"], *data["summary"])} == {"tail"} and len(data["rows"]) == 12
    assert cli.main(["bench", "--from", str(path), "--plain"]) == 0
    assert "Geometric means" in capsys.readouterr().out
    assert cli.main(["bench", "--shape", "2,8,2,5,5", "--direction", "eval-forward"]) == 2
    assert "unknown direction 'eval-forward'" in capsys.readouterr().err


def test_rows_of_the_layer_say_no_op_and_those_of_tails_are_kept_apart():
    assert all("op" not in row for row in measure([tail_case(op="se")], backend="reference"))
    rows = [layer_row(speedup=2.0), layer_row(speedup=8.0, op="tail"), failed_row(op="tail")]
    found = [(e.get("op"), e["provider"], e["speedup_vs_eager"]) for e in report.summarise(rows)]
    assert found == [
        (None, "fused", pytest.approx(2.0)), ("tail", "fused", pytest.approx(8.0)), ("tail", "compile", None),
    ]  # fmt: skip


def test_a_saved_layer_and_a_saved_tail_are_read_and_drawn_together(tmp_path, monkeypatch):
    one = save(tmp_path / "1.json", [layer_row()])
    two = save(tmp_path / "2.json", [layer_row(op="tail", passes=4)])
    header, rows = saved.read_json([one, two])
    pytest.importorskip("matplotlib")
    from matplotlib.figure import Figure

    figures, real = [], Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda self, path: figures.append(self) or real(self, path))
    for draw in (plot.draw, plot.draw_roofline):
        draw(header, rows[1:], tmp_path / "a.png")
        draw(header, rows, tmp_path / "a.png")
    titles = [figure.texts[0].get_text() for figure in figures]
    tail, se = "Block tails (BatchNorm, SE, + residual, ReLU)", "Squeeze-and-Excitation layers"
    assert titles == [
        f"{ops}: {what}"
        for what in ("time in copies of the tensor", "bandwidth against a copy's")
        for ops in (tail, f"{se} and {tail}")
    ]
    panels = {axes.get_title("left") for axes in figures[3].axes}
    assert panels == {"senet154, forward, float32", "senet154, tail forward, float32"}


def test_the_two_ops_are_compared_apart(tmp_path, capsys):
    a = [layer_row(median_s=1.0, iqr_s=0.0), layer_row(op="tail", median_s=4.0, iqr_s=0.0)]
    b = [layer_row(op="tail", median_s=2.0, iqr_s=0.0), layer_row(median_s=3.0, iqr_s=0.0)]
    compared = compare.compare("layers", a, b)
    assert [(row.get("op"), row["in"], row["ratio"]) for row in compared] == [
        (None, "both", 3.0), ("tail", "both", 0.5),
    ]  # fmt: skip
    summary = compare.summarise("layers", compared)
    assert [(entry.get("op"), entry["ratio"]) for entry in summary] == [
        (None, pytest.approx(3.0)), ("tail", pytest.approx(0.5)),
    ]  # fmt: skip
    paths = [str(save(tmp_path / f"{name}.json", rows)) for name, rows in (("a", a), ("b", b[:1]))]
    assert cli.main(["bench", "compare", *paths, "--plain"]) == 0
    text = capsys.readouterr().out
    assert "senet154: tail forward, float32\n" in text and "senet154: forward, float32\n" not in text
    assert f"only in {paths[0]}:\n  problem senet154" in text
