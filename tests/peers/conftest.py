"""For the tests against the real libraries: they run in an environment of their own, without the network."""

from __future__ import annotations

import importlib.util
import os

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
