"""An installed package at work: the compiled CPU backend, forward and backward, against plain PyTorch.

Run with an environment's Python from a folder where the checkout can't be imported. With SENET_FUSED_NO_EXT=1
it expects the pure Python package, which runs on the reference.
"""

import os
import sys
import sysconfig
from pathlib import Path

import torch

import senet_fused

PURE = os.environ.get("SENET_FUSED_NO_EXT", "0") not in ("", "0")


def plain(x: torch.Tensor, w1: torch.Tensor, w2: torch.Tensor) -> torch.Tensor:
    pooled = x.mean((2, 3))
    gate = torch.sigmoid(torch.relu(pooled @ w1.T) @ w2.T)
    return x * gate[:, :, None, None]


def main() -> None:
    home = Path(senet_fused.__file__).resolve().parent
    assert home.parent == Path(sysconfig.get_path("platlib")).resolve(), f"not the installed package: {home}"
    assert (home / "_cpu.so").exists() != PURE, "the compiled library: missing, or unexpected"

    generator = torch.Generator().manual_seed(0)
    shapes = [(3, 24, 7, 9), (24, 24), (24, 24)]
    for memory_format in (torch.contiguous_format, torch.channels_last):
        x, w1, w2 = (torch.randn(shape, generator=generator) for shape in shapes)
        x = x.contiguous(memory_format=memory_format)
        inputs = [t.requires_grad_() for t in (x, w1, w2)]
        dy = torch.randn(x.shape, generator=generator)
        senet_fused.reset_call_counts()
        ours = senet_fused.squeeze_excite(x, w1, w2, backend="reference" if PURE else "cpu")
        counted = [ours, *torch.autograd.grad(ours, inputs, dy)]
        expected = plain(x, w1, w2)
        torch.testing.assert_close(counted, [expected, *torch.autograd.grad(expected, inputs, dy)])
        if not PURE:
            assert senet_fused.call_counts() == {"cpu.forward": 1, "cpu.backward": 1}, senet_fused.call_counts()
    layer = senet_fused.FusedSE(32)
    layer(torch.randn(2, 32, 5, 5)).square().mean().backward()
    print(f"senet_fused {senet_fused.__version__} in {home}: works with torch {torch.__version__}")


if __name__ == "__main__":
    sys.exit(main())
