"""Per-example losses by name, with what is known of them without a framework.

A loss maps the model's output and the targets to a vector ``[B]``, one value per example; never a batch mean, whose scale would
depend on the batch (pitfalls.md G7).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

LossName = Literal["cross_entropy", "binary_cross_entropy", "mean_squared_error", "mean_absolute_error"]


@dataclass(frozen=True)
class LossInfo:
    """Facts of a loss.

    Args:
        name: the name used in configs.
        targets: ``classes`` (integers ``[B]``) or ``values`` (floats of the output's shape, or ``[B]`` for one output).
        lipschitz: Lipschitz constant in the model's output (L2), None where there is none.
    """

    name: str
    targets: Literal["classes", "values"]
    lipschitz: float | None


LOSSES: dict[str, LossInfo] = {
    # The gradient softmax(z) - onehot(y) has norm at most sqrt(2), attained in the limit.
    "cross_entropy": LossInfo("cross_entropy", "classes", math.sqrt(2.0)),
    # One logit per example; the gradient sigmoid(z) - y lies in [-1, 1].
    "binary_cross_entropy": LossInfo("binary_cross_entropy", "classes", 1.0),
    # Mean over an example's outputs of the squared error: unbounded gradient.
    "mean_squared_error": LossInfo("mean_squared_error", "values", None),
    # Mean over an example's m outputs of the absolute error: gradient 1/sqrt(m) at most, so 1 for any m.
    "mean_absolute_error": LossInfo("mean_absolute_error", "values", 1.0),
}
