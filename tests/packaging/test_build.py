"""The build: incremental, clear about what is missing, and complete in what it ships.

The incremental tests drive the real build command over a miniature project: the kernels take a minute.
"""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

import senet_fused

ROOT = Path(__file__).resolve().parents[2]
SMOKE = Path(__file__).with_name("smoke.py")

for tool, module in (("setuptools", "setuptools"), ("ninja", "ninja"), ("pybind11", "pybind11")):
    pytest.importorskip(module, reason=f"{tool} is not installed")
pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="g++ is not installed")

MINIATURE = """
import os, sys
sys.path.insert(0, "buildtools")
import setuptools
from ninja_build import CudaLibrary, FreshBuildPy, NinjaBuildExt, TorchLibrary, Unit
libraries = [TorchLibrary("senet_fused._tiny", [
    Unit("csrc/one.cpp", ("-DVARIANT=1",), "first"), Unit("csrc/one.cpp", ("-DVARIANT=2",), "second"),
    Unit("csrc/two.cpp"), Unit("csrc/facts.cpp", facts=True),
])]
if os.path.exists("csrc/cuda"):
    libraries.append(CudaLibrary("senet_fused._tiny_cuda", [
        Unit("csrc/cuda/add.cpp"), Unit("csrc/cuda/add.cu"), Unit("csrc/cuda/told.cpp", facts=True),
    ]))
setuptools.setup(
    name="miniature", version="1.2.3", packages=[], ext_modules=libraries,
    cmdclass={"build_py": FreshBuildPy, "build_ext": NinjaBuildExt},
)
"""


def run(command, cwd, **environment) -> subprocess.CompletedProcess:
    unwanted = ("SENET_", "PYTEST_", "TORCH_CUDA_", "PYTHONPATH")
    inherited = {k: v for k, v in os.environ.items() if not k.startswith(unwanted)}
    return subprocess.run(list(map(str, command)), cwd=cwd, env=inherited | environment, capture_output=True, text=True)


@pytest.fixture
def miniature(tmp_path):
    """A project of three sources built by buildtools/, two of them sharing a header."""
    shutil.copytree(ROOT / "buildtools", tmp_path / "buildtools")
    (tmp_path / "setup.py").write_text(MINIATURE)
    (tmp_path / "csrc").mkdir()
    (tmp_path / "csrc/shared.h").write_text("inline int shared() { return 1; }\n")
    (tmp_path / "csrc/one.cpp").write_text(
        '#include "shared.h"\n#define NAME_(v) one_##v\n#define NAME(v) NAME_(v)\n'
        'extern "C" int NAME(VARIANT)() { return shared(); }\n'
    )
    (tmp_path / "csrc/two.cpp").write_text('extern "C" int two() { return 2; }\n')
    (tmp_path / "csrc/facts.cpp").write_text(
        'extern "C" __attribute__((visibility("default"))) const char* facts() { return SENET_BUILD_VERSION '
        '" " SENET_BUILD_REVISION " " SENET_BUILD_COMPILER " " SENET_BUILD_ISAS " " SENET_BUILD_TORCH '
        '" " SENET_BUILD_CUDA; }\n'
    )
    return tmp_path


def build(project, *arguments, **environment) -> list[str]:
    """Builds, and returns what ninja compiled and linked."""
    done = run([sys.executable, "setup.py", "build_ext", *arguments], project, **environment)
    assert done.returncode == 0, done.stdout + done.stderr
    steps = [line.split()[1:] for line in done.stdout.splitlines() if line.startswith("[")]
    return sorted(Path(path).name for _, path in steps)


EVERYTHING = ["_tiny.so", "facts.o", "one.first.o", "one.second.o", "two.o"]


def test_build_is_incremental(miniature):
    assert build(miniature) == EVERYTHING
    assert build(miniature) == []

    (miniature / "csrc/shared.h").write_text("inline int shared() { return 3; }\n")
    assert build(miniature) == ["_tiny.so", "one.first.o", "one.second.o"], "exactly the header's users"

    (miniature / "csrc/two.cpp").write_text('extern "C" int two() { return 22; }\n')
    assert build(miniature) == ["_tiny.so", "two.o"]


def test_new_revision_recompiles_the_facts_alone(miniature):
    def commit():
        identity = ["-c", "user.name=nobody", "-c", "user.email=nobody@localhost"]
        for words in (
            ["init", "-q"],
            ["add", "csrc"],
            [*identity, "commit", "-q", "-m", "x", "--allow-empty"],
        ):
            assert run(["git", *words], miniature).returncode == 0

    if shutil.which("git") is None:
        pytest.skip("git is not installed")
    assert build(miniature) == EVERYTHING
    commit()
    assert build(miniature) == ["_tiny.so", "facts.o"]
    assert build(miniature) == []


@pytest.mark.processes
def test_extra_flags_and_sanitizers(miniature):
    assert build(miniature) == EVERYTHING
    assert build(miniature, SENET_FUSED_CXXFLAGS="-DEXTRA -DQUOTED='a $b'") == EVERYTHING
    sanitized = build(miniature, "--build-lib", "sanitized", SENET_FUSED_SANITIZE="undefined")
    assert sanitized == EVERYTHING, "objects of its own"
    assert build(miniature, SENET_FUSED_CXXFLAGS="-DEXTRA -DQUOTED='a $b'") == [], "untouched by the other build"


def test_one_library_alone(miniature):
    """What the others need is neither compiled nor touched."""
    setup = (miniature / "setup.py").read_text()
    other = 'libraries.append(TorchLibrary("senet_fused._other", [Unit("csrc/two.cpp", ("-DOTHER",))]))\n'
    (miniature / "setup.py").write_text(setup.replace("if os.path", other + "if os.path"))
    assert build(miniature, "--only", "senet_fused._other") == ["_other.so", "two.o"]
    assert build(miniature) == EVERYTHING
    said = build_fails(miniature, "--only", "senet_fused._another")
    assert "_another" in said and "senet_fused._other, senet_fused._tiny" in said


def test_several_builds_at_once(miniature):
    """One compiles; the other waits, and has nothing left to do."""
    (miniature / "senet_fused").mkdir()
    command = [sys.executable, "setup.py", "build_ext", "--inplace"]
    both = [subprocess.Popen(command, cwd=miniature, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    said = [process.communicate()[0] for process in both]
    assert [process.returncode for process in both] == [0, 0]
    assert sorted(text.count("compile build") for text in said) == [0, 4]


def test_compile_error_is_shown(miniature):
    (miniature / "csrc/two.cpp").write_text("int two( {\n")
    done = run([sys.executable, "setup.py", "build_ext"], miniature)
    assert done.returncode != 0
    assert "csrc/two.cpp:1" in done.stdout
    assert done.stderr.splitlines()[-1].startswith("error: compiling senet_fused failed")


@pytest.mark.parametrize("named", [None, "no-such-compiler"])
def test_missing_compiler_says_what_to_install(miniature, tmp_path, named):
    environment = {"PATH": str(tmp_path), "CXX": named or ""}
    done = run([sys.executable, "setup.py", "build_ext"], miniature, **environment)
    assert done.returncode != 0
    for words in (
        "apt-get install g++",
        "xcode-select --install",
        "SENET_FUSED_NO_EXT=1",
        named or "no C++ compiler",
    ):
        assert words in done.stderr
    assert "Traceback" not in done.stderr


def test_torch_is_found_where_it_cannot_be_imported(monkeypatch):
    """As in an isolated build, which hides the environment's packages from import."""
    monkeypatch.syspath_prepend(ROOT / "buildtools")
    import toolchain

    importable = toolchain.find_torch()
    monkeypatch.setattr(toolchain.importlib.util, "find_spec", lambda name: None)
    assert toolchain.find_torch() == importable
    monkeypatch.setattr(toolchain, "find_torch", lambda: None)
    with pytest.raises(toolchain.PlatformError, match="pip install 'torch>=2.11'"):
        toolchain.torch_folder()


def test_torch_too_old_is_refused(monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(ROOT / "buildtools")
    import toolchain

    (tmp_path / "version.py").write_text("__version__ = '2.9.1+cpu'\n")
    monkeypatch.setattr(toolchain, "find_torch", lambda: tmp_path)
    with pytest.raises(toolchain.PlatformError, match=r"torch>=2\.11 is needed, found torch 2\.9\.1"):
        toolchain.torch_folder()


@pytest.fixture
def cuda_toolkit(monkeypatch):
    """buildtools/cuda_toolkit.py, for a machine of which nothing is known."""
    for name in ("SENET_FUSED_CUDA", "SENET_FUSED_SANITIZE", "TORCH_CUDA_ARCH_LIST"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.syspath_prepend(ROOT / "buildtools")
    import cuda_toolkit

    return cuda_toolkit


@pytest.fixture
def cuda_miniature(miniature):
    """The project with a library for CUDA: one source of kernels with a header, and C++ of the same name."""
    (miniature / "csrc/cuda").mkdir()
    (miniature / "senet_fused").mkdir()
    (miniature / "csrc/cuda/amount.cuh").write_text("#pragma once\nconstexpr int AMOUNT = 1;\n")
    (miniature / "csrc/cuda/add.cu").write_text(
        '#include "cuda/amount.cuh"\n#include <cassert>\n'
        "namespace { __global__ void kernel(int* p) { assert(p != nullptr); *p += AMOUNT; } }\n"
        'extern "C" const char* launch_add(int* p, void* stream) {\n'
        "  kernel<<<1, 1, 0, static_cast<cudaStream_t>(stream)>>>(p);\n"
        "  const cudaError_t error = cudaGetLastError();\n"
        "  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);\n}\n"
    )
    (miniature / "csrc/cuda/add.cpp").write_text(
        "#include <torch/csrc/stable/tensor.h>\n"
        'extern "C" const char* launch_add(int* p, void* stream);\n'
        'extern "C" __attribute__((visibility("default"))) const char* add(int* p) { return launch_add(p, nullptr); }\n'
    )
    (miniature / "csrc/cuda/told.cpp").write_text(
        'extern "C" __attribute__((visibility("default"))) const char* told() {\n'
        '  return SENET_CUDA_ARCHITECTURES "; " SENET_BUILD_CUDA;\n}\n'
    )
    return miniature


def write_nvcc(path: Path, release: str = "12.4", top: Path | None = None, failure: str = "") -> Path:
    """A stand-in that answers what the build asks of nvcc, and knows GPUs up to 9.0."""
    fails = f"echo '{failure}' >&2; exit 3" if failure else f"echo '#$ TOP={top}' >&2"
    path.write_text(
        f"#!/bin/sh\ncase $1 in\n--version) echo 'Cuda compilation tools, release {release}, V{release}.99' ;;\n"
        f"--list-gpu-code) printf 'sm_75\\nsm_80\\nsm_86\\nsm_90\\n' ;;\n*) {fails} ;;\nesac\n"
    )
    path.chmod(0o755)
    return path


CUDA_OBJECTS = ["add.cu.o", "add.o", "told.o"]


@pytest.mark.nvcc
def test_cuda_library(cuda_miniature, cuda_toolkit):
    """By an nvcc behind a wrapper script, incrementally; it loads where there is no driver."""
    try:
        real = cuda_toolkit.find_toolkit(["g++"])
    except cuda_toolkit.NoCuda as problem:
        pytest.skip(str(problem))
    wrapper = cuda_miniature / "wrapper"
    wrapper.write_text(f'#!/bin/sh\nexec {" ".join(real.nvcc)} "$@"\n')
    wrapper.chmod(0o755)
    settings = {"NVCC": str(wrapper), "SENET_FUSED_CUDA": "1", "TORCH_CUDA_ARCH_LIST": "9.0+PTX 8.0"}
    assert build(cuda_miniature, "--inplace", **settings) == sorted([*EVERYTHING, *CUDA_OBJECTS, "_tiny_cuda.so"])
    assert build(cuda_miniature, "--inplace", **settings) == []
    # Of the same objects, and without the package noticing.
    (cuda_miniature / "senet_fused/_tiny_cuda.so").unlink()
    assert build(cuda_miniature, "--only", "senet_fused._tiny_cuda", "--build-lib", "elsewhere", **settings) == []
    assert {p.name for p in (cuda_miniature / "elsewhere/senet_fused").iterdir()} == {"_tiny_cuda.so"}
    assert not (cuda_miniature / "senet_fused/_tiny_cuda.so").exists()
    assert build(cuda_miniature, "--inplace", **settings) == []

    built = cuda_miniature / "senet_fused/_tiny_cuda.so"
    library = ctypes.CDLL(str(built))
    library.told.restype = ctypes.c_char_p
    targets = "sm_80 sm_90 compute_90"
    assert library.told().decode() == f"{targets}; nvcc {real.version} for {targets}"
    for path in (cuda_miniature, Path(real.root).resolve()):
        assert str(path).encode() not in built.read_bytes(), "a path of the building machine"

    (cuda_miniature / "csrc/cuda/amount.cuh").write_text("#pragma once\nconstexpr int AMOUNT = 2;\n")
    assert build(cuda_miniature, "--inplace", **settings) == ["_tiny_cuda.so", "add.cu.o"], "its user alone"

    settings["TORCH_CUDA_ARCH_LIST"] = "8.0"
    told = ["_tiny.so", "facts.o"]
    assert build(cuda_miniature, "--inplace", **settings) == sorted(["_tiny_cuda.so", "add.cu.o", "told.o", *told])
    assert build(cuda_miniature, "--inplace", SENET_FUSED_CUDA="0") == told
    assert not built.exists(), "the earlier build's library stays beside the others"


def build_fails(project, *arguments, **environment) -> str:
    done = run([sys.executable, "setup.py", "build_ext", *arguments], project, **environment)
    assert done.returncode != 0 and "Traceback" not in done.stderr
    return done.stderr


def test_missing_nvcc_leaves_the_cuda_library_out(cuda_miniature):
    done = run([sys.executable, "setup.py", "-q", "build_ext", "--inplace"], cuda_miniature, NVCC="no-such-nvcc")
    assert done.returncode == 0, done.stderr
    said = [line for line in done.stdout.splitlines() if "CUDA" in line]
    assert said == ["senet_fused is built without its CUDA library: NVCC=no-such-nvcc can't be run"]
    assert {p.name for p in (cuda_miniature / "senet_fused").glob("*.so")} == {"_tiny.so"}
    library = ctypes.CDLL(str(cuda_miniature / "senet_fused/_tiny.so"))
    library.facts.restype = ctypes.c_char_p
    assert library.facts().decode().endswith("none: nvcc not found")


@pytest.mark.parametrize("gpus", [False, True], ids=["no GPU", "a GPU"])
def test_cuda_where_there_is_a_gpu(cuda_toolkit, monkeypatch, tmp_path, gpus):
    """As `make build` has it. A GPU alone is not enough: nvcc has to be there."""
    monkeypatch.setenv("SENET_FUSED_CUDA", "gpu")
    monkeypatch.setenv("NVCC", str(write_nvcc(tmp_path / "nvcc", top=tmp_path)))
    monkeypatch.setattr(cuda_toolkit, "gpus_here", lambda: {90} if gpus else set())
    (tmp_path / "lib").mkdir()
    (tmp_path / "lib/libcudart_static.a").touch()
    toolkit, fact = cuda_toolkit.choose(["g++"])
    assert (toolkit is not None) == gpus
    assert fact == ("nvcc 12.4.99 for sm_90" if gpus else "none: no GPU where it was built")
    monkeypatch.setenv("NVCC", "no-such-nvcc")
    assert cuda_toolkit.choose(["g++"]) == (None, "none: nvcc not found" if gpus else "none: no GPU where it was built")


def test_missing_nvcc_says_what_to_do_where_it_is_required(cuda_miniature):
    said = build_fails(cuda_miniature, SENET_FUSED_CUDA="1", NVCC="no-such-nvcc")
    for words in ("SENET_FUSED_CUDA=1", "NVCC=no-such-nvcc", "CUDA toolkit, 12.0", "CUDA_HOME", "SENET_FUSED_CUDA=0"):
        assert words in said


def test_old_or_broken_nvcc_is_told_of(cuda_miniature):
    nvcc = write_nvcc(cuda_miniature / "nvcc", release="11.8")
    said = build_fails(cuda_miniature, SENET_FUSED_CUDA="1", NVCC=str(nvcc))
    assert "it needs CUDA 12.0 or later" in said and "is nvcc 11.8.99" in said
    assert build(cuda_miniature, NVCC=str(nvcc)) == EVERYTHING

    write_nvcc(nvcc, failure="host_config.h:143: error: unsupported GNU version")
    said = build_fails(cuda_miniature, SENET_FUSED_CUDA="1", NVCC=str(nvcc))
    assert "doesn't work" in said and "error: unsupported GNU version" in said


def test_wrong_cuda_settings_are_refused(cuda_miniature):
    said = build_fails(cuda_miniature, SENET_FUSED_CUDA="yes")
    assert "SENET_FUSED_CUDA='yes'" in said and "auto" in said
    said = build_fails(cuda_miniature, SENET_FUSED_CUDA="1", SENET_FUSED_SANITIZE="undefined")
    assert "Unset SENET_FUSED_SANITIZE" in said

    (cuda_miniature / "lib").mkdir()
    (cuda_miniature / "lib/libcudart_static.a").touch()
    nvcc = write_nvcc(cuda_miniature / "nvcc", top=cuda_miniature)
    said = build_fails(cuda_miniature, NVCC=str(nvcc), TORCH_CUDA_ARCH_LIST="Volta")
    assert "TORCH_CUDA_ARCH_LIST='Volta'" in said and '"8.0;9.0+PTX"' in said


def test_nvcc_is_looked_for_in_order(cuda_toolkit, monkeypatch, tmp_path):
    def put(place: str) -> str:
        (tmp_path / place / "bin").mkdir(parents=True)
        return str(write_nvcc(tmp_path / place / "bin/nvcc"))

    for name in ("NVCC", "CUDA_HOME", "CUDA_PATH"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(cuda_toolkit.shutil, "which", lambda name: None)
    with pytest.raises(cuda_toolkit.NoCuda, match="/usr/local/cuda"):
        cuda_toolkit.find_nvcc()
    monkeypatch.undo()
    monkeypatch.delenv("NVCC", raising=False)
    monkeypatch.setenv("PATH", f"{tmp_path / 'search/bin'}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("CUDA_PATH", str(tmp_path / "path"))
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "home"))
    for place in ("search", "path", "home"):
        found = put(place)
        assert cuda_toolkit.find_nvcc() == [found], place
    monkeypatch.setenv("NVCC", "env nvcc")
    assert cuda_toolkit.find_nvcc() == ["env", "nvcc"]


@pytest.mark.parametrize("folder", ["lib64", "lib", "targets/x86_64-linux/lib", None])
def test_toolkit_with_its_libraries_anywhere(cuda_toolkit, monkeypatch, tmp_path, folder):
    monkeypatch.setenv("NVCC", str(write_nvcc(tmp_path / "nvcc", top=tmp_path / "bin/..")))
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "9.0")
    (tmp_path / "bin").mkdir()
    if folder is None:
        with pytest.raises(cuda_toolkit.NoCuda, match="libcudart_static.a"):
            cuda_toolkit.find_toolkit(["g++"])
        return
    (tmp_path / folder).mkdir(parents=True)
    (tmp_path / folder / "libcudart_static.a").touch()
    toolkit = cuda_toolkit.find_toolkit(["g++"])
    assert toolkit.fact == "nvcc 12.4.99 for sm_90"
    assert toolkit.flags().link[0] == f"-L{tmp_path / folder}"
    assert "-ccbin" in toolkit.flags().compile
    assert "-ccbin" not in cuda_toolkit.find_toolkit(["ccache", "g++"]).flags().compile


KNOWN = {80, 86, 90, 100, 120}


@pytest.mark.parametrize(
    "listed, targets",
    [
        ("8.0", "sm_80"),
        ("9.0+PTX", "sm_90 compute_90"),
        ("10.0+PTX;8.0;9.0", "sm_80 sm_90 sm_100 compute_100"),
        ("7.5 8.0 9.0+PTX", "sm_80 sm_90 compute_90"),
        (" 8.0, 9.0a ;; 12.0 8.0", "sm_80 sm_90a sm_120"),
    ],
)
def test_architectures_that_are_listed(cuda_toolkit, monkeypatch, listed, targets):
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", listed)
    assert " ".join(cuda_toolkit.choose_targets(KNOWN)) == targets


@pytest.mark.parametrize(
    "listed, problem",
    [
        ("Hopper", "'Hopper' is not a compute capability"),
        ("8.0;sm_90", "'sm_90' is no"),
        ("90", "'90' is no"),
        ("9.0+ptx", "is no"),
        ("7.5;7.0+PTX", "need 8.0, and all of it is below that"),
        ("11.0", "doesn't know 11.0, only 8.0, 8.6, 9.0, 10.0, 12.0"),
    ],
)
def test_architectures_that_cannot_be_followed(cuda_toolkit, monkeypatch, listed, problem):
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", listed)
    with pytest.raises(cuda_toolkit.PlatformError) as refused:
        cuda_toolkit.choose_targets(KNOWN)
    for words in (listed, problem, '"8.0;9.0+PTX"', "SENET_FUSED_CUDA=0"):
        assert words in str(refused.value)


@pytest.mark.parametrize(
    "gpus, known, targets",
    [
        ([], KNOWN, "sm_80 sm_90 sm_100 compute_100"),
        ([], {80, 86, 90}, "sm_80 sm_90 compute_90"),
        ([], {110, 120}, "sm_120 compute_120"),
        (["9.0", "9.0"], KNOWN, "sm_90"),
        (["8.6", "9.0", "7.5"], KNOWN, "sm_86 sm_90"),
        (["8.0", "10.0"], {80, 86, 90}, "sm_80 compute_90"),
        (["8.9"], KNOWN, "compute_86"),
        (["7.0"], KNOWN, None),
    ],
)
def test_architectures_of_the_machine(cuda_toolkit, monkeypatch, tmp_path, gpus, known, targets):
    smi = tmp_path / "nvidia-smi"
    smi.write_text("#!/bin/sh\n" + ("".join(f"echo {gpu}\n" for gpu in gpus) or "echo no driver; exit 9\n"))
    smi.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    if targets is None:
        with pytest.raises(cuda_toolkit.NoCuda, match="8.0 and this machine's best is 7.0"):
            cuda_toolkit.choose_targets(known)
    else:
        assert " ".join(cuda_toolkit.choose_targets(known)) == targets


@pytest.fixture(scope="module")
def checkout(tmp_path_factory):
    """A copy of what a fresh clone has, to build in."""
    if not (ROOT / "setup.py").exists():
        pytest.skip("not a checkout")
    copy = tmp_path_factory.mktemp("checkout") / "senet_fused"
    leave = shutil.ignore_patterns(
        ".git", ".venv*", "build", "dist", "*.egg-info", "*.so", "__pycache__", ".*_cache", ".hypothesis"
    )
    shutil.copytree(ROOT, copy, ignore=leave)
    return copy


def test_source_archive_is_complete(checkout, tmp_path):
    done = run([sys.executable, "setup.py", "-q", "sdist", "-d", tmp_path], checkout)
    assert done.returncode == 0, done.stderr
    (archive,) = tmp_path.glob("*.tar.gz")
    with tarfile.open(archive) as tar:
        inside = {name.partition("/")[2] for name in tar.getnames() if not name.endswith("/")}
    for folder in ("csrc", "senet_fused", "tests", "benchmarks", "buildtools", "docs"):
        there = {str(p.relative_to(checkout)) for p in (checkout / folder).rglob("*") if p.is_file()}
        there = {name for name in there if "__pycache__" not in name}
        assert there <= inside, sorted(there - inside)
    assert {
        "setup.py",
        "pyproject.toml",
        "MANIFEST.in",
        "README.md",
        "CHANGELOG.md",
        "CONTRIBUTING.md",
        "LICENSE",
        "Makefile",
        ".ci/run",
    } <= inside
    assert not [name for name in inside if name.endswith((".so", ".o", ".pyc"))]


@pytest.mark.processes
def test_pure_python_package(checkout, tmp_path):
    """SENET_FUSED_NO_EXT=1 needs no compiler, gives a wheel for any platform, and what is installed works."""
    stale = checkout / "build/lib/senet_fused/deleted.py"
    stale.parent.mkdir(parents=True)
    stale.write_text("")
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check"]
    wheel = [*pip, "wheel", "-q", "--no-build-isolation", "--no-deps", "-w", tmp_path, checkout]
    done = run(wheel, tmp_path, SENET_FUSED_NO_EXT="1", CXX="no-such-compiler")
    assert done.returncode == 0, done.stderr
    (made,) = tmp_path.glob("*.whl")
    assert made.name == f"senet_fused-{senet_fused.__version__}-py3-none-any.whl"
    inside = set(zipfile.ZipFile(made).namelist())
    data = {
        str(p.relative_to(ROOT)) for p in (ROOT / "senet_fused").rglob("*") if p.suffix in (".py", ".json", ".typed")
    }
    assert {name for name in inside if name.startswith("senet_fused/")} == data

    environment = tmp_path / "venv"
    done = run([sys.executable, "-m", "venv", "--without-pip", environment], tmp_path)
    assert done.returncode == 0, done.stderr
    (site_packages,) = environment.glob("lib/python*/site-packages")
    zipfile.ZipFile(made).extractall(site_packages)
    torch_site = Path(sys.modules["torch"].__file__).resolve().parents[1]
    (site_packages / "torch.pth").write_text(f"{torch_site}\n")
    done = run([environment / "bin/python", SMOKE], tmp_path, SENET_FUSED_NO_EXT="1")
    assert done.returncode == 0, done.stderr
