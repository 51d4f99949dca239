"""The build: incremental, clear about what is missing, and complete in what it ships.

The incremental tests drive the real build command over a miniature project: the kernels take a minute.
"""

from __future__ import annotations

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
import sys
sys.path.insert(0, "buildtools")
import setuptools
from ninja_build import FreshBuildPy, NinjaBuildExt, TorchLibrary, Unit
setuptools.setup(
    name="miniature", version="1.2.3", packages=[],
    ext_modules=[TorchLibrary("senet_fused._tiny", [
        Unit("csrc/one.cpp", ("-DVARIANT=1",), "first"), Unit("csrc/one.cpp", ("-DVARIANT=2",), "second"),
        Unit("csrc/two.cpp"), Unit("csrc/facts.cpp", facts=True),
    ])],
    cmdclass={"build_py": FreshBuildPy, "build_ext": NinjaBuildExt},
)
"""


def run(command, cwd, **environment) -> subprocess.CompletedProcess:
    inherited = {k: v for k, v in os.environ.items() if not k.startswith(("SENET_", "PYTEST_"))}
    return subprocess.run(
        list(map(str, command)), cwd=cwd, env=inherited | environment, capture_output=True, text=True
    )


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
        '" " SENET_BUILD_REVISION " " SENET_BUILD_COMPILER " " SENET_BUILD_ISAS " " SENET_BUILD_TORCH; }\n'
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


def test_extra_flags_and_sanitizers(miniature):
    assert build(miniature) == EVERYTHING
    assert build(miniature, SENET_FUSED_CXXFLAGS="-DEXTRA -DQUOTED='a $b'") == EVERYTHING
    sanitized = build(miniature, "--build-lib", "sanitized", SENET_FUSED_SANITIZE="undefined")
    assert sanitized == EVERYTHING, "objects of its own"
    assert build(miniature, SENET_FUSED_CXXFLAGS="-DEXTRA -DQUOTED='a $b'") == [], (
        "untouched by the other build"
    )


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
    for folder in ("csrc", "senet_fused", "tests", "benchmarks", "buildtools"):
        there = {str(p.relative_to(checkout)) for p in (checkout / folder).rglob("*") if p.is_file()}
        there = {name for name in there if "__pycache__" not in name}
        assert there <= inside, sorted(there - inside)
    assert {
        "setup.py",
        "pyproject.toml",
        "MANIFEST.in",
        "README.md",
        "LICENSE",
        "Makefile",
        ".ci/run",
    } <= inside
    assert not [name for name in inside if name.endswith((".so", ".o", ".pyc"))]


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
        str(p.relative_to(ROOT)) for p in (ROOT / "senet_fused").rglob("*") if p.suffix in (".py", ".json")
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
