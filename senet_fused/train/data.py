"""Training and held-out images by a word on the command line, and loaders of their batches.

Order and augmentation depend on seed, epoch and index alone: not on the number of worker processes, nor on where a
resumed run starts in an epoch, nor on what else draws random numbers.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset, Sampler, TensorDataset

from ..arguments import RequestError
from ..handwritten_digits import load_images

__all__ = ["EpochSampler", "SeededImages", "Source", "make_loader", "mixed", "open_source"]

SOURCES = "digits, cifar10:DIR, imagefolder:DIR, synthetic or synthetic:CLASSES,TRAIN,HELD_OUT"
# What random numbers are for: one argument of mixed(), so that no two uses draw the same ones.
ORDER, AUGMENTATION, PATTERN, NOISE = range(4)
_SYNTHETIC = (10, 1024, 256)  # classes, training images, held-out images
_COARSE = 4  # pixels of a synthetic pattern before it is enlarged: large enough to survive the network's strides
# Mean and standard deviation per channel of the training images, on the scale from 0 to 1.
_IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
_CIFAR10 = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)


def mixed(*numbers: int) -> int:
    """A seed for torch's generators that depends on all numbers and on their order.

    seed + epoch would not do: seed 1 would then repeat the second epoch of seed 0 as its first.
    """
    digest = hashlib.blake2b(struct.pack(f"<{len(numbers)}q", *numbers), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1  # a signed 64-bit number


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """Seeds torch's CPU generator within the block, and restores its state afterwards.

    Not by ``torch.manual_seed``, which seeds the generators of all GPUs as well.
    """
    before = torch.default_generator.get_state()
    torch.default_generator.manual_seed(seed)
    try:
        yield
    finally:
        torch.default_generator.set_state(before)


# ---------------------------------------------------------------------------------- batches


@dataclass(frozen=True)
class SeededImages(Dataset):
    """Item (epoch, i) is ``(transform(image), class number)`` for ``image, class number = images[i]``.

    The transform may draw from torch's CPU generator, as torchvision.transforms.v2 does: it is seeded from
    (seed, epoch, i), and its state restored.
    """

    images: Sequence[tuple[Any, Any]]
    transform: Callable[[Any], Tensor]
    seed: int

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, item: tuple[int, int]) -> tuple[Tensor, int]:
        epoch, index = item
        image, target = self.images[index]
        with _seeded(mixed(AUGMENTATION, self.seed, epoch, index)):
            return self.transform(image), int(target)


class EpochSampler(Sampler[tuple[int, int]]):
    """The items (epoch, index) of one process: places rank, rank + size, rank + 2 size, ... of the epoch's order.

    So batches number i of size B of all processes are together batch number i of ``size * B`` of a single one.

    Args:
        seed: of the order. Equally many items for each process; the last ``length % size`` of the order are left out.
            None: every index once over all processes, in ascending order.
    """

    def __init__(self, length: int, seed: int | None, rank: int = 0, size: int = 1) -> None:
        self.length, self.seed, self.rank, self.size = length, seed, rank, size
        self._epoch = self._skip = 0

    def start(self, epoch: int, skip: int = 0) -> None:
        """The following passes are of this epoch, without its first ``skip`` items."""
        self._epoch, self._skip = epoch, skip

    def __len__(self) -> int:
        """Of a whole epoch."""
        return self.length // self.size if self.seed is not None else len(range(self.rank, self.length, self.size))

    def __iter__(self) -> Iterator[tuple[int, int]]:
        if self.seed is None:
            order = torch.arange(self.length)
        else:
            generator = torch.Generator().manual_seed(mixed(ORDER, self.seed, self._epoch))
            order = torch.randperm(self.length, generator=generator)
        own = order[self.rank :: self.size][: len(self)][self._skip :].tolist()
        return ((epoch, index) for epoch in (self._epoch,) for index in own)


def make_loader(
    images: SeededImages,
    batch_size: int,
    seed: int | None,
    *,
    rank: int = 0,
    size: int = 1,
    workers: int = 0,
    **options,
) -> DataLoader:
    """A loader of batches: images float32 [batch_size, C, H, W] and class numbers int64 [batch_size].

    ``loader.sampler.start(epoch, skip)`` chooses what the next pass gives. Loading does not draw from the process's
    random generators.

    Args:
        seed: of the training order, without a last smaller batch. None: for evaluation, see :class:`EpochSampler`;
            processes may then have different numbers of batches.
        workers: processes that load images; they live as long as the loader.
        options: of torch.utils.data.DataLoader.
    """
    return DataLoader(
        images,
        batch_size,
        sampler=EpochSampler(len(images), seed, rank, size),
        num_workers=workers,
        persistent_workers=workers > 0,
        drop_last=seed is not None,
        generator=torch.Generator(),  # else every pass draws the seed of its workers from the process's generator
        **options,
    )


# ---------------------------------------------------------------------------------- sources


class Source(NamedTuple):
    """Images float32 ``shape`` = [C, H, W] with class numbers, and the names of the classes."""

    train: SeededImages
    held_out: SeededImages
    classes: tuple[str, ...]
    shape: tuple[int, int, int]


def open_source(spec: str, *, size: int | None, seed: int, augment: bool = True) -> Source:
    """The images that ``spec`` names. Nothing is downloaded.

    Args:
        spec: ``digits``: scikit-learn's handwritten digits (one channel; 360 of the 1797 are held out; augmentation
            shifts them by up to an eighth of their side). ``cifar10:DIR``: the folder of cifar-10-batches-py (shifted
            by up to 4 pixels and mirrored, as in "Deep Residual Learning", section 4.2). ``imagefolder:DIR``:
            DIR/train/CLASS/* and DIR/val/CLASS/* (random crop, mirrored). ``synthetic``, or
            ``synthetic:CLASSES,TRAIN,HELD_OUT`` with three numbers (default 10,1024,256): a random pattern per class
            plus noise, generated on the fly (shifted by up to an eighth of their side).
        size: side of the square images; None: 32 for digits and CIFAR-10, 224 for the others.
        seed: of the augmentation, the split of the digits, and the synthetic images.
        augment: whether the training images are augmented. The held-out ones never are.

    Raises:
        RequestError: the images cannot be opened.
    """
    kind, _, where = spec.partition(":")
    openers = {"digits": _digits, "cifar10": _cifar10, "imagefolder": _image_folder, "synthetic": _synthetic}
    if kind not in openers:
        raise RequestError(f"--data must be {SOURCES}, got {spec!r}")
    if kind in ("cifar10", "imagefolder") and not where:
        raise RequestError(f"--data {kind} needs a folder: {kind}:DIR")
    if kind == "digits" and where:
        raise RequestError(f"--data digits takes no argument, got {spec!r}")
    if size is None:
        size = 32 if kind in ("digits", "cifar10") else 224
    train, held_out, transforms, classes = openers[kind](where, size, seed)
    augmented, plain = transforms
    shape = (1 if kind == "digits" else 3, size, size)
    return Source(
        SeededImages(train, augmented if augment else plain, seed), SeededImages(held_out, plain, seed), classes, shape
    )


# Training images, held-out images, the transforms of training with augmentation and without, and the classes.
_Opened = tuple[Sequence, Sequence, tuple[Callable, Callable], tuple[str, ...]]


@dataclass(frozen=True)
class _Shift:
    """Shifts an image [C, H, W] by up to so many pixels along both axes at random, and fills with ``fill``."""

    pixels: int
    fill: float = 0.0

    def __call__(self, image: Tensor) -> Tensor:
        height, width = image.shape[-2:]
        top, left = torch.randint(2 * self.pixels + 1, (2,)).tolist()
        padded = F.pad(image, [self.pixels] * 4, value=self.fill)
        return padded[..., top : top + height, left : left + width]


def _identity(image: Tensor) -> Tensor:
    return image


def _digits(_: str, size: int, seed: int) -> _Opened:
    try:
        images, targets, held_images, held_targets = load_images(size, seed)
    except ImportError as error:
        raise RequestError(f"--data digits needs scikit-learn ({error}): pip install scikit-learn") from None
    shift = _Shift(size // 8, fill=float(images.min()))
    train, held_out = TensorDataset(images, targets), TensorDataset(held_images, held_targets)
    return train, held_out, (shift, _identity), tuple("0123456789")


@dataclass(frozen=True)
class _Patterns:
    """Synthetic images float32 [3, size, size]; image i is of class ``i % classes``.

    A class has a smooth random pattern, which depends on the seed; the noise has its standard deviation, 1, and
    depends on seed, part (0: training, 1: held out) and i.
    """

    length: int
    classes: int
    size: int
    seed: int
    part: int

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        target = index % self.classes
        generator = torch.Generator().manual_seed(mixed(PATTERN, self.seed, target))
        coarse = torch.randn(1, 3, _COARSE, _COARSE, generator=generator)
        pattern = F.interpolate(coarse, size=(self.size, self.size), mode="bilinear", align_corners=False)[0]
        generator.manual_seed(mixed(NOISE, self.seed, self.part, index))
        return pattern + torch.randn(3, self.size, self.size, generator=generator), target


def _synthetic(numbers: str, size: int, seed: int) -> _Opened:
    try:
        classes, train, held_out = map(int, numbers.split(",")) if numbers else _SYNTHETIC
        if min(classes, train, held_out) < 1:
            raise ValueError
    except ValueError:
        raise RequestError(
            f"--data synthetic:CLASSES,TRAIN,HELD_OUT needs three numbers >= 1, got {numbers!r}"
        ) from None
    parts = (_Patterns(length, classes, size, seed, part) for part, length in enumerate((train, held_out)))
    return *parts, (_Shift(size // 8), _identity), tuple(map(str, range(classes)))


def _torchvision() -> tuple[Any, Any]:
    try:
        from torchvision import datasets
        from torchvision.transforms import v2
    except (ImportError, RuntimeError) as error:  # the latter from one that was built for another torch
        raise RequestError(
            f"cifar10 and imagefolder need a torchvision for this torch ({error}): pip install torchvision"
        ) from None
    return datasets, v2


def _transform(v2: Any, steps: list, statistics: tuple) -> Callable[[Any], Tensor]:
    return v2.Compose([*steps, v2.PILToTensor(), v2.ToDtype(torch.float32, scale=True), v2.Normalize(*statistics)])


def _cifar10(where: str, size: int, seed: int) -> _Opened:
    datasets, v2 = _torchvision()
    folder = Path(where).expanduser().resolve()
    root = folder.parent if folder.name == datasets.CIFAR10.base_folder else folder
    try:
        train, held_out = (datasets.CIFAR10(root, train=train) for train in (True, False))
    except RuntimeError:
        raise RequestError(
            f"CIFAR-10 must be in {root / datasets.CIFAR10.base_folder}, and it is missing or damaged: download "
            f"{datasets.CIFAR10.url} and unpack it in {root}"
        ) from None
    resize = [v2.Resize(size)] if size != 32 else []
    augmented = [v2.RandomCrop(32, padding=4), v2.RandomHorizontalFlip(), *resize]
    transforms = _transform(v2, augmented, _CIFAR10), _transform(v2, resize, _CIFAR10)
    return train, held_out, transforms, tuple(train.classes)


class BrokenImageError(RequestError):
    """An image file cannot be read; the message names it, also if it comes from a worker process."""

    def __init__(self, message: str) -> None:
        # PyTorch raises a worker's error again in the main process, with the worker's whole traceback as its message.
        super().__init__(message.rpartition(f"{BrokenImageError.__name__}: ")[2].strip())


def _read_image(path: str) -> Any:
    datasets, _ = _torchvision()
    try:
        return datasets.folder.default_loader(path)
    except Exception as error:  # decoders raise OSError, SyntaxError, ValueError, struct.error, ...
        raise BrokenImageError(f"cannot read the image {path}: {error}; replace it or remove it") from None


def _image_folder(where: str, size: int, seed: int) -> _Opened:
    """Preprocessing as in "Squeeze-and-Excitation Networks", section 6.1: in training a crop of random size and aspect
    ratio, mirrored half of the time; else the centre, after the shorter side was resized to 256/224 of size."""
    datasets, v2 = _torchvision()
    folder = Path(where).expanduser()
    try:
        train, val = (datasets.ImageFolder(folder / part, loader=_read_image) for part in ("train", "val"))
    except FileNotFoundError as error:  # no folder, no classes in it, or a class without images: the message says which
        raise RequestError(f"{folder} must have train/CLASS/* and val/CLASS/*, with images: {error}") from None
    if train.classes != val.classes:
        differing = ", ".join(sorted({*train.classes} ^ {*val.classes}))
        raise RequestError(f"{folder}/train and {folder}/val must have the same classes; in only one: {differing}")
    augmented = [v2.RandomResizedCrop(size), v2.RandomHorizontalFlip()]
    plain = [v2.Resize(round(size * 256 / 224)), v2.CenterCrop(size)]
    return train, val, (_transform(v2, augmented, _IMAGENET), _transform(v2, plain, _IMAGENET)), tuple(train.classes)
