"""``senet-fused doctor``: what is installed, which backends can run here and why not, are they right."""

from __future__ import annotations

import argparse
import dataclasses
import os
import platform
import sys
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

import senet_fused
from senet_fused import backends, machine, select, torch_private
from senet_fused.arguments import RequestError
from senet_fused.backends import cuda, triton
from senet_fused.backends.triton import plan as planner
from senet_fused.backends.triton import tuned
from senet_fused.bench import buffers, oracle, providers, runner
from senet_fused.bench.problems import LAYOUTS, OPS, Case, cases

from .tune import DTYPES, cuda_problem, label_of, problem_of

__all__ = ["add_arguments", "run"]

_PACKAGES = ("torch", "numpy", "triton", "rich", "matplotlib", "scikit-learn")
_THREAD_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OMP_WAIT_POLICY", "GOMP_CPU_AFFINITY", "KMP_AFFINITY")
_SHAPE = "2,24,3,5,7"  # of the self-test
_AN_H200 = "an H200, as there is no GPU here that these kernels serve"
_PREFIX = "SENET_FUSED_"
_ENVIRONMENT = {
    "SENET_FUSED_BACKEND": "the backend of calls that name none",
    "SENET_FUSED_ISA": "the instruction set of the CPU kernels",
    "SENET_FUSED_PLANS": "the file of tuned plans of the Triton kernels, empty for none",
    "SENET_FUSED_NO_EXT": "read by the build: install without compiled code",
    "SENET_FUSED_CUDA": "read by the build: the CUDA library, 1 required, 0 left out, auto where nvcc is found",
    "SENET_FUSED_SANITIZE": "read by the build: compile with sanitizers",
    "SENET_FUSED_CXXFLAGS": "read by the build: more compiler flags",
}
_REINSTALL = (
    "install a C++ compiler (Debian, Ubuntu: apt install g++; macOS: xcode-select --install) and reinstall "
    "without SENET_FUSED_NO_EXT: pip install --force-reinstall --no-deps ."
)

_EPILOG = """\
The self-test runs every backend that is available, forward and backward, in every dtype and layout, against
float64: the SE layer, the same with a shortcut and ReLU behind it, and the block tail.

--plan prints which backend "auto" takes on a GPU, and how the CUDA and the Triton kernels serve one layer, or with --op
tail the block tail around it in training, and nothing else: for Triton the tuned plan where there is one for this GPU
(senet-fused tune), else the counted one. Without a GPU they are an H200's.

exit status: 0 all in order, 1 something that was asked for is broken (a self-test fails; --backend or
SENET_FUSED_BACKEND names a backend that cannot run here), 2 wrong usage
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options of the subcommand."""
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = _EPILOG
    parser.add_argument("--backend", nargs="+", default=[], metavar="NAME", help="backends that have to be available")
    parser.add_argument("--plan", metavar="N,C,R,H,W", help="print the GPU kernels' plans for this layer, and stop")
    parser.add_argument(
        "--op",
        default="se",
        choices=OPS,
        help="of --plan: the SE layer (default), or a tail: BatchNorm -> SE -> + residual -> ReLU",
    )
    parser.add_argument("--dtype", default="bfloat16", choices=DTYPES, help="of --plan (default bfloat16)")
    parser.add_argument("--layout", default="channels_last", choices=LAYOUTS, help="of --plan (default channels_last)")


class _Report:
    """Prints facts as they come and collects what is wrong, with what to do about it."""

    def __init__(self) -> None:
        self.problems: dict[str, str] = {}
        self.notes: list[str] = []

    def fact(self, name: str, value: object) -> None:
        print(f"  {name:<14} {value}")

    def problem(self, what: str, remedy: str) -> None:
        self.problems[what] = remedy

    def finish(self) -> int:
        for text in self.notes:
            print(f"\nnote: {text}")
        for what, remedy in self.problems.items():
            print(f"\nPROBLEM: {what}\n  to do: {remedy}")
        print(f"\n{len(self.problems)} problem(s)" if self.problems else "\nall in order")
        return 1 if self.problems else 0


def _installation(report: _Report) -> None:
    package = Path(senet_fused.__file__).parent
    print("\ninstalled")
    report.fact("senet_fused", f"{senet_fused.__version__} in {package}")
    revision = machine.revision()
    if revision is not None:
        report.fact("revision", revision)
    report.fact("python", f"{platform.python_version()} on {platform.platform()}")
    for name in _PACKAGES:
        # torch's own text tells its CPU and CUDA builds apart.
        version = torch.__version__ if name == "torch" else machine.package_version(name)
        report.fact(name, version or "not installed")
    for interface in torch_private.missing():
        report.notes.append(f"torch {torch.__version__} has no {interface.name}: {interface.without}")
    try:
        from senet_fused import _plan
    except ImportError as error:
        files = [path.name for path in package.glob("_plan.*") if path.suffix in (".so", ".pyd")]
        report.fact("built with", "no compiled parts" if not files else f"cannot tell: {error}")
        if files:
            report.problem(
                f"the compiled module {files[0]} does not import: {error}",
                "it was built for another Python; " + _REINSTALL,
            )
        return
    facts = dict(_plan.build_info())
    report.fact("built with", ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in facts.items()))
    if facts.get("version") not in (None, "unknown", senet_fused.__version__):
        report.problem(
            f"the compiled parts are of version {facts['version']}, the Python files of {senet_fused.__version__}",
            "build again: pip install --force-reinstall --no-deps .",
        )


def _processor(report: _Report) -> None:
    print("\nprocessor")
    report.fact("cpu", f"{machine.cpu_name()}, {machine.cpus()} usable of {os.cpu_count()}")
    report.fact("features", " ".join(machine.cpu_features()) or "the system does not say")
    report.fact("last cache", f"{machine.last_level_cache_bytes() / 2**20:.0f} MiB")
    report.fact("threads", f"{torch.get_num_threads()} (PyTorch, intra-op)")
    none = "none found" if torch.version.cuda or torch.version.hip else "this PyTorch is built without GPU support"
    names = [torch.cuda.get_device_name(number) for number in range(torch.cuda.device_count())]
    report.fact("gpu", ", ".join(names) or none)
    if torch.get_num_threads() > machine.cpus():
        report.notes.append(
            f"PyTorch uses {torch.get_num_threads()} threads on {machine.cpus()} processors; one each is "
            "faster: OMP_NUM_THREADS or torch.set_num_threads()"
        )


def _environment(report: _Report, unavailable: dict[str, str | None], isa: str | None) -> None:
    print("\nenvironment")
    found = {name: value for name, value in sorted(os.environ.items()) if name.startswith(_PREFIX)}
    threads = {name: os.environ[name] for name in _THREAD_VARIABLES if name in os.environ}
    for name, value in (found | threads).items():
        about = _ENVIRONMENT.get(name, "")
        report.fact(name, f"= {value}" + (f"  ({about})" if about else ""))
        if name in found and not about:
            report.notes.append(f"{name} is no variable of this package; it has {', '.join(_ENVIRONMENT)}")
    if not found and not threads:
        report.fact("none", f"of {_PREFIX}* and the thread settings")

    asked = found.get("SENET_FUSED_BACKEND")
    if asked and asked != "auto":
        _require(report, asked, "SENET_FUSED_BACKEND", unavailable)
    asked = found.get("SENET_FUSED_ISA")
    remedy = "unset it, or name an instruction set that the library was built with and the processor has"
    if asked and isa is not None and isa != asked:
        report.problem(f"SENET_FUSED_ISA asks for {asked!r}, but the kernels run with {isa!r}", remedy)
    elif asked and "SENET_FUSED_ISA" in (unavailable.get("cpu") or ""):
        report.problem(f"SENET_FUSED_ISA asks for {asked!r}: {unavailable['cpu']}", remedy)


def _statuses() -> list[backends.BackendStatus]:
    """Every backend's state; the compiled ones cannot even tell theirs where SENET_FUSED_ISA is wrong."""
    try:
        return backends.status()
    except RuntimeError as error:
        reasons = dict.fromkeys(backends.NAMES, str(error)) | {"reference": "plain PyTorch, any device"}
        return [backends.BackendStatus(name, name == "reference", reason) for name, reason in reasons.items()]


def _require(report: _Report, name: str, who: str, unavailable: dict[str, str | None]) -> None:
    """Records a problem if a backend that was asked for is unknown or cannot run."""
    if name not in unavailable:
        report.problem(f"{who} names an unknown backend {name!r}", f"known: {', '.join(['auto', *unavailable])}")
    elif unavailable[name] is not None:
        remedy = _REINSTALL if name == "cpu" else f"ask for another one: {', '.join(['auto', *unavailable])}"
        report.problem(f"{who} asks for the backend {name!r}, which cannot run here: {unavailable[name]}", remedy)


def _self_test(name: str) -> tuple[int, list[str]]:
    """Checks a backend as ``bench`` checks what it times, on small tensors: on the CPU, else on a GPU.

    Returns:
        How many checks there were, and a line for each one that failed.
    """
    device = torch.device("cpu" if backends.refusal(name, "cpu", torch.float32) is None else "cuda")
    dtypes = [str(dtype).removeprefix("torch.") for dtype in backends.dtypes(name)]
    todo = [
        case
        for how in ({}, {"residual": True, "post_act": "relu"}, {"op": "tail"})
        for case in cases([], [_SHAPE], dtypes=dtypes, layouts=LAYOUTS, directions=["forward+backward"], **how)
    ]
    wrong = []
    for case in todo:
        weights = buffers.make_weights(case, device)
        exact, stock_errors, plain, _ = _expected(dataclasses.replace(case, layout=""), device)
        provider = providers.BUILDERS["fused"](case, weights, "linear", name)
        found = providers.results(provider, case, buffers.check_inputs(case, weights, device))
        if provider.path() != name:
            return len(todo), [f"{label_of(case)}: backend {provider.path()!r} served the calls"]
        verdict = oracle.judge(case, found, exact, stock_errors, plain, ours=True)
        if verdict.wrong is not None:
            wrong.append(f"{label_of(case)}: {verdict.wrong}")
    return len(todo), wrong


@lru_cache(maxsize=1)
def _expected(case: Case, device: torch.device) -> runner.Judge:
    """What results are judged by, in either layout."""
    return runner.make_judge(case, buffers.make_weights(case, device), device)


def _backends(report: _Report) -> tuple[dict[str, str | None], str | None]:
    """Prints the backends and their self-tests; returns why each cannot run (None: it can), and the kernels' ISA."""
    print("\nbackends")
    unavailable: dict[str, str | None] = {}
    for status in _statuses():
        unavailable[status.name] = None if status.available else status.reason
        report.fact(status.name, f"{'available' if status.available else 'not available'}: {status.reason}")
        if not status.available:
            continue
        try:
            checks, wrong = _self_test(status.name)
        except Exception as error:  # a broken backend is what this command is here to report
            checks, wrong = 1, [f"{type(error).__name__}: {error}"]
        if wrong:
            report.fact("", f"self-test FAILED: {len(wrong)} of {checks} checks")
            more = f" (and {len(wrong) - 3} more)" if len(wrong) > 3 else ""
            report.problem(
                f"the self-test of {status.name!r} fails: {'; '.join(wrong[:3])}{more}",
                "do not trust this backend; use another one (SENET_FUSED_BACKEND), rebuild "
                "(pip install --force-reinstall --no-deps .), and report it with this output",
            )
        else:
            report.fact("", f"self-test passed: {checks} checks")
    isa = backends.native.instruction_set() if unavailable.get("cpu", "") is None else None
    automatic = select.choose("auto", "cpu", torch.float32).backend
    report.fact("auto", f"takes {automatic!r} for CPU tensors")
    if torch.cuda.is_available():
        choices: dict[select.Choice, list[str]] = {}
        for dtype in backends.dtypes("reference"):
            choices.setdefault(select.choose("auto", "cuda", dtype), []).append(str(dtype).removeprefix("torch."))
        for choice, dtypes in choices.items():
            report.fact("", f"takes {choice.backend!r} for {', '.join(dtypes)} on a GPU: {choice.reason}")
    if automatic == "reference" and "cpu" in unavailable:
        report.notes.append(
            f"nothing is fused on this installation, all calls run in plain PyTorch; to change that: {_REINSTALL}"
        )
    return unavailable, isa


def _tuned_plans(report: _Report) -> None:
    """Prints which file of tuned plans is in use."""
    path = tuned.path_in_use()
    if path is None:
        report.fact("tuned plans", "none")
        return
    try:
        plans = tuned.read(path)
    except ValueError as error:
        report.fact("tuned plans", f"{path} cannot be read")
        report.problem(str(error), f"senet-fused tune, or {tuned.VARIABLE}= for none")
        return
    here = _triton_facts()
    of_these = f", {sum(facts in here for facts, _ in plans)} of them for the GPUs here" if here else ""
    report.fact("tuned plans", f"{len(plans)} in {path}{of_these}")


# ---------------------------------------------------------------------------------------------------- --plan


def _triton_facts() -> list[planner.DeviceFacts]:
    """What a Triton plan depends on, of the GPUs here that Triton serves."""
    if triton.problem() is not None:
        return []
    from senet_fused.backends.triton import launch

    return [launch.device_facts(torch.device("cuda", number)) for number in range(torch.cuda.device_count())]


def _cuda_facts() -> tuple[Any, str]:
    """What a CUDA plan depends on, of the GPU here, else of an H200; and whose facts they are."""
    if torch.cuda.is_available() and torch.version.hip is None:
        found = torch.cuda.get_device_properties(0)
        if found.major >= 8:
            text = f"compute capability {found.major}.{found.minor}, {found.multi_processor_count} multiprocessors"
            return cuda.device_facts(torch.device("cuda", 0)), f"the GPU here ({text})"
    return cuda.facts_of_h200(), _AN_H200


def _print_plans(case: Case) -> None:
    """Prints both kernel backends' plans of one layer. Raises ValueError if the file of tuned plans cannot be read."""
    print(label_of(case))
    backend, reason = select.choose("auto", "cuda", getattr(torch, case.dtype))
    print(f"auto takes {backend!r} for these tensors on a GPU: {reason}")
    problems = {name: problem_of(case, name == "backward") for name in ("forward", "backward")}
    try:
        from senet_fused import _plan
    except ImportError as error:
        print(f"\ncuda: no plan, as the compiled planner is missing ({error})\n  to do: {_REINSTALL}")
    else:
        facts, whose = _cuda_facts()
        print(f"\ncuda, for {whose}")
        for direction, of_triton in problems.items():
            problem = cuda_problem(case.batch, of_triton)
            plan = cuda.plan_of(problem, facts)
            lanes = "" if plan.form == "channels_last" else f", {plan.lanes} lanes to a plane"
            print(f"  {direction}: {plan.strategy}\n    {_plan.cuda_reason(problem.native(), facts, plan)}")
            print(
                f"    {plan.form}: {plan.samples} sample(s) x {plan.channels} channels x "
                f"{min(plan.positions, problem.positions)} positions, {plan.splits} split(s){lanes}, "
                f"dependent launch {_on(plan.dependent_launch)}, streaming stores {_on(plan.stream_stores)}"
            )
    here = _triton_facts()
    facts, whose = (here[0], "the GPU here") if here else (planner.DeviceFacts("cuda", 90, 132), _AN_H200)
    print(f"\ntriton, for {whose} ({facts.vendor} {facts.arch}, {facts.sms} multiprocessors)")
    for direction, problem in problems.items():
        kept = tuned.lookup(problem, facts)
        plan = kept or planner.plan(problem, facts)
        tile = plan.tile
        print(f"  {direction}: {plan.strategy}, {'tuned' if kept else 'counted'}\n    {plan.reason}")
        rows = f" in rows of {tile.row_channels}" if tile.row_channels else ""
        print(
            f"    {tile.form}: {tile.samples} sample(s) x {tile.channels} channels{rows} x {tile.positions} positions, "
            f"{tile.steps} steps, {tile.splits} splits, {tile.warps} warps, stages {plan.stages}, "
            f"reversed {_on(plan.reversed)}, streaming {_on(plan.streaming)}"
        )


def _on(value: bool) -> str:
    return "on" if value else "off"


def run(args: argparse.Namespace) -> int:
    """Prints the report, or with --plan one layer's plans.

    Returns:
        0, or 1 if something asked for is broken.

    Raises:
        RequestError: an unknown backend name, or a layer for --plan that cannot be read.
    """
    if args.plan is not None:
        (case,) = cases([], [args.plan], dtypes=[args.dtype], layouts=[args.layout], op=args.op)
        try:
            _print_plans(case)
        except ValueError as error:
            print(f"senet-fused doctor: error: {error}", file=sys.stderr)
            return 1
        return 0
    known = [status.name for status in _statuses()]
    for name in args.backend:
        if name not in known:
            raise RequestError(f"unknown backend {name!r}; known: {', '.join(known)}")
    report = _Report()
    _installation(report)
    _processor(report)
    unavailable, isa = _backends(report)
    _tuned_plans(report)
    _environment(report, unavailable, isa)
    for name in args.backend:
        _require(report, name, "--backend", unavailable)
    return report.finish()
