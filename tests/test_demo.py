"""senet-fused demo on few steps of small images: what it checks and writes, how it refuses. No times."""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import subprocess
import sys

import pytest
import torch
from torch import nn

import senet_fused
from senet_fused import backends, cli, handwritten_digits
from senet_fused.bench import providers
from senet_fused.bench.timing import Settings
from senet_fused.demo import command, comparison
from senet_fused.demo.comparison import DemoFailure, check_same_weights, make_network
from senet_fused.demo.training import Contender, accuracy, nudge, train

SERVING = [
    pytest.param(status.name, marks=pytest.mark.skipif(not status.available, reason=f"{status.name}: {status.reason}"))
    for status in backends.status()
]
QUICK = ["--epochs", "1", "--batch-size", "128", "--image-size", "8"]


@pytest.fixture
def extra():
    for module in ("sklearn", "matplotlib"):
        pytest.importorskip(module, reason=f'{module} is missing: pip install "senet_fused[demo]"')


@pytest.fixture(autouse=True)
def small(monkeypatch):
    """One thread: beside other processes, two wait for each other longer than such small steps compute."""
    monkeypatch.setattr(comparison, "LAYER_SETTINGS", Settings(budget_s=0.0, min_rounds=2, sample_s=0.0, max_inner=1))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def demo(*words: str) -> int:
    return cli.main(["demo", *words])


def parsed(*words: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    return parser.parse_args(words)


# ---- weights and curves


@pytest.mark.parametrize("se", ["fused", "tails"])
def test_one_seed_gives_all_networks_the_same_weights(se):
    torch.manual_seed(1)
    before = torch.get_rng_state()
    stock, other = make_network("reference", 0), make_network(se, 0)
    assert torch.equal(torch.get_rng_state(), before)
    assert check_same_weights(stock, other) == len(stock.state_dict())


def test_other_weights_are_refused():
    stock = make_network("reference", 0)
    with pytest.raises(DemoFailure, match="differs"):
        check_same_weights(stock, make_network("fused", 1))
    fused = make_network("fused", 0)
    with torch.no_grad():
        fused.layer2[0].se_module.fc2.weight[5, 1] += 1e-6
    with pytest.raises(DemoFailure, match=r"layer2\.0\.se_module\.fc2\.weight differs"):
        check_same_weights(stock, fused)
    del fused.layer3[1].se_module
    with pytest.raises(DemoFailure, match="differs"):
        check_same_weights(stock, fused)


class CutGate(nn.Module):
    """An SE layer that is right forward and wrong backward: nothing flows through the gate."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x):
        return x * (self.layer(x.detach()) / x).detach().nan_to_num()


def with_cut_gates() -> nn.Module:
    network = make_network("reference", 0)
    for block in (*network.layer1, *network.layer2, *network.layer3):
        block.se_module = CutGate(block.se_module)
    return network


def curve(trained: nn.Module, steps: int = 4) -> list[float]:
    """The first losses of a run that is planned to be longer, so that its learning rate rises slowly."""
    generator = torch.Generator().manual_seed(3)
    images = torch.randn(1600, 1, 12, 12, generator=generator)
    targets = torch.randint(0, 10, (1600,), generator=generator)
    contender = Contender("one", trained, images.to(trained.last_linear.weight.dtype))
    training = train([contender], targets, epochs=1, batch_size=16, seed=0)
    assert list(itertools.islice(training, steps)) == list(range(1, steps + 1))
    assert len(contender.step_s) == steps
    return contender.losses


def distance(first: list[float], second: list[float]) -> float:
    return max(abs(a - b) for a, b in zip(first, second, strict=True))


@pytest.mark.networks
@pytest.mark.parametrize("backend", SERVING)
def test_loss_curves_stay_close(backend):
    steps = 3 if backend == "triton" and not torch.cuda.is_available() else 4  # the interpreter takes its time
    losses = curve(make_network("fused", 0, backend), steps)
    assert set(senet_fused.call_counts()) <= {f"{backend}.forward", f"{backend}.backward"}
    assert senet_fused.call_counts()[f"{backend}.forward"] == 4 * steps
    stock = curve(make_network("reference", 0), steps)
    assert distance(stock, losses) < 5e-5
    # The bound tells a right backward from a wrong one.
    assert distance(stock, curve(with_cut_gates(), steps)) > 5e-4


@pytest.mark.networks
@pytest.mark.parametrize("backend", [name for name in SERVING if torch.float64 in backends.dtypes(*name.values)])
def test_loss_curves_with_tails_stay_close(backend):
    """In float64: in float32, BatchNorm's rounding of either soon moves a value across a ReLU's zero."""
    tails, steps = make_network("tails", 0, backend).double(), 6
    senet_fused.reset_call_counts()
    losses = curve(tails, steps)
    # One in the stem, three in each of four blocks, and three behind the convolutions of shortcuts.
    calls = {f"{backend}.tail_forward": 16 * steps, f"{backend}.tail_backward": 16 * steps}
    if backend == "reference":
        del calls["reference.tail_backward"]  # it is PyTorch's own
    assert senet_fused.call_counts() == calls
    assert distance(curve(make_network("reference", 0).double(), steps), losses) < 1e-9


@pytest.mark.networks
def test_tails_drift_from_stock_as_far_as_one_ulp_does(extra):
    """Float32 training is chaotic, so seeds are paired: tails against stock, and stock on pixels one ulp off.

    That tells a network that learns something else; a wrong gradient is told by the curves in float64 above.
    """
    far: dict[str, list[list[float]]] = {"tails": [], "nudged": []}
    shares: dict[str, list[float]] = {"stock": [], "tails": [], "nudged": []}
    for seed in range(3):
        images, targets, held, held_targets = handwritten_digits.load_images(8, seed)
        made = comparison.contenders(parsed("--seed", str(seed)), images, senet_fused.explain(images).backend)
        made.pop("fused")
        list(train(list(made.values()), targets, epochs=3, batch_size=64, seed=seed))
        for key, contender in made.items():
            shares[key].append(accuracy(contender.network, held, held_targets))
            if key != "stock":
                far[key].append([abs(a - b) for a, b in zip(made["stock"].losses, contender.losses, strict=True)])
    for measure in (statistics.fmean, max):
        tails, nudged = (statistics.fmean(map(measure, far[key])) for key in ("tails", "nudged"))
        assert tails < 2 * nudged, f"{measure.__name__} of the distance: {tails:.3g}, by one ulp {nudged:.3g}"
    normal = shares["stock"] + shares["nudged"]
    spread = max(max(normal) - min(normal), 0.02)
    assert abs(statistics.fmean(shares["tails"]) - statistics.fmean(shares["stock"])) < spread, shares
    assert min(shares["tails"]) > 0.9, shares


def test_contenders_take_turns_on_the_same_batches():
    calls = []

    class Recorder(nn.Module):
        def __init__(self, name):
            super().__init__()
            self.name, self.layer = name, nn.Linear(4, 10)

        def forward(self, x):
            calls.append((self.name, x.flatten().tolist()))
            return self.layer(x.flatten(1))

    images, targets = torch.randn(12, 1, 2, 2), torch.randint(0, 10, (12,))
    contenders = [Contender(name, Recorder(name), images) for name in ("a", "b", "c")]
    list(train(contenders, targets, epochs=2, batch_size=5, seed=0))
    assert [name for name, _ in calls] == [*"abc", *"bca", *"cab", *"abc"]
    for i in range(0, len(calls), 3):
        assert calls[i][1] == calls[i + 1][1] == calls[i + 2][1]
    assert len({tuple(batch) for _, batch in calls}) == 4


def test_loss_that_is_not_finite_stops_training():
    images = torch.full((8, 1, 8, 8), float("nan"))
    with pytest.raises(FloatingPointError, match="FusedSE: the loss of step 1 is nan"):
        list(train([Contender("FusedSE", make_network("fused", 0), images)], torch.zeros(8).long(), 1, 8, 0))


def test_accuracy_counts_right_answers():
    logits = torch.eye(10).repeat(30, 1)[:, :, None, None]
    targets = torch.arange(300) % 10
    targets[:30] = (targets[:30] + 1) % 10
    assert accuracy(nn.Flatten(), logits, targets) == pytest.approx(0.9)


def test_nudge_moves_every_pixel_by_one_ulp():
    images = torch.tensor([0.0, 1.0, -3.5, 1e-3]).repeat(50).view(2, 1, 10, 10)
    nudged = nudge(images, seed=0)
    down, up = (torch.nextafter(images, torch.tensor(end)) for end in (-torch.inf, torch.inf))
    assert torch.equal((nudged == down) | (nudged == up), torch.ones_like(images).bool())
    assert (nudged == down).any() and (nudged == up).any()
    assert torch.equal(nudged, nudge(images, seed=0))


# ---- the layers alone


@pytest.mark.parametrize("op", ["se", "tail"])
def test_the_layers_that_are_timed_are_those_of_the_network(op):
    network, found = make_network("tails", 0), []
    blocks = (*network.layer1, *network.layer2, *network.layer3)
    for block in blocks:
        block.tail3.register_forward_pre_hook(lambda module, inputs: found.append(inputs[0]))
    network(torch.randn(3, 1, 13, 13).contiguous(memory_format=torch.channels_last))
    cases = comparison.layer_cases(parsed("--batch-size", "3", "--image-size", "13"), op)
    counted = [case for case in cases for _ in range(case.shape.count)]
    assert [case.size for case in counted] == [tuple(x.shape) for x in found]
    assert [case.shape.rd_channels for case in counted] == [block.se_module.rd_channels for block in blocks]
    assert all(x.is_contiguous(memory_format=torch.channels_last) for x in found)
    assert {case.layout for case in cases} == {"channels_last"} and {case.op for case in cases} == {op}


# ---- the whole job


@pytest.mark.parametrize("more", [[], ["--no-tails", "--no-nudged"]])
def test_run_writes_picture_and_json(extra, tmp_path, capsys, more):
    picture, figures = tmp_path / "demo.png", tmp_path / "demo.json"
    random_state = torch.get_rng_state()
    words = [*QUICK, "--min-accuracy", "0", "--out", str(picture), "--json", str(figures), *more]
    assert demo(*words) == 0
    assert torch.get_num_threads() == 1
    assert torch.equal(torch.get_rng_state(), random_state)

    assert picture.read_bytes().startswith(b"\x89PNG\r\n")
    report = json.loads(figures.read_text())
    assert report["problems"] == []
    curves, steps, backend = report["loss"], 1437 // 128, report["backend"]
    compared = ["stock", "fused"] + ["tails"] * ("--no-tails" not in more)
    assert set(curves) == {*compared, *([] if more else ["nudged"])}
    assert {len(losses) for losses in curves.values()} == {steps}
    assert [curves[key][0] for key in compared] == pytest.approx([curves["stock"][0]] * len(compared), rel=1e-5)
    assert set(report["distance"]) == set(curves) - {"stock"}
    for key in compared[1:]:
        apart = [abs(a - b) for a, b in zip(curves["stock"], curves[key], strict=True)]
        assert report["distance"][key]["largest"] == max(apart)
        assert apart[report["distance"][key]["step"] - 1] == max(apart)
    assert backend == senet_fused.explain(torch.empty(1, 1, 1)).backend
    assert report["call_counts"][f"{backend}.forward"] > 4 * steps
    if "tails" in compared:
        assert report["call_counts"][f"{backend}.tail_forward"] > 16 * steps
    else:
        assert not any("tail" in name for name in report["call_counts"])
    rows = report["layers"]
    shapes = ["128,64,4,8,8", "128,128,8,4,4", "128,256,16,2,2"]
    for op, names in (("se", ["stock", "fused"]), ("tail", ["stock", "tails"] * ("tails" in compared))):
        part = comparison.PARTS[op][0]
        for provider, key in zip(("eager", "fused"), names, strict=False):
            mine = [row for row in rows if (row.get("op", "se"), row["provider"]) == (op, provider)]
            assert [row["shape"] for row in mine] == shapes and [row["count"] for row in mine] == [1, 1, 2]
            assert {row["backend"] for row in mine} == {"aten" if key == "stock" else backend}
            total = sum(row["count"] * row["median_s"] for row in mine)
            assert report["median_s"][part][key] == pytest.approx(total)
        assert sorted(report["median_s"].get(part, [])) == sorted(names)
    assert set(report["median_s"]["training step"]) == set(compared) == set(report["steps"])
    assert report["environment"]["threads"] == 1

    printed = capsys.readouterr().out
    assert "epoch 1: mean loss" in printed and "held-out accuracy" in printed
    assert f"FusedSE ran on the {backend} backend" in printed
    assert (f"FusedSETail ran on the {backend} backend" in printed) == ("tails" in compared)
    assert ("one ulp off" in printed) == (not more)


def test_threads_are_set_for_the_run_alone(extra, monkeypatch, capsys):
    def compare(*_):
        raise DemoFailure(f"{torch.get_num_threads()} threads")

    monkeypatch.setattr(command, "compare", compare)
    assert demo("--threads", "3") == 1
    assert "FAILED: 3 threads" in capsys.readouterr().err
    assert torch.get_num_threads() == 1


@pytest.mark.networks
def test_runs_with_one_seed_are_the_same(extra):
    args = parsed("--epochs", "1", "--batch-size", "256", "--image-size", "8", "--no-nudged", "--seed", "5")
    runs = [comparison.compare(args) for _ in range(2)]
    assert runs[0]["loss"] == runs[1]["loss"]
    assert runs[0]["accuracy"] == runs[1]["accuracy"]


def test_images_are_split_by_seed_with_every_digits_share(extra):
    images, targets, held, held_targets = handwritten_digits.load_images(16, seed=0)
    assert images.shape == (1437, 1, 16, 16) and held.shape == (360, 1, 16, 16)
    assert len(targets) + len(held_targets) == handwritten_digits.IMAGES
    assert images.mean().abs() < 1e-5 and images.std() == pytest.approx(1, abs=1e-5)
    assert ((targets.bincount() / 4 - held_targets.bincount()).abs() < 1.5).all()
    assert torch.equal(handwritten_digits.load_images(16, seed=0)[3], held_targets)
    assert not torch.equal(handwritten_digits.load_images(16, seed=1)[3], held_targets)


def test_low_accuracy_fails_but_is_shown(extra, tmp_path, capsys):
    picture = tmp_path / "demo.png"
    assert demo(*QUICK, "--no-nudged", "--out", str(picture)) == 1
    out, err = capsys.readouterr()
    assert "training step" in out and picture.exists()
    for name in ("PyTorch", "FusedSE", "FusedSETail"):
        assert f"FAILED: {name}: accuracy" in err
    assert "must be at least 97 %" in err


def test_backend_that_did_not_run_fails(extra, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(senet_fused, "explain", lambda x, **_: senet_fused.Choice("cpu", "as the test says"))
    with senet_fused.use_backend("reference"):
        words = ["--no-tails", "--no-nudged", "--min-accuracy", "0", "--out", str(tmp_path / "demo.png")]
        status = demo(*QUICK, *words)
    assert status == 1
    err = capsys.readouterr().err
    assert "FusedSE must run on backend cpu, but reference ran" in err
    for direction in ("forward", "backward"):
        assert f"training calls cpu.{direction} 44 times, but 0 calls were counted" in err


def test_tails_that_did_not_run_fail(extra, tmp_path, capsys, monkeypatch):
    real = comparison.make_network
    monkeypatch.setattr(comparison, "make_network", lambda se, seed, backend: real("reference", seed))
    words = ["--backend", "reference", "--no-nudged", "--min-accuracy", "0", "--out", str(tmp_path / "demo.png")]
    assert demo(*QUICK, *words) == 1
    assert "training calls reference.tail_forward 176 times, but 0 calls were counted" in capsys.readouterr().err


def test_a_layer_that_is_wrong_fails_but_is_shown(extra, tmp_path, capsys, monkeypatch):
    real = providers.BUILDERS["fused"]

    def wrong(case, weights, form, backend):
        provider = real(case, weights, form, backend)
        forward, off = provider.forward, 1.01 if case.op == "tail" else 1
        provider.forward = lambda x, residual: forward(x, residual) * off
        return provider

    monkeypatch.setitem(providers.BUILDERS, "fused", wrong)
    picture = tmp_path / "demo.png"
    assert demo(*QUICK, "--no-nudged", "--min-accuracy", "0", "--out", str(picture)) == 1
    out, err = capsys.readouterr()
    assert "FAILED: BatchNorm to ReLU, 128 x 256/16 @ 2x2, fused: wrong output: y is off by" in err
    assert "FAILED: SE layers" not in err and "training step" in out and picture.exists()


def test_other_first_loss_fails(extra, tmp_path, capsys, monkeypatch):
    real = senet_fused.FusedSE.forward
    monkeypatch.setattr(senet_fused.FusedSE, "forward", lambda self, *inputs: real(self, *inputs) * 0.5)
    assert demo(*QUICK, "--no-nudged", "--out", str(tmp_path / "demo.png")) == 1
    assert "FAILED: equal weights and batch, but losses" in capsys.readouterr().err


# ---- refusals


@pytest.fixture
def no_training(monkeypatch):
    def compare(*_):
        raise AssertionError("training started")

    monkeypatch.setattr(command, "compare", compare)


@pytest.mark.parametrize("name", ["sklearn.datasets", "matplotlib.figure"])
def test_missing_extra_is_named(name, extra, no_training, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, name, None)
    assert demo() == 2
    err = capsys.readouterr().err
    assert name in err and 'pip install "senet_fused[demo]"' in err


def test_backend_that_cannot_serve_is_refused(extra, no_training, monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(backends, "refusal", lambda *_: "it was not built")
    assert demo("--backend", "cpu", "--out", str(tmp_path / "demo.png")) == 2
    assert "it was not built" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("option", "name", "message"),
    [
        ("--out", "nowhere/demo.png", "cannot write nowhere/demo.png: No such file"),
        ("--out", "demo.exe", "end it in .png"),
        ("--out", "demo", "end it in .png"),
        ("--out", "folder.png", "is a folder"),
        ("--json", "nowhere/demo.json", "cannot write nowhere/demo.json: No such file"),
        ("--json", "folder.png", "is a folder"),
    ],
)
def test_output_that_cannot_be_written_is_refused(
    option, name, message, extra, no_training, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder.png").mkdir()
    assert demo(option, name) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    "words",
    [
        ["--epochs", "0"],
        ["--epochs", "many"],
        ["--batch-size", "1"],
        ["--batch-size", "1438"],
        ["--image-size", "7"],
        ["--seed", "-1"],
        ["--threads", "0"],
        ["--min-accuracy", "101"],
        ["--min-accuracy", "nan"],
        ["--backend", "gpu"],
        ["--epoch-size", "3"],
    ],
)
def test_bad_arguments_are_refused(words, no_training, capsys):
    with pytest.raises(SystemExit) as stopped:
        demo(*words)
    assert stopped.value.code == 2
    assert words[0] in capsys.readouterr().err


def test_options_can_be_listed_without_the_extra():
    code = (
        "import argparse, sys; from senet_fused.demo import command; "
        "command.add_arguments(argparse.ArgumentParser()); "
        "print(sorted({'sklearn', 'matplotlib', 'rich'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.stdout.strip() == "[]", done.stderr
