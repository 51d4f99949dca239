"""The demo's comparison: one SE-ResNet, trained in PyTorch's own operators, with FusedSE and FusedSETail, and timed."""

from __future__ import annotations

import argparse
import dataclasses
import statistics
from collections import Counter
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

import senet_fused
from senet_fused.bench import header, runner
from senet_fused.bench.problems import OPS, Case, Shape
from senet_fused.bench.progress import open_progress
from senet_fused.bench.report import op_of, shape_label
from senet_fused.bench.timing import Settings, Statistics
from senet_fused.handwritten_digits import load_images
from senet_fused.models import SENet, bottleneck

from .training import Contender, accuracy, nudge, train

__all__ = ["NAMES", "DemoFailure", "check_same_weights", "compare", "contenders", "counts_of", "layer_cases"]

NAMES = {"stock": "PyTorch", "fused": "FusedSE", "tails": "FusedSETail", "nudged": "PyTorch, pixels one ulp off"}
# A bottleneck SE-ResNet (Hu et al. 2018) in small: planes of the first stage, and blocks in each.
PLANES, BLOCKS = 16, (1, 1, 2)
EXPANSION, REDUCTION = 4, 16
DEPTH = 2 + 3 * sum(BLOCKS)  # convolutions and linear layers on the longest path, by which ResNets are named
# What is timed beside a training step, by its name in bench: a name, and which network has it fused.
PARTS = {"se": ("SE layers", "fused"), "tail": ("BatchNorm to ReLU", "tails")}
# Of the first loss: float32 sums in another order.
LARGEST_DIFFERENCE = 1e-4
LAYER_SETTINGS = Settings(budget_s=1.0)


class DemoFailure(Exception):
    """The networks cannot be compared; the message says why."""


def make_network(se: str, seed: int, backend: str | None = None) -> SENet:
    """The network for images [N, 1, H, W], with logits [N, 10]; se and backend as :class:`senet_fused.models.SENet`'s.

    The random state of the process is left as it was.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        sizes = {"planes": PLANES, "expansion": EXPANSION, "reduction": REDUCTION, "in_chans": 1, "num_classes": 10}
        network = SENet(bottleneck, BLOCKS, stem="small", stem_channels=PLANES, se=se, backend=backend, **sizes)
    return network.to(memory_format=torch.channels_last)


def check_same_weights(first: nn.Module, second: nn.Module) -> int:
    """How many parameters and buffers there are. Raises DemoFailure unless they are equal one by one."""
    ours, theirs = first.state_dict(), second.state_dict()
    for name in dict.fromkeys([*ours, *theirs]):
        if name not in ours or name not in theirs or not torch.equal(ours[name], theirs[name]):
            raise DemoFailure(f"one seed must give one set of initial weights, but {name} differs")
    return len(ours)


def compare(args: argparse.Namespace) -> dict[str, Any]:
    """Trains, checks and times, and prints what happens; returns every figure, in types that JSON knows.

    What did not turn out as it should is in ``report["problems"]``, in words. The random state of the process is left
    as it was.

    Args:
        args: as parsed by a parser with :func:`senet_fused.demo.command.add_arguments`.

    Raises:
        DemoFailure: the networks do not start alike.
        FloatingPointError: a loss is not finite.
        senet_fused.BackendUnavailableError: the backend asked for cannot run here.
    """
    images, targets, held_images, held_targets = load_images(args.image_size, args.seed)
    backend, reason = senet_fused.explain(images, backend=args.backend)
    networks = contenders(args, images, backend)
    compared = {key: contender for key, contender in networks.items() if key != "nudged"}
    stock = networks["stock"]
    batches = len(targets) // args.batch_size
    title = (
        f"SE-ResNet-{DEPTH} on {len(targets)} handwritten digits of {args.image_size} x {args.image_size}, "
        f"{len(held_targets)} held out; {args.epochs} epoch{'s' * (args.epochs > 1)} "
        f"of {batches} batches of {args.batch_size}"
    )
    print(title)
    for key in compared:
        tensors = check_same_weights(stock.network, networks[key].network)
    names = ", ".join(NAMES[key] for key in compared)
    print(f"Networks: {names}; all {tensors} initial parameters and buffers are equal")
    print(f"Backend of the fused layers: {backend} ({reason})", flush=True)

    before = Counter(senet_fused.call_counts())
    shares: dict[str, float] = {}
    for done in train(list(networks.values()), targets, args.epochs, args.batch_size, args.seed):
        for contender in compared.values():
            if not abs(stock.losses[0] - contender.losses[0]) <= LARGEST_DIFFERENCE * stock.losses[0]:
                raise DemoFailure(
                    f"equal weights and batch, but losses of {stock.losses[0]} and {contender.losses[0]} "
                    f"({contender.name})"
                )
        if done % batches == 0:
            shares = {key: accuracy(c.network, held_images, held_targets) for key, c in compared.items()}
            means = ", ".join(f"{statistics.fmean(c.losses[-batches:]):.4f}" for c in compared.values())
            percentages = ", ".join(f"{share:.2%}" for share in shares.values())
            print(f"epoch {done // batches}: mean loss {means}, held-out accuracy {percentages}", flush=True)
    counts = Counter(senet_fused.call_counts()) - before

    steps = {key: Statistics.of(c.step_s, 1) for key, c in compared.items()}
    cases = [case for op in OPS if op == "se" or args.tails for case in layer_cases(args, op)]
    options = runner.Options(
        providers=("eager", "fused"), backend=backend, caches=("warm",), eager_form="linear", settings=LAYER_SETTINGS
    )
    with torch.random.fork_rng(devices=[]), open_progress(len(cases)) as progress:
        layers = runner.run(cases, options, progress)
    report = {
        "title": title,
        "backend": backend,
        "call_counts": dict(sorted(counts.items())),
        "accuracy": shares,
        "loss": {key: c.losses for key, c in networks.items()},
        "distance": {key: _distance(stock.losses, c.losses) for key, c in networks.items() if c is not stock},
        "steps": {key: dataclasses.asdict(timing) for key, timing in steps.items()},
        "layers": layers,
        "median_s": {"training step": {key: timing.median_s for key, timing in steps.items()}, **_by_part(layers)},
        "options": {name: value if value is None else str(value) for name, value in vars(args).items()},
        "environment": header.stamp("senet-fused demo", [], "cpu", LAYER_SETTINGS),
    }
    calls = {"fused": sum(BLOCKS), "tails": sum(isinstance(m, nn.BatchNorm2d) for m in stock.network.modules())}
    training_calls = {key: args.epochs * batches * calls[key] for key in compared if key in calls}
    return {**report, "problems": _problems(report, args.min_accuracy, training_calls)}


def layer_cases(args: argparse.Namespace, op: str) -> list[Case]:
    """The network's SE layers (op "se"), or its blocks from the last BatchNorm on (op "tail"), for bench to measure."""
    how = {"residual": True, "post_act": "relu"} if op == "tail" else {}
    how |= {"op": op, "layout": "channels_last", "direction": "forward+backward"}
    found, size, channels = [], args.image_size, PLANES * EXPANSION
    for blocks in BLOCKS:
        found.append(Case("demo", args.batch_size, Shape(channels, channels // REDUCTION, (size, size), blocks), **how))
        size, channels = (size + 1) // 2, 2 * channels
    return found


def contenders(args: argparse.Namespace, images: Tensor, backend: str) -> dict[str, Contender]:
    """The networks by their keys. backend: of the tails, as "auto" calls the modules where it finds no kernels."""
    made = {"stock": ("reference", None), "fused": ("fused", args.backend)}
    made |= ({"tails": ("tails", backend)} if args.tails else {}) | ({"nudged": made["stock"]} if args.nudged else {})
    images_of = {"nudged": nudge(images, args.seed)}
    return {
        key: Contender(NAMES[key], make_network(se, args.seed, of_backend), images_of.get(key, images))
        for key, (se, of_backend) in made.items()
    }


def _distance(first: list[float], second: list[float]) -> dict[str, Any]:
    """Of two loss curves: the largest, the step where it is reached (the first is 1), and the mean."""
    apart = [abs(a - b) for a, b in zip(first, second, strict=True)]
    return {"largest": max(apart), "step": apart.index(max(apart)) + 1, "mean": statistics.fmean(apart)}


def _by_part(layers: list[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """Medians in seconds, summed over the layers of the network, by part and key; none where a layer has an error."""
    sums: dict[str, dict[str, float]] = {}
    for op, (part, fused) in PARTS.items():
        for provider, key in (("eager", "stock"), ("fused", fused)):
            members = [row for row in layers if (op_of(row), row["provider"]) == (op, provider)]
            if members and all(row["median_s"] for row in members):
                sums.setdefault(part, {})[key] = sum(row["count"] * row["median_s"] for row in members)
    return sums


def _problems(report: dict[str, Any], min_accuracy: float, training_calls: dict[str, int]) -> list[str]:
    """What is wrong; training_calls is how often training calls FusedSE layers and tails."""
    problems = []
    for key, calls in training_calls.items():
        backend, prefix = report["backend"], "" if key == "fused" else "tail_"
        # The reference's backward is PyTorch's own and is not counted.
        directions = ("forward",) if backend == "reference" else ("forward", "backward")
        counts = counts_of(report["call_counts"], key)
        others = sorted({name.partition(".")[0] for name in counts} - {backend})
        if others:
            problems.append(f"{NAMES[key]} must run on backend {backend}, but {' and '.join(others)} ran: {counts}")
        for direction in directions:
            name = f"{backend}.{prefix}{direction}"
            if counts.get(name, 0) < calls:
                problems.append(f"training calls {name} {calls} times, but {counts.get(name, 0)} calls were counted")
    for row in report["layers"]:
        if row["error"]:
            problems.append(f"{PARTS[op_of(row)][0]}, {shape_label(row)}, {row['provider']}: {row['error']}")
    for key, share in report["accuracy"].items():
        if not 100 * share >= min_accuracy:
            problems.append(f"{NAMES[key]}: accuracy {share:.2%}, must be at least {min_accuracy:g} %")
    return problems


def counts_of(counts: Mapping[str, int], key: str) -> dict[str, int]:
    """Of call counts, those of FusedSE layers ("fused") or of block tails ("tails")."""
    return {name: count for name, count in counts.items() if (".tail_" in name) == (key == "tails")}
