"""Calls each planted fault on a torch tensor in a process of its own; every one has to end that process.

python check_planted.py LIBRARY, under the same preloaded runtime as the tests.
"""

import ctypes
import subprocess
import sys

FAULTS = {
    "write_past_the_end": "heap-buffer-overflow",
    "stream_past_the_end": "heap-buffer-overflow",
    "overflow": "signed integer overflow",
}


def commit(library: str, fault: str) -> None:
    import torch

    data = torch.ones(1003)
    function = getattr(ctypes.CDLL(library), fault)
    function(ctypes.c_void_p(data.data_ptr()), ctypes.c_int64(data.numel()))


def main(library: str) -> None:
    for fault, report in FAULTS.items():
        run = subprocess.run([sys.executable, __file__, library, fault], capture_output=True, text=True)
        if run.returncode == 0 or report not in run.stderr:
            sys.exit(f"the planted fault {fault} went unnoticed (exit {run.returncode}):\n{run.stderr}")
        print(f"planted fault {fault}: found ({report})", flush=True)


if __name__ == "__main__":
    if len(sys.argv) == 3:
        commit(sys.argv[1], sys.argv[2])
    else:
        main(sys.argv[1])
