"""The demo's comparison: one SE-ResNet, trained with the tutorial SE layer and with FusedSE, and timed."""

from __future__ import annotations

import math
import platform
import statistics
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import senet_fused
from senet_fused import machine

from .network import SeparateTail, SEResNet, TutorialSE, inputs_of
from .side_by_side import Contender, accuracy, time_layers, train

__all__ = [
    "HELD_OUT",
    "IMAGES",
    "NAMES",
    "DemoFailure",
    "Options",
    "check_same_weights",
    "compare",
    "load_images",
    "nudge",
]

NAMES = {"stock": "tutorial SE", "fused": "FusedSE", "nudged": "tutorial SE on nudged pixels"}
IMAGES = 1797
HELD_OUT = 360
SE_ROUNDS = 100
# Of the first loss, and of a layer's output and gradients in relative norm: float32 sums in another order.
LARGEST_ERROR = 1e-4
# Where a ReLU follows, single elements within rounding of zero may flip, and their gradients with them.
LARGEST_TAIL_ERROR = 2e-3


class DemoFailure(Exception):
    """The two networks cannot be compared; the message says why."""


@dataclass(frozen=True)
class Options:
    """What to train, and how; see ``senet-fused demo --help``."""

    epochs: int = 10
    batch_size: int = 64
    image_size: int = 24
    seed: int = 0
    backend: str | None = None
    fuse_tail: bool = False
    channels_last: bool = True
    nudged: bool = True
    min_accuracy: float = 97.0


def load_images(size: int, seed: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Training images [1437, 1, size, size] and their digits [1437], then the 360 held-out ones.

    Float32, scaled so that the training images have mean 0 and standard deviation 1. The seed draws the
    split, which keeps every digit's share.
    """
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    digits = load_digits()
    images, targets = torch.tensor(digits.images, dtype=torch.float32)[:, None], torch.tensor(digits.target)
    images = F.interpolate(images, size=(size, size), mode="bilinear", align_corners=False)
    split = train_test_split(range(IMAGES), test_size=HELD_OUT, random_state=seed, stratify=digits.target)
    kept, held = (torch.tensor(part) for part in split)
    images = (images - images[kept].mean()) / images[kept].std()
    return images[kept], targets[kept], images[held], targets[held]


def nudge(images: Tensor, seed: int) -> Tensor:
    """Every pixel moved to the next representable number, up or down at random."""
    generator = torch.Generator().manual_seed(seed)
    up = torch.randint(0, 2, images.shape, generator=generator).bool()
    return torch.nextafter(images, torch.where(up, math.inf, -math.inf))


def check_same_weights(first: nn.Module, second: nn.Module) -> int:
    """How many parameters and buffers there are. Raises DemoFailure unless they are equal one by one."""
    ours, theirs = list(first.state_dict().items()), list(second.state_dict().items())
    if len(ours) != len(theirs):
        raise DemoFailure(f"the networks have {len(ours)} and {len(theirs)} parameters and buffers")
    for (name, a), (other, b) in zip(ours, theirs, strict=True):
        if a.shape != b.shape or not torch.equal(a, b):
            raise DemoFailure(f"one seed must give one set of initial weights, but {name} and {other} differ")
    return len(ours)


def compare(options: Options, advance: Callable[[str], None], say: Callable[[str], None]) -> dict[str, Any]:
    """Trains, checks and times; returns every figure, in types that JSON knows.

    ``advance(text)`` is called after every step, ``say(line)`` when there is something to read. The random
    state of the process is left as it was. What was not shown is in ``report["problems"]``, in words.

    Raises:
        DemoFailure: the networks do not start alike.
        FloatingPointError: a loss is not finite.
        senet_fused.BackendUnavailableError: the backend asked for cannot serve.
    """
    images, targets, held_images, held_targets = load_images(options.image_size, options.seed)
    choice = senet_fused.explain(images, backend=options.backend)
    contenders = _contenders(options, images)
    stock, fused = contenders["stock"], contenders["fused"]
    network = f"SE-ResNet-{stock.network.depth()}"
    batches = len(targets) // options.batch_size
    title = (
        f"{len(targets)} handwritten digits of {options.image_size} x {options.image_size}, "
        f"{len(held_targets)} held out; {options.epochs} epoch{'s' * (options.epochs > 1)} "
        f"of {batches} batches of {options.batch_size}"
    )
    say(f"{network} on {title}")
    say(f"Backend of FusedSE: {choice.backend} ({choice.reason})")
    tensors = check_same_weights(stock.network, fused.network)
    say(f"Initial weights: all {tensors} parameters and buffers are equal")

    before = senet_fused.call_counts()
    shares: dict[str, float] = {}
    for done in train(list(contenders.values()), targets, options.epochs, options.batch_size, options.seed):
        if not abs(stock.losses[0] - fused.losses[0]) <= LARGEST_ERROR * stock.losses[0]:
            raise DemoFailure(
                f"equal weights and batch, but losses of {stock.losses[0]} and {fused.losses[0]}"
            )
        advance(f"loss {stock.losses[-1]:.4f}, {fused.losses[-1]:.4f}")
        if done % batches == 0:
            pair = {"stock": stock, "fused": fused}
            shares = {key: accuracy(c.network, held_images, held_targets) for key, c in pair.items()}
            means = {key: statistics.fmean(c.losses[-batches:]) for key, c in pair.items()}
            say(
                f"epoch {done // batches}: mean loss {means['stock']:.4f} and {means['fused']:.4f}, "
                f"held-out accuracy {shares['stock']:.2%} and {shares['fused']:.2%}"
            )
    counts = {name: count - before.get(name, 0) for name, count in senet_fused.call_counts().items()}
    counts = {name: count for name, count in sorted(counts.items()) if count}

    pass_s, layers = _time_se(options, stock.network, fused.network, images[: options.batch_size])
    report = {
        "network": network,
        "title": title,
        "names": NAMES,
        "timed_layer": "SE + shortcut + ReLU" if options.fuse_tail else "SE layers",
        "backend": choice.backend,
        "backend_reason": choice.reason,
        "call_counts": counts,
        "accuracy": shares,
        "loss": {key: c.losses for key, c in contenders.items()},
        "distance": {
            key: _distance(stock.losses, c.losses) for key, c in contenders.items() if c is not stock
        },
        "step_s": _times(stock.step_s, fused.step_s),
        "se_s": _times(*pass_s),
        "se_layers": layers,
        "options": asdict(options),
        "environment": {
            "senet_fused": senet_fused.__version__,
            "revision": machine.revision(),
            "torch": torch.__version__,
            "python": platform.python_version(),
            "system": platform.platform(),
            "cpu": machine.cpu_name(),
            "threads": torch.get_num_threads(),
        },
    }
    training_calls = options.epochs * batches * len(stock.network.tails())
    return {**report, "problems": _problems(report, options, training_calls)}


def _contenders(options: Options, images: Tensor) -> dict[str, Contender]:
    def stock_tail(channels: int) -> nn.Module:
        return SeparateTail(TutorialSE(channels))

    def fused_tail(channels: int) -> nn.Module:
        if options.fuse_tail:
            return senet_fused.FusedSE(channels, post_act="relu", backend=options.backend)
        return SeparateTail(senet_fused.FusedSE(channels, backend=options.backend))

    def contender(key: str, make_tail: Callable[[int], nn.Module], images: Tensor) -> Contender:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(options.seed)
            network = SEResNet(make_tail)
        layout = torch.channels_last if options.channels_last else torch.contiguous_format
        return Contender(NAMES[key], network.to(memory_format=layout), images)

    made = {"stock": contender("stock", stock_tail, images), "fused": contender("fused", fused_tail, images)}
    if options.nudged:
        made["nudged"] = contender("nudged", stock_tail, nudge(images, options.seed))
    return made


def _time_se(
    options: Options, stock: SEResNet, fused: SEResNet, images: Tensor
) -> tuple[tuple[list[float], list[float]], list[dict[str, Any]]]:
    """Seconds of each pass through the stock and the fused SE layers on a batch's activations, and by layer.

    Gives the fused layers the stock layers' weights, so that both compute the same.
    """
    first, second = (n.tails() if options.fuse_tail else n.se_layers() for n in (stock, fused))
    stock.eval()
    with torch.no_grad():
        for a, b in zip(first, second, strict=True):
            for source, target in zip(a.parameters(), b.parameters(), strict=True):
                target.copy_(source)
        inputs = inputs_of(first, stock, images)
    *pass_s, layers = time_layers(first, second, inputs, SE_ROUNDS)
    return tuple(pass_s), [
        {"shape": list(t.shape), "stock": t.first_s, "fused": t.second_s, "error": t.error} for t in layers
    ]


def _distance(first: list[float], second: list[float]) -> dict[str, Any]:
    """Of two loss curves: the largest, the step where it is reached (the first is 1), and the mean."""
    apart = [abs(a - b) for a, b in zip(first, second, strict=True)]
    return {"largest": max(apart), "step": apart.index(max(apart)) + 1, "mean": statistics.fmean(apart)}


def _times(stock: list[float], fused: list[float]) -> dict[str, Any]:
    """Medians in seconds, stock / fused, and the quartiles."""
    medians = statistics.median(stock), statistics.median(fused)
    return {
        "stock": medians[0],
        "fused": medians[1],
        "ratio": medians[0] / medians[1],
        "stock_quartiles": _quartiles(stock),
        "fused_quartiles": _quartiles(fused),
    }


def _quartiles(values: list[float]) -> list[float]:
    low, _, high = statistics.quantiles(values, n=4, method="inclusive") if len(values) > 1 else values * 3
    return [low, high]


def _problems(report: dict[str, Any], options: Options, training_calls: int) -> list[str]:
    """What was not shown; training_calls is how often training calls a FusedSE."""
    problems = []
    backend, counts = report["backend"], report["call_counts"]
    others = sorted({name.partition(".")[0] for name in counts} - {backend})
    if others:
        problems.append(f"backend {backend} was to serve FusedSE, but {' and '.join(others)} ran: {counts}")
    # The reference's backward is PyTorch's own and is not counted.
    for direction in ("forward",) if backend == "reference" else ("forward", "backward"):
        name = f"{backend}.{direction}"
        if counts.get(name, 0) < training_calls:
            problems.append(
                f"training calls {name} {training_calls} times, {counts.get(name, 0)} were counted"
            )
    tolerance = LARGEST_TAIL_ERROR if options.fuse_tail else LARGEST_ERROR
    for layer in report["se_layers"]:
        if not layer["error"] <= tolerance:
            problems.append(f"FusedSE on {layer['shape']} is {layer['error']:.1e} off the tutorial layer")
    for key, share in report["accuracy"].items():
        if not 100 * share >= options.min_accuracy:
            problems.append(f"{NAMES[key]}: accuracy {share:.2%}, wanted {options.min_accuracy:g} % or more")
    return problems
