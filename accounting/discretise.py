"""The privacy loss of one release on a grid, rounded so that it bounds the truth from above or from below.

P, Q is the dominating pair of the release, the loss is log(P/Q) at x drawn from P. A cell of the real line between two
grid losses carries masses (P_j, Q_j):

- above: split P_j between the two ends so that both masses are kept ("Connect the Dots", Doroshenko et al. 2022,
  arXiv:2207.04380, algorithm 1). The hockey-stick divergence can only grow. Computed cell by cell from normal tails,
  not from second differences of delta: those lose everything once the grid is finer than about 1e-6.
- below: merge the cell into one outcome (post-processing) of loss log(P_j/Q_j), cells placed so that this lies just
  above a grid point, then round down.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]

_EPS = float(np.finfo(np.float64).eps)


@dataclass(frozen=True)
class Pair:
    """One direction of a dominating pair.

    Args:
      sigma: noise standard deviation / L2 sensitivity.
      q: Poisson sample rate.
      direction: "remove" (mixture against N(0)), "add" (N(0) against mixture) or "replace" (mixtures with +1/2, -1/2).
    """

    sigma: float
    q: float
    direction: str

    @property
    def shift(self) -> float:
        """Distance of the mixture's second centre from 0, in noise standard deviations."""
        return (0.5 if self.direction == "replace" else 1.0) / self.sigma


@dataclass(frozen=True)
class GridLoss:
    """Masses `mass[i]` at the losses `(first + i) * interval + shift`, and `infinite` at plus infinity."""

    first: int
    mass: Array
    infinite: float
    shift: float = 0.0

    def losses(self, interval: float) -> Array:
        """Returns the losses (nats) that carry the masses."""
        points: Array = (self.first + np.arange(len(self.mass), dtype=np.float64)) * interval + self.shift
        return points


def _log_mix(w: Array, q: float) -> Array:
    """Returns log(1 - q + q e^w)."""
    if q == 1.0:
        return w
    small = np.log1p(q * np.expm1(np.minimum(w, 30.0)))
    out: Array = np.where(w < 30.0, small, np.logaddexp(math.log1p(-q), math.log(q) + w))
    return out


def _forward_loss(pair: Pair, z: Array) -> Array:
    """Returns the loss of "remove" or "replace" at z standard deviations; increasing in z."""
    mu = pair.shift
    loss: Array = _log_mix(mu * z - mu * mu / 2, pair.q)
    if pair.direction == "replace":
        loss = loss - _log_mix(-mu * z - mu * mu / 2, pair.q)
    return loss


def _inverse_loss(pair: Pair, loss: Array) -> Array:
    """Returns the z (noise standard deviations) at which `_forward_loss` takes the given values, or -inf below all."""
    mu, q = pair.shift, pair.q
    if q == 1.0:
        return loss / (2 * mu) if pair.direction == "replace" else loss / mu + mu / 2
    if pair.direction == "replace":
        # sinh(mu z - l/2) = beta sinh(l/2), beta = (1-q)/q e^(mu^2/2); by symmetry solve for |l|.
        half = np.abs(loss) / 2
        log_sinh = half + np.log(-np.expm1(-2 * half) / 2)
        log_beta = math.log1p(-q) - math.log(q) + mu * mu / 2
        x = log_beta + log_sinh
        arc = np.where(x < 20, np.arcsinh(np.exp(np.minimum(x, 20))), x + math.log(2) + np.log1p(np.exp(-2 * x)) / 2)
        return np.where(loss == 0, 0.0, np.sign(loss) * (arc + half) / mu)
    # w = log((e^l - (1-q)) / q), in the form that keeps precision: near 0, far below, far above.
    capped = np.minimum(loss, 30.0)
    near = np.log1p(np.maximum(np.expm1(capped) / q, -1.0))
    below = np.log(np.maximum(np.exp(capped) - (1 - q), 0.0)) - math.log(q)
    above = loss - math.log(q) + np.log1p(-(1 - q) * np.exp(-np.maximum(loss, 1.0)))
    w = np.where(loss < -0.5, below, np.where(loss < 30.0, near, above))
    return w / mu + mu / 2


def _normal(lower: Array, upper: Array) -> Array:
    """Returns the standard normal mass of [lower, upper], relative precision kept in both tails."""
    from scipy.special import ndtr  # type: ignore[import-untyped]

    return np.where(lower > 0, ndtr(-lower) - ndtr(-upper), ndtr(upper) - ndtr(lower))


def _masses(pair: Pair, lower: Array, upper: Array) -> tuple[Array, Array]:
    """Returns the masses of [lower, upper] under the two sides of the forward pair."""
    mu, q = pair.shift, pair.q
    plain = _normal(lower, upper)
    first = (1 - q) * plain + q * _normal(lower - mu, upper - mu)
    second = (1 - q) * plain + q * _normal(lower + mu, upper + mu) if pair.direction == "replace" else plain
    return first, second


def _cells(pair: Pair, losses: Array) -> tuple[Array, Array]:
    """Returns masses (P, Q) of the events {losses[i] <= loss < losses[i+1]}, for either direction."""
    if pair.direction == "add":
        z = _inverse_loss(pair, -losses)  # decreasing
        mix, plain = _masses(pair, z[1:], z[:-1])
        return plain, mix
    z = _inverse_loss(pair, losses)
    return _masses(pair, z[:-1], z[1:])


def support(pair: Pair, log_upper: float, log_lower: float) -> tuple[float, float]:
    """Returns losses (low, high) with P(loss < low) <= e^log_lower and P(loss > high) <= e^log_upper."""
    from scipy.special import ndtri_exp

    mu, q = pair.shift, pair.q

    def quantile(log_tail: float) -> float:
        """z with upper tail e^log_tail under N(0, 1)."""
        return -float(ndtri_exp(min(log_tail, -math.log(2))))

    if pair.direction == "add":
        bottom, top = -quantile(log_upper), quantile(log_lower)
        low, high = -_forward_loss(pair, np.array([top, bottom]))
        return float(low), float(high)
    half = math.log(2)
    second = quantile(log_upper - half - math.log(q)) if log_upper - half < math.log(q) else -math.inf
    first = quantile(log_upper - half) if q < 1 else -math.inf
    top = max(first, mu + second if math.isfinite(second) else 0.0)
    low, high = _forward_loss(pair, np.array([(mu if q == 1 else 0.0) - quantile(log_lower), top]))
    return float(low), float(high)


def _tails(pair: Pair, low: float, high: float) -> tuple[Array, Array]:
    """Returns P and Q masses of (loss < low, loss >= high)."""
    edges = np.array([-np.inf, low, high, np.inf])
    if pair.direction == "add":
        z = _inverse_loss(pair, -edges[1:3])
        ends = np.array([z[0], np.inf]), np.array([-np.inf, z[1]])
        mix, plain = _masses(pair, np.array([ends[0][0], ends[1][0]]), np.array([ends[0][1], ends[1][1]]))
        return plain, mix
    z = _inverse_loss(pair, edges[1:3])
    return _masses(pair, np.array([-np.inf, z[1]]), np.array([z[0], np.inf]))


@lru_cache(maxsize=24)
def discretise(pair: Pair, interval: float, log_upper: float, log_lower: float, pessimistic: bool) -> GridLoss:
    """Returns the loss of one release on multiples of `interval`.

    Args:
      pair: the release and the direction.
      interval: grid spacing (nats).
      log_upper: log of the P mass that may be moved to plus infinity (pessimistic) or down to the last point.
      log_lower: log of the P mass that may be moved up to the first point (pessimistic) or to minus infinity.
      pessimistic: round so that every hockey-stick divergence, also after composition, can only grow; else shrink.

    Guarantee: the composition of these bounds the composition of the releases on the stated side.
    Source: Doroshenko et al. 2022, theorem 3.3 and lemma 3.1; Zhu, Dong, Wang 2022 (arXiv:2106.08567), theorem 10.
    """
    low, high = support(pair, log_upper, log_lower)
    first, last = math.floor(low / interval), max(math.ceil(high / interval), math.floor(low / interval) + 1)
    index = np.arange(first, last + 1, dtype=np.float64)
    with np.errstate(all="ignore"):
        if pessimistic:
            return _round_up(pair, interval, first, index)
        return _round_down(pair, interval, index)


def _round_up(pair: Pair, interval: float, first: int, index: Array) -> GridLoss:
    losses = index * interval
    mass, other = _cells(pair, losses)
    (below, beyond), _ = _tails(pair, float(losses[0]), float(losses[-1]))
    # Solve u + v = P_j, u e^-a + v e^-(a+h) = Q_j for the part v that goes to the upper end.
    weight = other * np.exp(np.minimum(losses[:-1], 700.0))
    upper = (mass - weight) / -math.expm1(-interval)
    # Rounding of the masses moves v by about this much; move it up.
    slack = 16 * _EPS * (_smaller_tail(mass) + _smaller_tail(weight)) / -math.expm1(-interval)
    upper = np.clip(np.nan_to_num(upper + slack, nan=np.inf), 0.0, mass)
    out = np.zeros(len(index))
    out[:-1] += mass - upper
    out[1:] += upper
    out[0] += below
    return GridLoss(first, out, float(beyond) * (1 + 1e-12))


def _smaller_tail(mass: Array) -> Array:
    """Returns, per cell, the size of the normal tail it was computed from: that scales the rounding error."""
    rising = np.cumsum(mass)
    falling = np.cumsum(mass[::-1])[::-1]
    out: Array = np.minimum(rising, falling)
    return out


def _round_down(pair: Pair, interval: float, index: Array) -> GridLoss:
    # Cell i lies between edges[i] and edges[i+1], the outer edges are infinite; it is meant for base + i * interval.
    n = len(index)
    anchor, centre = _anchor(pair, interval, index)
    base = centre - anchor * interval
    targets = base + np.arange(n) * interval
    edges = np.concatenate([[-np.inf], targets[:-1] + interval / 2, [np.inf]])
    for _ in range(_SWEEPS if n < 1 << 17 else 3):
        mass, other = _cells(pair, edges)
        gap = np.nan_to_num(targets - np.log(mass / other), nan=0.0, posinf=0.0, neginf=0.0)
        gap = np.clip(gap, -interval / 4, interval / 4)
        # An edge moves the loss of both its cells by about half, so the shifts c obey (c_i + c_i+1) / 2 = gap_i.
        edges[anchor + 2 : n] += _outwards(gap[anchor + 1 : n - 1])
        edges[1:anchor] += _outwards(gap[1:anchor][::-1])[::-1]
        edges = np.maximum.accumulate(edges)
    mass, other = _cells(pair, edges)
    short = (targets - np.log(mass / other)) / interval
    known = np.isfinite(short) & (mass > 0)
    mass, short = np.where(known, mass, 0.0), np.where(known, short, 0.0)
    # Lowering the whole grid by a small share of a cell costs that much; a cell left short of its point costs a cell.
    choices = 2.0 ** -np.arange(1, 24)
    cost = [share + float(mass @ np.ceil(np.maximum(short - share, 0.0))) for share in choices]
    share = float(choices[int(np.argmin(cost))]) + 1e-7
    position = np.arange(n) - np.ceil(np.maximum(short - share + 1e-7, 0.0))
    out = np.zeros(n)
    usable = position >= 0
    np.add.at(out, position[usable].astype(np.int64), mass[usable] * (1 - 1e-12))
    return GridLoss(0, out, 0.0, base - share * interval)


_SWEEPS = 8
_DAMPING = 0.8
_KERNEL = (1 + _DAMPING) * (-_DAMPING) ** np.arange(40)


def _outwards(gap: Array) -> Array:
    """Returns c with (c_i-1 + c_i) / 2 close to gap_i, damped so that noise in the tails does not add up."""
    return np.convolve(gap, _KERNEL)[: len(gap)] if len(gap) else gap


def _anchor(pair: Pair, interval: float, index: Array) -> tuple[int, float]:
    """Returns a cell where the loss piles up and the merged loss of the cell of one interval around it."""
    last = len(index) - 1
    if pair.q == 1.0:
        anchor, step = last // 2, 0.0
    else:
        anchor, step = {"remove": (0, 0.5), "add": (last, -0.5), "replace": (int(np.clip(-index[0], 0, last)), 0.0)}[pair.direction]
    centre = float(index[anchor]) * interval
    for _ in range(20):
        low = centre - interval / 2 if anchor > 0 else -np.inf
        high = centre + interval / 2 if anchor < last else np.inf
        mass, other = _cells(pair, np.array([low, high]))
        merged = float(np.log(mass[0] / other[0]))
        if not math.isfinite(merged):
            centre += step * interval  # the loss never gets this far
            continue
        moved, centre = abs(merged - centre), merged
        if moved < 1e-9 * interval:
            break
    return anchor, centre


@lru_cache(maxsize=4096)
def loss_spread(pair: Pair) -> float:
    """Returns the standard deviation of the loss of one release (nats), to a per cent: it sets the grid."""
    grid = np.linspace(-10.0, 10.0, 1001)
    weight = np.exp(-grid * grid / 2)
    weight /= weight.sum()
    centre = 0.0 if pair.direction == "add" else pair.shift
    share = 1.0 if pair.direction == "add" else 1 - pair.q
    with np.errstate(all="ignore"):
        plain, moved = _forward_loss(pair, grid), _forward_loss(pair, grid + centre)
    mean = share * float(weight @ plain) + (1 - share) * float(weight @ moved)
    square = share * float(weight @ (plain - mean) ** 2) + (1 - share) * float(weight @ (moved - mean) ** 2)
    return math.sqrt(square)
