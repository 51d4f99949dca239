"""Recognising other people's SE layers: by family or structure (families), proven by running them (proof)."""

from .families import Unsuited, family_of, has_weights_of_one, looks_like_one, may_be_one, not_covered
from .proof import examine, nothing_around, random_copy
from .recipe import OWN_ATTRIBUTES, Recipe, parts_of

__all__ = [
    "OWN_ATTRIBUTES", "Recipe", "Unsuited", "examine", "family_of", "has_weights_of_one", "looks_like_one",
    "may_be_one", "not_covered", "nothing_around", "parts_of", "random_copy",
]  # fmt: skip
