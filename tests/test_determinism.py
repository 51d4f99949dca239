"""The same bits from run to run, for any number of threads, for a sample alone or in a batch; every instruction set."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
from pathlib import Path

import isa_run
import pytest
import torch
from oracle import DTYPES, Case, Tensors, draw, run_counted

from senet_fused.backends import native

if native.problem() is not None:
    pytest.skip(native.problem(), allow_module_level=True)

from senet_fused import _plan

DENSE = ("contiguous", "channels_last")
OPTIONS = (
    {},
    {"act": "silu", "squeeze": "avgmax", "post_act": "relu", "residual": True, "through": "both"},
    {"act": "gelu", "gate": "hardsigmoid", "squeeze": "max", "post_act": "relu", "bias": False},
)
# (shape, R) and the strategy of the plan with one to four threads.
PROBLEMS = {
    "too small for two threads": ((2, 24, 3, 3), 6, ("serial",) * 4),
    "a batch": ((8, 72, 14, 14), 18, ("serial", "samples", "samples", "samples")),
    "odd sizes": ((5, 41, 33, 7), 5, ("serial", "samples", "samples", "samples")),
    "one sample": ((1, 104, 14, 14), 26, ("serial", "phases", "phases", "phases")),
    "pixels in a row": ((2, 136, 203), 17, ("serial", "samples", "phases", "phases")),
    "large weights": ((4, 1024, 2, 2), 128, ("serial", "phases", "phases", "phases")),
}
CASES = [
    Case(shape, reduced, dtype, layout, **options)
    for (shape, reduced, _), dtype, layout, options in itertools.product(PROBLEMS.values(), DTYPES, DENSE, OPTIONS)
]


def assert_same_bits(found: Tensors, expected: Tensors, what: str) -> None:
    for name, t in expected.items():
        assert torch.equal(found[name], t), f"{name}: {what}"


@pytest.mark.parametrize("problem", PROBLEMS)
def test_each_strategy_is_reached(problem):
    (n, c, *spatial), r, strategies = PROBLEMS[problem]
    m = torch.Size(spatial).numel()
    caches = itertools.product((2**18, 2**20, 2**21), (2**23, 2**25, 2**29))
    for (l2, l3), backward, size in itertools.product(caches, (False, True), (4, 8)):
        facts = {"element_size": size, "weight_size": size, "backward": backward, "l2_bytes": l2, "l3_bytes": l3}
        plans = [_plan.plan_cpu(n, c, r, m, threads=threads, **facts) for threads in (1, 2, 3, 4)]
        assert tuple(plan.strategy for plan in plans) == strategies


@pytest.mark.parametrize("case", CASES, ids=str)
def test_bits_do_not_depend_on_run_or_threads(case):
    inputs = draw(case, 0)
    torch.set_num_threads(1)
    first = run_counted(case, inputs)
    for threads in (1, 2, 3, 4, 2, 4):
        torch.set_num_threads(threads)
        assert_same_bits(run_counted(case, inputs), first, f"{threads} threads")


@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_sample_alone_gives_the_bits_it_has_in_a_batch(case):
    case = case.replace(shape=(8, *case.shape[1:]))
    inputs = draw(case, 0)
    of_samples = [name for name in ("x", "residual", "dy", "dgate") if name in inputs]
    results = ("y", "gate", "dx", "dresidual") if case.residual else ("y", "gate", "dx")
    torch.set_num_threads(2)
    batch = run_counted(case, inputs)
    for threads, chosen in (
        (1, slice(0, 1)),
        (2, slice(3, 4)),
        (4, slice(7, 8)),
        (1, slice(2, 5)),
        (3, slice(1, 8, 2)),
    ):
        torch.set_num_threads(threads)
        part = run_counted(case, {k: t[chosen] if k in of_samples else t for k, t in inputs.items()})
        expected = {name: batch[name][chosen] for name in results}
        assert_same_bits(part, expected, f"samples {chosen}, {threads} threads")


# ---------------------------------------------------------------------------------------------------- instruction sets

BUILT = _plan.build_info()["instruction_sets"].split()
NEEDS = {
    "baseline": (),
    "avx2": ("avx2", "fma", "f16c"),
    "avx512": ("avx512f", "avx512bw", "avx512dq", "avx512vl"),
    "avx512_bf16": ("avx512_bf16",),
}


def cpu_flags() -> set[str] | None:
    """What /proc/cpuinfo says; None where there is none."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return None
    return {flag for line in lines if line.startswith("flags") for flag in line.partition(":")[2].split()}


def run_with(isa: str, *words: str) -> subprocess.CompletedProcess[str]:
    here = Path(__file__).resolve().parent
    path = os.pathsep.join([str(here), str(Path(native.__file__).resolve().parents[2])])
    environment = {**os.environ, "SENET_FUSED_ISA": isa, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(here / "isa_run.py"), *words]
    return subprocess.run(command, env=environment, text=True, capture_output=True, timeout=300)


def missing(isa: str) -> str | None:
    """What this CPU lacks for an instruction set, None if nothing."""
    flags = cpu_flags()
    if flags is None:
        return None if isa == "baseline" else "/proc/cpuinfo, to tell what it has"
    needed = {flag for name in BUILT[: BUILT.index(isa) + 1] for flag in NEEDS[name]}
    return ", ".join(sorted(needed - flags)) or None


@pytest.mark.processes
@pytest.mark.parametrize("isa", BUILT)
def test_every_instruction_set(isa):
    """In a process of its own, held to the oracle."""
    if missing(isa):
        pytest.skip(f"this CPU lacks {missing(isa)}")
    done = run_with(isa, "layers")
    assert done.returncode == 0, done.stderr[-3000:]
    assert int(done.stdout) == len(isa_run.cases()) > 10


def test_unknown_instruction_set_is_refused():
    done = run_with("sse9")
    assert done.returncode == 1
    assert "SENET_FUSED_ISA must be" in done.stderr and "got sse9" in done.stderr
    assert all(isa in done.stderr for isa in BUILT)
