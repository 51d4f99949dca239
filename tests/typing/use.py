"""The public names as a user's type checker sees them; `make lint` checks this file with mypy. It is not run.

assert_type fails where a public function loses its types; a `type: ignore` that nothing needs is an error as well, so
the wrong calls at the end have to remain errors.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from typing_extensions import assert_type

import senet_fused
from senet_fused import models


def layers(x: Tensor, residual: Tensor) -> None:
    se = senet_fused.FusedSE(256, reduction=16, act=nn.SiLU, gate="hardsigmoid", backend="cpu", dtype=torch.float32)
    assert_type(se.channels, int)
    assert_type(se.forward(x, residual, "relu"), Tensor)
    assert_type(senet_fused.FusedSE.from_module(nn.Identity()), senet_fused.FusedSE)
    assert_type(senet_fused.FusedSE.from_state_dict(se.state_dict(), act="silu"), senet_fused.FusedSE)
    tail = senet_fused.FusedSETail(nn.BatchNorm2d(256), se, nn.ReLU(), owner=None)
    assert_type(tail.forward(x, residual), Tensor)
    with senet_fused.capture_gates(se) as gates:
        assert isinstance(gates, Mapping)
        assert_type(gates["fc1"], list[Tensor])


def functions(x: Tensor, w1: Tensor, w2: Tensor, flag: bool) -> None:
    assert_type(senet_fused.squeeze_excite(x, w1, w2), Tensor)
    assert_type(senet_fused.squeeze_excite(x, w1, w2, return_gate=True), tuple[Tensor, Tensor])
    assert_type(senet_fused.squeeze_excite(x, w1, w2, return_gate=flag), Tensor | tuple[Tensor, Tensor])
    assert_type(senet_fused.excitation(x, w1, w2, squeeze="max"), Tensor)
    assert_type(senet_fused.block_tail(x, w1=w1, w2=w2, training=True, residual=x), Tensor)
    assert_type(senet_fused.reference.squeeze_excite(x, w1, w2), tuple[Tensor, Tensor])
    assert_type(senet_fused.explain(x, backend="auto").reason, str)
    assert_type(senet_fused.call_counts(), dict[str, int])
    assert_type(senet_fused.Activation.of(nn.ReLU()).spec, str)
    with senet_fused.use_backend("reference"):
        senet_fused.reset_call_counts()


def whole_models(model: nn.Module) -> None:
    assert_type(senet_fused.fuse(model, tails=True), nn.Module)
    assert_type(senet_fused.unfuse(model), nn.Module)
    report = senet_fused.fuse_report(model)
    assert_type(report, senet_fused.FuseReport)
    assert_type([layer.reason for layer in report if layer.fused], list[str])
    assert_type(report.count("fused"), int)
    assert_type(senet_fused.fold_batchnorm(model).folding.joined, tuple[str, ...])
    assert_type(models.senet154(se="tails"), models.SENet)


def wrong(x: Tensor) -> None:
    senet_fused.squeeze_excite(x, 3, x)  # type: ignore[call-overload]
    senet_fused.block_tail(x, training="yes")  # type: ignore[arg-type]
    senet_fused.FusedSE("256")  # type: ignore[arg-type]
    senet_fused.fuse(x)  # type: ignore[arg-type]
    print(senet_fused.fuse_report(nn.ReLU()).layer)  # type: ignore[attr-defined]
    senet_fused.Choice("cpu")  # type: ignore[call-arg]
