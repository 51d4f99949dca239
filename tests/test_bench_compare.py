"""senet_fused.bench.compare: two saved runs, row by row. The times are made up."""

from __future__ import annotations

import math
import re

import pytest
from bench_rows import HEADER, by_provider, layer_row, model_row, save

from senet_fused import cli
from senet_fused.bench import compare
from senet_fused.bench.saved import KINDS


def failed(row):
    return row | {"median_s": None, "iqr_s": None, "backend": None, "error": "wrong output"}


@pytest.fixture
def saved(tmp_path):
    """Writes a run and returns its path."""

    return lambda name, rows, **header: str(save(tmp_path / name, rows, **header))


@pytest.mark.parametrize(
    ("a", "b", "says"),
    [
        ((1.0, 0.0), (1.0, 0.0), "same"),
        ((1.0, 0.0), (1.01, 0.0), "slower"),
        ((1.0, 0.0), (0.99, 0.0), "faster"),
        ((1.0, 0.02), (1.01, 0.0), "same"),
        ((1.0, 0.0), (0.98, 0.03), "same"),
        ((2.0, 0.3), (3.0, 0.4), "slower"),
    ],
)
def test_the_verdict_is_same_within_the_spread_of_both(a, b, says):
    rows = [layer_row(median_s=median, iqr_s=iqr) for median, iqr in (a, b)]
    ratio, spread, verdict = compare.verdict(*rows)
    assert ratio == pytest.approx(b[0] / a[0])
    assert spread == pytest.approx(ratio * math.sqrt((a[1] / a[0]) ** 2 + (b[1] / b[0]) ** 2))
    assert verdict == says


@pytest.mark.parametrize(("kind", "make"), [("layers", layer_row), ("model", model_row)])
def test_rows_of_the_same_measurement_are_compared(kind, make):
    names = KINDS[kind].identity
    first = make(median_s=1.0)
    others = [first | {name: "other", "median_s": 5.0} for name in names]
    compared = compare.compare(kind, [first, *others], [*reversed(others), first | {"median_s": 2.0}])
    assert [row["in"] for row in compared] == ["both"] * (1 + len(names))
    assert [row["ratio"] for row in compared] == [2.0] + [1.0] * len(names)
    assert all(row[name] == "other" for row, name in zip(compared[1:], names, strict=True))


def test_several_rows_of_one_measurement_are_paired_in_turn():
    compared = compare.compare("layers", [layer_row(median_s=1.0), layer_row(median_s=2.0)], [layer_row(median_s=3.0)])
    assert [(row["in"], row["ratio"]) for row in compared] == [("both", 3.0), ("a", None)]


def test_a_row_of_one_run_or_without_a_time_is_kept():
    a = [layer_row("eager"), layer_row("compile"), failed(layer_row("fused"))]
    b = [layer_row("eager"), layer_row("fused"), layer_row("triton")]
    found = by_provider(compare.compare("layers", a, b))
    assert [(name, row["in"], row["verdict"]) for name, row in found.items()] == [
        ("eager", "both", "same"), ("compile", "a", None), ("fused", "both", None), ("triton", "b", None),
    ]  # fmt: skip
    assert found["fused"]["a_error"] == "wrong output" and found["fused"]["b_median_s"] == 5e-4
    assert found["triton"]["a_median_s"] is None


def test_the_summary_has_geometric_means_by_direction_and_provider():
    a = [layer_row(layout=layout, median_s=1.0) for layout in ("contiguous", "channels_last")]
    a += [layer_row("eager", median_s=1.0), layer_row(direction="forward+backward", median_s=1.0)]
    b = [row | {"median_s": median} for row, median in zip(a, (0.5, 2.0, 1.0, 3.0), strict=True)]
    summary = compare.summarise("layers", compare.compare("layers", a, b[:3] + [failed(b[3])]))
    assert [(entry["direction"], entry["provider"], entry["ratio"]) for entry in summary] == [
        ("forward", "fused", pytest.approx(1.0)), ("forward", "eager", 1.0), ("forward+backward", "fused", None),
    ]  # fmt: skip
    assert [summary[0][name] for name in ("faster", "same", "slower", "rows")] == [1, 0, 1, 2]
    (entry,) = compare.summarise("model", compare.compare("model", [model_row()], [model_row(median_s=2e-3)]))
    assert (entry["mode"], entry["provider"], entry["ratio"]) == ("training", "fused", 2.0)


def test_what_differs_between_the_runs_is_said():
    other = HEADER | {"threads": 1, "versions": {"torch": "3", "senet_fused": "0", "timm": "1"}, "revision": None}
    assert compare.differences(HEADER, HEADER) == []
    assert compare.differences(HEADER, other) == [
        "versions torch: 2, 3", "versions timm: None, 1", "threads: 2, 1", "revision: abc, None",
    ]  # fmt: skip


def test_two_runs_are_compared(saved, capsys):
    a = saved("a.json", [layer_row("eager"), layer_row(median_s=1e-3), failed(layer_row("compile")), layer_row("cuda")])
    b = saved("b.json", [layer_row("eager"), layer_row(median_s=8e-4), layer_row("compile")], threads=1, warning="busy")
    assert cli.main(["bench", "compare", a, b]) == 0
    text = capsys.readouterr().out
    assert "threads: 2, 1" in text and "busy" in text and "senet154: forward, float32" in text
    assert re.search(r"fused +1 ms +800 us +0\.80 +0\.01 +faster", text)
    assert re.search(r"eager .* same\n", text)
    assert re.search(r"compile +ERROR a: wrong output\n", text)
    assert f"only in {a}:\n  problem senet154" in text and "provider cuda" in text and f"only in {b}" not in text


def test_whole_networks_are_compared(saved, capsys):
    a = saved(
        "a.json", [model_row(), model_row(amp=False), model_row("no-se", median_s=None, iqr_s=None)], kind="model"
    )
    b = saved(
        "b.json",
        [model_row(median_s=2e-3), model_row(amp=False), model_row("no-se", median_s=None, iqr_s=None)],
        kind="model",
    )
    assert cli.main(["bench", "compare", a, b]) == 0
    text = capsys.readouterr().out
    assert "net: training, float16 by autocast\n" in text and "net: training, float16\n" in text
    assert re.search(r"8 x 3x8x8 +channels_last +fused +1 ms +2 ms +2\.00 +0\.02 +slower", text)
    assert re.search(r"no-se +- +- +- +- +no time", text)


@pytest.mark.parametrize(("ratio", "status"), [("1.05", 1), ("1.1", 0), ("2", 0)])
def test_a_slower_row_can_be_a_failure(saved, capsys, ratio, status):
    a = saved("a.json", [layer_row(median_s=1.0, iqr_s=0.0), layer_row("eager", median_s=1.0)])
    b = saved("b.json", [layer_row(median_s=1.1, iqr_s=0.022), layer_row("eager", median_s=0.5)])
    assert cli.main(["bench", "compare", a, b, "--fail-slower", ratio]) == status
    assert f"{status} of 2 rows are slower than {ratio} times" in capsys.readouterr().out


def test_files_that_cannot_be_compared_are_refused(saved, tmp_path, capsys):
    layers, models = saved("a.json", [layer_row()]), saved("b.json", [model_row()], kind="model")
    odd = saved("c.json", [layer_row()], kind="compare")
    for pair, message in (
        ((layers, models), "b.json one of `senet-fused bench model`; only two runs of the same command"),
        ((layers, str(tmp_path / "none.json")), "cannot read"),
        ((odd, layers), "c.json was not written by `senet-fused bench --json`"),
    ):
        assert cli.main(["bench", "compare", *pair]) == 2
        error = capsys.readouterr().err
        assert error.startswith("senet-fused bench compare: error: ") and message in error
    for wrong in (["--fail-slower", "0"], []):
        with pytest.raises(SystemExit):
            cli.main(["bench", "compare", layers, *wrong])


def test_a_run_of_nothing_can_be_compared(saved, capsys):
    empty = saved("a.json", [])
    assert cli.main(["bench", "compare", empty, empty, "--fail-slower", "1"]) == 0
    assert "0 of 0 rows" in capsys.readouterr().out
