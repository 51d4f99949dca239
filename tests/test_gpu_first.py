"""benchmarks/gpu_first.py and the kernels' cases, without a GPU: kernels on the host, a stand-in for what breaks."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from gpu_programs import BENCHMARKS, ROOT, load_program, needs_cuda_host, needs_interpreter, parsed  # noqa: F401

pytestmark = pytest.mark.skipif(not BENCHMARKS.exists(), reason="not a checkout")


# ---------------------------------------------------------------------------------------------- the kernels' cases


@pytest.fixture
def gpu_kernels(program, monkeypatch):
    """A function of options, and of what takes the place of the tables: the exit status of gpu_kernels.py on a CPU."""
    module = program("gpu_kernels")

    def run(*options):
        monkeypatch.setattr(sys, "argv", ["gpu_kernels.py", "--device", "cpu", *options])
        return module.main()

    module.run = run
    return module


def few(gpu_kernels, monkeypatch, op, backend, *numbers):
    """Leaves these layers of a table, and the strategies and forms that they meet."""
    layers, variants, _ = gpu_kernels.BACKENDS[op][backend]
    layers = tuple(layers[number] for number in numbers)
    met = {what for layer in layers for way in variants(layer, torch.device("cpu")) for what in way.met}
    monkeypatch.setitem(gpu_kernels.BACKENDS[op], backend, (layers, variants, met))
    return met


@needs_cuda_host
@needs_interpreter
@pytest.mark.parametrize("dtype", ["own", "every"])
@pytest.mark.parametrize("op", ["se", "tail"])
@pytest.mark.parametrize("backend", ["cuda", "triton"])
def test_the_cases_meet_every_strategy_and_form(gpu_kernels, backend, op, dtype):
    layers, variants, wanted = gpu_kernels.BACKENDS[op][backend]
    layers = layers if dtype == "own" else tuple(gpu_kernels.in_every_dtype(layers))
    ways = [(layer, way) for layer in layers for way in variants(layer, torch.device("cpu"))]
    assert set().union(*(way.met for _, way in ways)) == wanted
    pairs = {(strategy, form) for _, way in ways for strategy, form in [way.text.split(", ")[:2]]}
    of_rows = {("launches", "rows")} if (op, backend) == ("se", "triton") else set()
    forms = {form for _, form in pairs} - {"rows"}
    assert pairs == {(strategy, form) for strategy in gpu_kernels.CUDA_STRATEGIES for form in forms} | of_rows
    assert any("2 and 2 splits" in way.text for _, way in ways)
    assert backend == "triton" or any(re.search(r"([2-9]|\d\d) and \d+ samples", way.text) for _, way in ways)
    if dtype == "every":
        met = {(layer.case.dtype, layer.case.layout, *way.met) for layer, way in ways}
        for kind in gpu_kernels.DTYPES:
            assert {layout for found, layout, *_ in met if found == kind} == {"contiguous", "channels_last"}
            # Rows are of 16-bit planes alone.
            assert set().union(*(more for found, _, *more in met if found == kind)) >= wanted - {"rows"}
    if op == "tail":
        norms = {(layer.case.training, bool(layer.case.reduced)) for layer, _ in ways}
        assert norms == {(True, True), (True, False), (False, True), (False, False)}


@needs_cuda_host
def test_the_cases_launch_every_cuda_kernel(gpu_kernels):
    """Of all that the host files can launch."""
    sources = (ROOT / "csrc" / "cuda").glob("*.cu")
    known = {name for path in sources for name in re.findall(r'"(\w+_kernel)"', path.read_text())}
    device, launched = torch.device("cpu"), set()
    assert gpu_kernels.gpu_backends.refusal("cuda", device) is None
    for op in ("se", "tail"):
        layers, variants, _ = gpu_kernels.BACKENDS[op]["cuda"]
        rule = gpu_kernels.oracle if op == "se" else gpu_kernels.tail_oracle
        for layer in layers[: len(gpu_kernels.LAYERS)]:
            for way in variants(layer, device):
                gpu_kernels.gpu_backends.forget_launches("cuda", device)
                with way.using():
                    rule.run_on("cuda", device, layer.case, rule.draw(layer.case, 0))
                launched |= gpu_kernels.gpu_backends.counted_launches("cuda", device).keys()
    assert launched == known and len(known) > 20


@needs_cuda_host
@needs_interpreter
@pytest.mark.parametrize("op", ["se", "tail"])
@pytest.mark.parametrize("backend", ["cuda", "triton"])
def test_cases_run_and_are_held_against_float64(gpu_kernels, monkeypatch, capsys, backend, op):
    met = few(gpu_kernels, monkeypatch, op, backend, 1, 3)
    assert gpu_kernels.run("--backend", backend, "--op", op, "--poison") == 0
    torch.use_deterministic_algorithms(False)
    lines = capsys.readouterr().out.splitlines()
    told, kernels = lines[::2], lines[1::2]
    assert len(told) >= 4 and all(line.startswith(f"{backend}: shape=") and line.endswith(": ok") for line in told)
    assert all("_kernel" in line for line in kernels)
    layers, variants, _ = gpu_kernels.BACKENDS[op][backend]
    monkeypatch.setitem(gpu_kernels.BACKENDS[op], backend, (layers[:1], variants, met))
    monkeypatch.setattr(gpu_kernels, "wrong", lambda *case: None)
    assert gpu_kernels.run("--backend", backend, "--op", op) == 1
    assert capsys.readouterr().err == f"gpu_kernels: {backend}: not met: channels_last\n"


@pytest.mark.parametrize("off", ["y", "dx", "dw1", "dweight", "dresidual", "running_var"])
def test_a_wrong_tensor_is_found(gpu_kernels, monkeypatch, off):
    """By a thousandth of its largest element, in one place."""
    tail = off in ("dweight", "running_var")
    rule = gpu_kernels.tail_oracle if tail else gpu_kernels.oracle

    def run_on(backend, device, case, inputs):
        found = rule.run(rule.layer, case, inputs)
        found[off][(1,) * found[off].dim()] += 1e-3 * found[off].abs().max()
        return found

    monkeypatch.setattr(rule, "run_on", run_on)
    case = (gpu_kernels.TAILS[3] if tail else gpu_kernels.LAYERS[4]).case.replace(dtype=torch.float32)
    found = gpu_kernels.wrong(case, "cpu", torch.device("cpu"))
    assert found.startswith(f"{{'{off}': ") and found.count("allowed") == 1


def test_one_that_raises_is_told_and_the_next_runs_unless_the_device_is_dead(gpu_kernels, monkeypatch, capsys):
    case = gpu_kernels.LAYERS[1]
    way = gpu_kernels.Variant("a plan", {"met"}, contextlib.nullcontext)
    monkeypatch.setitem(gpu_kernels.BACKENDS["se"], "cuda", ((case, case, case), lambda layer, device: [way], {"met"}))
    monkeypatch.setattr(gpu_kernels.gpu_backends, "refusal", lambda backend, device: None)
    monkeypatch.setattr(gpu_kernels.gpu_backends, "forget_launches", lambda backend, device: None)
    monkeypatch.setattr(gpu_kernels.gpu_backends, "counted_launches", lambda backend, device: {})

    def raising(*case):
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(gpu_kernels, "wrong", raising)
    argv = ("--backend", "cuda", "--lines", "--skip", "1")
    assert gpu_kernels.run(*argv) == 1
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [line["status"] for line in lines] == ["planned", "begun", "failed", "begun", "failed"]
    assert lines[0]["count"] == 3 and "illegal memory access" in lines[2]["detail"]
    monkeypatch.setattr(gpu_kernels, "alive", lambda device: False)
    assert gpu_kernels.run(*argv) == gpu_kernels.DEAD
    assert len(capsys.readouterr().out.splitlines()) == 3


# ---------------------------------------------------------------------------------------------- the first minutes

FACTS = {"device": None, "capability": None, "torch": "2", "timm": None}
# In place of gpu_kernels.py: cases 0 to 4 of each group, of which those named in the environment do not end well.
CASES = """
import json, os, sys, time
value = lambda name: sys.argv[sys.argv.index(name) + 1]
name = {"op": value("--op"), "backend": value("--backend")}
bad = dict(pair.split(":") for pair in os.environ.get("BAD_CASES", "").split())
if name["backend"] in bad:
    time.sleep(60)
print(json.dumps({**name, "status": "planned", "count": 5}), "noise", sep="\\n", flush=True)
for case in range(int(value("--skip")), 5):
    how = bad.get(f"{name['backend']}{case}", "ok")
    print(json.dumps({**name, "case": str(case), "status": "begun"}), flush=True)
    if how == "hung":
        time.sleep(60)
    if how == "died":
        print("a last word", file=sys.stderr)
        os._exit(7)
    found = {"status": how, **({"detail": "why"} if how != "ok" else {})}
    print(json.dumps({**name, "case": str(case), **found}), flush=True)
    if how == "failed":
        sys.exit(3)
"""


@pytest.fixture
def first(program, monkeypatch, tmp_path, capsys):
    """A function of arguments: gpu_first.py on a CPU; its exit status, first.json, the kernels' lines, its output."""
    module = program("gpu_first")
    monkeypatch.setattr(module, "_FACTS", f"print({json.dumps(FACTS)!r})")
    (tmp_path / "cases.py").write_text(CASES)

    def run(*argv, device="cpu", kernels=tmp_path / "cases.py"):
        argv = ["--device", device, "--out", str(tmp_path / "out"), "--kernels", str(kernels), *argv]
        code = module.First(module.parse(argv)).run()
        lines, known = tmp_path / "out" / "kernels.jsonl", tmp_path / "out" / "first.json"
        told = [json.loads(line) for line in lines.read_text().splitlines()] if lines.exists() else []
        return code, json.loads(known.read_text()) if known.exists() else None, told, capsys.readouterr().out

    run.module, run.out = module, tmp_path / "out"
    return run


def test_the_first_minutes_need_a_gpu(first):
    code, known, _, text = first(device="cuda")
    assert code == 2 and known is None
    assert text == "gpu_first: PyTorch finds no NVIDIA GPU here, nothing checked (--device cpu tries it out)\n"


def test_cases_that_are_right_are_told_one_by_one(first):
    code, known, told, text = first("kernels")
    assert code == 0 and known["finished"] and known["failures"] == [] and known["parts"]["kernels"]["status"] == "ok"
    cases = {(line["backend"], line["op"], line.get("case")) for line in told if line["status"] == "ok"}
    assert cases == {(b, op, str(n)) for b in ("cuda", "triton") for op in ("se", "tail") for n in range(5)}
    assert text.count(": 5 of 5 cases are right") == 4 and "all right in" in text


@pytest.mark.parametrize("how", ["wrong", "failed", "died", "hung"])
def test_a_case_that_does_not_end_well_is_told_and_the_rest_goes_on(first, monkeypatch, how):
    """failed: as where the device is dead afterwards."""
    monkeypatch.setenv("BAD_CASES", f"cuda1:{how}")
    code, known, told, text = first("kernels", "--case-limit", "2")
    assert code == 1 and known["finished"] and len(known["failures"]) == 2
    found = {(line["backend"], line["op"], line["case"]): line["status"] for line in told if "case" in line}
    assert len(found) == 20 and all(status == "ok" for key, status in found.items() if key[::2] != ("cuda", "1"))
    assert found["cuda", "se", "1"] == found["cuda", "tail", "1"] == how
    detail = {"died": "exit status 7: a last word", "hung": "2 s"}.get(how, "why")
    assert f"kernels: cuda se: 1: {how}: {detail}" in known["failures"]
    assert text.rpartition("2 failures in ")[2].count(f": 1: {how}: ") == 2  # once more at the end


def test_a_group_that_always_breaks_is_given_up(first, monkeypatch):
    monkeypatch.setattr(first.module, "RESTARTS", 1)
    monkeypatch.setenv("BAD_CASES", "cuda0:died cuda1:died")
    code, known, _, text = first("kernels")
    assert code == 1 and "kernels: cuda se: 3 of 5 cases have not run" in known["failures"]
    assert "triton tail: 5 of 5 cases are right" in text
    code, known, told, _ = first("kernels", kernels="none.py")
    assert code == 1 and len(told) == 4 and {line["status"] for line in told} == {"refused"}  # Python's own status is 2


def test_a_part_that_hangs_leaves_time_for_the_others(first, monkeypatch):
    monkeypatch.setattr(first.module.First, "layers", lambda self, until: self.say("layers' turn"))
    monkeypatch.setenv("BAD_CASES", "cuda0:hung triton:hung")
    code, known, _, text = first("kernels", "layers", "--limit", "6")
    assert code == 1 and "layers' turn" in text and known["parts"]["layers"]["status"] == "ok"
    assert known["parts"]["kernels"]["status"] == "failed" and known["parts"]["kernels"]["seconds"] < 5
    assert "kernels: cuda se: 5 of 5 cases have not run" in known["failures"]
    assert "kernels: triton se: a process: not begun: no case within the time of this part" in known["failures"]
    code, known, _, _ = first("kernels", "--limit", "0")
    assert code == 1 and known["failures"] == ["kernels: out of time, not begun"]


@pytest.mark.processes
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM], ids=["killed", "ended"])
def test_what_is_known_is_there_after_a_kill(first, tmp_path, number):
    start = f"import gpu_first, sys; gpu_first._FACTS = {first.module._FACTS!r}; sys.argv[0] = gpu_first.__file__"
    code = f"{start}; sys.exit(gpu_first.main())"
    argv = ["--device", "cpu", "--out", first.out, "--kernels", tmp_path / "cases.py", "kernels", "--limit", "40"]
    env = {**os.environ, "PYTHONPATH": str(BENCHMARKS), "BAD_CASES": "cuda3:hung triton3:hung"}
    process = subprocess.Popen(
        [sys.executable, "-c", code, *map(str, argv)], env=env, stdout=subprocess.PIPE, text=True
    )
    lines = first.out / "kernels.jsonl"
    end = time.monotonic() + 30
    while (lines.read_text().count('"ok"') if lines.exists() else 0) < 6 and time.monotonic() < end:
        time.sleep(0.05)
    process.send_signal(number)
    text = process.communicate(timeout=30)[0]
    told = [json.loads(line) for line in lines.read_text().splitlines()]
    assert sum(line["status"] == "ok" for line in told) >= 6
    known = json.loads((first.out / "first.json").read_text())
    if number == signal.SIGKILL:
        assert not known["finished"] and known["parts"]["kernels"]["status"] == "running"
    else:
        assert process.returncode == 1 and "interrupted" in known["failures"] and "failures in" in text


@pytest.mark.processes
@needs_cuda_host
def test_a_planted_wrong_kernel_is_reported_and_no_other(first, tmp_path, monkeypatch):
    """The real cases, of one layer, by the CUDA kernels; one element of y is off by one of the strategies."""
    plant = tmp_path / "plant.py"
    plant.write_text(f"""
import contextlib, sys
sys.path.insert(0, {str(BENCHMARKS)!r})
import gpu_kernels
from senet_fused.backends import cuda

real = cuda.forward

def off(call, outputs, channels_last):
    real(call, outputs, channels_last)
    outputs.y[1, 2, 3, 4] += 0.5

@contextlib.contextmanager
def planted(using):
    with using():
        cuda.forward = off
        yield
        cuda.forward = real

def variants(layer, device):
    for way in gpu_kernels.cuda_variants(layer, device):
        yield way._replace(using=lambda: planted(way.using)) if way.text.startswith("last_block") else way

layers = gpu_kernels.BACKENDS["se"]["cuda"][0]
gpu_kernels.BACKENDS["se"]["cuda"] = layers[3:4], variants, set()
gpu_kernels.in_every_dtype = lambda layers: layers
sys.exit(gpu_kernels.main())
""")
    monkeypatch.setattr(first.module, "GROUPS", [("cuda", "se")])
    code, known, told, _ = first("kernels", kernels=plant)
    cases = [line for line in told if "case" in line]
    assert code == 1 and len(cases) >= 3 and all(line["kernels"] for line in cases)
    for line in cases:
        assert line["status"] == ("wrong" if line["plan"].startswith("last_block") else "ok"), line
    assert len(known["failures"]) == sum(line["status"] == "wrong" for line in cases) >= 1
    assert all(": last_block, " in text or ", last_block, " in text for text in known["failures"])
    assert all(": wrong: {'y': " in text for text in known["failures"])


@pytest.mark.processes
def test_layers_and_networks_are_measured_on_tiny_sizes(first, monkeypatch):
    """By stock PyTorch and the CPU's kernels: the same calls as on a GPU, but for the sizes."""
    monkeypatch.setattr(first.module, "BACKENDS", ("fused",))
    code, known, _, text = first("layers", "networks")
    assert code == 0, text
    assert known["parts"]["layers"]["cases"] == {"se": 2, "tail": 2}
    for op in ("se", "tail"):
        rows = json.loads((first.out / f"layers-{op}.json").read_text())["rows"]
        assert {row["provider"] for row in rows} == {"eager", "fused", "copy"} and all(row["median_s"] for row in rows)
    assert text.count("layers: tail: 2,16,4,5,7 channels_last: eager ") == 1
    assert known["parts"]["networks"]["cases"] == {"se_resnet20": 3}
    assert "timm is not installed: se_resnet20 of senet_fused.models in place of" in text
    rows = json.loads((first.out / "networks-se_resnet20.json").read_text())["rows"]
    names = [Path(row["model"]).name.removeprefix("networks.py:se_resnet20_") for row in rows]
    assert names == ["stock", "tails", "no_se"]
    assert all(row["median_s"] and row["amp"] and row["dtype"] == "bfloat16" for row in rows)


def test_what_is_measured_on_a_gpu_is_what_the_programs_take(first, monkeypatch, program):
    """And a GPU's own architecture, and only backends that run."""
    calls = []

    def run(self, command, limit_s, log, **environment):
        calls.append((command, environment))
        log.write_text("a word\n")
        return 1 if "seresnet50" in command else 0

    facts = {"device": "NVIDIA H200", "capability": "9.0", "torch": "2", "timm": "1"}
    monkeypatch.setattr(first.module, "_FACTS", f"print({json.dumps(facts)!r})")
    monkeypatch.setattr(first.module, "_REFUSALS", 'print(\'{"cuda": "no nvcc", "triton": null}\')')
    monkeypatch.setattr(first.module.Processes, "run", run)
    code, known, _, text = first("build", "doctor", "layers", "networks", device="cuda")
    assert code == 1 and known["failures"] == [
        "doctor: cuda does not run: no nvcc",
        "networks: seresnet50: exit status 1; the end of networks-seresnet50.log:\na word",
    ]
    (build, environment), (doctor, _), se, tail, *networks = calls
    assert build[0] == "setup.py" and environment["TORCH_CUDA_ARCH_LIST"] == "9.0"
    assert environment["SENET_FUSED_CUDA"] == "1" and environment["MAX_JOBS"] == str(first.module.CPUS)
    assert doctor == ["-m", "senet_fused", "doctor"]
    for (call, _), op in ((se, "se"), (tail, "tail")):
        args = parsed(shlex.join(call), program)
        assert (args.op, args.problem, args.batch, args.dtype) == (op, ["senet154"], [64], ["bfloat16"])
        assert args.layout == ["contiguous", "channels_last"] and args.direction == ["forward+backward"]
        assert args.providers == ["eager", "compile", "triton"] and args.device == "cuda"
    for (call, _), name in zip(networks, ("seresnet50", "legacy_senet154"), strict=True):
        args = parsed(shlex.join(call), program)
        assert (args.models, args.providers) == ([name], ["stock", "tails", "no-se"])
        assert (args.amp, args.mode, args.layout, args.batch) == (True, ["training"], ["channels_last"], [64])
