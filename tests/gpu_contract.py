"""What every backend of GPU kernels has to hold to, whichever it is: cases, and tests that take them.

A test module of a backend imports the tests from here and has two fixtures: `backend_name`, and `run`, a function
(case, inputs) -> results that also proves that the backend's kernels ran. Without a GPU the kernels run on CPU tensors,
and shapes are small.
"""

from __future__ import annotations

import itertools
import math

import oracle
import pytest
import torch
from layer_operator import Forward
from oracle import ACTS, GATES, SQUEEZES, Case, check, draw

import senet_fused

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
inf, nan = math.inf, math.nan
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
DENSE = ("contiguous", "channels_last")
VENUES = list(itertools.product(DTYPES, DENSE))
STRATEGIES = ("partials", "last_block", "launches")


def name_of(value: object) -> str | None:
    if isinstance(value, torch.dtype):
        return str(value).removeprefix("torch.")
    if isinstance(value, tuple):
        return "x".join(map(str, value))
    return str(value) if isinstance(value, Case) else None


def on_device(t: torch.Tensor) -> torch.Tensor:
    """As :func:`oracle.moved`, on the device of all these tests."""
    return oracle.moved(t, DEVICE)


OPTION_SHAPES = (((3, 40, 5, 7), 20), ((2, 56, 7, 7), 21), ((2, 33, 4, 4), 9), ((4, 16, 3, 13), 18))
TAILS = list(itertools.product(SQUEEZES, (None, "relu"), (False, True)))


def option_cases(act: str) -> list[tuple[Case, str]]:
    """Every squeeze, post_act and residual with this act; gates, dtypes, layouts and strategies take turns."""
    a = ACTS.index(act)
    cases = []
    for k, (squeeze, post_act, residual) in enumerate(TAILS):
        dtype, layout = VENUES[(a + k) % len(VENUES)]
        shape, reduced = OPTION_SHAPES[(a + k // 2) % len(OPTION_SHAPES)]
        case = Case(shape, reduced, dtype, layout, act, GATES[(a + k // 4) % 6], squeeze, post_act, residual)
        case = case.replace(bias=k % 3 != 0, through="both" if k % 2 else "y")
        cases.append((case, STRATEGIES[(a + k) % 3] if squeeze == "avg" else "launches"))
    return cases


def test_options_meet_every_dtype_layout_and_strategy():
    cases = [case for act in ACTS for case in option_cases(act)]
    for option, values in {"squeeze": SQUEEZES, "post_act": (None, "relu"), "residual": (False, True)}.items():
        met = {(getattr(case, option), case.dtype, case.layout) for case, _ in cases}
        assert met == set(itertools.product(values, DTYPES, DENSE))
    for option, values in {"act": ACTS, "gate": GATES}.items():
        assert {getattr(case, option) for case, _ in cases} == set(values)


# Tiles of every kind: pixels; planes that are aligned; planes that break alignment.
KINDS = {
    "channels_last": Case((3, 40, 6, 7), 10, torch.bfloat16, "channels_last"),
    "planes": Case((2, 40, 6, 7), 10, torch.float32),
    "planes of 16-bit pieces": Case((2, 40, 5, 5), 10, torch.float16, post_act="relu"),
    "planes of 49": Case((3, 64, 7, 7), 8, torch.bfloat16),
}


# ---------------------------------------------------------------------------------------------------- shapes

SENET154 = [((1, 256, 56, 56), 16), ((1, 512, 28, 28), 32), ((1, 1024, 14, 14), 64), ((1, 2048, 7, 7), 128)]
SMALL = [
    ((3, 24, 7, 9), 4),
    ((2, 72, 7, 7), 24),
    ((3, 40, 14, 14), 10),
    ((2, 272, 3, 3), 68),
    ((5, 13, 11, 13), 1),
    ((3, 96, 1, 1), 24),
    ((4, 8, 1, 7), 3),
    ((1, 1, 1, 1), 1),
    ((3, 1, 5, 5), 2),
    ((17, 7, 2, 2), 2),
    ((1, 50, 8, 8), 12),
    ((2, 17, 33, 31), 16),
    ((2, 24, 50), 6),
    ((5, 31, 1), 8),
    ((3, 16, 1025), 4),
    ((2, 12, 3, 5, 7), 3),
    ((3, 20, 2, 4, 4), 5),
]
PLAIN: dict[str, object] = {}
EVERYTHING = {"act": "silu", "squeeze": "avgmax", "post_act": "relu", "residual": True, "through": "both"}


@pytest.mark.sizes
@pytest.mark.parametrize("layout", DENSE)
@pytest.mark.parametrize("dtype", DTYPES if DEVICE == "cuda" else DTYPES[:2], ids=name_of)
@pytest.mark.parametrize(("shape", "reduced"), SENET154, ids=name_of)
def test_senet154_shapes(run, shape, reduced, dtype, layout):
    """On a GPU at batch 64."""
    options = EVERYTHING if (dtype == torch.bfloat16) == (layout == "contiguous") else PLAIN
    if DEVICE == "cuda":
        shape = (64, *shape[1:])
    check(Case(shape, reduced, dtype, layout, **options), draws=1, ours=run)


@pytest.mark.parametrize(("dtype", "layout"), VENUES, ids=name_of)
@pytest.mark.parametrize(("shape", "reduced"), SMALL, ids=name_of)
def test_shapes(run, shape, reduced, dtype, layout):
    every = (PLAIN, EVERYTHING, {"post_act": "relu", "bias": False, "residual": True})
    options = every[(sum(shape) + VENUES.index((dtype, layout))) % 3]
    check(Case(shape, reduced, dtype, layout, **options), draws=1, ours=run)


@pytest.mark.parametrize("layout", sorted(set(oracle.LAYOUTS) - set(DENSE)))
@pytest.mark.parametrize("dtype", DTYPES[:2], ids=name_of)
def test_layouts(run, dtype, layout):
    """Slices and expansions of every kind, for x, residual and dy alike."""
    for shape, options in (((4, 24, 5, 6), EVERYTHING), ((3, 16, 7, 7), PLAIN), ((3, 16, 4, 4), {"residual": True})):
        check(Case(shape, 4, dtype, layout, **options), draws=1, ours=run)


@pytest.mark.core
@pytest.mark.parametrize("layout", DENSE)
def test_layouts_that_differ(run, layout):
    other = DENSE[1 - DENSE.index(layout)]
    case = Case((3, 24, 4, 6), 4, torch.float32, layout, post_act="relu", residual=True)
    check(case.replace(dy_layout=other, residual_layout=other), draws=2, ours=run)


@pytest.mark.parametrize("others", [("w1", "b2"), ("w2",), ("b1",), ("residual",), ("w1", "w2", "b1", "b2")], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
def test_dtypes_that_differ(run, dtype, others):
    wider = torch.float32 if dtype != torch.float32 else torch.bfloat16
    case = Case((3, 24, 4, 6), 4, dtype, residual=True, others=tuple((name, wider) for name in others))
    check(case, draws=2, ours=run)


@pytest.mark.core
@pytest.mark.parametrize(("dtype", "layout"), VENUES, ids=name_of)
def test_an_empty_batch(run, dtype, layout):
    case = Case((0, 24, 4, 6), 4, dtype, layout, **EVERYTHING)
    results = run(case, draw(case, 0))
    assert results["y"].shape == case.shape
    for name in ("dw1", "db1", "dw2", "db2"):
        assert not results[name].any(), name


@pytest.mark.sizes
@pytest.mark.parametrize("layout", DENSE)
@pytest.mark.parametrize("positions", [5_000, 2**15 + 5])
def test_long_sums_lose_no_digits(run, positions, layout):
    def positive(t: oracle.Tensors) -> None:
        t["x"].abs_().add_(1.0)

    check(Case((1, 3, positions), 2, layout=layout), draws=1, ours=run, change=positive)


# ---------------------------------------------------------------------------------------------------- odd values


@pytest.mark.parametrize("squeeze", SQUEEZES)
@pytest.mark.parametrize("value", [nan, inf, -inf])
@pytest.mark.parametrize("case", KINDS.values(), ids=str)
def test_values_that_are_not_finite_stay_where_they_belong(run, case, value, squeeze):
    """As in plain PyTorch: which elements of y, gate and dx are NaN or infinite, and the values of all others."""
    case = case.replace(squeeze=squeeze, post_act=None)
    inputs = draw(case, 0)
    inputs["x"][1, 3, 2, 1] = value
    inputs["w1"][:, 3] = 0.0  # 0 * inf is NaN, 0 * 1 is not: the gate of sample 1 alone knows
    for t in inputs.values():
        t.nan_to_num_(nan=value, posinf=value, neginf=value)
    exact = oracle.run(oracle.layer, case, inputs, torch.float64)
    found = run(case, inputs)
    for name in ("y", "gate", "dx"):
        a, e = found[name].double(), exact[name]
        assert torch.equal(a.isnan(), e.isnan()), name
        assert torch.equal(a.isinf(), e.isinf()), name
        finite = e.isfinite()
        torch.testing.assert_close(a[finite], e[finite], rtol=0.02, atol=0.02)


@pytest.mark.parametrize("squeeze", ["max", "avgmax"])
@pytest.mark.parametrize("layout", DENSE)
def test_ties_share_the_gradient_evenly(run, layout, squeeze):
    case = Case((3, 24, 6, 7), 4, torch.float32, layout, squeeze=squeeze)

    def tie(t: oracle.Tensors) -> None:
        t["x"].mul_(2).round_().clamp_(-1, 1)
        t["x"][0] = 0.0

    check(case, draws=2, ours=run, change=tie)


@pytest.mark.core
@pytest.mark.parametrize("layout", DENSE)
def test_the_mask_of_the_relu(backend_name, layout):
    """Zeros are stopped, NaN passes, and padding bits are zero."""
    c, m = (13, 21) if layout == "contiguous" else (21, 13)
    residual = torch.zeros(2, c, m)
    residual[0, 1, 2], residual[1, 2, 3], residual[1, 3, 4] = 1.0, nan, -1.0
    x, residual = (on_device(oracle.LAYOUTS[layout](t)) for t in (torch.zeros(2, c, m), residual))
    w1, w2 = torch.zeros(2, c, device=DEVICE), torch.zeros(c, 2, device=DEVICE)
    *_, mask = Forward(backend_name)(x, w1, None, w2, None, residual, "relu", "sigmoid", "avg", "relu", True)
    assert mask.sum() == (2**2 + 2**3 if layout == "contiguous" else 2**1 + 2**2)
    assert (mask != 0).sum() == 2


# ---------------------------------------------------------------------------------------------------- functions


@pytest.mark.parametrize("act", ACTS)
def test_act_over_its_whole_range(run, act):
    """One channel, whose pooled value is the argument: act and its derivative from -1e12 to 1e12."""
    v = torch.cat([torch.linspace(-30, 30, 61), torch.tensor([-1e12, -1e5, -100.0, 100.0, 1e5, 1e12])])
    case = Case((len(v), 1, 1), 1, act=act, gate="identity", bias=False, through="gate")
    one = torch.ones(1, 1)
    inputs = {"x": v.reshape(-1, 1, 1), "w1": one, "w2": one, "dy": v.reshape(-1, 1, 1), "dgate": torch.ones(len(v), 1)}
    exact, found = oracle.exact_results(case, inputs), run(case, inputs)
    for name in ("gate", "dx"):
        e, f = exact[name].flatten(), found[name].double().flatten()
        torch.testing.assert_close(f[:61], e[:61], rtol=2e-6, atol=4e-7)
        torch.testing.assert_close(f[61:], e[61:], rtol=2e-6, atol=4e-7)


@pytest.mark.parametrize("gate", GATES)
def test_gate_over_its_whole_range(run, gate):
    v = torch.cat([torch.linspace(-30, 30, 61), torch.tensor([-1e30, -100.0, 100.0, 1e30])])
    case = Case((len(v), 1, 1), 1, act="identity", gate=gate, bias=False, through="gate")
    one = torch.ones(1, 1)
    inputs = {"x": v.reshape(-1, 1, 1), "w1": one, "w2": one, "dy": v.reshape(-1, 1, 1), "dgate": torch.ones(len(v), 1)}
    exact, found = oracle.exact_results(case, inputs), run(case, inputs)
    for name in ("gate", "dx"):
        torch.testing.assert_close(found[name].double(), exact[name], rtol=2e-6, atol=4e-7)


# ---------------------------------------------------------------------------------------------------- large tensors


@pytest.mark.sizes
@pytest.mark.skipif(DEVICE == "cuda", reason="it reaches through 4 GiB that only the CPU maps without using them")
@pytest.mark.parametrize("layout", DENSE)
def test_samples_that_lie_more_than_32_bits_apart(backend_name, layout):
    """Two samples of a batch whose stride is 2^31 elements and more: offsets have 64 bits."""
    stride = 2**31 + 64
    storage = torch.empty(0, dtype=torch.bfloat16).set_(torch.UntypedStorage(2 * (stride + 16 * 6)))
    inner = (6, 1) if layout == "contiguous" else (1, 16)
    x = storage.as_strided((2, 16, 6), (stride, *inner))
    torch.manual_seed(0)
    values = torch.randn(2, 16, 6, dtype=torch.bfloat16)
    x.copy_(values)
    weights = torch.randn(4, 16, dtype=torch.bfloat16), torch.randn(16, 4, dtype=torch.bfloat16)
    expected = senet_fused.squeeze_excite(
        values if layout == "contiguous" else oracle.LAYOUTS[layout](values), *weights, backend=backend_name
    )
    assert torch.equal(senet_fused.squeeze_excite(x, *weights, backend=backend_name), expected)
    dy = torch.randn(2, 16, 6, dtype=torch.bfloat16)
    far, near = (t.detach().requires_grad_() for t in (x, oracle.LAYOUTS[layout](values)))
    for t in (far, near):
        w = [weight.clone().requires_grad_() for weight in weights]
        y = senet_fused.squeeze_excite(t, *w, backend=backend_name)
        y.backward(oracle.LAYOUTS[layout](dy))
        found = [t.grad, *(weight.grad for weight in w)]
        if t is far:
            first = found
    assert all(torch.equal(a, b) for a, b in zip(first, found, strict=True))
