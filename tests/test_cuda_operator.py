"""The CUDA backend as an operator: opcheck, torch.compile, both paths, batches, launches, bad input; on a GPU also
streams, CUDA graphs and what the profiler counts."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from cuda_runner import PROBLEM, cuda_kernels, expected_launches, planning, run  # noqa: F401
from gpu_contract import DEVICE, STRATEGIES
from gpu_operator_contract import *  # noqa: F403
from gpu_operator_contract import CASES, ON_GPU, arguments, gradients, layer_and_input
from layer_operator import Forward
from oracle import draw
from test_cuda_kernels import KINDS

from senet_fused.backends import cuda
from senet_fused.ops import empty_mask

pytestmark = [
    pytest.mark.skipif(PROBLEM is not None, reason=str(PROBLEM)),
    pytest.mark.usefixtures("cuda_kernels"),
]
FORWARD = Forward("cuda")


@pytest.fixture
def backend_name():
    return "cuda"


@pytest.fixture
def using_strategy():
    return lambda case, strategy: cuda.using(planning(strategy))


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("kind", KINDS)
def test_bits_do_not_depend_on_the_run_or_the_batch(kind, strategy):
    case = KINDS[kind]
    case = case.replace(shape=(5, *case.shape[1:]))
    with cuda.using(planning(strategy, **({"samples": 2} if kind == "channels_last" else {}))):
        inputs = draw(case, 0)
        batch, again = run(case, inputs), run(case, inputs)
        assert all(torch.equal(batch[name], again[name]) for name in batch)
        for chosen in ([3], [1, 4]):
            alone = run(case, {k: t[chosen] if k in ("x", "dy", "dgate", "residual") else t for k, t in inputs.items()})
            for name in ("y", "gate", "dx"):
                assert torch.equal(alone[name], batch[name][chosen]), name


def test_a_tensor_that_is_not_aligned_gives_the_same_bits():
    """Elements are then read one by one, and added in the same order."""
    for kind in ("channels_last", "planes", "tile_of_planes"):
        case = KINDS[kind].replace(residual=True, post_act="relu")
        inputs = draw(case, 0)
        misaligned = dict(inputs)
        for name in ("x", "residual", "dy"):
            t = inputs[name]
            storage = t.new_empty(t.numel() + 1)
            misaligned[name] = storage[1:].as_strided(t.shape, t.stride(), 1).copy_(t)
        assert misaligned["x"].data_ptr() % 16 != 0
        expected, found = run(case, inputs), run(case, misaligned)
        for name in expected:
            assert torch.equal(found[name], expected[name]), (kind, name)


def test_a_second_call_plans_nothing(monkeypatch):
    case = KINDS["planes"]
    inputs = draw(case, 0)
    run(case, inputs)
    monkeypatch.setattr(cuda, "plan_of", None)
    run(case, inputs)


# ---------------------------------------------------------------------------------------------------- bad input


def library_arguments(strategy: str = "last_block"):
    """Those of the library's own forward for a small layer, by name, and the operator."""
    x, w1, w2 = (torch.randn(size, device=DEVICE) for size in ((3, 16, 4, 4), (4, 16), (16, 4)))
    y, gate, saved, mask = torch.empty_like(x), x.new_empty(3, 16), x.new_empty(3, 20), empty_mask(x, False)
    problem = cuda.Problem(3, 16, 4, 16, 4, 4, False, "avg", True)
    plan = planning(strategy)(problem, cuda.device_facts(x.device))
    names = ("strategy", "form", "samples", "channels", "positions", "lanes", "dependent_launch", "stream_stores")
    workspace = x.new_empty(cuda._plan.cuda_workspace(problem.native(), plan, True, True))
    found = {
        "x": x, "w1": w1, "b1": None, "w2": w2, "b2": None, "residual": None, "act": 1, "act_p0": 0.0, "gate_fn": 10,
        "gate_p0": 0.0, "gate_p1": 0.0, "squeeze": 0, "relu": 1, "channels_last": False, "y": y, "gate": gate,
        "saved": saved, "mask": mask, "workspace": workspace,
        "counters": torch.zeros(3, dtype=torch.int32, device=DEVICE), **dict(zip(names, plan.numbers(), strict=True)),
    }  # fmt: skip
    return found, cuda._operators[DEVICE][0]


BAD = {
    "workspace too small": ({"workspace": 5}, "workspace must have"),
    "no counters": ({"counters": None}, "this plan needs 3 counters"),
    "too few counters": ({"counters": 2}, "this plan needs 3 counters"),
    "float64": ({"x": "double"}, "x must be float32, bfloat16 or float16"),
    "w2 of another shape": ({"w2": (4, 16)}, r"w2 must be \[16, 4\], got \[4, 16\]"),
    "unknown strategy": ({"strategy": 3}, "unknown plan"),
    "unknown form": ({"form": -1}, "unknown plan"),
    "another layout's form": ({"form": 0, "channels": 16}, "the form does not fit the layout"),
    "no channels": ({"channels": 0}, "the splits do not cover the positions"),
    "channels beyond a tile's": ({"channels": 2000}, "at most 1024 channels"),
    "lanes": ({"lanes": 12}, "a power of two of threads"),
    "split planes of several channels": ({"positions": 8, "channels": 4}, "split planes come one at a time"),
    "a maximum as a sum of shares": ({"squeeze": 1}, "the strategy must be launches"),
    "unknown act": ({"act": 12}, "unknown function code"),
}


@pytest.mark.parametrize("name", BAD)
def test_the_library_refuses_what_does_not_fit(name):
    changes, message = BAD[name]
    arguments, operator = library_arguments()
    operator(*arguments.values())
    for key, value in changes.items():
        if value == "double":
            arguments[key] = arguments[key].double()
        elif isinstance(value, tuple):
            arguments[key] = torch.zeros(value, device=DEVICE)
        elif isinstance(value, int) and isinstance(arguments[key], torch.Tensor):
            arguments[key] = arguments[key][:value]
        else:
            arguments[key] = value
    with pytest.raises(RuntimeError, match=message):
        operator(*arguments.values())


def test_without_kernels_for_a_device(monkeypatch):
    """By name there is no fallback, not even when selection was bypassed."""
    monkeypatch.setattr(cuda, "_operators", {})
    args, _, _ = arguments(CASES["plain"])
    with pytest.raises(RuntimeError, match="the cuda backend cannot serve this call: "):
        FORWARD(*args, True)


# ---------------------------------------------------------------------------------------------------- GPUs


@ON_GPU
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_kernels_that_the_profiler_sees(strategy):
    from torch.profiler import ProfilerActivity, profile

    layer, x = layer_and_input("cuda", strategy)
    dy = torch.randn_like(x)
    gradients(layer, x, dy)
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as profiled:
        gradients(layer, x, dy)
        torch.cuda.synchronize()
    names = [event.name.partition("(")[0].partition("<")[0].rpartition(":")[2] for event in profiled.events()]
    assert Counter(n for n in names if n.endswith("_kernel")) == expected_launches("channels_last", strategy)
