"""Fused layers in DistributedDataParallel and under FSDP2's fully_shard, on two gloo processes of this machine."""

from __future__ import annotations

import pytest
import torch
from peer_layers import MonaiSE, TorchvisionSE, TutorialSE
from torch import nn

import senet_fused
from senet_fused import fuse, fuse_report, unfuse

if torch.distributed.is_available():
    from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

pytestmark = [
    pytest.mark.processes,
    pytest.mark.skipif(not torch.distributed.is_available(), reason="this torch has no torch.distributed"),
    pytest.mark.skipif(
        senet_fused.explain(torch.empty(0)).backend == "reference",
        reason="without compiled code the original forward runs",
    ),
]

RANKS = 2
LAYERS = 3


class Block(nn.Module):
    def __init__(self, se):
        super().__init__()
        self.conv, self.se = nn.Conv2d(8, 8, 3, padding=1), se

    def forward(self, x):
        return torch.relu(self.se(self.conv(x)) + x)


class Network(nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks = nn.Sequential(
            Block(TutorialSE(8, 2)), Block(TorchvisionSE(8, 2)), Block(MonaiSE(2, 8, add_residual=True))
        )
        self.head = nn.Linear(8, 5)

    def forward(self, x):
        return self.head(self.blocks(x).mean((2, 3)))


def train(model, x, target, steps=3):
    optimiser = torch.optim.SGD(model.parameters(), lr=0.5, momentum=0.9)
    for _ in range(steps):
        optimiser.zero_grad()
        nn.functional.mse_loss(model(x), target).backward()
        optimiser.step()


def ddp(model):
    return nn.parallel.DistributedDataParallel(fuse(model))


def ddp_before(model):
    return fuse(nn.parallel.DistributedDataParallel(model))


def mesh():
    return init_device_mesh("cpu", (RANKS,))


def sharded(model):
    """fuse, then fully_shard on the blocks that hold the SE layers and on the whole."""
    fuse(model)
    for block in model.blocks:
        fully_shard(block, mesh=mesh())
    fully_shard(model, mesh=mesh())
    kinds = {type(p.data).__name__ for p in model.parameters()}
    assert kinds == {"DTensor"}
    rows = fuse_report(model).layers
    assert [row.status for row in rows] == ["original runs"] * LAYERS, "sharded weights are no plain tensors"
    assert all("one of its weights is a DTensor" in row.reason for row in rows)
    return model


def sharded_itself(model):
    """fully_shard on the SE layers, too, which changes their classes once more."""
    fuse(model)
    for block in model.blocks:
        fully_shard(block.se, mesh=mesh())
    fully_shard(model, mesh=mesh())
    with pytest.raises(RuntimeError, match="unfuse before"):
        unfuse(model)
    return model


def meta(model):
    """Made and fused without weights, sharded, and only then given any."""
    weights = model.state_dict()
    with torch.device("meta"):
        model = Network().double()
    model = sharded(model)
    model.to_empty(device="cpu")
    set_model_state_dict(model, weights, options=StateDictOptions(full_state_dict=True))
    return model


def sharded_first(model):
    """fuse finds weights that are not plain, and leaves the layers as they are."""
    fully_shard(model, mesh=mesh())
    with pytest.warns(UserWarning, match="3 left"):
        fuse(model)
    assert all("one of its weights is a DTensor" in row.reason for row in fuse_report(model))
    return model


WAYS = {way.__name__: way for way in (ddp, ddp_before, sharded, sharded_itself, meta, sharded_first)}


def worker(rank, folder):
    """All ways in one pair of processes, which take longer to start than to train."""
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=RANKS)
    saved = torch.load(f"{folder}/inputs.pt")
    x, target = saved["x"].chunk(RANKS)[rank], saved["target"].chunk(RANKS)[rank]
    for name, way in WAYS.items():
        model = Network().double()
        model.load_state_dict(saved["model"])
        parallel = way(model)
        senet_fused.reset_call_counts()
        train(parallel, x, target)
        full = [p.full_tensor() if hasattr(p, "full_tensor") else p for p in parallel.parameters()]
        result = ([p.detach() for p in full], senet_fused.call_counts())
        torch.save(result, f"{folder}/{name}{rank}.pt")
    torch.distributed.destroy_process_group()


def data():
    torch.manual_seed(0)
    x, target = torch.randn(4, 8, 6, 5, dtype=torch.float64), torch.randn(4, 5, dtype=torch.float64)
    return Network().double(), x, target


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    model, x, target = data()
    torch.save({"model": model.state_dict(), "x": x, "target": target}, folder / "inputs.pt")
    torch.multiprocessing.spawn(worker, (str(folder),), nprocs=RANKS)
    return folder


@pytest.mark.parametrize("way", WAYS)
def test_two_processes_train_like_one_with_twice_the_batch(way, folder):
    model, x, target = data()
    train(model, x, target)
    for rank in range(RANKS):
        weights, counts = torch.load(folder / f"{way}{rank}.pt")
        calls = 3 * LAYERS
        assert counts == ({} if way == "sharded_first" else {"cpu.forward": calls, "cpu.backward": calls})
        for got, p in zip(weights, model.parameters(), strict=True):
            torch.testing.assert_close(got, p.detach(), rtol=1e-10, atol=1e-12)
