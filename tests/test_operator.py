"""The registered operator and eager's thin path: PyTorch's own checks, first and second derivatives, and that
both paths give the same bits."""

from __future__ import annotations

import itertools

import pytest
import torch
from layer_operator import Backward, Forward, call_of
from torch.autograd import gradcheck, gradgradcheck

import senet_fused
from senet_fused import ops, reference

pytestmark = pytest.mark.skipif(
    senet_fused.backends.native.problem() is not None, reason="the compiled CPU library is not installed"
)

FORWARD, BACKWARD = Forward("cpu"), Backward("cpu")


class Case:
    """One call: named options, and leaf tensors from a fixed seed."""

    def __init__(
        self,
        *,
        act="relu",
        gate="sigmoid",
        squeeze="avg",
        post_act="",
        residual=False,
        bias=True,
        shape=(2, 6, 3, 4),
        reduced=3,
        dtype=torch.float32,
        weight_dtype=None,
        layout=torch.contiguous_format,
        conv_weights=False,
        seed=0,
    ):
        generator = torch.Generator().manual_seed(seed)
        weight_dtype = weight_dtype or dtype

        def leaf(*sizes, of=weight_dtype):
            return torch.randn(*sizes, generator=generator, dtype=torch.float64).to(of)

        c = shape[1]
        tail = (1, 1) if conv_weights else ()
        self.x = leaf(*shape, of=dtype).contiguous(memory_format=layout).requires_grad_()
        self.w1, self.w2 = leaf(reduced, c, *tail).requires_grad_(), leaf(c, reduced, *tail).requires_grad_()
        self.b1, self.b2 = (leaf(reduced).requires_grad_(), leaf(c).requires_grad_()) if bias else (None, None)
        self.residual = leaf(*shape, of=dtype).contiguous(memory_format=layout).requires_grad_() if residual else None
        self.dy = leaf(*shape, of=dtype).contiguous(memory_format=layout)
        wide = reference.accumulate_dtype(self.x)
        self.dgate = leaf(*shape[:2], of=wide)
        self.options = (act, gate, squeeze, post_act)

    @property
    def tensors(self):
        return (self.x, self.w1, self.b1, self.w2, self.b2, self.residual)

    def leaves(self):
        return [t for t in self.tensors if t is not None]

    def call(self, run, leaves=None):
        """(y, gate) of run, which takes the operator's arguments."""
        given = iter(self.leaves() if leaves is None else leaves)
        tensors = [None if t is None else next(given) for t in self.tensors]
        return run(*tensors, *self.options, True)[:2]


def eager(*arguments):
    y, _, gate, *_ = ops.OPERATORS["cpu"].eager(call_of(*arguments[:-1]))
    return y, gate


PATHS = {"eager": eager, "registered": FORWARD}

CASES = {
    "plain": dict(),
    "no_bias": dict(bias=False, act="silu"),
    "mobilenet": dict(gate="hardsigmoid(0.2, 0.5)", act="relu", conv_weights=True),
    "residual": dict(residual=True, act="leaky_relu(0.1)"),
    "residual_relu": dict(residual=True, post_act="relu"),
    "relu": dict(post_act="relu", act="gelu"),
    "max": dict(squeeze="max", act="tanh"),
    "avgmax_relu": dict(squeeze="avgmax", post_act="relu", residual=True, act="mish", gate="tanh"),
    "channels_last": dict(layout=torch.channels_last, residual=True, post_act="relu", squeeze="avgmax"),
    "one_dimension": dict(shape=(3, 5, 7), reduced=1, gate="identity", act="sigmoid"),
    "three_dimensions": dict(
        shape=(2, 4, 2, 3, 2), layout=torch.channels_last_3d, act="hardswish", gate="relu", post_act="relu"
    ),
}


# ---------------------------------------------------------------------------------- torch.library


@pytest.mark.parametrize("name", ["plain", "mobilenet", "avgmax_relu", "channels_last", "one_dimension"])
def test_opcheck_forward(name):
    case = Case(**CASES[name])
    torch.library.opcheck(FORWARD.operator, FORWARD.arguments(*case.tensors, *case.options, True))


def test_opcheck_forward_without_a_backward():
    case = Case(residual=True, post_act="relu", dtype=torch.bfloat16, weight_dtype=torch.float32)
    tensors = [None if t is None else t.detach() for t in case.tensors]
    torch.library.opcheck(FORWARD.operator, FORWARD.arguments(*tensors, *case.options, False))


@pytest.mark.parametrize("name", ["plain", "no_bias", "residual_relu", "channels_last"])
def test_opcheck_backward(name):
    case = Case(**CASES[name])
    tensors = [None if t is None else t.detach() for t in case.tensors]
    _, gate, saved, mask = FORWARD(*tensors, *case.options, True)
    x, w1, b1, w2, b2, residual = case.tensors
    need_residual = residual is not None and case.options[3] == "relu"
    dgate = None if name == "plain" else case.dgate.requires_grad_()
    torch.library.opcheck(
        BACKWARD.operator,
        BACKWARD.arguments(
            case.dy.requires_grad_(),
            dgate,
            x,
            w1,
            b1,
            w2,
            b2,
            gate,
            saved,
            mask,
            *case.options,
            True,
            True,
            need_residual,
        ),
    )


@pytest.mark.parametrize("needs", list(itertools.product((True, False), repeat=3)))
def test_opcheck_backward_for_some_gradients_only(needs):
    case = Case(residual=True, post_act="relu")
    with torch.no_grad():
        _, gate, saved, mask = FORWARD(*case.tensors, *case.options, True)
        x, w1, b1, w2, b2, _ = (None if t is None else t.detach() for t in case.tensors)
    arguments = (case.dy, case.dgate, x, w1, b1, w2, b2, gate, saved, mask, *case.options)
    torch.library.opcheck(
        BACKWARD.operator, BACKWARD.arguments(*arguments, *needs), test_utils=("test_schema", "test_faketensor")
    )
    everything = BACKWARD(*arguments, True, True, True)
    for got, all_of_it, needed in zip(
        BACKWARD(*arguments, *needs), everything, (needs[0], *(needs[1],) * 4, needs[2]), strict=True
    ):
        assert torch.equal(got, all_of_it) if needed else got.numel() == 0


def test_vmap_of_the_operator_itself():
    case = Case(shape=(6, 4, 3, 2), residual=True, post_act="relu")
    with torch.no_grad():
        x, residual, dy = (t.detach().reshape(3, 2, 4, 3, 2) for t in (case.x, case.residual, case.dy))
        weights = [t.detach() for t in (case.w1, case.b1, case.w2, case.b2)]
        w1, b1, w2, b2 = weights
        mapped = torch.vmap(lambda x, r: FORWARD(x, *weights, r, *case.options, True))(x, residual)
        mapped_back = torch.vmap(
            lambda dy, x, gate, saved, mask: BACKWARD(
                dy, None, x, w1, b1, w2, b2, gate, saved, mask, *case.options, True, True, True
            )
        )(dy, x, *mapped[1:])
        for i in range(3):
            alone = FORWARD(x[i], *weights, residual[i], *case.options, True)
            back = BACKWARD(dy[i], None, x[i], w1, b1, w2, b2, *alone[1:], *case.options, True, True, True)
            for got, expected in zip((*mapped, *mapped_back), (*alone, *back), strict=True):
                assert torch.equal(got[i], expected)


# ---------------------------------------------------------------------------------- derivatives


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("name", CASES)
def test_gradcheck(name, path):
    small = dict(shape=(2, 3, 2, 2), reduced=2) if len(CASES[name].get("shape", (0,) * 4)) == 4 else {}
    case = Case(**{**CASES[name], **small, "dtype": torch.float64, "seed": 3})
    assert gradcheck(lambda *leaves: case.call(PATHS[path], leaves), case.leaves())


# relu is left out as act: its second derivative is 0, which a wrong rule gives as well.
@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("post_act", ["", "relu"])
@pytest.mark.parametrize("squeeze", ["avg", "max", "avgmax"])
def test_gradgradcheck(squeeze, post_act, path):
    case = Case(
        act="silu", squeeze=squeeze, post_act=post_act, residual=True, shape=(2, 2, 1, 3), reduced=2,
        dtype=torch.float64, seed=4,
    )  # fmt: skip
    assert gradgradcheck(lambda *leaves: case.call(PATHS[path], leaves), case.leaves())


def test_gradcheck_of_the_public_function():
    case = Case(shape=(2, 3, 2, 2), reduced=2, residual=True, dtype=torch.float64, act="gelu_tanh")

    def call(x, w1, b1, w2, b2, residual):
        return senet_fused.squeeze_excite(
            x, w1, w2, b1, b2, act=senet_fused.Activation("gelu", approximate="tanh"), residual=residual,
            post_act="relu", backend="cpu", return_gate=True,
        )  # fmt: skip

    senet_fused.reset_call_counts()
    assert gradcheck(call, case.leaves()) and gradgradcheck(call, case.leaves())
    assert set(senet_fused.call_counts()) == {"cpu.forward", "cpu.backward"}


def test_second_order_with_ties_of_the_maximum():
    """Planes after a ReLU tie everywhere; the reference's autograd is the oracle."""
    case = Case(squeeze="max", act="silu", shape=(2, 3, 4, 4), dtype=torch.float64)
    with torch.no_grad():
        case.x.clamp_(max=0.0)
        case.x[0, 0] = 0.0
    x, w1, b1, w2, b2, _ = case.tensors
    results = []
    for backend in ("cpu", "reference"):
        y = senet_fused.squeeze_excite(x, w1, w2, b1, b2, act="silu", squeeze="max", backend=backend)
        first = torch.autograd.grad(y, case.leaves(), case.dy, create_graph=True)
        results.append([*first, *torch.autograd.grad(sum((g**2).sum() for g in first), case.leaves())])
    for ours, expected in zip(*results, strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-9, atol=1e-9)


# ---------------------------------------------------------------------------------- both paths


def _run(case, path, second_order):
    """y, gate, all first and (if asked for) second derivatives."""
    senet_fused.reset_call_counts()
    y, gate = case.call(PATHS[path])
    outputs = [y, gate]
    leaves = case.leaves()
    upstream = [t.detach().requires_grad_(second_order) for t in (case.dy, case.dgate)]
    first = torch.autograd.grad((y, gate), leaves, upstream, create_graph=second_order)
    outputs += first
    if second_order:
        seeds = [torch.cos(3 * t.detach().double()).to(t.dtype) for t in leaves]
        outputs += torch.autograd.grad(first, [*leaves, *upstream], seeds, allow_unused=True)
    assert senet_fused.call_counts() == {"cpu.forward": 1, "cpu.backward": 1}
    return type(y.grad_fn).__name__, outputs


@pytest.mark.parametrize("second_order", [False, True], ids=["first", "second"])
@pytest.mark.parametrize(
    "dtypes",
    [
        (torch.float32, torch.float32),
        (torch.bfloat16, torch.float32),
        (torch.float16, torch.float16),
        (torch.float64,) * 2,
    ],
    ids=lambda d: "_".join(str(t).removeprefix("torch.") for t in d),
)
@pytest.mark.parametrize("name", CASES)
def test_eager_and_registered_agree_bitwise(name, dtypes, second_order):
    case = Case(**CASES[name], dtype=dtypes[0], weight_dtype=dtypes[1])
    node, thin = _run(case, "eager", second_order)
    other_node, registered = _run(case, "registered", second_order)
    assert node != other_node and "FusedSE" in node and "fused_se_cpu" in other_node
    for a, b in zip(thin, registered, strict=True):
        if a is None:
            assert b is None
        else:
            assert a.dtype == b.dtype and a.stride() == b.stride() and torch.equal(a, b)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("losses", ["y", "gate", "both"])
def test_gradients_of_some_outputs_to_some_inputs(losses, path):
    """Every subset of one or two inputs gets what it gets when all are asked for."""
    case = Case(residual=True, post_act="relu", dtype=torch.float64)

    def gradients(wanted):
        leaves = [t.detach().requires_grad_(i in wanted) for i, t in enumerate(case.leaves())]
        y, gate = case.call(PATHS[path], leaves)
        pairs = {
            "y": [(y, case.dy)],
            "gate": [(gate, case.dgate)],
            "both": [(y, case.dy), (gate, case.dgate)],
        }[losses]
        torch.autograd.backward([p[0] for p in pairs], [p[1] for p in pairs])
        return [t.grad for t in leaves]

    everything = gradients(range(6))
    zero = [i for i, g in enumerate(everything) if g is None or not g.any()]
    assert zero == ([5] if losses == "gate" else [])  # the gate does not depend on the residual
    for wanted in [(i,) for i in range(6)] + [(0, 5), (1, 4)]:
        for i, (got, expected) in enumerate(zip(gradients(wanted), everything, strict=True)):
            if i not in wanted:
                assert got is None
            elif got is None:
                assert i in zero
            else:
                assert torch.equal(got, torch.zeros_like(got) if expected is None else expected)


@pytest.mark.parametrize("path", PATHS)
def test_only_y_and_the_gate_are_differentiable(path):
    """What is kept for the backward is no result, and has no rule."""
    case = Case(post_act="relu")
    outputs = PATHS[path](*case.tensors, *case.options, True)
    assert [t.requires_grad for t in outputs] == [True, True, False, False][: len(outputs)]


def test_a_backward_needs_the_mask_that_save_keeps():
    case = Case(post_act="relu")
    y = FORWARD(*case.tensors, *case.options, False)[0]
    with pytest.raises(RuntimeError, match="save=False"):
        y.backward(case.dy)


def test_autograd_guards_what_is_saved():
    """Backward twice, or after x was changed in place, is refused as for PyTorch's own operators."""
    layer = senet_fused.FusedSE(6, 2)
    x = torch.randn(2, 6, 3, 3, requires_grad=True)
    y = layer(x)
    y.sum().backward()
    with pytest.raises(RuntimeError, match="second time"):
        y.sum().backward()
    shifted = x * 1
    y = layer(shifted)
    with torch.no_grad():
        shifted.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()
    layer(x).relu_().sum().backward()  # y itself is not needed, so it may be changed


def test_the_mask_has_a_bit_for_each_element():
    """In each layout, for sizes that fill no whole byte."""
    for shape, layout in (((2, 5, 3, 3), torch.contiguous_format), ((2, 5, 3, 3), torch.channels_last)):
        case = Case(post_act="relu", shape=shape, layout=layout)
        y, _, _, mask = FORWARD(*case.tensors, *case.options, True)
        assert torch.equal(ops.unpack_mask(mask, case.x), y > 0)


def test_negated_views_are_read_with_their_sign():
    """A dense tensor whose storage holds the negative (complex conjugates give such views)."""
    layer = senet_fused.FusedSE(6, 2)
    x = torch.randn(2, 6, 3, 3)
    view = torch._neg_view(x)
    assert view.is_neg() and view.is_contiguous()
    assert torch.equal(layer(view), layer(-x))
    with torch.no_grad():
        assert torch.equal(layer(view), layer(-x))


@pytest.mark.parametrize("name", ["no_bias", "avgmax_relu", "channels_last"])
def test_the_names_of_0_1_0_call_the_same(name):
    """Programs that torch.export has saved hold operators by name."""
    case = Case(**CASES[name])
    tensors = [None if t is None else t.detach() for t in case.tensors]
    found = torch.ops.senet_fused.squeeze_excite_cpu(*tensors, *case.options, True)
    for a, b in zip(found, FORWARD(*tensors, *case.options, True), strict=True):
        assert torch.equal(a, b)
