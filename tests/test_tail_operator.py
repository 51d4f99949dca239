"""The registered operators of block tails, eager's thin path and torch.compile; every call that cannot be served."""

from __future__ import annotations

import itertools
from types import SimpleNamespace

import pytest
import tail_oracle
import torch
from oracle import Tensors
from tail_oracle import CONSTANT, EVERYTHING, RAN, Tail, draw, fused, run
from tail_oracle import forward_arguments as arguments
from torch._dynamo.testing import CompileCounterWithBackend
from torch.autograd import gradcheck, gradgradcheck
from torch.utils._python_dispatch import TorchDispatchMode

import senet_fused
from senet_fused import block_tail
from senet_fused.call import Call, options_of
from senet_fused.functional import tail
from senet_fused.ops import OPERATORS, unpack_mask

pytestmark = pytest.mark.skipif(
    senet_fused.backends.native.problem() is not None, reason="the compiled CPU library is not installed"
)

FORWARD, BACKWARD = tail_oracle.operators("cpu")
PATHS = {"eager": lambda *a: OPERATORS["cpu"].eager(Call(*a[:-2], *options_of(a[-2]))), "registered": FORWARD}
SMALL = (2, 6, 3, 4)

CASES = {
    "plain": Tail(SMALL, 3),
    "evaluation": Tail(SMALL, 3, training=False, residual=True, post_act="relu"),
    "no gate": Tail(SMALL, residual=True, post_act="relu"),
    "no gate, evaluation": Tail(SMALL, training=False),
    "not affine": Tail(SMALL, 3, affine=False, bias=False, act="silu", gate="hardsigmoid(0.2, 0.5)"),
    "everything": Tail(SMALL, 3, **EVERYTHING),
    "channels_last": Tail(SMALL, 3, layout="channels_last", gate="tanh", **EVERYTHING),
    "one dimension": Tail((3, 5, 7), 1, gate="identity", act="sigmoid"),
    "activation": Tail(SMALL, 3, pre_act="silu", **EVERYTHING),
    "activation, evaluation": Tail(SMALL, 3, training=False, layout="channels_last", pre_act="gelu"),
    "activation, no gate": Tail(SMALL, pre_act="hardswish", residual=True),
    "three dimensions": Tail((2, 4, 2, 3, 2), 2, layout="channels_last", act="mish", post_act="relu"),
}


def leaves_of(t: Tensors) -> Tensors:
    return {k: v.detach().requires_grad_() for k, v in t.items() if k != "dy" and k not in CONSTANT}


def call(path: str, case: Tail, t: Tensors, leaves: Tensors) -> torch.Tensor:
    return PATHS[path](*arguments(case, {**t, **leaves}))[0]


def backward_arguments(case: Tail, t: Tensors, needs: tuple[bool, bool, bool]) -> tuple[object, ...]:
    with torch.no_grad():
        outputs = FORWARD(*arguments(case, t))
    return tail_oracle.backward_arguments(case, t, outputs, needs)


# ---------------------------------------------------------------------------------- torch.library


@pytest.mark.parametrize("name", ["plain", "evaluation", "no gate", "channels_last", "activation"])
def test_opcheck_forward(name):
    t = draw(CASES[name], 0)
    torch.library.opcheck(FORWARD, arguments(CASES[name], {**t, **leaves_of(t)}))


def test_opcheck_forward_without_a_backward():
    case = CASES["everything"].replace(dtype=torch.bfloat16, others=(("weight", torch.float32),))
    torch.library.opcheck(FORWARD, arguments(case, draw(case, 0), save=False))


@pytest.mark.parametrize("name", ["evaluation", "no gate", "channels_last", "activation", "activation, no gate"])
def test_opcheck_backward(name):
    case = CASES[name]
    t = draw(case, 0)
    need_residual = case.residual and case.post_act is not None
    torch.library.opcheck(BACKWARD, backward_arguments(case, {**t, **leaves_of(t)}, (True, True, need_residual)))


@pytest.mark.parametrize("needs", list(itertools.product((True, False), repeat=3)))
def test_opcheck_backward_for_some_gradients_only(needs):
    case = CASES["everything"]
    t = draw(case, 0)
    torch.library.opcheck(BACKWARD, backward_arguments(case, t, needs), test_utils=("test_schema", "test_faketensor"))
    everything = BACKWARD(*backward_arguments(case, t, (True,) * 3))
    wanted = (needs[0], *(needs[1],) * 6, needs[2])
    for got, all_of_it, needed in zip(BACKWARD(*backward_arguments(case, t, needs)), everything, wanted, strict=True):
        assert torch.equal(got, all_of_it) if needed else got.numel() == 0


def test_vmap_of_the_operators_themselves():
    case = CASES["everything"]
    draws = [draw(case, seed) for seed in range(3)]
    shared = {k: t for k, t in draws[0].items() if k not in ("x", "residual", "dy")}
    x, residual, dy = (torch.stack([t[k] for t in draws]) for k in ("x", "residual", "dy"))
    mapped = torch.vmap(lambda x, r: FORWARD(*arguments(case, {**shared, "x": x, "residual": r})))(x, residual)
    plain = backward_arguments(case, {**shared, "x": x[0], "dy": dy[0]}, (True,) * 3)
    back = torch.vmap(lambda dy, x, *kept: BACKWARD(dy, None, x, *plain[3:10], *kept, *plain[14:]))(dy, x, *mapped[1:])
    for i in range(3):
        t = {**shared, "x": x[i], "residual": residual[i], "dy": dy[i]}
        alone = *FORWARD(*arguments(case, t)), *BACKWARD(*backward_arguments(case, t, (True,) * 3))
        for got, expected in zip((*mapped, *back), alone, strict=True):
            assert torch.equal(got[i], expected)


def test_the_mask_has_a_bit_for_each_element():
    for shape, layout in (((2, 5, 3, 3), "contiguous"), ((2, 5, 3, 3), "channels_last")):
        case = Tail(shape, 2, layout=layout, post_act="relu")
        t = draw(case, 0)
        y, *_, mask = FORWARD(*arguments(case, t))
        assert torch.equal(unpack_mask(mask, t["x"]), y > 0)


@pytest.mark.parametrize("name", ["plain", "evaluation", "everything"])
def test_the_names_of_0_1_0_call_the_same(name):
    """Programs that torch.export has saved hold operators by name."""
    case, t = CASES[name], draw(CASES[name], 0)
    *tensors, eps, _, save = arguments(case, t)
    earlier = torch.ops.senet_fused.block_tail_cpu(*tensors, eps, case.act, case.gate, case.post_act or "", "", save)
    for a, b in zip(earlier, FORWARD(*arguments(case, t)), strict=True):
        assert torch.equal(a, b)


def test_a_backward_needs_the_mask_that_save_keeps():
    case = CASES["everything"]
    t = draw(case, 0)
    y = FORWARD(*arguments(case, {**t, **leaves_of(t)}, save=False))[0]
    with pytest.raises(RuntimeError, match="save=False"):
        y.backward(t["dy"])


# ---------------------------------------------------------------------------------- derivatives


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("name", CASES)
def test_gradcheck(name, path):
    case = CASES[name].replace(dtype=torch.float64)
    if len(case.shape) == 4:
        case = case.replace(shape=(2, 3, 2, 2))
    t = draw(case, 3)
    leaves = leaves_of(t)
    assert gradcheck(lambda *v: call(path, case, t, dict(zip(leaves, v, strict=True))), list(leaves.values()))


# relu is left out as act: its second derivative is 0, which a wrong rule gives as well.
@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize(
    ("training", "post_act", "reduced"), list(itertools.product((True, False), (None, "relu"), (0, 2)))
)
def test_gradgradcheck(training, post_act, reduced, path):
    case = Tail((2, 2, 1, 3), reduced, torch.float64, training=training, act="silu", residual=True, factor=True)
    case = case.replace(post_act=post_act, eps=0.1, affine=reduced == 0 or training)
    t = draw(case, 4)
    leaves = leaves_of(t)
    assert gradgradcheck(lambda *v: call(path, case, t, dict(zip(leaves, v, strict=True))), list(leaves.values()))


@pytest.mark.parametrize("training", [True, False])
def test_gradcheck_of_the_public_function(training):
    case = Tail((2, 3, 2, 2), 2, torch.float64, training=training, **EVERYTHING).replace(eps=0.1)
    t = draw(case, 0)
    leaves = leaves_of(t)
    constant = {k: t[k] for k in CONSTANT}

    def function(*values):
        kept = {k: v.clone() for k, v in constant.items()}
        return fused(case, {**kept, **dict(zip(leaves, values, strict=True))})

    senet_fused.reset_call_counts()
    assert gradcheck(function, list(leaves.values())) and gradgradcheck(function, list(leaves.values()))
    assert set(senet_fused.call_counts()) == set(RAN)


@pytest.mark.parametrize("second_order", [False, True], ids=["first", "second"])
@pytest.mark.parametrize("name", CASES)
def test_eager_and_registered_agree_bitwise(name, second_order):
    case = CASES[name]
    t = draw(case, 0)
    results = []
    for path in PATHS:
        leaves, dy = leaves_of(t), t["dy"].detach().requires_grad_(second_order)
        senet_fused.reset_call_counts()
        y = call(path, case, t, leaves)
        outputs = [y, *torch.autograd.grad(y, list(leaves.values()), dy, create_graph=second_order)]
        if second_order:
            seeds = [torch.cos(3 * g.detach()) for g in outputs[1:]]
            outputs += torch.autograd.grad(outputs[1:], [*leaves.values(), dy], seeds, allow_unused=True)
        assert senet_fused.call_counts() == RAN
        results.append((type(y.grad_fn).__name__, outputs))
    (node, thin), (other_node, registered) = results
    assert node != other_node and "FusedSE" in node and "fused_se_cpu" in other_node
    for a, b in zip(thin, registered, strict=True):
        assert (a is None and b is None) or (a.stride() == b.stride() and torch.equal(a, b))


@pytest.mark.parametrize("path", PATHS)
def test_only_y_is_differentiable(path):
    t = draw(CASES["everything"], 0)
    outputs = PATHS[path](*arguments(CASES["everything"], {**t, **leaves_of(t)}))
    count = 5 if path == "registered" else 2
    assert [t.requires_grad for t in outputs if t is not None] == [True, *(False,) * (count - 1)]


def test_autograd_guards_what_is_saved():
    """Backward twice, or after x was changed in place, is refused as for PyTorch's own operators."""
    x = torch.randn(2, 6, 3, 3, requires_grad=True)
    y = block_tail(x, training=True, backend="cpu")
    y.sum().backward()
    with pytest.raises(RuntimeError, match="second time"):
        y.sum().backward()
    shifted = x * 1
    y = block_tail(shifted, training=True, backend="cpu")
    with torch.no_grad():
        shifted.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()
    running = torch.zeros(6), torch.ones(6)
    y = block_tail(x, *running, training=True, backend="cpu")
    block_tail(x, *running, training=True, backend="cpu")  # as with F.batch_norm, they may go on
    y.relu_().sum().backward()


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_autocast_keeps_the_dtype_of_x(backend):
    case = Tail(SMALL, 3, **EVERYTHING)
    t = draw(case, 0)

    def under_autocast(case: Tail, t: Tensors) -> torch.Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return fused(case, t, backend)

    expected, found = run(lambda c, t: fused(c, t, backend), case, t), run(under_autocast, case, t)
    for name, tensor in expected.items():
        assert found[name].dtype == torch.float32 and torch.equal(found[name], tensor), name


def test_dispatch_modes_see_the_operators():
    class Seen(TorchDispatchMode):
        def __init__(self):
            super().__init__()
            self.names = []

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            self.names.append(str(function))
            return function(*args, **(kwargs or {}))

    case = CASES["everything"]
    t = draw(case, 0)
    expected = run(fused, case, t)
    with Seen() as seen:
        found = run(fused, case, t)
    assert seen.names.count("senet_fused.fused_se_cpu.default") == 1
    assert seen.names.count("senet_fused.fused_se_cpu_backward.default") == 1
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name


# ---------------------------------------------------------------------------------- torch.compile


@pytest.fixture
def nothing_compiled_yet():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.compiler
@pytest.mark.usefixtures("nothing_compiled_yet")
@pytest.mark.parametrize("name", ["everything", "evaluation"])
def test_compiled_in_default_mode(name):
    """Whole graphs forward and backward, our kernels inside once each way, and the running statistics updated."""
    case = CASES[name]
    t = draw(case, 0)
    compiled = torch.compile(lambda t: fused(case, {**t, "x": t["x"].tanh()}, None), fullgraph=True)
    results = []
    for function in (lambda c, t: compiled(t), lambda c, t: fused(c, {**t, "x": t["x"].tanh()}, None)):
        senet_fused.reset_call_counts()
        results.append(run(function, case, t))
        assert senet_fused.call_counts() == RAN
    found, expected = results
    assert ("running_mean" in found) == case.training
    for key, tensor in expected.items():
        assert found[key].stride() == tensor.stride()
        torch.testing.assert_close(found[key], tensor, rtol=1e-4, atol=1e-5, msg=lambda m, k=key: f"{k}: {m}")
        assert not key.startswith("running") or not torch.equal(found[key], t[key])


@pytest.mark.usefixtures("nothing_compiled_yet")
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("training", [True, False])
def test_one_graph_for_all_sizes(training, layout):
    """With N and the spatial sizes marked dynamic, which fails if anything specialises on one of them."""
    counter = CompileCounterWithBackend("aot_eager")
    case = Tail((2, 6, 9, 7), 2, layout=layout, training=training, **EVERYTHING)
    compiled = torch.compile(lambda t: fused(case, t), fullgraph=True, backend=counter)
    weights = draw(case, 0)
    for shape in ((2, 6, 9, 7), (3, 6, 5, 8), (7, 6, 4, 3), (4, 6, 11, 13)):
        of_samples = draw(case.replace(shape=shape), 1)
        t = {**weights, **{k: of_samples[k] for k in ("x", "residual", "dy", "factor")}}

        def marked(case, t):
            for name in ("x", "residual"):
                for d in (0, 2, 3):
                    torch._dynamo.mark_dynamic(t[name], d)
            torch._dynamo.mark_dynamic(t["factor"], 0)
            return compiled(t)

        senet_fused.reset_call_counts()
        found = run(marked, case, t)
        assert senet_fused.call_counts() == RAN
        for name, tensor in run(fused, case, t).items():
            same = torch.equal if not name.startswith("running") else torch.allclose
            assert found[name].stride() == tensor.stride() and same(found[name], tensor), name
        assert counter.frame_count == 1


@pytest.mark.usefixtures("nothing_compiled_yet")
def test_strides_that_no_kernel_reads_in_place():
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(lambda x: block_tail(x, training=True), fullgraph=True, backend=counter)
    x = torch.randn(3, 6, 8, 5)
    for view in (x[:, :, ::2], x.transpose(2, 3), x[::2], x[:, :1].expand(3, 6, 8, 5), x.permute(0, 1, 3, 2)[..., 1:]):
        expected = block_tail(view, training=True)
        y = compiled(view)
        assert y.stride() == expected.stride() and torch.equal(y, expected)


@pytest.mark.usefixtures("nothing_compiled_yet")
def test_graphs_hold_the_operator_unless_the_reference_is_asked_for():
    counter = CompileCounterWithBackend("eager")
    x = torch.randn(2, 6, 3, 3)
    compiled = torch.compile(lambda x: block_tail(x, training=True), fullgraph=True, backend=counter)
    y = compiled(x)
    with senet_fused.use_backend("reference"):
        torch.testing.assert_close(compiled(x), y)
    targets = [[n.target for n in g.graph.nodes if n.op == "call_function"] for g in counter.graphs]
    assert [FORWARD in t for t in targets] == [True, False]


# ---------------------------------------------------------------------------------- calls that cannot be served

C, R = 8, 2


def good(**changes: object) -> dict[str, object]:
    generator = torch.Generator().manual_seed(0)
    shapes = {
        "x": (2, C, 3, 4), "running_mean": (C,), "running_var": (C,), "weight": (C,), "bias": (C,), "w1": (R, C),
        "w2": (C, R), "b1": (R,), "b2": (C,), "residual": (2, C, 3, 4), "factor": (2,),
    }  # fmt: skip
    return {**{k: torch.rand(s, generator=generator) for k, s in shapes.items()}, "training": True, **changes}


def ones(*shape: int, **options: object) -> torch.Tensor:
    return torch.ones(shape, **options)


EVALUATION = {"training": False}
# name: (changes to a good call, exception, what was expected, what came)
BAD = {
    "integer x": ({"x": ones(2, C, 3, 4).int()}, TypeError, "x must be floating point", "torch.int32"),
    "no tensor": ({"x": [1.0]}, TypeError, "x must be a tensor", "list"),
    "pooled": ({"x": ones(2, C)}, ValueError, "one to three spatial dimensions", "[2, 8]"),
    "no positions": ({"x": ones(2, C, 0, 4)}, ValueError, "one spatial position", "[2, 8, 0, 4]"),
    "sparse": ({"x": ones(2, C, 3, 4).to_sparse()}, ValueError, "x must be a dense", "sparse_coo"),
    "w1 alone": ({"w2": None}, ValueError, "w1 and w2 go together", "or neither"),
    "w2 alone": ({"w1": None}, ValueError, "w1 and w2 go together", "or neither"),
    "b1 alone": ({"w1": None, "w2": None}, ValueError, "b1 and b2 are biases of w1 and w2", "missing"),
    "w1 for others": ({"w1": ones(R, 5)}, ValueError, "x [2, 8, 3, 4] has 8 channels", "[2, 5]"),
    "w2 swapped": ({"w2": ones(R, C)}, ValueError, "w2 must be [C, R] = [8, 2]", "[2, 8]"),
    "b1 size": ({"b1": ones(C)}, ValueError, "b1 must be [2]", "[8]"),
    "running_mean alone": ({"running_var": None}, ValueError, "running_mean and running_var go together", ""),
    "weight size": ({"weight": ones(5)}, ValueError, "weight must be [C] = [8] for x [2, 8, 3, 4]", "got [5]"),
    "bias rank": ({"bias": ones(1, C)}, ValueError, "bias must be [C] = [8]", "got [1, 8]"),
    "running_mean size": ({"running_mean": ones(C + 1)}, ValueError, "running_mean must be [C] = [8]", "got [9]"),
    "running_var size": ({"running_var": ones(0)}, ValueError, "running_var must be [C] = [8]", "got [0]"),
    "factor size": ({"factor": ones(C)}, ValueError, "factor must be [N], one for each sample, = [2]", "got [8]"),
    "factor number": ({"factor": 0.5}, TypeError, "factor must be a floating-point tensor or None", "float"),
    "integer weight": ({"weight": ones(C).int()}, TypeError, "weight must be a floating-point tensor", "int32"),
    "bias elsewhere": ({"bias": ones(C, device="meta")}, ValueError, "x is on cpu", "bias on meta"),
    "factor with a gradient": ({"factor": ones(2).requires_grad_()}, ValueError, "factor gets no gradient", "detach()"),
    "no statistics": (
        {**EVALUATION, "running_mean": None, "running_var": None}, ValueError, "training=False normalises by",
        "missing",
    ),
    "group in evaluation": (
        {**EVALUATION, "group": SimpleNamespace(group_name="others")}, ValueError, "group is for training", "running"
    ),
    "one value": (
        {"x": ones(1, C, 1, 1), "residual": None, "factor": None}, ValueError,
        "Expected more than 1 value per channel when training, got input size [1, 8, 1, 1]", "a single value",
    ),
    "no sample": (
        {"x": ones(0, C, 3, 3), "residual": None, "factor": None}, ValueError,
        "Expected more than 1 value per channel when training, got input size [0, 8, 3, 3]", "no value",
    ),
    "residual size": ({"residual": ones(2, C, 3, 3)}, ValueError, "residual must have x's shape [2, 8, 3, 4]", "3, 3]"),
    "integer residual": ({"residual": ones(2, C, 3, 4).int()}, TypeError, "residual must be a floating-point", "int32"),
    "act": ({"act": "softmax"}, ValueError, "unknown activation 'softmax'", "relu"),
    "act that is a gate only": ({"act": "hardsigmoid"}, ValueError, "act must be one of identity", "hardsigmoid"),
    "gate": ({"gate": "silu"}, ValueError, "gate must be one of sigmoid", "silu"),
    "post_act": ({"post_act": "silu"}, ValueError, "post_act must be 'relu' or None", "'silu'"),
    "backend": ({"backend": "gpu"}, ValueError, "choose one of auto, cpu", "'gpu'"),
    "backend for other dtypes": (
        {"x": ones(2, C, 3, 4).double(), "backend": "triton"}, senet_fused.BackendUnavailableError, "'triton'", "",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_bad_calls(name):
    changes, exception, expected, came = BAD[name]
    given = good()
    block_tail(**given)
    before = [given[k].clone() for k in ("running_mean", "running_var")]
    with pytest.raises(exception) as caught:
        block_tail(**{**given, **changes})
    assert type(caught.value) is exception and "\n" not in str(caught.value)
    assert expected in str(caught.value) and came in str(caught.value), str(caught.value)
    assert torch.equal(given["running_mean"], before[0]) and torch.equal(given["running_var"], before[1])


def test_one_value_per_channel_is_enough_for_evaluation():
    given = good(x=ones(1, C, 1, 1), residual=None, factor=None, training=False)
    torch.testing.assert_close(block_tail(**given), block_tail(**given, backend="reference"))


# ---------------------------------------------------------------------------------- C++

N, H, W = 3, 4, 5
OPTIONS = {"act": 1, "act_p0": 0.0, "gate_fn": 10, "gate_p0": 0.0, "gate_p1": 0.0, "squeeze": 0, "relu": 1}
PRE_ACT = {"pre_act": 0, "pre_act_p0": 0.0}


def raw_arguments() -> dict[str, dict[str, object]]:
    x, dy, residual = (torch.randn(N, C, H, W) for _ in range(3))
    weight, bias, b1, b2, factor = (torch.randn(s) for s in (C, C, R, C, N))
    w1, w2 = torch.randn(R, C), torch.randn(C, R)
    statistics, gate, saved = torch.empty(3, C), torch.empty(N, C), torch.empty(N, C + R)
    mask = torch.empty(N, C, (H * W + 7) // 8, dtype=torch.uint8)
    dweight, dbias, dpooled = torch.empty(C), torch.empty(C), torch.empty(N, C)
    last = {"channels_last": False}
    weights = {"w1": w1, "b1": b1, "w2": w2, "b2": b2}
    return {
        "moments": {"x": x, "eps": 1e-5, **last, "saved": saved, "statistics": statistics},
        "forward": {
            "x": x, "weight": weight, "bias": bias, "statistics": statistics, **weights, "residual": residual,
            "factor": factor, **OPTIONS, **PRE_ACT, **last, "y": torch.empty_like(x), "gate": gate, "saved": saved,
            "mask": mask,
        },
        "gradient_sums": {
            "dy": dy, "x": x, "mask": mask, "weight": weight, "bias": bias, "statistics": statistics, "w1": w1,
            "w2": w2, "factor": factor, "gate": gate, "saved": saved, **OPTIONS, **PRE_ACT, **last, "dweight": dweight,
            "dbias": dbias, "dpooled": dpooled, **{f"d{k}": torch.empty_like(t) for k, t in weights.items()},
        },
        "gradient": {
            "dy": dy, "x": x, "mask": mask, "weight": weight, "bias": bias, "statistics": statistics, "factor": factor,
            "gate": gate, "dweight": dweight, "dbias": dbias, "dpooled": dpooled, "count": 60.0, **PRE_ACT, **last,
            "dx": torch.empty_like(x), "dresidual": torch.empty_like(x),
        },
    }  # fmt: skip


RAW = {name: getattr(torch.ops.senet_fused, f"_cpu_{name}").default for name in raw_arguments()}
TENSORS = [(e, name) for e, a in raw_arguments().items() for name, t in a.items() if isinstance(t, torch.Tensor)]


def wrong_tensors(t: torch.Tensor) -> dict[str, torch.Tensor]:
    """Tensors that no kernel may accept in place of t."""
    shape = tuple(t.shape)
    sizes = ((*shape[:d], size + by, *shape[d + 1 :]) for d, size in enumerate(shape) for by in (-1, 1, -size))
    wrong = {f"shape {list(s)}": t.new_zeros(s) for s in (*sizes, (), shape[1:], (*shape, 2), (1, *shape))}
    for dtype in (torch.int64, torch.bool, torch.complex64, torch.float64, torch.int8):
        wrong[str(dtype)] = torch.zeros(shape, dtype=dtype)
    wrong["meta"] = t.to("meta")
    wrong["sparse"] = torch.zeros(shape).to_sparse()
    wrong["one element, expanded"] = t.flatten()[0].expand(shape)
    if t.dim() > 1:
        order = range(t.dim())[::-1]
        wrong["reversed strides"] = t.permute(*order).contiguous().permute(*order)
    if t.dim() == 4:
        wrong["channels_last"] = t.to(memory_format=torch.channels_last)
    return wrong


# Neither positions nor R are settled by what moments are of.
NO_MATTER = {
    "x": [f"shape {[N, C, *s]}" for s in ((H - 1, W), (H + 1, W), (H, W - 1), (H, W + 1), (H, W, 2), ())],
    "saved": [f"shape {[N, k]}" for k in (C + R - 1, C + R + 1)],
    "statistics": [],
}


@pytest.mark.parametrize(("entry", "name"), TENSORS)
def test_wrong_tensors_in_cpp(entry, name):
    """An exception, never a crash; each entry runs with the right ones."""
    given = raw_arguments()[entry]
    assert RAW[entry](*given.values()) is None
    for kind, wrong in wrong_tensors(given[name]).items():
        if entry == "moments" and kind in NO_MATTER[name]:
            continue
        with pytest.raises((RuntimeError, NotImplementedError)):
            RAW[entry](*{**given, name: wrong}.values())
            pytest.fail(f"{entry} took {name} with {kind}")


@pytest.mark.parametrize(
    ("entry", "absent", "message"),
    [
        ("forward", ("w2",), "w1 and w2 go together"),
        ("forward", ("gate",), "w1, gate and saved go together"),
        ("forward", ("w1", "w2", "gate"), "w1, gate and saved go together"),
        ("gradient_sums", ("saved",), "w1, gate, saved and dpooled go together"),
        ("gradient_sums", ("dpooled",), "w1, gate, saved and dpooled go together"),
        ("gradient_sums", ("dw1",), "dw1 and dw2 go together"),
        ("gradient_sums", ("dw1", "dw2", "db1"), "dw1 and dw2 go together"),
        ("gradient_sums", ("w1", "w2", "gate", "saved", "dpooled"), "dw1 and dw2 go together, need w1"),
        ("gradient", ("gate",), "gate and dpooled go together"),
        ("gradient", ("mask",), "without post_act dresidual is dy"),
    ],
)
def test_what_goes_together_in_cpp(entry, absent, message):
    with pytest.raises(RuntimeError, match=message):
        RAW[entry](*{**raw_arguments()[entry], **dict.fromkeys(absent)}.values())


@pytest.mark.parametrize("entry", ["forward", "gradient_sums"])
@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("act", (-1, 12, 2**40)),
        ("gate_fn", (-1, 12, 4)),
        ("relu", (-1, 2)),
        ("squeeze", (-1, 3)),
        ("pre_act", (-1, 12)),
    ],
)
def test_wrong_numbers_in_cpp(entry, name, values):
    for value in values:
        with pytest.raises(RuntimeError):
            RAW[entry](*{**raw_arguments()[entry], name: value}.values())
            pytest.fail(f"{entry} took {name}={value}")


def test_operators_refuse_wrong_shapes():
    """They copy into the layout they need, so strides and the dtypes of small tensors are free; sizes are not."""
    case = CASES["everything"]
    t = draw(case, 0)
    for name in t:
        if name in ("dy", "running_mean", "running_var"):
            continue
        for by in (-1, 1):
            wrong = t[name].new_zeros((t[name].shape[0] + by, *t[name].shape[1:]))
            with pytest.raises((RuntimeError, ValueError)):
                FORWARD(*arguments(case, {**t, name: wrong}))
                pytest.fail(f"took {name} {list(wrong.shape)}")


# ---------------------------------------------------------------------------------- the planner

MACHINE = {"threads": 8, "l2_bytes": 2**20, "l3_bytes": 2**25}


def plan(n: int, c: int, spatial: int, **facts: object):
    from senet_fused import _plan

    return _plan.plan_cpu_tail(n, c, spatial, **{**MACHINE, **facts})


def test_every_branch_of_the_plan():
    serial, small = plan(64, 256, 3136, threads=1), plan(2, 8, 16)
    assert (serial.strategy, serial.reason) == ("serial", "one thread")
    assert (small.strategy, small.reason) == ("serial", "too little work to wake a second thread")
    for n, threads, pieces in ((64, 8, 1), (8, 8, 1), (7, 8, 2), (1, 8, 8), (3, 8, 3)):
        p = plan(n, 256, 3136, threads=threads)
        assert (p.strategy, p.pieces_per_sample, p.samples_at_a_time) == ("phases", pieces, 1)
        assert p.reason == "statistics of the batch stand between the two sweeps"
    fits = 64 * 2**10 // (32 * 4)  # positions of 32 channels in 64 KiB, which one thread does alone
    assert plan(1, 32, fits).strategy == "serial" and plan(1, 32, fits + 1).strategy == "phases"
    assert plan(1, 32, fits // 2 + 1, backward=True).strategy == "phases"
    assert plan(1, 32, 2 * fits, element_size=2).strategy == "serial"
    assert [plan(n, 256, 784).stream_stores for n in (1, 32, 64)] == [False, True, False]
    assert plan(0, 256, 784).strategy == "serial" and "phases" in repr(plan(8, 256, 784))


@pytest.mark.parametrize("bad", [{"n": -1}, {"c": 0}, {"spatial": 0}, {"threads": 0}, {"element_size": 0}], ids=str)
def test_bad_sizes_of_a_plan_are_refused(bad):
    with pytest.raises(ValueError, match="plan_cpu_tail"):
        plan(**{"n": 8, "c": 256, "spatial": 49, **bad})


@pytest.mark.parametrize("dtypes", [(torch.float32,) * 2, (torch.float32, torch.float64), (torch.bfloat16,) * 2])
def test_running_statistics_move_alike_in_one_launch_or_two(dtypes):
    """As on a GPU, where it is one if dtypes allow it."""
    statistics = torch.randn(3, 7)
    moved = []
    for at_once in (False, True):
        running = [torch.linspace(0, 1, 7, dtype=dtype) for dtype in dtypes]
        tail._track(*running, statistics, 0.3, at_once=at_once)
        moved.append(running)
    for one, two, now in zip(*moved, (statistics[0], statistics[2]), strict=True):
        assert torch.equal(one, two)
        expected = 0.7 * torch.linspace(0, 1, 7) + 0.3 * now
        torch.testing.assert_close(one.float(), expected, rtol=0.02, atol=0.02)
