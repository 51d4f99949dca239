"""PyTorch's FLOP counter counts for layers and operators what it counts for them in PyTorch's own operators."""

from __future__ import annotations

import itertools

import pytest
import torch
from peer_layers import TutorialSE
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import senet_fused
from senet_fused import FusedSE, FusedSETail, block_tail, fuse, squeeze_excite
from senet_fused.flops import in_dispatch_modes

N, C, R = 3, 24, 4
PRODUCT = 2 * N * C * R
BACKENDS = [status.name for status in senet_fused.backends.status() if status.available]


class Stock(nn.Module):
    def __init__(self, tail):
        super().__init__()
        self.norm = nn.BatchNorm2d(C) if tail else None
        self.fc1, self.fc2 = nn.Linear(C, R), nn.Linear(R, C)

    def forward(self, x):
        z = x if self.norm is None else self.norm(x)
        return z * torch.sigmoid(self.fc2(torch.relu(self.fc1(z.mean((2, 3))))))[:, :, None, None]


def flops(run, x):
    """(forward, forward and backward) of a call on x."""
    with FlopCounterMode(display=False) as counter:
        y = run(x)
        forward = counter.get_total_flops()
        if y.requires_grad:
            y.sum().backward()
    return forward, counter.get_total_flops()


def x_with(need_x):
    return torch.randn(N, C, 3, 3, requires_grad=need_x)


@pytest.mark.parametrize("tail", [False, True], ids=["squeeze_excite", "block_tail"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_operators(backend, tail):
    """Every backend's, for every choice of what needs a gradient, equals the layer in PyTorch's own operators."""
    for need_x, need_weights in itertools.product((True, False), repeat=2):
        stock = Stock(tail).requires_grad_(need_weights)
        fc1, fc2 = stock.fc1, stock.fc2
        weights = {"w1": fc1.weight, "w2": fc2.weight, "b1": fc1.bias, "b2": fc2.bias, "backend": backend}

        def run(x, stock=stock, weights=weights):
            if tail:
                return block_tail(x, None, None, stock.norm.weight, stock.norm.bias, training=True, **weights)
            return squeeze_excite(x, **weights)

        expected = flops(stock, x_with(need_x))
        senet_fused.reset_call_counts()
        assert flops(run, x_with(need_x)) == expected
        kind = "tail_" if tail else ""
        assert senet_fused.call_counts()[f"{backend}.{kind}forward"] == 1
        assert expected[0] == 2 * PRODUCT
        if need_x and need_weights:
            assert expected[1] == 6 * PRODUCT


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_tail_without_a_gate_has_no_products(backend):
    x = x_with(True)
    assert flops(lambda x: block_tail(x, training=True, backend=backend), x) == (0, 0)


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_backward_of_a_call_that_was_not_counted(backend):
    """It was made by the autograd.Function that eager mode takes."""
    fc1, fc2 = nn.Linear(C, R), nn.Linear(R, C)
    for function in (squeeze_excite, lambda x, **o: block_tail(x, training=True, **o)):
        y = function(x_with(True), w1=fc1.weight, w2=fc2.weight, backend=backend)
        with FlopCounterMode(display=False) as counter:
            y.sum().backward()
        assert counter.get_total_flops() == 4 * PRODUCT


@pytest.mark.parametrize(
    "make",
    [
        lambda: FusedSE(C, rd_channels=R),
        lambda: FusedSE(C, rd_channels=R, conv=True, bias=True),
        lambda: FusedSETail(nn.BatchNorm2d(C), FusedSE(C, rd_channels=R), nn.ReLU()),
        lambda: fuse(nn.Sequential(TutorialSE(C, C // R))),
        lambda: fuse(nn.Sequential(TutorialSE(C, C // R)), backend="cpu"),
    ],
    ids=["FusedSE", "conv", "FusedSETail", "fuse", "fuse_cpu"],
)
def test_layers(make):
    """By module as well: the counter's own hooks see the two children called."""
    layer = make()
    assert flops(layer, x_with(True)) == (2 * PRODUCT, 6 * PRODUCT)
    with FlopCounterMode(display=False, depth=9) as counter:
        layer(x_with(False))
    by_module = {name.split(".", 1)[-1]: sum(found.values()) for name, found in counter.get_flop_counts().items()}
    assert sorted(by_module.values())[:2] == [PRODUCT, PRODUCT]


def test_a_counter_learns_once_and_keeps_what_the_caller_mapped():
    w1, w2 = torch.randn(R, C), torch.randn(C, R)
    operator = torch.ops.senet_fused.fused_se_cpu
    backend = "cpu" if "cpu" in BACKENDS else pytest.skip("without compiled code")
    early = FlopCounterMode(display=False)  # with a copy of the table as it is now
    custom = FlopCounterMode(display=False, custom_mapping={operator: lambda *_, **__: 7})
    for counter, expected in ((early, 2 * PRODUCT), (custom, 7), (early, 2 * PRODUCT)):
        with counter:
            squeeze_excite(x_with(False), w1, w2, backend=backend)
        assert counter.get_total_flops() == expected
    assert not in_dispatch_modes()
