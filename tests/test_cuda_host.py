"""The tool that runs CUDA C++ kernels on the host (tests/cuda_host): right kernels pass, planted errors are found."""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
from pathlib import Path

import pytest
from cuda_host import build

pytestmark = pytest.mark.skipif(build.problem() is not None, reason=str(build.problem()))

SOURCE = Path("tests/cuda_host/planted.cu")
SEEDS = range(5)
THREADS = (64, 256)

RACES = (
    "no barrier behind the copies",
    "no barrier before the sums",
    "no barrier behind the sums",
    "copy_wait too late",
)
# error -> what the message says
MISUSE = {
    "no copy_wait": "ends before copy_wait, after copy_async (tests/cuda_host/planted.cu:",
    "half of a warp": "for lane 16, which waits in __syncthreads (tests/cuda_host/planted.cu:",
    "half of a warp ends": "reads lane 16, which has ended",
    "half of the block": "not every thread reaches the same barrier",
    "different masks": "lanes disagree: __syncwarp",
    "different calls": "lanes disagree: __a",
    "not in its own mask": "is not in its own mask: __syncwarp",
    "reads outside of the mask": "reads lane 16, which is outside of the mask",
    "no wait_for_previous": "ends without wait_for_previous in a dependent launch",
    "misaligned load": "__ldg of an address that is not a multiple of 16 (tests/cuda_host/planted.cu:",
    "misaligned store": "__stcs to an address that is not a multiple of 8",
    "misaligned copy": "copy_async from an address that is not a multiple of 16",
    "copy elsewhere": "copy_async to an address outside of shared memory",
    "too much shared memory": "bytes of shared memory with much, and a block has 49152",
}
# error -> the array next to which it writes
WRITES = {
    "write behind static": "warps",
    "write before static": "warps",
    "write behind dynamic": "dynamic shared memory",
}


def built(sources, name, **options):
    return build.build(sources, name, include=(), **options)


def program(**options):
    return built([SOURCE], "planted", **options)


def planted(what, threads=256, blocks=3, seed=0, sanitize=False, path=None):
    # ASan would look for leaks with ptrace, which containers forbid, when the process ends.
    asan = "detect_leaks=0:detect_stack_use_after_return=1"
    return subprocess.run(
        [path or program(sanitize=sanitize), what, str(threads), str(blocks)],
        env={**os.environ, "SENET_HOST_SEED": str(seed), "ASAN_OPTIONS": asan},
        capture_output=True,
        text=True,
        timeout=120,
    )


def stdout(*arguments, **options):
    run = planted(*arguments, **options)
    assert (run.returncode, run.stderr) == (0, ""), run.stderr
    return run.stdout.strip()


@pytest.mark.compiler
@pytest.mark.parametrize("sanitize", [False, True], ids=["plain", "sanitized"])
@pytest.mark.parametrize("what", ["none", "builtins"])
def test_right_kernels_are_right(what, sanitize):
    for threads in THREADS:
        for seed in SEEDS:
            assert stdout(what, threads, seed=seed, sanitize=sanitize) == "right"


@pytest.mark.parametrize("error", RACES)
def test_races_give_wrong_results(error):
    """With every seed. One needs a warp that runs ahead of the others, which comes behind every other barrier."""
    for threads in THREADS:
        for seed in SEEDS:
            assert stdout(error, threads, blocks=8, seed=seed) == "wrong", (threads, seed)


@pytest.mark.parametrize("sanitize", [False, True], ids=["plain", "sanitized"])
@pytest.mark.parametrize("error", MISUSE)
def test_misuse_ends_the_process(error, sanitize):
    for threads in THREADS:
        run = planted(error, threads, seed=7, sanitize=sanitize)
        assert run.returncode == -6, run.stdout + run.stderr
        assert run.stderr.startswith("kernel scale_rows, block ") and ", thread " in run.stderr
        assert MISUSE[error] in run.stderr and run.stderr.endswith(" [SENET_HOST_SEED=7]\n")


@pytest.mark.parametrize("error", WRITES)
def test_writes_outside_of_shared_memory(error):
    run = planted(error)
    assert run.returncode == -6
    assert f": wrote outside of shared memory, next to {WRITES[error]} [" in run.stderr

    run = planted(error, sanitize=True)
    lines = (build.ROOT / SOURCE).read_text(encoding="utf-8").splitlines()
    (line,) = (number for number, text in enumerate(lines, 1) if f'has("{error}")' in text)
    assert run.returncode != 0 and "AddressSanitizer" in run.stderr
    (frame,) = (text for text in run.stderr.splitlines() if text.lstrip().startswith("#0 ") and "scale_rows" in text)
    assert frame.endswith(f"{SOURCE}:{line}")


def test_order_is_random_and_repeats_with_its_seed():
    orders = [[int(word) for word in stdout("order", 64, 40, seed=seed).split()] for seed in (1, 1, 2)]
    assert orders[0] == orders[1] != orders[2]
    for order in orders:
        assert sorted(order) == list(range(64 * 40))
        blocks = [order[i] // 64 for i in range(0, len(order), 64)]
        assert blocks != sorted(blocks)
        assert all(len({thread // 64 for thread in order[i : i + 64]}) == 1 for i in range(0, len(order), 64))
        assert len({tuple(thread % 64 for thread in order[i : i + 64]) for i in range(0, len(order), 64)}) == 40


@pytest.mark.parametrize("threads, blocks", [(48, 1), (0, 1), (1056, 1), (-32, 1), (64, 0), (64, 2**31)])
def test_what_a_gpu_would_not_launch(threads, blocks):
    assert stdout("configuration", threads, blocks) == "invalid configuration"


@pytest.mark.compiler
def test_the_switch_for_other_processors():
    path = program(flags=["-DSENET_HOST_UCONTEXT"])
    assert path != program()
    for what in ("none", "builtins"):
        assert stdout(what, path=path) == "right"
    assert planted("half of the block", path=path).returncode == -6


SECOND = """
#include <string>
struct Second {
  unsigned* last;
};
__global__ void second_kernel(const Second s) {
  if (threadIdx.x > *s.last) *s.last = threadIdx.x;
}
extern "C" unsigned second() {
  unsigned last = 0;
  senet::cuda::launch("second", second_kernel, Second{&last}, 1, 32, 0, false, nullptr, 0);
  return last;
}
"""


@pytest.mark.compiler
def test_a_library_of_several_sources_has_one_grid(tmp_path):
    (tmp_path / "second.cu").write_text(SECOND)
    path = built([SOURCE, tmp_path / "second.cu"], "two.so")
    library = ctypes.CDLL(str(path))
    library.planted.restype = library.senet_host_all_launches.restype = ctypes.c_char_p
    library.planted.argtypes = (ctypes.c_char_p, ctypes.c_int, ctypes.c_int64)

    assert library.planted(b"none", 64, 2) == b"right"
    assert library.planted(b"configuration", 48, 1) == b"invalid configuration"
    assert library.second() == library.second() == 31
    assert library.senet_host_launches(b"second") == 2 and library.senet_host_launches(b"shuffles") == 0
    assert library.senet_host_all_launches() == b"scale_rows 1\nsecond 2\n"
    library.senet_host_forget_launches()
    assert library.senet_host_launches(b"second") == 0 and library.senet_host_all_launches() == b""

    orders = []
    for seed in (1, 2, 1):
        library.senet_host_seed(seed)
        orders.append(library.planted(b"order", 64, 3))
    assert orders[0] == orders[2] != orders[1]
    assert stdout("order", 64, 3, seed=1) == orders[0].decode().strip()


def test_two_libraries_have_nothing_in_common():
    """Each its own launches, though they are of the same sources."""
    code = """
import ctypes, sys
first, second = (ctypes.CDLL(path) for path in sys.argv[1:])
first.planted(b"none", 64, ctypes.c_int64(1))
print(first.senet_host_launches(b"scale_rows"), second.senet_host_launches(b"scale_rows"))
"""
    paths = [built([SOURCE], name) for name in ("first.so", "second.so")]
    run = subprocess.run([sys.executable, "-c", code, *map(str, paths)], capture_output=True, text=True)
    assert (run.stdout, run.stderr) == ("1 0\n", "")


def test_what_is_built_is_kept_until_something_changes(tmp_path, monkeypatch):
    monkeypatch.setattr(build, "BUILT", tmp_path / "built")
    source = tmp_path / "second.cpp"
    source.write_text("int two = 2;\n")
    first = built([source], "second.so")
    file = first.stat().st_ino
    assert built([source], "second.so") == first and first.stat().st_ino == file
    assert built([source], "second.so", flags=["-DOTHER"]) != first
    source.write_text("int two = 3;\n")
    assert built([source], "second.so") != first
    left = [path.name for path in (tmp_path / "built").rglob("*") if path.is_file()]
    assert sorted(left) == sorted(["lock", *["second.so"] * 3, *(n for n in left if n.endswith(".o"))])

    os.utime(first, (0, 0))
    built([source], "other.so")
    assert not first.exists()

    folder = tmp_path / "include"
    folder.mkdir()
    targets = {build.build([source], "second.so", include=[folder])}
    (folder / "some.cuh").write_text("")
    targets.add(build.build([source], "second.so", include=[folder]))
    assert len(targets) == 2

    source.write_text("no C++")
    with pytest.raises(build.BuildError, match=r"(?s)g\+\+ .*second\.cpp:1:1: error"):
        built([source], "second.so")


def test_what_is_missing_has_a_name(monkeypatch):
    problem = build.problem.__wrapped__
    assert problem() is None
    monkeypatch.setattr(build, "_cuda_headers", lambda: None)
    assert "no CUDA headers" in problem()
    monkeypatch.setattr(build.shutil, "which", lambda name: None)
    assert "no g++" in problem()
