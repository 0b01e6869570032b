"""`prv`: numerical composition of the privacy loss distribution. Near exact, always from above.

The loss of one release is rounded up to a grid (`discretise`) and composed by FFT (`composition`), on two or three
grids; the smallest of these bounds and of `rdp` is reported. The loss rounded down gives a certified lower value, so
the gap is visible. Full-batch releases (sample rate 1) compose to one Gaussian in closed form.

Both steps are our own because dp-accounting's lose what is needed here: its second differences of delta fail on grids
finer than about 1e-6, and its FFT has an absolute error of 1e-16 per release. Its distributions are the test oracle.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING

from accounting.accountant import NeighboringRelation, check_relation
from accounting.errors import AccountingError, check_delta, check_epsilon
from accounting.events import Events, SampledGaussian, normalise
from accounting.rdp import Pairs, RDPAccountant

if TYPE_CHECKING:
    from accounting.discretise import Pair

# Grid spacing / root-mean-square spread of the loss of one release. The excess falls with its square, so two grids
# show how much is left; if that is still too much, a third one is tried.
_SPACINGS = (1 / 8, 1 / 16)
_FINE = 1 / 48
_LOWER = 1 / 48
# Excess left in epsilon (relative) and in log delta that is good enough.
_GOOD = 4e-4
_GOOD_LOG_DELTA = 5e-4
_MAX_SUPPORT = 1 << 20
# Shares of delta (log) that may be moved to plus infinity in all releases together.
_LOG_SHARE = -11.0


@dataclass(frozen=True)
class Detail:
    """How an epsilon was obtained.

    Args:
      epsilon: the reported upper bound (nats).
      lower: a certified lower bound on the true epsilon (nats).
      grid_epsilon: the upper bound from the grid, infinite if no grid fitted.
      rdp_epsilon: the upper bound from `rdp`.
      method: "none" (no releases), "gaussian" (closed form), "grid", or "rdp" (the recorded fallback).
      interval: grid spacing used (nats), 0 without a grid.
    """

    epsilon: float
    lower: float
    grid_epsilon: float
    rdp_epsilon: float
    method: str
    interval: float


def gaussian_epsilon(mu: float, delta: float) -> float:
    """Returns epsilon of a Gaussian mechanism whose sensitivity is `mu` noise standard deviations, rounded up.

    Guarantee: delta(result) <= delta, checked in log space with a margin above the rounding error.
    Source: Balle, Wang 2018 (arXiv:1805.06530), theorem 8; composition: Dong, Roth, Su 2022 (arXiv:1905.02383), 3.3.
    """
    from dp_accounting import gaussian_mechanism  # type: ignore[import-untyped]

    target = math.log(delta)
    if gaussian_log_delta(mu, 0.0) <= target:
        return 0.0
    import numpy as np

    with np.errstate(all="ignore"):
        start = float(gaussian_mechanism.get_epsilon_gaussian(1.0 / mu, delta))
    step = 1e-12 * max(1.0, start)
    while gaussian_log_delta(mu, start) > target:
        start, step = start + step, 2 * step
    return start * (1 + 1e-10)


def gaussian_log_delta(mu: float, epsilon: float) -> float:
    """Returns log delta of the same mechanism, rounded up by more than its rounding error."""
    from scipy.special import log_ndtr  # type: ignore[import-untyped]

    first = float(log_ndtr(mu / 2 - epsilon / mu))
    second = epsilon + float(log_ndtr(-mu / 2 - epsilon / mu))
    # log(e^first - e^second): the rounding of both is relative to their size, which epsilon and mu scale.
    error = 1e-14 * (1.0 + abs(first) + epsilon)
    gap = min(second - first, -1e-300)
    return min(0.0, first + math.log(-math.expm1(gap - error)) + error)


class PRVAccountant:
    """Privacy-loss-distribution accountant of Poisson-sampled Gaussians.

    Args:
      relation: the neighbouring relation.

    Guarantee: an upper bound on epsilon (delta) of the composition; `detail` shows a certified lower bound beside it.
    Source: Koskela, Jalko, Honkela 2020; Doroshenko et al. 2022; Zhu, Dong, Wang 2022.
    """

    name = "prv"

    def __init__(self, relation: NeighboringRelation | str = "add_remove") -> None:
        self.relation = check_relation(relation, where="PRVAccountant")
        self._rdp = RDPAccountant(self.relation)

    def epsilon(self, events: Events, delta: float) -> float:
        """Returns an upper bound on epsilon.

        Args:
          events: (event, count) pairs.
          delta: in (0, 1).

        Returns:
          Epsilon in nats, 0 for no releases.
        """
        return self._detail(events, delta, certify=False).epsilon

    def detail(self, events: Events, delta: float) -> Detail:
        """Returns the reported epsilon with a certified lower value and what it was chosen from."""
        return self._detail(events, delta, certify=True)

    def _detail(self, events: Events, delta: float, *, certify: bool) -> Detail:
        delta = check_delta(delta, where="prv.epsilon")
        pairs = normalise(events)
        if not pairs:
            return Detail(0.0, 0.0, 0.0, 0.0, "none", 0.0)
        return _detail_of(self.relation, pairs, delta, certify)

    def _compute(self, pairs: Pairs, delta: float, certify: bool) -> Detail:
        rdp = self._rdp.epsilon(pairs, delta)
        mu, sampled = _split(pairs)
        if not sampled:
            exact = gaussian_epsilon(mu, delta)
            return Detail(min(exact, rdp), exact * (1 - 1e-9), exact, rdp, "gaussian", 0.0)
        log_delta = math.log(delta)
        grid, interval = self._upper(mu, sampled, log_delta=log_delta, budget=log_delta)
        best = min(grid, rdp)
        method = "grid" if grid <= rdp else "rdp"
        if not certify:
            return Detail(best, 0.0, grid, rdp, method, interval)
        found = self._evaluate(mu, sampled, _LOWER, upper=False, log_delta=log_delta, budget=log_delta)
        lower = max(0.0, found[0]) if found is not None else 0.0
        if lower > best * (1 + 1e-7):
            raise AccountingError(
                f"prv.detail: the certified lower value {lower!r} exceeds the upper bound {best!r} for {pairs!r} at"
                f" delta {delta!r}; this is a defect of dptrain, please report it."
            )
        return Detail(best, min(lower, best), grid, rdp, method, interval)

    def delta(self, events: Events, epsilon: float) -> float:
        """Returns an upper bound on delta at `epsilon` (nats), 0 for no releases."""
        epsilon = check_epsilon(epsilon, where="prv.delta")
        pairs = normalise(events)
        if not pairs:
            return 0.0
        log_bound = self._rdp.log_delta(pairs, epsilon)
        mu, sampled = _split(pairs)
        if not sampled:
            log_bound = min(log_bound, gaussian_log_delta(mu, epsilon))
        elif log_bound > -600.0:
            # The true delta lies a few orders of magnitude below the Renyi bound at most.
            budget = min(log_bound, 0.0) - 7.0
            log_bound = min(log_bound, self._upper(mu, sampled, epsilon=epsilon, budget=budget)[0])
        return min(1.0, max(math.exp(min(0.0, log_bound)), 5e-324))

    def _upper(
        self, mu: float, sampled: Pairs, *, budget: float, log_delta: float | None = None, epsilon: float | None = None
    ) -> tuple[float, float]:
        """Returns the best upper bound over the grids (infinite if none fits) and the interval it came from."""
        good = _GOOD if log_delta is not None else _GOOD_LOG_DELTA
        found: list[tuple[float, float]] = []
        for spacing in (*_SPACINGS, _FINE):
            if len(found) == 2:
                (coarse, _), (value, _) = found
                scale = abs(value) if log_delta is not None else 1.0
                if (coarse - value) / 3 <= good * scale:
                    break
            result = self._evaluate(mu, sampled, spacing, upper=True, budget=budget, log_delta=log_delta, epsilon=epsilon)
            if result is None:
                break
            found.append(result)
        return min(found) if found else (math.inf, 0.0)

    def _directions(self) -> tuple[str, ...]:
        # Replace-one's pair is its own mirror image. For add/remove the worse direction may change under composition.
        return ("replace",) if self.relation is NeighboringRelation.replace_one else ("remove", "add")

    def _evaluate(
        self,
        mu: float,
        sampled: Pairs,
        spacing: float,
        *,
        upper: bool,
        budget: float,
        log_delta: float | None = None,
        epsilon: float | None = None,
    ) -> tuple[float, float] | None:
        """Returns (bound, interval) for the worse direction on one grid, or None if it does not fit.

        Args:
          mu: sensitivity of the full-batch releases in noise standard deviations, 0 if there are none.
          sampled: the other releases.
          spacing: grid interval / spread of the loss of one release.
          upper: bound from above or from below.
          budget: log of the delta that sets how much tail may be cut.
          log_delta: bound epsilon at this delta, or
          epsilon: bound log delta at this epsilon.
        """
        import numpy as np

        from accounting.composition import Composition, GridTooLargeError, choose_window
        from accounting.discretise import discretise

        results: list[tuple[float, float]] = []
        for direction in self._directions():
            pairs = _with_gaussian(mu, sampled, direction)
            total = sum(count for _, count in pairs)
            # Rounded to whole nats, so that neighbouring calls of a calibration share their grids.
            cut = float(math.floor(budget + _LOG_SHARE - math.log(total)))
            low_cut = float(math.floor(-30.0 - math.log(total)))
            interval = _interval(pairs, spacing, cut, low_cut)
            # Rounding of the cell edges, release by release.
            drift = total * 1e-15 if upper else -total * 1e-15
            try:
                with np.errstate(all="ignore"):  # tails underflow; what is neglected is counted by Composition
                    parts = [(discretise(pair, interval, cut, low_cut, upper), count) for pair, count in pairs]
                    window = choose_window(parts, interval, log_delta=budget, epsilon=epsilon)
                    composition = Composition(parts, interval, window)
                    if log_delta is not None:
                        value = composition.epsilon(log_delta, upper=upper) + drift
                    else:
                        assert epsilon is not None
                        value = composition.log_delta(max(0.0, epsilon - drift), upper=upper)
            except (GridTooLargeError, OverflowError, FloatingPointError):
                return None
            if math.isnan(value):
                return None
            results.append((value, interval))
        return max(results)


@lru_cache(maxsize=256)  # a key holds its whole list of releases, which is long for noise that moves
def _detail_of(relation: NeighboringRelation, pairs: Pairs, delta: float, certify: bool) -> Detail:
    """A pure function of its arguments: a calibration, its check and the printed epsilon ask for the same values."""
    return PRVAccountant(relation)._compute(pairs, delta, certify)


def _split(pairs: Pairs) -> tuple[float, Pairs]:
    """Returns (mu of the full-batch releases as one Gaussian, the sampled ones): mu^2 is the sum of 1 / sigma^2."""
    square = math.fsum(n / e.noise_multiplier**2 for e, n in pairs if e.sample_rate == 1.0)
    return math.sqrt(square), tuple((e, n) for e, n in pairs if e.sample_rate < 1.0)


def _with_gaussian(mu: float, sampled: Pairs, direction: str) -> list[tuple[Pair, int]]:
    from accounting.discretise import Pair

    pairs = [(Pair(e.noise_multiplier, e.sample_rate, direction), n) for e, n in sampled]
    return [(Pair(1.0 / mu, 1.0, direction), 1), *pairs] if mu else pairs


def _interval(pairs: list[tuple[Pair, int]], spacing: float, cut: float, low_cut: float) -> float:
    """Returns the grid spacing: a fraction of the spread of one release, coarser if the supports would not fit."""
    from accounting.discretise import loss_spread, support

    variance = math.fsum(n * loss_spread(pair) ** 2 for pair, n in pairs)
    wanted = spacing * math.sqrt(variance / sum(n for _, n in pairs))
    limit = max(high - low for low, high in (support(pair, cut, low_cut) for pair, _ in pairs)) / _MAX_SUPPORT
    return max(wanted, limit, 1e-300)


__all__ = ["Detail", "PRVAccountant", "SampledGaussian", "gaussian_epsilon", "gaussian_log_delta"]
