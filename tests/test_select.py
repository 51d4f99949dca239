"""Which backend serves a call: precedence, refusals with their reason, and the reason auto gives."""

from __future__ import annotations

import re

import pytest
import torch

import senet_fused
from senet_fused import BackendUnavailableError, FusedSE, backends, explain, select, use_backend
from senet_fused.backends import cuda, native, triton

REASON = "the compiled library is not installed"


@pytest.fixture
def no_environment(monkeypatch):
    monkeypatch.setattr(select, "_environment", None)


@pytest.fixture(autouse=True)
def _clean(no_environment):
    yield
    assert select._override is None


@pytest.fixture
def library(monkeypatch):
    """As if the compiled library were there; nothing is run with it."""
    monkeypatch.setattr(native, "_problem", None)


@pytest.fixture
def no_library(monkeypatch):
    monkeypatch.setattr(native, "_problem", REASON)


X = torch.ones(1, 8, 2, 2)


def test_precedence(library, monkeypatch):
    """Call and module before use_backend, that before the environment, that before auto."""
    assert explain(X) == ("cpu", "cpu: serves cpu tensors")
    monkeypatch.setattr(select, "_environment", "reference")
    assert explain(X) == ("reference", "asked for by the environment variable SENET_FUSED_BACKEND")
    with use_backend("cpu"):
        assert explain(X) == ("cpu", "asked for by use_backend")
        assert explain(X, backend="reference") == ("reference", "asked for by the call or the module")
    with use_backend("auto"):
        assert explain(X).backend == "cpu"
    assert explain(X, backend="cpu").backend == "cpu"
    assert explain(X, backend="auto").backend == "cpu"
    assert explain(X).backend == "reference"


def _ran(call):
    senet_fused.reset_call_counts()
    call()
    return senet_fused.call_counts()


@pytest.mark.skipif(native.problem() is not None, reason="the compiled CPU library is not installed")
def test_precedence_by_what_runs(monkeypatch):
    monkeypatch.setattr(select, "_environment", "reference")
    default, named = FusedSE(8, 4), FusedSE(8, 4, backend="cpu")
    weights = default.fc1.weight, default.fc2.weight
    assert _ran(lambda: default(X)) == {"reference.forward": 1}
    assert _ran(lambda: named(X)) == {"cpu.forward": 1}
    with use_backend("cpu"):
        assert _ran(lambda: default(X)) == {"cpu.forward": 1}
        assert _ran(lambda: FusedSE(8, 4, backend="reference")(X)) == {"reference.forward": 1}
        assert _ran(lambda: senet_fused.squeeze_excite(X, *weights, backend="reference")) == {"reference.forward": 1}
    monkeypatch.setattr(select, "_environment", None)
    assert _ran(lambda: default(X)) == {"cpu.forward": 1}


@pytest.mark.skipif(native.problem() is not None, reason="the compiled CPU library is not installed")
def test_the_backward_is_the_forwards():
    """Whatever is asked for by then."""
    layer = FusedSE(8, 4)
    y = layer(X)
    with use_backend("reference"):
        assert _ran(lambda: y.sum().backward()) == {"cpu.backward": 1}


def test_use_backend_nests_and_ends_with_its_block():
    with use_backend("reference"):
        with use_backend("cpu"):
            assert select.requested(None) == ("cpu", "use_backend")
        assert select.requested(None)[0] == "reference"
        with pytest.raises(ZeroDivisionError):
            with use_backend("cpu"):
                raise ZeroDivisionError
        assert select.requested(None)[0] == "reference"
        with pytest.raises(ValueError, match="use_backend: unknown backend 'gpu'"):
            with use_backend("gpu"):
                pass
        assert select.requested(None)[0] == "reference"
    assert select.requested(None) == ("auto", "the default")


def test_use_backend_takes_none_for_nothing():
    with use_backend("reference"), use_backend(None):
        assert select.requested(None) == ("auto", "the default")


@pytest.mark.parametrize("device", ["meta", "cuda", "mps", "xpu"])
def test_what_the_cpu_backend_refuses(library, device):
    refusal = f"it serves CPU tensors, got {device} tensors"
    if device != "cuda" or (triton.problem() is not None and cuda.problem() is not None):
        choice = select.choose(None, device, torch.float32)
        assert choice.backend == "reference"
        assert choice.reason == (
            f"not cpu: {refusal}; not cuda: {cuda.problem(device)}; not triton: {triton.problem(device)}; "
            f"reference: serves {device} tensors"
        )
    with pytest.raises(BackendUnavailableError) as error:
        select.choose("cpu", device, torch.float32)
    assert str(error.value) == f"backend 'cpu', asked for by the call or the module, cannot serve this call: {refusal}"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_dtypes_of_the_cpu_backend(library, dtype):
    assert select.choose("cpu", "cpu", dtype).backend == "cpu"


def test_a_dtype_without_kernels(library):
    choice = select.choose(None, "cpu", torch.float8_e4m3fn)
    assert choice.backend == "reference" and "not cpu: it has no kernels for torch.float8_e4m3fn" in choice.reason
    with pytest.raises(BackendUnavailableError, match="no kernels for torch.float8_e4m3fn"):
        select.choose("cpu", "cpu", torch.float8_e4m3fn)


def test_without_the_library(no_library, monkeypatch):
    """auto falls back and says why; a backend asked for by name does not fall back, whoever asked."""
    layer = FusedSE(8, 4)
    assert explain(X).backend == "reference"
    reasons = f"not cpu: {REASON}; not cuda: .*; not triton: .*; reference: serves cpu tensors"
    assert re.fullmatch(reasons, explain(X).reason)
    assert _ran(lambda: layer(X).sum().backward()) == {"reference.forward": 1}
    with pytest.raises(BackendUnavailableError, match=f"'cpu', asked for by the call or the module, .*: {REASON}"):
        explain(X, backend="cpu")
    with pytest.raises(BackendUnavailableError, match=REASON):
        FusedSE(8, 4, backend="cpu")(X)
    with (
        use_backend("cpu"),
        pytest.raises(BackendUnavailableError, match=f"asked for by use_backend.*{REASON}"),
    ):
        layer(X)
    monkeypatch.setattr(select, "_environment", "cpu")
    with pytest.raises(BackendUnavailableError, match=f"variable SENET_FUSED_BACKEND, cannot.*{REASON}"):
        layer(X)
    with use_backend("auto"):
        layer(X)


def test_status(no_library):
    cpu, _, _, reference = backends.status()
    assert (cpu, reference) == (("cpu", False, REASON), ("reference", True, "plain PyTorch, any device"))
    with pytest.raises(RuntimeError, match=REASON):
        native.instruction_set()


@pytest.mark.skipif(native.problem() is not None, reason="the compiled CPU library is not installed")
def test_status_with_the_library():
    status = {s.name: s for s in backends.status()}
    assert status["cpu"].available and native.instruction_set() in status["cpu"].reason


def test_loading_says_what_is_wrong(monkeypatch, tmp_path):
    monkeypatch.setattr(native, "LIBRARY", tmp_path / "_cpu.so")
    assert "not installed" in native._load() and "SENET_FUSED_NO_EXT" in native._load()
    native.LIBRARY.write_bytes(b"no library")
    assert native._load().startswith("the compiled library does not load: ")


def test_names():
    assert select.BACKEND_CHOICES == ("auto", "cpu", "cuda", "triton", "reference")
    for name in select.BACKEND_CHOICES:
        select.check_name(name, "here")
    select.check_name(None, "here")
    choices = "choose one of auto, cpu, cuda, triton, reference"
    with pytest.raises(ValueError, match=f"^here: unknown backend 'CPU'; {choices}$"):
        select.check_name("CPU", "here")


# ---------------------------------------------------------------------------------------------------- GPUs


@pytest.fixture
def gpu(monkeypatch):
    """As if there were an NVIDIA GPU, the CUDA library and triton; nothing is run with them."""
    monkeypatch.setattr(cuda, "_gpu_problem", lambda: None)
    monkeypatch.setattr(triton, "_gpu_problem", lambda: None)


def test_auto_takes_cuda_for_gpu_tensors_and_triton_without_it(gpu, monkeypatch):
    for dtype in cuda.DTYPES:
        choice = select.choose(None, "cuda", dtype)
        assert choice.backend == "cuda" and choice.reason.endswith("; cuda: serves cuda tensors")
    monkeypatch.setattr(cuda, "_gpu_problem", lambda: REASON)
    for dtype in triton.DTYPES:
        choice = select.choose(None, "cuda", dtype)
        assert choice.backend == "triton"
        assert choice.reason.endswith(f"; not cuda: {REASON}; triton: serves cuda tensors")
    with pytest.raises(BackendUnavailableError, match=f"backend 'cuda', .*: {REASON}"):
        select.choose("cuda", "cuda", torch.float32)
    choice = select.choose(None, "cuda", torch.float64)
    assert choice.backend == "reference" and "not triton: it has no kernels for torch.float64" in choice.reason


@pytest.mark.parametrize("name", ["cuda", "triton"])
def test_under_torch_compile_auto_leaves_gpu_tensors_to_the_compiler(gpu, name):
    choice = select.choose(None, "cpu", torch.bfloat16, compiling=True)
    assert choice.backend == "reference" and "torch.compile fuses the plain operators" in choice.reason
    choice = select.choose(None, "cuda", torch.bfloat16, compiling=True)
    assert choice.backend == "reference" and f"not {name}: torch.compile fuses" in choice.reason
    assert select.choose(name, "cuda", torch.bfloat16, compiling=True).backend == name


@pytest.mark.parametrize("backend", [cuda, triton], ids=["cuda", "triton"])
def test_auto_never_runs_gpu_kernels_on_cpu_tensors(no_library, monkeypatch, backend):
    name = backend.__name__.rpartition(".")[2]
    monkeypatch.setattr(backend, "problem", lambda device_type="cuda": None)
    choice = select.choose(None, "cpu", torch.float32)
    assert choice.backend == "reference" and f"not {name}: its kernels run on CPU tensors only if" in choice.reason
    assert select.choose(name, "cpu", torch.float32).backend == name


@pytest.mark.parametrize(
    ("architecture", "served", "not_served"),
    [
        ("sm_80", [(8, 0), (8, 6), (8, 9)], [(7, 5), (9, 0), (10, 0)]),
        ("sm_86", [(8, 6), (8, 9)], [(8, 0), (9, 0)]),
        ("sm_90", [(9, 0)], [(8, 9), (10, 0)]),
        ("sm_90a", [(9, 0)], [(10, 0)]),
        ("sm_100", [(10, 0), (10, 3)], [(9, 0), (12, 0)]),
        ("sm_100f", [(10, 0), (10, 3)], [(12, 0)]),
        ("compute_80", [(8, 0), (8, 9), (9, 0), (12, 0)], [(7, 5)]),
        ("compute_100", [(10, 0), (12, 0)], [(9, 0)]),
    ],
)
def test_which_gpus_compiled_code_serves(architecture, served, not_served):
    assert all(cuda.covers(architecture, capability) for capability in served)
    assert not any(cuda.covers(architecture, capability) for capability in not_served)


def test_why_cuda_cannot_run(monkeypatch, tmp_path):
    why = cuda._gpu_problem.__wrapped__
    monkeypatch.setattr(cuda, "_problem", REASON)
    assert why() == REASON
    assert cuda.problem("mps") == "it serves CUDA tensors, got mps tensors"
    with pytest.raises(RuntimeError, match=REASON):
        cuda.architectures()
    monkeypatch.setattr(cuda, "_problem", None)
    monkeypatch.setattr(cuda, "architectures", lambda: ("sm_80", "sm_90", "compute_90"))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert why() == "PyTorch finds no GPU"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.ops.senet_fused, "_cuda_driver_problem", lambda: "", raising=False)
    capabilities = [(9, 0), (12, 0)]
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda number: capabilities[number])
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda number: "Tesla V100")
    assert why() is None
    capabilities[0] = (7, 0)
    assert why() is None
    refusal = (
        "Tesla V100 has compute capability 7.0, the library was built for sm_80 sm_90 compute_90 "
        "(reinstall with TORCH_CUDA_ARCH_LIST=7.0)"
    )
    with pytest.raises(RuntimeError, match="the cuda backend cannot serve this call: Tesla V100 has compute"):
        cuda.device_facts.__wrapped__(torch.device("cuda", 0))
    capabilities[1] = (7, 0)
    assert why() == refusal
    capabilities[0] = (9, 0)
    monkeypatch.setattr(torch.ops.senet_fused, "_cuda_driver_problem", lambda: "the driver serves CUDA 12.4")
    assert why() == "the driver serves CUDA 12.4"
    monkeypatch.setattr(torch.version, "hip", "6.0")
    assert why() == "it serves NVIDIA GPUs, this PyTorch is built for AMD's"


def test_loading_the_cuda_library_says_what_is_wrong(monkeypatch, tmp_path):
    monkeypatch.setattr(cuda, "_operators", {})
    monkeypatch.setattr(cuda, "LIBRARY", tmp_path / "_cuda.so")
    if cuda._plan is not None:
        assert cuda._load().startswith("the package was built without CUDA: ") and "SENET_FUSED_CUDA=1" in cuda._load()
        cuda.LIBRARY.write_bytes(b"no library")
        assert cuda._load().startswith("the CUDA library does not load: ")
    monkeypatch.setattr(cuda, "_plan", None)
    assert "the compiled planner is not installed" in cuda._load()


def test_why_triton_cannot_run(monkeypatch):
    monkeypatch.setattr(triton, "_INTERPRETED", False)
    assert "TRITON_INTERPRET=1" in triton.problem("cpu")
    monkeypatch.setattr(triton, "_INTERPRETED", True)
    monkeypatch.setattr(triton, "_INSTALLED", False)
    assert triton.problem("cpu") == "triton is not installed (pip install triton)"
    assert triton._gpu_problem.__wrapped__() == "triton is not installed (pip install triton)"
    assert triton.problem("mps") == "it serves CUDA and ROCm tensors, got mps tensors"
    monkeypatch.setattr(triton, "_INSTALLED", True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert triton._gpu_problem.__wrapped__() == "PyTorch finds no GPU"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda number: (7, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda number: "Tesla V100")
    assert triton._gpu_problem.__wrapped__().startswith("Tesla V100 has compute capability 7.0, Triton's kernels need")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda number: (8, 0))
    assert triton._gpu_problem.__wrapped__() is None
