"""The Triton kernels of an SE layer; equation numbers are those of senet_fused.reference.

Importing this module imports triton. ``plan.py`` says what a tile is and which kernels follow each other; ``launch.py``
passes the arguments. Conventions:

* x, y, residual, dy, dx: each sample dense, contiguous or channels_last. Strides from sample to sample come in units
  of ALIGN elements and M in units of M_ALIGN: so the compiler sees their divisors, which lets it use 16-byte accesses
  (an integer argument by itself is known to be a multiple of 16 or nothing). C and R are constants for the same reason.
  Offsets within a sample have 32 bits unless WIDE.
* Everything small is float32: parts of pooled and dlogit [N, S, C] with S splits of the positions, shares [N, T, R]
  with T tiles a sample, gate and dpooled [N, C], dpreact [N, R]. pooled, preact, peak and ties may be columns of a
  wider tensor, with `*_stride` from sample to sample. Weights and biases are read in their own dtypes.
* Sums run in an order that depends on the tile alone, never on N; there are no atomics on data.
* PDL: a kernel may begin before the one in front of it has ended, and waits for it before it reads what that one wrote.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from .elementwise import through_gate
from .excite import (
    SINGLY,
    SUM_BLOCK,
    dpooled_of,
    finish_dpreact,
    finish_preact,
    gate_of,
    is_last,
    load_w1,
    load_w2,
    push_dhidden,
    push_preact,
    sum_splits,
    times,
    times_transposed,
    weight_gradients,
)  # fmt: skip
from .sweeps import load_gradient, scale_backward_tile, scale_tile
from .tiles import inside, offsets_of, over_positions, tile_of

# Compiled once for all their values: a new batch size or image size is no new kernel.
_INTEGERS = (
    "x_stride", "y_stride", "dy_stride", "dx_stride", "residual_stride", "parts_stride", "preact_stride",
    "saved_stride", "pooled_stride", "N", "M", "S", "T", "STEPS", "WEIGHT_TILES",
)  # fmt: skip
_ROW_INTEGERS = ("x_stride", "y_stride", "dy_stride", "residual_stride", "parts_stride")

# ---------------------------------------------------------------------------------------------------- squeeze


@triton.jit(do_not_specialize=_INTEGERS)
def squeeze_kernel(
    x, x_stride, w1, b1, parts, parts_stride, peaks, ties, shares, preact, preact_stride, tickets,
    N, M, S, STEPS, inv_m,
    C: tl.constexpr, R: tl.constexpr, ALIGN: tl.constexpr, M_ALIGN: tl.constexpr, CHANNELS_LAST: tl.constexpr,
    WIDE: tl.constexpr, SQUEEZE: tl.constexpr, STRATEGY: tl.constexpr, KEEP: tl.constexpr,
    SAMPLES: tl.constexpr, CHANNELS: tl.constexpr, POSITIONS: tl.constexpr, REDUCED: tl.constexpr,
    STAGES: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """(E1): each tile's part of pooled, or of mean, peak and ties; and, but for "launches", its share of (E2)."""
    if PDL:
        gdc_launch_dependents()
    M = M * M_ALIGN
    BLOCKS: tl.constexpr = (C + CHANNELS - 1) // CHANNELS
    t, i_n, i_c, i_s, o_n, o_c = tile_of(tl.program_id(0), S, C, SAMPLES, CHANNELS, WIDE)
    base = x + o_n.to(tl.int64)[:, None, None] * x_stride * ALIGN
    AXIS: tl.constexpr = 1 if CHANNELS_LAST else 2
    SHAPE: tl.constexpr = [SAMPLES, POSITIONS, CHANNELS] if CHANNELS_LAST else [SAMPLES, CHANNELS, POSITIONS]
    total = tl.zeros(SHAPE, tl.float32)
    peak = tl.full(SHAPE, float("-inf"), tl.float32)
    count = tl.zeros(SHAPE, tl.float32)
    for i in tl.range(0, STEPS, num_stages=STAGES):
        o_p = (i_s * STEPS + i) * POSITIONS + tl.arange(0, POSITIONS)
        m = inside(o_n, o_c, o_p, N, M, C, CHANNELS_LAST, SAMPLES, CHANNELS)
        b_x = tl.load(base + offsets_of(o_c, o_p, M, C, CHANNELS_LAST, WIDE), mask=m, other=0.0).to(tl.float32)
        if SQUEEZE != "max":
            total += b_x
        if SQUEEZE != "avg":
            # NaN lives on in the count of the lane that met it.
            again = tl.where(m & (b_x == peak), count + 1.0, count)
            count = tl.where(m & (b_x > peak), count * 0.0 + 1.0, again)
            count = tl.where(b_x == b_x, count, float("nan"))
            peak = tl.where(m & (b_x > peak), b_x, peak)
    pooled = tl.sum(total, AXIS) * inv_m
    m_nc = (o_n < N)[:, None] & (o_c < C)[None, :]
    row = i_s * C + o_c[None, :]
    if KEEP:
        tl.store(parts + o_n.to(tl.int64)[:, None] * parts_stride + row, pooled, mask=m_nc)
    if SQUEEZE != "avg":
        top = tl.max(peak, AXIS)
        at_top = tl.where(peak == over_positions(top, CHANNELS_LAST), count, count * 0.0)
        row += o_n.to(tl.int64)[:, None] * (S * C)
        tl.store(peaks + row, top, mask=m_nc)
        tl.store(ties + row, tl.sum(at_top, AXIS), mask=m_nc)
    if STRATEGY != "launches":
        push_preact(pooled, w1, shares, o_n, o_c, t, N, BLOCKS * S, C, R, REDUCED, "direct")
    if STRATEGY == "last_block":
        if is_last(tickets, i_n, BLOCKS * S):
            finish_preact(shares, preact, preact_stride, b1, o_n, N, BLOCKS * S, R, REDUCED)


# ---------------------------------------------------------------------------------------------------- excite


@triton.jit
def _merge_peaks(peaks, ties, o_n, o_c, N, S, C: tl.constexpr):
    """The maximum over the splits and how many positions attain it; NaN where a split has NaN ties."""
    m = (o_n < N)[:, None] & (o_c < C)[None, :]
    top = tl.full([o_n.shape[0], o_c.shape[0]], float("-inf"), tl.float32)
    count = tl.zeros([o_n.shape[0], o_c.shape[0]], tl.float32)
    for s in range(0, S):
        row = (o_n.to(tl.int64)[:, None] * S + s) * C + o_c[None, :]
        b_peak = tl.load(peaks + row, mask=m, other=0.0)
        b_ties = tl.load(ties + row, mask=m, other=0.0)
        before = tl.where(top >= b_peak, count, count * 0.0)
        count = before + tl.where(b_peak >= top, b_ties, b_ties * 0.0)
        top = tl.maximum(top, b_peak)
    return tl.where(count == count, top, float("nan")), count


@triton.jit
def _pooled(parts, parts_stride, peaks, ties, o_n, o_c, N, S, C: tl.constexpr, SQUEEZE: tl.constexpr):
    """(pooled, peak, ties) of a block of samples and channels, from the parts of its splits."""
    v = sum_splits(parts, parts_stride, o_n, o_c, N, S, C, SINGLY)
    top, count = v, v
    if SQUEEZE != "avg":
        top, count = _merge_peaks(peaks, ties, o_n, o_c, N, S, C)
        v = top if SQUEEZE == "max" else 0.5 * v + 0.5 * top
    return v, top, count


@triton.jit(do_not_specialize=_INTEGERS)
def excite_push_kernel(
    parts, parts_stride, peaks, ties, w1, shares, pooled, peak, tied, saved_stride, N, S,
    C: tl.constexpr, R: tl.constexpr, SQUEEZE: tl.constexpr, SAVE: tl.constexpr, SAMPLES: tl.constexpr,
    CHANNELS: tl.constexpr, STEP: tl.constexpr, REDUCED: tl.constexpr, PRECISION: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Sums the parts of pooled over the splits, keeps them, and pushes a block of channels' share of (E2)."""
    BLOCKS: tl.constexpr = (C + CHANNELS - 1) // CHANNELS
    t = tl.program_id(0) % BLOCKS
    o_n = (tl.program_id(0) // BLOCKS) * SAMPLES + tl.arange(0, SAMPLES)
    n = o_n.to(tl.int64)[:, None]
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    for r0 in range(0, R, REDUCED):
        o_r = r0 + tl.arange(0, REDUCED)
        share = tl.zeros([SAMPLES, REDUCED], tl.float32)
        for c0 in range(t * CHANNELS, (t + 1) * CHANNELS, STEP):
            o_c = c0 + tl.arange(0, STEP)
            b_w1 = load_w1(w1, o_r, o_c, C, R)
            b_pooled, top, count = _pooled(parts, parts_stride, peaks, ties, o_n, o_c, N, S, C, SQUEEZE)
            m = (o_n < N)[:, None] & (o_c < C)[None, :]
            if SAVE:
                if r0 == 0:
                    at = n * saved_stride + o_c[None, :]
                    tl.store(pooled + at, b_pooled, mask=m)
                    if SQUEEZE != "avg":
                        tl.store(peak + at, top, mask=m)
                        tl.store(tied + at, count, mask=m)
            share += times_transposed(tl.where(m, b_pooled, 0.0), b_w1, PRECISION)
        m = (o_n < N)[:, None] & (o_r < R)[None, :]
        tl.store(shares + (n * BLOCKS + t) * R + o_r[None, :], share, mask=m)


@triton.jit(do_not_specialize=_INTEGERS)
def excite_gate_kernel(
    shares, preact, preact_stride, b1, w2, b2, gate, N, T,
    C: tl.constexpr, R: tl.constexpr, SAVE: tl.constexpr, ACT: tl.constexpr, ACT_A: tl.constexpr,
    GATE: tl.constexpr, GATE_A: tl.constexpr, GATE_B: tl.constexpr,
    SAMPLES: tl.constexpr, CHANNELS: tl.constexpr, REDUCED: tl.constexpr, PRECISION: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """(E2), (E3) from the shares, for a block of samples and channels."""
    BLOCKS: tl.constexpr = (C + CHANNELS - 1) // CHANNELS
    i_c = tl.program_id(0) % BLOCKS
    o_n = (tl.program_id(0) // BLOCKS) * SAMPLES + tl.arange(0, SAMPLES)
    o_c = i_c * CHANNELS + tl.arange(0, CHANNELS)
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    b_gate = gate_of(
        shares, preact, preact_stride, b1, w2, b2, o_n, o_c, N, T, i_c == 0, C, R, False, SAVE,
        ACT, ACT_A, GATE, GATE_A, GATE_B, SAMPLES, CHANNELS, REDUCED, PRECISION,
    )  # fmt: skip
    m_nc = (o_n < N)[:, None] & (o_c < C)[None, :]
    tl.store(gate + o_n.to(tl.int64)[:, None] * C + o_c[None, :], b_gate, mask=m_nc)


# ---------------------------------------------------------------------------------------------------- scale


@triton.jit(do_not_specialize=_INTEGERS)
def scale_kernel(
    x, x_stride, residual, residual_stride, y, y_stride, mask, parts, pooled, pooled_stride, shares,
    preact, preact_stride, b1, w2, b2, gate, N, M, S, STEPS,
    C: tl.constexpr, R: tl.constexpr, ALIGN: tl.constexpr, M_ALIGN: tl.constexpr, CHANNELS_LAST: tl.constexpr,
    WIDE: tl.constexpr, STRATEGY: tl.constexpr, SAVE: tl.constexpr, RELU: tl.constexpr, ACT: tl.constexpr,
    ACT_A: tl.constexpr, GATE: tl.constexpr, GATE_A: tl.constexpr, GATE_B: tl.constexpr,
    SAMPLES: tl.constexpr, CHANNELS: tl.constexpr, POSITIONS: tl.constexpr, REDUCED: tl.constexpr,
    REVERSED: tl.constexpr, EVICT: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """(E2) to (E4): the gate, unless "launches" has made it, and y; with RELU the bit mask too, if it is wanted."""
    M = M * M_ALIGN
    BLOCKS: tl.constexpr = (C + CHANNELS - 1) // CHANNELS
    pid = tl.program_id(0)
    if REVERSED:
        pid = tl.num_programs(0) - 1 - pid
    t, _, i_c, i_s, o_n, o_c = tile_of(pid, S, C, SAMPLES, CHANNELS, WIDE)
    m_nc = (o_n < N)[:, None] & (o_c < C)[None, :]
    n = o_n.to(tl.int64)
    if PDL:
        gdc_wait()
    if STRATEGY == "launches":
        b_gate = tl.load(gate + n[:, None] * C + o_c[None, :], mask=m_nc, other=0.0)
    else:
        b_gate = gate_of(
            shares, preact, preact_stride, b1, w2, b2, o_n, o_c, N, BLOCKS * S, t == 0, C, R,
            STRATEGY == "last_block", SAVE and STRATEGY == "partials",
            ACT, ACT_A, GATE, GATE_A, GATE_B, SAMPLES, CHANNELS, REDUCED, "direct",
        )  # fmt: skip
        if gate is not None:
            if i_s == 0:
                tl.store(gate + n[:, None] * C + o_c[None, :], b_gate, mask=m_nc)
        if parts is not None:
            if i_s == 0:
                b_pooled = sum_splits(parts, S * C, o_n, o_c, N, S, C, SUM_BLOCK)
                tl.store(pooled + n[:, None] * pooled_stride + o_c[None, :], b_pooled, mask=m_nc)
    scale_tile(
        x, x_stride, residual, residual_stride, y, y_stride, mask, None, b_gate, None, o_n, o_c, i_c, i_s, N, M, STEPS,
        C, ALIGN, CHANNELS_LAST, WIDE, RELU, SAMPLES, CHANNELS, POSITIONS, REVERSED, EVICT,
    )  # fmt: skip


# ---------------------------------------------------------------------------------------------------- squeeze, backward


@triton.jit(do_not_specialize=_INTEGERS)
def squeeze_backward_kernel(
    x, x_stride, dy, dy_stride, mask, dgate, gate, w2, parts, shares, preact, preact_stride, dpreact, tickets,
    N, M, S, STEPS,
    C: tl.constexpr, R: tl.constexpr, ALIGN: tl.constexpr, M_ALIGN: tl.constexpr, CHANNELS_LAST: tl.constexpr,
    WIDE: tl.constexpr, STRATEGY: tl.constexpr, RELU: tl.constexpr, ACT: tl.constexpr, ACT_A: tl.constexpr,
    GATE: tl.constexpr, GATE_A: tl.constexpr,
    SAMPLES: tl.constexpr, CHANNELS: tl.constexpr, POSITIONS: tl.constexpr, REDUCED: tl.constexpr,
    STAGES: tl.constexpr, EVICT_X: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """(B1) to (B3): each tile's part of dlogit; and, but for "launches", its share of (B4)."""
    if PDL:
        gdc_launch_dependents()
    M = M * M_ALIGN
    BLOCKS: tl.constexpr = (C + CHANNELS - 1) // CHANNELS
    t, i_n, i_c, i_s, o_n, o_c = tile_of(tl.program_id(0), S, C, SAMPLES, CHANNELS, WIDE)
    n = o_n.to(tl.int64)
    AXIS: tl.constexpr = 1 if CHANNELS_LAST else 2
    SHAPE: tl.constexpr = [SAMPLES, POSITIONS, CHANNELS] if CHANNELS_LAST else [SAMPLES, CHANNELS, POSITIONS]
    total = tl.zeros(SHAPE, tl.float32)
    for i in tl.range(0, STEPS, num_stages=STAGES):
        p0 = (i_s * STEPS + i) * POSITIONS
        o_p = p0 + tl.arange(0, POSITIONS)
        o = offsets_of(o_c, o_p, M, C, CHANNELS_LAST, WIDE)
        m = inside(o_n, o_c, o_p, N, M, C, CHANNELS_LAST, SAMPLES, CHANNELS)
        b_x = tl.load(x + n[:, None, None] * x_stride * ALIGN + o, mask=m, other=0.0, eviction_policy=EVICT_X)
        g = load_gradient(
            dy + n[:, None, None] * dy_stride * ALIGN + o, m, mask, o_n, i_c, p0, N, M, C, CHANNELS_LAST, RELU,
            SAMPLES, CHANNELS, POSITIONS, "",
        )  # fmt: skip
        total += b_x.to(tl.float32) * g
    b_dgate = tl.sum(total, AXIS)
    m_nc = (o_n < N)[:, None] & (o_c < C)[None, :]
    if dgate is not None:
        if i_s == 0:
            b_dgate += tl.load(dgate + n[:, None] * C + o_c[None, :], mask=m_nc, other=0.0)
    b_gate = tl.load(gate + n[:, None] * C + o_c[None, :], mask=m_nc, other=0.0)
    dlogit = through_gate(b_dgate, b_gate, GATE, GATE_A)
    tl.store(parts + (n[:, None] * S + i_s) * C + o_c[None, :], dlogit, mask=m_nc)
    if STRATEGY != "launches":
        dlogit = tl.where(m_nc, dlogit, 0.0)
        push_dhidden(dlogit, w2, shares, o_n, o_c, t, N, BLOCKS * S, C, R, REDUCED)
    if STRATEGY == "last_block":
        if is_last(tickets, i_n, BLOCKS * S):
            finish_dpreact(shares, dpreact, preact, preact_stride, o_n, N, BLOCKS * S, R, REDUCED, ACT, ACT_A)


# ---------------------------------------------------------------------------------------------------- excite, backward


@triton.jit(do_not_specialize=_INTEGERS)
def excite_push_backward_kernel(
    parts, w2, shares, N, S,
    C: tl.constexpr, R: tl.constexpr, SAMPLES: tl.constexpr, CHANNELS: tl.constexpr, STEP: tl.constexpr,
    REDUCED: tl.constexpr, PRECISION: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Sums the parts of dlogit over the splits, and pushes a block of channels' share of (B4)."""
    BLOCKS: tl.constexpr = (C + CHANNELS - 1) // CHANNELS
    t = tl.program_id(0) % BLOCKS
    o_n = (tl.program_id(0) // BLOCKS) * SAMPLES + tl.arange(0, SAMPLES)
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    for r0 in range(0, R, REDUCED):
        o_r = r0 + tl.arange(0, REDUCED)
        share = tl.zeros([SAMPLES, REDUCED], tl.float32)
        for c0 in range(t * CHANNELS, (t + 1) * CHANNELS, STEP):
            o_c = c0 + tl.arange(0, STEP)
            b_w2 = load_w2(w2, o_c, o_r, C, R)
            share += times(sum_splits(parts, S * C, o_n, o_c, N, S, C, SINGLY), b_w2, PRECISION)
        m = (o_n < N)[:, None] & (o_r < R)[None, :]
        tl.store(shares + (o_n.to(tl.int64)[:, None] * BLOCKS + t) * R + o_r[None, :], share, mask=m)


@triton.jit(do_not_specialize=_INTEGERS)
def excite_backward_kernel(
    parts, shares, pooled, preact, saved_stride, w1, dpooled, dw1, db1, dw2, db2, N, S, T, WEIGHT_TILES,
    C: tl.constexpr, R: tl.constexpr, ACT: tl.constexpr, ACT_A: tl.constexpr, SAMPLES: tl.constexpr,
    CHANNELS: tl.constexpr, REDUCED: tl.constexpr, WEIGHT_CHANNELS: tl.constexpr, WEIGHT_REDUCED: tl.constexpr,
    PRECISION: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """From the shares: in the first WEIGHT_TILES programs (B7), in the others (B4), (B5) for a block of channels."""
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    # What is not wanted is None, and not compiled: both branches of a condition known only at run time are.
    if tl.program_id(0) < WEIGHT_TILES:
        if dw1 is not None:
            weight_gradients(
                tl.program_id(0), pooled, saved_stride, None, None, parts, shares, None, preact, saved_stride,
                dw1, db1, dw2, db2, N, S, T, C, R, False, ACT, ACT_A,
                SAMPLES, WEIGHT_CHANNELS, WEIGHT_REDUCED, PRECISION,
            )  # fmt: skip
    elif dpooled is not None:
        BLOCKS: tl.constexpr = (C + CHANNELS - 1) // CHANNELS
        pid = tl.program_id(0) - WEIGHT_TILES
        o_n = (pid // BLOCKS) * SAMPLES + tl.arange(0, SAMPLES)
        o_c = (pid % BLOCKS) * CHANNELS + tl.arange(0, CHANNELS)
        v = dpooled_of(
            shares, None, preact, saved_stride, w1, o_n, o_c, N, T, C, R, False, ACT, ACT_A,
            SAMPLES, CHANNELS, REDUCED, PRECISION,
        )  # fmt: skip
        m_nc = (o_n < N)[:, None] & (o_c < C)[None, :]
        tl.store(dpooled + o_n.to(tl.int64)[:, None] * C + o_c[None, :], v, mask=m_nc)


# ---------------------------------------------------------------------------------------------------- scale, backward


@triton.jit(do_not_specialize=_INTEGERS)
def scale_backward_kernel(
    x, x_stride, dy, dy_stride, dx, dresidual, dx_stride, mask, gate, parts, shares, dpreact, dpooled,
    pooled, preact, peak, tied, saved_stride, w1, dw1, db1, dw2, db2, N, M, S, STEPS, WEIGHT_TILES, inv_m,
    C: tl.constexpr, R: tl.constexpr, ALIGN: tl.constexpr, M_ALIGN: tl.constexpr, CHANNELS_LAST: tl.constexpr,
    WIDE: tl.constexpr, SQUEEZE: tl.constexpr, STRATEGY: tl.constexpr, RELU: tl.constexpr, ACT: tl.constexpr,
    ACT_A: tl.constexpr, SAMPLES: tl.constexpr, CHANNELS: tl.constexpr, POSITIONS: tl.constexpr,
    REDUCED: tl.constexpr, WEIGHT_SAMPLES: tl.constexpr, WEIGHT_CHANNELS: tl.constexpr,
    WEIGHT_REDUCED: tl.constexpr, PRECISION: tl.constexpr, REVERSED: tl.constexpr, EVICT: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """(B4) to (B6): dx and, where RELU, dresidual; (B7) in the first WEIGHT_TILES programs, but for "launches"."""
    M = M * M_ALIGN
    BLOCKS: tl.constexpr = (C + CHANNELS - 1) // CHANNELS
    T = BLOCKS * S
    READY: tl.constexpr = STRATEGY == "last_block"
    if PDL:
        gdc_wait()
    if tl.program_id(0) < WEIGHT_TILES:
        if dw1 is not None:
            weight_gradients(
                tl.program_id(0), pooled, saved_stride, None, None, parts, shares, dpreact, preact, saved_stride,
                dw1, db1, dw2, db2, N, S, T, C, R, READY, ACT, ACT_A,
                WEIGHT_SAMPLES, WEIGHT_CHANNELS, WEIGHT_REDUCED, PRECISION,
            )  # fmt: skip
    else:
        pid = tl.program_id(0) - WEIGHT_TILES
        if REVERSED:
            pid = tl.num_programs(0) - WEIGHT_TILES - 1 - pid
        _, _, i_c, i_s, o_n, o_c = tile_of(pid, S, C, SAMPLES, CHANNELS, WIDE)
        m_nc = (o_n < N)[:, None] & (o_c < C)[None, :]
        n = o_n.to(tl.int64)
        o_nc = n[:, None] * C + o_c[None, :]
        if dx is not None:
            if STRATEGY == "launches":
                b_dpooled = tl.load(dpooled + o_nc, mask=m_nc, other=0.0)
            else:
                b_dpooled = dpooled_of(
                    shares, dpreact, preact, saved_stride, w1, o_n, o_c, N, T, C, R, READY, ACT, ACT_A,
                    SAMPLES, CHANNELS, REDUCED, "direct",
                )  # fmt: skip
            b_gate = tl.load(gate + o_nc, mask=m_nc, other=0.0)
            even = b_dpooled * inv_m  # the part of dx that every position gets
            top, each = even, even
            if SQUEEZE != "avg":
                top = tl.load(peak + n[:, None] * saved_stride + o_c[None, :], mask=m_nc, other=0.0)
                count = tl.load(tied + n[:, None] * saved_stride + o_c[None, :], mask=m_nc, other=1.0)
                each = b_dpooled / count
                if SQUEEZE == "avgmax":
                    even = even * 0.5
                    each = each * 0.5
                else:
                    even = tl.zeros_like(even)
            scale_backward_tile(
                x, x_stride, dy, dy_stride, dx, dresidual, dx_stride, mask, b_gate, even, top, each,
                "none" if SQUEEZE == "avg" else "peak", o_n, o_c, i_c, i_s, N, M, STEPS,
                C, ALIGN, CHANNELS_LAST, WIDE, RELU, SAMPLES, CHANNELS, POSITIONS, REVERSED, EVICT,
            )  # fmt: skip
        else:
            scale_backward_tile(
                x, x_stride, dy, dy_stride, None, dresidual, dx_stride, mask, None, None, None, None, "none",
                o_n, o_c, i_c, i_s, N, M, STEPS,
                C, ALIGN, CHANNELS_LAST, WIDE, RELU, SAMPLES, CHANNELS, POSITIONS, REVERSED, EVICT,
            )  # fmt: skip


# ---------------------------------------------------------------------------------------------------- rows of planes
# Contiguous planes of 49 or 196 16-bit elements are not aligned to 16 bytes; rows of PLANES planes are. The sums per
# plane are a product with ones and zeros: exact, the sums being float32. (Unless something is not finite: 0 * inf would
# spoil the row's other planes, so then each plane is summed by itself.)


@triton.jit
def _ones(o_e, M: tl.constexpr, IN_FLOAT32: tl.constexpr, like):
    """[elements of a row, 16]: 1 where the element belongs to the column's plane."""
    one = (o_e[:, None] // M == tl.arange(0, 16)[None, :]).to(tl.float32)
    return one if IN_FLOAT32 else one.to(like)


@triton.jit
def _is_nan_anywhere(v):
    return tl.sum(tl.sum((v != v).to(tl.int32), 1), 0) > 0


@triton.jit(do_not_specialize=_ROW_INTEGERS)
def rows_squeeze_kernel(
    x, x_stride, parts, parts_stride, inv_m,
    C: tl.constexpr, M: tl.constexpr, ALIGN: tl.constexpr, PLANES: tl.constexpr, ROWS: tl.constexpr,
    STEP: tl.constexpr, WIDE: tl.constexpr, IN_FLOAT32: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """(E1) for ROWS rows of one sample. IN_FLOAT32: form the product in float32 (the interpreter's 16-bit one is
    wrong)."""
    if PDL:
        gdc_launch_dependents()
    LENGTH: tl.constexpr = PLANES * M
    BLOCKS: tl.constexpr = (C // PLANES + ROWS - 1) // ROWS
    i_n = (tl.program_id(0) // BLOCKS).to(tl.int64)
    o_row = (tl.program_id(0) % BLOCKS) * ROWS + tl.arange(0, ROWS)
    total = tl.zeros([ROWS, 16], tl.float32)
    for e0 in range(0, LENGTH, STEP):
        o_e = e0 + tl.arange(0, STEP)
        m = (o_row < C // PLANES)[:, None] & (o_e < LENGTH)[None, :]
        at = o_row.to(tl.int64)[:, None] * LENGTH if WIDE else o_row[:, None] * LENGTH
        b_x = tl.load(x + i_n * x_stride * ALIGN + at + o_e[None, :], mask=m, other=0.0)
        if IN_FLOAT32:
            b_x = b_x.to(tl.float32)
        total = tl.dot(b_x, _ones(o_e, M, IN_FLOAT32, x.dtype.element_ty), total, input_precision="ieee")
    k = tl.arange(0, 16)
    if _is_nan_anywhere(total):
        total = tl.zeros([ROWS, 16], tl.float32)
        for e in range(0, PLANES * M):
            at = o_row.to(tl.int64) * LENGTH + e
            b = tl.load(x + i_n * x_stride * ALIGN + at, mask=o_row < C // PLANES, other=0.0).to(tl.float32)
            total = tl.where((k == e // M)[None, :], total + b[:, None], total)
    o_c = o_row[:, None] * PLANES + k[None, :]
    m = (o_row < C // PLANES)[:, None] & (k < PLANES)[None, :]
    tl.store(parts + i_n * parts_stride + o_c, total * inv_m, mask=m)


@triton.jit(do_not_specialize=_ROW_INTEGERS)
def rows_squeeze_backward_kernel(
    x, x_stride, dy, dy_stride, dgate, gate, parts,
    C: tl.constexpr, M: tl.constexpr, ALIGN: tl.constexpr, PLANES: tl.constexpr, ROWS: tl.constexpr,
    STEP: tl.constexpr, WIDE: tl.constexpr, GATE: tl.constexpr, GATE_A: tl.constexpr,
    IN_FLOAT32: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """(B2), (B3) for ROWS rows of one sample. dy * x is float32: three bfloat16 terms hold all of its digits."""
    if PDL:
        gdc_launch_dependents()
    LENGTH: tl.constexpr = PLANES * M
    BLOCKS: tl.constexpr = (C // PLANES + ROWS - 1) // ROWS
    i_n = (tl.program_id(0) // BLOCKS).to(tl.int64)
    o_row = (tl.program_id(0) % BLOCKS) * ROWS + tl.arange(0, ROWS)
    total = tl.zeros([ROWS, 16], tl.float32)
    for e0 in range(0, LENGTH, STEP):
        o_e = e0 + tl.arange(0, STEP)
        m = (o_row < C // PLANES)[:, None] & (o_e < LENGTH)[None, :]
        at = o_row.to(tl.int64)[:, None] * LENGTH if WIDE else o_row[:, None] * LENGTH
        b_x = tl.load(x + i_n * x_stride * ALIGN + at + o_e[None, :], mask=m, other=0.0, eviction_policy="evict_first")
        b_dy = tl.load(dy + i_n * dy_stride * ALIGN + at + o_e[None, :], mask=m, other=0.0)
        product = b_x.to(tl.float32) * b_dy.to(tl.float32)
        ones = _ones(o_e, M, IN_FLOAT32, tl.bfloat16)
        if IN_FLOAT32:
            total = tl.dot(product, ones, total, input_precision="ieee")
        else:
            high = product.to(tl.bfloat16)
            rest = product - high.to(tl.float32)
            middle = rest.to(tl.bfloat16)
            low = (rest - middle.to(tl.float32)).to(tl.bfloat16)
            total = tl.dot(low, ones, total)
            total = tl.dot(middle, ones, total)
            total = tl.dot(high, ones, total)
    k = tl.arange(0, 16)
    if _is_nan_anywhere(total):
        total = tl.zeros([ROWS, 16], tl.float32)
        for e in range(0, PLANES * M):
            at = o_row.to(tl.int64) * LENGTH + e
            b = tl.load(x + i_n * x_stride * ALIGN + at, mask=o_row < C // PLANES, other=0.0).to(tl.float32)
            d = tl.load(dy + i_n * dy_stride * ALIGN + at, mask=o_row < C // PLANES, other=0.0).to(tl.float32)
            total = tl.where((k == e // M)[None, :], total + (b * d)[:, None], total)
    o_c = i_n * C + o_row[:, None] * PLANES + k[None, :]
    m = (o_row < C // PLANES)[:, None] & (k < PLANES)[None, :]
    if dgate is not None:
        total += tl.load(dgate + o_c, mask=m, other=0.0)
    b_gate = tl.load(gate + o_c, mask=m, other=0.0)
    tl.store(parts + o_c, through_gate(total, b_gate, GATE, GATE_A), mask=m)


@triton.jit(do_not_specialize=_ROW_INTEGERS)
def rows_scale_kernel(
    x, x_stride, residual, residual_stride, y, y_stride, gate, shift, inv_m,
    C: tl.constexpr, M: tl.constexpr, ALIGN: tl.constexpr, PLANES: tl.constexpr, ROWS: tl.constexpr,
    STEP: tl.constexpr, WIDE: tl.constexpr, REVERSED: tl.constexpr, EVICT: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """(E4) y = gate * x + residual, and (B6) dx = gate * dy + shift / M, for ROWS rows of one sample."""
    LENGTH: tl.constexpr = PLANES * M
    BLOCKS: tl.constexpr = (C // PLANES + ROWS - 1) // ROWS
    pid = tl.program_id(0)
    if REVERSED:
        pid = tl.num_programs(0) - 1 - pid
    i_n = (pid // BLOCKS).to(tl.int64)
    o_row = (pid % BLOCKS) * ROWS + tl.arange(0, ROWS)
    if PDL:
        gdc_wait()
    for e0 in range(0, LENGTH, STEP):
        o_e = e0 + tl.arange(0, STEP)
        m = (o_row < C // PLANES)[:, None] & (o_e < LENGTH)[None, :]
        at = (o_row.to(tl.int64)[:, None] * LENGTH if WIDE else o_row[:, None] * LENGTH) + o_e[None, :]
        o_c = i_n * C + o_row[:, None] * PLANES + o_e[None, :] // M
        b_x = tl.load(x + i_n * x_stride * ALIGN + at, mask=m, other=0.0, eviction_policy=EVICT)
        b_y = b_x.to(tl.float32) * tl.load(gate + o_c, mask=m, other=0.0)
        if residual is not None:
            b_r = tl.load(residual + i_n * residual_stride * ALIGN + at, mask=m, other=0.0, eviction_policy=EVICT)
            b_y += b_r.to(tl.float32)
        if shift is not None:
            b_y += tl.load(shift + o_c, mask=m, other=0.0) * inv_m
        tl.store(y + i_n * y_stride * ALIGN + at, b_y.to(y.dtype.element_ty), mask=m)
