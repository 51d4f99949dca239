"""What to launch on a GPU: a pure function of a layer's sizes and a device's facts. No triton, no torch.

A tile is (some samples, a block of channels, a split of the positions). There are three strategies for what happens
between the two sweeps over the tensor, forward and backward alike (forward's words here):

* ``partials``: each tile of the first launch pushes its share of w1 @ pooled to a workspace [N, tiles, R]; each tile
  of the second sums the shares, applies bias and act, and takes its own rows of w2. Two launches.
* ``last_block``: as above, but the last tile of a group of samples to finish the first launch sums the shares, once.
  Two launches. For late layers, where the shares outweigh the tensor.
* ``launches``: the first launch only sums x; two small launches between the sweeps do the excitation for 16 samples
  at a time. For tiles of one sample in late or wide layers, and for every squeeze that is not a plain sum.

Block tails (``senet_fused.tails``) have a launch between the sweeps in any case, for what needs all samples: forward,
the statistics of the batch and a block of channels' share of w1 @ pooled; backward, dpooled, the gradients of the
weights and the sums over the samples. So theirs are three launches, and four by ``launches``, which then means the same
as above; the other strategies say who sums the shares.

Which one is decided by counting bytes. Nothing here depends on the batch size, so a sample's result does not depend on
the batch that it is in: costs are counted for a batch of :data:`NOMINAL_BATCH`.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Iterator
from functools import lru_cache

__all__ = [
    "FORMS", "NORMS", "STRATEGIES", "DeviceFacts", "Plan", "Problem", "Tile", "allows", "candidates", "cost",
    "count_bytes", "plan",
]  # fmt: skip

STRATEGIES = ("partials", "last_block", "launches")
FORMS = ("channels_last", "planes", "rows")
NORMS = ("", "batch", "given")

NOMINAL_BATCH = 64
# A tile reads about this much of the tensor: on an H200 that makes four tiles per multiprocessor of SENet-154's
# second stage at batch 64, and the weights that each tile re-reads stay few beside it.
TILE_BYTES = 96 * 1024
# Several independent 16-byte loads per thread hide the latency of device memory.
LOADS_IN_FLIGHT = 4
# What a dependent launch, or waiting for a last block, costs: about 1 us, in which an H200 moves this much.
LAUNCH_BYTES = 4 * 2**20
# The excitation's own launches: samples, channels and squeezed channels per program.
EXCITE_SAMPLES, EXCITE_CHANNELS, EXCITE_REDUCED = 16, 64, 32
# One program of "launches" makes the share of this many channels of the first product, in steps of so many.
EXCITE_SPLIT, EXCITE_STEP = 128, 32
# Channels of one program of the launch between a tail's sweeps, forward. More would leave an H200 idle in early layers,
# fewer would make more shares.
TAIL_CHANNELS = 32
# A tile of the weight gradients, which one program sums over all samples. Larger ones take the registers of the sweep
# that they share a kernel with.
WEIGHT_CHANNELS, WEIGHT_REDUCED = 32, 32
MAX_ROW_POSITIONS = 1024  # the "rows" form is compiled for each plane size, so only for small planes
TILES_PER_SM = 2
# Weights, shares and vectors are small and read again and again: they come from the L2, which moves them at least
# twice as fast as device memory does.
L2_SPEED = 2


@dataclasses.dataclass(frozen=True)
class DeviceFacts:
    """What a plan wants to know of a GPU.

    vendor: "cuda" or "hip". arch: the compute capability as 80, 90, ..., or AMD's name ("gfx942"). sms:
    multiprocessors or compute units. warp_size: 32, or 64 on AMD's data-centre GPUs.
    """

    vendor: str
    arch: int | str
    sms: int
    warp_size: int = 32

    @property
    def dependent_launch(self) -> bool:
        """Whether a launch may begin while the one before it ends (programmatic dependent launch)."""
        return self.vendor == "cuda" and int(self.arch) >= 90

    @property
    def matrix_units(self) -> bool:
        """Whether 16-bit products with float32 sums have hardware of their own."""
        return self.vendor == "hip" or int(self.arch) >= 80


@dataclasses.dataclass(frozen=True)
class Problem:
    """One direction of one SE layer, or of one block tail.

    positions: M, the product of the spatial sizes. element_size, weight_size: bytes of an element of x and of a
    weight. relu: behind the layer, with a bit mask that is written forward and read backward. residual: read forward,
    its gradient written backward (only behind a ReLU: otherwise it is dy itself). norm: "" for an SE layer; for a tail
    "batch" (the statistics are those of x) or "given". reduced: 0 for a tail without a gate.
    """

    channels: int
    reduced: int
    positions: int
    element_size: int = 2
    weight_size: int = 2
    channels_last: bool = True
    squeeze: str = "avg"
    relu: bool = False
    residual: bool = False
    backward: bool = False
    norm: str = ""

    def __post_init__(self) -> None:
        if self.norm not in NORMS:
            raise ValueError(f"norm must be one of {NORMS}, got {self.norm!r}")
        if self.norm and self.squeeze != "avg":
            raise ValueError(f"a block tail squeezes by 'avg', got {self.squeeze!r}")
        if self.reduced < (0 if self.norm else 1):
            raise ValueError(f"reduced must be positive (0 for a block tail without a gate), got {self.reduced}")

    @property
    def gated(self) -> bool:
        """Whether there is an excitation."""
        return self.reduced > 0

    @property
    def vector(self) -> int:
        """Elements in 16 bytes."""
        return 16 // self.element_size

    @property
    def passes(self) -> int:
        """Tensor-sized reads and writes of the two sweeps (the mask's 1/16 or less is left out)."""
        if not self.backward:
            reads_x_once = self.norm == "given" and not self.gated
            return 3 - reads_x_once + self.residual
        reads_x_again = self.squeeze != "avg" or self.norm == "batch"
        return 4 + reads_x_again + (self.residual and self.relu)


@dataclasses.dataclass(frozen=True)
class Tile:
    """What one program of a sweep works on.

    form: "channels_last" and "planes" are blocks of [samples, positions, channels] and [samples, channels,
    positions]; "rows" sees contiguous planes whose size breaks 16-byte alignment (49, 196) as aligned rows of
    `row_channels` planes, and forms the sums per channel with a product by ones and zeros.
    positions: per step; steps: per split; splits: programs that share a plane. In "rows" a program has `channels`
    channels of one sample, and takes all positions.
    """

    form: str
    samples: int
    channels: int
    positions: int
    steps: int
    splits: int
    warps: int
    row_channels: int = 0

    def blocks(self, channels: int) -> int:
        """Blocks of channels of one sample."""
        return -(-channels // self.channels)


@dataclasses.dataclass(frozen=True)
class Plan:
    """What to launch, and why. reversed: the second sweep walks the tiles backwards, to find in the L2 what the first
    one read last. streaming: the second sweep marks what it reads as not wanted again."""

    strategy: str
    tile: Tile
    reason: str
    reversed: bool = True
    streaming: bool = True
    stages: int = 1

    def __post_init__(self) -> None:
        if self.strategy not in STRATEGIES or self.tile.form not in FORMS:
            raise ValueError(f"expected a strategy of {STRATEGIES} and a form of {FORMS}, got {self}")


def _ceil(a: int, b: int) -> int:
    return -(-a // b)


def _power(n: int) -> int:
    """The least power of two that is at least n."""
    return 1 << max(0, n - 1).bit_length()


def _fill(size: int, block: int) -> float:
    """The part of blocks that a size fills."""
    return size / (_ceil(size, block) * block)


def _split(tile_bytes: int, chunks: int) -> tuple[int, int]:
    """(steps, splits) of `chunks` steps, which together read `tile_bytes`, so that no program reads much more than
    TILE_BYTES and all but the last read the same."""
    splits = max(1, min(chunks, round(tile_bytes / TILE_BYTES)))
    steps = _ceil(chunks, splits)
    return steps, _ceil(chunks, steps)


def _step_elements(p: Problem, warps: int, facts: DeviceFacts) -> int:
    # A tail's sweeps read two tensors, but for the first one.
    return warps * facts.warp_size * p.vector * (LOADS_IN_FLIGHT // 2 if p.norm else LOADS_IN_FLIGHT)


def _channels_last_tiles(p: Problem, facts: DeviceFacts) -> Iterator[Tile]:
    widths = [w for w in (256, 128, 64, 32, 16) if w <= max(16, _power(p.channels))]
    best = max(_fill(p.channels, w) for w in widths)
    widths = [w for w in widths if _fill(p.channels, w) >= 0.75 * best]
    # 128 bytes of a pixel are a whole cache line; narrower blocks only where wider ones would idle.
    wide = [w for w in widths if w * p.element_size >= 128] or widths[:1]
    warps = 8 * 32 // facts.warp_size
    for width, samples in itertools.product(wide, (1, 2, 4, 8)):
        positions = max(1, _step_elements(p, warps, facts) // (samples * width))
        positions = min(positions, _power(p.positions))
        if positions > 1 and _fill(p.positions, positions // 2) > 1.1 * _fill(p.positions, positions):
            positions //= 2
        size = samples * width * p.positions * p.element_size
        steps, splits = _split(size, _ceil(p.positions, positions))
        if samples > 1 and size > TILE_BYTES * 5 // 4:
            continue
        yield Tile("channels_last", samples, width, positions, steps, splits, warps)


def _planes_tile(p: Problem, facts: DeviceFacts) -> Tile:
    warps = 4 * 32 // facts.warp_size
    elements = _step_elements(p, warps, facts)
    piece = math.gcd(p.vector, p.positions)
    if piece < p.vector:
        # Planes that break 16-byte alignment are read in smaller pieces, each with an address of its own: a thread has
        # registers for fewer elements.
        elements = max(8, 4 * piece) * warps * facts.warp_size
    lengths = [n for n in (1024, 512, 256, 128, 64, 32, 16) if n <= max(16, _power(p.positions))]
    if len(lengths) > 4:
        lengths = lengths[:4]
    positions = max(lengths, key=lambda n: (_fill(p.positions, n), n))
    channels = max(1, min(elements // positions, 64, _power(p.channels)))
    steps, splits = _split(channels * p.positions * p.element_size, _ceil(p.positions, positions))
    return Tile("planes", 1, channels, positions, steps, splits, warps)


def _rows_tile(p: Problem, facts: DeviceFacts) -> Tile | None:
    """None where the form does not fit."""
    if p.element_size != 2 or p.squeeze != "avg" or p.norm or p.relu or not facts.matrix_units:
        return None
    planes = next(k for k in (1, 2, 4, 8) if k * p.positions % 8 == 0)
    fits = planes > 1 and p.channels % planes == 0 and 16 <= p.positions <= MAX_ROW_POSITIONS
    if not fits:
        return None
    # 16 rows, and 64 elements of each a step, are one operand of the product.
    return Tile("rows", 1, 16 * planes, 64, _ceil(planes * p.positions, 64), 1, 4 * 32 // facts.warp_size, planes)


def _tiles(p: Problem, facts: DeviceFacts) -> Iterator[Tile]:
    if p.channels_last:
        yield from _channels_last_tiles(p, facts)
        return
    rows = _rows_tile(p, facts)
    if rows is not None:
        yield rows
    else:
        yield _planes_tile(p, facts)


def count_bytes(p: Problem, tile: Tile, strategy: str, batch: int = NOMINAL_BATCH) -> dict[str, int]:
    """The bytes that kernels load and store for one direction, by what they are: "tensor" (both sweeps), "mask",
    "weights", "shares" (of the first product), "vectors" (pooled, gate and their like). Weight gradients are left
    out: they are the same for all."""
    n, c, r, w = batch, p.channels, p.reduced, p.weight_size
    blocks, splits = tile.blocks(c), tile.splits
    tiles, groups = blocks * splits, _ceil(n, tile.samples)
    plane = c if p.channels_last else p.positions
    lines = p.positions if p.channels_last else c
    counted = {
        "tensor": p.passes * n * c * p.positions * p.element_size,
        "mask": (2 if p.backward else 1) * n * lines * _ceil(plane, 8) if p.relu else 0,
    }
    if p.norm:
        return counted | _count_between(p, tile, strategy, n)
    vectors = n * c * 4
    if strategy == "launches":
        excite = _ceil(n, EXCITE_SAMPLES)
        parts = _ceil(c, EXCITE_SPLIT)
        counted["weights"] = 2 * excite * c * r * w
        counted["shares"] = n * parts * r * 4 * (1 + _ceil(c, EXCITE_CHANNELS))
        counted["vectors"] = vectors * (2 * splits + 1 + splits)
        return counted
    counted["weights"] = 2 * groups * splits * c * r * w
    readers = tiles if strategy == "partials" else 1
    counted["shares"] = n * tiles * r * 4 * (1 + readers)
    if strategy == "last_block":
        counted["shares"] += n * r * 4 * (1 + tiles)
    counted["vectors"] = vectors * (1 + splits)
    return counted


def _count_between(p: Problem, tile: Tile, strategy: str, n: int) -> dict[str, int]:
    """What :func:`count_bytes` counts of a block tail beside the tensor."""
    c, r, splits = p.channels, p.reduced, tile.splits
    tiles, groups, excite = tile.blocks(c) * splits, _ceil(n, tile.samples), _ceil(n, EXCITE_SAMPLES)
    vectors, hidden = n * c * 4, n * r * 4
    if p.backward:
        # g0, g1 and dlogit; dpooled.
        counted = {"vectors": vectors * (2 * (2 + p.gated) * splits + 2 * p.gated)}
        made = _ceil(c, EXCITE_SPLIT) if strategy == "launches" else tiles
        readers = _ceil(c, EXCITE_CHANNELS)
    else:
        # Shift, mean and squares of each split, or the mean alone, which each group of samples reads for all; xbar and
        # the gate.
        parts, again = (3, excite if p.gated else 1) if p.norm == "batch" else (1, 1)
        made = _ceil(c, TAIL_CHANNELS)
        readers = _ceil(c, EXCITE_CHANNELS) if strategy == "launches" else tiles
        counted = {"vectors": vectors * (parts * splits * (1 + again) + 2 * p.gated)}
        if p.norm == "given" and not p.gated:
            counted["vectors"] = 0
    counted["weights"] = c * r * p.weight_size * (excite + (excite if strategy == "launches" else groups * splits))
    if strategy == "last_block":
        counted["shares"] = hidden * (2 * made + 1 + readers)
    else:
        counted["shares"] = hidden * made * (1 + readers)
    return counted


def cost(p: Problem, tile: Tile, strategy: str, facts: DeviceFacts) -> float:
    """The bytes of :func:`count_bytes` as time, in bytes of device memory: the tensor's weighted by how well the tiles
    fill the device and the vectors, the others by the L2's speed, and what waiting costs."""
    counted = count_bytes(p, tile, strategy)
    tiles = tile.blocks(p.channels) * tile.splits * _ceil(NOMINAL_BATCH, tile.samples)
    idle = max(1.0, TILES_PER_SM * facts.sms / tiles)
    if tile.form == "channels_last":
        fill = _fill(p.channels, tile.channels) * _fill(p.positions, tile.positions * tile.steps * tile.splits)
    else:
        fill = _fill(p.positions, tile.positions) if tile.form == "planes" else 1.0
    waits = {"partials": 0, "last_block": 1, "launches": 1 if p.norm else 2}[strategy]
    tensor = counted.pop("tensor") * idle * (1 + 0.25 * (1 / fill - 1))
    return tensor + sum(counted.values()) / L2_SPEED + waits * LAUNCH_BYTES


def allows(p: Problem, tile: Tile, strategy: str) -> bool:
    """Whether a problem with such tiles can take a strategy."""
    if not p.gated:  # there is nothing to decide
        return strategy == "partials"
    return strategy == "launches" or (tile.form != "rows" and p.squeeze == "avg")


def candidates(p: Problem, facts: DeviceFacts) -> list[Plan]:
    """Every plan that is considered, the cheapest first, each with its reason."""
    found = []
    for tile in _tiles(p, facts):
        for strategy in STRATEGIES:
            # On AMD a barrier does not wait for the stores of other waves, which the last block would have to see.
            if strategy == "last_block" and facts.vendor == "hip":
                continue
            if allows(p, tile, strategy):
                found.append((cost(p, tile, strategy, facts), strategy, tile))
    found.sort(key=lambda entry: entry[0])
    cheapest = {}
    for _, strategy, tile in found:
        cheapest.setdefault(strategy, tile)
    return [Plan(strategy, tile, _reason(p, strategy, {**cheapest, strategy: tile})) for _, strategy, tile in found]


def _reason(p: Problem, strategy: str, tiles: dict[str, Tile]) -> str:
    """Why this strategy, from the tile that each strategy would take."""
    tile = tiles[strategy]
    if not p.gated:
        why = "there is no gate to make"
    elif p.squeeze != "avg":
        why = f"the {p.squeeze} of a plane is not a sum of shares"
    elif tile.form == "rows":
        why = "a row of planes leaves no room for a share of the products"
    else:
        beside = {}
        for name, other in tiles.items():
            counted = count_bytes(p, other, name)
            tensor = counted.pop("tensor")
            beside[name] = f"{100 * sum(counted.values()) / tensor:.0f} %"
        others = ", ".join(f"{beside[name]} by {name}" for name in STRATEGIES if name in beside and name != strategy)
        why = f"{beside[strategy]} of the tensor's bytes beside it, against {others}"
    form = {
        "channels_last": f"{tile.samples} x {tile.channels} channels x {tile.positions} positions a step",
        "planes": f"{tile.channels} planes x {tile.positions} positions a step",
        "rows": f"{tile.channels} planes in rows of {tile.row_channels}, which are aligned to 16 bytes",
    }[tile.form]
    return f"{why}; tiles of {form}, {tile.splits} to a plane"


@lru_cache(maxsize=4096)
def plan(p: Problem, facts: DeviceFacts) -> Plan:
    """The plan for a problem on a device; see the module's text for what is weighed."""
    return candidates(p, facts)[0]
