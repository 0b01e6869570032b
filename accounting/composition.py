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
# Tilted mass below the window is at most e^-_WINDOW; above it the tilt itself suppresses what is left out.
_WINDOW = 27.0
_WINDOW_TILTED = 14.0
# Terms this far (in units of 1 / tilt) above epsilon are bounded by their largest weight instead of summed.
_NEGLIGIBLE = 45.0
_MAX_CELLS = 1 << 21
_COMFORTABLE = 1 << 19
_ROUNDING_SHARE = -7.0
_BINS = 4096


class GridTooLargeError(Exception):
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
    level: float
    down: float


_Function = Callable[[float], float]


def _chernoff_step(log_mgf: _Function, slope: _Function, level: float, cap: float) -> float:
    """Returns the t > 0 that minimises (log_mgf(t) + level) / t."""
    return _bisect_log(lambda t: t * slope(t) - log_mgf(t) - level, cap * 1e-14, cap, 1e-2)


def choose_window(parts: Sequence[tuple[GridLoss, int]], interval: float, *, log_delta: float, epsilon: float | None = None) -> Window:
    """Returns a tilt and the tilts that bound both tails, chosen so that the window is small.

    Args:
      parts: (loss of one release, count).
      interval: grid spacing (nats).
      log_delta: log of the delta asked for, or of a low guess of it.
      epsilon: if given, the epsilon (nats) to evaluate delta at.
    """
    steer = _Cumulants(parts, interval, bins=_BINS)
    cap = 60.0 / interval
    if epsilon is None:
        saddle = _chernoff_step(steer.value, steer.slope, -log_delta, cap)
    elif steer.slope(0.0) >= epsilon:
        saddle = 0.0
    else:
        saddle = _bisect_log(lambda t: steer.slope(t) - epsilon, cap * 1e-14, cap, 1e-2)
    best: tuple[float, Window] | None = None
    # At tiny sample rates the loss has a tail so heavy that the saddle point sits far out in it, where the tilted
    # distribution is as wide as the tail. A smaller tilt costs accuracy of the FFT (which is counted) and fits.
    releases = sum(count for _, count in parts)
    for tilt in (saddle, saddle / 3, saddle / 8, 0.0):
        at_saddle = tilt == saddle and saddle > 0
        # Away from the saddle point the rounding error counts e^(K - tilt eps) / delta times; require it to stay small.
        if best is not None and steer.value(tilt) - log_delta + math.log(64 * _EPS * releases) > _ROUNDING_SHARE:
            continue
        window, width = _window(steer, tilt, cap, None if at_saddle else -log_delta)
        if best is None or (best[0] > 0.9 * _MAX_CELLS * interval and width < best[0]):
            best = width, window
        if width < _COMFORTABLE * interval:
            best = width, window
            break
    assert best is not None
    return best[1]


def _window(steer: _Cumulants, tilt: float, cap: float, log_size: float | None) -> tuple[Window, float]:
    """Returns a window for this tilt and its width (nats); `log_size` is -log delta away from the saddle point."""
    base, mean = steer.value(tilt), steer.slope(tilt)
    levels = (_WINDOW_TILTED, _WINDOW) if log_size is None else (max(_WINDOW_TILTED, base + log_size + 12.0),)
    up = high = 0.0
    level = levels[0]
    for level in levels:
        up = _chernoff_step(lambda t: steer.value(tilt + t) - base, lambda t: steer.slope(tilt + t), level, cap)
        high = (steer.value(tilt + up) - base + level) / up
        if tilt * (high - mean) + level > _WINDOW:
            break
    down = _chernoff_step(lambda t: steer.value(tilt - t) - base, lambda t: -steer.slope(tilt - t), _WINDOW, cap)
    low = -(steer.value(tilt - down) - base + _WINDOW) / down
    return Window(tilt, up, level, down), high - low


class Composition:
    """The composed loss of `parts` on a window.

    Args:
      parts: (loss of one release, count), all on multiples of `interval`.
      interval: grid spacing (nats).
      window: from `choose_window`.

    Raises:
      GridTooLargeError: if the window needs more than 2^21 cells.
    """

    def __init__(self, parts: Sequence[tuple[GridLoss, int]], interval: float, window: Window) -> None:
        self.interval = interval
        self.tilt = window.tilt
        self.releases = sum(count for _, count in parts)
        self.log_infinite = _log_any(parts)
        exact = _Cumulants(parts, interval)
        self.log_mgf = exact.value(self.tilt)
        high = (exact.value(self.tilt + window.up) - self.log_mgf + window.level) / window.up
        low = -(exact.value(self.tilt - window.down) - self.log_mgf + _WINDOW) / window.down
        most = sum(count * (part.first + len(part.mass) - 1) for part, count in parts)
        least = sum(count * part.first for part, count in parts)
        self.shift = math.fsum(count * part.shift for part, count in parts)
        self.last = min(math.ceil((high - self.shift) / interval) + 1, most)
        self.first = max(math.floor((low - self.shift) / interval) - 1, least)
        zero = math.floor(-self.shift / interval) - 1
        if zero >= least and self.last - zero < max(2 * (self.last - self.first), 1 << 14):
            self.first = min(self.first, zero)  # so that an epsilon of 0 can be seen to suffice
        cells = self.last - self.first + 1
        if cells > _MAX_CELLS:
            raise GridTooLargeError(f"{cells} cells")
        # What the window does not hold: above it, nothing if it reaches the largest possible loss.
        self.above = 0.0 if self.last >= most else math.exp(-window.level)
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
        end = self.last - self.first + 1
        near = min(end, begin + 2 + math.ceil(min(_NEGLIGIBLE / (self.tilt * self.interval + 1e-300), end)))
        masses, far = self.mass[begin:near], self.mass[near:end]
        start = self.first + begin
        drift = 1e-9 + self.releases * 32 * _EPS
        with np.errstate(under="ignore", over="ignore"):
            if upper:
                total = self._sum(epsilon, np.maximum(masses, 0.0) + self.rounding, start) if len(masses) else 0.0
                if len(far):
                    total += math.exp(-_NEGLIGIBLE) * float(np.maximum(far, 0.0).sum() + len(far) * self.rounding)
                # Mass above the window, at losses >= last + 1: P(L >= b) <= e^(K - tilt b) times its tilted mass.
                total += self.above * math.exp(-self.tilt * max(0.0, self._loss(self.last) - epsilon))
                finite = self.log_mgf - self.tilt * epsilon + (math.log(total) if total > 0 else -math.inf) + drift
                return float(min(0.0, np.logaddexp(finite, self.log_infinite)))
            if not len(masses):
                return -math.inf
            total = self._sum(epsilon, np.maximum(masses - self.rounding, 0.0), start)
            # Aliased mass, at its largest possible weight: max over x of e^(-tilt x) (1 - e^-x) <= 1 / (1 + tilt).
            total -= self.outside / (1.0 + self.tilt)
            return self.log_mgf - self.tilt * epsilon + math.log(total) - drift if total > 0 else -math.inf

    def epsilon(self, log_delta: float, *, upper: bool) -> float:
        """Returns a bound on the epsilon >= 0 at which delta is e^log_delta (infinite if none is certified)."""
        low, high = max(0.0, self._loss(self.first)), max(0.0, self._loss(self.last + 1))
        if not upper:
            # Far below the tilted mean the subtracted errors win; start from the last point that still certifies.
            grid = np.linspace(low, high, 65)
            above = [x for x in grid if self.log_delta(float(x), upper=False) > log_delta]
            if not above:
                return 0.0
            low = float(above[-1])
        elif self.log_delta(low, upper=True) <= log_delta:
            return low  # not the smallest one, perhaps, but valid as it stands
        if self.log_delta(high, upper=upper) > log_delta:
            return math.inf if upper else high
        from scipy.optimize import brentq

        def excess(epsilon: float) -> float:
            return max(self.log_delta(epsilon, upper=upper) - log_delta, -1e3)

        tolerance = 1e-8 * high + 1e-300
        root = float(brentq(excess, low, high, xtol=tolerance, rtol=1e-9))
        # The root may lie on either side of the truth by the tolerance; step to the safe one until it is confirmed.
        step = tolerance + 2e-9 * root
        while (excess(root) > 0) if upper else (excess(root) < 0):
            root, step = (root + step, 2 * step) if upper else (max(root - step, low), 2 * step)
            if root <= low or root >= high:
                return high if upper else low
        return root


def _log_any(parts: Sequence[tuple[GridLoss, int]]) -> float:
    """Returns log of the probability that any release has infinite loss."""
    none = math.fsum(count * math.log1p(-min(part.infinite, 0.5)) for part, count in parts)
    return math.log(-math.expm1(none)) if none < 0 else -math.inf
