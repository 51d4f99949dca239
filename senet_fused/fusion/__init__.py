"""Other people's models: their SE layers found, proven and run fused, in place or with their BatchNorms folded."""

from . import earlier
from .convert import fuse, fuse_report, unfuse
from .fold import fold_batchnorm
from .report import BlockReport, FuseReport, LayerReport
from .tails import FusedSETail

__all__ = [
    "BlockReport", "FuseReport", "FusedSETail", "LayerReport", "earlier", "fold_batchnorm", "fuse", "fuse_report",
    "unfuse",
]  # fmt: skip
