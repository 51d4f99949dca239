"""The public functions: each checks its call, chooses the backend, and runs that backend's operator."""

from .checks import check_input, check_residual
from .layer import Function, excitation, squeeze_excite
from .serve import explain, route, serve, tail_route
from .tail import block_tail

__all__ = [
    "Function", "block_tail", "check_input", "check_residual", "excitation", "explain", "route", "serve",
    "squeeze_excite", "tail_route",
]  # fmt: skip
