"""Inputs: the rotating sets that keep the caches cold, and the one set that correctness is judged on."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .oracle import InputSet, Weights, in_double, norm_dtype, oracle_branch
from .problems import Case

__all__ = ["BufferPool", "check_inputs", "make_weights", "torch_dtype"]

_ALIGNMENT = 64  # bytes: a cache line, and the widest vector


def torch_dtype(case: Case) -> torch.dtype:
    return getattr(torch, case.dtype)


def _memory_format(case: Case) -> torch.memory_format:
    if case.layout == "contiguous":
        return torch.contiguous_format
    return torch.channels_last if len(case.shape.spatial) == 2 else torch.channels_last_3d


class BufferPool:
    """One block of random numbers per dtype, cut into input sets for one case after the other.

    Sets do not overlap and start on cache lines. The numbers are normal random: none of the inputs is zero or
    constant, which would let a memory system or a branch predictor do better than on real data.
    """

    def __init__(self, device: torch.device, seed: int = 0) -> None:
        self._device = device
        self._seed = seed
        self._block: Tensor | None = None

    def sets(self, case: Case, at_least_bytes: int, at_least: int = 1, at_most: int | None = None) -> list[InputSet]:
        """Input sets for the case: `at_least` of them, more until they exceed `at_least_bytes` together.

        `at_most` limits that. With a backward pass x and residual require grad.
        """
        dtype = torch_dtype(case)
        element, numel = dtype.itemsize, math.prod(case.size)
        stride = -(-numel * element // _ALIGNMENT) * _ALIGNMENT // element
        tensors = 1 + case.residual + case.backward
        count = max(at_least, at_least_bytes // (tensors * numel * element) + 1)
        if at_most is not None:
            count = min(count, at_most)

        block = self._random(count * tensors * stride, dtype)
        strides = torch.empty(case.size, device="meta", memory_format=_memory_format(case)).stride()

        def take(index: int) -> Tensor:
            # set_ rather than slicing: the result is no view of the block, as a network's input is none.
            tensor = torch.empty(0, dtype=dtype, device=self._device)
            return tensor.set_(block.untyped_storage(), index * stride, case.size, strides)

        sets = []
        for index in range(0, count * tensors, tensors):
            x = take(index).requires_grad_(case.backward)
            residual = take(index + 1).requires_grad_(case.backward) if case.residual else None
            sets.append(InputSet(x, residual, take(index + tensors - 1) if case.backward else None))
        return sets

    def _random(self, numel: int, dtype: torch.dtype) -> Tensor:
        if self._block is None or self._block.dtype != dtype or self._block.numel() < numel:
            self._block = None  # freed before the larger one is taken
            generator = torch.Generator(self._device).manual_seed(self._seed)
            self._block = torch.empty(numel, dtype=dtype, device=self._device).normal_(generator=generator)
        return self._block


def make_weights(case: Case, device: torch.device, seed: int = 0) -> Weights:
    """Weights drawn as nn.Linear draws them, the same for every provider."""
    generator = torch.Generator().manual_seed(seed)
    c, r = case.shape.channels, case.shape.rd_channels

    def uniform(*size: int, fan_in: int) -> Tensor:
        values = (torch.rand(size, generator=generator, dtype=torch.float64) * 2 - 1) / fan_in**0.5
        return values.to(device, torch_dtype(case))

    w1, b1 = uniform(r, c, fan_in=c), uniform(r, fan_in=c)
    w2, b2 = uniform(c, r, fan_in=r), uniform(c, fan_in=r)
    weights = Weights(w1, b1 if case.bias else None, w2, b2 if case.bias else None)
    if case.op == "se":
        return weights
    # Such that BatchNorm's output has the judged planes' means, and values of variance 1 around them.
    means, mean, var = _before_norm(case, weights)
    sign = torch.randint(0, 2, (c,), generator=generator).mul(2).sub(1)
    weight, bias = sign * (means.var(0, correction=0) + 1).sqrt(), means.mean(0)
    if case.training:  # statistics that an update moves
        mean = torch.randn(c, generator=generator, dtype=torch.float64)
        var = torch.rand(c, generator=generator, dtype=torch.float64) + 0.5
    norm = {"weight": weight, "bias": bias, "mean": mean, "var": var}
    return weights._replace(**{name: values.to(device, norm_dtype(case)) for name, values in norm.items()})


def _plane_means(case: Case, weights: Weights, generator: torch.Generator) -> Tensor:
    """[N, C] in float64: the smallest that put every hidden unit between 0.5 and 1.5 or between -1.5 and -0.5."""
    n, r = case.batch, case.shape.rd_channels
    target = torch.rand(n, r, dtype=torch.float64, generator=generator) + 0.5
    target *= torch.randint(0, 2, (n, r), generator=generator).mul(2).sub(1)
    w1 = weights.w1.cpu().double()
    if weights.b1 is not None:
        target -= weights.b1.cpu().double()
    gram = w1 @ w1.T
    gram += torch.eye(r, dtype=torch.float64) * (1e-9 * gram.diagonal().mean())
    return torch.linalg.solve(gram, target.T).T @ w1  # means @ w1.T == target


def _before_norm(case: Case, weights: Weights) -> tuple[Tensor, Tensor, Tensor]:
    """Of a tail's judged inputs: the means [N, C] of the planes behind BatchNorm; mean, variance [C] in front of it."""
    generator = torch.Generator().manual_seed(0)
    means = _plane_means(case, weights, generator)
    double = {"dtype": torch.float64, "generator": generator}
    channels = case.shape.channels
    return means, torch.randn(channels, **double), (torch.rand(channels, **double) + 0.5).square()


def check_inputs(case: Case, weights: Weights, device: torch.device, draw: int = 0) -> InputSet:
    """The inputs that correctness is judged on, with gradients required.

    Plain random numbers would be a poor judge: a plane's mean is almost zero, so the gates hardly depend on
    the squeeze, and a hidden unit or an output next to a ReLU's kink flips with the last bit, which says
    nothing about correctness. So every plane gets a mean such that each hidden unit is clearly on or off
    (|preact| between 0.5 and 1.5), and a residual is pushed away from the point where the outer ReLU
    switches. A tail's x is such that this holds for BatchNorm's output.
    """
    generator = torch.Generator().manual_seed(1 + draw)
    n, c, *spatial = case.size
    dtype = torch_dtype(case)
    double = {"dtype": torch.float64, "generator": generator}

    x = torch.randn(n, c, *spatial, **double)
    plane_dims = tuple(range(2, x.dim()))
    ones = [1] * len(spatial)
    if case.op == "tail":
        means, mean, var = _before_norm(case, weights)
        x -= x.mean(plane_dims, keepdim=True)
        x /= x.square().mean((0, *plane_dims), keepdim=True).sqrt().clamp_min(1e-6)
    else:
        means = _plane_means(case, weights, generator)
    x += means.view(n, c, *ones) - x.mean(plane_dims, keepdim=True)
    if case.op == "tail":
        slope, bias = var.sqrt() / weights.weight.cpu().double(), weights.bias.cpu().double()
        x = slope.view(c, *ones) * (x - bias.view(c, *ones)) + mean.view(c, *ones)

    def finish(values: Tensor) -> Tensor:
        return values.to(device, dtype).contiguous(memory_format=_memory_format(case))

    x = finish(x).requires_grad_()
    dy = finish(torch.randn(n, c, *spatial, **double))
    residual = None
    if case.residual:
        residual = torch.randn(n, c, *spatial, **double)
        if case.post_act == "relu":
            total = oracle_branch(case, x.detach(), in_double(weights)).cpu() + residual
            residual += torch.where(total.abs() < 0.25, torch.copysign(torch.full_like(total, 0.25), total), 0.0)
        residual = finish(residual).requires_grad_()
    return InputSet(x, residual, dy)
