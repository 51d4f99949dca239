"""Run by tests with SENET_FUSED_ISA set: python isa_run.py layers | tails | functions

Holds the kernels of that instruction set to the oracle, or to float64, and prints of how many cases.
"""

from __future__ import annotations

import itertools
import os
import sys

import test_cpu_kernels as kernels
import torch
from oracle import DTYPES, SQUEEZES, Case, check

from senet_fused.backends import native


def cases() -> list[Case]:
    shapes = [((4, 41, 5, 7), 17), ((3, 20, 67), 5), ((2, 48, 4, 8), 33), ((3, 64, 35, 31), 16)]
    tails = itertools.product(SQUEEZES, (None, "relu"), (False, True))
    return [
        Case(*shapes[i % 4], dtype, layout, ("relu", "silu")[i // 2 % 2], kernels.GATES[i % 5], *tail)
        for i, (tail, dtype, layout) in enumerate(itertools.product(tails, DTYPES, kernels.DENSE))
    ]


def tails() -> int:
    import tail_oracle
    from test_tail_kernels import isa_cases

    for case in isa_cases():
        tail_oracle.check(case, draws=1)
    return len(isa_cases())


def layers() -> int:
    for case in cases():
        check(case, draws=2)
    for dtype in (torch.bfloat16, torch.float16):
        kernels.test_every_16_bit_value_is_widened_and_rounded_exactly(dtype)
    kernels.test_nan_with_any_payload_stays_nan()
    for low in (-85.0, -20.0, -3.0):
        kernels.test_small_sigmoids_have_all_their_digits(low)
    return len(cases())


def functions() -> int:
    from test_functions import BOUNDS, check_accuracy

    for name in BOUNDS:
        check_accuracy(name)
    return len(BOUNDS)


if __name__ == "__main__":
    native.instruction_set()
    assert native.instruction_set() == os.environ["SENET_FUSED_ISA"]
    torch.use_deterministic_algorithms(True)  # fresh memory is NaN
    print({"layers": layers, "tails": tails, "functions": functions}[sys.argv[1]]())
