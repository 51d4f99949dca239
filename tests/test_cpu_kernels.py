"""The C++ kernels, forward and backward, against the float64 oracle: options, shapes, layouts, dtypes, odd values.

All fresh memory is NaN here, so that whatever a kernel fails to write shows up as wrong.
"""

from __future__ import annotations

import itertools
import math

import oracle
import pytest
import torch
from layer_operator import Backward, Forward
from oracle import ACTS, DTYPES, GATES, LAYOUTS, SQUEEZES, Case, check, draw, run, run_counted

import senet_fused
from senet_fused import machine, ops, squeeze_excite
from senet_fused.backends import native
from senet_fused.ops import define, empty_mask
from senet_fused.ops.layout import is_channels_last

pytestmark = [
    pytest.mark.skipif(native.problem() is not None, reason=str(native.problem())),
    pytest.mark.usefixtures("poisoned"),
]
inf, nan = math.inf, math.nan
DENSE = ("contiguous", "channels_last")
VENUES = list(itertools.product(DTYPES, DENSE))


def name_of(value: object) -> str | None:
    """Ids for parameters that pytest would number."""
    if isinstance(value, torch.dtype):
        return str(value).removeprefix("torch.")
    if isinstance(value, tuple):
        return "x".join(map(str, value))
    return str(value) if isinstance(value, Case) else None


def test_fresh_memory_is_poisoned():
    x = torch.ones(2, 3, 4, 4).to(memory_format=torch.channels_last)
    for t in (torch.empty(5), torch.empty_like(x), x.new_empty((3,), dtype=torch.float64)):
        assert t.isnan().all()
    assert (x.new_empty((3,), dtype=torch.uint8) == 255).all()


# ---------------------------------------------------------------------------------------------------- options

OPTION_SHAPES = (((6, 40, 5, 7), 20), ((5, 56, 7, 7), 21), ((7, 33, 4, 4), 19), ((8, 41, 3, 13), 18))
TAILS = list(itertools.product(SQUEEZES, (None, "relu"), (False, True)))


def option_cases(act: str, gate: str) -> list[Case]:
    """Every squeeze, post_act and residual with this act and gate; dtypes, layouts and the rest take turns."""
    a, g = ACTS.index(act), GATES.index(gate)
    cases = []
    for k, (squeeze, post_act, residual) in enumerate(TAILS):
        dtype, layout = VENUES[(a + g + k) % len(VENUES)]
        shape, reduced = OPTION_SHAPES[(a + k // 2) % len(OPTION_SHAPES)]
        case = Case(shape, reduced, dtype, layout, act, gate, squeeze, post_act, residual)
        cases.append(case.replace(bias=k % 3 != 0, through="both" if k % 2 else "y"))
    return cases


def test_options_meet_every_dtype_and_layout():
    cases = [case for act in ACTS for gate in GATES for case in option_cases(act, gate)]
    options = {"act": ACTS, "gate": GATES, "squeeze": SQUEEZES, "post_act": (None, "relu"), "residual": (False, True)}
    for option, values in options.items():
        met = {(getattr(case, option), case.dtype, case.layout) for case in cases}
        assert met == set(itertools.product(values, DTYPES, DENSE))


@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("act", ACTS)
def test_options(act, gate):
    for case in option_cases(act, gate):
        check(case, draws=3)


# ---------------------------------------------------------------------------------------------------- shapes

PLAIN: dict[str, object] = {}
EVERYTHING = {"act": "silu", "squeeze": "avgmax", "post_act": "relu", "residual": True, "through": "both"}
SENET154 = [((2, 256, 56, 56), 16), ((2, 512, 28, 28), 32), ((2, 1024, 14, 14), 64), ((2, 2048, 7, 7), 128)]
SMALL = [
    ((3, 24, 7, 9), 4),
    ((2, 72, 7, 7), 24),
    ((3, 40, 14, 14), 10),
    ((2, 1232, 3, 3), 308),
    ((5, 13, 11, 13), 1),
    ((3, 96, 1, 1), 24),
    ((4, 8, 1, 7), 3),
    ((1, 1, 1, 1), 1),
    ((3, 1, 5, 5), 2),
    ((17, 7, 2, 2), 2),
    ((1, 50, 8, 8), 12),
    ((4, 17, 33, 31), 16),
    ((2, 33, 8, 128), 17),
    ((2, 24, 50), 6),
    ((5, 31, 1), 8),
    ((3, 16, 1025), 4),
    ((2, 12, 3, 5, 7), 3),
    ((3, 20, 2, 4, 4), 5),
]


@pytest.mark.parametrize(("dtype", "layout"), VENUES, ids=name_of)
@pytest.mark.parametrize(("shape", "reduced"), SENET154, ids=name_of)
def test_senet154_shapes(shape, reduced, dtype, layout):
    options = EVERYTHING if (dtype in DTYPES[:2]) == (layout == "channels_last") else PLAIN
    check(Case(shape, reduced, dtype, layout, **options), draws=1)


@pytest.mark.parametrize(("dtype", "layout"), VENUES, ids=name_of)
@pytest.mark.parametrize(("shape", "reduced"), SMALL, ids=name_of)
def test_shapes(shape, reduced, dtype, layout):
    draws = max(2, min(32, 20_000 // math.prod(shape)))
    for options in (PLAIN, EVERYTHING, {**EVERYTHING, "squeeze": "max", "act": "relu", "bias": False}):
        check(Case(shape, reduced, dtype, layout, **options), draws)


@pytest.mark.parametrize("positions", [2, 3, 8, 9, 15, 16, 17, 24, 31, 32, 33, 47, 63, 64, 65, 1023, 1024, 1040])
def test_ends_of_vectors_and_blocks(positions):
    """Row lengths around multiples of the vector groups and summation blocks, as planes and as pixels."""
    for dtype, (shape, layout) in itertools.product(
        DTYPES, [((2, 3, positions), "contiguous"), ((2, positions, 3), "channels_last")]
    ):
        check(Case(shape, 2, dtype, layout, squeeze="avgmax", post_act="relu", residual=True), draws=8)


@pytest.mark.parametrize("pixels", [1, 2, 3, 4, 5, 6, 7, 31, 32, 33, 35, 36, 63, 64, 65, 100])
def test_ends_of_pixel_blocks(pixels):
    for squeeze in SQUEEZES:
        check(Case((3, 20, pixels), 4, layout="channels_last", squeeze=squeeze, post_act="relu"), draws=6)


@pytest.mark.parametrize("layout", DENSE)
@pytest.mark.parametrize("positions", [5_000, 2**15, 2**18 + 5])
def test_long_sums_lose_no_digits(positions, layout):
    """Volumes and long signals of one sign: errors must not grow with the number of blocks."""

    def positive(t: oracle.Tensors) -> None:
        for name in ("x", "dy"):
            t[name].abs_()

    for squeeze in ("avg", "avgmax"):
        check(Case((1, 5, positions), 3, layout=layout, act="silu", squeeze=squeeze), draws=3, change=positive)


# ---------------------------------------------------------------------------------------------------- layouts

RANKS = ((4, 20, 30), (4, 20, 5, 6), (3, 20, 2, 3, 4))


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(layout, dtype):
    for shape, options in itertools.product(RANKS, (PLAIN, EVERYTHING)):
        check(Case(shape, 6, dtype, layout, **options))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", RANKS, ids=name_of)
def test_y_is_laid_out_as_eager_does(shape, layout):
    for grad in (True, False):
        x = LAYOUTS[layout](torch.randn(shape)).requires_grad_(grad)
        w1, w2 = torch.randn(6, 20), torch.randn(20, 6)
        y, gate = senet_fused.squeeze_excite(x, w1, w2, backend="cpu", return_gate=True)
        assert y.stride() == (x * gate.reshape(*gate.shape, *(1,) * (x.dim() - 2))).stride()


@pytest.mark.parametrize("other", LAYOUTS)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "reversed"])
def test_dy_and_residual_in_another_layout(layout, other):
    for dtype, post_act in ((torch.float32, None), (torch.bfloat16, "relu")):
        case = Case((4, 20, 5, 6), 6, dtype, layout, residual=True, post_act=post_act)
        check(case.replace(dy_layout=other))
        check(case.replace(residual_layout=other))


def test_weights_in_any_form():
    """Transposed, sliced and 1x1-convolution weights, expanded biases: the same bits, gradients in their shape."""
    case = Case((3, 24, 5, 5), 6)
    inputs = draw(case, 0)
    inputs["b1"], inputs["b2"] = inputs["b1"][:1].expand(6), torch.stack((inputs["b2"], inputs["b2"]), 1)[:, 0]
    plain = run_counted(case, {k: t.contiguous() for k, t in inputs.items()})
    forms = [
        lambda w: w.t().contiguous().t(),
        lambda w: torch.cat((w, w), 1)[:, : w.shape[1]],
        lambda w: w[:, :, None, None],
        lambda w: w[:, :, None, None].to(memory_format=torch.channels_last),
        lambda w: w[:, :, None],
    ]
    for form in forms:
        w1, w2 = form(inputs["w1"]), form(inputs["w2"])
        results = run_counted(case, {**inputs, "w1": w1, "w2": w2})
        assert results["dw1"].shape == w1.shape and results["dw2"].shape == w2.shape
        for name, t in results.items():
            assert torch.equal(t.reshape(plain[name].shape), plain[name]), name


# ---------------------------------------------------------------------------------------------------- dtypes

f32, bf16, f16, f64 = DTYPES
MIXED = [
    (bf16, {"w1": f32, "w2": f32, "b1": f32, "b2": f32}),
    (f16, {"w1": f32, "w2": f32, "b1": f32, "b2": f32}),
    (f32, {"w1": bf16, "w2": bf16, "b1": bf16, "b2": bf16}),
    (f32, {"w1": f16, "w2": f16}),
    (f32, {"w1": f64, "w2": f64, "b1": f64, "b2": f64}),
    (f64, {"w1": f32, "w2": f32, "b1": f32, "b2": f32}),
    (f32, {"w1": bf16}),
    (f32, {"w2": f16, "b1": bf16}),
    (bf16, {"w1": f16, "w2": f32, "b1": f64, "b2": bf16}),
    (bf16, {"b1": f32}),
    (f32, {"residual": bf16}),
    (bf16, {"residual": f32}),
    (f16, {"residual": bf16}),
    (f32, {"residual": f64}),
    (f64, {"residual": f16}),
    (bf16, {"residual": f32, "w1": f32, "w2": f32}),
]


@pytest.mark.parametrize("layout", DENSE)
@pytest.mark.parametrize(("dtype", "others"), MIXED, ids=[f"{x}-{i}" for i, (x, _) in enumerate(MIXED)])
def test_mixed_dtypes(dtype, others, layout):
    case = Case((6, 40, 5, 7), 20, dtype, layout, residual="residual" in others, others=tuple(others.items()))
    for through, post_act in (("y", None), ("both", "relu")):
        check(case.replace(through=through, post_act=post_act))


@pytest.mark.parametrize("dtype", [bf16, f16], ids=name_of)
def test_every_16_bit_value_is_widened_and_rounded_exactly(dtype):
    """The gate is a constant here (w1 = w2 = 0), so y must be x * gate in float32, rounded to nearest even.

    One exception: the bfloat16 instruction of AVX-512 makes subnormal results (below 1.2e-38) zero.
    """
    values = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
    values = values[values.isfinite()]
    for layout, factor in itertools.product(DENSE, (1.0, -1.0, 1.2345678, 3.0517578e-05, 0.33333334)):
        x = LAYOUTS[layout](values.reshape(1, 8, -1))
        b2 = torch.full((8,), factor)
        weights = torch.zeros(1, 8), torch.zeros(8, 1)
        y = senet_fused.squeeze_excite(x, *weights, None, b2, gate="identity", squeeze="max", backend="cpu")
        expected = (x.float() * factor).to(dtype)
        if dtype == bf16 and native.instruction_set() == "avx512_bf16":
            subnormal = (x.float() * factor).abs() < torch.finfo(bf16).tiny
            y, expected = y.where(~subnormal | (y != 0), 0), expected.where(~subnormal | (y != 0), 0)
        assert torch.equal(y.contiguous().view(torch.int16), expected.contiguous().view(torch.int16))


# ---------------------------------------------------------------------------------------------------- what is returned


@pytest.mark.parametrize("through", ["y", "gate", "both"])
@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
def test_gradients_through_y_and_gate(dtype, through):
    for layout, gate in itertools.product(DENSE, GATES):
        check(Case((6, 40, 5, 7), 20, dtype, layout, gate=gate, through=through))
    check(Case((6, 40, 5, 7), 20, dtype, residual=True, post_act="relu", squeeze="max", through=through))


@pytest.mark.parametrize("layout", [*DENSE, "reversed", "every other sample", "misaligned channels_last"])
@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
def test_inference_gives_the_bits_of_training(dtype, layout):
    for squeeze, post_act, residual in TAILS:
        case = Case((3, 20, 5, 7), 6, dtype, layout, squeeze=squeeze, post_act=post_act, residual=residual)
        inputs = draw(case, 0)
        trained = run_counted(case, inputs)
        senet_fused.reset_call_counts()
        plain = oracle.fused(case, inputs)
        with torch.no_grad():
            no_grad = oracle.fused(case, {k: t.clone().requires_grad_() for k, t in inputs.items()})
        with torch.inference_mode():
            inference = oracle.fused(case, inputs)
        assert senet_fused.call_counts() == {"cpu.forward": 3}
        for y, gate in (plain, no_grad, inference):
            assert not y.requires_grad and y.dtype == trained["y"].dtype and y.stride() == trained["y"].stride()
            assert torch.equal(y, trained["y"]) and torch.equal(gate, trained["gate"])


AT_ONCE = {
    "contiguous": lambda x, w: (x, *w),
    "channels_last": lambda x, w: (x.to(memory_format=torch.channels_last), *w),
    "without_biases": lambda x, w: (x, *w[:2]),
    "convolutions": lambda x, w: (x, *(v[..., None, None] for v in w[:2]), *w[2:]),
    "one_dimension": lambda x, w: (x.flatten(2), *w),
    "three_dimensions": lambda x, w: (x[..., None], *w),
}
# The kernels refuse, or are not asked: the long way converts and copies.
THE_LONG_WAY = {
    "bfloat16": lambda x, w: (x.bfloat16(), *(v.bfloat16() for v in w)),
    "weights_of_another_dtype": lambda x, w: (x, *(v.bfloat16() for v in w)),
    "biases_of_another_dtype": lambda x, w: (x, *w[:2], *(v.double() for v in w[2:])),
    "weights_with_strides": lambda x, w: (x, w[0].t().contiguous().t(), *w[1:]),
    "slice_of_a_batch": lambda x, w: (x.to(memory_format=torch.channels_last)[::2], *w),
    "other_strides": lambda x, w: (x.transpose(2, 3), *w),
    "no_samples": lambda x, w: (x[:0], *w),
}


@pytest.mark.parametrize("name", [*AT_ONCE, *THE_LONG_WAY])
def test_the_short_way_of_inference_gives_the_bits_of_the_long_one(name, monkeypatch):
    torch.manual_seed(0)
    x, weights = torch.randn(4, 18, 5, 7), [torch.randn(s) for s in ((4, 18), (18, 4), (4,), (18,))]
    arguments = {**AT_ONCE, **THE_LONG_WAY}[name](x, weights)
    expected = squeeze_excite(*arguments, act="silu", gate="hardsigmoid", squeeze="avgmax")
    returned = []
    infer = ops.infer_at_once
    monkeypatch.setattr(ops, "infer_at_once", lambda *a: returned.append(infer(*a)) or returned[-1])
    with torch.inference_mode():
        y = squeeze_excite(*arguments, act="silu", gate="hardsigmoid", squeeze="avgmax")
    assert torch.equal(y, expected) and y.stride() == expected.stride() and y.dtype == expected.dtype
    assert (name in AT_ONCE) == any(r is not None for r in returned)
    assert senet_fused.call_counts() == {"cpu.forward": 2}


def test_only_wanted_gradients_are_computed_with_the_same_bits():
    wanted = [("x",), ("w1",), ("b1",), ("w2",), ("b2",), ("residual",), ("x", "w2"), ("w1", "b1", "residual")]
    for post_act, squeeze, layout in itertools.product((None, "relu"), SQUEEZES, DENSE):
        case = Case((3, 20, 5, 7), 6, layout=layout, squeeze=squeeze, post_act=post_act, residual=True)
        inputs = draw(case, 0)
        full = run_counted(case, inputs)
        for names in wanted:
            leaves = {k: t.detach().requires_grad_(k in names) for k, t in inputs.items()}
            y, _ = oracle.fused(case, leaves)
            y.backward(inputs["dy"])
            for name, leaf in leaves.items():
                assert (leaf.grad is not None) == (name in names)
                assert leaf.grad is None or torch.equal(leaf.grad, full[f"d{name}"]), (case, names, name)


@pytest.mark.parametrize(("squeeze", "post_act", "residual"), TAILS)
def test_every_element_is_written(monkeypatch, squeeze, post_act, residual):
    """Outputs come out the same from NaN as from zeros: y, gate, saved, mask to its last byte, and all gradients."""

    def filled(allocate, number, byte):
        def allocate_and_fill(*arguments):
            outputs = allocate(*arguments)
            for t in outputs:
                if t is not None:
                    t.fill_(number if t.is_floating_point() else byte)
            return outputs

        return allocate_and_fill

    forward, backward = define._allocate, define._allocate_gradients
    for dtype, layout, shape in itertools.product(DTYPES, DENSE, [(3, 20, 5, 7), (2, 16, 16), (2, 9, 1, 1)]):
        case = Case(shape, 5, dtype, layout, squeeze=squeeze, post_act=post_act, residual=residual)
        t = draw(case, 0)
        runs = []
        for number, byte in ((nan, 255), (0.0, 0)):
            monkeypatch.setattr(define, "_allocate", filled(forward, number, byte))
            monkeypatch.setattr(define, "_allocate_gradients", filled(backward, number, byte))
            weights = t["w1"], t["b1"], t["w2"], t["b2"]
            options = case.act, case.gate, squeeze, post_act or ""
            outputs = Forward("cpu")(t["x"], *weights, t.get("residual"), *options, True)
            gradients = Backward("cpu")(
                t["dy"], t["dgate"], t["x"], *weights, *outputs[1:], *options, True, True, post_act == "relu"
            )
            runs.append((*outputs, *gradients))
        mask = empty_mask(t["x"], is_channels_last(t["x"]))
        assert runs[0][3].numel() == (0 if post_act is None else mask.numel())
        for poisoned, clean in zip(*runs, strict=True):
            assert torch.equal(poisoned, clean)
            assert not poisoned.is_floating_point() or poisoned.isfinite().all()


@pytest.mark.parametrize("layout", DENSE)
def test_empty_batch(layout):
    for dtype, threads, (c, r) in itertools.product(DTYPES, (1, 2), ((24, 6), (2048, 128))):
        torch.set_num_threads(threads)
        for options in (PLAIN, EVERYTHING):
            case = Case((0, c, 7, 7), r, dtype, layout, **options)
            results = run_counted(case, draw(case, 0))
            assert results["y"].shape == (0, c, 7, 7) and results["gate"].shape == (0, c)
            for name in oracle.WEIGHTS:
                assert not results[f"d{name}"].any(), name


# ---------------------------------------------------------------------------------------------------- odd values

ODD = {"NaN": nan, "Inf": inf, "-Inf": -inf}
PATTERNS = {"NaN": torch.isnan, "Inf": torch.isposinf, "-Inf": torch.isneginf}


def assert_same_pattern(case: Case, found: oracle.Tensors, expected: oracle.Tensors, what: str) -> None:
    for name, t in expected.items():
        for pattern, where in PATTERNS.items():
            assert torch.equal(where(found[name]), where(t)), f"{case}: {pattern} in {name}, {what}"


@pytest.mark.parametrize("place", ["x", "w1", "b1", "w2", "b2", "residual", "dy"])
@pytest.mark.parametrize("odd", ODD)
@pytest.mark.parametrize("squeeze", SQUEEZES)
def test_nan_and_inf_go_where_the_reference_has_them(squeeze, odd, place):
    combinations = itertools.product((None, "relu"), DENSE, ("relu", "silu"), GATES)
    for k, (post_act, layout, act, gate) in enumerate(combinations):
        dtype = (torch.float32, torch.bfloat16)[k // 2 % 2]
        case = Case((3, 18, 5, 4), 5, dtype, layout, act, gate, squeeze, post_act, residual=True)
        inputs = draw(case, 0)
        t = inputs[place]
        t[(-1,) * t.dim() if k % 2 else (0,) * t.dim()] = ODD[odd]
        found = run_counted(case, inputs)
        expected = run(lambda c, t: oracle.fused(c, t, "reference"), case, inputs)
        assert_same_pattern(case, found, expected, f"{odd} in {place}")


def test_nan_with_any_payload_stays_nan():
    for bits in (0x7FC00001, 0x7FC001FF, 0x7F800001, 0x7FFFFFFF, -1, -0x3FFFFF):
        x = torch.randn(2, 16, 3, 3)
        x.view(torch.int32)[0, 0, 0, 0] = bits
        for gate, layout in itertools.product(GATES, DENSE):
            y, g = senet_fused.squeeze_excite(
                LAYOUTS[layout](x), torch.randn(4, 16), torch.randn(16, 4), act="identity", gate=gate,
                backend="cpu", return_gate=True,
            )  # fmt: skip
            assert g[0].isnan().all() and y[0].isnan().all(), (hex(bits), gate)
            assert not g[1].isnan().any() and not y[1].isnan().any()


@pytest.mark.parametrize("layout", DENSE)
@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("squeeze", ["max", "avgmax"])
def test_ties_share_the_gradient(squeeze, dtype, layout):
    def few_values(t: oracle.Tensors) -> None:
        t["x"].copy_(t["x"].double().round().clamp(-2, 1))

    def flat_planes(t: oracle.Tensors) -> None:
        t["x"][0] = 0
        t["x"][1] = -1
        t["x"][2] = -0.0
        t["x"][2, ..., ::2] = 0.0
        t["x"][3] = t["x"][3].relu()

    for shape, change in itertools.product([(5, 24, 7, 7), (4, 17, 3), (5, 3, 100)], (few_values, flat_planes)):
        check(Case(shape, 6, dtype, layout, squeeze=squeeze, through="both"), change=change)


@pytest.mark.parametrize("squeeze", ["max", "avgmax"])
def test_infinite_maxima(squeeze):
    """Planes of -Inf alone, planes with Inf (also tied), a NaN beside an Inf."""
    for layout, positions in itertools.product(DENSE, (3, 16, 21)):
        case = Case((5, 18, positions), 4, layout=layout, squeeze=squeeze, act="tanh")
        inputs = draw(case, 0)
        inputs["x"][0, 0] = -inf
        inputs["x"][1, 1, 1] = inf
        inputs["x"][2, 2, ::2] = inf
        inputs["x"][3, 3, 0], inputs["x"][3, 3, 1] = nan, inf
        inputs["x"][4, 4, 0], inputs["x"][4, 4, -1] = inf, nan
        for n in range(5):
            one = {k: t[n : n + 1] if k in ("x", "dy", "dgate") else t for k, t in inputs.items()}
            found = run_counted(case, one)
            expected = run(lambda c, t: oracle.fused(c, t, "reference"), case, one)
            assert_same_pattern(case, found, expected, f"sample {n}, {positions} positions")
            torch.testing.assert_close(found["y"], expected["y"], equal_nan=True)


# ---------------------------------------------------------------------------------------------------- functions


def evaluate(function: str, where: str, points: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """f and f' at the points by the C++ kernels; no pooling, no sums: one value per sample and every weight 1."""
    x = torch.zeros(1, 1, 1, dtype=points.dtype)
    one = torch.ones(1, 1, dtype=points.dtype)
    values, slopes = [], []
    for point in points:
        bias = point.reshape(1).clone().requires_grad_()
        biases = {"b1" if where == "act" else "b2": bias}
        functions = {"act": "identity", "gate": "identity", where: function}
        _, gate = senet_fused.squeeze_excite(x, one, one, **biases, **functions, backend="cpu", return_gate=True)
        values.append(gate.detach().reshape(()))
        slopes.append(torch.autograd.grad(gate.sum(), bias)[0].reshape(()))
    return torch.stack(values), torch.stack(slopes)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=name_of)
@pytest.mark.parametrize(
    ("function", "where"), [*((f, "act") for f in ACTS), *((f, "gate") for f in GATES)], ids=name_of
)
def test_functions_at_corners_and_infinities(function, where, dtype):
    """Value and derivative as stock's, whose functions PyTorch evaluates with the same formulas."""
    points = torch.tensor([-inf, -100, -7, -6, -3, -2.5, -1, -0.0, 0, 1, 2.5, 3, 6, 7, 25, 100, inf, nan], dtype=dtype)
    values, slopes = evaluate(function, where, points)
    # One by one: for a NaN, PyTorch's vectorised derivatives differ from the ones it takes for single elements.
    expected_values, expected_slopes = [], []
    for point in points:
        v = point.clone().requires_grad_()
        value = oracle.FUNCTIONS[function](v) * 1
        expected_values.append(value.detach())
        expected_slopes.append(torch.autograd.grad(value, v)[0])
    torch.testing.assert_close(values, torch.stack(expected_values), equal_nan=True)
    known = torch.ones(len(points), dtype=torch.bool)
    if function.startswith(("relu6", "hard")):
        known[-1] = False  # NaN: PyTorch itself gives two answers
    if function.startswith("hardsigmoid"):
        known &= (oracle.FUNCTIONS[function](points.double().abs()) - 1).abs() > 0
        known |= points.abs() > 5  # left out is the corner itself: a fused multiply-add ends on either side of it
    torch.testing.assert_close(slopes[known], torch.stack(expected_slopes)[known], equal_nan=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=name_of)
@pytest.mark.parametrize(
    ("function", "where"), [*((f, "act") for f in ACTS), *((f, "gate") for f in GATES)], ids=name_of
)
def test_accuracy_of_functions(function, where, dtype):
    """One sample per argument, small, usual and large: the gate is f and dx is f'."""
    functions = {"act": "identity", "gate": "identity", where: function}
    case = Case((1500, 1, 1), 1, dtype, bias=False, through="gate", **functions)

    def value_and_slope(case: Case, t: oracle.Tensors) -> oracle.Tensors:
        results = run_counted(case, t)
        return {name: results[name] for name in ("gate", "dx")}

    for reach in (1e-3, 1.0, 5.0, 30.0, 90.0):

        def grid(t: oracle.Tensors, reach: float = reach) -> None:
            t["x"].copy_(torch.linspace(-reach, reach, 1500).reshape(1500, 1, 1))
            for name in ("w1", "w2", "dgate"):
                t[name].fill_(1)

        check(case, draws=1, ours=value_and_slope, change=grid)


@pytest.mark.parametrize("low", [-85.0, -20.0, -3.0])
def test_small_sigmoids_have_all_their_digits(low):
    """The vectorised exponential: relative error of each value, not of the largest."""
    points = torch.linspace(low, low + 3, 4096)
    _, gate = senet_fused.squeeze_excite(
        points.reshape(-1, 1, 1), torch.ones(1, 1), torch.ones(1, 1), act="identity", backend="cpu", return_gate=True
    )
    exact = torch.sigmoid(points.double())
    ours, stock = (((t.double().flatten() - exact) / exact).abs().max() for t in (gate, torch.sigmoid(points)))
    assert ours <= 2 * stock + torch.finfo(torch.float32).eps


# ---------------------------------------------------------------------------------------------------- size


@pytest.mark.sizes
@pytest.mark.parametrize(("dtype", "layout"), VENUES, ids=name_of)
def test_outputs_beyond_the_caches(dtype, layout):
    """Large outputs are written past the caches: the same bits. x is one sample many times: only outputs are large."""
    case = Case((1, 64, 32, 32), 16, dtype, layout, squeeze="avgmax")
    for options in ({}, {"post_act": "relu", "residual": True}):
        alone = draw(case.replace(**options), 0)
        many = 1 + machine.last_level_cache_bytes() // (alone["x"].numel() * alone["x"].element_size())
        batch = {
            k: t.expand(many, *t.shape[1:]) if k in ("x", "residual", "dy", "dgate") else t for k, t in alone.items()
        }
        one, all_of_them = (run_counted(case.replace(**options), t) for t in (alone, batch))
        for name in ("y", "dx", "dresidual"):
            if name in one:
                assert (all_of_them[name] == one[name]).all(), name


HUGE = (1, 64, 4097, 8192)  # 2^31 + 524 288 elements, 4 GiB in bfloat16


def available_bytes() -> int:
    """Memory that can still be had; 0 where the system does not say."""
    try:
        with open("/proc/meminfo") as file:
            return next((1024 * int(line.split()[1]) for line in file if line.startswith("MemAvailable")), 0)
    except OSError:
        return 0


def huge_tensor(layout: str, seed: int) -> torch.Tensor:
    """Random bfloat16 in 10^6 values that repeat, in step with neither rows nor channels."""
    t = torch.empty(HUGE, dtype=torch.bfloat16, memory_format=getattr(torch, f"{layout}_format", torch.channels_last))
    flat = t.view(-1) if layout == "contiguous" else t.permute(0, 2, 3, 1).view(-1)
    tile = (torch.randn(1_000_003, generator=torch.Generator().manual_seed(seed)) + 0.25).bfloat16()
    whole = flat.numel() // tile.numel() * tile.numel()
    flat[:whole].view(-1, tile.numel()).copy_(tile)
    flat[whole:].copy_(tile[: flat.numel() - whole])
    return t


@pytest.mark.slow
@pytest.mark.parametrize("layout", DENSE)
@pytest.mark.parametrize("direction", ["forward", "forward and backward"])
def test_more_than_2_to_the_31_elements(direction, layout):
    """Every element of y and dx, from the kernel's own gate; that from sums in float64."""
    torch.use_deterministic_algorithms(False)  # filling the outputs first takes as long as all the rest
    tensors = 2 if direction == "forward" else 3
    needed, available = tensors * 2 * math.prod(HUGE) + 2**31, available_bytes()
    if available < needed:
        pytest.skip(f"needs {needed / 2**30:.0f} GiB of free memory, there are {available / 2**30:.1f}")
    n, c, *spatial = HUGE
    m, r = math.prod(spatial), 16
    x = huge_tensor(layout, 0)
    generator = torch.Generator().manual_seed(2)
    w1, w2 = torch.randn(r, c, generator=generator), torch.randn(c, r, generator=generator)
    b1, b2 = torch.randn(r, generator=generator), torch.randn(c, generator=generator)

    def parts(*tensors: torch.Tensor):
        """[C, some positions] of each, again and again until all are through."""
        step = 2**19
        for at in range(0, m, step):
            yield [t.flatten(2)[0, :, at : at + step] for t in tensors]

    options = "relu", "sigmoid", "avg", ""
    y, gate, saved, mask = Forward("cpu")(x, w1, b1, w2, b2, None, *options, True)
    assert y.stride() == x.stride()
    sums = sum(part.sum(1, dtype=torch.float64) for (part,) in parts(x))
    preact = w1.double() @ (sums / m) + b1
    exact_gate = torch.sigmoid(w2.double() @ preact.relu() + b2)
    torch.testing.assert_close(gate[0].double(), exact_gate, rtol=1e-5, atol=1e-6)
    for part, result in parts(x, y):
        assert torch.equal(result, (part.float() * gate[0, :, None]).bfloat16())
    if direction == "forward":
        return
    del y
    dy = huge_tensor(layout, 1)
    dx, dw1, db1, dw2, db2, _ = Backward("cpu")(
        dy, None, x, w1, b1, w2, b2, gate, saved, mask, *options, True, True, False
    )
    dgate = sum((a.float() * b.float()).sum(1, dtype=torch.float64) for a, b in parts(x, dy))
    dlogit = dgate * exact_gate * (1 - exact_gate)
    dpreact = (dlogit @ w2.double()) * (preact > 0)
    shift = (dpreact @ w1.double() / m).float()[:, None]
    for found, exact in ((db2, dlogit), (db1, dpreact), (dw2, dlogit[:, None] * preact.relu())):
        torch.testing.assert_close(found.double(), exact, rtol=1e-4, atol=1e-4 * exact.abs().max().item())
    torch.testing.assert_close(dw1.double(), dpreact[:, None] * (sums / m), rtol=1e-4, atol=1e-2)
    for cotangent, result in parts(dy, dx):
        expected = cotangent.float() * gate[0, :, None] + shift
        allowed = torch.finfo(torch.bfloat16).eps * expected.abs() + 1e-4 * shift.abs().max()
        assert ((result.float() - expected).abs() <= allowed).all()
