"""Memory layouts, and the form in which kernels read tensors: dense samples, contiguous weights, known dtypes."""

from __future__ import annotations

import math

import torch
from torch import Tensor

__all__ = [
    "as_weights", "as_vector", "empty_like", "empty_mask", "gradient_target", "in_layout", "is_channels_last",
    "layout_of", "unpack_mask",
]  # fmt: skip

WEIGHT_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def layout_of(x: Tensor) -> str | None:
    """ "contiguous" or "channels_last" if each sample of x is dense in that order, else None.

    The stride between samples is free (a slice of a batch needs no copy). Dimensions of size 1 do not matter.
    """
    if x.is_contiguous():
        return "contiguous"
    if x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last):
        return "channels_last"  # the usual case, at a tenth of the host time of the rest
    shape, stride = x.shape, x.stride()
    channels, spatial = (shape[1], stride[1]), list(zip(shape[2:], stride[2:], strict=True))
    if _dense([*reversed(spatial), channels]):
        return "contiguous"
    return "channels_last" if _dense([channels, *reversed(spatial)]) else None


def _dense(dims: list[tuple[int, int]]) -> bool:
    expected = 1
    for size, stride in dims:
        if size != 1 and stride != expected:
            return False
        expected = expected * size
    return True


def is_channels_last(x: Tensor) -> bool:
    """Whether kernels see x as channels_last; tensors of any other layout are made contiguous first."""
    return not x.is_contiguous() and layout_of(x) == "channels_last"


def empty_like(x: Tensor, channels_last: bool) -> Tensor:
    """A dense tensor of x's shape, dtype and device."""
    if not channels_last:
        return torch.empty_like(x, memory_format=torch.contiguous_format)
    if x.dim() == 4:
        return torch.empty_like(x, memory_format=torch.channels_last)
    if x.dim() == 5:
        return torch.empty_like(x, memory_format=torch.channels_last_3d)
    n, c, length = x.shape
    # Not a transposed view: what an operator returns may be changed in place.
    return x.new_empty_strided((n, c, length), (length * c, 1, c))


def in_layout(t: Tensor, channels_last: bool) -> Tensor:
    """t itself if it has the layout, else a copy that has. (With C = 1 or one position a tensor has both.)"""
    if not channels_last:
        if t.is_contiguous():
            return t
    elif t.dim() == 4 and t.is_contiguous(memory_format=torch.channels_last):
        return t
    channels, *spatial = zip(t.shape[1:], t.stride()[1:], strict=True)
    spatial.reverse()
    has_it = _dense([channels, *spatial]) if channels_last else _dense([*spatial, channels])
    return t if has_it else empty_like(t, channels_last).copy_(t)


def empty_mask(x: Tensor, channels_last: bool) -> Tensor:
    """A bit mask for a ReLU on a tensor of x's shape."""
    m = math.prod(x.shape[2:])
    rows, columns = (m, x.shape[1]) if channels_last else (x.shape[1], m)
    return x.new_empty((x.shape[0], rows, (columns + 7) // 8), dtype=torch.uint8)


def unpack_mask(mask: Tensor, x: Tensor) -> Tensor:
    """The bit mask of the forward as a bool tensor of x's shape."""
    bits = (mask.unsqueeze(-1) >> torch.arange(8, dtype=torch.uint8, device=mask.device)) & 1
    n, c, *spatial = x.shape
    bits = bits.flatten(2)
    if is_channels_last(x):
        return bits[:, :, :c].transpose(1, 2).reshape(n, c, *spatial).bool()
    return bits[:, :, : math.prod(spatial)].reshape(n, c, *spatial).bool()


def as_weights(w1: Tensor, w2: Tensor, wide: torch.dtype) -> tuple[Tensor, Tensor]:
    """Weights as kernels read them: contiguous, in their own dtype where kernels have it and both agree."""
    dtype = w1.dtype
    known = dtype == wide or (wide == torch.float32 and dtype in WEIGHT_DTYPES)
    if dtype != w2.dtype or not known:
        w1, w2 = w1.to(wide), w2.to(wide)
    return w1.contiguous(), w2.contiguous()


def as_vector(vector: Tensor, wide: torch.dtype, others: tuple[torch.dtype, ...]) -> Tensor:
    """A bias, or another small vector, as kernels read it: contiguous, in the accumulation dtype or one of the others
    that the backend reads (its VECTOR_DTYPES), because on a GPU each conversion is a launch."""
    dtype = vector.dtype
    if dtype != wide and dtype not in others:
        vector = vector.to(wide)
    return vector.contiguous()


def gradient_target(gradient: Tensor, dtype: torch.dtype) -> Tensor:
    """Where kernels write a gradient: itself, or a tensor of the dtype in which they write it."""
    return gradient if gradient.dtype == dtype else torch.empty_like(gradient, dtype=dtype)
