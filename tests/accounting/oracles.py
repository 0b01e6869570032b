"""Independent ways to the same numbers: none of them shares code with the package."""

from __future__ import annotations

import math
from itertools import pairwise

import numpy as np
from scipy import integrate, stats

# (events as (sigma, q, count), delta, true epsilon from two methods, rounded down): add/remove, Poisson.
REFERENCE = [
    ([(0.7, 1e-4, 10_000)], 1e-5, 0.09957),
    ([(0.4, 1e-3, 100)], 1e-5, 4.9607),
    ([(1.0, 0.01, 10_000)], 1e-5, 6.18770),
    ([(4.0, 0.1, 10_000)], 1e-5, 13.49834),
    ([(4.0, 1.0, 100)], 1e-5, 13.2067122),
    ([(1.0, 0.01, 100), (1.5, 0.01, 200), (2.0, 0.01, 300)], 1e-5, 0.854396),
]


def densities(sigma: float, q: float, relation: str):
    """The two densities of one release as functions of the output (sensitivity 1)."""
    norm = stats.norm(scale=sigma)
    if relation == "replace_one":
        return (
            lambda x: (1 - q) * norm.pdf(x) + q * norm.pdf(x - 0.5),
            lambda x: (1 - q) * norm.pdf(x) + q * norm.pdf(x + 0.5),
        )
    return (lambda x: (1 - q) * norm.pdf(x) + q * norm.pdf(x - 1)), norm.pdf


def one_step_delta(sigma: float, q: float, relation: str, epsilon: float) -> float:
    """Hockey-stick divergence of one release by adaptive quadrature, the worse direction."""
    p, r = densities(sigma, q, relation)
    low, high = -12 * sigma - 1, 12 * sigma + 1

    def one(a, b):
        grid = np.linspace(low, high, 200_001)
        sign = a(grid) - math.exp(epsilon) * b(grid) > 0
        cuts = [low, *grid[1:][sign[1:] != sign[:-1]], high]
        f = lambda x: max(0.0, a(x) - math.exp(epsilon) * b(x))  # noqa: E731
        points = sorted({*cuts, 0.0, 0.5, 1.0, -0.5})
        pieces = (integrate.quad(f, x, y, epsabs=1e-15, epsrel=1e-10, limit=200)[0] for x, y in pairwise(points))
        return sum(pieces)

    return max(one(p, r), one(r, p))


def two_step_delta(sigma: float, q: float, relation: str, epsilon: float) -> float:
    """Hockey-stick divergence of two releases on a fine two-dimensional grid (midpoint rule), the worse direction."""
    p, r = densities(sigma, q, relation)
    x = np.linspace(-8 * sigma - 1, 8 * sigma + 1, 6001)
    step = x[1] - x[0]

    def one(a, b):
        fa, fb = a(x), b(x)
        return float(np.maximum(np.outer(fa, fa) - math.exp(epsilon) * np.outer(fb, fb), 0).sum() * step * step)

    return max(one(p, r), one(r, p))


def renyi_log_moment(sigma: float, q: float, order: float, relation: str) -> float:
    """log E_Q[(P/Q)^order] by adaptive quadrature."""
    shift = 0.5 if relation == "replace_one" else 1.0
    norm = stats.norm(scale=sigma)

    def log_mixture(x, centre):
        return np.logaddexp(np.log1p(-q) + norm.logpdf(x), np.log(q) + norm.logpdf(x - centre))

    def f(x):
        low = log_mixture(x, -shift) if relation == "replace_one" else norm.logpdf(x)
        return math.exp(order * log_mixture(x, shift) + (1 - order) * low)

    points = [k * sigma for k in range(-14, math.ceil(2 * order * shift / sigma) + 15)]
    return math.log(sum(integrate.quad(f, a, b, epsrel=1e-11)[0] for a, b in pairwise(points)))


def dp_accounting_rdp(events, delta: float) -> float:
    """dp-accounting's Renyi accountant."""
    import dp_accounting

    accountant = dp_accounting.rdp.RdpAccountant()
    for sigma, q, count in events:
        step = dp_accounting.PoissonSampledDpEvent(q, dp_accounting.GaussianDpEvent(sigma))
        accountant.compose(step, count)
    return float(accountant.get_epsilon(delta))


def dp_accounting_pld(events, delta: float, interval: float = 1e-4, pessimistic: bool = True) -> float:
    """dp-accounting's privacy loss distribution on a fixed grid."""
    from dp_accounting.pld import privacy_loss_distribution as pld

    total = None
    for sigma, q, count in events:
        step = pld.from_gaussian_mechanism(
            sigma,
            sampling_prob=q,
            value_discretization_interval=interval,
            pessimistic_estimate=pessimistic,
            use_connect_dots=pessimistic,
        ).self_compose(count)
        total = step if total is None else total.compose(step)
    return float(total.get_epsilon_for_delta(delta))
