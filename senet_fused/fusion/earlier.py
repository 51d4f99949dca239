"""The names that classes had in 0.1.0, in whole models that torch.save or pickle has saved: they find today's."""

from __future__ import annotations

import sys
import types
from typing import Any

from ..parts import Part
from .fold import Folding, ShortcutSE, _restore, _Tracer
from .recipe import Recipe
from .tails import FusedSETail

__all__ = ["NAMES"]


class _Reading:
    """How a tail read its SE layer: a recipe, with the layer's class and that class's forward, which are in it."""

    def __new__(cls, recipe: Recipe, *_: Any) -> Recipe:
        return recipe


NAMES = {
    "recognition.recipe": {"Part": Part, "Recipe": Recipe},
    "tails.module": {"FusedSETail": FusedSETail, "Reading": _Reading},
    "folding": {"Folding": Folding, "_restore": _restore},
    "folding.trace": {"_Tracer": _Tracer},
    "folding.shortcuts": {"ShortcutSE": ShortcutSE},
}
for _module, _names in NAMES.items():
    _name = f"{__name__.partition('.')[0]}.{_module}"
    sys.modules[_name] = types.ModuleType(_name, __doc__)
    vars(sys.modules[_name]).update(_names)
