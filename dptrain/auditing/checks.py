"""Checks of the parts of a step: sensitivity, noise, its independence, sampling, the ledger. Exact, or a test at one in a million.

They say more than a lower bound on epsilon: where it is broken, and with a handful of steps.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import combinations, pairwise
from typing import Any

import numpy as np

from accounting import Event, NeighboringRelation
from dptrain.auditing.bounds import FALSE_ALARM, Array
from dptrain.auditing.findings import Finding
from dptrain.auditing.normal import FAR, directions, furthest_normal, lags, variance_test
from dptrain.auditing.subject import Subject
from dptrain.auditing.watch import owner_parameters
from dptrain.mechanism import FLOAT_MARGIN
from dptrain.plan import Plan
from dptrain.sampling import CappedSampler, FixedSizeSampler, ShuffledSampler

FEW = 32
SHORTEST = 64  # numbers, over all draws, below which parameters are not compared with each other
ENOUGH = 400


def contributions(subject: Subject) -> list[Array]:
    """What each example of the pool adds to an empty batch, whitened."""
    return [subject.total([i]) for i in range(len(subject.y))]


@dataclass(frozen=True)
class Change:
    """What one example changed.

    Args:
        name: which example, beside how many others.
        vector: change of the sums, whitened.
        count: change of the released count, in its own units; 0 where there is none.
    """

    name: str
    vector: Array
    count: float = 0.0


def changes(subject: Subject, alone: list[Array]) -> list[Change]:
    """What strained examples change alone and beside others.

    Args:
        subject: the step.
        alone: of ``contributions``.
    Returns:
        Each alone; each beside one other; a few beside a physical batch of others, and in the third physical batch.
    """
    order = sorted(range(len(alone)), key=lambda i: -float(np.linalg.norm(np.nan_to_num(alone[i]))))
    found = [Change(f"example {i} alone", v) for i, v in enumerate(alone)]
    for size, chosen in ((1, order), (subject.size - 1, order[:4]), (2 * subject.size, order[:4])):
        base = crowd(alone, size)
        crowded, count = subject.total(base), subject.count
        for i in chosen:
            vector = subject.total([*base, i]) - crowded
            found.append(Change(f"example {i} beside {size} others", vector, subject.count - count))
    return found


def sensitivity(subject: Subject, found: list[Change], when: str) -> Finding:
    """No example may add more than its bound to any group, or to the released count, alone or beside others.

    Args:
        subject: the step.
        found: of ``changes``.
        when: which weights, for the text.
    Returns:
        The finding; exact, up to ``FLOAT_MARGIN``.
    """
    largest, where = 0.0, ""
    bounds = {g.name: g.norm_bound / subject.stds[g.name] for g in subject.claimed.gradient_groups}
    counted = subject.claimed.count
    for change in found:
        ratios = {group: float(np.linalg.norm(part)) / bounds[group] for group, part in subject.groups(change.vector).items()}
        if counted is not None:
            ratios[counted.name] = abs(change.count) / counted.norm_bound
        for group, ratio in ratios.items():
            if not ratio <= largest:  # not a number counts as the largest
                largest, where = ratio, f"{change.name}, group {group!r}"
                if math.isnan(ratio):
                    largest = math.inf
    return Finding(
        f"sensitivity ({when})", bool(largest <= 1 + FLOAT_MARGIN),
        f"{len(found)} changes by strained examples are at most {largest:.6g} times the claimed bound ({where or 'nothing at all'})",
        {"largest_over_bound": largest},
    )  # fmt: skip


def joint_sensitivity(subject: Subject, alone: list[Array], found: list[Change], when: str) -> Finding:
    """All groups are released together: no change may be longer, in units of the noise, than the recorded event says.

    Args:
        subject: the step.
        alone: of ``contributions``.
        found: of ``changes``.
        when: which weights, for the text.
    Returns:
        The finding; exact, because the event has paid for rounding.
    """
    counted, lengths = subject.plan.count, [0.0]
    std = subject.stds[counted.name] if counted else math.inf
    if replaces(subject):
        rows = np.stack(alone)
        square = (rows**2).sum(1)
        apart = float(np.max(square[:, None] + square[None, :] - 2 * rows @ rows.T))
        lengths.append(math.hypot(math.sqrt(max(0.0, apart)), 2 * counted.norm_bound / std if counted else 0.0))
    else:
        lengths += [math.hypot(float(np.linalg.norm(c.vector)), c.count / std) for c in found]
    # The subtraction of equal sums leaves their rounding.
    largest = float(np.max(np.nan_to_num(lengths, nan=math.inf))) * subject.event.noise_multiplier
    what = "replacing an example" if replaces(subject) else "an example"
    text = f"{what} moves the release by at most {largest:.6g} times what noise multiplier {subject.event.noise_multiplier:.6g} says"
    return Finding(f"joint sensitivity ({when})", bool(largest <= 1 + FLOAT_MARGIN), text, {"largest_over_claimed": largest})


def replaces(subject: Subject) -> bool:
    """Whether neighbours differ by the replacement of an example."""
    return NeighboringRelation(subject.setup.config.privacy.relation) is NeighboringRelation.replace_one


def noise_over_sensitivity(plan: Plan, stds: Mapping[str, float], relation: NeighboringRelation | str) -> float:
    """Equation (1) of math.md, which audits compute themselves: what they look at may be a broken ``mechanism``."""
    factor = 2.0 if NeighboringRelation(relation) is NeighboringRelation.replace_one else 1.0
    if any(not stds[group.name] > 0 for group in plan.groups):
        return 0.0
    return 1.0 / math.sqrt(math.fsum((factor * group.norm_bound / stds[group.name]) ** 2 for group in plan.groups))


def crowd(alone: list[Array], count: int) -> list[int]:
    """Copies of the example whose contribution is most opposed to the largest one, so that what they share counts."""
    largest = np.nan_to_num(alone[int(np.argmax([np.linalg.norm(np.nan_to_num(v)) for v in alone]))])
    return [int(np.argmin([float(v @ largest) if np.isfinite(v).all() else math.inf for v in alone]))] * count


def residuals(subject: Subject, alone: list[Array], repeats: int = 8) -> dict[str, list[Array]]:
    """Noise as an attacker who knows everything else sees it, for an empty batch, one physical batch, and several.

    In the batch of many, whose sum is large, even a small part of it that gets past the noise shows.
    """
    found: dict[str, list[Array]] = {}
    kinds = (
        ("empty batch", 0, repeats), ("one physical batch", subject.size - 1, repeats),
        ("several physical batches", 3 * subject.size - 1, repeats), ("many physical batches", 16 * subject.size - 1, 2),
    )  # fmt: skip
    for name, size, count in kinds:
        indices = crowd(alone, size)
        found[name] = []
        for _ in range(count):
            exact = subject.total(indices)
            found[name].append(subject.release(indices) - exact)
    return found


def pieces(subject: Subject) -> dict[str, slice]:
    """Where each group, and each parameter, lies in a whitened vector."""
    arrays, found, start = subject.watch.parameters(subject.setup.model), dict[str, slice](), 0
    for group in subject.plan.gradient_groups:
        begin = start
        for name in owner_parameters(subject.plan, group.name):
            if name in arrays:
                found[f"parameter {name!r}"] = slice(start, start + arrays[name].size)
                start += arrays[name].size
        found[f"group {group.name!r}"] = slice(begin, start)
    return found


def noise(subject: Subject, seen: dict[str, list[Array]], alone: list[Array]) -> Finding:
    """The noise of every group and parameter must have the standard deviation that the event was made from, whatever is in the batch.

    Args:
        subject: the step.
        seen: of ``residuals``.
        alone: of ``contributions``; the noise along each of them is looked at too.
    Returns:
        The finding: chi-square tests of the variance, two-sided, at one in a million together: of each kind of batch, of each release, and
        along directions in which noise may be missing that is there in every number.
    """
    places = pieces(subject)
    tests = [(f"{place}, {kind}", np.concatenate([v[places[place]] for v in seen[kind]])) for kind in seen for place in places]
    tests += [(f"{place}, release {i} of {kind}", v[places[place]]) for kind in seen for i, v in enumerate(seen[kind]) for place in places]
    found = [(*variance_test(values), name) for name, values in tests if len(values)]
    found += directions(seen, alone, places)
    p, ratio, worst = min(found)
    text = f"largest deviation of {len(found)} tests: {ratio:.4g} times the claimed standard deviation in {worst} (p = {p:.3g})"
    figures = {"smallest_over_claimed": min(ratio for _, ratio, name in found if "release" not in name), "p_value": p}
    return Finding("noise", bool(p > FALSE_ALARM / len(found)), text, figures)


def count_noise(subject: Subject) -> Finding:
    """The same for the count that moves a clipping norm, over all releases so far.

    Returns:
        The finding; a two-sided chi-square test at one in a million.
    """
    values = np.array(subject.watch.counts_off)
    p, ratio = variance_test(values)
    text = f"{len(values)} released counts had {ratio:.4g} times the claimed standard deviation (p = {p:.3g})"
    return Finding("noise of the released count", p > FALSE_ALARM, text, {"over_claimed": ratio, "p_value": p})


def independence(subject: Subject, seen: dict[str, list[Array]]) -> Finding:
    """The noise of one step must say nothing about that of another, nor one number's about any other's, in its parameter or another one.

    Returns:
        The finding: correlations, normal to good accuracy, none beyond six standard deviations (more where there are many).
    """
    draws = [v for kind in seen.values() for v in kind]
    pairs = list(combinations(draws, 2))
    places = [where for place, where in pieces(subject).items() if place.startswith("parameter")]
    # Over all draws together, so that small parameters count too.
    parts = [np.stack([draw[where] for draw in draws]) for where in places]
    for a, b in combinations([part for part in parts if part.size >= SHORTEST][:40], 2):
        size = min(a.shape[1], b.shape[1])
        if size * len(draws) >= SHORTEST:
            pairs.append((a[:, :size].ravel(), b[:, :size].ravel()))
            pairs.append((a[:, ::-1][:, :size].ravel(), b[:, :size].ravel()))
    largest, tests = lags(parts) if np.isfinite(np.concatenate(draws)).all() else (math.inf, 1)
    for a, b in pairs:
        scale = float(np.linalg.norm(a) * np.linalg.norm(b))
        largest = max(largest, abs(float(a @ b)) / scale * math.sqrt(len(a)) if scale else math.inf)
    tests += len(pairs)
    text = f"largest of {tests} correlations is {largest:.3g} standard deviations"
    return Finding("independence of the noise", bool(largest <= furthest_normal(tests)), text, {"largest_correlation": largest})


def claim(event: Event) -> float:
    """The noise multiplier that an event claims; a kind that a step cannot be claims everything."""
    return float(getattr(event, "noise_multiplier", math.inf))


def bookkeeping(subject: Subject) -> Finding:
    """Every release is in the ledger before the weights change, with the noise it had.

    Returns:
        The finding; exact.
    """
    events = subject.ledger.events
    counted = subject.ledger.num_releases
    claimed = max((claim(event) for event, _ in events), default=math.inf)
    true = noise_over_sensitivity(subject.plan, subject.stds, subject.setup.config.privacy.relation)
    rate = min((getattr(event, "sample_rate", 0.0) for event, _ in events), default=0.0)
    right = counted >= subject.steps and subject.late == 0 and claimed <= true * (1 + 1e-9) and rate >= 1.0
    text = (
        f"{counted} of {subject.steps} releases recorded, {subject.late} of them after the weights had changed, at noise multiplier "
        f"{claimed:.6g} (in truth {true:.6g}) and sample rate {rate:.6g} (in truth 1)"
    )
    return Finding("ledger", bool(right), text, {"recorded": float(counted), "released": float(subject.steps), "late": float(subject.late)})


# Steps that no run reaches: what is drawn for them is no secret.
UNUSED = 10**9


def sampling(sampler: Any, draws: int = 200) -> Finding:
    """Logical batches must look like what the sampler's event claims.

    Args:
        sampler: of the run, with ``num_examples``, ``sample_rate`` and ``sample(step)``; what it claims goes by its class, and one of no
            class that is known here claims Poisson samples.
        draws: logical batches.
    Returns:
        The finding; exact, or each test within one in a million or six standard deviations of what was claimed.
    """
    draws = int(min(draws, max(20, 2e7 // sampler.num_examples)))
    if isinstance(sampler, ShuffledSampler):
        return shuffled(sampler, draws)
    batches = [np.asarray(sampler.sample(UNUSED + t)) for t in range(draws)]
    if isinstance(sampler, FixedSizeSampler):
        return fixed_size(sampler, batches)
    if isinstance(sampler, CappedSampler):
        return capped(sampler, batches)
    return coins(sampler, batches)


def coins(sampler: Any, batches: list[Any]) -> Finding:
    """Independent coins of the claimed rate, and no example twice in a batch.

    The number of examples drawn and the overlap of neighbouring batches by their own laws; the spread of the sizes and of each example's
    count within six standard deviations.
    """
    from scipy.stats import binom

    n, q, draws = sampler.num_examples, sampler.sample_rate, len(batches)
    distinct = all(len(np.unique(b)) == len(b) for b in batches)
    sizes, counts = np.array([len(b) for b in batches], np.float64), counts_of(batches, n)
    if q >= 1:
        return Finding("sampling", bool((sizes == n).all() and distinct), f"all {n} examples in each of {draws} batches", {})
    drawn = int(sizes.sum())
    scores, p = overlap_test(batches, n)
    p["rate"] = min(1.0, 2 * min(float(binom.cdf(drawn, draws * n, q)), float(binom.sf(drawn - 1, draws * n, q))))
    scores |= {"spread of batch sizes": spread(sizes, n, q), "spread of examples' counts": spread(counts, draws, q)}
    return verdict(f"{draws} batches of {n} examples at rate {q:.4g}", "an example was drawn twice", distinct, scores, p)


def counts_of(batches: list[Any], n: int) -> Array:
    """In how many batches each example is."""
    return np.bincount(np.concatenate([*batches, np.zeros(0, np.int64)]).astype(np.int64), minlength=n).astype(np.float64)


def overlap_test(batches: list[Any], n: int) -> tuple[dict[str, float], dict[str, float]]:
    """How far the overlap of neighbouring batches is from its mean, where each is a uniform subset of its size.

    Returns:
        A score in standard deviations, or a p-value where there is too little of it for one; by name.
    Source: given the sizes a and b, an overlap is hypergeometric, a sum of independent coins, and independent of the next one. Such a sum
        is no more spread than a binomial of the same mean (Hoeffding 1956).
    """
    from scipy.stats import binom

    name = "overlap of neighbouring batches"
    pairs = [(len(a), len(b), len(np.intersect1d(a, b))) for a, b in pairwise(batches)]
    mean = math.fsum(a * b / n for a, b, _ in pairs)
    var = math.fsum(a * b * (n - a) * (n - b) / (n * n * max(1, n - 1)) for a, b, _ in pairs)
    shared = sum(found for _, _, found in pairs)
    if var >= SHORTEST:
        return {name: (shared - mean) / math.sqrt(var)}, {}
    coins = max(1, sum(min(a, b) for a, b, _ in pairs))
    rate = min(1.0, mean / coins)
    tails = float(binom.cdf(shared, coins, rate)), float(binom.sf(shared - 1, coins, rate))
    return {}, {name: 1.0 if abs(shared - mean) < 1 else min(1.0, 2 * min(tails))}


def rate_test(counts: Array, draws: int, rate: float) -> float:
    """p-value of the most unusual example, if each is in a batch with this rate, independently from batch to batch; for all examples."""
    from scipy.stats import binom

    tails = np.minimum(binom.cdf(counts, draws, rate), binom.sf(counts - 1, draws, rate))
    return min(1.0, 2 * len(counts) * float(tails.min()))


def spread_test(counts: Array, draws: int, rate: float) -> float:
    """Two-sided p-value of the spread of examples' counts over batches of one size.

    Source: it is the sum of the overlaps of all pairs of batches, so its mean and variance are known exactly; the law is that of a sum of
        N - 1 squares, nearly.
    """
    from scipy.stats import chi2

    n = len(counts)
    pairs = draws * (draws - 1) / 2 * n * (rate * (1 - rate)) ** 2 * n / max(1, n - 1)
    if rate >= 1 or pairs < ENOUGH:  # the variance of all overlaps is too little for such a law
        return 1.0
    square = float(((counts - draws * rate) ** 2).sum()) / (draws * rate * (1 - rate)) * (n - 1) / n
    moved = max(0.0, (square - (n - 1)) * math.sqrt(draws / (draws - 1)) + (n - 1))
    return min(1.0, 2 * min(float(chi2.cdf(moved, n - 1)), float(chi2.sf(moved, n - 1))))


def position_score(batches: list[Any], n: int) -> float:
    """How far the mean index is from the middle, in standard deviations, where each batch is a uniform subset of its size."""
    off = math.fsum(float(b.sum()) - len(b) * (n - 1) / 2 for b in batches)
    var = math.fsum(len(b) * (n - len(b)) * (n + 1) / 12 for b in batches)
    return off / math.sqrt(var) if var > 0 else 0.0


def fixed_size(sampler: Any, batches: list[Any]) -> Finding:
    """Uniform subsets of one size, drawn anew.

    The size exactly; each example's rate, the spread of the counts, the overlap of neighbouring batches, the position of what is drawn.
    """
    n, size, draws = sampler.num_examples, sampler.batch_size, len(batches)
    exact = all(len(b) == size == len(np.unique(b)) and b.min() >= 0 and b.max() < n for b in batches)
    counts, q = counts_of(batches, n), size / n
    figures, p = overlap_test(batches, n)
    figures |= {"position of what is drawn": position_score(batches, n)}
    p |= {"an example's rate": rate_test(counts, draws, q), "spread of examples' counts": spread_test(counts, draws, q)}
    return verdict(f"{draws} batches of {size} of {n} examples", "a batch has another size, or an example twice", exact, figures, p)


def capped(sampler: Any, batches: list[Any]) -> Finding:
    """Poisson samples of which at most some are kept, at random.

    The cap exactly; mean and spread of the sizes, the number of full batches, each example's rate, the overlap of neighbouring batches; and
    who is in the full ones, and in which position, since those are what the cap has made.
    """
    from scipy.stats import binom

    n, q, cap, draws = sampler.num_examples, sampler.sample_rate, sampler.max_batch_size, len(batches)
    exact = all(len(np.unique(b)) == len(b) <= cap for b in batches)
    values = np.arange(cap + 1, dtype=np.float64)
    weights = binom.pmf(values, n, q)
    weights[-1] = binom.sf(cap - 1, n, q)
    mean = float(weights @ values)
    var, fourth = (float(weights @ (values - mean) ** power) for power in (2, 4))
    sizes = np.array([len(b) for b in batches], np.float64)
    spare, beyond = float(((sizes - mean) ** 2).sum()) - draws * var, fourth - var**2
    at_cap = [b for b in batches if len(b) == cap]
    full = len(at_cap)
    figures, p = overlap_test(batches, n)
    figures |= {"position of what is kept": position_score(at_cap, n)}
    tail = float(weights[-1])
    p |= {
        "an example's rate": rate_test(counts_of(batches, n), draws, mean / n),
        "spread of examples' counts in full batches": spread_test(counts_of(at_cap, n), full, cap / n),
        "full batches": min(1.0, 2 * min(float(binom.cdf(full, draws, tail)), float(binom.sf(full - 1, draws, tail)))),
    }
    if var * draws >= SHORTEST:  # enough of it for a normal approximation
        figures |= {"mean of batch sizes": (sizes.sum() - draws * mean) / math.sqrt(draws * var)}
    if var >= 4:
        figures |= {"spread of batch sizes": spare / math.sqrt(draws * beyond)}
    return verdict(
        f"{draws} batches of at most {cap} of {n} examples at rate {q:.4g}", "a batch is above the cap, or has an example twice", exact,
        figures, p,
    )  # fmt: skip


def shuffled(sampler: Any, draws: int) -> Finding:
    """Passes in orders of their own.

    Exactly: every batch has its size, and no example is twice in a pass. The places that examples have in two passes have no more in common
    than chance gives them.
    """
    n, size, per_pass = sampler.num_examples, sampler.batch_size, sampler.per_pass
    start = sampler.first + (UNUSED // per_pass + 1) * per_pass
    places, exact = [], True
    for number in range(max(2, min(20, draws // per_pass))):
        batches = [np.asarray(sampler.sample(start + number * per_pass + t)) for t in range(per_pass)]
        drawn = np.concatenate(batches)
        exact = exact and all(len(b) == size for b in batches) and len(np.unique(drawn)) == len(drawn)
        place = np.full(n, -1)
        place[drawn] = np.repeat(np.arange(per_pass), [len(b) for b in batches])
        places.append(place)
    shared = math.fsum(float(((a == b) & (a >= 0)).sum()) for a, b in pairwise(places))
    mean = (len(places) - 1) * per_pass * size * size / n
    # A table of two partitions has hypergeometric cells; those of its diagonal are correlated.
    cells = per_pass * (size * (n - size)) ** 2 + per_pass * (per_pass - 1) * size**4
    var = (len(places) - 1) * cells / (n * n * max(1, n - 1))
    name, scores, p = "places that two passes share", dict[str, float](), dict[str, float]()
    if var >= SHORTEST:
        scores[name] = (shared - mean) / math.sqrt(var)
    else:  # few: the chance of k of them is at most their mean to the k over k!, nearly
        p[name] = min(1.0, math.exp(min(0.0, shared * math.log(2 * mean) - math.lgamma(shared + 1)))) if mean > 0 else 1.0
    text = f"{len(places)} passes of {per_pass} batches of {size} of {n} examples"
    return verdict(text, "an example is twice in a pass, or a batch has another size", exact, scores, p)


def verdict(what: str, broken: str, exact: bool, scores: dict[str, float], p_values: dict[str, float]) -> Finding:
    """A finding from what must hold exactly, scores in standard deviations and p-values."""
    texts = {name: (abs(score) > FAR, f"{name} is off by {abs(score):.3g} standard deviations") for name, score in scores.items()}
    texts |= {name: (p <= FALSE_ALARM / max(1, len(p_values)), f"{name} has p = {p:.3g}") for name, p in p_values.items()}
    wrong = [text for bad, text in texts.values() if bad] + ([] if exact else [broken])
    return Finding("sampling", not wrong, f"{what}: {'; '.join(wrong) or '; '.join(text for _, text in texts.values())}", scores | p_values)


def spread(values: Array, trials: int, q: float) -> float:
    """How far the sum of squared deviations of binomial values is from its mean, in standard deviations of a normal value.

    A few squares are not normal; their sum is compared with the chi-square distribution of the same mean and variance.
    """
    from scipy.stats import chi2, norm

    var = trials * q * (1 - q)
    fourth = var * (1 + 3 * var * (1 - 2 / trials)) if trials > 1 else var * (1 - 3 * q * (1 - q))
    mean, variance = len(values) * var, len(values) * (fourth - var**2)
    total = float(((values - trials * q) ** 2).sum())
    if variance <= 1e-9 * mean**2:  # one fair coin: always equally far from its mean
        return 0.0 if math.isclose(total, mean, rel_tol=1e-6) else math.inf
    scaled, degrees = total * 2 * mean / variance, 2 * mean**2 / variance
    # A few whole numbers may all hit their mean, which continuous ones never do.
    rounding = len(values) / 4 * 2 * mean / variance if len(values) < FEW else 0.0
    above, below = float(chi2.sf(scaled, degrees)), float(chi2.cdf(scaled + rounding, degrees))
    return float(norm.isf(max(above, 1e-300)) if above < below else norm.ppf(max(below, 1e-300)))
