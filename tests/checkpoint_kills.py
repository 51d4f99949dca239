"""Kills processes at every step of saving a checkpoint. A script: it forks, so it needs a process of one thread.

    python checkpoint_kills.py FOLDER

It prints a line of JSON for each start (what the folder holds before): how many steps saving has, and how many of
the kills left the old checkpoint and how many the new one. It fails where a kill leaves neither.
"""

from __future__ import annotations

import errno
import json
import os
import resource
import shutil
import signal
import sys
from collections import Counter
from pathlib import Path

import torch

from senet_fused.train import checkpoint

STEPS = ("write", "fsync", "replace")
PIECE = 1000  # bytes that are written at a time
SEED = 20  # of the weights


def state(number):
    weights = torch.randn(2000, generator=torch.Generator().manual_seed(SEED + number))
    return {"number": number, "weights": weights, "optimizer": {"step": [number, 0.5]}, "rng": checkpoint.rng_state()}


def complete(path):
    """The number of the state in a checkpoint, of which every tensor is right."""
    found = checkpoint.load(path)
    assert torch.equal(found["weights"], state(found["number"])["weights"]), path
    return found["number"]


def die_at(step):
    """From now on the step of that number is the last: a write stops halfway, another is not begun."""
    count = 0

    def dying(name, original):
        def call(*arguments):
            nonlocal count
            count += 1
            if name == "write":
                file, data = arguments
                arguments = file, data[: PIECE // 2 if count == step else PIECE]
            if count == step:
                if name == "write":
                    original(*arguments)
                os.kill(os.getpid(), signal.SIGKILL)
            return original(*arguments)

        return call

    for name in STEPS:
        setattr(os, name, dying(name, getattr(os, name)))


def in_child(act):
    child = os.fork()
    if child == 0:
        try:
            act()
        except BaseException as error:
            print(repr(error), file=sys.stderr)
            os._exit(1)
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def prepare(folder, saved):
    """So many checkpoints have been saved in the folder, numbers 0 and up."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    for number in range(saved):
        checkpoint.save(folder, state(number))


def kill_at_every_step(folder, saved):
    start = folder.with_name(f"{folder.name}-before")
    prepare(start, saved)
    left, step = Counter(), 0
    while True:
        step += 1
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(start, folder)

        def save(step=step):
            die_at(step)
            checkpoint.save(folder, state(9))

        status = in_child(save)
        names = {path.name for path in folder.iterdir()} - {"last.pt", "previous.pt"}
        if status == 0:
            assert complete(folder) == 9 and not names, names
            return {"steps": step - 1, **{str(key): count for key, count in left.items()}}
        assert status == -signal.SIGKILL, status
        if saved == 0 and not (folder / "last.pt").exists():
            left["none"] += 1
        else:
            left[complete(folder)] += 1
        # The next save works, and overwrites what the killed one left.
        checkpoint.save(folder, state(10))
        assert complete(folder) == 10 and {path.name for path in folder.iterdir()} <= {"last.pt", "previous.pt"}


def too_large(folder):
    """The kernel refuses to let the file grow at every kilobyte; both checkpoints stay."""
    prepare(folder, 2)
    for limit in (0, *range(1000, (folder / "last.pt").stat().st_size, 2500)):

        def save(limit=limit):
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
            try:
                checkpoint.save(folder, state(9))
            except checkpoint.CheckpointError as error:
                assert os.strerror(errno.EFBIG) in str(error) and "bytes are needed" in str(error), error
            else:
                os._exit(3)

        assert in_child(save) == 0, limit
        assert (complete(folder), complete(folder / "previous.pt")) == (1, 0)
        assert {path.name for path in folder.iterdir()} == {"last.pt", "previous.pt"}
    return {"limits": limit // 2500 + 2}


def main(folder):
    print(json.dumps({"start": "empty", **kill_at_every_step(folder, 0)}))
    print(json.dumps({"start": "one", **kill_at_every_step(folder, 1)}))
    print(json.dumps({"start": "two", **kill_at_every_step(folder, 2)}))
    print(json.dumps({"start": "the file may not grow", **too_large(folder)}))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
