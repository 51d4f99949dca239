"""Block tails: BatchNorm -> SE -> + residual -> ReLU as one operator, and modules that run as one."""

from .functional import block_tail
from .module import FusedSETail, Reading, Tail, fits, has_hooks, norm_problem
from .ops import OPERATORS

__all__ = ["OPERATORS", "FusedSETail", "Reading", "Tail", "block_tail", "fits", "has_hooks", "norm_problem"]
