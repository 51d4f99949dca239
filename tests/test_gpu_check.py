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
from senet_fused import backends

ROOT = Path(__file__).resolve().parent.parent
BENCHMARKS = ROOT / "benchmarks"
SCRIPT = BENCHMARKS / "gpu_check.sh"
pytestmark = pytest.mark.skipif(not SCRIPT.exists(), reason="not a checkout")
needs_bash = pytest.mark.skipif(shutil.which("bash") is None, reason="no bash")
needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="no triton")
_no_interpreter = backends.refusal("triton", "cpu", torch.float32)
needs_interpreter = pytest.mark.skipif(_no_interpreter is not None, reason=str(_no_interpreter))
needs_cuda_host = pytest.mark.skipif(build.problem() is not None, reason=str(build.problem()))


# ---------------------------------------------------------------------------------------------------- the script

# Says which GPU there is, writes down how it is called, leaves the files it is asked for, fails where it is told to.
STAND_IN = """#!/usr/bin/env bash
case "$*" in
  *get_device_name*) [ -n "${NO_GPU:-}" ] && exit 1; echo "NVIDIA H200"; exit ;;
  *"import xdist"*) exit 1 ;;
  *"import torchdata"*) exit "${NO_TORCHDATA:-0}" ;;
  *device_count*) echo 2; exit ;;
  *timm.is_model*) [ -n "${NO_TIMM:-}" ] && exit 1; shift 2; [ "$*" = none ] || echo "$*"; exit ;;
esac
echo "${SENET_FUSED_CUDA:+SENET_FUSED_CUDA=$SENET_FUSED_CUDA }$*" >>"$LOG"
for flag in --json --plot --roofline; do
  file=$(sed -n "s/.* $flag \\([^ ]*\\).*/\\1/p" <<<" $*")
  [ -z "$file" ] || echo result >"$file"
done
folder=$(sed -n "s/.* --output \\([^ ]*\\).*/\\1/p" <<<" $*")
[ -z "$folder" ] || { mkdir -p "$folder" && touch "$folder/log.csv" "$folder/curves.png"; }
case "$*" in
  *"${FAILING:-nothing fails}"*) exit 1 ;;
esac
"""
PARTS = """build tests sanitize-cuda sanitize-triton sanitize-tail-cuda sanitize-tail-triton bench-bf16 bench-float32
    bench-tail-bf16 bench-tail-float32 launches launches-tail models models-compile models-max-autotune
    models-largest train table""".split()
LARGE = ["legacy_senet154", "legacy_seresnext101_32x4d"]
NETWORKS = "legacy_senet154 seresnet50 legacy_seresnext101_32x4d senet154 seresnext101_32x4d".split()
MODELS = {
    "eager": "stock graph fused tails tails+graph no-se",
    "compile": "stock compile tails tails+compile no-se",
    "max-autotune": "stock max-autotune tails no-se",
    "largest": "stock graph fused tails tails+graph compile tails+compile no-se",
}
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
    rest = iter(calls[3:])
    for what, option in (("cuda", ""), ("triton", ""), ("tail-cuda", " --op tail"), ("tail-triton", " --op tail")):
        call = f"benchmarks/gpu_sanitize.py --backend {what.removeprefix('tail-')}{option}"
        assert [next(rest) for _ in range(5)] == [call] * 5
        logs = {f"sanitize-{what}-{tool}.log" for tool in TOOLS}
        assert {path.name for path in check.out.glob(f"sanitize-{what}-*")} == logs
    for tool in TOOLS:
        assert text.count(f"{tool}: ERROR SUMMARY: 0 errors") == 4
    for op, suffix, directions in (("se", "", "forward forward+backward"), ("tail", "-tail", "forward backward")):
        for dtype in ("bfloat16", "float32"):
            call = next(rest)
            assert call.startswith(f"-m senet_fused bench --op {op} --problem senet154 --batch 64 --dtype {dtype} ")
            assert f" --layout contiguous channels_last --direction {directions} --device cuda --providers " in call
            assert " eager compile max-autotune fused cuda triton fused+compile --budget 1 " in call
            assert call.endswith(f"--json {name}{suffix}-{dtype}.json")
    for op, suffix in (("se", ""), ("tail", "-tail")):
        launches = f"benchmarks/gpu_launches.py --op {op} --problem senet154 --batch 64 --dtype bfloat16 float32"
        assert next(rest) == f"{launches} --backend cuda triton"
        assert (check.out / f"nvidia-h200-senet154-batch64-launches{suffix}.txt").exists()
    models, files = f"{check.out}/nvidia-h200-models", []
    for what, variants in MODELS.items():
        batch, networks = ("max", LARGE) if what == "largest" else ("64", NETWORKS)
        for network in networks:
            call = next(rest)
            start = f"-m senet_fused bench model {network} --mode training --batch {batch} --dtype bfloat16 "
            assert call.startswith(start)
            assert f" --amp --layout channels_last --device cuda --providers {variants} --budget 5 " in call
            file = f"{models}-batch{batch}-{what}-{network}.json"
            assert call.endswith(f"--json {file}")
            files.append(file)
    train = "-m torch.distributed.run --standalone --nproc-per-node 2 -m senet_fused train --model senet154 "
    for end in ("--max-steps 40", "--resume"):
        call = next(rest)
        assert call.startswith(train) and call.endswith(f" {end}")
    assert {"nvidia-h200-train.csv", "nvidia-h200-train.png"} <= {path.name for path in check.out.iterdir()}
    for base in (name, f"{name}-tail"):
        assert next(rest) == (
            f"-m senet_fused bench --from {base}-bfloat16.json {base}-float32.json --plain --plot {base}.png "
            f"--roofline {base}-roofline.png"
        )
    assert next(rest) == f"-m senet_fused bench --from {' '.join(sorted(files))} --plain"
    assert list(rest) == []


@needs_bash
def test_the_calls_are_what_the_programs_take(check):
    """The stand-in takes anything; the real parser has to take it too."""
    from senet_fused.bench import command, model

    parser = command.argparse.ArgumentParser()
    model.add_arguments(parser)
    parts = [part for part in PARTS if part.startswith("models")]
    _, _, calls = check(*parts, TIME_LIMIT="60", MODELS="seresnet50")
    assert len(calls) == 4
    for call, (what, variants) in zip(calls, MODELS.items(), strict=True):
        models = parser.parse_args(call.split()[4:])
        assert (models.device, models.amp, models.time_limit, models.mode) == ("cuda", True, 60, ["training"])
        batch = "max" if what == "largest" else 64
        assert (models.models, models.layout, models.batch) == (["seresnet50"], ["channels_last"], [batch])
        assert models.providers == variants.split()
    parser = command.argparse.ArgumentParser()
    command.add_arguments(parser)
    _, _, calls = check("bench-bf16", "bench-tail-bf16", "table", BUDGET="0.5", TIME_LIMIT="60")
    *benches, table, tails, of_models = (parser.parse_args(call.split()[3:]) for call in calls)
    for bench, op in zip(benches, ("se", "tail"), strict=True):
        assert (bench.op, bench.device, bench.batch, bench.budget, bench.time_limit) == (op, "cuda", [64], 0.5, 60)
        assert bench.dtype == ["bfloat16"] and tuple(bench.providers) == command.PROVIDERS
    for shown, suffix in ((table, ""), (tails, "-tail")):
        assert [path.name for path in shown.saved] == [f"nvidia-h200-senet154-batch64{suffix}-bfloat16.json"]
        assert shown.plot and shown.roofline
    assert len(of_models.saved) == 4 and not of_models.plot
    assert check("table", FAILING="-tail-bfloat16.json")[0] == 1  # and the others are shown
    from senet_fused.train import command as train

    parser = train.argparse.ArgumentParser()
    train.add_arguments(parser)
    _, _, (first, second) = check("train")
    for call in (first, second):
        args = parser.parse_args(call.partition(" train ")[2].split())
        assert (args.device, args.amp, args.fuse, args.sync_batchnorm) == ("cuda", "bf16", "tails", True)
    code, text, calls = check("train", NO_TORCHDATA="1")
    assert code == 0 and not calls and "torchdata is not installed: skipped" in text
    assert check("train", FAILING="--max-steps 40")[0] == 1


@needs_bash
def test_a_part_that_fails_is_named_and_the_others_run(check):
    code, text, calls = check("bench-bf16", "bench-float32", "table", FAILING="--dtype bfloat16")
    assert code == 1 and len(calls) == 3
    assert "== failed: bench-bf16; results in" in text and "== bench-bf16: exit status 1 after" in text


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


# ---------------------------------------------------------------------------------------------- what it runs


def python(*arguments, **environment):
    package = str(Path(senet_fused.__file__).parents[1])
    env = {**os.environ, "PYTHONPATH": package, "OMP_NUM_THREADS": "1", **environment}
    return subprocess.run(
        [sys.executable, *arguments], cwd=ROOT, env=env, capture_output=True, text=True, timeout=300
    )


def sanitized(backend, *options):
    """The lines of gpu_sanitize.py, and the strategies with the forms that it has met."""
    argv = ("--device", "cpu", "--backend", backend, *options)
    done = python("benchmarks/gpu_sanitize.py", *argv, TRITON_INTERPRET="1")
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


@needs_triton
def test_every_strategy_and_form_of_the_triton_plans_of_tails_runs_and_is_right():
    lines, met = sanitized("triton", "--op", "tail")
    assert met == {(s, f) for s in STRATEGIES for f in ("channels_last", "planes")}
    assert {"batch", "given"} == {norm for norm in ("batch", "given") if any(f"{norm} statistics" in x for x in lines)}


@needs_cuda_host
def test_every_strategy_and_form_of_the_cuda_plans_of_tails_runs_and_is_right():
    lines, met = sanitized("cuda", "--op", "tail")
    assert met == {(s, f) for s in STRATEGIES for f in ("channels_last", "planes", "tile_of_planes")}
    assert any("2 and 2 samples" in line for line in lines)


@needs_interpreter
def test_tails_are_planned_run_and_held_against_float64(program, monkeypatch, capsys):
    gpu_sanitize = program("gpu_sanitize")
    layers, variants, wanted = gpu_sanitize.TAIL_BACKENDS["triton"]
    assert len(layers) == 12 and "partials" in wanted
    few = layers[:1], variants, {"partials", "planes", "circles"}
    monkeypatch.setattr(gpu_sanitize, "TAIL_BACKENDS", {"triton": few})
    argv = ["gpu_sanitize.py", "--device", "cpu", "--backend", "triton", "--op", "tail"]
    monkeypatch.setattr(sys, "argv", argv)
    assert gpu_sanitize.main() == 1
    output = capsys.readouterr()
    assert output.err == "gpu_sanitize: triton: not met: circles\n"
    first = "triton: 3 x 40/12 @ 7x7 bfloat16 contiguous batch statistics: "
    lines = [line for line in output.out.splitlines() if line.startswith("triton: ")]
    assert lines[0].startswith(first) and all(line.endswith(": ok") for line in lines)


@pytest.mark.parametrize("off", ["y", "dw1", "dweight", "dresidual", "running var"])
def test_a_wrong_tail_is_found(program, monkeypatch, off):
    gpu_sanitize = program("gpu_sanitize")
    real = gpu_sanitize.block_tail

    def block_tail(x, mean, var, weight, bias, *, backend, **options):
        def turned(t):
            return t + 0.2 * (t - t.detach()) if t is not None else None

        if backend == "reference":
            return real(x, mean, var, weight, bias, backend=backend, **options)
        weight = turned(weight) if off == "dweight" else weight
        names = {"dw1": "w1", "dresidual": "residual"}
        options |= {names[off]: turned(options[names[off]])} if off in names else {}
        y = real(x, mean, var, weight, bias, backend="reference", **options)
        if off == "running var":
            var.mul_(1.2)
        return y * 1.2 if off == "y" else y

    monkeypatch.setattr(gpu_sanitize, "block_tail", block_tail)
    layer = gpu_sanitize.TAILS[2]
    torch.manual_seed(0)
    found = gpu_sanitize.wrong(layer, "cpu", torch.device("cpu"))
    name = f"d {off[1:]}" if off.startswith("d") else off
    assert any(complaint.startswith(f"{name} is off by ") for complaint in found)
    assert off == "y" or len(found) == 1


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


@needs_cuda_host
@needs_triton
def test_the_launches_of_a_tail_are_counted():
    shapes = ("--shape", "2,16,4,5,7", "2,24,4,7,7", "--calls", "1")
    done = python("benchmarks/gpu_launches.py", "--device", "cpu", "--op", "tail", *shapes, TRITON_INTERPRET="1")
    assert done.returncode == 0, done.stdout + done.stderr
    lines = done.stdout.splitlines()
    assert lines[-1] == "4 tails, cuda and triton: all as promised"
    assert all(" 3 launches: " in line for line in lines if "partials" in line)


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


@needs_triton
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
