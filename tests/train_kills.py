"""Kills ``senet-fused train`` at random moments, resumes it, and compares the end with that of a run left alone.

    python train_kills.py FOLDER SEED KILLS [PLANTED]

A script: it forks a process for each start of a training, which spares it the import of torch, so it needs a process
of one thread. It prints a line of JSON with what was done, and fails at the first difference. PLANTED names something
that a resumed run is made to forget, to see that it is found.
"""

from __future__ import annotations

import contextlib
import csv
import json
import os
import random
import re
import shutil
import signal
import sys
import time
from collections import Counter
from pathlib import Path

import torch
import torch._dynamo  # once, for all children: an optimizer imports it
from same_state import difference

from senet_fused import cli
from senet_fused.train import checkpoint, data, loop

# 5 steps an epoch, of 2 micro-batches; the images that fill no step are dropped; checkpoints in mid-epoch.
OPTIONS = (
    "train --model se_resnet20 --data synthetic:3,46,8 --size 8 --batch-size 4 --accumulate 2 --epochs 3 --lr 0.05 "
    "--warmup 0.5 --schedule cosine --ema 0.9 --drop-path 0.3 --dropout 0.2 --label-smoothing 0.1 --save-every 2 "
    "--device cpu --tensorboard off"
).split()
CLOCKS = {"log.csv": {"images_per_second"}, "epochs.csv": {"seconds"}}  # columns that tell of the time taken
LEFT = {"log.csv", "epochs.csv", "last.pt", "previous.pt", "model.pt", "model_ema.pt"}
CALLS = ("fsync", "replace")


# ---------------------------------------------------------------------------------- what a kill is


def die():
    os.kill(os.getpid(), signal.SIGKILL)


def die_in_write(byte):
    """After so many bytes of checkpoints, in the middle of whatever write that is."""
    original, left = os.write, byte

    def write(descriptor, content):
        nonlocal left
        if len(content) > left:
            original(descriptor, content[:left])
            die()
        left -= len(content)
        return original(descriptor, content)

    os.write = write


def die_at_call(number):
    """Before that call of those that put a written checkpoint in place."""
    count = 0

    def dying(original):
        def call(*arguments):
            nonlocal count
            count += 1
            if count == number:
                die()
            return original(*arguments)

        return call

    for name in CALLS:
        setattr(os, name, dying(getattr(os, name)))


def start(arguments, output, moment=(None, None)):
    """Runs the command line in a child, kills it at the moment; returns its status and the seconds it took."""
    kind, amount = moment
    begin = time.monotonic()
    child = os.fork()
    if child == 0:
        os.setsid()
        with output.open("w") as file:
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
        try:
            if kind == "write":
                die_in_write(amount)
            elif kind == "call":
                die_at_call(amount)
            status = cli.main(arguments)
        except BaseException as error:
            print(repr(error), file=sys.stderr)
            status = 70
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    if kind == "time":
        time.sleep(amount)
        with contextlib.suppress(ProcessLookupError):
            os.kill(child, signal.SIGKILL)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(child, signal.SIGKILL)  # processes that loaded images for it
    return status, time.monotonic() - begin


# ---------------------------------------------------------------------------------- what must be the same


def result(folder):
    """All that a run leaves behind, without what tells of the time it took."""
    last = checkpoint.load(folder)
    del last["seconds"]
    tables = {}
    for name, clocks in CLOCKS.items():
        with (folder / name).open(newline="") as file:
            tables[name] = [{key: row[key] for key in row if key not in clocks} for row in csv.DictReader(file)]
    weights = {name: torch.load(folder / name, weights_only=True) for name in ("model.pt", "model_ema.pt")}
    return {"last": last, "tables": tables, "weights": weights, "files": sorted({p.name for p in folder.iterdir()})}


# ---------------------------------------------------------------------------------- the trial


def random_moment(numbers, seconds, size, calls):
    kind = numbers.choice(("time", "time", "write", "write", "call"))
    if kind == "time":
        return kind, numbers.uniform(0, seconds)
    return kind, numbers.randrange(size) if kind == "write" else numbers.randint(1, calls)


def plant(what):
    """Makes resumed runs forget something."""
    if what == "rng":
        checkpoint.set_rng_state = lambda _: None
    elif what == "place":
        original = data.EpochSampler.start
        data.EpochSampler.start = lambda self, epoch, skip=0: original(self, epoch)
    elif what == "ema":
        original = loop.Trainer.restore
        loop.Trainer.restore = lambda self, found: original(self, {**found, "ema": self.ema.state_dict()})
    else:
        raise ValueError(f"{what} cannot be planted")


def one_run(folder, numbers, kills, moments, workers, done):
    """A training that is killed up to so many times."""
    shutil.rmtree(folder, ignore_errors=True)
    output = folder.with_name("output.txt")
    arguments = [*OPTIONS, "--output", str(folder), "--workers", str(workers)]
    for _ in range(kills):
        kind, amount = moment = random_moment(numbers, *moments)
        status, _ = start([*arguments, *resume(folder)], output, moment)
        done["resumed in mid-epoch"] += in_mid_epoch(output)
        if status == 0:
            return  # the moment lies behind the end
        assert status == -signal.SIGKILL, f"{moment}: status {status}\n{output.read_text()}"
        done["kills"] += 1
        done[f"kills: {kind}"] += 1
        unfinished = list(folder.glob("*.new")) if folder.exists() else []
        done["unfinished files"] += bool(unfinished)
        assert unfinished or kind != "write", f"{moment} left no unfinished file"
    status, _ = start([*arguments, *resume(folder)], output)
    assert status == 0, output.read_text()
    done["resumed in mid-epoch"] += in_mid_epoch(output)


def in_mid_epoch(output):
    resumed = re.search(r"Resumed after step (\d+)", output.read_text())
    return resumed is not None and int(resumed[1]) % 5 > 0


def resume(folder):
    return ["--resume"] if any((folder / name).exists() for name in ("last.pt", "previous.pt")) else []


def main(folder, seed, kills, planted=None):
    numbers = random.Random(seed)
    alone = folder / "alone"
    status, seconds = start([*OPTIONS, "--output", str(alone)], folder / "output.txt")
    assert status == 0, (folder / "output.txt").read_text()
    expected = result(alone)
    assert set(expected["files"]) <= LEFT and len(expected["tables"]["log.csv"]) == 15, expected["files"]
    saves = 3 * 3  # twice within each epoch, and at its end
    moments = (seconds, saves * (alone / "last.pt").stat().st_size, saves * (len(CALLS) + 3))
    if planted:
        plant(planted)
    done = Counter()
    while done["kills"] < kills:
        done["runs"] += 1
        workers = 2 * (done["runs"] % 3 == 2)
        done["runs with workers"] += workers > 0
        one_run(folder / "killed", numbers, min(kills - done["kills"], 6), moments, workers, done)
        found = difference(expected, result(folder / "killed"))
        assert found is None, f"run {done['runs']}, {workers} workers: {found}; {dict(done)}"
    print(json.dumps({"seed": seed, "seconds alone": round(seconds, 2), **done}))


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), *sys.argv[4:])
