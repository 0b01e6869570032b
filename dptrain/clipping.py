"""Clipping functions: from an example's gradient norm to its weight, each with the proof of its bound.

A clipping function maps the norm ``n >= 0`` of one example's gradient in a group, and the group's clipping norm ``C > 0``, to
the weight ``w`` of that example. What every function must satisfy, and what the noise is calibrated to, is ``w * n <= C``.
The formula uses only ``+ - * /`` and ``maximum``, so one definition serves floats, NumPy, torch and TensorFlow.

In floating point the bound holds up to the rounding of the norm and of the sum; ``mechanism.FLOAT_MARGIN`` pays for that. A norm is
the root of a sum of squares, so a finite one is at most the root of the largest float, and its weight no denormal number.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

ClippingName = Literal["abadi", "automatic"]
Maximum = Callable[[Any, float], Any]


def abadi(norm: Any, clip_norm: float, gamma: float, maximum: Maximum) -> Any:
    """Weight ``min(1, C / n)``, written ``C / max(n, C)`` so that ``n = 0`` needs no special case.

    Guarantee: if ``n <= C`` then ``w = 1`` and ``w n = n <= C``; otherwise ``w n = C``.
    Source: math.md section 3; Abadi et al. 2016 (arXiv:1607.00133), Algorithm 1.
    """
    del gamma
    return clip_norm / maximum(norm, clip_norm)


def automatic(norm: Any, clip_norm: float, gamma: float, maximum: Maximum) -> Any:
    """Weight ``C / (n + gamma)``: every gradient is brought to nearly the same norm.

    Guarantee: ``w n = C n / (n + gamma) < C`` for every ``n >= 0``, because ``gamma > 0``; at ``n = 0`` it is finite.
    Source: math.md section 3; Bu et al. 2022 (arXiv:2206.07136), AUTO-S.
    """
    del maximum
    return clip_norm / (norm + gamma)


CLIPPING_FUNCTIONS: dict[str, Callable[[Any, float, float, Maximum], Any]] = {"abadi": abadi, "automatic": automatic}


def clip_weight(name: str, norm: Any, clip_norm: Any, gamma: float, maximum: Maximum = max) -> Any:
    """The weight of examples whose gradient has the given norm.

    Args:
        name: a name in ``CLIPPING_FUNCTIONS``.
        norm: L2 norm of the example's gradient in the group; a float or an array ``[B]``.
        clip_norm: the group's clipping norm C, a number or a scalar of the array type in hand; None means a proven bound, hence
            weight 1; infinity means weight 1 too.
        gamma: stability constant of ``automatic``.
        maximum: elementwise maximum of the array type in hand.
    Returns:
        Weights, of the type of ``norm``.
    """
    if clip_norm is None or (isinstance(clip_norm, float) and clip_norm == float("inf")):
        return norm * 0.0 + 1.0
    return CLIPPING_FUNCTIONS[name](norm, clip_norm, gamma, maximum)
