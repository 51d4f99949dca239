"""The elementwise functions of the C++ kernels: float32 over its whole range against float64, torch's special values.

Errors are in units in the last place of the true value, but at least of the smallest normal number. Where it crosses
zero away from zero the unit is that of a floor: for hardsigmoid 0.5; between -2 and 0, for the slopes of silu, gelu,
gelu_tanh and mish, 0.25. The largest that were found, on any instruction set, are beside the bounds in BOUNDS.
"""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from senet_fused.activations import Activation
from senet_fused.backends import native

if native.problem() is not None:
    pytest.skip(native.problem(), allow_module_level=True)
from test_determinism import BUILT, missing, run_with

FUNCTION = torch.ops.senet_fused._cpu_function.default
# Units in the last place, of values and of slopes.
BOUNDS = {
    "identity": (0, 0),
    "relu": (0, 0),
    "relu6": (0, 0),
    "leaky_relu": (1, 0.5),  # 0.84, 0.24: its slope in float32
    "silu": (3.5, 6),  # 3.06, 5.33
    "gelu": (6, 6),  # 5.65, 5.58
    "gelu_tanh": (3.5, 6),  # 3.23, 5.47
    "hardswish": (2.5, 1.5),  # 2.33, 1.33
    "mish": (4.5, 8),  # 3.96, 7.59
    "tanh": (1.5, 5),  # 1.34, 4.35
    "sigmoid": (3, 5),  # 2.25, 4.31
    "hardsigmoid": (1, 0.5),  # 0.67, 0.33
}
inf, nan = math.inf, math.nan


def activation(name: str) -> Activation:
    return Activation("gelu", approximate="tanh") if name == "gelu_tanh" else Activation(name)


def run(name: str, x: Tensor, value: Tensor | None = None, slope: bool = True) -> tuple[Tensor, Tensor | None]:
    """The value and the slope by the C++ kernels; value may be x itself."""
    f = activation(name)
    value = torch.full_like(x, nan) if value is None else value
    derivative = torch.full_like(x, nan) if slope else None
    FUNCTION(x, f.code, *(*f.args, 0.0, 0.0)[:2], value, derivative)
    return value, derivative


def _times_sigmoid(v: Tensor, w: Tensor, dw: Tensor | float) -> tuple[Tensor, Tensor]:
    return v * torch.sigmoid(w), torch.sigmoid(w) * (1 + (v * torch.sigmoid(-w)) * dw)


def _gelu(v: Tensor) -> tuple[Tensor, Tensor]:
    cdf = torch.erfc(v * -math.sqrt(0.5)) / 2
    return v * cdf, cdf + v * torch.exp(v * v / -2) / math.sqrt(2 * math.pi)


def _gelu_tanh(v: Tensor) -> tuple[Tensor, Tensor]:
    a = 2 * math.sqrt(2 / math.pi)
    return _times_sigmoid(v, a * (v + 0.044715 * v**3), a * (1 + 3 * 0.044715 * v**2))


def _mish(v: Tensor) -> tuple[Tensor, Tensor]:
    t = torch.tanh(F.softplus(v))
    return v * t, t + v * (1 - t * t) * torch.sigmoid(v)


def _by_the_package(name: str):
    return lambda v: (activation(name)(v), activation(name).derivative(v))


# In float64, written so that the tails have their digits too.
TRUE = {
    "silu": lambda v: _times_sigmoid(v, v, 1),
    "gelu": _gelu,
    "gelu_tanh": _gelu_tanh,
    "mish": _mish,
    "tanh": lambda v: (torch.tanh(v), 1 / torch.cosh(v) ** 2),
    "sigmoid": lambda v: (torch.sigmoid(v), torch.sigmoid(v) * torch.sigmoid(-v)),
}


def true(name: str, v: Tensor) -> tuple[Tensor, Tensor]:
    return TRUE.get(name, _by_the_package(name))(v.double())


def sweep() -> Tensor:
    """All exponents and both signs of float32, and [-20, 20] finely: an odd number of points, none in order."""
    magnitudes = torch.linspace(0, 0x7F7FFFFF, 100_000, dtype=torch.float64).to(torch.int32).view(torch.float32)
    points = torch.cat((magnitudes, -magnitudes, torch.linspace(-20, 20, 200_003)))
    return points[torch.randperm(len(points), generator=torch.Generator().manual_seed(0))]


def largest_error(name: str, x: Tensor, found: Tensor, true: Tensor, of_slope: bool) -> float:
    floor = torch.full_like(true, torch.finfo(torch.float32).tiny)
    if name == "hardsigmoid" and not of_slope:
        floor.fill_(0.5)
    if name in ("silu", "gelu", "gelu_tanh", "mish") and of_slope:
        floor[(x > -2) & (x < 0)] = 0.25
    _, exponent = torch.frexp(torch.maximum(true.abs(), floor))  # in [0.5, 1) * 2^exponent, with 24 bits
    errors = (found.double() - true).abs() * torch.exp2(24 - exponent.double())
    assert not errors.isnan().any(), (name, x[errors.isnan()])
    return errors.max().item()


def check_accuracy(name: str) -> tuple[float, float]:
    x = sweep()
    value, slope = run(name, x)
    alone, _ = run(name, x, slope=False)
    true_value, true_slope = true(name, x)
    found = (
        max(largest_error(name, x, v, true_value, False) for v in (value, alone)),
        largest_error(name, x, slope, true_slope, True),
    )
    assert all(f <= bound for f, bound in zip(found, BOUNDS[name], strict=True)), (name, found)
    return found


@pytest.mark.parametrize("name", BOUNDS)
def test_float32_over_its_whole_range(name):
    check_accuracy(name)


@pytest.mark.processes
@pytest.mark.parametrize("isa", BUILT)
def test_every_instruction_set(isa):
    if missing(isa):
        pytest.skip(f"this CPU lacks {missing(isa)}")
    done = run_with(isa, "functions")
    assert done.returncode == 0, done.stderr[-3000:]
    assert int(done.stdout) == len(BOUNDS)


@pytest.mark.parametrize("name", BOUNDS)
def test_float64(name):
    x = torch.linspace(-30, 30, 20_003, dtype=torch.float64)
    for found, expected in zip(run(name, x), true(name, x), strict=True):
        torch.testing.assert_close(found, expected, rtol=2e-13, atol=1e-15)


MAGNITUDES = (0.0, 1e-40, 0.3, 1.0, 1.5, 3.0, 3.0000002, 6.0, 6.0000005, 1e30, 3.4e38, inf)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("name", BOUNDS)
def test_special_values_are_torch_s(name, dtype):
    """Zeros with their signs, subnormals, kinks, infinities and NaN, as float64 in torch has them."""
    x = torch.tensor([*MAGNITUDES, *(-m for m in MAGNITUDES), nan], dtype=dtype)
    leaf = x.double().requires_grad_()
    expected = activation(name)(leaf)
    (slope,) = torch.autograd.grad(expected.sum(), leaf)
    found, found_slope = run(name, x)
    close = {"rtol": 1e-6, "atol": 1e-44, "equal_nan": True, "check_dtype": False}
    torch.testing.assert_close(found, expected.detach(), **close)
    assert torch.equal(found.signbit()[x == 0], expected.signbit()[x == 0])
    # Where x is NaN, torch's slopes of relu6 and hardswish depend on the number of elements.
    torch.testing.assert_close(found_slope[:-1], slope[:-1], **close)


@pytest.mark.parametrize("name", BOUNDS)
def test_any_number_of_elements_in_place(name):
    room = torch.linspace(-8, 8, 64)
    expected, expected_slope = run(name, room)
    for count, start in itertools.product((0, 1, 2, 15, 16, 17, 31, 32, 33, 50), (0, 1, 5)):
        part = slice(start, start + count)
        for value in (room.clone(), torch.full_like(room, 77)):
            x, around = room.clone(), value.clone()
            _, slope = run(name, x[part], value[part])
            around[part] = expected[part]
            assert torch.equal(value, around) and torch.equal(slope, expected_slope[part])
            assert torch.equal(x, room)
        x = room.clone()
        run(name, x[part], x[part], slope=count % 2 == 0)
        assert torch.equal(x, torch.cat((room[:start], expected[part], room[start + count :])))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"x": torch.zeros(4, dtype=torch.bfloat16)}, "x must be float64 or float32"),
        ({"x": torch.zeros(8)[::2]}, "x must be contiguous"),
        ({"f": -1}, "unknown function code -1"),
        ({"f": len(BOUNDS)}, f"unknown function code {len(BOUNDS)}"),
        ({"value": torch.zeros(3)}, r"value must have x's shape \[4\], got \[3\]"),
        ({"value": torch.zeros(4, dtype=torch.float64)}, "value must have x's dtype"),
        ({"value": torch.zeros(8)[::2]}, "value must be contiguous"),
        ({"slope": torch.zeros(2, 2)}, r"slope must have x's shape \[4\], got \[2, 2\]"),
        ({"slope": torch.zeros(4, dtype=torch.float64)}, "slope must have x's dtype"),
        ({"slope": torch.zeros(8)[::2]}, "slope must be contiguous"),
    ],
    ids=str,
)
def test_bad_input(arguments, message):
    whole = {"x": torch.zeros(4), "f": 1, "p0": 0.0, "p1": 0.0, "value": torch.zeros(4), "slope": torch.zeros(4)}
    with pytest.raises(RuntimeError, match=message):
        FUNCTION(*{**whole, **arguments}.values())
