"""The second sweeps over a tile, and the gradient behind the ReLU, for SE layers and block tails."""

from __future__ import annotations

import triton
import triton.language as tl

from .tiles import inside, load_mask, offsets_of, over_positions, store_mask

__all__ = ["load_gradient", "scale_backward_tile", "scale_tile"]


@triton.jit
def load_gradient(
    at, m, mask, o_n, i_c, p0, N, M, C: tl.constexpr, CHANNELS_LAST: tl.constexpr, RELU: tl.constexpr,
    SAMPLES: tl.constexpr, CHANNELS: tl.constexpr, POSITIONS: tl.constexpr, EVICT: tl.constexpr,
):  # fmt: skip
    """g of (B1): dy, whose block is at `at`, where the ReLU lets it through. m: which of its elements exist."""
    g = tl.load(at, mask=m, other=0.0, eviction_policy=EVICT).to(tl.float32)
    if RELU:
        keep = load_mask(mask, o_n, i_c, p0, N, M, C, CHANNELS_LAST, SAMPLES, CHANNELS, POSITIONS)
        g = tl.where(keep == 0, 0.0, g)
    return g


@triton.jit
def scale_tile(
    x, x_stride, residual, residual_stride, y, y_stride, mask, mean, scale, shift, o_n, o_c, i_c, i_s, N, M, STEPS,
    C: tl.constexpr, ALIGN: tl.constexpr, CHANNELS_LAST: tl.constexpr, WIDE: tl.constexpr, RELU: tl.constexpr,
    SAMPLES: tl.constexpr, CHANNELS: tl.constexpr, POSITIONS: tl.constexpr, REVERSED: tl.constexpr,
    EVICT: tl.constexpr,
):  # fmt: skip
    """y = relu(scale * (x - mean) + shift + residual), (E4) and (T3), and the bit mask. scale, shift, mean: blocks of
    [samples, channels] or [1, channels]; mean and shift go together, or are None."""
    scale = over_positions(scale, CHANNELS_LAST)
    if shift is not None:
        mean = over_positions(mean, CHANNELS_LAST)
        shift = over_positions(shift, CHANNELS_LAST)
    n = o_n.to(tl.int64)
    for j in range(0, STEPS):
        i = STEPS - 1 - j if REVERSED else j
        p0 = (i_s * STEPS + i) * POSITIONS
        o_p = p0 + tl.arange(0, POSITIONS)
        o = offsets_of(o_c, o_p, M, C, CHANNELS_LAST, WIDE)
        m = inside(o_n, o_c, o_p, N, M, C, CHANNELS_LAST, SAMPLES, CHANNELS)
        b_x = tl.load(x + n[:, None, None] * x_stride * ALIGN + o, mask=m, other=0.0, eviction_policy=EVICT)
        if shift is not None:
            b_y = (b_x.to(tl.float32) - mean) * scale + shift
        else:
            b_y = b_x.to(tl.float32) * scale
        if residual is not None:
            at = residual + n[:, None, None] * residual_stride * ALIGN + o
            b_y += tl.load(at, mask=m, other=0.0, eviction_policy=EVICT).to(tl.float32)
        if RELU:
            keep = tl.where(b_y <= 0, 0, 1)
            b_y = tl.where(keep == 0, 0.0, b_y)
            if mask is not None:
                keep = tl.where(m, keep, 0)
                store_mask(mask, keep, o_n, i_c, p0, N, M, C, CHANNELS_LAST, SAMPLES, CHANNELS, POSITIONS)
        tl.store(y + n[:, None, None] * y_stride * ALIGN + o, b_y.to(y.dtype.element_ty), mask=m)


@triton.jit
def scale_backward_tile(
    x, x_stride, dy, dy_stride, dx, dresidual, dx_stride, mask, scale, shift, of_x, slope, READS_X: tl.constexpr,
    o_n, o_c, i_c, i_s, N, M, STEPS,
    C: tl.constexpr, ALIGN: tl.constexpr, CHANNELS_LAST: tl.constexpr, WIDE: tl.constexpr, RELU: tl.constexpr,
    SAMPLES: tl.constexpr, CHANNELS: tl.constexpr, POSITIONS: tl.constexpr, REVERSED: tl.constexpr,
    EVICT: tl.constexpr,
):  # fmt: skip
    """dx = scale * g + shift, (B6) and (T7), and dresidual = g; either may be None.

    READS_X: "none"; "peak": and slope where x == of_x; "slope": and slope * (x - of_x). All four are blocks of
    [samples, channels] or [1, channels].
    """
    n = o_n.to(tl.int64)
    if dx is not None:
        scale = over_positions(scale, CHANNELS_LAST)
        shift = over_positions(shift, CHANNELS_LAST)
        of_x = over_positions(of_x, CHANNELS_LAST)
        slope = over_positions(slope, CHANNELS_LAST)
    for j in range(0, STEPS):
        i = STEPS - 1 - j if REVERSED else j
        p0 = (i_s * STEPS + i) * POSITIONS
        o_p = p0 + tl.arange(0, POSITIONS)
        o = offsets_of(o_c, o_p, M, C, CHANNELS_LAST, WIDE)
        m = inside(o_n, o_c, o_p, N, M, C, CHANNELS_LAST, SAMPLES, CHANNELS)
        at_out = n[:, None, None] * dx_stride * ALIGN + o
        g = load_gradient(
            dy + (n[:, None, None] * dy_stride * ALIGN + o), m, mask, o_n, i_c, p0, N, M, C, CHANNELS_LAST, RELU,
            SAMPLES, CHANNELS, POSITIONS, EVICT,
        )  # fmt: skip
        if RELU:
            if dresidual is not None:
                tl.store(dresidual + at_out, g.to(dresidual.dtype.element_ty), mask=m)
        if dx is not None:
            b_dx = g * scale + shift
            if READS_X != "none":
                at_x = n[:, None, None] * x_stride * ALIGN + o
                b_x = tl.load(x + at_x, mask=m, other=0.0, eviction_policy=EVICT).to(tl.float32)
                if READS_X == "peak":
                    b_dx += tl.where(b_x == of_x, slope, slope * 0.0)
                else:
                    b_dx += (b_x - of_x) * slope
            tl.store(dx + at_out, b_dx.to(dx.dtype.element_ty), mask=m)
