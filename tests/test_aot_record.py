"""The hash of a record of compiled kernels: it sees every change of what is compiled, and covers all of that."""

from __future__ import annotations

import ast
import json
import re
import shutil

import pytest
from aot_record import CUDA_SOURCES, ROOT, TRITON_SOURCES, digest, files, tells_all

KINDS = {"cuda": CUDA_SOURCES, "triton": TRITON_SOURCES}


@pytest.fixture(params=KINDS)
def copied(request, tmp_path):
    """(patterns, a copy of what they match)"""
    for path in files(KINDS[request.param]):
        target = tmp_path / path.relative_to(ROOT)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, target)
    return KINDS[request.param], tmp_path


def test_every_byte_and_every_name_counts(copied):
    patterns, root = copied
    before = digest(patterns)
    assert digest(patterns, root) == before, "where the files lie does not count"
    for path in files(patterns, root):
        content = path.read_bytes()
        path.write_bytes(content + b" ")
        assert digest(patterns, root) != before, path
        path.write_bytes(content)
        moved = path.rename(path.with_stem("moved"))
        if all(any(root.glob(pattern)) for pattern in patterns):
            assert digest(patterns, root) != before, path
        moved.rename(path)
    assert digest(patterns, root) == before


def test_a_pattern_without_a_file_is_an_error(tmp_path):
    with pytest.raises(ValueError, match="no file matches csrc"):
        digest(CUDA_SOURCES, tmp_path)


def test_when_compiling_would_tell_nothing_new(copied, monkeypatch):
    patterns, root = copied
    monkeypatch.delenv("SENET_AOT", raising=False)
    record = {"sources": digest(patterns, root), "compiler": "nvcc 13.0"}
    assert tells_all(record, patterns, "nvcc 13.0", root)
    assert not tells_all(record, patterns, "nvcc 13.1", root)
    monkeypatch.setenv("SENET_AOT", "1")
    assert not tells_all(record, patterns, "nvcc 13.0", root)
    monkeypatch.setenv("SENET_AOT", "0")
    source = files(patterns, root)[-1]
    source.write_bytes(source.read_bytes().replace(b"e", b"f", 1))
    assert not tells_all(record, patterns, "nvcc 13.0", root)


def test_the_hash_covers_every_header_of_the_cuda_kernels():
    covered = set(files(CUDA_SOURCES))
    waiting, seen = sorted((ROOT / "csrc/cuda").glob("*.cu")), set()
    while waiting:
        path = waiting.pop()
        assert path in covered, f"{path} is included and not hashed"
        names = re.findall(r'^#include "(.+)"', path.read_text(), re.MULTILINE)
        included = {(path.parent / name).resolve() for name in names}
        waiting += included - seen
        seen |= included
    assert len(seen) > 10


def test_the_hash_covers_every_module_of_the_triton_kernels():
    covered, folder = set(files(TRITON_SOURCES)), ROOT / "senet_fused/backends/triton"
    waiting, seen = [folder / "kernels.py", folder / "tail_kernels.py", folder / "plan.py"], set()
    while waiting:
        path = waiting.pop()
        assert path in covered
        froms = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.ImportFrom)]
        imported = {path.parents[node.level - 1] / f"{node.module}.py" for node in froms if node.level}
        waiting += imported - seen
        seen |= imported
    assert {path.stem for path in seen} >= {"elementwise", "excite", "sweeps", "tiles"}


@pytest.mark.parametrize("kind", KINDS)
def test_the_records_carry_a_hash_and_a_compiler(kind):
    record = json.loads((ROOT / f"tests/{kind}_aot/resources.json").read_text(encoding="utf-8"))
    assert re.fullmatch("[0-9a-f]{64}", record["sources"])
    assert re.fullmatch({"cuda": r"nvcc \d+\.\d+\.\d+", "triton": r"triton \d+\.\d+\.\d+"}[kind], record["compiler"])
