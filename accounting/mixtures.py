"""What a release costs: each kind of event as a mixture of two elementary pairs of distributions.

The mixture's indicator is revealed to both sides, so Renyi moments and privacy losses mix linearly. The elementary pairs are,
with N(c) the standard Gaussian noise around c times the sensitivity, all in noise standard deviations,

- *sampled*: N(0) against (1-q) N(0) + q N(1) in both orders (add_remove, zero_out), or (1-q) N(0) + q N(+1/2) against
  (1-q) N(0) + q N(-1/2) (replace_one);
- *swapped*: for alpha >= 1 the hockey-stick divergence of ((1-q) N(0) + q N(1), N(0)), for alpha < 1 that of (N(0), (1-q)
  N(0) + q N(1)). This is convex in alpha, so it is the profile of one pair: the losses above 0 of the first, the losses below 0 of
  the second, and an atom at 0 with what is left of the mass (Zhu, Dong, Wang 2022, arXiv:2106.08567, proposition 30 and theorem
  10). It bounds every ((1-q) N(0) + q N(a), (1-q) N(0) + q N(b)) whose three centres have distances of at most 1: by advanced
  joint convexity the divergence at alpha >= 1 is q times that of N(a) against a mixture of N(0) and N(b) at another alpha', and
  each of the two is at most that of N(1) against N(0). For alpha < 1 exchange the sides. Composing the first half alone would
  under-report (Lebeda et al. 2024, arXiv:2405.20769).

**Fixed size** (replace_one): draw the batch with the record's place left open. With probability q = B / N the record fills it, which
gives a centre a or b; otherwise another one does, centre 0. All distances are at most the replace-one sensitivity: *swapped*.

**Capped Poisson**. Let S be the draw of the N examples that both neighbours share (one less than the data set has under replace_one and
zero_out; that or as many under add_remove). A record x is drawn with probability q. If |S| < cap, reveal S, which x joins: *sampled*.
If |S| >= cap, draw also T, a uniform subset of S of `cap` examples, and y, uniform in T. Of the |S| + 1 drawn, x is kept with
probability cap / (|S| + 1), and what it displaces from T is uniform: take y. Reveal T and y (but not |S|, of which they are
independent): x enters with probability

    q' = q cap E[1 / (|S| + 1) | |S| >= cap] = cap / (N + 1) P(Binomial(N + 1, q) >= cap + 1) / P(Binomial(N, q) >= cap),

and the sum moves by x - y. What is revealed has the same law for both neighbours. So, with tau = P(Binomial(N, q) >= cap), which no
record influences, a step is *sampled* at rate q with weight 1 - tau, and with weight tau it is, under
- add_remove, the pair of N(0) and (1-q') N(0) + q' N(x - y);
- zero_out and replace_one, (1-q') N(0) + q' N(x - y) against (1-q') N(0) + q' N(x' - y): the displaced y is missing on both
  sides, so this is NOT the pair of an uncapped step, and a cap costs here, too.
The distances are at most twice the clipping norm, so all of them are bounded by *swapped*, at rate q', with half the noise multiplier
under add_remove and zero_out, with all of it under replace_one, where it is relative to twice the norm.
All divergences grow with the rate, as a mixture with the other side can only lower them, so rates may be rounded up. They grow with
each weight, too, as every loss adds to them: so where N is one of two, *sampled* has its weight at the smaller one, *swapped* its
weight at the larger one and its rate q', which falls with N, at the smaller; the weights then add up to more than 1.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

from accounting.accountant import NeighboringRelation
from accounting.binomial import log_tail
from accounting.errors import AccountingError
from accounting.events import Event, Events, SampledGaussian, normalise
from accounting.schemes import CappedGaussian, FixedSizeGaussian
from accounting.tuning import Tuning

Pairs = tuple[tuple[Event, int], ...]


@dataclass(frozen=True)
class Component:
    """One elementary pair of a release.

    Args:
      log_weight: log of its weight, rounded up.
      form: "sampled" or "swapped".
      sigma: noise standard deviation / the distance that is 1 in the pair.
      q: rate in (0, 1).
    """

    log_weight: float
    form: Literal["sampled", "swapped"]
    sigma: float
    q: float


def simplify(events: Events, relation: NeighboringRelation) -> Pairs:
    """Returns the same composition in as few kinds as possible: whatever equals a `SampledGaussian` becomes one.

    Args:
      events: (event, count) pairs.
      relation: the neighbouring relation.

    Raises:
      AccountingError: for an event that has no meaning under the relation.
    """
    if all(type(event) is SampledGaussian for event, _ in events):
        return tuple(events)
    plain: list[tuple[Event, int]] = []
    for event, count in events:
        if isinstance(event, Tuning) and event.distribution == "fixed":
            plain.extend(simplify(tuple((inner, n * int(event.tries) * count) for inner, n in event.events), relation))
        else:
            plain.append((_plain(event, relation), count))
    return normalise(plain)


def _plain(event: Event, relation: NeighboringRelation) -> Event:
    if isinstance(event, FixedSizeGaussian):
        if relation is not NeighboringRelation.replace_one:
            raise AccountingError(
                f"FixedSizeGaussian: batches of a fixed size have a guarantee under replace_one only, not {relation.value}: the number of"
                " examples must be the same for both neighbours; use relation replace_one (and its noise multiplier, relative to twice"
                " the clipping norm) or Poisson sampling."
            )
        return event if event.batch_size < event.num_examples else SampledGaussian(event.noise_multiplier, 1.0)
    if isinstance(event, CappedGaussian):
        log_over = _log_over(event, relation)
        if log_over == -math.inf:
            return SampledGaussian(event.noise_multiplier, event.sample_rate)
    return event


@lru_cache(maxsize=1024)
def _log_over(event: CappedGaussian, relation: NeighboringRelation) -> float:
    """Returns log of the probability that the others alone fill a batch, rounded up."""
    return log_tail(_others(event, relation)[1], event.sample_rate, event.max_batch_size)


def _log_room(event: CappedGaussian, relation: NeighboringRelation) -> float:
    """Returns log of the probability that the others leave room in a batch, rounded up; not 1 minus the above, which is rounded down."""
    others, cap, q = _others(event, relation)[0], event.max_batch_size, event.sample_rate
    if q == 1.0:
        return 0.0 if others < cap else -math.inf
    return log_tail(others, 1.0 - q, others - cap + 1)  # so many are not drawn


def _others(event: CappedGaussian, relation: NeighboringRelation) -> tuple[int, int]:
    """Returns how many examples both neighbours share, at least and at most: under add_remove the data set may be either of the two."""
    return event.num_examples - 1, event.num_examples - (relation is not NeighboringRelation.add_remove)


@lru_cache(maxsize=1024)
def _entering(event: CappedGaussian, relation: NeighboringRelation) -> float:
    """Returns the probability that a record enters a batch that the others alone fill, rounded up: q' of the module's docstring."""
    others, cap, q = _others(event, relation)[0], event.max_batch_size, event.sample_rate  # the more others, the less often
    log_ratio = log_tail(others + 1, q, cap + 1) - log_tail(others, q, cap, upper=False)
    exact = math.exp(min(log_ratio, 700.0)) * cap / (others + 1) * (1 + 1e-12)
    return min(exact, q * cap / (cap + 1) * (1 + 1e-15)) if math.isfinite(exact) else q * cap / (cap + 1) * (1 + 1e-15)


def without_rare(events: Pairs, relation: NeighboringRelation) -> tuple[Pairs, float]:
    """Returns the events given that no cap binds, and log of the probability that one does: a delta to be paid.

    Source: the probability does not depend on a record; on the event that no cap binds the steps are *sampled*.
    """
    plain: list[tuple[Event, int]] = []
    logs = []
    for event, count in events:
        if isinstance(event, CappedGaussian):
            logs.append(_log_over(event, relation) + math.log(count))
            event = SampledGaussian(event.noise_multiplier, event.sample_rate)
        plain.append((event, count))
    most = max(logs, default=-math.inf)
    log_paid = most + math.log(math.fsum(math.exp(value - most) for value in logs)) + 1e-12 if most > -math.inf else -math.inf
    return normalise(plain), log_paid


def components(event: Event, relation: NeighboringRelation) -> tuple[Component, ...]:
    """Returns the elementary pairs of one release of a simplified event; together their weights are at least 1.

    Args:
      event: any kind with a sample rate below 1, but `Tuning`.
      relation: the neighbouring relation.

    Guarantee: the mixture of the pairs dominates the release.
    """
    if isinstance(event, SampledGaussian):
        return (Component(0.0, "sampled", event.noise_multiplier, event.sample_rate),)
    if isinstance(event, FixedSizeGaussian):
        return (Component(0.0, "swapped", event.noise_multiplier, event.sample_rate),)
    if isinstance(event, CappedGaussian):
        over, sigma, q = _log_over(event, relation), event.noise_multiplier, event.sample_rate
        usual = Component(_log_room(event, relation), "sampled", sigma, q)
        entering = max(_entering(event, relation), 1e-300)
        rare = Component(over, "swapped", sigma if relation is NeighboringRelation.replace_one else sigma / 2, entering)
        return tuple(part for part in (usual, rare) if part.log_weight > -math.inf)
    raise TypeError(f"no mixture is known for {event!r}")


def attained(event: Event, relation: NeighboringRelation) -> tuple[SampledGaussian, bool] | None:
    """Returns a pair that some data and some function of them do attain, for a certified lower bound; None if none is known.

    Args:
      event: a simplified event.
      relation: the neighbouring relation.

    Returns:
      (event, whether its pair is that of add_remove although the relation is replace_one). Capped: everyone else contributes
      nothing, so the pair is *sampled* at the rate at which a record is in a batch, q (1 - tau) + q' tau. Fixed size: everyone
      else contributes -C, as the record does on one side: the sums are N(0) and (1-q) N(0) + q N(1).
    """
    if isinstance(event, SampledGaussian):
        return event, False
    if isinstance(event, FixedSizeGaussian):
        return SampledGaussian(event.noise_multiplier, event.sample_rate), True
    if isinstance(event, CappedGaussian):
        others, cap, q = _others(event, relation)[1], event.max_batch_size, event.sample_rate
        full = math.exp(log_tail(others + 1, q, cap + 1, upper=False)) * cap / (others + 1)
        rate = (q * -math.expm1(_log_over(event, relation)) + full) * (1 - 1e-12)
        return (SampledGaussian(event.noise_multiplier, rate), False) if rate > 1e-15 else None
    return None
