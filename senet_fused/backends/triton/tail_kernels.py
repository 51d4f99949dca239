"""The Triton kernels of a block tail; equation numbers are those of senet_fused.reference.

Conventions, stages and strategies as in ``kernels.py``. Importing this module imports triton. What the kernels keep
between the launches, all float32, with S splits of the positions: shifts, means, squares [N, S, C], the moments of a
split's values minus the shift; g0, g1 (T4) and dlogit [N, S, C]; sums [G, 2, C], (T6) for G groups of samples. saved is
rstd * (xbar - mu) (C) | preact (R).
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from .elementwise import through_gate
from .excite import (
    SINGLY,
    dpooled_of,
    finish_dpreact,
    finish_preact,
    gate_of,
    is_last,
    push_dhidden,
    push_preact,
    sum_splits,
    weight_gradients,
)
from .sweeps import load_gradient, scale_backward_tile, scale_tile
from .tiles import inside, offsets_of, over_positions, tile_of

_INTEGERS = (
    "x_stride", "y_stride", "dy_stride", "dx_stride", "residual_stride", "preact_stride", "saved_stride", "N", "M", "S",
    "T", "STEPS", "LENGTH", "GROUPS", "WEIGHT_TILES",
)  # fmt: skip


@triton.jit
def _vector(v, o, SIZE: tl.constexpr, DEFAULT: tl.constexpr):
    """v[o] as a row; DEFAULT everywhere where there is no v."""
    row = tl.full([1, o.shape[0]], DEFAULT, tl.float32)
    if v is not None:
        row = tl.load(v + o, mask=o < SIZE, other=0.0).to(tl.float32)[None, :]
    return row


@triton.jit
def _normal(statistics, mean, var, eps, o_c, C: tl.constexpr):
    """(mu, rstd) as rows: from mean and var where they are given, else from what the launch before has left."""
    if var is not None:
        mu, rstd = _vector(mean, o_c, C, 0.0), _rstd(_vector(var, o_c, C, 0.0), eps)
    else:
        mu, rstd = _vector(statistics, o_c, C, 0.0), _vector(statistics + C, o_c, C, 0.0)
    return mu, rstd


@triton.jit
def _rstd(var, eps):
    return tl.div_rn(1.0, tl.sqrt_rn(var + eps))


@triton.jit
def _keep(statistics, mu, rstd, var, o_c, C: tl.constexpr):
    at = o_c[None, :]
    tl.store(statistics + at, mu, mask=at < C)
    tl.store(statistics + C + at, rstd, mask=at < C)
    tl.store(statistics + 2 * C + at, var, mask=at < C)


@triton.jit
def _branch(factor, b_gate, o_n, N):
    """What multiplies BatchNorm's output: gate * factor, [samples, channels] or [1, channels]."""
    if factor is not None:
        b_gate = b_gate * tl.load(factor + o_n, mask=o_n < N, other=0.0).to(tl.float32)[:, None]
    return b_gate


# ---------------------------------------------------------------------------------------------------- moments


@triton.jit(do_not_specialize=_INTEGERS)
def tail_moments_kernel(
    x, x_stride, mean, shifts, means, squares, N, M, S, STEPS, inv_m,
    C: tl.constexpr, ALIGN: tl.constexpr, M_ALIGN: tl.constexpr, CHANNELS_LAST: tl.constexpr, WIDE: tl.constexpr,
    SAMPLES: tl.constexpr, CHANNELS: tl.constexpr, POSITIONS: tl.constexpr, STAGES: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """(T1) for a tile: the moments of each channel; with statistics that are given (mean) its part of xbar - mu.

    Values are summed minus a shift, the mean of the tile's first positions. So what their squares cancel by is bounded
    by the number of steps, whatever the values are.
    """
    if PDL:
        gdc_launch_dependents()
    M = M * M_ALIGN
    _, _, _, i_s, o_n, o_c = tile_of(tl.program_id(0), S, C, SAMPLES, CHANNELS, WIDE)
    base = x + o_n.to(tl.int64)[:, None, None] * x_stride * ALIGN
    AXIS: tl.constexpr = 1 if CHANNELS_LAST else 2
    SHAPE: tl.constexpr = [SAMPLES, POSITIONS, CHANNELS] if CHANNELS_LAST else [SAMPLES, CHANNELS, POSITIONS]
    p_first = i_s * STEPS * POSITIONS
    if mean is not None:
        shift = tl.broadcast_to(_vector(mean, o_c, C, 0.0), [SAMPLES, CHANNELS])
    else:
        o_p = p_first + tl.arange(0, POSITIONS)
        m = inside(o_n, o_c, o_p, N, M, C, CHANNELS_LAST, SAMPLES, CHANNELS)
        b_x = tl.load(base + offsets_of(o_c, o_p, M, C, CHANNELS_LAST, WIDE), mask=m, other=0.0).to(tl.float32)
        shift = tl.sum(b_x, AXIS) / tl.minimum(M - p_first, POSITIONS).to(tl.float32)
        # Values minus an infinite one would have lost its sign.
        shift = tl.where(tl.abs(shift) < float("inf"), shift, 0.0)
    total = tl.zeros(SHAPE, tl.float32)
    square = tl.zeros(SHAPE, tl.float32)
    wide_shift = over_positions(shift, CHANNELS_LAST)
    # The step is that of sweeps which read two tensors.
    for i in tl.range(0, STEPS, num_stages=STAGES, loop_unroll_factor=2):
        o_p = p_first + i * POSITIONS + tl.arange(0, POSITIONS)
        m = inside(o_n, o_c, o_p, N, M, C, CHANNELS_LAST, SAMPLES, CHANNELS)
        b_x = tl.load(base + offsets_of(o_c, o_p, M, C, CHANNELS_LAST, WIDE), mask=m, other=0.0).to(tl.float32)
        d = tl.where(m, b_x - wide_shift, 0.0)
        total += d
        if mean is None:
            square += d * d
    m_nc = (o_n < N)[:, None] & (o_c < C)[None, :]
    at = (o_n.to(tl.int64)[:, None] * S + i_s) * C + o_c[None, :]
    s = tl.sum(total, AXIS)
    if mean is not None:
        tl.store(means + at, s * inv_m, mask=m_nc)
    else:
        s_mean = s / tl.minimum(M - p_first, STEPS * POSITIONS).to(tl.float32)
        rest = tl.sum(square, AXIS) - s * s_mean
        tl.store(shifts + at, shift, mask=m_nc)
        tl.store(means + at, s_mean, mask=m_nc)
        tl.store(squares + at, tl.where(rest < 0, 0.0, rest), mask=m_nc)


# ---------------------------------------------------------------------------------------------------- excite


@triton.jit
def _count_of(o_s, M, LENGTH):
    """How many positions split o_s has."""
    return tl.minimum(M - o_s * LENGTH, LENGTH).to(tl.float32)


@triton.jit
def _statistics_of(
    shifts, means, squares, statistics, keep, o_c, N, M, S, LENGTH, count, eps,
    C: tl.constexpr, ENTRIES: tl.constexpr,
):  # fmt: skip
    """(T1) over all samples and splits, for a row of channels: (mu, rstd), and kept by the program that is to.

    A row of the block sums its entries' means minus the first of them, and the rows are merged about their mean (Chan,
    Golub & LeVeque 1983): so nothing cancels where samples are far apart.
    """
    base = _vector(shifts, o_c, C, 0.0)
    about = tl.zeros([ENTRIES, o_c.shape[0]], tl.float32)
    total = tl.zeros([ENTRIES, o_c.shape[0]], tl.float32)
    square = tl.zeros([ENTRIES, o_c.shape[0]], tl.float32)
    positions = tl.zeros([ENTRIES], tl.float32)
    for e0 in tl.range(0, N * S, ENTRIES, loop_unroll_factor=4):
        o_e = e0 + tl.arange(0, ENTRIES)
        m = (o_e < N * S)[:, None] & (o_c < C)[None, :]
        at = o_e.to(tl.int64)[:, None] * C + o_c[None, :]
        b_shift = tl.load(shifts + at, mask=m, other=0.0)
        b_mean = tl.load(means + at, mask=m, other=0.0)
        b_square = tl.load(squares + at, mask=m, other=0.0)
        each = tl.where(o_e < N * S, _count_of(o_e % S, M, LENGTH), 0.0)
        mean = (b_shift - base) + b_mean
        if e0 == 0:
            about = tl.where(tl.abs(mean) < float("inf"), mean, 0.0)
        d = tl.where(m, mean - about, 0.0)
        positions += each
        total += each[:, None] * d
        square += b_square + each[:, None] * d * d
    inverse = tl.where(positions > 0, 1.0 / tl.maximum(positions, 1.0), 0.0)[:, None]
    square = square - total * (total * inverse)
    square = tl.where(square < 0, 0.0, square)
    about = about + total * inverse
    d = tl.sum(positions[:, None] * about, 0)[None, :] / count
    mu = base + d
    rest = tl.sum(square + positions[:, None] * ((about - d) * (about - d)), 0)[None, :]
    rstd = _rstd(rest / count, eps)
    if keep:
        _keep(statistics, mu, rstd, tl.where(count > 1, rest / (count - 1), 0.0), o_c, C)
    return mu, rstd


@triton.jit
def _centred_mean(shifts, means, mu, o_n, o_c, N, M, S, LENGTH, inv_m, C: tl.constexpr):
    """xbar - mu for a block of samples and channels."""
    if shifts is None:
        total = sum_splits(means, S * C, o_n, o_c, N, S, C, SINGLY)
    else:
        m = (o_n < N)[:, None] & (o_c < C)[None, :]
        total = tl.zeros([o_n.shape[0], o_c.shape[0]], tl.float32)
        for s in tl.range(0, S, loop_unroll_factor=4):
            at = (o_n.to(tl.int64)[:, None] * S + s) * C + o_c[None, :]
            b_shift = tl.load(shifts + at, mask=m, other=0.0)
            total += _count_of(s, M, LENGTH) * ((b_shift - mu) + tl.load(means + at, mask=m, other=0.0))
        total = total * inv_m
    return total


@triton.jit(do_not_specialize=_INTEGERS)
def tail_excite_kernel(
    shifts, means, squares, statistics, mean, var, weight, bias, w1, b1, shares, saved, preact, saved_stride, tickets,
    N, M, S, LENGTH, count, inv_m, eps,
    C: tl.constexpr, R: tl.constexpr, MERGES: tl.constexpr, PUSHES: tl.constexpr, LAST_BLOCK: tl.constexpr,
    SAMPLES: tl.constexpr, CHANNELS: tl.constexpr, REDUCED: tl.constexpr, ENTRIES: tl.constexpr,
    PRECISION: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """For a block of channels and a group of samples: MERGES, the statistics of the batch (T1), which each group makes
    for itself; PUSHES, (T2) and the block's share of (E2)."""
    BLOCKS: tl.constexpr = (C + CHANNELS - 1) // CHANNELS
    t = tl.program_id(0) % BLOCKS
    i_n = tl.program_id(0) // BLOCKS
    o_c = t * CHANNELS + tl.arange(0, CHANNELS)
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    if MERGES:
        mu, rstd = _statistics_of(
            shifts, means, squares, statistics, i_n == 0, o_c, N, M, S, LENGTH, count, eps, C, ENTRIES
        )
    else:
        mu, rstd = _normal(statistics, mean, var, eps, o_c, C)
    if PUSHES:
        o_n = i_n * SAMPLES + tl.arange(0, SAMPLES)
        m_nc = (o_n < N)[:, None] & (o_c < C)[None, :]
        xhat = _centred_mean(shifts, means, mu, o_n, o_c, N, M, S, LENGTH, inv_m, C) * rstd
        tl.store(saved + o_n.to(tl.int64)[:, None] * saved_stride + o_c[None, :], xhat, mask=m_nc)
        pooled = tl.where(m_nc, xhat * _vector(weight, o_c, C, 1.0) + _vector(bias, o_c, C, 0.0), 0.0)
        push_preact(pooled, w1, shares, o_n, o_c, t, N, BLOCKS, C, R, REDUCED, PRECISION)
        if LAST_BLOCK:
            if is_last(tickets, i_n, BLOCKS):
                finish_preact(shares, preact, saved_stride, b1, o_n, N, BLOCKS, R, REDUCED)


# ---------------------------------------------------------------------------------------------------- scale


@triton.jit(do_not_specialize=_INTEGERS)
def tail_scale_kernel(
    x, x_stride, residual, residual_stride, y, y_stride, mask, statistics, mean, var, weight, bias, factor, shares,
    preact, preact_stride, b1, w2, b2, gate, N, M, S, STEPS, T, eps,
    C: tl.constexpr, R: tl.constexpr, ALIGN: tl.constexpr, M_ALIGN: tl.constexpr, CHANNELS_LAST: tl.constexpr,
    WIDE: tl.constexpr, STRATEGY: tl.constexpr, RELU: tl.constexpr, ACT: tl.constexpr, ACT_A: tl.constexpr,
    GATE: tl.constexpr, GATE_A: tl.constexpr, GATE_B: tl.constexpr,
    SAMPLES: tl.constexpr, CHANNELS: tl.constexpr, POSITIONS: tl.constexpr, REDUCED: tl.constexpr,
    REVERSED: tl.constexpr, EVICT: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """(E2), (E3), unless "launches" has made the gate, and (T3); the bit mask too, if it is wanted. Statistics that are
    given are kept as those of a batch are."""
    M = M * M_ALIGN
    pid = tl.program_id(0)
    if REVERSED:
        pid = tl.num_programs(0) - 1 - pid
    t, i_n, i_c, i_s, o_n, o_c = tile_of(pid, S, C, SAMPLES, CHANNELS, WIDE)
    m_nc = (o_n < N)[:, None] & (o_c < C)[None, :]
    at_nc = o_n.to(tl.int64)[:, None] * C + o_c[None, :]
    if PDL:
        gdc_wait()
    if R == 0:
        b_gate = tl.full([1, CHANNELS], 1.0, tl.float32)
    elif STRATEGY == "launches":
        b_gate = tl.load(gate + at_nc, mask=m_nc, other=0.0)
    else:
        b_gate = gate_of(
            shares, preact, preact_stride, b1, w2, b2, o_n, o_c, N, T, t == 0, C, R,
            STRATEGY == "last_block", STRATEGY == "partials",
            ACT, ACT_A, GATE, GATE_A, GATE_B, SAMPLES, CHANNELS, REDUCED, "direct",
        )  # fmt: skip
        if i_s == 0:
            tl.store(gate + at_nc, b_gate, mask=m_nc)
    branch = _branch(factor, b_gate, o_n, N)
    mu, rstd = _normal(statistics, mean, var, eps, o_c, C)
    if var is not None:
        if i_n == 0:
            if i_s == 0:
                _keep(statistics, mu, rstd, _vector(var, o_c, C, 0.0), o_c, C)
    scale_tile(
        x, x_stride, residual, residual_stride, y, y_stride, mask, mu, branch * (_vector(weight, o_c, C, 1.0) * rstd),
        branch * _vector(bias, o_c, C, 0.0), o_n, o_c, i_c, i_s, N, M, STEPS,
        C, ALIGN, CHANNELS_LAST, WIDE, RELU, SAMPLES, CHANNELS, POSITIONS, REVERSED, EVICT,
    )  # fmt: skip


# ---------------------------------------------------------------------------------------------------- sums


@triton.jit(do_not_specialize=_INTEGERS)
def tail_sums_kernel(
    x, x_stride, dy, dy_stride, mask, statistics, weight, bias, factor, gate, w2, g0, g1, parts, shares,
    preact, preact_stride, dpreact, tickets, N, M, S, STEPS,
    C: tl.constexpr, R: tl.constexpr, ALIGN: tl.constexpr, M_ALIGN: tl.constexpr, CHANNELS_LAST: tl.constexpr,
    WIDE: tl.constexpr, STRATEGY: tl.constexpr, RELU: tl.constexpr, ACT: tl.constexpr, ACT_A: tl.constexpr,
    GATE: tl.constexpr, GATE_A: tl.constexpr,
    SAMPLES: tl.constexpr, CHANNELS: tl.constexpr, POSITIONS: tl.constexpr, REDUCED: tl.constexpr,
    STAGES: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """(T4), (T5), (B3): each tile's parts of g0, g1 and dlogit; and, but for "launches", its share of (B4)."""
    if PDL:
        gdc_launch_dependents()
    M = M * M_ALIGN
    BLOCKS: tl.constexpr = (C + CHANNELS - 1) // CHANNELS
    t, i_n, i_c, i_s, o_n, o_c = tile_of(tl.program_id(0), S, C, SAMPLES, CHANNELS, WIDE)
    n = o_n.to(tl.int64)
    AXIS: tl.constexpr = 1 if CHANNELS_LAST else 2
    SHAPE: tl.constexpr = [SAMPLES, POSITIONS, CHANNELS] if CHANNELS_LAST else [SAMPLES, CHANNELS, POSITIONS]
    mean = over_positions(_vector(statistics, o_c, C, 0.0), CHANNELS_LAST)
    total = tl.zeros(SHAPE, tl.float32)
    centred = tl.zeros(SHAPE, tl.float32)
    for i in tl.range(0, STEPS, num_stages=STAGES):
        p0 = (i_s * STEPS + i) * POSITIONS
        o_p = p0 + tl.arange(0, POSITIONS)
        o = offsets_of(o_c, o_p, M, C, CHANNELS_LAST, WIDE)
        m = inside(o_n, o_c, o_p, N, M, C, CHANNELS_LAST, SAMPLES, CHANNELS)
        b_x = tl.load(x + n[:, None, None] * x_stride * ALIGN + o, mask=m, other=0.0)
        g = load_gradient(
            dy + n[:, None, None] * dy_stride * ALIGN + o, m, mask, o_n, i_c, p0, N, M, C, CHANNELS_LAST, RELU,
            SAMPLES, CHANNELS, POSITIONS, "",
        )  # fmt: skip
        total += g
        centred += g * (b_x.to(tl.float32) - mean)
    m_nc = (o_n < N)[:, None] & (o_c < C)[None, :]
    at = (n[:, None] * S + i_s) * C + o_c[None, :]
    v0 = _branch(factor, tl.sum(total, AXIS), o_n, N)
    v1 = _branch(factor, tl.sum(centred, AXIS), o_n, N) * _vector(statistics + C, o_c, C, 0.0)
    tl.store(g0 + at, v0, mask=m_nc)
    tl.store(g1 + at, v1, mask=m_nc)
    if R > 0:
        b_gate = tl.load(gate + n[:, None] * C + o_c[None, :], mask=m_nc, other=0.0)
        dgate = _vector(weight, o_c, C, 1.0) * v1 + _vector(bias, o_c, C, 0.0) * v0
        dlogit = through_gate(dgate, b_gate, GATE, GATE_A)
        tl.store(parts + at, dlogit, mask=m_nc)
        if STRATEGY != "launches":
            dlogit = tl.where(m_nc, dlogit, 0.0)
            push_dhidden(dlogit, w2, shares, o_n, o_c, t, N, BLOCKS * S, C, R, REDUCED)
        if STRATEGY == "last_block":
            if is_last(tickets, i_n, BLOCKS * S):
                finish_dpreact(shares, dpreact, preact, preact_stride, o_n, N, BLOCKS * S, R, REDUCED, ACT, ACT_A)


# ---------------------------------------------------------------------------------------------------- excite, backward


@triton.jit(do_not_specialize=_INTEGERS)
def tail_excite_backward_kernel(
    g0, g1, parts, shares, dpreact, gate, saved, preact, saved_stride, weight, bias, w1, dpooled, sums,
    dw1, db1, dw2, db2, N, S, T, WEIGHT_TILES,
    C: tl.constexpr, R: tl.constexpr, READY: tl.constexpr, ACT: tl.constexpr, ACT_A: tl.constexpr,
    SAMPLES: tl.constexpr, CHANNELS: tl.constexpr, REDUCED: tl.constexpr, WEIGHT_CHANNELS: tl.constexpr,
    WEIGHT_REDUCED: tl.constexpr, PRECISION: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """In the first WEIGHT_TILES programs (B7); in the others (B4), (B5), (T6) for a block of samples and channels."""
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    if tl.program_id(0) < WEIGHT_TILES:
        if dw1 is not None:
            weight_gradients(
                tl.program_id(0), saved, saved_stride, weight, bias, parts, shares, dpreact, preact, saved_stride,
                dw1, db1, dw2, db2, N, S, T, C, R, READY, ACT, ACT_A,
                SAMPLES, WEIGHT_CHANNELS, WEIGHT_REDUCED, PRECISION,
            )  # fmt: skip
    else:
        BLOCKS: tl.constexpr = (C + CHANNELS - 1) // CHANNELS
        pid = tl.program_id(0) - WEIGHT_TILES
        i_n = pid // BLOCKS
        o_n = i_n * SAMPLES + tl.arange(0, SAMPLES)
        o_c = (pid % BLOCKS) * CHANNELS + tl.arange(0, CHANNELS)
        of_bias = sum_splits(g0, S * C, o_n, o_c, N, S, C, SINGLY)
        of_weight = sum_splits(g1, S * C, o_n, o_c, N, S, C, SINGLY)
        if R > 0:
            v = dpooled_of(
                shares, dpreact, preact, saved_stride, w1, o_n, o_c, N, T, C, R, READY, ACT, ACT_A,
                SAMPLES, CHANNELS, REDUCED, PRECISION,
            )  # fmt: skip
            m_nc = (o_n < N)[:, None] & (o_c < C)[None, :]
            n = o_n.to(tl.int64)[:, None]
            tl.store(dpooled + n * C + o_c[None, :], v, mask=m_nc)
            b_gate = tl.load(gate + n * C + o_c[None, :], mask=m_nc, other=0.0)
            xhat = tl.load(saved + n * saved_stride + o_c[None, :], mask=m_nc, other=0.0)
            of_bias = tl.where(m_nc, b_gate * of_bias + v, 0.0)
            of_weight = tl.where(m_nc, b_gate * of_weight + v * xhat, 0.0)
        at = i_n.to(tl.int64) * (2 * C) + o_c
        tl.store(sums + at, tl.sum(of_weight, 0), mask=o_c < C)
        tl.store(sums + C + at, tl.sum(of_bias, 0), mask=o_c < C)


# ---------------------------------------------------------------------------------------------------- scale, backward


@triton.jit(do_not_specialize=_INTEGERS)
def tail_scale_backward_kernel(
    x, x_stride, dy, dy_stride, dx, dresidual, dx_stride, mask, statistics, weight, factor, gate, dpooled, sums,
    dweight, dbias, N, M, S, STEPS, GROUPS, inv_m, inv_count,
    C: tl.constexpr, R: tl.constexpr, ALIGN: tl.constexpr, M_ALIGN: tl.constexpr, CHANNELS_LAST: tl.constexpr,
    WIDE: tl.constexpr, BATCH: tl.constexpr, RELU: tl.constexpr,
    SAMPLES: tl.constexpr, CHANNELS: tl.constexpr, POSITIONS: tl.constexpr,
    REVERSED: tl.constexpr, EVICT: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """(T6) summed over the groups of samples, and (T7): dx and, where RELU, dresidual. BATCH: the statistics are x's
    own."""
    M = M * M_ALIGN
    pid = tl.program_id(0)
    if REVERSED:
        pid = tl.num_programs(0) - 1 - pid
    _, i_n, i_c, i_s, o_n, o_c = tile_of(pid, S, C, SAMPLES, CHANNELS, WIDE)
    if PDL:
        gdc_wait()
    if sums is not None:
        of_weight = tl.zeros([1, CHANNELS], tl.float32)
        of_bias = tl.zeros([1, CHANNELS], tl.float32)
        for i in tl.range(0, GROUPS, loop_unroll_factor=4):
            at = sums + i * (2 * C)
            of_weight += _vector(at, o_c, C, 0.0)
            of_bias += _vector(at + C, o_c, C, 0.0)
        if i_n == 0:
            if i_s == 0:
                if dweight is not None:
                    tl.store(dweight + o_c[None, :], of_weight, mask=o_c[None, :] < C)
                if dbias is not None:
                    tl.store(dbias + o_c[None, :], of_bias, mask=o_c[None, :] < C)
    if dx is not None:
        m_nc = (o_n < N)[:, None] & (o_c < C)[None, :]
        at_nc = o_n.to(tl.int64)[:, None] * C + o_c[None, :]
        mean, rstd = _vector(statistics, o_c, C, 0.0), _vector(statistics + C, o_c, C, 0.0)
        slope = _vector(weight, o_c, C, 1.0) * rstd
        b_gate = tl.full([1, CHANNELS], 1.0, tl.float32)
        shift = tl.zeros([1, CHANNELS], tl.float32)
        if R > 0:
            b_gate = tl.load(gate + at_nc, mask=m_nc, other=0.0)
            shift = tl.load(dpooled + at_nc, mask=m_nc, other=0.0) * inv_m
        of_x = rstd
        if BATCH:
            of_x = -slope * rstd * (of_weight * inv_count)
            shift = shift - of_bias * inv_count
        scale_backward_tile(
            x, x_stride, dy, dy_stride, dx, dresidual, dx_stride, mask, _branch(factor, b_gate, o_n, N) * slope,
            slope * shift, mean, of_x, "slope" if BATCH else "none", o_n, o_c, i_c, i_s, N, M, STEPS,
            C, ALIGN, CHANNELS_LAST, WIDE, RELU, SAMPLES, CHANNELS, POSITIONS, REVERSED, EVICT,
        )  # fmt: skip
    else:
        scale_backward_tile(
            x, x_stride, dy, dy_stride, None, dresidual, dx_stride, mask, None, None, None, None, "none",
            o_n, o_c, i_c, i_s, N, M, STEPS,
            C, ALIGN, CHANNELS_LAST, WIDE, RELU, SAMPLES, CHANNELS, POSITIONS, REVERSED, EVICT,
        )  # fmt: skip
