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


# -- losses of one release on a fine grid of outcomes, composed by convolution ----------------------------------------


def sampled_losses(sigma: float, q: float, direction: str, width: float = 12.0, points: int = 400_001):
    """(loss, P mass, Q mass) of every cell of outcomes; the ordinary pair of a direction."""
    edges = np.linspace(-width * sigma - 1, width * sigma + 1, points)

    def normal(centre):
        inside = np.diff(stats.norm.cdf(edges, centre, sigma))
        return np.where(edges[1:] > centre, -np.diff(stats.norm.sf(edges, centre, sigma)), inside)  # digits in both tails

    up, down = {"remove": (1.0, None), "add": (None, 1.0), "replace": (0.5, -0.5)}[direction]
    mix = lambda centre: normal(0.0) if centre is None else (1 - q) * normal(0.0) + q * normal(centre)  # noqa: E731
    return mix(up), mix(down)


def swapped_losses(sigma: float, q: float):
    """(P, Q) masses: losses above 0 of "remove", losses below 0 of "add", and what is left at 0."""
    p_remove, q_remove = sampled_losses(sigma, q, "remove")
    p_add, q_add = sampled_losses(sigma, q, "add")
    above, below = p_remove > q_remove, p_add < q_add
    p = np.concatenate([p_remove[above], p_add[below]])
    r = np.concatenate([q_remove[above], q_add[below]])
    return np.append(p, 1 - p.sum()), np.append(r, 1 - r.sum())


def composed_delta(masses, count: int, epsilon: float, interval: float = 2e-3):
    """(lower, upper) bounds on delta of `count` releases, whose losses are rounded down and up to a regular grid."""
    p, r = masses
    used = (p > 1e-18) & (r > 0)
    loss, p = np.log(p[used] / r[used]), p[used]
    found = []
    for shift in (np.floor, np.ceil):
        index = shift(loss / interval).astype(int)
        low = int(index.min())
        once = np.bincount(index - low, weights=p)
        total, start = once, low
        for _ in range(count - 1):
            size = len(total) + len(once) - 1
            total = np.fft.irfft(np.fft.rfft(total, size) * np.fft.rfft(once, size), size)
            start += low
        losses = (start + np.arange(len(total))) * interval
        found.append(float(total @ np.maximum(-np.expm1(epsilon - np.minimum(losses, 600)), 0.0)))
    return found[0], found[1]


# -- real mechanisms on data where every other example contributes the same ------------------------------------------


def hockey_stick(weights, other, sigma: float, epsilon: float) -> float:
    """Divergence of two mixtures of Gaussians, given as {centre: probability}, the worse direction."""
    centres = [*weights, *other]
    x = np.linspace(min(centres) - 10 * sigma, max(centres) + 10 * sigma, 60_001)
    density = lambda mixture: sum(w * stats.norm.pdf(x, c, sigma) for c, w in mixture.items())  # noqa: E731
    a, b = density(weights), density(other)
    step = x[1] - x[0]
    return max(float(np.maximum(f - math.exp(epsilon) * g, 0).sum() * step) for f, g in ((a, b), (b, a)))


def capped_sums(others: int, q: float, cap: int, base: float, record: float | None):
    """The centres of a capped Poisson release: `others` examples that contribute `base`, and a record unless it is None."""
    found: dict[float, float] = {}
    for drawn in range(others + 1):
        chance = float(stats.binom.pmf(drawn, others, q))
        kept = min(drawn, cap)
        joins = 0.0 if record is None else q * min(1.0, cap / (drawn + 1))
        stays = base * kept
        found[stays] = found.get(stays, 0.0) + chance * (1 - joins)
        if joins:
            moved = base * min(drawn, cap - 1) + record
            found[moved] = found.get(moved, 0.0) + chance * joins
    return found
