"""What can be measured: the SE layers of known networks (problems.json), the block tails around them, and single
shapes. No torch here."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Iterable, Sequence
from functools import lru_cache
from importlib import resources

from ..arguments import RequestError

__all__ = [
    "ACTS", "DIRECTIONS", "DTYPES", "GATES", "GPU_BACKENDS", "LAYOUTS", "OPS", "POST_ACTS", "TAIL_DIRECTIONS",
    "Case", "Problem", "Shape", "cases", "problem", "problems", "shape_of",
]  # fmt: skip

# The SE layer; the end of a residual block: BatchNorm -> SE -> + residual -> ReLU.
OPS = ("se", "tail")
DTYPES = ("float32", "bfloat16", "float16", "float64")
LAYOUTS = ("contiguous", "channels_last")
DIRECTIONS = ("forward", "backward", "forward+backward")
# BatchNorm normalises by the running statistics in the last, by the batch's in the others.
TAIL_DIRECTIONS = (*DIRECTIONS, "eval-forward")
POST_ACTS = ("none", "relu")
ACTS = ("identity", "relu", "relu6", "leaky_relu", "silu", "gelu", "hardswish", "mish", "tanh", "sigmoid")
GATES = ("sigmoid", "hardsigmoid", "tanh", "relu", "identity")
# The fused layer with each of these is a provider of its own, named after it.
GPU_BACKENDS = ("cuda", "triton")


@dataclasses.dataclass(frozen=True)
class Shape:
    """One SE layer: C channels, R squeezed ones, the spatial sizes, and how often the network has it."""

    channels: int
    rd_channels: int
    spatial: tuple[int, ...]
    count: int = 1


@dataclasses.dataclass(frozen=True)
class Problem:
    """The SE layers of one network; residual says whether the network adds a shortcut right behind them."""

    name: str
    act: str
    gate: str
    residual: bool
    shapes: tuple[Shape, ...]


@dataclasses.dataclass(frozen=True)
class Case:
    """One cell of the measurement: what is computed, on which sizes, dtype, layout, in which direction."""

    problem: str
    batch: int
    shape: Shape
    act: str = "relu"
    gate: str = "sigmoid"
    dtype: str = "float32"
    layout: str = "contiguous"
    direction: str = "forward"
    bias: bool = True
    residual: bool = False
    post_act: str = "none"
    op: str = "se"

    @property
    def size(self) -> tuple[int, ...]:
        """The sizes of x: (N, C, *spatial)."""
        return (self.batch, self.shape.channels, *self.shape.spatial)

    @property
    def label(self) -> str:
        """Short text for tables, e.g. ``8 x 256/16 @ 56x56``: N x C/R @ spatial."""
        spatial = "x".join(map(str, self.shape.spatial))
        return f"{self.batch} x {self.shape.channels}/{self.shape.rd_channels} @ {spatial}"

    @property
    def backward(self) -> bool:
        """Whether there is a backward: alone, or behind its forward."""
        return self.direction in ("backward", "forward+backward")

    @property
    def keeps_graph(self) -> bool:
        """Whether the backward alone is timed, again and again on the graph of one forward."""
        return self.direction == "backward"

    @property
    def training(self) -> bool:
        """Whether a tail's BatchNorm normalises by the statistics of x, and updates the running ones."""
        return self.direction != "eval-forward"

    @property
    def passes(self) -> int:
        """The least tensor-sized reads and writes that this case needs (the byte model).

        Forward: read x, write y, read residual if there is one. Backward: read dy and x, write dx; dresidual
            is dy itself unless post_act masks it, then it is one more write. The small tensors and the ReLU's
            bit mask (1/16 pass or less) are left out.

        A tail in training needs the statistics of the whole batch in the middle of either direction, so it sweeps
        twice over what it reads for them. Forward: x twice, residual, y. Backward: dy and x twice, dx, dresidual.
        """
        if self.op == "tail":
            forward, backward = 4 if self.training else 3, 6
        else:
            forward, backward = 2 + self.residual, 3 + (self.residual and self.post_act == "relu")
        return (not self.keeps_graph) * forward + self.backward * backward


@lru_cache(maxsize=1)
def problems() -> dict[str, Problem]:
    """The shipped problems by name."""
    table = json.loads(resources.files(__package__).joinpath("problems.json").read_text(encoding="utf-8"))
    found = {}
    for name, entry in table.items():
        if isinstance(entry, dict):
            shapes = tuple(Shape(c, r, (h, w), count) for c, r, h, w, count in entry["shapes"])
            found[name] = Problem(name, entry["act"], entry["gate"], entry["residual"], shapes)
    return found


def problem(name: str) -> Problem:
    """The problem of this name. Raises RequestError for an unknown one."""
    try:
        return problems()[name]
    except KeyError:
        raise RequestError(f"unknown problem {name!r}; known: {', '.join(problems())}") from None


def shape_of(text: str) -> tuple[int, Shape]:
    """Reads ``N,C,R,H,W`` (also ``N,C,R,L`` and ``N,C,R,D,H,W``) into (N, Shape). Raises RequestError."""
    try:
        sizes = [int(part) for part in text.split(",")]
    except ValueError:
        sizes = []
    if len(sizes) not in (4, 5, 6) or min(sizes) < 1:
        raise RequestError(
            f"cannot read the shape {text!r}; write N,C,R,H,W (or N,C,R,L, or N,C,R,D,H,W), "
            "each an integer of at least 1, for instance 8,256,16,56,56"
        )
    batch, channels, rd_channels, *spatial = sizes
    return batch, Shape(channels, rd_channels, tuple(spatial))


def cases(
    names: Iterable[str] = (),
    shapes: Iterable[str] = (),
    *,
    batches: Sequence[int] = (8,),
    dtypes: Sequence[str] = ("float32",),
    layouts: Sequence[str] = ("contiguous",),
    directions: Sequence[str] = ("forward",),
    bias: bool = True,
    residual: bool = False,
    post_act: str = "none",
    act: str | None = None,
    gate: str | None = None,
    op: str = "se",
) -> list[Case]:
    """Every combination, ordered so that cases that share an oracle follow each other.

    Args:
        names: problems; their act and gate hold unless act or gate is given.
        shapes: texts for :func:`shape_of`; these bring their own batch size and stand under the problem
            "shape".
        batches: the batch sizes for the problems.
        op: one of OPS. A tail always has the residual and the ReLU behind it.

    Raises:
        RequestError: an unknown name or dtype, a shape that cannot be read, channels_last without a 2-D or 3-D plane
            to lay out, or a tail in training with a single value per channel.
    """
    possible = TAIL_DIRECTIONS if op == "tail" else DIRECTIONS
    choices = {"dtype": (dtypes, DTYPES), "layout": (layouts, LAYOUTS), "direction": (directions, possible)}
    for what, (values, known) in (choices | {"op": ((op,), OPS), "post_act": ((post_act,), POST_ACTS)}).items():
        for value in values:
            if value not in known:
                raise RequestError(f"unknown {what} {value!r}; known: {', '.join(known)}")
    if op == "tail":
        residual, post_act = True, "relu"
    if any(batch < 1 for batch in batches):
        raise RequestError(f"a batch size must be at least 1, got {min(batches)}")

    layers = [
        (name, batch, shape, act or problem(name).act, gate or problem(name).gate)
        for name in dict.fromkeys(names)
        for batch in dict.fromkeys(batches)
        for shape in problem(name).shapes
    ]
    layers += [("shape", *shape_of(text), act or "relu", gate or "sigmoid") for text in dict.fromkeys(shapes)]
    for _, _, shape, _, _ in layers:
        if len(shape.spatial) == 1 and "channels_last" in layouts:
            raise RequestError("channels_last needs two or three spatial dimensions; a 1-D shape is contiguous only")

    found = [
        Case(name, batch, shape, act_, gate_, dtype, layout, direction, bias, residual, post_act, op)
        for dtype in dict.fromkeys(dtypes)
        for name, batch, shape, act_, gate_ in layers
        for direction in dict.fromkeys(directions)
        for layout in dict.fromkeys(layouts)
    ]
    for case in found:
        if op == "tail" and case.training and case.batch * math.prod(case.shape.spatial) == 1:
            raise RequestError(f"{case.label}: BatchNorm in training needs more than one value per channel")
    return found
