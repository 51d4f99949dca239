"""senet_fused.bench: problems, judgement, timing, report. No test asserts on a measured time."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
import math
import os
import re
import shutil
import sys
import types

import pytest
import torch
from bench_rows import FAST, HEADER, Quiet, by_provider, failed_row, layer_row, save
from torch import nn

import senet_fused
from senet_fused import backends, cli
from senet_fused.accuracy import relative_error
from senet_fused.arguments import RequestError
from senet_fused.bench import (
    buffers,
    command,
    cuda_timing,
    oracle,
    plot,
    problems,
    providers,
    report,
    runner,
    saved,
    tables,
    timing,
)
from senet_fused.bench.problems import Case, Shape

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)


def small_case(**changes) -> Case:
    case = Case("shape", 2, Shape(24, 5, (7, 9)), direction="forward+backward")
    return dataclasses.replace(case, **changes)


def measure(cases, **options):
    options = {"providers": ("eager", "fused"), "cache_bytes": 2**12, "settings": FAST} | options
    return runner.run(cases, runner.Options(**options), Quiet())


ON_A_CPU = tuple(name for name in providers.BUILDERS if name not in problems.GPU_BACKENDS)


# ------------------------------------------------------------------------------------------------ problems


def test_the_shipped_problems_are_the_published_ones():
    table = problems.problems()
    assert set(table) == {
        "senet154",
        "se_resnet50",
        "se_resnext101_32x4d",
        "mobilenet_v3_large",
        "efficientnet_b0",
        "regnet_y_16gf",
    }
    layers = [(s.channels * math.prod(s.spatial) * s.count) for s in table["senet154"].shapes]
    assert sum(s.count for s in table["senet154"].shapes) == 50
    assert sum(layers) == 13_146_112  # 13.15 million SE inputs an image
    weights = sum((2 * s.channels * s.rd_channels + s.channels + s.rd_channels) * s.count
                  for s in table["senet154"].shapes)  # fmt: skip
    assert round(weights / 1e6, 2) == 6.63
    assert (table["mobilenet_v3_large"].gate, table["efficientnet_b0"].act) == ("hardsigmoid", "silu")


@pytest.mark.parametrize(
    ("text", "batch", "shape"),
    [
        ("8,256,16,56,48", 8, Shape(256, 16, (56, 48))),
        ("1,16,4,9", 1, Shape(16, 4, (9,))),
        ("2,8,1,3,5,7", 2, Shape(8, 1, (3, 5, 7))),
    ],
)
def test_shapes_are_read(text, batch, shape):
    assert problems.shape_of(text) == (batch, shape)


@pytest.mark.parametrize(
    "text", ["", "8,256,16", "8,256,16,0,56", "8,256,16,-1,56", "8;256", "1,2,3,4,5,6,7", "a,b,c,d"]
)
def test_a_shape_that_cannot_be_read_is_named(text):
    with pytest.raises(RequestError, match="N,C,R,H,W"):
        problems.shape_of(text)


def test_cases_are_every_combination_and_share_oracles_in_a_row():
    found = problems.cases(
        ["senet154"],
        ["1,8,2,4,4"],
        batches=[2, 4],
        dtypes=["float32", "bfloat16"],
        layouts=["contiguous", "channels_last"],
        directions=["forward", "forward+backward"],
    )
    assert len(found) == len(set(found)) == (4 * 2 + 1) * 2 * 2 * 2
    keys = [dataclasses.replace(case, layout="", direction="") for case in found]
    assert sum(a != b for a, b in zip(keys, keys[1:], strict=False)) == len(set(keys)) - 1


def test_a_problem_brings_its_functions_unless_others_are_given():
    assert {(c.act, c.gate) for c in problems.cases(["mobilenet_v3_large"])} == {("relu", "hardsigmoid")}
    assert {(c.act, c.gate) for c in problems.cases(["mobilenet_v3_large"], act="mish")} == {("mish", "hardsigmoid")}


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        ({"names": ["resnet"]}, "unknown problem 'resnet'.*senet154"),
        ({"names": ["senet154"], "dtypes": ["int8"]}, "unknown dtype 'int8'.*bfloat16"),
        ({"names": ["senet154"], "batches": [0]}, "batch size"),
        ({"shapes": ["1,8,2,9"], "layouts": ["channels_last"]}, "channels_last needs"),
    ],
)
def test_a_request_that_cannot_be_met_says_why(request_, message):
    with pytest.raises(RequestError, match=message):
        problems.cases(**request_)


@pytest.mark.parametrize(
    ("direction", "residual", "post_act", "passes"),
    [
        ("forward", False, "none", 2),
        ("forward", True, "none", 3),
        ("forward", True, "relu", 3),
        ("forward+backward", False, "none", 5),
        ("forward+backward", False, "relu", 5),
        ("forward+backward", True, "none", 6),
        ("forward+backward", True, "relu", 7),
    ],
)
def test_the_byte_model_counts_the_resident_floor(direction, residual, post_act, passes):
    assert small_case(direction=direction, residual=residual, post_act=post_act).passes == passes


# -------------------------------------------------------------------------------------------------- inputs


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("bias", [True, False])
def test_judged_inputs_stay_clear_of_every_kink_and_spread_the_gates(dtype, bias):
    case = small_case(dtype=dtype, bias=bias, residual=True, post_act="relu")
    weights = buffers.make_weights(case, CPU)
    inputs = buffers.check_inputs(case, weights, CPU)
    w1, b1 = weights.w1.double(), 0 if weights.b1 is None else weights.b1.double()
    preact = inputs.x.detach().double().mean((2, 3)) @ w1.T + b1
    assert 0.4 < preact.abs().min() and preact.abs().max() < 1.6
    gate = oracle.oracle_gate(case, inputs.x.detach(), weights)
    assert gate.max() - gate.min() > 0.1
    assert (gate * inputs.x.detach() + inputs.residual.detach()).abs().min() > 0.2


def test_judged_inputs_are_the_same_numbers_in_both_layouts():
    first, last = (
        buffers.check_inputs(case, buffers.make_weights(case, CPU), CPU)
        for case in (small_case(residual=True), small_case(residual=True, layout="channels_last"))
    )
    for a, b in zip(first, last, strict=True):
        assert a.is_contiguous() and b.is_contiguous(memory_format=torch.channels_last)
        assert not b.is_contiguous()
        assert torch.equal(a, b)


@pytest.mark.parametrize(
    ("spatial", "layout", "memory_format"),
    [
        ((7, 9), "contiguous", torch.contiguous_format),
        ((7, 9), "channels_last", torch.channels_last),
        ((3, 5, 7), "channels_last", torch.channels_last_3d),
        ((11,), "contiguous", torch.contiguous_format),
    ],
)
def test_rotating_buffers_exceed_the_size_asked_for_and_are_apart(spatial, layout, memory_format):
    case = small_case(shape=Shape(24, 5, spatial), layout=layout, residual=True)
    sets = buffers.BufferPool(CPU).sets(case, at_least_bytes=200_000)
    tensors = [tensor for inputs in sets for tensor in inputs]
    assert sum(t.numel() * t.element_size() for t in tensors) > 200_000
    assert sum(t.numel() * t.element_size() for t in tensors[3:]) <= 200_000  # and by no more than one set
    spans = sorted((t.data_ptr(), t.data_ptr() + t.numel() * t.element_size()) for t in tensors)
    assert all(end <= start for (_, end), (start, _) in zip(spans, spans[1:], strict=False))
    assert all(start % 64 == spans[0][0] % 64 for start, _ in spans)
    for x, residual, dy in sets:
        assert x.requires_grad and residual.requires_grad and not dy.requires_grad
        for tensor in (x, residual, dy):
            assert tensor.shape == case.size and tensor.is_contiguous(memory_format=memory_format)
            assert not tensor._is_view()
            assert tensor.detach().std() > 0.5


def test_the_buffer_pool_serves_one_dtype_after_another():
    pool = buffers.BufferPool(CPU)
    for dtype in ("float32", "bfloat16", "float64"):
        (inputs,) = pool.sets(small_case(dtype=dtype, direction="forward"), 0)
        assert inputs.x.dtype == getattr(torch, dtype)
        assert not inputs.x.requires_grad and inputs.dy is None and inputs.residual is None


# ----------------------------------------------------------------------------------------------- judgement


def judged(case, change=None, ours=True):
    """The verdict on stock PyTorch's own results, changed."""
    weights = buffers.make_weights(case, CPU)
    inputs = buffers.check_inputs(case, weights, CPU)
    exact = oracle.oracle(case, inputs, weights)
    results = providers.results(providers.eager(case, weights, "linear"), case, inputs)
    errors = {name: relative_error(tensor, exact[name]) for name, tensor in results.items()}
    if change is not None:
        change(results)
    return oracle.judge(case, results, exact, errors, lambda: oracle.oracle(case, inputs, weights), ours)


@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float64"])
def test_stock_results_are_right(dtype, residual):
    case = small_case(dtype=dtype, residual=residual, post_act="relu" if residual else "none")
    assert judged(case).wrong is None


@pytest.mark.parametrize("name", ["y", "dx", "dresidual", "dw1", "db1", "dw2", "db2"])
@pytest.mark.parametrize("ours", [True, False])
def test_one_wrong_element_of_any_tensor_is_found(name, ours):
    def change(results):
        results[name] = results[name].clone()
        results[name].view(-1)[-1] += 1e-4 * results[name].abs().max()

    wrong = judged(small_case(residual=True), change, ours).wrong
    assert wrong is not None and wrong.startswith(f"wrong output: {name} is off by") and ";" not in wrong


def test_others_may_be_off_by_more_than_ours():
    def change(results):
        results["dw2"] = results["dw2"] + 8e-6 * results["dw2"].abs().max()

    assert "dw2" in judged(small_case(), change, ours=True).wrong
    assert judged(small_case(), change, ours=False).wrong is None


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_gate_that_ignores_its_input_is_found(dtype):
    case = small_case(dtype=dtype)
    weights = buffers.make_weights(case, CPU)
    constant = oracle.oracle_gate(case, torch.zeros(case.size), weights)

    def change(results):
        x = buffers.check_inputs(case, weights, CPU).x.detach()
        results["y"] = (x * constant).to(x.dtype)

    assert "y is off" in judged(case, change).wrong


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda r: r.update(dx=r["dx"] * math.nan), "dx is off by inf"),
        (lambda r: r.update(dx=r["dx"].double()), "dx is .*float64, expected .*float32"),
        (lambda r: r.update(dw1=r["dw1"].T), r"dw1 is \[24, 5\]"),
        (lambda r: r.pop("db2"), "db2 is missing"),
    ],
)
def test_a_tensor_of_the_wrong_kind_is_found(change, message):
    verdict = judged(small_case(), change)
    assert verdict.wrong is not None
    assert re.search(message, verdict.wrong)
    assert verdict.max_error == math.inf


def test_forward_judges_the_output_only():
    assert judged(small_case(direction="forward")).wrong is None
    weights = buffers.make_weights(small_case(), CPU)
    case = small_case(direction="forward")
    results = providers.results(providers.eager(case, weights, "conv"), case, buffers.check_inputs(case, weights, CPU))
    assert set(results) == {"y"} and not results["y"].requires_grad


def test_stock_that_is_wrong_is_no_baseline_for_others():
    with pytest.raises(RuntimeError, match="no baseline"):
        oracle.stock_errors(small_case(), [{"y": 1e-7, "dx": 1e-7}, {"y": 1e-7, "dx": 0.5}])
    assert oracle.stock_errors(small_case(), [{"y": 1e-7}, {"y": 3e-7}]) == {"y": 3e-7}


@pytest.mark.parametrize("spatial", [(9,), (7, 9), (3, 5, 7)])
@pytest.mark.parametrize("bias", [True, False])
def test_both_stock_forms_are_the_same_layer(spatial, bias):
    case = small_case(dtype="float64", shape=Shape(24, 5, spatial), bias=bias, residual=True, post_act="relu",
                      act="silu", gate="hardsigmoid")  # fmt: skip
    weights = buffers.make_weights(case, CPU)
    inputs = buffers.check_inputs(case, weights, CPU)
    exact = oracle.oracle(case, inputs, weights)
    for form in providers.STOCK_FORMS:
        results = providers.results(providers.eager(case, weights, form), case, inputs)
        assert (
            set(results) == set(exact) == {"y", "dx", "dresidual", "dw1", "dw2"} | ({"db1", "db2"} if bias else set())
        )
        assert all(relative_error(results[name], exact[name]) < 1e-14 for name in exact)


# -------------------------------------------------------------------------------------------------- timing


def test_one_cursor_rotates_for_all():
    rotation = timing.Rotation(3)
    assert [rotation.take(2), rotation.take(3), rotation.take(1)] == [[0, 1], [2, 0, 1], [2]]


def test_statistics_are_median_and_interquartile_range():
    statistics = timing.Statistics.of([4.0, 1.0, 3.0, 2.0, 100.0], inner=7)
    assert (statistics.median_s, statistics.iqr_s, statistics.samples, statistics.inner) == (3.0, 2.0, 5, 7)
    assert timing.Statistics.of([2.0], 1) == timing.Statistics(2.0, 0.0, 1, 1)


def test_contenders_alternate_on_all_buffers_and_a_failing_one_drops_out():
    log = []

    def failing(number):
        log.append(("late", number))
        if len([name for name, _ in log if name == "late"]) > 6:  # four calls to warm up, then one a round
            raise RuntimeError("out of patience\nand more")

    def broken(number):
        raise ValueError("never runs")

    settings = timing.Settings(budget_s=0.0, min_rounds=5, sample_s=1e-9)
    outcomes = timing.interleave(
        {
            "a": lambda n: log.append(("a", n)),
            "late": failing,
            "broken": broken,
            "b": lambda n: log.append(("b", n)),
        },
        timing.Rotation(4),
        settings,
    )
    assert outcomes["broken"] == timing.Outcome(None, "ValueError: never runs")
    assert outcomes["late"] == timing.Outcome(None, "RuntimeError: out of patience")
    assert outcomes["a"].statistics.samples == outcomes["b"].statistics.samples == 5
    for name in "ab":
        assert {number for who, number in log if who == name} == {0, 1, 2, 3}
    tail = [name for name, _ in log[-8:]]
    assert "a" in tail and "b" in tail


def test_an_error_in_the_middle_of_the_samples_drops_the_contender():
    calls = []

    def failing(number):
        calls.append(number)
        if len(calls) > 30:
            raise RuntimeError("gone")

    settings = timing.Settings(budget_s=0.0, min_rounds=40, sample_s=1e-9)
    outcomes = timing.interleave({"a": lambda n: None, "late": failing}, timing.Rotation(4), settings)
    assert outcomes["late"] == timing.Outcome(None, "RuntimeError: gone")
    assert outcomes["a"].statistics.samples == 40


def test_rounds_end_with_the_budget_or_their_number():
    settings = timing.Settings(budget_s=1e9, min_rounds=1, max_rounds=6, sample_s=1e-9)
    ticks = []
    outcomes = timing.interleave({"a": lambda n: None}, timing.Rotation(1), settings, tick=lambda: ticks.append(1))
    assert outcomes["a"].statistics.samples == len(ticks) == 6


# ---------------------------------------------------------------------------------------------- the runner


@pytest.mark.parametrize("direction", problems.DIRECTIONS)
@pytest.mark.parametrize("layout", problems.LAYOUTS)
def test_rows_hold_what_was_measured(direction, layout):
    case = small_case(direction=direction, layout=layout)
    rows = measure([case], backend="reference")
    assert [row["provider"] for row in rows] == ["eager", "fused", "copy"]
    eager, fused, copy = rows
    for row in rows:
        assert row["error"] is None and row["median_s"] > 0 and row["iqr_s"] >= 0 and row["samples"] == 2
        assert (row["problem"], row["shape"], row["count"]) == ("shape", "2,24,5,7,9", 1)
        assert (row["dtype"], row["layout"], row["direction"], row["cache"]) == (
            "float32",
            layout,
            direction,
            "cold",
        )
        passes = 2 if row is copy else {"forward": 2, "backward": 3, "forward+backward": 5}[direction]
        assert row["passes"] == passes
        assert row["gbps"] == pytest.approx(passes * 2 * 24 * 63 * 4 / row["median_s"] / 1e9)
        assert row["copies"] == pytest.approx(row["median_s"] / copy["median_s"])
        assert row["fraction_of_copy"] == pytest.approx(row["gbps"] / copy["gbps"])
        assert row["speedup_vs_eager"] == pytest.approx(eager["median_s"] / row["median_s"])
    assert (eager["backend"], fused["backend"], copy["backend"]) == ("aten", "reference", "aten")
    assert eager["form"] in providers.STOCK_FORMS
    assert 0 < fused["max_error"] < 1e-5


@pytest.mark.networks
def test_every_dtype_and_tail_is_measured():
    cases = [
        small_case(dtype=dtype, residual=residual, post_act="relu", bias=not residual)
        for dtype in problems.DTYPES
        for residual in (False, True)
    ]
    rows = measure(cases)
    assert [row["error"] for row in rows] == [None] * 24


@pytest.mark.networks
def test_the_backend_that_ran_is_recorded_and_a_named_one_is_insisted_on(monkeypatch):
    assert by_provider(measure([small_case()], backend="reference"))["fused"]["backend"] == "reference"
    auto = senet_fused.explain(torch.empty(1, 1, 1, 1), backend="auto").backend
    assert by_provider(measure([small_case()], backend="auto"))["fused"]["backend"] == auto

    counts = {"elsewhere.forward": 0, "elsewhere.backward": 0}

    def counted():
        return {key: value + 1 for key, value in counts.items()}

    snapshots = iter([{}, counted(), counted()])
    monkeypatch.setattr(senet_fused, "call_counts", lambda: next(snapshots))
    row = by_provider(measure([small_case()], backend="reference"))["fused"]
    assert row["error"] == "RuntimeError: backend 'reference' was asked for, but 'elsewhere' ran"
    assert row["median_s"] is None


@pytest.mark.networks
def test_an_operator_that_counts_nothing_or_half_is_no_proof(monkeypatch):
    monkeypatch.setattr(senet_fused, "call_counts", dict)
    assert by_provider(measure([small_case()]))["fused"]["error"] == "RuntimeError: no backend counted a call"
    snapshots = iter([{}, {"cpu.forward": 3}])
    monkeypatch.setattr(senet_fused, "call_counts", lambda: next(snapshots))
    error = by_provider(measure([small_case()]))["fused"]["error"]
    assert error == "RuntimeError: the backend 'cpu' counted no backward call"


class WrongOutput(nn.Module):
    """The stock layer with one of its results a little off."""

    def __init__(self, inner: nn.Module, what: str) -> None:
        super().__init__()
        self.inner, self.what = inner, what

    def forward(self, x, residual=None):
        y = self.inner(x, residual)
        if self.what == "y":
            return y * 1.001
        return y + 0.001 * (y - y.detach())  # the value of y, the gradient of 1.001 y


def wrong_fused(what):
    def build(case, weights, form, backend):
        inner = providers.eager(case, weights, "linear")
        return dataclasses.replace(inner, name="fused", forward=WrongOutput(inner.forward, what))

    return build


@pytest.mark.parametrize(
    ("what", "direction", "found"),
    [
        ("y", "forward", True),
        ("y", "forward+backward", True),
        ("dy", "forward", False),
        ("dy", "forward+backward", True),
    ],
)
def test_a_wrong_provider_gets_an_error_and_no_time(monkeypatch, what, direction, found):
    monkeypatch.setitem(providers.BUILDERS, "fused", wrong_fused(what))
    rows = by_provider(measure([small_case(direction=direction)]))
    assert rows["eager"]["error"] is None and rows["copy"]["error"] is None
    fused = rows["fused"]
    if not found:
        assert fused["error"] is None and fused["median_s"] > 0
        return
    assert fused["error"].startswith("wrong output: ")
    assert ("y is off" in fused["error"]) == (what == "y")
    for key in ("median_s", "iqr_s", "speedup_vs_eager", "copies", "gbps", "fraction_of_copy", "backend"):
        assert fused[key] is None
    assert 5e-4 < fused["max_error"] < 2e-3


def test_a_provider_that_cannot_be_built_is_a_row_of_its_own(monkeypatch):
    def no_compiler(module, **options):
        raise RuntimeError("no C++ compiler\nwith a long story")

    monkeypatch.setattr(torch, "compile", no_compiler)
    rows = by_provider(measure([small_case()], providers=("eager", "compile", "fused")))
    assert rows["compile"]["error"] == "RuntimeError: no C++ compiler" and rows["compile"]["median_s"] is None
    assert rows["eager"]["error"] is rows["fused"]["error"] is None


@pytest.mark.compiler
def test_a_compile_that_compiles_nothing_is_found(monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda module, **options: module)
    rows = by_provider(measure([small_case(direction="forward")], providers=("compile",)))
    assert "compiled nothing" in rows["compile"]["error"]


@pytest.mark.compiler
@pytest.mark.skipif(
    not any(map(shutil.which, (os.environ.get("CXX", "c++"), "g++", "clang++"))),
    reason="no C++ compiler for torch.compile",
)
def test_all_that_compile_are_measured_for_what_ran():
    rows = by_provider(measure([small_case(direction="forward")], providers=ON_A_CPU))
    assert [row["error"] for row in rows.values()] == [None] * 6
    auto = rows["fused"]["backend"]
    assert {name: row["backend"] for name, row in rows.items()} == {
        "eager": "aten",
        "compile": "inductor",
        "max-autotune": "inductor",
        "fused": auto,
        "fused+compile": "inductor",
        "copy": "aten",
    }
    form = rows["eager"]["form"]
    assert [rows[name]["form"] for name in ON_A_CPU] == [form, form, form, None, None]


@pytest.fixture
def quick_compile(monkeypatch):
    """torch.compile without inductor; the options of every call of it."""
    asked, real = [], torch.compile

    def compile_(module, **options):
        asked.append((type(module).__name__, options))
        # A function of its own: torch.compile runs again what the same one has compiled.
        return real(module, backend=lambda graph, inputs: graph.forward, fullgraph=True, dynamic=False)

    monkeypatch.setattr(torch, "compile", compile_)
    return asked


def test_what_is_compiled_and_how(quick_compile):
    rows = measure([small_case(direction="forward")], providers=ON_A_CPU)
    assert not any(row["error"] for row in rows)
    whole = {"fullgraph": True, "dynamic": False}
    assert quick_compile == [
        ("StockSE", whole),
        ("StockSE", whole | {"mode": "max-autotune-no-cudagraphs"}),
        ("FusedSE", whole),
    ]


@pytest.mark.compiler
def test_compiled_code_is_forgotten_once_a_case(monkeypatch, quick_compile):
    resets, real = [], torch._dynamo.reset
    monkeypatch.setattr(torch._dynamo, "reset", lambda: resets.append(1) or real())
    graphs = torch._dynamo.utils.counters["stats"]
    before = graphs["unique_graphs"]
    cases = [small_case(direction="forward"), small_case(direction="forward", batch=3)]
    rows = measure(cases, providers=("compile", "max-autotune", "fused+compile"), backend="reference")
    assert not any(row["error"] for row in rows)
    assert len(resets) == 2 and graphs["unique_graphs"] == before + 2 * 3


@pytest.mark.compiler
@pytest.mark.parametrize("direction", problems.DIRECTIONS)
def test_the_fused_layer_compiled_as_plain_pytorch_is_inductors(monkeypatch, quick_compile, direction):
    """As on a GPU, where "auto" leaves a compiled graph to torch.compile: another rule, and no claim to our backend."""
    from senet_fused import select

    real = select.choose

    def choose(backend, device_type, dtype, compiling=False):
        return select.Choice("reference", "compiling") if compiling else real(backend, device_type, dtype)

    monkeypatch.setattr(select, "choose", choose)
    judged_as_ours, real_judge = [], runner.judge

    def judge(*arguments, ours):
        judged_as_ours.append(ours)
        return real_judge(*arguments, ours=ours)

    monkeypatch.setattr(runner, "judge", judge)
    names = ("compile", "fused", "fused+compile")
    rows = by_provider(measure([small_case(direction=direction)], providers=names, backend="auto"))
    auto = senet_fused.explain(torch.empty(1, 1, 1, 1), backend="auto").backend
    assert [rows[name]["backend"] for name in names] == ["inductor", auto, "inductor"]
    assert judged_as_ours == [False, True, False]


@pytest.mark.skipif(
    senet_fused.explain(torch.empty(1, 1, 1, 1), backend="auto").backend == "reference", reason="no CPU kernels"
)
def test_our_operator_in_a_compiled_graph_is_held_to_our_rule(monkeypatch, quick_compile):
    seen, real = [], runner.judge
    monkeypatch.setattr(runner, "judge", lambda *a, ours: seen.append(ours) or real(*a, ours=ours))
    row = by_provider(measure([small_case()], providers=("fused+compile",), backend="cpu"))["fused+compile"]
    assert (row["backend"], row["error"], seen) == ("cpu", None, [True])


@pytest.mark.compiler
def test_a_named_backend_is_insisted_on_under_compile(monkeypatch, quick_compile):
    row = by_provider(measure([small_case()], providers=("fused+compile",), backend="reference"))["fused+compile"]
    assert (row["backend"], row["error"]) == ("inductor", None)
    monkeypatch.setattr(senet_fused, "call_counts", dict)
    row = by_provider(measure([small_case()], providers=("fused+compile",), backend="cpu"))["fused+compile"]
    kernels = senet_fused.explain(torch.empty(1, 1, 1, 1), backend="auto").backend == "cpu"
    assert ("backend 'cpu' was asked for, but 'inductor' ran" if kernels else "cannot serve") in row["error"]


def test_a_fused_layer_that_is_not_compiled_is_found(monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda module, **options: module)
    row = by_provider(measure([small_case()], providers=("fused+compile",)))["fused+compile"]
    assert "compiled nothing" in row["error"] and row["median_s"] is None


@pytest.fixture
def on_the_cpu(monkeypatch):
    """Makes a backend with GPU kernels serve CPU tensors, until the test ends."""

    def serve(name):
        if name == "cuda":
            from cuda_host import build

            if build.problem() is not None:
                pytest.skip(build.problem())
            monkeypatch.setattr(backends.cuda, "_operators", dict(backends.cuda._operators))
            backends.cuda.load_host(build.kernels_library())
        refusal = backends.refusal(name, "cpu", torch.float32)
        if refusal is not None:
            pytest.skip(refusal)

    return serve


@pytest.mark.networks
@pytest.mark.parametrize("direction", problems.DIRECTIONS)
@pytest.mark.parametrize("name", problems.GPU_BACKENDS)
def test_a_backend_as_a_provider_runs_on_that_backend_under_our_rule(monkeypatch, on_the_cpu, name, direction):
    on_the_cpu(name)
    seen, real = [], runner.judge
    monkeypatch.setattr(runner, "judge", lambda *a, ours: seen.append(ours) or real(*a, ours=ours))
    case = small_case(shape=Shape(24, 5, (3, 5)), direction=direction)
    settings = dataclasses.replace(FAST, max_inner=1)
    rows = measure([case], providers=("eager", "fused", name), backend="reference", cache_bytes=1, settings=settings)
    assert [(row["provider"], row["backend"], row["error"]) for row in rows[1:]] == [
        ("fused", "reference", None),
        (name, name, None),
        ("copy", "aten", None),
    ]
    assert seen == [False, True, True]


def test_a_backend_as_a_provider_is_insisted_on(monkeypatch):
    snapshots = iter([{}, {"triton.forward": 1, "triton.backward": 1}])
    monkeypatch.setattr(senet_fused, "call_counts", lambda: next(snapshots))
    monkeypatch.setattr(
        providers, "_fused_module", lambda case, weights, _: providers._stock_module(case, weights, "conv")
    )
    row = by_provider(measure([small_case()], providers=("cuda",)))["cuda"]
    assert row["error"] == "RuntimeError: backend 'cuda' was asked for, but 'triton' ran"
    assert row["median_s"] is None


def test_a_backend_without_kernels_for_a_dtype_is_a_row_with_the_reason():
    row = by_provider(measure([small_case(dtype="float64")], providers=("eager", "cuda")))["cuda"]
    assert "backend 'cuda'" in row["error"] and "it has no kernels for torch.float64" in row["error"]


def parsed(*argv):
    parser = command.argparse.ArgumentParser()
    command.add_arguments(parser)
    return parser.parse_args(argv)


def test_both_backends_are_measured_on_a_gpu_where_they_serve_all_that_is_asked_for(monkeypatch):
    missing = set()

    def refusal(name, device_type, dtype):
        if device_type == "cpu":
            return "it serves GPU tensors"
        return "not installed" if name in missing else "no kernels" if dtype == torch.float64 else None

    monkeypatch.setattr(backends, "refusal", refusal)
    usual = ("eager", "compile", "fused")
    assert command._providers(parsed()) == usual
    assert command._providers(parsed("--device", "cuda")) == (*usual, "cuda", "triton")
    assert command._providers(parsed("--device", "cuda", "--dtype", "float32", "float64")) == usual
    missing.add("cuda")
    assert command._providers(parsed("--device", "cuda", "--dtype", "float32", "bfloat16")) == (*usual, "triton")
    assert command._providers(parsed("--device", "cuda", "--providers", "triton", "eager")) == ("eager", "triton")
    with pytest.raises(RequestError, match="provider 'cuda' cannot run with --device cuda: not installed"):
        command._providers(parsed("--device", "cuda", "--providers", "cuda", "triton"))
    with pytest.raises(RequestError, match="provider 'triton' cannot run with --device cpu: it serves GPU tensors"):
        command._providers(parsed("--providers", "triton", "eager"))


def test_no_case_is_begun_after_the_time_limit(monkeypatch):
    begun = []
    monkeypatch.setattr(runner._Runner, "case", lambda self, case: begun.append(case) or [{"case": case}])
    cases = [small_case(batch=n) for n in range(1, 6)]
    clock = iter([0, 1, 2, 3, 11])
    monkeypatch.setattr(runner.time, "monotonic", lambda: next(clock))
    rows = runner.run(cases, runner.Options(time_limit_s=10), Quiet())
    assert begun == cases[:3] and len(rows) == 3


def test_a_case_that_cannot_be_set_up_does_not_end_the_run(monkeypatch):
    def no_memory(*arguments):
        raise MemoryError("too large")

    real = buffers.BufferPool.sets
    monkeypatch.setattr(
        buffers.BufferPool,
        "sets",
        lambda self, case, *rest: (no_memory if case.batch == 3 else real)(self, case, *rest),
    )
    rows = measure([small_case(batch=3), small_case()])
    assert [row["error"] for row in rows] == ["MemoryError: too large"] * 3 + [None] * 3


def test_a_case_whose_stock_layer_is_wrong_is_an_error(monkeypatch):
    real = providers.StockSE.forward
    monkeypatch.setattr(providers.StockSE, "forward", lambda self, x, residual=None: real(self, x, residual) * 2)
    rows = measure([small_case()])
    assert all("no baseline" in row["error"] and row["median_s"] is None for row in rows)


@pytest.mark.parametrize("form", providers.STOCK_FORMS)
def test_the_stock_form_can_be_chosen(form):
    assert by_provider(measure([small_case()], eager_form=form))["eager"]["form"] == form


def test_the_faster_form_is_the_one_with_the_smaller_median(monkeypatch):
    def interleave(calls, rotation, settings, **options):
        return {name: timing.Outcome(timing.Statistics(1.0 if name == "conv" else 2.0, 0, 1, 1)) for name in calls}

    monkeypatch.setattr(runner, "interleave", interleave)
    assert by_provider(measure([small_case()]))["eager"]["form"] == "conv"


@pytest.mark.networks
def test_timing_accumulates_no_gradients_and_runs_forward_without_grad(monkeypatch):
    seen, built, backward = [], [], []

    def watching(case, weights, form, backend):
        inner = providers.eager(case, weights, form)
        built.append(inner)

        def forward(x, residual):
            seen.append((case.direction, torch.is_grad_enabled(), x.grad))
            y = inner.forward(x, residual)
            if y.requires_grad:
                y.register_hook(lambda dy: backward.append(dy.std().item()))
            return y

        return dataclasses.replace(inner, forward=forward)

    monkeypatch.setitem(providers.BUILDERS, "eager", watching)
    measure([small_case(direction=direction) for direction in problems.DIRECTIONS])
    assert all(parameter.grad is None for provider in built for parameter in provider.parameters)
    assert {(direction, grad) for direction, grad, _ in seen} == {
        ("forward", False),
        ("backward", True),
        ("forward+backward", True),
    }
    assert all(gradient is None for _, _, gradient in seen)
    assert len(backward) > len([1 for direction, _, _ in seen if direction != "forward"]) > 3
    assert min(backward) > 0.5  # a random dy, not that of a sum
    assert torch.is_grad_enabled()


@pytest.mark.parametrize("op", problems.OPS)
def test_a_backward_alone_runs_on_the_graph_of_one_forward_for_each_input(op, monkeypatch):
    """Every gradient of every call is the one that forward and backward give."""
    tail = {"residual": True, "post_act": "relu"} if op == "tail" else {}
    case = small_case(direction="backward", op=op, **tail)
    weights = buffers.make_weights(case, CPU)
    sets = buffers.BufferPool(CPU).sets(case, 0, 3)
    for name in ("eager", "fused"):
        provider = providers.BUILDERS[name](case, weights, "linear", None)
        forwards, real = [], provider.forward
        monkeypatch.setattr(provider, "forward", lambda *a, f=forwards, r=real: f.append(1) or r(*a))
        call = runner.bind(provider, sets, case)
        assert len(forwards) == 3
        for number in (0, 1, 2, 1, 1):
            again = call(number)
            assert len(forwards) == 3
            _, wanted = providers.step(dataclasses.replace(provider, forward=real), sets[number])
            assert len(again) == len(wanted) == (8 if op == "tail" else 5)
            assert all(torch.equal(a, w) for a, w in zip(again, wanted, strict=True))


@pytest.mark.compiler
def test_torch_compile_may_not_reuse_what_a_kept_graph_saves(monkeypatch):
    from torch._functorch import config

    seen, real = [], providers.BUILDERS["eager"]

    def watching(case, *rest):
        seen.append((case.direction, config.donated_buffer))
        return real(case, *rest)

    monkeypatch.setitem(providers.BUILDERS, "eager", watching)
    with config.patch(donated_buffer=True):
        measure([small_case(direction=direction) for direction in problems.DIRECTIONS], providers=("eager",))
    assert seen == [("forward", True), ("backward", False), ("forward+backward", True)]


def test_a_forward_that_fails_for_a_kept_graph_is_a_row(monkeypatch):
    def failing(provider, inputs):
        if provider.name == "fused":
            raise RuntimeError("out of memory")
        return lambda: None

    monkeypatch.setattr(runner, "backward_of", failing)
    rows = by_provider(measure([small_case(direction="backward")], backend="reference"))
    assert rows["fused"]["error"] == "RuntimeError: out of memory" and rows["fused"]["median_s"] is None
    assert rows["eager"]["error"] is None and rows["eager"]["median_s"] > 0


@pytest.mark.parametrize(("caches", "buffers_read"), [(("cold",), 12), (("warm",), 1)])
def test_cold_inputs_rotate_and_warm_ones_stay(monkeypatch, caches, buffers_read):
    read = set()
    real = runner.bind

    def bind(provider, sets, case):
        assert len(sets) == buffers_read
        call = real(provider, sets, case)

        def watched(number):
            read.add(number)
            return call(number)

        return watched

    monkeypatch.setattr(runner, "bind", bind)
    settings = dataclasses.replace(FAST, min_rounds=20, max_rounds=20)
    case = small_case(direction="forward")
    size = 2 * 24 * 63 * 4
    rows = measure([case], caches=caches, cache_bytes=11 * size // 2, settings=settings, eager_form="linear")
    assert {row["cache"] for row in rows} == set(caches)
    assert read == set(range(buffers_read))


# ------------------------------------------------------------------------------------------------ on a GPU


@pytest.fixture
def fake_cuda(monkeypatch):
    """Stands in for the parts of torch.cuda that timing uses, and counts; nothing runs on a device."""

    class Log(list):
        inside, bare = False, False  # in a stream of its own; called without the runner

    log = Log()
    log.streams = []

    class Graph:
        def replay(self):
            log.append("replay")

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self): ...
        def synchronize(self): ...

        def elapsed_time(self, end):
            return 8.0  # milliseconds

    class Stream:
        def wait_stream(self, other): ...

    @contextlib.contextmanager
    def stream(given):
        before, log.inside = log.inside, True
        yield
        log.inside = before

    @contextlib.contextmanager
    def capture(graph, stream):
        log.append("capture")
        log.streams.append(log.inside or log.bare)
        yield
        log.append("captured")

    fakes = {
        "CUDAGraph": Graph,
        "Event": Event,
        "Stream": Stream,
        "graph": capture,
        "stream": stream,
        "current_stream": Stream,
        "synchronize": lambda: None,
        "reset_peak_memory_stats": lambda: None,
        "memory_allocated": lambda: 0,
        "max_memory_allocated": lambda: 0,
        "get_device_properties": lambda device: types.SimpleNamespace(L2_cache_size=2**12),
    }
    for name, fake in fakes.items():
        monkeypatch.setattr(torch.cuda, name, fake)
    cuda_timing._stream.cache_clear()
    yield log
    cuda_timing._stream.cache_clear()


def test_graph_replays_are_timed_per_call(fake_cuda):
    called, fake_cuda.bare = [], True

    def uncapturable(number):
        raise RuntimeError("operation not permitted when stream is capturing")

    settings = timing.Settings(budget_s=0.0, min_rounds=3)
    outcomes = cuda_timing.replay(
        {"a": called.append, "bad": uncapturable}, [0, 1, 2, 3], settings, device=CPU, cold=True
    )
    assert called == [0, 1, 2, 0, 1, 2, 3]  # three calls to warm up, then the capture
    assert outcomes["a"] == timing.Outcome(timing.Statistics(0.002, 0.0, 3, 4))
    assert "not permitted" in outcomes["bad"].error
    assert fake_cuda.count("capture") == 1 and fake_cuda.count("replay") == 1 + 3


def test_a_capture_warms_up_in_the_stream_that_it_captures(fake_cuda, monkeypatch):
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda: 100)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: 350)
    seen = []
    found = cuda_timing.capture(lambda: seen.append((fake_cuda.inside, list(fake_cuda))) or "result")
    assert seen == [(True, [])] * 3 + [(False, ["capture"])]  # the stand-in's capture is in the stream that it is given
    found.replay()
    assert fake_cuda == ["capture", "captured", "replay"] and len(seen) == 4 and found[1:] == ("result", 250)


@pytest.mark.networks
@pytest.mark.parametrize("direction", problems.DIRECTIONS)
def test_gpu_rows_have_device_and_wall_time_cold_and_warm(fake_cuda, monkeypatch, direction):
    real_bind, real_interleave = runner.bind, runner.interleave

    def in_stream(function):
        return lambda *a, **kw: fake_cuda.streams.append(fake_cuda.inside) or function(*a, **kw)

    # A kept graph's forwards, the capture of its backwards, and their wall time: in one stream, not the default one.
    monkeypatch.setattr(runner, "bind", in_stream(real_bind))
    monkeypatch.setattr(runner, "interleave", in_stream(real_interleave))
    options = runner.Options(providers=("eager", "fused"), caches=("cold", "warm"), cache_bytes=2**12, settings=FAST)
    machine = runner._Runner(options, Quiet())
    machine.cuda, machine.synchronize = True, torch.cuda.synchronize
    rows = machine.case(small_case(direction=direction))
    assert [(row["cache"], row["provider"]) for row in rows] == [
        (cache, provider) for cache in ("cold", "warm") for provider in ("eager", "fused", "copy")
    ]
    for row in rows:
        assert row["error"] is None
        calls = 8 if row["cache"] == "cold" else 20
        assert row["calls_per_sample"] == calls
        assert row["median_s"] == pytest.approx(0.008 / calls)
        assert row["wall_median_s"] > 0 and row["wall_iqr_s"] >= 0
    assert rows[0]["wall_speedup_vs_eager"] == 1.0
    assert set(fake_cuda.streams) == {True}
    out = io.StringIO()
    report.render({}, rows, report.summarise(rows), out)
    assert "wall vs eager" in out.getvalue() and "warm" in out.getvalue()


# ---------------------------------------------------------------------------------------------- the report


def test_the_summary_takes_geometric_means_and_names_the_slowest_cell():
    rows = [
        layer_row(speedup=4.0),
        layer_row(speedup=0.5, layout="channels_last", shape="8,2048,128,7,7"),
        layer_row(speedup=2.0, shape="8,1024,64,14,14"),
        layer_row(speedup=8.0, dtype="bfloat16"),
        layer_row("eager", 1.0),
        failed_row(),
    ]
    entries = {(e["dtype"], e["provider"]): e for e in report.summarise(rows)}
    fused = entries["float32", "fused"]
    assert fused["speedup_vs_eager"] == pytest.approx(4 ** (1 / 3))
    assert fused["copies"] == pytest.approx(3 / 4 ** (1 / 3))
    assert (fused["slowest"], fused["slowest_at"]) == (0.5, "8 x 2048/128 @ 7x7 channels_last")
    assert (fused["behind"], fused["measured"], fused["cells"]) == (1, 3, 3)
    assert entries["bfloat16", "fused"]["speedup_vs_eager"] == pytest.approx(8.0)
    failed = entries["float32", "compile"]
    assert failed["speedup_vs_eager"] is None and (failed["measured"], failed["cells"]) == (0, 1)


def test_several_problems_are_summarised_apart_and_together():
    rows = [layer_row(speedup=2.0), layer_row(speedup=8.0, problem="efficientnet_b0")]
    found = {entry["problem"]: entry["speedup_vs_eager"] for entry in report.summarise(rows)}
    assert found == pytest.approx({"senet154": 2.0, "efficientnet_b0": 8.0, "all": 4.0})


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.mark.parametrize("kind", ["terminal", "plain", "file"])
def test_the_report_says_how_and_shows_rows_errors_and_means(monkeypatch, kind):
    monkeypatch.setenv("COLUMNS", "60")  # the terminal wraps lines, nothing is cut
    rows = [layer_row("eager", 1.0, form="linear", backend="aten"), failed_row(), layer_row("cuda", speedup=2.0)]
    out = io.StringIO() if kind == "file" else Terminal()
    header = {"device": {"name": "a CPU"}, "cache": "cold: inputs rotate", "revision": None}
    report.render(header, rows, report.summarise(rows), out, plain=kind == "plain")
    text = out.getvalue()
    assert "cold: inputs rotate" in text and "a CPU" in text and "revision" not in text
    bare = re.sub(r"\x1b\[[0-9;]*m", "", text)
    assert re.search(r"compile +ERROR wrong output: y is off by 1\.0e\+00\n", bare)
    assert "500 us" in text and "2.00" in text and "Geometric means" in text
    assert ("\x1b[" in text) == (kind == "terminal")
    assert ("\x1b[1mcuda" in text) == (kind == "terminal")  # ours is bold
    assert re.search(r"\n8 x 256/16 @ 56x56 +contiguous +eager +aten \(linear\) +1 ms +10 us +1\.00 +3\.00", bare)


def test_figures_are_readable():
    times = [tables.time_label(seconds) for seconds in (None, 2.5, 0.0125, 1.2e-3, 512e-6, 3e-7, 1234.0)]
    assert times == ["-", "2.5 s", "12.5 ms", "1.2 ms", "512 us", "0.3 us", "1234 s"]
    assert [tables.ratio_label(value) for value in (None, 1.234, 123.4)] == ["-", "1.23", "123"]
    assert [tables.share_label(value) for value in (None, 0.0512, 0.99)] == ["-", "5.1%", "99%"]
    assert tables.megabytes_label(25_700_000, 0.79) == "25.7 (-21%)" and tables.megabytes_label(None, None) == "-"


def test_without_rich_the_message_says_what_to_install(monkeypatch, tmp_path, capsys):
    path = save(tmp_path / "out.json", [layer_row()])
    monkeypatch.setitem(sys.modules, "rich.console", None)
    monkeypatch.setattr(runner, "run", lambda *arguments: pytest.fail("measured"))
    for argv in (["--from", str(path)], ["--quick"]):
        assert cli.main(["bench", *argv]) == 2
        assert "need rich: pip install 'senet-fused[bench]'" in capsys.readouterr().err


def test_json_is_plain_json(tmp_path):
    rows = [layer_row(), failed_row()]
    saved.write_json(tmp_path / "out.json", {"threads": 2}, rows, report.summarise(rows))
    data = json.loads((tmp_path / "out.json").read_text(), parse_constant=lambda text: pytest.fail(text))
    assert data["rows"] == rows and data["header"] == {"threads": 2}
    assert [entry["provider"] for entry in data["summary"]] == ["fused", "compile"]


def test_a_picture_is_drawn_whatever_is_missing(tmp_path):
    pytest.importorskip("matplotlib")
    from matplotlib.image import imread

    full = [
        row | {"layout": layout, "dtype": dtype}
        for layout in problems.LAYOUTS
        for dtype in ("float32", "bfloat16")
        for row in (
            layer_row("eager", 1.0),
            failed_row(),
            layer_row("cuda"),
            layer_row("triton"),
            layer_row("copy", 3.0),
        )
    ]
    shapes = []
    for number, rows in enumerate((full, [layer_row(speedup=2.0, speedup_vs_eager=None)], [failed_row()])):
        path = tmp_path / f"{number}.png"
        plot.draw(HEADER, rows, path)
        picture = imread(path)
        assert picture[..., :3].std() > 0.01
        shapes.append(picture.shape)
    assert shapes[0] > shapes[1]


# -------------------------------------------------------------------------------- saved results, the roofline


def roofline_rows():
    return [
        layer_row(provider, dtype=dtype, layout=layout, shape=shape, direction=direction, fraction_of_copy=fraction)
        for direction in problems.DIRECTIONS
        for dtype in ("float32", "bfloat16")
        for shape in ("8,256,16,56,56", "8,2048,128,7,7")
        for layout in problems.LAYOUTS
        for provider, fraction in (("eager", 0.2), ("cuda", 0.7), ("triton", 0.6), ("copy", 1.0))
    ]


def test_sizes_are_those_of_the_tensor():
    assert report.tensor_bytes(layer_row()) == 8 * 256 * 56 * 56 * 4
    assert report.tensor_bytes(layer_row(shape="2,8,1,9", dtype="bfloat16")) == 2 * 8 * 9 * 2
    assert [report.size_label(n) for n in (512, 25_690_112, 3e9)] == ["0.512 kB", "25.7 MB", "3 GB"]


def test_saved_files_are_read_together(tmp_path):
    one = save(tmp_path / "1.json", [layer_row()])
    two = save(tmp_path / "2.json", [layer_row(dtype="bfloat16")], revision="def", warning="busy", date="2021")
    header, rows = saved.read_json([one, two])
    assert [row["dtype"] for row in rows] == ["float32", "bfloat16"]
    assert (header["revision"], header["warning"], header["command"]) == ("abc; def", "busy", "senet-fused bench")
    assert header["device"] == HEADER["device"] and header["date"] == HEADER["date"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "No such file"),
        ("{", "cannot read"),
        ("[]", "was not written by"),
        ('{"header": {}, "rows": []}', "no date, device, threads, versions"),
        (json.dumps({"header": HEADER, "rows": [{"provider": "fused"}]}), "no backend, cache, copies"),
        (json.dumps({"header": HEADER | {"device": {"name": "another"}}, "rows": []}), "differ in device"),
    ],
)
def test_a_file_of_something_else_is_refused(tmp_path, content, message):
    good, bad = save(tmp_path / "good.json", [layer_row()]), tmp_path / "bad.json"
    if content is not None:
        bad.write_text(content)
    with pytest.raises(RequestError, match=message):
        saved.read_json([good, bad])


@pytest.mark.networks
def test_saved_results_are_reported_and_drawn_without_measuring(tmp_path, capsys, monkeypatch):
    pytest.importorskip("matplotlib")
    monkeypatch.setattr(runner, "run", lambda *arguments: pytest.fail("measured"))
    path = save(tmp_path / "out.json", roofline_rows())
    plot, roofline, again = tmp_path / "a.png", tmp_path / "b.png", tmp_path / "again.json"
    argv = ["bench", "--from", str(path), "--plot", str(plot), "--roofline", str(roofline), "--json", str(again)]
    assert cli.main(argv) == 0
    text = capsys.readouterr().out
    assert "a GPU" in text and "Geometric means" in text and "of copy" in text
    assert plot.read_bytes().startswith(b"\x89PNG") and roofline.read_bytes().startswith(b"\x89PNG")
    assert json.loads(again.read_text())["rows"] == roofline_rows()

    assert cli.main(["bench", "--from", str(save(path, [failed_row(), layer_row()]))]) == 1
    assert "ERROR wrong output" in capsys.readouterr().out
    assert cli.main(["bench", "--from", str(tmp_path / "none.json")]) == 2
    assert cli.main(["bench", "--from", str(path), "--roofline", "x.txt"]) == 2
    assert "end it in .png" in capsys.readouterr().err


def test_a_run_out_of_time_reports_what_is_done(tmp_path, capsys):
    path = tmp_path / "out.json"
    shapes = ["--shape", "1,4,2,3,3", "--providers", "eager", "--cache-size", "0.001", "--json", str(path)]
    assert cli.main(["bench", *shapes, "--time-limit", "1e-9"]) == 130
    assert json.loads(path.read_text())["header"]["interrupted"] == "after 0 of 1 cases"
    assert cli.main(["bench", *shapes, "--quick", "--time-limit", "1000"]) == 0
    assert "interrupted" not in json.loads(path.read_text())["header"]


def test_a_run_that_is_killed_has_left_what_is_done(tmp_path, monkeypatch):
    path, seen, real = tmp_path / "out.json", [], runner._Runner.case

    def case(self, one):
        seen.append(json.loads(path.read_text()) if path.exists() else None)
        return real(self, one)

    monkeypatch.setattr(runner._Runner, "case", case)
    argv = ["--shape", "1,4,2,3,3", "1,6,2,3,3", "--providers", "eager", "--cache-size", "0.001", "--quick"]
    assert cli.main(["bench", *argv, "--json", str(path)]) == 0
    assert seen[0] is None and seen[1]["header"]["interrupted"] == "after 1 of 2 cases"
    assert [(row["shape"], row["provider"]) for row in seen[1]["rows"]] == [("1,4,2,3,3", p) for p in ("eager", "copy")]
    assert len(json.loads(path.read_text())["rows"]) == 4 and [file.name for file in tmp_path.iterdir()] == ["out.json"]


def test_every_provider_can_be_asked_for_and_drawn():
    assert command.PROVIDERS == tuple(providers.BUILDERS) == tuple(plot.STYLES)
    assert len(set(plot.STYLES.values())) == len(plot.STYLES)


def test_the_roofline_picture_shows_every_row_by_size(tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    from matplotlib.figure import Figure

    figures, real = [], Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda self, path: figures.append(self) or real(self, path))
    rows = [*roofline_rows(), *(layer_row(cache="warm", fraction_of_copy=9.0) for _ in range(2))]
    plot.draw_roofline(HEADER, rows, tmp_path / "a.png")
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
    (figure,) = figures
    assert "device time" in figure.texts[1].get_text() and "cold cache" in figure.texts[1].get_text()
    panels = figure.axes
    assert [axes.get_title("left") for axes in panels] == [
        f"senet154, {direction}, {dtype}" for direction in problems.DIRECTIONS for dtype in ("float32", "bfloat16")
    ]
    for axes in panels:
        assert "copy" in [text.get_text() for text in axes.texts]
        *curves, ceiling = axes.lines
        assert list(ceiling.get_ydata()) == [1, 1]
        assert [list(curve.get_ydata()) for curve in curves] == [[y, y] for y in (0.2, 0.2, 0.7, 0.7, 0.6, 0.6)]
        assert len({(curve.get_marker(), curve.get_markerfacecolor()) for curve in curves}) == 6
        size = 4 if "float32" in axes.get_title("left") else 2
        for curve in curves:
            assert list(curve.get_xdata()) == pytest.approx([8 * 2048 * 49 * size, 8 * 256 * 3136 * size], rel=0.1)


def test_a_roofline_picture_is_drawn_whatever_is_missing(tmp_path):
    pytest.importorskip("matplotlib")
    many = [layer_row(shape=f"8,{c},4,{m},{m}", problem=p) for p in ("a", "b") for c in range(8, 28) for m in (7, 14)]
    for rows in (
        [failed_row()],
        [layer_row(fraction_of_copy=None), layer_row("copy", 3.0)],
        [layer_row(fraction_of_copy=1.7), layer_row(direction="forward+backward", dtype="bfloat16"), failed_row()],
        many,
    ):
        plot.draw_roofline(HEADER, rows, tmp_path / "a.png")
        assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
