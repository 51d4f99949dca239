"""The command line: exit statuses, what is refused before anything is measured, what is written."""

from __future__ import annotations

import json
import re
import subprocess
import sys

import pytest
import torch

import senet_fused
from senet_fused import backends, cli
from senet_fused.bench import command, providers, runner

TINY = ["--shape", "2,8,2,5,5", "--quick", "--budget", "0.001", "--cache-size", "0.01", "--threads", "1"]
NO_COMPILE = ["--providers", "eager", "fused"]


@pytest.fixture
def nothing_is_measured(monkeypatch):
    def run(*arguments):
        pytest.fail("the measurement has started")

    monkeypatch.setattr(runner, "run", run)


def wrong_fused(case, weights, form, backend):
    inner = providers.eager(case, weights, form)
    inner.name, stock = "fused", inner.forward
    inner.forward = lambda x, residual: stock(x, residual) * 1.01
    return inner


# ------------------------------------------------------------------------------------------------ dispatch


def test_the_module_runs_as_a_program():
    done = subprocess.run(
        [sys.executable, "-m", "senet_fused", "--version"], capture_output=True, text=True, timeout=120
    )
    assert (done.returncode, done.stdout) == (0, f"senet-fused {senet_fused.__version__}\n"), done.stderr


def test_help_imports_nothing_that_only_a_run_needs():
    code = (
        "import sys; from senet_fused import cli; from contextlib import suppress\n"
        "for words in (['bench'], ['bench', 'compare'], ['bench', 'model'], ['tune'], ['fuse-check'],\n"
        "              ['train']):\n"
        "    with suppress(SystemExit): cli.main([*words, '--help'])\n"
        "heavy = ['senet_fused.bench.runner', 'senet_fused.demo', 'matplotlib', 'rich', 'sklearn', 'triton',\n"
        "         'senet_fused.bench.model_run', 'senet_fused.bench.zoo', 'timm', 'torchvision', 'torchdata',\n"
        "         'senet_fused.train.session', 'senet_fused.models', 'tensorboard']\n"
        "print('imported:', [name for name in heavy if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.stdout.splitlines()[-1] == "imported: []", done.stderr
    for text in ("--problem", "--candidates", "bench compare before.json", "bench model seresnet50", "--fail-slower",
                 "FILE.py:FACTORY", "price of SE", "--sync-batchnorm"):  # fmt: skip
        assert text in done.stdout


def test_without_a_command_it_prints_help_and_fails(capsys):
    assert cli.main([]) == 2
    text = capsys.readouterr().out
    assert all(name in text for name in ("bench", "train", "tune", "doctor", "demo"))


@pytest.mark.parametrize("argv", [["train"], ["--wrong"], ["bench", "--dtype", "int8"], ["bench", "--budget", "0"]])
def test_wrong_usage_exits_with_2(argv, capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(argv)
    assert stop.value.code == 2
    assert "usage: senet-fused" in capsys.readouterr().err


def test_demo_is_the_training_demo(monkeypatch):
    from senet_fused.demo import command

    monkeypatch.setattr(command, "run", lambda args: 40 + args.seed)
    assert cli.main(["demo", "--seed", "2"]) == 42


# ------------------------------------------------------------------------------------------ bench, refused


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--problem", "senet155"], "unknown problem 'senet155'; known: senet154"),
        (["--shape", "8,256,56,56,x"], "cannot read the shape '8,256,56,56,x'; write N,C,R,H,W"),
        (["--shape", "8,256"], "cannot read the shape"),
        (["--shape", "8,16,2,9", "--layout", "channels_last"], "channels_last needs two or three"),
        (["--backend", "gpu"], "unknown backend 'gpu'; known: auto"),
        (["--json", "/no/such/folder/out.json"], "cannot write /no/such/folder/out.json: No such file"),
        (["--json", "/"], "it is a folder"),
        (["--plot", "out.txt"], "end it in .png"),
        (["--plot", "/no/such/folder/out.png"], "cannot write /no/such/folder/out.png"),
    ],
)
def test_a_request_that_cannot_be_met_exits_with_2_before_measuring(argv, message, capsys, nothing_is_measured):
    if "--plot" in argv:
        pytest.importorskip("matplotlib")
    assert cli.main(["bench", *argv]) == 2
    output = capsys.readouterr()
    assert output.err.startswith("senet-fused bench: error: ") and message in output.err
    assert output.out == ""


def test_checking_that_a_file_can_be_written_leaves_it_as_it_was(tmp_path, nothing_is_measured):
    old, new = tmp_path / "old.json", tmp_path / "new.json"
    old.write_text("kept")
    for path in (old, new):
        assert cli.main(["bench", "--json", str(path), "--backend", "gpu"]) == 2
    assert old.read_text() == "kept" and not new.exists()


def test_a_backend_that_cannot_run_here_is_refused_with_its_reason(monkeypatch, capsys, nothing_is_measured):
    status = [backends.BackendStatus("cpu", False, "the library is not there")]
    monkeypatch.setattr(backends, "status", lambda: status)
    assert cli.main(["bench", "--backend", "cpu"]) == 2
    assert "backend 'cpu' cannot run here: the library is not there" in capsys.readouterr().err


def test_cuda_without_a_gpu_is_refused(monkeypatch, capsys, nothing_is_measured):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert cli.main(["bench", "--device", "cuda"]) == 2
    error = capsys.readouterr().err
    assert "--device cuda: " in error and torch.__version__ in error and "use --device cpu" in error


def test_a_plot_without_matplotlib_is_refused(monkeypatch, capsys, tmp_path, nothing_is_measured):
    monkeypatch.setattr(command.importlib.util, "find_spec", lambda name: None)
    assert cli.main(["bench", "--plot", str(tmp_path / "out.png")]) == 2
    assert "--plot needs matplotlib: pip install" in capsys.readouterr().err


# ---------------------------------------------------------------------------------------------- bench, run


def test_the_problems_are_listed(capsys, nothing_is_measured):
    assert cli.main(["bench", "--list"]) == 0
    text = capsys.readouterr().out
    assert "senet154: act relu, gate sigmoid, followed by + shortcut" in text
    assert "2048/128 @ 7x7  x 3" in text and "efficientnet_b0: act silu" in text


def test_a_run_prints_a_table_and_writes_json_and_a_picture(tmp_path, capsys):
    pytest.importorskip("matplotlib")
    threads = torch.get_num_threads()
    argv = [
        "bench",
        *TINY,
        *NO_COMPILE,
        "--direction",
        "forward",
        "forward+backward",
        "--layout",
        "channels_last",
        "--dtype",
        "bfloat16",
        "--json",
        str(tmp_path / "out.json"),
        "--plot",
        str(tmp_path / "out.png"),
    ]
    assert cli.main(argv) == 0
    assert torch.get_num_threads() == threads
    output = capsys.readouterr()
    assert "shape: forward+backward, bfloat16" in output.out and "Geometric means" in output.out
    assert "[2/2] shape 2 x 8/2 @ 5x5 bfloat16 channels_last forward+backward" in output.err

    data = json.loads((tmp_path / "out.json").read_text())
    header, rows = data["header"], data["rows"]
    assert header["command"].startswith("senet-fused bench --shape 2,8,2,5,5")
    assert header["versions"]["torch"] == torch.__version__ and header["versions"]["python"]
    assert header["device"]["name"] and header["threads"] == 1
    assert header["cache"].startswith("cold, 0 MiB last-level cache") and header["date"][:2] == "20"
    assert {"revision", "cache_bytes", "samples", "load"} <= set(header)
    assert [(row["direction"], row["provider"]) for row in rows] == [
        (direction, provider)
        for direction in ("forward", "forward+backward")
        for provider in ("eager", "fused", "copy")
    ]
    wanted = """problem shape dtype layout direction provider backend median_s iqr_s speedup_vs_eager passes
        gbps fraction_of_copy max_error copies samples count""".split()
    assert all(row[key] is not None for row in rows for key in wanted)
    assert (tmp_path / "out.png").read_bytes().startswith(b"\x89PNG")


def test_a_wrong_output_makes_an_error_row_and_exit_status_1(monkeypatch, tmp_path, capsys):
    monkeypatch.setitem(providers.BUILDERS, "fused", wrong_fused)
    assert cli.main(["bench", *TINY, *NO_COMPILE, "--json", str(tmp_path / "out.json")]) == 1
    rows = {row["provider"]: row for row in json.loads((tmp_path / "out.json").read_text())["rows"]}
    assert rows["fused"]["error"].startswith("wrong output: y is off by") and rows["fused"]["median_s"] is None
    assert rows["eager"]["error"] is None and rows["eager"]["median_s"] > 0
    assert re.search(r"fused +ERROR wrong output: y is off", capsys.readouterr().out)


def test_options_reach_the_case_and_the_runner(monkeypatch):
    seen = {}

    def run(cases, options, progress, rows):
        seen.update(cases=cases, options=options, threads=torch.get_num_threads())
        return rows

    monkeypatch.setattr(runner, "run", run)
    argv = [
        "bench",
        "--problem",
        "regnet_y_16gf",
        "--batch",
        "3",
        "--no-bias",
        "--residual",
        "--post-act",
        "relu",
        "--gate",
        "tanh",
        "--backend",
        "reference",
        "--cache",
        "warm",
        "--cache-size",
        "4",
        "--budget",
        "7",
        "--providers",
        "fused",
        "eager",
        "--threads",
        "1",
    ]
    assert cli.main(argv) == 0
    cases, options = seen["cases"], seen["options"]
    assert len(cases) == 7 and {case.batch for case in cases} == {3}
    case = cases[0]
    assert (case.bias, case.residual, case.post_act, case.act, case.gate) == (
        False,
        True,
        "relu",
        "relu",
        "tanh",
    )
    assert (options.backend, options.caches, options.cache_bytes) == ("reference", ("warm",), 4 * 2**20)
    assert (options.settings.budget_s, options.providers) == (7, ("eager", "fused"))
    assert seen["threads"] == 1


def test_without_a_shape_the_problem_is_senet154(monkeypatch):
    seen = []
    monkeypatch.setattr(runner, "run", lambda cases, options, progress, rows: seen.extend(cases))
    assert cli.main(["bench"]) == 0
    assert {(case.problem, case.batch, case.bias) for case in seen} == {("senet154", 8, True)} and len(seen) == 4


def test_an_interrupted_run_keeps_what_is_done(monkeypatch, tmp_path, capsys):
    real, count = runner._Runner.case, []

    def case(self, case):
        count.append(case)
        if len(count) == 2:
            raise KeyboardInterrupt
        return real(self, case)

    monkeypatch.setattr(runner._Runner, "case", case)
    argv = [
        "bench",
        *TINY,
        *NO_COMPILE,
        "--layout",
        "contiguous",
        "channels_last",
        "--json",
        str(tmp_path / "out.json"),
    ]
    assert cli.main(argv) == 130
    data = json.loads((tmp_path / "out.json").read_text())
    assert len(data["rows"]) == 3 and data["header"]["interrupted"] == "after 1 of 2 cases"
    assert "after 1 of 2 cases" in capsys.readouterr().out
