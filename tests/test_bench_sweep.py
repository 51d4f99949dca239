"""senet_fused.bench model: presets, the largest batch that fits, sweeps over batches. No test asserts on a time."""

from __future__ import annotations

import argparse
import io
import json
import re

import pytest
import torch
from bench_rows import FAST, Quiet, model_row

from senet_fused import cli
from senet_fused.arguments import RequestError
from senet_fused.bench import (
    largest_batch,
    model,
    model_report,
    model_run,
    variants,
    zoo,
)

SIZE = (3, 6, 5)

NETWORK = """
import senet_fused
from torch import nn

def small():
    head = (nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5))
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), senet_fused.FusedSE(8, 2), *head)
"""


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "networks.py"
    path.write_text(NETWORK)
    return path


def parsed(*argv):
    parser = argparse.ArgumentParser()
    model.add_arguments(parser)
    return parser.parse_args(argv)


def resolved(*argv):
    args = parsed(*argv)
    model.resolve(args)
    return args


def made_of(args):
    return {name: getattr(args, name) for name in ("models", "mode", "batch", "dtype", "amp", "layout", "providers")}


# ----------------------------------------------------------------------------------------------------- presets


def test_without_a_preset_the_defaults_are_the_commands():
    assert made_of(resolved("net")) == {
        "models": ["net"], "mode": ["inference", "training"], "batch": [8], "dtype": ["float32"], "amp": False,
        "layout": ["contiguous"], "providers": None,
    }  # fmt: skip


def test_presets_on_a_cpu_and_on_a_gpu():
    cpu = resolved("--preset", "senet154", "se_resnet50", "senet154")
    assert made_of(cpu) == {
        "models": ["legacy_senet154", "legacy_seresnet50"], "mode": ["inference", "training"], "batch": [1, 4, 8],
        "dtype": ["float32"], "amp": False, "layout": ["channels_last"],
        "providers": ["stock", "compile", "fused", "tails", "no-se"],
    }  # fmt: skip
    gpu = resolved("--preset", "se_resnext101", "--device", "cuda")
    assert (gpu.models, gpu.dtype, gpu.amp) == (["legacy_seresnext101_32x4d"], ["bfloat16"], True)
    assert gpu.batch == [32, 64, 128, "max"] and {"graph", "tails+graph", "no-se"} < set(gpu.providers)
    for args in (cpu, gpu):
        assert set(args.providers) <= set(model.VARIANTS)


@pytest.mark.parametrize(
    ("given", "changed"),
    [
        (["--batch", "2", "16"], {"batch": [2, 16]}),
        (["--mode", "training"], {"mode": ["training"]}),
        (["--layout", "contiguous"], {"layout": ["contiguous"]}),
        (["--providers", "stock"], {"providers": ["stock"]}),
        (["--dtype", "float32"], {"dtype": ["float32"], "amp": False}),
        (["--dtype", "float16"], {"dtype": ["float16"], "amp": False}),
        (["--dtype", "float16", "--amp"], {"dtype": ["float16"]}),
        (["--amp"], {}),
    ],
)
def test_what_is_given_counts(given, changed):
    preset = ["--preset", "senet154", "--device", "cuda"]
    assert made_of(resolved(*preset, *given)) == made_of(resolved(*preset)) | changed


def test_a_name_counts_and_the_preset_has_the_rest():
    args = resolved("net.py:make", "--preset", "senet154")
    assert (args.models, args.layout, args.batch) == (["net.py:make"], ["channels_last"], [1, 4, 8])


def test_amp_alone_on_a_cpu_is_bfloat16_with_a_preset():
    args = resolved("--preset", "senet154", "--amp")
    assert (args.dtype, args.amp) == (["bfloat16"], True)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([], "which network? Give names in front of the options, or --preset senet154 | se_resnext101 | se_resnet50"),
        (["net", "--batch", "8", "max"], "needs --device cuda; with --device cpu give numbers, for instance --batch"),
        (["net", "--amp"], "--amp is for --dtype bfloat16 or float16"),
    ],
)
def test_what_is_refused(argv, message, capsys):
    with pytest.raises(RequestError, match=re.escape(message)):
        resolved(*argv)
    assert cli.main(["bench", "model", *argv]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("text", ["0", "-1", "most", "1.5", "maximum"])
def test_a_batch_is_a_number_or_max(text, capsys):
    with pytest.raises(SystemExit):
        parsed("net", "--batch", text)
    assert f"must be a positive integer or 'max', got {text!r}" in capsys.readouterr().err


def test_the_help_says_what_a_preset_is():
    text = " ".join(model._EPILOG.split())
    assert f"{', '.join(model.PRESETS)}: timm's {', '.join(model.PRESETS.values())}" in text
    cpu, gpu = (" ".join(map(str, model._PRESET_DEFAULTS[device]["batch"])) for device in ("cpu", "cuda"))
    assert f"On a CPU in float32 at batches {cpu}, on a GPU in bfloat16 by autocast at {gpu}." in text


def test_a_preset_measures_what_it_names(file, monkeypatch, capsys):
    """Down to the rows: --preset with a stand-in for timm's network."""
    monkeypatch.setitem(model.PRESETS, "senet154", f"{file}:small")
    argv = (
        "--preset senet154 --size 3,6,5 --batch 2 --quick --budget 0.001 --mode inference --threads 1 --plain".split()
    )
    assert cli.main(["bench", "model", *argv, "--providers", "stock", "fused", "no-se"]) == 0
    assert f"{file}:small: inference, float32, 2 x 3x6x5, channels_last" in capsys.readouterr().out


# ------------------------------------------------------------------------------------------- the largest batch


@pytest.mark.parametrize("most", [*range(1, 20), 31, 32, 33, 63, 64, 65, 71, 72, 100, 128, 212, 1000, 4097])
def test_the_largest_batch_is_found(most):
    asked = []

    def fits(batch):
        asked.append(batch)
        return batch <= most

    found = largest_batch.largest_batch(fits)
    assert found == (most if most < 64 else most // 8 * 8)
    assert len(asked) == len(set(asked)) <= 2 * most.bit_length() + 4 and max(asked) <= max(8, 2 * most)


def test_a_memory_without_a_bottom_and_one_without_room():
    assert largest_batch.largest_batch(lambda batch: True) == 2**16
    with pytest.raises(ValueError, match="not even a batch of 1 fits"):
        largest_batch.largest_batch(lambda batch: False)


def test_room_is_left_for_what_the_other_variants_keep():
    def needed(*names):
        return largest_batch.needed_bytes(1000, 10, names)

    assert needed("stock") == 1000 + 10 * 5
    assert needed("stock", "fused", "no-se") == 1000 + 10 * 9
    assert needed("stock", "graph", "tails+graph", "max-autotune") == 4000 + 10 * 11


@pytest.fixture
def gpu(monkeypatch):
    """A GPU of 100 kB whose steps take 1 kB per image; the batches that were tried."""
    tried, real = [], variants.Network.build

    def build(self, variant, case):
        tried.append((variant.name, case.batch, case.direction))
        if case.batch > 90:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory")
        real(self, variant, case)

    monkeypatch.setattr(variants.Network, "build", build)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (100_000, 200_000))

    def peak_bytes(step, device):
        step()
        return 1000 * tried[-1][1]

    monkeypatch.setattr(largest_batch, "peak_bytes", peak_bytes)
    return tried


def case_of(batch=model.LARGEST, mode="inference", **changes):
    fields = {"dtype": "float32", "amp": False, "layout": "contiguous"} | changes
    return variants.ModelCase("net", SIZE, batch, direction=mode, **fields)


@pytest.mark.networks
def test_a_batch_fits_if_a_step_of_stock_runs_and_there_is_room(file, gpu, monkeypatch):
    network = variants.Network(zoo.load(f"{file}:small"), SIZE, "cpu", None, 0)
    weights = sum(p.nbytes for p in zoo.load(f"{file}:small").parameters())
    for names, graphs in ((("stock",), 0), (("stock", "graph", "no-se"), 1)):
        fits = largest_batch.fits_in_training(network, case_of(), names, "cpu", 0)
        room = (95_000 - weights * (2 * len(names) + 3)) // (1000 * (1 + graphs))
        assert 2 < room < 90 and fits(room) and not fits(room + 1)
        assert not fits(91)  # out of memory
    assert {(name, mode) for name, _, mode in gpu} == {("stock", "training")}

    def results(self, variant):
        raise RuntimeError("another error")

    monkeypatch.setattr(largest_batch.Cell, "results", results)
    with pytest.raises(RuntimeError, match="another error"):
        fits(2)


def run(network, cases, names=("stock", "no-se")):
    return model_run.run([(network, cases)], model_run.Options(variants=names, settings=FAST), Quiet())


@pytest.mark.networks
def test_all_variants_and_modes_are_measured_with_it_and_larger_batches_are_left(file, monkeypatch):
    asked = []

    def fits_in_training(network, case, names, device, seed):
        asked.append((case.dtype, case.layout, tuple(names)))
        return lambda batch: batch <= 3

    monkeypatch.setattr(model_run, "fits_in_training", fits_in_training)
    cases = [case_of(batch, mode) for mode in model.MODES for batch in (2, 4, model.LARGEST)]
    rows = run(zoo.load(f"{file}:small"), [*cases, case_of(layout="channels_last"), case_of(5, dtype="bfloat16")])
    assert [(row["mode"], row["batch"], row["largest_batch"], row["provider"]) for row in rows[:12]] == [
        (mode, batch, batch == 3, name) for mode in model.MODES for batch in (2, 4, 3) for name in ("stock", "no-se")
    ]
    for row in rows:
        assert row["error"] is None
        if row["batch"] == 4:
            assert row["note"] == "not measured: a batch of 3 is the largest that fits in training"
        assert (row["median_s"] is None) == (row["batch"] == 4)
    # Once for all modes; not where only numbers are given.
    assert asked == [("float32", layout, ("stock", "no-se")) for layout in ("contiguous", "channels_last")]
    assert [row["batch"] for row in rows[12:]] == [3, 3, 5, 5]


def test_where_nothing_fits_that_is_the_rows_error(file, monkeypatch):
    tried = []
    monkeypatch.setattr(model_run, "fits_in_training", lambda *_, **how: lambda batch: tried.append(batch))
    rows = run(zoo.load(f"{file}:small"), [case_of(mode=mode) for mode in model.MODES])
    assert [row["error"] for row in rows] == ["ValueError: not even a batch of 1 fits in the GPU's memory"] * 4
    assert tried == [8, 4, 2, 1]
    model_report.render({}, rows, model_report.summarise(rows), io.StringIO())


def test_a_float32_that_does_not_fit_is_a_note(file, monkeypatch):
    def in_float32(self, network, name):
        raise torch.cuda.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(model_run.Cell, "in_float32", in_float32)
    rows = run(zoo.load(f"{file}:small"), [case_of(2, dtype="bfloat16")])
    for row in rows:
        assert row["note"] == "not compared with float32, which does not fit in the memory"
        assert row["error"] is row["output_error"] is None and row["median_s"] > 0


# ------------------------------------------------------------------------------------------------------ sweeps


def text_of(rows):
    out = io.StringIO()
    model_report.render({}, rows, model_report.summarise(rows), out, plain=True)
    return out.getvalue()


def cells_of(text, title):
    """The lines of a table below its head, cut at two blanks."""
    lines = text[text.index(title) :].splitlines()[1:]
    body = lines[: lines.index("")] if "" in lines else lines
    return [re.split(r"  +", line.strip()) for line in body if not set(line) <= set("─ ")]


def test_a_sweep_has_a_line_a_batch_and_the_best():
    rows = [
        model_row("stock", batch=64, median_s=0.1, price_of_se=1.25, largest_batch=False),
        model_row("no-se", batch=64, median_s=0.064, price_of_se=1.0, largest_batch=False),
        model_row("stock", batch=8, median_s=0.02, price_of_se=2.0),  # of a run that was saved before there were sweeps
        model_row("no-se", batch=8, median_s=0.01, price_of_se=1.0),
        model_row("stock", batch=96, median_s=0.2, price_of_se=1.6, largest_batch=True),
        model_row("no-se", batch=96, median_s=None, error="out of memory"),
    ]
    text, title = text_of(rows), "net: training, float16 by autocast, 3x8x8, channels_last"
    assert cells_of(text, f"images/s by batch, {title}") == [
        ["batch", "stock", "no-se"], ["8", "400", "800"], ["64", "640", "1000"], ["96 (max)", "480", "-"],
        ["best", "640 at 64", "1000 at 64"],
    ]  # fmt: skip
    assert cells_of(text, f"price of SE by batch, {title}") == [
        ["batch", "stock", "no-se"], ["8", "2.00", "1.00"], ["64", "1.25", "1.00"], ["96 (max)", "1.60", "-"],
    ]  # fmt: skip


def test_one_batch_is_no_sweep_and_without_no_se_there_is_no_price():
    assert "by batch" not in text_of(
        [model_row("stock", batch=8, median_s=0.1), model_row("stock", batch=16, median_s=None, error="lost")]
    )
    assert "by batch" not in text_of(
        [model_row("stock", batch=8, median_s=0.1), model_row("stock", batch=16, median_s=0.1, mode="inference")]
    )
    text = text_of([model_row("stock", batch=8, median_s=0.1), model_row("stock", batch=16, median_s=0.1)])
    assert "images/s by batch" in text and "price of SE by batch" not in text


@pytest.mark.networks
def test_a_sweep_is_saved_shown_again_and_compared(file, tmp_path, capsys):
    out = tmp_path / "out.json"
    argv = f"""{file}:small --size 3,6,5 --batch 2 3 --quick --budget 0.001 --threads 1 --mode inference --plain
        --providers stock fused no-se --json {out}""".split()
    assert cli.main(["bench", "model", *argv]) == 0
    shown = capsys.readouterr().out
    title = f"images/s by batch, {file}:small: inference, float32, 3x6x5, contiguous"
    assert [line[0] for line in cells_of(shown, title)] == ["batch", "2", "3", "best"]
    rows = json.loads(out.read_text())["rows"]
    assert {(row["batch"], row["largest_batch"]) for row in rows} == {(2, False), (3, False)}
    assert cli.main(["bench", "--from", str(out), "--plain"]) == 0
    assert cells_of(capsys.readouterr().out, title) == cells_of(shown, title)
    assert cli.main(["bench", "compare", str(out), str(out), "--plain"]) == 0
    assert "only in" not in capsys.readouterr().out
