"""Checks that the layers of this package share."""

from __future__ import annotations

import math
from typing import TypeVar

from torch import Tensor

Number = TypeVar("Number", int, float)


def positive(name: str, value: Number) -> Number:
    """The value, if it is positive and finite.

    Raises:
        ValueError: it is not.
    """
    if not (value > 0 and math.isfinite(value)):
        raise ValueError(f"{name} must be positive and finite, not {value!r}")
    return value


def example_axis(dim: int, x: Tensor) -> int:
    """A dimension of ``x`` counted from the front, if it lies inside one example.

    Raises:
        ValueError: it is the batch axis, along which examples would be mixed.
    """
    axis = dim + x.dim() if dim < 0 else dim
    if not 0 < axis < x.dim():
        raise ValueError(f"dim {dim} of an array of shape {tuple(x.shape)} is not an axis within one example; axis 0 holds the examples")
    return axis
