"""FusedSE in PyTorch: autocast, checkpointing, torch.func, export, ONNX, FX, DDP, pickling, modes."""

from __future__ import annotations

import copy
import importlib.util
import io
import os
import pickle
import subprocess
import sys
import textwrap
import threading
import warnings
from pathlib import Path

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.autograd import forward_ad
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import senet_fused
from senet_fused import Activation, FusedSE, squeeze_excite

needs_library = pytest.mark.skipif(
    senet_fused.backends.native.problem() is not None, reason="the compiled CPU library is not installed"
)
pytestmark = needs_library
ROOT = Path(senet_fused.__file__).resolve().parent.parent
OPERATOR = torch.ops.senet_fused.fused_se_cpu.default


class Net(nn.Module):
    """Two SE layers, one of them with a residual, in a model that takes images."""

    def __init__(self, dtype=None, **options):
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, padding=1, dtype=dtype)
        self.se1 = FusedSE(8, 4, bias=True, dtype=dtype, **options)
        self.se2 = FusedSE(8, 2, post_act="relu", dtype=dtype, **options)
        self.head = nn.Linear(8, 5, dtype=dtype)

    def forward(self, x):
        v = self.conv(x)
        return self.head(self.se2(self.se1(v), v).mean((2, 3)))


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def images(n=2, size=6, dtype=None):
    return torch.randn(n, 3, size, size + 1, dtype=dtype)


def gradients(model, x, dy):
    model.zero_grad()
    model(x).backward(dy)
    return [p.grad.clone() for p in model.parameters()]


def run_python(code, **environment):
    """The output of a fresh interpreter."""
    result = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        env={
            **os.environ,
            "PYTHONPATH": os.pathsep.join([str(ROOT), str(Path(__file__).parent)]),
            **environment,
        },
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert result.returncode == 0, result.stderr
    return result.stdout.strip()


# ---------------------------------------------------------------------------------- training


class StockSE(nn.Module):
    def __init__(self, dtype=None):
        super().__init__()
        self.fc = nn.Sequential(nn.Linear(8, 2, dtype=dtype), nn.ReLU(), nn.Linear(2, 8, dtype=dtype), nn.Sigmoid())

    def forward(self, x):
        return x * self.fc(x.mean((2, 3)))[:, :, None, None]


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("autocast", [torch.bfloat16, torch.float16])
def test_autocast_keeps_the_dtype_of_x(autocast, dtype, backend):
    """As stock does: its last step is a multiplication, which autocast leaves to type promotion with x."""
    x = torch.randn(2, 8, 4, 4, dtype=dtype, requires_grad=True)
    layer = FusedSE(8, 4, bias=True)
    with torch.autocast("cpu", autocast), senet_fused.use_backend(backend):
        y = layer(x)
        if dtype in (torch.float32, autocast):
            assert y.dtype == StockSE()(x).dtype
    assert y.dtype == dtype
    y.backward(torch.randn_like(y))
    assert x.grad.dtype == dtype and layer.fc1.weight.grad.dtype == torch.float32
    assert senet_fused.call_counts()[f"{backend}.forward"] == 1


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_autocast_does_not_touch_the_excitation(backend):
    """Float32 in, the same bits out as without autocast."""
    layer, x = FusedSE(8, 4, backend=backend), torch.randn(2, 8, 4, 4)
    expected = layer(x)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(layer(x), expected)


def test_grad_scaler():
    model, x, dy = Net(), images(), torch.randn(2, 5)
    plain = gradients(model, x, dy)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    optimizer.zero_grad()
    scaler.scale((model(x) * dy).sum()).backward()
    scaler.unscale_(optimizer)
    for p, expected in zip(model.parameters(), plain, strict=True):
        torch.testing.assert_close(p.grad, expected)
    scaler.step(optimizer)
    scaler.update()
    optimizer.zero_grad()
    before = model.se1.fc1.weight.clone()
    scaler.scale((model(x) * float("inf")).sum()).backward()
    scaler.step(optimizer)  # skipped: there are infinite gradients
    scaler.update()
    assert scaler.get_scale() == 512.0 and torch.equal(model.se1.fc1.weight, before)


@pytest.mark.parametrize("reentrant", [True, False])
def test_activation_checkpointing(reentrant):
    model, x, dy = Net(), images().requires_grad_(), torch.randn(2, 5)
    expected = gradients(model, x, dy)
    senet_fused.reset_call_counts()
    got = gradients(_Checkpointed(model, reentrant), x, dy)
    assert senet_fused.call_counts() == {"cpu.forward": 4, "cpu.backward": 2}
    for a, b in zip(got, expected, strict=True):
        assert torch.equal(a, b)


class _Checkpointed(nn.Module):
    def __init__(self, inner, reentrant):
        super().__init__()
        self.inner, self.reentrant = inner, reentrant

    def forward(self, x):
        return checkpoint(self.inner, x, use_reentrant=self.reentrant)


def test_functional_call():
    model, other, x, dy = Net(), Net(), images(), torch.randn(2, 5)
    parameters = {name: p.detach().clone().requires_grad_() for name, p in other.named_parameters()}
    y = torch.func.functional_call(model, parameters, (x,))
    assert torch.equal(y, other(x))
    for a, b in zip(torch.autograd.grad(y, list(parameters.values()), dy), gradients(other, x, dy), strict=True):
        assert torch.equal(a, b)
    assert all(p.grad is None for p in model.parameters())


def _distributed_worker(rank, folder, device_count):
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=device_count
    )
    saved = torch.load(f"{folder}/inputs.pt")
    model = Net(dtype=torch.float64)
    model.load_state_dict(saved["model"])
    parallel = nn.parallel.DistributedDataParallel(model)
    x, target = saved["x"].chunk(device_count)[rank], saved["target"].chunk(device_count)[rank]
    senet_fused.reset_call_counts()
    nn.functional.mse_loss(parallel(x), target).backward()
    assert senet_fused.call_counts() == {"cpu.forward": 2, "cpu.backward": 2}
    torch.save([p.grad for p in model.parameters()], f"{folder}/gradients{rank}.pt")
    torch.distributed.destroy_process_group()


@pytest.mark.processes
@pytest.mark.skipif(not torch.distributed.is_available(), reason="this torch has no torch.distributed")
def test_ddp_on_two_processes_equals_one_with_twice_the_batch(tmp_path):
    model, x, target = (
        Net(dtype=torch.float64),
        images(6, dtype=torch.float64),
        torch.randn(6, 5, dtype=torch.float64),
    )
    torch.save({"model": model.state_dict(), "x": x, "target": target}, tmp_path / "inputs.pt")
    torch.multiprocessing.spawn(_distributed_worker, (str(tmp_path), 2), nprocs=2)
    nn.functional.mse_loss(model(x), target).backward()
    ranks = [torch.load(tmp_path / f"gradients{rank}.pt") for rank in range(2)]
    for first, second, p in zip(*ranks, model.parameters(), strict=True):
        assert torch.equal(first, second)
        torch.testing.assert_close(first, p.grad, rtol=1e-12, atol=1e-12)


def test_threads_of_python_do_not_disturb_each_other():
    """Forward and backward at once in four threads of one process."""
    model = Net()
    cases = [(images(n, size), torch.randn(n, 5)) for n, size in ((1, 5), (2, 9), (3, 12), (5, 7))]
    parameters = list(model.parameters())
    expected = [torch.autograd.grad(model(x), parameters, dy) for x, dy in cases]
    wrong = []

    def work(i):
        x, dy = cases[i]
        for _ in range(15):
            got = torch.autograd.grad(model(x), parameters, dy)
            if not all(map(torch.equal, got, expected[i])):
                wrong.append(i)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


# ---------------------------------------------------------------------------------- torch.func, forward mode


def _weights(dtype=torch.float64):
    return [torch.randn(*s, dtype=dtype) for s in ((2, 4), (4, 2), (2,), (4,))]


def _loss(weights, x, backend=None):
    return squeeze_excite(x, *weights, act="silu", residual=x, post_act="relu", backend=backend).pow(3).sum()


def test_vmap_and_per_sample_gradients_equal_a_loop():
    weights, x = _weights(), torch.randn(5, 4, 3, 2, dtype=torch.float64)
    mapped = torch.vmap(lambda sample: squeeze_excite(sample[None], *weights))(x)
    torch.testing.assert_close(mapped[:, 0], squeeze_excite(x, *weights))
    per_sample = torch.vmap(torch.func.grad(_loss), in_dims=(None, 0))(weights, x[:, None])
    for i in range(5):
        leaves = [w.clone().requires_grad_() for w in weights]
        _loss(leaves, x[i : i + 1], backend="cpu").backward()
        for got, leaf in zip(per_sample, leaves, strict=True):
            torch.testing.assert_close(got[i], leaf.grad)
    assert senet_fused.call_counts()["cpu.backward"] == 5


def test_vmap_over_an_ensemble():
    layers = [FusedSE(8, 4, bias=True) for _ in range(3)]
    parameters, _ = torch.func.stack_module_state(layers)
    x = torch.randn(2, 8, 3, 3)
    y = torch.vmap(lambda p: torch.func.functional_call(layers[0], p, (x,)))(parameters)
    for got, layer in zip(y, layers, strict=True):
        torch.testing.assert_close(got, layer(x))


@pytest.mark.parametrize(
    "transform",
    [
        lambda f, x: torch.func.jacrev(torch.func.grad(f))(x),
        lambda f, x: torch.func.jacfwd(torch.func.grad(f))(x),
        lambda f, x: torch.func.jacfwd(torch.func.jacfwd(f))(x),
        lambda f, x: torch.func.hessian(f)(x),
        lambda f, x: torch.func.vjp(torch.func.grad(f), x)[1](x.cos())[0],
        lambda f, x: torch.func.jvp(torch.func.grad(f), (x,), (x.cos(),))[1],
        lambda f, x: torch.autograd.functional.hessian(f, x),
        lambda f, x: torch.autograd.functional.hvp(f, x, x.cos())[1],
    ],
    ids=[
        "jacrev_grad", "jacfwd_grad", "jacfwd_jacfwd", "hessian", "vjp_grad", "jvp_grad", "autograd_hessian",
        "autograd_hvp",
    ],
)  # fmt: skip
def test_second_derivatives_by_torch_func(transform):
    weights, x = _weights(), torch.randn(2, 4, 1, 2, dtype=torch.float64)
    results = [transform(lambda v, b=backend: _loss(weights, v, b), x) for backend in ("cpu", "reference")]
    assert results[0].abs().max() > 0.1
    torch.testing.assert_close(*results)


@pytest.mark.parametrize("create_graph", [False, True])
@pytest.mark.parametrize("by", ["is_grads_batched", "vmap"])
def test_batched_gradients_of_one_forward(by, create_graph):
    """Both of PyTorch's vmaps over the backward of a call made before, to the second order."""
    layer = FusedSE(4, 2, act="silu", post_act="relu", dtype=torch.float64)
    x = torch.randn(2, 4, 3, 2, dtype=torch.float64, requires_grad=True)
    y, leaves = layer(x, x), [x, *layer.parameters()]
    seeds = torch.randn(3, *y.shape, dtype=torch.float64)
    senet_fused.reset_call_counts()

    def gradients(seed, **options):
        return torch.autograd.grad(y, leaves, seed, retain_graph=True, create_graph=create_graph, **options)

    batched = torch.vmap(gradients)(seeds) if by == "vmap" else gradients(seeds, is_grads_batched=True)
    assert senet_fused.call_counts() == {"cpu.backward": 3}
    loop = [torch.stack(column) for column in zip(*map(gradients, seeds), strict=True)]
    for a, b in zip(batched, loop, strict=True):
        torch.testing.assert_close(a, b)
    if create_graph:
        second = [
            torch.autograd.grad(sum(g.square().sum() for g in first), leaves, retain_graph=True)
            for first in (batched, loop)
        ]
        for a, b in zip(*second, strict=True):
            torch.testing.assert_close(a, b)
            assert a.any()


def test_vectorized_jacobian_and_hessian():
    weights, x = _weights(), torch.randn(2, 4, 1, 2, dtype=torch.float64)
    for function, f in (
        (
            torch.autograd.functional.jacobian,
            lambda v: squeeze_excite(v, *weights, residual=v, post_act="relu"),
        ),
        (torch.autograd.functional.hessian, lambda v: _loss(weights, v)),
    ):
        torch.testing.assert_close(function(f, x, vectorize=True), function(f, x))


def test_forward_mode_differentiation():
    """A dual tensor keeps its tangent, whether or not it also requires a gradient."""
    weights, x = _weights(), torch.randn(2, 4, 3, 3, dtype=torch.float64)
    step = 1e-6
    numeric = (squeeze_excite(x + step * x.cos(), *weights) - squeeze_excite(x - step * x.cos(), *weights)) / (2 * step)
    for requires_grad in (False, True):
        with forward_ad.dual_level():
            dual = forward_ad.make_dual(x.clone().requires_grad_(requires_grad), x.cos())
            tangent = forward_ad.unpack_dual(squeeze_excite(dual, *weights, backend="cpu")).tangent
        torch.testing.assert_close(tangent, numeric, rtol=1e-6, atol=1e-8)


# ---------------------------------------------------------------------------------- export, tracing


@pytest.mark.parametrize("strict", [True, False])
def test_export(strict):
    """By name, the program holds the operator, takes other sizes, runs after saving and loading, and has gradients."""
    model, x = Net(act="silu").eval(), images()
    dynamic = {"x": {0: torch.export.Dim.DYNAMIC, 2: torch.export.Dim.DYNAMIC, 3: torch.export.Dim.DYNAMIC}}
    with senet_fused.use_backend("cpu"):
        program = torch.export.export(model, (x,), strict=strict, dynamic_shapes=dynamic)
    assert [n.target for n in program.graph.nodes].count(OPERATOR) == 2
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    loaded = torch.export.load(file)
    other = images(5, 9)
    for runnable in (program, loaded, program.run_decompositions()):
        senet_fused.reset_call_counts()
        assert torch.equal(runnable.module()(other), model(other))
        assert senet_fused.call_counts() == {"cpu.forward": 4}
    trainable, dy = program.module(), torch.randn(5, 5)
    trainable(other).backward(dy)
    expected = dict(zip((n for n, _ in model.named_parameters()), gradients(model, other, dy), strict=True))
    for name, p in trainable.named_parameters():
        torch.testing.assert_close(p.grad, expected[name])


def test_export_without_our_operator():
    """As "auto" does: for runtimes that have PyTorch's own operators only, and compilers that fuse them."""
    model, x = Net().eval(), images()
    program = torch.export.export(model, (x,), strict=False)
    kinds = {n.target.namespace for n in program.graph.nodes if isinstance(n.target, torch._ops.OpOverload)}
    assert kinds == {"aten"}
    torch.testing.assert_close(program.module()(x), model(x))


class Zoo(nn.Module):
    """Every activation, gate and squeeze once or more."""

    def __init__(self):
        super().__init__()
        gelu_tanh = Activation("gelu", approximate="tanh")
        acts = (
            "identity",
            "relu",
            "relu6",
            "leaky_relu(0.2)",
            "silu",
            "gelu",
            "hardswish",
            "mish",
            "tanh",
            "sigmoid",
        )
        gates = ("sigmoid", "hardsigmoid", "tanh", "hardsigmoid(0.2, 0.5)", "identity", "relu")
        squeezes = ("avg", "max", "avgmax")
        self.layers = nn.ModuleList(
            FusedSE(
                6,
                2,
                bias=True,
                act=act,
                gate=gates[i % 6],
                squeeze=squeezes[i % 3],
                post_act=(None, "relu")[i % 2],
            )
            for i, act in enumerate((*acts, gelu_tanh))
        )
        for layer in self.layers:  # so that no gate is closed for all
            nn.init.constant_(layer.fc2.bias, 0.7)

    def forward(self, x):
        y = x
        for layer in self.layers:
            y = layer(y, x)
        return y


@pytest.mark.compiler
@pytest.mark.skipif(
    importlib.util.find_spec("onnx") is None or importlib.util.find_spec("onnxscript") is None,
    reason="onnx or onnxscript is not installed",
)
@pytest.mark.parametrize("dynamo", [True, False], ids=["dynamo", "torchscript"])
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_onnx_export(dynamo, tmp_path):
    """ONNX's own operators only, and ONNX's reference implementation computes what the model computes."""
    import onnx
    from onnx.reference import ReferenceEvaluator

    model, x = Zoo().eval(), torch.randn(2, 6, 4, 5)
    path = tmp_path / "model.onnx"
    with warnings.catch_warnings():
        warnings.simplefilter("error", torch.jit.TracerWarning)
        torch.onnx.export(model, (x,), path, dynamo=dynamo, verbose=False)
    exported = onnx.load(path)
    onnx.checker.check_model(exported)
    assert {node.domain for node in exported.graph.node} == {""} and not exported.functions
    y = ReferenceEvaluator(exported).run(None, {exported.graph.input[0].name: x.numpy()})[0]
    torch.testing.assert_close(torch.from_numpy(y), model(x).detach(), rtol=1e-4, atol=1e-4)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_jit_trace_gives_plain_operators():
    model, x = Zoo().eval(), torch.randn(2, 6, 4, 5)
    with warnings.catch_warnings():
        warnings.simplefilter("error", torch.jit.TracerWarning)
        traced = torch.jit.trace(model, (x,))
    kinds = {node.kind().split("::")[0] for node in traced.inlined_graph.nodes()}
    assert kinds <= {"aten", "prim"}
    other = torch.randn(3, 6, 7, 2)
    torch.testing.assert_close(traced(other), model(other))


@pytest.mark.parametrize("mode", ["real", "fake", "symbolic"])
def test_make_fx_records_the_operators(mode):
    from torch.fx.experimental.proxy_tensor import make_fx

    def gradient(x, *weights):
        x = x.detach().requires_grad_()
        return torch.autograd.grad(squeeze_excite(x, *weights).square().sum(), x)[0]

    x, weights = torch.randn(2, 8, 3, 4), (torch.randn(2, 8), torch.randn(8, 2))
    traced = make_fx(gradient, tracing_mode=mode)(x, *weights)
    targets = [n.target for n in traced.graph.nodes]
    assert targets.count(OPERATOR) == targets.count(torch.ops.senet_fused.fused_se_cpu_backward.default) == 1
    torch.testing.assert_close(traced(x, *weights), gradient(x, *weights))


def test_fx_keeps_the_function_as_a_leaf():
    model, x = Net(act=nn.LeakyReLU(0.2), gate=Activation("hardsigmoid", slope=0.2)), images()
    traced = torch.fx.symbolic_trace(model)
    nodes = [n for n in traced.graph.nodes if n.op == "call_function"]
    assert [n.target for n in nodes] == [squeeze_excite] * 2
    assert nodes[0].kwargs["act"] == "leaky_relu(0.2)" and nodes[0].kwargs["gate"] == "hardsigmoid(0.2, 0.5)"
    again = pickle.loads(pickle.dumps(traced))
    for runnable in (traced, again, copy.deepcopy(traced)):
        senet_fused.reset_call_counts()
        assert torch.equal(runnable(x), model(x))
        assert senet_fused.call_counts() == {"cpu.forward": 4}
    dy = torch.randn(2, 5)
    for a, b in zip(gradients(traced, x, dy), gradients(model, x, dy), strict=True):
        assert torch.equal(a, b)


# ---------------------------------------------------------------------------------- copies, files, processes


def test_copies_compute_the_same():
    model, x = Net(act="gelu", gate="hardsigmoid(0.2, 0.5)", squeeze="avgmax", backend="cpu"), images()
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    for other in (
        copy.deepcopy(model),
        pickle.loads(pickle.dumps(model)),
        torch.load(file, weights_only=False),
    ):
        assert torch.equal(other(x), model(x)) and repr(other) == repr(model)
        assert other.se1.fc1.weight.data_ptr() != model.se1.fc1.weight.data_ptr()


def test_a_saved_module_loads_in_another_process(tmp_path):
    layer, x = (
        FusedSE(8, 4, bias=True, act=nn.Mish(), squeeze="max", post_act="relu"),
        torch.randn(2, 8, 3, 3),
    )
    with senet_fused.capture_gates(layer):  # a recording stays behind
        torch.save({"layer": layer, "x": x}, tmp_path / "layer.pt")
    code = f"""
        import torch
        saved = torch.load({str(tmp_path / "layer.pt")!r}, weights_only=False)
        torch.save((saved["layer"](saved["x"]), repr(saved["layer"])), {str(tmp_path / "y.pt")!r})
    """
    run_python(code)
    y, text = torch.load(tmp_path / "y.pt", weights_only=False)
    assert torch.equal(y, layer(x)) and text == repr(layer)


def test_the_environment_names_a_backend():
    code = """
        import torch, senet_fused
        x = torch.randn(2, 8, 3, 3)
        print(senet_fused.explain(x))
        senet_fused.FusedSE(8)(x)
        senet_fused.FusedSE(8, backend="cpu")(x)
        with senet_fused.use_backend("auto"):
            senet_fused.FusedSE(8)(x)
        print(senet_fused.call_counts())
    """
    choice, counts = run_python(code, SENET_FUSED_BACKEND="reference").splitlines()
    assert choice == ("Choice(backend='reference', reason='asked for by the environment variable SENET_FUSED_BACKEND')")
    assert counts == "{'reference.forward': 1, 'cpu.forward': 2}"


def test_an_unknown_backend_in_the_environment_is_named():
    code = """
        import torch, senet_fused
        try:
            senet_fused.FusedSE(8)(torch.randn(2, 8, 3, 3))
        except ValueError as error:
            print(error)
    """
    assert run_python(code, SENET_FUSED_BACKEND="gpu") == (
        "the environment variable SENET_FUSED_BACKEND: unknown backend 'gpu'; "
        "choose one of auto, cpu, cuda, triton, reference"
    )


# ---------------------------------------------------------------------------------- devices, modes


def test_the_meta_device_takes_the_reference():
    layer = FusedSE(8, 4, device="meta")
    x = torch.empty(2, 8, 3, 3, device="meta", requires_grad=True)
    y = layer(x)
    assert y.is_meta and y.shape == x.shape
    y.backward(torch.empty_like(y))
    assert x.grad.shape == x.shape and layer.fc1.weight.grad.is_meta
    assert "meta" in senet_fused.explain(x).reason
    with pytest.raises(senet_fused.BackendUnavailableError, match="serves CPU tensors, got meta"):
        FusedSE(8, 4, device="meta", backend="cpu")(x)
    with torch.device("meta"):
        skeleton = Net()
    assert skeleton.se1.fc1.weight.is_meta and skeleton(torch.empty(2, 3, 4, 4, device="meta")).shape == (
        2,
        5,
    )


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_fake_tensors_have_shapes_and_strides_and_run_nothing(layout):
    layer = FusedSE(8, 4, squeeze="avgmax", post_act="relu")
    real = torch.randn(2, 8, 3, 5).contiguous(memory_format=layout)
    senet_fused.reset_call_counts()
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        x = mode.from_tensor(real).requires_grad_()
        y = layer(x, x)
        y.sum().backward()
    outside = layer(x)  # without the mode, the type of x leads there
    assert senet_fused.call_counts() == {}
    expected = layer(real, real)
    for fake in (y, x.grad, outside):
        assert isinstance(fake, FakeTensor) and fake.stride() == expected.stride() and fake.dtype == expected.dtype


def test_dispatch_modes_see_the_operators():
    class Seen(TorchDispatchMode):
        def __init__(self):
            super().__init__()
            self.names = []

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            self.names.append(str(function))
            return function(*args, **(kwargs or {}))

    layer, x = FusedSE(8, 4), torch.randn(2, 8, 3, 3, requires_grad=True)
    expected = torch.autograd.grad(layer(x).sum(), x)[0]
    with Seen() as seen:
        got = torch.autograd.grad(layer(x).sum(), x)[0]
    assert torch.equal(got, expected)
    assert seen.names[0] == "senet_fused.fused_se_cpu.default"
    assert seen.names.count("senet_fused.fused_se_cpu_backward.default") == 1


def test_function_modes_and_subclasses():
    """__torch_function__ is offered the call as a whole, and a subclass comes back."""
    seen = []

    class Marked(torch.Tensor):
        @classmethod
        def __torch_function__(cls, function, types, args=(), kwargs=None):
            seen.append(function)
            return super().__torch_function__(function, types, args, kwargs or {})

    class Mode(TorchFunctionMode):
        def __torch_function__(self, function, types, args=(), kwargs=None):
            seen.append(function)
            return function(*args, **(kwargs or {}))

    layer, x = FusedSE(8, 4, act=nn.SiLU(), bias=True), torch.randn(2, 8, 3, 3)
    expected = layer(x, x)
    y = layer(x.as_subclass(Marked), x)
    assert type(y) is Marked and torch.equal(y.as_subclass(torch.Tensor), expected) and squeeze_excite in seen
    seen.clear()
    with Mode():
        y = layer(x, x)
    assert torch.equal(y, expected) and seen.count(squeeze_excite) == 1
    marked = x.as_subclass(Marked).requires_grad_()
    senet_fused.reset_call_counts()
    layer(marked).sum().backward()
    assert marked.grad is not None and senet_fused.call_counts() == {"cpu.forward": 1, "cpu.backward": 1}


def test_inference_mode():
    model, x = Net(), images()
    expected = model(x)
    with torch.inference_mode():
        y = model(x)
        inside = images()
    assert y.is_inference() and torch.equal(y, expected)
    with torch.no_grad():
        assert not model.se1(torch.randn(2, 8, 3, 3)).requires_grad
        model(inside)  # an inference tensor outside its mode


def test_saved_tensor_hooks_see_what_is_kept():
    """x and a few vectors, so that offloading to disk and the like find everything."""
    layer, x = FusedSE(8, 4, post_act="relu"), torch.randn(2, 8, 3, 3, requires_grad=True)
    shapes = []

    def pack(t):
        shapes.append(tuple(t.shape))
        return t.clone()

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        y = layer(x)
    assert sorted(shapes) == sorted([(2, 8, 3, 3), (2, 8), (8, 2), (2, 8), (2, 10), (2, 8, 2)])
    dy = torch.randn_like(y)
    assert torch.equal(torch.autograd.grad(y, x, dy)[0], torch.autograd.grad(layer(x), x, dy)[0])
