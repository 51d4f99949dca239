"""The CUDA kernels as compiled for real GPUs, where there is none: no spills, room for two blocks, wide accesses.

Held by what is recorded of them; and compiling gives what is recorded, which is tried when the sources have changed.
"""

from __future__ import annotations

import itertools
import json
import sys
from pathlib import Path

import aot_record
import cuda_library
import pytest
from test_cuda_plan import FACTS

from senet_fused.backends import cuda

sys.path.insert(0, str(Path(__file__).resolve().parent / "cuda_aot"))
import resources as tool  # noqa: E402

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


Table = dict[str, dict[str, dict]]


def every_kernel_is_there(table: Table) -> None:
    for architecture, kernels in table.items():
        assert set(kernels) == SWEEPS | EXCITE, architecture


def nothing_spills(table: Table) -> None:
    for architecture, kernels in table.items():
        assert {name: used["spills"] for name, used in kernels.items() if used["spills"]} == {}, architecture


def sixteen_bytes_at_a_time(table: Table) -> None:
    """Every sweep has 16-byte loads or copies, every second sweep 16-byte stores."""
    for architecture, name in itertools.product(table, SWEEPS):
        used = table[architecture][name]
        if "tile_of_planes" in name:
            assert used["copies"].get("128", 0) > 0, (architecture, name, used)
        else:
            in_flight = 2 if "float32" in name else 4  # packs under way per thread, of two or one 16-byte vectors
            wanted = in_flight * (2 if "float32" in name else 1)
            assert used["loads"].get("128", 0) >= wanted, (architecture, name, used)
        if not name.startswith(FIRST_SWEEPS):
            assert used["stores"].get("128", 0) > 0, (architecture, name, used)


def loads_of_the_excitation_do_not_wait_for_each_other(table: Table) -> None:
    """Between the loads of shares, and between those of 16-bit weights, stands nothing that uses them."""
    for architecture, name in itertools.product(table, SWEEPS | EXCITE):
        runs = table[architecture][name]["runs"]
        peak = name.endswith(" peak")
        if not peak and not name.startswith(NO_SHARES):
            assert runs["shares"] >= 4, (architecture, name, runs)
        if not peak and not name.startswith(NO_WEIGHTS):
            assert runs["weights"] >= (4 if name in EXCITE else 2), (architecture, name, runs)


def moments_of_a_batch_do_not_wait_for_each_other(table: Table) -> None:
    """Three vectors of four rows each are under way before the first is used."""
    for architecture, kernels in table.items():
        assert kernels["tail_excite_kernel"]["runs"]["shares"] >= 12, architecture


RULES = (
    every_kernel_is_there, nothing_spills, sixteen_bytes_at_a_time, loads_of_the_excitation_do_not_wait_for_each_other,
    moments_of_a_batch_do_not_wait_for_each_other,
)  # fmt: skip


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_recorded(rule):
    rule(RECORDED["architectures"])


def test_recorded_resources():
    """Of the architectures that are built where there is no GPU; two blocks of 256 threads or more fit everywhere."""
    assert set(RECORDED["architectures"]) == {"sm_80", "sm_90", "sm_100"}
    for architecture, kernels in RECORDED["architectures"].items():
        for name, used in kernels.items():
            assert used["registers"] <= 128, (architecture, name)
            # Beside what tiles of planes stage, 48 KiB are all that a launch may take without asking for more.
            staged = 32 * 1024 if "tile_of_planes" in name else 0
            assert used["shared"] + staged <= 48 * 1024, (architecture, name)


@pytest.mark.nvcc
def test_compiled():
    """What is compiled keeps the rules, and by the record's compiler is what is recorded."""
    if (reason := cuda_library.problem()) is not None:
        pytest.skip(reason)
    if tool.cuobjdump() is None:
        pytest.skip("there is no cuobjdump, of a CUDA toolkit or of the triton package")
    if aot_record.tells_all(RECORDED, aot_record.CUDA_SOURCES, cuda_library.compiler()):
        pytest.skip("sources and compiler are the record's (SENET_AOT=1 compiles all the same)")
    built = tool.content()
    assert built["architectures"]
    for rule in RULES:
        rule(built["architectures"])
    if built["compiler"] == RECORDED["compiler"]:
        compared = built["architectures"].keys() & RECORDED["architectures"].keys()
        assert compared, "the library was built for none of the recorded architectures"
        for architecture in compared:
            found, recorded = built["architectures"][architecture], RECORDED["architectures"][architecture]
            different = {name: (found[name], recorded.get(name)) for name in found if found[name] != recorded.get(name)}
            assert not different, "python tests/cuda_aot/resources.py --write records what is new"


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
