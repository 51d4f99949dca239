"""Block tails with statistics of several processes: two of them, on gloo, against one with the whole batch."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import nn

import senet_fused
from senet_fused import FusedSE
from senet_fused.tails import FusedSETail, block_tail

pytestmark = [
    pytest.mark.skipif(not torch.distributed.is_available(), reason="this torch has no torch.distributed"),
    pytest.mark.skipif(
        senet_fused.backends.native.problem() is not None, reason="the compiled CPU library is not installed"
    ),
]

C, RANKS = 6, 2
BACKENDS = ("cpu", "reference")
SPLITS = {"even": (3, 3), "uneven": (4, 2), "one value": (5, 1), "none": (6, 0)}
OPTIONS = {"plain": (True, False), "no gate": (False, True), "everything": (True, True)}
WAYS = ("module", "function")
CASES = list(itertools.product(BACKENDS, SPLITS, OPTIONS, WAYS))


def network(gated: bool, relu: bool, norm: type[nn.Module], backend: str | None = None) -> FusedSETail:
    torch.manual_seed(1)
    module = FusedSETail(norm(C), FusedSE(C, 2, bias=True) if gated else None, nn.ReLU() if relu else None).double()
    for t in (module.norm.weight, module.norm.bias):
        nn.init.normal_(t, 1.0)
    module.backend = backend
    return module


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
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=RANKS
    )
    results = {}
    for case in CASES:
        backend, split, options, way = case
        module = network(*OPTIONS[options], nn.SyncBatchNorm, backend)
        t = {k: v.split(SPLITS[split])[rank] for k, v in inputs(split).items()}
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
    torch.multiprocessing.spawn(worker, (str(folder),), nprocs=RANKS)
    return [torch.load(folder / f"{rank}.pt") for rank in range(RANKS)]


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
    for found, counts in results:
        names = ["cpu.tail_forward", "cpu.tail_backward"] if backend == "cpu" else ["reference.tail_forward"]
        assert counts == dict.fromkeys(names, 1)
        for name in ("running_mean", "running_var"):
            torch.testing.assert_close(found[name], expected[name], rtol=1e-12, atol=1e-12)
    for name in ("y", "dx", "dresidual"):
        whole = torch.cat([found[name] for found, _ in results])
        torch.testing.assert_close(whole, expected[name], rtol=1e-9, atol=1e-10, msg=lambda m, n=name: f"{n}: {m}")
    for name, _ in module.named_parameters():
        total = sum(found[name] for found, _ in results)
        torch.testing.assert_close(total, expected[name], rtol=1e-9, atol=1e-10, msg=lambda m, n=name: f"{n}: {m}")
    if way == "module":
        torch.testing.assert_close(results[0][0]["evaluation"], module.eval()(t["x"][:1]))


def test_the_statistics_are_not_those_of_one_process(ranks):
    """So that the comparison above would see it."""
    for case in CASES:
        if case[1] == "none":
            continue  # the other process has it all
        module = network(*OPTIONS[case[2]], nn.BatchNorm2d)
        module(inputs(case[1])["x"].split(SPLITS[case[1]])[0])
        assert not torch.allclose(module.norm.running_mean, ranks[0][case][0]["running_mean"], rtol=1e-3)


def test_second_derivatives_across_processes_are_refused(ranks):
    assert all("across processes" in results["second order"] for results in ranks)
