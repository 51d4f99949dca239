"""The handwritten digits that come with scikit-learn, as the demo and training use them.

Alpaydin and Kaynak's "Optical Recognition of Handwritten Digits": 1797 images of 8 x 8 pixels.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

__all__ = ["HELD_OUT", "IMAGES", "load_images"]

IMAGES = 1797
HELD_OUT = 360


def load_images(size: int, seed: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Training images [1437, 1, size, size] and their digits [1437], then the 360 held-out ones.

    Float32, scaled so that the training images have mean 0 and standard deviation 1. The seed draws the
    split, which keeps every digit's share.
    """
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    digits = load_digits()
    images, targets = torch.tensor(digits.images, dtype=torch.float32)[:, None], torch.tensor(digits.target)
    images = F.interpolate(images, size=(size, size), mode="bilinear", align_corners=False)
    split = train_test_split(range(IMAGES), test_size=HELD_OUT, random_state=seed, stratify=digits.target)
    kept, held = (torch.tensor(part) for part in split)
    images = (images - images[kept].mean()) / images[kept].std()
    return images[kept], targets[kept], images[held], targets[held]
