"""Who may import and include whom, what an import of the package costs, and what no file may contain."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
from fnmatch import fnmatch
from functools import lru_cache
from pathlib import Path

import pytest

import senet_fused
from senet_fused import fusion

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = Path(senet_fused.__file__).resolve().parent
CSRC = ROOT / "csrc"

# A component is a module of the package or a folder in it; "senet_fused" stands for the public names. From
# the layer down to the arithmetic it goes modules -> functional -> {select, ops} -> backends -> reference -> call.
PYTHON = {
    "_version": set(),
    "accuracy": {"torch_private"},
    "activations": set(),
    "call": set(),
    "reference": {"activations", "call", "torch_private"},
    "torch_private": set(),
    "backends": {"_plan", "activations", "call", "reference", "torch_private"},
    "select": {"backends"},
    "flops": {"call", "torch_private"},
    "ops": {"backends", "call", "flops", "reference", "torch_private"},
    "functional": {"activations", "call", "flops", "ops", "reference", "select", "torch_private"},
    "parts": {"torch_private"},
    "state_dicts": set(),
    "modules": {"activations", "call", "functional", "parts", "reference", "select", "state_dicts"},
    "fusion": {
        "activations",
        "call",
        "functional",
        "modules",
        "ops",
        "parts",
        "reference",
        "select",
        "state_dicts",
        "torch_private",
    },  # fmt: skip
    "senet_fused": {"_version", "activations", "functional", "fusion", "modules", "ops", "reference", "select"},
    "arguments": {"backends"},
    "factories": {"arguments"},
    "machine": {"senet_fused", "_plan", "backends"},
    "bench": {"senet_fused", "accuracy", "arguments", "backends", "factories", "machine", "modules", "torch_private"},
    "handwritten_digits": set(),
    "demo": {"senet_fused", "arguments", "bench", "handwritten_digits", "models", "select"},
    "models": {"senet_fused", "parts", "torch_private"},
    "train": {"senet_fused", "arguments", "factories", "handwritten_digits", "machine", "models"},
    "cli": {
        "senet_fused",
        "_plan",
        "_version",
        "accuracy",
        "arguments",
        "backends",
        "bench",
        "demo",
        "machine",
        "select",
        "torch_private",
        "train",
    },  # fmt: skip
    "__main__": {"cli"},
}
# Imported upwards, when a function is called: FusedSE.from_module has fusion examine somebody's layer.
UPWARDS = {("modules", "fusion")}
CORE = (
    "_version", "activations", "call", "reference", "backends", "select", "flops", "ops", "functional",
    "parts", "state_dicts", "modules", "fusion", "torch_private", "senet_fused",
)  # fmt: skip
# Optional packages, imported by whoever uses them where they are used, so that --help works without.
OPTIONAL = {
    "triton", "matplotlib", "rich", "sklearn", "onnx", "pandas", "PIL", "pytest", "tensorboard", "torchdata",
    "torchvision",
}  # fmt: skip
# The Triton kernels and what launches them: imported when the first one is launched.
OF_TRITON = {
    f"backends/triton/{name}.py"
    for name in ("elementwise", "excite", "kernels", "launch", "sweeps", "tail_kernels", "tiles")
}

# Files of csrc/ -> the local headers they may include. library -> host file -> {check, plan, kernel}.
CPP = {
    "library.cpp": {"cpu/host.h", "cpu/fused_se.h"},
    "check.h": {"plan/plan.h"},
    "plan/*": {"plan/plan.h", "plan/cuda_plan.h"},
    "cpu/fused_se.h": set(),
    "cpu/fused_se.cpp": {"cpu/fused_se.h", "cpu/host.h", "cpu/schedule.h"},
    "cpu/host.h": {"check.h", "cpu/layer.h"},
    "cpu/host.cpp": {"cpu/host.h"},
    "cpu/schedule.h": {"cpu/layer.h"},
    "cpu/layer.h": {"cpu/kernels.h", "plan/plan.h"},
    "cpu/kernels.h": {"plan/plan.h"},
    "cpu/kernels.cpp": {"cpu/kernels.h", "cpu/kernel/*"},
    "cpu/kernel/*": {"cpu/kernels.h", "cpu/vec.h", "cpu/kernel/*"},
    "cpu/vec.h": set(),
    "cuda/library.cpp": {"cuda/squeeze_excite.h", "cuda/tail.h"},
    "cuda/squeeze_excite.h": set(),
    "cuda/squeeze_excite.cpp": {"cuda/squeeze_excite.h", "cuda/arguments.h"},
    "cuda/tail.h": set(),
    "cuda/tail.cpp": {"cuda/tail.h", "cuda/arguments.h"},
    "cuda/arguments.h": {"cuda/call.h", "check.h"},
    "cuda/call.h": {"plan/cuda_plan.h"},
    # Host code around the kernels: from a call to their arguments and their launch.
    "cuda/*.cu": {"cuda/kernel/*", "cuda/launch.cuh", "cuda/weights_of.cuh", "cuda/norm_of.cuh"},
    "cuda/weights_of.cuh": {"cuda/kernel/*", "cuda/launch.cuh"},
    "cuda/norm_of.cuh": {"cuda/kernel/*", "cuda/launch.cuh"},
    "cuda/launch.cuh": {"cuda/call.h", "cuda/kernel/*"},
    "cuda/kernel/*": {"cuda/kernel/*", "cuda/prim/*", "plan/cuda_plan.h"},
    "cuda/prim/*": {"cuda/prim/*", "plan/plan.h"},
}
TORCH_HEADERS_IN = {
    "library.cpp", "check.h", "cpu/host.h", "cpu/host.cpp", "cpu/fused_se.h", "cpu/fused_se.cpp", "cuda/library.cpp",
    "cuda/squeeze_excite.h", "cuda/squeeze_excite.cpp", "cuda/tail.h", "cuda/tail.cpp", "cuda/arguments.h",
}  # fmt: skip
CUDA_HEADERS_IN = {"cuda/launch.cuh", "cuda/prim/port.cuh"}


def imports(path, package):
    """(what, is it in a function or under TYPE_CHECKING) for each import; local ones in full."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    parts = path.relative_to(package.parent).with_suffix("").parts
    here = parts[:-1]  # for __init__.py, too: its package is its folder
    late = set()
    for node in ast.walk(tree):
        typing_only = isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test)
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)) or typing_only:
            late.update(ast.walk(node))
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name, node in late
        elif isinstance(node, ast.ImportFrom):
            base = (
                ".".join((*here[: len(here) - node.level + 1], *filter(None, [node.module])))
                if node.level
                else node.module
            )
            for alias in node.names:
                yield f"{base}.{alias.name}", node in late


def component(name, package):
    """From "senet_fused.backends.native.forward" to "backends"; None if it is not local."""
    parts = name.split(".")
    if parts[0] != package.name:
        return None
    if len(parts) > 1 and (
        (package / parts[1]).is_dir() or (package / f"{parts[1]}.py").exists() or parts[1] == "_plan"
    ):
        return parts[1]
    return package.name


def python_graph(package):
    graph = {}
    for path in sorted(package.rglob("*.py")):
        inside = path.relative_to(package).parts
        name = package.name if inside == ("__init__.py",) else inside[0].removesuffix(".py")
        found = graph.setdefault(name, set())
        for what, late in imports(path, package):
            other = component(what, package)
            if other not in (None, name) and not (late and (name, other) in UPWARDS):
                found.add(other)
    return graph


def python_violations(package):
    graph = python_graph(package)
    wrong = [f"{name} imports {other}" for name in graph for other in sorted(graph[name] - PYTHON.get(name, set()))]
    return wrong + [f"{name} has no rule here" for name in graph if name not in PYTHON]


def test_python_imports():
    assert python_violations(PACKAGE) == []


def test_the_rules_have_no_circle_and_no_way_up():
    @lru_cache
    def below(name):
        reached = set()
        for other in PYTHON.get(name, ()):
            reached |= {other} | below(other)  # RecursionError if there is a circle
        return frozenset(reached)

    for name in PYTHON:
        assert name not in below(name)
    for name in CORE:
        assert below(name) <= {*CORE, "_plan"}
    importers = {name for name in PYTHON if PYTHON[name] & {"bench", "demo", "train"}}
    assert importers == {"cli", "demo"}
    assert set(PYTHON) >= set(python_graph(PACKAGE))


def test_the_scan_finds_a_violation(tmp_path):
    package = tmp_path / "senet_fused"
    (package / "bench").mkdir(parents=True)
    (package / "bench" / "__init__.py").write_text("")
    for name, text in {
        "__init__": "from .modules import FusedSE",
        "activations": "",
        "reference": "def f():\n    from .bench import x",
        "select": "import senet_fused.ops",
        "ops": "from . import select, reference",
        "modules": "from senet_fused import activations",
        "helper": "",
    }.items():
        (package / f"{name}.py").write_text(text)
    assert python_violations(package) == [
        "ops imports select",
        "reference imports bench",
        "select imports ops",
        "helper has no rule here",
    ]


def test_the_layer_needs_torch_alone():
    """And reference.py nothing else at all; optional packages are imported where they are used."""
    standard = set(sys.stdlib_module_names)
    assert all((PACKAGE / name).is_file() for name in OF_TRITON)
    for path in sorted(PACKAGE.rglob("*.py")):
        inside = path.relative_to(PACKAGE).parts
        name = PACKAGE.name if inside == ("__init__.py",) else inside[0].removesuffix(".py")
        for what, late in imports(path, PACKAGE):
            top = what.split(".")[0]
            if top == "triton" and path.relative_to(PACKAGE).as_posix() in OF_TRITON:
                continue
            if name in CORE:
                assert top in {"torch", PACKAGE.name, *standard}, f"{path.name} imports {what}"
            if not late:
                assert top not in OPTIONAL, f"{path} imports {what}"


def run_python(code):
    environment = {**os.environ, "PYTHONPATH": str(PACKAGE.parent)}
    return subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True, timeout=120
    )


def test_importing_the_package_imports_little():
    """Nothing optional, nothing of bench and train, and not torch._dynamo, which takes the longest."""
    code = """
import sys, warnings, torch
before = set(sys.modules)
warnings.simplefilter("error")
import senet_fused
print(*sorted(set(sys.modules) - before))
"""
    result = run_python(code)
    assert result.stderr == ""
    new = result.stdout.split()
    assert "senet_fused.functional" in new
    tops = {name.split(".")[0] for name in new}
    assert not tops & (OPTIONAL | {"sympy", "functorch"})
    assert not [name for name in new if name.startswith(("torch._dynamo", "torch._inductor"))]
    core = {f"senet_fused.{name}" for name in CORE} | {
        "senet_fused", "senet_fused._plan",
        *(f"senet_fused.backends.{name}" for name in ("codes", "cuda", "native", "synchronised", "tickets", "triton")),
        *(f"senet_fused.fusion.{path.stem}" for path in (PACKAGE / "fusion").glob("*.py")),
        *(f"senet_fused.{name}" for name in fusion.earlier.NAMES),
        *(f"senet_fused.functional.{name}" for name in ("checks", "layer", "serve", "tail")),
        *(f"senet_fused.ops.{name}" for name in ("counts", "define", "earlier", "layout")),
    }  # fmt: skip
    assert {name for name in new if name.startswith("senet_fused")} <= core


def test_public_names():
    assert set(senet_fused.__all__) <= set(vars(senet_fused)) and sorted(senet_fused.__all__) == senet_fused.__all__
    assert re.fullmatch(r"\d+\.\d+\.\d+", senet_fused.__version__)


# ---------------------------------------------------------------------------------- C++


def includes(path):
    """(header, is it in quotes) for each #include."""
    for match in re.finditer(r'^\s*#\s*include\s*(["<])([^">]+)[">]', path.read_text(encoding="utf-8"), re.MULTILINE):
        yield match[2], match[1] == '"'


def cpp_violations(csrc):
    wrong = []
    for path in sorted(p for p in csrc.rglob("*") if p.is_file()):
        name = path.relative_to(csrc).as_posix()
        rule = next((allowed for pattern, allowed in CPP.items() if fnmatch(name, pattern)), None)
        if rule is None:
            wrong.append(f"{name} has no rule here")
            continue
        for header, quoted in includes(path):
            if quoted:
                target = Path(os.path.normpath(path.parent / header))
                local = target.relative_to(csrc).as_posix() if target.is_relative_to(csrc) else header
                if not any(fnmatch(local, allowed) for allowed in rule):
                    wrong.append(f"{name} includes {local}")
            elif header.startswith(("torch/", "ATen/", "c10/", "Python.h")):
                # LibTorch's stable ABI is these two folders; everything else ties a build to one version.
                stable = header.startswith(("torch/csrc/stable/", "torch/headeronly/"))
                if name not in TORCH_HEADERS_IN or not stable:
                    wrong.append(f"{name} includes <{header}>")
            elif header.startswith("cuda") and name not in CUDA_HEADERS_IN:
                wrong.append(f"{name} includes <{header}>")
            elif header.startswith("pybind11/") and name != "plan/module.cpp":
                wrong.append(f"{name} includes <{header}>")
    return wrong


@pytest.mark.skipif(not CSRC.is_dir(), reason="there are no C++ sources beside the tests")
def test_cpp_includes():
    assert cpp_violations(CSRC) == []


def test_the_scan_of_includes_finds_a_violation(tmp_path):
    for name, text in {
        "library.cpp": '#include "cpu/fused_se.h"\n#include "plan/plan.h"',
        "plan/plan.cpp": '#include "plan.h"\n#include "../check.h"\n#include <torch/csrc/stable/tensor.h>',
        "cpu/kernel/scale.h": '#include "squeeze.h"\n  #  include <ATen/ATen.h>\n// #include "../schedule.h"',
        "check.h": "#include <torch/extension.h>\n#include <string>",
        "cpu/other.h": "",
        "cuda/kernel/scale.cuh": '#include "../prim/pack.cuh"\n#include "../call.h"\n#include <cuda_fp16.h>',
    }.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    assert cpp_violations(tmp_path) == [
        "check.h includes <torch/extension.h>",
        "cpu/kernel/scale.h includes <ATen/ATen.h>",
        "cpu/other.h has no rule here",
        "cuda/kernel/scale.cuh includes cuda/call.h",
        "cuda/kernel/scale.cuh includes <cuda_fp16.h>",
        "library.cpp includes plan/plan.h",
        "plan/plan.cpp includes check.h",
        "plan/plan.cpp includes <torch/csrc/stable/tensor.h>",
    ]


# ---------------------------------------------------------------------------------- text

FOLDERS = ("senet_fused", "csrc", "tests", "benchmarks", "buildtools", ".ci")
TEXT = {".py", ".h", ".cpp", ".cuh", ".cu", ".sh", ".toml", ".md", ".in", ".txt", ".json", ""}
WORDS = ["TO" + "DO", "FIX" + "ME", "X" * 3]  # in parts, so that this file passes
UNFINISHED = re.compile(rf"\b({'|'.join(WORDS)})\b")
# A file says what it holds.
SAYING_NOTHING = {
    "utils.py",
    "util.py",
    "helpers.py",
    "misc.py",
    "common.py",
    "common.h",
    "utils.h",
    "util.h",
}


def sources():
    for folder in FOLDERS:
        for path in sorted((ROOT / folder).rglob("*")):
            if path.is_file() and path.suffix in TEXT and "__pycache__" not in path.parts:
                yield path
    yield from (path for path in sorted(ROOT.iterdir()) if path.is_file() and path.suffix in TEXT)


def test_nothing_is_left_to_do():
    scanned = list(sources())
    assert len(scanned) > 40
    for path in scanned:
        assert path.name not in SAYING_NOTHING, path
        text = path.read_text(encoding="utf-8", errors="replace")
        found = UNFINISHED.search(text)
        assert found is None, f"{path}:{text[: found.start()].count(chr(10)) + 1}: {found[0]}"
    assert all(UNFINISHED.search(f"// {word}: later") for word in WORDS)
