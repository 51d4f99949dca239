"""Training networks side by side, step by step, and timing their SE layers alone.

A step of one network is followed by the same step of the others, and every round another one goes first, so that
whatever else the machine does meets all of them alike.
"""

from __future__ import annotations

import copy
import math
import statistics
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

__all__ = ["Contender", "LayerTimes", "accuracy", "relative_error", "time_layers", "train"]

T = TypeVar("T")

PEAK_LEARNING_RATE = 0.3
WARM_UP = 0.25
UNTIMED_ROUNDS = 3


@dataclass
class Contender:
    """A network, the images it is trained on [N, 1, H, W], and what its training leaves behind."""

    name: str
    network: nn.Module
    images: Tensor
    losses: list[float] = field(default_factory=list)
    step_s: list[float] = field(default_factory=list)


@dataclass(frozen=True)
class LayerTimes:
    """Median forward + backward seconds of one layer in each implementation, and how far off each is.

    ``errors``: ||theirs - exact|| / ||exact||, the largest over output and gradients of inputs and weights, where exact
    is what the first computes in float64.
    """

    shape: tuple[int, ...]
    seconds: tuple[float, ...]
    errors: tuple[float, ...]


def _schedule(step: int, total: int) -> float:
    """Share of the peak learning rate: a linear rise over the first quarter, then half a cosine."""
    warm_up = max(1, round(WARM_UP * total))
    if step < warm_up:
        return (step + 1) / warm_up
    return 0.5 * (1 + math.cos(math.pi * (step - warm_up) / max(1, total - warm_up)))


def _turn(items: list[T], number: int) -> list[T]:
    """The items in the order of round ``number``: each of them is first, and last, equally often."""
    first = number % len(items)
    return items[first:] + items[:first]


def train(contenders: list[Contender], targets: Tensor, epochs: int, batch_size: int, seed: int) -> Iterator[int]:
    """Trains all contenders on the same batches; yields the number of steps done whenever all did one more.

    SGD with Nesterov momentum on cross-entropy; an epoch drops the images that fill no batch. The contenders take
    turns in going first. Raises FloatingPointError if a loss is not finite.
    """
    generator = torch.Generator().manual_seed(seed)
    batches = len(targets) // batch_size
    total = epochs * batches
    runs = []
    for contender in contenders:
        weights = contender.network.parameters()
        optimizer = torch.optim.SGD(weights, PEAK_LEARNING_RATE, 0.9, weight_decay=5e-4, nesterov=True)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _schedule(step, total))
        runs.append((contender, optimizer, schedule))
    done = 0
    for _ in range(epochs):
        order = torch.randperm(len(targets), generator=generator)
        for batch in order[: batches * batch_size].split(batch_size):
            for contender, optimizer, schedule in _turn(runs, done):
                images, wanted = contender.images[batch], targets[batch]
                contender.network.train()
                start = time.perf_counter()
                loss = F.cross_entropy(contender.network(images), wanted)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                contender.step_s.append(time.perf_counter() - start)
                schedule.step()
                value = loss.item()
                if not math.isfinite(value):
                    raise FloatingPointError(f"{contender.name}: the loss of step {done + 1} is {value}")
                contender.losses.append(value)
            done += 1
            yield done


def accuracy(network: nn.Module, images: Tensor, targets: Tensor) -> float:
    """The share of images [N, 1, H, W] whose largest logit is the target."""
    network.eval()
    with torch.no_grad():
        guesses = torch.cat([network(some).argmax(1) for some in images.split(128)])
    return float((guesses == targets).double().mean())


def relative_error(ours: Tensor, wanted: Tensor) -> float:
    """||ours - wanted|| / ||wanted||; 0 for two tensors of zeros."""
    difference = float((ours.double() - wanted.double()).norm())
    return difference and difference / max(float(wanted.double().norm()), torch.finfo(torch.float64).tiny)


def _in_float64(layer: nn.Module, inputs: tuple[Tensor, ...], dy: Tensor) -> list[Tensor]:
    """Output, and gradients of inputs and weights, of a copy in float64."""
    layer, leaves = copy.deepcopy(layer).double(), [t.detach().double().requires_grad_() for t in inputs]
    y = layer(*leaves)
    return [y.detach(), *torch.autograd.grad(y, (*leaves, *layer.parameters()), dy.double())]


def time_layers(
    chains: list[list[nn.Module]], inputs: list[tuple[Tensor, ...]], rounds: int
) -> tuple[list[list[float]], list[LayerTimes]]:
    """Times forward + backward of chains of layers that must compute the same, on given inputs.

    A pass runs each layer's forward, first to last, then each backward, last to first, as a training step
    does; the gradients arriving are random. All chains must hold the same weights, in the same order.

    Returns:
        For each chain the seconds of each pass (sums over layers); and layer by layer.
    """
    generator = torch.Generator().manual_seed(0)
    leaves = [tuple(tensor.detach().requires_grad_() for tensor in some) for some in inputs]
    # With a mean of one, what comes back through the gate (a sum over the plane) has its weight in dx.
    arriving = [torch.empty_like(x).normal_(1, 1, generator=generator) for x, *_ in inputs]

    def one_pass(layers: list[nn.Module], results: dict[int, list[Tensor]] | None = None) -> list[float]:
        spent, outputs = [], []
        for layer, some in zip(layers, leaves, strict=True):
            start = time.perf_counter()
            outputs.append(layer(*some))
            spent.append(time.perf_counter() - start)
        for i in reversed(range(len(layers))):
            wanted = (*leaves[i], *layers[i].parameters())
            start = time.perf_counter()
            gradients = torch.autograd.grad(outputs[i], wanted, arriving[i])
            spent[i] += time.perf_counter() - start
            if results is not None:
                results[i] = [outputs[i].detach(), *gradients]
        return spent

    exact = [_in_float64(layer, some, dy) for layer, some, dy in zip(chains[0], leaves, arriving, strict=True)]
    ours: dict[int, list[Tensor]] = {}
    errors = []
    for chain in chains:
        one_pass(chain, ours)
        errors.append([max(map(relative_error, ours[i], exact[i])) for i in range(len(inputs))])
    exact.clear()
    ours.clear()

    spent: list[list[list[float]]] = [[] for _ in chains]
    for number in range(UNTIMED_ROUNDS + rounds):
        for which in _turn(list(range(len(chains))), number):
            times = one_pass(chains[which])
            if number >= UNTIMED_ROUNDS:
                spent[which].append(times)
    medians = [[statistics.median(layer) for layer in zip(*passes, strict=True)] for passes in spent]
    layers = [
        LayerTimes(tuple(some[0].shape), figures, off)
        for some, figures, off in zip(inputs, zip(*medians, strict=True), zip(*errors, strict=True), strict=True)
    ]
    return [[sum(times) for times in passes] for passes in spent], layers
