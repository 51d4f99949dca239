"""``python -m senet_fused`` is the command ``senet-fused``."""

import sys

from .cli import main

if __name__ == "__main__":
    sys.exit(main())
