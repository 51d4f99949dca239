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
def test_what_holds_for_every_plan(facts):
    for problem in problems():
        native = problem.native()
        found = _plan.cuda_candidates(native, facts)
        assert found[0].numbers() == _plan.plan_cuda(native, facts).numbers()
        for plan in found:
            assert plan.replace(native).numbers() == plan.numbers()
            assert plan.splits * plan.positions >= problem.positions > (plan.splits - 1) * plan.positions
            assert problem.squeeze == "avg" or plan.strategy == "launches"
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
        for large, small in zip(problems(64), problems(1), strict=True):
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
    compared = set()
    for problem in problems():
        for plan in _plan.cuda_candidates(problem.native(), FACTS["sm_90"]):
            form = "channels_last" if plan.form == "channels_last" else "planes"
            tile = triton_plan.Tile(form, plan.samples, plan.channels, 1, plan.positions, plan.splits, 8)
            same = triton_plan.Problem(*problem[1:])
            expected = triton_plan.count_bytes(same, tile, plan.strategy, batch=48)
            assert _plan.cuda_bytes(problem.native(), plan, 48) == expected, (problem, plan)
            compared.add((plan.strategy, form))
    assert len(compared) == 6


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


# ---------------------------------------------------------------------------------------------------- limits, words


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
