"""The composed privacy loss by one Fourier sum, every neglected quantity added back.

With X the composed finite loss, K(s) = log E[e^(s X)], s = tilt + i theta, the function h(eps) = e^(tilt eps) delta(eps)
has the Fourier transform e^K(s) / (s (s + 1)). Poisson's summation formula turns a sum over theta_k = 2 pi k / period into

    sum_m h(eps + m period) = (1 / period) sum_k e^(K(s_k) - i theta_k eps) / (s_k (s_k + 1)).

Every h is >= 0, so the right hand side is an upper bound on h(eps) whatever the period, without any window; a lower
bound takes off Chernoff bounds of the other terms. The tilt (Esscher, saddle-point) makes the error relative to delta.

A loss far above epsilon would stretch the period for nothing. Losses from a cut on ("jumps") are therefore left out of X
and added in closed form: on the event of any jump (1 - e^(eps - X))_+ is 1 - e^(eps - X) unless X < eps, so they give
P(jump) - e^eps Q(jump), and above, a Chernoff bound of E[e^(eps - X); jump, X < eps].

The sum converges because X holds a Gaussian. If the releases bring none, a small one is added. Above: one more
full-batch release, which can only cost privacy. Below: a shift down by three standard deviations of a Gaussian,
whose excursions above zero are taken off.

Source: Koskela, Jalko, Honkela 2020 (arXiv:1906.03049) for the Fourier accountant; Alghamdi et al. 2023
(arXiv:2208.09595) for the tilted integral and its saddle point.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from accounting.discretise import Nodes, PointLoss

Array = NDArray[np.float64]

_EPS = float(np.finfo(np.float64).eps)
# Log of the share of delta that may be lost to a period or to a cut of the sum; what is lost is counted.
_SMALL = -11.0
_CUT = 36.0
_MAX_TERMS = 1 << 14
# Log of the rounding error relative to delta, for one release, that a smaller tilt may reach, and by how much it may grow.
_ROUNDING, _LOSS = -21.0, 3.0
# Chernoff bounds of the other terms are tried at the tilt times 1 plus these.
_STEPS = (-1.0, -0.7, -0.4, -0.2, 0.1, 0.3, 1.0, 3.0)
_LOWER_SHIFT = 3.0
_BLOCK = 128


class Steering:
    """K(t) and its saddle points from quadrature nodes: where to look. Proves nothing."""

    def __init__(self, nodes: Sequence[tuple[Nodes, int]], mu: float, cut: float = math.inf) -> None:
        width = max((len(node.x) for node, _ in nodes), default=1)
        self._log_weight = np.full((len(nodes), width), -np.inf)
        self._loss = np.zeros((len(nodes), width))
        for row, (node, _) in enumerate(nodes):
            self._log_weight[row, : len(node.x)] = np.where(node.loss < cut, node.log_weight, -np.inf)
            self._loss[row, : len(node.x)] = node.loss
        self._counts = np.array([count for _, count in nodes], dtype=np.float64)
        self._square = mu * mu
        self.spread = max(math.sqrt(self.moments(0.0)[2]), 1e-150)

    def moments(self, tilt: float) -> tuple[float, float, float]:
        """Returns K and its first two derivatives."""
        exponent = self._log_weight + tilt * self._loss
        top = exponent.max(axis=1, keepdims=True)
        weight = np.exp(exponent - top)
        total = weight.sum(axis=1, keepdims=True)
        weight /= total
        mean = (weight * self._loss).sum(axis=1, keepdims=True)
        variance = (weight * (self._loss - mean) ** 2).sum(axis=1)
        square = self._square
        return (
            float(self._counts @ (top + np.log(total))[:, 0]) + square * tilt * (tilt + 1) / 2,
            float(self._counts @ mean[:, 0]) + square * (tilt + 0.5),
            float(self._counts @ variance) + square,
        )

    def point(self, tilt: float) -> tuple[float, float]:
        """Returns (epsilon, log delta) of the saddle point at this tilt."""
        value, slope, curve = self.moments(tilt)
        epsilon = slope - 1 / tilt - 1 / (tilt + 1)
        curve += 1 / tilt**2 + 1 / (tilt + 1) ** 2
        return epsilon, value - tilt * epsilon - math.log(tilt) - math.log1p(tilt) - math.log(2 * math.pi * curve) / 2

    def jumps(self, epsilon: float, log_delta: float) -> float:
        """Returns from where on losses are jumps: so far above epsilon that the total hardly ever stays below it."""
        above = float(self._counts @ np.exp(np.where(self._loss > epsilon, self._log_weight, -np.inf)).sum(axis=1))
        spread = math.sqrt(self.moments(-1.0)[2])  # under Q: without jumps
        if not (above > 0 and spread > 0):
            return math.inf
        goal = math.log(above) - log_delta - _SMALL
        powers = 1.0 + np.array([0.01, 0.03, 0.1, 0.3, 1.0, 2.0, 3.0, 4.5, 7.0]) / spread
        distance = float(((self._values(-powers) + goal) / powers).min())
        cut = epsilon + max(distance, epsilon)
        return cut if cut < self._loss.max() else math.inf

    def solve(self, *, log_delta: float | None = None, epsilon: float = 0.0) -> tuple[float, float]:
        """Returns (tilt, epsilon) of the saddle point at this log delta or, without one, at this epsilon."""

        def excess(log_tilt: float) -> float:
            at, log_value = self.point(math.exp(log_tilt))
            return at - epsilon if log_delta is None else log_delta - log_value

        tolerance = 0.02 if log_delta is not None else 0.01 * epsilon
        tilt = math.exp(_crossing(excess, math.log(1e-6 / self.spread), math.log(1e9 / self.spread), tolerance))
        return tilt, self.point(tilt)[0]

    def _values(self, tilts: Array) -> Array:
        """Returns K at many tilts."""
        out = self._square * tilts * (tilts + 1) / 2
        for row, count in enumerate(self._counts):
            exponent = self._log_weight[row] + np.outer(tilts, self._loss[row])
            top = exponent.max(axis=1)
            out += count * (top + np.log(np.exp(exponent - top[:, None]).sum(axis=1)))
        return out

    def relax(self, tilt: float, epsilon: float, log_delta: float) -> tuple[float, float]:
        """Returns (tilt, period) near the saddle point that need few terms.

        At tiny sample rates the loss has a tail so heavy that at the saddle point the tilted distribution is as wide as
        the tail. A smaller tilt has a shorter period; the rounding errors count e^(K - tilt epsilon) / delta times.
        """
        shares, steps = np.array([1.0, 0.7, 0.5, 0.35, 0.25]) * tilt, np.array(_STEPS)
        values = self._values(np.outer(shares, 1 + np.concatenate([[0.0], steps])).ravel()).reshape(len(shares), -1)
        excess = log_delta - values[:, 0] + shares * epsilon
        limit = min(math.log(self._counts.sum()) + _ROUNDING, excess[0] - _LOSS)
        # Chernoff bounds of the other terms: they are to be small beside delta = e^log_delta at epsilon.
        goal = (shares * epsilon + log_delta + _SMALL)[:, None]
        moves = np.outer(shares, steps)
        periods = (values[:, 1:] - moves * epsilon - goal) / np.abs(moves)
        period = np.maximum(periods[:, steps > 0].min(axis=1), periods[:, steps < 0].min(axis=1))
        period = np.maximum(period, 2 * math.pi / shares)
        cost = np.where((excess > limit) | (shares == tilt), period * np.sqrt(shares + 1), np.inf)
        best = int(np.argmin(cost))
        return float(shares[best]), float(period[best])


def _crossing(function: Callable[[float], float], low: float, high: float, tolerance: float) -> float:
    """Returns where a function that rises on the whole is 0 to within the tolerance; an end if it never is."""
    below = function(low)
    if below >= 0:
        return low
    upper, above = low, below
    while upper < high and above < 0:
        low, below = upper, above
        upper = min(upper + 3.0, high)
        above = function(upper)
    # At tiny sample rates all of epsilon may lie within a small change of the tilt.
    for turn in range(40):
        if upper - low < 1e-5 or not above > 0:
            break
        share = below / (below - above) if turn % 3 else 0.5
        middle = low + min(max(share, 0.05), 0.95) * (upper - low)
        value = function(middle)
        low, below, upper, above = (middle, value, upper, above) if value < 0 else (low, below, middle, value)
        if abs(value) < tolerance:
            return middle
    return low


@dataclass(frozen=True)
class Plan:
    """Where a composition is evaluated. Any choice is valid; a good one is tight.

    Args:
      tilt: real part of s.
      period: of the Poisson sum (nats).
      variance: of the Gaussian that the loss must hold for the sum to be cut (nats squared).
      cut: losses from here on are jumps (nats).
      epsilon: about where delta will be asked for (nats).
    """

    tilt: float
    period: float
    variance: float
    cut: float
    epsilon: float


class Composition:
    """The composed loss of releases.

    Args:
      parts: (loss of one release, count), all rounded up or all rounded down.
      mu: sensitivity in noise standard deviations of the full-batch releases together, 0 if there are none.
      plan: tilt, period and Gaussian.
      upper: whether the parts are rounded up.
    """

    def __init__(self, parts: Sequence[tuple[PointLoss, int]], mu: float, plan: Plan, *, upper: bool) -> None:
        self.upper, self.tilt = upper, plan.tilt
        self._parts = [(PointLoss(part.losses[part.losses < plan.cut], part.mass[part.losses < plan.cut], 0.0), n) for part, n in parts]
        self.log_infinite = _log_any(parts) if upper else -math.inf
        # At most _MAX_TERMS terms: a shorter period or a wider Gaussian is less tight, as valid.
        variance = max(plan.variance, 2 * _CUT * (plan.period / (2 * math.pi * _MAX_TERMS)) ** 2)
        extra = max(variance - mu * mu, 0.0)
        self.period = plan.period
        self._scale = math.sqrt(extra)
        self._shift = 0.0 if upper else -_LOWER_SHIFT * self._scale
        self._variance = mu * mu + extra
        self._mean = (self._variance if upper else mu * mu) / 2 + self._shift
        step = 2 * math.pi / self.period
        terms = math.ceil(math.sqrt(2 * _CUT / self._variance) / step) + 1
        self.theta: Array = step * np.arange(terms + 1, dtype=np.float64)
        self.log_mgf, self._drift = self._log_mgf(self.tilt)
        self._jumps = _Jumps(parts, plan.cut)
        self._stray, self._back = -math.inf, 0.0
        if upper and self._jumps.any > 0:
            # Any exponent will do; the scale of the best one lies between that of epsilon and that of one release.
            powers = (2.0**k / (plan.cut - plan.epsilon) for k in range(1, 12))
            self._stray, self._back = min(
                ((self._log_stray(parts, plan.cut, 1 + t), 1 + t) for t in powers), key=lambda pair: pair[0] + pair[1] * plan.epsilon
            )
        self._transform()
        last = float(self.theta[-1])
        self._cut = math.exp(-self._variance * last * last / 2) / (math.pi * last)

    def _log_mgf(self, tilt: float) -> tuple[float, float]:
        """Returns K at a real point and a bound on its rounding error."""
        total, error = 0.0, 1e-12
        for part, count in self._parts:
            log_mass = np.log(np.maximum(part.mass, 1e-320))
            exponent = log_mass + tilt * part.losses
            top = float(exponent.max())
            weight = np.exp(exponent - top)
            size = float(weight.sum())
            total += count * (top + math.log(size))
            wobble = float(weight @ (np.abs(log_mass) + np.abs(tilt * part.losses))) / size
            error += count * _EPS * (len(weight) + 32 + 4 * wobble + abs(top))
        square = tilt * self._mean + tilt * tilt * self._variance / 2
        return total + square, error + 8 * _EPS * (abs(total) + abs(square))

    def _log_stray(self, parts: Sequence[tuple[PointLoss, int]], cut: float, power: float) -> float:
        """Returns log of a bound on E[e^(power (eps - X)); any jump] at eps = 0."""
        total, drift = -power * self._mean + power * power * self._variance / 2, 1e-9
        jump = [-math.inf]
        for part, count in parts:
            log_mass = np.log(np.maximum(part.mass, 1e-320))
            exponent = log_mass - power * part.losses
            one = float(np.logaddexp.reduce(exponent))
            wobble = float(np.exp(exponent - one) @ (np.abs(log_mass) + np.abs(power * part.losses)))
            jumps = exponent[part.losses >= cut]
            if len(jumps):
                jump.append(float(np.logaddexp.reduce(jumps)) + math.log(count) - one)
            total += count * one
            drift += count * _EPS * (len(exponent) + 32 + 4 * wobble + abs(float(exponent.max())))
        bound = total + float(np.logaddexp.reduce(jump)) + drift + 8 * _EPS * abs(total)
        return bound if math.isfinite(bound) else math.inf

    def _transform(self) -> None:
        """Computes the terms of the sum at epsilon = centre, and the bounds on their errors."""
        size, phase = np.zeros(len(self.theta)), np.zeros(len(self.theta))
        slack = np.zeros(len(self.theta))
        # The Gaussian, tilted: its mean moves by tilt * variance.
        centres = [self._mean, self.tilt * self._variance]
        for part, count in self._parts:
            values, middle, error = _characteristic(part, self.tilt, self.theta)
            modulus = np.abs(1 + values)
            square = values.real * (2 + values.real) + values.imag**2
            log_modulus = np.where(modulus > 0.5, np.log1p(np.maximum(square, -0.9)) / 2, np.log(np.maximum(modulus, _EPS)))
            angle = np.arctan2(values.imag, 1 + values.real)
            size += count * log_modulus
            phase += count * angle
            rounding = _EPS * (8 + 2 * len(self._parts)) * (np.abs(log_modulus) + np.abs(angle))
            # Where the modulus is below 1/2, 1 + values is itself rounded (and kept off zero).
            slack += count * (
                error / np.maximum(modulus, _EPS) + rounding + np.where(modulus > 0.5, 0.0, 8 * _EPS / np.maximum(modulus, _EPS))
            )
            centres.append(count * middle)
        size -= self._variance * self.theta**2 / 2
        s = self.tilt + 1j * self.theta
        self._centre, self._offset = math.fsum(centres), math.fsum(map(abs, centres))
        weight = np.where(self.theta > 0, 2.0, 1.0) / self.period / np.abs(s * (s + 1))
        magnitude = np.exp(size) * weight
        self._terms = magnitude * np.exp(1j * (phase - np.angle(s) - np.angle(s + 1)))
        # |(a + e)^n - a^n| <= |a|^n (exp(n |e / a|) - 1), and no more than the sum of both sizes, as the true one is below 1.
        crude = magnitude + weight * np.exp(-self._variance * self.theta**2 / 2)
        with np.errstate(over="ignore"):
            fine = np.where(slack < 700, magnitude * np.expm1(np.minimum(slack, 700.0)), np.inf)
        self._error = float(np.minimum(fine, crude).sum()) + (64 + len(self.theta)) * _EPS * float(magnitude.sum())
        self._phase_error = 4 * _EPS * float(magnitude @ self.theta)

    def _others(self, epsilon: float) -> float:
        """Returns a bound, in units of e^(K - tilt epsilon), on what a lower bound must leave out at this epsilon."""
        # m < 0: delta(x) <= e^(K(t) - t x) for t >= 0. m > 0: the same, t above the tilt.
        total = 0.0
        for steps in ([c for c in _STEPS if c < 0], [c for c in _STEPS if c > 0]):
            best = math.inf
            for step in steps:
                t = (1 + step) * self.tilt
                rate = abs(self.tilt - t) * self.period
                value, drift = self._log_mgf(t)
                log_term = value + drift - self.log_mgf + (self.tilt - t) * epsilon - rate
                best = min(best, math.exp(min(log_term, 700.0)) / -math.expm1(-rate))
            total += best
        return total * math.exp(min(self._drift, 700.0)) + self._excursions()

    def _excursions(self) -> float:
        """Returns E[V+] of the smoothing Gaussian under the tilt: it may lift the loss, by no more than this in the mean."""
        if self._scale == 0.0:
            return 0.0
        r = (self._shift + self.tilt * self._scale**2) / self._scale
        above = math.erfc(-r / math.sqrt(2)) / 2
        return self._scale * (math.exp(-r * r / 2) / math.sqrt(2 * math.pi) + r * above) * (1 + 1e-9) + 1e-300

    def log_delta(self, epsilon: float) -> float:
        """Returns log of a bound on delta(epsilon): above the truth if the parts are rounded up, else below it.

        Guarantee: rounding, aliasing and truncation are all counted against the side asked for.
        """
        distance = self._centre - epsilon
        angle = self.theta * distance
        total = float(self._terms.real @ np.cos(angle) - self._terms.imag @ np.sin(angle))
        error = self._error + self._cut + self._phase_error * (self._offset + abs(epsilon))
        scale = self.log_mgf - self.tilt * epsilon
        drift = self._drift + 8 * _EPS * (abs(self.log_mgf) + self.tilt * abs(epsilon))
        jump = self._jumps.delta(epsilon, upper=self.upper)
        if self.upper:
            log_value = scale + drift + math.log(max(total + error, 1e-300))
            stray = self._stray + self._back * epsilon
            value = float(np.logaddexp.reduce([log_value, self.log_infinite, stray, math.log(jump) if jump > 0 else -math.inf]))
            return min(0.0, value + 8 * _EPS * (1 + abs(value)))
        total -= error + self._others(epsilon)
        log_value = scale - drift + math.log(total) if total > 0 else -math.inf
        value = float(np.logaddexp(log_value, math.log(jump))) if jump > 0 else log_value
        return value - 8 * _EPS * (1 + abs(value))

    def shape(self, points: Array) -> tuple[Array, Array]:
        """Returns about delta and P(loss > point) without jumps at these points (nats), also below 0: it steers."""
        blocks = -(-len(self.theta) // _BLOCK)
        terms = np.zeros((2, blocks * _BLOCK), dtype=np.complex128)
        terms[0, : len(self.theta)] = self._terms
        terms[1, : len(self.theta)] = self._terms * (self.tilt + 1 + 1j * self.theta)
        distance = self._centre - points
        fine = np.exp(1j * np.outer(self.theta[1] * np.arange(_BLOCK), distance))
        coarse = np.exp(1j * np.outer(self.theta[::_BLOCK], distance))
        total = ((terms.reshape(2, blocks, _BLOCK) @ fine) * coarse).real.sum(axis=1)
        with np.errstate(over="ignore"):
            delta, above = np.clip(np.exp(self.log_mgf - self.tilt * points) * total, 1e-300, 1.0)
        return delta, above

    @property
    def jump_other(self) -> float:
        """Q(any jump)."""
        return self._jumps.any_other

    def epsilon(self, log_delta: float, guess: float) -> float:
        """Returns a bound on the epsilon >= 0 at which delta is e^log_delta (infinite, or 0 below, if none is certified).

        Args:
          log_delta: log of delta.
          guess: where to look first (nats).
        """
        if self.upper and self.log_infinite >= log_delta:
            return math.inf
        return _Bracket(lambda x: self.log_delta(x) - log_delta, self.tilt, self.upper).run(max(guess, 0.0))


class _Jumps:
    """P and Q of the event that any release jumps, for both sides of the bound."""

    def __init__(self, parts: Sequence[tuple[PointLoss, int]], cut: float) -> None:
        self.any = self.any_other = 0.0
        if not any(part.losses.max() >= cut for part, _ in parts):
            return
        calm = ratio = calm_other = ratio_other = 0.0
        self._rounding = 64 * _EPS
        for part, count in parts:
            high = part.losses >= cut
            other = part.mass * np.exp(-part.losses)
            below, below_other = float(part.mass[~high].sum()), float(other[~high].sum())
            calm += count * math.log(below)
            calm_other += count * math.log(below_other) if below_other > 0 else -math.inf
            ratio += count * math.log1p(float(part.mass[high].sum()) / below)
            ratio_other += count * math.log1p(float(other[high].sum()) / below_other) if below_other > 0 else math.inf
            self._rounding += 4 * count * _EPS * (len(high) + 4)
        self.any = math.exp(min(calm, 700.0)) * math.expm1(ratio)
        finite = math.isfinite(calm_other) and math.isfinite(ratio_other) and max(calm_other, ratio_other) < 300.0
        self.any_other = math.exp(calm_other) * math.expm1(ratio_other) if finite else math.inf

    def delta(self, epsilon: float, *, upper: bool) -> float:
        """Returns P(any jump) - e^epsilon Q(any jump), rounded to the side asked for, and not below 0."""
        if self.any == 0.0:
            return 0.0
        if not math.isfinite(self.any_other) or epsilon > 700.0:  # nothing is known of Q
            return self.any * (1 + self._rounding) if upper else 0.0
        error = self._rounding if upper else -self._rounding
        return max(0.0, self.any * (1 + error) - math.exp(epsilon) * self.any_other * (1 - error))


class _Bracket:
    """Finds where a falling function crosses 0, on the side where it is <= 0 (`upper`) or > 0; steps of Newton's method."""

    def __init__(self, excess: Callable[[float], float], slope: float, upper: bool) -> None:
        self._excess, self._slope, self._upper = excess, slope, upper

    def run(self, guess: float) -> float:
        """Returns the certified end of a bracket whose ends agree to 10^-6, or the best found."""
        positive, negative = math.nan, math.nan  # where the excess is above 0, and where it is not
        at_positive = at_negative = 0.0
        x = guess
        for turn in range(60):
            value = self._excess(x)
            if value > 0:
                positive, at_positive = x, value
            else:
                negative, at_negative = x, value
                if x == 0.0:
                    return 0.0
            if not math.isnan(positive) and not math.isnan(negative):
                tolerance = 2e-7 * negative + 1e-300
                if negative - positive <= 2 * tolerance:
                    break
                share = at_positive / (at_positive - at_negative) if math.isfinite(at_positive - at_negative) and turn % 4 != 3 else 0.5
                x = positive + min(max(share, 0.0), 1.0) * (negative - positive)
                # Aim just beyond the estimate on the side that is still far.
                x += tolerance if negative - x > x - positive else -tolerance
            else:
                step = abs(value) / self._slope if math.isfinite(value) else 0.1 * x
                step = min(1.02 * step * (1 + turn) + 1e-9 * x, x + 1 / self._slope) + 1e-300
                x = max(x + step if value > 0 else x - step, 0.0)
        if self._upper:
            return math.inf if math.isnan(negative) else negative
        return 0.0 if math.isnan(positive) else positive


def _rotate(angle: Array) -> NDArray[np.complex128]:
    """Returns e^(i angle) - 1, relative precision kept."""
    half = np.sin(angle / 2)
    return 2 * half * (-half + 1j * np.cos(angle / 2))


def _characteristic(part: PointLoss, tilt: float, theta: Array) -> tuple[NDArray[np.complex128], float, Array]:
    """Returns x = E[e^(i theta (L - centre))] - 1 of the tilted loss, the centre, and a bound on the rounding error of x.

    theta is regular, so e^(i theta l) is a product of two short tables and the sum a product of matrices; with -1, (1 + a)
    (1 + b) - 1 = a b + a + b. All errors are then relative to x, which is small where many releases are composed.
    """
    log_mass = np.log(np.maximum(part.mass, 1e-320))
    exponent = log_mass + tilt * part.losses
    weight = np.exp(exponent - exponent.max())
    weight /= weight.sum()
    centre = float(weight @ part.losses)
    losses = part.losses - centre
    block = min(_BLOCK, math.isqrt(len(theta)) + 1)
    fine = _rotate(np.outer(losses, theta[:block])) * weight[:, None]
    coarse = _rotate(np.outer(theta[::block], losses))
    values = (coarse @ fine + (coarse @ weight)[:, None] + fine.sum(axis=0)).ravel()[: len(theta)]
    # A sum of J complex products errs by at most 2 J roundings of the sum of their sizes; |e^(i t) - 1| <= min(2, t).
    reach = float(weight @ np.abs(losses))
    wobble = weight * (np.abs(log_mass) + np.abs(tilt * part.losses) + abs(float(exponent.max())))
    error = (2 * len(weight) + 40) * np.minimum(8.0, 3 * theta * reach) + 4 * theta * reach
    error += 4 * np.minimum(2 * float(wobble.sum()), theta * float(wobble @ np.abs(losses)))
    return values, centre, _EPS * error


def _log_any(parts: Sequence[tuple[PointLoss, int]]) -> float:
    """Returns log of the probability that any release has infinite loss."""
    none = math.fsum(count * math.log1p(-min(part.infinite, 0.5)) for part, count in parts)
    return math.log(-math.expm1(none)) + 1e-12 if none < 0 else -math.inf
