"""The build_ext command: libraries described as data, turned into one build.ninja, compiled by ninja.

Ninja keeps the commands and, through the compiler's depfiles, the headers behind each object file:
a second build compiles nothing and a changed header rebuilds exactly its users.
"""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import cuda_toolkit
import switches
import toolchain
from cuda_toolkit import CudaToolkit
from setuptools import Extension
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py
from setuptools.errors import CompileError, OptionError
from toolchain import Flags

ROOT = Path(__file__).resolve().parents[1]

_COMMON = ("-std=c++17", "-O3", "-g0", "-fPIC", "-fvisibility=hidden", "-ffp-contract=fast", "-Wall")
_LINK = ("-bundle", "-undefined", "dynamic_lookup") if sys.platform == "darwin" else ("-shared",)

_RULES = """\
rule compile
  command = $cxx -MD -MF $out.d $flags -c $in -o $out
  depfile = $out.d
  deps = gcc
  description = compile $out
rule link
  command = $cxx $flags -o $out $in $libraries
  description = link $out
"""
_CUDA_RULE = """\
rule compile_cuda
  command = $nvcc -MD -MF $out.d $flags -c $in -o $out
  depfile = $out.d
  deps = gcc
  description = compile $out
"""


@dataclass(frozen=True)
class Unit:
    """One object file: a source, the flags only it gets, and a name that tells variants of a source apart.

    A source in .cu is compiled by nvcc, without torch's headers; every other one by the C++ compiler.

    `facts` marks the one unit that is told how it was built (version, revision, compiler, ...), so that a new
    revision recompiles that unit and nothing else.
    """

    source: str
    flags: tuple[str, ...] = ()
    variant: str = ""
    facts: bool = False

    @property
    def cuda(self) -> bool:
        return self.source.endswith(".cu")

    @property
    def object(self) -> str:
        # .cu stays in the name: a source of C++ may lie beside it under the same one.
        stem = self.source.removesuffix(".cpp")
        return f"{stem}.{self.variant}.o" if self.variant else f"{stem}.o"


class SharedObject(Extension):
    """One shared object of the package, linked from its units."""

    def __init__(self, name: str, units: list[Unit]):
        super().__init__(name, sources=sorted({unit.source for unit in units}))
        self.units = units

    def file_name(self) -> str:
        return self.name.replace(".", "/") + self.suffix

    def needs(self, cuda: CudaToolkit | None) -> Flags:
        """What its C++ units are compiled with, what it is linked with, and facts of its own for its facts unit."""
        raise NotImplementedError


class TorchLibrary(SharedObject):
    """A library of operators for torch.ops.load_library. It has no Python symbol and no Python tag."""

    suffix = ".so"

    def needs(self, cuda: CudaToolkit | None) -> Flags:
        return toolchain.torch_flags()


class CudaLibrary(TorchLibrary):
    """A library of operators with units in CUDA C++; left out of a build without a CUDA toolkit.

    Its facts unit is told SENET_CUDA_ARCHITECTURES: "sm_80 sm_90 sm_100 compute_100" is machine code for compute
    capabilities 8.0, 9.0 and 10.0, and PTX of 10.0 for later GPUs.
    """

    def needs(self, cuda: CudaToolkit | None) -> Flags:
        torch, runtime = super().needs(cuda), cuda.flags()
        return Flags(torch.compile, torch.link + runtime.link, runtime.facts)


class PythonModule(SharedObject):
    """A Python extension module, bound with pybind11."""

    suffix = sysconfig.get_config_var("EXT_SUFFIX")

    def needs(self, cuda: CudaToolkit | None) -> Flags:
        return toolchain.python_module_flags()


class FreshBuildPy(build_py):
    """build_py into an emptied folder: a module deleted from the checkout leaves the next wheel too."""

    def run(self) -> None:
        if not self.editable_mode:
            shutil.rmtree(os.path.join(self.build_lib, "senet_fused"), ignore_errors=True)
        super().run()


class NinjaBuildExt(build_ext):
    """build_ext, with every object and library in one ninja graph.

    Several processes may build at once: one compiles, and the others wait and find it done.
    """

    user_options = [*build_ext.user_options, ("only=", None, "build this one of the libraries: senet_fused._cuda")]

    def initialize_options(self) -> None:
        super().initialize_options()
        self.only: str | None = None
        self.left_out: list[SharedObject] = []

    def get_ext_filename(self, fullname: str) -> str:
        """Asked with and without the package's name in front; ext_map knows an extension by both."""
        return os.path.join(*fullname.split(".")) + self.ext_map[fullname].suffix

    def build_extensions(self) -> None:
        toolchain.require_supported_platform()
        compiler = toolchain.find_compiler()
        compiler_version = toolchain.compiler_version(compiler)
        cuda, about_cuda = cuda_toolkit.choose(compiler)
        if cuda is None:
            self.left_out = [library for library in self.extensions if isinstance(library, CudaLibrary)]
            self.extensions = [library for library in self.extensions if library not in self.left_out]
        wanted = [library for library in self.extensions if self.only in (None, library.name)]
        if not wanted:
            names = ", ".join(sorted(library.name for library in self.extensions))
            raise OptionError(f"--only {self.only}: expected one of {names}")
        facts = self._facts(COMPILER=compiler_version, CUDA=about_cuda)
        folder = self._ninja_folder()
        folder.mkdir(parents=True, exist_ok=True)
        plan = folder / "build.ninja"
        files = [str(folder.relative_to(ROOT) / library.file_name()) for library in wanted]
        command = [toolchain.find_ninja(), "-C", str(ROOT), "-f", str(plan), *switches.jobs(), *files]
        with _lock(folder):
            plan.write_text(self._ninja_file(compiler, cuda, facts, folder.relative_to(ROOT)))
            if subprocess.run(command).returncode != 0:
                raise CompileError("compiling senet_fused failed: the compiler's own messages are above")
            for library in wanted:
                target = self.get_ext_fullpath(library.name)
                self.mkpath(os.path.dirname(target))
                self.copy_file(str(folder / library.file_name()), target)
        self._remove_left_out()

    def copy_extensions_to_source(self) -> None:
        super().copy_extensions_to_source()
        self._remove_left_out()

    def _remove_left_out(self) -> None:
        """An earlier build's library would be loaded, or packed into a wheel, beside those of this build."""
        for library in self.left_out:
            Path(self.get_ext_fullpath(library.name)).unlink(missing_ok=True)

    def _ninja_folder(self) -> Path:
        """One folder for each torch and each way to build, so that objects never mix; kept between builds.

        Not setuptools' own build_temp: an editable install gets a new temporary one every time.
        """
        parts = [sysconfig.get_platform(), sys.implementation.cache_tag]
        parts += [f"torch-{toolchain.torch_version(toolchain.torch_folder())}"]
        parts += [name for name in switches.sanitizers().split(",") if name]
        return ROOT / "build" / "ninja" / "-".join(parts)

    def _facts(self, **more: str) -> tuple[str, ...]:
        isas = [unit.variant for library in self.extensions for unit in library.units if unit.variant]
        facts = {
            "VERSION": self.distribution.get_version(),
            "REVISION": toolchain.git_revision(ROOT),
            "ISAS": " ".join(isas),
            "TORCH": toolchain.torch_version(toolchain.torch_folder()),
            **more,
        }
        return tuple(f'-DSENET_BUILD_{name}="{value}"' for name, value in facts.items())

    def _ninja_file(self, compiler: list[str], cuda: CudaToolkit | None, facts: tuple[str, ...], folder: Path) -> str:
        compile_flags, link_flags = (*_COMMON, "-Icsrc"), _LINK
        if sanitize := switches.sanitizers():
            flag = f"-fsanitize={sanitize}"
            compile_flags += (flag, "-fno-sanitize-recover=all", "-fno-omit-frame-pointer", "-O1", "-g1")
            link_flags += (flag,)
        elif sys.platform == "linux":
            link_flags += ("-s",)

        lines = [f"builddir = {_escape(str(folder))}", f"cxx = {_command(compiler)}", _RULES]
        if cuda is not None:
            lines += [f"nvcc = {_command(cuda.nvcc)}", _CUDA_RULE]
        for library in self.extensions:
            needs = library.needs(cuda)
            objects = []
            for unit in library.units:
                told = (*facts, *needs.facts) if unit.facts else ()
                if unit.cuda:
                    rule, flags = "compile_cuda", (*cuda.flags().compile, *unit.flags, *told)
                else:
                    flags = (*compile_flags, *needs.compile, *unit.flags, *told, *switches.extra_compile_flags())
                    rule = "compile"
                # Inside a folder for the library: two libraries may compile one source with different flags.
                objects.append(_escape(f"{folder}/{library.name}/{unit.object}"))
                lines += [
                    f"build {objects[-1]}: {rule} {_escape(unit.source)}",
                    f"  flags = {_command(flags)}",
                ]
            lines += [
                f"build {_escape(f'{folder}/{library.file_name()}')}: link {' '.join(objects)}",
                f"  flags = {_command(link_flags)}",
                f"  libraries = {_command(needs.link)}",
            ]
        return "\n".join(lines) + "\n"


@contextmanager
def _lock(folder: Path) -> Iterator[None]:
    import fcntl  # which Windows lacks, where the package is pure Python

    with open(folder / "lock", "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _command(words) -> str:
    """Words as a piece of a shell command inside a ninja file."""
    return shlex.join(words).replace("$", "$$")


def _escape(path: str) -> str:
    """A path as ninja reads one."""
    return path.replace("$", "$$").replace(" ", "$ ").replace(":", "$:")
