"""The Triton kernels compiled for real GPUs, where there is none: no spills, room for two blocks, wide accesses, and
what is launched.

Held by what is recorded of them; and compiling gives what is recorded, which is tried when the sources have changed: in
one process per target, in which TRITON_INTERPRET is not set, since triton reads it when it is imported.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import aot_record
import pytest

from senet_fused.backends import triton

HERE = Path(__file__).resolve().parent
WRITE = "python tests/triton_aot/compile.py --write records what is new"
TARGETS = ("sm_80", "sm_90", "sm_100", "gfx942")
RECORDED = json.loads((HERE / "triton_aot" / "resources.json").read_text(encoding="utf-8"))


COMPILER = f"triton {metadata.version('triton')}" if triton._INSTALLED else None


def output_of(script: str, *arguments: str) -> dict:
    """Skips where it would tell nothing new."""
    if COMPILER is None:
        pytest.skip("triton is not installed")
    if aot_record.tells_all(RECORDED, aot_record.TRITON_SOURCES, COMPILER):
        pytest.skip("sources and compiler are the record's (SENET_AOT=1 compiles all the same)")
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join(sys.path)
    command = [sys.executable, str(HERE / "triton_aot" / script), *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=1500)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout)


def check_launches(found: dict) -> None:
    """Which kernels a call launches, in how many programs, and that all but the first may begin early."""
    assert found["loads_before_waiting"] == []
    for layer, launched in found.items():
        if layer == "loads_before_waiting":
            continue
        half = 4 if layer in ("launches", "rows") else 3 if layer.startswith("tail") else 2
        assert len(launched) == 2 * half, layer
        assert [pdl for _, _, pdl in launched] == ([False] + [True] * (half - 1)) * 2, layer
        assert all(programs > 0 for _, programs, _ in launched), layer


def test_recorded_launches():
    assert len(RECORDED["launches"]) == 8
    check_launches(RECORDED["launches"])


@pytest.mark.compiler
def test_a_second_call_launches_what_the_first_did():
    """Without triton.jit's help, to the last argument; and what depends on a launch before it may begin early."""
    found = output_of("launch_twice.py")
    check_launches(found)
    if COMPILER == RECORDED["compiler"]:
        assert found == RECORDED["launches"], WRITE


def kernels(table: dict, target: str):
    for layer, targets in table["layers"].items():
        for name, used in targets[target]["kernels"].items():
            yield layer, name, used


@pytest.mark.parametrize("target", TARGETS)
def test_recorded_kernels_do_not_spill(target):
    assert [(layer, name) for layer, name, used in kernels(RECORDED, target) if used["spills"]] == []


# A layer takes seconds to compile: all of them for one target, and a quarter of them for each of the others.
SHARE = {target: 1 if target == "sm_90" else 4 for target in TARGETS}


@pytest.mark.compiler
@pytest.mark.parametrize(
    ("target", "every"),
    [*SHARE.items(), *(pytest.param(target, 1, marks=pytest.mark.slow) for target in TARGETS if SHARE[target] > 1)],
)
def test_resources(target, every):
    """Every kernel compiles. With the triton that the record was made with: exactly as recorded. None spills."""
    same = COMPILER == RECORDED["compiler"]
    if target != "sm_90" and not same:
        pytest.skip(f"the record is of {RECORDED['compiler']}; with other releases sm_90 alone is compiled")
    table = output_of("compile.py", "--quiet", "--target", target, "--every", str(every))
    if every == 1:
        assert table["layers"].keys() == RECORDED["layers"].keys()
    assert len(table["layers"]) == -(-len(RECORDED["layers"]) // every)
    spilled = [(layer, name, used["spills"]) for layer, name, used in kernels(table, target) if used["spills"]]
    # Other releases of triton schedule otherwise: a spilled register or two is no failure of theirs.
    assert not [entry for entry in spilled if same or entry[2] > 64], spilled
    if same:
        different = {
            f"{layer}, {name}": (used, RECORDED["layers"][layer][target]["kernels"].get(name))
            for layer, name, used in kernels(table, target)
            if used != RECORDED["layers"][layer][target]["kernels"].get(name)
        }
        assert not different, WRITE


@pytest.mark.parametrize("target", TARGETS)
def test_the_record_reaches_every_strategy_and_kernel(target):
    strategies = {s for layer in RECORDED["layers"].values() for s in layer[target]["strategies"]}
    assert strategies == {"partials", "launches"} | ({"last_block"} if target != "gfx942" else set())
    assert {name for _, name, _ in kernels(RECORDED, target)} == {
        "squeeze_kernel", "scale_kernel", "squeeze_backward_kernel", "scale_backward_kernel", "rows_squeeze_kernel",
        "rows_scale_kernel", "rows_squeeze_backward_kernel", "excite_push_kernel", "excite_gate_kernel",
        "excite_push_backward_kernel", "excite_backward_kernel", "tail_moments_kernel", "tail_excite_kernel",
        "tail_scale_kernel", "tail_sums_kernel", "tail_excite_backward_kernel", "tail_scale_backward_kernel",
    }  # fmt: skip


SWEEPS = ("squeeze", "scale", "rows_", "tail_moments", "tail_scale", "tail_sums")


@pytest.mark.parametrize("target", TARGETS)
def test_sixteen_bytes_at_a_time(target):
    """Where the layout allows it, sweeps read and write the tensor so: the widest access is 16 bytes, in each of them.
    In contiguous planes of 49 it allows it as rows of planes only, which float32 and masked layers do not have."""
    wide = "dwordx4" if target == "gfx942" else "128"
    seen = set()
    for layer, name, used in kernels(RECORDED, target):
        sizes, _, layout = layer.partition(" ")
        aligned = "channels_last" in layout or "@56" in sizes or "@28" in sizes or "float32" in layout
        rows = name.startswith("rows")
        # 30 channels of bfloat16 are 60 bytes, 49 floats 196.
        if sizes.startswith("30/") or (sizes.endswith("@7x7") and "float32" in layout and "contiguous" in layout):
            continue
        if name.startswith(SWEEPS) and (aligned or rows):
            assert used["loads"].get(wide, 0) > 0, f"{layer}: {name} {used['loads']}"
            seen.add(name)
            if "scale" in name and "no dx" not in layer:
                assert used["stores"].get(wide, 0) > 0, f"{layer}: {name} {used['stores']}"
    assert len(seen) == 11


def test_registers_leave_room_for_two_blocks_on_nvidia():
    for target in TARGETS[:3]:
        for layer, name, used in kernels(RECORDED, target):
            limit = 255 if "excite" in name else 128
            assert used["registers"] <= limit, f"{target}, {layer}: {name}"
            assert used["shared"] <= 48 * 1024, f"{target}, {layer}: {name}"
