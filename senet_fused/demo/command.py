"""``senet-fused demo``: one SE-ResNet on real images, in PyTorch's own operators, with FusedSE, and with FusedSETail.

The images are the handwritten digits that come with scikit-learn, enlarged bilinearly. All networks start from the same
weights and see the same batches, so they should learn the same; one more run, the first network with every
pixel moved by one unit in the last place, shows how far rounding alone drives two such runs apart.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import senet_fused
from senet_fused import select
from senet_fused.arguments import RequestError, between, positive, require_writable
from senet_fused.bench import report as bench
from senet_fused.bench.runner import computing
from senet_fused.bench.tables import Table, ratio_label, show, time_label
from senet_fused.handwritten_digits import HELD_OUT, IMAGES

from .comparison import NAMES, DemoFailure, compare, counts_of

__all__ = ["add_arguments", "run"]

PICTURES = (".png", ".svg", ".pdf")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the demo's options to a parser."""
    parser.epilog = (
        "exit status: 0 all networks learned and computed the same, 1 one did not (standard error says what), "
        "2 the request cannot be met"
    )
    yes_or_no = argparse.BooleanOptionalAction

    def number(name: str, kind: Callable[[str], Any], value: Any, about: str, metavar: str = "N") -> None:
        parser.add_argument(name, type=kind, default=value, metavar=metavar, help=f"{about} (default: {value})")

    number("--epochs", positive(int), 10, "passes over the training images")
    number("--batch-size", between(int, 2, IMAGES - HELD_OUT), 64, "images in a step")
    number("--image-size", between(int, 8, 64), 24, "pixels a side that the images are enlarged to")
    number("--seed", between(int, 0, 2**32 - 1), 0, "seed of weights, held-out images and batches")
    number("--min-accuracy", between(float, 0, 100), 97.0, "of held-out images that must be right", "PERCENT")
    about = "of FusedSE and FusedSETail (default: $SENET_FUSED_BACKEND, else auto)"
    parser.add_argument("--backend", choices=select.BACKEND_CHOICES, help=about)
    about = "also train the network with FusedSETail: BatchNorm -> SE -> + shortcut -> ReLU as one operator"
    parser.add_argument("--tails", action=yes_or_no, default=True, help=about)
    about = "also train PyTorch's network on pixels one ulp off, to show which distance is normal"
    parser.add_argument("--nudged", action=yes_or_no, default=True, help=about)
    parser.add_argument("--threads", type=positive(int), metavar="N", help="CPU threads (default: PyTorch's choice)")
    number("--out", Path, Path("senet_fused_demo.png"), "the picture", "FILE")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write every figure as JSON")


def run(args: argparse.Namespace) -> int:
    """Runs the demo. Returns 0, or 1 if something is wrong (standard error says what).

    Raises:
        RequestError: the request cannot be met; nothing has been trained.
    """
    start = time.perf_counter()
    _check_request(args)
    try:
        with computing(args.threads):
            report = compare(args)
    except (DemoFailure, FloatingPointError) as error:
        return _failed([str(error)])
    _print(report)
    from .picture import draw

    draw(report, args.out)
    if args.json:
        args.json.write_text(json.dumps(report, indent=1) + "\n")
    print(f"Written: {args.out}{f' and {args.json}' if args.json else ''}. {time.perf_counter() - start:.0f} s in all.")
    return _failed(report["problems"])


def _failed(problems: list[str]) -> int:
    for problem in problems:
        print(f"senet-fused demo: FAILED: {problem}", file=sys.stderr)
    return 1 if problems else 0


def _check_request(args: argparse.Namespace) -> None:
    """Raises RequestError for whatever can be refused before the first step."""
    try:
        import matplotlib.figure  # noqa: F401
        import sklearn.datasets  # noqa: F401

        senet_fused.explain(torch.empty(1, 1, 1, 1), backend=args.backend)
    except ImportError as error:
        raise RequestError(f'{error}; what the demo needs comes with pip install "senet_fused[demo]"') from None
    except senet_fused.BackendUnavailableError as error:
        raise RequestError(str(error)) from None
    if args.out.suffix.lower() not in PICTURES:
        raise RequestError(f"--out {args.out}: unknown kind of picture; end it in {', '.join(PICTURES)}")
    for path in filter(None, (args.out, args.json)):
        require_writable(path)


def _print(report: dict[str, Any]) -> None:
    keys, backend, threads = list(report["accuracy"]), report["backend"], report["environment"]["threads"]
    bench.render({}, report["layers"], bench.summarise(report["layers"]), sys.stdout)

    def timed(times: dict[str, float], key: str) -> str:
        compared = key != "stock" and {"stock", key} <= set(times)
        return time_label(times.get(key)) + (f" ({ratio_label(times['stock'] / times[key])}x)" if compared else "")

    rows = [
        {
            "variant": NAMES[key],
            "accuracy": f"{report['accuracy'][key]:.2%}",
            **{part: timed(times, key) for part, times in report["median_s"].items()},
        }
        for key in keys
    ]
    cpu = f"{threads} CPU thread{'s' * (threads > 1)}"
    notes = [f"Medians on {cpu}, the variants in turns; of layers: forward and backward, the sum over all blocks."]
    show([Table(report["title"], rows, notes)], sys.stdout)
    print()
    for key in [*keys[1:], *(["nudged"] if "nudged" in report["distance"] else [])]:
        apart = report["distance"][key]
        print(
            f"Distance of the loss curves of {NAMES['stock']} and {NAMES[key]}: at most {apart['largest']:.2g} "
            f"(step {apart['step']}), {apart['mean']:.2g} on average."
        )
    for key in keys[1:]:
        counts = ", ".join(f"{name} {count} times" for name, count in counts_of(report["call_counts"], key).items())
        print(f"{NAMES[key]} ran on the {backend} backend: {counts}.")
