"""The CUDA toolkit of a build: its nvcc, its libraries and the GPU architectures to compile for.

A machine that compiles needs neither a GPU nor a driver. All is asked of nvcc itself, because the command may be
a wrapper script far from the toolkit, and toolkits keep their libraries in folders of different names.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

import switches
from setuptools.errors import PlatformError
from toolchain import Flags

OLDEST_TOOLKIT = (12, 0)
OLDEST_ARCHITECTURE = 80
# For a machine without a GPU, as far as nvcc knows them; the last one with PTX, for the GPUs after it.
USUAL_ARCHITECTURES = (80, 90, 100)

_INSTALL = """\
Install a CUDA toolkit, 12.0 or later:
    any system       https://developer.nvidia.com/cuda-downloads
    conda            conda install -c conda-forge cuda-nvcc cuda-cudart-static
or name another one's nvcc with NVCC or its folder with CUDA_HOME"""

_COMMON = (
    *("-std=c++17", "-O3", "-Icsrc", "-Xcompiler=-fPIC,-fvisibility=hidden,-Wall"),
    # A kernel that falls back to local memory is slow without being wrong: the compiler says so.
    *("--expt-relaxed-constexpr", "-Xptxas=-warn-spills,-warn-lmem-usage"),
)


class NoCuda(Exception):
    """Why the CUDA library can't be built here.

    `reason` is a few words for the build's facts, which end up in a library and so name no path of this machine;
    the message says it in full, and `remedy` what to do about it.
    """

    def __init__(self, reason: str, message: str, remedy: str = _INSTALL):
        super().__init__(message)
        self.reason = reason
        self.remedy = remedy


@dataclass(frozen=True)
class CudaToolkit:
    """An nvcc that works, and what to compile with it.

    `targets` are in nvcc's words: "sm_90" is machine code, "compute_90" PTX that a driver compiles for later GPUs.
    """

    nvcc: list[str]
    host_compiler: tuple[str, ...]
    version: str
    root: str
    libraries: Path
    targets: tuple[str, ...]

    @property
    def fact(self) -> str:
        return f"nvcc {self.version} for {' '.join(self.targets)}"

    def flags(self) -> Flags:
        """For sources in CUDA C++, and to link them with the toolkit's runtime, which needs no driver to load."""
        return Flags(
            compile=(
                *_COMMON,
                f"-Xcompiler=-ffile-prefix-map={self.root}=cuda",
                *self.host_compiler,
                *(f"-gencode=arch=compute_{name.partition('_')[2]},code={name}" for name in self.targets),
            ),
            link=(f"-L{self.libraries}", "-lcudart_static", "-lpthread", "-ldl", "-lrt"),
            facts=(f'-DSENET_CUDA_ARCHITECTURES="{" ".join(self.targets)}"',),
        )


def choose(compiler: list[str]) -> tuple[CudaToolkit | None, str]:
    """What SENET_FUSED_CUDA and this machine amount to: a toolkit or None, and the build's fact about it."""
    wanted = switches.cuda()
    if wanted == "0":
        return None, "none: SENET_FUSED_CUDA=0"
    try:
        if wanted == "gpu" and not gpus_here():
            raise NoCuda("no GPU where it was built", "this machine has no GPU (SENET_FUSED_CUDA=1 builds it here too)")
        toolkit = find_toolkit(compiler)
    except NoCuda as problem:
        if wanted == "1":
            raise PlatformError(
                f"SENET_FUSED_CUDA=1 asks for the CUDA library, but {problem}.\n{problem.remedy}, "
                "or build without it:\n    SENET_FUSED_CUDA=0 pip install ."
            ) from None
        print(f"senet_fused is built without its CUDA library: {problem}", flush=True)
        return None, f"none: {problem.reason}"
    return toolkit, toolkit.fact


def find_toolkit(compiler: list[str]) -> CudaToolkit:
    """The toolkit of the nvcc that is found, tried out with the C++ compiler. Raises NoCuda."""
    if switches.sanitizers():
        raise NoCuda(
            "a sanitizer build",
            "nvcc can't instrument it for SENET_FUSED_SANITIZE",
            "Unset SENET_FUSED_SANITIZE",
        )
    nvcc = find_nvcc()
    found = re.search(r"release (\d+)\.(\d+)(?:, V([\d.]+))?", _ask(nvcc, "--version").stdout)
    if found is None:
        raise _broken(nvcc, "its --version names no release")
    version = found[3] or f"{found[1]}.{found[2]}"
    if (int(found[1]), int(found[2])) < OLDEST_TOOLKIT:
        raise NoCuda(
            f"nvcc {version} is too old",
            f"it needs CUDA 12.0 or later and {shlex.join(nvcc)} is nvcc {version}",
        )
    # nvcc takes one name. Of several words ("ccache g++") none is sure to be it, and nvcc finds its own.
    host_compiler = ("-ccbin", compiler[0]) if len(compiler) == 1 else ()
    # Preprocessing nothing takes 0.2 s. It fails without the toolkit's headers and with a C++ compiler that this nvcc
    # can't work with, and --verbose tells the toolkit's folders as --dryrun does.
    tried = _ask(nvcc, "--verbose", "-E", "-x", "cu", "-std=c++17", *host_compiler, os.devnull)
    settings = dict(re.findall(r"^#\$ (\w+)=(.*\S)", tried.stderr, re.MULTILINE))
    if "TOP" not in settings:
        raise _broken(nvcc, "its --verbose output doesn't tell the toolkit's folder (a line with TOP=)")
    return CudaToolkit(
        nvcc=nvcc,
        host_compiler=host_compiler,
        version=version,
        root=settings["TOP"],
        libraries=_libraries(settings),
        targets=choose_targets(_known_architectures(nvcc)),
    )


def find_nvcc() -> list[str]:
    """nvcc's command: $NVCC (several words if need be), else the first of the usual places that has one."""
    if command := shlex.split(os.environ.get("NVCC", "")):
        if shutil.which(command[0]) is None:
            raise NoCuda("nvcc not found", f"NVCC={shlex.join(command)} can't be run")
        return command
    homes = [os.environ[name] for name in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(name)]
    places = [*(os.path.join(home, "bin", "nvcc") for home in homes), "nvcc", "/usr/local/cuda/bin/nvcc"]
    for place in places:
        if found := shutil.which(place):
            return [found]
    raise NoCuda(
        "nvcc not found",
        "nvcc is neither named by NVCC nor in bin/ of CUDA_HOME or CUDA_PATH, on PATH or in /usr/local/cuda/bin",
    )


def choose_targets(known: set[int]) -> tuple[str, ...]:
    """What to compile for: TORCH_CUDA_ARCH_LIST, else this machine's GPUs, else the usual ones."""
    listed = os.environ.get("TORCH_CUDA_ARCH_LIST", "")
    if listed.strip(" \t\n;,"):
        return _listed_targets(listed, known)
    here = gpus_here()
    usable = {number for number in here if number >= OLDEST_ARCHITECTURE}
    if here and not usable:
        raise NoCuda(
            "the GPU is too old",
            f"its kernels need a GPU of compute capability 8.0 and this machine's best is {_dotted(max(here))}",
            'Name other GPUs to compile for with TORCH_CUDA_ARCH_LIST="8.0;9.0+PTX"',
        )
    if usable:
        code = usable & known
        # The driver of a GPU that this nvcc doesn't know compiles the PTX of the newest one before it.
        ptx = {max((number for number in known if number < gpu), default=min(known)) for gpu in usable - known}
    else:
        code = known.intersection(USUAL_ARCHITECTURES) or {max(known)}
        ptx = {max(code)}
    return (*(f"sm_{number}" for number in sorted(code)), *(f"compute_{number}" for number in sorted(ptx)))


def gpus_here() -> set[int]:
    """The compute capabilities of this machine's GPUs, 90 for 9.0; empty without a driver that tells them."""
    command = ["nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader"]
    try:
        run = subprocess.run(command, capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.TimeoutExpired):
        return set()
    return {int(major + minor) for major, minor in re.findall(r"^(\d+)\.(\d)\s*$", run.stdout, re.MULTILINE)}


def _listed_targets(listed: str, known: set[int]) -> tuple[str, ...]:
    """TORCH_CUDA_ARCH_LIST as PyTorch writes it, machine code first. PlatformError if it can't be followed."""

    def refuse(problem: str) -> PlatformError:
        return PlatformError(
            f"TORCH_CUDA_ARCH_LIST={listed!r}: {problem}. It takes compute capabilities from 8.0 on, such as "
            '"8.0;9.0+PTX" or "9.0a" (separated by ; , or spaces; +PTX adds code for later GPUs), and unset it '
            "means this machine's GPUs. SENET_FUSED_CUDA=0 builds without CUDA"
        )

    wanted, too_old = set(), []
    for entry in re.split(r"[;,\s]+", listed.strip(" \t\n;,")):
        parts = re.fullmatch(r"(\d+)\.(\d)([af]?)(\+PTX)?", entry)
        if parts is None:
            raise refuse(f"{entry!r} is not a compute capability")
        major, minor, suffix, ptx = parts.groups()
        number = int(major + minor)
        if number < OLDEST_ARCHITECTURE:
            too_old.append(entry)  # other packages' kernels may run there: such lists are set for whole images
            continue
        if number not in known:
            raise refuse(f"this nvcc doesn't know {entry}, only {', '.join(map(_dotted, sorted(known)))}")
        wanted.add(("sm", number, suffix))
        if ptx:
            wanted.add(("compute", number, suffix))
    if not wanted:
        raise refuse("the kernels need 8.0, and all of it is below that")
    if too_old:
        names = ", ".join(too_old)
        print(f"senet_fused: nothing is compiled for {names} of TORCH_CUDA_ARCH_LIST: the kernels need 8.0")
    ordered = sorted(wanted, key=lambda target: (target[0] == "compute", target))
    return tuple(f"{kind}_{number}{suffix}" for kind, number, suffix in ordered)


def _known_architectures(nvcc: list[str]) -> set[int]:
    """The architectures that this nvcc compiles for and the kernels run on."""
    listed = re.findall(r"^sm_(\d+)\s*$", _ask(nvcc, "--list-gpu-code").stdout, re.MULTILINE)
    known = {int(number) for number in listed if int(number) >= OLDEST_ARCHITECTURE}
    if not known:
        raise _broken(nvcc, "its --list-gpu-code names no architecture from sm_80 on")
    return known


def _libraries(settings: dict[str, str]) -> Path:
    """The folder of the toolkit's static runtime library."""
    root = Path(settings["TOP"]).resolve()
    folders = [root / "lib64", root / "lib", root / settings.get("_TARGET_DIR_", "targets/x86_64-linux") / "lib"]
    folders += [Path(folder).resolve() for folder in re.findall(r'-L([^"\s]+)', settings.get("LIBRARIES", ""))]
    for folder in folders:
        if (folder / "libcudart_static.a").is_file():
            return folder
    searched = ", ".join(dict.fromkeys(map(str, folders)))
    raise NoCuda("no libcudart_static.a", f"the toolkit in {root} has no libcudart_static.a (looked in {searched})")


def _ask(nvcc: list[str], *arguments: str) -> subprocess.CompletedProcess:
    try:
        run = subprocess.run([*nvcc, *arguments], capture_output=True, text=True)
    except OSError as error:
        raise _broken(nvcc, str(error)) from None
    if run.returncode != 0:
        said = [line for line in (run.stderr + run.stdout).splitlines() if line and not line.startswith("#$")]
        errors = [line for line in said if "error" in line.lower()]
        said = (errors or said or [f"exit status {run.returncode}, and no message"])[0].strip()
        raise _broken(nvcc, f"{shlex.join(arguments)} says: {said}")
    return run


def _broken(nvcc: list[str], problem: str) -> NoCuda:
    return NoCuda("nvcc doesn't work", f"{shlex.join(nvcc)} doesn't work: {problem}")


def _dotted(number: int) -> str:
    return f"{number // 10}.{number % 10}"
