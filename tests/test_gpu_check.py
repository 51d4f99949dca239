"""benchmarks/gpu_check.sh and what it runs, without a GPU: stand-ins for Python and for the profiler."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch
from cuda_host import build
from gpu_programs import BENCHMARKS, ROOT, load_program, needs_cuda_host, needs_interpreter, parsed  # noqa: F401

SCRIPT = BENCHMARKS / "gpu_check.sh"
pytestmark = pytest.mark.skipif(not SCRIPT.exists(), reason="not a checkout")
needs_bash = pytest.mark.skipif(shutil.which("bash") is None, reason="no bash")


# ---------------------------------------------------------------------------------------------------- the script

# Says which GPU there is, writes down how it is called, leaves the files it is asked for, fails where it is told to.
STAND_IN = """#!/usr/bin/env bash
case "$*" in
  *get_device_name*) [ -n "${NO_GPU:-}" ] && exit 1; echo "NVIDIA H200"; exit ;;
  *"import xdist"*) exit 1 ;;
  *device_count*) echo 2; exit ;;
  *timm.is_model*) [ -n "${NO_TIMM:-}" ] && exit 1; shift 2; [ "$*" = none ] || echo "$*"; exit ;;
esac
echo "${SENET_FUSED_CUDA:+SENET_FUSED_CUDA=$SENET_FUSED_CUDA }$*" >>"$LOG"
for flag in --json --plot --roofline; do
  file=$(sed -n "s/.* $flag \\([^ ]*\\).*/\\1/p" <<<" $*")
  [ -z "$file" ] || echo result >"$file"
done
folder=$(sed -n "s/.* --output \\([^ ]*\\).*/\\1/p" <<<" $*")
[ -z "$folder" ] || { mkdir -p "$folder" && touch "$folder/log.csv"; }
case "$*" in
  *"${FAILING:-nothing fails}"*) exit 1 ;;
esac
"""
PARTS = """build tests sanitize-cuda sanitize-triton sanitize-tail-cuda sanitize-tail-triton bench-bf16 bench-float32
    bench-tail-bf16 bench-tail-float32 launches launches-tail models models-compile models-max-autotune
    models-largest train table""".split()
NETWORKS = "legacy_senet154 seresnet50 legacy_seresnext101_32x4d senet154 seresnext101_32x4d".split()
BUILD = "SENET_FUSED_CUDA=1 setup.py -q build_ext --inplace"


@pytest.fixture
def check(tmp_path):
    """Runs gpu_check.sh with stand-ins; gives its exit status, what it printed, and the calls of Python."""
    python, tools, log = tmp_path / "python", tmp_path / "tools", tmp_path / "log"
    python.write_text(STAND_IN)
    python.chmod(0o755)
    tools.mkdir()

    def run(*parts, sanitizer=None, driver="exit 9", **environment):
        """sanitizer, driver: what compute-sanitizer and nvidia-smi do."""
        for name, does in (("compute-sanitizer", sanitizer), ("nvidia-smi", driver)):
            if does is not None:
                (tools / name).write_text(f"#!/usr/bin/env bash\n{does}\n")
                (tools / name).chmod(0o755)
        log.write_text("")
        env = {**os.environ, "PYTHON": str(python), "OUT": str(tmp_path / "out"), "LOG": str(log), **environment}
        env["PATH"] = f"{tools}:{env['PATH']}"
        env.pop("SENET_FUSED_CUDA", None)
        done = subprocess.run(["bash", str(SCRIPT), *parts], env=env, capture_output=True, text=True, timeout=60)
        return done.returncode, done.stdout + done.stderr, log.read_text().splitlines()

    run.out = tmp_path / "out"
    return run


@needs_bash
@pytest.mark.parametrize("parts", [(), ("first",)], ids=["all", "first"])
def test_without_a_gpu_nothing_is_checked(check, parts):
    code, text, calls = check(*parts, NO_GPU="1")
    assert (code, calls) == (2, []) and text == "gpu_check: no NVIDIA GPU here, nothing checked\n"
    code, text, calls = check(*parts, NO_GPU="1", driver="echo GPU 0: NVIDIA H200")
    assert (code, calls) == (1, []) and "there is a GPU, but" in text and "has no torch that can use it" in text


@needs_bash
def test_an_unknown_part_is_refused(check):
    code, text, calls = check("build", "bench")
    assert code == 1 and not calls
    assert f"unknown part 'bench' (first; {', '.join(PARTS)})" in text


@needs_bash
def test_first_is_another_program(check, program):
    code, _, (call,) = check("first", "kernels", "layers")
    assert code == 0 and call == f"benchmarks/gpu_first.py --out {check.out} kernels layers"
    assert check("first", FAILING="gpu_first.py")[0] == 1
    args = program("gpu_first").parse(call.split()[1:])
    assert (args.parts, args.out, args.device) == (["kernels", "layers"], check.out, "cuda")


@needs_bash
def test_all_parts_run_in_order_with_arguments_that_their_programs_take(check, program):
    """The stand-in takes anything; the real parsers have to take it too."""
    code, text, calls = check(sanitizer='shift 4; "$@" && echo "ERROR SUMMARY: 0 errors"', TIME_LIMIT="60")
    assert code == 0, text
    assert [line.split()[1].rstrip(":") for line in text.splitlines() if "(NVIDIA H200)" in line] == PARTS
    assert f"== done: {' '.join(PARTS)}; results in {check.out}" in text
    assert calls[:3] == [BUILD, "-m senet_fused doctor", "-m pytest"]
    found = [parsed(call, program) for call in calls]
    names = ("gpu_kernels", "gpu_launches", "bench --op", "bench model", "bench --from", " train ")
    kinds = {name: [args for call, args in zip(calls, found, strict=True) if name in call] for name in names}
    sanitized = [(args.op, *args.backend) for args in kinds["gpu_kernels"]]
    assert sanitized == [(op, name) for op in ("se", "tail") for name in ("cuda", "triton") for _ in range(5)]
    assert len(list(check.out.glob("sanitize-*.log"))) == 16 and text.count(": ERROR SUMMARY: 0 errors") == 16
    assert [(args.op, *args.dtype, *args.batch) for args in kinds["bench --op"]] == [
        (op, dtype, 64) for op in ("se", "tail") for dtype in ("bfloat16", "float32")
    ]
    for args in kinds["bench --op"]:
        assert (args.device, args.layout, args.time_limit) == ("cuda", ["contiguous", "channels_last"], 60)
        assert {"eager", "compile", "cuda", "triton"} < set(args.providers) and "backward" in args.direction[-1]
    assert [args.op for args in kinds["gpu_launches"]] == ["se", "tail"]
    models = kinds["bench model"]
    assert [args.models[0] for args in models] == [*NETWORKS * 3, "legacy_senet154", "legacy_seresnext101_32x4d"]
    assert {"stock", "no-se"} <= set.intersection(*(set(args.providers) for args in models))
    assert {(args.device, args.amp, *args.mode, *args.layout, *args.dtype) for args in models} == {
        ("cuda", True, "training", "channels_last", "bfloat16")
    }
    files = [str(args.json) for kind in ("bench --op", "bench model") for args in kinds[kind]]
    assert len(set(files)) == len(files) and all(Path(file).exists() for file in files)
    assert sorted(str(file) for args in kinds["bench --from"] for file in args.saved) == sorted(files)
    first, second = kinds[" train "]
    assert (first.amp, first.fuse, first.sync_batchnorm, first.device) == ("bf16", "tails", True, "cuda")
    assert first.max_steps == 40 and second.resume
    assert (check.out / "nvidia-h200-train.csv").exists()


@needs_bash
def test_a_part_that_fails_is_named_and_the_others_run(check):
    code, text, calls = check("bench-bf16", "bench-float32", "table", FAILING="--dtype bfloat16")
    assert code == 1 and len(calls) == 3
    assert "== failed: bench-bf16; results in" in text and "== bench-bf16: exit status 1 after" in text
    assert check("table", FAILING="bench --from")[0] == 1
    assert check("train", FAILING="--max-steps 40")[0] == 1


@needs_bash
def test_each_network_is_a_process_of_its_own_within_the_parts_limit(check):
    code, text, calls = check("models", FAILING="legacy_senet154")
    assert code == 1 and len(calls) == len(NETWORKS) and "== failed: models;" in text
    limits = [int(call.split("--time-limit ")[1].split()[0]) for call in calls]
    assert 0 < min(limits) <= max(limits) <= 560
    code, text, calls = check("models", MODELS="seresnet50 senet154", MODELS_LIMIT="10")
    assert code == 1 and not calls and "senet154: out of time, not begun" in text
    code, text, calls = check("models", NO_TIMM="1")
    assert code == 0 and not calls and "timm is not installed: skipped" in text
    code, text, calls = check("models", MODELS="none")
    assert code == 1 and not calls and "timm has none of none" in text


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


# ---------------------------------------------------------------------------------------------- launches


def python(*arguments, **environment):
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **environment}
    return subprocess.run([sys.executable, *arguments], cwd=ROOT, env=env, capture_output=True, text=True, timeout=300)


@pytest.mark.processes
@needs_cuda_host
@needs_interpreter
def test_the_launches_of_a_layer_are_counted():
    shapes = ("--shape", "2,16,4,5,7", "--calls", "1")
    done = python("benchmarks/gpu_launches.py", "--device", "cpu", *shapes, TRITON_INTERPRET="1")
    assert done.returncode == 0, done.stdout + done.stderr
    lines = done.stdout.splitlines()
    assert lines[0] == "2 x 16/4 @ 5x7 bfloat16 contiguous"
    assert lines[-1] == "2 layers, cuda and triton: all as promised"
    assert "  triton  forward   partials   2 launches: squeeze_kernel, scale_kernel" in lines
    assert "  triton  backward  partials   2 launches: squeeze_backward_kernel, scale_backward_kernel" in lines
    (forward, backward) = [line for line in lines[:5] if line.startswith("  cuda ")]
    assert forward.startswith("  cuda    forward   partials   2 launches: ")
    assert set(forward.split(": ")[1].split(", ")) == {"squeeze_tile_of_planes_kernel", "scale_planes_kernel"}
    assert "squeeze_backward_tile_of_planes_kernel" in backward


@needs_interpreter
@pytest.mark.parametrize("times", [3, 4])
def test_a_tail_is_called_for_its_launches(program, monkeypatch, capsys, times):
    """As often as asked for, on vectors in float32 and without running statistics; three launches are promised."""
    gpu_launches = program("gpu_launches")
    seen, real = [], gpu_launches.block_tail
    monkeypatch.setattr(gpu_launches, "block_tail", lambda *a, **kw: seen.append((a, kw)) or real(*a, **kw))

    def observe(call, calls, device, backend):
        assert (call(), calls, backend)[1:] == (2, "triton")
        return [gpu_launches.Launch("kernel", times, None)]

    monkeypatch.setattr(gpu_launches, "observe", observe)
    monkeypatch.setattr(gpu_launches.gpu_backends, "strategy", lambda *asked: "partials")
    argv = ["--device", "cpu", "--backend", "triton", "--op", "tail", "--shape", "2,16,4,5,7", "--calls", "2"]
    monkeypatch.setattr(sys, "argv", ["gpu_launches.py", *argv])
    assert gpu_launches.main() == (0 if times == 3 else 1)
    promised = "2 tails, triton: all as promised" if times == 3 else "triton: 4 + 4 launches, promised 3 + 3"
    assert capsys.readouterr().out.splitlines()[-1].endswith(promised)
    assert len(seen) == 2 * 2  # for the backward, and the forward that is observed
    for (x, mean, var, weight, bias), how in seen:
        assert x.dtype == how["w1"].dtype == torch.bfloat16 and mean is var is None and how["training"]
        assert {t.dtype for t in (weight, bias, how["b1"], how["b2"])} == {torch.float32}
        assert how["residual"].requires_grad and how["post_act"] == "relu"


@needs_interpreter
def test_the_strategy_of_a_tail_is_its_own_problems(program, monkeypatch):
    gpu_backends = program("gpu_backends")
    from senet_fused.backends import cuda
    from senet_fused.backends.triton import launch
    from senet_fused.bench.problems import cases

    asked = []
    plan = types.SimpleNamespace(strategy="partials")
    monkeypatch.setattr(launch, "plan_of", lambda problem, facts: asked.append(problem) or plan)
    monkeypatch.setattr(cuda, "plan_of", lambda problem, facts: asked.append(problem) or plan)
    monkeypatch.setattr(cuda, "device_facts", lambda device: None)
    (case,) = cases([], ["2,16,4,5,7"], op="tail")
    for name in ("triton", "cuda"):
        assert gpu_backends.strategy(name, case, True, torch.device("cpu")) == "partials"
    assert [(p.norm, p.backward, p.channels) for p in asked] == [("batch", True, 16)] * 2 and asked[1].n == 2


@pytest.mark.parametrize("name", ["gpu_kernels", "gpu_launches"])
def test_where_the_kernels_cannot_run_the_reason_is_given(program, monkeypatch, capsys, name):
    module = program(name)
    monkeypatch.setattr(build, "problem", lambda: "there is no compiler")
    monkeypatch.setattr(sys, "argv", [name, "--device", "cpu", "--backend", "cuda"])
    assert module.main() == 2
    assert capsys.readouterr().err == f"{name}: 'cuda' cannot run with --device cpu: there is no compiler\n"
    monkeypatch.setattr(module.gpu_backends.backends, "refusal", lambda *asked: "set TRITON_INTERPRET=1")
    monkeypatch.setattr(sys, "argv", [name, "--device", "cpu", "--backend", "triton"])
    assert module.main() == 2 and capsys.readouterr().err.endswith("--device cpu: set TRITON_INTERPRET=1\n")


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
    head, kernels = line.split(":")
    assert head.split() == "triton forward partials 2.5 launches 13.5 us".split()
    assert kernels.split() == "squeeze_kernel 5.5, scale_kernel 7.5, Memset (Device) x 0.5 1.0".split()


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


@pytest.mark.parametrize(
    ("strategies", "counts", "complaint"),
    [
        (("partials", "last_block"), (3, 3), None),
        (("launches", "launches"), (4, 4), None),
        (("partials", "launches"), (4, 4), "4 + 4 launches, promised 3 + 4"),
        (("launches", "launches"), (4, 5), "4 + 5 launches, promised 4 + 4"),
    ],
)
def test_a_tail_may_launch_one_kernel_more(gpu_launches, strategies, counts, complaint):
    directions = ("forward", "backward")
    found = {d: [gpu_launches.Launch("a", count, 1.0)] for d, count in zip(directions, counts, strict=True)}
    assert gpu_launches.check(found, dict(zip(directions, strategies, strict=True)), "tail") == complaint
