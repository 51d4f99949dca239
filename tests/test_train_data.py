"""Training images: what is in them, and that seed and epoch alone decide what comes when. Folders: tests/peers."""

from __future__ import annotations

import pickle
import sys
import warnings
from collections import Counter

import pytest
import torch

from senet_fused import handwritten_digits
from senet_fused.arguments import RequestError
from senet_fused.train.data import EpochSampler, SeededImages, _seeded, _Shift, make_loader, mixed, open_source

LENGTH = 23


@pytest.fixture(scope="module")
def items():
    """23 small images whose training items differ from epoch to epoch; image i is of class i."""
    return open_source(f"synthetic:{LENGTH},{LENGTH},11", size=16, seed=5).train


def batches(loader, epoch=0, skip=0):
    loader.sampler.start(epoch, skip)
    return [(images.clone(), targets.tolist()) for images, targets in loader]


def same(first, second):
    return len(first) == len(second) and all(
        a[1] == b[1] and torch.equal(a[0], b[0]) for a, b in zip(first, second, strict=True)
    )


def loader_of(items, workers=0, batch_size=4, seed=3, **more):
    return make_loader(items, batch_size, seed, workers=workers, **more)


# ---- order and augmentation


def test_an_item_depends_on_seed_epoch_and_index_alone(items):
    forwards = [items[0, index][0].clone() for index in range(LENGTH)]
    torch.manual_seed(99)
    torch.rand(7)
    for index in reversed(range(LENGTH)):
        assert torch.equal(items[0, index][0], forwards[index])
    assert sum(torch.equal(items[1, index][0], forwards[index]) for index in range(LENGTH)) < LENGTH / 2
    image, target = pickle.loads(pickle.dumps(items))[1, 4]  # as for worker processes that are spawned
    assert torch.equal(image, items[1, 4][0]) and target == 4


def test_seeds_do_not_repeat_each_other():
    assert len({mixed(seed, epoch) for seed in range(40) for epoch in range(40)}) == 1600
    assert mixed(1, 2, 3) != mixed(1, 2) != mixed(2, 1)
    assert all(0 <= mixed(seed) < 2**63 for seed in range(100))

    def order(seed, epoch):
        sampler = EpochSampler(50, seed)
        sampler.start(epoch)
        epochs, indices = zip(*sampler, strict=True)
        assert set(epochs) == {epoch}
        return indices

    orders = {order(seed, epoch) for seed in range(5) for epoch in range(5)}
    assert len(orders) == 25, "seed 1 must not repeat the epochs of seed 0, one later"
    assert all(sorted(one) == list(range(50)) for one in orders)


def test_seeded_leaves_the_generator_as_it_was():
    torch.manual_seed(1)
    expected = torch.rand(3)
    torch.manual_seed(1)
    with _seeded(7):
        inside = torch.rand(3)
    assert torch.equal(torch.rand(3), expected) and not torch.equal(inside, expected)
    with pytest.raises(ZeroDivisionError), _seeded(7):
        assert torch.equal(torch.rand(3), inside)
        raise ZeroDivisionError
    torch.manual_seed(1)
    assert torch.equal(torch.rand(3), expected)


def test_worker_processes_change_nothing_and_follow_the_epoch(items):
    alone, workers = loader_of(items), loader_of(items, workers=2)
    seen = []
    for epoch in (0, 1, 3, 0):
        seen.append(batches(alone, epoch))
        assert same(batches(workers, epoch), seen[-1]), f"epoch {epoch}, by the same worker processes"
    assert same(seen[0], seen[3]) and not same(seen[0], seen[1])
    for epoch in seen:
        found = sum((targets for _, targets in epoch), [])
        assert len(set(found)) == len(found) == 20, "each once, without a last smaller batch"


def test_leaving_an_epoch_early(items):
    """Workers have loaded ahead; what they have must not be seen later."""
    expected = batches(loader_of(items), 1)
    for workers in (0, 2):
        loader = loader_of(items, workers=workers)
        next(iter(loader))
        assert same(batches(loader, 1), expected), workers


@pytest.mark.parametrize("workers", [0, 2])
def test_loading_draws_nothing_from_the_process(items, workers):
    torch.manual_seed(4)
    before = torch.get_rng_state()
    loader = loader_of(items, workers=workers)
    for epoch in (0, 1):
        batches(loader, epoch)
    assert torch.equal(torch.get_rng_state(), before)


def test_the_loader_warns_of_nothing(items):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        images, targets = next(iter(loader_of(items)))
    assert images.shape == (4, 3, 16, 16) and images.dtype == torch.float32 and targets.dtype == torch.int64


# ---- several processes, and resuming


@pytest.mark.parametrize("seed", [3, None], ids=["training", "evaluation"])
@pytest.mark.parametrize("length", [24, 23, 17])
def test_two_processes_share_the_batches_of_one(items, length, seed):
    some = SeededImages([items.images[index % LENGTH] for index in range(length)], items.transform, 5)
    one = loader_of(some, batch_size=8, seed=seed)
    ranks = [loader_of(some, batch_size=4, seed=seed, rank=rank, size=2) for rank in (0, 1)]
    whole, *parts = (batches(loader, 2) for loader in (one, *ranks))
    assert [len(loader) for loader in (one, *ranks)] == [len(whole), len(parts[0]), len(parts[1])]
    assert len(whole) == (length // 8 if seed is not None else -(-length // 8))
    full = length // 8
    for step in range(full):
        both = [rank[step] for rank in parts]
        for place in range(8):
            images, targets = both[place % 2]
            assert targets[place // 2] == whole[step][1][place]
            assert torch.equal(images[place // 2], whole[step][0][place])
    rest = Counter(sum((targets for rank in parts for _, targets in rank[full:]), []))
    assert rest == Counter(sum((targets for _, targets in whole[full:]), [])), "each counts once"


def test_shares_of_more_processes_than_images():
    def shares(seed):
        return [[index for _, index in EpochSampler(3, seed, rank, 5)] for rank in range(5)]

    assert shares(None) == [[0], [1], [2], [], []]
    assert shares(0) == [[]] * 5


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("how", [{}, {"seed": None}, {"rank": 1, "size": 2, "batch_size": 2}], ids=str)
def test_resuming_gives_exactly_the_remaining_batches(items, how, workers):
    whole = batches(loader_of(items, **how), 1)
    size = how.get("batch_size", 4)
    for count in (1, len(whole)) if workers else range(len(whole) + 1):
        resumed = loader_of(items, workers, **how)
        assert same(batches(resumed, 1, count * size), whole[count:]), count
        assert len(resumed) == len(whole), "the length of a whole epoch"
        assert len(batches(resumed, 2)) == len(whole), "the next epoch is whole"


# ---- sources


def test_digits():
    pytest.importorskip("sklearn", reason='scikit-learn is missing: pip install "senet_fused[train]"')
    source = open_source("digits", size=None, seed=2)
    images, targets, held, held_targets = handwritten_digits.load_images(32, 2)
    assert source.shape == (1, 32, 32) and source.classes == tuple("0123456789")
    assert len(source.train) == len(targets) == 1437 and len(source.held_out) == len(held_targets) == 360
    plain = open_source("digits", size=None, seed=2, augment=False).train
    for index in (0, 359):
        assert torch.equal(source.held_out[0, index][0], held[index])
        assert torch.equal(plain[0, index][0], images[index])
    # Shifted: as many rows and columns are left as the shift leaves, and they are the image's own.
    moves = set()
    for index in range(30):
        image, target = source.train[0, index]
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
    with _seeded(0):
        assert {tuple(_Shift(1, -1)(image).flatten().tolist()) for _ in range(150)} == expected
        assert torch.equal(_Shift(0)(image), image)


def test_synthetic_images_show_their_class():
    source = open_source("synthetic:5,40,20", size=24, seed=7)
    assert (len(source.train), len(source.held_out), source.shape) == (40, 20, (3, 24, 24))
    assert source.classes == ("0", "1", "2", "3", "4")
    again = open_source("synthetic:5,40,20", size=24, seed=7)
    other = open_source("synthetic:5,40,20", size=24, seed=8)
    assert torch.equal(source.train[0, 3][0], again.train[0, 3][0])
    assert not torch.equal(source.held_out[0, 3][0], other.held_out[0, 3][0])
    plain = open_source("synthetic:5,40,20", size=24, seed=7, augment=False).train
    assert not torch.equal(plain[0, 0][0], source.held_out[0, 0][0]), "held-out images have noise of their own"
    assert not torch.equal(plain[0, 0][0], plain[0, 5][0])
    # The mean over a class's training images recognises the held-out ones.
    means = torch.stack([torch.stack([plain[0, index][0] for index in range(c, 40, 5)]).mean(0) for c in range(5)])
    for index in range(20):
        image, target = source.held_out[0, index]
        assert int((image - means).flatten(1).norm(dim=1).argmin()) == target == index % 5
    default = open_source("synthetic", size=None, seed=0)
    assert (len(default.train), len(default.held_out), default.shape) == (1024, 256, (3, 224, 224))
    assert default.train[0, 1023][0].shape == (3, 224, 224)


# ---- requests that cannot be met


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("mnist", "--data must be digits, cifar10:DIR, .*got 'mnist'"),
        ("digits:8", "--data digits takes no argument, got 'digits:8'"),
        ("cifar10", "--data cifar10 needs a folder: cifar10:DIR"),
        ("imagefolder:", "--data imagefolder needs a folder"),
        ("synthetic:3,4", "needs three numbers >= 1"),
        ("synthetic:3,4,0", "needs three numbers >= 1"),
        ("synthetic:a,b,c", "CLASSES,TRAIN,HELD_OUT needs three numbers >= 1, got 'a,b,c'"),
    ],
)
def test_requests_that_cannot_be_met(spec, message):
    with pytest.raises(RequestError, match=message):
        open_source(spec, size=None, seed=0)


@pytest.mark.parametrize(
    ("module", "spec", "package"),
    [
        ("sklearn.datasets", "digits", "scikit-learn"),
        ("torchvision", "imagefolder:.", "torchvision"),
        ("torchvision", "cifar10:.", "torchvision"),
    ],
)
def test_a_missing_package_is_named(monkeypatch, module, spec, package):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(RequestError, match=f"pip install {package}"):
        open_source(spec, size=8, seed=0)
