"""senet_fused: Squeeze-and-Excitation layers, fused, for PyTorch."""

from . import reference
from ._version import __version__
from .activations import Activation
from .functional import block_tail, excitation, explain, squeeze_excite
from .fusion import FusedSETail, FuseReport, fold_batchnorm, fuse, fuse_report, unfuse
from .modules import FusedSE, capture_gates
from .ops import call_counts, reset_call_counts
from .select import BackendUnavailableError, Choice, use_backend

__all__ = [
    "Activation",
    "BackendUnavailableError",
    "Choice",
    "FuseReport",
    "FusedSE",
    "FusedSETail",
    "__version__",
    "block_tail",
    "call_counts",
    "capture_gates",
    "excitation",
    "explain",
    "fold_batchnorm",
    "fuse",
    "fuse_report",
    "reference",
    "reset_call_counts",
    "squeeze_excite",
    "unfuse",
    "use_backend",
]
