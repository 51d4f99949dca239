"""What fuse leaves because something goes wrong with it, or because its forward does more than to compute.

The rest of the model is fused, and neither fuse nor a report leaves a trace of the trial in what is left.
"""

from __future__ import annotations

import collections
import cProfile
import functools
import gc
import itertools
import logging
import queue
import sys
import types
import warnings
from pathlib import Path

import pytest
import torch
from peer_blocks import DropPath, LegacyBottleneck, TimmBottleneck
from peer_layers import LegacySE, TimmSEModule, TorchvisionSE, TutorialSE
from torch import nn
from torch.nn import functional as F

import senet_fused
from senet_fused import FusedSE, fuse, fuse_report
from senet_fused.cli import main

HERE = Path(__file__).resolve().parent
compiled_only = pytest.mark.skipif(
    senet_fused.explain(torch.empty(0)).backend == "reference", reason="without compiled code the original forward runs"
)

# ------------------------------------------------------------------------------------------------ what goes wrong


class RaisingProperty(TimmSEModule):
    @property
    def add_maxpool(self):
        raise RuntimeError("not today")

    @add_maxpool.setter
    def add_maxpool(self, value):
        pass


class RaisingGetattr(TorchvisionSE):
    def __getattr__(self, name):
        if name in ("_parameters", "_modules", "_buffers") or name in self._modules:
            return super().__getattr__(name)
        raise RuntimeError(f"{name} is not for you")


class ItsOwnCopy(TorchvisionSE):
    def __deepcopy__(self, memo):
        return self


class SharesItsWeights(TorchvisionSE):
    def __deepcopy__(self, memo):
        other = SharesItsWeights(8, 2)
        other.fc1.weight, other.fc2.weight = self.fc1.weight, self.fc2.weight
        return other


class Interrupted(TorchvisionSE):
    def forward(self, x):
        raise MemoryError("no more")


class OtherArguments(TorchvisionSE):
    def forward(self, *, x, mask):
        return super().forward(x) * mask


class OwnSetattr(TorchvisionSE):
    """Refuses attributes once it is made, but for its mode; which keeps nobody from fusing it."""

    def __setattr__(self, name, value):
        if name != "training" and "scale_activation" in self.__dict__.get("_modules", ()):
            raise AttributeError("frozen")
        super().__setattr__(name, value)


def changed(make, change):
    layer = make()
    change(layer)
    return layer


def without_weight(layer):
    weight = layer.fc1.weight.detach().half()
    layer.fc1.weight, bias = None, layer.fc1.bias
    layer.fc1.forward = lambda x: F.conv2d(x, weight.float(), bias)


def with_a_large_kernel(layer):
    layer.fc1.weight = nn.Parameter(torch.randn(2, 8, 3, 3))


def whole_numbers(layer):
    layer.fc1.weight = nn.Parameter(torch.ones(2, 8, 1, 1, dtype=torch.int8), requires_grad=False)


def flat(layer):
    layer.fc2.weight = nn.Parameter(torch.empty(0))


def lazy():
    layer = TorchvisionSE(8, 2)
    layer.fc1 = nn.LazyConv2d(2, 1)
    return layer


WRONG = {
    "no_hidden_units": (lambda: TutorialSE(8), "the weight of its fc.0 is [0, 8]: it has no channels, or no hidden"),
    "no_weight": (lambda: changed(lambda: TorchvisionSE(8, 2), without_weight), "its fc1 has no weight: it is None"),
    "kernel": (
        lambda: changed(lambda: TorchvisionSE(8, 2), with_a_large_kernel),
        "the weight of its fc1 is [2, 8, 3, 3], which does not fit [2, 8]",
    ),
    "whole_numbers": (
        lambda: changed(lambda: TorchvisionSE(8, 2), whole_numbers), "the weight of its fc1 is torch.int8, not",
    ),
    "flat_weight": (
        lambda: changed(lambda: TorchvisionSE(8, 2), flat), "the weight of its fc2 is [0], which does not fit [8, 2]",
    ),
    "lazy": (lazy, "LazyConv2d"),
    "property": (lambda: RaisingProperty(8, 2), "it cannot be examined: RuntimeError: not today"),
    "getattr": (lambda: RaisingGetattr(8, 2), "it cannot be "),
    "its_own_copy": (lambda: ItsOwnCopy(8, 2), "a deep copy of it is no other object of its class"),
    "shared_weights": (lambda: SharesItsWeights(8, 2), "a deep copy of it has weights that are no copies of its own"),
    "memory": (lambda: Interrupted(8, 2), "it does not run on an input [16, 8, 5, 3]: no more"),
    "arguments": (lambda: OtherArguments(8, 2), "it does not run on an input"),
}  # fmt: skip


@compiled_only
@pytest.mark.parametrize("name", WRONG)
def test_the_rest_of_the_model_is_fused(name):
    make, reason = WRONG[name]
    layer = make()
    model = nn.Sequential(TorchvisionSE(8, 2), layer, nn.Conv2d(8, 64, 1), TutorialSE(64))
    kind, before = type(layer), {k: id(v) for k, v in vars(layer).items()}
    rows = fuse_report(model).layers
    assert [row.status for row in rows] == ["can be fused", "left", "can be fused"], str(fuse_report(model))
    fuse(model)
    rows = fuse_report(model).layers
    assert [row.status for row in rows] == ["fused", "left", "fused"] and reason in rows[1].reason, rows[1].reason
    assert type(layer) is kind and {k: id(v) for k, v in vars(layer).items()} == before
    with pytest.raises(ValueError, match=f"{kind.__name__} is not understood as an SE layer: "):
        FusedSE.from_module(layer)


@compiled_only
def test_a_bottleneck_of_zero_goes_on():
    model, x = nn.Sequential(TutorialSE(8), nn.Conv2d(8, 64, 1), TutorialSE(64)), torch.randn(2, 8, 4, 4)
    expected = model(x)
    torch.testing.assert_close(fuse(model)(x), expected)
    assert senet_fused.call_counts() == {"cpu.forward": 1}


@compiled_only
def test_a_class_that_guards_its_attributes_is_fused():
    layer, x = OwnSetattr(8, 2), torch.randn(2, 8, 3, 3)
    expected = layer(x)
    torch.testing.assert_close(fuse(layer)(x), expected)
    assert fuse_report(layer).layers[0].status == "fused"
    assert type(senet_fused.unfuse(layer)) is OwnSetattr


@compiled_only
def test_a_block_that_cannot_be_examined():
    def without_the_weight_of_a_convolution(block):
        block.conv2 = nn.LazyConv2d(8, 3, padding=1)

    class RaisingBlock(TimmBottleneck):
        @property
        def bn2(self):
            raise RuntimeError("not today")

    lazily = changed(LegacyBottleneck, without_the_weight_of_a_convolution)
    narrow = LegacyBottleneck(se=TutorialSE(32, 64))
    model = nn.ModuleList([lazily, narrow, RaisingBlock(), LegacyBottleneck()])
    fuse(model, tails=True)
    blocks = fuse_report(model).blocks
    assert [row.status for row in blocks] == ["left", "left", "left", "fused"], str(fuse_report(model))
    assert "uninitialized parameter" in blocks[0].reason and "no hidden units" in blocks[1].reason
    assert blocks[2].reason == "it cannot be examined: RuntimeError: not today"


def test_fuse_check_tells_what_is_left(tmp_path, capsys):
    network = tmp_path / "network.py"
    network.write_text(f"""
import sys
sys.path.insert(0, {str(HERE)!r})
from peer_layers import TutorialSE
from torch import nn


def make():
    return nn.Sequential(nn.Conv2d(3, 8, 1), TutorialSE(8), nn.Conv2d(8, 64, 1), TutorialSE(64), nn.Flatten())
""")
    fused = senet_fused.explain(torch.empty(0)).backend != "reference"
    assert main(["fuse-check", f"{network}:make", "--no-time"]) == (0 if fused else 1)
    text = capsys.readouterr().out
    assert "2 SE layers: 1 left" in text and "no hidden units" in text


# ------------------------------------------------------------------------------------------------ side effects

LOG: list = []
BY_NAME: dict = {}
TOTAL = torch.zeros(())
COUNT = 0
COUNTER = itertools.count()
QUEUE: queue.SimpleQueue = queue.SimpleQueue()
LOGGER = logging.getLogger("senet_fused.tests")
NOTES = types.ModuleType("notes")
NOTES.LOG = LOG


class Noisy(LegacySE):
    """An SE layer that also tells its gate to something."""

    log: list = []
    calls = 0

    def __init__(self, note, **attributes):
        super().__init__(16, 4)
        self.note = note
        for name, value in attributes.items():
            setattr(self, name, value)

    def forward(self, x):
        gate = self.sigmoid(self.fc2(self.relu(self.fc1(x.mean((2, 3), keepdim=True)))))
        type(self).NOTE[self.note](self, gate)
        return x * gate

    NOTE: dict = {}


def noise(name):
    def add(function):
        Noisy.NOTE[name] = function
        return function

    return add


@noise("list")
def _(self, gate):
    self.kept.append(gate.detach())


@noise("deep")
def _(self, gate):
    self.kept["a"][0].append(gate.detach())


@noise("dict")
def _(self, gate):
    self.kept["gate"] = gate.detach()


@noise("set")
def _(self, gate):
    self.kept.add(tuple(gate.shape))


@noise("deque")
def _(self, gate):
    self.kept.append(float(gate.mean()))


@noise("in place")
def _(self, gate):
    self.kept.add_(gate.detach().mean())


@noise("data")
def _(self, gate):
    self.kept.data.copy_(gate.detach().mean())


@noise("to no effect")
def _(self, gate):
    self.kept.mul_(1)


@noise("array")
def _(self, gate):
    self.kept[0] += 1


@noise("object")
def _(self, gate):
    self.kept.count += 1


@noise("weight")
def _(self, gate):
    with torch.no_grad():
        self.fc1.weight.mul_(0.999)


@noise("class")
def _(self, gate):
    type(self).calls += 1


@noise("list of the class")
def _(self, gate):
    self.log.append(gate)


@noise("global list")
def _(self, gate):
    LOG.append(gate.detach())


@noise("global dict")
def _(self, gate):
    BY_NAME[id(self)] = gate.detach()


@noise("global tensor")
def _(self, gate):
    TOTAL.add_(gate.detach().mean())


@noise("global number")
def _(self, gate):
    global COUNT
    COUNT += 1


@noise("global iterator")
def _(self, gate):
    next(COUNTER)


@noise("list of a module")
def _(self, gate):
    NOTES.LOG.append(gate.detach())


@noise("queue")
def _(self, gate):
    QUEUE.put(gate)


@noise("logger")
def _(self, gate):
    LOGGER.warning("gate %s", gate.mean())


@noise("print")
def _(self, gate):
    print(gate.mean())


@noise("file")
def _(self, gate):
    sys.stderr.write("gate\n")


@noise("callback")
def _(self, gate):
    self.kept(gate)


@noise("backward")
def _(self, gate):
    if gate.requires_grad:
        gate.register_hook(lambda g: self.kept.append(g))


def counting():
    count = 0

    def note(gate):
        nonlocal count
        count += 1

    note.seen = lambda: count
    return note


class Recorder:
    def __init__(self):
        self.seen = []

    def note(self, gate):
        self.seen.append(gate)

    __call__ = note


class Module(nn.Module):
    """Records what it sees, on its way."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def forward(self, x):
        self.seen.append(x.shape)
        return x


# name -> (what the layer does, what it holds, of that and of what lies outside: what must be as before, the reason)
HELD: list = []
NOISES = {
    "list": ("list", [], "its kept"),
    "deep": ("deep", {"a": ([],)}, "its kept.a[0]"),
    "dict": ("dict", {}, "its kept.gate"),
    "set": ("set", set(), "its kept"),
    "deque": ("deque", collections.deque(maxlen=3), "its kept"),
    "tensor": ("in place", torch.zeros(()), "its kept"),
    "data_of_a_tensor": ("data", torch.zeros(()), "its kept"),
    "version_of_a_tensor": ("to no effect", torch.zeros(()), "its kept"),
    "object": ("object", types.SimpleNamespace(count=0), "its kept.count"),
    "weight": ("weight", None, "its fc1.weight"),
    "class": ("class", None, "calls"),
    "list_of_the_class": ("list of the class", None, "its log"),
    "global_list": ("global list", None, "LOG of test_fuse_left"),
    "global_dict": ("global dict", None, "BY_NAME of test_fuse_left"),
    "global_tensor": ("global tensor", None, "TOTAL of test_fuse_left"),
    "global_number": ("global number", None, "its forward sets the global COUNT"),
    "global_iterator": ("global iterator", None, "its forward uses the iterator COUNTER of test_fuse_left"),
    "list_of_a_module": ("list of a module", None, "LOG of test_fuse_left"),
    "queue": ("queue", None, "its forward calls put"),
    "logger": ("logger", None, "its forward logs (warning)"),
    "print": ("print", None, "its forward calls print"),
    "file": ("file", None, "its forward calls write"),
    "function": ("callback", lambda gate: HELD.append(gate), "HELD of test_fuse_left"),
    "closure": ("callback", counting(), "its forward sets count of note"),
    "method": ("callback", Recorder().note, "its kept.seen"),
    "method_of_a_list": ("callback", HELD.append, "its kept"),
    "partial": ("callback", functools.partial(Recorder.note, Recorder()), "its kept[0].seen"),
    "callable": ("callback", Recorder(), "its kept.seen"),
    "child": ("callback", Module(), "its kept.seen"),
    "print_held": ("callback", print, "its forward calls print"),
    "hook_of_a_tensor": ("backward", [], "its kept"),
}


def contents():
    """Of everything that the layers above tell their gates to."""
    held = [held for _, held, _ in NOISES.values()]
    shown = [repr(getattr(one, "seen", one)) for one in held if not callable(one) or hasattr(one, "seen")]
    methods = [repr(one.__self__.seen) for one in held if isinstance(one, types.MethodType)]
    outside = (LOG, BY_NAME, TOTAL, COUNT, COUNTER, QUEUE.empty(), HELD, Noisy.log, Noisy.calls)
    return shown, methods, repr(outside), NOISES["closure"][1].seen()


@pytest.mark.parametrize("name", NOISES)
def test_what_a_forward_does_besides_is_kept(name, capfd):
    what, held, reason = NOISES[name]
    layer = Noisy(what, kept=held)
    before = contents()
    with pytest.warns(UserWarning, match="nothing was fused"):
        assert type(fuse(layer)) is Noisy
    (row,) = fuse_report(layer)
    assert row.status == "left" and reason in row.reason and "which the operator would not" in row.reason, row.reason
    with pytest.raises(ValueError, match="which the operator would not"):
        FusedSE.from_module(layer)
    assert contents() == before
    if name in ("print", "file", "print_held"):
        assert capfd.readouterr() == ("", "")


def test_an_array_that_a_forward_changes():
    numpy = pytest.importorskip("numpy")
    layer = Noisy("array", kept=numpy.zeros(2))
    with pytest.warns(UserWarning, match="its forward changes its kept"):
        fuse(layer)
    assert not layer.kept.any()


@pytest.mark.parametrize(
    "make", [fuse_report, fuse, functools.partial(fuse, verify=False)], ids=["report", "fuse", "unverified"]
)
def test_the_models_own_children_are_not_called(make):
    """Not even those that might be the layer's activation."""

    class Tapped(LegacySE):
        def __init__(self):
            super().__init__(16, 4)
            self.tap = Module()

        def forward(self, x):
            return x * self.tap(self.sigmoid(self.fc2(self.relu(self.fc1(x.mean((2, 3), keepdim=True))))))

    gate, act = TorchvisionSE(16, 4, scale_activation=Module), TimmSEModule(16, 4, act=lambda inplace: Module())
    for layer in (Tapped(), gate, act):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)
            make(layer)
        taps = [module for module in layer.modules() if isinstance(module, Module)]
        assert taps and not taps[0].seen
        layer(torch.randn(2, 16, 3, 3))
        trusted = type(layer).__name__ == "FusedTapped"  # not verified: taken for what its structure says
        assert len(taps[0].seen) == (0 if trusted else 1)


class NoisyBottleneck(LegacyBottleneck):
    def __init__(self):
        super().__init__(se=LegacySE(32, 4))
        self.seen = []

    def forward(self, x):
        self.seen.append(x.shape)
        return super().forward(x)


class Tapped(LegacyBottleneck):
    def forward(self, x):
        LOG.append(x.shape)
        return super().forward(x)


class Printing(LegacyBottleneck):
    def forward(self, x):
        print(x.shape)
        return super().forward(x)


@compiled_only
@pytest.mark.parametrize(
    ("kind", "reason"),
    [(NoisyBottleneck, "its forward changes its seen"), (Tapped, "LOG of"), (Printing, "its forward calls print")],
)
def test_what_a_block_does_besides_is_kept(kind, reason, capfd):
    block = kind()
    with pytest.warns(UserWarning, match="no block runs with tails"):
        fuse(block, tails=True)
    (row,) = fuse_report(block, tails=True).blocks
    assert row.status == "left" and reason in row.reason and "which the operator would not" in row.reason
    assert getattr(block, "seen", []) == [] and LOG == [] and capfd.readouterr() == ("", "")


# ------------------------------------------------------------------------------------------------ and what goes on


def gate_of(v, slope=1 / 6):
    """A helper as libraries have them."""
    checked(v)
    return torch.clamp(slope * v + 0.5, 0, 1)


def checked(v):
    if not v.is_floating_point():
        raise TypeError("not of a floating dtype")


CACHE: dict = {}


class Helpful(TorchvisionSE):
    """Its functions are attributes of all kinds, and what it keeps does not change."""

    def __init__(self, act, gate):
        super().__init__(8, 2)
        self.act, self.gate, self.sizes, self.names = act, gate, [1, 2], {"a": 1}
        self.logger, self.shape, self.function = LOGGER, torch.Size((1, 2)), len
        self.last, self.counter = None, itertools.count()

    def forward(self, x):
        pooled = [part.mean((2, 3), keepdim=True) for part in (x,)]
        pooled.append(sum(part for part in pooled) / len(self.sizes))
        assert isinstance(self.names, dict), LOGGER
        return x * self.gate(self.fc2(self.act(self.fc1(pooled[0]))))


FUNCTIONS = {
    "functional": (F.silu, torch.sigmoid),
    "modules": (nn.ReLU(), nn.Hardsigmoid()),
    "partial": (functools.partial(F.leaky_relu, negative_slope=0.1), functools.partial(F.hardsigmoid, inplace=False)),
    "methods": (torch.Tensor.relu, torch.Tensor.sigmoid),
    "lambda": (lambda v: v * v.sigmoid(), lambda v: v.sigmoid()),
    "helper": (F.gelu, gate_of),
    "partial_of_a_helper": (F.mish, functools.partial(gate_of, slope=0.2)),
    "closure": ((lambda slope: lambda v: torch.maximum(v, slope * v))(0.01), torch.tanh),
}


@compiled_only
@pytest.mark.parametrize("name", FUNCTIONS)
def test_functions_that_only_compute_are_fused(name):
    layer = Helpful(*FUNCTIONS[name])
    if name == "closure":
        layer.leaky = nn.LeakyReLU(0.01)  # the structure has to name the function
    x = torch.randn(2, 8, 5, 4)
    expected = layer(x)
    if name == "partial":
        layer.leaky = nn.LeakyReLU(0.1)
    if name == "helper":
        layer.gelu = nn.GELU()
    if name == "partial_of_a_helper":
        layer.mish = nn.Mish()
    if name == "closure":
        layer.tanh = nn.Tanh()
    fuse(layer)
    assert fuse_report(layer).layers[0].status == "fused", str(fuse_report(layer))
    torch.testing.assert_close(layer(x), expected)
    assert senet_fused.call_counts() == {"cpu.forward": 1}


class CachedOnce(TorchvisionSE):
    """What fills a cache at its first call only."""

    def forward(self, x):
        if "scale" not in CACHE:
            CACHE["scale"] = 1.0
        return super().forward(x) * CACHE["scale"]


@compiled_only
def test_a_cache_outside_that_is_filled_once():
    layer = fuse(CachedOnce(8, 2))
    assert fuse_report(layer).layers[0].status == "fused" and CACHE == {}


@compiled_only
def test_drop_path_and_their_like_are_no_side_effects():
    fuse(block := TimmBottleneck(drop_path=DropPath()), tails=True)
    assert fuse_report(block).blocks[0].status == "fused"


@compiled_only
def test_while_a_profiler_watches():
    """cProfile waits; a function that watches calls goes on afterwards; the layer is fused, or says why not."""
    profiler = cProfile.Profile()
    with profiler:
        fuse(layer := TorchvisionSE(8, 2))
    assert fuse_report(layer).layers[0].status == "fused" and profiler.getstats()
    seen, before = [], sys.getprofile()

    def watch(frame, event, arg):
        seen.append(event)

    sys.setprofile(watch)
    try:
        fuse(layer := TorchvisionSE(8, 4))
        assert sys.getprofile() is watch
    finally:
        sys.setprofile(before)
    assert fuse_report(layer).layers[0].status == "fused" and seen


_collections = 0


def _count_collections(phase, info):
    global _collections
    _collections += 1


@compiled_only
def test_what_runs_at_a_garbage_collection_is_none_of_the_forwards():
    """As hypothesis and many servers have it: a function in gc.callbacks, called in the middle of anything."""
    threshold = gc.get_threshold()
    gc.callbacks.append(_count_collections)
    gc.set_threshold(1, 1, 1)
    try:
        fuse(layer := TorchvisionSE(8, 2))
    finally:
        gc.set_threshold(*threshold)
        gc.callbacks.remove(_count_collections)
    assert gc.isenabled() and fuse_report(layer).layers[0].status == "fused" and _collections
