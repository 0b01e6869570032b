"""Sampling is Poisson: each example enters each step independently with probability q, in one draw per logical batch."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from dptrain import ConfigError, PoissonSampler
from dptrain.randomness import SAMPLING, RandomKey
from dptrain.sampling import check_physical_batch_size, default_physical_batch, physical_batches
from tests.core.shared import EXAMPLES, FALSE_FAILURE

KEY = RandomKey.make(SAMPLING, unsafe_seed=20)


def draws(count: int, rate: float, steps: int, key: RandomKey = KEY) -> np.ndarray:
    """Who was in which step, ``[steps, N]``."""
    sampler = PoissonSampler(count, rate, key)
    drawn = np.zeros((steps, count), bool)
    for step in range(steps):
        drawn[step, sampler.sample(step)] = True
    return drawn


# ---- the law -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rate", [1e-3, 0.01, 0.3, 0.5, 0.97])
def test_the_inclusion_probability_is_the_sample_rate(rate):
    drawn = draws(2000, rate, 500)
    assert stats.binomtest(int(drawn.sum()), drawn.size, rate).pvalue > FALSE_FAILURE


def test_every_example_and_every_step_has_the_same_probability():
    """Chi-square over examples, and over steps: no position is favoured."""
    rate, (steps, count) = 0.2, (600, 600)
    drawn = draws(count, rate, steps)
    for axis, trials in ((0, steps), (1, count)):
        z = (drawn.sum(axis) - trials * rate) ** 2 / (trials * rate * (1 - rate))
        assert FALSE_FAILURE < stats.chi2.sf(z.sum(), len(z)) < 1 - FALSE_FAILURE


def test_batch_sizes_are_binomial():
    """A sampler of fixed-size batches, or one that draws with replacement, fails here (pitfalls.md G15)."""
    count, rate, steps = 100, 0.1, 4000
    sizes = draws(count, rate, steps).sum(1)
    edges = range(4, 17)
    law = stats.binom(count, rate)
    expected = np.array([law.cdf(4), *(law.pmf(k) for k in edges if k > 4), law.sf(16)]) * steps
    observed = np.array([(sizes <= 4).sum(), *((sizes == k).sum() for k in edges if k > 4), (sizes > 16).sum()])
    assert expected.min() > 20
    assert stats.chisquare(observed, expected * observed.sum() / expected.sum()).pvalue > FALSE_FAILURE


def test_examples_are_drawn_independently_of_each_other_and_of_the_step_before():
    rate, steps, count = 0.3, 3000, 40
    z = (draws(count, rate, steps) - rate) / math.sqrt(rate * (1 - rate))
    pairs = (z.T @ z / math.sqrt(steps))[np.triu_indices(count, 1)]
    following = (z[:-1].T @ z[1:] / math.sqrt(steps - 1)).ravel()
    for correlations in (pairs, following):
        bound = stats.norm.isf(FALSE_FAILURE / (2 * len(correlations)))
        assert np.abs(correlations).max() < bound
        assert FALSE_FAILURE < stats.chi2.sf((correlations**2).sum(), len(correlations)) < 1 - FALSE_FAILURE


def test_a_rate_of_one_takes_everybody():
    sampler = PoissonSampler(7, 1.0, KEY)
    for step in range(3):
        np.testing.assert_array_equal(sampler.sample(step), np.arange(7))


def test_a_tiny_rate_gives_empty_batches():
    sampler = PoissonSampler(10, 1e-12, KEY)
    for step in range(20):
        batch = sampler.sample(step)
        assert batch.shape == (0,)
        assert list(physical_batches(batch, 8)) == []


def test_the_realised_probability_is_never_above_the_claimed_one():
    """floor(q 2^64) / 2^64 <= q, also at the ends of the range."""
    for rate in (5e-324, 2.0**-64, 1e-15, 1 / 3, math.nextafter(1.0, 0.0)):
        assert math.floor(rate * 2.0**64) <= 2**64 - 1
        assert math.floor(rate * 2.0**64) / 2**64 <= rate
        batch = PoissonSampler(5, rate, KEY).sample(0)
        assert set(batch) <= set(range(5))


def test_a_step_can_be_drawn_again_and_steps_differ():
    sampler = PoissonSampler(1000, 0.5, KEY)
    np.testing.assert_array_equal(sampler.sample(3), sampler.sample(3))
    assert set(sampler.sample(3)) != set(sampler.sample(4))
    other = PoissonSampler(1000, 0.5, RandomKey.make(SAMPLING, unsafe_seed=21))
    assert set(sampler.sample(3)) != set(other.sample(3))


def test_batches_are_sorted_and_without_repetition():
    for step in range(20):
        batch = PoissonSampler(50, 0.5, KEY).sample(step)
        assert (np.diff(batch) > 0).all()
        assert np.issubdtype(batch.dtype, np.integer)


@pytest.mark.parametrize("rate", [0.0, -0.1, 1.0000001, float("nan"), float("inf")])
def test_a_rate_outside_its_range_is_refused(rate):
    with pytest.raises(ConfigError, match=r"sample_rate must lie in \(0, 1\]"):
        PoissonSampler(10, rate, KEY)


def test_an_empty_data_set_is_refused():
    with pytest.raises(ConfigError, match="no examples"):
        PoissonSampler(0, 0.5, KEY)


# ---- physical batches ----------------------------------------------------------------------------------------------


@EXAMPLES
@given(st.lists(st.integers(0, 10**6), max_size=70, unique=True), st.integers(1, 33))
def test_physical_batches_have_one_shape_and_cover_the_logical_batch_once(indices, size):
    logical = np.array(indices, dtype=np.int64)
    parts = list(physical_batches(logical, size))
    assert len(parts) == math.ceil(len(indices) / size)
    for part, mask in parts:
        assert part.shape == mask.shape == (size,)
        assert mask.dtype == bool
        assert mask.any()
        assert set(part[~mask]) <= set(indices)  # padding repeats an example; its weight is 0
    covered = [index for part, mask in parts for index in part[mask]]
    assert covered == indices


def test_the_logical_batch_does_not_depend_on_the_physical_size():
    """One draw, split afterwards; a draw per physical batch would be another mechanism (pitfalls.md G26)."""
    batch = PoissonSampler(100, 0.4, KEY).sample(5)
    for size in (1, 3, 16, 100, 1000):
        np.testing.assert_array_equal(np.concatenate([part[mask] for part, mask in physical_batches(batch, size)]), batch)


@pytest.mark.parametrize(
    ("expected", "count", "options", "size"),
    [(50, 1000, {}, 72), (600, 10_000, {}, 256), (600, 10_000, {"largest": None}, 674), (0.5, 10, {}, 3), (50, 60, {}, 60), (1, 1, {}, 1),
     (50, 1000, {"copies": 8}, 32), (50, 1000, {"copies": 1000}, 1)],
)  # fmt: skip
def test_a_physical_batch_that_nobody_names_holds_nearly_every_logical_one(expected, count, options, size):
    assert default_physical_batch(expected, count, **options) == size


def test_a_physical_batch_size_is_a_positive_whole_number_or_none():
    assert check_physical_batch_size(None) is None
    assert check_physical_batch_size(np.int64(3)) == 3
    for bad in (0, -2, 1.0, True, "8"):
        with pytest.raises(ConfigError, match="whole number above 0"):
            check_physical_batch_size(bad)
