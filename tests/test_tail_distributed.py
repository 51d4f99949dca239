"""Block tails with statistics of several processes: two of them, on gloo, against one with the whole batch.

GPU backends run on a GPU where there is one, else in Triton's interpreter or compiled for the host, in float32.
"""

from __future__ import annotations

import itertools

import cuda_runner
import pytest
import torch
from gpu_contract import DEVICE
from torch import nn

import senet_fused
from senet_fused import FusedSE, FusedSETail, block_tail
from senet_fused.backends import triton

pytestmark = [
    pytest.mark.skipif(not torch.distributed.is_available(), reason="this torch has no torch.distributed"),
    pytest.mark.skipif(
        senet_fused.backends.native.problem() is not None, reason="the compiled CPU library is not installed"
    ),
]

C, RANKS = 6, 2
GPU_PROBLEMS = {"triton": triton.problem(DEVICE), "cuda": cuda_runner.PROBLEM}
GPU_BACKENDS = tuple(name for name, problem in GPU_PROBLEMS.items() if problem is None)
BACKENDS = ("cpu", "reference", *GPU_BACKENDS)
SPLITS = {"even": (3, 3), "uneven": (4, 2), "one value": (5, 1), "none": (6, 0)}
OPTIONS = {"plain": (True, False), "no gate": (False, True), "everything": (True, True)}
WAYS = ("module", "function")
# How the group is named is the same for every backend.
CASES = [case for case in itertools.product(BACKENDS, SPLITS, OPTIONS, WAYS) if case[0] not in GPU_BACKENDS or
         case[3] == "module"]  # fmt: skip


def venue(backend: str) -> dict[str, object]:
    """Where and in which dtype a backend is tried."""
    if backend in GPU_BACKENDS:
        return {"device": DEVICE, "dtype": torch.float32}
    return {"device": "cpu", "dtype": torch.float64}


def network(gated: bool, relu: bool, norm: type[nn.Module], backend: str | None = None) -> FusedSETail:
    torch.manual_seed(1)
    module = FusedSETail(norm(C), FusedSE(C, 2, bias=True) if gated else None, nn.ReLU() if relu else None).double()
    for t in (module.norm.weight, module.norm.bias):
        nn.init.normal_(t, 1.0)
    module.backend = backend
    return module if backend is None else module.to(**venue(backend))


def inputs(split: str) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(len(split))
    shape = (sum(SPLITS[split]), C, *((1, 1) if split == "one value" else (3, 4)))
    x, residual, dy = torch.randn(3, *shape, generator=generator, dtype=torch.float64)
    factor = torch.rand(shape[0], generator=generator, dtype=torch.float64)
    return {"x": 3 * x + 1, "residual": residual, "dy": dy, "factor": factor}


def by_function(module: FusedSETail, x, residual, factor):
    """What the module does, by block_tail with the group named."""
    norm, se = module.norm, module.se
    gate = {} if se is None else {"w1": se.fc1.weight, "b1": se.fc1.bias, "w2": se.fc2.weight, "b2": se.fc2.bias}
    return block_tail(
        x, norm.running_mean, norm.running_var, norm.weight, norm.bias, **gate, training=True, residual=residual,
        post_act=None if module.act is None else "relu", factor=factor, group=torch.distributed.group.WORLD,
        backend=module.backend,
    )  # fmt: skip


def step(module: FusedSETail, call, t: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    x, residual = t["x"].detach().requires_grad_(), t["residual"].detach().requires_grad_()
    y = call(x, residual, t["factor"])
    y.backward(t["dy"])
    gradients = {k: p.grad for k, p in module.named_parameters()}
    running = {k: getattr(module.norm, k) for k in ("running_mean", "running_var")}
    return {"y": y.detach(), "dx": x.grad, "dresidual": residual.grad, **gradients, **running}


def worker(rank: int, folder: str) -> None:
    """All cases in one pair of processes, which take longer to start than to run."""
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=RANKS)
    if "cuda" in GPU_BACKENDS and DEVICE == "cpu":
        cuda_runner.host()
    results = {}
    for case in CASES:
        backend, split, options, way = case
        module = network(*OPTIONS[options], nn.SyncBatchNorm, backend)
        t = {k: v.split(SPLITS[split])[rank].to(**venue(backend)) for k, v in inputs(split).items()}
        call = module if way == "module" else lambda *a, m=module: by_function(m, *a)
        senet_fused.reset_call_counts()
        results[case] = step(module, call, t), senet_fused.call_counts()
        if way == "module":
            module.eval()  # needs no other process
            with torch.no_grad():
                results[case][0]["evaluation"] = module(t["x"][:1]) if rank == 0 else None
    try:
        w1, w2, x = torch.ones(2, C).double(), torch.ones(C, 2).double(), inputs("even")["x"].requires_grad_()
        y = block_tail(x, w1=w1, w2=w2, training=True, group=torch.distributed.group.WORLD, backend="cpu")
        first = torch.autograd.grad(y.square().sum(), x, create_graph=True)[0]
        torch.autograd.grad(first.sum(), x)
        results["second order"] = None
    except NotImplementedError as error:
        results["second order"] = str(error)
    torch.save(results, f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    if "cuda" in GPU_BACKENDS and DEVICE == "cpu":
        cuda_runner.host()  # built once
    torch.multiprocessing.spawn(worker, (str(folder),), nprocs=RANKS)
    return [torch.load(folder / f"{rank}.pt", map_location="cpu") for rank in range(RANKS)]


@pytest.mark.parametrize(("backend", "split", "options", "way"), CASES)
def test_two_processes_are_one_with_the_whole_batch(backend, split, options, way, ranks):
    """The oracle is nn.BatchNorm2d and the modules behind it. Weights' gradients are each process' share."""
    module = network(*OPTIONS[options], nn.BatchNorm2d)

    def stock(x, residual, factor):
        y = module.norm(x)
        if module.se is not None:
            with senet_fused.use_backend("reference"):
                y = module.se(y)
        y = y * factor[:, None, None, None] + residual
        return y if module.act is None else module.act(y)

    t = inputs(split)
    expected = step(module, stock, t)
    results = [results[backend, split, options, way] for results in ranks]
    dtype = venue(backend)["dtype"]
    narrow = dtype == torch.float32

    def assert_close(found, name, rtol, atol):
        found, limits = found.double(), {"rtol": 1e-4, "atol": 1e-5} if narrow else {"rtol": rtol, "atol": atol}
        torch.testing.assert_close(found, expected[name], **limits, msg=lambda m: f"{name}: {m}")

    for found, counts in results:
        names = [f"{backend}.tail_forward"] + [f"{backend}.tail_backward"] * (backend != "reference")
        assert counts == dict.fromkeys(names, 1) and all(t is None or t.dtype == dtype for t in found.values())
        for name in ("running_mean", "running_var"):
            assert_close(found[name], name, 1e-12, 1e-12)
    for name in ("y", "dx", "dresidual"):
        assert_close(torch.cat([found[name] for found, _ in results]), name, 1e-9, 1e-10)
    for name, _ in module.named_parameters():
        assert_close(sum(found[name] for found, _ in results), name, 1e-9, 1e-10)
    if way == "module":
        expected["evaluation"] = module.eval()(t["x"][:1])
        assert_close(results[0][0]["evaluation"], "evaluation", 1e-7, 1e-7)


def test_the_statistics_are_not_those_of_one_process(ranks):
    """So that the comparison above would see it."""
    for case in CASES:
        if case[1] == "none":
            continue  # the other process has it all
        module = network(*OPTIONS[case[2]], nn.BatchNorm2d)
        module(inputs(case[1])["x"].split(SPLITS[case[1]])[0])
        found = ranks[0][case][0]["running_mean"].double()
        assert not torch.allclose(module.norm.running_mean, found, rtol=1e-3)


def test_second_derivatives_across_processes_are_refused(ranks):
    assert all("across processes" in results["second order"] for results in ranks)
