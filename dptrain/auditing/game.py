"""The distinguishing game of one release: in or out, many times, with the example that tells most.

A release without sampling is a Gaussian mechanism, so what it claims is a whole trade-off curve, and error rates outside of the curve
refute it. The test looks at the release along three directions that a defect could show in, and learns how to combine them from one half of
the trials.
"""

from __future__ import annotations

import math

import numpy as np

from dptrain.auditing.bounds import FALSE_ALARM, Array, Coins, ErrorRates, error_rates
from dptrain.auditing.checks import claim, crowd, replaces
from dptrain.auditing.findings import Finding
from dptrain.auditing.subject import Subject


def gaussian_trade_off(noise_multiplier: float, false_positive: float) -> float:
    """The smallest false-negative rate that a Gaussian mechanism allows.

    Source: Dong, Roth, Su 2022 (arXiv:1905.02383), equation (6).
    """
    from scipy.stats import norm  # type: ignore[import-untyped]

    return float(norm.cdf(norm.isf(min(max(false_positive, 1e-300), 1.0)) - 1.0 / noise_multiplier))


def unit(v: Array) -> Array:
    """A vector of length one; zero stays zero."""
    length = float(np.linalg.norm(v))
    return v / length if length > 0 else v


def play(subject: Subject, alone: list[Array], trials: int, seed: int = 0) -> tuple[Array, Coins]:
    """Many releases with and without one example; for ``replace_one``, with it and with the one most opposed to it.

    Args:
        subject: the step.
        alone: of ``checks.contributions``.
        trials: releases in all.
        seed: of the coins.
    Returns:
        Features ``[trials, 3]``: along the example's contribution, along the others' sum, length of the rest; coins ``[trials]``.
    """
    canary = int(np.argmax([np.linalg.norm(v) for v in alone]))
    base, other = crowd(alone, subject.size - 1), list[int]()
    if replaces(subject):
        canary, replaced = furthest(alone)
        other = [replaced]
    coins = np.random.default_rng(seed).permutation(np.arange(trials) % 2).astype(bool)
    first = unit(alone[canary] - sum((alone[i] for i in other), np.zeros_like(alone[canary])))
    total = subject.total(base)
    second = unit(total - (total @ first) * first)
    rows = []
    for coin in coins:
        seen = subject.release([*base, canary] if coin else [*base, *other])
        along, across = float(seen @ first), float(seen @ second)
        rest = max(0.0, float(seen @ seen) - along**2 - across**2)
        rows.append((along, across, math.sqrt(rest)))
    return np.array(rows), coins


def furthest(alone: list[Array]) -> tuple[int, int]:
    """The two examples whose contributions are furthest apart."""
    rows = np.stack(alone)
    square = (rows**2).sum(1)
    distance = square[:, None] + square[None, :] - 2 * rows @ rows.T
    first, second = np.unravel_index(int(np.argmax(distance)), distance.shape)
    return int(first), int(second)


def direction(features: Array, coins: Coins) -> Array:
    """Fisher's discriminant, with a little ridge."""
    inside, outside = features[coins], features[~coins]
    spread = np.cov(inside.T) + np.cov(outside.T)
    ridge = 1e-9 * np.trace(spread) + 1e-12
    found: Array = np.linalg.solve(spread + ridge * np.eye(len(spread)), inside.mean(0) - outside.mean(0))
    return found


def distinguish(subject: Subject, alone: list[Array], trials: int, delta: float, seed: int = 0) -> Finding:
    """Play, and compare error rates with the trade-off curve of the recorded event.

    Args:
        subject: the step.
        alone: of ``checks.contributions``.
        trials: releases; half of them choose the test.
        delta: at which a lower bound on epsilon of one release is stated.
        seed: of the coins.
    Returns:
        The finding.
    Guarantee: a Gaussian mechanism with the recorded noise multiplier fails with a chance of one in a million at most.
    """
    features, coins = play(subject, alone, trials, seed)
    learn, test = slice(None, trials // 2), slice(trials // 2, None)
    scores = features @ direction(features[learn], coins[learn])
    claimed = min(claim(event) for event, _ in subject.ledger.events)
    grid = np.quantile(scores[learn], np.linspace(0.1, 0.9, 33))
    before = [error_rates(scores[learn][coins[learn]], scores[learn][~coins[learn]], t, FALSE_ALARM) for t in grid]
    best = int(np.argmax([gaussian_trade_off(claimed, r.false_positive) - r.false_negative for r in before]))
    inside = coins[test]
    found: ErrorRates = error_rates(scores[test][inside], scores[test][~inside], float(grid[best]), FALSE_ALARM)
    least = gaussian_trade_off(claimed, found.false_positive)
    passed = found.false_negative >= least
    return Finding(
        "one release", bool(passed),
        f"{trials} releases with and without one example: false-positive rate at most {found.false_positive:.4g}, false-negative "
        f"rate at most {found.false_negative:.4g}, where noise multiplier {claimed:.4g} allows no less than {least:.4g}",
        {"epsilon_lower_bound": found.epsilon(delta), "false_positive": found.false_positive, "false_negative": found.false_negative},
    )  # fmt: skip
