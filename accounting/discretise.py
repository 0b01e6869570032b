"""The privacy loss of one release on finitely many points, rounded so that it bounds the truth from above or from below.

P, Q is the dominating pair of the release, the loss is log(P/Q) at x drawn from P, increasing in x. The real line is
cut into cells, whose masses are (P_j, Q_j); the points need no regular spacing, so they stand where they matter.

- above: split P_j between the losses at the two ends so that both masses are kept ("Connect the Dots", Doroshenko et
  al. 2022, arXiv:2207.04380, algorithm 1, which holds for any set of losses). The hockey-stick divergence only grows.
- below: merge the cell into one outcome (post-processing) of loss log(P_j/Q_j).

Differences such as P_j - e^loss Q_j are written in terms of the two centres, q (N_mu - e^w N_0): their rounding error
is then q times that of a normal tail, which matters at tiny sample rates. What is left of it is counted on the safe side.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]

_EPS = float(np.finfo(np.float64).eps)
# A mass below it has lost its relative precision.
_TINY = 1e-290
# Half width, in noise standard deviations, of what the steering nodes see around each centre.
_REACH = 10.5
_NODES = 400
# Share of the cells spread evenly over the support, whatever the tilt.
_EVEN = 0.1


@dataclass(frozen=True)
class Pair:
    """One direction of a dominating pair.

    Args:
      sigma: noise standard deviation / L2 sensitivity.
      q: Poisson sample rate, below 1.
      direction: "remove" (mixture against N(0)), "add" (N(0) against mixture) or "replace" (mixtures with +1/2, -1/2).
    """

    sigma: float
    q: float
    direction: str

    @property
    def shift(self) -> float:
        """Distance of the mixture's second centre from 0, in noise standard deviations."""
        return (0.5 if self.direction == "replace" else 1.0) / self.sigma

    @property
    def rates(self) -> tuple[float, float]:
        """The weights of the second centre, +shift in P and -shift in Q ("add" is mirrored, so that its loss rises)."""
        return (0.0 if self.direction == "add" else self.q), (0.0 if self.direction == "remove" else self.q)


@dataclass(frozen=True)
class Piece:
    """The part of a release in which one pair is in force: outcomes x between two ends, with a weight.

    Args:
      pair: the pair.
      log_weight: log of the weight of its component in a mixture, rounded up.
      low: lower end, in noise standard deviations.
      high: upper end.
    """

    pair: Pair
    log_weight: float = 0.0
    low: float = -math.inf
    high: float = math.inf


def swapped_pieces(sigma: float, q: float, log_weight: float) -> tuple[tuple[Piece, Piece], float]:
    """Returns the two pieces of a *swapped* pair (see `mixtures`) and the mass of its atom at loss 0, rounded up.

    The losses above 0 of N(0) + q (N(1) - N(0)) against N(0) are those at x > 1/2, and the losses below 0 of N(0) against that
    mixture are the same outcomes, mirrored. The rest of the mass, (1 - q) (N(1) - N(0))(x > 1/2), has loss 0 on either side.
    """
    from scipy.special import ndtr

    middle = 0.5 / sigma
    pieces = Piece(Pair(sigma, q, "remove"), log_weight, low=middle), Piece(Pair(sigma, q, "add"), log_weight, high=-middle)
    total_variation = math.erf(middle / math.sqrt(2)) if middle < 1.0 else float(ndtr(middle) - ndtr(-middle))
    return pieces, ((1 - q) * total_variation + 16 * _EPS) * math.exp(log_weight) * (1 + 1e-12)


@dataclass(frozen=True)
class PointLoss:
    """Masses at finite losses (nats), and `infinite` at plus infinity."""

    losses: Array
    mass: Array
    infinite: float


@dataclass(frozen=True)
class Nodes:
    """A quadrature of the loss of one release that steers and proves nothing: where, which loss, log of the weight."""

    x: Array
    loss: Array
    log_weight: Array


def _log_mix(w: Array, q: float) -> Array:
    """Returns log(1 - q + q e^w)."""
    if q == 0.0:
        return np.zeros_like(w)
    y = q * np.expm1(np.minimum(w, 30.0))
    small = np.log1p(y)
    if q > 0.5:  # y near -1 has lost the digits of what is left of 1
        small = np.where(y > -0.5, small, np.log((1 - q) + q * np.exp(np.minimum(w, 0.0))))
    return small if w.max() < 30.0 else np.where(w < 30.0, small, np.logaddexp(math.log1p(-q), math.log(q) + w))


def _share(w: Array, q: float) -> Array:
    """Returns q e^w / (1 - q + q e^w): which part of the mixture's density comes from its second centre."""
    if q == 0.0:
        return np.zeros_like(w)
    out: Array = 1.0 / (1.0 + (1 - q) / q * np.exp(-w))  # 0 where e^-w overflows: too large a share would be unsafe
    return out


def _exponents(pair: Pair, x: Array) -> tuple[Array, Array]:
    """Returns w with e^w the density at x of N(+shift), of N(-shift), over that of N(0)."""
    mu = pair.shift
    return mu * x - mu * mu / 2, -mu * x - mu * mu / 2


def loss_at(pair: Pair, x: Array) -> Array:
    """Returns the loss (nats) at x standard deviations."""
    (up, down), (rise, fall) = pair.rates, _exponents(pair, x)
    out: Array = _log_mix(rise, up) - _log_mix(fall, down)
    return out


def _loss_above(pair: Pair, x: Array) -> Array:
    """Returns the loss (nats) at x, plus a bound on its rounding error."""
    (up, down), mu = pair.rates, pair.shift
    with np.errstate(all="ignore"):
        above, below = _exponents(pair, x)
        rise, fall = _log_mix(above, up), _log_mix(below, down)
        slip = (_share(above, up) + _share(below, down)) * mu * (4 * np.abs(x) + 2 * mu)
        out: Array = rise - fall + _EPS * (8 * (np.abs(rise) + np.abs(fall)) + slip)
    return out


def support(pair: Pair, log_upper: float, log_lower: float) -> tuple[float, float]:
    """Returns x (low, high) with P(x < low) <= e^log_lower and P(x > high) <= e^log_upper."""
    from scipy.special import ndtri_exp  # type: ignore[import-untyped]

    def quantile(log_tail: float) -> float:
        """x with upper tail e^log_tail under N(0, 1)."""
        return -float(ndtri_exp(min(log_tail, -math.log(2))))

    up = pair.rates[0]
    if up == 0.0:
        return -quantile(log_lower), quantile(log_upper)
    half = math.log(2)
    high = quantile(log_upper - half)
    if log_upper - half < math.log(up):
        high = max(high, pair.shift + quantile(log_upper - half - math.log(up)))
    return -quantile(log_lower), high


def steering(pair: Pair, log_upper: float, log_lower: float) -> Nodes:
    """Returns the nodes that steer: a plain rectangle rule over the support."""
    low, high = support(pair, log_upper, log_lower)
    x = np.linspace(low, high, _NODES)
    if high - low > 4 * _REACH:  # two separate humps
        x = np.union1d(np.linspace(low, _REACH, _NODES // 2), np.linspace(max(pair.shift - _REACH, _REACH), high, _NODES // 2))
    with np.errstate(all="ignore"):
        log_density = _log_mix(_exponents(pair, x)[0], pair.rates[0]) - x * x / 2
        log_weight = log_density + np.log(np.gradient(x))
    log_weight -= np.logaddexp.reduce(log_weight)
    return Nodes(x, loss_at(pair, x), log_weight)


def steering_of(piece: Piece, log_upper: float, log_lower: float) -> Nodes:
    """Returns the nodes of a piece, its ends among them; fewer than two if all of the piece lies in a negligible tail."""
    whole = steering(piece.pair, log_upper - piece.log_weight, log_lower - piece.log_weight)
    log_weight = whole.log_weight + piece.log_weight
    if piece.low == -math.inf and piece.high == math.inf:
        return Nodes(whole.x, whole.loss, log_weight)
    inside = (whole.x > piece.low) & (whole.x < piece.high)
    x, log_weight = whole.x[inside], log_weight[inside]
    if len(x) == 0:
        return Nodes(x, whole.loss[inside], log_weight)
    if piece.low > -math.inf:
        x, log_weight = np.append(piece.low, x), np.append(log_weight[0], log_weight)
    if piece.high < math.inf:
        x, log_weight = np.append(x, piece.high), np.append(log_weight, log_weight[-1])
    return Nodes(x, loss_at(piece.pair, x), log_weight)


def round_up_piece(piece: Piece, edges: Array) -> PointLoss:
    """Returns `round_up` of a piece, with its weight; the edges end at the ends of the piece.

    Guarantee: as for `round_up`: beyond a finite end there is nothing, or what is there is counted elsewhere.
    """
    part = round_up(piece.pair, edges, below=piece.low == -math.inf, beyond=piece.high == math.inf)
    if piece.log_weight == 0.0:
        return part
    weight = math.exp(piece.log_weight) * (1 + 4 * _EPS)
    return PointLoss(part.losses, part.mass * weight, part.infinite * weight)


def mass_of(piece: Piece) -> float:
    """Returns the P mass of a piece, with its weight, rounded up."""
    inside = [end for end in (piece.low, piece.high) if math.isfinite(end)]
    below, above = _tails(piece.pair, inside[0], inside[0]) if inside else (1.0, 1.0)
    return (above if piece.low > -math.inf else below) * math.exp(piece.log_weight) * (1 + 1e-12)


def merged(parts: list[PointLoss], atom: float, infinite: float) -> PointLoss:
    """Returns the loss of a release made of parts, an atom at loss 0 and more mass at plus infinity."""
    losses, mass = [part.losses for part in parts], [part.mass for part in parts]
    if atom > 0.0:
        losses.append(np.zeros(1))
        mass.append(np.full(1, atom))
    return PointLoss(np.concatenate(losses), np.concatenate(mass), math.fsum(part.infinite for part in parts) + infinite)


def tilted(nodes: Nodes, tilt: float, cut: float) -> Array:
    """Returns the weights of the nodes under e^(tilt * loss), for losses below the cut."""
    exponent = np.where(nodes.loss < cut, nodes.log_weight + tilt * nodes.loss, -np.inf)
    weight = np.exp(exponent - exponent.max())
    out: Array = weight / weight.sum()
    return out


def spread_cells(nodes: Nodes, weight: Array, other: Array) -> tuple[Array, float]:
    """Returns where cells should lie, and how coarse they are.

    Args:
      nodes: of the release.
      weight: how much the squared width of a cell at each node matters.
      other: another weight, which gets a share of the cells (that of the tilt the composition is computed with).

    Returns:
      (share of the cells that lie below each node, weighted sum of (cell width * number of cells)^2).

    For a fixed number of cells their density is best proportional to weight^(1/3) (per nat).
    """
    width, rise = np.gradient(nodes.x), np.maximum(np.gradient(nodes.loss), 1e-300)
    density = _EVEN * width / width.sum()
    for share, mass in ((1 - 2 * _EVEN, weight), (_EVEN, other)):
        wanted = mass * rise * rise
        wanted = np.cbrt(np.maximum(wanted / max(float(wanted.max()), 1e-300), 1e-30))
        density += share * wanted / wanted.sum()
    shares = np.cumsum(density) - density / 2
    shares[0], shares[-1] = 0.0, 1.0
    return shares, float(weight @ (rise / density) ** 2)


def place_cells(nodes: Nodes, shares: Array, cells: int) -> Array:
    """Returns `cells` + 1 increasing edges over the support."""
    return np.unique(np.interp(np.linspace(0.0, 1.0, cells + 1), shares, nodes.x))


class _Cells:
    """Normal masses of the cells between `edges` around the three centres, with bounds on their rounding errors."""

    def __init__(self, pair: Pair, edges: Array) -> None:
        self.pair, self.edges = pair, edges
        self.up, self.down = pair.rates
        self.rise, self.fall = _exponents(pair, np.clip(edges, -1e150, 1e150))
        self.plain, self.plain_error = self._normal(0.0)
        zero = np.zeros_like(self.plain)
        self.plus, self.plus_error = self._normal(pair.shift) if self.up else (zero, zero)
        self.minus, self.minus_error = self._normal(-pair.shift) if self.down else (zero, zero)

    def _normal(self, centre: float) -> tuple[Array, Array]:
        """Returns masses under N(centre, 1), relative precision kept in both tails, and their errors."""
        from scipy.special import ndtr

        x = self.edges - centre
        tail = ndtr(-np.abs(x))
        positive = x > 0
        inner = np.abs(np.diff(tail))
        mass = np.where(positive[1:] != positive[:-1], 1.0 - tail[1:] - tail[:-1], inner)
        # The roundings of x and of its square move a tail by up to 2 x^2 roundings.
        error = np.nan_to_num(_EPS * (16 + 2 * x * x) * tail, nan=0.0)
        crossing = np.where(positive[1:] != positive[:-1], 2 * _EPS, 0.0)
        return mass, error[1:] + error[:-1] + crossing

    def first(self) -> tuple[Array, Array]:
        """Returns the masses under P and their errors."""
        return (
            (1 - self.up) * self.plain + self.up * self.plus,
            2 * ((1 - self.up) * self.plain_error + self.up * self.plus_error),
        )

    def second(self) -> tuple[Array, Array]:
        """Returns the masses under Q and their errors."""
        return (
            (1 - self.down) * self.plain + self.down * self.minus,
            2 * ((1 - self.down) * self.plain_error + self.down * self.minus_error),
        )

    def difference(self) -> tuple[Array, Array]:
        """Returns P - Q of each cell and its error."""
        value = self.up * (self.plus - self.plain) - self.down * (self.minus - self.plain)
        error = self.up * (self.plus_error + self.plain_error) + self.down * (self.minus_error + self.plain_error)
        return value, 2 * error + 8 * _EPS * np.abs(value)

    def excess(self) -> Array:
        """Returns P - e^a Q of each cell, a the loss at its lower end, rounded up; it is not negative."""
        up, down = self.up, self.down
        rise, fall = np.exp(self.rise[:-1]), np.exp(self.fall[:-1])
        slip = self.slip()
        total = np.zeros_like(self.plain)
        if up:
            value = self.plus - rise * self.plain
            error = self.plus_error + rise * (self.plain_error + slip * self.plain)
            total += up * (1 - down) * (np.maximum(value, 0.0) + error)
        if down:
            value = fall * self.plain - self.minus
            error = self.minus_error + fall * (self.plain_error + slip * self.plain)
            total += (1 - up) * down * (np.maximum(value, 0.0) + error)
        if up and down:
            value = fall * self.plus - rise * self.minus
            error = fall * (self.plus_error + slip * self.plus) + rise * (self.minus_error + slip * self.minus)
            total += up * down * (np.maximum(value, 0.0) + error)
        return total / (1 - down + down * fall) * (1 + 32 * _EPS + 4 * slip)

    def slip(self) -> Array:
        """Returns a bound on the relative error of e^w at the lower ends."""
        mu = self.pair.shift
        out: Array = _EPS * (4 + 2 * mu * np.abs(self.edges[:-1]) + mu * mu)
        return out

    def widths(self) -> Array:
        """Returns the loss at the upper end of each cell minus that at the lower end, relative precision kept."""
        step = np.minimum(self.pair.shift * np.diff(self.edges), 700.0)
        rise, fall = _share(self.rise[:-1], self.up), _share(self.fall[:-1], self.down)
        out: Array = np.log1p(rise * np.expm1(step)) - np.log1p(fall * np.expm1(-step))
        return out


def round_up(pair: Pair, edges: Array, *, below: bool = True, beyond: bool = True) -> PointLoss:
    """Returns the loss of one release moved to the losses at `edges` so that every hockey-stick divergence can only grow.

    Args:
      pair: the release and the direction.
      edges: increasing and finite; what lies below the first is moved up to it, above the last to plus infinity.
      below: whether what lies below the first edge belongs to it.
      beyond: whether what lies above the last edge belongs to it.

    Guarantee: the composition of such losses bounds the composition of the releases from above.
    Source: Doroshenko et al. 2022, theorem 3.3 and lemma 3.1; Zhu, Dong, Wang 2022 (arXiv:2106.08567), theorem 10.
    """
    with np.errstate(all="ignore"):  # what overflows or divides by zero is moved to the upper end
        cells = _Cells(pair, edges)
        mass, error = cells.first()
        mass = mass + error
        # Solve u + v = P_j, u e^-a + v e^-(a+h) = Q_j for the part v that goes to the upper end.
        slip = 64 * _EPS + 4 * cells.slip() + 4 * _EPS * pair.shift * np.diff(edges)
        upper = cells.excess() / -np.expm1(-cells.widths()) * (1 + slip)
        upper = np.clip(np.nan_to_num(upper, nan=np.inf), 0.0, mass)
        out = np.zeros(len(edges))
        out[:-1] += mass - upper
        out[1:] += upper
        outside, infinite = _tails(pair, float(edges[0]), float(edges[-1]))
        out[0] += outside if below else 0.0
    return PointLoss(np.maximum.accumulate(_loss_above(pair, edges)), out, infinite if beyond else 0.0)


def _tails(pair: Pair, low: float, high: float) -> tuple[float, float]:
    """Returns the P mass below `low` and that above `high`, rounded up."""
    from scipy.special import ndtr

    up, mu = pair.rates[0], pair.shift
    below = (1 - up) * float(ndtr(low)) + up * float(ndtr(low - mu))
    above = (1 - up) * float(ndtr(-high)) + up * float(ndtr(mu - high))
    return below * (1 + 1e-12), above * (1 + 1e-12)


def round_down(pair: Pair, edges: Array) -> PointLoss:
    """Returns the loss of one release with each cell merged into one outcome; the outer cells are infinite.

    Guarantee: the composition of such losses bounds the composition of the releases from below.
    """
    with np.errstate(all="ignore"):
        cells = _Cells(pair, np.concatenate([[-np.inf], edges, [np.inf]]))
        (mass, mass_error), (other, other_error), (gap, gap_error) = cells.first(), cells.second(), cells.difference()
        gap = gap - gap_error
        ratio = gap / np.where(gap > 0, other + other_error, other - other_error)
        small = np.maximum(mass - mass_error, 0.0)
        losses = np.where(ratio > -0.5, np.log1p(np.maximum(ratio, -0.5)), np.log(small / (other + other_error)))
        losses = losses - 8 * _EPS * np.abs(losses)
    usable = np.isfinite(losses) & (small > _TINY) & (other > other_error)
    if usable.sum() < 2:
        raise ArithmeticError("the masses of the cells are lost in rounding")
    losses, small = losses[usable], small[usable]
    losses[-1] = min(losses[-1], losses[-2])  # an outlier that a tilt would blow up
    return PointLoss(losses, small, 0.0)


def single_epsilon(pair: Pair, log_delta: float) -> float:
    """Returns an upper bound on epsilon (nats) of one release, from the hockey-stick divergence itself: near exact."""
    low, high = support(pair, log_delta - 1.0, log_delta - 1.0)
    target = math.exp(log_delta) * (1 - 1e-12)
    x = _bisect(lambda x: _beyond(pair, x) <= target, low, high)
    return max(0.0, float(_loss_above(pair, np.array([x]))[0])) if _beyond(pair, x) <= target else math.inf


def single_log_delta(pair: Pair, epsilon: float) -> float:
    """Returns an upper bound on log delta of one release at this epsilon (nats): near exact."""
    low, high = support(pair, -700.0, -700.0)
    x = _bisect(lambda x: float(_loss_above(pair, np.array([x]))[0]) > epsilon, low, high, last=True)
    return min(0.0, math.log(max(_beyond(pair, x), 1e-300))) if float(_loss_above(pair, np.array([x]))[0]) <= epsilon else 0.0


def _bisect(holds: Callable[[float], bool], low: float, high: float, *, last: bool = False) -> float:
    """Returns the smallest x found from which on a condition holds; with `last`, the largest found before it does."""
    for _ in range(50):
        middle = (low + high) / 2
        low, high = (low, middle) if holds(middle) else (middle, high)
    return low if last else high


def _beyond(pair: Pair, x: float) -> float:
    """Returns P(X > x) - e^a Q(X > x), a the loss at x, rounded up: delta at epsilon = a."""
    with np.errstate(all="ignore"):
        return float(_Cells(pair, np.array([x, np.inf])).excess()[0])
