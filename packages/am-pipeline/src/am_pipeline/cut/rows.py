"""Whether a model computes anything over the sequences of a batch, of which a microbatch has only some.

Sums, means, norms, softmaxes, products of matrices, shifts and sorts are recorded with how many numbers they go over,
in a run of three sequences of eight tokens and in one of five of sixteen: over features as many, over tokens twice as
many, over the batch five for each three.
"""

from __future__ import annotations

import math
from fractions import Fraction
from typing import Any, NamedTuple

from am_pipeline.nested import tensors_in

# Over the dims that the argument `dim` names; over all where there is none.
_ALONG = {
    "sum", "mean", "prod", "var", "std", "var_mean", "std_mean", "amax", "amin", "max", "min", "median", "norm",
    "linalg_vector_norm", "logsumexp", "_softmax", "_log_softmax", "cumsum", "cumprod", "logcumsumexp", "sort", "topk",
}  # fmt: skip
_ALONG_DIMS = {"roll", "flip"}
_PRODUCTS = {"mm": 0, "bmm": 0, "addmm": 1, "baddbmm": 1, "mv": 0, "dot": 0}  # the place of the first factor
_KINDS = {*_ALONG, *_ALONG_DIMS, *_PRODUCTS, "native_layer_norm"}


class Over(NamedTuple):
    """An operator of a unit, and over how many numbers it computes each of its results."""

    operator: str
    module: str
    count: int


def may_mix(operator: str) -> bool:
    """Whether an operator, `sum` of `aten.sum.dim_IntList`, is of a kind that could go over sequences."""
    return operator in _KINDS


def count_over(operator: str, given: dict[str, Any]) -> int | None:
    """Over how many numbers an operator computes each result; None of integers.

    Places and counts, as routing to experts has them, are of the rows they pick.

    Args:
        operator: one that may mix.
        given: its arguments by name.
    """
    tensors = list(tensors_in(given))
    if not tensors or not tensors[0].is_floating_point():
        return None
    if operator in _PRODUCTS:
        return tensors[_PRODUCTS[operator]].shape[-1]
    if operator == "native_layer_norm":
        return math.prod(given["normalized_shape"])
    dims = given.get("dims" if operator in _ALONG_DIMS else "dim", -1 if operator in ("sort", "topk") else None)
    shape = tensors[0].shape
    if dims is None or dims == []:
        return math.prod(shape)
    return math.prod(shape[dim] for dim in (dims if isinstance(dims, (list, tuple)) else [dims])) if shape else 1


def first_mix(small: list[Over], large: list[Over], sizes: tuple[tuple[int, ...], ...]) -> Over | None:
    """The first operator that goes over sequences, from a run of few and one of more; None if none does."""
    rows = Fraction(sizes[1][0], sizes[0][0])
    growth = {rows, *(rows * Fraction(more, few) for few, more in zip(sizes[0][1:], sizes[1][1:], strict=True) if few)}
    if [(o.operator, o.module) for o in small] != [(o.operator, o.module) for o in large]:
        return None
    pairs = zip(small, large, strict=True)
    return next((one for one, other in pairs if one.count and Fraction(other.count, one.count) in growth), None)
