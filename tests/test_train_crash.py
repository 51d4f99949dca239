"""Trainings that are killed and resumed end as if nothing had happened; and what is refused on resuming."""

from __future__ import annotations

import errno
import json
import os
import re
import secrets
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import senet_fused
from senet_fused import cli
from senet_fused.train import checkpoint, logs

HERE = Path(__file__).resolve().parent
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(senet_fused.__file__).parent.parent)}
TINY = (
    "train --model se_resnet20 --data synthetic:3,24,6 --size 8 --batch-size 4 --epochs 2 --lr 0.05 --drop-path 0.3 "
    "--ema 0.9 --device cpu --tensorboard off"
).split()


# ---------------------------------------------------------------------------------- kills


def killed_and_compared(folder, *arguments):
    return subprocess.run(
        [sys.executable, str(HERE / "train_kills.py"), str(folder), *map(str, arguments)],
        env=ENVIRONMENT, capture_output=True, text=True, timeout=1800,
    )  # fmt: skip


@pytest.mark.processes
def test_killed_runs_end_as_if_nothing_had_happened(tmp_path):
    done = killed_and_compared(tmp_path, 4, 4)
    assert done.returncode == 0, done.stderr
    print(done.stdout)
    assert json.loads(done.stdout)["kills"] == 4


@pytest.mark.slow
def test_killed_at_fifty_moments(tmp_path):
    seed = int(os.environ.get("SENET_FUSED_SEED", secrets.randbelow(10**6)))
    print(f"SENET_FUSED_SEED={seed}")
    done = killed_and_compared(tmp_path, seed, 50)
    print(done.stdout)
    assert done.returncode == 0, done.stderr
    counts = json.loads(done.stdout)
    assert counts["kills"] == 50 and counts["resumed in mid-epoch"] > 5 and counts["runs with workers"] > 0
    assert min(counts[f"kills: {kind}"] for kind in ("time", "write", "call")) > 0


@pytest.mark.slow
@pytest.mark.parametrize(
    ("planted", "found"), [("rng", ".last.processes.0.rng.torch"), ("place", ".last.model."), ("ema", ".last.ema.")]
)
def test_what_a_resumed_run_forgets_is_found(tmp_path, planted, found):
    done = killed_and_compared(tmp_path, 5, 8, planted)
    assert done.returncode == 1
    assert re.search(rf"AssertionError: run \d+, \d workers: {re.escape(found)}", done.stderr), done.stderr


@pytest.mark.processes
def test_a_process_that_is_killed(tmp_path):
    """As a user has it: ``python -m senet_fused train``, kill -9 once it has saved, the same with --resume."""
    folder = tmp_path / "run"
    more = ["--epochs", "50", "--save-every", "2", "--output", str(folder)]
    command = [sys.executable, "-m", "senet_fused", *TINY, *more]
    with (tmp_path / "output.txt").open("w") as output:
        process = subprocess.Popen(command, env=ENVIRONMENT, stdout=output, stderr=subprocess.STDOUT)
    try:
        for _ in range(1200):
            if (folder / "previous.pt").exists() or process.poll() is not None:
                break
            time.sleep(0.05)
    finally:
        process.kill()
    assert process.wait() == -signal.SIGKILL, (tmp_path / "output.txt").read_text()
    step = checkpoint.load(folder)["step"]
    command += ["--resume", "--max-steps", str(step + 1)]
    done = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert f"Resumed after step {step} of 300" in done.stdout
    assert checkpoint.load(folder)["step"] == step + 1
    assert len((folder / "log.csv").read_text().splitlines()) == step + 2


# ---------------------------------------------------------------------------------- what is refused


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run that was stopped after 8 of its 12 steps."""
    folder = tmp_path_factory.mktemp("trained") / "run"
    assert cli.main([*TINY, "--save-every", "3", "--max-steps", "8", "--output", str(folder)]) == 0
    return folder


@pytest.fixture
def folder(trained, tmp_path):
    shutil.copytree(trained, tmp_path / "run")
    return tmp_path / "run"


def files(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def refused(capsys, folder, *more):
    """The message of a command that is refused and leaves the folder as it was."""
    before = files(folder)
    capsys.readouterr()
    assert cli.main([*TINY, "--output", str(folder), *more]) == 2
    message = capsys.readouterr().err
    assert message.startswith("senet-fused train: error: ") and message.count("\n") == 1, message
    assert files(folder) == before
    return message


def test_without_resume_nothing_is_overwritten(folder, capsys):
    message = refused(capsys, folder)
    assert str(folder) in message and "--resume" in message and "--output" in message
    (folder / "last.pt").unlink()
    assert "previous.pt" in refused(capsys, folder)


def test_resume_from_elsewhere_overwrites_no_other_run(folder, trained, tmp_path, capsys):
    for asked in (trained, trained / "last.pt"):
        message = refused(capsys, folder, "--resume", str(asked))
        assert f"{folder} holds the checkpoint last.pt of another run" in message and str(asked) in message
    assert cli.main([*TINY, "--output", str(tmp_path / "new"), "--max-steps", "9", "--resume", str(trained)]) == 0
    assert checkpoint.load(tmp_path / "new")["step"] == 9 and checkpoint.load(trained)["step"] == 8


def test_resume_of_a_damaged_checkpoint(folder, capsys):
    data = bytearray((folder / "last.pt").read_bytes())
    data[len(data) // 2] ^= 1
    (folder / "last.pt").write_bytes(data)
    message = refused(capsys, folder, "--resume")
    assert "the checksum of" in message and f"--resume {folder / 'previous.pt'}" in message
    step = checkpoint.load(folder / "previous.pt")["step"]
    assert step < 8
    # What the message says works, and the log has each step once.
    assert cli.main([*TINY, "--output", str(folder), "--resume", str(folder / "previous.pt")]) == 0
    assert f"Resumed after step {step} of 12" in capsys.readouterr().out
    rows = (folder / "log.csv").read_text().splitlines()
    assert [row.split(",")[0] for row in rows] == ["step", *map(str, range(1, 13))]


@pytest.mark.parametrize(
    ("content", "reason"), [(b"", "not a zip file"), (b"epoch,loss\n", "not a zip file"), (None, "not a zip file")]
)
def test_resume_of_something_else(folder, capsys, content, reason):
    whole = (folder / "last.pt").read_bytes()
    (folder / "last.pt").write_bytes(whole[:-1000] if content is None else content)
    message = refused(capsys, folder, "--resume")
    assert "last.pt is truncated, damaged or not a checkpoint" in message and reason in message


def test_resume_of_weights(folder, capsys):
    torch.save({"layer0.conv1.weight": torch.ones(1)}, folder / "weights.pt")
    assert "not a checkpoint of senet-fused train" in refused(capsys, folder, "--resume", str(folder / "weights.pt"))


def test_resume_of_nothing(tmp_path, capsys):
    assert cli.main([*TINY, "--output", str(tmp_path / "run"), "--resume"]) == 2
    assert "there is no checkpoint" in capsys.readouterr().err
    assert not (tmp_path / "run").exists() or not list((tmp_path / "run").iterdir())


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["--model", "se_resnet56"], ["se_resnet20", "se_resnet56"]),
        (["--data", "synthetic:4,24,6"], ["synthetic:3,24,6", "synthetic:4,24,6"]),
        (["--no-se"], ["--no-se was False and is True"]),
        (["--reduction", "4"], ["16", "4"]),
        (["--lr", "0.1"], ["--lr", "0.05", "0.1"]),
        (["--batch-size", "2"], ["--batch-size", "4", "2"]),
        (["--ema", "0.5"], ["--ema", "0.9", "0.5"]),
        (["--seed", "1"], ["--seed"]),
    ],
)
def test_resume_of_another_training(folder, capsys, more, words):
    message = refused(capsys, folder, "--resume", *more)
    assert "checkpoint" in message and all(word in message for word in words), message


def test_the_disk_is_full(folder, capsys, monkeypatch):
    """From the second checkpoint on. The kernel says so: what is written goes to /dev/full."""
    step = checkpoint.load(folder)["step"]
    real, full = checkpoint.save, os.open("/dev/full", os.O_WRONLY)
    saved = []

    def save(where, state):
        if saved:
            write = os.write
            monkeypatch.setattr(os, "write", lambda _, data: write(full, data))
        saved.append(state["step"])
        return real(where, state)

    monkeypatch.setattr(checkpoint, "save", save)
    more = ["--output", str(folder), "--resume", "--save-every", "1"]
    assert cli.main([*TINY, *more]) == 2
    monkeypatch.undo()
    os.close(full)
    assert saved == [step + 1, step + 2]
    message = capsys.readouterr().err
    assert f"cannot save {folder / 'last.pt'}: {os.strerror(errno.ENOSPC)}" in message
    assert "bytes are needed" in message and "The former file is unchanged" in message
    assert (checkpoint.load(folder)["step"], checkpoint.load(folder / "previous.pt")["step"]) == (step + 1, step)
    assert not list(folder.glob("*.new"))
    # Not even the log can be written.
    monkeypatch.setattr(logs.Table, "sync", lambda self: os.write(full, b"row"))
    full = os.open("/dev/full", os.O_WRONLY)
    assert cli.main([*TINY, *more]) == 2
    monkeypatch.undo()
    os.close(full)
    assert f"error: cannot read or write: {os.strerror(errno.ENOSPC)}. Make room" in capsys.readouterr().err
    # With room again it goes on, and the log has each step once.
    assert cli.main([*TINY, *more]) == 0
    rows = (folder / "log.csv").read_text().splitlines()
    assert [row.split(",")[0] for row in rows] == ["step", *map(str, range(1, 13))]
    # Full again for the last file, the weights alone.
    (folder / "model.pt").unlink()
    (folder / "model.pt.new").symlink_to("/dev/full")
    assert cli.main([*TINY, *more]) == 2
    assert f"cannot save {folder / 'model.pt'}: " in capsys.readouterr().err
    assert cli.main([*TINY, *more]) == 0
    assert (folder / "model.pt").is_file()
