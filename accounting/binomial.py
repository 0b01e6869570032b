"""Tails of the binomial distribution, rounded to the safe side."""

from __future__ import annotations

import math

# Relative error of `math.lgamma` and of the products and logarithms beside it, with a wide margin.
_ROUNDING = 1e-14
_BLOCK = 4096
_SMALL = 1e-20
# Covers the rounding of a product of millions of ratios.
_SLACK = 1e-9


def log_tail(trials: int, rate: float, least: int, *, upper: bool = True) -> float:
    """Returns a bound on log P(X >= least) for X binomial.

    Args:
      trials: number of independent draws.
      rate: probability of each, in (0, 1].
      least: where the tail begins.
      upper: bound from above or from below.

    Guarantee: on the side asked for; off by at most about 1e-9 + 1e-13 * trials * log(trials).
    """
    if least <= 0 or (rate == 1.0 and least <= trials):
        return 0.0
    if least > trials:
        return -math.inf
    if least > trials * rate:
        return _log_far_tail(trials, rate / (1 - rate), least, _log_mass(trials, rate, least), upper)
    # The tail is most of the mass: one minus what lies below, which is a far tail of the complement.
    below = _log_far_tail(trials, (1 - rate) / rate, trials - least + 1, _log_mass(trials, rate, least - 1), not upper)
    return min(0.0, math.log1p(-math.exp(min(below, -1e-15))) + (1e-15 if upper else -1e-15))


def _log_far_tail(trials: int, odds: float, value: int, first: tuple[float, float], upper: bool) -> float:
    """Returns a bound on log P(X >= value) beyond the mean, from log P(X = value) and its error."""
    log_mass, error = first
    return min(0.0, log_mass + (error if upper else -error) + math.log(_series(trials, value, odds, upper=upper)))


def _log_mass(trials: int, rate: float, value: int) -> tuple[float, float]:
    """Returns log P(X = value) and a bound on its rounding error."""
    terms = (
        math.lgamma(trials + 1),
        -math.lgamma(value + 1),
        -math.lgamma(trials - value + 1),
        value * math.log(rate),
        (trials - value) * math.log1p(-rate),
    )
    return math.fsum(terms), _ROUNDING * math.fsum(map(abs, terms)) + 1e-13


def _series(trials: int, value: int, odds: float, *, upper: bool) -> float:
    """Returns P(X >= value) / P(X = value), rounded up or down: the terms fall by the ratio of neighbouring masses."""
    import numpy as np

    total, term, at = 1.0, 1.0, value
    while at < trials and term > _SMALL * total:
        j = np.arange(at, min(at + _BLOCK, trials), dtype=np.float64)
        products = term * np.cumprod((trials - j) / (j + 1) * odds)
        total, term, at = total + float(products.sum()), float(products[-1]), at + len(j)
    if upper and at < trials:
        ratio = (trials - at) / (at + 1) * odds  # below 1 beyond the mean, and falling
        total += term * ratio / (1 - ratio)
    return total * (1 + _SLACK if upper else 1 - _SLACK)
