"""The command line: ``senet-fused bench | train | fuse-check | tune | doctor | demo``, also ``python -m senet_fused``.

A subcommand's module is imported only when it runs, so ``--help`` and a mistyped option answer at once.
"""

from __future__ import annotations

import argparse
import importlib
import os
import sys
from collections.abc import Sequence
from typing import Any

__all__ = ["main", "parse"]

# What a command is about, by its name; then the modules, which have add_arguments and run.
_COMMANDS = {
    "bench": "time SE layers: stock PyTorch, torch.compile and the fused operator, checked and side by side",
    "train": "train SENet, SE-ResNet or a network of timm, torchvision or your own on images, alone or under torchrun",
    "fuse-check": "what senet_fused.fuse does to a network of timm, torchvision or your own: layers, time and numbers",
    "tune": "time plans of the Triton kernels on this GPU, and keep the fastest in a file that calls look up",
    "doctor": "what is installed, which backends can run here and why not, and whether they are right",
    "demo": "train a small SE-ResNet on handwritten digits with PyTorch's own layers, FusedSE and block tails",
}
# Commands behind the word `bench`.
_OF_BENCH = {
    "bench compare": "two saved runs of `senet-fused bench`, or of `bench model`, row by row: faster, slower or the "
    "same",
    "bench model": "time whole networks, inference and a training step: stock, torch.compile, fused, and the twin "
    "without SE",
}
_MODULES = {
    "bench": "senet_fused.bench.command",
    "bench compare": "senet_fused.bench.compare",
    "bench model": "senet_fused.bench.model",
    "train": "senet_fused.train.command",
    "fuse-check": "senet_fused.cli.fuse_check",
    "tune": "senet_fused.cli.tune",
    "doctor": "senet_fused.cli.doctor",
    "demo": "senet_fused.demo.command",
}
_DESCRIPTION = "Fused Squeeze-and-Excitation for PyTorch: measure it, train with it, examine the installation."


def _parser(command: str | None) -> argparse.ArgumentParser:
    """The parser, with the options of the one command that is going to run."""
    if command in _OF_BENCH:
        about = _OF_BENCH[command]
        parser = argparse.ArgumentParser(prog=f"senet-fused {command}", description=_sentence(about))
        _module(command).add_arguments(parser)
        return parser
    parser = argparse.ArgumentParser(prog="senet-fused", description=_DESCRIPTION)
    parser.add_argument("--version", action="store_true", help="print the version and stop")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", title="commands")
    for name, about in _COMMANDS.items():
        sub = commands.add_parser(name, help=about, description=_sentence(about))
        if name == command:
            _module(name).add_arguments(sub)
    return parser


def _sentence(about: str) -> str:
    return f"{about[0].upper()}{about[1:]}."


def _module(command: str) -> Any:
    return importlib.import_module(_MODULES[command])


def parse(argv: Sequence[str]) -> tuple[str | None, argparse.Namespace, list[str]]:
    """The command (None: none is named), its options, and the words behind its name. Exits with 2 for wrong usage."""
    command = next((name for name in (" ".join(argv[:2]), *argv[:1]) if name in _MODULES), None)
    rest = list(argv[len(command.split()) :]) if command else []
    return command, _parser(command).parse_args(rest if command in _OF_BENCH else argv), rest


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line and returns the exit status (2 for a request that cannot be met)."""
    command, args, rest = parse(sys.argv[1:] if argv is None else argv)
    if command is None:
        if not args.version:
            _parser(None).print_help()
            return 2
        from senet_fused import __version__

        print(f"senet-fused {__version__}")
        return 0
    try:
        from senet_fused.arguments import RequestError

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
