"""Whether the coins of a sampler are independent of each other: of two examples, and of two steps however far apart.

``checks.sampling`` looks at one example and at neighbouring steps. A sampler that draws two examples always together, or every fifth batch
alike, gives each of them its rate, and is not what accountants speak of.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from dptrain.auditing.bounds import FALSE_ALARM, Array
from dptrain.auditing.findings import Finding
from dptrain.auditing.normal import furthest_normal

MOST_EXAMPLES = 2000  # that are compared with each other
MOST_COINS = 2e7
ENOUGH = 100.0  # expected coincidences below which the normal distribution is not trusted


def coins(sampler: Any, num_steps: int, draws: int) -> tuple[list[int], Array]:
    """The draws of steps that the run has, from its beginning, its middle and its end, one row each.

    Args:
        sampler: with ``num_examples`` and ``sample(step)``.
        num_steps: of the run.
        draws: rows; where the run has fewer steps, later ones are asked for too.
    Returns:
        Step indices, and 0 or 1 for each step and example, ``[draws, N]``.
    """
    third = draws // 3
    if num_steps <= draws:
        steps = list(range(draws))
    else:
        middle = max(third, (num_steps - third) // 2)
        steps = sorted({*range(draws - 2 * third), *range(middle, middle + third), *range(num_steps - third, num_steps)})
    found = np.zeros((len(steps), sampler.num_examples))
    for row, step in enumerate(steps):
        np.add.at(found[row], np.asarray(sampler.sample(step), np.int64), 1.0)
    return steps, found


def joint_sampling(sampler: Any, num_steps: int, draws: int = 240) -> Finding:
    """No two examples, and no two steps, may have more or fewer coins in common than independent ones.

    Args:
        sampler: of the run, with ``num_examples``, ``sample_rate`` and ``sample(step)``.
        num_steps: of the run.
        draws: logical batches.
    Returns:
        The finding at one in a million: rate at these steps; exact binomial tests of the overlap of each two batches, and of each two
        examples' common batches; the overlap summed over all steps of each distance; the spread of all overlaps, which grows where many
        examples go together. What only shows in three coins at once is not seen.
    """
    n, q = int(sampler.num_examples), float(sampler.sample_rate)
    steps, x = coins(sampler, num_steps, int(min(draws, max(24, MOST_COINS // n))))
    count, name = len(steps), "sampling of pairs"
    if q >= 1:
        return Finding(name, bool((x == 1).all()), f"all {n} examples in each of {count} batches", {})
    scores = {}
    overlaps = x @ x.T
    upper = np.triu_indices(count, 1)
    scores["overlap of two batches"] = binomial_score(overlaps[upper], n, q * q)
    chosen = np.random.default_rng(0).permutation(n)[:MOST_EXAMPLES]
    together = x[:, chosen].T @ x[:, chosen]
    scores["examples drawn together"] = binomial_score(together[np.triu_indices(len(chosen), 1)], count, q * q)
    var = q * (1 - q)
    scores["rate"] = binomial_score(x.sum(keepdims=True).ravel(), count * n, q)
    centred = (x - q) @ (x - q).T
    scores["steps at a distance"] = distance_score(steps, centred, n, var)
    scores["examples in common"] = spread_score(centred[upper], count, n, q)
    worst = max(scores, key=lambda key: scores[key])
    text = f"{count} batches of {n} examples at rate {q:.4g}: {worst} reach {scores[worst]:.3g} of what chance may do"
    return Finding(name, bool(scores[worst] <= 1), text, scores)


def binomial_score(values: Array, trials: int, chance: float) -> float:
    """Log-probability of the most extreme of many binomial numbers, over what one in a million allows; above 1 is too much."""
    from scipy.stats import binom  # type: ignore[import-untyped]

    if not len(values):
        return 0.0
    few, many = float(values.min()), float(values.max())
    p = 2 * len(values) * min(float(binom.cdf(few, trials, chance)), float(binom.sf(many - 1, trials, chance)))
    return max(0.0, -math.log(max(p, 1e-300))) / -math.log(FALSE_ALARM)


def distance_score(steps: list[int], centred: Array, n: int, var: float) -> float:
    """Overlaps summed over all pairs of steps of one distance, the most extreme of all distances; above 1 is too much."""
    apart = np.abs(np.subtract.outer(steps, steps))
    upper = np.triu_indices(len(steps), 1)
    sums, counts = np.bincount(apart[upper], centred[upper]), np.bincount(apart[upper])
    trusted = counts * n * var**2 >= ENOUGH
    if not trusted.any():
        return 0.0
    worst = float(np.abs(sums[trusted] / np.sqrt(counts[trusted] * n * var**2)).max())
    return worst / (furthest_normal(int(trusted.sum())) + 1)


def spread_score(overlaps: Array, count: int, n: int, q: float) -> float:
    """The sum of the squared overlaps of all pairs of batches, which is that of the squared common draws of all pairs of examples.

    With ``v = q (1 - q)`` and ``m`` the fourth moment of a coin, an overlap has mean 0, variance ``n v^2`` and fourth moment
    ``n m^2 + 3 n (n - 1) v^4``; the squares of two overlaps that share a batch have covariance ``n v^2 (m - v^2)``, of others 0.

    Returns:
        How far off it is, over what chance may do; above 1 is too much.
    """
    v, m = q * (1 - q), q * (1 - q) * (1 - 3 * q * (1 - q))
    pairs = len(overlaps)
    if pairs * n * v * v < ENOUGH:
        return 0.0
    own = n * m * m + 3 * n * (n - 1) * v**4 - (n * v * v) ** 2
    shared = n * v * v * (m - v * v)
    spread = math.sqrt(max(pairs * own + 2 * pairs * (count - 2) * shared, 1e-30))
    return abs(float((overlaps**2).sum()) - pairs * n * v * v) / spread / (furthest_normal(1) + 2)
