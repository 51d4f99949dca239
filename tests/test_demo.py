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
from senet_fused import backends, handwritten_digits
from senet_fused.demo import comparison, digits
from senet_fused.demo.comparison import DemoFailure, Options, check_same_weights
from senet_fused.demo.network import SeparateTail, SEResNet, TutorialSE
from senet_fused.demo.side_by_side import Contender, accuracy, time_layers, train

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
    monkeypatch.setattr(comparison, "LAYER_ROUNDS", 2)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def demo(*words: str) -> int:
    parser = argparse.ArgumentParser(prog="senet-fused demo")
    digits.add_arguments(parser)
    return digits.run(parser.parse_args(words))


def post_act_se(channels: int) -> nn.Module:
    return senet_fused.FusedSE(channels, post_act="relu")


def network(make_se=TutorialSE, seed: int = 0) -> SEResNet:
    torch.manual_seed(seed)
    return SEResNet(make_se).to(memory_format=torch.channels_last)


def with_tails() -> SEResNet:
    return senet_fused.fuse(network(), tails=True)


NETWORKS = {
    "stock": network,
    "fused": lambda: network(senet_fused.FusedSE),
    "post_act": lambda: network(post_act_se),
    "tails": with_tails,
}


# ---- weights and curves


@pytest.mark.parametrize("kind", ["fused", "post_act", "tails"])
def test_one_seed_gives_all_networks_the_same_weights(kind):
    stock = network()
    after_stock = torch.rand(3)
    other = NETWORKS[kind]()
    assert torch.equal(torch.rand(3), after_stock), "the layers drew a different amount of random numbers"
    assert check_same_weights(stock, other) == len(stock.state_dict())


def test_other_weights_are_refused():
    stock = network()
    with pytest.raises(DemoFailure, match="differ"):
        check_same_weights(stock, network(senet_fused.FusedSE, seed=1))
    fused = network(senet_fused.FusedSE)
    with torch.no_grad():
        fused.se_layers()[2].fc2.weight[5, 1] += 1e-6
    with pytest.raises(DemoFailure, match=r"fc\.2\.weight and .*fc2\.weight differ"):
        check_same_weights(stock, fused)
    with pytest.raises(DemoFailure, match="parameters and buffers"):
        check_same_weights(stock, network(lambda channels: nn.Identity()))


def test_every_block_runs_with_tails():
    fused = with_tails()
    report = senet_fused.fuse_report(fused, tails=True)
    assert [block.status for block in report.blocks] == ["fused"] * 4
    assert {block.kind for block in report.blocks} == {"legacy SE bottleneck"}


class CutGate(TutorialSE):
    """Right forward, wrong backward: nothing flows through the gate."""

    def forward(self, x):
        return x * (super().forward(x.detach()) / x).detach().nan_to_num()


def curve(trained: SEResNet, steps: int = 4) -> list[float]:
    """The first losses of a run that is planned to be longer, so that its learning rate rises slowly."""
    generator = torch.Generator().manual_seed(3)
    images = torch.randn(1600, 1, 12, 12, generator=generator)
    targets = torch.randint(0, 10, (1600,), generator=generator)
    contender = Contender("one", trained, images.to(trained.classifier.weight.dtype))
    training = train([contender], targets, epochs=1, batch_size=16, seed=0)
    assert list(itertools.islice(training, steps)) == list(range(1, steps + 1))
    assert len(contender.step_s) == steps
    return contender.losses


def distance(first: list[float], second: list[float]) -> float:
    return max(abs(a - b) for a, b in zip(first, second, strict=True))


@pytest.mark.networks
@pytest.mark.parametrize("backend", SERVING)
@pytest.mark.parametrize("kind", ["fused", "post_act"])
def test_loss_curves_stay_close(backend, kind):
    steps = 3 if backend == "triton" and not torch.cuda.is_available() else 4  # the interpreter takes its time
    with senet_fused.use_backend(backend):
        losses = curve(NETWORKS[kind](), steps)
    assert set(senet_fused.call_counts()) <= {f"{backend}.forward", f"{backend}.backward"}
    assert senet_fused.call_counts()[f"{backend}.forward"] == 4 * steps
    stock = curve(network(), steps)
    assert distance(stock, losses) < 5e-5
    # The bound tells a right backward from a wrong one.
    assert distance(stock, curve(network(CutGate), steps)) > 5e-4


@pytest.mark.networks
@pytest.mark.parametrize("backend", [name for name in SERVING if torch.float64 in backends.dtypes(*name.values)])
def test_loss_curves_with_tails_stay_close(backend):
    """In float64: in float32, BatchNorm's rounding of either soon moves a value across a ReLU's zero."""
    tails, steps = with_tails().double(), 6
    senet_fused.reset_call_counts()
    with senet_fused.use_backend(backend):
        losses = curve(tails, steps)
    # Three in each of four blocks, and three behind the convolutions of shortcuts.
    calls = {f"{backend}.tail_forward": 15 * steps, f"{backend}.tail_backward": 15 * steps}
    if backend == "reference":
        del calls["reference.tail_backward"]  # it is PyTorch's own
    assert senet_fused.call_counts() == calls
    assert distance(curve(network().double(), steps), losses) < 1e-9


@pytest.mark.networks
def test_tails_drift_from_stock_as_far_as_one_ulp_does(extra):
    """Float32 training is chaotic, so seeds are paired: tails against stock, and stock on pixels one ulp off.

    That tells a network that learns something else; a wrong gradient is told by the curves in float64 above.
    """
    far: dict[str, list[list[float]]] = {"tails": [], "nudged": []}
    shares: dict[str, list[float]] = {"stock": [], "tails": [], "nudged": []}
    for seed in range(3):
        images, targets, held, held_targets = handwritten_digits.load_images(8, seed)
        made = comparison._contenders(Options(seed=seed), images, senet_fused.explain(images).backend)
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
        list(train([Contender("FusedSE", network(senet_fused.FusedSE), images)], torch.zeros(8).long(), 1, 8, 0))


def test_accuracy_counts_right_answers():
    logits = torch.eye(10).repeat(30, 1)[:, :, None, None]
    targets = torch.arange(300) % 10
    targets[:30] = (targets[:30] + 1) % 10
    assert accuracy(nn.Flatten(), logits, targets) == pytest.approx(0.9)


def test_nudge_moves_every_pixel_by_one_ulp():
    images = torch.tensor([0.0, 1.0, -3.5, 1e-3]).repeat(50).view(2, 1, 10, 10)
    nudged = comparison.nudge(images, seed=0)
    down, up = (torch.nextafter(images, torch.tensor(end)) for end in (-torch.inf, torch.inf))
    assert torch.equal((nudged == down) | (nudged == up), torch.ones_like(images).bool())
    assert (nudged == down).any() and (nudged == up).any()
    assert torch.equal(nudged, comparison.nudge(images, seed=0))


# ---- the SE layers alone


def test_inputs_of_the_tails_keep_shape_and_layout():
    stock = network()
    x = torch.randn(3, 1, 16, 16)
    inputs = stock.tail_inputs(x)
    shapes = [(3, 64, 16, 16), (3, 128, 8, 8), (3, 256, 4, 4), (3, 256, 4, 4)]
    assert [[tuple(t.shape) for t in some] for some in inputs] == [[shape] * 2 for shape in shapes]
    assert all(t.is_contiguous(memory_format=torch.channels_last) for some in inputs for t in some)
    y = SeparateTail(stock.blocks()[3].bn3, stock.se_layers()[3], nn.ReLU())(*inputs[3])
    torch.testing.assert_close(stock.classifier(y.mean((2, 3))), stock(x))


def test_time_layers_tells_right_from_wrong():
    layers = [TutorialSE(32), TutorialSE(64)]
    inputs = [(torch.randn(2, 32, 5, 5),), (torch.randn(2, 64, 3, 3),)]
    fused = [senet_fused.FusedSE.from_state_dict(layer.state_dict()) for layer in layers]
    passes, times = time_layers([layers, fused], inputs, rounds=3)
    assert [len(seconds) for seconds in passes] == [3, 3]
    assert [t.shape for t in times] == [(2, 32, 5, 5), (2, 64, 3, 3)]
    assert all(len(t.seconds) == len(t.errors) == 2 for t in times)
    assert max(max(t.errors) for t in times) < comparison.LARGEST_ERROR

    class Off(TutorialSE):
        def forward(self, x):
            return super().forward(x) + 1e-3 * x.mean()

    off = Off(64)
    off.load_state_dict(layers[1].state_dict())
    times = time_layers([layers, fused, [fused[0], off]], inputs, rounds=1)[1]
    assert times[0].errors[2] < comparison.LARGEST_ERROR < times[1].errors[2]
    assert max(times[1].errors[:2]) < comparison.LARGEST_ERROR


# ---- the whole job


@pytest.mark.parametrize(
    "more", [[], ["--fuse-tail", "--no-channels-last", "--no-nudged"], ["--no-tails", "--no-nudged"]]
)
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
    curves = report["loss"]
    compared = ["stock", "fused"] + ["tails"] * ("--no-tails" not in more)
    assert set(curves) == {*compared, *([] if more else ["nudged"])}
    assert {len(losses) for losses in curves.values()} == {1437 // 128}
    assert [curves[key][0] for key in compared] == pytest.approx([curves["stock"][0]] * len(compared), rel=1e-5)
    assert set(report["distance"]) == set(curves) - {"stock"}
    for key in compared[1:]:
        apart = [abs(a - b) for a, b in zip(curves["stock"], curves[key], strict=True)]
        assert report["distance"][key]["largest"] == max(apart)
        assert apart[report["distance"][key]["step"] - 1] == max(apart)
    assert report["backend"] == senet_fused.explain(torch.empty(1, 1, 1)).backend
    steps = 1437 // 128
    assert report["call_counts"][f"{report['backend']}.forward"] > 4 * steps
    if "tails" in compared:
        assert report["call_counts"][f"{report['backend']}.tail_forward"] > 15 * steps
    else:
        assert not any("tail" in name for name in report["call_counts"])
    for layers, keys in (("se_layers", ["stock", "fused"]), ("tail_layers", compared)):
        shapes = [[128, 64, 8, 8], [128, 128, 4, 4], [128, 256, 2, 2], [128, 256, 2, 2]]
        assert [layer["shape"] for layer in report[layers]] == shapes
        assert all(set(layer) == {"shape", "error", *keys} for layer in report[layers])
        assert all(set(layer["error"]) == set(keys) for layer in report[layers])
    for key, keys in (("step_s", compared), ("se_s", ["stock", "fused"]), ("tail_s", compared)):
        times = report[key]
        assert times["ratio"] == {other: times["stock"] / times[other] for other in keys[1:]}
    assert report["environment"]["threads"] == 1

    printed = capsys.readouterr().out
    assert "epoch 1: mean loss" in printed and "held-out accuracy" in printed
    assert f"FusedSE was served by the {report['backend']} backend" in printed
    tails_served = f"FusedSETail was served by the {report['backend']} backend"
    assert (tails_served in printed) == ("tails" in compared)
    assert ("one ulp off" in printed) == (not more)


def test_threads_are_set_for_the_run_alone(extra, monkeypatch, capsys):
    def compare(*_):
        raise DemoFailure(f"{torch.get_num_threads()} threads")

    monkeypatch.setattr(digits, "compare", compare)
    assert demo("--threads", "3") == 1
    assert "FAILED: 3 threads" in capsys.readouterr().err
    assert torch.get_num_threads() == 1


@pytest.mark.networks
def test_runs_with_one_seed_are_the_same(extra):
    options = Options(epochs=1, batch_size=256, image_size=8, nudged=False, seed=5)
    runs = [comparison.compare(options, lambda text: None, lambda line: None) for _ in range(2)]
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
    for name in ("tutorial SE", "FusedSE", "FusedSETail"):
        assert f"FAILED: {name}: accuracy" in err
    assert "wanted 97 % or more" in err


def test_backend_that_did_not_run_fails(extra, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(senet_fused, "explain", lambda x, **_: senet_fused.Choice("cpu", "as the test says"))
    with senet_fused.use_backend("reference"):
        words = ["--no-tails", "--no-nudged", "--min-accuracy", "0", "--out", str(tmp_path / "demo.png")]
        status = demo(*QUICK, *words)
    assert status == 1
    err = capsys.readouterr().err
    assert "backend cpu was to serve FusedSE, but reference ran" in err
    for direction in ("forward", "backward"):
        assert f"training calls cpu.{direction} 44 times, 0 were counted" in err


def test_tails_that_did_not_run_fail(extra, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(senet_fused, "fuse", lambda network, **_: network)
    words = ["--backend", "reference", "--no-nudged", "--min-accuracy", "0", "--out", str(tmp_path / "demo.png")]
    assert demo(*QUICK, *words) == 1
    assert "training calls reference.tail_forward 165 times, 0 were counted" in capsys.readouterr().err


def test_layer_that_is_off_is_a_problem():
    layer = {"shape": [1], "error": {"stock": 3e-3, "fused": 5e-3, "tails": 7e-3}}
    report = {"se_layers": [], "tail_layers": [layer], "accuracy": {}}
    (problem,) = comparison._problems(report, Options(), {})
    assert problem.startswith("FusedSETail, a tail on [1]: 7.0e-03 off")
    report["se_layers"] = [{"shape": [1], "error": {"stock": 1e-7, "fused": 2e-4}}]
    assert len(comparison._problems(report, Options(), {})) == 2


def test_other_first_loss_fails(extra, tmp_path, capsys, monkeypatch):
    class Halved(senet_fused.FusedSE):
        def forward(self, x, residual=None):
            return super().forward(x, residual) * 0.5

    monkeypatch.setattr(senet_fused, "FusedSE", Halved)
    assert demo(*QUICK, "--no-nudged", "--out", str(tmp_path / "demo.png")) == 1
    assert "FAILED: equal weights and batch, but losses" in capsys.readouterr().err


# ---- refusals


@pytest.fixture
def no_training(monkeypatch):
    def compare(*_):
        raise AssertionError("training started")

    monkeypatch.setattr(digits, "compare", compare)


@pytest.mark.parametrize(
    ("name", "modules"),
    [("scikit-learn", ["sklearn", "sklearn.datasets"]), ("matplotlib", ["matplotlib", "matplotlib.figure"])],
)
def test_missing_extra_is_named(name, modules, extra, no_training, monkeypatch, capsys):
    for module in modules:
        monkeypatch.setitem(sys.modules, module, None)
    assert demo() == 2
    err = capsys.readouterr().err
    assert f"{name} cannot be imported" in err and 'pip install "senet_fused[demo]"' in err


def test_backend_that_cannot_serve_is_refused(extra, no_training, monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(backends, "refusal", lambda *_: "it was not built")
    assert demo("--backend", "cpu", "--out", str(tmp_path / "demo.png")) == 2
    assert "it was not built" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("option", "name", "message"),
    [
        ("--out", "nowhere/demo.png", "no folder"),
        ("--out", "demo.exe", "no 'exe' pictures"),
        ("--out", "demo", "name a .png"),
        ("--out", "folder.png", "is a folder"),
        ("--json", "nowhere/demo.json", "no folder"),
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


# ---- small print


@pytest.mark.parametrize("rich", [True, False])
def test_lines_are_printed_on_a_terminal_with_and_without_rich(rich, monkeypatch, capsys):
    if rich:
        pytest.importorskip("rich", reason="rich is missing")
    else:
        monkeypatch.setitem(sys.modules, "rich", None)
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    with digits._Progress(2) as progress:
        progress.advance("loss 1")
        progress.say("epoch 1: [as it is]")
        progress.advance("loss 2")
    assert "epoch 1: [as it is]" in capsys.readouterr().out


def test_options_can_be_listed_without_the_extra():
    code = (
        "import argparse, sys; from senet_fused.demo import digits; "
        "digits.add_arguments(argparse.ArgumentParser()); "
        "print(sorted({'sklearn', 'matplotlib', 'rich'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.stdout.strip() == "[]", done.stderr
