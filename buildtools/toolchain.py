"""What a build needs from the machine: a C++ compiler, ninja, torch's headers, pybind11, the git revision.

Everything is looked up without importing torch, and every absence is one error that says what to install.
"""

from __future__ import annotations

import importlib.util
import os
import re
import shlex
import shutil
import site
import subprocess
import sys
import sysconfig
from dataclasses import dataclass
from pathlib import Path

import switches
from setuptools.errors import PlatformError

TORCH_REQUIREMENT = "torch>=2.11"
OLDEST_TORCH = (2, 11)

_NO_COMPILER = """{problem}
senet_fused compiles its kernels. Install a compiler:
    Debian, Ubuntu   apt-get install g++
    Fedora, RHEL     dnf install gcc-c++
    macOS            xcode-select --install
    conda            conda install -c conda-forge cxx-compiler
or name one with CXX, or install the pure Python package (the same results, none of the speed):
    SENET_FUSED_NO_EXT=1 pip install ."""


@dataclass(frozen=True)
class Flags:
    compile: tuple[str, ...] = ()
    link: tuple[str, ...] = ()
    facts: tuple[str, ...] = ()


def find_torch() -> Path | None:
    """The folder of the torch package to compile against, or None.

    An isolated build can't import the environment's own packages, but it runs the environment's interpreter,
    whose site-packages folders are still known by path. That torch is the one that will load the library.
    """
    spec = importlib.util.find_spec("torch")
    folders = [Path(spec.origin).parent] if spec and spec.origin else []
    roots = [sysconfig.get_path("platlib"), sysconfig.get_path("purelib"), *site.getsitepackages()]
    folders += [Path(root) / "torch" for root in [*roots, site.getusersitepackages()]]
    return next((f for f in folders if (f / "include" / "torch" / "csrc" / "stable").is_dir()), None)


def torch_folder() -> Path:
    """find_torch(), checked: raises PlatformError if there is none or it is too old."""
    folder = find_torch()
    if folder is None:
        raise PlatformError(f"no torch to compile against: pip install '{TORCH_REQUIREMENT}' first")
    version = torch_version(folder)
    if tuple(int(n) for n in re.findall(r"\d+", version)[:2]) < OLDEST_TORCH:
        raise PlatformError(f"{TORCH_REQUIREMENT} is needed, found torch {version} in {folder}")
    return folder


def torch_version(folder: Path) -> str:
    return re.search(r"__version__ = '([^']+)'", (folder / "version.py").read_text()).group(1)


def torch_flags() -> Flags:
    """For a library of torch operators, through LibTorch's stable ABI."""
    folder = torch_folder()
    # 2.10's stable ABI: every later torch carries it, so a build against a newer torch still loads on 2.11.
    target = "-DTORCH_TARGET_VERSION=0x020a000000000000ULL"
    include = folder / "include"
    # A symbol that nobody defines fails the link instead of the first import. (A sanitizer's own symbols come
    # from the program, so an instrumented library can't ask for this.)
    complete = ("-Wl,-z,defs",) if sys.platform == "linux" and not switches.sanitizers() else ()
    return Flags(
        compile=(target, f"-isystem{include}", f"-ffile-prefix-map={include}=torch"),
        link=(f"-L{folder / 'lib'}", "-ltorch_cpu", *complete),
    )


def python_module_flags() -> Flags:
    """For a Python module bound with pybind11."""
    python = Path(sysconfig.get_path("include"))
    if not (python / "Python.h").is_file():
        raise PlatformError(
            f"no Python.h in {python}: install Python's headers (Debian: apt-get install python3-dev), "
            "or set SENET_FUSED_NO_EXT=1 for the pure Python package"
        )
    try:
        import pybind11
    except ImportError:
        raise PlatformError("pybind11 is needed to build: pip install pybind11") from None
    return Flags(compile=(f"-isystem{pybind11.get_include()}", f"-isystem{python}"))


def find_compiler() -> list[str]:
    """The C++ compiler's command: $CXX (several words if need be: "ccache g++") or a usual name."""
    if named := os.environ.get("CXX"):
        command = shlex.split(named)
        if shutil.which(command[0]) is None:
            raise PlatformError(_NO_COMPILER.format(problem=f"the C++ compiler CXX={named} can't be run."))
        return command
    for name in ("g++", "clang++", "c++"):
        if shutil.which(name):
            return [name]
    raise PlatformError(_NO_COMPILER.format(problem="no C++ compiler found (g++, clang++ or c++)."))


def compiler_version(compiler: list[str]) -> str:
    run = subprocess.run([*compiler, "--version"], capture_output=True, text=True)
    if run.returncode != 0:
        problem = f"the C++ compiler {shlex.join(compiler)} doesn't work:\n{run.stderr.strip()}"
        raise PlatformError(_NO_COMPILER.format(problem=problem))
    return run.stdout.splitlines()[0]


def find_ninja() -> str:
    """ninja, the Python package or the one on PATH."""
    try:
        import ninja

        return os.path.join(ninja.BIN_DIR, "ninja")
    except ImportError:
        found = shutil.which("ninja")
    if found is None:
        raise PlatformError("ninja is needed to build: pip install ninja (or apt-get install ninja-build)")
    return found


def git_revision(root: Path) -> str:
    """The checkout's revision ("-dirty" with local changes), or "unknown" outside of a checkout."""

    def git(*words: str) -> str:
        command = ["git", "-C", str(root), *words]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    try:
        if Path(git("rev-parse", "--show-toplevel")).resolve() != root.resolve():
            return "unknown"
        return git("describe", "--always", "--dirty", "--abbrev=12", "--exclude=*")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def require_supported_platform() -> None:
    if sys.platform not in ("linux", "darwin"):
        raise PlatformError(
            f"senet_fused's kernels build on Linux and macOS, not on {sys.platform}: "
            "set SENET_FUSED_NO_EXT=1 for the pure Python package"
        )
