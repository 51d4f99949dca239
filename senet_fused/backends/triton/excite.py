"""The excitation and its backward on blocks of [samples, channels], for the kernels of every strategy.

Shares are the parts of w1 @ pooled (or of dlogit @ w2) that single tiles contribute: [N, T, R] with T tiles a sample.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .elementwise import apply, through_act

__all__ = [
    "SINGLY", "SUM_BLOCK", "dpooled_of", "finish_dpreact", "finish_preact", "gate_of", "is_last", "load_w1", "load_w2",
    "push_dhidden", "push_preact", "sum_splits", "times", "times_transposed", "weight_gradients",
]  # fmt: skip

# How many shares or splits are read as one block, and summed as a tree. Larger tiles have no registers for that: they
# read them singly, eight under way at a time.
SUM_BLOCK = tl.constexpr(8)
SINGLY = tl.constexpr(1)


@triton.jit
def sum_splits(v, v_stride, o_n, o_c, N, S, C: tl.constexpr, BLOCK: tl.constexpr):
    """sum_s v[n, s, c], in blocks of BLOCK splits: [samples, channels]. v_stride: from sample to sample."""
    total = tl.zeros([o_n.shape[0], o_c.shape[0]], tl.float32)
    m = (o_n < N)[:, None, None] & (o_c < C)[None, None, :]
    for s0 in tl.range(0, S, BLOCK, loop_unroll_factor=8 // BLOCK):
        o_s = s0 + tl.arange(0, BLOCK)
        row = o_n.to(tl.int64)[:, None, None] * v_stride + o_s[None, :, None] * C
        b = tl.load(v + row + o_c[None, None, :], mask=m & (o_s < S)[None, :, None], other=0.0)
        total += tl.sum(b, 1)
    return total


@triton.jit
def preact_of(
    shares, preact, preact_stride, b1, o_n, o_r, N, T, R: tl.constexpr, READY: tl.constexpr, BLOCK: tl.constexpr
):
    """(E2) before act: read where it is ready, else the sum of the shares and the bias."""
    if READY:
        m = (o_n < N)[:, None] & (o_r < R)[None, :]
        v = tl.load(preact + o_n.to(tl.int64)[:, None] * preact_stride + o_r[None, :], mask=m, other=0.0)
    else:
        v = sum_splits(shares, T * R, o_n, o_r, N, T, R, BLOCK)
        if b1 is not None:
            v += tl.load(b1 + o_r, mask=o_r < R, other=0.0).to(tl.float32)[None, :]
    return v


@triton.jit
def dpreact_of(
    shares, dpreact, preact, preact_stride, o_n, o_r, N, T, R: tl.constexpr, READY: tl.constexpr,
    ACT: tl.constexpr, ACT_A: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """(B4): read where it is ready, else the sum of the shares times act'."""
    m = (o_n < N)[:, None] & (o_r < R)[None, :]
    n = o_n.to(tl.int64)[:, None]
    if READY:
        v = tl.load(dpreact + n * R + o_r[None, :], mask=m, other=0.0)
    else:
        at = tl.load(preact + n * preact_stride + o_r[None, :], mask=m, other=0.0)
        v = through_act(sum_splits(shares, T * R, o_n, o_r, N, T, R, BLOCK), at, ACT, ACT_A)
    return v


@triton.jit
def load_w1(w1, o_r, o_c, C: tl.constexpr, R: tl.constexpr):
    """w1[r, c] as [squeezed channels, channels]."""
    m = (o_r < R)[:, None] & (o_c < C)[None, :]
    return tl.load(w1 + o_r[:, None] * C + o_c[None, :], mask=m, other=0.0).to(tl.float32)


@triton.jit
def load_w2(w2, o_c, o_r, C: tl.constexpr, R: tl.constexpr):
    """w2[c, r] as [channels, squeezed channels]."""
    m = (o_c < C)[:, None] & (o_r < R)[None, :]
    return tl.load(w2 + o_c[:, None] * R + o_r[None, :], mask=m, other=0.0).to(tl.float32)


@triton.jit
def times_transposed(a, b, PRECISION: tl.constexpr):
    """a [I, K] @ b [J, K]^T; few rows are summed directly, many by tl.dot."""
    if PRECISION == "direct":
        product = tl.sum(a[:, None, :] * b[None, :, :], 2)
    else:
        product = tl.dot(a, tl.trans(b), input_precision=PRECISION)
    return product


@triton.jit
def times(a, b, PRECISION: tl.constexpr):
    """a [I, K] @ b [K, J]."""
    if PRECISION == "direct":
        product = tl.sum(a[:, :, None] * b[None, :, :], 1)
    else:
        product = tl.dot(a, b, input_precision=PRECISION)
    return product


@triton.jit
def push_preact(
    pooled, w1, shares, o_n, o_c, t, N, T, C: tl.constexpr, R: tl.constexpr, REDUCED: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """A tile pushes its share of w1 @ pooled (E2): shares[n, t, :]."""
    row = (o_n.to(tl.int64)[:, None] * T + t) * R
    for r0 in range(0, R, REDUCED):
        o_r = r0 + tl.arange(0, REDUCED)
        share = times_transposed(pooled, load_w1(w1, o_r, o_c, C, R), PRECISION)
        tl.store(shares + row + o_r[None, :], share, mask=(o_n < N)[:, None] & (o_r < R)[None, :])


@triton.jit
def push_dhidden(dlogit, w2, shares, o_n, o_c, t, N, T, C: tl.constexpr, R: tl.constexpr, REDUCED: tl.constexpr):
    """A sweep's tile pushes its share of dlogit @ w2 (B4): shares[n, t, :]."""
    row = (o_n.to(tl.int64)[:, None] * T + t) * R
    for r0 in range(0, R, REDUCED):
        o_r = r0 + tl.arange(0, REDUCED)
        share = times(dlogit, load_w2(w2, o_c, o_r, C, R), "direct")
        tl.store(shares + row + o_r[None, :], share, mask=(o_n < N)[:, None] & (o_r < R)[None, :])


@triton.jit
def is_last(tickets, i, COUNT):
    """Whether this program is the last of COUNT to come here with ticket i; what the others stored before is then
    visible. The ticket is at zero before the first and after the last."""
    tl.debug_barrier()  # all of this program's stores are done before its ticket is drawn
    last = tl.atomic_add(tickets + i, 1, sem="acq_rel", scope="gpu") == COUNT - 1
    if last:
        tl.store(tickets + i, 0)
    return last


@triton.jit
def finish_preact(shares, preact, preact_stride, b1, o_n, N, T, R: tl.constexpr, REDUCED: tl.constexpr):
    """(E2) for a group of samples, by the last of their tiles."""
    for r0 in range(0, R, REDUCED):
        o_r = r0 + tl.arange(0, REDUCED)
        v = preact_of(shares, preact, preact_stride, b1, o_n, o_r, N, T, R, False, SUM_BLOCK)
        m_nr = (o_n < N)[:, None] & (o_r < R)[None, :]
        tl.store(preact + o_n.to(tl.int64)[:, None] * preact_stride + o_r[None, :], v, mask=m_nr)


@triton.jit
def finish_dpreact(
    shares, dpreact, preact, preact_stride, o_n, N, T, R: tl.constexpr, REDUCED: tl.constexpr,
    ACT: tl.constexpr, ACT_A: tl.constexpr,
):  # fmt: skip
    """(B4) for a group of samples, by the last of their tiles."""
    for r0 in range(0, R, REDUCED):
        o_r = r0 + tl.arange(0, REDUCED)
        v = dpreact_of(shares, dpreact, preact, preact_stride, o_n, o_r, N, T, R, False, ACT, ACT_A, SUM_BLOCK)
        m_nr = (o_n < N)[:, None] & (o_r < R)[None, :]
        tl.store(dpreact + o_n.to(tl.int64)[:, None] * R + o_r[None, :], v, mask=m_nr)


@triton.jit
def gate_of(
    shares, preact, preact_stride, b1, w2, b2, o_n, o_c, N, T, write_preact, C: tl.constexpr, R: tl.constexpr,
    READY: tl.constexpr, SAVE_PREACT: tl.constexpr, ACT: tl.constexpr, ACT_A: tl.constexpr,
    GATE: tl.constexpr, GATE_A: tl.constexpr, GATE_B: tl.constexpr,
    SAMPLES: tl.constexpr, CHANNELS: tl.constexpr, REDUCED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """(E2), (E3) for a block of samples and channels; also keeps preact, in the program that is to."""
    BLOCK: tl.constexpr = SUM_BLOCK if PRECISION == "direct" else SINGLY
    logit = tl.zeros([SAMPLES, CHANNELS], tl.float32)
    if b2 is not None:
        logit += tl.load(b2 + o_c, mask=o_c < C, other=0.0).to(tl.float32)[None, :]
    for r0 in range(0, R, REDUCED):
        o_r = r0 + tl.arange(0, REDUCED)
        w = load_w2(w2, o_c, o_r, C, R)
        v = preact_of(shares, preact, preact_stride, b1, o_n, o_r, N, T, R, READY, BLOCK)
        if SAVE_PREACT:
            if write_preact:
                m = (o_n < N)[:, None] & (o_r < R)[None, :]
                tl.store(preact + o_n.to(tl.int64)[:, None] * preact_stride + o_r[None, :], v, mask=m)
        logit += times_transposed(apply(v, ACT, ACT_A, 0.0), w, PRECISION)
    return apply(logit, GATE, GATE_A, GATE_B)


@triton.jit
def dpooled_of(
    shares, dpreact, preact, preact_stride, w1, o_n, o_c, N, T, C: tl.constexpr, R: tl.constexpr,
    READY: tl.constexpr, ACT: tl.constexpr, ACT_A: tl.constexpr,
    SAMPLES: tl.constexpr, CHANNELS: tl.constexpr, REDUCED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """(B4), (B5) for a block of samples and channels."""
    BLOCK: tl.constexpr = SUM_BLOCK if PRECISION == "direct" else SINGLY
    total = tl.zeros([SAMPLES, CHANNELS], tl.float32)
    for r0 in range(0, R, REDUCED):
        o_r = r0 + tl.arange(0, REDUCED)
        w = load_w1(w1, o_r, o_c, C, R)
        v = dpreact_of(shares, dpreact, preact, preact_stride, o_n, o_r, N, T, R, READY, ACT, ACT_A, BLOCK)
        total += times(v, w, PRECISION)
    return total


@triton.jit
def weight_gradients(
    i, pooled, pooled_stride, slope, offset, dlogit, shares, dpreact, preact, preact_stride, dw1, db1, dw2, db2,
    N, S, T,
    C: tl.constexpr, R: tl.constexpr, READY: tl.constexpr, ACT: tl.constexpr, ACT_A: tl.constexpr,
    SAMPLES: tl.constexpr, CHANNELS: tl.constexpr, REDUCED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """(B7) for the i-th block of channels and squeezed channels, summed over all samples in their order. slope, offset:
    [C] or None, what to do to pooled first."""
    i_c = i // ((R + REDUCED - 1) // REDUCED)
    i_r = i % ((R + REDUCED - 1) // REDUCED)
    o_c = i_c * CHANNELS + tl.arange(0, CHANNELS)
    o_r = i_r * REDUCED + tl.arange(0, REDUCED)
    d1 = tl.zeros([REDUCED, CHANNELS], tl.float32)
    d2 = tl.zeros([CHANNELS, REDUCED], tl.float32)
    s1 = tl.zeros([REDUCED], tl.float32)
    s2 = tl.zeros([CHANNELS], tl.float32)
    for n0 in range(0, N, SAMPLES):
        o_n = n0 + tl.arange(0, SAMPLES)
        n = o_n.to(tl.int64)[:, None]
        m_c = (o_n < N)[:, None] & (o_c < C)[None, :]
        m_r = (o_n < N)[:, None] & (o_r < R)[None, :]
        b_pooled = tl.load(pooled + n * pooled_stride + o_c[None, :], mask=m_c, other=0.0)
        if slope is not None:
            b_pooled *= tl.load(slope + o_c, mask=o_c < C, other=0.0).to(tl.float32)[None, :]
        if offset is not None:
            b_pooled += tl.load(offset + o_c, mask=o_c < C, other=0.0).to(tl.float32)[None, :]
        b_dlogit = sum_splits(dlogit, S * C, o_n, o_c, N, S, C, SINGLY)
        at = tl.load(preact + n * preact_stride + o_r[None, :], mask=m_r, other=0.0)
        b_dpreact = dpreact_of(shares, dpreact, preact, preact_stride, o_n, o_r, N, T, R, READY, ACT, ACT_A, SINGLY)
        # A sample that does not exist has dpreact = dlogit = 0, but not hidden = 0.
        hidden = tl.where(m_r, apply(at, ACT, ACT_A, 0.0), 0.0)
        d1 += tl.dot(tl.trans(b_dpreact), b_pooled, input_precision=PRECISION)
        d2 += tl.dot(tl.trans(b_dlogit), hidden, input_precision=PRECISION)
        s1 += tl.sum(b_dpreact, 0)
        s2 += tl.sum(b_dlogit, 0)
    m_c = o_c < C
    m_r = o_r < R
    tl.store(dw1 + o_r[:, None] * C + o_c[None, :], d1, mask=m_r[:, None] & m_c[None, :])
    tl.store(dw2 + o_c[:, None] * R + o_r[None, :], d2, mask=m_c[:, None] & m_r[None, :])
    if db1 is not None:
        if i_c == 0:
            tl.store(db1 + o_r, s1, mask=m_r)
    if db2 is not None:
        if i_r == 0:
            tl.store(db2 + o_c, s2, mask=m_c)
