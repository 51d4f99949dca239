"""senet-fused train in one process: what it learns and leaves, how it resumes to the bit, stops, and refuses."""

from __future__ import annotations

import argparse
import contextlib
import csv
import gc
import math
import os
import signal
import subprocess
import sys
import time
import warnings
import weakref
from pathlib import Path

import pytest
import torch
from torch import nn

import senet_fused
from senet_fused.arguments import RequestError
from senet_fused.train import checkpoint, command, curves, logs, loop, network, processes, session
from senet_fused.train.evaluation import Accuracy, evaluate
from senet_fused.train.items import NO_CLASS
from senet_fused.train.processes import Processes
from senet_fused.train.schedule import make_schedule, paper_rate, paper_step_epochs

pytest.importorskip("torchdata", reason='torchdata is missing: pip install "senet_fused[train]"')

KERNELS = pytest.mark.skipif(
    senet_fused.explain(torch.empty(0)).backend == "reference", reason="the compiled CPU library is not installed"
)
PACKAGE = Path(senet_fused.__file__).parent
TINY = Path(__file__).with_name("train_networks.py")
# 40 training images, so 5 steps of 8 an epoch.
DATA = ["--data", "synthetic:6,40,13", "--size", "8", "--batch-size", "8"]
QUIET = ["--tensorboard", "off", "--plain"]
EVERYTHING = ["--model", f"{TINY}:Tiny", *DATA, "--epochs", "3", "--lr", "0.05", "--ema", "0.8", "--drop-path", "0.3",
              "--dropout", "0.2", "--label-smoothing", "0.1", "--nesterov", "--schedule", "cosine", "--warmup", "0.5",
              *QUIET]  # fmt: skip


@pytest.fixture(autouse=True)
def no_picture(request, monkeypatch):
    """Drawing takes longer than these runs."""
    if "curves" not in request.node.name and "leaves_its_files" not in request.node.name:
        monkeypatch.setattr(session.curves, "draw", lambda folder: folder / "curves.png")


def arguments(*words: object) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="senet-fused train")
    command.add_arguments(parser)
    return parser.parse_args([str(word) for word in words])


def train(*words: object) -> int:
    return command.run(arguments(*words))


def rows(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def assert_same_state(first, second, place: str = "state") -> None:
    """Equal to the bit, whatever is nested in whatever."""
    assert type(first) is type(second), place
    if isinstance(first, dict):
        assert first.keys() == second.keys(), place
        for key in first:
            assert_same_state(first[key], second[key], f"{place}.{key}")
    elif isinstance(first, (list, tuple)):
        assert len(first) == len(second), place
        for index, pair in enumerate(zip(first, second, strict=True)):
            assert_same_state(*pair, f"{place}.{index}")
    elif isinstance(first, torch.Tensor):
        assert first.dtype == second.dtype and torch.equal(first, second), place
    else:
        assert first == second, place


# ------------------------------------------------------------------------------------------------ a whole run


@KERNELS
def test_a_run_learns_and_leaves_its_files(tmp_path, capsys):
    pytest.importorskip("matplotlib")
    pytest.importorskip("tensorboard")
    words = ["--model", f"{TINY}:Tiny", *DATA, "--epochs", "12", "--lr", "0.3", "--ema", "0.5", "--plain"]
    assert train(*words, "--output", tmp_path) == 0
    steps, epochs = rows(tmp_path / "log.csv"), rows(tmp_path / "epochs.csv")
    assert [int(row["step"]) for row in steps] == list(range(1, 61))
    assert [int(row["epoch"]) for row in steps] == [epoch for epoch in range(1, 13) for _ in range(5)]
    assert tuple(steps[0]) == logs.STEPS and tuple(epochs[0]) == logs.EPOCHS
    for epoch, row in enumerate(epochs):
        losses = [float(step["loss"]) for step in steps[5 * epoch : 5 * epoch + 5]]
        assert float(row["train_loss"]) == pytest.approx(sum(losses) / 5)
    assert float(epochs[-1]["train_loss"]) < 0.7 * float(epochs[0]["train_loss"])
    assert float(epochs[-1]["accuracy"]) >= 0.6 and float(epochs[-1]["ema_accuracy"]) >= 0.6  # by chance: 0.17
    assert float(epochs[-1]["top5"]) >= float(epochs[-1]["accuracy"])
    assert (tmp_path / "curves.png").read_bytes()[:4] == b"\x89PNG"
    assert list(tmp_path.glob("events.out.tfevents.*"))
    model = network.make_network(session.settings_of(arguments(*words, "--device", "cpu"), 1), 6, (3, 8, 8))
    state = checkpoint.load(tmp_path)
    for name in ("model.pt", "model_ema.pt"):
        model.load_state_dict(torch.load(tmp_path / name, weights_only=True))
    assert_same_state(dict(state["model"]), dict(torch.load(tmp_path / "model.pt", weights_only=True)))
    assert_same_state(
        {k[7:]: v for k, v in state["ema"].items() if k.startswith("module.")},
        dict(torch.load(tmp_path / "model_ema.pt", weights_only=True)),
    )
    text = capsys.readouterr().out
    # 3 tails a network; an epoch is 5 training batches and 2 of 13 held-out images, for the network and its average.
    assert f"cpu.tail_backward {60 * 3} times, cpu.tail_forward {(60 + 12 * 2 * 2) * 3} times" in text
    assert "Effective batch: 8 = 8 x 1 accumulated x 1 process; 5 steps an epoch" in text
    assert "3 FusedSETail" in text and "Backend: cpu" in text and "accuracy on 13 held-out images" in text


@KERNELS
@pytest.mark.parametrize(
    ("fuse", "served"),
    [("none", {}), ("se", {"forward", "backward"}), ("tails", {"tail_forward", "tail_backward"})],
)
def test_fuse_decides_what_serves_our_networks(fuse, served, tmp_path, capsys):
    words = ["--model", "se_resnet20", *DATA, *QUIET, "--max-steps", "1", "--fuse", fuse, "--output", tmp_path]
    assert train(*words) == 0
    assert set(senet_fused.call_counts()) == {f"cpu.{name}" for name in served}
    assert ("21 FusedSETail" in capsys.readouterr().out) == (fuse == "tails")


def test_the_twin_has_no_se_layers(tmp_path, capsys):
    assert train("--model", "se_resnet20", *DATA, *QUIET, "--max-steps", "1", "--no-se", "--output", tmp_path) == 0
    assert not [name for name in checkpoint.load(tmp_path)["model"] if "se_module" in name]
    assert "SE: none (the twin without SE)" in capsys.readouterr().out


@KERNELS
def test_fuse_converts_the_layers_of_other_networks(tmp_path, capsys):
    words = ["--model", f"{TINY}:tutorial", *DATA, *QUIET, "--max-steps", "2", "--output", tmp_path]
    assert train(*words, "--fuse", "se") == 0
    assert senet_fused.call_counts() == {"cpu.forward": 2, "cpu.backward": 2}
    assert "1 SE layer: 1 fused" in capsys.readouterr().out


# ------------------------------------------------------------------------------------------------ resuming


@pytest.mark.networks
@pytest.mark.parametrize(
    "options",
    [
        pytest.param([], id="plain"),
        pytest.param(["--accumulate", "2", "--batch-size", "4"], id="accumulate"),
        pytest.param(["--workers", "2"], id="workers"),
        pytest.param(["--amp", "bf16"], id="bf16"),
    ],
)
def test_a_resumed_run_ends_in_the_same_bits(options, tmp_path):
    """Stopped within an epoch and at the end of one, it goes on with the images, noise and rates it would have had."""
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert train(*EVERYTHING, *options, "--output", whole) == 0
    for stop in (3, 10, 12):
        assert train(*EVERYTHING, *options, "--output", parts, "--max-steps", stop, *["--resume"] * (stop > 3)) == 0
        assert not (parts / "model.pt").exists()
    assert train(*EVERYTHING, *options, "--output", parts, "--resume") == 0
    for name in ("model.pt", "model_ema.pt"):
        expected, found = (torch.load(folder / name, weights_only=True) for folder in (whole, parts))
        assert_same_state(dict(expected), dict(found), name)
    expected, found = checkpoint.load(whole), checkpoint.load(parts)
    for state in (expected, found):
        for name in ("seconds", "log_offsets"):
            state.pop(name)
    assert_same_state(expected, found)
    timeless = [
        [{k: v for k, v in row.items() if k not in ("images_per_second", "seconds")} for row in rows(folder / name)]
        for name in ("log.csv", "epochs.csv") for folder in (whole, parts)
    ]  # fmt: skip
    assert timeless[0] == timeless[1] and timeless[2] == timeless[3]
    assert len(timeless[0]) == 15 and len(timeless[2]) == 3


def test_the_comparison_of_bits_sees_a_resumed_run_without_its_random_state(tmp_path, monkeypatch):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert train(*EVERYTHING, "--output", whole) == 0
    assert train(*EVERYTHING, "--output", parts, "--max-steps", 3) == 0
    monkeypatch.setattr(loop.checkpoint, "set_rng_state", lambda state: None)
    assert train(*EVERYTHING, "--output", parts, "--resume") == 0
    with pytest.raises(AssertionError, match=r"\.\w"):
        assert_same_state(*(dict(torch.load(folder / "model.pt", weights_only=True)) for folder in (whole, parts)))


def test_rows_behind_the_checkpoint_are_cut_off(tmp_path):
    assert train(*EVERYTHING, "--output", tmp_path, "--max-steps", "3") == 0
    before = (tmp_path / "log.csv").read_text()
    with (tmp_path / "log.csv").open("a") as file:
        file.write("4,1,9.9,0.1,1\n5,1,9.9,0.1,1\n6,1,9")  # as of a killed run
    assert train(*EVERYTHING, "--output", tmp_path, "--max-steps", "6", "--resume") == 0
    assert (tmp_path / "log.csv").read_text().startswith(before)
    assert [row["step"] for row in rows(tmp_path / "log.csv")] == list("123456")


def test_a_resumed_run_without_its_logs_says_so(tmp_path, capsys):
    assert train(*EVERYTHING, "--output", tmp_path / "a", "--max-steps", "3") == 0
    words = ["--output", tmp_path / "b", "--max-steps", "4", "--resume", tmp_path / "a" / "last.pt"]
    assert train(*EVERYTHING, *words) == 0
    assert [row["step"] for row in rows(tmp_path / "b" / "log.csv")] == ["4"]
    (tmp_path / "b" / "log.csv").unlink()
    capsys.readouterr()
    assert train(*EVERYTHING, "--output", tmp_path / "b", "--max-steps", "5", "--resume") == 0
    assert [row["step"] for row in rows(tmp_path / "b" / "log.csv")] == ["5"]
    assert "log.csv is not as long as it was" in capsys.readouterr().out


def test_logs_of_another_run_are_not_continued(tmp_path):
    assert train(*EVERYTHING, "--output", tmp_path / "a", "--max-steps", "3") == 0
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "log.csv").write_text("step,of,another,run\n" * 100)
    words = ["--output", tmp_path / "b", "--max-steps", "4", "--resume", tmp_path / "a" / "last.pt"]
    assert train(*EVERYTHING, *words) == 0
    assert [row["step"] for row in rows(tmp_path / "b" / "log.csv")] == ["4"]


def test_a_finished_run_is_left_as_it_is(tmp_path):
    words = ["--model", f"{TINY}:Tiny", *DATA, *QUIET, "--epochs", "1", "--output", tmp_path]
    assert train(*words) == 0
    before = (tmp_path / "last.pt").read_bytes(), (tmp_path / "model.pt").read_bytes()
    assert train(*words, "--resume") == 0
    assert ((tmp_path / "last.pt").read_bytes(), (tmp_path / "model.pt").read_bytes()) == before


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (["--lr", "0.06"], "--lr was 0.05 and is 0.06"),
        (["--epochs", "4"], "--epochs was 3 and is 4"),
        (["--batch-size", "4", "--accumulate", "2"], "--batch-size was 8 and is 4; --accumulate was 1 and is 2"),
        (["--seed", "1"], "--seed was 0 and is 1"),
        (["--data", "synthetic:6,48,13"], "--data was synthetic:6,40,13 and is synthetic:6,48,13"),
        (["--no-augment"], "--augment was True and is False"),
        (["--data", "synthetic:7,40,13"], "classes is 6 in the checkpoint and 7 here"),
        (["--model", f"{TINY}:tutorial", "--drop-path", "0", "--dropout", "0"], "another model"),
    ],
)  # fmt: skip
def test_resuming_with_other_settings_is_refused(options, named, tmp_path):
    assert train(*EVERYTHING, "--output", tmp_path, "--max-steps", "1") == 0
    before = (tmp_path / "last.pt").read_bytes()
    with pytest.raises(RequestError) as refusal:
        train(*EVERYTHING, *options, "--output", tmp_path, "--resume")
    assert named in str(refusal.value)
    assert (tmp_path / "last.pt").read_bytes() == before


def test_resuming_with_another_network_of_the_same_name_is_refused(tmp_path):
    file = tmp_path / "mine.py"
    code = "from torch import nn\ndef net(): return nn.Sequential(nn.Flatten(), nn.Linear(192, {}), nn.Linear({}, 6){})"
    words = ["--model", f"{file}:net", *DATA, *QUIET, "--fuse", "none", "--output", tmp_path / "run"]
    file.write_text(code.format(4, 4, ""))
    assert train(*words, "--max-steps", "1") == 0
    for changed, message in {
        code.format(5, 5, ""): r"another network .* 1\.weight is \[4, 192\] in the checkpoint and \[5, 192\] here; .*",
        code.format(4, 4, ", nn.BatchNorm1d(6)"): "3.weight is absent in the checkpoint .*; and 2 more",
    }.items():
        file.write_text("# changed\n" * len(message) + changed)  # of another size, so that no old bytecode is taken
        with pytest.raises(RequestError, match=message):
            train(*words, "--resume")


@pytest.mark.networks
def test_the_checkpoint_is_not_kept_in_memory(tmp_path, monkeypatch):
    assert train(*EVERYTHING, "--output", tmp_path, "--max-steps", "1") == 0
    load, run, kept, alive = checkpoint.load, loop.Trainer.run, [], []

    def loaded(path):
        state = load(path)
        kept.append(weakref.ref(state["model"]["fc.weight"]))
        return state

    def recorded(self):
        gc.collect()
        alive.append(kept[0]() is not None)
        return run(self)

    monkeypatch.setattr(checkpoint, "load", loaded)
    monkeypatch.setattr(loop.Trainer, "run", recorded)
    assert train(*EVERYTHING, "--output", tmp_path, "--max-steps", "2", "--resume") == 0
    assert alive == [False]


def test_a_folder_with_a_checkpoint_is_not_overwritten(tmp_path):
    assert train(*EVERYTHING, "--output", tmp_path, "--max-steps", "1") == 0
    with pytest.raises(RequestError, match="--resume goes on from it"):
        train(*EVERYTHING, "--output", tmp_path)


# ------------------------------------------------------------------------------------------------ the loop


def test_accumulated_steps_are_those_of_the_whole_batch(tmp_path):
    """Without BatchNorm, whose statistics are a micro-batch's, in float64."""
    words = ["--model", f"{TINY}:plain_double", *DATA, *QUIET, "--epochs", "2", "--lr", "0.1"]
    assert train(*words, "--output", tmp_path / "whole") == 0
    assert train(*words, "--batch-size", "2", "--accumulate", "4", "--output", tmp_path / "parts") == 0
    whole, parts = (torch.load(tmp_path / name / "model.pt", weights_only=True) for name in ("whole", "parts"))
    for name in whole:
        torch.testing.assert_close(parts[name], whole[name], rtol=1e-12, atol=1e-14)
    for a, b in zip(rows(tmp_path / "whole" / "log.csv"), rows(tmp_path / "parts" / "log.csv"), strict=True):
        assert float(a["loss"]) == pytest.approx(float(b["loss"]), rel=1e-6)


def test_the_average_is_the_one_that_is_asked_for(tmp_path, monkeypatch):
    seen = []
    step = loop.Trainer._step

    def recorded(self, batches):
        loss = step(self, batches)
        seen.append({k: v.clone() for k, v in self.learner.network.state_dict().items()})
        return loss

    monkeypatch.setattr(loop.Trainer, "_step", recorded)
    words = ["--model", f"{TINY}:Tiny", *DATA, *QUIET, "--epochs", "1", "--ema", "0.7", "--output", tmp_path]
    assert train(*words) == 0
    expected = seen[0]
    for state in seen[1:]:
        expected = {k: 0.7 * v + 0.3 * state[k] if v.is_floating_point() else v for k, v in expected.items()}
    found = torch.load(tmp_path / "model_ema.pt", weights_only=True)
    for name, value in expected.items():
        if value.is_floating_point():
            torch.testing.assert_close(found[name], value, msg=lambda text, name=name: f"{name}: {text}")
    assert any("running_mean" in name for name in found)


def test_fp16_skips_steps_and_goes_on(tmp_path, monkeypatch):
    """Its first scale is too large for these gradients; that is no error, and a run that is resumed keeps the scale."""
    monkeypatch.setattr(torch.amp.GradScaler, "__init__", _scaler_from(2.0**60))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        words = ["--model", f"{TINY}:Tiny", *DATA, *QUIET, "--epochs", "2", "--amp", "fp16", "--output", tmp_path]
        assert train(*words, "--max-steps", "3") == 0
        first = checkpoint.load(tmp_path)
        assert first["scaler"]["scale"] < 2.0**60
        untouched = network.make_network(session.settings_of(arguments(*words, "--device", "cpu"), 1), 6, (3, 8, 8))
        assert torch.equal(first["model"]["fc.weight"], untouched.state_dict()["fc.weight"])
        assert train(*words, "--resume") == 0
    assert len(rows(tmp_path / "log.csv")) == 10


def _scaler_from(scale: float):
    original = torch.amp.GradScaler.__init__

    def init(self, device, enabled=True):
        original(self, device, init_scale=scale, enabled=enabled)

    return init


@pytest.mark.parametrize("log_every", [1, 10])
def test_a_loss_that_is_not_finite_stops_the_run(log_every, tmp_path, capsys):
    words = ["--model", f"{TINY}:Diverging", *DATA, *QUIET, "--fuse", "none", "--epochs", "3", "--output", tmp_path]
    assert train(*words, "--log-every", log_every) == 1
    message = capsys.readouterr().err
    assert "the loss of step 8 is nan" in message and "--lr" in message and "--resume" in message
    state = checkpoint.load(tmp_path)
    assert state["step"] == 5 and all(t.isfinite().all() for t in state["model"].values())
    assert [row["step"] for row in rows(tmp_path / "log.csv")][-1] == "7"


def test_weights_that_are_not_finite_are_not_saved(tmp_path, capsys):
    """The gradient of the last step before a checkpoint can be infinite where its loss is not."""
    words = ["--model", f"{TINY}:DivergingBackward", *DATA, *QUIET, "--fuse", "none", "--epochs", "3"]
    assert train(*words, "--output", tmp_path) == 1
    assert "after step 10 the weights are not finite" in capsys.readouterr().err
    assert checkpoint.load(tmp_path)["step"] == 5


def test_compiled_training_has_the_same_keys(tmp_path, monkeypatch):
    compiled = []
    monkeypatch.setattr(nn.Module, "compile", lambda self: compiled.append(type(self).__name__))
    words = ["--model", f"{TINY}:Tiny", *DATA, *QUIET, "--max-steps", "1", "--output", tmp_path]
    assert train(*words, "--compile") == 0
    assert compiled == ["Tiny"] and "fc.weight" in checkpoint.load(tmp_path)["model"]


def test_the_process_is_left_as_it_was(tmp_path):
    threads, handler = torch.get_num_threads(), signal.getsignal(signal.SIGTERM)
    words = ["--model", f"{TINY}:Tiny", *DATA, *QUIET, "--max-steps", "1", "--output", tmp_path]
    assert train(*words, "--threads", threads + 1, "--deterministic") == 0
    assert torch.get_num_threads() == threads and not torch.are_deterministic_algorithms_enabled()
    assert signal.getsignal(signal.SIGTERM) is handler


@pytest.mark.parametrize(
    ("options", "layout"), [([], torch.channels_last), (["--contiguous"], torch.contiguous_format)]
)
def test_the_memory_layout_of_images_and_weights(options, layout, tmp_path, monkeypatch):
    found, move = [], loop.Trainer._move

    def recorded(self, images):
        moved = move(self, images)
        found.extend([moved, self.learner.network.conv2.weight])
        return moved

    monkeypatch.setattr(loop.Trainer, "_move", recorded)
    words = ["--model", f"{TINY}:Tiny", *DATA, *QUIET, "--max-steps", "1", "--output", tmp_path]
    assert train(*words, *options) == 0
    assert len(found) == 2 and all(t.is_contiguous(memory_format=layout) for t in found)


def test_evaluation_counts():
    """Of 8 images the first one's class is scored highest, the second one's comes next, and so on to the last place."""
    network = nn.Sequential(nn.Identity(), nn.BatchNorm1d(8, affine=False, track_running_stats=False)).train()
    scores = torch.rand(8, 8, generator=torch.Generator().manual_seed(0))
    targets = torch.stack([row.argsort(descending=True)[place] for place, row in enumerate(scores)])
    alone = Processes(0, 1, torch.device("cpu"))
    how = {"move": lambda x: x, "autocast": contextlib.nullcontext, "stopped": lambda: False}
    found = evaluate(network[0], [(scores[:3], targets[:3]), (scores[3:], targets[3:])], alone, **how)
    assert found == Accuracy(1 / 8, 5 / 8, 8)
    assert evaluate(network[0], [(scores[:, :4], targets % 4)], alone, **how).top5 is None
    standing_in = torch.cat([targets[:6], torch.full((2,), NO_CLASS)])
    assert evaluate(network[0], [(scores, standing_in)], alone, **how) == Accuracy(1 / 6, 5 / 6, 6)
    assert evaluate(network, [(scores, targets)], alone, **(how | {"stopped": lambda: True})) is None
    assert network.training


@pytest.mark.parametrize("sending", ["forward_sync_buffers", "broadcast_buffers"])  # torch 2.13, and before
def test_only_running_statistics_stay_unsent(sending, monkeypatch):
    said = []
    namespace = {"said": said}
    exec(f"def parallel(module, device_ids, gradient_as_bucket_view, {sending}): said.append({sending})", namespace)
    monkeypatch.setattr(processes, "DistributedDataParallel", namespace["parallel"])
    network, two = nn.Sequential(nn.Conv2d(1, 2, 1), nn.BatchNorm2d(2)), Processes(0, 2, torch.device("cpu"))
    processes.distribute(network, two, sync_batchnorm=False)
    network.register_buffer("counted", torch.zeros(1))
    processes.distribute(network, two, sync_batchnorm=False)
    assert said == [False, True]


# ------------------------------------------------------------------------------------------------ signals


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_stops_the_run_behind_a_checkpoint(number, status, tmp_path, monkeypatch):
    step = loop.Trainer._step

    def interrupted(self, batches):
        if self.place.step == 6:
            os.kill(os.getpid(), number)
        return step(self, batches)

    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert train(*EVERYTHING, "--output", whole) == 0
    with monkeypatch.context() as patch:
        patch.setattr(loop.Trainer, "_step", interrupted)
        assert train(*EVERYTHING, "--output", parts) == status
    assert checkpoint.load(parts)["step"] == 7
    assert train(*EVERYTHING, "--output", parts, "--resume") == 0
    assert_same_state(*(dict(torch.load(folder / "model.pt", weights_only=True)) for folder in (whole, parts)))


def test_a_signal_within_an_evaluation_leaves_it_to_the_resumed_run(tmp_path, monkeypatch):
    evaluate = loop.evaluate

    def interrupted(*args, **kwargs):
        os.kill(os.getpid(), signal.SIGTERM)
        return evaluate(*args, **kwargs)

    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert train(*EVERYTHING, "--output", whole) == 0
    with monkeypatch.context() as patch:
        patch.setattr(loop, "evaluate", interrupted)
        assert train(*EVERYTHING, "--output", parts) == 143
    state = checkpoint.load(parts)
    assert (state["epoch"], state["position"]) == (0, 5) and rows(parts / "epochs.csv") == []
    assert train(*EVERYTHING, "--output", parts, "--resume") == 0
    assert_same_state(*(dict(torch.load(folder / "model.pt", weights_only=True)) for folder in (whole, parts)))
    assert len(rows(parts / "epochs.csv")) == 3


def test_a_second_ctrl_c_ends_it_at_once(tmp_path, monkeypatch):
    def interrupted(self, batches):
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    monkeypatch.setattr(loop.Trainer, "_step", interrupted)
    with pytest.raises(KeyboardInterrupt):
        train(*EVERYTHING, "--output", tmp_path)


@pytest.mark.processes
@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_to_all_processes_of_the_program(number, status, tmp_path):
    """Terminals, torchrun and schedulers send it to the workers as well."""
    words = ["--model", f"{TINY}:Tiny", *DATA, *QUIET, "--epochs", "100000", "--workers", "1", "--output", tmp_path]
    process = subprocess.Popen(
        [sys.executable, "-m", "senet_fused", "train", *map(str, words)], text=True, start_new_session=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, env={**os.environ, "PYTHONPATH": str(PACKAGE.parent)},
    )  # fmt: skip
    try:
        give_up = time.monotonic() + 60
        while not (tmp_path / "last.pt").exists() and process.poll() is None and time.monotonic() < give_up:
            time.sleep(0.05)
        os.killpg(process.pid, number)
        text, errors = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == status, errors
    assert f"Stopped by signal {int(number)}" in text and errors == ""
    assert checkpoint.load(tmp_path)["step"] == int(rows(tmp_path / "log.csv")[-1]["step"])


# ------------------------------------------------------------------------------------------------ schedules


def rates(kind: str, steps: int = 12, **how) -> list[float]:
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    how = {"epochs": 6, "steps_per_epoch": 2, "warmup": 0.0, "step_epochs": 2, **how}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        schedule = make_schedule(optimizer, kind, **how)
        found = []
        for _ in range(steps):
            found.append(optimizer.param_groups[0]["lr"])
            optimizer.step()
            schedule.step()
    return found


def test_the_papers_schedule():
    assert rates("paper") == pytest.approx([1] * 4 + [0.1] * 4 + [0.01] * 4)
    assert rates("paper", warmup=1) == pytest.approx([1 / 3, 2 / 3] + [1] * 4 + [0.1] * 4 + [0.01] * 2)
    assert paper_rate(1024) == 0.6 and paper_rate(64) == pytest.approx(0.0375)
    assert (paper_step_epochs(100), paper_step_epochs(10), paper_step_epochs(1)) == (30, 3, 1)


def test_half_a_cosine():
    half = [0.5 * (1 + math.cos(math.pi * i / 12)) for i in range(12)]
    assert rates("cosine") == pytest.approx(half)
    half = [0.5 * (1 + math.cos(math.pi * i / 9)) for i in range(9)]
    assert rates("cosine", warmup=1.5) == pytest.approx([0.25, 0.5, 0.75, *half])
    assert min(rates("cosine", warmup=5.9)) > 0


# ------------------------------------------------------------------------------------------------ requests


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--lr", "0"], "no learning rate: it must be above 0"),
        (["--lr", "nan"], "no learning rate"),
        (["--epochs", "0"], "must be a positive integer"),
        (["--momentum", "1"], "not a number from 0 to below 1"),
        (["--channels-last", "--contiguous"], "not allowed with"),
    ],
)
def test_options_that_are_refused(words, message, capsys):
    with pytest.raises(SystemExit) as stop:
        arguments("--model", "se_resnet20", "--data", "digits", *words)
    assert stop.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--nesterov", "--momentum", "0"], "--nesterov needs a --momentum"),
        (["--warmup", "100"], "no shorter than --epochs"),
        (["--model", "se_resnet21"], r"no network 'se_resnet21'; similar: se_resnet20"),
        (["--model", "keras:x"], "cannot read --model keras:x"),
        (["--model", "missing.py:f"], "there is no file missing.py"),
        (["--model", f"{TINY}:missing"], "no function 'missing'.*it has .*Tiny"),
        (["--model", f"{TINY}:not_a_module"], "must return a torch.nn.Module, got int"),
        (["--model", f"{TINY}:failing"], "cannot make .*: ZeroDivisionError"),
        (["--model", f"{TINY}:ten_classes"], r"must return \[N, 6\] .*, got a tensor \[2, 10\]"),
        (["--model", f"{TINY}:one_channel"], "cannot run on images of 3 x 8 x 8: RuntimeError"),
        (["--model", f"{TINY}:tutorial", "--drop-path", "0.1"], "--drop-path 0.1: .*takes no argument drop_path_rate"),
        (["--model", f"{TINY}:Tiny", "--no-se"], "--no-se is for the networks of this package"),
        (["--model", f"{TINY}:Tiny", "--reduction", "4"], "--reduction is for the networks of this package"),
        (["--model", f"{TINY}:without_parameters"], "without_parameters has no parameters to train"),
        (["--model", f"{TINY}:one_pixel", "--fuse", "none", "--batch-size", "1"], "1: a BatchNorm .* --batch-size 2"),
        (["--batch-size", "64"], "only 40 images"),
        (["--accumulate", "6"], "40 training images do not fill one step of 48"),
        (["--data", "nowhere"], "unknown images 'nowhere'"),
        (["--resume"], "no checkpoint"),
    ],
)
def test_requests_that_are_refused(words, message, tmp_path):
    with pytest.raises(RequestError, match=message):
        train("--model", "se_resnet20", *DATA, *QUIET, "--output", tmp_path, *words)
    assert not list(tmp_path.iterdir())


def test_a_missing_timm_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(RequestError, match="pip install timm"):
        train("--model", "timm:seresnet18", *DATA, "--output", tmp_path)


def test_missing_packages_for_events_and_curves_are_named(tmp_path, monkeypatch, capsys):
    for name in ("torch.utils.tensorboard", "matplotlib.figure"):
        monkeypatch.setitem(sys.modules, name, None)
    words = ["--model", f"{TINY}:Tiny", *DATA, "--plain", "--max-steps", "1", "--output", tmp_path]
    assert train(*words) == 0
    text = capsys.readouterr().out
    assert "pip install tensorboard" in text and "pip install matplotlib" in text
    assert (tmp_path / "last.pt").exists() and not (tmp_path / "curves.png").exists()


def test_an_output_that_is_a_file_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(RequestError, match="cannot make the folder"):
        train("--model", f"{TINY}:Tiny", *DATA, "--output", tmp_path / "file")


def test_logs_that_cannot_be_opened(tmp_path):
    (tmp_path / "log.csv").mkdir()
    with pytest.raises(RequestError, match=r"cannot write .*log\.csv: Is a directory\. Make it writable, or move away"):
        train("--model", f"{TINY}:Tiny", *DATA, *QUIET, "--output", tmp_path)


def test_a_gpu_without_memory_is_told_what_helps(tmp_path):
    words = ["--model", f"{TINY}:OutOfMemory", *DATA, *QUIET, "--fuse", "none", "--output", tmp_path]
    with pytest.raises(RequestError, match="out of GPU memory with --batch-size 8 --accumulate 1: .*--amp bf16"):
        train(*words)


@pytest.mark.parametrize(("decay", "warned"), [("0.99", True), ("0.5", False)])
def test_an_average_over_more_steps_than_there_are(decay, warned, tmp_path, capsys):
    words = ["--model", f"{TINY}:Tiny", *DATA, *QUIET, "--epochs", "1", "--max-steps", "1", "--output", tmp_path]
    assert train(*words, "--ema", decay) == 0
    text = "Warning: --ema 0.99 averages over about 100 steps, and this run has 5: 95% of its average"
    assert (text in capsys.readouterr().out) == warned


@pytest.mark.parametrize(
    ("model", "data", "name"),
    [
        ("se_resnet50", "imagefolder:/a/b", "se_resnet50-imagefolder_b"),
        ("timm:seresnet18", "cifar10:x/y/", "timm_seresnet18-cifar10_y"),
        ("dir/nets.py:Net", "digits", "nets.py_Net-digits"),
    ],
)
def test_the_default_output_keeps_the_model_whatever_the_data(model, data, name, monkeypatch):
    monkeypatch.setattr(session, "train", lambda args: "finished")
    args = arguments("--model", model, "--data", data)
    assert command.run(args) == 0 and args.output == Path("runs", name)


def test_the_default_output_names_model_and_data(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert train("--model", f"{TINY}:Tiny", *DATA, *QUIET, "--max-steps", "1") == 0
    assert [path.name for path in (tmp_path / "runs").iterdir()] == ["train_networks.py_Tiny-synthetic_6_40_13"]


# ------------------------------------------------------------------------------------------------ logs


def test_the_bar_shows_what_lines_say(capsys):
    pytest.importorskip("rich")
    bar = logs.Bar()
    bar.say("a line [not markup]")
    bar.progress(3, 10, "loss 1.5")
    bar.close()
    text = capsys.readouterr().out
    assert "a line [not markup]" in text


def test_curves_of_a_run_without_an_epoch(tmp_path):
    pytest.importorskip("matplotlib")
    (tmp_path / "log.csv").write_text(",".join(logs.STEPS) + "\n1,1,2.5,0.1,100\n")
    (tmp_path / "epochs.csv").write_text(",".join(logs.EPOCHS) + "\n")
    assert curves.draw(tmp_path).stat().st_size > 1000
