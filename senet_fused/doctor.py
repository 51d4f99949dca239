"""``senet-fused doctor``: what is installed, which backends can run here and why not, are they right."""

from __future__ import annotations

import argparse
import itertools
import os
import platform
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import machine
from .bench.problems import LAYOUTS, OPS, Case, cases

if TYPE_CHECKING:
    from .backends import BackendStatus
    from .backends.triton.plan import DeviceFacts

__all__ = ["add_arguments", "run"]

_PACKAGES = ("torch", "numpy", "triton", "rich", "matplotlib", "scikit-learn")
_OLDEST_TORCH = (2, 11)
_THREAD_VARIABLES = (
    "OMP_NUM_THREADS",
    "MKL_NUM_THREADS",
    "OMP_WAIT_POLICY",
    "GOMP_CPU_AFFINITY",
    "KMP_AFFINITY",
)
_PLAN_DTYPES = ("float32", "bfloat16", "float16")
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
float64.

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
    parser.add_argument(
        "--backend",
        nargs="+",
        default=[],
        metavar="NAME",
        help="backends that have to be available: cpu, reference, ...",
    )
    parser.add_argument(
        "--plan", metavar="N,C,R,H,W", help="print the plans of the CUDA and Triton kernels for this layer, and stop"
    )
    parser.add_argument(
        "--op",
        default="se",
        choices=OPS,
        help="of --plan: the SE layer (default), or a tail: BatchNorm -> SE -> + residual -> ReLU",
    )
    parser.add_argument("--dtype", default="bfloat16", choices=_PLAN_DTYPES, help="of --plan (default bfloat16)")
    parser.add_argument("--layout", default="channels_last", choices=LAYOUTS, help="of --plan (default channels_last)")


class _Report:
    """Prints facts as they come and collects what is wrong, with what to do about it."""

    def __init__(self) -> None:
        self.problems: list[tuple[str, str]] = []
        self.notes: list[str] = []

    def section(self, title: str) -> None:
        print(f"\n{title}")

    def fact(self, name: str, value: object) -> None:
        print(f"  {name:<14} {value}")

    def problem(self, what: str, remedy: str) -> None:
        if (what, remedy) not in self.problems:
            self.problems.append((what, remedy))

    def note(self, text: str) -> None:
        self.notes.append(text)

    def finish(self) -> int:
        for text in self.notes:
            print(f"\nnote: {text}")
        for what, remedy in self.problems:
            print(f"\nPROBLEM: {what}\n  to do: {remedy}")
        print(f"\n{len(self.problems)} problem(s)" if self.problems else "\nall in order")
        return 1 if self.problems else 0


def _installation(report: _Report) -> None:
    import torch

    from . import __version__, torch_private

    report.section("installed")
    report.fact("senet_fused", f"{__version__} in {Path(__file__).parent}")
    revision = machine.revision()
    if revision is not None:
        report.fact("revision", revision)
    report.fact("python", f"{platform.python_version()} on {platform.platform()}")
    for name in _PACKAGES:
        # torch's own text tells its CPU and CUDA builds apart.
        version = torch.__version__ if name == "torch" else machine.package_version(name)
        report.fact(name, version or "not installed")
    version = tuple(int(part) for part in torch.__version__.split("+")[0].split(".")[:2])
    if version < _OLDEST_TORCH:
        report.problem(
            f"torch {torch.__version__} is older than any this package is tried with",
            f"pip install 'torch>={'.'.join(map(str, _OLDEST_TORCH))}'",
        )
    for interface in torch_private.missing():
        report.note(f"torch {torch.__version__} has no {interface.name}: {interface.without}")
    try:
        from . import _plan
    except ImportError as error:
        files = [path.name for path in Path(__file__).parent.glob("_plan.*") if path.suffix in (".so", ".pyd")]
        report.fact("built with", "no compiled parts" if not files else f"cannot tell: {error}")
        if files:
            report.problem(
                f"the compiled module {files[0]} does not import: {error}",
                "it was built for another Python; " + _REINSTALL,
            )
        return
    facts = dict(_plan.build_info())
    report.fact("built with", ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in facts.items()))
    if facts.get("version") not in (None, "unknown", __version__):
        report.problem(
            f"the compiled parts are of version {facts['version']}, the Python files of {__version__}",
            "build again: pip install --force-reinstall --no-deps .",
        )


def _processor(report: _Report) -> None:
    import torch

    report.section("processor")
    report.fact("cpu", f"{machine.cpu_name()}, {machine.cpus()} usable of {os.cpu_count()}")
    report.fact("features", " ".join(machine.cpu_features()) or "the system does not say")
    report.fact("last cache", f"{machine.last_level_cache_bytes() / 2**20:.0f} MiB")
    report.fact("threads", f"{torch.get_num_threads()} (PyTorch, intra-op)")
    gpus = torch.cuda.device_count()
    if torch.version.cuda is None and torch.version.hip is None:
        gpu = "this PyTorch is built without GPU support"
    else:
        gpu = ", ".join(torch.cuda.get_device_name(number) for number in range(gpus)) or "none found"
    report.fact("gpu", gpu)
    if torch.get_num_threads() > machine.cpus():
        report.note(
            f"PyTorch uses {torch.get_num_threads()} threads on {machine.cpus()} processors; one each is "
            "faster: OMP_NUM_THREADS or torch.set_num_threads()"
        )


def _environment(report: _Report, available: dict[str, str | None], isa: str | None) -> None:
    report.section("environment")
    found = {name: value for name, value in sorted(os.environ.items()) if name.startswith(_PREFIX)}
    threads = {name: os.environ[name] for name in _THREAD_VARIABLES if name in os.environ}
    for name, value in (found | threads).items():
        about = _ENVIRONMENT.get(name, "")
        report.fact(name, f"= {value}" + (f"  ({about})" if about else ""))
        if name.startswith(_PREFIX) and not about:
            report.note(f"{name} is no variable of this package; it has {', '.join(_ENVIRONMENT)}")
    if not found and not threads:
        report.fact("none", f"of {_PREFIX}* and the thread settings")

    asked = found.get("SENET_FUSED_BACKEND")
    if asked and asked != "auto":
        _require(report, asked, "SENET_FUSED_BACKEND", available)
    asked = found.get("SENET_FUSED_ISA")
    remedy = "unset it, or name an instruction set that the library was built with and the processor has"
    if asked and isa is not None and isa != asked:
        report.problem(f"SENET_FUSED_ISA asks for {asked!r}, but the kernels run with {isa!r}", remedy)
    elif asked and "SENET_FUSED_ISA" in (available.get("cpu") or ""):
        report.problem(f"SENET_FUSED_ISA asks for {asked!r}: {available['cpu']}", remedy)


def _statuses() -> list[BackendStatus]:
    """Every backend's state; the compiled ones cannot even tell theirs where SENET_FUSED_ISA is wrong."""
    from . import backends

    try:
        return backends.status()
    except RuntimeError as error:
        states = {name: (name == "reference", str(error)) for name in backends.NAMES}
        states["reference"] = (True, "plain PyTorch, any device")
        return [backends.BackendStatus(name, *state) for name, state in states.items()]


def _require(report: _Report, name: str, who: str, available: dict[str, str | None]) -> None:
    """Records a problem if a backend that was asked for is unknown or cannot run."""
    if name not in available:
        report.problem(f"{who} names an unknown backend {name!r}", f"known: {', '.join(['auto', *available])}")
    elif available[name] is not None:
        remedy = _REINSTALL if name == "cpu" else f"ask for another one: {', '.join(['auto', *available])}"
        report.problem(f"{who} asks for the backend {name!r}, which cannot run here: {available[name]}", remedy)


def _self_test(name: str) -> tuple[int, list[str]]:
    """Holds a backend to :mod:`.accuracy`'s rule, forward and backward on small tensors: on a GPU or the CPU.

    Returns:
        How many tensors were judged, in each of several draws, and a line for each one that was refused.
    """
    import torch
    from torch.nn import functional as F

    from . import backends, call_counts, squeeze_excite
    from .accuracy import refused, relative_error

    def plain(x, residual, w1, b1, w2, b2):
        gate = torch.sigmoid(F.linear(F.relu(F.linear(x.mean((2, 3)), w1, b1)), w2, b2))
        y = x * gate[:, :, None, None]
        return y if residual is None else F.relu(y + residual)

    def fused(x, residual, w1, b1, w2, b2):
        post_act = None if residual is None else "relu"
        return squeeze_excite(x, w1, w2, b1, b2, residual=residual, post_act=post_act, backend=name)

    def run(function, tensors, dy):
        tensors = [None if t is None else t.detach().requires_grad_() for t in tensors]
        y = function(*tensors)
        return [y.detach(), *torch.autograd.grad(y, [t for t in tensors if t is not None], dy)]

    generator = torch.Generator().manual_seed(0)
    device = "cpu" if backends.refusal(name, "cpu", torch.float32) is None else "cuda"

    def random(*size: int) -> torch.Tensor:
        return torch.randn(size, generator=generator, dtype=torch.float64).to(device)

    judged, wrong = 0, []
    n, c, r, size = 2, 24, 3, (2, 24, 5, 7)
    for dtype, tail in itertools.product(backends.dtypes(name), (False, True)):
        names = ["y", "dx", *(["dresidual"] if tail else []), "dw1", "db1", "dw2", "db2"]
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        refusals: dict[str, str] = {}
        for memory_format, _ in itertools.product((torch.contiguous_format, torch.channels_last), range(3)):
            big = [random(*size) + random(n, c, 1, 1), random(*size), random(*size)]
            x, dy, residual = (t.to(dtype).contiguous(memory_format=memory_format) for t in big)
            small = [random(r, c) / c**0.5, random(r), random(c, r) / r**0.5, random(c)]
            tensors = [x, residual if tail else None, *(t.to(dtype) for t in small)]

            def in_dtype(dtype: torch.dtype, tensors: list = tensors, dy: torch.Tensor = dy) -> dict:
                converted = [None if t is None else t.to(dtype) for t in tensors]
                return dict(zip(names, run(plain, converted, dy.to(dtype)), strict=True))  # noqa: B023

            before = call_counts().get(f"{name}.forward", 0)
            results = dict(zip(names, run(fused, tensors, dy), strict=True))
            if call_counts().get(f"{name}.forward", 0) == before:
                return judged, ["another backend served the calls"]
            exact = in_dtype(torch.float64)
            stock = {key: relative_error(t, exact[key]) for key, t in in_dtype(dtype).items()}
            refusals |= refused(results, exact, stock, lambda: in_dtype(torch.float64), wide)  # noqa: B023
        judged += len(names)
        what = f"{dtype}{' with residual and relu' if tail else ''}".removeprefix("torch.")
        wrong += [f"{what}: {tensor} {text}" for tensor, text in refusals.items()]
    return judged, wrong


def _backends(report: _Report) -> tuple[dict[str, str | None], str | None]:
    """Prints the backends and their self-tests; returns why each cannot run, and the kernels' ISA."""
    import torch

    from . import backends, explain, select, use_backend

    report.section("backends")
    available: dict[str, str | None] = {}
    isa = None
    for status in _statuses():
        available[status.name] = None if status.available else status.reason
        report.fact(status.name, f"{'available' if status.available else 'not available'}: {status.reason}")
        if not status.available:
            continue
        try:
            judged, wrong = _self_test(status.name)
        except Exception as error:  # a broken backend is what this command is here to report
            judged, wrong = 0, [f"{type(error).__name__}: {error}"]
        if wrong:
            report.fact("", f"self-test FAILED: {len(wrong)} of {judged or 1} tensors")
            more = f" (and {len(wrong) - 3} more)" if len(wrong) > 3 else ""
            report.problem(
                f"the self-test of {status.name!r} fails: {'; '.join(wrong[:3])}{more}",
                "do not trust this backend; use another one (SENET_FUSED_BACKEND), rebuild "
                "(pip install --force-reinstall --no-deps .), and report it with this output",
            )
        else:
            report.fact("", f"self-test passed: {judged} tensors")
    if available.get("cpu", "") is None:
        isa = backends.native.instruction_set()
    with use_backend("auto"):
        automatic = explain(torch.empty(1, 1, 1, 1)).backend
    report.fact("auto", f"takes {automatic!r} for CPU tensors")
    if torch.cuda.is_available():
        choices: dict[select.Choice, list[str]] = {}
        for dtype in backends.dtypes("reference"):
            choices.setdefault(select.choose("auto", "cuda", dtype), []).append(str(dtype).removeprefix("torch."))
        for choice, dtypes in choices.items():
            report.fact("", f"takes {choice.backend!r} for {', '.join(dtypes)} on a GPU: {choice.reason}")
    if automatic == "reference" and "cpu" in available:
        report.note(
            f"nothing is fused on this installation, all calls run in plain PyTorch; to change that: {_REINSTALL}"
        )
    return available, isa


def _facts_here() -> list[DeviceFacts]:
    """What a plan wants to know of the GPUs here, those that Triton serves."""
    import torch

    from .backends import triton

    if triton.problem() is not None:
        return []
    from .backends.triton import launch

    return [launch.device_facts(torch.device("cuda", number)) for number in range(torch.cuda.device_count())]


def _plans(report: _Report) -> None:
    """Prints which file of tuned plans is in use."""
    from .backends.triton import tuned

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
    here = _facts_here()
    of_these = f", {sum(facts in here for facts, _ in plans)} of them for the GPUs here" if here else ""
    report.fact("tuned plans", f"{len(plans)} in {path}{of_these}")


def _print_plans(args: argparse.Namespace) -> int:
    """Prints each backend's plans of one layer; 1 if the file of tuned plans cannot be read. Raises RequestError."""
    (case,) = cases([], [args.plan], dtypes=[args.dtype], layouts=[args.layout], op=args.op)
    tail = ", BatchNorm -> SE -> + residual -> ReLU" if args.op == "tail" else ""
    print(f"{case.label} {case.dtype} {case.layout}{tail}")
    print(_which_auto_takes(args.dtype))
    _print_cuda_plans(case)
    return _print_triton_plans(case)


def _which_auto_takes(dtype: str) -> str:
    """The backend for GPU tensors under "auto", and why: here, or as it would be on an H200."""
    import torch

    from . import select

    if torch.cuda.is_available():
        takes, where = "takes", "here"
        backend, reason = select.choose("auto", "cuda", getattr(torch, dtype))
    else:
        takes, where = "would take", "on an H200"
        backend, reason = _which_on_an_h200()
    return f"auto {takes} {backend!r} {where}: {reason}"


def _which_on_an_h200() -> tuple[str, str]:
    not_cuda = _why_not_cuda()
    if not_cuda is None:
        return "cuda", "it comes before triton, and the library has kernels for it"
    if machine.package_version("triton"):
        return "triton", f"not cuda: {not_cuda}; triton is installed"
    return "reference", f"not cuda: {not_cuda}; not triton: triton is not installed (pip install triton)"


def _why_not_cuda() -> str | None:
    """Why the CUDA library could not serve an H200; None if it could."""
    from .backends import cuda

    try:
        compiled = cuda.architectures()
    except RuntimeError as error:
        return str(error)
    if any(cuda.covers(architecture, (9, 0)) for architecture in compiled):
        return None
    return f"the library was built for {' '.join(compiled)} (reinstall with TORCH_CUDA_ARCH_LIST=9.0)"


def _cuda_facts() -> tuple[Any, str]:
    """What a CUDA plan wants to know of the GPU here, else of an H200; and whose facts they are."""
    import torch

    from .backends import cuda

    if torch.cuda.is_available() and torch.version.hip is None:
        found = torch.cuda.get_device_properties(0)
        if found.major >= 8:
            text = f"compute capability {found.major}.{found.minor}, {found.multi_processor_count} multiprocessors"
            return cuda.device_facts(torch.device("cuda", 0)), f"the GPU here ({text})"
    return cuda.facts_of_h200(), "an H200, as there is no GPU here that these kernels serve"


def _print_cuda_plans(case: Case) -> None:
    from .backends import cuda
    from .tune import cuda_problem, problem_of

    try:
        from . import _plan
    except ImportError as error:
        print(f"\ncuda: no plan, as the compiled planner is missing ({error})\n  to do: {_REINSTALL}")
        return
    facts, whose = _cuda_facts()
    print(f"\ncuda, for {whose}")
    for backward in (False, True):
        problem = cuda_problem(case.batch, problem_of(case, backward))
        plan = cuda.plan_of(problem, facts)
        lanes = "" if plan.form == "channels_last" else f", {plan.lanes} lanes to a plane"
        print(f"  {'backward' if backward else 'forward'}: {plan.strategy}")
        print(f"    {_plan.cuda_reason(problem.native(), facts, plan)}")
        print(
            f"    {plan.form}: {plan.samples} sample(s) x {plan.channels} channels x "
            f"{min(plan.positions, problem.positions)} positions, {plan.splits} split(s){lanes}, "
            f"dependent launch {_on(plan.dependent_launch)}, streaming stores {_on(plan.stream_stores)}"
        )


def _print_triton_plans(case: Case) -> int:
    from .backends.triton import plan, tuned
    from .tune import problem_of

    here = _facts_here()
    facts = here[0] if here else plan.DeviceFacts("cuda", 90, 132)
    whose = "the GPU here" if here else "an H200, as there is no GPU here that these kernels serve"
    print(f"\ntriton, for {whose} ({facts.vendor} {facts.arch}, {facts.sms} multiprocessors)")
    for backward in (False, True):
        problem = problem_of(case, backward)
        try:
            kept = tuned.lookup(problem, facts)
        except ValueError as error:
            print(f"senet-fused doctor: error: {error}", file=sys.stderr)
            return 1
        chosen = kept or plan.plan(problem, facts)
        tile = chosen.tile
        print(f"  {'backward' if backward else 'forward'}: {chosen.strategy}, {'tuned' if kept else 'counted'}")
        print(f"    {chosen.reason}")
        rows = f" in rows of {tile.row_channels}" if tile.row_channels else ""
        print(
            f"    {tile.form}: {tile.samples} sample(s) x {tile.channels} channels{rows} x {tile.positions} positions, "
            f"{tile.steps} steps, {tile.splits} splits, {tile.warps} warps, stages {chosen.stages}, "
            f"reversed {_on(chosen.reversed)}, streaming {_on(chosen.streaming)}"
        )
    return 0


def _on(value: bool) -> str:
    return "on" if value else "off"


def run(args: argparse.Namespace) -> int:
    """Prints the report, or with --plan one layer's plans.

    Returns:
        0, 1 if something asked for is broken, or 2 for an unknown backend name.

    Raises:
        RequestError: a layer for --plan that cannot be read.
    """
    if args.plan is not None:
        return _print_plans(args)
    known = [status.name for status in _statuses()]
    for name in args.backend:
        if name not in known:
            print(
                f"senet-fused doctor: error: unknown backend {name!r}; known: {', '.join(known)}",
                file=sys.stderr,
            )
            return 2
    report = _Report()
    _installation(report)
    _processor(report)
    available, isa = _backends(report)
    _plans(report)
    _environment(report, available, isa)
    for name in args.backend:
        _require(report, name, "--backend", available)
    return report.finish()
