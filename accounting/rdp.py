"""`rdp`: Renyi accounting. Fast, always applicable, a few per cent to tens of per cent above the truth.

autodp supplies the curve at integer orders and composes it; `renyi.log_moment` supplies every order, fractional ones
too (at small noise the best order lies below 2, where integer orders alone overstate epsilon by half). Each order gives
a valid bound, so the smallest one is reported.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from functools import lru_cache
from typing import Any

from accounting.accountant import NeighboringRelation, check_relation
from accounting.errors import check_delta, check_epsilon
from accounting.events import Events, SampledGaussian, normalise

Pairs = tuple[tuple[SampledGaussian, int], ...]

# Orders are 1 + 10^(k / _PER_DECADE): a fixed lattice, so that log-moments are cached across calls.
# Fine, because at tiny sample rates the best order is a sharp kink.
_PER_DECADE = 256
_COARSE = 64
_FIRST, _LAST = -4 * _PER_DECADE, 7 * _PER_DECADE
# autodp tabulates binomials up to here; larger orders are ours alone.
_AUTODP_MAX_ORDER = 100
# Each distinct event costs autodp a call per order; long noise schedules use our curve alone.
_AUTODP_MAX_EVENTS = 32
_AUTODP_ROUNDING = 1e-12


def _order(k: int) -> float:
    return 1.0 + 10.0 ** (k / _PER_DECADE)


def _log_moment(pairs: Pairs, order: float, replace_one: bool) -> float:
    """Returns the composed (order - 1) * Renyi divergence: it adds up (Mironov 2017, proposition 1)."""
    from accounting.renyi import log_moment

    return math.fsum(n * log_moment(e.noise_multiplier, e.sample_rate, order, replace_one) for e, n in pairs)


@lru_cache(maxsize=64)
def _autodp_curve(pairs: Pairs) -> Callable[[int], float]:
    """Returns autodp's composed Renyi divergence as a function of an integer order (add/remove only)."""
    saved = list(sys.path)
    try:
        from autodp.rdp_acct import anaRDPacct  # type: ignore[import-untyped]
        from autodp.rdp_bank import RDP_gaussian  # type: ignore[import-untyped]
    finally:
        sys.path[:] = saved  # autodp appends ".." on import, which would shadow the user's modules
    accountant: Any = anaRDPacct(m=_AUTODP_MAX_ORDER)
    for event, count in pairs:
        # One function object per event: autodp keys its caches by it. The loop variable is bound as a default.
        def curve(order: float, sigma: float = event.noise_multiplier) -> float:
            return float(RDP_gaussian({"sigma": sigma}, order))

        if event.sample_rate == 1.0:
            accountant.compose_mechanism(curve, coeff=count)
        else:
            accountant.compose_poisson_subsampled_mechanisms(curve, event.sample_rate, coeff=count)
    accountant.build_zeroth_oracle()
    return lambda order: float(accountant.evalRDP(order))


def _epsilon_at(order: float, log_moment: float, log_delta: float) -> float:
    """Returns epsilon from one order.

    Source: Canonne, Kamath, Steinke 2020 (arXiv:2004.00010), proposition 12.
    """
    rest = order - 1.0
    return log_moment / rest + math.log1p(-1.0 / order) - (log_delta + math.log(order)) / rest


def _log_delta_at(order: float, log_moment: float, epsilon: float) -> float:
    """Returns log delta from one order: the same proposition, solved for delta."""
    rest = order - 1.0
    return log_moment - rest * epsilon + rest * math.log1p(-1.0 / order) - math.log(order)


def _minimise(objective: Callable[[float], float]) -> tuple[float, float]:
    """Returns (value, order) of the smallest objective on the lattice: coarse scan, then ever finer around the best."""
    seen = {k: objective(_order(k)) for k in range(_FIRST, _LAST + 1, _COARSE)}
    step = _COARSE // 2
    while step:
        best = min(seen, key=seen.__getitem__)
        for k in (best - step, best + step):
            if k not in seen and _FIRST <= k <= _LAST:
                seen[k] = objective(_order(k))
        step //= 2
    best = min(seen, key=seen.__getitem__)
    return seen[best], _order(best)


class RDPAccountant:
    """Renyi accountant of Poisson-sampled Gaussians.

    Args:
      relation: the neighbouring relation.

    Guarantee: an upper bound on epsilon (delta) for the composition; tens of milliseconds.
    Source: Mironov, Talwar, Zhang 2019; Canonne, Kamath, Steinke 2020; Wang, Balle, Kasiviswanathan 2019 (autodp).
    """

    name = "rdp"

    def __init__(self, relation: NeighboringRelation | str = "add_remove") -> None:
        self.relation = check_relation(relation, where="RDPAccountant")

    @property
    def _replace_one(self) -> bool:
        return self.relation is NeighboringRelation.replace_one

    def epsilon(self, events: Events, delta: float) -> float:
        """Returns an upper bound on epsilon.

        Args:
          events: (event, count) pairs.
          delta: in (0, 1).

        Returns:
          Epsilon in nats, 0 for no releases.
        """
        log_delta = math.log(check_delta(delta, where="rdp.epsilon"))
        pairs = normalise(events)
        if not pairs:
            return 0.0
        value = self._best(pairs, lambda order, moment: _epsilon_at(order, moment, log_delta))
        return max(0.0, value)

    def delta(self, events: Events, epsilon: float) -> float:
        """Returns an upper bound on delta at `epsilon` (nats), 0 for no releases."""
        epsilon = check_epsilon(epsilon, where="rdp.delta")
        pairs = normalise(events)
        if not pairs:
            return 0.0
        # A bound that underflows must not become "impossible".
        return min(1.0, max(math.exp(min(0.0, self.log_delta(pairs, epsilon))), 5e-324))

    def log_delta(self, pairs: Pairs, epsilon: float) -> float:
        """Returns an upper bound on log delta (may be far below the range of a float's exponential)."""
        return self._best(pairs, lambda order, moment: _log_delta_at(order, moment, epsilon))

    def _best(self, pairs: Pairs, bound: Callable[[float, float], float]) -> float:
        value, order = _minimise(lambda a: bound(a, _log_moment(pairs, a, self._replace_one)))
        foreign = self._replace_one and any(event.sample_rate < 1.0 for event, _ in pairs)
        if foreign or len(pairs) > _AUTODP_MAX_EVENTS or order > _AUTODP_MAX_ORDER - 1:
            return value
        import numpy as np

        curve = _autodp_curve(pairs)
        for whole in {max(2, math.floor(order)), math.floor(order) + 1}:
            with np.errstate(all="ignore"):
                divergence = curve(whole)
            if math.isfinite(divergence) and divergence >= 0.0:
                # autodp sums terms of size 1, so its log-moment carries an absolute rounding error per release; where
                # the moment itself is that small (q near 1e-6) the error would otherwise look like privacy.
                moment = (whole - 1) * divergence * (1 + 1e-10) + _AUTODP_ROUNDING * sum(n for _, n in pairs)
                value = min(value, bound(float(whole), moment))
        return value
