"""From guesses to lower bounds on epsilon: how sure one may be that a mechanism is less private than it says.

Two games. In the *repeated* game one release is made many times, with and without one example; error rates with Clopper and Pearson's
intervals refute a trade-off curve or give a lower bound. In *one run* many examples are each in or out by a coin of their own, and the
auditor guesses the coins from the outcome of a single training run.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
Coins = NDArray[np.bool_]

# Chance that a sound mechanism is called broken by one finding.
FALSE_ALARM = 1e-6


def rate_above(successes: int, trials: int, error: float) -> float:
    """An upper confidence bound on a rate.

    Args:
        successes: number of successes.
        trials: independent trials.
        error: chance that the bound is too low.
    Returns:
        The bound; 1 without trials.
    Source: Clopper and Pearson 1934.
    """
    from scipy.stats import beta  # type: ignore[import-untyped]

    return 1.0 if successes >= trials else float(beta.ppf(1.0 - error, successes + 1, trials - successes))


@dataclass(frozen=True)
class ErrorRates:
    """Upper confidence bounds on the two errors of one test, which hold together.

    Args:
        false_positive: says "in" though it was out.
        false_negative: says "out" though it was in.
        error: chance that one of them is too low.
    """

    false_positive: float
    false_negative: float
    error: float

    def epsilon(self, delta: float) -> float:
        """A lower bound on epsilon at this delta, nats.

        Guarantee: an (epsilon, delta)-private mechanism exceeds it with chance ``error`` at most.
        Source: Kairouz, Oh, Viswanath 2015 (arXiv:1311.0776), theorem 2.1; Nasr et al. 2021 (arXiv:2101.04535).
        """
        fpr, fnr = self.false_positive, self.false_negative
        ratios = [(1 - delta - fnr) / fpr, (1 - delta - fpr) / fnr]
        return max(0.0, *(math.log(r) if r > 0 else 0.0 for r in ratios))


def error_rates(scores_in: Array, scores_out: Array, threshold: float, error: float) -> ErrorRates:
    """Bounds on the errors of "in if the score exceeds the threshold".

    Args:
        scores_in, scores_out: of independent trials that the threshold was not chosen on.
        threshold: the threshold.
        error: chance that a bound is too low.
    Returns:
        The bounds.
    """
    positive = rate_above(int((scores_out > threshold).sum()), len(scores_out), error / 2)
    negative = rate_above(int((scores_in <= threshold).sum()), len(scores_in), error / 2)
    return ErrorRates(positive, negative, error)


def one_run_p_value(canaries: int, guesses: int, correct: int, epsilon: float, delta: float) -> float:
    """Chance that an (epsilon, delta)-private mechanism lets an auditor guess so well.

    Args:
        canaries: m, examples that were each in or out by a fair coin.
        guesses: r of them on which a guess was made; chosen from the outcome alone.
        correct: v right guesses.
        epsilon, delta: the claim.
    Returns:
        An upper bound on the chance of ``v`` or more right guesses.
    Source: Steinke, Nasr, Jagielski 2023 (arXiv:2305.08846), theorem 5.2: P[V >= v] <= P[W >= v] + 2 m delta max_i P[v > W >= v - i] / i, W
        binomial with r trials of chance e^eps / (1 + e^eps).
    """
    from scipy.stats import binom

    chance = 1.0 / (1.0 + math.exp(-epsilon))
    tail = float(binom.sf(correct - 1, guesses, chance))
    if correct == 0:
        return 1.0
    below = np.cumsum(binom.pmf(np.arange(correct - 1, -1, -1), guesses, chance))  # P[v > W >= v - i], i = 1 ..
    steepest = float((below / np.arange(1, correct + 1)).max())
    return min(1.0, tail + 2 * canaries * delta * steepest)


def one_run_epsilon(canaries: int, guesses: int, correct: int, delta: float, error: float) -> float:
    """A lower bound on epsilon from the guesses of one run.

    Args:
        canaries, guesses, correct, delta: as ``one_run_p_value``.
        error: chance that the bound is too high.
    Returns:
        The largest epsilon (nats, to 1e-4, rounded down) that is refuted; 0 if none is.
    """
    low, high = 0.0, 50.0
    if one_run_p_value(canaries, guesses, correct, low, delta) > error:
        return 0.0
    while high - low > 1e-4:
        middle = (low + high) / 2
        refuted = one_run_p_value(canaries, guesses, correct, middle, delta) <= error
        low, high = (middle, high) if refuted else (low, middle)
    return low


@dataclass(frozen=True)
class Guesses:
    """The guesses of one run.

    Args:
        canaries: m.
        tries: (guesses, right ones) for each number of guesses that was fixed beforehand.
    """

    canaries: int
    tries: tuple[tuple[int, int], ...]

    def epsilon(self, delta: float, error: float) -> float:
        """A lower bound on epsilon; the chance of error is shared among the tries (Bonferroni)."""
        share = error / len(self.tries)
        return max(one_run_epsilon(self.canaries, r, v, delta, share) for r, v in self.tries)

    def p_value(self, epsilon: float, delta: float) -> float:
        """Chance of guessing so well if the claim holds, for all tries together."""
        return min(1.0, len(self.tries) * min(one_run_p_value(self.canaries, r, v, epsilon, delta) for r, v in self.tries))


def guess(scores: Array, inside: Coins) -> Guesses:
    """Guess "in" for the highest scores and "out" for the lowest.

    Args:
        scores: ``[m]``; the higher, the more likely in.
        inside: ``[m]``, the coins.
    Returns:
        How many were right, for guesses on all canaries, a half, a quarter ... down to 8 of them.
    """
    order, count = np.argsort(scores, kind="stable"), len(scores)
    tries: list[tuple[int, int]] = []
    sides = count // 2
    while sides >= 4 or not tries:
        low, high = order[:sides], order[count - sides :]
        tries.append((2 * sides, int((~inside[low]).sum() + inside[high].sum())))
        sides //= 2
    return Guesses(count, tuple(tries))
