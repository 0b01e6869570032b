"""Whether numbers look like independent draws of the standard normal distribution: each test at one in a million, or far beyond."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np

from dptrain.auditing.bounds import FALSE_ALARM, Array
from dptrain.auditing.findings import Finding

# Normal approximations are trusted to this many standard deviations: 2e-9.
FAR = 6.0
KEPT = 20_000  # numbers of a vector that are compared with those of others
LONGEST = 2**17  # numbers of a parameter that are compared with each other
FEW = 8  # numbers, of which two independent vectors are never in the same direction
MOST_VALUES = 1_000_000  # that the shape of the noise is judged by
MOST_EQUAL = 8  # of a hundred thousand normal numbers in float32, which may be equal
TAILS = (2.0, 3.0, 4.0, 5.0)


def variance_test(values: Array) -> tuple[float, float]:
    """Two-sided p-value of what should be N(0, 1), and its standard deviation."""
    from scipy.stats import chi2

    square = float(values @ values) if np.isfinite(values).all() else math.inf
    p = 2 * min(float(chi2.cdf(square, len(values))), float(chi2.sf(square, len(values))))
    return p, math.sqrt(square / len(values))


def furthest_normal(tests: int) -> float:
    """What none of many normal values exceeds, at the error of ``FAR``."""
    return FAR + math.sqrt(2 * math.log(max(2, tests))) - 1


def most_alike(seen: Sequence[Array]) -> tuple[float, tuple[int, int]]:
    """The largest correlation between two of some vectors, in standard deviations, and which two."""
    size = len(seen[0])
    chosen = slice(None) if size <= KEPT else np.random.default_rng(0).choice(size, KEPT, replace=False)
    rows = np.stack([v[chosen] for v in seen])
    lengths = np.linalg.norm(rows, axis=1, keepdims=True)
    if not (np.isfinite(rows).all() and (lengths > 0).all()):
        return math.inf, (0, len(seen) - 1)
    rows = rows / lengths
    gram = np.abs(rows @ rows.T) * math.sqrt(rows.shape[1])
    np.fill_diagonal(gram, 0.0)
    first, second = np.unravel_index(int(gram.argmax()), gram.shape)
    # Few numbers cannot be correlated by much, but they are never the same.
    same = rows.shape[1] >= FEW and gram.max() >= math.sqrt(rows.shape[1]) * (1 - 1e-6)
    return math.inf if same else float(gram.max()), (int(first), int(second))


def some(vectors: Sequence[Array]) -> Array:
    """The first numbers of some vectors, in one."""
    enough = np.cumsum([len(v) for v in vectors]).searchsorted(MOST_VALUES) + 1
    return np.concatenate(vectors[: int(enough)])[:MOST_VALUES]


def shape(values: Array) -> Finding:
    """The noise must be normal, its tails included, and it must not repeat numbers.

    Bounded noise of the right variance tells some data sets apart with certainty, and noise of few values all that differ by less than
    one of its steps.

    Args:
        values: whitened noise.
    Returns:
        The finding at one in a million: Kolmogorov and Smirnov's test, binomial tests of the tails and counts of equal numbers.
    """
    from scipy.stats import binom, kstest, norm  # type: ignore[import-untyped]

    if not np.isfinite(values).all():
        return Finding("shape of the noise", False, "the noise is not finite", {"distance": 1.0, "p_value": 0.0})
    result = kstest(values, "norm")
    found = [(float(result.pvalue), f"{float(result.statistic):.3g} away from the normal distribution")]
    for tail in TAILS:
        beyond, chance = int((np.abs(values) > tail).sum()), 2 * float(norm.sf(tail))
        p = 2 * min(float(binom.cdf(beyond, len(values), chance)), float(binom.sf(beyond - 1, len(values), chance)))
        found.append((p, f"{beyond} beyond {tail:g} standard deviations, where {chance * len(values):.4g} are expected"))
    p, worst = min(found)
    few = np.abs(values[:100_000])
    different, times = np.unique(few.astype(np.float32), return_counts=True)
    repeated = 1.0 - len(different) / len(few)
    passed = p > FALSE_ALARM / len(found) and repeated <= 0.02 and times.max() <= MOST_EQUAL
    text = f"{len(values)} values: {worst} (p = {p:.3g}); {repeated:.2%} of them repeat another up to the sign"
    text += f", one {times.max()} times" if times.max() > MOST_EQUAL else ""
    return Finding("shape of the noise", bool(passed), text, {"distance": float(result.statistic), "p_value": p, "repeated": repeated})


def directions(seen: Mapping[str, Sequence[Array]], along: Sequence[Array], places: Mapping[str, slice]) -> list[tuple[float, float, str]]:
    """Tests of the variance of the noise along some directions, as ``variance_test`` with a name.

    Noise may have the right variance in every number and none along the direction that an example moves.

    Args:
        seen: kind -> residuals.
        along: what each example adds.
        places: name -> numbers whose mean is looked at.
    Returns:
        (p-value, standard deviation, name) of each.
    """
    found = []
    for kind, draws in seen.items():
        for i, vector in enumerate(along):
            length = float(np.linalg.norm(vector))
            if length > 0:
                values = np.array([float(draw @ vector) for draw in draws]) / length
                found.append((*variance_test(values), f"the direction of example {i}, {kind}"))
        for place, where in places.items():
            if where.stop > where.start:
                values = np.array([float(draw[where].sum()) for draw in draws]) / math.sqrt(where.stop - where.start)
                found.append((*variance_test(values), f"the mean of {place}, {kind}"))
    return found


def lags(parts: Sequence[Array]) -> tuple[float, int]:
    """The largest correlation of any parameter's noise with itself, shifted or shifted and turned round.

    Args:
        parts: for each parameter ``[draws, size]``.
    Returns:
        It, in standard deviations, and how many were looked at.
    """
    largest, count = 0.0, 0
    for part in parts:
        part = part[:, :LONGEST]
        draws, size = part.shape
        total = float((part**2).mean()) ** 2 * draws
        if size < 8 or not total > 0:
            continue
        spectrum = np.fft.rfft(part, axis=1)
        shifted = np.fft.irfft((np.abs(spectrum) ** 2).sum(0), size)[1 : size // 2 + 1]
        if size % 2 == 0:
            shifted[-1] /= math.sqrt(2)  # a lag of half the size counts each pair twice
        turned = np.fft.irfft((spectrum**2).sum(0), size)  # of which all pairs count twice, but for one or two numbers with themselves
        centre = total**0.5 * draws**0.5  # mean square times draws: what numbers with themselves add
        own = np.array([2.0 if size % 2 == 0 and k % 2 == 0 else 0.0 if size % 2 == 0 else 1.0 for k in range(size)])
        largest = max(largest, float(np.abs(shifted).max()) / math.sqrt(total * size))
        largest = max(largest, float(np.abs(turned - own * centre).max()) / math.sqrt(2 * total * size))
        count += len(shifted) + len(turned)
    return largest, count
