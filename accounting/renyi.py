"""Renyi divergence of the Poisson-sampled Gaussian at any order above 1, by quadrature with a proven error.

With P, Q the dominating pair and rho = P/Q, the moment is A(alpha) = E_Q[rho^alpha]. Since E_Q[rho] = 1,

    A(alpha) - 1 = E_Q[ rho^alpha - 1 - alpha (rho - 1) ],

whose integrand is non-negative, so a sum of it keeps full relative precision even where A - 1 is 1e-20 (tiny sample
rates), and fractional orders need no alternating series. The integrand is entire up to the zeros of P and Q, so the
trapezoidal rule converges geometrically: if |f| integrates to at most M along the strip |Im z| < a, its error is at
most 2 M / (exp(2 pi a / step) - 1) (Trefethen and Weideman 2014, theorem 5.1). Everything dropped is added back.
"""

from __future__ import annotations

import math
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]

# exp(-_DIGITS) is the relative size of every neglected quantity: 4e-31.
_DIGITS = 70.0
# Covers the rounding of the sum itself: about 1e-13 was the largest seen against 50-digit arithmetic.
_ROUNDING = 1e-10
_MAX_REACH = 1 << 17


def _log_ratio(w: Array, q: float) -> Array:
    """Returns log(1 - q + q e^w), accurate also where it is tiny and where e^w overflows."""
    y = q * np.expm1(np.minimum(w, 30.0))
    small = np.log1p(y)
    if q > 0.5:  # y near -1 has lost the digits of what is left of 1
        small = np.where(y > -0.5, small, np.log((1 - q) + q * np.exp(np.minimum(w, 0.0))))
    large = np.logaddexp(math.log1p(-q), math.log(q) + w)
    return np.where(w < 30.0, small, large)


def _log_excess(loss: Array, order: float | Array) -> Array:
    """Returns log(e^(order l) - 1 - order (e^l - 1)) without cancellation; the argument is never negative."""
    t = order * loss
    u = np.expm1(np.minimum(loss, 700.0))
    x = order * u
    # Around 0 the first terms cancel: Taylor in u, relative error below 1e-12 for |order u| < 1e-3.
    b, c, d = (order - 2) / 3, (order - 3) / 4, (order - 4) / 5
    series = np.log1p(b * u * (1 + c * u * (1 + d * u))) + np.log(order * (order - 1) / 2)
    series = series + 2 * np.log(np.abs(u) + 1e-300)
    middle = np.log(np.maximum(np.expm1(np.minimum(t, 30.0)) - x, 1e-300))
    lost = np.exp(-t) + order * (np.exp(loss - t) - np.exp(-t))
    large = t + np.log1p(-np.minimum(lost, 0.5))
    out: Array = np.where(np.abs(x) < 1e-3, series, np.where(t < 30.0, middle, large))
    return out


def _unsampled(sigma: float, q: float, orders: float | Array) -> Array:
    """Returns the moment where each output tells who was sampled, which can only cost privacy: moments are jointly convex."""
    out: Array = np.logaddexp(math.log1p(-q), math.log(q) + orders * (orders - 1) / (2 * sigma**2))
    return out


@lru_cache(maxsize=1 << 16)
def log_moment(sigma: float, q: float, order: float, replace_one: bool) -> float:
    """Returns an upper bound on (order - 1) times the Renyi divergence of one release.

    Args:
      sigma: noise standard deviation / L2 sensitivity.
      q: Poisson sample rate in (0, 1].
      order: Renyi order, above 1.
      replace_one: False for N(0) against the mixture with N(1) (both directions), True for the two mixtures with
        N(+1/2) and N(-1/2).

    Guarantee: not below log E_Q[(P/Q)^order] for the worse direction; relative excess about 1e-10.
    Source: Mironov, Talwar, Zhang 2019 (arXiv:1908.10530), section 3 and theorem 5 (one direction dominates).
    """
    if q == 1.0:
        return order * (order - 1) / (2 * sigma**2)
    mu = (0.5 if replace_one else 1.0) / sigma
    slack = _DIGITS
    if replace_one:
        # |Q| on the strip is at least cos(theta / 2) of its value on the line, theta = a mu <= pi / 4.
        # High orders take a narrower strip, or that factor would swallow the gain.
        half_width = min(3.0, math.pi / (4 * mu), math.sqrt(80 / order) / mu)
        slack += -(order - 1) * math.log(math.cos(half_width * mu / 2))
        tail = _DIGITS + order * (math.log(2) - math.log1p(-q))
    else:
        half_width = min(3.0, 0.95 * math.pi / mu)
        tail = _DIGITS + order * math.log(2)
    step = 2 * math.pi * half_width / (slack + half_width**2 / 2)
    # (a + b)^order <= 2^(order-1) (a^order + b^order): outside two windows both Gaussians are negligible.
    reach = math.ceil(math.sqrt(2 * tail) / step)
    if reach > _MAX_REACH:
        return float(_unsampled(sigma, q, order)) * (1 + _ROUNDING)
    centre = round(order * mu / step)
    near = np.arange(-reach, reach + 1)
    far = np.arange(max(centre - reach, reach + 1), centre + reach + 1)
    z = np.concatenate([near, far]) * step
    with np.errstate(all="ignore"):  # branches not taken overflow; the result is checked below
        up = _log_ratio(z * mu - mu * mu / 2, q)
        down = _log_ratio(-z * mu - mu * mu / 2, q) if replace_one else np.zeros_like(z)
        logs = _log_excess(up - down, order) + down - z * z / 2
        top = float(np.max(logs))
        log_excess = top + math.log(float(np.sum(np.exp(logs - top))) * step / math.sqrt(2 * math.pi))
        moment = float(np.logaddexp(0.0, log_excess))
        neglected = moment + math.log(8 + 4 * order) - _DIGITS
        bound = float(np.logaddexp(0.0, np.logaddexp(log_excess, neglected)))
    return (bound if math.isfinite(bound) else float(_unsampled(sigma, q, order))) * (1 + _ROUNDING)


def swapped_log_moment(sampled: Array) -> Array:
    """Returns an upper bound on the log-moment of a *swapped* pair (see `mixtures`) from that of the sampled one, both directions.

    E_Q[rho^a] - 1 = a (a - 1) times the integral over s of s^(a-2) (H_s - (1 - s)_+), H_s the hockey-stick divergence (Liese and Vajda
    2006, theorem 11). The integrand is not negative; above s = 1 it is that of one direction, below that of the other. So A - 1
    is at most the sum of both (A - 1), and the smaller of the two is replaced by the larger.
    """
    out: Array = np.where(sampled < 1.0, np.log1p(2 * np.expm1(np.minimum(sampled, 1.0))), sampled + np.log(2 - np.exp(-sampled)))
    return out * (1 + _ROUNDING)


def mixed_log_moment(log_weights: Array, moments: Array) -> Array:
    """Returns the log-moment of a mixture whose indicator is revealed: the moments mix linearly.

    Args:
      log_weights: of the components, rounded up; together at least 1.
      moments: log-moments, a row per component.
    """
    weights = np.exp(log_weights)[:, None]
    with np.errstate(over="ignore"):
        small = np.log1p((weights * np.expm1(np.minimum(moments, 1.0))).sum(axis=0))
    large = np.logaddexp.reduce(log_weights[:, None] + moments, axis=0)
    out: Array = np.where(moments.max(axis=0) < 1.0, small, large)
    return np.maximum(out, 0.0) * (1 + _ROUNDING)


# Nodes of the rough rule: no peak of the integrand is narrower than a standard deviation.
_WINDOW = np.linspace(-9.0, 9.0, 55)


def rough_log_moments(sigma: float, q: float, orders: Array, replace_one: bool) -> Array:
    """Returns about what `log_moment` returns, for many orders at once and without any proof: it steers a search.

    Args:
      sigma: noise standard deviation / L2 sensitivity.
      q: Poisson sample rate in (0, 1].
      orders: Renyi orders, above 1.
      replace_one: as in `log_moment`.
    """
    if q == 1.0:
        return orders * (orders - 1) / (2 * sigma**2)
    mu = (0.5 if replace_one else 1.0) / sigma
    order = orders[:, None]
    odds = (1 - q) / q

    def pull(z: Array) -> Array:
        """Slope of the log of the integrand without its Gaussian: a peak lies where it equals z."""
        out = order * mu / (1 + odds * np.exp(mu * mu / 2 - mu * z))
        return out + (order - 1) * mu / (1 + odds * np.exp(mu * mu / 2 + mu * z)) if replace_one else out

    with np.errstate(all="ignore"):
        low, high = np.zeros_like(order), order * mu
        for _ in range(12):
            low, high = pull(low), pull(high)
        near, far = low + _WINDOW, high + _WINDOW
        z = np.concatenate([near, far], axis=1)
        up = _log_ratio(z * mu - mu * mu / 2, q)
        down = _log_ratio(-z * mu - mu * mu / 2, q) if replace_one else np.zeros_like(z)
        logs = np.nan_to_num(_log_excess(up - down, order) + down - z * z / 2, nan=-np.inf, posinf=np.inf)
        logs[:, len(_WINDOW) :][far <= near[:, -1:]] = -np.inf  # counted already
        total = np.logaddexp.reduce(logs, axis=1) + math.log((_WINDOW[1] - _WINDOW[0]) / math.sqrt(2 * math.pi))
        out: Array = np.minimum(np.logaddexp(0.0, total), _unsampled(sigma, q, orders))
    return out
