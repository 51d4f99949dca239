"""Launches the Triton kernels of block tails, as ``launch.py`` does those of SE layers. Imports triton."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch

from ...activations import Activation
from ...call import Call, GradientCall, Gradients, Outputs
from ..synchronised import merge_statistics, share_sums, values_per_channel
from . import launch
from .launch import Fixed, Kernel, floats, sample_stride
from .plan import (
    EXCITE_CHANNELS,
    EXCITE_REDUCED,
    EXCITE_SAMPLES,
    EXCITE_SPLIT,
    EXCITE_STEP,
    TAIL_CHANNELS,
    WEIGHT_CHANNELS,
    WEIGHT_REDUCED,
    Problem,
)

__all__ = ["backward", "forward"]

# Samples and splits that the merge of the moments reads as one block, in eight warps: the whole of an early layer's is
# 200 KB for each program.
_ENTRIES, _MERGE_WARPS = 32, 8


class Recipe:
    """The plan of a call and its kernels."""

    def __init__(self, fixed: Fixed) -> None:
        self.fixed = fixed
        p, facts = fixed.problem, fixed.facts
        self.plan = launch.plan_of(p, facts)
        tile, strategy = self.plan.tile, self.plan.strategy
        if p.channels_last != (tile.form == "channels_last") or tile.form == "rows":
            raise ValueError(f"a plan with tiles of {tile.form!r} does not fit {p}")
        c, r, batch = p.channels, p.reduced, p.norm == "batch"
        self.blocks = tile.blocks(c)
        self.tiles = self.blocks * tile.splits
        self.length = tile.steps * tile.positions
        self.tail_blocks = -(-c // TAIL_CHANNELS)
        self.gate_blocks = -(-c // EXCITE_CHANNELS)
        self.parts = -(-c // EXCITE_SPLIT)
        self.weight_tiles = -(-c // WEIGHT_CHANNELS) * -(-r // WEIGHT_REDUCED)
        self.launched, self.last_block = strategy == "launches", strategy == "last_block"
        a, g = Activation.parse(fixed.act), Activation.parse(fixed.gate_fn)
        slope, offset = g.args or (0.0, 0.0)
        act = {"ACT": a.kernel_name, "ACT_A": (a.args or (0.0,))[0]}
        gate = {"GATE": g.kernel_name, "GATE_A": slope}

        def kernel(name: str, warps: int = tile.warps, waits: bool = True, **constants: Any) -> Kernel:
            return Kernel(name, facts, warps, waits, **constants)

        warps = 4 * 32 // facts.warp_size
        excite = {
            "C": c, "R": r, "SAMPLES": EXCITE_SAMPLES, "REDUCED": EXCITE_REDUCED, "PRECISION": fixed.precision
        }  # fmt: skip
        tiles = {"C": c, **launch.constants_of(fixed, tile)}
        beside = {"R": r, "STRATEGY": strategy, "RELU": p.relu, "REDUCED": launch.reduced_beside(tile), **act, **gate}
        walk = {"REVERSED": self.plan.reversed, "EVICT": "evict_first" if self.plan.streaming else ""}
        if not p.backward:
            merge = {"CHANNELS": TAIL_CHANNELS, "ENTRIES": _ENTRIES}
            wide = _MERGE_WARPS * 32 // facts.warp_size if batch else warps

            def between(merges: bool, pushes: bool) -> Kernel:
                return kernel(
                    "tail_excite_kernel", wide, **excite, **merge, MERGES=merges, PUSHES=pushes,
                    LAST_BLOCK=self.last_block and pushes,
                )  # fmt: skip

            self.moments = kernel("tail_moments_kernel", waits=False, **tiles, STAGES=self.plan.stages)
            self.excite = between(batch, r > 0)
            self.merge, self.push = between(True, False), between(False, True)
            self.gate = kernel(
                "excite_gate_kernel", warps, **excite, **act, **gate, GATE_B=offset, CHANNELS=EXCITE_CHANNELS, SAVE=True
            )
            self.scale = kernel("tail_scale_kernel", **tiles, **beside, **walk, GATE_B=offset)
            return
        self.sums = kernel("tail_sums_kernel", waits=False, **tiles, **beside, STAGES=self.plan.stages)
        self.push = kernel("excite_push_backward_kernel", warps, **excite, STEP=EXCITE_STEP, CHANNELS=EXCITE_SPLIT)
        self.excite = kernel(
            "tail_excite_backward_kernel", warps, **excite, **act, READY=self.last_block, CHANNELS=EXCITE_CHANNELS,
            WEIGHT_CHANNELS=WEIGHT_CHANNELS, WEIGHT_REDUCED=WEIGHT_REDUCED,
        )  # fmt: skip
        self.scale = kernel("tail_scale_backward_kernel", **tiles, **walk, R=r, BATCH=batch, RELU=p.relu)


@lru_cache(maxsize=4096)
def _recipe(
    device: torch.device,
    channels: int,
    reduced: int,
    positions: int,
    element_size: int,
    weight_size: int,
    channels_last: bool,
    relu: bool,
    residual: bool,
    backward: bool,
    norm: str,
    act: str,
    gate_fn: str,
    align: int,
    precision: str,
) -> Recipe:
    problem = Problem(
        channels, reduced, positions, element_size, weight_size, channels_last, "avg", relu, residual, backward, norm
    )
    m_align = 1 if channels_last else math.gcd(problem.vector, positions)
    return Recipe(Fixed(problem, launch.device_facts(device), device, act, gate_fn, align, m_align, precision))


launch.recipes.append(_recipe)


def _recipe_of(call: Call | GradientCall, channels_last: bool, strides: Sequence[int], residual: bool) -> Recipe:
    x, w1, backward = call.x, call.w1, isinstance(call, GradientCall)
    size = x.element_size()
    reduced, weight_size = (0, size) if w1 is None else (w1.shape[0], w1.element_size())
    return _recipe(
        x.device, x.shape[1], reduced, math.prod(x.shape[2:]), size, weight_size, channels_last,
        call.post_act == "relu", residual, backward, call.norm, call.act, call.gate_fn, math.gcd(16 // size, *strides),
        launch.precision(),
    )  # fmt: skip


def _groups(n: int, samples: int) -> int:
    return -(-n // samples)


def forward(call: Call, outputs: Outputs, channels_last: bool) -> None:
    """(T1) to (T3)."""
    x, weight, bias, mean, var, w1, b1, w2, b2, residual, factor, eps, norm, *_ = call
    y, statistics, gate, saved, mask = outputs
    n, batch = x.shape[0], norm == "batch"
    if n == 0:
        statistics.zero_()
        if batch and call.group:  # the other processes have samples, and wait for this one
            merge_statistics(statistics, call)
        return
    x_stride, y_stride = sample_stride(x), sample_stride(y)
    r_stride = 0 if residual is None else sample_stride(residual)
    strides = (x_stride, y_stride, r_stride)
    recipe = _recipe_of(call, channels_last, strides, residual is not None)
    fixed, tile = recipe.fixed, recipe.plan.tile
    p = fixed.problem
    c, r, splits = p.channels, p.reduced, tile.splits
    x_stride, y_stride, r_stride = (stride // fixed.align for stride in strides)
    groups, excite = _groups(n, tile.samples), _groups(n, EXCITE_SAMPLES)
    inv_m, count = 1.0 / p.positions, float(n * p.positions)
    saved_stride = None if saved is None else saved.stride(0)
    preact = None if saved is None else saved[:, c:]

    with launch.on_device(x):
        # All memory is taken before the first launch: nothing stands between the launches that wait for each other.
        shifts = means = squares = shares = tickets = None
        if batch:
            shifts, squares = floats(x, n, splits, c), floats(x, n, splits, c)
        if batch or p.gated:
            means = floats(x, n, splits, c)
        if p.gated:
            shares = floats(x, n, recipe.tail_blocks, r)
            if recipe.last_block:
                tickets = launch.tickets_for(x, excite)
        steps = (p.positions // fixed.m_align, splits, tile.steps)
        if means is not None:
            recipe.moments(groups * recipe.tiles, x, x_stride, mean, shifts, means, squares, n, *steps, inv_m)
            arguments = (
                shifts, means, squares, statistics, mean, var, weight, bias, w1, b1, shares, saved, preact,
                saved_stride, tickets, n, p.positions, splits, recipe.length, count, inv_m, eps,
            )  # fmt: skip
            if batch and call.group:
                recipe.merge(recipe.tail_blocks, *arguments)
                merge_statistics(statistics, call)
                if p.gated:
                    recipe.push(excite * recipe.tail_blocks, *arguments)
            else:
                recipe.excite((excite if p.gated else 1) * recipe.tail_blocks, *arguments)
        if recipe.launched:
            recipe.gate(
                excite * recipe.gate_blocks, shares, preact, saved_stride, b1, w2, b2, gate, n, recipe.tail_blocks
            )
        recipe.scale(
            groups * recipe.tiles, x, x_stride, residual, r_stride, y, y_stride, mask, statistics, mean, var, weight,
            bias, factor, None if recipe.launched else shares, preact, saved_stride, b1, w2, b2, gate, n, *steps,
            recipe.tail_blocks, eps,
        )  # fmt: skip


def backward(call: GradientCall, gradients: Gradients, channels_last: bool) -> None:
    """(T4) to (T7)."""
    dy, x, weight, bias, w1, w2, factor = call.dy, call.x, call.weight, call.bias, call.w1, call.w2, call.factor
    statistics, gate, saved, mask = call.statistics, call.gate, call.saved, call.mask
    dx, dweight, dbias, *dweights, dresidual = gradients
    n, batch, sweeps = x.shape[0], call.norm == "batch", dx is not None or dresidual is not None
    synchronised = batch and call.group and sweeps
    if n == 0:
        launch.clear(gradients)
        if synchronised:
            share_sums(*torch.zeros_like(statistics[:2]), call)
        return
    out = dx if dx is not None else dresidual
    x_stride, dy_stride = sample_stride(x), sample_stride(dy)
    out_stride = 0 if out is None else sample_stride(out)
    strides = (x_stride, dy_stride, out_stride)
    recipe = _recipe_of(call, channels_last, strides, dresidual is not None)
    fixed, tile = recipe.fixed, recipe.plan.tile
    p = fixed.problem
    c, r, splits = p.channels, p.reduced, tile.splits
    x_stride, dy_stride, out_stride = (stride // fixed.align for stride in strides)
    groups, excite = _groups(n, tile.samples), _groups(n, EXCITE_SAMPLES)
    weight_tiles = 0 if dweights[0] is None else recipe.weight_tiles
    summed = any(t is not None for t in (dweight, dbias, dweights[0])) or (dx is not None and (batch or p.gated))
    saved_stride = None if saved is None else saved.stride(0)
    preact = None if saved is None else saved[:, c:]

    with launch.on_device(x):
        sums = dpooled = None
        steps = (p.positions // fixed.m_align, splits, tile.steps)
        if summed:
            # All memory is taken before the first launch: nothing stands between the launches that wait for each other.
            g0, g1, sums = floats(x, n, splits, c), floats(x, n, splits, c), floats(x, excite, 2, c)
            parts = shares = dpreact = tickets = None
            shared = recipe.parts if recipe.launched else recipe.tiles
            if p.gated:
                parts, dpooled, shares = floats(x, n, splits, c), floats(x, n, c), floats(x, n, shared, r)
                if recipe.last_block:
                    dpreact, tickets = floats(x, n, r), launch.tickets_for(x, groups)
            recipe.sums(
                groups * recipe.tiles, x, x_stride, dy, dy_stride, mask, statistics, weight, bias, factor, gate, w2,
                g0, g1, parts, None if recipe.launched else shares, preact, saved_stride, dpreact, tickets, n, *steps,
            )  # fmt: skip
            if recipe.launched:
                recipe.push(excite * recipe.parts, parts, w2, shares, n, splits)
            recipe.excite(
                weight_tiles + excite * recipe.gate_blocks, g0, g1, parts, shares, dpreact, gate, saved, preact,
                saved_stride, weight, bias, w1, dpooled, sums, *dweights, n, splits, shared, weight_tiles,
            )  # fmt: skip
        inv_count = 1.0 / values_per_channel(x) if batch else 0.0
        if summed and (synchronised or not sweeps):
            own = sums.sum(0)
            for t, value in zip((dweight, dbias), own, strict=True):
                if t is not None:
                    t.copy_(value)
            dweight = dbias = None
            if synchronised:
                sums, excite, inv_count = torch.stack(share_sums(*own, call)), 1, 1.0
        if sweeps:
            recipe.scale(
                groups * recipe.tiles, x, x_stride, dy, dy_stride, dx, dresidual, out_stride, mask, statistics, weight,
                factor, gate, dpooled, sums, dweight, dbias, n, *steps, excite, 1.0 / p.positions, inv_count,
            )  # fmt: skip
