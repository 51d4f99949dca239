"""The launch planner: which strategy for which sizes and machine, its limits, and the facts of the build."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import pytest
import torch

import senet_fused
from senet_fused.activations import ACT_NAMES, GATE_NAMES, Activation
from senet_fused.backends import native

if native.problem() is not None:
    pytest.skip(native.problem(), allow_module_level=True)

from senet_fused import _plan

KIB, MIB = 2**10, 2**20
MACHINE = {"threads": 8, "l2_bytes": MIB, "l3_bytes": 32 * MIB}
STRATEGIES = {"serial", "samples", "phases"}


def plan(n: int, c: int, r: int, spatial: int, **facts: object) -> _plan.CpuPlan:
    return _plan.plan_cpu(n, c, r, spatial, **{**MACHINE, **facts})


def sane(p: _plan.CpuPlan, n: int, threads: int) -> bool:
    return (
        p.strategy in STRATEGIES
        and 1 <= p.samples_at_a_time <= max(1, n)
        and 1 <= p.pieces_per_sample <= threads
        and isinstance(p.stream_stores, bool)
        and len(p.reason) > 5
        and p.reason in repr(p)
    )


# ---------------------------------------------------------------------------------------------------- strategies


def test_every_strategy_serves_real_networks():
    """No dead path: the shipped problems, at usual batches and thread counts, reach every strategy both ways."""
    table = json.loads((Path(senet_fused.__file__).parent / "bench" / "problems.json").read_text())
    shapes = [shape for network in table.values() if isinstance(network, dict) for shape in network["shapes"]]
    reached = set()
    for (c, r, h, w, _), n, threads, backward, size in itertools.product(
        shapes, (1, 2, 8, 32, 64), (1, 2, 4, 8, 16), (False, True), (2, 4)
    ):
        p = plan(n, c, r, h * w, threads=threads, backward=backward, element_size=size)
        assert sane(p, n, threads)
        reached |= {(p.strategy, backward), ("stream" if p.stream_stores else "keep", backward)}
    assert reached == set(itertools.product(STRATEGIES | {"stream", "keep"}, (False, True)))


def test_one_thread_is_serial():
    for n in (0, 1, 64):
        p = plan(n, 256, 16, 3136, threads=1)
        assert p.strategy == "serial" and sane(p, n, 1)


def test_little_work_is_serial():
    """Up to 64 KiB of tensor and weights, x and dy counting in the backward."""
    c, r, spatial = 32, 8, 14 * 14
    fits = (64 * KIB - 2 * c * r * 4) // (c * spatial * 4)
    assert plan(fits, c, r, spatial).strategy == "serial"
    assert plan(fits + 1, c, r, spatial).strategy != "serial"
    assert plan(fits, c, r, spatial, backward=True).strategy != "serial"
    assert plan(2 * fits, c, r, spatial, element_size=2).strategy == "serial"


def test_fewer_samples_than_threads_share_each_stage():
    for threads in (2, 3, 8, 128):
        for n in {1, 2, threads - 1} - {threads}:
            p = plan(n, 512, 32, 784, threads=threads)
            assert p.strategy == "phases" and sane(p, n, threads)
            assert n * p.pieces_per_sample >= threads
        assert plan(threads, 512, 32, 784, threads=threads).strategy == "samples"


def test_large_weights_share_each_stage_while_the_batch_is_cached():
    """From 1 MiB of weights read again by the other threads."""
    seven = {"n": 8, "c": 2048, "r": 128, "spatial": 49}
    assert plan(**seven).strategy == "phases"
    assert plan(**seven, l2_bytes=0, l3_bytes=0).strategy == "samples"
    c, r = 512, 256  # 1 MiB of float32 weights
    for threads, reduced, expected in ((2, r, "phases"), (2, r - 1, "samples"), (3, r // 2, "phases")):
        assert plan(16, c, reduced, 49, threads=threads).strategy == expected
    assert plan(16, c, r, 49, threads=2, weight_size=2).strategy == "samples"


def test_samples_at_a_time_cover_the_weights_and_fit_the_caches():
    near = MACHINE["l2_bytes"] // 2 + MACHINE["l3_bytes"] // (2 * MACHINE["threads"])
    n, seen = 16384, set()
    for c, r, spatial in ((256, 16, 784), (512, 64, 49), (1024, 1024, 1), (128, 8, 50_000)):
        for backward in (False, True):
            sample, weights = c * spatial * 4 * (2 if backward else 1), 2 * c * r * 4
            p = plan(n, c, r, spatial, backward=backward)
            assert p.strategy == "samples"
            covering, fitting = -(-weights // sample), max(1, min(n // MACHINE["threads"], near // sample))
            assert p.samples_at_a_time == min(covering, fitting)
            seen.add((covering > 1, fitting > 1, covering > fitting))
    assert {(False, True, False), (True, True, False), (True, True, True), (False, False, False)} <= seen
    assert plan(64, 512, 64, 49, l2_bytes=0, l3_bytes=0).samples_at_a_time == 1


def test_large_outputs_are_streamed():
    at_limit = MACHINE["l3_bytes"] // (4 * 256 * 64 * 4)
    assert not plan(at_limit, 256, 16, 64).stream_stores
    assert plan(at_limit + 1, 256, 16, 64).stream_stores
    assert not plan(at_limit + 1, 256, 16, 64, element_size=2).stream_stores
    fresh = 32 * MIB // (256 * 64 * 4)  # malloc maps new pages for it, which are in a cache when they are written
    assert plan(fresh - 1, 256, 16, 64).stream_stores and not plan(fresh, 256, 16, 64).stream_stores


# ---------------------------------------------------------------------------------------------------- limits


@pytest.mark.parametrize("threads", [1, 2, 64])
@pytest.mark.parametrize("backward", [False, True])
def test_extremes(threads, backward):
    for n, c, r, spatial in (
        (0, 1, 1, 1),
        (0, 2048, 128, 49),
        (1, 1, 1, 1),
        (2**31, 1, 1, 1),
        (1, 2**20, 2**10, 1),
        (1, 1, 1, 2**40),
        (2**20, 2048, 128, 3136),
    ):
        for l2, l3 in ((0, 0), (MIB, 32 * MIB), (2**40, 2**40)):
            p = plan(n, c, r, spatial, threads=threads, backward=backward, l2_bytes=l2, l3_bytes=l3)
            assert sane(p, n, threads)


@pytest.mark.parametrize(
    "bad",
    [
        {"n": -1},
        {"c": 0},
        {"r": 0},
        {"spatial": 0},
        {"spatial": -5},
        {"threads": 0},
        {"element_size": 0},
        {"weight_size": -4},
        {"l2_bytes": -1},
        {"l3_bytes": -1},
    ],
    ids=str,
)
def test_bad_sizes_are_refused(bad):
    with pytest.raises(ValueError, match="plan_cpu"):
        plan(**{"n": 8, "c": 256, "r": 16, "spatial": 49, **bad})


@pytest.mark.parametrize("bad", [{"n": 1.5}, {"n": "8"}, {"c": None}, {"n": 2**63}, {"bogus": 1}], ids=str)
def test_bad_types_are_refused(bad):
    with pytest.raises(TypeError):
        plan(**{"n": 8, "c": 256, "r": 16, "spatial": 49, **bad})


def test_the_machine_has_to_be_named():
    with pytest.raises(TypeError):
        _plan.plan_cpu(8, 256, 16, 49)


def test_plans_depend_on_their_arguments_alone():
    first = repr(plan(8, 256, 16, 784))
    torch.set_num_threads(2)
    assert repr(plan(8, 256, 16, 784)) == first


# ---------------------------------------------------------------------------------------------------- build


def test_build_info():
    info = _plan.build_info()
    assert set(info) == {"version", "revision", "compiler", "instruction_sets", "cuda", "torch_headers"}
    info.pop("revision")  # unknown outside of a git checkout
    assert info["version"] == senet_fused.__version__
    assert all(isinstance(value, str) and value not in ("", "unknown") for value in info.values())
    assert info["instruction_sets"].split()[0] == "baseline"
    assert native.instruction_set() in info["instruction_sets"].split()


def test_functions_have_one_number_in_python_and_cpp():
    """csrc/plan/plan.h lists the functions that senet_fused/activations.py numbers."""
    text = (Path(__file__).resolve().parent.parent / "csrc" / "plan" / "plan.h").read_text()
    names = text.partition("enum class Function")[2].partition("{")[2].partition("}")[0].replace("\n", "").split(",")
    numbered = {name.strip(): code for code, name in enumerate(filter(str.strip, names))}
    ours = {Activation(name).kernel_name: Activation(name).code for name in (*ACT_NAMES, *GATE_NAMES)}
    ours["gelu_tanh"] = Activation("gelu", approximate="tanh").code
    assert numbered == ours
    assert f"kFunctions = {len(ours)};" in text
    squeezes = text.partition("enum class Squeeze")[2].partition("{")[2].partition("}")[0].split(",")
    assert tuple(name.strip() for name in squeezes) == senet_fused.reference.SQUEEZES
