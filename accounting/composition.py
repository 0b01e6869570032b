"""The composed privacy loss on a grid: one tilted FFT, every neglected quantity added back.

A plain FFT of a loss distribution carries an absolute error of about 1e-16 per release, which drowns a delta of 1e-10
after 10^6 steps. Tilting by e^(lambda loss) (Esscher, saddle-point) moves the bulk of the distribution to the epsilon
asked for, so the error becomes relative to delta itself, and only a window of a few standard deviations around that
point is needed, whatever the size of epsilon.

With K(lambda) = log E[e^(lambda L)] of the composed finite loss and y its tilted mass function,

    delta(eps) = P(L = inf) + e^(K - lambda eps) sum_{a > eps} y(a) e^(-lambda (a - eps)) (1 - e^-(a - eps)).

Source: Koskela, Jalko, Honkela 2020 (arXiv:1906.03049) for the FFT; Chernoff bounds for what leaves the window.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from accounting.discretise import GridLoss

Array = NDArray[np.float64]

_EPS = float(np.finfo(np.float64).eps)
# Tilted mass outside the window is at most e^-_WINDOW on each side.
_WINDOW = 27.0
_MAX_CELLS = 1 << 21
_BINS = 4096


class DoesNotFit(Exception):
    """The window needs more cells than allowed; the caller falls back to a coarser grid or to `rdp`."""


class _Cumulants:
    """K(lambda) of a composition, exactly on the grid, or steered by a coarser histogram."""

    def __init__(self, parts: Sequence[tuple[GridLoss, int]], interval: float, bins: int | None = None) -> None:
        self._parts: list[tuple[Array, Array, int]] = []
        for part, count in parts:
            losses = part.losses(interval)
            mass = part.mass
            if bins is not None and len(mass) > 2 * bins:
                width = -(-len(mass) // bins)
                starts = np.arange(0, len(mass), width)
                total = np.add.reduceat(mass, starts)
                losses = np.add.reduceat(mass * losses, starts) / np.maximum(total, 1e-300)
                mass = total
            keep = mass > 0
            self._parts.append((np.log(mass[keep]), losses[keep], count))

    def value(self, tilt: float) -> float:
        total = 0.0
        for log_mass, losses, count in self._parts:
            exponent = log_mass + tilt * losses
            top = float(exponent.max())
            total += count * (top + math.log(float(np.exp(exponent - top).sum())))
        return total

    def slope(self, tilt: float) -> float:
        total = 0.0
        for log_mass, losses, count in self._parts:
            exponent = log_mass + tilt * losses
            weight = np.exp(exponent - exponent.max())
            total += count * float(weight @ losses) / float(weight.sum())
        return total


def _bisect_log(function: Callable[[float], float], low: float, high: float, tolerance: float) -> float:
    """Returns where an increasing function crosses 0, searched on a logarithmic scale (an end if it never does)."""
    if function(high) <= 0:
        return high
    if function(low) >= 0:
        return low
    from scipy.optimize import brentq  # type: ignore[import-untyped]

    root = brentq(lambda s: function(math.exp(s)), math.log(low), math.log(high), xtol=tolerance, rtol=1e-12)
    return math.exp(root)


@dataclass(frozen=True)
class Window:
    """Which tilt, and which grid points, a composition is evaluated on. Any choice is valid; a good one is tight."""

    tilt: float
    up: float
    down: float


def _chernoff_step(log_mgf: Callable[[float], float], slope: Callable[[float], float], level: float, cap: float) -> float:
    """Returns the t > 0 that minimises (log_mgf(t) + level) / t."""
    return _bisect_log(lambda t: t * slope(t) - log_mgf(t) - level, cap * 1e-14, cap, 1e-2)


def choose_window(
    parts: Sequence[tuple[GridLoss, int]],
    interval: float,
    *,
    log_delta: float | None = None,
    epsilon: float | None = None,
) -> Window:
    """Returns the saddle point for a delta (given as its log) or for an epsilon, and the tilts that bound both tails."""
    steer = _Cumulants(parts, interval, bins=_BINS)
    cap = 60.0 / interval
    if log_delta is not None:
        tilt = _chernoff_step(steer.value, steer.slope, -log_delta, cap)
    else:
        assert epsilon is not None
        target = epsilon
        tilt = 0.0 if steer.slope(0.0) >= target else _bisect_log(lambda t: steer.slope(t) - target, cap * 1e-14, cap, 1e-2)
    base = steer.value(tilt)
    up = _chernoff_step(lambda t: steer.value(tilt + t) - base, lambda t: steer.slope(tilt + t), _WINDOW, cap)
    down = _chernoff_step(lambda t: steer.value(tilt - t) - base, lambda t: -steer.slope(tilt - t), _WINDOW, cap)
    return Window(tilt, up, down)


class Composition:
    """The composed loss of `parts` on a window.

    Args:
      parts: (loss of one release, count), all on multiples of `interval`.
      interval: grid spacing (nats).
      window: from `choose_window`.

    Raises:
      DoesNotFit: if the window needs more than 2^21 cells.
    """

    def __init__(self, parts: Sequence[tuple[GridLoss, int]], interval: float, window: Window) -> None:
        self.interval = interval
        self.tilt = window.tilt
        self.releases = sum(count for _, count in parts)
        self.log_infinite = _log_any(parts)
        exact = _Cumulants(parts, interval)
        self.log_mgf = exact.value(self.tilt)
        high = (exact.value(self.tilt + window.up) - self.log_mgf + _WINDOW) / window.up
        low = -(exact.value(self.tilt - window.down) - self.log_mgf + _WINDOW) / window.down
        most = sum(count * (part.first + len(part.mass) - 1) for part, count in parts)
        least = sum(count * part.first for part, count in parts)
        self.shift = math.fsum(count * part.shift for part, count in parts)
        self.last = min(math.ceil((high - self.shift) / interval) + 1, most)
        self.first = max(math.floor((low - self.shift) / interval) - 1, least)
        cells = self.last - self.first + 1
        if cells > _MAX_CELLS:
            raise DoesNotFit(f"{cells} cells")
        # What the window does not hold: above it, nothing if it reaches the largest possible loss.
        self.above = 0.0 if self.last >= most else math.exp(-_WINDOW)
        self.outside = self.above + (0.0 if self.first <= least else math.exp(-_WINDOW))
        self.mass, self.rounding = self._convolve(parts, max(cells, 16))

    def _convolve(self, parts: Sequence[tuple[GridLoss, int]], cells: int) -> tuple[Array, float]:
        """Returns the tilted mass on [first, first + n) modulo n, and a bound on its pointwise rounding error."""
        from scipy import fft

        n = int(fft.next_fast_len(cells, real=True))
        log_size, phase = np.zeros(n // 2 + 1), np.zeros(n // 2 + 1)
        sensitivity = np.zeros(n // 2 + 1)
        offset = 0
        for part, count in parts:
            losses = part.losses(self.interval)
            with np.errstate(divide="ignore"):
                exponent = np.log(part.mass) + self.tilt * losses
            weight = np.exp(exponent - exponent.max())
            weight /= weight.sum()
            # Centring keeps the phase small, so that raising to a power of 10^6 does not amplify its rounding.
            centre = round(float(weight @ np.arange(len(weight))))
            folded = np.bincount((np.arange(len(weight)) - centre) % n, weights=weight, minlength=n)
            spectrum = fft.rfft(folded)
            size = np.maximum(np.abs(spectrum), 1e-300)
            log_size += count * np.log(size)
            phase += count * np.angle(spectrum)
            sensitivity += count / np.maximum(size, _EPS)
            offset += count * (part.first + centre)
        magnitude = np.exp(log_size)
        y = fft.irfft(magnitude * np.exp(1j * phase), n)
        error = _EPS * (8 + math.log2(n)) * 2 * float(np.mean(magnitude * sensitivity + magnitude))
        return np.roll(y, (offset - self.first) % n)[:n], error

    def _loss(self, index: int) -> float:
        return index * self.interval + self.shift

    def _sum(self, epsilon: float, masses: Array, start: int) -> float:
        """Returns sum of masses * e^(-tilt (a - eps)) (1 - e^-(a - eps)) over the grid losses a above epsilon."""
        distance = (start + np.arange(len(masses))) * self.interval - (epsilon - self.shift)
        return float(masses @ (np.exp(-self.tilt * distance) * -np.expm1(-distance)))

    def log_delta(self, epsilon: float, *, upper: bool) -> float:
        """Returns log of a bound on delta(epsilon): above the truth of the discretised pair if `upper`, else below it.

        Guarantee: rounding, aliasing and truncation are all counted against the side asked for.
        """
        begin = max(0, math.floor((epsilon - self.shift) / self.interval) + 1 - self.first)
        # Window points beyond `last` exist only to round n up; above it they hold aliased mass.
        masses = self.mass[begin : self.last - self.first + 1]
        start = self.first + begin
        drift = 1e-9 + self.releases * 32 * _EPS
        with np.errstate(under="ignore", over="ignore"):
            if upper:
                total = self._sum(epsilon, np.maximum(masses, 0.0) + self.rounding, start) if len(masses) else 0.0
                # Mass above the window, at losses >= last + 1: P(L >= b) <= e^(K - tilt b) times its tilted mass.
                total += self.above * math.exp(-self.tilt * max(0.0, self._loss(self.last) - epsilon))
                finite = self.log_mgf - self.tilt * epsilon + (math.log(total) if total > 0 else -math.inf) + drift
                return float(min(0.0, np.logaddexp(finite, self.log_infinite)))
            if not len(masses):
                return -math.inf
            total = self._sum(epsilon, np.maximum(masses - self.rounding, 0.0), start) - self.outside
            return self.log_mgf - self.tilt * epsilon + math.log(total) - drift if total > 0 else -math.inf

    def epsilon(self, log_delta: float, *, upper: bool) -> float:
        """Returns a bound on the epsilon >= 0 at which delta is e^log_delta (infinite if no finite one is certified)."""
        low, high = max(0.0, self._loss(self.first)), max(0.0, self._loss(self.last + 1))
        if self.log_delta(low, upper=upper) <= log_delta:
            # Upper: valid as it stands. Lower: the crossing is below the window, so only 0 is certain.
            return low if upper else 0.0
        if self.log_delta(high, upper=upper) > log_delta:
            return math.inf if upper else high
        while high - low > 1e-7 * high + 1e-15:
            middle = 0.5 * (low + high)
            if self.log_delta(middle, upper=upper) <= log_delta:
                high = middle
            else:
                low = middle
        return high if upper else low


def _log_any(parts: Sequence[tuple[GridLoss, int]]) -> float:
    """Returns log of the probability that any release has infinite loss."""
    none = math.fsum(count * math.log1p(-min(part.infinite, 0.5)) for part, count in parts)
    return math.log(-math.expm1(none)) if none < 0 else -math.inf
