"""The CUDA planner: every strategy and form at real layers on every generation, its limits, its bytes and its words."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import pytest

import senet_fused
from senet_fused.backends import cuda
from senet_fused.backends.triton import plan as triton_plan

if cuda._plan is None:
    pytest.skip("the compiled planner is not installed", allow_module_level=True)
from senet_fused import _plan

# Multiprocessors, shared memory of each and L2 as the vendor gives them: A100, A10 (GA102), L4 (AD104), H200, B200.
FACTS = {
    "sm_80": _plan.CudaFacts(80, 108, 164 * 1024, 40 * 2**20),
    "sm_86": _plan.CudaFacts(86, 72, 100 * 1024, 6 * 2**20),
    "sm_89": _plan.CudaFacts(89, 58, 100 * 1024, 48 * 2**20),
    "sm_90": _plan.CudaFacts(90, 132, 228 * 1024, 50 * 2**20),
    "sm_100": _plan.CudaFacts(100, 148, 228 * 1024, 126 * 2**20),
}
TABLE = json.loads((Path(senet_fused.__file__).parent / "bench" / "problems.json").read_text())
SHAPES = sorted(
    {tuple(shape[:4]) for network in TABLE.values() if isinstance(network, dict) for shape in network["shapes"]}
)


def problems(n: int = 64):
    for (c, r, h, w), size, last, squeeze, tail, backward in itertools.product(
        SHAPES, (2, 4), (False, True), ("avg", "max"), (False, True), (False, True)
    ):
        yield cuda.Problem(n, c, r, h * w, size, size, last, squeeze, tail, tail, backward)


def tails(n: int = 64):
    for (c, r, h, w), gated, size, last, behind, backward, norm in itertools.product(
        SHAPES, (True, False), (2, 4), (False, True), (False, True), (False, True), ("batch", "given")
    ):
        reduced = r if gated else 0
        yield cuda.Problem(n, c, reduced, h * w, size, size, last, "avg", behind, behind, backward, norm)


def tiles(problem: cuda.Problem, plan: _plan.CudaPlan) -> int:
    return -(-problem.channels // plan.channels) * plan.splits


@pytest.mark.parametrize("facts", FACTS.values(), ids=FACTS)
def test_every_strategy_and_form_serves_real_networks(facts):
    """No dead path: each with each form that it fits, both ways."""
    met = set()
    for problem in problems():
        plan = _plan.plan_cuda(problem.native(), facts)
        met.add((plan.strategy, plan.form, problem.backward))
        assert plan.replace(problem.native()).numbers() == plan.numbers()  # which checks it
    for backward in (False, True):
        strategies = {form: {s for s, f, b in met if (f, b) == (form, backward)} for _, form, _ in met}
        assert strategies["channels_last"] == {"partials", "last_block", "launches"}
        assert "launches" in strategies["tile_of_planes"]
        assert {"partials", "launches"} <= strategies["planes"]


@pytest.mark.parametrize("facts", FACTS.values(), ids=FACTS)
def test_every_strategy_and_form_serves_tails_of_real_networks(facts):
    met = set()
    for problem in tails():
        plan = _plan.plan_cuda(problem.native(), facts)
        met.add((plan.strategy, plan.form, problem.backward, problem.reduced > 0))
        assert plan.replace(problem.native()).numbers() == plan.numbers()
    for backward in (False, True):
        gated = {form: {s for s, f, b, g in met if (f, b, g) == (form, backward, True)} for _, form, _, _ in met}
        assert gated["channels_last"] >= {"partials", "last_block"}
        assert {s for strategies in gated.values() for s in strategies} == {"partials", "last_block", "launches"}
        assert {(s, f) for s, f, b, g in met if b == backward and not g} == {("partials", form) for form in gated}


@pytest.mark.parametrize("facts", FACTS.values(), ids=FACTS)
def test_what_holds_for_every_plan(facts):
    for problem in itertools.chain(problems(), tails()):
        native = problem.native()
        found = _plan.cuda_candidates(native, facts)
        assert found[0].numbers() == _plan.plan_cuda(native, facts).numbers()
        for plan in found:
            assert plan.replace(native).numbers() == plan.numbers()
            assert plan.splits * plan.positions >= problem.positions > (plan.splits - 1) * plan.positions
            assert problem.squeeze == "avg" or plan.strategy == "launches"
            assert problem.reduced > 0 or plan.strategy == "partials"
            assert plan.form == "channels_last" or plan.samples == 1
            width = min(plan.channels, problem.channels) * problem.element_size
            if plan.form == "channels_last":  # whole lines of the cache, where there are as many channels
                assert width >= min(128, problem.channels * problem.element_size)
            if plan.form == "tile_of_planes":
                assert problem.positions * problem.element_size % 16 != 0
                whole = plan.channels * problem.positions * problem.element_size % 16 == 0
                assert whole or plan.channels >= problem.channels


def test_the_batch_decides_nothing_but_how_stores_are_marked():
    """So a sample's result does not depend on the batch that it is in."""
    for facts in FACTS.values():
        pairs = (zip(these(64), these(1), strict=True) for these in (problems, tails))
        for large, small in itertools.chain(*pairs):
            a, b = (_plan.plan_cuda(p.native(), facts).numbers() for p in (large, small))
            assert a[:-1] == b[:-1]
    assert _plan.plan_cuda(cuda.Problem(64, 256, 16, 3136).native(), FACTS["sm_90"]).stream_stores
    assert not _plan.plan_cuda(cuda.Problem(8, 256, 16, 3136).native(), FACTS["sm_90"]).stream_stores


def test_dependent_launches_from_sm_90_on():
    for name, facts in FACTS.items():
        plan = _plan.plan_cuda(cuda.Problem(64, 256, 16, 3136).native(), facts)
        assert plan.dependent_launch == (int(name[3:]) >= 90)


def test_plans_of_senet154_on_an_h200():
    """As DESIGN has them: shares where they are few, once per group of samples where the weights are large, launches of
    their own where a tile has one sample of a late layer."""
    found = {}
    for (c, r, size), last, backward in itertools.product(
        ((256, 16, 56), (512, 32, 28), (1024, 64, 14), (2048, 128, 7)), (True, False), (False, True)
    ):
        problem = cuda.Problem(64, c, r, size**2, channels_last=last, backward=backward)
        plan = _plan.plan_cuda(problem.native(), FACTS["sm_90"])
        found[size, last, backward] = plan.strategy
        if last and size <= 14:
            assert plan.samples > 1
    assert {key for key, strategy in found.items() if strategy == "last_block"} == {(7, True, False), (7, True, True)}
    assert {key for key, strategy in found.items() if strategy == "launches"} == {
        (14, False, True), (7, False, False), (7, False, True),
    }  # fmt: skip


# ---------------------------------------------------------------------------------------------------- bytes


def test_bytes_are_counted_as_for_triton(monkeypatch):
    """One rule: for the same tile both planners count the same bytes, each with its own launches between the sweeps."""
    monkeypatch.setattr(triton_plan, "EXCITE_SAMPLES", _plan.EXCITE_SAMPLES)
    monkeypatch.setattr(triton_plan, "EXCITE_SPLIT", _plan.EXCITE_CHANNELS)
    monkeypatch.setattr(triton_plan, "EXCITE_CHANNELS", _plan.EXCITE_CHANNELS)
    monkeypatch.setattr(triton_plan, "TAIL_CHANNELS", _plan.TAIL_CHANNELS)
    compared = set()
    for problem in itertools.chain(problems(), tails()):
        for plan in _plan.cuda_candidates(problem.native(), FACTS["sm_90"]):
            form = "channels_last" if plan.form == "channels_last" else "planes"
            tile = triton_plan.Tile(form, plan.samples, plan.channels, 1, plan.positions, plan.splits, 8)
            same = triton_plan.Problem(*problem[1:])  # which has no samples
            expected = triton_plan.count_bytes(same, tile, plan.strategy, batch=48)
            assert _plan.cuda_bytes(problem.native(), plan, 48) == expected, (problem, plan)
            compared.add((plan.strategy, form, problem.norm))
    assert len(compared) == 18


def test_bytes_by_hand():
    """256/16@56x56 in bfloat16, 10 samples, 2 blocks of channels x 7 splits: shares written once and read 14 times."""
    problem = cuda.Problem(10, 256, 16, 3136, relu=True, residual=True).native()
    plan = _plan.plan_cuda(problem, FACTS["sm_90"])
    assert (plan.strategy, plan.channels, plan.splits) == ("partials", 128, 7)
    assert _plan.cuda_bytes(problem, plan, 10) == {
        "tensor": 4 * 10 * 256 * 3136 * 2,
        "mask": 10 * 256 * 3136 // 8,
        "weights": 2 * 10 * 7 * 256 * 16 * 2,
        "shares": 10 * 14 * 16 * 4 * 15,
        "vectors": 10 * 256 * 4 * 8,
    }


# 256/16@56x56 in bfloat16, 20 samples in 3 groups of 8, 2 blocks of channels x 7 splits, 8 blocks of 32 channels; the
# launches' 2 blocks of 128 channels. Vectors in units of [20, 256] floats, weights of [256, 16] matrices.
TAIL_BYTES = {
    ("batch", False, "partials"): (4, 1, 3 + 20 * 7, 8 * (1 + 14), 3 * 7 * (1 + 3) + 2),
    ("batch", False, "last_block"): (4, 1, 3 + 20 * 7, 8 * (1 + 1) + 1 + 14, 3 * 7 * (1 + 3) + 2),
    ("batch", False, "launches"): (4, 1, 3 + 3, 8 * (1 + 2), 3 * 7 * (1 + 3) + 2),
    ("given", False, "partials"): (4, 1, 3 + 20 * 7, 8 * (1 + 14), 7 * (1 + 1) + 2),
    ("batch", True, "partials"): (6, 2, 3 + 20 * 7, 14 * (1 + 2), 2 * 3 * 7 + 2),
    ("batch", True, "last_block"): (6, 2, 3 + 20 * 7, 14 * (1 + 1) + 1 + 2, 2 * 3 * 7 + 2),
    ("batch", True, "launches"): (6, 2, 3 + 3, 2 * (1 + 2), 2 * 3 * 7 + 2),
    ("given", True, "partials"): (5, 2, 3 + 20 * 7, 14 * (1 + 2), 2 * 3 * 7 + 2),
    ("batch", False, "no gate"): (4, 1, 0, 0, 3 * 7 * (1 + 1)),
    ("given", False, "no gate"): (3, 1, 0, 0, 0),
    ("batch", True, "no gate"): (6, 2, 0, 0, 2 * 2 * 7),
    ("given", True, "no gate"): (5, 2, 0, 0, 2 * 2 * 7),
}


@pytest.mark.parametrize("key", TAIL_BYTES, ids=str)
def test_bytes_of_tails_by_hand(key):
    norm, backward, strategy = key
    passes, masks, weights, shares, vectors = TAIL_BYTES[key]
    reduced, strategy = (0, "partials") if strategy == "no gate" else (16, strategy)
    problem = cuda.Problem(20, 256, reduced, 3136, relu=True, residual=True, backward=backward, norm=norm).native()
    found = _plan.cuda_candidates(problem, FACTS["sm_90"])
    plan = next(p for p in found if (p.strategy, p.samples, p.channels, p.splits) == (strategy, 1, 128, 7))
    assert _plan.cuda_bytes(problem, plan, 20) == {
        "tensor": passes * 20 * 256 * 3136 * 2,
        "mask": masks * 20 * 256 * 3136 // 8,
        "weights": weights * 256 * 16 * 2,
        "shares": shares * 20 * 16 * 4,
        "vectors": vectors * 20 * 256 * 4,
    }


def test_tensor_passes_of_tails():
    """What each tail reads and writes of its tensors."""

    def passes(**options):
        problem = cuda.Problem(1, 64, options.pop("reduced", 4), 64, **options).native()
        return _plan.cuda_bytes(problem, _plan.plan_cuda(problem, FACTS["sm_90"]), 1)["tensor"] / (64 * 64 * 2)

    for residual in (False, True):
        assert passes(norm="batch", residual=residual) == passes(norm="given", residual=residual) == 3 + residual
        assert passes(norm="batch", residual=residual, reduced=0) == 3 + residual
        assert passes(norm="given", residual=residual, reduced=0) == 2 + residual
        for relu in (False, True):
            options = {"residual": residual, "relu": relu, "backward": True}
            assert passes(norm="batch", **options) == 5 + (residual and relu)
            assert passes(norm="given", **options) == 4 + (residual and relu)


# ---------------------------------------------------------------------------------------------------- limits, words


def test_workspace_of_tails():
    """Moments or parts, shares, and backward what the launches between the sweeps make, in multiples of 4 floats."""

    def size(strategy, **changes):
        sizes = {"n": 3, "channels": 40, "reduced": 10, "positions": 42, "norm": "batch", **changes}
        native = cuda.Problem(**sizes).native()
        plan = next(p for p in _plan.cuda_candidates(native, FACTS["sm_90"]) if p.strategy == strategy)
        assert plan.splits == 1 and plan.channels >= 40
        return _plan.cuda_tail_workspace(native, plan)

    vectors, shares = 3 * 40, 60  # forward 2 blocks of 32 channels, each with 3 x 10 floats
    for strategy in ("partials", "last_block", "launches"):
        assert size(strategy) == 3 * vectors + shares
        assert size(strategy, norm="given") == vectors + shares
        for norm in ("batch", "given"):
            last = 32 if strategy == "last_block" else 0
            assert size(strategy, norm=norm, backward=True) == 3 * vectors + 32 + last + vectors + 2 * 40
    assert size("partials", reduced=0) == 3 * vectors
    assert size("partials", reduced=0, norm="given") == 0
    assert size("partials", reduced=0, backward=True) == 2 * vectors + 2 * 40


def test_counters():
    """Backward for the groups of the first sweep's tiles, forward of a tail for those that are brought together."""

    def count(strategy, **options):
        native = cuda.Problem(20, 2048, 128, 49, **options).native()
        plan = next(p for p in _plan.cuda_candidates(native, FACTS["sm_90"]) if p.strategy == strategy)
        return _plan.cuda_counters(native, plan), -(-20 // plan.samples)

    for options in ({}, {"backward": True}, {"backward": True, "norm": "batch"}):
        found, groups = count("last_block", **options)
        assert found == groups
        assert count("partials", **options)[0] == count("launches", **options)[0] == 0
    assert count("last_block", norm="batch")[0] == count("last_block", norm="given")[0] == 3


def test_a_tail_that_there_is_not():
    for changes, message in (
        ({"squeeze": "max"}, "block tails squeeze by the mean"),
        ({"reduced": -1}, "channels, reduced and positions >= 1"),
    ):
        with pytest.raises(ValueError, match=message):
            cuda.Problem(**{"n": 3, "channels": 8, "reduced": 2, "positions": 4, "norm": "batch", **changes}).native()
    with pytest.raises(ValueError, match="unknown norm"):
        _plan.CudaProblem(3, 8, 2, 4, norm=3)


def test_reasons_of_tails():
    def why(*sizes, **options):
        problem = cuda.Problem(*sizes, **options).native()
        return _plan.cuda_reason(problem, FACTS["sm_90"], _plan.plan_cuda(problem, FACTS["sm_90"]))

    assert why(64, 256, 0, 3136, norm="batch").startswith("without a gate there are no shares; 256 bytes of each pixel")
    assert "of the tensor's bytes beside it, against " in why(64, 2048, 128, 49, norm="batch")


def test_workspace():
    """parts + shares (+ what is needed and not kept), each a multiple of 4 floats."""

    def size(strategy, kept, gate, **changes):
        problem = cuda.Problem(**{"n": 3, "channels": 40, "reduced": 10, "positions": 42, **changes})
        plans = _plan.cuda_candidates(problem.native(), FACTS["sm_90"])
        plan = next(p for p in plans if p.strategy == strategy)
        return _plan.cuda_workspace(problem.native(), plan, kept, gate) - 3 * (
            (1 if strategy == "launches" else tiles(problem, plan)) * 10 + 2 / 3
        )

    assert size("partials", True, True) == size("partials", False, True) == 0
    assert size("last_block", True, True) == 0 and size("last_block", False, True) == 32
    assert size("launches", True, True) == 0 and size("launches", True, False) == 3 * 40
    assert size("launches", False, False) == 2 * 3 * 40
    assert size("launches", True, True, squeeze="max") == 3 * 3 * 40
    assert size("partials", True, True, backward=True) == 3 * 40
    assert size("last_block", True, True, backward=True) == 3 * 40 + 32
    assert size("launches", True, True, backward=True) == 2 * 3 * 40
    assert size("launches", True, False, backward=True) == 3 * 40


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"samples": 9}, "a tile has 1 to 8 samples"),
        ({"channels": 20}, "a multiple of 8 channels"),
        ({"samples": 8, "channels": 264}, "at most 2048 of both"),
    ],
)
def test_a_plan_that_the_kernels_cannot_carry_out(changes, message):
    problem = cuda.Problem(3, 512, 10, 42).native()
    with pytest.raises(ValueError, match=message):
        _plan.plan_cuda(problem, FACTS["sm_90"]).replace(problem, **changes)


@pytest.mark.parametrize(
    "sizes", [(-1, 1, 1, 1), (1, 0, 1, 1), (1, 1, 0, 1), (1, 1, 1, 0), (1, 1, 1, 1, 8), (1, 1, 1, 1, 2, 1)]
)
def test_sizes_that_no_layer_has(sizes):
    with pytest.raises(ValueError, match="n must be >= 0, channels, reduced and positions >= 1, element_size"):
        cuda.Problem(*sizes).native()


def test_facts_that_no_gpu_has():
    for facts in ((75, 40, 65536, 0), (90, 0, 65536, 0), (90, 1, 1024, 0), (90, 1, 65536, -1)):
        with pytest.raises(ValueError, match="capability must be 80 or more"):
            _plan.CudaFacts(*facts)


def test_reasons():
    def why(*sizes, **options):
        problem = cuda.Problem(*sizes, **options).native()
        return _plan.cuda_reason(problem, FACTS["sm_90"], _plan.plan_cuda(problem, FACTS["sm_90"]))

    assert why(64, 2048, 128, 49) == (
        "33 % of the tensor's bytes beside it, against 69 % by partials, 50 % by launches; "
        "128 bytes of each pixel to a tile"
    )
    assert why(64, 2048, 128, 49, channels_last=False).endswith(
        "planes of 98 bytes break 16-byte alignment, 296 together do not"
    )
    assert why(64, 256, 16, 3136, squeeze="max") == (
        "the maximum of a plane is not a sum of shares; 256 bytes of each pixel to a tile"
    )
    assert why(64, 256, 16, 3136, channels_last=False).endswith("; 32 threads to a plane")
