"""Networks of senet_fused.models as `senet-fused bench model` takes them, FILE.py:FACTORY.

Each as stock PyTorch has it, with block tails, and without SE layers: three networks, as fuse finds no foreign blocks
in them.
"""

import functools

from senet_fused.models import create_model

WAYS = {"stock": "reference", "tails": "tails", "no_se": None}
for _name in ("se_resnet20", "se_resnet50", "senet154"):
    for _way, _se in WAYS.items():
        globals()[f"{_name}_{_way}"] = functools.partial(create_model, _name, se=_se)
