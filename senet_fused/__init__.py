"""senet_fused: Squeeze-and-Excitation layers, fused, for PyTorch."""

from . import reference
from ._version import __version__
from .activations import Activation
from .functional import explain, squeeze_excite
from .modules import FusedSE, capture_gates
from .ops import call_counts, reset_call_counts
from .select import BackendUnavailableError, Choice, use_backend

__all__ = [
    "Activation",
    "BackendUnavailableError",
    "Choice",
    "FusedSE",
    "__version__",
    "call_counts",
    "capture_gates",
    "explain",
    "reference",
    "reset_call_counts",
    "squeeze_excite",
    "use_backend",
]
