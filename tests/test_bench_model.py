"""senet_fused.bench model: networks by name, their variants, the check, the rows. No test asserts on a time."""

from __future__ import annotations

import copy
import io
import json
import re
import sys
import types

import pytest
import torch
from bench_rows import FAST, Quiet, by_provider, model_row
from torch import nn

import senet_fused
from senet_fused import cli
from senet_fused.arguments import RequestError
from senet_fused.bench import (
    cuda_timing,
    model,
    model_case,
    model_memory,
    model_report,
    model_run,
    problems,
    saved,
    session,
    variants,
    zoo,
)

SIZE = (3, 12, 10)

NETWORKS = """
import torch
from torch import nn


class SELayer(nn.Module):
    def __init__(self, channel, reduction=4):
        super().__init__()
        self.avg_pool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Sequential(
            nn.Linear(channel, channel // reduction, bias=False), nn.ReLU(inplace=True),
            nn.Linear(channel // reduction, channel, bias=False), nn.Sigmoid(),
        )

    def gate(self, x):
        n, c = x.shape[:2]
        return self.fc(self.avg_pool(x).view(n, c)).view(n, c, 1, 1)

    def forward(self, x):
        return x * self.gate(x).expand_as(x)


class GateOnly(SELayer):
    def forward(self, x):
        return self.gate(x)


class Gated(nn.Module):
    def __init__(self):
        super().__init__()
        self.se = GateOnly(8)

    def forward(self, x):
        return x * self.se(x)


class Outputs(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = small()

    def forward(self, x):
        y = self.net(x)
        return {"logits": [y, 2 * y], "argmax": y.argmax(1), "none": None}


class SEModule(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.fc1, self.fc2 = nn.Conv2d(channels, 4, 1), nn.Conv2d(4, channels, 1)
        self.relu, self.sigmoid = nn.ReLU(inplace=True), nn.Sigmoid()

    def forward(self, x):
        return x * self.sigmoid(self.fc2(self.relu(self.fc1(x.mean((2, 3), keepdim=True)))))


class Bottleneck(nn.Module):
    def __init__(self, inner, channels, widens=False):
        super().__init__()
        ends = inner if widens else channels
        self.conv1, self.bn1 = nn.Conv2d(ends, inner, 1, bias=False), nn.BatchNorm2d(inner)
        self.conv2, self.bn2 = nn.Conv2d(inner, inner, 3, padding=1, bias=False), nn.BatchNorm2d(inner)
        self.conv3, self.bn3 = nn.Conv2d(inner, channels, 1, bias=False), nn.BatchNorm2d(channels)
        self.relu, self.se_module, self.downsample = nn.ReLU(inplace=True), SEModule(channels), None
        if widens:
            self.downsample = nn.Sequential(nn.Conv2d(ends, channels, 1, bias=False), nn.BatchNorm2d(channels))

    def forward(self, x):
        y = self.relu(self.bn1(self.conv1(x)))
        y = self.relu(self.bn2(self.conv2(y)))
        shortcut = x if self.downsample is None else self.downsample(x)
        return self.relu(self.se_module(self.bn3(self.conv3(y))) + shortcut)


class RectifiesFirst(Bottleneck):
    def forward(self, x):
        y = self.relu(self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x))))))
        return self.relu(self.se_module(self.relu(self.bn3(self.conv3(y)))) + x)


def bottlenecks(last=Bottleneck):
    head = (nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 5))
    first = nn.Conv2d(3, 8, 3, padding=1, bias=False)
    return nn.Sequential(first, nn.BatchNorm2d(8), nn.ReLU(), Bottleneck(8, 16, widens=True), last(8, 16), *head)


def half_covered():
    return bottlenecks(RectifiesFirst)


def small(middle=None):
    head = (nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 5))
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.SiLU(), middle or SELayer(8),
        nn.Conv2d(8, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.SiLU(), SELayer(16), *head,
    )


def with_dropout():
    return small(nn.Sequential(SELayer(8), nn.Dropout(0.5)))


def gated():
    return small(Gated())


def plain():
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5))


def number():
    return 3


def broken():
    raise OSError("no weights here")


needs_no_brackets = 3
"""


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    path = tmp_path_factory.mktemp("networks") / "networks.py"
    path.write_text(NETWORKS)
    return path


def measure(network, names=("stock", "fused", "no-se"), modes=model.MODES, **changes):
    fields = {"batch": 2, "dtype": "float32", "amp": False, "layout": "contiguous"}
    fields |= {key: changes.pop(key) for key in list(changes) if key in fields}
    todo = [variants.ModelCase("net", SIZE, direction=mode, **fields) for mode in modes]
    options = model_run.Options(**({"variants": names, "settings": FAST} | changes))
    return model_run.run([(network, todo)], options, Quiet())


def same_weights(a, b):
    return all(torch.equal(left, right) for left, right in zip(a.parameters(), b.parameters(), strict=True))


# ----------------------------------------------------------------------------------------------------- the zoo


def test_a_network_of_a_file_depends_on_the_seed_alone(file):
    state = torch.get_rng_state()
    one, again, other = (zoo.load(f"{file}:small", seed=seed) for seed in (1, 1, 2))
    assert torch.equal(torch.get_rng_state(), state)
    assert same_weights(one, again) and not same_weights(one, other)
    assert one.training and isinstance(zoo.load(f"{file}:Gated"), nn.Module)


def test_a_file_may_import_what_lies_beside_it(tmp_path):
    (tmp_path / "lies_beside_it.py").write_text("from torch import nn\nmake = nn.ReLU\n")
    (tmp_path / "net.py").write_text("from lies_beside_it import make\n")
    path = list(sys.path)
    assert isinstance(zoo.load(f"{tmp_path / 'net.py'}:make"), nn.ReLU)
    assert sys.path == path


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("{file}:smal", "has no function 'smal'.*it has SELayer, GateOnly, Gated, Outputs, .*, small, "),
        ("{file}:needs_no_brackets", "has no function 'needs_no_brackets'"),
        ("{file}:number", "networks.py:number made a int; a torch.nn.Module is expected"),
        ("{file}:broken", "networks.py:broken failed: OSError: no weights here"),
        ("{file}:SELayer", "networks.py:SELayer failed: TypeError: .*missing 1 required"),
        ("/no/such/net.py:make", "there is no file /no/such/net.py"),
        ("{bad}:make", "running .*bad.py failed: ZeroDivisionError"),
        ("huggingface:net", "cannot read the model 'huggingface:net'; write NAME, timm:NAME"),
    ],
)
def test_a_network_that_cannot_be_made_is_refused_with_the_reason(file, tmp_path, name, message):
    bad = tmp_path / "bad.py"
    bad.write_text("1 / 0")
    with pytest.raises(RequestError, match=message):
        zoo.load(name.format(file=file, bad=bad))


@pytest.fixture
def libraries(monkeypatch):
    """Stand-ins for timm and torchvision, and what they are asked to make."""
    asked = []

    def create_model(name, **options):
        asked.append((name, options))
        network = nn.Linear(4, options.get("num_classes", 7))
        network.default_cfg = {"input_size": (1, 4, 4)}
        return network

    timm = types.ModuleType("timm")
    names = ["seresnet50", "seresnet101", "both"]
    timm.is_model, timm.list_models, timm.create_model = names.__contains__, lambda: names, create_model

    def both(*, weights="a download", progress=True, **options):
        asked.append(("both", {"weights": weights} | options))
        return nn.Linear(2, 2)

    def deeplab(*, weights="a download", weights_backbone="another"):
        asked.append(("deeplab", {"weights": weights, "weights_backbone": weights_backbone}))
        return nn.Linear(2, 2)

    torchvision, models = types.ModuleType("torchvision"), types.ModuleType("torchvision.models")
    builders = {"both": both, "deeplab": deeplab}
    models.list_models, models.get_model_builder = lambda: list(builders), builders.__getitem__
    for module in (timm, torchvision, models):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    return asked


@pytest.mark.parametrize(
    ("name", "made"),
    [
        ("seresnet50", ("seresnet50", {"pretrained": False})),
        ("both", ("both", {"pretrained": False})),
        ("timm:both", ("both", {"pretrained": False})),
        ("torchvision:both", ("both", {"weights": None})),
        ("deeplab", ("deeplab", {"weights": None, "weights_backbone": None})),
    ],
)
def test_timm_is_asked_first_and_nothing_is_downloaded(libraries, name, made):
    assert zoo.load(name).training
    assert libraries == [made]


@pytest.mark.parametrize(
    ("name", "gone", "message"),
    [
        ("seresnet5", [], "no model 'seresnet5' in timm or torchvision; similar: seresnet50, seresnet101"),
        ("torchvision:seresnet50", [], "no model 'seresnet50' in torchvision$"),
        ("seresnet5", ["torchvision"], "in timm; similar: .*; torchvision is not installed .pip install torchvision"),
        ("seresnet5", ["timm", "torchvision"], "needs timm or torchvision: pip install timm .or write FILE.py"),
        ("timm:seresnet50", ["timm"], "needs timm: pip install timm"),
    ],
)
def test_an_unknown_name_and_a_missing_library_are_told_apart(libraries, monkeypatch, name, gone, message):
    for library in gone:
        monkeypatch.delitem(sys.modules, library)
    real = zoo.importlib.import_module

    def import_module(module):
        if module in gone:
            raise ModuleNotFoundError(f"No module named {module!r}", name=module)
        return real(module)

    monkeypatch.setattr(zoo.importlib, "import_module", import_module)
    with pytest.raises(RequestError, match=message):
        zoo.load(name)
    if gone == ["timm"]:
        assert isinstance(zoo.load("both"), nn.Linear)  # torchvision's


@pytest.mark.parametrize("error", [RuntimeError("built for another"), ModuleNotFoundError("no numpy", name="numpy")])
def test_a_library_that_does_not_import_is_no_missing_one(monkeypatch, error):
    monkeypatch.setattr(zoo.importlib, "import_module", lambda name: (_ for _ in ()).throw(error))
    with pytest.raises(RequestError, match=f"timm cannot be imported: {type(error).__name__}: {error}"):
        zoo.load("seresnet50")


def test_input_sizes():
    network = nn.Linear(1, 1)
    assert zoo.input_size(network) == (3, 224, 224)
    assert zoo.input_size(network, "96") == (3, 96, 96)
    network.default_cfg = {"input_size": (1, 28, 20)}
    assert zoo.input_size(network) == (1, 28, 20) and zoo.input_size(network, "32") == (1, 32, 32)
    for text, size in (("2,64", (2, 64)), ("4,8,9", (4, 8, 9)), ("1,2,3,4", (1, 2, 3, 4))):
        assert zoo.input_size(network, text) == size
    for text in ("", "a", "3,0,4", "-1", "1,2,3,4,5", "8x8"):
        with pytest.raises(RequestError, match="cannot read the input size"):
            zoo.input_size(network, text)


def test_settling_gives_normalisations_the_statistics_of_a_batch():
    norm = nn.BatchNorm2d(3)
    nn.init.zeros_(norm.weight)
    network = nn.Sequential(nn.Conv2d(3, 3, 1), norm, nn.Dropout(0.5), nn.Flatten(), nn.LayerNorm(48)).eval()
    state = torch.get_rng_state()
    zoo.settle(network, (3, 4, 4))
    assert torch.equal(torch.get_rng_state(), state)
    assert (norm.weight == 1).all() and (norm.running_mean != 0).all() and (norm.running_var != 1).all()
    assert (norm.momentum, norm.training, network.training) == (0.1, False, False)
    zoo.settle(nn.Linear(3, 3), (4,))  # nothing to settle, nothing run


# ------------------------------------------------------------------------------------------------ the variants


def test_without_se_the_layers_are_identities(file):
    network = zoo.load(f"{file}:small")
    network.add_module("again", network[3])  # one layer in two places
    without = variants.without_se(network)
    assert [type(without[i]) for i in (3, 7)] == [nn.Identity] * 2 and isinstance(without.again, nn.Identity)
    assert type(network[3]).__name__ == "SELayer" and torch.equal(without[0].weight, network[0].weight)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("gated", r"not made: 3\.se .* returns its gate"),
        ("plain", "not made: the network has no SE layer"),
    ],
)
def test_where_se_cannot_be_removed_a_note_says_why(file, name, message):
    rows = measure(zoo.load(f"{file}:{name}"), modes=["inference"])
    row = by_provider(rows)["no-se"]
    assert re.search(message, row["note"]) and row["error"] is None and row["median_s"] is None
    assert by_provider(rows)["stock"]["median_s"] > 0 and by_provider(rows)["stock"]["price_of_se"] is None
    fused = by_provider(rows)["fused"]
    # A gate alone is faster by PyTorch's own operators on a CPU.
    assert (fused["se_layers"], fused["se_fused"]) == ((2, 1) if name == "gated" else (0, 0))
    refusal = "nothing to fuse: the network has no SE layer"
    note = r"1 of 2 SE layers fused; 3\.se is not: .*gate" if name == "gated" else refusal
    assert re.match(note, fused["note"])


def test_a_network_that_is_the_layer_is_not_made_without_it():
    with pytest.raises(variants.NoVariant, match="the network itself is the SE layer"):
        variants.without_se(senet_fused.FusedSE(8, 2))


def test_a_layer_that_is_left_is_named_and_none_at_all_is_an_error(file):
    network = zoo.load(f"{file}:small")
    network[3].fc[0].register_forward_hook(lambda *_: None)
    fused = by_provider(measure(network, modes=["inference"]))["fused"]
    assert (fused["se_layers"], fused["se_fused"], fused["error"]) == (2, 1, None)
    assert re.search("1 of 2 SE layers fused; 3 is not: .*hooks", fused["note"])


def test_layers_that_cannot_run_fused_here_are_an_error(file, monkeypatch):
    from senet_fused import select

    monkeypatch.setattr(select, "choose", lambda *_, **__: select.Choice("reference", "there are no kernels"))
    fused = by_provider(measure(zoo.load(f"{file}:small"), modes=["inference"], backend="auto"))["fused"]
    assert "0 of 2 SE layers fused; 3 is not: no kernels: there are no kernels" in fused["error"]


def test_variants_begin_with_the_same_weights_in_every_case(file, monkeypatch):
    seen, real = [], model_case.Cell.results

    def results(self, variant):
        seen.append((variant.name, copy.deepcopy(variant.model.state_dict())))
        return real(self, variant)

    monkeypatch.setattr(model_case.Cell, "results", results)
    network = zoo.load(f"{file}:small")
    rows = measure(network, modes=["training", "training", "inference"])
    assert not any(row["error"] for row in rows)
    assert [name for name, _ in seen] == ["stock", "no-se", "fused"] * 3
    for name, state in seen:
        for key, value in state.items():
            if name != "no-se" or "running" not in key:  # without SE activations are others
                assert torch.equal(value, seen[0][1][key])


# ------------------------------------------------------------------------------------------------------- tails


HAS_KERNELS = senet_fused.explain(torch.empty(0)).backend != "reference"
needs_kernels = pytest.mark.skipif(not HAS_KERNELS, reason="without compiled code no block runs with tails")


@pytest.mark.networks
@needs_kernels
@pytest.mark.parametrize(("dtype", "layout"), [("float32", "contiguous"), ("bfloat16", "channels_last")])
def test_blocks_run_with_tails_and_are_compared(file, dtype, layout):
    names = ("stock", "fused", "tails", "no-se")
    bound = 1e-4 if dtype == "float32" else 0.1
    for mode in model.MODES:
        rows = by_provider(measure(zoo.load(f"{file}:bottlenecks"), names, modes=[mode], dtype=dtype, layout=layout))
        tails = rows["tails"]
        assert (tails["error"], tails["note"], tails["backend"]) == (None, None, "cpu") and tails["median_s"] > 0
        assert [tails[key] for key in ("se_layers", "se_fused", "se_blocks", "se_tails")] == [2, 2, 2, 2]
        assert [rows["fused"][key] for key in ("se_fused", "se_blocks", "se_tails")] == [2, None, 0]
        assert tails["output_error"] < bound and (tails["gradient_error"] or 0.0) < 3 * bound
        assert (tails["gradient_error"] is None) == (tails["statistics_error"] is None) == (mode == "inference")
        assert (tails["statistics_error"] or 0.0) < bound
        assert tails["price_of_se"] == pytest.approx(tails["median_s"] / rows["no-se"]["median_s"])


@pytest.mark.networks
@needs_kernels
def test_a_block_that_is_left_is_named(file):
    row = by_provider(measure(zoo.load(f"{file}:half_covered"), ("stock", "tails"), modes=["inference"]))["tails"]
    assert (row["se_blocks"], row["se_tails"], row["error"]) == (2, 1, None) and row["median_s"] > 0
    assert re.match(r"1 of 2 blocks run with tails; 4 does not: .* differs from the known forward's", row["note"])


@pytest.mark.networks
@pytest.mark.parametrize(
    ("name", "note"),
    [
        ("small", "no tails: 0 of 1 blocks run with tails; the network does not: its forward is not one that is known"),
        ("plain", "nothing to fuse: the network has no SE layer"),
        ("the layer", "no tails: there is no block around an SE layer"),
    ],
)
def test_where_no_block_runs_with_tails_a_note_says_why(file, name, note):
    network = senet_fused.FusedSE(3, 1) if name == "the layer" else zoo.load(f"{file}:{name}")
    row = by_provider(measure(network, ("stock", "tails"), modes=["inference"]))["tails"]
    assert row["note"].startswith(note)
    assert (row["error"], row["median_s"], row["se_tails"]) == (None, None, 0)


@pytest.mark.networks
def test_tails_that_have_no_kernels_are_a_note(file, monkeypatch):
    from senet_fused import select

    monkeypatch.setattr(select, "choose", lambda *_, **__: select.Choice("reference", "there are none for this device"))
    network = zoo.load(f"{file}:bottlenecks")
    row = by_provider(measure(network, ("stock", "tails"), modes=["inference"], backend="auto"))["tails"]
    assert row["error"] is None and "3 does not: no kernels: there are none for this device" in row["note"]


@pytest.mark.networks
@needs_kernels
@pytest.mark.parametrize("what", ["output", "statistics"])
def test_tails_that_compute_something_else_are_an_error(file, monkeypatch, what):
    monkeypatch.setattr(variants, "fuse", off_by(what))
    rows = by_provider(measure(zoo.load(f"{file}:bottlenecks"), ("stock", "tails"), modes=["training"]))
    assert re.match(r"ValueError: wrong (output|running statistics): off by .*, allowed 1e-03", rows["tails"]["error"])
    assert rows["tails"]["median_s"] is rows["tails"]["saved_bytes"] is None and rows["stock"]["median_s"] > 0


# ------------------------------------------------------------------------------------------------------ memory


def test_saved_storages_count_once_and_without_the_networks_own():
    x, w = torch.randn(4, 5), torch.randn(4, 5, requires_grad=True)
    saved = model_memory.Saved((x, w))
    with saved:
        y = (x * w).exp()  # of x and w nothing is counted; exp saves what it returns
        z = y * y[:2].sum()  # that again, and the sum
        z.t().sigmoid().sum().backward()  # and what sigmoid returns
    assert saved.bytes == (20 + 1 + 20) * 4
    assert torch.allclose(w.grad, torch.autograd.grad(_again(x, w), w)[0])


def _again(x, w):
    y = (x * w).exp()
    return (y * y[:2].sum()).sigmoid().sum()


def test_the_peak_is_what_is_held_at_once():
    held = torch.zeros(1000)

    def step():
        one = torch.zeros(500)
        del one
        two, three = torch.zeros(300), torch.zeros(400)
        return two, three, held

    assert model_memory.peak_bytes(step, "cpu") == 700 * 4


@needs_kernels
def test_tails_save_the_batchnorm_outputs_in_front_of_se_less(file):
    names = ("stock", "fused", "tails")
    rows = by_provider(measure(zoo.load(f"{file}:bottlenecks"), names, modes=["training"]))
    n, c, inner, m, blocks = 2, 16, 8, SIZE[1] * SIZE[2], 2
    output = n * c * m * 4
    # ReLU saves its output, a tail a bit per element; all outputs but the last are the next convolution's input, too.
    masks = blocks * n * (inner + inner + c) * (m // 8)
    # Three statistics of a channel instead of two. Of the gate both save the same.
    statistics = (blocks * (inner + inner + c) + c) * 4
    expected = rows["stock"]["saved_bytes"] - blocks * output - output + masks + statistics
    assert rows["tails"]["saved_bytes"] == expected
    fused = rows["fused"]["saved_bytes"]
    assert rows["tails"]["saved_bytes"] < fused - 0.9 * blocks * output
    assert rows["stock"]["saved_vs_stock"] == rows["stock"]["peak_vs_stock"] == 1.0
    assert rows["tails"]["saved_vs_stock"] == rows["tails"]["saved_bytes"] / rows["stock"]["saved_bytes"] < 1
    assert rows["tails"]["peak_bytes"] < rows["stock"]["peak_bytes"]
    assert rows["stock"]["peak_bytes"] >= rows["stock"]["saved_bytes"]


def test_a_memory_that_cannot_be_measured_is_a_note(file, monkeypatch):
    def peak_bytes(step, device):
        raise RuntimeError("no profiler")

    monkeypatch.setattr(model_case, "peak_bytes", peak_bytes)
    row = by_provider(measure(zoo.load(f"{file}:small"), modes=["training"]))["stock"]
    assert row["note"] == "its memory could not be measured: RuntimeError: no profiler" and row["median_s"] > 0
    assert row["peak_bytes"] is row["saved_bytes"] is row["error"] is None


# -------------------------------------------------------------------------------------------------- the check


@pytest.mark.parametrize(("dtype", "amp"), [("float32", False), ("bfloat16", False), ("bfloat16", True)])
@pytest.mark.parametrize("layout", problems.LAYOUTS)
def test_rows_hold_what_was_measured(file, layout, dtype, amp):
    rows = measure(zoo.load(f"{file}:small"), layout=layout, dtype=dtype, amp=amp)
    kind = saved.KINDS["model"]
    assert set(rows[0]) >= {*kind.identity, *kind.figures}
    assert [(row["mode"], row["provider"]) for row in rows] == [
        (mode, name) for mode in model.MODES for name in ("stock", "fused", "no-se")
    ]
    auto = senet_fused.explain(torch.empty(1, 1, 1, 1), backend="auto").backend
    bound = 1e-4 if dtype == "float32" else 0.1
    for row in rows:
        assert (row["error"], row["note"]) == (None, None) and row["median_s"] > 0 and row["samples"] == 2
        assert (row["model"], row["batch"], row["size"]) == ("net", 2, "3,12,10")
        assert (row["dtype"], row["amp"], row["layout"]) == (dtype, amp, layout)
        assert row["backend"] == (auto if row["provider"] == "fused" else "aten")
        stock, without = (by_provider(r for r in rows if r["mode"] == row["mode"])[n] for n in ("stock", "no-se"))
        assert row["speedup_vs_stock"] == pytest.approx(stock["median_s"] / row["median_s"])
        assert row["price_of_se"] == pytest.approx(row["median_s"] / without["median_s"])
        assert row["images_per_s"] == pytest.approx(2 / row["median_s"])
        if row["provider"] == "fused":
            assert (row["se_layers"], row["se_fused"]) == (2, 2)
            assert row["output_error"] < bound
            assert (row["gradient_error"] is None) == (row["mode"] == "inference")
            assert (row["gradient_error"] or 0.0) < 3 * bound
        elif dtype == "float32":
            assert row["output_error"] is row["gradient_error"] is None
        else:  # against itself in float32
            assert 1e-4 < row["output_error"] < bound


def off_by(what):
    """fuse, but the network's output, or only its gradients or running statistics, are a little off."""

    def change(network, inputs, y):
        if what == "statistics":
            network[1].running_var = network[1].running_var * (1.01 if network.training else 1.0)
            return y
        return y * 1.01 if what == "output" else y + 0.01 * (y - y.detach())

    def fuse(network, **options):
        network = senet_fused.fuse(network, **options)
        network.register_forward_hook(change)
        return network

    return fuse


@pytest.mark.networks
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_wrong_output_is_an_error_in_float32_and_told_in_bfloat16(file, monkeypatch, dtype):
    monkeypatch.setattr(variants, "fuse", off_by("output"))
    for row in measure(zoo.load(f"{file}:small"), dtype=dtype):
        if row["provider"] == "fused":
            assert 0.005 < row["output_error"] < (0.015 if dtype == "float32" else 0.05)
            wrong = "ValueError: wrong output: off by 1.0e-02, allowed 1e-03" if dtype == "float32" else None
            assert row["error"] == wrong and (row["median_s"] is None) == (wrong is not None)
        else:
            assert row["error"] is None and row["median_s"] > 0


def test_a_network_that_magnifies_rounding_is_no_wrong_output(file):
    class Magnifier(nn.Module):
        def forward(self, y):
            return (y * 1e8).sin()

    network = nn.Sequential(zoo.load(f"{file}:small"), Magnifier())
    row = by_provider(measure(network, modes=["inference"], batch=64))["fused"]
    assert row["error"] is None and row["output_error"] > 0.1
    assert "the last bit of its input moves stock's output by" in row["note"]


def test_a_wrong_gradient_is_told(file, monkeypatch):
    monkeypatch.setattr(variants, "fuse", off_by("gradients"))
    row = by_provider(measure(zoo.load(f"{file}:small"), modes=["training"]))["fused"]
    assert row["error"] is None and row["output_error"] < 1e-5
    assert row["gradient_error"] == pytest.approx(0.01, rel=0.1)


@pytest.mark.networks
def test_wrong_running_statistics_are_an_error_in_training(file, monkeypatch):
    monkeypatch.setattr(variants, "fuse", off_by("statistics"))
    inference, training = (row for row in measure(zoo.load(f"{file}:small")) if row["provider"] == "fused")
    assert (inference["error"], inference["statistics_error"]) == (None, None)
    assert training["error"].startswith("ValueError: wrong running statistics: off by ")
    assert training["output_error"] < 1e-5 < 1e-3 < training["statistics_error"] < 0.01


def test_what_fails_is_a_row_and_the_others_go_on(file, monkeypatch):
    def fuse(network, **options):
        raise OSError("no library\nand more")

    monkeypatch.setattr(variants, "fuse", fuse)
    rows = by_provider(measure(zoo.load(f"{file}:small"), modes=["inference"]))
    assert rows["fused"]["error"] == "OSError: no library" and rows["no-se"]["price_of_se"] == 1.0
    rows = measure(zoo.load(f"{file}:small"), dtype="float64_")
    assert len(rows) == 6 and all("float64_" in row["error"] for row in rows)


def test_an_input_that_the_network_cannot_take_is_told_with_the_option(file):
    rows = measure(nn.Sequential(nn.BatchNorm2d(4)))
    assert len(rows) == 6
    assert all(row["error"].endswith("(on an input of 3x12x10; --size gives another)") for row in rows)


def test_where_stock_fails_nothing_is_compared():
    rows = by_provider(measure(nn.Conv2d(4, 4, 1), ("compile", "no-se"), modes=["inference"]))
    assert rows["compile"]["error"].startswith("RuntimeError: nothing to compare with: stock failed, RuntimeError")
    assert rows["no-se"]["note"].startswith("not made")


@pytest.mark.networks
def test_outputs_of_any_kind_are_compared_and_trained(file):
    rows = by_provider(measure(zoo.load(f"{file}:Outputs"), modes=["training"]))
    assert [row["error"] for row in rows.values()] == [None] * 3
    assert 0 <= rows["fused"]["output_error"] < 1e-5 and rows["fused"]["gradient_error"] < 1e-3


@pytest.mark.networks
def test_an_output_that_is_not_finite_is_not_compared(file):
    network = zoo.load(f"{file}:small")
    network[-1].bias.data.fill_(float("inf"))
    row = by_provider(measure(network, modes=["inference"]))["fused"]
    assert row["note"].startswith("not compared: ") and row["median_s"] > 0


@pytest.mark.networks
@pytest.mark.parametrize(("what", "note"), [("output", "its output has inf"), ("gradients", "its gradients have inf")])
def test_infinities_are_told(file, monkeypatch, what, note):
    def change(network, inputs, y):
        if what == "output":
            return y * float("inf")
        if y.requires_grad:
            y.register_hook(lambda dy: dy * float("inf"))

    def fuse(network, **options):
        senet_fused.fuse(network, **options).register_forward_hook(change)
        return network

    monkeypatch.setattr(variants, "fuse", fuse)
    row = by_provider(measure(zoo.load(f"{file}:small"), modes=["training"], dtype="bfloat16"))["fused"]
    assert row["note"].startswith(note) and row["gradient_error"] is None and row["error"] is None
    assert (row["output_error"] is None) == (what == "output")


@pytest.fixture
def quick_compile(monkeypatch):
    """torch.compile without inductor; the modes that were asked for."""
    modes, real = [], torch.compile

    def compile_(module, mode=None, **_):
        modes.append(mode)
        return real(module, backend=lambda g, i: g.forward, dynamic=False)

    monkeypatch.setattr(torch, "compile", compile_)
    return modes


@pytest.mark.compiler
def test_every_variant_can_be_measured(file, quick_compile):
    names = tuple(name for name in model.VARIANTS if name not in model.GRAPHS and not name.startswith("folded"))
    rows = measure(zoo.load(f"{file}:bottlenecks"), names)
    assert [(row["provider"], row["error"]) for row in rows] == [(name, None) for name in names] * 2
    assert all(row["median_s"] > 0 and row["price_of_se"] > 0 for row in rows)
    compared = {row["provider"] for row in rows if row["output_error"] is not None}
    assert compared == {"compile", "max-autotune", "fused", "fused+compile", "tails", "tails+compile", "no-se+compile"}
    for row in rows:  # all against no-se, not compiled
        without = by_provider(r for r in rows if r["mode"] == row["mode"])["no-se"]
        assert row["price_of_se"] == pytest.approx(row["median_s"] / without["median_s"])
        assert (row["saved_bytes"] is None) == (row["peak_bytes"] is None) == (row["mode"] == "inference")
        if row["mode"] == "training":
            assert 0 < row["saved_bytes"] < row["peak_bytes"]
    auto = senet_fused.explain(torch.empty(1, 1, 1, 1), backend="auto").backend
    ran = {row["provider"]: row["backend"] for row in rows}
    assert (ran["stock"], ran["compile"], ran["fused"], ran["no-se+compile"]) == ("aten", "inductor", auto, "inductor")


@pytest.mark.compiler
def test_max_autotune_is_torch_compiles_mode(file, quick_compile):
    rows = measure(zoo.load(f"{file}:small"), ("stock", "compile", "max-autotune"), modes=["inference"])
    assert [row["error"] for row in rows] == [None] * 3 and quick_compile == [None, "max-autotune"]


# ------------------------------------------------------------------------------------------------------ folded

FOLDED = ("folded", "folded+compile", "folded+fused", "folded+fused+compile")


@pytest.mark.networks
def test_folded_networks_are_compared_with_stock(file, quick_compile):
    names = ("stock", *FOLDED, "no-se")
    rows = by_provider(measure(zoo.load(f"{file}:bottlenecks"), names, modes=["inference"]))
    assert [(row["error"], row["note"]) for row in rows.values()] == [(None, None)] * 6
    auto = senet_fused.explain(torch.empty(1, 1, 1, 1), backend="auto").backend
    for name in FOLDED:
        row = rows[name]
        assert row["median_s"] > 0 and 0 < row["output_error"] < 1e-5
        assert row["price_of_se"] == pytest.approx(row["median_s"] / rows["no-se"]["median_s"])
        # Eight BatchNorms and two layers.
        assert (row["norms_folded"], row["se_joined"], row["se_fused"]) == ((8, 2, 2) if "fused" in name else (8, 0, 0))
    assert (rows["folded"]["backend"], rows["folded+fused"]["backend"]) == ("aten", auto)
    assert rows["folded+compile"]["backend"] == "inductor" and rows["stock"]["norms_folded"] == 0


@pytest.mark.networks
def test_folded_networks_are_for_inference(file):
    rows = by_provider(measure(zoo.load(f"{file}:small"), ("stock", *FOLDED), modes=["training"]))
    for name in FOLDED:
        assert rows[name]["note"].startswith("for inference only") and rows[name]["error"] is None
        assert rows[name]["median_s"] is None and rows["stock"]["median_s"] > 0


@pytest.mark.networks
def test_a_network_that_is_folded_in_part_or_not_at_all_is_told(file):
    names = ("stock", "folded", "folded+fused")

    class Decides(nn.Module):
        def forward(self, x):
            return x if x.sum() > 0 else -x

    plain = by_provider(measure(zoo.load(f"{file}:plain"), names, modes=["inference"]))
    assert plain["folded"]["note"] == "nothing to fold: the network has no BatchNorm"
    assert plain["folded+fused"]["note"] == "nothing to fuse: the network has no SE layer"
    stubborn = nn.Sequential(zoo.load(f"{file}:small"), Decides())
    row = by_provider(measure(stubborn, names, modes=["inference"]))["folded"]
    assert re.match(r"not folded: .*torch.fx cannot trace 1 \(Decides\)", row["note"]) and row["error"] is None
    part = nn.Sequential(nn.BatchNorm2d(3), zoo.load(f"{file}:small"))
    row = by_provider(measure(part, names, modes=["inference"]))["folded+fused"]
    assert (row["norms_folded"], row["se_fused"], row["se_joined"]) == (2, 2, 0) and row["median_s"] > 0
    assert row["note"] == "1 BatchNorms are not folded; 0 is not: there is no convolution in front of it"


@pytest.mark.networks
def test_a_folding_that_computes_something_else_is_an_error(file, monkeypatch):
    def fold_batchnorm(network, **options):
        folded = senet_fused.fold_batchnorm(network, **options)
        next(folded.parameters()).data.mul_(1.1)
        return folded

    monkeypatch.setattr(variants, "fold_batchnorm", fold_batchnorm)
    row = by_provider(measure(zoo.load(f"{file}:small"), ("stock", "folded"), modes=["inference"]))["folded"]
    assert row["error"].startswith("ValueError: wrong output: off by ")


# ------------------------------------------------------------------------------------------------- CUDA graphs


@pytest.fixture
def captured(monkeypatch):
    """Stands in for CUDA graphs: a replay is one more call, which writes what the captured one gave."""
    calls = []

    def capture(call):
        for _ in range(3):
            call()
        result = call()
        calls.append(call)

        def replay():
            again = call()
            if isinstance(result, list):  # the outputs that are compared
                for old, new in zip(result, again, strict=True):
                    old.copy_(new)

        return cuda_timing.Captured(replay, result, 12_345)

    monkeypatch.setattr(model_case, "capture", capture)
    return calls


@pytest.mark.networks
@needs_kernels
@pytest.mark.parametrize("mode", model.MODES)
def test_a_graph_is_compared_and_timed(file, captured, mode):
    names = ("stock", "graph", "tails", "tails+graph", "no-se")
    rows = by_provider(measure(zoo.load(f"{file}:bottlenecks"), names, modes=[mode]))
    assert [row["error"] for row in rows.values()] == [None] * 5 and len(captured) == 4
    for name, backend in (("graph", "aten"), ("tails+graph", "cpu")):
        row = rows[name]
        assert (row["backend"], row["note"]) == (backend, None) and row["median_s"] > 0
        # Three calls to warm up and the capture have moved the running statistics, which the compared call begins with.
        assert row["output_error"] < 1e-5 and (row["statistics_error"] or 0.0) < 1e-5
        assert (row["gradient_error"] or 0.0) < 1e-4
        assert (row["gradient_error"] is None) == (row["statistics_error"] is None) == (mode == "inference")
        assert (row["peak_bytes"], row["saved_bytes"]) == ((12_345, None) if mode == "training" else (None, None))
        assert row["price_of_se"] == pytest.approx(row["median_s"] / rows["no-se"]["median_s"])
    assert (rows["tails+graph"]["se_tails"], rows["graph"]["se_tails"]) == (2, 0)


@pytest.mark.networks
@pytest.mark.parametrize("at", [1, 2])
def test_what_cannot_be_captured_is_a_row(file, monkeypatch, captured, at):
    """The compared call, or the timed one."""
    stand_in, count = model_case.capture, []

    def capture(call):
        count.append(call)
        if len(count) == at:
            raise RuntimeError("operation not permitted when stream is capturing")
        return stand_in(call)

    monkeypatch.setattr(model_case, "capture", capture)
    rows = by_provider(measure(zoo.load(f"{file}:small"), ("stock", "graph"), modes=["training"]))
    assert rows["graph"]["error"] == "RuntimeError: operation not permitted when stream is capturing"
    assert rows["graph"]["median_s"] is rows["graph"]["images_per_s"] is None and rows["stock"]["median_s"] > 0


@pytest.mark.networks
@pytest.mark.parametrize("what", ["output", "gradients", "statistics"])
def test_a_graph_that_computes_something_else_is_told(file, monkeypatch, captured, what):
    stand_in = model_case.capture

    def capture(call):
        found = stand_in(call)
        if found.result is None:  # the timed step
            return found
        (network,) = (cell.cell_contents.model for cell in call.__closure__ if hasattr(cell.cell_contents, "model"))

        def replay():
            found.replay()
            if what == "output":
                found.result[0].mul_(1.01)
            elif what == "gradients":
                network[0].weight.grad.mul_(1.01)
            else:
                network[1].running_var.mul_(1.01)

        return found._replace(replay=replay)

    monkeypatch.setattr(model_case, "capture", capture)
    row = by_provider(measure(zoo.load(f"{file}:small"), ("stock", "graph"), modes=["training"]))["graph"]
    if what == "gradients":
        assert row["error"] is None and row["gradient_error"] == pytest.approx(0.01, rel=0.1)
    else:
        name = {"output": "output", "statistics": "running statistics"}[what]
        assert row["error"].startswith(f"ValueError: wrong {name}: off by ")


def test_a_graph_on_a_cpu_is_refused(file, monkeypatch, capsys):
    monkeypatch.setattr(model_run, "run", lambda *arguments: pytest.fail("the measurement has started"))
    assert cli.main(["bench", "model", f"{file}:small", "--providers", "stock", "tails+graph"]) == 2
    error = capsys.readouterr().err
    assert "provider 'tails+graph' is a CUDA graph and cannot run with --device cpu; use --device cuda, or" in error


def test_the_memory_of_torch_compiles_own_graphs_is_not_told(file, monkeypatch):
    cell = model_case.Cell(variants.ModelCase("net", SIZE, 2, "float32", False, "contiguous", "training"), "cpu", 0)
    cell.device, variant = "cuda", variants.Variant("max-autotune", model=nn.Linear(1, 1))
    cell.measure_memory(variant, lambda *_: pytest.fail("a step has run"))
    assert variant.note == "its memory is that of torch.compile's CUDA graphs, which is not told"
    assert variant.peak_bytes is None


# ---------------------------------------------------------------------------------------------- out of time


def test_those_that_compile_are_checked_last():
    names = model_run._in_order(model.VARIANTS)
    assert names[:2] == ["stock", "no-se"] and set(names) == set(model.VARIANTS)
    quick = ["graph", "fused", "tails", "tails+graph", "folded", "folded+fused"]
    assert names[2:8] == quick and names[-1] == "max-autotune"


@pytest.mark.networks
def test_out_of_time_no_further_variant_is_begun_and_the_others_are_timed(file, monkeypatch):
    clock, real = [0.0], variants.Network.build

    def build(self, variant, case):
        clock[0] += 100.0 * (variant.name == "fused")
        real(self, variant, case)

    monkeypatch.setattr(model_run.time, "monotonic", lambda: clock[0])
    monkeypatch.setattr(variants.Network, "build", build)
    names = ("stock", "compile", "fused", "no-se")
    rows = by_provider(measure(zoo.load(f"{file}:small"), names, modes=["inference"], time_limit_s=50.0))
    assert {name for name, row in rows.items() if row["median_s"]} == {"stock", "fused", "no-se"}
    assert (rows["compile"]["note"], rows["compile"]["error"]) == (session.OUT_OF_TIME, None)


def test_a_compile_that_compiles_nothing_is_found(file, monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda module, **options: module)
    rows = by_provider(measure(zoo.load(f"{file}:small"), ("stock", "compile"), modes=["inference"]))
    assert "compiled nothing" in rows["compile"]["error"] and rows["stock"]["error"] is None


@pytest.mark.networks
def test_a_network_that_is_random_in_training_is_compared_where_numbers_are_the_same(file, quick_compile):
    network, names = zoo.load(f"{file}:with_dropout"), ("stock", "compile", "fused")
    inference, training = (by_provider(measure(copy.deepcopy(network), names, modes=[mode])) for mode in model.MODES)
    assert training["fused"]["output_error"] < 1e-5 and training["fused"]["note"] is None
    assert training["compile"]["output_error"] is None and "random in training" in training["compile"]["note"]
    assert training["compile"]["median_s"] > 0 and inference["compile"]["note"] is None


@pytest.mark.networks
def test_a_step_trains_a_copy(file, monkeypatch):
    steps, real = [], torch.optim.SGD.step

    def step(self):
        before = [parameter.clone() for group in self.param_groups for parameter in group["params"]]
        real(self)
        steps.append(sum((b != a).sum().item() for b, a in zip(before, self.param_groups[0]["params"], strict=True)))

    monkeypatch.setattr(torch.optim.SGD, "step", step)
    network = zoo.load(f"{file}:small")
    before = copy.deepcopy(network)
    measure(network)
    assert same_weights(network, before) and all(parameter.grad is None for parameter in network.parameters())
    assert len(steps) > 9 and min(steps) > 0


# ------------------------------------------------------------------------------------------------- the command


QUICK = ["--size", "3,12,10", "--batch", "2", "--quick", "--budget", "0.001", "--threads", "1"]
NO_COMPILE = ["--providers", "stock", "fused", "no-se"]


def test_a_run_prints_tables_and_writes_what_is_reported_again(file, tmp_path, capsys):
    out, again = tmp_path / "out.json", tmp_path / "again.json"
    argv = ["bench", "model", f"{file}:small", f"{file}:gated", *QUICK, *NO_COMPILE, "--layout", "channels_last"]
    assert cli.main([*argv, "--json", str(out)]) == 0
    output = capsys.readouterr()
    assert f"{file}:small: inference, float32, 2 x 3x12x10, channels_last\n" in output.out
    memory = "price of SE +saved MB +peak MB +output +gradients"
    assert re.search(rf"^variant +ran on +median +IQR +images/s +vs stock +{memory}$", output.out, re.MULTILINE)
    assert re.search(r"price of SE +output\n", output.out)  # in inference
    assert re.search(r"^stock .*\d  +\d[\d.]*  +\d[\d.]*  +-  +-$", output.out, re.MULTILINE)
    assert re.search(r"^no-se .*  \d[\d.]* \(-\d+%\)  ", output.out, re.MULTILINE)
    assert "no-se: not made: 3.se" in output.out and "Geometric means over models" in output.out
    assert f"[4/4] {file}:gated 2 x 3x12x10 float32 channels_last training" in output.err
    data = json.loads(out.read_text())
    header = data["header"]
    assert header["kind"] == "model" and header["command"].startswith("senet-fused bench model")
    assert {"device", "versions", "threads", "revision", "load", "samples", "date"} <= set(header)
    assert {"timm", "torchvision", "torch"} <= set(header["versions"]) and header["threads"] == 1
    assert len(data["rows"]) == 12 and {entry["provider"] for entry in data["summary"]} == {"stock", "fused", "no-se"}
    stock = next(entry for entry in data["summary"] if entry["provider"] == "stock")
    assert stock["speedup_vs_stock"] == 1.0 and stock["price_of_se"] > 0 and stock["measured"] == stock["cells"] == 2

    assert cli.main(["bench", "--from", str(out), "--json", str(again)]) == 0
    assert "price of SE" in capsys.readouterr().out
    assert json.loads(again.read_text())["rows"] == data["rows"]
    assert json.loads(again.read_text())["summary"] == data["summary"]
    assert cli.main(["bench", "--from", str(out), "--plot", "out.png"]) == 2
    assert "this is one of `bench model`" in capsys.readouterr().err
    assert cli.main(["bench", "compare", str(out), str(again)]) == 0
    layers = tmp_path / "layers.json"
    saved.write_json(layers, {key: value for key, value in header.items() if key != "kind"}, [], [])
    assert cli.main(["bench", "--from", str(layers), str(out)]) == 2
    assert "one of `senet-fused bench`; report each by itself" in capsys.readouterr().err


@pytest.mark.networks
def test_a_failed_variant_is_exit_status_1(file, monkeypatch, capsys):
    monkeypatch.setattr(variants, "fuse", off_by("output"))
    assert cli.main(["bench", "model", f"{file}:small", *QUICK, *NO_COMPILE, "--mode", "inference"]) == 1
    assert re.search(r"fused +ERROR ValueError: wrong output: off by", capsys.readouterr().out)


def test_options_reach_the_cases_and_the_run(file, monkeypatch):
    seen = {}

    def run(todo, options, progress, rows):
        seen.update(todo=todo, options=options, threads=torch.get_num_threads())
        return rows

    monkeypatch.setattr(model_run, "run", run)
    argv = f"""{file}:small {file}:plain --mode training --batch 1 4 --size 9 --dtype bfloat16 float16 --amp --seed 5
        --layout channels_last contiguous --providers no-se stock --backend reference --threads 1 --budget 4""".split()
    assert cli.main(["bench", "model", *argv]) == 0
    (network, cases), (_, others) = seen["todo"]
    assert len(cases) == len(others) == 8 and same_weights(network, zoo.load(f"{file}:small", seed=5))
    assert cases[0] == variants.ModelCase(f"{file}:small", (3, 9, 9), 1, "bfloat16", True, "channels_last", "training")
    options = seen["options"]
    assert (options.variants, options.backend, options.seed) == (("stock", "no-se"), "reference", 5)
    assert (options.settings.budget_s, options.device, seen["threads"]) == (4, "cpu", 1)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["{file}:none"], "has no function 'none'"),
        (["{file}:small", "--size", "big"], "cannot read the input size 'big'"),
        (["{file}:small", "--size", "2,9", "--layout", "channels_last"], "channels_last needs two or three"),
        (["{file}:small", "--amp"], "--amp is for --dtype bfloat16 or float16"),
        (["{file}:small", "--backend", "gpu"], "unknown backend 'gpu'"),
        (["{file}:small", "--json", "/"], "it is a folder"),
        (["{file}:small", "--device", "cuda"], "use --device cpu"),
    ],
)
def test_a_request_that_cannot_be_met_is_refused_before_measuring(file, monkeypatch, capsys, argv, message):
    monkeypatch.setattr(model_run, "run", lambda *arguments: pytest.fail("the measurement has started"))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert cli.main(["bench", "model", *(text.format(file=file) for text in argv)]) == 2
    error = capsys.readouterr().err
    assert error.startswith("senet-fused bench model: error: ") and message in error


@pytest.mark.networks
def test_a_run_that_ends_early_keeps_what_is_done(file, monkeypatch, tmp_path, capsys):
    real, count = model_run._measure, []

    def measured(*arguments):
        count.append(arguments)
        if len(count) == 2:
            kept = json.loads(out.read_text())  # had it been killed here
            assert len(kept["rows"]) == 3 and kept["header"]["interrupted"] == "after 1 of 2 cases"
            raise KeyboardInterrupt
        return real(*arguments)

    monkeypatch.setattr(model_run, "_measure", measured)
    out = tmp_path / "out.json"
    argv = ["bench", "model", f"{file}:small", *QUICK, *NO_COMPILE, "--json", str(out)]
    assert cli.main(argv) == 130
    data = json.loads(out.read_text())
    assert len(data["rows"]) == 3 and data["header"]["interrupted"] == "after 1 of 2 cases"
    assert cli.main([*argv, "--time-limit", "1e-9"]) == 130
    assert "after 0 of 2 cases" in capsys.readouterr().out
    rows = [*data["rows"][:2], data["rows"][2] | {"note": session.OUT_OF_TIME, "median_s": None}]
    monkeypatch.setattr(model_run, "run", lambda todo, options, progress, found: found.extend(rows))
    assert cli.main([*argv, "--time-limit", "99", "--mode", "training"]) == 130
    assert "after 1 of 1 cases, 1 variants not begun" in capsys.readouterr().out


def test_notes_and_errors_are_below_the_table():
    row = model_row(note="half")
    for rows in ([row, row | {"provider": "compile", "error": "lost"}], [row | {"error": "lost", "median_s": None}]):
        out = io.StringIO()
        model_report.render({}, rows, model_report.summarise(rows), out)
        assert re.search(r"\n(compile|fused) +ERROR lost\nfused: half\n", out.getvalue())
