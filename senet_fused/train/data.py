"""Where training images come from, by a word on the command line, and the loaders of their batches."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch.utils.data import Dataset, Subset

from senet_fused.arguments import RequestError
from senet_fused.handwritten_digits import load_images

from .image_folder import BROKEN, ImageFiles, folder_transform, read_folder
from .images import CIFAR10_PADDING, BytesToImage, Patterns, Shift, StoredImages, mean_and_std, read_cifar10
from .items import SeededItems
from .loader import InEpoch, loader_state, make_loader, restore_loader, set_epoch

__all__ = [
    "SOURCES",
    "Source",
    "broken_files",
    "loader_state",
    "make_loader",
    "open_source",
    "restore_loader",
    "set_epoch",
]

SOURCES = "digits, cifar10:DIR, imagefolder:DIR, synthetic or synthetic:CLASSES,TRAIN,HELD_OUT"
# Classes, training images, held-out images.
SYNTHETIC = (10, 1024, 256)


class Source(NamedTuple):
    """Images and what they show; an item is an image, float32 [C, H, W], and its class number, an int."""

    train: Dataset
    held_out: Dataset
    classes: tuple[str, ...]
    shape: tuple[int, int, int]


def open_source(spec: str, *, size: int | None, seed: int, broken: str = "raise", augment: bool = True) -> Source:
    """The images that ``spec`` names. Nothing is downloaded.

    Args:
        spec: ``digits``: scikit-learn's handwritten digits (one channel; 360 of the 1797 are held out; augmentation
            moves them by up to an eighth of their side). ``cifar10:DIR``: CIFAR-10's files for Python, in DIR or in
            DIR/cifar-10-batches-py (moved by up to 4 pixels, mirrored). ``imagefolder:DIR``: DIR/train/CLASS/* and
            DIR/val/CLASS/*, wants torchvision (random crop, mirrored). ``synthetic``, or
            ``synthetic:CLASSES,TRAIN,HELD_OUT`` with three numbers (default 10,1024,256): a random pattern a class,
            and noise, made on the fly (moved by up to an eighth of their side).
        size: the side of the square images; None: 32 for digits and CIFAR-10, 224 for the others.
        seed: of the augmentation, the split of the digits, and the synthetic images; from 0 to 2^32 - 1.
        broken: of an image file that cannot be decoded: "raise" an error that names it, or "skip" it, see
            :class:`.image_folder.ImageFiles` and :func:`broken_files`. What stands in for a held-out one has the
            class number -1.
        augment: whether the training images are augmented. The held-out ones never are.

    Raises RequestError where that cannot be done.
    """
    kind, _, where = spec.partition(":")
    openers = {"digits": _digits, "cifar10": _cifar10, "imagefolder": _image_folder, "synthetic": _synthetic}
    if kind not in openers:
        raise RequestError(f"unknown images {spec!r}; known: {SOURCES}")
    if kind in ("cifar10", "imagefolder") and not where:
        raise RequestError(f"{kind} needs a folder: {kind}:DIR")
    if kind == "digits" and where:
        raise RequestError(f"digits takes nothing behind it, got {spec!r}")
    if size is None:
        size = 32 if kind in ("digits", "cifar10") else 224
    if size < 1:
        raise RequestError(f"the images' side must be 1 or more, got {size}")
    if not 0 <= seed < 2**32:
        raise RequestError(f"the seed must be from 0 to 2^32 - 1, got {seed}")
    if broken not in BROKEN:
        raise RequestError(f"broken must be {' or '.join(map(repr, BROKEN))}, got {broken!r}")
    return openers[kind](where, size, seed, broken, augment)


def broken_files(dataset: Dataset) -> list[str]:
    """The image files that were skipped so far (``broken="skip"``), in whichever worker process."""
    while isinstance(dataset, (Subset, InEpoch)):
        dataset = dataset.dataset
    images = getattr(dataset, "images", None)
    return images.found_broken() if isinstance(images, ImageFiles) else []


def _as_it_is(image: torch.Tensor) -> torch.Tensor:
    return image


def _digits(_: str, size: int, seed: int, broken: str, augment: bool) -> Source:
    try:
        images, targets, held_images, held_targets = load_images(size, seed)
    except ImportError as error:
        raise RequestError(
            f'the digits come with scikit-learn, which is missing here ({error}): pip install "senet_fused[train]"'
        ) from None
    moved = Shift(size // 8, fill=float(images.min())) if augment else _as_it_is
    return Source(
        SeededItems(StoredImages(images, targets), moved, seed=seed),
        SeededItems(StoredImages(held_images, held_targets), _as_it_is, seed=seed),
        tuple("0123456789"),
        (1, size, size),
    )


def _cifar10(where: str, size: int, seed: int, broken: str, augment: bool) -> Source:
    train, held_out, classes = read_cifar10(where)
    mean, std = mean_and_std(train.images)
    plain = BytesToImage(size, mean, std)
    moved = BytesToImage(size, mean, std, shift=CIFAR10_PADDING) if augment else plain
    return Source(
        SeededItems(train, moved, seed=seed), SeededItems(held_out, plain, seed=seed), classes, (3, size, size)
    )


def _image_folder(where: str, size: int, seed: int, broken: str, augment: bool) -> Source:
    train, held_out, classes = read_folder(where, broken)
    return Source(
        SeededItems(train, folder_transform(size, augment), seed=seed),
        SeededItems(held_out, folder_transform(size, augment=False), seed=seed),
        classes,
        (3, size, size),
    )


def _synthetic(numbers: str, size: int, seed: int, broken: str, augment: bool) -> Source:
    try:
        classes, train, held_out = map(int, numbers.split(",")) if numbers else SYNTHETIC
        if min(classes, train, held_out) < 1:
            raise ValueError
    except ValueError:
        raise RequestError(
            f"synthetic: expected three numbers from 1 on, CLASSES,TRAIN,HELD_OUT, got {numbers!r}"
        ) from None
    moved = Shift(size // 8) if augment else _as_it_is
    return Source(
        SeededItems(Patterns(train, classes, size, seed, part=0), moved, seed=seed),
        SeededItems(Patterns(held_out, classes, size, seed, part=1), _as_it_is, seed=seed),
        tuple(map(str, range(classes))),
        (3, size, size),
    )
