"""The CUDA kernels against the float64 oracle: on a GPU where there is one, else run on the host.

All fresh memory is NaN, and every case proves that the kernels ran. Plans are those of an H200 unless a test brings its
own: the tiles are real ones, only the tensors are small.
"""

from __future__ import annotations

import itertools
import math
import re
from pathlib import Path

import pytest
import tail_oracle
import torch
from cuda_runner import (  # noqa: F401
    PROBLEM,
    cuda_kernels,
    expected_launches,
    host,
    launches,
    planning,
    run,
    run_tail,
)
from gpu_contract import *  # noqa: F403
from gpu_contract import DEVICE, DTYPES, STRATEGIES, name_of, option_cases
from oracle import ACTS, Case, check, draw
from tail_oracle import Tail

from senet_fused.backends import cuda

pytestmark = [
    pytest.mark.skipif(PROBLEM is not None, reason=str(PROBLEM)),
    pytest.mark.usefixtures("cuda_kernels", "poisoned"),
]
ON_HOST = pytest.mark.skipif(DEVICE == "cuda", reason="launches are counted, and scheduled at will, on the host")
# The tiles of the planner, by a case that has them in every dtype (but for the third, whose planes are aligned to half
# a pack in float32 alone, and break alignment in 16 bits).
KINDS = {
    "channels_last": Case((3, 40, 6, 7), 10, torch.bfloat16, "channels_last"),
    "planes": Case((2, 40, 6, 8), 10, torch.bfloat16),
    "planes of 36": Case((2, 40, 6, 6), 10, torch.float32),
    "tile_of_planes": Case((2, 40, 5, 5), 10, torch.float16),
    "tile_of_planes of 49": Case((3, 64, 7, 7), 8, torch.bfloat16),
}


def form_of(case: Case) -> str:
    """As the planner has it for planes that are small enough to be staged."""
    if case.layout == "channels_last":
        return "channels_last"
    aligned = math.prod(case.shape[2:]) * case.dtype.itemsize % 16 == 0
    return "planes" if aligned else "tile_of_planes"


@pytest.fixture(name="run")
def _run():
    return run


@pytest.fixture
def backend_name():
    return "cuda"


# ---------------------------------------------------------------------------------------------------- options


@pytest.mark.parametrize("act", ACTS)
def test_options(act):
    for case, strategy in option_cases(act):
        with cuda.using(planning(strategy)):
            check(case, draws=1, ours=run)


# ---------------------------------------------------------------------------------------------------- strategies

# Several blocks of channels, several samples a tile where the form has them, partial tiles on every edge.
TILES = {
    "channels_last": {"samples": 2, "channels": 32, "positions": 42},
    "channels_last, split": {"samples": 2, "channels": 32, "positions": 15},
    "channels_last, a pixel to a split": {"samples": 8, "channels": 16, "positions": 1},
    "planes": {"channels": 24, "positions": 48, "lanes": 8},
    "planes, a block to a plane": {"channels": 3, "positions": 48, "lanes": 256},
    "planes, a thread to a plane": {"channels": 40, "positions": 48, "lanes": 1},
    "planes, split": {"channels": 1, "positions": 16, "lanes": 32},
    "planes of 36": {"channels": 9, "lanes": 4},
    "tile_of_planes": {"channels": 24, "lanes": 4},
    "tile_of_planes, one thread each": {"channels": 16, "lanes": 1},
    "tile_of_planes of 49": {"channels": 40, "lanes": 32},
    "tile_of_planes of 49, one that breaks alignment itself": {"channels": 9, "lanes": 2},
}


@pytest.mark.parametrize("post_act", [None, "relu"])
@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("tile", TILES)
def test_every_strategy_with_every_tile(tile, strategy, dtype, post_act):
    case = KINDS[tile.partition(",")[0]].replace(dtype=dtype, residual=post_act is not None, post_act=post_act)
    case = case.replace(act="silu", through="both")
    if DEVICE == "cpu":
        launches()
    with cuda.using(planning(strategy, **TILES[tile])):
        check(case, draws=1, ours=run)
    if DEVICE == "cpu":
        found, once = launches(), expected_launches(form_of(case), strategy)
        assert found.keys() == once.keys() and len(set(found.values())) == 1


@pytest.mark.parametrize("squeeze", ["max", "avgmax"])
@pytest.mark.parametrize("tile", TILES)
def test_maxima_with_every_tile(tile, squeeze):
    case = KINDS[tile.partition(",")[0]].replace(squeeze=squeeze, post_act="relu", residual=True)
    with cuda.using(planning(**TILES[tile])):
        check(case, draws=1, ours=run)


@pytest.mark.parametrize("shape", [(2, 9, 33, 35), (1, 6, 71, 73), (2, 5, 3, 4099)], ids=name_of)
@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
def test_large_planes_that_break_alignment(shape, dtype):
    """Too large to be staged: whole packs inside of a plane, its ends one by one."""
    for options in ({}, {"post_act": "relu", "residual": True, "squeeze": "avgmax"}):
        check(Case(shape, 3, dtype, **options), draws=1, ours=run)


@pytest.mark.parametrize("reduced", [255, 256, 257, 300, 520])
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_wide_bottlenecks(strategy, reduced):
    """More squeezed channels than are worked on at a time."""
    for layout in ("channels_last", "contiguous"):
        case = Case((3, 48, 2, 4), reduced, torch.bfloat16, layout, act="gelu", through="both")
        with cuda.using(planning(strategy, **({"samples": 2} if layout == "channels_last" else {}))):
            check(case, draws=1, ours=run)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_many_samples(strategy):
    """More than the weight gradients and the excitation's launches take at a time."""
    case = Case((37, 24, 2, 3), 6, torch.float16, "channels_last", act="silu", through="both")
    with cuda.using(planning(strategy, samples=4)):
        check(case, draws=1, ours=run)


# ---------------------------------------------------------------------------------------------------- schedules


@ON_HOST
@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("kind", KINDS)
def test_no_schedule_changes_a_bit(kind, strategy):
    """Threads and blocks in six random orders: a race, or a sum whose order is not fixed, would show."""
    case = KINDS[kind].replace(post_act="relu", residual=True, through="both")
    inputs = draw(case, 0)
    with cuda.using(planning(strategy)):
        for seed in range(6):
            host().senet_host_seed(seed)
            found = run(case, inputs)
            if seed == 0:
                expected = found
            for name, t in expected.items():
                assert torch.equal(found[name], t), (seed, name)


@ON_HOST
def test_every_kernel_runs():
    """What the host files can launch, a layer or a block tail of some form launches with some strategy."""
    sources = (Path(__file__).resolve().parents[1] / "csrc" / "cuda").glob("*.cu")
    known = {name for path in sources for name in re.findall(r'"(\w+_kernel)"', path.read_text())}
    launches()
    for strategy, kind in itertools.product(STRATEGIES, ("channels_last", "planes", "tile_of_planes")):
        case = KINDS[kind]
        tail = Tail(case.shape, case.reduced, case.dtype, case.layout)
        with cuda.using(planning(strategy)):
            run(case, draw(case, 0))
            run_tail(tail, tail_oracle.draw(tail, 0))
    assert set(launches()) == known


@ON_HOST
@pytest.mark.parametrize(
    ("changes", "forward", "backward"),
    [({}, 2, 2), ({"strategy": "last_block"}, 2, 2), ({"strategy": "launches"}, 4, 4)],
    ids=["partials", "last_block", "launches"],
)
def test_launches_of_a_call(changes, forward, backward):
    case = KINDS["channels_last"]
    with cuda.using(planning(changes.get("strategy", "partials"))):
        launches()
        run(case, draw(case, 0))
        found = launches()
    assert sum(found.values()) == forward + backward
    assert sum(count for name, count in found.items() if "backward" not in name) == forward
