"""For the tests against the real libraries: they run in an environment of their own, without the network."""

from __future__ import annotations

import gc
import importlib.util
import os
from collections.abc import Iterator

import pytest

os.environ["HF_HUB_OFFLINE"] = "1"

_LIBRARIES = (
    "timm", "torchvision", "monai", "transformers", "segmentation_models_pytorch", "pretrainedmodels", "pytorchcv",
    "mmpretrain",
)  # fmt: skip
_missing = [name for name in _LIBRARIES if importlib.util.find_spec(name) is None]
if _missing:
    raise pytest.UsageError(
        f"tests/peers needs {', '.join(_missing)}; `make test-peers` makes an environment that has them and runs there"
    )


def pytest_configure(config: pytest.Config) -> None:
    # What the libraries say of each other, and of PyTorch.
    for category in ("DeprecationWarning", "FutureWarning", "UserWarning"):
        config.addinivalue_line("filterwarnings", f"ignore::{category}")


def pytest_collection_finish() -> None:
    gc.freeze()  # the libraries' own objects, which the collections below would look through each time


@pytest.fixture(autouse=True)
def free_networks() -> Iterator[None]:
    """Networks hold cycles, and gigabytes that Python's collector does not count."""
    yield
    gc.collect()
