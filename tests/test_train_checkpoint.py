"""Checkpoints of training: what comes back, what is refused, and what kills and full disks leave."""

from __future__ import annotations

import errno
import json
import os
import random
import subprocess
import sys
from collections import OrderedDict, namedtuple
from pathlib import Path

import numpy
import pytest
import torch
from same_state import difference

import senet_fused
from senet_fused.arguments import RequestError
from senet_fused.train import checkpoint
from senet_fused.train.checkpoint import CheckpointError

PACKAGE = Path(senet_fused.__file__).resolve().parent.parent
Pair = namedtuple("Pair", "a b")


def a_state(number=0):
    generator = torch.Generator().manual_seed(number)
    return {"number": number, "weights": torch.randn(300, generator=generator), "description": {"model": "tiny"}}


def number_of(path):
    found = checkpoint.load(path)
    assert torch.equal(found["weights"], a_state(found["number"])["weights"])
    return found["number"]


def trained(step=2):
    """The states of a network, of its optimizer and of its schedule, after some steps."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, amsgrad=True)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 10)
    for _ in range(step):
        model(torch.randn(2, 3, 5, 5)).square().sum().backward()
        optimizer.step()
        schedule.step()
    return {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "schedule": schedule.state_dict()}


@pytest.fixture
def folder(tmp_path):
    """Two checkpoints: number 1 in last.pt, number 0 in previous.pt."""
    (tmp_path / "run").mkdir()
    for number in (0, 1):
        checkpoint.save(tmp_path / "run", a_state(number))
    return tmp_path / "run"


# ---------------------------------------------------------------------------------- round trips


def test_a_state_comes_back_as_it_was(tmp_path):
    state = {
        **trained(),
        "numbers": [0, -1, 2**70, True, 0.1, float("nan"), -0.0, float("inf"), None],
        "nested": {"ä": ({"b": [(), {}, []]}, ""), 3: OrderedDict(x=1)},
        "empty": torch.empty(0, 3),
        "half": torch.tensor([1.5, float("nan")], dtype=torch.float16),
        "bytes": torch.arange(256, dtype=torch.uint8),
        "transposed": torch.arange(6.0).reshape(2, 3).t(),
        "scalar": torch.tensor(7),
        "rng": checkpoint.rng_state(),
    }
    checkpoint.save(tmp_path, state)
    found = checkpoint.load(tmp_path)
    assert difference(dict(state), found) is None
    assert difference(found, checkpoint.load(tmp_path / "last.pt")) is None
    broken = {**state, "half": -state["half"]}
    assert difference(broken, found) is not None  # the comparison sees the sign of a NaN


def test_the_one_before_stays(folder):
    assert (number_of(folder), number_of(folder / "previous.pt")) == (1, 0)
    checkpoint.save(folder, a_state(2))
    assert (number_of(folder), number_of(folder / "previous.pt")) == (2, 1)
    assert sorted(path.name for path in folder.iterdir()) == ["last.pt", "previous.pt"]


def test_previous_stands_in_for_a_missing_last(folder):
    (folder / "last.pt").unlink()
    assert checkpoint.locate(folder) == folder / "previous.pt"
    assert number_of(folder) == 0


def test_the_umask_holds(tmp_path):
    before = os.umask(0o027)
    try:
        checkpoint.save(tmp_path, a_state())
    finally:
        os.umask(before)
    assert (tmp_path / "last.pt").stat().st_mode & 0o777 == 0o640


# ---------------------------------------------------------------------------------- what a state may hold


@pytest.mark.parametrize(
    "value",
    [
        {"state": {3: {"foo": numpy.zeros(2)}}},
        [1, ({"x": Pair(1, 2)},)],
        Path("x"),
        torch.nn.Linear(1, 1),
        range(3),
    ],
    ids=lambda value: type(value).__name__,
)
def test_what_could_not_be_read_back_is_refused(folder, value):
    with pytest.raises(CheckpointError, match=r"cannot save .*last\.pt: .* could not read it: "):
        checkpoint.save(folder, {**a_state(2), "value": value})
    unchanged(folder)


# ---------------------------------------------------------------------------------- damage


def test_no_flipped_bit_goes_unnoticed(tmp_path):
    """Each is found, or lies where it changes nothing: in padding and in fields that say, for instance, the time."""
    state = {"a": torch.arange(40.0), "b": {"c": [1, 2.5]}}
    checkpoint.save(tmp_path, state)
    path = tmp_path / "last.pt"
    data = path.read_bytes()
    inside = data.index(state["a"].numpy().tobytes())
    found = 0
    for place in range(len(data)):
        damaged = bytearray(data)
        damaged[place] ^= 1 << place % 8
        path.write_bytes(damaged)
        try:
            assert difference(checkpoint.load(path), state) is None, place
            assert not inside <= place < inside + 160
        except CheckpointError as error:
            assert str(error).startswith(f"{path} is "), error
            found += 1
    assert found > len(data) / 2


def test_no_truncation_goes_unnoticed(tmp_path):
    checkpoint.save(tmp_path, {"a": torch.arange(40.0)})
    path = tmp_path / "last.pt"
    data = path.read_bytes()
    for size in range(len(data) - 1, 3, -7):
        path.write_bytes(data[:size])
        with pytest.raises(CheckpointError, match=f"{path} is truncated, damaged or not a checkpoint"):
            checkpoint.load(path)


def flip(path):
    data = bytearray(path.read_bytes())
    data[data.index(a_state(1)["weights"].numpy().tobytes()) + 600] ^= 4
    path.write_bytes(data)


def rewrite(content):
    return lambda path: torch.save(content, path)


def script(path):
    torch.jit.save(torch.jit.trace(torch.nn.Linear(1, 1), torch.zeros(1, 1)), str(path))


DAMAGES = {
    "flipped bit": (flip, "the checksum of .*/data/0 is wrong"),
    "truncated": (lambda path: os.truncate(path, 2000), "File is not a zip file"),
    "empty": (lambda path: path.write_bytes(b""), "File is not a zip file"),
    "text": (lambda path: path.write_text("epoch,loss\n"), "File is not a zip file"),
    "old pickle": (
        lambda path: torch.save({"a": 1}, path, _use_new_zipfile_serialization=False),
        "File is not a zip file",
    ),
    "weights": (rewrite(OrderedDict(a=torch.ones(1))), "it contains a OrderedDict of another format"),
    "tensor": (rewrite(torch.ones(1)), "it contains a Tensor of another format"),
    "module": (rewrite(torch.nn.Linear(1, 1)), "Weights only load failed"),
    "script": (script, "."),
}


@pytest.mark.filterwarnings("ignore:.*torch:UserWarning", "ignore:.*torch:DeprecationWarning")
@pytest.mark.parametrize(("damage", "message"), DAMAGES.values(), ids=DAMAGES)
def test_a_file_that_cannot_be_used_says_why(folder, damage, message):
    path = folder / "last.pt"
    damage(path)
    message = f"^{path} is truncated, damaged or not a checkpoint of senet-fused train: .*{message}"
    for asked in (folder, path):
        with pytest.raises(CheckpointError, match=message) as caught:
            checkpoint.load(asked)
        assert str(caught.value).endswith(f"; try the one before it: --resume {folder / 'previous.pt'}")
    assert number_of(folder / "previous.pt") == 0
    (folder / "previous.pt").unlink()
    with pytest.raises(CheckpointError, match=message) as caught:
        checkpoint.load(folder)
    assert "previous.pt" not in str(caught.value)


def test_a_later_format_version(folder):
    torch.save({"format": checkpoint._FORMAT, "version": 2, "state": {}}, folder / "last.pt")
    with pytest.raises(CheckpointError, match="has checkpoint format version 2, and this release reads version 1"):
        checkpoint.load(folder)


def test_a_missing_one_says_so(folder, tmp_path):
    with pytest.raises(CheckpointError, match=r"there is no checkpoint .*nothing: no last\.pt, no previous\.pt"):
        (tmp_path / "nothing").mkdir()
        checkpoint.load(tmp_path / "nothing")
    with pytest.raises(CheckpointError, match="there is no checkpoint .*absent.pt$"):
        checkpoint.load(tmp_path / "absent.pt")
    assert issubclass(CheckpointError, RequestError)


def test_opening_one_runs_no_code(tmp_path):
    class Bomb:
        def __reduce__(self):
            return (os.mkdir, (str(tmp_path / "ran"),))

    torch.save({"format": checkpoint._FORMAT, "version": 1, "state": Bomb()}, tmp_path / "last.pt")
    with pytest.raises(CheckpointError, match="not a checkpoint of senet-fused train"):
        checkpoint.load(tmp_path)
    assert not (tmp_path / "ran").exists()


# ---------------------------------------------------------------------------------- writing that fails


def unchanged(folder):
    assert (number_of(folder), number_of(folder / "previous.pt")) == (1, 0)
    assert sorted(path.name for path in folder.iterdir()) == ["last.pt", "previous.pt"]


def test_a_full_disk(folder, monkeypatch):
    """The kernel itself says that the disk is full: what is written goes to /dev/full."""
    real, full = os.write, os.open("/dev/full", os.O_WRONLY)
    monkeypatch.setattr(os, "write", lambda _, data: real(full, data))
    with pytest.raises(CheckpointError) as caught:
        checkpoint.save(folder, a_state(2))
    monkeypatch.undo()
    os.close(full)
    unchanged(folder)
    message = str(caught.value)
    assert message.startswith(f"cannot save {folder / 'last.pt'}: {os.strerror(errno.ENOSPC)}; ")
    assert "The former file is unchanged: make room" in message
    needed, free = (int(word.replace(",", "")) for word in message.split() if word[0].isdigit())
    assert free > 0
    checkpoint.save(folder, a_state(2))
    assert needed == (folder / "last.pt").stat().st_size


@pytest.mark.parametrize("after", [0, 1, 3, 8, 20])
@pytest.mark.parametrize("error", [errno.ENOSPC, errno.EDQUOT, errno.EIO])
def test_an_error_in_the_middle_of_writing(folder, monkeypatch, after, error):
    real, count = os.write, 0

    def write(descriptor, data):
        nonlocal count
        count += 1
        if count > after:
            raise OSError(error, os.strerror(error))
        return real(descriptor, data[:100])  # as little as write(2) likes

    monkeypatch.setattr(os, "write", write)
    with pytest.raises(CheckpointError, match=os.strerror(error)):
        checkpoint.save(folder, a_state(2))
    monkeypatch.undo()
    assert count == after + 1  # nothing is tried after the error
    unchanged(folder)


@pytest.mark.parametrize("name", ["fsync", "replace"])
def test_an_error_after_writing(folder, monkeypatch, name):
    def fail(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, name, fail)
    with pytest.raises(CheckpointError, match="No space left on device"):
        checkpoint.save(folder, a_state(2))
    monkeypatch.undo()
    unchanged(folder)


def test_short_writes_are_continued(folder, monkeypatch):
    real = os.write
    monkeypatch.setattr(os, "write", lambda descriptor, data: real(descriptor, data[:100]))
    checkpoint.save(folder, a_state(2))
    monkeypatch.undo()
    assert number_of(folder) == 2


def test_an_interrupt_leaves_nothing_behind(folder, monkeypatch):
    def interrupt(_):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", interrupt)
    with pytest.raises(KeyboardInterrupt):
        checkpoint.save(folder, a_state(2))
    monkeypatch.undo()
    unchanged(folder)


def test_a_folder_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    for folder, reason in {"file": "Not a directory", "absent": "No such file or directory"}.items():
        with pytest.raises(CheckpointError, match=f"cannot save .*{folder}/last.pt: {reason}"):
            checkpoint.save(tmp_path / folder, a_state())


def test_the_unfinished_file_of_a_killed_run_is_overwritten(folder):
    (folder / "last.pt.new").write_text("half")
    checkpoint.save(folder, a_state(2))
    assert number_of(folder) == 2 and sorted(path.name for path in folder.iterdir()) == ["last.pt", "previous.pt"]


@pytest.mark.processes
def test_a_kill_at_any_step_leaves_a_complete_one(tmp_path):
    environment = {**os.environ, "PYTHONPATH": str(PACKAGE), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, str(Path(__file__).with_name("checkpoint_kills.py")), str(tmp_path / "run")],
        env=environment, capture_output=True, text=True, timeout=240,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    results = {result.pop("start"): result for result in map(json.loads, done.stdout.splitlines())}
    assert len(results) == 4
    # Kills before the rename left the old one (where there was one), those after it the new one.
    for start, old in {"one": "0", "two": "1"}.items():
        assert results[start][old] >= 5 and results[start]["9"] >= 1, results
    assert results["the file may not grow"]["limits"] > 5


# ---------------------------------------------------------------------------------- random numbers


def draws():
    return (
        [random.random() for _ in range(3)] + [random.gauss(0, 1)],
        numpy.random.randn(3).tolist(),  # an odd number: half a pair of normals waits
        torch.randn(5).tolist(),
        torch.randperm(9).tolist(),
    )


def test_random_numbers_go_on_where_they_were(tmp_path):
    draws()
    checkpoint.save(tmp_path, {"rng": checkpoint.rng_state()})
    expected = [draws(), draws()]
    assert expected[0] != expected[1]
    checkpoint.set_rng_state(checkpoint.load(tmp_path)["rng"])
    assert [draws(), draws()] == expected


def test_random_numbers_of_the_process_s_own_gpu(monkeypatch):
    """Each process saves and restores the current device's, whichever that is, and leaves those of others alone."""
    state = checkpoint.rng_state()
    assert ("cuda" in state) == torch.cuda.is_initialized()
    kept = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_rng_state", lambda: torch.tensor([7], dtype=torch.uint8))
    monkeypatch.setattr(torch.cuda, "set_rng_state", lambda state: kept.append(state.item()))
    state = checkpoint.rng_state()
    checkpoint.set_rng_state(state)
    assert kept == [7]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    checkpoint.set_rng_state(state)
    assert kept == [7]
