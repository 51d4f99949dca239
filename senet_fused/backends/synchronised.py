"""Synchronised BatchNorm: statistics of a batch that several processes share, between a block tail's two sweeps."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..call import Call, GradientCall
from ..torch_private import process_group

__all__ = ["merge_statistics", "share_sums", "values_per_channel"]


def values_per_channel(x: Tensor) -> int:
    """m of (T1), in this process."""
    return x.shape[0] * math.prod(x.shape[2:])


def merge_statistics(statistics: Tensor, call: Call) -> None:
    """(T1) over all processes, in place, from the statistics of each (Chan, Golub & LeVeque 1983)."""
    processes, count = process_group(call.group), values_per_channel(call.x)
    mean, _, var = statistics.double()
    own = torch.cat((mean, var * (count - 1), torch.full_like(mean[:1], count)))
    if count == 0:
        own.zero_()  # a process without samples has no mean
    every = [torch.empty_like(own) for _ in range(torch.distributed.get_world_size(processes))]
    torch.distributed.all_gather(every, own, group=processes)
    means, squares, counts = torch.stack(every).split((mean.numel(), mean.numel(), 1), 1)
    total = counts.sum()
    mean = (counts * means).sum(0) / total
    squares = (squares + counts * (means - mean).square()).sum(0)
    statistics.copy_(torch.stack((mean, (squares / total + call.eps).rsqrt(), squares / (total - 1))))


def share_sums(dweight: Tensor, dbias: Tensor, call: GradientCall) -> tuple[Tensor, Tensor]:
    """dweight / m and dbias / m of (T7) over all processes; nothing waits for the device."""
    count = torch.full_like(dweight[:1], values_per_channel(call.x))
    every = torch.cat((dweight, dbias, count)).double()
    torch.distributed.all_reduce(every, group=process_group(call.group))
    return (every[:-1] / every[-1]).to(dweight.dtype).split(dweight.numel())
