"""Compiles the CUDA C++ kernels for the host, with shim.h in place of nvcc: libraries that run without a GPU.

    python tests/cuda_host/build.py [--sanitize] [--out DIR]        the kernels' library; prints its path

SENET_HOST_CXXFLAGS in the environment adds compiler flags: "-O2 -mfma -ffp-contract=fast" contracts multiplications and
additions, as nvcc does (make contracted).

What is built stays in build/cuda_host/, under a hash of everything that it is made from. Several processes may ask
for the same at once: one compiles, two compilers at a time, and the others wait. Unused for a week, it goes.
"""

from __future__ import annotations

import argparse
import fcntl
import functools
import hashlib
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
CSRC = ROOT / "csrc"
BUILT = ROOT / "build" / "cuda_host"

KERNELS = (
    "csrc/cuda/squeeze.cu",
    "csrc/cuda/squeeze_backward.cu",
    "csrc/cuda/scale.cu",
    "csrc/cuda/scale_backward.cu",
    "csrc/cuda/excite.cu",
    "csrc/cuda/tail_moments.cu",
    "csrc/cuda/tail_excite.cu",
    "csrc/cuda/tail_apply.cu",
    "csrc/cuda/tail_sums.cu",
    "csrc/cuda/tail_apply_backward.cu",
    "csrc/cuda/squeeze_excite.cpp",
    "csrc/cuda/tail.cpp",
    "csrc/cuda/library.cpp",
    "csrc/plan/cuda_plan.cpp",
)

# Kernels see a tensor's bytes as words of several types, which nvcc allows. Without unique symbols each library that a
# process loads has its own shared arrays and launch counts.
_COMPILE = (
    *("-std=c++17", "-O1", "-g1", "-fPIC", "-fno-strict-aliasing", "-fno-gnu-unique"),
    *("-Wall", "-Wno-unknown-pragmas", "-DSENET_ON_HOST=1", f"-ffile-prefix-map={ROOT}/="),
)
_CUDA = ("-x", "c++", "-include", str(HERE / "shim.h"))
_SANITIZE = ("-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-fno-omit-frame-pointer")


class BuildError(RuntimeError):
    """A compiler's command and what it said."""


@functools.cache
def problem() -> str | None:
    """Why nothing can be built on this machine, or None."""
    if not sys.platform.startswith("linux"):
        return "the host run of CUDA kernels needs Linux"
    if shutil.which("g++") is None:
        return "there is no g++ to compile CUDA kernels for the host"
    if _cuda_headers() is None:
        return "there are no CUDA headers (cuda_fp16.h): neither a toolkit with nvcc nor CUDA_HOME"
    return None


def kernels_library(sanitize: bool = False) -> Path:
    """The library of all CUDA kernels and their operators, for torch.ops.load_library."""
    sys.path.insert(0, str(ROOT / "buildtools"))
    try:
        import toolchain
    finally:
        sys.path.pop(0)
    torch = toolchain.torch_flags()
    return build(
        KERNELS,
        "kernels.so",
        sanitize=sanitize,
        cpp_flags=torch.compile,
        # A sanitizer's own symbols come from the program that loads the library.
        link_flags=[flag for flag in torch.link if flag != "-Wl,-z,defs" or not sanitize],
        depends=[toolchain.torch_folder() / "version.py"],
    )


def build(
    sources: Iterable[str | Path],
    name: str,
    *,
    sanitize: bool = False,
    flags: Sequence[str] = (),
    cpp_flags: Sequence[str] = (),
    link_flags: Sequence[str] = (),
    include: Sequence[Path] = (CSRC,),
    depends: Iterable[Path] = (),
) -> Path:
    """A shared library from .cu and .cpp files, or a program if its name doesn't end in .so.

    `flags` go to every compilation, `cpp_flags` to those of .cpp files. A change of any header in the folders `include`
    or of a file in `depends` builds all anew.
    """
    paths = [ROOT / source for source in sources]
    version = subprocess.run(["g++", "--version"], capture_output=True, text=True, check=True).stdout
    surroundings = [version, *map(_content, [*_headers(HERE, *include), *depends])]
    folders = [f"-I{folder}" for folder in include]
    sanitizers = _SANITIZE if sanitize else ()
    more = shlex.split(os.environ.get("SENET_HOST_CXXFLAGS", ""))
    objects = {}
    for path in paths:
        kind = _CUDA if path.suffix == ".cu" else tuple(cpp_flags)
        command = ["g++", *_COMPILE, *folders, f"-isystem{_cuda_headers()}", *sanitizers, *flags, *kind, *more]
        command += ["-c", str(path)]
        objects[BUILT / "objects" / f"{_hash(command, _content(path), surroundings)}.o"] = command
    shared = ("-shared",) if name.endswith(".so") else ()
    link = ["g++", *shared, *sanitizers, *map(str, objects), *link_flags]
    target = BUILT / _hash(link, name) / name
    if target.exists():
        target.touch()
    else:
        with _lock():
            _forget_unused()
            missing = {path: command for path, command in objects.items() if not path.exists()}
            with ThreadPoolExecutor(2) as two:
                list(two.map(_make, missing, missing.values()))
            if not target.exists():
                _make(target, link)
    return target


def _make(target: Path, command: list[str]) -> None:
    """Whoever sees the target sees all of it."""
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent) as folder:
        half = Path(folder) / target.name
        run = subprocess.run([*command, "-o", str(half)], capture_output=True, text=True, cwd=ROOT)
        if run.returncode != 0:
            raise BuildError(f"{shlex.join(command)}\n{run.stderr}")
        sys.stderr.write(run.stderr)
        os.replace(half, target)


def _forget_unused(days: float = 7) -> None:
    for path in BUILT.glob("*/*"):
        if path.stat().st_mtime < time.time() - days * 24 * 3600:
            path.unlink()


@contextmanager
def _lock() -> Iterator[None]:
    BUILT.mkdir(parents=True, exist_ok=True)
    with open(BUILT / "lock", "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _headers(*folders: Path) -> list[Path]:
    return sorted(path for folder in folders for path in folder.rglob("*") if path.suffix in (".h", ".cuh"))


def _content(path: Path) -> str:
    return f"{path}\n{path.read_text(encoding='utf-8')}"


def _hash(*parts: object) -> str:
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:24]


@functools.cache
def _cuda_headers() -> Path | None:
    """The folder of cuda_fp16.h, as nvcc tells it (it may be a script far from its toolkit), or in CUDA_HOME."""
    folders = []
    if nvcc := shutil.which("nvcc"):
        run = subprocess.run([nvcc, "--dryrun", "-x", "cu", os.devnull], capture_output=True, text=True)
        for top in re.findall(r"^#\$ TOP=(.*\S)", run.stderr, re.MULTILINE):
            folders += [Path(top, "include"), *sorted(Path(top, "targets").glob("*/include"))]
    if home := os.environ.get("CUDA_HOME"):
        folders.append(Path(home, "include"))
    return next((folder.resolve() for folder in folders if (folder / "cuda_fp16.h").is_file()), None)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sanitize", action="store_true", help="with AddressSanitizer and UndefinedBehaviorSanitizer")
    parser.add_argument("--out", type=Path, metavar="DIR", help="copy the library here")
    options = parser.parse_args()
    if (reason := problem()) is not None:
        sys.exit(reason)
    try:
        library = kernels_library(options.sanitize)
    except BuildError as error:
        sys.exit(str(error))
    if options.out is not None:
        options.out.mkdir(parents=True, exist_ok=True)
        library = Path(shutil.copy2(library, options.out))
    print(library)


if __name__ == "__main__":
    main()
