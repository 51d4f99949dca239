"""The CUDA kernels as compiled for real GPUs, where there is none: resources as recorded, no spills, wide accesses."""

from __future__ import annotations

import functools
import itertools
import json
import sys
from pathlib import Path

import pytest
from test_cuda_plan import FACTS

from senet_fused.backends import cuda

sys.path.insert(0, str(Path(__file__).resolve().parent / "cuda_aot"))
if cuda._plan is None or not cuda.LIBRARY.exists():
    pytest.skip("the CUDA library is not built", allow_module_level=True)
import resources as tool  # noqa: E402

if tool.cuobjdump() is None:
    pytest.skip("there is no cuobjdump, of a CUDA toolkit or of the triton package", allow_module_level=True)

RECORDED = json.loads(tool.TABLE.read_text(encoding="utf-8"))
DTYPES = ("float32", "bfloat16", "float16")
FORMS = ("channels_last", "planes", "tile_of_planes")
PEAKS = ("", " peak")
FIRST_SWEEPS = ("squeeze", "squeeze_backward", "tail_moments", "tail_sums")
TAIL_SWEEPS = {
    *(f"{stage}_{form}_kernel {dtype}" for stage in FIRST_SWEEPS[2:] for form in FORMS for dtype in DTYPES),
    *(f"{stage}_{form}_kernel {dtype}" for stage in ("tail_apply", "tail_apply_backward") for form in FORMS[:2]
      for dtype in DTYPES),
}  # fmt: skip
SWEEPS = {
    *TAIL_SWEEPS,
    *(f"squeeze_{form}_kernel {dtype}{peak}" for form in FORMS for dtype in DTYPES for peak in PEAKS),
    *(f"squeeze_backward_{form}_kernel {dtype}" for form in FORMS for dtype in DTYPES),
    *(f"scale_{form}_kernel {dtype}" for form in FORMS[:2] for dtype in DTYPES),
    *(f"scale_backward_{form}_kernel {dtype}{peak}" for form in FORMS[:2] for dtype in DTYPES for peak in PEAKS),
}
EXCITE = {
    "excite_push_kernel", "excite_gate_kernel", "excite_push_backward_kernel", "excite_backward_kernel",
    "tail_excite_kernel", "tail_excite_backward_kernel",
}  # fmt: skip
# What knows nothing of shares, or of weights: with a peak both are the launches' between the sweeps.
NO_SHARES = ("excite_push", "tail_moments", "tail_apply_backward")
NO_WEIGHTS = ("tail_moments", "tail_apply_backward")


@functools.lru_cache(maxsize=1)
def built() -> dict:
    return tool.content()


def test_the_library_has_every_kernel_for_every_architecture():
    assert built()["architectures"]
    for kernels in built()["architectures"].values():
        assert set(kernels) == SWEEPS | EXCITE


def test_nothing_spills():
    for architecture, kernels in built()["architectures"].items():
        assert {name: used["spills"] for name, used in kernels.items() if used["spills"]} == {}, architecture


def test_resources_are_as_recorded():
    if built()["compiler"] != RECORDED["compiler"]:
        pytest.skip(f"the record is of {RECORDED['compiler']}, the library of {built()['compiler']}")
    compared = built()["architectures"].keys() & RECORDED["architectures"].keys()
    assert compared, "the library was built for none of the recorded architectures"
    for architecture in compared:
        found, recorded = built()["architectures"][architecture], RECORDED["architectures"][architecture]
        different = {name: (found[name], recorded.get(name)) for name in found if found[name] != recorded.get(name)}
        assert not different, "python tests/cuda_aot/resources.py --write records what is new"


def test_what_is_recorded():
    """Of the architectures that are built where there is no GPU; two blocks of 256 threads or more fit everywhere."""
    assert set(RECORDED["architectures"]) == {"sm_80", "sm_90", "sm_100"}
    for architecture, kernels in RECORDED["architectures"].items():
        assert set(kernels) == SWEEPS | EXCITE
        for name, used in kernels.items():
            assert used["spills"] == 0 and used["registers"] <= 128, (architecture, name)
            # Beside what tiles of planes stage, 48 KiB are all that a launch may take without asking for more.
            staged = 32 * 1024 if "tile_of_planes" in name else 0
            assert used["shared"] + staged <= 48 * 1024, (architecture, name)


def test_the_planner_knows_what_staging_leaves():
    """Its tiles and the kernels' own arrays fit into 48 KiB together, for every generation."""
    sizes = ((49, 2, False), (49, 2, True), (196, 2, True), (225, 4, True), (9, 4, False))
    for facts, (positions, size, backward), norm in itertools.product(FACTS.values(), sizes, ("", "batch", "given")):
        problem = cuda.Problem(8, 2048, 128, positions, size, size, False, backward=backward, norm=norm)
        plan = cuda._plan.plan_cuda(problem.native(), facts)
        assert plan.form == "tile_of_planes"
        stage = FIRST_SWEEPS[2 * (norm != "") + backward]
        name = f"{stage}_tile_of_planes_kernel {'float32' if size == 4 else 'bfloat16'}"
        own = RECORDED["architectures"]["sm_90"][name]["shared"]
        assert (1 + backward) * plan.channels * positions * size + 16 * (1 + backward) + own <= 48 * 1024


def test_sixteen_bytes_at_a_time():
    """Every sweep has 16-byte loads or copies, every second sweep 16-byte stores."""
    architecture = "sm_90" if "sm_90" in built()["architectures"] else next(iter(built()["architectures"]))
    found = tool.accesses(architecture)
    assert set(found) == SWEEPS | EXCITE
    for name in SWEEPS:
        counted = found[name]
        if "tile_of_planes" in name:
            assert counted["copy 128"] > 0, (name, counted)
        else:
            in_flight = 2 if "float32" in name else 4  # packs under way per thread, of two or one 16-byte vectors
            assert counted["load 128"] >= in_flight * (2 if "float32" in name else 1), (name, counted)
        if not name.startswith(FIRST_SWEEPS):
            assert counted["store 128"] > 0, (name, counted)


def test_loads_of_the_excitation_do_not_wait_for_each_other():
    """Between the loads of shares, and between those of 16-bit weights, stands nothing that uses them."""
    architecture = "sm_90" if "sm_90" in built()["architectures"] else next(iter(built()["architectures"]))
    runs = tool.longest_runs(architecture, ("LDG.E.128.STRONG", "LDG.E.64.CONSTANT"))
    for name in sorted(SWEEPS | EXCITE):
        shares, weights = runs[name]
        peak = name.endswith(" peak")
        if not peak and not name.startswith(NO_SHARES):
            assert shares >= 4, (name, shares)
        if not peak and not name.startswith(NO_WEIGHTS):
            assert weights >= (4 if name in EXCITE else 2), (name, weights)


def test_moments_of_a_batch_do_not_wait_for_each_other():
    """Three vectors of four rows each are under way before the first is used."""
    architecture = "sm_90" if "sm_90" in built()["architectures"] else next(iter(built()["architectures"]))
    (loads,) = tool.longest_runs(architecture, ("LDG.E.128.STRONG",))["tail_excite_kernel"]
    assert loads >= 12, loads
