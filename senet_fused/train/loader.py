"""Batches in an order that depends on seed and epoch alone, for several processes, and resumable in mid-epoch."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch.utils.data import Dataset, Sampler

from senet_fused.arguments import RequestError

from .items import ORDER, in_epoch, mixed

if TYPE_CHECKING:
    from torchdata.stateful_dataloader import StatefulDataLoader

__all__ = ["EpochSampler", "InEpoch", "loader_state", "make_loader", "restore_loader", "set_epoch"]


class EpochSampler(Sampler[int]):
    """One process's share of the indices 0 to length - 1: those at places rank, rank + world_size, ... of the order.

    The order is that of the indices, or one drawn for (seed, epoch). So the processes' batches number i of size B are
    together the batch number i of size ``world_size * B`` that a single process would load.

    Where length is no multiple of world_size: with drop_last the order's last indices are left out. Otherwise a
    shuffled order starts again, so that all processes make equally many steps, and one that is not shuffled ends, so
    that nothing is counted twice.

    It is written for torchdata's StatefulDataLoader: its iterators have a state. torchdata's own
    StatefulDistributedSampler always starts the order again, and after the state of a finished epoch its next one
    is empty.
    """

    def __init__(self, length: int, *, seed: int, shuffle: bool, rank: int, world_size: int, drop_last: bool) -> None:
        if not 0 <= rank < world_size:
            raise ValueError(f"rank must be from 0 to world_size - 1 = {world_size - 1}, got {rank}")
        self.length, self.seed, self.shuffle = length, seed, shuffle
        self.rank, self.world_size, self.drop_last = rank, world_size, drop_last
        self.epoch = 0
        # Where the next pass begins, and whether the epoch's first one has.
        self.start = 0
        self.begun = False

    def set_epoch(self, epoch: int) -> None:
        """The epoch of the passes to come. A pass that is to begin in the midst of this same epoch still does."""
        if epoch != self.epoch:
            self.epoch = epoch
            self.start_at(0)

    def start_at(self, position: int) -> None:
        """Lets the next pass, and only that, begin behind so many of this process's indices."""
        self.start, self.begun = position, False

    def indices(self) -> list[int]:
        """This process's indices in this epoch."""
        if self.shuffle:
            generator = torch.Generator().manual_seed(mixed(ORDER, self.seed, self.epoch))
            order = torch.randperm(self.length, generator=generator)
        else:
            order = torch.arange(self.length)
        places = self.rank + self.world_size * torch.arange(len(self))
        return order[places % max(self.length, 1)].tolist()

    def __len__(self) -> int:
        if self.drop_last:
            return self.length // self.world_size
        if self.shuffle:
            return math.ceil(self.length / self.world_size)
        return len(range(self.rank, self.length, self.world_size))

    def __iter__(self) -> _Pass:
        return _Pass(self)


class _Pass(Iterator[int]):
    """One pass over an epoch, which begins when its first index is taken: loaders also make passes they never use."""

    def __init__(self, sampler: EpochSampler) -> None:
        self.sampler = sampler
        self.indices: list[int] | None = None
        self.epoch = self.position = 0

    def _begin(self, position: int) -> None:
        self.indices, self.epoch, self.position = self.sampler.indices(), self.sampler.epoch, position
        self.sampler.start, self.sampler.begun = 0, True

    def __next__(self) -> int:
        if self.indices is None:
            self._begin(self.sampler.start)
        if self.position >= len(self.indices):
            raise StopIteration
        self.position += 1
        return self.indices[self.position - 1]

    def state_dict(self) -> dict[str, int]:
        if self.indices is None:
            return {"epoch": self.sampler.epoch, "position": self.sampler.start}
        return {"epoch": self.epoch, "position": self.position}

    def load_state_dict(self, state: dict[str, int]) -> None:
        if state["epoch"] != self.sampler.epoch:
            raise ValueError(
                f"this loader's state is of epoch {state['epoch']}, but the loader is set to epoch "
                f"{self.sampler.epoch}: call set_epoch(loader, {state['epoch']}) first, or use restore_loader"
            )
        self._begin(state["position"])


class InEpoch(Dataset):
    """A loader's dataset, its items those of the loader's epoch; inside torch's wrappers (Subset, ...), too."""

    def __init__(self, dataset: Dataset) -> None:
        self.dataset = dataset
        # Shared, so that worker processes that are already running see the next epoch.
        self.epoch = torch.zeros((), dtype=torch.int64).share_memory_()

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> Any:
        with in_epoch(int(self.epoch)):
            return self.dataset[index]


def make_loader(
    dataset: Dataset,
    *,
    batch_size: int,
    seed: int,
    shuffle: bool,
    rank: int = 0,
    world_size: int = 1,
    workers: int = 0,
    drop_last: bool = False,
    pin_memory: bool = False,
) -> StatefulDataLoader:
    """A loader of batches: images float32 [batch_size, C, H, W] and class numbers int64 [batch_size].

    Order and augmentation depend on seed and epoch alone (call :func:`set_epoch` before each), so neither on
    ``workers``, the number of processes that load images (they live as long as the loader), nor on a restart (see
    :func:`loader_state`). Loading draws nothing from the process's random generators. Any dataset of images and class
    numbers will do; ``loader.dataset.dataset`` is the one given here.

    With several training processes each passes its rank, and batch_size is that of one. Their batches number i are
    together the batch number i of a single process with ``world_size * batch_size``. For training ask for ``shuffle``:
    all ranks then have equally many batches (without ``drop_last`` some images come twice, where the images cannot be
    shared out evenly). For evaluation do not shuffle: every image comes exactly once over all ranks, so add up right
    answers *and* images over the batches, then once over the ranks, and divide. Some ranks may then have an image
    less, and, if the last batch has fewer images than there are ranks, one batch less: no collective operation may
    run per batch, which the forward of DistributedDataParallel does, so evaluate the module inside it.

    Raises RequestError if there would be no batch.
    """
    if batch_size < 1:
        raise RequestError(f"the batch size must be 1 or more, got {batch_size}")
    if workers < 0:
        raise RequestError(f"the number of worker processes must be 0 or more, got {workers}")
    length = len(dataset)
    if not length:
        raise RequestError("there are no images to load")
    if drop_last and length < batch_size * world_size:
        ranks = f" on each of {world_size} ranks" if world_size > 1 else ""
        raise RequestError(
            f"there is no full batch: batches of {batch_size}{ranks}, but only {length} images; "
            f"use batches of {length // world_size} or fewer"
            if length >= world_size
            else f"{length} images cannot be shared out to {world_size} ranks; use fewer processes"
        )
    try:
        from torchdata.stateful_dataloader import StatefulDataLoader
    except ImportError as error:
        raise RequestError(f'images are loaded with torchdata ({error}): pip install "senet_fused[train]"') from None
    sampler = EpochSampler(length, seed=seed, shuffle=shuffle, rank=rank, world_size=world_size, drop_last=drop_last)
    with warnings.catch_warnings():
        # torchdata 0.11 still sets one of PyTorch's "vitals", which PyTorch 2.13 warns of.
        warnings.filterwarnings("ignore", message="'set_vital' is deprecated")
        return StatefulDataLoader(
            InEpoch(dataset),
            batch_size=batch_size,
            sampler=sampler,
            num_workers=workers,
            persistent_workers=workers > 0,
            drop_last=drop_last,
            pin_memory=pin_memory,
            # Without one, every pass would draw the worker processes' seed from the process's generator.
            generator=torch.Generator().manual_seed(mixed(seed)),
        )


def set_epoch(loader: StatefulDataLoader, epoch: int) -> None:
    """Order and augmentation of the next pass are those of this epoch, in the worker processes too.

    Call it before every epoch's first batch, and not during a pass: images that are being loaded would change. Without
    effect, and so harmless after :func:`restore_loader`, if the loader is in that epoch already; it starts in epoch 0.
    """
    if epoch < 0:
        raise ValueError(f"epoch must be 0 or more, got {epoch}")
    loader.sampler.set_epoch(epoch)
    loader.dataset.epoch.fill_(epoch)


def _fixed(loader: StatefulDataLoader) -> dict[str, Any]:
    """What must be the same for "batch number i" to mean the same images."""
    sampler = loader.sampler
    return {
        "images": sampler.length,
        "images_per_step": loader.batch_size * sampler.world_size,
        "seed": sampler.seed,
        "shuffle": sampler.shuffle,
    }


def loader_state(loader: StatefulDataLoader) -> dict[str, Any]:
    """Where the loader is: its epoch, how many batches it has given, and what it must be restored into.

    At any time; a few numbers, which ``torch.load(weights_only=True)`` reads. It is the same on all ranks (those that
    do not shuffle may end a batch earlier), and does not depend on the number of worker processes.
    The loader's own ``state_dict()`` works as well, with torchdata's limits: equally many workers, the same
    ``set_epoch`` before ``load_state_dict``, and none between ``state_dict()`` and the pass, which it starts.
    """
    sampler = loader.sampler
    if sampler.begun or loader.next_iter_state is not None:
        state = loader.state_dict()
        snapshot = state["_snapshot"]["_main_snapshot"] if "_snapshot" in state else state
        position = snapshot["_sampler_iter_state"]["sampler_iter_state"]["position"]
    else:  # asking the loader would start its workers
        position = sampler.start
    batches = min(math.ceil(position / loader.batch_size), len(loader))
    return {"epoch": sampler.epoch, "batches": batches, **_fixed(loader)}


def restore_loader(loader: StatefulDataLoader, state: dict[str, Any], epoch: int) -> None:
    """The loader's next pass gives exactly the batches of ``epoch`` that were not given when the state was taken.

    None, if all were; then ``epoch`` may also be the following one, and is given whole. The number of workers may
    differ from the saved loader's, and that of ranks if ``batch_size * world_size`` does not.

    Raises RequestError if the state is of another epoch, or of a loader with other images, batches, seed or order.
    """
    now = _fixed(loader)
    missing = sorted({"epoch", "batches", *now} - state.keys())
    if missing:
        raise RequestError(f"this is no loader's state: {', '.join(missing)} missing; loader_state(loader) gives one")
    other = [f"{name} {state[name]!r} (now {now[name]!r})" for name in now if state[name] != now[name]]
    if other:
        raise RequestError(f"cannot resume in mid-epoch: the saved loader had {', '.join(other)}; use the same again")
    batches = state["batches"]
    if epoch != state["epoch"]:
        if epoch != state["epoch"] + 1 or batches < len(loader):
            raise RequestError(
                f"the loader's state is of epoch {state['epoch']}, after {batches} of {len(loader)} batches: it cannot "
                f"be resumed in epoch {epoch}"
            )
        batches = 0
    loader.load_state_dict({})  # forgets a pass that has been started
    set_epoch(loader, epoch)
    loader.sampler.start_at(batches * loader.batch_size)
