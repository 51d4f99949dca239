"""``senet-fused bench``: SE layers and block tails. Its arguments, and the run from arguments to exit status."""

from __future__ import annotations

import argparse
import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from .. import machine
from ..arguments import RequestError, check_device, positive, require_writable
from . import session
from .problems import ACTS, DTYPES, GATES, GPU_BACKENDS, LAYOUTS, OPS, POST_ACTS, TAIL_DIRECTIONS, cases, problems
from .saved import Row, kind_of, read_json

if TYPE_CHECKING:
    from .runner import Options

__all__ = ["add_arguments", "add_layers", "run"]

PROVIDERS = ("eager", "compile", "max-autotune", "fused", *GPU_BACKENDS, "fused+compile")
_BY_DEFAULT = ("eager", "compile", "fused")
_IMAGE_SUFFIXES = (".png", ".svg", ".pdf")
_BUDGET_S = 3.0
_MIB = 2**20

_EPILOG = """\
Before it is timed every provider is checked against a float64 oracle: outputs, gradients, and a tail's running
statistics. fused, cuda and triton may be off by twice stock PyTorch's own error in the same dtype, or by what rounding
explains (senet_fused/accuracy.py), the others by eight times as much. What is wrong gets an error instead of a time.

providers:
  eager                   stock PyTorch, with nn.Linear or 1x1 convolutions, whichever is faster in the case
  compile, max-autotune   the same under torch.compile, by default and in that mode
  fused, fused+compile    this package's layer, and that under torch.compile
  cuda, triton            the fused layer on that backend
  copy                    x.clone(): the ceiling, always measured

GB/s is passes x bytes of x / median; passes are the tensor-sized reads and writes that a case needs at least: forward
2, backward 3, with a shortcut 3 and 3, or 4 with ReLU; a tail, which sweeps twice over x, 4 and 6, eval-forward 3.
copies: median / the copy's median. of copy: GB/s / the copy's GB/s. Times are medians of samples that the providers
take in turns; on a GPU of device time, by replays of a CUDA graph, with the wall time beside it.

examples:
  senet-fused bench --problem senet154 --batch 8 --dtype float32 bfloat16 --layout contiguous channels_last \\
      --direction forward forward+backward --json out.json --plot out.png
  senet-fused bench --shape 1,256,16,56,56 --providers eager fused --quick
  senet-fused bench --op tail --device cuda --batch 64 --dtype bfloat16 --direction forward backward
  senet-fused bench --from out.json --plot out.png --roofline roofline.png

  senet-fused bench model seresnet50 --batch 8        whole networks; `bench model --help`
  senet-fused bench compare before.json after.json    two saved runs; `bench compare --help`

exit status: 0 all measured, 1 an output was wrong or a provider failed, 2 the request cannot be met,
130 interrupted or out of time
"""


def add_layers(group: argparse._ArgumentGroup) -> None:
    """Adds the options that name layers: --problem and --shape."""
    known = f"of {', '.join(problems())} (default: senet154 if no --shape is given)"
    group.add_argument("--problem", nargs="+", default=[], metavar="NAME", help=known)
    shapes = "a single layer, also N,C,R,L or N,C,R,D,H,W; may be repeated"
    group.add_argument("--shape", action="append", nargs="+", default=[], metavar="N,C,R,H,W", help=shapes)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options of the subcommand. Imports no torch."""
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = _EPILOG
    what = parser.add_argument_group("what is measured")
    what.add_argument("--list", action="store_true", help="print the problems and their shapes, and stop")
    op = "se: the SE layer (default); tail: BatchNorm, in float32 -> SE -> + residual -> ReLU"
    what.add_argument("--op", default="se", choices=OPS, help=op)
    add_layers(what)
    what.add_argument("--batch", nargs="+", type=positive(int), default=[8], metavar="N", help="of --problem (8)")
    what.add_argument("--dtype", nargs="+", default=["float32"], choices=DTYPES)
    what.add_argument("--layout", nargs="+", default=["contiguous"], choices=LAYOUTS)
    direction = (
        "forward (default) is under no_grad; backward is timed alone, on the kept graph of one forward; eval-forward "
        "is a tail's with given statistics"
    )
    what.add_argument("--direction", nargs="+", default=["forward"], choices=TAIL_DIRECTIONS, help=direction)
    what.add_argument("--bias", action=argparse.BooleanOptionalAction, default=True, help="of both layers (default)")
    what.add_argument("--residual", action="store_true", help="add a shortcut behind the layer (a tail has one)")
    what.add_argument("--post-act", default="none", choices=POST_ACTS, help="at the end (a tail has relu)")
    what.add_argument("--act", choices=ACTS, help="instead of the problem's activation")
    what.add_argument("--gate", choices=GATES, help="instead of the problem's gate function")
    default = f"default: {' '.join(_BY_DEFAULT)}, and on a GPU {' '.join(GPU_BACKENDS)} where they can run"
    what.add_argument("--providers", nargs="+", choices=PROVIDERS, help=f"as below ({default})")
    cache = (
        "cold (default): inputs rotate over buffers that exceed twice the last-level cache; warm: one buffer; default "
        "on a GPU: both"
    )
    what.add_argument("--cache", nargs="+", choices=("cold", "warm"), help=cache)
    what.add_argument("--cache-size", type=positive(float), metavar="MIB", help="if the system tells it wrong")
    output = session.add_arguments(parser, "fused and fused+compile", _BUDGET_S)
    saved = "report what --json has saved, of one device and the same versions, instead of measuring"
    output.add_argument("--from", dest="saved", nargs="+", type=Path, metavar="FILE", help=saved)
    output.add_argument("--plot", type=Path, metavar="FILE", help="a picture of speed-ups (.png, .svg or .pdf)")
    output.add_argument("--roofline", type=Path, metavar="FILE", help="a picture of bandwidths by the tensor's size")


def _list_problems() -> None:
    for problem in problems().values():
        tail = ", followed by + shortcut" if problem.residual else ""
        print(f"{problem.name}: act {problem.act}, gate {problem.gate}{tail}")
        for shape in problem.shapes:
            print(f"  {shape.channels}/{shape.rd_channels} @ {'x'.join(map(str, shape.spatial))}  x {shape.count}")


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


def _header(args: argparse.Namespace, command: Sequence[str], options: Options) -> Row:
    from .header import stamp

    header = stamp("senet-fused bench", command, args.device, options.settings)
    mebibytes = f"{options.cache_bytes / _MIB:.0f} MiB {'L2' if args.device == 'cuda' else 'last-level'} cache"
    return header | {"cache": f"{' and '.join(options.caches)}, {mebibytes}", "cache_bytes": options.cache_bytes}


def _report(args: argparse.Namespace, header: Row, rows: Sequence[Row]) -> None:
    session.report(args, header, rows)
    if rows and (args.plot is not None or args.roofline is not None):
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
        0; 1 if a row has an error; 130 if interrupted or out of time (what is done is reported and saved).

    Raises:
        RequestError: the request cannot be met; nothing has been measured.
    """
    if args.list:
        _list_problems()
        return 0
    if args.saved is not None:
        header, rows = read_json(args.saved)
        if kind_of(header) == "model" and (args.plot or args.roofline):
            raise RequestError("--plot and --roofline draw runs of `bench`, and this is one of `bench model`")
        _check_outputs(args)
        _report(args, header, rows)
        return 1 if any(row["error"] for row in rows) else 0
    shapes = [text for group in args.shape for text in group]
    names = args.problem or ([] if shapes else ["senet154"])
    layer = {name: getattr(args, name) for name in ("bias", "residual", "post_act", "act", "gate", "op")}
    grid = {"batches": args.batch, "dtypes": args.dtype, "layouts": args.layout, "directions": args.direction}
    todo = cases(names, shapes, **grid, **layer)
    _check_outputs(args)
    check_device(args)
    providers = _providers(args)

    from . import cuda_timing, runner

    cuda = args.device == "cuda"
    if args.cache_size is not None:
        cache_bytes = int(args.cache_size * _MIB)
    else:
        cache_bytes = cuda_timing.l2_bytes(0) if cuda else machine.last_level_cache_bytes()
    options = runner.Options(
        providers=providers,
        backend=args.backend,
        caches=tuple(dict.fromkeys(args.cache or (("cold", "warm") if cuda else ("cold",)))),
        cache_bytes=cache_bytes,
        device=args.device,
        settings=session.settings_of(args, _BUDGET_S),
        time_limit_s=args.time_limit,
    )
    header, rows, status = session.measure(
        args,
        len(todo),
        len(options.caches) * (len(providers) + 1),
        lambda: _header(args, command, options),
        lambda progress, rows: runner.run(todo, options, progress, rows),
    )
    _report(args, header, rows)
    return status
