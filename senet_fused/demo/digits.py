"""``senet-fused demo``: one SE-ResNet on real images, with the tutorial SE layer, with FusedSE, and with FusedSETail.

The images are the handwritten digits that come with scikit-learn (Alpaydin and Kaynak's "Optical Recognition
of Handwritten Digits", 1797 images of 8 x 8 pixels), enlarged bilinearly. All networks start from the same
weights and see the same batches, so they should learn the same; one more run, the tutorial network with every
pixel moved by one unit in the last place, shows how far rounding alone drives two such runs apart.
"""

from __future__ import annotations

import argparse
import importlib
import json
import math
import os
import sys
import time
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from types import TracebackType
from typing import Any

import torch

import senet_fused
from senet_fused import select
from senet_fused.handwritten_digits import HELD_OUT, IMAGES

from . import picture
from .comparison import NAMES, DemoFailure, Options, compare, counts_of

__all__ = ["add_arguments", "run"]

EXTRA = 'pip install "senet_fused[demo]"'
NEEDED = (("scikit-learn", "sklearn.datasets"), ("matplotlib", "matplotlib.figure"))


def _number(kind: Callable[[str], Any], low: float, high: float, words: str) -> Callable[[str], Any]:
    def parse(text: str) -> Any:
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if not low <= value <= high:
            raise argparse.ArgumentTypeError(f"{text!r} is not {words}")
        return value

    return parse


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the demo's options to a parser."""
    training = IMAGES - HELD_OUT
    natural = _number(int, 1, math.inf, "a whole number from 1 on")
    batch = _number(int, 2, training, f"a whole number from 2 to {training}, the training images")
    size = _number(int, 8, 64, "a whole number from 8 to 64")
    seed = _number(int, 0, 2**32 - 1, "a whole number from 0 to 2^32 - 1")
    percentage = _number(float, 0, 100, "a percentage from 0 to 100")
    default = Options()
    yes_or_no = argparse.BooleanOptionalAction

    def add(name: str, about: str, **how: Any) -> None:
        parser.add_argument(name, help=about, **how)

    def number(name: str, kind: Callable[[str], Any], value: Any, about: str, metavar: str = "N") -> None:
        add(name, f"{about} (default: %(default)s)", type=kind, default=value, metavar=metavar)

    number("--epochs", natural, default.epochs, "times through the training images")
    number("--batch-size", batch, default.batch_size, "images a step")
    number("--image-size", size, default.image_size, "pixels a side that the images are enlarged to")
    number("--seed", seed, default.seed, "of weights, held-out images and batches")
    about = "of FusedSE and FusedSETail (default: $SENET_FUSED_BACKEND, else auto)"
    add("--backend", about, choices=select.BACKEND_CHOICES)
    add("--fuse-tail", "let FusedSE do each block's '+ shortcut' and ReLU too", action="store_true")
    about = "also train the tutorial network after fuse(network, tails=True), which runs FusedSETail's operator"
    add("--tails", about, action=yes_or_no, default=default.tails)
    add("--channels-last", "memory layout of the networks", action=yes_or_no, default=default.channels_last)
    about = "also train the tutorial network on pixels one ulp off, to show which distance is normal"
    add("--nudged", about, action=yes_or_no, default=default.nudged)
    about = "of the held-out images that each network must get right"
    number("--min-accuracy", percentage, default.min_accuracy, about, "PERCENT")
    add("--threads", "CPU threads (default: PyTorch's choice)", type=natural, metavar="N")
    number("--out", Path, Path("senet_fused_demo.png"), "the picture", "FILE")
    add("--json", "also write every figure as JSON", type=Path, metavar="FILE")


def run(args: argparse.Namespace) -> int:
    """Runs the demo. Returns 0; 1 if something was not shown (stderr says what); 2 if it cannot start."""
    start = time.perf_counter()
    options = Options(**{field.name: getattr(args, field.name) for field in fields(Options)})
    threads = torch.get_num_threads()
    try:
        _check_request(args)
    except (ImportError, OSError, ValueError, senet_fused.BackendUnavailableError) as error:
        return _complain(2, str(error))
    try:
        torch.set_num_threads(args.threads or threads)
        steps = options.epochs * ((IMAGES - HELD_OUT) // options.batch_size)
        with _Progress(steps) as progress:
            report = compare(options, progress.advance, progress.say)
    except (DemoFailure, FloatingPointError) as error:
        return _complain(1, f"FAILED: {error}")
    finally:
        torch.set_num_threads(threads)
    report["total_s"] = time.perf_counter() - start
    print(_text(report))
    try:
        picture.draw(report, args.out)
        if args.json:
            args.json.write_text(json.dumps(report, indent=1) + "\n")
    except OSError as error:
        report["problems"].append(str(error))
    else:
        written = f"{args.out} and {args.json}" if args.json else args.out
        print(f"Written: {written}. {report['total_s']:.0f} s in all.")
    for problem in report["problems"]:
        _complain(1, f"FAILED: {problem}")
    return 1 if report["problems"] else 0


def _complain(status: int, text: str) -> int:
    print(f"senet-fused demo: {text}", file=sys.stderr)
    return status


def _check_request(args: argparse.Namespace) -> None:
    """Raises for whatever can be refused before the first step."""
    missing = []
    for name, module in NEEDED:
        try:
            importlib.import_module(module)
        except ImportError as error:
            missing.append(f"{name} cannot be imported ({error})")
    if missing:
        raise ImportError(f"{'; '.join(missing)}. What the demo needs comes with {EXTRA}")
    picture.check_format(args.out)
    for path in (args.out, args.json):
        if path is None:
            continue
        folder = path.resolve().parent
        if path.is_dir():
            raise OSError(f"{path} is a folder; name a file")
        if not folder.is_dir() or not os.access(folder, os.W_OK):
            raise OSError(f"{path} cannot be written: {folder} is no folder, or not yours to write to")
    senet_fused.explain(torch.empty(1, 1, 1, 1), backend=args.backend)


def _text(report: dict[str, Any]) -> str:
    keys = list(report["accuracy"])

    def row(title: str, cells: dict[str, str]) -> str:
        return f"{title:<22}{''.join(f'{cells.get(key, str()):>21}' for key in keys)}".rstrip()

    def times(title: str, entry: dict[str, Any]) -> list[str]:
        cells = {key: f"{entry[key] * 1e3:.2f} ms" for key in keys if key in entry}
        for key in [key for key in cells if key != "stock"]:
            cells[key] += f" {entry['stock'] / entry[key]:5.2f}x"
        lines = [row(title, cells)]
        if "quartiles" in entry:
            ends = {key: [f"{t * 1e3:.2f}" for t in pair] for key, pair in entry["quartiles"].items()}
            lines.append(row("  quartiles", {key: " .. ".join(pair) for key, pair in ends.items()}))
        return lines

    def apart_by(key: str) -> str:
        apart = report["distance"][key]
        return f"at most {apart['largest']:.2g} (step {apart['step']}), {apart['mean']:.2g} on average"

    lines = [
        "",
        row("", NAMES),
        row("held-out accuracy", {key: f"{share:.2%}" for key, share in report["accuracy"].items()}),
        *times("training step", report["step_s"]),
    ]
    for title, total, layers in (
        (report["timed_layer"], report["se_s"], report["se_layers"]),
        ("block tails", report["tail_s"], report["tail_layers"]),
    ):
        lines += times(title, total)
        for layer in layers:
            lines += times("  " + " x ".join(map(str, layer["shape"])), layer)
    threads = report["environment"]["threads"]
    lines += [
        f"Medians, interleaved, {threads} CPU thread{'s' * (threads > 1)}. {report['timed_layer']}: "
        "forward and backward alone, on one batch's activations; block tails: the same, from BatchNorm to ReLU.",
        "",
        *(f"Distance of the loss curves, {NAMES[key]}: {apart_by(key)}." for key in keys[1:]),
    ]
    if "nudged" in report["distance"]:
        lines.append(f"For scale, the tutorial network from itself with every pixel one ulp off: {apart_by('nudged')}.")
    for title, layers in (("SE layer", report["se_layers"]), ("tail", report["tail_layers"])):
        errors = {key: max(layer["error"][key] for layer in layers) for key in layers[0]["error"]}
        words = ", ".join(f"{NAMES[key]} {error:.1e}" for key, error in errors.items())
        lines.append(f"One {title}'s output and gradients, at most off float64 in relative norm: {words}.")
    for key in keys[1:]:
        counts = counts_of(report["call_counts"], key)
        calls = ", ".join(f"{name} {count} times" for name, count in counts.items())
        lines.append(f"{NAMES[key]} was served by the {report['backend']} backend: {calls}.")
    return "\n".join(lines)


class _Progress:
    """A bar on a terminal, where rich is there to draw it; elsewhere plain lines."""

    def __init__(self, total: int) -> None:
        self._total = total
        self._bar: Any = None

    def __enter__(self) -> _Progress:
        if not sys.stdout.isatty():
            return self
        try:
            from rich import progress
        except ImportError:
            return self
        columns = (
            progress.MofNCompleteColumn(),
            progress.TextColumn("steps"),
            progress.BarColumn(),
            progress.TimeRemainingColumn(),
            progress.TextColumn("{task.description}"),
        )
        self._bar = progress.Progress(*columns, transient=True, refresh_per_second=4)
        self._bar.start()
        self._task = self._bar.add_task("", total=self._total)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()

    def advance(self, text: str) -> None:
        if self._bar is not None:
            self._bar.update(self._task, advance=1, description=text)

    def say(self, line: str) -> None:
        if self._bar is not None:
            self._bar.console.print(line, highlight=False, markup=False, soft_wrap=True)
        else:
            print(line, flush=True)
