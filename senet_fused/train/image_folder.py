"""Images in files, a folder a class, read and augmented by torchvision."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from senet_fused.arguments import RequestError

from .items import NO_CLASS

__all__ = ["BROKEN", "BrokenImageError", "ImageFiles", "folder_transform", "read_folder"]

BROKEN = ("raise", "skip")
# Of ImageNet's training images per channel, on the scale from 0 to 1; what pretrained networks expect.
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class BrokenImageError(RequestError):
    """An image file cannot be read; the message names it, also when it comes from a worker process."""

    def __init__(self, message: str) -> None:
        # PyTorch makes the error anew in the main process, with the worker's whole traceback for a message.
        super().__init__(message.rpartition(f"{BrokenImageError.__name__}: ")[2].strip())


def _torchvision() -> tuple[Any, Any]:
    try:
        from torchvision import datasets
        from torchvision.transforms import v2
    except ImportError as error:
        raise RequestError(
            f"image folders are read with torchvision, which is missing here ({error}): "
            'pip install "senet_fused[vision]"'
        ) from None
    return datasets, v2


class ImageFiles:
    """Image i is ``(read(file(i)), class number)``.

    With broken="skip", in place of a file that cannot be decoded comes the next one in the list that can be, behind
    the last the first, and with its class: so there are as many images as files, and any process and any later run
    sees the same ones. Where the system cannot read a file, it is an error all the same: another run might be able to.

    With count_once, the class of an image that stands in for another is ``NO_CLASS``, so that whoever counts right
    answers counts none twice.
    """

    def __init__(
        self, samples: list[tuple[str, int]], read: Callable[[str], Any], broken: str, *, count_once: bool = False
    ) -> None:
        # Arrays: worker processes share their memory, but copy that of Python objects, whose reference counts change.
        self._files = np.array([os.fsencode(name) for name, _ in samples], dtype=np.bytes_)
        self._targets = np.array([target for _, target in samples], dtype=np.int64)
        self.read = read
        self.broken = broken
        self.count_once = count_once
        # Shared, so that worker processes can tell the main one.
        self._found_broken = torch.zeros(len(samples), dtype=torch.bool).share_memory_()

    def __len__(self) -> int:
        return len(self._files)

    def file(self, index: int) -> str:
        return os.fsdecode(bytes(self._files[index]))

    def __getitem__(self, index: int) -> tuple[Any, int]:
        for place in (*range(index, len(self)), *range(index)):
            try:
                image = self.read(self.file(place))
                return image, NO_CLASS if self.count_once and place != index else int(self._targets[place])
            except Exception as error:  # what decoders raise: OSError, SyntaxError, ValueError, struct.error, ...
                system = isinstance(error, MemoryError) or getattr(error, "errno", None) is not None
                if system or self.broken == "raise":
                    raise BrokenImageError(
                        f"cannot read the image {self.file(place)}: {error}"
                        + ("" if system else "; replace it, take it away, or ask to skip broken images")
                    ) from None
                self._report(place, error)
        raise BrokenImageError(f"none of the {len(self)} images can be read, from {self.file(0)} on")

    def _report(self, place: int, error: Exception) -> None:
        if not self._found_broken[place]:
            self._found_broken[place] = True
            warnings.warn(
                f"skipping the broken image {self.file(place)}: {error}; the next one takes its place", stacklevel=2
            )

    def found_broken(self) -> list[str]:
        """The files that were skipped so far, in whichever process."""
        return [self.file(place) for place in self._found_broken.nonzero().flatten().tolist()]


def read_folder(where: str, broken: str) -> tuple[ImageFiles, ImageFiles, tuple[str, ...]]:
    """The training images of DIR/train and the held-out ones of DIR/val, as torchvision.datasets.ImageFolder has them.

    Raises RequestError if there is no torchvision, no such folder, a class without images, or if the two folders
    have other classes.
    """
    datasets, _ = _torchvision()
    folder = Path(where).expanduser()
    parts = {}
    for name in ("train", "val"):
        part = folder / name
        if not part.is_dir():
            raise RequestError(f"no folder {part}: expected {folder}/train and {folder}/val, with a folder per class")
        try:
            parts[name] = datasets.ImageFolder(part, allow_empty=True)
        except FileNotFoundError:
            raise RequestError(f"{part} has no folders: expected one per class, with its images") from None
        with_images = set(parts[name].targets)
        empty = [label for number, label in enumerate(parts[name].classes) if number not in with_images]
        if empty:
            raise RequestError(
                f"{part} has classes without images: {', '.join(empty)}; put images "
                f"({', '.join(datasets.folder.IMG_EXTENSIONS)}) there, or take these folders away"
            )
    train, val = parts["train"], parts["val"]
    differing = [
        f"only in {name}: {', '.join(sorted(set(ours.classes) - set(theirs.classes)))}"
        for name, ours, theirs in (("train", train, val), ("val", val, train))
        if set(ours.classes) - set(theirs.classes)
    ]
    if differing:
        raise RequestError(f"the classes in {folder}/train and {folder}/val differ; {'; '.join(differing)}")
    read = datasets.folder.default_loader
    held_out = ImageFiles(val.samples, read, broken, count_once=True)
    return ImageFiles(train.samples, read, broken), held_out, tuple(train.classes)


def folder_transform(size: int, augment: bool) -> Callable[[Any], torch.Tensor]:
    """From a PIL image to float32 [3, size, size], normalised as ImageNet's.

    As in "Squeeze-and-Excitation Networks", section 6.1: in training a crop of random size and aspect ratio,
    resized, and mirrored half of the time; else the centre, after the shorter side was resized to 256/224 of size.
    """
    _, v2 = _torchvision()
    if augment:
        steps = [v2.RandomResizedCrop(size), v2.RandomHorizontalFlip()]
    else:
        steps = [v2.Resize(round(size * 256 / 224)), v2.CenterCrop(size)]
    return v2.Compose([*steps, v2.PILToTensor(), v2.ToDtype(torch.float32, scale=True), v2.Normalize(MEAN, STD)])
