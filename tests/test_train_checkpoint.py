"""Checkpoints of training: what comes back, what is refused, and what kills and full disks leave."""

from __future__ import annotations

import errno
import fcntl
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


def same(a, b):
    """Equal in values, bit by bit, and in types."""
    if isinstance(a, torch.Tensor):
        alike = type(a) is type(b) and a.dtype == b.dtype and a.shape == b.shape
        return alike and a.numpy().tobytes() == b.numpy().tobytes()
    if isinstance(a, dict):
        return type(a) is type(b) and list(a) == list(b) and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return type(a) is type(b) and len(a) == len(b) and all(map(same, a, b))
    return type(a) is type(b) and repr(a) == repr(b)


@pytest.fixture
def folder(tmp_path):
    """Two checkpoints: number 1 in last.pt, number 0 in previous.pt."""
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
    assert checkpoint.save(tmp_path / "a" / "b", state) == tmp_path / "a" / "b" / "last.pt"
    found = checkpoint.load(tmp_path / "a" / "b")
    assert same(dict(state), found)
    assert same(found, checkpoint.load(tmp_path / "a" / "b" / "last.pt"))
    broken = {**state, "half": -state["half"]}
    assert not same(broken, found)  # the comparison sees the sign of a NaN


def test_the_one_before_stays(folder):
    assert (number_of(folder), number_of(folder / "previous.pt")) == (1, 0)
    checkpoint.save(folder, a_state(2))
    assert (number_of(folder), number_of(folder / "previous.pt")) == (2, 1)
    assert sorted(path.name for path in folder.iterdir()) == ["last.pt", "previous.pt"]


def test_last_and_previous_may_be_one_file(folder):
    (folder / "previous.pt").unlink()
    os.link(folder / "last.pt", folder / "previous.pt")
    checkpoint.save(folder, a_state(2))
    assert (number_of(folder), number_of(folder / "previous.pt")) == (2, 1)
    assert sorted(path.name for path in folder.iterdir()) == ["last.pt", "previous.pt"]


def test_without_hard_links(folder, monkeypatch):
    def refuse(*_):
        raise OSError(errno.EOPNOTSUPP, "Operation not supported")

    monkeypatch.setattr(os, "link", refuse)
    checkpoint.save(folder, a_state(2))
    assert (number_of(folder), number_of(folder / "previous.pt")) == (2, 1)


def test_previous_stands_in_for_a_missing_last(folder):
    (folder / "last.pt").unlink()
    assert checkpoint.locate(folder) == folder / "previous.pt"
    assert number_of(folder) == 0


def test_checksums_are_written_where_the_process_turned_them_off(tmp_path):
    torch.serialization.set_crc32_options(False)
    try:
        checkpoint.save(tmp_path, a_state())
        assert not torch.serialization.get_crc32_options()
    finally:
        torch.serialization.set_crc32_options(True)
    assert number_of(tmp_path) == 0


def test_the_umask_holds(tmp_path):
    before = os.umask(0o027)
    try:
        path = checkpoint.save(tmp_path, a_state())
    finally:
        os.umask(before)
    assert path.stat().st_mode & 0o777 == 0o640


# ---------------------------------------------------------------------------------- what a state may hold


class Marked(torch.Tensor):
    pass


@pytest.mark.parametrize(
    ("state", "message"),
    [
        ({"optimizer": {"state": {3: {"foo": numpy.float64(1)}}}}, r"optimizer\.state\.3\.foo is a numpy\.float64"),
        ({"log": [1, numpy.zeros(2)]}, r"log\.1 is a numpy\.ndarray"),
        ({"version": torch.__version__}, r"version is a torch\..*TorchVersion"),
        ({"size": torch.Size([1])}, r"size is a torch\.Size"),
        ({"pair": ({"x": Pair(1, 2)},)}, r"pair\.0\.x is a .*\.Pair"),
        ({"names": {"a"}}, "names is a set"),
        ({"path": Path("x")}, r"path is a pathlib\.\w*\.?PosixPath"),
        ({"device": torch.device("cpu")}, r"device is a torch\.device"),
        ({"step": {1.5: 0}}, r"step has a key 1\.5 of type float"),
        ({"step": {numpy.int64(1): 0}}, "step has a key .* of type numpy.int64"),
        ({"x": torch.zeros(2).as_subclass(Marked)}, r"x is a .*\.Marked"),
        ({"x": torch.zeros(2, device="meta")}, "x is a torch.float32 tensor on meta"),
        ({"x": torch.eye(2).to_sparse()}, "layout torch.sparse_coo"),
    ],
)
def test_what_could_not_be_read_back_is_refused(folder, state, message):
    with pytest.raises(TypeError, match=message):
        checkpoint.save(folder, {**a_state(2), **state})
    assert (number_of(folder), number_of(folder / "previous.pt")) == (1, 0)


# ---------------------------------------------------------------------------------- damage


def test_no_flipped_bit_goes_unnoticed(tmp_path):
    """Each is found, or lies where it changes nothing: in padding and in fields that say, for instance, the time."""
    state = {"a": torch.arange(40.0), "b": {"c": [1, 2.5]}}
    path = checkpoint.save(tmp_path, state)
    data = path.read_bytes()
    inside = data.index(state["a"].numpy().tobytes())
    found = 0
    for place in range(len(data)):
        damaged = bytearray(data)
        damaged[place] ^= 1 << place % 8
        path.write_bytes(damaged)
        try:
            assert same(checkpoint.load(path), state), place
            assert not inside <= place < inside + 160
        except CheckpointError as error:
            assert str(error).startswith(f"{path} is "), error
            found += 1
    assert found > len(data) / 2


def test_no_truncation_goes_unnoticed(tmp_path):
    path = checkpoint.save(tmp_path, {"a": torch.arange(40.0)})
    data = path.read_bytes()
    for size in range(len(data) - 1, 3, -7):
        path.write_bytes(data[:size])
        with pytest.raises(CheckpointError, match=f"is truncated, .* it stops after {size:,} bytes"):
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
    "flipped bit": (flip, "is damaged: the checksum of .*/data/0 is wrong"),
    "truncated": (lambda path: os.truncate(path, 2000), "is truncated, or damaged at its end: it stops after 2,000"),
    "empty": (lambda path: path.write_bytes(b""), "is empty"),
    "text": (lambda path: path.write_text("epoch,loss\n"), "is no checkpoint: it does not begin as"),
    "old pickle": (
        lambda path: torch.save({"a": 1}, path, _use_new_zipfile_serialization=False),
        "is no checkpoint: it does not begin as",
    ),
    "weights": (rewrite(OrderedDict(a=torch.ones(1))), "is no checkpoint of senet-fused train; .*OrderedDict"),
    "tensor": (rewrite(torch.ones(1)), r"is no checkpoint of senet-fused train; .*torch\.Tensor"),
    "module": (rewrite(torch.nn.Linear(1, 1)), "is no checkpoint of senet-fused train, or damaged: Weights only"),
    "later version": (
        rewrite({"format": checkpoint._FORMAT, "version": 2, "state": {}}),
        "is a checkpoint of format version 2, and this release reads version 1",
    ),
    "script": (script, "is no checkpoint of senet-fused train, or damaged"),
}


@pytest.mark.filterwarnings("ignore:.*torch:UserWarning", "ignore:.*torch:DeprecationWarning")
@pytest.mark.parametrize(("damage", "message"), DAMAGES.values(), ids=DAMAGES)
def test_a_file_that_cannot_be_used_says_why(folder, damage, message):
    path = folder / "last.pt"
    damage(path)
    for asked in (folder, path):
        with pytest.raises(CheckpointError, match=message) as caught:
            checkpoint.load(asked)
        assert str(caught.value).startswith(str(path))
        assert str(caught.value).endswith(f"the one before it is complete: --resume {folder / 'previous.pt'}")
    assert number_of(folder / "previous.pt") == 0
    flip_any = bytearray((folder / "previous.pt").read_bytes())
    flip_any[len(flip_any) // 2] ^= 1
    (folder / "previous.pt").write_bytes(flip_any)
    with pytest.raises(CheckpointError, match=message) as caught:
        checkpoint.load(folder)
    assert str(caught.value).endswith("previous.pt cannot be used either")
    (folder / "previous.pt").unlink()
    with pytest.raises(CheckpointError, match=message) as caught:
        checkpoint.load(folder)
    assert "previous.pt" not in str(caught.value)


def test_a_missing_one_says_so(folder, tmp_path):
    (tmp_path / "nothing").mkdir()
    with pytest.raises(CheckpointError, match="there is no checkpoint in .*nothing: neither last.pt nor previous.pt"):
        checkpoint.load(tmp_path / "nothing")
    with pytest.raises(CheckpointError, match="there is no checkpoint .*absent.pt$"):
        checkpoint.load(tmp_path / "absent.pt")
    (folder / "last.pt").unlink()
    with pytest.raises(CheckpointError, match="there is no checkpoint .*last.pt; .* --resume .*previous.pt$"):
        checkpoint.load(folder / "last.pt")
    assert issubclass(CheckpointError, RequestError)


def test_opening_one_runs_no_code(tmp_path):
    class Bomb:
        def __reduce__(self):
            return (os.mkdir, (str(tmp_path / "ran"),))

    torch.save({"format": checkpoint._FORMAT, "version": 1, "state": Bomb()}, tmp_path / "last.pt")
    with pytest.raises(CheckpointError, match="is no checkpoint of senet-fused train"):
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
    assert message.startswith(f"cannot save a checkpoint in {folder}: {os.strerror(errno.ENOSPC)}; ")
    assert "last.pt and previous.pt in it can be resumed from" in message
    needed, free = (int(word.replace(",", "")) for word in message.split() if word[0].isdigit())
    assert free > 0
    assert needed == checkpoint.save(folder, a_state(2)).stat().st_size


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
    with pytest.raises(CheckpointError, match=os.strerror(error)) as caught:
        checkpoint.save(folder, a_state(2))
    monkeypatch.undo()
    assert count == after + 1  # nothing is tried after the error
    assert ("bytes are needed" in str(caught.value)) == (error != errno.EIO)
    unchanged(folder)


@pytest.mark.parametrize("name", ["fsync", "link", "replace"])
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


def test_a_folder_that_cannot_be_made_or_written(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    for place in (tmp_path / "file", tmp_path / "file" / "run"):
        with pytest.raises(CheckpointError, match=f"cannot save a checkpoint in {place}: "):
            checkpoint.save(place, a_state())
    if os.geteuid() != 0:  # root may write anywhere
        (tmp_path / "locked").mkdir(mode=0o500)
        with pytest.raises(CheckpointError, match="Permission denied"):
            checkpoint.save(tmp_path / "locked", a_state())


@pytest.mark.processes
def test_leftovers_go_once_nobody_is_writing(folder, monkeypatch):
    """While another process holds the folder its unfinished file stays; where folders cannot be locked, always."""
    other = folder / ".checkpoint-0123456789abcdef.new"
    mine = folder / ".checkpoint-notes.txt"
    for path in (other, mine):
        path.write_text("half")
    with monkeypatch.context() as patch:

        def refuse(*_):
            raise OSError(errno.ENOLCK, "No locks available")

        patch.setattr(fcntl, "flock", refuse)
        checkpoint.save(folder, a_state(2))
        assert other.exists()
    code = (
        "import sys; from pathlib import Path; from senet_fused.train import checkpoint; print('ready', flush=True)\n"
        "checkpoint.save(Path(sys.argv[1]), {'number': 7}); print('saved', flush=True)"
    )
    descriptor = os.open(folder, os.O_RDONLY)
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    environment = {**os.environ, "PYTHONPATH": str(PACKAGE), "OMP_NUM_THREADS": "1"}
    saver = subprocess.Popen(
        [sys.executable, "-c", code, str(folder)], stdout=subprocess.PIPE, text=True, env=environment
    )
    try:
        assert saver.stdout.readline() == "ready\n"
        with pytest.raises(subprocess.TimeoutExpired):
            saver.wait(0.3)
        assert other.exists() and checkpoint.load(folder)["number"] == 2
        os.close(descriptor)
        assert saver.communicate(timeout=60)[0] == "saved\n"
    finally:
        saver.kill()
        saver.wait()
    assert not other.exists() and mine.exists() and checkpoint.load(folder)["number"] == 7


@pytest.mark.processes
def test_a_kill_at_any_step_leaves_a_complete_one(tmp_path):
    environment = {**os.environ, "PYTHONPATH": str(PACKAGE), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, str(Path(__file__).with_name("checkpoint_kills.py")), str(tmp_path / "run")],
        env=environment, capture_output=True, text=True, timeout=240,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    results = {result.pop("start"): result for result in map(json.loads, done.stdout.splitlines())}
    assert len(results) == 6
    # Kills before the rename left the old one (where there was one), those after it the new one.
    for start, old in {"one": "0", "two": "1", "no hard links": "1", "last.pt is damaged": "0"}.items():
        assert results[start][old] >= 8 and results[start]["9"] >= 3, results
    assert results["two"]["1"] >= 15  # every third write of the file, and what comes after
    assert results["the file may not grow"]["limits"] > 5


# ---------------------------------------------------------------------------------- the model, and random numbers


def test_of_another_model():
    here = {"model": "se_resnet20", "classes": 10, "size": [8, 8], "ema": 0.99}
    checkpoint.check_model({"description": dict(here)}, here)
    with pytest.raises(CheckpointError) as caught:
        there = {"model": "senet154", "classes": 10, "size": [8, 9], "ratio": 16}
        checkpoint.check_model({"description": there}, here)
    assert str(caught.value) == (
        "the checkpoint is of another model: model is 'senet154' in the checkpoint and 'se_resnet20' here; "
        "size is [8, 9] in the checkpoint and [8, 8] here; ratio is 16 in the checkpoint and absent here; "
        "ema is absent in the checkpoint and 0.99 here"
    )
    for state in ({}, {"description": "se_resnet20"}):
        with pytest.raises(CheckpointError, match="does not say of which model"):
            checkpoint.check_model(state, here)


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


def test_another_generator_of_numpy(monkeypatch):
    monkeypatch.setattr(numpy.random, "get_state", lambda legacy: {"bit_generator": "PCG64"})
    with pytest.raises(RequestError, match="NumPy's global generator is PCG64"):
        checkpoint.rng_state()


def test_without_numpy(monkeypatch):
    monkeypatch.delitem(sys.modules, "numpy")
    state = checkpoint.rng_state()
    assert "numpy" not in state
    checkpoint.set_rng_state(state)
