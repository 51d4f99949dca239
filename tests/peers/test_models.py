"""Networks of other libraries, stock and fused: what is found and what untouched, outputs, training, PyTorch's tools.

Everything is compared in float64, where nothing hides in rounding. A network is made once, copied, and the copy fused.
"""

from __future__ import annotations

import collections
import copy
import dataclasses
import functools
import math
import pickle
import subprocess
import sys
import warnings

import pytest
import torch
from models import PEERS, REPRESENTATIVES, Peer
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils import _pytree as pytree

import senet_fused
from senet_fused import fuse_report, unfuse

pytestmark = pytest.mark.networks
every_peer = pytest.mark.parametrize("peer", PEERS, ids=str)
# Every fourth network and one of each library; -m "slow or not slow" runs all, in twice the time.
_RUN = [peer for peer in PEERS if peer.shape and peer.fused]
every_run = pytest.mark.parametrize(
    "peer",
    [
        pytest.param(peer, id=str(peer), marks=() if i % 4 == 0 or peer in REPRESENTATIVES else pytest.mark.slow)
        for i, peer in enumerate(_RUN)
    ],
)
one_a_library = pytest.mark.parametrize("peer", REPRESENTATIVES, ids=str)

BACKEND = senet_fused.explain(torch.empty(0)).backend
assert BACKEND != "reference", "without compiled code the original forward runs, and nothing would be tested"

# By name: a gate alone is left to PyTorch on a CPU by "auto".
fuse = functools.partial(senet_fused.fuse, backend=BACKEND)

# Relative to the norm; sums in another order, through up to fifty layers with batch norms of a few values.
BOUND = 1e-9
# Relative to the norm of all gradients: that of a bias in front of a batch norm is zero, and rounding all that is left.
NOISE = 1e-13


@pytest.fixture
def exact_hardsigmoid(monkeypatch):
    """PyTorch's own derivative of the hard sigmoid is float32's 1/6 for float64 too, 3e-8 too large."""
    monkeypatch.setattr(F, "hardsigmoid", lambda x, inplace=False: F.relu6(x + 3) / 6)


def prepared(peer: Peer) -> tuple[nn.Module, Tensor]:
    """A network and an input.

    All its weights are random, as some that begin with zero would hide SE layers, and others so small that no gradient
    reaches them. Its running statistics are those of the input, so that values neither vanish nor overflow.
    """
    torch.manual_seed(0)
    model = peer.build().double()
    model.train()
    x = torch.randn(peer.shape, dtype=torch.float64)
    momenta = {m: m.momentum for m in model.modules() if getattr(m, "momentum", None) is not None}
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() <= 1:
                parameter += 0.1 * torch.randn_like(parameter)
            else:
                parameter.normal_(std=math.prod(parameter.shape[1:]) ** -0.5)
        for module in momenta:
            module.momentum = 1.0
        model(x)
    for module, momentum in momenta.items():
        module.momentum = momentum
    return model, x


def fused_copy(model: nn.Module, backend: str | None = BACKEND) -> nn.Module:
    return fuse(copy.deepcopy(model), backend=backend)


def outputs(model: nn.Module, x: Tensor) -> list[Tensor]:
    return [y for y in pytree.tree_leaves(model(x)) if isinstance(y, Tensor) and y.is_floating_point()]


def evaluate(model: nn.Module, x: Tensor) -> list[Tensor]:
    model.eval()
    with torch.no_grad():
        return outputs(model, x)


def training_step(model: nn.Module, x: Tensor, optimiser: torch.optim.Optimizer) -> tuple[float, dict[str, Tensor]]:
    """The loss and all gradients of one step, that of the input under the name ""; dropout draws as last time."""
    torch.manual_seed(1)
    model.train()
    x = x.detach().requires_grad_()
    optimiser.zero_grad()
    ys = outputs(model, x)
    loss = sum((y * torch.randn_like(y)).sum() / y.numel() ** 0.5 for y in ys)
    loss.backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    optimiser.step()
    return loss.item(), {"": x.grad, **gradients}


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)


def layers_of(fused: nn.Module) -> list[str]:
    return [layer.name for layer in fuse_report(fused) if layer.fused]


def calls_of(model: nn.Module, layers: list[str], x: Tensor) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
    """The strides of what the layers of these names take and return, for every call of one."""
    strides = []

    def note(_: nn.Module, inputs: tuple[Tensor, ...], y: Tensor) -> None:
        strides.append((inputs[0].stride(), y.stride()))

    hooks = [model.get_submodule(name).register_forward_hook(note) for name in layers]
    evaluate(model, x)
    for hook in hooks:
        hook.remove()
    return strides


def noise_of(stock: nn.Module, x: Tensor, expected: list[Tensor]) -> float:
    """What the last bit of its input makes of a network's output."""
    disturbed = evaluate(stock, x * (1 + 2**-52))
    return max(((a - b).norm() / b.norm()).item() for a, b in zip(disturbed, expected, strict=True))


def assert_close(ours: list[Tensor], stock: list[Tensor], bound: float = BOUND) -> None:
    assert len(ours) == len(stock) > 0
    for a, b in zip(ours, stock, strict=True):
        assert a.shape == b.shape and a.dtype == b.dtype and b.norm() > 0
        assert (error := ((a - b).norm() / b.norm()).item()) <= bound, error


def assert_equal(ours: list[Tensor], stock: list[Tensor]) -> None:
    assert len(ours) == len(stock) > 0
    assert all(torch.equal(a, b) for a, b in zip(ours, stock, strict=True))


def assert_same_training(model: nn.Module, ours: tuple, stock: tuple) -> None:
    """Losses and all gradients agree, and those of the SE layers' weights say something."""
    (our_loss, our_gradients), (loss, gradients) = ours, stock
    assert abs(our_loss - loss) <= BOUND * abs(loss)
    assert our_gradients.keys() == gradients.keys()
    total = torch.stack([g.norm() for g in gradients.values()]).norm()
    for name, g in gradients.items():
        error = (our_gradients[name] - g).norm()
        assert error <= BOUND * g.norm() + NOISE * total, (name, (error / g.norm()).item())
    # Those of a gate alone too, whose original runs with auto.
    layers = tuple(f"{layer.name}.".lstrip(".") for layer in fuse_report(model) if layer.status != "left")
    weights = [g.norm() for name, g in gradients.items() if name and name.startswith(layers)]
    # A layer with one or two channels in its bottleneck may have no ReLU open.
    assert sum(bool(norm > 100 * NOISE * total) for norm in weights) >= 0.75 * len(weights) > 0


# ------------------------------------------------------------------------------------------- found, and untouched


@every_peer
def test_what_is_found(peer):
    """Also that fuse works on the meta device, where most of the networks are made here."""
    with torch.device("meta" if peer.on_meta else "cpu"):
        model = peer.build()
    keys = list(model.state_dict())
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert fuse(model) is model
    assert any("nothing was fused" in str(w.message) for w in caught) == (not peer.fused)
    report = fuse_report(model)
    counts = {status: collections.Counter() for status in ("fused", "left")}
    for layer in report:
        counts[layer.status][layer.kind] += 1
        assert layer.fused or peer.why in layer.reason
    assert counts == {"fused": peer.fused, "left": peer.left}, str(report)
    assert list(model.state_dict()) == keys
    assert not peer.on_meta or all(p.is_meta for p in model.parameters())


@one_a_library
def test_a_report_foretells_what_fuse_does(peer):
    model = peer.build()
    foretold = [dataclasses.replace(layer, status="", reason="") for layer in fuse_report(model)]
    assert fuse_report(model).count("can be fused") == len(foretold)
    assert [dataclasses.replace(layer, status="", reason="") for layer in fuse_report(fuse(model))] == foretold


def state_of(model: nn.Module) -> dict[str, tuple]:
    """Everything that a model's modules hold, one level deep, by identity."""
    return {
        name: (
            type(module),
            {k: id(v) for k, v in vars(module).items()},
            {k: {n: id(t) for n, t in v.items()} for k, v in vars(module).items() if isinstance(v, dict)},
        )
        for name, module in model.named_modules(remove_duplicate=False)
    }


@every_run
def test_untouched_and_undone(peer):
    model = peer.build()
    model.eval()
    keys, state = list(model.state_dict()), state_of(model)
    kept = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    modules = dict(model.named_modules())
    fuse(model)
    assert list(model.state_dict()) == keys
    now = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    assert list(now) == list(kept) and all(now[name] is t for name, t in kept.items())
    same = dict(model.named_modules())
    assert list(same) == list(modules) and all(same[name] is module for name, module in modules.items())
    assert all(isinstance(module, state[name][0]) for name, module in modules.items())
    assert all(module.training is False for module in modules.values())
    converted = {name for name, module in modules.items() if type(module) is not state[name][0]}
    assert converted == set(layers_of(model))
    unfuse(model)
    assert state_of(model) == state


# ----------------------------------------------------------------------------------------------- outputs, training


@every_run
def test_outputs(peer):
    stock, x = prepared(peer)
    fused = fused_copy(stock)
    layers = layers_of(fused)
    calls, expected = len(calls_of(stock, layers, x)), evaluate(stock, x)
    assert calls and len(layers) == sum(peer.fused.values())
    assert senet_fused.call_counts() == {}
    got = evaluate(fused, x)
    assert senet_fused.call_counts() == {f"{BACKEND}.forward": calls}
    assert_close(got, expected, 1e-12 + 10 * noise_of(stock, x, expected))
    for again in (copy.deepcopy(fused), *([pickle.loads(pickle.dumps(fused))] if peer.pickles else [])):
        senet_fused.reset_call_counts()
        assert_equal(evaluate(again, x), got)
        assert senet_fused.call_counts() == {f"{BACKEND}.forward": calls}
        assert_equal(evaluate(unfuse(again), x), expected)
    senet_fused.reset_call_counts()
    assert_equal(evaluate(unfuse(fused), x), expected)
    assert senet_fused.call_counts() == {}


@every_run
def test_training_step(peer, exact_hardsigmoid):
    stock, x = prepared(peer)
    fused = fused_copy(stock)
    layers = layers_of(fused)
    calls = len(calls_of(stock, layers, x))
    before = copy.deepcopy(stock.state_dict())
    expected = training_step(stock, x, sgd(stock))
    assert senet_fused.call_counts() == {}
    got = training_step(fused, x, sgd(fused))
    assert senet_fused.call_counts() == {f"{BACKEND}.forward": calls, f"{BACKEND}.backward": calls}
    assert_same_training(fused, got, expected)
    moved = 0
    for (name, t), ours in zip(stock.state_dict().items(), fused.state_dict().values(), strict=True):
        if t.is_floating_point():
            assert (ours - t).norm() <= BOUND * t.norm(), name
        else:
            assert torch.equal(ours, t), name
        moved += not torch.equal(t, before[name])
    assert moved > len(expected[1]) / 2


@one_a_library
def test_without_a_backend_by_name(peer):
    """The layers that are reported as fused run fused, and no others."""
    stock, x = prepared(peer)
    fused = fused_copy(stock, None)
    report = fuse_report(fused)
    assert all(layer.fused or layer.status == "original runs" and layer.form == "gate" for layer in report)
    calls, expected = len(calls_of(stock, layers_of(fused), x)), evaluate(stock, x)
    got = evaluate(fused, x)
    assert senet_fused.call_counts() == ({f"{BACKEND}.forward": calls} if calls else {})
    assert_close(got, expected)


# ------------------------------------------------------------------------------- checkpoints, optimisers, processes


@one_a_library
def test_checkpoints_go_both_ways(peer):
    stock, x = prepared(peer)
    expected = evaluate(stock, x)
    torch.manual_seed(2)
    other = fuse(peer.build().double())
    other.load_state_dict(stock.state_dict(), strict=True)
    assert_close(evaluate(other, x), expected)
    torch.manual_seed(3)
    plain = peer.build().double()
    plain.load_state_dict(other.state_dict(), strict=True)
    assert_equal(evaluate(plain, x), expected)


@one_a_library
def test_an_optimiser_from_before_trains_on(peer, exact_hardsigmoid):
    stock, x = prepared(peer)
    fused = copy.deepcopy(stock)
    optimisers = sgd(stock), sgd(fused)
    results = [training_step(model, x, o) for model, o in zip((stock, fused), optimisers, strict=True)]
    layers = layers_of(fuse(fused))
    senet_fused.reset_call_counts()
    results = [training_step(model, x, o) for model, o in zip((stock, fused), optimisers, strict=True)]
    assert senet_fused.call_counts()[f"{BACKEND}.backward"] == len(calls_of(stock, layers, x))
    assert_same_training(fused, results[1], results[0])


_READ_BACK = """
import pickle, sys, torch
model, x, expected = pickle.load(open(sys.argv[1], "rb"))
with torch.no_grad():
    got = model(x)
import senet_fused
from torch.utils import _pytree as pytree
got = [y for y in pytree.tree_leaves(got) if isinstance(y, torch.Tensor) and y.is_floating_point()]
assert len(got) == len(expected) and all(map(torch.equal, got, expected))
print(senet_fused.call_counts())
"""


@one_a_library
def test_another_process_reads_a_pickle(peer, tmp_path):
    stock, x = prepared(peer)
    fused = fused_copy(stock)
    expected = evaluate(fused, x)
    counts = senet_fused.call_counts()
    file = tmp_path / "model.pkl"
    file.write_bytes(pickle.dumps((fused, x, expected)))
    result = subprocess.run([sys.executable, "-c", _READ_BACK, str(file)], capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip().splitlines()[-1] == str(counts)


# ------------------------------------------------------------------------------------- layouts, autocast, compilers


@one_a_library
def test_channels_last(peer):
    stock, x = prepared(peer)
    last = torch.channels_last_3d if x.dim() == 5 else torch.channels_last
    stock, x = stock.to(memory_format=last), x.to(memory_format=last)
    fused = fused_copy(stock)
    layers = layers_of(fused)
    strides = calls_of(stock, layers, x)
    assert calls_of(fused, layers, x) == strides
    # In float64 a CPU's 3-D convolutions return contiguous tensors.
    assert x.dim() == 5 or any(taken[1] == 1 for taken, _ in strides)
    assert_close(evaluate(fused, x), evaluate(stock, x))


@one_a_library
def test_autocast(peer):
    """bfloat16: as near to float64 as the stock network is, within twice its error and a unit in the last place."""
    stock, x = prepared(peer)
    expected = evaluate(stock, x)
    stock, x = stock.float(), x.float()
    fused = fused_copy(stock)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        theirs, ours = evaluate(stock, x), evaluate(fused, x)
    assert senet_fused.call_counts().keys() == {f"{BACKEND}.forward"}
    for a, b, exact in zip(ours, theirs, expected, strict=True):
        assert a.dtype == b.dtype
        errors = [((y - exact).abs().max() / exact.abs().max()).item() for y in (a, b)]
        assert errors[0] <= 2 * errors[1] + 2**-8, errors


# "auto" leaves a graph to the compiler, a backend by name stays in it.
either_backend = pytest.mark.parametrize("backend", [None, BACKEND], ids=["auto", "by_name"])


@one_a_library
@either_backend
def test_export(peer, backend):
    """Strictly, and with auto not: the two ways to trace."""
    stock, x = prepared(peer)
    expected = evaluate(stock, x)
    fused = fused_copy(stock, backend)
    fused.eval()
    calls = len(calls_of(stock, layers_of(fused), x))
    program = torch.export.export(fused, (x,), strict=backend is not None).module()
    senet_fused.reset_call_counts()
    with torch.no_grad():
        got = outputs(program, x)
    assert senet_fused.call_counts() == ({f"{BACKEND}.forward": calls} if backend else {})
    assert_close(got, expected)


@one_a_library
@either_backend
def test_compile(peer, backend, exact_hardsigmoid):
    """One graph, forward and backward; Inductor, which takes its time, for the smallest network."""
    stock, x = prepared(peer)
    fused = fused_copy(stock, backend)
    calls = len(calls_of(stock, layers_of(fused), x))
    expected = training_step(stock, x, sgd(stock))
    torch._dynamo.reset()
    compiler = "eager" if backend is None else "inductor" if peer.library == "timm" else "aot_eager"
    compiled = torch.compile(fused, fullgraph=True, backend=compiler)
    loss, gradients = training_step(compiled, x, sgd(compiled))
    counts = {f"{BACKEND}.forward": calls, f"{BACKEND}.backward": calls} if backend else {}
    assert senet_fused.call_counts() == counts
    gradients = {name.removeprefix("_orig_mod."): g for name, g in gradients.items()}
    assert_same_training(fused, (loss, gradients), expected)
