"""Training images: what is in them, and that seed and epoch alone decide what comes when. Folders: tests/peers."""

from __future__ import annotations

import io
import pickle
import sys
import warnings
from collections import Counter
from multiprocessing.reduction import ForkingPickler
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch.utils.data import ConcatDataset, Subset, TensorDataset

from senet_fused import handwritten_digits
from senet_fused.arguments import RequestError
from senet_fused.train import image_folder
from senet_fused.train.data import (
    broken_files,
    loader_state,
    make_loader,
    open_source,
    restore_loader,
    set_epoch,
)
from senet_fused.train.image_folder import ImageFiles
from senet_fused.train.images import CIFAR10_URL, BytesToImage, Shift, mean_and_std
from senet_fused.train.items import NO_CLASS, in_epoch, mixed, seeded
from senet_fused.train.loader import EpochSampler

torchdata = pytest.importorskip("torchdata", reason='torchdata is missing: pip install "senet_fused[train]"')

LENGTH = 23


@pytest.fixture(scope="module")
def items():
    """23 small images whose training items differ from epoch to epoch; image i is of class i."""
    return open_source(f"synthetic:{LENGTH},{LENGTH},11", size=16, seed=5).train


def batches(loader):
    return [(images.clone(), targets.tolist()) for images, targets in loader]


def same(first, second):
    return len(first) == len(second) and all(
        a[1] == b[1] and torch.equal(a[0], b[0]) for a, b in zip(first, second, strict=True)
    )


def loader_of(items, workers=0, batch_size=4, shuffle=True, seed=3, **more):
    return make_loader(items, batch_size=batch_size, seed=seed, shuffle=shuffle, workers=workers, **more)


# ---- order and augmentation


def test_an_item_depends_on_seed_epoch_and_index_alone(items):
    forwards = [items[index][0].clone() for index in range(LENGTH)]
    torch.manual_seed(99)
    torch.rand(7)
    for index in reversed(range(LENGTH)):
        assert torch.equal(items[index][0], forwards[index])
    with in_epoch(1):
        assert sum(torch.equal(items[index][0], forwards[index]) for index in range(LENGTH)) < LENGTH / 2
    assert torch.equal(items[4][0], forwards[4])
    with pytest.raises(IndexError, match="no image 23"):
        items[LENGTH]


def test_seeds_do_not_repeat_each_other():
    assert len({mixed(seed, epoch) for seed in range(40) for epoch in range(40)}) == 1600
    assert mixed(1, 2, 3) != mixed(1, 2) != mixed(2, 1)
    assert all(0 <= mixed(seed) < 2**63 for seed in range(100))

    def order(seed, epoch):
        sampler = EpochSampler(50, seed=seed, shuffle=True, rank=0, world_size=1, drop_last=False)
        sampler.set_epoch(epoch)
        return tuple(sampler)

    orders = {order(seed, epoch) for seed in range(5) for epoch in range(5)}
    assert len(orders) == 25, "seed 1 must not repeat the epochs of seed 0, one later"
    assert all(sorted(one) == list(range(50)) for one in orders)


def test_seeded_leaves_the_generator_as_it_was():
    torch.manual_seed(1)
    expected = torch.rand(3)
    torch.manual_seed(1)
    with seeded(7):
        inside = torch.rand(3)
    assert torch.equal(torch.rand(3), expected) and not torch.equal(inside, expected)
    with pytest.raises(ZeroDivisionError), seeded(7):
        assert torch.equal(torch.rand(3), inside)
        raise ZeroDivisionError
    torch.manual_seed(1)
    assert torch.equal(torch.rand(3), expected)


def test_worker_processes_change_nothing_and_follow_the_epoch(items):
    alone, workers = loader_of(items), loader_of(items, workers=2)
    seen = []
    for epoch in (0, 1, 3, 0):
        set_epoch(alone, epoch)
        seen.append(batches(alone))
        set_epoch(alone, 7)  # each loader has its own epoch
        set_epoch(workers, epoch)
        assert same(batches(workers), seen[-1]), f"epoch {epoch}, by the same worker processes"
    assert same(seen[0], seen[3]) and not same(seen[0], seen[1])
    assert all(sorted(sum((targets for _, targets in epoch), [])) == list(range(LENGTH)) for epoch in seen)


def test_augmentation_follows_the_epoch_inside_other_datasets(items):
    both = ConcatDataset([Subset(items, range(8)), TensorDataset(torch.zeros(1, 3, 16, 16), torch.zeros(1).long())])
    loader = loader_of(both, shuffle=False, batch_size=9)
    first = batches(loader)
    set_epoch(loader, 1)
    second = batches(loader)
    assert first[0][1] == second[0][1] == [*range(8), 0]
    assert not same(first, second)
    with in_epoch(1):
        assert torch.equal(second[0][0][3], items[3][0])


def test_loaders_of_one_dataset_do_not_disturb_each_other(items):
    first, second = loader_of(items), loader_of(items)
    expected = batches(first)
    iterator = iter(first)
    start = [next(iterator) for _ in range(2)]
    set_epoch(second, 4)
    batches(second)
    assert same([(images, targets.tolist()) for images, targets in [*start, *iterator]], expected)


@pytest.mark.processes
def test_processes_that_are_spawned_see_the_same(cifar10):
    """They get the dataset by pickle."""
    for spec in ("synthetic:2,3,4", f"cifar10:{cifar10}"):
        train = open_source(spec, size=16, seed=0).train
        image, target = pickle.loads(pickle.dumps(train))[2]
        assert torch.equal(image, train[2][0]) and target == train[2][1]
    loader = loader_of(open_source("synthetic:2,3,4", size=16, seed=0).train)
    received = pickle.loads(bytes(ForkingPickler.dumps(loader.dataset)))
    set_epoch(loader, 6)
    assert int(received.epoch) == 6


def test_leaving_an_epoch_early(items):
    """Workers have loaded ahead; what they have must not be seen later."""
    expected = loader_of(items)
    set_epoch(expected, 1)
    expected = batches(expected)
    for workers in (0, 2):
        loader = loader_of(items, workers=workers)
        set_epoch(loader, 0)
        next(iter(loader))
        set_epoch(loader, 1)
        assert same(batches(loader), expected), workers


@pytest.mark.parametrize("workers", [0, 2])
def test_loading_draws_nothing_from_the_process(items, workers):
    torch.manual_seed(4)
    before = torch.get_rng_state()
    loader = loader_of(items, workers=workers)
    for epoch in (0, 1):
        set_epoch(loader, epoch)
        batches(loader)
        loader_state(loader)
    assert torch.equal(torch.get_rng_state(), before)


def test_the_loader_warns_of_nothing(items):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        images, targets = next(iter(loader_of(items)))
    assert images.shape == (4, 3, 16, 16) and images.dtype == torch.float32 and targets.dtype == torch.int64


# ---- several ranks


@pytest.mark.parametrize("shuffle", [True, False])
@pytest.mark.parametrize("drop_last", [True, False])
@pytest.mark.parametrize("length", [24, 23, 17])
def test_two_ranks_share_the_batches_of_one_process(items, length, drop_last, shuffle):
    some = Subset(items, [index % LENGTH for index in range(length)])
    one = loader_of(some, batch_size=8, shuffle=shuffle, drop_last=drop_last)
    ranks = [
        loader_of(some, batch_size=4, shuffle=shuffle, drop_last=drop_last, rank=rank, world_size=2) for rank in (0, 1)
    ]
    for loader in (one, *ranks):
        set_epoch(loader, 2)
    whole, parts = batches(one), [batches(rank) for rank in ranks]
    assert [len(loader) for loader in (one, *ranks)] == [len(whole), len(parts[0]), len(parts[1])]
    assert len(whole) == (length // 8 if drop_last else -(-length // 8))
    full = length // 8
    for step in range(full):
        both = [rank[step] for rank in parts]
        for place in range(8):
            images, targets = both[place % 2]
            assert targets[place // 2] == whole[step][1][place]
            assert torch.equal(images[place // 2], whole[step][0][place])
    if not drop_last:
        rest = Counter(sum((targets for rank in parts for _, targets in rank[full:]), []))
        expected = Counter(sum((targets for _, targets in whole[full:]), []))
        if shuffle:
            assert len(parts[0]) == len(parts[1]), "all ranks make equally many steps"
            assert sum((rest - expected).values()) == length % 2
        assert not expected - rest
        if not shuffle:
            assert rest == expected, "nothing is counted twice"


def test_shares_of_more_ranks_than_images():
    def shares(**how):
        return [list(EpochSampler(3, seed=0, rank=rank, world_size=5, **how)) for rank in range(5)]

    assert shares(shuffle=False, drop_last=False) == [[0], [1], [2], [], []]
    shuffled = shares(shuffle=True, drop_last=False)
    assert [len(share) for share in shuffled] == [1] * 5 and {share[0] for share in shuffled} == {0, 1, 2}
    assert shares(shuffle=True, drop_last=True) == [[]] * 5
    with pytest.raises(ValueError, match="rank must be from 0 to world_size - 1 = 1, got 2"):
        EpochSampler(3, seed=0, shuffle=False, rank=2, world_size=2, drop_last=False)


# ---- resuming


def through_a_file(state):
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def taken(loader, count):
    iterator = iter(loader)
    return [(images.clone(), targets.tolist()) for _, (images, targets) in zip(range(count), iterator, strict=False)]


@pytest.mark.parametrize("helper", [True, False], ids=["loader_state", "state_dict"])
@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize(
    "how",
    [
        {"drop_last": False},
        {"drop_last": True},
        {"shuffle": False, "drop_last": False},
        {"drop_last": True, "rank": 1, "world_size": 2, "batch_size": 2},
        {"drop_last": False, "rank": 1, "world_size": 2, "batch_size": 2},
    ],
    ids=lambda how: "-".join(f"{name}={value}" for name, value in how.items()),
)
def test_resuming_gives_exactly_the_remaining_batches(items, how, workers, helper):
    whole = loader_of(items, **how)
    set_epoch(whole, 1)
    whole = batches(whole)
    counts = (1, len(whole)) if workers else range(len(whole) + 1)
    for count in counts:
        first = loader_of(items, workers, **how)
        set_epoch(first, 1)
        assert same(taken(first, count), whole[:count])
        state = through_a_file(loader_state(first) if helper else first.state_dict())
        second = loader_of(items, workers, **how)
        if helper:
            restore_loader(second, state, epoch=1)
        else:
            set_epoch(second, 1)
            second.load_state_dict(state)
        set_epoch(second, 1)  # as a training loop does at the head of each epoch
        assert same(batches(second), whole[count:]), count
        set_epoch(second, 2)
        assert len(batches(second)) == len(whole), "the next epoch is whole"


def test_a_restored_loader_is_restored_again(items):
    """Interrupted twice in an epoch; the first pass with workers, the second without, the third with more."""
    whole = batches(loader_of(items, batch_size=2))
    first = loader_of(items, 1, batch_size=2)
    restore_loader(first, loader_state(first), epoch=0)
    seen, state = taken(first, 3), loader_state(first)
    for workers, count in ((0, 2), (2, 1)):
        loader = loader_of(items, workers, batch_size=2)
        restore_loader(loader, state, epoch=0)
        assert loader_state(loader) == state, "nothing given yet"
        iter(loader)
        assert loader_state(loader) == state, "workers load ahead; that is not given"
        restore_loader(loader, state, epoch=0)
        seen += taken(loader, count)
        state = loader_state(loader)
        assert state["batches"] == len(seen)
    loader = loader_of(items, batch_size=2)
    restore_loader(loader, state, epoch=0)
    assert same(seen + batches(loader), whole)
    assert same(batches(loader), whole), "only the pass after restore_loader is a part"


@pytest.mark.parametrize("workers", [0, 1])
def test_torchdatas_state_and_ours_of_one_loader(items, workers):
    first = loader_of(items, workers)
    taken(first, 2)
    second = loader_of(items, workers)
    second.load_state_dict(first.state_dict())
    assert loader_state(second) == loader_state(first), "before its first pass"
    assert same(batches(second), batches(loader_of(items))[2:])


def test_a_state_of_another_number_of_ranks(items):
    whole = batches(loader_of(items, batch_size=4, drop_last=True))
    rank = loader_of(items, batch_size=2, drop_last=True, rank=1, world_size=2)
    taken(rank, 2)
    one = loader_of(items, batch_size=4, drop_last=True)
    restore_loader(one, loader_state(rank), epoch=0)
    assert same(batches(one), whole[2:])


def test_states_at_the_end_of_an_epoch(items):
    for workers in (0, 1):
        first = loader_of(items, workers)
        batches(first)
        state = loader_state(first)
        again = loader_of(items)
        restore_loader(again, state, epoch=0)
        assert batches(again) == []
        restore_loader(again, state, epoch=1)
        set_epoch(first, 1)
        assert loader_state(first)["batches"] == 0
        assert same(batches(again), batches(first))


def test_states_that_do_not_fit(items):
    loader = loader_of(items)
    taken(loader, 2)
    state = loader_state(loader)
    assert state == {
        "epoch": 0, "batches": 2, "images": LENGTH, "images_per_step": 4, "seed": 3, "shuffle": True,
    }  # fmt: skip
    for how, named in (
        ({"seed": 4}, r"seed 3 \(now 4\)"),
        ({"batch_size": 5}, r"images_per_step 4 \(now 5\)"),
        ({"shuffle": False}, r"shuffle True \(now False\)"),
    ):
        with pytest.raises(RequestError, match=named):
            restore_loader(loader_of(items, **how), state, epoch=0)
    for epoch in (1, 2):
        with pytest.raises(RequestError, match=f"epoch 0, after 2 of 6 batches: it cannot be resumed in epoch {epoch}"):
            restore_loader(loader_of(items), state, epoch=epoch)
    with pytest.raises(RequestError, match="no loader's state: batches, epoch, images"):
        restore_loader(loader_of(items), {"seed": 3, "shuffle": True}, epoch=0)
    unset = loader_of(items)
    set_epoch(unset, 1)
    unset.load_state_dict(loader.state_dict())
    with pytest.raises(ValueError, match=r"is of epoch 0, but .* epoch 1: call set_epoch\(loader, 0\)"):
        iter(unset)
    with pytest.raises(ValueError, match="0 or more"):
        set_epoch(loader, -1)


# ---- sources


def test_digits():
    pytest.importorskip("sklearn", reason='scikit-learn is missing: pip install "senet_fused[train]"')
    source = open_source("digits", size=None, seed=2)
    images, targets, held, held_targets = handwritten_digits.load_images(32, 2)
    assert source.shape == (1, 32, 32) and source.classes == tuple("0123456789")
    assert len(source.train) == len(targets) == 1437 and len(source.held_out) == len(held_targets) == 360
    plain = open_source("digits", size=None, seed=2, augment=False).train
    for index in (0, 359):
        assert torch.equal(source.held_out[index][0], held[index])
        assert torch.equal(plain[index][0], images[index])
    # Shifted: as many rows and columns are left as the shift leaves, and they are the image's own.
    moves = set()
    for index in range(30):
        image, target = source.train[index]
        assert target == targets[index] and type(target) is int and image.shape == (1, 32, 32)
        padded = torch.nn.functional.pad(images[index], [4] * 4, value=float(images.min()))
        found = [
            (y - 4, x - 4) for y in range(9) for x in range(9)
            if torch.equal(padded[:, y : y + 32, x : x + 32], image)
        ]  # fmt: skip
        assert found, "no shift by up to 4 pixels gives this item"
        moves.add(found[0])
    assert len(moves) > 15


def test_shift_reaches_every_place_and_mirrors_nothing():
    image = torch.arange(9.0).reshape(1, 3, 3)
    padded = torch.nn.functional.pad(image, [1] * 4, value=-1)
    expected = {tuple(padded[0, y : y + 3, x : x + 3].flatten().tolist()) for y in range(3) for x in range(3)}
    with seeded(0):
        assert {tuple(Shift(1, -1)(image).flatten().tolist()) for _ in range(150)} == expected
        assert torch.equal(Shift(0)(image), image)


def test_synthetic_images_show_their_class():
    source = open_source("synthetic:5,40,20", size=24, seed=7)
    assert (len(source.train), len(source.held_out), source.shape) == (40, 20, (3, 24, 24))
    assert source.classes == ("0", "1", "2", "3", "4")
    again = open_source("synthetic:5,40,20", size=24, seed=7)
    other = open_source("synthetic:5,40,20", size=24, seed=8)
    assert torch.equal(source.train[3][0], again.train[3][0])
    assert not torch.equal(source.held_out[3][0], other.held_out[3][0])
    plain = open_source("synthetic:5,40,20", size=24, seed=7, augment=False).train
    assert not torch.equal(plain[0][0], source.held_out[0][0]), "held-out images have noise of their own"
    assert not torch.equal(plain[0][0], plain[5][0])
    # The mean over a class's training images recognises the held-out ones.
    means = torch.stack([torch.stack([plain[index][0] for index in range(c, 40, 5)]).mean(0) for c in range(5)])
    for index in range(20):
        image, target = source.held_out[index]
        assert int((image - means).flatten(1).norm(dim=1).argmin()) == target == index % 5
    default = open_source("synthetic", size=None, seed=0)
    assert (len(default.train), len(default.held_out), default.shape) == (1024, 256, (3, 224, 224))
    assert default.train[1023][0].shape == (3, 224, 224)


@pytest.fixture
def cifar10(tmp_path):
    """The files of CIFAR-10, four images each."""
    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    generator = np.random.default_rng(0)
    for name in (*(f"data_batch_{number}" for number in range(1, 6)), "test_batch"):
        batch = {
            "data": generator.integers(0, 256, (4, 3072), dtype=np.uint8),
            "labels": generator.integers(0, 10, 4).tolist(),
        }
        (folder / name).write_bytes(pickle.dumps(batch, protocol=2))
    names = [f"kind {number}" for number in range(10)]
    (folder / "batches.meta").write_bytes(pickle.dumps({"label_names": names}, protocol=2))
    return tmp_path


@pytest.mark.parametrize("below", ["", "/cifar-10-batches-py"])
def test_cifar10(cifar10, below):
    source = open_source(f"cifar10:{cifar10}{below}", size=None, seed=0)
    assert (len(source.train), len(source.held_out), source.shape) == (20, 4, (3, 32, 32))
    assert source.classes[9] == "kind 9"
    raw = [
        pickle.loads((cifar10 / "cifar-10-batches-py" / f"data_batch_{number}").read_bytes()) for number in range(1, 6)
    ]
    pixels = torch.tensor(np.concatenate([batch["data"] for batch in raw])).view(20, 3, 32, 32).double() / 255
    mean, std = pixels.mean((0, 2, 3), keepdim=True)[0], pixels.std((0, 2, 3), keepdim=True, correction=0)[0]
    plain = open_source(f"cifar10:{cifar10}", size=None, seed=0, augment=False).train
    torch.testing.assert_close(plain[17][0].double(), (pixels[17] - mean) / std, atol=1e-5, rtol=1e-5)
    assert plain[17][1] == raw[4]["labels"][1]
    # Each training item is a crop of the padded image, as it is or mirrored.
    mirrored = 0
    for index in range(20):
        black = torch.nn.functional.pad(pixels[index], [4] * 4)
        item = source.train[index][0].double() * std + mean
        crops = [black[:, y : y + 32, x : x + 32] for y in range(9) for x in range(9)]
        as_it_is, flipped = (
            any(torch.allclose(crop, image, atol=1e-5) for crop in crops) for image in (item, item.flip(-1))
        )
        assert as_it_is != flipped
        mirrored += flipped
    assert 3 < mirrored < 17
    enlarged = open_source(f"cifar10:{cifar10}", size=48, seed=0)
    assert enlarged.shape == (3, 48, 48) == enlarged.train[0][0].shape == enlarged.held_out[0][0].shape


def test_mean_and_std_of_bytes_that_are_all_alike():
    mean, std = mean_and_std(torch.full((2, 1, 3, 3), 51, dtype=torch.uint8))
    assert mean.item() == pytest.approx(0.2) and std.item() > 0
    assert BytesToImage(3, mean, std)(torch.full((1, 3, 3), 51, dtype=torch.uint8)).abs().max() < 1e-4


class Payload:
    def __reduce__(self):
        return print, ("ran",)


def test_broken_cifar10(cifar10, capsys):
    folder = cifar10 / "cifar-10-batches-py"
    third = folder / "data_batch_3"
    whole = third.read_bytes()

    def refused(path, content, *named):
        before = path.read_bytes()
        path.unlink() if content is None else path.write_bytes(content)
        with pytest.raises(RequestError) as error:
            open_source(f"cifar10:{cifar10}", size=None, seed=0)
        path.write_bytes(before)
        for words in (CIFAR10_URL, *named):
            assert words in str(error.value)

    refused(third, None, str(third), "missing")
    refused(third, whole[:-100], str(third), "cannot read")
    refused(third, b"", str(third), "cannot read")
    refused(third, b"<html>not found</html>", str(third), "cannot read")
    refused(third, pickle.dumps(Payload()), str(third), "print does not belong there")
    assert "ran" not in capsys.readouterr().out
    refused(third, pickle.dumps([1]), str(third), "uint8 [N, 3072]")
    refused(third, pickle.dumps({"data": np.zeros((2, 3072), np.uint8), "labels": [0, 10]}), "'labels' below 10")
    refused(third, pickle.dumps({"data": np.zeros((2, 3072)), "labels": [0, 1]}), "uint8")
    refused(third, pickle.dumps({"data": np.zeros((2, 3072), np.uint8), "labels": [0]}), "uint8")
    refused(folder / "batches.meta", None, "no CIFAR-10 in", "tar -xzf")
    refused(folder / "batches.meta", pickle.dumps({}), "label_names")
    open_source(f"cifar10:{cifar10}", size=None, seed=0)


# ---- requests that cannot be met


@pytest.mark.parametrize(
    ("spec", "how", "message"),
    [
        ("mnist", {}, "unknown images 'mnist'; known: digits, cifar10:DIR"),
        ("digits:8", {}, "digits takes nothing behind it"),
        ("cifar10", {}, "cifar10 needs a folder: cifar10:DIR"),
        ("cifar10:/no/such", {}, "no CIFAR-10 in /no/such"),
        ("imagefolder:", {}, "imagefolder needs a folder"),
        ("synthetic:3,4", {}, "expected three numbers from 1 on"),
        ("synthetic:3,4,0", {}, "expected three numbers from 1 on"),
        ("synthetic:a,b,c", {}, "CLASSES,TRAIN,HELD_OUT, got 'a,b,c'"),
        ("synthetic", {"size": 0}, "side must be 1 or more, got 0"),
        ("synthetic", {"seed": -1}, r"seed must be from 0 to 2\^32 - 1, got -1"),
        ("synthetic", {"seed": 2**32}, "seed must be from 0"),
        ("synthetic", {"broken": "ignore"}, "broken must be 'raise' or 'skip', got 'ignore'"),
    ],
)
def test_requests_that_cannot_be_met(spec, how, message):
    with pytest.raises(RequestError, match=message):
        open_source(spec, **{"size": None, "seed": 0, **how})


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ({"batch_size": 0}, "batch size must be 1 or more, got 0"),
        ({"workers": -1}, "worker processes must be 0 or more"),
        ({"batch_size": 24, "drop_last": True}, "batches of 24, but only 23 images; use batches of 23 or fewer"),
        (
            {"batch_size": 12, "drop_last": True, "world_size": 2},
            "batches of 12 on each of 2 ranks, but only 23 images; use batches of 11 or fewer",
        ),
        ({"batch_size": 1, "drop_last": True, "world_size": 24}, "23 images cannot be shared out to 24 ranks"),
    ],
)
def test_loaders_that_cannot_be_made(items, how, message):
    with pytest.raises(RequestError, match=message):
        loader_of(items, **how)
    with pytest.raises(RequestError, match="no images"):
        loader_of(Subset(items, []))
    assert len(loader_of(items, batch_size=LENGTH, drop_last=True)) == 1


@pytest.mark.parametrize(
    ("module", "attempt", "extra"),
    [
        ("sklearn.datasets", lambda items: open_source("digits", size=8, seed=0), "train"),
        ("torchdata.stateful_dataloader", loader_of, "train"),
        ("torchvision", lambda items: open_source("imagefolder:.", size=8, seed=0), "vision"),
    ],
)
def test_a_missing_package_is_named(items, monkeypatch, module, attempt, extra):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(RequestError, match=rf'pip install "senet_fused\[{extra}\]"'):
        attempt(items)


def test_what_stands_in_for_a_held_out_image_does_not_count():
    def read(name):
        if name in "bd":
            raise ValueError("broken")
        return name

    samples = [(name, number) for number, name in enumerate("abcd")]
    trained, held_out = (ImageFiles(samples, read, "skip", count_once=once) for once in (False, True))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert [trained[i] for i in range(4)] == [("a", 0), ("c", 2), ("c", 2), ("a", 0)]
        assert [held_out[i] for i in range(4)] == [("a", 0), ("c", NO_CLASS), ("c", 2), ("a", NO_CLASS)]
    assert held_out.found_broken() == ["b", "d"]


def test_folders_are_opened_with_held_out_images_that_count_once(tmp_path, monkeypatch):
    class Folder:
        def __init__(self, part, allow_empty):
            self.targets, self.classes, self.samples = [0], ["cat"], [(f"{part}/cat/1.png", 0)]

    datasets = SimpleNamespace(ImageFolder=Folder, folder=SimpleNamespace(default_loader=str))
    monkeypatch.setattr(image_folder, "_torchvision", lambda: (datasets, None))
    for part in ("train", "val"):
        (tmp_path / part).mkdir()
    train, held_out, _ = image_folder.read_folder(str(tmp_path), "skip")
    assert (train.count_once, held_out.count_once) == (False, True)


def test_nothing_is_broken_where_there_are_no_files(items):
    assert broken_files(items) == broken_files(Subset(items, [1])) == []
