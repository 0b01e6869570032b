"""`rdp`: Renyi accounting. Fast, always applicable, a few per cent to tens of per cent above the truth.

autodp supplies the curve at integer orders and composes it; `renyi.log_moment` supplies every order, fractional ones
too (at small noise the best order lies below 2, where integer orders alone overstate epsilon by half). Each order gives
a valid bound, so the smallest one is reported.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from accounting.accountant import NeighboringRelation, check_relation
from accounting.errors import check_delta, check_epsilon, check_nonnegative
from accounting.events import Events, SampledGaussian, normalise

if TYPE_CHECKING:
    from accounting.renyi import Array

Pairs = tuple[tuple[SampledGaussian, int], ...]

# Orders are 1 + 10^(k / _PER_DECADE): a fixed lattice, so that log-moments are cached across calls.
# Fine, because at tiny sample rates the best order is a sharp kink.
_PER_DECADE = 256
_COARSE = 64
_FIRST, _LAST = -4 * _PER_DECADE, 7 * _PER_DECADE
_MAX_DOWNHILL, _FINE_ORDERS = 100, 1000.0
# autodp tabulates every order up to the one asked for; larger ones are ours alone, and so are long noise schedules.
_AUTODP_MAX_ORDER = 40
_AUTODP_MAX_EVENTS = 8
_AUTODP_ROUNDING = 1e-12


def _order(k: float) -> float:
    return 1.0 + 10.0 ** (k / _PER_DECADE)


def _log_moment(pairs: Pairs, order: float, replace_one: bool) -> float:
    """Returns the composed (order - 1) * Renyi divergence: it adds up (Mironov 2017, proposition 1)."""
    from accounting.renyi import log_moment

    return math.fsum(n * log_moment(e.noise_multiplier, e.sample_rate, order, replace_one) for e, n in pairs)


@lru_cache(maxsize=64)
def _autodp_curve(pairs: Pairs, last: int = _AUTODP_MAX_ORDER) -> Callable[[int], float]:
    """Returns autodp's composed Renyi divergence as a function of an integer order up to `last` (add/remove only)."""
    saved = list(sys.path)
    try:
        from autodp.rdp_acct import anaRDPacct  # type: ignore[import-untyped]
        from autodp.rdp_bank import RDP_gaussian  # type: ignore[import-untyped]
    finally:
        sys.path[:] = saved  # autodp appends ".." on import, which would shadow the user's modules
    accountant: Any = anaRDPacct(m=last)
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


def _minimise(rough: Callable[[Array], Array], objective: Callable[[float], float]) -> tuple[float, float]:
    """Returns (value, order) of a small objective on the lattice.

    Args:
      rough: about the objective at many orders, to find where to look: coarse, then ever finer around the best.
      objective: the bound itself, from where `rough` is smallest downhill.
    """
    import numpy as np

    best, ks = 0, np.arange(_FIRST, _LAST + 1, _COARSE)
    for spacing in (_COARSE // 8, 1, 0):
        values = np.nan_to_num(rough(1.0 + 10.0 ** (ks / _PER_DECADE)), nan=np.inf)
        best = int(ks[int(np.argmin(values))])
        ks = np.clip(best + spacing * np.arange(-7, 8), _FIRST, _LAST)
    # Huge orders are slow, and their neighbours close.
    at, seen = float(best), dict[float, float]()
    for step in (4.0,) if _order(best) > _FINE_ORDERS else (4.0, 1.0, 0.25, 0.0625):
        turn = 0
        while turn < _MAX_DOWNHILL:
            around = [k for k in (at - step, at, at + step) if _FIRST <= k <= _LAST]
            seen.update({k: objective(_order(k)) for k in around if k not in seen})
            if (smallest := min(around, key=seen.__getitem__)) == at:
                break
            at, turn = smallest, turn + 1
    return seen[at], _order(at)


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
        return self._delta(normalise(events), check_epsilon(epsilon, where="rdp.delta"))

    def _delta(self, pairs: Pairs, epsilon: float) -> float:
        if not pairs:
            return 0.0
        # A bound that underflows must not become "impossible".
        return min(1.0, max(math.exp(min(0.0, self.log_delta(pairs, epsilon))), 5e-324))

    def profile(self, events: Events, epsilons: Sequence[float]) -> tuple[float, ...]:
        """Returns upper bounds on delta at many epsilons (nats, at least 0)."""
        wanted = [check_nonnegative(epsilon, "epsilon", where="rdp.profile") for epsilon in epsilons]
        pairs = normalise(events)
        return tuple(self._delta(pairs, epsilon) for epsilon in wanted)

    def advantage(self, events: Events) -> float:
        """Returns an upper bound on the total variation distance: delta at epsilon 0."""
        return self.profile(events, [0.0])[0]

    def log_delta(self, pairs: Pairs, epsilon: float) -> float:
        """Returns an upper bound on log delta (may be far below the range of a float's exponential)."""
        return self._best(pairs, lambda order, moment: _log_delta_at(order, moment, epsilon))

    def _best(self, pairs: Pairs, bound: Callable[[float, float], float]) -> float:
        value, order = self._own_best(pairs, bound)
        foreign = self._replace_one and any(event.sample_rate < 1.0 for event, _ in pairs)
        if foreign or len(pairs) > _AUTODP_MAX_EVENTS or order > _AUTODP_MAX_ORDER - 1:
            return value
        import numpy as np

        whole = max(2, math.floor(order))
        curve = _autodp_curve(pairs, whole + 2)
        for whole_order in {whole, math.floor(order) + 1}:
            with np.errstate(all="ignore"):
                divergence = curve(whole_order)
            if math.isfinite(divergence) and divergence >= 0.0:
                # autodp sums terms of size 1, so its log-moment carries an absolute rounding error per release; where
                # the moment itself is that small (q near 1e-6) the error would otherwise look like privacy.
                moment = (whole_order - 1) * divergence * (1 + 1e-10) + _AUTODP_ROUNDING * sum(n for _, n in pairs)
                value = min(value, bound(float(whole_order), moment))
        return value

    def _own_best(self, pairs: Pairs, bound: Callable[[float, float], float]) -> tuple[float, float]:
        """Returns the smallest bound from our own curve and its order."""
        import numpy as np

        from accounting.renyi import rough_log_moments

        def rough(orders: Array) -> Array:
            moments = np.zeros_like(orders)
            for event, n in pairs:
                moments += n * rough_log_moments(event.noise_multiplier, event.sample_rate, orders, self._replace_one)
            return np.array([bound(float(a), float(m)) for a, m in zip(orders, moments, strict=True)])

        return _minimise(rough, lambda a: bound(a, _log_moment(pairs, a, self._replace_one)))
