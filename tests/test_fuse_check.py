"""``senet-fused fuse-check``: a network that is fused, one that is left, and requests that cannot be met."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

import senet_fused
from senet_fused.cli import main

HERE = Path(__file__).resolve().parent
BACKEND = senet_fused.explain(torch.empty(0)).backend

NETWORK = f"""
import sys
sys.path.insert(0, {str(HERE)!r})
import torch
from torch import nn
from peer_layers import TimmSEModule, TorchvisionSE, TutorialSE


class Net(nn.Module):
    def __init__(self, *layers):
        super().__init__()
        self.layers, self.head = nn.Sequential(nn.Conv2d(3, 8, 3), *layers), nn.Linear(8, 5)

    def forward(self, x):
        return self.head(self.layers(x).mean((2, 3)))


def good():
    return Net(TutorialSE(8, 2), nn.ReLU(), TorchvisionSE(8, 2), TimmSEModule(8, 2, norm=nn.BatchNorm2d))


class SE(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.fc1, self.fc2 = nn.Conv2d(channels, 4, 1), nn.Conv2d(4, channels, 1)
        self.relu, self.sigmoid = nn.ReLU(), nn.Sigmoid()

    def forward(self, x):
        return x * self.sigmoid(self.fc2(self.relu(self.fc1(x.mean((2, 3), keepdim=True)))))


class Bottleneck(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(channels, 4, 1), nn.BatchNorm2d(4)
        self.conv2, self.bn2 = nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4)
        self.conv3, self.bn3 = nn.Conv2d(4, channels, 1), nn.BatchNorm2d(channels)
        self.relu, self.se_module, self.downsample = nn.ReLU(), SE(channels), None

    def forward(self, x):
        y = self.relu(self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x))))))
        return self.relu(self.se_module(self.bn3(self.conv3(y))) + x)


def blocks():
    return Net(Bottleneck(8), Bottleneck(8))


def left():
    return Net(TimmSEModule(8, 2, norm=nn.BatchNorm2d))
"""


@pytest.fixture
def network(tmp_path):
    path = tmp_path / "network.py"
    path.write_text(NETWORK)
    return path


@pytest.mark.networks
@pytest.mark.skipif(BACKEND == "reference", reason="without compiled code nothing is fused")
def test_both_tables(network, capsys):
    sizes = ["--size", "3,9,9", "--batch", "2", "--budget", "0.1", "--layout", "contiguous", "channels_last"]
    assert main(["fuse-check", f"{network}:good", *sizes]) == 0
    out = capsys.readouterr().out
    assert "layers.1  SELayer" in out and "Net: 3 SE layers: 2 fused, 1 left" in out
    assert "keys of the state dict: unchanged" in out
    for mode in ("inference", "training"):
        for layout in ("contiguous", "channels_last"):
            assert f"good: {mode}, float32, 2 x 3x9x9, {layout}" in out
    fused = re.findall(r"^fused +cpu .*", out, re.MULTILINE)
    assert len(fused) == 4  # one a table, each with a time and errors that are small
    for line in fused:
        assert all(float(error) < 1e-4 for error in re.findall(r"\d\.?\d*e-\d+|(?<= )0$", line))


def test_the_first_table_alone(network, capsys):
    status = main(["fuse-check", f"{network}:good", "--no-time"])
    out = capsys.readouterr().out
    assert status == (1 if BACKEND == "reference" else 0)
    assert "SELayer" in out and "bn.weight" in out and "inference" not in out


@pytest.mark.networks
@pytest.mark.skipif(BACKEND == "reference", reason="without compiled code nothing is fused")
def test_tails_bring_a_table_of_the_blocks_and_are_what_is_measured(network, capsys):
    sizes = ["--size", "3,9,9", "--batch", "2", "--budget", "0.1"]
    assert main(["fuse-check", f"{network}:blocks", "--tails", *sizes]) == 0
    out = capsys.readouterr().out
    assert re.search(r"^layers\.1 +legacy SE bottleneck +3  fused +every BatchNorm as a tail; ", out, re.MULTILINE)
    assert "Net: 2 SE layers: 2 fused; 2 blocks: 2 fused" in out and "keys of the state dict: unchanged" in out
    assert len(re.findall(r"^tails +cpu ", out, re.MULTILINE)) == 2 and "\nfused " not in out
    assert re.search(r"^tails .* \(-\d+%\) .* \(-\d+%\)", out, re.MULTILINE)  # saved and peak MB
    assert main(["fuse-check", f"{network}:blocks", "--no-time"]) == 0
    assert "legacy SE bottleneck" not in capsys.readouterr().out


def test_layers_without_blocks_are_not_enough_for_tails(network, capsys):
    assert main(["fuse-check", f"{network}:good", "--tails"]) == 1
    out = capsys.readouterr().out
    assert "left    its forward is not one that is known" in out and "inference" not in out


def test_nothing_to_fuse(network, capsys):
    assert main(["fuse-check", f"{network}:left"]) == 1
    captured = capsys.readouterr()
    assert "Net: 1 SE layer: 1 left" in captured.out and captured.err == ""


def test_requests_that_cannot_be_met(network, capsys):
    for arguments, message in (
        ([f"{network}:missing"], "has no function 'missing'"),
        (["no_such_file.py:make"], "there is no file no_such_file.py"),
        ([f"{network}:good", "--size", "3,9", "--layout", "channels_last"], "channels_last needs two or three"),
    ):
        assert main(["fuse-check", *arguments]) == 2
        assert message in capsys.readouterr().err
