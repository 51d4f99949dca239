"""The arguments of ``senet-fused bench``, and the run from arguments to exit status."""

from __future__ import annotations

import argparse
import dataclasses
import importlib.util
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from .. import machine
from ..arguments import RequestError, check_device, positive, require_writable
from .problems import (
    ACTS,
    DTYPES,
    GATES,
    GPU_BACKENDS,
    LAYOUTS,
    OPS,
    POST_ACTS,
    TAIL_DIRECTIONS,
    cases,
    problems,
)

if TYPE_CHECKING:
    from .runner import Options

__all__ = ["add_arguments", "add_layers", "run"]

PROVIDERS = ("eager", "compile", "max-autotune", "fused", *GPU_BACKENDS, "fused+compile")
_BY_DEFAULT = ("eager", "compile", "fused")
_IMAGE_SUFFIXES = (".png", ".svg", ".pdf")
_MIB = 2**20
_FORMS = {
    "linear": "nn.Linear",
    "conv": "1x1 convolutions",
    "faster": "nn.Linear or 1x1 convolutions, whichever a short trial finds faster in the case",
}

_EAGER = {
    "se": "x.mean, two layers ({}), gate, x * gate",
    "tail": "F.batch_norm, mean, two layers ({}), gate, z * gate, + residual and relu in place",
}
_PASSES = {
    "se": "the tensor-sized reads and writes that the case needs at least",
    "tail": "the tensor-sized reads and writes of two sweeps over x each way: forward 4 (x twice, residual, y), "
    "backward 6 (dy and x twice, dx, dresidual), together 10, where eager makes 11 and 18, torch.compile 6.5 to "
    "7.5 and 8.5 to 9.5; eval-forward needs 3",
}

_KEPT_GRAPH = (
    "torch.autograd.grad with retain_graph=True on the graph of one forward per input, which has run before; "
    "torch.compile without donated buffers, as its backward runs more than once"
)

_EPILOG = """\
Every run is checked before it is timed: outputs, where there is a backward every gradient for a random dy, and with
--op tail BatchNorm's running statistics, against a float64 oracle in plain PyTorch. The providers fused, cuda and
triton may be off by twice stock PyTorch's own error in the same dtype, or by what rounding explains (the rule is in
senet_fused/accuracy.py), plus one unit in the last place, the others by eight times as much; one that is off by more
gets an error instead of a time. fused+compile is held to the rule itself where this package's operator runs in the
graph, as the others where the layer was compiled as plain PyTorch.

examples:
  senet-fused bench --problem senet154 --quick
  senet-fused bench --problem senet154 --batch 8 --dtype float32 bfloat16 --layout contiguous channels_last \\
      --direction forward forward+backward --json out.json --plot out.png
  senet-fused bench --shape 1,256,16,56,56 --shape 1,2048,128,7,7 --providers eager fused
  senet-fused bench --device cuda --batch 64 --dtype bfloat16 --providers eager compile cuda triton
  senet-fused bench --op tail --direction forward backward eval-forward --dtype bfloat16
  senet-fused bench --from out.json --plot out.png --roofline roofline.png

whole networks, and two runs side by side:
  senet-fused bench model seresnet50 --batch 8        inference and a training step; `bench model --help`
  senet-fused bench compare before.json after.json    what --json has written; `bench compare --help`

exit status: 0 all measured, 1 an output was wrong or a provider failed, 2 the request cannot be met,
130 interrupted or out of time
"""


def add_layers(group: argparse._ArgumentGroup) -> None:
    """Adds the options that name layers: --problem and --shape."""
    group.add_argument(
        "--problem",
        nargs="+",
        default=[],
        metavar="NAME",
        help=f"of {', '.join(problems())} (default: senet154 if no --shape is given)",
    )
    group.add_argument(
        "--shape",
        action="append",
        nargs="+",
        default=[],
        metavar="N,C,R,H,W",
        help="a single layer, also N,C,R,L or N,C,R,D,H,W; may be repeated",
    )


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options of the subcommand. Imports no torch."""
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = _EPILOG
    what = parser.add_argument_group("what is computed")
    what.add_argument("--list", action="store_true", help="print the problems and their shapes, and stop")
    what.add_argument(
        "--op",
        default="se",
        choices=OPS,
        help="se: the SE layer (default); tail: the end of a residual block around it, BatchNorm (its parameters and "
        "statistics in float32) -> SE -> + residual -> ReLU, as eager modules, compiled, and by block_tail",
    )
    add_layers(what)
    what.add_argument(
        "--batch",
        nargs="+",
        type=positive(int),
        default=[8],
        metavar="N",
        help="batch size(s) for --problem (default 8)",
    )
    what.add_argument("--dtype", nargs="+", default=["float32"], choices=DTYPES)
    what.add_argument("--layout", nargs="+", default=["contiguous"], choices=LAYOUTS)
    what.add_argument(
        "--direction",
        nargs="+",
        default=["forward"],
        choices=TAIL_DIRECTIONS,
        help="forward is timed under no_grad (default); backward runs alone, again and again on the kept graph of one "
        "forward; a tail's BatchNorm is in training, with statistics updated, but for eval-forward, which only --op "
        "tail has",
    )
    what.add_argument(
        "--bias",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="fully connected layers with bias, as in SENet-154 (default) or without",
    )
    what.add_argument("--residual", action="store_true", help="add a shortcut behind the layer (a tail has one)")
    what.add_argument(
        "--post-act", default="none", choices=POST_ACTS, help="take an activation at the end (a tail has relu)"
    )
    what.add_argument("--act", choices=ACTS, help="instead of the problem's activation")
    what.add_argument("--gate", choices=GATES, help="instead of the problem's gate function")

    who = parser.add_argument_group("who computes it")
    who.add_argument(
        "--providers",
        nargs="+",
        choices=PROVIDERS,
        help=f"default: {' '.join(_BY_DEFAULT)}, with --device cuda also {' and '.join(GPU_BACKENDS)}, each where it "
        "can run and has kernels for every dtype asked for; a copy, the ceiling, is always measured with them. "
        "max-autotune is torch.compile's mode of that name (without CUDA graphs of its own), cuda and triton the fused "
        "layer with that backend, fused+compile the fused layer under torch.compile",
    )
    who.add_argument(
        "--backend",
        metavar="NAME",
        help="of fused and fused+compile: auto, reference, cpu, ... (default: SENET_FUSED_BACKEND, else auto)",
    )
    who.add_argument(
        "--eager-form",
        default="faster",
        choices=("faster", "linear", "conv"),
        help="stock layer with nn.Linear, with 1x1 convolutions, or whichever a short trial finds faster "
        "in each case (default); torch.compile gets the same",
    )
    who.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    who.add_argument("--threads", type=positive(int), metavar="N", help="CPU threads (default: PyTorch's own choice)")

    how = parser.add_argument_group("how it is measured")
    how.add_argument(
        "--cache",
        nargs="+",
        choices=("cold", "warm"),
        metavar="{cold,warm}",
        help="cold (default): inputs rotate over buffers that exceed twice the last-level cache; warm: one "
        "buffer again and again; on a GPU both by default",
    )
    how.add_argument(
        "--cache-size",
        type=positive(float),
        metavar="MIB",
        help="the cache's size in MiB, if the system tells it wrong",
    )
    how.add_argument(
        "--budget",
        type=positive(float),
        metavar="SECONDS",
        help="time for the samples of one case, all providers together (default 3)",
    )
    how.add_argument(
        "--time-limit",
        type=positive(float),
        default=float("inf"),
        metavar="SECONDS",
        help="begin no case after so long; what is done is reported and written, as after an interruption",
    )
    how.add_argument("--quick", action="store_true", help="a first look: little time per case, few samples")

    output = parser.add_argument_group("output")
    output.add_argument(
        "--from",
        dest="saved",
        nargs="+",
        type=Path,
        metavar="FILE",
        help="report what --json has written, of one device and the same versions, instead of measuring",
    )
    output.add_argument(
        "--json", type=Path, metavar="FILE", help="header, rows and summary, written again when a case is done"
    )
    output.add_argument("--plot", type=Path, metavar="FILE", help="a picture (.png, .svg or .pdf); needs matplotlib")
    output.add_argument(
        "--roofline",
        type=Path,
        metavar="FILE",
        help="a table, and a picture as above, of the bandwidth reached as a part of the copy's, by the tensor's size",
    )
    output.add_argument("--plain", action="store_true", help="no colours and no progress bar even if rich is there")


def _list_problems() -> None:
    for problem in problems().values():
        tail = ", followed by + shortcut" if problem.residual else ""
        print(f"{problem.name}: act {problem.act}, gate {problem.gate}{tail}")
        for shape in problem.shapes:
            spatial = "x".join(map(str, shape.spatial))
            print(f"  {shape.channels}/{shape.rd_channels} @ {spatial}  x {shape.count}")


def _check_outputs(args: argparse.Namespace) -> None:
    if args.json is not None:
        require_writable(args.json)
    for option, path in (("--plot", args.plot), ("--roofline", args.roofline)):
        if path is None:
            continue
        if path.suffix not in _IMAGE_SUFFIXES:
            raise RequestError(
                f"cannot tell the picture's format from {path.name!r}; end it in {', '.join(_IMAGE_SUFFIXES)}"
            )
        if importlib.util.find_spec("matplotlib") is None:
            raise RequestError(f"{option} needs matplotlib: pip install 'senet-fused[bench]'")
        require_writable(path)


def _refusal(args: argparse.Namespace, name: str, dtypes: Sequence[str]) -> str | None:
    """Why this backend cannot be a provider in the run; None if it can."""
    import torch

    from .. import backends

    refusals = (backends.refusal(name, args.device, getattr(torch, dtype)) for dtype in dtypes)
    return next(filter(None, refusals), None)


def _providers(args: argparse.Namespace) -> tuple[str, ...]:
    """Who is measured. Raises RequestError for a backend that is asked for and cannot run."""
    if args.providers is None:
        candidates = GPU_BACKENDS if args.device == "cuda" else ()
        serving = [name for name in candidates if _refusal(args, name, args.dtype) is None]
        return tuple(name for name in PROVIDERS if name in (*_BY_DEFAULT, *serving))
    for name in GPU_BACKENDS:
        refusal = _refusal(args, name, ("float32",))
        if name in args.providers and refusal is not None:
            raise RequestError(
                f"provider {name!r} cannot run with --device {args.device}: {refusal}; leave it out of --providers"
            )
    return tuple(name for name in PROVIDERS if name in args.providers)


def _header(args: argparse.Namespace, command: Sequence[str], options: Options) -> dict:
    from .header import stamp

    size = f"{options.cache_bytes / _MIB:.0f} MiB"
    if args.device == "cuda":
        cold = (
            f"before each replay a block of twice the L2 ({size}) is overwritten, "
            "and each call of a replay reads inputs of its own"
        )
    else:
        cold = (
            "inputs rotate over distinct random buffers, shared by all providers, that together exceed "
            f"twice the last-level cache of {size}"
        )
    texts = {"cold": f"cold: {cold}", "warm": "warm: one input buffer, again and again"}
    return {
        **stamp("senet-fused bench", command, args.device, options.settings),
        "cache": "; ".join(texts[cache] for cache in options.caches),
        "cache_bytes": options.cache_bytes,
        **({"backward": _KEPT_GRAPH} if "backward" in args.direction else {}),
        "byte_model": f"passes = {_PASSES[args.op]}; GB/s = passes x bytes / median",
        "copy": "x.clone() under the same rotation: 2 passes; copies = median / copy's median; "
        "of copy = GB/s / copy's GB/s",
        "baseline": f"eager: {_EAGER[args.op].format(_FORMS[args.eager_form])}; "
        "torch.compile gets the same module, max-autotune too, without CUDA graphs of its own",
    }


def _report(args: argparse.Namespace, header: dict, rows: list[dict]) -> None:
    from . import model_report, report

    roofline = args.roofline is not None
    if header.get("kind") == "model":
        summary = model_report.summarise(rows)
        model_report.render(header, rows, summary, sys.stdout, plain=args.plain)
    else:
        summary = report.summarise(rows)
        report.render(header, rows, summary, sys.stdout, plain=args.plain, roofline=roofline)
    if args.json is not None:
        report.write_json(args.json, header, rows, summary)
        print(f"\nwrote {args.json}")
    if rows and (args.plot is not None or roofline):
        from . import plot

        for draw, path in ((plot.draw, args.plot), (plot.draw_roofline, args.roofline)):
            if path is not None:
                draw(header, rows, path)
                print(f"wrote {path}")


def run(args: argparse.Namespace, command: Sequence[str] = ()) -> int:
    """Runs the benchmark, or reads results that are saved, and prints the report.

    Args:
        args: as parsed by a parser with :func:`add_arguments`.
        command: the arguments as typed, for the header.

    Returns:
        0; 1 if a row has an error; 130 if interrupted or out of time (what is done is reported and written).

    Raises:
        RequestError: the request cannot be met; nothing has been measured.
    """
    if args.list:
        _list_problems()
        return 0
    if args.saved is not None:
        from . import report

        header, rows = report.read_json(args.saved)
        if header.get("kind") == "model" and (args.plot or args.roofline):
            raise RequestError("--plot and --roofline draw runs of `bench`, and this is one of `bench model`")
        _check_outputs(args)
        _report(args, header, rows)
        return 1 if any(row["error"] for row in rows) else 0
    shapes = [text for group in args.shape for text in group]
    names = args.problem or ([] if shapes else ["senet154"])
    todo = cases(
        names,
        shapes,
        batches=args.batch,
        dtypes=args.dtype,
        layouts=args.layout,
        directions=args.direction,
        bias=args.bias,
        residual=args.residual,
        post_act=args.post_act,
        act=args.act,
        gate=args.gate,
        op=args.op,
    )
    _check_outputs(args)
    check_device(args)
    providers = _providers(args)

    from . import cuda_timing, report, runner, timing
    from .progress import open_progress

    cuda = args.device == "cuda"
    caches = tuple(dict.fromkeys(args.cache or (("cold", "warm") if cuda else ("cold",))))
    cache_bytes = (
        int(args.cache_size * _MIB)
        if args.cache_size is not None
        else cuda_timing.l2_bytes(0)
        if cuda
        else machine.last_level_cache_bytes()
    )
    settings = timing.QUICK if args.quick else timing.Settings()
    if args.budget is not None:
        settings = dataclasses.replace(settings, budget_s=args.budget)
    options = runner.Options(
        providers=providers,
        backend=args.backend,
        caches=caches,
        cache_bytes=cache_bytes,
        device=args.device,
        eager_form=args.eager_form,
        settings=settings,
        time_limit_s=args.time_limit,
    )

    rows: list[runner.Row] = []
    interrupted = False

    def so_far() -> dict:
        return header | {"interrupted": f"after {len({_cell(row) for row in rows})} of {len(todo)} cases"}

    def keep() -> None:
        if args.json is not None:
            report.write_json(args.json, so_far(), rows, report.summarise(rows))

    with runner.computing(args.threads):
        header = _header(args, command, options)
        try:
            with open_progress(len(todo), args.plain, keep) as progress:
                runner.run(todo, options, progress, rows)
        except KeyboardInterrupt:
            interrupted = True
        done = len({_cell(row) for row in rows})
        interrupted = interrupted or (args.time_limit < float("inf") and done < len(todo))
        if interrupted:
            header = so_far()
    _report(args, header, rows)
    if interrupted:
        return 130
    return 1 if any(row["error"] for row in rows) else 0


def _cell(row: dict) -> tuple:
    return tuple(row[key] for key in ("problem", "shape", "dtype", "layout", "direction"))
