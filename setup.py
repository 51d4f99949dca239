"""Builds senet_fused. Metadata is in pyproject.toml; here is what gets compiled, and buildtools/ knows how.

    pip install .                           or -e . for development
    python setup.py build_ext --inplace     compile into the checkout; again after an edit, it is incremental

buildtools/switches.py lists the environment variables that steer a build.
"""

import platform
import sys
from pathlib import Path

import setuptools

if int(setuptools.__version__.split(".")[0]) < 77:
    sys.exit(f"setuptools 77 or later is needed, this is {setuptools.__version__}: pip install -U setuptools")
sys.path.insert(0, str(Path(__file__).resolve().parent / "buildtools"))

from ninja_build import CudaLibrary, FreshBuildPy, NinjaBuildExt, PythonModule, TorchLibrary, Unit  # noqa: E402
from switches import no_extensions  # noqa: E402

# The kernels are compiled once for each instruction set and the library picks one at run time:
# one wheel serves every CPU of an architecture.
ISA_FLAGS = {"baseline": ()}
DISPATCH = ()
if platform.machine() in ("x86_64", "AMD64"):
    ISA_FLAGS["avx2"] = ("-mavx2", "-mfma", "-mf16c")
    ISA_FLAGS["avx512"] = (
        *("-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mfma", "-mf16c"),
        "-mprefer-vector-width=512",
    )
    ISA_FLAGS["avx512_bf16"] = (*ISA_FLAGS["avx512"], "-mavx512bf16")
    DISPATCH = ("-DSENET_X86_DISPATCH=1",)

CUDA_KERNELS = (
    *("squeeze", "squeeze_backward", "scale", "scale_backward", "excite"),
    *("tail_moments", "tail_excite", "tail_apply", "tail_sums", "tail_apply_backward"),
)

# One entry for each shared object. A library for another kind of device is another entry; the one for CUDA is left
# out where there is no nvcc.
LIBRARIES = [
    TorchLibrary(
        "senet_fused._cpu",
        [
            # The longest first: a compiler without company at the end costs time.
            *(Unit("csrc/cpu/kernels.cpp", (f"-DSENET_ISA={isa}", *f), isa) for isa, f in ISA_FLAGS.items()),
            Unit("csrc/library.cpp", DISPATCH),
            Unit("csrc/cpu/host.cpp", DISPATCH),
            Unit("csrc/cpu/fused_se.cpp"),
            Unit("csrc/plan/plan.cpp"),
        ],
    ),
    CudaLibrary(
        "senet_fused._cuda",
        [
            Unit("csrc/cuda/library.cpp", facts=True),
            Unit("csrc/cuda/squeeze_excite.cpp"),
            Unit("csrc/cuda/tail.cpp"),
            Unit("csrc/plan/cuda_plan.cpp"),
            *(Unit(f"csrc/cuda/{kernels}.cu") for kernels in CUDA_KERNELS),
        ],
    ),
    PythonModule(
        "senet_fused._plan",
        [Unit("csrc/plan/module.cpp", facts=True), Unit("csrc/plan/plan.cpp"), Unit("csrc/plan/cuda_plan.cpp")],
    ),
]

setuptools.setup(
    ext_modules=[] if no_extensions() else LIBRARIES,
    cmdclass={"build_py": FreshBuildPy, "build_ext": NinjaBuildExt},
)
