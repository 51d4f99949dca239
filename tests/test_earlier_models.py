"""Whole models that 0.1.0 has pickled are loaded, compute the same, and are saved again under today's names.

models_of_0.1.0.pickle.xz holds, by name, a model in evaluation mode, its output for INPUT and the calls it took: of
fuse, with and without tails, FusedSE, FusedSETail and fold_batchnorm, of layers in peer_layers.py and peer_blocks.py.
"""

from __future__ import annotations

import lzma
import pickle
from pathlib import Path

import pytest
import torch

import senet_fused
from senet_fused import fuse_report, unfuse

INPUT = torch.linspace(-1, 1, 2 * 4 * 3 * 2).reshape(2, 4, 3, 2)
NAMES = ("fuse", "fuse_tails", "FusedSE", "FusedSETail", "folded")


def saved():
    file = Path(__file__).resolve().parent / "models_of_0.1.0.pickle.xz"
    return pickle.loads(lzma.decompress(file.read_bytes()))


def test_the_file_holds_them_all():
    assert tuple(saved()) == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_a_model_of_0_1_0(name):
    model, expected, calls = saved()[name]
    again = pickle.dumps(model)
    for one in (model, pickle.loads(again)):
        senet_fused.reset_call_counts()
        torch.testing.assert_close(one(INPUT), expected)
        if senet_fused.explain(INPUT).backend == "cpu":
            assert senet_fused.call_counts() == calls
    assert not any(f"senet_fused.{old}".encode() in again for old in ("recognition", "tails", "folding"))


@pytest.mark.parametrize("name", ["fuse", "fuse_tails"])
def test_it_is_still_fused_and_can_be_unfused(name):
    model, expected, _ = saved()[name]
    report = fuse_report(model)
    assert [row.name for row in report.layers] == ["0" if name == "fuse" else "se_module"]
    if senet_fused.explain(INPUT).backend == "cpu":
        assert all(row.fused for row in (*report.layers, *report.blocks)), str(report)
    assert not any(type(module).__name__.startswith("Fused") for module in unfuse(model).modules())
    torch.testing.assert_close(model(INPUT), expected)
