"""Launches the Triton kernels on tensors that the operators have allocated. Imports triton.

A call is looked up by what is fixed about it (device, sizes, dtypes, options) and gives a :class:`Recipe`: the plan and
the kernels' constants. What is left per call are the workspaces, the strides, and one to four launches, all in the
current stream; nothing waits for the device.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache
from typing import Any

import torch
import triton
from torch import Tensor

from ...activations import Activation
from ...call import Call, GradientCall, Gradients, Outputs
from ..tickets import tickets_for
from . import kernels, tail_kernels, tuned
from .plan import (
    EXCITE_CHANNELS,
    EXCITE_REDUCED,
    EXCITE_SAMPLES,
    EXCITE_SPLIT,
    EXCITE_STEP,
    WEIGHT_CHANNELS,
    WEIGHT_REDUCED,
    DeviceFacts,
    Plan,
    Problem,
    Tile,
    plan,
)

__all__ = [
    "INTERPRETED", "Fixed", "Kernel", "backward", "clear", "constants_of", "device_facts", "floats", "forget_recipes",
    "forward", "launches", "on_device", "plan_of", "precision", "recipes", "reduced_beside", "sample_stride", "using",
]  # fmt: skip

INTERPRETED = bool(triton.knobs.runtime.interpret)
# What the interpreter pretends to be: it then runs what an H200 would.
_INTERPRETED_FACTS = DeviceFacts("cuda", 90, 132)

# Two blocks of eight warps with 128 registers have 32 to 64 KiB of loads under way per multiprocessor, which is what an
# H200's latency takes. The excitation's kernels are few blocks.
_SWEEP_REGISTERS, _EXCITE_REGISTERS = 128, 255

# The functions that keep recipes.
recipes: list[Any] = []
# Kernels launched in this process, by name: a proof of what ran.
launches: Counter[str] = Counter()


@lru_cache(maxsize=64)
def device_facts(device: torch.device) -> DeviceFacts:
    """What the plan wants to know of a device; an H200's facts for the CPU, in the interpreter."""
    if device.type == "cpu":
        return _INTERPRETED_FACTS
    properties = torch.cuda.get_device_properties(device)
    if torch.version.hip is not None:
        arch = properties.gcnArchName.partition(":")[0]
        return DeviceFacts("hip", arch, properties.multi_processor_count, properties.warp_size)
    arch = 10 * properties.major + properties.minor
    return DeviceFacts("cuda", arch, properties.multi_processor_count, properties.warp_size)


def plan_of(problem: Problem, facts: DeviceFacts) -> Plan:
    """The plan that a call takes: the tuned one where there is one, else the counted one."""
    return tuned.lookup(problem, facts) or plan(problem, facts)


@contextlib.contextmanager
def using(plans: Mapping[Problem, Plan]) -> Iterator[None]:
    """Within the block calls of these problems take these plans."""
    with tuned.using(plans):
        forget_recipes()
        try:
            yield
        finally:
            forget_recipes()


def forget_recipes() -> None:
    """The next calls plan anew."""
    for recipe in recipes:
        recipe.cache_clear()


# ---------------------------------------------------------------------------------------------------- one kernel


def _kind_on_cuda(t: Tensor) -> tuple[Any, ...]:
    """What a compiled kernel takes for granted of a pointer."""
    return t.dtype, t.data_ptr() % 16


def _kind_on_hip(t: Tensor) -> tuple[Any, ...]:
    """As on CUDA, and whether 32 bits reach all of the storage."""
    return t.dtype, t.data_ptr() % 16, t.untyped_storage().nbytes() < 2**31


class Kernel:
    """A kernel with its constants. Called with the number of programs and the arguments in front of the constants.

    The compiled kernel is kept by what Triton specialises on (the arguments' dtypes and alignment), because finding it
    again through triton.jit takes longer than many of these kernels run.
    """

    def __init__(self, name: str, facts: DeviceFacts, warps: int, waits: bool, **constants: Any) -> None:
        function = getattr(tail_kernels if name.startswith("tail_") else kernels, name)
        self.name = name
        self.function = function
        pdl = facts.dependent_launch and not INTERPRETED
        self.constants = {**constants, "PDL": pdl}
        names = list(function.arg_names)
        self.tail = tuple(self.constants[key] for key in names[len(names) - len(self.constants) :])
        self.options: dict[str, Any] = {"num_warps": warps, "enable_fp_fusion": True}
        if facts.vendor == "cuda":
            # Without a limit ptxas aims for few registers, and puts one or two of those it needs into local memory.
            self.options["maxnreg"] = _EXCITE_REGISTERS if "excite" in name else _SWEEP_REGISTERS
        if pdl and waits:
            self.options["launch_pdl"] = True
        self.compiled: dict[Any, Any] = {}
        self.kind = _kind_on_hip if facts.vendor == "hip" else _kind_on_cuda

    def __call__(self, programs: int, *arguments: Any) -> None:
        launches[self.name] += 1
        if INTERPRETED:
            self.function[(programs,)](*arguments, **self.constants)
            return
        key = tuple([self.kind(a) if isinstance(a, Tensor) else a is None or -(2**31) <= a < 2**31 for a in arguments])
        compiled = self.compiled.get(key)
        if compiled is None:
            self.compiled[key] = self.function[(programs,)](*arguments, **self.constants, **self.options)
        else:
            compiled[(programs, 1, 1)](*arguments, *self.tail)


# ---------------------------------------------------------------------------------------------------- recipes


@dataclasses.dataclass(frozen=True)
class Fixed:
    """What is fixed about the calls that share a recipe."""

    problem: Problem
    facts: DeviceFacts
    device: torch.device
    act: str
    gate_fn: str
    align: int
    m_align: int
    precision: str
    save: bool = True  # forward: is anything kept for a backward


def constants_of(fixed: Fixed, tile: Tile) -> dict[str, Any]:
    """A sweep's constants: the tile, and how it lies in memory."""
    p = fixed.problem
    return {
        "ALIGN": fixed.align, "M_ALIGN": fixed.m_align, "CHANNELS_LAST": p.channels_last,
        "WIDE": p.channels * p.positions >= 2**31, "SAMPLES": tile.samples, "CHANNELS": tile.channels,
        "POSITIONS": tile.positions,
    }  # fmt: skip


def reduced_beside(tile: Tile) -> int:
    """Squeezed channels of a block of the weights beside a tile: as many elements as a few loads per thread bring."""
    return max(4, min(EXCITE_REDUCED, 4096 // (tile.samples * tile.channels)))


class Recipe:
    """The plan of a call and its kernels."""

    def __init__(self, fixed: Fixed) -> None:
        self.fixed = fixed
        p, facts = fixed.problem, fixed.facts
        self.plan = plan_of(p, facts)
        tile = self.plan.tile
        if p.channels_last != (tile.form == "channels_last"):
            raise ValueError(f"a plan with tiles of {tile.form!r} does not fit {p}")
        self.blocks = tile.blocks(p.channels)
        self.tiles = self.blocks * tile.splits
        self.parts = -(-p.channels // EXCITE_SPLIT)
        self.gate_blocks = -(-p.channels // EXCITE_CHANNELS)
        self.weight_tiles = -(-p.channels // WEIGHT_CHANNELS) * -(-p.reduced // WEIGHT_REDUCED)
        a, g = Activation.parse(fixed.act), Activation.parse(fixed.gate_fn)
        act = {"ACT": a.kernel_name, "ACT_A": (a.args or (0.0,))[0]}
        slope, offset = g.args or (0.0, 0.0)
        gate = {"GATE": g.kernel_name, "GATE_A": slope}
        sizes = {"C": p.channels, "R": p.reduced}
        launched = self.plan.strategy == "launches"
        evict = "evict_first" if self.plan.streaming else ""
        kinds = {"STRATEGY": self.plan.strategy, "SQUEEZE": p.squeeze}
        wide = p.channels * p.positions >= 2**31

        def kernel(name: str, warps: int = tile.warps, waits: bool = True, **constants: Any) -> Kernel:
            return Kernel(name, facts, warps, waits, **constants)

        excite = dict(sizes, SAMPLES=EXCITE_SAMPLES, REDUCED=EXCITE_REDUCED, PRECISION=fixed.precision)
        weights = {"WEIGHT_CHANNELS": WEIGHT_CHANNELS, "WEIGHT_REDUCED": WEIGHT_REDUCED}
        warps = 4 * 32 // facts.warp_size
        # One split of an average is pooled itself, and goes where it is kept.
        self.direct = fixed.save and p.squeeze == "avg" and tile.splits == 1
        if launched and not p.backward:
            self.push = kernel(
                "excite_push_kernel", warps, **excite, STEP=EXCITE_STEP, CHANNELS=EXCITE_SPLIT, SQUEEZE=p.squeeze,
                SAVE=fixed.save and not self.direct,
            )  # fmt: skip
            self.gate = kernel(
                "excite_gate_kernel", warps, **excite, **act, **gate, GATE_B=offset, CHANNELS=EXCITE_CHANNELS,
                SAVE=fixed.save,
            )  # fmt: skip
        elif launched:
            self.push = kernel("excite_push_backward_kernel", warps, **excite, STEP=EXCITE_STEP, CHANNELS=EXCITE_SPLIT)
            self.excite = kernel("excite_backward_kernel", warps, **excite, **act, **weights, CHANNELS=EXCITE_CHANNELS)

        if tile.form == "rows":
            rows = {
                "C": p.channels, "M": p.positions, "ALIGN": fixed.align, "PLANES": tile.row_channels,
                "ROWS": tile.channels // tile.row_channels, "STEP": tile.positions, "WIDE": wide,
            }  # fmt: skip
            self.scale = kernel("rows_scale_kernel", **rows, REVERSED=self.plan.reversed, EVICT=evict)
            if p.backward:
                self.squeeze = kernel(
                    "rows_squeeze_backward_kernel", waits=False, **rows, **gate, IN_FLOAT32=INTERPRETED
                )
            else:
                self.squeeze = kernel("rows_squeeze_kernel", waits=False, **rows, IN_FLOAT32=INTERPRETED)
            return

        tiles = dict(sizes, **constants_of(fixed, tile), REDUCED=reduced_beside(tile))
        walk = {"REVERSED": self.plan.reversed, "EVICT": evict}
        if not p.backward:
            self.squeeze = kernel(
                "squeeze_kernel", waits=False, **tiles, **kinds, KEEP=launched or fixed.save, STAGES=self.plan.stages
            )
            self.scale = kernel(
                "scale_kernel", **tiles, **walk, **act, **gate, GATE_B=offset, STRATEGY=self.plan.strategy,
                SAVE=fixed.save, RELU=p.relu,
            )  # fmt: skip
            return
        self.squeeze = kernel(
            "squeeze_backward_kernel", waits=False, **tiles, **act, **gate, STRATEGY=self.plan.strategy,
            RELU=p.relu, STAGES=self.plan.stages, EVICT_X="evict_first" if p.squeeze == "avg" else "",
        )  # fmt: skip
        self.scale = kernel(
            "scale_backward_kernel", **tiles, **walk, **kinds, **act, RELU=p.relu,
            WEIGHT_SAMPLES=EXCITE_SAMPLES, **weights, PRECISION=fixed.precision,
        )  # fmt: skip


@lru_cache(maxsize=4096)
def _recipe(
    device: torch.device,
    channels: int,
    reduced: int,
    positions: int,
    element_size: int,
    weight_size: int,
    channels_last: bool,
    squeeze: str,
    relu: bool,
    residual: bool,
    backward: bool,
    act: str,
    gate_fn: str,
    align: int,
    precision: str,
    save: bool,
) -> Recipe:
    """The recipe of a call; the arguments are flat because hashing them is most of what a call that was seen costs."""
    problem = Problem(
        channels, reduced, positions, element_size, weight_size, channels_last, squeeze, relu, residual, backward
    )
    return Recipe(
        Fixed(
            problem=problem,
            facts=device_facts(device),
            device=device,
            act=act,
            gate_fn=gate_fn,
            align=align,
            m_align=1 if channels_last else math.gcd(problem.vector, positions),
            precision=precision,
            save=save,
        )
    )


recipes.append(_recipe)


def floats(x: Tensor, *size: int) -> Tensor:
    return x.new_empty(size, dtype=torch.float32)


def sample_stride(t: Tensor) -> int:
    return t.stride(0) if t.shape[0] > 1 else t.numel()


def _recipe_of(
    call: Call | GradientCall, channels_last: bool, strides: Sequence[int], residual: bool, save: bool
) -> Recipe:
    x, w1, backward = call.x, call.w1, isinstance(call, GradientCall)
    size = x.element_size()
    return _recipe(
        x.device, x.shape[1], w1.shape[0], math.prod(x.shape[2:]), size, w1.element_size(), channels_last,
        call.squeeze, call.post_act == "relu", residual, backward, call.act, call.gate_fn,
        math.gcd(16 // size, *strides), precision(), save,
    )  # fmt: skip


def precision() -> str:
    """Of products of float32 on matrix units: TF32 only where PyTorch's own may use it."""
    tf32 = not INTERPRETED and torch.version.hip is None and torch.backends.cuda.matmul.fp32_precision == "tf32"
    return "tf32" if tf32 else "ieee"


def on_device(x: Tensor) -> contextlib.AbstractContextManager[Any]:
    """Makes x's device the current one, on which Triton launches."""
    if x.device.type == "cpu":
        if not INTERPRETED:
            raise RuntimeError(
                "the triton backend got CPU tensors; it serves them only in Triton's interpreter: set "
                "TRITON_INTERPRET=1 before Python starts"
            )
        return contextlib.nullcontext()
    return contextlib.nullcontext() if x.device.index == torch.cuda.current_device() else torch.cuda.device(x.device)


def clear(gradients: Gradients) -> None:
    """Those of an empty batch."""
    for t in gradients:
        if t is not None:
            t.zero_()


# ---------------------------------------------------------------------------------------------------- forward


def forward(call: Call, outputs: Outputs, channels_last: bool) -> None:
    """(E1) to (E4)."""
    x, w1, b1, w2, b2, residual = call.x, call.w1, call.b1, call.w2, call.b2, call.residual
    y, _, gate, saved, mask = outputs
    n = x.shape[0]
    if n == 0:
        return
    x_stride, y_stride = sample_stride(x), sample_stride(y)
    r_stride = 0 if residual is None else sample_stride(residual)
    strides = (x_stride, y_stride, r_stride)
    recipe = _recipe_of(call, channels_last, strides, residual is not None, saved is not None)
    fixed, plan, tile = recipe.fixed, recipe.plan, recipe.plan.tile
    p, squeeze = fixed.problem, call.squeeze
    c, r, splits = p.channels, p.reduced, tile.splits
    x_stride, y_stride, r_stride = (stride // fixed.align for stride in strides)
    launched = plan.strategy == "launches"

    saved_stride = pooled = preact = peak = tied = None
    if saved is not None:
        saved_stride = saved.stride(0)
        pooled, preact = saved, saved[:, c:]
        if squeeze != "avg":
            peak, tied = saved[:, c + r :], saved[:, 2 * c + r :]
    preact_stride = saved_stride
    if preact is None and plan.strategy == "last_block":
        preact, preact_stride = floats(x, n, r), r
    parts = parts_stride = peaks = ties = None
    if recipe.direct:
        parts, parts_stride = saved, saved_stride
    elif launched or saved is not None:
        parts, parts_stride = floats(x, n, splits, c), splits * c
    if squeeze != "avg":
        peaks, ties = floats(x, n, splits, c), floats(x, n, splits, c)
    if launched and gate is None:
        gate = floats(x, n, c)
    groups = -(-n // tile.samples)
    inv_m = 1.0 / p.positions

    with on_device(x):
        # All memory is taken before the first launch: nothing stands between the launches that wait for each other.
        shares = floats(x, n, recipe.parts if launched else recipe.tiles, r)
        tickets = tickets_for(x, groups) if plan.strategy == "last_block" else None
        steps = (p.positions // fixed.m_align, splits, tile.steps)
        if tile.form == "rows":
            recipe.squeeze(n * recipe.blocks, x, x_stride, parts, parts_stride, inv_m)
        else:
            recipe.squeeze(
                groups * recipe.tiles, x, x_stride, w1, b1, parts, parts_stride, peaks, ties,
                None if launched else shares, preact, preact_stride, tickets, n, *steps, inv_m,
            )  # fmt: skip
        if launched:
            samples = -(-n // EXCITE_SAMPLES)
            recipe.push(
                samples * recipe.parts, parts, parts_stride, peaks, ties, w1, shares, pooled, peak, tied, saved_stride,
                n, splits,
            )  # fmt: skip
            recipe.gate(samples * recipe.gate_blocks, shares, preact, preact_stride, b1, w2, b2, gate, n, recipe.parts)
        if tile.form == "rows":
            recipe.scale(n * recipe.blocks, x, x_stride, residual, r_stride, y, y_stride, gate, None, 0.0)
            return
        sums = None if saved is None or launched or recipe.direct else parts
        recipe.scale(
            groups * recipe.tiles, x, x_stride, residual, r_stride, y, y_stride, mask, sums, pooled, saved_stride,
            None if launched else shares, preact, preact_stride, b1, w2, b2, gate, n, *steps,
        )  # fmt: skip


# ---------------------------------------------------------------------------------------------------- backward


def backward(call: GradientCall, gradients: Gradients, channels_last: bool) -> None:
    """(B1) to (B7)."""
    dy, dgate, x, w1, w2 = call.dy, call.dgate, call.x, call.w1, call.w2
    gate, saved, mask = call.gate, call.saved, call.mask
    dx, _, _, *dweights, dresidual = gradients
    n = x.shape[0]
    if n == 0:
        clear(gradients)
        return
    out = dx if dx is not None else dresidual
    x_stride, dy_stride = sample_stride(x), sample_stride(dy)
    out_stride = 0 if out is None else sample_stride(out)
    strides = (x_stride, dy_stride, out_stride)
    recipe = _recipe_of(call, channels_last, strides, dresidual is not None, True)
    fixed, plan, tile = recipe.fixed, recipe.plan, recipe.plan.tile
    p = fixed.problem
    c, r, splits = p.channels, p.reduced, tile.splits
    x_stride, dy_stride, out_stride = (stride // fixed.align for stride in strides)
    launched = plan.strategy == "launches"
    saved_stride, pooled, preact = saved.stride(0), saved, saved[:, c:]
    peak, tied = (None, None) if call.squeeze == "avg" else (saved[:, c + r :], saved[:, 2 * c + r :])
    weight_tiles = 0 if dweights[0] is None else recipe.weight_tiles
    groups = -(-n // tile.samples)
    inv_m = 1.0 / p.positions
    mask = mask if p.relu else None

    with on_device(x):
        # All memory is taken before the first launch: nothing stands between the launches that wait for each other.
        parts, shares, dpreact, dpooled, tickets = floats(x, n, splits, c), None, None, None, None
        if launched:
            shares = floats(x, n, recipe.parts, r)
            dpooled = floats(x, n, c) if dx is not None else None
        else:
            shares = floats(x, n, recipe.tiles, r)
            if plan.strategy == "last_block":
                dpreact, tickets = floats(x, n, r), tickets_for(x, groups)
        steps = (p.positions // fixed.m_align, splits, tile.steps)
        if tile.form == "rows":
            recipe.squeeze(n * recipe.blocks, x, x_stride, dy, dy_stride, dgate, gate, parts)
        else:
            recipe.squeeze(
                groups * recipe.tiles, x, x_stride, dy, dy_stride, mask, dgate, gate, w2, parts,
                None if launched else shares, preact, saved_stride, dpreact, tickets, n, *steps,
            )  # fmt: skip
        if launched:
            samples = -(-n // EXCITE_SAMPLES)
            programs = weight_tiles + (0 if dpooled is None else samples * recipe.gate_blocks)
            if programs:
                recipe.push(samples * recipe.parts, parts, w2, shares, n, splits)
                recipe.excite(
                    programs, parts, shares, pooled, preact, saved_stride, w1, dpooled, *dweights,
                    n, splits, recipe.parts, weight_tiles,
                )  # fmt: skip
            weight_tiles, dweights, shares = 0, (None,) * 4, None
        if tile.form == "rows":
            if dx is not None:
                recipe.scale(n * recipe.blocks, dy, dy_stride, None, 0, dx, out_stride, gate, dpooled, inv_m)
            return
        programs = weight_tiles + (groups * recipe.tiles if out is not None else 0)
        if programs:
            recipe.scale(
                programs, x, x_stride, dy, dy_stride, dx, dresidual, out_stride, mask, gate, parts, shares, dpreact,
                dpooled, pooled, preact, peak, tied, saved_stride, w1, *dweights, n, *steps, weight_tiles, inv_m,
            )  # fmt: skip
