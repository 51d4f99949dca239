"""Calls that cannot be served: one exception each: what was expected, what came, and what to do."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import senet_fused
from senet_fused import BackendUnavailableError, FusedSE, squeeze_excite

C, R = 8, 2


def tensors(**changes):
    generator = torch.Generator().manual_seed(0)
    given = {
        "x": torch.randn(2, C, 3, 4, generator=generator),
        "w1": torch.randn(R, C, generator=generator),
        "w2": torch.randn(C, R, generator=generator),
        "b1": torch.randn(R, generator=generator),
        "b2": torch.randn(C, generator=generator),
    }
    return {**given, **changes}


def ones(*shape, **options):
    return torch.ones(shape, **options)


# name: (changes to a good call, exception, what was expected, what came, what to do)
CASES = {
    "channels": (
        dict(x=ones(2, 5, 3, 4)), ValueError, "w1 [2, 8] is for 8", "has 5 channels", "make the layer for 5",
    ),
    "channels_behind": (dict(x=ones(2, 3, 4, C)), ValueError, "is for 8", "[2, 3, 4, 8]", "x.movedim(-1, 1)"),
    "no_batch": (dict(x=ones(C, 3, 4)), ValueError, "is for 8", "x [8, 3, 4] has 3", "x[None]"),
    "pooled": (
        dict(x=ones(2, C)), ValueError, "one to three spatial dimensions", "got [2, 8]", "x[..., None]",
    ),
    "vector": (dict(x=ones(C)), ValueError, "[N, C, *spatial]", "got [8]", "one to three spatial"),
    "rank_6": (
        dict(x=ones(2, C, 2, 2, 2, 2)), ValueError, "one to three", "[2, 8, 2, 2, 2, 2]", "x.flatten(2)",
    ),
    "no_height": (
        dict(x=ones(2, C, 0, 4)), ValueError, "one spatial position", "[2, 8, 0, 4]", "only N may be 0",
    ),
    "no_length": (dict(x=ones(2, C, 0)), ValueError, "one spatial position", "[2, 8, 0]", "only N may be 0"),
    "no_channels": (
        dict(x=ones(2, 0, 3, 4), w1=ones(R, 0), w2=ones(0, R), b2=ones(0)),
        ValueError, "at least one channel", "[2, 0, 3, 4]", "only N may be 0",
    ),
    "r_0": (
        dict(w1=ones(0, C), w2=ones(C, 0), b1=ones(0)),
        ValueError, "R >= 1", "[0, 8]", "check the reduction ratio",
    ),
    "integer_x": (
        dict(x=ones(2, C, 3, 4).int()), TypeError, "x must be floating point", "torch.int32", "x.float()",
    ),
    "bool_x": (
        dict(x=ones(2, C, 3, 4).bool()), TypeError, "x must be floating point", "torch.bool", "x.float()",
    ),
    "complex_x": (dict(x=ones(2, C, 3, 4) + 0j), TypeError, "floating point", "torch.complex64", "x.float()"),
    "array_x": (
        dict(x=ones(2, C, 3, 4).numpy()), TypeError, "x must be a tensor [N, C, *spatial]", "ndarray", "",
    ),
    "no_x": (dict(x=None), TypeError, "x must be a tensor", "NoneType", ""),
    "sparse_x": (
        dict(x=ones(2, C, 3, 4).to_sparse()), ValueError, "x must be a dense", "sparse_coo", "x.to_dense()",
    ),
    "sparse_w1": (
        dict(w1=ones(R, C).to_sparse()), ValueError, "w1 must be a dense", "sparse_coo", "w1.to_dense()",
    ),
    "mkldnn_x": (dict(x=ones(2, C, 3, 4).to_mkldnn()), ValueError, "dense", "mkldnn", "x.to_dense()"),
    "integer_w1": (dict(w1=ones(R, C).int()), TypeError, "w1 must be floating point", "int32", "w1.float()"),
    "array_w2": (dict(w2=ones(C, R).numpy()), TypeError, "w1 and w2 must be tensors", "ndarray", ""),
    "swapped_weights": (dict(w1=ones(C, R), w2=ones(R, C)), ValueError, "is for 2", "has 8", "(w1 is [R, C]"),
    "w1_of_3x3": (
        dict(w1=ones(R, C, 3, 3)), ValueError, "w1 must be [R, C], or a 1x1", "[2, 8, 3, 3]", "1x1",
    ),
    "w2_vector": (dict(w2=ones(C)), ValueError, "w2 must be [C, R]", "got [8]", "[C, R]"),
    "w2_for_another_r": (dict(w2=ones(C, 3)), ValueError, "[C, R] = [8, 2]", "got [8, 3]", "to go with w1"),
    "w2_for_other_channels": (
        dict(w2=ones(9, R)), ValueError, "[C, R] = [8, 2]", "got [9, 2]", "to go with w1",
    ),
    "b1_size": (dict(b1=ones(3)), ValueError, "b1 must be [2]", "got [3]", "[2]"),
    "b2_scalar": (dict(b2=torch.tensor(1.0)), ValueError, "b2 must be [8]", "got []", "[8]"),
    "integer_b1": (
        dict(b1=ones(R).int()), TypeError, "b1 must be a floating-point tensor or None", "int32", "None",
    ),
    "number_b2": (dict(b2=0.5), TypeError, "b2 must be a floating-point tensor or None", "float", "None"),
    "residual_size": (
        dict(residual=ones(2, C, 3, 3)),
        ValueError, "x's shape [2, 8, 3, 4]", "[2, 8, 3, 3]", "project the shortcut",
    ),
    "residual_broadcast": (
        dict(residual=ones(1, C, 1, 1)), ValueError, "x's shape", "[1, 8, 1, 1]", "residual.expand_as(x)",
    ),
    "integer_residual": (
        dict(residual=ones(2, C, 3, 4).int()), TypeError, "floating-point tensor or None", "int32", "None",
    ),
    "sparse_residual": (
        dict(residual=ones(2, C, 3, 4).to_sparse()),
        ValueError, "residual must be a dense", "sparse", "to_dense()",
    ),
    "x_elsewhere": (
        dict(x=ones(2, C, 3, 4, device="meta")),
        ValueError, "one device", "x is on meta, w1 on cpu", "layer.to('meta')",
    ),
    "w2_elsewhere": (
        dict(w2=ones(C, R, device="meta")),
        ValueError, "one device", "x is on cpu, w2 on meta", "layer.to('cpu')",
    ),
    "b1_elsewhere": (
        dict(b1=ones(R, device="meta")), ValueError, "one device", "b1 on meta", "layer.to('cpu')",
    ),
    "residual_elsewhere": (
        dict(residual=ones(2, C, 3, 4, device="meta")),
        ValueError, "one device", "residual on meta", "move one",
    ),
    "act": (dict(act="rleu"), ValueError, "known: gelu", "unknown activation 'rleu'", "relu"),
    "act_that_is_a_gate_only": (
        dict(act="hardsigmoid"), ValueError, "act must be one of identity", "hardsigmoid", "relu",
    ),
    "gate": (
        dict(gate="silu"), ValueError, "gate must be one of sigmoid, hardsigmoid", "got silu", "sigmoid",
    ),
    "act_module": (dict(act=nn.PReLU()), ValueError, "known: nn.Identity", "PReLU", "senet_fused.Activation"),
    "act_function": (dict(act=torch.relu), TypeError, "a name, a torch.nn module", "builtin", "Activation"),
    "act_none": (dict(act=None), TypeError, "a name, a torch.nn module", "NoneType", "Activation"),
    "act_parameters": (dict(act="leaky_relu(a)"), ValueError, "must be numbers", "leaky_relu(a)", "numbers"),
    "act_too_many": (dict(act="relu(1)"), ValueError, "takes 0 parameter(s)", "got 1", "relu"),
    "squeeze": (dict(squeeze="mean"), ValueError, "one of avg, max, avgmax", "got 'mean'", "avg"),
    "post_act": (dict(post_act="silu"), ValueError, "'relu' or None", "got 'silu'", "None"),
    "post_act_module": (dict(post_act=nn.ReLU()), ValueError, "'relu' or None", "got ReLU()", "None"),
    "backend": (
        dict(backend="gpu"), ValueError, "choose one of auto, cpu, cuda, triton, reference", "'gpu'", "choose one of",
    ),
    "backend_that_cannot": (
        {k: v.to("meta") for k, v in tensors().items()} | dict(backend="cpu"),
        BackendUnavailableError, "serves CPU tensors", "got meta tensors", "the call or the module",
    ),
}  # fmt: skip


@pytest.mark.parametrize("training", [True, False])  # inference has a shorter way to the kernels
@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("name", CASES)
def test_one_clear_exception(name, backend, training):
    changes, kind, expected, came, remedy = CASES[name]
    with torch.set_grad_enabled(training), senet_fused.use_backend(backend), pytest.raises(kind) as error:
        squeeze_excite(**tensors(**changes))
    message = str(error.value)
    assert type(error.value) is kind and "\n" not in message
    for part in (expected, came, remedy):
        assert part in message, message
    assert senet_fused.call_counts() == {}


def test_the_good_call_that_these_change():
    squeeze_excite(**tensors())
    squeeze_excite(**tensors(residual=torch.ones(2, C, 3, 4), act=nn.ReLU, backend="auto"))


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        (dict(x=ones(2, 5, 3, 4)), "has 5 channels"),
        (dict(x=ones(2, C, 0, 4)), "one spatial position"),
        (dict(x=ones(2, C, 3, 4).int()), "floating point"),
        (dict(x=ones(2, C, 3, 4), residual=ones(2, C, 3, 3)), "x's shape"),
        (dict(x=ones(2, C, 3, 4, device="meta")), "one device"),
    ],
)
def test_the_module_says_the_same(changes, match):
    with pytest.raises((ValueError, TypeError), match=match):
        FusedSE(C, 4)(**changes)


# ---------------------------------------------------------------------------------- fine, though unusual

BACKENDS = [
    pytest.param(
        "cpu",
        marks=pytest.mark.skipif(
            senet_fused.backends.native.problem() is not None,
            reason="the compiled CPU library is not installed",
        ),
    ),
    "reference",
]


@pytest.mark.parametrize("spatial", [(4,), (3, 4), (2, 3, 4)])
@pytest.mark.parametrize("squeeze", ["avg", "max", "avgmax"])
@pytest.mark.parametrize("post_act", [None, "relu"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_an_empty_batch_gives_an_empty_result_and_zero_gradients(backend, post_act, squeeze, spatial):
    layer = FusedSE(C, 4, bias=True, squeeze=squeeze, post_act=post_act, backend=backend)
    x = torch.ones(0, C, *spatial, requires_grad=True)
    residual = torch.ones(0, C, *spatial, requires_grad=True)
    with senet_fused.capture_gates(layer) as gates:
        y = layer(x, residual)
    assert y.shape == x.shape and gates[""][0].shape == (0, C)
    (y.sum() + gates[""][0].sum()).backward()
    assert x.grad.shape == x.shape and residual.grad.shape == x.shape
    for p in layer.parameters():
        assert p.grad.shape == p.shape and not p.grad.any()
    with torch.no_grad():
        assert layer(x).shape == x.shape


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("where", ["x", "w1", "w2", "b1", "b2", "residual", "dy"])
@pytest.mark.parametrize("squeeze", ["avg", "max", "avgmax"])
@pytest.mark.skipif(
    senet_fused.backends.native.problem() is not None, reason="the compiled CPU library is not installed"
)
def test_nan_and_inf_go_through_as_in_the_reference(squeeze, where, bad):
    """The same elements are NaN, inf or finite, in y and in every gradient."""
    results = []
    for backend in ("cpu", "reference"):
        given = tensors(residual=torch.linspace(-1, 1, 192).reshape(2, C, 3, 4))
        dy = torch.linspace(1, -1, 192).reshape(2, C, 3, 4)
        target = dy if where == "dy" else given[where]
        target.view(-1)[target.numel() // 3] = bad
        leaves = {k: v.requires_grad_() for k, v in given.items()}
        y = squeeze_excite(**leaves, squeeze=squeeze, act="silu", backend=backend)
        results.append([y, *torch.autograd.grad(y, list(leaves.values()), dy)])
    for name, ours, expected in zip(("y", *leaves), *results, strict=True):
        assert torch.equal(ours.isnan(), expected.isnan()), name
        torch.testing.assert_close(ours, expected, equal_nan=True, rtol=1e-4, atol=1e-5)
