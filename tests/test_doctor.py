"""senet-fused doctor: it reports what is there, and notices what is broken."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import types

import pytest
import torch

import senet_fused
from senet_fused import backends, cli, machine, select
from senet_fused.backends import cuda
from senet_fused.backends.triton import plan as planner
from senet_fused.backends.triton import tuned
from senet_fused.bench import providers
from senet_fused.cli import doctor

UNAVAILABLE = [
    backends.BackendStatus("cpu", False, "the compiled library is not there"),
    backends.BackendStatus("reference", True, "plain PyTorch"),
]
REFERENCE_ONLY = UNAVAILABLE[1:]


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch, tmp_path):
    for name in ("SENET_FUSED_BACKEND", "SENET_FUSED_ISA", "SENET_FUSED_PLANS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    tuned._from_file.cache_clear()
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
    tuned._from_file.cache_clear()


@pytest.fixture
def examine(capsys):
    def run(*argv):
        status = cli.main(["doctor", *argv])
        return status, capsys.readouterr().out

    return run


def test_it_says_what_is_installed_and_tests_every_backend(examine):
    status, text = examine()
    assert status == 0, text
    assert "all in order" in text and "PROBLEM" not in text
    for fact in (senet_fused.__version__, torch.__version__.split("+")[0], "threads", "features", "environment"):
        assert fact in text
    for backend in backends.status():
        assert f"  {backend.name:<14} {'available' if backend.available else 'not available'}: " in text
    # SE layer, with residual and relu, block tail; contiguous, channels_last.
    checks = [6 * len(backends.dtypes(backend.name)) for backend in backends.status() if backend.available]
    assert [int(line.split()[2]) for line in text.splitlines() if "self-test passed: " in line] == checks


def test_a_missing_backend_is_in_order_unless_it_is_asked_for(monkeypatch, examine):
    monkeypatch.setattr(backends, "status", lambda: UNAVAILABLE)
    monkeypatch.setattr(backends, "refusal", lambda name, *_: "not there" if name == "cpu" else None)
    status, text = examine()
    assert status == 0 and "not available: the compiled library is not there" in text
    assert "note: nothing is fused" in text

    status, text = examine("--backend", "reference", "cpu")
    assert status == 1
    assert "PROBLEM: --backend asks for the backend 'cpu', which cannot run here: the compiled library" in text
    assert "to do: install a C++ compiler" in text

    monkeypatch.setenv("SENET_FUSED_BACKEND", "cpu")
    status, text = examine()
    assert status == 1 and "PROBLEM: SENET_FUSED_BACKEND asks for the backend 'cpu'" in text


def test_an_unknown_backend_in_the_environment_is_a_problem(monkeypatch, examine):
    monkeypatch.setattr(backends, "status", lambda: REFERENCE_ONLY)
    monkeypatch.setenv("SENET_FUSED_BACKEND", "gpu")
    status, text = examine()
    assert status == 1
    assert "PROBLEM: SENET_FUSED_BACKEND names an unknown backend 'gpu'\n  to do: known: auto, reference" in text


def test_an_unknown_backend_on_the_command_line_is_wrong_usage(capsys):
    assert cli.main(["doctor", "--backend", "gpu"]) == 2
    output = capsys.readouterr()
    assert "unknown backend 'gpu'; known: " in output.err and output.out == ""


def test_a_misspelt_variable_is_noticed(monkeypatch, examine):
    monkeypatch.setattr(backends, "status", lambda: REFERENCE_ONLY)
    monkeypatch.setenv("SENET_FUSED_BAKEND", "cpu")
    status, text = examine()
    assert status == 0 and "note: SENET_FUSED_BAKEND is no variable of this package" in text


class OffBackward(torch.autograd.Function):
    """The identity, with a backward that is a little off."""

    @staticmethod
    def forward(ctx, y):
        return y.clone()

    @staticmethod
    def backward(ctx, dy):
        return dy * 1.05


def built_as(change):
    """The builder of the fused layer, with its output changed."""
    real = providers.BUILDERS["fused"]

    def build(case, weights, form, backend):
        provider = real(case, weights, form, backend)
        forward = provider.forward
        provider.forward = lambda x, residual: change(forward(x, residual))
        return provider

    return build


@pytest.mark.parametrize(
    ("wrong", "names"),
    [
        (lambda y: y * 1.05, "@ 5x7 float32 contiguous: wrong output: y is off"),
        (lambda y: torch.where(torch.arange(y.shape[-1]) == 6, torch.nan, y), "y is off by inf"),
        (OffBackward.apply, "@ 5x7 float32 contiguous: wrong output: dx is off"),
    ],
)
def test_a_backend_that_computes_wrongly_fails_its_self_test(monkeypatch, examine, wrong, names):
    monkeypatch.setattr(backends, "status", lambda: REFERENCE_ONLY)
    monkeypatch.setitem(providers.BUILDERS, "fused", built_as(wrong))
    status, text = examine()
    assert status == 1
    assert "self-test FAILED" in text and "PROBLEM: the self-test of 'reference' fails: " in text
    assert names in text and "to do: do not trust this backend" in text


def test_a_tail_that_computes_wrongly_fails_the_self_test(monkeypatch):
    real = senet_fused.block_tail
    monkeypatch.setattr(senet_fused, "block_tail", lambda *args, **options: real(*args, **options) * 1.05)
    checks, wrong = doctor._self_test("reference")
    assert len(wrong) == checks // 3 and all(" tail: wrong output: y is off" in line for line in wrong)


def test_a_self_test_that_another_backend_answers_fails(monkeypatch, examine):
    real = providers.BUILDERS["fused"]
    monkeypatch.setattr(backends, "status", lambda: [backends.BackendStatus("cpu", True, "so it says")])
    monkeypatch.setattr(backends.native, "instruction_set", lambda: "baseline")
    monkeypatch.setitem(
        providers.BUILDERS, "fused", lambda case, weights, form, backend: real(case, weights, form, "reference")
    )
    status, text = examine()
    assert status == 1
    assert (
        "the self-test of 'cpu' fails: 2 x 24/3 @ 5x7 float32 contiguous: backend 'reference' served the calls" in text
    )


def test_a_backend_that_raises_is_reported(monkeypatch, examine):
    def broken(y):
        raise RuntimeError("illegal instruction")

    monkeypatch.setattr(backends, "status", lambda: REFERENCE_ONLY)
    monkeypatch.setitem(providers.BUILDERS, "fused", built_as(broken))
    status, text = examine()
    assert status == 1 and "fails: RuntimeError: illegal instruction" in text


def test_an_instruction_set_that_was_not_taken_is_a_problem(monkeypatch, examine):
    monkeypatch.setattr(backends, "status", lambda: [backends.BackendStatus("cpu", True, "kernels")])
    monkeypatch.setattr(doctor, "_self_test", lambda name: (1, []))
    monkeypatch.setattr(backends.native, "instruction_set", lambda: "avx2")
    monkeypatch.setenv("SENET_FUSED_ISA", "avx2")
    assert examine()[0] == 0
    monkeypatch.setenv("SENET_FUSED_ISA", "avx512")
    status, text = examine()
    assert status == 1 and "SENET_FUSED_ISA asks for 'avx512', but the kernels run with 'avx2'" in text


def test_an_instruction_set_that_nobody_knows_is_a_problem(monkeypatch, examine):
    def status():
        raise RuntimeError("SENET_FUSED_ISA must be baseline, avx2 or avx512; got sse9")

    monkeypatch.setattr(backends, "status", status)
    monkeypatch.setenv("SENET_FUSED_ISA", "sse9")
    status, text = examine()
    assert status == 1
    assert "cpu            not available: SENET_FUSED_ISA must be" in text
    assert "PROBLEM: SENET_FUSED_ISA asks for 'sse9': SENET_FUSED_ISA must be baseline" in text


def test_more_threads_than_processors_are_noted(monkeypatch, examine):
    monkeypatch.setattr(backends, "status", lambda: REFERENCE_ONLY)
    monkeypatch.setattr(machine, "cpus", lambda: 1)
    torch.set_num_threads(2)
    assert "note: PyTorch uses 2 threads on 1 processors" in examine()[1]


# -------------------------------------------------------------------------------------------- plans of the GPU

H200 = planner.DeviceFacts("cuda", 90, 132)
LAYER = planner.Problem(256, 16, 56 * 56)


def test_the_file_of_tuned_plans_is_named(monkeypatch, examine, tmp_path):
    monkeypatch.setattr(backends, "status", lambda: REFERENCE_ONLY)
    monkeypatch.setattr(doctor, "_triton_facts", lambda: [])
    status, text = examine()
    assert status == 0 and "  tuned plans    none\n" in text

    tuned.write(tuned.default_path(), {(H200, LAYER): planner.plan(LAYER, H200)})
    assert f"  tuned plans    1 in {tuned.default_path()}\n" in examine()[1]
    monkeypatch.setattr(doctor, "_triton_facts", lambda: [planner.DeviceFacts("cuda", 80, 108)])
    assert f"1 in {tuned.default_path()}, 0 of them for the GPUs here\n" in examine()[1]

    monkeypatch.setenv("SENET_FUSED_PLANS", str(tmp_path / "none.json"))
    status, text = examine()
    assert status == 1 and f"tuned plans    {tmp_path / 'none.json'} cannot be read" in text
    assert f"PROBLEM: cannot read Triton plans from {tmp_path / 'none.json'}" in text
    monkeypatch.setenv("SENET_FUSED_PLANS", "")
    status, text = examine()
    assert status == 0 and "tuned plans    none" in text and "no variable of this package" not in text


def test_the_plans_of_a_layer(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(doctor, "_triton_facts", lambda: [])
    assert cli.main(["doctor", "--plan", "64,256,16,56,56"]) == 0
    text = capsys.readouterr().out
    assert text.startswith("64 x 256/16 @ 56x56 bfloat16 channels_last\nauto ")
    assert "\ntriton, for an H200, as there is no GPU here that these kernels serve (cuda 90, 132 multi" in text
    for direction in ("forward", "backward"):
        plan = planner.plan(planner.Problem(256, 16, 56 * 56, backward=direction == "backward"), H200)
        assert f"  {direction}: {plan.strategy}, counted\n    {plan.reason}\n" in text

    others = [plan for plan in planner.candidates(LAYER, H200) if plan.strategy == "launches"]
    tuned.write(tuned.default_path(), {(H200, LAYER): others[0]})
    assert cli.main(["doctor", "--plan", "1,256,16,56,56"]) == 0
    text = capsys.readouterr().out
    assert "forward: launches, tuned\n" in text and "backward: partials, counted\n" in text

    monkeypatch.setattr(doctor, "_triton_facts", lambda: [planner.DeviceFacts("hip", "gfx942", 304, 64)])
    assert cli.main(["doctor", "--plan", "8,64,4,7,7", "--layout", "contiguous", "--dtype", "float16"]) == 0
    text = capsys.readouterr().out
    assert "triton, for the GPU here (hip gfx942, 304 multiprocessors)" in text and "rows: 1 sample(s)" in text


def test_the_cuda_plans_of_a_layer(monkeypatch, capsys):
    native = pytest.importorskip("senet_fused._plan", exc_type=ImportError)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)

    def section(*options):
        assert cli.main(["doctor", "--plan", *options]) == 0
        found = re.search(r"^cuda, for (an H200.*?)\n(.*?)^$", capsys.readouterr().out, re.DOTALL | re.MULTILINE)
        return found[2].splitlines()

    lines = section("64,256,16,56,56")
    facts = cuda.facts_of_h200()
    for direction, (first, why, tile) in zip(("forward", "backward"), (lines[:3], lines[3:]), strict=True):
        problem = cuda.Problem(64, 256, 16, 56 * 56, backward=direction == "backward")
        plan = native.plan_cuda(problem.native(), facts)
        assert first == f"  {direction}: {plan.strategy}"
        assert why.strip() == native.cuda_reason(problem.native(), facts, plan)
        assert f"channels_last: 1 sample(s) x {plan.channels} channels x {plan.positions} positions, " in tile
        assert tile.endswith(f" {plan.splits} split(s), dependent launch on, streaming stores on")

    # Positions that a tile could take and a plane does not have are not shown; nor is an output of 25 kB streamed.
    tile = section("2,64,4,7,7", "--dtype", "float32")[2]
    assert "x 49 positions, 1 split(s)" in tile and tile.endswith("streaming stores off")
    tile = section("2,64,4,7,7", "--layout", "contiguous")[2]
    assert "tile_of_planes: " in tile and re.search(r", \d+ lanes to a plane, dependent launch on", tile)


def test_the_facts_of_the_gpu_here_are_taken(monkeypatch):
    pytest.importorskip("senet_fused._plan", exc_type=ImportError)
    asked = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(cuda, "device_facts", lambda device: asked.append(device) or "facts")

    def has(major, minor):
        found = types.SimpleNamespace(major=major, minor=minor, multi_processor_count=108)
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda number: found)

    has(8, 0)
    assert doctor._cuda_facts() == ("facts", "the GPU here (compute capability 8.0, 108 multiprocessors)")
    assert asked == [torch.device("cuda", 0)]
    has(7, 5)
    assert doctor._cuda_facts()[1].startswith("an H200")
    has(9, 4)
    monkeypatch.setattr(torch.version, "hip", "6.4")
    assert doctor._cuda_facts()[1].startswith("an H200") and len(asked) == 1


def test_without_the_compiled_planner_triton_s_plan_is_there(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "senet_fused._plan", None)
    monkeypatch.delattr(senet_fused, "_plan", raising=False)
    assert cli.main(["doctor", "--plan", "64,256,16,56,56"]) == 0
    text = capsys.readouterr().out
    assert "\ncuda: no plan, as the compiled planner is missing (" in text and "to do: install a C++ compiler" in text
    assert "\ntriton, for " in text and text.count("ward: ") == 2


def test_the_plans_of_a_tail(monkeypatch, capsys):
    native = pytest.importorskip("senet_fused._plan", exc_type=ImportError)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(doctor, "_triton_facts", lambda: [])
    asked = []
    monkeypatch.setattr(planner, "plan", lambda p, facts: asked.append(p) or planner.candidates(p, facts)[0])
    real = cuda.plan_of
    monkeypatch.setattr(cuda, "plan_of", lambda p, facts: asked.append(p) or real(p, facts))
    assert cli.main(["doctor", "--plan", "64,2048,128,7,7", "--op", "tail"]) == 0
    text = capsys.readouterr().out
    assert text.startswith("64 x 2048/128 @ 7x7 bfloat16 channels_last tail\n")
    assert native and "\nauto takes " in text
    assert "\ncuda, for an H200" in text and "\ntriton, for an H200" in text
    assert text.count("  forward: ") == text.count("  backward: ") == 2
    assert [(p.norm, p.relu, p.residual, p.backward) for p in asked] == [
        ("batch", True, True, backward) for backward in (False, True) * 2
    ]


def test_the_plans_of_a_tail_are_its_own(capsys):
    for options in ([], ["--op", "tail"]):
        assert cli.main(["doctor", "--plan", "64,2048,128,7,7", *options]) == 0
    layer, tail = capsys.readouterr().out.split("64 x 2048/128 @ 7x7")[1:]
    assert layer.split("\ntriton,")[1] != tail.split("\ntriton,")[1]
    assert cli.main(["doctor", "--plan", "1,8,2,1,1", "--op", "tail"]) == 2
    assert "more than one value per channel" in capsys.readouterr().err


def test_which_backend_auto_takes_on_a_gpu(monkeypatch, capsys):
    monkeypatch.setattr(select, "choose", lambda *asked, **_: select.Choice("cuda", f"for {asked}"))
    assert cli.main(["doctor", "--plan", "1,8,2,4,4"]) == 0
    line = capsys.readouterr().out.splitlines()[1]
    assert line == "auto takes 'cuda' for these tensors on a GPU: for ('auto', 'cuda', torch.bfloat16)"


def test_where_there_is_a_gpu_the_report_says_what_auto_takes_for_it(monkeypatch, examine):
    monkeypatch.setattr(backends, "status", lambda: REFERENCE_ONLY)
    real = select.choose

    def choose(backend, device_type, dtype, compiling=False, pre_act=False):
        if device_type == "cpu":
            return real(backend, device_type, dtype, compiling, pre_act)
        name = "reference" if dtype == torch.float64 else "cuda"
        return select.Choice(name, f"{name}: serves cuda tensors")

    monkeypatch.setattr(select, "choose", choose)
    assert "on a GPU" not in examine()[1] or torch.cuda.is_available()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(doctor, "_tuned_plans", lambda report: None)
    status, text = examine()
    assert status == 0
    assert "takes 'cuda' for float32, bfloat16, float16 on a GPU: cuda: serves cuda tensors\n" in text
    assert "takes 'reference' for float64 on a GPU: reference: serves cuda tensors\n" in text


def test_a_layer_or_a_file_that_cannot_be_read(monkeypatch, capsys, tmp_path):
    assert cli.main(["doctor", "--plan", "256,56"]) == 2
    assert "senet-fused doctor: error: cannot read the shape '256,56'" in capsys.readouterr().err
    monkeypatch.setenv("SENET_FUSED_PLANS", str(tmp_path))
    assert cli.main(["doctor", "--plan", "64,256,16,56,56"]) == 1
    assert f"cannot read Triton plans from {tmp_path}" in capsys.readouterr().err


# ------------------------------------------------------------------------------------------- machine facts


def test_the_machine_is_known():
    assert machine.cpu_name() and machine.cpus() >= 1
    assert machine.last_level_cache_bytes() >= 2**18
    assert machine.package_version("torch").split("+")[0] == torch.__version__.split("+")[0]
    assert machine.package_version("no-such-package") is None


def test_the_revision_is_that_of_the_checkout_and_only_of_it(monkeypatch, tmp_path):
    if shutil.which("git") is None:
        pytest.skip("git is missing")

    def git(*arguments):
        identity = ["-c", "user.name=n", "-c", "user.email=e@example.org", "-c", "commit.gpgsign=false"]
        done = subprocess.run(
            ["git", "-C", tmp_path, *identity, *arguments], capture_output=True, text=True, check=True
        )
        return done.stdout.strip()

    file, copy = tmp_path / "machine.py", tmp_path / "installed.py"
    file.write_text("one")
    copy.write_text("an untracked copy")
    monkeypatch.setattr(machine, "__file__", str(file))
    assert machine.revision() is None  # no repository
    git("init")
    git("add", "machine.py")
    assert machine.revision() is None  # no commit
    git("commit", "-m", "first", "--no-verify")
    assert machine.revision() == git("rev-parse", "HEAD")
    file.write_text("two")
    assert machine.revision() == git("rev-parse", "HEAD") + "-dirty"
    monkeypatch.setattr(machine, "__file__", str(copy))
    assert machine.revision() is None
