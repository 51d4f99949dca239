"""PyTorch's private interfaces: all in one file, all there, and what happens without each."""

from __future__ import annotations

import ast
import contextlib
import importlib.util
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.autograd import forward_ad

import senet_fused
from senet_fused import torch_private

PACKAGE = Path(senet_fused.__file__).resolve().parent
SOURCE = Path(torch_private.__file__)
INTERFACES = {interface.name: interface for interface in torch_private.INTERFACES}


@pytest.mark.parametrize("name", INTERFACES)
def test_is_there(name):
    """A failure names what this PyTorch has no more, and what is lost with it."""
    interface = INTERFACES[name]
    assert interface.is_there(), f"torch {torch.__version__} has no {name}, {interface.purpose}: {interface.without}"


def test_every_entry_is_told():
    assert len(INTERFACES) == len(torch_private.INTERFACES)
    for interface in torch_private.INTERFACES:
        assert interface.purpose and interface.without
        assert (2, 0) <= tuple(map(int, interface.since.split("."))) <= (2, 11)  # the oldest that is supported


# ---------------------------------------------------------------------------------- the scan


def private_names():
    """Attributes with an underscore that modules, tensors and autograd's functions have."""
    owners = (nn.BatchNorm2d(1), nn.SyncBatchNorm(1), nn.Conv2d(1, 1, 1), nn.DataParallel, torch.Tensor)
    found = {name for owner in (*owners, torch.autograd.Function) for name in dir(owner)}
    return {name for name in found if is_private(name)} | {"_orig_mod", "_dynamo_marked_constant"}


def is_private(name):
    return name.startswith("_") and not name.endswith("__") and name != "_"


def chain(node):
    """["torch", "_C", "_is_tracing"] of torch._C._is_tracing; None if it does not begin with a name."""
    names = []
    while isinstance(node, ast.Attribute):
        names.append(node.attr)
        node = node.value
    return [node.id, *reversed(names)] if isinstance(node, ast.Name) else None


def violations(text, known):
    tree = ast.parse(text)
    aliases = set()
    for node in ast.walk(tree):
        modules = []
        if isinstance(node, ast.Import):
            modules = [alias.name for alias in node.names if alias.name.split(".")[0] == "torch"]
            aliases.update((a.asname or "torch") for a in node.names if a.name.split(".")[0] == "torch")
        elif isinstance(node, ast.ImportFrom) and not node.level and node.module.split(".")[0] == "torch":
            modules = [f"{node.module}.{alias.name}" for alias in node.names]
            aliases.update(alias.asname or alias.name for alias in node.names)
        yield from (module for module in modules if any(map(is_private, module.split("."))))
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and is_private(node.attr):
            names = chain(node)
            of_torch = names is not None and names[0] in aliases and names[1:3] != ["ops", "senet_fused"]
            if of_torch or (node.attr in known and node.attr not in torch_private.MODULE_INTERNALS):
                yield ast.unparse(node)
        elif isinstance(node, ast.Call) and chain(node.func) in (["getattr"], ["hasattr"], ["setattr"]):
            named = node.args[1]
            if isinstance(named, ast.Constant) and named.value in known - torch_private.MODULE_INTERNALS.keys():
                yield ast.unparse(node)
        elif isinstance(node, ast.ClassDef):
            methods = {one.name for one in node.body if isinstance(one, ast.FunctionDef)}
            yield from (f"def {name}" for name in methods & (known - torch_private.MODULE_INTERNALS.keys()))


def test_no_other_file_uses_one():
    known = private_names()
    assert {"_version", "_check_input_dim", "_compiled_call_impl", "_state_dict_hooks"} <= known
    assert torch_private.MODULE_INTERNALS.keys() <= known
    files = sorted(PACKAGE.rglob("*.py"))
    assert SOURCE in files and len(files) > 50
    found = {}
    for path in files:
        if uses := list(violations(path.read_text(encoding="utf-8"), known)):
            found[path.relative_to(PACKAGE).as_posix()] = uses
    assert len(found.pop("torch_private.py")) == 3  # the two marks; all else is looked up by its name
    assert found == {}


@pytest.mark.parametrize(
    "text",
    [
        "import torch\ntorch._C._is_tracing()",
        "from torch._functorch import config",
        "import torch._dynamo",
        "from torch.nn.modules.conv import _ConvNd",
        "from torch import nn\nnn.modules.conv._ConvNd",
        "from torch.autograd import forward_ad as ad\nad._current_level",
        "def f(norm, x): norm._check_input_dim(x)",
        "def f(model): return hasattr(model, '_orig_mod')",
        "def f(g): g._dynamo_marked_constant = True",
        "class Layer:\n    def _apply(self, fn): pass",
        "def f(x): return x._version",
    ],
)
def test_the_scan_finds(text):
    assert list(violations(text, private_names()))


@pytest.mark.parametrize(
    "text",
    [
        "import torch\ntorch.ops.senet_fused._cpu_forward.default()",
        "class Layer:\n    def _run(self): return self._senet_captured",
        "def f(module): return module._parameters",
        "import torch\ntorch.nn.Module.__init__",
    ],
)
def test_the_scan_lets_pass(text):
    assert list(violations(text, private_names())) == []


# ---------------------------------------------------------------------------------- without them


def source_without(names):
    """torch_private's source, which finds nothing under these names."""
    look = "    try:\n        found = importlib.import_module(module)\n"
    text = SOURCE.read_text(encoding="utf-8")
    assert text.count(look) == 1
    return text.replace(look, f'    if f"{{module}}.{{path}}" in {sorted(names)}:\n        return None\n{look}')


def load_without(name, tmp_path):
    path = tmp_path / "torch_private.py"
    path.write_text(source_without([name]), encoding="utf-8")
    spec = importlib.util.spec_from_file_location("torch_private_without", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def asks_torchscript(private):
    told = []

    def function(x):
        told.append(private.is_tracing())
        return x + 1

    function(torch.zeros(1))
    torch.jit.trace(function, torch.zeros(1), check_trace=False)
    assert told == [False, True]


def probes_for_dual_numbers(private):
    assert not private.in_dual_level()
    with forward_ad.dual_level():
        assert private.in_dual_level()
    assert not private.in_dual_level()


def moves_one_by_one(private):
    a, b = torch.tensor([0.0, 4.0]), torch.tensor([1.0])
    private.lerp_all([a, b], [torch.tensor([8.0, 8.0]), torch.tensor([3.0])], 0.25)
    assert a.tolist() == [2.0, 5.0] and b.tolist() == [1.5]


def says_so(function, *arguments):
    with pytest.raises(RuntimeError, match=re.escape(torch.__version__)):
        function(*arguments)


INSTEAD = {
    "torch._C._is_tracing": asks_torchscript,
    "torch._C._len_torch_dispatch_stack": lambda private: says(private.dispatch_modes(), 1),
    "torch.utils._python_dispatch._get_current_dispatch_mode_stack": lambda p: says(p.dispatch_mode_stack(), []),
    "torch._C._functorch.peek_interpreter_stack": lambda private: says(private.func_transform(), None),
    "torch._C._functorch.is_legacy_batchedtensor": lambda p: says(p.is_legacy_batchedtensor(torch.zeros(1)), True),
    "torch.nn.modules.module._has_any_global_hook": lambda private: says(private.has_global_hooks(), False),
    "torch.autograd.forward_ad._current_level": probes_for_dual_numbers,
    "torch.compiler._is_exporting_flag": lambda private: says(private.is_exporting, torch.compiler.is_exporting),
    "torch._subclasses.fake_tensor.FakeTensor": lambda p: says(p.stand_ins, torch_private.stand_ins[1:]),
    "torch._subclasses.functional_tensor.FunctionalTensor": lambda p: says(p.stand_ins, torch_private.stand_ins[:1]),
    "torch.utils._python_dispatch._disable_current_modes": lambda private: keeps_modes(private.without_modes()),
    "torch.utils._python_dispatch.TorchDispatchMode": lambda p: says(p.DispatchMode, contextlib.nullcontext),
    "torch.Tensor._version": lambda private: says(private.version_of(torch.zeros(1)), None),
    "torch._foreach_lerp_": moves_one_by_one,
    "torch.distributed.distributed_c10d._resolve_process_group": lambda private: says_so(private.process_group, "0"),
    "torch._dynamo.utils.counters": lambda private: says_so(private.compiled_graphs),
    "torch._functorch.config.donated_buffer": lambda private: donates(private.keeping_saved_tensors()),
}


def says(answer, expected):
    assert answer == expected


def keeps_modes(context):
    with torch.utils.flop_counter.FlopCounterMode(display=False), context:
        assert torch_private.dispatch_modes() == 1


def donates(context):
    from torch._functorch import config

    with context:
        assert config.donated_buffer
    with torch_private.keeping_saved_tensors():
        assert not config.donated_buffer


@pytest.mark.parametrize("name", INSTEAD)
def test_without_one(name, tmp_path):
    """It is the one that is told, and what stands in its place does what the entry says."""
    private = load_without(name, tmp_path)
    assert [interface.name for interface in private.missing()] == [name]
    INSTEAD[name](private)


def test_a_mark_that_has_another_name(monkeypatch):
    monkeypatch.setattr(torch.compiler, "assume_constant_result", lambda function: function)
    monkeypatch.setattr(torch, "compile", lambda model: model)
    marks = ["torch._dynamo.decorators._dynamo_marked_constant", "torch._dynamo.OptimizedModule._orig_mod"]
    assert [interface.name for interface in torch_private.missing()] == marks
    of_modules = {f"torch.nn.Module.{name}" for name in torch_private.MODULE_INTERNALS}
    assert INTERFACES.keys() == INSTEAD.keys() | set(marks) | of_modules


WITHOUT_ANY = """
import copy, torch, senet_fused
from torch import nn
from torch.autograd import forward_ad
from torch.utils.flop_counter import FlopCounterMode

print(*(interface.name for interface in senet_fused.torch_private.missing()))

class SELayer(nn.Module):
    def __init__(self, channel, reduction=16):
        super().__init__()
        self.avg_pool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Sequential(
            nn.Linear(channel, channel // reduction, bias=False), nn.ReLU(inplace=True),
            nn.Linear(channel // reduction, channel, bias=False), nn.Sigmoid(),
        )

    def forward(self, x):
        b, c, _, _ = x.size()
        return x * self.fc(self.avg_pool(x).view(b, c)).view(b, c, 1, 1).expand_as(x)

torch.manual_seed(0)
stock = SELayer(32, 4).double()
ours = senet_fused.fuse(copy.deepcopy(stock), backend="cpu")
assert [layer.status for layer in senet_fused.fuse_report(ours)] == ["fused"]
x = torch.randn(2, 32, 5, 5, dtype=torch.float64)
dy = torch.randn(3, *x.shape, dtype=torch.float64)

def gradients(layer, dy, **options):
    given = x.clone().requires_grad_()
    y = layer(given)
    return [y, *torch.autograd.grad(y, [given, *layer.parameters()], dy, **options)]

senet_fused.reset_call_counts()
for theirs, mine in zip(gradients(stock, dy[0]), gradients(ours, dy[0]), strict=True):
    torch.testing.assert_close(mine, theirs)
assert senet_fused.call_counts() == {"cpu.forward": 1, "cpu.backward": 1}, senet_fused.call_counts()
batched = [gradients(layer, dy, is_grads_batched=True) for layer in (stock, ours)]
for theirs, mine in zip(*batched, strict=True):
    torch.testing.assert_close(mine, theirs)
with torch.no_grad():
    torch.testing.assert_close(ours(x), stock(x))
with forward_ad.dual_level():
    tangents = [forward_ad.unpack_dual(layer(forward_ad.make_dual(x, dy[0]))).tangent for layer in (stock, ours)]
torch.testing.assert_close(*tangents)
with FlopCounterMode(display=False):
    torch.testing.assert_close(ours(x), stock(x))
torch.testing.assert_close(torch.jit.trace(ours, x)(x), stock(x))
layer = senet_fused.FusedSE.from_module(stock)

def transformed(layer):
    return torch.func.grad(lambda x: (layer(x) * dy[0]).sum())(x)

try:
    transformed(layer)
except RuntimeError as error:
    assert "functorch transforms" in str(error)
else:
    raise AssertionError("torch.func.grad has got a gradient from the kernels")
with senet_fused.use_backend("reference"):
    torch.testing.assert_close(transformed(layer), transformed(stock))
compiled = torch.compile(senet_fused.fuse(copy.deepcopy(stock)), backend="eager", fullgraph=True)
torch.testing.assert_close(compiled(x), stock(x))

norm, se = nn.BatchNorm2d(32).double(), senet_fused.FusedSE(32, 4).double()
expected = torch.relu(se(norm(x)) + x)
statistics = [norm.running_mean.clone(), norm.running_var.clone()]
norm.reset_running_stats()
tail = senet_fused.FusedSETail(norm, se, nn.ReLU())
torch.testing.assert_close(tail(x, x), expected)
torch.testing.assert_close([norm.running_mean, norm.running_var], statistics)
assert senet_fused.call_counts()["cpu.tail_forward"] == 1
"""


@pytest.mark.processes
def test_without_any(tmp_path):
    """The package imports, and gives the right numbers."""
    package = tmp_path / "senet_fused"
    shutil.copytree(PACKAGE, package, ignore=shutil.ignore_patterns("__pycache__", "*.so"))
    for library in PACKAGE.glob("*.so"):
        (package / library.name).symlink_to(library)
    (package / "torch_private.py").write_text(source_without(INSTEAD), encoding="utf-8")
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    run = [sys.executable, "-c", WITHOUT_ANY]
    result = subprocess.run(run, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    assert set(result.stdout.split()) == set(INSTEAD)
