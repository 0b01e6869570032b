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

from accounting.accountant import NeighboringRelation, advantage_of, check_relation
from accounting.errors import check_delta, check_epsilon, check_nonnegative
from accounting.events import Event, Events, SampledGaussian, normalise
from accounting.mixtures import Pairs, components, simplify, without_rare
from accounting.schemes import CappedGaussian
from accounting.tuning import Tuning

if TYPE_CHECKING:
    from accounting.renyi import Array

Plain = tuple[tuple[SampledGaussian, int], ...]

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
# Logs of the epsilons from which the advantage is bounded.
_EPSILON_GRID = tuple(float(x) for x in range(-12, 4))


def _order(k: float) -> float:
    return 1.0 + 10.0 ** (k / _PER_DECADE)


def _log_moment(pairs: Pairs, order: float, relation: NeighboringRelation) -> float:
    """Returns the composed (order - 1) * Renyi divergence: it adds up (Mironov 2017, proposition 1)."""
    return math.fsum(n * _one_log_moment(e, order, relation) for e, n in pairs)


def _one_log_moment(event: Event, order: float, relation: NeighboringRelation) -> float:
    """Returns an upper bound on (order - 1) * Renyi divergence of one release."""
    from accounting.renyi import log_moment

    if isinstance(event, SampledGaussian):
        return log_moment(event.noise_multiplier, event.sample_rate, order, relation is NeighboringRelation.replace_one)
    return _other_log_moment(event, order, relation)


@lru_cache(maxsize=1 << 14)
def _other_log_moment(event: Event, order: float, relation: NeighboringRelation) -> float:
    import numpy as np

    from accounting.renyi import log_moment

    if isinstance(event, Tuning):
        inner = simplify(event.events, relation)
        return float(_tuned(event, relation, np.array([order]), np.array([_log_moment(inner, order, relation)]))[0])
    replace_one = relation is NeighboringRelation.replace_one
    return float(
        _mixed(
            event,
            np.array([order]),
            relation,
            lambda sigma, q, orders, replace: np.array([log_moment(sigma, q, float(a), replace) for a in orders]),
            replace_one,
        )[0]
    )


def _mixed(
    event: Event, orders: Array, relation: NeighboringRelation, moments: Callable[[float, float, Array, bool], Array], replace_one: bool
) -> Array:
    """Returns the log-moments of a mixture of elementary pairs from those of the pairs."""
    import numpy as np

    from accounting.renyi import mixed_log_moment, swapped_log_moment

    rows, weights = [], []
    for part in components(event, relation):
        if part.form == "sampled":
            rows.append(moments(part.sigma, part.q, orders, replace_one))
        else:
            rows.append(swapped_log_moment(moments(part.sigma, part.q, orders, False)))
        weights.append(part.log_weight)
    return mixed_log_moment(np.array(weights), np.array(rows))


def _rough_log_moments(event: Event, orders: Array, relation: NeighboringRelation) -> Array:
    """Returns about the log-moments of one release at many orders; it steers."""
    import numpy as np

    from accounting.renyi import rough_log_moments

    replace_one = relation is NeighboringRelation.replace_one
    if isinstance(event, SampledGaussian):
        return rough_log_moments(event.noise_multiplier, event.sample_rate, orders, replace_one)
    if isinstance(event, Tuning):
        inner = np.zeros_like(orders)
        for one, n in simplify(event.events, relation):
            inner += n * _rough_log_moments(one, orders, relation)
        return _tuned(event, relation, orders, inner)
    return _mixed(event, orders, relation, rough_log_moments, replace_one)


def _tuned(event: Tuning, relation: NeighboringRelation, orders: Array, inner: Array) -> Array:
    """Returns (order - 1) * Renyi divergence of a search from that of one run.

    Source: Papernot, Steinke 2022 (arXiv:2110.03620), theorem 2, multiplied by lambda - 1, with (lambda_hat - 1) epsilon_hat =
      the log-moment at lambda_hat; theorem 6, where the outcome "no run at all" adds P(K = 0), the same for both neighbours.
    """
    import numpy as np

    log_tries = math.log(event.tries) + 1e-12
    if event.shape is not None:
        return inner + (orders - 1) * (1 + event.shape) * _search_price(event, relation) + log_tries
    log_delta = np.array([_log_delta_of_run(event, relation, float(order)) for order in orders])
    with np.errstate(over="ignore"):
        moments = inner + (orders - 1) * event.tries * np.exp(np.minimum(log_delta, 0.0)) * (1 + 1e-12) + log_tries
    out: Array = np.logaddexp(moments, -event.tries)
    return out


@lru_cache(maxsize=256)
def _search_price(event: Tuning, relation: NeighboringRelation) -> float:
    """Returns the smallest (1 - 1 / l) epsilon(l) + log(1 / gamma) / l over the orders l: theorem 2's lambda_hat."""
    import numpy as np

    inner, log_inverse = simplify(event.events, relation), -math.log(event.gamma)

    def rough(orders: Array) -> Array:
        moments = np.zeros_like(orders)
        for one, n in inner:
            moments += n * _rough_log_moments(one, orders, relation)
        return (moments + log_inverse) / orders

    return _minimise(rough, lambda order: (_log_moment(inner, order, relation) + log_inverse) / order)[0] * (1 + 1e-12)


@lru_cache(maxsize=1 << 12)
def _log_delta_of_run(event: Tuning, relation: NeighboringRelation, order: float) -> float:
    """Returns log delta of one run at the largest epsilon that theorem 6 admits: e^epsilon = 1 + 1 / (order - 1)."""
    return RDPAccountant(relation).log_delta(simplify(event.events, relation), math.log1p(1 / (order - 1)) * (1 - 1e-12))


@lru_cache(maxsize=64)
def _autodp_curve(pairs: Plain, last: int = _AUTODP_MAX_ORDER) -> Callable[[int], float]:
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
    """Renyi accountant of all kinds of events.

    Args:
      relation: the neighbouring relation.

    Guarantee: an upper bound on epsilon (delta) for the composition; tens of milliseconds.
    Source: Mironov, Talwar, Zhang 2019; Canonne, Kamath, Steinke 2020; Wang, Balle, Kasiviswanathan 2019 (autodp).
    """

    name = "rdp"

    def __init__(self, relation: NeighboringRelation | str = "add_remove") -> None:
        self.relation = check_relation(relation, where="RDPAccountant")

    def _pairs(self, events: Events) -> Pairs:
        return simplify(normalise(events), self.relation)

    def epsilon(self, events: Events, delta: float) -> float:
        """Returns an upper bound on epsilon.

        Args:
          events: (event, count) pairs.
          delta: in (0, 1).

        Returns:
          Epsilon in nats, 0 for no releases.
        """
        log_delta = math.log(check_delta(delta, where="rdp.epsilon"))
        pairs = self._pairs(events)
        if not pairs:
            return 0.0
        if self._log_variation(pairs) <= log_delta:
            return 0.0
        value = self._best(pairs, lambda order, moment: _epsilon_at(order, moment, log_delta))
        if any(isinstance(event, CappedGaussian) for event, _ in pairs):
            # A moment makes much of a cap that hardly ever binds; delta may pay for it instead.
            usual, log_paid = without_rare(pairs, self.relation)
            if log_paid < log_delta:
                rest = log_delta + math.log1p(-math.exp(log_paid - log_delta)) - 1e-12
                value = min(value, self._best(usual, lambda order, moment: _epsilon_at(order, moment, rest)))
        return max(0.0, value)

    def delta(self, events: Events, epsilon: float) -> float:
        """Returns an upper bound on delta at `epsilon` (nats), 0 for no releases."""
        return self._delta(self._pairs(events), check_epsilon(epsilon, where="rdp.delta"))

    def _delta(self, pairs: Pairs, epsilon: float) -> float:
        if not pairs:
            return 0.0
        # A bound that underflows must not become "impossible".
        return min(1.0, max(math.exp(min(0.0, self.log_delta(pairs, epsilon))), 5e-324))

    def profile(self, events: Events, epsilons: Sequence[float]) -> tuple[float, ...]:
        """Returns upper bounds on delta at many epsilons (nats, at least 0)."""
        wanted = [check_nonnegative(epsilon, "epsilon", where="rdp.profile") for epsilon in epsilons]
        pairs = self._pairs(events)
        return tuple(self._delta(pairs, epsilon) for epsilon in wanted)

    def advantage(self, events: Events) -> float:
        """Returns an upper bound on the total variation distance, from the best of many epsilons: near 0 the bounds on delta are poor."""
        pairs = self._pairs(events)
        if not pairs:
            return 0.0

        def at(x: float) -> float:
            return advantage_of(math.exp(x), self._delta(pairs, math.exp(x)))

        best = min(_EPSILON_GRID, key=at)
        for step in (0.5, 0.25, 0.125):  # a finer look around the best
            best = min((best - step, best, best + step), key=at)
        return min(at(best), self._delta(pairs, 0.0))

    def log_delta(self, pairs: Pairs, epsilon: float) -> float:
        """Returns an upper bound on log delta (may be far below the range of a float's exponential)."""
        value = min(self._best(pairs, lambda order, moment: _log_delta_at(order, moment, epsilon)), self._log_variation(pairs))
        if any(isinstance(event, CappedGaussian) for event, _ in pairs):
            import numpy as np

            usual, log_paid = without_rare(pairs, self.relation)
            rest = self._best(usual, lambda order, moment: _log_delta_at(order, moment, epsilon))
            value = min(value, float(np.logaddexp(rest, log_paid)) + 1e-12)
        return value

    def _log_variation(self, pairs: Pairs) -> float:
        """Returns an upper bound on log of the total variation distance, which is never below delta.

        Source: Bretagnolle, Huber 1979: its square is at most 1 - e^-KL, and KL at most the Renyi divergence of any order above 1.
        """
        if any(isinstance(event, Tuning) and event.shape is None for event, _ in pairs):
            return 0.0  # the bound of a Poisson number of runs asks for delta itself
        order = _order(_FIRST)
        divergence = _log_moment(pairs, order, self.relation) / (order - 1) * (1 + 1e-9)
        return min(0.0, math.log(max(-math.expm1(-divergence), 1e-320)) / 2 + 1e-12)

    def _best(self, pairs: Pairs, bound: Callable[[float, float], float]) -> float:
        value, order = self._own_best(pairs, bound)
        plain = tuple((event, n) for event, n in pairs if isinstance(event, SampledGaussian))
        foreign = len(plain) < len(pairs) or (
            self.relation is NeighboringRelation.replace_one and any(event.sample_rate < 1.0 for event, _ in plain)
        )
        if foreign or len(pairs) > _AUTODP_MAX_EVENTS or order > _AUTODP_MAX_ORDER - 1:
            return value
        import numpy as np

        whole = max(2, math.floor(order))
        curve = _autodp_curve(plain, whole + 2)
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

        def rough(orders: Array) -> Array:
            moments = np.zeros_like(orders)
            for event, n in pairs:
                moments += n * _rough_log_moments(event, orders, self.relation)
            return np.array([bound(float(a), float(m)) for a, m in zip(orders, moments, strict=True)])

        return _minimise(rough, lambda a: bound(a, _log_moment(pairs, a, self.relation)))
