"""Block tails by the CUDA kernels against the float64 oracle: on a GPU where there is one, else run on the host.

What every backend has to hold to, from gpu_tail_contract.py, and what is CUDA's own: its strategies, tiles, launches,
schedules, and its library's operators. All fresh memory is NaN.
"""

from __future__ import annotations

import functools
import itertools
from unittest import mock

import pytest
import tail_oracle
import torch
from cuda_runner import (  # noqa: F401
    PROBLEM,
    cuda_kernels,
    expected_tail_launches,
    host,
    launches,
    planning,
    run_tail,
)
from gpu_contract import DEVICE, DTYPES, STRATEGIES, name_of, on_device
from gpu_tail_contract import *  # noqa: F403
from oracle import LAYOUTS, Tensors
from tail_oracle import (
    CHANGES,
    EVERYTHING,
    PLAIN,
    Tail,
    assert_same_bits,
    check,
    draw,
    far_first_pixels,
    far_from_zero,
    fused,
    variance_error,
)
from test_cuda_kernels import ON_HOST, TILES, form_of

from senet_fused.backends import cuda
from senet_fused.backends.codes import codes_of
from senet_fused.call import Call, Gradients, Outputs, text_of
from senet_fused.ops import empty_mask

pytestmark = [
    pytest.mark.skipif(PROBLEM is not None, reason=str(PROBLEM)),
    pytest.mark.usefixtures("cuda_kernels", "poisoned"),
]
f32, bf16, f16 = DTYPES
# As the KINDS of test_cuda_kernels, for the same TILES.
KINDS = {
    "channels_last": Tail((3, 40, 6, 7), 10, bf16, "channels_last"),
    "planes": Tail((2, 40, 6, 8), 10, bf16),
    "planes of 36": Tail((2, 40, 6, 6), 10, f32),
    "tile_of_planes": Tail((2, 40, 5, 5), 10, f16),
    "tile_of_planes of 49": Tail((3, 64, 7, 7), 8, bf16),
}
FORMS = ("channels_last", "planes", "tile_of_planes")
GATED = (*STRATEGIES, "no gate")


@pytest.fixture(name="run")
def _run():
    return run_tail


@pytest.fixture
def backend_name():
    return "cuda"


@pytest.fixture
def using_strategy():
    return lambda case, strategy: cuda.using(planning(strategy))


def counted(case: Tail, inputs: Tensors, strategy: str) -> Tensors:
    """As run_tail; on the host with the proof that these were the launches, each once."""
    if DEVICE == "cuda":
        return run_tail(case, inputs)
    launches()
    results = run_tail(case, inputs)
    assert launches() == expected_tail_launches(form_of(case), strategy, case.training, case.reduced > 0)
    return results


def with_gate(case: Tail, strategy: str) -> tuple[Tail, str]:
    """The case and the strategy that `strategy` or "no gate" stands for."""
    return (case.replace(reduced=0), "partials") if strategy == "no gate" else (case, strategy)


# ---------------------------------------------------------------------------------------------------- strategies


@pytest.mark.parametrize("training", [True, False], ids=["batch", "given"])
@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("strategy", GATED)
@pytest.mark.parametrize("tile", TILES)
def test_every_strategy_with_every_tile(tile, strategy, dtype, training):
    case, strategy = with_gate(KINDS[tile.partition(",")[0]].replace(dtype=dtype, training=training), strategy)
    for options in (PLAIN, EVERYTHING):
        with cuda.using(planning(strategy, **TILES[tile])):
            check(case.replace(**options), draws=1, ours=functools.partial(counted, strategy=strategy))


@pytest.mark.parametrize("shape", [(2, 9, 33, 35), (1, 6, 71, 73), (2, 5, 3, 4099)], ids=name_of)
@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
def test_large_planes_that_break_alignment(shape, dtype):
    """Too large to be staged: whole packs inside of a plane, its ends one by one."""
    for options, training in itertools.product((PLAIN, EVERYTHING), (True, False)):
        check(Tail(shape, 3, dtype, training=training, **options), draws=1, ours=run_tail)


@pytest.mark.sizes
@pytest.mark.parametrize("channels", [24, 150, 33])
@pytest.mark.parametrize("strategy", GATED)
def test_many_samples_and_splits(strategy, channels):
    """More samples and splits than are brought together at a time, channels in several blocks, the last one odd."""
    for dtype, training in ((f32, True), (f16, True), (f32, False)):
        case, by = with_gate(Tail((37, channels, 3, 4), 6, dtype, "channels_last", training, **EVERYTHING), strategy)
        with cuda.using(planning(by, samples=4, channels=40, positions=1)):
            check(case, draws=1, ours=functools.partial(counted, strategy=by))


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(
    "shape", [(3, 24, 1, 1), (2, 1, 5, 5), (17, 7, 2, 2), (2, 24, 50), (5, 31, 1), (2, 12, 3, 5, 7)]
)
def test_odd_shapes(shape, training):
    for dtype, layout in itertools.product(DTYPES, ("contiguous", "channels_last")):
        check(Tail(shape, 5, dtype, layout, training, **EVERYTHING), draws=1, ours=run_tail)


# ------------------------------------------------------------------------------------------- moments that cancel


def several_tiles(kind: str) -> dict[str, int]:
    return {
        "channels_last": {"samples": 1, "channels": 16, "positions": 13},
        "planes": {"channels": 1, "positions": 32},
    }.get(kind, {})


@pytest.mark.sizes
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("change", CHANGES)
def test_moments_that_cancel_in_every_form(change, form):
    """Variances, y and gradients of channels whose mean is large beside their deviation, and of odd ones."""
    layout = "channels_last" if form == "channels_last" else "contiguous"
    for shape in ((4, 13, 7, 7),) if form == "tile_of_planes" else ((4, 13, 6, 8), (3, 12, 24, 24)):
        for reduced, options in ((4, PLAIN), (4, {**EVERYTHING, "momentum": 1.0}), (0, {"affine": False})):
            case = Tail(shape, reduced, layout=layout, **options)
            assert form_of(case) == form
            for tile in ({}, several_tiles(form)):
                with cuda.using(planning("partials", **tile)):
                    check(case, 2, run_tail, CHANGES[change])


@pytest.mark.parametrize("form", FORMS)
def test_the_variance_of_each_channel_is_right_in_every_form(form):
    """Not only of the largest, which the rule above asks for; and the naive formula would not pass."""
    layout = "channels_last" if form == "channels_last" else "contiguous"
    shape = (4, 13, 7, 7) if form == "tile_of_planes" else (3, 12, 24, 24)
    changes = ((far_from_zero, 1e-6), (far_first_pixels, 1e-5))
    for (change, tolerance), tile in itertools.product(changes, ({}, several_tiles(form))):
        case = Tail(shape, layout=layout, affine=False, momentum=1.0)
        t = draw(case, 0, change)
        with cuda.using(planning("partials", **tile)):
            assert variance_error(t, run_tail(case, t)["running_var"]) < tolerance
        x = t["x"].transpose(0, 1).flatten(1)
        assert variance_error(t, x.square().mean(1) - x.mean(1).square()) > 1e-3


# ---------------------------------------------------------------------------------------------------- bits


@ON_HOST
@pytest.mark.parametrize("training", [True, False], ids=["batch", "given"])
@pytest.mark.parametrize("strategy", GATED)
@pytest.mark.parametrize("kind", KINDS)
def test_no_schedule_changes_a_bit(kind, strategy, training):
    """Threads and blocks in six random orders: a race, or a sum whose order is not fixed, would show."""
    case, strategy = with_gate(KINDS[kind].replace(training=training, **EVERYTHING), strategy)
    inputs = draw(case, 0)
    with cuda.using(planning(strategy)):
        for seed in range(6):
            host().senet_host_seed(seed)
            found = run_tail(case, inputs)
            if seed == 0:
                expected = found
            assert_same_bits(found, expected, seed)


@pytest.mark.parametrize("strategy", GATED)
@pytest.mark.parametrize("kind", KINDS)
def test_a_sample_alone_gives_the_bits_it_has_in_a_batch(kind, strategy):
    """With statistics that are given."""
    case, strategy = with_gate(KINDS[kind].replace(training=False, **EVERYTHING), strategy)
    case = case.replace(shape=(11, *case.shape[1:]))
    inputs = draw(case, 0)
    of_samples = ("x", "residual", "dy", "factor")
    with cuda.using(planning(strategy, **({"samples": 2} if kind == "channels_last" else {}))):
        batch = run_tail(case, inputs)
        for chosen in ([9], [1, 4], slice(0, 9)):
            alone = run_tail(case, {k: t[chosen] if k in of_samples else t for k, t in inputs.items()})
            assert_same_bits(alone, {k: batch[k][chosen] for k in ("y", "dx", "dresidual")}, chosen)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("kind", FORMS)
def test_a_tensor_that_is_not_aligned_gives_the_same_bits(kind, training):
    """Elements are then read one by one, and added in the same order."""
    case = KINDS[kind].replace(training=training, **EVERYTHING)
    inputs = draw(case, 0)
    layout = "misaligned channels_last" if kind == "channels_last" else "misaligned"
    misaligned = {k: LAYOUTS[layout](t) if t.dim() == 4 else t for k, t in inputs.items()}
    misaligned["weight"], misaligned["bias"] = (
        torch.cat((t[:1], t)).clone()[1:] for t in (inputs["weight"].float(), inputs["bias"].float())
    )
    assert misaligned["x"].data_ptr() % 16 != 0
    expected, found = run_tail(case, inputs), run_tail(case, misaligned)
    for name in expected.keys() - {"dweight", "dbias"}:
        assert torch.equal(found[name], expected[name]), name


def test_a_second_call_plans_nothing(monkeypatch):
    case = KINDS["planes"]
    inputs = draw(case, 0)
    run_tail(case, inputs)
    monkeypatch.setattr(cuda, "plan_of", None)
    run_tail(case, inputs)


# ---------------------------------------------------------------------------------------------------- launches


@ON_HOST
@pytest.mark.parametrize(
    ("strategy", "training", "forward", "backward"),
    [
        ("partials", True, 3, 3), ("last_block", True, 3, 3), ("launches", True, 4, 4), ("no gate", True, 3, 3),
        ("partials", False, 3, 3), ("last_block", False, 3, 3), ("launches", False, 4, 4), ("no gate", False, 1, 3),
    ],
)  # fmt: skip
def test_launches_of_a_call(strategy, training, forward, backward):
    for kind in FORMS:
        case, by = with_gate(KINDS[kind].replace(training=training, **EVERYTHING), strategy)
        leaves = {k: t.requires_grad_(k not in (*tail_oracle.CONSTANT, "dy")) for k, t in draw(case, 0).items()}
        with cuda.using(planning(by)):
            launches()
            y = fused(case, leaves, "cuda")
            assert sum(launches().values()) == forward
            y.backward(leaves["dy"])
            assert sum(launches().values()) == backward


@ON_HOST
def test_launches_that_nobody_needs_are_not_made():
    """Of the backward; the second sweep of parameters alone is a few blocks."""
    few = {
        ("residual",): 1,
        ("x",): {"partials": 3, "no gate, given": 1},
        ("weight",): 3,
        ("w1",): {"partials": 3},
    }
    for names, count in few.items():
        for strategy, training in (("partials", True), ("no gate, given", False)):
            case, _ = with_gate(KINDS["planes"].replace(training=training, **EVERYTHING), strategy.partition(",")[0])
            leaves = {k: t.requires_grad_(k in names) for k, t in draw(case, 0).items()}
            if not set(names) <= leaves.keys():
                continue
            with cuda.using(planning("partials")):
                y = fused(case, leaves, "cuda")
                launches()
                y.backward(leaves["dy"])
                expected = count if isinstance(count, int) else count[strategy]
                assert sum(launches().values()) == expected, (names, strategy)


@pytest.mark.parametrize("strategy", GATED)
@pytest.mark.parametrize("kind", FORMS)
def test_given_statistics_are_kept(kind, strategy):
    """As those of a batch are, for the backward."""
    case, strategy = with_gate(KINDS[kind].replace(training=False), strategy)
    t = {k: on_device(v) for k, v in draw(case, 0).items()}
    mean, var = t["running_mean"].float(), t["running_var"].float()
    with cuda.using(planning(strategy)):
        _, statistics, *_ = torch.ops.senet_fused.fused_se_cuda(
            t["x"], t["weight"], t["bias"], mean, var, *(t.get(k) for k in ("w1", "b1", "w2", "b2")), None, None,
            case.eps, text_of(("given", case.act, case.gate, "avg", "", "", "")), True,
        )  # fmt: skip
    assert torch.equal(statistics[0], mean) and torch.equal(statistics[2], var)
    torch.testing.assert_close(statistics[1], (var + case.eps).rsqrt(), rtol=3e-7, atol=0.0)


# ---------------------------------------------------------------------------------------------------- together


def call_of(case: Tail, t: Tensors, group: str) -> Call:
    own = {k: on_device(t[k]) for k in ("x", "w1", "w2", "residual")}
    own |= {k: on_device(t[k]).float() for k in ("weight", "bias", "b1", "b2", "factor")}
    tensors = {name: own.get(name) for name in Call._fields[:11]}
    return Call(*tensors.values(), case.eps, "batch", case.act, case.gate, "avg", "relu", group)


def call_forward(case: Tail, t: Tensors, together) -> Outputs:
    """By the backend's function. together: what other processes make of the statistics, None without others."""
    call = call_of(case, t, "" if together is None else "others")
    x = call.x
    n, c = x.shape[:2]
    last = case.layout == "channels_last"
    make = functools.partial(x.new_empty, dtype=torch.float32)
    outputs = Outputs(torch.empty_like(x), make(3, c), make(n, c), make(n, c + case.reduced), empty_mask(x, last))
    with mock.patch.object(cuda, "merge_statistics", lambda statistics, _: together(statistics)):
        cuda.forward(call, outputs, last)
    return outputs


def call_backward(case: Tail, t: Tensors, kept: Outputs, together, wanted=range(8)) -> Gradients:
    """By the backend's function. together: what other processes make of dweight and dbias."""
    call = call_of(case, t, "" if together is None else "others")
    likes = (call.x, call.weight, call.bias, call.w1, call.b1, call.w2, call.b2, call.x)
    gradients = Gradients(*(torch.empty_like(like) if k in wanted else None for k, like in enumerate(likes)))
    with mock.patch.object(cuda, "share_sums", lambda *sums_and_call: together(*sums_and_call[:2])):
        cuda.backward(
            call.gradient(kept, on_device(t["dy"]), None, (True,) * 3), gradients, case.layout == "channels_last"
        )
    return gradients


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("kind", KINDS)
def test_statistics_that_someone_changes_between_the_sweeps(kind, strategy):
    """One process alone gets the bits of a call without the others; and what they bring is what is used."""
    case = KINDS[kind].replace(**EVERYTHING)
    t = draw(case, 0)
    seen = []
    with cuda.using(planning(strategy)):
        plain = call_forward(case, t, None)
        alone = call_forward(case, t, lambda s: seen.append(s.clone()))
        for a, b in zip(plain, alone, strict=True):
            assert torch.equal(a, b)
        assert torch.equal(seen[0], plain[1])

        def changed(s: torch.Tensor) -> None:
            s[0] += 0.25
            s[1] *= 0.5

        others = call_forward(case, t, changed)
        x, other = t["x"].double(), others[1].cpu().double()[:, :, None, None]
        xhat = other[1] * (x - other[0])
        torch.testing.assert_close(others[3][:, : x.shape[1]].cpu().double(), xhat.mean((2, 3)), rtol=1e-4, atol=1e-5)
        before = t["weight"].double()[:, None, None] * xhat + t["bias"].double()[:, None, None]
        before = before * (t["factor"].double()[:, None] * others[2].cpu().double())[:, :, None, None]
        y = torch.relu(before + t["residual"].double())
        torch.testing.assert_close(others[0].cpu().double(), y, rtol=0.01, atol=0.01)

        count = t["x"].numel() / t["x"].shape[1]
        expected = call_backward(case, t, plain, None)
        found = call_backward(case, t, plain, lambda dweight, dbias: (dweight / count, dbias / count))
        for k, (a, b) in enumerate(zip(expected, found, strict=True)):
            if k == 0:
                torch.testing.assert_close(a, b, rtol=0.01, atol=1e-3)
            else:
                assert torch.equal(a, b), k
        # Without parameters they are asked for all the same, and nothing but dx and dresidual is written.
        asked = []
        some = call_backward(
            case, t, plain, lambda *d: (asked.append(d), (d[0] / count, d[1] / count))[1], wanted=(0, 7)
        )
        assert torch.equal(some[0], found[0]) and torch.equal(some[7], found[7])
        assert torch.equal(asked[0][0], expected[1]) and torch.equal(asked[0][1], expected[2])
        # Parameters alone ask nobody.
        params = call_backward(case, t, plain, None, wanted=range(1, 7))
        assert all(torch.equal(params[k], expected[k]) for k in range(1, 7))


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_a_process_without_samples(layout):
    """It has no say, and takes part."""
    case = Tail((0, 24, 4, 4), 6, bf16, layout, **EVERYTHING)
    t = draw(case, 0)
    seen, asked = [], []
    kept = call_forward(case, t, lambda s: seen.append(s.clone()))
    assert not seen[0].any()
    gradients = call_backward(case, t, kept, lambda *d: (asked.append([v.clone() for v in d]), d)[1])
    assert len(asked) == 1 and not asked[0][0].any() and not asked[0][1].any()
    assert not any(g.any() for g in gradients)


# ---------------------------------------------------------------------------------------------------- planted bugs


@pytest.mark.parametrize(
    "bug", ["no factor", "another mean", "the whole variance", "no weight of the pooled", "gate without bias"]
)
def test_the_rule_catches(bug):
    """What a kernel might get wrong by a little, put into its inputs, is beyond the rule."""
    case = Tail((3, 40, 6, 7), 10, f32, "channels_last", False, **EVERYTHING)

    def wrong(case: Tail, t: Tensors) -> Tensors:
        t = dict(t)
        if bug == "no factor":
            t["factor"] = torch.ones_like(t["factor"])
        elif bug == "another mean":
            t["running_mean"] = t["running_mean"] * (1 + 1e-4)
        elif bug == "the whole variance":
            t["running_var"] = t["running_var"] * (1 + 1 / 41)
        elif bug == "no weight of the pooled":
            t["w1"] = t["w1"] * t["weight"]
        else:
            t["b2"] = torch.zeros_like(t["b2"])
        return run_tail(case, t)

    found = tail_oracle.wrong_tensors(case, 2, wrong)
    assert {"y", "dx"} <= found.keys()


# ---------------------------------------------------------------------------------------------------- bad input

PLAN = ("strategy", "form", "samples", "channels", "positions", "lanes", "dependent_launch", "stream_stores")


def library_arguments(backward: bool):
    """Those of one of the library's own operators for a small tail, by name, and the operator."""
    make = functools.partial(torch.randn, device=DEVICE)
    x, w1, w2 = make(3, 16, 4, 4), make(4, 16), make(16, 4)
    problem = cuda.Problem(3, 16, 4, 16, 4, 4, False, "avg", True, False, backward, "batch")
    plan = planning("last_block")(problem, cuda.device_facts(x.device))
    act, p0, gate_fn, q0, q1, squeeze, relu = codes_of("relu", "sigmoid", "avg", "relu")
    functions = {
        "act": act, "act_p0": p0, "gate_fn": gate_fn, "gate_p0": q0, "gate_p1": q1, "squeeze": squeeze, "relu": relu,
        "channels_last": False,
    }  # fmt: skip
    last = {
        "stages": 0, "workspace": make(cuda._plan.cuda_tail_workspace(problem.native(), plan)),
        "counters": torch.zeros(3, dtype=torch.int32, device=DEVICE), **dict(zip(PLAN, plan.numbers(), strict=True)),
    }  # fmt: skip
    statistics, gate, saved = torch.ones(3, 16, device=DEVICE), torch.rand(3, 16, device=DEVICE), make(3, 20)
    mask = torch.zeros(3, 16, 2, dtype=torch.uint8, device=DEVICE)
    if not backward:
        found = {
            "x": x, "weight": None, "bias": make(16), "statistics": statistics, "mean": None, "var": None,
            "w1": w1, "b1": None, "w2": w2, "b2": None, "residual": None, "factor": make(3), "eps": 1e-5,
            **functions, "y": make(3, 16, 4, 4), "gate": gate, "saved": saved, "mask": mask, **last,
        }  # fmt: skip
    else:
        found = {
            "dy": make(3, 16, 4, 4), "x": x, "mask": mask, "weight": None, "bias": make(16), "statistics": statistics,
            "w1": w1, "w2": w2, "factor": make(3), "gate": gate, "saved": saved, **functions, "count": 48.0,
            "shared_dweight": None, "shared_dbias": None, "dx": make(3, 16, 4, 4), "dweight": make(16),
            "dbias": make(16),
            "dw1": make(4, 16), "db1": None, "dw2": make(16, 4), "db2": None, "dresidual": None, **last,
        }  # fmt: skip
    return found, cuda._operators[DEVICE][3 if backward else 2]


BAD = {
    "workspace too small": ({"workspace": 5}, "workspace must have"),
    "no counters": ({"counters": None}, "this plan needs [13] counters"),
    "float64": ({"x": "double"}, "x must be float32, bfloat16 or float16|must have x's dtype"),
    "no samples": ({"x": (0, 16, 4, 4)}, "an empty batch has no statistics"),
    "no channels": ({"x": (3, 0, 4, 4)}, "empty channels or positions"),
    "x without positions": ({"x": (3, 16)}, r"x must be \[N, C, \*spatial\]"),
    "w2 alone": ({"w1": None}, "w1 and w2 go together"),
    "w2 of another shape": ({"w2": (4, 16)}, r"w2 must be \[16, 4\], got \[4, 16\]"),
    "no gate": ({"gate": None}, "w1, gate and saved go together"),
    "saved of an SE layer with a maximum": ({"saved": (3, 52)}, r"saved must be \[3, 20\]"),
    "statistics": ({"statistics": (2, 16)}, r"statistics must be \[3, 16\]"),
    "bias": ({"bias": (15,)}, r"bias must be \[16\]"),
    "factor": ({"factor": (16,)}, r"factor must be \[3\]"),
    "mean alone": ({"mean": (16,)}, "mean and var go together"),
    "var": ({"mean": (16,), "var": (1,)}, r"var must be \[16\]"),
    "mask": ({"mask": (3, 16, 1)}, r"mask must be \[3, 16, 2\]"),
    "stages": ({"stages": 3}, "stages must be 0, 1 or 2"),
    "unknown strategy": ({"strategy": 3}, "unknown plan"),
    "another layout's form": ({"form": 0, "channels": 16}, "the form does not fit the layout"),
    "no gate to wait for": ({"w1": None, "w2": None, "gate": None, "saved": None, "dw1": None, "dw2": None},
                            "without a gate there is nothing to wait for"),
    "unknown act": ({"act": 12}, "unknown function code"),
    "dw1 alone": ({"dw2": None}, "dw1 and dw2 go together"),
    "db1 alone": ({"dw1": None, "dw2": None, "db1": (4,)}, "db1, db2 need dw1, dw2"),
    "no mask": ({"mask": None}, "a ReLU's backward needs its mask"),
    "dresidual without a ReLU": ({"relu": 0, "dresidual": (3, 16, 4, 4)}, "without post_act dresidual is dy"),
    "dx of another shape": ({"dx": (3, 16, 16)}, "dx must have x's shape"),
    "dweight": ({"dweight": (17,)}, r"dweight must be \[16\]"),
    "nothing shared": ({"stages": 2}, "shared_dweight and shared_dbias go with stages = 2"),
}  # fmt: skip
OF_THE_BACKWARD = (
    "dw1 alone", "db1 alone", "no mask", "dresidual without a ReLU", "dx of another shape", "dweight", "nothing shared",
)  # fmt: skip


OF_THE_FORWARD = ("mean alone", "var")


@pytest.mark.parametrize(
    ("name", "backward"),
    [(n, b) for n in BAD for b in (False, True) if n not in (OF_THE_FORWARD if b else OF_THE_BACKWARD)],
)
def test_the_library_refuses_what_does_not_fit(name, backward):
    changes, message = BAD[name]
    arguments, operator = library_arguments(backward)
    operator(*arguments.values())
    for key, value in changes.items():
        if key not in arguments:
            continue
        if value == "double":
            arguments[key] = arguments[key].double()
        elif isinstance(value, tuple):
            dtype = torch.uint8 if key == "mask" else torch.float32
            arguments[key] = torch.zeros(value, dtype=dtype, device=DEVICE)
        elif isinstance(value, int) and isinstance(arguments[key], torch.Tensor):
            arguments[key] = arguments[key][:value]
        else:
            arguments[key] = value
    with pytest.raises(RuntimeError, match=message):
        operator(*arguments.values())


def test_without_kernels_for_a_device(monkeypatch):
    """By name there is no fallback, not even when selection was bypassed."""
    monkeypatch.setattr(cuda, "_operators", {})
    x = torch.randn(2, 8, 4, 4, device=DEVICE)
    operator = torch.ops.senet_fused.fused_se_cuda.default
    with pytest.raises(RuntimeError, match="the cuda backend cannot serve this call: "):
        operator(x, *(None,) * 10, 1e-5, text_of(("batch", "relu", "sigmoid", "avg", "", "", "")), True)
