"""The C++ kernels against the float64 oracle on whatever hypothesis draws: shapes, strides, dtypes, options."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import ACTS, DTYPES, GATES, LAYOUTS, SQUEEZES, Case, check, draw, fused, layer, run, run_counted

from senet_fused.backends import native

pytestmark = pytest.mark.skipif(native.problem() is not None, reason=str(native.problem()))

sizes = st.integers(1, 20)
spatial = st.one_of(st.tuples(st.integers(1, 200)), st.tuples(sizes, sizes), st.tuples(*(st.integers(1, 7),) * 3))
weight_dtypes = st.dictionaries(
    st.sampled_from(("w1", "b1", "w2", "b2", "residual")), st.sampled_from(DTYPES), max_size=3
)


@st.composite
def cases(choose: st.DrawFn) -> Case:
    """Any call, up to 30 000 elements."""
    n, c, positions = choose(st.integers(1, 9)), choose(st.integers(1, 90)), choose(spatial)
    while n * c * math.prod(positions) > 30_000:
        n, c = max(1, n // 2), max(1, c // 2)
    layout = st.sampled_from(sorted(LAYOUTS))
    return Case(
        shape=(n, c, *positions),
        reduced=choose(st.integers(1, 40)),
        dtype=choose(st.sampled_from(DTYPES)),
        layout=choose(layout),
        act=choose(st.sampled_from(ACTS)),
        gate=choose(st.sampled_from(GATES)),
        squeeze=choose(st.sampled_from(SQUEEZES)),
        post_act=choose(st.sampled_from((None, "relu"))),
        residual=choose(st.booleans()),
        bias=choose(st.booleans()),
        through=choose(st.sampled_from(("y", "gate", "both"))),
        dy_layout=choose(st.none() | layout),
        residual_layout=choose(st.none() | layout),
        others=tuple(sorted(choose(st.just({}) | weight_dtypes).items(), key=str)),
    )


@settings(max_examples=80)
@given(case=cases(), threads=st.integers(1, 4))
def test_any_call(case, threads):
    torch.set_num_threads(threads)
    check(case, draws=max(2, min(16, 4_000 // math.prod(case.shape))))


@settings(max_examples=40)
@given(case=cases(), threads=st.integers(1, 4))
def test_y_has_the_strides_of_eager(case, threads):
    torch.set_num_threads(threads)
    case = case.replace(residual=False)
    if min(case.shape) == 1:
        case = case.replace(shape=tuple(size + 1 for size in case.shape))
    inputs = draw(case, 0)
    y, _ = fused(case, inputs)
    stock, _ = layer(case.replace(post_act=None), {k: t.to(case.dtype) for k, t in inputs.items()})
    assert y.shape == stock.shape and y.stride() == stock.stride()


@settings(max_examples=40)
@given(case=cases(), threads=st.integers(2, 4), data=st.data())
def test_bits_depend_on_the_sample_alone(case, threads, data):
    """One sample of a batch, alone and on one thread: the same y, gate and dx."""
    case = case.replace(layout="contiguous", dy_layout=None, residual_layout=None)
    inputs = draw(case, 0)
    torch.set_num_threads(threads)
    batch = run_counted(case, inputs)
    i = data.draw(st.integers(0, case.shape[0] - 1))
    torch.set_num_threads(1)
    of_samples = ("x", "residual", "dy", "dgate")
    alone = run(fused, case, {k: t[i : i + 1] if k in of_samples else t for k, t in inputs.items()})
    for name in ("y", "gate", "dx"):
        assert torch.equal(alone[name], batch[name][i : i + 1]), name
