"""``senet-fused tune``: times plans of the Triton kernels on this device and keeps the fastest ones in a file.

For every layer and direction these contend: the plan that ``plan.py`` counts as the cheapest, the others that it
considers, and variations of the cheapest few. What computes anything else than the first one does is left out before
anything is timed.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import datetime
import itertools
import math
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor

from . import Activation, machine, ops, reference
from .accuracy import relative_error
from .arguments import RequestError, positive
from .backends import cuda
from .backends import triton as backend
from .backends.triton import tuned
from .backends.triton.plan import DeviceFacts, Plan, Problem, candidates
from .bench import buffers, cuda_timing
from .bench.command import add_layers
from .bench.oracle import InputSet
from .bench.problems import LAYOUTS, OPS, POST_ACTS, Case, cases
from .bench.timing import Outcome, Rotation, Settings, describe, interleave
from .call import Call, Gradients, Outputs

__all__ = ["DIRECTIONS", "DTYPES", "add_arguments", "contenders", "cuda_problem", "problem_of", "run", "variations"]

DIRECTIONS = ("forward", "backward")
DTYPES = tuple(str(dtype).removeprefix("torch.") for dtype in backend.DTYPES)

# A plan has to be this much faster than the default one to take its place.
_LEAST_GAIN = 0.02
_VARIED = 4  # plans whose variations contend
_FINALISTS = 3  # timed once more beside the default: the lowest of many medians is low by luck, too
_MIN_SETS, _MAX_SETS = 8, 512
_ON_GPU = Settings(budget_s=3.0, min_rounds=7, max_rounds=100)
_TRIED_OUT = Settings(budget_s=0.0, min_rounds=1, sample_s=0.0, max_inner=1)

_EPILOG = """\
The default plan is checked against a float64 reference, every other one against the default plan: y, gate, a tail's
statistics and what is kept for the backward, or every gradient. One that differs by more than rounding is left out. The
others are timed together as replayed CUDA graphs with a cold L2; one takes the default's place if its median is at
least 2 % lower.
A plan holds for one direction of one layer in one layout, dtype size and device, whatever the batch.

examples:
  senet-fused tune --problem senet154 se_resnet50 --batch 64 --dtype bfloat16 --layout channels_last
  senet-fused tune --shape 64,256,16,56,56 --direction forward --plans plans.json
  senet-fused tune --op tail --dtype bfloat16 float32

exit status: 0 all tuned, 1 a default plan was wrong or failed, 2 the request cannot be met, 130 interrupted (what is
done is in the file)
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options of the subcommand."""
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = _EPILOG
    what = parser.add_argument_group("what is tuned")
    what.add_argument(
        "--op",
        default="se",
        choices=OPS,
        help="se: the SE layer (default); tail: BatchNorm in training -> SE -> + residual -> ReLU",
    )
    add_layers(what)
    what.add_argument(
        "--batch", type=positive(int), default=64, metavar="N", help="batch size for --problem (default 64)"
    )
    what.add_argument("--dtype", nargs="+", default=["bfloat16"], choices=DTYPES, help="default bfloat16")
    what.add_argument("--layout", nargs="+", default=["channels_last"], choices=LAYOUTS, help="default channels_last")
    what.add_argument("--direction", nargs="+", default=list(DIRECTIONS), choices=DIRECTIONS, help="default both")
    what.add_argument("--residual", action="store_true", help="add a shortcut behind the layer (a tail has one)")
    what.add_argument(
        "--post-act", default="none", choices=POST_ACTS, help="take an activation at the end (a tail has relu)"
    )

    how = parser.add_argument_group("how")
    how.add_argument(
        "--candidates", type=positive(int), default=24, metavar="N", help="plans per layer and direction (default 24)"
    )
    how.add_argument(
        "--device",
        default="cuda",
        choices=("cuda", "cpu"),
        help="cpu: Triton's interpreter (TRITON_INTERPRET=1), to try the command out; the times mean nothing",
    )
    how.add_argument(
        "--plans",
        type=Path,
        metavar="FILE",
        help=f"where the plans are kept, beside those that it has (default: ${tuned.VARIABLE}, else "
        "senet_fused/triton_plans.json in $XDG_CACHE_HOME or ~/.cache)",
    )


# ---------------------------------------------------------------------------------------------------- contenders


def problem_of(case: Case, backward: bool) -> Problem:
    """The problem that a call of this case looks up, its weights being of x's dtype; of a tail if its op is that."""
    size = buffers.torch_dtype(case).itemsize
    c, m, relu = case.shape.channels, math.prod(case.shape.spatial), case.post_act == "relu"
    return Problem(
        channels=c,
        reduced=case.shape.rd_channels,
        positions=m,
        element_size=size,
        weight_size=size,
        # With one channel or one position the layouts are the same, and go by the name of contiguous.
        channels_last=case.layout == "channels_last" and c > 1 and m > 1,
        relu=relu,
        # Without the ReLU the residual's gradient is dy itself.
        residual=case.residual and (relu or not backward),
        backward=backward,
        norm="" if case.op != "tail" else "batch" if case.training else "given",
    )


def cuda_problem(batch: int, problem: Problem) -> cuda.Problem:
    """The same problem as the planner of the CUDA kernels takes it."""
    return cuda.Problem(batch, **dataclasses.asdict(problem))


def _launched(plan: Plan) -> Plan:
    """What two plans have to differ in to be two."""
    return dataclasses.replace(plan, reason="")


def variations(p: Problem, plan: Plan, facts: DeviceFacts) -> Iterator[Plan]:
    """The plan with one thing changed, wherever that fits the problem and changes what is launched."""
    tile, rows = plan.tile, plan.tile.form == "rows"

    def covering(positions: int, splits: int) -> dict[str, int]:
        chunks = -(-p.positions // positions)
        steps = -(-chunks // max(1, min(splits, chunks)))
        return {"positions": positions, "steps": steps, "splits": -(-chunks // steps)}

    tiles: list[dict[str, int]] = [{"warps": tile.warps // 2}, {"warps": 2 * tile.warps}]
    if not rows:
        # No longer than the plane, and no shorter than the bits of a mask need.
        longest, shortest = 1 << (p.positions - 1).bit_length(), 1 if p.channels_last else 16
        for positions in (tile.positions // 2, 2 * tile.positions):
            if shortest <= positions <= max(shortest, longest):
                tiles.append(covering(positions, tile.splits))
        tiles += [covering(tile.positions, splits) for splits in (tile.splits // 2, 2 * tile.splits) if splits]
    found = [dataclasses.replace(plan, tile=dataclasses.replace(tile, **change)) for change in tiles]
    found += [dataclasses.replace(plan, **{name: False}) for name in ("streaming", "reversed")]
    if not rows and tile.steps > 1:  # there is nothing else to load ahead of
        found += [dataclasses.replace(plan, stages=stages) for stages in (1, 2, 3)]
    for other in found:
        if other != plan and tuned.misfit(p, other, facts) is None:
            yield dataclasses.replace(other, reason=f"varied: {_change(plan, other)}")


def contenders(p: Problem, facts: DeviceFacts, at_most: int) -> list[Plan]:
    """The plans to time, the default one first; then other counted ones and variations of the cheapest take turns."""
    counted = candidates(p, facts)
    varied = itertools.chain.from_iterable(variations(p, plan, facts) for plan in counted[:_VARIED])
    turns = itertools.chain.from_iterable(itertools.zip_longest(counted[1:], varied))
    found = {_launched(plan): plan for plan in (counted[0], *filter(None, turns))}
    return list(found.values())[:at_most]


def _change(before: Plan, after: Plan) -> str:
    """``warps 8 -> 4, streaming off``."""
    changed = []
    if before.strategy != after.strategy:
        changed.append(f"{before.strategy} -> {after.strategy}")
    old, new = (dataclasses.asdict(plan.tile) | {"stages": plan.stages} for plan in (before, after))
    changed += [f"{name} {old[name]} -> {new[name]}" for name in old if old[name] != new[name]]
    for name in ("reversed", "streaming"):
        if getattr(before, name) != getattr(after, name):
            changed.append(f"{name} {'on' if getattr(after, name) else 'off'}")
    return ", ".join(changed)


# ---------------------------------------------------------------------------------------------------- what is timed


@contextlib.contextmanager
def _poisoned() -> Iterator[None]:
    """Fresh memory is NaN, so that nobody is right by what a contender before it has left there."""
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])


class _Layer:
    """One direction of one layer, or of one block tail in training, on a device: the operator alone."""

    _EPS = 1e-5

    def __init__(self, case: Case, backward: bool, device: torch.device) -> None:
        # With a backward the inputs bring dy.
        self.case = dataclasses.replace(case, direction="forward+backward" if backward else "forward")
        self.backward = backward
        self.weights = buffers.make_weights(case, device)

    def inputs_of(self, inputs: InputSet, dtype: torch.dtype | None = None) -> Call:
        """The call for these inputs, in another dtype if one is given."""
        case, weights = self.case, self.weights
        w1, b1, w2, b2 = weights[:4]
        weight, bias, norm = (weights.weight, weights.bias, "batch") if case.op == "tail" else (None, None, "")
        tensors = (inputs.x, weight, bias, None, None, w1, b1, w2, b2, inputs.residual, None)
        if dtype is not None:
            tensors = tuple(None if t is None else t.detach().to(dtype) for t in tensors)
        act, gate = Activation.of(case.act).spec, Activation.of(case.gate).spec
        return Call(*tensors, self._EPS, norm, act, gate, "avg", case.post_act or "", "")

    def forward(self, inputs: InputSet) -> Outputs:
        """All that training keeps."""
        return ops.OPERATORS["triton"].registered(self.inputs_of(inputs), True)

    def call(self, inputs: InputSet, kept: Outputs) -> Outputs | Gradients:
        """The operator of this direction. kept: what the forward gave for these inputs."""
        if not self.backward:
            return self.forward(inputs)
        call = self.inputs_of(inputs)
        need_residual = call.residual is not None and call.post_act == "relu"
        needs = True, True, need_residual
        return ops.OPERATORS["triton"].registered_backward(call.gradient(kept, inputs.dy, None, needs))

    def named(self, outputs: Outputs | Gradients, x: Tensor) -> dict[str, Tensor]:
        """The outputs that hold something, the mask as one number per element."""
        found = {name: t for name, t in outputs._asdict().items() if t.numel()}
        if "mask" in found:
            found["mask"] = ops.unpack_mask(found["mask"], x).float()
        return found

    def exact(self, inputs: InputSet) -> dict[str, Tensor]:
        """y, gate, statistics and mask, or every gradient, in float64."""
        call = self.inputs_of(inputs, torch.float64)
        if self.backward:
            found = reference.backward(call, inputs.dy.double())._asdict()
            return {name: t for name, t in found.items() if t is not None}
        found = reference.forward(call)._asdict()
        found["mask"] = (found["y"] > 0).double()
        return {name: t for name, t in found.items() if t is not None}


def _difference(found: dict[str, Tensor], expected: dict[str, Tensor], *, rounded_alike: bool) -> str | None:
    """What differs by more than float32 sums in another order, rounded once, can; None if nothing does.

    rounded_alike: both come from the same kernels. The largest difference may still be a unit of rounding, but their
    norm has to be much smaller: few values are so close to the middle between two neighbours that they are rounded
    another way.
    """
    for name in expected:
        a, b = found[name], expected[name].to(found[name].dtype).double()
        if a.shape != b.shape:
            return f"{name} is {list(a.shape)}, expected {list(b.shape)}"
        eps = torch.finfo(a.dtype).eps
        most, spread = 2 * eps, eps / 8 if rounded_alike else eps
        if a.dtype == torch.float32:
            most, spread = 256 * eps, 64 * eps
        largest = relative_error(a, b)
        norm = (a.double() - b).norm().item() / (b.norm().item() or 1.0)
        if not (largest <= most and norm <= spread):
            return f"{name} is off by {largest:.1e} at most and {norm:.1e} in norm, allowed {most:.1e} and {spread:.1e}"
    return None


@dataclasses.dataclass(frozen=True)
class _Task:
    case: Case
    problem: Problem

    @property
    def direction(self) -> str:
        return DIRECTIONS[self.problem.backward]

    @property
    def label(self) -> str:
        behind = (" + residual" if self.case.residual else "") + (" relu" if self.case.post_act == "relu" else "")
        what = " tail" if self.case.op == "tail" else behind
        return f"{self.case.label} {self.case.dtype} {self.case.layout}{what}"


@dataclasses.dataclass(frozen=True)
class _Result:
    """The default plan and the best one with their medians in seconds; or what is wrong with the default."""

    task: _Task
    default: Plan
    best: Plan
    default_s: float = math.nan
    best_s: float = math.nan
    error: str | None = None


class _Tuner:
    def __init__(self, device: torch.device, facts: DeviceFacts, at_most: int) -> None:
        self.device, self.facts, self.at_most = device, facts, at_most
        self.pool = buffers.BufferPool(device)

    def tune(self, task: _Task, say: Callable[[str], None]) -> _Result:
        plans = contenders(task.problem, self.facts, self.at_most)
        layer = _Layer(task.case, task.problem.backward, self.device)
        try:
            right = self._right(task, layer, plans, say)
            times = self._times(task, layer, right, say)
            if plans[0] in times and len(times) > _FINALISTS + 1:
                fastest = sorted(times, key=times.__getitem__)[:_FINALISTS]
                times = self._times(task, layer, list(dict.fromkeys((plans[0], *fastest))), say)
            default_s = times.get(plans[0])
            if default_s is None:
                raise RuntimeError("the default plan could not be timed")
        except Exception as error:  # out of memory, say: the other layers may do
            return _Result(task, plans[0], plans[0], error=describe(error))
        best = min(times, key=times.__getitem__)
        if times[best] > (1 - _LEAST_GAIN) * default_s:
            best = plans[0]
        return _Result(task, plans[0], best, default_s, times[best])

    def _right(self, task: _Task, layer: _Layer, plans: list[Plan], say: Callable[[str], None]) -> list[Plan]:
        """The plans whose results are right. Raises RuntimeError if the first one's are not."""
        from .backends.triton import launch

        inputs = InputSet(*(None if t is None else t.detach() for t in self._check_inputs(layer)))

        def outputs(plan: Plan) -> dict[str, Tensor]:
            with launch.using({task.problem: plan}), _poisoned():
                results = layer.call(inputs, kept)
            return layer.named(results, inputs.x)

        with launch.using({}):
            kept = layer.forward(inputs)
        expected = outputs(plans[0])
        exact = layer.exact(inputs)
        comparable = {name: exact[name] for name in expected if name in exact}
        why = _difference(expected, comparable, rounded_alike=False)
        if why is not None:
            raise RuntimeError(f"the default plan is wrong: {why}")
        right = plans[:1]
        for plan in plans[1:]:
            try:
                why = _difference(outputs(plan), expected, rounded_alike=True)
            except Exception as error:  # too much shared memory, say
                why = describe(error)
            if why is None:
                right.append(plan)
            else:
                say(f"left out ({_change(plans[0], plan)}): {why}")
        return right

    def _check_inputs(self, layer: _Layer) -> InputSet:
        case = layer.case
        with torch.enable_grad():  # it marks its tensors
            return buffers.check_inputs(case, layer.weights, self.device)

    def _times(self, task: _Task, layer: _Layer, plans: list[Plan], say: Callable[[str], None]) -> dict[Plan, float]:
        """Medians in seconds, all plans interleaved; one that fails is left out."""
        from .backends.triton import launch

        cuda = self.device.type == "cuda"
        least = (2 * cuda_timing.l2_bytes(self.device), _MIN_SETS, _MAX_SETS) if cuda else (0,)
        sets = [
            InputSet(*(None if t is None else t.detach() for t in inputs))
            for inputs in self.pool.sets(layer.case, *least)
        ]
        kept: list[Sequence[Tensor]] = [()] * len(sets)
        if layer.backward:
            with launch.using({}):
                kept = [(None, *layer.forward(inputs)[1:]) for inputs in sets]

        def call_with(plan: Plan) -> Callable[[int], object]:
            def call(number: int) -> object:
                # A graph keeps what was launched when it was captured.
                with launch.using({task.problem: plan}):
                    return layer.call(sets[number], kept[number])

            return call

        calls = {str(number): call_with(plan) for number, plan in enumerate(plans)}
        outcomes: dict[str, Outcome]
        if cuda:
            with cuda_timing.own_stream():
                outcomes = cuda_timing.replay(calls, list(range(len(sets))), _ON_GPU, device=self.device, cold=True)
        else:
            outcomes = interleave(calls, Rotation(len(sets)), _TRIED_OUT)
        times = {}
        for plan, outcome in zip(plans, outcomes.values(), strict=True):
            if outcome.statistics is None:
                say(f"left out ({_change(plans[0], plan) or 'the default plan'}): {outcome.error}")
            else:
                times[plan] = outcome.statistics.median_s
        return times


# ---------------------------------------------------------------------------------------------------- the command


def _tasks(args: argparse.Namespace) -> list[_Task]:
    """Every problem once.

    Raises:
        RequestError: what cannot be read, or one problem at two batch sizes.
    """
    shapes = [text for group in args.shape for text in group]
    names = args.problem or ([] if shapes else ["senet154"])
    found: dict[Problem, Case] = {}
    for case in cases(
        names, shapes, batches=[args.batch], dtypes=args.dtype, layouts=args.layout, residual=args.residual,
        post_act=args.post_act, op=args.op,
    ):  # fmt: skip
        for direction in dict.fromkeys(args.direction):
            before = found.setdefault(problem_of(case, direction == "backward"), case)
            if before.batch != case.batch:
                raise RequestError(
                    f"a plan holds for every batch size: {before.label} and {case.label} are one problem; ask for one"
                )
    return [_Task(case, problem) for problem, case in found.items()]


def _check_device(name: str) -> torch.device:
    why = backend.problem(name)
    if why is not None:
        raise RequestError(f"--device {name}: {why}")
    from .backends.triton import launch

    if name == "cpu":
        return torch.device("cpu")
    if launch.INTERPRETED:
        raise RequestError("--device cuda: with TRITON_INTERPRET set the times would mean nothing; unset it")
    return torch.device("cuda", torch.cuda.current_device())


def _check_file(args: argparse.Namespace) -> Path:
    """The file to write. Raises RequestError if it cannot be written, or holds anything that cannot be read."""
    if args.plans is None and args.device == "cpu":
        raise RequestError(
            "--device cpu: its plans would pass for timed ones; name a file that is not in use with --plans FILE"
        )
    path = args.plans or tuned.path_in_use() or tuned.default_path()
    if path.is_dir():
        raise RequestError(f"cannot write {path}: it is a folder")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path.parent):
            pass
    except OSError as error:
        raise RequestError(f"cannot write {path}: {error.strerror or error}") from None
    if path.exists():
        try:
            tuned.read(path)
        except ValueError as error:
            raise RequestError(str(error)) from None
    return path


def _remarks(result: _Result, device_name: str) -> dict[str, object]:
    return {
        "timed": {
            "on": device_name,
            "layer": result.task.label,
            "us": round(1e6 * result.best_s, 2),
            "default_us": round(1e6 * result.default_s, 2),
            "torch": torch.__version__,
            "triton": machine.package_version("triton"),
            "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        }
    }


def _print_table(results: Sequence[_Result]) -> None:
    width = max([len(result.task.label) for result in results], default=0)
    print(f"\n{'layer':<{width}}  direction  default us   best us  ratio  what changed")
    for result in results:
        line = f"{result.task.label:<{width}}  {result.task.direction:<9}"
        if result.error is not None:
            print(f"{line}  ERROR {result.error}")
            continue
        numbers = f"{1e6 * result.default_s:10.1f}  {1e6 * result.best_s:8.1f}  {result.default_s / result.best_s:5.2f}"
        print(f"{line}  {numbers}  {_change(result.default, result.best) or '-'}")


def run(args: argparse.Namespace) -> int:
    """Tunes, writes the file after each layer, and prints the table; 1 if a default plan was wrong or failed.

    Raises:
        RequestError: the request cannot be met; nothing has been timed.
    """
    tasks = _tasks(args)
    device = _check_device(args.device)
    path = _check_file(args)
    from .backends.triton import launch

    facts = launch.device_facts(device)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "Triton's interpreter"
    print(f"{name}, torch {torch.__version__}, triton {machine.package_version('triton')}")
    if device.type == "cpu":
        print("in Triton's interpreter the times mean nothing")
    tuner = _Tuner(device, facts, args.candidates)
    results: list[_Result] = []

    def say(text: str) -> None:
        print(f"  {text}", file=sys.stderr, flush=True)

    try:
        # On the way out launch.py forgets what it has looked up, and the next call finds the new plans.
        with torch.no_grad(), launch.using({}):
            for number, task in enumerate(tasks, 1):
                print(f"[{number}/{len(tasks)}] {task.label} {task.direction}", file=sys.stderr, flush=True)
                result = tuner.tune(task, say)
                results.append(result)
                if result.error is not None:
                    say(result.error)
                    continue
                change = _change(result.default, result.best) or "the default plan"
                times = f"{1e6 * result.best_s:.1f} us, default {1e6 * result.default_s:.1f} us"
                reason = f"timed on {name}: {change}; {times}"
                key = facts, task.problem
                plan = dataclasses.replace(result.best, reason=reason)
                tuned.merge(path, {key: plan}, {key: _remarks(result, name)})
    finally:
        _print_table(results)
        count = sum(result.error is None for result in results)
        print(f"\n{count} plan(s) written to {path}")
        in_use = tuned.path_in_use()
        if count and (in_use is None or in_use.resolve() != path.resolve()):
            print(f"which is not in use; to use it: {tuned.VARIABLE}={path}")
    return 1 if any(result.error is not None for result in results) else 0
