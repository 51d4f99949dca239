"""Recognising other people's SE layers: by family or structure (families), proven by running them (proof)."""

from .effects import Effect, Watch
from .families import family_of, has_weights_of_one, looks_like_one, may_be_one, not_covered
from .proof import beyond, examine, numbers_of
from .recipe import OWN_ATTRIBUTES, Part, Recipe, Weights, is_patched, parts_of, plain_weights, quantising
from .trial import Unsuited, nothing_around, random_copy, structure_of, unsuited

__all__ = [
    "OWN_ATTRIBUTES", "Effect", "Part", "Recipe", "Unsuited", "Watch", "Weights", "beyond", "examine", "family_of",
    "has_weights_of_one", "is_patched", "looks_like_one", "may_be_one", "not_covered", "nothing_around", "numbers_of",
    "parts_of", "plain_weights", "quantising", "random_copy", "structure_of", "unsuited",
]  # fmt: skip
