"""A clipping norm that follows a quantile of the gradient norms, privately.

The number of examples below the clipping norm is released with noise, as one more group of the step's joint Gaussian release, so that
no second event exists (math.md section 4; Andrew et al. 2021, arXiv:1905.03871). Under add/remove each example adds ``+1/2`` or
``-1/2``, so the count's sensitivity is 1/2; replacing an example moves it by at most 1, twice that, as for gradients.

What is done with the released count is post-processing: the clipping norm moves geometrically towards the quantile.
"""

from __future__ import annotations

import math
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

from dptrain.plan import Group

Positive = Annotated[float, Field(gt=0, allow_inf_nan=False, strict=True)]
Open = Annotated[float, Field(gt=0, lt=1, allow_inf_nan=False, strict=True)]
COUNT = "clip_count"
LIMIT = 1e4  # the clipping norm stays within this factor of its start, so that no noise can drive it to zero or infinity


class AdaptiveClip(BaseModel):
    """A moving clipping norm.

    Args:
        initial: its first value.
        quantile: fraction of examples that should lie below it.
        learning_rate: step size of its logarithm.
        share: part of the joint budget ``1 / sigma^2`` spent on the count; gradients get ``1 / sqrt(1 - share)`` times their noise.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")
    initial: Positive
    quantile: Open = 0.5
    learning_rate: Positive = 0.2
    share: Open = 0.02

    def group(self) -> Group:
        """The count as a group of the release.

        Guarantee: its sensitivity is 1/2 under add/remove.
        Source: Andrew et al. 2021, section 2.1.
        """
        return Group(COUNT, (), 0.5, None, 1, self.share)

    def moved(self, scale: float, count: float, expected_batch_size: float, most: float = math.inf) -> float:
        """The next factor of the clipping norm.

        Args:
            scale: the current factor, relative to ``initial``.
            count: released sum of ``+1/2`` for examples below and ``-1/2`` for those above, with noise.
            expected_batch_size: q N, a constant.
            most: largest useful factor.
        Returns:
            The new factor.
        """
        fraction = min(1.0, max(0.0, count / expected_batch_size + 0.5))
        return min(most, LIMIT, max(1.0 / LIMIT, scale * math.exp(-self.learning_rate * (fraction - self.quantile))))


def initial_clip(clip: float | AdaptiveClip) -> float:
    """The clipping norm of the first step."""
    return clip.initial if isinstance(clip, AdaptiveClip) else clip
