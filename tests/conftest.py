"""Shared by all tests: hypothesis profiles, and settings of the process that a test may change."""

from __future__ import annotations

import os

import hypothesis
import pytest
import torch

# Without a GPU the Triton kernels run in Triton's interpreter. This package and triton read it when they are imported.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

import senet_fused  # noqa: E402

pytest_plugins = ["tiers"]

# Tests that several modules import.
pytest.register_assert_rewrite(
    "gpu_contract", "gpu_operator_contract", "gpu_tail_contract", "gpu_tail_operator_contract"
)

# Kernels take their time on a busy machine, so nothing depends on the clock. CI sees the same examples every time.
hypothesis.settings.register_profile("dev", deadline=None, print_blob=True)
hypothesis.settings.register_profile("ci", parent=hypothesis.settings.get_profile("dev"), derandomize=True)
hypothesis.settings.load_profile("ci" if os.environ.get("CI") else "dev")


@pytest.fixture(autouse=True)
def process_settings():
    """Gives the next test the thread count, deterministic mode and call counts that it would have alone."""
    threads = torch.get_num_threads()
    deterministic = torch.are_deterministic_algorithms_enabled()
    senet_fused.reset_call_counts()
    yield
    torch.set_num_threads(threads)
    torch.use_deterministic_algorithms(deterministic)


@pytest.fixture
def poisoned():
    """Fresh memory is NaN (255 for bytes) until something writes it."""
    torch.use_deterministic_algorithms(True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    yield
    torch.use_deterministic_algorithms(False)
