"""The Triton backend as an operator: opcheck, torch.compile, both paths, determinism, batches, launches, bytes; on a
GPU also streams, CUDA graphs and what the profiler counts."""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections import Counter

import pytest
import torch
from gpu_operator_contract import *  # noqa: F403
from gpu_operator_contract import CASES, ON_GPU, arguments, gradients, layer_and_input
from layer_operator import Backward, Forward, call_of
from oracle import Case, draw
from test_triton_kernels import (
    BETWEEN,
    BETWEEN_BACKWARD,
    DENSE,
    DEVICE,
    FORMS,
    STRATEGIES,
    SWEEPS,
    plans_for,
)
from test_triton_kernels import run as run_triton

from senet_fused.backends import triton as backend
from senet_fused.backends.tickets import Tickets

if backend.problem(DEVICE) is not None:
    pytest.skip(backend.problem(DEVICE), allow_module_level=True)

from senet_fused.backends.triton import kernels, launch
from senet_fused.backends.triton.plan import count_bytes

FORWARD, BACKWARD = Forward("triton"), Backward("triton")


@pytest.fixture
def backend_name():
    return "triton"


@pytest.fixture
def using_strategy():
    def using(case: Case, strategy: str):
        cases = [case, case.replace(residual=not case.residual)]  # the backward may want no gradient of a residual
        return launch.using({p: q for c in cases for p, q in plans_for(c, strategy, default="launches").items()})

    return using


# ---------------------------------------------------------------------------------------------------- bits


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("form", [*FORMS, "rows"])
def test_bits_do_not_depend_on_the_run_or_the_batch(form, strategy):
    case = FORMS[form] if form in FORMS else CASES["rows"]
    case = case.replace(shape=(5, *case.shape[1:]))
    with launch.using(plans_for(case, strategy, default="launches")):
        inputs = draw(case, 0)
        batch = run_triton(case, inputs)
        again = run_triton(case, inputs)
        assert all(torch.equal(batch[name], again[name]) for name in batch)
        for chosen in ([3], [1, 4]):
            alone = run_triton(
                case, {k: t[chosen] if k in ("x", "dy", "dgate", "residual") else t for k, t in inputs.items()}
            )
            for name in ("y", "gate", "dx"):
                assert torch.equal(alone[name], batch[name][chosen]), name


# ---------------------------------------------------------------------------------------------------- launches, bytes


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_two_launches_each_way(strategy):
    """Four where the excitation has two of its own."""
    case = FORMS["channels_last"]
    with launch.using(plans_for(case, strategy)):
        run_triton(case, draw(case, 0))
        expected = Counter([*SWEEPS, *BETWEEN[strategy], *BETWEEN_BACKWARD[strategy]])
        assert launch.launches == expected
        assert sum(expected.values()) == (8 if strategy == "launches" else 4)


@contextlib.contextmanager
def counted_accesses():
    """In the interpreter: the bytes that kernels load and store, by the address of the tensor's storage."""
    from triton.runtime.interpreter import InterpreterBuilder

    counted: dict[str, list[tuple[int, int]]] = {"load": [], "store": []}
    load, store = InterpreterBuilder.create_masked_load, InterpreterBuilder.create_masked_store

    def note(kind, pointers, mask):
        addresses = pointers.data[mask.data]
        if addresses.size:
            size = addresses.size * pointers.get_element_ty().primitive_bitwidth // 8
            counted[kind].append((int(addresses.min()), size))

    def counting_load(self, pointers, mask, *rest, **more):
        note("load", pointers, mask)
        return load(self, pointers, mask, *rest, **more)

    def counting_store(self, pointers, value, mask, *rest, **more):
        note("store", pointers, mask)
        return store(self, pointers, value, mask, *rest, **more)

    InterpreterBuilder.create_masked_load, InterpreterBuilder.create_masked_store = counting_load, counting_store
    try:
        yield counted
    finally:
        InterpreterBuilder.create_masked_load, InterpreterBuilder.create_masked_store = load, store


@pytest.mark.skipif(DEVICE == "cuda", reason="loads and stores are counted in the interpreter")
@pytest.mark.parametrize("tail", [False, True])
@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("layout", DENSE)
def test_counted_bytes_are_those_of_the_plan(layout, strategy, tail):
    """Every load and store of a call, forward and backward: the tensor's and the mask's passes exactly as planned."""
    case = Case((4, 64, 8, 8), 16, torch.bfloat16, layout, post_act="relu" if tail else None, residual=tail)
    plans = plans_for(case, strategy)
    with launch.using(plans):
        args, dy, _ = arguments(case)
        n = case.shape[0]
        tensor = math.prod(case.shape) * 2
        for problem, plan in plans.items():
            with counted_accesses() as counted:
                if problem.backward:
                    results = BACKWARD(dy, None, *args[:5], *kept[1:], *args[6:], True, False, tail)  # noqa: F405
                    large = [args[0], dy, results[0], *([results[5]] if tail else [])]
                    mask = kept[3]  # noqa: F405
                else:
                    kept = FORWARD(*args, True)
                    large = [t for t in (args[0], args[5], kept[0]) if t is not None]
                    mask = kept[3]

            def within(t, kind, counted=counted):
                start = t.untyped_storage().data_ptr()
                end = start + t.untyped_storage().nbytes()
                return sum(size for address, size in counted[kind] if start <= address < end)

            planned = count_bytes(problem, plan.tile, plan.strategy, n)
            passes = [within(t, kind) / tensor for t in large for kind in ("load", "store")]
            assert sum(passes) == planned["tensor"] / tensor == problem.passes, passes
            if tail:
                bits = within(mask, "load") + within(mask, "store")
                assert bits == planned["mask"] == (2 if problem.backward else 1) * tensor // 16


# ---------------------------------------------------------------------------------------------------- plans


def test_a_plan_of_another_layout_is_refused():
    case = FORMS["channels_last"]
    (problem, plan), *_ = plans_for(case).items()
    wrong = dataclasses.replace(plan, tile=dataclasses.replace(plan.tile, form="planes"))
    with launch.using({problem: wrong}), pytest.raises(ValueError, match="does not fit"):
        args, _, _ = arguments(case)
        FORWARD(*args, True)


@pytest.mark.skipif(DEVICE == "cuda", reason="about CPU tensors without the interpreter")
def test_cpu_tensors_without_the_interpreter(monkeypatch):
    monkeypatch.setattr(launch, "INTERPRETED", False)
    with pytest.raises(RuntimeError, match="TRITON_INTERPRET=1"):
        launch.on_device(torch.ones(1))


@pytest.mark.skipif(torch.version.hip is not None, reason="about NVIDIA's TF32")
def test_tf32_only_where_the_user_allows_it(monkeypatch):
    """What PyTorch's own matrix products may round to, the excitation's may; by default nothing."""
    precisions = []
    monkeypatch.setattr(launch, "INTERPRETED", False)
    monkeypatch.setattr(launch, "_recipe", lambda *arguments: precisions.append(arguments[-2]))
    x, w1 = torch.ones(2, 8, 4), torch.ones(2, 8)
    before = torch.backends.cuda.matmul.allow_tf32
    try:
        for allowed in (False, True):
            torch.backends.cuda.matmul.allow_tf32 = allowed
            call = call_of(x, w1, None, w1.t(), None, None, "relu", "sigmoid", "avg", "")
            launch._recipe_of(call, False, (32,), False, True)
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before
    assert precisions == ["ieee", "tf32"]


class HostTickets(Tickets):
    """As on a GPU, in the CPU's memory."""

    SIZE = 4096

    def _allocate(self):
        self.counters = torch.zeros(self.SIZE, dtype=torch.int32)


def test_tickets():
    """A stream's are its own, a captured call's are nobody else's, and when all are given away they are fresh."""
    tickets = HostTickets(torch.device("cpu"))
    before = tickets.get(8, 1, capturing=True)
    assert tickets.counters is None and before.numel() == 8  # nothing may be allocated for good during a capture
    first, second = tickets.get(8, 1, False), tickets.get(8, 2, False)
    assert tickets.get(5, 1, False) is first and tickets.get(8, 2, False) is second
    graph = [tickets.get(8, 1, True) for _ in range(3)]
    larger = tickets.get(1500, 1, False)
    assert tickets.get(8, 1, False) is larger
    taken = [first, second, larger, *graph]
    spans = sorted((t.data_ptr(), t.data_ptr() + 4 * t.numel()) for t in taken)
    assert all(end <= start for (_, end), (start, _) in zip(spans, spans[1:], strict=False))
    for capturing in (False, True):
        fresh = tickets.get(2000, 3, capturing)
        assert fresh.numel() == 2000 and not fresh.any()
        assert fresh.untyped_storage().data_ptr() != tickets.counters.untyped_storage().data_ptr()


def test_constants_come_last_in_every_kernel():
    """launch.Kernel passes them by position to a kernel that is compiled already."""
    for name, function in vars(kernels).items():
        if name.endswith("_kernel"):
            constant = [p.annotation == "tl.constexpr" for p in _parameters(function)]
            assert constant == sorted(constant), name


def _parameters(function):
    import inspect

    return inspect.signature(getattr(function, "fn", function)).parameters.values()


# ---------------------------------------------------------------------------------------------------- GPUs


@ON_GPU
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_kernels_that_the_profiler_sees(strategy):
    from torch.profiler import ProfilerActivity, profile

    layer, x = layer_and_input("triton", strategy)
    dy = torch.randn_like(x)
    gradients(layer, x, dy)
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as profiled:
        gradients(layer, x, dy)
        torch.cuda.synchronize()
    seen = Counter(event.name for event in profiled.events() if event.name.endswith("_kernel"))
    assert seen == Counter([*SWEEPS, *BETWEEN[strategy], *BETWEEN_BACKWARD[strategy]])
