"""The operators of the family: how they are defined, what they allocate, and how often they have run."""

from . import earlier  # noqa: F401  registers names
from .counts import call_counts, count_call, reset_call_counts, uncounted
from .define import OPERATORS, Operator, infer_at_once
from .layout import empty_mask, layout_of, unpack_mask

__all__ = [
    "OPERATORS", "Operator", "call_counts", "count_call", "empty_mask", "infer_at_once", "layout_of",
    "reset_call_counts", "uncounted", "unpack_mask",
]  # fmt: skip
