"""benchmarks/gpu_check.sh and what it runs, without a GPU: stand-ins for Python, for the profiler, for the device."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import shutil
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch
from cuda_host import build

import senet_fused

ROOT = Path(__file__).resolve().parent.parent
BENCHMARKS = ROOT / "benchmarks"
SCRIPT = BENCHMARKS / "gpu_check.sh"
pytestmark = pytest.mark.skipif(not SCRIPT.exists(), reason="not a checkout")
needs_bash = pytest.mark.skipif(shutil.which("bash") is None, reason="no bash")
needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="no triton")
needs_cuda_host = pytest.mark.skipif(build.problem() is not None, reason=str(build.problem()))


# ---------------------------------------------------------------------------------------------------- the script

# Says which GPU there is, writes down how it is called, leaves the files it is asked for, fails where it is told to.
STAND_IN = """#!/usr/bin/env bash
case "$*" in
  *get_device_name*) [ -n "${NO_GPU:-}" ] && exit 1; echo "NVIDIA H200"; exit ;;
  *"import xdist"*) exit 1 ;;
  *"import timm"*) exit 0 ;;
esac
echo "${SENET_FUSED_CUDA:+SENET_FUSED_CUDA=$SENET_FUSED_CUDA }$*" >>"$LOG"
for flag in --json --plot --roofline; do
  file=$(sed -n "s/.* $flag \\([^ ]*\\).*/\\1/p" <<<" $*")
  [ -z "$file" ] || echo result >"$file"
done
case "$*" in
  *"${FAILING:-nothing fails}"*) exit 1 ;;
esac
"""
PARTS = "build tests sanitize-cuda sanitize-triton bench-bf16 bench-float32 launches models table".split()
TOOLS = ("memcheck", "racecheck", "synccheck", "initcheck")
BUILD = "SENET_FUSED_CUDA=1 setup.py -q build_ext --inplace"


@pytest.fixture
def check(tmp_path):
    """Runs gpu_check.sh with stand-ins; gives its exit status, what it printed, and the calls of Python."""
    python, tools, log = tmp_path / "python", tmp_path / "tools", tmp_path / "log"
    python.write_text(STAND_IN)
    python.chmod(0o755)
    tools.mkdir()

    def run(*parts, sanitizer=None, **environment):
        if sanitizer is not None:
            (tools / "compute-sanitizer").write_text(f"#!/usr/bin/env bash\n{sanitizer}\n")
            (tools / "compute-sanitizer").chmod(0o755)
        log.write_text("")
        env = {**os.environ, "PYTHON": str(python), "OUT": str(tmp_path / "out"), "LOG": str(log), **environment}
        env["PATH"] = f"{tools}:{env['PATH']}"
        env.pop("SENET_FUSED_CUDA", None)
        done = subprocess.run(["bash", str(SCRIPT), *parts], env=env, capture_output=True, text=True, timeout=60)
        return done.returncode, done.stdout + done.stderr, log.read_text().splitlines()

    run.out = tmp_path / "out"
    return run


@needs_bash
def test_the_script_is_bash():
    subprocess.run(["bash", "-n", str(SCRIPT)], check=True)


@needs_bash
def test_without_a_gpu_nothing_is_checked(check):
    code, text, calls = check(NO_GPU="1")
    assert code in (1, 2) and not calls  # 1: nvidia-smi knows a GPU here
    assert "nothing checked" in text or code == 1


@needs_bash
def test_an_unknown_part_is_refused(check):
    code, text, calls = check("build", "bench")
    assert code == 1 and not calls
    assert f"unknown part 'bench' ({', '.join(PARTS)})" in text


@needs_bash
def test_all_parts_run_in_order(check):
    code, text, calls = check(sanitizer='shift 4; "$@" && echo "ERROR SUMMARY: 0 errors"')
    assert code == 0, text
    assert [line.split()[1].rstrip(":") for line in text.splitlines() if "(NVIDIA H200)" in line] == PARTS
    assert f"== done: {' '.join(PARTS)}; results in {check.out}" in text
    name = f"{check.out}/nvidia-h200-senet154-batch64"
    assert calls[:3] == [BUILD, "-m senet_fused doctor", "-m pytest"]
    for backend, found in (("cuda", calls[3:8]), ("triton", calls[8:13])):
        assert found == [f"benchmarks/gpu_sanitize.py --backend {backend}"] * 5
        logs = {f"sanitize-{backend}-{tool}.log" for tool in TOOLS}
        assert {path.name for path in check.out.glob(f"sanitize-{backend}-*")} == logs
    for tool in TOOLS:
        assert text.count(f"{tool}: ERROR SUMMARY: 0 errors") == 2
    for call, dtype in zip(calls[13:15], ("bfloat16", "float32"), strict=True):
        assert call.startswith(f"-m senet_fused bench --problem senet154 --batch 64 --dtype {dtype} ")
        assert "--layout contiguous channels_last" in call
        assert "--device cuda --providers eager compile max-autotune fused cuda triton fused+compile --budget 1" in call
        assert "--direction forward forward+backward" in call and call.endswith(f"--json {name}-{dtype}.json")
    launches = "benchmarks/gpu_launches.py --problem senet154 --batch 64 --dtype bfloat16 float32"
    assert calls[15] == f"{launches} --backend cuda triton"
    assert calls[16].startswith("-m senet_fused bench model seresnet50 legacy_senet154 --mode training --batch 64 ")
    assert calls[16].endswith(f"--json {check.out}/nvidia-h200-models-batch64.json")
    assert calls[17] == (
        f"-m senet_fused bench --from {name}-bfloat16.json {name}-float32.json --plain --plot {name}.png "
        f"--roofline {name}-roofline.png"
    )
    assert len(calls) == 18 and (check.out / "nvidia-h200-senet154-batch64-launches.txt").exists()


@needs_bash
def test_the_calls_are_what_the_programs_take(check):
    """The stand-in takes anything; the real parser has to take it too."""
    from senet_fused.bench import command, model

    parser = command.argparse.ArgumentParser()
    model.add_arguments(parser)
    _, _, (call,) = check("models", TIME_LIMIT="60")
    models = parser.parse_args(call.split()[4:])
    assert (models.device, models.amp, models.time_limit, models.mode) == ("cuda", True, 60, ["training"])
    parser = command.argparse.ArgumentParser()
    command.add_arguments(parser)
    _, _, calls = check("bench-bf16", "table", BUDGET="0.5", TIME_LIMIT="60")
    bench, table = (parser.parse_args(call.split()[3:]) for call in calls)
    assert (bench.device, bench.batch, bench.budget, bench.time_limit) == ("cuda", [64], 0.5, 60)
    assert bench.dtype == ["bfloat16"] and tuple(bench.providers) == command.PROVIDERS
    assert [path.name for path in table.saved] == ["nvidia-h200-senet154-batch64-bfloat16.json"]
    assert table.plot and table.roofline


@needs_bash
def test_a_part_that_fails_is_named_and_the_others_run(check):
    code, text, calls = check("bench-bf16", "bench-float32", "table", FAILING="--dtype bfloat16")
    assert code == 1 and len(calls) == 3
    assert "== failed: bench-bf16; results in" in text and "== bench-bf16: exit status 1 after" in text


@needs_bash
def test_nothing_runs_after_a_build_that_fails(check):
    code, text, calls = check(FAILING="build_ext")
    assert code == 1 and calls == [BUILD]
    assert "== failed: build;" in text


@needs_bash
def test_a_table_of_nothing_fails(check):
    code, text, calls = check("table")
    assert code == 1 and not calls and "nothing is measured yet" in text


@needs_bash
def test_what_the_sanitizer_finds_is_shown_and_fails(check):
    found = 'echo "= Invalid read of size 4"; [ "$2" != racecheck ] || exit 3'
    code, text, _ = check("sanitize-cuda", sanitizer=found)
    assert code == 1 and "racecheck: exit status 3\n= Invalid read of size 4" in text
    assert "memcheck: = Invalid" in text and "== failed: sanitize-cuda;" in text


@needs_bash
@pytest.mark.skipif(
    any(shutil.which(path) for path in ("compute-sanitizer", "/usr/local/cuda/bin/compute-sanitizer")),
    reason="there is a compute-sanitizer",
)
def test_without_a_sanitizer_its_part_is_skipped(check):
    code, text, calls = check("sanitize-triton")
    assert code == 0 and not calls and "compute-sanitizer is not installed: skipped" in text


# ---------------------------------------------------------------------------------------------- what it runs


def python(*arguments, **environment):
    package = str(Path(senet_fused.__file__).parents[1])
    env = {**os.environ, "PYTHONPATH": package, "OMP_NUM_THREADS": "1", **environment}
    return subprocess.run(
        [sys.executable, *arguments], cwd=ROOT, env=env, capture_output=True, text=True, timeout=300
    )


def sanitized(backend):
    """The lines of gpu_sanitize.py, and the strategies with the forms that it has met."""
    done = python("benchmarks/gpu_sanitize.py", "--device", "cpu", "--backend", backend, TRITON_INTERPRET="1")
    assert done.returncode == 0, done.stdout + done.stderr
    lines = [line for line in done.stdout.splitlines() if not line.startswith(" ")]
    assert all(line.startswith(f"{backend}: ") and line.endswith(": ok") for line in lines)
    assert any("2 and 2 splits" in line for line in lines)
    return lines, {tuple(line.split(": ")[2].split(", ")[:2]) for line in lines}


STRATEGIES = ("partials", "last_block", "launches")


@needs_triton
def test_every_strategy_and_form_of_the_triton_plans_runs_and_is_right():
    _, met = sanitized("triton")
    assert met == {(s, f) for s in STRATEGIES for f in ("channels_last", "planes")} | {("launches", "rows")}


@needs_cuda_host
def test_every_strategy_and_form_of_the_cuda_plans_runs_and_is_right():
    lines, met = sanitized("cuda")
    assert met == {(s, f) for s in STRATEGIES for f in ("channels_last", "planes", "tile_of_planes")}
    assert any("2 and 2 samples" in line for line in lines)


@needs_cuda_host
def test_a_strategy_or_form_that_was_not_met_is_missed(program, monkeypatch, capsys):
    gpu_sanitize = program("gpu_sanitize")
    layers, variants, wanted = gpu_sanitize.BACKENDS["cuda"]
    contiguous = tuple(layer for layer in layers[:3] if not layer.channels_last)
    monkeypatch.setattr(gpu_sanitize, "BACKENDS", {"cuda": (contiguous, variants, wanted)})
    monkeypatch.setattr(gpu_sanitize, "wrong", lambda layer, backend, device: [])
    monkeypatch.setattr(gpu_sanitize.gpu_backends, "refusal", lambda backend, device: None)
    monkeypatch.setattr(sys, "argv", ["gpu_sanitize.py", "--device", "cpu", "--backend", "cuda"])
    assert gpu_sanitize.main() == 1
    assert capsys.readouterr().err == "gpu_sanitize: cuda: not met: channels_last\n"
    monkeypatch.setattr(gpu_sanitize, "BACKENDS", {"cuda": (layers, variants, wanted)})
    assert gpu_sanitize.main() == 0
    monkeypatch.setattr(gpu_sanitize, "wrong", lambda layer, backend, device: ["y is off by 1.0e+00"])
    assert gpu_sanitize.main() == 1 and ": y is off by 1.0e+00\n" in capsys.readouterr().out


@needs_cuda_host
@needs_triton
def test_the_launches_of_a_layer_are_counted():
    shapes = ("--shape", "2,16,4,5,7", "2,24,4,7,7", "--calls", "1")
    done = python("benchmarks/gpu_launches.py", "--device", "cpu", *shapes, TRITON_INTERPRET="1")
    assert done.returncode == 0, done.stdout + done.stderr
    lines = done.stdout.splitlines()
    assert lines[0] == "2 x 16/4 @ 5x7 bfloat16 contiguous"
    assert lines[-1] == "4 layers, cuda and triton: all as promised"
    assert "  triton  forward   partials   2 launches: squeeze_kernel, scale_kernel" in lines
    assert "  triton  backward  partials   2 launches: squeeze_backward_kernel, scale_backward_kernel" in lines
    (forward, backward) = [line for line in lines[:5] if line.startswith("  cuda ")]
    assert forward.startswith("  cuda    forward   partials   2 launches: ")
    assert set(forward.split(": ")[1].split(", ")) == {"squeeze_tile_of_planes_kernel", "scale_planes_kernel"}
    assert "squeeze_backward_tile_of_planes_kernel" in backward


@pytest.mark.parametrize("name", ["gpu_sanitize", "gpu_launches"])
def test_where_the_kernels_cannot_run_the_reason_is_given(name):
    done = python(f"benchmarks/{name}.py", "--device", "cpu", "--backend", "triton", TRITON_INTERPRET="0")
    assert done.returncode == 2 and "TRITON_INTERPRET=1" in done.stderr
    assert done.stderr.startswith(f"{name}: 'triton' cannot run with --device cpu: ")
    nowhere = {"PATH": "", "CUDA_HOME": ""}
    done = python(f"benchmarks/{name}.py", "--device", "cpu", "--backend", "cuda", **nowhere)
    assert done.returncode == 2 and done.stderr.startswith(f"{name}: 'cuda' cannot run with --device cpu: ")


@pytest.fixture
def program(monkeypatch):
    """Imports a program of benchmarks/, until the test ends."""
    monkeypatch.syspath_prepend(BENCHMARKS)

    def load(name):
        for module in (name, "gpu_backends"):
            monkeypatch.delitem(sys.modules, module, raising=False)
        return importlib.import_module(name)

    yield load
    for module in ("gpu_sanitize", "gpu_launches", "gpu_backends"):
        sys.modules.pop(module, None)


@pytest.fixture
def gpu_launches(program):
    return program("gpu_launches")


def event(name, start, us, device="CUDA", annotation=False):
    span = types.SimpleNamespace(start=start, elapsed_us=lambda: us)
    kind = getattr(torch.autograd.DeviceType, device)
    return types.SimpleNamespace(name=name, time_range=span, device_type=kind, is_user_annotation=annotation)


def test_a_profile_gives_what_ran_on_the_device(gpu_launches):
    events = [
        event("scale_kernel", 20, 7.0),
        event("squeeze_kernel", 10, 5.0),
        event("cudaLaunchKernel", 9, 1.0, device="CPU"),
        event("step", 8, 99.0, annotation=True),
        event("squeeze_kernel", 30, 6.0),
        event("scale_kernel", 40, 8.0),
        event("Memset (Device)", 50, 1.0),
        event("void senet::cuda::scale_planes_kernel<float>(senet::cuda::ScaleArguments)", 60, 2.0),
        event("senet::cuda::excite_gate_kernel(senet::cuda::ExciteArguments)", 70, 2.0),
        event("void at::native::fill_kernel<float>(int)", 80, 2.0),
    ]
    found = gpu_launches.launches_of(events, 2)
    assert [(launch.name, launch.times, launch.us) for launch in found] == [
        ("squeeze_kernel", 1, 5.5),
        ("scale_kernel", 1, 7.5),
        ("Memset (Device)", 0.5, 1.0),
        ("scale_planes_kernel", 0.5, 2.0),
        ("excite_gate_kernel", 0.5, 2.0),
        ("void at::native::fill_kernel<float>(int)", 0.5, 2.0),
    ]
    line = gpu_launches.line("triton", "forward", "partials", found[:3])
    assert line.split() == (
        "triton forward partials 2.5 launches 13.5 us: squeeze_kernel 5.5, scale_kernel 7.5, Memset (Device) x 0.5 1.0"
    ).split()


def test_the_profiler_is_asked_on_a_gpu(gpu_launches, monkeypatch):
    called, profiles = [], []

    class Profile(contextlib.AbstractContextManager):
        def __init__(self, activities):
            assert activities == [torch.profiler.ProfilerActivity.CUDA]
            self.first = len(called)
            profiles.append(self)

        def __exit__(self, *error):
            self.calls = len(called) - self.first

        def events(self):
            return [event("squeeze_kernel", start, 4.0) for start in range(self.calls)]

    monkeypatch.setattr(torch.profiler, "profile", Profile)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    found = gpu_launches.observe(lambda: called.append(1), 5, torch.device("cuda"), "cuda")
    assert found == [gpu_launches.Launch("squeeze_kernel", 1, 4.0)]
    assert [profile.calls for profile in profiles] == [1, 5] and len(called) == 7


@pytest.mark.parametrize(
    ("strategies", "counts", "complaint"),
    [
        (("partials", "last_block"), (2, 2), None),
        (("partials", "partials"), (2, 1), None),
        (("launches", "launches"), (4, 4), None),
        (("launches", "partials"), (4, 2), None),
        (("partials", "last_block"), (2, 3), "2 + 3 launches, promised 2 + 2"),
        (("partials", "partials"), (2.5, 2), "2.5 + 2 launches, promised 2 + 2"),
        (("launches", "partials"), (4, 3), "4 + 3 launches, promised 4 + 2"),
        (("partials", "partials"), (0, 2), "0 + 2 launches, promised 2 + 2"),
    ],
)
def test_more_launches_than_planned_are_a_broken_promise(gpu_launches, strategies, counts, complaint):
    directions = ("forward", "backward")
    found = {d: [gpu_launches.Launch("a", count, 1.0)] for d, count in zip(directions, counts, strict=True)}
    assert gpu_launches.check(found, dict(zip(directions, strategies, strict=True))) == complaint
