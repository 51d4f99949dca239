"""``senet-fused bench model``: whole networks, inference and a training step. Its arguments and its run."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import TYPE_CHECKING

from ..arguments import RequestError, check_device, positive, require_writable
from . import session
from .problems import LAYOUTS
from .saved import Row

if TYPE_CHECKING:
    from .model_run import Options

__all__ = ["add_arguments", "resolve", "run"]

VARIANTS = (
    "stock", "compile", "max-autotune", "graph", "fused", "fused+compile", "tails", "tails+compile", "tails+graph",
    "folded", "folded+compile", "folded+fused", "folded+fused+compile", "no-se", "no-se+compile",
)  # fmt: skip
GRAPHS = ("graph", "tails+graph")
ON_REQUEST = ("max-autotune", *GRAPHS, *(name for name in VARIANTS if name.startswith("folded")))
DTYPES = ("float32", "bfloat16", "float16")
MODES = ("inference", "training")
LARGEST = "max"  # of --batch: the largest that fits in a GPU's memory
_BUDGET_S = 10.0

# The original networks of Hu et al. 2018 by timm's names; all take 3x224x224.
PRESETS = {
    "senet154": "legacy_senet154",
    "se_resnext101": "legacy_seresnext101_32x4d",
    "se_resnet50": "legacy_seresnet50",
}
_DEFAULTS = {"mode": list(MODES), "batch": [8], "dtype": ["float32"], "layout": ["contiguous"], "providers": None}
# With a preset, by device.
_PRESET_DEFAULTS = {
    "cpu": {
        "layout": ["channels_last"],
        "batch": [1, 4, 8],
        "providers": ["stock", "compile", "fused", "tails", "no-se"],
    },
    "cuda": {
        "layout": ["channels_last"],
        "batch": [32, 64, 128, LARGEST],
        "dtype": ["bfloat16"],  # by autocast
        "providers": ["stock", "compile", "graph", "fused", "tails", "tails+compile", "tails+graph", "no-se"],
    },
}

_EPILOG = """\
NAME is timm's network of that name, else torchvision's; timm:NAME and torchvision:NAME are explicit; FILE.py:FACTORY is
what a function without arguments in a file returns. Weights are random and the same for all variants.

variants:
  stock, no-se       the network as it is; with nn.Identity for every SE layer, where each returns its scaled input
  fused, tails       after senet_fused.fuse, without and with tails=True
  folded             after senet_fused.fold_batchnorm(fuse=False), folded+fused with fuse=True: in inference alone
  +compile, compile  the one in front, or stock, under torch.compile; max-autotune: stock, in that mode
  +graph, graph      all that is timed as one CUDA graph
The price of SE is time / time of no-se: 1.20 says that SE costs 20 % of the network without it.

presets, which other options override:
  senet154, se_resnext101, se_resnet50: timm's legacy_senet154, legacy_seresnext101_32x4d, legacy_seresnet50, in
  channels_last. On a CPU in float32 at batches 1 4 8, on a GPU in bfloat16 by autocast at 32 64 128 max.

inference is torch.inference_mode. training is forward, cross-entropy (mean of squares where the output is no
[N, classes]), backward, SGD with momentum. saved MB: what autograd saves, each storage once, without weights and input;
peak MB: the most that the step's tensors take at once.

Before they are timed variants are compared with stock in the same dtype; in float32 one that is off by more than 1e-3
gets an error instead of a time. In other dtypes stock's and no-se's figures are against themselves in float32.

examples:
  senet-fused bench model seresnet50 --batch 8 32 --layout channels_last
  senet-fused bench model senet154 --device cuda --dtype float16 --amp --batch 64 --json out.json
  senet-fused bench model --preset senet154 se_resnet50 --device cuda --mode training --json sweep.json
  senet-fused bench model my_net.py:make --size 1,28,28 --providers stock fused no-se --quick

exit status: 0 all measured, 1 an output was wrong or a variant failed, 2 the request cannot be met,
130 interrupted or out of time
"""


def _batch_size(text: str) -> int | str:
    if text == LARGEST:
        return LARGEST
    try:
        return positive(int)(text)
    except argparse.ArgumentTypeError:
        raise argparse.ArgumentTypeError(f"must be a positive integer or {LARGEST!r}, got {text!r}") from None


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options of the subcommand. Imports no torch."""
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = _EPILOG
    what = parser.add_argument_group("what is computed")
    what.add_argument("models", nargs="*", metavar="NAME", help="a network, as below; in front of the options")
    what.add_argument("--preset", nargs="+", choices=PRESETS, help="networks, and other defaults, as below")
    what.add_argument("--mode", nargs="+", choices=MODES, help="default: both")
    batch = f"default 8; {LARGEST}, on a GPU: the largest whose training step fits with all variants"
    what.add_argument("--batch", nargs="+", type=_batch_size, metavar="N", help=batch)
    size = "of one input: N for a square image, or C,H,W (also C,L and C,D,H,W); default: the network's, else 3,224,224"
    what.add_argument("--size", metavar="SIZE", help=size)
    what.add_argument("--dtype", nargs="+", choices=DTYPES, help="default float32")
    what.add_argument("--amp", action="store_true", help="float32 weights, and autocast to the dtype")
    what.add_argument("--layout", nargs="+", choices=LAYOUTS, help="default contiguous")
    what.add_argument("--seed", type=int, default=0, help="of weights, inputs and labels (default 0)")
    default = f"the variants (default: all but {', '.join(ON_REQUEST)})"
    what.add_argument("--providers", nargs="+", choices=VARIANTS, help=default)
    session.add_arguments(parser, "the variants that are fused", _BUDGET_S)


def resolve(args: argparse.Namespace) -> None:
    """Fills in the options that are None: from the presets where there are any, else the command's own defaults.

    --dtype and --amp belong together: giving either overrides both.

    Raises:
        RequestError: there is no network, --amp in float32, or --batch max on a CPU.
    """
    if not args.models and not args.preset:
        raise RequestError(f"which network? Give names in front of the options, or --preset {' | '.join(PRESETS)}")
    args.models = args.models or [PRESETS[name] for name in dict.fromkeys(args.preset)]
    defaults = _DEFAULTS | (_PRESET_DEFAULTS[args.device] if args.preset else {})
    if args.preset and args.dtype is None:
        args.amp = args.amp or args.device == "cuda"
        defaults["dtype"] = ["bfloat16"] if args.amp else ["float32"]
    for name, value in defaults.items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    if args.amp and "float32" in args.dtype:
        raise RequestError("--amp is for --dtype bfloat16 or float16: autocast to float32 changes nothing")
    if LARGEST in args.batch and args.device != "cuda":
        raise RequestError(
            f"--batch {LARGEST} is the largest batch that fits in a GPU's memory, and needs --device cuda; with "
            f"--device {args.device} give numbers, for instance --batch 1 8 32"
        )


def _header(args: argparse.Namespace, command: Sequence[str], options: Options) -> Row:
    from .. import machine
    from .header import stamp
    from .zoo import LIBRARIES

    header = stamp("senet-fused bench model", command, args.device, options.settings)
    header["versions"] |= {library: machine.package_version(library) for library in LIBRARIES}
    return header | {"kind": "model", "seed": args.seed}


def run(args: argparse.Namespace, command: Sequence[str] = ()) -> int:
    """Measures the networks and prints the report.

    Args:
        args: as parsed by a parser with :func:`add_arguments`.
        command: the arguments as typed, for the header.

    Returns:
        0; 1 if a row has an error; 130 if interrupted or out of time (what is done is reported and saved).

    Raises:
        RequestError: the request cannot be met; nothing has been measured.
    """
    resolve(args)
    if args.json is not None:
        require_writable(args.json)
    check_device(args)
    asked = args.providers or set(VARIANTS) - set(ON_REQUEST)
    names = tuple(name for name in VARIANTS if name in asked)
    graphs = [name for name in GRAPHS if name in names]
    if graphs and args.device != "cuda":
        raise RequestError(
            f"provider {graphs[0]!r} is a CUDA graph and cannot run with --device {args.device}; use --device cuda, or "
            "leave it out of --providers"
        )

    from . import model_run, zoo

    todo = []
    for name in dict.fromkeys(args.models):
        model = zoo.load(name, seed=args.seed)
        todo.append((model, model_run.cases(name, zoo.input_size(model, args.size), args)))
    options = model_run.Options(
        variants=names,
        backend=args.backend,
        device=args.device,
        seed=args.seed,
        settings=session.settings_of(args, _BUDGET_S),
        time_limit_s=args.time_limit,
    )
    header, rows, status = session.measure(
        args,
        sum(len(cases) for _, cases in todo),
        len(names),
        lambda: _header(args, command, options),
        lambda progress, rows: model_run.run(todo, options, progress, rows),
    )
    session.report(args, header, rows)
    return status
