"""Modules that run as one block tail: BatchNorm -> SE -> + residual -> ReLU."""

from .module import FusedSETail, Reading, Tail, fits, has_hooks, norm_problem

__all__ = ["FusedSETail", "Reading", "Tail", "fits", "has_hooks", "norm_problem"]
