"""A dataset whose random augmentation depends on seed, epoch and index alone."""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

__all__ = ["NOISE", "NO_CLASS", "ORDER", "PATTERN", "SeededItems", "in_epoch", "mixed", "seeded"]

# What random numbers are for; one number more in mixed(), so that no two uses draw the same ones.
ORDER, AUGMENTATION, PATTERN, NOISE = range(4)

# The class number of an item that only keeps a place: evaluation does not count it.
NO_CLASS = -1

_epoch: ContextVar[int] = ContextVar("epoch", default=0)


def mixed(*numbers: int) -> int:
    """A seed for torch's generators that depends on all numbers and on their order.

    seed + epoch would not do: seed 1 would then repeat seed 0's second epoch as its first.
    """
    digest = hashlib.blake2b(struct.pack(f"<{len(numbers)}q", *numbers), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1  # a signed 64-bit number


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Torch's CPU generator starts from seed, and goes on afterwards as if nothing had been drawn.

    Not ``torch.manual_seed``, which seeds the generators of all GPUs as well.
    """
    before = torch.default_generator.get_state()
    torch.default_generator.manual_seed(seed)
    try:
        yield
    finally:
        torch.default_generator.set_state(before)


@contextmanager
def in_epoch(epoch: int) -> Iterator[None]:
    """Items of :class:`SeededItems` that are taken inside are those of this epoch; elsewhere, of epoch 0."""
    before = _epoch.set(epoch)
    try:
        yield
    finally:
        _epoch.reset(before)


class SeededItems(Dataset):
    """Item i is ``(transform(image), class number)`` for ``image, class number = images[i]``.

    The transform may draw from torch's CPU generator, as those of torchvision.transforms.v2 do. What it draws depends
    on (seed, epoch, i) alone, see :func:`in_epoch`: not on the process, on the order of the items or on what was
    loaded before. The generator's own state does not change.
    """

    def __init__(self, images: Sequence[tuple[Any, int]], transform: Callable[[Any], Tensor], *, seed: int) -> None:
        self.images = images
        self.transform = transform
        self.seed = seed

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        if not 0 <= index < len(self):
            raise IndexError(f"there are {len(self)} images, so no image {index}")
        image, target = self.images[index]
        with seeded(mixed(AUGMENTATION, self.seed, _epoch.get(), index)):
            return self.transform(image), target
