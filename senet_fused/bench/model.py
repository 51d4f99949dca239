"""``senet-fused bench model``: whole networks, inference and a training step. Its arguments and its run."""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ..arguments import RequestError, check_device, positive, require_writable
from .presets import LARGEST, PRESETS, batch_size, resolve
from .problems import LAYOUTS

if TYPE_CHECKING:
    from .model_run import Options

__all__ = ["add_arguments", "run"]

VARIANTS = (
    "stock", "compile", "max-autotune", "graph", "fused", "fused+compile", "tails", "tails+compile", "tails+graph",
    "folded", "folded+compile", "folded+fused", "folded+fused+compile", "no-se", "no-se+compile",
)  # fmt: skip
GRAPHS = ("graph", "tails+graph")
ON_REQUEST = ("max-autotune", *GRAPHS, *(name for name in VARIANTS if name.startswith("folded")))
_BY_DEFAULT = tuple(name for name in VARIANTS if name not in ON_REQUEST)
DTYPES = ("float32", "bfloat16", "float16")
MODES = ("inference", "training")
_BUDGET_S = 10.0

_EPILOG = """\
models:
  NAME               timm's network of that name, else torchvision's; timm:NAME and torchvision:NAME are explicit
  FILE.py:FACTORY    what a function (or class) without arguments in a file returns
Weights of timm's and torchvision's are random, nothing is downloaded, and all variants begin with the same ones.

presets:
  senet154           timm's legacy_senet154
  se_resnext101      timm's legacy_seresnext101_32x4d
  se_resnet50        timm's legacy_seresnet50
These are the original networks (Hu et al. 2018), with images of 3x224x224. A preset means --layout channels_last, and
  on a CPU           --dtype float32 --batch 1 4 8 --providers stock compile fused tails no-se
  on a GPU           --dtype bfloat16 --amp --batch 32 64 128 max
                     --providers stock compile graph fused tails tails+compile tails+graph no-se
What is given besides counts, a NAME too. Several batches are a sweep: tables of images/s and of the price of SE by
batch follow. --batch max is found by trying training steps of stock, with room left for what the other variants keep
(a CUDA graph keeps the memory of a step), and all variants run with it, in inference, too. Batches beyond it are left.

variants:
  stock              the network as it is
  fused              a copy after senet_fused.fuse
  tails              a copy after senet_fused.fuse(tails=True): BatchNorm, SE, + shortcut and ReLU are one operator
  folded             a copy after senet_fused.fold_batchnorm(fuse=False): every BatchNorm in the convolution in front
  folded+fused       a copy after senet_fused.fold_batchnorm: also SE, + shortcut and ReLU are one operator;
                     both in inference alone
  no-se              the twin: a copy with nn.Identity for every SE layer, where each returns its scaled input
  compile, fused+compile, tails+compile, folded+compile, folded+fused+compile, no-se+compile
                     these six under torch.compile (default options, static shapes)
  max-autotune       stock under torch.compile in that mode, on a GPU with CUDA graphs of its own; takes minutes
  graph, tails+graph stock and tails on a GPU, all that is timed, the optimizer's step too, as one CUDA graph
The price of SE of a variant is its time / the time of no-se: 1.20 says that SE costs 20 % of the network without. All
are held against the same one, the twin of stock that is not compiled.

inference is evaluation mode under torch.inference_mode. training is a step in training mode: forward, cross-entropy
with random labels (the mean of squares of everything where the output is no [N, classes] tensor), backward, SGD with
momentum, gradients set to None; float16 without loss scaling. The variants take turns; times are of the wall clock.

One more step in training, not timed, tells the memory, and in per cent what that is more or less than stock's:
  saved MB           what autograd saves during the forward, each storage once; without weights, buffers and the input
  peak MB            the most that the tensors allocated by the step (activations, gradients, workspaces) take at once,
                     beyond what is there before it (weights, momentum, the input): on a GPU as
                     torch.cuda.max_memory_allocated tells, on a CPU the running sum of all allocations and releases of
                     tensors that PyTorch's profiler records; what libraries allocate for themselves is not in it

Before the timing every variant is compared with stock in the same dtype (no-se+compile with no-se): output, max
|difference| / max |stock|, and in training the largest gradient error, in norm, of any parameter, and the running
statistics after the step, like the output. In float32 a variant whose output or statistics are off by more than 1e-3
gets an error instead of a time, unless the last bit of the input moves stock's output by a tenth as much
(normalisations over a few values do that; take a larger batch); otherwise judge for yourself.
In other dtypes the figures of stock and no-se say how far they are from themselves in float32: what that dtype's
rounding does to the network. A ReLU whose input is next to zero flips with the last bit: gradients of deep networks
may differ by percents, in float32 too.

examples:
  senet-fused bench model seresnet50 --batch 8
  senet-fused bench model torchvision:mobilenet_v3_large --mode inference --batch 1 32 --layout channels_last
  senet-fused bench model seresnext101_32x4d senet154 --device cuda --dtype float16 --amp --batch 64 --json out.json
  senet-fused bench model legacy_senet154 --device cuda --mode training --providers stock graph tails+graph no-se
  senet-fused bench model legacy_seresnet50 --mode inference --providers stock compile fused folded folded+fused
  senet-fused bench model --preset senet154 se_resnet50 --device cuda --mode training --json sweep.json
  senet-fused bench model my_net.py:make --size 1,28,28 --providers stock fused no-se --quick
  senet-fused bench compare before.json after.json

exit status: 0 all measured, 1 an output was wrong or a variant failed, 2 the request cannot be met,
130 interrupted or out of time
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options of the subcommand. Imports no torch."""
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = _EPILOG
    what = parser.add_argument_group("what is computed")
    what.add_argument("models", nargs="*", metavar="NAME", help="a network, as below; in front of the options")
    what.add_argument("--preset", nargs="+", choices=PRESETS, help="networks, and other defaults, as below")
    what.add_argument("--mode", nargs="+", choices=MODES, help="default: both")
    what.add_argument(
        "--batch",
        nargs="+",
        type=batch_size,
        metavar="N",
        help=f"default 8; {LARGEST}, on a GPU, is the largest that fits in training",
    )
    what.add_argument(
        "--size",
        "--input-size",
        metavar="SIZE",
        help="of one input: N for a square image, or C,H,W (also C,L and C,D,H,W); "
        "default: what timm says of its network, else 3,224,224",
    )
    what.add_argument("--dtype", nargs="+", choices=DTYPES, help="default float32")
    what.add_argument("--amp", action="store_true", help="float32 weights, and autocast to the dtype")
    what.add_argument("--layout", nargs="+", choices=LAYOUTS, help="default contiguous")
    what.add_argument("--seed", type=int, default=0, help="of weights, inputs and labels (default 0)")

    who = parser.add_argument_group("who computes it")
    who.add_argument(
        "--providers",
        nargs="+",
        choices=VARIANTS,
        help=f"the variants (default: all but {', '.join(ON_REQUEST)})",
    )
    who.add_argument(
        "--backend",
        metavar="NAME",
        help="of fused, tails and folded+fused, compiled or not: auto, reference, cpu, ... "
        "(default: SENET_FUSED_BACKEND, else auto)",
    )
    who.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    who.add_argument("--threads", type=positive(int), metavar="N", help="CPU threads (default: PyTorch's own choice)")

    how = parser.add_argument_group("how it is measured")
    how.add_argument(
        "--budget",
        type=positive(float),
        metavar="SECONDS",
        help=f"time for the samples of one case, all variants together, at least 7 of each (default {_BUDGET_S:g})",
    )
    how.add_argument(
        "--time-limit",
        type=positive(float),
        default=float("inf"),
        metavar="SECONDS",
        help="begin no case after so long, and no variant of the one at hand (those that compile come last); what is "
        "done is reported and written, as after an interruption",
    )
    how.add_argument("--quick", action="store_true", help="a first look: three samples or little more")

    output = parser.add_argument_group("output")
    output.add_argument(
        "--json",
        type=Path,
        metavar="FILE",
        help="header, rows and summary, written again when a case is done; `senet-fused bench --from` shows it",
    )
    output.add_argument("--plain", action="store_true", help="no colours and no progress bar even if rich is there")


def _header(args: argparse.Namespace, command: Sequence[str], options: Options) -> dict:
    from .. import machine
    from .header import stamp
    from .zoo import LIBRARIES

    header = stamp("senet-fused bench model", command, args.device, options.settings)
    header["versions"] |= {library: machine.package_version(library) for library in LIBRARIES}
    if LARGEST in args.batch:
        header["largest batch"] = (
            "of a training step of stock, beside the weights and momentum of all variants and a step's memory for each "
            "CUDA graph"
        )
    return {
        **header,
        "kind": "model",
        "weights": f"random, seed {args.seed}, the same for all variants; running statistics of one random batch",
        "inference": "evaluation mode, torch.inference_mode",
        "training": "forward, cross-entropy with random labels, backward, SGD with momentum 0.9, zero_grad",
        "price of SE": "median / median of no-se, the same network with nn.Identity for every SE layer",
        "memory": "of one more training step: saved, storages that autograd saves in the forward, without weights and "
        "input; peak, the most that tensors of the step take at once, "
        + ("torch.cuda.max_memory_allocated" if args.device == "cuda" else "allocations by PyTorch's profiler")
        + " beyond what is there before",
        "check": "against stock in the same dtype: output, max |difference| / max |stock|; gradients, the largest "
        "|difference| / |stock| in norm of a parameter; running statistics as the output; no-se+compile against "
        "no-se; stock and no-se themselves, unless in float32, against float32",
    }


def run(args: argparse.Namespace, command: Sequence[str] = ()) -> int:
    """Measures the networks and prints the report.

    Args:
        args: as parsed by a parser with :func:`add_arguments`.
        command: the arguments as typed, for the header.

    Returns:
        0; 1 if a row has an error; 130 if interrupted or out of time (what is done is reported and written).

    Raises:
        RequestError: the request cannot be met; nothing has been measured.
    """
    resolve(args)
    if args.amp and "float32" in args.dtype:
        raise RequestError("--amp is for --dtype bfloat16 or float16: autocast to float32 changes nothing")
    if args.json is not None:
        require_writable(args.json)
    check_device(args)
    names = tuple(name for name in VARIANTS if name in (args.providers or _BY_DEFAULT))
    graphs = [name for name in GRAPHS if name in names]
    if graphs and args.device != "cuda":
        raise RequestError(
            f"provider {graphs[0]!r} is a CUDA graph and cannot run with --device {args.device}; use --device cuda, or "
            "leave it out of --providers"
        )

    from . import model_report, model_run, report, timing, zoo
    from .progress import open_progress
    from .runner import computing

    todo = []
    for name in dict.fromkeys(args.models):
        model = zoo.load(name, seed=args.seed)
        size = zoo.input_size(model, args.size)
        if "channels_last" in args.layout and len(size) == 2:
            raise RequestError(f"channels_last needs two or three spatial dimensions; {name} gets {args.size}")
        todo.append((model, model_run.cases(name, size, args)))
    settings = timing.QUICK if args.quick else timing.Settings(budget_s=_BUDGET_S)
    if args.budget is not None:
        settings = dataclasses.replace(settings, budget_s=args.budget)
    options = model_run.Options(
        variants=names,
        backend=args.backend,
        device=args.device,
        seed=args.seed,
        settings=settings,
        time_limit_s=args.time_limit,
    )

    rows: list[model_run.Row] = []
    total, interrupted = sum(len(cases) for _, cases in todo), False

    def keep() -> None:
        if args.json is not None:
            done = len(rows) // len(options.variants)
            so_far = header | {"interrupted": f"after {done} of {total} cases"}
            report.write_json(args.json, so_far, rows, model_report.summarise(rows))

    with computing(args.threads):
        header = _header(args, command, options)
        try:
            with open_progress(total, args.plain, keep) as progress:
                model_run.run(todo, options, progress, rows)
        except KeyboardInterrupt:
            interrupted = True
    done = len(rows) // len(options.variants)
    left = sum(model_run.OUT_OF_TIME in (row["note"] or "") for row in rows)
    if interrupted or left or (args.time_limit < float("inf") and done < total):
        header["interrupted"] = f"after {done} of {total} cases" + (f", {left} variants not begun" if left else "")
    summary = model_report.summarise(rows)
    model_report.render(header, rows, summary, sys.stdout, args.plain)
    if args.json is not None:
        report.write_json(args.json, header, rows, summary)
        print(f"\nwrote {args.json}")
    if "interrupted" in header:
        return 130
    return 1 if any(row["error"] for row in rows) else 0
