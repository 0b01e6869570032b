"""Whether what is printed of a ledger can be true: certified lower values, and draws of the privacy loss itself."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from accounting import NeighboringRelation, SampledGaussian, get_accountant
from accounting.prv import PRVAccountant
from dptrain.auditing.bounds import FALSE_ALARM, Array
from dptrain.auditing.findings import Finding
from dptrain.setup import Setup

DRAWS = 50_000
MOST_DRAWS = 10**8
COARSE = (0.1, 0.01, 0.003)  # deltas at which draws can refute; the claim holds at every delta


def accountant_finding(events: Any, setup: Setup, statement: Mapping[str, Any]) -> Finding:
    """The epsilon that is printed is not below what is certified to be the least, nor above the budget.

    The accountant is asked for twice as many releases too: one that forgets what came before would answer alike.

    Args:
        events: of the run's ledger.
        setup: the run.
        statement: what the run said of itself, as in ``privacy.json``.
    Returns:
        The finding; exact.
    """
    privacy = setup.config.privacy
    accountant = get_accountant(privacy.accountant, privacy.relation)
    twice = [(event, 2 * count) for event, count in events]
    rows = []
    for many, found in (("", events), ("twice ", twice)):
        least = PRVAccountant(privacy.relation).detail(found, privacy.target_delta).lower
        rows.append((many, accountant.epsilon(found, privacy.target_delta), least))
    printed = float(statement.get("epsilon", math.nan))
    rows.append(("the statement on ", printed, rows[0][2]))
    wrong = [row for row in rows if not row[1] >= row[2] * (1 - 1e-9)]
    many, claimed, least = wrong[0] if wrong else rows[0]
    over = privacy.target_epsilon is not None and printed > privacy.target_epsilon * (1 + 1e-9)
    other = statement.get("delta") != privacy.target_delta or statement.get("neighboring_relation") != privacy.relation.value
    text = f"accountant {privacy.accountant} says {claimed:.6g}; {many}the recorded releases have at least {least:.6g}"
    text += f"; that is OVER the budget of {privacy.target_epsilon:.6g}" if over else ""
    text += "; the statement speaks of ANOTHER delta or relation" if other else ""
    return Finding("accountant", not wrong and not over and not other, text, {"claimed": claimed, "certified_least": least})


def drawn_losses(events: Any, rng: np.random.Generator) -> Array:
    """Privacy losses of runs with an example against runs without it, drawn from the definition.

    Args:
        events: (event, count) pairs, all sampled Gaussians.
        rng: draws.
    Returns:
        ``[DRAWS]``; of fewer releases than the events have, where these are too many to draw.
    Source: for ``x ~ (1 - q) N(0, sigma^2) + q N(1, sigma^2)`` the loss against ``N(0, sigma^2)`` is
        ``log(1 - q + q exp((2 x - 1) / (2 sigma^2)))``; those of several releases add up.
    """
    losses, left = np.zeros(DRAWS), MOST_DRAWS // DRAWS
    for event, count in events:
        q, sigma = event.sample_rate, event.noise_multiplier
        for _ in range(min(count, left)):
            x = sigma * rng.standard_normal(DRAWS) + (rng.random(DRAWS) < q)
            w = (2 * x - 1) / (2 * sigma**2)
            losses += w if q >= 1 else np.logaddexp(np.log1p(-q), math.log(q) + w)
        left -= min(count, left)
    return losses


def losses_finding(events: Any, setup: Setup, seed: int) -> Finding | None:
    """The accountant's epsilon at a large delta against drawn privacy losses, which need no accountant.

    Returns:
        The finding at one in a million; None where the releases are no sampled Gaussians, or where replacing an example cannot be drawn so.
    """
    privacy = setup.config.privacy
    replaced = NeighboringRelation(privacy.relation) is NeighboringRelation.replace_one
    if any(not isinstance(event, SampledGaussian) or (replaced and event.sample_rate < 1) for event, _ in events):
        return None
    accountant, losses = get_accountant(privacy.accountant, privacy.relation), drawn_losses(events, np.random.default_rng([seed, 3]))
    rows = []
    for delta in COARSE:
        claimed = accountant.epsilon(events, delta)
        rows.append((delta_at_least(losses, claimed, FALSE_ALARM / len(COARSE)) / delta, claimed, delta))
    ratio, claimed, delta = max(rows)
    text = f"at delta = {delta:g} the accountant says {claimed:.6g}, where drawn losses have delta at least {ratio * delta:.4g}"
    return Finding("drawn losses", bool(ratio <= 1), text, {"claimed": claimed, "delta_lower_bound": ratio * delta})


def delta_at_least(losses: Array, epsilon: float, error: float) -> float:
    """A lower bound on the delta at an epsilon, from drawn losses.

    Args:
        losses: of ``drawn_losses``.
        epsilon: nats.
        error: chance that the bound is too high.
    Returns:
        The bound, 0 or more.
    Source: delta is the mean of ``max(0, 1 - e^(epsilon - loss))``; Maurer and Pontil 2009 (arXiv:0907.3740), theorem 4, for the mean of
        numbers in [0, 1] from their own spread.
    """
    values = np.maximum(0.0, -np.expm1(epsilon - np.maximum(losses, epsilon)))
    log, count = math.log(2 / error), len(losses)
    return max(0.0, float(values.mean()) - math.sqrt(2 * float(values.var(ddof=1)) * log / count) - 7 * log / (3 * (count - 1)))
