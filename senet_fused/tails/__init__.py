"""Block tails: BatchNorm -> SE -> + residual -> ReLU as one operator, and modules that run as one."""

from .functional import block_tail
from .functional import choose as tail_choice
from .module import FusedSETail, Tail, has_hooks, norm_problem, se_recipe
from .ops import OPERATORS

__all__ = ["OPERATORS", "FusedSETail", "Tail", "block_tail", "has_hooks", "norm_problem", "se_recipe", "tail_choice"]
