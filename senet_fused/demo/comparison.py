"""The demo's comparison: one SE-ResNet, trained with the tutorial SE layer, FusedSE and FusedSETail, and timed."""

from __future__ import annotations

import math
import platform
import statistics
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

import senet_fused
from senet_fused import machine
from senet_fused.handwritten_digits import load_images

from .network import SeparateTail, SEResNet, TutorialSE
from .side_by_side import Contender, accuracy, time_layers, train

__all__ = [
    "NAMES",
    "DemoFailure",
    "Options",
    "check_same_weights",
    "compare",
    "counts_of",
    "nudge",
]

NAMES = {
    "stock": "tutorial SE",
    "fused": "FusedSE",
    "tails": "FusedSETail",
    "nudged": "tutorial SE on nudged pixels",
}
LAYER_ROUNDS = 100
# Of the first loss, and of a layer's output and gradients in relative norm: float32 sums in another order.
LARGEST_ERROR = 1e-4
# Where a ReLU follows, single elements within rounding of zero may flip, and their gradients with them.
LARGEST_TAIL_ERROR = 2e-3


class DemoFailure(Exception):
    """The networks cannot be compared; the message says why."""


@dataclass(frozen=True)
class Options:
    """What to train, and how; see ``senet-fused demo --help``."""

    epochs: int = 10
    batch_size: int = 64
    image_size: int = 24
    seed: int = 0
    backend: str | None = None
    fuse_tail: bool = False
    tails: bool = True
    channels_last: bool = True
    nudged: bool = True
    min_accuracy: float = 97.0


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
    contenders = _contenders(options, images, choice.backend)
    compared = {key: contender for key, contender in contenders.items() if key != "nudged"}
    stock = contenders["stock"]
    network = f"SE-ResNet-{stock.network.depth()}"
    batches = len(targets) // options.batch_size
    title = (
        f"{len(targets)} handwritten digits of {options.image_size} x {options.image_size}, "
        f"{len(held_targets)} held out; {options.epochs} epoch{'s' * (options.epochs > 1)} "
        f"of {batches} batches of {options.batch_size}"
    )
    say(f"{network} on {title}")
    say(f"Backend of FusedSE{' and FusedSETail' * options.tails}: {choice.backend} ({choice.reason})")
    for contender in compared.values():
        tensors = check_same_weights(stock.network, contender.network)
    say(f"Initial weights: all {tensors} parameters and buffers are equal")

    before = senet_fused.call_counts()
    shares: dict[str, float] = {}
    for done in train(list(contenders.values()), targets, options.epochs, options.batch_size, options.seed):
        for contender in compared.values():
            if not abs(stock.losses[0] - contender.losses[0]) <= LARGEST_ERROR * stock.losses[0]:
                raise DemoFailure(
                    f"equal weights and batch, but losses of {stock.losses[0]} and {contender.losses[0]} "
                    f"({contender.name})"
                )
        advance("loss " + ", ".join(f"{c.losses[-1]:.4f}" for c in compared.values()))
        if done % batches == 0:
            shares = {key: accuracy(c.network, held_images, held_targets) for key, c in compared.items()}
            means = _listed(f"{statistics.fmean(c.losses[-batches:]):.4f}" for c in compared.values())
            percentages = _listed(f"{share:.2%}" for share in shares.values())
            say(f"epoch {done // batches}: mean loss {means}, held-out accuracy {percentages}")
    counts = {name: count - before.get(name, 0) for name, count in senet_fused.call_counts().items()}
    counts = {name: count for name, count in sorted(counts.items()) if count}

    some = images[: options.batch_size]
    report = {
        "network": network,
        "title": title,
        "names": {key: NAMES[key] for key in contenders},
        "backend": choice.backend,
        "backend_reason": choice.reason,
        "call_counts": counts,
        "accuracy": shares,
        "loss": {key: c.losses for key, c in contenders.items()},
        "distance": {key: _distance(stock.losses, c.losses) for key, c in contenders.items() if c is not stock},
        "step_s": _times({key: c.step_s for key, c in compared.items()}),
        **_time_layers(options, {key: c.network for key, c in compared.items()}, some, choice.backend),
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
    steps = options.epochs * batches
    training_calls = {"fused": steps * len(stock.network.se_layers())}
    if options.tails:
        in_blocks = (module for block in stock.network.blocks() for module in block.modules())
        training_calls["tails"] = steps * sum(isinstance(module, nn.BatchNorm2d) for module in in_blocks)
    return {**report, "problems": _problems(report, options, training_calls)}


def _listed(words: Iterable[str]) -> str:
    *most, last = words
    return f"{', '.join(most)} and {last}"


def _contenders(options: Options, images: Tensor, backend: str) -> dict[str, Contender]:
    """The networks by their keys. backend: of the tails, as "auto" calls the modules where it finds no kernels."""

    def fused_se(channels: int) -> nn.Module:
        post_act = "relu" if options.fuse_tail else None
        return senet_fused.FusedSE(channels, post_act=post_act, backend=options.backend)

    def contender(key: str, make_se: Callable[[int], nn.Module], images: Tensor) -> Contender:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(options.seed)
            network = SEResNet(make_se)
        layout = torch.channels_last if options.channels_last else torch.contiguous_format
        return Contender(NAMES[key], network.to(memory_format=layout), images)

    made = {"stock": contender("stock", TutorialSE, images), "fused": contender("fused", fused_se, images)}
    if options.tails:
        made["tails"] = contender("tails", TutorialSE, images)
        senet_fused.fuse(made["tails"].network, backend=backend, tails=True)
    if options.nudged:
        made["nudged"] = contender("nudged", TutorialSE, nudge(images, options.seed))
    return made


def _time_layers(options: Options, networks: dict[str, SEResNet], images: Tensor, backend: str) -> dict[str, Any]:
    """What the SE layers and the tails of the blocks take on a batch's activations, in all and by layer.

    Gives all networks the stock one's weights, so that they compute the same.
    """
    stock = networks["stock"]
    for network in networks.values():
        for source, target in zip(stock.state_dict().values(), network.state_dict().values(), strict=True):
            target.copy_(source)
    stock.eval()
    tail_inputs = stock.tail_inputs(images)
    with torch.no_grad():
        se_inputs = [(block.bn3(x), shortcut) for block, (x, shortcut) in zip(stock.blocks(), tail_inputs, strict=True)]

    def separate(network: SEResNet) -> list[nn.Module]:
        return [SeparateTail(block.bn3, block.se_module, block.relu) for block in network.blocks()]

    first, second = stock.se_layers(), networks["fused"].se_layers()
    if options.fuse_tail:
        first = [SeparateTail(nn.Identity(), block.se_module, block.relu) for block in stock.blocks()]
    else:
        se_inputs = [(x,) for x, _ in se_inputs]
    se_s, se_layers = _times_of_chains({"stock": first, "fused": second}, se_inputs)

    chains = {"stock": separate(stock), "fused": separate(networks["fused"])}
    if "tails" in networks:
        chains["tails"] = [
            senet_fused.FusedSETail(block.bn3, block.se_module, block.relu, backend=backend)
            for block in networks["tails"].blocks()
        ]
    for chain in chains.values():
        for tail in chain:
            tail.train()
    tail_s, tail_layers = _times_of_chains(chains, tail_inputs)
    return {
        "timed_layer": "SE + shortcut + ReLU" if options.fuse_tail else "SE layers",
        "se_s": se_s,
        "se_layers": se_layers,
        "tail_s": tail_s,
        "tail_layers": tail_layers,
    }


def _times_of_chains(
    chains: dict[str, list[nn.Module]], inputs: list[tuple[Tensor, ...]]
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    pass_s, layers = time_layers(list(chains.values()), inputs, LAYER_ROUNDS)
    return _times(dict(zip(chains, pass_s, strict=True))), [
        {
            "shape": list(layer.shape),
            **dict(zip(chains, layer.seconds, strict=True)),
            "error": dict(zip(chains, layer.errors, strict=True)),
        }
        for layer in layers
    ]


def _distance(first: list[float], second: list[float]) -> dict[str, Any]:
    """Of two loss curves: the largest, the step where it is reached (the first is 1), and the mean."""
    apart = [abs(a - b) for a, b in zip(first, second, strict=True)]
    return {"largest": max(apart), "step": apart.index(max(apart)) + 1, "mean": statistics.fmean(apart)}


def _times(seconds: dict[str, list[float]]) -> dict[str, Any]:
    """Medians in seconds, the stock one's share of each other, and the quartiles."""
    medians = {key: statistics.median(values) for key, values in seconds.items()}
    return {
        **medians,
        "ratio": {key: medians["stock"] / median for key, median in medians.items() if key != "stock"},
        "quartiles": {key: _quartiles(values) for key, values in seconds.items()},
    }


def _quartiles(values: list[float]) -> list[float]:
    low, _, high = statistics.quantiles(values, n=4, method="inclusive") if len(values) > 1 else values * 3
    return [low, high]


def _problems(report: dict[str, Any], options: Options, training_calls: dict[str, int]) -> list[str]:
    """What was not shown; training_calls is how often training calls FusedSE layers and tails."""
    problems = []
    for key, calls in training_calls.items():
        backend, prefix = report["backend"], "" if key == "fused" else "tail_"
        # The reference's backward is PyTorch's own and is not counted.
        directions = ("forward",) if backend == "reference" else ("forward", "backward")
        counts = counts_of(report["call_counts"], key)
        others = sorted({name.partition(".")[0] for name in counts} - {backend})
        if others:
            problems.append(f"backend {backend} was to serve {NAMES[key]}, but {' and '.join(others)} ran: {counts}")
        for direction in directions:
            name = f"{backend}.{prefix}{direction}"
            if counts.get(name, 0) < calls:
                problems.append(f"training calls {name} {calls} times, {counts.get(name, 0)} were counted")
    se_tolerance = LARGEST_TAIL_ERROR if options.fuse_tail else LARGEST_ERROR
    for what, tolerance in (("se_layers", se_tolerance), ("tail_layers", LARGEST_TAIL_ERROR)):
        for layer in report[what]:
            errors = layer["error"]
            for key in sorted(errors.keys() - {"stock"}):
                # Where PyTorch's own float32 is further off (its BatchNorm before a ReLU), that is the scale.
                if not errors[key] <= max(tolerance, 2 * errors["stock"]):
                    part = "an SE layer" if what == "se_layers" else "a tail"
                    problems.append(
                        f"{NAMES[key]}, {part} on {layer['shape']}: {errors[key]:.1e} off the tutorial network's in "
                        f"float64, which is itself {errors['stock']:.1e} off in float32"
                    )
    for key, share in report["accuracy"].items():
        if not 100 * share >= options.min_accuracy:
            problems.append(f"{NAMES[key]}: accuracy {share:.2%}, wanted {options.min_accuracy:g} % or more")
    return problems


def counts_of(counts: dict[str, int], key: str) -> dict[str, int]:
    """Of call counts, those of FusedSE layers ("fused") or of block tails ("tails")."""
    return {name: count for name, count in counts.items() if (".tail_" in name) == (key == "tails")}
