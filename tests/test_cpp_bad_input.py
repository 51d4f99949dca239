"""The C++ entry points and the registered operators, called with what does not fit: an exception, never a crash."""

from __future__ import annotations

import itertools
import random

import pytest
import torch
from layer_operator import Backward, Forward
from torch import Tensor

from senet_fused.activations import ACT_NAMES, GATE_NAMES, Activation
from senet_fused.backends import native
from senet_fused.ops import empty_mask

if native.problem() is not None:
    pytest.skip(native.problem(), allow_module_level=True)

FORWARD = torch.ops.senet_fused._cpu_forward.default
BACKWARD = torch.ops.senet_fused._cpu_backward.default
OPERATOR, OPERATOR_BACKWARD = Forward("cpu"), Backward("cpu")

N, C, R, H, W = 3, 24, 5, 6, 7
SCALARS = {
    "act": 1, "act_p0": 0.0, "gate_fn": 10, "gate_p0": 0.0, "gate_p1": 0.0, "squeeze": 2, "relu": 1,
    "channels_last": False,
}  # fmt: skip
NORM = ("weight", "bias", "statistics")  # none here; with one: tests/test_tail_operator.py
INPUTS_OF_FORWARD = ("x", *NORM, "w1", "b1", "w2", "b2", "residual", "factor")
OUTPUTS_OF_FORWARD = ("y", "gate", "saved", "mask")
PRE_ACT = {"pre_act": 0, "pre_act_p0": 0.0}
INPUTS_OF_BACKWARD = ("dy", "dgate", "x", "w1", "w2", "gate", "saved", "mask")
OUTPUTS_OF_BACKWARD = ("dx", "dw1", "db1", "dw2", "db2", "dresidual")


def forward_arguments() -> dict[str, object]:
    x, w1, w2 = torch.randn(N, C, H, W), torch.randn(R, C), torch.randn(C, R)
    outputs = torch.empty_like(x), torch.empty(N, C), torch.empty(N, 3 * C + R), empty_mask(x, False)
    inputs = x, None, None, None, w1, torch.randn(R), w2, torch.randn(C), torch.randn_like(x), None
    return {
        **dict(zip(INPUTS_OF_FORWARD, inputs, strict=True)),
        **{k: v for k, v in SCALARS.items() if k != "channels_last"},
        **PRE_ACT,
        "channels_last": False,
        **dict(zip(OUTPUTS_OF_FORWARD, outputs, strict=True)),
    }


def backward_arguments() -> dict[str, object]:
    a = forward_arguments()
    FORWARD(*a.values())
    inputs = torch.randn_like(a["x"]), torch.randn(N, C), *(a[k] for k in INPUTS_OF_BACKWARD[2:])
    outputs = (torch.empty_like(a[k]) for k in ("x", "w1", "b1", "w2", "b2", "residual"))
    return {
        **dict(zip(INPUTS_OF_BACKWARD, inputs, strict=True)),
        **SCALARS,
        **dict(zip(OUTPUTS_OF_BACKWARD, outputs, strict=True)),
    }


ENTRIES = {"forward": (FORWARD, forward_arguments), "backward": (BACKWARD, backward_arguments)}
TENSORS = [
    *(("forward", name) for name in (*INPUTS_OF_FORWARD, *OUTPUTS_OF_FORWARD) if name not in (*NORM, "factor")),
    *(("backward", name) for name in (*INPUTS_OF_BACKWARD, *OUTPUTS_OF_BACKWARD)),
]
SAMPLES = ("x", "dy", "residual", "y", "dx", "dresidual")


def shapes_beside(t: Tensor) -> list[tuple[int, ...]]:
    """Shapes one step off: a size more or less, nothing, a dimension less or more, two sizes swapped."""
    shape = tuple(t.shape)
    sizes = ((*shape[:d], size + by, *shape[d + 1 :]) for d, size in enumerate(shape) for by in (-1, 1, -size))
    beside = [*sizes, (), shape[1:], (*shape, 2), (1, *shape), (t.numel(),), shape[::-1]]
    return [s for s in beside if s != shape]


def wrong_tensors(name: str, t: Tensor) -> dict[str, Tensor]:
    """Tensors that no kernel may accept in place of t."""
    wrong = {f"shape {list(s)}": t.new_zeros(s) for s in shapes_beside(t)}
    for dtype in (torch.int64, torch.bool, torch.complex64, torch.float64, torch.float8_e5m2, torch.int8):
        wrong[str(dtype)] = torch.zeros(t.shape, dtype=dtype)
    wrong["meta"] = t.to("meta")
    wrong["sparse"] = torch.zeros(t.shape).to_sparse()
    if t.dim() > 1:
        wrong["reversed strides"] = t.permute(*range(t.dim())[::-1]).contiguous().permute(*range(t.dim())[::-1])
        wrong["every other element"] = torch.cat((t, t), -1)[..., ::2]
    if t.dim() == 4:
        wrong["channels_last"] = t.to(memory_format=torch.channels_last)
    wrong["one element, expanded"] = t.flatten()[0].expand(t.shape)
    if name in ("y", "dx", "dresidual"):
        wrong["expanded samples"] = t[:1].expand(t.shape)
        wrong["sliced samples"] = torch.cat((t, t))[::2]
    return wrong


def allowed(name: str, kind: str) -> bool:
    """The few of those that are legal after all."""
    return name == "mask" and kind == "torch.uint8"


@pytest.mark.parametrize("entry", ENTRIES)
@pytest.mark.parametrize("channels_last", [False, True])
def test_the_arguments_below_are_right_otherwise(entry, channels_last):
    function, arguments = ENTRIES[entry]
    a = arguments()
    if channels_last:
        mask = torch.zeros(N, H * W, (C + 7) // 8, dtype=torch.uint8)
        a = {k: v.to(memory_format=torch.channels_last) if k in SAMPLES else v for k, v in a.items()}
        a.update(channels_last=True, mask=mask)
    assert function(*a.values()) is None


@pytest.mark.parametrize(("entry", "name"), TENSORS)
def test_wrong_tensors(entry, name):
    function, arguments = ENTRIES[entry]
    good = arguments()
    for kind, wrong in wrong_tensors(name, good[name]).items():
        call = {**good, name: wrong}
        if allowed(name, kind):
            function(*call.values())
            continue
        with pytest.raises((RuntimeError, NotImplementedError)):
            function(*call.values())
            pytest.fail(f"{entry} took {name} with {kind}")


def test_messages_name_the_tensor_and_both_shapes():
    good = forward_arguments()
    for name, wrong, message in (
        ("w2", torch.zeros(R, C), rf"w2 must be \[{C}, {R}\], got \[{R}, {C}\]"),
        ("b1", torch.zeros(R, dtype=torch.float64), "b1 has another dtype"),
        ("w1", torch.zeros(C, R).t(), "w1 must be contiguous"),
        ("residual", torch.zeros(N, C, W, H), rf"residual must have x's shape \[{N}, {C}, {H}, {W}\], got"),
        ("y", torch.zeros(N, C, W, H).transpose(2, 3), "y is not dense in contiguous order: dimension 3 of"),
        ("x", torch.zeros(N, C, H, W, dtype=torch.int32), "x must be float64, float32, bfloat16 or float16"),
    ):
        with pytest.raises(RuntimeError, match=message):
            FORWARD(*{**good, name: wrong}.values())


@pytest.mark.parametrize("entry", ENTRIES)
def test_missing_tensors(entry):
    """What the schema lets be absent may be, in every combination; nothing else."""
    function, arguments = ENTRIES[entry]
    good = arguments()
    optional = {
        "forward": ("b1", "b2", "residual", "gate", "saved", "mask"),
        "backward": ("dgate", *OUTPUTS_OF_BACKWARD),
    }[entry]
    for name, value in good.items():
        if isinstance(value, Tensor) and name not in optional:
            with pytest.raises((RuntimeError, TypeError)):
                function(*{**good, name: None}.values())
    for absent in itertools.chain.from_iterable(itertools.combinations(optional, k) for k in range(8)):
        call = {**good, **dict.fromkeys(absent)}
        weights = [call.get(name) is not None for name in ("dw1", "dw2", "db1", "db2")]
        if entry == "backward" and (weights[0] != weights[1] or (not weights[0] and any(weights[2:]))):
            with pytest.raises(RuntimeError, match="dw1 and dw2 go together"):
                function(*call.values())
        else:
            function(*call.values())


@pytest.mark.parametrize("entry", ENTRIES)
@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("act", (-1, 12, 2**31, 2**62, -(2**63))),
        ("gate_fn", (-1, 12, 2**40, *(Activation(n).code for n in ACT_NAMES if n not in GATE_NAMES), 6)),
        ("squeeze", (-1, 3, 2**33)),
        ("relu", (-1, 2, 2**32, 2**32 + 1)),
        ("channels_last", (True,)),
    ],
)
def test_wrong_numbers(entry, name, values):
    function, arguments = ENTRIES[entry]
    good = arguments()
    for value in values:
        with pytest.raises(RuntimeError):
            function(*{**good, name: value}.values())
            pytest.fail(f"{entry} took {name}={value}")


@pytest.mark.parametrize(("name", "size"), [("weight", C), ("bias", C), ("factor", N)])
def test_vectors_of_a_norm_need_one(name, size):
    with pytest.raises(RuntimeError, match="weight, bias and factor need statistics"):
        FORWARD(*{**forward_arguments(), name: torch.ones(size)}.values())


def test_a_norm_or_a_gate():
    absent = dict.fromkeys(("w1", "w2", "b1", "b2"))
    with pytest.raises(RuntimeError, match="w1 and w2, or statistics, must be there"):
        FORWARD(*{**forward_arguments(), **absent}.values())
    with pytest.raises(RuntimeError, match="with a norm the squeeze must be avg"):
        FORWARD(*{**forward_arguments(), "statistics": torch.ones(3, C)}.values())


def test_dresidual_needs_post_act():
    good = backward_arguments()
    with pytest.raises(RuntimeError, match="without post_act dresidual is dy"):
        BACKWARD(*{**good, "relu": 0}.values())


def test_weights_wider_than_x():
    """float64 weights beside float32 x: converted by the operator, refused by the kernels."""
    good = forward_arguments()
    with pytest.raises(RuntimeError, match="no kernel for weights of this dtype"):
        FORWARD(*{**good, "w1": good["w1"].double(), "w2": good["w2"].double()}.values())


@pytest.mark.parametrize("entry", ENTRIES)
def test_several_wrong_tensors_at_once(entry):
    """Pairs at random: whichever check comes first, there is one."""
    function, arguments = ENTRIES[entry]
    good = arguments()
    pool = {k: list(wrong_tensors(k, t).items()) for k, t in good.items() if isinstance(t, Tensor)}
    choose = random.Random(0)
    for _ in range(600):
        names = choose.sample(sorted(pool), 2)
        kinds = {name: choose.choice(pool[name]) for name in names}
        if all(allowed(name, kind) for name, (kind, _) in kinds.items()):
            continue
        with pytest.raises((RuntimeError, NotImplementedError)):
            function(*{**good, **{name: t for name, (_, t) in kinds.items()}}.values())
            pytest.fail(f"{entry} took {kinds}")


# ---------------------------------------------------------------------------------------------------- operators


def operator_arguments(n: int = N) -> dict[str, object]:
    return {
        "x": torch.randn(n, C, H, W), "w1": torch.randn(R, C), "b1": torch.randn(R), "w2": torch.randn(C, R),
        "b2": torch.randn(C), "residual": torch.randn(n, C, H, W), "act": "relu", "gate_fn": "sigmoid",
        "squeeze": "avg", "post_act": "relu", "save": True,
    }  # fmt: skip


def operator_backward_arguments() -> dict[str, object]:
    a = operator_arguments()
    _, gate, saved, mask = OPERATOR(*a.values())
    a.pop("residual"), a.pop("save")
    first = {"dy": torch.randn(N, C, H, W), "dgate": torch.randn(N, C), **{k: a.pop(k) for k in list(a)[:5]}}
    wanted = {"need_x": True, "need_weights": True, "need_residual": True}
    return {**first, "gate": gate, "saved": saved, "mask": mask, **a, **wanted}


OPERATORS = {
    "forward": (OPERATOR, operator_arguments),
    "backward": (OPERATOR_BACKWARD, operator_backward_arguments),
}


@pytest.mark.parametrize("entry", OPERATORS)
def test_operators_refuse_wrong_shapes_and_dtypes(entry):
    """They copy into the layout they need, so strides and the dtypes of small tensors are free; sizes are not."""
    operator, arguments = OPERATORS[entry]
    good = arguments()
    operator(*good.values())
    for name, t in good.items():
        if not isinstance(t, Tensor):
            continue
        for shape in shapes_beside(t):
            with pytest.raises((RuntimeError, ValueError, IndexError)):
                operator(*{**good, name: t.new_zeros(shape)}.values())
                pytest.fail(f"{entry} took {name} {list(shape)}")
    for dtype in (torch.int64, torch.complex64, torch.bool, torch.float8_e4m3fn):
        for name in ("x", "residual", "dy", "gate", "saved"):
            if name in good:
                with pytest.raises((RuntimeError, NotImplementedError)):
                    operator(*{**good, name: torch.zeros(good[name].shape, dtype=dtype)}.values())
                    pytest.fail(f"{entry} took {name} in {dtype}")


@pytest.mark.parametrize("entry", OPERATORS)
@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("act", "softmax"), ("act", ""), ("act", "relu)("), ("gate_fn", "silu"), ("gate_fn", "leaky_relu(0.1)"),
        ("squeeze", "sum"), ("squeeze", ""), ("post_act", "gelu"), ("post_act", "RELU"),
    ],
)  # fmt: skip
def test_operators_refuse_unknown_names(entry, name, value):
    operator, arguments = OPERATORS[entry]
    with pytest.raises((RuntimeError, ValueError)):
        operator(*{**arguments(), name: value}.values())


def test_operators_take_sizes_of_zero_only_in_the_batch():
    y, *_ = OPERATOR(*operator_arguments(0).values())
    assert y.shape == (0, C, H, W)
    good = {**operator_arguments(), "residual": None}
    for wrong in (
        {"x": torch.zeros(N, C, 0, W)},
        {"x": torch.zeros(N, 0, H, W), "w1": torch.zeros(R, 0), "w2": torch.zeros(0, R), "b2": torch.zeros(0)},
        {"w1": torch.zeros(0, C), "w2": torch.zeros(C, 0), "b1": torch.zeros(0)},
        {"x": torch.zeros(0, 0, 0, 0)},
    ):
        with pytest.raises((RuntimeError, ZeroDivisionError)):
            OPERATOR(*{**good, **wrong}.values())


def test_threads_see_no_half_checked_call():
    """Errors with several threads running, then a good call: nothing is left behind."""
    torch.set_num_threads(4)
    good = forward_arguments()
    for _ in range(50):
        with pytest.raises(RuntimeError):
            FORWARD(*{**good, "w2": torch.zeros(R, C)}.values())
        FORWARD(*good.values())
    assert good["y"].isfinite().all()
