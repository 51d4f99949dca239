"""The Triton planner: pure Python, tested without triton and without a GPU."""

from __future__ import annotations

import dataclasses
import itertools
import math

import pytest

from senet_fused.backends.triton import plan as planner
from senet_fused.backends.triton.plan import DeviceFacts, Plan, Problem, Tile, candidates, count_bytes, plan
from senet_fused.bench.problems import problems

FACTS = {
    "A100": DeviceFacts("cuda", 80, 108),
    "RTX 3090": DeviceFacts("cuda", 86, 82),
    "L4": DeviceFacts("cuda", 89, 58),
    "H200": DeviceFacts("cuda", 90, 132),
    "B200": DeviceFacts("cuda", 100, 148),
    "MI300X": DeviceFacts("hip", "gfx942", 304, 64),
}
TABLE = [
    Problem(s.channels, s.rd_channels, math.prod(s.spatial), size, size, channels_last, squeeze, relu, relu, backward)
    for p in problems().values()
    for s in p.shapes
    for size, channels_last, squeeze, relu, backward in itertools.product(
        (2, 4), (False, True), ("avg", "max"), (False, True), (False, True)
    )
]
# Behind every layer of the table as if it were a tail, in training and evaluation; some without a gate.
TAILS = [
    dataclasses.replace(p, relu=residual, residual=residual, norm=norm, reduced=reduced)
    for p in TABLE
    if p.squeeze == "avg" and not p.relu
    for residual, norm, reduced in (
        (True, "batch", p.reduced), (False, "batch", p.reduced), (True, "given", p.reduced), (True, "batch", 0),
        (False, "given", 0),
    )
]  # fmt: skip
ODD = [
    Problem(c, r, m, size, 4, channels_last, squeeze)
    for c, r, m in ((1, 1, 1), (24, 1, 1), (3, 2, 2**18), (7, 3, 49), (30, 7, 25), (8, 4, 2**31), (5000, 400, 3))
    for size, channels_last, squeeze in itertools.product((2, 4), (False, True), ("avg", "avgmax"))
]


@pytest.mark.parametrize("device", FACTS)
def test_every_strategy_and_form_is_reached_by_the_problem_table(device):
    plans = [plan(p, FACTS[device]) for p in TABLE]
    wanted = set(planner.STRATEGIES) - ({"last_block"} if device == "MI300X" else set())
    assert {p.strategy for p in plans} == wanted
    assert {p.tile.form for p in plans} == set(planner.FORMS)


@pytest.mark.parametrize("device", FACTS)
def test_every_strategy_is_reached_by_tails(device):
    """Each way, in training and evaluation; without a gate there is nothing to choose."""
    wanted = set(planner.STRATEGIES) - ({"last_block"} if device == "MI300X" else set())
    for backward, norm in itertools.product((False, True), ("batch", "given")):
        tails = [p for p in TAILS if (p.backward, p.norm) == (backward, norm)]
        assert {plan(p, FACTS[device]).strategy for p in tails if p.gated} == wanted
        assert {plan(p, FACTS[device]).strategy for p in tails if not p.gated} == {"partials"}
        assert {plan(p, FACTS[device]).tile.form for p in tails} == {"channels_last", "planes"}


def test_the_strategies_of_senet154s_tails():
    """In bfloat16: shares for the early stages, one block for the last, channels_last; three launches each way."""
    for backward in (False, True):
        found = [
            plan(Problem(s.channels, s.rd_channels, math.prod(s.spatial), relu=True, residual=True, backward=backward,
                         norm="batch"), FACTS["H200"]).strategy
            for s in problems()["senet154"].shapes
        ]  # fmt: skip
        assert found == ["partials", "partials", "partials", "last_block"]


def test_the_strategies_of_senet154():
    """In bfloat16, as counted: shares for the early stages, one block for the last; launches where tiles are single."""
    found = {}
    for s in problems()["senet154"].shapes:
        for channels_last in (True, False):
            p = Problem(s.channels, s.rd_channels, math.prod(s.spatial), channels_last=channels_last)
            chosen = plan(p, FACTS["H200"])
            found[s.channels, channels_last] = chosen.strategy, chosen.tile.form
    assert found == {
        (256, True): ("partials", "channels_last"),
        (512, True): ("partials", "channels_last"),
        (1024, True): ("partials", "channels_last"),
        (2048, True): ("last_block", "channels_last"),
        (256, False): ("partials", "planes"),
        (512, False): ("partials", "planes"),
        (1024, False): ("launches", "rows"),
        (2048, False): ("launches", "rows"),
    }


@pytest.mark.parametrize("device", FACTS)
def test_a_plan_covers_the_problem(device):
    """Every position once, blocks that are powers of two, and threads that fit a block."""
    facts = FACTS[device]
    for p in (*TABLE, *TAILS[::7], *ODD):
        for chosen in candidates(p, facts):
            t = chosen.tile
            case = f"{p} {chosen}"
            assert 64 <= t.warps * facts.warp_size <= 1024, case
            if t.form == "rows":
                assert p.channels % t.row_channels == 0 and t.row_channels * p.positions % 8 == 0, case
                assert t.steps * t.positions >= t.row_channels * p.positions, case
                continue
            for size in (t.samples, t.channels, t.positions):
                assert size == 1 << (size.bit_length() - 1), case
            covered = t.positions * t.steps * t.splits
            assert covered - t.positions * t.steps < p.positions <= covered, case
            assert t.samples * t.channels * t.positions <= 2**17, case


def test_tiles_are_wide_and_near_the_size_that_is_aimed_at():
    for p in TABLE:
        t = plan(p, FACTS["H200"]).tile
        if t.form == "channels_last" and p.channels * p.element_size >= 256:
            assert t.channels * p.element_size >= 128, p
        if t.form != "rows":
            read = t.samples * t.channels * t.positions * t.steps * p.element_size
            assert read <= 2 * planner.TILE_BYTES, p


def test_the_batch_has_no_say():
    """A sample's bits must not depend on its batch, so a problem does not know it."""
    assert not {"n", "batch", "samples"} & {field.name for field in dataclasses.fields(Problem)}


def test_rows_where_they_help_only():
    facts = FACTS["H200"]
    p = Problem(2048, 128, 49, channels_last=False)
    assert plan(p, facts).tile.form == "rows"
    without = {
        "float32": dataclasses.replace(p, element_size=4),
        "a bit mask by planes": dataclasses.replace(p, relu=True),
        "no sum": dataclasses.replace(p, squeeze="max"),
        "aligned already": dataclasses.replace(p, positions=64),
        "samples not aligned": dataclasses.replace(p, channels=2052),
        "large planes": dataclasses.replace(p, positions=2025),
    }
    for why, other in without.items():
        assert plan(other, facts).tile.form == "planes", why
    assert plan(p, DeviceFacts("cuda", 75, 40)).tile.form == "planes"


def test_max_is_planned_as_launches():
    assert {plan(p, FACTS["H200"]).strategy for p in (*TABLE, *ODD) if p.squeeze != "avg"} == {"launches"}


def test_the_cheapest_comes_first_and_says_why():
    for p in (*TABLE[::7], *TAILS[::7]):
        plans = candidates(p, FACTS["H200"])
        costs = [planner.cost(p, c.tile, c.strategy, FACTS["H200"]) for c in plans]
        assert costs == sorted(costs)
        for chosen in plans:
            assert "tiles of " in chosen.reason
            if chosen.tile.form != "rows" and p.squeeze == "avg" and p.gated:
                assert "of the tensor's bytes beside it" in chosen.reason


def test_dependent_launches_from_hopper_on():
    assert [name for name, facts in FACTS.items() if facts.dependent_launch] == ["H200", "B200"]


def test_counted_bytes_by_hand():
    """SENet-154's last stage at batch 64 in bfloat16, tiles of 8 samples x 64 channels."""
    p = Problem(2048, 128, 49)
    tile = Tile("channels_last", 8, 64, 8, 7, 1, 8)
    tensor = 64 * 2048 * 49 * 2
    blocks, weights, shares = 32, 2048 * 128 * 2, 64 * 128 * 4
    last = count_bytes(p, tile, "last_block", 64)
    assert last["tensor"] == 3 * tensor and last["mask"] == 0
    assert last["weights"] == 2 * 8 * weights
    assert last["shares"] == shares * blocks * 2 + shares * (1 + blocks)
    partials = count_bytes(p, tile, "partials", 64)
    assert partials["shares"] == shares * blocks * (1 + blocks)
    backward = dataclasses.replace(p, backward=True, relu=True, residual=True)
    counted = count_bytes(backward, tile, "partials", 64)
    assert counted["tensor"] == 5 * tensor and counted["mask"] == 2 * tensor // 16
    forward = dataclasses.replace(p, relu=True, residual=True)
    assert count_bytes(forward, tile, "partials", 64)["tensor"] == 4 * tensor


def test_counted_bytes_of_a_tail_by_hand():
    """SENet-154's last stage at batch 64 in bfloat16, tiles of 8 samples x 64 channels: 64 blocks of 32 channels and 4
    groups of 16 samples between the sweeps forward; 32 blocks of 64 channels backward."""
    p = Problem(2048, 128, 49, relu=True, residual=True, norm="batch")
    tile = Tile("channels_last", 8, 64, 8, 7, 1, 8)
    tensor = 64 * 2048 * 49 * 2
    vectors, weights, shares = 64 * 2048 * 4, 2048 * 128 * 2, 64 * 128 * 4
    assert count_bytes(p, tile, "last_block", 64) == {
        "tensor": 4 * tensor,
        "mask": tensor // 16,
        "vectors": vectors * (3 * (1 + 4) + 2),
        "weights": weights * (4 + 8),
        "shares": shares * (64 * 2 + 1 + 32),
    }
    assert count_bytes(p, tile, "partials", 64)["shares"] == shares * 64 * (1 + 32)
    assert count_bytes(p, tile, "launches", 64)["weights"] == weights * (4 + 4)
    backward = dataclasses.replace(p, backward=True)
    assert count_bytes(backward, tile, "last_block", 64) == {
        "tensor": 6 * tensor,
        "mask": 2 * tensor // 16,
        "vectors": vectors * (2 * 3 + 2),
        "weights": weights * (4 + 8),
        "shares": shares * (32 * 2 + 1 + 32),
    }
    assert count_bytes(backward, tile, "launches", 64)["shares"] == shares * 16 * (1 + 32)
    given = dataclasses.replace(p, norm="given", reduced=0)
    assert count_bytes(given, tile, "partials", 64) == {
        "tensor": 3 * tensor, "mask": tensor // 16, "vectors": 0, "weights": 0, "shares": 0
    }  # fmt: skip
    assert count_bytes(dataclasses.replace(given, backward=True), tile, "partials", 64)["tensor"] == 5 * tensor


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"norm": "layer"}, r"norm must be one of \('', 'batch', 'given'\), got 'layer'"),
        ({"norm": "batch", "squeeze": "max"}, "a block tail squeezes by 'avg', got 'max'"),
        ({"reduced": 0}, r"reduced must be positive \(0 for a block tail without a gate\), got 0"),
        ({"reduced": -1, "norm": "given"}, "got -1"),
    ],
)
def test_a_problem_that_makes_no_sense_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        Problem(**{"channels": 8, "reduced": 4, "positions": 49, **changes})


def test_a_plan_that_makes_no_sense_is_refused():
    tile = Tile("channels_last", 1, 64, 8, 7, 1, 8)
    with pytest.raises(ValueError, match="expected a strategy of"):
        Plan("guess", tile, "")
    with pytest.raises(ValueError, match="and a form of"):
        Plan("partials", dataclasses.replace(tile, form="cubes"), "")
