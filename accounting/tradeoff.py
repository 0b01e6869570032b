"""What an attacker can achieve: the trade-off between false alarms and misses, certified from finitely many (epsilon, delta).

A membership test that raises a false alarm with probability alpha misses a member with probability at least f(alpha), the
trade-off function of the composition. For every epsilon and every delta >= delta(epsilon)

    f(alpha) >= max(0, 1 - delta - e^epsilon alpha, e^-epsilon (1 - delta - alpha)),

so the largest of these over any finite set of pairs is a valid lower bound; more pairs only make it tighter. The largest
advantage, true-positive minus false-positive rate, is delta(0), and at most (e^epsilon - 1 + 2 delta) / (e^epsilon + 1) for every pair.

Source: Wasserman and Zhou 2010; Dong, Roth, Su 2022 (arXiv:1905.02383), propositions 2.4 and 2.12.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING

from accounting.accountant import NeighboringRelation, advantage_of, check_relation, get_accountant
from accounting.errors import AccountingError, check_count, check_nonnegative
from accounting.events import Events, normalise

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Array = NDArray[np.float64]

# The curve is made to be tight for false-positive rates from here on; it is valid below.
_LEAST_RATE = 1e-6
# Epsilons at which delta is smaller than this say nothing more about such rates.
_LEAST_DELTA = 1e-9
_POINTS = 129
# Covers the rounding of every expression below.
_ROUNDING = 1e-15


@dataclass(frozen=True)
class TradeOff:
    """Bounds on every membership attack against one composition.

    Args:
      epsilons: at least 0, rising (nats).
      deltas: upper bounds on delta at these epsilons.
      relation: the neighbouring relation: what the attacker tries to tell apart.
      accountant: name of the accountant that gave the deltas.

    Raises:
      AccountingError: for an empty set, unequal lengths, epsilons that do not rise, or numbers out of range.

    Guarantee: no attack on a single example (no test between two neighbouring data sets), whatever it knows beside,
      does better than the bounds returned here.
    Source: Dong, Roth, Su 2022 (arXiv:1905.02383), propositions 2.4 and 2.12.
    """

    epsilons: tuple[float, ...]
    deltas: tuple[float, ...]
    relation: str
    accountant: str

    def __post_init__(self) -> None:
        epsilons = tuple(check_nonnegative(value, "epsilons", where="TradeOff") for value in self.epsilons)
        deltas = tuple(check_nonnegative(value, "deltas", where="TradeOff") for value in self.deltas)
        rising = all(a < b for a, b in pairwise(epsilons))
        if not epsilons or len(epsilons) != len(deltas) or not rising or max(deltas) > 1.0:
            raise AccountingError(
                f"TradeOff: needs as many deltas in [0, 1] as rising epsilons, got {len(epsilons)} epsilons and"
                f" {len(deltas)} deltas; make it with trade_off()."
            )
        object.__setattr__(self, "epsilons", epsilons)
        object.__setattr__(self, "deltas", deltas)
        object.__setattr__(self, "relation", check_relation(self.relation, where="TradeOff").value)

    @property
    def advantage(self) -> float:
        """Upper bound on the largest true-positive minus false-positive rate of any attack: the total variation distance."""
        return min(advantage_of(epsilon, delta) for epsilon, delta in zip(self.epsilons, self.deltas, strict=True))

    def type_two_error(self, type_one_error: float) -> float:
        """Returns a lower bound on the share of members that an attack misses.

        Args:
          type_one_error: share of non-members that it takes for members, alpha in [0, 1].
        """
        alpha = _check_rate(type_one_error, "type_one_error")
        return max(0.0, *(self._missed(alpha, epsilon, delta) for epsilon, delta in zip(self.epsilons, self.deltas, strict=True)))

    @staticmethod
    def _missed(alpha: float, epsilon: float, delta: float) -> float:
        growth = math.exp(epsilon) if epsilon < 700.0 else math.inf
        first = 1.0 - delta - growth * alpha if alpha > 0.0 else 1.0 - delta
        second = (1.0 - delta - alpha) * math.exp(-epsilon)
        slip = growth * alpha if alpha > 0.0 else 0.0
        return max(first - _ROUNDING * (1.0 + slip) if math.isfinite(first) else -math.inf, second - _ROUNDING * math.exp(-epsilon)) * (
            1 - _ROUNDING
        )

    def true_positive_rate(self, false_positive_rate: float) -> float:
        """Returns an upper bound on the share of members that an attack finds.

        Args:
          false_positive_rate: share of non-members that it takes for members, in [0, 1].
        """
        alpha = _check_rate(false_positive_rate, "false_positive_rate")
        # Not 1 - type_two_error: small rates would lose their digits.
        found = [1.0 - self.type_two_error(alpha)]
        pairs = zip(self.epsilons, self.deltas, strict=True)
        found += [delta + (math.exp(epsilon) * alpha if alpha > 0.0 else 0.0) for epsilon, delta in pairs if epsilon < 700.0]
        return min(1.0, min(found) * (1 + _ROUNDING))

    def curve(self, points: int = 201) -> tuple[Array, Array]:
        """Returns (false-positive rates from 0 to 1, lower bounds on the false-negative rates), for a plot.

        Args:
          points: how many; half of them are spaced evenly in the logarithm towards either end.
        """
        import numpy as np

        half = check_count(points, "points", where="TradeOff.curve") // 2
        if half < 1:
            raise AccountingError(f"TradeOff.curve: points must be at least 2, got {points}; 201 make a smooth line.")
        small = np.geomspace(_LEAST_RATE, 0.5, half)
        rates = np.unique(np.concatenate([[0.0], small, 1.0 - small, [1.0]]))
        return rates, np.array([self.type_two_error(float(rate)) for rate in rates])


def trade_off(
    events: Events,
    relation: NeighboringRelation | str = "add_remove",
    accountant: str = "prv",
    *,
    points: int = _POINTS,
) -> TradeOff:
    """Returns certified bounds on every membership attack against a composition.

    Args:
      events: (event, count) pairs.
      relation: the neighbouring relation.
      accountant: name in ACCOUNTANTS.
      points: number of epsilons; the default is tight to about 0.1 % of the true-positive rate (with "prv").

    Raises:
      AccountingError: for invalid input.

    Guarantee: see `TradeOff`.
    """
    count = check_count(points, "points", where="trade_off")
    if count < 2:
        raise AccountingError(f"trade_off: points must be at least 2, got {count}; the default is {_POINTS}.")
    judge, pairs = get_accountant(accountant, relation), normalise(events)
    # Beyond e^epsilon = 1 / rate the bound on the true-positive rate at this rate is 1.
    most = min(judge.epsilon(pairs, _LEAST_DELTA), -math.log(_LEAST_RATE))
    if most == 0.0:
        epsilons: tuple[float, ...] = (0.0,)
    else:
        # Dense at 0, where the loss of a sampled mechanism has most of its mass.
        shares = (i / (count - 1) for i in range(count))
        epsilons = tuple(sorted({most * (share + share * share) / 2 for share in shares}))
    return TradeOff(epsilons, judge.profile(pairs, epsilons), judge.relation.value, judge.name)


def _check_rate(value: float, name: str) -> float:
    rate = check_nonnegative(value, name, where="TradeOff")
    if rate > 1.0:
        raise AccountingError(f"TradeOff: {name} must lie in [0, 1], got {rate!r}; it is a share of all cases.")
    return rate
