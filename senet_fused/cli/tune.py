"""``senet-fused tune``: times plans of the Triton kernels on this device and keeps the fastest ones in a file.

The contenders of every layer and direction are the plan that ``plan.py`` counts as the cheapest, the others that it
considers, and variations of the cheapest few. One whose results differ from the first one's is left out before anything
is timed.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import datetime
import itertools
import math
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor

from senet_fused import machine
from senet_fused.accuracy import relative_error
from senet_fused.arguments import RequestError, positive, require_writable
from senet_fused.backends import cuda
from senet_fused.backends import triton as backend
from senet_fused.backends.triton import tuned
from senet_fused.backends.triton.plan import DeviceFacts, Plan, Problem, candidates
from senet_fused.bench import buffers, cuda_timing, oracle, providers
from senet_fused.bench.command import add_layers
from senet_fused.bench.problems import LAYOUTS, OPS, POST_ACTS, Case, cases
from senet_fused.bench.tables import Table, ratio_label, show
from senet_fused.bench.timing import Rotation, Settings, describe, interleave

__all__ = ["DTYPES", "add_arguments", "contenders", "cuda_problem", "label_of", "problem_of", "run", "variations"]

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
Every plan is checked in a training step: the default one's output and gradients (and a tail's running statistics)
against a float64 reference, every other one's against the default's. One that differs by more than rounding is left
out. The others are timed together as replayed CUDA graphs with a cold L2; one takes the default's place if its median
is at least 2 % lower.
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
    what.add_argument("--batch", type=positive(int), default=64, metavar="N", help="of --problem (default 64)")
    what.add_argument("--dtype", nargs="+", default=["bfloat16"], choices=DTYPES, help="default bfloat16")
    what.add_argument("--layout", nargs="+", default=["channels_last"], choices=LAYOUTS, help="default channels_last")
    what.add_argument("--direction", nargs="+", default=list(DIRECTIONS), choices=DIRECTIONS, help="default both")
    what.add_argument("--residual", action="store_true", help="add a shortcut behind the layer (a tail has one)")
    what.add_argument("--post-act", default="none", choices=POST_ACTS, help="activation at the end (a tail has relu)")

    how = parser.add_argument_group("how")
    about = "plans per layer and direction (default 24)"
    how.add_argument("--candidates", type=positive(int), default=24, metavar="N", help=about)
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


def label_of(case: Case) -> str:
    """``8 x 256/16 @ 56x56 bfloat16 channels_last tail``."""
    behind = (" + residual" if case.residual else "") + (" relu" if case.post_act == "relu" else "")
    return f"{case.label} {case.dtype} {case.layout}{' tail' if case.op == 'tail' else behind}"


def cuda_problem(batch: int, problem: Problem) -> cuda.Problem:
    """The same problem as the planner of the CUDA kernels takes it."""
    return cuda.Problem(batch, **dataclasses.asdict(problem))


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
    # Plans that launch the same are one.
    found = {dataclasses.replace(plan, reason=""): plan for plan in (counted[0], *filter(None, turns))}
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


def _difference(found: dict[str, Tensor], expected: dict[str, Tensor], *, rounded_alike: bool) -> str | None:
    """What differs by more than float32 sums in another order, rounded once, can; None if nothing does.

    rounded_alike: both come from the same kernels. The largest difference may still be a unit of rounding, but their
    norm has to be much smaller: few values are so close to the middle between two neighbours that they are rounded
    another way.
    """
    for name in expected:
        a, b = found[name], expected[name].to(found[name].dtype).double()
        eps = torch.finfo(a.dtype).eps
        most, spread = 2 * eps, eps / 8 if rounded_alike else eps
        if a.dtype == torch.float32:
            most, spread = 256 * eps, 64 * eps
        largest = relative_error(a, b)
        norm = (a.double() - b).norm().item() / (b.norm().item() or 1.0)
        if not (largest <= most and norm <= spread):
            return f"{name} is off by {largest:.1e} at most and {norm:.1e} in norm, allowed {most:.1e} and {spread:.1e}"
    return None


class _Tuner:
    """Finds the fastest plan of one problem after the other. A problem's case has "forward" or "backward" as its
    direction."""

    def __init__(self, device: torch.device, facts: DeviceFacts, at_most: int, say: Callable[[str], None]) -> None:
        self.device, self.facts, self.at_most, self.say = device, facts, at_most, say
        self.pool = buffers.BufferPool(device)

    def tune(self, case: Case, problem: Problem) -> tuple[Plan, Plan, float, float]:
        """The default plan and the best one, and their medians in seconds. Raises RuntimeError if the default's results
        are wrong."""
        default, *others = contenders(problem, self.facts, self.at_most)
        times = self.times(case, problem, self.right(case, problem, [default, *others]))
        if default in times and len(times) > _FINALISTS + 1:
            fastest = sorted(times, key=times.__getitem__)[:_FINALISTS]
            times = self.times(case, problem, list(dict.fromkeys((default, *fastest))))
        if default not in times:
            raise RuntimeError("the default plan could not be timed")
        best = min(times, key=times.__getitem__)
        if times[best] > (1 - _LEAST_GAIN) * times[default]:
            best = default
        return default, best, times[default], times[best]

    def right(self, case: Case, problem: Problem, plans: list[Plan]) -> list[Plan]:
        """The plans whose results are right. Raises RuntimeError if the first one's are not."""
        from senet_fused.backends.triton import launch

        # What a forward keeps for the backward shows in the gradients.
        case = dataclasses.replace(case, direction="forward+backward")
        weights = buffers.make_weights(case, self.device)
        inputs = buffers.check_inputs(case, weights, self.device)

        def results(plan: Plan) -> dict[str, Tensor]:
            provider = _provider(case, weights)
            with launch.using({problem: plan}), _poisoned():
                return providers.results(provider, case, inputs)

        expected = results(plans[0])
        why = _difference(expected, oracle.oracle(case, inputs, weights), rounded_alike=False)
        if why is not None:
            raise RuntimeError(f"the default plan is wrong: {why}")
        right = plans[:1]
        for plan in plans[1:]:
            try:
                why = _difference(results(plan), expected, rounded_alike=True)
            except Exception as error:  # too much shared memory, say
                why = describe(error)
            if why is None:
                right.append(plan)
            else:
                self.say(f"left out ({_change(plans[0], plan)}): {why}")
        return right

    def times(self, case: Case, problem: Problem, plans: list[Plan]) -> dict[Plan, float]:
        """Medians in seconds, all plans interleaved; one that fails is left out."""
        from senet_fused.backends.triton import launch
        from senet_fused.bench.runner import bind

        on_gpu = self.device.type == "cuda"
        least = (2 * cuda_timing.l2_bytes(self.device), _MIN_SETS, _MAX_SETS) if on_gpu else (0,)
        sets = self.pool.sets(case, *least)
        provider = _provider(case, buffers.make_weights(case, self.device))

        def with_plan(plan: Plan, call: Callable[[int], object]) -> Callable[[int], object]:
            def planned(number: int) -> object:
                # A graph keeps what was launched when it was captured.
                with launch.using({problem: plan}):
                    return call(number)

            return planned

        # With gradients a forward keeps what its backward needs.
        with cuda_timing.own_stream() if on_gpu else contextlib.nullcontext(), torch.enable_grad():
            call = bind(provider, sets, case)
            calls = {str(number): with_plan(plan, call) for number, plan in enumerate(plans)}
            if on_gpu:
                outcomes = cuda_timing.replay(calls, list(range(len(sets))), _ON_GPU, device=self.device, cold=True)
            else:
                outcomes = interleave(calls, Rotation(len(sets)), _TRIED_OUT)
        times = {}
        for plan, outcome in zip(plans, outcomes.values(), strict=True):
            if outcome.statistics is None:
                self.say(f"left out ({_change(plans[0], plan) or 'the default plan'}): {outcome.error}")
            else:
                times[plan] = outcome.statistics.median_s
        return times


def _provider(case: Case, weights: oracle.Weights) -> providers.Provider:
    return providers.BUILDERS["triton"](case, weights, "linear", None)


# ---------------------------------------------------------------------------------------------------- the command


def _tasks(args: argparse.Namespace) -> dict[Problem, Case]:
    """Every problem once, with a case that has it.

    Raises:
        RequestError: what cannot be read, or one problem at two batch sizes.
    """
    shapes = [text for group in args.shape for text in group]
    found: dict[Problem, Case] = {}
    for case in cases(
        args.problem or ([] if shapes else ["senet154"]),
        shapes,
        batches=[args.batch],
        dtypes=args.dtype,
        layouts=args.layout,
        directions=args.direction,
        residual=args.residual,
        post_act=args.post_act,
        op=args.op,
    ):
        before = found.setdefault(problem_of(case, case.backward), case)
        if before.batch != case.batch:
            raise RequestError(
                f"a plan holds for every batch size: {before.label} and {case.label} are one problem; ask for one"
            )
    return found


def _check_device(name: str) -> torch.device:
    why = backend.problem(name)
    if why is not None:
        raise RequestError(f"--device {name}: {why}")
    from senet_fused.backends.triton import launch

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
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RequestError(f"cannot write {path}: {error.strerror or error}") from None
    require_writable(path)
    if path.exists():
        try:
            tuned.read(path)
        except ValueError as error:
            raise RequestError(str(error)) from None
    return path


def run(args: argparse.Namespace) -> int:
    """Tunes, writes the file after each layer, and prints the table; 1 if a default plan was wrong or failed.

    Raises:
        RequestError: the request cannot be met; nothing has been timed.
    """
    tasks = _tasks(args)
    device = _check_device(args.device)
    path = _check_file(args)
    from senet_fused.backends.triton import launch

    def say(text: str) -> None:
        print(f"  {text}", file=sys.stderr, flush=True)

    facts = launch.device_facts(device)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "Triton's interpreter"
    versions = {"torch": torch.__version__, "triton": machine.package_version("triton")}
    print(f"{name}, torch {versions['torch']}, triton {versions['triton']}")
    if device.type == "cpu":
        print("in Triton's interpreter the times mean nothing")
    tuner = _Tuner(device, facts, args.candidates, say)
    rows: list[dict[str, str]] = []
    try:
        # On the way out launch.py forgets what it has looked up, and the next call finds the new plans.
        with launch.using({}):
            for number, (problem, case) in enumerate(tasks.items(), 1):
                label = label_of(case)
                print(f"[{number}/{len(tasks)}] {label} {case.direction}", file=sys.stderr, flush=True)
                row = {"problem": label, "direction": case.direction}
                try:
                    default, best, default_s, best_s = tuner.tune(case, problem)
                except Exception as error:  # out of memory, say: the other layers may do
                    rows.append(row | {"error": describe(error)})
                    say(describe(error))
                    continue
                change, best_us, default_us = _change(default, best), 1e6 * best_s, 1e6 * default_s
                timed = {"on": name, "layer": label, "us": round(best_us, 2), "default_us": round(default_us, 2)}
                timed |= versions | {"date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")}
                reason = (
                    f"timed on {name}: {change or 'the default plan'}; {best_us:.1f} us, default {default_us:.1f} us"
                )
                key = facts, problem
                tuned.merge(path, {key: dataclasses.replace(best, reason=reason)}, {key: {"timed": timed}})
                times = {"default us": f"{default_us:.1f}", "best us": f"{best_us:.1f}"}
                rows.append(row | times | {"ratio": ratio_label(default_s / best_s), "what changed": change or "-"})
    finally:
        show([Table("", rows)] if rows else [], sys.stdout)
        count = sum("error" not in row for row in rows)
        print(f"\n{count} plan(s) written to {path}")
        in_use = tuned.path_in_use()
        if count and (in_use is None or in_use.resolve() != path.resolve()):
            print(f"which is not in use; to use it: {tuned.VARIABLE}={path}")
    return 1 if any("error" in row for row in rows) else 0
