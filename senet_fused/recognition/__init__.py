"""Recognising other people's SE layers: by family or structure (families), proven by running them (proof)."""

from .families import Unsuited, family_of, has_weights_of_one, looks_like_one, may_be_one, not_covered
from .proof import examine, nothing_around, random_copy
from .recipe import OWN_ATTRIBUTES, Part, Recipe, Weights, is_patched, parts_of, plain_weights, quantising

__all__ = [
    "OWN_ATTRIBUTES", "Part", "Recipe", "Unsuited", "Weights", "examine", "family_of", "has_weights_of_one",
    "is_patched", "looks_like_one", "may_be_one", "not_covered", "nothing_around", "parts_of", "plain_weights",
    "quantising", "random_copy",
]  # fmt: skip
