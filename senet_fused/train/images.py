"""Images that need PyTorch alone: tensors in memory, CIFAR-10's files, made-up patterns; and their augmentation."""

from __future__ import annotations

import pickle
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from senet_fused.arguments import RequestError

from .items import NOISE, PATTERN, mixed

__all__ = ["CIFAR10_PADDING", "BytesToImage", "Patterns", "Shift", "StoredImages", "mean_and_std", "read_cifar10"]

CIFAR10_FOLDER = "cifar-10-batches-py"
CIFAR10_URL = "https://www.cs.toronto.edu/~kriz/cifar-10-python.tar.gz"
CIFAR10_SIDE = 32
# Of CIFAR-10, as in "Deep Residual Learning" (He et al., 2016), section 4.2.
CIFAR10_PADDING = 4
# Pixels of a pattern before it is enlarged: so coarse that it is still there in the last, small planes.
COARSE = 4


@dataclass(frozen=True)
class StoredImages:
    """Images [N, C, H, W] of any dtype and their class numbers [N]."""

    images: Tensor
    targets: Tensor

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.images[index], int(self.targets[index])


@dataclass(frozen=True)
class Patterns:
    """Made-up images float32 [3, size, size], each made when it is asked for: its class's pattern, and noise.

    Image i is of class ``i % classes``. A class has a smooth random pattern, which depends on the seed; the noise
    has its standard deviation, 1, and depends on seed, part (0: training, 1: held out) and i.
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
        coarse = torch.randn(1, 3, COARSE, COARSE, generator=_generator(PATTERN, self.seed, target))
        pattern = F.interpolate(coarse, size=(self.size, self.size), mode="bilinear", align_corners=False)[0]
        noise = torch.randn(3, self.size, self.size, generator=_generator(NOISE, self.seed, self.part, index))
        return pattern + noise, target


def _generator(*numbers: int) -> torch.Generator:
    return torch.Generator().manual_seed(mixed(*numbers))


@dataclass(frozen=True)
class Shift:
    """Moves an image [C, H, W] by up to so many pixels along both axes at random; what comes in is ``fill``."""

    pixels: int
    fill: float = 0.0

    def __call__(self, image: Tensor) -> Tensor:
        height, width = image.shape[-2:]
        top, left = torch.randint(2 * self.pixels + 1, (2,)).tolist()
        padded = F.pad(image, [self.pixels] * 4, value=self.fill)
        return padded[..., top : top + height, left : left + width]


@dataclass(frozen=True)
class BytesToImage:
    """uint8 [C, H, W] to float32 [C, size, size], normalised per channel; with ``shift``, moved and mirrored before."""

    size: int
    mean: Tensor
    std: Tensor
    shift: int | None = None

    def __call__(self, image: Tensor) -> Tensor:
        if self.shift is not None:
            image = Shift(self.shift)(image)
            if torch.rand(()) < 0.5:
                image = image.flip(-1)
        image = image.float() / 255
        if image.shape[-2:] != (self.size, self.size):
            image = F.interpolate(image[None], size=(self.size, self.size), mode="bilinear", antialias=True)[0]
        return (image - self.mean) / self.std


def mean_and_std(images: Tensor) -> tuple[Tensor, Tensor]:
    """Of each channel of uint8 [N, C, H, W], as float32 [C, 1, 1] on the scale from 0 to 1."""
    levels = torch.arange(256, dtype=torch.float64) / 255
    counts = torch.stack([torch.bincount(channel.flatten(), minlength=256) for channel in images.unbind(1)]).double()
    shares = counts / counts.sum(1, keepdim=True)
    mean = shares @ levels
    std = (shares @ levels**2 - mean**2).clamp(min=0).sqrt().clamp(min=1 / 255)  # one grey level, if all are alike
    return mean.float()[:, None, None], std.float()[:, None, None]


class _NumbersOnly(pickle.Unpickler):
    """Reads the built-in types and NumPy's arrays; a pickle of anything else could run any code."""

    def find_class(self, module: str, name: str) -> Any:
        if module in ("numpy.core.multiarray", "numpy._core.multiarray") and name == "_reconstruct":
            return np.empty(0).__reduce__()[0]  # by whichever of the two names NumPy has it
        if (module, name) in (("numpy", "ndarray"), ("numpy", "dtype")):
            return getattr(np, name)
        if (module, name) == ("_codecs", "encode"):  # how Python 3 writes bytes for Python 2
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"{module}.{name} does not belong there")


def _read_pickle(path: Path) -> Any:
    get = f"get {CIFAR10_URL} and unpack it"
    try:
        with path.open("rb") as file:
            return _NumbersOnly(file, encoding="latin1").load()
    except FileNotFoundError:
        raise RequestError(f"CIFAR-10 is incomplete, {path} is missing: {get}") from None
    except Exception as error:  # what comes of broken pickles: nearly anything
        raise RequestError(f"cannot read {path} as a file of CIFAR-10 ({error}): {get} again") from None


def _read_batch(path: Path, classes: int) -> StoredImages:
    batch = _read_pickle(path)
    try:
        data, labels = batch["data"], torch.tensor(batch["labels"], dtype=torch.int64)
        images = torch.tensor(data).view(len(labels), 3, CIFAR10_SIDE, CIFAR10_SIDE)
        right = images.dtype == torch.uint8 and len(labels) > 0 and 0 <= labels.min() and labels.max() < classes
    except Exception:
        right = False
    if not right:
        raise RequestError(
            f"{path} is no file of CIFAR-10: expected 'data', uint8 [N, {3 * CIFAR10_SIDE**2}], and N 'labels' below "
            f"{classes}; get {CIFAR10_URL} and unpack it again"
        )
    return StoredImages(images, labels)


def read_cifar10(where: str) -> tuple[StoredImages, StoredImages, tuple[str, ...]]:
    """The training images, the test images (uint8 [N, 3, 32, 32]) and the names of the classes.

    Args:
        where: the folder ``cifar-10-batches-py`` of the official archive for Python, or the folder it is in.

    Raises RequestError, with the archive's address, where a file is missing or broken.
    """
    given = Path(where).expanduser()
    folder = given / CIFAR10_FOLDER if (given / CIFAR10_FOLDER).is_dir() else given
    if not (folder / "batches.meta").is_file():
        raise RequestError(
            f"no CIFAR-10 in {given}: expected {CIFAR10_FOLDER}/batches.meta there; get {CIFAR10_URL} and unpack it: "
            f"tar -xzf cifar-10-python.tar.gz -C {given}"
        )
    meta = _read_pickle(folder / "batches.meta")
    names = meta.get("label_names") if isinstance(meta, dict) else None
    if not isinstance(names, list) or not names or not all(isinstance(name, str) for name in names):
        raise RequestError(
            f"{folder / 'batches.meta'} has no 'label_names', the classes: get {CIFAR10_URL} and unpack it again"
        )
    parts = [_read_batch(folder / f"data_batch_{number}", len(names)) for number in range(1, 6)]
    train = StoredImages(torch.cat([part.images for part in parts]), torch.cat([part.targets for part in parts]))
    return train, _read_batch(folder / "test_batch", len(names)), tuple(names)
