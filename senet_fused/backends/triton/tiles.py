"""Where the elements of a tile lie, and the bit mask of a ReLU behind the layer."""

from __future__ import annotations

import triton
import triton.language as tl

__all__ = ["inside", "load_mask", "offsets_of", "over_positions", "store_mask", "tile_of"]


@triton.jit
def tile_of(pid, S, C: tl.constexpr, SAMPLES: tl.constexpr, CHANNELS: tl.constexpr, WIDE: tl.constexpr):
    """The pid-th tile: its number in its group of samples, group, block of channels and split; and which samples and
    channels are in it."""
    BLOCKS: tl.constexpr = (C + CHANNELS - 1) // CHANNELS
    t = pid % (BLOCKS * S)
    i_n = pid // (BLOCKS * S)
    i_c = t % BLOCKS
    i_s = t // BLOCKS
    if WIDE:
        i_s = i_s.to(tl.int64)
    o_n = i_n * SAMPLES + tl.arange(0, SAMPLES)
    o_c = i_c * CHANNELS + tl.arange(0, CHANNELS)
    return t, i_n, i_c, i_s, o_n, o_c


@triton.jit
def over_positions(v, CHANNELS_LAST: tl.constexpr):
    """[samples, channels] as it goes with a tile."""
    return v[:, None, :] if CHANNELS_LAST else v[:, :, None]


@triton.jit
def offsets_of(o_c, o_p, M, C: tl.constexpr, CHANNELS_LAST: tl.constexpr, WIDE: tl.constexpr):
    """Elements from a sample's start: [1, P, C] for channels_last, [1, C, P] for planes."""
    if WIDE:
        o_c = o_c.to(tl.int64)
        o_p = o_p.to(tl.int64)
    if CHANNELS_LAST:
        offsets = o_p[None, :, None] * C + o_c[None, None, :]
    else:
        offsets = o_c[None, :, None] * M + o_p[None, None, :]
    return offsets


@triton.jit
def inside(
    o_n, o_c, o_p, N, M, C: tl.constexpr, CHANNELS_LAST: tl.constexpr, SAMPLES: tl.constexpr, CHANNELS: tl.constexpr
):
    """Which elements of a tile exist. Only what can be outside is compared."""
    if CHANNELS_LAST:
        m = (o_p < M)[None, :, None]
        if C % CHANNELS != 0:
            m = m & (o_c < C)[None, None, :]
    else:
        m = (o_p < M)[None, None, :]
        if C % CHANNELS != 0:
            m = m & (o_c < C)[None, :, None]
    if SAMPLES > 1:
        m = m & (o_n < N)[:, None, None]
    return m


@triton.jit
def _mask_bytes(o_n, o_c, o_p, M, C: tl.constexpr, CHANNELS_LAST: tl.constexpr):
    """Where the bit mask's bytes of a tile are, and which of them exist; o_c or o_p counts groups of eight."""
    if CHANNELS_LAST:
        groups = (C + 7) // 8
        row = o_n.to(tl.int64)[:, None, None] * M + o_p[None, :, None]
        offsets = row * groups + o_c[None, None, :]
        m = (o_p < M)[None, :, None] & (o_c < groups)[None, None, :]
    else:
        groups = (M + 7) // 8
        row = o_n.to(tl.int64)[:, None, None] * C + o_c[None, :, None]
        offsets = row * groups + o_p[None, None, :]
        m = (o_c < C)[None, :, None] & (o_p < groups)[None, None, :]
    return offsets, m


@triton.jit
def store_mask(
    mask, keep, o_n, i_c, p0, N, M, C: tl.constexpr, CHANNELS_LAST: tl.constexpr,
    SAMPLES: tl.constexpr, CHANNELS: tl.constexpr, POSITIONS: tl.constexpr,
):  # fmt: skip
    """Packs a tile of 0 and 1, eight neighbours in memory to a byte, least significant bit first."""
    bit = tl.arange(0, 8)
    if CHANNELS_LAST:
        bits = tl.reshape(keep, [SAMPLES, POSITIONS, CHANNELS // 8, 8])
        o_c = i_c * (CHANNELS // 8) + tl.arange(0, CHANNELS // 8)
        o_p = p0 + tl.arange(0, POSITIONS)
    else:
        bits = tl.reshape(keep, [SAMPLES, CHANNELS, POSITIONS // 8, 8])
        o_c = i_c * CHANNELS + tl.arange(0, CHANNELS)
        o_p = p0 // 8 + tl.arange(0, POSITIONS // 8)
    packed = tl.sum(bits << bit[None, None, None, :], 3)
    offsets, m = _mask_bytes(o_n, o_c, o_p, M, C, CHANNELS_LAST)
    tl.store(mask + offsets, packed.to(tl.uint8), mask=m & (o_n < N)[:, None, None])


@triton.jit
def load_mask(
    mask, o_n, i_c, p0, N, M, C: tl.constexpr, CHANNELS_LAST: tl.constexpr,
    SAMPLES: tl.constexpr, CHANNELS: tl.constexpr, POSITIONS: tl.constexpr,
):  # fmt: skip
    """The tile of 0 and 1 that store_mask packed."""
    bit = tl.arange(0, 8)
    if CHANNELS_LAST:
        o_c = i_c * (CHANNELS // 8) + tl.arange(0, CHANNELS // 8)
        o_p = p0 + tl.arange(0, POSITIONS)
    else:
        o_c = i_c * CHANNELS + tl.arange(0, CHANNELS)
        o_p = p0 // 8 + tl.arange(0, POSITIONS // 8)
    offsets, m = _mask_bytes(o_n, o_c, o_p, M, C, CHANNELS_LAST)
    packed = tl.load(mask + offsets, mask=m & (o_n < N)[:, None, None], other=0).to(tl.int32)
    bits = (packed[:, :, :, None] >> bit[None, None, None, :]) & 1
    if CHANNELS_LAST:
        bits = tl.reshape(bits, [SAMPLES, POSITIONS, CHANNELS])
    else:
        bits = tl.reshape(bits, [SAMPLES, CHANNELS, POSITIONS])
    return bits
