"""Activation: what names a function, its canonical text, its values and derivatives beside PyTorch's."""

from __future__ import annotations

import copy
import math
import pickle

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import senet_fused
from senet_fused import Activation
from senet_fused.activations import ACT_NAMES, GATE_NAMES

STOCK = {
    "identity": lambda v: v * 1,
    "relu": F.relu,
    "relu6": F.relu6,
    "leaky_relu(0.01)": F.leaky_relu,
    "leaky_relu(0.3)": lambda v: F.leaky_relu(v, 0.3),
    "leaky_relu(-0.5)": lambda v: F.leaky_relu(v, -0.5),
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda v: F.gelu(v, approximate="tanh"),
    "hardswish": F.hardswish,
    "mish": F.mish,
    "tanh": torch.tanh,
    "sigmoid": torch.sigmoid,
    "hardsigmoid(0.16666666666666666, 0.5)": F.hardsigmoid,
    "hardsigmoid(0.2, 0.5)": lambda v: F.hardtanh(0.2 * v + 0.5, 0.0, 1.0),
}
MODULES = [
    (nn.Identity, {}, "identity"),
    (nn.ReLU, {}, "relu"),
    (nn.ReLU6, {}, "relu6"),
    (nn.LeakyReLU, {}, "leaky_relu(0.01)"),
    (nn.LeakyReLU, {"negative_slope": 0.2}, "leaky_relu(0.2)"),
    (nn.SiLU, {}, "silu"),
    (nn.GELU, {}, "gelu"),
    (nn.GELU, {"approximate": "tanh"}, "gelu_tanh"),
    (nn.Hardswish, {}, "hardswish"),
    (nn.Mish, {}, "mish"),
    (nn.Tanh, {}, "tanh"),
    (nn.Sigmoid, {}, "sigmoid"),
    (nn.Hardsigmoid, {}, "hardsigmoid(0.16666666666666666, 0.5)"),
]
CORNERS = (-100.0, -6.0, -3.0, -2.5, -1.0, -0.0, 0.0, 0.5, 2.5, 3.0, 6.0, 7.0, 100.0)


def test_every_name_is_covered_here():
    assert {Activation.of(spec).name for spec in STOCK} == {*ACT_NAMES, *GATE_NAMES}


# ---------------------------------------------------------------------------------------------------- naming


@pytest.mark.parametrize("name", sorted({*ACT_NAMES, *GATE_NAMES}))
def test_a_name_is_enough(name):
    a = Activation.of(name)
    assert a.name == name and a == Activation(name) and a.spec.partition("(")[0] == name
    assert Activation.of(a) is a
    assert Activation.of(f" {name} ") == a


@pytest.mark.parametrize(("kind", "arguments", "spec"), MODULES, ids=str)
def test_modules(kind, arguments, spec):
    assert Activation.of(kind(**arguments)).spec == spec
    if not arguments:
        assert Activation.of(kind).spec == spec
        for inplace in (True, False):
            if "inplace" in kind.__init__.__code__.co_varnames:
                assert Activation.of(kind(inplace=inplace)).spec == spec


@pytest.mark.parametrize(
    ("alias", "name"),
    [("swish", "silu"), ("hard_sigmoid", "hardsigmoid"), ("hard_swish", "hardswish"), ("linear", "identity")],
)
def test_aliases(alias, name):
    assert Activation.of(alias) == Activation(alias) == Activation(name)


def test_parameters():
    assert Activation("hardsigmoid", slope=0.2).spec == "hardsigmoid(0.2, 0.5)"
    assert Activation("hardsigmoid", slope=0.2, offset=0.4).args == (0.2, 0.4)
    assert Activation("leaky_relu", negative_slope=1).spec == "leaky_relu(1.0)"
    assert Activation.of("leaky_relu(0.1)") == Activation("leaky_relu", negative_slope=0.1)
    assert Activation.of("leaky_relu()") == Activation("leaky_relu")
    assert Activation.of("hard_sigmoid(0.2)") == Activation("hardsigmoid", slope=0.2)
    assert Activation("gelu", approximate="tanh").spec == "gelu_tanh"
    tanh = Activation.of("gelu_tanh")
    assert (tanh.name, tanh.kernel_name, tanh.args) == ("gelu", "gelu_tanh", ())
    assert Activation.of("relu").args == ()


@pytest.mark.parametrize("spec", [*STOCK, "leaky_relu(1e-08)", "leaky_relu(0.1234567890123456)"])
def test_the_spec_reads_back_exactly(spec):
    a = Activation.parse(spec)
    assert a.spec == spec and Activation.parse(a.spec) == a and eval(repr(a), {"Activation": Activation.parse}) == a


@pytest.mark.parametrize("spec", STOCK)
def test_behaves_as_a_value(spec):
    a = Activation.of(spec)
    for same in (pickle.loads(pickle.dumps(a)), copy.copy(a), copy.deepcopy(a)):
        assert same == a and hash(same) == hash(a) and same.code == a.code
    assert a != Activation("leaky_relu", negative_slope=0.77) and a != spec
    with pytest.raises(AttributeError, match="cannot be changed"):
        a.spec = "relu"
    with pytest.raises(AttributeError):
        a.anything = 1


def test_codes_are_distinct():
    codes = {Activation.of(spec).kernel_name: Activation.of(spec).code for spec in STOCK}
    assert sorted(codes.values()) == list(range(len(codes)))


# ---------------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("function", "error", "message"),
    [
        ("", ValueError, "cannot read"),
        ("softmax", ValueError, "unknown activation 'softmax'; known: .*silu"),
        ("Relu", ValueError, "unknown activation"),
        ("relu(", ValueError, "cannot read the activation"),
        ("relu(1)", ValueError, "relu takes 0 parameter"),
        ("leaky_relu(0.1, 0.2)", ValueError, r"takes 1 parameter\(s\), got 2"),
        ("leaky_relu(steep)", ValueError, "parameters must be numbers"),
        ("leaky_relu(nan)", ValueError, "must be a finite number"),
        ("hardsigmoid(inf)", ValueError, "must be a finite number"),
        ("gelu(tanh)", ValueError, "takes 0 parameter"),
        (nn.Softmax, ValueError, "Softmax is not an activation known here .known: .*nn.ReLU"),
        (nn.PReLU(), ValueError, "PReLU is not an activation"),
        (nn.Linear(2, 2), ValueError, "Linear is not an activation"),
        (type("MyReLU", (nn.ReLU,), {}), ValueError, "MyReLU is not an activation"),
        (type("MyReLU", (nn.ReLU,), {})(), ValueError, "MyReLU is not an activation"),
        (F.relu, TypeError, "a name, a torch.nn module .* got "),
        (None, TypeError, "got NoneType"),
        (3, TypeError, "got int"),
        (torch.zeros(1), TypeError, "got Tensor"),
    ],
    ids=lambda value: getattr(value, "__name__", None) or str(value),
)
def test_what_is_no_activation(function, error, message):
    with pytest.raises(error, match=message):
        Activation.of(function)


@pytest.mark.parametrize(
    ("name", "parameters", "message"),
    [
        ("relu", {"slope": 0.1}, "'relu' has no parameter slope; it takes: none"),
        ("leaky_relu", {"slope": 0.1}, "it takes: negative_slope"),
        ("hardsigmoid", {"slope": math.nan}, "finite"),
        ("hardsigmoid", {"offset": "0.5"}, "finite number, got '0.5'"),
        ("leaky_relu", {"negative_slope": True}, "finite"),
        ("gelu", {"approximate": "erf"}, "approximate must be 'none' or 'tanh', got 'erf'"),
        ("gelu_tanh", {}, "unknown activation"),
    ],
    ids=str,
)
def test_bad_parameters(name, parameters, message):
    with pytest.raises(ValueError, match=message):
        Activation(name, **parameters)


# ---------------------------------------------------------------------------------------------------- values


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("spec", STOCK)
def test_values_and_derivatives(spec, dtype):
    """f, f' as a formula and f' by autograd, at random points and at every corner."""
    a = Activation.of(spec)
    points = torch.cat((torch.linspace(-12, 12, 997), torch.tensor(CORNERS))).to(dtype)
    v = points.clone().requires_grad_()
    expected = STOCK[spec](v)
    (slope,) = torch.autograd.grad(expected.sum(), v)
    if spec.startswith("hardsigmoid(0.16"):  # PyTorch's slope is the float32 1/6 for every dtype
        assert not slope[points.abs() == 3].any()
        slope = (slope != 0) / torch.tensor(6, dtype=dtype)
    ours = a(v)
    torch.testing.assert_close(ours, expected)
    torch.testing.assert_close(torch.autograd.grad(ours.sum(), v)[0], slope)
    torch.testing.assert_close(a.derivative(points), slope)


@pytest.mark.parametrize("name", GATE_NAMES)
@pytest.mark.parametrize("slope", [None, 0.2])
def test_derivatives_of_gates_from_their_output(name, slope):
    a = Activation(name, slope=slope) if slope and name == "hardsigmoid" else Activation(name)
    points = torch.cat((torch.linspace(-8, 8, 333), torch.tensor(CORNERS[1:-1]))).double()
    torch.testing.assert_close(a.derivative_from_output(a(points)), a.derivative(points))


@pytest.mark.parametrize("spec", STOCK)
def test_nan_passes_through(spec):
    assert Activation.of(spec)(torch.tensor([math.nan, 1.0])).isnan().tolist() == [True, False]


@pytest.mark.parametrize("spec", STOCK)
def test_second_derivatives(spec):
    a = Activation.of(spec)
    v = torch.tensor([-4.1, -2.3, -0.7, 0.4, 1.9, 3.7, 6.8], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(a, v) and torch.autograd.gradgradcheck(a, v)
    assert torch.autograd.gradcheck(a.derivative, v)


def test_paddle_hardsigmoid_in_a_layer():
    x, w1, w2 = torch.randn(2, 8, 3, 3), torch.randn(4, 8), torch.randn(8, 4)
    for backend in ("auto", "reference"):
        gate = Activation("hardsigmoid", slope=0.2)
        y, g = senet_fused.squeeze_excite(x, w1, w2, gate=gate, backend=backend, return_gate=True)
        expected = torch.clamp(0.2 * (torch.relu(x.mean((2, 3)) @ w1.t()) @ w2.t()) + 0.5, 0, 1)
        torch.testing.assert_close(g, expected)
        torch.testing.assert_close(y, x * expected[:, :, None, None])
