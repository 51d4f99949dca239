"""The command line: ``senet-fused bench | train | fuse-check | tune | doctor | demo``, also ``python -m senet_fused``.

A subcommand's module is imported only when it runs, so ``--help`` and a mistyped option answer at once.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence

__all__ = ["main"]

_COMMANDS = {
    "bench": "time SE layers: stock PyTorch, torch.compile and the fused operator, checked and side by side",
    "train": "train SENet, SE-ResNet or a network of timm, torchvision or your own on images, alone or under torchrun",
    "fuse-check": "what senet_fused.fuse does to a network of timm, torchvision or your own: layers, time and numbers",
    "tune": "time plans of the Triton kernels on this GPU, and keep the fastest in a file that calls look up",
    "doctor": "what is installed, which backends can run here and why not, and whether they are right",
    "demo": "train a small SE-ResNet on handwritten digits with the stock layer and with FusedSE",
}
# Taken if one of these words stands behind `bench`.
_OF_BENCH = {
    "compare": "two saved runs of `senet-fused bench`, or of `bench model`, row by row: faster, slower or the same",
    "model": "time whole networks, inference and a training step: stock, torch.compile, fused, and the twin without SE",
}
_DESCRIPTION = "Fused Squeeze-and-Excitation for PyTorch: measure it, train with it, examine the installation."


def _parser(command: str | None) -> argparse.ArgumentParser:
    """The parser, with the options of the one subcommand that is going to run."""
    parser = argparse.ArgumentParser(prog="senet-fused", description=_DESCRIPTION)
    parser.add_argument("--version", action="store_true", help="print the version and stop")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", title="commands")
    for name, about in _COMMANDS.items():
        sub = commands.add_parser(name, help=about, description=about[0].upper() + about[1:] + ".")
        if name == command:
            _module(name).add_arguments(sub)
    return parser


def _parser_of_bench(name: str) -> argparse.ArgumentParser:
    about = _OF_BENCH[name]
    parser = argparse.ArgumentParser(prog=f"senet-fused bench {name}", description=about[0].upper() + about[1:] + ".")
    _module(f"bench {name}").add_arguments(parser)
    return parser


def _module(command: str):
    if command == "bench compare":
        from .bench import compare as module
    elif command == "bench model":
        from .bench import model as module
    elif command == "bench":
        from .bench import command as module
    elif command == "train":
        from .train import command as module
    elif command == "fuse-check":
        from . import fuse_check as module
    elif command == "tune":
        from . import tune as module
    elif command == "doctor":
        from . import doctor as module
    else:
        from .demo import digits as module
    return module


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line and returns the exit status (2 for a request that cannot be met)."""
    argv = sys.argv[1:] if argv is None else list(argv)
    command = argv[0] if argv and argv[0] in _COMMANDS else None
    if command == "bench" and argv[1:] and argv[1] in _OF_BENCH:
        command, rest = f"bench {argv[1]}", argv[2:]
        args = _parser_of_bench(argv[1]).parse_args(rest)
    else:
        parser, rest = _parser(command), argv[1:]
        args = parser.parse_args(argv)
        if args.version:
            from . import __version__

            print(f"senet-fused {__version__}")
            return 0
        if args.command is None:
            parser.print_help()
            return 2
    try:
        from .arguments import RequestError

        try:
            return _module(command).run(*((args, rest) if command.startswith("bench") else (args,)))
        except RequestError as error:
            print(f"senet-fused {command}: error: {error}", file=sys.stderr)
            return 2
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # the reader of our output has left, as `| head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
