"""fuse(model, tails=True): which blocks run with tails, that they compute the same, stay themselves, and when not."""

from __future__ import annotations

import copy
import pickle
import re
import warnings

import pytest
import torch
from peer_blocks import (
    DropBlock,
    DropPath,
    LegacyBasicBlock,
    LegacyBottleneck,
    MonaiBlock,
    TimmBasicBlock,
    TimmBottleneck,
)
from peer_layers import LegacySE, TimmSEModule
from torch import nn
from torch.nn.utils import parametrizations, prune

import senet_fused
from senet_fused import FusedSE, capture_gates, fuse, fuse_report, unfuse
from senet_fused.fusion.blocks import KNOWN_BLOCKS

compiled_only = pytest.mark.skipif(
    senet_fused.explain(torch.empty(0)).backend == "reference", reason="the modules run where there are no kernels"
)
pytestmark = compiled_only


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)
    senet_fused.reset_call_counts()


# name -> (block, its form, BatchNorms in it that run as tails, channels and spatial dimensions of its input)
BLOCKS = {
    "legacy": (LegacyBottleneck, "legacy SE bottleneck", 4, 12, 2),
    "legacy_stride": (lambda: LegacyBottleneck(stride=2), "legacy SE bottleneck", 4, 12, 2),
    "legacy_same": (lambda: LegacyBottleneck(32), "legacy SE bottleneck", 3, 32, 2),
    "legacy_fused_se": (lambda: LegacyBottleneck(se=FusedSE(32, 4)), "legacy SE bottleneck", 4, 12, 2),
    "timm": (TimmBottleneck, "timm bottleneck", 4, 12, 2),
    "timm_aa": (lambda: TimmBottleneck(stride=2, aa=True), "timm bottleneck", 4, 12, 2),
    "timm_drop_path": (lambda: TimmBottleneck(drop_path=DropPath()), "timm bottleneck", 4, 12, 2),
    "timm_drop_block": (lambda: TimmBottleneck(drop_block=DropBlock), "timm bottleneck", 4, 12, 2),
    "timm_silu": (lambda: TimmBottleneck(act=nn.SiLU), "timm bottleneck", 4, 12, 2),
    "timm_basic": (TimmBasicBlock, "timm basic block", 2, 8, 2),
    "timm_basic_drop_path": (lambda: TimmBasicBlock(drop_path=DropPath()), "timm basic block", 2, 8, 2),
    "monai_1d": (lambda: MonaiBlock(1), "MONAI SE block", 4, 12, 1),
    "monai_2d": (lambda: MonaiBlock(2), "MONAI SE block", 4, 12, 2),
    "monai_3d": (MonaiBlock, "MONAI SE block", 4, 12, 3),
    "monai_same": (lambda: MonaiBlock(2, 32), "MONAI SE block", 3, 32, 2),
}


def network(block):
    return nn.Sequential(block)


def pair(name):
    make, _, _, channels, dimensions = BLOCKS[name]
    stock = network(make()).double()
    with torch.no_grad():
        for p in stock.parameters():
            p.add_(0.1 * torch.randn_like(p))
    return stock, fuse(copy.deepcopy(stock), tails=True), torch.randn(3, channels, *(8, 7, 6)[:dimensions]).double()


def step(model, x):
    torch.manual_seed(1)
    x = x.detach().requires_grad_()
    y = model(x)
    named = dict(model.named_parameters())
    dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(2), dtype=y.dtype)
    gradients = torch.autograd.grad(y, (x, *named.values()), dy)
    return y.detach(), dict(zip(("", *named), gradients, strict=True)), dict(model.named_buffers())


def assert_same(ours, theirs, bound=1e-11):
    assert (ours[0] - theirs[0]).norm() <= bound * theirs[0].norm()
    for mine, other in zip(ours[1:], theirs[1:], strict=True):
        assert mine.keys() == other.keys()
        scale = max(t.double().norm() for t in other.values())
        for name, t in other.items():
            assert (mine[name].double() - t.double()).norm() <= bound * scale, name


def counts(**expected):
    assert senet_fused.call_counts() == {f"cpu.tail_{key}": value for key, value in expected.items()}


@pytest.mark.parametrize("name", BLOCKS)
def test_blocks(name):
    _, kind, norms, _, _ = BLOCKS[name]
    stock, fused, x = pair(name)
    report = fuse_report(fused)
    assert [(b.name, b.kind, b.status) for b in report.blocks] == [("0", kind, "fused")], str(report)
    for _ in range(2):  # and the running statistics of two steps
        ours = step(fused, x)
        counts(forward=norms, backward=norms)
        assert_same(ours, step(stock, x))
        senet_fused.reset_call_counts()
    fused.eval(), stock.eval()
    ours = step(fused, x)
    counts(forward=norms, backward=norms)
    assert_same(ours, step(stock, x))
    channels_last = {4: torch.channels_last, 5: torch.channels_last_3d}.get(x.dim())
    if channels_last is not None:
        stock, fused, x = (t.to(memory_format=channels_last) for t in (stock, fused, x))
        stock.train(), fused.train()
        ours, theirs = step(fused, x), step(stock, x)
        assert_same(ours, theirs)
        assert x.dim() == 5 or ours[0].stride() == theirs[0].stride()


@pytest.mark.parametrize("name", ["legacy", "timm_drop_path", "monai_3d"])
def test_untouched_and_undone(name):
    stock = network(BLOCKS[name][0]())
    fused = copy.deepcopy(stock)
    modules, kept = dict(fused.named_modules()), dict(fused.named_parameters())
    states = {path: {k: id(v) for k, v in vars(m).items()} for path, m in modules.items()}
    kinds = {path: type(m) for path, m in modules.items()}
    assert fuse(fused, tails=True) is fused
    assert list(fused.state_dict()) == list(stock.state_dict())
    assert all(dict(fused.named_parameters())[path] is p for path, p in kept.items())
    assert all(isinstance(m, kinds[path]) and dict(fused.named_modules())[path] is m for path, m in modules.items())
    assert type(fused[0]) is not kinds["0"]
    unfuse(fused)
    assert {path: type(m) for path, m in fused.named_modules()} == kinds
    assert {path: {k: id(v) for k, v in vars(m).items()} for path, m in fused.named_modules()} == states


def test_copies_and_pickles():
    _, fused, x = pair("timm")
    expected = step(copy.deepcopy(fused), x)
    for again in (copy.deepcopy(fused), pickle.loads(pickle.dumps(fused))):
        senet_fused.reset_call_counts()
        assert all(torch.equal(a, b) for a, b in zip(step(again, x)[1].values(), expected[1].values(), strict=True))
        counts(forward=4, backward=4)
        assert type(unfuse(again)[0]) is TimmBottleneck


def test_the_backend_can_be_changed_and_report_says_which():
    _, fused, x = pair("legacy")
    fuse(fused, backend="reference", tails=True)
    step(fused, x)
    assert senet_fused.call_counts() == {"reference.tail_forward": 4}
    assert fuse_report(fused).blocks[0].reason.endswith("backend reference")


def test_verify_false_says_so():
    model = fuse(network(LegacyBottleneck()), tails=True, verify=False)
    assert "not verified" in fuse_report(model).blocks[0].reason


@pytest.mark.parametrize("before", [True, False])
def test_synchronised_norms(before):
    """In one process they are BatchNorms, on CPUs, where PyTorch's own do not run in training."""
    stock, _, x = pair("legacy")
    synchronised = copy.deepcopy(stock)
    if before:
        synchronised = nn.SyncBatchNorm.convert_sync_batchnorm(synchronised)
    synchronised = fuse(synchronised, tails=True)
    if not before:
        synchronised = nn.SyncBatchNorm.convert_sync_batchnorm(synchronised)
    assert type(synchronised[0].bn3) is nn.SyncBatchNorm
    ours = step(synchronised, x)
    counts(forward=4, backward=4)
    assert_same(ours, step(stock, x))


def test_meta_blocks_are_proven():
    with torch.device("meta"):
        model = fuse(network(LegacyBottleneck()), tails=True)
    assert fuse_report(model).blocks[0].status == "fused" and model[0].bn1.weight.is_meta


# ------------------------------------------------------------------------------------------------ left


class Swapped(LegacyBottleneck):
    """Adds the shortcut before the SE layer."""

    def forward(self, x):
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.relu(self.bn2(self.conv2(out)))
        return self.relu(self.se_module(self.bn3(self.conv3(out)) + (self.downsample(x))))


class EvalOnly(LegacyBottleneck):
    """Differs in training alone."""

    def forward(self, x):
        return super().forward(x) * (1.001 if self.training else 1)


class Counting(LegacyBottleneck):
    def forward(self, x):
        y = super().forward(x)
        self.bn1.running_mean += 1.0
        return y


class HalfTheGradient(LegacyBottleneck):
    def forward(self, x):
        y = super().forward(x)
        return y.detach() + 0.5 * (y - y.detach())


class InPlace(LegacyBottleneck):
    def forward(self, x):
        y = super().forward(x)
        return y if self.training or x.requires_grad else y + 0 * x.add_(1).mean()


class Float32(LegacyBottleneck):
    def forward(self, x):
        return super().forward(x).float()


class EcaModule(nn.Module):
    def __init__(self, channels, _):
        super().__init__()
        self.conv = nn.Conv1d(1, 1, 3, padding=1)

    def forward(self, x):
        return x * self.conv(x.mean((2, 3))[:, None]).sigmoid()[:, 0, :, None, None]


def max_squeeze(channels, reduced):
    return TimmSEModule(channels, reduced, add_maxpool=True)


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (Swapped, "differs from the known forward"),
        (EvalOnly, "in training mode its output differs"),
        (Counting, r"0?bn1\.running_mean differs"),
        (HalfTheGradient, "in training mode the gradient of its input differs from the known forward's"),
        (InPlace, "it changes its input in place"),
        (Float32, "in training mode its output differs"),
        (LegacyBasicBlock, "BatchNorm -> ReLU -> SE"),
        (lambda: LegacyBottleneck(norm=lambda c: nn.GroupNorm(2, c)), "its bn1: it is a GroupNorm"),
        (lambda: TimmBottleneck(se=max_squeeze), "its squeeze is 'avgmax'"),
        (lambda: nn.Sequential(nn.Conv2d(3, 8, 1), nn.BatchNorm2d(8), nn.SiLU(), LegacySE(8, 2)), "is not covered"),
    ],
)
def test_blocks_that_are_left(make, reason):
    model = network(make())
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        fuse(model, tails=True)
    assert any("no block runs with tails" in str(w.message) and re.search(reason, str(w.message)) for w in caught)
    (block,) = fuse_report(model, tails=True).blocks
    assert block.status == "left" and re.search(reason, block.reason), block.reason
    assert fuse_report(model).layers[0].status == "fused"  # the SE layer by itself is


def test_other_attention_is_left():
    with pytest.warns(UserWarning, match="nothing was fused"):
        model = fuse(network(TimmBottleneck(se=EcaModule)), tails=True)
    (block,) = fuse_report(model, tails=True).blocks
    assert block.status == "left" and "its attention is EcaModule: a 1-D convolution" in block.reason


def test_a_block_without_attention_is_none():
    with pytest.warns(UserWarning, match="nothing was fused"):
        model = fuse(network(TimmBottleneck(se=None)), tails=True)
    assert fuse_report(model, tails=True).blocks == ()


def test_a_tail_of_ones_own_is_no_layer():
    """Its name is like one's; the layer inside it is one."""
    model = nn.Sequential(
        senet_fused.FusedSETail(nn.BatchNorm2d(8), None, nn.ReLU()),
        senet_fused.FusedSETail(nn.BatchNorm2d(8), FusedSE(8, 2)),
        senet_fused.FusedSETail(nn.BatchNorm2d(8), LegacySE(8, 2)),
    )
    assert [(layer.name, layer.fused) for layer in fuse_report(model).layers] == [("1.se", True), ("2.se", False)]
    x = torch.randn(2, 8, 5, 4)
    wanted = model(x)
    fuse(model)
    assert [layer.fused for layer in fuse_report(model).layers] == [True, True]
    torch.testing.assert_close(model(x), wanted)


def test_a_report_foretells():
    model = network(LegacyBottleneck())
    assert fuse_report(model).blocks == ()
    (block,) = fuse_report(model, tails=True).blocks
    assert (block.status, block.norms, type(model[0])) == ("can be fused", 3, LegacyBottleneck)
    text = str(fuse_report(model, tails=True))
    assert "legacy SE bottleneck" in text and "1 block: 1 can be fused" in text


def test_every_known_block_is_reached():
    reached = {form for _, form, *_ in BLOCKS.values()} | {"legacy SE basic block"}
    assert reached == set(KNOWN_BLOCKS)


# ------------------------------------------------------------------------------------------------ at call time


def alter(block, how):
    if how == "hook on a norm":
        block.bn3.register_forward_hook(lambda m, i, y: 2 * y)
    elif how == "hook on an inner norm":
        block.bn1.register_forward_pre_hook(lambda m, i: (i[0] + 1,))
    elif how == "hook on the SE layer":
        block.se_module.register_forward_hook(lambda m, i, y: y + 1)
    elif how == "hook on the activation":
        block.relu.register_forward_hook(lambda m, i, y: y + 1)
    elif how == "another norm":
        block.bn3 = nn.InstanceNorm2d(32).double()
    elif how == "weight norm":
        block.se_module.fc1 = parametrizations.weight_norm(block.se_module.fc1)
    elif how == "pruned":
        prune.l1_unstructured(block.se_module.fc2, "weight", 0.5)
    elif how == "another activation":
        block.relu = nn.LeakyReLU(0.3)


@pytest.mark.parametrize(
    ("how", "tails", "reason"),
    [
        ("hook on a norm", 3, "bn3: its BatchNorm: it has hooks"),
        ("hook on an inner norm", 3, "bn1: its BatchNorm: it has hooks"),
        ("hook on the SE layer", 3, "bn3: its SE layer has hooks"),
        ("hook on the activation", 1, None),
        ("another norm", 3, "bn3: its BatchNorm: it is a InstanceNorm2d"),
        ("weight norm", 3, "bn3: its fc1"),
        ("pruned", 3, "bn3: .*fc2"),
        ("another activation", 4, None),
    ],
)
def test_what_has_changed_since_is_called(how, tails, reason):
    """Every tail decides for itself: the others still run."""
    stock, fused, x = pair("legacy")
    state = torch.get_rng_state()
    alter(stock[0], how)
    torch.set_rng_state(state)
    alter(fused[0], how)
    fused.load_state_dict(stock.state_dict())
    senet_fused.reset_call_counts()
    assert_same(step(fused, x), step(stock, x))
    assert senet_fused.call_counts()["cpu.tail_forward"] == tails
    (block,) = fuse_report(fused).blocks
    assert (block.status == "original runs") == (reason is not None)
    assert reason is None or re.search(reason, block.reason), block.reason


class Twice(LegacySE):
    def forward(self, x):
        return 2 * super().forward(x)


def test_another_se_layer_is_called(monkeypatch):
    stock, fused, x = pair("legacy")
    stock[0].se_module = Twice(32, 4).double()
    fused[0].se_module = copy.deepcopy(stock[0].se_module)
    assert_same(step(fused, x), step(stock, x))
    assert senet_fused.call_counts()["cpu.tail_forward"] == 3
    assert "its SE layer was a LegacySE and is a Twice" in fuse_report(fused).blocks[0].reason
    _, fused, x = pair("legacy")
    stock = unfuse(copy.deepcopy(fused))
    monkeypatch.setattr(LegacySE, "forward", lambda self, x: 3 * x)
    torch.testing.assert_close(fused(x), stock(x))


def test_what_drops_paths_is_pinned():
    """Replaced or with hooks it is called, with the branch; in evaluation, too."""
    stock, fused, x = pair("timm_drop_path")
    seen = []
    for model in (stock, fused):
        model[0].drop_path.register_forward_hook(lambda m, i, y: seen.append(i[0].shape))
        model.eval()
    assert_same(step(fused, x), step(stock, x))
    assert seen[0] == seen[1] and len(seen) == 2
    assert "drop_path" in fuse_report(fused).blocks[0].reason
    stock, fused, x = pair("timm_drop_path")
    for model in (stock, fused):
        model[0].drop_path = nn.Dropout(0.5)
    assert_same(step(fused, x), step(stock, x))


def test_dropout_in_the_place_of_drop_path_is_left():
    with pytest.warns(UserWarning, match="does not drop whole samples"):
        fuse(network(TimmBottleneck(drop_path=nn.Dropout(0.0))), tails=True)


def test_hooks_for_all_modules_see_the_modules():
    stock, fused, x = pair("timm_drop_path")
    seen = {}
    for name, model in (("stock", stock), ("fused", fused)):
        handle = nn.modules.module.register_module_forward_hook(
            lambda m, i, y, name=name: seen.setdefault(name, []).append(getattr(type(m), "__name__", ""))
        )
        model(x)
        handle.remove()
    assert [kind.removeprefix("Fused") for kind in seen["fused"]] == seen["stock"]


@pytest.mark.parametrize("name", ["timm_basic", "monai_same", "legacy_same"])
def test_the_dtype_of_an_addition_in_place(name):
    """Under autocast a float32 shortcut is added to a bfloat16 branch: in place it stays bfloat16."""
    stock, fused, x = pair(name)
    stock, fused, x = stock.float(), fused.float(), x.float()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert fused(x).dtype == stock(x).dtype


def test_a_replaced_forward_runs(monkeypatch):
    _, fused, x = pair("legacy")
    monkeypatch.setattr(LegacyBottleneck, "forward", lambda self, x: x + 1)
    assert torch.equal(fused(x), x + 1)
    assert fuse_report(fused).blocks[0].status == "original runs"


def test_gates_are_captured():
    _, fused, x = pair("timm")
    expected = fused(x).detach()
    with capture_gates(fused) as gates:
        y = fused(x)
    (calls,) = gates.values()
    assert len(calls) == 1 and calls[0].shape == (3, 32)
    assert (y - expected).norm() <= 1e-11 * expected.norm()


def test_hooks_of_the_block_run():
    _, fused, x = pair("legacy")
    seen = []
    fused[0].register_forward_hook(lambda m, i, y: seen.append(y))
    assert fused(x) is seen[0]
    counts(forward=4)


# ------------------------------------------------------------------------------------------------ PyTorch's tools


@pytest.mark.compiler
@pytest.mark.parametrize("name", ["legacy", "timm_drop_path", "monai_2d"])
def test_compile_in_one_graph(name):
    stock, fused, x = pair(name)
    compiled = torch.compile(fused, fullgraph=True)
    senet_fused.reset_call_counts()
    if "drop" in name:  # random numbers of a compiled graph are others
        stock.eval(), fused.eval()
    assert_same(step(compiled._orig_mod, x)[:1], step(stock, x)[:1])
    senet_fused.reset_call_counts()
    y = compiled(x)
    y.sum().backward()
    norms = BLOCKS[name][2]
    counts(forward=norms, backward=norms)
    z = stock(x)
    assert (y - z).norm() <= 1e-10 * z.norm()


def test_export_holds_pytorchs_operators():
    stock, fused, x = pair("legacy")
    stock.eval(), fused.eval()
    program = torch.export.export(fused, (x,)).module()
    senet_fused.reset_call_counts()
    assert (program(x) - stock(x)).norm() <= 1e-11 * stock(x).norm()
    assert senet_fused.call_counts() == {}


def test_tracers_see_pytorchs_operators():
    stock, fused, x = pair("legacy")
    stock.eval(), fused.eval()
    for traced in (torch.jit.trace(fused, (x,)), torch.fx.symbolic_trace(fused)):
        assert (traced(x) - stock(x)).norm() <= 1e-11 * stock(x).norm()
    y, dy = torch.func.jvp(fused, (x,), (x,))
    assert torch.allclose(y, stock(x)) and torch.allclose(dy, torch.func.jvp(stock, (x,), (x,))[1])


@pytest.mark.parametrize("dtype", [torch.bfloat16, None], ids=["bfloat16", "autocast"])
def test_low_precision(dtype):
    """As near to float64 as stock is, within twice its error."""
    stock, _, x = pair("legacy")
    expected = stock(x)
    stock = copy.deepcopy(stock).to(dtype or torch.float32)
    fused = fuse(copy.deepcopy(stock), tails=True)
    x = x.to(dtype or torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype is None):
        ours, theirs = fused(x), stock(x)
    counts(forward=4)
    assert ours.dtype == theirs.dtype
    errors = [(y.double() - expected).norm() / expected.norm() for y in (ours, theirs)]
    assert errors[0] <= 2 * errors[1] + 2**-9, errors


def test_the_output_of_batch_norm_is_not_saved():
    """Unique storages that autograd keeps: of the tails x, the mask and small vectors, but no output of a BatchNorm."""
    model = network(LegacyBottleneck(32)).float()
    x = torch.randn(4, 32, 16, 16)

    def saved_bytes(model):
        kept, own = {}, {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}

        def pack(t):
            storage = t.untyped_storage()
            if storage.data_ptr() not in own:
                kept[storage.data_ptr()] = storage
            return t

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            y = model(x)
        del y
        return sum(s.nbytes() for s in kept.values())

    stock = saved_bytes(model)
    tails = saved_bytes(fuse(copy.deepcopy(model), tails=True))
    # The gate multiplies BatchNorm's output: stock keeps it, 4 x 32 x 16 x 16 floats; a mask is a 32nd of its tensor.
    assert stock - tails >= 0.8 * 4 * 32 * 16 * 16 * 4, (stock, tails)
