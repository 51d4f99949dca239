"""``senet-fused fuse-check``: what fuse does to a network's layers, and what that does to its time and numbers."""

from __future__ import annotations

import argparse
import copy
import sys
import time
import warnings

from senet_fused.arguments import RequestError, check_device, positive
from senet_fused.bench.model import MODES
from senet_fused.bench.problems import DTYPES, LAYOUTS

__all__ = ["add_arguments", "run"]

_BUDGET_S = 5.0

_EPILOG = """\
NAME is timm's network of that name, else torchvision's (timm:NAME and torchvision:NAME are explicit), or
FILE.py:FACTORY, what a function without arguments in a file returns. Weights are random; nothing is downloaded.

The first table has every SE layer, and what looks like one: fused or left, and why; with --tails another one has the
blocks around them. Then inference and a training step before and after: time, memory in training, and the largest
differences of the output and of a parameter's gradient;
`senet-fused bench model` measures the same more thoroughly, and beside torch.compile.

examples:
  senet-fused fuse-check seresnet50 --tails
  senet-fused fuse-check torchvision:mobilenet_v3_large --batch 1 16 --layout contiguous channels_last
  senet-fused fuse-check my_net.py:make --size 1,28,28

exit status: 0 something is fused (with --tails: a block) and computes the same, 1 it does not, or nothing is, 2 the
request cannot be met
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options of the subcommand. Imports no torch."""
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = _EPILOG
    parser.add_argument("model", metavar="NAME", help="a network, as below")
    parser.add_argument("--backend", metavar="NAME", help="as fuse takes it: auto, cpu, cuda, ... (default: auto)")
    parser.add_argument(
        "--tails", action="store_true", help="fuse(tails=True): BatchNorm -> SE -> + shortcut -> ReLU as one operator"
    )
    parser.add_argument("--no-time", action="store_true", help="what is fused, and no more")
    parser.add_argument("--mode", nargs="+", default=list(MODES), choices=MODES, help="default: both")
    parser.add_argument("--batch", nargs="+", type=positive(int), default=[4], metavar="N", help="default 4")
    parser.add_argument(
        "--size", metavar="SIZE", help="of one input: N for a square, or C,H,W (default: the network's own, or 224)"
    )
    parser.add_argument("--dtype", nargs="+", default=["float32"], choices=DTYPES[:3])
    parser.add_argument("--layout", nargs="+", default=["contiguous"], choices=LAYOUTS)
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--threads", type=positive(int), metavar="N", help="CPU threads (default: PyTorch's choice)")
    parser.add_argument(
        "--budget",
        type=positive(float),
        default=_BUDGET_S,
        metavar="SECONDS",
        help=f"for each case (default {_BUDGET_S:g})",
    )


def run(args: argparse.Namespace) -> int:
    """Prints the tables and returns the exit status.

    Raises:
        RequestError: the request cannot be met.
    """
    check_device(args)
    from senet_fused import fuse, fuse_report
    from senet_fused.bench import model_report, model_run, timing, zoo
    from senet_fused.bench.progress import open_progress
    from senet_fused.bench.runner import computing

    model = zoo.load(args.model)
    size = zoo.input_size(model, args.size)
    if "channels_last" in args.layout and len(size) == 2:
        raise RequestError(f"channels_last needs two or three spatial dimensions; {args.model} gets {args.size}")
    fused = copy.deepcopy(model).to(args.device)
    start = time.perf_counter()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # of nothing to fuse: the report says it
        fuse(fused, backend=args.backend, tails=args.tails)
    seconds = time.perf_counter() - start
    report = fuse_report(fused, tails=args.tails)
    print(report)
    if not any(one.fused for one in (report.blocks if args.tails else report.layers)):
        return 1
    print(f"found, proven and converted in {seconds:.2f} s; keys of the state dict: ", end="")
    print("unchanged" if list(fused.state_dict()) == list(model.state_dict()) else "CHANGED")
    if args.no_time:
        return 0
    args.amp = False
    options = model_run.Options(
        variants=("stock", "tails" if args.tails else "fused"),
        backend=args.backend,
        device=args.device,
        settings=timing.Settings(budget_s=args.budget),
    )
    cases = model_run.cases(args.model, size, args)
    with computing(args.threads), open_progress(len(cases), False) as progress:
        rows = model_run.run([(model, cases)], options, progress)
    print()
    model_report.render({}, rows, model_report.summarise(rows), sys.stdout)
    return 1 if any(row["error"] for row in rows) else 0
