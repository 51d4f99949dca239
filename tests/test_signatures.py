"""A fused layer or block that is itself the model is called, exported and traced by the names of its own arguments."""

from __future__ import annotations

import copy
import importlib.util
import inspect
import warnings

import pytest
import torch
from peer_blocks import LegacyBottleneck, MonaiBlock, TimmBottleneck
from peer_layers import LegacySE, MonaiSE, TimmSEModule, TorchvisionSE, TutorialSE
from torch import nn

import senet_fused
from senet_fused import FusedSE, FusedSETail, fuse, fuse_report, unfuse

C = 12


class WithDefaults(TutorialSE):
    def forward(self, features: torch.Tensor, scale: float = 1.0, *, flag: bool = False) -> torch.Tensor:
        return super().forward(features)


class WithoutGradients(TutorialSE):
    """Its forward has been wrapped: by torch.no_grad, and by somebody who leaves a mark on it."""

    @torch.no_grad()
    def forward(self, x):
        return super().forward(x)

    forward.mark = "not ours"


ROOTS = {
    "tutorial": lambda: fuse(TutorialSE(C, 4)),
    "torchvision": lambda: fuse(TorchvisionSE(C, 4)),
    "timm": lambda: fuse(TimmSEModule(C, 3)),
    "legacy": lambda: fuse(LegacySE(C, 4)),
    "monai": lambda: fuse(MonaiSE(2, C, add_residual=True)),
    "by_name": lambda: fuse(TutorialSE(C, 4), backend="cpu"),
    "legacy_block": lambda: fuse(LegacyBottleneck(), tails=True),
    "timm_block": lambda: fuse(TimmBottleneck(), tails=True),
    "monai_block": lambda: fuse(MonaiBlock(2), tails=True),
}


def root(name):
    torch.manual_seed(0)
    fused = ROOTS[name]().eval()
    assert fuse_report(fused).count("fused") or senet_fused.explain(torch.empty(0)).backend == "reference"
    return fused, unfuse(copy.deepcopy(fused)), torch.randn(5, C, 6, 5)


def argument(model):
    return next(iter(inspect.signature(model.forward).parameters))


@pytest.mark.parametrize("make", [*ROOTS.values(), lambda: fuse(WithDefaults(C, 4), verify=False)])
def test_the_signature_is_the_originals(make):
    fused = make()
    original = unfuse(copy.deepcopy(fused))
    assert type(fused) is not type(original)
    assert inspect.signature(fused.forward) == inspect.signature(original.forward)
    assert inspect.signature(type(fused).forward) == inspect.signature(type(original).forward)
    assert fused.forward.__doc__ == original.forward.__doc__
    again = copy.deepcopy(fused)
    assert inspect.signature(again.forward) == inspect.signature(original.forward)


def test_the_signature_follows_a_forward_that_is_fused_again():
    class Layer(TutorialSE):
        pass

    first = fuse(Layer(C, 4))
    assert [*inspect.signature(first.forward).parameters] == ["x"]
    forward = Layer.forward
    Layer.forward = lambda self, features: forward(self, features)
    second = fuse(Layer(C, 4))
    assert [*inspect.signature(second.forward).parameters] == ["features"]
    x = torch.randn(2, C, 3, 3)
    torch.testing.assert_close(second(features=x), unfuse(copy.deepcopy(second))(x))


def test_a_decorators_marks_on_the_original_are_not_taken_over():
    fused = fuse(WithoutGradients(C, 4), verify=False)
    assert WithoutGradients.forward.mark == "not ours" and not hasattr(type(fused).forward, "mark")


@pytest.mark.parametrize("name", ROOTS)
def test_call_by_keyword(name):
    fused, original, x = root(name)
    torch.testing.assert_close(fused(**{argument(original): x}), original(x))


@pytest.mark.parametrize(
    ("name", "by_name"), [*((name, True) for name in ROOTS), ("tutorial", False), ("timm_block", False)]
)
def test_export_with_dynamic_shapes(name, by_name):
    fused, original, x = root(name)
    shapes = {0: torch.export.Dim("n")}
    shapes = {argument(original): shapes} if by_name else (shapes,)
    program = torch.export.export(fused, (x[:2],), dynamic_shapes=shapes)
    torch.testing.assert_close(program.module()(x), original(x))


@pytest.mark.parametrize("name", ROOTS)
def test_fx(name):
    fused, original, x = root(name)
    traced = torch.fx.symbolic_trace(fused)
    assert [n.target for n in traced.graph.nodes if n.op == "placeholder"] == [argument(original)]
    torch.testing.assert_close(traced(x), original(x))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("name", ROOTS)
def test_jit_trace_with_keywords(name):
    fused, original, x = root(name)
    with warnings.catch_warnings():
        warnings.simplefilter("error", torch.jit.TracerWarning)
        traced = torch.jit.trace(fused, example_kwarg_inputs={argument(original): x[:2]})
    torch.testing.assert_close(traced(**{argument(original): x}), original(x))


@pytest.mark.skipif(
    importlib.util.find_spec("onnx") is None or importlib.util.find_spec("onnxscript") is None,
    reason="onnx or onnxscript is not installed",
)
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
@pytest.mark.parametrize("name", ["tutorial", "timm_block"])
def test_onnx_export_with_dynamic_shapes(name, tmp_path):
    import onnx
    from onnx.reference import ReferenceEvaluator

    fused, original, x = root(name)
    path = tmp_path / "model.onnx"
    shapes = {argument(original): {0: torch.export.Dim("n")}}
    torch.onnx.export(fused, (x[:2],), path, dynamo=True, dynamic_shapes=shapes, verbose=False)
    exported = onnx.load(path)
    assert {node.domain for node in exported.graph.node} == {""}
    (y,) = ReferenceEvaluator(exported).run(None, {exported.graph.input[0].name: x.numpy()})
    torch.testing.assert_close(torch.from_numpy(y), original(x).detach(), rtol=1e-4, atol=1e-4)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("wrap", [lambda m: m, nn.Sequential], ids=["root", "child"])
@pytest.mark.parametrize("kind", ["FusedSE", "FusedSETail"])
def test_torchscripts_compiler_says_what_to_do(kind, wrap):
    layer = FusedSE(C, 4) if kind == "FusedSE" else FusedSETail(nn.BatchNorm2d(C))
    with pytest.raises(RuntimeError, match=rf"cannot compile {kind}; record it with torch\.jit\.trace"):
        torch.jit.script(wrap(layer))
